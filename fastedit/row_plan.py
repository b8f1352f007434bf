"""Which rows of a forward an edit acts on: one RowPlan a forward, shared by all layers of a stack.

The module that owns a stack of layers (LlamaModel, BertModel, a T5Stack) is given the mask, the ids and the cache; its
class is swapped (swapping.py) for one that first makes a plan of them. From a plan the layers' edits take their
coefficients (positions.py): fp32, one a row, made at first use and kept for the layers after.

What is prompt: in `generate` what it was given, however the forwards cut it (chunks, candidates of an assistant); in a
forward on an empty cache everything; else what `handle.prompt` says.
"""

import inspect
import threading
from functools import partial

import torch

from .decisions import Decisions
from .positions import Positions
from .swapping import PLANNED, base_of, swap, swap_back, swappable

NOWHERE = 0  # a coefficient that is 0 in every row; None is 1 in every row
_INPUTS = ("input_ids", "inputs_embeds")
_PROMPT, _GENERATED = Positions(prompt=True), Positions(generated=True)
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")


class Generation:
    """What a call of `generate` was given: the prompt's columns and its mask (sequences, columns), None for all real.

    columns None: a decoder behind an encoder, whose forward on an empty cache says how many.
    """

    def __init__(self, columns, mask):
        self.columns, self.mask, self.behind_encoder = columns, mask, columns is None
        self.thread = threading.get_ident()
        self.decided = {}  # what gates said of the prompt: {gate: (sequences,)}
        self.beams = 1


class Rows:
    """What a model's stacks share. lengths: of the prompts, in real tokens, as the user says; mask: by column."""

    def __init__(self):
        self.lengths = self.mask = self.generation = None

    def given(self, module, args, kwargs):
        """The Generation of one call."""
        ids = next((v for v in (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
                    if isinstance(v, torch.Tensor)), None)  # fmt: skip
        if getattr(module.config, "is_encoder_decoder", False):
            return Generation(None, None)  # the decoder's first forward says
        if ids is None:
            return Generation(1, None)  # from the beginning-of-sequence token
        mask = kwargs.get("attention_mask")
        if mask is None and ids.dim() == 2:
            mask = _mask_of_padding(module, ids, kwargs)
        return Generation(ids.shape[1], mask)

    def generate(self, base, module, args, kwargs):
        """base.generate; one within another (an early-exit assistant is the model itself) has the outer one's prompt."""
        if self.generation is not None:
            if self.generation.thread != threading.get_ident():
                raise RuntimeError(
                    "another thread is generating on this model, whose edits depend on positions; one at a time, or a "
                    "copy of the model for each thread"
                )
            return base.generate(module, *args, **kwargs)
        self.generation = self.given(module, args, kwargs)
        self.generation.beams = _beams(module, args, kwargs)
        try:
            return base.generate(module, *args, **kwargs)
        finally:
            self.generation = None


def _mask_of_padding(module, ids, kwargs):
    """As `generate` infers it: the padding token is padding, unless it also ends sequences."""
    config = kwargs.get("generation_config") or module.generation_config
    pad, eos = (kwargs.get(f"{name}_token_id", getattr(config, f"{name}_token_id", None)) for name in ("pad", "eos"))
    if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else (eos,)):
        return None
    mask = ids != pad
    return None if bool(mask.all()) else mask


def _beams(module, args, kwargs):
    """How many beams a call of `generate` searches with."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None) or module.generation_config
    return kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1


class Stack:
    """One stack of layers, its owner and the plan that is in force, for each thread that runs it."""

    def __init__(self, name, owner, rows):
        self.encodes, self.owner, self.rows = name == "encoder", owner, rows
        self.plans, self.traced = {}, None  # by thread; and under torch.compile, which has no threads
        self.decisions = Decisions()

    def __getstate__(self):
        return self.__dict__ | {"plans": {}, "traced": None}

    def put(self, plan):
        """Set the plan in force; returns the one before."""
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
        """The owner's forward, under a plan of what it was given {name: value}."""
        generation = None if self.encodes else self.rows.generation
        plan = RowPlan(self.rows, generation, given, self.decisions)
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
        """(…,) fp32 for hidden states of `shape` (…, width); None for 1 throughout, NOWHERE for 0."""
        return self.known_plan(f"an edit with positions {str(positions)!r}").coefficient(positions, shape, device)

    def known_plan(self, what):
        """The plan in force; `what` needs it."""
        plan = self.plan()
        if plan is None:
            raise RuntimeError(
                f"{what} ran outside of {type(self.owner).__name__}.forward, which "
                "knows the tokens; call that, and checkpoint with model.gradient_checkpointing_enable()"
            )
        return plan


