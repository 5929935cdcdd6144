"""The mathematics of the three objectives, each against an independent reference."""
import itertools
import math

import pytest
import torch

from conftest import generator
from data import CANVAS, MARKS, TOKENIZER, decode, document_row, encode, pad_rows, question_row
from diffusion import (MODES, RATIOS, content, corrupt, decode_ar, decode_diffusion, diffusion, loss, masked,
                       picture, random_prompt)
from model import ModelConfig, Transformer

M = MARKS
THREE = ("ar", "diffusion", "masked")  # the objectives; the other modes are controls


def rows(*items):
    """Rows of documents (str) and questions (pairs of str)."""
    return pad_rows([document_row(x) if isinstance(x, str) else question_row(*x) for x in items])


def shown(ids):
    """Token ids as a teacher would write them: marks by name, words without their space."""
    return [TOKENIZER.decode([i]).strip().strip("<>") for i in ids]


# -- corruption --------------------------------------------------------------


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


def test_the_papers_ratio_is_a_coin_for_each_token():
    """t ~ U(.05, .95): half of the tokens on average, within 5 standard errors; the weights are 1 / (t L), so
    that their sum in a row is 1 on average."""
    hidden, weights = corrupt(torch.ones(20_000, 8, dtype=torch.bool), "paper", generator())
    assert abs(hidden.double().mean() - 0.5) < 5 * math.sqrt((0.9**2 / 12 + 0.25 / 8) / 20_000)
    assert abs(weights.sum(1).mean() - 1) < 0.02
    t = 1 / (8 * weights.max(1).values[hidden.any(1)])
    assert 0.05 <= t.min() < 0.06 and 0.94 < t.max() <= 0.9501


@pytest.mark.parametrize("ratio", (*RATIOS, 0.5, 1.0))
def test_only_content_is_hidden(ratio):
    """Padding, the marks at the start and the words of a question are never masked, whatever the ratio."""
    tokens, starts = rows("He lives in Oslo.", ("Who lives in Oslo?", "Curtis Chase Emley"))
    allowed = content(tokens, starts)
    assert allowed.sum(1).tolist() == [6, CANVAS]  # He lives in Oslo . [end]; three names and [end]
    for seed in range(50):
        hidden, weights = corrupt(allowed, ratio, generator(seed))
        assert not (hidden & ~allowed).any() and torch.equal(weights > 0, hidden)


# -- objectives --------------------------------------------------------------


def test_three_objectives_side_by_side():
    """The same short document through the three objectives, token by token, everything masked:

        ar          [doc] He lives in           ->  He lives in [end]
        diffusion   [doc] [mask] x 4            ->  He lives in [end], at the same positions
        masked      [doc] [mask] x 4 [answer] He lives in  ->  He lives in [end], after [answer]
    """
    tokens, starts = rows("He lives in")
    table = {}
    for name in THREE:
        inputs, targets, weights = MODES[name].objective(tokens, starts, 1.0, generator())
        at = weights[0] > 0
        table[name] = shown(inputs[0].tolist()), shown(targets[0][at].tolist()), at.nonzero()[:, 0].tolist()
        assert weights[0][at].tolist() == pytest.approx([1 / 4] * 4)
    answer = ["He", "lives", "in", "end"]
    assert table["ar"] == (["doc", "He", "lives", "in"], answer, [0, 1, 2, 3])
    assert table["diffusion"] == (["doc"] + ["mask"] * 4, answer, [1, 2, 3, 4])
    assert table["masked"] == (["doc"] + ["mask"] * 4 + ["answer", "He", "lives", "in"], answer, [5, 6, 7, 8])


@pytest.mark.parametrize("mode", MODES)
def test_questions_are_scored_on_the_answer_alone(mode):
    """Whatever the mode, a question is trained as the base was: loss on the answer and its ends and on no
    word of the question, and every row weighs the same, long or short."""
    tokens, starts = rows(("Who lives in Oslo?", "Curtis Chase Emley"), ("Who went to Yale and Rome?", "Law"))
    base = MODES[MODES[mode].base]
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    for seed in range(20):  # diffusion scores what it masks
        _, targets, weights = base.objective(tokens, starts, base.ratio, generator(seed))
        scored[:, -weights.size(1):] |= weights > 0
        assert weights.sum(1).tolist() == pytest.approx([1, 1])
    assert [shown(row[at].tolist()) for row, at in zip(tokens, scored)] == [
        ["Curtis", "Chase", "Emley", "end"], ["Law", "end", "end", "end"]]


