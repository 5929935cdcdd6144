"""What the corpus promises: facts that cannot leak, questions with one answer, tokens that are words."""
import math
import random
import re
from collections import Counter

import pytest

import data
from data import ARMS, ATTRIBUTES, CANVAS, MARKS, POOLS, RELATIVE, decode, encode, flat, make_corpus


def texts(corpus, group):
    """The decoded rows of one group of the corpus, marks left out."""
    marks = MARKS.doc, MARKS.question, MARKS.answer
    return [decode([i for i in corpus.rows[row].tolist() if i not in marks])
            for row in corpus.groups[group]]


@pytest.fixture(scope="module", params=ARMS)
def corpus(request):
    return make_corpus(known=30, new=20, paraphrases=request.param, wordings=5, seed=3)


def test_one_seed_one_world():
    """The seed decides everything; each other setting that changes the texts changes the digest too."""
    digest = lambda **kwargs: make_corpus(**{"known": 8, "new": 5, "seed": 1} | kwargs).digest
    assert digest() == digest()
    others = dict(seed=2), dict(known=9), dict(paraphrases="same"), dict(wordings=2)
    assert len({digest(), *(digest(**other) for other in others)}) == 5


def test_name_words_tell_which_part_of_a_name_they_are():
    """First, middle and last names share no word with each other or with any value, so a name is never
    ambiguous."""
    pools = [data.MEN + data.WOMEN, data.MIDDLE, data.LAST, *(" ".join(POOLS[a]).split() for a in ATTRIBUTES)]
    pools = [set(pool) for pool in pools]
    assert sum(map(len, pools)) == len(set().union(*pools))
    assert all(len(set(pool)) >= 50 for pool in POOLS.values())
    assert all(len(set(data.WORDINGS[a])) >= 10 for a in ATTRIBUTES)


