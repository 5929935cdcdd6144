"""
Fictional people: their biographies, the questions about them, and the tokens of both.

A person is a name and some attributes. A document gives the name in one sentence, "He" or "She" in the rest:

    Curtis Chase Emley was born on 28 May 1952. He comes from Elkton. He went to Princeton. He majored ...

The exam asks about the same facts in two directions:

    forward    What is the birth city of Curtis Chase Emley?                          Elkton
    backward   Who was born in Elkton, studied at Princeton and works for Intel?      Curtis Chase Emley

*Known* people are those of pretraining, by default with five texts each, varied in words and order, and with
questions and answers. *New* people appear only in fine-tuning, and only in documents; questions about them
are kept for the exam. How documents are written, say one text or five per person, is an *arm* of the
experiment: `--paraphrases` for new people. One seed decides everything. "The paper" is arXiv 2510.09885.

    python data.py            print a random person: documents for every --paraphrases, questions, tokens
"""
import random
import re
from collections import Counter
from itertools import combinations
from typing import NamedTuple

import tiktoken
import torch

# -----------------------------------------------------------------------------
# The world: pools of words. First (MEN, WOMEN), middle and last names share no word.

MEN = """Aaron Adam Albert Andre Arthur Barry Boris Caleb Carlos Cedric Conrad Curtis Derek Edgar Elias Felix
    Gavin Hector Hugo Igor Ivan Jasper Joel Julian Kevin Lamar Lionel Lucas Marcus Martin Nathan Nelson Oscar
    Otto Pablo Peter Rafael Ralph Rodney Roland Rupert Samuel Simon Stefan Tobias Victor Vincent Walter Wesley
    Yusuf""".split()
WOMEN = """Agnes Alice Amelia Anita Bianca Camila Carmen Clara Daphne Diana Edith Elena Esther Fatima Fiona
    Flora Gloria Greta Hannah Helen Ingrid Irene Isabel Jane Joanna Judith Karen Laura Lorena Lucia Mabel
    Maria Miriam Nadine Naomi Nora Odette Olga Pamela Paula Regina Rosa Sabina Sonia Sylvia Teresa Ursula Vera
    Wanda Zoe""".split()
MIDDLE = """Alden Amory Ansel Arden Ashby Avery Blaine Blair Blake Bowen Briar Cameron Carey Casey Chase
    Clarke Corey Dale Dana Darcy Devon Drew Eden Ellery Ellis Emerson Finley Florian Garnet Gentry Greer
    Hadley Harley Haven Hollis Indigo Jody Jules Justice Kai Keegan Kendall Kerry Lane Lark Laurel Lennon
    Leslie Linden Logan Loren Lyric Marion Marley Merle Merritt Micah Monroe Morgan Murphy Noel Oakley Ocean
    Parker Pax Perry Peyton Piper Presley Quincy Quinn Reagan Reese Remy Rene Ridley Riley River Robin Rory
    Rowan Royal Sage Sawyer Scout Shea Shiloh Sidney Skyler Sloan Sterling Storm Tatum Taylor Tracy Val Vesper
    Winter Wren Zion""".split()
LAST = """Abernathy Ackerman Aldridge Archer Atwood Babcock Barlow Beckett Bellamy Benson Birch Blackwell
    Bradshaw Brady Brennan Briggs Calloway Carver Chandler Clayborne Coleman Conway Crawford Cromwell Dalton
    Danforth Dawson Delaney Doyle Drummond Duncan Easton Eldridge Emley Everett Fairbanks Farrell Farrow
    Fenwick Ferguson Finch Fleming Forsythe Foster Gallagher Garner Garrison Goodwin Granger Griffith Griggs
    Hammond Harding Hartley Hastings Hatch Hawthorne Holloway Hubbard Ingram Jarvis Jennings Keating Kendrick
    Kimball Lambert Langley Lawson Lockwood Lowell Maddox Mallory Mercer Milton Mortimer Nash Newell Norwood
    Oakes Osborne Palmer Pembroke Pierce Prescott Quimby Radcliffe Ramsey Redmond Rhodes Rockwell Rutledge
    Sanford Sedgwick Shelby Sinclair Talbot Upton Vaughn Walton Wyatt""".split()

