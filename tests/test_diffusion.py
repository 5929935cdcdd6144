"""The mathematics of the objectives and decoders, each against an independent reference."""
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import diffusion as code
from conftest import generator, settings
from data import CANVAS, MARKS, decode, document_row, question_row, stack, words_of
from diffusion import CAUSAL, MODES, corrupt, decode_ar, decode_diffusion, loss, masked, picture, ratio_of
from model import DEVICES, Transformer

M = MARKS


def rows(*items):
    """Tokens and what is learned of documents (str), with a given name (in a list), of questions (pairs)."""
    return stack([question_row(*x) if isinstance(x, tuple) else document_row(*x, True) if isinstance(x, list)
                  else document_row(x) for x in items])


def objective(mode, ratio):
    """The objective of a mode with that mask ratio, if it takes one."""
    return MODES[mode].objective if ratio_of(mode) is None else partial(MODES[mode].objective, ratio=ratio)


def test_uniform_masking_hides_every_number_of_tokens_equally_often():
    """k ~ U{1..L}: over 20,000 rows of L = 5 each k has a share of 1/5, within 5 standard errors (a false
    alarm once in 350,000 runs), and each position is hidden 3/5 of the time; a hidden token weighs 1 / k."""
    hidden, weights = corrupt(torch.ones(20_000, 5, dtype=torch.bool), (0, 1), generator())
    shares = hidden.sum(1).bincount(minlength=6) / len(hidden)
    assert shares[0] == 0 and (shares[1:] - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / len(hidden))
    assert (hidden.double().mean(0) - 0.6).abs().max() < 5 * math.sqrt(0.6 * 0.4 / len(hidden))
    torch.testing.assert_close(weights, hidden / hidden.sum(1, keepdim=True))


