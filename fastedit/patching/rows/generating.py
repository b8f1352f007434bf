"""What the forwards of a model belong to: the call of `generate` that runs them, and what its handles were told.

`generate` prepares each of its forwards by `prepare_inputs_for_generation`, which is given the whole sequence so far.
This tells which of its columns a forward holds, with a cache or without one. The result is compared with what the cache
says.

Calls belong to the thread that makes them. Other threads have their own forwards and their own calls of `generate`.
What a handle was told belongs to the thread and the asyncio task that said it.
"""

import asyncio
import sys
import threading
import weakref

import torch

from ...families.own_class import base_of
from .cached import cache_in, length_of


class Generation:
    """One call of `generate`: the prompt's columns and its mask (sequences, columns), None if all are real.

    columns: None behind an encoder before the first forward. decided: the gates' decisions on the prompt,
    {gate: (sequences,)}. behind: whether all of the prompt has run. lost: why it is not known which columns a forward
    holds.
    """

    def __init__(self, module, args, kwargs):
        self.module, self.lost, self.over = module, None, False
        self.behind_encoder = bool(getattr(module.config, "is_encoder_decoder", False))
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None) or module.generation_config
        self.beams, self.decided = _asked("num_beams", kwargs, config) or 1, {}
        self.chunked = bool(_asked("prefill_chunk_size", kwargs, config))
        self.assisted = any(v is not None for v in (kwargs.get("assistant_model"), *args[6:7])) or any(
            _asked(name, kwargs, config) for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
        )
        self.columns, self.ids, self.mask = self._given(module, args, kwargs)
        self.number, self.width, self.done, self.behind, self.seen = 0, 0, 0, False, {}

    def _given(self, module, args, kwargs):
        """(columns of the prompt, how many of them are ids, mask)"""
        if self.behind_encoder:
            own = getattr(base_of(module).generate, "__qualname__", "") != "GenerationMixin.generate"
            if self.assisted and (own or kwargs.get("decoder_input_ids") is not None):
                self.lost = (
                    "an assistant's candidates run with the first decoder tokens, whose number `generate` does not say"
                )
            return None, None, None  # the first forward says
        embeds = kwargs.get("inputs_embeds")
        ids = (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        ids = next((value for value in ids if isinstance(value, torch.Tensor)), None)
        given = embeds if embeds is not None else ids
        if given is None:
            return 1, 1, None  # from the beginning-of-sequence token
        mask = kwargs.get("attention_mask")
        if mask is None and given.dim() == 2:
            mask = _mask_of_padding(module, given, kwargs)
        columns = given.shape[1]
        if isinstance(mask, torch.Tensor) and mask.shape[1] > columns:
            columns = mask.shape[1]  # the ids are only what is new on a cache
        return columns, 0 if ids is None else ids.shape[1], mask

    def prepare(self, input_ids, given):
        """`generate` is about to run a forward on all of `input_ids` so far, or on a piece of the prompt."""
        width = input_ids.shape[1]
        if not self.number:
            self._begin(width, given)
        elif given.get("is_first_iteration") and self.done and not self.assisted and length_of(cache_in(given)[0]) == 0:
            self.columns, self.ids, self.mask, self.done, self.decided = (
                None,
                None,
                None,
                0,
                {},
            )  # another run in one call
            self._begin(width, given)
        self.number, self.width = self.number + 1, width
        self.behind = self.done >= self.columns

    def _begin(self, width, given):
        if self.columns is None:
            self.columns = self.ids = 1 if self.assisted else width
            mask = given.get("decoder_attention_mask" if self.behind_encoder else "attention_mask")
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                self.mask = mask[:, : self.columns]
        elif width != self.ids and not (self.assisted or self.chunked) and given.get("inputs_embeds") is None:
            if self.mask is not None:
                self.lost = f"it was given {self.ids} columns of ids, and runs {width}"
            self.columns = self.ids = width

    def locate(self, stack, tokens, length):
        """How many columns come before a forward of `tokens` columns, on a cache of `length` (None: it does not say).

        Raises:
            Unknown: the sources do not say, or contradict each other.
        """
        if self.lost is not None:
            raise Unknown(self.lost)
        if self.seen.get(stack, 0) == self.number:
            raise Unknown(
                "`generate` did not prepare this forward, so something else runs it inside the call (a logits processor, such "
                "as guidance_scale's, or a language detection)"
            )
        self.seen[stack] = self.number
        known = int(length) if isinstance(length, torch.Tensor) and not self.done else length
        if self.width < self.ids:  # a piece of the prompt
            offset = self.done if isinstance(known, (torch.Tensor, type(None))) else known
        else:
            offset = self.columns + self.width - self.ids - tokens
        if not self.done and offset == 0 and known != 0:
            if known is None:
                raise Unknown("its cache is filled and does not say how far")
            self.columns, offset = self.columns + known, known  # the ids are only what is new
            if self.mask is not None:
                raise Unknown(
                    f"attention_mask has {self.mask.shape[1]} columns, expected {self.columns}: one for each token in the "
                    "cache and each that is new"
                )
        elif isinstance(known, int) and known != offset:
            raise Unknown(
                f"`generate` has come to column {offset} with this forward of {tokens}, but its cache holds {known}"
            )
        if offset < 0:
            raise Unknown(f"`generate` has {self.columns + self.width - self.ids} columns, and this forward {tokens}")
        self.done = offset + tokens
        return offset


class Unknown(Exception):
    """Why it is not known which columns a forward holds."""


def _mask_of_padding(module, ids, kwargs):
    """The mask as `generate` infers it: the padding token is padding, unless it also ends sequences."""
    config = kwargs.get("generation_config") or module.generation_config
    pad, eos = (kwargs.get(f"{name}_token_id", getattr(config, f"{name}_token_id", None)) for name in ("pad", "eos"))
    if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else (eos,)):
        return None
    mask = ids != pad
    return None if bool(mask.all()) else mask


