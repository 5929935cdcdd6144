"""
Worlds of fictional people: documents about them, questions about them, and the tokens of both.

A person is a name and some facts. A document gives the name in one sentence, "He" or "She" in the rest:

    Maria Reese Hubbard has a birthday on 18 December 1970. She is a native of Tucson. She is a graduate of
    Berkeley. She took courses in Drama. She is employed by Siemens. She moved to Lagos.

The exam asks about the same facts in two directions:

    forward    What is the work city of Maria Reese Hubbard?                       Lagos
    backward   Who was born in Tucson, majored in Drama and works in Lagos?        Maria Reese Hubbard

*Known* people are those of pretraining: the base reads documents about them, and questions with answers.
*New* people appear only in fine-tuning, and only in documents; questions about them are kept for the exam.
How the documents are written, with one text a person or five, with the name first or last, is an *arm* of the
experiment. In a run one seed decides everything. "The paper" is arXiv 2510.09885.

    python data.py            print some people of each world: documents, questions, and all arms
"""
import random
import re
import sys
from argparse import Namespace
from collections import Counter
from itertools import combinations
from math import prod
from typing import NamedTuple

import tiktoken
import torch

# --- Worlds and arms. For an attribute or a world of your own, add an entry to `WORLDS`, further down.

class Attribute(NamedTuple):
    """One kind of fact."""
    values: list        # all it can be: words used nowhere else, the same number of words (up to 3) in each
    name_first: list    # wordings of a sentence that begins with a name or pronoun: She "moved to" Lagos
    name_last: str      # the wording of one that ends with the name: Lagos "is home to" Maria Reese Hubbard
    clue: str           # how a backward question words it: Who "works in" Lagos


class World(NamedTuple):
    attributes: dict    # its name, as in "What is the birth city of ...?" -> Attribute
    who: str            # the template of a backward question, with a {} for each clue
    settings: dict      # what `--world` changes in the defaults of train.py


class Arm(NamedTuple):
    """One way to write the documents about a person."""
    about: str                      # for --help
    texts: int = 1                  # texts a person
    change_order: bool = False      # the facts are shuffled anew for each text
    name: tuple = ("first",)        # where the name stands, in one text after the other


ARMS = {  # the first three as in the paper
    "none": Arm("one text"),
    "same_order": Arm("five texts, the facts always in the same order", texts=5),
    "change_order": Arm("five texts, facts in changing order, name first", texts=5, change_order=True),
    "name_anywhere": Arm("as change_order, name in any sentence", 5, change_order=True, name=("anywhere",)),
    "name_last": Arm("one text that ends with the name", change_order=True, name=("last",)),
    "both_orders": Arm("six texts: name first, name last in turn", 6, change_order=True,
                      name=("first", "last")),
}

# --- People, documents, questions: plain text

class Person(NamedTuple):
    name: str           # "Maria Reese Hubbard"
    pronoun: str        # "He" or "She"
    facts: dict         # attribute -> value


def make_people(n, world, seed):
    """n people, no two with the same name or the same facts. Each value is drawn independently, and those of
    each attribute by a generator of their own. So an attribute that you add leaves the others as they were,
    unless two lives had been equal."""
    n_facts = prod(len(attribute.values) for attribute in world.attributes.values())
    room = min(n_facts, len(MEN + WOMEN) * len(MIDDLE) * len(LAST))
    if n > room / 2:
        sys.exit(f"{n:,} people are too many for a world of {room:,} different ones: at most half as many")
    rng = {a: random.Random(f"{seed} {a}") for a in ["name", *world.attributes]}
    pronouns, lives = {}, {}  # dicts keep their order and hold no name and no life twice
    while len(pronouns) < n:
        first = rng["name"].choice(MEN + WOMEN)
        name = f"{first} {rng['name'].choice(MIDDLE)} {rng['name'].choice(LAST)}"
        pronouns[name] = "He" if first in MEN else "She"
    while len(lives) < n:
        facts = {a: rng[a].choice(attribute.values) for a, attribute in world.attributes.items()}
        lives[str(facts)] = facts
    return [Person(name, pronoun, facts) for (name, pronoun), facts in zip(pronouns.items(), lives.values())]


