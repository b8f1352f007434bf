"""kernels/cuda on a machine without a GPU: compiled with a C++ compiler against tests/cuda_emulator.

Checked against the reference in float64, with the numerics promise: error ≤ 2 × that of the reference in the
streams' own dtype (fp32 arithmetic, one rounding an op) + 1 ulp of the largest value; for a sum that cancels,
the largest sum of its terms' magnitudes, since a few results say too little about eager's error. Outputs lie
poisoned between guards, so that neither a write out of bounds nor an element left out can hide.
"""

import importlib.util
import math
from pathlib import Path

import ascent_support
import pytest
import torch
from moments_support import assert_exact as assert_exact_moments

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


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    return harness.build(tmp_path_factory.mktemp("cuda_emulated"))


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


# The emulator itself


@pytest.mark.parametrize(
    ("rule", "message"),
    [(0, "barrier"), (1, "barrier"), (2, "shuffle"), (3, "past the shared memory"), (4, "misaligned")],
)
def test_emulator_reports_a_broken_rule(cuda, rule, message):
    out = torch.zeros(64)
    assert cuda.library.break_rule(rule, harness.PTR(out.data_ptr())) != 0
    assert message in cuda.library.emulator_message().decode()
    cuda.edit(torch.randn(3, 64), {})  # and goes on


def test_emulator_shows_a_race_as_a_result_that_depends_on_the_order(cuda):
    results = []
    for seed in (0, 1):
        out = torch.zeros(64)
        cuda.schedule(seed=seed)
        assert cuda.library.break_rule(5, harness.PTR(out.data_ptr())) == 0
        results.append(out)
    assert not torch.equal(*results)


def test_emulator_rounds_as_torch_does(cuda):
    values = torch.cat([torch.randn(4096) * 2.0**e for e in range(-40, 40, 2)])
    values = torch.cat([values, torch.tensor([0.0, -0.0, 65519.9, 65520.0, 3e38, torch.inf, -torch.inf])])
    for narrow in (BF16, HALF):
        x = values.to(narrow)[None]
        zero = torch.zeros(1, values.numel())
        out, _ = cuda.edit_add(x, zero, {})  # narrow → fp32
        assert torch.equal(out, x.float())
        odd = torch.full_like(x, 0.37)
        finite = x.isfinite() & ((x.float() + odd.float()).abs() < 3e38)
        out, _ = cuda.edit_add(x, odd, {})  # fp32 → narrow
        assert torch.equal(out[finite], (x + odd)[finite])


# edit


def check_edit(cuda, hidden, form):
    got = cuda.edit(hidden, form, want_z="read" in form)
    eager = reference.edit(hidden, *reference_form(form, F32), "read" in form)
    exact = reference.edit(hidden.double(), *reference_form(form, torch.float64), "read" in form)
    assert_all("out z", got, exact, eager)
    return got


@pytest.mark.parametrize("dtype", [F32, BF16, HALF], ids=names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("view", ["plain", "strided", "unaligned"])
def test_edit(cuda, size, dtype, view):
    rows, width = size
    cuda.shift = view == "unaligned"
    for rank in (0, 4):
        check_edit(cuda, stream(rows, width, dtype, view), make_form(rows, width, rank))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [F32, BF16, HALF], ids=names)
def test_edit_slots_and_coefficients(cuda, rank, dtype):
    rows, width = 43, 384
    hidden = stream(rows, width, dtype)
    for slots in (None, 1, 3):
        for coefficient in ("rows", "shared", None):
            check_edit(cuda, hidden, make_form(rows, width, rank, slots, coefficient))
    for kept in ("scale", "bias", "write", "scale offset", ""):
        check_edit(cuda, hidden, make_form(rows, width, rank, None, "rows", kept))


@pytest.mark.parametrize("size", WIDE, ids=str)
def test_wide_rows(cuda, size):
    rows, width = size
    for narrow, wide in PAIRS:
        x, residual = stream(rows, width, narrow), stream(rows, width, wide)
        check_edit_add_norm(cuda, x, residual, make_form(rows, width), 0, False)
        check_edit_add_norm(cuda, x, residual, make_form(rows, width, 2, None, "rows"), 2, True)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("width", [64, 65])
