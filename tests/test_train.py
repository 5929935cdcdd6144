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
from statistics import mean
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import model as model_py
import train
from conftest import (ROOT, TINY, assert_same_run, base, call, generator, log_of, result_of, same_weights,
                      settings, tiny, unbroken, watch_loss, weights)
from data import ARMS, EXAMS, MARKS, QUESTIONS, WORLDS, decode, make_corpus
from diffusion import MODES
from model import DEVICES, Transformer

README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")  # a line goes on


def tokens_read(mode, documents, questions):
    """By hand: a causal model reads all of a row but its last token; a prompt doubles a document."""
    corpus = make_corpus(settings(seed=2))
    width, of_question = corpus.width, corpus.rows["known_forward"][0].size(1)
    a_document = {"ar": width - 1, "masked": 2 * width - 1, "diffusion": width}[mode]
    return documents * a_document + questions * (of_question - MODES[mode].causal)


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_is_examined_and_answers(mode, capsys):
    """A few steps through the command line, on a GPU if there is one, leave a checkpoint, a log, a result and
    all answers, and eval.py reads them all. Exams within the run ask questions alone, the last one all, and
    its scores count. Today's exam of the stored weights has the scores that are stored."""
    call(train, "--mode", mode, *TINY, "--n_layer", 2, "--seed", 2, "--device", DEVICES[-1])
    [folder] = Path("out").glob(f"{mode}-none-*-seed2")
    result, exams, table = result_of(folder), result_of(folder)["exams"], capsys.readouterr().out
    assert {"rank_new", "chance_backward", "code", "machine", "python", "torch"} <= result.keys()
    parts = {*EXAMS, "bayes"}
    assert [parts & line.keys() for line in exams] == [{*QUESTIONS}] * 3 + [parts]
    assert [line["step"] for line in exams] == [0, 2, 4, 6] and exams[-1].items() <= result.items()
    right = {name: [] for name in EXAMS}
    for line in map(json.loads, Path(folder, "answers.jsonl").read_text(encoding="utf-8").splitlines()):
        right[line["exam"]].append(line["answer"] == line["truth"])
    assert {name: mean(answers) for name, answers in right.items()} == {name: result[name] for name in EXAMS}
    assert {name: len(answers) for name, answers in right.items()} == result["items"]
    losses = [line["loss"] for line in log_of(folder) + log_of(base(mode, 2)) if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if mode in ("ar", "masked", "diffusion"):
        assert result["tokens"] == 6 * tokens_read(mode, 4 + 9, 2 + 1)
        assert log_of(base(mode, 2))[-1]["tokens"] == 4 * tokens_read(MODES[mode].base, 32, 16 + 16)
    for words, shown in (([folder], "stored"), ([], mode), ([folder, "--ask", "Who?"], "Who?")):
        call(evaluation, *words)
        out = capsys.readouterr().out
        assert shown in out
        if shown == "stored":
            rows = [line for line in out.splitlines() if "  0." in line or "  1." in line]
            assert len(rows) == len(EXAMS) and all(row.split("  ")[0] in table for row in rows)
            assert all(len(set(re.findall(r"\d\.\d\d(?= +(?:\d|[█·]))", row))) == 1 for row in rows)
    for place in (folder, base(mode, 2)):
        saved_mode, corpus, model = evaluation.reopen(place)
        assert model.causal == MODES[mode].causal == MODES[saved_mode].causal and len(model.blocks) == 2
        assert corpus.people == make_corpus(settings(seed=2)).people


@pytest.mark.parametrize("flags, left_out", (
    (["--new", "1"], set()), (["--world", "books", "--new", "1", "--known", "1"], {"known_unasked"}),
    (["--world", "books", "--new", "1", "--paraphrases", "name_last"], {"recite", "known_unasked"})))
def test_one_new_person_is_enough(flags, left_out, capsys):
    """Exams without items are left out of the scores, and are a dash in the comparison; all else is a finite
    number. (Of books, only the tenth known person's question is kept out of training.)"""
    tiny(*flags)
    result = result_of("out/run")
    assert set(EXAMS) - result.keys() == left_out and "bayes" in result
    assert all(math.isfinite(x) for line in [result, *result["exams"], *log_of("out/run")]
               for x in line.values() if isinstance(x, (int, float)))
    capsys.readouterr()
    call(evaluation)
    head, row = (re.split("  +", line) for line in capsys.readouterr().out.splitlines())
    assert {name for name, cell in zip(head[3:], row[3:]) if cell == "-"} == left_out


@pytest.mark.parametrize("flags, folder, base", (
    ("", "none", "ar-none"), ("--known 300", "none-known300", "ar-none-known300"),
    ("--lr .01 --batch 11 43 5 5", "none-lr0.01", "ar-none"),
    ("--batch 4 9 2 1 --device cpu", "none-batch4-9-2-1", "ar-none"),
    ("--paraphrases name_last --texts 2 --forget 2", "name_last-texts2-forget2.0", "ar-none"),
    ("--mode diffusion --mask_ratio .5 1", "none-mask_ratio0.5-1.0", "diffusion-none"),
    ("--pretrain_steps 7", "none-pretrain_steps7", "ar-none-steps7"),
    (f"--world books --steps {train.defaults('books').steps}", "none-books", "ar-none-books"),
    ("--world books --steps 77", "none-books-steps77", "ar-none-books")))
def test_folder_and_base_are_named_after_what_was_changed(flags, folder, base, monkeypatch):
    """Mode, arm, world, each flag that differs from that world's default, seed: said or not, a default is the
    same run. Two runs with the name of one base have the same settings of pretraining."""
    stages = []
    for name in ("make_corpus", "Transformer", "identity", "claim"):
        monkeypatch.setattr(train, name, MagicMock())

    def trained(stage, settings, corpus, model, folder):
        stages.append((settings, str(folder)))
        if stage == "fine-tuning":
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "train", trained)
    with pytest.raises(KeyboardInterrupt):
        call(train, *flags.split())
    (pretraining, base_folder), (now, run_folder) = stages
    assert run_folder == str(Path(f"out/{now.mode}-{folder}-seed0"))
    assert base_folder == str(Path(f"out/base-{base}-seed0"))
    assert (base == "ar-none") == (pretraining == train.of_base(train.Settings()))
    assert (pretraining.mode, pretraining.steps) == (MODES[now.mode].base, now.pretrain_steps)


