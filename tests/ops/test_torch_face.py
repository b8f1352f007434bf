"""The ops under torch: operators, torch.compile, autograd's corners, bad input, and what is saved."""

import pytest
import torch
from oracle import make_form
from torch._dynamo.testing import CompileCounterWithBackend

from fastedit import dispatch, ops

FORM = ("scale", "bias", "read", "offset", "write")


def parameters(width=32, rank=2, grad=True):
    return {n: p.requires_grad_(grad) for n, p in make_form(width, rank).items()}


def composite(h, residual, weight, form, on="x"):
    """All three editing ops in a row, and a projection."""
    edited = ops.edit(h, **form)
    added = ops.edit_add(edited, residual, **form, on=on)
    out, normed = ops.edit_add_norm(added, residual, weight, **form, kind="rms", eps=1e-6, on=on)
    return out, normed, ops.project(normed, form["read"], form["offset"])


@pytest.mark.parametrize("on", ["x", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_once_for_every_length(dtype, on):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(composite, fullgraph=True, dynamic=True, backend=counter)
    form, weight = parameters(), torch.ones(32, dtype=dtype, requires_grad=True)
    for length in (3, 5, 8, 13):
        results = []
        for function in (composite, compiled):
            generators = (torch.Generator().manual_seed(s) for s in (1, 2))
            h, residual = (torch.randn(2, length, 32, generator=g).to(dtype).requires_grad_() for g in generators)
            outputs = function(h, residual, weight, form, on)
            grads = torch.autograd.grad([o.float().square().sum() for o in outputs], [h, residual, weight, *form.values()])
            results.append([*outputs, *grads])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1


def test_inductor():
    torch._dynamo.reset()
    form, weight = parameters(grad=False), torch.ones(32)
    h, residual = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    compiled = torch.compile(composite, fullgraph=True, dynamic=True)
    with torch.no_grad():
        expected, got = composite(h, residual, weight, form), compiled(h, residual, weight, form)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)


def opcheck_cases():
    f = make_form(16, 2)
    form = [f[n] for n in FORM]
    h, r, w = torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.ones(16)
    grad, z = torch.randn(2, 3, 16), torch.randn(2, 3, 2)
    slots = [torch.randn(3, *p.shape) for p in form]
    slot, k = torch.tensor([[0, -1, 2], [1, 1, 0]], dtype=torch.int32), torch.rand(2, 3)
    rstd, every = torch.rand(6) + 0.5, [True] * 7
    plain = [*form, None, None]
    return {
        "edit": [(h, *plain), (h, *slots, slot, k), (h, form[0], *[None] * 6)],
        "edit_add": [(h, r, *plain, False), (h, r, *slots, slot, k, True), (h.bfloat16(), r, *plain, False)],
        "edit_add_norm": [(h, r, w, None, *plain, False, 0, 1e-6), (h, r, w, w.clone(), *slots, slot, k, True, 2, 1e-5)],
        "project": [(h, form[2], form[3]), (h, form[2], None)],
        "edit_backward": [(grad, h, None, *form, None, k, z, z.clone(), every, torch.float32),
                          (grad, None, None, None, form[1], *[None] * 7, [True, False, True, *[False] * 4], torch.float32)],
        "edit_add_norm_backward": [
            (grad, h, r, h.clone(), None, w, None, rstd, *form, None, k, z, z.clone(), False, 0, [*every, True], [True, False],
             torch.float32, torch.float32),
            (grad, h, r, h.clone(), r.clone(), w, rstd.clone(), rstd, *form, None, k, z, z.clone(), True, 2, [*every, True],
             [True, True], torch.float32, torch.float32),
        ],
        "project_backward": [(z, h, form[2], [True] * 3, torch.float32)],
    }  # fmt: skip


@pytest.mark.parametrize("name", list(opcheck_cases()))
def test_opcheck(name):
    for args in opcheck_cases()[name]:
        op = getattr(torch.ops.fastedit, name).default
        torch.library.opcheck(op, args)
        if not name.endswith("backward"):
            wanted = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
            torch.library.opcheck(op, wanted)


def test_export():
    class Edited(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.full((16,), 1.5))

        def forward(self, h):
            return ops.edit(h, self.scale)

    model, h = Edited(), torch.randn(3, 16)
    program = torch.export.export(model, (h,), dynamic_shapes={"h": {0: torch.export.Dim("rows", min=2)}})
    assert "fastedit.edit" in program.graph_module.code
    longer = torch.randn(7, 16)
    assert torch.equal(program.module()(longer), model(longer))


def test_gradcheck_in_float64():
    """The reference's backward, through the Function, against finite differences: every argument, every op."""
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    form = [random(6), random(6), random(2, 6), random(2), random(2, 6)]
    h, r, k, w, b = random(3, 6), random(3, 6), random(3), random(6), random(6)
    named = lambda p: dict(zip(FORM, p, strict=True))  # noqa: E731
    check = torch.autograd.gradcheck
    assert check(lambda h, k, *p: ops.edit(h, **named(p), strength=k, return_projection=True), (h, k, *form))
    assert check(ops.project, (h, form[2], form[3]))
    for on in ("x", "sum"):
        assert check(lambda h, r, k, *p: ops.edit_add(h, r, **named(p), strength=k, on=on), (h, r, k, *form))
        for kind in ("rms", "gemma", "layer"):
            norm = {"kind": kind, "on": on, "return_projection": True}
            bias = b if kind == "layer" else None
            assert check(
                lambda h, r, w, b, k, *p: ops.edit_add_norm(h, r, w, **named(p), norm_bias=b, strength=k, **norm),
                (h, r, w, bias, k, *form),
            )


def saved_tensors(function):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t):
        function()
    return sizes


