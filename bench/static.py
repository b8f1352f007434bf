"""What can be known of the CUDA kernels without a GPU, as a CSV: registers, shared memory, spills, the width of
every activation access, occupancy, and the bytes that each op moves.

    python -m bench.static [--out bench/results] [--arch sm_90 --arch sm_80]

Needs a checkout (the kernels' sources), nvcc, and cuobjdump (CUDA's, or the one in the triton package). Which kernels
an op launches, with how many threads and how much shared memory, and how many bytes of rows it moves, is asked of the
sources themselves under tests/cuda_emulator, at width 4096. Times are those bytes at the nominal bandwidth: a
bound, not a measurement.
"""

import argparse
import csv
import ctypes
import itertools
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/cuda_emulator")]

WIDTH, ROWS, MANY_ROWS = 4096, 8, 16384
NOMINAL_GB_S = {"sm_90": 4800, "sm_80": 2039}  # H200, A100 80 GB SXM, by their datasheets
# Of one multiprocessor: shared memory, and what the system keeps of it in each block. Warps, blocks and registers are
# the same on both (CUDA programming guide, compute capabilities).
SHARED_BYTES = {"sm_90": 228 * 1024, "sm_80": 164 * 1024}
WARPS, BLOCKS, REGISTERS, QUARTERS, RESERVED_BYTES = 64, 32, 65536, 4, 1024

FIELDS = (
    "arch", "op", "mode", "dtype", "rank", "path", "kernel", "threads", "shared_bytes", "registers", "spill_bytes",
    "ldl_stl", "wide_accesses", "narrow_accesses", "instructions", "warps_per_sm", "row_bytes", "partial_bytes_per_row",
    "ns_per_row",
)  # fmt: skip
PAIRS = {"f32": (0, 0), "bf16": (1, 1), "f16": (2, 2), "bf16+f32": (1, 0), "f16+f32": (2, 0)}


def warps_per_sm(registers, threads, shared_bytes, arch):
    """Resident warps of one multiprocessor, from the four limits that bound its blocks."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out in 256s, a quarter of them to each scheduler
    by_registers = REGISTERS // QUARTERS // per_warp * QUARTERS // warps
    by_shared = SHARED_BYTES[arch] // (-(-(shared_bytes + RESERVED_BYTES) // 128) * 128)
    return min(WARPS // warps, BLOCKS, by_registers, by_shared) * warps


def plain_names(mangled):
    """{mangled: unit_backward<Brain, Brain, 8, true>}: the same from nvcc and from the emulator's compiler."""
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    named = {}
    for name, text in zip(mangled, done.stdout.splitlines(), strict=True):
        text = re.sub(r"\(anonymous namespace\)::|\w*_GLOBAL__N_\w*::|fastedit::cuda::", "", text)
        named[name] = re.search(r"([a-z_]+(?:<.*>)?)\(", text).group(1)
    return named


# What each op launches and moves


def cases():
    """(op, mode, dtype, rank, path): path is vectors, gate (behind one), slots or scalar (an odd view)."""
    ops = ("edit", "edit_add", "edit_add_norm", "project")
    for op, mode, dtype, rank in itertools.product(ops, ("forward", "backward"), PAIRS, (0, 4, 8)):
        one_dtype = (op in ("edit", "project") and mode == "forward") or op == "project"
        if (op == "project" and rank == 0) or (one_dtype and "+" in dtype) or (op == "edit_add" and mode == "backward"):
            continue  # edit_add's backward is edit's
        yield op, mode, dtype, rank, "vectors"
        if mode == "forward" and op != "project" and rank < 8:
            yield op, mode, dtype, rank, "gate"
        if rank < 8 and op != "project":
            yield op, mode, dtype, rank, "slots"
        if dtype in ("f32", "bf16") and rank == 4:
            yield op, mode, dtype, rank, "scalar"


