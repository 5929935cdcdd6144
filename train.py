"""
School, reading, exam: train one small transformer with one of three objectives and examine it in two directions.

    python train.py --mode masked       learns new people from documents alone, and knows them in both directions
    python train.py --mode ar           the same model, documents and budget: it cannot say who was born in Elkton
    python train.py --mode diffusion    the bidirectional model that fills in masks

School (--school_steps) trains a base model on known people, documents and questions. Reading (--steps) adds the
documents of new people, never a question about them, while known people are replayed. --school_steps 0 starts
reading from an untrained model. The objectives differ in mask and loss alone; everything here is shared:

    rows, starts = batch(...)                                               clean rows
    inputs, targets, weights = OBJECTIVES[mode](rows, starts, ...)          what is seen, what is asked
    loss(model, inputs, targets, weights).backward()                        one weighted cross-entropy
    optimizer.step()
"""
import argparse
import hashlib
import json
import math
import os
import platform
import signal
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import ARMS, MARKS, WORDINGS
from diffusion import OBJECTIVES, loss
from eval import (answers, chance, exam, fail, load_checkpoint, make_model, make_world, mixed, pick_device, pick_dtype,
                  report)

EMBEDDING_LR = 0.04     # AdamW on the embedding; at .002 facts are learned at least twice as late (README, notes)
WEIGHT_DECAY = 1.0      # on the matrices; at .3 and at 3 fewer new people are known (README, notes)
EXAMS = 10              # during reading, closer together at its start


