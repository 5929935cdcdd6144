"""
Corruption, the objectives, the loss they share, and the decoders.

An objective maps clean documents to (inputs, targets, weights). Let x be the L tokens of a document (after
[doc], and with its [end]), h the set of the k hidden positions, and x' the same with [mask] at those:

    ar          -1/L sum_i         log p(x_i | x_<i)        every next token, from what comes before it
    diffusion   -1/k sum_{i in h}  log p(x_i | x')          the hidden tokens, from both sides
    masked      -1/L sum_i         log p(x_i | x', x_<i)    `ar`, but with x' as a prompt

`masked` is `ar` on a longer row, a document full of holes and then the whole document, which alone is scored
(both are padded to one length, not shown here):

    [doc] [mask] [mask] [mask] comes from Elkton . [end] [answer] Curtis Chase Emley comes from Elkton . [end]

So a causal model, too, learns a fact in every direction: whatever was hidden must be recalled from the rest.
With `ar` it does not: on a text that starts with the name it learns p(name) and p(facts | name), but
p(name | facts) is not in its loss.

    python diffusion.py        print what goes into the model and, under each token, what it must predict
    python train.py --mode masked --mask_ratio uniform

Shapes: tokens (B, T), of documents or questions padded on the right; starts (B,), where a row's text or
answer starts: everything before it is given. In training, randomness comes from `generator` alone.
"""
from itertools import zip_longest
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from data import MARKS, TOKENIZER, WORDS, document_row, question_row, words_of

# -----------------------------------------------------------------------------
# Corruption

RATIOS = {  # u ~ U(0, 1), one per row -> t, the share of the row's L tokens to hide
    "uniform": lambda u: u,             # exactly ceil(t L) of them, so k ~ U{1..L}
    "paper": lambda u: 0.05 + 0.9 * u,  # each of them with probability t
}


def content(tokens, starts):
    """(B, T) bool: the positions an objective may hide or score, from the start to the last real token."""
    position = torch.arange(tokens.size(1), device=tokens.device)
    return (position >= starts[:, None]) & (tokens != MARKS.pad)


def corrupt(allowed, ratio, generator):
    """Choose which of the `allowed` (B, T) positions to hide. `ratio`: a name in RATIOS, or a share t.

    Returns hidden (B, T) bool and weights (B, T) float, which `diffusion` alone uses: 1 / k for each of the k
    hidden tokens of a row, so that the row's loss is M_k, their mean cross-entropy. Why? Reveal a text one
    token at a time, in random order. While k are hidden, each may be the next, so the next one costs M_k on
    average. Over the whole text k goes from L down to 1:

        mean over all orders of -log p(x)  =  E[M_L] + ... + E[M_1]  =  L x mean over k of E[M_k]

    With k drawn evenly from 1..L one row estimates that mean: the loss per token, comparable with `ar`'s. (It
    bounds the -log p(x) of the mixture of all orders: hence its name, negative ELBO.)

    "paper" hides each token with probability t and weighs it 1 / (t L) (eq. 1, per token). With t ~ U(0, 1)
    the mean would be the same, but a small t gives huge weights. The paper's t is in .05 .. .95: its loss is
    *not* the ELBO.
    """
    B, T = allowed.shape
    u = torch.rand(B, 1, generator=generator)                           # (B, 1)
    draws = torch.rand(B, T, generator=generator)                       # (B, T), a number for each position
    draws = draws.masked_fill(~allowed, torch.inf)
    L = allowed.sum(1, keepdim=True)                                    # (B, 1)
    if ratio in RATIOS:
        t = RATIOS[ratio](u)                                            # (B, 1)
    else:
        t = torch.full_like(u, ratio * 0.999999)  # a hair less, so that no rounding error raises the ceil
    if ratio == "paper":
        hidden = draws < t
        return hidden, hidden / (t * L)
    k = (t * L).ceil()                                                  # (B, 1)
    rank = draws.argsort(dim=1).argsort(dim=1)                          # (B, T): 0 for a row's smallest draw
    hidden = rank < k
    return hidden, hidden / k.clamp(min=1)


