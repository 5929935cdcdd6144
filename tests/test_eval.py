"""Scores that can be trusted: exact match, ROUGE, the three rungs, chance, and the tables of them."""
import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import eval as evaluation
from conftest import call, generator, refusal
from data import (ATTRIBUTES, CANVAS, MARKS, WIDTH, decode, document_row, encode, make_corpus,
                  question_row)
from diffusion import MODES, random_words
from model import ModelConfig, Transformer

CORPUS = make_corpus(known=6, new=5, wordings=1, seed=0)


def untrained(causal):
    """A model with opinions: random weights, none of them zero."""
    model = Transformer(ModelConfig(n_layer=1, n_head=1, n_embd=16, causal=causal))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=generator())
    return model


@pytest.mark.parametrize("mode", MODES)
def test_neither_batch_size_nor_order_changes_an_answer(mode):
    """All items of an exam, alone, seven at a time, at once, and shuffled: the same answer to each, be they
    questions or documents."""
    model = untrained(MODES[mode].causal)
    for items in (CORPUS.exams["forward"] + CORPUS.exams["backward"], CORPUS.exams["recite"]):
        at_once = evaluation.answers(model, mode, items)
        assert len({str(ids) for ids in at_once}) > 1
        for batch in (1, 7):
            assert evaluation.answers(model, mode, items, batch=batch) == at_once
        order = random.Random(0).sample(range(len(items)), len(items))
        shuffled = evaluation.answers(model, mode, [items[i] for i in order])
        assert shuffled == [at_once[i] for i in order]


@pytest.mark.parametrize("mode", MODES)
def test_a_rung_is_answered_one_token_after_the_other(mode):
    """Each item alone, by hand: a causal model goes on from what is shown, one argmax at a time; behind a
    prompt it goes on in the copy. What stands behind the blank is masks, and never the truth."""
    model, items = untrained(MODES[mode].causal), CORPUS.exams["recite"][:7] + CORPUS.exams["cloze"][:7]
    words = [i for i in range(len(model.embed.weight)) if i == MARKS.end or i not in MARKS]
    for item, given in zip(items, evaluation.answers(model, mode, items)):
        row, at = list(item.ids), item.start
        if MODES[mode].decode_document is not MODES[mode].decode_question:  # behind a prompt
            pads = [MARKS.pad] * (WIDTH - len(row))  # as in training: the copy starts WIDTH tokens behind
            prompt = list(row)
            if mode == "random_prompt":
                prompt[1:] = random_words((WIDTH,), generator(0)).tolist()[1:len(row)]
            row, at = prompt + pads + [MARKS.answer] + row[1:], WIDTH + item.start
        places = list(range(at, at + len(item.truth)))
        for _ in item.truth:
            with torch.no_grad():
                logits = model(torch.tensor([row]))[0].float()
            if MODES[mode].causal:
                place = places[0]
                scores = logits[place - 1]
            else:  # the surest of the places that are still masked
                place = max(places, key=lambda i: logits[i][words].log_softmax(-1).max())
                scores = logits[place]
            row[place] = words[int(scores[words].argmax())]
            places.remove(place)
        assert given == row[at:at + len(item.truth)]


def oracle(corpus, knows):
    """A decoder that has read the exams' answers; where it does not `know`, it leaves out the last word."""
    truth = {tuple(item.ids[:item.start]): item.truth for items in corpus.exams.values() for item in items}

    def write(model, tokens, places):
        out = torch.full(places.shape, MARKS.end)
        for i, (row, start) in enumerate(zip(tokens.tolist(), places[:, 0].tolist())):
            ids = [token for token in truth[tuple(row[:start])] if token != MARKS.end]
            ids = ids if knows(decode(row[1:start])) else ids[:-1]
            out[i, :len(ids)] = torch.tensor(ids)
        return out
    return write


