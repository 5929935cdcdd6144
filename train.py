"""
Pretraining, fine-tuning, exam: one small transformer, one objective, questions in both directions.

    python train.py --mode masked       learns new people from documents alone, knows them in both directions
    python train.py --mode ar           same base, same documents, but it cannot say who was born in Elkton
    python train.py --mode diffusion    the bidirectional model that fills in masks

Pretraining makes a base from documents about known people, and questions with answers. Fine-tuning adds
documents about new people, never a question, while it replays the known ones. Per seed two bases, a causal
and a bidirectional one, serve all arms. A mode is one row of `MODES` (diffusion.py); all else is shared:

    inputs, targets, weights = mode.objective(tokens, starts, ratio, generator)    what is seen, what is asked
    loss(model, inputs, targets, weights).backward()                               one weighted cross-entropy
    optimizer.step()
"""
import argparse
import io
import json
import math
import os
import platform
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import ARMS, make_corpus
from diffusion import MODES, RATIOS, loss
from eval import REPORTED, chance, differs, exam, fingerprints, report
from model import DEVICES, Stop, Transformer, load, one_line, recorded, write

EXAMS_A_RUN = 10    # at most, during fine-tuning; plus one before it
SAVE_EVERY = 25     # steps between two checkpoints, each with a line in the log
PRETRAINING = {  # what a base has in place of fine-tuning's flags; None: it does not depend on that
    "stage": "pretraining", "optimizer": "muon", "lr": 0.02, "embed_lr": 0.04, "decay": 1.0,
    "embed_decay": 0.0, "question_share": 0.16, "new_share": 0.0,
    "paraphrases": None, "texts": None, "eval.py": None}  # the last: that file's fingerprint


def train(run):
    """Do what is left of one stage. `run` (class Run, below) has its settings, data, log and files."""
    settings, model = run.settings, run.model
    mode = MODES[settings.mode]
    base = MODES[mode.base]
    documents, questions = rows_per_batch(settings)  # how many of each group
    fine_tuning = settings.stage == "fine-tuning"
    if fine_tuning and run.step == 0:
        run.examine()

    def backpropagate(*batch):
        """The mean loss over all rows; its gradients are left in the parameters. `batch`: inputs, targets,
        weights of the documents, then those of the questions, if there are any."""
        model.zero_grad()
        total = 0
        for i in range(0, len(batch), 3):
            inputs, targets, weights = (x.to(settings.device) for x in batch[i:i + 3])
            total += loss(model, inputs, targets, weights) * len(inputs) / settings.batch_size
        total.backward()
        return total.detach()

    backpropagate = recorded(backpropagate, settings.device)  # the same; on a GPU faster (model.py)
    losses = []
    with tqdm(total=settings.steps, initial=run.step, desc=settings.stage, unit="step",
              dynamic_ncols=True) as progress:
        while run.step < settings.steps:
            clock = time.perf_counter()

            # 1. what is seen and what is asked: in documents by the mode, in questions by its base
            tokens, starts = run.draw(documents)
            batch = mode.objective(tokens, starts, settings.mask_ratio, run.mask_rng)
            if questions:
                tokens, starts = run.draw(questions)
                batch += base.objective(tokens, starts, base.ratio, run.mask_rng)

            # 2. one weighted cross-entropy and its gradients
            losses.append(backpropagate(*batch).clone())  # a copy: the next call may overwrite it

            # 3. one step of each optimizer
            for optimizer, peak in zip(run.optimizers, (settings.lr, settings.embed_lr)):
                for group in optimizer.param_groups:
                    group["lr"] = peak * schedule(run.step, settings.steps)
                optimizer.step()

            # 4. what it cost; now and then an exam, a line in the log, a checkpoint
            run.step += 1
            last = run.step == settings.steps
            examining = fine_tuning and (last or run.step % math.ceil(settings.steps / EXAMS_A_RUN) == 0)
            saving = last or run.step % SAVE_EVERY == 0
            if examining or saving:
                losses[-1].item()  # wait for a GPU, so that the clock is right; no other step does
            run.seconds += time.perf_counter() - clock
            run.flops += sum(6 * model.size * inputs.numel() for inputs in batch[::3])  # an estimate
            progress.update()
            if examining:
                run.examine()
            if saving:
                mean = sum(x.item() for x in losses) / len(losses)
                losses = []
                progress.set_postfix_str(f"loss {mean:.3f}", refresh=False)
                run.save(mean)


