"""Every op, forward and backward, on every backend that can run here, against float64 and eager PyTorch."""

import itertools
import os

import pytest
import torch
from oracle import (
    FORM,
    assert_promise,
    doubled,
    eager_edit,
    eager_norm,
    exact_edit,
    exact_edit_add,
    exact_norm,
    make_form,
)

from fastedit import dispatch, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 1: one column; 100: no vector divides it; 384: MiniLM; 1030: vectors, then a tail of six.
WIDTHS = [1, 100, 384, 1030]
LEADS = [(1,), (7,), (2, 5, 30)]


def backends():
    for name in dispatch.BACKENDS:
        marks = [pytest.mark.gpu] if name in ("cuda", "triton") else []
        yield pytest.param(name, marks=marks)


@pytest.fixture(params=list(backends()))
def device(request, monkeypatch):
    """The device to test on, with its backend forced: it serves or the test fails."""
    monkeypatch.setenv("FASTEDIT_BACKEND", request.param)
    dispatch.select.cache_clear()
    yield "cuda" if request.param in ("cuda", "triton") else "cpu"
    dispatch.select.cache_clear()


def rows(lead, width, dtype, device, **options):
    return torch.randn(*lead, width, device=device).to(dtype).requires_grad_(options.get("grad", False))


def form_on(device, *args, **kwargs):
    return {n: None if p is None else p.to(device) for n, p in make_form(*args, **kwargs).items()}


def strengths(kind, lead, device):
    if kind == "none":
        return None
    if kind == "dial":
        return torch.tensor([0.7], device=device)
    k = torch.rand(lead, device=device) * 2
    k.view(-1)[::3] = 0
    k.view(-1)[1::3] = 1
    return k


def pooled(results):
    return (torch.cat([t.reshape(-1) for t in column]) for column in zip(*results, strict=True))


