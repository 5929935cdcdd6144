"""
The exam: what does a model know that it only read in documents? And what does it know but cannot say?

Answers are greedy, and count only if every word of them is right. A value is asked for in two ways:

    recite     [doc] Maria Reese Hubbard has a birthday on 18 December 1970. She is ...   is it stored?
    question   [question] What is the work city of Maria Reese Hubbard? [answer] ...      can it be asked for?

Questions are asked in two directions, forward (as above) and backward (facts -> name). A backward question
can also be answered by the model's own *forward* direction, with Bayes' rule (`who_is_it`, below).

    python eval.py                          compare all finished runs below out/
    python eval.py --plot curves.svg        draw their scores over fine-tuning
    python eval.py out/RUN                  examine a stored model anew, say with a decoder that you changed
    python eval.py out/RUN --plot who.svg   draw who it says people are, and who they are by Bayes
    python eval.py out/RUN --ask            watch it write a new person's biography, then say who that is
    python eval.py out/RUN --ask "What is the work city of Maria Reese Hubbard?"
    python eval.py out/RUN --ask "[mask] [mask] [mask] moved to Lagos. She took courses in Drama."
"""
import argparse
import hashlib
import html
import json
import os
import re
import sys
import textwrap
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev

import torch

from data import (ARMS, CANVAS, EXAMS, MARKS, WORDS, WORLDS, decode, encode, forward_question, make_corpus,
                  question_row, stack)
from diffusion import MODES, logits_of_words
from model import DEVICES, Transformer

# --- The exam

def fill(model, mode, corpus, texts, counts=None):
    """Fill in the [mask]s of texts, all of them or, in text i, the first counts[i]. The texts are documents,
    which the mode decodes, or questions, which its base does. After each step yield them as lists of ids."""
    documents = texts[0].startswith("[doc]")
    decode_them = MODES[mode].decode if documents else MODES[MODES[mode].base].decode
    tokens, _ = stack([(text, "") for text in texts], corpus.width if documents else 0)  # (B, T)
    blank = tokens == MARKS.mask
    if counts:
        blank &= blank.cumsum(1) <= torch.tensor(counts)[:, None]
    lengths = (tokens != MARKS.pad).sum(1).tolist()
    device = model.embed.weight.device
    for filled in decode_them(model, tokens.to(device), blank.to(device)):
        yield [row[:length] for row, length in zip(filled.tolist(), lengths)]


def exam(model, mode, corpus, names=EXAMS):
    """-> (scores, answers). Scores: exact match in each exam of `names`, in `forward` also by attribute. An
    exam without items is left out. Answers: a dict an item. For scores by something else, say the pronoun,
    put "pronoun": item.person.pronoun into that dict, and return also `split(forward, lambda line:
    f"forward {line['pronoun']}")`. Scores with a space in their name are printed below the table."""
    model.eval()
    answers = []
    for name in names:
        # A batch takes as many steps as its longest answer, so answers of one length come together.
        items = sorted(corpus.exams[name], key=lambda item: len(encode(item.truth)))
        for first in range(0, len(items), 256):
            batch = items[first:first + 256]
            texts = [item.given + " [mask]" * item.masks for item in batch]
            lengths = [len(encode(item.truth)) for item in batch]
            *_, filled = fill(model, mode, corpus, texts, lengths)  # as it is after the last step
            for item, row, length in zip(batch, filled, lengths):
                start = len(encode(item.given))
                said, truth = until_end(decode(row[start:start + length])), until_end(item.truth)
                answers.append({"exam": name, "person": item.person.name, "attributes": item.attributes,
                                "asked": item.given, "truth": truth, "answer": said, "right": said == truth})
    scores = split(answers, lambda line: line["exam"])
    forward = [line for line in answers if line["exam"] == "forward"]
    return scores | split(forward, lambda line: f"forward {line['attributes'][0]}"), answers


def until_end(text):
    """ "Lagos [end] [end] [end]" -> "Lagos" """
    return text.partition("[end]")[0].strip()


def split(answers, key):
    """{key(answer): share of right ones}: exact match by whatever `key` tells apart."""
    groups = defaultdict(list)
    for line in answers:
        groups[key(line)].append(line["right"])
    return {name: mean(right) for name, right in groups.items()}


# --- What a model knows but may be unable to say

