"""Every Triton kernel compiled without a GPU (triton_code.py): activations move 128 bits a thread, nothing is fp64.

The launches are the backend's own, recorded instead of run.
"""

import os
import re
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels cannot be compiled under TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from fastedit.kernels import triton as backend
from fastedit.kernels.triton import launch, norm
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
    narrow_streams,
    needs,
    record,
    specialised,
)  # fmt: skip

KERNELS = {
    name
    for module_name, module in list(sys.modules.items())
    if module_name.startswith(backend.__name__ + ".")
    for name, function in vars(module).items()
    if isinstance(function, triton.JITFunction) and name.endswith("_kernel")
}


def call_forwards(dtype, residual_dtype):
    x, residual = empty(ROWS, WIDTH, dtype=dtype), empty(ROWS, WIDTH, dtype=residual_dtype)
    weight = empty(WIDTH, dtype=residual_dtype)
    backend.edit(x, *make_form())
    backend.edit_add(x, residual, *make_form(slots=3, coefficient=True), True)
    backend.edit_add_norm(x, residual, weight, weight, *make_form(), False, norm.LAYER, 1e-5)
    backend.edit_add_norm(x, residual, weight, None, *make_form(4, slots=3), True, norm.GEMMA, 1e-5, True)
    backend.edit_add_norm(
        x, residual, weight, None, *make_form(17, coefficient=True), False, norm.RMS, 1e-6, True
    )
    backend.project(x, empty(4, WIDTH), empty(4))
    backend.moments(x, torch.zeros(ROWS, dtype=torch.int32), 3)
    backend.moments(x, None, 1)
    units = torch.zeros(4096)
    backend.value_ascent(x[:2, :64], units[:, None].expand(-1, 64), units, None, None, units, units.expand(4096, -1), 9, 0.5)
    wide = empty(8, 20480, dtype=dtype)
    backend.edit_add_norm(wide, wide, wide[0], None, *make_form(width=20480), False, norm.RMS, 1e-6, True)


def call_backwards(dtype, residual_dtype):
    x, residual = empty(ROWS, WIDTH, dtype=dtype), empty(ROWS, WIDTH, dtype=residual_dtype)
    weight, stat = empty(WIDTH, dtype=residual_dtype), empty(ROWS)
    for rank, slots in ((0, 0), (17, 0), (4, 3)):
        form, z = make_form(rank, slots, True), empty(ROWS, rank) if rank else None
        backend.edit_backward(x, x, None, *form, z, z, needs(form), dtype)
    for rank in (0, 17):
        form, z = make_form(rank), empty(ROWS, rank) if rank else None
        backend.edit_add_norm_backward(
            residual, residual, residual, x, None, weight, stat, stat, *form, z, z, False, norm.LAYER,
            (*needs(form), True), (True, True), dtype, residual_dtype,
        )  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_activations_move_128_bits_and_nothing_is_fp64(monkeypatch, name):
    """On sm_80 each kernel's last case: where the code is not sm_90's, it is by Triton's hand and not by the case."""
    launches = record(monkeypatch, TARGETS[name])
    call_forwards(BF16, BF16)
    call_backwards(BF16, BF16)
    if name == "sm_80":
        launches = list({entry[0].__name__: entry for entry in launches}.values())
    assert check_code(launches, TARGETS[name]) == KERNELS


def test_the_same_for_fp32_rows(monkeypatch):
    target = TARGETS["sm_90"]
    launches = record(monkeypatch, target)
    call_forwards(F32, F32)
    check_code(
        [entry for entry in launches if entry[0].__name__ in ("edit_kernel", "edit_rows_kernel")], target
    )


def test_the_same_for_bf16_added_to_fp32(monkeypatch):
    target = TARGETS["sm_90"]
    launches = record(monkeypatch, target)
    call_forwards(BF16, F32)
    check_code([entry for entry in launches if entry[0].__name__ == "edit_kernel"], target)


