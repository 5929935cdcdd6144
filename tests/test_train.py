"""The scripts as people use them: runs that train, resume, reuse and refuse. Everything is tiny; nothing is timed."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from data import MARKS

ROOT = Path(__file__).parent.parent
TINY = ["--known", "6", "--new", "4", "--n_layer", "1", "--n_head", "1", "--n_embd", "16", "--batch_size", "8",
        "--steps", "6", "--school_steps", "4", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so that out/ is its own too."""
    monkeypatch.chdir(tmp_path)


def call(module, *arguments):
    """Run a script's main() as its command line would."""
    sys.argv = [f"{module.__name__}.py", *arguments]
    module.main()


def finished(folder):
    """(log without clock times, weights, result) of a run."""
    log = [json.loads(line) for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in log:
        line.pop("seconds")
    weights = torch.load(Path(folder, "ckpt.pt"), weights_only=True)["model"]
    return log, weights, json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))


def assert_same_run(a, b):
    (log_a, weights_a, _), (log_b, weights_b, _) = finished(a), finished(b)
    assert log_a == log_b
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


def refusal(capfd, module, *arguments):
    """The one line on stderr with which a script refuses its arguments; it must exit with 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(module, *arguments)
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1, error
    return error


@pytest.mark.parametrize("mode", ("ar", "diffusion", "masked"))
def test_each_mode_trains_is_examined_and_answers(mode, capsys):
    """A few steps through the command line leave a checkpoint, a log and a result, and eval.py reads them all."""
    call(train, "--mode", mode, *TINY)
    folder = f"out/{mode}-none-seed0"
    log, _, result = finished(folder)
    assert [line["stage"] for line in log] == ["reading"] * len(log) and log[-1]["step"] == 10
    assert {"forward", "backward", "known_forward", "known_backward", "tokens", "supervised", "documents",
            "loss", "forward_by_attribute"} <= set(log[-1])
    assert result["chance"]["backward"] == 1 / 10 and result["settings"]["mode"] == mode
    table = capsys.readouterr().out
    assert "new people" in table and "known people" in table and "chance" in table
    call(evaluation, folder)
    again = capsys.readouterr().out
    assert again.strip() in table  # the exam taken again from the file alone gives the same table
    call(evaluation, folder, "--ask", "What is the major of Curtis Chase Emley?")
    assert capsys.readouterr().out.strip()
    call(evaluation)
    assert mode in capsys.readouterr().out


def test_what_a_run_spends_is_counted():
    """4 school and 6 reading steps of 8 rows, one of them a question: 70 documents. `masked` puts documents through
    the model twice while it reads, and is scored on as many tokens as `ar`."""
    for mode in ("ar", "masked"):
        call(train, "--mode", mode, *TINY)
    ar, masked = (finished(f"out/{mode}-none-seed0")[0] for mode in ("ar", "masked"))
    assert ar[-1]["documents"] == masked[-1]["documents"] == 10 * (8 - 1)
    assert ar[0] == masked[0]  # the same base, the same exam before reading
    assert ar[-1]["supervised"] == masked[-1]["supervised"]
    assert 1.5 < (masked[-1]["tokens"] - masked[0]["tokens"]) / (ar[-1]["tokens"] - ar[0]["tokens"]) < 2


@pytest.mark.parametrize("killed_at", (2, 4, 7))
def test_a_resumed_run_equals_an_unbroken_one(killed_at, monkeypatch, capfd):
    """A crash in school, at its end or in reading loses the steps since the last save, never the result: the same
    log and bit-equal weights."""
    call(train, *TINY, "--out_dir", "a/run")
    real, calls = train.loss, []

    def crash(*arguments):
        calls.append(1)
        if len(calls) > killed_at:
            raise RuntimeError("killed")
        return real(*arguments)
    monkeypatch.setattr(train, "loss", crash)
    with pytest.raises(RuntimeError, match="killed"):
        call(train, *TINY, "--out_dir", "b/run")
    monkeypatch.setattr(train, "loss", real)
    call(train, *TINY, "--out_dir", "b/run", *(["--resume"] if Path("b/run/ckpt.pt").exists() else []))
    assert_same_run("a/run", "b/run")


def test_ctrl_c_saves_and_says_how_to_go_on(monkeypatch, capfd):
    """The step is finished, the checkpoint written, and --resume goes on from there to the same end."""
    import signal
    call(train, *TINY, "--out_dir", "a/run")
    real, calls = train.loss, []

    def press(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)
    monkeypatch.setattr(train, "loss", press)
    with pytest.raises(SystemExit):
        call(train, *TINY, "--out_dir", "b/run")
    assert "--resume" in capfd.readouterr().err and len(calls) == 3
    call(train, *TINY, "--out_dir", "b/run", "--resume")
    assert len(calls) == 10  # nothing was done twice
    assert_same_run("a/run", "b/run")


def test_a_reused_base_changes_nothing():
    """`masked` after `ar` skips school, and ends where a `masked` run that went to school itself ends."""
    call(train, "--mode", "ar", *TINY, "--out_dir", "shared/ar")
    call(train, "--mode", "masked", *TINY, "--out_dir", "shared/masked")
    assert len(list(Path("shared/bases").iterdir())) == 1
    call(train, "--mode", "masked", *TINY, "--out_dir", "alone/masked")
    assert_same_run("shared/masked", "alone/masked")


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, capfd):
    """A disk that fills while the file is written: one line, exit code 2, and the file that stood there is whole."""
    path = tmp_path / "ckpt.pt"
    path.write_bytes(b"old")

    def fill(temporary):
        temporary.write_bytes(b"ne")
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit) as stop:
        train.write_atomically(path, fill)
    assert stop.value.code == 2 and "No space left" in capfd.readouterr().err
    assert path.read_bytes() == b"old"


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch, capfd):
    """With the step and what to try, before the broken weights are saved."""
    real = train.loss
    monkeypatch.setattr(train, "loss", lambda *arguments: real(*arguments) * float("nan"))
    with pytest.raises(SystemExit) as stop:
        call(train, *TINY)
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "at step 0" in last and "--lr" in last
    assert not Path("out/masked-none-seed0/ckpt.pt").exists()


@pytest.mark.parametrize("other", (["--seed", "1"], ["--known", "7"], ["--lr", ".01"], ["--school_steps", "5"],
                                   ["--mode", "diffusion"]))
def test_a_base_of_other_settings_is_never_reused(other):
    """Whatever school depends on is in the base's name."""
    call(train, "--mode", "ar", *TINY, "--out_dir", "x/first")
    call(train, "--mode", "ar", *TINY, *other, "--out_dir", "x/second")
    assert len(list(Path("x/bases").iterdir())) == 2


