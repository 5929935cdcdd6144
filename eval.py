"""
The exam: questions in both directions, greedy answers, exact match. And the table that compares all runs.

    python eval.py                     one table of all finished runs under out/
    python eval.py out/RUN             examine a run again, from its checkpoint alone
    python eval.py out/RUN --ask "What is the birth city of Curtis Chase Emley?"
    python eval.py out/RUN --show      watch a diffusion model fill its masks, one a step
"""
import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch

from data import ATTRIBUTES, CANVAS, MARKS, POOLS, TOKENIZER, decode, encode, make_corpus, pad_rows, question_row
from diffusion import DECODERS, decode_diffusion
from model import ModelConfig, Transformer

LONGEST = 200  # tokens of a question that --ask takes


def fail(message):
    """End the program with one line and exit code 2, as argparse does for a wrong flag."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# -----------------------------------------------------------------------------
# The machine: device and number format


def pick_device(device):
    """'auto' or a torch device name -> (torch.device, the reason in words)."""
    if device != "auto":
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError):
            fail(f"--device {device}: torch {torch.__version__} cannot use it here; try --device auto")
        return torch.device(device), "asked for"
    if torch.cuda.is_available():
        return torch.device("cuda"), "a CUDA GPU was found"
    if torch.backends.mps.is_available():
        return torch.device("mps"), "an Apple GPU was found"
    return torch.device("cpu"), "no GPU was found"


def pick_dtype(dtype, device):
    """'auto' or 'float32' or 'bfloat16' -> (the format of matrix products, the reason). Weights stay float32."""
    if dtype != "auto":
        return getattr(torch, dtype), "asked for"
    fast = {"cuda": torch.cuda.is_bf16_supported, "cpu": lambda: torch.cpu.get_capabilities().get("avx512_bf16")}
    if device.type in fast and fast[device.type]():
        return torch.bfloat16, f"this {device.type} computes with it"
    return torch.float32, f"this {device.type} has no fast bfloat16"


def mixed(device, dtype):
    """The context in which a model runs: matrix products in `dtype`, everything delicate in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


# -----------------------------------------------------------------------------
# The exam


def answers(model, mode, questions, device, dtype, batch=256):
    """Greedy answers (list of str) to questions (list of str). Every question gets the same canvas of masks."""
    result = []
    for i in range(0, len(questions), batch):
        tokens, starts = pad_rows([question_row(q) for q in questions[i:i + batch]])
        with mixed(device, dtype):
            out = DECODERS[mode](model, tokens.to(device), starts.to(device), CANVAS, MARKS)
        result += [decode(ids) for ids in out.tolist()]
    return result


def exam(model, mode, corpus, device, dtype):
    """Share of exact answers in each of the corpus's exams, and for new people's forward one by attribute."""
    scores = {}
    for name, pairs in corpus.exams.items():
        given = answers(model, mode, [question for question, _ in pairs], device, dtype)
        right = [answer == truth for answer, (_, truth) in zip(given, pairs)]
        scores[name] = statistics.fmean(right)
        if name == "forward":
            n = len(ATTRIBUTES)  # the questions come person by person, in the order of ATTRIBUTES
            scores["forward_by_attribute"] = {a: statistics.fmean(right[i::n]) for i, a in enumerate(ATTRIBUTES)}
    return scores


def chance(corpus):
    """What knows nothing scores: a value drawn from its pool, a name drawn from all people; and the best that
    one fixed answer to each kind of question would score in this exam (`majority`)."""
    n = len(ATTRIBUTES)
    truths = [[truth for _, truth in corpus.exams["forward"][i::n]] for i in range(n)]
    names = [name for _, name in corpus.exams["backward"]]
    most = lambda values: Counter(values).most_common(1)[0][1] / len(values)
    return {"forward": statistics.fmean(1 / len(pool) for pool in POOLS.values()),
            "backward": 1 / len(corpus.people),
            "majority_forward": statistics.fmean(map(most, truths)), "majority_backward": most(names)}


# -----------------------------------------------------------------------------
# Runs on disk


