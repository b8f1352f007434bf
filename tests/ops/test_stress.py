"""Hidden states as large models make them on a bad day: attention sinks of 1e4, denormals, the edge of fp16, squares beyond
fp32, and bases of fp8 and int8 weights. Every op and gradient is within the promise (oracle.py) against float64, or refused.
"""

import math

import pytest
import tiny_models as tiny
import torch
from oracle import FORM, KINDS, eager_edit, eager_norm, make_form
from torch import nn

import fastedit as fe
from fastedit import _native, ops

WIDTH, ROWS, RANKS = 96, 9, (0, 4)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def sinks(rows):
    rows[:, 7], rows[::3, 50] = 1e4, -1.2e4
    return rows


STRESS = {  # name: (rows of it from random ones, dtypes)
    "sinks": (sinks, (F32, BF16, F16)), "denormals": (lambda rows: rows * 1e-39, (F32, BF16)),
    "fp16 denormals": (lambda rows: rows * 1e-7, (F16,)), "fp16 edge": (lambda rows: rows * 3e4, (F16,)),
    "squares overflow": (lambda rows: rows * 1e25, (F32, BF16)),
    "beside nothing": (lambda rows: rows * (torch.arange(ROWS) % 2)[:, None], (F32, BF16, F16)),
}  # fmt: skip
CASES = [(name, dtype) for name, (_, dtypes) in STRESS.items() for dtype in dtypes]


@pytest.fixture(params=("baseline", "avx2", "avx512"), autouse=True)
def instruction_set(request):
    usual = _native.instruction_set()
    try:
        _native.set_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield
    _native.set_instruction_set(usual)


def rows_of(name, dtype, seed):
    made, _ = STRESS[name]
    return made(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))).to(dtype)


def unit(values, dtype):
    """The last place, in a dtype, of the largest of `values`: of denormals that of denormals."""
    info, largest = torch.finfo(dtype), float(values.abs().max())
    return info.eps * max(info.tiny, 2.0 ** math.floor(math.log2(largest)) if largest else 0.0)


def held(name, got, exact, eager):
    """The promise with each row in units of its own last place, so that a sink allows its neighbours nothing.

    Where float64's result has no place in the dtype, infinite or NaN; of fp16 there, and where the plain expression overflows
    on its way, nothing is promised.
    """
    assert got.shape == exact.shape and got.dtype == eager.dtype, name
    fits = torch.isfinite(exact.to(got.dtype))
    inside = fits & torch.isfinite(eager)
    assert torch.isfinite(got[inside]).all(), f"{name}: not finite where the plain expression is"
    assert got.dtype is F16 or not torch.isfinite(got[~fits]).any(), f"{name}: a number where there is none"
    tables = [t.reshape(-1, t.shape[-1]) for t in (inside, got.double(), exact, eager.double())]
    rows = [(g[at], x[at], e[at]) for at, g, x, e in zip(*tables, strict=True) if at.any()]
    of_eager = max((float((e - x).abs().max()) / unit(x, got.dtype) for _, x, e in rows), default=0.0)
    for number, (g, x, _) in enumerate(rows):
        error = float((g - x).abs().max()) / unit(x, got.dtype)
        assert error <= 2 * of_eager + 1, f"{name}, row {number}: error {error:.2f} units, the plain expression's {of_eager:.2f}"


