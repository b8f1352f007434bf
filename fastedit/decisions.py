"""What gates measured in one forward, and what they decided on a prompt for the forwards after it.

A decision is one number a sequence. It belongs to the call of `generate` it was taken in; outside of one, to the cache
that the forward filled. `torch.compile` cannot tell caches apart: there the last decision holds, one cache at a time.
Decisions lie in tensors that do not move, so that a captured graph reads those of the next prompt too.
"""

import weakref

import torch


class Decisions:
    """Of one stack of layers. kept: {gate: (sequences,)}, the last ones; by_cache: those of forwards by hand."""

    def __init__(self):
        self.kept, self.by_cache = {}, weakref.WeakKeyDictionary()

    def __reduce__(self):
        return Decisions, ()

    def keep(self, gate, value):
        """The tensor that holds a decision: the one before, if it fits."""
        return _hold(self.kept, gate, value)

    def remember(self, plan, output):
        """After a forward by hand: what it decided belongs to the cache that it filled."""
        if plan.decided and not torch.compiler.is_compiling():
            cache = plan.cache if plan.cache is not None else _cache_of(output)
            if cache is not None:
                held = self.by_cache.setdefault(cache, {})
                for gate, value in plan.decided.items():
                    _hold(held, gate, value)


def _hold(held, gate, value):
    value, tensor = value.detach(), held.get(gate)
    if tensor is value:
        return tensor
    if tensor is None or tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
        if torch.compiler.is_compiling():
            tensor = torch.empty_like(value)
        else:
            with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
                tensor = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        held[gate] = tensor
    tensor.copy_(value)
    return tensor


def _cache_of(output):
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((v for v in values if callable(getattr(v, "get_seq_length", None))), None)


def decide(plan, gate, fresh):
    """(sequences,): what a gate said of the prompt; fresh() computes it from this forward.

    Raises:
        RuntimeError: this forward neither holds the end of the prompt nor follows one that did.
    """
    decisions = plan.decisions
    if plan.generation is not None:
        return _in_generate(plan, decisions, gate, fresh)
    if isinstance(plan.offset, torch.Tensor):
        return _on_static_cache(plan, decisions, gate, fresh)
    if plan.offset == 0:  # also when a checkpoint computes this forward again: then with the gradient
        value = plan.decided[gate] = fresh()
        decisions.keep(gate, value)
        return value
    compiling = torch.compiler.is_compiling()
    known = decisions.kept if compiling else decisions.by_cache.get(plan.cache, {})
    if gate not in known:
        raise _undecided()
    plan.decided[gate] = known[gate]
    return known[gate]


def _in_generate(plan, decisions, gate, fresh):
    held = plan.generation.decided
    if gate in held:
        return held[gate]
    missing = plan.generation.columns - (0 if plan.shape is None else plan.shape[1])
    if missing > 0 and (_number(plan.offset) < missing):
        raise RuntimeError(
            "a gate decides on the prompt's last token or its mean, but this forward ends before the prompt does "
            "(prefill_chunk_size?): its first tokens would be edited before the decision; prefill in one forward"
        )
    value = plan.decided[gate] = fresh()
    held[gate] = decisions.keep(gate, value)
    return value


def _on_static_cache(plan, decisions, gate, fresh):
    """Whose length is a tensor: the choice between a new prompt's decision and the one kept is made on the device."""
    value = fresh()
    held = decisions.kept if torch.compiler.is_compiling() else decisions.by_cache.get(plan.cache, {})
    if gate in held:
        value = torch.where(plan.offset == 0, value, held[gate])
    elif not torch.compiler.is_compiling() and _number(plan.offset):
        raise _undecided()
    plan.decided[gate] = value
    decisions.keep(gate, value)
    return value


def _number(offset):
    if isinstance(offset, torch.Tensor) and torch.compiler.is_compiling():
        raise RuntimeError("a gate decides on the prompt: run the prompt's forward in one piece before compiling")
    return int(offset)


def _undecided():
    return RuntimeError(
        "a gate decided once on the prompt has not seen this cache's prompt: run the prompt through this patched model, "
        "on this cache, before the forwards behind it; or use decide='token'"
    )
