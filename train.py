"""
Pretraining, fine-tuning, exam: one small transformer, one of three objectives, questions in both directions.

    python train.py --mode masked       learns new people from documents alone, knows them in both directions
    python train.py --mode ar           the same base and documents: cannot say who was born in Elkton
    python train.py --mode diffusion    the bidirectional model that fills in masks

Pretraining makes a base of known people: documents, and questions with answers. Fine-tuning adds documents
of new people, never a question about them, while known people are replayed. Two bases a seed serve all
arms, one causal, one bidirectional. A mode is one row of `MODES` (diffusion.py); all else is shared:

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
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import ARMS, MOST_PEOPLE, WORLD, make_corpus
from diffusion import MODES, RATIOS, loss
from eval import chance, differs, exam, fingerprints, report
from model import Stop, load, make_model, one_line, pick_machine, write

EXAMS_A_RUN = 10    # at most, during fine-tuning, and one before it
SAVE_EVERY = 25     # steps between two checkpoints, each with a line in the log
PRETRAINING = {"optimizer": "muon", "lr": 0.02, "embed_lr": 0.04, "decay": 1.0, "embed_decay": 0.0,
               "question_share": 0.16, "new_share": 0.0}  # fine-tuning has a flag for each


def train(run):
    """The steps of one stage, pretraining or fine-tuning, that are still to be done."""
    settings, model = run.settings, run.model
    mode = MODES[settings.mode]
    base = MODES[mode.base]
    documents, questions = rows_per_batch(settings)
    parameters = sum(p.numel() for p in model.parameters())
    fine_tuning = settings.stage == "fine-tuning"
    if fine_tuning and run.step == 0:
        run.examine()
    losses = []
    with tqdm(total=settings.steps, initial=run.step, desc=settings.stage, unit="step",
              dynamic_ncols=True) as progress:
        while run.step < settings.steps:
            clock = time.perf_counter()

            # 1. what is seen and what is asked: documents as the mode has it, questions as the base has it
            tokens, starts = run.draw(run.corpus.documents, documents)
            batches = [mode.objective(tokens, starts, settings.mask_ratio, run.mask_rng)]
            if questions:
                tokens, starts = run.draw(run.corpus.questions, questions)
                batches.append(base.objective(tokens, starts, base.ratio, run.mask_rng))

            # 2. one weighted cross-entropy, the mean over all rows
            model.zero_grad()
            mean = 0
            for inputs, targets, weights in batches:
                mean += loss(model, inputs, targets, weights) * len(inputs) / settings.batch_size
            mean.backward()

            # 3. one step of each optimizer
            for optimizer, peak in zip(run.optimizers, (settings.lr, settings.embed_lr)):
                for group in optimizer.param_groups:
                    group["lr"] = peak * schedule(run.step, settings.steps)
                optimizer.step()

            # 4. what it cost; now and then an exam, a line in the log, a checkpoint
            losses.append(mean.item())
            run.step += 1
            run.seconds += time.perf_counter() - clock
            run.flops += sum(6 * parameters * inputs.numel() for inputs, _, _ in batches)
            progress.update()
            last = run.step == settings.steps
            if fine_tuning and (last or run.step % math.ceil(settings.steps / EXAMS_A_RUN) == 0):
                run.examine()
            if last or run.step % SAVE_EVERY == 0:
                progress.set_postfix_str(f"loss {run.log_loss(losses):.3f}", refresh=False)
                run.save()
                losses = []


def rows_per_batch(settings):
    """({"known": 16, "new": 38}, {"forward": 8, "backward": 2}), say: documents and questions of a batch."""
    questions = round(settings.batch_size * settings.question_share)
    documents = settings.batch_size - questions
    new, backward = round(documents * settings.new_share), math.ceil(questions / 5)
    return ({"known": documents - new, "new": new},
            {"forward": questions - backward, "backward": backward} if questions else {})


def schedule(step, steps):
    """Share of the peak rate at a step from 0 to steps - 1: up in the first 2 %, then straight to zero."""
    return min((step + 1) / (0.02 * steps + 1), 1 - step / steps)


# -----------------------------------------------------------------------------
# Optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal: each direction of a matrix learns at the same pace, the
    rare ones, which single facts are, too (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The same as torch.optim.Muon, but for the format: that one multiplies in bfloat16, which took 24 times as
    long on a processor without instructions for it (680 ms and 28 ms a step at 128 channels).
    """

    def __init__(self, matrices, lr, weight_decay):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def orthogonal(matrix):
    """About the U V^T of a matrix U S V^T: five steps x -> a x + (b x x^T + c (x x^T)^2) x, after Newton and
    Schulz, take all singular values but very small ones to between 0.68 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


def make_optimizers(model, settings):
    """Muon (or AdamW) on the matrices inside the blocks, AdamW on all other parameters: the embedding."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    if settings.optimizer == "muon":
        inner = Muon(matrices, settings.lr, settings.decay)
    else:
        inner = torch.optim.AdamW(matrices, settings.lr, betas=(0.9, 0.95), weight_decay=settings.decay)
    outer = torch.optim.AdamW(others, settings.embed_lr, betas=(0.9, 0.95), weight_decay=settings.embed_decay)
    return [inner, outer]


