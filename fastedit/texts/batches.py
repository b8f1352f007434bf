"""From texts to padded batches of similar lengths, a window of the data at a time. Memory does not grow with the
data."""

import hashlib
import itertools
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..arguments import check_whole
from .chat import CHATS, encode, encode_row, prompt_ids, read_conversation
from .picking import has_span

WINDOW = 32  # batches whose examples are sorted by length together


@dataclass
class Batch:
    """inputs: tensors for the model. tokens (sequences, columns) bool: which are real. group, index: one per sequence.

    spans: (sequences, 2), which of its tokens, [start, stop), if `at` needs those; else None.
    """

    inputs: dict
    tokens: torch.Tensor
    group: torch.Tensor
    index: torch.Tensor
    spans: torch.Tensor | None = None


class Windows:
    """The data in windows. Each is a list of Batches, long enough that sorting by length leaves little padding.

    data: any iterable of texts, chat messages, rows with a prompt and its response (chat.py), lists of token ids, or
    ready batches (mappings with input_ids and, optionally, attention_mask). groups: a label for each text, or None; a
    ready batch carries its labels as "group". names: the labels, in the order of their numbers; read from the data if
    groups is a list.
    at, suffix, spans: as in `fastedit.capture`, for the batches' spans.
    """

    def __init__(
        self, tokenizer, data, groups=None, *, names=None, batch_size=16, max_length=None, limit=None, at="last token",
        suffix=None, spans=None,
    ):  # fmt: skip
        if isinstance(data, str):
            raise TypeError(f"the data is one text ({data[:30]!r}…), expected a list of texts or batches")
        if not isinstance(data, Iterable) or getattr(data, "shape", None) == ():
            raise TypeError(f"the data is {data!r:.60}, expected an iterable of texts, token ids or batches")
        check_whole("batch_size", batch_size)
        batch_size = min(batch_size, 1 << 32)  # islice counts no further than its machine
        if max_length is not None:
            check_whole("max_length", max_length)
        self.tokenizer, self.data, self.batch_size = tokenizer, data, batch_size
        self.max_length, self.limit = max_length, limit
        self.at, self.suffix, self.spans = at, suffix, _checked_spans(data, at, suffix, spans)
        self.groups, self.names = _named(data, groups, names)
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.total = len(data) if hasattr(data, "__len__") else None
        self.digest, self.position = hashlib.sha256(), 0

    def skip(self, count):
        """Skip the first `count` items, which an earlier pass has seen. Returns how many there were."""
        before = self.position
        for _ in itertools.islice(self._items(), count):
            pass
        return self.position - before

    def __iter__(self):
        """Windows, from where the last iteration or `skip` stopped."""
        items = self._items()
        while window := list(itertools.islice(items, WINDOW * self.batch_size)):
            yield self._batches(window)

    def _items(self):
        """(index, item, group number). Each is counted and enters the digest as it is read."""
        if not hasattr(self, "_stream"):
            groups = itertools.repeat(None) if self.groups is None else iter(self.groups)
            self._stream = zip(iter(self.data), groups, strict=self.groups is not None)
        for item, label in self._stream:
            index = self.position
            self.position += 1
            self.digest.update(_content(item, index))
            yield index, item, 0 if self.groups is None else self._number(label, index)

    def _number(self, label, index):
        if label not in self.numbers:
            known = ", ".join(map(repr, self.names))
            raise ValueError(f"item {index} is of group {label!r}, expected one of {known}: see group_names=")
        return self.numbers[label]

    def _batches(self, window):
        kinds = {kind_of(item, index) for index, item, _ in window}
        if len(kinds) > 1 and kinds & {"ready batches", "token ids"}:
            raise TypeError(f"the data holds {' beside '.join(sorted(kinds))}, expected one or the other throughout")
        if kinds == {"ready batches"}:
            return [self._ready(item, index) for index, item, _ in window]
        if kinds != {"token ids"} and self.tokenizer is None:
            raise ValueError("tokenizer is None, but the data is texts: pass the model's tokenizer, or token ids")
        ids, spans = zip(*(self._tokenized(item, index) for index, item, _ in window), strict=True)
        order = sorted(range(len(window)), key=lambda at: -len(ids[at]))  # the longest first: memory peaks at once
        size = self.batch_size
        return [self._padded(window, ids, spans, order[at : at + size]) for at in range(0, len(order), size)]

    def _tokenized(self, item, number):
        """(ids, span or None) of one item."""
        ids, span = self._ids_and_span(item, number)
        longest = self.limit if self.max_length is None else self.max_length
        if not ids:
            raise ValueError(f"item {number} has no tokens: leave it out")
        if longest is None or len(ids) <= longest:
            return ids, span
        if self.max_length is None:
            raise ValueError(f"item {number} has {len(ids)} tokens, the model takes {longest}; max_length={longest} cuts")
        if span is not None and span[1] > longest:
            raise ValueError(
                f"item {number} has {len(ids)} tokens, of which those at {self.at!r} end at {span[1]}: max_length={longest} "
                "would cut them off; allow more, or give a shorter text"
            )
        return ids[:longest], span

    def _ids_and_span(self, item, number):
        kind = kind_of(item, number)
        if kind == "token ids":
            ids = _token_ids(item, number)
            if self.at in ("suffix", "response"):
                raise ValueError(f"item {number} is token ids, of which {self.at!r} is not known: use at='span' with spans=")
            return ids, None if self.at != "span" else _within(self.spans[number], len(ids), f"item {number}", "tokens")
        if kind == "texts":
            if self.at == "response":
                raise ValueError(f"item {number} is one text without a response; give messages, or prompt and response")
            if not has_span(self.at):
                return text_ids(self.tokenizer, item), None
            text, start, stop = item + (self.suffix or ""), len(item), len(item) + len(self.suffix or "")
            if self.at == "span":
                start, stop = _within(self.spans[number], len(item), f"item {number}", "characters")
            return _of_characters(self.tokenizer, text, start, stop, f"item {number}")
        return self._of_chat(item, kind, f"item {number}")

    def _of_chat(self, item, kind, where):
        if self.at in ("suffix", "span"):
            raise ValueError(f"{where} is {kind}: at={self.at!r} is of texts; use 'response', 'last 4' or 'mean'")
        if kind == "messages":
            messages = read_conversation(item, where)
            if messages[-1]["role"] != "assistant":
                if self.at == "response":
                    raise ValueError(f"{where} ends with a user turn: it has no response")
                return prompt_ids(self.tokenizer, messages, where), None
            encoded = encode(self.tokenizer, messages[:-1], messages[-1], where)
        else:
            encoded = encode_row(self.tokenizer, dict(item), int(where.removeprefix("item ")))
        return encoded.ids, (encoded.prompt, len(encoded.ids)) if self.at == "response" else None

    def _padded(self, window, ids, spans, chosen):
        columns = max(len(ids[at]) for at in chosen)
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        tokens = torch.arange(columns) < torch.tensor([[len(ids[at])] for at in chosen])
        padded = torch.tensor([ids[at] + [pad] * (columns - len(ids[at])) for at in chosen])
        inputs = {"input_ids": padded, "attention_mask": tokens.long()}
        index, group = (torch.tensor([window[at][part] for at in chosen]) for part in (0, 2))
        picked = torch.tensor([spans[at] for at in chosen]) if has_span(self.at) else None
        return Batch(inputs, tokens, group.int(), index, picked)

    def _ready(self, item, index):
        if has_span(self.at):
            raise ValueError(f"batch {index} is a ready batch, of which {self.at!r} is not known; give texts or token ids")
        inputs = {name: value for name, value in item.items() if name != "group"}
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
            raise ValueError(f"batch {index} has {', '.join(inputs)}, expected a tensor input_ids (sequences, columns)")
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape != ids.shape[:2]:
            found = f"batch {index} has an attention_mask {tuple(mask.shape)} for input_ids {tuple(ids.shape)}"
            raise ValueError(f"{found}, expected one number per token")
        tokens = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
        if not tokens.any(1).all():
            raise ValueError(f"batch {index} has a sequence without a token in its attention_mask: leave it out")
        labels = item.get("group")
        if labels is None:
            group = torch.zeros(len(ids), dtype=torch.int32)
        else:
            labels = labels.tolist() if isinstance(labels, torch.Tensor) else list(labels)
            if len(labels) != len(ids):
                raise ValueError(f"batch {index} has {len(labels)} groups for {len(ids)} sequences")
            group = torch.tensor([self._number(label, index) for label in labels], dtype=torch.int32)
        return Batch(inputs, tokens, group, torch.full((len(ids),), index))


