"""Runs as people start them: every mode and arm, one base for all, counts that add up, resume and reuse."""
import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import train
from conftest import ROOT, TINY, bases, call, edit, finished, generator, refusal, stop_after, tiny
from data import EXAMS, MARKS, WIDTH, decode, make_corpus
from diffusion import MODES, loss
from model import DEVICES


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_is_examined_and_answers(mode, capsys):
    """A few steps through the command line, on a GPU if there is one, leave a checkpoint, a log, a result and
    all answers, and eval.py reads them all."""
    call(train, "--mode", mode, *TINY, "--device", DEVICES[-1])
    folder = next(Path("out").glob(f"{mode}-none-*-seed0"))
    log, _, result = finished(folder)
    lines = [line for line in log if "loss" in line]
    assert {line["stage"] for line in lines} == {"pretraining", "fine-tuning"}
    assert all(math.isfinite(line[name]) for line in lines for name in ("loss", "gradient_norm", "lr"))
    assert set(result) >= {f"before_{name}" for name in EXAMS} | {"chance_backward", "settings", "machine"}
    assert result["chance_backward"] == 1 / 10 and result["settings"]["mode"] == mode
    kept = Path(folder, "answers.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [json.loads(line) for line in kept]
    for name in EXAMS:
        some = [line for line in kept if line["exam"] == name]
        assert sum(line["answer"] == line["truth"] for line in some) / len(some) == result[name]
    table = capsys.readouterr().out
    assert "new people" in table and "known people" in table and "chance" in table
    call(evaluation, folder)
    assert capsys.readouterr().out.strip() in table
    call(evaluation, folder, "--ask", "What is the major of Curtis Chase Emley?")
    assert len(capsys.readouterr().out.splitlines()) == 1
    call(evaluation)
    assert mode in capsys.readouterr().out


@pytest.mark.parametrize("flags, folder, base", (
    ("", "masked-none-seed0", "base-ar-seed0"), ("--mode ar --seed 3", "ar-none-seed3", "base-ar-seed3"),
    ("--lr .01 --wordings 5 --mask_ratio .75", "masked-none-lr0.01-seed0", "base-ar-seed0"),
    ("--paraphrases reversed --texts 2 --decay 1", "masked-reversed-texts2-decay1.0-seed0", "base-ar-seed0"),
    ("--paraphrases same_order --known 300", "masked-same_order-known300-seed0", "base-ar-known300-seed0"),
    ("--mode diffusion --device cpu --dtype float32 --mask_ratio .5", "diffusion-none-mask_ratio0.5-seed0",
     "base-diffusion-seed0"),
    ("--dtype bfloat16", "masked-none-dtypebfloat16-seed0", "base-ar-dtypebfloat16-seed0")))
def test_folder_and_base_are_named_after_what_was_changed(flags, folder, base, monkeypatch):
    """Mode, arm, each flag that was changed, seed. The base is named after what pretraining depends on: where
    it has the name of another base, its settings are the same, whatever becomes of eval.py."""
    monkeypatch.setattr(train, "DEVICES", ["cpu"])
    monkeypatch.setattr(train, "fingerprints", lambda: {"eval.py": object()})  # another one at each call
    monkeypatch.setattr(sys, "argv", ["train.py"])
    default = train.parse_args()
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    args = train.parse_args()
    assert (args.out_dir, args.base) == (Path("out") / folder, Path("out") / f"{base}.pt")
    assert (args.base == default.base) == (train.stages(args)[0] == train.stages(default)[0])


def test_every_setting_reaches_the_people_and_the_model(monkeypatch):
    """Seven settings make the corpus, sizes and mode the model: none is dropped, exchanged or misspelt."""
    seen, make_corpus, Transformer = [], train.make_corpus, train.Transformer
    monkeypatch.setattr(train, "make_corpus", lambda **world: seen.append(world) or make_corpus(**world))
    monkeypatch.setattr(train, "Transformer", lambda *a, **k: seen.append(Transformer(*a, **k)) or seen[-1])
    world = {"known": 7, "new": 5, "paraphrases": "same_order", "texts": 2,
             "known_paraphrases": "name_anywhere", "wordings": 3, "seed": 2}
    flags = [f"--{name}={value}" for name, value in world.items()]
    for mode in ("masked", "diffusion"):
        tiny(train, "--mode", mode, *flags, "--n_layer", "2", "--n_head", "4", folder=f"out/{mode}")
        model = seen[-1]
        assert world.items() <= seen[-2].items() and model.causal == (mode == "masked")
        names = {*inspect.signature(make_corpus).parameters, *inspect.signature(Transformer).parameters}
        assert names - {"_", "causal", "vocab_size"} <= seen[-2].keys()
        assert (len(model.blocks), model.head_size, model.embed.embedding_dim) == (2, 16 // 4, 16)
    assert all(mode.causal == MODES[mode.base].causal for mode in MODES.values())


def test_documents_and_questions_weigh_as_rows(monkeypatch):
    """A loss of 1 on the 13 documents and of 3 on the 3 questions of a batch is one of 22/16."""
    real = loss
    monkeypatch.setattr(train, "loss", lambda model, inputs, *rest: 0 * real(model, inputs, *rest) + (
        3 if inputs[0, 0] == MARKS.question else 1))
    tiny(train)
    assert {line["loss"] for line in finished("out/run")[0] if "loss" in line} == {22 / 16}


def test_a_result_keeps_the_start_the_peak_and_the_end(monkeypatch):
    """before_ is the exam at step 0, peak_ the best one (never called the result), the rest the last."""
    real, shares = train.exam, iter([0.1, 0.2, 0.3, 0.9, 0.5, 0.4, 0.6])

    def exam(*arguments):
        scores, answers = real(*arguments)
        share = next(shares)
        return dict.fromkeys(scores, share) | {"backward": share / 2}, answers
    monkeypatch.setattr(train, "exam", exam)
    tiny(train)
    result = finished("out/run")[2]
    for name in set(EXAMS) - {"backward"}:
        assert (result[f"before_{name}"], result[name]) == (0.1, 0.6)
    assert result["peak_forward"] == 0.9 and result["peak_backward"] == 0.45
    assert result["curve"]["step"] == [0, 1, 2, 3, 4, 5, 6]
    assert result["curve"]["backward"] == [0.05, 0.1, 0.15, 0.45, 0.25, 0.2, 0.3]


def test_what_a_run_spends_is_counted():
    """6 steps of 16 rows, three of them questions: 78 documents. A step costs 6 FLOPs a parameter and token:
    `masked` puts each document through the model twice."""
    tokens = {}
    for mode in ("ar", "masked"):
        tiny(train, "--mode", mode, folder=f"out/{mode}")
        log, weights, result = finished(f"out/{mode}")
        assert result["documents"] == 6 * (16 - 3) and log[-1]["flops"] == result["flops"]
        tokens[mode] = result["flops"] / 6 / sum(w.numel() for w in weights.values()) / 6
    T_question = make_corpus(6, 4).rows["forward"][0].size(1)
    assert tokens["ar"] == 13 * (WIDTH - 1) + 3 * (T_question - 1)
    assert tokens["masked"] == 13 * (2 * WIDTH - 1) + 3 * (T_question - 1)


def test_a_finished_run_prints_its_result_again(monkeypatch, capsys):
    """The same command trains no step and says how to train anew: a loop over many runs can be repeated. And
    --overwrite removes no file but the run's own four."""
    tiny(train)
    table = capsys.readouterr().out
    before = Path("out/run/ckpt.pt").read_bytes(), finished("out/run")[2]
    Path("out/run/notes.txt").write_text("mine", encoding="utf-8")
    calls = stop_after(99, monkeypatch, None)
    tiny(train)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] in table and "--overwrite" in printed
    assert not calls and (Path("out/run/ckpt.pt").read_bytes(), finished("out/run")[2]) == before
    tiny(train, "--overwrite")
    assert len(calls) == 2 * 6  # the base is still good
    assert {path.name for path in Path("out/run").iterdir()} == {
        "notes.txt", "ckpt.pt", "log.jsonl", "answers.jsonl", "result.json"}


def test_editing_a_comment_changes_nothing_and_editing_code_needs_one_flag(monkeypatch, capfd):
    """A comment is free, a blank line, too. With other code the same command stops in one line that names the
    file and offers --overwrite, which trains a base and a run of the new code."""
    tiny(train)
    with monkeypatch.context() as patch:
        edit(patch, "model.py", "\n    # a comment\n")
        tiny(train)
    edit(monkeypatch, "model.py", "x = 1\n")
    refused = refusal(capfd, train, *TINY, "--out_dir", "out/run")
    assert "model.py" in refused and "--overwrite" in refused and "--out_dir" in refused
    tiny(train, "--overwrite")
    assert "pretraining again" in capfd.readouterr().out
    tiny(train)  # and now the run is one of the new code


@pytest.mark.parametrize("name", ("data.py", "model.py", "diffusion.py", "eval.py", "train.py"))
def test_code_and_corpora_are_never_mixed(name, monkeypatch, capsys):
    """Whichever file was edited between two seeds, the comparison gives each a row and names the file."""
    tiny(train, folder="out/a-seed0")
    edit(monkeypatch, name, "x = 1\n")
    tiny(train, "--seed", "1", folder="out/a-seed1")
    capsys.readouterr()
    call(evaluation)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 2 and lines[0].startswith("a ") and lines[1].startswith(f"a-seed1 ({name} = ")


def rows_read(monkeypatch, *flags):
    """[(stage, ids)] of all rows that a tiny run reads, in order; it makes its base itself."""
    read, real = [], train.Run.draw

    def draw(run, counts):
        tokens, starts = real(run, counts)
        read.extend((run.settings.stage, ids) for ids in tokens.tolist())
        return tokens, starts
    for base in bases():
        base.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "draw", draw)
        tiny(train, "--overwrite", *flags)
    return read


