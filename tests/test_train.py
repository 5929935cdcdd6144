"""Runs as people start them: every mode, one base for all, counts that add up, and what you may change."""
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import model as model_py
import train
from conftest import (ROOT, TINY, assert_same_run, bases, call, generator, log_of, result_of,
                      same_weights, settings, stop_after, tiny, unbroken, weights)
from data import EXAMS, MARKS, QUESTIONS, WORLDS, decode, make_corpus
from diffusion import CAUSAL, MODES, loss
from model import DEVICES, Transformer


BOOKS = WORLDS["books"].settings
README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")  # a line goes on


def tokens_a_step(mode, seed=0):
    """By hand, of 13 documents and 3 questions; a prompt doubles what a document puts through the model."""
    corpus = make_corpus(settings(seed=seed))
    length = 2 * corpus.width if mode in ("masked", "random_prompt") else corpus.width
    shift = mode != "diffusion"
    return 13 * (length - shift) + 3 * (corpus.rows["known_forward"][0].size(1) - shift)


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_is_examined_and_answers(mode, monkeypatch, capsys):
    """A few steps through the command line, on a GPU if there is one, leave a checkpoint, a log, a result and
    all answers, and eval.py reads them all. Exams within the run ask questions alone, the last one all, and
    its scores count. FLOPs: 6 a parameter and token. Run and base are causal if the mode's base is."""
    made, real = [], train.Transformer
    monkeypatch.setattr(train, "Transformer", lambda *shape: made.append(real(*shape)) or made[-1])
    call(train, "--mode", mode, *TINY, "--n_layer", "2", "--seed", "2", "--device", DEVICES[-1])
    folder = next(Path("out").glob(f"{mode}-none-*-seed2"))
    result, table = result_of(folder), capsys.readouterr().out
    for line in [line for line in log_of(folder) + log_of(bases()[0]) if "loss" in line]:
        assert all(math.isfinite(line[name]) for name in ("loss", "gradient_norm", "lr"))
    assert {"rank_new", "chance_backward", "code", "machine"} <= result.keys()
    parts, exams = {*EXAMS, "bayes"}, result["exams"]
    assert [parts & line.keys() for line in exams] == [{*QUESTIONS}] * 3 + [parts]
    assert [line["step"] for line in exams] == [0, 2, 4, 6] and exams[-1].items() <= result.items()
    right = {name: [] for name in EXAMS}
    for line in map(json.loads, Path(folder, "answers.jsonl").read_text(encoding="utf-8").splitlines()):
        right[line["exam"]].append(line["answer"] == line["truth"])
    assert {name: sum(r) / len(r) for name, r in right.items()} == {name: result[name] for name in EXAMS}
    parameters = sum(weight.numel() for weight in weights(folder).values())
    assert result["documents"] == 6 * 13
    assert result["flops"] == 6 * tokens_a_step(mode, seed=2) * 6 * parameters
    for words, shown in (([folder], "known people"), ([], mode), ([folder, "--ask", "Who?"], "Who?")):
        call(evaluation, *words)
        out = capsys.readouterr().out
        assert shown in out and (shown != "known people" or out in table)
    for place in (folder, bases()[0]):
        saved_mode, corpus, model = evaluation.reopen(place)
        assert model.causal == made[0].causal == (mode != "diffusion") == CAUSAL[MODES[saved_mode].base]
        assert len(model.blocks) == 2 and corpus.people == make_corpus(settings(seed=2)).people


@pytest.mark.parametrize("flags, left_out", (
    (["--new", "1"], set()), (["--world", "books", "--new", "1", "--known", "1"], {"known_unasked"}),
    (["--world", "books", "--new", "1", "--paraphrases", "name_last"], {"recite", "known_unasked"})))
def test_one_new_person_is_enough(flags, left_out, capsys):
    """Groups that nobody is in are left out of the scores, and are a dash in the comparison; all else is a
    finite number. (Of books, only the tenth known person's question is kept out of training.)"""
    tiny(*flags)
    result = result_of("out/run")
    assert set(EXAMS) - result.keys() == left_out and "bayes" in result
    assert all(math.isfinite(x) for line in [result, *result["exams"], *log_of("out/run")]
               for x in line.values() if isinstance(x, (int, float)))
    capsys.readouterr()
    call(evaluation)
    head, row = (re.split("  +", line) for line in capsys.readouterr().out.splitlines())
    assert {name for name, cell in zip(head[2:], row[2:]) if cell == "-"} == left_out


