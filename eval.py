"""
The exam: what a model can say about people it was never asked about. And ways to look at a run.

Three rungs ask for the same value, each from less. Answers are greedy, and every token must be right:

    recite     [doc] Curtis Chase Emley was born on 28 May 1952. He comes from ...      is it stored?
    cloze      [doc] Curtis Chase Emley comes from ...                                  under the name?
    question   [question] What is the birth city of Curtis Chase Emley? [answer] ...    and can be asked for?

The question is asked in two directions, forward (above) and backward (facts -> name).

    python eval.py                          compare all finished runs under out/
    python eval.py --columns rouge_forward documents flops           in other numbers
    python eval.py --plot curves.svg        draw their scores over fine-tuning
    python eval.py out/RUN --show           watch it write a biography, and an answer, token by token
    python eval.py out/RUN --ask "What is the birth city of Curtis Chase Emley?"
    python eval.py out/RUN --ask "[mask] [mask] [mask] comes from Elkton. He went to Reed."
"""
import argparse
import ast
import hashlib
import html
import json
import re
import shutil
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data import (ATTRIBUTES, CANVAS, EXAMS, MARKS, POOLS, TOKENIZER, WIDTH, WORDS, WORLD, decode, join,
                  make_corpus, pad_rows, question_row, words_of)
from diffusion import MODES, decode_ar, decode_random_prompt
from model import Stop, load, make_model, one_line, pick_machine, write

DIRECTIONS = ("forward", "backward")    # name -> attribute, attributes -> name

# -----------------------------------------------------------------------------
# The exam


def decode_rows(model, mode, tokens, places):
    """Rows (B, T) after each step: documents as the mode decodes them, questions as its base does."""
    document = tokens[0, 0] == MARKS.doc
    decode = MODES[mode].decode if document else MODES[MODES[mode].base].decode
    device = model.embed.weight.device
    for rows in decode(model, tokens.to(device), places.to(device)):
        yield rows[:, -tokens.size(1):].cpu()  # `masked` writes behind a prompt


def answers(model, mode, items, batch=256):
    """Greedy answers (lists of ids) to the items of one exam."""
    width = WIDTH if items[0].ids[0] == MARKS.doc else 0
    result = [None] * len(items)
    for canvas in {item.canvas for item in items}:  # in documents, a date takes three tokens, all else one
        alike = [i for i, item in enumerate(items) if item.canvas == canvas]
        for first in range(0, len(alike), batch):
            part = alike[first:first + batch]
            tokens, starts = pad_rows([(items[i].ids, items[i].start) for i in part], width)
            places = starts[:, None] + torch.arange(canvas)  # (B, canvas)
            *_, written = decode_rows(model, mode, tokens, places)  # the rows after the last step
            for i, ids in zip(part, written.gather(1, places).tolist()):
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
            for i, attribute in enumerate(ATTRIBUTES):
                scores[f"forward {attribute}"] = np.mean(right[i::len(ATTRIBUTES)]).item()
        texts = [{"exam": name, "asked": decode(item.ids[1:item.start]).removesuffix("[answer]"),
                  "truth": decode(item.truth), "answer": decode(ids)} for item, ids in zip(items, written)]
        if name in DIRECTIONS:
            scores[f"rouge_{name}"] = np.mean([rouge(text["answer"], text["truth"]) for text in texts]).item()
        kept += texts
    return scores, kept


def chance(corpus):
    """Scores of knowing nothing: a value drawn from its pool, a name drawn from all people; and of giving
    always the same answer to a kind of question, the one that is right most often in this exam."""
    most = lambda items: Counter(str(item.truth) for item in items).most_common(1)[0][1] / len(items)
    kinds = [corpus.exams["forward"][i::len(ATTRIBUTES)] for i in range(len(ATTRIBUTES))]
    return {"chance_forward": sum(1 / len(pool) for pool in POOLS.values()) / len(POOLS),
            "chance_backward": 1 / len(corpus.people),
            "fixed_forward": sum(most(kind) for kind in kinds) / len(kinds),
            "fixed_backward": most(corpus.exams["backward"])}


# -----------------------------------------------------------------------------
# Which runs may be compared?


def fingerprints():
    """{file: fingerprint} of the five files, without comments: what a result depends on."""
    prints = {}
    for name in ("data.py", "model.py", "diffusion.py", "eval.py", "train.py"):
        code = ast.unparse(ast.parse(Path(__file__).with_name(name).read_text(encoding="utf-8")))
        prints[name] = hashlib.sha256(code.encode()).hexdigest()[:8]
    return prints


def differs(before, now):
    """The first setting that is not the same, as text: "lr = 0.01, not 0.02"; None if there is none."""
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            return f"{name} = {before.get(name)}, not {now.get(name)}"