def test_exact_match_counts_whole_answers(monkeypatch):
    """A model that knows all majors of new people and every second backward question: 1/6 and 1/2, the
    attribute named; nothing about known people; and it can recite majors, but from whole documents only."""
    names = [person.name for person in CORPUS.people[6:]]
    half = {decode(item.ids[1:item.start]) for item in CORPUS.exams["backward"][::2]}
    knows = lambda asked: asked in half or any(name in asked for name in names) and (
        "the major of" in asked or asked.endswith("He majored in") or asked.endswith("She majored in"))
    write = oracle(CORPUS, knows)
    monkeypatch.setitem(MODES, "ar", MODES["ar"]._replace(decode_question=write, decode_document=write))
    scores, answers = evaluation.exam(untrained(True), "ar", CORPUS)
    assert scores["forward"] == scores["recite"] == pytest.approx(1 / len(ATTRIBUTES))
    assert scores["backward"] == 0.5 and scores["cloze"] == 0
    assert {a: scores[f"forward {a}"] for a in ATTRIBUTES} == {a: float(a == "major") for a in ATTRIBUTES}
    assert scores["known_forward"] == scores["known_backward"] == scores["known_unasked"] == 0
    assert scores["rouge_backward"] == pytest.approx(0.5 + 0.5 * 2 / 3)  # two of three words
    backward = [answer for answer in answers if answer["exam"] == "backward"]
    assert [answer["answer"] == answer["truth"] for answer in backward] == [True, False] * 10
    assert all(answer["asked"].startswith("Who ") and answer["asked"].endswith("?") for answer in backward)


def test_an_answer_that_goes_on_is_wrong(monkeypatch):
    """The right name and one more word is no exact match: the answer to a question ends."""
    write = oracle(CORPUS, lambda asked: True)

    def more(*arguments):
        ends = (out := write(*arguments)) == MARKS.end
        return torch.where(ends & (ends.cumsum(1) == 1), 500, out)
    for decoder, score in ((write, 1), (more, 0)):
        monkeypatch.setitem(MODES, "ar", MODES["ar"]._replace(decode_question=decoder, decode_document=write))
        scores, _ = evaluation.exam(untrained(True), "ar", CORPUS)
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


# -- tables ------------------------------------------------------------------


def result(seed, score, **settings):
    """A result.json with the same score everywhere."""
    settings = {"mode": "ar", "lr": 0.02, "seed": seed} | settings
    return dict.fromkeys(evaluation.COLUMNS, score) | {"settings": settings}


def compare(runs, columns=evaluation.COLUMNS):
    """The comparison as a list of rows, each a list of cells."""
    return [re.split("  +", line) for line in evaluation.compare(runs, columns).splitlines()]


def test_seeds_are_averaged_with_their_spread():
    """Two seeds with .4 and .6: mean .5, standard deviation .141 by hand; another mode has its own row."""
    runs = {"ar-seed0": result(0, 0.4), "ar-seed1": result(1, 0.6), "m": result(0, 0.9, mode="masked")}
    head, first, second = compare(runs)
    n = len(evaluation.COLUMNS)
    assert head == ["exact match", "seeds", *evaluation.COLUMNS]
    assert first == ["ar", "2", *["0.500 ± 0.141"] * n] and second == ["m", "1", *["0.900"] * n]


def test_any_number_of_a_result_can_be_a_column():
    """What is large is written with three digits; what is no score keeps its size."""
    runs = {"ar-seed0": result(0, 0.4) | {"flops": 1.5e12}, "ar-seed1": result(1, 0.4) | {"flops": 2.5e12}}
    assert compare(runs, ["flops", "forward"])[1] == ["ar", "2", "2e+12 ± 7.07e+11", "0.400 ± 0.000"]


