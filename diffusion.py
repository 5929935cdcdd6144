"""
Corruption, the objectives, the decoders, and the table of modes.

`masked` is `ar` on a longer row: a document full of holes, the prompt, and behind it the whole document, the
response, which alone is scored. Under each token of the response stands what is asked there:

    prompt      [doc]    [mask] [mask] [mask]  [mask] to    Lagos .     [mask]
    response    [answer] Maria  Reese  Hubbard moved  to    Lagos .
    asked       Maria    Reese  Hubbard moved  to     Lagos .     [end]

An objective maps clean documents to (inputs, targets, weights). Let x be the L tokens of a document (after
[doc], and with its [end]), h the set of the k hidden positions, and x' the same with [mask] at those:

    ar          -1/L sum_i         log p(x_i | x_<i)        every next token, from what comes before it
    diffusion   -1/k sum_{i in h}  log p(x_i | x')          the hidden tokens, from both sides
    masked      -1/L sum_i         log p(x_i | x', x_<i)    `ar`, but with x' as a prompt

So under `masked` a causal model, too, learns a fact in both directions: a hidden name must be recalled from
the facts that show, and a hidden fact from the name. Under `ar` it does not: of a text that starts with the
name it learns p(name) and p(facts | name), but p(name | facts) is not in its loss.

    python diffusion.py        print what goes into the model and, beside each token, what it must predict
    python train.py --mode masked --mask_ratio 0 1
"""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from data import MARKS, decode, document_row, question_row, stack

# --- Corruption

def corrupt(learned, ratio, generator):
    """Choose which of the `learned` (B, T) positions to hide. `ratio`: (low, high). For each row a share t is
    drawn evenly between them, and ceil(t L) of its L tokens are hidden.

    Returns hidden (B, T) bool and weights (B, T) float, which `diffusion` alone uses: 1 / k for each of the k
    hidden tokens of a row, so that the loss of a row is the mean cross-entropy of its hidden tokens. Why?
    Call that mean, taken over all ways to hide k tokens, M_k. Now reveal a text one token at a time, in
    random order. With two tokens, a and b, the two orders cost

        -log p(a) - log p(b | a)    and    -log p(b) - log p(a | b)

    The mean of the first terms is M_2, for both tokens are hidden there, and that of the second terms is
    M_1. With L tokens it is the same: while k are hidden, in a random order each set of k is as likely to be
    left, and each of its tokens to be next. So the next one costs M_k on average, and the whole text

        mean over all orders of -log p(x)  =  M_L + ... + M_1  =  L x the mean of M_k over k

    With k drawn evenly from 1..L, which is `ratio` (0, 1), one row estimates that mean: the loss per token,
    comparable with `ar`'s. L times it is the negative ELBO, an upper bound of -log p(x), where p is the
    mixture of all orders. Hiding each token with probability t and weighing it by 1 / (t L), as eq. 1 of the
    paper does, has the same expectation if t is drawn from 0 to 1. The paper draws t from .05 to .95. Like
    (.05, .95) here, that makes some k rarer than others, and so it is not the ELBO.

    The shares of a batch of B rows are spread evenly: one lies in each of B equal slices of the range, and
    which row gets which slice is drawn anew each time. So no batch has small shares alone or large ones
    alone, which makes the loss less noisy and changes no expectation. Without the permutation known people's
    rows, which come first in a batch, would always get the small shares.
    """
    low, high = ratio
    B = len(learned)
    which = torch.randperm(B, generator=generator)[:, None]                         # (B, 1): of the slices
    u = (which + torch.rand(B, 1, generator=generator)) / B                         # (B, 1), in 0 .. 1
    t = low + (high - low) * u
    # A schedule of yours goes here, say f(u) for u. Keep t between low and high: `masked` asks for .6 and .6,
    # and `log_p` (eval.py) for 1 and 1, which hides all of an answer.
    assert 0 <= t.min() and t.max() <= 1, "corrupt: a share t of tokens to hide must lie in 0 .. 1"
    L = learned.sum(1, keepdim=True)                                                # (B, 1)
    k = (t * L - 1e-4).ceil()   # (B, 1). Without the 1e-4, .6 x 25 = 15.000001 would be rounded up to 16
    k = torch.where(t > 0, k.clamp(min=1), k)       # a share close to 0 still hides one token
    # float64: with fewer digits two draws of a row could be equal, and another machine might sort them
    # the other way.
    draws = torch.rand(learned.shape, generator=generator, dtype=torch.float64)     # (B, T)
    draws = draws.masked_fill(~learned, 2)      # what is given comes last
    rank = draws.argsort(1).argsort(1)          # (B, T): of each draw in its row, 0 for the smallest
    hidden = rank < k                           # (B, T): the k smallest
    return hidden, hidden / k.clamp(min=1)


