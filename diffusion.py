"""
Corruption, the objectives, the loss they share, and the decoders.

An objective maps clean documents to (inputs, targets, weights). With h the hidden tokens of a document x:

    ar          -1/L sum_i          log p(x_i | x_<i)         every next token, from what stands before it
    diffusion   -1/k sum_{i in h}   log p(x_i | x without h)  the k hidden tokens, from both sides
    masked      -1/L sum_i          log p(x_i | x without h, x_<i)       `ar` behind a masked copy of the text

`masked` is `ar` on a longer row: a document full of holes is a question, and the whole document its answer.
So a causal model too learns a fact from every direction: whatever was hidden must be recalled from the rest.
`ar` itself never does: from a text that starts with the name it learns p(name) and p(facts | name), and
p(name | facts) is no part of its loss.
The table `MODES` has all that differs between the modes.

    python diffusion.py        draws what goes in and what is asked, token under token, in each mode
    python train.py --mode masked --mask_ratio uniform

Shapes: tokens (B, T), padded on the right; starts (B,), where a row's text or answer starts; everything
before it is given. In training, randomness comes from `generator` alone.
"""
from itertools import zip_longest
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from data import MARKS, TOKENIZER, WORDS, document_row, pad_rows, question_row, words_of

# -----------------------------------------------------------------------------
# Corruption


RATIOS = {  # u ~ U(0, 1), one number a row -> t, the share of the row to hide
    "uniform": lambda u: u,             # k = ceil(t L) of L tokens, so k ~ U{1..L}
    "paper": lambda u: 0.05 + 0.9 * u,  # a coin for each token, which hides it with probability t
}


def content(tokens, starts):
    """(B, T) bool: the positions an objective may hide or score, from the start to the last real token."""
    position = torch.arange(tokens.size(1), device=tokens.device)
    return (position >= starts[:, None]) & (tokens != MARKS.pad)


def corrupt(allowed, ratio, generator):
    """Choose which of the `allowed` (B, T) positions to hide. `ratio`: a name in RATIOS, or a share t.

    Returns (hidden (B, T) bool, weights (B, T) float, for `diffusion`). With k of L tokens hidden each weighs
    1 / k: a row's loss is the mean over its hidden tokens. Why? Reveal a text token by token, in a random
    order. While k are hidden, the next is any of them, each as likely: it costs CE / k on average, CE being
    the *sum* of the cross-entropies of all k. And every k from L to 1 comes once:

        mean over all orders of -log p(x)  =  sum over k of E[CE / k]  =  L x mean over k ~ U{1..L} of CE / k

    So with k drawn evenly the loss is -ELBO / L, comparable with that of `ar`. The paper hides each token
    with probability t and weighs it 1 / t (eq. 1; per token, 1 / (t L)). For t ~ U(0, 1) that is the same on
    average, but a small t weighs a lot; for its own t, near neither 0 nor 1, it is *not* the ELBO.
    """
    B, T = allowed.shape
    u = torch.rand(B, 1, generator=generator).to(allowed.device)        # (B, 1)
    lots = torch.rand(B, T, generator=generator).to(allowed.device)     # (B, T), a number for each position
    lots = lots.masked_fill(~allowed, torch.inf)
    L = allowed.sum(1, keepdim=True)                                    # (B, 1)
    if ratio in RATIOS:
        t = RATIOS[ratio](u)                                            # (B, 1)
    else:
        t = torch.full_like(u, ratio * 0.999999)  # so that rounding never hides one token more
    if ratio == "paper":
        hidden = lots < t
        return hidden, hidden / (t * L)
    k = (t * L).ceil()                                                  # (B, 1)
    rank = lots.argsort(dim=1).argsort(dim=1)                           # (B, T): 0 for the row's smallest lot
    hidden = rank < k
    return hidden, hidden / k.clamp(min=1)


# -----------------------------------------------------------------------------
# Objectives: (tokens, starts, ratio, generator) -> inputs, targets, weights
#
# They get documents. Questions need no objective of their own: whatever the mode, they are trained as the
# base was (`ar`, or `diffusion` with "uniform"), which scores the answer alone, since it starts there.


def ar(tokens, starts, ratio=None, generator=None):
    """Next-token prediction: -1/L sum_i log p(x_i | x_<i), over the content of each row."""
    scored = content(tokens, starts)[:, 1:]
    return tokens[:, :-1], tokens[:, 1:], scored / scored.sum(1, keepdim=True)


def diffusion(tokens, starts, ratio, generator):
    """Masked diffusion, arXiv 2510.09885 eq. 1: -sum_{i hidden} w log p(x_i | the rest of x), unshifted."""
    hidden, weights = corrupt(content(tokens, starts), ratio, generator)
    return tokens.masked_fill(hidden, MARKS.mask), tokens, weights


def masked(tokens, starts, ratio, generator):
    """Masked fine-tuning of a causal model, eq. 2: -1/L sum_i log p(x_i | corrupted x, x_<i). All of the
    response is scored, also what the prompt shows."""
    hidden, _ = corrupt(content(tokens, starts), ratio, generator)
    return ar(*with_response(tokens.masked_fill(hidden, MARKS.mask), tokens, starts))


def random_prompt(tokens, starts, ratio=None, generator=None):
    """The paper's control for `masked`: a prompt as long, but of random words."""
    words = random_words(tokens.shape, generator).to(tokens.device)
    return ar(*with_response(torch.where(content(tokens, starts), words, tokens), tokens, starts))


