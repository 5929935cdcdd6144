"""
The exam: questions in both directions, greedy answers, exact match. And the tables that compare all runs.

    python eval.py                     one table of all finished runs under out/
    python eval.py --costs             what it cost them to get there: documents, tokens, FLOPs
    python eval.py out/RUN             examine a run again, from its checkpoint alone
    python eval.py out/RUN --ask "What is the birth city of Curtis Chase Emley?"
    python eval.py out/RUN --show      watch a diffusion model fill its masks, one a step
"""
import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import torch

from data import (ATTRIBUTES, CANVAS, MARKS, POOLS, TOKENIZER, decode, encode, make_corpus, pad_rows,
                  question_row)
from diffusion import MODES
from model import ModelConfig, Transformer, mixed, pick_machine

LONGEST = 200                           # tokens of a question that --ask takes
DIRECTIONS = ("forward", "backward")    # name -> attribute, attributes -> name
WORLD = ("known", "new", "paraphrases", "wordings", "seed")     # the settings that make a corpus
SHAPE = ("n_layer", "n_head", "n_embd")                         # and a model
AXES = {"documents": 1e3, "tokens": 1e6, "supervised": 1e6, "flops": 1e12}  # of cost, and the unit of each


def fail(message):
    """End the program with one line and exit code 2, as argparse does for a wrong flag."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# -----------------------------------------------------------------------------
# The exam


def answers(model, mode, questions, device, dtype, batch=256, **watch):
    """Greedy answers (list of str) to questions (list of str). Every question gets the same canvas."""
    result = []
    for i in range(0, len(questions), batch):
        tokens, starts = pad_rows([question_row(q) for q in questions[i:i + batch]])
        with mixed(device, dtype):
            out = MODES[mode].decode(model, tokens.to(device), starts.to(device), CANVAS, MARKS, **watch)
        result += [decode(ids) for ids in out.tolist()]
    return result


def rouge(answer, truth):
    """ROUGE-1 recall, the paper's score: the share of the truth's words that stand in the answer.

    rouge("Curtis Lane Emley", "Curtis Chase Emley") = 2/3, where exact match gives 0.
    """
    return (Counter(answer.split()) & Counter(truth.split())).total() / len(truth.split())


def exam(model, mode, corpus, device, dtype):
    """Exact match and ROUGE-1 recall in each of the corpus's exams; forward exact match by attribute."""
    scores, n = {"rouge": {}}, len(ATTRIBUTES)
    for name, pairs in corpus.exams.items():
        given = answers(model, mode, [question for question, _ in pairs], device, dtype)
        right = [a == truth for a, (_, truth) in zip(given, pairs)]
        scores[name] = fmean(right)
        scores["rouge"][name] = fmean(rouge(a, truth) for a, (_, truth) in zip(given, pairs))
        if name == "forward":  # the questions come person by person, in the order of ATTRIBUTES
            scores["forward_by_attribute"] = {a: fmean(right[i::n]) for i, a in enumerate(ATTRIBUTES)}
    return scores


def ranking(model, mode, corpus, device, dtype, asked=100):
    """Without any decoding: is the true answer likelier than the answers of the other new people?

    -> {direction: {"first": how often it is the likeliest, "mrr": the mean of 1 / its rank, and both as
    chance gives them}}, over a fixed sample of the exam's questions.
    """
    result = {}
    for direction, kinds in zip(DIRECTIONS, (len(ATTRIBUTES), 1)):
        pairs, ranks, sizes = corpus.exams[direction], [], []
        for i in random.Random(0).sample(range(len(pairs)), min(asked, len(pairs))):
            question, truth = pairs[i]
            candidates = sorted({answer for _, answer in pairs[i % kinds::kinds]})  # of the same kind
            tokens, starts = pad_rows([question_row(question, answer) for answer in candidates])
            with mixed(device, dtype):
                p = MODES[mode].likelihood(model, tokens.to(device), starts.to(device), MARKS)
            true = p[candidates.index(truth)]
            ranks.append(((p > true).sum() + ((p == true).sum() + 1) / 2).item())  # equals share their ranks
            sizes.append(len(candidates))
        result[direction] = {
            "first": fmean(rank == 1 for rank in ranks), "chance_first": fmean(1 / n for n in sizes),
            "mrr": fmean(1 / rank for rank in ranks),
            "chance_mrr": fmean(fmean(1 / rank for rank in range(1, n + 1)) for n in sizes)}
    return result


def chance(corpus):
    """What knows nothing scores: a value drawn from its pool, a name drawn from all people; and the best that
    one fixed answer to each kind of question would score in this exam (`majority`)."""
    n = len(ATTRIBUTES)
    most = lambda pairs: Counter(truth for _, truth in pairs).most_common(1)[0][1] / len(pairs)
    return {"forward": fmean(1 / len(pool) for pool in POOLS.values()), "backward": 1 / len(corpus.people),
            "majority_forward": fmean(most(corpus.exams["forward"][i::n]) for i in range(n)),
            "majority_backward": most(corpus.exams["backward"])}


