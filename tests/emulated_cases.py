"""kernels/cuda on a machine without a GPU: compiled with a C++ compiler against tests/cuda_emulator.

Checked against the reference in float64, with the numerics promise: error ≤ 2 × that of the reference in the
streams' own dtype (fp32 arithmetic, one rounding an op) + 1 ulp of the largest value; for a sum that cancels,
the largest sum of its terms' magnitudes, since a few results say too little about eager's error. Outputs lie
poisoned between guards, so that neither a write out of bounds nor an element left out can hide.
"""

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("harness", Path(__file__).parent / "cuda_emulator/harness.py")
harness = importlib.util.module_from_spec(spec)
spec.loader.exec_module(harness)
reference, FORM = harness.reference(), harness.FORM

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="needs a C++ compiler (g++)")

F32, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (BF16, BF16), (HALF, HALF), (BF16, F32), (HALF, F32)]
# 1: one column; 64, 384: vectors; 100: none divides it; 1030: vectors, then a tail of six. 4104, 8192, 16384:
# the widest of each register tile and beyond (launch.h), in fp32 and in 16 bits.
SIZES = [(1, 64), (7, 1), (7, 100), (7, 1030), (300, 64), (33, 384)]
WIDE = [(3, 4104), (2, 8192), (2, 8200), (1, 16384), (1, 16392)]
RANKS = [0, 1, 4, 17, 64]
NAMES = {F32: "f32", BF16: "bf16", HALF: "f16"}


def names(value):
    return "-".join(map(names, value)) if isinstance(value, tuple) else NAMES.get(value, str(value))


def built(tmp_path_factory, name, switch=""):
    """Compiled once a run: the first file that asks for it compiles, whichever process it is in, and others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return harness.build(folder, switch)


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    return built(tmp_path_factory, "cuda_emulated")


@pytest.fixture(autouse=True)
def plain_schedule(cuda):
    cuda.schedule()
    cuda.shift = 0


def stream(rows, width, dtype, view="plain"):
    """Random rows: contiguous, with a row stride that vectors divide, or starting off every boundary."""
    if view == "plain":
        return torch.randn(rows, width).to(dtype)
    if view == "strided":
        return torch.randn(rows, width + 48).to(dtype)[:, 16 : 16 + width]
    return torch.randn(rows * (width + 3) + 1).to(dtype)[1:].view(rows, width + 3)[:, :width]


def make_form(rows, width, rank=0, slots=None, coefficient=None, names="scale bias offset write"):
    lead = () if slots is None else (slots,)
    every = {
        "scale": 1 + 0.3 * torch.randn(*lead, width),
        "bias": torch.randn(*lead, width),
        "read": torch.randn(*lead, max(rank, 1), width) / width**0.5,
        "offset": torch.randn(*lead, max(rank, 1)),
        "write": torch.randn(*lead, max(rank, 1), width) / max(rank, 1) ** 0.5,
    }
    kept = [n for n in every if n in names.split() or n == "read"]
    form = {n: every[n] for n in kept if rank or n in ("scale", "bias")}
    if slots is not None:  # runs of a slot, as sequences make them, and slots that no bank has
        form["slot"] = torch.randint(-1, slots + 1, (rows,)).sort().values.roll(rows // 3).to(torch.int32)
    if coefficient == "rows":
        form["coefficient"] = torch.rand(rows) * 2
        form["coefficient"][::3], form["coefficient"][1::3] = 0, 1
    elif coefficient == "shared":
        form["coefficient"] = torch.tensor([0.7])
    return form


def reference_form(form, dtype):
    """The reference's seven arguments; it knows slot −1, not slots beyond the bank."""
    given = {n: form.get(n) for n in FORM}
    if given["slot"] is not None:
        slots = next(form[n] for n in harness.PARAMETERS if form.get(n) is not None).shape[0]
        given["slot"] = torch.where(given["slot"] >= slots, -1, given["slot"])
    return [t if t is None or n == "slot" else t.to(dtype) for n, t in given.items()]


def double(tensors):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def ulp(values, dtype):
    largest, info = float(values.abs().max()), torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(largest)) if largest > info.tiny else info.tiny


def assert_promise(name, got, exact, eager, largest=None):
    """`largest`: the values whose ulp counts, where they are not the result's own."""
    if got is None or exact is None:
        assert got is None and exact is None, name
        return
    assert got.shape == exact.shape, (name, got.shape, exact.shape)
    if not got.numel():
        return
    assert torch.isfinite(got).all(), f"{name} is not finite"
    error = float((got.double() - exact).abs().max())
    allowed = 2 * float((eager.double() - exact).abs().max()) + ulp(
        exact if largest is None else largest, got.dtype
    )
    assert error <= allowed, (
        f"{name}: error {error:.3e} > {allowed:.3e}, values to {float(exact.abs().max()):.3e}"
    )


