"""
The exam: what does a model know that it only read in documents? Below it: tables, plots, asking a run.

Three rungs ask for the same value, each with less help. Answers are greedy, and every token must be right:

    recite     [doc] Curtis Chase Emley was born on 28 May 1952. He comes from ...      is it stored?
    cloze      [doc] Curtis Chase Emley comes from ...                                  found by the name?
    question   [question] What is the birth city of Curtis Chase Emley? [answer] ...    and by a question?

Questions are asked in two directions, forward (as above) and backward (facts -> name).

    python eval.py                          compare all finished runs under out/
    python eval.py --columns rouge_forward documents flops           by other numbers
    python eval.py --plot curves.svg        draw their scores over fine-tuning; --over texts: over a setting
    python eval.py out/RUN --show           watch it write a biography, and an answer, token by token
    python eval.py out/RUN --ask "What is the birth city of Curtis Chase Emley?"
    python eval.py out/RUN --ask "[mask] [mask] [mask] comes from Elkton. He went to Reed."
"""
import argparse
import hashlib
import html
import re
import shutil
import sys
import textwrap
import time
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from data import (ATTRIBUTES, CANVAS, EXAMS, MARKS, POOLS, TOKENIZER, WIDTH, WORDS, decode, join, make_corpus,
                   pad, until_end, words_of)
from diffusion import MODES, decode_ar, decode_random_prompt
from model import DEVICES, Stop, Transformer, load, one_line, write

DIRECTIONS = ("forward", "backward")    # name -> attribute, attributes -> name

# -----------------------------------------------------------------------------
# The exam

def fill(model, mode, rows, n):
    """Fill the first n [mask]s of each of the rows, lists of ids, all documents or all questions; after each
    step yield all rows. Documents are filled as the mode decodes them, questions as its base does."""
    documents = rows[0][0] == MARKS.doc
    decoder = MODES[mode if documents else MODES[mode].base].decode
    tokens = pad(rows, WIDTH if documents else 0)  # T as in training: it decides where a response begins
    places = torch.tensor([[i for i, token in enumerate(ids) if token == MARKS.mask][:n] for ids in rows])
    device = model.embed.weight.device
    for filled in decoder(model, tokens.to(device), places.to(device)):
        now = filled[:, -tokens.size(1):].tolist()  # the last T: without the prompt, if there is one
        yield [ids[:1] + row[1:len(ids)] for ids, row in zip(rows, now)]  # [doc] for [answer]; no padding


def answers(model, mode, items, batch=256):
    """The rows (ids, start) of one exam -> truths (of a document, one value) and greedy answers, as ids."""
    truths = [[token for token in ids[start:] if token != MARKS.mask] for ids, start in items]
    hidden = [ids[:start] + [MARKS.mask] * (len(ids) - start) for ids, start in items]
    written = [None] * len(items)
    for n in {len(truth) for truth in truths}:  # a date: 3 tokens, other values: 1, a canvas: 4
        alike = [i for i, truth in enumerate(truths) if len(truth) == n]
        for first in range(0, len(alike), batch):
            part = alike[first:first + batch]
            *_, rows = fill(model, mode, [hidden[i] for i in part], n)  # the rows after the last step
            for i, row in zip(part, rows):
                start = items[i][1]
                written[i] = row[start:start + n]
    return truths, written


def rouge(answer, truth):
    """ROUGE-1 recall, the paper's score: the share of the truth's words that are in the answer."""
    return (Counter(answer.split()) & Counter(truth.split())).total() / len(truth.split())


def exam(model, mode, corpus):
    """-> (scores, answers). Scores: exact match in each exam, in `forward` also by attribute, and ROUGE-1 for
    questions about new people. Answers: a dict per item: what was asked, the truth, the answer."""
    scores, kept = {}, []
    for name, items in corpus.exams.items():
        truths, written = answers(model, mode, items)
        right = [until_end(ids) == until_end(truth) for ids, truth in zip(written, truths)]
        scores[name] = np.mean(right).item()
        if name == "forward":  # the questions come person by person, in the order of ATTRIBUTES
            for i, attribute in enumerate(ATTRIBUTES):
                scores[f"forward {attribute}"] = np.mean(right[i::len(ATTRIBUTES)]).item()
        texts = [{"exam": name, "asked": decode(ids[1:start]).removesuffix("[answer]"),
                  "truth": decode(truth), "answer": decode(answer)}
                 for (ids, start), truth, answer in zip(items, truths, written)]
        if name in DIRECTIONS:
            scores[f"rouge_{name}"] = np.mean([rouge(text["answer"], text["truth"]) for text in texts]).item()
        kept += texts
    return scores, kept


