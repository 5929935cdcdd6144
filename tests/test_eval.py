"""Scores that can be trusted: exact match, ROUGE, the three rungs, chance, and the tables of them."""
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import eval as evaluation
from conftest import call, generator, refusal
from data import ATTRIBUTES, CANVAS, MARKS, WIDTH, decode, document_row, encode, make_corpus, question_row
from diffusion import MODES, decode_ar, decode_diffusion, random_words
from model import Transformer

CORPUS = make_corpus(known=6, new=5, wordings=1, seed=0)


def untrained(causal):
    """A model with opinions: random weights, none of them zero."""
    model = Transformer(n_layer=1, n_head=1, n_embd=16, causal=causal)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=generator())
    return model


def by_hand(model, mode, ids, places):
    """What a mode writes at the places of a row: the row alone, one argmax a step."""
    row, places = list(ids), list(places)
    for place in places:
        row[place] = MARKS.mask
    if ids[0] == MARKS.doc and MODES[mode].decode not in (decode_ar, decode_diffusion):
        prompt = row + [MARKS.pad] * (WIDTH - len(row))  # as in training: the copy starts WIDTH tokens behind
        if mode == "random_prompt":
            prompt[1:len(row)] = random_words((WIDTH,), generator(0)).tolist()[1:len(row)]
        row, places = prompt + [MARKS.answer] + row[1:], [WIDTH + place for place in places]
    words = [i for i in range(len(model.embed.weight)) if i == MARKS.end or i not in MARKS]
    blank = list(places)
    while blank:
        with torch.no_grad():
            logits = model(torch.tensor([row]))[0][:, words].float()
        if MODES[mode].causal:
            place = blank[0]
            scores = logits[place - 1]
        else:  # the surest of the places that are still masked
            place = max(blank, key=lambda i: logits[i].log_softmax(-1).max())
            scores = logits[place]
        row[place] = words[int(scores.argmax())]
        blank.remove(place)
    return [row[place] for place in places]


@pytest.mark.parametrize("mode", MODES)
def test_each_answer_is_that_of_its_row_alone_one_token_after_the_other(mode):
    """Whatever the batch. A causal model goes on from what stands before the blank, and behind a prompt in
    the copy, so a name can follow from facts behind it. The true answer stands in the rows, hidden."""
    model = untrained(MODES[mode].causal)
    questions = CORPUS.exams["forward"][:6] + CORPUS.exams["backward"][:4]
    for items in (CORPUS.exams["recite"][:7], questions):
        truths, written = evaluation.answers(model, mode, items, batch=3)
        for (ids, start), truth, given in zip(items, truths, written):
            assert truth == ids[start:start + len(given)] and len(given) in (1, 3, CANVAS)
            assert given == by_hand(model, mode, ids, range(start, start + len(given)))
    ids = evaluation.row_to_fill("[mask] Chase [mask] comes from Elkton.")
    *_, [filled] = evaluation.fill(model, mode, [ids], 2)
    assert [filled[1], filled[3]] == by_hand(model, mode, ids, (1, 3))


def examine(monkeypatch, answer):
    """(scores, answers) of a model that writes answer(item, truth) to each item."""
    hidden = lambda ids, start: [token for token in ids[start:] if token != MARKS.mask]
    monkeypatch.setattr(evaluation, "answers", lambda model, mode, items: (
        [hidden(*item) for item in items], [answer(item, hidden(*item)) for item in items]))
    return evaluation.exam(None, "ar", CORPUS)


def test_exact_match_counts_whole_answers(monkeypatch):
    """A model that knows new people's majors and every second backward question, and of all other answers
    leaves out the first word: 1/6 and 1/2, the attribute named, and nothing else."""
    majors = [item for item in CORPUS.exams["forward"] if "the major of" in decode(item[0])]
    known = majors + CORPUS.exams["backward"][::2]
    scores, answers = examine(monkeypatch, lambda item, truth: truth if item in known else truth[1:])
    assert scores["forward"] == pytest.approx(1 / len(ATTRIBUTES)) and scores["backward"] == 0.5
    assert {a: scores[f"forward {a}"] for a in ATTRIBUTES} == {a: float(a == "major") for a in ATTRIBUTES}
    others = ("recite", "cloze", "known_forward", "known_backward", "known_unasked")
    assert [scores[name] for name in others] == [0] * 5
    assert scores["rouge_backward"] == pytest.approx(0.5 + 0.5 * 2 / 3)  # two of three words
    backward = [answer for answer in answers if answer["exam"] == "backward"]
    assert [answer["answer"] == answer["truth"] for answer in backward] == [True, False] * 10
    assert all(answer["asked"].startswith("Who ") and answer["asked"].endswith("?") for answer in backward)


