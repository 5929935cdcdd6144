"""Runs as people start them: three modes, bases that are shared, counts that add up, resume and reuse."""
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import train
from conftest import (ROOT, TINY, assert_same_run, call, finished, generator, refusal, stop_after, tiny,
                      unbroken)
from data import ARMS, MARKS
from diffusion import MODES, loss
from model import ModelConfig, Transformer


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_is_examined_and_answers(mode, capsys):
    """A few steps through the command line leave a checkpoint, a log and a result, and eval.py reads them
    all."""
    call(train, "--mode", mode, *TINY, "--resume")  # nothing is there yet: a fresh start
    folder = next(Path("out").glob(f"{mode}-none-*-seed0"))
    log, _, result = finished(folder)
    assert log[0]["step"] == 0 and log[-1]["step"] == 6
    assert {"forward", "backward", "known_forward", "known_backward", "tokens", "supervised", "documents",
            "flops", "loss", "forward_by_attribute", "rouge"} <= set(log[-1])
    assert result["chance"]["backward"] == 1 / 10 and result["settings"]["mode"] == mode
    table = capsys.readouterr().out
    assert "new people" in table and "known people" in table and "chance" in table
    call(evaluation, folder)
    assert capsys.readouterr().out.strip() in table  # examined from the file alone, it scores the same
    call(evaluation, folder, "--ask", "What is the major of Curtis Chase Emley?")
    assert len(capsys.readouterr().out.splitlines()) == 1
    for flags in ([], ["--costs"]):
        call(evaluation, *flags)
        assert mode in capsys.readouterr().out


@pytest.mark.parametrize("flags, name", (
    ("", "masked-none-seed0"), ("--mode ar --seed 3", "ar-none-seed3"),
    ("--mask_ratio .75 --wordings 1 --lr .02", "masked-none-seed0"),
    ("--paraphrases same --wordings 5 --known 300 --no_replay", "masked-same-no_replay-known300-seed0"),
    ("--mode diffusion --mask_ratio .5 --device cpu", "diffusion-none-mask_ratio0.5-seed0")))
def test_a_folder_is_named_after_what_was_changed(flags, name, monkeypatch):
    """Mode, arm, each flag that decides the result and is not at its default, seed: two settings never share
    a folder, and a default that is spelled out makes no new one."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    assert train.parse_args().out_dir == f"out/{name}"


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_can_be_trained_on(arm):
    """Every way to write the documents goes through the whole path; its name is in the folder's."""
    call(train, "--mode", "ar", "--paraphrases", arm, *TINY)
    assert len(list(Path("out").glob(f"ar-{arm}-*"))) == 1


def test_what_a_run_spends_is_counted():
    """4 school and 6 reading steps of 16 rows, three of them questions: 130 documents. `masked` puts
    documents through the model twice while it reads, and is scored on as many tokens as `ar`."""
    for mode in ("ar", "masked"):
        tiny(train, "--mode", mode, folder=f"out/{mode}")
    ar, masked = (finished(f"out/{mode}")[0] for mode in ("ar", "masked"))
    assert ar[-1]["documents"] == masked[-1]["documents"] == 10 * (16 - 3)
    assert ar[0] == masked[0]  # the same base, the same exam before reading
    assert ar[-1]["supervised"] == masked[-1]["supervised"]
    assert 1.5 < (masked[-1]["tokens"] - masked[0]["tokens"]) / (ar[-1]["tokens"] - ar[0]["tokens"]) < 2
    assert masked[-1]["flops"] > ar[-1]["flops"]


def test_flops_are_those_that_pytorch_counts():
    """2 blocks of C = 16 on 3 rows of 8 tokens, 5 scored, V = 11, by hand: a token costs 2 x 12 x 16^2 in the
    matrices and 4 x 8 x 16 in attention a block, a scored position 2 x 11 x 16, and a step three times that.
    PyTorch's own counter agrees."""
    model = Transformer(ModelConfig(11, n_layer=2, n_head=2, n_embd=16))
    by_hand = 3 * (3 * 8 * 2 * (2 * 12 * 16**2 + 4 * 8 * 16) + 5 * 2 * 11 * 16)
    assert model.flops(3, 8, 5) == by_hand
    tokens = torch.randint(1, 11, (3, 8), generator=generator())
    weights = torch.zeros(3, 8)
    weights[:, 2] = weights[:2, 5] = 1
    with FlopCounterMode(display=False) as counter:
        loss(model, tokens, tokens, weights).backward()
    assert counter.get_total_flops() == by_hand


