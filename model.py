r"""
One small transformer for all objectives, and the loss that they share.

B rows in a batch, T tokens in a row, C channels, H heads of D = C / H channels, V tokens in the vocabulary:

    x = norm(embed(tokens))                 (B, T, C)
    x = x + attention(norm(x))              \ n_layer times; queries and keys are normed too
    x = x + mlp(norm(x))                    /
    logits = norm(x) @ embed.T              (B, T, V)

`causal` is the only difference between a language model that reads from left to right and one that fills in
masks. Many diffusion models are told how much was masked; this one sees for itself how many masks there are.

    python train.py --n_layer 4 --n_head 4 --n_embd 128      train a larger one
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import MARKS, TOKENIZER

# Apple's MPS is left out: its attention read masks of our shape wrongly (pytorch pull request 184180).
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]  # the best comes last


def norm(x):
    """LayerNorm without parameters, (..., C) -> (..., C)."""
    return F.layer_norm(x, (x.size(-1),))


def rotary(T, D, device):
    """cos and sin (T, D) of the angles position x frequency; both channels of a pair have the same angle.
    Attention then sees distances. (Learned positions would be untrained beyond the longest row of
    pretraining, and the rows of `masked` are twice as long.)"""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)              # (D / 2,)
    angle = torch.outer(torch.arange(T, device=device), frequency).repeat(1, 2)     # (T, D)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the channel pairs (a, b) of x (..., T, D) by their position's angles, to (a cos - b sin, b cos +
    a sin). RoPE (2104.09864, eq. 34) pairs channels 2i and 2i + 1; we, like most code, i and i + D / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Block(nn.Module):
    """Attention, then an MLP. Each adds to x (B, T, C)."""

    def __init__(self, n_head, n_embd):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x, rope, visible):
        x = x + self.attention(norm(x), rope, visible)
        return x + self.mlp(norm(x))

    def attention(self, x, rope, visible):
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_head, -1).transpose(1, 3)  # (B, H, 3, T, D)
        q, k, v = heads.unbind(2)                                           # (B, H, T, D) each
        q, k = rotate(norm(q), *rope), rotate(norm(k), *rope)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)      # softmax(q k^T / sqrt(D)) v
        return self.out(y.transpose(1, 2).reshape(B, T, C))

    def mlp(self, x):
        return self.down(F.relu(self.up(x)).square())  # F.dropout(..., 0.1, self.training) would go here


class Transformer(nn.Module):
    """`causal`: does position t see only positions up to t? Read from `settings`: n_layer, n_head, n_embd and
    seed. Matrices are drawn on the CPU, so that a seed gives the same ones on any machine. The output
    matrices of each block start at zero, so that it starts as the identity."""

    def __init__(self, settings, causal):
        super().__init__()
        self.causal = causal
        self.head_size = settings.n_embd // settings.n_head
        self.embed = nn.Embedding(TOKENIZER.n_vocab, settings.n_embd)
        self.blocks = nn.ModuleList(Block(settings.n_head, settings.n_embd) for _ in range(settings.n_layer))
        generator = torch.Generator().manual_seed(settings.seed)
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                std = weight.size(1) ** -0.5 if name.startswith("blocks") else 0.02  # .02: the embedding
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens, at=None):
        """(B, T) int64 tokens -> (B, T, V) logits, or (S, V) at the S positions where `at` (B, T) is true.
        Nothing sees padding, wherever in a row it stands. If causal, nothing sees the future."""
        T, device = tokens.size(1), tokens.device
        visible = (tokens != MARKS.pad)[:, None, None, :]  # (B, 1, 1, T): these keys, for all queries
        if self.causal:
            position = torch.arange(T, device=device)
            visible = visible & (position <= position[:, None])  # (B, 1, T, T): key <= query
        rope = rotary(T, self.head_size, device)
        x = norm(self.embed(tokens))
        for block in self.blocks:
            x = block(x, rope, visible)
        x = norm(x)  # (B, T, C)
        return F.linear(x if at is None else x[at], self.embed.weight)


def loss(model, inputs, targets, weights):
    """The mean over all B rows of the sum of weight x cross-entropy, in nats per token. Inputs, targets and
    weights are what an objective made, all (B, T) or all (B, 2T - 1), say. Logits, the largest tensor of a
    step, are computed only where a weight is not zero."""
    at = weights > 0
    nll = F.cross_entropy(model(inputs, at), targets[at], reduction="none")  # (S,)
    return (nll * weights[at]).sum() / len(inputs)