def test_an_answer_that_goes_on_is_wrong(monkeypatch):
    """The right name and one more word is wrong, so is the name in bytes; behind an [end] nothing counts."""
    goes_on = lambda item, truth: [500 if token == MARKS.end else token for token in truth]
    after_end = lambda item, truth: truth[:-1] + [500] if truth[-2:] == [MARKS.end] * 2 else truth
    spelled = lambda item, truth: [6 + byte for byte in decode(truth).encode()]
    for answer, score in ((after_end, 1), (goes_on, 0), (spelled, 0)):
        scores, _ = examine(monkeypatch, answer)
        assert scores["forward"] == scores["backward"] == scores["known_unasked"] == score


def test_rouge_rewards_parts_of_an_answer():
    """The share of the true words that are given, each counted once: by hand."""
    assert evaluation.rouge("Curtis Lane Emley", "Curtis Chase Emley") == pytest.approx(2 / 3)
    assert evaluation.rouge("Emley Emley Emley", "Curtis Chase Emley") == pytest.approx(1 / 3)
    assert evaluation.rouge("", "Oslo") == 0 and evaluation.rouge("Rome Oslo", "Oslo") == 1


def test_chance_and_the_fixed_answer_are_computed():
    """Chance: 1/20160 for birth dates, 1/50 for the rest, 1/11 for names. Naming one of 5 new people for
    ever, who have four questions each: 1/5."""
    chance = evaluation.chance(CORPUS)
    n = len(ATTRIBUTES)
    assert chance["chance_forward"] == pytest.approx((1 / (28 * 12 * 60) + (n - 1) / 50) / n)
    assert chance["chance_backward"] == pytest.approx(1 / 11)
    assert chance["fixed_backward"] == pytest.approx(1 / 5)
    same = CORPUS._replace(exams=CORPUS.exams | {"forward": CORPUS.exams["forward"][:1] * n})
    assert evaluation.chance(same)["fixed_forward"] == 1


def result(seed, score, **settings):
    """A result.json with the same score everywhere."""
    settings = {"mode": "ar", "lr": 0.02, "seed": seed} | settings
    return dict.fromkeys(evaluation.EXAMS, score) | {"settings": settings}


def compare(runs, columns=evaluation.EXAMS):
    """The comparison as a list of rows, each a list of cells."""
    return [re.split("  +", line) for line in evaluation.compare(runs, columns).splitlines()]


def test_seeds_are_averaged_with_their_spread():
    """Two seeds with .4 and .6: mean .5, standard deviation .141 by hand; another mode has its own row."""
    runs = {"ar-seed0": result(0, 0.4), "ar-seed1": result(1, 0.6), "m": result(0, 0.9, mode="masked")}
    head, first, second = compare(runs)
    n = len(evaluation.EXAMS)
    assert head == ["exact match", "seeds", *evaluation.EXAMS]
    assert first == ["ar", "2", *["0.500 ± 0.141"] * n] and second == ["m", "1", *["0.900"] * n]


def test_settings_and_files_that_differ_are_rows_of_their_own():
    """Runs are never averaged over anything but the seed, whatever their folders are called; where a row has
    the name of another, it says in what it differs. A copy of a run is no second seed."""
    files = {"data.py": "1a", "eval.py": "2b"}
    runs = {"slow": result(0, 0.4, lr=0.01, **files), "ar-seed0": result(0, 0.6, **files),
            "ar-seed1": result(1, 0.6, **files), "copy": result(1, 0.6, **files),
            "ar-seed2": result(2, 0.5, **files | {"data.py": "3c"})}
    assert [row[:2] for row in compare(runs)[1:]] == [
        ["slow", "1"], ["ar", "2"], ["ar-seed2 (data.py = 3c, not 1a)", "1"]]


