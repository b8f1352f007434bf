"""What the Triton kernels' interpreted tests share: the interpreter made bearable, inputs, eager expressions,
and the promise (docs/design.md, 5): an error against a float64 reference of at most twice that of the same-dtype
eager PyTorch expression, plus one ulp of the largest value. Beyond oracle.py: slots and every gradient.
"""

import inspect
import math
import os

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1, or run test_triton_interpreter.py"

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RMS, GEMMA, LAYER = 0, 1, 2


def _patch_builtin_once(package, builder, scope, names={}):  # noqa: B006
    """The interpreter patches triton.language anew for every call of a device function: most of its time."""
    if package not in names:
        names[package] = [n for n, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    if tl.core.is_builtin(getattr(package, names[package][0])):
        for name in names[package]:
            interpreter._patch_attr(package, name, getattr(package, name), builder, scope)


interpreter._patch_builtin = _patch_builtin_once


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that a kernel forgets to write is NaN, not whatever was there."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


# --- the promise ----------------------------------------------------------------------------------


def ulp(value, dtype):
    """One unit in the last place of `value` in a dtype."""
    bits = {F32: 23, BF16: 7, F16: 10}[dtype]
    return 2.0 ** (math.floor(math.log2(value)) - bits) if value else 0.0


def check(name, found, exact, *eager):
    """The promise. Of sums there are several eager results, in several orders of terms (eager_gradients)."""
    assert (found is None) == (exact is None), f"{name}: one of found and expected is absent"
    if found is None:
        return
    assert found.shape == exact.shape, f"{name} has shape {found.shape}, expected {exact.shape}"
    assert found.dtype == eager[0].dtype, f"{name} is {found.dtype}, expected {eager[0].dtype}"
    if not found.numel():
        return
    error = (found.double() - exact).abs().max().item()
    of_eager = max((e.double() - exact).abs().max().item() for e in eager)
    allowed = 2 * of_eager + ulp(exact.abs().max().item(), found.dtype)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check_all(names, found, exact, eager):
    for name, f, x, results in zip(names, found, exact, eager, strict=True):
        check(f"d_{name}", f, x, *results)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


# --- inputs ---------------------------------------------------------------------------------------


def view(rows, width, dtype, strided):
    """Random rows, contiguous or a view whose stride is not its width and whose rows start unaligned."""
    if not strided:
        return torch.randn(rows, width, dtype=dtype)
    return torch.randn(rows, width + 13, dtype=dtype)[:, 5 : 5 + width]


def make_form(rows, width, rank, slots, coefficient):
    """(scale, bias, read, offset, write, slot, coefficient); slots take −1 and numbers out of range too."""
    lead = (slots,) if slots else ()
    low = (rank and torch.randn(*lead, rank, width) / width**0.5, rank and torch.randn(*lead, rank))
    write = torch.randn(*lead, rank, width) / rank**0.5 if rank else None
    slot = torch.randint(-1, slots, (rows,), dtype=torch.int32) if slots else None
    if slots and rows > 3:
        slot[:4] = torch.tensor([0, -1, slots, slots - 1], dtype=torch.int32)
    k = {"none": None, "one": torch.rand(1), "rows": torch.rand(rows)}[coefficient]
    if coefficient == "rows" and rows > 3:
        k[1:3] = torch.tensor([0.0, 1.0])
        k[-1] = 1.0
    scale, bias = 1 + 0.3 * torch.randn(*lead, width), torch.randn(*lead, width)
    return scale, bias, (low[0] if rank else None), (low[1] if rank else None), write, slot, k


def exact_form(form):
    """float64, with every slot out of range as −1."""
    *parameters, slot, k = form
    if slot is not None:
        count = parameters[0].shape[0]
        slot = torch.where((slot < 0) | (slot >= count), -1, slot)
    return (*(p if p is None else p.double() for p in parameters), slot, k if k is None else k.double())


def double(*tensors):
    return [t if t is None else t.double() for t in tensors]


# --- eager PyTorch: each operation rounds to its own dtype ----------------------------------------


def gather(parameter, slot):
    return parameter if parameter is None or slot is None else parameter[slot.long().clamp_min(0)]


def eager_edit(h, scale, bias, read, offset, write, slot, k):
    """E(h) in h's dtype and z: fp32 parameters promote, the result is rounded back."""
    s, b, r, o, w = (gather(p, slot) for p in (scale, bias, read, offset, write))
    full, update, z = s * h + b, (s - 1) * h + b, None
    if r is not None:
        z = torch.einsum("nd,nrd->nr", h.float(), r) + o if slot is not None else h.float() @ r.T + o
        added = torch.einsum("nr,nrd->nd", z, w) if slot is not None else z @ w
        full, update = full + added, update + added
    if slot is not None:
        k = (slot >= 0).float() * (1.0 if k is None else k)
        z = z if z is None else z * (slot >= 0)[:, None]
    if k is not None:
        full = h + (k[:, None] if k.numel() > 1 else k) * update
    return full.to(h.dtype), z


def eager_edit_add(x, residual, form, on_sum):
    if on_sum:
        return eager_edit(residual + x, *form)
    edited, z = eager_edit(x, *form)
    return residual + edited, z


def in_range(form):
    *parameters, slot, k = form
    if slot is not None:
        slot = torch.where((slot < 0) | (slot >= parameters[0].shape[0]), -1, slot)
    return (*parameters, slot, k)


NAMES = ("hidden", "scale", "bias", "read", "offset", "write", "coefficient")


def permuted_form(form, order, columns):
    """The form of rows taken in another order, their columns too."""
    scale, bias, read, offset, write, slot, k = form
    scale, bias, read, write = (p if p is None else p[..., columns] for p in (scale, bias, read, write))
    slot = slot if slot is None else slot[order]
    return scale, bias, read, offset, write, slot, (k if k is None or k.numel() == 1 else k[order])


def autograd(function, rows, form, outputs):
    rows = [r.detach().clone().requires_grad_() for r in rows]
    *parameters, slot, k = form
    parameters = [p if p is None else p.clone().requires_grad_() for p in parameters]
    k = k if k is None else k.clone().requires_grad_()
    found = function(*rows, (*parameters, slot, k))
    pairs = [(out, g) for out, g in zip(found, outputs, strict=True) if g is not None]
    leaves = [t for t in (*rows, *parameters, k) if t is not None]
    grads = torch.autograd.grad([p[0] for p in pairs], leaves, [p[1] for p in pairs], allow_unused=True)
    grads = iter(
        g if g is not None else torch.zeros_like(leaf) for g, leaf in zip(grads, leaves, strict=True)
    )
    return [None if t is None else next(grads) for t in (*rows, *parameters, k)]


def eager_gradients(function, rows, form, grad, grad_z):
    """Autograd's gradients of `rows` (tensors) and of the form's six, each in four orders of terms.

    The rounding error of one sum is a matter of luck: a single number (a shared coefficient's gradient, say)
    is now and then exact by chance. Eager's error is the largest it makes over the orders.
    """
    (count, width), results = rows[0].shape, []
    for order, columns in [(torch.arange(count), torch.arange(width))] + [
        (torch.randperm(count), torch.randperm(width)) for _ in range(3)
    ]:
        take = lambda t, order=order, columns=columns: t[order][:, columns]  # noqa: E731
        outputs = (take(grad), grad_z if grad_z is None else grad_z[order])
        *d_rows, scale, bias, read, offset, write, k = autograd(
            function, [take(r) for r in rows], permuted_form(form, order, columns), outputs
        )
        back, across = order.argsort(), columns.argsort()
        scale, bias, read, write = (g if g is None else g[..., across] for g in (scale, bias, read, write))
        k = k if k is None or k.numel() == 1 else k[back]
        results.append([*(g[back][:, across] for g in d_rows), scale, bias, read, offset, write, k])
    return list(zip(*results, strict=True))


def all_needs(form):
    """The form's gradients and that of the rows."""
    scale, bias, read, offset, write, _, k = form
    return (True, *(p is not None for p in (scale, bias, read, offset, write, k)))
