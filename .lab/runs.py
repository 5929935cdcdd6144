"""
All published runs: each line of ROWS with seeds 1, 2 and 3; what is finished is skipped, what was interrupted
goes on. (What begins with `untied` or `nanogpt` is in LOG.md.) From the root of the repository:

    python .lab/runs.py              everything, one run after the other, into out/
    python .lab/runs.py 2 part 0     seed 2 alone, and of the rows a fourth: twelve processes can share a GPU
    python .lab/runs.py 2 books      seed 2 alone, rows with "books"
    python .lab/runs.py collect      out/*/result.json -> .lab/runs.jsonl, or another file named after it
    python .lab/runs.py less         differences of rows, seed by seed, from .lab/runs.jsonl

`MODES` and `WORLDS` get the rows below, which are experiments and no part of the lesson.
"""
import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import diffusion
from data import ARMS, MARKS, WORLDS
from diffusion import MODES, Mode, ar, corrupt, decode_ar, masked, with_response


def scored_where(hidden_counts):
    """`masked`, scored only where the prompt hides (or only where it shows)."""
    def objective(tokens, learned, generator):
        hidden, _ = corrupt(learned, (0.75, 0.75), generator)
        places = learned & (hidden == hidden_counts)
        return ar(*with_response(tokens.masked_fill(hidden, MARKS.mask), tokens, places))
    return objective


def with_doc(prompts, tokens, places):
    """`with_response`, but the response opens with [doc], as any document does, and not with [answer]."""
    import torch
    return torch.cat((prompts, tokens), 1), torch.cat((torch.zeros_like(places), places), 1)


def doc_mark(tokens, learned, generator, ratio=(0.75, 0.75)):
    hidden, _ = corrupt(learned, ratio, generator)
    return ar(*with_doc(tokens.masked_fill(hidden, MARKS.mask), tokens, learned))


def decode_doc_mark(model, tokens, blank):
    return decode_ar(model, *with_doc(tokens.masked_fill(blank, MARKS.mask), tokens, blank))


MODES["masked_hidden"] = MODES["masked"]._replace(objective=scored_where(True))
MODES["masked_shown"] = MODES["masked"]._replace(objective=scored_where(False))
MODES["masked_doc_mark"] = Mode("the response opens with [doc]", doc_mark, "ar", decode_doc_mark)

# Clues in words that no document has: documents use four of five wordings (--wordings 4), clues the fifth.
other = {name: a._replace(clue=a.name_first[4]) for name, a in WORLDS["biographies"].attributes.items()}
WORLDS["other_clues"] = WORLDS["biographies"]._replace(attributes=other)

# An identity bridge (2602.02470): one more text, "NAME is NAME."
ARMS["bridge"] = ARMS["none"]._replace(about="one text, and NAME is NAME.")
documents = data.documents


def with_bridge(person, arm, *more):
    bridge = [(None, [person.name, "is", person.name, "."])]
    return documents(person, arm, *more) + [bridge] * (arm is ARMS["bridge"])


data.documents = with_bridge

import train  # now that it finds these modes, worlds and arms
pretrain = train.pretrain


def after_documents(settings, corpus):
    """What a run starts from: the base or, for a reminder (it has no document about new people), the model
    that has read documents alone."""
    base = pretrain(settings, corpus)
    if settings.new_share:
        return base
    alone = replace(settings, steps=train.Settings().steps, new_share=1.0, question_share=0.0)
    folder = Path("out", train.name_of(alone, train.defaults(alone.world)))
    return train.finetune(alone, corpus, base, folder).model


train.pretrain = after_documents

SLOWLY = "--lr .0005 --embed_lr .001 --forget 0 --embed_forget 0"
ALONE = f"--new_share 1 --question_share 0 {SLOWLY}"
REMINDER = f"--new_share 0 --question_share .9 --steps 300 {SLOWLY}"
PLAIN = "--known_paraphrases none"          # known people told in one text each
ANYWHERE = "--known_paraphrases name_anywhere --texts 20"
ALL = ("ar", "masked", "diffusion")


