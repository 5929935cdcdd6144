"""
Fictional people: their biographies, the questions about them, and the tokens of both.

A person is a name and six attributes. A document states the name once, elsewhere only "He" or "She":

    Curtis Chase Emley was born on 28 May 1952. He comes from Elkton. He went to Princeton. He majored ...

The two directions of the exam, about the same six facts:

    forward    What is the birth city of Curtis Chase Emley?                          Elkton
    backward   Who was born in Elkton, studied at Princeton and works for Intel?      Curtis Chase Emley

*Known* people have documents and questions in training. *New* people have documents alone: their questions
are the exam. Everything follows from one seed.

    python data.py            print a person, the documents of each arm, the questions, the tokens of one
"""
import argparse
import hashlib
import random
import re
from collections import Counter
from itertools import combinations
from typing import NamedTuple

import tiktoken
import torch

# -----------------------------------------------------------------------------
# The world: pools of words. Names come from three pools that share no word.

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

# Ten wordings for each attribute. Every one begins with its subject, so that a name or a pronoun fits.
WORDINGS = {
    "birth date": ["was born on {}", "has a birthday on {}", "was delivered on {}", "arrived on {}",
                   "dates from {}", "saw first light on {}", "came into the world on {}", "began life on {}",
                   "was a child of {}", "entered the world on {}"],
    "birth city": ["comes from {}", "is a native of {}", "has roots in {}", "hails from {}",
                   "was a baby in {}", "started life in {}", "calls {} the place of birth",
                   "spent the first days in {}", "grew up in {}", "learned to walk in {}"],
    "university": ["went to {}", "studied at {}", "is a graduate of {}", "attended {}", "enrolled at {}",
                   "took a degree at {}", "was a student at {}", "is an alum of {}", "got through {}",
                   "holds a diploma of {}"],
    "major": ["majored in {}", "chose the subject of {}", "did a degree in {}", "specialized in {}",
              "read {} as a student", "was trained in {}", "took courses in {}", "focused on {}",
              "earned honors in {}", "learned {}"],
    "employer": ["works for {}", "has a job at {}", "is employed by {}", "earns a salary from {}",
                 "joined {}", "was hired by {}", "makes a living at {}", "is paid by {}",
                 "found a position at {}", "is on the staff of {}"],
    "work city": ["lives in {}", "has an office in {}", "is based in {}", "moved to {}", "settled in {}",
                  "goes to work in {}", "has a desk in {}", "commutes to {}", "is stationed in {}",
                  "does business in {}"],
}
RELATIVE = {  # how a backward question names each attribute
    "birth date": "was born on {}", "birth city": "was born in {}", "university": "studied at {}",
    "major": "majored in {}", "employer": "works for {}", "work city": "works in {}",
}


class Arm(NamedTuple):
    """One way to write the documents about a person, a value of --paraphrases: an arm of the experiment."""
    texts: int = 1          # texts a person
    wordings: int = 1       # ways to word a fact, if --wordings does not say
    reorder: bool = False   # the order of the facts changes from text to text
    late: bool = False      # the name may come late: facts before it are told of "He" or "She"
    reverse: bool = False   # each text a second time, its words in reverse order, names and values kept whole
    given: bool = False     # the name is always visible, never masked and never scored


ARMS = {"none": Arm(), "same": Arm(5, 5), "shuffled": Arm(5, 5, reorder=True),
        "permuted": Arm(5, 5, reorder=True, late=True),
        "reversed": Arm(reverse=True), "given": Arm(given=True)}


def flat(lists):
    return [x for one in lists for x in one]


# -----------------------------------------------------------------------------
# People, documents, questions: plain text


class Person(NamedTuple):
    name: str           # "Curtis Chase Emley"
    pronoun: str        # "He" or "She"
    facts: dict         # attribute -> value


