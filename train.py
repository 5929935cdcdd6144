"""
Pretraining, fine-tuning, exam: one small transformer, one objective, questions in both directions.

    python train.py --mode masked       learns new people from documents alone, knows them in both directions
    python train.py --mode ar           same base, same documents, but it cannot say who moved to Lagos
    python train.py --mode diffusion    the bidirectional model that fills in masks
    python train.py --world books       a smaller world, for class: one fact a person

Pretraining makes a base from documents about known people, and questions with answers. Fine-tuning adds
documents about new people, never a question, while it replays the known ones. Per seed two bases, a causal
and a bidirectional one, serve all arms. A mode is one row of `MODES` (diffusion.py); all else is shared.

The same command again prints the result of a finished run, or goes on with an interrupted one. If you have
changed what its training depends on, it trains anew: the run before moves aside, and `python eval.py` shows
both. If you undo the change, the run before comes back.
"""
import argparse
import io
import json
import math
import os
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import ARMS, QUESTIONS, WORLDS, make_corpus
from diffusion import MODES
from eval import bayes, chance, claim, exam, identity, load, report, write
from model import DEVICES, Transformer, loss

EXAMS_A_RUN = 5     # at most, from step 0 on, at equal distances; one more comes at the end
SAVE_EVERY = 25     # steps between two checkpoints, each with a line in the log

# What pretraining has in place of the settings of fine-tuning, whatever these are, so that one base serves
# all arms. Half of its rows are questions. Its matrices learn faster and decay more (`forget`, explained in
# `make_optimizers`), for they have nothing to lose.
PRETRAINING = {"paraphrases": "none", "texts": 0, "mask_ratio": None, "batch": [32, 0, 16, 16],
               "pretrain_steps": 0, "lr": 0.02, "embed_lr": 0.04, "forget": 10.0, "embed_forget": 0.0}


def train(stage, settings, corpus, model, folder):
    """Do what is left of one stage, "pretraining" or "fine-tuning". The model learns in place. `folder` gets
    ckpt.pt and log.jsonl. If it has a checkpoint, training goes on from there, and ends with the same bits as
    if it had never stopped. -> the log, a list of dicts."""
    mode = MODES[settings.mode]
    base = MODES[mode.base]
    ratio = settings.mask_ratio or mode.ratio
    known, new, forward, backward = settings.batch
    optimizers = make_optimizers(model, settings)
    # Rows and masks have generators of their own, so that all modes with one seed read the same rows.
    seed = 4 * settings.seed + (0 if stage == "pretraining" else 2)
    row_rng, mask_rng = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    now = identity(settings, model)
    log = resume(folder, model, optimizers, (row_rng, mask_rng))
    start, seconds = (log[-1]["step"], log[-1]["seconds"]) if log else (0, 0.0)

    losses = []
    progress = tqdm(range(start, settings.steps), desc=stage, total=settings.steps, initial=start,
                    dynamic_ncols=True)
    for step in progress:
        if stage == "fine-tuning" and step % math.ceil(settings.steps / EXAMS_A_RUN) == 0:
            scores, _ = exam(model, settings.mode, corpus, QUESTIONS)
            log.append({"step": step, "seconds": seconds, **scores})
            tqdm.write(f"step {step:>5}  forward {scores['forward']:.2f}  backward {scores['backward']:.2f}")
        clock = time.perf_counter()
        model.train()
        torch.manual_seed(seed + step)  # for dropout, if you add it: a resumed run drops the same

        # 1. What is seen and what is asked: in documents by the mode, in questions by its base.
        tokens, learned = draw(corpus, {"known": known, "new": new}, row_rng)
        batches = [mode.objective(tokens, learned, mask_rng, ratio)]
        if forward or backward:
            tokens, learned = draw(corpus, {"known_forward": forward, "known_backward": backward}, row_rng)
            batches.append(base.objective(tokens, learned, mask_rng, base.ratio))

        # 2. One weighted cross-entropy, the mean over all rows, and its gradients.
        model.zero_grad()
        total = 0
        for batch in batches:
            inputs, targets, weights = (x.to(settings.device) for x in batch)
            total += loss(model, inputs, targets, weights) * len(inputs) / sum(settings.batch)  # its share
        total.backward()
        losses.append(total.detach())

        # 3. One step of each optimizer.
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, settings.steps)
            optimizer.step()
        seconds += time.perf_counter() - clock

        # 4. Now and then a line in the log and a checkpoint.
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == settings.steps:
            mean_loss = torch.stack(losses).mean().item()
            losses = []
            log.append({"step": step + 1, "seconds": seconds, "loss": mean_loss})
            save(folder, now, log, model, optimizers, (row_rng, mask_rng))
            progress.set_postfix_str(f"loss {mean_loss:.3f}", refresh=False)
    return log