@pytest.mark.parametrize("flags, folder, base", (
    ("", "none", "ar-none"), ("--known 300", "none-known300", "ar-none-known300"),
    ("--lr .01 --wordings 5 --mask_ratio .75 .75", "none-lr0.01", "ar-none"),
    ("--paraphrases reversed --texts 2 --forget 2", "reversed-texts2-forget2.0", "ar-none"),
    ("--mode diffusion --mask_ratio 0 1", "none", "diffusion-none"),
    ("--mode diffusion --mask_ratio .5 .5", "none-mask_ratio0.5-0.5", "diffusion-none"),
    ("--pretrain_steps 7", "none-pretrain_steps7", "ar-none-steps7"),
    (f"--world books --steps {BOOKS['steps']}", "none-books", "ar-none-books"),
    ("--world books --steps 77", "none-books-steps77", "ar-none-books")))
def test_folder_and_base_are_named_after_what_was_changed(flags, folder, base, monkeypatch):
    """Mode, arm, world, each flag that differs from that world's default, seed: said or not, a default is the
    same run. Two runs with the name of one base have the same settings of pretraining."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    now, place = train.parse_args()
    assert place == Path("out", f"{now.mode}-{folder}-seed0")
    run = train.Run("pretraining", train.of_base(now), None, torch.nn.Linear(2, 2))
    assert run.folder == Path("out", f"base-{base}-seed0")
    assert (base == "ar-none") == (run.settings == train.of_base(train.Settings()))
    assert (run.settings.mode, run.settings.steps) == (MODES[now.mode].base, now.pretrain_steps)


def test_documents_and_questions_weigh_as_rows(monkeypatch):
    """A loss of 1 on the 13 documents and of 3 on the 3 questions of a batch is one of 22/16; in pretraining,
    with 11 and 5, it is one of 26/16."""
    real = loss
    monkeypatch.setattr(train, "loss", lambda model, inputs, *rest: 0 * real(model, inputs, *rest) + (
        3 if inputs[0, 0] == MARKS.question else 1))
    monkeypatch.setitem(train.PRETRAINING, "question_share", 0.32)
    tiny()
    for folder, mean in (("out/run", 22 / 16), (bases()[0], 26 / 16)):
        assert {line["loss"] for line in log_of(folder) if "loss" in line} == {mean}


def rows_read(monkeypatch, *flags):
    """[(stage, ids)] of all rows that a tiny run reads, in order; it makes its base itself."""
    read, real = [], train.draw

    def draw(corpus, counts, generator):
        stage = "fine-tuning" if generator.initial_seed() % 4 else "pretraining"  # as Run seeds them
        drawn = real(corpus, counts, generator)
        read.extend((stage, ids) for ids in drawn[0].tolist())
        return drawn
    shutil.rmtree("out", ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(train, "draw", draw)
        tiny(*flags)
    return read


def test_no_training_row_is_a_new_persons_question(monkeypatch):
    """By hand, all rows of 4 and 6 steps: 13 documents and 3 questions a step, 11 and 5 in pretraining. In
    fine-tuning 9 of the 13 tell of new people, and nothing else ever does. All modes with one seed read the
    same rows in the same order, whatever they mask; pretraining does not depend on the arm of new people."""
    new = [person.name for person in make_corpus(settings()).people[6:]]
    monkeypatch.setitem(train.PRETRAINING, "question_share", 0.32)
    masked = rows_read(monkeypatch)
    assert Counter((stage, MARKS._fields[ids[0]], any(name in decode(ids) for name in new))
                   for stage, ids in masked) == {
        ("pretraining", "doc", False): 4 * 11, ("pretraining", "question", False): 4 * 5,
        ("fine-tuning", "doc", False): 6 * 4, ("fine-tuning", "doc", True): 6 * 9,
        ("fine-tuning", "question", False): 6 * 3}
    for mode in ("ar", "random_prompt"):
        assert rows_read(monkeypatch, "--mode", mode) == masked
    assert rows_read(monkeypatch, "--paraphrases", "name_anywhere")[:64] == masked[:64]
    assert rows_read(monkeypatch, "--seed", "1") != masked


@pytest.mark.parametrize("optimizer", ("muon", "adamw"))
def test_the_rates_reach_their_optimizers(optimizer, monkeypatch):
    """After the last step: each peak rate times the schedule (up in 2 % of the steps, then straight down), in
    the stage it belongs to, for every weight once; rate 0 leaves the base as it is."""
    rates = [train.schedule(step, 100) for step in range(100)]
    assert [*rates[:3], rates[50], rates[99]] == pytest.approx([1 / 3, 2 / 3, 0.98, 0.5, 0.01])
    monkeypatch.setattr(train, "PRETRAINING", train.PRETRAINING | {"lr": 0.01, "embed_lr": 0.02})
    tiny("--optimizer", optimizer, "--lr", 0.03, "--embed_lr", 0.04)
    for folder, peaks, share in ((bases()[0], (0.01, 0.02), 1 / 4), ("out/run", (0.03, 0.04), 1 / 6)):
        saved = torch.load(Path(folder, "ckpt.pt"), weights_only=True)
        groups = [group for state in saved["optimizers"] for group in state["param_groups"]]
        assert [len(group["params"]) for group in groups] == [1] * 5 and len(saved["model"]) == 5
        assert [group["lr"] / share for group in groups] == pytest.approx([peaks[0]] * 4 + [peaks[1]])
    assert len(saved["optimizers"]) == (2 if optimizer == "muon" else 1)
    tiny("--optimizer", optimizer, "--lr", "0", "--embed_lr", "0", folder="out/still")
    assert same_weights("out/still", bases()[0])


class Gain(model_py.Block):
    """A block whose norm has a gain, as a researcher would add one."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.gain = torch.nn.Parameter(torch.ones(shape[1]))

    def mlp(self, x):
        return super().mlp(x * self.gain)