def assert_all(labels, got, exact, eager, largest=None):
    largest = [None] * len(got) if largest is None else largest
    for name, *four in zip(labels.split(), got, exact, eager, largest, strict=True):
        assert_promise(name, *four)


def magnitudes(total, h, form, grad_z, z, needs):
    """The gradients' sums with every term's magnitude in place of the term, in float64."""
    form = {n: t if n == "slot" else 1 + (t - 1).abs() if n == "scale" else t.abs() for n, t in form.items()}
    given = [None if t is None else t.double().abs() for t in (total, h, grad_z, z)]
    found = reference.edit.__globals__["form_backward"](
        *given[:2], *reference_form(form, torch.float64), *given[2:], needs
    )
    return [None, *found[1:]]  # d_hidden is no sum over many terms


def same_bits(a, b):
    return a is None or torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


# edit


def check_edit(cuda, hidden, form):
    got = cuda.edit(hidden, form, want_z="read" in form)
    eager = reference.edit(hidden, *reference_form(form, F32), "read" in form)
    exact = reference.edit(hidden.double(), *reference_form(form, torch.float64), "read" in form)
    assert_all("out z", got, exact, eager)
    return got


def check_edit_add_norm(cuda, x, residual, form, kind, on_sum, affine=True):
    width, low_rank, eps = x.shape[1], "read" in form, 1e-6
    weight = None if kind == 2 and not affine else (torch.rand(width) + 0.5).to(residual.dtype)
    norm_bias = torch.randn(width).to(residual.dtype) if kind == 2 and affine else None
    got = cuda.edit_add_norm(x, residual, weight, norm_bias, form, on_sum, kind, eps, low_rank)
    eager = reference.edit_add(x, residual, *reference_form(form, F32), on_sum, low_rank)
    exact = reference.edit_add(*double((x, residual)), *reference_form(form, torch.float64), on_sum, low_rank)
    assert_all("out z", (got[0], got[2]), exact, eager)
    norm = reference.edit_add_norm.__globals__["norm"]  # of the residual' that was stored
    exact = norm(*double((got[0], weight, norm_bias)), kind, eps)
    eager = norm(got[0], weight, norm_bias, kind, eps)
    assert_all("normed rstd", (got[1], got[4]), exact[::2], eager[::2])
    assert_promise("mean", got[3], exact[1], eager[1], largest=got[0])  # what it is taken from
    alone = cuda.edit_add_norm(x, residual, weight, norm_bias, form, on_sum, kind, eps, want_out=False)
    assert same_bits(alone[1], got[1])


def check_edit_backward(cuda, rows, width, pair, form, on_sum=False, view="plain", without=()):
    hidden_dtype, grad_dtype = pair
    grad = None if "grad" in without else stream(rows, width, grad_dtype, view)
    hidden = stream(rows, width, hidden_dtype, view)
    residual = stream(rows, width, hidden_dtype, view) if on_sum else None
    low_rank = "read" in form
    rank = form["read"].shape[-2] if low_rank else 0
    grad_z = torch.randn(rows, rank) if low_rank and "grad_z" not in without else None
    z = torch.randn(rows, rank) if low_rank else None
    needs = [n not in without and (n == "hidden" or form.get(n) is not None) for n in ("hidden", *FORM)]
    del needs[-2]  # slot
    each = {
        **form,
        "coefficient": torch.ones(rows) if form.get("coefficient") is None else form["coefficient"],
    }
    if needs[-1] and each["coefficient"].numel() == 1:  # the kernel gives each row's
        each["coefficient"] = each["coefficient"].expand(rows).clone()
    use = each if needs[-1] else form
    got = cuda.edit_backward(grad, hidden, residual, form, grad_z, z, needs, hidden_dtype, (rows, width))
    streams = (grad, hidden, residual)
    if low_rank and grad_z is None:
        grad_z = torch.zeros(rows, rank)
    eager = reference.edit_backward(*streams, *reference_form(use, F32), grad_z, z, needs, hidden_dtype)
    exact = reference.edit_backward(
        *double(streams), *reference_form(use, torch.float64), *double((grad_z, z)), needs, torch.float64
    )
    h = hidden if residual is None else hidden.double() + residual.double()
    largest = magnitudes(grad, h, use, grad_z, z, needs)
    assert_all("d_hidden d_scale d_bias d_read d_offset d_write d_coefficient", got, exact, eager, largest)