@torch.no_grad()
def log_p(model, mode, rows):
    """log p(answer | question) of each row -> (N,). A causal model has p(token | question, tokens before it).
    `diffusion` is asked in one shot for all tokens, each without the others, so its product is not the
    probability of the whole. [end]s are not counted."""
    base = MODES[MODES[mode].base]
    tokens, learned = stack(rows)
    everything = (1, 1)  # the ratio that hides all of an answer, so nothing is drawn that matters
    inputs, targets, weights = base.objective(tokens, learned, torch.Generator(), everything)
    at = (weights > 0) & (targets != MARKS.end)  # (N, T), or (N, T - 1) from `ar`: the S words of all answers
    device = model.embed.weight.device
    log_ps = logits_of_words(model, inputs.to(device), at.to(device)).log_softmax(-1).cpu()  # (S, V)
    per_token = torch.zeros(at.shape)
    per_token[at] = log_ps.gather(1, targets[at][:, None])[:, 0]
    return per_token.sum(1)


def who_is_it(model, mode, corpus, n=30):
    """One backward question about each of the first n new people, answered in two ways.

    A name can be found without ever being said. Let all people be equally likely before. Then Bayes' rule
    turns the *forward* direction round:

        p(person | clues)  is proportional to  the product of  p(value | "What is the attribute of person?")

    -> the n items, and two (n, P) tables with a column for each of the P people: the logarithm of that
    product, and log p(name | question), which is what it says when asked.
    """
    model.eval()
    last = {item.person.name: item for item in corpus.exams["backward"]}  # of a person's questions, the last
    items = list(last.values())[:n]
    by_bayes, when_asked = [], []
    for item in items:
        forward = [question_row(forward_question(person, attribute), item.person.facts[attribute])
                   for attribute in item.attributes for person in corpus.people]
        question = item.given.removeprefix("[question] ").removesuffix(" [answer]")
        names = [question_row(question, person.name) for person in corpus.people]
        by_bayes.append(log_p(model, mode, forward).view(len(item.attributes), -1).sum(0))
        when_asked.append(log_p(model, mode, names))
    return items, torch.stack(by_bayes), torch.stack(when_asked)


def rank(scores, i):
    """The rank of number i among scores (P,): 1 is the highest; each other one with the same adds 1/2."""
    higher = (scores > scores[i]).sum().item()
    others = (scores == scores[i]).sum().item() - 1  # without i itself
    return 1 + higher + others / 2


def bayes(model, mode, corpus):
    """-> scores. bayes: how often the right person is the likeliest of all people by Bayes; bayes_new: of the
    new people. rank, rank_new: the median rank of the right name when the model is asked for it."""
    items, by_bayes, when_asked = who_is_it(model, mode, corpus)
    right = [corpus.people.index(item.person) for item in items]
    scores = {}
    for among, first in (("", 0), ("_new", corpus.known)):
        found = [rank(row[first:], i - first) == 1 for row, i in zip(by_bayes, right)]
        ranks = [rank(row[first:], i - first) for row, i in zip(when_asked, right)]
        scores |= {f"bayes{among}": mean(found), f"rank{among}": median(ranks)}
    return scores


def chance(corpus):
    """Scores without knowledge: of a random value of the attribute, of a random name of all people. And how
    many items each exam has."""
    values = [len(attribute.values) for attribute in corpus.world.attributes.values()]
    return {"chance_forward": mean(1 / n for n in values), "chance_backward": 1 / len(corpus.people),
            "items": {name: len(items) for name, items in corpus.exams.items()}}


# -----------------------------------------------------------------------------
# From here on: no idea of the paper; skip it at first. Identity, files, tables, pictures, asking.

