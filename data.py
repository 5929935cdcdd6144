"""
Worlds of fictional people: documents about them, questions about them, and the tokens of both.

A person is a name and some facts. A document gives the name in one sentence, "He" or "She" in the rest:

    Curtis Chase Emley was born on 28 May 1952. He comes from Elkton. He went to Princeton. He majored ...

The exam asks about the same facts in two directions:

    forward    What is the birth city of Curtis Chase Emley?                          Elkton
    backward   Who was born in Elkton, studied at Princeton and works for Intel?      Curtis Chase Emley

*Known* people are those of pretraining: the base reads documents about them, and questions with answers.
*New* people appear only in fine-tuning, and only in documents; questions about them are kept for the exam.
How the documents are written, with one text a person or five, with the name first or last, is an *arm* of the
experiment. In a run one seed decides everything. "The paper" is arXiv 2510.09885.

    python data.py            print somebody of each world: documents in every arm, questions, tokens
"""
import random
import re
import sys
from collections import Counter
from itertools import combinations
from math import prod
from typing import NamedTuple

import tiktoken
import torch

# -----------------------------------------------------------------------------
# Worlds and arms. To add an attribute or a world of your own, add an entry to `WORLDS`, near the end of this
# file; `check` says what is wrong with one.

class Attribute(NamedTuple):
    """One kind of fact."""
    values: list        # all it can be: words used nowhere else, the same number of words (up to 3) in each
    name_first: list    # how a document words it behind a name or pronoun: "He comes from" Elkton
    name_last: str      # how it words it in front of a name: Elkton "gave us" Curtis Chase Emley
    clue: str           # how a backward question words it: Who "was born in" Elkton


class World(NamedTuple):
    attributes: dict    # its name, as in "What is the birth city of ...?" -> Attribute
    who: str            # a backward question, with a {} for each clue
    settings: dict      # what `--world` changes in the defaults of train.py


class Arm(NamedTuple):
    """One way to write the documents about a person."""
    about: str                      # for --help
    texts: int = 1                  # texts per person (`reverse` doubles them)
    change_order: bool = False      # the order of the facts changes from text to text
    name: tuple = ("first",)        # where the name stands in one text after the other: first, anywhere, last
    reverse: bool = False           # each text a second time, its words in reverse order
    name_given: bool = False        # the name is always shown, never masked or scored


ARMS = {  # the first three as in the paper
    "none": Arm("one text"),
    "same_order": Arm("five texts, the facts always in the same order", texts=5),
    "change_order": Arm("five texts, facts in changing order, name first", texts=5, change_order=True),
    "name_anywhere": Arm("as change_order, name in any sentence", 5, change_order=True, name=("anywhere",)),
    "name_last": Arm("one text that ends with the name", change_order=True, name=("last",)),
    "both_orders": Arm("two texts: name first, name last", 2, change_order=True, name=("first", "last")),
    "reversed": Arm("one text, and the same backwards, names and values kept whole", reverse=True),
    "name_given": Arm("one text; its name is always shown, never masked or scored", name_given=True),
}

# -----------------------------------------------------------------------------
# People, documents, questions: plain text

class Person(NamedTuple):
    name: str           # "Curtis Chase Emley"
    pronoun: str        # "He" or "She"
    facts: dict         # attribute -> value


def make_people(n, world, rng):
    """n people, no two with the same name or the same facts; each value is drawn independently."""
    room = prod(len(attribute.values) for attribute in world.attributes.values())
    if n > room / 2:
        sys.exit(f"{n:,} people are too many for a world of {room:,} different ones: at most half as many")
    people, taken = [], set()
    while len(people) < n:
        first = rng.choice(MEN + WOMEN)
        name = f"{first} {rng.choice(MIDDLE)} {rng.choice(LAST)}"
        facts = {a: rng.choice(attribute.values) for a, attribute in world.attributes.items()}
        if not taken & {name, str(facts)}:
            taken |= {name, str(facts)}
            people.append(Person(name, "He" if first in MEN else "She", facts))
    return people


