"""Two TinyStories Llamas steered towards a theme, beside a random direction of the same length.

Fixed before anything was generated:
    themes     the four most frequent countable nouns that occur in 3 to 15 % of the stories (stories.themes)
    direction  contrast of means over all tokens (`at="mean"`), at every layer, of the even stories with and without it
    strengths  doses of 0.05, 0.1 and 0.2 nats at the token behind the openings of 128 even stories (fe.calibrate)
    prompts    the openings (eight words) of odd stories that do not hold the theme, 128 for each of three seeds
    control    a random direction of the same length in every layer, another one for each seed, at the same strengths
    measured   stories that hold the word or its plural, of 384 a cell; all cells of a seed sample with the same numbers
    trend      Cochran–Armitage over none and the three doses, equally spaced, two-sided
"""

import functools
import math

import torch

import fastedit as fe
from fastedit.methods.replies import wilson

from . import stories
from .rows import Rows
from .statistics import trend

DOSES = (0.05, 0.1, 0.2)
SEEDS = (0, 1, 2)
PROMPTS = 128  # a seed
KEYS = ("model", "theme", "direction", "dose", "seed")
FIELDS = ("strength", "stories", "hits", *stories.SCORES, "example")


def table_of(out):
    return Rows(out / "effects-steering.csv", KEYS, FIELDS)


def run(data, out, prompts=PROMPTS, seeds=SEEDS):
    rows = table_of(out)
    for model in stories.TOKENS:
        themes = stories.themes(stories.read(data)[0])
        sources = {theme: functools.cache(functools.partial(source_of, data, model, theme)) for theme in themes}
        for seed in seeds:
            for theme, source in sources.items():
                measure(rows, model, theme, seed, source, prompts)


def source_of(data, name, theme):
    """(model, tokenizer, English, the theme's Directions, dose → strength, prompts)."""
    (model, tokenizer), (fitted, held_out) = stories.load(data, name), stories.read(data)
    found = direction_of(model, tokenizer, fitted, theme)
    strengths = strengths_of(model, tokenizer, found, [stories.opening(story, name) for story in fitted[:128]])
    openings = [stories.opening(story, name) for story in held_out]
    openings = [prompt for prompt in openings if not stories.has(theme, prompt)]
    return model, tokenizer, stories.English(data, name), found, strengths, openings


def measure(rows, name, theme, seed, source, count):
    """The rows of a model, a theme and a seed that are not there; `source()` is called if there are any."""
    cells = [("none", 0.0)] + [(direction, dose) for direction in ("theme", "random") for dose in DOSES]
    keys = [{"model": name, "theme": theme, "direction": d, "dose": dose, "seed": seed} for d, dose in cells]
    keys = [key for key in keys if not rows.has(**key)]
    if not keys:
        return
    model, tokenizer, english, found, strengths, openings = source()
    given = openings[seed * count : (seed + 1) * count]
    if len(given) < count:
        raise ValueError(f"seed {seed} needs {(seed + 1) * count} prompts without {theme!r}; there are {len(openings)}")
    for key in keys:
        direction, strength = random_like(found, seed) if key["direction"] == "random" else found, strengths[key["dose"]]
        with fe.patch(model, fe.Steer(direction, strength=strength)):
            texts = stories.continuations(model, tokenizer, given, stories.TOKENS[name], seed)
        hits = sum(stories.has(theme, text) for text in texts)
        measured = {"strength": strength, "stories": len(texts), "hits": hits} | english.scores(texts)
        rows.add(key | measured | {"example": " ".join(texts[0].split())[:100]})


def direction_of(model, tokenizer, fitted, theme):
    positive = [story for story in fitted if stories.has(theme, story)]
    negative = [story for story in fitted if not stories.has(theme, story)]
    return fe.contrast(model, tokenizer, positive, negative, at="mean", max_length=256)


def strengths_of(model, tokenizer, found, prompts):
    """dose → strength."""
    strengths = {0.0: 0.0}
    with fe.patch(model, fe.Steer(found)) as handle:
        for dose in DOSES:
            strengths[dose] = fe.calibrate(model, handle, prompts, target_kl=dose, tokenizer=tokenizer).strength
    return strengths


def random_like(directions, seed):
    """Of the same length in every layer."""
    generator = torch.Generator().manual_seed(seed)
    drawn = fe.Directions({layer: torch.randn(v.shape, generator=generator) for layer, v in directions.items()})
    return fe.Directions({layer: v * directions[layer].norm() for layer, v in drawn.normalised().items()})


def markdown(path):
    """A line a model, theme and direction, seeds together."""
    rows = Rows(path, KEYS, FIELDS).read()
    lines = [
        "| model | theme | direction | none | 0.05 nats | 0.1 | 0.2 | trend z (p) | bits a character | like real stories "
        "| words known |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, theme in dict.fromkeys((row["model"], row["theme"]) for row in rows):
        for direction in ("theme", "random"):
            own = [row for row in rows if (row["model"], row["theme"]) == (model, theme)]
            cells = [[row for row in own if row["direction"] == "none"]]
            cells += [[r for r in own if r["direction"] == direction and float(r["dose"]) == dose] for dose in DOSES]
            if all(cells):
                lines.append(f"| {model} | {theme} | {direction} | " + " | ".join(line(cells)) + " |")
    return "\n".join(lines)


def line(cells):
    """The columns of one line: shares with their intervals, the trend, the English scores from none to the last dose."""
    hits = [sum(int(row["hits"]) for row in cell) for cell in cells]
    of = [sum(int(row["stories"]) for row in cell) for cell in cells]
    for hit, n in zip(hits, of, strict=True):
        low, high = wilson(hit, n)
        yield f"{100 * hit / n:.1f} % ({100 * low:.0f}–{100 * high:.0f})"
    z, p = trend(hits, of)
    yield f"{z:+.1f} ({'< 1e-6' if p < 1e-6 else f'{p:.1g}'})"
    yield " → ".join(f"{mean(cell, 'bits_per_character'):.2f}" for cell in cells)
    yield " → ".join(f"{100 * mean(cell, 'inside'):.0f}" for cell in cells) + " %"
    yield " → ".join(f"{100 * mean(cell, 'known_words'):.1f}" for cell in cells) + " %"


def mean(rows, name):
    return math.fsum(float(row[name]) for row in rows) / len(rows)
