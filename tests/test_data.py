"""What the corpus promises: facts that cannot leak, questions with one answer, tokens that are words."""
import math
import random
import re
from collections import Counter

import pytest
import torch

import data
from data import ARMS, ATTRIBUTES, CLUES, MARKS, POOLS, WORDINGS, decode, encode, join, make_corpus

N = len(ATTRIBUTES)


def texts(rows):
    """The decoded rows, marks left out."""
    marks = MARKS.doc, MARKS.question, MARKS.answer
    return [decode([i for i in row if i not in marks]) for row in rows[0].tolist()]


@pytest.fixture(scope="module", params=ARMS)
def corpus(request):
    return make_corpus(known=30, new=20, paraphrases=request.param, wordings=5, seed=3)


def ask(corpus, name):
    """[(question or document up to a value, answer)] of one exam, as text."""
    text = lambda ids: decode([i for i in ids if i not in (MARKS.mask, MARKS.answer)])
    return [(text(ids[1:start]), text(ids[start:])) for ids, start in corpus.exams[name]]


@pytest.mark.parametrize("arm", ARMS)
def test_the_arm_of_new_people_changes_nothing_about_the_known(arm):
    """One base for all arms: whatever pretraining reads is the same token by token, padding included."""
    a, b = make_corpus(known=8, new=5), make_corpus(known=8, new=5, paraphrases=arm)
    for name in ("known", "forward", "backward"):
        assert all(torch.equal(x, y) for x, y in zip(a.rows[name], b.rows[name]))
    assert all(a.exams[name] == b.exams[name] for name in a.exams if name not in ("recite", "cloze"))


@pytest.mark.parametrize("flags, new_texts, name_first", (
    ({}, 1, True), ({"paraphrases": "same_order"}, 5, True), ({"texts": 10}, 10, True),
    ({"known_paraphrases": "name_anywhere"}, 1, False)))
