"""What attention may see: the past, both sides, never padding, never a neighbour in the batch."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train

from conftest import DEVICES, generator
from data import MARKS
from model import ModelConfig, Transformer, attend, rotary, rotate

V, PAD = 11, MARKS.pad


def make(causal, seed=0, dtype="float32"):
    """A small model in float64 with no zero matrix, so that every path from input to output carries
    signal."""
    g = generator(seed)
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=16, causal=causal, vocab_size=V,
                                    dtype=dtype)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    return model


def tokens(B=3, T=8, seed=1):
    return torch.randint(1, V, (B, T), generator=generator(seed))


@pytest.mark.parametrize("j", range(8))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", DEVICES)
def test_a_causal_model_never_sees_the_future(name, dtype, j):
    """Changing token j leaves all logits before j bit for bit alone, and changes those from j on: on every
    device that is here and in both formats, for a fused kernel that leaks does so in one of them."""
    model, a = make(causal=True, dtype=dtype).float().to(name), tokens().to(name)
    b = a.clone()
    b[:, j] = a[:, j] % (V - 1) + 1
    before, after = model(a), model(b)
    assert torch.equal(before[:, :j], after[:, :j])
    assert not torch.isclose(before[:, j:], after[:, j:]).all(-1).any()


@pytest.mark.parametrize("name", DEVICES)
def test_a_bidirectional_model_sees_the_future(name):
    """The same change of the last token does reach the first position: filling in masks needs that."""
    model, a = make(causal=False).float().to(name), tokens().to(name)
    b = a.clone()
    b[:, -1] = a[:, -1] % (V - 1) + 1
    assert not torch.isclose(model(a)[:, 0], model(b)[:, 0]).all(-1).any()


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("name", DEVICES)
def test_every_device_computes_the_same(name, causal):
    """In float32 the logits agree with those of the CPU in float64 to four digits, padding and all."""
    model, a = make(causal), F.pad(tokens(), (0, 3), value=PAD)
    expected = model(a)[:, :8]
    given = model.float().to(name)(a.to(name))[:, :8].cpu().double()
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", (True, False))
def test_padding_changes_nothing(causal):
    """A row gives the same logits alone and with five pad tokens behind it."""
    model, a = make(causal), tokens()
    padded = F.pad(a, (0, 5), value=PAD)
    torch.testing.assert_close(model(padded)[:, :8], model(a), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", (True, False))
def test_a_batch_mate_must_not_matter(causal):
    """The first row's logits are the same whoever sits beside it."""
    model, a, other = make(causal), tokens(seed=1), tokens(seed=2)
    together = torch.cat((a[:1], other[1:]))
    torch.testing.assert_close(model(together)[0], model(a)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", (True, False))
def test_written_out_attention_is_attention(causal):
    """`attend` against PyTorch's own kernel, with the future hidden or the last two keys."""
    g = generator()
    q, k, v = torch.randn(3, 2, 2, 6, 4, generator=g, dtype=torch.float64)
    visible = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool).expand(2, 1, 1, 6)
    if causal:
        visible = torch.ones(6, 6, dtype=torch.bool).tril()
    truth = F.scaled_dot_product_attention(q, k, v, attn_mask=None if causal else visible, is_causal=causal)
    torch.testing.assert_close(attend(q, k, v, visible), truth)


def test_rotary_positions_are_relative():
    """The product of a query at position m and a key at n depends on m - n alone."""
    g = generator()
    q, k = torch.randn(2, 8, generator=g, dtype=torch.float64)
    cos, sin = rotary(12, 8, "cpu")
    turned = lambda x: rotate(x.expand(1, 1, 12, 8), cos, sin)[0, 0]  # (12, 8): x at every position
    scores = turned(q) @ turned(k).T
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert not torch.isclose(scores[3, 3], scores[3, 2])


def test_logits_at_chosen_positions():
    """`at` gives the very logits of the full (B, T, V) output, without making the others."""
    model, a = make(causal=True), tokens()
    at = torch.rand(a.shape, generator=generator()) < 0.5
    torch.testing.assert_close(model(a, at), model(a)[at])


def test_parameters_can_be_counted_by_hand():
    """12 C^2 a block (4 C^2 attention, 8 C^2 MLP) and one V x C table for both ends."""
    assert sum(p.numel() for p in make(causal=True).parameters()) == 2 * 12 * 16**2 + V * 16


def test_a_parameter_that_is_added_is_initialized_and_trained():
    """Whoever adds learned positions finds them drawn from the generator, and in exactly one optimizer; all
    groups of both optimizers follow the schedule."""
    class WithPositions(Transformer):
        def __init__(self, config):
            super().__init__(config)
            self.positions = torch.nn.Parameter(torch.full((48, config.n_embd), torch.nan))
            self.blocks[0].gain = torch.nn.Parameter(torch.full((config.n_embd,), torch.nan))
    config = ModelConfig(n_layer=2, n_head=1, n_embd=8, vocab_size=V)
    a, b = (WithPositions(config).initialize(generator(5)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    for name in ("muon", "adamw"):
        settings = SimpleNamespace(optimizer=name, lr=0.1, embed_lr=0.2, decay=0.3, embed_decay=0.4)
        optimizers = train.make_optimizers(a, settings)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        trained = [id(p) for group in groups for p in group["params"]]
        assert sorted(trained) == sorted(id(p) for p in a.parameters())
        assert [(group["peak"], group["weight_decay"]) for group in groups] == [(0.1, 0.3), (0.2, 0.4)]