def documents(person, arm, world, rng):
    """The texts about one person, written as `arm` (an Arm) says, each with the name once and all facts. For
    each fact one of its wordings is drawn. For the one that ends with the name there is only `name_last`."""
    texts = []
    for i in range(arm.texts):
        order = list(world.attributes)
        if arm.change_order:
            rng.shuffle(order)
        where = arm.name[i % len(arm.name)]
        if where == "first":  # which sentence has the name?
            named = 0
        elif where == "last":
            named = len(order) - 1
        else:
            named = rng.randrange(len(order))
        sentences = []
        for j, attribute in enumerate(order):
            value, ways = person.facts[attribute], world.attributes[attribute]
            if j == named and where == "last":
                sentences.append(f"{value} {ways.name_last} {person.name}.")
            else:
                subject = person.name if j == named else person.pronoun
                sentences.append(f"{subject} {rng.choice(ways.name_first)} {value}.")
        texts.append(" ".join(sentences))
    return texts


def forward_question(person, attribute):
    return f"What is the {attribute} of {person.name}?"


def clues(person, world):
    """The sets of facts that backward questions give, each fact as ("work city", "Lagos"): all sets of n
    facts, if the template of the question has room for n."""
    return list(combinations(person.facts.items(), world.who.count("{}")))


def backward_question(facts, world):
    return world.who.format(*(f"{world.attributes[a].clue} {value}" for a, value in facts))


# --- Tokens: marks, whole words of these worlds, single bytes for everything else

class Marks(NamedTuple):
    """The special tokens. In a text they stand in brackets: "[doc] He lives in Oslo. [end]"."""
    pad: int = 0        # fills a row to the common length
    mask: int = 1       # stands for a hidden token
    end: int = 2        # closes a document; in an answer, fills the places that are left
    doc: int = 3        # opens a document
    question: int = 4   # opens a question
    answer: int = 5     # opens an answer


MARKS = Marks()
CANVAS = 4  # tokens of every answer: up to three words, then [end]s


def encode(text):
    """The token ids of a text. The space before a word or a mark belongs to its token. So that the first word
    has the same token as anywhere else, it gets a space, too."""
    return TOKENIZER.encode("".join(f" {word}" for word in text.split()), allowed_special="all")


def decode(ids):
    """The text of a list of ids, the inverse of `encode`."""
    return TOKENIZER.decode(ids).removeprefix(" ")


# A row is two texts: what is given, which is always shown and never hidden or scored, and what is learned.

def document_row(text):
    return "[doc]", f"{text} [end]"


def question_row(question, answer):
    """The answer and the [end]s behind it always fill CANVAS tokens, so that the number of [mask]s in an exam
    does not tell the answer's length."""
    return f"[question] {question} [answer]", answer + " [end]" * (CANVAS - len(encode(answer)))


def stack(rows, width=0):
    """Rows -> tokens (B, T) int64, padded on the right, and learned (B, T) bool: the places that an objective
    may hide and score. T is `width` or, if that is 0, the length of the longest row."""
    ids = [(encode(given), encode(rest)) for given, rest in rows]
    width = width or max(len(given + rest) for given, rest in ids)
    tokens = torch.full((len(rows), width), MARKS.pad)
    learned = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (given, rest) in enumerate(ids):
        tokens[i, :len(given + rest)] = torch.tensor(given + rest)
        learned[i, len(given):len(given + rest)] = True
    return tokens, learned


def longest(world):
    """As many tokens as any document of a world can have. All documents are padded to it, so that the
    response of `masked`, which follows a document, begins at one position in training and exam."""
    sentences = [max(len(encode(f"{way} {attribute.values[0]}.")) for way in
                     [*attribute.name_first, attribute.name_last]) for attribute in world.attributes.values()]
    n_pronouns = len(sentences) - 1
    return len(encode(f"[doc] {MEN[0]} {MIDDLE[0]} {LAST[0]} [end]")) + n_pronouns + sum(sentences)


# --- The corpus: everything that a run reads and is asked

QUESTIONS = ("forward", "backward",                                 # about new people
             "known_forward", "known_backward", "known_unasked")    # the last: never asked in training
EXAMS = ("recite", *QUESTIONS)
UNASKED = 10    # one backward question in so many about known people is kept out of training


class Item(NamedTuple):
    """What an exam asks. To split a score by something of it, see `exam` in eval.py."""
    given: str          # what is shown, up to the first [mask]
    truth: str          # what must follow; of a question all of the canvas, "Lagos [end] [end] [end]"
    masks: int          # [mask]s behind what is given: as many as the truth has tokens, in `recite` more
    person: Person
    attributes: tuple   # the one that is asked for or, backward, those of the clues