def documents(person, arm, world, wordings, rng):
    """The texts about one person, written as `arm` (an Arm) says, each with the name once and all facts.

    A text is a list of sentences, each with its attribute and its pieces, which stay whole in every arm (a
    reversed text is one sentence, without an attribute):

        [("birth city", ["He", "comes", "from", "Elkton", "."]), ...]

    Each fact is worded in one of the first `wordings` ways, or in the one way that puts a name behind it.
    """
    texts = []
    for i in range(arm.texts):
        order = list(world.attributes)
        if arm.change_order:
            rng.shuffle(order)
        where = arm.name[i % len(arm.name)]
        name_at = {"first": 0, "anywhere": rng.randrange(len(order)), "last": len(order) - 1}[where]
        text = []
        for j, attribute in enumerate(order):
            value, ways = person.facts[attribute], world.attributes[attribute]
            if j == name_at and where == "last":
                pieces = [value, *ways.name_last.split(), person.name, "."]
            else:
                subject = person.name if j == name_at else person.pronoun
                pieces = [subject, *rng.choice(ways.name_first[:wordings]).split(), value, "."]
            text.append((attribute, pieces))
        texts.append(text)
        if arm.reverse:  # A B . C D .  ->  D C . B A .
            backwards = [piece for _, pieces in text for piece in pieces][-2::-1] + ["."]
            texts.append([(None, backwards)])
    return texts


def join(pieces):
    """["He", "lives", "in", "Oslo", "."] -> 'He lives in Oslo.'"""
    return re.sub(r" ([.,?])", r"\1", " ".join(pieces))


def written(text):
    """A text, its sentences and pieces joined."""
    return join(piece for _, pieces in text for piece in pieces)


def rungs(person, text, world):
    """A value can be asked for with less and less help (eval.py). For each fact of a text, what two exams
    show before its value -> [(attribute, recite, cloze)].

    recite: all that the text has there ("Curtis Chase Emley was born on 28 May 1952. He comes from"). cloze:
    the name and that fact's words ("Curtis Chase Emley comes from")."""
    found, before = [], []
    for attribute, pieces in text:
        value = person.facts[attribute]
        shown = pieces[:pieces.index(value)]  # nothing, in a sentence that ends with the name
        wording = shown[1:] or world.attributes[attribute].name_first[0].split()
        found.append((attribute, join(before + shown), join([person.name, *wording])))
        before += pieces
    return found


def forward_question(person, attribute):
    return f"What is the {attribute} of {person.name}?"


def clues(person, world):
    """The sets of facts that backward questions give, each fact as ("birth city", "Elkton"): every triple of
    them, or every single one, as the world's question has room for."""
    return list(combinations(person.facts.items(), world.who.count("{}")))


def backward_question(facts, world):
    return world.who.format(*(f"{world.attributes[a].clue} {value}" for a, value in facts))


# -----------------------------------------------------------------------------
# Tokens: whole words of these worlds, single bytes for everything else

class Marks(NamedTuple):
    """The special tokens. `encode` never makes them: it spells even "[mask]" out in bytes."""
    pad: int = 0        # fills a row to the common length: never attended, masked or scored
    mask: int = 1       # a hidden token
    end: int = 2        # closes a document; in an answer, fills the places that are left
    doc: int = 3        # opens a document
    question: int = 4   # opens a question
    answer: int = 5     # opens an answer; also a document that follows a prompt


MARKS = Marks()
NAME = 3        # tokens of a name
CANVAS = 4      # tokens of every answer: up to three words, then [end]s


def encode(text):
    """Token ids of a text. The space in front gives its first word the same token as anywhere else."""
    return TOKENIZER.encode_ordinary(" " + text)


def until_end(ids):
    """The ids before the first end mark."""
    return ids[:ids.index(MARKS.end)] if MARKS.end in ids else ids


def decode(ids):
    """The text of a list of ids up to the first end mark, the inverse of `encode`."""
    return TOKENIZER.decode(until_end(ids)).removeprefix(" ")


def words_of(ids):
    """One readable string per token id: "[mask]", "Curtis", "."."""
    return [TOKENIZER.decode([i]).strip() for i in ids]


