"""UBPL: personality by lexicon at decoding (Li et al., arXiv 2310.16582): an inference-time nudge, no model edit.

A trait is a lexicon, word → strength. The exact weighting is unpublished. Here, at each step, the logit of every first
token of a word grows by

    weight(trait) · strength(word),

summed over the traits that are on. A token that begins several words of a trait takes the strongest. A word's first
tokens are those of the word alone and after a space, as written and capitalized.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LogitsProcessor

from ..files.sealed import Damaged, parse_json

_WORDS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def read_lexicons(path):
    """{trait: {word: strength}} of a JSON file of that form, or of a TSV with lines `trait word strength`.

    Raises:
        ValueError: something that is not of that form, with the line or the entry.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            found = parse_json(text)
        except Damaged as error:
            raise ValueError(f"{path} {error}") from None
        if not isinstance(found, dict) or not all(isinstance(words, dict) for words in found.values()):
            raise ValueError(f"{path}: expected {{trait: {{word: strength}}}}")
        entries = [(str(trait), trait, word, s) for trait, words in found.items() for word, s in words.items()]
    else:
        entries = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                entries.append((f"line {number}", *line.split("\t")))
    lexicons = {}
    for entry in entries:
        try:
            where, trait, word, strength = entry
            strength = float(strength)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{path}, {entry[0]}: found {entry[1:]!r}, expected trait, word and a number") from None
        if not word.strip() or not math.isfinite(strength):
            raise ValueError(f"{path}, {where}: word {word!r} with strength {strength}, expected a word and a finite number")
        lexicons.setdefault(trait, {})[word.strip()] = strength
    if not lexicons:
        raise ValueError(f"{path} holds no words")
    return lexicons


def build(texts, background, *, count=100, least=2, z=1.96):
    """{word: strength} of the words that mark texts against others, without labels for words.

    Words are ranked by the log-odds ratio with an informative Dirichlet prior (Monroe et al. 2008, eq. 22), which holds
    rare words back. Strengths are its z-values over the largest. The paper does not publish its builder: this one is
    ours.

    Args:
        texts: with the trait. background: without it. Both sets together are the prior.
        count: words at most. least: how often a word must occur in the texts. z: how far it must stand out. A few dozen
            texts hardly reach the 1.96 of a thousand.

    Raises:
        ValueError: no word stands out.
    """
    ours, theirs = (Counter(w for text in some for w in _WORDS.findall(text.lower())) for some in (texts, background))
    prior = ours + theirs
    total, sizes = sum(prior.values()), (sum(ours.values()), sum(theirs.values()))
    scores = {}
    for word, a in prior.items():
        if ours[word] < least:
            continue
        odds = [math.log((n + a) / (size + total - n - a)) for n, size in ((ours[word], sizes[0]), (theirs[word], sizes[1]))]
        scores[word] = (odds[0] - odds[1]) / math.sqrt(1 / (ours[word] + a) + 1 / (theirs[word] + a))
    best = sorted((word for word in scores if scores[word] >= z), key=lambda word: (-scores[word], word))[:count]
    if not best:
        raise ValueError(
            f"no word of the {len(texts)} texts stands out by a z of {z:g} from the {len(background)} others: the "
            f"most is {max(scores.values(), default=0.0):.2f}. Give more texts, or a smaller z"
        )
    return {word: round(scores[word] / scores[best[0]], 4) for word in best}


class UBPL(LogitsProcessor):
    """For `model.generate(..., logits_processor=[UBPL(tokenizer, lexicons, {"kind": 2.0})])`.

    Args:
        tokenizer: the model's.
        lexicons: {trait: {word: strength}}, or the path of a file (`read_lexicons`).
        traits: {trait: weight}, in logits for a word of strength 1; negative weights push away. `set` changes them
            between calls.
    """

    def __init__(self, tokenizer, lexicons, traits):
        self.lexicons = read_lexicons(lexicons) if isinstance(lexicons, (str, Path)) else _checked(lexicons)
        self.tokens = {trait: _first_tokens(tokenizer, words) for trait, words in self.lexicons.items()}
        self.set(traits)

    def set(self, traits):
        """Use other traits or weights from the next step on."""
        if not isinstance(traits, Mapping):
            raise TypeError(f"traits is {traits!r:.60}, expected {{trait: weight}}")
        unknown = sorted(set(traits) - set(self.tokens))
        if unknown:
            raise ValueError(f"there is no trait {unknown[0]!r}; the lexicons have {', '.join(sorted(self.tokens))}")
        if not all(isinstance(w, (int, float)) and math.isfinite(w) for w in traits.values()):
            raise ValueError(f"traits is {traits!r}, expected finite numbers")
        added = {}
        for trait, weight in traits.items():
            for token, strength in self.tokens[trait].items():
                added[token] = added.get(token, 0.0) + weight * strength
        self.traits = dict(traits)
        self.ids, self.values = torch.tensor(list(added), dtype=torch.long), torch.tensor(list(added.values()))

    def __call__(self, input_ids, scores):
        """scores (sequences, vocabulary), with the words' tokens raised. Others keep their bits."""
        if self.ids.device != scores.device:
            self.ids, self.values = self.ids.to(scores.device), self.values.to(scores.device)
        if self.ids.numel() and int(self.ids.max()) >= scores.shape[-1]:
            raise ValueError(f"the tokenizer has token {int(self.ids.max())}, the model {scores.shape[-1]}: another model's?")
        return scores.index_add(-1, self.ids, self.values.to(scores.dtype).expand(len(scores), -1))


def _checked(lexicons):
    if not isinstance(lexicons, Mapping) or not all(isinstance(words, Mapping) for words in lexicons.values()):
        raise TypeError(f"lexicons is {lexicons!r:.60}, expected {{trait: {{word: strength}}}} or the path of a file")
    for trait, words in lexicons.items():
        for word, strength in words.items():
            number = isinstance(strength, (int, float)) and not isinstance(strength, bool) and math.isfinite(strength)
            if not isinstance(word, str) or not word.strip() or not number:
                raise ValueError(f"trait {trait!r} has word {word!r} with strength {strength!r}, expected a finite number")
    return lexicons


def _first_tokens(tokenizer, words):
    """{token id: strength} of one trait."""
    found = {}
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for word, strength in words.items():
        for text in {word, word.capitalize(), f" {word}", f" {word.capitalize()}"}:
            ids = [t for t in tokenizer(text, add_special_tokens=False)["input_ids"] if t not in special]
            ids = [t for t in ids if tokenizer.decode([t]).strip()] or ids  # a token that is only the space says nothing
            if ids and abs(strength) >= abs(found.get(ids[0], 0.0)):
                found[ids[0]] = float(strength)
    return found
