"""
The exam: questions in both directions, greedy answers, exact match. And the tables that compare all runs.

    python eval.py                     the tables of all finished runs under out/
    python eval.py --costs             what it cost them to get there: documents, tokens, FLOPs
    python eval.py out/RUN             examine a run again, from its checkpoint alone
    python eval.py out/RUN --ask "What is the birth city of Curtis Chase Emley?"
    python eval.py out/RUN --show      watch it write its answers: a diffusion model fills masks in any order
"""
import argparse
import contextlib
import json
import random
import re
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import torch

from data import (ATTRIBUTES, CANVAS, MARKS, POOLS, TOKENIZER, decode, encode, make_corpus, pad_rows,
                  question_row)
from diffusion import MODES
from model import ModelConfig, Transformer, pick_machine

DIRECTIONS = ("forward", "backward")    # name -> attribute, attributes -> name
WORLD = ("known", "new", "paraphrases", "wordings", "seed")     # the settings that make a corpus
SHAPE = ("n_layer", "n_head", "n_embd")                         # and a model
AXES = ("documents", "tokens", "supervised", "flops")           # on which the cost of reading is counted
CHECKPOINT = {"settings", "digest", "model", "optimizers", "generator", "step", "seconds", "loss", "log",
              "mode", "dtype", *AXES, *WORLD, *SHAPE}           # what a checkpoint and its settings hold
RESULT = {"settings", "exam", "before", "chance", "ranking", "cost", "log", "mode", "seed"}  # a result.json
TABLES = [  # columns of the comparison: title -> where a result.json keeps it; {} is both directions
    {"new people": "exam/{}", "known people": "exam/known_{}", "known before reading": "before/known_{}"},
    {"before reading": "before/{}", "chance": "chance/{}", "one fixed answer": "chance/majority_{}"},
    {"ROUGE-1 recall": "exam/rouge/{}"},
    {"truth is likeliest": "ranking/{}/first", "by chance": "ranking/{}/chance_first",
     "reciprocal rank": "ranking/{}/mrr", "rank by chance": "ranking/{}/chance_mrr"},
    {attribute: f"exam/forward_by_attribute/{attribute}" for attribute in ATTRIBUTES},
]
COSTS = [{f"{axis} to .5": f"cost/{axis}/{{}}/half", f"{axis} to 95 %": f"cost/{axis}/{{}}/own"}
         for axis in AXES]


class Stop(Exception):
    """The program ends here, with a message for the person who started it."""


@contextlib.contextmanager
def one_line():
    """What a person can mend ends the program in one line and exit code 2, as argparse does for a wrong flag.
    Anything else is a bug and keeps its traceback."""
    try:
        yield
        return
    except (Stop, OSError, sqlite3.Error) as problem:
        message = problem
    except (MemoryError, RuntimeError) as problem:
        if isinstance(problem, MemoryError) or re.search("out of memory|alloc", str(problem), re.IGNORECASE):
            message = "out of memory: lower --batch_size, --n_embd, --n_layer or --known"
        elif "_inductor" in type(problem).__module__:  # it found no C++ compiler, say
            message = f"--compile cannot be used here ({str(problem).splitlines()[0]}): leave it out"
        else:
            raise
    except KeyboardInterrupt:
        message = "stopped by Ctrl-C"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# -----------------------------------------------------------------------------
# The exam


def answers(model, mode, questions, batch=256, watch=None):
    """Greedy answers (list of str) to questions (list of str). Every question gets the same canvas.
    `watch(rows)` is called after each token."""
    result, device = [], model.embed.weight.device
    for i in range(0, len(questions), batch):
        tokens, starts = pad_rows([question_row(q) for q in questions[i:i + batch]])
        out = MODES[mode].decode(model, tokens.to(device), starts.to(device), CANVAS, MARKS, watch)
        result += [decode(ids) for ids in out.tolist()]
    return result


def rouge(answer, truth):
    """ROUGE-1 recall, the paper's score: the share of the truth's words that stand in the answer.

    rouge("Curtis Lane Emley", "Curtis Chase Emley") = 2/3, where exact match gives 0.
    """
    return (Counter(answer.split()) & Counter(truth.split())).total() / len(truth.split())


def exam(model, mode, corpus):
    """Exact match and ROUGE-1 recall in each of the corpus's exams, with the first answer that was given;
    forward exact match by attribute."""
    scores, n = {"rouge": {}, "first_answer": {}}, len(ATTRIBUTES)
    for name, pairs in corpus.exams.items():
        given = answers(model, mode, [question for question, _ in pairs])
        right = [a == truth for a, (_, truth) in zip(given, pairs)]
        scores[name] = fmean(right)
        scores["rouge"][name] = fmean(rouge(a, truth) for a, (_, truth) in zip(given, pairs))
        scores["first_answer"][name] = given[0]
        if name == "forward":  # the questions come person by person, in the order of ATTRIBUTES
            scores["forward_by_attribute"] = {a: fmean(right[i::n]) for i, a in enumerate(ATTRIBUTES)}
    return scores