def _token_ids(item, number):
    try:
        found = [operator.index(one) for one in (item.tolist() if hasattr(item, "tolist") else item)]
    except TypeError:
        raise TypeError(f"item {number} is {item!r:.60}, expected token ids, which are whole numbers") from None
    if any(abs(one) >= 1 << 63 for one in found):
        raise ValueError(f"item {number} is {item!r:.60}, expected token ids, which 64 bits hold")
    return found


def _named(data, groups, names):
    """(groups, names): one name, None, if nothing is grouped."""
    if groups is not None and hasattr(groups, "__len__") and hasattr(data, "__len__") and len(groups) != len(data):
        raise ValueError(f"groups has {len(groups)} labels for {len(data)} texts, expected one each")
    if names is None:
        if groups is not None and not hasattr(groups, "__len__"):
            raise ValueError("groups is a stream: say with group_names= what labels it may hold")
        names = [None] if groups is None else list(dict.fromkeys(groups))
    return groups, tuple(names)


def kind_of(item, index):
    """Which of the kinds of data an item is."""
    if isinstance(item, str):
        return "texts"
    if isinstance(item, Mapping):
        if {"role", "content"} <= item.keys() or {"from", "value"} <= item.keys():
            raise TypeError(f"item {index} is one message: the data is one conversation, expected a list of them")
        return "rows" if {"prompt", *CHATS} & item.keys() else "ready batches"
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], Mapping):
        return "messages"
    if not isinstance(item, Iterable) or getattr(item, "shape", None) == ():
        raise TypeError(f"item {index} is {item!r:.60}, expected a text, messages, a row, token ids or a batch")
    return "token ids"