# -----------------------------------------------------------------------------
# A stage of training: what it needs, how far it is, and the files it writes


class Run:
    """One stage: pretraining, kept in `path` alone, or fine-tuning, which also writes beside it."""

    def __init__(self, settings, path, corpus, model, log=()):
        self.settings, self.path, self.corpus, self.model = settings, path, corpus, model
        self.optimizers = make_optimizers(model, settings)
        # Rows and masks have generators of their own, so that all modes with one seed read the same rows.
        seed = 4 * settings.seed + 2 * (settings.stage == "fine-tuning")
        self.row_rng = torch.Generator().manual_seed(seed)
        self.mask_rng = torch.Generator().manual_seed(seed + 1)
        self.step, self.flops, self.seconds, self.log = 0, 0, 0.0, list(log)

    def draw(self, groups, counts):
        """counts[name] random rows from each of `groups` (name -> Rows) -> tokens (B, T), starts (B,)."""
        drawn = []
        for name, n in counts.items():
            index = torch.randint(len(groups[name].starts), (n,), generator=self.row_rng)
            drawn.append((groups[name].tokens[index], groups[name].starts[index]))
        return [torch.cat(parts).to(self.settings.device) for parts in zip(*drawn)]

    def add_to_log(self, **numbers):
        """Before each save and after each exam; weights that are no numbers are noticed here."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise Stop(f"the loss or a weight is no number at step {self.step} of {self.settings.stage}: "
                       f"lower the rates; {self.path} keeps the last good state, if one was saved")
        self.log.append({"stage": self.settings.stage, "step": self.step, "flops": self.flops,
                         "seconds": self.seconds, **numbers})

    def log_loss(self, losses):
        """A line in the log; returns the mean of the losses."""
        mean = sum(losses) / len(losses)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item()
        self.add_to_log(loss=mean, gradient_norm=norm, lr=self.optimizers[0].param_groups[0]["lr"])
        return mean

    def examine(self):
        """An exam: scores go into the log, answers into a file, two answers onto the screen."""
        scores, answers = exam(self.model, self.settings.mode, self.corpus)
        self.add_to_log(**scores)
        write(self.path.with_name("answers.jsonl"), json_lines(answers))
        tqdm.write("step {step:>5}   new: forward {forward:.2f} backward {backward:.2f}   known: forward "
                   "{known_forward:.2f} backward {known_backward:.2f}".format(step=self.step, **scores))
        for name in ("known_backward", "backward"):
            first = next(answer for answer in answers if answer["exam"] == name)
            tqdm.write("    {asked} -> {answer} [{truth}]".format(**first))

    def save(self):
        """The log, then the checkpoint. A stop between the two does no harm: the checkpoint holds a log, too,
        and who goes on from it writes the file anew."""
        if self.settings.stage == "fine-tuning":
            write(self.path.with_name("log.jsonl"), json_lines(self.log))
        checkpoint = {
            "settings": vars(self.settings), "log": self.log, "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "row_rng": self.row_rng.get_state(), "mask_rng": self.mask_rng.get_state()}
        torch.save(checkpoint, content := io.BytesIO())
        write(self.path, content.getvalue())

    def resume(self):
        """Go on from the checkpoint at `path`, if there is one of these settings."""
        if not self.path.exists():
            return
        saved = load(self.path, needs=("settings", "log", "model", "optimizers", "row_rng", "mask_rng"))
        difference = differs(saved["settings"], vars(self.settings))
        if difference:  # this is a base: main() has refused a run that differs
            return print(f"{self.path} has {difference}: {self.settings.stage} anew")
        self.log = saved["log"]
        self.step, self.flops, self.seconds = (self.log[-1][name] for name in ("step", "flops", "seconds"))
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.row_rng.set_state(saved["row_rng"])
        self.mask_rng.set_state(saved["mask_rng"])
        print(f"{self.path}: {self.settings.stage} goes on at step {self.step:,} of {self.settings.steps:,}")


def json_lines(dicts):
    return "".join(json.dumps(line) + "\n" for line in dicts).encode()


# -----------------------------------------------------------------------------
# The command line


def between(kind, low, high):
    """An argparse type: a number of this kind (int or float) from low to high."""
    def number(text):
        if not low <= kind(text) <= high:  # what is no number at all argparse refuses itself
            raise argparse.ArgumentTypeError(f"{text} is not from {low:,} to {high:,}")
        return kind(text)
    return number


def ratio(text):
    """An argparse type: a name in RATIOS or a number from 0 to 1."""
    return text if text in RATIOS else between(float, 0, 1)(text)


# The settings that pretraining does not depend on. The files of the code are settings, too, by fingerprint.
FINE_TUNING = ("mode", "paraphrases", "texts", "mask_ratio", "steps", *PRETRAINING, "eval.py")


def parse_args():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train on generated biographies, then take the exam.")
    about = lambda table: "; ".join(f"{name}: {row.about}" for name, row in table.items())
    count, rate = between(int, 1, 10**6), between(float, 0, 100)
    add = parser.add_argument_group("what is compared").add_argument
    add("--mode", choices=MODES, default="masked", help=about(MODES))
    add("--paraphrases", choices=ARMS, default="none", help=f"texts about a new person. {about(ARMS)}")
    add("--texts", type=between(int, 0, 100), default=0, help="how many; 0: as many as --paraphrases has")
    add("--mask_ratio", type=ratio, default=argparse.SUPPRESS, help="how much of a document is masked: a "
        f"share such as .5, or a name in RATIOS: {', '.join(RATIOS)} (default: what the mode has in MODES)")
    add = parser.add_argument_group("people").add_argument
    add("--known", type=count, default=200, help="people of pretraining: raise with --pretrain_steps")
    add("--new", type=count, default=100, help="people of fine-tuning: raise with --steps")
    add("--known_paraphrases", choices=ARMS, default="change_order", help="texts about a known person")
    add("--wordings", type=between(int, 1, 5), default=5, help="ways to word a fact: fewer is easier")
    add("--seed", type=between(int, 0, 2**31), default=0, help="another number, other people and weights")
    add = parser.add_argument_group("model and machine").add_argument
    add("--n_layer", type=count, default=3, help="blocks: raise for more people")
    add("--n_head", type=count, default=2, help="heads: twice this must divide n_embd")
    add("--n_embd", type=count, default=64, help="channels: raise for more people")
    add("--batch_size", type=between(int, 16, 10**6), default=64, help="rows a step: lower if out of memory")
    add("--device", default="auto", help="cpu, cuda or mps; auto takes the best there is")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="bfloat16 where it is fast")
    add("--pretrain_steps", type=between(int, 0, 10**9), default=1000,
        help="raise with --known; 0 fine-tunes an untrained model")
    add = parser.add_argument_group("fine-tuning (pretraining: see PRETRAINING in train.py)").add_argument
    add("--steps", type=between(int, 1, 10**9), default=1500, help="raise with --new")
    add("--optimizer", choices=("muon", "adamw"), default="muon",
        help="of the matrices; for adamw try other rates, such as --lr .001 --decay .1")
    add("--lr", type=rate, default=0.002, help="peak rate of the matrices: lower keeps more of the base")
    add("--embed_lr", type=rate, default=0.04, help="peak rate of the embedding: lower learns facts later")
    add("--decay", type=rate, default=0.66, help="weight decay of the matrices: lower keeps more of the base")
    add("--embed_decay", type=rate, default=0.033, help="weight decay of the embedding, likewise")
    add("--question_share", type=between(float, 0, 0.9), default=0.16,
        help="of the rows are questions; 0 for none")
    add("--new_share", type=between(float, 0, 1), default=0.7, help="of the documents are about new people")
    add = parser.add_argument_group("folder").add_argument
    add("--out_dir", type=Path, default=argparse.SUPPRESS,
        help="of the run (default: out/MODE-PARAPHRASES-FLAGS THAT WERE CHANGED-seedSEED)")
    add("--overwrite", action="store_true", help="train anew what stands in the folder")
    args = parser.parse_args()

    mode = MODES[args.mode]
    if "mask_ratio" in args and mode.ratio is None:
        parser.error(f"--mask_ratio {args.mask_ratio}: --mode {args.mode} masks nothing; leave it out")
    if "mask_ratio" in args and args.mask_ratio == 0 and not mode.causal:
        parser.error("--mask_ratio 0 hides nothing, so diffusion has nothing to learn: use more than 0")
    if args.n_embd % (2 * args.n_head):
        parser.error(f"--n_embd {args.n_embd} is no multiple of twice --n_head {args.n_head}: every head "
                     "needs an even number of channels")
    if args.known + args.new > MOST_PEOPLE:
        parser.error(f"--known and --new are too many people: there are names for {MOST_PEOPLE:,}")

    # Folder and base are named after the flags that were changed, in the order above: --lr .01 --known 300
    # trains out/masked-none-known300-lr0.01-seed0 from out/base-ar-known300-seed0.pt.
    defaults = {name: parser.get_default(name) for name in vars(args)} | {"mask_ratio": mode.ratio}
    unnamed = ("mode", "paraphrases", "seed", "device", "dtype", "out_dir", "overwrite")
    changed = {name: f"-{name}{value}" for name, value in vars(args).items()
               if name not in unnamed and value != defaults[name]}
    of_base = "".join(text for name, text in changed.items() if name not in FINE_TUNING)
    args.base = Path(f"out/base-{mode.base}{of_base}-seed{args.seed}.pt")
    if "out_dir" not in args:
        args.out_dir = Path(f"out/{args.mode}-{args.paraphrases}{''.join(changed.values())}-seed{args.seed}")
    if "mask_ratio" not in args:
        args.mask_ratio = mode.ratio
    args.device, args.dtype = pick_machine(args.device, args.dtype)
    return args


def stages(args):
    """args -> the settings of pretraining and of fine-tuning: all that their results depend on."""
    finetuning = vars(args) | {"stage": "fine-tuning", "torch": str(torch.__version__)} | fingerprints()
    for name in ("base", "out_dir", "overwrite"):
        finetuning.pop(name)
    pretraining = {name: value for name, value in finetuning.items() if name not in FINE_TUNING}
    mode = MODES[args.mode].base
    pretraining |= PRETRAINING | {"stage": "pretraining", "mode": mode, "mask_ratio": MODES[mode].ratio,
                                  "steps": args.pretrain_steps}
    return argparse.Namespace(**pretraining), argparse.Namespace(**finetuning)


@one_line
def main():
    """Pretraining if there is no base yet, fine-tuning, result. A run that is there goes on; one that is
    finished prints its result; one of other settings or other code is refused."""
    args = parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # on a GPU one seed gives one result,
    torch.use_deterministic_algorithms(args.device == "cuda", warn_only=True)  # as far as its kernels can
    pretraining, finetuning = stages(args)
    path, finished = args.out_dir / "ckpt.pt", args.out_dir / "result.json"
    if args.overwrite:
        for name in ("ckpt.pt", "result.json", "log.jsonl", "answers.jsonl"):
            (args.out_dir / name).unlink(missing_ok=True)
    for file in (finished, path):
        difference = file.exists() and differs(load(file, needs=["settings"])["settings"], vars(finetuning))
        if difference:
            raise Stop(f"{args.out_dir} was trained with {difference}: --overwrite trains it anew, "
                       "another --out_dir keeps both")
    if finished.exists():
        print(report(load(finished, needs=["settings"])))
        return print(f"{args.out_dir} is finished: --overwrite trains it anew")

    corpus = make_corpus(**{name: getattr(finetuning, name) for name in WORLD})
    model = make_model(vars(finetuning), MODES[args.mode].causal)
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.mode}: {size:,} parameters, {args.dtype} on {args.device}")
    print(f"{args.known} known and {args.new} new people; writing to {args.out_dir}")
    log = []  # of a run: it begins with that of its base
    if args.pretrain_steps and not path.exists():
        base = Run(pretraining, args.base, corpus, model)
        base.resume()
        train(base)  # which has no step to do if the base was finished
        log = base.log
    run = Run(finetuning, path, corpus, model, log)
    run.resume()
    train(run)

    exams = [line for line in run.log if "forward" in line]
    result = {"settings": vars(finetuning), **exams[-1], **chance(corpus)}
    result |= {f"before_{name}": score for name, score in exams[0].items()}
    result |= {f"peak_{name}": max(line[name] for line in exams) for name in ("forward", "backward")}
    result |= {"documents": args.steps * sum(rows_per_batch(finetuning)[0].values()),
               "curve": {name: [line[name] for line in exams] for name in ("step", "forward", "backward")},
               "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
               "threads": torch.get_num_threads()}
    write(finished, json.dumps(result, indent=1).encode())
    print(report(result))


if __name__ == "__main__":
    main()
