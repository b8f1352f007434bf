"""Every Triton op, forward and backward, under Triton's interpreter against a float64 reference.

Not collected by name: test_triton_interpreter.py runs it with TRITON_INTERPRET=1.
"""

import pytest
import torch
from fastedit.kernels import reference
from fastedit.kernels import triton as backend
from fastedit.kernels.reference.edit_add_norm import norm, norm_backward
from triton_support import (
    BF16,
    F16,
    F32,
    GEMMA,
    LAYER,
    NAMES,
    RMS,
    all_needs,
    assert_same,
    check,
    check_all,
    double,
    eager_edit,
    eager_edit_add,
    eager_gradients,
    exact_form,
    in_range,
    make_form,
    poisoned_memory,  # noqa: F401, for every test here
    view,
)  # fmt: skip

# --- the table ------------------------------------------------------------------------------------

# Rows: one, fewer and more than a block of the kernels, more than one block of 256. Widths: whole tiles,
# ragged tiles (and one column, below). Ranks: none, register vectors (1, 4), padded and whole tensor-core
# products (17, 64).
CASES = [
    # rows width rank dtype residual slots coefficient strided
    (1, 64, 0, F32, F32, 0, "none", False),
    (7, 100, 0, BF16, BF16, 0, "rows", True),
    (300, 100, 0, BF16, BF16, 0, "none", False),
    (300, 100, 0, F16, F16, 3, "rows", True),
    (7, 384, 0, BF16, F32, 2, "none", False),
    (300, 64, 1, BF16, BF16, 0, "one", True),
    (7, 384, 4, F16, F16, 3, "none", True),
    (7, 100, 4, BF16, F32, 0, "rows", True),
    (300, 64, 17, F32, F32, 0, "none", False),
    (7, 100, 17, BF16, BF16, 0, "rows", True),
    (7, 100, 17, F32, F32, 3, "rows", False),
    (1, 128, 64, BF16, BF16, 0, "none", False),
    (7, 64, 64, F16, F32, 0, "one", True),
]
KEYS = "rows, width, rank, dtype, residual_dtype, slots, coefficient, strided"


def name_case(case):
    rows, width, rank, dtype, residual_dtype, slots, coefficient, strided = case
    dtypes = "+".join(str(d).removeprefix("torch.") for d in dict.fromkeys((dtype, residual_dtype)))
    return f"{rows}x{width}-rank{rank}-{dtypes}-slots{slots}-k_{coefficient}{'-strided' if strided else ''}"


every_case = pytest.mark.parametrize(KEYS, [pytest.param(*c, id=name_case(c)) for c in CASES])


@every_case
def test_edit(rows, width, rank, dtype, residual_dtype, slots, coefficient, strided):
    h, form = view(rows, width, dtype, strided), make_form(rows, width, rank, slots, coefficient)
    before = h.clone()
    out, z = backend.edit(h, *form, True)
    exact_out, exact_z = reference.edit(h.double(), *exact_form(form), True)
    eager_out, eager_z = eager_edit(h, *in_range(form))
    check("out", out, exact_out, eager_out)
    check("z", z, exact_z, eager_z)
    assert backend.edit(h, *form, False)[1] is None
    assert torch.equal(h, before)

    grad = view(rows, width, dtype, strided)
    grad_z = torch.randn(rows, rank) if rank else None
    found = backend.edit_backward(grad, h, None, *form, grad_z, z, all_needs(form), dtype)
    exact = reference.edit_backward(
        *double(grad, h), None, *exact_form(form), *double(grad_z, exact_z), all_needs(form), torch.float64
    )
    eager = eager_gradients(lambda h, f: eager_edit(h, *f), [h], in_range(form), grad, grad_z)
    check_all(NAMES, found, exact, eager)


@every_case
@pytest.mark.parametrize("on_sum", [False, True], ids=["on_x", "on_sum"])
def test_edit_add(rows, width, rank, dtype, residual_dtype, slots, coefficient, strided, on_sum):
    x, residual = view(rows, width, dtype, strided), view(rows, width, residual_dtype, strided)
    form = make_form(rows, width, rank, slots, coefficient)
    out, z = backend.edit_add(x, residual, *form, on_sum, True)
    exact_out, exact_z = reference.edit_add(*double(x, residual), *exact_form(form), on_sum, True)
    eager_out, eager_z = eager_edit_add(x, residual, in_range(form), on_sum)
    check("out", out, exact_out, eager_out)
    check("z", z, exact_z, eager_z)
    if not on_sum:
        return  # the gradients are edit's

    grad = view(rows, width, residual_dtype, strided)
    found = backend.edit_add_backward(grad, x, residual, *form, None, z, all_needs(form), residual_dtype)
    exact = reference.edit_add_backward(
        *double(grad, x, residual), *exact_form(form), None, exact_z, all_needs(form), torch.float64
    )
    _, *eager = eager_gradients(
        lambda x, r, f: eager_edit_add(x, r, f, True), [x, residual], in_range(form), grad, None
    )
    check_all(NAMES, found, exact, eager)


