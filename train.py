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
import io
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
from eval import AXES, Stop, chance, costs, exam, load, make_world, one_line, ranking, report, restore

EMBEDDING_LR = 0.04     # AdamW on the embedding; at .002 facts are learned far later (README, notes)
WEIGHT_DECAY = 1.0      # on the matrices; at .3 and at 3 fewer new people are known (README, notes)
QUESTION_SHARE = 0.16   # of the rows are questions
NEW_SHARE = 0.6         # of the documents in reading are about new people, the rest about known ones
EXAMS = 10              # during reading, closer together at its start
SAVE_EVERY = 60         # seconds between two checkpoints, if no exam comes first
BASES = Path("out/bases")


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


ratio.__name__ = "'uniform', 'paper' or a number from 0 to 1,"  # for argparse


def parse_args():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train on generated biographies, then take the exam.")
    add = parser.add_argument_group("what is compared").add_argument
    add("--mode", choices=MODES, default="masked", help="next token; masked diffusion; masked fine-tuning; "
        "noise, its control: random tokens for a prompt")
    add("--paraphrases", choices=ARMS, default="none", help="texts a person. none: one; same: five, facts in "
        "one order; shuffled: five, in changing order, name first; permuted: five, name anywhere; reversed: "
        "one, and the same backwards; given: one, the name never masked or scored")
    add("--mask_ratio", type=ratio, help="how much is masked: a share such as .5, uniform (k ~ U{1..L}) or "
        "paper (t ~ U(.05, .95)); left out, .75 for masked and uniform for diffusion")
    add("--no_replay", action="store_true", help="read new people's documents alone: see what is forgotten")
    add = parser.add_argument_group("the world").add_argument
    add("--known", type=number(int, 1, 10**6), default=200, help="people with questions: raise with steps")
    add("--new", type=number(int, 1, 10**6), default=100, help="people with documents alone: the exam")
    add("--wordings", type=number(int, 1, 10), help="ways to word a fact: raise with people and steps; left "
        "out, 5 where a person has several texts, otherwise 1")
    add("--seed", type=number(int, 0, 2**31), default=0, help="another number, another world and model")
    add = parser.add_argument_group("the model").add_argument
    add("--n_layer", type=number(int, 1, 1000), default=3, help="blocks: raise for more people")
    add("--n_head", type=number(int, 1, 1000), default=2, help="heads: twice this must divide n_embd")
    add("--n_embd", type=number(int, 2, 2**15), default=128, help="channels: raise for more people")
    add = parser.add_argument_group("training").add_argument
    add("--school_steps", type=number(int, 0, 10**9), default=500, help="steps on known people; 0 for none")
    add("--steps", type=number(int, 1, 10**9), default=1500, help="steps of reading: raise if scores rise")
    add("--batch_size", type=number(int, 16, 10**6), default=64, help="rows a step: lower if out of memory")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="for the matrices inside the blocks")
    add("--lr", type=number(float, 0, 100), default=0.02, help="peak rate of matrices: take .002 for adamw")
    add("--reading_rate", type=number(float, 0, 1), default=1.0, help="share of the peak rates for reading")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", help="cpu, cuda or mps; auto takes the best there is")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="bfloat16 where it is fast")
    add("--compile", action="store_true", help="let torch.compile fuse the model; needs a compiler, a minute")
    add("--out_dir", help="folder of this run; left out, out/MODE-PARAPHRASES-CHANGED FLAGS-seedSEED")
    add("--resume", action="store_true", help="go on with the run in the folder; start it if there is none")
    args = parser.parse_args()

    mode = MODES[args.mode]
    if args.mask_ratio is not None and mode.ratio is None:
        parser.error(f"--mask_ratio {args.mask_ratio}: --mode {args.mode} masks nothing; leave it out")
    if args.mask_ratio == 0 and not mode.causal:
        parser.error("--mask_ratio 0 hides nothing, so diffusion has nothing to learn: use more than 0")
    parser.set_defaults(mask_ratio=mode.ratio, wordings=ARMS[args.paraphrases].wordings)
    args = parser.parse_args()  # again, with the defaults of this mode and arm
    if args.out_dir is None:
        named = ("mode", "paraphrases", "seed", "device", "dtype", "compile", "out_dir", "resume")
        changed = [k if value is True else f"{k}{value}" for k, value in vars(args).items()
                   if k not in named and value != parser.get_default(k)]
        args.out_dir = "out/" + "-".join([args.mode, args.paraphrases, *changed, f"seed{args.seed}"])
    if not args.out_dir.strip():
        parser.error("--out_dir is empty: name a folder")
    return args


# -----------------------------------------------------------------------------
# The run folder: one process at a time, and no file is ever half written