def number(kind, low, high=math.inf):
    """An argparse type: a number of this kind from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: from {low:g} to {high:g}")
        return value
    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def ratio(text):
    """An argparse type: 'uniform', 'paper' or a number from 0 to 1."""
    return text if text in ("uniform", "paper") else number(float, 0, 1)(text)


def parse_args():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Train on generated biographies, then take the exam.")
    add = parser.add_argument_group("what is compared").add_argument
    add("--mode", choices=OBJECTIVES, default="masked", help="the objective: next token, masked diffusion, or masked "
        "fine-tuning of the next-token model")
    add("--paraphrases", choices=ARMS, default="none", help="texts a person: one; five in one order of facts; five "
        "in changing order, name first; five in changing order, name anywhere")
    add("--mask_ratio", type=ratio, default="uniform", help="how much a row is masked: k ~ U{1..L}, a fixed share "
        "such as .5, or the paper's U(.05, .95)")
    add = parser.add_argument_group("the world").add_argument
    add("--known", type=number(int, 1), default=200, help="people with questions in training; more make the skill of "
        "answering more general, and take longer to learn")
    add("--new", type=number(int, 1), default=100, help="people with documents alone, who are the exam")
    add("--wordings", type=number(int, 1, 10), help="ways to word a fact; more are closer to real text and need more "
        "people and steps; left out, 1 without paraphrases and 5 with them")
    add("--seed", type=number(int, 0), default=0, help="people, texts, weights, batches and masks all follow from it")
    add = parser.add_argument_group("the model").add_argument
    add("--n_layer", type=number(int, 1), default=3, help="blocks")
    add("--n_head", type=number(int, 1), default=2, help="attention heads")
    add("--n_embd", type=number(int, 2), default=128, help="channels; raise with --known")
    add = parser.add_argument_group("training").add_argument
    add("--school_steps", type=number(int, 0), default=500, help="steps on known people alone, before the new people")
    add("--steps", type=number(int, 1), default=1500, help="steps of reading; raise if the loss still falls")
    add("--batch_size", type=number(int, 4), default=64, help="rows a step; lower if out of memory")
    add("--question_share", type=number(float, 0, 0.9), default=0.16, help="share of the rows that are questions about "
        "known people; many are memorised and then teach nothing")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="for the matrices inside the blocks; the "
        "embedding always has AdamW")
    add("--lr", type=number(float, 0), default=0.02, help="peak rate of the matrices, decaying to zero; with adamw use "
        "about .002")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", help="cpu, cuda or mps; auto takes the best there is")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="format of the matrix products; auto "
        "takes bfloat16 where it is fast")
    add("--compile", action="store_true", help="let torch.compile fuse the model; needs a compiler and a minute")
    add("--out_dir", help="folder of this run; left out, out/MODE-PARAPHRASES-seedSEED")
    add("--resume", action="store_true", help="go on with the run in the folder, stopped or killed before its end")
    args = parser.parse_args()
    if args.mode == "diffusion" and args.mask_ratio == 0:
        parser.error("--mask_ratio 0 hides nothing, so diffusion has nothing to learn: use more than 0")
    if args.wordings is None:
        args.wordings = 1 if args.paraphrases == "none" else 5
    if args.paraphrases == "same" and args.wordings == 1:
        parser.error("--paraphrases same with --wordings 1 is one text five times: use 2 wordings or more")
    if args.question_share * args.batch_size > args.batch_size - 2:
        parser.error("--question_share leaves no row for documents: lower it, or raise --batch_size")
    return args


def write_atomically(path, write):
    """Call `write(temporary path)`, then move the file into place: `path` is never half written."""
    temporary = path.with_suffix(".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:  # torch.save reports a full disk as a RuntimeError
        fail(f"{path} could not be written ({str(problem).splitlines()[0]}): what stood there is intact; make room and "
             "repeat the command with --resume")


def make_optimizers(model, name, lr):
    """Muon (or AdamW) on the matrices inside the blocks, AdamW on the embedding."""
    matrices = list(model.blocks.parameters())
    adamw = lambda params, lr, decay: torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=decay)
    muon = lambda params, lr, decay: torch.optim.Muon(params, lr, momentum=0.95, weight_decay=decay)
    return [{"muon": muon, "adamw": adamw}[name](matrices, lr, WEIGHT_DECAY), adamw([model.embed.weight], EMBEDDING_LR, 0)]


def schedule(step, steps):
    """Share of the peak rate at a step from 0 to steps - 1: 2 % warm-up, then a straight line to zero."""
    return min((step + 1) / (0.02 * steps + 1), 1 - step / steps)


def exam_steps(school_steps, steps):
    """The steps with an exam: the end of school, the end of reading, and points between, closer at the start."""
    return {school_steps + round(steps * (i / EXAMS) ** 1.5) for i in range(EXAMS + 1)}


def batch(corpus, stage, size, question_share, generator):
    """Indices (B,) of rows: questions about known people, documents of everybody.

    In school, documents of known people alone; in reading, half of them are those of new people. One question in
    five is backward: a person has three times as many of those, and they are learned sooner.
    """
    questions = round(size * question_share)
    backward = round(questions / 5)
    new = 0 if stage == "school" else (size - questions) // 2
    counts = {"known_documents": size - questions - new, "new_documents": new,
              "forward": questions - backward, "backward": backward}
    rows = {group: corpus.groups[group] for group in counts}
    return torch.cat([torch.randint(rows[group].start, rows[group].stop, (n,), generator=generator)
                      for group, n in counts.items()])


def describe(line, corpus, ask):
    """The scores of one exam in a line, then a known and a new question with the answer that `ask` gives."""
    text = [f"{line['stage']} {line['step']:>5}   new: forward {line['forward']:.2f} backward {line['backward']:.2f}   "
            f"known: forward {line['known_forward']:.2f} backward {line['known_backward']:.2f}"]
    for name in ("known_backward", "backward"):
        question, truth = corpus.exams[name][0]
        text.append(f"    {question} -> {ask(question)} [{truth}]")
    return "\n".join(text)


def hardware(device):
    """The name of what computed, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def find_start(args, settings, digest, folder, base):
    """The checkpoint to go on from: the run's own with --resume, a base that fits, or None to start afresh."""
    own = folder / "ckpt.pt"
    if not args.resume:
        if own.exists():
            fail(f"{folder} holds a run already: add --resume to go on with it, or choose another --out_dir")
        return load_checkpoint(base) if args.school_steps and base.exists() else None
    saved = load_checkpoint(own)
    for name, value in settings.items():
        if saved["settings"].get(name) != value:
            fail(f"{folder} was trained with --{name} {saved['settings'].get(name)}, not {value}: give the same value, "
                 "or another --out_dir")
    if saved["digest"] != digest:
        fail(f"{folder} was trained on another corpus than data.py now writes: restore data.py, or train anew")
    return saved