def observe(cuda, op, mode, dtype, rank, path):
    """(launches, bytes of one row's streams, bytes of one row's share of the partials, for many rows)."""
    import torch
    from harness import CODES, PARAMETERS

    torch_dtypes = {code: kind for kind, code in CODES.items()}
    narrow, wide = (torch_dtypes[code] for code in PAIRS[dtype])
    slots = 2 if path == "slots" else 0

    def rows(kind):
        if path == "scalar":
            return torch.randn(ROWS * (WIDTH + 1) + 1).to(kind)[1:].view(ROWS, WIDTH + 1)[:, :WIDTH]
        return torch.randn(ROWS, WIDTH).to(kind)

    lead = (slots,) if slots else ()
    form = {"scale": torch.rand(*lead, WIDTH), "bias": torch.rand(*lead, WIDTH)}
    if rank:
        form |= {n: torch.randn(*lead, rank, WIDTH) / 64 for n in ("read", "write")}
        form["offset"] = torch.randn(*lead, rank)
    if slots:
        form["slot"] = torch.zeros(ROWS, dtype=torch.int32)
    if path == "gate":
        form |= {"gate": torch.randn(WIDTH), "rule": torch.tensor([0.0, 0.0, 1.0])}
    z, weight, stat = torch.randn(ROWS, rank) if rank else None, torch.rand(WIDTH).to(wide), torch.rand(ROWS)
    shape, needs = (ROWS, WIDTH), [True, *(name in form for name in PARAMETERS), False]
    if (op, mode) == ("edit", "forward"):
        cuda.edit(rows(wide), form)
    elif (op, mode) == ("edit", "backward"):
        cuda.edit_backward(rows(wide), rows(narrow), None, form, None, z, needs, narrow, shape)
    elif op == "edit_add":
        cuda.edit_add(rows(narrow), rows(wide), form)
    elif (op, mode) == ("edit_add_norm", "forward"):
        cuda.edit_add_norm(rows(narrow), rows(wide), weight, None, form)
    elif op == "edit_add_norm":
        cuda.edit_add_norm_backward(
            rows(wide), rows(wide), torch.randn(shape).to(wide), rows(narrow), None, weight, None, stat, form, None, z,
            False, 0, [*needs, True], (True, False), narrow, wide, shape,
        )  # fmt: skip
    elif mode == "forward":
        cuda.project(rows(wide), form["read"], form["offset"])
    else:
        cuda.project_backward(z, rows(wide), form["read"], (True, True, True), wide, WIDTH)
    row_bytes = sum(loaded + stored for name, (loaded, stored) in cuda.moved_bytes.items() if name != "workspace")
    partial = 0
    if mode == "backward":
        cuda.last_args.rows = MANY_ROWS
        size = getattr(cuda.library, f"{cuda.last_op}_workspace")(ctypes.byref(cuda.last_args))
        partial = 2 * size / MANY_ROWS  # written once, read once
    return cuda.launches(), row_bytes / ROWS, partial


# What the compiler made of them


def compiled(arch, folder):
    """{plain name: row of what the compiler says}, for every kernel of every source."""
    from cuda_tools import UNITS, compile_unit, instructions

    kernels = {}
    for unit in UNITS:
        cubin, report = compile_unit(unit, folder, arch)
        facts = re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            report, re.DOTALL,
        )  # fmt: skip
        code, shown = instructions(cubin), plain_names([name for name, *_ in facts])
        for name, stores, loads, registers in facts:
            ops = [op for op, _ in code[name]]
            moves = [op for op in ops if re.match(r"LDGSTS|STG|LDG.*\.(EF|NA)\b", op)]
            if vectors(shown[name]):  # whose 32-bit stores are a row's statistics, q and coefficients
                moves = [op for op in moves if op != "STG.E"]
            kernels[shown[name]] = {
                "arch": arch, "op": unit.stem, "kernel": shown[name], "registers": int(registers),
                "spill_bytes": int(stores) + int(loads), "instructions": len(ops),
                "ldl_stl": sum(op.startswith(("LDL", "STL")) for op in ops),
                "wide_accesses": sum(".128" in op for op in moves),
                "narrow_accesses": sum(".128" not in op for op in moves),
            }  # fmt: skip
    return kernels