@pytest.mark.parametrize("mode", MODES)
def test_a_given_name_is_neither_hidden_nor_scored(mode):
    """A text to learn may start behind the name: every objective shows the name and asks for the rest."""
    tokens, starts = pad_rows([document_row("Curtis Chase Emley was born.", name_given=True),
                               document_row("She works for Sony.")])
    inputs, targets, weights = MODES[mode].objective(tokens, starts, 1.0, generator())
    assert shown(targets[0][weights[0] > 0].tolist()) == ["was", "born", ".", "end"]
    assert shown(inputs[0, :4].tolist()) == ["doc", "Curtis", "Chase", "Emley"]


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


def test_loss_is_the_weighted_cross_entropy_of_a_hand_computed_case():
    """Two rows, logits log(1), log(2), log(5) at every position: p = 1/8, 2/8, 5/8."""
    model = lambda tokens, at: torch.tensor([1.0, 2.0, 5.0]).log().expand(int(at.sum()), 3)
    targets = torch.tensor([[2, 1, 0], [1, 1, 1]])
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    by_hand = (0.5 * -math.log(5 / 8) + 0.5 * -math.log(2 / 8) + 1.0 * -math.log(2 / 8)) / 2
    assert loss(model, targets, targets, weights).item() == pytest.approx(by_hand, rel=1e-6)


def test_the_picture_is_what_the_objectives_do():
    """`python diffusion.py` draws each mode from its objective. By hand, with everything masked:"""
    tokens, starts = rows("He lives in")
    drawn = {mode: [line.strip() for line in picture(MODES[mode].objective, tokens, starts, 1.0, generator())]
             for mode in THREE}
    assert drawn == {
        "ar": ["in     [doc] He    lives in",
               "asked  He    lives in    [end]"],
        "diffusion": ["in     [doc] [mask] [mask] [mask] [mask]",
                      "asked        He     lives  in     [end]"],
        "masked": ["in     [doc]    [mask] [mask] [mask] [mask]",
                   "in     [answer] He     lives  in",
                   "asked  He       lives  in     [end]"]}


# -- the ELBO ----------------------------------------------------------------

L, X = 4, torch.tensor([3, 1, 2, 0])  # a text of four tokens out of V = 4


def toy(seed=0):
    """Any conditional model: visible tokens (tuple, None where masked) -> log p (L, V), a random table each.
    As with a real one, the more is visible the surer it is of X: by 3 nats a visible token."""
    memory = {}

    def log_p(visible):
        if visible not in memory:
            g = generator(seed + sum((4 if v is None else v) * 5**i for i, v in enumerate(visible)))
            logits = torch.randn(L, 4, generator=g, dtype=torch.float64)
            logits[torch.arange(L), X] += 3 * sum(v is not None for v in visible)
            memory[visible] = logits.log_softmax(-1)
        return memory[visible]
    return log_p


def cross_entropy(log_p, hidden, x=X):
    """CE(M) = - sum over the hidden positions of log p(x_i | the visible ones)."""
    visible = tuple(None if i in hidden else int(x[i]) for i in range(L))
    return -sum(log_p(visible)[i, x[i]].item() for i in hidden)


def order_nll(log_p, order, x):
    """-log p(x) when the tokens are revealed one a step in this order."""
    visible, nll = [None] * L, 0.0
    for i in order:
        nll -= log_p(tuple(visible))[i, x[i]].item()
        visible[i] = int(x[i])
    return nll


def subsets(k):
    return list(itertools.combinations(range(L), k))


