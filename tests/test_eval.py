"""Scores that can be trusted: exact match, Bayes, chance, and their tables and pictures."""
import json
import re
from pathlib import Path
from statistics import mean, stdev
from xml.etree import ElementTree

import pytest
import torch

import eval as evaluation
from conftest import ROOT, call, generator, settings
from data import CANVAS, EXAMS, MARKS, TOKENIZER, Attribute, encode, make_corpus, question_row
from diffusion import MODES
from model import Transformer

CORPUS = make_corpus(settings(known=6, new=5))
WORLD, PEOPLE, NAMES = CORPUS.world, CORPUS.people, [person.name for person in CORPUS.people]
WRITABLE = [i for i in range(TOKENIZER.n_vocab) if i == MARKS.end or i not in MARKS]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def untrained(mode):
    """A model with opinions: random weights, none of them zero."""
    model = Transformer(settings(), MODES[mode].causal)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=generator())
    return model.eval()


def by_hand(model, mode, ids, blank):
    """A row as a mode fills its places `blank`, which are [mask]s: alone, one argmax a step."""
    row, start = list(ids), 0
    if mode == "masked" and ids[0] == MARKS.doc:  # as in training: the response starts one width behind
        start = CORPUS.width
        row += [MARKS.pad] * (start - len(ids)) + [MARKS.answer] + row[1:]
    blank = [start + place for place in blank]
    while blank:
        with torch.no_grad():
            logits = model(torch.tensor([row]))[0][:, WRITABLE].double()
        place = blank[0] if model.causal else max(blank, key=lambda i: logits[i].log_softmax(-1).max())
        row[place] = WRITABLE[int(logits[place - model.causal].argmax())]
        blank.remove(place)
    return ids[:1] + row[start + 1:]


@pytest.mark.parametrize("mode", ("ar", "diffusion", "masked"))
def test_each_answer_is_that_of_its_row_alone_one_token_after_the_other(mode):
    """Whatever the batch. A causal model goes on from what stands before the blank, and behind a prompt in
    the response, so a name can follow from facts behind it. `diffusion` fills the place it is surest of."""
    model = untrained(mode)
    documents, questions = ([x.given + " [mask]" * x.masks for name in names for x in CORPUS.exams[name]]
                            for names in (["recite"], ["forward", "backward"]))
    documents.append("[doc] [mask] Chase [mask] comes from [mask]. He went to [mask]. [end]")
    for texts in (documents, questions):
        counts = [1 + i % 4 for i in range(len(texts))]
        *_, filled = evaluation.fill(model, mode, CORPUS, texts, counts)
        for text, row, count in zip(texts, filled, counts, strict=True):
            ids = encode(text)
            assert row == by_hand(model, mode, ids, [i for i, x in enumerate(ids) if x == MARKS.mask][:count])


def examine(monkeypatch, answer, corpus=CORPUS):
    """(scores, answers) of a model that would write the text answer(item) to each item."""
    items = {item.given + " [mask]" * item.masks: item for name in EXAMS for item in corpus.exams[name]}

    def fill(model, mode, corpus, texts, counts):
        written = [encode(answer(items[text]))[:n] for text, n in zip(texts, counts)]
        yield [encode(items[text].given) + ids for text, ids in zip(texts, written)]
    monkeypatch.setattr(evaluation, "fill", fill)
    return evaluation.exam(torch.nn.Module(), "ar", corpus)


def test_exact_match_counts_whole_answers(monkeypatch):
    """Who knows one attribute of new people and every second backward question, and leaves out the first word
    of all else, is right there alone, by whatever scores are split. A word too many is wrong, unless behind
    an [end]. A batch has 256 items, here are more."""
    corpus, (first, *rest) = make_corpus(settings(new=80)), WORLD.attributes
    known = {item.given for item in corpus.exams["forward"] if item.attributes == (first,)}
    known |= {item.given for item in corpus.exams["backward"][::2]}
    scores, answers = examine(monkeypatch, corpus=corpus, answer=lambda item: (
        item.truth if item.given in known else item.truth.partition(" ")[2]))
    expected = dict.fromkeys(EXAMS, 0) | {f"forward {a}": 0 for a in rest} | {
        "forward": 1 / len(WORLD.attributes), "backward": 1 / 2, f"forward {first}": 1}
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    split = evaluation.split([x for x in answers if x["exam"] == "forward"], lambda x: x["person"])
    assert split == pytest.approx({person.name: 1 / len(WORLD.attributes) for person in corpus.people[6:]})
    for end, other, score in (("[end]", "Oslo", 0), ("[end] [end]", "[end] Oslo", 1)):
        scores, _ = examine(monkeypatch, lambda item: item.truth.replace(end, other))
        assert scores["forward"] == scores["backward"] == scores["known_unasked"] == score


