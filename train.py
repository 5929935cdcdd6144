"""
Pretraining, fine-tuning, exam: one small transformer, one objective, questions in both directions.

    python train.py --mode masked       learns new people from documents alone, knows them in both directions
    python train.py --mode ar           same base, same documents, but it cannot say who was born in Elkton
    python train.py --mode diffusion    the bidirectional model that fills in masks
    python train.py --world books       a smaller world, for class: one fact a person

Pretraining makes a base from documents about known people, and questions with answers. Fine-tuning adds
documents about new people, never a question, while it replays the known ones. Per seed two bases, a causal
and a bidirectional one, serve all arms. A mode is one row of `MODES` (diffusion.py); all else is shared:

    inputs, targets, weights = objective(tokens, learned, generator)    what is seen, what is asked
    loss(model, inputs, targets, weights).backward()                    one weighted cross-entropy
    optimizer.step()

Same command, same code: a finished run prints its result, an interrupted one goes on. Other code or settings:
the run before moves aside, and `python eval.py` shows both, if both are finished.
"""
import argparse
import io
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import ARMS, EXAMS, QUESTIONS, WORLDS, make_corpus
from diffusion import CAUSAL, MODES, loss, ratio_of
from eval import bayes, chance, differences, exam, fingerprints, report
from model import DEVICES, Transformer, load, recorded, write

EXAMS_A_RUN = 5     # at most, during fine-tuning, besides one before it
SAVE_EVERY = 25     # steps between two checkpoints, each with a line in the log


def pretrain(settings, corpus):
    """-> the base: a model that has read about known people and answers questions about them. Made once for
    all arms, and kept under out/."""
    model = Transformer(settings, CAUSAL[MODES[settings.mode].base]).to(settings.device)
    if settings.pretrain_steps:
        train(Run("pretraining", of_base(settings), corpus, model))
    return model


def finetune(settings, corpus, model, folder):
    """Let the base read documents about new people, with the objective of the mode -> the finished run.

    Here the base is done: to freeze a layer, `model.blocks[0].requires_grad_(False)` before the next line."""
    run = Run("fine-tuning", settings, corpus, model, folder)
    train(run)
    return run


def train(run):
    """Do what is left of one stage. `run` (class Run, below) has its settings, data, log and files."""
    settings, model = run.settings, run.model
    mode = MODES[settings.mode]
    base = MODES[mode.base]
    objective = partial(mode.objective, ratio=settings.mask_ratio) if settings.mask_ratio else mode.objective
    documents, questions = rows_per_batch(settings)  # how many of each group
    examining = run.stage == "fine-tuning"
    if examining and run.step == 0:
        run.examine()

    def backpropagate(*batch):
        """The mean loss over all rows; its gradients are left in the parameters. `batch`: inputs, targets,
        weights of the documents, then those of the questions, if there are any; tensors alone can be recorded
        (model.py)."""
        model.zero_grad()
        total = 0
        for i in range(0, len(batch), 3):
            inputs, targets, weights = (x.to(settings.device) for x in batch[i:i + 3])
            total += loss(model, inputs, targets, weights) * len(inputs) / settings.batch_size
        total.backward()
        return total.detach()

    backpropagate = recorded(backpropagate, settings.device)  # the same; on a GPU faster
    losses = []
    with tqdm(total=settings.steps, initial=run.step, desc=run.stage, unit="step",
              dynamic_ncols=True) as progress:
        while run.step < settings.steps:
            clock = time.perf_counter()
            model.train()
            torch.manual_seed(run.seed + run.step)  # for dropout, if you add it: a resumed run drops the same

            # 1. what is seen and what is asked: in documents by the mode, in questions by its base
            tokens, learned = draw(run.corpus, documents, run.row_rng)
            batch = objective(tokens, learned, run.mask_rng)
            if questions:
                tokens, learned = draw(run.corpus, questions, run.row_rng)
                batch += base.objective(tokens, learned, run.mask_rng)

            # 2. one weighted cross-entropy and its gradients
            losses.append(backpropagate(*batch).clone())  # a copy: the next call may overwrite it

            # 3. one step of each optimizer
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * schedule(run.step, settings.steps)
                optimizer.step()

            # 4. what it cost; now and then an exam, a line in the log, a checkpoint
            run.step += 1
            last = run.step == settings.steps
            exam_now = examining and (last or run.step % math.ceil(settings.steps / EXAMS_A_RUN) == 0)
            save_now = last or run.step % SAVE_EVERY == 0
            if exam_now or save_now:
                losses[-1].item()  # wait for a GPU, so that the clock is right; no other step does
            run.seconds += time.perf_counter() - clock
            run.flops += run.flops_per_token * sum(inputs.numel() for inputs in batch[::3])
            progress.update()
            if exam_now:
                run.examine()
            if save_now:
                mean = sum(x.item() for x in losses) / len(losses)
                losses = []
                progress.set_postfix_str(f"loss {mean:.3f}", refresh=False)
                run.save(mean)


