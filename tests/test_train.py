"""Runs as people start them: every mode and arm, one base for all, counts that add up, resume and reuse."""
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import train
from conftest import (DEVICES, ROOT, TINY, assert_same_run, bases, call, edit, finished, refusal, stop_after,
                      tiny, unbroken)
from data import ARMS, MARKS, encode, make_corpus
from diffusion import MODES, RATIOS, loss
from model import ModelConfig, Transformer

EXAMS = {"forward", "backward", "known_forward", "known_backward", "known_unasked", "recite", "cloze"}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_is_examined_and_answers(mode, capsys):
    """A few steps through the command line leave a checkpoint, a log, a result and all answers, and eval.py
    reads them all."""
    call(train, "--mode", mode, *TINY)
    folder = next(Path("out").glob(f"{mode}-none-*-seed0"))
    log, _, result = finished(folder)
    exams = [line for line in log if "forward" in line]
    assert exams[0]["step"] == 0 and exams[-1]["step"] == 6
    assert EXAMS | {"rouge_forward", "forward birth date", "flops"} <= set(exams[-1])
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
    ("--optimizer adamw --texts 2", "masked-none-texts2-optimizeradamw-seed0", "base-ar-seed0"),
    ("--paraphrases same_order --known 300", "masked-same_order-known300-seed0", "base-ar-known300-seed0"),
    ("--mode diffusion --mask_ratio .5 --device cpu", "diffusion-none-mask_ratio0.5-seed0",
     "base-diffusion-seed0")))