@pytest.mark.parametrize("mode", MODES)
def test_the_probability_of_an_answer_is_the_product_over_its_tokens(mode):
    """A loop over single rows and floats: a causal model reads the question and the tokens before,
    `diffusion` the question and four [mask]s, once for all. Marks are ruled out. Rows differ in length."""
    model = untrained(MODES[mode].base)
    rows = [question_row(question, answer) for question in ("Who lives in Oslo?", "Who went to Yale or Rome?")
            for answer in ("Curtis Chase Emley", "Curtis Chase Doyle", "28 May 1952", "Oslo", "Law")]
    for (given, answer), log_p in zip(rows, evaluation.log_p(model, mode, rows), strict=True):
        question, words, total = encode(given), [i for i in encode(answer) if i != MARKS.end], 0
        for n, token in enumerate(words):
            row = question + (words[:n] if model.causal else [MARKS.mask] * CANVAS)
            logits = model(torch.tensor([row]))[0, -1 if model.causal else len(question) + n]
            total += logits[WRITABLE].double().log_softmax(0)[WRITABLE.index(token)].item()
        assert log_p.item() == pytest.approx(total, abs=1e-3)


def test_bayes_finds_whom_the_forward_answers_single_out(monkeypatch):
    """Of five new people a model knows four, so four are the best by the product over their clues. A known
    person who seems to fit everything spoils that among all people, not among the new. The later a pair of
    names stands in the list, the less it is said: the right ones are on ranks 7.5, 7.5, 9.5, 9.5 and 11."""
    def p(question, answer):
        if question.startswith("Who"):
            return -(NAMES.index(answer) // 2)
        attribute, name = re.match(r"What is the (.*) of (.*)\?", question).groups()
        person = PEOPLE[NAMES.index(name)]
        if person == PEOPLE[1] and attribute == list(WORLD.attributes)[-1]:
            return 0.4  # likelier than the right one by this alone
        return 1 if person == boaster else -2 if person == PEOPLE[7] else -(person.facts[attribute] != answer)

    def log_p(model, mode, rows):
        assert len(rows) in (len(PEOPLE), WORLD.who.count("{}") * len(PEOPLE))  # no more than is asked for
        return torch.tensor([float(p(given[11:-9], answer.split(" [end]")[0])) for given, answer in rows])
    monkeypatch.setattr(evaluation, "log_p", log_p)
    for boaster, share in ((None, 0.8), (PEOPLE[0], 0)):
        assert evaluation.bayes(torch.nn.Module(), "ar", CORPUS) == pytest.approx(
            {"bayes": share, "bayes_new": 0.8, "rank": 9.5, "rank_new": 3.5})


def test_the_report_shows_now_before_and_chance():
    """A line an exam, but for what was not asked. In a world of two colours of eyes and four towns chance is
    (1/2 + 1/4) / 2; of eleven names it is 1/11."""
    pool = {"eyes": Attribute(["blue", "green"], [], "", ""), "town": Attribute([*"abcd"], [], "", "")}
    chance = evaluation.chance(CORPUS._replace(world=WORLD._replace(attributes=pool)))
    asked = [name for name in EXAMS if name != "recite"]
    scores = dict.fromkeys(asked, 0.5) | {"bayes": 1, "rank": 1, "rank_new": 1} | chance
    report = evaluation.report(scores, {"backward": 0.25}, "before")
    rows = [re.split("  +", line)[1:] for line in report.splitlines() if "█" in line]
    before, luck = ["", "0.25", "", "", ""], ["0.38", "0.09", "0.38", "0.09", "0.09"]
    assert rows == [[str(len(CORPUS.exams[name])), "0.50", "█████·····", *filter(None, (a, b))]
                    for name, a, b in zip(asked, before, luck)]


def result(seed, score, code="1a", machine="x86", **changes):
    """A result.json with the same score everywhere."""
    exams = [{"step": step, "forward": step and score, "backward": 0} for step in (0, 100)]
    settings = {"mode": "ar", "lr": 0.02, "seed": seed} | changes
    return dict.fromkeys(EXAMS, score) | dict.fromkeys(["machine", "python", "torch"], machine) | {
        "code": {"rows": code}, "exams": exams, "settings": settings}


def test_seeds_are_averaged_and_nothing_else():
    """Two seeds with .4 and .8, of two laptops, in folders however deep: mean .6, deviation .28 by hand, in
    table and curves, whose panel is 300 wide and 230 high. What a run lacks is a dash. Other settings or code
    are rows and lines of their own, even of one name. A copy of a run is no second seed."""
    for folder, run in {
            "out/a&b-seed0": result(0, 0.4) | {"rank_new": 3.0},
            "out/ann/out/a&b-seed1": result(1, 0.8, machine="arm") | {"rank_new": 4.5},
            "out/bob/my/out/a&b-seed1": result(1, 0.8, device="cuda") | {"rank_new": 4.5},
            "out/bob/out/a&b-seed2": result(2, 0.5, code="3c"),
            "out/slow/a&b-seed0": result(0, 0.9, lr=0.01) | {"bayes": 1}}.items():
        Path(folder).mkdir(parents=True)
        Path(folder, "result.json").write_text(json.dumps(run), encoding="utf-8")
    head, *rows = [re.split("  +", line) for line in call(evaluation).splitlines()]
    ab, other, slow = (dict(zip(["name", *head[1:]], row)) for row in rows)
    assert (slow["name"], slow["seeds"], slow["forward"], slow["bayes"]) == ("a&b", "1", "0.90", "1.00")
    assert (other["name"], other["seeds"], other["forward"]) == ("a&b", "1", "0.50")
    assert (ab["name"], ab["seeds"], ab["rank_new"], ab["bayes"]) == ("a&b", "2", "3.8±1.1", "-")
    assert {ab[name] for name in EXAMS if name != "known_unasked"} == {"0.60±0.28"}
    assert ab["code"] == slow["code"] != other["code"]
    call(evaluation, "--plot", "new/curves.svg")
    nodes = list(ElementTree.parse("new/curves.svg").iter())
    lines, bands = ([[float(x) for x in re.findall(r"[\d.-]+", node.get("points"))]
                     for node in nodes if node.tag.endswith(tag)] for tag in ("polyline", "polygon"))
    middle, error = 230 * 0.4, 230 * 0.2 * 2**0.5  # heights count from the top
    assert lines[0] == pytest.approx([0, 230, 300, middle], abs=0.1) and len(lines) == len(bands) == 2 * 3
    assert bands[0] == pytest.approx([0, 230, 300, middle - error, 300, middle + error, 0, 230], abs=0.1)
    assert lines[3:] == 3 * [[0, 230, 300, 230]] and bands[1:3] == [[], []]  # other direction; one seed each


def test_who_is_who_shows_where_the_right_person_is(runs):
    """A question a row of 7, a person a column of 1.2: left by Bayes, here certain of the right one of 300,
    right when asked, here certain of the second name. So each panel has 30 cells, all black, at places that
    are computed by hand. --plot draws it of a run, and it is small."""
    corpus = make_corpus(settings(known=200, new=100))
    items, by_bayes, when_asked = evaluation.who_is_it(untrained("ar"), "ar", corpus)
    by_bayes[:], when_asked[:] = -50, -50
    by_bayes[range(30), range(200, 230)] = when_asked[:, 1] = 0
    call(evaluation, "out/masked", "--plot", "new/who.svg")
    pictures = Path("new/who.svg").read_bytes(), evaluation.who_is_who(corpus, items, by_bayes, when_asked)
    assert max(map(len, pictures)) < 10_000
    _, panels = ([x for x in ElementTree.fromstring(picture) if x.tag.endswith("}g")] for picture in pictures)
    for panel, columns, found in zip(panels, (range(200, 230), [1] * 30), (" 30 of 30", " 0 of 30")):
        [inked] = [path for path in panel if path.get("opacity") and path.get("d")]
        cells = [(f"{1.2 * x:.1f}", str(7 * y)) for y, x in enumerate(columns)]
        assert re.findall(r"M([\d.]+) (\d+)h1.2v7h-1.2z", inked.get("d")) == cells
        assert float(inked.get("opacity")) == 1 and found in "".join(panel.itertext())


@pytest.mark.parametrize("mode", ("masked", "diffusion"))
def test_ask_shows_every_step_and_marks_the_newest_token(mode, runs):
    """A canvas of four, one token a step: four lines, each with one token marked, then the answer."""
    question = "What is the major of Curtis Chase Emley?"
    *lines, answer = call(evaluation, f"out/{mode}", "--ask", question).splitlines()
    assert [line.count("___") for line in lines] == [3, 2, 1, 0] and all(question in line for line in lines)
    assert all(line.count(">") == line.count("<") == 1 for line in lines) and ">" not in answer


@pytest.mark.parametrize("place", (1, 4, 7))
def test_ask_without_a_text_introduces_a_new_person(place, runs, monkeypatch):
    """A life, of which the name is given, then who that is, then the five likeliest people with bars of 20,
    when asked, here all ten alike, and by Bayes, here .5, .2 ... The right one is marked, or its rank is."""
    corpus = make_corpus(settings())
    item, names = corpus.exams["backward"][0], [person.name for person in corpus.people]
    order = [name for name in names if name != item.person.name]
    order.insert(place - 1, item.person.name)
    likely = torch.tensor([0.5, 0.2, 0.1, 0.08, 0.05, 0.03, 0.02, 0.01, 0.006, 0.004]).log()
    tables = likely[[order.index(name) for name in names]][None], torch.zeros(1, 10)
    monkeypatch.setattr(evaluation, "who_is_it", lambda *_, n: ([item], *tables))
    life, *answer = call(evaluation, "out/masked", "--ask").split("[question]")
    written = [line for line in life.splitlines() if line.startswith(f"[doc] {item.person.name} ")]
    assert len(written) == life.count(">") > 30 and len(answer) == CANVAS
    *_, asked, bayes = answer[-1].split("\n\n")
    assert re.findall(r" (0\.\d\d) (█+)·", asked)[:5] == [("0.10", "██")] * 5
    rows = re.findall(r"^ +(\w+ \w+ \w+) +([\d.]+) (█*)(.*)", bayes, re.MULTILINE)
    assert [row[0] for row in rows[:5]] == order[:5] and [len(row[2]) for row in rows[:5]] == [10, 4, 2, 2, 1]
    assert [row[0] for row in rows if "right" in row[3]] == [item.person.name]
    assert len(rows) == 5 if place < 6 else "rank 7" in rows[5][3]


def published(name):
    """{name: result} of .lab/NAME.jsonl"""
    lines = (ROOT / ".lab" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {result["name"]: result for result in map(json.loads, lines)}


def written(name, score):
    """The ways in which the README may write a score of a run, "ar-none-seed0", or of three seeds, "ar-none":
    0.83, 0.83 ± 0.10, 83 times in 100, a rank as 39.8."""
    runs = published("seed0" if name.endswith("-seed0") else "runs")
    one_or_three = re.compile(rf"{re.escape(name)}(-seed\d)?")
    values = [run[score] for label, run in runs.items() if one_or_three.fullmatch(label)]
    assert values, f"there is no run {name}"
    digits = ".1f" if score.startswith("rank") else ".2f"
    middle, spread = f"{mean(values):{digits}}", stdev(values) if len(values) > 1 else 0
    return {middle, f"{middle} ± {spread:{digits}}", f"{100 * mean(values):.0f} times in 100"}


def test_every_table_of_the_readme_is_in_the_runs():
    """A comment above a table names the run of each row and the score of each column. The table of all runs,
    in a fold, is what `compare` prints, and the lines under its first command are what that run printed. Runs
    of one world and arm have read the same texts, whatever else differs."""
    rows_of_arm = {}
    for run in published("runs").values():
        arm = str([run["settings"][name] for name in ("world", "paraphrases", "texts", "known_paraphrases")])
        assert rows_of_arm.setdefault(arm, run["code"]["rows"]) == run["code"]["rows"], run["name"]
    tables = re.findall(r"<!-- rows: ([^>]*); columns: ([^>]*) -->\n((?:\|.*\n)+)", README)
    assert len(tables) > 2
    for names, columns, table in tables:
        for name, row in zip(names.split(", "), table.splitlines()[2:], strict=True):
            for column, cell in zip(columns.split(", "), row.strip("|").split("|")[1:], strict=True):
                assert cell.strip() in written(name, column), (name, column, cell, written(name, column))
    assert evaluation.compare([*published("runs").items()]) in README
    run = published("seed0")["masked-none-seed0"]
    printed = evaluation.report(run, run["exams"][0], "before").splitlines()
    shown = README.partition("```\nexact match")[2].partition("\n```")[0].splitlines()[1:]
    assert len(shown) > 4 and all(line in printed for line in shown)


def test_every_figure_in_a_sentence_of_the_readme_is_in_the_runs():
    """A comment behind a paragraph names the runs and scores that it speaks of: each is there, and no other.
    Or the comment says that its figures are older ones, of the notebook, or that they are the paper's."""
    notebook = (ROOT / ".lab" / "LOG.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`]*`|^\|[^\n]*", "", README, flags=re.DOTALL | re.MULTILINE)
    for block in prose.split("\n\n"):
        text, _, comment = " ".join(block.split()).partition("<!-- ")
        kind, _, scores = comment.partition(" -->")[0].partition(": ")
        found = {*re.findall(r"\b\d\.\d\d(?: ± \d\.\d\d)?(?!\d)|\b\d+ times in 100|(?<=rank )\d+\.\d", text)}
        if kind == "figures":
            expected = [written(*pair.rsplit(" ", 1)) for pair in scores.split(", ")]
            assert all(found & ways for ways in expected) and found <= set.union(*expected), (block, expected)
        elif kind == "notebook":
            assert all(figure.removeprefix("0") in notebook for figure in found), block
        else:
            assert not found or kind == "paper", block
