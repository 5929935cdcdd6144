"""What attention may see: the past, both sides, never padding, never a batch mate; and the loss."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import generator
from data import MARKS
from model import DEVICES, Transformer, loss

TOKENS = torch.randint(1, 11, (3, 8), generator=generator(1))  # (B, T)
either = pytest.mark.parametrize("causal", (True, False))
on_each_device = pytest.mark.parametrize("name", DEVICES)


def make(causal):
    """Two blocks of two heads of eight channels, in float64. No matrix is zero: each path carries signal."""
    model, g = Transformer(SimpleNamespace(n_layer=2, n_head=2, n_embd=16, seed=0), causal), generator()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    return model.double().eval()


@pytest.mark.parametrize("j", range(8))
@on_each_device
def test_a_causal_model_never_sees_the_future(name, j):
    """Changing token j leaves all logits before j bit for bit alone, and changes those from j on: on every
    device that is here, for a fused kernel that leaks does so on one of them."""
    model, a = make(causal=True).float().to(name), TOKENS.to(name)
    b = torch.where(torch.arange(8, device=name) == j, a % 10 + 1, a)
    before, after = model(a), model(b)
    assert torch.equal(before[:, :j], after[:, :j])
    assert not torch.isclose(before[:, j:], after[:, j:]).all(-1).any()


@either
def test_the_model_is_its_equations(causal):
    """Two blocks written out in float64, query by query: each sees the past alone, or all eight keys. Logits
    can be had where they count alone, which is the same."""
    model, a = make(causal), TOKENS[:1]
    norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    turn = lambda z: torch.cat((z[..., :4] * cos - z[..., 4:] * sin, z[..., 4:] * cos + z[..., :4] * sin), -1)
    angle = torch.tensor([[t / 10_000 ** (i / 4) for i in range(4)] for t in range(8)]).double()
    cos, sin = angle.cos(), angle.sin()
    x = norm(model.embed.weight[a[0]])  # (T, C)
    for block in model.blocks:
        q, k, v = (norm(x) @ block.qkv.weight.T).view(8, 3, 2, 8).permute(1, 2, 0, 3)  # (H, T, D) each
        q, k = (turn(norm(z)) for z in (q, k))
        keys = [slice(t + 1 if causal else 8) for t in range(8)]
        y = [[(k[h, s] @ q[h, t] / 8**.5).softmax(0) @ v[h, s] for t, s in enumerate(keys)] for h in (0, 1)]
        x = x + torch.cat([torch.stack(head) for head in y], dim=1) @ block.out.weight.T
        x = x + (norm(x) @ block.up.weight.T).clamp(min=0)**2 @ block.down.weight.T
    torch.testing.assert_close(model(a)[0], norm(x) @ model.embed.weight.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(a, a > 5), model(a)[a > 5], rtol=1e-12, atol=1e-12)


@either
@on_each_device
def test_padding_and_batch_mates_change_nothing(name, causal):
    """A row gives the same logits alone, without its mates, and with five pad tokens after it."""
    model, padded = make(causal), F.pad(TOKENS, (0, 5), value=MARKS.pad)
    alone = torch.cat([model(row[None]) for row in TOKENS])
    torch.testing.assert_close(model(padded)[:, :8], alone, rtol=1e-12, atol=1e-12)
    given = model.float().to(name)(padded.to(name))[:, :8].cpu().double()
    torch.testing.assert_close(given, alone, rtol=1e-4, atol=1e-4)


@on_each_device
def test_loss_is_the_weighted_cross_entropy_of_a_hand_computed_case(name):
    """Two rows, logits log(1), log(2), log(5) at every position: p = 1/8, 2/8, 5/8."""
    logits = torch.tensor([1.0, 2.0, 5.0], device=name).log()
    model = lambda tokens, at=None: logits.expand((*tokens.shape, 3) if at is None else (int(at.sum()), 3))
    targets = torch.tensor([[2, 1, 0], [1, 1, 1]], device=name)
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], device=name)
    by_hand = (0.5 * -math.log(5 / 8) + 0.5 * -math.log(2 / 8) + 1.0 * -math.log(2 / 8)) / 2
    assert loss(model, targets, targets, weights).item() == pytest.approx(by_hand, rel=1e-6)
