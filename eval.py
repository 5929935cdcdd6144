"""
The exam: what does a model know that it only read in documents? And what does it know but cannot say?

Three rungs ask for the same value, each with less help. Answers are greedy, and every token must be right:

    recite     [doc] Curtis Chase Emley was born on 28 May 1952. He comes from ...      is it stored?
    cloze      [doc] Curtis Chase Emley comes from ...                                  found by the name?
    question   [question] What is the birth city of Curtis Chase Emley? [answer] ...    and by a question?

Questions are asked in two directions, forward (as above) and backward (facts -> name). A backward question
can also be answered by the model's own *forward* direction, with Bayes' rule (`bayes`, below).

    python eval.py                          compare all finished runs under out/
    python eval.py --plot curves.svg        draw their scores over fine-tuning; --over texts: over a setting
    python eval.py out/RUN --exam           examine a stored model anew, say with a decoder that you changed
    python eval.py out/RUN --ask            watch it write a new person's biography, then say who that is
    python eval.py out/RUN --ask "What is the birth city of Curtis Chase Emley?"
    python eval.py out/RUN --ask "[mask] [mask] [mask] comes from Elkton. He went to Reed."
"""
import argparse
import ast
import hashlib
import html
import json
import platform
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean, median, stdev

import torch

from data import (CANVAS, EXAMS, MARKS, NAME, TOKENIZER, WORDS, Row, decode, encode, forward_question, join,
                  make_corpus, question_row, stack, until_end, words_of)
from diffusion import CAUSAL, MODES, logits_of_words, ratio_of
from model import DEVICES, Transformer, load, write

PROBED = 30     # new people whom `bayes` asks about

# -----------------------------------------------------------------------------
# The exam

def fill(model, mode, rows, places, width=0):
    """Fill rows in. `rows`: the ids of each; `places`: in each, the positions to fill. All are documents,
    filled as the mode decodes them, or all are questions, filled as its base does. After each step yield all
    rows."""
    documents = rows[0][0] == MARKS.doc
    decoder = MODES[mode if documents else MODES[mode].base].decode
    tokens, _ = stack([Row([], ids) for ids in rows], width if documents else 0)
    blank = torch.zeros_like(tokens, dtype=torch.bool)
    for i, positions in enumerate(places):
        blank[i, positions] = True
    device = model.embed.weight.device
    for filled in decoder(model, tokens.to(device), blank.to(device)):
        now = filled[:, -tokens.size(1):].tolist()  # the last T: without the prompt, if there is one
        yield [ids[:1] + row[1:len(ids)] for ids, row in zip(rows, now)]  # [doc] for [answer]; no padding


def answer(model, mode, items, width, batch=256):
    """Items of one exam -> the greedy answers, lists of as many ids as each item's truth has."""
    answers = []
    for first in range(0, len(items), batch):
        part = items[first:first + batch]
        places = [list(range(len(item.given), len(item.given) + len(item.truth))) for item in part]
        rows = [item.given + [MARKS.mask] * item.blanks for item in part]
        for filled in fill(model, mode, rows, places, width):
            pass  # to the last step
        answers += [[row[i] for i in p] for row, p in zip(filled, places)]
    return answers


def exam(model, mode, corpus, names=EXAMS):
    """-> (scores, answers). Scores: exact match in each exam of `names`, in `forward` also by attribute; an
    exam without items is left out. Answers: a dict an item; to `split` scores by anything else, use them."""
    model.eval()
    answers = []
    for name in names:
        # A batch takes as many steps as its longest answer: sort.
        items = sorted(corpus.exams[name], key=lambda item: len(item.truth))
        for item, ids in zip(items, answer(model, mode, items, corpus.width)):
            answers.append({
                "exam": name, "person": item.person.name, "attributes": item.attributes,
                "asked": decode(item.given[1:]).removesuffix("[answer]"), "truth": decode(item.truth),
                "answer": decode(ids), "right": until_end(ids) == until_end(item.truth)})
    scores = split(answers, lambda line: line["exam"])
    forward = [line for line in answers if line["exam"] == "forward"]
    return scores | split(forward, lambda line: f"forward {line['attributes'][0]}"), answers


