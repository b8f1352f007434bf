"""Backward of every op on the host: which streams the wanted gradients read, the launches, and the tree.

What is computed, and how it is deterministic: columns.py, projection.py, reduce.py.
"""

from typing import NamedTuple

import torch

from . import host
from .columns import columns_kernel
from .launch import PARTIAL_ROWS, cdiv, columns_launch, rank_block
from .projection import run_projection
from .reduce import reduce_partials, row_blocks, slot_blocks


class Form(NamedTuple):
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    read: torch.Tensor | None
    offset: torch.Tensor | None
    write: torch.Tensor | None
    slot: torch.Tensor | None
    coefficient: torch.Tensor | None


class Needs(NamedTuple):
    hidden: bool
    scale: bool
    bias: bool
    read: bool
    offset: bool
    write: bool
    coefficient: bool


class Sizes(NamedTuple):
    rows: int
    width: int
    rank: int
    slots: int


class Gradient(NamedTuple):
    """G: `grad`, and the norm behind the edit with its statistics and row means (norm.load_gradient)."""

    grad: torch.Tensor | None
    grad_normed: torch.Tensor | None = None
    stored: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    rstd: torch.Tensor | None = None
    along: torch.Tensor | None = None
    across: torch.Tensor | None = None

    @property
    def strides(self):
        return host.row_stride(self.grad), host.row_stride(self.grad_normed)


class NormNeeds(NamedTuple):
    """Wanted beside the edit's own gradients: d_residual in a dtype or None, d_weight, d_norm_bias."""

    residual_dtype: torch.dtype | None = None
    weight: bool = False
    norm_bias: bool = False
    kind: int = 0


def form_backward(gradient, hidden, residual, form, grad_z, z, needs, out_dtype, on_sum=False, norm=None):
    """([d_hidden, the form's six gradients], [d_residual, d_weight, d_norm_bias]); None is not wanted."""
    form, needs, norm = Form(*(host.dense(t) for t in form)), Needs(*needs), norm or NormNeeds()
    sizes = sizes_of(gradient, hidden, form, grad_z)
    z, grad_z = host.dense(z), host.dense(grad_z)
    q = back_projection(gradient, form, grad_z, sizes, needs, norm.kind)
    if not (needs.scale or needs.read or (needs.coefficient and form.scale is not None)):
        hidden = residual = None
    if not (needs.write or (needs.coefficient and form.write is not None)):
        z = None

    blocks, order, block_first, table = row_blocks(sizes.rows), None, None, None
    if form.slot is not None:
        order, block_first, table = slot_blocks(form.slot, sizes.slots)
        blocks = table.shape[0]
    width, rank = sizes.width, sizes.rank
    columns = [width * needs.scale, width * needs.bias, rank * width * needs.read, rank * width * needs.write]
    columns += [rank * needs.offset, width * norm.weight, width * norm.norm_bias]
    workspace, views = partial_views(blocks, columns, device_of(gradient, hidden, grad_z))
    rows_out = run_columns(
        gradient, host.stream(hidden), host.stream(residual), form, q, z, order, table, sizes, blocks,
        workspace, views, needs, norm, out_dtype, on_sum,
    )  # fmt: skip
    sums = total_sums(workspace, views, columns, block_first)
    parameters = (form.scale, form.bias, form.read, form.write, form.offset)
    d_scale, d_bias, d_read, d_write, d_offset = (
        None if s is None else s.view(p.shape) for s, p in zip(sums[:5], parameters, strict=True)
    )
    d_norm = [None if s is None else s.view(width) for s in sums[5:]]
    d_hidden, d_residual, d_k = rows_out
    d_k = None if d_k is None else coefficient_sums(d_k, form.coefficient)
    return [d_hidden, d_scale, d_bias, d_read, d_offset, d_write, d_k], [d_residual, *d_norm]


def sizes_of(gradient, hidden, form, grad_z):
    rows = next(t for t in (gradient.stored, gradient.grad, hidden, grad_z) if t is not None).shape[0]
    width = next(t for t in (gradient.stored, gradient.grad, hidden, form.read) if t is not None).shape[-1]
    rank = 0 if form.read is None else form.read.shape[-2]
    return Sizes(rows, width, rank, 1 if form.slot is None else host.slot_count(*form[:5]))


