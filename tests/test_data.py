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
BOOKS = Attribute(["Silent River", "Lost Moon"], ["wrote"], "was written by", "wrote")
BOOK = World({"book": BOOKS}, "Who {}?", {})  # a world of one fact a person


def corpus_of(world="biographies", **changes):
    """A corpus of few people. (No train.py here, so that its tests may fail alone.)"""
    few = {"known": 30, "new": 20, "paraphrases": "none", "known_paraphrases": "change_order", "texts": 0,
           "seed": 3}
    return data.make_corpus(SimpleNamespace(world=world, **few | changes))


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return request.param


@pytest.fixture(scope="module", params=ARMS)
def corpus(world, request):
    """The corpus of each world in each arm."""
    return corpus_of(world, paraphrases=request.param)


def texts(rows):
    """The rows as text, without padding."""
    return [decode([i for i in row if i != MARKS.pad]) for row in rows[0].tolist()]


def place(part, text):
    """Where in a text the words of a part begin."""
    return re.search(rf"\b{part}\b", text).start()


def test_the_arm_of_new_people_changes_nothing_about_the_known(corpus, world):
    """One base for all arms: whatever pretraining reads is the same token by token, padding included."""
    plain = corpus_of(world, paraphrases="none")
    for name in ("known", "known_forward", "known_backward"):
        assert all(torch.equal(x, y) for x, y in zip(plain.rows[name], corpus.rows[name]))
    assert all(plain.exams[name] == corpus.exams[name] for name in data.QUESTIONS)


@pytest.mark.parametrize("known_arm, known, arm, texts_a_person, new", (
    ("change_order", 5, "none", 0, 1), ("none", 1, "same_order", 0, 5), ("same_order", 5, "change_order", 10, 10),
    ("name_last", 1, "both_orders", 0, 2), ("both_orders", 2, "name_last", 3, 3)))
def test_known_and_new_people_have_arms_of_their_own(known_arm, known, arm, texts_a_person, new):
    """Known people have as many texts as their own arm says, new people as many as theirs or, if it is not 0,
    --texts. The texts of a person follow each other, in the order of the people."""
    corpus = corpus_of(known=3, new=2, known_paraphrases=known_arm, paraphrases=arm, texts=texts_a_person)
    names = [person.name for person in corpus.people]
    for rows, people, n in (("known", names[:3], known), ("new", names[3:], new)):
        told = texts(corpus.rows[rows])
        assert [name for text in told for name in names if name in text] == [x for x in people for _ in range(n)]


def test_words_tell_what_they_are(world):
    """First, middle and last names share no word with each other or with any value: nothing is ambiguous."""
    data.check(WORLDS[world])
    values = [" ".join(attribute.values).split() for attribute in WORLDS[world].attributes.values()]
    pools = [set(pool) for pool in (data.MEN + data.WOMEN, data.MIDDLE, data.LAST, *values)]
    assert sum(map(len, pools)) == len(set().union(*pools))


def test_a_word_and_a_mark_are_one_token_and_anything_else_is_spelled():
    """So a name has three tokens and a date, too. An unknown word falls into bytes, never into marks."""
    sizes = {"Curtis Chase Emley": 3, "28 May 1952": 3, "Silent River": 2, "[doc] He lives in Oslo. [end]": 7}
    assert {text: len(encode(text)) for text in sizes} == sizes
    assert all(len(encode(word)) == 1 for word in data.WORDS)
    assert [encode(f"[{name}]") for name in MARKS._fields] == [[mark] for mark in MARKS]
    for text in ("Curtis hates (mask), [masks] and 谁.", "Elkton", "Who wrote Silent River?"):
        assert decode(encode(text)) == text and not {*encode(text)} & {*MARKS}


@pytest.mark.parametrize("arm, before_name, first_two", (
    ("none", {0}, 1), ("same_order", {0}, 1), ("change_order", {0}, math.perm(N, 2)),
    ("name_anywhere", set(range(N)), math.perm(N, 2)), ("name_last", {N - 1}, math.perm(N, 2)),
    ("both_orders", {0, N - 1}, math.perm(N, 2))))
def test_where_an_arm_has_the_name_and_in_what_order_the_facts(arm, before_name, first_two):
    """Text in the order attribute -> name is what would teach `ar` the backward direction. All tell the name
    and each fact once. How many sentences end before the name, and how many pairs of facts come first: every
    pair only where the order changes."""
    rng = random.Random(0)
    told = [text for _ in range(20 * N * N) for text in data.documents(CURTIS, ARMS[arm], WORLD, rng)]
    for part in (CURTIS.name, *CURTIS.facts.values()):
        assert all(len(re.findall(rf"\b{part}\b", text)) == 1 for text in told)
    assert {text[:text.index(CURTIS.name)].count(".") for text in told} == before_name
    orders = [sorted(CURTIS.facts, key=lambda a: place(CURTIS.facts[a], text)) for text in told]
    assert len({tuple(order[:2]) for order in orders}) == first_two
    last = {text.endswith(f" {CURTIS.name}.") for text in told}  # then every fact stands before it
    assert last == {"name_last": {True}, "both_orders": {True, False}}.get(arm, {False})


