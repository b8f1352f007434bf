"""Which rows of a forward an edit acts on: one RowPlan per forward, shared by all layers of a stack.

The module that owns a stack of layers (LlamaModel, BertModel, a T5Stack) is given the mask, the ids and the cache. Its
class is swapped (patching/class_swap.py) for one that first makes a plan of them. The layers' edits take their
coefficients from the plan (edits/positions.py): fp32, one per row, made at first use and kept for later layers.

What is the prompt?

- In `generate`: what it was given, however the forwards cut it (patching/rows/generating.py).
- In a forward on an empty cache: everything. In packed rows, everything of each sequence (patching/rows/packing.py).
- Else: what `handle.prompt` says.
- With `labels`, in a causal model: the tokens before the first label that is not −100. Training without labels or
  lengths is refused if it matters.

If the sources do not say it, or contradict each other, an edit that depends on it is refused.
"""

import threading
from functools import partial

import torch

from ...edits.positions import Positions
from .cached import cache_in, length_of
from .generating import Elsewhere, Unknown, around
from .packing import about_packing, packing_of
from .prompt_decisions import Decisions

NOWHERE = 0  # a coefficient that is 0 in every row; None is 1 in every row
INPUTS = ("input_ids", "inputs_embeds")
_ALONE = {}
_PROMPT, _GENERATED = Positions(prompt=True), Positions(generated=True)


class Stack:
    """One stack of layers, its owner and the plan that is in force, for each thread that runs it."""

    def __init__(self, name, owner, rows):
        self.name, self.owner, self.rows = name, owner, rows
        decodes = getattr(getattr(owner, "config", None), "is_decoder", False)  # BertGenerationEncoder may be a decoder
        named = "Encoder" in type(owner).__name__ and not decodes
        self.encodes = name == "encoder" or named or getattr(owner, "is_decoder", None) is False
        self.plans, self.traced = {}, None  # by thread; and under torch.compile, which has no threads
        self.decisions = Decisions()

    def __getstate__(self):
        return self.__dict__ | {"plans": {}, "traced": None}

    def put(self, plan):
        """Set the plan in force. Returns the one before."""
        if torch.compiler.is_compiling():
            before, self.traced = self.traced, plan
        else:
            thread = threading.get_ident()
            before = self.plans.pop(thread, None)
            if plan is not None:
                self.plans[thread] = plan
        return before

    def during(self, function, plan, *args, **kwargs):
        before = self.put(plan)
        try:
            return function(*args, **kwargs)
        finally:
            self.put(before)

    def forward(self, function, given, *args, **kwargs):
        """The owner's forward, under a plan of its arguments {name: value}."""
        plan = RowPlan(self, given)
        output = self.during(function, plan, *args, **kwargs)
        if plan.decided and not torch.compiler.is_compiling():
            self.decisions.remember(plan, output)
        return output

    def checkpointed(self, checkpoint):
        """A checkpointing function whose recomputation has its own forward's plan."""

        def under_plan(function, *args, **kwargs):
            return checkpoint(partial(self.during, function, self.plan()), *args, **kwargs)

        return under_plan

    def plan(self):
        return self.traced if torch.compiler.is_compiling() else self.plans.get(threading.get_ident())

    def coefficient(self, positions, shape, device):
        """(…,) fp32 for hidden states of `shape` (…, width). None for 1 throughout, NOWHERE for 0."""
        return self.known_plan(positions).coefficient(positions, shape, device)

    def known_plan(self, what):
        """The plan in force, which `what` (Positions or words) needs."""
        plan = self.traced if torch.compiler.is_compiling() else self.plans.get(threading.get_ident())
        if plan is None:
            raise RuntimeError(
                f"{_named(what)} ran outside of {type(self.owner).__name__}.forward, which "
                "knows the tokens; call that, and checkpoint with model.gradient_checkpointing_enable()"
            )
        return plan