def test_known_and_new_people_have_arms_of_their_own(flags, new_texts, name_first):
    """Known people have five texts with the name first, unless their own flag says otherwise; new people have
    as many as their arm, or --texts, says."""
    corpus = make_corpus(known=30, new=5, **flags)
    assert [len(corpus.rows[name][1]) for name in ("known", "new")] == [5 * 30, new_texts * 5]
    known = texts(corpus.rows["known"])
    starts = {text.startswith(corpus.people[i // 5].name) for i, text in enumerate(known)}
    assert (starts == {True}) == name_first


def test_name_words_tell_which_part_of_a_name_they_are():
    """First, middle and last names share no word with each other or with any value: no name is ambiguous."""
    pools = [data.MEN + data.WOMEN, data.MIDDLE, data.LAST, *(" ".join(POOLS[a]).split() for a in ATTRIBUTES)]
    pools = [set(pool) for pool in pools]
    assert sum(map(len, pools)) == len(set().union(*pools))
    assert all(len(set(pool)) >= 50 for pool in POOLS.values())


def test_a_document_tells_all_facts_and_one_name(corpus):
    """Each text holds the name exactly once and every value."""
    for group, people in (("known", corpus.people[:30]), ("new", corpus.people[30:])):
        written = texts(corpus.rows[group])
        for i, text in enumerate(written):
            person = people[i * len(people) // len(written)]
            assert text.count(person.name) == 1
            assert all(re.search(rf"\b{value}\b", text) for value in person.facts.values())


@pytest.mark.parametrize("arm, before_name, first_two", (
    ("none", {0}, 1), ("name_given", {0}, 1), ("same_order", {0}, 1), ("reversed", {0, N - 1}, 2),
    ("change_order", {0}, math.perm(N, 2)), ("name_anywhere", set(range(N)), math.perm(N, 2))))
def test_only_two_arms_state_a_fact_before_the_name(arm, before_name, first_two):
    """Text in the order attribute -> name is what would teach `ar` the backward direction. How many sentences
    end before the name, and how many pairs of facts come first: every pair only where the order changes."""
    rng = random.Random(0)
    person = data.make_people(1, rng)[0]
    written = [text for _ in range(500) for text in data.documents(person, ARMS[arm], 5, rng)]
    assert {text[:text.index(person.name)].count(".") for text in written} == before_name
    orders = [sorted(ATTRIBUTES, key=lambda a: text.index(person.facts[a])) for text in written]
    assert len({tuple(order[:2]) for order in orders}) == first_two


def test_reversed_texts_keep_names_and_values_whole():
    """The second text of each pair has the words in reverse order, but no name or date backwards."""
    person = data.Person("Curtis Chase Emley", "He", {a: POOLS[a][0] for a in ATTRIBUTES})
    text, backwards = map(join, data.documents(person, ARMS["reversed"], 1, random.Random(0)))
    assert text.startswith("Curtis Chase Emley was born on 1 January 1940. He comes from Akron. He went to")
    assert backwards.endswith("went He. Akron from comes He. 1 January 1940 on born was Curtis Chase Emley.")
    assert Counter(text.replace(".", " .").split()) == Counter(backwards.replace(".", " .").split())


def test_new_people_are_never_asked_about_in_training(corpus):
    """A name of a new person occurs in the rows of new documents and in no other row that is trained on."""
    new = [person.name for person in corpus.people[30:]]
    for group in ("known", "forward", "backward"):
        assert not any(name in text for text in texts(corpus.rows[group]) for name in new)
    for name in new:  # and the exam does ask about every one of them
        assert sum(name in question for question, _ in ask(corpus, "forward")) == len(ATTRIBUTES)


def test_questions_kept_for_the_exam_are_never_in_training(corpus):
    """Known people's backward questions: those of `known_backward` are all in training, those of
    `known_unasked` are not, though each asks for a name that training does ask for."""
    asked = set(texts(corpus.rows["backward"]))
    questions = lambda name: {f"{question} {answer}" for question, answer in ask(corpus, name)}
    assert questions("known_backward") <= asked and not questions("known_unasked") & asked
    assert len(questions("known_unasked")) == len(questions("known_backward")) == 2 * 20


def test_a_backward_question_fits_one_person():
    """In a world so crowded that hundreds of triples fit two people, each question is held against each
    person, known or new: its three clues fit the one that is the answer and nobody else."""
    corpus = make_corpus(known=1500, new=500, seed=0)
    for attribute in ATTRIBUTES[1:]:  # birth dates are too many to be used up
        assert {person.facts[attribute] for person in corpus.people} == set(POOLS[attribute])
    clues_of = [{CLUES[a].format(value) for a, value in person.facts.items()} for person in corpus.people]
    exams = ask(corpus, "backward") + ask(corpus, "known_backward") + ask(corpus, "known_unasked")
    for question, name in exams:
        clues = set(re.split(", | and ", question.removeprefix("Who ").removesuffix("?")))
        assert len(clues) == 3
        assert [p.name for p, facts in zip(corpus.people, clues_of) if clues <= facts] == [name]


def test_the_rungs_ask_for_the_same_value_from_less_and_less():
    """recite shows the document up to the value, cloze the name and the words of that one fact; what follows
    is masked, up to the length of the whole document. By hand for two facts, one with words behind it."""
    person = data.Person("Curtis Chase Emley", "He", {"birth date": "28 May 1952", "major": "Law"})
    pieces = "He read Law as a student .".split()
    pieces = ["Curtis Chase Emley", "was", "born", "on", "28 May 1952", "."] + pieces
    assert data.before_value(person, pieces, "28 May 1952") == ("Curtis Chase Emley was born on",) * 2
    assert data.before_value(person, pieces, "Law") == (
        "Curtis Chase Emley was born on 28 May 1952. He read", "Curtis Chase Emley read")
    ids, start = data.value_row("Curtis Chase Emley read", "Law", 9)
    assert data.words_of(ids) == "[doc] Curtis Chase Emley read Law".split() + ["[mask]"] * 3 and start == 5


def test_the_rungs_hide_the_value_from_everyone(corpus):
    """Neither row of any new person shows the value it asks for; all facts of all new people are asked."""
    new = [value for person in corpus.people[30:] for value in person.facts.values()]
    for name in ("recite", "cloze"):
        asked = ask(corpus, name)
        assert all(any(person.name in shown for person in corpus.people[30:]) for shown, _ in asked)
        assert [value for _, value in asked] == new or name == "recite" and len(asked) < len(new)
        assert not any(re.search(rf"\b{value}\b", shown) for shown, value in asked)


def test_no_document_is_longer_than_its_row():
    """All rows of documents are WIDTH wide, whatever the arm. The longest wording of every fact fills one."""
    longest = [max(len(encode(wording.format(POOLS[a][-1]))) for wording in WORDINGS[a]) for a in ATTRIBUTES]
    subjects, stops, marks = data.NAME + len(ATTRIBUTES) - 1, len(ATTRIBUTES), 2
    assert subjects + sum(longest) + stops + marks == data.WIDTH
