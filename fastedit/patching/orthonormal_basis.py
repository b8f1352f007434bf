"""Bases whose rows stay orthonormal while any optimizer trains them: retraction and tangent gradients.

A basis R is a plain fp32 parameter. Its gradient is projected onto the tangent space of the Stiefel manifold,

    G − sym(G Rᵀ) R,        sym(A) = (A + Aᵀ) / 2,

so that AdamW's moments hold no part that the constraint would undo. When the optimizer has moved R off the manifold, it
is retracted: R ← L⁻¹ R with L Lᵀ = R Rᵀ (Cholesky's form of QR: the rows' Gram–Schmidt), in float64 and for all layers
in one batch.

The alternative is a free matrix A with R = Q(A) (torch.nn.utils.parametrizations.orthogonal). It rebuilds R and
differentiates through that in every layer of every forward. Per step both descend in the same directions to first
order, and 150 steps end at most a tenth higher (tests/training/test_reft_training.py).

Edelman, Arias and Smith 1998 (tangent projection, 2.2.1); Absil, Mahony and Sepulchre 2008 (QR retraction, 4.1.1).
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops import registered as torch_library

# R Rᵀ of exactly orthonormal rows rounded to fp32 is off by at most 2⁻²³. What is no further off than twice that is left
# alone, bit for bit: a retracted basis, saved and loaded, is the same basis.
TOLERANCE = 2**-22
# The share of a row's square that the rows before it leave, below which float64 could no longer give 2⁻²².
DEPENDENT = 1e-9


def tangent(basis, grad):
    """The part of a gradient (…, rank, width) along the manifold at `basis`."""
    shape = grad.shape  # batched products for one matrix too: a tenant's bits are then those it has alone
    grad, basis = grad.reshape(-1, *shape[-2:]), basis.reshape(-1, *shape[-2:])
    mixed = torch.bmm(grad, basis.mT)
    return torch.baddbmm(grad, mixed + mixed.mT, basis, alpha=-0.5).view(shape)


def retracted(bases):
    """Gram–Schmidt of bases (…, rank, width): fp32, orthonormal rows, new memory.

    Raises:
        ValueError: on the CPU, rows that are linearly dependent. Elsewhere that check would stall the stream, so such a
            basis is left as it is.
    """
    wide = bases.double()
    gram = wide @ wide.mT
    off = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax((-2, -1), keepdim=True)
    triangle, failed = torch.linalg.cholesky_ex(gram)
    left = triangle.diagonal(dim1=-2, dim2=-1).square() / gram.diagonal(dim1=-2, dim2=-1)
    failed = (failed > 0) | (left < DEPENDENT).any(-1)
    if bases.is_cpu and bool(failed.any()) and bool(bases.isfinite().all()):
        raise ValueError(
            "an orthonormal basis has linearly dependent rows, so it spans less than its rank: load or set rows that "
            "are independent"
        )
    moved = (off > TOLERANCE) & ~failed[..., None, None]
    return torch.where(moved, torch.linalg.solve_triangular(triangle, wide, upper=False).float(), bases)


class Tangent(Function):
    """The basis itself, with the tangent part as gradient. For a compiler, which then sees the rest."""

    @staticmethod
    def forward(ctx, basis):
        ctx.save_for_backward(basis)
        return basis.view_as(basis)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (basis,) = ctx.saved_tensors
        return tangent(basis, grad)


def _retract_(basis):
    basis.copy_(retracted(basis))


torch_library.library.define("retract_(Tensor(a!) basis) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
torch_library.library.impl("retract_", _retract_, "CompositeExplicitAutograd")
torch.library.register_fake("fastedit::retract_", lambda basis: None, lib=torch_library.library)
retract_ = torch.ops.fastedit.retract_.default
