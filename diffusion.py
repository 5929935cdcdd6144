"""
Corruption, the objectives, the loss they share, and the decoders.

`masked` is `ar` on a longer row: a document full of holes, and then the whole document, which alone is
scored. What goes in, and under each token what is asked there (both halves are padded to one length, not
shown here):

    in    [doc]    [mask] [mask] [mask] [mask] from   Elkton [mask] [mask]
    in    [answer] Curtis Chase  Emley  comes  from   Elkton .
    asked Curtis   Chase  Emley  comes  from   Elkton .      [end]

An objective maps clean documents to (inputs, targets, weights). Let x be the L tokens of a document (after
[doc], and with its [end]), h the set of the k hidden positions, and x' the same with [mask] at those:

    ar          -1/L sum_i         log p(x_i | x_<i)        every next token, from what comes before it
    diffusion   -1/k sum_{i in h}  log p(x_i | x')          the hidden tokens, from both sides
    masked      -1/L sum_i         log p(x_i | x', x_<i)    `ar`, but with x' as a prompt

So a causal model, too, learns a fact in every direction: whatever was hidden must be recalled from the rest.
With `ar` it does not: on a text that starts with the name it learns p(name) and p(facts | name), but
p(name | facts) is not in its loss.

    python diffusion.py        print what goes into the model and, under each token, what it must predict
    python train.py --mode masked --mask_ratio 0 1

Shapes: tokens (B, T), of documents or questions padded on the right; learned (B, T) bool, true where
something may be hidden and scored. In training, randomness comes from `generator` alone.
"""
from inspect import signature
from itertools import zip_longest
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from data import MARKS, TOKENIZER, WORDS, document_row, question_row, stack, words_of

# -----------------------------------------------------------------------------
# Corruption

def corrupt(learned, ratio, generator):
    """Choose which of the `learned` (B, T) positions to hide. `ratio`: (low, high); for each row a share t is
    drawn evenly between them, and ceil(t L) of its L tokens are hidden.

    Returns hidden (B, T) bool and weights (B, T) float, which `diffusion` alone uses: 1 / k for each of the k
    hidden tokens of a row, so that the row's loss is M_k, their mean cross-entropy. Why? Reveal a text one
    token at a time, in random order. With two tokens, a and b, the two orders cost

        -log p(a) - log p(b | a)    and    -log p(b) - log p(a | b);    their mean is  E[M_2] + E[M_1].

    With L tokens, while k are hidden, each may be the next, so the next one costs M_k on average:

        mean over all orders of -log p(x)  =  E[M_L] + ... + E[M_1]  =  L x mean over k of E[M_k]

    With k drawn evenly from 1..L, which is `ratio` (0, 1), one row estimates that mean: the loss per token,
    comparable with `ar`'s. (This is the negative ELBO: it bounds -log p(x) of the mixture of all orders.)
    The paper's t is in .05 .. .95, weighted 1/t (eq. 1): that, or (.05, .95) here, is *not* the ELBO.
    """
    low, high = ratio
    t = low + (high - low) * torch.rand(len(learned), 1, generator=generator)  # (B, 1); a schedule goes here
    assert 0 <= t.min() and t.max() <= 1, "corrupt: a share t of tokens to hide must lie in 0 .. 1"
    L = learned.sum(1, keepdim=True)                                           # (B, 1)
    k = (t * L - 1e-4).ceil().long()  # (B, 1); a hair less, for .6 x 25 may be 15.000001
    draws = torch.rand(learned.shape, generator=generator, dtype=torch.float64)  # too fine for ties
    draws = draws.masked_fill(~learned, 2)                                     # (B, T), the given comes last
    kth = draws.sort(dim=1).values.gather(1, (k - 1).clamp(min=0))             # (B, 1), the k-th smallest
    hidden = learned & (draws <= kth) & (k > 0)                                # (B, T)
    return hidden, hidden / k.clamp(min=1)


# -----------------------------------------------------------------------------
# Objectives: (tokens, learned, generator[, ratio]) -> inputs, targets, weights
#
# `tokens` are documents or questions; of a question only its answer is learned. (Questions only meet `ar` and
# `diffusion`, the objectives of the two bases: see `Mode`.) --mask_ratio is for documents, and for objectives
# with a `ratio`; questions keep the default.

def ar(tokens, learned, generator=None):
    """Next-token prediction: -1/L sum_i log p(x_i | x_<i), over what is learned of each row."""
    scored = learned[:, 1:]
    return tokens[:, :-1], tokens[:, 1:], scored / scored.sum(1, keepdim=True)


def diffusion(tokens, learned, generator, ratio=(0, 1)):
    """Masked diffusion, arXiv 2510.09885 eq. 1, weighted as in `corrupt`. Position i predicts token i."""
    hidden, weights = corrupt(learned, ratio, generator)
    return tokens.masked_fill(hidden, MARKS.mask), tokens, weights


def with_response(prompts, tokens, places):
    """Prompts and documents (B, T) -> rows (B, 2T): prompt, then the document with [answer] instead of [doc].
    Padding between them is never attended.

    `places` (B, T) bool are positions of the documents: in training `learned`, in an exam the blanks. In what
    is returned (B, 2T) they stand in the second half. The prompt has none, so it is only read: a loss on it
    would teach to write masks."""
    response = tokens.clone()
    response[:, 0] = MARKS.answer
    none = torch.zeros_like(places)
    return torch.cat((prompts, response), dim=1), torch.cat((none, places), dim=1)