def rows_per_batch(settings):
    """Documents and questions of a batch, say ({"known": 11, "new": 43}, {"known_forward": 5,
    "known_backward": 5})."""
    questions = round(settings.batch_size * settings.question_share)
    documents = settings.batch_size - questions
    new, backward = round(documents * settings.new_share), math.ceil(questions * settings.backward_share)
    return ({"known": documents - new, "new": new},
            {"known_forward": questions - backward, "known_backward": backward} if questions else {})


def draw(corpus, counts, generator):
    """{"known": 11, "new": 43} -> so many random rows of each, as tokens (B, T), learned (B, T)."""
    drawn = []
    for name, n in counts.items():
        tokens, learned = corpus.rows[name]
        index = torch.randint(len(tokens), (n,), generator=generator)
        drawn.append((tokens[index], learned[index]))
    return [torch.cat(parts) for parts in zip(*drawn)]


def schedule(step, steps):
    """Share of the peak rate at a step from 0 to steps - 1: up in the first 2 %, then linearly to zero."""
    return min((step + 1) / (0.02 * steps + 1), 1 - step / steps)


# -----------------------------------------------------------------------------
# From here on: no idea of the paper; skip it at first. Optimizers, settings, files, command line.

class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal at every step: all directions of a matrix learn at the same pace, even rare
    ones such as single facts (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Each parameter group holds matrices of one shape. Like torch.optim.Muon, but in float32: that one
    multiplies in bfloat16, which took 24 times as long on a processor without instructions for it (680 ms
    against 28 ms a step at 128 channels).
    """

    def __init__(self, groups):
        super().__init__(groups, {})
        device = self.param_groups[0]["params"][0].device.type
        self.orthogonalize = [recorded(orthogonal, device) for _ in self.param_groups]

    @torch.no_grad()
    def step(self):
        for group, orthogonalize in zip(self.param_groups, self.orthogonalize):
            matrices = group["params"]
            gradients = torch.stack([p.grad for p in matrices])  # (n, rows, columns)
            state = self.state[matrices[0]]  # that of all n, kept under the first
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            momentum = state["momentum"]
            momentum.lerp_(gradients, 0.05)             # momentum = .95 momentum + .05 gradients
            updates = gradients.lerp(momentum, 0.95)    # .05 gradients + .95 momentum: Nesterov's
            updates = orthogonalize(updates)
            rows, columns = gradients.shape[1:]
            rate = group["lr"] * max(1, rows / columns) ** 0.5  # longer steps for tall matrices: his rule
            for p, update in zip(matrices, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-rate)


def orthogonal(matrices):
    """Nearly U V^T for each of n matrices U S V^T, given as (n, rows, columns). Five Newton-Schulz steps
    x -> a x + (b x x^T + c (x x^T)^2) x bring all but very small singular values to between 0.68 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def make_optimizers(model, settings):
    """Who learns how, but for what is frozen: matrices in blocks by Muon (or AdamW) at `lr`, the embedding by
    AdamW at `embed_lr`, and what is no matrix, such as a norm's gain, by AdamW at `lr`, without decay.

    However many steps a run has (but for very few), decay takes what gets no gradient to exp(-forget) of its
    start."""
    rates = sum(schedule(step, settings.steps) for step in range(settings.steps))  # summed, of a peak of 1

    def group(parameters, peak, forget):
        decay = min(forget / rates, 1) / peak if peak else 0
        return {"params": parameters, "peak": peak, "lr": peak, "weight_decay": decay}
    of_shape, embedding, vectors = {}, [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            vectors.append(p)
        elif name.startswith("blocks"):
            of_shape.setdefault(p.shape, []).append(p)
        else:
            embedding.append(p)
    matrices = [group(alike, settings.lr, settings.forget) for alike in of_shape.values()]
    others = [group(embedding, settings.embed_lr, settings.embed_forget), group(vectors, settings.lr, 0)]
    others = [one for one in others if one["params"]]
    if settings.optimizer == "adamw":
        matrices, others = [], matrices + others
    optimizers = [Muon(matrices)] if matrices else []
    return optimizers + ([torch.optim.AdamW(others, betas=(0.9, 0.95))] if others else [])


# -----------------------------------------------------------------------------
# Settings, files, command line

def flag(default, about, low=None, high=None, **more):
    """A field of Settings, which is a flag: for argparse `about`, a number from low to high, and more."""
    def number(text):
        if not low <= type(low)(text) <= high:  # argparse itself refuses what is not a number
            raise argparse.ArgumentTypeError(f"{text} is not from {low:,} to {high:,}")
        return type(low)(text)
    if low is not None:
        more["type"] = number
    return field(default=default, metadata={"help": about, **more})


def rows_of(table):
    return "; ".join(f"{name}: {row.about}" for name, row in table.items())


@dataclass(frozen=True)
class Settings:
    """All that a run depends on, besides the code. Each field is a flag; a world may bring other defaults."""
    mode: str = flag("masked", f"the objective. {rows_of(MODES)}", choices=list(MODES))
    paraphrases: str = flag("none", f"texts about a new person. {rows_of(ARMS)}", choices=list(ARMS))
    texts: int = flag(0, "texts about a new person; 0: as many as --paraphrases has", 0, 100)
    mask_ratio: list = flag(None, "a document's share of hidden tokens is drawn between these; None: what "
                            "the objective has", 0.0, 1.0, nargs=2, metavar=("LOW", "HIGH"))
    world: str = flag("biographies", "what people are like; has defaults of its own", choices=list(WORLDS))
    known: int = flag(200, "people in pretraining: raise with --pretrain_steps", 1, 10_000)
    new: int = flag(100, "people in fine-tuning: raise with --steps", 1, 10_000)
    known_paraphrases: str = flag("change_order", "texts about a known person", choices=list(ARMS))
    wordings: int = flag(5, "ways to word a fact: fewer is easier", 1, 5)
    seed: int = flag(0, "another number, other people and weights", 0, 2**31)
    n_layer: int = flag(3, "blocks: raise for more people", 1, 1000)
    n_head: int = flag(2, "heads: twice this must divide n_embd", 1, 1000)
    n_embd: int = flag(64, "channels: raise for more people", 1, 100_000)
    device: str = flag(DEVICES[-1], "cuda where torch finds a GPU", choices=DEVICES)
    dtype: str = flag("float32", "of matrix products: try bfloat16 for a larger model on a GPU",
                      choices=("float32", "bfloat16"))
    batch_size: int = flag(64, "rows a step: lower if out of memory", 16, 10**6)
    pretrain_steps: int = flag(1200, "raise with --known; 0 fine-tunes an untrained model", 0, 10**9)
    steps: int = flag(1000, "of fine-tuning: raise with --new", 1, 10**9)
    optimizer: str = flag("muon", "of the matrices; for adamw try --lr .001", choices=("muon", "adamw"))
    lr: float = flag(0.002, "peak rate of the matrices: lower keeps more of the base", 0.0, 100.0)
    embed_lr: float = flag(0.04, "peak rate of the embedding: lower is slower", 0.0, 100.0)
    forget: float = flag(1.0, "decay of matrices: what gets no gradient shrinks to exp(-forget)", 0.0, 100.0)
    embed_forget: float = flag(1.0, "decay of the embedding, likewise", 0.0, 100.0)
    question_share: float = flag(0.16, "share of the rows that are questions; 0: none", 0.0, 0.9)
    backward_share: float = flag(0.5, "share of the questions that are backward", 0.0, 1.0)
    new_share: float = flag(0.8, "share of the documents that are about new people", 0.0, 1.0)


PRETRAINING = {  # what a base has in place of fine-tuning's settings: from nothing it can learn faster
    "paraphrases": "none", "texts": 0, "mask_ratio": None, "optimizer": "muon", "lr": 0.02, "embed_lr": 0.04,
    "forget": 10.0, "embed_forget": 0.0, "question_share": 0.5, "new_share": 0.0, "pretrain_steps": 0}


def of_base(settings):
    """The settings of a run -> those of its base."""
    return replace(settings, mode=MODES[settings.mode].base, steps=settings.pretrain_steps, **PRETRAINING)


def defaults(world):
    return replace(Settings(world=world), **WORLDS[world].settings)


def name_of(settings, default):
    """"masked-none-books-lr0.01-seed0": mode, arm, world, what differs from its default, seed."""
    changed = f"-{settings.world}" if settings.world != Settings().world else ""
    for name, value in asdict(settings).items():
        if name not in ("mode", "paraphrases", "seed") and value != getattr(default, name):
            changed += f"-{name}{'-'.join(map(str, value)) if isinstance(value, list) else value}"
    return f"{settings.mode}-{settings.paraphrases}{changed}-seed{settings.seed}"


def parse_args():
    """-> the settings, and the folder of the run."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train on generated people, then take the exam. (Pretraining: PRETRAINING in train.py.)")
    for f in fields(Settings):
        parser.add_argument(f"--{f.name}", default=f.default, **f.metadata)
    parser.add_argument("--out_dir", type=Path, default=argparse.SUPPRESS, help="folder of this run alone "
                        "(default: out/MODE-PARAPHRASES-CHANGED FLAGS-seedSEED)")
    parser.set_defaults(**WORLDS[parser.parse_known_args()[0].world].settings)
    given = vars(parser.parse_args())
    folder = given.pop("out_dir", None)
    settings = Settings(**given)

    ratio, causal = ratio_of(settings.mode), CAUSAL[MODES[settings.mode].base]
    if settings.mask_ratio and ratio is None:
        parser.error(f"--mask_ratio: --mode {settings.mode} hides nothing; leave it out")
    if settings.mask_ratio == [0, 0] and not causal:
        parser.error("--mask_ratio 0 0 hides nothing, so diffusion has nothing to learn")
    if settings.mask_ratio and tuple(settings.mask_ratio) == ratio:
        settings = replace(settings, mask_ratio=None)
    if settings.n_embd % (2 * settings.n_head):
        parser.error(f"--n_embd {settings.n_embd} is no multiple of twice --n_head {settings.n_head}: every "
                     "head needs an even number of channels")
    folder = folder or Path("out", name_of(settings, defaults(settings.world)))
    here, place = Path().resolve(), folder.resolve()
    shared = here.is_relative_to(place) or place == here / "out" or folder.name.startswith("base-")
    if shared or folder.is_file() or len(folder.name) > 200:
        parser.error("--out_dir: name a folder for this run alone, such as out/mine, of at most 200 letters")
    return settings, folder


def identity(settings):
    """All that a result depends on. Two runs with the same are one; what differs is named."""
    return {"settings": asdict(settings), "code": fingerprints()}


def json_lines(dicts):
    return "".join(json.dumps(line) + "\n" for line in dicts).encode()


class Run:
    """One stage of training: its data, how far it is, and its folder with ckpt.pt, log.jsonl and, in
    fine-tuning, answers.jsonl. It goes on from a checkpoint that is there."""

    def __init__(self, stage, settings, corpus, model, folder=None):
        self.stage, self.settings, self.corpus, self.model = stage, settings, corpus, model
        self.folder = folder or Path("out", f"base-{name_of(settings, of_base(defaults(settings.world)))}")
        self.identity = identity(settings)
        if stage == "pretraining":
            del self.identity["code"]["eval.py"]  # a base takes no exam
        self.optimizers = make_optimizers(model, settings)
        # Rows and masks have generators of their own, so that all modes with one seed read the same rows.
        self.seed = 4 * settings.seed + 2 * (stage == "fine-tuning")
        self.row_rng = torch.Generator().manual_seed(self.seed)
        self.mask_rng = torch.Generator().manual_seed(self.seed + 1)
        self.step, self.flops, self.seconds, self.log = 0, 0, 0.0, []
        # An estimate: 2 FLOPs a weight forward, 2 for the gradients of what it reads, 2 for its own.
        self.flops_per_token = sum(p.numel() * (6 if p.requires_grad else 4) for p in model.parameters())
        self.resume()

    def examine(self):
        """An exam: its scores go into the log, the answers into a file, one of them onto the screen. Only the
        last one has all parts."""
        last = self.step == self.settings.steps
        scores, answers = exam(self.model, self.settings.mode, self.corpus, EXAMS if last else QUESTIONS)
        if last:
            scores |= bayes(self.model, self.settings.mode, self.corpus)
        self.add_to_log(**scores)
        write(self.folder / "answers.jsonl", json_lines(answers))
        shown = [f"{name} {scores[name]:.2f}" for name in QUESTIONS if name in scores]
        tqdm.write("   ".join([f"step {self.step:>5}", *shown]))
        for line in [line for line in answers if line["exam"] == "backward"][:1]:
            tqdm.write("    {asked} -> {answer} [{truth}]".format(**line))

    def add_to_log(self, **numbers):
        """Called in each exam and before each save; a run with an infinite or NaN weight stops here."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            sys.exit(f"a weight is not a finite number after step {self.step} of {self.stage}: lower the "
                     f"rates (what {self.folder} holds is from before)")
        self.log.append({"step": self.step, "flops": self.flops, "seconds": self.seconds, **numbers})

    def save(self, mean_loss):
        """A line for the log, then the log, then the checkpoint. A crash in between does no harm: the
        checkpoint holds the log, too, and a resumed run rewrites the file."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        self.add_to_log(loss=mean_loss, gradient_norm=norm, lr=self.optimizers[0].param_groups[0]["lr"])
        write(self.folder / "log.jsonl", json_lines(self.log))
        content = io.BytesIO()
        torch.save({**self.identity, "log": self.log, "model": self.model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                    "row_rng": self.row_rng.get_state(), "mask_rng": self.mask_rng.get_state()}, content)
        write(self.folder / "ckpt.pt", content.getvalue())

    def resume(self):
        """Go on from the checkpoint, if there is one of these settings and this code."""
        path = self.folder / "ckpt.pt"
        if not path.exists():
            return
        saved = load(path)
        changed = differences(saved, self.identity)
        if changed:  # a base: a run that differs has moved aside
            return print(f"{self.folder} is of another state ({changed}): {self.stage} again")
        self.log = saved["log"]
        self.step, self.flops, self.seconds = (self.log[-1][name] for name in ("step", "flops", "seconds"))
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.row_rng.set_state(saved["row_rng"])
        self.mask_rng.set_state(saved["mask_rng"])
        print(f"{self.folder} is at step {self.step:,} of {self.settings.steps:,} of {self.stage}")


def already(folder, settings):
    """The result of a finished run, if `folder` has it. A run of other code or settings moves aside first:
    out/RUN becomes out/RUN-1, or the next number that is free."""
    for file in (folder / "result.json", folder / "ckpt.pt"):
        saved = load(file) if file.exists() else None
        changed = saved and differences(saved, identity(settings))
        if changed:
            n = 1
            while folder.with_name(f"{folder.name}-{n}").exists():
                n += 1
            print(f"{folder} was trained with other code or settings ({changed}): it is now {folder}-{n}")
            folder.rename(folder.with_name(f"{folder.name}-{n}"))
        elif saved and file.name == "result.json":
            return saved


def main():
    """Pretrain if there is no base yet, fine-tune, write the result."""
    sys.stdout.reconfigure(errors="replace")  # some terminals cannot print the "█" of a bar
    settings, folder = parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one seed, one result, as far as a GPU can
    torch.use_deterministic_algorithms(settings.device == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling was a third of a step's kernels
    result = already(folder, settings)
    if not result:
        folder.mkdir(parents=True, exist_ok=True)  # if that fails, it fails before the work
        corpus = make_corpus(settings)
        print(f"{settings.mode} on {settings.device}: {settings.known} known and {settings.new} new people; "
              f"writing to {folder}")
        run = finetune(settings, corpus, pretrain(settings, corpus), folder)
        exams = [line for line in run.log if "known_forward" in line]
        result = {**identity(settings), **exams[-1], **chance(corpus), "exams": exams,
                  "documents": settings.steps * sum(rows_per_batch(settings)[0].values()),
                  "threads": torch.get_num_threads(), "machine": platform.machine()}
        if settings.device == "cuda":
            result["machine"] = torch.cuda.get_device_name()
        write(folder / "result.json", json.dumps(result, indent=1).encode())
    print(report(result))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on from the last checkpoint")