class RowPlan:
    """One forward's tokens: `offset` columns are in the cache already (an int, or a tensor of a static cache)."""

    def __init__(self, rows, generation, given, decisions):
        self.rows, self.generation, self.decisions = rows, generation, decisions
        self.ids, embeds = (given.get(name) for name in _INPUTS)
        mask = given.get("attention_mask")
        self.unread = mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2)
        self.attention_mask = None if self.unread else mask
        shaped = self.ids if self.ids is not None else embeds
        self.shape = None if shaped is None else shaped.shape[:2]
        self.cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        length = 0 if self.cache is None else self.cache.get_seq_length()
        self.offset = length.clone() if isinstance(length, torch.Tensor) else length  # a static cache counts in place
        empty = not isinstance(self.offset, torch.Tensor) and self.offset == 0
        if generation is not None and generation.behind_encoder and (empty or generation.columns is None):
            generation.columns = 1 if self.shape is None else self.shape[1]
        self.made = {}
        self.measured, self.decided = {}, {}  # by gates in this forward: of each token, of each sequence

    def of_prompt(self, batch, tokens, device):
        """(batch, tokens) bool: the prompt's tokens in this forward, padding left out; outside of `generate` the cache is
        taken to be empty."""
        columns = torch.arange(tokens, device=device) + (0 if self.generation is None else self.offset)
        index, real, length = self._in_prompt(None, columns, batch, tokens, device)
        here = index < length
        return (here if real is None else here & real).expand(batch, tokens)

    def coefficient(self, positions, shape, device):
        if positions not in self.made:
            batch, tokens = self.shape or shape[:2]
            self.made[positions] = self._make(positions, batch, tokens, device)
        made = self.made[positions]
        if made is None or made is NOWHERE:
            return made
        if made.numel() != shape[:-1].numel():
            raise ValueError(
                f"positions {str(positions)!r}: the hidden states have shape {tuple(shape)}, expected "
                f"{tuple(made.shape)} tokens; use positions='all' at this site"
            )
        return made.to(device, non_blocking=True).view(shape[:-1])

    def _make(self, positions, batch, tokens, device):
        quick = self._quick(positions, tokens)
        if quick is not False:
            return quick
        columns = self.offset + torch.arange(tokens, device=device)
        here = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
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

    def _quick(self, positions, tokens):
        """None or NOWHERE where that needs no look at the tokens, else False."""
        offset = self.offset
        if positions.tokens or positions.mask or isinstance(offset, torch.Tensor):
            return False
        if self.generation is not None and self.generation.columns <= offset:
            return None if positions.generated else NOWHERE
        if self.generation is None and self.rows.lengths is None and offset == 0:
            if positions == _GENERATED:
                return NOWHERE
            if positions == _PROMPT and self.attention_mask is None:
                return None
        return False

    def _in_prompt(self, positions, columns, batch, tokens, device):
        """(index among the real tokens, real or None for all, the prompt's real tokens), each for (batch, tokens).

        positions: what for; None for a gate on the prompt.
        """
        if self.generation is not None:
            width, mask, lengths = self.generation.columns, self.generation.mask, None
        elif self.unread and (positions is None or positions.first or positions.last):
            what = "a gate on the prompt" if positions is None else f"positions {str(positions)!r}"
            raise ValueError(
                f"{what} must tell real tokens from padding, but attention_mask is not a (batch, tokens) tensor; "
                "give the model that one, or say what is meant with positions='mask' and handle.mask"
            )
        else:
            width, mask, lengths = None, self.attention_mask, self.rows.lengths
            if lengths is None:
                if positions is not None:
                    self._check_empty(positions)
                width = tokens
        if mask is None:
            real, index, length = None, columns[None], width
        else:
            mask = _for_batch(mask.to(device) != 0, batch, "attention_mask")
            known = mask.shape[1]
            count = mask.cumsum(1)
            total = count[:, -1:]
            column = columns.clamp(max=known - 1)
            behind = columns[None] >= known
            real = mask[:, column] | behind
            index = torch.where(behind, total + columns[None] - known, count[:, column] - 1)
            length = total
        if lengths is not None:
            length = lengths
            if isinstance(lengths, torch.Tensor):
                length = self._given(lengths.to(device)[:, None], batch, "handle.prompt's lengths")
        return index, real, length

    def _check_empty(self, positions):
        offset = self.offset
        if isinstance(offset, torch.Tensor) and not torch.compiler.is_compiling():
            offset = int(offset)
        if isinstance(offset, torch.Tensor) or offset:
            raise RuntimeError(
                f"positions {str(positions)!r} depend on where the prompt ends, which a forward on a filled cache does "
                "not say; use model.generate, or say handle.prompt(lengths) before the forwards behind the prompt"
            )

    def _given(self, tensor, batch, name):
        """What a handle was told, a row a sequence; one of before must not pass for this batch's."""
        if self.generation is None and len(tensor) not in (1, batch):
            raise ValueError(f"{name} has {len(tensor)} rows, but this forward has {batch} sequences")
        return _for_batch(tensor, batch, name)

    def _mask(self, columns, batch, device):
        mask = self.rows.mask
        if mask is None:
            raise RuntimeError("positions='mask': no mask was given; say handle.mask(mask) before the forward")
        mask = self._given(mask.to(device, torch.float32), batch, "handle.mask's mask")
        known = mask.shape[1]
        return mask[:, columns.clamp(max=known - 1)] * (columns < known)


