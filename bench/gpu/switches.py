"""Kernels behind switches that are off until a GPU has shown a gain: against float64, and timed beside the present ones.

    python -m bench.gpu.switches --out bench/results           clusters and programmatic launches
    python -m bench.gpu.switches --out bench/results --more    tensor cores

Writes gpu-switches.csv, or gpu-tensor.csv with --more. `of_present` is the switched kernel's time over the present one's,
which it takes turns with: where it is below 1, and every verdict is ok, the switch has earned its place (kernels/cuda, `-D` and
its name). Both are compiled here, for this GPU.

FASTEDIT_CLUSTERS  rows wider than 8192 columns, by clusters of blocks (cluster.h)
FASTEDIT_PDL       a kernel starts while the one before it ends (run.h): chains of calls on few rows
FASTEDIT_TENSOR    products of a rank on tensor cores (backward_tensor.cu, rows_tensor.cu)
"""

import argparse
import ctypes
import dataclasses
import pathlib
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

from . import bits
from .device import NAME, REHEARSAL, Table, require, synchronize
from .speed import Rotating, sets_for, timed

sys.path[:0] = [str(bits.ROOT / "tests"), str(bits.ROOT / "tests/cuda_emulator")]
FIELDS = ("switch", "op", "rows", "width", "rank", "gate", "verdict", "us_present", "us_switched", "of_present")
UNITS = ("edit", "edit_add", "edit_add_norm", "edit_gated")
EXPORTS = """#include "abi.h"
#define EXPORT(op, Args) \\
  extern "C" int op(const fastedit::Args* args, void* stream) { return fastedit::cuda::op(*args, stream); }
EXPORT(edit, EditArgs)
EXPORT(edit_add, EditAddArgs)
EXPORT(edit_add_norm, EditAddNormArgs)
"""
EXPORTS_MORE = """
#define EXPORT_BACKWARD(op, Args) \\
  extern "C" int op(const fastedit::Args* args, void* workspace, void* stream) { \\
    return fastedit::cuda::op(*args, workspace, stream); \\
  } \\
  extern "C" int64_t op##_workspace(const fastedit::Args* args) { return fastedit::cuda::op##_workspace(*args); }
EXPORT_BACKWARD(edit_backward, EditBackwardArgs)
EXPORT_BACKWARD(edit_add_norm_backward, EditAddNormBackwardArgs)
"""


@dataclasses.dataclass(frozen=True)
class Case:
    switch: str
    op: str
    rows: int
    width: int
    rank: int
    gate: bool = False


CLUSTERS, PDL, TENSOR = "FASTEDIT_CLUSTERS", "FASTEDIT_PDL", "FASTEDIT_TENSOR"
CASES = (
    Case(CLUSTERS, "edit_add_norm", 4096, 16384, 4), Case(CLUSTERS, "edit", 4096, 16384, 4),
    Case(CLUSTERS, "edit", 4096, 16384, 0, True), Case(CLUSTERS, "edit_add_norm", 4096, 12288, 4),
    Case(CLUSTERS, "edit_add_norm", 2048, 20480, 0), Case(CLUSTERS, "edit_add_norm", 1, 16384, 4),
    Case(PDL, "edit_add_norm", 1, 4096, 0), Case(PDL, "edit_add", 1, 4096, 0), Case(PDL, "edit_add_norm", 64, 4096, 4),
)  # fmt: skip
BACKWARDS = ("edit_backward", 4), ("edit_add_norm_backward", 4)
MORE = tuple(
    Case(TENSOR, op, rows, width, rank)
    for rows, width in ((16384, 4096), (65536, 4096), (16384, 2048), (1000, 1024))
    for op, rank in (*BACKWARDS, ("edit", 8), ("edit", 16), ("edit_add", 16), ("edit", 64))
)


def build(folder, switch, more):
    folder.mkdir()
    (folder / "exports.cpp").write_text(EXPORTS + EXPORTS_MORE * more)
    sources = [*(path for path in bits.KERNEL_SOURCES if more or path.stem in UNITS), folder / "exports.cpp"]
    return bits.build(folder, sources, [f"-D{switch}"] if switch else [])