def random_words(shape, generator):
    return torch.randint(TOKENIZER.n_vocab - len(WORDS), TOKENIZER.n_vocab, shape, generator=generator)


def with_response(prompts, tokens, positions):
    """Prompts and documents (B, T) -> rows (B, 2T): prompt, then [answer] in the place of [doc], document.

    Also moves `positions` of the document, (B,) or (B, n), to where they are in the row: the starts of the
    text in training, blanks in an exam. `ar` scores from the start: the prompt carries no loss, since it is
    what is *given*; a loss on it would train the model to write masks."""
    response = tokens.clone()
    response[:, 0] = MARKS.answer
    return torch.cat((prompts, response), dim=1), positions + tokens.size(1)


def loss(model, inputs, targets, weights):
    """sum(weights x cross-entropy) / B: nats a token, averaged over rows and, by the weights, within each."""
    at = weights > 0  # logits are made nowhere else
    nll = F.cross_entropy(model(inputs, at).float(), targets[at], reduction="none")  # (S,)
    return (nll * weights[at]).sum() / len(inputs)


# -----------------------------------------------------------------------------
# Decoders fill the places (B, n) of rows (B, T) that are blank, one in each row a step, and yield the rows
# after each step. Behind a prompt the rows are (B, 2T), and their last T tokens are what was asked for.


def logits_of_words(model, tokens, at):
    """(S, V) float32 logits where `at` is true; every mark but the end is ruled out: no mask is an answer."""
    logits = model(tokens, at).float()
    logits[:, [mark for mark in MARKS if mark != MARKS.end]] = -torch.inf
    return logits


@torch.no_grad()
def decode_ar(model, tokens, places):
    """Greedy, from left to right: the most likely next token."""
    for place in places.split(1, dim=1):  # (B, 1)
        at = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, place - 1, True)
        best = logits_of_words(model, tokens, at).argmax(-1, keepdim=True)  # (B, 1)
        tokens = tokens.scatter(1, place, best)
        yield tokens


@torch.no_grad()
def decode_diffusion(model, tokens, places):
    """Mask the places, then fill them one a step, the most confident one first; what is written stays.

    One token a step, in an order that depends only on what is revealed, is a proper autoregressive model; two
    a step would be drawn as if they were independent.
    """
    tokens = tokens.scatter(1, places, MARKS.mask)
    at = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, places, True)
    for _ in range(places.size(1)):
        logits = logits_of_words(model, tokens, at).view(*places.shape, -1)
        confidence, best = logits.log_softmax(-1).max(-1)  # (B, n)
        written = tokens.gather(1, places) != MARKS.mask
        choice = confidence.masked_fill(written, -torch.inf).argmax(1, keepdim=True)  # (B, 1)
        tokens = tokens.scatter(1, places.gather(1, choice), best.gather(1, choice))
        yield tokens


def decode_masked(model, tokens, places):
    """The row of a document with blanks is the prompt of `masked`; the blanks of the response are filled."""
    return decode_ar(model, *with_response(tokens, tokens, places))


def decode_random_prompt(model, tokens, places):
    """The same behind random words, as in training; the same words for every row."""
    words = random_words(tokens.shape[1:], torch.Generator().manual_seed(0)).to(tokens.device)  # (T,)
    text = content(tokens, torch.ones_like(places[:, 0]))
    return decode_ar(model, *with_response(torch.where(text, words, tokens), tokens, places))


# -----------------------------------------------------------------------------


class Mode(NamedTuple):
    """All that differs between two values of --mode."""
    about: str              # for --help
    objective: Callable     # what it makes of documents in fine-tuning
    ratio: str | float | None   # how much is masked if --mask_ratio does not say; None if nothing ever is
    base: str               # the mode that pretrains its base, and trains and decodes questions
    causal: bool            # what the model may see: the same as its base
    decode: Callable        # fills the blanks of a document


MODES = {
    "ar": Mode("next token", ar, None, "ar", True, decode_ar),
    "diffusion": Mode("masked diffusion", diffusion, "uniform", "diffusion", False, decode_diffusion),
    "masked": Mode("masked fine-tuning of a causal model", masked, 0.75, "ar", True, decode_masked),
    "random_prompt": Mode("the control of masked: random words for a prompt", random_prompt, None, "ar", True,
                          decode_random_prompt),
}


# -----------------------------------------------------------------------------


def picture(objective, tokens, starts, ratio, generator):
    """Lines of text: what an objective makes of one row (1, T), and under each token what it is asked there.
    `masked` doubles the row: then the response stands under its prompt, token under token."""
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


def main():
    rows = {"document": pad_rows([document_row("Curtis Chase Emley comes from Elkton.")]),
            "question": pad_rows([question_row("Who was born in Elkton?", "Curtis Chase Emley")])}
    for name, mode in MODES.items():
        base = MODES[mode.base]
        print(f"--mode {name}: {mode.about}")
        for kind, (objective, ratio) in {"document": (mode.objective, mode.ratio),
                                         "question": (base.objective, base.ratio)}.items():
            print(f"  a {kind}", *picture(objective, *rows[kind], ratio, torch.Generator().manual_seed(10)),
                  sep="\n")
        print("  what the first four positions see")
        for i in range(4):
            print("    " + "# " * (i + 1 if mode.causal else 4))
        print()


if __name__ == "__main__":
    main()
