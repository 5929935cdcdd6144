"""Scores that can be trusted: exact match, the three rungs, Bayes, chance, and the tables of them."""
import json
import re
from pathlib import Path
from statistics import mean, stdev
from xml.etree import ElementTree

import pytest
import torch

import eval as evaluation
from conftest import ROOT, call, edit, generator, refusal, settings
from data import CANVAS, EXAMS, MARKS, decode, encode, make_corpus, question_row
from diffusion import CAUSAL, MODES, decode_ar, decode_diffusion, with_random_words
from model import Transformer

CORPUS = make_corpus(settings(known=6, new=5, wordings=1))
WIDTH = CORPUS.width
NOTHING = torch.nn.Module()  # in place of a model, where its answers are given


def untrained(causal):
    """A model with opinions: random weights, none of them zero."""
    model = Transformer(settings(), causal)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=generator())
    return model


WRITABLE = [i for i in range(len(untrained(True).embed.weight)) if i == MARKS.end or i not in MARKS]


def by_hand(model, mode, ids, places):
    """What a mode writes at the places of a row: the row alone, one argmax a step."""
    row, places = list(ids), list(places)
    for place in places:
        row[place] = MARKS.mask
    if ids[0] == MARKS.doc and MODES[mode].decode not in (decode_ar, decode_diffusion):
        prompt = row + [MARKS.pad] * (WIDTH - len(row))  # as in training: the copy starts WIDTH tokens behind
        if mode == "random_prompt":
            [prompt] = with_random_words(torch.tensor([prompt]), (WIDTH,), generator(0)).tolist()
        row, places = prompt + [MARKS.answer] + row[1:], [WIDTH + place for place in places]
    blank = list(places)
    while blank:
        with torch.no_grad():
            logits = model(torch.tensor([row]))[0][:, WRITABLE].float()
        if CAUSAL[MODES[mode].base]:
            place = blank[0]
            scores = logits[place - 1]
        else:  # the surest of the places that are still masked
            place = max(blank, key=lambda i: logits[i].log_softmax(-1).max())
            scores = logits[place]
        row[place] = WRITABLE[int(scores.argmax())]
        blank.remove(place)
    return [row[place] for place in places]


@pytest.mark.parametrize("mode", MODES)
def test_each_answer_is_that_of_its_row_alone_one_token_after_the_other(mode):
    """Whatever the batch. A causal model goes on from what stands before the blank, and behind a prompt in
    the copy, so a name can follow from facts behind it."""
    model = untrained(CAUSAL[MODES[mode].base])
    questions = CORPUS.exams["forward"][:6] + CORPUS.exams["backward"][:4]
    for items in (CORPUS.exams["recite"][:7], questions):
        written = evaluation.answer(model, mode, items, WIDTH, batch=3)
        for item, given in zip(items, written):
            places = range(len(item.given), len(item.given) + len(item.truth))
            assert len(given) == len(item.truth) in (1, 3, CANVAS)
            assert given == by_hand(model, mode, item.given + [MARKS.mask] * item.blanks, places)
    ids = evaluation.row_to_fill("[mask] Chase [mask] comes from Elkton.", CORPUS)
    *_, [filled] = evaluation.fill(model, mode, [ids], [[1, 3]], WIDTH)
    assert [filled[1], filled[3]] == by_hand(model, mode, ids, (1, 3))
    assert [filled[i] for i in (0, 2, 4, -1)] == [ids[i] for i in (0, 2, 4, -1)]


def examine(monkeypatch, answer, corpus=CORPUS):
    """(scores, answers) of a model that writes answer(item) to each item."""
    monkeypatch.setattr(evaluation, "answer", lambda model, mode, items, width: [answer(x) for x in items])
    return evaluation.exam(NOTHING, "ar", corpus)


def test_exact_match_counts_whole_answers(monkeypatch):
    """A model that knows new people's majors and every second backward question, and of all other answers
    leaves out the first word: 1/6 and 1/2. One word too many is wrong, and so is the name in bytes; behind an
    [end] nothing counts."""
    known = [item for item in CORPUS.exams["forward"] if "the major of" in decode(item.given)]
    known += CORPUS.exams["backward"][::2]
    scores, _ = examine(monkeypatch, lambda item: item.truth if item in known else item.truth[1:])
    majors = {f"forward {a}": float(a == "major") for a in CORPUS.world.attributes}
    assert scores == pytest.approx(dict.fromkeys(EXAMS, 0) | {"forward": 1 / 6, "backward": 0.5} | majors)
    goes_on = lambda item: [500 if token == MARKS.end else token for token in item.truth]
    after_end = lambda item: item.truth[:-1] + [500] if item.truth[-2:] == [MARKS.end] * 2 else item.truth
    spelled = lambda item: [6 + byte for byte in decode(item.truth).encode()]
    for answer, score in ((after_end, 1), (goes_on, 0), (spelled, 0)):
        scores, _ = examine(monkeypatch, answer)
        assert scores["forward"] == scores["backward"] == scores["known_unasked"] == score


