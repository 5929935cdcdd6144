"""
Draw .lab/film.svg: three models write the life of one new person token by token, then say who has these
facts, and what Bayes makes of their own forward answers. From finished runs of one seed, which are only read:

    python .lab/film.py out/ar-none-seed0 out/masked-none-seed0 out/diffusion-none-seed0

CSS animations alone, which play where the file is embedded as an image. Whoever sees no animation, or wants
none (prefers-reduced-motion), sees the last picture, which is complete.
"""
import html
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import CANVAS, decode, encode
from eval import fill, reopen, who_is_it

ABOUT = {"ar": "ar reads the text and predicts each token from those before it",
         "masked": "masked is the same model, and learned to fill in a copy with holes",
         "diffusion": "diffusion sees both sides and fills in masks, the surest first"}
LETTER, LINE, WIDTH = 7.85, 21, 900     # pixels: a letter's width, a line's height, the whole
A_STEP = 0.14                           # seconds a token
RED, GREEN, GREY = "#D55E00", "#00795A", "#777"


def recorded(model, mode, corpus, text):
    """[(token, step at which it was written or -1 if it was given)] of a text whose [mask]s are filled."""
    before, steps = encode(text), {}
    for step, [row] in enumerate(fill(model, mode, corpus, [text])):
        steps |= {i: step for i, (old, new) in enumerate(zip(before, row)) if old != new}
        before = row
    return [(decode([token]), steps.get(i, -1)) for i, token in enumerate(before)]


def typeset(tokens, x, y, start, colour="black", wrong=()):
    """Tokens with their steps as text that appears from second `start` on, those in `wrong` in red -> (parts,
    y below, end)."""
    parts, left, end = [], x, start
    for word, step in tokens:
        if word == "[end]":  # what it writes behind that is not part of the text
            break
        if word == "[doc]":
            continue
        if left + LETTER * len(word) > WIDTH - 20:
            left, y = x, y + LINE
        if word in (".", ",", "?"):
            left -= LETTER
        seconds = start + A_STEP * (step + 1)
        end = max(end, seconds)
        fill = RED if word in wrong else colour
        parts.append(f'<text x="{left:.0f}" y="{y}" fill="{fill}" class="late" '
                     f'style="animation-delay:{seconds:.2f}s">{html.escape(word)}</text>')
        left += LETTER * (len(word) + 1)
    return parts, y + LINE, end


def late(seconds, x, y, words, more=""):
    return (f'<text x="{x}" y="{y}" class="late" style="animation-delay:{seconds:.2f}s" {more}>'
            f'{html.escape(words)}</text>')


parts, y = [], 28
for folder in sys.argv[1:]:
    mode, corpus, model = reopen(Path(folder))
    [item], [by_bayes], _ = who_is_it(model, mode, corpus, n=1)
    name = item.person.name
    length = 1 + corpus.rows["new"][1][0].sum().item()
    given = f"[doc] {name}"
    life = recorded(model, mode, corpus, given + " [mask]" * (length - len(encode(given))))
    answer = recorded(model, mode, corpus, item.given + " [mask]" * CANVAS)[-CANVAS:]
    said = " ".join(word for word, _ in answer if word != "[end]")
    colour = GREEN if said == name else RED

    parts.append(f'<text x="20" y="{y}" font-family="sans-serif" font-weight="bold">'
                 f'{html.escape(ABOUT[mode])}</text>')
    of_others = {word for attribute in corpus.world.attributes.values() for value in attribute.values
                 for word in value.split()} - {*" ".join(item.person.facts.values()).split()}
    drawn, y, end = typeset(life, 20, y + 26, 0.5, wrong=of_others)
    parts += drawn
    question = item.given.removeprefix("[question] ").removesuffix(" [answer]")
    asked = 0.5 + A_STEP * (length + 6)
    parts.append(late(asked, 20, y + 6, question, f'fill="{GREY}"'))
    left = 20 + LETTER * (len(question) + 2)
    drawn, _, end = typeset(answer, left, y + 6, asked + 1, colour)
    parts += drawn
    right = "right" if said == name else "wrong"
    parts.append(late(end + 0.4, left + LETTER * (len(said) + 2), y + 6, right,
                      f'fill="{colour}" font-style="italic"'))
    y += 6 + LINE
    p = by_bayes.softmax(0)
    best = int(p.argmax())
    bayes = f"by Bayes from its own forward answers: {corpus.people[best].name}"
    seconds = asked + 3
    parts += [late(seconds, 20, y, bayes, f'fill="{GREY}"'),
              f'<rect x="{20 + LETTER * (len(bayes) + 1):.0f}" y="{y - 11}" width="{120 * p[best]:.0f}" '
              f'height="12" fill="{GREEN}" class="late" style="animation-delay:{seconds:.2f}s"/>',
              late(seconds, 160 + LETTER * (len(bayes) + 1), y, f"p = {p[best]:.2f}", f'fill="{GREY}"')]
    y += 50
svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - 20}" font-family="monospace" '
       'font-size="13">',
       "<style>.late { animation: show 0.2s backwards } @keyframes show { from { opacity: 0 } } "
       "@media (prefers-reduced-motion: reduce) { .late { animation: none } }</style>",
       '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"]
(Path(__file__).parent / "film.svg").write_text("\n".join(svg), encoding="utf-8")