def chance(corpus):
    """Scores without knowledge. chance_: a random value from the pool, a random name from all people. fixed_:
    one answer to all questions of a kind, the one that is right most often in this exam."""
    def share_of_top(items):
        return max(Counter(tuple(ids[start:]) for ids, start in items).values()) / len(items)

    kinds = [corpus.exams["forward"][i::len(ATTRIBUTES)] for i in range(len(ATTRIBUTES))]
    return {"chance_forward": np.mean([1 / len(pool) for pool in POOLS.values()]).item(),
            "chance_backward": 1 / len(corpus.people),
            "fixed_forward": np.mean([share_of_top(kind) for kind in kinds]).item(),
            "fixed_backward": share_of_top(corpus.exams["backward"])}


# -----------------------------------------------------------------------------
# Which runs may be compared? (From here to the end it is about files and pictures: skip it at first.)

def fingerprints():
    """{file: fingerprint} of the five files, which a result depends on. Docstrings count; comments, blank
    lines and spaces at the end of a line do not."""
    prints = {}
    for name in ("data.py", "model.py", "diffusion.py", "eval.py", "train.py"):
        text = Path(__file__).with_name(name).read_text(encoding="utf-8-sig")
        lines = text.splitlines(keepends=True)
        for token in tokenize.generate_tokens(iter(lines).__next__):
            if token.type == tokenize.COMMENT:
                row, column = token.start  # rows count from 1
                lines[row - 1] = lines[row - 1][:column]
        code = "\n".join(line.rstrip() for line in lines if line.strip())
        prints[name] = hashlib.sha256(code.encode()).hexdigest()[:8]
    return prints


def differs(before, now):
    """The first setting that is not the same, as text: "lr = 0.01, not 0.02"; None if there is none."""
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            return f"{name} = {before.get(name)}, not {now.get(name)}"


def group(results, over=None):
    """{folder: result} -> {label: runs that differ only in the seed (and the setting `over`)}. The label: the
    folder less its seed (and that setting) or, if taken, the folder and what differs."""
    settings_of, runs = {}, {}  # label -> settings; label -> {(seed, value of `over`): result}
    for folder, result in results.items():
        settings = dict(result["settings"])
        seed, value = settings.pop("seed"), settings.pop(over, None)
        label = next((name for name in settings_of if settings_of[name] == settings), None)
        if label is None:  # the first run with these settings
            label = folder.removesuffix(f"-seed{seed}")
            if over:
                label = label.replace(f"-{over}{value}", "")
            if label in settings_of:  # the folder of other settings
                label = f"{folder} ({differs(settings, settings_of[label])})"
            settings_of[label], runs[label] = settings, {}
        runs[label][seed, value] = result  # so a copy of a run counts once
    return {label: list(row.values()) for label, row in runs.items()}


# -----------------------------------------------------------------------------
# Tables and curves

# What a result.json must have for the table at the end of a run.
REPORTED = ("settings", "chance_forward", "chance_backward", *EXAMS, *(f"before_{name}" for name in EXAMS))


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
            ("               the same, not in training", "known_unasked", "chance_backward")):
        after, before, by_chance = scores[name], scores[f"before_{name}"], scores[chance_level]
        bar = "█" * round(10 * after)
        lines.append(f"{label:<48}{after:.2f} {bar:·<10}    {before:.2f}     {by_chance:.2f}")
    return "\n".join(lines)


def spread(runs, name):
    """Mean ± standard deviation of a number over runs: "0.500 ± 0.141"; a dash where a run has none."""
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


def curve(runs, direction, over):
    """{x: (mean, deviation) over runs}. x: a step of fine-tuning; with `over`: that setting, final scores."""
    points = defaultdict(list)
    for run in runs:
        if over:
            points[run["settings"][over]].append(run[direction])
        else:
            for step, score in zip(run["curve"]["step"], run["curve"][direction]):
                points[step].append(score)
    return {x: (np.mean(y), np.std(y, ddof=1) if len(y) > 1 else 0) for x, y in sorted(points.items())}