def identity(settings, model):
    """What the training of a base or a run depends on -> {"settings": its settings without the device,
    "code": a digest of each other part}. model.py, train.py and a file of yours that is imported from beside
    them count as they are written, but for comments, docstrings and blank lines. data.py and diffusion.py
    count by what they do: the rows of a sample, 20 known and 10 new people, and what the objectives make of
    these rows. So an edit of a decoder, of the exam or of another mode changes nothing. What shows only in
    rows that the sample lacks, or after many calls of an objective, is not noticed."""
    kept = {name: value for name, value in vars(settings).items() if name != "device"}
    few = {"seed": 0, "known": min(20, settings.known), "new": min(10, settings.new)}
    rows = make_corpus(argparse.Namespace(**kept | few)).rows
    mode, base = MODES[settings.mode], MODES[MODES[settings.mode].base]
    told = ["known", "new"] if settings.batch[1] else ["known"]  # a base reads of known people alone
    documents = [torch.cat(parts) for parts in zip(*(rows[name] for name in told))]
    questions = [torch.cat(parts) for parts in zip(rows["known_forward"], rows["known_backward"])]
    made = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        batch = [*mode.objective(*documents, generator, settings.mask_ratio or mode.ratio),
                 *base.objective(*questions, generator, base.ratio)]
        made.append(str([x.double().round(decimals=6).tolist() for x in batch]))
    if made[0] != made[1]:
        sys.exit(f"--mode {settings.mode}: what its objective draws, it must draw with `generator`")
    parts = {"rows": str([x.tolist() for x in documents + questions]), "objective": made[0],
             "weights": str([(name, [*p.shape]) for name, p in model.named_parameters()] + [model.causal])}
    here = Path(__file__).resolve().parent
    files = {"model.py", "train.py"}
    for name, module in list(sys.modules.items()):  # and files of yours
        file = Path(getattr(module, "__file__", None) or "")
        if name != "__main__" and file.is_file() and file.resolve().parent == here:
            files.add(file.name)
    for name in files - {"data.py", "diffusion.py", "eval.py"}:
        parts[name] = statements((here / name).read_text(encoding="utf-8-sig"))
    return {"settings": kept, "code": {name: digest(parts[name]) for name in sorted(parts)}}


def statements(source):
    """Python source without docstrings, comments and blank lines. (Its syntax tree would be exact, but it
    differs between versions of Python.)"""
    source = re.sub(r'"""(.|\n)*?"""', "", source)
    source = re.sub(r"""("[^"\n]*"|'[^'\n]*')|#.*""", r"\1", source)  # a "#" in quotes stays
    return "\n".join(line.rstrip() for line in source.splitlines() if line.strip())


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def differences(before, now):
    """What is not the same in two identities: "lr = 0.01, not 0.02; model.py"."""
    changed = [f"{name} = {before['settings'].get(name)}, not {value}"
               for name, value in now["settings"].items() if before["settings"].get(name) != value]
    changed += [name for name in now["code"] if before["code"].get(name) != now["code"][name]]
    return "; ".join(changed)


def write(path, content):
    """Write bytes so that `path` holds the old content or the new, never half of it, even if this process is
    killed or the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may write the same base
    temporary.write_bytes(content)
    os.replace(temporary, path)


def load(path):
    """The dict in a .pt or .json file. Nothing in it is executed."""
    try:
        if path.suffix == ".pt":
            saved = torch.load(path, map_location="cpu", weights_only=True)
        else:
            saved = json.loads(path.read_text(encoding="utf-8"))
        if "seed" not in saved["settings"] or "code" not in saved:
            raise ValueError
        return saved
    except Exception:  # there is no end to what a damaged file can raise
        sys.exit(f"{path} is damaged, or no checkpoint or result: move it away, and type the command again")


def stored(folder):
    """The result or, of an unfinished run or a base, the checkpoint in a folder. None if it has neither."""
    for path in (folder / "result.json", folder / "ckpt.pt"):
        if path.exists():
            return load(path)


def claim(folder, now):
    """Make `folder` the place of the run or base whose identity is `now`. A run of another identity that is
    there moves aside, to FOLDER-old1 or the next free number. One of this identity that had moved aside comes
    back, so that an edit undone costs nothing."""
    found = stored(folder)
    changed = differences(found, now) if found else ""
    if changed:
        n = 1
        while folder.with_name(f"{folder.name}-old{n}").exists():
            n += 1
        print(f"{folder} is of another state ({changed}): it is now {folder}-old{n}")
        folder.rename(folder.with_name(f"{folder.name}-old{n}"))
    for place in sorted(folder.parent.glob(f"{folder.name}-old[0-9]*")):
        before = stored(place)
        if before and not differences(before, now) and not folder.exists():
            print(f"{place} is of this state: it is {folder} again")
            place.rename(folder)


def reopen(folder):
    """The run or base in a folder, from its checkpoint -> (mode, corpus, model)."""
    path = folder / "ckpt.pt"
    if not path.exists():
        sys.exit(f"{path} is missing: name the folder of one run, which python train.py makes under out/")
    saved = load(path)
    named = {saved["settings"].get(name) for name in ("mode", "world", "paraphrases", "known_paraphrases")}
    if "batch" not in saved["settings"] or not named <= {*MODES, *WORLDS, *ARMS}:
        sys.exit(f"{path} is of an older version, or its mode, world or arm is gone: train again")
    settings = argparse.Namespace(**saved["settings"])
    model = Transformer(settings, MODES[settings.mode].causal).to(DEVICES[-1])
    now = identity(settings, model)["code"]
    changed = [name for name in ("model.py", "rows", "weights") if saved["code"].get(name) != now[name]]
    if changed:
        sys.exit(f"{path} was trained with other {' and '.join(changed)}: undo that edit, or train again")
    model.load_state_dict(saved["model"])
    return settings.mode, make_corpus(settings), model.eval()


# --- Tables

def results_at(path):
    """[(name, result)] of all finished runs in a folder, however deep."""
    found = [(file.resolve().parent.name, load(file)) for file in sorted(path.rglob("result.json"))]
    if not found:
        sys.exit(f"{path} holds no finished run: python train.py makes one under out/, named after its flags")
    return found


def group(results):
    """[(name, result)] -> [(name without its seed, code, runs)]: the runs have one name, settings and code,
    and each another seed. `code` is six digits of all that a run depends on besides its settings."""
    groups = defaultdict(dict)
    for name, result in results:
        seed, code = result["settings"]["seed"], digest(json.dumps(result["code"]))
        alike = json.dumps(result["settings"] | {"seed": None, "device": None}, sort_keys=True)
        groups[name.replace(f"-seed{seed}", ""), code, alike][seed] = result
    return [(label, code, list(runs.values())) for (label, code, _), runs in groups.items()]


def table(rows):
    """Rows of strings -> lines of text, the columns one under the other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