def vectors(kernel):
    return "Any" not in kernel and re.match(r"(stream|tile|loop)_rows|unit_|column_|outer_", kernel) is not None


def table(archs):
    """The CSV's rows: one for each kernel that each case launches, then the instantiations that none launches."""
    import harness

    with tempfile.TemporaryDirectory() as folder:
        cuda = harness.build(pathlib.Path(folder))
        seen = [(case, observe(cuda, *case)) for case in cases()]
        for arch in archs:
            kernels, used = compiled(arch, folder), set()
            for (op, mode, dtype, rank, path), (launches, row_bytes, partial) in seen:
                shown = plain_names([name for name, *_ in launches])
                for name, _blocks, threads, shared in launches:
                    plain = shown[name]
                    used.add(plain)
                    warps = warps_per_sm(kernels[plain]["registers"], threads, shared, arch)
                    yield kernels[plain] | {
                        "op": op, "mode": mode, "dtype": dtype, "rank": rank, "path": path, "threads": threads,
                        "shared_bytes": shared, "warps_per_sm": warps, "row_bytes": round(row_bytes),
                        "partial_bytes_per_row": round(partial),
                        "ns_per_row": f"{(row_bytes + partial) / NOMINAL_GB_S[arch]:.2f}",
                    }  # fmt: skip
            yield from (kernel for plain, kernel in kernels.items() if plain not in used)


def markdown(path):
    """The CSV as a table: sm_90, vectors, one line a kernel, * behind a gate; what no case launches is counted."""
    with pathlib.Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| op | dtype | rank | kernel | threads | registers | shared KB | spills | 128-bit / narrower | warps/SM "
        "| bytes a row | ns a row |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mode = r["mode"] + " *" * (r["path"] == "gate")
        if r["arch"] == "sm_90" and r["path"] in ("vectors", "gate") and r["dtype"] in ("f32", "bf16"):
            lines.append(
                f"| {r['op']} {mode} | {r['dtype']} | {r['rank']} | `{r['kernel']}` | {r['threads']} "
                f"| {r['registers']} | {int(r['shared_bytes']) / 1024:.0f} | {r['spill_bytes']} "
                f"| {r['wide_accesses']} / {r['narrow_accesses']} | {r['warps_per_sm']} | {r['row_bytes']} "
                f"| {r['ns_per_row']} |"
            )
    spilled = sum(int(r["spill_bytes"]) > 0 or int(r["ldl_stl"]) > 0 for r in rows)
    others = sum(not r["path"] for r in rows)
    lines.append(f"\n{len(rows)} rows; {spilled} kernels spill; {others} instantiations are launched by no case")
    lines[-1] += f" at width {WIDTH}."
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--arch", action="append", choices=sorted(NOMINAL_GB_S), help="default: sm_90")
    options = parser.parse_args()
    if not (ROOT / "tests/cuda_emulator").is_dir():
        raise SystemExit("bench.static needs a checkout: tests/cuda_emulator is not here")
    from cuda_tools import find_cuobjdump, find_nvcc
    from harness import compiler

    needed = {"nvcc (put it on the PATH or set CUDA_HOME)": find_nvcc(), "a C++ compiler (g++)": compiler(),
              "cuobjdump (CUDA's, or pip install triton)": find_cuobjdump()}  # fmt: skip
    missing = [name for name, found in needed.items() if not found]
    if missing:
        raise SystemExit(f"bench.static needs what is not here: {', '.join(missing)}")
    path = pathlib.Path(options.out) / "cuda-static.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(table(options.arch or ["sm_90"]))  # before the file is opened: this takes minutes, and may be ended
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(path), path, sep="\n")


if __name__ == "__main__":
    main()