def exact_of(form):
    return {name: None if t is None else t.detach().double() for name, t in form.items()}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_forward(name, dtype, rank):
    x, residual = rows_of(name, dtype, 1), rows_of(name, dtype, 2)
    form, weight = make_form(WIDTH, rank), torch.rand(WIDTH).to(dtype) + 0.5
    wide = exact_of(form)
    got = ops.edit(x, **form)
    held("edit", got, eager_edit(x.double(), wide), eager_edit(x, form).to(dtype))
    for on in ("x", "sum"):
        def added(x, residual, form, on=on):
            return residual + eager_edit(x, form) if on == "x" else eager_edit(residual + x, form)

        exact, eager = added(x.double(), residual.double(), wide), added(x, residual, form).to(dtype)
        held(f"edit_add on {on}", ops.edit_add(x, residual, **form, on=on), exact, eager)
        for kind in KINDS:
            stored, normed = ops.edit_add_norm(x, residual, weight, **form, on=on, kind=kind)
            held(f"edit_add_norm on {on}", stored, exact, eager)
            exact_normed = eager_norm(stored.double(), weight.double(), None, kind, 1e-6)
            held(f"{kind} norm", normed, exact_normed, eager_norm(stored, weight, None, kind, 1e-6))
    if rank:
        read = form["read"]
        z = ops.project(x, read)
        held("project", z, x.double() @ read.double().T, x.float() @ read.T)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_backward(name, dtype, rank):
    x, residual, grad = rows_of(name, dtype, 1), rows_of(name, dtype, 2), torch.randn(ROWS, WIDTH).to(dtype)
    form = {n: t for n, t in make_form(WIDTH, rank).items() if t is not None}

    def gradients(function, dtype):
        leaves = {n: t.detach().to(dtype if dtype is torch.float64 else F32).requires_grad_() for n, t in form.items()}
        rows = [t.detach().to(dtype).requires_grad_() for t in (x, residual)]
        out = function(*rows, {n: leaves.get(n) for n in FORM})
        return torch.autograd.grad(out, [*rows, *leaves.values()], grad.to(out.dtype))

    for on in ("x", "sum"):
        def plain(x, residual, form, on=on):
            out = residual + eager_edit(x, form) if on == "x" else eager_edit(residual + x, form)
            return out.to(x.dtype)

        got = gradients(lambda x, r, form, on=on: ops.edit_add(x, r, **form, on=on), dtype)
        exact, eager = gradients(plain, torch.float64), gradients(plain, dtype)
        for leaf, g, e, p in zip(("x", "residual", *form), got, exact, eager, strict=True):
            held(f"d_{leaf} on {on}", g, e, p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sinks", "beside nothing", "denormals"])
def test_backward_through_the_norm(name, kind):
    """In the mean of eight draws: a norm's gradient cancels, and what one draw leaves of it is rounding, ours or eager's."""

    def gradients(norm, leaves, grad, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = norm(*leaves[:2], dict(zip(form, leaves[2:-1], strict=True)), leaves[-1])
        return torch.autograd.grad(out, leaves, grad.to(dtype))

    def plain(x, residual, form, weight):
        return eager_norm(residual + eager_edit(x, form), weight, None, kind, 1e-6)

    def fused(x, residual, form, weight):
        return ops.edit_add_norm(x, residual, weight, **form, kind=kind)[1]

    errors = {}  # leaf: (ours, the plain expression's), each row's largest in units of its own last place
    for draw in range(8):
        torch.manual_seed(draw)
        form = make_form(WIDTH, 2)
        leaves = rows_of(name, F32, 2 * draw), rows_of(name, F32, 2 * draw + 1), *form.values(), torch.rand(WIDTH) + 0.5
        grad = torch.randn(ROWS, WIDTH)
        found = [gradients(*given) for given in ((fused, leaves, grad, F32), (plain, leaves, grad, F32))]
        exact = gradients(plain, leaves, grad, torch.float64)
        for leaf, g, p, e in zip(("x", "residual", *form, "weight"), *found, exact, strict=True):
            assert torch.isfinite(g).all() and g.shape == e.shape
            for rows in zip(*(t.double().reshape(-1, t.shape[-1]) for t in (g, p, e)), strict=True):
                one = unit(rows[2], F32)
                errors.setdefault(leaf, []).append([float((t - rows[2]).abs().max()) / one for t in rows[:2]])
    for leaf, each in errors.items():
        ours, eager = (sum(some) / len(some) for some in zip(*each, strict=True))
        assert ours <= 2 * eager + 1, f"d_{leaf}: error {ours:.2f} units in the mean, the plain expression's {eager:.2f}"


def test_moments_of_sinks_and_denormals():
    for name in STRESS:
        rows = rows_of(name, F32, 1)
        count, mean, m2 = ops.moments(rows)
        wide = rows.double()
        torch.testing.assert_close(mean[0], wide.mean(0), rtol=1e-6, atol=1e-45)
        if name != "squares overflow":
            torch.testing.assert_close(m2[0], (wide - wide.mean(0)).square().sum(0), rtol=1e-5, atol=1e-44)
        assert count.tolist() == [ROWS]


# --- bases ----------------------------------------------------------------------------------------------------------------


class Stored(nn.Module):
    """A Linear whose weight lies in fp8 or int8 with a scale, as quantized checkpoints keep it."""

    def __init__(self, linear, dtype):
        super().__init__()
        largest = 448.0 if dtype is torch.float8_e4m3fn else 127.0
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = nn.Buffer(linear.weight.detach().abs().max() / largest)
        stored = linear.weight.detach() / self.scale
        self.weight = nn.Parameter((stored if dtype.is_floating_point else stored.round()).to(dtype), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_base_of_small_weights(dtype):
    model = tiny.build("llama")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, Stored(child, dtype))
    given = tiny.inputs("llama")
    before = model(**given).logits.detach()
    vector = torch.randn(tiny.WIDTH)
    with fe.patch(model, [fe.Steer(vector, site="mlp"), fe.RED()], freeze=True) as handle:
        found = model(**given).logits
        found.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in handle.parameters())
        with pytest.raises(ValueError, match=r"float8|int8|quantised|plain"):
            handle.merge()
        assert torch.equal(model(**given).logits, found)
    assert torch.equal(model(**given).logits, before)
    hooks = [layer.mlp.register_forward_hook(lambda module, args, out: out + vector) for layer in model.model.layers]
    torch.testing.assert_close(found, model(**given).logits, rtol=1e-5, atol=1e-5)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_rows_of_small_dtypes_are_refused(dtype):
    rows, scale = torch.ones(3, 8).to(dtype), torch.ones(8)
    for call in (
        lambda: ops.edit(rows, scale), lambda: ops.edit_add(rows, rows, scale), lambda: ops.project(rows, scale[None]),
        lambda: ops.edit_add_norm(rows, rows, scale, scale), lambda: ops.moments(rows),
        lambda: ops.edit(scale[None], scale.to(dtype)),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="expected float32"):
            call()
