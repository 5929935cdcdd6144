"""The mathematics of the objectives and decoders, each against an independent reference."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import diffusion as code
from conftest import generator
from data import MARKS as M, decode, document_row, question_row, stack
from diffusion import MODES, ar, corrupt, decode_ar, decode_diffusion, decode_masked, diffusion, masked
from model import Transformer, loss

L, V, X = 4, 10, (9, 7, 8, 6)  # a text of four tokens; the ids below 6 are marks
whole = lambda *shape: torch.ones(*shape, dtype=torch.bool)  # `learned` of rows without anything given
# Logits that favour one token, the surer the higher; a model made of such logits, of a row and a place in it.
one = lambda token, logit=3.0: logit * F.one_hot(torch.tensor(token), 120)
scripted = lambda logits: lambda tokens, at: torch.stack([
    torch.stack([logits(row, t) for t in range(len(row))]) for row in tokens.tolist()])
COUNTING = scripted(lambda row, t: one(row[t] + 1))  # behind 20 comes 21


def test_a_share_hides_as_many_tokens_of_a_row_rounded_up():
    """ceil(t L) of L tokens, by whole numbers. With floats, .6 x 25 is 15.000001, but 15 are to be hidden. A
    share close to 0 still hides one token, for a row that hides nothing asks nothing."""
    for percent in (0, 1e-5, *range(1, 101)):
        hidden, _ = corrupt(whole(48, 48).tril(), (percent / 100, percent / 100), generator())
        for row, k in enumerate(hidden.sum(1).tolist()):
            expected = -(-percent * (row + 1) // 100)
            assert k == expected, f"row {row}: {k} of {row + 1} hidden, expected {expected} at {percent} %"


def test_each_of_the_k_hidden_tokens_of_a_row_weighs_1_over_k():
    """And the others 0. By hand, for rows of four tokens of which two, all or none are hidden."""
    for t, expected in ((0.4, [0, 0, 0.5, 0.5]), (1, [0.25, 0.25, 0.25, 0.25]), (0, [0, 0, 0, 0])):
        for row in corrupt(whole(3, 4), (t, t), generator())[1].tolist():
            assert sorted(row) == expected, f"t = {t}: a row weighs {row}, expected {expected} in some order"


@pytest.mark.parametrize("low, high", ((0, 1), (0.25, 0.75)))
def test_the_shares_of_a_batch_are_spread_over_the_range(low, high):
    """Of eight rows, one has its share in each eighth of the range. With shares from 0 to 1 and 80 tokens,
    the row with the fewest masks has up to 10, the next 10 to 20, and so on. Rows that are drawn one by one
    are spread like this in one batch of 416 (8! / 8^8), here in each of 20."""
    for seed in range(20):
        found = sorted(corrupt(whole(8, 80), (low, high), generator(seed))[0].sum(1).tolist())
        for i, k in enumerate(found):
            first, last = (80 * (low + (high - low) * (i + more) / 8) for more in (0, 1))
            assert first <= k <= last, f"of 80 hidden: {found}, in slice {i} expected {first:g} to {last:g}"


def test_uniform_masking_hides_every_number_of_tokens_equally_often():
    """For a share t from 0 to 1, k = ceil(5 t) is 1, 2, 3, 4 or 5 with probability 1/5 each, and any k tokens
    are as likely as any other k. Of 400,000 rows each of the 31 ways to hide some has its share within 5
    standard errors (a false alarm once in 50,000 seeds; the seed is fixed)."""
    ways, n = [*itertools.product((0, 1), repeat=5)], 400_000
    hidden, _ = corrupt(whole(n, 5), (0, 1), generator())
    found = (hidden.int() * torch.tensor([16, 8, 4, 2, 1])).sum(1).bincount(minlength=32) / n
    for way, share in zip(ways[1:], found[1:].tolist()):
        p = 1 / 5 / math.comb(5, sum(way))
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n), f"hidden {way}: {share:.4f}, expected {p:.4f}"


def test_the_share_hidden_does_not_depend_on_where_in_the_batch_a_row_stands():
    """Known people's rows come first. Whoever draws t in slices and does not permute them masks them little.
    k / 40 is even over 1/40 .. 1, so its mean is .5125, its deviation .289. Of 20,000 rows, the mean of each
    quarter is within 5 standard errors of that (a false alarm once in 400,000 seeds; the seed is fixed)."""
    hidden, _ = corrupt(whole(20_000, 40), (0, 1), generator())
    for i, found in enumerate(hidden.double().mean(1).view(4, 5000).mean(1).tolist()):
        assert abs(found - 0.5125) < 5 * 0.289 / math.sqrt(5000), f"quarter {i}: {found:.3f} hidden, not .512"


@pytest.mark.parametrize("ratio", ((1.2, 1.2), (-0.1, -0.1), (0, 1.1), (-0.1, 1), (math.nan, math.nan)))
def test_a_share_outside_of_0_to_1_is_refused(ratio):
    """Else a schedule with a slip would train on, with all tokens hidden or none."""
    with pytest.raises(AssertionError, match="0 .. 1"):
        corrupt(whole(1000, 5), ratio, generator())


@pytest.mark.parametrize("objective, reads, asks", ids=("ar", "diffusion", "masked"), argvalues=(
    (ar, "       [doc]    He       lives    in",
         "       He       lives    in       [end]"),
    (diffusion, "[doc]    [mask]   [mask]   [mask]   [mask]",
                "-        He       lives    in       [end]"),
    (masked, "   [doc]    [mask]   [mask]   [mask]   [mask]   [answer] He       lives    in",
             "   -        -        -        -        -        He       lives    in       [end]")))
def test_what_an_objective_reads_and_what_it_asks(objective, reads, asks):
    """By hand, with all hidden that may be: what goes in, and what is asked there, with equal weights."""
    rows = objective(*stack([document_row("He lives in")]), generator(), (1, 1))
    inputs, targets, weights = (each[0].tolist() for each in rows)
    read = [decode([token]) for token in inputs]
    asked = [decode([token]) if weight else "-" for token, weight in zip(targets, weights)]
    assert read == reads.split(), f"{objective.__name__} reads {read}, expected {reads.split()}"
    assert asked == asks.split(), f"{objective.__name__} asks {asked}, expected {asks.split()}"
    assert {*weights} <= {0, 1 / 4}, f"{objective.__name__} weighs {weights}, expected 1/4 or 0"


@pytest.mark.parametrize("objective", (ar, diffusion, masked))
def test_only_what_is_learned_is_masked_and_asked_for(objective):
    """[doc], what is given, a question's words and padding are always shown, and of a response everything.
    `diffusion` asks for what is hidden, the others for all, in order: of an answer all four tokens, [end]s
    too, or their number would tell how long it is. Every row weighs the same."""
    rows = stack([document_row("He lives in Oslo."), document_row("She moved to Rome and works for Sony."),
                  question_row("Who went to Yale?", "Law"), ("[doc] Alice Lane Doyle", "is in Oslo. [end]")])
    learned = ((1, 7), (1, 11), (7, 11), (4, 9))  # from which place on and up to which, by hand
    for seed in range(20):
        inputs, targets, weights = objective(*rows, generator(seed), (0.5, 0.5))
        assert rows[0][0, 0] == M.doc, f"{objective.__name__} overwrites [doc] of its caller, expected a copy"
        for row, (first, end) in enumerate(learned):
            masks = (inputs[row] == M.mask).nonzero()[:, 0].tolist()
            k = 0 if objective is ar else (end - first + 1) // 2
            assert len(masks) == k and {*masks} <= {*range(first, end)}, (
                f"row {row}: masks at {masks}, expected {k} of the places {first} to {end - 1}")
            expected = rows[0][row, masks if objective is diffusion else range(first, end)].tolist()
            asked, total = targets[row, weights[row] > 0].tolist(), weights[row].sum().item()
            assert asked == expected, f"row {row}: asks for {decode(asked)!r}, expected {decode(expected)!r}"
            assert total == pytest.approx(1), f"row {row}: its weights sum to {total}, expected 1"


def test_what_is_hidden_depends_on_the_generator_alone():
    """Else no run could be repeated. The same seed hides the same places, another seed others."""
    one, same, other = (masked(7 * whole(9, 40), whole(9, 40), generator(n), (0, 1))[0] for n in (1, 1, 2))
    assert torch.equal(one, same), "the same seed hides other places: some numbers are not from `generator`"
    assert not torch.equal(one, other), "another seed hides the same places, expected others"


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
    tokens, k ~ U{1..L}, of the hidden ones' cross-entropy. The mean loss of n corruptions is within 5 errors
    of that (a false alarm once in 1.7 million seeds; the seed is fixed). With t in .05 .. .95, k = ceil(4 t)
    is 1 or 4 with probability .2/.9 each, else .25/.9: another number, more than 5 errors away."""
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
    """`masked` can use the base of `ar` since it asks a model for the same, the next token. A mode is causal
    if its base is. A causal model that is asked for what it reads would learn to copy."""
    for mode in MODES.values():
        assert MODES[mode.base].base == mode.base and MODES[mode.base].causal == mode.causal
    assert [MODES[name].causal for name in ("ar", "masked", "diffusion")] == [True, True, False]