def test_no_training_row_is_a_new_persons_question(monkeypatch):
    """By hand, all rows of 4 and 6 steps: 13 documents and 3 questions a step. In fine-tuning 9 of the 13
    tell of new people, and nothing else ever does."""
    new = [person.name for person in make_corpus(known=6, new=4).people[6:]]
    count = Counter((stage, MARKS._fields[ids[0]], any(name in decode(ids) for name in new))
                    for stage, ids in rows_read(monkeypatch))
    assert count == {
        ("pretraining", "doc", False): 4 * 13, ("pretraining", "question", False): 4 * 3,
        ("fine-tuning", "doc", False): 6 * 4, ("fine-tuning", "doc", True): 6 * 9,
        ("fine-tuning", "question", False): 6 * 3}


@pytest.mark.parametrize("question_share, new_share, documents, questions", (
    (0.16, 0.6, {"known": 5, "new": 8}, {"forward": 2, "backward": 1}),
    (0.16, 0, {"known": 13, "new": 0}, {"forward": 2, "backward": 1}),     # pretraining
    (0.12, 0, {"known": 14, "new": 0}, {"forward": 1, "backward": 1}),     # no direction is lost
    (0, 1, {"known": 0, "new": 16}, {})))                                  # the paper's order
def test_each_batch_has_its_share_of_each_group(question_share, new_share, documents, questions):
    """16 rows: questions, at least one in five of them backward; of the documents some are new."""
    settings = SimpleNamespace(batch_size=16, question_share=question_share, new_share=new_share)
    assert train.rows_per_batch(settings) == (documents, questions)