@pytest.mark.parametrize("optimizer, steps, lr", (("muon", 100, 0.002), ("muon", 1000, 0.01),
                                                  ("adamw", 100, 0.002)))
def test_what_is_not_read_is_forgotten_by_as_much_however_long_a_run_is(optimizer, steps, lr, monkeypatch):
    """Under gradients of zero every matrix shrinks to exp(-forget), the embedding to exp(-embed_forget), in
    100 steps as in 1,000, at any rate. A norm's gain starts at one, in AdamW, at --lr and without decay."""
    monkeypatch.setattr(model_py, "Block", Gain)
    how = settings(steps=steps, lr=lr, forget=1.5, embed_forget=0.5, optimizer=optimizer, n_layer=2)
    model = Transformer(how, True)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert start["blocks.1.gain"].eq(1).all()
    optimizers = train.make_optimizers(model, how)
    [(kind, gains)] = [(type(one), group) for one in optimizers for group in one.param_groups
                       if any(p is model.blocks[0].gain for p in group["params"])]
    assert (kind, len(gains["params"]), gains["peak"], gains["weight_decay"]) == (torch.optim.AdamW, 2, lr, 0)
    for step in range(steps):
        for one in optimizers:
            for group in one.param_groups:
                group["lr"] = group["peak"] * train.schedule(step, steps)
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            one.step()
    for name, p in model.named_parameters():
        share = 1 if name.endswith("gain") else math.exp(-0.5 if name.startswith("embed") else -1.5)
        torch.testing.assert_close(p.detach(), share * start[name], rtol=0.03, atol=1e-6)


def test_a_layer_frozen_in_finetune_is_pretrained_and_then_stays(monkeypatch):
    """`model.blocks[0].requires_grad_(False)` where finetune says so: the base learns that block, fine-tuning
    leaves it alone bit for bit, decay included; the norm and the FLOPs in the log are of what learns."""
    real, runs = train.finetune, []

    def finetune(settings, corpus, model, folder):
        model.blocks[0].requires_grad_(False)
        runs.append(real(settings, corpus, model, folder))
        return runs[-1]
    monkeypatch.setattr(train, "finetune", finetune)
    tiny("--n_layer", "2", "--forget", "3")
    start = Transformer(settings(n_layer=2), True).state_dict()
    base, end = weights(bases()[0]), weights("out/run")
    for name in base:
        assert not torch.equal(start[name], base[name])
        assert torch.equal(base[name], end[name]) == name.startswith("blocks.0")
    model = runs[0].model
    frozen, learning = ([p for p in model.parameters() if p.requires_grad == x] for x in (False, True))
    by_hand = sum(p.grad.double().square().sum() for p in learning).sqrt().item()
    assert log_of("out/run")[-1]["gradient_norm"] == pytest.approx(by_hand, rel=1e-5)
    assert len(frozen) == 4 and all(p.grad is None for p in frozen)
    per_token = 6 * sum(p.numel() for p in learning) + 4 * sum(p.numel() for p in frozen)
    assert log_of("out/run")[-1]["flops"] == per_token * 6 * tokens_a_step("masked")


@pytest.fixture
def dropout(monkeypatch):
    """Dropout in every block, as a researcher would add it -> what `training` has been when it was called."""
    modes, real = set(), model_py.Block.mlp

    def mlp(block, x):
        modes.add(block.training)
        return F.dropout(real(block, x), 0.5, block.training)
    monkeypatch.setattr(model_py.Block, "mlp", mlp)
    return modes


