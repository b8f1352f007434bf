"""What the native module is given by others: memory that goes while a call runs, exporters of their own, sizes beyond reason.

Also run under AddressSanitizer (make sanitize), which sees a read of what is gone.
"""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch

from fastedit import _native, arrays, ops

H, SCALE = torch.randn(6, 32), torch.linspace(1, 2, 32)
NONE = [None] * 6


class Exporter:
    """Speaks DLPack, and keeps nothing: what it has exported lives as long as the capsule."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **_):
        array, self.array = self.array, None
        capsule = array.__dlpack__()
        del array
        self.trash = [np.full(32, np.nan, np.float32) for _ in range(64)]  # on what was freed, if it was
        return capsule


def test_results_are_poisoned_in_tests():
    """tests/conftest.py: an element that a kernel forgets is NaN in every test of every op."""
    assert _native.POISONS


def test_what_an_exporter_gave_lives_through_the_call():
    expected = _native.edit(H.numpy(), SCALE.numpy(), *NONE)[0]
    for _ in range(20):
        found = _native.edit(H.numpy(), Exporter(SCALE.numpy().copy()), *NONE)[0]
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(arrays.edit(Exporter(H.numpy().copy()), SCALE.numpy()), expected)


@pytest.mark.parametrize("fault", ["raises", "no capsule", "another capsule"])
def test_an_exporter_that_fails(fault):
    class Broken(Exporter):
        def __dlpack__(self, **_):
            if fault == "raises":
                raise BufferError("not today")
            return 3 if fault == "no capsule" else H.__dlpack__.__self__.numpy()

    with pytest.raises((TypeError, BufferError)):
        _native.edit(H.numpy(), Broken(SCALE.numpy()), *NONE)


def test_arguments_and_results_outlive_each_other():
    """Temporaries as arguments, results kept after them, and arguments after results."""
    for _ in range(50):
        out = ops.edit(torch.full((6, 32), 2.0), torch.full((32,), 3.0), torch.full((32,), 1.0))
        assert (out == 7).all()
        x = torch.ones(6, 32)
        ops.edit_add(x, x, SCALE.clone(), strength=torch.full((6,), 0.5))
        assert (x == 1).all()


def test_tensors_are_held_while_the_kernel_runs_without_the_lock():
    """From 65,536 elements on the GIL is free: another thread drops its references, and makes others on the same memory."""
    stop, wrong = threading.Event(), []
    shared = {"h": torch.ones(512, 256), "scale": torch.full((256,), 2.0)}

    def swap():
        while not stop.is_set():
            shared["h"], shared["scale"] = torch.ones(512, 256), torch.full((256,), 2.0)
            torch.full((512, 256), float("nan"))

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(200):
            wrong += [1] if not (ops.edit(shared["h"], shared["scale"]) == 2).all() else []
    finally:
        stop.set()
        thread.join()
    assert not wrong


def test_nothing_is_kept_of_a_call():
    held = [torch.randn(6, 32), torch.linspace(1, 2, 32), torch.zeros(6, dtype=torch.int32)]
    seen = [weakref.ref(t) for t in held]
    ops.edit(held[0], held[1][None], slot=held[2])
    with pytest.raises(ValueError, match="expected"):
        ops.edit(held[0], held[1])  # refused
        ops.edit(held[0], held[1][:-1])
    held.clear()
    gc.collect()
    assert not any(ref() is not None for ref in seen)


@pytest.mark.parametrize("rows", [2**40, 2**55])
def test_more_rows_than_memory(rows):
    """An expanded tensor takes no memory, and its result would: the allocator says so, and nothing is written."""
    wide = H[:1].expand(rows, 32)
    with pytest.raises(RuntimeError):
        ops.edit(wide, SCALE)
    with pytest.raises(RuntimeError):
        ops.project(wide, SCALE[None])
    array = np.lib.stride_tricks.as_strided(H.numpy(), (rows, 32), (0, 4))
    for call in (lambda: arrays.edit(array, SCALE.numpy()), lambda: arrays.project(array, SCALE.numpy()[None])):
        with pytest.raises((MemoryError, ValueError)):
            call()


def test_empty_sizes_of_every_kind():
    for shape in ((0, 32), (3, 0, 32), (0, 0, 32)):
        for h in (torch.empty(shape), torch.empty(shape).mT.contiguous().mT, H[:1].expand(1, 32)[:0].expand(0, 32)):
            assert ops.edit(h, SCALE).shape == h.shape
    assert ops.edit(torch.empty(3, 0), torch.empty(0)).shape == (3, 0)
    assert arrays.edit(np.empty((3, 0), np.float32), np.empty(0, np.float32)).shape == (3, 0)
    assert ops.project(torch.empty(0, 32), SCALE[None]).shape == (0, 1)


@pytest.mark.parametrize("dims", [16, 17, 40])
def test_many_dimensions(dims):
    h = H.view(*[1] * (dims - 2), 6, 32)
    assert torch.equal(ops.edit(h, SCALE).view(6, 32), ops.edit(H, SCALE))
    form = [torch.randn(2, 32, requires_grad=True) for _ in range(2)]
    (d_read, d_write), exact = (
        torch.autograd.grad(ops.edit(rows, read=form[0], write=form[1]).square().sum(), form) for rows in (h, H)
    )
    torch.testing.assert_close((d_read, d_write), exact)
    if dims > 32:
        return  # which NumPy 1 has not
    if dims > 16:
        with pytest.raises(ValueError, match=f"has {dims} dimensions, expected at most 16"):
            arrays.edit(h.numpy(), SCALE.numpy())
    else:
        np.testing.assert_array_equal(arrays.edit(h.numpy(), SCALE.numpy()).reshape(6, 32), ops.edit(H, SCALE).numpy())


@pytest.mark.parametrize("groups", [0, -1, 2**31, 2**62])
def test_numbers_of_groups_beyond_reason(groups):
    with pytest.raises((ValueError, MemoryError, RuntimeError)):
        _native.moments(H.numpy(), np.zeros(6, np.int32), groups, None)


def test_packed_structs_of_another_size():
    for op in _native.OPS:
        with pytest.raises(TypeError, match="the packed struct has 3 bytes"):
            _native.raw(op, b"abc")
    with pytest.raises(ValueError, match="no op nothing"):
        _native.raw("nothing", b"")
    with pytest.raises(ValueError, match="no CPU kernels for"):
        _native.set_instruction_set("sse9")
