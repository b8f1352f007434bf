"""What gates measured in one forward, and what they decided on a prompt for the forwards after it.

A decision is one number per sequence. It belongs to the call of `generate` in which it was made. Outside of one, it
belongs to the cache that the forward filled. `torch.compile` cannot tell caches apart: there the last decision holds,
one cache at a time. Decisions are in tensors that do not move, so that a captured graph reads the next prompt's too.
"""

import weakref

import torch


class Decisions:
    """Decisions of one stack of layers by cache, for forwards by hand: {cache: {key of the sensor: (sequences,)}}."""

    def __init__(self):
        self.by_cache = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return Decisions, ()

    def remember(self, plan, output):
        """After a forward by hand: its decision belongs to the cache that it filled."""
        cache = plan.cache if plan.cache is not None else _cache_of(output)
        if cache is not None and (plan.packing is None or not plan.packing.several()):
            held = self.by_cache.setdefault(cache, {})
            for key, value in plan.decided.items():
                held[key] = _into(held.get(key), value)


def _keep(sensor, value, generation=None):
    """Keep the sensor's last decision. While tracing, by assignment alone: a look would guard on what was there.

    A call of `generate` has a tensor of its own while another thread's call still reads the kept one.
    """
    if torch.compiler.is_compiling():
        sensor.kept = value.detach()
        return sensor.kept
    other = None if sensor.keeper is None else sensor.keeper()
    if other is not None and other is not generation and not other.over:
        return value if generation is None else _into(None, value)
    sensor.keeper = None if generation is None else weakref.ref(generation)
    sensor.kept = _into(sensor.kept, value)
    return sensor.kept


def _into(held, value):
    """The tensor that holds a decision: the one before, if it fits."""
    value = value.detach()
    if held is None or held.shape != value.shape or held.dtype != value.dtype or held.device != value.device:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            held = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return held if held is value else held.copy_(value)


def _cache_of(output):
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((v for v in values if callable(getattr(v, "get_seq_length", None))), None)


def decide(plan, sensor, fresh):
    """(sequences,): the decision of a sensor's gate on the prompt. fresh() computes it from this forward.

    Raises:
        RuntimeError: this forward neither holds the end of the prompt nor follows one that did.
    """
    if plan.generation is not None:
        return _in_generate(plan, sensor, fresh)
    if isinstance(plan.offset, torch.Tensor) or plan.offset == 0:
        plan.by_hand("a gate that decides once on the prompt")
    if isinstance(plan.offset, torch.Tensor):
        return _on_static_cache(plan, sensor, fresh)
    if plan.offset == 0:  # also when a checkpoint computes this forward again: then with the gradient
        value = plan.decided[sensor.key] = fresh()
        _keep(sensor, value)
        return value
    held = _held(plan, sensor)
    if held is None:
        raise _undecided()
    return held


def _held(plan, sensor):
    """The decision for the cache of this forward, or None."""
    if torch.compiler.is_compiling():
        return sensor.kept
    return plan.decisions.by_cache.get(plan.cache, {}).get(sensor.key)


def _in_generate(plan, sensor, fresh):
    held = plan.generation.decided
    if sensor.key in held:
        return held[sensor.key]
    missing = plan.generation.columns - (0 if plan.shape is None else plan.shape[1])
    offset = _number(plan.offset) if missing > 0 else 0
    if offset >= plan.generation.columns:
        raise _undecided()
    if missing > 0 and offset < missing:
        raise RuntimeError(
            "a gate decides on the prompt's last token or its mean, but this forward ends before the prompt does "
            "(prefill_chunk_size?): its first tokens would be edited before the decision; prefill in one forward"
        )
    if offset and sensor.decide == "prompt mean":
        raise RuntimeError(
            f"a gate decides on the mean of the prompt, whose first {offset} tokens are in the cache that generate was "
            "given: generate without that cache, or decide='prompt', on the last token"
        )
    value = fresh()
    held[sensor.key] = _keep(sensor, value, plan.generation)
    return value


def _on_static_cache(plan, sensor, fresh):
    """For a cache whose length is a tensor: the device chooses between a new decision and the kept one."""
    value, held = fresh(), _held(plan, sensor)
    if held is not None:
        value = torch.where(plan.offset == 0, value, held)
    elif not torch.compiler.is_compiling() and _number(plan.offset):
        raise _undecided()
    plan.decided[sensor.key] = value
    _keep(sensor, value)
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
