"""One native call an op: how little Python stands before it, and what it must never read wrongly."""

import sys
import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastedit import _native, arrays, dispatch, ops
from fastedit.ops.autograd import gradients

H, ONE, TWO = torch.randn(4, 32), torch.ones(32), torch.full((32,), 2.0)
READ = torch.randn(2, 32)


def frames(call):
    """Python functions that a call enters, itself not counted."""
    entered = []
    call()
    sys.setprofile(lambda frame, event, arg: entered.append(frame.f_code.co_name) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered[1:]


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.edit(H, TWO, ONE), lambda: ops.edit(H, TWO, ONE, READ, None, READ, strength=0.5),
        lambda: ops.edit_add(H, H, TWO, ONE, on="sum"), lambda: ops.edit_add_norm(H, H, ONE, TWO),
        lambda: ops.project(H, READ), lambda: ops.edit(H[:, :16], TWO[:16]),
    ],
)  # fmt: skip
def test_an_op_enters_two_python_functions(call):
    assert len(frames(call)) <= 2


def test_numpy_enters_one_python_function():
    h, two = H.numpy(), TWO.numpy()
    assert len(frames(lambda: arrays.edit(h, two))) == 1


def swapped(array):
    return array.astype(array.dtype.newbyteorder(">"))


def misaligned(array):
    memory = np.empty(array.nbytes + 1, np.uint8)[1:]
    view = memory.view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def backwards(array):
    return np.ascontiguousarray(array[::-1])[::-1]


@pytest.mark.parametrize("kind", [swapped, misaligned, read_only, backwards, np.asfortranarray])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_array_is_read_as_numpy_reads_it(kind, dtype):
    h, scale = H.numpy().astype(dtype), np.linspace(1, 2, 32, dtype=np.float32)
    expected = arrays.edit(h, scale)
    np.testing.assert_array_equal(arrays.edit(kind(h), scale), expected)
    np.testing.assert_array_equal(arrays.edit(h, kind(scale)), expected)
    np.testing.assert_array_equal(arrays.edit_add(kind(h), h, scale), arrays.edit_add(h, h, scale))
    slot = np.zeros(4, np.int32)
    np.testing.assert_array_equal(arrays.edit(h, scale[None], slot=kind(slot)), expected)


def test_rows_of_zero_stride_and_odd_pieces():
    same = np.broadcast_to(H.numpy()[:1], (4, 32))
    np.testing.assert_array_equal(arrays.edit(same, TWO.numpy()), same * 2)
    piece = H.numpy().reshape(2, 2, 32)[:, :, 3:20]
    np.testing.assert_array_equal(arrays.edit(piece, TWO.numpy()[:17]), piece * 2)
    assert torch.equal(ops.edit(H[:1].expand(4, 32), TWO), H[:1].expand(4, 32) * 2)
    assert torch.equal(ops.edit(H.view(2, 2, 32)[:, :, 3:20], TWO[:17]), H.view(2, 2, 32)[:, :, 3:20] * 2)
    wide = np.zeros((2, 32), ml_dtypes.bfloat16)
    assert arrays.edit(wide, bias=ONE.numpy()).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("missing", ["head", "bias", "bias2", "weight"])
def test_an_ascent_without_a_part_of_its_net_is_refused(missing):
    net = {"weight": np.ones((3, 8)), "bias": np.ones(3), "weight2": np.ones((2, 3)), "bias2": np.ones(2), "head": np.ones(2)}
    net = {name: None if name == missing else part.astype(np.float32) for name, part in net.items()}
    with pytest.raises(ValueError, match=missing):
        arrays.value_ascent(np.ones((2, 8), np.float32), **net, steps=2, step_size=0.1)


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("FASTEDIT_BACKEND", request.param)
    dispatch.select.cache_clear()
    yield request.param
    dispatch.select.cache_clear()