# --- Objectives: (tokens, learned, generator, ratio) -> inputs, targets, weights
#
# `tokens` (B, T) are documents or questions, padded on the right; `learned` (B, T) is true where something
# may be hidden and scored, of a question in its answer alone. What is returned is (B, T) for `diffusion`,
# (B, T - 1) for `ar` and (B, 2T - 1) for `masked`. All that is random is drawn with `generator`. Questions
# are always trained as the base of a mode is, by `ar` or `diffusion` with its own ratio; --mask_ratio is for
# documents.

def ar(tokens, learned, generator=None, ratio=None):
    """Next-token prediction: -1/L sum_i log p(x_i | x_<i), over what is learned of each row. Nothing is
    hidden, so it needs neither generator nor ratio."""
    scored = learned[:, 1:]
    return tokens[:, :-1], tokens[:, 1:], scored / scored.sum(1, keepdim=True)


def diffusion(tokens, learned, generator, ratio):
    """Masked diffusion, arXiv 2510.09885 eq. 1, weighted as in `corrupt`. Position i predicts token i."""
    hidden, weights = corrupt(learned, ratio, generator)
    return tokens.masked_fill(hidden, MARKS.mask), tokens, weights


def with_response(prompts, tokens, places):
    """Prompts and documents (B, T) -> rows (B, 2T): the prompt, then the document with [answer] instead of
    [doc]. Padding between them is never attended.

    `places` (B, T) bool are positions of the documents, those to learn or, in an exam, those to fill. They
    are returned as (B, 2T), in the second half. The prompt has none, so it is only read: a loss on it would
    teach the model to write masks."""
    response = tokens.clone()
    response[:, 0] = MARKS.answer
    none = torch.zeros_like(places)
    return torch.cat((prompts, response), dim=1), torch.cat((none, places), dim=1)


def masked(tokens, learned, generator, ratio):
    """Masked fine-tuning of a causal model, eq. 2: -1/L sum_i log p(x_i | x', x_<i). All of the response is
    scored, even what the prompt shows. To score what is hidden alone comes to the same (README.md)."""
    hidden, _ = corrupt(learned, ratio, generator)
    prompts = tokens.masked_fill(hidden, MARKS.mask)
    return ar(*with_response(prompts, tokens, learned))  # its [answer] predicts the first word


# --- Decoders fill the places `blank` (B, T) bool of tokens (B, T). After each step they yield all tokens.

def logits_of_words(model, tokens, at=None):
    """The logits of the model, in which all marks but [end] are ruled out: they are never answers."""
    logits = model(tokens, at)
    logits[..., [mark for mark in MARKS if mark != MARKS.end]] = -torch.inf
    return logits


