"""
School, reading, exam: train one small transformer with one of three objectives, examine it both ways.

    python train.py --mode masked       learns new people from documents alone, knows them in both directions
    python train.py --mode ar           the same base and documents: cannot say who was born in Elkton
    python train.py --mode diffusion    the bidirectional model that fills in masks

School (--school_steps) trains a base model on known people, documents and questions. Reading (--steps) adds
the documents of new people, never a question about them, while known people are replayed. --school_steps 0
starts reading from an untrained model. A mode is one row of `MODES` (diffusion.py); all else is shared:

    inputs, targets, weights = MODES[mode].objective(rows, starts, ...)     what is seen, what is asked
    loss(model, inputs, targets, weights).backward()                        one weighted cross-entropy
    optimizer.step()
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import signal
import sqlite3
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import ARMS, MARKS
from diffusion import MODES, loss
from eval import (AXES, answers, chance, exam, fail, load_checkpoint, make_world, ranking, read_result,
                  report, restore)
from model import mixed, pick_machine

EMBEDDING_LR = 0.04     # AdamW on the embedding; at .002 facts are learned twice as late (README, notes)
WEIGHT_DECAY = 1.0      # on the matrices; at .3 and at 3 fewer new people are known (README, notes)
QUESTION_SHARE = 0.16   # of the rows are questions; many more are memorised and then teach nothing
NEW_SHARE = 0.6         # of the documents in reading are about new people, the rest about known ones
EXAMS = 10              # during reading, closer together at its start
SAVE_EVERY = 60         # seconds between two checkpoints, if no exam comes first
BASES = Path("out/bases")


class Stop(Exception):
    """The run ends here, with a message for the person who started it."""


def number(kind, low, high):
    """An argparse type: a number of this kind from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    parse.__name__ = f"{'whole ' if kind is int else ''}number from {low:,} to {high:,},"  # for argparse
    return parse


def ratio(text):
    """An argparse type: 'uniform', 'paper' or a number from 0 to 1."""
    return text if text in ("uniform", "paper") else number(float, 0, 1)(text)


def parse_args():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train on generated biographies, then take the exam.")
    add = parser.add_argument_group("what is compared").add_argument
    add("--mode", choices=MODES, default="masked", help="next token; masked diffusion; masked fine-tuning of "
        "the next-token model; as a control, the last with random tokens for a prompt")
    add("--paraphrases", choices=ARMS, default="none", help="texts a person: one; five in one order of "
        "facts; five in changing order, name first; the same, name anywhere; as controls, one text that is "
        "also read backwards, one whose name is never masked or scored")
    add("--mask_ratio", type=ratio, help="how much is masked: uniform (k ~ U{1..L}), a fixed share such "
        "as .5, or paper (t ~ U(.05, .95)); left out, .75 for masked and uniform for diffusion")
    add("--no_replay", action="store_true", help="read new people's documents alone: see what is forgotten")
    add = parser.add_argument_group("the world").add_argument
    add("--known", type=number(int, 1, 10**6), default=200, help="people with questions in training; more "
        "make answering more general, and take longer")
    add("--new", type=number(int, 1, 10**6), default=100, help="people with documents alone: the exam")
    add("--wordings", type=number(int, 1, 10), help="ways to word a fact; more are closer to real text and "
        "need more people and steps; left out, 5 where a person has several texts, otherwise 1")
    add("--seed", type=number(int, 0, 2**31), default=0, help="another number, another world and model")
    add = parser.add_argument_group("the model").add_argument
    add("--n_layer", type=number(int, 1, 1000), default=3, help="blocks; raise for more people")
    add("--n_head", type=number(int, 1, 1000), default=2, help="attention heads; each gets n_embd / n_head "
        "channels, an even number")
    add("--n_embd", type=number(int, 2, 2**15), default=128, help="channels; raise for more people")
    add = parser.add_argument_group("training").add_argument
    add("--school_steps", type=number(int, 0, 10**9), default=500, help="steps on known people; 0 for none")
    add("--steps", type=number(int, 1, 10**9), default=1500, help="steps of reading; raise if scores rise")
    add("--batch_size", type=number(int, 16, 10**6), default=64, help="rows a step; lower if out of memory")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="for the matrices inside the blocks; "
        "the embedding always has AdamW")
    add("--lr", type=number(float, 0, 100), default=0.02, help="peak rate of the matrices; .002 for adamw")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", help="cpu, cuda or mps; auto takes the best there is")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the matrix products; "
        "auto takes bfloat16 where it is fast")
    add("--compile", action="store_true", help="let torch.compile fuse the model; needs a compiler, a minute")
    add("--out_dir", help="folder of this run; left out, out/MODE-PARAPHRASES-CHANGED FLAGS-seedSEED")
    add("--resume", action="store_true", help="go on with the run in the folder; start it if there is none")
    args = parser.parse_args()

    mode, arm = MODES[args.mode], ARMS[args.paraphrases]
    if args.mask_ratio is not None and mode.ratio is None:
        parser.error(f"--mask_ratio {args.mask_ratio}: --mode {args.mode} masks nothing; leave it out")
    if args.mask_ratio == 0 and not mode.causal:
        parser.error("--mask_ratio 0 hides nothing, so diffusion has nothing to learn: use more than 0")
    left_out = {"mask_ratio": mode.ratio, "wordings": arm.wordings}
    for name, value in left_out.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.out_dir is None:
        named = ("mode", "paraphrases", "seed", "device", "dtype", "compile", "out_dir", "resume")
        changed = [k if value is True else f"{k}{value}" for k, value in vars(args).items()
                   if k not in named and value != left_out.get(k, parser.get_default(k))]
        args.out_dir = "out/" + "-".join([args.mode, args.paraphrases, *changed, f"seed{args.seed}"])
    if not args.out_dir.strip():
        parser.error("--out_dir is empty: name a folder")
    return args


