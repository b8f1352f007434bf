"""`fastedit.verify`: a model, its edits and the ways it is run, against a slow reference.

    print(fastedit.verify(model, fastedit.Steer(direction)))

The reference (reference.py) is plain hooks on whole sequences, one request at a time, without a cache. Each mode
(modes.py) runs the model as people run it. If the model without edits differs in a mode too, that difference is not the
edits'. Imports `patching` and below. Read `reference.py` first, then `modes.py`.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..arguments import check_whole
from ..edits.kinds import Edit
from ..families import find_layers
from ..hints import Folder
from ..patching.edit_folder import load
from ..patching.eval_mode import check_data, evaluating
from ..patching.handle import patch
from ..patching.model_edits import root_of
from . import modes as _modes
from .inputs import as_requests, made
from .outcome import Outcome, Row
from .reference import Reference

TOLERANCE = 1e-4  # of the largest logit, in float32: fused products in another order measured 1e-6 to 2e-5 on tiny models
_SHARE = 4  # how much larger than the model's own difference the edited one may be
_EFFECT = 20  # and how much larger than what is allowed what the edits do should be


def verify(
    model: nn.Module, edits: Edit | Sequence[Edit] | Folder, inputs: Sequence[Any] | None = None, *,
    modes: Sequence[str] | None = None, new_tokens: int = 4, backend: str = "inductor", seed: int = 0,
) -> Outcome:  # fmt: skip
    """Run a model with edits in several modes and compare each with the slow reference.

    Args:
        model: an nn.Module that `fastedit.patch` takes, not patched. It comes back bit for bit.
        edits: an Edit, a list of them, or a folder that `handle.save` wrote. Small random numbers replace an edit that
            changes nothing yet (a fresh RED).
        inputs: requests: token ids (a list of 1-D tensors or lists), or a list of dictionaries of arguments for the
            model, each a batch of one. None: two random ones by the model's config.
        modes: names among `fastedit.verifying.modes.MODES`. None for all that the model has.
        new_tokens: how many tokens are generated.
        backend: of torch.compile.
        seed: of what is random here.

    Returns:
        An Outcome: print it. `ok` is False if something is wrong.

    Raises:
        ValueError, TypeError: inputs or modes that make no sense; a patched model; a model that runs in no mode; edits that
            change nothing at all.
    """
    if root_of(model) is not None:
        raise ValueError("the model is patched: remove its handles, verify puts the edits on and takes them off itself")
    check_data(model, "to verify")
    check_whole("new_tokens", new_tokens)
    check_whole("seed", seed, least=0)
    wanted = _modes.named(modes, model)
    requests = made(model, seed) if inputs is None else as_requests(inputs, model)
    settings = _modes.Settings(new_tokens, backend, seed)
    with evaluating(model), _as_it_was(model), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        plain = {name: _modes.attempt(name, model, requests, settings) for name in wanted}
        try:
            handle = load(model, edits) if isinstance(edits, (str, os.PathLike)) else patch(model, edits)
        except (ValueError, TypeError) as error:
            return Outcome(model, [Row("patch", "refused", note=str(error))])
        try:
            _stir(handle, seed)
            slow, bare = Reference(handle), Reference(None)
            rows = [_layers_row(model, handle)]
            told = replace(settings, handle=handle)
            edited = {name: _modes.attempt(name, model, requests, told) for name in wanted}
        finally:
            handle.remove()
            if "compile" in wanted:
                torch.compiler.reset()
        rows += [_compare(name, model, plain[name], edited[name], slow, bare) for name in wanted]
    if rows[0].verdict == "right" and all(row.verdict == "left out" for row in rows[1:]):
        raise ValueError(f"no mode could be compared: {rows[1].mode}: {rows[1].note}")
    if not any(row.effect for row in rows) and not any(row.verdict in ("refused", "wrong") for row in rows):
        raise ValueError("the edits changed nothing in any mode that the model has: there is nothing to verify")
    return Outcome(model, rows)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextlib.contextmanager
def _as_it_was(model):
    """Afterwards no module has a new attribute or hook. Switching checkpointing on leaves some."""
    held = [(module, dict(module.__dict__), {name: set(getattr(module, name)) for name in _HOOKS}) for module in model.modules()]
    try:
        yield
    finally:
        for module, before, hooks in held:
            for name, keys in hooks.items():
                for key in set(getattr(module, name)) - keys:
                    del getattr(module, name)[key]
            for name in [name for name in module.__dict__ if name not in before]:
                del module.__dict__[name]
            module.__dict__.update(before)


def _stir(handle, seed):
    """Random numbers where an edit changes nothing yet, so that the comparison is of an edit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for edit, _, masters in handle._each():
            form = masters.form()
            rows = torch.randn(3, form.width, generator=generator).to(masters.dial.device)
            if masters.is_probe or not torch.allclose(form(rows), rows, atol=1e-5):
                continue
            for name, tensor in masters.masters().items():
                if name != edit.constrained:
                    tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator).to(tensor.device))


def _layers_row(model, handle):
    """Check that edits of every layer are at as many layers as the config names."""
    every = [len(chosen) for edit, chosen in zip(handle.edits, handle._members, strict=True)
             if edit.layers is None and edit.site not in ("embed", "final")]  # fmt: skip
    found = find_layers(model)
    stacks = {layer.name.partition(".")[0] for layer in found}
    config = getattr(model, "config", None)
    try:
        text = None if config is None or len(stacks) > 1 else config.get_text_config()
        said = {n for n in (getattr(text, name, None) for name in ("num_hidden_layers", "num_layers")) if n is not None}
    except Exception:  # a config whose layers differ refuses to name one number for all of them
        said = set()
    runs = sum(len(handle._root.shapes.get(layer.index, ())) or 1 for layer in found)  # shared weights run several times
    if any(n != len(found) for n in every) or (every and said and not said & {len(found), runs}):
        return Row("layers", "wrong", note=f"edits of every layer are at {every} of {len(found)}, the config says {sorted(said)}")
    return Row("layers", "right", note=f"{len(found)} found")


def _compare(name, model, plain, edited, slow, bare):
    """The Row of one mode."""
    if isinstance(plain, Exception):
        return Row(name, "left out", note=f"the model itself cannot: {type(plain).__name__}: {plain}")
    if isinstance(edited, Exception):
        ours = _modes.raised_by_us(edited)
        return Row(name, "refused" if ours else "wrong", note=f"{type(edited).__name__}: {edited}")
    try:
        own = max(said.difference(bare, model)[0] for said in plain)
        found = [said.difference(slow, model, bare) for said in edited]
    except (ValueError, RuntimeError, TypeError) as error:
        return Row(name, "left out", note=f"the reference cannot: {type(error).__name__}: {error}")
    difference, effect, size = (max(each) for each in zip(*found, strict=True))
    eps = torch.finfo(slow.dtype(model)).eps
    tolerance = max(TOLERANCE, 8 * eps) * size
    if not own <= 10 * tolerance:
        return Row(name, "left out", own, tolerance, effect, "the model without edits says something else in this mode")
    allowed = max(tolerance, _SHARE * own)
    note = "" if effect > _EFFECT * allowed else "the edits change nothing here" if not effect else "small effect"
    return Row(name, "right" if difference <= allowed else "wrong", difference, allowed, effect, note)