# -----------------------------------------------------------------------------
# Objectives: (tokens, starts, ratio, generator) -> inputs, targets, weights
#
# `tokens` are documents or questions; a question's row starts at its answer, so that alone is hidden or
# scored. (Questions only meet `ar` and `diffusion`, the objectives of the two bases: see `Mode`.)

def ar(tokens, starts, ratio=None, generator=None):
    """Next-token prediction: -1/L sum_i log p(x_i | x_<i), over the content of each row."""
    scored = content(tokens, starts)[:, 1:]
    return tokens[:, :-1], tokens[:, 1:], scored / scored.sum(1, keepdim=True)


def diffusion(tokens, starts, ratio, generator):
    """Masked diffusion, arXiv 2510.09885 eq. 1, weighted as in `corrupt`. Position i predicts token i."""
    hidden, weights = corrupt(content(tokens, starts), ratio, generator)
    return tokens.masked_fill(hidden, MARKS.mask), tokens, weights


def with_response(prompts, tokens, positions):
    """Prompts and documents (B, T) -> rows (B, 2T): prompt, then the document with [answer] instead of [doc].

    `positions`, (B,) or (B, n), count from a document's beginning; the returned ones from its row's, T more.
    In training these are starts, in an exam the places to fill. As `ar` scores nothing before a start, the
    prompt is only read: a loss on it would teach to write masks."""
    response = tokens.clone()
    response[:, 0] = MARKS.answer
    return torch.cat((prompts, response), dim=1), positions + tokens.size(1)


def masked(tokens, starts, ratio, generator):
    """Masked fine-tuning of a causal model, eq. 2: -1/L sum_i log p(x_i | x', x_<i). All of the response is
    scored, even what the prompt shows."""
    hidden, _ = corrupt(content(tokens, starts), ratio, generator)
    prompts = tokens.masked_fill(hidden, MARKS.mask)
    rows, response_starts = with_response(prompts, tokens, starts)  # (B, 2T), (B,)
    return ar(rows, response_starts)


def random_prompt(tokens, starts, ratio=None, generator=None):
    """The paper's control for `masked`: a prompt of the same length, made of random words."""
    prompts = torch.where(content(tokens, starts), random_words(tokens.shape, generator), tokens)
    return ar(*with_response(prompts, tokens, starts))


def random_words(shape, generator):  # the words have the last ids
    return torch.randint(TOKENIZER.n_vocab - len(WORDS), TOKENIZER.n_vocab, shape, generator=generator)


def loss(model, inputs, targets, weights):
    """sum(weights x cross-entropy) / B, in nats per token: a weighted sum in each row, then their mean."""
    if inputs.is_cuda:  # logits everywhere, (BT, V): recordings (model.py) need shapes that never change
        logits, targets, weights = model(inputs).flatten(0, 1), targets.flatten(), weights.flatten()
    else:  # only where they count, (S, V)
        at = weights > 0
        logits, targets, weights = model(inputs, at), targets[at], weights[at]
    nll = F.cross_entropy(logits.float(), targets, reduction="none")
    return (nll * weights).sum() / len(inputs)


# -----------------------------------------------------------------------------
# Decoders fill the `places` (B, n), ascending in each row, of tokens (B, T). They are generators: after each
# step they yield all tokens, with one more place filled in every row. Those that put a prompt in front yield
# (B, 2T): prompt, then document.

def logits_of_words(model, tokens, at):
    """(S, V) float32 logits where `at` is true. All marks but [end] are ruled out: they are never answers."""
    logits = model(tokens, at).float()
    logits[:, [mark for mark in MARKS if mark != MARKS.end]] = -torch.inf
    return logits


@torch.no_grad()
def decode_ar(model, tokens, places):
    """Greedy, from left to right: the most likely next token."""
    for place in places.split(1, dim=1):  # (B, 1)
        at = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, place - 1, True)  # the token before it
        best = logits_of_words(model, tokens, at).argmax(-1, keepdim=True)  # (B, 1)
        tokens = tokens.scatter(1, place, best)
        yield tokens


