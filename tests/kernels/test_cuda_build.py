"""What the CUDA compiler makes of kernels/cuda, without a GPU: no spills, no local memory, no fp64, 128-bit
loads and stores of every stream. And the launch shapes, which are plain C++."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_tools import KERNELS, UNITS, compile_unit, find_cuobjdump, find_nvcc, instructions, listing

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
needs_cuobjdump = pytest.mark.skipif(find_cuobjdump() is None, reason="needs cuobjdump (in CUDA, or in Triton)")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """{unit: (cubin, ptxas' report)} for sm_90."""
    folder = tmp_path_factory.mktemp("cubins")
    largest_first = sorted(UNITS, key=lambda unit: -unit.stat().st_size)
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda unit: compile_unit(unit, folder), largest_first)
        return {unit.stem: report for unit, report in zip(largest_first, reports, strict=True)}


@pytest.fixture(scope="session")
def sass(compiled):
    """{kernel's mangled name: its instructions}."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(instructions, [cubin for cubin, _ in compiled.values()])
        return {name: code for unit in found for name, code in unit.items()}


def vectorised(sass):
    """The kernels that take a dtype at compile time: all that are not the scalar path."""
    return {n: code for n, code in sass.items() if re.search(r"kernelI|rowsI|sumsI|backwardI", n) and not scalar(n)}


def scalar(name):
    return "3AnyE" in name or re.search(r"loop_backward|reduce_kernel", name) is not None


@needs_nvcc
def test_the_compiler_warns_of_nothing_and_spills_nothing(compiled):
    assert set(compiled) == {unit.stem for unit in UNITS}
    for unit, (_, report) in compiled.items():
        assert "warning" not in report, report
        for stack, stores, loads in re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
        ):
            assert (stack, stores, loads) == ("0", "0", "0"), f"{unit}: {report}"
    entries = sum(report.count("Compiling entry function") for _, report in compiled.values())
    frames = sum(report.count("bytes stack frame") for _, report in compiled.values())
    assert frames >= entries >= 60


def built_architectures():
    """CMakeLists.txt's, of those that the compiler lists, without sm_90."""
    lists = (KERNELS.parent / "CMakeLists.txt").read_text()
    wanted = re.search(r"known_cuda_architectures\(\w+ \S+ ([\d ]+)\)", lists)[1].split()
    listed = subprocess.run([find_nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in wanted if f"sm_{arch}" in listed and arch != "90"]


@needs_nvcc
@pytest.mark.slow
def test_no_architecture_that_is_built_spills(tmp_path):
    """Beside sm_90, which the ordinary tests look at."""
    found = []
    for arch in built_architectures():
        for unit in UNITS:
            _, report = compile_unit(unit, tmp_path, f"sm_{arch}")
            assert "warning" not in report, report
            facts = r"Function properties for (\w+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
            found += [
                (arch, unit.stem, name, int(stores), int(loads))
                for name, stores, loads in re.findall(facts, report)
                if int(stores) or int(loads)
            ]
    assert not found


@needs_nvcc
@needs_cuobjdump
def test_no_kernel_touches_local_memory_or_computes_in_fp64(sass):
    assert len(sass) >= 60
    for name, code in sass.items():
        ops = {op for op, _ in code}
        bad = {op for op in ops if re.match(r"(LDL|STL|DADD|DMUL|DFMA|DSETP|ATOM|RED)\b", op) or ".F64" in op}
        assert not bad, f"{name}: {sorted(bad)}"


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("unit", ["edit_add_norm", "edit_gated"])
def test_kernels_behind_switches(tmp_path, unit):
    """No spill; and of a cluster's barriers, which empty L1, the one before the rows alone (cluster.h)."""
    source = KERNELS / f"cuda/{unit}.cu"
    cubin, report = compile_unit(source, tmp_path, flags=("-DFASTEDIT_CLUSTERS", "-DFASTEDIT_PDL"))
    assert "warning" not in report, report
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}
    kernels = {name: [op for op, _ in code] for name, code in instructions(cubin).items() if "tile_rows" in name}
    clusters = {name: ops for name, ops in kernels.items() if "PartE6" in name}
    assert len(clusters) == 5
    for ops in clusters.values():
        assert ops.count("UCGABAR_WAIT") == ops.count("CCTL.IVALL") == 1
        assert "STAS" in ops and any(op.startswith("SYNCS.PHASECHK") for op in ops)
    for ops in kernels.values():  # and each waits for the kernel before it
        assert "ACQBULK" in ops


@needs_nvcc
@needs_cuobjdump
def test_streams_move_128_bits_at_a_time(sass):
    """Every stream of every kernel but those of the scalar path."""
    kernels = vectorised(sass)
    assert len(kernels) >= 50
    for name, code in kernels.items():
        # Parameters come through .CONSTANT loads; streams with a hint for L1 or L2 (vec.h). Beside fp32 a
        # 16-bit stream moves four elements, 64 bits.
        streams = [op for op, _ in code if op.startswith("LDG") and re.search(r"\.(EF|NA)\b", op)]
        streams += [op for op, _ in code if op.startswith("LDGSTS")]  # straight into shared memory
        stores = [op for op, _ in code if op.startswith("STG")]
        if "loop_rows" in name:  # through L1, since each is read again: among the parameters' loads
            assert any(op.endswith(".128.CONSTANT") for op, _ in code), name
            assert not [op for op, _ in code if "U16" in op or op == "STG.E.U16"], name
            streams = [op for op, _ in code if op.startswith("LDG.E.128")]
        mixed = "Li4E" in name and re.search("4Half|5Brain", name) is not None
        assert any(".128" in op for op in streams), (name, streams)
        narrow = {op for op in streams if ".128" not in op}
        assert not narrow or (mixed and all(op.endswith(".64") for op in narrow)), (name, narrow)
        if "unit_backward" in name:
            assert any(op.startswith("LDGSTS") for op in streams), name
        if "outer_sums" not in name:
            width = "64" if mixed and "column_sums" in name else "128"  # of d_x, hidden's dtype
            assert f"STG.E.{width}" in stores, (name, stores)


# Where a loop may take more than half of the issue slots that its bytes leave at an H200's bandwidth: what it is bound by.
# A rank may take 80 %. The backward of a form with scale, bias and a rank takes more, and no more than is written here: its
# multiply-adds alone, 20 an element, are half of what the six bytes of an edit leave. On tensor cores it takes less, and the
# bar serves rank 16 in all but the op that moves the fewest bytes.
SHARES = {
    ("edit", "backward", 4): 0.95, ("edit_add_norm", "backward", 4): 0.86, ("edit on tensor cores", "forward", 16): 1.0,
}  # fmt: skip


@needs_nvcc
@needs_cuobjdump
def test_loops_leave_memory_the_time_that_their_bytes_need(compiled):
    from bench import slots
    from bench.static import plain_names

    codes = {}
    for unit in slots.UNITS:
        code = listing(compiled[unit][0])
        names = plain_names(list(code))
        codes |= {names[mangled]: body for mangled, body in code.items()}
    rows = list(slots.table(codes))
    assert len(rows) == 2 * len(slots.CASES)
    for row in rows:
        allowed = SHARES.get((row["op"], row["mode"], row["rank"]), 0.8 if row["rank"] else 0.5)
        assert float(row["share_h200"]) <= allowed, row
        assert float(row["share_h100"]) <= min(allowed, 1.0), row


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(("kernel", "in_flight"), [("Lb0ELb0", 4), ("Lb1ELb0", 8)], ids=["edit", "edit_add"])
def test_four_rows_are_in_flight_before_the_first_use(sass, kernel, in_flight):
    """The plain stream kernels issue every load of four rows before the first conversion or store."""
    checked = 0
    for name, code in vectorised(sass).items():
        if "stream_rows" not in name or kernel not in name:
            continue
        best = run = 0
        for op, _ in code:
            if op.startswith("LDG") and ".EF" in op:
                run += 1
            elif op.startswith(("STG", "FFMA", "FADD", "FMUL")):
                run = 0
            best = max(best, run)
        assert best == in_flight, name
        checked += 1
    assert checked == (3 if in_flight == 4 else 5)


LAUNCH = r"""
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include "cuda/launch.h"
using namespace fastedit::cuda;
#define CHECK(x) if (!(x)) return fail(rows, width, vector, sms, #x)
int fail(long rows, long width, int vector, int sms, const char* what) {
  std::printf("rows %ld width %ld vector %d sms %d: %s\n", rows, width, vector, sms, what);
  return 1;
}
int main() {
  const int64_t all_rows[] = {0, 1, 7, 31, 32, 33, 300, 8192, 65536, 100000000};
  const int64_t widths[] = {0, 1, 8, 64, 96, 100, 768, 1024, 4096, 4104, 5120, 8192, 8200,
                            9216, 16384, 16392, 20480, 53248, 65536};
  const int vectors[] = {1, 4, 8}, chips[] = {1, 84, 108, 128, 132, 148, 170};
  const int ranks[] = {0, 1, 4, 17, 64, 66};  // 66: 64 behind a gate
  static_assert(vector_width(4) == 4 && vector_width(2) == 8, "128 bits");
  for (int64_t rows : all_rows) for (int64_t width : widths)
  for (int vector : vectors) for (int sms : chips) {
    if (width % vector) continue;
    for (int per_row = 0; per_row < 2; ++per_row) {
      Shape s = stream_shape(rows, width, vector, per_row, sms);
      int64_t tiles = column_tiles(width, vector);
      CHECK(s.blocks <= kMaxBlocks && s.threads == 256);
      if (rows == 0 || width == 0) { CHECK(s.blocks == 0); continue; }
      CHECK(tiles * 32 * vector >= width && (tiles - 1) * 32 * vector < width);
      int64_t groups = s.blocks / tiles, resident = sms * kStreamBlocksPerSm[per_row];
      CHECK(s.blocks == groups * tiles && groups >= 1);
      int64_t waves = ceil_div(s.blocks, resident);
      CHECK(groups == 1 || waves <= 4);
      CHECK(groups <= ceil_div(rows, kStreamRows));           // no group without rows
      CHECK(groups == ceil_div(rows, kStreamRows) || s.blocks > waves * resident - tiles);  // the last one is full
    }
    for (int rank : ranks) {
      int elements = tile_elements(width, vector, rank > 0);
      CHECK(vector > 1 || elements == 0);
      CHECK(vector == 1 || width > (rank ? 8192 : 16384) || elements > 0);
      Shape s = loop_shape(rows, width, rank, sms);
      CHECK(s.blocks <= rows && (rows == 0 || s.blocks >= 1) && s.shared_bytes <= 48 * 1024);
      if (int blocks = cluster_size(width); blocks && !elements && vector > 1) {
        s = tile_shape(rows, width / blocks, rank, kClusterElements, 2, sms);
        CHECK(s.threads <= 512 && int64_t{s.threads} * kClusterElements * blocks == width);  // none without its own
        CHECK(s.shared_bytes + 4 * exchange_floats(exchanged(rank, 2), blocks) <= 48 * 1024);
      }
      if (!elements) continue;
      int per_block = (rank ? 32 : 16) / elements;
      s = tile_shape(rows, width, rank, elements, per_block, sms);
      int bound = rank || elements == 8 ? 512 : 1024;  // the kernels' launch bounds
      CHECK(s.threads % 32 == 0 && s.threads <= bound);
      CHECK(int64_t{s.threads} * elements >= width);
      CHECK(s.threads == 32 || int64_t{s.threads - 32} * elements < width);
      CHECK(s.shared_bytes <= 48 * 1024);
      CHECK(s.blocks <= ceil_div(rows, per_block) && (rows == 0 || s.blocks >= 1));
      Shape other = tile_shape(rows + 1000, width, rank, elements, per_block, sms + 3);
      // Sums follow the width alone.
      CHECK(other.threads == s.threads && other.shared_bytes == s.shared_bytes);
    }
    for (int rank : ranks) for (int sums : {0, 1, 4, 10, 130}) for (int kib : {48, 99, 163, 227}) {
      if (vector == 1) continue;
      int tile = vector / 4, limit = kib * 1024;
      UnitShape s = unit_shape(width, vector, rank, tile, 3, 2, sums, limit);
      CHECK(s.threads % 32 == 0 && s.threads >= 32 && s.threads <= kUnitThreads);
      int64_t columns = int64_t{s.threads} * s.chunks * vector;
      CHECK(columns >= width && columns - width < s.threads * vector);
      CHECK(s.shared_bytes <= limit && s.sums_at % 16 == 0);
      if (!s.shared_bytes) { CHECK(s.sums_at + columns * sums * 4 > limit); continue; }
      int streams = 3 * s.total_staged + 2 * s.h_staged;
      CHECK(s.sums_at + columns * sums * 4 + columns / vector * 16 * tile * streams == s.shared_bytes);
      UnitShape other = unit_shape(width, vector, 0, tile, 1, 0, 0, 227 * 1024);
      CHECK(other.threads == s.threads);  // sums along a row follow the width alone
      int64_t blocks = unit_blocks(s.threads, s.shared_bytes, limit);
      CHECK(blocks >= 1 && blocks * s.threads * kUnitRegisters <= 65536);
      CHECK(blocks == 1 || blocks * (s.shared_bytes + 1024) <= limit + 1024);
      for (int slots : {0, 1, 7, 256}) {
        for (double share : {0.05, 0.75}) {
          Cut cut = unit_cut(rows, slots, tile, {sms, sms + 18}, blocks, share, 256);
          int64_t fewest = slots ? most(tile, least(8, rows / slots)) : 8;
          CHECK(cut.pieces <= cut.tiles && cut.pieces <= ceil_div(rows, fewest) && (rows == 0 || cut.pieces >= 1));
          CHECK(cut.pieces == ceil_div(rows, fewest) || cut.pieces % (sms * blocks) == 0);
          CHECK(cut.larger == 0 || 10 * cut.larger < rows * share);
          int64_t numbers = partials_of(cut, rows, slots, 256);
          CHECK(numbers == (rows ? leaves(cut) + (slots ? rows / 256 + least(slots, rows) : 0) : 0));
        }
        for (int64_t items : {1, 64, 4000}) {
          Cut cut = column_cut(rows, items, 256, fewest_rows(rows, slots, 64, 8));
          CHECK(cut.pieces == cut.tiles && (rows == 0 || cut.pieces == ceil_div(rows, cut.tile)));
          CHECK(rows == 0 || (cut.tile >= (slots ? 8 : 64) && cut.tile <= 256));
          CHECK(rows < 64 * 2048 || cut.pieces * items >= 2048);
        }
      }
    }
    for (int kib : {99, 163, 227}) {
      UnitShape s = tensor_shape(width, 9, 10, kib * 1024);
      CHECK(width != 4096 || kib < 227 || s.shared_bytes > 0);
      if (!s.shared_bytes) continue;
      CHECK(s.threads % 32 == 0 && s.threads <= 256 && int64_t{s.threads} * s.chunks * 2 == width);
      CHECK(s.sums_at % 16 == 0 && s.sums_at + width * 56 == s.shared_bytes && s.shared_bytes <= kib * 1024);
    }
    CHECK(column_shape(5, 3, vector).shared_bytes <= 48 * 1024 && column_shape(5, 3, vector).blocks == 15);
  }
  return 0;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_launch_shapes(tmp_path):
    source, program = tmp_path / "launch.cpp", tmp_path / "launch"
    source.write_text(LAUNCH)
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", f"-I{KERNELS}", str(source), "-o", str(program)],
        check=True,
    )
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