@pytest.mark.parametrize("content", (b"", b'{"settings"', b"[]", b"{}", b"\xff\xfe", b'{"settings": 3}',
                                     b'{"settings": {}}'))
def test_a_damaged_result_ends_in_one_line(content, capfd):
    """The comparison names the file instead of leaving the run out."""
    path = Path("out/run/result.json")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert str(path) in refusal(capfd, evaluation, "--columns", "settings")


def test_blanks_are_masks_wherever_they_stand():
    """A text with [mask] is the row of that document with those words masked; any other text is a question
    with an empty canvas."""
    ids = evaluation.row_to_fill("[mask] [mask]Emley comes from[mask].He went to Reed .")
    whole, _ = document_row("Curtis Chase Emley comes from Elkton. He went to Reed.")
    hidden = encode("Curtis Chase Elkton")
    assert ids == [MARKS.mask if i in hidden else i for i in whole]
    row, start = question_row("Who went to Reed?", "Law")
    assert evaluation.row_to_fill(" Who went to Reed ? ") == row[:start] + [MARKS.mask] * CANVAS


def test_labels_of_lines_that_end_together_stay_apart_and_inside():
    """Seven lines, all from 0 to 1 forward and at 0 backward: labels 15 apart, none outside of its panel."""
    curve = {"step": [0, 9], "forward": [0, 1], "backward": [0, 0]}
    runs = {f"{lr}-seed0": result(0, 1, lr=lr) | {"curve": curve} for lr in range(7)}
    heights = [int(y) for y in re.findall('x="256" y="([-0-9]+)"', evaluation.plot(runs))]
    assert heights == [*range(90, -1, -15), *range(230, 139, -15)]


def drawn(*flags):
    """What `--plot` draws of the runs under out/: the heights of its lines and bands, and its texts."""
    call(evaluation, "--plot", "new/curves.svg", *flags)
    nodes = list(ElementTree.parse("new/curves.svg").iter())
    heights = {tag: [[float(point.split(",")[1]) for point in node.get("points").split()]
                     for node in nodes if node.tag.endswith(tag)] for tag in ("polyline", "polygon")}
    return heights["polyline"], heights["polygon"], [node.text for node in nodes]


def test_curves_are_the_means_of_their_seeds(capfd):
    """`--plot` draws two seeds that end at .4 and .8 as one line that ends at .6 and one band from .6 - .283
    to .6 + .283, by hand, in a panel 230 high; `--over` draws the same ends over a setting."""
    for seed, texts, score in ((0, 5, 0.4), (1, 5, 0.8), (0, 1, 0), (1, 1, 0), (2, "many", 0)):
        folder = Path("out", f"a&b<c-same-texts{texts}-seed{seed}")
        folder.mkdir(parents=True)
        curve = {"step": [0, 100], "forward": [0, score], "backward": [0, 0]}
        content = json.dumps(result(seed, score, texts=texts) | {"backward": 0, "curve": curve})
        (folder / "result.json").write_text(content, encoding="utf-8")
    end, error = 230 * 0.4, 230 * 0.2 * 2**0.5  # heights count from the top
    for flags, label in (((), "a&b<c-same-texts5"), (("--over", "texts"), "a&b<c-same")):
        lines, bands, words = drawn(*flags)
        assert pytest.approx([230, end], abs=0.1) in lines and [230, 230] in lines
        assert pytest.approx([230, end + error, end - error, 230], abs=0.1) in [band[::-1] for band in bands]
        assert words.count(label) == 2 and len(lines) == (2 if flags else 6)
    assert words.count("texts") == words.count("5") == 2  # the axis of each panel, and its last value
    for over in ("mode", "lr", "text"):
        assert over in refusal(capfd, evaluation, "--plot", "x.svg", "--over", over)
    assert "forwrd" in refusal(capfd, evaluation, "--columns", "forwrd")  # a slip of the keyboard is no dash