def eager_norm(r, weight, norm_bias, kind, eps):
    """As transformers writes them: statistics in fp32, Llama's and Gemma's roundings, torch's layer_norm."""
    if kind == LAYER:
        return torch.nn.functional.layer_norm(r, r.shape[-1:], weight, norm_bias, eps)
    unit = r.float() * torch.rsqrt(r.float().square().mean(-1, keepdim=True) + eps)
    return weight * unit.to(r.dtype) if kind == RMS else (unit * (1 + weight.float())).to(r.dtype)


# A norm kind a case, on x and on the sum in turn; every kind meets every kernel.
NORM_CASES = [(*c, i % 3, i % 2 == 1) for i, c in enumerate(CASES)]
NORM_CASES += [(7, 100, 0, BF16, BF16, 0, "none", False, k, k == 1) for k in (RMS, GEMMA, LAYER)]
NORM_CASES += [(7, 100, 17, BF16, BF16, 0, "none", False, k, k != 1) for k in (RMS, GEMMA, LAYER)]


def make_norm(width, kind, dtype):
    weight = (1 + 0.2 * torch.randn(width) if kind != GEMMA else 0.2 * torch.randn(width)).to(dtype)
    return weight, torch.randn(width).to(dtype) if kind == LAYER else None


@pytest.mark.parametrize(
    KEYS + ", kind, on_sum",
    [
        pytest.param(*c, id=f"{name_case(c[:8])}-{('rms', 'gemma', 'layer')[c[8]]}-{('x', 'sum')[c[9]]}")
        for c in NORM_CASES
    ],
)
def test_edit_add_norm(rows, width, rank, dtype, residual_dtype, slots, coefficient, strided, kind, on_sum):
    x, residual = view(rows, width, dtype, strided), view(rows, width, residual_dtype, strided)
    form, eps = make_form(rows, width, rank, slots, coefficient), 1e-5
    weight, norm_bias = make_norm(width, kind, residual_dtype)
    out, normed, z, mean, rstd = backend.edit_add_norm(
        x, residual, weight, norm_bias, *form, on_sum, kind, eps, True
    )
    exact_out, exact_z = reference.edit_add(*double(x, residual), *exact_form(form), on_sum, True)
    check("out", out, exact_out, eager_edit_add(x, residual, in_range(form), on_sum)[0])
    exact_normed, exact_mean, exact_rstd = norm(*double(out, weight, norm_bias), kind, eps)
    plain_normed, plain_mean, plain_rstd = norm(out, weight, norm_bias, kind, eps)
    check("normed", normed, exact_normed, eager_norm(out, weight, norm_bias, kind, eps))
    check("mean", mean, exact_mean, plain_mean)
    check("rstd", rstd, exact_rstd, plain_rstd)
    if residual_dtype != F32:
        # The kind's own order of roundings: fp32 noise moves 1 value in 2^13 to its neighbour, the other
        # order 1 in 3.
        assert (normed != plain_normed).double().mean() < 0.01
    only = backend.edit_add_norm(
        x, residual, weight, norm_bias, *form, on_sum, kind, eps, False, False, False
    )
    assert only[0] is None and only[2:] == (None, None, None)
    assert torch.equal(only[1], normed)

    check_norm_backward(
        x, residual, weight, norm_bias, form, on_sum, kind, eps, (out, z, mean, rstd),
        (exact_z, exact_mean, exact_rstd), strided,
    )  # fmt: skip


def check_norm_backward(x, residual, weight, norm_bias, form, on_sum, kind, eps, saved, exact_saved, strided):
    (rows, width), dtype, residual_dtype = x.shape, x.dtype, residual.dtype
    out, z, mean, rstd = saved
    exact_z, exact_mean, exact_rstd = exact_saved
    grad_residual, grad_normed = (
        view(rows, width, residual_dtype, strided),
        view(rows, width, residual_dtype, strided),
    )
    grad_z = torch.randn_like(z) if z is not None else None
    needs, needs_norm = (*all_needs(form), True), (True, norm_bias is not None)
    args = (on_sum, kind, needs, needs_norm)
    found = backend.edit_add_norm_backward(
        grad_residual,
        grad_normed,
        out,
        x,
        residual,
        weight,
        mean,
        rstd,
        *form,
        grad_z,
        z,
        *args,
        dtype,
        residual_dtype,
    )
    exact = reference.edit_add_norm_backward(
        *double(grad_residual, grad_normed, out, x, residual, weight), exact_mean, exact_rstd,
        *exact_form(form), *double(grad_z), exact_z, *args, torch.float64, torch.float64,
    )  # fmt: skip

    leaves = [t.detach().clone().requires_grad_() for t in (out, weight, norm_bias) if t is not None]
    normed = eager_norm(*leaves, *[None] * (3 - len(leaves)), kind, eps)
    d_out, *_ = torch.autograd.grad(normed, leaves, grad_normed)
    total = d_out + grad_residual
    eager = eager_gradients(
        lambda x, r, f: eager_edit_add(x, r, f, on_sum), [x, residual], in_range(form), total, grad_z
    )
    # d_weight and d_norm_bias are fp32 sums where autograd rounds to the weight's dtype: fp32 is the measure.
    r32 = [t if t is None else t.float() for t in (grad_normed, out, weight, mean, rstd)]
    _, *plain_norm = norm_backward(*r32, kind)
    check_all(("x", "residual", *NAMES[1:], "weight", "norm_bias"), found, exact, [*eager, *zip(plain_norm)])