def main():
    args = parse_args()
    device, why_device = pick_device(args.device)
    dtype, why_dtype = pick_dtype(args.dtype, device)
    settings = {k: v for k, v in vars(args).items() if k not in ("out_dir", "resume")}
    settings |= {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    corpus, model = make_world(settings), make_model(settings)
    model.initialize(torch.Generator().manual_seed(args.seed)).to(device)
    rows, starts = corpus.rows.to(device), corpus.starts.to(device)

    # A base is named after everything that school depends on, so that no other run can take it by mistake.
    folder = Path(args.out_dir or f"out/{args.mode}-{args.paraphrases}-seed{args.seed}")
    school_mode = "diffusion" if args.mode == "diffusion" else "ar"
    schooling = {k: v for k, v in settings.items() if k not in ("mode", "steps")}
    schooling |= {"mode": school_mode, "mask_ratio": args.mask_ratio if school_mode == "diffusion" else None,
                  "digest": corpus.digest, "torch": torch.__version__}
    base = folder.parent / "bases" / f"{hashlib.sha256(json.dumps(schooling).encode()).hexdigest()[:12]}.pt"

    # What a checkpoint holds besides weights and optimizers: where the run is, and what it has spent so far.
    state = {"step": 0, "seconds": 0.0, "tokens": 0, "supervised": 0, "documents": 0, "loss": None, "log": []}
    saved = find_start(args, settings, corpus.digest, folder, base)
    if saved:
        model.load_state_dict(saved["model"])
        state = {k: saved[k] for k in state}
    if args.compile:
        model.trunk = torch.compile(model.trunk, dynamic=True)
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    except OSError as problem:
        fail(f"--out_dir {folder} cannot be made: {problem.strerror}; choose another")

    print(f"{args.mode}: {sum(p.numel() for p in model.parameters()):,} parameters on {device.type} ({why_device}), "
          f"{settings['dtype']} ({why_dtype})")
    print(f"{args.known} known and {args.new} new people, {len(corpus.groups['new_documents']) // args.new} text(s) "
          f"each; writing to {folder}")
    if saved:
        print(f"going on from {folder / 'ckpt.pt' if args.resume else base} at step {state['step']}")

    def save(path, **more):
        write_atomically(path, lambda p: torch.save(
            state | {"settings": settings, "digest": corpus.digest, "model": model.state_dict()} | more, p))

    def save_run():
        write_atomically(folder / "log.jsonl", lambda p: p.write_text(
            "".join(json.dumps(line) + "\n" for line in state["log"]), encoding="utf-8"))
        save(folder / "ckpt.pt", generator=generator.get_state(), optimizers=[o.state_dict() for o in optimizers])

    def start_stage(step):
        """Fresh optimizers and a fresh generator for each stage: a base that is reused changes nothing."""
        optimizers = make_optimizers(model, args.optimizer, args.lr)
        return optimizers, torch.Generator().manual_seed(2 * args.seed + (step >= args.school_steps))

    total, exams = args.school_steps + args.steps, exam_steps(args.school_steps, args.steps)
    optimizers, generator = start_stage(state["step"])
    if args.resume:
        generator.set_state(saved["generator"])
        for optimizer, values in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(values)
    interrupted = []
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))  # finish the step, then save and stop
    progress = tqdm(total=total, initial=state["step"], unit="step", mininterval=0.5, dynamic_ncols=True)

    for step in range(state["step"], total + 1):
        stage = "school" if step < args.school_steps else "reading"
        mode = school_mode if stage == "school" else args.mode
        state["step"] = step
        if step == args.school_steps and step > 0 and not base.exists():
            save(base)
        if step == args.school_steps:
            optimizers, generator = start_stage(step)
        if step in exams and not (state["log"] and state["log"][-1]["step"] == step):
            line = {"stage": stage} | {k: state[k] for k in state if k != "log"} | exam(model, mode, corpus, device, dtype)
            state["log"].append(line)
            progress.write(describe(line, corpus, lambda q: answers(model, mode, [q], device, dtype)[0]))
            save_run()
        if step == total:
            break
        if interrupted:
            save_run()
            progress.close()
            fail(f"stopped at step {step}, nothing is lost: repeat the command with --resume to go on")

        # one step of training: all that the objectives share
        clock, in_school = time.time(), step < args.school_steps
        rate = schedule(step, args.school_steps) if in_school else schedule(step - args.school_steps, args.steps)
        for optimizer, peak in zip(optimizers, (args.lr, EMBEDDING_LR)):
            optimizer.param_groups[0]["lr"] = peak * rate
        index = batch(corpus, stage, args.batch_size, args.question_share, generator).to(device)
        inputs, targets, weights = OBJECTIVES[mode](rows[index], starts[index], MARKS, args.mask_ratio, generator)
        with mixed(device, dtype):
            value = loss(model, inputs, targets, weights)
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        value, tokens = value.item(), int((inputs != MARKS.pad).sum())
        if not math.isfinite(value):
            fail(f"the loss is {value} at step {step}: {folder / 'ckpt.pt'} holds the last exam's state; lower --lr")
        state["loss"] = value if state["loss"] is None else 0.95 * state["loss"] + 0.05 * value
        state["seconds"] += time.time() - clock
        state["tokens"] += tokens
        state["supervised"] += int((weights > 0).sum())
        state["documents"] += int((rows[index, 0] == MARKS.doc).sum())
        progress.update()
        progress.set_description(stage, refresh=False)
        progress.set_postfix_str(f"loss {state['loss']:.3f}, {tokens / (time.time() - clock):,.0f} tokens/s", refresh=False)

    progress.close()
    result = {"exam": state["log"][-1], "before": state["log"][0], "chance": chance(corpus), "settings": settings,
              "parameters": sum(p.numel() for p in model.parameters()), "hardware": hardware(device),
              "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    write_atomically(folder / "result.json", lambda p: p.write_text(json.dumps(result, indent=1), encoding="utf-8"))
    print(report(result))


if __name__ == "__main__":
    main()
