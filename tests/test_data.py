"""What the corpus promises: facts that cannot leak, questions with one answer, tokens that are words."""
import math
import random
import re
from collections import Counter

import pytest
import torch

import data
from data import (ARMS, ATTRIBUTES, CANVAS, MARKS, POOLS, RELATIVE, WORDINGS, decode, encode, make_corpus,
                  spell)


def texts(rows):
    """The decoded rows, marks left out."""
    marks = MARKS.doc, MARKS.question, MARKS.answer
    return [decode([i for i in row if i not in marks]) for row in rows.tokens.tolist()]


@pytest.fixture(scope="module", params=ARMS)
def corpus(request):
    return make_corpus(known=30, new=20, paraphrases=request.param, wordings=5, seed=3)


def ask(corpus, name):
    """[(question, answer)] of one exam, as text."""
    return [(decode(item.ids[1:item.start - 1]), decode(item.truth)) for item in corpus.exams[name]]


def same(a, b):
    return a.tokens.shape == b.tokens.shape and torch.equal(a.tokens, b.tokens)


def test_one_seed_one_world():
    """The seed decides everything; another seed gives other people."""
    a, b, c = (make_corpus(known=8, new=5, seed=seed) for seed in (1, 1, 2))
    assert a.people == b.people and a.exams == b.exams and same(a.documents["new"], b.documents["new"])
    assert not {person.name for person in a.people} & {person.name for person in c.people}


@pytest.mark.parametrize("arm", ARMS)
def test_the_arm_of_new_people_changes_nothing_about_the_known(arm):
    """One base for all arms: whatever pretraining reads is the same token by token, padding included."""
    a, b = make_corpus(known=8, new=5), make_corpus(known=8, new=5, paraphrases=arm)
    assert same(a.documents["known"], b.documents["known"])
    assert all(same(a.questions[direction], b.questions[direction]) for direction in a.questions)
    assert all(a.exams[name] == b.exams[name] for name in a.exams if name not in ("recite", "cloze"))


