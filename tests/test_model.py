"""What attention may see: the past, both sides, never padding, never a neighbour in the batch."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import model as code
from conftest import generator
from data import MARKS
from model import DEVICES, Transformer

V, PAD = 11, MARKS.pad  # the ids that are used here; the table has them all


def shape(**changes):
    """Two blocks of two heads of eight channels. (No train.py here, so that its tests may fail alone.)"""
    return SimpleNamespace(**dict(n_layer=2, n_head=2, n_embd=16, seed=0, dtype="float32") | changes)


def make(causal, seed=0, dtype="float32"):
    """A small model in float64 with no zero matrix, so that every path carries signal."""
    g = generator(seed)
    model = Transformer(shape(dtype=dtype), causal).double()
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


@pytest.mark.parametrize("causal", (True, False))
def test_the_model_is_its_equations(causal):
    """Two blocks written out in float64, query by query: each sees the past alone, or all eight keys. Logits
    can be had where they count alone, which is the same."""
    model, a = make(causal), tokens(B=1)
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


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("name", DEVICES)
def test_padding_and_batch_mates_change_nothing(name, causal):
    """A row gives the same logits alone, without its mates in the batch, and with five pad tokens after it,
    in float64 and float32."""
    model, a = make(causal), tokens()
    alone, padded = torch.cat([model(row[None]) for row in a]), F.pad(a, (0, 5), value=PAD)
    torch.testing.assert_close(model(padded)[:, :8], alone, rtol=1e-12, atol=1e-12)
    given = model.float().to(name)(padded.to(name))[:, :8].cpu().double()
    torch.testing.assert_close(given, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DEVICES)
def test_a_recording_reads_what_is_there_now(name):
    """A CUDA graph replays kernels, not results: it takes this call's tensors and today's weights. On a CPU
    nothing is recorded."""
    weight = torch.ones(3, device=name)
    scale = code.recorded(lambda x: x * weight, name)
    for factor in (1, 2, 3):
        weight.fill_(factor)
        x = torch.randn(2, 3, generator=generator(factor))
        assert torch.equal(scale(x).cpu(), factor * x)
