"""Runs as people start them: every mode, one base for all, counts that add up, and what you may change."""
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

import eval as evaluation
import model as model_py
import train
from conftest import (ROOT, TINY, base, call, generator, log_of, result_of, same_weights, settings, tiny,
                      weights)
from data import EXAMS, LAST, MARKS, MEN, MIDDLE, QUESTIONS, WOMEN, decode, make_corpus
from diffusion import MODES
from model import DEVICES, Transformer

README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")  # a line goes on


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_is_examined_and_answers(mode):
    """A few steps through the command line, on a GPU if there is one, leave a checkpoint, a log, a result and
    all answers, and eval.py reads them. Exams within the run ask questions alone, the last one all."""
    call(train, "--mode", mode, *TINY, "--n_layer", 2, "--seed", 2, "--device", DEVICES[-1])
    [folder] = Path("out").glob(f"{mode}-none-*-seed2")
    result, parts, people = result_of(folder), {*EXAMS, "bayes"}, make_corpus(settings(seed=2)).people
    exams = result["exams"]
    assert {"rank_new", "chance_backward", "code", "machine", "python", "torch"} <= result.keys()
    assert [line["step"] for line in exams] == [0, 2, 4, 6] and exams[-1].items() <= result.items()
    assert [parts & line.keys() for line in exams] == [{*QUESTIONS}] * 3 + [parts]
    for name in EXAMS:
        right = [x["answer"] == x["truth"] for x in log_of(folder, "answers.jsonl") if x["exam"] == name]
        assert (result[name], result["items"][name]) == (sum(right) / len(right), len(right))
    for words, shown in (([folder], "stored"), ([], mode), ([folder, "--ask", "Who?"], "Who?")):
        assert shown in call(evaluation, *words)
    for place, name in ((folder, mode), (base(mode, 2), MODES[mode].base)):
        saved_mode, corpus, model = evaluation.reopen(place)
        assert (saved_mode, corpus.people, len(model.blocks)) == (name, people, 2)
        assert model.causal == MODES[mode].causal == MODES[name].causal


@pytest.mark.parametrize("flags, left_out", (
    ("--new 1", set()), ("--world books --new 1 --known 1", {"known_unasked"}),
    ("--world books --new 1 --paraphrases name_last", {"recite", "known_unasked"})))
def test_one_new_person_is_enough(flags, left_out):
    """Exams without items are left out of the scores, and are a dash in the comparison; all else is a finite
    number. (Of books, only the tenth known person's question is kept out of training.)"""
    tiny(*flags.split())
    result = result_of("out/run")
    assert set(EXAMS) - result.keys() == left_out and "bayes" in result
    numbers = [x for line in [result, *result["exams"], *log_of("out/run")] for x in line.values()]
    assert all(math.isfinite(x) for x in numbers if isinstance(x, (int, float)))
    head, row = (re.split("  +", line) for line in call(evaluation).splitlines())
    assert {name for name, cell in zip(head[3:], row[3:]) if cell == "-"} == left_out - {"known_unasked"}
    call(evaluation, "out/run", "--ask")


@pytest.mark.parametrize("flags, folder, base", (
    ("", "none", "ar-none"), ("--known 300", "none-known300", "ar-none-known300"),
    ("--lr .01 --batch 4 9 2 1 --device cpu", "none-batch4-9-2-1-lr0.01", "ar-none"),
    ("--paraphrases name_last --texts 2 --forget 2", "name_last-texts2-forget2.0", "ar-none"),
    ("--mode diffusion --mask_ratio .5 1", "none-mask_ratio0.5-1.0", "diffusion-none"),
    ("--mode diffusion --pretrain_steps 7", "none-pretrain_steps7", "diffusion-none-steps7"),
    ("--pretrain_steps 7 --batch 21 38 2 3", "none-pretrain_steps7", "ar-none-steps7"),
    (f"--world books --steps {train.defaults('masked', 'books').steps}", "none-books", "ar-none-books"),
    ("--world books --steps 77", "none-books-steps77", "ar-none-books")))
