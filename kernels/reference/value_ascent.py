"""value_ascent: u ← u + a ∇V(h + u), `steps` times from u = 0; RE-Control's control at test time (arXiv 2406.05954).

V is an MLP with ReLU, V(h) = head · relu(W h + b) + β, so ∇V = Wᵀ m with m = 1[W h + b > 0] ⊙ head; or with a second
hidden layer, head · relu(W₂ relu(W h + b) + b₂) + β, where m = 1[z > 0] ⊙ W₂ᵀ (1[z₂ > 0] ⊙ head). The steps never leave
z = W h + b: it moves by a · gram m, gram = W Wᵀ, and h' = h + a Wᵀ Σ m.
"""

import torch

from .form import compute_dtype


def value_ascent(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size):
    """h' (rows, width) in hidden's dtype; arithmetic in fp32, fp64 for fp64 rows.

    weight (units, width), bias (units,), gram (units, units); weight2 (units2, units) and bias2 (units2,), or None;
    head (units2,) or (units,).
    """
    return ascend(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size, None)


def ascend(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size, flips):
    """value_ascent; the steps of one hidden layer by `flips`, where given: a kernel in place of a product a step.

    flips(z, slope, head, gram, steps, step_size) is total_gradient, given slope = gram (1[z > 0] ⊙ head). It may use
    z and slope as its own memory.
    """
    dtype = compute_dtype(hidden)
    weight, bias, weight2, bias2, head, gram = (
        t if t is None else t.to(dtype) for t in (weight, bias, weight2, bias2, head, gram)
    )
    h = hidden.to(dtype)
    z = h @ weight.T + bias
    if flips is None or weight2 is not None or steps < 2:
        total = total_gradient(z, weight2, bias2, head, gram, steps, step_size)
    else:
        total = flips(z, gradient_at(z, None, None, head) @ gram, head, gram, steps, step_size)
    return (h + step_size * (total @ weight)).to(hidden.dtype)


def total_gradient(z, weight2, bias2, head, gram, steps, step_size):
    """Σ over the steps of dV/dz, (rows, units), from z before the first."""
    total = torch.zeros_like(z)
    for step in range(steps):
        gradient = gradient_at(z, weight2, bias2, head)
        total = total + gradient
        if step + 1 < steps:
            z = z + step_size * (gradient @ gram)
    return total


def gradient_at(z, weight2, bias2, head):
    """dV/dz; relu'(0) = 0."""
    on = (z > 0).to(z.dtype)
    if weight2 is None:
        return on * head
    on2 = (torch.relu(z) @ weight2.T + bias2 > 0).to(z.dtype)
    return on * ((on2 * head) @ weight2)