def test_bias_only_training_saves_no_hidden_states():
    h, r = torch.randn(50, 32, requires_grad=True), torch.randn(50, 32)
    bias = torch.zeros(32, requires_grad=True)
    for call in (
        lambda: ops.edit(h, bias=bias), lambda: ops.edit_add(h, r, bias=bias), lambda: ops.edit_add(h, r, torch.ones(32), bias)
    ):  # fmt: skip
        assert all(t.numel() < h.numel() for t in saved_tensors(call))
    assert any(t is h or t.numel() == h.numel() for t in saved_tensors(lambda: ops.edit(h, torch.ones(32, requires_grad=True))))


def test_no_graph_where_no_gradient_is_needed():
    h = torch.randn(4, 8, requires_grad=True)
    with torch.no_grad():
        assert ops.edit(h, torch.ones(8)).grad_fn is None
    with torch.inference_mode():
        assert ops.edit(h, torch.ones(8)).is_inference()
    assert ops.edit(h.detach(), torch.ones(8)).grad_fn is None
    out = ops.edit(h, torch.full((8,), 3.0, requires_grad=True))
    (d,) = torch.autograd.grad(out.square().sum(), h, create_graph=True)
    d.sum().backward()
    torch.testing.assert_close(h.grad, torch.full((4, 8), 18.0))


def test_autocast_leaves_parameters_fp32():
    h, scale = torch.randn(4, 8), torch.full((8,), 1.001)
    linear = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = linear(h)
        out = ops.edit_add(x, h, scale)
    assert x.dtype == torch.bfloat16 and out.dtype == torch.float32
    torch.testing.assert_close(out, h + scale * x.float())


def test_strength_dials_without_a_retrace():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    dial, bias, h = torch.ones(1), torch.randn(8), torch.randn(4, 8)
    compiled = torch.compile(lambda h: ops.edit(h, bias=bias, strength=dial), fullgraph=True, backend=counter)
    for strength in (1.0, 0.5, 0.0, 2.0):
        dial.fill_(strength)
        torch.testing.assert_close(compiled(h), h + strength * bias)
    assert counter.frame_count == 1
    assert torch.equal(ops.edit(h, bias=bias, strength=0.0), h)


