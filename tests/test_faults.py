"""What goes wrong at other people's desks: killed runs, full disks, damaged files, slips of the keyboard. No
work may be lost, no file overwritten, and every refusal is one line that names the culprit and the remedy."""
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import train
from conftest import ROOT, TINY, assert_same_run, call, refusal, stop_after, tiny, unbroken
from diffusion import loss
from model import Transformer

CHILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); import train; train.SAVE_EVERY = 0; " \
        "print('ready', flush=True); train.main()"


def child(code, *arguments):
    """train.py in a process of its own, at the moment when it has imported everything and starts."""
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT), *arguments], encoding="utf-8",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})
    assert process.stdout.readline() == "ready\n"
    return process


def test_twenty_kills_cost_no_result():
    """Killed 20 times at random moments, often while it writes, for it saves at each step here, and resumed
    each time, a run ends with the log and the weights of an unbroken one, bit for bit."""
    flags = [*TINY, "--steps", "300", "--school_steps", "60", "--resume", "--out_dir"]
    process, clock = child(CHILD, *flags, "a/run"), time.perf_counter()
    process.communicate()
    length = time.perf_counter() - clock
    shutil.rmtree("out/bases")
    moments, steps = random.Random(0), []
    for _ in range(20):
        process = child(CHILD, *flags, "b/run")
        time.sleep(moments.uniform(0, length / 3))
        process.kill()
        process.communicate()
        assert process.returncode != 2  # none was refused
        if Path("b/run/ckpt.pt").exists():
            steps.append(torch.load("b/run/ckpt.pt", weights_only=True)["step"])
    assert steps == sorted(steps)  # nothing that was saved is ever lost
    assert len({step for step in steps if 0 < step < 300}) >= 5, steps  # it did die all along the way
    child(CHILD, *flags, "b/run").communicate()
    assert_same_run("a/run", "b/run")
    assert {path.name for path in Path("b/run").iterdir()} == {"ckpt.pt", "log.jsonl", "result.json", "lock"}


def test_a_full_disk_keeps_the_old_checkpoint(monkeypatch):
    """A real limit on file sizes stands for the full disk: one line, exit code 2, and once there is room the
    run goes on from the checkpoint that stood there to the end of an unbroken one."""
    pytest.importorskip("resource", reason="this system cannot limit the size of files")
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
    unbroken()
    stop_after(7, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):
        tiny(train, folder="b/run")
    before = Path("b/run/ckpt.pt").read_bytes()
    process = child(limit + CHILD, *TINY, "--out_dir", "b/run", "--resume")
    _, error = process.communicate()
    last = error.strip().splitlines()[-1]
    assert process.returncode == 2 and "ckpt.pt could not be written" in last and "--resume" in last, error
    assert Path("b/run/ckpt.pt").read_bytes() == before and not list(Path("b/run").glob("*.tmp"))
    tiny(train, "--resume", folder="b/run")
    assert_same_run("a/run", "b/run")


def test_a_second_run_in_the_same_folder_is_refused(capfd):
    """The first one holds a lock that the system lets go of however the process ends."""
    with train.lock(Path("out/run")):
        assert "another run" in refusal(capfd, train, *TINY, "--out_dir", "out/run")
    tiny(train)


def test_files_of_others_are_left_alone(capfd):
    """A run removes what it left behind itself and nothing else; a result without its checkpoint is neither
    overwritten nor taken for the result of a new run."""
    Path("out/run").mkdir(parents=True)
    for name in ("notes.tmp", "ckpt.pt.1.tmp"):
        Path("out/run", name).touch()
    tiny(train)
    assert Path("out/run/notes.tmp").exists() and not Path("out/run/ckpt.pt.1.tmp").exists()
    Path("out/run/ckpt.pt").unlink()
    before = Path("out/run/result.json").read_bytes()
    flags = "--out_dir", "out/run", "--mode", "diffusion", "--resume"
    assert "result.json" in refusal(capfd, train, *TINY, *flags)
    assert Path("out/run/result.json").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch, capfd):
    """Because a file stands in the way, or because the system forbids it."""
    Path("file").write_text("a file", encoding="utf-8")
    assert "file" in refusal(capfd, train, *TINY, "--out_dir", "file/run")
    assert "file" in refusal(capfd, train, *TINY, "--out_dir", "file")

    def forbid(*_, **__):
        raise sqlite3.OperationalError("attempt to write a readonly database")
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", forbid)
        assert "readonly" in refusal(capfd, train, *TINY, "--out_dir", "out/run")
    Path("out/other").mkdir(parents=True)
    Path("out/other/lock").write_text("no database " * 100, encoding="utf-8")
    assert "other" in refusal(capfd, train, *TINY, "--out_dir", "out/other")


