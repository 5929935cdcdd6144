"""What goes wrong at other people's desks: killed runs, full disks, damaged files, edits, slips of the
keyboard. No work may be lost, no file overwritten, and every refusal is one line that names the culprit."""
import json
import math
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
import train
from conftest import (ROOT, TINY, assert_same_run, bases, call, edit, refusal, result_of, same_weights,
                      stop_after, tiny, unbroken)
from data import CANVAS
from diffusion import loss

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
COPY = "data.py", "model.py", "diffusion.py", "eval.py", "train.py"

# A process that has imported everything waits for a line before it trains, and says when it writes a file.
CHILD = """import sys; sys.path.insert(0, sys.argv.pop(1))
import train
train.SAVE_EVERY, write = 1, train.write
train.write = lambda path, content: (print("writes", flush=True), write(path, content))
input()
train.main()"""


def child(*arguments):
    """train.py in a process of its own."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    words = [sys.executable, "-c", CHILD, str(ROOT), *arguments]
    return subprocess.Popen(words, encoding="utf-8", env=ENV, **pipes)


def shell(*words):
    """Python in a process of its own, until it ends."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, encoding="utf-8", env=ENV)


def test_twenty_kills_cost_no_result():
    """Killed 20 times, in both stages, each time just as it writes a file or a moment later, and started
    again each time, a run ends with the logs and the weights of an unbroken one, bit for bit."""
    flags = [*TINY, "--steps", "120", "--pretrain_steps", "30", "--out_dir"]
    child(*flags, "a/run").communicate("\n")
    shutil.move(bases()[0], "a/base")
    moments, steps = random.Random(0), []
    waiting = [child(*flags, "b/run") for _ in range(2)]  # two import while one trains
    for _ in range(20):
        waiting.append(child(*flags, "b/run"))
        process = waiting.pop(0)
        print(file=process.stdin, flush=True)
        writes = moments.randrange(1, 25)  # of 307, as it saves at each step here
        while writes and process.poll() is None:
            writes -= process.stdout.readline() == "writes\n"
        time.sleep(moments.uniform(0, 0.005))
        process.kill()
        process.communicate()
        assert process.returncode not in (1, 2)  # none was refused
        paths = [bases()[0] / "ckpt.pt" if bases() else Path("none"), Path("b/run/ckpt.pt")]
        steps.append([torch.load(path, weights_only=True)["log"][-1]["step"] if path.exists() else 0
                      for path in paths])
    assert steps == sorted(steps)  # nothing that was saved is ever lost
    assert any(0 < base < 30 for base, _ in steps) and len({x for _, x in steps if 0 < x < 120}) >= 4, steps
    for process in waiting:
        process.communicate("\n")
    assert_same_run("a/run", "b/run")
    assert_same_run("a/base", bases()[0])