def load_checkpoint(path):
    """The dict that train.py saved; a clear end of the program if the file is missing or is not one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
        checkpoint["settings"], checkpoint["model"], checkpoint["digest"]
        return checkpoint
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        fail(f"{path} is missing: train first, or name another run folder")
    except Exception:
        fail(f"{path} is cut short or is not a checkpoint of this project: delete it and train again")


def make_world(settings):
    """The corpus that the settings of a run describe."""
    try:
        return make_corpus(settings["known"], settings["new"], settings["paraphrases"], settings["wordings"],
                           settings["seed"])
    except ValueError as problem:
        fail(f"--known / --new: {problem}")


def make_model(settings):
    """An untrained model of the shape that the settings of a run describe."""
    try:
        config = ModelConfig(TOKENIZER.n_vocab, settings["n_layer"], settings["n_head"], settings["n_embd"],
                             causal=settings["mode"] != "diffusion", pad=MARKS.pad)
    except ValueError as problem:
        fail(f"--n_embd / --n_head: {problem}")
    return Transformer(config)


def read_results(folder):
    """[result.json as a dict] of every finished run in `folder`."""
    results = []
    for path in sorted(Path(folder).glob("*/result.json")):
        try:
            results.append(json.loads(path.read_text(encoding="utf-8")))
            results[-1]["settings"], results[-1]["exam"], results[-1]["before"], results[-1]["chance"]
        except (ValueError, TypeError, KeyError):
            fail(f"{path} is cut short or is not a result of this project: delete it and train again")
    return results


# -----------------------------------------------------------------------------
# Tables


def bar(share, width=10):
    """A share as a bar of text: bar(.5) is half full."""
    full = round(share * width)
    return "█" * full + "·" * (width - full)


def report(result):
    """The table at the end of a run: new people beside known people, the start and chance."""
    after, before, luck = result["exam"], result["before"], result["chance"]
    rows = [("new people", after["forward"], after["backward"]),
            ("  before reading", before["forward"], before["backward"]),
            ("  chance", luck["forward"], luck["backward"]),
            ("known people", after["known_forward"], after["known_backward"])]
    lines = [f"{'exact match':<18}{'name -> attribute':<22}attributes -> name"]
    lines += [f"{label:<18}{f:.2f} {bar(f)}       {b:.2f} {bar(b)}" for label, f, b in rows]
    each = "  ".join(f"{name} {share:.2f}" for name, share in after["forward_by_attribute"].items())
    return "\n".join(lines + [f"forward, by attribute: {each}"])


def compare(results):
    """One line for each setting, seeds averaged: mean, ± standard deviation over seeds, n seeds."""
    same = ("seed", "out_dir", "device", "dtype", "compile", "resume", "threads")
    groups = {}
    for result in results:
        key = {k: v for k, v in result["settings"].items() if k not in same}
        groups.setdefault(json.dumps(key), []).append(result)
    keys = [json.loads(group) for group in groups]
    differ = [k for k in keys[0] if len({json.dumps(key.get(k)) for key in keys}) > 1]
    shown = ["mode", "paraphrases"] + [k for k in differ if k not in ("mode", "paraphrases")]

    def cell(runs, part, name):
        values = [run[part][name] for run in runs]
        spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread}", statistics.fmean(values)

    table = [shown + ["seeds", "forward", "", "backward", "", "known fwd", "known bwd", "before", "chance"]]
    for key, runs in zip(keys, groups.values()):
        (forward, f), (backward, b) = cell(runs, "exam", "forward"), cell(runs, "exam", "backward")
        pair = lambda part: f"{cell(runs, part, 'forward')[1]:.2f}/{cell(runs, part, 'backward')[1]:.3f}"
        table.append([str(key.get(k)) for k in shown] + [str(len(runs)), forward, bar(f), backward, bar(b)]
                     + [cell(runs, "exam", "known_forward")[0], cell(runs, "exam", "known_backward")[0],
                        pair("before"), pair("chance")])
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths)).rstrip() for row in table)


# -----------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Compare runs, examine one again, ask it, or watch it.")
    parser.add_argument("run", nargs="?", help="folder of one run, such as out/masked-none-seed0; leave it out to "
                        "compare all runs")
    parser.add_argument("--ask", metavar="QUESTION", help="a question in the exam's wording, answered by the run")
    parser.add_argument("--show", action="store_true", help="print each step of a diffusion model's answer, to --ask "
                        "or to one question of each direction")
    parser.add_argument("--out", default="out", help="where to look for runs to compare")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps; auto takes the best there is")
    args = parser.parse_args()

    if args.run is None:
        if args.ask is not None or args.show:
            fail("--ask and --show need a run folder: python eval.py out/RUN --ask \"...\"")
        results = read_results(args.out)
        if not results:
            fail(f"no finished run under {args.out}/: start with python train.py --mode masked")
        return print(compare(results))

    checkpoint = load_checkpoint(Path(args.run) / "ckpt.pt")
    settings = checkpoint["settings"]
    corpus = make_world(settings)
    if corpus.digest != checkpoint["digest"]:
        fail(f"{args.run} was trained on another corpus than data.py now writes: train again, or restore data.py")
    device, _ = pick_device(args.device)
    dtype, _ = pick_dtype("auto", device)
    model = make_model(settings)
    model.load_state_dict(checkpoint["model"])
    model.to(device)
    mode = settings["mode"]

    if args.ask is not None and not args.ask.strip():
        fail("--ask is empty: put a question between quotes")
    if args.ask is not None and len(encode(args.ask)) > LONGEST:
        fail(f"--ask is {len(encode(args.ask)):,} tokens long: ask in at most {LONGEST}")
    if args.show:
        if mode != "diffusion":
            fail(f"--show needs a diffusion run; {args.run} was trained with --mode {mode}")
        questions = [args.ask] if args.ask else [corpus.exams[name][0][0] for name in ("forward", "backward")]
        for question in questions:
            tokens, starts = pad_rows([question_row(question)])
            print(question)
            decode_diffusion(model, tokens.to(device), starts.to(device), CANVAS, MARKS,
                             watch=lambda rows: print("   ", TOKENIZER.decode(rows[0, int(starts[0]):].tolist())))
    elif args.ask is not None:
        print(answers(model, mode, [args.ask], device, dtype)[0])
    else:
        before = next(line for line in checkpoint["log"] if line["stage"] == "reading")
        print(report({"exam": exam(model, mode, corpus, device, dtype), "before": before, "chance": chance(corpus)}))


if __name__ == "__main__":
    main()