def ranking(model, mode, corpus, asked=100):
    """Without any decoding: is the true answer likelier than the answers of the other new people?

    -> {direction: {"first": how often it is the likeliest, "mrr": the mean of 1 / its rank, and both as
    chance gives them}}, over a fixed sample of the exam's questions.
    """
    result, device = {}, model.embed.weight.device
    for direction, kinds in zip(DIRECTIONS, (len(ATTRIBUTES), 1)):
        pairs, ranks, sizes = corpus.exams[direction], [], []
        for i in random.Random(0).sample(range(len(pairs)), min(asked, len(pairs))):
            question, truth = pairs[i]
            candidates = sorted({answer for _, answer in pairs[i % kinds::kinds]})  # of the same kind
            tokens, starts = pad_rows([question_row(question, answer) for answer in candidates])
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
    """Scores of knowing nothing: a value drawn from its pool, a name drawn from all people; and the best that
    one fixed answer to each kind of question would score in this exam (`majority`)."""
    n = len(ATTRIBUTES)
    most = lambda pairs: Counter(truth for _, truth in pairs).most_common(1)[0][1] / len(pairs)
    return {"forward": fmean(1 / len(pool) for pool in POOLS.values()), "backward": 1 / len(corpus.people),
            "majority_forward": fmean(most(corpus.exams["forward"][i::n]) for i in range(n)),
            "majority_backward": most(corpus.exams["backward"])}


def costs(log):
    """{axis: {direction: what reading cost until the score was .5 ("half"), until it was 95 % of the last
    score and at least .05 ("own")}}: on a straight line between two exams, None if never reached."""
    def cost(axis, direction, goal):
        points = [(line[axis] - log[0][axis], line[direction]) for line in log]
        for (x0, y0), (x1, y1) in zip([(0, 0), *points], points):
            if y1 >= goal:
                return x0 + (x1 - x0) * (goal - y0) / (y1 - y0)
    return {axis: {d: {"half": cost(axis, d, 0.5), "own": cost(axis, d, max(0.05, 0.95 * log[-1][d]))}
                   for d in DIRECTIONS} for axis in AXES}


# -----------------------------------------------------------------------------
# Runs on disk


def make_world(settings):
    """The corpus, the untrained model that the settings of a run describe, and why it runs where it does.

    Where the settings leave device or dtype to us ("auto"), what was found is filled in.
    """
    try:
        settings["device"], settings["dtype"], why = pick_machine(settings["device"], settings["dtype"])
        corpus = make_corpus(*(settings[k] for k in WORLD))
        sizes, causal = [settings[k] for k in SHAPE], MODES[settings["mode"]].causal
        config = ModelConfig(TOKENIZER.n_vocab, *sizes, causal, MARKS.pad, settings["dtype"])
        return corpus, Transformer(config).to(settings["device"]), why
    except ValueError as problem:
        raise Stop(problem)


def load(path):
    """The dict in a checkpoint (.pt; code in it is never run) or in a result.json that train.py wrote."""
    try:
        checkpoint = path.suffix == ".pt"
        saved = (torch.load(path, map_location="cpu", weights_only=True) if checkpoint else
                 json.loads(path.read_text(encoding="utf-8")))
        if (CHECKPOINT if checkpoint else RESULT) <= {*saved, *saved["settings"]}:
            return saved
    except (PermissionError, MemoryError):  # the file may be in order
        raise
    except Exception:  # there is no end to what a damaged file can raise
        pass
    raise Stop(f"{path} is missing, cut short or of another version: delete it, then train (again)")


def restore(saved, corpus, model, path):
    """Put the weights of a checkpoint into the model, if the corpus and the shapes are the same."""
    if saved["digest"] != corpus.digest:
        raise Stop(f"{path} was trained on another corpus than data.py now writes: train again")
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError:
        raise Stop(f"{path} holds the weights of another model than model.py now makes: train again")


# -----------------------------------------------------------------------------
# Tables


def bar(share, width=10):
    """A share as a bar of text: bar(.5) is half full."""
    full = round(share * width)
    return "█" * full + "·" * (width - full)


