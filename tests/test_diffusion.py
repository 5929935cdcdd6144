"""The mathematics of the objectives and decoders, each against an independent reference."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import diffusion as code
from conftest import generator
from data import CANVAS, MARKS, decode, document_row, question_row, stack
from diffusion import MODES, ar, corrupt, decode_ar, decode_diffusion, decode_masked, diffusion, masked
from model import Transformer, loss

M = MARKS
OBJECTIVES = pytest.mark.parametrize("objective", (ar, diffusion, masked))


def whole(*shape):
    """`learned` (B, T) of rows in which each token may be hidden."""
    return torch.ones(*shape, dtype=torch.bool)


def test_a_share_hides_as_many_tokens_of_a_row_rounded_up():
    """ceil(t L) of L tokens, for every length up to 48 and every share of two digits, by whole numbers: so
    never none if t > 0, for a row that hides nothing has nothing to ask."""
    for percent in range(101):
        hidden, _ = corrupt(whole(48, 48).tril(), (percent / 100, percent / 100), generator())
        for row, k in enumerate(hidden.sum(1).tolist()):
            expected = -(-percent * (row + 1) // 100)
            assert k == expected, f"row {row}: {k} of {row + 1} hidden, expected {expected} at {percent} %"


def test_the_weights_of_a_row_are_those_of_a_mean():
    """Each of the k hidden tokens weighs 1 / k, together 1, the others nothing: no row counts for more than
    another. In a row with nothing to hide, as the first one here, all weights are 0."""
    hidden, weights = corrupt(whole(500, 7).tril(-1), (0, 1), generator())
    for row, (its, found) in enumerate(zip(hidden.tolist(), weights.tolist())):
        expected = [is_hidden / max(sum(its), 1) for is_hidden in its]
        assert found == pytest.approx(expected), f"row {row}: weights {found}, expected {expected}"


def test_uniform_masking_hides_every_number_of_tokens_equally_often():
    """With a share t from 0 to 1, k = ceil(5 t) is 1, 2, 3, 4 or 5 with probability 1/5 each, and any k tokens
    are as likely as any other k. Of 400,000 rows each of the 31 ways to hide some has its share within 5
    standard errors (a false alarm once in 50,000 seeds; the seed is fixed)."""
    ways, n = [*itertools.product((0, 1), repeat=5)], 400_000
    hidden, _ = corrupt(whole(n, 5), (0, 1), generator())
    found = (hidden * torch.tensor([16, 8, 4, 2, 1])).sum(1).bincount(minlength=32) / n
    for way, share in zip(ways[1:], found[1:].tolist()):
        p = 1 / 5 / math.comb(5, sum(way))
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n), f"hidden {way}: {share:.4f}, expected {p:.4f}"


def test_the_share_hidden_does_not_depend_on_where_in_the_batch_a_row_stands():
    """Known people's rows come first. Whoever draws t in slices of 0 .. 1 and forgets to permute them gives
    known people few masks and new ones many. k / 40 is even over 1/40 .. 1: so its mean is .5125 and its
    deviation .289, and the mean of each quarter of 20,000 rows is within 5 standard errors of that."""
    hidden, _ = corrupt(whole(20_000, 40), (0, 1), generator())
    for i, found in enumerate(hidden.double().mean(1).view(4, 5000).mean(1).tolist()):
        assert abs(found - 0.5125) < 5 * 0.289 / math.sqrt(5000), f"quarter {i}: {found:.3f}, expected .512"


@pytest.mark.parametrize("ratio", ((1.2, 1.2), (-0.1, -0.1), (0, 1.1), (-0.1, 1), (math.nan, math.nan)))
def test_a_share_outside_of_0_to_1_is_refused(ratio):
    """Else a schedule with a slip would train on, with all tokens hidden or none."""
    with pytest.raises(AssertionError, match="0 .. 1"):
        corrupt(whole(1000, 5), ratio, generator())


@pytest.mark.parametrize("objective, reads, asks", (
    (ar, "       [doc]    He       lives    in",
         "       He       lives    in       [end]"),
    (diffusion, "[doc]    [mask]   [mask]   [mask]   [mask]",
                "-        He       lives    in       [end]"),
    (masked, "   [doc]    [mask]   [mask]   [mask]   [mask]   [answer] He       lives    in",
             "   -        -        -        -        -        He       lives    in       [end]")))
def test_what_an_objective_reads_and_what_it_asks(objective, reads, asks):
    """By hand, with all hidden that may be: what goes in, and what is asked there, with equal weights."""
    [inputs], [targets], [weights] = objective(*stack([document_row("He lives in")]), generator(), (1, 1))
    read = [decode([token]) for token in inputs]
    asked = [decode([token]) if weight else "-" for token, weight in zip(targets, weights)]
    assert read == reads.split(), f"{objective.__name__} reads {read}, expected {reads.split()}"
    assert asked == asks.split(), f"{objective.__name__} asks {asked}, expected {asks.split()}"
    assert weights[weights > 0].tolist() == pytest.approx(4 * [1 / 4])


ROWS = stack([document_row("He lives in Oslo."), document_row("She moved to Rome and works for Sony."),
              question_row("Who went to Yale?", "Law"), ("[doc] Curtis Chase Emley", "lives in Oslo. [end]")])
LEARNED = ((1, 7), (1, 11), (7, 11), (4, 9))  # from which place on and up to which, by hand


@OBJECTIVES
def test_masks_stand_where_something_is_learned(objective):
    """[doc], what is given, a question's words and padding are always shown, and of a response everything."""
    for seed in range(40):
        inputs, _, _ = objective(*ROWS, generator(seed), (0.5, 0.5))
        for row, (first, end) in enumerate(LEARNED):
            places = (inputs[row] == M.mask).nonzero()[:, 0].tolist()
            k = 0 if objective is ar else (end - first + 1) // 2
            assert len(places) == k and {*places} <= {*range(first, end)}, (
                f"row {row}: masks at {places}, expected {k} of the places {first} to {end - 1}")


