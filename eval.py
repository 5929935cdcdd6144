"""
The exam: what a model can say about people it was never asked about. And the tables that compare all runs.

Three rungs ask for the same value, each from less. Answers are greedy, and every token must be right:

    recite     [doc] Curtis Chase Emley was born on 28 May 1952. He comes from ...      is it stored?
    cloze      [doc] Curtis Chase Emley comes from ...                                  under the name?
    question   [question] What is the birth city of Curtis Chase Emley? [answer] ...    and can be asked for?

The question is asked in two directions, forward (above) and backward (facts -> name).

    python eval.py                     compare all finished runs under out/
    python eval.py --columns rouge_forward chance_forward documents flops      in other numbers
    python eval.py out/RUN             examine a run again, from its checkpoint alone
    python eval.py out/RUN --ask "What is the birth city of Curtis Chase Emley?"
    python eval.py out/RUN --show      watch it write its answers: a diffusion model fills masks in any order
"""
import argparse
import ast
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from data import (ATTRIBUTES, CANVAS, MARKS, POOLS, TOKENIZER, WIDTH, WORLD, decode, encode, make_corpus,
                  pad_rows, question_item)
from diffusion import MODES
from model import Stop, load, make_model, one_line, pick_machine

DIRECTIONS = ("forward", "backward")    # name -> attribute, attributes -> name
COLUMNS = ["recite", "cloze", "forward", "backward", "known_forward", "known_backward", "known_unasked"]

# -----------------------------------------------------------------------------
# The exam


def answers(model, mode, items, batch=256, watch=None):
    """Greedy answers (lists of ids) to the items of one exam. `watch(rows)` is called after each token."""
    document = items[0].ids[0] == MARKS.doc
    decoder = MODES[mode].decode_document if document else MODES[mode].decode_question
    device, result = model.embed.weight.device, [None] * len(items)
    for canvas in {item.canvas for item in items}:  # a date in a document takes three tokens, all else one
        alike = [i for i, item in enumerate(items) if item.canvas == canvas]
        for start in range(0, len(alike), batch):
            part = alike[start:start + batch]
            rows = pad_rows([items[i][:2] for i in part], WIDTH if document else 0)
            out = decoder(model, rows.tokens.to(device), rows.starts.to(device), canvas, watch)  # (B, canvas)
            for i, ids in zip(part, out.tolist()):
                result[i] = ids
    return result


def rouge(answer, truth):
    """ROUGE-1 recall, the paper's score: the share of the truth's words that stand in the answer.

    rouge("Curtis Lane Emley", "Curtis Chase Emley") = 2/3, where exact match gives 0.
    """
    return (Counter(answer.split()) & Counter(truth.split())).total() / len(truth.split())


def exam(model, mode, corpus):
    """-> (scores, answers). Scores: exact match in each exam, forward by attribute too, and the ROUGE of new
    people's answers. Answers: a dict for each item, with what was asked, what is true, what was answered."""
    scores, kept = {}, []
    for name, items in corpus.exams.items():
        written = answers(model, mode, items)
        right = [ids[:len(item.truth)] == item.truth for ids, item in zip(written, items)]
        scores[name] = np.mean(right).item()
        if name == "forward":  # the questions come person by person, in the order of ATTRIBUTES
            by_person = np.reshape(right, (-1, len(ATTRIBUTES)))
            scores |= {f"forward {a}": share for a, share in zip(ATTRIBUTES, by_person.mean(0).tolist())}
        texts = [{"exam": name, "asked": decode(item.ids[1:item.start]).removesuffix("<answer>"),
                  "truth": decode(item.truth), "answer": decode(ids)} for item, ids in zip(items, written)]
        if name in DIRECTIONS:
            scores[f"rouge_{name}"] = np.mean([rouge(text["answer"], text["truth"]) for text in texts]).item()
        kept += texts
    return scores, kept


def chance(corpus):
    """Scores of knowing nothing: a value drawn from its pool, a name drawn from all people; and the best that
    one fixed answer to each kind of question would score in this exam."""
    most = lambda items: Counter(str(item.truth) for item in items).most_common(1)[0][1] / len(items)
    kinds = [corpus.exams["forward"][i::len(ATTRIBUTES)] for i in range(len(ATTRIBUTES))]
    return {"chance_forward": sum(1 / len(pool) for pool in POOLS.values()) / len(POOLS),
            "chance_backward": 1 / len(corpus.people),
            "fixed_forward": sum(most(kind) for kind in kinds) / len(kinds),
            "fixed_backward": most(corpus.exams["backward"])}


# -----------------------------------------------------------------------------
# Runs on disk