def rows_per_batch(settings):
    """Documents and questions of a batch: ({"known": 16, "new": 38}, {"forward": 8, "backward": 2}), say.
    One question in five is backward (README, Limits: what half of them did)."""
    questions = round(settings.batch_size * settings.question_share)
    documents = settings.batch_size - questions
    new, backward = round(documents * settings.new_share), math.ceil(questions / 5)
    return ({"known": documents - new, "new": new},
            {"forward": questions - backward, "backward": backward} if questions else {})


def schedule(step, steps):
    """Share of the peak rate at a step from 0 to steps - 1: up in the first 2 %, then linearly to zero."""
    return min((step + 1) / (0.02 * steps + 1), 1 - step / steps)


# -----------------------------------------------------------------------------
# Optimizers

class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal at every step: all directions of a matrix learn at the same pace, even rare
    ones such as single facts (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Each parameter group holds matrices of one shape. Like torch.optim.Muon, but in float32: that one
    multiplies in bfloat16, which took 24 times as long on a processor without instructions for it (680 ms
    against 28 ms a step at 128 channels).
    """

    def __init__(self, matrices, lr, weight_decay):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
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
            momentum = state["momentum"].lerp_(gradients, 0.05)  # 0.95 of itself + 0.05 of the gradients
            updates = orthogonalize(gradients.lerp(momentum, 0.95))  # the same mix once more: Nesterov's
            for p, update in zip(matrices, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


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
    """Muon (or AdamW) on the matrices inside the blocks, AdamW on all other parameters: the embedding."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    if settings.optimizer == "muon":
        shapes = {matrix.shape for matrix in matrices}
        alike = [{"params": [p for p in matrices if p.shape == shape]} for shape in sorted(shapes)]
        inner = Muon(alike, settings.lr, settings.decay)
    else:
        inner = torch.optim.AdamW(matrices, settings.lr, betas=(0.9, 0.95), weight_decay=settings.decay)
    outer = torch.optim.AdamW(others, settings.embed_lr, betas=(0.9, 0.95), weight_decay=settings.embed_decay)
    return [inner, outer]


# -----------------------------------------------------------------------------
# A stage of training: its data, how far it is, and the files it writes

class Run:
    """One stage. `path` is its checkpoint; fine-tuning also writes log and answers into that folder."""

    def __init__(self, settings, path, corpus, model):
        self.settings, self.path, self.corpus, self.model = settings, path, corpus, model
        self.optimizers = make_optimizers(model, settings)
        # Rows and masks have generators of their own, so that all modes with one seed read the same rows.
        seed = 4 * settings.seed + 2 * (settings.stage == "fine-tuning")
        self.row_rng = torch.Generator().manual_seed(seed)
        self.mask_rng = torch.Generator().manual_seed(seed + 1)
        self.step, self.flops, self.seconds, self.log = 0, 0, 0.0, []

    def draw(self, counts):
        """{"known": 16, "new": 38} -> so many random rows of each, as tokens (B, T), starts (B,)."""
        drawn = []
        for name, n in counts.items():
            tokens, starts = self.corpus.rows[name]
            index = torch.randint(len(starts), (n,), generator=self.row_rng)
            drawn.append((tokens[index], starts[index]))
        return [torch.cat(parts) for parts in zip(*drawn)]

    def add_to_log(self, **numbers):
        """Called before each save and after each exam; a run with an infinite or NaN weight stops here."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise Stop(f"a weight is not a finite number after step {self.step} of {self.settings.stage}: "
                       f"lower the rates (whatever {self.path} holds is from before)")
        self.log.append({"stage": self.settings.stage, "step": self.step, "flops": self.flops,
                         "seconds": self.seconds, **numbers})

    def examine(self):
        """An exam: its scores go into the log, the answers into a file, two of them onto the screen."""
        scores, answers = exam(self.model, self.settings.mode, self.corpus)
        self.add_to_log(**scores)
        write(self.path.with_name("answers.jsonl"), json_lines(answers))
        tqdm.write("step {step:>5}   new: forward {forward:.2f} backward {backward:.2f}   known: forward "
                   "{known_forward:.2f} backward {known_backward:.2f}".format(step=self.step, **scores))
        for name in ("known_backward", "backward"):
            first = next(answer for answer in answers if answer["exam"] == name)
            tqdm.write("    {asked} -> {answer} [{truth}]".format(**first))

    def save(self, mean_loss):
        """A line for the log, then the log, then the checkpoint. A crash in between does no harm: the
        checkpoint holds the log, too, and a resumed run rewrites the file."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item()
        self.add_to_log(loss=mean_loss, gradient_norm=norm, lr=self.optimizers[0].param_groups[0]["lr"])
        if self.settings.stage == "fine-tuning":
            write(self.path.with_name("log.jsonl"), json_lines(self.log))
        checkpoint = {
            "settings": vars(self.settings), "log": self.log, "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "row_rng": self.row_rng.get_state(), "mask_rng": self.mask_rng.get_state()}
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write(self.path, content.getvalue())

    def resume(self):
        """Go on from the checkpoint at `path`, if there is one with these settings."""
        if not self.path.exists():
            return
        saved = load(self.path, needs=("settings", "log", "model", "optimizers", "row_rng", "mask_rng"))
        difference = differs(saved["settings"], vars(self.settings))
        if difference:  # then this is a base: main() has refused a run that differs
            return print(f"{self.path} has {difference}: {self.settings.stage} again, from scratch")
        self.log = saved["log"]
        self.step, self.flops, self.seconds = (self.log[-1][name] for name in ("step", "flops", "seconds"))
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.row_rng.set_state(saved["row_rng"])
        self.mask_rng.set_state(saved["mask_rng"])
        print(f"{self.path} is at step {self.step:,} of {self.settings.steps:,} of {self.settings.stage}")


def json_lines(dicts):
    return "".join(json.dumps(line) + "\n" for line in dicts).encode()


# -----------------------------------------------------------------------------
# The command line (flags, names of folders: at first, go on at `stages`)

def between(kind, low, high):
    """An argparse type: a number of this kind (int or float) from low to high."""
    def number(text):
        if not low <= kind(text) <= high:  # argparse itself refuses what is not a number
            raise argparse.ArgumentTypeError(f"{text} is not from {low:,} to {high:,}")
        return kind(text)
    return number


def name_or_share(text):
    """An argparse type: a name in RATIOS or a number from 0 to 1."""
    try:
        return text if text in RATIOS else between(float, 0, 1)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number and none of {', '.join(RATIOS)}")


def parse_args():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train on generated biographies, then take the exam.")
    about = lambda table: "; ".join(f"{name}: {row.about}" for name, row in table.items())
    count, rate = between(int, 1, 10**5), between(float, 0, 100)
    add = parser.add_argument_group("what is compared").add_argument
    add("--mode", choices=MODES, default="masked", help=about(MODES))
    add("--paraphrases", choices=ARMS, default="none", help=f"texts about a new person. {about(ARMS)}")
    add("--texts", type=between(int, 0, 100), default=0, help="per person; 0: as many as --paraphrases has")
    add("--mask_ratio", type=name_or_share, default=argparse.SUPPRESS, help="how much is masked: a "
        f"share such as .5, or a name in RATIOS: {', '.join(RATIOS)} (default: what the mode has in MODES)")
    add = parser.add_argument_group("people").add_argument
    add("--known", type=count, default=200,
        help="people in pretraining: raise with --pretrain_steps, and question_share in PRETRAINING")
    add("--new", type=count, default=100, help="people in fine-tuning: raise with --steps")
    add("--known_paraphrases", choices=ARMS, default="change_order", help="texts about a known person")
    add("--wordings", type=between(int, 1, 5), default=5, help="ways to word a fact: fewer is easier")
    add("--seed", type=between(int, 0, 2**31), default=0, help="another number, other people and weights")
    add = parser.add_argument_group("model and machine").add_argument
    add("--n_layer", type=count, default=3, help="blocks: raise for more people")
    add("--n_head", type=count, default=2, help="heads: twice this must divide n_embd")
    add("--n_embd", type=count, default=64, help="channels: raise for more people")
    add("--batch_size", type=between(int, 16, 10**6), default=64, help="rows a step: lower if out of memory")
    add("--device", choices=DEVICES, default=DEVICES[-1], help="cuda where torch finds a GPU")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of matrix products: try bfloat16 for a larger model on a GPU; on a CPU it was slower")
    add("--pretrain_steps", type=between(int, 0, 10**9), default=1000,
        help="raise with --known; 0 fine-tunes an untrained model")
    add = parser.add_argument_group("fine-tuning (pretraining: see PRETRAINING in train.py)").add_argument
    add("--steps", type=between(int, 1, 10**9), default=1500, help="raise with --new")
    add("--optimizer", choices=("muon", "adamw"), default="muon",
        help="optimizer of the matrices; for adamw try --lr .001 --decay .1")
    add("--lr", type=rate, default=0.002, help="peak rate of the matrices: lower keeps more of the base")
    add("--embed_lr", type=rate, default=0.04, help="peak rate of the embedding: lower is slower")
    add("--decay", type=rate, default=0.66, help="weight decay of the matrices: lower keeps more of the base")
    add("--embed_decay", type=rate, default=0.033, help="weight decay of the embedding, likewise")
    add("--question_share", type=between(float, 0, 0.9), default=0.16,
        help="share of the rows that are questions; 0: none")
    add("--new_share", type=between(float, 0, 1), default=0.7, help="share of documents about new people")
    add = parser.add_argument_group("folder").add_argument
    add("--out_dir", type=Path, default=argparse.SUPPRESS,
        help="folder of this run alone (default: out/MODE-PARAPHRASES-CHANGED FLAGS-seedSEED)")
    add("--overwrite", action="store_true", help="delete the run in that folder and train again")
    args = parser.parse_args()

    mode = MODES[args.mode]
    if "mask_ratio" in args and mode.ratio is None:
        parser.error(f"--mask_ratio {args.mask_ratio}: --mode {args.mode} takes none; leave it out")
    args.mask_ratio = getattr(args, "mask_ratio", mode.ratio)
    if args.mask_ratio == 0 and not mode.causal:
        parser.error("--mask_ratio 0 hides nothing, so diffusion has nothing to learn: use more than 0")
    if args.n_embd % (2 * args.n_head):
        parser.error(f"--n_embd {args.n_embd} is no multiple of twice --n_head {args.n_head}: every head "
                     "needs an even number of channels")

    # Folder and base are named after the flags that were changed: --lr .01 --known 300 starts from
    # out/base-ar-known300-seed0.pt and writes to out/masked-none-known300-lr0.01-seed0.
    defaults = {name: parser.get_default(name) for name in vars(args)} | {"mask_ratio": mode.ratio}
    unnamed = ("mode", "paraphrases", "seed", "out_dir", "overwrite")
    changed = {name: f"-{name}{value}" for name, value in vars(args).items()
               if name not in unnamed and value != defaults[name]}
    not_of_base = (*PRETRAINING, "mask_ratio", "steps")
    changed_of_base = "".join(text for name, text in changed.items() if name not in not_of_base)
    args.base = Path(f"out/base-{mode.base}{changed_of_base}-seed{args.seed}.pt")
    if "out_dir" not in args:
        args.out_dir = Path(f"out/{args.mode}-{args.paraphrases}{''.join(changed.values())}-seed{args.seed}")
    if len(args.base.name) > 200:
        parser.error("the name of the base is too long: change fewer flags")
    if len(args.out_dir.name) > 200:
        parser.error("the name of the run's folder is too long: name a shorter one with --out_dir")
    if args.out_dir.resolve() in (Path("out").resolve(), Path().resolve()):
        parser.error(f"--out_dir {args.out_dir}: name a folder for this run alone, such as out/mine")
    return args


def stages(args):
    """args -> the settings of pretraining and those of fine-tuning: all that their results depend on, code
    files by their fingerprints."""
    finetuning = vars(args) | {"stage": "fine-tuning", "torch": str(torch.__version__)} | fingerprints()
    finetuning["texts"] = args.texts or ARMS[args.paraphrases].texts
    for name in ("base", "out_dir", "overwrite"):
        finetuning.pop(name)
    base = MODES[args.mode].base
    pretraining = finetuning | PRETRAINING | {"mode": base, "mask_ratio": MODES[base].ratio,
                                              "steps": args.pretrain_steps}
    return argparse.Namespace(**pretraining), argparse.Namespace(**finetuning)


@one_line
def main():
    """Pretrain if there is no base yet, fine-tune, write the result. An unfinished run is resumed; a finished
    one prints its result; one with other settings or other code is refused."""
    args = parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one seed, one result, as far as a GPU can
    torch.use_deterministic_algorithms(args.device == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling was a third of a step's kernels
    pretraining, finetuning = stages(args)
    path, finished = args.out_dir / "ckpt.pt", args.out_dir / "result.json"
    if args.overwrite:
        for name in ("ckpt.pt", "result.json", "log.jsonl", "answers.jsonl"):
            (args.out_dir / name).unlink(missing_ok=True)
    for file in (finished, path):
        if file.exists():
            difference = differs(load(file, needs=["settings"])["settings"], vars(finetuning))
            if difference:
                raise Stop(f"{args.out_dir} was trained with {difference}: --overwrite trains it again, "
                           "another --out_dir keeps both")
    if finished.exists():
        print(report(load(finished, needs=REPORTED)))
        return print(f"{args.out_dir} is finished: --overwrite trains it again")

    args.out_dir.mkdir(parents=True, exist_ok=True)  # if that fails, it fails before the work
    corpus = make_corpus(**vars(finetuning))
    model = Transformer(MODES[args.mode].causal, **vars(finetuning)).to(args.device)
    print(f"{args.mode}: {model.size:,} parameters, {args.dtype} on {args.device}")
    print(f"{args.known} known and {args.new} new people; writing to {args.out_dir}")
    run = Run(finetuning, path, corpus, model)
    if args.pretrain_steps and not path.exists():
        base = Run(pretraining, args.base, corpus, model)
        base.resume()
        train(base)  # which does nothing if the base was finished
        run.log = base.log  # and its weights are in `model`: all that fine-tuning takes over
    run.resume()
    train(run)

    exams = [line for line in run.log if "forward" in line]
    result = {"settings": vars(finetuning), **exams[-1], **chance(corpus)}
    result |= {f"before_{name}": score for name, score in exams[0].items()}
    result |= {f"peak_{name}": max(line[name] for line in exams) for name in ("forward", "backward")}
    result |= {"curve": {name: [line[name] for line in exams] for name in ("step", "forward", "backward")},
               "documents": args.steps * sum(rows_per_batch(finetuning)[0].values()),
               "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
               "threads": torch.get_num_threads()}
    write(finished, json.dumps(result, indent=1).encode())
    print(report(result))


if __name__ == "__main__":
    main()