def lock(folder):
    """Make the folder and lock it until the returned object is closed or this process ends, however it ends.

    SQLite locks a file on every system, and the system lets go of it when the process is killed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
        database.execute("BEGIN EXCLUSIVE")
    except (OSError, sqlite3.Error) as problem:
        why = "another run is at work there" if "locked" in str(problem) else problem
        raise Stop(f"{folder} cannot be used ({why}): choose another --out_dir")
    for name in ("ckpt.pt", "log.jsonl", "result.json"):
        for left_behind in folder.glob(f"{name}.*.tmp"):  # by a process that was killed while it wrote
            left_behind.unlink()
    return contextlib.closing(database)


def write(path, content):
    """Write bytes so that `path` holds what stood there or the new content, never half of it, even if this
    process is killed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may write the same base
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise Stop(f"{path} could not be written ({problem}): what stood there is intact; make room, then "
                   "repeat the command with --resume")


def code():
    """A hash of the files that training runs through (data.py has one of its own: the corpus's digest)."""
    texts = (Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
             for name in ("model", "diffusion", "train"))
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:12]


def base_path(settings, corpus):
    """The file that school saves, named after all that school depends on: no other run can mistake it."""
    school = MODES[settings["mode"]].school
    reading = ("mode", "steps", "no_replay", "new_share", "mask_ratio", "reading_rate", "exams")
    schooling = {k: v for k, v in settings.items() if k not in reading}
    schooling |= {"mode": school, "corpus": corpus.digest, "torch": torch.__version__,
                  "mask_ratio": MODES[school].ratio and settings["mask_ratio"]}  # None if never masked
    return BASES / f"{hashlib.sha256(json.dumps(schooling).encode()).hexdigest()[:12]}.pt"


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


def exam_steps(steps):
    """The start of reading, its end, and points between, closer together at the start."""
    return {round(steps * (i / EXAMS) ** 1.5) for i in range(EXAMS + 1)}


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


def describe(line, corpus):
    """The scores of one exam in a line, then a known and a new question with the answer it was given."""
    text = ["step {step:>5}   new: forward {forward:.2f} backward {backward:.2f}   known: forward "
            "{known_forward:.2f} backward {known_backward:.2f}".format(**line)]
    for name in ("known_backward", "backward"):
        question, truth = corpus.exams[name][0]
        text.append(f"    {question} -> {line['first_answer'][name]} [{truth}]")
    return "\n".join(text)


# -----------------------------------------------------------------------------


