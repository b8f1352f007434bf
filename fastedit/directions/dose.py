"""Dose: the strength at which an edit changes the distribution of the next tokens by a stated amount."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..arguments import FP32_MAX, as_list, check_whole
from ..edits.kinds import Edit
from ..hints import Texts
from ..patching.eval_mode import evaluating
from ..patching.handle import Handle, patch
from ..texts.batches import Windows

LARGEST = 1024.0


@dataclass(frozen=True)
class Dose:
    """strength: for `handle.strength`. kl: the mean KL reached, in nats. prompts: over how many. forwards: how many
    ran.

    tokens: over how many distributions: one per prompt, or one for each token of a continuation.
    """

    strength: float
    kl: float
    prompts: int
    forwards: int
    tokens: int


def calibrate(
    model: nn.Module, edit: Handle | Edit | Sequence[Edit], prompts: Texts, *, target_kl: float, tokenizer: Any = None,
    tolerance: float = 0.01, largest: float = LARGEST, batch_size: int = 16, max_length: int | None = None,
    new_tokens: int | None = None, seed: int = 0,
) -> Dose:  # fmt: skip
    """The strength at which the mean KL(p without the edit ‖ p with it) of the token after each prompt is `target_kl`.

    With `new_tokens` the mean also covers the tokens of a continuation. The model without the edit samples one after
    each prompt (temperature 1), and both models read it. Times its length, that is an unbiased estimate of the KL
    between the two distributions of whole continuations. An edit that turns a whole continuation may hardly change its
    first token.

    The search doubles and bisects `handle.strength`, so nothing is traced or captured again. If the KL is not monotone
    in the strength, it finds one of several strengths. It starts from small ones.

    Args:
        model: a causal language model. tokenizer: for texts and messages.
        edit: a Handle on the model, which is left at the strength found. Or an Edit, or a list of them, patched
            meanwhile.
        prompts: texts or chat messages (with tokenizer=), lists of token ids, or ready batches.
        target_kl: nats. tolerance: how far off the KL may be, as a share of the target.
        largest: the strength at which the search ends.
        batch_size: prompts of one length per forward. max_length: cut texts to so many tokens.
        new_tokens: the largest length of a continuation. None for the token after the prompt alone. seed: of the
            sampling.

    Returns:
        Dose. Its strength is a factor on the edits' own strengths.

    Raises:
        ValueError: the KL stays below the target up to `largest`, or is not finite on the way there, or jumps past it.
        The handle then has its old strength.
        TypeError, ValueError: something that is not an edit, an empty set of prompts, numbers out of range.
    """
    for name, value in (("target_kl", target_kl), ("tolerance", tolerance), ("largest", largest)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= FP32_MAX:
            raise ValueError(f"{name} is {value!r:.60}, expected a finite number above 0")
    if new_tokens is not None and (isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1):
        raise ValueError(f"new_tokens is {new_tokens!r}, expected None, or a whole number from 1 on")
    batches = _batches(model, prompts, tokenizer, batch_size, max_length)
    meter = _Meter if new_tokens is None else functools.partial(_Continued, new_tokens=new_tokens, seed=seed)
    if isinstance(edit, Handle):
        if edit.model is not model:
            raise ValueError("the handle is on another model than the one given")
        return _found(edit, meter(edit, batches), target_kl, tolerance, largest)
    if not isinstance(edit, (Edit, list, tuple)):
        raise TypeError(f"edit is {type(edit).__name__}, expected a Handle, an Edit or a list of them")
    with patch(model, edit) as handle:
        return _found(handle, meter(handle, batches), target_kl, tolerance, largest)


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
    return Dose(strength, kl, meter.prompts, meter.forwards, meter.tokens)


class _Meter:
    """The mean KL at a strength, against the model at strength 0."""

    def __init__(self, handle, batches):
        self.handle, self.forwards = handle, 0
        self.prompts = self.tokens = sum(len(tokens) for _, tokens in batches)
        accepted = inspect.signature(handle.model.forward).parameters
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        if "use_cache" in accepted:
            self.last["use_cache"] = False
        before = handle.strength
        handle.strength = 0.0
        try:
            self.batches = self._prepared(batches)
            self.base = [self._distribution(*batch) for batch in self.batches]
        finally:
            handle.strength = before

    def _prepared(self, batches):
        return batches

    def __call__(self, strength):
        self.handle.strength = strength
        total = 0.0
        for batch, base in zip(self.batches, self.base, strict=True):
            other = self._distribution(*batch)
            terms = torch.where(base > -math.inf, base.exp() * (base - other), 0.0)
            total += terms.sum().item()
        kl = total / self.tokens
        if not math.isfinite(kl):
            raise ValueError(f"at strength {strength:g} the mean KL is {kl}: the model's logits overflow before the target")
        return kl

    @torch.no_grad()
    def _distribution(self, inputs, tokens):
        """(prompts, vocabulary) float64 log-probabilities of the token after each prompt."""
        keep = self.last if bool(tokens[:, -1].all()) else {k: v for k, v in self.last.items() if k == "use_cache"}
        with evaluating(self.handle.model) as model:
            logits = model(**inputs, **keep).logits
        self.forwards += 1
        if logits.shape[1] > 1:
            column = torch.where(tokens, torch.arange(tokens.shape[1]), -1).amax(1).to(logits.device)
            logits = logits[torch.arange(len(logits), device=logits.device), column][:, None]
        return logits[:, 0].double().log_softmax(-1)


class _Continued(_Meter):
    """The same over the tokens of a continuation that the model at strength 0 has sampled."""

    def __init__(self, handle, batches, *, new_tokens, seed):
        self.new_tokens, self.seed = new_tokens, seed
        super().__init__(handle, batches)

    def _prepared(self, batches):
        """[(inputs with the continuation, (sequences, columns) bool: the tokens after which distributions are
        compared)]"""
        self.lengths, made = {}, []
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for inputs, tokens in batches:
                if set(inputs) - {"input_ids", "attention_mask"}:
                    raise ValueError(f"new_tokens= continues texts, found a batch with {', '.join(inputs)}")
                made.append(self._continued(inputs, tokens))
        self.tokens = sum(int(picked.sum()) for _, picked in made)
        return made

    def _continued(self, inputs, tokens):
        model, columns = self.handle.model, tokens.shape[1]
        if not bool(tokens[:, -1].all()):
            raise ValueError("new_tokens= continues prompts that end in their batch's last column: pad on the left")
        pad = getattr(model.generation_config, "pad_token_id", None) or 0
        with evaluating(model):
            ids = model.generate(
                **inputs, max_new_tokens=self.new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                num_beams=1, pad_token_id=pad, return_dict_in_generate=False,
            )  # fmt: skip
        ends = model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else ends, device=ids.device)
        ended = torch.isin(ids[:, columns:], ends).int().cumsum(1)
        new = torch.cat([torch.ones_like(ended[:, :1]), (ended[:, :-1] == 0).int()], 1).bool()  # up to the end, with it
        given = torch.cat([inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])), new.long()], 1)
        picked = torch.zeros(ids.shape, dtype=torch.bool)
        picked[:, columns - 1 : -1] = new.cpu()  # what is read behind a column is the next one's distribution
        extended = {"input_ids": ids, "attention_mask": given}
        self.lengths[id(extended)] = tokens.sum(1)
        return extended, picked

    @torch.no_grad()
    def _distribution(self, inputs, picked):
        """(tokens picked, vocabulary) log-probabilities, in fp32 because a whole vocabulary takes room."""
        rows, kept = self.handle._root.rows, self.handle._root.rows.lengths
        self.handle.prompt(self.lengths[id(inputs)])
        first = int(picked.any(0).int().argmax())
        more = dict(self.last)
        if "logits_to_keep" in more:
            more["logits_to_keep"] = picked.shape[1] - first
        try:
            with evaluating(self.handle.model) as model:
                logits = model(**inputs, **more).logits
        finally:
            rows.lengths = kept
        self.forwards += 1
        picked = picked[:, picked.shape[1] - logits.shape[1] :]
        return logits[picked.to(logits.device)].float().log_softmax(-1)


def _batches(model, prompts, tokenizer, batch_size, max_length):
    """[(inputs, tokens)]: prompts of one length to a batch, so that the last column alone makes logits."""
    check_whole("batch_size", batch_size)
    if max_length is not None:
        check_whole("max_length", max_length)
    prompts = as_list("prompts", prompts, "a list of texts, token ids or batches")
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