def draw(corpus, counts, generator):
    """{"known": 21, "new": 38} -> so many random rows of each, one group after the other, as tokens (B, T),
    learned (B, T). To read each row once before any comes again, draw here from a shuffled order."""
    tokens, learned = [], []
    for name, n in counts.items():
        all_tokens, all_learned = corpus.rows[name]
        index = torch.randint(len(all_tokens), (n,), generator=generator)
        tokens.append(all_tokens[index])
        learned.append(all_learned[index])
    return torch.cat(tokens), torch.cat(learned)


def schedule(step, steps):
    """Share of the peak rate at a step from 0 to steps - 1: nearly 1 after 2 % of them, at last near 0."""
    rising = (step + 1) / (0.02 * steps + 1)
    falling = 1 - step / steps
    return min(rising, falling)


# -----------------------------------------------------------------------------
# From here on: no idea of the paper; skip it at first. Optimizers, settings, checkpoints, command line.

class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal at every step: all directions of a matrix learn at the same pace (Jordan et
    al. 2024, kellerjordan.github.io/posts/muon). Like torch.optim.Muon, but in float32: that one multiplies
    in bfloat16, which took 24 times as long on a processor without instructions for it."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 0.05)                        # .95 momentum + .05 gradient
                update = orthogonal(p.grad.lerp(momentum, 0.95))    # once more: Nesterov's momentum
                rows, columns = p.shape
                rate = group["lr"] * max(1, rows / columns) ** 0.5  # longer steps for tall matrices: his rule
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-rate)


