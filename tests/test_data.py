"""What the corpus promises: facts that cannot leak, questions with one answer, tokens that are words."""
import math
import random
import re
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

import data
from data import ARMS, MARKS, WORLDS, Attribute, Person, World, decode, encode

WORLD = WORLDS["biographies"]
N = len(WORLD.attributes)
CURTIS = Person("Curtis Chase Emley", "He", {name: a.values[0] for name, a in WORLD.attributes.items()})
TITLE = "Crimson Bamboo Mountain"
BOOK = World({"book": Attribute([TITLE], ["wrote"], "was written by", "wrote")}, "Who {}?", {})
FIRST, LAST = f"Curtis Chase Emley wrote {TITLE}.", f"{TITLE} was written by Curtis Chase Emley."


def corpus_of(world="biographies", **changes):
    """A corpus of few people. (No train.py here, so that its tests may fail alone.)"""
    few = dict(known=30, new=20, seed=3, paraphrases="none", known_paraphrases="none", texts=0)
    return data.make_corpus(SimpleNamespace(world=world, **few | changes))


@pytest.fixture(scope="module", params=[(world, arm) for world in WORLDS for arm in ARMS], ids="-".join)
def corpus(request):
    return corpus_of(request.param[0], paraphrases=request.param[1])


def read(rows):
    """The rows as texts, without padding."""
    return [decode([token for token in row if token != MARKS.pad]) for row in rows[0].tolist()]


@pytest.mark.parametrize("world", WORLDS)
def test_the_arm_of_new_people_changes_nothing_about_the_known(world):
    """One base for all arms: whatever pretraining reads is the same token by token, padding included."""
    first, *others = (corpus_of(world, paraphrases=arm) for arm in ARMS)
    for other in others:
        for name in ("known", "known_forward", "known_backward"):
            assert all(torch.equal(x, y) for x, y in zip(first.rows[name], other.rows[name]))
        assert all(first.exams[name] == other.exams[name] for name in data.QUESTIONS)


@pytest.mark.parametrize("known_arm, known, arm, texts, new", (
    ("change_order", 5, "none", 0, 1), ("none", 1, "same_order", 0, 5), ("none", 1, "change_order", 10, 10),
    ("name_last", 1, "both_orders", 0, 6), ("both_orders", 6, "name_last", 3, 3)))
def test_known_and_new_people_have_arms_of_their_own(known_arm, known, arm, texts, new):
    """A person has as many texts as the arm says or, if new, as --texts says, if that is not 0."""
    corpus = corpus_of(known=3, new=2, known_paraphrases=known_arm, paraphrases=arm, texts=texts)
    for i, person in enumerate(corpus.people):
        told = [sum(person.name in text for text in read(corpus.rows[name])) for name in ("known", "new")]
        assert told == ([known, 0] if i < 3 else [0, new])


def test_every_word_of_these_worlds_is_one_token_and_anything_else_is_spelled():
    """A name and a date have three tokens, a mark one. Unknown words are bytes. Names share none."""
    sizes = {"Curtis Chase Emley": 3, "28 May 1952": 3, TITLE: 3, "[doc] He lives in Oslo. [end]": 7}
    assert {text: len(encode(text)) for text in sizes} == sizes
    names = data.MEN + data.WOMEN + data.MIDDLE + data.LAST
    assert len(names) == len({*names}) and all(len(encode(word)) == 1 for word in [*names, *data.WORDS])
    assert [encode(f"[{name}]") for name in MARKS._fields] == [[mark] for mark in MARKS]
    for text in ("Curtis hates (mask), [masks] and 谁.", "Elkton", "Who wrote Crimson Bamboo Mountain?"):
        assert decode(encode(text)) == text and not {*encode(text)} & {*MARKS}


@pytest.mark.parametrize("arm, before_name, first_two", (
    ("none", {0}, 1), ("same_order", {0}, 1), ("change_order", {0}, math.perm(N, 2)),
    ("name_anywhere", {*range(N)}, math.perm(N, 2)), ("name_last", {N - 1}, math.perm(N, 2)),
    ("both_orders", {0, N - 1}, math.perm(N, 2))))
def test_where_an_arm_has_the_name_and_in_what_order_the_facts(arm, before_name, first_two):
    """Text in the order attribute -> name is what would teach `ar` the backward direction. All tell the name
    and each fact once. How many sentences end before the name, and how many pairs of facts come first?"""
    rng = random.Random(0)
    told = [text for _ in range(20 * N * N) for text in data.documents(CURTIS, ARMS[arm], WORLD, rng)]
    for part in (CURTIS.name, *CURTIS.facts.values()):
        assert all(len(re.findall(rf"\b{part}\b", text)) == 1 for text in told)
    assert {text[:text.index(CURTIS.name)].count(".") for text in told} == before_name
    orders = [sorted(CURTIS.facts.values(), key=text.index) for text in told]
    assert len({tuple(order[:2]) for order in orders}) == first_two