@pytest.mark.parametrize("strength", ["none", "dial", "rows"])
@pytest.mark.parametrize("rank", [0, 1, 4, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edit(device, dtype, rank, strength):
    for width in WIDTHS:
        # The three shapes are one sample: of seven numbers alone eager's largest error is a lucky draw.
        form, results, projections = form_on(device, width, rank), [], []
        for lead in LEADS:
            h, k = rows(lead, width, dtype, device), strengths(strength, lead, device)
            out = ops.edit(h, **form, strength=k, return_projection=rank > 0)
            out, z = out if rank else (out, None)
            assert out.shape == h.shape and out.dtype == dtype
            exact, exact_z = exact_edit(h, form, strength=k)
            results.append((out, exact, eager_edit(h, form, k).to(dtype)))
            if rank:
                projections.append((z, exact_z, h.float() @ form["read"].T + form["offset"]))
        assert_promise(f"h' {width}", *pooled(results))
        if rank:
            assert_promise(f"z {width}", *pooled(projections))


@pytest.mark.parametrize("on", ["x", "sum"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    "dtype, residual_dtype", [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)], ids=str
)
def test_edit_add(device, dtype, residual_dtype, rank, on):
    if on == "sum" and dtype != residual_dtype and not _is_reference():
        pytest.skip("mixed dtypes under an edit of the sum are served by the reference alone")
    for lead, width in itertools.product(LEADS, WIDTHS):
        x, residual = rows(lead, width, dtype, device), rows(lead, width, residual_dtype, device)
        form = form_on(device, width, rank)
        out = ops.edit_add(x, residual, **form, on=on)
        assert out.dtype == torch.promote_types(dtype, residual_dtype)
        eager = eager_edit(residual + x, form) if on == "sum" else residual + eager_edit(x, form)
        assert_promise("residual'", out, exact_edit_add(x, residual, form, on), eager.to(out.dtype))


def _is_reference():
    """The reference sums by library products, whose order depends on the shape: it promises no bit-equality."""
    return os.environ["FASTEDIT_BACKEND"] == "reference"


@pytest.mark.parametrize("kind", ["rms", "gemma", "layer"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edit_add_norm(device, dtype, rank, kind):
    for lead, width in itertools.product(LEADS, WIDTHS):
        x, residual = rows(lead, width, dtype, device), rows(lead, width, dtype, device)
        weight = (1 + 0.2 * torch.randn(width, device=device)).to(dtype)
        norm_bias = torch.randn(width, device=device).to(dtype) if kind == "layer" else None
        form = form_on(device, width, rank)
        norm = {"norm_bias": norm_bias, "kind": kind, "eps": 1e-5}
        out, normed = ops.edit_add_norm(x, residual, weight, **form, **norm)
        assert torch.equal(out, ops.edit_add(x, residual, **form)), "residual' differs from edit_add's"
        eager = eager_norm(out, weight, norm_bias, kind, 1e-5)
        assert_promise("normed", normed, exact_norm(out, weight, norm_bias, kind, 1e-5), eager)
        skipped, same = ops.edit_add_norm(x, residual, weight, **form, **norm, return_residual=False)
        assert skipped is None
        assert torch.equal(same, normed)


@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project(device, dtype, rank):
    for lead, width in itertools.product(LEADS, WIDTHS):
        h, form = rows(lead, width, dtype, device), form_on(device, width, rank)
        z = ops.project(h, form["read"], form["offset"])
        eager = h.float() @ form["read"].T + form["offset"]
        exact = h.double() @ form["read"].double().T + form["offset"].double()
        assert_promise("z", z, exact, eager)
        assert z.dtype == torch.float32


def leaves(form, dtype=None):
    return {n: None if p is None else (p.to(dtype) if dtype else p).detach().requires_grad_() for n, p in form.items()}


def grads_of(output, grad, tensors):
    return torch.autograd.grad(output, [t for t in tensors if t is not None], grad, allow_unused=True)


def names_of(tensors):
    return [name for name, t in tensors.items() if t is not None]


@pytest.mark.parametrize("strength", ["none", "rows"])
@pytest.mark.parametrize("rank", [0, 1, 4, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edit_backward(device, dtype, rank, strength):
    results = {}
    for lead in [(1,), (7,), (2, 5, 90)]:
        width = 100
        h, form = rows(lead, width, dtype, device), form_on(device, width, rank)
        k = strengths(strength, lead, device)
        grad = rows(lead, width, dtype, device)

        def run(function, h, form, k, grad):
            inputs = {"hidden": h.detach().requires_grad_(), **leaves(form, None if h.dtype != torch.float64 else torch.float64)}
            inputs["strength"] = None if k is None else k.detach().requires_grad_()
            out = function(**inputs)
            return grads_of(out, grad.to(out.dtype), inputs.values()), names_of(inputs)

        got, names = run(ops.edit, h, form, k, grad)
        eager, _ = run(lambda hidden, strength, **form: eager_edit(hidden, form, strength).to(dtype), h, form, k, grad)
        exact, _ = run(
            lambda hidden, strength, **form: eager_edit(hidden, form, strength),
            h.double(), doubled(form), doubled(k), grad.double(),
        )  # fmt: skip
        for name, *three in zip(names, got, exact, eager, strict=True):
            results.setdefault(name, []).append(three)
    for name, threes in results.items():
        assert_promise(f"d_{name}", *pooled(threes))


@pytest.mark.parametrize("on", ["x", "sum"])
@pytest.mark.parametrize("kind", [None, "rms", "gemma", "layer"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edit_add_norm_backward(device, dtype, rank, kind, on):
    """edit_add (kind None) and edit_add_norm; the norm's gradients are taken at the residual as stored."""
    results = {}
    for lead in [(1,), (3, 90)]:
        width = 100
        x, residual = rows(lead, width, dtype, device), rows(lead, width, dtype, device)
        form = form_on(device, width, rank)
        weight = (1 + 0.2 * torch.randn(width, device=device)).to(dtype)
        norm_bias = torch.randn(width, device=device).to(dtype) if kind == "layer" else None
        grads = [rows(lead, width, dtype, device) for _ in range(1 if kind is None else 2)]

        def ours(x, residual, weight, norm_bias, **form):
            if kind is None:
                return (ops.edit_add(x, residual, **form, on=on),)
            return ops.edit_add_norm(x, residual, weight, **form, norm_bias=norm_bias, kind=kind, eps=1e-5, on=on)

        stored = ours(x, residual, weight, norm_bias, **form)[0].detach()

        def plain(x, residual, weight, norm_bias, **form):
            r = eager_edit(residual + x, form) if on == "sum" else residual + eager_edit(x, form)
            if r.dtype != torch.float64:
                r = r.to(dtype)
            if kind is None:
                return (r,)
            at_stored = r + (stored.to(r.dtype) - r).detach()  # value of the stored residual, gradient of r
            return r, eager_norm(at_stored, weight, norm_bias, kind, 1e-5)

        def run(function, cast):
            base = {"x": x, "residual": residual}
            base |= {} if kind is None else {"weight": weight, "norm_bias": norm_bias}
            inputs = {n: None if t is None else cast(t).detach().requires_grad_() for n, t in (base | form).items()}
            outputs = function(**({"weight": None, "norm_bias": None} | inputs))
            given = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
            wanted = [t for t in inputs.values() if t is not None]
            return torch.autograd.grad(outputs, wanted, given), names_of(inputs)

        got, names = run(ours, lambda t: t)
        eager, _ = run(plain, lambda t: t)
        exact, _ = run(plain, torch.Tensor.double)
        for name, *three in zip(names, got, exact, eager, strict=True):
            results.setdefault(name, []).append(three)
    for name, threes in results.items():
        assert_promise(f"d_{name}", *pooled(threes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_backward(device, dtype):
    h, form = rows((3, 90), 100, dtype, device), form_on(device, 100, 5)
    grad = torch.randn(3, 90, 5, device=device)

    def run(function, cast):
        inputs = [cast(t).detach().requires_grad_() for t in (h, form["read"], form["offset"])]
        return torch.autograd.grad(function(*inputs), inputs, cast(grad))

    got = run(ops.project, lambda t: t)
    eager = run(lambda h, r, o: h.float() @ r.T + o, lambda t: t)
    exact = run(lambda h, r, o: h @ r.T + o, torch.Tensor.double)
    for name, a, b, c in zip(("hidden", "read", "offset"), got, exact, eager, strict=True):
        assert_promise(f"d_{name}", a, b, c)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_norm_is_of_what_was_stored(device, width):
    """1.003 is stored as 1 in bf16, and the norm of ones is ones; of what was not rounded, it would be 255/256."""
    x, residual = (torch.full((9, width), v, device=device).bfloat16() for v in (0.0, 1.0))
    bias, weight = torch.full((width,), 0.003, device=device), torch.ones(width, device=device).bfloat16()
    stored, normed = ops.edit_add_norm(x, residual, weight, bias=bias)
    assert torch.equal(stored, torch.ones_like(x)) and torch.equal(normed, torch.ones_like(x))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots(device, dtype, rank):
    """Row i under slot s is bit for bit row i with slot s's parameters on every row; −1 leaves the bits."""
    lead, width, slots = (4, 75), 100, 5
    h, form = rows(lead, width, dtype, device), form_on(device, width, rank, slots=slots)
    residual = rows(lead, width, dtype, device)
    slot = torch.randint(-1, slots, lead, dtype=torch.int32, device=device)
    slot[0, :12] = 2  # a run of neighbours in one slot
    slot[1, 0] = -1
    edited, added = ops.edit(h, **form, slot=slot), ops.edit_add(h, residual, **form, slot=slot)
    if rank and _is_reference():
        pytest.skip("library products promise no bit-equality")
    for s in range(slots):
        alone = {n: None if p is None else p[s].contiguous() for n, p in form.items()}
        assert torch.equal(edited[slot == s], ops.edit(h, **alone)[slot == s])
        assert torch.equal(added[slot == s], ops.edit_add(h, residual, **alone)[slot == s])
    assert torch.equal(edited[slot == -1], h[slot == -1])
    assert torch.equal(added[slot == -1], (h + residual)[slot == -1])


@pytest.mark.parametrize("op", ["edit", "edit_add_norm"])
@pytest.mark.parametrize("rank", [0, 3])
def test_slot_gradients(device, rank, op):
    """Over slots, each slot's gradients are those of its own rows alone; others' are zero."""
    width, slots, dtype = 100, 4, torch.bfloat16
    h, residual = rows((900,), width, dtype, device), rows((900,), width, dtype, device)
    form = leaves(form_on(device, width, rank, slots=slots))
    slot = torch.randint(-1, slots - 1, (900,), dtype=torch.int32, device=device)  # slot 3 has no rows
    grad = rows((900,), width, dtype, device)
    weight = torch.ones(width, dtype=dtype, device=device)

    def run(h, residual, form, slot, grad):
        x = h.detach().requires_grad_()
        if op == "edit":
            out = (ops.edit(x, **form, slot=slot),)
        else:
            out = ops.edit_add_norm(x, residual, weight, **form, slot=slot)
        wanted = [x, *(p for p in form.values() if p is not None)]
        return torch.autograd.grad(out, wanted, [grad] * len(out))

    d_h, *d_form = run(h, residual, form, slot, grad)
    for s in range(slots):
        mine = slot == s
        alone = leaves({n: None if p is None else p[s].contiguous() for n, p in form.items()})
        if not mine.any():
            assert all(not g[s].any() for g in d_form)
            continue
        expected_h, *expected = run(h[mine], residual[mine], alone, None, grad[mine])
        if not (rank and _is_reference()):
            assert torch.equal(d_h[mine], expected_h)
        for got, want in zip(d_form, expected, strict=True):
            torch.testing.assert_close(got[s], want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))
    if op == "edit":
        assert torch.equal(d_h[slot == -1], grad[slot == -1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_is_equal(device, dtype):
    """scale 1, bias 0: torch.equal to no edit, forward and backward; coefficient 0 copies bits, NaN's too."""
    h, residual = rows((3, 50), 100, dtype, device), rows((3, 50), 100, dtype, device)
    one, zero = torch.ones(100, device=device), torch.zeros(100, device=device)
    assert torch.equal(ops.edit(h, one, zero), h)
    assert torch.equal(ops.edit_add(h, residual, one, zero), h + residual)
    assert torch.equal(ops.edit_add(h, residual), h + residual)
    odd = h.clone()
    odd.view(torch.int32 if dtype == torch.float32 else torch.int16)[0, 0, :3] = -1  # a NaN with a payload
    same = ops.edit(odd, one * 2, zero, strength=0.0)
    assert torch.equal(same.view(torch.uint8), odd.view(torch.uint8))
    x = h.clone().requires_grad_()
    (d_x,) = torch.autograd.grad(ops.edit(x, one, zero), x, residual)
    assert torch.equal(d_x, residual)


def test_nan_and_infinity_pass_through(device):
    h = torch.randn(6, 40, device=device)
    h[1, 3], h[2, 4], h[4, 5] = float("nan"), float("inf"), -float("inf")
    for dtype in DTYPES:
        out = ops.edit_add(h.to(dtype), torch.zeros(6, 40, dtype=dtype, device=device), torch.full((40,), 2.0, device=device))
        assert out[1, 3].isnan() and out[2, 4] == float("inf") and out[4, 5] == -float("inf")
        assert torch.isfinite(out).sum() == out.numel() - 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("rms", "gemma", "layer"))
def test_no_nan_is_rounded_away(device, dtype, kind):
    """NaNs of every payload and sign, in rows and parameters, come out where the definition has them.

    Rounding to 16 bits adds to the low bits: a NaN whose bits are all ones would wrap to zero.
    """
    width = 103  # pairs of registers, registers and single columns
    x, residual = rows((9,), width, dtype, device), rows((9,), width, dtype, device)
    ones = torch.int32 if dtype == torch.float32 else torch.int16
    x.view(ones)[1, 4::9] = -1
    x.view(ones)[2, 3::9] = torch.iinfo(ones).max
    residual[5, 7::9], residual[7, 1] = float("nan"), float("inf")
    scale, bias = torch.ones(width, device=device), torch.zeros(width, device=device)
    weight = torch.ones(width, dtype=dtype, device=device)
    for payload in (None, -1, 0x7FFFFFFF, 0x7FC00000):
        if payload is not None:
            scale.view(torch.int32)[0::50] = payload
        expected = residual.double() + (scale.double() * x.double() + bias)
        nan = expected.isnan()
        assert nan.any() and not nan.all()
        assert torch.equal(ops.edit(x, scale, bias).isnan(), (scale * x.float()).isnan())
        assert torch.equal(ops.edit_add(x, residual, scale, bias).isnan(), nan)
        out, normed = ops.edit_add_norm(x, residual, weight, scale, bias, kind=kind)
        assert torch.equal(out.isnan(), nan)
        whole = nan.any(1) | (expected.isinf().any(1) if kind == "layer" else False)
        assert normed[whole].isnan().all() and normed[~nan.any(1) & ~expected.isinf().any(1)].isfinite().all()
        if payload is None:
            assert normed[7, 1].isnan()  # infinity times 1 / infinity


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(device, dtype):
    """Views at every alignment, rows apart, transposed, broadcast gradients: as their contiguous copies.

    The reference in numbers whose sums are exact: torch's matmul, which it uses, adds up a view in another order than its
    copy. The kernels in any numbers.
    """

    def short(tensor):
        return (8 * tensor).round() / 8 if _is_reference() else tensor

    form = {n: None if p is None else short(p) for n, p in form_on(device, 96, 2).items()}
    buffer = short(rows((20, 200), 1, dtype, device)).view(20, 200)
    assert form["read"].any() and form["write"].any()
    for shift in range(9):
        view = buffer[:, shift : shift + 96]
        residual = buffer[:, 100 - shift : 196 - shift]
        assert torch.equal(ops.edit(view, **form), ops.edit(view.contiguous(), **form))
        assert torch.equal(ops.edit_add(view, residual, **form), ops.edit_add(view.contiguous(), residual.contiguous(), **form))
    turned = short(rows((96,), 20, dtype, device)).T
    assert torch.equal(ops.edit(turned, **form), ops.edit(turned.contiguous(), **form))
    last = short(rows((4, 6), 96, dtype, device))[:, -1:]
    assert torch.equal(ops.edit(last, **form), ops.edit(last.contiguous(), **form))
    x = short(rows((20,), 96, dtype, device)).requires_grad_()
    (broadcast,) = torch.autograd.grad(ops.edit(x, **form).sum(), x)
    (dense,) = torch.autograd.grad(ops.edit(x, **form), x, torch.ones(20, 96, dtype=dtype, device=device))
    assert torch.equal(broadcast, dense)


def test_empty(device):
    form = form_on(device, 32, 2)
    for lead in [(0,), (3, 0)]:
        x = torch.randn(*lead, 32, device=device, requires_grad=True)
        params = leaves(form)
        out, normed = ops.edit_add_norm(x, x, torch.ones(32, device=device), **params)
        assert out.shape == normed.shape == x.shape
        grads = torch.autograd.grad((out, normed), [x, *params.values()], [out, normed])
        assert all(not g.any() for g in grads)
        assert ops.project(x, form["read"]).shape == (*lead, 2)


@pytest.mark.parametrize(
    "rank, kind, on, mixed",
    [
        (0, "rms", "x", False), (3, "rms", "x", False), (5, "gemma", "sum", True), (0, "layer", "sum", False),
        (4, "layer", "x", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_run_to_run_and_row_by_row(device, dtype, rank, kind, on, mixed):
    """Bit-equal twice over, whatever ran between; row i alone equals row i among others (not the reference)."""
    h, residual, grad = (rows((1000,), 200, dtype, device) for _ in range(3))
    form, weight = form_on(device, 200, rank), torch.ones(200, dtype=dtype, device=device)
    strength = strengths("rows", (1000,), device) if mixed else None
    if mixed:
        strength[500:600] = 1  # groups of rows, too

    def run(at=slice(None)):
        x, params = h[at].clone().requires_grad_(), leaves(form)
        k = None if strength is None else strength[at].clone().requires_grad_()
        out, normed = ops.edit_add_norm(x, residual[at], weight, kind=kind, on=on, strength=k, **params)
        wanted = [t for t in (x, k, *params.values()) if t is not None]
        return (out, normed, *torch.autograd.grad((out, normed), wanted, [grad[at], grad[at]]))

    first = run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = run()
    finally:
        torch.set_num_threads(threads)
    if _is_reference():
        return
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    by_row = 4 if mixed else 3
    for i in (0, 1, 3, 4, 500, 555, 999):
        alone = run(slice(i, i + 1))[:by_row]
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, first[:by_row], strict=True))


def test_column_sums_of_many_rows(device):
    """65,536 rows: the fixed tree over blocks keeps fp32 sums within the promise, where running sums miss it."""
    h, grad = torch.randn(65536, 8, device=device), torch.randn(65536, 8, device=device) + 3
    scale, bias = (torch.ones(8, device=device, requires_grad=True) for _ in range(2))
    got = torch.autograd.grad(ops.edit(h, scale, bias), [scale, bias], grad)
    eager = torch.autograd.grad(scale * h + bias, [scale, bias], grad)
    exact = ((grad.double() * h.double()).sum(0), grad.double().sum(0))
    for name, a, b, c in zip(FORM, got, exact, eager, strict=False):
        assert_promise(f"d_{name}", a, b, c)