def orthogonal(matrix):
    """Nearly U V^T for a matrix U S V^T. Five Newton-Schulz steps x -> a x + (b x x^T + c (x x^T)^2) x bring
    all but very small singular values to between 0.68 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def make_optimizers(model, settings):
    """Matrices in blocks learn by Muon at `lr`, embeddings by AdamW at `embed_lr`. Vectors, such as a norm's
    gain (this model has none), learn by AdamW at `lr` without decay. What is frozen is left out.

    `forget` sets the decay: over all steps a weight without gradient shrinks to about exp(-forget) of its
    start. A step multiplies it by 1 - peak x schedule x decay, and all steps by about exp(-decay x peak x
    rates), where `rates` is the sum of the schedule. So the decay is forget / rates / peak; and at most
    1 / peak, or the sign would turn."""
    rates = sum(schedule(step, settings.steps) for step in range(settings.steps))

    def group(parameters, peak, forget):
        decay = min(forget / rates, 1) / peak if peak else 0
        return {"params": parameters, "peak": peak, "lr": peak, "weight_decay": decay}

    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learning if p.dim() == 2 and name.startswith("blocks")]
    embeddings = [p for name, p in learning if p.dim() == 2 and not name.startswith("blocks")]
    vectors = [p for name, p in learning if p.dim() < 2]
    return [Muon([group(matrices, settings.lr, settings.forget)]),
            torch.optim.AdamW([group(embeddings, settings.embed_lr, settings.embed_forget),
                               group(vectors, settings.lr, 0)], betas=(0.9, 0.95))]


def resume(folder, model, optimizers, generators):
    """Take over the checkpoint in a folder, if there is one -> its log."""
    if not (folder / "ckpt.pt").exists():
        return []
    saved = load(folder / "ckpt.pt")
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    for generator, state in zip(generators, saved["generators"]):
        generator.set_state(state)
    print(f"{folder} is at step {saved['log'][-1]['step']:,}")
    return saved["log"]


def save(folder, now, log, model, optimizers, generators):
    """Write the log, then the checkpoint. A crash in between does no harm: the checkpoint holds the log, too,
    and a resumed run rewrites the file. A model that is broken is not saved."""
    if not all(p.isfinite().all() for p in model.parameters()):
        sys.exit(f"{folder}: at step {log[-1]['step']} a weight is not a finite number; lower the rates")
    write(folder / "log.jsonl", json_lines(log))
    content = io.BytesIO()
    torch.save({**now, "log": log, "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "generators": [generator.get_state() for generator in generators]}, content)
    write(folder / "ckpt.pt", content.getvalue())


def json_lines(dicts):
    return "".join(json.dumps(line) + "\n" for line in dicts).encode()


def flag(default, about, low=None, high=10**9, **more):
    """One field of Settings, which is also a flag. `about` is its help text, low and high are the range of a
    number (low gives its type), and `more` goes to argparse as it is."""
    if low is not None:
        more["type"] = type(low)
    more["help"] = about
    return field(default_factory=lambda: default, metadata={"range": (low, high), "more": more})


def rows_of(table):
    return "; ".join(f"{name}: {row.about}" for name, row in table.items())


@dataclass(frozen=True)
class Settings:
    """All that a run depends on, besides the code. Each field is a flag; a world may bring other defaults."""
    mode: str = flag("masked", f"the objective. {rows_of(MODES)}", choices=list(MODES))
    world: str = flag("biographies", "what people are like; has defaults of its own", choices=list(WORLDS))
    paraphrases: str = flag("none", f"texts about a new person. {rows_of(ARMS)}", choices=list(ARMS))
    texts: int = flag(0, "texts about a new person; 0: as many as --paraphrases has", 0)
    seed: int = flag(0, "another number, other people and weights", 0)
    steps: int = flag(1000, "of fine-tuning: raise with --new", 1)
    mask_ratio: list = flag(None, "least and largest share of a document to hide", 0.0, 1, nargs=2)
    batch: list = flag([21, 38, 2, 3], "rows a step: documents about known people, about new people, forward "
                       "questions, backward questions", 0, nargs=4)
    known: int = flag(200, "people in pretraining: raise with --pretrain_steps", 1)
    known_paraphrases: str = flag("change_order", "texts about a known person", choices=list(ARMS))
    new: int = flag(100, "people in fine-tuning: raise with --steps", 1)
    pretrain_steps: int = flag(1200, "raise with --known; 0 fine-tunes an untrained model", 0)
    n_layer: int = flag(3, "blocks: raise for more people", 1)
    n_head: int = flag(2, "heads: twice this must divide n_embd", 1)
    n_embd: int = flag(64, "channels: raise for more people", 1)
    lr: float = flag(0.002, "peak rate of the matrices: lower keeps more of the base", 0.0)
    embed_lr: float = flag(0.04, "peak rate of the embedding: lower is slower", 0.0)
    forget: float = flag(1.0, "decay of matrices: what gets no gradient shrinks to exp(-forget)", 0.0)
    embed_forget: float = flag(1.0, "decay of the embedding, likewise", 0.0)
    device: str = flag(DEVICES[-1], "cuda where torch finds a GPU", choices=DEVICES)


def of_base(settings):
    """The settings of a run -> those of its base."""
    return replace(settings, mode=MODES[settings.mode].base, steps=settings.pretrain_steps, **PRETRAINING)


def defaults(mode, world):
    """The settings of a mode in a world, if no flag says otherwise."""
    settings = replace(Settings(mode=mode, world=world), **WORLDS[world].settings)
    times = MODES[mode].times
    return replace(settings, pretrain_steps=times * settings.pretrain_steps, steps=times * settings.steps)


def name_of(settings, default):
    """The name "masked-none-books-lr0.01-seed0": mode, arm, world, what differs from its default, seed."""
    words = [settings.mode, settings.paraphrases]
    if settings.world != Settings().world:
        words.append(settings.world)
    for name, value in asdict(settings).items():
        if name not in ("mode", "paraphrases", "seed", "device") and value != getattr(default, name):
            words.append(name + str(value).strip("[]").replace(", ", "-"))
    return "-".join([*words, f"seed{settings.seed}"])


def parse_args():
    """-> the settings, and the folder of the run."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Settings):
        parser.add_argument(f"--{f.name}", default=f.default_factory(), **f.metadata["more"])
    parser.add_argument("--name", help="of the folder below out/; without it mode, arm and what you changed")
    # First a look at --mode and --world alone, which bring defaults of their own, so that --help shows these.
    first, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    parser.set_defaults(**vars(defaults(first.mode, first.world)))
    given = vars(parser.parse_args())
    name = given.pop("name")
    settings = Settings(**given)
    if name is None:
        name = name_of(settings, defaults(settings.mode, settings.world))

    for f in fields(Settings):
        (low, high), value = f.metadata["range"], getattr(settings, f.name)
        if low is None or value is None:  # no number, or not given
            continue
        numbers = value if isinstance(value, list) else [value]
        if not all(low <= number <= high for number in numbers):
            parser.error(f"--{f.name}: {value} is not from {low} to {high}")
    mode = MODES[settings.mode]
    if settings.mask_ratio and mode.ratio is None:
        parser.error(f"--mask_ratio: --mode {settings.mode} hides nothing; leave it out")
    if settings.mask_ratio == [0, 0] and not mode.causal:
        parser.error("--mask_ratio 0 0 hides nothing, so there is nothing to learn")
    if settings.n_embd % (2 * settings.n_head):
        parser.error(f"--n_embd {settings.n_embd} is no multiple of twice --n_head {settings.n_head}")
    if settings.batch[:2] == [0, 0]:
        parser.error("--batch: it needs documents, which are the first two numbers")
    if not re.fullmatch(r"(?!base-|\.+$)[\w.-]{1,200}", name, re.ASCII):
        parser.error("--name: up to 200 letters, digits, dots, dashes and underscores, and not base-...")
    return settings, Path("out", name)