@pytest.mark.parametrize("stopped_at", (3, 13))
@pytest.mark.parametrize("mode", ("masked", "diffusion"))
def test_after_a_full_disk_the_same_command_goes_on(mode, stopped_at, monkeypatch, capfd):
    """In pretraining or fine-tuning, no half of a file is left; the same command goes on from the last
    checkpoint and ends where an unbroken run ends."""
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    unbroken("--mode", mode)
    write_bytes = Path.write_bytes

    def half(path, content):
        write_bytes(path, content[:len(content) // 2] if path.name.startswith("ckpt") else content)
        if path.name.startswith("ckpt"):
            raise OSError("No space left on device")
    with monkeypatch.context() as patch:
        stop_after(stopped_at, patch, lambda: patch.setattr(Path, "write_bytes", half))
        with pytest.raises(OSError):
            tiny("--mode", mode, folder="b/run")
    assert not list(Path().rglob("*.tmp"))
    capfd.readouterr()
    tiny("--mode", mode, folder="b/run")
    assert "is at step" in capfd.readouterr().out
    assert_same_run("a/run", "b/run")
    assert_same_run("a/base", bases()[0])


def test_ctrl_c_is_one_line():
    """From a shell: exit code 1 and what to do next, no traceback."""
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['train.py']; import data\n"
            "def stop(_): raise KeyboardInterrupt\n"
            f"data.make_corpus = stop; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')")
    done = shell("-c", code)
    assert done.returncode == 1 and re.fullmatch("[^\n]*the same command[^\n]*", done.stderr.strip())


def test_what_is_not_finite_stops_the_run(monkeypatch, capfd):
    """With the step and what to try, before broken weights are saved; the checkpoint is that of before."""
    calls = iter(range(100))  # of `loss`: two a step, after eight in pretraining
    monkeypatch.setattr(train, "loss", lambda *batch: loss(*batch) * (math.nan if next(calls) == 14 else 1))
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    said = refusal(capfd, train, *TINY, "--out_dir", "out/run")
    assert "step 4 of fine-tuning" in said and "out/run" in said and "lower the rates" in said
    saved = torch.load("out/run/ckpt.pt", weights_only=True)
    assert saved["log"][-1]["step"] == 3 and all(torch.isfinite(w).all() for w in saved["model"].values())


TRAIN = """
--mode gpt | --mode AR | --mode | --paraphrases many | --known_paraphrases same | --world mars
--mask_ratio .5 | --mask_ratio 1.5 1.5 | --mask_ratio half half | --mask_ratio 0 nan | --mask_ratio -.1 1
--known 0 | --known many | --known 1.5 | --known 900000 | --new 1e3 | --new 0 | --texts -1
--wordings 11 | --seed -1 | --seed 99999999999999999999 | --n_layer 0 | --n_head 3 | --n_head 64 | --n_embd 17
--steps 0 | --pretrain_steps -1 | --batch_size 1 | --lr -1 | --lr nan | --embed_lr inf | --forget -1
--new_share 2 | --question_share -.1 | --question_share 1 | --backward_share 2 | --optimizer sgd
--device cuda:99 | --dtype int8 | --learning_rate 1 | --mask .5 | --out_dir | --out_dir out | --out_dir .
--mask_ratio 0 0 --mode diffusion | --mask_ratio .5 .5 --mode ar
--mask_ratio .5 .5 --mode random_prompt
"""
BAD = [(train, flags.split(), flags.split()[0]) for flags in re.split(r" \| |\n", TRAIN.strip())]
BAD += [
    (train, ["extra"], "extra"), (train, ["--out_dir", 201 * "x"], "--out_dir"),
    (train, ["--out_dir", "out/base-mine"], "--out_dir"),
    (train, ["--world", "books", "--known", "900"], "904 people"),
    (evaluation, [], "--mode masked"), (evaluation, ["no"], "no"), (evaluation, ["no.jsonl"], "no.jsonl"),
    (evaluation, ["--ask", "Who?"], "one run"), (evaluation, ["--exam"], "one run"),
    (evaluation, ["--best"], "--best"), (evaluation, ["a", "b"], "arguments: b"),
    (evaluation, ["--plot", "x.png"], ".svg"), (evaluation, ["--plot", ""], ".svg"),
    (evaluation, ["--plot", "x.svg"], "no finished run"), (evaluation, ["--over", "texts"], "--plot"),
    (evaluation, ["--plot", "x.svg", "--exam"], "--exam"), (evaluation, ["--ask", "--exam"], "--exam"),
]


@pytest.mark.parametrize("module, flags, culprit", BAD, ids=[f"{m.__name__}{f}" for m, f, _ in BAD])
def test_a_bad_command_ends_in_one_line(module, flags, culprit, capfd):
    """Exit code 1 or 2, one line that names the culprit, and nothing is trained or written."""
    assert culprit in refusal(capfd, module, *(TINY if module is train else []), *flags)
    assert not any(path.is_file() for path in Path().rglob("*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run of `masked` and one of `diffusion`, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        for mode in ("masked", "diffusion"):
            tiny("--mode", mode, folder=f"out/{mode}")
        return Path.cwd()


@pytest.fixture
def runs(trained):
    """Those runs in the test's own folder."""
    shutil.copytree(trained / "out", "out")


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def rows(capsys):
    """The first two columns of the comparison."""
    capsys.readouterr()
    call(evaluation)
    return [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]


@pytest.mark.parametrize("flags", (
    ["--lr", ".01"], ["--seed", "1"], ["--known", "7"], ["--mode", "random_prompt"], ["--n_embd", "32"],
    ["--mask_ratio", ".5", ".5"], ["--pretrain_steps", "5"]), ids=" ".join)
@pytest.mark.parametrize("done", (True, False), ids=("finished", "interrupted"))
def test_a_run_of_other_settings_moves_aside(flags, done, runs, capsys):
    """One line names the setting and the new place; the old files are as they were, the new run starts at
    step 0, and the comparison shows whatever is finished."""
    if not done:
        Path("out/masked/result.json").unlink()
    before = content("out/masked")
    capsys.readouterr()
    tiny(*flags, folder="out/masked")
    said = capsys.readouterr().out.splitlines()[0]
    assert f"{flags[0][2:]} = " in said and "out/masked-1" in said and content("out/masked-1") == before
    assert content("out/masked").keys() == {"ckpt.pt", "log.jsonl", "answers.jsonl", "result.json"}
    shown = [["diffusion", "1"], ["masked", "1"], ["masked-1", "1"]][:2 + done]
    seeds = [["diffusion", "1"], ["masked", str(1 + done)]]  # which are one row
    assert rows(capsys) == (seeds if flags[0] == "--seed" else shown)


@pytest.mark.parametrize("name", COPY)
def test_after_an_edit_the_same_command_trains_anew(name, monkeypatch, capsys):
    """With other code the same command is another run: the old one moves to the next free number, and the
    comparison shows both, never averaged. A base is a cache and made again, but for eval.py, which it does
    not use. Then the new code is the state of things: the same command prints the same table."""
    tiny()
    before, base = content("out/run"), content(bases()[0])
    Path("out/run-1").mkdir()  # taken
    edit(monkeypatch, name)
    capsys.readouterr()
    tiny()
    said = capsys.readouterr().out
    assert name in said and "out/run-2" in said and content("out/run-2") == before
    assert ("pretraining again" in said) == (content(bases()[0]) != base) == (name != "eval.py")
    assert same_weights("out/run", "out/run-2")  # that edit did nothing
    now, calls = content("out/run"), stop_after(99, monkeypatch, None)
    tiny()
    assert said.endswith(capsys.readouterr().out) and not calls and content("out/run") == now
    assert rows(capsys) == [["run", "1"], ["run-2", "1"]]


def test_a_seventh_attribute_in_a_file_of_its_own():
    """One entry in a world, here from a sixth file, and all else follows: its words become tokens, documents
    tell it, exams ask for it. The sixth file is part of the run's identity. Started through a link, as here,
    or in any other way, a script finds the code of all files."""
    Path("mine").mkdir()
    for name in COPY:
        shutil.copy(ROOT / name, "mine")
    source = (ROOT / "data.py").read_text(encoding="utf-8").replace("import re", "import pets\nimport re", 1)
    source = source.replace('"work city": ', '"pet": Attribute(*pets.pet), "work city": ', 1)
    Path("mine/data.py").write_text(source, encoding="utf-8")
    Path("mine/pets.py").write_text("pet = ['Sea Otter', 'Grey Parrot'], ['has a'], 'belongs to', 'walks a'")
    Path("link").symlink_to("mine")
    done = shell("link/train.py", *TINY, "--new", "1", "--out_dir", "out/run")
    assert done.returncode == 0, done.stderr
    result, asked = result_of("out/run"), Path("out/run/answers.jsonl").read_text(encoding="utf-8")
    assert "walks a" in asked and re.search("pet of [^?]*[?].*(Sea Otter|Grey Parrot)", asked)
    assert result["items"]["forward"] == 7 and 0 <= result["forward pet"] <= 1
    assert {*COPY, "pets.py"} <= result["code"].keys()


class Attack:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("content", (None, [1, 2], Attack(), {"code": {}, "model": {}}), ids=str)
def test_a_damaged_checkpoint_or_base_ends_in_one_line(content, runs, capfd):
    """Named by both scripts, with what to do; a file that tries to run code is not run, and no base is
    silently trained anew."""
    Path("out/masked/result.json").unlink()
    for path in Path("out").rglob("ckpt.pt"):
        torch.save(content, path) if content else path.write_bytes(path.read_bytes()[:1000])
    for module, flags, file in ((train, [*TINY, "--out_dir", "out/masked"], "masked"),
                                (train, [*TINY, "--out_dir", "out/again"], "base-ar"),
                                (evaluation, ["out/masked", "--ask"], "masked")):
        said = refusal(capfd, module, *flags)
        assert file in said and "ckpt.pt is damaged" in said and "move it away" in said
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", ("", '{"settings"', "[]", "{}", '{"settings": 3}', '{"settings": {}}'))
def test_a_damaged_result_ends_in_one_line(content, runs, capfd):
    """The comparison names the file instead of leaving the run out, and so does a training of that name. A
    file of results is named, too, wherever the slip is."""
    path = Path("out/masked/result.json")
    good = json.dumps({"name": "masked"} | result_of("out/masked"))
    path.write_text(content, encoding="utf-8")
    for module, flags in ((evaluation, []), (train, [*TINY, "--out_dir", "out/masked"])):
        assert str(path) in refusal(capfd, module, *flags)
    Path("mine.jsonl").write_text(f"{good}\n{content}\n" if content else "", encoding="utf-8")
    assert "mine.jsonl" in refusal(capfd, evaluation, "mine.jsonl")


@pytest.mark.parametrize("name", COPY)
def test_decoding_is_not_training(name, runs, monkeypatch, capfd):
    """A stored model is examined and asked with today's decoders: an edit of one needs no training. One line
    names the file, then comes the table of the run, and nothing is written. But other people's words would be
    other tokens, and another model has other weights: those edits are refused."""
    before = content("out/masked")
    call(evaluation, "out/masked")
    of_run = capfd.readouterr().out
    edit(monkeypatch, name)
    for flag in ("--exam", "--ask"):
        if name in ("data.py", "model.py"):
            assert name in refusal(capfd, evaluation, "out/masked", flag)
            continue
        call(evaluation, "out/masked", flag)
        first, _, rest = capfd.readouterr().out.partition("\n")
        scores = [re.findall(r"  (\d+  \d\.\d\d) ", table) for table in (rest, of_run)]
        assert name in first and (flag == "--ask" or scores[0] == scores[1] and len(scores[0]) == 7)
    assert content("out/masked") == before


@pytest.mark.parametrize("text, reason", (
    ("  \n", "a question"), ("Who hates Rome?", "hates"), ("谁", "谁"), ("[mask] sings.", "sings"),
    ("Cur[mask]tis lives", "Cur"), ("*** !", "***"), ("Who went to [mask]?", "a question"),
    ("He went to Reed.", "a question"), ("Who? " * 5000, "too many"), ("[mask] " * 500, "too many")))
def test_what_cannot_be_asked_ends_in_one_line(text, reason, runs, capfd):
    """Empty, with a word that these worlds lack, or longer than a row."""
    said = refusal(capfd, evaluation, "out/masked", "--ask", text)
    assert "--ask" in said and reason in said


@pytest.mark.parametrize("mode", ("masked", "diffusion"))
def test_ask_shows_every_step_and_marks_the_newest_token(mode, runs, monkeypatch, capsys):
    """A canvas of four, one token a step: four lines, each with one token that stands out, then the answer.
    Without TEXT: a biography, of which the name is given, then a question about that person. Whoever changes
    `surest` sees two tokens a step."""
    question = "What is the major of Curtis Chase Emley?"
    call(evaluation, f"out/{mode}", "--ask", question)
    *lines, answer = capsys.readouterr().out.splitlines()
    assert [line.count("___") for line in lines] == [3, 2, 1, 0] and all(question in line for line in lines)
    assert all(line.count(">") == line.count("<") == 1 for line in lines) and ">" not in answer
    call(evaluation, f"out/{mode}", "--ask")
    shown = capsys.readouterr().out
    assert "_" not in "".join(shown.split()[:4])  # [doc] and the name
    assert shown.count("[doc]") == shown.split("[question]")[0].count(">") > 30
    assert shown.count("[question]") == CANVAS
    two = lambda p: torch.zeros_like(p).scatter(1, p.topk(2).indices, 1).bool()
    monkeypatch.setattr("diffusion.surest", two)
    call(evaluation, "out/diffusion", "--ask", question)
    assert [line.count(">") for line in capsys.readouterr().out.splitlines()] == [2, 2, 0]