@pytest.mark.parametrize("save_every", (0, 60), ids=("saved at each step", "saved at each exam"))
@pytest.mark.parametrize("killed_at", (3, 5, 8))
def test_a_resumed_run_equals_an_unbroken_one(killed_at, save_every, monkeypatch):
    """A crash in school, at its end or in reading loses the steps since the last save, never the result. With
    two exams and no save between them the lost steps are done again."""
    monkeypatch.setattr(train, "EXAMS", 2)
    monkeypatch.setattr(train, "SAVE_EVERY", save_every)
    unbroken()

    def crash():
        raise KeyError("killed")
    stop_after(killed_at, monkeypatch, crash)
    with pytest.raises(KeyError, match="killed"):
        tiny(train, folder="b/run")
    monkeypatch.setattr(train, "loss", loss)
    tiny(train, "--resume", folder="b/run")
    assert_same_run("a/run", "b/run")


@pytest.mark.parametrize("pressed_at", (2, 4, 7, 10))
def test_ctrl_c_saves_and_says_how_to_go_on(pressed_at, monkeypatch, capfd):
    """The step is finished, the checkpoint written, in school as in reading; --resume repeats no step."""
    unbroken()
    calls = stop_after(pressed_at, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        tiny(train, folder="b/run")
    assert stop.value.code == 2 and "--resume" in capfd.readouterr().err and len(calls) == pressed_at
    tiny(train, "--resume", folder="b/run")
    assert len(calls) == 10
    assert_same_run("a/run", "b/run")


def test_a_finished_run_is_left_as_it_is(monkeypatch):
    """--resume on it trains no step and gives the same result: a loop over many runs can be started again."""
    tiny(train)
    before = Path("out/run/ckpt.pt").read_bytes(), finished("out/run")
    calls = stop_after(99, monkeypatch, None)
    tiny(train, "--resume")
    assert not calls and Path("out/run/ckpt.pt").read_bytes() == before[0]
    assert finished("out/run")[2] == before[1][2]


def test_a_reused_base_changes_nothing(capsys):
    """`masked` after `ar` skips school, and ends where a `masked` run that went to school itself ends."""
    tiny(train, "--mode", "ar", folder="out/ar")
    capsys.readouterr()
    tiny(train, "--mode", "masked", folder="out/masked")
    base, = Path("out/bases").iterdir()
    assert f"school is done: {base}" in capsys.readouterr().out
    base.unlink()
    tiny(train, "--mode", "masked", folder="out/alone")
    assert_same_run("out/masked", "out/alone")


def test_reading_at_rate_zero_changes_nothing():
    """--reading_rate is a share of the rates in reading alone: at 0 the base stays as school has left it, and
    it is the base of a run at any other rate."""
    tiny(train, folder="out/fast")
    tiny(train, "--reading_rate", "0", folder="out/still")
    base, = Path("out/bases").iterdir()
    school = torch.load(base, weights_only=True)["model"]
    still, fast = (finished(f"out/{run}")[1] for run in ("still", "fast"))
    assert all(torch.equal(still[name], school[name]) for name in school)
    assert not any(torch.equal(fast[name], school[name]) for name in school)


@pytest.mark.parametrize("other", (
    ["--seed", "1"], ["--known", "7"], ["--new", "5"], ["--lr", ".01"], ["--school_steps", "5"],
    ["--n_embd", "32"], ["--batch_size", "20"], ["--optimizer", "adamw"], ["--mode", "diffusion"],
    ["--paraphrases", "given"], ["--wordings", "2"], ["--dtype", "bfloat16"]), ids=" ".join)
def test_a_base_of_other_settings_is_never_reused(other):
    """Whatever school depends on is in the base's name."""
    tiny(train, "--mode", "ar", folder="out/first")
    tiny(train, "--mode", "ar", *other, folder="out/second")
    assert len(list(Path("out/bases").iterdir())) == 2


def test_a_base_of_other_code_is_never_reused(monkeypatch, capfd):
    """The constants at the top of train.py count as settings, and so does the text of the files that school
    runs through: who changes either gets another base, and cannot go on with a run of the old code."""
    tiny(train, "--mode", "diffusion", folder="out/first")
    tiny(train, "--mode", "diffusion", "--mask_ratio", ".5", folder="out/second")
    assert len(list(Path("out/bases").iterdir())) == 2
    for name in ("EMBEDDING_LR", "WEIGHT_DECAY", "QUESTION_SHARE"):
        monkeypatch.setattr(train, name, 0.3)
        tiny(train, "--mode", "diffusion", folder=f"out/{name}")
    assert len(list(Path("out/bases").iterdir())) == 5
    real = Path.read_text
    edited = lambda path, **kwargs: real(path, **kwargs) + "#" * (path.name == "model.py")
    monkeypatch.setattr(Path, "read_text", edited)
    tiny(train, "--mode", "diffusion", folder="out/edited")
    assert len(list(Path("out/bases").iterdir())) == 6
    old = "--mode", "diffusion", *TINY, "--resume", "--out_dir", f"out/{name}"
    assert "trained with code" in refusal(capfd, train, *old)


def batches(stage, n, **settings):
    """All row indices of n batches of 16 with 3 questions, and the corpus of 6 known and 4 new people."""
    corpus, g = evaluation.make_corpus(known=6, new=4, seed=0), generator()
    args = SimpleNamespace(**{"batch_size": 16, "no_replay": False} | settings)
    return torch.cat([train.batch(corpus, stage, args, g) for _ in range(n)]), corpus


def test_no_training_row_of_reading_is_a_new_persons_question():
    """200 batches hold new people's documents, questions about known people only, and in school no new
    people."""
    seen, corpus = batches("reading", 200)
    asked = {corpus.people[(int(i) - corpus.groups["forward"].start) // 6].name
             for i in seen if int(i) in corpus.groups["forward"]}
    assert asked == {p.name for p in corpus.people[:6]}
    assert set(corpus.rows[seen, 0].tolist()) == {MARKS.doc, MARKS.question}
    assert any(int(i) in corpus.groups["new_documents"] for i in seen)
    seen, corpus = batches("school", 200)
    assert not any(int(i) in corpus.groups["new_documents"] for i in seen)


@pytest.mark.parametrize("stage, each", (("school", [13, 0, 2, 1]), ("reading", [5, 8, 2, 1])))
def test_each_batch_has_its_share_of_each_group(stage, each):
    """Of 16 rows three are questions, one of them backward; in reading .6 of the 13 documents are new."""
    seen, corpus = batches(stage, 50)
    count = [sum(i in rows for i in seen.tolist()) for rows in corpus.groups.values()]
    assert count == [50 * n for n in each]


def test_the_optimizers_get_their_rates_and_decay():
    """After the last of six steps: each peak rate times the schedule, decay on the matrices alone."""
    tiny(train)
    groups = [o["param_groups"][0] for o in torch.load("out/run/ckpt.pt", weights_only=True)["optimizers"]]
    peaks = 0.02, train.EMBEDDING_LR
    assert [g["lr"] for g in groups] == pytest.approx([peak * train.schedule(5, 6) for peak in peaks])
    assert [g["weight_decay"] for g in groups] == [train.WEIGHT_DECAY, 0]
    model = Transformer(ModelConfig(11, n_layer=1, n_head=1, n_embd=16))
    kinds = {name: [type(o) for o in train.make_optimizers(model, name, 0.1)] for name in ("muon", "adamw")}
    assert kinds == {"muon": [torch.optim.Muon, torch.optim.AdamW], "adamw": [torch.optim.AdamW] * 2}


def test_the_mask_ratio_reaches_training():
    """Four ratios, four losses, from one base."""
    for ratio in ("0", "1", "uniform", "paper"):
        tiny(train, "--mask_ratio", ratio, folder=f"out/{ratio}")
    assert len(list(Path("out/bases").iterdir())) == 1
    logs = [finished(f"out/{ratio}")[0] for ratio in ("0", "1", "uniform", "paper")]
    assert len({log[-1]["loss"] for log in logs}) == 4
    assert {log[0]["loss"] for log in logs} == {None}  # the running loss of reading starts with reading


def test_without_replay_only_new_documents_are_read():
    """--no_replay: what fine-tuning alone does to what the base knew."""
    seen, corpus = batches("reading", 50, no_replay=True)
    assert all(int(i) in corpus.groups["new_documents"] for i in seen) and len(seen) == 800
    seen, corpus = batches("school", 50, no_replay=True)
    assert any(int(i) in corpus.groups["forward"] for i in seen)


def test_each_seed_and_stage_has_batches_of_its_own(monkeypatch):
    """The generator that draws batches and masks starts from another number for every seed and stage; each
    seed has its own initial weights."""
    real, used, weights = train.batch, [], []
    monkeypatch.setattr(train, "batch", lambda *a: used.append((a[1], a[-1].initial_seed())) or real(*a))
    initialize = Transformer.initialize
    monkeypatch.setattr(Transformer, "initialize",
                        lambda model, g: weights.append(g.initial_seed()) or initialize(model, g))
    for seed in (0, 1):
        tiny(train, "--seed", seed, folder=f"out/{seed}")
    assert set(used) == {("school", 0), ("reading", 1), ("school", 2), ("reading", 3)} and weights == [0, 1]


def test_one_seed_one_result():
    """The same command in two folders, each with its own school: the same log and weights, bit for bit."""
    for folder in ("a/run", "b/run"):
        tiny(train, "--mode", "diffusion", folder=folder)
        shutil.rmtree("out/bases")
    assert_same_run("a/run", "b/run")


def test_learning_rate_warms_up_and_ends_near_zero():
    """Up within 2 % of the steps, then down a straight line: by hand for 100 steps."""
    rates = [train.schedule(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 0.98]) and rates[50] == 0.5
    assert rates[99] == pytest.approx(0.01)


def test_exams_grow_with_the_step():
    """Ten intervals from the start of reading to its end, each at least as long as the one before
    it."""
    steps = sorted(train.exam_steps(1000))
    gaps = [b - a for a, b in zip(steps, steps[1:])]
    assert steps[0] == 0 and steps[-1] == 1000 and len(gaps) == train.EXAMS and gaps == sorted(gaps)


def test_a_compiled_run_learns_the_same(monkeypatch):
    """--compile changes no result beyond rounding, and its checkpoint has the names of an uncompiled one.
    Traced by the same compiler front end, but without a C++ compiler, which not everybody has."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: real(f, backend="aot_eager", **kwargs))
    tiny(train, folder="a/plain")
    tiny(train, "--compile", folder="b/compiled")
    (log_a, weights_a, _), (log_b, weights_b, _) = finished("a/plain"), finished("b/compiled")
    a, b = ([line["loss"] for line in log[1:]] for log in (log_a, log_b))  # before reading there is none
    assert a == pytest.approx(b, rel=1e-3)
    assert weights_a.keys() == weights_b.keys()


def test_bfloat16_learns_the_same_within_its_precision():
    """bfloat16 keeps 8 bits, a relative error of 2^-9 at each rounding: losses of a run agree within 1 %."""
    unbroken()
    tiny(train, "--dtype", "bfloat16", folder="b/run")
    a, b = ([line["loss"] for line in finished(folder)[0][1:]] for folder in ("a/run", "b/run"))
    assert a != b and all(math.isclose(x, y, rel_tol=0.01) for x, y in zip(a, b))


def test_the_readmes_commands_are_accepted(monkeypatch):
    """Every `python train.py ...` in the README, and every row of flags in its tables and loops, is parsed by
    the script; the files it maps exist."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"python train\.py([^\n`#|<>;]*)", readme)
    rows = re.findall(r"(?:^|\| `)(--mode [^\n`]*)", readme, re.MULTILINE)
    assert len(commands) >= 3 and len(rows) >= 20
    for command in commands + rows:
        words = re.sub(r"\$\w+", lambda m: {"$mode": "ar", "$seed": "0"}.get(m[0], ""), command)
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(words)])
        train.parse_args()
    for name in re.findall(r"\w+\.py", readme):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize("script", ("data.py", "train.py --help", "eval.py --help",
                                    f"train.py {' '.join(TINY)}"))
def test_scripts_start_from_a_shell(script):
    """As a child process, from another folder, with output that is no terminal and can only show ASCII."""
    name, *flags = script.split()
    done = subprocess.run([sys.executable, str(ROOT / name), *flags], capture_output=True, encoding="ascii",
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and len(done.stdout) > 200, done.stderr