MONTHS = """January February March April May June July August September October November December""".split()
POOLS = {  # attribute -> everything it can be; a birth date is 28 days x 12 months x 60 years
    "birth date": [f"{d} {m} {y}" for y in range(1940, 2000) for m in MONTHS for d in range(1, 29)],
    "birth city": """Akron Albany Austin Bangor Boise Boston Boulder Buffalo Camden Casper Chico Dallas Dayton
        Denver Dover Duluth Elkton Eugene Fargo Flint Fresno Gary Helena Hoboken Houston Ithaca Joliet Juneau
        Lansing Laredo Lima Lubbock Macon Miami Mobile Modesto Norfolk Ogden Omaha Orlando Peoria Provo Reno
        Salem Selma Toledo Topeka Tucson Tulsa Waco""".split(),
    "university": """Amherst Auburn Barnard Bates Baylor Berkeley Bowdoin Brown Caltech Clemson Colby Colgate
        Cornell Drexel Duke Elon Emory Fordham Furman Gonzaga Harvard Hofstra Howard Kenyon Lehigh Loyola
        Marist Oberlin Pace Pomona Princeton Purdue Reed Rice Rutgers Smith Stanford Temple Tufts Tulane
        Vassar Wagner Wake Walden Wesleyan Wheaton Whitman Widener Xavier Yale""".split(),
    "major": """Acoustics Algebra Anatomy Art Astronomy Biology Botany Chemistry Cinema Classics Dance Design
        Drama Ecology Economics English Ethics Fashion Finance Forestry French Genetics Geology German Greek
        History Hygiene Latin Law Logic Marketing Medicine Music Nursing Optics Painting Pharmacy Physics
        Poetry Politics Rhetoric Robotics Russian Sculpture Sociology Spanish Surgery Theology Tourism Zoology
       """.split(),
    "employer": """Adobe Airbus Amazon Apple Bayer Boeing Bosch Canon Cisco Citroen Danone Dell Disney FedEx
        Fiat Ford Google Hilton Honda Hyundai Ikea Intel Kodak Lego Lenovo Mattel Mazda Merck Nestle Netflix
        Nike Nissan Nokia Nvidia Oracle Pepsi Pfizer Philips Puma Ricoh Samsung Sanofi Shell Siemens Sony
        Spotify Toyota Uber Visa Volvo""".split(),
    "work city": """Accra Amman Ankara Athens Baku Basel Beirut Berlin Bern Bogota Bonn Bremen Cairo Cali
        Cannes Cork Dakar Delhi Doha Dublin Geneva Ghent Hanoi Havana Kyoto Lagos Lisbon London Lyon Madrid
        Manila Milan Munich Naples Nice Osaka Oslo Paris Porto Prague Quito Riga Rome Seoul Sofia Sydney Tokyo
        Turin Vienna Warsaw""".split(),
}
ATTRIBUTES = list(POOLS)

# How a document words each attribute; the subject, a name or a pronoun, is put in front. To add an attribute,
# add a line to POOLS (50 values used nowhere else), one here and one to CLUES, and raise WIDTH to fit.
WORDINGS = {
    "birth date": ["was born on {}", "has a birthday on {}", "was delivered on {}", "arrived on {}",
                   "dates from {}"],
    "birth city": ["comes from {}", "is a native of {}", "has roots in {}", "hails from {}",
                   "was a baby in {}"],
    "university": ["went to {}", "studied at {}", "is a graduate of {}", "attended {}", "enrolled at {}"],
    "major": ["majored in {}", "chose the subject of {}", "did a degree in {}", "specialized in {}",
              "read {} as a student"],
    "employer": ["works for {}", "has a job at {}", "is employed by {}", "earns a salary from {}",
                 "joined {}"],
    "work city": ["lives in {}", "has an office in {}", "is based in {}", "moved to {}", "settled in {}"],
}
CLUES = {  # how a backward question words each attribute
    "birth date": "was born on {}", "birth city": "was born in {}", "university": "studied at {}",
    "major": "majored in {}", "employer": "works for {}", "work city": "works in {}",
}


class Arm(NamedTuple):
    """One way to write the documents about a person."""
    about: str                      # for --help
    texts: int = 1                  # texts per person (`reverse` doubles them)
    change_order: bool = False      # the order of the facts changes from text to text
    name_anywhere: bool = False     # the name may come late: sentences before it say "He" or "She"
    reverse: bool = False           # each text a second time, its words in reverse order
    name_given: bool = False        # the name is always shown, never masked or scored


ARMS = {  # the first three as in the paper
    "none": Arm("one text"),
    "same_order": Arm("five texts, the facts always in the same order", texts=5),
    "change_order": Arm("five texts, facts in changing order, name first", texts=5, change_order=True),
    "name_anywhere": Arm("as change_order, name anywhere", texts=5, change_order=True, name_anywhere=True),
    "reversed": Arm("one text, and the same backwards, names and values kept whole", reverse=True),
    "name_given": Arm("one text; its name is always shown, never masked or scored", name_given=True),
}

