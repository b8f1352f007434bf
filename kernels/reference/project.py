"""project: z = hidden @ readᵀ + offset, the activation projection, in plain PyTorch. z is fp32 (rows, rank)."""

from .form import compute_dtype, low_rank_read


def project(hidden, read, offset):
    return low_rank_read(hidden.to(compute_dtype(hidden)), read, offset, None)


def project_backward(grad_z, hidden, read, needs, out_dtype):
    """(d_hidden in out_dtype, d_read, d_offset); needs: three booleans."""
    dtype = compute_dtype(hidden, grad_z)
    g = grad_z.to(dtype)
    return (
        (g @ read.to(dtype)).to(out_dtype) if needs[0] else None,
        g.T @ hidden.to(dtype) if needs[1] else None,
        g.sum(0) if needs[2] else None,
    )