@pytest.mark.parametrize("slot", [-2, 1])
def test_a_slot_out_of_range_is_refused_by_every_backend(backend, slot):
    slots, table = torch.tensor([0, 0, slot, 0], dtype=torch.int32), ONE[None]
    for call in (
        lambda: ops.edit(H, table, slot=slots), lambda: ops.edit_add(H, H, table, slot=slots),
        lambda: ops.edit_add_norm(H, H, ONE, table, slot=slots), lambda: ops.edit(H, table.clone().requires_grad_(), slot=slots),
    ):  # fmt: skip
        with pytest.raises(IndexError, match=f"slot of row 2 is {slot}, expected -1"):
            call()
    with pytest.raises(IndexError, match=f"slot of row 2 is {slot}, expected -1"):
        arrays.edit(H.numpy(), table.numpy(), slot=slots.numpy())


def test_tensors_without_readable_memory_are_never_read():
    with FakeTensorMode():
        fake = torch.empty(4, 32)
        assert ops.edit(fake, torch.empty(32)).shape == (4, 32)
    for call in (_native.edit, _native.try_edit):
        refused = call is _native.try_edit
        for bad in (fake, H.to_sparse(), H.to("meta"), torch._neg_view(H)):
            for rows, scale in ((bad, ONE), (H, bad[0] if not bad.is_sparse else bad)):
                if refused:
                    assert call(rows, scale, *[None] * 6, False, None, None) is None
                else:
                    with pytest.raises((TypeError, ValueError)):
                        call(rows, scale, *[None] * 6)
    assert ops.edit(H.to("meta"), ONE.to("meta")).is_meta


@pytest.fixture(params=[True, False], ids=["quick", "asking torch"])
def quick(request):
    """What the module finds of torch's insides, and the same calls where it finds nothing."""
    yield _native.use_torch(torch, request.param)
    assert _native.use_torch(torch)["maker"]


def test_what_a_tensor_says_of_itself_is_what_torch_says(quick):
    assert set(quick.values()) in ({True}, {False})
    ops.edit(H, ONE)  # the first call chooses the backend
    leaf = torch.ones(32, requires_grad=True)
    complex_row = torch.randn(4, 32, dtype=torch.complex64).conj()
    with torch.inference_mode():
        inferred = torch.ones(32)
    answered = [ONE, torch.nn.Parameter(ONE, requires_grad=False), leaf.detach(), inferred, torch._neg_view(ONE).clone()]
    declined = [leaf, leaf * 2, torch.nn.Parameter(ONE), torch._neg_view(ONE), complex_row.imag[0], leaf.view(2, 16).view(32)]
    for scale, wanted in [(s, True) for s in answered] + [(s, False) for s in declined]:
        assert scale.is_neg() or scale.requires_grad or wanted
        assert (_native.try_edit(H, scale, *[None] * 6, False, None, None) is not None) is wanted
        if scale.is_neg() and scale.is_contiguous():  # else a copy is read, without the bit
            with pytest.raises(TypeError, match="scale has its negative bit set"):
                ops.edit(H, scale)
        else:
            assert torch.equal(ops.edit(H, scale), H * scale.resolve_neg())
    with torch.no_grad():
        assert _native.try_edit(H, leaf, *[None] * 6, False, None, None) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 3, 32), (0, 32), (2, 0, 32)])
def test_a_result_is_an_ordinary_tensor_of_torch(quick, dtype, shape):
    rows = torch.randn(shape).to(dtype)
    narrow = ops.edit(rows[..., ::2], TWO[::2].clone())
    for out in (narrow, ops.edit(rows, TWO), *ops.edit_add_norm(rows, rows, ONE.to(dtype), TWO)):
        assert type(out) is torch.Tensor and out.dtype is dtype and out.is_contiguous() and out.shape[:-1] == rows.shape[:-1]
        assert out.is_leaf and not out.requires_grad and out.storage_offset() == 0
        assert out.stride() == torch.empty(out.shape).stride()
        assert out.untyped_storage().resizable() and out.untyped_storage().nbytes() == out.numel() * out.element_size()
    assert torch.equal(ops.edit(rows, TWO), rows * 2)
    with torch.inference_mode():
        assert ops.edit(rows, TWO).is_inference()
    kept = ops.edit(rows, TWO)
    kept.resize_(3, 32).fill_(1)
    assert sys.getrefcount(kept) == 2