def test_scores_are_split_by_whatever_an_answer_carries(monkeypatch):
    """By the number of words, say, or by the person: one line each. A group that nobody is in is left out, so
    no score is a NaN; an exam without items has no score."""
    empty = CORPUS._replace(exams=CORPUS.exams | {"recite": [], "backward": []})
    scores, answers = examine(monkeypatch, lambda x: x.truth if x.person == CORPUS.people[6] else [], empty)
    assert {"recite", "backward"}.isdisjoint(scores) and evaluation.split([], len) == {}
    forward = [line for line in answers if line["exam"] == "forward"]
    assert evaluation.split(forward, lambda line: line["person"]) == {
        person.name: float(person == CORPUS.people[6]) for person in CORPUS.people[6:]}
    assert evaluation.split(forward, lambda line: len(line["truth"].split())) == {3: 1 / 5, 1: 1 / 5}


ANSWERS = (["Curtis Chase Emley", "Curtis Chase Doyle", "Curtis Lane Emley"], ["28 May 1952", "28 May 1953"],
           ["Oslo", "Rome", "Law"])


@pytest.mark.parametrize("answers", ANSWERS, ids=("names", "dates", "words"))
@pytest.mark.parametrize("base", CAUSAL)
def test_the_probability_of_an_answer_is_the_product_over_its_tokens(base, answers):
    """A loop over single rows and floats: for a causal model log p of each token after the question and the
    tokens before it, over all that can be written; for `diffusion` after the question and four [mask]s, in
    one shot. Questions differ in length, answers share beginnings or not."""
    model, causal = untrained(CAUSAL[base]), CAUSAL[base]
    given = [question_row(text, "").given for text in ("Who lives in Oslo?", "Who went to Yale or to Rome?")]
    table = evaluation.log_p(model, base, given, answers)
    for i, question in enumerate(given):
        for j, answer in enumerate(map(encode, answers)):
            total = 0
            for n, token in enumerate(answer):
                row = question + (answer[:n] if causal else [MARKS.mask] * CANVAS)
                logits = model(torch.tensor([row]))[0, -1 if causal else len(question) + n].double()[WRITABLE]
                total += (logits - logits.exp().sum().log())[WRITABLE.index(token)].item()
            assert table[i, j].item() == pytest.approx(total, abs=1e-3)


def fabricate(monkeypatch, boaster=None):
    """log_p of a model that knows all but the second new person's facts, and says a name the less willingly
    the later it stands in the list. `boaster`: a person of whom it would believe anything."""
    first, unknown = CORPUS.exams["backward"][0], CORPUS.people[7]
    names = [person.name for person in CORPUS.people]

    def p(question, answer):
        if question.startswith("Who"):
            return -names.index(answer)
        attribute, name = re.match(r"What is the (.*) of (.*)\?", question).groups()
        person = CORPUS.people[names.index(name)]
        if person == first.person and attribute not in first.attributes:
            return -100  # no clue asks for this
        known = 0 if person.facts[attribute] == answer else -1
        if person == CORPUS.people[1] and attribute in ("employer", "work city"):
            return 0.4  # likelier than the right one by either of these alone
        return 1 if person == boaster else -2 if person == unknown else known
    monkeypatch.setattr(evaluation, "log_p", lambda model, mode, given, answers: torch.tensor(
        [[float(p(decode(ids[1:-1]), answer)) for answer in answers] for ids in given]))


def test_bayes_finds_whom_the_forward_answers_single_out(monkeypatch):
    """Of five new people the model knows four, so four are the best by the product over their clues, and over
    nothing but these. A known person who seems to fit everything spoils that among all people, not among the
    new. The right names stand on places 7 to 11 of all, 1 to 5 of the new: medians 9 and 3."""
    one_each = CORPUS._replace(exams=CORPUS.exams | {"backward": CORPUS.exams["backward"][::4]})
    for boaster, bayes in ((None, 0.8), (CORPUS.people[0], 0)):
        fabricate(monkeypatch, boaster)
        assert evaluation.bayes(NOTHING, "ar", one_each) == pytest.approx(
            {"bayes": bayes, "bayes_new": 0.8, "rank": 9, "rank_new": 3})


def test_chance_and_the_fixed_answer_are_computed():
    """Chance: 1/20160 for birth dates, 1/50 for the rest, 1/11 for names. Naming one of 5 new people for
    ever, who have four questions each: 1/5."""
    same = [item._replace(truth=[9]) for item in CORPUS.exams["forward"]]
    chance = evaluation.chance(CORPUS._replace(exams=CORPUS.exams | {"forward": same}))
    assert chance.pop("items") == dict(zip(EXAMS, (30, 30, 30, 20, 30, 10, 10)))
    assert chance == pytest.approx({"chance_forward": (1 / (28 * 12 * 60) + 5 / 50) / 6,
                                    "chance_backward": 1 / 11, "fixed_forward": 1, "fixed_backward": 1 / 5})


