"""The normal form of a linear representation edit, as plain tensors: build, fold, merge (docs/design.md, 1 to 3).

    h' = scale ⊙ h + bias + (h @ readᵀ + offset) @ write

`Form` holds one edit. `None` stands for scale 1, bias 0, offset 0 and no low-rank part. Works in any floating dtype
(tests prove its properties in float64) and is differentiable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Form:
    """An edit in normal form, on hidden states of one width.

    scale, bias: (width,). read, write: (rank, width), both or neither. offset: (rank,).
    """

    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    read: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    write: torch.Tensor | None = None

    def __post_init__(self):
        width = self.width
        for name in ("scale", "bias"):
            _check_shape(name, getattr(self, name), (width,))
        if (self.read is None) != (self.write is None):
            missing, given = ("read", "write") if self.read is None else ("write", "read")
            raise ValueError(f"{given} is given without {missing}: a low-rank edit needs both")
        if self.read is None and self.offset is not None:
            raise ValueError("offset is given without read and write: it is added to the projection on read")
        if self.read is not None:
            if self.read.dim() != 2 or self.read.shape[0] == 0:
                raise ValueError(f"read has shape {tuple(self.read.shape)}, expected (rank, width) with rank ≥ 1")
            _check_shape("write", self.write, (self.rank, width))
            _check_shape("offset", self.offset, (self.rank,))

    @property
    def width(self) -> int | None:
        """Width of the hidden states, or None for the empty form, which changes nothing."""
        return next((getattr(self, f.name).shape[-1] for f in fields(self) if getattr(self, f.name) is not None), None)

    @property
    def rank(self) -> int:
        """Of the low-rank part, 0 for none."""
        return 0 if self.read is None else self.read.shape[0]

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """(scale, bias, read, offset, write), as the ops take them."""
        return self.scale, self.bias, self.read, self.offset, self.write

    def numel(self) -> int:
        """How many numbers its tensors hold."""
        return sum(t.numel() for t in self.tensors() if t is not None)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the form by its definition, in hidden's own dtype: hidden (…, width). For proofs, not for speed."""
        out = hidden if self.scale is None else self.scale * hidden
        out = out if self.bias is None else out + self.bias
        if self.read is None:
            return out
        z = hidden @ self.read.T
        z = z if self.offset is None else z + self.offset
        return out + z @ self.write


def _check_shape(name, tensor, shape):
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def at_strength(form: Form, strength: float) -> Form:
    """The form at a static strength c: 1 + c(scale − 1), c·bias, c·write. Strength 1 gives the form itself."""
    if isinstance(strength, (int, float)) and strength == 1:
        return form
    return Form(
        None if form.scale is None else 1 + strength * (form.scale - 1),
        None if form.bias is None else strength * form.bias,
        form.read,
        form.offset,
        None if form.write is None else strength * form.write,
    )


def fold(first: Form, second: Form) -> Form:
    """One form that equals `second` applied after `first`. Its rank is the sum of their ranks.

        scale = s₂s₁                      bias = s₂b₁ + b₂
        read = [read₁ ; read₂⊙s₁ + (read₂ write₁ᵀ) read₁]
        offset = [o₁ ; o₂ + read₂·b₁ + (read₂ write₁ᵀ) o₁]
        write = [write₁⊙s₂ ; write₂]

    Exact in real numbers, for neighbors with the same positions and coefficients. Apply strengths first
    (`at_strength`): a folded form at strength c is not its parts at strength c.
    """
    if first.width is None or second.width is None:
        return second if first.width is None else first
    if first.width != second.width:
        raise ValueError(f"cannot fold edits of widths {first.width} and {second.width}: they act on different states")
    s1, b1, s2 = first.scale, first.bias, second.scale
    scale = s2 if s1 is None else _scaled(s1, s2)
    bias = _total(_scaled(b1, s2), second.bias)
    if first.read is None and second.read is None:
        return Form(scale, bias)
    reads, offsets, writes = [], [], []
    if first.read is not None:
        reads.append(first.read)
        offsets.append(first.offset)
        writes.append(_scaled(first.write, s2))
    if second.read is not None:
        read, offset = _scaled(second.read, s1), second.offset
        if b1 is not None:
            offset = _total(offset, second.read @ b1)
        if first.read is not None:
            mixed = second.read @ first.write.T
            read = read + mixed @ first.read
            if first.offset is not None:
                offset = _total(offset, mixed @ first.offset)
        reads.append(read)
        offsets.append(offset)
        writes.append(second.write)
    return Form(scale, bias, torch.cat(reads), _stack_offsets(offsets, reads), torch.cat(writes))


def fold_all(forms: Iterable[Form]) -> Form:
    """One form for a stack of forms, applied in order. An empty stack gives the empty form."""
    folded = Form()
    for form in forms:
        folded = fold(folded, form)
    return folded


def merge(
    form: Form, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight', bias') of the linear map h = x @ weightᵀ + bias with the form after it.

        W' = diag(s) W + writeᵀ (read W)       m' = s⊙m + b + (m @ readᵀ + offset) @ write

    weight is (width, in_features), bias (width,) or None. bias' is None only if it would be zero throughout. GPT-2's
    Conv1D stores the transpose: pass `weight.T`, and transpose the result.
    """
    if form.width is not None and weight.shape[0] != form.width:
        raise ValueError(f"the edit is {form.width} wide, but the linear map has {weight.shape[0]} outputs")
    merged = weight if form.scale is None else form.scale[:, None] * weight
    added = form.bias if bias is None else _total(_scaled(bias, form.scale), form.bias)
    if form.read is not None:
        merged = merged + form.write.T @ (form.read @ weight)
        z = form.offset if bias is None else _total(form.read @ bias, form.offset)
        if z is not None:
            added = _total(added, z @ form.write)
    return merged, added


def merge_input(
    form: Form, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight', bias') of the linear map x @ weightᵀ + bias with the form before it, on x.

        W' = W diag(s) + (W writeᵀ) read       m' = m + W (b + writeᵀ offset)

    weight is (out_features, width), bias (out_features,) or None. bias' is None only if it would be zero throughout.
    """
    if form.width is not None and weight.shape[1] != form.width:
        raise ValueError(f"the edit is {form.width} wide, but the linear map has {weight.shape[1]} inputs")
    merged = weight if form.scale is None else weight * form.scale
    added = form.bias
    if form.read is not None:
        merged = merged + (weight @ form.write.T) @ form.read
        added = _total(added, None if form.offset is None else form.offset @ form.write)
    return merged, _total(bias, None if added is None else weight @ added)


def _scaled(tensor, scale):
    """tensor ⊙ scale. A tensor None (0) stays None; a scale None is 1."""
    return tensor if tensor is None or scale is None else tensor * scale


def _total(a, b):
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _stack_offsets(offsets, reads):
    if all(o is None for o in offsets):
        return None
    return torch.cat([r.new_zeros(r.shape[0]) if o is None else o for o, r in zip(offsets, reads, strict=True)])