def patient(model):
    """The same model, but asked for the tenth time it fails the test: else some decoders would never end."""
    calls, why = itertools.count(1), "the model was asked 9 times, and there are still blanks: it never ends"
    return lambda tokens, at=None: model(tokens, at) if next(calls) < 10 else pytest.fail(why)


def check_steps(decoder, model, rows, places, *expected):
    """Compares what a decoder yields, a text a step, when it is to fill these places of each row."""
    tokens = torch.tensor(rows)
    blank = torch.tensor([[t in its for t in range(tokens.size(1))] for its in places])
    yields = decoder(patient(model), tokens, blank)
    assert hasattr(yields, "__next__"), f"the decoder returns {yields}, expected that it yields, step by step"
    text = lambda row: " ".join(decode([token]) if token in M else str(token) for token in row)
    found = [" | ".join(map(text, now.tolist())) for now in itertools.islice(yields, 20)]
    assert found == [*expected], f"step by step {found}, expected {[*expected]}"
    unchanged = tokens.tolist() == rows and blank.sum() == sum(map(len, places))
    assert unchanged, "the decoder writes into its caller's tensors, expected that it makes copies"


def test_decode_ar_fills_one_blank_a_step_from_left_to_right():
    """Each answer depends on the one before it. What is given stays. A full row waits for the others."""
    check_steps(decode_ar, COUNTING, [[20, 99, 99], [30, 40, 99]], [(1, 2), (2,)],
                "20 21 99 | 30 40 41", "20 21 22 | 30 40 41")