def test_folder_and_base_are_named_after_what_was_changed(flags, folder, base, monkeypatch):
    """Mode, arm, each flag that decides the result and was changed, seed. The base is named after what
    pretraining depends on."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    args = train.parse_args()
    assert (args.out_dir, args.base) == (Path("out") / folder, Path("out") / f"{base}.pt")


def test_tables_of_modes_arms_and_ratios_appear_in_the_help(monkeypatch, capsys):
    """Who adds a row to one of the three tables finds its name and what it is about in --help."""
    monkeypatch.setitem(MODES, "prefix", MODES["masked"]._replace(about="a new objective"))
    monkeypatch.setitem(ARMS, "rhymed", ARMS["none"]._replace(about="a new arm"))
    monkeypatch.setitem(RATIOS, "cosine", RATIOS["uniform"]._replace(about="a new share"))
    with pytest.raises(SystemExit):
        call(train, "--help")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for table in (MODES, ARMS, RATIOS):
        assert all(f"{name}: {row.about}" in text for name, row in table.items())


@pytest.mark.parametrize("arm", ARMS)
def test_all_arms_and_modes_share_one_base(arm, capsys):
    """Pretraining knows nothing of the arm: every arm of a causal mode finds the one file, and the base that
    another arm has made gives bit for bit the run that its own would have given."""
    tiny(train, "--mode", "ar", "--paraphrases", "none", folder="out/first")
    base, = bases()
    before = base.read_bytes()
    for mode in ("ar", "masked"):
        tiny(train, "--mode", mode, "--paraphrases", arm, folder=f"out/{mode}")
    assert bases() == [base] and base.read_bytes() == before
    base.unlink()
    tiny(train, "--mode", "masked", "--paraphrases", arm, folder="out/alone")
    assert_same_run("out/masked", "out/alone")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ("masked", "diffusion"))
def test_one_seed_one_result_on_every_device(device, mode):
    """The same command in two folders, each with its own base: the same log and weights, bit for bit."""
    for folder in ("a/run", "b/run"):
        tiny(train, "--mode", mode, "--device", device, folder=folder)
        bases()[0].unlink()
    assert_same_run("a/run", "b/run")


def test_every_setting_reaches_the_people_and_the_model(monkeypatch):
    """Seven settings make the corpus, the sizes and the mode make the model: none is dropped or exchanged."""
    seen = []
    real = train.make_corpus
    monkeypatch.setattr(train, "make_corpus", lambda **world: seen.append(world) or real(**world))
    world = {"known": 7, "new": 5, "paraphrases": "same_order", "texts": 2,
             "known_paraphrases": "name_anywhere", "wordings": 3, "seed": 2}
    flags = [f"--{name}={value}" for name, value in world.items()]
    for mode in ("masked", "diffusion"):
        kept = []
        with monkeypatch.context() as patch:
            make = train.make_model
            patch.setattr(train, "make_model", lambda *a: kept.append(make(*a)) or kept[0])
            tiny(train, "--mode", mode, *flags, "--n_layer", "2", "--n_head", "4", folder=f"out/{mode}")
        assert seen.pop() == world
        shape = kept[0].config.n_layer, kept[0].config.n_head, kept[0].config.n_embd, kept[0].config.causal
        assert shape == (2, 4, 16, mode == "masked")
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
    real, scores = train.exam, iter([0.1, 0.2, 0.3, 0.9, 0.5, 0.4, 0.6])

    def exam(*arguments):
        score = next(scores)
        return {name: score / (1 + i) for i, name in enumerate(real(*arguments)[0])}, real(*arguments)[1]
    monkeypatch.setattr(train, "exam", exam)
    tiny(train)
    log, _, result = finished("out/run")
    exams = [line for line in log if "forward" in line]
    for name in EXAMS:
        assert result[f"before_{name}"] == exams[0][name] and result[name] == exams[-1][name]
    assert result["peak_backward"] == exams[3]["backward"] == max(line["backward"] for line in exams)
    assert all(result["curve"][name] == [line[name] for line in exams] for name in result["curve"])


def test_what_a_run_spends_is_counted():
    """6 steps of 16 rows, three of them questions: 78 documents. A step costs 6 FLOPs a parameter and token:
    `masked` puts each document through the model twice."""
    tokens = {}
    for mode in ("ar", "masked"):
        tiny(train, "--mode", mode, folder=f"out/{mode}")
        log, weights, result = finished(f"out/{mode}")
        assert result["documents"] == 6 * (16 - 3) and log[-1]["flops"] == result["flops"]
        tokens[mode] = result["flops"] / 6 / sum(w.numel() for w in weights.values()) / 6
    T, T_question = (rows["forward" if name == "questions" else "new"].tokens.size(1) for name, rows in (
        ("documents", make_corpus(6, 4).documents), ("questions", make_corpus(6, 4).questions)))
    assert tokens["ar"] == 13 * (T - 1) + 3 * (T_question - 1)
    assert tokens["masked"] == 13 * (2 * T - 1) + 3 * (T_question - 1)


# -- resume and reuse --------------------------------------------------------


def test_a_finished_run_prints_its_result_again(monkeypatch, capsys):
    """The same command trains no step and says how to train anew: a loop over many runs can be repeated."""
    tiny(train)
    table = capsys.readouterr().out
    before = Path("out/run/ckpt.pt").read_bytes(), finished("out/run")[2]
    calls = stop_after(99, monkeypatch, None)
    tiny(train)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] in table and "--overwrite" in printed
    assert not calls and (Path("out/run/ckpt.pt").read_bytes(), finished("out/run")[2]) == before
    tiny(train, "--overwrite")
    assert len(calls) == 2 * 6  # the base is still good


def test_editing_a_comment_changes_nothing_and_editing_code_needs_one_flag(monkeypatch, capfd):
    """A comment is free. With other code the same command stops in one line that names the file and offers
    --overwrite, which trains a base and a run of the new code."""
    tiny(train)
    with monkeypatch.context() as patch:
        edit(patch, "model.py", "# a comment\n")
        tiny(train)
    edit(monkeypatch, "model.py", "x = 1\n")
    refused = refusal(capfd, train, *TINY, "--out_dir", "out/run")
    assert "model.py" in refused and "--overwrite" in refused and "--out_dir" in refused
    before = bases()[0].stat().st_mtime_ns
    tiny(train, "--overwrite")
    assert "pretraining anew" in capfd.readouterr().out and bases()[0].stat().st_mtime_ns > before
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


def test_a_base_of_other_people_or_code_is_made_anew(monkeypatch, capsys):
    """A base is found by its name and trusted for its settings: a longer pretraining has another name, other
    code the same; then it is trained again and not silently taken. eval.py alone changes no base."""
    tiny(train, folder="out/first")
    tiny(train, "--pretrain_steps", "5", folder="out/second")
    assert len(bases()) == 2
    capsys.readouterr()
    with monkeypatch.context() as patch:
        edit(patch, "eval.py", "x = 1\n")
        tiny(train, folder="out/third")
        assert "anew" not in capsys.readouterr().out
    edit(monkeypatch, "data.py", "x = 1\n")
    tiny(train, folder="out/fourth")
    assert "data.py" in capsys.readouterr().out and len(bases()) == 2


# -- what a step is made of --------------------------------------------------


def batches(n, **settings):
    """n batches of 16 rows from 6 known and 4 new people: rows of documents, rows of questions."""
    settings = SimpleNamespace(**{"stage": "fine-tuning", "seed": 0, "device": "cpu", "batch_size": 16,
                                  "question_share": 0.16, "new_share": 0.6, "optimizer": "muon",
                                  "lr": 0, "embed_lr": 0, "decay": 0, "embed_decay": 0} | settings)
    corpus = make_corpus(known=6, new=4)
    run = train.Run(settings, None, corpus, Transformer(ModelConfig(1, 1, 16)))
    counts = train.rows_per_batch(settings)
    drawn = [[run.draw(groups, some) for _ in range(n)] if some else []
             for groups, some in zip((corpus.documents, corpus.questions), counts)]
    return [[row for tokens, _ in some for row in tokens.tolist()] for some in drawn], corpus, counts


def test_no_training_row_is_a_new_persons_question():
    """200 batches hold new people's documents and questions about known people only."""
    (documents, questions), corpus, _ = batches(200)
    assert {row[0] for row in documents} == {MARKS.doc} and {row[0] for row in questions} == {MARKS.question}
    text = lambda ids: " ".join(map(str, ids))
    named = lambda rows: {person.name for person in corpus.people
                          if any(text(encode(person.name)) in text(row) for row in rows)}
    assert named(questions) == {person.name for person in corpus.people[:6]}
    assert named(documents) == {person.name for person in corpus.people}