@pytest.mark.parametrize("broken", ("loss", "weights"))
def test_what_is_not_finite_stops_the_run(broken, monkeypatch, capfd):
    """With the step, the last good checkpoint and what to try, before the broken weights are saved. The
    square root of zero is a number, but its gradient is none: that is noticed too."""
    steps = iter(range(10))
    bad = math.nan if broken == "loss" else 0

    def step(model, *batch):
        value, now = loss(model, *batch), next(steps) == 7
        return value + (model.embed.weight[0, 0] * bad).sqrt() if now else value
    monkeypatch.setattr(train, "loss", step)
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    with pytest.raises(SystemExit) as stop:
        tiny(train)
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "at step 3 of reading" in last and "ckpt.pt" in last and "--lr" in last
    saved = torch.load("out/run/ckpt.pt", weights_only=True)
    assert saved["step"] <= 3 and all(torch.isfinite(w).all() for w in saved["model"].values())


@pytest.mark.parametrize("error, remedy", (
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "--batch_size"),
    (MemoryError(), "--batch_size"), (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "--batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--batch_size"),
    (KeyboardInterrupt(), "Ctrl-C"), (PermissionError("ckpt.pt"), "ckpt.pt"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None)), ids=repr)
def test_what_a_person_can_mend_is_said_in_one_line(error, remedy, monkeypatch, capfd):
    """Where PyTorch shows a stack of C++, the remedy is what a person needs; a bug keeps its traceback."""
    def fail(*_):
        raise error
    monkeypatch.setattr(Transformer, "__init__", fail)
    if remedy:
        assert remedy in refusal(capfd, train, *TINY)
    else:
        with pytest.raises(RuntimeError):
            call(train, *TINY)


def test_compile_without_a_compiler_is_refused(monkeypatch, capfd):
    """It is the one flag that needs a program which PyTorch does not bring along."""
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(SystemExit) as stop:
        tiny(train, "--compile")
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "--compile" in last and "leave it out" in last


# -- slips of the keyboard ---------------------------------------------------

TRAIN = """
--mode gpt | --mode AR | --mode | --paraphrases many | --paraphrases None | --mask_ratio 1.5
--mask_ratio -.1 | --mask_ratio half | --mask_ratio nan | --mask_ratio inf | --mask_ratio Uniform | --known 0
--known -5
--known many | --known 1.5 | --known 900000 | --new 0 | --new -3 | --new 1e3 | --wordings 0 | --wordings 11
--wordings two | --seed -1 | --seed x | --seed 99999999999999999999 | --n_layer 0 | --n_layer -2
--n_layer 2.5 | --n_head 0 | --n_head 3 | --n_head 64 | --n_embd 1 | --n_embd 12.5 | --n_embd 17
--n_embd 99999999 | --steps 0 | --steps -1 | --steps 1e3 | --school_steps -1 | --school_steps all
--batch_size 1 | --batch_size 0 | --batch_size 8.0 | --batch_size x | --lr -1 | --lr nan | --lr inf
--lr high | --optimizer sgd | --optimizer Muon
--device abacus | --device cuda:99 | --device meta | --device | --dtype int8 | --dtype float16
--learning_rate 1 | --mask .5 | --out_dir | --reading_rate 2 | --reading_rate -1 | --reading_rate slow
"""
BAD = [(train, flags.split(), flags.split()[0]) for flags in TRAIN.strip().replace("\n", " | ").split(" | ")]
BAD += [
    (train, ["extra"], "extra"), (train, ["--out_dir", ""], "--out_dir"),
    (train, ["--mode", "diffusion", "--mask_ratio", "0"], "--mask_ratio"),
    (train, ["--mode", "ar", "--mask_ratio", ".5"], "--mask_ratio"),
    (evaluation, [], "--mode masked"), (evaluation, ["--costs"], "--mode masked"),
    (evaluation, ["out/no"], "ckpt.pt is missing"),
    (evaluation, ["nowhere"], "nowhere"), (evaluation, ["--ask", "Who?"], "one run"),
    (evaluation, ["--show"], "one run"), (evaluation, ["--best"], "--best"),
    (evaluation, ["a", "b"], "arguments: b"),
    (data, ["--seed", "x"], "--seed"), (data, ["--people", "3"], "--people"),
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
    ["--lr", ".01"], ["--seed", "1"], ["--known", "7"], ["--steps", "7"], ["--mode", "noise"],
    ["--n_embd", "32"], ["--dtype", "bfloat16"], ["--mask_ratio", ".5"], ["--paraphrases", "given"],
    ["--compile"], ["--no_replay"], ["--optimizer", "adamw"]), ids=" ".join)
def test_settings_that_contradict_a_checkpoint_are_refused(flags, runs, capfd):
    """Named in one line, with the run left as it was; nor does a run without --resume overwrite it."""
    before = Path("out/masked/ckpt.pt").read_bytes()
    refused = refusal(capfd, train, *TINY, "--out_dir", "out/masked", "--resume", *flags)
    assert f"trained with {flags[0][2:]} = " in refused
    assert "--resume" in refusal(capfd, train, *TINY, "--out_dir", "out/masked")
    assert Path("out/masked/ckpt.pt").read_bytes() == before