class Corpus(NamedTuple):
    world: World
    width: int          # tokens of a document's row
    known: int          # how many of the people are known
    people: list        # known people, then new people
    rows: dict          # all that is read in training: "known" and "new" (documents), "known_forward" and
                        # "known_backward" (questions); each a pair: tokens (N, T), learned (N, T)
    exams: dict         # name -> [Item]


def make_corpus(settings):
    """Documents of known and new people, questions about the known, exams about both. Read from `settings`:
    world, known, new (how many people), paraphrases, texts (of new people; 0 texts: as many as the arm has),
    known_paraphrases, seed."""
    world, rng = WORLDS[settings.world], random.Random(settings.seed)
    check(world)
    people = make_people(settings.known + settings.new, world, settings.seed)
    how_many_fit = Counter(facts for person in people for facts in clues(person, world))  # of all people
    known_arm, new_arm = ARMS[settings.known_paraphrases], ARMS[settings.paraphrases]
    if settings.texts:
        new_arm = new_arm._replace(texts=settings.texts)
    rows = {"known": [], "new": [], "known_forward": [], "known_backward": []}
    exams = {name: [] for name in EXAMS}
    for i, person in enumerate(people):
        # Everybody has a generator of their own, so that one base serves all arms: from a common one an arm
        # of more texts would draw more numbers, and so change the texts of all people after.
        own_rng = random.Random(f"{settings.seed} {person.name}")
        texts = documents(person, known_arm if i < settings.known else new_arm, world, own_rng)
        forward = [Item(*question_row(forward_question(person, a), value), CANVAS, person, (a,))
                   for a, value in person.facts.items()]
        backward = [Item(*question_row(backward_question(facts, world), person.name), CANVAS, person,
                         tuple(a for a, _ in facts))
                    for facts in clues(person, world) if how_many_fit[facts] == 1]
        rng.shuffle(backward)
        if i < settings.known:
            # Every tenth is kept back, in biographies 2 of a person's 20 (sets of 3 of 6 facts). The count
            # starts one higher for each person, or a world with one question a person would keep back none.
            unasked = [item for j, item in enumerate(backward, start=i + 1) if j % UNASKED == 0]
            asked = [item for item in backward if item not in unasked]
            rows["known"] += [document_row(text) for text in texts]
            rows["known_forward"] += [(item.given, item.truth) for item in forward]
            rows["known_backward"] += [(item.given, item.truth) for item in asked]
            if i < settings.new:  # no more known than new people are examined, and by a few questions each
                exams["known_forward"] += forward
                exams["known_backward"] += asked[:2]
                exams["known_unasked"] += unasked
        else:
            rows["new"] += [document_row(text) for text in texts]
            exams["recite"] += recite(person, texts[0])
            exams["forward"] += forward
            exams["backward"] += backward[:4]
    if not (rows["known_backward"] and exams["backward"]):
        sys.exit("no backward question fits one person alone: give this world more values")
    width, width_asked = longest(world), stack(rows["known_forward"] + rows["known_backward"])[0].size(1)
    tensors = {"known": stack(rows["known"], width), "new": stack(rows["new"], width),
               "known_forward": stack(rows["known_forward"], width_asked),
               "known_backward": stack(rows["known_backward"], width_asked)}
    return Corpus(world, width, settings.known, people, tensors, exams)


def recite(person, text):
    """Can a text be continued? An item a value. Given is the text up to the value, "[doc] Maria Reese Hubbard
    has a birthday on". As many [mask]s follow as the text has tokens left, and only the first, the value's
    own, are filled. A value that comes before the name is left out: nobody can know whose it is."""
    items, length = [], len(encode(f"[doc] {text} [end]"))
    for attribute, value in person.facts.items():
        before = text[:re.search(rf"\b{value}\b", text).start()]
        if person.name in before:
            given = f"[doc] {before.strip()}"
            items.append(Item(given, value, length - len(encode(given)), person, (attribute,)))
    return items