def test_a_mode_sees_what_is_made(quick):
    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    seen = []
    with Seeing():
        assert torch.equal(ops.edit(H, TWO), H * 2)
    assert any("empty" in name for name in seen)


def test_jit_trace_records_the_op(quick):
    traced = torch.jit.trace(lambda h, r: ops.edit_add(ops.edit(h, TWO), r, TWO, ONE), (H, H), check_trace=False)
    other = torch.randn(3, 32)
    torch.testing.assert_close(traced(other, other), other + 4 * other + 1)


@pytest.mark.parametrize("slots", [0, 3])
def test_gradients_of_no_rows_are_zero(backend, slots):
    lead = (slots,) if slots else ()
    form = {"scale": (32,), "bias": (32,), "read": (2, 32), "offset": (2,), "write": (2, 32)}
    form = {name: torch.randn(*lead, *shape).requires_grad_() for name, shape in form.items()}
    dirt = [torch.full_like(p, 1e38) for p in form.values()]
    del dirt  # what the allocator hands out next is not zero
    slot = torch.empty(2, 0, dtype=torch.int32) if slots else None
    h = torch.empty(2, 0, 32)
    for out in (ops.edit(h, **form, slot=slot), *ops.edit_add_norm(h, h, ONE, **form, slot=slot)):
        for grad in torch.autograd.grad(out.sum(), form.values(), retain_graph=True, allow_unused=True):
            assert grad is None or not grad.any()


def test_moments_of_groups_in_inference_mode():
    with torch.inference_mode():
        group = torch.tensor([0, 1, 0, -1], dtype=torch.int32)
        count, mean, _ = ops.moments(H.clone(), group)
    assert count.tolist() == [2, 1]
    torch.testing.assert_close(mean[0], (H[0].double() + H[2].double()) / 2)


def test_two_threads_train_over_slots_at_once():
    """Each with slots of its own number of rows: nothing of one may be seen by the other."""
    wrong = []

    def train(seed):
        generator = torch.Generator().manual_seed(seed)
        for turn in range(60):
            rows = 8 + (turn * (seed + 3)) % 200
            h = torch.randn(rows, 32, generator=generator)
            slot = torch.randint(-1, 3, (rows,), generator=generator, dtype=torch.int32)
            scale = torch.ones(3, 32, requires_grad=True)
            ops.edit(h, scale, slot=slot).sum().backward()
            expected = torch.zeros(3, 32).index_add_(0, slot[slot >= 0].long(), h[slot >= 0])
            if not torch.allclose(scale.grad, expected, atol=1e-4):
                wrong.append((seed, turn))

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edit_of_the_sum_that_keeps_no_rows_trains_on_every_backend(monkeypatch, dtype):
    """A low-rank edit with no scale: its gradient is had of its output, on the reference and for float64 too."""
    grads = {}
    for name in ("reference", "cpu" if dtype is torch.float32 else "reference"):
        monkeypatch.setenv("FASTEDIT_BACKEND", name)
        dispatch.select.cache_clear()
        generator = torch.Generator().manual_seed(0)
        x, r = (torch.randn(5, 8, dtype=dtype, generator=generator) for _ in range(2))
        read, write = (torch.randn(2, 8, generator=generator).requires_grad_() for _ in range(2))
        weight = torch.ones(8, dtype=dtype)
        seed = torch.randn(5, 8, dtype=dtype, generator=generator)
        for call in (
            lambda: ops.edit(x, read=read, write=write), lambda: ops.edit_add(x, r, read=read, write=write, on="sum"),
            lambda: ops.edit_add_norm(x, r, weight, read=read, write=write, on="sum")[1],
        ):  # fmt: skip
            found = torch.autograd.grad(call(), (read, write), seed)
            grads.setdefault(len(grads), found)
            wide = [t.detach().double().requires_grad_() for t in (read, write)]
            h = x.double() if len(grads) == 1 else r.double() + x.double()
            out = h + (h @ wide[0].mT) @ wide[1]
            if len(grads) == 3:
                out = torch.nn.functional.rms_norm(out, (8,), weight.double(), 1e-6)
            for one, exact in zip(found, torch.autograd.grad(out, wide, seed.double()), strict=True):
                torch.testing.assert_close(one.double(), exact, rtol=2e-4, atol=2e-4)
        grads.clear()
    dispatch.select.cache_clear()


