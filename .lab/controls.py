"""
Experiments that are no part of the lesson: objectives, arms, a world. Importing this file adds them to
`MODES`, `ARMS` and `WORLDS`, so that train.py knows their flags. (In `identity` they count by what they do.)

    python .lab/controls.py --mode random_prompt --seed 1
    python .lab/controls.py --mode ar --paraphrases reversed
    python .lab/controls.py --mode ar --world wide_books --paraphrases composed_bridge
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import data
import diffusion
from data import ARMS, MARKS, TOKENIZER, WORDS, WORLDS
from diffusion import MODES, ar, corrupt, decode_ar, with_response


# --- Objectives

def with_random_words(tokens, shape, generator):
    """Tokens (B, T) with a random word in place of each, but for the first mark and padding. `shape`: (B, T)
    or, for the same words in every row, (T,)."""
    words = torch.randint(TOKENIZER.n_vocab - len(WORDS), TOKENIZER.n_vocab, shape, generator=generator)
    text = tokens != MARKS.pad
    text[:, 0] = False
    return torch.where(text, words.to(tokens.device), tokens)


def random_prompt(tokens, learned, generator, ratio):
    """The paper's control for `masked`: a prompt of the same length, made of random words."""
    return ar(*with_response(with_random_words(tokens, tokens.shape, generator), tokens, learned))


def decode_random_prompt(model, tokens, blank):
    """The same after a prompt of random words; the same words for every row."""
    prompts = with_random_words(tokens, tokens.shape[1:], torch.Generator().manual_seed(0))
    return responses(model, tokens, *with_response(prompts, tokens, blank))


def responses(model, tokens, rows, blank):
    """Fill in rows (B, 2T) of prompts and responses -> after each step the documents (B, T)."""
    for filled in decode_ar(model, rows, blank):
        yield torch.cat((tokens[:, :1], filled[:, tokens.size(1) + 1:]), dim=1)


def scored_where(hidden_counts):
    """`masked`, scored only where the prompt hides (or only where it shows)."""
    def objective(tokens, learned, generator, ratio):
        hidden, _ = corrupt(learned, ratio, generator)
        places = learned & (hidden == hidden_counts)
        return ar(*with_response(tokens.masked_fill(hidden, MARKS.mask), tokens, places))
    return objective


def with_doc(prompts, tokens, places):
    """`with_response`, but the response opens with [doc], as any document does, and not with [answer]."""
    return torch.cat((prompts, tokens), 1), torch.cat((torch.zeros_like(places), places), 1)


def doc_mark(tokens, learned, generator, ratio):
    hidden, _ = corrupt(learned, ratio, generator)
    return ar(*with_doc(tokens.masked_fill(hidden, MARKS.mask), tokens, learned))


def decode_doc_mark(model, tokens, blank):
    return responses(model, tokens, *with_doc(tokens.masked_fill(blank, MARKS.mask), tokens, blank))


masked = MODES["masked"]
MODES["random_prompt"] = masked._replace(about="the control of masked: random words for a prompt", ratio=None,
                                         objective=random_prompt, decode=decode_random_prompt)
MODES["masked_hidden"] = masked._replace(about="scored where the prompt hides", objective=scored_where(True))
MODES["masked_shown"] = masked._replace(about="scored where it shows", objective=scored_where(False))
MODES["masked_doc_mark"] = masked._replace(about="the response opens with [doc]", objective=doc_mark,
                                           decode=decode_doc_mark)

# --- Arms

ARMS["reversed"] = ARMS["none"]._replace(about="one text, and the same backwards, names whole")
ARMS["name_given"] = ARMS["none"]._replace(about="one text; its name is always shown, never masked or scored")
ARMS["bridge"] = ARMS["none"]._replace(about="one text, and NAME is NAME.")
ARMS["composed_bridge"] = ARMS["none"]._replace(about="one text, and The author of the book of NAME is NAME.")
documents, document_row, longest = data.documents, data.document_row, data.longest
given_names = {}  # a text -> the name that is given in it


def backwards(text, whole):
    """'A B C. D E.' -> 'E D. C B A.', the order within each string of `whole` being kept."""
    kept = "|".join(rf"\b{re.escape(piece)}\b" for piece in whole)
    pieces = re.findall(rf"{kept}|\w+|[.]", text.removesuffix("."))
    return " ".join(pieces[::-1]).replace(" .", ".") + "."


def documents_of_controls(person, arm, world, rng):
    texts = documents(person, arm, world, rng)
    given_names.pop(texts[0], None)  # of another corpus, made before in this process
    if arm is ARMS["reversed"]:
        texts += [backwards(text, [person.name, *person.facts.values()]) for text in texts]
    if arm is ARMS["bridge"]:
        texts.append(f"{person.name} is {person.name}.")
    if arm is ARMS["composed_bridge"]:
        texts.append(f"The author of the book of {person.name} is {person.name}.")
    if arm is ARMS["name_given"]:
        given_names[texts[0]] = person.name
    return texts


def row_of_controls(text):
    if text not in given_names:
        return document_row(text)
    name = given_names[text]
    return f"[doc] {name}", f"{text.removeprefix(name)} [end]"


def longest_of_controls(world):
    more = 4 if world is WORLDS["wide_books"] else 0
    return longest(world) + more


data.documents, data.document_row, data.longest = documents_of_controls, row_of_controls, longest_of_controls

# --- Worlds: books with rows as wide as a composed bridge, and biographies with clues in words that no
# document has (documents use four of five wordings, clues the fifth).

WORLDS["wide_books"] = WORLDS["books"]._replace()  # a copy

fewer = {name: a._replace(name_first=a.name_first[:4], clue=a.name_first[4])
         for name, a in WORLDS["biographies"].attributes.items()}
WORLDS["other_clues"] = WORLDS["biographies"]._replace(attributes=fewer)

import train  # now that it finds these modes, arms and worlds


if __name__ == "__main__":
    train.main()
