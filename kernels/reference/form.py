"""What the reference kernels share: the normal form applied to fp32 (or fp64) rows.

    h' = h + k · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write)

`k` is the row's coefficient, times its gate's if there is one; a row of slot −1 has k = 0. Every argument may be
None: scale 1, bias 0, no low-rank part, no slots, k = 1, no gate.
"""

import torch


def compute_dtype(*tensors):
    """float64 when any stream is float64, else float32: the dtype of all arithmetic."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def gather(parameter, slot, dtype):
    """The parameter each row sees: (…) shared, or (rows, …) picked by slot; slot −1 reads slot 0."""
    if parameter is None:
        return None
    parameter = parameter.to(dtype)
    return parameter if slot is None else parameter[slot.long().clamp_min(0)]


def row_coefficient(slot, coefficient, rows, dtype, device):
    """(rows, 1) coefficient, or None where it is 1 for every row."""
    if slot is None and coefficient is None:
        return None
    k = torch.ones(rows, dtype=dtype, device=device)
    if coefficient is not None:
        k = k * coefficient.to(dtype)
    if slot is not None:
        k = torch.where(slot < 0, torch.zeros_like(k), k)
    return k[:, None]


def gated_coefficient(h, gate, rule, slot, coefficient):
    """coefficient · g for rows h (rows, width) as the form is given them, (rows,); coefficient itself without a gate.

    gate ([slots,] width), rule ([slots,] 3) = (threshold, sharpness or 0, 1 for the cosine else 0). s = h · gate, over
    ‖h‖ for the cosine (0 for a row of zeros); g = 1 where s > threshold, else 0, or, with a sharpness,
    sigmoid(sharpness · (s − threshold)). A coefficient of 0 stays 0 whatever the row holds, NaN among it.
    """
    if gate is None:
        return coefficient
    gate, rule = gather(gate, slot, h.dtype), gather(rule, slot, h.dtype)
    threshold, sharpness, cosine = rule.unbind(-1)
    s = (h * gate).sum(-1)
    length = torch.linalg.vector_norm(h, dim=-1)
    s = torch.where((cosine != 0) & (length > 0), s / length, s)
    hard = (s > threshold).to(h.dtype)
    g = torch.where(sharpness > 0, torch.sigmoid(sharpness * (s - threshold)), hard)
    if coefficient is None:
        return g
    k = coefficient.to(h.dtype)
    return torch.where(k == 0, k, k * g)


def low_rank_read(h, read, offset, slot):
    """z (rows, rank) = h @ readᵀ + offset; 0 where the slot is −1."""
    read, offset = gather(read, slot, h.dtype), gather(offset, slot, h.dtype)
    z = h @ read.T if slot is None else torch.einsum("nd,nrd->nr", h, read)
    z = z if offset is None else z + offset
    return z if slot is None else torch.where(slot[:, None] < 0, torch.zeros_like(z), z)


def apply_form(h, scale, bias, read, offset, write, slot, coefficient):
    """(h', z) for h (rows, width) already in the compute dtype; z is None at rank 0."""
    z = None if read is None else low_rank_read(h, read, offset, slot)
    s, b, w = (gather(p, slot, h.dtype) for p in (scale, bias, write))
    added = None if z is None or w is None else (z @ w if slot is None else torch.einsum("nr,nrd->nd", z, w))

    full = h if s is None else s * h
    for term in (b, added):
        full = full if term is None else full + term
    k = row_coefficient(slot, coefficient, h.shape[0], h.dtype, h.device)
    if k is None:
        return full, z
    update = torch.zeros_like(h) if s is None else (s - 1) * h
    for term in (b, added):
        update = update if term is None else update + term
    return torch.where(k == 0, h, torch.where(k == 1, full, h + k * update)), z


def sum_by_slot(rows, slot, like):
    """Column sums (…) of rows (rows, …), or (slots, …) when the rows carry slots."""
    if slot is None:
        return rows.sum(0).reshape(like.shape)
    total = torch.zeros((like.shape[0] + 1, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    return total.index_add_(0, slot.long() + 1, rows)[1:].reshape(like.shape)


def form_backward(grad, h, scale, bias, read, offset, write, slot, coefficient, grad_z, z, needs):
    """Gradients of apply_form (docs/design.md, 4), all in the compute dtype.

    grad (rows, width) or None where only z was used; needs: seven booleans for
    hidden, scale, bias, read, offset, write, coefficient. Returns seven tensors or None.
    """
    some = next(t for t in (grad, h, grad_z) if t is not None)
    rows, dtype, device = some.shape[0], some.dtype, some.device
    need_h, need_scale, need_bias, need_read, need_offset, need_write, need_k = needs
    s, r, w = (gather(p, slot, dtype) for p in (scale, read, write))
    k = row_coefficient(slot, coefficient, rows, dtype, device)
    if grad is None:
        source = h if h is not None else r
        grad = torch.zeros((rows, source.shape[-1]), dtype=dtype, device=device)
    kg = grad if k is None else k * grad
    if grad_z is not None and slot is not None:
        grad_z = torch.where(slot[:, None] < 0, torch.zeros_like(grad_z), grad_z)
    pulled = None
    if w is not None:
        pulled = kg @ w.T if slot is None else torch.einsum("nd,nrd->nr", kg, w)
    q = pulled if grad_z is None else (grad_z if pulled is None else pulled + grad_z)

    d_h = None
    if need_h:
        d_h = grad
        if s is not None:
            d_h = s * grad if k is None else grad + (s - 1) * kg
        if q is not None:
            d_h = d_h + (q @ r if slot is None else torch.einsum("nr,nrd->nd", q, r))
        d_h = d_h.clone() if d_h is grad else d_h
    d_scale = sum_by_slot(kg * h, slot, scale) if need_scale else None
    d_bias = sum_by_slot(kg, slot, bias) if need_bias else None
    d_read = sum_by_slot(q[:, :, None] * h[:, None, :], slot, read) if need_read else None
    d_offset = sum_by_slot(q, slot, offset) if need_offset else None
    d_write = None
    if need_write:
        d_write = sum_by_slot(z[:, :, None] * kg[:, None, :], slot, write)
    d_k = None
    if need_k:
        update = torch.zeros_like(grad)
        if s is not None:
            update = update + (s - 1) * h
        if bias is not None:
            update = update + gather(bias, slot, dtype)
        if w is not None:
            update = update + (z @ w if slot is None else torch.einsum("nr,nrd->nd", z, w))
        d_k = (grad * update).sum(-1)
        if slot is not None:
            d_k = torch.where(slot < 0, torch.zeros_like(d_k), d_k)
        if coefficient.numel() == 1 and rows != 1:
            d_k = d_k.sum()
        d_k = d_k.reshape(coefficient.shape)
    return d_h, d_scale, d_bias, d_read, d_offset, d_write, d_k
