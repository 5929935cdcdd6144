"""
Corruption, the objectives, the loss they share, the two decoders, and how likely an answer is.

An objective maps clean rows to (inputs, targets, weights). `Curtis studied Law [end]`, two tokens masked
([end] can be too); `..` is padding up to the longest row of the corpus, so that a response always starts T
tokens behind its prompt:

    ar         inputs   [doc]  Curtis  studied Law            every next token, from what stands before it
               targets  Curtis studied Law     [end]
    diffusion  inputs   [doc]  [mask]  studied [mask] [end]   the masked tokens, from both sides
               targets         Curtis          Law
    masked     inputs   [doc] [mask] studied [mask] [end] .. [answer] Curtis  studied Law
               targets                                       Curtis   studied Law     [end]

`masked` is `ar` on a longer row: a document full of holes is a question, and the whole document its answer.
So a causal model too learns a fact from every direction: whatever was masked must be recalled from the rest.
`MODES`, at the end, is the one table of what differs between the modes.

    python train.py --mode masked --mask_ratio uniform

Shapes: tokens (B, T), padded on the right; starts (B,), where a row's text or answer starts; everything
before it is given. `marks` holds the ids of the special tokens. Randomness comes from `generator` alone.
"""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# Corruption


def content(tokens, starts, marks):
    """(B, T) bool: the positions an objective may hide or score, from the start to the last real token."""
    position = torch.arange(tokens.size(1), device=tokens.device)
    return (position >= starts[:, None]) & (tokens != marks.pad)


def corrupt(allowed, ratio, generator):
    """Choose which of the `allowed` (B, T) positions to hide; L of them in a row.

    ratio "uniform"   k ~ U{1..L} in each row, then k positions at random, all sets alike
          a float t   round(t L) positions, and at least one if t > 0
          "paper"     t ~ U(.05, .95) in each row, then each position on its own with probability t (eq. 1)

    Returns (hidden (B, T) bool, weights (B, T) float). The weights are 1 / k, so that a row's loss is the
    mean over its hidden tokens, and the mean of that over "uniform" is -ELBO / L. For "paper" they are
    1 / (t L), which is *not* that: no t lies near 0 or 1.
    """
    B, T = allowed.shape
    draw = lambda *shape: torch.rand(shape, generator=generator).to(allowed.device)
    L = allowed.sum(1, keepdim=True)  # (B, 1)
    number = draw(B, T).masked_fill(~allowed, 2.0)  # the smallest are hidden, a 2 never
    if ratio == "paper":
        t = 0.05 + 0.9 * draw(B, 1)
        hidden = number < t
        return hidden, hidden / (t * L)
    if ratio == "uniform":
        k = (draw(B, 1) * L).long() + 1
    else:
        k = (ratio * L).round().long().clamp(min=int(ratio > 0))
    rank = number.argsort(dim=1).argsort(dim=1)  # how many numbers in the row are smaller
    hidden = (rank < k) & allowed
    return hidden, hidden / k.clamp(min=1)


# -----------------------------------------------------------------------------
# Objectives: (tokens, starts, marks, ratio, generator) -> inputs, targets, weights


def ar(tokens, starts, marks, ratio=None, generator=None):
    """Next-token prediction: -1/L sum_i log p(x_i | x_<i), over the content of each row."""
    scored = content(tokens, starts, marks)[:, 1:]
    return tokens[:, :-1], tokens[:, 1:], scored / scored.sum(1, keepdim=True).clamp(min=1)


def diffusion(tokens, starts, marks, ratio, generator):
    """Masked diffusion, arXiv 2510.09885 eq. 1: -sum_{i hidden} w log p(x_i | the rest of x), unshifted."""
    hidden, weights = corrupt(content(tokens, starts, marks), ratio, generator)
    return tokens.masked_fill(hidden, marks.mask), tokens, weights


def masked(tokens, starts, marks, ratio, generator):
    """Masked fine-tuning of a causal model, eq. 2: -1/L sum_i log p(x_i | corrupted x, x_<i)."""
    hidden, _ = corrupt(content(tokens, starts, marks), ratio, generator)
    return recite(tokens.masked_fill(hidden, marks.mask), tokens, starts, marks)


def noise(tokens, starts, marks, ratio, generator):
    """The paper's control for `masked`: a prompt as long, but of random tokens: any but marks, up to
    the highest in the batch."""
    random = torch.randint(len(marks), int(tokens.max()) + 1, tokens.shape, generator=generator)
    hidden = content(tokens, starts, marks)
    return recite(torch.where(hidden, random.to(tokens.device), tokens), tokens, starts, marks)


