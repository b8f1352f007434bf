"""The kernels on NumPy arrays and DLPack exporters: equal to the torch face, with no torch imported."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from ascent_support import make_net
from fastedit.kernels import reference
from moments_support import assert_exact
from oracle import make_form

from fastedit import arrays, ops

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def as_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def both(shape, dtype):
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return array, as_torch(array)


def equal(array, tensor):
    return array.dtype.name == str(tensor.dtype).removeprefix("torch.") and torch.equal(as_torch(array), tensor)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rank", [0, 3])
def test_equals_the_torch_face(name, rank):
    h, ht = both((2, 9, 100), DTYPES[name])
    r, rt = h[::-1], ht.flip(0)
    form = make_form(100, rank)
    numbers = {n: None if p is None else p.numpy() for n, p in form.items()}
    k = np.linspace(0, 2, 18, dtype=np.float32).reshape(2, 9)
    assert equal(arrays.edit(h, **numbers), ops.edit(ht, **form))
    assert equal(arrays.edit(h, **numbers, strength=0.5), ops.edit(ht, **form, strength=0.5))
    assert equal(arrays.edit(h, **numbers, strength=k), ops.edit(ht, **form, strength=torch.from_numpy(k)))
    for on in ("x", "sum"):
        assert equal(arrays.edit_add(h, r, **numbers, on=on), ops.edit_add(ht, rt, **form, on=on))
    w, wt = both((100,), DTYPES[name])
    for kind in ("rms", "gemma", "layer"):
        bias, bias_t = (w, wt) if kind == "layer" else (None, None)
        got = arrays.edit_add_norm(h, r, w, **numbers, norm_bias=bias, kind=kind)
        want = ops.edit_add_norm(ht, rt, wt, **form, norm_bias=bias_t, kind=kind)
        assert equal(got[0], want[0]) and equal(got[1], want[1])
    if rank:
        assert equal(arrays.project(h, numbers["read"], numbers["offset"]), ops.project(ht, form["read"], form["offset"]))
        assert equal(arrays.edit(h, **numbers, return_projection=True)[1], ops.edit(ht, **form, return_projection=True)[1])


def test_backward_equals_autograd():
    h, ht = both((300, 64), np.float32)
    g, gt = both((300, 64), np.float32)
    scale, bias = (1 + np.random.rand(64)).astype(np.float32), np.random.rand(64).astype(np.float32)
    leaves = [t.requires_grad_() for t in (ht, torch.from_numpy(scale), torch.from_numpy(bias))]
    expected = torch.autograd.grad(ops.edit(*leaves), leaves, gt)
    for array, tensor in zip(arrays.edit_backward(g, h, scale, bias), expected, strict=True):
        assert equal(array, tensor)


@pytest.mark.parametrize("name", DTYPES)
def test_moments(name):
    (h, ht), group = both((5, 70, 33), DTYPES[name]), np.random.default_rng(1).integers(-1, 3, (5, 70)).astype(np.int32)
    for found, wanted in (
        (arrays.moments(h, group), ops.moments(ht, torch.from_numpy(group))),
        (arrays.moments(h, group, 2), reference.moments(ht.view(-1, 33), torch.from_numpy(group).view(-1), 2)),
        (arrays.moments(h), ops.moments(ht)),
    ):
        assert_exact([torch.from_numpy(a) for a in found], wanted)


@pytest.mark.parametrize("units", [40, (40, 12)])
@pytest.mark.parametrize("name", DTYPES)
def test_value_ascent(name, units):
    (h, ht), net = both((2, 3, 20), DTYPES[name]), make_net(20, units)
    weight, bias, weight2, bias2, head = (None if t is None else t.numpy() for t in net.tensors())
    call = {"steps": 6, "step_size": 0.5, "weight2": weight2, "bias2": bias2}
    expected = ops.value_ascent(ht, net, 6, 0.5)
    assert equal(arrays.value_ascent(h, weight, bias, head, **call, gram=net.gram().numpy()), expected)
    assert equal(arrays.value_ascent(h, weight, bias, head, **call), expected)
    with pytest.raises(ValueError, match=r"head is float32 \(1,\)"):
        arrays.value_ascent(h, weight, bias, head[:1], **call)


def test_slots_and_views():
    table = np.random.rand(4, 8).astype(np.float32)
    h, slot = np.random.rand(6, 20).astype(np.float32), np.array([0, 3, -1, 2, 2, 0], np.int32)
    out = arrays.edit(h[:, 5:13], bias=table, slot=slot)
    np.testing.assert_array_equal(out[2], h[2, 5:13])
    np.testing.assert_allclose(out[slot >= 0], h[slot >= 0, 5:13] + table[slot[slot >= 0]], rtol=1e-6)
    turned = h.T
    np.testing.assert_array_equal(arrays.edit(turned, bias=np.ones(6, np.float32)), turned + 1)


@pytest.mark.parametrize("shape", [(3, 0), (2, 3, 0)])
def test_rows_of_no_columns_project_onto_the_offset(shape):
    h, read, offset = np.empty(shape, np.float32), np.empty((2, 0), np.float32), np.array([1, 2], np.float32)
    ht, read_t, offset_t = (torch.from_numpy(a) for a in (h, read, offset))
    expected = np.broadcast_to(offset, (*shape[:-1], 2))
    np.testing.assert_array_equal(arrays.project(h, read, offset), expected)
    for z in (
        arrays.edit(h, read=read, offset=offset, write=read, return_projection=True)[1],
        ops.project(ht, read_t, offset_t).numpy(),
        ops.edit(ht, read=read_t, offset=offset_t, write=read_t, return_projection=True)[1].numpy(),
        ops.edit_add(ht, ht, read=read_t, offset=offset_t, write=read_t, return_projection=True)[1].numpy(),
    ):
        np.testing.assert_array_equal(z, expected)
    slot = np.arange(np.prod(shape[:-1]), dtype=np.int32).reshape(shape[:-1]) % 2
    table, offsets = np.empty((2, 1, 0), np.float32), np.array([[3], [4]], np.float32)
    expected = offsets[slot]
    slotted = {"read": table, "offset": offsets, "write": table, "slot": slot}
    np.testing.assert_array_equal(arrays.edit(h, **slotted, return_projection=True)[1], expected)
    slotted = {n: torch.from_numpy(a) for n, a in slotted.items()}
    np.testing.assert_array_equal(ops.edit(ht, **slotted, return_projection=True)[1].numpy(), expected)
    offset_t.requires_grad_()
    ops.project(ht, read_t, offset_t).sum().backward()
    assert offset_t.grad.tolist() == [np.prod(shape[:-1])] * 2


def test_dlpack_exporters_come_in():
    class Exporter:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    h = np.random.rand(3, 8).astype(np.float32)
    np.testing.assert_array_equal(arrays.edit(Exporter(h), bias=np.ones(8, np.float32)), h + 1)


H = np.ones((2, 8), np.float32)
ONE = np.ones(8, np.float32)
MANY = np.ones((65, 8), np.float32)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: arrays.edit(H, scale=np.ones(7, np.float32)), ValueError, r"scale is float32 \(7,\), expected float32 \(8,\)"),
        (lambda: arrays.edit(H, scale=np.ones(8)), ValueError, r"scale is float64 \(8,\), expected float32"),
        (lambda: arrays.edit(H.astype(int), ONE), TypeError, "dtype int64, expected one of float32"),
        (lambda: arrays.edit(H, read=ONE[None]), ValueError, "belong together"),
        (lambda: arrays.edit(H, read=MANY, write=MANY), ValueError, "rank 1 to 64"),
        (lambda: arrays.edit(H, ONE[None], slot=np.array([0, 1], np.int32)), IndexError, "slot of row 1 is 1"),
        (lambda: arrays.edit(H, ONE, slot=np.array([0, 0], np.int32)), ValueError, "need a leading slot dimension"),
        (lambda: arrays.edit(H, ONE, strength=np.ones(3, np.float32)), ValueError, "strength is"),
        (lambda: arrays.edit_add(H, H[:1], ONE), ValueError, "residual is float32"),
        (lambda: arrays.edit_add(H, H, ONE, on="y"), ValueError, "expected 'x'"),
        (lambda: arrays.edit_add_norm(H, H, None), ValueError, "needs the norm's weight"),
        (lambda: arrays.project(H, np.ones((1, 4), np.float32)), ValueError, "read is"),
        (lambda: arrays.edit(object(), ONE), TypeError, "hidden is object, expected a NumPy"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_no_torch_is_imported():
    code = (
        "import sys, numpy as np; from fastedit import arrays; h = np.ones((2, 4), np.float32);"
        "assert (arrays.edit(h, bias=np.ones(4, np.float32)) == 2).all(); assert 'torch' not in sys.modules, 'torch came along'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