def test_four_routes_to_the_elbo():
    """All orders enumerated; (L / k) CE over uniform k; the integral of 1/t over Bernoulli masks, which is a
    beta function; and CE(M) / (k C(L, k)) summed over masks: one number."""
    log_p = toy()
    orders = [order_nll(log_p, order, X) for order in itertools.permutations(range(L))]
    any_order = sum(orders) / len(orders)
    every = [(k, m) for k in range(1, L + 1) for m in subsets(k)]
    uniform_k = sum(L / k * cross_entropy(log_p, m) / len(subsets(k)) for k, m in every) / L
    beta = lambda k: math.gamma(k) * math.gamma(L - k + 1) / math.gamma(L + 1)  # int t^(k-1) (1-t)^(L-k) dt
    integral = sum(beta(k) * cross_entropy(log_p, m) for k, m in every)
    masks = sum(cross_entropy(log_p, m) / (k * math.comb(L, k)) for k, m in every)
    assert uniform_k == pytest.approx(any_order, abs=1e-12)
    assert integral == pytest.approx(any_order, abs=1e-12)
    assert masks == pytest.approx(any_order, abs=1e-12)


def estimate(ratio, n=40_000):
    """Mean and standard error of the training loss of `diffusion` for the toy model, over n corruptions of
    X."""
    log_p = toy()
    starts, first = torch.zeros(n, dtype=torch.int64), len(M)  # the ids below `first` are marks
    inputs, targets, weights = diffusion(first + X.repeat(n, 1), starts, ratio, generator())
    seen, which = inputs.unique(dim=0, return_inverse=True)
    tables = torch.stack([log_p(tuple(None if v == M.mask else v - first for v in row))
                          for row in seen.tolist()])
    nll = -tables[which].gather(2, targets[..., None] - first)[..., 0]
    losses = (weights * nll).sum(1)
    return losses.mean().item(), losses.std().item() / math.sqrt(n)


def negative_elbo(log_p=toy(), x=X):
    """-ELBO per token, summed over all masks."""
    every = [(k, m) for k in range(1, L + 1) for m in subsets(k)]
    return sum(cross_entropy(log_p, m, x) / (k * math.comb(L, k)) for k, m in every) / L


def expected_with_the_papers_ratio():
    """What U(.05, .95) with 1 / (t L) estimates, per token: each CE(M) weighted by w_k."""
    log_p = toy()
    every = [(k, m) for k in range(1, L + 1) for m in subsets(k)]
    return sum(papers_weight(k, L) * cross_entropy(log_p, m) / (k * math.comb(L, k)) for k, m in every) / L


def papers_weight(k, length, steps=200_000):
    """w_k = int_.05^.95 t^(k-1) (1-t)^(L-k) dt / (.9 beta(k)), what k hidden tokens weigh against
    the ELBO."""
    t = 0.05 + 0.9 * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    log_beta = math.lgamma(k) + math.lgamma(length - k + 1) - math.lgamma(length + 1)
    return ((k - 1) * t.log() + (length - k) * (1 - t).log() - log_beta).exp().mean().item()


def test_the_training_loss_estimates_the_elbo():
    """The mean loss of 40,000 corruptions lies within 5 standard errors of the enumerated -ELBO per token (a
    false alarm once in 1.7 million seeds; the seed is fixed), and further than that from what the paper's
    ratio would give."""
    mean, error = estimate("uniform")
    assert abs(mean - negative_elbo()) < 5 * error < abs(mean - expected_with_the_papers_ratio())


def test_the_papers_mask_ratio_is_not_the_elbo():
    """U(.05, .95) with 1 / (t L) weights k hidden tokens by w_k, not 1: at L = 60 by .051, 1.11 and .051 for
    k = 1, 30, 60. The estimator follows that, more than 5 standard errors away from -ELBO."""
    assert [papers_weight(k, 60) for k in (1, 30, 60)] == pytest.approx([0.051, 1.11, 0.051], rel=0.01)
    mean, error = estimate("paper")
    assert abs(mean - expected_with_the_papers_ratio()) < 5 * error < abs(mean - negative_elbo())