def split(answers, key):
    """{key(answer): share of right ones}: exact match by whatever `key` tells apart."""
    groups = defaultdict(list)
    for line in answers:
        groups[key(line)].append(line["right"])
    return {name: mean(right) for name, right in groups.items()}


@torch.no_grad()
def log_p(model, mode, given, answers):
    """log p(answer | question) -> (M, N), for M questions (`given` of their rows) and N answers, texts of
    equally many tokens. A causal model has p(token | question, tokens before it); `diffusion` is asked in one
    shot for all tokens, each without the others, so its product is not the probability of the whole. [end]s
    are not counted."""
    base = MODES[mode].base
    hide_all = {} if ratio_of(base) is None else {"ratio": (1, 1)}
    ids = [encode(text) for text in answers]
    # Answers that differ in their last token alone share a row: a causal model reads the same before each of
    # their tokens. `diffusion` reads nothing but masks, so all answers share one.
    shared = defaultdict(list)
    for j, tokens in enumerate(ids):
        shared[tuple(tokens[:-1]) if CAUSAL[base] else ()].append(j)
    table = torch.zeros(len(given), len(answers))
    for js in shared.values():
        rows = [Row(question, question_row("", answers[js[0]]).rest) for question in given]
        inputs, _, weights = MODES[base].objective(*stack(rows), torch.Generator(), **hide_all)
        device = model.embed.weight.device
        logits = logits_of_words(model, inputs.to(device), (weights > 0).to(device))  # (M x CANVAS, V)
        log_ps = logits.log_softmax(-1).view(len(given), CANVAS, -1).cpu()            # (M, CANVAS, V)
        picked = torch.tensor([ids[j] for j in js])                                   # (answers, n)
        table[:, js] = log_ps[:, torch.arange(picked.size(1)), picked].sum(-1)        # (M, answers)
    return table


def bayes(model, mode, corpus):
    """What a model knows but may be unable to say: one backward question to each of PROBED new people.

    A name can be found without ever being said. Let all people be equally likely before; then Bayes' rule
    turns the *forward* direction round:

        p(person | clues)  is proportional to  the product of  p(value | "What is the attribute of person?")

    -> scores. bayes: how often the right person is the best of all people by that; bayes_new: of the new.
    rank, rank_new: the median rank of the right name by p(name | backward question), 1 being the best.
    """
    model.eval()
    people = corpus.people
    last_of_each = {item.person.name: item for item in corpus.exams["backward"]}
    items = list(last_of_each.values())[:PROBED]
    by_facts = torch.zeros(len(items), len(people))
    for attribute in corpus.world.attributes:
        clue = {i: item.person.facts[attribute] for i, item in enumerate(items)
                if attribute in item.attributes}
        if clue:
            values = sorted(set(clue.values()))
            questions = [question_row(forward_question(person, attribute), "").given for person in people]
            table = log_p(model, mode, questions, values)  # (people, values)
            for i, value in clue.items():
                by_facts[i] += table[:, values.index(value)]
    by_name = log_p(model, mode, [item.given for item in items], [person.name for person in people])
    right = torch.tensor([[people.index(item.person)] for item in items])  # (items, 1)

    def rank(table, first):
        """(items,) ranks of the right people among people[first:]; who is as likely counts half"""
        own = table.gather(1, right)
        table = table[:, first:]
        return 0.5 + (table > own).sum(1) + (table == own).sum(1) / 2
    scores = {}
    for among, first in (("", 0), ("_new", corpus.known)):
        scores[f"bayes{among}"] = (rank(by_facts, first) == 1).double().mean().item()
        scores[f"rank{among}"] = median(rank(by_name, first).tolist())
    return scores


# -----------------------------------------------------------------------------
# From here on: no idea of the paper; skip it at first. Chance, fingerprints, tables, curves, asking.

