"""
What a user would pick instead: nanoGPT's model with AdamW, and torch's own Muon, on the same rows.

    python .lab/rivals.py nanogpt .003 .001 --mode ar --seed 1 --name nanogpt-ar-seed1
    python .lab/rivals.py torch_muon --mode ar --seed 1 --name torch_muon-ar-seed1
    python .lab/rivals.py ours --mode ar --seed 1

The two numbers are the rates of pretraining and of fine-tuning. Twenty exams in a run, so that one can read
off when a score is reached. Bases have the names that those of train.py have: run each rival, and each rate
of pretraining, in a folder of its own.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from data import MARKS, TOKENIZER


class Block(nn.Module):
    """GPT-2's: norms with a gain, GELU, no biases (nanoGPT's default for training from scratch)."""

    def __init__(self, H, C):
        super().__init__()
        self.H = H
        self.norm1, self.norm2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x, visible):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.H, -1).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NanoGPT(nn.Module):
    """Learned positions, tied embeddings; drawn as nanoGPT draws them."""

    def __init__(self, settings, causal):
        super().__init__()
        assert causal
        self.causal = True
        C, n = settings.n_embd, settings.n_layer
        self.embed, self.positions = nn.Embedding(TOKENIZER.n_vocab, C), nn.Embedding(128, C)
        self.blocks = nn.ModuleList(Block(settings.n_head, C) for _ in range(n))
        self.norm = nn.LayerNorm(C, bias=False)
        generator = torch.Generator().manual_seed(settings.seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = 0.02 / (2 * n) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens, at=None):
        position = torch.arange(tokens.size(1), device=tokens.device)
        visible = (tokens != MARKS.pad)[:, None, None, :] & (position <= position[:, None])
        x = self.embed(tokens) + self.positions(position)
        for block in self.blocks:
            x = block(x, visible)
        x = self.norm(x)
        return F.linear(x if at is None else x[at], self.embed.weight)


def adamw(model, settings):
    """AdamW for all, as in nanoGPT: betas .9 and .95, decay .1 of matrices, `lr` for all."""
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrix], "weight_decay": decay,
               "peak": settings.lr, "lr": settings.lr} for matrix, decay in ((True, 0.1), (False, 0.0))]
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95))]


class TorchMuon(torch.optim.Muon):
    """torch's, in bfloat16, with the rule of rates that ours has; it learns matrices one by one."""

    def __init__(self, groups):
        super().__init__([{**g, "adjust_lr_fn": "original"} for g in groups], momentum=0.95, nesterov=True)


if __name__ == "__main__":
    rival = sys.argv.pop(1)
    train.EXAMS_A_RUN = 20
    if rival == "nanogpt":
        train.Transformer, train.make_optimizers = NanoGPT, adamw
        train.PRETRAINING["lr"] = float(sys.argv.pop(1))
        sys.argv += ["--lr", sys.argv.pop(1)]
    elif rival == "torch_muon":
        train.Muon = TorchMuon
    train.main()