def test_untouched_rows_keep_their_bits(cuda, rank, width):
    """NaN payloads, negative zeros and subnormals too, whatever the parameters hold."""
    for dtype, bits in ((F32, torch.int32), (BF16, torch.int16), (HALF, torch.int16)):
        info = torch.iinfo(bits)
        hidden = torch.randint(info.min, info.max, (40, width), dtype=bits).view(dtype)
        form = make_form(40, width, rank, 2, "rows")
        form["slot"] = torch.tensor([-1, 2, 1000, -7] * 10, dtype=torch.int32)
        form["slot"][:6], form["coefficient"][:6] = 0, 0
        form["bias"][:] = torch.nan
        out, z = cuda.edit(hidden, form, want_z=rank > 0)
        assert same_bits(out, hidden)
        assert rank == 0 or not z[6:].any()
        if dtype == F32:
            continue
        hidden = torch.randn(40, width).to(dtype)
        residual = torch.randn(40, width).to(dtype)
        for on_sum in (False, True):
            assert torch.equal(cuda.edit_add(hidden, residual, form, on_sum)[0], residual + hidden)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("width", [384, 1030])
def test_identity_is_the_unedited(cuda, pair, width):
    x, residual = stream(33, width, pair[0]), stream(33, width, pair[1])
    for form in (make_form(33, width), {}):
        if form:
            form["scale"][:], form["bias"][:] = 1, 0
        assert torch.equal(cuda.edit(x, form)[0], x)
        for on_sum in (False, True):
            assert torch.equal(cuda.edit_add(x, residual, form, on_sum)[0], residual + x)


# edit_add and edit_add_norm


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("view", ["plain", "strided", "unaligned"])
def test_edit_add(cuda, size, pair, view):
    rows, width = size
    cuda.shift = view == "unaligned"
    x, residual = stream(rows, width, pair[0], view), stream(rows, width, pair[1], view)
    for rank, slots, coefficient, on_sum in [
        (0, None, None, False),
        (0, 2, "rows", True),
        (4, None, "shared", True),
    ]:
        form = make_form(rows, width, rank, slots, coefficient)
        got = cuda.edit_add(x, residual, form, on_sum, rank > 0)
        eager = reference.edit_add(x, residual, *reference_form(form, F32), on_sum, rank > 0)
        exact = reference.edit_add(
            *double((x, residual)), *reference_form(form, torch.float64), on_sum, rank > 0
        )
        assert_all("out z", got, exact, eager)


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


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["rms", "gemma", "layer"])
def test_edit_add_norm(cuda, size, pair, kind):
    rows, width = size
    if width == 1 and kind == 2:
        pytest.skip("a row of one column has no deviation")
    x, residual = stream(rows, width, pair[0], "strided"), stream(rows, width, pair[1])
    check_edit_add_norm(cuda, x, residual, make_form(rows, width), kind, False)
    check_edit_add_norm(cuda, x, residual, make_form(rows, width, 0, 3, "rows"), kind, True, affine=False)
    check_edit_add_norm(cuda, x, residual, make_form(rows, width, 3, 2, "rows"), kind, False)
    cuda.shift = 1
    x = stream(rows, width, pair[0], "unaligned")
    check_edit_add_norm(cuda, x, residual, make_form(rows, width, 5), kind, True)


# Gradients


def order_of(values, slot):
    return (
        None
        if values is None
        else torch.where((slot < 0)[:, None], 0, values)
        if slot is not None
        else values
    )


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


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_edit_backward(cuda, size, pair):
    rows, width = size
    check_edit_backward(cuda, rows, width, pair, make_form(rows, width))
    check_edit_backward(cuda, rows, width, pair, make_form(rows, width, 4), on_sum=True, view="strided")
    cuda.shift = 1
    check_edit_backward(cuda, rows, width, pair, make_form(rows, width, 3, 2, "rows"), view="unaligned")


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("slots", [None, 1, 3])
def test_edit_backward_slots_and_coefficients(cuda, rank, slots):
    rows, width = 523, 64
    for coefficient in ("rows", "shared", None):
        form = make_form(rows, width, rank, slots, coefficient)
        check_edit_backward(cuda, rows, width, (BF16, BF16), form)
        check_edit_backward(cuda, rows, width, (F32, F32), form, on_sum=True, without=("coefficient",))


