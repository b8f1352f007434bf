"""What only a GPU can show: CUDA graphs, slots at size, both GPU backends against each other's promise."""

import pytest
import torch
from gpu_cases import backend, on_gpu
from oracle import assert_promise, eager_edit, eager_norm, exact_edit, exact_edit_add, make_form

from fastedit import dispatch, ops

pytestmark = pytest.mark.gpu
__all__ = ["backend"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 1000, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("rank", [0, 4])
def test_wide_and_many(backend, width, dtype, rank):
    h, residual = (torch.randn(2000, width, device="cuda").to(dtype) for _ in range(2))
    form = on_gpu(make_form(width, rank))
    assert_promise("h'", ops.edit(h, **form), exact_edit(h, form)[0], eager_edit(h, form).to(dtype))
    eager = (residual + eager_edit(h, form)).to(dtype)
    assert_promise("residual'", ops.edit_add(h, residual, **form), exact_edit_add(h, residual, form, "x"), eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2048, 4096, 8192, 16384])
@pytest.mark.parametrize("rank", [0, 2, 8])
def test_wide_gradients(backend, width, dtype, rank):
    """Every way the CUDA backward keeps its sums: staged, from L2, and left to later launches."""
    x, residual = (torch.randn(700, width, device="cuda").to(dtype) for _ in range(2))
    grads = [torch.randn(700, width, device="cuda").to(dtype) for _ in range(2)]
    form = {n: p for n, p in on_gpu(make_form(width, rank)).items() if p is not None}
    weight = (1 + 0.2 * torch.randn(width, device="cuda")).to(dtype)
    stored = ops.edit_add_norm(x, residual, weight, **form, eps=1e-5)[0]

    def eager(x, residual, weight, **form):
        r = residual + eager_edit(x, dict.fromkeys(("scale", "bias", "read", "offset", "write")) | form)
        r = r if r.dtype == torch.float64 else r.to(dtype)
        return r, eager_norm(r + (stored.to(r.dtype) - r).detach(), weight, None, "rms", 1e-5)

    def run(function, cast):
        inputs = {"x": x, "residual": residual, "weight": weight} | form
        inputs = {n: cast(t).detach().requires_grad_() for n, t in inputs.items()}
        outputs = function(**inputs)
        given = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        return torch.autograd.grad(outputs, list(inputs.values()), given), list(inputs)

    got, names = run(lambda **inputs: ops.edit_add_norm(**inputs, eps=1e-5), lambda t: t)
    for name, *three in zip(names, got, run(eager, torch.Tensor.double)[0], run(eager, lambda t: t)[0], strict=True):
        assert_promise(f"d_{name}", *three)


@pytest.mark.parametrize("pattern", ["runs", "random", "one", "none"])
def test_slot_patterns(backend, pattern):
    rows, width, slots = 4096, 2048, 256
    slot = {
        "runs": torch.arange(rows) // 32 % slots,
        "random": torch.randint(-1, slots, (rows,)),
        "one": torch.full((rows,), 7),
        "none": torch.full((rows,), -1),
    }[pattern].int().cuda()  # fmt: skip
    h, form = torch.randn(rows, width, device="cuda").bfloat16(), on_gpu(make_form(width, slots=slots))
    out = ops.edit(h, **form, slot=slot)
    for s in (0, 7, 200):
        alone = {n: None if p is None else p[s].contiguous() for n, p in form.items()}
        assert torch.equal(out[slot == s], ops.edit(h, **alone)[slot == s])
    assert torch.equal(out[slot == -1], h[slot == -1])


def test_slot_out_of_range_leaves_the_row_alone(backend):
    h, form = torch.randn(4, 64, device="cuda"), on_gpu(make_form(64, slots=2))
    out = ops.edit(h, **form, slot=torch.tensor([0, 2, -5, 1], dtype=torch.int32, device="cuda"))
    assert torch.equal(out[1:3], h[1:3]) and not torch.equal(out[0], h[0])


def test_cuda_graph_capture(backend):
    """Captured once, replayed with other rows, another dial and other parameters: buffers do not move."""
    x, residual = torch.randn(64, 512, device="cuda").bfloat16(), torch.randn(64, 512, device="cuda").bfloat16()
    form, weight = on_gpu(make_form(512, 4)), torch.ones(512, device="cuda").bfloat16()
    dial = torch.ones(1, device="cuda")

    def run():
        return ops.edit_add_norm(x, residual, weight, **form, strength=dial)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = run()
    for strength in (1.0, 0.3, 0.0):
        x.copy_(torch.randn_like(x))
        form["bias"].normal_()
        dial.fill_(strength)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)


def test_backward_in_a_graph_and_run_to_run(backend):
    h = torch.randn(5000, 1024, device="cuda").bfloat16()
    grad = torch.randn_like(h)
    form = {n: p.requires_grad_() for n, p in on_gpu(make_form(1024, 4)).items()}

    def run():
        x = h.clone().requires_grad_()
        return torch.autograd.grad(ops.edit(x, **form), [x, *form.values()], grad)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_another_stream_and_cupy():
    cupy = pytest.importorskip("cupy")
    from fastedit import arrays

    if dispatch.why_not("cuda"):
        pytest.skip(dispatch.why_not("cuda"))
    h = torch.randn(8, 64, device="cuda")
    bias = torch.randn(64, device="cuda")
    out = arrays.edit(cupy.from_dlpack(h), bias=cupy.from_dlpack(bias))
    assert torch.equal(torch.from_dlpack(out), h + bias)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        side = ops.edit(h, bias=bias)
    stream.synchronize()
    assert torch.equal(side, h + bias)
