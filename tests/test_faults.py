"""What goes wrong at other people's desks, and what an edit costs: killed runs, full disks, damaged files, slips
of the keyboard, changed code. No work may be lost, and every refusal is one line that names the culprit."""
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import model as model_py
import train
from conftest import (ROOT, TINY, assert_same_run, base, call, edit, log_of, refusal, result_of, settings, tiny,
                      unbroken, watch_loss)
from data import ARMS, WORLDS
from diffusion import MODES, ar, masked
from model import Transformer

WORLD = WORLDS["biographies"]
CODE = "data.py", "model.py", "diffusion.py", "eval.py", "train.py"


def shell(*words):
    """Python in a process of its own, until it ends."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, encoding="utf-8", env=env)


def content(folder):
    """{name: bytes} of the files of a run or base, and {} where there is no folder."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("*")}


# --- Runs that are interrupted

def run_until_killed(connection, flags):
    """In a process of its own: train, save at every step, and say so before each file that is written."""
    write = train.write

    def tell_and_write(path, content):
        connection.send(path.name)
        write(path, content)
    train.write, train.SAVE_EVERY = tell_and_write, 1
    tiny(*flags)


def test_twenty_kills_cost_no_result(monkeypatch):
    """Killed 20 times, in both stages, each time just as it writes a file or a moment later, and started
    again each time, a run ends with the logs and the weights of an unbroken one, bit for bit."""
    flags, moments, steps = ["--steps", "64", "--pretrain_steps", "16"], random.Random(0), []
    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVE_EVERY", 1)
        unbroken(*flags)
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    processes = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    processes.set_forkserver_preload(["torch._inductor", "tiktoken", "pytest"])  # once, not 21 times
    for kills in range(21):
        here, there = processes.Pipe()
        process = processes.Process(target=run_until_killed, args=(there, flags))
        process.start()
        there.close()
        try:
            for _ in range(moments.randrange(1, 14)):  # of 162 files, as it saves at each step here
                here.recv()
            time.sleep(moments.uniform(0, 0.005))
        except EOFError:  # it has finished
            pass
        if kills < 20:
            process.kill()
        process.join()
        assert process.exitcode != 1  # none was refused
        logs = [log_of(folder) for folder in (*Path("out").glob("base-*"), Path("out/run"))
                if (folder / "ckpt.pt").exists()]
        steps.append([log[-1]["step"] for log in logs])
    assert steps == sorted(steps)  # nothing that was saved is ever lost
    assert {len(x) for x in steps[1:-2]} == {1, 2} and len({*map(tuple, steps)}) > 10, steps
    assert_same_run("a/run", "out/run")
    assert_same_run("a/base", base())