# -----------------------------------------------------------------------------
# People, documents, questions: plain text

class Person(NamedTuple):
    name: str           # "Curtis Chase Emley"
    pronoun: str        # "He" or "She"
    facts: dict         # attribute -> value


def make_people(n, rng):
    """n people with different names, of which there are a million; each attribute is drawn independently."""
    people = {}
    while len(people) < n:
        first = rng.choice(MEN + WOMEN)
        name = f"{first} {rng.choice(MIDDLE)} {rng.choice(LAST)}"
        facts = {attribute: rng.choice(pool) for attribute, pool in POOLS.items()}
        people.setdefault(name, Person(name, "He" if first in MEN else "She", facts))
    return list(people.values())


def documents(person, arm, wordings, rng):
    """The texts about one person, written as `arm` (an Arm) says, each with the name once and all facts.

    A text is a list of pieces that stay whole: the name, a value, a word of a wording, a full stop. Each fact
    is worded in one of the first `wordings` ways.
    """
    texts = []
    for _ in range(arm.texts):
        order = rng.sample(ATTRIBUTES, len(ATTRIBUTES)) if arm.change_order else ATTRIBUTES
        name_at = rng.randrange(len(order)) if arm.name_anywhere else 0  # which sentence has the name
        pieces = []
        for i, attribute in enumerate(order):
            subject = person.name if i == name_at else person.pronoun
            before, after = rng.choice(WORDINGS[attribute][:wordings]).split("{}")
            pieces += [subject, *before.split(), person.facts[attribute], *after.split(), "."]
        texts.append(pieces)
        if arm.reverse:
            texts.append(pieces[:-1][::-1] + ["."])  # A B . C D .  ->  D C . B A .
    return texts


def join(pieces):
    """["He", "lives", "in", "Oslo", "."] -> 'He lives in Oslo.'"""
    return re.sub(r" ([.,?])", r"\1", " ".join(pieces))


def forward_questions(person):
    """[(question, value)], one per attribute, in the order of ATTRIBUTES."""
    return [(f"What is the {a} of {person.name}?", person.facts[a]) for a in ATTRIBUTES]


def triples(person):
    """The clues that backward questions give: all triples of facts, each fact as ("birth city", "Elkton")."""
    return list(combinations(person.facts.items(), 3))


def backward_questions(person, n_people):
    """[(question, name)] for the triples of facts that fit one person. n_people[triple]: how many it fits."""
    clues = [[CLUES[attribute].format(value) for attribute, value in triple]
             for triple in triples(person) if n_people[triple] == 1]
    return [(f"Who {a}, {b} and {c}?", person.name) for a, b, c in clues]


# -----------------------------------------------------------------------------
# Tokens: whole words of this world, single bytes for everything else

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
WIDTH = 48      # tokens of every document's row, whatever its arm: as many as the longest possible one has

# Every word the generator can write; sorted, so that a word has the same id in every run.
everything = str([MEN, WOMEN, MIDDLE, LAST, POOLS, WORDINGS, CLUES]) + "What is the of Who and He She"
WORDS = sorted(set(re.findall(r"\w+", everything)))

# A tiktoken.Encoding made in memory: 6 marks, 256 bytes, then one token per word with its leading space.
# tiktoken splits a text into words, each with the space before it, and punctuation, and looks them up whole:
# " Boston" is one token. An unknown word is spelled in several, at worst in bytes, which spell anything.
TOKENS = [bytes([b]) for b in range(256)] + [(" " + word).encode() for word in WORDS]
TOKENIZER = tiktoken.Encoding(
    "biographies", pat_str=r" ?\w+|[^\w\s]|\s",
    mergeable_ranks={token: len(MARKS) + i for i, token in enumerate(TOKENS)},
    special_tokens={f"[{mark}]": i for mark, i in MARKS._asdict().items()})


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


# A row is (ids, start): what comes before the start is given, the rest is learned or, in an exam, hidden.

def document_row(text, name_given=False):
    """[doc] text [end]; it starts at the text or, if the name is given, after it."""
    return [MARKS.doc, *encode(text), MARKS.end], (1 + NAME if name_given else 1)


def question_row(question, answer):
    """[question] words [answer] canvas; it starts at the canvas: the answer and [end]s, always CANVAS tokens,
    so that their number does not tell the answer's length."""
    prompt, canvas = [MARKS.question, *encode(question), MARKS.answer], encode(answer)
    assert len(canvas) < CANVAS, f"{answer!r} leaves no room for an end: raise CANVAS"
    return prompt + canvas + [MARKS.end] * (CANVAS - len(canvas)), len(prompt)