def test_masked_reads_in_an_exam_what_it_reads_in_training():
    """The decoder puts a document with blanks in front as a prompt, as `masked` does with its holes. It gives
    the document back, the blanks of the response filled: with [end], by a model that knows nothing."""
    tokens, learned = stack([document_row("He lives in Oslo."), document_row("She moved to Rome.")])
    seen, (inputs, _, _) = [], masked(tokens, learned, generator(), (0.5, 0.5))
    blank = inputs[:, :tokens.size(1)] == M.mask
    model = lambda rows, at: seen.append(rows) or torch.zeros(*rows.shape, V)
    *_, filled = itertools.islice(decode_masked(model, tokens, blank), 20)
    assert torch.equal(seen[0][:, :-1], inputs) and torch.equal(filled, tokens.masked_fill(blank, M.end))


def test_two_bits_that_differ_need_two_steps():
    """XOR: of two tokens one is 10, the other 11. With both masked, 10 is likelier at either place, so they
    must not be filled at once. The last one is surer here; it comes first, stays, is seen: 11 10."""
    model = scripted(lambda row, t: one(11 if 10 in row else 10, 3.0 + t))
    check_steps(decode_diffusion, model, [[7, 99, 99]], [(1, 2)], "7 [mask] 10", "7 11 10")


@pytest.mark.parametrize("surest", ids=("two a step", "all of p above .9, at least one"), argvalues=(
    lambda p: F.one_hot(p.topk(2, dim=1).indices, p.size(1)).sum(1).bool(),
    lambda p: (p > 0.9) | (p == p.max(1, keepdim=True).values)))
def test_two_tokens_a_step_overwrite_nothing(surest, monkeypatch):
    """With three blanks in a row, one or none, each is written once, and no other place ever. The model
    writes 10 + t where it sees three masks, 30 + t where it sees one, so what is written twice would show."""
    monkeypatch.setattr(code, "surest", surest)
    model = scripted(lambda row, t: one(40 - 10 * row.count(M.mask) + t, 4.0 * t))
    check_steps(decode_diffusion, model, [[7, 99, 99, 99]] * 3, [(1, 2, 3), (2,), ()],
                "7 [mask] 12 13 | 7 99 32 99 | 7 99 99 99", "7 31 12 13 | 7 99 32 99 | 7 99 99 99")


@pytest.mark.parametrize("chosen", ([[False, False]], [[True, False]]))
def test_a_decoder_that_reveals_nothing_is_stopped(chosen, monkeypatch):
    """If `surest` chooses no place, or one that is given, nothing changes, and it would go on for ever."""
    monkeypatch.setattr(code, "surest", lambda confidence: torch.tensor(chosen))
    with pytest.raises(AssertionError, match="surest"):
        check_steps(decode_diffusion, COUNTING, [[7, 99]], [(1,)])


@pytest.mark.parametrize("decoder", (decode_ar, decode_diffusion, decode_masked))
def test_a_mark_is_never_an_answer(decoder):
    """Even a model that would answer [pad], [mask] or [doc] everywhere must answer a word or the end."""
    model = scripted(lambda row, t: torch.arange(20.0, 0, -1))  # the lower the id the likelier
    check_steps(decoder, model, [[M.question, M.answer, 99]], [(2,)], "[question] [answer] [end]")


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_each_mode_learns_one_batch_by_heart(mode):
    """Trained on three questions and a document alone, it answers exactly: loss, shift and decoders agree."""
    answers = {"Who lives in Oslo?": "Curtis Chase Emley", "Who lives in Rome?": "Alice Lane Doyle",
               "What is the major of Alice Lane Doyle?": "Law"}
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
    *_, filled = itertools.islice(base.decode(patient(model), tokens, canvas), 20)
    answered = [decode(row[at].tolist()).replace(" [end]", "") for row, at in zip(filled, canvas)]
    assert answered == [*answers.values()] and canvas.sum(1).eq(4).all()
    tokens, _ = stack([("[doc] Curtis Chase Emley lives in", "[mask] [mask] [mask]")])
    *_, filled = itertools.islice(mode.decode(model, tokens, torch.arange(9)[None] == 6), 20)
    assert decode([filled[0, 6]]) == "Oslo"