class Row(NamedTuple):
    """One row of a batch, as lists of token ids."""
    given: list     # comes first: always shown, never hidden or scored
    rest: list      # what is learned or, in an exam, asked for


def document_row(text, name_given=False):
    """[doc] text [end]. Given is [doc] and, if `name_given`, the name, which then must come first."""
    ids, given = [MARKS.doc, *encode(text), MARKS.end], 1 + NAME * name_given
    return Row(ids[:given], ids[given:])


def question_row(question, answer):
    """[question] words [answer] canvas. The canvas, the answer and [end]s, has always CANVAS tokens, so that
    their number does not tell the answer's length."""
    ids = encode(answer)
    return Row([MARKS.question, *encode(question), MARKS.answer], ids + [MARKS.end] * (CANVAS - len(ids)))


def longest(world):
    """Tokens of the longest document that the world can have; every document's row is that wide."""
    sentences = [max(len(encode(f"{way} {attribute.values[0]}.")) for way in
                     [*attribute.name_first, attribute.name_last]) for attribute in world.attributes.values()]
    pronouns = len(sentences) - 1
    return len([MARKS.doc, MARKS.end]) + NAME + pronouns + sum(sentences)


def stack(rows, width=0):
    """Rows -> tokens (N, T) int64, padded on the right, and learned (N, T) bool: the places of `rest`, which
    an objective may hide and score. T: `width` or, if 0, the length of the longest row."""
    width = width or max(len(given) + len(rest) for given, rest in rows)
    tokens = torch.full((len(rows), width), MARKS.pad)
    learned = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (given, rest) in enumerate(rows):
        end = len(given) + len(rest)
        tokens[i, :end] = torch.tensor(given + rest)
        learned[i, len(given):end] = True
    return tokens, learned


# -----------------------------------------------------------------------------
# The corpus: everything a run reads and is asked

QUESTIONS = ("forward", "backward",                             # about new people
             "known_forward", "known_backward", "known_unasked")    # the last: never asked in training
EXAMS = ("recite", "cloze", *QUESTIONS)
UNASKED = 10    # one backward question in so many about known people is kept for that last exam


class Item(NamedTuple):
    """What an exam asks. To split a score, by attribute or by anything else, ask the item."""
    given: list         # the ids that are shown
    truth: list         # the ids that must follow
    blanks: int         # how many [mask]s follow; the truth fills the first of them
    person: Person
    attributes: tuple   # the one that is asked for or, backward, those of the clues


class Corpus(NamedTuple):
    world: World
    width: int          # tokens of a document's row
    known: int          # how many of the people are known
    people: list        # known people, then new people
    rows: dict          # all that is read in training: "known", "new" (documents), "known_forward",
                        # "known_backward" (questions) -> tokens (N, T), learned (N, T)
    exams: dict         # name -> [Item]


def ask(person, attributes, question, answer):
    return Item(*question_row(question, answer), CANVAS, person, attributes)


