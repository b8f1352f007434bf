"""TinyStories, the two Llamas that were trained on them, and how much what they write is like them."""

import collections
import functools
import json
import math
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = {"stories260K": 80, "babyllama-char105": 190}  # about 200 characters each; the latter has 256 positions
JUDGES = {"stories260K": "babyllama-char105", "babyllama-char105": "stories260K"}  # each is read by the other
READ = 160  # characters of a text that are judged


@functools.cache
def load(data, name):
    """(model, tokenizer); it does not stop at the end of a story, so that every text has one length."""
    folder = data / "models" / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    return model, tokenizer


def read(data):
    """(stories to fit on, stories held out): every second one."""
    stories = json.loads((data / "data" / "tinystories" / "tinystories_1000.json").read_text())
    return stories[::2], stories[1::2]


def opening(story, model):
    """The first eight words as a prompt. A model of letters gets the space, too: what follows is the choice of a word."""
    return " ".join(story.split()[:8]) + (" " if model == "babyllama-char105" else "")


def has(word, text):
    return re.search(rf"\b{word}s?\b", text.lower()) is not None


def themes(stories, count=4):
    """The most frequent countable nouns that occur in 3 to 15 % of the stories.

    Frequent: the stories in which a phrase ends with it ("a tree.", "the tree,"). Countable: its plural is in 1 % of the
    stories or more.
    """
    ends, words = collections.Counter(), collections.Counter()
    for story in stories:
        ends.update(set(re.findall(r"\b(?:an?|the) ([a-z]+)[.,!?]", story.lower())))
        words.update(set(re.findall(r"[a-z]+", story.lower())))

    def fits(word):
        share = sum(has(word, story) for story in stories) / len(stories)
        return words[word + "s"] >= 0.01 * len(stories) and 0.03 <= share <= 0.15

    ranked = sorted(ends, key=lambda word: (-ends[word], word))
    return [word for word in ranked if fits(word)][:count]


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


class English:
    """How a text reads to the other model, in bits a character, and which of its words TinyStories know.

    inside: the middle 95 % of what real stories get, behind their first eight words.
    """

    def __init__(self, data, name):
        self.judge, self.tokenizer = load(data, JUDGES[name])
        fitted, held_out = read(data)
        self.lexicon = {word for story in fitted + held_out for word in re.findall(r"[a-z']+", story.lower())}
        real = sorted(self.bits([" ".join(story.split()[8:]) for story in held_out]))
        self.real = sum(real) / len(real)
        self.inside = real[round(0.025 * len(real))], real[round(0.975 * len(real)) - 1]

    @torch.no_grad()
    def bits(self, texts, batch_size=64):
        """Bits a character of each text, of its first 160; texts of one character or none are left out."""
        texts = [text for text in (" ".join(text.split())[:READ] for text in texts) if len(text) > 1]
        found = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            given = self.tokenizer(batch, return_tensors="pt", padding=True, padding_side="right")
            ids, mask = given["input_ids"], given["attention_mask"]
            logits = self.judge(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            nats = -logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
            found += [n / math.log(2) / len(t) for n, t in zip(nats.sum(1).tolist(), batch, strict=True)]
        return found

    def scores(self, texts):
        """{"known_words", "bits_per_character", "inside"}: shares and a mean over the texts, and the range itself."""
        words = [word for text in texts for word in re.findall(r"[a-z']+", text.lower())[:-1]]  # the last may be cut
        bits, (low, high) = self.bits(texts), self.inside
        return {
            "known_words": sum(word in self.lexicon for word in words) / len(words),
            "bits_per_character": sum(bits) / len(bits),
            "inside": sum(low <= b <= high for b in bits) / len(texts),
            "real_low": low, "real_mean": self.real, "real_high": high,
        }  # fmt: skip


SCORES = ("known_words", "bits_per_character", "inside", "real_low", "real_mean", "real_high")