def test_each_batch_has_its_share_of_each_group():
    """Of 16 rows three are questions, one of them backward; .6 of the 13 documents are new. Pretraining has
    none of the new people, and --new_share 1 --question_share 0 has nothing else: the paper's order."""
    (documents, questions), corpus, counts = batches(50)
    assert counts == ({"known": 5, "new": 8}, {"forward": 2, "backward": 1})
    new = corpus.documents["new"].tokens.tolist()
    assert sum(row in new for row in documents) == 50 * 8 and len(questions) == 50 * 3
    (documents, questions), _, _ = batches(50, new_share=0)
    assert not any(row in new for row in documents)
    assert batches(1, question_share=0.12)[2][1] == {"forward": 1, "backward": 1}  # no direction is lost
    (documents, questions), _, _ = batches(50, new_share=1, question_share=0)
    assert all(row in new for row in documents) and len(documents) == 50 * 16 and not questions


def test_modes_with_one_seed_read_the_same_rows_in_the_same_order(monkeypatch):
    """Masks come from a generator of their own: what is drawn does not depend on how much is masked. Another
    seed or stage draws other rows and starts from other weights."""
    read = {}
    for mode in ("ar", "masked", "random_prompt"):
        for seed in (0, 1):
            seen = read.setdefault((mode, seed), [])
            with monkeypatch.context() as patch:
                real = train.Run.draw
                patch.setattr(train.Run, "draw", lambda *a: [seen.append(x) or x for x in real(*a)])
                for base in bases():
                    base.unlink()
                tiny(train, "--mode", mode, "--seed", seed, folder=f"out/{mode}{seed}")
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(read[a], read[b], strict=True))
    assert same(("ar", 0), ("masked", 0)) and same(("ar", 0), ("random_prompt", 0))
    assert not same(("ar", 0), ("ar", 1))
    masks = {run: finished(f"out/{run}")[1]["embed.weight"] for run in ("ar0", "ar1", "masked0")}
    assert not torch.equal(masks["ar0"], masks["ar1"]) and not torch.equal(masks["ar0"], masks["masked0"])


def test_the_rates_reach_their_optimizers(monkeypatch):
    """After the last of six steps: each peak rate times the schedule, in the stage it belongs to; rate 0
    leaves the base as it is."""
    monkeypatch.setattr(train, "PRETRAINING", train.PRETRAINING | {
        "lr": 0.01, "embed_lr": 0.02, "decay": 0.5, "embed_decay": 0.1})
    flags = {"--lr": 0.03, "--embed_lr": 0.04, "--decay": 0.25, "--embed_decay": 0.2}
    tiny(train, *(word for pair in flags.items() for word in pair))
    for path, peaks, decays, share in (
            (bases()[0], (0.01, 0.02), [0.5, 0.1], train.schedule(3, 4)),
            (Path("out/run/ckpt.pt"), (0.03, 0.04), [0.25, 0.2], train.schedule(5, 6))):
        groups = [o["param_groups"][0] for o in torch.load(path, weights_only=True)["optimizers"]]
        assert [group["lr"] for group in groups] == pytest.approx([peak * share for peak in peaks])
        assert [group["weight_decay"] for group in groups] == decays
    shutil.rmtree("out")
    tiny(train, "--lr", "0", "--embed_lr", "0")
    base = torch.load(bases()[0], weights_only=True)["model"]
    assert all(torch.equal(weight, base[name]) for name, weight in finished("out/run")[1].items())


