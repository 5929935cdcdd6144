"""Scores that can be trusted: exact match, ROUGE, likelihood ranks, chance, costs and the tables of them."""
import itertools
import math
import random
import re

import pytest
import torch

import eval as evaluation
from conftest import generator
from data import ATTRIBUTES, CANVAS, MARKS, TOKENIZER, decode, make_corpus, pad_rows, question_row
from diffusion import MODES, likelihood_ar, likelihood_diffusion
from model import ModelConfig, Transformer

CORPUS = make_corpus(known=6, new=5, wordings=1, seed=0)


def untrained(causal, V=TOKENIZER.n_vocab):
    """A model with opinions: random weights, none of them zero."""
    model = Transformer(ModelConfig(V, n_layer=1, n_head=1, n_embd=16, causal=causal))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=generator())
    return model


class Oracle:
    """Stands for a Mode whose decoder has read the exam's answers, and leaves out the last word of some."""

    def __init__(self, corpus, right):
        self.truth = {q: a for pairs in corpus.exams.values() for q, a in pairs}
        self.right = right  # question -> does it know the answer?

    def decode(self, model, tokens, starts, canvas, marks, watch):
        texts = [decode(row[1:start - 1]) for row, start in zip(tokens.tolist(), starts.tolist())]
        given = [self.truth[q] if self.right(q) else " ".join(self.truth[q].split()[:-1]) for q in texts]
        return pad_rows([question_row("", answer) for answer in given])[0][:, -canvas:]


@pytest.mark.parametrize("mode", ("ar", "diffusion"))
def test_neither_batch_size_nor_order_changes_an_answer(mode):
    """All questions of an exam, alone, seven at a time, at once, and shuffled: the same answer to each."""
    model = untrained(MODES[mode].causal)
    questions = [q for pairs in CORPUS.exams.values() for q, _ in pairs]
    at_once = evaluation.answers(model, mode, questions)
    assert len(set(at_once)) > 1
    for batch in (1, 7):
        assert evaluation.answers(model, mode, questions, batch=batch) == at_once
    order = random.Random(0).sample(range(len(questions)), len(questions))
    shuffled = evaluation.answers(model, mode, [questions[i] for i in order])
    assert shuffled == [at_once[i] for i in order]


def test_exact_match_counts_whole_answers(monkeypatch):
    """A model that knows all majors and the answers to every second backward question: 1/6 and about 1/2, the
    attribute named; and nothing about known people."""
    half = {q for q, _ in CORPUS.exams["backward"][::2]}
    oracle = Oracle(CORPUS, lambda q: q in half or "the major of" in q and q in dict(CORPUS.exams["forward"]))
    monkeypatch.setitem(MODES, "ar", oracle)
    scores = evaluation.exam(untrained(True), "ar", CORPUS)
    assert scores["forward"] == pytest.approx(1 / 6) and scores["backward"] == 0.5
    assert scores["forward_by_attribute"] == {a: float(a == "major") for a in ATTRIBUTES}
    assert scores["known_forward"] == scores["known_backward"] == 0
    assert scores["rouge"]["backward"] == pytest.approx(0.5 + 0.5 * 2 / 3)  # two of three words


def test_rouge_rewards_parts_of_an_answer():
    """The share of the true words that are given, each counted once: by hand."""
    assert evaluation.rouge("Curtis Lane Emley", "Curtis Chase Emley") == pytest.approx(2 / 3)
    assert evaluation.rouge("Emley Emley Emley", "Curtis Chase Emley") == pytest.approx(1 / 3)
    assert evaluation.rouge("", "Oslo") == 0 and evaluation.rouge("Rome Oslo", "Oslo") == 1


