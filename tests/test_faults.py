"""What goes wrong at other people's desks: killed runs, full disks, damaged files, slips of the keyboard. No
work may be lost, no file overwritten, and every refusal is one line that names the culprit and the remedy."""
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from conftest import ROOT, TINY, assert_same_run, bases, call, edit, refusal, stop_after, tiny, unbroken
from data import CANVAS
from diffusion import loss

# A process that has imported everything waits for a line before it trains, and says when it writes a file.
CHILD = """import sys; sys.path.insert(0, sys.argv.pop(1))
import train
train.SAVE_EVERY, write = 1, train.write
train.write = lambda path, content: (print("writes", flush=True), write(path, content))
input()
train.main()"""


def child(*arguments):
    """train.py in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", CHILD, str(ROOT), *arguments], encoding="utf-8",
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})


def test_twenty_kills_cost_no_result():
    """Killed 20 times, each time just as it writes a file or a moment later, and started again each time, a
    run ends with the log and the weights of an unbroken one, bit for bit."""
    flags = [*TINY, "--steps", "120", "--pretrain_steps", "30", "--out_dir"]
    child(*flags, "a/run").communicate("\n")
    bases()[0].unlink()
    moments, steps = random.Random(0), []
    waiting = [child(*flags, "b/run") for _ in range(2)]  # two import while one trains
    for _ in range(20):
        waiting.append(child(*flags, "b/run"))
        process = waiting.pop(0)
        print(file=process.stdin, flush=True)
        writes = moments.randrange(1, 25)  # of 281, as it saves at each step here
        while writes and process.poll() is None:
            writes -= process.stdout.readline() == "writes\n"
        time.sleep(moments.uniform(0, 0.005))
        process.kill()
        process.communicate()
        assert process.returncode != 2  # none was refused
        if Path("b/run/ckpt.pt").exists():
            steps.append(torch.load("b/run/ckpt.pt", weights_only=True)["log"][-1]["step"])
    assert steps == sorted(steps)  # nothing that was saved is ever lost
    assert len({step for step in steps if 0 < step < 120}) >= 5, steps  # it did die all along the way
    for process in waiting:
        process.communicate("\n")
    assert_same_run("a/run", "b/run")


@pytest.mark.parametrize("stopped_at", (3, 13))
@pytest.mark.parametrize("mode, cause, remedy", (("masked", "Ctrl-C", "resumes"),
                                                 ("diffusion", "full disk", "the same command")))
def test_after_a_stop_the_same_command_goes_on(mode, cause, remedy, stopped_at, monkeypatch, capfd):
    """By Ctrl-C or a full disk, in pretraining or fine-tuning: one line, no half-written file, and the same
    command goes on from the old checkpoint and ends where an unbroken run ends."""
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    unbroken("--mode", mode)
    write_bytes = Path.write_bytes

    def half(path, content):
        write_bytes(path, content[:len(content) // 2])
        raise OSError("No space left on device")

    def stop():
        if cause == "Ctrl-C":
            raise KeyboardInterrupt
        patch.setattr(Path, "write_bytes", half)
    with monkeypatch.context() as patch:
        stop_after(stopped_at, patch, stop)
        with pytest.raises(SystemExit) as end:
            tiny(train, "--mode", mode, folder="b/run")
    assert end.value.code == 2 and remedy in capfd.readouterr().err.splitlines()[-1]
    assert not list(Path().rglob("*.tmp"))
    tiny(train, "--mode", mode, folder="b/run")
    assert "is at step" in capfd.readouterr().out
    assert_same_run("a/run", "b/run")


def test_what_is_not_finite_stops_the_run(monkeypatch, capfd):
    """With the step, the last good checkpoint and what to try, before the broken weights are saved."""
    calls = iter(range(100))  # of `loss`: two a step, after eight in pretraining
    monkeypatch.setattr(train, "loss", lambda *batch: loss(*batch) * (math.nan if next(calls) == 14 else 1))
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    with pytest.raises(SystemExit) as stop:
        tiny(train)
    last = capfd.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert "step 4 of fine-tuning" in last and "ckpt.pt" in last and "lower the rates" in last
    saved = torch.load("out/run/ckpt.pt", weights_only=True)
    assert saved["log"][-1]["step"] == 3 and all(torch.isfinite(w).all() for w in saved["model"].values())


@pytest.mark.parametrize("error, remedy", (
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "--batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--batch_size"),
    (MemoryError(), "--batch_size"), (KeyboardInterrupt(), "Ctrl-C"), (PermissionError("ckpt.pt"), "ckpt.pt"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None)), ids=repr)
def test_what_a_person_can_mend_is_said_in_one_line(error, remedy, monkeypatch, capfd):
    """The remedy is what a person needs; a bug keeps its traceback."""
    def fail(**_):
        raise error
    monkeypatch.setattr(train, "make_corpus", fail)
    if remedy:
        assert remedy in refusal(capfd, train, *TINY)
    else:
        with pytest.raises(RuntimeError):
            call(train, *TINY)


TRAIN = """
--mode gpt | --mode AR | --mode | --paraphrases many | --known_paraphrases same | --mask_ratio 1.5
--mask_ratio half | --mask_ratio nan | --known 0 | --known many | --known 1.5 | --known 900000 | --new 1e3
--wordings 11 | --seed -1 | --seed 99999999999999999999 | --n_layer 0 | --n_head 3 | --n_head 64 | --n_embd 17
--steps 0 | --pretrain_steps -1 | --batch_size 1 | --lr -1 | --lr nan | --embed_lr inf | --decay -1
--new_share 2 | --question_share -.1 | --question_share 1 | --optimizer sgd | --device cuda:99
--dtype int8 | --learning_rate 1 | --mask .5 | --out_dir | --out_dir out | --out_dir .
--mask_ratio 0 --mode diffusion | --mask_ratio .5 --mode ar
"""
BAD = [(train, flags.split(), flags.split()[0]) for flags in TRAIN.strip().replace("\n", " | ").split(" | ")]
BAD += [
    (train, ["extra"], "extra"), (train, ["--out_dir", 201 * "x"], "--out_dir"),
    (evaluation, [], "--mode masked"), (evaluation, ["out/no"], "out/no"),
    (evaluation, ["--ask", "Who?"], "one run"), (evaluation, ["--show"], "one run"),
    (evaluation, ["--best"], "--best"), (evaluation, ["a", "b"], "arguments: b"),
    (evaluation, ["--show", "--columns", "flops"], "--columns"), (evaluation, ["--plot", "x.png"], ".svg"),
    (evaluation, ["--plot", ""], ".svg"), (evaluation, ["--plot", "x.svg"], "no finished run"),
    (evaluation, ["--plot", "x.svg", "--show"], "--show"), (evaluation, ["--over", "texts"], "--plot"),
]


@pytest.mark.parametrize("module, flags, culprit", BAD, ids=[f"{m.__name__}{f}" for m, f, _ in BAD])
def test_a_bad_command_ends_in_one_line(module, flags, culprit, capfd):
    """Exit code 2, one line that names the culprit, and nothing written."""
    assert culprit in refusal(capfd, module, *(TINY if module is train else []), *flags)
    assert not Path("out").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run of `masked` and one of `diffusion`, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for mode in ("masked", "diffusion"):
            tiny(train, "--mode", mode, folder=f"out/{mode}")
    return folder


@pytest.fixture
def runs(trained):
    """Those runs in the test's own folder."""
    shutil.copytree(trained / "out", "out")