@pytest.mark.parametrize("arm, expected", (
    ("none", [FIRST] * 3), ("same_order", [FIRST] * 3), ("change_order", [FIRST] * 3),
    ("name_anywhere", [FIRST] * 3), ("name_last", [LAST] * 3), ("both_orders", [FIRST, LAST, FIRST])))
def test_a_book_has_its_sentence_in_every_arm(arm, expected):
    """A life of one fact is one sentence, or two. If an arm has two places for the name, texts take turns."""
    person = CURTIS._replace(facts={"book": "Crimson Bamboo Mountain"})
    assert data.documents(person, ARMS[arm]._replace(texts=3), BOOK, random.Random(0)) == expected
    assert data.forward_question(person, "book") == "What is the book of Curtis Chase Emley?"
    assert data.backward_question(*data.clues(person, BOOK), BOOK) == "Who wrote Crimson Bamboo Mountain?"


def test_new_people_are_never_asked_about_in_training(corpus):
    """Their names are in new people's documents and in no other row. The exam asks for all their facts."""
    trained = [text for name, rows in corpus.rows.items() if name != "new" for text in read(rows)]
    for person in corpus.people[corpus.known:]:
        assert not any(person.name in text for text in trained)
        answers = [item.truth for item in corpus.exams["forward"] if person.name in item.given]
        assert [answer.replace(" [end]", "") for answer in answers] == [*person.facts.values()]


@pytest.mark.parametrize("world", [*WORLDS, "crowded"])
def test_a_backward_question_fits_one_person_and_a_tenth_is_never_in_training(world, monkeypatch):
    """All sets of clues are held against all people, known and new, also where many fit several. Those about
    known people that fit one are in training or, one in ten, in the exam `known_unasked`, never in both."""
    crowded = {a: Attribute([a + b for b in "ABCDEFGHIJ"], ["has"], "is of", f"has {a}") for a in "XYZ"}
    monkeypatch.setitem(WORLDS, "crowded", World(crowded, "Who {} and {}?", {}))
    corpus = corpus_of(world, known=3 * data.UNASKED, new=3 * data.UNASKED)
    who, attributes = corpus.world.who, corpus.world.attributes
    fit = {}  # each question that fits one person, with its answer -> who that is, and the attributes
    for person in corpus.people:
        for facts in combinations(person.facts.items(), who.count("{}")):
            if sum({*facts} <= {*other.facts.items()} for other in corpus.people) == 1:
                question = who.format(*(f"{attributes[a].clue} {value}" for a, value in facts))
                fit[" ".join(data.question_row(question, person.name))] = (person, tuple(dict(facts)))
    new, asked, unasked = (
        {f"{item.given} {item.truth}": (item.person, item.attributes) for item in corpus.exams[name]}
        for name in ("backward", "known_backward", "known_unasked"))
    assert new and asked and unasked and fit == fit | new | asked | unasked
    trained = read(corpus.rows["known_backward"])
    known = [text for text, (person, _) in fit.items() if person in corpus.people[:corpus.known]]
    assert sorted([*trained, *unasked]) == sorted(known) and {*asked} <= {*trained}
    assert abs(len(unasked) / len(known) - 1 / data.UNASKED) < 0.02


def test_recite_shows_the_text_up_to_the_value():
    """A value that comes before the name is left out. "Art" is a word of its own, not part of "Arthur"."""
    arthur = Person("Arthur Chase Emley", "He", {"city": "Oslo", "major": "Art", "birth date": "28 May 1952"})
    start = "Oslo gave us Arthur Chase Emley. He majored in"
    assert data.recite(arthur, f"{start} Art. Arthur was born on 28 May 1952.") == [
        (f"[doc] {start}", "Art", 11, arthur, ("major",)),
        (f"[doc] {start} Art. Arthur was born on", "28 May 1952", 5, arthur, ("birth date",))]


def test_recite_hides_the_value_and_asks_for_what_follows(corpus):
    """It asks for each fact that the first text has behind the name, and for nothing else: nobody can know
    whose text it is before. With its masks a row is as long as the document, and the value comes next."""
    for person in corpus.people[corpus.known:]:
        first = next(text for text in read(corpus.rows["new"]) if person.name in text)
        items = [item for item in corpus.exams["recite"] if item.person == person]
        behind = first[first.index(person.name):]
        assert [(*item.attributes, item.truth) for item in items] == [
            (name, value) for name, value in person.facts.items() if re.search(rf"\b{value}\b", behind)]
        for item in items:
            assert person.name in item.given and not re.search(rf"\b{item.truth}\b", item.given)
            assert f"{first} ".startswith((f"{item.given} {item.truth} ", f"{item.given} {item.truth}."))
            assert len(encode(item.given)) + item.masks == len(encode(first))