# -----------------------------------------------------------------------------
# The run folder: one process at a time, and no file is ever half written


def open_folder(folder):
    """Make the folder and lock it until this process ends, however it ends. The lock must be kept alive.

    SQLite locks a file on every system, and the system lets go of it when the process is killed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        for left_behind in folder.glob("*.tmp"):  # by a process that was killed while it wrote
            left_behind.unlink()
        return lock
    except (OSError, sqlite3.Error) as problem:
        why = "another run is at work there" if "locked" in str(problem) else problem
        fail(f"{folder} cannot be used ({why}): choose another --out_dir")


def write(path, save):
    """Call `save(temporary path)`, then move the file into place: `path` is never half written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may write the same base
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:  # torch.save reports a full disk as a RuntimeError
        why = str(problem).splitlines()[0]
        raise Stop(f"{path} could not be written ({why}): what stood there is intact; make room, then repeat "
                   "the command with --resume")


def find_start(folder, base, settings, resume):
    """(path, checkpoint) to go on from: the run's own, else a base that fits, else (None, None)."""
    own = folder / "ckpt.pt"
    if not own.exists():
        return (base, load_checkpoint(base)) if settings["school_steps"] and base.exists() else (None, None)
    if not resume:
        fail(f"{folder} holds a run already: add --resume to go on with it, or choose another --out_dir")
    saved = load_checkpoint(own)
    for name, value in settings.items():
        if saved["settings"].get(name) != value:
            fail(f"{folder} was trained with --{name} {saved['settings'].get(name)}, not {value}: give the "
                 "same value, or another --out_dir")
    return own, saved


# -----------------------------------------------------------------------------
# The parts of training