@torch.no_grad()
def decode_diffusion(model, tokens, places):
    """Mask the places, then fill first the one the model is surest of; what is filled stays.

    One token per step makes this an autoregressive model whose order depends on what is already revealed; two
    per step would be chosen without seeing each other.
    """
    tokens = tokens.scatter(1, places, MARKS.mask)
    at = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, places, True)
    for _ in range(places.size(1)):
        logits = logits_of_words(model, tokens, at).view(*places.shape, -1)  # (B, n, V): `at` goes row by row
        confidence, best = logits.log_softmax(-1).max(-1)  # (B, n): the best token of each place
        filled = tokens.gather(1, places) != MARKS.mask  # (B, n)
        surest = confidence.masked_fill(filled, -torch.inf).argmax(1, keepdim=True)  # (B, 1): which place
        tokens = tokens.scatter(1, places.gather(1, surest), best.gather(1, surest))
        yield tokens


def decode_masked(model, tokens, places):
    """The document with its blanks is the prompt; the same blanks of the response are filled as in `ar`."""
    return decode_ar(model, *with_response(tokens, tokens, places))


def decode_random_prompt(model, tokens, places):
    """The same after a prompt of random words; the same words for every row."""
    words = random_words(tokens.shape[1:], torch.Generator().manual_seed(0)).to(tokens.device)  # (T,)
    text = content(tokens, torch.ones_like(places[:, 0]))  # starts of 1: all but the first mark
    prompts = torch.where(text, words, tokens)
    return decode_ar(model, *with_response(prompts, tokens, places))


class Mode(NamedTuple):
    """All that differs between two values of --mode."""
    about: str                  # for --help
    objective: Callable         # for documents in fine-tuning
    ratio: str | float | None   # the share to hide, unless --mask_ratio gives another; None: takes none
    base: str                   # the mode of pretraining, and of all questions, in training and exam
    causal: bool                # does a position see only what comes before it? the same as its base
    decode: Callable            # fills the blanks of a document


MODES = {
    "ar": Mode("next token", ar, None, "ar", True, decode_ar),
    "diffusion": Mode("masked diffusion", diffusion, "uniform", "diffusion", False, decode_diffusion),
    "masked": Mode("masked fine-tuning of a causal model", masked, 0.75, "ar", True, decode_masked),
    "random_prompt": Mode("the control of masked: random words for a prompt", random_prompt, None, "ar", True,
                          decode_random_prompt),
}


def picture(objective, row, ratio, generator):
    """Lines of text: a row as an objective feeds it, and under each token what is asked there. `masked`
    doubles the row: then the response is under its prompt, token under token."""
    tokens, starts = torch.tensor([row[0]]), torch.tensor([row[1]])
    inputs, targets, weights = (x[0].tolist() for x in objective(tokens, starts, ratio, generator))
    asked = [word if weight else "" for word, weight in zip(words_of(targets), weights)]
    T, lines = tokens.size(1), []
    for start in range(0, len(inputs), T):
        lines.append(["in   ", *words_of(inputs[start:start + T])])
        if any(asked[start:start + T]):
            lines.append(["asked", *asked[start:start + T]])
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    return ["    " + " ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip()
            for line in lines]


if __name__ == "__main__":
    rows = {"document": document_row("Curtis Chase Emley comes from Elkton."),
            "question": question_row("Who was born in Elkton?", "Curtis Chase Emley")}
    for name, mode in MODES.items():
        base = MODES[mode.base]
        print(f"--mode {name}: {mode.about}")
        for kind, trained_as in (("document", mode), ("question", base)):
            rng = torch.Generator().manual_seed(10)
            lines = picture(trained_as.objective, rows[kind], trained_as.ratio, rng)
            print(f"  a {kind}", *lines, sep="\n")
        print("  what the first four positions see")
        for i in range(4):
            print("    " + "# " * (i + 1 if mode.causal else 4))
        print()