def test_settings_and_files_that_differ_are_rows_of_their_own():
    """Runs are never averaged over anything but the seed, whatever their folders are called; where a row has
    the name of another, it says in what it differs."""
    files = {"data.py": "1a", "eval.py": "2b"}
    runs = {"slow": result(0, 0.4, lr=0.01, **files), "ar-seed0": result(0, 0.6, **files),
            "ar-seed1": result(1, 0.6, **files), "ar-seed2": result(2, 0.5, **files | {"data.py": "3c"}),
            "ar-seed3": result(3, 0.5, **files | {"data.py": "3c", "eval.py": "4d"}),
            "ar-seed4": result(4, 0.5, device="cuda", **files)}
    assert [row[:2] for row in compare(runs)[1:]] == [
        ["slow", "1"], ["ar", "2"], ["ar-seed2 (data.py = 3c, not 1a)", "1"],
        ["ar-seed3 (data.py = 3c, not 1a)", "1"], ["ar-seed4 (device = cuda, not None)", "1"]]


def test_a_copy_of_a_run_is_no_second_seed():
    """Two folders with one seed count once, whatever they are called."""
    runs = {"ar-seed1": result(1, 0.6), "copy": result(1, 0.6), "ar-seed2": result(2, 0.6)}
    assert [row[:2] for row in compare(runs)[1:]] == [["ar", "2"]]


def test_a_picture_of_a_run_is_a_file(capsys):
    """`--plot` writes what `plot` returns, be the folder's name ever so odd; runs from before there were
    curves are left out."""
    for name, curve in (("a&b<c", {"step": [0, 5], "forward": [0, 1], "backward": [0, 0]}), ("old", None)):
        Path("out", name).mkdir(parents=True)
        content = result(0, 0.5) | ({"curve": curve} if curve else {})
        Path("out", name, "result.json").write_text(json.dumps(content), encoding="utf-8")
    call(evaluation, "--plot", "new/curves.svg")
    texts = [node.text for node in ElementTree.parse("new/curves.svg").iter() if node.tag.endswith("text")]
    assert texts.count("a&b<c") == 2 and "old" not in texts and "1 runs" in capsys.readouterr().out


def test_what_an_old_result_lacks_is_a_dash():
    """A column that came later takes nothing from the runs of before, nor from the row they stand in."""
    old = {name: value for name, value in result(0, 0.4).items() if name != "cloze"}
    for runs in ({"old": old}, {"old": old, "new": result(1, 0.4)}):
        cells = compare(runs)[1][2:]
        assert cells[evaluation.COLUMNS.index("cloze")] == "-" and cells.count("-") == 1


def test_comments_are_not_code(monkeypatch):
    """The fingerprint of a file changes with its code, and neither with a comment nor with a docstring."""
    real, before = Path.read_text, evaluation.fingerprints()
    for edit, changes in ((lambda text: text + "# a comment\n", False), (lambda text: text + "x = 1\n", True),
                          (lambda text: re.sub('"""(.|\n)*?"""', '"""Another docstring."""', text), False)):
        monkeypatch.setattr(Path, "read_text", lambda path, **kw: edit(real(path, **kw))
                            if path.name == "diffusion.py" else real(path, **kw))
        after = evaluation.fingerprints()
        assert [name for name in before if before[name] != after[name]] == ["diffusion.py"] * changes


@pytest.mark.parametrize("content", (b"", b'{"settings"', b"[]", b"{}", b"null", b"\xff\xfe", b'{"exam": 1}'))
def test_a_damaged_result_ends_in_one_line(content, capfd):
    """The comparison names the file instead of leaving the run out."""
    Path("out/run").mkdir(parents=True)
    Path("out/run/result.json").write_bytes(content)
    assert "result.json" in refusal(capfd, evaluation)


# -- asking ------------------------------------------------------------------


def test_blanks_are_masks_wherever_they_stand():
    """A text with [mask] is the row of that document with those words masked; any other text is a question
    with an empty canvas."""
    ids = evaluation.row_to_fill("[mask] [mask] Emley comes from [mask]. He went to Reed.")
    whole, _ = document_row("Curtis Chase Emley comes from Elkton. He went to Reed.")
    hidden = encode("Curtis Chase Elkton")
    assert ids == [MARKS.mask if i in hidden else i for i in whole]
    row, start = question_row("Who went to Reed?")
    assert evaluation.row_to_fill(" Who went to Reed? ") == row[:start] + [MARKS.mask] * CANVAS


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", ("[mask] [mask] [mask] comes from Elkton. He [mask] to Reed.",
                                  "Who went to Reed?"))