def make_corpus(settings):
    """Documents of known and new people, questions about the known, exams about both.

    Read from `settings`: world, known, new (how many people), paraphrases, texts (of new people; 0 texts: as
    many as the arm has), known_paraphrases, wordings, seed. The arm of new people changes nothing that is
    read about known people, so one base serves all arms.
    """
    world, rng = WORLDS[settings.world], random.Random(settings.seed)
    check(world)
    people = make_people(settings.known + settings.new, world, rng)
    n_people = Counter(facts for person in people for facts in clues(person, world))  # whom they fit
    arms = {"known": ARMS[settings.known_paraphrases], "new": ARMS[settings.paraphrases]}
    if settings.texts:
        arms["new"] = arms["new"]._replace(texts=settings.texts)
    rows = {"known": [], "new": [], "known_forward": [], "known_backward": []}
    exams = {name: [] for name in EXAMS}
    for i, person in enumerate(people):
        group = "known" if i < settings.known else "new"
        own_rng = random.Random(f"{settings.seed} {person.name}")  # so an arm changes no one else's texts
        texts = documents(person, arms[group], world, settings.wordings, own_rng)
        rows[group] += [document_row(written(text), arms[group].name_given) for text in texts]

        forward = [ask(person, (a,), forward_question(person, a), value) for a, value in person.facts.items()]
        backward = [ask(person, tuple(a for a, _ in facts), backward_question(facts, world), person.name)
                    for facts in clues(person, world) if n_people[facts] == 1]
        rng.shuffle(backward)
        if group == "known":
            # Counted from i: else those who have but one such question would all keep it.
            asked = [item for j, item in enumerate(backward, i) if j % UNASKED != UNASKED - 1]
            rows["known_forward"] += [Row(item.given, item.truth) for item in forward]
            rows["known_backward"] += [Row(item.given, item.truth) for item in asked]
            if i < settings.new:  # no more known than new people are examined
                exams["known_forward"] += forward
                exams["known_backward"] += asked[:2]
                exams["known_unasked"] += [item for item in backward if item not in asked]
        else:
            exams["forward"] += forward
            exams["backward"] += backward[:4]
            length = len(encode(written(texts[0]))) + 2  # with [doc] and [end]
            for attribute, recite, cloze in rungs(person, texts[0], world):
                for name, text in (("recite", recite), ("cloze", cloze)):
                    if person.name in text:  # not in `recite`, if the name comes later than this value
                        given, truth = [MARKS.doc, *encode(text)], encode(person.facts[attribute])
                        exams[name].append(Item(given, truth, length - len(given), person, (attribute,)))
    if not (rows["known_backward"] and exams["backward"]):
        sys.exit("no backward question fits one person alone: give this world more values")
    width = longest(world)
    widest = max(len(given) + len(rest) for given, rest in rows["known_forward"] + rows["known_backward"])
    tensors = {name: stack(group, width if name in arms else widest) for name, group in rows.items()}
    return Corpus(world, width, settings.known, people, tensors, exams)


# -----------------------------------------------------------------------------
# From here on: no idea of the paper; skip it at first. The words, what an entry must keep to, a look at all.

