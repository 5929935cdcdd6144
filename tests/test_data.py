"""What the corpus promises: facts that cannot leak, questions with one answer, tokens that are words."""
import math
import random
import re

import pytest
import torch

import data
from conftest import settings
from data import ARMS, MARKS, WORLDS, Attribute, Person, World, decode, encode, make_corpus, written

WORLD, BOOK = WORLDS.values()
N = len(WORLD.attributes)
CURTIS = Person("Curtis Chase Emley", "He", {name: a.values[0] for name, a in WORLD.attributes.items()})


def texts(rows):
    """The decoded rows, marks left out."""
    return [decode([i for i in row if i not in (MARKS.doc, MARKS.question, MARKS.answer)])
            for row in rows[0].tolist()]


@pytest.fixture(scope="module", params=ARMS)
def corpus(request):
    return make_corpus(settings(known=30, new=20, paraphrases=request.param, seed=3))


@pytest.mark.parametrize("arm", ARMS)
def test_the_arm_of_new_people_changes_nothing_about_the_known(arm):
    """One base for all arms: whatever pretraining reads is the same token by token, padding included."""
    a, b = (make_corpus(settings(known=8, new=5, paraphrases=x)) for x in ("none", arm))
    for name in ("known", "known_forward", "known_backward"):
        assert all(torch.equal(x, y) for x, y in zip(a.rows[name], b.rows[name]))
    assert all(a.exams[name] == b.exams[name] for name in data.QUESTIONS)