FIRST, LAST = "Curtis Chase Emley wrote Silent River.", "Silent River was written by Curtis Chase Emley."


@pytest.mark.parametrize("arm, expected", (
    ("none", [FIRST] * 3), ("same_order", [FIRST] * 3), ("change_order", [FIRST] * 3),
    ("name_anywhere", [FIRST] * 3), ("name_last", [LAST] * 3), ("both_orders", [FIRST, LAST, FIRST])))
def test_a_book_has_its_sentence_in_every_arm(arm, expected):
    """In a world of one fact a person each arm is one sentence, or two: nothing else can be said. Where an
    arm names two places for the name, more texts take them in turns."""
    person = CURTIS._replace(facts={"book": "Silent River"})
    assert data.documents(person, ARMS[arm]._replace(texts=3), BOOK, random.Random(0)) == expected
    assert data.forward_question(person, "book") == "What is the book of Curtis Chase Emley?"
    assert data.backward_question(*data.clues(person, BOOK), BOOK) == "Who wrote Silent River?"


def test_new_people_are_never_asked_about_in_training(corpus):
    """A name of a new person occurs in the rows of new documents and in no other row that is trained on; the
    exam does ask about every one of them, all of their facts."""
    trained = [text for name, rows in corpus.rows.items() if name != "new" for text in texts(rows)]
    for person in corpus.people[corpus.known:]:
        assert not any(person.name in text for text in trained)
        answers = [item.truth for item in corpus.exams["forward"] if person.name in item.given]
        assert [answer.replace(" [end]", "") for answer in answers] == list(person.facts.values())


def test_a_tenth_of_the_backward_questions_is_never_in_training(world):
    """Each backward question about known people that fits one person alone is either trained on or, one in
    ten, kept for the exam `known_unasked`. `known_backward` asks what was trained on."""
    corpus = corpus_of(world, known=3 * data.UNASKED, new=3 * data.UNASKED)
    clues, facts = WORLDS[world].who.count("{}"), [{*person.facts.items()} for person in corpus.people]
    fit = sum(sum({*some} <= its for its in facts) == 1 for person in corpus.people[:corpus.known]
              for some in combinations(person.facts.items(), clues))
    trained = texts(corpus.rows["known_backward"])
    asked, unasked = ({f"{item.given} {item.truth}" for item in corpus.exams[name]}
                      for name in ("known_backward", "known_unasked"))
    assert asked <= {*trained} and not unasked & {*trained}
    assert len({*trained} | unasked) == len(trained) + len(unasked) == fit
    assert abs(len(unasked) - fit / data.UNASKED) <= fit / 100


def test_a_backward_question_fits_one_person():
    """In a world so crowded that hundreds of triples fit two people, each question is held against each
    person, known or new: its clues fit the one that is the answer and nobody else."""
    corpus = corpus_of(known=1500, new=500)
    clues_of = [{f"{WORLD.attributes[a].clue} {value}" for a, value in person.facts.items()}
                for person in corpus.people]
    pattern = re.escape(f"[question] {WORLD.who} [answer]").replace(r"\{\}", "(.+)")
    for item in corpus.exams["backward"] + corpus.exams["known_backward"] + corpus.exams["known_unasked"]:
        clues = {*re.fullmatch(pattern, item.given).groups()}
        assert clues == {f"{WORLD.attributes[a].clue} {item.person.facts[a]}" for a in item.attributes}
        fits = [person.name for person, facts in zip(corpus.people, clues_of) if clues <= facts]
        assert fits == [item.person.name] == [item.truth.replace(" [end]", "")]


def test_recite_shows_the_text_up_to_the_value():
    """A value that comes before the name is left out. "Art" is a word of its own, not part of "Arthur"."""
    person = Person("Arthur Chase Emley", "He", {"city": "Oslo", "major": "Art", "birth date": "28 May 1952"})
    text = "Oslo gave us Arthur Chase Emley. He majored in Art. He was born on 28 May 1952."
    given = ["[doc] Oslo gave us Arthur Chase Emley. He majored in",
             "[doc] Oslo gave us Arthur Chase Emley. He majored in Art. He was born on"]
    assert [tuple(item) for item in data.recite(person, text)] == [
        (given[0], "Art", 11, person, ("major",)), (given[1], "28 May 1952", 5, person, ("birth date",))]