@pytest.mark.parametrize("flags", (
    ["--lr", ".01"], ["--seed", "1"], ["--known", "7"], ["--steps", "7"], ["--mode", "random_prompt"],
    ["--n_embd", "32"], ["--dtype", "bfloat16"], ["--mask_ratio", ".5"], ["--paraphrases", "name_given"],
    ["--optimizer", "adamw"], ["--pretrain_steps", "5"]), ids=" ".join)
@pytest.mark.parametrize("done", (True, False), ids=("finished", "interrupted"))
def test_settings_that_contradict_a_run_are_refused(flags, done, runs, capfd):
    """Named in one line that offers both ways on, with the run left as it was."""
    if not done:
        Path("out/masked/result.json").unlink()
    before = Path("out/masked/ckpt.pt").read_bytes()
    refused = refusal(capfd, train, *TINY, "--out_dir", "out/masked", *flags)
    assert f"trained with {flags[0][2:]} = " in refused
    assert "--overwrite" in refused and "--out_dir" in refused
    assert Path("out/masked/ckpt.pt").read_bytes() == before


class Attack:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return open, ("executed", "w")


def without(key):
    def damage(path):
        saved = torch.load(path, weights_only=True)
        saved.pop(key)
        torch.save(saved, path)
    return damage


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "other contents": lambda path: torch.save([1, 2], path), "code": lambda path: torch.save(Attack(), path),
    "no settings": without("settings"), "no model": without("model"), "no log": without("log"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_or_base_ends_in_one_line(damage, runs, capfd):
    """Named in one line by both scripts, and told what it lacks; a file that tries to run code is not run,
    and no base is silently trained anew."""
    Path("out/masked/result.json").unlink()
    for path in (Path("out/masked/ckpt.pt"), *bases()):
        DAMAGES[damage](path)
    refusals = [(refusal(capfd, train, *TINY, "--out_dir", "out/masked"), str(Path("out/masked/ckpt.pt"))),
                (refusal(capfd, train, *TINY, "--out_dir", "out/again"), "base-ar")]
    if damage != "no log":  # which nobody needs to ask the model
        refusals.append((refusal(capfd, evaluation, "out/masked", "--show"), "ckpt.pt"))
    for refused, file in refusals:
        assert file in refused
        assert not damage.startswith("no ") or f"lacks {damage[3:]}" in refused
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ("data.py", "model.py", "diffusion.py"))
def test_a_run_of_other_people_or_another_model_is_not_asked(name, runs, monkeypatch, capfd):
    """Its words would be other tokens, its weights of another model."""
    edit(monkeypatch, name, "x = 1\n")
    assert name in refusal(capfd, evaluation, "out/masked", "--show")