def masked(tokens, learned, generator, ratio=(0.75, 0.75)):
    """Masked fine-tuning of a causal model, eq. 2: -1/L sum_i log p(x_i | x', x_<i). All of the response is
    scored, even what the prompt shows, for in an exam, too, it is written from its first word on."""
    hidden, _ = corrupt(learned, ratio, generator)
    prompts = tokens.masked_fill(hidden, MARKS.mask)
    return ar(*with_response(prompts, tokens, learned))


def with_random_words(tokens, shape, generator):
    """Tokens (B, T) with a random word in place of each, but for the first mark and padding. `shape`: (B, T)
    or, for the same words in every row, (T,)."""
    words = torch.randint(TOKENIZER.n_vocab - len(WORDS), TOKENIZER.n_vocab, shape, generator=generator)
    text = tokens != MARKS.pad
    text[:, 0] = False
    return torch.where(text, words.to(tokens.device), tokens)


def random_prompt(tokens, learned, generator):
    """The paper's control for `masked`: a prompt of the same length, made of random words."""
    prompts = with_random_words(tokens, tokens.shape, generator)
    return ar(*with_response(prompts, tokens, learned))


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
# Decoders fill the places `blank` (B, T) bool of tokens (B, T). They are generators: after each step they
# yield all tokens. Those that put a prompt in front yield (B, 2T): prompt, then document.

def logits_of_words(model, tokens, at):
    """(S, V) float32 logits where `at` is true. All marks but [end] are ruled out: they are never answers."""
    logits = model(tokens, at).float()
    logits[:, [mark for mark in MARKS if mark != MARKS.end]] = -torch.inf
    return logits


@torch.no_grad()
def decode_ar(model, tokens, blank):
    """Greedy, from left to right: the most likely next token."""
    while blank.any():
        now = blank & (blank.cumsum(1) == 1)  # (B, T): each row's first blank, if it has one left
        before = now.roll(-1, dims=1)         # the place before it predicts it
        best = logits_of_words(model, tokens, before).argmax(-1)  # (S,)
        tokens = tokens.masked_scatter(now, best)
        blank = blank & ~now
        yield tokens


def surest(confidence):
    """(B, T) -> bool: in each row the one place where the model is surest. To fill two a step, change the
    next line; with `| (confidence > .9)` it adds all places above that. Only blanks are ever filled."""
    return F.one_hot(confidence.argmax(1), confidence.size(1)).bool()


@torch.no_grad()
def decode_diffusion(model, tokens, blank):
    """Mask the blanks, then fill first the one the model is surest of; what is filled stays.

    One token per step makes this an autoregressive model whose order depends on what is already revealed; two
    per step would be chosen without seeing each other.
    """
    tokens = tokens.masked_fill(blank, MARKS.mask)
    while blank.any():
        p, best = logits_of_words(model, tokens, blank).softmax(-1).max(-1)  # (S,): of each blank
        confidence = torch.zeros(blank.shape, device=p.device).masked_scatter(blank, p)
        words = tokens.masked_scatter(blank, best)
        now = surest(confidence) & blank
        tokens = torch.where(now, words, tokens)
        blank = blank & ~now
        yield tokens


def decode_masked(model, tokens, blank):
    """The document with its blanks is the prompt; the same blanks of the response are filled as in `ar`."""
    return decode_ar(model, *with_response(tokens.masked_fill(blank, MARKS.mask), tokens, blank))


def decode_random_prompt(model, tokens, blank):
    """The same after a prompt of random words; the same words for every row."""
    prompts = with_random_words(tokens, tokens.shape[1:], torch.Generator().manual_seed(0))
    return decode_ar(model, *with_response(prompts, tokens, blank))


class Mode(NamedTuple):
    """All that differs between two values of --mode."""
    about: str                  # for --help
    objective: Callable         # for documents in fine-tuning
    base: str                   # the mode of pretraining, and of all questions, in training and exam
    decode: Callable            # fills the blanks of a document


MODES = {
    "ar": Mode("next token", ar, "ar", decode_ar),
    "diffusion": Mode("masked diffusion", diffusion, "diffusion", decode_diffusion),
    "masked": Mode("masked fine-tuning of a causal model", masked, "ar", decode_masked),
    "random_prompt": Mode("the control of masked: random words for a prompt", random_prompt, "ar",
                          decode_random_prompt),
}
CAUSAL = {"ar": True, "diffusion": False}  # the two bases: does a position see only what comes before it?


def ratio_of(mode):
    """The share to hide that the mode's objective has by default; None if it takes none."""
    parameter = signature(MODES[mode].objective).parameters.get("ratio")
    return parameter and parameter.default


# -----------------------------------------------------------------------------
# From here on: no idea of the paper; skip it at first. Pictures of rows.

def picture(objective, row, generator):
    """Lines of text: a row as an objective feeds it, and under each token what is asked there. `masked`
    doubles the row: then the response is under its prompt, token under token."""
    tokens, learned = stack([row])
    inputs, targets, weights = (x[0].tolist() for x in objective(tokens, learned, generator))
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
        print(f"--mode {name}: {mode.about}")
        for kind, trained_as in (("document", mode), ("question", MODES[mode.base])):
            generator = torch.Generator().manual_seed(10)
            print(f"  a {kind}", *picture(trained_as.objective, rows[kind], generator), sep="\n")
        print("  what the first four positions see")
        for i in range(4):
            print("    " + "# " * (i + 1 if CAUSAL[mode.base] else 4))
        print()