def recite(prompts, tokens, starts, marks):
    """`ar` on rows (B, 2T): [doc] prompt [end] padding, then [answer] clean text [end] padding, of which the
    clean text is scored. A question is a prompt with an answer already: it is scored where it stands."""
    document = tokens[:, :1] == marks.doc  # (B, 1)
    response = tokens.masked_fill(tokens == marks.doc, marks.answer).masked_fill(~document, marks.pad)
    rows = torch.cat((torch.where(document, prompts, tokens), response), dim=1)
    return ar(rows, starts + tokens.size(1) * document[:, 0], marks)


def token_nll(model, inputs, targets, at):
    """-log p of the targets, in nats, where `at` (B, T) is true: (S,). Logits are made nowhere else."""
    return F.cross_entropy(model(inputs, at).float(), targets[at], reduction="none")


def loss(model, inputs, targets, weights):
    """sum(weights x cross-entropy) / B: nats a token, averaged within each row and then over rows."""
    at = weights > 0
    return (token_nll(model, inputs, targets, at) * weights[at]).sum() / len(inputs)


# -----------------------------------------------------------------------------
# Decoders: rows (B, T) of questions whose canvas is to be filled -> answers (B, canvas)


def never(logits, marks):
    """Rule out every mark but the end: a mask, say, is never an answer."""
    forbidden = [i for i in marks if i != marks.end]
    return logits.index_fill(-1, torch.tensor(forbidden, device=logits.device), -torch.inf)


@torch.no_grad()
def decode_ar(model, tokens, starts, canvas, marks, watch=None):
    """Greedy: the most likely next token, `canvas` times. `watch(rows)` is called after each."""
    span = starts[:, None] + torch.arange(canvas, device=tokens.device)  # (B, canvas)
    for place in span.split(1, dim=1):  # (B, 1)
        at = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, place - 1, True)
        best = never(model(tokens, at), marks).argmax(-1, keepdim=True)  # (B, 1)
        tokens = tokens.scatter(1, place, best)
        if watch:
            watch(tokens)
    return tokens.gather(1, span)


@torch.no_grad()
def decode_diffusion(model, tokens, starts, canvas, marks, watch=None):
    """Fill a canvas of masks one token a step, the most confident one first.

    One token a step, in an order that depends only on what is revealed, is a proper autoregressive model; two
    a step would be drawn as if they were independent. `watch(rows)` is called after each.
    """
    span = starts[:, None] + torch.arange(canvas, device=tokens.device)  # (B, canvas)
    tokens = tokens.scatter(1, span, marks.mask)
    at = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, span, True)
    for _ in range(canvas):
        logits = never(model(tokens, at), marks).view(len(tokens), canvas, -1).float()
        confidence, best = logits.log_softmax(-1).max(-1)  # (B, canvas)
        revealed = tokens.gather(1, span) != marks.mask
        choice = confidence.masked_fill(revealed, -torch.inf).argmax(1, keepdim=True)  # (B, 1)
        tokens = tokens.scatter(1, span.gather(1, choice), best.gather(1, choice))
        if watch:
            watch(tokens)
    return tokens.gather(1, span)


# -----------------------------------------------------------------------------
# Likelihood: how probable is the answer that stands in the canvas? No decoding, (B, T) rows -> (B,) log p


@torch.no_grad()
def likelihood_ar(model, tokens, starts, marks):
    """log p(answer | question) = sum_i log p(x_i | x_<i) over the canvas."""
    inputs, targets, weights = ar(tokens, starts, marks)
    return -token_nll(model, inputs, targets, weights > 0).view(len(tokens), -1).sum(1)


@torch.no_grad()
def likelihood_diffusion(model, tokens, starts, marks):
    """The same with masks filled in from left to right, an order in which all answers' p sum to 1 as well."""
    offset = torch.arange(tokens.size(1), device=tokens.device) - starts[:, None]  # (B, T) 0 at the start
    canvas = int(content(tokens, starts, marks)[0].sum())
    hide = lambda i: tokens.masked_fill((offset >= i) & (offset < canvas), marks.mask)
    return -sum(token_nll(model, hide(i), tokens, offset == i) for i in range(canvas))


# -----------------------------------------------------------------------------


class Mode(NamedTuple):
    """All that differs between two values of --mode."""
    objective: Callable     # (tokens, starts, marks, ratio, generator) -> inputs, targets, weights
    ratio: str | float | None   # how much is masked if --mask_ratio does not say; None if nothing ever is
    causal: bool            # what the model may see
    school: str             # the mode that trained its base model
    decode: Callable        # (model, tokens, starts, canvas, marks, watch) -> (B, canvas)
    likelihood: Callable    # (model, tokens, starts, marks) -> (B,)


MODES = {
    "ar": Mode(ar, None, True, "ar", decode_ar, likelihood_ar),
    "diffusion": Mode(diffusion, "uniform", False, "diffusion", decode_diffusion, likelihood_diffusion),
    "masked": Mode(masked, 0.75, True, "ar", decode_ar, likelihood_ar),
    "noise": Mode(noise, None, True, "ar", decode_ar, likelihood_ar),
}