def calls_of(library):
    """The harness's methods on tensors of the device and its current stream; `launch` is the last call, to be repeated.

    While `checked`, a call ends with its outputs looked at: every element written, and nothing beside them.
    """
    import harness

    class Calls(harness.Emulated):
        def __init__(self):
            self.library, self.shift, self.checked = library, 0, False

        def call(self, op, args, outputs, backward=False):
            function, given, workspace = getattr(library, op), [ctypes.byref(args)], None
            if backward:
                size = getattr(library, f"{op}_workspace")
                size.restype = ctypes.c_int64
                workspace = torch.full((size(*given) // 4 + 1,), float("nan"))
                given.append(ctypes.c_void_p(workspace.data_ptr()))

            def launch(kept=workspace):
                stream = None if REHEARSAL else torch.cuda.current_stream().cuda_stream
                error = function(*given, ctypes.c_void_p(stream))
                assert error == 0, f"{op}: error {error}"

            harness.ARGUMENTS.clear()
            self.launch, self.outputs = launch, outputs
            launch()
            if self.checked:
                synchronize()
                outputs.check()

    return Calls()


def form_of(case, x):
    """Parameters, and a gate that half of the rows x pass."""
    from emulated_cases import make_form

    form = make_form(case.rows, case.width, case.rank)
    if case.gate:
        form["gate"] = torch.randn(case.width) / case.width**0.5
        scores = (x.double() @ form["gate"].double()).sort().values
        middle = scores[len(scores) // 2 - 1 :][:2].mean() if len(scores) > 1 else scores[0] - 1
        form["rule"] = torch.tensor([float(middle), 0.0, 0.0])
    return form


def check(calls, case, x, residual, form):
    """Raises where a result is not what the promise allows."""
    import emulated_cases as cases

    calls.checked = True
    if case.op == "edit_add_norm":
        return cases.check_edit_add_norm(calls, x, residual, form, 0, False)
    shape = case.rows, case.width, (x.dtype, x.dtype), form
    if case.op == "edit_backward":
        return cases.check_edit_backward(calls, *shape, without=("coefficient",))
    if case.op == "edit_add_norm_backward":
        return cases.check_norm_backward(calls, *shape, 0, False, without=("coefficient", "weight"))
    streams, options = ((x,), (False,)) if case.op == "edit" else ((x, residual), (False, False))

    def by_definition(dtype):
        given = cases.double(streams) if dtype == torch.float64 else streams
        gate = {name: form[name].to(dtype) for name in ("gate", "rule") if name in form}
        return getattr(cases.reference, case.op)(*given, *cases.reference_form(form, dtype), *options, **gate)[:1]

    got = getattr(calls, case.op)(*streams, form)[:1]
    cases.assert_all("out", got, by_definition(torch.float64), by_definition(torch.float32))


def launches(calls, case, sets, form):
    """Calls in turn over the sets of buffers, each with outputs of its own."""
    made, needs = [], [True] * 6 + [False]  # no coefficient's
    z, rstd, weight = torch.randn(case.rows, case.rank), torch.rand(case.rows), torch.ones(case.width).to(sets[0][0].dtype)
    for x, residual in sets:
        if case.op == "edit_add_norm":
            calls.edit_add_norm(x, residual, weight, None, form)
        elif case.op == "edit_backward":
            calls.edit_backward(x, residual, None, form, None, z, needs, x.dtype, x.shape)
        elif case.op == "edit_add_norm_backward":
            calls.edit_add_norm_backward(
                x, residual, x, residual, None, weight, None, rstd, form, None, z, False, 0, [*needs, True], (False, False),
                x.dtype, x.dtype, x.shape,
            )  # fmt: skip
        else:
            calls.edit_add(x, residual, form) if case.op == "edit_add" else calls.edit(x, form)
        made.append((calls.launch, calls.outputs, z, rstd, weight))
    return Rotating(lambda i: made[i][0](), len(made))


def measure(table, case, present, switched):
    streams = {"edit": 2, "edit_add": 3, "edit_backward": 3}.get(case.op, 4)
    count = sets_for(streams, 2 * case.rows * case.width)
    sets = [[torch.randn(case.rows, case.width).bfloat16() for _ in range(2)] for _ in range(count)]
    form = form_of(case, sets[0][0])
    about = dataclasses.asdict(case) | {"gate": int(case.gate)}
    try:
        check(switched, case, *sets[0], form)
        verdict = "ok"
    except AssertionError as error:
        verdict = f"WRONG: {error}"[:200]
    switched.checked = False
    functions = {"present": launches(present, case, sets, form), "switched": launches(switched, case, sets, form)}
    found = {name: statistics.median(times) for name, times in timed(functions, case.rows < 1024).items()}
    ratio = found["switched"] / found["present"]
    table.write(**about, verdict=verdict, us_present=f"{found['present']:.2f}", us_switched=f"{found['switched']:.2f}",
                of_present=f"{ratio:.3f}")  # fmt: skip
    print(*about.values(), verdict, f"{found['switched']:.2f} us, {ratio:.3f} of the present kernel's", flush=True)
    return verdict == "ok"


def run(table, libraries, cases=CASES):
    """How many cases fail; `libraries` by switch, the present one by none."""
    calls = {switch: calls_of(library) for switch, library in libraries.items()}
    failed = 0
    with torch.device(NAME):
        for case in cases:
            try:
                failed += not measure(table, case, calls[""], calls[case.switch])
            except Exception as error:  # the next case may run
                failed += 1
                print(case, f"{type(error).__name__}: {error}", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--more", action="store_true", help="the kernels on tensor cores")
    options = parser.parse_args()
    require()
    torch.manual_seed(0)
    switches, cases, name = ((TENSOR,), MORE, "tensor") if options.more else ((CLUSTERS, PDL), CASES, "switches")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        folders = {switch: pathlib.Path(folder) / (switch or "present") for switch in ("", *switches)}
        made = {switch: pool.submit(build, path, switch, options.more) for switch, path in folders.items()}
    libraries = {switch: library.result() for switch, library in made.items() if not library.exception()}
    for switch in made.keys() - libraries.keys():
        print(f"{switch or 'the present kernels'}: {made[switch].exception()}", flush=True)
    failed = run(Table(pathlib.Path(options.out) / f"gpu-{name}.csv", FIELDS), libraries, cases)
    raise SystemExit(f"{failed} cases failed" if failed else 0)


if __name__ == "__main__":
    main()
