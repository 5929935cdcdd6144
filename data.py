"""
Fictional people: their biographies, the questions about them, and the tokens of both.

A person is a name and six attributes. A document states the name once, then only "He" or "She":

    Curtis Chase Emley was born on 28 May 1952. He comes from Elkton. He went to Princeton. He majored ...

The two directions of the exam, about the same six facts:

    forward    name -> attribute        What is the birth city of Curtis Chase Emley?  ->  Elkton
    backward   attributes -> name       Who was born in Elkton, studied at Princeton and works for Intel?
                                        ->  Curtis Chase Emley

*Known* people have documents and questions in training. *New* people have documents alone: their questions
are the exam. Everything below follows from one seed.

    python data.py            print a person, the documents of each arm, the questions, the tokens of a text
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

MEN = """Aaron Adrian Albert Andre Arthur Barrett Benjamin Brandon Caleb Carlos Cedric Conrad Curtis Damian
    Derek Desmond Dominic Edgar Elias Ernest Felix Gavin Gilbert Harvey Hector Hugo Irving Jasper Jerome Joel
    Julian Kenneth Lamar Leonard Lionel Lucas Marcus Martin Maurice Nathan Nelson Oscar Otto Patrick Quentin
    Rafael Raymond Rodney Roland Simon""".split()
WOMEN = """Abigail Agnes Alice Amelia Anita Beatrice Bianca Camille Carmen Cecilia Clara Colette Daphne Deborah
    Diana Edith Elena Eloise Esther Fiona Flora Gloria Greta Hannah Heather Ingrid Irene Isabel Jasmine Joanna
    Judith Lavinia Leticia Lorena Lucille Mabel Marjorie Matilda Miriam Nadine Naomi Odette Pamela Penelope
    Regina Rosalind Sabrina Sylvia Teresa Ursula""".split()
MIDDLE = """Alden Amory Ansel Arden Ashby Avery Blaine Blair Blake Bowen Briar Cameron Carey Casey Chase Clarke
    Corey Dale Dana Darcy Devon Drew Eden Ellery Ellis Emerson Finley Florian Garnet Gentry Greer Hadley
    Harley Haven Hollis Indigo Jody Jules Justice Kai Keegan Kendall Kerry Lane Laurel Lennon Leslie Linden
    Logan London Loren Lyric Marion Marley Merle Merritt Micah Monroe Morgan Murphy Noel Oakley Ocean Parker
    Pax Perry Peyton Piper Presley Quincy Quinn Reagan Reese Remy Rene Ridley Riley River Robin Rory Rowan
    Royal Sage Sawyer Scout Shea Shiloh Sidney Skyler Sloan Sterling Storm Tatum Taylor Tracy Val Vesper
    Winter Wren Zion""".split()
LAST = """Abernathy Ackerman Aldridge Atwood Babcock Barlow Beckett Bellamy Benson Birch Blackwell Bradshaw
    Brennan Briggs Calloway Carver Chandler Clayborne Coleman Conway Crawford Cromwell Dalton Danforth Dawson
    Delaney Doyle Drummond Duncan Easton Eldridge Emley Everett Fairbanks Farrell Fenwick Ferguson Fleming
    Forsythe Gallagher Garrison Goodwin Granger Griffith Hammond Harding Hartley Hastings Hawthorne Holloway
    Hubbard Ingram Jarvis Jennings Keating Kendrick Kimball Lambert Langley Lawson Lockwood Lowell Maddox
    Mallory Mercer Milton Mortimer Nash Newell Norwood Oakes Osborne Palmer Pembroke Pierce Prescott Quimby
    Radcliffe Ramsey Redmond Rhodes Rockwell Rutledge Sanford Sedgwick Shelby Sinclair Stanton Talbot Thatcher
    Thornton Underwood Vaughn Wakefield Walton Webster Whitaker Winslow Wyatt Yardley""".split()

MONTHS = """January February March April May June July August September October November December""".split()
POOLS = {  # attribute -> everything it can be; a birth date is 28 days x 12 months x 60 years
    "birth date": [f"{d} {m} {y}" for y in range(1940, 2000) for m in MONTHS for d in range(1, 29)],
    "birth city": """Akron Albany Amarillo Anchorage Augusta Bakersfield Boise Boulder Buffalo Charleston Cheyenne
        Chico Dayton Decatur Denton Duluth Elkton Eugene Evanston Fargo Flint Fresno Galveston Hartford Helena
        Hoboken Ithaca Joliet Juneau Knoxville Lansing Laredo Lincoln Lubbock Macon Madison Mobile Modesto Norfolk
        Ogden Omaha Orlando Peoria Provo Reno Salem Savannah Spokane Topeka Tulsa""".split(),
    "university": """Amherst Auburn Barnard Baylor Berkeley Bowdoin Brandeis Brown Bates Bucknell Caltech Carleton
        Clemson Colgate Columbia Cornell Creighton Dartmouth Drexel Duke Emory Fordham Georgetown Gonzaga Grinnell
        Harvard Haverford Howard Juilliard Lehigh Marquette Middlebury Oberlin Pepperdine Princeton Purdue Rice
        Rutgers Stanford Swarthmore Syracuse Temple Tufts Tulane Vanderbilt Vassar Villanova Wellesley Wesleyan
        Yale""".split(),
    "major": """Accounting Acoustics Agronomy Anatomy Anthropology Archaeology Architecture Astronomy Biochemistry
        Biology Botany Chemistry Cinema Classics Criminology Dance Dentistry Drama Ecology Economics Education
        Engineering English Entomology Finance Forestry French Genetics Geography Geology Greek History Journalism
        Latin Law Linguistics Literature Marketing Mathematics Medicine Music Nursing Optics Painting Philosophy
        Physics Psychology Sociology Statistics Theology""".split(),
    "employer": """Adobe Airbus Amazon Apple Autodesk Bayer Boeing Bosch Canon Caterpillar Chevron Cisco Citigroup
        Deloitte Disney Ericsson FedEx Ford Fujitsu Google Heineken Hilton Honda Honeywell Intel Lego Lockheed
        Marriott Mattel Merck Michelin Microsoft Nestle Netflix Nike Nintendo Nokia Nvidia Oracle Pfizer Philips
        Samsung Shell Siemens Sony Spotify Toyota Unilever Verizon Volvo""".split(),
    "work city": """Amsterdam Ankara Athens Atlanta Austin Bangkok Barcelona Beijing Berlin Bogota Boston Brussels
        Budapest Cairo Chicago Copenhagen Dallas Delhi Denver Dublin Geneva Hamburg Hanoi Helsinki Houston Istanbul
        Jakarta Lima Lisbon Madrid Manila Melbourne Miami Milan Montreal Munich Nairobi Oslo Paris Phoenix Prague
        Rome Santiago Seattle Seoul Singapore Stockholm Tokyo Toronto Vienna""".split(),
}
ATTRIBUTES = list(POOLS)

# Ten wordings for each attribute. Every one begins with its subject, so that a name or a pronoun fits.
WORDINGS = {
    "birth date": ["was born on {}", "came into the world on {}", "has a birthday on {}", "was a child of {}",
                   "first saw daylight on {}", "celebrates being born on {}", "arrived on {}",
                   "was delivered on {}", "dates back to {}", "entered this life on {}"],
    "birth city": ["comes from {}", "was a baby in {}", "is a native of {}", "spent the first days in {}",
                   "has roots in {}", "calls {} the place of birth", "hails from {}",
                   "has a birth certificate from {}", "first opened both eyes in {}", "started life in {}"],
    "university": ["went to {}", "studied at {}", "is a graduate of {}", "took a degree at {}", "was a student at {}",
                   "got an education at {}", "attended {}", "holds a diploma of {}", "enrolled at {}",
                   "is an alum of {}"],
    "major": ["majored in {}", "chose the subject of {}", "did a degree in {}", "specialized in {}", "learned {}",
              "read {} as a student", "was trained in {}", "took courses in {}", "focused on {}",
              "earned honors in {}"],
    "employer": ["works for {}", "has a job at {}", "is employed by {}", "earns a salary from {}", "joined {}",
                 "is on the staff of {}", "was hired by {}", "makes a living at {}", "found a position at {}",
                 "is paid by {}"],
    "work city": ["lives in {}", "has an office in {}", "goes to work in {}", "is based in {}", "moved to {}",
                  "settled in {}", "has a desk in {}", "commutes to {}", "is stationed in {}",
                  "does business in {}"],
}
RELATIVE = {  # how a backward question names each attribute
    "birth date": "was born on {}", "birth city": "was born in {}", "university": "studied at {}",
    "major": "majored in {}", "employer": "works for {}", "work city": "works in {}",
}
ARMS = {  # --paraphrases -> (texts a person, does the order of facts change, may the name come late)
    "none": (1, False, False),
    "same": (5, False, False),
    "shuffled": (5, True, False),
    "permuted": (5, True, True),
}

# -----------------------------------------------------------------------------
# People, documents, questions: plain text


class Person(NamedTuple):
    name: str           # "Curtis Chase Emley"
    pronoun: str        # "He" or "She"
    facts: dict         # attribute -> value


def make_people(n, rng):
    """n people with names all different; each attribute drawn on its own. ValueError if names run out."""
    limit = 2 * len(MEN) * len(MIDDLE) * len(LAST) // 10  # beyond a tenth of all names, drawing gets slow
    if n > limit:
        raise ValueError(f"{n:,} people are more than the names can tell apart: at most {limit:,} in all")
    people = {}
    while len(people) < n:
        first = rng.choice(MEN + WOMEN)
        name = f"{first} {rng.choice(MIDDLE)} {rng.choice(LAST)}"
        facts = {attribute: rng.choice(pool) for attribute, pool in POOLS.items()}
        people.setdefault(name, Person(name, "He" if first in MEN else "She", facts))
    return list(people.values())


def documents(person, arm, wordings, rng):
    """The texts about one person in one arm of `ARMS`, each with the name once and all six facts.

    The facts follow the order of ATTRIBUTES unless the arm changes it. Where the name may come late, it is the
    subject of a random sentence, and the facts before it are told of "He" or "She".
    """
    texts, reorder, late = ARMS[arm]
    result = []
    for _ in range(texts):
        order = rng.sample(ATTRIBUTES, len(ATTRIBUTES)) if reorder else ATTRIBUTES
        named = rng.randrange(len(order)) if late else 0
        sentences = []
        for i, attribute in enumerate(order):
            wording = rng.choice(WORDINGS[attribute][:wordings])
            subject = person.name if i == named else person.pronoun
            sentences.append(f"{subject} {wording.format(person.facts[attribute])}.")
        result.append(" ".join(sentences))
    return result


def forward_questions(person):
    """[(question, answer)], one an attribute, in the order of ATTRIBUTES."""
    return [(f"What is the {a} of {person.name}?", person.facts[a]) for a in ATTRIBUTES]


def clues(person):
    """All C(6, 3) = 20 triples of (attribute, value), the evidence that backward questions give."""
    return list(combinations(person.facts.items(), 3))


def backward_questions(person, population):
    """[(question, name)] for the triples of facts that fit nobody else; `population` counts the triples of all."""
    result = []
    for triple in clues(person):
        if population[triple] == 1:
            a, b, c = (RELATIVE[attribute].format(value) for attribute, value in triple)
            result.append((f"Who {a}, {b} and {c}?", person.name))
    return result


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
CANVAS = 4                    # tokens of every answer: three words and an end, however short the true answer is


def words():
    """All words that the generator can write, sorted: the vocabulary does not depend on the seed."""
    text = MEN + WOMEN + MIDDLE + LAST + [v for pool in POOLS.values() for v in pool] + ["He She"]
    text += [w for wordings in WORDINGS.values() for w in wordings] + list(RELATIVE.values())
    text += [f"What is the {a} of ? Who , and" for a in ATTRIBUTES]
    return sorted(set(re.findall(r"\w+", " ".join(text))))


def make_tokenizer():
    """A tiktoken.Encoding made in memory: 6 marks, 256 bytes, then one token a word with its leading space.

    tiktoken looks a whole piece up before it merges bytes, so " Boston" is one token, and an unknown word is
    the bytes that spell it.
    """
    pieces = [bytes([b]) for b in range(256)] + [(" " + word).encode() for word in words()]
    return tiktoken.Encoding(
        "biographies", pat_str=PIECES,
        mergeable_ranks={piece: len(MARKS) + i for i, piece in enumerate(pieces)},
        special_tokens={f"<{mark}>": i for mark, i in MARKS._asdict().items()},
    )


TOKENIZER = make_tokenizer()


def encode(text):
    """Token ids of a text. A space is put before it, so that a word at the start is the token it always is."""
    return TOKENIZER.encode_ordinary(" " + text)


def decode(ids):
    """The text of token ids, the inverse of `encode`; what follows the first end mark is dropped."""
    ids = list(ids)
    return TOKENIZER.decode(ids[:ids.index(MARKS.end)] if MARKS.end in ids else ids)[1:]


def document_row(text):
    """([doc] text [end], index where the text starts)."""
    return [MARKS.doc, *encode(text), MARKS.end], 1


def question_row(question, answer=""):
    """([question] words [answer] canvas, index where the canvas starts): the canvas is the answer, then ends."""
    prompt = [MARKS.question, *encode(question), MARKS.answer]
    canvas = encode(answer) if answer else []
    return prompt + canvas + [MARKS.end] * (CANVAS - len(canvas)), len(prompt)


# -----------------------------------------------------------------------------
# The corpus: everything a run reads and is asked


class Corpus(NamedTuple):
    rows: torch.Tensor      # (N, T) int64, padded: all that is ever trained on
    starts: torch.Tensor    # (N,) where each row's text or answer starts
    groups: dict            # name -> range of rows: known_documents, new_documents, forward, backward
    exams: dict             # name -> [(question, answer)]: forward, backward, known_forward, known_backward
    people: list            # known people, then new people
    digest: str             # of all of the above: two corpora are the same if their digests are


def pad_rows(rows):
    """[(ids, start)] -> (N, T) int64 padded with `MARKS.pad`, (N,) int64 starts."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [MARKS.pad] * (width - len(ids)) for ids, _ in rows], dtype=torch.int64)
    return tokens, torch.tensor([start for _, start in rows], dtype=torch.int64)