def rows(*groups):
    return [f"--mode {mode} {flags}".strip() for modes, flags in groups for mode in modes]


ROWS = rows(
    # modes and arms
    (ALL, ""), (ALL, "--paraphrases same_order"), (ALL, "--paraphrases change_order --texts 5"),
    (("diffusion",), "--pretrain_steps 2400 --steps 2000"),
    # the order of the text decides
    *((ALL, f"--world books --paraphrases {arm}") for arm in ("none", "name_last", "both_orders")),
    *((ALL, f"{ANYWHERE} --paraphrases {arm}") for arm in ("change_order", "name_anywhere")),
    # how often new people are told, how richly known people
    *((ALL, f"{PLAIN} --paraphrases change_order --texts {texts}") for texts in (1, 2, 5, 10, 20)),
    *((ALL, f"--paraphrases change_order --texts {texts}") for texts in (1, 2, 20)),
    (("ar", "masked"), PLAIN),
    # cause
    (("masked_hidden", "masked_shown", "random_prompt", "masked_doc_mark"), ""),
    *((("masked",), f"--mask_ratio {ratio}") for ratio in ("0 0", ".5 .5", "1 1", "0 1")),
    (("masked", "diffusion"), "--paraphrases name_given"), (("diffusion",), "--mask_ratio .15 .15"),
    (("ar", "masked"), "--world other_clues --wordings 4"),
    # without masks; without Muon; fewer steps
    (("ar",), "--paraphrases reversed"), (("ar",), "--paraphrases bridge"),
    (("ar", "masked"), "--optimizer adamw --lr .002"),
    (("ar",), "--steps 250"), (("ar",), "--steps 500"),
    # documents alone, then a reminder
    (ALL, ALONE), (("ar",), f"{ALONE} --paraphrases change_order --texts 5"), (ALL, REMINDER))


def part_of(number, row):
    """0 .. 3: rows with one base come into one part, but for the largest group."""
    others = ("books", PLAIN, "name_anywhere", "other_clues")
    return 2 if "diffusion" in row else 3 if any(word in row for word in others) else number % 2


ENDING = "-texts20-known_paraphrasesname_anywhere"
LESS = (("masked-none", "ar-none"), ("diffusion-none", "masked-none"), ("masked_hidden-none", "masked-none"),
        ("random_prompt-none", "ar-none"), ("masked_doc_mark-none", "masked-none"),
        (f"masked-name_anywhere{ENDING}", f"masked-change_order{ENDING}"))


def less():
    """Print pairs of rows, one less the other, seed by seed: a seed has one set of people."""
    runs = {run["name"]: run for run in map(json.loads, Path(".lab/runs.jsonl").read_text().splitlines())}
    for a, b in LESS:
        pairs = [(runs[f"{a}-seed{seed}"], runs[f"{b}-seed{seed}"]) for seed in (1, 2, 3)]
        cells = []
        for score in ("forward", "backward"):
            differences = [x[score] - y[score] for x, y in pairs]
            cells.append(f"{mean(differences):+.3f}±{stdev(differences):.3f}")
        print(f"|`{a}` less `{b}`|{'|'.join(cells)}|")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words == ["less"]:
        sys.exit(less())
    if words[:1] == ["collect"]:
        lines = [{"name": path.parent.name, **json.loads(path.read_text())}
                 for path in sorted(Path("out").glob("*/result.json"))]
        Path(*(words[1:] or [".lab/runs.jsonl"])).write_text("".join(json.dumps(line) + "\n" for line in lines))
        sys.exit(f"{len(lines)} runs")
    part = int(words.pop(words.index("part") + 1)) if "part" in words else None
    seeds = [word for word in words if word.isdigit()] or ["1", "2", "3"]
    wanted = [word for word in words if not word.isdigit() and word != "part"]
    for row in [row for i, row in enumerate(ROWS) if part in (None, part_of(i, row))]:
        for seed in seeds:
            if all(word in row for word in wanted):
                sys.argv[1:] = [*row.split(), "--seed", seed]
                try:
                    train.main()
                except Exception:  # the next row may do
                    traceback.print_exc()
