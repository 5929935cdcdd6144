"""What the tests share: a folder of their own, tiny settings, and a way to call the scripts as people do.
Whatever needs train.py imports it when it runs: while you break one file, the tests of the others go on."""
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # everything here is tiny: threads would only wait for each other

ROOT = Path(__file__).parent.parent
SIZES = {"known": 6, "new": 4, "n_layer": 1, "n_head": 1, "n_embd": 16, "batch": [4, 9, 2, 1], "steps": 6,
         "pretrain_steps": 4, "device": "cpu"}  # so no test hangs on a tuned default
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", *re.findall(r"\w+", str(value)))]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so that out/ is its own too."""
    monkeypatch.chdir(tmp_path)


def settings(world="biographies", mode="masked", **changes):
    """The defaults of a mode in a world in tiny sizes, but for what is given."""
    import train
    return replace(train.defaults(mode, world), **SIZES | changes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def call(module, *arguments):
    """Run a script's main() as its command line would, and return what it prints."""
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    with redirect_stdout(TextIOWrapper(BytesIO(), "utf-8")) as printed:
        module.main()
    printed.seek(0)
    return printed.read()


def tiny(*arguments, name="run"):
    """A tiny run of train.py in the folder out/NAME."""
    import train
    return call(train, *TINY, "--name", name, *arguments)


def base(mode="masked", seed=0):
    """The folder of the base of a mode, which is there once; not what moved aside."""
    from diffusion import MODES
    [folder] = Path("out").glob(f"base-{MODES[mode].base}-*seed{seed}")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        for mode in ("masked", "diffusion"):
            tiny("--mode", mode, name=mode)
        return Path("out").resolve()


@pytest.fixture
def runs(trained):
    """Two finished tiny runs, out/masked and out/diffusion."""
    shutil.copytree(trained, "out")


def weights(folder):
    return torch.load(Path(folder, "ckpt.pt"), weights_only=True)["model"]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def result_of(folder):
    return json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))


def log_of(folder, name="log.jsonl"):
    """The lines of a log or of answers.jsonl, without clock times."""
    lines = map(json.loads, Path(folder, name).read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def edit(monkeypatch, name, change=lambda text: text + "x = 1\n"):
    """Let every reader see the file `name` of this project changed, by a line of code unless told."""
    real = Path.read_text

    def read_text(path, **how):
        text = real(path, **how)
        return change(text) if path == ROOT / name else text
    monkeypatch.setattr(Path, "read_text", read_text)


def refusal(module, *arguments):
    """The one line with which a script refuses: argparse's own (exit code 2), or that of sys.exit (1)."""
    with pytest.raises(SystemExit) as stop, redirect_stderr(StringIO()) as printed:
        call(module, *arguments)
    said = printed.getvalue().strip() if stop.value.code == 2 else stop.value.code
    assert isinstance(said, str) and len(said.splitlines()) == 1, said
    return said
