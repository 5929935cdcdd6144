"""
The runs to publish: each line of ROWS and EDITS with seeds 1, 2 and 3, each line of SEED_1 with seed 1. What
is finished is skipped, what was interrupted goes on. From the root of the repository:

    python .lab/runs.py              everything, one run after the other, into out/
    python .lab/runs.py 2 books      seed 2 alone, rows with "books"
    python .lab/runs.py collect      add all results below out/ to .lab/runs.jsonl, or to another file
    python .lab/runs.py table        what `python eval.py` prints, of .lab/runs.jsonl
    python .lab/runs.py less         differences of rows, seed by seed, from .lab/runs.jsonl
    python .lab/runs.py figures      .lab/curves.svg (over steps), .lab/texts.svg, .lab/people.svg

A row is flags of train.py, with the modes, arms and worlds of controls.py. The rows of EDITS are flags for a
copy of the five files, in out/NAME/, in which one place of one file is replaced.
"""
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from math import log2
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import controls  # adds its modes, arms and worlds
import eval as evaluation
import train

PLAIN = "--known_paraphrases none"          # known people told in one text each
ANYWHERE = "--known_paraphrases name_anywhere --texts 20"
ALL = ("ar", "masked", "diffusion")


def rows(*groups):
    return [f"--mode {mode} {flags}".strip() for modes, flags in groups for mode in modes]


def as_many(n, modes=ALL):
    """n new people, and steps in proportion, so that each of them is read about as often."""
    return [f"--mode {mode} --new {n} --steps {train.defaults(mode, 'biographies').steps * n // 100}"
            for mode in modes]


ROWS = rows(
    # modes and arms
    (ALL, ""), (ALL, "--paraphrases same_order"), (ALL, "--paraphrases change_order"),
    # the order of the text decides
    *((ALL, f"--world books --paraphrases {arm}") for arm in ("none", "name_last", "both_orders --texts 2")),
    # cause
    (("masked_hidden", "masked_shown", "random_prompt", "masked_doc_mark"), ""),
    (("masked",), "--batch 0 38 2 3"), (("masked",), "--batch 21 38 0 0"),
    (("masked",), "--paraphrases name_given"), (("ar",), "--steps 2000"),
    *((("masked",), f"--mask_ratio {ratio}") for ratio in ("0 0", ".5 .5", "1 1")),
    # without masks
    (("ar",), "--paraphrases reversed"), (("ar",), "--paraphrases bridge"),
    (("ar",), "--world wide_books --paraphrases composed_bridge"),
    # names anywhere
    *((ALL, f"{ANYWHERE} --paraphrases {arm}") for arm in ("change_order", "name_anywhere")),
    # how often new people are told
    *((ALL, f"{PLAIN} --paraphrases change_order --texts {texts}") for texts in (1, 2, 5, 20))
    ) + as_many(25) + as_many(50)

SEED_1 = as_many(200) + as_many(400) + as_many(1000, ("ar", "masked")) + rows(
    *((("masked",), f"--new 400 --steps 4000 {back}") for back in (
        "--texts 5 --paraphrases change_order", "--n_embd 128 --n_head 4", "--batch 22 40 1 1")))

EDITS = {  # name: (flags, file, what stands there, what stands there instead)
    "untied": ("--mode ar", "model.py", [
        ("        self.blocks = ", "        self.unembed = nn.Embedding(TOKENIZER.n_vocab, settings.n_embd)\n"
         "        self.blocks = "),
        ("x[at], self.embed.weight)", "x[at], self.unembed.weight)")]),
    "adamw": ("--mode masked --lr .002", "train.py", [
        ("return [Muon([group(matrices,", "return [torch.optim.AdamW([group(matrices,"),
        ("settings.forget)]),", "settings.forget)], betas=(0.9, 0.95)),")])}