REPORT = (("recite", "forward", "new people: recite their own document"),
          ("forward", "forward", "new people: question, name -> attribute"),
          ("backward", "backward", "new people: question, attributes -> name"),
          ("known_forward", "forward", "known people: question, name -> attribute"),
          ("known_backward", "backward", "known people: question, attributes -> name"),
          ("known_unasked", "backward", "known people: the same, from sets of clues never asked"))


def report(scores, other, title):
    """The table of one run: its scores now, and in another state, say before training."""
    rows = [["exact match", "items", "now", "", title, "chance"]]
    for name, direction, label in REPORT:
        if name in scores:
            then = f"{other[name]:.2f}" if name in other else ""
            bar, luck = "█" * round(10 * scores[name]), scores[f"chance_{direction}"]
            rows.append([label, str(scores["items"][name]), f"{scores[name]:.2f}", f"{bar:·<10}", then,
                         f"{luck:.2f}"])
    parts = ", ".join(f"{name} {score:.2f}" for name, score in scores.items() if " " in name)
    return "\n".join([
        *table(rows), *textwrap.wrap(f"in parts: {parts}", width=90, subsequent_indent="    "),
        "what it knows, but may be unable to say, of the first new people:",
        f"    the right one of all is the likeliest by its forward answers (Bayes): {scores['bayes']:.2f}",
        f"    median rank of the right name, when asked for it: {scores['rank']:g} of all people's names",
        f"    the same among new people's names: {scores['rank_new']:g}"])


def compare(results):
    """A table with a line for each group of runs, mean ± deviation over seeds: exact match, the share that
    `bayes` finds, the right name's rank among new people's. All other scores are in each result.json."""
    names = ["recite", "forward", "backward", "bayes", "rank_new", "known_forward", "known_backward"]
    rows = [["", "code", "seeds", *names]]
    for label, code, runs in group(results):
        rows.append([label, code, str(len(runs))])
        for name in names:
            scores = [run[name] for run in runs if name in run]
            digits = ".1f" if name.startswith("rank") else ".2f"
            spread = f"±{stdev(scores):{digits}}" if len(scores) > 1 else ""
            rows[-1].append(f"{mean(scores):{digits}}{spread}" if len(scores) == len(runs) else "-")
    return "\n".join(table(rows))


# --- Pictures, drawn on white, so that they can be read on dark pages

def svg(width, height, parts):
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                      'font-family="sans-serif" font-size="13">',
                      '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"]).encode()


def words_at(x, y, words, more=""):
    return f'<text x="{x}" y="{y}" {more}>{html.escape(str(words))}</text>'


def over_steps(runs):
    """[(step of fine-tuning, scores of a run there)] of several runs"""
    return [(line["step"], line) for run in runs for line in run["exams"]]


