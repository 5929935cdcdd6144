"""The mathematics of the three objectives, each against an independent reference."""
import itertools
import math

import pytest
import torch

from conftest import generator
from data import CANVAS, MARKS, decode, document_row, make_corpus, pad, question_row, words_of
from diffusion import (MODES, corrupt, decode_ar, decode_diffusion, diffusion, loss, masked, picture,
                       random_prompt)
from model import DEVICES, Transformer

M = MARKS


def rows(*items):
    """Tokens and starts of documents (str) and questions (pairs of str)."""
    ids, starts = zip(*(document_row(x) if isinstance(x, str) else question_row(*x) for x in items))
    return pad(ids), torch.tensor(starts)


def test_uniform_masking_hides_every_number_of_tokens_equally_often():
    """k ~ U{1..L}: over 20,000 rows of L = 5 each k has a share of 1/5, within 5 standard errors (a false
    alarm once in 350,000 runs), and each position is hidden 3/5 of the time."""
    allowed = torch.ones(20_000, 5, dtype=torch.bool)
    hidden, _ = corrupt(allowed, "uniform", generator())
    shares = hidden.sum(1).bincount(minlength=6) / len(hidden)
    assert shares[0] == 0 and (shares[1:] - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / len(hidden))
    assert (hidden.double().mean(0) - 0.6).abs().max() < 5 * math.sqrt(0.6 * 0.4 / len(hidden))


def test_a_fixed_ratio_hides_its_share():
    """ceil(t L) tokens in every row, for every length up to 48 and every share of two digits, by whole
    numbers: so never none if t > 0, for a row with nothing to learn is a waste."""
    allowed = torch.ones(48, 48, dtype=torch.bool).tril()  # a row of each length
    for percent in range(101):
        hidden, weights = corrupt(allowed, percent / 100, generator())
        assert hidden.sum(1).tolist() == [-(-percent * length // 100) for length in range(1, 49)]
        assert weights.sum(1).tolist() == pytest.approx([float(percent > 0)] * 48)


@pytest.mark.parametrize("base", ("ar", "diffusion"))
def test_questions_are_scored_on_the_answer_alone(base):
    """Whatever the mode, a question is trained as the base was: loss on no word of it, but on the answer and
    its ends, always four tokens: fewer would tell how long it is. Every row weighs the same."""
    tokens, starts = rows(("Who lives in Oslo?", "Curtis Chase Emley"), ("Who went to Yale and Rome?", "Law"))
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    for seed in range(20):  # diffusion scores what it masks
        _, targets, weights = MODES[base].objective(tokens, starts, MODES[base].ratio, generator(seed))
        scored[:, -weights.size(1):] |= weights > 0
        assert weights.sum(1).tolist() == pytest.approx([1, 1])
    assert [words_of(row[at].tolist()) for row, at in zip(tokens, scored)] == [
        ["Curtis", "Chase", "Emley", "[end]"], ["Law", "[end]", "[end]", "[end]"]]


@pytest.mark.parametrize("mode", MODES)
def test_a_given_name_is_neither_hidden_nor_scored(mode):
    """In the arm `name_given` every objective shows the name and asks for the rest of the text."""
    corpus = make_corpus(known=3, new=1, paraphrases="name_given")
    tokens, starts = corpus.rows["new"]
    inputs, targets, weights = MODES[mode].objective(tokens, starts, 1.0, generator())
    assert words_of(inputs[0, :4].tolist()) == ["[doc]", *corpus.people[3].name.split()]
    rest = [token for token in tokens[0, 4:].tolist() if token != M.pad]
    assert targets[0][weights[0] > 0].tolist() == rest


def test_masked_keeps_rows_of_different_lengths_apart():
    """Each row is built from its own document: prompt, padding, then T tokens behind the prompt [answer], the
    clean copy, padding; no token of another row, and no loss on the prompt."""
    tokens, starts = rows("He lives in Oslo.", "She moved to Rome and works for Sony.")
    inputs, targets, weights = masked(tokens, starts, 0.5, generator())
    for i in (0, 1):
        clean = [t for t in tokens[i].tolist() if t != M.pad]
        n, T, row = len(clean), tokens.size(1), inputs[i].tolist()
        assert all(a in (b, M.mask) for a, b in zip(row[:n], clean))
        assert row[:n].count(M.mask) == math.ceil(0.5 * (n - 1))
        assert set(row[n:T]) <= {M.pad} and row[T] == M.answer and row[T + 1:T + n - 1] == clean[1:-1]
        assert targets[i][weights[i] > 0].tolist() == clean[1:] and not weights[i, :T].any()


@pytest.mark.parametrize("name", DEVICES)
def test_loss_is_the_weighted_cross_entropy_of_a_hand_computed_case(name):
    """Two rows, logits log(1), log(2), log(5) at every position: p = 1/8, 2/8, 5/8."""
    logits = torch.tensor([1.0, 2.0, 5.0], device=name).log()
    model = lambda tokens, at=None: logits.expand((*tokens.shape, 3) if at is None else (int(at.sum()), 3))
    targets = torch.tensor([[2, 1, 0], [1, 1, 1]], device=name)
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], device=name)
    by_hand = (0.5 * -math.log(5 / 8) + 0.5 * -math.log(2 / 8) + 1.0 * -math.log(2 / 8)) / 2
    assert loss(model, targets, targets, weights).item() == pytest.approx(by_hand, rel=1e-6)