def make_corpus(known, new, paraphrases="none", wordings=5, seed=0, asked=4):
    """Documents of `known` + `new` people, questions about the known, exams about both.

    An exam holds every forward question and up to `asked` backward questions a person. The known people's exam
    is about as many of them as there are new people, so that both scores are as exact.
    """
    rng = random.Random(seed)
    people = make_people(known + new, rng)
    population = Counter(triple for person in people for triple in clues(person))
    rows, groups = [], {}

    def add(group, more):
        groups[group] = range(len(rows), len(rows) + len(more))
        rows.extend(more)

    texts = [[document_row(text) for text in documents(p, paraphrases, wordings, rng)] for p in people]
    add("known_documents", [row for person in texts[:known] for row in person])
    add("new_documents", [row for person in texts[known:] for row in person])
    forward = [forward_questions(p) for p in people]
    backward = [backward_questions(p, population) for p in people]
    add("forward", [question_row(*q) for questions in forward[:known] for q in questions])
    add("backward", [question_row(*q) for questions in backward[:known] for q in questions])
    exams = {"forward": [q for questions in forward[known:] for q in questions],
             "backward": [q for questions in backward[known:] for q in rng.sample(questions, min(asked, len(questions)))],
             "known_forward": [q for questions in forward[:min(known, new)] for q in questions],
             "known_backward": [q for questions in backward[:min(known, new)]
                                for q in rng.sample(questions, min(asked, len(questions)))]}
    tokens, starts = pad_rows(rows)
    digest = hashlib.sha256(repr((rows, exams, words())).encode()).hexdigest()[:12]
    return Corpus(tokens, starts, groups, exams, people, digest)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Print what the generator writes.")
    parser.add_argument("--seed", type=int, default=0, help="another number, another person (default: 0)")
    rng = random.Random(parser.parse_args().seed)
    person = make_people(1, rng)[0]
    print(person.name, *(f"  {a:<11} {v}" for a, v in person.facts.items()), sep="\n")
    for arm in ARMS:
        print(f"\n--paraphrases {arm}", *documents(person, arm, 5, rng), sep="\n  ")
    print("\nforward", *(f"{q} -> {a}" for q, a in forward_questions(person)), sep="\n  ")
    questions = backward_questions(person, Counter(clues(person)))
    print(f"\nbackward (3 of {len(questions)})", *(f"{q} -> {a}" for q, a in questions[:3]), sep="\n  ")
    ids, _ = question_row(*questions[0])
    print("\ntokens of the first of them", *(f"{i:>5} {TOKENIZER.decode([i])!r}" for i in ids), sep="\n  ")