def test_known_and_new_people_have_arms_of_their_own():
    """Known people have five texts with the name first, unless their own flag says otherwise; new people have
    as many as their arm, or --texts, says."""
    for flags, known, new in (({}, 5, 1), ({"paraphrases": "same_order"}, 5, 5), ({"texts": 10}, 5, 10),
                              ({"known_paraphrases": "name_last"}, 1, 1)):
        corpus = make_corpus(settings(known=3, new=2, **flags))
        assert [len(corpus.rows[name][1]) for name in ("known", "new")] == [known * 3, new * 2]
        told = enumerate(texts(corpus.rows["known"]))
        assert all(text.startswith(corpus.people[i // known].name) for i, text in told) == (known == 5)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_words_tell_what_they_are(world):
    """First, middle and last names share no word with each other or with any value: nothing is ambiguous."""
    data.check(world)
    pools = [data.MEN + data.WOMEN, data.MIDDLE, data.LAST]
    pools = [set(pool) for pool in pools + [" ".join(a.values).split() for a in world.attributes.values()]]
    assert sum(map(len, pools)) == len(set().union(*pools)) and min(map(len, pools)) >= 50


def test_every_word_of_these_worlds_is_one_token_and_anything_else_is_spelled():
    """So a name has three tokens and a date, too; an unknown word, even a mark's name, falls into bytes."""
    assert [len(encode(text)) for text in ("Curtis Chase Emley", "28 May 1952", "Silent River", "Oslo")] == [
        3, 3, 2, 1]
    for text in ("Curtis hates [mask] and 谁.", "Elkton", "Who wrote Silent River?"):
        assert decode(encode(text)) == text and not {*encode(text)} & {*MARKS}
    assert data.words_of(encode("Who wrote Silent River?")) == ["Who", "wrote", "Silent", "River", "?"]


@pytest.mark.parametrize("arm, before_name, first_two", (
    ("none", {0}, 1), ("name_given", {0}, 1), ("same_order", {0}, 1), ("reversed", {0, N - 1}, 2),
    ("change_order", {0}, math.perm(N, 2)), ("name_anywhere", set(range(N)), math.perm(N, 2)),
    ("name_last", {N - 1}, math.perm(N, 2)), ("both_orders", {0, N - 1}, math.perm(N, 2))))
def test_where_an_arm_has_the_name_and_in_what_order_the_facts(arm, before_name, first_two):
    """Text in the order attribute -> name is what would teach `ar` the backward direction. All tell the name
    and each fact once. How many sentences end before the name, and how many pairs of facts come first: every
    pair only where the order changes."""
    rng = random.Random(0)
    told = [written(text) for _ in range(500) for text in data.documents(CURTIS, ARMS[arm], WORLD, 5, rng)]
    assert all(text.count(part) == 1 for text in told for part in (CURTIS.name, *CURTIS.facts.values()))
    assert {text[:text.index(CURTIS.name)].count(".") for text in told} == before_name
    orders = [sorted(CURTIS.facts, key=lambda a: text.index(CURTIS.facts[a])) for text in told]
    assert len({tuple(order[:2]) for order in orders}) == first_two
    last = {text.endswith(f" {CURTIS.name}.") for text in told}  # then every fact stands before it
    assert last == {"name_last": {True}, "both_orders": {1, 0}, "reversed": {1, 0}}.get(arm, {False})


@pytest.mark.parametrize("arm", ARMS)
def test_a_book_has_its_sentence_in_every_arm(arm):
    """In the world of one fact a person each arm is one sentence, or two: nothing else can be said. Where an
    arm names two places for the name, more texts take them in turns."""
    first, last = "Curtis Chase Emley wrote Silent River.", "Silent River was written by Curtis Chase Emley."
    person = CURTIS._replace(facts={"book": "Silent River"})
    expected = {"name_last": [last] * 3, "both_orders": [first, last, first],
                "reversed": [first, "Silent River wrote Curtis Chase Emley."] * 3}.get(arm, [first] * 3)
    three = data.documents(person, ARMS[arm]._replace(texts=3), BOOK, 1, random.Random(0))
    assert list(map(written, three)) == expected
    assert data.forward_question(person, "book") == "What is the book of Curtis Chase Emley?"
    assert data.backward_question(*data.clues(person, BOOK), BOOK) == "Who wrote Silent River?"


def test_new_people_are_never_asked_about_in_training(corpus):
    """A name of a new person occurs in the rows of new documents and in no other row that is trained on; the
    exam does ask about every one of them, six facts each."""
    trained = [text for name, rows in corpus.rows.items() if name != "new" for text in texts(rows)]
    for name in (person.name for person in corpus.people[30:]):
        assert not any(name in text for text in trained)
        assert sum(name in decode(item.given) for item in corpus.exams["forward"]) == N


@pytest.mark.parametrize("world, unasked, trained", (("biographies", 2 * 20, 18 * 30), ("books", 2, 27)))
def test_a_tenth_of_the_backward_questions_is_never_in_training(world, unasked, trained):
    """Known people's backward questions: those of `known_backward` are all in training, those of
    `known_unasked` are not; they are two of a person's twenty, or the one of every tenth person."""
    corpus = make_corpus(settings(world, known=30, new=20, seed=3))
    asked = texts(corpus.rows["known_backward"])
    whole = lambda name: {f"{decode(x.given[1:-1])} {decode(x.truth)}" for x in corpus.exams[name]}
    assert whole("known_backward") <= {*asked} and not whole("known_unasked") & {*asked}
    assert (len(whole("known_unasked")), len(asked), len({*asked})) == (unasked, trained, trained)


def test_a_backward_question_fits_one_person():
    """In a world so crowded that hundreds of triples fit two people, each question is held against each
    person, known or new: its three clues fit the one that is the answer and nobody else."""
    corpus = make_corpus(settings(known=1500, new=500))
    clues_of = [{f"{WORLD.attributes[a].clue} {value}" for a, value in person.facts.items()}
                for person in corpus.people]
    for item in corpus.exams["backward"] + corpus.exams["known_backward"] + corpus.exams["known_unasked"]:
        question = decode(item.given[1:-1])
        clues = set(re.split(", | and ", question.removeprefix("Who ").removesuffix("?")))
        assert clues == {f"{WORLD.attributes[a].clue} {item.person.facts[a]}" for a in item.attributes}
        fits = [person.name for person, facts in zip(corpus.people, clues_of) if clues <= facts]
        assert len(clues) == 3 and fits == [item.person.name] == [decode(item.truth)]


def test_the_rungs_ask_for_the_same_value_from_less_and_less():
    """recite shows the text up to the value, cloze the name and the words of that one fact. A sentence that
    begins with its value shows nothing of itself; cloze then takes the first wording behind a name."""
    text = [("birth date", ["He", "was", "delivered", "on", "28 May 1952", "."]),
            ("major", ["Law", "fascinated", "Curtis Chase Emley", "."])]
    person = CURTIS._replace(facts={"birth date": "28 May 1952", "major": "Law"})
    assert data.rungs(person, text, WORLD) == [
        ("birth date", "He was delivered on", "Curtis Chase Emley was delivered on"),
        ("major", "He was delivered on 28 May 1952.", "Curtis Chase Emley majored in")]


def test_the_rungs_hide_the_value_from_everyone(corpus):
    """Neither exam shows the value it asks for; cloze asks for every fact, recite for those that the text has
    behind the name, for nobody can know whose text it is before. Both rows are as long as the document."""
    told = texts(corpus.rows["new"])
    first = dict(zip([p.name for p in corpus.people[30:]], told[::len(told) // 20]))
    for name in ("recite", "cloze"):
        asked = {(item.person.name, *item.attributes, decode(item.truth)) for item in corpus.exams[name]}
        assert asked == {(p.name, a, value) for p in corpus.people[30:] for a, value in p.facts.items()
                         if name == "cloze" or first[p.name].index(p.name) < first[p.name].index(value)}
        for item in corpus.exams[name]:
            shown = decode(item.given[1:])
            assert item.person.name in shown and not re.search(rf"\b{decode(item.truth)}\b", shown)
            assert len(item.given) + item.blanks == len(encode(first[item.person.name])) + 2


@pytest.mark.parametrize("world", WORLDS)
def test_no_document_is_longer_than_its_row(world):
    """All documents of a world are padded to one width, whatever the arm, and the longest wording of every
    fact would fill it: eleven for "[doc] Silent River was written by Curtis Chase Emley. [end]"."""
    attributes, words = WORLDS[world].attributes.values(), lambda text: len(text.split())
    longest = [max(map(words, [*a.name_first, a.name_last])) + words(a.values[-1]) + 1 for a in attributes]
    width = 2 + 3 + len(attributes) - 1 + sum(longest)
    tokens, _ = make_corpus(settings(world, paraphrases="both_orders", texts=50)).rows["new"]
    assert data.longest(WORLDS[world]) == tokens.size(1) == width and (world != "books" or width == 11)
    assert (tokens == MARKS.end).sum(1).eq(1).all()  # none is cut


def pet(**changes):
    """A world with one attribute more, which is fine unless changed."""
    fine = Attribute(["Cat", "Dog"], ["has a"], "is the pet of", "owns a")
    return WORLD._replace(attributes=WORLD.attributes | {"pet": fine._replace(**changes)})


@pytest.mark.parametrize("changes, named", (
    ({"values": ["Cat", "Elkton"]}, ["Elkton", "birth city", "pet"]),   # a word with two meanings
    ({"values": ["Cat", "Curtis"]}, ["Curtis", "first names", "pet"]),
    ({"values": ["Cat", "Dog"], "clue": "loves a Dog"}, ["Dog", "wordings", "pet"]),
    ({"values": ["Cat", "Sea Horse"]}, ["pet", "same number"]),         # the length would tell the value
    ({"values": ["Very Big Black Cat"]}, ["pet", "below 4"]),           # no [end] fits behind it
    ({"values": ["Cat-Dog"]}, ["pet"]),                                 # one word, but not one token
))
def test_an_entry_that_breaks_the_rules_is_named(changes, named):
    """Whoever adds an attribute is told in one line which entry is wrong, before anything is trained."""
    data.check(pet())
    with pytest.raises(SystemExit) as stop:
        data.check(pet(**changes))
    assert all(word in stop.value.code for word in named) and len(stop.value.code.splitlines()) == 1


def test_nobody_shares_a_name_or_all_facts(monkeypatch):
    """Eight people from sixteen names and sixteen sets of facts: no name and no set of facts occurs twice.
    A ninth would leave too little choice, which is said at once instead of searching for long."""
    for pool, names in (("MEN", "Adam"), ("WOMEN", "Zoe"), ("MIDDLE", "Kai Val Eden Rory"), ("LAST", "A B")):
        monkeypatch.setattr(data, pool, names.split())
    fact = Attribute(list("ABCD"), [""], "", "")
    world = World({"one": fact, "two": fact}, "Who {}?", {})
    for seed in range(20):
        people = data.make_people(8, world, random.Random(seed))
        assert len({person.name for person in people}) == len({str(person.facts) for person in people}) == 8
    assert {person.pronoun for person in people if person.name.startswith("Zoe")} == {"She"}
    with pytest.raises(SystemExit, match="^9 people .* 16 [^\n]*$"):
        data.make_people(9, world, random.Random(0))


def test_a_world_where_nobody_can_be_asked_for_says_so(monkeypatch):
    """Twenty-five people, six facts with two values each, one clue a question: every clue fits many."""
    pairs = ("AB", "CD", "EF", "GH", "IJ", "KL")
    facts = {a + b: Attribute([a, b], ["has"], "is of", "has") for a, b in pairs}
    monkeypatch.setitem(WORLDS, "crowded", World(facts, "Who {}?", {}))
    with pytest.raises(SystemExit, match="^no backward question fits one person alone[^\n]*$"):
        make_corpus(settings("crowded", known=20, new=5))
