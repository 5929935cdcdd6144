r"""
One small transformer for all three objectives: pre-norm, rotary positions, tied embeddings.

    x = norm(embed(tokens))                 (B, T, C)
    x = x + attention(norm(x))              \ n_layer times; queries and keys are normed too
    x = x + mlp(norm(x))                    /
    logits = norm(x) @ embed.T              (B, T, V)

`causal` is the only difference between a language model that reads from left to right and one that fills in
masks. The model is not told how much of its input is masked: it can count the masks.

    python train.py --n_layer 4 --n_head 4 --n_embd 128

B rows in a batch, T tokens in a row, C channels, H heads of D = C / H channels, V tokens in the vocabulary.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    causal: bool = True     # does position t see only positions up to t?
    pad: int = 0            # the token that fills rows up: nothing attends to it
    dtype: str = "float32"  # of the matrix products; weights, loss and optimizer are float32 in any case

    def __post_init__(self):
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"--n_embd {self.n_embd} is no multiple of 2 x --n_head = {2 * self.n_head}: "
                             "take one, so that every head gets an even number of channels")


def norm(x):
    """LayerNorm without parameters, (..., C) -> (..., C)."""
    return F.layer_norm(x, (x.size(-1),))


def rotary(T, D, device):
    """cos, sin of position x frequency, each (T, D / 2). RoPE, arXiv 2104.09864 eq. 34."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)  # (D / 2,)
    angle = torch.outer(torch.arange(T, device=device), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the channel pairs (i, i + D / 2) of x (B, H, T, D) by their position's angles."""
    (a, b), cos, sin = x.chunk(2, dim=-1), cos.type_as(x), sin.type_as(x)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v, each (B, H, T, D), over the `visible` keys, (B, 1, 1 or T, T) bool.

    CUDA has a fused kernel. Elsewhere we write it out: on short rows in bfloat16 that makes a step on a CPU a
    third shorter (README, notes), and the fused kernel of MPS has let queries see masked keys (pytorch issues
    195910, 184180, 181151).
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    scores = (q @ k.transpose(-2, -1)) * q.size(-1) ** -0.5  # (B, H, T, T)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).type_as(v) @ v


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, visible):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        q, k = (rotate(norm(z), *rope).type_as(v) for z in (q, k))  # autocast may have left them in float32
        y = attend(q, k, v, visible)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, rope, visible):
        x = x + self.attention(norm(x), rope, visible)
        return x + self.mlp(norm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))

    def initialize(self, generator):
        """Normal weights from `generator`; what writes into the residual stream starts at zero."""
        nn.init.normal_(self.embed.weight, std=0.02, generator=generator)
        for block in self.blocks:
            for matrix in (block.attention.qkv, block.mlp.up):
                nn.init.normal_(matrix.weight, std=matrix.in_features ** -0.5, generator=generator)
            for matrix in (block.attention.out, block.mlp.down):
                nn.init.zeros_(matrix.weight)
        return self

    def trunk(self, tokens):
        """(B, T) int64 tokens -> (B, T, C). Nothing sees padding; if causal, nothing sees the future."""
        T, device = tokens.size(1), tokens.device
        visible = (tokens != self.config.pad)[:, None, None, :]  # (B, 1, 1, T): keys, for all queries
        if self.config.causal:
            position = torch.arange(T, device=device)
            visible = visible & (position <= position[:, None])  # (B, 1, T, T): keys up to each query
        rope = rotary(T, self.config.n_embd // self.config.n_head, device)
        x = norm(self.embed(tokens))
        for block in self.blocks:
            x = block(x, rope, visible)
        return norm(x)

    def forward(self, tokens, at=None):
        """(B, T) int64 tokens -> (B, T, V) logits, or (S, V) for the S positions where `at` is true."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            x = self.trunk(tokens)
            return F.linear(x if at is None else x[at], self.embed.weight)

    def flops(self, B, T, scored):
        """Floating-point operations of one training step on (B, T) rows with `scored` scored positions.

        A multiplication and an addition each count one, so a C x C matrix costs 2 C^2 a token. A block has
        12 C^2 weights and two T x C products for attention (all T keys, causal or not); then V x C logits a
        scored position. Backward costs twice forward: three times all that.
        """
        C, V = self.config.n_embd, self.config.vocab_size
        return 3 * (B * T * self.config.n_layer * (2 * 12 * C * C + 2 * 2 * T * C) + scored * 2 * V * C)


def pick_machine(device="auto", dtype="auto"):
    """Names, or 'auto' for the best there is -> (device, dtype, why), all str. ValueError if not there."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if device not in ("auto", *here):
        raise ValueError(f"--device {device} cannot be used here: take {here[0]}, or auto")
    why = "asked for" if device != "auto" else "no GPU was found" if here == ["cpu"] else "a GPU was found"
    device = here[0] if device == "auto" else device
    fast = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": lambda: torch.cpu._is_avx512_bf16_supported(), "mps": lambda: False}[device]()
    dtype = dtype if dtype != "auto" else "bfloat16" if fast else "float32"
    return device, dtype, f"{why}; bfloat16 is {'' if fast else 'not '}fast here"