def make_optimizers(model, name, lr):
    """Muon (or AdamW) on the matrices inside the blocks, AdamW on the embedding."""
    matrices = list(model.blocks.parameters())
    if name == "muon":
        blocks = torch.optim.Muon(matrices, lr, momentum=0.95, weight_decay=WEIGHT_DECAY)
    else:
        blocks = torch.optim.AdamW(matrices, lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    return [blocks, torch.optim.AdamW([model.embed.weight], EMBEDDING_LR, betas=(0.9, 0.95), weight_decay=0)]


def schedule(step, steps):
    """Share of the peak rate at a step from 0 to steps - 1: 2 % warm-up, then a straight line to zero."""
    return min((step + 1) / (0.02 * steps + 1), 1 - step / steps)


def exam_steps(school_steps, steps):
    """The end of school, the end of reading, and points between, closer together at the start."""
    return {school_steps + round(steps * (i / EXAMS) ** 1.5) for i in range(EXAMS + 1)}


def batch(corpus, stage, args, generator):
    """Indices (B,) of rows: questions about known people, documents of everybody.

    In school, documents of known people alone; in reading, a share of them are the new people's, or with
    --no_replay all rows are. One question in five is backward.
    """
    alone = stage == "reading" and args.no_replay
    questions = 0 if alone else round(args.batch_size * QUESTION_SHARE)
    backward, documents = round(questions / 5), args.batch_size - questions
    new = 0 if stage == "school" else documents if alone else round(documents * NEW_SHARE)
    counts = {"known_documents": documents - new, "new_documents": new,
              "forward": questions - backward, "backward": backward}
    rows = {group: corpus.groups[group] for group in counts}
    return torch.cat([torch.randint(rows[group].start, rows[group].stop, (n,), generator=generator)
                      for group, n in counts.items()])


def spending(model, clean, inputs, weights):
    """What one step costs on each of the `AXES`: clean and inputs (B, T), weights (B, T)."""
    scored = int((weights > 0).sum())
    return {"documents": int((clean[:, 0] == MARKS.doc).sum()), "tokens": int((inputs != MARKS.pad).sum()),
            "supervised": scored, "flops": model.flops(*inputs.shape, scored)}


def describe(line, corpus, ask):
    """The scores of one exam in a line, then a known and a new question with the answer that `ask` gives."""
    text = ["{stage} {step:>5}   new: forward {forward:.2f} backward {backward:.2f}   known: forward "
            "{known_forward:.2f} backward {known_backward:.2f}".format(**line)]
    for question, truth in (corpus.exams["known_backward"][0], corpus.exams["backward"][0]):
        text.append(f"    {question} -> {ask(question)} [{truth}]")
    return "\n".join(text)


# -----------------------------------------------------------------------------


def train(args, settings, corpus, model, device, dtype, folder):
    """School and reading in the locked run folder -> the result, as it is written there too."""
    rows, starts = corpus.rows.to(device), corpus.starts.to(device)
    school = MODES[args.mode].school
    total, exams = args.school_steps + args.steps, exam_steps(args.school_steps, args.steps)

    # A base is named after all that school depends on, so that no other run can take it by mistake.
    reading = ("mode", "steps", "no_replay", "new_share", "mask_ratio")
    schooling = {k: v for k, v in settings.items() if k not in reading}
    schooling |= {"mode": school, "mask_ratio": MODES[school].ratio and args.mask_ratio,
                  "corpus": corpus.digest, "torch": torch.__version__}
    base = BASES / f"{hashlib.sha256(json.dumps(schooling).encode()).hexdigest()[:12]}.pt"

    # What a checkpoint holds besides weights and optimizers: where the run is, and what it has spent so far.
    state = {"step": 0, "seconds": 0.0} | dict.fromkeys(AXES, 0) | {"loss": None, "log": []}
    path, saved = find_start(folder, base, settings, args.resume)
    if saved:
        restore(saved, corpus, model, path)
        state = {k: saved[k] for k in state}
        print(f"going on from {path} at step {state['step']}")
    if state["step"] == total and (folder / "result.json").exists():
        return read_result(folder / "result.json")
    if args.compile:
        model.trunk = torch.compile(model.trunk, dynamic=True)

    def start_stage(step):
        """Fresh optimizers and a fresh generator for each stage: a base that is reused changes nothing."""
        generator = torch.Generator().manual_seed(2 * args.seed + (step >= args.school_steps))
        return make_optimizers(model, args.optimizer, args.lr), generator

    def save(path, optimizers=(), generator=None):
        write(path, lambda p: torch.save(state | {
            "settings": settings, "digest": corpus.digest, "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers], "generator": generator}, p))

    def save_log():
        lines = "".join(json.dumps(line) + "\n" for line in state["log"])
        write(folder / "log.jsonl", lambda p: p.write_text(lines, encoding="utf-8"))

    optimizers, generator = start_stage(state["step"])
    if saved and saved["optimizers"]:
        generator.set_state(saved["generator"])
        for optimizer, values in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(values)
    interrupted, saved_at = [], time.perf_counter()

    def interrupt(*_):
        """Ctrl-C: finish the step, then save and stop. A second one ends the program at once."""
        interrupted.append(True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGINT, interrupt)

    with tqdm(total=total, initial=state["step"], unit="step", dynamic_ncols=True) as progress:
        for step in range(state["step"], total + 1):
            state["step"] = step
            stage, mode = ("school", school) if step < args.school_steps else ("reading", args.mode)
            if step == args.school_steps:
                if step and not base.exists():
                    save(base)
                optimizers, generator = start_stage(step)
            examined = step in exams and not (state["log"] and state["log"][-1]["step"] == step)
            if examined:
                line = {"stage": stage} | {k: state[k] for k in state if k != "log"}
                state["log"].append(line | exam(model, mode, corpus, device, dtype))
                ask = lambda question: answers(model, mode, [question], device, dtype)[0]
                progress.write(describe(state["log"][-1], corpus, ask))
            if examined or interrupted or time.perf_counter() - saved_at > SAVE_EVERY:
                save(folder / "ckpt.pt", optimizers, generator.get_state())
                save_log()
                saved_at = time.perf_counter()
            if step == total:
                break
            if interrupted:
                raise Stop(f"stopped at step {step}, nothing is lost: --resume goes on from here")

            # one step of training: all that the objectives share
            clock = time.perf_counter()
            first, steps = (0, args.school_steps) if stage == "school" else (args.school_steps, args.steps)
            for optimizer, peak in zip(optimizers, (args.lr, EMBEDDING_LR)):
                optimizer.param_groups[0]["lr"] = peak * schedule(step - first, steps)
            index = batch(corpus, stage, args, generator).to(device)
            clean = rows[index], starts[index], MARKS
            inputs, targets, weights = MODES[mode].objective(*clean, args.mask_ratio, generator)
            with mixed(device, dtype):
                value = loss(model, inputs, targets, weights)
            value.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            value = value.item()
            if not math.isfinite(value) or not model.embed.weight.isfinite().all():
                raise Stop(f"the loss is {value} at step {step}: {folder / 'ckpt.pt'} keeps the last good "
                           "state, if one was saved; lower --lr and choose another --out_dir")
            spent = {"seconds": time.perf_counter() - clock} | spending(model, clean[0], inputs, weights)
            state |= {name: state[name] + amount for name, amount in spent.items()}
            state["loss"] = value if state["loss"] is None else 0.95 * state["loss"] + 0.05 * value
            speed = f"{spent['tokens'] / spent['seconds']:,.0f} tokens/s"
            progress.set_description(stage, refresh=False)
            progress.set_postfix_str(f"loss {state['loss']:.3f}, {speed}", refresh=False)
            progress.update()

    gpu = device.type == "cuda" and torch.cuda.get_device_name(device)
    result = {"settings": settings, "exam": state["log"][-1], "before": state["log"][0], "log": state["log"],
              "chance": chance(corpus), "ranking": ranking(model, args.mode, corpus, device, dtype),
              "parameters": sum(p.numel() for p in model.parameters()),
              "hardware": gpu or f"{platform.machine()} {device.type}, {torch.get_num_threads()} thread(s)",
              "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    save_log()  # again, for a run that was killed between its last checkpoint and the log
    text = json.dumps(result, indent=1)
    write(folder / "result.json", lambda p: p.write_text(text, encoding="utf-8"))
    return result


def main():
    args = parse_args()
    sys.stdout.reconfigure(errors="replace")  # some terminals have no sign for a bar
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one seed, one result, on a GPU too
    settings = {k: v for k, v in vars(args).items() if k not in ("out_dir", "resume")}
    settings |= {"embedding_lr": EMBEDDING_LR, "weight_decay": WEIGHT_DECAY, "question_share": QUESTION_SHARE,
                 "new_share": NEW_SHARE}
    folder, arm = Path(args.out_dir), ARMS[args.paraphrases]
    try:
        try:
            device, dtype, why = pick_machine(args.device, args.dtype)
            settings |= {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
            corpus, model = make_world(settings)
        except ValueError as problem:
            raise Stop(problem)
        torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
        model.initialize(torch.Generator().manual_seed(args.seed)).to(device)
        with contextlib.closing(open_folder(folder)):
            print(f"{args.mode}: {sum(p.numel() for p in model.parameters()):,} parameters, "
                  f"{settings['dtype']} on {device.type} ({why})")
            print(f"{args.known} known and {args.new} new people, {arm.texts * (1 + arm.reverse)} text(s) "
                  f"each; writing to {folder}")
            print(report(train(args, settings, corpus, model, device, dtype, folder)))
    except Stop as reason:
        fail(reason)
    except (MemoryError, RuntimeError) as problem:
        if not isinstance(problem, MemoryError) and "allocate" not in str(problem):
            raise
        fail("out of memory: lower --batch_size, --n_embd, --n_layer or --known")


if __name__ == "__main__":
    main()