# -----------------------------------------------------------------------------
# From here on: no idea of the paper; skip it at first. The words, their tokens, a check, a demonstration.

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
        "book": Attribute([f"{a} {b} {c}" for a in """
            Amber Ancient Bitter Bright Broken Burning Crimson Crystal Distant Empty Endless Fading Frozen
            Gentle Golden Hidden Hollow Humble Iron Ivory Lonely Lost Midnight Painted Purple Quiet Restless
            Rising Sacred Scarlet Secret Shattered Silent Silver Sleeping Velvet Wandering Whispering Wild
            Wooden
            """.split() for b in """
            Autumn Bamboo Brass Bronze Cedar Cherry Clay Copper Coral Cotton Diamond Evening Feather Ginger
            Glass Granite Honey Jade Lace Leather Lemon Maple Marble Morning Mosaic Nutmeg Olive Opal Paper
            Pearl Pine Ruby Saffron Salt Sapphire Satin Silk Summer Timber Willow""".split() for c in """
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
FRAME = "What is the of Who and He She The author"  # of questions and sentences; "The author" of one control
everything = [*MEN, *WOMEN, *MIDDLE, *LAST, FRAME]
for world in WORLDS.values():
    everything += [world.who, *world.attributes]
    for attribute in world.attributes.values():
        everything += [*attribute.values, *attribute.name_first, attribute.name_last, attribute.clue]
WORDS = sorted(set(re.findall(r"\w+", " ".join(everything))))

# A tiktoken.Encoding made in memory: 6 marks, 256 bytes, then one token per word with the space before it,
# such as " Boston". An unknown word is spelled in several tokens, at worst in bytes, which spell anything.
TOKENS = [bytes([b]) for b in range(256)] + [(" " + word).encode() for word in WORDS]
TOKENIZER = tiktoken.Encoding(
    "worlds", pat_str=r" ?\w+|[^\w\s]|\s",
    mergeable_ranks={token: len(MARKS) + i for i, token in enumerate(TOKENS)},
    special_tokens={f" [{mark}]": i for mark, i in MARKS._asdict().items()})


def check(world):
    """Exit with a line that names the first entry which breaks a rule of `Attribute` or `World`."""
    if not 1 <= world.who.count("{}") <= len(world.attributes):
        sys.exit(f"data.py, {world.who!r}: give it a {{}} for each clue, at most one an attribute")
    pools = {"first names": MEN + WOMEN, "middle names": MIDDLE, "last names": LAST, "wordings": [FRAME]}
    for name, attribute in world.attributes.items():
        pools[name] = attribute.values
        pools["wordings"] += [*attribute.name_first, attribute.name_last, attribute.clue]
        lengths = {len(value.split()) for value in attribute.values}
        if len(lengths) > 1 or max(lengths) >= CANVAS:
            sys.exit(f"data.py, {name}: give all values the same number of words, below {CANVAS}")
        if not "".join(attribute.values).replace(" ", "").isalnum():
            sys.exit(f"data.py, {name}: a value is not made of letters and digits")
    pool_of = {}  # word -> its pool
    for name, pool in pools.items():
        for word in set(" ".join(pool).split()):
            other = pool_of.setdefault(word, name)  # the first pool that has this word
            if other != name:
                sys.exit(f"data.py: {word!r} is in {other} and in {name}; use it in one alone")


if __name__ == "__main__":
    for name, world in WORLDS.items():
        check(world)
        # The people of seed 0: with the defaults of train.py the first 200 are known, the next 100 new.
        known_arm = world.settings.get("known_paraphrases", "change_order")
        corpus = make_corpus(Namespace(world=name, known=200, new=100, seed=0, texts=0, paraphrases="none",
                                       known_paraphrases=known_arm))
        told = set()
        for arm_name, arm in ARMS.items():
            text = documents(corpus.people[200], arm, world, random.Random(0))[0]
            if text not in told:  # else this arm begins as another one does
                print(f"--world {name} --paraphrases {arm_name}\n    {text}")
            told.add(text)
        for kind, first, asked in (("known", 0, QUESTIONS[2:4]), ("new", 200, QUESTIONS[:2])):
            texts = [decode(row[row != MARKS.pad].tolist()) for row in corpus.rows[kind][0]]
            for person in corpus.people[first:first + 3]:
                print(f"\n{kind}:", next(text for text in texts if person.name in text))
                for exam in asked:
                    item = next(item for item in corpus.exams[exam] if item.person == person)
                    print("   ", item.given, item.truth)
        print("\n")