def curves(lines, axis, ticks=None):
    """New people's scores, a panel per direction. `lines`: [(label, [(x, scores of a run there)])]. A line is
    the mean over runs, its band one standard deviation to either side, where there are two runs or more.
    `ticks`: {x: what is written there}; without it the numbers 0 and the largest x."""
    colours = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"] * len(lines)  # Okabe, Ito
    last = max(x for _, points in lines for x, _ in points)
    ticks = ticks or {0: 0, last: last}
    width, height = 300, 230  # of a panel, whose upper left corner is (0, 0)

    def place(x, score):
        return f"{width * x / last:.1f},{height * (1 - min(max(score, 0), 1)):.1f}"

    parts = []
    for i, (direction, title) in enumerate((("forward", "forward: name → attribute"),
                                            ("backward", "backward: attributes → name"))):
        parts += [f'<g transform="translate({60 + i * (width + 60)} 40)">',
                  words_at(0, -15, title, 'font-weight="bold"'), words_at(0, height + 38, axis),
                  words_at(-height, -36, "exact match", 'transform="rotate(-90)"'),
                  *(words_at(f"{width * x / last:.0f}", height + 18, label, 'text-anchor="middle"')
                    for x, label in ticks.items())]
        for score in (0, 0.5, 1):
            parts += [words_at(-8, height * (1 - score) + 4, score, 'text-anchor="end"'),
                      f'<path d="M0 {height * (1 - score)}h{width}" stroke="#ccc"/>']
        for (_, points), colour in zip(lines, colours):
            scores_at, upper, middle, lower = defaultdict(list), [], [], []
            for x, scores in points:
                scores_at[x].append(scores[direction])
            for x, scores in sorted(scores_at.items()):
                middle.append(place(x, mean(scores)))
                if len(scores) > 1:
                    upper.append(place(x, mean(scores) + stdev(scores)))
                    lower.insert(0, place(x, mean(scores) - stdev(scores)))
            parts += [f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" opacity="0.2"/>',
                      f'<polyline points="{" ".join(middle)}" fill="none" stroke="{colour}" '
                      'stroke-width="2"/>']
        parts.append("</g>")
    for n, ((label, _), colour) in enumerate(zip(lines, colours)):
        parts.append(words_at(60, height + 105 + 18 * n, f"● {label}", f'fill="{colour}"'))
    return svg(2 * width + 150, height + 105 + 18 * len(lines), parts)


def who_is_who(corpus, items, by_bayes, when_asked):
    """The two tables of `who_is_it` as an SVG: a question a row, a person a column. The darker, the likelier:
    ink is the square root of p, so that .01 can be seen beside 1."""
    P, n = len(corpus.people), len(items)
    right = torch.tensor([corpus.people.index(item.person) for item in items])
    wide, high = 1.2, 7  # of a cell
    parts = []
    for i, (title, scores) in enumerate((("by Bayes, from its own forward answers", by_bayes),
                                         ("asked for the name", when_asked))):
        found = scores.argmax(1).eq(right).sum().item()
        parts += [f'<g transform="translate({20 + i * (P * wide + 30):.0f} 50)">',
                  words_at(0, -28, title, 'font-weight="bold"'),
                  words_at(0, -8, f"{corpus.known} known people"),
                  words_at(corpus.known * wide, -8, f"{P - corpus.known} new people"),
                  words_at(0, n * high + 20, f"the right person is the likeliest {found} of {n} times"),
                  *(f'<path d="M{x * wide} 0v{n * high}" stroke="#999"/>' for x in (0, corpus.known, P))]
        ink = (scores.softmax(1).sqrt() * 10).round()  # (n, P): 0 .. 10
        for shade in range(1, 11):
            cells = "".join(f"M{x * wide:.1f} {y * high}h{wide}v{high}h-{wide}z"
                            for y, x in (ink == shade).nonzero().tolist())
            parts.append(f'<path d="{cells}" opacity="{shade / 10}"/>')
        parts.append("</g>")
    return svg(round(2 * P * wide) + 70, n * high + 90, parts)


# --- Asking

def text_to_fill(text, corpus):
    """The TEXT of --ask as `fill` wants it: a document with its [mask]s, or a question and a canvas."""
    words = re.findall(r"\[mask\]|\w+|[^\w\s]", text)
    unknown = [word for word in words if word not in (*WORDS, "[mask]", ".", ",", "?")]
    if unknown:
        sys.exit(f"--ask: {unknown[0]!r} is not a word of these worlds; python data.py prints some that are")
    if ("[mask]" in words) == ("?" in words):  # neither or both
        sys.exit("--ask: give it a question with its ?, or a text with [mask] where words are missing")
    limit = corpus.width - 2 if "[mask]" in words else 40
    if len(words) > limit:
        sys.exit(f"--ask: {len(words)} words and marks are too many: {limit} at most")
    if "?" in words:
        return f"[question] {joined(words)} [answer]" + " [mask]" * CANVAS
    return f"[doc] {joined(words)} [end]"


