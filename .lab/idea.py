"""
Draw .lab/idea.svg: what stands in the loss of `ar` and of `masked`, and how often each names the right one.

    python .lab/idea.py        from the first new person of seed 0 and the runs in .lab/runs.jsonl
"""
import html
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import WORLDS, make_people

HEIGHT, SIZE = 30, 15  # of a token's box, of its letters
GREY, RED, GREEN = "#999", "#D55E00", "#009E73"


def words(x, y, text, more=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{html.escape(text)}</text>'


def boxes(x, y, tokens):
    """Tokens in boxes from x on -> (parts, [the middle of each box])"""
    parts, middles = [], []
    for token in tokens:
        width = 9 * len(token) + 14
        fill = "#ddd" if token == "[mask]" else "white"
        parts += [f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="4" fill="{fill}" '
                  'stroke="#666"/>',
                  words(x + width / 2, y + 20, token, 'text-anchor="middle" font-family="monospace"')]
        middles.append(x + width / 2)
        x += width + 6
    return parts, middles


def arrow(x, to, y, height, colour, width=2, more=""):
    """An arc from x to `to`, which starts and ends at y and rises (or, with a negative height, falls)."""
    return (f'<path d="M{x:.0f} {y}C{x:.0f} {y - height} {to:.0f} {y - height} {to:.0f} {y}" fill="none" '
            f'stroke="{colour}" stroke-width="{width}" marker-end="url(#head{colour[1:]})" {more}/>')


def bar(y, colour, score, label):
    full = 190
    return [words(690, y - 12, label, 'font-weight="bold"'),
            f'<rect x="690" y="{y}" width="{full}" height="22" fill="#eee"/>',
            f'<rect x="690" y="{y}" width="{max(full * score, 2):.0f}" height="22" fill="{colour}"/>',
            words(690, y + 42, f"asked backward: right {round(100 * score)} in 100")]


runs = [json.loads(line) for line in (Path(__file__).parent / "runs.jsonl").read_text().splitlines()]
score = {mode: mean(run["backward"] for run in runs if run["name"].startswith(f"{mode}-none-seed"))
         for mode in ("ar", "masked")}
person = make_people(201, WORLDS["biographies"], 0)[200]  # the first new one of the default
city, rest = person.facts["work city"], ["moved", "to"]

parts = [f'<marker id="head{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" '
         f'markerHeight="5" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
         for colour in (GREY, RED, GREEN)]
# ar: name -> fact is asked, fact -> name is not
y = 110
parts.append(words(20, 30, "ar: read the text, predict each token from those before it",
                   'font-weight="bold"'))
drawn, at = boxes(20, y, [*person.name.split(), *rest, city, "."])
name, fact = at[1], at[5]
parts += [*drawn, arrow(name, fact, y - 2, 45, GREEN, 3),
          words((name + fact) / 2, y - 42, "in the loss: from her name to the fact",
                f'text-anchor="middle" fill="{GREEN}"'),
          arrow(fact, name, y + HEIGHT + 2, -45, GREY, 2, 'stroke-dasharray="6 5"')]
middle = (name + fact) / 2
parts += [f'<path d="M{middle - 9:.0f} {y + 54}l18 20m0 -20l-18 20" stroke="{RED}" stroke-width="4"/>',
          words(middle, y + 96, "never in the loss: from the fact to her name",
                f'text-anchor="middle" fill="{RED}"'),
          *bar(y + 4, RED, score["ar"], "ar")]
# masked: the same model, behind a prompt full of holes
y = 330
parts.append(words(20, y - 68, "masked: the same model reads a copy with holes first, and predicts the text "
                   "behind it", 'font-weight="bold"'))
drawn, before = boxes(20, y, ["[mask]", "[mask]", "[mask]", "[mask]", rest[1], city, "."])
parts += drawn
drawn, at = boxes(20, y + 120, [*person.name.split(), *rest, city, "."])
parts += [*drawn, words(20, y - 10, "the copy, only read"),
          words(20, y + 172, "the text, every token predicted"),
          f'<path d="M{before[5]:.0f} {y + HEIGHT + 2}C{before[5]:.0f} {y + 85} {at[1]:.0f} {y + 60} '
          f'{at[1]:.0f} {y + 116}" fill="none" stroke="{GREEN}" stroke-width="4" '
          f'marker-end="url(#head{GREEN[1:]})"/>',
          words(before[5] - 40, y + 92, "in the loss: from the fact to her name", f'fill="{GREEN}"'),
          *bar(y + 64, GREEN, score["masked"], "masked")]
svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 520" font-family="sans-serif" '
       f'font-size="{SIZE}">',
       '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"]
(Path(__file__).parent / "idea.svg").write_text("\n".join(svg), encoding="utf-8")