class RowPlan:
    """One forward's tokens, shape (batch, tokens), and all that was known of them when it began.

    generation: the call of `generate` that runs it, or None. lengths, mask: what handles were told.
    """

    def __init__(self, stack, given):
        seen = stack.rows.seen()
        self.owner, self.decisions = stack.owner, stack.decisions
        self.lengths, self.mask = seen.lengths, seen.mask
        self.ids, embeds = (given.get(name) for name in INPUTS)
        mask = given.get("attention_mask")
        self.unread = mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2)
        self.attention_mask = None if self.unread else mask
        shaped = self.ids if self.ids is not None else embeds
        self.shape = None if shaped is None else shaped.shape[:2]
        self.generation = None if stack.encodes or self.shape is None else seen.generation
        self.unseen = seen.generation is None and not stack.encodes  # no `generate` is known to be around
        self.device = None if shaped is None else shaped.device
        self.starts = about_packing(given) if self.generation is None else {}
        self.behind, self.unsure, self._checked, self._packing = False, None, False, False
        self.cache, self._cache_name = cache_in(given)
        self._offset = self._locate(stack.name)
        call = _ALONE if stack.encodes else stack.rows.call_now()
        labels = call.get("labels")
        self.labels = labels if labels is not None and labels.shape == self.shape else None
        if "attention_mask" in call and (self.unread or mask is None):  # made ready for the layers, or kept from them
            told = call["attention_mask"]
            self.unread = told is not None and not (isinstance(told, torch.Tensor) and told.dim() == 2)
            self.attention_mask = None if self.unread else told
        self.trains = stack.owner.training and stack.rows.answers and torch.is_grad_enabled()
        self.made = {}
        self.measured, self.decided = {}, {}  # by gates in this forward: of each token, of each sequence

    # --- where it is ------------------------------------------------------------------------------------------------------

    def _locate(self, stack):
        """How many columns come before: an int, or a tensor for a static cache. None if `unsure` says why not."""
        length, generation = length_of(self.cache), self.generation
        if isinstance(generation, Elsewhere):
            raise generation.refuse()
        if generation is None or torch.compiler.is_compiling():
            self.behind = generation is not None and length is None and generation.behind
            if length is None and not self.behind:
                self.unsure = (
                    f"the argument {self._cache_name!r} holds a cache, a {type(self.cache).__name__}, that does not say how "
                    "many tokens it holds"
                )
            return length
        try:
            offset = generation.locate(stack, self.shape[1], length)
        except Unknown as unknown:
            self.unsure = str(unknown)
            return None
        self.behind = generation.columns <= offset
        return offset

    @property
    def offset(self):
        """How many columns come before.

        Raises:
            RuntimeError: that is not known.
        """
        if self._offset is None:
            raise self._unknown("this edit")
        return self._offset

    def _unknown(self, what):
        if self.generation is not None:
            return RuntimeError(
                f"{what} must know which of the prompt's tokens a forward of {type(self.generation.module).__name__}.generate "
                f"holds, but {self.unsure}. Use positions='all' there, or leave that setting out"
            )
        return RuntimeError(
            f"{what} must know how many tokens are in front of this forward's, but {self.unsure}. Use model.generate, give "
            "the model a cache of transformers (DynamicCache), or use positions='all'"
        )

    def by_hand(self, what):
        """Refuse what a forward outside of `generate` may not be taken for. `what` depends on where its sequences
        begin."""
        if self._checked:
            return
        what = _named(what)
        if self._offset is None:
            raise self._unknown(what)
        self._checked = True
        if torch.compiler.is_compiling():
            return
        whole = around(self.owner) if self.unseen and self.lengths is None else None
        if whole is not None:
            raise RuntimeError(
                f"{what} must know where the prompt ends, and {type(whole).__name__}.generate knows, but "
                f"{type(self.owner).__name__}, which is patched inside of it, is not told: patch the "
                f"{type(whole).__name__}, or call handle.prompt(lengths) before generate"
            )
        offset, mask = self._offset, self.attention_mask
        if mask is None or self.shape is None or isinstance(offset, torch.Tensor):
            return
        if mask.shape[1] != offset + self.shape[1]:
            found = "no cache was found" if self.cache is None else f"the cache holds {offset}"
            raise RuntimeError(
                f"{what} must know how many tokens are in front of this forward's {self.shape[1]}: attention_mask has "
                f"{mask.shape[1]} columns, and {found} among the arguments of {type(self.owner).__name__}.forward. Give it a "
                "mask with one column for each token in the cache and each that is new"
            )

    @property
    def packing(self):
        """The Packing of rows that hold several sequences, or None."""
        if self._packing is False:
            self._packing = None if self.generation is not None or self.shape is None else self._packed()
        return self._packing

    def _packed(self):
        offset, mask = self.offset, self.attention_mask
        looking = not torch.compiler.is_compiling()
        if isinstance(offset, torch.Tensor) or offset:
            return None
        if mask is not None:
            mask = None if mask.shape[1] != self.shape[1] else mask.to(self.device)
        return packing_of(self.starts, mask, self.shape, self.device, looking)

    def whole_rows(self, what):
        """Refuse packed rows for `what`, which takes a row for one sequence."""
        if self.packing is not None and self.packing.several():
            raise ValueError(
                f"{what} are one per row, but the rows of this forward are packed, with {self.packing.sequences()} sequences "
                f"in {self.shape[0]} rows: give each sequence a row of its own"
            )

    def fit(self, shape, what):
        """Refuse hidden states of `shape` (…, width) whose rows are not this forward's (batch, tokens), in that
        order."""
        if self.shape is None or shape[:-1] == self.shape or shape[:-1] == (self.shape[0] * self.shape[1],):
            return
        raise ValueError(
            f"{_named(what)}: the hidden states have shape {tuple(shape)}, expected {(*self.shape, shape[-1])} (batch, tokens, "
            "width) of this forward; use positions='all' without a gate on the prompt at this site"
        )

    # --- what is meant ----------------------------------------------------------------------------------------------------

    def of_prompt(self, batch, tokens, device):
        """(batch, tokens) bool: the prompt's tokens in this forward, without padding.

        Outside of `generate` the cache is taken to be empty.
        """
        columns = torch.arange(tokens, device=device) + (0 if self.generation is None else self.offset)
        index, real, length = self._in_prompt(None, columns, batch, tokens, device)
        here = index < length
        return (here if real is None else here & real).expand(batch, tokens)

    def coefficient(self, positions, shape, device):
        self.fit(shape, positions)
        made = self.made.get(positions, False)
        if made is False:
            batch, tokens = self.shape or shape[:2]
            made = self.made[positions] = self._make(positions, batch, tokens, device)
        if made is None or made is NOWHERE:
            return made
        if made.numel() != shape[:-1].numel():
            raise ValueError(
                f"{_named(positions)}: the hidden states have shape {tuple(shape)}, expected "
                f"{tuple(made.shape)} tokens; use positions='all' at this site"
            )
        return made.to(device, non_blocking=True).view(shape[:-1])

    def _make(self, positions, batch, tokens, device):
        quick = self._quick(positions)
        if quick is not False:
            return quick
        here = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
        columns = None
        if positions.of_prompt or positions.mask:
            columns = self.offset + torch.arange(tokens, device=device)
        if positions.of_prompt:
            index, real, length = self._in_prompt(positions, columns, batch, tokens, device)
            in_prompt = index < length
            if positions.prompt:
                here = here | in_prompt
            else:
                here = here | (in_prompt & ((index < positions.first) | (index >= length - positions.last)))
            if positions.generated:
                here = here | (index >= length)
            here = here & real if real is not None else here
        if positions.tokens:
            if self.ids is None:
                raise ValueError(
                    "positions by token ids need input_ids; this forward was given inputs_embeds or no tokens at all"
                )
            here = here | _is_one_of(self.ids.to(device), positions.tokens)
        here = here.float()
        if positions.mask:
            here = torch.maximum(here, self._mask(columns, batch, device))
        return here

    def _quick(self, positions):
        """None or NOWHERE if that needs no look at the tokens, else False."""
        if positions.of_prompt and self.generation is None:
            self.by_hand(positions)
        if positions.tokens or positions.mask:
            return False
        if self.behind:
            return None if positions.generated else NOWHERE
        offset = self.offset
        if isinstance(offset, torch.Tensor):
            return False
        if self.generation is not None:
            return False if self.generation.columns > offset else None if positions.generated else NOWHERE
        if self.lengths is None and self.labels is None and not self.trains and offset == 0:
            if positions == _GENERATED:
                return NOWHERE
            if positions == _PROMPT and self.attention_mask is None:
                return None
        return False

    def _in_prompt(self, positions, columns, batch, tokens, device):
        """(index among the real tokens, real or None for all, the prompt's real tokens), each for (batch, tokens).

        positions: what this is for. None for a gate on the prompt.
        """
        if self.generation is not None:
            return _by_column(self.generation.mask, columns, self.generation.columns, batch)
        lengths = self.lengths
        if isinstance(lengths, Elsewhere):
            raise lengths.refuse()
        if lengths is None:
            lengths = self._by_labels(positions, device)
        if self.packing is not None:
            return self._in_pack(lengths, device)
        if self.unread and (positions is None or positions.first or positions.last):
            raise ValueError(
                f"{_named(positions or 'a gate on the prompt')} must tell real tokens from padding, but attention_mask is not "
                "a (batch, tokens) tensor; give the model that one, or say what is meant with positions='mask' and "
                "handle.mask"
            )
        if lengths is None and positions is not None:
            self._check_empty(positions)
        index, real, length = _by_column(self.attention_mask, columns, tokens, batch)
        if lengths is not None:
            length = lengths
            if isinstance(lengths, torch.Tensor):
                length = self._told(lengths.to(device)[:, None], batch, "handle.prompt's lengths")
        return index, real, length

    def _in_pack(self, lengths, device):
        """`_in_prompt` of packed rows: each sequence is a prompt, or begins with one of the length that was given."""
        packing = self.packing
        length = packing.length if lengths is None else lengths
        if isinstance(lengths, torch.Tensor):
            if not torch.compiler.is_compiling() and len(lengths) not in (1, packing.sequences()):
                raise ValueError(
                    f"handle.prompt was given {len(lengths)} lengths, but this forward packs {packing.sequences()} "
                    "sequences: expected one per sequence, in their order"
                )
            lengths = lengths.to(device)
            length = lengths[packing.number.clamp(0, len(lengths) - 1)]
        found = packing.index, packing.real, length
        return tuple(t.to(device) if isinstance(t, torch.Tensor) else t for t in found)

    def _by_labels(self, positions, device):
        """(sequences,): lengths of the prompts by the labels. None if nothing says them and nothing needs to."""
        what = _named(positions or "a gate on the prompt")
        if self.labels is not None:
            self.whole_rows("labels that say where prompts end")
            return _before_labels(what, positions, self.labels.to(device), self.attention_mask)
        if self.trains and (positions is None or not positions.only_first):
            verb = "depends" if positions is None else "depend"
            raise RuntimeError(
                f"{what} {verb} on where the prompt ends, which this forward in training does not say: give the model labels "
                "with -100 over the prompt, or call handle.prompt(lengths) before each forward"
            )
        return None

    def _check_empty(self, positions):
        offset = self.offset
        if isinstance(offset, torch.Tensor) and not torch.compiler.is_compiling():
            offset = int(offset)
        if isinstance(offset, torch.Tensor) or offset:
            raise RuntimeError(
                f"{_named(positions)} depend on where the prompt ends, which a forward on a filled cache does "
                "not say; use model.generate, or call handle.prompt(lengths) before the forwards after the prompt"
            )

    def _told(self, tensor, batch, name):
        """What a handle was told, one row per sequence. A value from before must not pass for this batch's."""
        if self.generation is None and len(tensor) not in (1, batch):
            raise ValueError(f"{name} has {len(tensor)} rows, but this forward has {batch} sequences")
        return _for_batch(tensor, batch, name)

    def _mask(self, columns, batch, device):
        mask = self.mask
        if mask is None:
            raise RuntimeError("positions='mask': no mask was given, expected one; call handle.mask(mask) before the forward")
        if isinstance(mask, Elsewhere):
            raise mask.refuse()
        mask = self._told(mask.to(device, torch.float32), batch, "handle.mask's mask")
        known = mask.shape[1]
        return mask[:, columns.clamp(max=known - 1)] * (columns < known)


