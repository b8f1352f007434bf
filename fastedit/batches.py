"""From texts to padded batches of like lengths, a window of the data at a time: memory does not grow with the data."""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

WINDOW = 32  # batches whose examples are sorted by length together


@dataclass
class Batch:
    """inputs: tensors for the model. tokens (sequences, columns) bool: which are real. group, index: one a sequence."""

    inputs: dict
    tokens: torch.Tensor
    group: torch.Tensor
    index: torch.Tensor


class Windows:
    """The data in windows: each a list of Batches, long enough that sorting by length leaves little padding.

    data: texts, lists of token ids, or ready batches (mappings with input_ids and, optional, attention_mask), in any
    iterable. groups: a label for each text, or None; a ready batch carries its labels as "group". names: the labels,
    in the order of their numbers; found in the data if groups is a list.
    """

    def __init__(self, tokenizer, data, groups=None, *, names=None, batch_size=16, max_length=None, limit=None):
        if isinstance(data, str):
            raise TypeError(f"the data is one text ({data[:30]!r}…), expected a list of texts or batches")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}, expected a whole number from 1 on")
        self.tokenizer, self.data, self.batch_size = tokenizer, data, batch_size
        self.max_length, self.limit = max_length, limit
        self.groups, self.names = _named(data, groups, names)
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.total = len(data) if hasattr(data, "__len__") else None
        self.digest, self.position = hashlib.sha256(), 0

    def skip(self, count):
        """Leave out the first `count` items, which an earlier pass has seen; returns how many there were."""
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
        """(index, item, group number); each is counted and goes into the digest as it is read."""
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
        ready = [isinstance(item, Mapping) for _, item, _ in window]
        if any(ready) and not all(ready):
            raise TypeError("the data holds ready batches beside texts, expected one or the other throughout")
        if all(ready):
            return [self._ready(item, index) for index, item, _ in window]
        ids = self._tokenized([item for _, item, _ in window], window[0][0])
        order = sorted(range(len(window)), key=lambda at: -len(ids[at]))  # the longest first: memory peaks at once
        size = self.batch_size
        return [self._padded(window, ids, order[at : at + size]) for at in range(0, len(order), size)]

    def _tokenized(self, items, first):
        texts = [item for item in items if isinstance(item, str)]
        if texts and len(texts) != len(items):
            raise TypeError("the data holds texts beside token ids, expected one or the other throughout")
        if texts and self.tokenizer is None:
            raise ValueError("tokenizer is None, but the data is texts: pass the model's tokenizer, or token ids")
        ids = self.tokenizer(texts, verbose=False)["input_ids"] if texts else [list(map(int, item)) for item in items]
        longest = self.limit if self.max_length is None else self.max_length
        for number, sequence in enumerate(ids, first):
            if not sequence:
                raise ValueError(f"item {number} has no tokens: leave it out")
            if self.max_length is None and longest is not None and len(sequence) > longest:
                raise ValueError(
                    f"item {number} has {len(sequence)} tokens, the model takes {longest}; max_length={longest} cuts"
                )
        return ids if longest is None else [sequence[:longest] for sequence in ids]

    def _padded(self, window, ids, chosen):
        columns = max(len(ids[at]) for at in chosen)
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        tokens = torch.arange(columns) < torch.tensor([[len(ids[at])] for at in chosen])
        padded = torch.tensor([ids[at] + [pad] * (columns - len(ids[at])) for at in chosen])
        inputs = {"input_ids": padded, "attention_mask": tokens.long()}
        index, group = (torch.tensor([window[at][part] for at in chosen]) for part in (0, 2))
        return Batch(inputs, tokens, group.int(), index)

    def _ready(self, item, index):
        inputs = {name: value for name, value in item.items() if name != "group"}
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
            raise ValueError(f"batch {index} has {', '.join(inputs)}, expected a tensor input_ids (sequences, columns)")
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape != ids.shape[:2]:
            found = f"batch {index} has an attention_mask {tuple(mask.shape)} for input_ids {tuple(ids.shape)}"
            raise ValueError(f"{found}, expected one number a token")
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


def _named(data, groups, names):
    """(groups, names): one name, None, where nothing is grouped."""
    if groups is not None and hasattr(groups, "__len__") and hasattr(data, "__len__") and len(groups) != len(data):
        raise ValueError(f"groups has {len(groups)} labels for {len(data)} texts, expected one each")
    if names is None:
        if groups is not None and not hasattr(groups, "__len__"):
            raise ValueError("groups is a stream: say with group_names= what labels it may hold")
        names = [None] if groups is None else list(dict.fromkeys(groups))
    return groups, tuple(names)


def _content(item, index):
    """The bytes by which an item is known again."""
    if isinstance(item, str):
        return item.encode() + b"\0"
    if isinstance(item, Mapping):
        ids = item.get("input_ids")
        return repr(ids.tolist() if isinstance(ids, torch.Tensor) else index).encode()
    return repr(list(map(int, item))).encode()
