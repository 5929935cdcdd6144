"""What the tests share: a folder of their own, a tiny run, and a way to call the scripts as people do."""
import json
import sys
from pathlib import Path

import pytest
import torch

import train
from diffusion import loss

torch.set_num_threads(1)  # everything here is tiny: threads would only wait for each other

ROOT = Path(__file__).parent.parent
TINY = ["--known", "6", "--new", "4", "--n_layer", "1", "--n_head", "1", "--n_embd", "16", "--batch_size",
        "16", "--steps", "6", "--pretrain_steps", "4", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so that out/ is its own too."""
    monkeypatch.chdir(tmp_path)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def call(module, *arguments):
    """Run a script's main() as its command line would."""
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    module.main()


def tiny(module, *arguments, folder="out/run"):
    """A tiny run of train.py in `folder`."""
    call(module, *TINY, "--out_dir", folder, *arguments)


def bases():
    return list(Path("out").glob("base-*.pt"))


def unbroken(*arguments):
    """The run that a broken one is compared with, in a/run; the broken one makes its base itself."""
    tiny(train, *arguments, folder="a/run")
    for base in bases():
        base.unlink()


def finished(folder):
    """(log without clock times, weights, result) of a run."""
    log = [json.loads(line) for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in log:
        line.pop("seconds")
    weights = torch.load(Path(folder, "ckpt.pt"), weights_only=True)["model"]
    return log, weights, json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))


def assert_same_run(a, b):
    """Two runs have the same log, clock times left out, and bit for bit the same weights."""
    (log_a, weights_a, _), (log_b, weights_b, _) = finished(a), finished(b)
    assert log_a == log_b and weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


def stop_after(steps, monkeypatch, action):
    """Let `action` happen at call number `steps` of the loss, two a training step; returns the calls."""
    real, calls = loss, []

    def step(*arguments):
        calls.append(1)
        if len(calls) == steps:
            action()
        return real(*arguments)
    monkeypatch.setattr(train, "loss", step)
    return calls


def edit(monkeypatch, name, code):
    """Let every reader see the file `name` with `code` added."""
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **kw: real(path, **kw) + code * (path.name == name))


def refusal(capfd, module, *arguments):
    """The one line on stderr with which a script refuses; it must exit with 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(module, *arguments)
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1, error
    return error