def before_value(person, pieces, value):
    """What two exams show before a value. `recite`: all that a document has there ("Curtis Chase Emley was
    born on 28 May 1952. He comes from"). `cloze`: only its last sentence, with the name ("Curtis Chase Emley
    comes from")."""
    recite = join(pieces[:pieces.index(value)])
    return recite, recite.split(". ")[-1].replace(f"{person.pronoun} ", f"{person.name} ")


def value_row(shown, value, length):
    """For exams: [doc] shown value, then [mask]s for the rest of the document; it starts at the value."""
    given = [MARKS.doc, *encode(shown)]
    ids = given + encode(value)
    return ids + [MARKS.mask] * (length - len(ids)), len(given)


def pad(rows, width=0):
    """Lists of ids -> (N, T) int64 tokens, padded on the right. T: `width` or, if 0, that of the longest."""
    longest = max(map(len, rows))
    assert not width or longest <= width, f"a document has {longest} tokens: raise WIDTH"
    return torch.tensor([ids + [MARKS.pad] * ((width or longest) - len(ids)) for ids in rows])


# -----------------------------------------------------------------------------
# The corpus: everything a run reads and is asked

EXAMS = ("recite", "cloze", "forward", "backward",              # about new people
         "known_forward", "known_backward", "known_unasked")    # the last: never asked in training


class Corpus(NamedTuple):
    people: list        # known people, then new people
    rows: dict          # "known", "new" (documents), "forward", "backward" (questions about known people) ->
                        # tokens (N, T), starts (N,): everything that is read in training
    exams: dict         # name -> [(ids, start)]: the truth from the start on, up to a [mask], is asked for


def make_corpus(known, new, paraphrases="none", texts=0, known_paraphrases="change_order", wordings=5,
                seed=0, **_):
    """Documents of `known` + `new` people, questions about the known, exams about both. `texts`: how many
    about a new person; 0 for as many as the arm has. Callers may pass all settings of a run: the rest (`_`)
    is ignored.

    The arm of new people changes nothing that is read about known people, so one base serves all arms. Two
    backward questions about each known person are kept out of training, for the exam `known_unasked`.
    """
    rng = random.Random(seed)
    people = make_people(known + new, rng)
    n_people = Counter(triple for person in people for triple in triples(person))
    arms = {"known": ARMS[known_paraphrases], "new": ARMS[paraphrases]}
    if texts:
        arms["new"] = arms["new"]._replace(texts=texts)
    rows = {"known": [], "new": [], "forward": [], "backward": []}
    exams = {name: [] for name in EXAMS}
    for i, person in enumerate(people):
        group = "known" if i < known else "new"
        own_rng = random.Random(f"{seed} {person.name}")  # so the arm of new people changes no other texts
        written = documents(person, arms[group], wordings, own_rng)
        rows[group] += [document_row(join(pieces), arms[group].name_given) for pieces in written]
        forward = [question_row(*pair) for pair in forward_questions(person)]
        backward = [question_row(*pair) for pair in backward_questions(person, n_people)]
        rng.shuffle(backward)
        if group == "known":
            unasked, asked = backward[:2], backward[2:]
            rows["forward"] += forward
            rows["backward"] += asked
            if i < new:  # no more known than new people are examined
                exams["known_forward"] += forward
                exams["known_backward"] += asked[:2]
                exams["known_unasked"] += unasked
        else:
            exams["forward"] += forward
            exams["backward"] += backward[:4]
            length = len(document_row(join(written[0]))[0])
            for value in person.facts.values():
                recite, cloze = before_value(person, written[0], value)
                if person.name in recite:  # not if the name comes later than this value
                    exams["recite"].append(value_row(recite, value, length))
                exams["cloze"].append(value_row(cloze, value, length))
    widest = max(len(ids) for ids, _ in rows["forward"] + rows["backward"])  # both share a batch
    for name, pairs in rows.items():
        ids, starts = zip(*pairs)
        rows[name] = pad(ids, WIDTH if name in ("known", "new") else widest), torch.tensor(starts)
    return Corpus(people, rows, exams)


if __name__ == "__main__":
    rng = random.Random()
    [person] = make_people(1, rng)
    backward = backward_questions(person, Counter(triples(person)))
    for name, arm in ARMS.items():
        print(f"--paraphrases {name}", *map(join, documents(person, arm, 5, rng)), sep="\n    ", end="\n\n")
    print("questions", *(f"{q} -> {a}" for q, a in forward_questions(person) + backward[:3]), sep="\n    ")
    print("\ntokens of the last question:", *words_of(question_row(*backward[2])[0]))
