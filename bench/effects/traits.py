"""UBPL on the chat model: a lexicon at decoding, at equal KL beside a lexicon of other words.

Fixed before the first run:
    lexicon    ubpl.build on the happy sentences of fastedit/examples against the sad ones (z ≥ 0.5, two occurrences; 80 texts
               reach no 1.96), and the strengths that it gives. It has not seen moods.json
    weight     that of 0.2 and 0.5 nats a token, on what the model says by itself after the first 8 prompts
    controls   as many other words of both sets of sentences, drawn by seed, with the same strengths, at the same KL; asking for
               it in the system turn; no edit
    replies    one of 16 tokens to each of the 32 prompts, temperature 0.8, seeds 0 and 1
    hits       a reply with more happy words than sad ones (moods.json); `unlisted`: the same without the words of the lexicon,
               so that what it adds itself is not counted
"""

import random
import re

import torch

from fastedit import examples
from fastedit.methods import ubpl
from fastedit.patching.eval_mode import evaluating
from fastedit.texts.chat import prompt_ids

from . import chat
from .onchat import CONTINUED, TOKENS, Loaded, as_chats, average, share_of, table
from .rows import Rows

DOSES, SEEDS = (0.2, 0.5), (0, 1)
KEYS, FIELDS = ("lexicon", "dose", "seed"), ("weight", "replies", "hits", "opposite", "unlisted", "example")
NAMES = {
    "none": "no edit", "happy": "happy lexicon", "other": "lexicon of other words", "asked": "asked in the system turn",
}  # fmt: skip


def plan():
    return [
        (lexicon, dose, seed)
        for seed in SEEDS
        for lexicon in NAMES
        for dose in (DOSES if lexicon in ("happy", "other") else (0.0,))
    ]


def run(out, given=None, first=False):
    rows, loaded = Rows(out / "effects-traits.csv", KEYS, FIELDS), Loaded(given)
    for lexicon, dose, seed in plan():
        key = {"lexicon": lexicon, "dose": dose, "seed": seed}
        if seed in SEEDS[: 1 if first else None] and not rows.has(**key):
            rows.add(key | measured(*loaded(), lexicon, dose, seed))


def words_of(lexicon, seed):
    """{word: strength}"""
    sets = [examples.lines(examples.HAPPY), examples.lines(examples.SAD)]
    happy = ubpl.build(*sets, z=0.5)
    if lexicon != "other":
        return happy
    rest = sorted({w for some in sets for text in some for w in re.findall(r"[a-z]{3,}", text.lower())} - set(happy))
    return dict(zip(random.Random(seed).sample(rest, len(happy)), happy.values(), strict=True))


def measured(model, tokenizer, lexicon, dose, seed):
    chats = as_chats(examples.lines(examples.PROMPTS), chat.ASKING["mood"] if lexicon == "asked" else None)
    weight, options = 0.0, {}
    if dose:
        processor = ubpl.UBPL(tokenizer, {"trait": words_of(lexicon, seed)}, {"trait": 1.0})
        weight = weight_of(model, tokenizer, processor, chats[:CONTINUED], dose)
        processor.set({"trait": weight})
        options["logits_processor"] = [processor]
    said = chat.sampled(model, tokenizer, chats, seed, TOKENS, **options)
    moods, listed = examples.moods(), set(words_of("happy", 0))
    counted = [examples.tally(text, moods) for text in said]
    unlisted = [examples.tally(text, {name: some - listed for name, some in moods.items()}) for text in said]
    return {
        "weight": weight, "replies": len(said), "hits": sum(n["happy"] > n["sad"] for n in counted),
        "opposite": sum(n["sad"] > n["happy"] for n in counted), "unlisted": sum(n["happy"] > n["sad"] for n in unlisted),
        "example": " ".join(said[0].split()),
    }  # fmt: skip


@torch.no_grad()
def weight_of(model, tokenizer, processor, chats, nats):
    """The weight at which the processor changes the next token by that KL, in the mean over what the model says by itself."""
    logits = []
    with evaluating(model):
        for given, text in zip(chats, chat.sampled(model, tokenizer, chats, 0, TOKENS), strict=True):
            before, behind = prompt_ids(tokenizer, given), tokenizer(text, add_special_tokens=False)["input_ids"]
            logits.append(model(torch.tensor([before + behind])).logits[0, len(before) - 1 :].float())
    logits = torch.cat(logits)
    base = logits.log_softmax(-1)

    def kl(weight):
        processor.set({"trait": weight})
        return (base.exp() * (base - processor(None, logits).log_softmax(-1))).sum(-1).mean().item()

    low, high = 0.0, 1.0
    while kl(high) < nats:
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) < nats else (low, middle)
    return high


# --- the page ---------------------------------------------------------------------------------------------------------


def markdown(path):
    rows, lines = Rows(path, KEYS, FIELDS).read(), []
    for lexicon, dose, first in plan():
        if first != SEEDS[0]:
            continue
        own = [row for row in rows if (row["lexicon"], float(row["dose"])) == (lexicon, dose)]
        line = [NAMES[lexicon], str(dose or "")]
        if own:
            line.append(average(own, "weight", 1) if dose else "")
            line += [share_of(own, field, "replies") for field in ("hits", "unlisted", "opposite")]
        lines.append(line)
    return table(["", "nats a token", "weight", "happier", "happier, without the lexicon's words", "sadder"], lines)