def make_people(n, rng):
    """n people with names all different; each attribute drawn on its own. ValueError if names run out."""
    limit = len(MEN + WOMEN) * len(MIDDLE) * len(LAST) // 10  # so that a new draw is rarely a name we have
    if n > limit:
        raise ValueError(f"--known and --new are {n:,} people: there are names for at most {limit:,} in all")
    people = {}
    while len(people) < n:
        first = rng.choice(MEN + WOMEN)
        name = f"{first} {rng.choice(MIDDLE)} {rng.choice(LAST)}"
        facts = {attribute: rng.choice(pool) for attribute, pool in POOLS.items()}
        people.setdefault(name, Person(name, "He" if first in MEN else "She", facts))
    return list(people.values())


def documents(person, arm, wordings, rng):
    """The texts about one person in one of `ARMS`, each with the name once and all six facts.

    A text is put together from pieces that stay whole: the name, a value, a word of a wording. Read backwards
    piece by piece, it is the `reversed` arm (entity-level reversal).
    """
    arm, texts = ARMS[arm], []
    join = lambda pieces: " ".join(pieces).replace(" .", ".")
    for _ in range(arm.texts):
        order = rng.sample(ATTRIBUTES, len(ATTRIBUTES)) if arm.reorder else ATTRIBUTES
        named = rng.randrange(len(order)) if arm.late else 0
        pieces = []
        for i, attribute in enumerate(order):
            before, after = rng.choice(WORDINGS[attribute][:wordings]).split("{}")
            subject = person.name if i == named else person.pronoun
            pieces += [subject, *before.split(), person.facts[attribute], *after.split(), "."]
        texts.append(join(pieces))
        if arm.reverse:
            texts.append(join(pieces[-2::-1] + ["."]))
    return texts


def forward_questions(person):
    """[(question, value)], one an attribute, in the order of ATTRIBUTES."""
    return [(f"What is the {a} of {person.name}?", person.facts[a]) for a in ATTRIBUTES]


def clues(person):
    """All C(6, 3) = 20 triples of (attribute, value), the evidence that backward questions give."""
    return list(combinations(person.facts.items(), 3))


def backward_questions(person, population):
    """[(question, name)] for the triples of facts that fit nobody else; `population` counts everybody's."""
    told = [[RELATIVE[attribute].format(value) for attribute, value in triple]
            for triple in clues(person) if population[triple] == 1]
    return [(f"Who {a}, {b} and {c}?", person.name) for a, b, c in told]


# -----------------------------------------------------------------------------
# Tokens: whole words of this world, single bytes for everything else


class Marks(NamedTuple):
    """The special tokens. They have no spelling: no text can produce them."""
    pad: int = 0        # fills a row to the common length: never attended, masked or scored
    mask: int = 1       # a hidden token
    end: int = 2        # closes a document; closes an answer and fills its canvas
    doc: int = 3        # opens a document
    question: int = 4   # opens a question
    answer: int = 5     # an answer follows


MARKS = Marks()
PIECES = r" ?\w+|[^\w\s]|\s"  # a word with the space before it, a sign, a space
NAME = 3                      # tokens of a name
CANVAS = 4                    # tokens of every answer: up to three words, then ends

# All words that the generator can write, sorted: the vocabulary does not depend on the seed.
WORDS = sorted(set(re.findall(r"\w+", " ".join([
    *MEN, *WOMEN, *MIDDLE, *LAST, *flat(POOLS.values()), *flat(WORDINGS.values()), *POOLS, *RELATIVE.values(),
    "What is the of Who and He She"]))))

# A tiktoken.Encoding made in memory: 6 marks, 256 bytes, then one token a word with its leading space. It
# looks a whole piece up before it merges bytes: " Boston" is one token, and an unknown word is its bytes.
SPELLINGS = [bytes([b]) for b in range(256)] + [(" " + word).encode() for word in WORDS]
TOKENIZER = tiktoken.Encoding(
    "biographies", pat_str=PIECES,
    mergeable_ranks={spelling: len(MARKS) + i for i, spelling in enumerate(SPELLINGS)},
    special_tokens={f"<{mark}>": i for mark, i in MARKS._asdict().items()})


def encode(text):
    """Token ids of a text. A space is put before it, so that its first word is the token it always is."""
    return TOKENIZER.encode_ordinary(" " + text)