@pytest.mark.parametrize("mode, stopped_at", (("masked", 3), ("masked", 13), ("diffusion", 13)))
def test_after_a_full_disk_the_same_command_goes_on(mode, stopped_at, monkeypatch, capfd):
    """In pretraining or fine-tuning, no half of a file is left; the same command goes on from the last
    checkpoint and ends where an unbroken run ends."""
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    unbroken("--mode", mode)
    write_bytes = Path.write_bytes

    def half(path, content):
        if path.name.startswith("ckpt"):
            write_bytes(path, content[:len(content) // 2])
            raise OSError("No space left on device")
        write_bytes(path, content)
    with monkeypatch.context() as patch:
        watch_loss(patch, stopped_at, lambda: patch.setattr(Path, "write_bytes", half))
        with pytest.raises(OSError):
            tiny("--mode", mode)
    capfd.readouterr()
    tiny("--mode", mode)
    assert "is at step" in capfd.readouterr().out
    assert_same_run("a/run", "out/run")
    assert_same_run("a/base", base(mode))


def test_ctrl_c_is_one_line():
    """From a shell: exit code 1 and what to do next, no traceback."""
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['train.py']; import data\n"
            "def stop(_): raise KeyboardInterrupt\n"
            f"data.make_corpus = stop; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')")
    done = shell("-c", code)
    assert done.returncode == 1 and re.fullmatch("[^\n]*the same command[^\n]*", done.stderr.strip())


@pytest.mark.parametrize("factor", (math.nan, math.inf))
def test_what_is_not_finite_stops_the_run(factor, monkeypatch, capfd):
    """With the step and what to try, before broken weights are saved; the checkpoint is that of before."""
    calls, loss = iter(range(100)), train.loss  # two a step, after eight in pretraining
    monkeypatch.setattr(train, "loss", lambda *batch: loss(*batch) * (factor if next(calls) == 14 else 1))
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    said = refusal(capfd, train, *TINY, "--name", "run")
    assert "step 4" in said and str(Path("out/run")) in said and "lower the rates" in said
    saved = torch.load("out/run/ckpt.pt", weights_only=True)
    assert saved["log"][-1]["step"] == 3 and all(torch.isfinite(w).all() for w in saved["model"].values())


# --- Slips of the keyboard

TRAIN = """
--mode gpt | --mode AR | --mode | --paraphrases many | --known_paraphrases same | --world mars
--mask_ratio .5 | --mask_ratio 1.5 1.5 | --mask_ratio half half | --mask_ratio 0 nan | --mask_ratio -.1 1
--mask_ratio 0 0 --mode diffusion | --mask_ratio .5 .5 --mode ar
--known 0 | --known many | --known 1.5 | --new 1e3 | --new 0 | --texts -1 | --seed -1 | --seed 99999999999
--n_layer 0 | --n_head 3 | --n_head 64 | --n_embd 17 | --steps 0 | --pretrain_steps -1
--batch 1 2 3 | --batch 0 0 5 5 | --batch -1 2 3 4 | --batch 4 | --batch 1 2 3 many
--lr -1 | --lr nan | --embed_lr inf | --forget -1 | --embed_forget -inf | --device cuda:99
--learning_rate 1 | --mask .5 | --name | --name a/b | --name ../run | --name .. | --name base-mine | --name über
"""
BAD = [(train, flags.split(), flags.split()[0]) for flags in re.split(r" \| |\n", TRAIN.strip())]
BAD += [(train, ["extra"], "extra"), (train, ["--name", 201 * "x"], "--name"), (train, ["--name", ""], "--name"),
        (train, ["--known", "900000"], "900,004 people"), (train, ["--world", "books", "--known", "900"], "904"),
        (evaluation, [], "no finished run"), (evaluation, ["no"], "no"), (evaluation, ["no/result.json"], "no"),
        (evaluation, ["--ask", "Who?"], "one run"), (evaluation, ["--best"], "--best"),
        (evaluation, ["a", "b"], "arguments: b"), (evaluation, ["--plot", "x.png"], ".svg"),
        (evaluation, ["--plot", ""], ".svg"), (evaluation, ["--plot", "x.svg"], "no finished run"),
        (evaluation, ["--ask", "--plot", "x.svg"], "--plot")]


@pytest.mark.parametrize("module, flags, culprit", BAD, ids=[f"{m.__name__}{f}" for m, f, _ in BAD])
def test_a_bad_command_ends_in_one_line(module, flags, culprit, capfd):
    """Exit code 1 or 2, one line that names the culprit, and nothing is trained or written."""
    assert culprit in refusal(capfd, module, *(TINY if module is train else []), *flags)
    assert not any(path.is_file() for path in Path().rglob("*"))


@pytest.mark.parametrize("text, reason", (
    ("  \n", "a question"), ("Who hates Rome?", "hates"), ("谁", "谁"), ("[mask] sings.", "sings"),
    ("Cur[mask]tis lives", "Cur"), ("*** !", "*"), ("Who went to [mask]?", "a question"),
    ("Who went to Reed", "a question"), ("Who? " * 5000, "too many"), ("[mask] " * 500, "too many")))
def test_what_cannot_be_asked_ends_in_one_line(text, reason, runs, capfd):
    """Empty, with a word that these worlds lack, or longer than a row."""
    said = refusal(capfd, evaluation, "out/masked", "--ask", text)
    assert "--ask" in said and reason in said


# --- What an edit costs

def no_generator(tokens, learned, generator, ratio):
    return masked(tokens, learned, None, (0.2, 0.8))


def test_what_is_refused_moves_nothing(runs, monkeypatch, capfd):
    """A number out of range, an entry of `WORLDS` that breaks a rule, an objective that draws at random
    without its generator: each is told in one line before the run of another state would move aside."""
    before, command = sorted(Path().rglob("*")), [*TINY, "--name", "masked", "--seed", "1"]
    assert "--lr" in refusal(capfd, train, *command, "--lr", "-1")
    with monkeypatch.context() as patch:
        patch.setitem(WORLDS, "biographies", WORLD._replace(who="Who?"))
        assert "Who?" in refusal(capfd, train, *command)
    monkeypatch.setitem(MODES, "masked", MODES["masked"]._replace(objective=no_generator))
    said = refusal(capfd, train, *command)
    assert "--mode masked" in said and "`generator`" in said
    assert sorted(Path().rglob("*")) == before


def said_otherwise(text):
    """Python source with other comments and docstrings."""
    text = re.sub(r'(    """)(?=[A-Z])', r"\1Now otherwise: ", text)
    return text.replace("\n\n", "\n\n# now otherwise\n\n").replace("  # ", "  # Now otherwise: ")


FREE = {
    "the decoder": lambda patch: patch.setitem(MODES, "masked", MODES["masked"]._replace(decode=None)),
    "the exam": lambda patch: patch.setattr(train, "exam", None),
    "the table": lambda patch: patch.setattr(evaluation, "REPORT", evaluation.REPORT[::-1]),
    "another mode": lambda patch: patch.setitem(MODES, "diffusion", MODES["diffusion"]._replace(objective=None)),
    "another world": lambda patch: patch.setitem(WORLDS, "books", None),
    "another arm": lambda patch: patch.setitem(ARMS, "name_last", None),
    "code that does the same": lambda patch: [edit(patch, name) for name in ("data.py", "diffusion.py", "eval.py")],
    "comments and docstrings": lambda patch: [edit(patch, name, said_otherwise) for name in CODE]}


@pytest.mark.parametrize("what", FREE)
def test_an_edit_that_changes_no_training_costs_nothing(what, runs, monkeypatch, capsys):
    """The same command prints the stored result; nothing is trained, written or moved."""
    before = content("out/masked"), sorted(Path().rglob("*"))
    tiny(name="masked")
    printed, steps = capsys.readouterr().out, watch_loss(monkeypatch)
    FREE[what](monkeypatch)
    tiny(name="masked")
    assert sorted(capsys.readouterr().out) == sorted(printed) and not steps
    assert (content("out/masked"), sorted(Path().rglob("*"))) == before


def test_comments_and_docstrings_are_no_code():
    """What is left of a source is its statements, with their indentation: a "#" in quotes is no comment."""
    one = 'def f(x):\n    if x:\n        y = "#1"\n    return y\n'
    same = ('def f(x):  # so\n    """Why?\n\n    "So"."""\n\n    if x:   \n        y = "#1"  # it\'s "1"\n    return y')
    assert evaluation.statements(one) == evaluation.statements(same)
    for other in (one.replace("#1", "#2"), one.replace("    return", "        return"), one + "f(1)\n"):
        assert evaluation.statements(other) != evaluation.statements(one)


COSTLY = {"objective": lambda patch: patch.setitem(MODES, "masked", MODES["masked"]._replace(objective=(
              lambda tokens, learned, generator, ratio: ar(tokens, learned)))),
          "rows": lambda patch: patch.setitem(WORLD.attributes, "major", WORLD.attributes["major"]._replace(clue="joined")),
          "weights": lambda patch: patch.setattr(model_py, "Block", Deeper),
          "model.py": lambda patch: edit(patch, "model.py"), "train.py": lambda patch: edit(patch, "train.py")}


class Deeper(model_py.Block):
    """A block with one more matrix."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.more = torch.nn.Linear(2, 2, bias=False)

    def mlp(self, x):
        return super().mlp(x) + 0 * self.more.weight.sum()


@pytest.mark.parametrize("what", COSTLY)
def test_an_edit_that_matters_trains_anew_and_undone_costs_nothing(what, runs, monkeypatch, capsys):
    """The run before moves aside, and the base if it is concerned, too; one line each says which part is other.
    Undo the edit, and both are taken back; do it again, and so is the new run."""
    old = content("out/masked"), content(base())
    Path("out/masked-old1").mkdir()  # taken
    steps, of_base = watch_loss(monkeypatch), 0 if what == "objective" else 2 * 4
    capsys.readouterr()
    with monkeypatch.context() as patch:
        COSTLY[what](patch)
        tiny(name="masked")
        said, new = capsys.readouterr().out.splitlines(), content("out/masked")
        moved = [line for line in said if "-old" in line]
        assert len(moved) == 1 + bool(of_base) and all(what in line for line in moved)
        assert "out/masked-old2" in moved[0].replace("\\", "/") and content("out/masked-old2") == old[0]
        assert len(steps) == 2 * 6 + of_base and (content(base()) == old[1]) == (not of_base)
    steps.clear()
    tiny(name="masked")
    assert not steps and content("out/masked") == old[0] and "out/masked again" in capsys.readouterr().out
    tiny("--mode", "ar", name="other")  # which needs the base
    assert len(steps) == 2 * 6 and content(base()) == old[1]
    COSTLY[what](monkeypatch)
    tiny(name="masked")
    assert len(steps) == 2 * 6 and content("out/masked") == new


@pytest.mark.parametrize("flags, done", (
    (["--lr", ".01"], True), (["--lr", ".01"], False), (["--seed", "1"], True), (["--known", "7"], False),
    (["--mode", "diffusion"], True), (["--batch", "4", "9", "2", "2"], False), (["--pretrain_steps", "5"], True)))
def test_a_run_of_other_settings_moves_aside(flags, done, runs, capsys):
    """One line names the setting and the new place; the old files are as they were, the new run starts at
    step 0, and the comparison shows whatever is finished."""
    if not done:
        Path("out/masked/result.json").unlink()
    before = content("out/masked")
    capsys.readouterr()
    tiny(*flags, name="masked")
    said = capsys.readouterr().out.splitlines()[0]
    assert f"{flags[0][2:]} = " in said and "masked-old1" in said and content("out/masked-old1") == before
    assert content("out/masked").keys() == {"ckpt.pt", "log.jsonl", "answers.jsonl", "result.json"}
    call(evaluation)
    rows = [line.split()[::2][:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["diffusion", "1"], ["masked", "1"], ["masked-old1", "1"]][:2 + done]


def test_one_base_serves_all_arms_and_modes_of_its_kind():
    """What a base depends on is neither the arm of new people nor how their texts will be learned, nor what
    else is of fine-tuning."""
    bases = {}
    for mode in MODES:
        model = Transformer(settings(), MODES[mode].causal)
        for flags in [{"paraphrases": arm} for arm in ARMS] + [{"lr": 0.1, "steps": 9, "batch": [1, 2, 3, 4]}]:
            now = evaluation.identity(train.of_base(settings(mode=mode, **flags)), model)
            assert bases.setdefault(MODES[mode].base, now) == now
    assert len({str(now) for now in bases.values()}) == len(bases) >= 2


@pytest.mark.parametrize("what", ("model.py", "rows", "weights"))
def test_a_model_is_not_examined_where_its_scores_would_be_nonsense(what, runs, monkeypatch, capfd):
    """Another model.py, other weights or other rows: one line names which."""
    COSTLY[what](monkeypatch)
    for flags in ([], ["--ask"], ["--plot", "x.svg"]):
        said = refusal(capfd, evaluation, "out/masked", *flags)
        assert what in said and str(Path("out/masked/ckpt.pt")) in said


def test_todays_exam_stands_beside_the_stored_scores(runs, monkeypatch, capsys):
    """A stored model is examined with today's exam and decoders: an edit of one needs no training, and nothing
    is overwritten. Here the exam is given in a language that the model knows by heart."""
    before = content("out/masked")
    monkeypatch.setattr(evaluation, "until_end", lambda text: "")
    call(evaluation, "out/masked")
    now, stored = zip(*re.findall(r" \d+ +(\d\.\d\d) +█* +(\d\.\d\d) ", capsys.readouterr().out))
    assert {*now} == {"1.00"} and {*stored} == {"0.00"} and len(now) == 6
    assert content("out/masked") == before


def test_a_folder_of_an_older_version_moves_aside(capfd):
    """It is not damaged: its settings and code have other names. It can be compared, but not examined."""
    first = (ROOT / ".lab" / "runs.jsonl").read_text(encoding="utf-8").splitlines()[0]
    for folder in ("out/run", "out/finished"):
        Path(folder).mkdir(parents=True)
        torch.save({**json.loads(first), "model": {}, "log": []}, f"{folder}/ckpt.pt")
    Path("out/finished/result.json").write_text(first, encoding="utf-8")
    assert "older version" in refusal(capfd, evaluation, "out/run")
    for name in ("run", "finished"):
        before = content(f"out/{name}")
        tiny(name=name)
        assert "train.py" in capfd.readouterr().out and content(f"out/{name}-old1") == before
    call(evaluation)
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()[1:]] == [
        "finished", "finished-old1", "run"]


def test_a_seventh_attribute_in_a_file_of_its_own():
    """One entry in a world, here from a sixth file, and all else follows: its words become tokens, documents
    tell it, exams ask for it. The sixth file is part of what the run depends on. Started through a link, as
    here, or in any other way, a script finds the code of all files."""
    Path("mine").mkdir()
    for name in CODE:
        shutil.copy(ROOT / name, "mine")
    source = (ROOT / "data.py").read_text(encoding="utf-8").replace("import re", "import pets\nimport re", 1)
    source = source.replace('"work city": ', '"pet": Attribute(*pets.pet), "work city": ', 1)
    Path("mine/data.py").write_text(source, encoding="utf-8")
    Path("mine/pets.py").write_text("pet = ['Sea Otter', 'Grey Parrot'], ['has a'], 'belongs to', 'walks a'")
    Path("link").symlink_to("mine")
    done = shell("link/train.py", *TINY, "--new", "1", "--name", "run")
    assert done.returncode == 0, done.stderr
    result, asked = result_of("out/run"), Path("out/run/answers.jsonl").read_text(encoding="utf-8")
    assert "walks a" in asked and re.search("pet of [^?]*[?].*(Sea Otter|Grey Parrot)", asked)
    assert result["items"]["forward"] == len(WORLD.attributes) + 1 and 0 <= result["forward pet"] <= 1
    assert {"model.py", "train.py", "pets.py"} == {name for name in result["code"] if name.endswith(".py")}


# --- Damaged files

class Attack:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("damage", (None, [1, 2], Attack(), {"code": {}, "model": {}}), ids=str)
def test_a_damaged_checkpoint_or_base_ends_in_one_line(damage, runs, capfd):
    """Named by both scripts, with what to do; a file that tries to run code is not run, and no base is
    silently trained anew."""
    Path("out/masked/result.json").unlink()
    for path in Path("out").rglob("ckpt.pt"):
        torch.save(damage, path) if damage else path.write_bytes(path.read_bytes()[:1000])
    for module, flags, file in ((train, [*TINY, "--name", "masked"], "masked"),
                                (train, [*TINY, "--name", "again"], "base-ar"),
                                (evaluation, ["out/masked", "--ask"], "masked")):
        said = refusal(capfd, module, *flags)
        assert file in said and "ckpt.pt is damaged" in said and "move it away" in said
    assert not Path("executed").exists()


@pytest.mark.parametrize("damage", ("", '{"settings"', "[]", "{}", '{"settings": 3}', '{"settings": {}}'))
def test_a_damaged_result_ends_in_one_line(damage, runs, capfd):
    """The comparison names the file instead of leaving the run out, and so does a training of that name."""
    path = Path("out/masked/result.json")
    path.write_text(damage, encoding="utf-8")
    for module, flags in ((evaluation, []), (train, [*TINY, "--name", "masked"])):
        assert str(path) in refusal(capfd, module, *flags)