# -----------------------------------------------------------------------------
# Runs on disk


def make_world(settings):
    """The corpus and the untrained model that the settings of a run describe; ValueError if there is none."""
    corpus = make_corpus(*(settings[k] for k in WORLD))
    sizes, causal = [settings[k] for k in SHAPE], MODES[settings["mode"]].causal
    return corpus, Transformer(ModelConfig(TOKENIZER.n_vocab, *sizes, causal, MARKS.pad))


def load_checkpoint(path):
    """The dict that train.py saved; a clear end of the program if the file is missing or is not one."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
        state = {"step", "seconds", "loss", "log", *AXES}
        complete = {"settings", "digest", "model", "optimizers", "generator"} | state <= saved.keys()
        if not complete or not {*WORLD, *SHAPE, "mode", "dtype"} <= saved["settings"].keys():
            raise ValueError("another version")
        return saved
    except OSError as problem:
        fail(f"{path} is missing or cannot be read ({problem.strerror}): train first, or name another folder")
    except Exception:
        fail(f"{path} is cut short, of another version or no checkpoint at all: delete it and train again")


def restore(saved, corpus, model, path):
    """Put the weights of a checkpoint into the model, if data.py and model.py are still as they were."""
    if saved["digest"] != corpus.digest:
        fail(f"{path} was trained on another corpus than data.py now writes: restore data.py, or train again")
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError:
        fail(f"{path} holds the weights of another model than model.py now makes: train again")


def read_result(path):
    """The dict in a result.json that train.py wrote; a clear end of the program if it is not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if {"settings", "log", "exam", "before", "chance", "ranking"} <= result.keys():
            return result
    except (OSError, ValueError, AttributeError):
        pass
    fail(f"{path} is cut short, of another version or no result at all: delete it, then repeat with --resume")


# -----------------------------------------------------------------------------
# Tables


def bar(share, width=10):
    """A share as a bar of text: bar(.5) is half full."""
    full = round(share * width)
    return "█" * full + "·" * (width - full)


def report(result):
    """The table at the end of a run: new people beside known people, the start and chance."""
    exam = result["exam"]
    lines = [f"{'exact match':<18}{'name -> attribute':<22}attributes -> name"]
    for label, scores in (("new people", exam), ("  before reading", result["before"]),
                          ("  chance", result["chance"]), ("  ROUGE-1 recall", exam["rouge"]),
                          ("known people", {d: exam[f"known_{d}"] for d in DIRECTIONS})):
        f, b = (scores[d] for d in DIRECTIONS)
        lines.append(f"{label:<18}{f:.2f} {bar(f)}       {b:.2f} {bar(b)}")
    each = "  ".join(f"{name} {share:.2f}" for name, share in exam["forward_by_attribute"].items())
    return "\n".join(lines + [f"forward, by attribute: {each}"])


def group(results):
    """[(the settings in which runs differ, the runs that differ in seed alone: one for each seed)]."""
    groups = {}
    for result in results:
        key = {k: v for k, v in result["settings"].items() if k not in ("seed", "device", "dtype", "compile")}
        groups.setdefault(json.dumps(key, sort_keys=True), {})[result["settings"]["seed"]] = result
    keys = [json.loads(key) for key in groups]
    differ = [k for k in keys[0] if len({str(key.get(k)) for key in keys}) > 1]
    shown = dict.fromkeys(["mode", "paraphrases", *differ])
    return [({k: str(key.get(k)) for k in shown}, list(runs.values()))
            for key, runs in zip(keys, groups.values())]


def spread(values, digits=2):
    """Mean ± standard deviation: spread([.4, .6]) = '0.50 ±0.14'; '-' if a value is None."""
    if None in values:
        return "-"
    deviation = f" ±{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def aligned(rows):
    """Rows (dicts with the same keys) as a text table under their keys."""
    cells = [list(rows[0])] + [list(row.values()) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in cells)