def test_folder_and_base_are_named_after_what_was_changed(flags, folder, base, monkeypatch):
    """Mode, arm, world, each flag that is not this world's default, seed; one name of a base, one base."""
    for name in ("make_corpus", "Transformer", "identity", "claim"):
        monkeypatch.setattr(train, name, MagicMock())
    monkeypatch.setattr(train, "train", MagicMock(side_effect=[[], KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        call(train, *flags.split())
    stages = [stage.args for stage in train.train.call_args_list]
    (_, before, _, _, base_folder), (_, now, _, _, run_folder) = stages
    assert base_folder == Path(f"out/base-{base}-seed0")
    assert run_folder == Path(f"out/{now.mode}-{folder}-seed0")
    assert (base == "ar-none") == (before == train.of_base(train.Settings()))
    assert (before.mode, before.steps) == (MODES[now.mode].base, now.pretrain_steps)


def test_no_training_row_is_a_new_persons_question(monkeypatch):
    """All rows of 4 and 6 steps, by hand: those of --batch 4 9 2 1 and, in pretraining, 3 documents and 3
    questions. In fine-tuning 9 of 13 documents tell of new people, and nothing else ever does. All modes with
    one seed read the same rows in the same order; pretraining does not depend on the arm."""
    runs = []

    def draw(corpus, counts, generator, real=train.draw):
        stage = "fine-tuning" if generator.initial_seed() % 4 else "pretraining"  # as `train` seeds them
        drawn = real(corpus, counts, generator)
        runs[-1].extend((stage, ids) for ids in drawn[0].tolist())
        return drawn
    monkeypatch.setattr(train, "draw", draw)
    monkeypatch.setitem(train.PRETRAINING, "batch", [3, 0, 2, 1])
    for flags in ([], ["--mode", "ar"], ["--seed", "1"], ["--paraphrases", "name_anywhere"]):
        shutil.rmtree("out", ignore_errors=True)  # each makes its base itself
        runs.append([])
        tiny(*flags)
    masked, ar, other_seed, other_arm = runs
    counts, new = Counter(), [person.name for person in make_corpus(settings()).people[6:]]
    for stage, ids in masked:
        kind = "document" if ids[0] == MARKS.doc else decode(ids[1:2])
        counts[stage, kind, "new" if any(name in decode(ids) for name in new) else "known"] += 1
    assert counts == {
        ("pretraining", "document", "known"): 4 * 3, ("fine-tuning", "document", "known"): 6 * 4,
        ("pretraining", "What", "known"): 4 * 2, ("fine-tuning", "What", "known"): 6 * 2,
        ("pretraining", "Who", "known"): 4 * 1, ("fine-tuning", "Who", "known"): 6 * 1,
        ("fine-tuning", "document", "new"): 6 * 9}
    assert ar == masked != other_seed and other_arm[:4 * 6] == masked[:4 * 6]


def test_documents_and_questions_weigh_as_rows(monkeypatch):
    """A loss of 1 a document and 3 a question is 22/16 in a batch of 13 and 3, and 2 in one of 32 and 32."""
    real = train.loss
    monkeypatch.setattr(train, "loss", lambda model, inputs, *rest: 0 * real(model, inputs, *rest) + (
        3 if inputs[0, 0] == MARKS.question else 1))
    tiny()
    assert [log_of(folder)[-1]["loss"] for folder in ("out/run", base())] == [22 / 16, 2]


def test_the_mask_ratio_reaches_the_documents_of_fine_tuning_alone(monkeypatch):
    """The base and all questions keep a ratio of their own; else BERT's share would compare two things."""
    objective = MagicMock(wraps=MODES["diffusion"].objective)
    monkeypatch.setitem(MODES, "diffusion", MODES["diffusion"]._replace(objective=objective))
    tiny("--mode", "diffusion", "--mask_ratio", ".1", ".2")
    given = Counter()
    for tokens, _, generator, ratio in (call.args for call in objective.call_args_list):
        stage = {1: "pretraining", 3: "fine-tuning"}.get(generator.initial_seed())  # as `train` seeds masks
        given[stage, decode(tokens[0, :1].tolist()), tuple(ratio)] += 1
    assert {key: n for key, n in given.items() if key[0]} == {
        ("pretraining", "[doc]", (0, 1)): 4, ("pretraining", "[question]", (0, 1)): 4,
        ("fine-tuning", "[doc]", (0.1, 0.2)): 6, ("fine-tuning", "[question]", (0, 1)): 6}


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
        assert folder != base() or sum(len(group["params"]) for group in groups) == len(saved["model"])
        assert [group["lr"] / share for group in groups] == pytest.approx([*peaks, peaks[0]])
    tiny("--lr", "0", "--embed_lr", "0", name="still")
    assert same_weights("out/still", base())


@pytest.mark.parametrize("shape", ((48, 16), (16, 16), (16, 64)))
def test_muon_is_muon(shape):
    """Five steps with random gradients, small or large, are those of PyTorch's own, within its bfloat16."""
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


@pytest.mark.parametrize("steps, lr", ((100, 0.002), (1000, 0.01)))
def test_what_is_not_read_is_forgotten_by_as_much_however_long_a_run_is(steps, lr, monkeypatch):
    """Under gradients of zero every matrix shrinks to exp(-forget), the embedding to exp(-embed_forget), in
    100 steps as in 1,000, at any rate. A norm's gain, as you might add it, is in AdamW and does not decay."""
    def with_gain(block, *shape, real=model_py.Block.__init__):
        real(block, *shape)
        block.gain = torch.nn.Parameter(torch.ones(shape[1]))
    monkeypatch.setattr(model_py.Block, "__init__", with_gain)
    how = settings(steps=steps, lr=lr, forget=1.5, embed_forget=0.5, n_layer=2)
    model = Transformer(how, True)
    start, optimizers = Transformer(how, True).state_dict(), train.make_optimizers(model, how)
    assert 2 * [16 * [1]] == [p.tolist() for p in optimizers[1].param_groups[-1]["params"] if p.numel() == 16]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * train.schedule(step, steps)
            optimizer.step()
    for name, p in model.named_parameters():
        share = 1 if p.dim() < 2 else math.exp(-1.5 if name.startswith("blocks") else -0.5)
        torch.testing.assert_close(p.detach(), share * start[name], rtol=0.03, atol=1e-6)


def test_a_block_frozen_after_the_base_is_pretrained_and_then_stays(monkeypatch):
    """The line that a comment in `main` gives, run where it stands, before fine-tuning: the base learns that
    block, fine-tuning leaves it alone bit for bit, decay included, and goes on with the rest."""
    [line] = re.findall("# Here the base is done.*?(model.*)", Path(train.__file__).read_text("utf-8"))

    def train_frozen(stage, settings, corpus, model, folder, real=train.train):
        if stage == "fine-tuning":
            exec(line, {"model": model})
        return real(stage, settings, corpus, model, folder)
    monkeypatch.setattr(train, "train", train_frozen)
    tiny("--n_layer", "2", "--forget", "3")
    start, old, new = Transformer(settings(n_layer=2), True).state_dict(), weights(base()), weights("out/run")
    for name in old:
        assert not torch.equal(start[name], old[name])
        assert torch.equal(old[name], new[name]) == name.startswith("blocks.0")


def test_the_readmes_commands_are_accepted(monkeypatch):
    """Each `python train.py ...` there is parsed; eval.py has the flags that it is given."""
    commands = re.findall(r"python train\.py([^\n`#]*)", README)
    assert len(commands) >= 3
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["train.py", *command.split()])
        train.parse_args()
    for flag in re.findall(r"python eval\.py[^\n`]*?(--\w+)", README):
        assert f'"{flag}"' in (ROOT / "eval.py").read_text(encoding="utf-8")


def test_the_readme_names_what_there_is():
    """The files that it names or links exist, but for what a run writes; so do the functions of its tour."""
    for name in re.findall(r"`([\w./-]+\.(?:py|md|txt))`|\]\((?!https?:|#)([^)\s]+)\)", README):
        assert any((ROOT / folder / "".join(name)).exists() for folder in (".", "tests")), name
    for name, file in re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README):
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {name}\b|^{name} = ", source, re.MULTILINE), name


def test_every_example_is_about_somebody_who_exists():
    """Whoever is named in the README or in a script is a person of seed 0. (One is marked as nobody.)"""
    people = {person.name for person in make_corpus(train.Settings()).people}
    name = re.compile(r"\s+".join(f"(?:{'|'.join(pool)})" for pool in (MEN + WOMEN, MIDDLE, LAST)))
    for path in (ROOT / "README.md", *ROOT.glob("*.py"), *ROOT.glob(".lab/*.py")):
        named = {" ".join(found.split()) for found in name.findall(path.read_text(encoding="utf-8"))}
        assert named <= people, f"{path.name}: nobody is called {named - people}"


@pytest.mark.parametrize("script, inside", (
    ("data.py", True), ("diffusion.py", True), ("train.py --help", True), ("eval.py --help", True),
    (f"train.py {' '.join(TINY)}", True), (f"train.py {' '.join(TINY)}", False)))
def test_scripts_start_from_a_shell(script, inside):
    """From their own folder (a copy, for out/ lands there) or another, where only ASCII can be shown."""
    name, *flags = script.split()
    for file in ROOT.glob("*.py") if inside else ():
        shutil.copy(file, ".")
    done = subprocess.run([sys.executable, name if inside else str(ROOT / name), *flags], capture_output=True,
                          encoding="ascii", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and len(done.stdout) > 200, done.stderr