@pytest.mark.parametrize("stopped_at", (3, 13))
def test_dropout_is_one_line(stopped_at, dropout, monkeypatch):
    """One line in Block.mlp: two runs with one seed are equal, a resumed one equals an unbroken one, whatever
    drew numbers in between. Exams, `--exam` and `--ask` have the whole model: dropout is for learning."""
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    dropped = []
    for name in ("exam", "bayes"):
        def watched(*arguments, real=getattr(train, name)):
            dropped.append(True in dropout)
            dropout.clear()
            found = real(*arguments)
            assert dropout == {False}
            return found
        monkeypatch.setattr(train, name, watched)
    unbroken()
    assert dropped == [True] * 4 + [False]  # at exams, but for `bayes`, which follows one

    def stop():
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        stop_after(stopped_at, patch, stop)
        with pytest.raises(KeyboardInterrupt):
            tiny()
    torch.rand(7)
    tiny()
    assert_same_run("a/run", "out/run")
    assert_same_run("a/base", bases()[0])
    for flags in (["--exam"], ["--ask"], ["--ask", "Who went to Yale?"]):
        dropout.clear()
        call(evaluation, "out/run", *flags)
        assert dropout == {False}, flags


def test_the_mask_ratio_reaches_the_documents_of_fine_tuning_alone(monkeypatch):
    """The base and all questions keep a ratio of their own; else BERT's share would compare two things.
    Another ratio gives other weights from the same base."""
    given, real = Counter(), MODES["diffusion"]

    def objective(tokens, learned, generator, ratio=(0, 1)):
        given[MARKS._fields[tokens[0, 0]], tuple(ratio)] += 1
        return real.objective(tokens, learned, generator, ratio)
    monkeypatch.setitem(MODES, "diffusion", real._replace(objective=objective))
    monkeypatch.setattr(train, "bayes", lambda *_: {})  # which hides all of an answer
    tiny("--mode", "diffusion", "--mask_ratio", ".1", ".2")
    assert given == {("doc", (0, 1)): 4, ("doc", (0.1, 0.2)): 6, ("question", (0, 1)): 4 + 6}
    tiny("--mode", "diffusion", "--mask_ratio", ".3", ".4", folder="out/other")
    assert not same_weights("out/run", "out/other") and len(bases()) == 1


@pytest.mark.parametrize("shape", ((48, 16), (16, 16), (16, 64)))
def test_muon_is_muon(shape):
    """Five steps with random gradients move two matrices, which ours takes together, as PyTorch's own moves
    each, within its bfloat16 precision."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for _ in range(2)] for _ in range(2))
    optimizers = (train.Muon([{"params": ours, "lr": 0.1, "weight_decay": 0.5}]),
                  torch.optim.Muon(theirs, 0.1, momentum=0.95, weight_decay=0.5))
    for seed in range(5):
        for a, b, scale in zip(ours, theirs, (1, 100)):
            a.grad = b.grad = scale * torch.randn(shape, generator=generator(seed + scale))
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.02 * (a - torch.ones(shape)).norm()


def test_the_readmes_commands_are_accepted(monkeypatch):
    """Every `python train.py ...` in the README, and every row of flags in its tables and loops, is parsed by
    the script; the files that it names or links exist, but for what a run writes."""
    commands = re.findall(r"python train\.py([^\n`#|<>;]*)", README)
    assert len(commands) >= 3
    values = {"mode": "ar", "seed": "0", "texts": "2", "arm": "none", "world": "books"}
    for command in commands + re.findall(r"(?:^|\| `)(--\w+ [^\n`]*)", README, re.MULTILINE):
        words = re.sub(r"\$(\w+)", lambda name: values[name[1]], command.replace("...", ""))
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(words)])
        train.parse_args()
    names = re.findall(r"`([\w./-]+\.(?:py|md|txt))`|\]\((?!https?:|#)([^)\s]+)\)", README)
    for name in map("".join, names):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


@pytest.mark.skipif("\n## The tour" not in README, reason="the README has no tour yet")
def test_the_tour_names_what_there_is():
    """The functions that the README leads through stand in the files that it gives."""
    tour = README.split("\n## The tour")[1].split("\n## ")[0]
    stops = re.findall(r"`([\w.]+)` \((\w+\.py)\)", tour)
    assert len(stops) >= 8
    for name, file in stops:
        place = importlib.import_module(file.removesuffix(".py"))
        for part in name.split("."):
            place = getattr(place, part)
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {part}\b|^{part} = ", source, re.MULTILINE), name


RUN = f"train.py {' '.join(TINY)}"


@pytest.mark.parametrize("script, inside", (
    ("data.py", True), ("diffusion.py", True), ("train.py --help", True), ("eval.py --help", True),
    (RUN, True), (RUN, False)))
def test_scripts_start_from_a_shell(script, inside):
    """As a child process from their own folder, as most people do (a copy, for out/ lands there), or from
    another one, with output that is no terminal and can only show ASCII."""
    name, *flags = script.split()
    for file in ROOT.glob("*.py") if inside else ():
        shutil.copy(file, ".")
    path = name if inside else str(ROOT / name)
    done = subprocess.run([sys.executable, path, *flags], capture_output=True, encoding="ascii",
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and len(done.stdout) > 200, done.stderr