@pytest.mark.parametrize("likelihood, causal", ((likelihood_ar, True), (likelihood_diffusion, False)))
def test_the_likelihoods_of_all_answers_sum_to_one(likelihood, causal):
    """All answers on a canvas of two, V = 9, enumerated: both modes give a proper distribution."""
    model = untrained(causal, V=9)
    every = torch.tensor(list(itertools.product(range(1, 9), repeat=2)))  # pad left out: it is no text
    rows = torch.cat((torch.tensor([[4, 6, 7, 5]]).expand(len(every), 4), every), dim=1)
    p = likelihood(model, rows, torch.full((len(rows),), 4), MARKS).double().exp()
    with torch.no_grad():
        if causal:  # p(first is no pad) x p(second is no pad | first), from the logits themselves
            first = model(rows)[:, 3].softmax(-1)
            second = model(rows)[:, 4].softmax(-1)
        else:
            two, one = rows.clone(), rows.clone()
            two[:, 4:], one[:, 5] = MARKS.mask, MARKS.mask
            first, second = model(two)[:, 4].softmax(-1), model(one)[:, 5].softmax(-1)
    by_hand = first.gather(1, every[:, :1])[:, 0] * second.gather(1, every[:, 1:])[:, 0]
    torch.testing.assert_close(p, by_hand.double(), rtol=1e-4, atol=1e-8)
    pad = first[0, 0] + (first[0, 1:] * second[::8, 0]).sum()  # what the answers with a pad token would have
    assert (p.sum() + pad).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mode", ("ar", "diffusion"))
def test_ranks_are_those_of_brute_force(mode):
    """Every candidate of every question scored one by one, in a row of its own: the same MRR and share
    first."""
    model = untrained(MODES[mode].causal)
    result = evaluation.ranking(model, mode, CORPUS, asked=1000)
    for direction in ("forward", "backward"):
        ranks, sizes = [], []
        for i, (question, truth) in enumerate(CORPUS.exams[direction]):
            kind = lambda q: q.split(" of ")[0] if direction == "forward" else ""
            same_kind = [a for q, a in CORPUS.exams[direction] if kind(q) == kind(question)]
            score = {}
            for answer in set(same_kind):
                tokens, starts = pad_rows([question_row(question, answer)])
                score[answer] = MODES[mode].likelihood(model, tokens, starts, MARKS).item()
            ranks.append(1 + sum(value > score[truth] for value in score.values()))
            sizes.append(len(score))
        n = len(ranks)
        assert result[direction]["mrr"] == pytest.approx(sum(1 / r for r in ranks) / n)
        assert result[direction]["first"] == pytest.approx(ranks.count(1) / n)
        assert result[direction]["chance_first"] == pytest.approx(sum(1 / s for s in sizes) / n)
        harmonic = [sum(1 / r for r in range(1, s + 1)) / s for s in sizes]
        assert result[direction]["chance_mrr"] == pytest.approx(sum(harmonic) / n)


def test_a_model_that_prefers_nothing_ranks_at_the_middle(monkeypatch):
    """Equal likelihoods share their ranks: five names, all as likely, rank 3 each and never first."""
    mode = MODES["ar"]._replace(likelihood=lambda model, tokens, *_: torch.zeros(len(tokens)))
    monkeypatch.setitem(MODES, "ar", mode)
    result = evaluation.ranking(untrained(True), "ar", CORPUS)["backward"]
    assert result["first"] == 0 and result["mrr"] == pytest.approx(1 / 3)


def test_chance_and_the_majority_answer_are_computed():
    """Chance: 1/20160 for birth dates, 1/50 for the rest, 1/11 for names. Naming one of 5 new people for
    ever, who have four questions each: 1/5."""
    chance = evaluation.chance(CORPUS)
    assert chance["forward"] == pytest.approx((1 / (28 * 12 * 60) + 5 / 50) / 6)
    assert chance["backward"] == pytest.approx(1 / 11) and chance["majority_backward"] == pytest.approx(1 / 5)
    same = CORPUS._replace(exams={"forward": [("?", "Oslo")] * 6, "backward": [("?", "A")]})
    assert evaluation.chance(same)["majority_forward"] == 1


def test_costs_are_read_off_a_straight_line():
    """Score 0 at 100 documents, .4 at 300, .8 at 500: .5 is reached 250 documents after the first exam, 95 %
    of .8 at 380; a score that is never reached has no cost, one that the first exam finds costs nothing."""
    log = [dict.fromkeys((*evaluation.AXES, "backward"), d) | {"forward": f}
           for d, f in ((100, 0.0), (300, 0.4), (500, 0.8))]
    for axis in evaluation.AXES:
        assert evaluation.costs(log)[axis]["forward"] == pytest.approx({"half": 250, "own": 380})
    nothing = [line | {"forward": 0.0} for line in log]
    assert evaluation.costs(nothing)["flops"]["forward"] == {"half": None, "own": None}
    known = [line | {"forward": 0.8} for line in log]
    assert evaluation.costs(known)["flops"]["forward"] == {"half": 0, "own": 0}