def _is_one_of(ids, tokens):
    if len(tokens) > 8 and not torch.compiler.is_compiling():  # a constant on the host has no place in a CUDA graph
        return torch.isin(ids, torch.tensor(tokens, device=ids.device))
    found = ids == tokens[0]
    for token in tokens[1:]:
        found = found | (ids == token)
    return found


def _for_batch(tensor, batch, name):
    """One row a sequence: beams and several samples of a sequence share its row."""
    if tensor.shape[0] == batch:
        return tensor
    if batch % tensor.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, expected {batch}, one a sequence, or a divisor of it")
    return tensor.repeat_interleave(batch // tensor.shape[0], 0)


def _as_tensor(name, value):
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {value!r:.60}, expected a tensor, or what torch.as_tensor takes") from None


def check_lengths(lengths):
    """`handle.prompt`'s argument: None, an int, or a long tensor."""
    if lengths is None or (isinstance(lengths, int) and not isinstance(lengths, bool) and lengths > 0):
        return lengths
    tensor = _as_tensor("lengths", lengths)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype is torch.bool or bool((tensor < 1).any()):
        raise ValueError(f"lengths is {lengths!r}, expected a whole number from 1 on, or one for each sequence")
    return tensor.long()


def check_mask(mask):
    """`handle.mask`'s argument: None, or an fp32 tensor."""
    if mask is None:
        return None
    tensor = _as_tensor("mask", mask)
    if tensor.dim() != 2 or tensor.is_complex() or not tensor.shape[1]:
        raise ValueError(
            f"mask has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected (sequences, columns), bool or real"
        )
    if not tensor.isfinite().all():
        raise ValueError("mask holds values that are NaN or infinite")
    return tensor.detach().float()


# --- putting it on a model ----------------------------------------------------------------------------------------------


class Planned:
    """What a module swapped for PLANNED reads: its stack, and the Root to look at, if it owns layers with edits; the model's
    Rows if it generates."""

    def __init__(self, stack=None, rows=None, root=None):
        self.stack, self.rows, self.root = stack, rows, root


def install(model, stacks, rows, owners, root):
    """Swap the owners of layers with edits, and modules that generate, where `rows` or an owner's assignments need to know;
    the [module] to give to `uninstall`."""
    generating = [m for m in model.modules() if hasattr(type(m), "prepare_inputs_for_generation")]
    states = {id(m): (m, Planned(rows=rows)) for m in generating if rows is not None or root.owned}
    for owner in owners:
        states.setdefault(id(owner), (owner, Planned()))[1].root = root
    for stack in stacks:
        states[id(stack.owner)][1].stack = stack
    done = []
    for module, state in states.values():
        if not swappable(module):
            if state.stack is None and state.rows is None:
                continue  # its `generate` is not seen: a sequence is one row; what is replaced in it is seen by `report`
            uninstall(done)
            raise ValueError(
                f"positions need {type(module).__name__}.forward, which was replaced on the instance; put that back, or "
                "use positions='all'"
            )
        swap(module, PLANNED, state)
        done.append(module)
    return done


def uninstall(modules):
    for module in modules:
        swap_back(module)


def owner_of(model, layer):
    """The innermost module around a layer whose forward is given the tokens; else the one that holds the layers."""
    path = next(path for path, module in model.named_modules() if module is layer)
    around, module = [model], model
    for part in path.split(".")[:-1] if path else ():
        module = module._modules[part]
        if not isinstance(module, torch.nn.ModuleList):
            around.append(module)
    knowing = [m for m in around if set(_INPUTS) & set(inspect.signature(base_of(m).forward).parameters)]
    return (knowing or around)[-1]
