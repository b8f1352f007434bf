"""project: z = hidden @ readᵀ + offset, the activation projection. z is fp32 (rows, rank).

Kernels, streams, grid and determinism: projection.py.
Backward: d_hidden = grad_z @ read, d_read = grad_zᵀ hidden, d_offset = Σ grad_z: the backward of an edit of
which nothing but z was used.
"""

from . import host
from .backward import Gradient, Sizes, form_backward
from .projection import run_projection


def project(hidden, read, offset):
    """z fp32 (rows, rank)."""
    gradient = Gradient(host.stream(hidden))
    sizes = Sizes(*hidden.shape, read.shape[0], 1)
    return run_projection(
        gradient, gradient.strides, host.dense(read), host.dense(offset), None, None, None, sizes
    )


def project_backward(grad_z, hidden, read, needs, out_dtype):
    """(d_hidden in out_dtype, d_read, d_offset); needs: three booleans."""
    offset = grad_z.new_empty(grad_z.shape[1]) if needs[2] else None  # for its shape
    form = (None, None, read, offset, None, None, None)
    need_hidden, need_read, need_offset = needs
    wanted = (need_hidden, False, False, need_read, need_offset, False, False)
    grads, _ = form_backward(Gradient(None), hidden, None, form, grad_z, None, wanted, out_dtype)
    return grads[0], grads[3], grads[4]