@pytest.mark.parametrize("norm_dtype", [None, F32])
def test_any_number_of_rows_slots_and_ranks_is_one_compilation(monkeypatch, norm_dtype):
    """A decode step, a prompt and a batch run the same code: rows, slots and steps are no part of a kernel's key."""
    compilations = set()
    for rows, slots, rank in ((1, 1, 3), (7, 2, 4), (16, 16, 5), (4096, 48, 8), (70_000, 3, 7)):
        launches = record(monkeypatch, TARGETS["sm_90"])
        x, form = empty(rows, 512, dtype=BF16), make_form(rank, slots, width=512)
        if norm_dtype is None:
            backend.edit(x, *make_form(0, slots, width=512))
            backend.edit(x, *form)
            z = empty(rows, rank)
            backend.edit_backward(x, x, None, *form, z, z, needs(form), BF16)
        else:
            backend.edit_add_norm(x, x, empty(512, dtype=norm_dtype), None, *form, False, norm.RMS, 1e-6, True)
        keys = [(k.__name__, shape.num_warps, specialised(k, args, options)) for k, shape, args, options in launches]
        compilations.add(repr(keys))
    assert len(compilations) == 1, compilations


def test_gradients_recovered_from_the_output_compile(monkeypatch):
    """A low-rank edit that trains on the sum hands its output to the backward, and no residual (ops/autograd.py)."""
    target = TARGETS["sm_90"]
    launches = record(monkeypatch, target)
    rows, form, z = empty(ROWS, WIDTH), (None, None, *make_form(4)[2:5], None, None), empty(ROWS, 4)
    wanted = (True, False, False, True, True, True, False, True)
    backend.edit_add_norm_backward(
        rows, rows, rows, rows, None, empty(WIDTH), None, empty(ROWS), *form, None, z, True, norm.RMS, wanted, (False, False),
        F32, F32,
    )  # fmt: skip
    assert "columns_kernel" in {compile_launch(*entry, target) and entry[0].__name__ for entry in launches}


def running_products(ttgir):
    """(tt.dot lines, those that add to a value the innermost loop carries). Names repeat across scopes."""
    dots, running, carried = [], [], set()
    for line in ttgir.splitlines():
        if "scf.for " in line:
            carried = set(re.findall(r"(%\w+) =", line.partition("iter_args(")[2]))
            continue
        dot = re.search(r"tt\.dot %\w+, %\w+, (%\w+)", line)
        if dot:
            dots.append(line)
            running += [line] if dot[1] in carried else []
        carried.discard(line.strip().partition(" = ")[0])
    return dots, running


@triton.jit
def running_kernel(x, sums, width, BLOCK: tl.constexpr):
    """What running_products must flag: one accumulator for all tiles."""
    rows, total = tl.arange(0, BLOCK), tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        tile = tl.load(x + rows[:, None] * width + start + rows[None, :])
        total = tl.dot(tile, tl.trans(tile), total)
    tl.store(sums + rows[:, None] * BLOCK + rows[None, :], total)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_products_are_six_of_bf16_and_summed_in_fp32(monkeypatch, target):
    """No matrix accumulator runs across tiles, since it truncates (device.project_tile)."""
    launches = record(monkeypatch, target)
    x, form, z = empty(ROWS, WIDTH, dtype=BF16), make_form(17), empty(ROWS, 17)
    backend.project(x, *form[2:4])
    backend.edit_backward(x, x, None, *form, z, z, needs(form), BF16)
    kernels = [entry for entry in launches if entry[0].__name__ in ("project_tiles_kernel", "columns_kernel")]
    assert kernels
    for kernel, shape, args, options in kernels:
        dots, running = running_products(compile_launch(kernel, shape, args, options, target)[0].asm["ttgir"])
        assert len(dots) >= 6 and all("xbf16" in line for line in dots)
        assert not running, running
    shape, args = launch.Launch(1, 32, 4, 1, 1), (empty(32, WIDTH, dtype=BF16), empty(32, 32), WIDTH)
    compiled, _ = compile_launch(running_kernel, shape, args, {"BLOCK": 32}, target)
    assert running_products(compiled.asm["ttgir"])[1]


# --- the analysers themselves ---------------------------------------------------------------------