def test_modes_with_one_seed_read_the_same_rows_in_the_same_order(monkeypatch):
    """Masks come from a generator of their own: what is read does not depend on how much is masked, nor what
    pretraining reads on the arm of new people. Another seed reads other rows."""
    ar = rows_read(monkeypatch, "--mode", "ar")
    for mode in ("masked", "random_prompt"):
        assert rows_read(monkeypatch, "--mode", mode) == ar
    pretraining = lambda read: [ids for stage, ids in read if stage == "pretraining"]
    assert pretraining(rows_read(monkeypatch, "--paraphrases", "name_anywhere")) == pretraining(ar)
    assert rows_read(monkeypatch, "--mode", "ar", "--seed", "1") != ar


@pytest.mark.parametrize("optimizer", ("muon", "adamw"))
def test_the_rates_reach_their_optimizers(optimizer, monkeypatch):
    """After the last of six steps: each peak rate times the schedule, in the stage it belongs to, for every
    weight once; rate 0 leaves the base as it is."""
    monkeypatch.setattr(train, "PRETRAINING", train.PRETRAINING | {
        "lr": 0.01, "embed_lr": 0.02, "decay": 0.5, "embed_decay": 0.1})
    tiny(train, "--optimizer", optimizer, "--lr", 0.03, "--embed_lr", 0.04, "--decay", 0.25,
         "--embed_decay", 0.2)
    for path, peaks, decays, share in (
            (bases()[0], (0.01, 0.02), [0.5, 0.1], train.schedule(3, 4)),
            (Path("out/run/ckpt.pt"), (0.03, 0.04), [0.25, 0.2], train.schedule(5, 6))):
        saved, trained = torch.load(path, weights_only=True), 0
        for optimizer_state, peak, decay in zip(saved["optimizers"], peaks, decays):
            for group in optimizer_state["param_groups"]:
                assert (group["lr"], group["weight_decay"]) == pytest.approx((peak * share, decay))
                trained += len(group["params"])
        assert trained == len(saved["model"])
    tiny(train, "--overwrite", "--optimizer", optimizer, "--lr", "0", "--embed_lr", "0")
    base = torch.load(bases()[0], weights_only=True)["model"]
    assert all(torch.equal(weight, base[name]) for name, weight in finished("out/run")[1].items())