def _asked(name, kwargs, config):
    """A setting of `generate`."""
    return kwargs.get(name) or getattr(config, name, None)


class Told:
    """What a handle was told, and by whom."""

    def __init__(self, value):
        task = _task()
        self.value, self.thread = value, weakref.ref(threading.current_thread())
        self.task = None if task is None else weakref.ref(task)

    def stands(self):
        """Whether its thread still exists."""
        thread = self.thread()
        return thread is not None and thread.is_alive()

    def loose(self):
        """Whether no task that is still running owns it."""
        task = None if self.task is None else self.task()
        return task is None or task.done()


def _task():
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


class Rows:
    """What a model's stacks share: the present calls of `generate`, and what handles were told.

    lengths: of the prompts, in real tokens. mask: by column. Both belong to the caller, which may be Elsewhere.
    """

    def __init__(self):
        self.running = {}  # by thread: [Generation], the innermost last
        self.told = {"lengths": [], "mask": []}
        self.calls, self.answers = {}, False  # {name: what the whole model was given}, by thread; whether it answers prompts
        self.traced = Seen()

    def __getstate__(self):
        return {"lengths": _only(self.lengths), "mask": _only(self.mask), "answers": self.answers}

    def __setstate__(self, state):
        self.__init__()
        self.lengths, self.mask, self.answers = state["lengths"], state["mask"], state["answers"]

    # --- what handles were told -------------------------------------------------------------------------------------------

    @property
    def lengths(self):
        return self._of("lengths")

    @lengths.setter
    def lengths(self, value):
        self._tell("lengths", value)

    @property
    def mask(self):
        return self._of("mask")

    @mask.setter
    def mask(self, value):
        self._tell("mask", value)

    def _tell(self, name, value):
        task, thread = _task(), threading.current_thread()

        def mine(told):
            return told.thread() is thread and (told.loose() or told.task() is task)

        kept = [told for told in self.told[name] if told.stands() and not mine(told)]
        self.told[name] = kept if value is None else [*kept, Told(value)]
        self._trace()

    def _of(self, name):
        told = self.told[name]
        if not told:
            return None
        task, thread = _task(), threading.current_thread()
        here = [one for one in told if one.thread() is thread]
        own = [one for one in here if task is not None and one.task is not None and one.task() is task]
        for one in (*own[::-1], *here[::-1]):
            if one in own or one.loose():
                return one.value
        return Elsewhere(name) if any(one.stands() for one in told) else None

    def _trace(self):
        """What a compiled forward sees, which knows no threads."""
        seen = {name: None if not told else Elsewhere(name) for name, told in self.told.items()}
        seen |= {name: told[0].value for name, told in self.told.items() if len(told) == 1}
        running = [calls[-1] for calls in list(self.running.values()) if calls]
        generation = None if not running else running[0] if len(running) == 1 else Elsewhere("generation")
        self.traced = Seen(generation, seen["lengths"], seen["mask"])

    def seen(self):
        """The Seen of this caller."""
        if torch.compiler.is_compiling():
            return self.traced
        calls = self.running.get(threading.get_ident())
        generation = calls[-1] if calls else None
        if not self.told["lengths"] and not self.told["mask"]:
            return _NOTHING if generation is None else Seen(generation)
        return Seen(generation, self.lengths, self.mask)

    # --- what the whole model was given ---------------------------------------------------------------------------------

    def called(self, given, function, /, *args, **kwargs):
        """function(...), whose forwards in this thread know what the model around them was given: {"labels",
        "attention_mask": (sequences, columns)}."""
        key = _thread()
        before = self.calls.get(key)
        self.calls[key] = given if before is None else before | given
        try:
            return function(*args, **kwargs)
        finally:
            self.calls.pop(key)
            if before is not None:
                self.calls[key] = before

    def labelled(self, labels, function, /, *args, **kwargs):
        """`called`, with labels alone."""
        return self.called({"labels": labels}, function, *args, **kwargs)

    def call_now(self):
        """What the model around this thread's forward was given; {} where that is not known."""
        return self.calls.get(_thread(), _NOT_SAID)

    # --- generate ---------------------------------------------------------------------------------------------------------

    def generate(self, own, module, args, kwargs):
        """The module's own `generate`, as `own`, noted as a call.

        Inside a call of the same module (an assistant that is the model itself) the prompt is the outer call's.
        """
        calls = self.running.setdefault(threading.get_ident(), [])
        if calls and calls[-1].module is module:
            return own(module, *args, **kwargs)
        generation = Generation(module, args, kwargs)
        calls.append(generation)
        self._trace()
        try:
            return own(module, *args, **kwargs)
        finally:
            generation.over, generation.module = True, None
            calls.pop()
            if not calls:
                del self.running[threading.get_ident()]
            self._trace()

    def prepare(self, own, module, args, kwargs):
        """The module's own prepare_inputs_for_generation, as `own`, which is noted."""
        calls = self.running.get(threading.get_ident())
        if calls:
            ids = args[0] if args else kwargs.get("input_ids")
            if isinstance(ids, torch.Tensor):
                calls[-1].prepare(ids, kwargs)
        return own(module, *args, **kwargs)

    def batches(self, own, module, args, kwargs):
        """The module's own entry to continuous batching, as `own`: refused in the caller's thread."""
        raise RuntimeError(
            f"{type(module).__name__}.{own.__name__} runs pieces of many requests in one forward, and an edit, gate, probe or "
            "tenant on this model must know the prompt of each, which it does not say: use model.generate, or vLLM "
            "(docs/serving.md), or edits at positions='all' without a gate on the prompt"
        )