def curve(shares):
    """Shares as a line of text, one sign each: curve([0, .5, 1]) = "▁▅█"."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * share))] for share in shares)


def look_up(result, place):
    """One number of a result: look_up(result, "exam/rouge/forward") is result["exam"]["rouge"]["forward"]."""
    for key in place.split("/"):
        result = result[key]
    return result


def report(result):
    """The table at the end of a run: new people beside known people, the start and chance."""
    lines = [f"{'exact match':<18}{'name -> attribute':<22}attributes -> name"]
    for label, place in (("new people", "exam/{}"), ("  before reading", "before/{}"),
                         ("  chance", "chance/{}"), ("  ROUGE-1 recall", "exam/rouge/{}"),
                         ("known people", "exam/known_{}")):
        f, b = (look_up(result, place.format(d)) for d in DIRECTIONS)
        lines.append(f"{label:<18}{f:.2f} {bar(f)}       {b:.2f} {bar(b)}")
    each = "  ".join(f"{name} {share:.2f}" for name, share in result["exam"]["forward_by_attribute"].items())
    return "\n".join([*lines, f"forward, by attribute: {each}"])


def group(results):
    """{label: runs that differ in the seed alone, one for each seed} from {folder: result}. The label is the
    first folder's name, without its seed if no other group has that name."""
    groups, labels = {}, {}
    for folder, result in results.items():
        settings = result["settings"].copy()
        seed = settings.pop("seed")
        folders = groups.setdefault(json.dumps(settings, sort_keys=True), {})
        if seed in folders:
            raise Stop(f"{folders[seed]} and {folder} hold the same run: move one away")
        folders[seed] = folder
    for folders in groups.values():
        seed, folder = next(iter(folders.items()))
        label = folder.removesuffix(f"-seed{seed}")
        labels[folder if label in labels else label] = [results[folder] for folder in folders.values()]
    return labels


def spread(values):
    """Mean ± standard deviation: spread([.4, .6]) = '0.5 ±0.141'; '-' if a value is None."""
    if None in values:
        return "-"
    return f"{fmean(values):.3g}" + (f" ±{stdev(values):.3g}" if len(values) > 1 else "")


def cell(runs, place):
    """The number at a place, over runs: 'forward / backward' if the place has a {}."""
    places = [place.format(d) for d in DIRECTIONS] if "{}" in place else [place]
    return " / ".join(spread([look_up(run, one) for run in runs]) for one in places)


def aligned(rows):
    """Rows (dicts with the same keys) as a text table under their keys."""
    cells = [list(rows[0])] + [list(row.values()) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in cells)


def compare(results, tables):
    """Tables with a line for each setting, mean ± standard deviation over seeds: first the exact match of new
    people as bars and, exam by exam, as curves; then the columns of `tables` (TABLES or COSTS)."""
    bars, more = [], [[] for _ in tables]
    for label, runs in group(results).items():
        bars.append({"run": label, "seeds": str(len(runs))})
        for d in DIRECTIONS:
            exams = zip(*(run["log"] for run in runs), strict=True)  # the first of all seeds, the second, ...
            scores = [fmean(line[d] for line in lines) for lines in exams]
            bars[-1][d] = f"{bar(scores[-1])} {cell(runs, f'exam/{d}'):<15} {curve(scores)}"
        for rows, columns in zip(more, tables):
            rows.append({"run": label} | {title: cell(runs, place) for title, place in columns.items()})
    return "\n\n".join(map(aligned, (bars, *more)))


# -----------------------------------------------------------------------------


def question(text):
    """An argparse type: a question that is neither empty nor longer than 200 tokens."""
    if not text.strip() or len(encode(text)) > 200:
        raise argparse.ArgumentTypeError(f"{len(encode(text)):,} tokens long: ask something, in at most 200")
    return text


@one_line()
def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description="Compare runs, examine one again, ask it, or watch it.")
    add = parser.add_argument
    add("path", nargs="?", default="out", type=Path, help="one run, or the folder of many (default: out)")
    add("--costs", action="store_true", help="compare what the runs cost instead of what they know")
    add("--ask", type=question, help="let the run answer a question in the exam's wording")
    add("--show", action="store_true", help="watch the run write its answer, --ask or the exam")
    add("--device", default="auto", help="cpu, cuda or mps; auto takes the best there is (default: auto)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # some terminals have no sign for a bar

    results = sorted(args.path.glob("*/result.json"))
    if results and not (args.ask or args.show):
        results = {path.parent.name: load(path) for path in results}
        return print(compare(results, COSTS if args.costs else TABLES))
    path = args.path / "ckpt.pt"
    if not path.exists():
        raise Stop(f"{path} is missing: name the folder of one run, or of finished runs to compare; "
                   "python train.py --mode masked makes one")
    if args.costs:
        raise Stop(f"--costs compares runs, and {args.path} is one: name a folder that holds some")
    saved = load(path)
    mode = saved["settings"]["mode"]
    corpus, model, _ = make_world(saved["settings"] | {"device": args.device})
    restore(saved, corpus, model, path)

    if args.show:
        watch = lambda rows: print("   ", TOKENIZER.decode(rows[0, -CANVAS:].tolist()))
        for asked in [args.ask] if args.ask else [corpus.exams[d][0][0] for d in DIRECTIONS]:
            print(asked)
            answers(model, mode, [asked], watch=watch)
    elif args.ask:
        print(*answers(model, mode, [args.ask]))
    else:
        scores = exam(model, mode, corpus)
        print(report({"exam": scores, "before": saved["log"][0], "chance": chance(corpus)}))


if __name__ == "__main__":
    main()