def plot(results, over=None):
    """One SVG, a panel per direction: new people's scores over fine-tuning, or the last ones over a setting.
    A line per row of `group`, a band of one standard deviation over its seeds. A white background keeps it
    readable on dark pages; the colours are those of Okabe and Ito, for the colour-blind."""
    lines = {label: [curve(runs, direction, over) for direction in DIRECTIONS]
             for label, runs in group(results, over).items()}
    lines = {label: both for label, both in lines.items() if len(both[0]) > 1}  # a point is not a line
    if not lines:
        raise Stop(f"--over {over}: no two of these runs differ in that and nothing else but the seed")
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"] * len(lines)
    ticks = sorted({x for forward, _ in lines.values() for x in forward})
    width, height = 250, max(230, 15 * len(lines))      # of a panel; in it, (0, 0) is the upper left corner
    room = 20 + 8 * max(map(len, lines))                # beside it, for labels
    across = lambda x: round(width * x / ticks[-1], 1)
    down = lambda score: round(height * (1 - min(max(score, 0), 1)), 1)
    parts = []
    text = lambda x, y, words, more="": parts.append(f'<text x="{x}" y="{y}" {more}>{words}</text>')
    for i, title in enumerate(("forward: name → attribute", "backward: attributes → name")):
        parts.append(f'<g transform="translate({50 + i * (50 + width + room)} 50)">')
        text(0, -25, title, 'font-weight="bold"')
        text(0, height + 38, over or "steps of fine-tuning")
        for x in ticks if over else (ticks[0], ticks[-1]):
            text(across(x), height + 18, f"{x:,}", 'text-anchor="middle"')
        for score in (0, 0.5, 1):
            text(-8, down(score), f"{score:g}", 'text-anchor="end" dy="4"')
            parts.append(f'<path d="M0 {down(score)}h{width}" stroke="#ccc"/>')
        ends = []
        for (label, both), colour in zip(lines.items(), colours):
            points = both[i].items()  # (x, (mean, deviation))
            edge = lambda sign: [f"{across(x)},{down(mean + sign * error)}" for x, (mean, error) in points]
            band, line = " ".join(edge(1) + edge(-1)[::-1]), " ".join(edge(0))
            parts.append(f'<polygon points="{band}" fill="{colour}" opacity="0.2"/>')
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            last, _ = both[i][max(both[i])]
            ends.append((down(last), label, colour))
        y = height + 15
        for above, (end, label, colour) in reversed(list(enumerate(sorted(ends)))):  # the lowest label first
            y = max(min(end, y - 15), 15 * above)  # above the last one; `above` labels still need room
            text(width + 6, round(y), html.escape(label), f'fill="{colour}" dy="4"')
        parts.append("</g>")
    whole = 100 + 2 * (width + room)
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {height + 100}" '
            'font-family="sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="white"/>')
    return "\n".join([head, *parts, "</svg>\n"])


# -----------------------------------------------------------------------------
# Ask a run, and watch it

def reopen(folder):
    """The run in a folder, from its checkpoint alone -> (its mode, its corpus, its model)."""
    path = folder / "ckpt.pt"
    if not path.exists():
        raise Stop(f"{path} is missing: name the folder of one run, or of finished runs to compare; "
                   "python train.py --mode masked makes one (with --overwrite, if its result.json is left)")
    saved = load(path, needs=("settings", "model"))
    settings, now = saved["settings"], fingerprints()
    for name in ("data.py", "model.py", "diffusion.py"):
        if settings.get(name) != now[name]:
            raise Stop(f"{path} was trained with another {name}: undo that change, or train again")
    model = Transformer(MODES[settings["mode"]].causal, **settings).to(DEVICES[-1])
    model.load_state_dict(saved["model"])
    return settings["mode"], make_corpus(**settings), model


def row_to_fill(text):
    """The text of --ask as ids: a document whose [mask]s are blanks, or a question and its canvas."""
    ids = []
    for word in re.findall(r"\[mask\]|[.,?]|[^\s.,?[]+|\[", text):
        if word not in (*WORDS, "[mask]", ".", ",", "?"):
            raise Stop(f"--ask: {word!r} is not a word of this world; python data.py prints some that are")
        ids.append(TOKENIZER.encode_single_token(f" {word}" if word in WORDS else word))
    if ("[mask]" in text) == ("?" in text):  # neither or both
        raise Stop("--ask: give it a question with its ?, or a text with [mask] where words are missing")
    if "[mask]" in text:
        ids = [MARKS.doc, *ids, MARKS.end]
    else:
        ids = [MARKS.question, *ids, MARKS.answer] + [MARKS.mask] * CANVAS
    if len(ids) > WIDTH:
        raise Stop(f"--ask: {len(ids)} tokens are too many: {WIDTH} at most")
    return ids