@OBJECTIVES
def test_each_token_that_is_learned_is_asked_for(objective):
    """`diffusion` asks for what is hidden, the others for all, in order: of an answer all four tokens, [end]s
    too, or their number would tell how long it is. Every row weighs the same."""
    inputs, targets, weights = objective(*ROWS, generator(), (0.5, 0.5))
    for row, (first, end) in enumerate(LEARNED):
        expected = [int(ROWS[0][row, i]) for i in range(first, end)
                    if objective is not diffusion or inputs[row, i] == M.mask]
        asked, total = targets[row, weights[row] > 0].tolist(), weights[row].sum().item()
        assert asked == expected, f"row {row}: asks for {decode(asked)!r}, expected {decode(expected)!r}"
        assert total == pytest.approx(1), f"row {row}: its weights sum to {total}, expected 1"


def test_masked_shows_in_training_what_it_shows_in_an_exam():
    """A prompt with holes, then the document, opened by [answer]. The decoder lays the same row out for a
    document with these holes; else the exam would test another task."""
    tokens, seen = ROWS[0], []
    inputs, _, _ = masked(*ROWS, generator(), (0.5, 0.5))
    prompt, response = inputs.split((tokens.size(1), tokens.size(1) - 1), dim=1)
    assert torch.equal(prompt, tokens.masked_fill(prompt == M.mask, M.mask))
    assert response[:, 0].eq(M.answer).all() and torch.equal(response[:, 1:], tokens[:, 1:-1])
    next(decode_masked(lambda x, at: seen.append(x) or torch.zeros(*x.shape, 9), tokens, prompt == M.mask))
    assert torch.equal(seen[0][:, :-1], inputs)


L, V, X = 4, 10, (9, 7, 8, 6)  # a text of four tokens; the ids below 6 are marks


def log_p(row):
    """Any model: tokens, some of them [mask] -> log p (L, V), a random table for each row. As with a real
    one, the more is visible the surer it is of X: by 3 nats a visible token."""
    logits = torch.randn(L, V, generator=generator(int("".join(map(str, row)))), dtype=torch.float64)
    logits[range(L), X] += 3 * sum(token != M.mask for token in row)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("ratio, w, n", (((0, 1), (1, 1, 1, 1), 40_000),
                                         ((0.05, 0.95), (0.8 / 0.9, 1 / 0.9, 1 / 0.9, 0.8 / 0.9), 400_000)))
