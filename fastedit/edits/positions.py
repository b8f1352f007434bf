"""Which tokens an edit acts on: `positions=` of every edit.

    "all" or None        every token; padding too, which nothing reads
    "prompt"             the tokens of the prompt
    "generated"          the tokens after the prompt
    "first 4", "last 4"  the prompt's first or last tokens (LoReFT, arXiv 2404.03592, section 3.2); "last 1" is its last
    "mask"               what `handle.mask` says, by column
    {"tokens": [5, 9]}   every occurrence of one of these token ids in the input, prompt or not

"+" joins parts: "first 4 + last 4" is one edit on both (LoReFT's tied weights). A token in both parts is edited once.
Padding, by the attention mask, is neither counted nor edited.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_COUNTED = re.compile(r"(first|last) ([1-9]\d*)")
_WORDS = ("prompt", "generated", "mask")


@dataclass(frozen=True)
class Positions:
    """Some of the tokens: the union of its parts. All tokens are None, never a Positions.

    first, last: how many tokens of the prompt. prompt, generated, mask: whether those are included. tokens: ids.
    """

    first: int = 0
    last: int = 0
    prompt: bool = False
    generated: bool = False
    mask: bool = False
    tokens: tuple = ()

    @property
    def of_prompt(self):
        """Whether the end of the prompt matters."""
        return bool(self.first or self.last or self.prompt or self.generated)

    @property
    def only_first(self):
        """Whether only first tokens are meant, so that the end of a long enough prompt does not matter."""
        return not (self.last or self.prompt or self.generated)

    def spec(self):
        """The same as a JSON-able value that `positions` reads."""
        words = [f"{name} {getattr(self, name)}" for name in ("first", "last") if getattr(self, name)]
        words += [name for name in _WORDS if getattr(self, name)]
        text = " + ".join(words)
        if not self.tokens:
            return text
        return {"tokens": list(self.tokens)} | ({"also": text} if text else {})

    def __str__(self):
        spec = self.spec()
        if isinstance(spec, str):
            return spec
        ids = ", ".join(map(str, self.tokens[:4])) + (", …" if len(self.tokens) > 4 else "")
        return " + ".join([*([spec["also"]] if "also" in spec else []), f"tokens {ids}"])


def positions(spec):
    """The Positions that a user's value describes, None for all tokens.

    Raises:
        ValueError, TypeError: a value that is not in the list above. The message has that list.
    """
    if spec is None or isinstance(spec, Positions):
        return spec
    if isinstance(spec, Mapping):
        return _of_mapping(spec)
    if not isinstance(spec, str):
        raise TypeError(f"positions is {spec!r}, expected {_EXPECTED}")
    found = {}
    for part in (part.strip() for part in spec.split("+")):
        counted = _COUNTED.fullmatch(part)
        name = counted[1] if counted else part
        if part != "all" and (name in found or not (counted or part in _WORDS)):
            again = " twice" if name in found else ""
            raise ValueError(f"positions is {spec!r} with {part!r}{again}, expected {_EXPECTED}")
        found[name] = int(counted[2]) if counted else True
    if "all" in found or found.keys() >= {"prompt", "generated"}:
        if len(found) > 2 or ("all" in found and len(found) > 1):
            raise ValueError(f"positions is {spec!r}, which is all tokens; leave out the redundant part")
        return None
    return Positions(**found)


def _of_mapping(spec):
    unknown = set(spec) - {"tokens", "also"}
    tokens = spec.get("tokens")
    if unknown or not isinstance(tokens, (list, tuple, range)) or not tokens:
        raise ValueError(f"positions is {spec!r}, expected {_EXPECTED}")
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in tokens):
        raise ValueError(f"positions has the token ids {list(tokens)!r}, expected whole numbers from 0 on")
    rest = positions(spec["also"]) if spec.get("also") else Positions()
    if rest is None:
        raise ValueError(f"positions is {spec!r}: 'also' is all tokens already")
    return Positions(rest.first, rest.last, rest.prompt, rest.generated, rest.mask, tuple(sorted(set(tokens))))


_EXPECTED = (
    "None or 'all', 'prompt', 'generated', 'first 4', 'last 4', 'mask', some of them joined by ' + ', "
    "or {'tokens': [ids]}"
)