class Attack:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return open, ("executed", "w")


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def change(**values):
    return lambda path: torch.save(torch.load(path, weights_only=True) | values, path)


DAMAGES = {
    "missing": Path.unlink, "empty": lambda path: path.write_bytes(b""), "cut short": halve,
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "other contents": lambda path: torch.save([1, 2], path),
    "another version": lambda path: torch.save({"settings": {}, "model": {}}, path),
    "code": lambda path: torch.save(Attack(), path), "other weights": change(model={}),
    "no step": lambda path: torch.save({k: v for k, v in torch.load(path, weights_only=True).items()
                                        if k != "step"}, path),
    "other corpus": change(digest="0"), "no settings": change(settings={}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_ends_in_one_line(damage, runs, capfd):
    """Named in one line by both scripts; a file that tries to run code is not run."""
    DAMAGES[damage](Path("out/masked/ckpt.pt"))
    refused = [refusal(capfd, evaluation, "out/masked")]
    if damage != "missing":  # then there is nothing to go on from, and the run is started anew
        refused.append(refusal(capfd, train, *TINY, "--out_dir", "out/masked", "--resume"))
    for refused in refused:
        assert str(Path("out/masked/ckpt.pt")) in refused
    assert not Path("executed").exists()


@pytest.mark.parametrize("damage", ("empty", "cut short", "random bytes", "another version", "code",
                                    "other weights"))
def test_a_damaged_base_ends_in_one_line(damage, runs, capfd):
    """A base is a checkpoint too, and never silently trained anew."""
    for base in Path("out/bases").iterdir():
        DAMAGES[damage](base)
    assert "bases" in refusal(capfd, train, *TINY, "--out_dir", "out/again")
    assert not Path("executed").exists()


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(runs, monkeypatch, capfd):
    """What the system forbids to read may be in order: nobody is told to delete it."""
    def forbid(*_, **__):
        raise PermissionError("[Errno 13] Permission denied: 'ckpt.pt'")
    monkeypatch.setattr(torch, "load", forbid)
    refused = refusal(capfd, evaluation, "out/masked")
    assert "Permission denied" in refused and "delete" not in refused


@pytest.mark.parametrize("content", (b"", b'{"settings"', b"[]", b"{}", b"null", b"\xff\xfe", b'{"exam": 1}'))
def test_a_damaged_result_ends_in_one_line(content, runs, capfd):
    """The comparison names the file instead of leaving the run out."""
    Path("out/masked/result.json").write_bytes(content)
    assert "result.json" in refusal(capfd, evaluation)
    assert "result.json" in refusal(capfd, evaluation, "--costs")


@pytest.mark.parametrize("question", ("", "  ", "\n\t", "who " * 5000, "谁" * 500))
def test_a_question_with_nothing_or_too_much_in_it_is_refused(question, runs, capfd):
    """Empty, blank, thousands of words, or a few hundred characters that are 1,500 tokens of bytes."""
    assert "--ask" in refusal(capfd, evaluation, "out/masked", "--ask", question)


@pytest.mark.parametrize("question", (
    "¿Quién?", "谁住在罗马", "<mask><end>", "a\nb", "☃ 'q' \\", "x" * 99))
@pytest.mark.parametrize("mode", ("masked", "diffusion"))
def test_any_other_question_is_answered(question, mode, runs, capsys):
    """Other scripts, quotes, and words that look like special tokens, which stay text."""
    call(evaluation, f"out/{mode}", "--ask", question)
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("mode, masks", (("masked", [0, 0, 0, 0]), ("diffusion", [3, 2, 1, 0])))
def test_show_prints_every_step_of_an_answer(mode, masks, runs, capsys):
    """A canvas of four, one token a step: four lines a question, the last as --ask answers."""
    question = "What is the major of Curtis Chase Emley?"
    call(evaluation, f"out/{mode}", "--show", "--ask", question)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == question and [line.count("<mask>") for line in lines[1:]] == masks
    call(evaluation, f"out/{mode}", "--ask", question)
    assert lines[-1].split("<end>")[0].strip() == capsys.readouterr().out.strip()
    call(evaluation, f"out/{mode}", "--show")
    assert len(capsys.readouterr().out.splitlines()) == 2 * 5


def test_eval_says_what_does_not_go_together(runs, capfd):
    """Costs are of many runs, a question goes to one; a device that is not there."""
    assert "one run" in refusal(capfd, evaluation, "out", "--ask", "Who?")
    assert "--costs" in refusal(capfd, evaluation, "out/masked", "--costs")
    assert "--device" in refusal(capfd, evaluation, "out/masked", "--device", "abacus")
