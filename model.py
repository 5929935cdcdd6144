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
After the model come the choice of the machine and the files that models are kept in: skip them at first.
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
    """cos, sin of position x frequency, each (T, D / 2). RoPE, arXiv 2104.09864 eq. 34, which turns the
    pairs (2i, 2i + 1); we turn (i, i + D / 2), as most code does."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)  # (D / 2,)
    angle = torch.outer(torch.arange(T, device=device), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the channel pairs (i, i + D / 2) of x (..., T, D) by their position's angles."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.type_as(x), sin.type_as(x)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v, each (B, H, T, D), over the `visible` keys, (B, 1, 1 or T, T) bool.

    We use a fused kernel where it is right and fast. In bfloat16 on a CPU a step is a third shorter without
    it, and that of MPS has let queries see masked keys (pytorch issues 195910, 184180).
    """
    if q.is_cuda or q.is_cpu and q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    scores = (q @ k.transpose(-2, -1)) * q.size(-1) ** -0.5  # (B, H, T, T)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).type_as(v) @ v


class Attention(nn.Module):
    def __init__(self, n_head, n_embd):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x, rope, visible):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        q, k = (rotate(norm(z), *rope).type_as(v) for z in (q, k))  # autocast may have left them in float32
        y = attend(q, k, v, visible)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, n_head, n_embd):
        super().__init__()
        self.attention = Attention(n_head, n_embd)
        self.mlp = MLP(n_embd)

    def forward(self, x, rope, visible):
        x = x + self.attention(norm(x), rope, visible)
        return x + self.mlp(norm(x))


class Transformer(nn.Module):
    """`causal`: does position t see only positions up to t? `dtype` is that of the matrix products; weights,
    loss and optimizer are float32 in any case."""

    def __init__(self, n_layer, n_head, n_embd, causal, dtype="float32", vocab_size=TOKENIZER.n_vocab):
        super().__init__()
        self.causal, self.dtype = causal, dtype
        self.embed = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_head, n_embd) for _ in range(n_layer))
        self.head_size = n_embd // n_head

    def initialize(self, generator):
        """Normal weights from `generator`; what writes into the residual stream starts at zero, so that every
        block begins as the identity."""
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.zeros_(weight)
            else:
                std = weight.size(-1) ** -0.5 if name.startswith("blocks") else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens, at=None):
        """(B, T) int64 tokens -> (B, T, V) logits, or (S, V) for the S positions where `at` is true. Nothing
        sees padding; if causal, nothing sees the future."""
        T, device = tokens.size(1), tokens.device
        visible = (tokens != MARKS.pad)[:, None, None, :]  # (B, 1, 1, T): keys, for all queries
        if self.causal:
            position = torch.arange(T, device=device)
            visible = visible & (position <= position[:, None])  # (B, 1, T, T): keys up to each query
        rope = rotary(T, self.head_size, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            x = norm(self.embed(tokens))
            for block in self.blocks:
                x = block(x, rope, visible)
            x = norm(x)  # (B, T, C)
            return F.linear(x if at is None else x[at], self.embed.weight)


def make_model(settings, causal):
    """The untrained model that the settings of a run describe. The seed makes the same weights anywhere."""
    model = Transformer(settings["n_layer"], settings["n_head"], settings["n_embd"], causal,
                        settings["dtype"])
    model.initialize(torch.Generator().manual_seed(settings["seed"]))
    return model.to(settings["device"])


# -----------------------------------------------------------------------------
# The machine


class Stop(Exception):
    """The program ends here, with a message for the person who started it."""


def one_line(main):
    """Decorate a script's main(): what a person can mend ends in one line and exit code 2, as a wrong flag
    does. Anything else is a bug and keeps its traceback."""
    def guarded():
        sys.stdout.reconfigure(errors="replace")  # some terminals have no sign for a bar
        try:
            return main()
        except (Stop, OSError) as problem:
            message = problem
        except (MemoryError, RuntimeError) as problem:  # torch's "out of memory" is a RuntimeError
            if isinstance(problem, RuntimeError) and "allocate" not in str(problem):
                raise
            message = "out of memory: train with lower --batch_size, --n_embd, --n_layer or --known"
        except KeyboardInterrupt:
            message = "stopped by Ctrl-C: what was saved is intact, and the same command goes on from there"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    return guarded


def pick_machine(device, dtype):
    """The device and the dtype to use, where "auto" leaves either to us: the best device there is, bfloat16
    where the hardware multiplies it."""
    devices = ["cpu"]  # the best comes first
    if torch.backends.mps.is_available():
        devices.insert(0, "mps")
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
    if device not in ("auto", *devices):
        raise Stop(f"--device {device} cannot be used here: take {' or '.join(devices)}, or leave it out")
    device = devices[0] if device == "auto" else device
    if dtype == "auto":
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else
                device == "cpu" and torch.cpu._is_avx512_bf16_supported())
        dtype = "bfloat16" if fast else "float32"
    return device, dtype


# -----------------------------------------------------------------------------
# Files


def write(path, content):
    """Write bytes so that `path` holds what stood there or the new content, never half of it, even if this
    process is killed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may write the same base
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as problem:
        raise Stop(f"{path} could not be written ({problem}): what stood there is intact; repeat the command")
    finally:
        temporary.unlink(missing_ok=True)


def load(path, needs):
    """The dict in a .pt or .json file, which must have the keys in `needs`; code in it is never run."""
    content = path.read_bytes()
    try:
        saved = (json.loads(content) if path.suffix == ".json" else
                 torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        lacks = [key for key in needs if key not in saved]
    except Exception:  # there is no end to what a damaged file can raise
        raise Stop(f"{path} is damaged: delete it, then train (again)")
    if lacks:
        raise Stop(f"{path} lacks {', '.join(lacks)}: another version wrote it; move it away, then train")
    return saved