@pytest.mark.parametrize("text, reason", (
    ("", "a question"), ("  \n", "a question"), ("Who hates Rome?", "hates"), ("谁", "谁"),
    ("[mask] sings.", "sings"), ("Cur[mask]tis lives", "Cur"), ("*** !", "***"),
    ("Who went to [mask]?", "a question"), ("He went to Reed.", "a question"),
    ("Who? " * 5000, "too many"), ("[mask] " * 500, "too many")))
def test_what_cannot_be_asked_ends_in_one_line(text, reason, runs, capfd):
    """Empty, with a word that this world lacks, or longer than a row."""
    refused = refusal(capfd, evaluation, "out/masked", "--ask", text)
    assert "--ask" in refused and reason in refused


@pytest.mark.parametrize("mode", ("masked", "diffusion"))
def test_show_prints_every_step_and_marks_the_newest_token(mode, runs, capsys):
    """A canvas of four, one token a step: four lines a question, each with one token that stands out. Without
    --ask: a biography out of nothing but blanks, then a question about that person."""
    question = "What is the major of Curtis Chase Emley?"
    call(evaluation, f"out/{mode}", "--show", "--ask", question)
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("___") for line in lines] == [3, 2, 1, 0] and all(question in line for line in lines)
    assert all(line.count(">") == line.count("<") == 1 for line in lines)
    call(evaluation, f"out/{mode}", "--show")
    shown = capsys.readouterr().out
    assert shown.count("[doc]") == shown.split("[question]")[0].count(">") > 30
    assert shown.count("[question]") == CANVAS