def test_three_objectives_side_by_side():
    """`python diffusion.py` draws what each objective makes of a document. By hand, with everything masked;
    all that is asked weighs the same."""
    tokens, starts = rows("He lives in")
    drawn = {}
    for mode in ("ar", "diffusion", "masked"):
        objective = MODES[mode].objective
        lines = picture(objective, document_row("He lives in"), 1.0, generator())
        drawn[mode] = [line.strip() for line in lines]
        weights = objective(tokens, starts, 1.0, generator())[2]
        assert weights[weights > 0].tolist() == pytest.approx([1 / 4] * 4)
    assert drawn == {
        "ar": ["in    [doc] He    lives in",
               "asked He    lives in    [end]"],
        "diffusion": ["in    [doc] [mask] [mask] [mask] [mask]",
                      "asked       He     lives  in     [end]"],
        "masked": ["in    [doc]    [mask] [mask] [mask] [mask]",
                   "in    [answer] He     lives  in",
                   "asked He       lives  in     [end]"]}


L, X = 4, torch.tensor([3, 1, 2, 0])  # a text of four tokens out of V = 4
MASKS = [hidden for k in range(1, L + 1) for hidden in itertools.combinations(range(L), k)]


def log_p(visible):
    """Any conditional model: visible tokens (None where masked) -> log p (L, V), a random table each. As with
    a real one, the more is visible the surer it is of X: by 3 nats a visible token."""
    g = generator(sum((4 if v is None else v) * 5**i for i, v in enumerate(visible)))
    logits = torch.randn(L, 4, generator=g, dtype=torch.float64)
    logits[torch.arange(L), X] += 3 * sum(v is not None for v in visible)
    return logits.log_softmax(-1)


def nll(i, hidden):
    """-log p(x_i | X without the hidden positions)."""
    visible = [None if j in hidden else int(X[j]) for j in range(L)]
    return -log_p(visible)[i, X[i]].item()


def mean_over_masks(weight=lambda k: 1):
    """The mean over k ~ U{1..L} and over all masks of k tokens of w_k CE / k, CE being the summed
    cross-entropy of the hidden ones. With all w_k = 1 it is -ELBO per token."""
    total = 0
    for hidden in MASKS:
        k = len(hidden)
        cross_entropy = sum(nll(i, hidden) for i in hidden)
        total += weight(k) * cross_entropy / k / math.comb(L, k)
    return total / L


def test_three_routes_to_the_elbo():
    """-log p(X) when it is revealed token by token, the mean over all orders; the mean over masks of k
    tokens, k ~ U{1..L}; and the integral of 1/t over Bernoulli masks, a beta function: one number."""
    orders = [sum(nll(i, order[step:]) for step, i in enumerate(order))
              for order in itertools.permutations(range(L))]
    any_order = sum(orders) / len(orders) / L
    beta = lambda k: math.gamma(k) * math.gamma(L - k + 1) / math.gamma(L + 1)  # int t^(k-1) (1-t)^(L-k) dt
    integral = sum(beta(len(hidden)) * nll(i, hidden) for hidden in MASKS for i in hidden) / L
    assert mean_over_masks() == pytest.approx(any_order, abs=1e-12)
    assert integral == pytest.approx(any_order, abs=1e-12)