def _before_labels(what, positions, labels, mask):
    """(sequences,): how many real tokens come before the first label that is not −100."""
    answers = labels != -100
    before = answers.cumsum(1) == 0
    length = (before if mask is None else before & (mask.to(labels.device) != 0)).sum(1)
    if not torch.compiler.is_compiling():
        starts = answers[:, :1].sum(1) + (answers[:, 1:] & ~answers[:, :-1]).sum(1)
        if bool((starts > 1).any()):
            raise ValueError(
                f"{what}: sequence {int((starts > 1).int().argmax())} has several responses in its labels (turns, or a packed "
                "row), each with a prompt of its own; give one response per row, or {_instead(positions)}"
            )
        asked = positions is None or positions.first or positions.last or positions.prompt
        if asked and bool((length == 0).any()):
            raise ValueError(
                f"{what}: sequence {int((length == 0).int().argmax())} has no prompt by its labels; put -100 over the prompt's "
                f"labels, or {_instead(positions)}"
            )
    return length


def _instead(positions):
    return "let the gate decide by token" if positions is None else "use positions='all'"


def _named(what):
    return what if isinstance(what, str) else f"positions {str(what)!r}"


def _by_column(mask, columns, width, batch):
    """(index among the real tokens, real or None for all, how many the mask has) of columns.

    The mask (sequences, columns) says which are real; columns after it are. Without a mask there are `width` real
    tokens.
    """
    if mask is None:
        return columns[None], None, width
    mask = _for_batch(mask.to(columns.device) != 0, batch, "attention_mask")
    known = mask.shape[1]
    count = mask.cumsum(1)
    total = count[:, -1:]
    column = columns.clamp(max=known - 1)
    behind = columns[None] >= known
    real = mask[:, column] | behind
    return torch.where(behind, total + columns[None] - known, count[:, column] - 1), real, total


def _is_one_of(ids, tokens):
    if len(tokens) > 8 and not torch.compiler.is_compiling():  # a constant on the host has no place in a CUDA graph
        return torch.isin(ids, torch.tensor(tokens, device=ids.device))
    found = ids == tokens[0]
    for token in tokens[1:]:
        found = found | (ids == token)
    return found


def _for_batch(tensor, batch, name):
    """One row per sequence: beams and several samples of a sequence share its row."""
    if tensor.shape[0] == batch:
        return tensor
    if batch % tensor.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, expected {batch}, one per sequence, or a divisor of it")
    return tensor.repeat_interleave(batch // tensor.shape[0], 0)