def check_norm_backward(cuda, rows, width, pair, form, kind, on_sum, view="plain", without=()):
    x_dtype, dtype = pair
    low_rank = "read" in form
    rank = form["read"].shape[-2] if low_rank else 0
    x = stream(rows, width, x_dtype, view)
    residual = stream(rows, width, dtype, view) if on_sum else None
    grad_residual = None if "grad_residual" in without else stream(rows, width, dtype, view)
    grad_normed = None if "grad_normed" in without else stream(rows, width, dtype, view)
    out = stream(rows, width, dtype)
    weight = (torch.rand(width) + 0.5).to(dtype)
    _, mean, rstd = reference.edit_add_norm.__globals__["norm"](
        out.double(), weight.double(), None, kind, 1e-6
    )
    mean, rstd = None if mean is None else mean.float(), rstd.float()
    grad_z = torch.randn(rows, rank) if low_rank else None
    z = torch.randn(rows, rank) if low_rank else None
    needs = [n not in without and (n in ("x", "residual") or form.get(n) is not None)
             for n in ("x", *harness.PARAMETERS, "coefficient", "residual")]  # fmt: skip
    norm = grad_normed is not None
    needs_norm = (norm and "weight" not in without, norm and kind == 2)
    got = cuda.edit_add_norm_backward(
        grad_residual, grad_normed, out, x, residual, weight, mean, rstd, form, grad_z, z, on_sum, kind,
        needs, needs_norm, x_dtype, dtype, (rows, width),
    )  # fmt: skip
    streams = (grad_residual, grad_normed, out, x, residual, weight, mean, rstd)
    rest = (on_sum, kind, needs, needs_norm)
    eager = reference.edit_add_norm_backward(
        *streams, *reference_form(form, F32), grad_z, z, *rest, x_dtype, dtype
    )
    exact = reference.edit_add_norm_backward(
        *double(streams),
        *reference_form(form, torch.float64),
        *double((grad_z, z)),
        *rest,
        *[torch.float64] * 2,
    )
    total = 0 if grad_residual is None else grad_residual.double()
    shares = [None, None]
    if norm:
        d_norm = reference.edit_add_norm.__globals__["norm_backward"]
        total = total + d_norm(*double((grad_normed, out, weight, mean, rstd)), kind)[0]
        unit = (out.double() - (0 if mean is None else mean[:, None])) * rstd[:, None]
        shares = [(grad_normed * unit).abs().sum(0), grad_normed.double().abs().sum(0)]
    h = x.double() if residual is None else x.double() + residual.double()
    sums = magnitudes(total, h, form, grad_z, z, needs[:7])
    labels = "d_x d_residual d_scale d_bias d_read d_offset d_write d_coefficient d_weight d_norm_bias"
    assert_all(labels, got, exact, eager, [None, *sums, *shares])


# What holds for every op


def every_op(cuda, rows, width, dtype, slots=3):
    """All outputs of all ops on the same random rows, by name."""
    torch.manual_seed(1)
    x, residual, grad = (stream(rows, width, dtype) for _ in range(3))
    plain, form = make_form(rows, width), make_form(rows, width, 5, slots, "rows")
    weight, grad_z = torch.rand(width).to(dtype), torch.randn(rows, 5)
    found = {"edit": cuda.edit(x, plain), "edit_rank": cuda.edit(x, form, True)}
    found["edit_add"] = cuda.edit_add(x, residual, plain)
    found["edit_add_slots"] = cuda.edit_add(x, residual, make_form(rows, width, 0, slots, "rows"), True)
    for kind in (0, 2):
        found[f"norm{kind}"] = cuda.edit_add_norm(x, residual, weight, None, plain, kind=kind)
        out, _, z, mean, rstd = found[f"norm{kind}_rank"] = cuda.edit_add_norm(
            x, residual, weight, None, form, True, kind, want_z=True
        )
        found[f"norm{kind}_backward"] = cuda.edit_add_norm_backward(
            grad, x, out, x, residual, weight, mean, rstd, form, grad_z, z, True, kind, [True] * 8,
            (True, True), dtype, dtype, (rows, width),
        )  # fmt: skip
    found["backward"] = cuda.edit_backward(
        grad, x, None, plain, None, None, [True] * 3 + [False] * 4, dtype, x.shape
    )
    found["backward_rank"] = cuda.edit_backward(
        grad, x, residual, form, grad_z, z, [True] * 7, dtype, x.shape
    )
    return {f"{op}[{i}]": t for op, outs in found.items() for i, t in enumerate(outs) if t is not None}