def test_documents_and_questions_weigh_as_rows(monkeypatch):
    """A loss of 1 on the 13 documents and of 3 on the 3 questions of a batch is one of 22/16; in pretraining,
    with 11 and 5, it is one of 26/16."""
    real = train.loss
    monkeypatch.setattr(train, "loss", lambda model, inputs, *rest: 0 * real(model, inputs, *rest) + (
        3 if inputs[0, 0] == MARKS.question else 1))
    monkeypatch.setitem(train.PRETRAINING, "batch", [11, 0, 3, 2])
    tiny()
    for folder, mean_loss in (("out/run", 22 / 16), (base(), 26 / 16)):
        assert {line["loss"] for line in log_of(folder) if "loss" in line} == {mean_loss}


def rows_read(monkeypatch, *flags):
    """[(stage, ids)] of all rows that a tiny run reads, in order; it makes its base itself."""
    read, real = [], train.draw

    def draw(corpus, counts, generator):
        stage = "fine-tuning" if generator.initial_seed() % 4 else "pretraining"  # as `train` seeds them
        drawn = real(corpus, counts, generator)
        read.extend((stage, ids) for ids in drawn[0].tolist())
        return drawn
    shutil.rmtree("out", ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(train, "draw", draw)
        tiny(*flags)
    return read


def test_no_training_row_is_a_new_persons_question(monkeypatch):
    """All rows of 4 and 6 steps, counted by hand: those of --batch 4 9 2 1 and, in pretraining, 3 documents
    and 3 questions. In fine-tuning 9 of the 13 documents tell of new people, and nothing else ever does. All
    modes with one seed read the same rows in the same order, whatever they mask; pretraining does not depend
    on the arm of new people."""
    new = [person.name for person in make_corpus(settings()).people[6:]]
    monkeypatch.setitem(train.PRETRAINING, "batch", [3, 0, 2, 1])
    masked = rows_read(monkeypatch)
    assert Counter((stage, decode(ids[:1]), decode(ids[1:2]) in ("What", "Who") and decode(ids[1:2]),
                    any(name in decode(ids) for name in new)) for stage, ids in masked) == {
        ("pretraining", "[doc]", False, False): 4 * 3, ("pretraining", "[question]", "What", False): 4 * 2,
        ("pretraining", "[question]", "Who", False): 4 * 1,
        ("fine-tuning", "[doc]", False, False): 6 * 4, ("fine-tuning", "[doc]", False, True): 6 * 9,
        ("fine-tuning", "[question]", "What", False): 6 * 2, ("fine-tuning", "[question]", "Who", False): 6}
    assert rows_read(monkeypatch, "--mode", "ar") == masked
    assert rows_read(monkeypatch, "--paraphrases", "name_anywhere")[:24] == masked[:24]
    assert rows_read(monkeypatch, "--seed", "1") != masked


def test_the_rates_reach_their_optimizers(monkeypatch):
    """After the last step: each peak rate times the schedule (up in 2 % of the steps, then straight down), in
    the stage it belongs to, for every weight once; rate 0 leaves the base as it is."""
    rates = [train.schedule(step, 100) for step in range(100)]
    assert [*rates[:3], rates[50], rates[99]] == pytest.approx([1 / 3, 2 / 3, 0.98, 0.5, 0.01])
    monkeypatch.setattr(train, "PRETRAINING", train.PRETRAINING | {"lr": 0.01, "embed_lr": 0.02})
    tiny("--lr", 0.03, "--embed_lr", 0.04)
    for folder, peaks, share in ((base(), (0.01, 0.02), 1 / 4), ("out/run", (0.03, 0.04), 1 / 6)):
        saved = torch.load(Path(folder, "ckpt.pt"), weights_only=True)
        groups = [group for state in saved["optimizers"] for group in state["param_groups"]]
        assert [len(group["params"]) for group in groups] == [4, 1, 0] and len(saved["model"]) == 5
        assert [group["lr"] / share for group in groups] == pytest.approx([*peaks, peaks[0]])
    tiny("--lr", "0", "--embed_lr", "0", name="still")
    assert same_weights("out/still", base())


class Gain(model_py.Block):
    """A block whose norm has a gain, as a researcher would add one."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.gain = torch.nn.Parameter(torch.ones(shape[1]))

    def mlp(self, x):
        return super().mlp(x * self.gain)


@pytest.mark.parametrize("steps, lr", ((100, 0.002), (1000, 0.01)))
def test_what_is_not_read_is_forgotten_by_as_much_however_long_a_run_is(steps, lr, monkeypatch):
    """Under gradients of zero every matrix shrinks to exp(-forget), the embedding to exp(-embed_forget), in
    100 steps as in 1,000, at any rate. A norm's gain starts at one, in AdamW, at --lr and without decay."""
    monkeypatch.setattr(model_py, "Block", Gain)
    how = settings(steps=steps, lr=lr, forget=1.5, embed_forget=0.5, n_layer=2)
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


def test_a_block_frozen_after_the_base_is_pretrained_and_then_stays(monkeypatch):
    """The line that a comment in `main` gives, run where it stands, before fine-tuning: the base learns that
    block, fine-tuning leaves it alone bit for bit, decay included, and goes on with the rest."""
    real, source = train.train, (ROOT / "train.py").read_text(encoding="utf-8")
    [line] = re.findall("# Here the base is done.*?(model.*)", source)

    def train_frozen(stage, settings, corpus, model, folder):
        if stage == "fine-tuning":
            exec(line, {"model": model})
        return real(stage, settings, corpus, model, folder)
    monkeypatch.setattr(train, "train", train_frozen)
    tiny("--n_layer", "2", "--forget", "3")
    start, before, after = Transformer(settings(n_layer=2), True).state_dict(), weights(base()), weights("out/run")
    for name in before:
        assert not torch.equal(start[name], before[name])
        assert torch.equal(before[name], after[name]) == name.startswith("blocks.0")


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
    """One line in Block.mlp: a run that was stopped and resumed equals an unbroken one with that seed, whatever
    drew numbers in between. Exams and `--ask` have the whole model: dropout is for learning."""
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
        watch_loss(patch, stopped_at, stop)
        with pytest.raises(KeyboardInterrupt):
            tiny()
    torch.rand(7)
    tiny()
    assert_same_run("a/run", "out/run")
    assert_same_run("a/base", base())
    for flags in ([], ["--ask"], ["--ask", "Who studied?"]):
        dropout.clear()
        call(evaluation, "out/run", *flags)
        assert dropout == {False}, flags


def test_the_mask_ratio_reaches_the_documents_of_fine_tuning_alone(monkeypatch):
    """The base and all questions keep a ratio of their own; else BERT's share would compare two things.
    Another ratio gives other weights from the same base."""
    given, real = Counter(), MODES["diffusion"]

    def objective(tokens, learned, generator, ratio):
        stage = {1: "pretraining", 3: "fine-tuning"}.get(generator.initial_seed())  # as `train` seeds masks
        given[stage, decode(tokens[0, :1].tolist()), tuple(ratio)] += 1
        return real.objective(tokens, learned, generator, ratio)
    monkeypatch.setitem(MODES, "diffusion", real._replace(objective=objective))
    tiny("--mode", "diffusion", "--mask_ratio", ".1", ".2")
    assert {key: n for key, n in given.items() if key[0]} == {
        ("pretraining", "[doc]", (0, 1)): 4, ("pretraining", "[question]", (0, 1)): 4,
        ("fine-tuning", "[doc]", (0.1, 0.2)): 6, ("fine-tuning", "[question]", (0, 1)): 6}
    before = weights(base("diffusion"))
    tiny("--mode", "diffusion", "--mask_ratio", ".3", ".4", name="other")
    assert not same_weights("out/run", "out/other")
    assert before.keys() and all(torch.equal(before[name], p) for name, p in weights(base("diffusion")).items())


@pytest.mark.parametrize("shape", ((48, 16), (16, 16), (16, 64)))
def test_muon_is_muon(shape):
    """Five steps with random gradients, small or large, move a matrix as PyTorch's own Muon does, within its
    bfloat16 precision."""
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


def test_the_readmes_commands_are_accepted(monkeypatch, capsys):
    """Every `python train.py ...` in the README, and every row of flags in its tables and loops, is parsed by
    the script; eval.py knows the flags that it is given there; the files that the README names or links exist,
    but for what a run writes."""
    commands = re.findall(r"python train\.py([^\n`#|<>;]*)", README)
    assert len(commands) >= 3
    values = {"mode": "ar", "seed": "0", "texts": "2", "arm": "none", "world": "books"}
    for command in commands + re.findall(r"(?:^|\| `)(--\w+ [^\n`]*)", README, re.MULTILINE):
        words = re.sub(r"\$(\w+)", lambda name: values[name[1]], command.replace("...", ""))
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(words)])
        train.parse_args()
    with pytest.raises(SystemExit):
        call(evaluation, "--help")
    known = capsys.readouterr().out
    for flag in re.findall(r"python eval\.py[^\n`]*?(--\w+)", README):
        assert flag in known, flag
    names = re.findall(r"`([\w./-]+\.(?:py|md|txt))`|\]\((?!https?:|#)([^)\s]+)\)", README)
    for name in map("".join, names):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


