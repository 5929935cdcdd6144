"""What goes wrong at other people's desks, and what an edit costs: no work is lost, no refusal a riddle."""
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import model as model_py
import train
from conftest import ROOT, TINY, base, call, edit, log_of, refusal, result_of, same_weights, settings, tiny
from data import ARMS, WORLDS
from diffusion import MODES, ar, masked
from model import Transformer

WORLD = WORLDS["biographies"]
CODE = "data.py", "model.py", "diffusion.py", "eval.py", "train.py"
TRAINING = []  # what `training` has been whenever a block with dropout was called


def with_dropout(block, x, real=model_py.Block.mlp):
    TRAINING.append(block.training)
    return F.dropout(real(block, x), 0.5, block.training)


def train_until_stopped(flags, n, delay):
    """In a process of its own: save at every step. As file number n is written, the process is killed after a
    moment or, without a delay, the disk is full."""
    def write_bytes(path, content, real=Path.write_bytes, files=[]):
        files.append(path)
        if len(files) == n and delay:
            threading.Timer(delay, os._exit, [9]).start()
        elif len(files) == n:
            real(path, content[:len(content) // 2])
            raise OSError("No space left on device")
        real(path, content)
    train.SAVE_EVERY, model_py.Block.mlp, Path.write_bytes = 1, with_dropout, write_bytes
    try:
        tiny(*flags)
    except OSError:
        os._exit(9)


def test_twenty_kills_cost_no_result(monkeypatch):
    """Stopped 20 times, in both stages, as it writes, by a kill or a full disk, and started again each time,
    a run ends with the logs and weights of an unbroken one, bit for bit. So it does with dropout, one line in
    Block.mlp: both batches of a step drop, exams and `--ask` do not."""
    flags, moments, steps = ["--steps", "64", "--pretrain_steps", "16"], random.Random(0), []
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    monkeypatch.setattr(model_py.Block, "mlp", with_dropout)
    tiny(*flags)
    assert TRAINING.count(True) == 2 * (16 + 64)
    shutil.move("out", "unbroken")
    processes = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    processes.set_forkserver_preload(["torch._inductor", "tiktoken", "pytest"])  # once, not 21 times
    for stops in range(21):
        n = moments.randrange(1, 14) if stops < 20 else None  # of 162 files
        delay = moments.uniform(0, 0.005) if stops % 3 else 0
        process = processes.Process(target=train_until_stopped, args=(flags, n, delay))
        process.start()
        process.join()
        assert process.exitcode in (0, 9)  # none was refused
        steps.append([log_of(path.parent)[-1]["step"] for path in sorted(Path("out").glob("*/ckpt.pt"))])
    assert steps == sorted(steps)  # nothing that was saved, of the base or of the run, is ever lost
    assert {1, 2} <= {len(stages) for stages in steps} and len({*map(tuple, steps)}) > 10, steps
    for folder in (base(), Path("out/run")):
        other = Path("unbroken", folder.name)
        assert log_of(folder) == log_of(other) and same_weights(folder, other)
    TRAINING.clear()
    for question in ([], ["--ask"], ["--ask", "Who studied?"]):
        call(evaluation, "out/run", *question)
    assert {*TRAINING} == {False}


def test_ctrl_c_is_one_line(monkeypatch):
    """What Python prints of a sys.exit("line"): what to do next, no traceback; its exit code is 1."""
    monkeypatch.setattr("data.make_corpus", MagicMock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert re.fullmatch("[^\n]*the same command[^\n]*", str(stop.value).strip())


@pytest.mark.parametrize("factor", (math.nan, math.inf))
def test_what_is_not_finite_stops_the_run(factor, monkeypatch):
    """With the step and what to try, before broken weights are saved; the checkpoint is that of before."""
    calls, loss = iter(range(100)), train.loss  # two a step, after eight in pretraining
    monkeypatch.setattr(train, "loss", lambda *batch: loss(*batch) * (factor if next(calls) == 14 else 1))
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    said = refusal(train, *TINY, "--name", "run")
    assert "step 4" in said and str(Path("out/run")) in said and "lower the rates" in said
    saved = torch.load("out/run/ckpt.pt", weights_only=True)
    assert saved["log"][-1]["step"] == 3 and all(torch.isfinite(w).all() for w in saved["model"].values())


COMMANDS = """
--mode gpt | --mode AR | --mode | --paraphrases many | --known_paraphrases same | --world mars | --seed -1
--mask_ratio .5 | --mask_ratio 1.5 1.5 | --mask_ratio half half | --mask_ratio 0 nan | --mask_ratio -.1 1
--mask_ratio 0 0 --mode diffusion | --mask_ratio .5 .5 --mode ar | --seed 99999999999 | --learning_rate 1
--known 0 | --known many | --known 1.5 | --new 1e3 | --new 0 | --texts -1 | --steps 0 | --pretrain_steps -1
--batch 1 2 3 | --batch 0 0 5 5 | --batch -1 2 3 4 | --batch 4 | --n_layer 0 | --n_head 3 | --n_head 64
--lr -1 | --lr nan | --embed_lr inf | --forget -1 | --embed_forget -inf | --n_embd 17 | --device cuda:99
--mask .5 | --name | --name a/b | --name .. | --name base-mine | --name über | extra
"""
BAD = [(train, flags.split(), flags.split()[0]) for flags in re.split(r" \| |\n", COMMANDS.strip())]
BAD += [(train, ["--name", 201 * "x"], "--name"), (train, ["--name", ""], "--name"),
        (train, ["--known", "900000"], "too many"), (train, ["--world", "books", "--known", "40000"], "many")]
BAD += [(evaluation, words.split(), culprit) for words, culprit in (
    ("no", "no holds no finished run"), ("no/result.json", "no finished"), ("no --plot x.svg", "no finished"),
    ("out/masked --plot x.png", ".svg"), ("--ask Who?", "one run"), ("no --ask", "one run"),
    ("--best", "--best"), ("a b", "arguments: b"), ("--ask --plot x.svg", "--plot"))]
BAD += [(evaluation, ["out/masked", "--ask", text], culprit) for text, culprit in (
    ("  \n", "a question"), ("Who hates Rome?", "hates"), ("谁", "谁"), ("[mask] sings.", "sings"),
    ("Cur[mask]tis lives", "Cur"), ("*** !", "*"), ("Who went to [mask]?", "a question"),
    ("Who went to Reed", "a question"), ("Who? " * 5000, "too many"), ("[mask] " * 500, "too many"))]


@pytest.mark.parametrize("module, flags, culprit", BAD, ids=[f"{m.__name__}{f}"[:50] for m, f, _ in BAD])
def test_a_bad_command_ends_in_one_line(module, flags, culprit, runs):
    """Exit code 1 or 2, one line that names the culprit, and nothing is trained, written or moved aside."""
    before = sorted(Path().rglob("*"))
    command = [*TINY, "--name", "masked", "--seed", "1", *flags] if module is train else flags
    assert culprit in refusal(module, *command) and sorted(Path().rglob("*")) == before


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def in_mode(name, **change):
    return lambda patch: patch.setitem(MODES, name, MODES[name]._replace(**change))


def in_files(*names, **how):
    return lambda patch: [edit(patch, name, **how) for name in names]


FREE = {
    "the decoder": in_mode("masked", decode=MODES["ar"].decode),
    "another mode's objective": in_mode("diffusion", objective=None),
    "the exam": lambda patch: patch.setattr(evaluation, "until_end", lambda text: "always right"),
    "the table": lambda patch: patch.setattr(evaluation, "REPORT", evaluation.REPORT[::-1]),
    "another world or arm": lambda patch: [patch.delitem(WORLDS, "books"), patch.delitem(ARMS, "name_last")],
    "code that does the same": in_files("data.py", "diffusion.py", "eval.py"),
    "comments and docstrings": in_files(*CODE, change=lambda text: re.sub(
        r'(    """)(?=[A-Z])', r"\1So: ", text.replace("\n\n", "\n\n# so\n\n").replace("  # ", "  # so: ")))}


@pytest.mark.parametrize("what", FREE)
def test_an_edit_that_changes_no_training_costs_nothing(what, runs, monkeypatch):
    """The same command prints the stored result, and `python eval.py out/RUN` prints today's scores of the
    stored weights beside it. Nothing is trained, written or moved."""
    before, printed = (content("out/masked"), sorted(Path().rglob("*"))), tiny(name="masked")
    monkeypatch.setattr(train, "loss", None)
    FREE[what](monkeypatch)
    assert sorted(tiny(name="masked")) == sorted(printed)
    scores = re.findall(r" \d+ +(\d\.\d\d) +[█·]+ +(\d\.\d\d) ", call(evaluation, "out/masked"))
    stored = [f"{result_of('out/masked')[name]:.2f}" for name, *_ in evaluation.REPORT]
    assert what == "the decoder" or scores == [("1.00" if what == "the exam" else x, x) for x in stored]
    assert (content("out/masked"), sorted(Path().rglob("*"))) == before


def with_gain(block, *shape, real=model_py.Block.__init__):
    real(block, *shape)
    block.gain = torch.nn.Parameter(torch.ones(1))


CHANGES = {  # what differs: an edit, and flags
    "objective": (in_mode("masked", objective=lambda tokens, learned, *_: ar(tokens, learned)), []),
    "rows": (lambda patch: patch.setitem(ARMS, "change_order", ARMS["none"]), []),
    "weights": (lambda patch: patch.setattr(model_py.Block, "__init__", with_gain), []),
    "model.py": (in_files("model.py"), []), "train.py": (in_files("train.py"), []),
    "lr": (in_files(), ["--lr", ".01"]), "seed": (in_files(), ["--seed", "1"]),
    "mode": (in_files(), ["--mode", "diffusion"])}


@pytest.mark.parametrize("what", CHANGES)
def test_what_matters_trains_anew_and_undone_costs_nothing(what, runs, monkeypatch):
    """The run before moves aside, and the base, if it is concerned; one line each names what is other. Undo
    the edit, and both are taken back; do it again, and so is the new run. The comparison shows all of them.
    A stored model is examined only where its scores would not be nonsense."""
    change, flags = CHANGES[what]
    old, old_base, steps = content("out/masked"), content(base()), MagicMock(wraps=train.loss)  # two a step
    monkeypatch.setattr(train, "loss", steps)
    Path("out/masked-old1").mkdir()  # taken
    with monkeypatch.context() as patch:
        change(patch)
        if what in ("rows", "weights", "model.py"):
            assert what in refusal(evaluation, "out/masked") and not steps.called
        else:
            call(evaluation, "out/masked")
        moved = [line for line in tiny(*flags, name="masked").splitlines() if "-old" in line]
        new, anew = content("out/masked"), steps.call_count
    assert "masked-old2" in moved[0] and content("out/masked-old2") == old
    assert all(what in line for line in moved)
    assert len(moved) == (2 if what in ("rows", "weights", "model.py", "train.py") else 1)
    assert anew == 2 * 6 + (0 if what in ("objective", "lr", "mode") else 2 * 4)
    tiny(name="masked")
    assert steps.call_count == anew and content("out/masked") == old
    tiny("--mode", "ar", name="other")  # which needs the base
    assert steps.call_count == anew + 2 * 6 and content(base()) == old_base
    change(monkeypatch)
    tiny(*flags, name="masked")
    assert steps.call_count == anew + 2 * 6 and content("out/masked") == new
    shown = [line.split()[0] for line in call(evaluation).splitlines()[1:]]
    assert shown == ["diffusion", "masked", "masked-old2", "other"]


def test_what_breaks_a_rule_moves_nothing(runs, monkeypatch):
    """An entry of `WORLDS`, or an objective that draws at random without its generator: each is told in one
    line before the run of another state would move aside."""
    before, command = sorted(Path().rglob("*")), [*TINY, "--name", "masked", "--seed", "1"]
    in_mode("masked", objective=lambda *rows, **_: masked(*rows[:2], None, (0, 1)))(monkeypatch)
    assert re.match("--mode masked: .*`generator`", refusal(train, *command))
    monkeypatch.setitem(WORLDS, "biographies", WORLD._replace(who="Who?"))
    assert "Who?" in refusal(train, *command) and sorted(Path().rglob("*")) == before


def test_one_base_serves_all_arms_and_modes_of_its_kind(monkeypatch):
    """A base depends on nothing of fine-tuning, such as new people's arm, an edit of it, or the objective."""
    bases = {}
    for mode in MODES:
        model = Transformer(settings(), MODES[mode].causal)
        for i, (name, arm) in enumerate([*ARMS.items()]):
            monkeypatch.setitem(ARMS, "none", arm)
            how = settings(mode=mode, paraphrases=name, lr=i / 10, steps=i + 1, batch=[1, 2, 3, i])
            now = evaluation.identity(train.of_base(how), model)
            assert bases.setdefault(MODES[mode].base, now) == now
    assert len({*map(str, bases.values())}) == len(bases) > 1


@pytest.mark.parametrize("finished", (True, False))
def test_a_folder_of_an_older_version_moves_aside(finished):
    """It is not damaged: its settings have other names. It can be compared, but not examined."""
    Path("out/run").mkdir(parents=True)
    result = json.loads((ROOT / ".lab" / "runs.jsonl").read_text(encoding="utf-8").splitlines()[0])
    result["settings"]["batch_size"] = result["settings"].pop("batch")
    torch.save({**result, "model": {}, "log": []}, "out/run/ckpt.pt")
    if finished:
        Path("out/run/result.json").write_text(json.dumps(result), encoding="utf-8")
    assert "older version" in refusal(evaluation, "out/run")
    before = content("out/run")
    assert "batch = None" in tiny() and content("out/run-old1") == before
    shown = [line.split()[0] for line in call(evaluation).splitlines()[1:]]
    assert shown == ["run", "run-old1"][:1 + finished]


def test_a_seventh_attribute_in_a_file_of_its_own():
    """One entry in a world, here from a sixth file, and all else follows: its words become tokens, documents
    tell it, exams ask for it, and the run depends on that file, even if it is started through a link."""
    shutil.copytree(ROOT, "mine", ignore=lambda folder, names: {*names} - {*CODE})
    source = Path("mine/data.py").read_text(encoding="utf-8").replace("import re", "import sixth, re", 1)
    source = source.replace('"work city": ', '"instrument": Attribute(*sixth.new), "work city": ', 1)
    Path("mine/data.py").write_text(source, encoding="utf-8")
    Path("mine/sixth.py").write_text("new = ['Grand Piano', 'Small Drum'], ['plays a'], 'suits', 'plays the'")
    Path("link").symlink_to("mine")
    subprocess.run([sys.executable, "link/train.py", *TINY, "--new", "1", "--name", "run"], check=True)
    result, asked = result_of("out/run"), Path("out/run/answers.jsonl").read_text(encoding="utf-8")
    assert "plays the" in asked and re.search("instrument of [^?]*[?].*(Grand Piano|Small Drum)", asked)
    assert result["items"]["forward"] == len(WORLD.attributes) + 1 and 0 <= result["forward instrument"] <= 1
    assert {"model.py", "train.py", "sixth.py"} == {name for name in result["code"] if name.endswith(".py")}


@pytest.mark.parametrize("name, damage", (
    ("ckpt.pt", "PK"), ("ckpt.pt", [1, 2]), ("ckpt.pt", {"code": {}, "model": {}}),
    ("ckpt.pt", "cbuiltins\nopen\n(Vexecuted\nVw\ntR."), ("result.json", ""), ("result.json", '{"settings"'),
    ("result.json", "[]"), ("result.json", "{}"), ("result.json", '{"settings": {}}')))
def test_a_damaged_file_ends_in_one_line(name, damage, runs):
    """Named by whoever reads it, with what to do; code in it is not run, no base is made again in silence."""
    if name == "ckpt.pt":
        Path("out/masked/result.json").unlink()
    for path in Path("out").rglob(name):
        torch.save(damage, path) if not isinstance(damage, str) else path.write_text(damage)
    other = (train, [*TINY, "--name", "new"]) if name == "ckpt.pt" else (evaluation, [])
    for module, flags in ((train, [*TINY, "--name", "masked"]), (evaluation, ["out/masked"]), other):
        said = refusal(module, *flags)
        assert f"{name} is damaged" in said and "move it away" in said
        assert ("base-ar" in said) == ("new" in flags)
    assert not Path("executed").exists()