@pytest.mark.parametrize("rank", [0, 4, 17])
def test_one_column(rank):
    """In halves of small integers everything is exact: a single number says nothing about rounding."""

    def halves(*shape):
        return torch.randint(-4, 5, shape) / 2

    h, residual, grad, grad_z = halves(7, 1), halves(7, 1), halves(7, 1), halves(7, rank) if rank else None
    low = (halves(rank, 1), halves(rank), halves(rank, 1)) if rank else (None, None, None)
    form = (halves(1), halves(1), *low, None, torch.tensor([0.0, 1.0, 0.5, 1.0, 0.5, 0.0, 0.25]))
    out, z = backend.edit(h, *form, True)
    assert_same((out, z), reference.edit(h, *form, True))
    assert_same(backend.edit_add(h, residual, *form, True), reference.edit_add(h, residual, *form, True))
    args = (grad, h, None, *form, grad_z, z, all_needs(form), F32)
    assert_same(backend.edit_backward(*args), reference.edit_backward(*args))
    weight, norm_bias = halves(1), halves(1)
    _, normed, *_ = backend.edit_add_norm(h, residual, weight, norm_bias, *form, False, LAYER, 1e-5)
    assert torch.equal(normed, norm_bias.expand(7, 1))
    if rank:
        assert torch.equal(backend.project(h, *low[:2]), reference.project(h, *low[:2]))


@pytest.mark.parametrize("rank, slots, kind", [(0, 0, RMS), (1, 2, LAYER), (1, 0, GEMMA)])
def test_rows_too_wide_to_stay_on_chip(rank, slots, kind):
    x, residual = view(2, 16500, BF16, True), view(2, 16500, BF16, True)
    form, (weight, norm_bias) = make_form(2, 16500, rank, slots, "rows"), make_norm(16500, kind, BF16)
    out, normed, z, mean, rstd = backend.edit_add_norm(
        x, residual, weight, norm_bias, *form, False, kind, 1e-5, True
    )
    exact_out, exact_z = reference.edit_add(*double(x, residual), *exact_form(form), False, True)
    eager_out, eager_z = eager_edit_add(x, residual, in_range(form), False)
    check("out", out, exact_out, eager_out)
    check("z", z, exact_z, eager_z)
    exact, plain = norm(*double(out, weight, norm_bias), kind, 1e-5), norm(out, weight, norm_bias, kind, 1e-5)
    check("normed", normed, exact[0], eager_norm(out, weight, norm_bias, kind, 1e-5))
    assert (normed != plain[0]).double().mean() < 0.01
    check("mean", mean, *(t[1] for t in (exact, plain)))
    check("rstd", rstd, *(t[2] for t in (exact, plain)))
    alone = backend.edit_add_norm(
        x, residual, weight, norm_bias, *form, False, kind, 1e-5, False, False, False
    )
    assert torch.equal(alone[1], normed)


@pytest.mark.parametrize("rows, width, rank", [(1, 64, 1), (7, 384, 4), (7, 100, 17), (70, 64, 64)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_project(rows, width, rank, dtype):
    h, (_, _, read, offset, _, _, _) = view(rows, width, dtype, True), make_form(rows, width, rank, 0, "none")
    check(
        "z",
        backend.project(h, read, offset),
        reference.project(*double(h, read, offset)),
        h.float() @ read.T + offset,
    )
    check("z", backend.project(h, read, None), reference.project(*double(h, read), None), h.float() @ read.T)

    grad_z = torch.randn(rows, rank)
    needs = (True, True, True)
    found = backend.project_backward(grad_z, h, read, needs, dtype)
    exact = reference.project_backward(*double(grad_z, h, read), needs, torch.float64)
    eager = ((grad_z @ read).to(dtype), grad_z.T @ h.float(), grad_z.sum(0))
    for name, *triple in zip(("hidden", "read", "offset"), found, exact, eager, strict=True):
        check(f"d_{name}", *triple)
    assert backend.project_backward(grad_z, h, read, (False, True, False), dtype)[::2] == (None, None)