def test_at_mask_ratio_one_the_best_loss_is_the_entropy_of_each_position():
    """Nothing is visible, so the best a model can do is the share of each token at each position: on six
    texts of three tokens the loss is then the mean of three entropies, and any other distribution does worse
    (Gibbs)."""
    tokens = torch.tensor([[10, 12, 14], [10, 12, 15], [10, 13, 14],
                           [10, 13, 15], [11, 12, 14], [11, 12, 14]])
    shares = torch.stack([(tokens == v).double().mean(0) for v in range(16)], dim=1)  # (T, V)
    entropies = -torch.special.xlogy(shares, shares).sum(1)
    two_thirds = math.log(3) - 2 / 3 * math.log(2)  # the entropy of 2/3, 1/3: all three positions have it
    assert entropies.tolist() == pytest.approx([two_thirds] * 3)

    def value(table):
        model = lambda inputs, at: table.log().expand(len(inputs), *table.shape)[at]
        batch = diffusion(tokens, torch.zeros(6, dtype=torch.int64), 1.0, generator())
        assert (batch[0] == M.mask).all()
        return loss(model, *batch).item()
    assert value(shares) == pytest.approx(entropies.mean().item(), rel=1e-6)
    for seed in range(20):
        other = torch.rand(3, 16, generator=generator(seed), dtype=torch.float64)
        assert value(0.9 * shares + 0.1 * other / other.sum(1, keepdim=True)) > value(shares)


def copyist(inputs, at):
    """A causal model that answers with the token as far behind [answer] as it stands behind [doc] in the
    prompt."""
    result = torch.zeros(int(at.sum()), TOKENIZER.n_vocab)
    for i, (b, t) in enumerate(at.nonzero().tolist()):
        behind = t - inputs[b].tolist().index(M.answer)
        result[i, inputs[b, 1 + behind]] = 30.0
    return result


@pytest.mark.parametrize("ratio, solved", ((0.0, True), (0.5, False), (1.0, False)))
def test_masked_at_ratio_zero_is_copying(ratio, solved):
    """A model that copies the prompt, and has learned no fact, has a loss of zero at ratio 0 and only
    there."""
    batch = masked(*rows("He lives in Oslo.", "She works for Sony and lives in Rome."), ratio, generator())
    assert (loss(copyist, *batch) < 1e-6) == solved


def test_a_random_prompt_has_the_shape_of_masked_and_tells_nothing():
    """The control: the same targets and weights as `masked`, a prompt of the same length, but of random
    words: two documents give the same prompt from the same generator, and no mark stands in it."""
    a, starts = rows("He lives in Oslo.", "She moved to Rome.")
    b, _ = rows("He works for Sony.", "She went to Yale.")
    inputs, targets, weights = random_prompt(a, starts, None, generator())
    as_masked = masked(a, starts, 0.5, generator())
    assert torch.equal(targets[weights > 0], as_masked[1][as_masked[2] > 0])
    assert torch.equal(weights, as_masked[2]) and torch.equal(inputs[:, 7:], as_masked[0][:, 7:])
    a, b, starts = (x.repeat_interleave(500, dim=0) for x in (a, b, starts))
    prompt = lambda rows: random_prompt(rows, starts, None, generator())[0][:, :7]
    assert torch.equal(prompt(a), prompt(b)) and (prompt(a)[:, 1:] >= len(M)).all()
    assert prompt(a)[:, 1:].unique().numel() > 500


# -- decoding ----------------------------------------------------------------


