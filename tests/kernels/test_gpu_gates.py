"""The gate inside the edits on a GPU: the same-site gate of ops.edit and its kind, both backends, by definition."""

import pytest
import torch
from fastedit.kernels import reference
from gpu_cases import backend, on_gpu
from oracle import assert_promise, make_form

from fastedit import ops

pytestmark = pytest.mark.gpu
__all__ = ["backend"]


def gate_of(h, sharpness, cosine):
    """A gate and its rule: the threshold in the widest gap of the middle scores, so that no rounding decides."""
    gate = torch.randn(h.shape[1], device="cuda") / h.shape[1] ** 0.5
    s = (h.double() @ gate.double() / (h.double().norm(dim=-1) if cosine else 1)).sort().values
    s = s[len(s) // 3 : -(len(s) // 3)]
    widest = int(s.diff().argmax())
    threshold = float(s[widest] + s[widest + 1]) / 2
    return {"gate": gate, "rule": torch.tensor([threshold, sharpness, cosine], device="cuda")}


def by_definition(op, streams, form, gate, dtype, **options):
    """kernels/reference in float64, or with fp32 arithmetic and the streams' own dtypes."""
    streams = [t.double() for t in streams] if dtype == torch.float64 else streams
    gate = {n: p.to(dtype) for n, p in gate.items()}
    return getattr(reference, op)(*streams, **form, slot=None, coefficient=None, **options, **gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 1000, 1001, 4096, 16384])
@pytest.mark.parametrize("rank", [0, 4])
def test_gates(backend, width, dtype, rank):
    h, residual = (torch.randn(500, width, device="cuda").to(dtype) for _ in range(2))
    form = on_gpu(make_form(width, rank))
    for sharpness, cosine in ((0.0, 0.0), (0.0, 1.0), (6.0, 0.0), (6.0, 1.0)):
        gate = gate_of(h, sharpness, cosine)
        exact, eager = (by_definition("edit", (h,), form, gate, d)[0] for d in (torch.float64, torch.float32))
        assert_promise("h'", ops.edit(h, **form, **gate), exact, eager)
        exact, eager = (
            by_definition("edit_add", (h, residual), form, gate, d)[0] for d in (torch.float64, torch.float32)
        )
        assert_promise("residual'", ops.edit_add(h, residual, **form, **gate), exact, eager)


@pytest.mark.parametrize("width", [1000, 4096, 16384])
def test_norm_behind_a_gate_is_the_norm_of_the_gated_add(backend, width):
    x, residual = (torch.randn(500, width, device="cuda").bfloat16() for _ in range(2))
    form, gate, weight = on_gpu(make_form(width)), gate_of(x, 6.0, 1.0), torch.ones(width, device="cuda").bfloat16()
    summed, normed = ops.edit_add_norm(x, residual, weight, **form, **gate, eps=1e-6)
    assert torch.equal(summed, ops.edit_add(x, residual, **form, **gate))
    exact, eager = (reference.edit_add_norm.__globals__["norm"](t, w, None, 0, 1e-6)[0]
                    for t, w in ((summed.double(), weight.double()), (summed, weight)))  # fmt: skip
    assert_promise("normed", normed, exact, eager)


@pytest.mark.parametrize("width", [1000, 4096, 16384])
def test_closed_rows_keep_their_bits(backend, width):
    h, form = torch.randn(500, width, device="cuda").bfloat16(), on_gpu(make_form(width))
    h[::7, 3] = torch.nan
    gate = gate_of(h.nan_to_num(), 0.0, 0.0)
    score = h.double() @ gate["gate"].double()
    opened = score > float(gate["rule"][0])
    assert 0 < opened.sum() < len(h)
    out = ops.edit(h, **form, **gate)
    assert torch.equal(out[~opened].view(torch.int16), h[~opened].view(torch.int16))
    if backend == "cuda":  # an open row is the ungated one to the bit
        assert torch.equal(out[opened], ops.edit(h, **form)[opened])


def test_each_row_by_its_slots_gate(backend):
    h, form = torch.randn(64, 512, device="cuda").bfloat16(), on_gpu(make_form(512, slots=3))
    gates = [gate_of(h, *kind) for kind in ((0.0, 0.0), (0.0, 1.0), (6.0, 1.0))]
    slot = (torch.arange(64, device="cuda") % 4 - 1).int()
    stacked = {n: torch.stack([g[n] for g in gates]) for n in ("gate", "rule")}
    out = ops.edit(h, **form, **stacked, slot=slot)
    for s, gate in enumerate(gates):
        alone = {n: None if p is None else p[s].contiguous() for n, p in form.items()}
        assert torch.equal(out[slot == s], ops.edit(h, **alone, **gate)[slot == s])
    assert torch.equal(out[slot == -1], h[slot == -1])
