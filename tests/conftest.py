"""What the tests share: a folder of their own, tiny settings, and a way to call the scripts as people do.

Whatever needs train.py imports it when it runs: while you break one file, the tests of the others go on."""
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # everything here is tiny: threads would only wait for each other

ROOT = Path(__file__).parent.parent
SIZES = {"known": 6, "new": 4, "n_layer": 1, "n_head": 1, "n_embd": 16, "batch": [4, 9, 2, 1], "steps": 6,
         "pretrain_steps": 4, "device": "cpu"}  # so no test hangs on a tuned default
FLAGS = " ".join(f"--{name} {value}" for name, value in SIZES.items())
TINY = FLAGS.translate(str.maketrans("", "", "[],")).split()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so that out/ is its own too."""
    monkeypatch.chdir(tmp_path)


def settings(world="biographies", **changes):
    """The defaults of a world in tiny sizes, but for what is given."""
    import train
    return replace(train.defaults(world), **SIZES | changes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def call(module, *arguments):
    """Run a script's main() as its command line would."""
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    module.main()


def tiny(*arguments, name="run"):
    """A tiny run of train.py in the folder out/NAME."""
    import train
    call(train, *TINY, "--name", name, *arguments)


def base(mode="masked", seed=0):
    """The folder of the base of a mode, which is there once; not what moved aside."""
    from diffusion import MODES
    [folder] = Path("out").glob(f"base-{MODES[mode].base}-*seed{seed}")
    return folder


def unbroken(*arguments):
    """The run that a broken one is compared with, in a/run, its base in a/base; the broken one makes its own."""
    tiny(*arguments)
    shutil.move("out", "a")
    shutil.move(next(Path("a").glob("base-*")), "a/base")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished tiny run of `masked` and one of `diffusion`, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        for mode in ("masked", "diffusion"):
            tiny("--mode", mode, name=mode)
        return Path("out").resolve()


@pytest.fixture
def runs(trained):
    """Those runs, out/masked and out/diffusion, in the test's own folder."""
    shutil.copytree(trained, "out")


def weights(folder):
    return torch.load(Path(folder, "ckpt.pt"), weights_only=True)["model"]


def result_of(folder):
    return json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))


def log_of(folder):
    """The lines of a log, without clock times."""
    lines = map(json.loads, Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_run(a, b):
    """Two runs or bases have the same log, clock times left out, and bit for bit the same weights."""
    assert log_of(a) == log_of(b) and same_weights(a, b)


def watch_loss(monkeypatch, at=0, action=None):
    """A list that grows with each call of the loss, two a training step. At call number `at`, `action`."""
    import train
    real, calls = train.loss, []

    def loss(*arguments):
        calls.append(1)
        if len(calls) == at:
            action()
        return real(*arguments)
    monkeypatch.setattr(train, "loss", loss)
    return calls


def edit(monkeypatch, name, change=lambda text: text + "x = 1\n"):
    """Let every reader see the file `name` of this project changed, by a line of code unless told."""
    real = Path.read_text

    def read_text(path, **how):
        text = real(path, **how)
        return change(text) if path == ROOT / name else text
    monkeypatch.setattr(Path, "read_text", read_text)


def refusal(capfd, module, *arguments):
    """The one line with which a script refuses: argparse writes its own, with exit code 2; sys.exit("line")
    lets Python write it, with exit code 1."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(module, *arguments)
    said = capfd.readouterr().err.strip() if stop.value.code == 2 else stop.value.code
    assert isinstance(said, str) and len(said.splitlines()) == 1, said
    return said