@pytest.mark.parametrize(
    "without",
    [
        ("hidden",), ("scale", "coefficient"), ("bias", "coefficient", "read"), ("grad",), ("grad", "grad_z"),
        ("write", "coefficient"), ("grad_z", "offset"),
        ("scale", "bias", "read", "offset", "write", "coefficient"),
        ("hidden", "scale", "bias", "offset", "write", "coefficient"),
        ("hidden", "scale", "bias", "read", "write", "coefficient"),
        ("hidden", "scale", "bias", "read", "offset", "coefficient"),
    ],
    ids="-".join,
)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 9])
def test_edit_backward_of_what_is_wanted(cuda, without, rank):
    rows, width = 70, 72
    for slots in (None, 2):
        form = make_form(rows, width, rank, slots, "rows")
        check_edit_backward(cuda, rows, width, (BF16, BF16), form, without=without)
    probe = make_form(rows, width, rank, None, None, "offset")
    check_edit_backward(cuda, rows, width, (BF16, BF16), probe, without=without)


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


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["rms", "gemma", "layer"])
def test_edit_add_norm_backward(cuda, size, pair, kind):
    rows, width = size
    check_norm_backward(cuda, rows, width, pair, make_form(rows, width), kind, False)
    check_norm_backward(cuda, rows, width, pair, make_form(rows, width, 4, None, "rows"), kind, True)
    cuda.shift = 1
    check_norm_backward(
        cuda, rows, width, pair, make_form(rows, width, 3, 2, "rows"), kind, kind == 1, "unaligned"
    )


@pytest.mark.parametrize(
    "without",
    [
        ("grad_residual",), ("grad_normed",), ("weight",), ("x", "coefficient"), ("residual",),
        ("scale", "bias", "read", "offset", "write", "coefficient", "weight"),
        ("x", "residual", "scale", "bias", "read", "offset", "coefficient"),
        ("x", "residual", "scale", "bias", "read", "offset", "write", "coefficient"),
    ],
    ids="-".join,
)  # fmt: skip
def test_edit_add_norm_backward_of_what_is_wanted(cuda, without):
    rows, width = 300, 64
    for rank, slots, on_sum, kind in [(0, None, False, 0), (0, 3, True, 2), (9, 3, False, 2)]:
        form = make_form(rows, width, rank, slots, "rows")
        check_norm_backward(cuda, rows, width, (BF16, BF16), form, kind, on_sum, without=without)


@pytest.mark.parametrize("size", [(3, 4104), (2, 8192), (2, 8200)], ids=str)
def test_wide_gradients(cuda, size):
    for pair in ((F32, F32), (BF16, BF16)):
        check_edit_backward(cuda, *size, pair, make_form(*size, 2, None, "rows"))
        check_norm_backward(cuda, *size, pair, make_form(*size, 2, None, "rows"), 2, True)


# project