class Scripted:
    """A model whose logits for (row, position) come from a function: lets a test decide every confidence."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, tokens, at):
        return torch.stack([self.logits(tokens, int(b), int(t)) for b, t in at.nonzero()])


def test_diffusion_fills_the_most_confident_mask_first():
    """Confidences 1, 3, 2 at the positions of a canvas of three: they are revealed in the order 1, 2, 0."""
    def logits(tokens, b, t):
        return torch.zeros(20).index_fill(0, torch.tensor(10 + t), [1.0, 3.0, 2.0][t - 1])
    seen = []
    tokens = torch.tensor([[M.question, M.end, M.end, M.end]])
    watch = lambda rows: seen.append(rows[0, 1:].tolist())
    out = decode_diffusion(Scripted(logits), tokens, torch.tensor([[1, 2, 3]]), watch)
    assert seen == [[M.mask, 12, M.mask], [M.mask, 12, 13], [11, 12, 13]]
    assert out.tolist() == [[11, 12, 13]]


def test_two_bits_that_differ_need_two_steps():
    """XOR: each of two tokens is 10 or 11, never both the same. With both masked, 10 is likelier at
    either place, so two tokens a step would give 10 10; the decoder reveals one, sees it, and answers 10 11
    or 11 10."""
    def logits(tokens, b, t):
        other = int(tokens[b, 3 - t])  # the places are 1 and 2
        return torch.zeros(20).index_fill(0, torch.tensor(11 if other == 10 else 10), 3.0)
    tokens = torch.tensor([[M.question, M.end, M.end]])
    assert sorted(decode_diffusion(Scripted(logits), tokens, torch.tensor([[1, 2]]))[0].tolist()) == [10, 11]


@pytest.mark.parametrize("decoder", (decode_ar, decode_diffusion))
def test_a_mark_is_never_an_answer(decoder):
    """Even a model that would answer [mask], [pad] or a question mark everywhere must answer a word or the
    end."""
    def logits(tokens, b, t):
        return torch.arange(20.0, 0, -1)  # the lower the id the likelier: all marks come first
    tokens = torch.tensor([[M.question, M.answer, M.end, M.end]])
    assert decoder(Scripted(logits), tokens, torch.tensor([[2, 3]])).tolist() == [[M.end, M.end]]


def test_greedy_decoding_feeds_each_token_back():
    """A model that counts up from what it sees last: 7 -> 8 9 10, each row from its own start."""
    def logits(tokens, b, t):
        return torch.zeros(20).index_fill(0, (tokens[b, t] + 1)[None], 1.0)
    tokens = torch.tensor([[4, 7, 2, 2, 2, 0], [4, 5, 12, 2, 2, 2]])
    out = decode_ar(Scripted(logits), tokens, torch.tensor([[2, 3, 4], [3, 4, 5]]))
    assert out.tolist() == [[8, 9, 10], [13, 14, 15]]


@pytest.mark.parametrize("decoder", (decode_ar, decode_diffusion))
def test_decoders_do_not_look_at_the_true_answer(decoder):
    """The canvas is overwritten: the same question with another answer behind it decodes to the same."""
    model = Transformer(ModelConfig(1, 1, 16, causal=decoder is decode_ar))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=generator())
    a, starts = rows(("Who lives in Oslo?", "Curtis Chase Emley"))
    b, _ = rows(("Who lives in Oslo?", "Rome"))
    places = starts[:, None] + torch.arange(CANVAS)
    assert torch.equal(decoder(model, a, places), decoder(model, b, places))


DOCUMENT = "Curtis Chase Emley lives in Oslo."


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_learns_one_batch_by_heart(mode):
    """Trained on three questions and a document alone, the model answers exactly, and fills the end of the
    document in: loss, shift and decoders agree. Behind a random prompt it can only recite."""
    pairs = [("Who lives in Oslo?", "Curtis Chase Emley"), ("Who lives in Rome?", "Alice Lane Doyle"),
             ("What is the major of Alice Lane Doyle?", "Law")]
    documents, questions = rows(DOCUMENT), rows(*pairs)
    mode = MODES[mode]
    base = MODES[mode.base]
    model = Transformer(ModelConfig(2, 2, 32, causal=mode.causal)).initialize(generator())
    optimizer, g = torch.optim.AdamW(model.parameters(), lr=5e-3), generator(1)
    for _ in range(300):
        value = loss(model, *mode.objective(*documents, mode.ratio, g))
        value += loss(model, *base.objective(*questions, base.ratio, g))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    asked, starts = rows(*((q, "") for q, _ in pairs))
    out = mode.decode_question(model, asked, starts[:, None] + torch.arange(CANVAS))
    assert [decode(ids) for ids in out.tolist()] == [answer for _, answer in pairs]
    blank = documents.tokens.clone()
    blank[:, 6:] = M.mask  # [doc] Curtis Chase Emley lives in [mask] [mask] [mask]
    assert decode(mode.decode_document(model, blank, torch.tensor([[6]]))[0].tolist()) == "Oslo"
    assert value < 0.1