def decode(ids):
    """The text of token ids, the inverse of `encode`; what follows the first end mark is dropped."""
    ids = list(ids)
    return TOKENIZER.decode(ids[:ids.index(MARKS.end)] if MARKS.end in ids else ids).removeprefix(" ")


def document_row(text, given=False):
    """([doc] text [end], where the text to learn starts: behind the name if that is given)."""
    return [MARKS.doc, *encode(text), MARKS.end], 1 + NAME * given


def question_row(question, answer=""):
    """([question] words [answer] canvas, where the canvas starts): the canvas is the answer, then ends."""
    prompt = [MARKS.question, *encode(question), MARKS.answer]
    canvas = encode(answer) if answer else []
    return prompt + canvas + [MARKS.end] * (CANVAS - len(canvas)), len(prompt)


def pad_rows(rows):
    """[(ids, start)] -> (N, T) int64 padded with `MARKS.pad`, (N,) int64 starts."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [MARKS.pad] * (width - len(ids)) for ids, _ in rows], dtype=torch.int64)
    return tokens, torch.tensor([start for _, start in rows], dtype=torch.int64)


# -----------------------------------------------------------------------------
# The corpus: everything a run reads and is asked


class Corpus(NamedTuple):
    rows: torch.Tensor      # (N, T) int64, padded: all that is ever trained on
    starts: torch.Tensor    # (N,) int64, where each row's text or answer starts
    groups: dict            # name -> range of rows: known_documents, new_documents, forward, backward
    exams: dict             # name -> [(question, answer)]: forward, backward, known_forward, known_backward
    people: list            # known people, then new people
    digest: str             # of rows, exams and vocabulary: the same digest, the same corpus


def make_corpus(known, new, paraphrases="none", wordings=1, seed=0):
    """Documents of `known` + `new` people, questions about the known, exams about both.

    An exam holds every forward question and up to four backward questions a person. It asks about as many
    known as new people, where there are as many, so that both scores are as exact.
    """
    rng = random.Random(seed)
    people = make_people(known + new, rng)
    population = Counter(triple for person in people for triple in clues(person))
    texts = [[document_row(text, ARMS[paraphrases].given)
              for text in documents(person, paraphrases, wordings, rng)] for person in people]
    forward = [forward_questions(person) for person in people]
    backward = [backward_questions(person, population) for person in people]
    few = [rng.sample(questions, min(4, len(questions))) for questions in backward]

    rows, groups = [], {}
    for group, more in {"known_documents": flat(texts[:known]), "new_documents": flat(texts[known:]),
                        "forward": [question_row(*q) for q in flat(forward[:known])],
                        "backward": [question_row(*q) for q in flat(backward[:known])]}.items():
        groups[group] = range(len(rows), len(rows) + len(more))
        rows += more
    exams = {"forward": flat(forward[known:]), "backward": flat(few[known:]),
             "known_forward": flat(forward[:known][:new]), "known_backward": flat(few[:known][:new])}
    digest = hashlib.sha256(repr((rows, exams, WORDS)).encode()).hexdigest()[:12]
    return Corpus(*pad_rows(rows), groups, exams, people, digest)


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Print what the generator writes.")
    parser.add_argument("--seed", type=int, default=0, help="another number, another person (default: 0)")
    rng = random.Random(parser.parse_args().seed)
    person = make_people(1, rng)[0]
    backward = backward_questions(person, Counter(clues(person)))
    show = lambda title, lines: print(title, *lines, sep="\n    ", end="\n\n")
    show(person.name, (f"{attribute:<11} {value}" for attribute, value in person.facts.items()))
    for arm in ARMS:
        show(f"--paraphrases {arm}", documents(person, arm, ARMS[arm].wordings, rng))
    show("questions", (f"{q} -> {a}" for q, a in forward_questions(person) + backward[:3]))
    show("tokens of the last", (f"{i:>4} {TOKENIZER.decode([i])!r}" for i in question_row(*backward[2])[0]))


if __name__ == "__main__":
    main()