def device_of(gradient, hidden, grad_z):
    return next(t for t in (gradient.stored, gradient.grad, hidden, grad_z) if t is not None).device


def back_projection(gradient, form, grad_z, sizes, needs, kind):
    """q (rows, rank) = k (G @ writeᵀ) + grad_z, 0 for slot −1; None where nothing reads it or it is 0."""
    if not (sizes.rank and (needs.hidden or needs.read or needs.offset)):
        return None
    if form.write is not None:
        return run_projection(
            gradient, gradient.strides, form.write, None, form.slot, form.coefficient, grad_z, sizes, kind
        )
    if grad_z is None or form.slot is None:
        return grad_z
    return torch.where(((form.slot < 0) | (form.slot >= sizes.slots))[:, None], 0.0, grad_z)


def run_columns(
    gradient, hidden, residual, form, q, z, order, table, sizes, blocks,
    workspace, views, needs, norm, out_dtype, on_sum,
):  # fmt: skip
    """(d_hidden, d_residual, d_coefficient (tiles, rows)), each or None; fills the workspace."""
    (rows, width, rank, _), device = sizes, workspace.device
    shape = columns_launch(blocks, width, rank, host.warp_size())
    d_hidden = torch.empty((rows, width), dtype=out_dtype, device=device) if needs.hidden else None
    d_residual = None
    if norm.residual_dtype is not None:
        d_residual = torch.empty((rows, width), dtype=norm.residual_dtype, device=device)
    tiles = max(1, cdiv(width, shape.block_width))
    d_k = torch.empty((tiles, rows), dtype=torch.float32, device=device) if needs.coefficient else None
    if rows == 0 or width == 0:
        workspace.zero_()
        return d_hidden, d_residual, None if d_k is None else d_k.zero_()
    read, write = form.read if q is not None else None, form.write if needs.coefficient else None
    strides = (*gradient.strides, host.row_stride(hidden), host.row_stride(residual))
    host.run(
        columns_kernel, shape, workspace, *gradient, hidden, residual,
        form.scale, form.bias, read, write, form.coefficient, q, z, order, table, rank,
        d_hidden, d_residual, d_k, *views, workspace.stride(0), rows, width, *strides,
        ON_SUM=on_sum, SHARED_K=host.shared(form.coefficient), KIND=norm.kind, BLOCK=PARTIAL_ROWS,
        RANK_BLOCK=rank_block(rank), BLOCK_ROWS=shape.block_rows, BLOCK_WIDTH=shape.block_width,
    )  # fmt: skip
    return d_hidden, d_residual, d_k


def partial_views(blocks, columns, device):
    """A workspace of fp32 partials, its rows 64-byte aligned, and a slice for each count of columns but 0."""
    workspace = torch.empty((blocks, cdiv(sum(map(aligned, columns)), 16) * 16), dtype=torch.float32, device=device)
    views, first = [], 0
    for count in columns:
        views.append(workspace[:, first : first + count] if count else None)
        first += aligned(count)
    return workspace, views


def aligned(count):
    """Floats to the next 16 bytes: gradients are slices of one buffer, and compilers take tensors to be so aligned."""
    return cdiv(count, 4) * 4


def total_sums(workspace, views, columns, block_first):
    """Each view's sums over the blocks: one launch for all, or with slots one for each (contiguous) table."""
    if not any(columns):
        return [None] * len(columns)
    if block_first is None:
        widths = [aligned(count) for count in columns]
        parts = reduce_partials(workspace[:, : sum(widths)])[0].split(widths)
        return [part[:count] if count else None for part, count in zip(parts, columns, strict=True)]
    sums = [None if v is None else reduce_partials(v, block_first) for v in views[:5]]
    return sums + [None if v is None else reduce_partials(v) for v in views[5:]]


def coefficient_sums(d_k, coefficient):
    """From (tiles, rows) partials to the coefficient's shape."""
    d_k = reduce_partials(d_k)[0]
    return (d_k.sum() if coefficient.numel() == 1 else d_k).reshape(coefficient.shape)