def joined(words):
    """["He", "lives", "in", "Oslo", "."] -> 'He lives in Oslo.'"""
    return re.sub(r" ([.,?])", r"\1", " ".join(words))


def watch(model, mode, corpus, text):
    """Show step by step how the [mask]s of a text are filled, the newest tokens between > and <: in place on
    a terminal, else as lines. Then the text or, of a question, the answer."""
    before = encode(text)
    if sys.stdout.isatty():
        print("\x1b7", end="")  # the terminal remembers this place
    for [row] in fill(model, mode, corpus, [text]):
        words = []
        for old, new in zip(before, row):
            word = decode([new]).replace("[mask]", "___")
            words.append(word if new == old else f">{word}<")
        if sys.stdout.isatty():
            time.sleep(0.15)
            print("\x1b8\x1b[J", end="", flush=True)  # back there, and clear what is below
        print(joined(words))
        before = row
    text = decode(row)
    if "[answer]" in text:
        text = text.partition("[answer]")[2]
    print(until_end(text.removeprefix("[doc]")))


def introduce(model, mode, corpus):
    """A new person's life, of which the model is given the name. Then who has these facts: what it says, and
    the five likeliest of all people, when it is asked and by Bayes."""
    [item], [by_bayes], [when_asked] = who_is_it(model, mode, corpus, n=1)
    name = f"[doc] {item.person.name}"
    _, learned = corpus.rows["new"]
    length = 1 + learned[0].sum().item()  # [doc] and all else that the first new document has
    watch(model, mode, corpus, name + " [mask]" * (length - len(encode(name))))
    watch(model, mode, corpus, item.given + " [mask]" * CANVAS)
    right, P = corpus.people.index(item.person), len(corpus.people)
    for title, scores in (("Asked for the name,", when_asked),
                          ("By Bayes from its forward answers (flat prior, independent clues)", by_bayes)):
        print(f"\n{title} the likeliest of {P} people are:")
        p, best = scores.softmax(0).tolist(), scores.topk(min(5, P)).indices.tolist()
        for i in best:
            mark = " <- right" if i == right else ""
            print(f"    {corpus.people[i].name:<28} {p[i]:.2f} {'█' * round(20 * p[i]):·<20}{mark}")
        if right not in best:
            print(f"    {item.person.name:<28} {p[right]:.2f} is right, on rank {rank(scores, right):.0f}")


def main():
    sys.stdout.reconfigure(errors="replace")  # some terminals cannot print the "█" of a bar
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description="Compare runs, draw them, examine one, or ask it.")
    parser.add_argument("path", nargs="?", default="out", type=Path, help="a run, or a folder of runs (out)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--plot", type=Path, metavar="FILE.svg", help="draw a run's who is who, or a folder's curves")
    add("--ask", nargs="?", const="", metavar="TEXT", help="answer a question, or fill in each [mask] of a "
        "text; without TEXT, write a new person's biography, then say who that is")
    args = parser.parse_args()
    if args.plot and args.plot.suffix != ".svg":
        parser.error("--plot: name a file that ends in .svg")

    if args.ask is not None or (args.path / "ckpt.pt").exists():  # one run
        mode, corpus, model = reopen(args.path)
        if args.ask is not None and sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")  # clear the terminal, and start at its top
        if args.ask:
            watch(model, mode, corpus, text_to_fill(args.ask, corpus))
        elif args.ask == "":
            introduce(model, mode, corpus)
        elif args.plot:
            write(args.plot, who_is_who(corpus, *who_is_it(model, mode, corpus)))
        else:
            scores, _ = exam(model, mode, corpus)
            print(report(scores | bayes(model, mode, corpus) | chance(corpus), stored(args.path), "stored"))
    elif args.plot:
        lines = [(f"{label} {code}", over_steps(runs)) for label, code, runs in group(results_at(args.path))]
        write(args.plot, curves(lines, "steps of fine-tuning"))
    else:
        print(compare(results_at(args.path)))


if __name__ == "__main__":
    main()
