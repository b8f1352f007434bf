"""The reference of a preference loss: the same model at strength 0, in memory once; its log-probabilities, stored.

DPOTrainer(model=model, ref_model=Reference(handle), ...)      # TRL's, with no second model
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.edit_file import EditFileError, replace
from ..files.sealed import Damaged, open_tensors, read_regular, seal_tensors
from ..hints import Folder, Row
from ..patching.eval_mode import evaluating
from ..patching.handle import Handle, handles
from .adapters import without_adapters
from .batches import Padded, response_logps

__all__ = ["Reference", "at_strength", "at_zero", "load_reference", "model_digest", "rows_digest", "store_reference"]

_FORMAT = "fastedit reference 1"


@contextlib.contextmanager
def at_strength(handle: Handle, strength: float) -> Iterator[None]:
    """A handle at another strength for a while.

    Its dials are other tensors meanwhile, so the backward of an earlier forward is not affected. The backward of a
    forward in this context belongs in this context too.
    """
    handle._changeable()
    before = [(masters, masters._buffers["dial"], masters.strength, masters.dialled) for _, _, masters in handle._each()]
    kept = handle._strength
    try:
        for edit, _, masters in handle._each():
            masters._buffers["dial"] = masters._buffers["dial"].clone()
            masters.set_strength(strength * edit.strength)
            masters.dialled = True
        handle._strength = strength
        yield
    finally:
        for masters, dial, own, dialled in before:
            masters._buffers["dial"], masters.strength, masters.dialled = dial, own, dialled
        handle._strength = kept


@contextlib.contextmanager
def at_zero(model: nn.Module) -> Iterator[None]:
    """A model without what trains on it: trainable edits at strength 0, adapters off, eval mode, no gradients.

    Handles whose edits do not train are part of the base and stay in force.
    """
    with contextlib.ExitStack() as stack:
        for context in (torch.no_grad(), evaluating(model), without_adapters(model)):
            stack.enter_context(context)
        for handle in handles(model):
            if not handle.merged and any(masters.trainable for _, _, masters in handle._each()):
                stack.enter_context(at_strength(handle, 0.0))
        yield


class Reference(nn.Module):
    """A handle's model at strength 0 and without adapters, as a module that is called like the model but does not hold
    it.

    For TRL's `ref_model=`. By itself TRL would load the base a second time. With a peft_config it would take the model
    without the adapter but with the edit.
    """

    def __init__(self, handle: Handle) -> None:
        super().__init__()
        self.__dict__["handle"] = handle

    def __call__(self, *args, **kwargs):
        with at_zero(self.handle.model):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.handle.model(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["handle"].model, name)


@torch.no_grad()
def model_digest(model):
    """A digest of a model's weights without its edits: each tensor's name, shape, dtype and two sums in fp64."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith("fastedit.") or ".fastedit." in name:
            continue
        sums = [] if not tensor.is_floating_point() else [_sum(tensor), _sum(tensor, square=True)]
        found.update(json.dumps([name, list(tensor.shape), str(tensor.dtype), sums]).encode())
    return found.hexdigest()


def _sum(tensor, square=False, step=1 << 22):
    """In pieces, so that no fp64 copy of a whole embedding is made."""
    pieces = tensor.detach().reshape(-1).split(step)
    return float(sum((p.double().square() if square else p.double()).sum() for p in pieces))


def rows_digest(rows):
    """A digest of encoded pairs."""
    return hashlib.sha256(json.dumps([[row["chosen"], row["rejected"]] for row in rows]).encode()).hexdigest()


def store_reference(
    handle: Handle, rows: Sequence[Row], path: Folder, pad: int, *, batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The reference's log-probabilities of every pair, written to a safetensors file. Returns rows that hold them.

    If the file is there for the same weights and rows, it is read. For others it is written again.

    Args:
        handle: whose model at strength 0 is the reference. rows: encoded pairs (`training.responses.encode_pairs`).
        path: of the file. pad: the id to pad with. batch_size: pairs per forward.
        progress: called with (pairs done, of how many).
    """
    digests = {"format": _FORMAT, "model": model_digest(handle.model), "rows": rows_digest(rows)}
    path = Path(path)
    if path.is_file() and _stored(path)[0] == digests:
        return load_reference(handle, rows, path)
    collate, found = Padded(pad), torch.zeros(len(rows), 2)
    device = next(handle.model.parameters()).device
    for start in range(0, len(rows), batch_size):
        plain = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in rows[start : start + batch_size]]
        batch = {name: tensor.to(device) for name, tensor in collate(plain).items()}
        with at_zero(handle.model):
            found[start : start + batch_size] = (
                torch.stack(response_logps(handle.model, handle.model, batch)[0], 1).float().cpu()
            )
        if progress is not None:
            progress(min(start + batch_size, len(rows)), len(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, seal_tensors({"reference": found}, digests))
    return _with(rows, found)


def load_reference(handle, rows, path):
    """Rows with the log-probabilities from a file that `store_reference` wrote.

    Raises:
        EditFileError: it is damaged, or of another model or other rows.
    """
    note, found = _stored(path)
    for what, now in (("model", model_digest(handle.model)), ("rows", rows_digest(rows))):
        if note[what] != now:
            raise EditFileError(
                f"{path} holds log-probabilities of {'another model' if what == 'model' else 'other rows'} (digest "
                f"{note[what]:.12}, expected {now[:12]}): store them again with store_reference"
            )
    return _with(rows, found)


def _stored(path):
    """({"format", "model", "rows"}, the pairs' log-probabilities) in a file, checked."""
    try:
        note, tensors, _ = open_tensors(read_regular(path, 4 << 30), ("format", "model", "rows"))
        return {what: note[what] for what in ("format", "model", "rows")}, tensors["reference"]
    except (Damaged, OSError, LookupError) as error:
        raise EditFileError(f"{path} holds no stored log-probabilities: {error}") from error


def _with(rows, found):
    return [{**row, "reference": pair} for row, pair in zip(rows, found.tolist(), strict=True)]