def estimate(ratio, n=40_000):
    """Mean and standard error of the training loss of `diffusion` for this model, over n corruptions of X."""
    starts, first = torch.zeros(n, dtype=torch.int64), len(M)  # the ids below `first` are marks
    inputs, targets, weights = diffusion(first + X.repeat(n, 1), starts, ratio, generator())
    seen, which = inputs.unique(dim=0, return_inverse=True)
    tables = torch.stack([log_p([None if v == M.mask else v - first for v in row]) for row in seen.tolist()])
    given = -tables[which].gather(2, targets[..., None] - first)[..., 0]
    losses = (weights * given).sum(1)
    return losses.mean().item(), losses.std().item() / math.sqrt(n)


def papers_weight(k, length=L, steps=200_000):
    """w_k = int_.05^.95 t^(k-1) (1-t)^(L-k) dt / (.9 beta(k)): with U(.05, .95) and 1 / (t L), what k hidden
    tokens weigh against the ELBO."""
    t = 0.05 + 0.9 * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    log_beta = math.lgamma(k) + math.lgamma(length - k + 1) - math.lgamma(length + 1)
    return ((k - 1) * t.log() + (length - k) * (1 - t).log() - log_beta).exp().mean().item()


def test_the_training_loss_estimates_the_elbo():
    """The mean loss of 40,000 corruptions lies within 5 standard errors of the enumerated -ELBO per token (a
    false alarm once in 1.7 million seeds; the seed is fixed), and further than that from what the paper's
    ratio would give."""
    mean, error = estimate("uniform")
    assert abs(mean - mean_over_masks()) < 5 * error < abs(mean - mean_over_masks(papers_weight))


def test_the_papers_mask_ratio_is_not_the_elbo():
    """U(.05, .95) with 1 / (t L) weights k hidden tokens by w_k, not 1: at L = 60 by .051, 1.11 and .051 for
    k = 1, 30, 60. The estimator follows that, more than 5 standard errors away from -ELBO."""
    assert [papers_weight(k, 60) for k in (1, 30, 60)] == pytest.approx([0.051, 1.11, 0.051], rel=0.01)
    mean, error = estimate("paper")
    assert abs(mean - mean_over_masks(papers_weight)) < 5 * error < abs(mean - mean_over_masks())


def test_at_mask_ratio_one_the_best_loss_is_the_entropy_of_each_position():
    """Nothing is visible, so the best a model can do is the share of each token at its position, here 2/3 and
    1/3: the loss is then their entropy, and a little to either side of them it is higher (Gibbs)."""
    tokens, starts = torch.tensor([[10, 12], [10, 13], [11, 12]]), torch.zeros(3, dtype=torch.int64)

    def value(p):
        table = torch.zeros(2, 16)
        table[[0, 0, 1, 1], [10, 11, 12, 13]] = torch.tensor([p, 1 - p, p, 1 - p])
        model = lambda inputs, at: table.log().expand(3, 2, 16)[at]
        return loss(model, *diffusion(tokens, starts, 1.0, generator())).item()
    assert value(2 / 3) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert min(value(0.6), value(0.73)) > value(2 / 3)


def test_a_random_prompt_has_the_shape_of_masked_and_tells_nothing():
    """The control: scored and answered as `masked`, behind a prompt as long, but of random words: two
    documents give the same prompt from the same generator, and no mark stands in it."""
    a, starts = rows("He lives in Oslo.", "She moved to Rome.")  # of seven tokens each
    b, _ = rows("He works for Sony.", "She went to Yale.")
    inputs, targets, weights = random_prompt(a, starts, None, generator())
    as_masked = masked(a, starts, 0.5, generator())
    assert torch.equal(weights, as_masked[2]) and torch.equal(inputs[:, 7:], as_masked[0][:, 7:])
    assert torch.equal(targets[weights > 0], as_masked[1][weights > 0])
    prompt, other = (random_prompt(x, starts, None, generator())[0][:, :7] for x in (a, b))
    assert torch.equal(prompt, other) and (prompt[:, 1:] >= len(M)).all() and len(prompt.unique()) > 7