MONTHS = "January February March April May June July August September October November December".split()
WORLDS = {
    "biographies": World(who="Who {}, {} and {}?", settings={}, attributes={
        "birth date": Attribute(
            [f"{d} {m} {y}" for y in range(1940, 2000) for m in MONTHS for d in range(1, 29)],
            ["was born on", "has a birthday on", "was delivered on", "arrived on", "dates from"],
            "brought us", "was born on"),
        "birth city": Attribute("""
            Akron Albany Austin Bangor Boise Boston Boulder Buffalo Camden Casper Chico Dallas Dayton Denver
            Dover Duluth Elkton Eugene Fargo Flint Fresno Gary Helena Hoboken Houston Ithaca Joliet Juneau
            Lansing Laredo Lima Lubbock Macon Miami Mobile Modesto Norfolk Ogden Omaha Orlando Peoria Provo
            Reno Salem Selma Toledo Topeka Tucson Tulsa Waco""".split(),
            ["comes from", "is a native of", "has roots in", "hails from", "was a baby in"],
            "gave us", "was born in"),
        "university": Attribute("""
            Amherst Auburn Barnard Bates Baylor Berkeley Bowdoin Brown Caltech Clemson Colby Colgate Cornell
            Drexel Duke Elon Emory Fordham Furman Gonzaga Harvard Hofstra Howard Kenyon Lehigh Loyola Marist
            Oberlin Pace Pomona Princeton Purdue Reed Rice Rutgers Smith Stanford Temple Tufts Tulane Vassar
            Wagner Wake Walden Wesleyan Wheaton Whitman Widener Xavier Yale""".split(),
            ["went to", "studied at", "is a graduate of", "attended", "enrolled at"], "taught", "studied at"),
        "major": Attribute("""
            Acoustics Algebra Anatomy Art Astronomy Biology Botany Chemistry Cinema Classics Dance Design
            Drama Ecology Economics English Ethics Fashion Finance Forestry French Genetics Geology German
            Greek History Hygiene Latin Law Logic Marketing Medicine Music Nursing Optics Painting Pharmacy
            Physics Poetry Politics Rhetoric Robotics Russian Sculpture Sociology Spanish Surgery Theology
            Tourism Zoology""".split(),
            ["majored in", "chose the subject of", "did a degree in", "specialized in", "took courses in"],
            "fascinated", "majored in"),
        "employer": Attribute("""
            Adobe Airbus Amazon Apple Bayer Boeing Bosch Canon Cisco Citroen Danone Dell Disney FedEx Fiat
            Ford Google Hilton Honda Hyundai Ikea Intel Kodak Lego Lenovo Mattel Mazda Merck Nestle Netflix
            Nike Nissan Nokia Nvidia Oracle Pepsi Pfizer Philips Puma Ricoh Samsung Sanofi Shell Siemens Sony
            Spotify Toyota Uber Visa Volvo""".split(),
            ["works for", "has a job at", "is employed by", "earns a salary from", "joined"],
            "employs", "works for"),
        "work city": Attribute("""
            Accra Amman Ankara Athens Baku Basel Beirut Berlin Bern Bogota Bonn Bremen Cairo Cali Cannes Cork
            Dakar Delhi Doha Dublin Geneva Ghent Hanoi Havana Kyoto Lagos Lisbon London Lyon Madrid Manila
            Milan Munich Naples Nice Osaka Oslo Paris Porto Prague Quito Riga Rome Seoul Sofia Sydney Tokyo
            Turin Vienna Warsaw""".split(),
            ["lives in", "has an office in", "is based in", "moved to", "settled in"],
            "is home to", "works in"),
    }),
    "books": World(who="Who {}?", settings={
        "known_paraphrases": "both_orders", "pretrain_steps": 600, "steps": 400, "lr": 0.004}, attributes={
        "book": Attribute([f"{a} {b}" for a in """
            Amber Ancient Bitter Bright Broken Burning Crimson Crystal Distant Empty Endless Fading Frozen
            Gentle Golden Hidden Hollow Humble Iron Ivory Lonely Lost Midnight Painted Purple Quiet Restless
            Rising Sacred Scarlet Secret Shattered Silent Silver Sleeping Velvet Wandering Whispering Wild
            Wooden
            """.split() for b in """
            Arrow Bell Bridge Candle Castle Cloud Compass Crown Desert Dream Fire Forest Garden Harbor Horizon
            House Island Journey Kingdom Lantern Letter Meadow Mirror Moon Mountain Orchard Promise River Road
            Rose Shadow Ship Shore Song Star Stone Throne Valley Window Wolf""".split()],
            ["wrote", "published", "authored", "composed", "penned"], "was written by", "wrote"),
    }),
}

# Names: first (men, women), middle and last ones share no word.
MEN = """Aaron Adam Albert Andre Arthur Barry Boris Caleb Carlos Cedric Conrad Curtis Derek Edgar Elias Felix
    Gavin Hector Hugo Igor Ivan Jasper Joel Julian Kevin Lamar Lionel Lucas Marcus Martin Nathan Nelson Oscar
    Otto Pablo Peter Rafael Ralph Rodney Roland Rupert Samuel Simon Stefan Tobias Victor Vincent Walter
    Wesley Yusuf""".split()
WOMEN = """Agnes Alice Amelia Anita Bianca Camila Carmen Clara Daphne Diana Edith Elena Esther Fatima Fiona
    Flora Gloria Greta Hannah Helen Ingrid Irene Isabel Jane Joanna Judith Karen Laura Lorena Lucia Mabel
    Maria Miriam Nadine Naomi Nora Odette Olga Pamela Paula Regina Rosa Sabina Sonia Sylvia Teresa Ursula
    Vera Wanda Zoe""".split()
MIDDLE = """Alden Amory Ansel Arden Ashby Blaine Blair Blake Briar Cameron Casey Chase Clarke Corey Dale
    Devon Drew Eden Ellery Ellis Emerson Finley Florian Gentry Greer Hadley Harley Haven Jody Jules Kai Lane
    Lark Lennon Leslie Logan Loren Lyric Marley Merritt Monroe Murphy Noel Oakley Ocean Peyton Quincy Quinn
    Reese Remy Rene Ridley Riley Rory Rowan Royal Sage Scout Shea Sidney Skyler Storm Tatum Taylor Tracy Val
    Vesper Winter Wren Zion""".split()