def test_no_training_row_of_reading_is_a_new_persons_question():
    """Drawn from the sampler itself: 200 batches hold new people's documents and only known people's questions."""
    corpus = evaluation.make_corpus(known=6, new=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    seen = torch.cat([train.batch(corpus, stage, 8, 0.25, generator) for stage in ("school", "reading") for _ in range(100)])
    asked = {corpus.people[(int(i) - corpus.groups["forward"].start) // 6].name
             for i in seen if int(i) in corpus.groups["forward"]}
    assert asked == {p.name for p in corpus.people[:6]}
    assert set(corpus.rows[seen, 0].tolist()) == {MARKS.doc, MARKS.question}
    school = torch.cat([train.batch(corpus, "school", 8, 0.25, generator) for _ in range(100)])
    assert not any(int(i) in corpus.groups["new_documents"] for i in school)


def test_each_seed_and_stage_has_batches_of_its_own(monkeypatch):
    """The generator that draws batches and masks starts from another number for every seed and stage."""
    real, used = train.batch, []
    monkeypatch.setattr(train, "batch", lambda *a: used.append((a[1], a[-1].initial_seed())) or real(*a))
    for seed in "01":
        call(train, *TINY, "--seed", seed)
    assert set(used) == {("school", 0), ("reading", 1), ("school", 2), ("reading", 3)}


def test_learning_rate_warms_up_and_ends_near_zero():
    """Up within 2 % of the steps, then down a straight line: by hand for 100 steps."""
    rates = [train.schedule(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 0.98]) and rates[50] == 0.5 and rates[99] == pytest.approx(0.01)


def test_exams_grow_with_the_step():
    """Ten intervals from the end of school to the end of reading, each at least as long as the one before it."""
    steps = sorted(train.exam_steps(100, 1000))
    gaps = [b - a for a, b in zip(steps, steps[1:])]
    assert steps[0] == 100 and steps[-1] == 1100 and len(gaps) == train.EXAMS and gaps == sorted(gaps)


BAD_FLAGS = [
    (["--mode", "gpt"], "--mode"), (["--paraphrases", "many"], "--paraphrases"), (["--mask_ratio", "1.5"], "--mask_ratio"),
    (["--mask_ratio", "half"], "--mask_ratio"), (["--mask_ratio", "-1"], "--mask_ratio"), (["--known", "0"], "--known"),
    (["--known", "many"], "--known"), (["--known", "2000000"], "--known"), (["--new", "-3"], "--new"),
    (["--wordings", "11"], "--wordings"), (["--seed", "-1"], "--seed"), (["--n_layer", "0"], "--n_layer"),
    (["--n_head", "3"], "--n_head"), (["--n_embd", "1"], "--n_embd"), (["--n_embd", "12.5"], "--n_embd"),
    (["--steps", "0"], "--steps"), (["--steps", "1e3"], "--steps"), (["--school_steps", "-1"], "--school_steps"),
    (["--batch_size", "1"], "--batch_size"), (["--question_share", "1"], "--question_share"), (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"), (["--optimizer", "sgd"], "--optimizer"), (["--device", "abacus"], "--device"),
    (["--dtype", "int8"], "--dtype"), (["--learning_rate", "1"], "--learning_rate"), (["extra"], "extra"),
    (["--mode", "diffusion", "--mask_ratio", "0"], "--mask_ratio"), (["--resume"], "ckpt.pt"),
]


@pytest.mark.parametrize("flags, culprit", BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_a_bad_flag_ends_in_one_line(flags, culprit, capfd):
    """Exit code 2, one line that names the flag, and nothing written."""
    assert culprit in refusal(capfd, train, *TINY, *flags)
    assert not Path("out").exists()


def test_a_folder_with_a_run_is_not_overwritten(capfd):
    """Not by the same command, nor by --resume with other settings: the old checkpoint stays as it was."""
    call(train, *TINY)
    checkpoint = Path("out/masked-none-seed0/ckpt.pt")
    before = checkpoint.read_bytes()
    assert "--resume" in refusal(capfd, train, *TINY)
    assert "--lr" in refusal(capfd, train, *TINY, "--resume", "--lr", ".01")
    assert checkpoint.read_bytes() == before


class Attack:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("damage", ("missing", "empty", "cut short", "random bytes", "other contents", "code"))
def test_a_damaged_checkpoint_ends_in_one_line(damage, capfd):
    """Named in one line by both scripts; a file that tries to run code is not run."""
    call(train, *TINY)
    path = Path("out/masked-none-seed0/ckpt.pt")
    good = path.read_bytes()
    {"missing": lambda: path.unlink(), "empty": lambda: path.write_bytes(b""),
     "cut short": lambda: path.write_bytes(good[:len(good) // 2]),
     "random bytes": lambda: path.write_bytes(bytes(range(256)) * 8),
     "other contents": lambda: torch.save({"hello": 1}, path), "code": lambda: torch.save(Attack(), path)}[damage]()
    assert "ckpt.pt" in refusal(capfd, evaluation, "out/masked-none-seed0")
    assert "ckpt.pt" in refusal(capfd, train, *TINY, "--resume")
    assert not Path("executed").exists()


def test_eval_refuses_clearly(capfd):
    """No runs, no such run, a result that is cut short, a question with nothing in it or far too long."""
    assert "out" in refusal(capfd, evaluation)
    assert "missing" in refusal(capfd, evaluation, "out/nowhere")
    assert "run folder" in refusal(capfd, evaluation, "--ask", "Who?")
    call(train, *TINY)
    run = "out/masked-none-seed0"
    assert "--ask" in refusal(capfd, evaluation, run, "--ask", "  ")
    assert "--ask" in refusal(capfd, evaluation, run, "--ask", "who " * 5000)
    assert "diffusion" in refusal(capfd, evaluation, run, "--show")
    for question in ("¿Quién?", "谁住在罗马", "<mask><end>", "\n"):
        if question.strip():
            call(evaluation, run, "--ask", question)
    result = Path(run, "result.json")
    result.write_text(result.read_text(encoding="utf-8")[:50], encoding="utf-8")
    assert "result.json" in refusal(capfd, evaluation)


def test_a_run_on_another_corpus_is_not_examined(capfd):
    """If data.py writes other texts than it did at training, the checkpoint's digest tells."""
    call(train, *TINY)
    path = Path("out/masked-none-seed0/ckpt.pt")
    torch.save(torch.load(path, weights_only=True) | {"digest": "0"}, path)
    assert "corpus" in refusal(capfd, evaluation, "out/masked-none-seed0")


def test_seeds_are_averaged_with_their_spread():
    """Two seeds with .4 and .6: mean .50, standard deviation .14 by hand; another mode stays a row of its own."""
    def result(mode, seed, score):
        exam = {"forward": score, "backward": score, "known_forward": 1.0, "known_backward": 1.0}
        return {"settings": {"mode": mode, "paraphrases": "none", "seed": seed, "lr": 0.02}, "exam": exam, "before": exam,
                "chance": {"forward": 0.02, "backward": 0.01}}
    table = evaluation.compare([result("ar", 0, 0.4), result("ar", 1, 0.6), result("masked", 0, 0.9)]).splitlines()
    assert len(table) == 3
    assert re.match(r"ar +none +2 +0\.50 ±0\.14", table[1]) and re.match(r"masked +none +1 +0\.90 ", table[2])


def test_the_readmes_commands_are_accepted(monkeypatch):
    """Every `python train.py ...` in the README is parsed by the script it calls; the files it maps exist."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"python train\.py([^\n`#|>;]*)", readme)
    assert len(commands) >= 3
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(command.replace("$seed", "0").replace("$mode", "ar"))])
        train.parse_args()
    for name in re.findall(r"\w+\.py", readme):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize("script", ("data.py", "train.py --help", "eval.py --help"))
def test_scripts_start_from_a_shell(script):
    """As a child process, from another folder, with output that is not a terminal."""
    name, *flags = script.split()
    done = subprocess.run([sys.executable, str(ROOT / name), *flags], capture_output=True, encoding="utf-8",
                          env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0 and len(done.stdout) > 200, done.stderr