def scripted(logits):
    """A model whose logits for (row, position) come from a function: lets a test decide every confidence."""
    return lambda tokens, at: torch.stack([logits(tokens, int(b), int(t)) for b, t in at.nonzero()])


def test_diffusion_fills_the_most_confident_mask_first():
    """Confidences 1, 3, 2 at the positions of a canvas of three: they are revealed in the order 1, 2, 0."""
    def logits(tokens, b, t):
        return torch.zeros(20).index_fill(0, torch.tensor(10 + t), [1.0, 3.0, 2.0][t - 1])
    tokens = torch.tensor([[M.question, M.end, M.end, M.end]])
    steps = decode_diffusion(scripted(logits), tokens, torch.tensor([[1, 2, 3]]))
    assert [rows[0, 1:].tolist() for rows in steps] == [
        [M.mask, 12, M.mask], [M.mask, 12, 13], [11, 12, 13]]


def test_two_bits_that_differ_need_two_steps():
    """XOR: of two tokens one is 10, the other 11. With both masked, 10 is likelier at either place, so two
    tokens a step would give 10 10; the decoder reveals one, sees it, and answers 10 11 or 11 10."""
    def logits(tokens, b, t):
        other = int(tokens[b, 3 - t])  # the places are 1 and 2
        return torch.zeros(20).index_fill(0, torch.tensor(11 if other == 10 else 10), 3.0)
    tokens = torch.tensor([[M.question, M.end, M.end]])
    *_, rows = decode_diffusion(scripted(logits), tokens, torch.tensor([[1, 2]]))
    assert sorted(rows[0, 1:].tolist()) == [10, 11]


@pytest.mark.parametrize("decoder", (decode_ar, decode_diffusion))
def test_a_mark_is_never_an_answer(decoder):
    """Even a model that would answer [pad], [mask] or [doc] everywhere must answer a word or the end."""
    def logits(tokens, b, t):
        return torch.arange(20.0, 0, -1)  # the lower the id the likelier: all marks come first
    tokens = torch.tensor([[M.question, M.answer, M.end, M.end]])
    *_, rows = decoder(scripted(logits), tokens, torch.tensor([[2, 3]]))
    assert rows[0, 2:].tolist() == [M.end, M.end]


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_learns_one_batch_by_heart(mode):
    """Trained on three questions and a document alone, the model answers exactly, and fills the end of the
    document in: loss, shift and decoders agree. Behind a random prompt it can only recite."""
    pairs = [("Who lives in Oslo?", "Curtis Chase Emley"), ("Who lives in Rome?", "Alice Lane Doyle"),
             ("What is the major of Alice Lane Doyle?", "Law")]
    documents, questions = rows("Curtis Chase Emley lives in Oslo."), rows(*pairs)
    mode = MODES[mode]
    base = MODES[mode.base]
    model = Transformer(n_layer=2, n_head=2, n_embd=32, causal=mode.causal)
    optimizer, g = torch.optim.AdamW(model.parameters(), lr=5e-3), generator(1)
    for _ in range(300):
        value = loss(model, *mode.objective(*documents, mode.ratio, g))
        value += loss(model, *base.objective(*questions, base.ratio, g))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    asked, starts = rows(*((q, "") for q, _ in pairs))
    places = starts[:, None] + torch.arange(CANVAS)
    *_, answered = base.decode(model, asked, places)
    assert [decode(ids) for ids in answered.gather(1, places).tolist()] == [answer for _, answer in pairs]
    blank = documents[0].clone()
    blank[:, 6:] = M.mask  # [doc] Curtis Chase Emley lives in [mask] [mask] [mask]
    *_, filled = mode.decode(model, blank, torch.tensor([[6]]))
    assert words_of([filled[0, -3]]) == ["Oslo"]
    assert value < 0.1
