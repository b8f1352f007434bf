"""The numerics promise, as a check: every backend against a float64 reference and the same-dtype eager expression.

A result holds when its largest error is at most twice that of eager PyTorch (the promoting expression a user
would write, in the stream's dtype with fp32 parameters) plus one unit in the last place of the largest value.
"""

import math

import torch
from fastedit.kernels import reference

KINDS = {"rms": 0, "gemma": 1, "layer": 2}
FORM = ("scale", "bias", "read", "offset", "write")


def ulp(values, dtype):
    """One unit in the last place, in `dtype`, of the largest of `values`."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(largest)) if largest > info.tiny else info.smallest_normal


def assert_promise(name, got, exact, eager):
    """error(got) ≤ 2 · error(eager) + 1 ulp of the largest exact value, in got's dtype."""
    assert got.shape == exact.shape, (name, got.shape, exact.shape)
    assert torch.isfinite(got).all(), f"{name} is not finite"
    if not got.numel():
        return
    exact = exact.double()
    error = float((got.double() - exact).abs().max())
    allowed = 2 * float((eager.double() - exact).abs().max()) + ulp(exact, got.dtype)
    assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e}, of values up to {float(exact.abs().max()):.3e}"


def make_form(width, rank=0, slots=None, scale=True, bias=True, generator=None):
    """Parameters of realistic size: scale 1 ± 0.3, the low-rank part about as large as the rows."""
    lead = () if slots is None else (slots,)

    def random(*shape):
        return torch.randn(*lead, *shape, generator=generator)

    form = dict.fromkeys(FORM)
    if scale:
        form["scale"] = 1 + 0.3 * random(width)
    if bias:
        form["bias"] = random(width)
    if rank:
        form |= {"read": random(rank, width) / width**0.5, "offset": random(rank), "write": random(rank, width)}
        form["write"] = form["write"] / rank**0.5
    return form


def eager_edit(h, form, strength=None):
    """What a user writes in plain PyTorch, promoting to fp32 where parameters meet the rows."""
    update = h if form["scale"] is None else form["scale"] * h
    if form["bias"] is not None:
        update = update + form["bias"]
    if form["read"] is not None:
        z = h.to(form["read"].dtype) @ form["read"].T
        z = z if form["offset"] is None else z + form["offset"]
        update = update + z @ form["write"]
    if strength is not None:
        update = h + (strength if strength.numel() == 1 else strength[..., None]) * (update - h)
    return update


def eager_norm(r, weight, norm_bias, kind, eps):
    if kind == "layer":
        return torch.nn.functional.layer_norm(r, r.shape[-1:], weight, norm_bias, eps)
    x = r.float() if r.dtype != torch.float64 else r
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if kind == "gemma":
        return (x * (1 + weight.to(x.dtype))).to(r.dtype)
    return weight * x.to(r.dtype)


def doubled(tree):
    """Tensors in float64, each its own leaf; everything else as it is."""
    if isinstance(tree, dict):
        return {k: doubled(v) for k, v in tree.items()}
    if isinstance(tree, torch.Tensor) and tree.is_floating_point():
        return tree.detach().double()
    return tree


def flat_rows(t):
    return None if t is None else t.reshape(-1, t.shape[-1])


def exact_edit(h, form, slot=None, strength=None):
    form = doubled(form)
    out, z = reference.edit(flat_rows(h.double()), *(form[n] for n in FORM), _row(slot), _row(doubled(strength)), True)
    return out.view(h.shape), z


def exact_edit_add(x, residual, form, on, slot=None, strength=None):
    form = doubled(form)
    out, _ = reference.edit_add(
        flat_rows(x.double()), flat_rows(residual.double()), *(form[n] for n in FORM), _row(slot),
        _row(doubled(strength)), on == "sum",
    )  # fmt: skip
    return out.view(x.shape)


def exact_norm(stored, weight, norm_bias, kind, eps):
    """The norm in float64 of the residual as stored. RMS keeps Llama's rounding before the weight out of it."""
    normed, _, _ = reference.edit_add_norm.__globals__["norm"](
        flat_rows(stored.double()), doubled(weight), doubled(norm_bias), KINDS[kind], eps
    )
    return normed.view(stored.shape)


def _row(t):
    return None if t is None else t.reshape(-1)