@pytest.mark.parametrize("arm", ("none", "name_anywhere", "name_last"))
def test_the_report_says_how_many_items_each_exam_has(arm, monkeypatch):
    """recite asks only for what stands behind the name, so with the name anywhere it has fewer items, which
    must be seen; with the name last it has none, and no line."""
    corpus = make_corpus(settings(known=6, new=4, paraphrases=arm))
    scores, _ = examine(monkeypatch, lambda item: item.truth, corpus)
    _, *lines = evaluation.report(scores | evaluation.chance(corpus)).splitlines()
    lines = [line for line in lines if line.startswith("new people:")]
    counts = {line.split()[2].strip(","): int(line[47:52]) for line in lines}
    behind = 0
    for person, row in zip(corpus.people[6:], corpus.rows["new"][0][::5 if arm == "name_anywhere" else 1]):
        text = decode(row[1:].tolist())
        behind += sum(text.index(value) > text.index(person.name) for value in person.facts.values())
    assert (counts.get("recite", 0), counts["cloze"]) == (behind, 24)
    assert {"none": behind == 24, "name_anywhere": 4 <= behind < 24, "name_last": behind == 0}[arm]


def result(seed, score, code={}, **changes):
    """A result.json with the same score everywhere, 0 before."""
    exams = [{"step": step, "forward": step and score, "backward": 0} for step in (0, 100)]
    return dict.fromkeys(EXAMS, score) | {
        "code": code, "settings": {"mode": "ar", "lr": 0.02, "seed": seed} | changes, "exams": exams}


def test_seeds_are_averaged_and_nothing_else():
    """Two seeds with .4 and .6: mean .5, deviation .141 by hand; what a run lacks is a dash. Runs of other
    settings or files are rows of their own, whatever their folders are called; where a row has the name of
    another, it says in what it differs. A copy of a run is no second seed."""
    files = {"data.py": "1a", "eval.py": "2b"}
    runs = {"slow": result(0, 0.9, files, lr=0.01) | {"bayes": 1},
            "ar-seed0": result(0, 0.4, files) | {"rank": 3.0},
            "ar-seed1": result(1, 0.6, files) | {"rank": 4.5},
            "copy": result(1, 0.6, files) | {"rank": 4.5},
            "ar-seed2": result(2, 0.5, files | {"data.py": "3c"})}
    head, *rows = [re.split("  +", line) for line in evaluation.compare(runs).splitlines()]
    slow, ar, other = (dict(zip(["name", "seeds", *head[2:]], row)) for row in rows)
    assert (slow["name"], slow["seeds"], slow["forward"], slow["bayes"]) == ("slow", "1", "0.900", "1.000")
    assert (ar["name"], ar["seeds"], ar["rank"], ar["bayes"]) == ("ar", "2", "3.8±1.1", "-")
    assert {ar[name] for name in EXAMS} == {"0.500±0.141"}
    assert other["name"] == "ar-seed2 (seed = 2, not 0; data.py)"


@pytest.mark.parametrize("name", ("data.py", "model.py", "diffusion.py", "eval.py", "train.py"))
def test_comments_and_docstrings_are_no_code(name, monkeypatch):
    """A fingerprint is that of the syntax tree: comments, blank lines and docstrings are free, a statement or
    a string that is used is not. Only the file that was edited has another one."""
    import train  # so that all five are there
    assert train and {"python", "torch", name} <= evaluation.fingerprints().keys()
    before = evaluation.fingerprints()
    free = lambda text: re.sub(r'(    """)[A-Z]', r"\1Now otherwise: ", text.replace("\n\n", "\n\n# so\n\n"))
    with monkeypatch.context() as patch:
        edit(patch, name, free)
        assert evaluation.fingerprints() == before
    edit(monkeypatch, name)
    assert {file for file, mark in evaluation.fingerprints().items() if before[file] != mark} == {name}