_NOT_SAID = {}


def _thread():
    """Whose call: under torch.compile, which knows no threads, everyone's."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _only(value):
    return None if isinstance(value, Elsewhere) else value


class Seen:
    """What one caller's forwards belong to."""

    def __init__(self, generation=None, lengths=None, mask=None):
        self.generation, self.lengths, self.mask = generation, lengths, mask


_NOTHING = Seen()
_CALLS = {"lengths": "handle.prompt(lengths)", "mask": "handle.mask(mask)"}


class Elsewhere:
    """Something that only another thread or task has said."""

    def __init__(self, name):
        self.name = name

    def refuse(self):
        if self.name == "generation":
            return RuntimeError(
                "several threads are generating on this model, whose edits depend on positions, and a compiled forward "
                "cannot tell threads apart: generate from one thread at a time, or with the model uncompiled"
            )
        return RuntimeError(
            f"{_CALLS[self.name]} was called in another thread or task than this forward's, and belongs to that one: call it "
            "in the one that runs the forward"
        )


def around(owner):
    """The module whose `generate` runs around this call and which holds `owner`. None for none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate":
            module = frame.f_locals.get("self")
            if isinstance(module, torch.nn.Module) and any(inner is owner for inner in module.modules()):
                return module
        frame = frame.f_back
    return None


# --- what handles are told, checked ------------------------------------------------------------------------------------


def _as_tensor(name, value):
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {value!r:.60}, expected a tensor, or what torch.as_tensor takes") from None


def check_lengths(lengths):
    """`handle.prompt`'s argument: None, an int, or a long tensor."""
    if lengths is None or (isinstance(lengths, int) and not isinstance(lengths, bool) and 0 < lengths < 1 << 63):
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