@pytest.mark.parametrize("rank", [1, 4, 17, 64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_project(cuda, size, rank):
    rows, width = size
    for dtype in (F32, BF16, HALF):
        hidden, grad_z = stream(rows, width, dtype, "strided"), torch.randn(rows, rank)
        form = make_form(rows, width, rank)
        read, offset = form["read"], form["offset"]
        got = cuda.project(hidden, read, offset)
        assert_promise(
            "z",
            got,
            reference.project(*double((hidden, read, offset))),
            reference.project(hidden, read, offset),
        )
        assert same_bits(cuda.edit(hidden, form, want_z=True)[1], got)
        for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            given = hidden if needs[1] else None
            got = cuda.project_backward(grad_z, given, read if needs[0] else None, needs, dtype, width)
            eager = reference.project_backward(grad_z, hidden, read, needs, dtype)
            exact = reference.project_backward(*double((grad_z, hidden, read)), needs, torch.float64)
            h = hidden.double().abs()
            largest = (None, grad_z.double().abs().T @ h, grad_z.double().abs().sum(0))
            assert_all("d_hidden d_read d_offset", got, exact, eager, largest)


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


@pytest.mark.parametrize(("rows", "width", "dtype"), [(300, 64, F32), (300, 64, BF16), (3, 1030, BF16)])
def test_bits_do_not_depend_on_the_order_of_threads_or_the_grid(cuda, rows, width, dtype):
    """A missing barrier shows in one of the orders, a sum that follows the launch in one of the grids."""
    first = every_op(cuda, rows, width, dtype)
    for multiprocessors, seed in [(3, 0), (3, 1), (132, 7), (1, 8)]:
        cuda.schedule(multiprocessors, seed)
        again = every_op(cuda, rows, width, dtype)
        assert not [name for name, t in first.items() if not same_bits(t, again[name])], (
            multiprocessors,
            seed,
        )


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("rank", [0, 5])
def test_a_row_does_not_depend_on_the_others(cuda, width, rank):
    x, residual = stream(9, width, BF16), stream(9, width, BF16)
    form, weight = make_form(9, width, rank), torch.rand(width).to(BF16)
    whole = cuda.edit_add_norm(x, residual, weight, None, form, kind=2, want_z=rank > 0)
    d_whole = cuda.edit_backward(
        residual, x, None, form, None, None, [True] + [False] * 6, BF16, (9, width)
    )[0]  # fmt: skip
    for row in range(9):
        one = slice(row, row + 1)
        alone = cuda.edit_add_norm(x[one], residual[one], weight, None, form, kind=2, want_z=rank > 0)
        assert all(same_bits(a, None if b is None else b[one]) for a, b in zip(alone, whole, strict=True))
        d_alone = cuda.edit_backward(
            residual[one], x[one], None, form, None, None, [True] + [False] * 6, BF16, (1, width)
        )[0]  # fmt: skip
        assert same_bits(d_alone, d_whole[one])


def test_views_slide_across_every_alignment(cuda):
    width, form = 64, make_form(5, 64, 2)
    for start in range(9):
        rows = torch.randn(5 * 72 + 16).to(BF16)[start : start + 5 * 72].view(5, 72)[:, :width]
        for cuda.shift in (0, start % 3):
            check_edit(cuda, rows, form)
            check_edit(cuda, rows, make_form(5, width, 0, None, "rows"))
            check_edit_add_norm(cuda, rows, rows, form, 0, False)
            check_edit_backward(cuda, 5, width, (BF16, BF16), form)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("slots", [None, 2])
def test_no_rows(cuda, rank, slots):
    form = make_form(0, 64, rank, slots, "rows")
    x = torch.empty(0, 64, dtype=BF16)
    z = torch.empty(0, rank) if rank else None
    assert cuda.edit(x, form, rank > 0)[0].shape == (0, 64)
    cuda.edit_add_norm(x, x, torch.rand(64).to(BF16), None, form, want_z=rank > 0)
    needs = [n == "hidden" or form.get(n) is not None for n in ("hidden", *harness.PARAMETERS, "coefficient")]
    got = cuda.edit_backward(x, x, None, form, None, z, needs, BF16, (0, 64))
    assert not any(t.any() for t in got if t is not None)


@pytest.mark.parametrize("address", [None, 0, 4], ids=["null", "aligned", "unaligned"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("slots", [None, 2])
def test_no_columns(cuda, monkeypatch, address, rank, slots):
    """z, the statistics, d_offset and d_coefficient exist all the same; empty tensors may have an address."""
    rows, guard = 5, torch.full((64,), torch.nan)
    if address is not None:
        at = guard.data_ptr() + address
        monkeypatch.setattr(harness, "pointer", lambda t: None if t is None else t.data_ptr() or at)
        monkeypatch.setattr(harness, "stride", lambda t: 0 if t is None else t.stride(0) if t.numel() else 0)
    form = make_form(rows, 0, rank, slots, "rows")
    exact = reference_form(form, torch.float64)
    z = reference.edit(torch.empty(rows, 0).double(), *exact, rank > 0)[1]
    for narrow, wide in PAIRS:
        x, residual = stream(rows, 0, narrow), stream(rows, 0, wide)
        check_edit(cuda, x, form)
        assert rank == 0 or torch.equal(cuda.edit_add(x, residual, form, False, True)[1].double(), z)
        for kind in (0, 1, 2):
            normed, got, mean, rstd = cuda.edit_add_norm(
                x, residual, residual[0], None, form, True, kind, want_z=rank > 0
            )[1:]
            assert normed.shape == (rows, 0) and (got is None or torch.equal(got.double(), z))
            assert rstd.isnan().all() and (mean is None or mean.isnan().all())  # means over no columns
            check_norm_backward(cuda, rows, 0, (narrow, wide), form, kind, kind == 1)
        check_edit_backward(cuda, rows, 0, (narrow, wide), form)
        check_edit_backward(cuda, rows, 0, (narrow, wide), form, without=("coefficient",))
        if rank and slots is None:
            got = cuda.project(x, form["read"], form["offset"])
            assert torch.equal(got, form["offset"].expand(rows, rank))
            grad_z = torch.randn(rows, rank)
            got = cuda.project_backward(grad_z, x, form["read"], (True, True, True), narrow, 0)
            exact_back = reference.project_backward(
                *double((grad_z, x, form["read"])), (True, True, True), torch.float64
            )
            assert_all("d_hidden d_read d_offset", got, exact_back, [t.to(F32) for t in exact_back])
    assert guard.isnan().all()


def pairwise(values):
    """The pairwise tree over the first dimension, padded with zeros to a power of two."""
    while len(values) > 1:
        values = torch.cat([values, torch.zeros_like(values[: len(values) % 2])])
        values = values[::2] + values[1::2]
    return values[0]


@pytest.mark.parametrize("units", [1, 7, 8, 9, 37, 150])
def test_column_sums_follow_the_tree_that_is_promised(cuda, units):
    """To the bit: eight running sums of a block's rows, pairwise, and the blocks pairwise."""
    grad = torch.randn(256 * units - 251, 8)
    form, needs = (
        {"bias": torch.zeros(8)},
        [n == "bias" for n in ("hidden", *harness.PARAMETERS, "coefficient")],
    )
    for cuda_sms in (1, 132):
        cuda.schedule(cuda_sms)
        got = cuda.edit_backward(grad, None, None, form, None, None, needs, F32, grad.shape)[2]
        partials = []
        for rows in grad.split(256):
            lines = [torch.zeros(8)] * 8
            for i, row in enumerate(rows):
                lines[i % 8] = lines[i % 8] + row
            partials.append(pairwise(torch.stack(lines)))
        assert torch.equal(got, pairwise(torch.stack(partials)))


def test_unknown_dtypes_are_refused(cuda):
    x, out = torch.randn(3, 64), torch.zeros(3, 64)
    args = harness.EditArgs(3, 64, cuda.form({}), 7, x.data_ptr(), 64, out.data_ptr(), None)
    assert cuda.library.edit(harness.ctypes.byref(args)) == 1
    assert not out.any()


# moments and value_ascent


@pytest.mark.parametrize("dtype", [F32, BF16, HALF], ids=names)
@pytest.mark.parametrize(
    ("rows", "width", "groups", "view"),
    [(1, 64, 0, "plain"), (7, 1, 2, "plain"), (7, 100, 3, "strided"), (300, 104, 0, "unaligned"), (700, 264, 3, "plain"),
     (5, 33, 40, "plain")],
)  # fmt: skip
def test_moments(cuda, rows, width, groups, view, dtype):
    hidden = stream(rows, width, dtype, view) + 1000
    group = torch.randint(-1, groups + 1, (rows,), dtype=torch.int32) if groups else None
    count, *exact = reference.moments(hidden, group, max(groups, 1))
    results = []
    for seed, multiprocessors in ((0, 3), (1, 100), (7, 1)):
        cuda.schedule(multiprocessors, seed)
        results.append(cuda.moments(hidden, group, max(groups, 1)))
        assert_exact_moments((count, *results[-1]), (count, *exact))
    assert all(same_bits(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_moments_of_rows_after_a_huge_one(cuda):
    hidden = torch.randn(300, 64)
    hidden[0] *= 3000
    count, *exact = reference.moments(hidden, None, 1)
    assert_exact_moments((count, *cuda.moments(hidden, None, 1)), (count, *exact))


def test_moments_read_each_row_once_but_for_a_blocks_sample(cuda):
    cuda.moments(stream(512, 256, BF16), None, 1)
    assert cuda.moved["hidden"][0] == 1 + 32 / 256  # of 256 rows the first 32 are read for the shift, too


@pytest.mark.parametrize("units", [1, 33, 70, 300, 1100])
def test_value_ascent_steps(cuda, units):
    ascent = importlib.import_module(f"{reference.__name__}.value_ascent")
    case = ascent_support.make(rows=3, width=45, units=units, steps=8)
    results = []
    for seed in (0, 1, 7):
        cuda.schedule(3, seed)
        results.append(ascent.ascend(*case.arguments(), cuda.total_gradient))
        ascent_support.assert_promise(case, results[-1])
    assert all(same_bits(result, results[0]) for result in results)
    z, slope, rest = case.z_and_slope()
    alone = [cuda.total_gradient(z[r : r + 1].clone(), slope[r : r + 1].clone(), *rest) for r in range(3)]
    assert same_bits(torch.cat(alone), cuda.total_gradient(z, slope, *rest))


def test_value_ascent_of_a_net_beyond_the_shared_memory_is_refused(cuda):
    from fastedit.native import MAX_UNITS

    cuda.schedule(shared_kib=99)
    z, head = torch.ones(1, MAX_UNITS), torch.ones(MAX_UNITS)
    cuda.total_gradient(z, z, head, torch.empty(0), 1, 0.5)  # one step reads no row of the Gram matrix
    z, head = torch.ones(1, 7000), torch.ones(7000)
    with pytest.raises(AssertionError, match="error 9"):
        cuda.total_gradient(z, z, head, torch.empty(0), 1, 0.5)