def run_edited(name, seed):
    """Train a row of EDITS by a copy of the five files."""
    flags, file, changes = EDITS[name]
    folder = Path("out", name)
    folder.mkdir(parents=True, exist_ok=True)
    for path in Path().glob("*.py"):
        shutil.copy(path, folder)
    source = (folder / file).read_text(encoding="utf-8")
    for before, after in changes:
        assert source.count(before) == 1, f"{file} has {source.count(before)} times {before!r}"
        source = source.replace(before, after)
    (folder / file).write_text(source, encoding="utf-8")
    mode = flags.split()[1]
    words = [*flags.split(), "--seed", seed, "--name", f"{name}-{mode}-none-seed{seed}"]
    subprocess.run([sys.executable, "train.py", *words], cwd=folder)


def published(file=Path(".lab/runs.jsonl")):
    """{name: result} of what is published"""
    return {run["name"]: run for run in map(json.loads, file.read_text().splitlines())}


LESS = (("masked-none", "ar-none"), ("diffusion-none", "masked-none"), ("masked_hidden-none", "masked-none"),
        ("random_prompt-none", "ar-none"), ("masked_doc_mark-none", "masked-none"))


def less():
    """Print pairs of rows, one less the other, seed by seed: a seed has one set of people."""
    runs = published()
    for a, b in LESS:
        pairs = [(runs[f"{a}-seed{seed}"], runs[f"{b}-seed{seed}"]) for seed in (1, 2, 3)]
        cells = []
        for score in ("forward", "backward"):
            differences = [x[score] - y[score] for x, y in pairs]
            cells.append(f"{mean(differences):+.3f}±{stdev(differences):.3f}")
        print(f"|`{a}` less `{b}`|{'|'.join(cells)}|")


def over(setting, pattern, file, axis):
    """Draw the last scores over a setting, on a logarithmic axis, of the published runs that fit the pattern.
    Each mode is a line."""
    runs = [run for name, run in published().items() if re.fullmatch(pattern, name)]
    if not runs:
        sys.exit(f"{file} is not drawn: no published run fits {pattern}")
    values = sorted({run["settings"][setting] for run in runs})
    lines = defaultdict(list)
    for run in runs:
        lines[run["settings"]["mode"]].append((log2(run["settings"][setting] / values[0]), run))
    ticks = {log2(value / values[0]): value for value in values}
    Path(file).write_bytes(evaluation.curves(list(lines.items()), axis, ticks))


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["collect"]:
        file = Path(*(words[1:] or [".lab/runs.jsonl"]))
        runs = published(file) if file.exists() else {}
        runs |= {name: {"name": name, **run} for name, run in evaluation.results_at(Path("out"))}
        file.write_text("".join(json.dumps(runs[name]) + "\n" for name in sorted(runs)))
    elif words == ["table"]:
        print(evaluation.compare(published().items()))
    elif words == ["less"]:
        less()
    elif words == ["figures"]:
        default = [(name, run) for name, run in published().items()
                   if re.match("(ar|masked|diffusion)-none-seed", name)]
        lines = [(runs[0]["settings"]["mode"], evaluation.over_steps(runs))
                 for _, _, runs in evaluation.group(default)]
        Path(".lab/curves.svg").write_bytes(evaluation.curves(lines, "steps of fine-tuning"))
        over("texts", r"\w+-change_order-texts\d+-known_paraphrasesnone-seed\d", ".lab/texts.svg",
             "texts about each new person (known people: one)")
        over("new", r"(ar|masked|diffusion)-none(-steps\d+-new\d+)?-seed\d", ".lab/people.svg",
             "new people, told in one text each, steps in proportion")
    else:
        seeds = [word for word in words if word.isdigit()] or ["1", "2", "3"]
        wanted = [word for word in words if not word.isdigit()]
        for seed in seeds:
            rows_of_seed = ROWS + SEED_1 if seed == "1" else ROWS
            for row in [row for row in rows_of_seed if all(word in row for word in wanted)]:
                # Each in a process of its own, so that nothing of one row is left over for the next.
                subprocess.run([sys.executable, ".lab/controls.py", *row.split(), "--seed", seed])
            for name in [name for name in EDITS if not wanted or wanted == [name]]:
                run_edited(name, seed)