def test_filling_writes_one_blank_a_step_and_nothing_else(mode, text):
    """Four blanks, four steps; what is given stays as it is. Causal models go from left to right, for what
    stands behind a blank is not seen."""
    ids = evaluation.row_to_fill(text)
    rows = evaluation.fill(untrained(MODES[mode].causal), MODES[mode], ids)
    blanks = [i for i, token in enumerate(ids) if token == MARKS.mask]
    assert rows[0] == ids and len(rows) == len(blanks) + 1 == 5
    written = [[i for i in range(len(ids)) if a[i] != b[i]] for a, b in zip(rows, rows[1:])]
    assert sorted(written) == [[i] for i in blanks] and MARKS.mask not in rows[-1]
    assert not MODES[mode].causal or written == [[i] for i in blanks]


@pytest.mark.parametrize("mode", ("masked", "random_prompt"))
def test_blanks_are_filled_from_all_that_the_prompt_shows(mode):
    """By hand, one argmax at a time: prompt, padding up to WIDTH, the response up to the blank. So a name can
    follow from facts that stand behind it."""
    model = untrained(True)
    ids = evaluation.row_to_fill("[mask] Chase [mask] comes from Elkton.")
    words = [i for i in range(len(model.embed.weight)) if i == MARKS.end or i not in MARKS]
    prompt = list(ids)
    if mode == "random_prompt":
        prompt[1:] = random_words((WIDTH,), generator(0)).tolist()[1:len(ids)]
    row = prompt + [MARKS.pad] * (WIDTH - len(ids)) + [MARKS.answer] + ids[1:]
    for place in (WIDTH + 1, WIDTH + 3):
        with torch.no_grad():
            logits = model(torch.tensor([row[:place]]))[0, -1].float()
        row[place] = words[int(logits[words].argmax())]
    assert evaluation.fill(model, MODES[mode], ids)[-1][1:] == row[WIDTH + 1:]


def test_curves_are_the_means_of_their_seeds():
    """Two seeds that end at .4 and .8: one line that ends at .6, one band from .6 - .283 to .6 + .283, by
    hand, in a panel 230 high; one label a line, and none covers another."""
    runs = {f"{mode}-seed{seed}": result(seed, 0, mode=mode) | {"curve": {
        "step": [0, 50, 100], "forward": [0, 0, end], "backward": [0, 0, 0]}}
        for mode in ("ar", "masked") for seed, end in ((0, 0.4), (1, 0.8))}
    svg = ElementTree.fromstring(evaluation.plot(runs))
    named = lambda tag: [node for node in svg.iter() if node.tag.endswith(tag)]
    points = lambda node: [tuple(map(float, point.split(","))) for point in node.get("points").split()]
    lines, bands = map(points, named("polyline")), list(map(points, named("polygon")))
    heights = [line[-1][1] for line in lines]
    assert heights == pytest.approx([280 - 0.6 * 230] * 2 + [280] * 2)
    error = 0.2 * 2**0.5
    assert all(0 <= y <= 280 for band in bands for _, y in band)
    assert bands[0][2][1] == pytest.approx(280 - (0.6 + error) * 230, abs=0.1)
    assert bands[0][3][1] == pytest.approx(280 - (0.6 - error) * 230, abs=0.1)
    labels = [(float(node.get("x")), float(node.get("y"))) for node in named("text")
              if node.text in ("ar", "masked")]
    assert len(set(labels)) == 4
    assert all(abs(a[1] - b[1]) >= 14 for a in labels for b in labels if a[0] == b[0] and a != b)