def test_known_people_have_five_texts_in_changing_order():
    """The rich base: five texts, their facts in different orders, the name first; a flag puts it anywhere."""
    for arm, first in (("change_order", True), ("name_anywhere", False)):
        corpus = make_corpus(known=30, new=5, known_paraphrases=arm)
        written = texts(corpus.documents["known"])
        assert len(written) == 5 * 30 and len(corpus.documents["new"].starts) == 5
        starts = [text.startswith(corpus.people[i // 5].name) for i, text in enumerate(written)]
        assert all(starts) == first


def test_name_words_tell_which_part_of_a_name_they_are():
    """First, middle and last names share no word with each other or with any value, so a name is never
    ambiguous."""
    pools = [data.MEN + data.WOMEN, data.MIDDLE, data.LAST, *(" ".join(POOLS[a]).split() for a in ATTRIBUTES)]
    pools = [set(pool) for pool in pools]
    assert sum(map(len, pools)) == len(set().union(*pools))
    assert all(len(set(pool)) >= 50 for pool in POOLS.values())


def test_a_document_tells_all_facts_and_one_name(corpus):
    """Each text holds the name exactly once and every value."""
    for rows, people in ((corpus.documents["known"], corpus.people[:30]),
                         (corpus.documents["new"], corpus.people[30:])):
        each = len(rows.starts) // len(people)
        for i, text in enumerate(texts(rows)):
            person = people[i // each]
            assert text.count(person.name) == 1
            assert all(re.search(rf"\b{value}\b", text) for value in person.facts.values())


def test_the_number_of_texts_can_be_chosen():
    """Two or ten texts a new person, written as the arm says; known people keep their five."""
    for texts in (2, 10):
        corpus = make_corpus(known=8, new=5, paraphrases="same_order", texts=texts)
        assert [len(corpus.documents[group].starts) for group in ("known", "new")] == [5 * 8, texts * 5]


@pytest.mark.parametrize("arm", ARMS)
def test_only_two_arms_state_a_fact_before_the_name(arm):
    """Text in the order attribute -> name is what would teach `ar` the backward direction: `name_anywhere`
    has it, and `reversed`, which is there to show whether reading backwards is enough."""
    corpus = make_corpus(known=30, new=20, paraphrases=arm, seed=3)
    late = [not any(text.startswith(p.name) for p in corpus.people)
            for text in texts(corpus.documents["new"])]
    assert any(late) == (arm in ("name_anywhere", "reversed"))
    assert not all(late)


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.texts > 1])
def test_paraphrase_arms_change_order_only_where_they_say_so(arm):
    """Five texts a person; the order of facts is fixed in `same_order` and any in the other two, each pair
    of facts at its start. With the name first, or in `name_anywhere` behind any number of the facts."""
    rng = random.Random(0)
    person = data.make_people(1, rng)[0]
    fives = [data.documents(person, ARMS[arm], 5, rng) for _ in range(500)]
    assert {len(five) for five in fives} == {5}
    written = [text for five in fives for text in five]
    first_two = {tuple(sorted(ATTRIBUTES, key=lambda a: text.index(person.facts[a]))[:2]) for text in written}
    assert len(first_two) == (1 if arm == "same_order" else math.perm(len(ATTRIBUTES), 2))
    before_name = {text[:text.index(person.name)].count(".") for text in written}
    assert before_name == (set(range(len(ATTRIBUTES))) if arm == "name_anywhere" else {0})


def test_reversed_texts_keep_names_and_values_whole():
    """The second text of each pair has the words of the first in reverse order, but no name or date
    backwards."""
    person = data.Person("Curtis Chase Emley", "He", {a: POOLS[a][0] for a in ATTRIBUTES})
    text, backwards = map(spell, data.documents(person, ARMS["reversed"], 1, random.Random(0)))
    assert text.startswith("Curtis Chase Emley was born on 1 January 1940. He comes from Akron. He went to")
    assert backwards.endswith("went He. Akron from comes He. 1 January 1940 on born was Curtis Chase Emley.")
    assert Counter(text.replace(".", " .").split()) == Counter(backwards.replace(".", " .").split())


def test_new_people_are_never_asked_about_in_training(corpus):
    """A name of a new person occurs in the rows of new documents and in no other row that is trained on."""
    new = [person.name for person in corpus.people[30:]]
    for rows in (corpus.documents["known"], *corpus.questions.values()):
        assert not any(name in text for text in texts(rows) for name in new)
    for name in new:  # and the exam does ask about every one of them
        assert sum(name in decode(item.ids) for item in corpus.exams["forward"]) == len(ATTRIBUTES)


def test_questions_kept_for_the_exam_are_never_in_training(corpus):
    """Known people's backward questions: those of `known_backward` are all in training, those of
    `known_unasked` are not, though each asks for a name that training does ask for."""
    asked = set(texts(corpus.questions["backward"]))
    questions = lambda name: {f"{question} {answer}" for question, answer in ask(corpus, name)}
    assert questions("known_backward") <= asked and not questions("known_unasked") & asked
    assert len(questions("known_unasked")) == len(questions("known_backward")) == 2 * 20


def test_a_backward_question_fits_one_person():
    """In a world so crowded that hundreds of triples fit two people, each question is held against each
    person, known or new: its three clues fit the one that is the answer and nobody else."""
    corpus = make_corpus(known=1500, new=500, seed=0)
    for attribute in ATTRIBUTES[1:]:  # birth dates are too many to be used up
        assert {person.facts[attribute] for person in corpus.people} == set(POOLS[attribute])
    told = [{RELATIVE[a].format(value) for a, value in person.facts.items()} for person in corpus.people]
    exams = ask(corpus, "backward") + ask(corpus, "known_backward") + ask(corpus, "known_unasked")
    for question, name in exams:
        clues = set(re.split(", | and ", question.removeprefix("Who ").removesuffix("?")))
        assert len(clues) == 3
        assert [p.name for p, facts in zip(corpus.people, told) if clues <= facts] == [name]


def test_clues_that_fit_two_people_are_not_asked():
    """Two people who share all facts but one: only the triples that contain that one can be asked."""
    one = data.Person("A B C", "He", {a: POOLS[a][0] for a in ATTRIBUTES})
    two = one._replace(name="D E F", facts=one.facts | {"major": POOLS["major"][1]})
    population = Counter(triple for person in (one, two) for triple in data.triples(person))
    questions = data.backward_questions(one, population)
    assert len(questions) == math.comb(len(ATTRIBUTES) - 1, 2)
    assert all("majored in" in question for question, _ in questions)


def test_the_rungs_ask_for_the_same_value_from_less_and_less():
    """recite shows the document up to the value, cloze the name and the words of that one fact; what follows
    is masked, up to the length of the whole document. By hand for two facts, one with words behind it."""
    facts = {a: POOLS[a][0] for a in ATTRIBUTES} | {"birth date": "28 May 1952", "major": "Law"}
    person = data.Person("Curtis Chase Emley", "He", facts)
    pieces = "He read Law as a student .".split()
    pieces = ["Curtis Chase Emley", "was", "born", "on", "28 May 1952", "."] + pieces
    length = 3 + 3 + 3 + 1 + 7 + 2  # name, was born on, date, full stop, second sentence, [doc] and [end]
    for attribute, shown in (("birth date", ["Curtis Chase Emley was born on"] * 2),
                             ("major", ["Curtis Chase Emley was born on 28 May 1952. He read",
                                        "Curtis Chase Emley read"])):
        for item, text in zip(data.document_items(person, pieces, attribute), shown):
            assert item.ids[0] == MARKS.doc and decode(item.ids[1:item.start]) == text
            assert set(item.ids[item.start:]) == {MARKS.mask} and len(item.ids) == length
            assert decode(item.truth) == person.facts[attribute]


def test_the_rungs_hide_the_value_from_everyone(corpus):
    """Neither item of any new person shows the value it asks for; all facts of all new people are asked."""
    new = [value for person in corpus.people[30:] for value in person.facts.values()]
    for name in ("recite", "cloze"):
        items = corpus.exams[name]
        shown = [decode(item.ids[:item.start]) for item in items]
        assert all(any(person.name in text for person in corpus.people[30:]) for text in shown)
        assert [decode(item.truth) for item in items] == new or name == "recite" and len(items) < len(new)
        for item in items:
            assert not re.search(rf"\b{decode(item.truth)}\b", decode(item.ids[:item.start]))


@pytest.mark.parametrize("text", ["Curtis Chase Emley was born on 2 May 1950.", "", " ", "Zoë said: 'no'\n",
                                  "日本 42x", "<mask> <pad><end>", "  two  spaces  "])
def test_any_text_survives_the_tokenizer(text):
    """decode(encode(text)) is the text, be its words known, unknown or in another script; marks stay text."""
    ids = encode(text)
    assert decode(ids) == text
    assert not set(ids) & set(MARKS)


def test_a_word_is_one_token_wherever_it_stands():
    """At the start of a text, after a space, before a full stop: the same id. So a name is three tokens."""
    start, middle = encode("Curtis"), encode("He met Curtis.")
    assert len(start) == 1 and start[0] in middle
    assert len(encode("Curtis Chase Emley")) == data.NAME


def test_the_generator_writes_only_words_it_has_tokens_for(corpus):
    """No row falls back to spelling a word in bytes; the only single bytes are the signs."""
    for rows in (*corpus.documents.values(), *corpus.questions.values()):
        used = {i for row in rows.tokens.tolist() for i in row if len(MARKS) <= i < len(MARKS) + 256}
        assert {data.TOKENIZER.decode([i]) for i in used} <= {".", ",", "?"}


def test_no_document_is_longer_than_its_row():
    """All rows of documents are WIDTH wide, so that the arm of new people changes nothing about the rows of
    the known. The longest wording of every fact, by hand, fills a row; more is told to raise WIDTH.
    """
    person = data.Person("Curtis Chase Emley", "She", {a: pool[-1] for a, pool in POOLS.items()})
    longest = {a: max(WORDINGS[a], key=lambda wording: len(encode(wording))) for a in ATTRIBUTES}
    text = " ".join(f"{person.name if i == 0 else 'She'} {longest[a].format(person.facts[a])}."
                    for i, a in enumerate(ATTRIBUTES))
    row = data.document_row(text)
    assert len(row[0]) == data.WIDTH
    with pytest.raises(AssertionError, match="raise WIDTH"):
        data.pad_rows([row, data.document_row(text + " She lives in Rome.")], data.WIDTH)


def test_every_answer_has_the_same_canvas(corpus):
    """A canvas as long as its answer would tell the answer's length: all have CANVAS tokens, ends
    included."""
    for rows in corpus.questions.values():
        lengths = (rows.tokens != MARKS.pad).sum(1)
        assert ((lengths - rows.starts) == CANVAS).all()
        assert (rows.tokens.gather(1, lengths[:, None] - 1) == MARKS.end).all()  # none is filled to the brim