H = torch.randn(2, 3, 8)
ONE = torch.ones(8)
BAD = [
    (lambda: ops.edit(H, scale=torch.ones(7)), ValueError, r"scale has shape \(7,\), expected \(8\)"),
    (lambda: ops.edit(H, bias=ONE.bfloat16()), TypeError, "bias has dtype torch.bfloat16, expected float32"),
    (lambda: ops.edit(H.long(), ONE), TypeError, "hidden has dtype torch.int64"),
    (lambda: ops.edit(torch.tensor(1.0), ONE), ValueError, "single number"),
    (lambda: ops.edit(H, read=torch.ones(1, 8)), ValueError, "write is None"),
    (lambda: ops.edit(H, write=torch.ones(1, 8)), ValueError, "read is None"),
    (lambda: ops.edit(H, read=torch.ones(65, 8), write=torch.ones(65, 8)), ValueError, "rank 1 to 64"),
    (lambda: ops.edit(H, read=ONE, write=ONE), ValueError, "rank 1 to 64"),
    (lambda: ops.edit(H, read=torch.ones(2, 8), write=torch.ones(3, 8)), ValueError, r"write has shape \(3, 8\), expected \(2"),
    (lambda: ops.edit(H, ONE, slot=torch.zeros(2, 3, dtype=torch.int32)), ValueError, "leading slot dimension"),
    (lambda: ops.edit(H, ONE[None], slot=torch.zeros(2, 3)), TypeError, "slot has dtype torch.float32"),
    (lambda: ops.edit(H, ONE[None], slot=torch.zeros(2, dtype=torch.int32)), ValueError, "one number per row"),
    (
        lambda: ops.edit(H, ONE[None], slot=torch.ones(2, 3, dtype=torch.int32)),
        IndexError, "row 0 is 1, expected -1 .* or 0 to 0",
    ),
    (lambda: ops.edit(H, ONE[None], slot=torch.full((2, 3), -2, dtype=torch.int32)), IndexError, "slot of row 0 is -2"),
    (lambda: ops.edit(H, ONE[:0].view(0, 8), slot=torch.zeros(2, 3, dtype=torch.int32)), ValueError, "no slots"),
    (lambda: ops.edit(H, ONE, strength=torch.ones(3)), ValueError, "one number per row"),
    (lambda: ops.edit(H, ONE, strength=torch.ones(2, 3, dtype=torch.float16)), TypeError, "strength has dtype"),
    (lambda: ops.edit(H, ONE, return_projection=True), ValueError, "needs `read`"),
    (lambda: ops.edit(H, ONE.to("meta")), ValueError, "scale is on meta and the hidden states on cpu"),
    (lambda: ops.edit_add(H, H[:1], ONE), ValueError, "expected the same shape"),
    (lambda: ops.edit_add(H, H, ONE, on="both"), ValueError, "expected 'x' .* or 'sum'"),
    (lambda: ops.edit_add_norm(H, H, None, ONE), ValueError, "needs the norm's weight"),
    (lambda: ops.edit_add_norm(H, H, ONE, kind="rmsnorm"), ValueError, "kind is 'rmsnorm', expected one of"),
    (lambda: ops.edit_add_norm(H, H, ONE, norm_bias=ONE), ValueError, "belongs to kind='layer'"),
    (lambda: ops.edit_add_norm(H, H, torch.ones(4)), ValueError, r"weight has shape \(4,\)"),
    (lambda: ops.edit_add_norm(H, H, ONE.bfloat16()), TypeError, "the norm's weight has dtype torch.bfloat16"),
    # Of fp64 rows, which the reference serves, and of no rows at all: nothing behind the checks looks.
    (lambda: ops.edit_add_norm(H.double(), H, ONE.double().to("meta")), ValueError, "norm's weight is on meta and x on cpu"),
    (lambda: ops.edit_add_norm(H[:0], H[:0], ONE.to("meta")), ValueError, "norm's weight is on meta and x on cpu"),
    (
        lambda: ops.edit_add_norm(H[:0], H[:0], ONE, kind="layer", norm_bias=ONE.to("meta")),
        ValueError, "norm's norm_bias is on meta and x on cpu",
    ),
    (lambda: ops.project(H, torch.ones(1, 4)), ValueError, "read has shape"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_forced_backend_serves_or_raises(monkeypatch):
    def forced(name):
        monkeypatch.setenv("FASTEDIT_BACKEND", name)
        dispatch.select.cache_clear()

    try:
        forced("reference")
        assert dispatch.select("cpu", torch.float32).__name__ == "reference"
        forced("cpu")
        assert dispatch.select("cpu", torch.float32).__name__ == "cpu"
        with pytest.raises(dispatch.BackendError, match="float64 rows are served by the reference alone"):
            ops.edit(H.double(), ONE)
        forced("tpu")
        with pytest.raises(dispatch.BackendError, match="there is no backend 'tpu'"):
            ops.edit(H, ONE)
        forced("cuda")
        with pytest.raises(dispatch.BackendError, match=r"CUDA compiler|takes tensors on cuda"):
            ops.edit(H, ONE)
    finally:
        dispatch.select.cache_clear()
