"""Packed rows: several sequences one after another in a row, as padding-free training lays them out.

The start of each sequence is read from restarting position ids, cumulative lengths (cu_seq_lens_q, cu_seqlens),
sequence numbers (seq_idx), or a mask that numbers its sequences. All of it is operations on tensors, so a compiler can
see it and nothing waits for a GPU. Checks that look at values are left out under a compiler.
"""

import itertools

import torch

_NUMBERED = ("seq_idx", "sequence_ids", "segment_ids", "document_ids")


class Packing:
    """What is known about each token of (batch, tokens).

    index: among the real tokens of its sequence. length: how many those are. number: of its sequence in the batch. All
    are (batch, tokens). real: bool, or None for all.
    """

    def __init__(self, starts, real):
        batch, tokens = starts.shape
        count = torch.ones_like(starts, dtype=torch.long) if real is None else real.long()
        self.real = real
        self.number = starts.flatten().long().cumsum(0).view(batch, tokens) - 1
        slot = self.number.clamp(min=0).flatten()  # padding in front of the first sequence counts nothing
        per = torch.zeros(batch * tokens, dtype=torch.long, device=starts.device).index_add_(0, slot, count.flatten())
        before = torch.cat([per.new_zeros(1), per.cumsum(0)])
        self.length = per[slot].view(batch, tokens)
        self.index = (count.flatten().cumsum(0) - 1 - before[slot]).view(batch, tokens)

    def sequences(self):
        """How many there are. Looks at the values."""
        return int(self.number.max()) + 1

    def several(self):
        """Whether a row holds more than one. Looks at the values."""
        last = self.number[:, -1]  # minus the row's before: how many begin in it, padding in front or not
        return bool((last.diff(prepend=last.new_full((1,), -1)) > 1).any())

    def last(self, within):
        """(batch, tokens): for each token, the place in its row of the last token of its sequence for which `within`
        holds."""
        tokens = within.shape[1]
        column = torch.arange(tokens, device=within.device).expand_as(within)
        best = torch.zeros(within.numel(), dtype=torch.long, device=within.device)
        slot = self.number.clamp(min=0)
        best.scatter_reduce_(0, slot.flatten(), torch.where(within, column, 0).flatten(), "amax")
        return best[slot.flatten()].view_as(within)


def about_packing(given):
    """The arguments that `packing_of` looks at, among a forward's {name: value}."""
    names = [n for n in given if n == "position_ids" or n.startswith("cu_seq") or n in _NUMBERED]
    return {name: given[name] for name in names}


def packing_of(given, mask, shape, device, looking):
    """The Packing of a forward that begins its sequences, or None if each row is one sequence.

    given: those of the forward's arguments. mask: (batch, tokens) of 0 and 1, or of the sequences' numbers; or None.
    looking: whether values may be looked at.

    Raises:
        ValueError: a source of starts begins with no start, or two sources differ.
    """
    batch, tokens = shape
    real = None if mask is None else (mask != 0).expand(batch, tokens)
    found = {}
    for name, starts in _said(given, shape, device):
        found[name] = starts if real is None else _of_real(starts, real)
    position_ids = _positions(given, shape, device)
    if position_ids is not None:
        found["position_ids"] = _restarts(position_ids, real, looking)
    whole = mask is not None and not mask.is_floating_point() and mask.dtype is not torch.bool
    if whole and (found or _numbers(mask, looking)):
        found["attention_mask"] = _changes(mask.expand(batch, tokens), real)
    if not found:
        return None
    first, *others = found
    for name in others if looking else ():
        one, other = found[first], found[name]
        coarse = "attention_mask" in (first, name)  # which may number the sequences, or only tell padding
        if not bool(((other & ~one) if coarse else (one != other)).any()):
            continue
        raise ValueError(
            f"{first} and {name} do not agree on where the packed sequences start: expected one layout of the batch "
            f"{batch} × {tokens} in both"
        )
    packing = Packing(found[first], real)
    unseen = not looking or (found.keys() == {"attention_mask"} and mask.device.type != "cpu")
    return packing if unseen or packing.several() else None


def _numbers(mask, looking):
    """Whether a mask may number sequences. This does not wait for a GPU: one sequence per row is a packing, too."""
    return looking and (mask.device.type != "cpu" or bool((mask > 1).any()))


def _said(given, shape, device):
    """(name, starts (batch, tokens) bool) of the arguments that are about packing."""
    batch, tokens = shape
    for name, value in given.items():
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            continue
        if name.startswith("cu_seq") and not name.endswith("_k"):
            yield name, _of_lengths(name, value, batch, tokens, device)
        elif name in _NUMBERED:
            if value.numel() != batch * tokens:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected the batch's {batch} × {tokens}")
            yield name, _changes(value.to(device).view(batch, tokens), None)


def _of_lengths(name, value, batch, tokens, device):
    value = value.to(device).long()
    if not torch.compiler.is_compiling():
        ends = [] if value.dim() != 1 else value.tolist()
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != batch * tokens or _falls(ends):
            raise ValueError(
                f"{name} says where packed sequences start and end, but it is not cumulative lengths from 0 to the batch's "
                f"{batch} × {tokens} tokens; found {ends[:6]}{' …' if len(ends) > 6 else ''}"
            )
    starts = torch.zeros(batch * tokens + 1, dtype=torch.bool, device=device)
    starts[value] = True
    starts = starts[:-1].view(batch, tokens)
    return starts | (torch.arange(tokens, device=device) == 0)  # no sequence reaches from one row into the next


def _falls(ends):
    return any(a > b for a, b in itertools.pairwise(ends))


def _positions(given, shape, device):
    """position_ids (batch, tokens), or None. If there are several rows of them, a text's own are the first of four."""
    found = given.get("position_ids")
    if not isinstance(found, torch.Tensor) or found.is_floating_point():
        return None
    if found.dim() == 3 and found.shape[0] == 4:
        found = found[0]
    if found.dim() != 2 or found.shape[1] != shape[1]:
        return None
    return found.to(device).expand(shape)


def _restarts(position_ids, real, looking):
    """Where positions begin again."""
    before = _before(position_ids, real)
    starts = (position_ids <= before) | (before < 0)
    if real is not None:
        starts = starts & real
    if looking:
        odd = torch.where(starts, position_ids != 0, position_ids != before + 1)
        odd = odd if real is None else odd & real
        if bool(odd.any()):
            raise ValueError(
                "position_ids neither continue by one nor begin again at 0, so where each sequence starts is not known: give "
                "the model position ids that do, or leave them out"
            )
    return starts


def _changes(numbers, real):
    before = _before(numbers, real)
    starts = (numbers != before) | (before < 0)
    return starts if real is None else starts & real


def _before(values, real):
    """The value of the real token before each one in its row. −1 for none."""
    ahead = torch.full_like(values[:, :1], -1)
    if real is None:
        return torch.cat([ahead, values[:, :-1]], 1)
    column = torch.arange(values.shape[1], device=values.device).expand_as(values)
    last = torch.where(real, column, -1).cummax(1).values
    last = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)
    return torch.where(last < 0, torch.full_like(values, -1), values.gather(1, last.clamp(min=0)))


def _of_real(starts, real):
    """Starts on padding, moved to the next real token."""
    counted = starts.long().cumsum(1)
    return _changes(counted, real)