def chance(corpus):
    """Scores without knowledge. chance_: a random value of the attribute, a random name of all people.
    fixed_: one answer to all questions of a kind, the one that is right most often in this exam."""
    def share_of_top(items):
        return max(Counter(tuple(item.truth) for item in items).values()) / len(items)

    world, asked = corpus.world, corpus.exams
    kinds = [[item for item in asked["forward"] if item.attributes == (a,)] for a in world.attributes]
    return {"chance_forward": mean(1 / len(a.values) for a in world.attributes.values()),
            "chance_backward": 1 / len(corpus.people),
            "fixed_forward": mean(map(share_of_top, kinds)),
            "fixed_backward": share_of_top(asked["backward"]),
            "items": {name: len(items) for name, items in asked.items()}}


FILES = Path(__file__).resolve().parent


def fingerprints():
    """What a result depends on besides its settings: the versions of Python and torch, and of each file here
    that has been imported a hash of its code. Comments, docstrings and blank lines do not count."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    paths = {Path(getattr(module, "__file__", None) or "").resolve() for module in list(sys.modules.values())}
    for path in sorted(path for path in paths if path.parent == FILES and path.is_file()):
        tree = ast.parse(path.read_text(encoding="utf-8-sig"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:]
        found[path.name] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]
    return found


def differences(before, now):
    """What is not the same in two dicts with settings and code: "lr = 0.01, not 0.02; model.py"."""
    changed = [f"{name} = {before['settings'].get(name)}, not {value}"
               for name, value in now["settings"].items() if before["settings"].get(name) != value]
    changed += [name for name in sorted({*before["code"], *now["code"]})
                if before["code"].get(name) != now["code"].get(name)]
    return "; ".join(changed)


def results_at(path):
    """{name: result} of one run's folder, of a folder of runs, or of a file with a result a line."""
    if path.suffix == ".jsonl" and path.exists():
        named = {line.get("name", f"line {i}"): line for i, line in enumerate(load(path), start=1)}
        return named or sys.exit(f"{path} is empty")
    paths = [path / "result.json"] if (path / "result.json").exists() else sorted(path.glob("*/result.json"))
    if not paths:
        sys.exit(f"{path} holds no finished run: python train.py --mode masked makes one under out/")
    return {path.resolve().parent.name: load(path) for path in paths}


def group(results, over=None):
    """{name: result} -> {label: runs that differ only in the seed (and the setting `over`)}. The label: the
    first name less its seed (and that setting) or, if another row has that, the name and what differs."""
    rows = defaultdict(dict)  # what is the same -> {(seed, value of `over`): (name, result)}
    for name, result in results.items():
        settings = dict(result["settings"])
        varied = settings.pop("seed"), settings.pop(over, None)
        rows[json.dumps([settings, result["code"]])][varied] = name, result  # a copy of a run counts once
    table = {}
    for row in rows.values():
        (seed, value), (name, result) = next(iter(row.items()))
        label = name.removesuffix(f"-seed{seed}").replace(f"-{over}{value}", "")
        if label in table:
            label = f"{name} ({differences(result, table[label][0])})"
        table[label] = [result for _, result in row.values()]
    return table


def report(scores):
    """The table at the end of a run: new people, rung by rung, then known people; after and before."""
    lines = [f"{'exact match':<47}items  after              before  chance"]
    for name, label in (
            ("recite", "new people: recite their own document"),
            ("cloze", "new people: cloze, the name and a fact's words"),
            ("forward", "new people: question, name -> attribute"),
            ("backward", "new people: question, attributes -> name"),
            ("known_forward", "known people: question, name -> attribute"),
            ("known_backward", "known people: question, attributes -> name"),
            ("known_unasked", "known people: the same, from clues never asked")):
        if name in scores:
            before = scores.get("exams", [{}])[0].get(name)
            before = "    " if before is None else f"{before:.2f}"
            luck = scores["chance_backward" if name.endswith(("backward", "unasked")) else "chance_forward"]
            lines.append(f"{label:<47}{scores['items'][name]:>5}  {scores[name]:.2f} "
                         f"{'█' * round(10 * scores[name]):·<10}    {before}    {luck:.2f}")
    if "bayes" in scores:
        people = round(1 / scores["chance_backward"])
        lines += ["what it knows, but may be unable to say, of the first new people:",
                  f"    by its own forward answers (Bayes), the right one of {people} is the likeliest: "
                  f"{scores['bayes']:.2f}",
                  f"    rank of the right name, when asked for it: {scores['rank']:.0f} of all, "
                  f"{scores['rank_new']:.0f} of new people's (medians)"]
    return "\n".join(lines)


