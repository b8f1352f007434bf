"""What the methods do to trained models: figures with seeds, into bench/results/effects.csv and docs/methods.md.

    python -m bench.effects            # a few minutes on two cores; needs the folder `shared` beside the repository

A TinyStories Llama (stories260K, 260 thousand parameters) is steered towards a theme. The direction is the contrast of
means, over the tokens of stories with and without the theme's word, of every second story. The other stories give the
prompts: their first words, where the theme is not among them. The strengths are doses, found by `fastedit.calibrate` on
those prompts. The control is a random direction of the same length in each layer, at the same strengths. A larger model
of other tokens (babyllama-char105) says how likely the text is: bits a character of English as it knows it.
"""

import argparse
import csv
import math
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastedit as fe
from bench.effects_table import write_table
from fastedit.cli.texts import read_texts
from fastedit.methods.replies import wilson

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
RESULTS = Path(__file__).resolve().parent / "results" / "effects.csv"
DOSES = (0.05, 0.1, 0.2)
COLUMNS = ("theme", "direction", "dose", "strength", "kl", "stories", "share", "share_low", "share_high", "known_words",
           "bits_per_character", "seed")  # fmt: skip


def load(name):
    folder = SHARED / "models" / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    return model, tokenizer


def has(theme, text):
    return re.search(rf"\b{theme}s?\b", text.lower()) is not None


def split(stories, theme, count):
    """(positive, negative, prompts): the sets from the even stories, the prompts from the odd ones."""
    fitted, held_out = stories[::2], stories[1::2]
    positive = [story for story in fitted if has(theme, story)]
    negative = [story for story in fitted if not has(theme, story)]
    prompts = [" ".join(story.split()[:8]) for story in held_out]
    return positive, negative, [prompt for prompt in prompts if not has(theme, prompt)][:count]


def random_like(directions, seed):
    """Of the same length in every layer."""
    generator = torch.Generator().manual_seed(seed)
    drawn = fe.Directions({layer: torch.randn(v.shape, generator=generator) for layer, v in directions.items()})
    return fe.Directions({layer: v * directions[layer].norm() for layer, v in drawn.normalised().items()})


@torch.no_grad()
def continuations(model, tokenizer, prompts, tokens, seed):
    """What follows each prompt, sampled at temperature 0.8; the same random numbers at every call."""
    given = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(seed)
    found = model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], do_sample=True, temperature=0.8,
        max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.batch_decode(found[:, given["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def bits_per_character(judge, tokenizer, texts):
    """Mean over texts, of at most 160 characters each, a character a token."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(" ".join(text.split())[:160])["input_ids"]])
        if ids.shape[1] < 2:
            continue
        logits = judge(input_ids=ids, use_cache=False).logits[0, :-1].double()
        total -= logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return total / count / math.log(2)


def known_words(texts, lexicon):
    words = [word for text in texts for word in re.findall(r"[a-z']+", text.lower())[:-1]]  # the last may be cut
    return sum(word in lexicon for word in words) / len(words)


def measure(theme, count, tokens, seed):
    """The CSV's rows."""
    stories = read_texts(SHARED / "data" / "tinystories" / "tinystories_1000.json")
    (model, tokenizer), (judge, letters) = load("stories260K"), load("babyllama-char105")
    positive, negative, prompts = split(stories, theme, count)
    lexicon = {word for story in stories for word in re.findall(r"[a-z']+", story.lower())}
    found = fe.contrast(model, tokenizer, positive, negative, at="mean", max_length=256)
    print(f"{len(positive)} stories with {theme!r}, {len(negative)} without, {len(prompts)} prompts held out")

    def row(direction, dose, strength, kl):
        texts = continuations(model, tokenizer, prompts, tokens, seed)
        hits = sum(has(theme, text) for text in texts)
        share, (low, high) = hits / len(texts), wilson(hits, len(texts))
        figures = (share, low, high, known_words(texts, lexicon), bits_per_character(judge, letters, texts))
        print(f"{direction:>10} {dose:>5} strength {strength:6.2f}: {100 * share:5.1f} %  {figures[-1]:.2f} bits", texts[0][:90])
        return dict(zip(COLUMNS, (theme, direction, dose, strength, kl, len(texts), *figures, seed), strict=True))

    rows = [row("none", 0, 0.0, 0.0)]
    strengths = []
    with fe.patch(model, fe.Steer(found)) as handle:
        for dose in DOSES:
            given = fe.calibrate(model, handle, prompts, target_kl=dose, tokenizer=tokenizer)
            strengths.append(given.strength)
            rows.append(row("theme", dose, given.strength, given.kl))
    with fe.patch(model, fe.Steer(random_like(found, seed))) as handle:
        for dose, strength in zip(DOSES, strengths, strict=True):
            handle.strength = strength
            rows.append(row("random", dose, strength, math.nan))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--themes", nargs="+", default=["bird", "tree"])
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = [row for theme in given.themes for row in measure(theme, given.stories, given.tokens, given.seed)]
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    write_table(RESULTS)


if __name__ == "__main__":
    main()