def test_curves_are_the_means_of_their_seeds(capfd):
    """`--plot` draws two seeds that end at .4 and .8 as one line that ends at .6 and one band from .6 - .283
    to .6 + .283, by hand, in a panel 230 high; `--over` draws the same ends over a setting. A .jsonl with a
    result a line, each with its name, gives the picture and the table of the folder."""
    for seed, texts, score in ((0, 1, 0), (1, 1, 0), (0, 5, 0.4), (1, 5, 0.8), (2, "many", 0)):
        folder = Path("out", f"a&b<c-same-texts{texts}-seed{seed}")
        folder.mkdir(parents=True)
        content = json.dumps({"name": folder.name} | result(seed, score, texts=texts) | {"backward": 0})
        (folder / "result.json").write_text(content, encoding="utf-8")
        with open("mine.jsonl", "a", encoding="utf-8") as file:
            print(content, file=file)
    end, error = 230 * 0.4, 230 * 0.2 * 2**0.5  # heights count from the top
    for flags, label in (([], "a&b<c-same-texts5"), (["--over", "texts"], "a&b<c-same")):
        for path in ("mine.jsonl", "out"):
            call(evaluation, path, "--plot", f"new/{path}.svg", *flags)
        assert Path("new/out.svg").read_bytes() == Path("new/mine.jsonl.svg").read_bytes()
        nodes = list(ElementTree.parse("new/out.svg").iter())
        lines, bands = ([[float(point.split(",")[1]) for point in node.get("points").split()]
                         for node in nodes if node.tag.endswith(tag)] for tag in ("polyline", "polygon"))
        assert pytest.approx([230, end], abs=0.1) in lines and [230, 230] in lines
        assert pytest.approx([230, end + error, end - error, 230], abs=0.1) in [band[::-1] for band in bands]
        words = [node.text for node in nodes]
        assert words.count(label) == 2 and len(lines) == (2 if flags else 6)
    assert words.count("texts") == words.count("5") == 2  # the axis of each panel, and its last value
    for over in ("mode", "lr", "text"):
        assert over in refusal(capfd, evaluation, "--plot", "x.svg", "--over", over)
    tables = [call(evaluation, path) or capfd.readouterr().out for path in ("out", "mine.jsonl")]
    assert tables[0] == tables[1] and "0.600±0.283" in tables[0]


def test_every_figure_of_the_readme_is_in_the_runs():
    """Each cell of a table whose row begins with the name of a run is what `python eval.py .lab/runs.jsonl`
    prints there (what ends all its names may stand in the head alone); where a row is a run less another, it
    is the mean of their differences, seed by seed. Each score of three decimals and each rank in a paragraph
    is in the row of a mode that it names."""
    figure_of = r"(?<![\d.])0?(\.\d{3}|[1-9]\d*\.\d)(?!\d)"
    results = evaluation.results_at(ROOT / ".lab" / "runs.jsonl")
    lines = evaluation.compare(results).splitlines()
    head, *rows = ([cell.strip() for cell in re.split("  +", line)] for line in lines)
    printed = {label: dict(zip(head[1:], cells)) for label, *cells in rows}

    def expected(row, column):
        a, *b = re.findall("`([^`]+)`", row)
        if not b:
            return printed[a + ending][column]
        if column == "seeds":
            return "3"
        one, other = a + ending, b[0] + ending
        less = [results[f"{one}-seed{i}"][column] - results[f"{other}-seed{i}"][column] for i in (1, 2, 3)]
        return f"{mean(less):+.3f}±{stdev(less):.3f}"
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")
    columns, ending, shown = [], "", set()  # (mode, figure)
    for line in "\n".join(blocks).splitlines():
        row, *cells = line.strip("|").split("|")
        if line.startswith("|run"):
            columns, ending = cells, "".join(re.findall("`(.+)`", row))
        elif line.startswith("|`"):
            for column, cell in zip(columns, cells):
                assert cell == expected(row, column), (row, column)
                shown |= {(mode, figure) for mode in re.findall(r"`(\w+)", row)
                          for figure in re.findall(figure_of, cell)}
    assert len(shown) > 40
    paper = {".153", ".002", ".966", ".678", ".892", ".696"}  # its version 6
    for block in blocks:
        if not block.startswith("|"):
            said = {figure for mode, figure in shown if f"`{mode}`" in block} | paper
            assert {*re.findall(figure_of, block)} <= said, block


def test_the_readme_shows_what_seed_0_printed():
    """Its two commands, and those for a class, train seed 0, whose results are in a file of their own. The
    table after the first command is what that run printed."""
    runs = evaluation.results_at(ROOT / ".lab" / "seed0.jsonl")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    pair = {name: [f"{run['forward']:.2f}", f"{run['backward']:.2f}"] for name, run in runs.items()}
    assert " ".join(evaluation.report(runs["masked-none-seed0"]).split()) in readme
    assert "forward {}, backward {}.".format(*pair["ar-none-seed0"]) in readme
    books = "`ar` {} / {}, `masked` {} / {} (seed 0)".format(*pair["ar-none-books-seed0"],
                                                             *pair["masked-none-books-seed0"])
    assert books.replace(" 0.", " .") in readme
    assert "Forward, from {} to {}.".format(pair["ar-none-books-seed0"][0],
                                            pair["ar-none-books-texts5-seed0"][0]) in readme