def test_gradients_take_what_autograd_gives():
    """Expanded, strided and 3-D gradients, and rows that are not there."""
    h = H.view(2, 2, 32)
    grad = torch.ones(()).expand(2, 2, 32)
    d_hidden, d_scale, *_ = gradients(
        "edit_backward", grad, h, None, TWO, ONE, *[None] * 7, (True, True, *[False] * 5), torch.float32
    )
    assert torch.equal(d_hidden, torch.full_like(h, 2.0))
    torch.testing.assert_close(d_scale, H.sum(0))


@pytest.mark.parametrize("want", [False, True])
def test_a_strength_that_the_first_call_declines_gives_the_same_results(want):
    x, residual, weight = torch.randn(3, 4), torch.randn(3, 4), torch.ones(4)
    form = {"scale": torch.full((4,), 2.0)} | ({"read": torch.ones(2, 4), "write": torch.ones(2, 4)} if want else {})
    plain = ops.edit_add_norm(x, residual, weight, return_projection=want, **form)
    again = ops.edit_add_norm(x, residual, weight, return_projection=want, strength=np.float32(1), **form)
    assert len(plain) == len(again) == 2 + want and all(map(torch.equal, plain, again))


def test_numbers_that_the_first_call_does_not_take_and_numbers_that_are_none():
    """A strength that only Python can read goes the long way, where the norm's statistics are not wanted."""
    expected = ops.edit_add_norm(H, H, ONE, TWO, strength=0.5)
    for strength in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        for one, other in zip(ops.edit_add_norm(H, H, ONE, TWO, strength=strength), expected, strict=True):
            assert torch.equal(one, other)
    _, _, z = ops.edit_add_norm(H, H, ONE, None, None, READ, None, READ, strength=np.float32(0.5), return_projection=True)
    assert torch.equal(z, ops.project(H, READ))
    for eps in (None, torch.float32, "1"):
        with pytest.raises(ValueError, match="eps"):
            ops.edit_add_norm(H, H, ONE, TWO, eps=eps)


def test_rows_of_which_one_alone_is_laid_out_otherwise():
    """A backend is given all streams in their own shape, or all flat."""
    x, residual = torch.randn(2, 10, 32), torch.randn(2, 32, 10).mT
    assert not residual.is_contiguous()
    for on in ("x", "sum"):
        expected = ops.edit_add_norm(x, residual.contiguous(), ONE, TWO, on=on)
        for one, other in zip(ops.edit_add_norm(x, residual, ONE, TWO, on=on), expected, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(ops.edit_add(x, residual, TWO, on=on), ops.edit_add(x, residual.contiguous(), TWO, on=on))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"groups": 2**31}, "less than 2.31"), ({"groups": 10**400}, "less than 2.31"),
        ({"group": torch.zeros(3, device="meta").int()}, "on meta"),
    ],
)
def test_numbers_of_groups_that_no_kernel_takes_are_refused(given, said):
    hidden = torch.ones(3, 4, device="meta" if "group" in given else "cpu")
    with pytest.raises(ValueError, match=said):
        ops.moments(hidden, **{"group": torch.zeros(3).int(), **given})


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, 0), np.ones(3)], ids=["several", "none", "numpy"])
def test_a_flag_that_is_several_numbers_is_refused(value):
    form = {"read": torch.ones(1, 4), "write": torch.ones(1, 4)}
    ops.edit(H, ONE)  # from here on the native module is asked first
    with pytest.raises(TypeError, match=r"return_projection is .* expected True or False"):
        ops.edit(torch.ones(2, 4, requires_grad=True), **form, return_projection=value)
    with pytest.raises(TypeError, match=r"return_projection is .* expected True or False"):
        ops.edit_add(torch.ones(2, 4), torch.ones(2, 4), **form, return_projection=value)


def test_what_is_found_in_a_tensor_does_not_depend_on_the_default_device():
    _native = pytest.importorskip("fastedit._native")
    found = _native.use_torch(torch)
    with torch.device("meta"):
        assert _native.use_torch(torch) == found