def group(results):
    """{label: runs that differ in nothing but the seed} from {folder: result}. The label is the name of the
    first folder; where another row has that name, it says in what the two differ."""
    rows = {}  # label -> (settings, {seed: result}): a copy of a run is no second seed
    for folder, result in results.items():
        settings = dict(result["settings"])
        seed = settings.pop("seed", 0)
        label = folder.removesuffix(f"-seed{seed}")
        alike = [name for name, (others, _) in rows.items() if others == settings]
        if alike:
            label = alike[0]
        elif label in rows:
            label = f"{folder} ({differs(settings, rows[label][0])})"
        _, runs = rows.setdefault(label, (settings, {}))
        runs[seed] = result
    return {label: list(runs.values()) for label, (_, runs) in rows.items()}


# -----------------------------------------------------------------------------
# Tables and curves


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
            ("known people   question, name -> attribute", "known_forward", "chance_forward"),
            ("               question, attributes -> name", "known_backward", "chance_backward"),
            ("               the same, never asked before", "known_unasked", "chance_backward")):
        after, before, by_chance = scores[name], scores[f"before_{name}"], scores[chance_level]
        lines.append(f"{label:<48}{after:.2f} {bar(after)}    {before:.2f}     {by_chance:.2f}")
    return "\n".join(lines)


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
    rows = [["exact match" if columns == EXAMS else "", "seeds", *columns]]
    for label, runs in group(results).items():
        rows.append([label, str(len(runs)), *(spread(runs, name) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def plot(results):
    """One SVG: forward and backward of new people over fine-tuning, a line a setting, a band of one standard
    deviation over its seeds. White below, for dark pages; colours of Okabe and Ito, for the colour-blind."""
    rows = group(results)
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"] * len(rows)
    most = max(result["curve"]["step"][-1] for result in results.values())
    width, height = 250, max(230, 15 * len(rows))                # of a panel
    room = 20 + 8 * max(map(len, rows))                          # for its labels
    bottom = 50 + height
    parts = []
    for left, direction, title in ((50, "forward", "name → attribute"),
                                   (100 + width + room, "backward", "attributes → name")):
        parts.append(f'<text x="{left}" y="25" font-weight="bold">{direction}: {title}</text>')
        for share in (0, 0.5, 1):
            y = bottom - share * height
            parts.append(f'<path d="M{left} {y}h{width}" stroke="#ccc"/>'
                         f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{share:g}</text>')
        parts.append(f'<text x="{left}" y="{bottom + 30}">fine-tuning steps: 0 to {most:,}</text>')
        ends = []
        for (label, runs), colour in zip(rows.items(), colours):
            scores = np.array([run["curve"][direction] for run in runs])  # (seeds, exams)
            x = left + width * np.array(runs[0]["curve"]["step"]) / most
            mean = scores.mean(0)
            error = scores.std(0, ddof=1) if len(runs) > 1 else 0 * mean
            points = lambda xs, shares: " ".join(f"{a:.1f},{bottom - height * b:.1f}"
                                                 for a, b in zip(xs, np.clip(shares, 0, 1)))
            band = f"{points(x, mean + error)} {points(x[::-1], (mean - error)[::-1])}"
            parts.append(f'<polygon points="{band}" fill="{colour}" opacity="0.2"/>'
                         f'<polyline points="{points(x, mean)}" fill="none" stroke="{colour}" '
                         'stroke-width="2"/>')
            ends.append((bottom - height * mean[-1], label, colour))
        y = bottom + 15
        for end, label, colour in sorted(ends, reverse=True):  # from below, so that none covers another
            y = min(end, y - 15)
            parts.append(f'<text x="{left + width + 6}" y="{y + 4:.0f}" fill="{colour}">{html.escape(label)}'
                         '</text>')
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {100 + 2 * (width + room)} {bottom + 45}" '
            'font-family="sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="white"/>')
    return "\n".join([head, *parts, "</svg>\n"])


# -----------------------------------------------------------------------------
# Ask a run, and watch it


def reopen(folder, device):
    """The run in a folder, from its checkpoint alone -> (its mode, its corpus, its model)."""
    path = folder / "ckpt.pt"
    if not path.exists():
        raise Stop(f"{path} is missing: name the folder of one run, or of finished runs to compare; "
                   "python train.py --mode masked makes one")
    saved = load(path, needs=("settings", "model"))
    settings, now = saved["settings"], fingerprints()
    for name in ("data.py", "model.py", "diffusion.py"):
        if settings[name] != now[name]:
            raise Stop(f"{path} was trained with another {name}: undo that change, or train again")
    settings["device"], settings["dtype"] = pick_machine(device, settings["dtype"])
    corpus = make_corpus(**{name: settings[name] for name in WORLD})
    model = make_model(settings, MODES[settings["mode"]].causal)
    model.load_state_dict(saved["model"])
    return settings["mode"], corpus, model


def row_to_fill(text):
    """The row of ids that --ask means: a document whose [mask]s are blanks, or a question and its canvas."""
    text = " ".join(re.sub(r"([.,?])", r"\1 ", text).split())  # as the generator spaces it
    unknown = [word for word in re.findall(r"\[mask\]|[^\s.,?]+", text) if word not in (*WORDS, "[mask]")]
    if unknown:
        raise Stop(f"--ask: {unknown[0]!r} is no word of this world; python data.py prints some that are")
    if not text:
        raise Stop("--ask: a question, or a text with [mask] where words are missing")
    if "[mask]" in text:
        marked = f" {text}".replace(" [mask]", "[mask]")  # as a word, a mark takes the space before it along
        ids = [MARKS.doc, *TOKENIZER.encode(marked, allowed_special={"[mask]"}), MARKS.end]
    else:
        ids, _ = question_row(text)
    if len(ids) > WIDTH:
        raise Stop(f"--ask: {len(ids)} words, signs and marks are too many: {WIDTH} at most")
    return ids


def fill(model, mode, ids):
    """Let a run fill the [mask]s of a row -> the rows on its way there, the first one with all its blanks."""
    tokens, _ = pad_rows([(ids, 1)], WIDTH if ids[0] == MARKS.doc else 0)
    places = (tokens == MARKS.mask).nonzero()[:, 1][None]  # (1, n)
    rows = [ids]
    for now in decode_rows(model, mode, tokens, places):
        rows.append(ids[:1] + now[0, 1:len(ids)].tolist())  # behind a prompt there is [answer] for [doc]
    return rows


def play(rows):
    """Show rows one after the other, the newest token standing out: in place on a terminal, else as lines."""
    terminal, width = sys.stdout.isatty(), min(100, shutil.get_terminal_size().columns - 1)
    for before, row in zip(rows, rows[1:]):
        words = [word.replace("[mask]", "___") for word in words_of(row)]
        newest = next(i for i in range(1, len(row)) if row[i] != before[i])
        words[newest] = f"\x1b[7m{words[newest]}\x1b[0m" if terminal else f">{words[newest]}<"
        lines = textwrap.wrap(join(words), width) if terminal else [join(words)]
        print("\n".join(lines))
        if terminal and row is not rows[-1]:
            time.sleep(0.15)
            print(f"\x1b[{len(lines)}F\x1b[J", end="")  # up again, and wipe


@one_line
def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description="Compare runs, draw them, ask one, or watch it.")
    add = parser.add_argument
    add("path", nargs="?", default="out", type=Path, help="one run, or the folder of many (default: out)")
    add("--columns", nargs="+", default=EXAMS, metavar="NAME", help="of the comparison: any numbers of a "
        "result.json, such as before_forward, peak_forward, chance_backward, rouge_forward or flops")
    add("--plot", type=Path, metavar="FILE.svg", help="draw the runs' scores over fine-tuning into a file")
    add("--ask", metavar="TEXT", help="let one run answer a question, or fill in each [mask] of a text")
    add("--show", action="store_true", help="watch a run write what --ask asks, or a biography and an answer")
    add("--device", default="auto", help="cpu, cuda or mps; auto takes the best there is (default: auto)")
    args = parser.parse_args()

    if args.plot is not None and (args.plot.suffix != ".svg" or args.show or args.ask is not None):
        parser.error("--plot: name a file that ends in .svg, and leave out --ask and --show")

    if args.ask is not None or args.show:
        asked = [] if args.ask is None else [row_to_fill(args.ask)]
        mode, corpus, model = reopen(args.path, args.device)
        if not asked:  # a new person's document with nothing left of it, and a question about that person
            length = (corpus.documents["new"].tokens[0] != MARKS.pad).sum().item()
            item = corpus.exams["backward"][0]
            asked = [[MARKS.doc] + [MARKS.mask] * (length - 1), item.ids]
        for ids in asked:
            rows = fill(model, mode, ids)
            if args.show:
                play(rows)
            elif ids[0] == MARKS.doc:
                print(join(words_of(rows[-1][1:-1])))
                if MODES[mode].decode in (decode_ar, decode_random_prompt):
                    print("(filled from left to right: what stands behind a blank was not seen)")
            else:
                print(decode(rows[-1][-CANVAS:]))
        return

    one = args.path / "result.json"
    if one.exists() and args.columns == EXAMS and not args.plot:
        return print(report(load(one, needs=["chance_backward", *(f"before_{name}" for name in EXAMS)])))
    paths = [one] if one.exists() else sorted(args.path.glob("*/result.json"))
    needs = ["settings", "curve"] if args.plot else ["settings"]
    results = {path.parent.name: load(path, needs) for path in paths}
    if not results:
        raise Stop(f"{args.path} holds no finished run: python train.py --mode masked makes one under out/")
    if args.plot:
        write(args.plot, plot(results).encode())
        return print(f"{args.plot}: {len(results)} runs")
    for name in args.columns:
        if not any(name in result for result in results.values()):
            parser.error(f"--columns {name}: no result.json has it; open one to see what it has")
    print(compare(results, args.columns))


if __name__ == "__main__":
    main()