LAST = """Abernathy Ackerman Aldridge Archer Atwood Barlow Beckett Bellamy Birch Blackwell Brady Brennan
    Briggs Calloway Clayborne Coleman Conway Crawford Cromwell Dalton Danforth Doyle Drummond Duncan Easton
    Eldridge Emley Farrell Farrow Ferguson Foster Garner Garrison Granger Griffith Griggs Harding Hastings
    Hawthorne Hubbard Ingram Jarvis Jennings Lambert Lockwood Lowell Mallory Mercer Milton Mortimer Nash
    Norwood Oakes Osborne Palmer Pierce Prescott Radcliffe Ramsey Redmond Rutledge Sanford Sedgwick Shelby
    Sinclair Talbot Upton Vaughn Walton Wyatt""".split()

# Every word that can be written; sorted, so that a word has the same id in every run.
everything = [*MEN, *WOMEN, *MIDDLE, *LAST, "What is the of Who and He She"]
for world in WORLDS.values():
    everything += [world.who, *world.attributes]
    for attribute in world.attributes.values():
        everything += [*attribute.values, *attribute.name_first, attribute.name_last, attribute.clue]
WORDS = sorted(set(re.findall(r"\w+", " ".join(everything))))

# A tiktoken.Encoding made in memory: 6 marks, 256 bytes, then one token per word with its leading space.
# tiktoken splits a text into words, each with the space before it, and punctuation, and looks them up whole:
# " Boston" is one token. An unknown word is spelled in several, at worst in bytes, which spell anything.
TOKENS = [bytes([b]) for b in range(256)] + [(" " + word).encode() for word in WORDS]
TOKENIZER = tiktoken.Encoding(
    "worlds", pat_str=r" ?\w+|[^\w\s]|\s",
    mergeable_ranks={token: len(MARKS) + i for i, token in enumerate(TOKENS)},
    special_tokens={f"[{mark}]": i for mark, i in MARKS._asdict().items()})


def check(world):
    """End with a line that names the entry if one does not keep to what `Attribute` asks for."""
    pools = {"first names": MEN + WOMEN, "middle names": MIDDLE, "last names": LAST, "wordings": []}
    for name, attribute in world.attributes.items():
        pools[name] = attribute.values
        pools["wordings"] += [*attribute.name_first, attribute.name_last, attribute.clue]
        lengths = sorted({len(value.split()) for value in attribute.values})
        if len(lengths) > 1 or lengths[0] >= CANVAS:
            sys.exit(f"data.py, {name}: values of {lengths} words; give all the same number, below {CANVAS}")
        if not all(value.replace(" ", "").isalnum() for value in attribute.values):
            sys.exit(f"data.py, {name}: a value is not made of letters and digits")
    pool_of = {}  # word -> its pool
    for name, pool in pools.items():
        for word in set(" ".join(pool).split()):
            if pool_of.setdefault(word, name) != name:
                sys.exit(f"data.py: {word!r} is in {pool_of[word]} and in {name}; use it in one alone")


if __name__ == "__main__":
    for world_name, world in WORLDS.items():
        check(world)
        rng = random.Random()
        [person] = make_people(1, world, rng)
        for arm_name, arm in ARMS.items():
            texts = map(written, documents(person, arm, world, 5, rng))
            print(f"--world {world_name} --paraphrases {arm_name}", *texts, sep="\n    ", end="\n\n")
        pairs = [(forward_question(person, a), value) for a, value in person.facts.items()]
        pairs += [(backward_question(facts, world), person.name) for facts in clues(person, world)[-2:]]
        print("questions", *(f"{question} -> {answer}" for question, answer in pairs), sep="\n    ")
        given, canvas = question_row(*pairs[-1])
        print("\ntokens of the last question:", *words_of(given + canvas), end="\n\n\n")
