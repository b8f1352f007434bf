"""Which token of a step is under which edit: the runner's request order and token counts, spread over rows.

The slots are in buffers that never move and are filled before the forward, so that captured graphs read them. The
host's work per step is in proportion to the rows that changed since the last step. A step of the same requests with the
same counts, the usual one during decoding, costs two comparisons.
"""

from typing import NamedTuple

import numpy as np
import torch


class Wanted(NamedTuple):
    """What a request asks for. key: of its slot. strength: its rows' coefficient. prompt: its length.

    POISON stands for an edit that cannot be had. Its rows become NaN on every rank that says so, and every rank's look
    then sees it. If one rank of several left it unedited, the request would be answered, and wrong.
    """

    key: tuple
    strength: float
    positions: object
    prompt: int


POISON = Wanted(None, float("nan"), None, 0)


class Rows:
    """slot (max_tokens,) int32 and strength (max_tokens,) fp32 on the device. −1 where nobody asked for an edit."""

    def __init__(self, residency, max_requests, max_tokens, device, failed=None):
        """failed: called with (request id, exception) for a request whose edit cannot be put into a slot."""
        self.residency, self.failed = residency, failed
        with torch.inference_mode(False):
            self.slot = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)
            self.strength = torch.ones(max_tokens, device=device)
            direct = self.slot.device.type == "cpu"
            self.host_slot = self.slot.numpy() if direct else np.full(max_tokens, -1, np.int32)
            self.host_strength = self.strength.numpy() if direct else np.ones(max_tokens, np.float32)
        self.direct = direct
        self.wanted = {}  # request id → Wanted, from its first schedule to its end
        self.req_ids, self.counts, self.total = [], None, 0
        self.keys = [None] * max_requests
        self.row_slot = np.full(max_requests, -1, np.int32)
        self.row_strength = np.ones(max_requests, np.float32)
        self.rules = np.zeros((max_requests, 5), np.int64)  # first, last, prompt, generated, the prompt's length
        self.ruled = np.zeros(max_requests, bool)

    @property
    def edited(self):
        """How many tokens of this step may be edited. 0: none."""
        return self.total

    def admit(self, req_id, plan, prompt):
        """A request that is scheduled for the first time, with the plan from the front end."""
        try:
            self.wanted[req_id] = Wanted(*self.residency.shelf.key(plan), prompt)
        except Exception as error:  # whatever it is, it ends this request and no other
            self._fail(req_id, error)

    def _fail(self, req_id, error):
        if self.failed is None:
            raise error
        self.wanted[req_id] = POISON
        self.failed(req_id, error)

    def forget(self, req_ids):
        for req_id in req_ids:
            self.wanted.pop(req_id, None)

    def step(self, req_ids, counts, computed):
        """Fill the buffers for a step of `req_ids`, `counts` tokens each, `computed` of them done before."""
        changed = self._changed(req_ids)
        edited = bool(self.residency.holders) or bool(np.isnan(self.row_strength[: len(req_ids)]).any())
        if not edited and not self.total:
            self.counts = None
            return
        number = len(req_ids)
        ruled = edited and self.ruled[:number].any()
        same = self.counts is not None and len(self.counts) == number and np.array_equal(self.counts, counts)
        if same and not changed and not ruled:
            return
        self._fill(number, np.array(counts), computed, ruled, edited)

    def idle(self):
        """For a forward without requests (a dummy run): no row is edited."""
        if self.total:
            self._write(slice(0, self.total), -1, 1.0)
            self.total, self.counts = 0, None

    def _changed(self, req_ids):
        """Bring the rows up to the request order. Returns whether any differs from the last step's."""
        before = self.req_ids
        if before == req_ids:
            return False
        places = [i for i, (a, b) in enumerate(zip(before, req_ids, strict=False)) if a != b]
        places += range(min(len(before), len(req_ids)), max(len(before), len(req_ids)))
        for place in places:  # all holds are released before the first is taken: a slot must be free then
            if self.keys[place] is not None:
                self.residency.drop(self.keys[place])
                self.keys[place] = None
        for place in places:
            self._take(place, req_ids[place] if place < len(req_ids) else None)
        self.req_ids = list(req_ids)
        return True

    def _take(self, place, req_id):
        self.row_slot[place], self.row_strength[place], self.ruled[place] = -1, 1.0, False
        wanted = self.wanted.get(req_id)
        if wanted is None:
            return
        if wanted is not POISON:
            try:
                self.row_slot[place] = self.residency.hold(wanted.key)
            except Exception as error:  # as in `admit`
                self._fail(req_id, error)
                wanted = POISON
        self.row_strength[place] = wanted.strength
        if wanted is POISON:
            self.row_slot[place] = 0  # whatever edit is there: NaN times it is NaN
            return
        self.keys[place] = wanted.key
        rule = wanted.positions
        self.ruled[place] = rule is not None
        if rule is not None:
            self.rules[place] = rule.first, rule.last, rule.prompt, rule.generated, wanted.prompt

    def _fill(self, number, counts, computed, ruled, edited):
        total, before = int(counts.sum()), self.total
        if edited:
            slots = np.repeat(self.row_slot[:number], counts)
            if ruled:
                slots[~self._acts(number, counts, computed)] = -1
            self._write(slice(0, total), slots, np.repeat(self.row_strength[:number], counts))
        else:
            total = 0
        if total < before:
            self._write(slice(total, before), -1, 1.0)
        self.total, self.counts = total, counts

    def _acts(self, number, counts, computed):
        """One bool per token: whether it is among its request's positions (fastedit/edits/positions.py)."""
        starts = np.cumsum(counts) - counts
        position = np.arange(counts.sum()) + np.repeat(np.asarray(computed[:number]) - starts, counts)
        first, last, prompt, generated, length = np.repeat(self.rules[:number], counts, axis=0).T
        inside = position < length
        acts = inside & ((prompt > 0) | (position < first) | (position >= length - last))
        acts |= ~inside & (generated > 0)
        return acts | ~np.repeat(self.ruled[:number], counts)

    def _write(self, where, slots, strengths):
        self.host_slot[where], self.host_strength[where] = slots, strengths
        if not self.direct:  # pageable memory: the copy has left it when the call returns
            self.slot[where].copy_(torch.from_numpy(self.host_slot[where]))
            self.strength[where].copy_(torch.from_numpy(self.host_strength[where]))