def test_a_document_tells_all_facts_and_one_name(corpus):
    """Each text holds the name exactly once and every one of the six values."""
    known = len(corpus.groups["known_documents"])
    each = known // 30
    for i, text in enumerate(texts(corpus, "known_documents") + texts(corpus, "new_documents")):
        person = corpus.people[i // each]
        assert text.count(person.name) == 1
        assert all(re.search(rf"\b{value}\b", text) for value in person.facts.values())


@pytest.mark.parametrize("arm", ARMS)
def test_only_two_arms_state_a_fact_before_the_name(arm):
    """Text in the order attribute -> name is what would teach `ar` the backward direction: `permuted` has it,
    and `reversed`, which is there to show whether reading backwards is enough."""
    corpus = make_corpus(known=30, new=20, paraphrases=arm, wordings=5, seed=3)
    late = [not any(text.startswith(p.name) for p in corpus.people)
            for group in ("known_documents", "new_documents") for text in texts(corpus, group)]
    assert any(late) == (arm in ("permuted", "reversed"))
    assert not all(late)


@pytest.mark.parametrize("arm, reordered", [("same", False), ("shuffled", True), ("permuted", True)])
def test_paraphrase_arms_change_order_only_where_they_say_so(arm, reordered):
    """Five texts a person; the order of facts is fixed in `same` and any of the 720 in the other two. With
    the name first, or in `permuted` behind any number of the facts."""
    rng = random.Random(0)
    person = data.make_people(1, rng)[0]
    fives = [data.documents(person, arm, 5, rng) for _ in range(2000)]
    assert {len(five) for five in fives} == {5}
    orders = {tuple(sorted(ATTRIBUTES, key=lambda a: text.index(person.facts[a]))) for text in flat(fives)}
    assert len(orders) == (math.factorial(6) if reordered else 1)
    before_name = {text.partition(person.name)[0].count(".") for text in flat(fives)}
    assert before_name == (set(range(6)) if arm == "permuted" else {0})


def test_reversed_texts_keep_names_and_values_whole():
    """The second text of each pair has the words of the first in reverse order, but no name or date
    backwards."""
    person = data.Person("Curtis Chase Emley", "He", {a: POOLS[a][0] for a in ATTRIBUTES})
    text, backwards = data.documents(person, "reversed", 1, random.Random(0))
    assert text.startswith("Curtis Chase Emley was born on 1 January 1940. He comes from Akron. He went to")
    assert backwards.endswith("went He. Akron from comes He. 1 January 1940 on born was Curtis Chase Emley.")
    assert Counter(text.replace(".", " .").split()) == Counter(backwards.replace(".", " .").split())


def test_a_given_name_is_never_a_target():
    """In the `given` arm what is masked and scored starts behind the name; in all others it starts with
    it."""
    for arm, first in (("given", "was"), ("none", "Curtis")):
        ids, start = data.document_row("Curtis Chase Emley was born.", data.ARMS[arm].given)
        assert data.TOKENIZER.decode([ids[start]]) == " " + first


def test_new_people_are_never_asked_about_in_training(corpus):
    """A name of a new person occurs in the rows of new documents and in no other row that is trained on."""
    new = [person.name for person in corpus.people[30:]]
    for group in ("known_documents", "forward", "backward"):
        assert not any(name in text for text in texts(corpus, group) for name in new)
    for name in new:  # and the exam does ask about every one of them
        assert sum(name in question for question, _ in corpus.exams["forward"]) == len(ATTRIBUTES)


def test_a_backward_question_fits_one_person():
    """In a world so crowded that hundreds of triples fit two people, each question is held against each
    person, known or new: its three clues fit the one that is the answer and nobody else."""
    corpus = make_corpus(known=1500, new=500, seed=0)
    for attribute in ATTRIBUTES[1:]:  # birth dates are too many to be used up
        assert {person.facts[attribute] for person in corpus.people} == set(POOLS[attribute])
    told = [{RELATIVE[a].format(value) for a, value in person.facts.items()} for person in corpus.people]
    for question, name in corpus.exams["backward"] + corpus.exams["known_backward"]:
        clues = set(re.split(", | and ", question.removeprefix("Who ").removesuffix("?")))
        assert len(clues) == 3
        assert [p.name for p, facts in zip(corpus.people, told) if clues <= facts] == [name]


def test_clues_that_fit_two_people_are_not_asked():
    """Two people who share five of six facts: only the triples that contain the sixth can be asked."""
    one = data.Person("A B C", "He", {a: POOLS[a][0] for a in ATTRIBUTES})
    two = one._replace(name="D E F", facts=one.facts | {"major": POOLS["major"][1]})
    population = Counter(triple for person in (one, two) for triple in data.clues(person))
    questions = data.backward_questions(one, population)
    assert len(questions) == 10  # C(5, 2) of the C(6, 3) = 20 triples
    assert all("majored in" in question for question, _ in questions)


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
    assert len(encode("Curtis Chase Emley")) == 3


def test_the_generator_writes_only_words_it_has_tokens_for(corpus):
    """No row falls back to spelling a word in bytes; the only single bytes are the signs."""
    used = {i for row in corpus.rows.tolist() for i in row if len(MARKS) <= i < len(MARKS) + 256}
    assert {data.TOKENIZER.decode([i]) for i in used} <= {".", ",", "?"}


def test_every_answer_has_the_same_canvas(corpus):
    """A canvas as long as its answer would tell the answer's length: all have CANVAS tokens, ends
    included."""
    for row in (*corpus.groups["forward"], *corpus.groups["backward"]):
        length = int((corpus.rows[row] != MARKS.pad).sum())
        assert length - int(corpus.starts[row]) == CANVAS
        assert corpus.rows[row, length - 1] == MARKS.end  # so no answer fills the canvas to the brim


def test_more_people_than_names_is_an_error():
    """Rather than looping for ever or repeating a name."""
    with pytest.raises(ValueError, match="names for at most"):
        make_corpus(known=10**9, new=1)