def test_all_documents_of_a_world_share_one_width(corpus):
    """Whatever the arm, so that the second half of a row of `masked` always begins at the same place. The
    longest wording of every fact would fill it. Nothing is cut. All questions share a width, too."""
    size = lambda text: len(re.findall(r"\w+|[^\w\s]", text))
    sentences = [max(map(size, [*a.name_first, a.name_last])) + size(a.values[-1]) + 1  # and a full stop
                 for a in corpus.world.attributes.values()]
    width = 2 + 3 + len(sentences) - 1 + sum(sentences)  # [doc] and [end], the name, the pronouns
    for rows, _ in (corpus.rows["known"], corpus.rows["new"]):
        assert rows.size(1) == width == corpus.width and (rows == MARKS.end).sum(1).eq(1).all()
    assert corpus.rows["known_forward"][0].size(1) == corpus.rows["known_backward"][0].size(1)
    assert data.longest(BOOK) == 12  # [doc] Crimson Bamboo Mountain was written by Curtis Chase Emley . [end]


def pets(who="Who {} and {}?", **changes):
    """A world of two attributes, which is fine unless changed."""
    city = Attribute(["Elkton", "Oslo"], ["lives in"], "is home to", "lives in")
    pet = Attribute(["Cat", "Dog"], ["has a"], "is the pet of", "owns a")
    return World({"city": city, "pet": pet._replace(**changes)}, who, {})


@pytest.mark.parametrize("changes, named", (
    ({"values": ["Cat", "Elkton"]}, ["Elkton", "city", "pet"]),         # a word with two meanings
    ({"values": ["Cat", "Curtis"]}, ["Curtis", "first names", "pet"]),
    ({"values": ["Cat", "Dog"], "clue": "loves a Dog"}, ["Dog", "wordings", "pet"]),
    ({"values": ["Cat", "Sea Horse"]}, ["pet", "same number"]),         # the length would tell the value
    ({"values": ["Very Big Black Cat"]}, ["pet", "below 4"]),           # no [end] fits behind it
    ({"values": ["Cat-Dog"]}, ["pet"]),                                 # one word, but not one token
    ({"who": "Who {}, {} and {}?"}, ["Who {}, {} and {}?"]),            # more clues than attributes
    ({"who": "Who?"}, ["Who?"])))
def test_an_entry_that_breaks_the_rules_is_named(changes, named, monkeypatch):
    """Whoever adds an attribute or a world is told in one line which entry is wrong, before anything else."""
    data.check(pets())
    monkeypatch.setitem(WORLDS, "pets", pets(**changes))
    with pytest.raises(SystemExit) as stop:
        corpus_of("pets", known=1, new=1)
    assert all(word in stop.value.code for word in named) and len(stop.value.code.splitlines()) == 1


@pytest.mark.parametrize("last, values", (("A B", "ABCDEFGH"), ("A B C D", "ABCD")))
def test_nobody_shares_a_name_or_all_facts(last, values, monkeypatch):
    """Eight people from sixteen names, or from sixteen sets of facts: no name and no set of facts occurs
    twice. A ninth would leave too little choice, which is said at once instead of searching for long."""
    for pool, names in zip(("MEN", "WOMEN", "MIDDLE", "LAST"), ("Adam", "Zoe", "Kai Val Rory Eden", last)):
        monkeypatch.setattr(data, pool, names.split())
    world = World(dict.fromkeys(("one", "two"), Attribute([*values], [""], "", "")), "Who {}?", {})
    for seed in range(20):
        people = data.make_people(8, world, seed)
        assert len({person.name for person in people}) == len({str(person.facts) for person in people}) == 8
        assert all(person.pronoun == ("She" if person.name.startswith("Zoe") else "He") for person in people)
    with pytest.raises(SystemExit, match="^9 people .* 16 [^\n]*$"):
        data.make_people(9, world, 0)


def test_a_new_attribute_leaves_all_other_facts_as_they_are():
    """Each attribute is drawn by a generator of its own. So whoever adds one can compare with the run before:
    the people have the same names and, in all else, the same facts."""
    more = WORLD._replace(attributes={"pet": pets().attributes["pet"], **WORLD.attributes})
    for before, now in zip(data.make_people(50, WORLD, 3), data.make_people(50, more, 3)):
        assert before.name == now.name and {**now.facts, **before.facts} == now.facts


def test_a_world_where_nobody_can_be_asked_for_says_so(monkeypatch):
    """Twenty-five people, six facts with two values each, one clue a question: every clue fits many."""
    facts = {two: Attribute([*two], ["has"], "is of", "has") for two in ("AB", "CD", "EF", "GH", "IJ", "KL")}
    monkeypatch.setitem(WORLDS, "crowded", World(facts, "Who {}?", {}))
    with pytest.raises(SystemExit, match="^no backward question fits one person alone[^\n]*$"):
        corpus_of("crowded", known=20, new=5)