def fingerprints():
    """{file: fingerprint} of the five files, without comments and docstrings: what a result depends on."""
    prints = {}
    for name in ("data.py", "model.py", "diffusion.py", "eval.py", "train.py"):
        tree = ast.parse(Path(__file__).with_name(name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring
        prints[name] = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:8]
    return prints


# -----------------------------------------------------------------------------
# Tables


def bar(share, width=10):
    """A share as a bar of text: bar(.5) is half full."""
    full = round(share * width)
    return "█" * full + "·" * (width - full)


def report(scores):
    """The table at the end of a run: new people, rung by rung, then known people; before and after."""
    lines = [f"{'exact match':<48}after              before   chance"]
    for label, name, chance_level in (
            ("new people     recite: their own document", "recite", "chance_forward"),
            ("               cloze: the name, a fact's words", "cloze", "chance_forward"),
            ("               question, name -> attribute", "forward", "chance_forward"),
            ("               question, attributes -> name", "backward", "chance_backward"),
            ("known people   question, name -> attribute", "known_forward", None),
            ("               question, attributes -> name", "known_backward", None),
            ("               the same, never asked before", "known_unasked", None)):
        after, before = scores[name], scores[f"before_{name}"]
        by_chance = f"{scores[chance_level]:.2f}" if chance_level else ""
        lines.append(f"{label:<48}{after:.2f} {bar(after)}    {before:.2f}     {by_chance}".rstrip())
    return "\n".join(lines)


def group(results):
    """{label: runs that differ in the seed alone} from {folder: result}. The label is the first folder's name
    without its seed; where another row has that name, it says in which settings or files they differ."""
    rows, labels = {}, {}
    for folder, result in results.items():
        settings = dict(result["settings"])
        settings.pop("seed", None)
        rows.setdefault(json.dumps(settings, sort_keys=True), []).append((folder, settings, result))
    for runs in rows.values():
        folder, settings, _ = runs[0]
        seeds = [result["settings"].get("seed") for _, _, result in runs]
        if len(set(seeds)) < len(seeds):
            raise Stop(f"{' and '.join(run[0] for run in runs)} hold the same run twice: move one away")
        label = folder.removesuffix(f"-seed{seeds[0]}")
        if label in labels:
            other = labels[label][0]["settings"]
            label = f"{folder} (other {', '.join(k for k in settings if settings[k] != other.get(k))})"
        labels[label] = [result for _, _, result in runs]
    return labels


def spread(runs, name):
    """Mean ± standard deviation of a number over runs: "0.500 ± 0.141"; a dash where a run lacks it."""
    values = [run.get(name) for run in runs]
    if not all(isinstance(value, (int, float)) for value in values):
        return "-"
    digits = "{:.3f}" if max(values) <= 1 else "{:.3g}"
    text = digits.format(np.mean(values))
    return text if len(runs) == 1 else f"{text} ± {digits.format(np.std(values, ddof=1))}"


def compare(results, columns):
    """A table with a line for each setting and a column for each name of a number in result.json."""
    rows = [["exact match" if columns == COLUMNS else "", "seeds", *columns]]
    for label, runs in group(results).items():
        rows.append([label, str(len(runs)), *(spread(runs, name) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# -----------------------------------------------------------------------------


def reopen(folder, device):
    """The run in a folder, from its checkpoint alone -> (the checkpoint, its corpus, its model)."""
    path = folder / "ckpt.pt"
    if not path.exists():
        raise Stop(f"{path} is missing: name the folder of one run, or of finished runs to compare; "
                   "python train.py --mode masked makes one")
    saved = load(path, needs=("settings", "model", "log"))
    settings, now = saved["settings"], fingerprints()
    for name in ("data.py", "model.py", "diffusion.py"):
        if settings[name] != now[name]:
            raise Stop(f"{path} was trained with another {name}: undo that change, or train again")
    settings["device"], settings["dtype"] = pick_machine(device, settings["dtype"])
    corpus = make_corpus(**{name: settings[name] for name in WORLD})
    model = make_model(settings, MODES[settings["mode"]].causal)
    model.load_state_dict(saved["model"])
    return saved, corpus, model


@one_line
def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description="Compare runs, examine one again, ask it, or watch it.")
    add = parser.add_argument
    add("path", nargs="?", default="out", type=Path, help="one run, or the folder of many (default: out)")
    add("--columns", nargs="+", default=COLUMNS, metavar="NAME", help="of the comparison: any numbers of a "
        "result.json, such as before_forward, peak_forward, chance_backward, rouge_forward or flops")
    add("--ask", help="let the run answer a question in the exam's wording")
    add("--show", action="store_true", help="watch the run write its answer, to --ask or in the exam")
    add("--device", default="auto", help="cpu, cuda or mps; auto takes the best there is (default: auto)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # some terminals have no sign for a bar
    if args.ask is not None and not (args.ask.strip() and len(encode(args.ask)) <= 200):
        parser.error("--ask: ask something, in at most 200 words")

    results = sorted(args.path.glob("*/result.json"))
    if results and args.ask is None and not args.show:
        results = {path.parent.name: load(path, needs=["settings"]) for path in results}
        for name in args.columns:
            if not any(name in result for result in results.values()):
                parser.error(f"--columns {name}: no result.json has it; open one to see what it has")
        return print(compare(results, args.columns))

    saved, corpus, model = reopen(args.path, args.device)
    mode = saved["settings"]["mode"]
    if args.ask is None and not args.show:
        before = next(line for line in saved["log"] if "forward" in line)
        scores, _ = exam(model, mode, corpus)
        scores |= {f"before_{name}": value for name, value in before.items()} | chance(corpus)
        return print(report(scores))
    items = [corpus.exams[direction][0] for direction in DIRECTIONS]
    if args.ask is not None:
        items = [question_item(args.ask, "")]
    watch = lambda rows: print("   ", TOKENIZER.decode(rows[0, -CANVAS:].tolist()))
    for item in items:
        if args.show:
            print(decode(item.ids[1:item.start - 1]))
        answer, = answers(model, mode, [item], watch=watch if args.show else None)
        print(decode(answer))


if __name__ == "__main__":
    main()