@pytest.mark.skipif("\n## The tour" not in README, reason="the README has no tour")
def test_the_tour_names_what_there_is():
    """The functions that the README leads through stand in the files that it gives."""
    tour = README.split("\n## The tour")[1].split("\n## ")[0]
    stops = re.findall(r"`([\w.]+)` \((\w+\.py)\)", tour)
    assert len(stops) >= 8
    for name, file in stops:
        part = name.split(".")[-1]
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {part}\b|^{part} = ", source, re.MULTILINE), name


@pytest.mark.parametrize("script, inside", (
    ("data.py", True), ("diffusion.py", True), ("train.py", True), ("train.py", False)))
def test_scripts_start_from_a_shell(script, inside):
    """As a child process from their own folder, as most people do (a copy, for out/ lands there), or from
    another one, with output that is no terminal and can only show ASCII."""
    for file in ROOT.glob("*.py") if inside else ():
        shutil.copy(file, ".")
    words = [script if inside else str(ROOT / script), *(TINY if script == "train.py" else [])]
    done = subprocess.run([sys.executable, *words], capture_output=True, encoding="ascii",
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and len(done.stdout) > 200, done.stderr


@pytest.mark.parametrize("script", (train, evaluation))
def test_help_names_every_flag(script, capsys):
    """With a default or an advice each, in ASCII, so that any terminal shows it."""
    with pytest.raises(SystemExit) as stop:
        call(script, "--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0 and said.isascii()
    for flag in train.Settings.__dataclass_fields__ if script is train else ("plot", "ask"):
        assert f"--{flag}" in said