def test_the_mask_ratio_reaches_documents_and_no_question(monkeypatch):
    """Ratios, from one base: other losses each. What is masked in questions is the same for all of them,
    for a question is trained as the base was; else BERT's share would compare two things at once."""
    for ratio in (*RATIOS, "0.15", "1"):
        tiny(train, "--mode", "diffusion", "--mask_ratio", ratio, folder=f"out/{ratio}")
    assert len(bases()) == 1
    last = [next(line["loss"] for line in finished(f"out/{ratio}")[0][::-1] if "loss" in line)
            for ratio in (*RATIOS, "0.15", "1")]
    assert len(set(last)) == len(last)
    shares, real = [], MODES["diffusion"]

    def objective(tokens, starts, ratio, generator):
        shares.append((tokens[0, 0].item(), ratio))
        return real.objective(tokens, starts, ratio, generator)
    monkeypatch.setitem(MODES, "diffusion", real._replace(objective=objective))
    tiny(train, "--mode", "diffusion", "--mask_ratio", "0.15", "--overwrite", folder="out/0.15")
    assert set(shares) == {(MARKS.doc, 0.15), (MARKS.question, "uniform")}


@pytest.mark.parametrize("shape", ((48, 16), (16, 16), (16, 64)))
def test_muon_is_muon(shape):
    """Five steps with random gradients, beside PyTorch's own, which computes in bfloat16: the weights move
    the same way within its precision. What is added has singular values near 1, whatever the gradient's."""
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = (train.Muon([ours], 0.1, 0.5),
                  torch.optim.Muon([theirs], 0.1, momentum=0.95, weight_decay=0.5))
    for seed in range(5):
        ours.grad = theirs.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (ours - torch.ones(shape)).norm()
    gradient = torch.diag(torch.logspace(0, -2, 16)) @ torch.linalg.qr(
        torch.randn(shape[1], 16, generator=torch.Generator().manual_seed(0)))[0].T
    values = torch.linalg.svdvals(train.orthogonal(gradient))[:16]
    assert 0.6 < values.min() and values.max() < 1.3


def test_learning_rate_warms_up_and_ends_near_zero():
    """Up within 2 % of the steps, then down a straight line: by hand for 100 steps."""
    rates = [train.schedule(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 0.98]) and rates[50] == 0.5
    assert rates[99] == pytest.approx(0.01)


@pytest.mark.parametrize("steps", (6, 23))
def test_ten_exams_at_most_and_one_before(steps):
    """At equal distances, from the start of fine-tuning to its last step."""
    tiny(train, "--steps", steps)
    at = finished("out/run")[2]["curve"]["step"]
    assert at == [0, 1, 2, 3, 4, 5, 6] if steps == 6 else at == [0, 3, 6, 9, 12, 15, 18, 21, 23]


def test_bfloat16_learns_the_same_within_its_precision():
    """bfloat16 keeps 8 bits, a relative error of 2^-9 at each rounding: losses of a run agree within 1 %."""
    unbroken()
    tiny(train, "--dtype", "bfloat16", folder="b/run")
    a, b = ([line["loss"] for line in finished(folder)[0] if "loss" in line] for folder in ("a/run", "b/run"))
    assert a != b and all(math.isclose(x, y, rel_tol=0.01) for x, y in zip(a, b, strict=True))


def test_the_readmes_commands_are_accepted(monkeypatch):
    """Every `python train.py ...` in the README, and every row of flags in its tables and loops, is parsed by
    the script; the files it maps exist."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"python train\.py([^\n`#|<>;]*)", readme)
    rows = re.findall(r"(?:^|\| `)(--mode [^\n`]*)", readme, re.MULTILINE)
    assert len(commands) >= 3 and len(rows) >= 8
    for command in commands + rows:
        words = re.sub(r"\$\w+", lambda m: {"$mode": "ar", "$seed": "0"}.get(m[0], ""), command)
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