def test_a_fixed_ratio_hides_its_share():
    """ceil(t L) tokens in every row, for every length up to 48 and every share of two digits, by whole
    numbers: so never none if t > 0, for a row with nothing to learn is a waste."""
    learned = torch.ones(48, 48, dtype=torch.bool).tril()  # a row of each length
    for percent in range(101):
        hidden, weights = corrupt(learned, (percent / 100, percent / 100), generator())
        assert hidden.sum(1).tolist() == [-(-percent * length // 100) for length in range(1, 49)]
        assert weights.sum(1).tolist() == pytest.approx([float(percent > 0)] * 48)


@pytest.mark.parametrize("ratio", ((1.2, 1.2), (-0.1, -0.1), (0, 1.1), (-0.1, 1), (math.nan, math.nan)))
def test_a_share_outside_of_0_to_1_is_refused(ratio):
    """Else a schedule with a slip would train on, with all tokens hidden or none."""
    with pytest.raises(AssertionError, match="0 .. 1"):
        corrupt(torch.ones(1000, 5, dtype=torch.bool), ratio, generator())


@pytest.mark.parametrize("ratio", (0.5, 1))
@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_learned_is_hidden_or_scored(mode, ratio):
    """By hand, [first, end) of rows of different lengths: [doc], a given name, a question's words and padding
    are never hidden or scored. Of an answer all four tokens count, [end]s too, or their number would tell how
    long it is. Every row weighs the same."""
    tokens, learned = rows("He lives in Oslo.", "She moved to Rome and works for Sony.",
                           ("Who went to Yale?", "Law"), ["Curtis Chase Emley lives in Oslo."])
    T, scored = tokens.size(1), [set() for _ in tokens]
    for seed in range(20):
        inputs, targets, weights = objective(mode, (ratio, ratio))(tokens, learned, generator(seed))
        for row, (first, end) in enumerate(((1, 7), (1, 11), (7, 11), (4, 9))):
            hidden = (inputs[row, :T] == M.mask).nonzero()[:, 0].tolist()
            assert set(hidden) <= set(range(first, end))
            asked = (weights[row] > 0).nonzero()[:, 0]
            assert len(asked) == (math.ceil((end - first) * ratio) if mode == "diffusion" else end - first)
            assert weights[row].sum().item() == pytest.approx(1)
            scored[row] |= set(targets[row, asked].tolist())
    texts = [set(row[at].tolist()) for row, at in zip(tokens, learned)]
    assert scored == texts and words_of(sorted(texts[2])) == ["[end]", "Law"]
    assert M.pad not in set().union(*texts) and M.doc not in set().union(*texts)


def test_a_random_prompt_is_made_by_one_rule_in_training_and_exam():
    """Even where the name is given: behind [doc] a random word for every token of the document, its name and
    its [end] too, and padding for padding; else the exam would test another task. The rest is as in `masked`.
    It tells nothing: from one generator two documents have the same prompt."""
    a, b = (rows([f"{name} lives in Oslo."], [f"{name} moved to Rome and works for Sony."])
            for name in ("Curtis Chase Emley", "Alice Lane Doyle"))
    (tokens, learned), T, seen = a, a[0].size(1), []
    model = lambda tokens, at: seen.append(tokens) or torch.zeros(int(at.sum()), 6000)
    list(code.decode_random_prompt(model, tokens, blanks(tokens, (6,), (6,))))
    as_masked, trained = masked(*a, generator(), (0.5, 0.5)), code.random_prompt(*a, generator())
    for inputs in (trained[0], seen[0]):
        assert inputs[:, 0].eq(M.doc).all() and torch.equal(inputs[:, T], as_masked[0][:, T])
        words = inputs[:, :T] >= code.TOKENIZER.n_vocab - len(code.WORDS)
        assert torch.equal(words[:, 1:], tokens[:, 1:] != M.pad)
        assert inputs[:, :T][tokens == M.pad].eq(M.pad).all()
        assert not (inputs[:, :T] == tokens)[:, 1:4].any()  # no name is shown
    assert torch.equal(trained[2], as_masked[2]) and torch.equal(trained[0][:, T:], as_masked[0][:, T:])
    assert torch.equal(trained[0][:, :T], code.random_prompt(*b, generator())[0][:, :T])


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
    tokens, learned = rows("He lives in")
    drawn = {}
    for mode in ("ar", "diffusion", "masked"):
        one = objective(mode, (1, 1))
        drawn[mode] = [line.strip() for line in picture(one, document_row("He lives in"), generator())]
        weights = one(tokens, learned, generator())[2]
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


def estimate(ratio, n):
    """Mean and standard error of the training loss of `diffusion` for this model, over n corruptions of X."""
    learned, first = torch.ones(n, L, dtype=torch.bool), len(M)  # the ids below `first` are marks
    inputs, targets, weights = code.diffusion(first + X.repeat(n, 1), learned, generator(), ratio)
    seen, which = inputs.unique(dim=0, return_inverse=True)
    tables = torch.stack([log_p([None if v == M.mask else v - first for v in row]) for row in seen.tolist()])
    given = -tables[which].gather(2, targets[..., None] - first)[..., 0]
    losses = (weights * given).sum(1)
    return losses.mean().item(), losses.std().item() / math.sqrt(n)


@pytest.mark.parametrize("ratio, w, n", (((0, 1), (1, 1, 1, 1), 40_000),
                                         ((0.05, 0.95), (0.8 / 0.9, 1 / 0.9, 1 / 0.9, 0.8 / 0.9), 400_000)))
def test_the_training_loss_estimates_the_elbo_if_every_k_is_as_likely(ratio, w, n):
    """-log p(X) when it is revealed token by token, the mean over all orders, is the mean over masks of k
    tokens, k ~ U{1..L}. The mean loss of n corruptions lies within 5 standard errors of that (a false alarm
    once in 1.7 million seeds; the seed is fixed). With t in .05 .. .95, k = ceil(4 t) is 1 or 4 with
    probability .2/.9 each, else .25/.9: another number, more than 5 standard errors away."""
    any_order = [sum(nll(i, order[step:]) for step, i in enumerate(order))
                 for order in itertools.permutations(range(L))]
    elbo = sum(any_order) / len(any_order) / L
    assert mean_over_masks() == pytest.approx(elbo, abs=1e-12)
    mean, error = estimate(ratio, n)
    assert abs(mean - mean_over_masks(lambda k: w[k - 1])) < 5 * error
    assert (abs(mean - elbo) < 5 * error) == (ratio == (0, 1))


def test_causality_is_a_fact_of_the_base(monkeypatch):
    """`masked` can use the base of `ar` since it asks the same of a model: the next token. So a mode names a
    base, and only a base, which is its own, is causal or not. --mask_ratio is for whatever objective has a
    parameter `ratio`, even one of yours."""
    assert CAUSAL == {"ar": True, "diffusion": False}
    for mode in MODES.values():
        assert MODES[mode.base].base == mode.base
        inputs, targets, weights = mode.objective(*rows("He lives in Oslo."), generator())
        asked = (weights[0] > 0).nonzero()[:-1, 0]
        seen = inputs[0, asked + 1] == targets[0, asked] if CAUSAL[mode.base] else inputs[0, asked] == M.mask
        assert seen.all()  # a causal model is asked for what comes next
    mine = MODES["ar"]._replace(objective=lambda tokens, learned, generator, ratio=(0.1, 0.2): None)
    monkeypatch.setitem(MODES, "mine", mine)
    assert {mode: ratio_of(mode) for mode in MODES} == {
        "ar": None, "diffusion": (0, 1), "masked": (0.75, 0.75), "random_prompt": None, "mine": (0.1, 0.2)}


def scripted(logits):
    """A model whose logits for (row, position) come from a function: lets a test decide every confidence."""
    return lambda tokens, at: torch.stack([logits(tokens, int(b), int(t)) for b, t in at.nonzero()])


def one(token, logit=3.0):
    """Logits that favour one token; the higher the logit the surer."""
    return torch.zeros(60).index_fill(0, torch.tensor(token), logit)


def blanks(tokens, *places):
    """(B, T) bool, true at each row's places."""
    blank = torch.zeros_like(tokens, dtype=torch.bool)
    for row, its in zip(blank, places):
        row[list(its)] = True
    return blank


def test_two_bits_that_differ_need_two_steps():
    """XOR: of two tokens one is 10, the other 11. With both masked, 10 is likelier at either place, so two
    tokens a step would give 10 10; the decoder reveals one, sees it, and answers 10 11 or 11 10."""
    model = scripted(lambda tokens, b, t: one(11 if int(tokens[b, 3 - t]) == 10 else 10))
    tokens = torch.tensor([[M.question, M.end, M.end]])  # the places are 1 and 2
    *_, rows = decode_diffusion(model, tokens, blanks(tokens, (1, 2)))
    assert sorted(rows[0, 1:].tolist()) == [10, 11]


def two(confidence):
    return F.one_hot(confidence.topk(2, dim=1).indices, confidence.size(1)).sum(1).bool()


def sure(confidence):
    """At least one, and all that are surer than .9."""
    return (confidence > 0.9) | (confidence == confidence.max(1, keepdim=True).values)


@pytest.mark.parametrize("surest", (two, sure))
def test_two_tokens_a_step_overwrite_nothing(surest, monkeypatch):
    """Whoever changes `surest` need not care for full rows: with three blanks in a row, one or none, each is
    written once and no other place ever, not even the first. The model writes 10 + t in the first step,
    20 + t in the second, so what is written twice would show."""
    monkeypatch.setattr(code, "surest", surest)
    tokens = torch.tensor([[M.question, 99, 99, 99]] * 3)
    model = scripted(lambda tokens, b, t: one({3: 10, 1: 20}[int((tokens[0] == M.mask).sum())] + t, 4.0 * t))
    filled = list(decode_diffusion(model, tokens, blanks(tokens, (1, 2, 3), (2,), ())))
    assert [rows[0, 1:].masked_fill(rows[0, 1:] == M.mask, 0).tolist() for rows in filled] == [
        [0, 12, 13], [21, 12, 13]]
    assert all(rows[:, 0].eq(M.question).all() for rows in filled)
    assert all(rows[1:, 1:].tolist() == [[99, 12, 99], [99, 99, 99]] for rows in filled)


@pytest.mark.parametrize("decoder", (decode_ar, decode_diffusion))
def test_a_mark_is_never_an_answer(decoder):
    """Even a model that would answer [pad], [mask] or [doc] everywhere must answer a word or the end."""
    tokens = torch.tensor([[M.question, M.answer, M.end, M.end]])
    model = scripted(lambda tokens, b, t: torch.arange(20.0, 0, -1))  # the lower the id the likelier
    *_, rows = decoder(model, tokens, blanks(tokens, (2, 3)))
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
    model = Transformer(settings(n_layer=2, n_head=2, n_embd=32), CAUSAL[mode.base])
    optimizer, g = torch.optim.AdamW(model.parameters(), lr=5e-3), generator(1)
    for _ in range(300):
        value = loss(model, *mode.objective(*documents, g)) + loss(model, *base.objective(*questions, g))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    asked, canvas = rows(*((q, "") for q, _ in pairs))  # all of the canvas is learned, and blank here
    *_, answered = base.decode(model, asked, canvas)
    answers = [decode(row[at].tolist()) for row, at in zip(answered, canvas)]
    assert canvas.sum(1).eq(CANVAS).all() and answers == [answer for _, answer in pairs]
    tokens = documents[0].clone()
    tokens[:, 6:] = M.mask  # [doc] Curtis Chase Emley lives in [mask] [mask] [mask]
    *_, filled = mode.decode(model, tokens, blanks(tokens, (6,)))
    assert words_of([filled[0, -3]]) == ["Oslo"]
    assert value < 0.1