@torch.no_grad()
def decode_ar(model, tokens, blank):
    """Greedy, from left to right: the most likely next token. One step of a row with two blanks:

        tokens    [doc]   He      lives   in      [mask]  [mask]
        blank     no      no      no      no      yes     yes
        now       no      no      no      no      yes     no          the first blank
        ahead     -       ...     ...     ...     Oslo    ...         what the place before it predicts
    """
    while blank.any():
        now = blank & (blank.cumsum(1) == 1)                # (B, T): a row without blanks has none
        ahead = logits_of_words(model, tokens).argmax(-1).roll(1, dims=1)  # (B, T): i predicts i + 1
        tokens = torch.where(now, ahead, tokens)
        blank = blank & ~now
        yield tokens


def surest(confidence):
    """(B, T) -> bool: in each row the place to fill next, where the model is surest. Confidence is the
    model's probability of its best token, and 0 at places that are not blank. (In a row without blanks one
    of those is chosen; the caller does not write it.) To fill also every place with more than .9, put
    `| (confidence > .9)` behind the next line. Exercise 6 (README.md) chooses the two surest."""
    return F.one_hot(confidence.argmax(1), confidence.size(1)).bool()


@torch.no_grad()
def decode_diffusion(model, tokens, blank):
    """Mask the blanks, then fill first the one the model is surest of; what is filled stays. One token per
    step makes this an autoregressive model whose order depends on what is already revealed. Two tokens of one
    step would each be chosen without knowing the other."""
    tokens = tokens.masked_fill(blank, MARKS.mask)
    while blank.any():
        p, best = logits_of_words(model, tokens).softmax(-1).max(-1)    # (B, T) each
        now = surest(p.masked_fill(~blank, 0)) & blank                  # (B, T)
        assert now.any(), "surest chose none of the blanks, so this would never end"
        tokens = torch.where(now, best, tokens)
        blank = blank & ~now
        yield tokens


def decode_masked(model, tokens, blank):
    """The document with its blanks is the prompt; the same blanks of the response are filled as in `ar`."""
    prompts = tokens.masked_fill(blank, MARKS.mask)
    for rows in decode_ar(model, *with_response(prompts, tokens, blank)):  # (B, 2T)
        response = rows[:, tokens.size(1):]
        yield torch.cat((tokens[:, :1], response[:, 1:]), dim=1)  # with [doc] again, which was [answer]


# --- The table of modes. For a mode of your own, write an objective and add a row.

class Mode(NamedTuple):
    """All that differs between two values of --mode."""
    about: str                  # for --help
    objective: Callable         # for documents in fine-tuning
    ratio: tuple                # what share of a document it hides, (low, high); None if it hides nothing
    decode: Callable            # fills the blanks of a document
    base: str                   # the mode of its pretraining, and of all questions, in training and exam
    causal: bool                # does a position see only what comes before it?
    times: int = 1              # what its default numbers of steps are multiplied by


MODES = {
    "ar": Mode("next token", ar, None, decode_ar, "ar", causal=True),
    "diffusion": Mode("masked diffusion", diffusion, (0, 1), decode_diffusion, "diffusion", causal=False,
                      times=2),  # with as many steps as `ar` it forgot known people
    "masked": Mode("masked fine-tuning of ar's base", masked, (0.6, 0.6), decode_masked, "ar", causal=True),
}


if __name__ == "__main__":
    rows = {"document": document_row("Maria Reese Hubbard moved to Lagos."),
            "question": question_row("Who works in Lagos?", "Maria Reese Hubbard")}
    for name, mode in MODES.items():
        sees = "what comes before it" if mode.causal else "the whole row"
        for kind, trained_as in (("document", mode), ("question", MODES[mode.base])):
            tokens, learned = stack([rows[kind]])
            generator = torch.Generator().manual_seed(149)  # it hides what is hidden at the top of this file
            inputs, targets, weights = trained_as.objective(tokens, learned, generator, trained_as.ratio)
            print(f"--mode {name}: a {kind}. Each token sees {sees}\n    in          asked")
            for token, target, weight in zip(inputs[0], targets[0], weights[0]):
                asked = decode([target]) if weight else ""
                print(f"    {decode([token]):<11} {asked}".rstrip())
            print()