def text_ids(tokenizer, text):
    """Token ids of a text with the tokenizer's special tokens. A text that begins with the BOS token gets no second
    one."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[1:] if _doubled(tokenizer, text, ids) else ids


def _doubled(tokenizer, text, ids):
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token)


def _of_characters(tokenizer, text, start, stop, where):
    """(ids, (start, stop) in tokens) of the tokens that cover text[start:stop]."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not say which characters a token covers: give token ids and spans")
    made = tokenizer(text, verbose=False, return_offsets_mapping=True)
    ids, offsets = list(made["input_ids"]), list(made["offset_mapping"])
    if _doubled(tokenizer, text, ids):
        ids, offsets = ids[1:], offsets[1:]
    inside = [n for n, (first, last) in enumerate(offsets) if first < stop and last > start and last > first]
    if not inside:
        raise ValueError(f"{where}: no token covers characters {start} to {stop} ({text[start:stop]!r})")
    return ids, (inside[0], inside[-1] + 1)


def _within(span, length, where, unit):
    try:
        start, stop = map(int, span)
    except (TypeError, ValueError):
        raise ValueError(f"{where} has the span {span!r:.40}, expected (start, stop)") from None
    if not 0 <= start < stop <= length:
        raise ValueError(f"{where} has the span ({start}, {stop}), but {length} {unit}: expected 0 ≤ start < stop ≤ {length}")
    return start, stop


def _checked_spans(data, at, suffix, spans):
    if (at == "suffix") != (suffix is not None) or (suffix is not None and (not isinstance(suffix, str) or not suffix)):
        raise ValueError(f"suffix is {suffix!r} with at={at!r}: at='suffix' and a text as suffix= go together")
    if (at == "span") != (spans is not None):
        raise ValueError(f"at is {at!r} and spans is {'not ' if spans is None else ''}given: at='span' and spans= go together")
    if spans is None:
        return None
    spans = list(spans)
    if not hasattr(data, "__len__") or len(spans) != len(data):
        count = len(data) if hasattr(data, "__len__") else "a stream of"
        raise ValueError(f"spans has {len(spans)} spans for {count} texts, expected one each")
    return spans


def _content(item, index):
    """The bytes by which an item is recognized."""
    if isinstance(item, str):
        return item.encode() + b"\0"
    if kind_of(item, index) in ("messages", "rows"):
        return json.dumps(item, sort_keys=True, default=str).encode() + b"\0"
    if isinstance(item, Mapping):
        ids = item.get("input_ids")
        return repr(ids.tolist() if isinstance(ids, torch.Tensor) else index).encode()
    return repr(_token_ids(item, index)).encode()
