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

Below the model: what makes a GPU fast, errors, and safe reading and writing of files. Skip these at first.
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
    """cos, and sin with the signs that `rotate` needs, of the angles position x frequency. Both channels of a
    pair have the same angle, so each is (T, D)."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)  # (D / 2,)
    angle = torch.outer(torch.arange(T, device=device), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Rotate the channel pairs (a, b) of x (..., T, D) by their position's angles, to (a cos - b sin, b cos +
    a sin). The RoPE paper (2104.09864 eq. 34) pairs channels 2i and 2i + 1; we, like most code, i and
    i + D / 2, so that a roll by half of D exchanges a and b."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


class Block(nn.Module):
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
        H = self.n_head
        heads = self.qkv(x).view(B, T, 3 * H, -1).transpose(1, 2)  # (B, 3H, T, D): queries, keys, values
        qk, v = heads.split((2 * H, H), dim=1)
        q, k = rotate(norm(qk), *rope).type_as(v).chunk(2, dim=1)  # autocast runs `norm` in float32
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)  # softmax(q k^T / sqrt(D)) v
        return self.out(y.transpose(1, 2).reshape(B, T, C))

    def mlp(self, x):
        return self.down(F.relu(self.up(x)).square())


class Transformer(nn.Module):
    """`causal`: does position t see only positions up to t? `dtype`: that of the matrix products; weights,
    loss and optimizer stay float32. Weights are drawn on the CPU, so that a seed gives the same ones on any
    machine; the output matrices of each block start at zero, so that it starts as the identity."""

    def __init__(self, causal, n_layer, n_head, n_embd, dtype="float32", seed=0, vocab_size=TOKENIZER.n_vocab,
                 **_):  # callers may pass all settings of a run
        super().__init__()
        self.causal, self.dtype, self.head_size = causal, dtype, n_embd // n_head
        self.embed = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_head, n_embd) for _ in range(n_layer))
        self.size = sum(weight.numel() for weight in self.parameters())  # how many numbers it learns
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(weight)
            else:
                std = weight.size(-1) ** -0.5 if name.startswith("blocks") else 0.02  # else: the embedding
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens, at=None):
        """(B, T) int64 tokens -> (B, T, V) logits, or (S, V) for the S positions where `at` is true. Nothing
        sees padding; if causal, nothing sees the future."""
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
# The machine, its user, its files

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
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # the first calls set things up and must not be recorded
                for _ in range(3):
                    function(*inputs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                result = function(*inputs)
        for place, x in zip(inputs, tensors):
            assert place.shape == x.shape, f"recorded with {place.shape}, not {x.shape}: pad to one shape"
            place.copy_(x, non_blocking=True)
        graph.replay()
        return result
    return replay


RESUME = "saved work is safe: train.py resumes by the same command without --overwrite"


class Stop(Exception):
    """The program ends here, with one line for its user."""


def one_line(main):
    """Decorate a script's main(): an error that its user can fix ends in one line and exit code 2, as a wrong
    flag does. Any other exception is a bug and keeps its traceback."""
    def guarded():
        if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
            sys.stdout.reconfigure(errors="replace")  # some terminals cannot print the "█" of a bar
        try:
            return main()
        except Stop as problem:
            message = problem
        except OSError as problem:
            message = f"{problem}: mend it; {RESUME}"
        except (MemoryError, RuntimeError) as problem:
            no_memory = "allocate" in str(problem) or "out of memory" in str(problem)  # torch's words for it
            if isinstance(problem, RuntimeError) and not no_memory:
                raise
            message = "out of memory: train with lower --batch_size, --n_embd, --n_layer or --known"
        except KeyboardInterrupt:
            message = f"stopped by Ctrl-C; {RESUME}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    return guarded


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


def load(path, needs):
    """The dict in a .pt or .json file, which must have the keys in `needs`; nothing in it is executed."""
    content = path.read_bytes()
    try:
        saved = (json.loads(content) if path.suffix == ".json" else
                 torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        lacks = [key for key in needs if key not in saved]
        saved.get("settings", {"seed": 0})["seed"]  # settings are a dict with a seed
    except Exception:  # there is no end to what a damaged file can raise
        raise Stop(f"{path} cannot be read: if it is damaged, delete it and train again")
    if lacks:
        raise Stop(f"{path} lacks {', '.join(lacks)}: another version wrote it; move it away, then train")
    return saved