def compare(results):
    """Two tables with a line for each setting, mean ± standard deviation over seeds: exact match of new and
    of known people; other looks at the same runs. Pairs are forward / backward."""
    exact, other = [], []
    for key, runs in group(results):
        scores = {d: [run["exam"][d] for run in runs] for d in DIRECTIONS}
        both = lambda get: " / ".join(spread([get(run, d) for run in runs]) for d in DIRECTIONS)
        exact.append(key | {"seeds": str(len(runs))}
                     | {d: f"{bar(fmean(scores[d]))} {spread(scores[d], 3)}" for d in DIRECTIONS}
                     | {"known people": both(lambda run, d: run["exam"][f"known_{d}"])})
        other.append(key | {"ROUGE-1 recall": both(lambda run, d: run["exam"]["rouge"][d]),
                            "truth is likeliest": both(lambda run, d: run["ranking"][d]["first"]),
                            "reciprocal rank": both(lambda run, d: run["ranking"][d]["mrr"]),
                            "known before reading": both(lambda run, d: run["before"][f"known_{d}"])})
    mean = lambda part, name: fmean(result[part][name] for result in results)
    notes = [f"{what}: forward {mean(part, of + 'forward'):.3f}, backward {mean(part, of + 'backward'):.3f}"
             for what, part, of in (("before reading", "before", ""), ("chance", "chance", ""),
                                    ("one fixed answer", "chance", "majority_"))]
    return "\n".join([aligned(exact), *notes, "", aligned(other)])


def cost(log, axis, name, goal):
    """What reading had cost on an axis of the log when the score `name` first reached `goal`, on a straight
    line between two exams; 0 if the first exam did, None if none did."""
    points = [(line[axis] - log[0][axis], line[name]) for line in log]
    for (x0, y0), (x1, y1) in zip([(0, 0), *points], points):
        if y1 >= goal:
            return x1 if y1 == y0 else x0 + (x1 - x0) * (goal - y0) / (y1 - y0)


def costs(results):
    """One line for each setting and axis: what reading cost to score .5, and 95 % of its own last score (or
    .05, if that is more: a run that knows nothing gets there at once)."""
    rows = []
    for key, runs in group(results):
        for axis, unit in AXES.items():
            row = key | {"cost": f"{axis} / {unit:.0e}"}
            for d in DIRECTIONS:
                goals = {"to .5": lambda last: 0.5, "to 95 %": lambda last: max(0.05, 0.95 * last)}
                for title, goal in goals.items():
                    values = [cost(run["log"], axis, d, goal(run["log"][-1][d])) for run in runs]
                    row[f"{d} {title}"] = spread([value and value / unit for value in values])
            rows.append(row)
    return aligned(rows)


# -----------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description="Compare runs, examine one again, ask it, or watch it.")
    add = parser.add_argument
    add("run", nargs="?", help="folder of one run, such as out/masked-none-seed0; left out, all are compared")
    add("--costs", action="store_true", help="compare what the runs cost instead of what they know")
    add("--ask", metavar="QUESTION", help="let the run answer a question in the exam's wording")
    add("--show", action="store_true", help="print each step of a diffusion run's answer, to --ask or to one "
        "question of each direction")
    add("--out", default="out", help="where to look for runs to compare (default: out)")
    add("--device", default="auto", help="cpu, cuda or mps; auto takes the best there is (default: auto)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # some terminals have no sign for a bar

    if args.run is None:
        if args.ask is not None or args.show:
            fail("--ask and --show need a run folder: python eval.py out/RUN --ask \"...\"")
        results = [read_result(path) for path in sorted(Path(args.out).glob("*/result.json"))]
        if not results:
            fail(f"no finished run under {args.out}/: start with python train.py --mode masked")
        return print(costs(results) if args.costs else compare(results))
    if args.costs:
        fail("--costs compares all runs: leave the run folder out")
    if args.ask is not None and not args.ask.strip():
        fail("--ask is empty: put a question between quotes")
    if args.ask and len(encode(args.ask)) > LONGEST:
        fail(f"--ask is {len(encode(args.ask)):,} tokens long: ask in at most {LONGEST}")

    path = Path(args.run) / "ckpt.pt"
    saved = load_checkpoint(path)
    mode = saved["settings"]["mode"]
    try:
        device, dtype, _ = pick_machine(args.device, saved["settings"]["dtype"])
        corpus, model = make_world(saved["settings"])
    except ValueError as problem:
        fail(problem)
    restore(saved, corpus, model.to(device), path)

    if args.show:
        if MODES[mode].causal:
            fail(f"--show needs a diffusion run; {args.run} was trained with --mode {mode}")
        for question in [args.ask] if args.ask else [corpus.exams[d][0][0] for d in DIRECTIONS]:
            watch = lambda rows: print("   ", TOKENIZER.decode(rows[0, -CANVAS:].tolist()))
            print(question)
            answers(model, mode, [question], device, dtype, watch=watch)
    elif args.ask:
        print(answers(model, mode, [args.ask], device, dtype)[0])
    elif not saved["log"]:
        fail(f"{args.run} has not come to its first exam: go on with its command and --resume")
    else:
        print(report({"exam": exam(model, mode, corpus, device, dtype), "before": saved["log"][0],
                      "chance": chance(corpus)}))


if __name__ == "__main__":
    main()