def main():
    """Pretrain if there is no base yet, fine-tune, examine, write the result."""
    sys.stdout.reconfigure(errors="replace")  # some terminals cannot print the "█" of a bar
    settings, folder = parse_args()
    if settings.device == "cuda":  # one seed, one result, as far as a GPU can
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Do not also fill every new tensor with NaN: that made a third of the kernels of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False
    corpus = make_corpus(settings)
    model = Transformer(settings, MODES[settings.mode].causal).to(settings.device)
    now = identity(settings, model)
    claim(folder, now)
    if not (folder / "result.json").exists():
        print(f"{settings.known} known and {settings.new} new people, on {settings.device}, into {folder}")
        base = of_base(settings)
        base_folder = Path("out", f"base-{name_of(base, of_base(defaults(settings.mode, settings.world)))}")
        if base.steps:
            claim(base_folder, identity(base, model))
            train("pretraining", base, corpus, model, base_folder)
        # Here the base is done. To freeze its first block: model.blocks[0].requires_grad_(False)
        log = train("fine-tuning", settings, corpus, model, folder)

        scores, answers = exam(model, settings.mode, corpus)
        exams = [line for line in log if "forward" in line]
        exams.append({**log[-1], **scores, **bayes(model, settings.mode, corpus)})
        machine = torch.cuda.get_device_name() if settings.device == "cuda" else platform.machine()
        result = {**now, **exams[-1], **chance(corpus), "exams": exams, "machine": machine,
                  "python": platform.python_version(), "torch": str(torch.__version__)}
        write(folder / "answers.jsonl", json_lines(answers))
        write(folder / "result.json", json.dumps(result, indent=1).encode())
    result = load(folder / "result.json")
    print(report(result, result["exams"][0], "before"))
    print(f"to see it answer: python eval.py {folder} --ask")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on from the last checkpoint")