def spread(runs, name):
    """Mean ± standard deviation of a number over runs: "0.500±0.141"; a dash where a run has none."""
    values = [run[name] for run in runs if name in run]
    if len(values) < len(runs):
        return "-"
    digits = ".1f" if name.startswith("rank") else ".3f"
    return f"{mean(values):{digits}}" + (f"±{stdev(values):{digits}}" if len(values) > 1 else "")


COLUMNS = ("recite", "cloze", "forward", "backward", "bayes", "rank", "rank_new", "known_forward",
           "known_backward", "known_unasked")


def compare(results):
    """A table with a line for each setting: exact match, and the ranks."""
    rows = [["", "seeds", *COLUMNS]]
    for label, runs in group(results).items():
        rows.append([label, str(len(runs)), *(spread(runs, name) for name in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def curve(runs, direction, over):
    """{x: (mean, deviation) over runs}. x: a step of fine-tuning; with `over`: that setting, final scores."""
    points = defaultdict(list)
    for run in runs:
        if over:
            points[run["settings"][over]].append(run[direction])
        else:
            for line in run["exams"]:
                points[line["step"]].append(line[direction])
    return {x: (mean(y), stdev(y) if len(y) > 1 else 0) for x, y in sorted(points.items())}


def plot(results, over=None):
    """One SVG, a panel per direction: new people's scores over fine-tuning, or the last ones over a setting.
    A line per row of `group`, a band of one standard deviation over its seeds. A white background keeps it
    readable on dark pages; the colours are those of Okabe and Ito, for the colour-blind."""
    lines = {label: [curve(runs, direction, over) for direction in ("forward", "backward")]
             for label, runs in group(results, over).items()}
    lines = {label: both for label, both in lines.items() if len(both[0]) > 1}  # a point is not a line
    if not lines:
        sys.exit(f"--over {over}: no two of these runs differ in that and nothing else but the seed")
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"] * len(lines)
    ticks = sorted({x for forward, _ in lines.values() for x in forward})
    width, height = 250, max(230, 15 * len(lines))      # of a panel; in it, (0, 0) is the upper left corner
    room = 20 + 8 * max(map(len, lines))                # beside it, for labels
    across = lambda x: round(width * x / ticks[-1], 1)
    down = lambda score: round(height * (1 - min(max(score, 0), 1)), 1)
    whole = 100 + 2 * (width + room)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {height + 100}" '
             'font-family="sans-serif" font-size="13">', '<rect width="100%" height="100%" fill="white"/>']
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
            ends.append((down(both[i][max(both[i])][0]), label, colour))
        y = height + 15
        for above, (end, label, colour) in reversed(list(enumerate(sorted(ends)))):  # the lowest label first
            y = max(min(end, y - 15), 15 * above)  # above the last one; `above` labels still need room
            text(width + 6, round(y), html.escape(label), f'fill="{colour}" dy="4"')
        parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def reopen(folder):
    """The run, or base, in a folder, from its checkpoint -> (mode, corpus, model). One line says which files
    have changed since."""
    path = folder / "ckpt.pt"
    if not path.exists():
        sys.exit(f"{path} is missing: name the folder of one run; python train.py --mode masked makes one")
    saved = load(path)
    settings, now = argparse.Namespace(**saved["settings"]), fingerprints()
    changed = [name for name, print_ in saved["code"].items() if now.get(name, print_) != print_]
    if {"data.py", "model.py"} & {*changed}:
        sys.exit(f"{path} was made with another {' and '.join(changed)}: its words or weights would be "
                 "others. Undo that, or train again")
    if changed:
        print(f"(since this was trained, there are changes in {', '.join(changed)})")
    model = Transformer(settings, CAUSAL[MODES[settings.mode].base]).to(DEVICES[-1])
    model.load_state_dict(saved["model"])
    model.eval()
    return settings.mode, make_corpus(settings), model


def row_to_fill(text, corpus):
    """The text of --ask as ids: a document whose [mask]s are blanks, or a question and its canvas."""
    ids = []
    for word in re.findall(r"\[mask\]|[.,?]|[^\s.,?[]+|\[", text):
        if word not in (*WORDS, "[mask]", ".", ",", "?"):
            sys.exit(f"--ask: {word!r} is not a word of these worlds; python data.py prints some that are")
        ids.append(TOKENIZER.encode_single_token(f" {word}" if word in WORDS else word))
    if ("[mask]" in text) == ("?" in text):  # neither or both
        sys.exit("--ask: give it a question with its ?, or a text with [mask] where words are missing")
    limit = corpus.width - 2 if "[mask]" in text else 40
    if len(ids) > limit:
        sys.exit(f"--ask: {len(ids)} tokens are too many: {limit} at most")
    if "[mask]" in text:
        return [MARKS.doc, *ids, MARKS.end]
    return [MARKS.question, *ids, MARKS.answer] + [MARKS.mask] * CANVAS


def ask(model, mode, corpus, ids):
    """Show step by step how the [mask]s of a row are filled, the newest tokens standing out: in place on a
    terminal, else as lines. Then the text, or the answer."""
    terminal = sys.stdout.isatty()
    places = [i for i, token in enumerate(ids) if token == MARKS.mask]
    before = ids
    for [row] in fill(model, mode, [ids], [places], corpus.width):
        words = [word.replace("[mask]", "___") for word in words_of(row)]
        for i in places:
            if row[i] != before[i]:
                words[i] = f"\x1b[7m{words[i]}\x1b[0m" if terminal else f">{words[i]}<"  # 7: inverse
        print("\x1b[2J\x1b[H" * terminal + join(words))  # on a terminal, clear it and start at its top
        time.sleep(0.15 * terminal)
        before = row
    print(decode(row[-CANVAS:] if ids[0] == MARKS.question else row[1:]))
    if ids[0] == MARKS.doc and mode in ("ar", "random_prompt"):
        print("(filled from left to right: the words after a blank were not seen)")


def main():
    sys.stdout.reconfigure(errors="replace")  # some terminals cannot print the "█" of a bar
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description="Compare runs, draw them, examine one, or ask it.")
    parser.add_argument("path", nargs="?", default="out", type=Path,
                        help="one run, the folder of many, or a file with a result a line (default: out)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--plot", type=Path, metavar="FILE.svg", help="draw the runs' scores over fine-tuning into a file")
    add("--exam", action="store_true", help="examine a stored model with today's exam and decoders")
    add("--ask", nargs="?", const="", metavar="TEXT", help="let one run answer a question, or fill in each "
        "[mask] of a text; without TEXT, write a new person's biography, then answer who that is")
    parser.add_argument("--over", metavar="SETTING", help="with --plot: the last scores over this setting")
    args = parser.parse_args()
    if args.plot is not None and args.plot.suffix != ".svg" or args.over and not args.plot:
        parser.error("--plot: name a file that ends in .svg; --over goes with it")

    if args.exam or args.ask is not None:
        mode, corpus, model = reopen(args.path)
        if args.exam:
            scores, _ = exam(model, mode, corpus)
            return print(report(scores | bayes(model, mode, corpus) | chance(corpus)))
        if args.ask:
            return ask(model, mode, corpus, row_to_fill(args.ask, corpus))
        cloze, backward = corpus.exams["cloze"][0], corpus.exams["backward"][0]
        name = cloze.given[:1 + NAME]  # with [doc]
        ask(model, mode, corpus, name + [MARKS.mask] * (len(cloze.given) + cloze.blanks - len(name)))
        return ask(model, mode, corpus, backward.given + [MARKS.mask] * CANVAS)

    results = results_at(args.path)
    if args.over:
        results = {name: result for name, result in results.items()
                   if isinstance(result["settings"].get(args.over), (int, float))}
        if not results:
            parser.error(f"--over {args.over}: this is a number among the settings of no run")
    if args.plot:
        write(args.plot, plot(results, args.over).encode())
        print(f"{args.plot} is drawn")
    elif (args.path / "result.json").exists():
        print(report(*results.values()))
    else:
        print(compare(results))


if __name__ == "__main__":
    main()