def play(rows):
    """Show rows one after the other, the newest token standing out: in place on a terminal, else as lines."""
    terminal, width = sys.stdout.isatty(), min(100, shutil.get_terminal_size().columns - 1)
    for before, row in zip(rows, rows[1:]):
        words = [word.replace("[mask]", "___") for word in words_of(row)]
        newest = next(i for i in range(1, len(row)) if row[i] != before[i])
        words[newest] = f"\x1b[7m{words[newest]}\x1b[0m" if terminal else f">{words[newest]}<"  # 7: inverse
        lines = textwrap.wrap(join(words), width) if terminal else [join(words)]
        print("\n".join(lines))
        if terminal and row is not rows[-1]:
            time.sleep(0.15)
            print(f"\x1b[{len(lines)}F\x1b[J", end="")  # back up to the first of these lines, and wipe them


@one_line
def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description="Compare runs, draw them, ask one, or watch it.")
    add = parser.add_argument
    add("path", nargs="?", default="out", type=Path, help="one run, or the folder of many (default: out)")
    add("--columns", nargs="+", default=EXAMS, metavar="NAME", help="compare by these numbers of "
        "result.json, such as before_forward, peak_forward, chance_backward, rouge_forward or flops")
    add("--plot", type=Path, metavar="FILE.svg", help="draw the runs' scores over fine-tuning into a file")
    add("--over", metavar="SETTING", help="with --plot: draw the last scores over a setting, such as texts")
    add("--ask", metavar="TEXT", help="let one run answer a question, or fill in each [mask] of a text")
    add("--show", action="store_true", help="watch a run write what --ask asks, or a biography and an answer")
    args = parser.parse_args()

    if args.plot is not None and (args.plot.suffix != ".svg" or args.show or args.ask is not None):
        parser.error("--plot: name a file that ends in .svg, and leave out --ask and --show")
    if args.over and not args.plot:
        parser.error("--over: say with --plot FILE.svg where to draw")
    if args.columns != EXAMS and (args.plot or args.show or args.ask is not None):
        parser.error("--columns: this is for the table alone; leave out --plot, --ask and --show")

    if args.ask is not None or args.show:
        asked = [] if args.ask is None else [row_to_fill(args.ask)]
        mode, corpus, model = reopen(args.path)
        if not asked:  # an all-masked row as long as a document, and a question about a new person
            (document, _), (question, start) = corpus.exams["cloze"][0], corpus.exams["backward"][0]
            asked = [[MARKS.doc] + [MARKS.mask] * (len(document) - 1),
                     question[:start] + [MARKS.mask] * CANVAS]
        for ids in asked:
            rows = [ids] + [row for [row] in fill(model, mode, [ids], ids.count(MARKS.mask))]
            if args.show:
                play(rows)
            elif ids[0] == MARKS.doc:
                print(join(words_of(rows[-1][1:-1])))
                if MODES[mode].decode in (decode_ar, decode_random_prompt):
                    print("(filled from left to right: the words after a blank were not seen)")
            else:
                print(decode(rows[-1][-CANVAS:]))
        return

    one = args.path / "result.json"
    if one.exists() and args.columns == EXAMS and not args.plot:
        return print(report(load(one, needs=REPORTED)))
    paths = [one] if one.exists() else sorted(args.path.glob("*/result.json"))
    needs = ["settings", "curve"] if args.plot else ["settings"]
    results = {path.resolve().parent.name: load(path, needs) for path in paths}
    if not results:
        raise Stop(f"{args.path} holds no finished run: python train.py --mode masked makes one under out/")
    if args.plot:
        if args.over:
            results = {folder: result for folder, result in results.items()
                       if isinstance(result["settings"].get(args.over), (int, float))}
        if not results:
            parser.error(f"--over {args.over}: this is a number among the settings of no run")
        write(args.plot, plot(results, args.over).encode())
        return print(f"{args.plot} is drawn")
    for name in args.columns:
        if not any(name in result for result in results.values()):
            parser.error(f"--columns {name}: no result.json has it; open one to see what it has")
    print(compare(results, args.columns))


if __name__ == "__main__":
    main()