def result(mode, seed, score, **settings):
    """A result.json with the same score everywhere."""
    exam = dict.fromkeys(("forward", "backward", "known_forward", "known_backward"), score)
    exam["forward_by_attribute"] = dict.fromkeys(ATTRIBUTES, score)
    chance = dict.fromkeys(("forward", "backward", "majority_forward", "majority_backward"), 0.01)
    settings = {"mode": mode, "paraphrases": "none", "seed": seed, "lr": 0.02} | settings
    spent = {axis: {d: {"half": 1e6 * i, "own": None} for d in evaluation.DIRECTIONS}
             for i, axis in enumerate(evaluation.AXES)}
    return {"settings": settings, "before": exam, "exam": exam | {"rouge": exam}, "chance": chance,
            "log": [dict.fromkeys(evaluation.DIRECTIONS, 0.0), exam], "cost": spent,
            "ranking": dict.fromkeys(evaluation.DIRECTIONS, {"first": score, "mrr": score,
                                                             "chance_first": 0.02, "chance_mrr": 0.05})}


def test_seeds_are_averaged_with_their_spread():
    """Two seeds with .4 and .6: mean .5, standard deviation .141 by hand, curves from 0 to the mean; another
    mode is a row of its own."""
    runs = {"ar-seed0": result("ar", 0, 0.4), "ar-seed1": result("ar", 1, 0.6), "m": result("masked", 0, 0.9)}
    table = evaluation.compare(runs, evaluation.TABLES).splitlines()
    assert re.match(r"ar +2 +█████····· 0\.5 ±0\.141 +▁▅  █████····· 0\.5 ±0\.141 +▁▅$", table[1])
    assert re.match(r"m +1 +█████████· 0\.9 ", table[2])
    for columns in evaluation.TABLES:
        assert any(all(title in line for title in columns) for line in table)
    assert any(re.match(r"ar +.* 0\.01 ±0 / 0\.01 ±0", line) for line in table)  # chance
    assert re.match(r"ar( +0\.5 ±0\.141){6}$", table[-2])  # each attribute


def test_settings_that_differ_are_rows_of_their_own():
    """Runs are never averaged over anything but the seed, whatever their folders are called: a GPU's runs
    stand beside a CPU's. A copy of a run is no second seed."""
    runs = {"slow": result("ar", 0, 0.4, lr=0.01), "ar-seed0": result("ar", 0, 0.6),
            "ar-seed1": result("ar", 1, 0.6), "gpu": result("ar", 1, 0.7, device="cuda"),
            "ar-seed2": result("ar", 2, 0.5, code="edited")}
    lines = evaluation.compare(runs, evaluation.TABLES).splitlines()
    assert re.match(r"slow +1 +█+·+ 0\.4 ", lines[1]) and re.match(r"ar +2 +█+·+ 0\.6 ±0", lines[2])
    assert re.match(r"gpu +1 +█+·+ 0\.7 ", lines[3])
    assert re.match(r"ar-seed2 +1 +█+·+ 0\.5 ", lines[4])  # of other code, and not in a folder of its own
    with pytest.raises(evaluation.Stop, match="ar-seed1 and copy.*same run"):
        evaluation.compare(runs | {"copy": result("ar", 1, 0.6)}, evaluation.TABLES)


def test_costs_have_a_table_for_each_axis():
    """Documents, tokens, supervised tokens and FLOPs; what was never reached is a dash."""
    lines = evaluation.compare({"m": result("masked", 0, 0.8)}, evaluation.COSTS).splitlines()[3:]
    for i, axis in enumerate(evaluation.AXES):
        assert lines[3 * i].split()[1:4] == [axis, "to", ".5"]
        assert lines[3 * i + 1].split()[1:] == [f"{1e6 * i:.3g}", "/", f"{1e6 * i:.3g}", "-", "/", "-"]


def test_bars_and_curves():
    """A bar is filled to the share; a curve has a sign for each share, of eight heights."""
    assert [evaluation.bar(share, 4) for share in (0, 0.5, 1)] == ["····", "██··", "████"]
    assert evaluation.curve([0, 0.12, 0.13, 0.5, 0.99, 1]) == "▁▁▂▅██"