def train(stage, mode, steps, state, path, args, corpus, model):
    """One stage, "school" or "reading": from `state`, or from the checkpoint at `path` if there is one.

    Optimizers and generator are fresh at its start, so that a base which is reused changes nothing. Returns
    the state at its end: the step, what was spent, the running loss and the log of exams.
    """
    rows, starts = corpus.rows.to(args.device), corpus.starts.to(args.device)
    optimizers = make_optimizers(model, args.optimizer, args.lr)
    generator = torch.Generator().manual_seed(2 * args.seed + (stage == "reading"))
    exams = exam_steps(steps) if stage == "reading" else ()
    share = args.reading_rate if stage == "reading" else 1
    if path.exists():
        saved = load(path)
        restore(saved, corpus, model, path)
        state = {k: saved[k] for k in state}
        generator.set_state(saved["generator"])
        for optimizer, values in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(values)
        print(f"{stage} goes on from {path} at step {state['step']:,} of {steps:,}" if state["step"] < steps
              else f"{stage} is done: {path}")
    interrupted, saved_at = [], time.perf_counter()

    def interrupt(*_):
        """Ctrl-C: finish the step, then save and stop. A second one ends the program at once."""
        interrupted.append(True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    previous = signal.signal(signal.SIGINT, interrupt)

    def examine():
        line = {k: state[k] for k in state if k != "log"} | exam(model, mode, corpus)
        state["log"].append(line)
        progress.write(describe(line, corpus))

    def save():
        if state["log"]:  # before the checkpoint: a run that goes on writes the log anew from there
            write(path.with_name("log.jsonl"), "".join(json.dumps(x) + "\n" for x in state["log"]).encode())
        torch.save(state | {"settings": vars(args), "digest": corpus.digest, "model": model.state_dict(),
                            "optimizers": [o.state_dict() for o in optimizers],
                            "generator": generator.get_state()}, content := io.BytesIO())
        write(path, content.getvalue())

    with tqdm(total=steps, initial=state["step"], desc=stage, unit="step", dynamic_ncols=True) as progress:
        if exams and not state["log"]:
            examine()
        while state["step"] < steps:
            # one step of training: all that the objectives share
            clock = time.perf_counter()
            for optimizer, peak in zip(optimizers, (args.lr, EMBEDDING_LR)):
                optimizer.param_groups[0]["lr"] = share * peak * schedule(state["step"], steps)
            index = batch(corpus, stage, args, generator).to(args.device)
            tokens = rows[index]  # (B, T)
            inputs, targets, weights = MODES[mode].objective(
                tokens, starts[index], MARKS, args.mask_ratio, generator)
            value = loss(model, inputs, targets, weights)
            value.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            # what it cost, what it brought
            value = value.item()
            if not math.isfinite(value) or not model.embed.weight.isfinite().all():
                raise Stop(f"the loss is {value} at step {state['step']} of {stage}: {path} keeps the last "
                           "good state, if one was saved; lower --lr and choose another --out_dir")
            read, scored = int((inputs != MARKS.pad).sum()), int((weights > 0).sum())
            seconds = time.perf_counter() - clock
            spent = {"step": 1, "seconds": seconds, "documents": int((tokens[:, 0] == MARKS.doc).sum()),
                     "tokens": read, "supervised": scored, "flops": model.flops(*inputs.shape, scored)}
            state |= {name: state[name] + amount for name, amount in spent.items()}
            state["loss"] = value if state["loss"] is None else 0.95 * state["loss"] + 0.05 * value
            progress.set_postfix_str(f"loss {state['loss']:.3f}, {read / seconds:,.0f} tokens/s", False)
            progress.update()

            step, ends = state["step"], state["step"] == steps
            if step in exams:
                examine()
            if step in exams or ends or interrupted or time.perf_counter() - saved_at > SAVE_EVERY:
                save()
                saved_at = time.perf_counter()
            if interrupted:
                raise Stop(f"stopped at step {step} of {stage}, nothing is lost: --resume goes on")
    signal.signal(signal.SIGINT, previous)
    return state


@one_line()
def main():
    args = parse_args()
    sys.stdout.reconfigure(errors="replace")  # some terminals have no sign for a bar
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one seed, one result, on a GPU too
    settings = vars(args)  # all that decides the result, once these two are taken out
    folder, resume = Path(settings.pop("out_dir")), settings.pop("resume")
    settings |= {"embedding_lr": EMBEDDING_LR, "weight_decay": WEIGHT_DECAY, "exams": EXAMS, "code": code(),
                 "question_share": QUESTION_SHARE, "new_share": NEW_SHARE}
    corpus, model, why = make_world(settings)
    torch.use_deterministic_algorithms(args.device == "cuda", warn_only=True)
    model.initialize(torch.Generator().manual_seed(args.seed))
    if args.compile:
        model.trunk = torch.compile(model.trunk, dynamic=True)
    size = sum(p.numel() for p in model.parameters())
    path, finished = folder / "ckpt.pt", folder / "result.json"

    with lock(folder):
        if finished.exists() and not path.exists():
            raise Stop(f"{finished} is of a run whose checkpoint is gone: move it away, "
                       "or choose another --out_dir")
        before = load(path)["settings"] if path.exists() else settings
        if path.exists() and not resume:
            raise Stop(f"{folder} holds a run: add --resume to go on with it, or choose another --out_dir")
        for name, value in settings.items():
            if before.get(name) != value:
                raise Stop(f"{folder} was trained with {name} = {before.get(name)}, not {value}: "
                           "undo that change, or choose another --out_dir")
        print(f"{args.mode}: {size:,} parameters, {args.dtype} on {args.device} ({why})")
        print(f"{args.known} known and {args.new} new people, "
              f"{len(corpus.groups['new_documents']) // args.new} text(s) each; writing to {folder}")
        state = {"step": 0, "seconds": 0.0} | dict.fromkeys(AXES, 0) | {"loss": None, "log": []}
        if args.school_steps and not path.exists():
            school, base = MODES[args.mode].school, base_path(settings, corpus)
            spent = train("school", school, args.school_steps, state, base, args, corpus, model)
            state = spent | {"step": 0, "loss": None}
        log = train("reading", args.mode, args.steps, state, path, args, corpus, model)["log"]
        if not finished.exists():
            gpu = args.device == "cuda" and torch.cuda.get_device_name()
            result = {"settings": settings, "exam": log[-1], "before": log[0], "log": log,
                      "cost": costs(log), "chance": chance(corpus), "parameters": size,
                      "ranking": ranking(model, args.mode, corpus),
                      "hardware": gpu or f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
                      "versions": {"python": platform.python_version(), "torch": torch.__version__}}
            write(finished, json.dumps(result, indent=1).encode())
        print(report(load(finished)))


if __name__ == "__main__":
    main()