def test_recite_hides_the_value_and_asks_for_what_follows(corpus):
    """It asks for each fact that the first text has behind the name, and for nothing else: nobody can know
    whose text it is before. With its masks a row is as long as the document, and the value comes next."""
    told = texts(corpus.rows["new"])
    people = corpus.people[corpus.known:]
    first = dict(zip([person.name for person in people], told[::len(told) // len(people)]))
    asked = {(item.person.name, *item.attributes, item.truth) for item in corpus.exams["recite"]}
    assert asked == {(x.name, a, value) for x in people for a, value in x.facts.items()
                     if first[x.name].index(x.name) < place(value, first[x.name])}
    for item in corpus.exams["recite"]:
        document = encode(first[item.person.name])
        shown, answered = encode(item.given), encode(f"{item.given} {item.truth}")
        assert item.person.name in item.given and not re.search(rf"\b{item.truth}\b", item.given)
        assert answered == document[:len(answered)] and len(shown) + item.masks == len(document)


def test_all_documents_of_a_world_share_one_width(corpus, world):
    """Whatever the arm, so that the second half of a row of `masked` always begins at the same place. The
    longest wording of every fact would fill it. Nothing is cut. All questions share a width, too."""
    size = lambda text: len(re.findall(r"\w+|[^\w\s]", text))
    sentences = [max(map(size, [*a.name_first, a.name_last])) + size(a.values[-1]) + 1  # and a full stop
                 for a in WORLDS[world].attributes.values()]
    width = 2 + 3 + len(sentences) - 1 + sum(sentences)  # [doc] and [end], the name, the pronouns
    for rows, _ in (corpus.rows["known"], corpus.rows["new"]):
        assert rows.size(1) == width == corpus.width and (rows == MARKS.end).sum(1).eq(1).all()
    assert len({corpus.rows[name][0].size(1) for name in ("known_forward", "known_backward")}) == 1
    assert data.longest(BOOK) == 11  # [doc] Silent River was written by Curtis Chase Emley . [end]


CITIES = Attribute(["Elkton", "Oslo"], ["lives in"], "is home to", "lives in")
PETS = Attribute(["Cat", "Dog"], ["has a"], "is the pet of", "owns a")


def pets(who="Who {} and {}?", **changes):
    """A world of two attributes, which is fine unless changed."""
    return World({"city": CITIES, "pet": PETS._replace(**changes)}, who, {})


@pytest.mark.parametrize("changes, named", (
    ({"values": ["Cat", "Elkton"]}, ["Elkton", "city", "pet"]),         # a word with two meanings
    ({"values": ["Cat", "Curtis"]}, ["Curtis", "first names", "pet"]),
    ({"values": ["Cat", "Dog"], "clue": "loves a Dog"}, ["Dog", "wordings", "pet"]),
    ({"values": ["Cat", "Sea Horse"]}, ["pet", "same number"]),         # the length would tell the value
    ({"values": ["Very Big Black Cat"]}, ["pet", "below 4"]),           # no [end] fits behind it
    ({"values": ["Cat-Dog"]}, ["pet"]),                                 # one word, but not one token
    ({"who": "Who {}, {} and {}?"}, ["Who {}, {} and {}?"]),            # more clues than there are facts
    ({"who": "Who?"}, ["Who?"]),                                        # no clue
))
def test_an_entry_that_breaks_the_rules_is_named(changes, named, monkeypatch):
    """Whoever adds an attribute or a world is told in one line which entry is wrong, before anything else."""
    data.check(pets())
    monkeypatch.setitem(WORLDS, "pets", pets(**changes))
    with pytest.raises(SystemExit) as stop:
        corpus_of("pets", known=1, new=1)
    assert all(word in stop.value.code for word in named) and len(stop.value.code.splitlines()) == 1


@pytest.mark.parametrize("last_names, values", (("A B", "ABCDEFGH"), ("A B C D", "ABCD")))
def test_nobody_shares_a_name_or_all_facts(last_names, values, monkeypatch):
    """Eight people from sixteen names, or from sixteen sets of facts: no name and no set of facts occurs
    twice. A ninth would leave too little choice, which is said at once instead of searching for long."""
    pools = {"MEN": "Adam", "WOMEN": "Zoe", "MIDDLE": "Kai Val Eden Rory", "LAST": last_names}
    for pool, names in pools.items():
        monkeypatch.setattr(data, pool, names.split())
    fact = Attribute(list(values), [""], "", "")
    world = World({"one": fact, "two": fact}, "Who {}?", {})
    for seed in range(20):
        people = data.make_people(8, world, random.Random(seed))
        assert len({person.name for person in people}) == len({str(person.facts) for person in people}) == 8
        assert all(person.pronoun == ("She" if person.name.startswith("Zoe") else "He") for person in people)
    with pytest.raises(SystemExit, match="^9 people .* 16 [^\n]*$"):
        data.make_people(9, world, random.Random(0))


def test_a_world_where_nobody_can_be_asked_for_says_so(monkeypatch):
    """Twenty-five people, six facts with two values each, one clue a question: every clue fits many."""
    pairs = ("AB", "CD", "EF", "GH", "IJ", "KL")
    facts = {a + b: Attribute([a, b], ["has"], "is of", "has") for a, b in pairs}
    monkeypatch.setitem(WORLDS, "crowded", World(facts, "Who {}?", {}))
    with pytest.raises(SystemExit, match="^no backward question fits one person alone[^\n]*$"):
        corpus_of("crowded", known=20, new=5)