def test_the_training_loss_estimates_the_elbo_if_every_k_is_as_likely(ratio, w, n):
    """-log p(X) when it is revealed token by token, the mean over all orders, is the mean over masks of k
    tokens, k ~ U{1..L}, of the hidden ones' cross-entropy. The mean loss of n corruptions lies within 5
    standard errors of that (a false alarm once in 1.7 million seeds; the seed is fixed). With t in .05 .. .95,
    k = ceil(4 t) is 1 or 4 with probability .2/.9 each, else .25/.9: another number, more than 5 errors away."""
    nll = lambda i, hidden: -log_p([M.mask if j in hidden else X[j] for j in range(L)])[i, X[i]].item()
    any_order = [sum(nll(i, order[step:]) for step, i in enumerate(order))
                 for order in itertools.permutations(range(L))]
    elbo = sum(any_order) / len(any_order) / L
    over_masks = lambda w: sum(w[k - 1] * nll(i, hidden) / k / math.comb(L, k) / L for k in range(1, L + 1)
                               for hidden in itertools.combinations(range(L), k) for i in hidden)
    assert over_masks((1, 1, 1, 1)) == pytest.approx(elbo, abs=1e-12)
    inputs, targets, weights = diffusion(torch.tensor([X] * n), whole(n, L), generator(), ratio)
    rows, which = inputs.unique(dim=0, return_inverse=True)
    tables = torch.stack([log_p(row) for row in rows.tolist()])
    losses = -(weights * tables[which].gather(2, targets[..., None])[..., 0]).sum(1)
    mean, error = losses.mean().item(), losses.std().item() / math.sqrt(n)
    assert abs(mean - over_masks(w)) < 5 * error, f"{mean:.4f}, expected {over_masks(w):.4f}"
    assert (abs(mean - elbo) < 5 * error) == (ratio == (0, 1))


def test_a_mode_reads_in_the_direction_of_its_base():
    """`masked` can use the base of `ar` since it asks the same of a model: the next token. A mode is causal or
    not as its base is; a base is its own base. A causal model asked for a token it reads would learn to copy."""
    for mode in MODES.values():
        assert MODES[mode.base].base == mode.base and MODES[mode.base].causal == mode.causal
    assert [MODES[name].causal for name in ("ar", "masked", "diffusion")] == [True, True, False]


def scripted(logits):
    """A model whose logits come from a function of a row and a place: lets a test decide every confidence."""
    return lambda tokens, at: torch.stack([
        torch.stack([logits(row, t) for t in range(len(row))]) for row in tokens.tolist()])


def one(token, logit=3.0):
    """Logits that favour one token; the higher the logit the surer."""
    return torch.zeros(120).index_fill(0, torch.tensor(token), logit)


COUNTING = scripted(lambda row, t: one(row[t] + 1))  # behind 20 comes 21


def steps(decoder, model, rows, places):
    """What a decoder yields, as lists, one a step, when it is to fill these places of each row."""
    tokens = torch.tensor(rows)
    blank = torch.tensor([[t in its for t in range(tokens.size(1))] for its in places])
    filled = [now.tolist() for now in itertools.islice(decoder(model, tokens, blank), 20)]
    assert len(filled) < 20, "after 20 steps there are still blanks"
    return filled


def test_decode_ar_fills_one_blank_a_step_from_left_to_right():
    """Each answer depends on the one before it. What is given stays. A row that is full waits for the others.
    `decode_masked` does so behind its prompt, where a mask stays a mask."""
    assert steps(decode_ar, COUNTING, [[20, 99, 99, 99], [30, 40, 99, 50]], [(1, 2, 3), (2,)]) == [
        [[20, 21, 99, 99], [30, 40, 41, 50]],
        [[20, 21, 22, 99], [30, 40, 41, 50]],
        [[20, 21, 22, 23], [30, 40, 41, 50]]]
    assert steps(decode_masked, COUNTING, [[M.doc, 20, 99, 50]], [(2,)]) == [
        [[M.doc, 20, M.mask, 50, M.answer, 20, 21, 50]]]


def test_decode_diffusion_fills_the_surest_blank_first():
    """The model is surest of the second blank, then of the third, as long as it sees masks there. It is surer
    still of the place that is given, which is never written."""
    model = scripted(lambda row, t: one(10 + t if row[t] == M.mask else 50, (9.0, 2.0, 4.0, 3.0)[t]))
    filled = steps(decode_diffusion, model, [[7, 99, 99, 99]], [(1, 2, 3)])
    expected = [[[7, M.mask, 12, M.mask]], [[7, M.mask, 12, 13]], [[7, 11, 12, 13]]]
    assert filled == expected, f"step by step {filled}, expected {expected}"


