"""Dose: the strength at which an edit moves the next-token distribution by a stated amount."""

import inspect
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .batches import Windows
from .edits import Edit
from .evaluating import evaluating
from .patching import Handle, patch

LARGEST = 1024.0


@dataclass(frozen=True)
class Dose:
    """strength: for `handle.strength`. kl: the mean KL reached, in nats. prompts: over how many. forwards: of them all."""

    strength: float
    kl: float
    prompts: int
    forwards: int


def calibrate(
    model, edit, prompts, *, target_kl, tokenizer=None, tolerance=0.01, largest=LARGEST, batch_size=16, max_length=None
):
    """The strength at which the mean KL(p without the edit ‖ p with it) of the token behind each prompt is `target_kl`.

    Found by doubling and bisection on `handle.strength`, so nothing is traced or captured again. Where the KL is not
    monotone in the strength, what is found is one strength of several; it starts from small ones.

    Args:
        edit: a Handle on the model, left at the strength found; or an Edit, or a list of them, patched for the while.
        prompts: texts (with tokenizer=), lists of token ids, or ready batches.
        target_kl: nats. tolerance: how far off, as a share of it, the KL may be.
        largest: the strength beyond which it is not looked for.

    Returns:
        Dose. Its strength is a factor on the edits' own strengths.

    Raises:
        ValueError: the KL stays below the target up to `largest`, or is not finite on the way there, or jumps past it;
        the handle has its old strength then.
        TypeError, ValueError: what is no edit, an empty set of prompts, numbers out of range.
    """
    for name, value in (("target_kl", target_kl), ("tolerance", tolerance), ("largest", largest)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}, expected a number above 0")
    batches = _batches(model, prompts, tokenizer, batch_size, max_length)
    if isinstance(edit, Handle):
        if edit.model is not model:
            raise ValueError("the handle is on another model than the one given")
        return _found(edit, _Meter(edit, batches), target_kl, tolerance, largest)
    if not isinstance(edit, (Edit, list, tuple)):
        raise TypeError(f"edit is {type(edit).__name__}, expected a Handle, an Edit or a list of them")
    with patch(model, edit) as handle:
        return _found(handle, _Meter(handle, batches), target_kl, tolerance, largest)


def _found(handle, meter, target, tolerance, largest):
    before = handle.strength
    try:
        return _search(meter, target, tolerance, largest)
    except BaseException:
        handle.strength = before
        raise


def _search(meter, target, tolerance, largest):
    low, high, kl = 0.0, min(1.0, largest), None
    tried = [(0.0, 0.0)]
    while (kl := meter(high)) < target:
        tried.append((high, kl))
        if high >= largest:
            most = max(tried, key=lambda pair: pair[1])
            raise ValueError(
                f"a mean KL of {target:g} is not reached: up to strength {largest:g} it is at most {most[1]:.3g}, at "
                f"{most[0]:g}. Ask for less, give largest=, edit more layers, or see that the edit's positions are among "
                "the prompts' tokens"
            )
        low, high = high, min(2 * high, largest)
    strength = high
    while abs(kl - target) > tolerance * target:
        strength = (low + high) / 2
        if strength in (low, high):
            raise ValueError(f"the KL jumps past {target:g} at strength {strength:g}; allow more with tolerance=")
        kl = meter(strength)
        low, high = (strength, high) if kl < target else (low, strength)
    return Dose(strength, kl, meter.prompts, meter.forwards)


class _Meter:
    """The mean KL at a strength, against the model at strength 0."""

    def __init__(self, handle, batches):
        self.handle, self.batches, self.forwards = handle, batches, 0
        self.prompts = sum(len(tokens) for _, tokens in batches)
        accepted = inspect.signature(handle.model.forward).parameters
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        if "use_cache" in accepted:
            self.last["use_cache"] = False
        before = handle.strength
        handle.strength = 0.0
        try:
            self.base = [self._distribution(*batch) for batch in batches]
        finally:
            handle.strength = before

    def __call__(self, strength):
        self.handle.strength = strength
        total = 0.0
        for batch, base in zip(self.batches, self.base, strict=True):
            other = self._distribution(*batch)
            terms = torch.where(base > -math.inf, base.exp() * (base - other), 0.0)
            total += terms.sum().item()
        kl = total / self.prompts
        if not math.isfinite(kl):
            raise ValueError(f"at strength {strength:g} the mean KL is {kl}: the model's logits overflow before the target")
        return kl

    @torch.no_grad()
    def _distribution(self, inputs, tokens):
        """(prompts, vocabulary) float64 log-probabilities of the token behind each prompt."""
        keep = self.last if bool(tokens[:, -1].all()) else {k: v for k, v in self.last.items() if k == "use_cache"}
        with evaluating(self.handle.model) as model:
            logits = model(**inputs, **keep).logits
        self.forwards += 1
        if logits.shape[1] > 1:
            column = torch.where(tokens, torch.arange(tokens.shape[1]), -1).amax(1).to(logits.device)
            logits = logits[torch.arange(len(logits), device=logits.device), column][:, None]
        return logits[:, 0].double().log_softmax(-1)


def _batches(model, prompts, tokenizer, batch_size, max_length):
    """[(inputs, tokens)]: prompts of one length to a batch, so that the last column alone makes logits."""
    prompts = prompts if isinstance(prompts, str) else list(prompts)
    windows = Windows(tokenizer, prompts, batch_size=1, max_length=max_length)
    singles = [batch for window in windows for batch in window]
    if not singles:
        raise ValueError("prompts is empty: there is nothing to measure on")
    device = next(model.parameters()).device
    ready = isinstance(prompts[0], Mapping)  # those may hold inputs that do not go together
    batches = []
    for _, alike in itertools.groupby(sorted(singles, key=_columns), key=_columns):
        alike = list(alike)
        size = 1 if ready else batch_size
        for at in range(0, len(alike), size):
            some = alike[at : at + size]
            inputs = dict(some[0].inputs)
            if len(some) > 1:
                inputs = {name: torch.cat([batch.inputs[name] for batch in some]) for name in inputs}
            inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            batches.append((inputs, torch.cat([batch.tokens.cpu() for batch in some])))
    return batches


def _columns(batch):
    return batch.tokens.shape[1]