@triton.jit
def plain_kernel(x, out, scale, width, EVERY: tl.constexpr, BLOCK: tl.constexpr):
    """Moves x to out times scale; where EVERY is 2, from every second element of x."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + cols * EVERY, mask=cols < width, other=0.0) * tl.load(
        scale + cols, mask=cols < width, other=0.0
    )
    tl.store(out + cols, value.to(tl.bfloat16), mask=cols < width)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_analyser_flags_a_scalar_stream_among_vector_accesses(target):
    shape = launch.Launch(1, 1024, 4 * 32 // target.warp_size, 1, 1)
    args = (empty(4096, dtype=BF16), empty(4096, dtype=BF16), empty(4096), WIDTH)
    flagged = {}
    for every in (1, 2):
        compiled, names = compile_launch(plain_kernel, shape, args, {"EVERY": every, "BLOCK": 1024}, target)
        accesses = accesses_of(compiled, names)
        assert all(accesses[name] for name in ("x", "out", "scale")), accesses
        assert min(accesses["scale"]) == 128
        flagged[every] = narrow_streams(accesses)
    assert flagged[1] == {}
    assert flagged[2] == {"x": [16]}


def test_the_analyser_flags_an_unaligned_width(monkeypatch):
    """The kernels themselves, at a width that 16 does not divide: no stream may pass."""
    launches = record(monkeypatch, TARGETS["sm_90"])
    x = empty(ROWS, 1001, dtype=BF16)
    backend.edit_add(x, x, *make_form(width=1001))
    compiled, names = compile_launch(*launches[0], TARGETS["sm_90"])
    assert set(narrow_streams(accesses_of(compiled, names))) == {"x", "residual", "out"}


# --- launch shapes --------------------------------------------------------------------------------

WIDTHS = [1, 64, 100, 384, 768, 1000, 1024, 2048, 4096, 5120, 8192, 11008, 16384, 16400, 65536]
COUNTS = [1, 7, 256, 300, 4096, 65536, 1_000_000]


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("width", WIDTHS)
def test_launches_cover_the_rows_and_their_sums_do_not_depend_on_how_many(width, warp_size):
    made = {
        "tile": [launch.tile_launch(n, width, warp_size) for n in COUNTS],
        "rows": [launch.rows_launch(n, width, warp_size) for n in COUNTS],
        "products": [launch.wide_launch(n, width, 17, False, warp_size) for n in COUNTS],
        "wide": [launch.wide_launch(n, width, 4, True, warp_size) for n in COUNTS],
        "statistics": [launch.statistics_launch(n, width, warp_size) for n in COUNTS],
    }
    for name, shapes in made.items():
        assert len({replace(s, steps=0, programs=0) for s in shapes}) == 1, (
            f"{name} blocks depend on the row count"
        )
        tiles = launch.cdiv(width, shapes[0].block_width) if name == "tile" else 1
        for count, s in zip(COUNTS, shapes, strict=True):
            assert s.programs % tiles == 0
            covered = s.programs // tiles * s.steps * s.block_rows
            assert count <= covered < count + s.steps * s.block_rows, f"{name} {count} rows: {s}"
            assert s.num_warps * warp_size <= 1024
            if width >= 64:  # a narrower tile than 128 bits a thread would undo the vector accesses
                assert s.block_rows * s.block_width >= 8 * s.num_warps * warp_size, f"{name}: {s}"


@pytest.mark.parametrize("rank", [0, 1, 17, 64])
@pytest.mark.parametrize("width", WIDTHS)
def test_backward_launches_cover_the_partials(width, rank):
    for partials in (1, 16, 257):
        s = launch.columns_launch(partials, width, rank)
        assert s.programs == partials * launch.cdiv(width, s.block_width)
        assert s.steps * s.block_rows == launch.PARTIAL_ROWS
        assert s.block_rows * s.block_width >= 8 * s.num_warps * 32
    s = launch.reduce_launch(3, width)
    assert s.programs == 3 * launch.cdiv(width, s.block_width)


def test_a_full_gpu_of_short_programs_and_long_ones_beyond():
    """4,096 rows of 4,096 columns are enough programs for any GPU; more rows only lengthen them."""
    small, large = launch.tile_launch(4096, 4096), launch.tile_launch(65536, 4096)
    assert small.programs >= 2048 and small.steps == 1
    assert large.steps > 1 and large.programs <= 2 * launch.PROGRAMS
    assert launch.columns_launch(16, 4096, 0).programs >= 512