def test_two_bits_that_differ_need_two_steps():
    """XOR: of two tokens one is 10, the other 11. With both masked, 10 is likelier at either place, so two
    tokens a step would give 10 10; the decoder reveals one, sees it, and answers 10 11 or 11 10."""
    model = scripted(lambda row, t: one(11 if 10 in row else 10))
    *_, [last] = steps(decode_diffusion, model, [[M.question, M.end, M.end]], [(1, 2)])
    assert sorted(last[1:]) == [10, 11], f"the two became {last[1:]}"


@pytest.mark.parametrize("surest", (
    lambda p: F.one_hot(p.topk(2, dim=1).indices, p.size(1)).sum(1).bool(),     # two a step
    lambda p: (p > 0.9) | (p == p.max(1, keepdim=True).values)))                # all above .9, at least one
def test_two_tokens_a_step_overwrite_nothing(surest, monkeypatch):
    """Whoever changes `surest` need not care for full rows: with three blanks in a row, one or none, each is
    written once and no other place ever, not even the first. The model writes 10 + t where it sees three
    masks, 30 + t where it sees one, so what is written twice would show."""
    monkeypatch.setattr(code, "surest", surest)
    model = scripted(lambda row, t: one(40 - 10 * row.count(M.mask) + t, 4.0 * t))
    assert steps(decode_diffusion, model, [[7, 99, 99, 99]] * 3, [(1, 2, 3), (2,), ()]) == [
        [[7, M.mask, 12, 13], [7, 99, 32, 99], [7, 99, 99, 99]],
        [[7, 31, 12, 13], [7, 99, 32, 99], [7, 99, 99, 99]]]


@pytest.mark.parametrize("chosen", ([[False, False]], [[True, False]]))
def test_a_decoder_that_reveals_nothing_is_stopped(chosen, monkeypatch):
    """If `surest` chooses no place, or one that is given, nothing changes, and it would go on for ever."""
    monkeypatch.setattr(code, "surest", lambda confidence: torch.tensor(chosen))
    with pytest.raises(AssertionError, match="surest must choose a blank"):
        steps(decode_diffusion, COUNTING, [[7, 99]], [(1,)])


@pytest.mark.parametrize("decoder", (decode_ar, decode_diffusion, decode_masked))
def test_a_mark_is_never_an_answer(decoder):
    """Even a model that would answer [pad], [mask] or [doc] everywhere must answer a word or the end."""
    model = scripted(lambda row, t: torch.arange(20.0, 0, -1))  # the lower the id the likelier
    *_, [last] = steps(decoder, model, [[M.question, M.answer, 99, 99]], [(2, 3)])
    assert last[-2:] == [M.end, M.end]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_each_mode_learns_one_batch_by_heart(mode):
    """Trained on three questions and a document alone, the model answers exactly, and fills the end of the
    document in: loss, shift and decoders agree."""
    answers = {"Who lives in Oslo?": "Curtis Chase Emley [end]", "Who lives in Rome?": "Alice Lane Doyle [end]",
               "What is the major of Alice Lane Doyle?": "Law [end] [end] [end]"}
    questions = stack([question_row(*pair) for pair in answers.items()])
    base, document = MODES[mode.base], stack([document_row("Curtis Chase Emley lives in Oslo.")])
    model = Transformer(SimpleNamespace(n_layer=2, n_head=2, n_embd=32, seed=0), mode.causal)
    optimizer, g = torch.optim.AdamW(model.parameters(), lr=5e-3), generator(1)
    total = lambda: (loss(model, *mode.objective(*document, g, mode.ratio))
                     + loss(model, *base.objective(*questions, g, base.ratio)))
    for _ in range(300):
        total().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert total() < 0.1
    tokens, canvas = stack([question_row(question, "") for question in answers])  # all of an answer is blank
    *_, filled = base.decode(model, tokens, canvas)
    assert [decode(row[at].tolist()) for row, at in zip(filled, canvas)] == [*answers.values()]
    tokens = document[0].clone()
    tokens[:, 6:] = M.mask  # [doc] Curtis Chase Emley lives in [mask] [mask] [mask]
    *_, filled = mode.decode(model, tokens, torch.arange(9)[None] == 6)
    assert decode([filled[0, -3]]) == "Oslo"
