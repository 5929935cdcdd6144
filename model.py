r"""
One small transformer for all objectives: pre-norm, rotary positions, tied embeddings.

B rows in a batch, T tokens in a row, C channels, H heads of D = C / H channels, V tokens in the vocabulary:

    x = norm(embed(tokens))                 (B, T, C)
    x = x + attention(norm(x))              \ n_layer times; queries and keys are normed too
    x = x + mlp(norm(x))                    /
    logits = norm(x) @ embed.T              (B, T, V)

`causal` is the only difference between a language model that reads from left to right and one that fills in
masks. Many diffusion models are told how much was masked; this one sees for itself how many masks there are.

    python train.py --n_layer 4 --n_head 4 --n_embd 128      a larger one
"""
import io
import json
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import MARKS, TOKENIZER


def norm(x):
    """LayerNorm without parameters, (..., C) -> (..., C)."""
    return F.layer_norm(x, (x.size(-1),))


def rotary(T, D, device):
    """cos and sin (T, D) of the angles position x frequency; both channels of a pair have the same angle."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)  # (D / 2,)
    angle = torch.outer(torch.arange(T, device=device), frequency).repeat(1, 2)  # (T, D)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the channel pairs (a, b) of x (..., T, D) by their position's angles, to (a cos - b sin, b cos +
    a sin). The RoPE paper (2104.09864 eq. 34) pairs channels 2i and 2i + 1; we, like most code, i and
    i + D / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Block(nn.Module):
    """Attention, then an MLP; each adds to x (B, T, C). For dropout wrap one of the two: train.py has the
    model in training mode in its steps and nowhere else, and a resumed run drops the same."""

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
        return self.down(F.relu(self.up(x)).square())


class Transformer(nn.Module):
    """`causal`: does position t see only positions up to t? Read from `settings`: n_layer, n_head, n_embd,
    seed and dtype, that of the matrix products; weights, loss and optimizer stay float32.

    Matrices are drawn on the CPU, so that a seed gives the same ones on any machine; the output matrices of
    each block start at zero, so that it starts as the identity. Parameters that are no matrices (a norm's
    gain, if you add one) keep the start that torch gives them.
    """

    def __init__(self, settings, causal):
        super().__init__()
        self.causal, self.dtype = causal, settings.dtype
        self.head_size = settings.n_embd // settings.n_head
        self.embed = nn.Embedding(TOKENIZER.n_vocab, settings.n_embd)
        self.blocks = nn.ModuleList(Block(settings.n_head, settings.n_embd) for _ in range(settings.n_layer))
        generator = torch.Generator().manual_seed(settings.seed)
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                std = weight.size(-1) ** -0.5 if name.startswith("blocks") else 0.02  # else: the embedding
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens, at=None):
        """(B, T) int64 tokens -> (B, T, V) logits, or (S, V) for the S positions where `at` is true. Nothing
        sees padding, wherever in a row it stands; if causal, nothing sees the future."""
        T, device = tokens.size(1), tokens.device
        visible = (tokens != MARKS.pad)[:, None, None, :]  # (B, 1, 1, T): keys, for all queries
        if self.causal:
            position = torch.arange(T, device=device)
            visible = visible & (position <= position[:, None])  # (B, 1, T, T): key <= query
        rope = rotary(T, self.head_size, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            x = norm(self.embed(tokens))
            for block in self.blocks:
                x = block(x, rope, visible)
            x = norm(x)  # (B, T, C)
            return F.linear(x if at is None else x[at], self.embed.weight)


# -----------------------------------------------------------------------------
# From here on: no idea of the paper; skip it at first. The machine, and safe reading and writing of files.

# MPS is left out: bugs of its attention let queries see masked keys (pytorch issues 195910, 184180).
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]  # the best comes last


def recorded(function, device):
    """On a CPU, `function` itself. On a GPU the same as a CUDA graph, which starts all its kernels at once:
    one by one, that takes most of so small a model's time. The first call records the kernels and the
    addresses where they read and write; each call copies its tensors, always of the same shapes, there and
    replays them. Then no Python of `function` runs, so it must not branch on values, and what it returned is
    overwritten by the next call."""
    if device == "cpu":
        return function
    graph, inputs, result = None, None, None

    def replay(*tensors):
        nonlocal graph, inputs, result
        if graph is None:
            inputs = [x.to(device, copy=True) for x in tensors]
            chance = torch.cuda.get_rng_state()
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # the first calls set things up and must not be recorded
                for _ in range(3):
                    function(*inputs)
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.set_rng_state(chance)  # what they drew at random is as if it had not been
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                result = function(*inputs)
        for place, x in zip(inputs, tensors):
            assert place.shape == x.shape, f"recorded with {place.shape}, not {x.shape}: pad to one shape"
            place.copy_(x, non_blocking=True)
        graph.replay()
        return result
    return replay


def write(path, content):
    """Write bytes so that `path` holds the old content or the new, never half of it, even if this process is
    killed or the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may write the same base
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path):
    """The dict in a .pt or .json file, or the list of them in a .jsonl; nothing in it is executed."""
    content = path.read_bytes()
    try:
        texts = content.splitlines() if path.suffix == ".jsonl" else [content]
        if path.suffix == ".pt":
            found = [torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)]
        else:
            found = [json.loads(text) for text in texts]
        for saved in found:
            saved["settings"]["seed"], saved["code"]  # what each of them has
        return found if path.suffix == ".jsonl" else found[0]
    except Exception:  # there is no end to what a damaged file can raise
        sys.exit(f"{path} is damaged, or no checkpoint or result: name another, or move it away, then run the"
                 " same command again")