def test_the_mask_ratio_reaches_the_documents_of_fine_tuning_alone(monkeypatch):
    """The base and all questions keep a ratio of their own; else BERT's share would compare two things."""
    given, real = Counter(), MODES["diffusion"]

    def objective(tokens, starts, ratio, generator):
        given[tokens[0, 0].item(), ratio] += 1
        return real.objective(tokens, starts, ratio, generator)
    monkeypatch.setitem(MODES, "diffusion", real._replace(objective=objective))
    tiny(train, "--mode", "diffusion", "--mask_ratio", "0.15")
    assert given == {(MARKS.doc, "uniform"): 4, (MARKS.doc, 0.15): 6, (MARKS.question, "uniform"): 4 + 6}


@pytest.mark.parametrize("shape", ((48, 16), (16, 16), (16, 64)))
def test_muon_is_muon(shape):
    """Five steps with random gradients move two matrices, which ours takes together, as PyTorch's own moves
    each, within its bfloat16 precision."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for _ in range(2)] for _ in range(2))
    optimizers = (train.Muon(ours, 0.1, 0.5),
                  torch.optim.Muon(theirs, 0.1, momentum=0.95, weight_decay=0.5))
    for seed in range(5):
        for a, b, scale in zip(ours, theirs, (1, 100)):
            a.grad = b.grad = scale * torch.randn(shape, generator=generator(seed + scale))
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.02 * (a - torch.ones(shape)).norm()


def test_learning_rate_warms_up_and_ends_near_zero():
    """Up within 2 % of the steps, then down a straight line: by hand for 100 steps."""
    rates = [train.schedule(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 0.98]) and rates[50] == 0.5
    assert rates[99] == pytest.approx(0.01)


def test_the_readmes_commands_are_accepted(monkeypatch):
    """Every `python train.py ...` in the README, and every row of flags in its tables and loops, is parsed by
    the script; the files it maps exist."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")  # a line goes on
    commands = re.findall(r"python train\.py([^\n`#|<>;]*)", readme)
    rows = re.findall(r"(?:^|\| `)(--mode [^\n`]*)", readme, re.MULTILINE)
    assert len(commands) >= 3 and len(rows) >= 8
    for command in commands + rows:
        words = command.replace("$mode", "ar").replace("$seed", "0").replace("$texts", "2")
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(words)])
        train.parse_args()
    for name in re.findall(r"\w+\.py", readme):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize("script", ("data.py", "diffusion.py", "train.py --help", "eval.py --help",
                                    f"train.py {' '.join(TINY)}"))
def test_scripts_start_from_a_shell(script):
    """As a child process, from another folder, with output that is no terminal and can only show ASCII."""
    name, *flags = script.split()
    done = subprocess.run([sys.executable, str(ROOT / name), *flags], capture_output=True, encoding="ascii",
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and len(done.stdout) > 200, done.stderr
