"""The Triton edits behind a gate, compiled without a GPU: what holds for every kernel, in the pass that edits the rows."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels cannot be compiled under TRITON_INTERPRET=1", allow_module_level=True)

from fastedit.kernels import triton as backend
from fastedit.kernels.triton import norm
from triton_code import (
    BF16,
    F32,
    ROWS,
    TARGETS,
    WIDTH,
    accesses_of,
    check_code,
    compile_launch,
    empty,
    make_form,
    record,
)

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def make_gate(slots=0, width=WIDTH):
    lead = (slots,) if slots else ()
    return {"gate": empty(*lead, width), "rule": empty(*lead, 3)}


def steering(width=WIDTH):
    return None, empty(width), *[None] * 5


def call_gated(dtype, residual_dtype):
    """Each of whole rows, tiles and products, with and without a norm."""
    x, residual = empty(ROWS, WIDTH, dtype=dtype), empty(ROWS, WIDTH, dtype=residual_dtype)
    weight, wide = empty(WIDTH, dtype=residual_dtype), empty(8, 20480, dtype=dtype)
    backend.edit(x, *steering(), **make_gate())
    backend.edit_add(x, residual, *make_form(4, slots=3, coefficient=True), True, **make_gate(3))
    backend.edit_add_norm(x, residual, weight, weight, *make_form(), False, norm.LAYER, 1e-5, **make_gate())
    backend.edit_add_norm(x, residual, weight, None, *make_form(17), True, norm.RMS, 1e-6, True, **make_gate())
    backend.edit_add(wide, wide, *steering(20480), False, **make_gate(width=20480))
    return 5


@every_target
def test_a_gated_edit_is_one_launch_of_wide_accesses_in_fp32(monkeypatch, target):
    launches = record(monkeypatch, target)
    assert call_gated(BF16, BF16) == len(launches)
    assert check_code(launches, target) == {"edit_rows_kernel", "edit_wide_kernel"}


def test_the_same_for_bf16_added_to_fp32(monkeypatch):
    launches = record(monkeypatch, TARGETS["sm_90"])
    call_gated(BF16, F32)
    check_code([entry for entry in launches if entry[0].__name__ == "edit_rows_kernel"], TARGETS["sm_90"])


@every_target
def test_a_row_in_registers_is_moved_once(monkeypatch, target):
    """By its accesses: as many bits of each stream as the tile has. And the rule is read, not compiled in."""
    launches, x = record(monkeypatch, target), empty(ROWS, WIDTH, dtype=BF16)
    backend.edit_add(x, x, *steering(), True, **make_gate())
    backend.edit_add_norm(x, x, x[0], None, *make_form(4, slots=3), False, norm.GEMMA, 1e-6, **make_gate(3))
    for kernel, shape, args, options in launches:
        assert shape.steps == 1
        accesses = accesses_of(*compile_launch(kernel, shape, args, options, target))
        threads, tile = shape.num_warps * target.warp_size, 16 * shape.block_rows * shape.block_width
        streams = [name for name in ("x", "residual", "out", "normed") if name in accesses]
        assert {name: threads * sum(accesses[name]) for name in streams} == dict.fromkeys(streams, tile)
        assert min(accesses["gate"]) == 128
        # Triton 3.6 loads a row's number again for each register that will hold it.
        assert set(accesses["rule"]) == {32} and len(accesses["rule"]) % 3 == 0


def test_without_a_gate_the_kernels_have_no_trace_of_one(monkeypatch):
    """A gate is two sums along the row and a root, in registers and over tiles alike; without one none of them is there."""
    target = TARGETS["sm_90"]
    for width in (WIDTH, 20480):
        launches, x = record(monkeypatch, target), empty(8, width, dtype=BF16)
        for gate in ({}, make_gate(width=width)):
            backend.edit_add_norm(x, x, x[0], None, *steering(width), True, norm.RMS, 1e-6, **gate)
        plain, gated = (compile_launch(*entry, target)[0].asm for entry in launches)
        assert gated["ttgir"].count('"tt.reduce"') == plain["ttgir"].count('"tt.reduce"') + 2
        assert (plain["ptx"].count("sqrt.rn"), gated["ptx"].count("sqrt.rn")) == (0, 1)
