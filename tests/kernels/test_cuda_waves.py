"""How evenly the rows of a large tensor are shared out among a chip's multiprocessors: pure functions of kernels/cuda/launch.h.

The share of the time that multiprocessors work is rows over (rows of the longest block × blocks that run at once × waves). Over
slots it is counted once more with what a slot's border costs a block.
"""

import shutil
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PROGRAM = r"""
#include <cstdio>
#include <initializer_list>
#include <queue>
#include <vector>
#include "cuda/launch.h"
using namespace fastedit::cuda;
struct Chip { int capability, multiprocessors, kib; };
struct Sums { const char* name; int total_streams, h_streams, sums, bytes; };  // bytes: 16-bit streams

int worst(const char* what, const Chip& chip, int64_t rows, int64_t width, int vector, double share) {
  std::printf("%s %d %ld %ld %d %.4f\n", what, chip.multiprocessors, rows, width, vector, share);
  return 0;
}

// Leaves in order, each with rows but the numbers left out; runs that start at leaves and share out all rows.
int check(const Cut& cut, int64_t rows, int64_t runs, int64_t* longest) {
  int64_t tile = 0, leaf = -1, found = 0;
  for (; tile < cut.tiles; ++found) {
    int64_t next = next_leaf(cut, tile);
    if (next <= tile || next > cut.tiles || (next - tile) * cut.tile > 256) return 1;
    if (leaf_at(cut, tile) <= leaf || leaf_at(cut, next - 1) != leaf_at(cut, tile)) return 2;
    leaf = leaf_at(cut, tile), tile = next;
  }
  if (leaf != leaves(cut) - 1 || found > leaves(cut) || cut.tiles * cut.tile < rows) return 3;
  *longest = 0;
  for (int64_t i = 0; i < runs; ++i) {
    int64_t begin = run_start(cut, runs, i), end = run_start(cut, runs, i + 1);
    if (begin > end || (i == 0 && begin) || (i == runs - 1 && end != cut.tiles)) return 4;
    if (begin && begin < cut.tiles && leaf_at(cut, begin) == leaf_at(cut, begin - 1)) return 5;
    *longest = most(*longest, (end - begin) * cut.tile);
  }
  return 0;
}

// Where slots begin among the rows: of one size, or the last one with three times the first one's rows.
std::vector<int64_t> borders(int64_t rows, int64_t slots, bool even) {
  std::vector<int64_t> first;
  for (double i = 0; i <= slots; ++i) first.push_back(static_cast<int64_t>(rows * (even ? i : (i + i * i / slots) / 2) / slots));
  return first;
}
// Rows begin … end in tiles that begin anew with each slot and each leaf, and a partial for each of these, which takes as long
// as `partial` rows.
double work_of(const Cut& cut, const std::vector<int64_t>& first, int64_t begin, int64_t end, int tile, double partial) {
  double work = 0;
  for (size_t s = 0; begin < end;) {
    while (first[s + 1] <= begin) ++s;
    int64_t next = least(least(end, first[s + 1]), next_leaf(cut, begin / cut.tile) * cut.tile);
    work += static_cast<double>(ceil_div(next - begin, tile) * tile) + partial, begin = next;
  }
  return work;
}
void over_slots(const char* name, const Chip& chip, int64_t slots, bool even, bool partials, int64_t rows, int64_t width,
                double share) {
  const char* counted = partials ? " with partials" : "";
  std::printf("%ld slots%s%s, %s ", long(slots), even ? "" : " of uneven sizes", counted, name);
  worst("of", chip, rows, width, 8, share);
}
// The unit kernel: a run a block, in one wave. Once by rows alone, as without slots, once by tiles and partials.
void runs_over_slots(const char* name, const Chip& chip, int64_t rows, int64_t width, int64_t blocks, double share,
                     double partial) {
  const int64_t wave = chip.multiprocessors * blocks;
  for (int64_t slots : {1, 10, 64, 256}) for (bool even : {true, false}) {
    const Cut cut = unit_cut(rows, slots, 2, chips_of(chip.capability), blocks, share, 256);
    const std::vector<int64_t> first = borders(rows, slots, even);
    const int64_t grid = runs(cut, chip.multiprocessors);
    double longest = 0, longest_rows = 0, all = 0;
    for (int64_t i = 0; i < grid; ++i) {
      const int64_t begin = run_start(cut, grid, i) * cut.tile, end = least(rows, run_start(cut, grid, i + 1) * cut.tile);
      const double work = work_of(cut, first, begin, end, cut.tile, partial);
      longest = work > longest ? work : longest, all += work;
      longest_rows = end - begin > longest_rows ? end - begin : longest_rows;
    }
    over_slots(name, chip, slots, even, false, rows, width, rows / (longest_rows * wave));
    over_slots(name, chip, slots, even, true, rows, width, all / (longest * wave));
  }
}
// Blocks that take a piece's slots one after another, in the order of the grid as places become free.
void blocks_over_slots(const char* name, const Chip& chip, int64_t rows, int64_t width, int64_t items, int64_t usual,
                       double partial) {
  for (int64_t slots : {1, 10, 64, 256}) for (bool even : {true, false}) {
    const Cut cut = column_cut(rows, items, 256, fewest_rows(rows, slots, usual, 8));
    const std::vector<int64_t> first = borders(rows, slots, even);
    std::priority_queue<double, std::vector<double>, std::greater<double>> ends;
    for (int64_t i = 0; i < 2 * chip.multiprocessors; ++i) ends.push(0);
    double longest = 0, all = 0;
    for (int64_t i = 0; i < cut.pieces; ++i) {
      const double work = work_of(cut, first, i * cut.tile, least(rows, (i + 1) * cut.tile), kLines, partial);
      for (int64_t item = 0; item < items; ++item) {
        const double end = ends.top() + work;
        ends.pop(), ends.push(end), longest = end > longest ? end : longest, all += work;
      }
    }
    over_slots(name, chip, slots, even, true, rows, width, all / (longest * 2 * chip.multiprocessors));
  }
}

int main() {
  const Chip chips[] = {{80, 108, 163}, {90, 114, 227}, {90, 132, 227}, {89, 142, 99}, {100, 148, 227}, {120, 170, 99},
                        {89, 128, 99},  {120, 188, 99}, {90, 78, 227},  {86, 72, 99},  {75, 40, 48}};
  const Sums all[] = {{"scale, bias", 3, 1, 2, 12},    {"weight, too", 3, 1, 3, 12},
                      {"rank 4", 1, 1, 10, 6},         {"LoReFT", 1, 1, 8, 6},
                      {"rank 4, norm", 3, 1, 11, 12},  {"rank 16", 1, 1, 2, 6}};  // which leaves d_read and d_write
  for (const Chip& chip : chips) for (int64_t width : {1024, 2048, 4096, 8192}) for (int vector : {4, 8})
  for (int64_t mb : {0, 1, 64, 65, 96, 128, 200, 256, 1000}) {
    int64_t rows = (mb << 20) / (width * 16 / vector) + (mb ? 0 : 9);
    for (const Sums& s : all) {
      UnitShape shape = unit_shape(width, vector, 4, vector / 4, s.total_streams, s.h_streams, s.sums, chip.kib * 1024);
      if (!shape.shared_bytes) continue;
      int64_t blocks = unit_blocks(shape.threads, shape.shared_bytes, chip.kib * 1024);
      double share = double(s.bytes) * 8 / vector / (8 * s.sums);
      Cut cut = unit_cut(rows, 0, vector / 4, chips_of(chip.capability), blocks, share, 256);
      int64_t wave = chip.multiprocessors * blocks, grid = runs(cut, chip.multiprocessors), longest = 0;
      if (int error = check(cut, rows, grid, &longest))
        return std::printf("%s: rule %d, %ld rows, %ld runs\n", s.name, error, long(rows), long(grid)), 1;
      if (mb < 64) continue;
      worst(s.name, chip, rows, width, vector, double(rows) / (longest * wave));
      if (vector == 8) runs_over_slots(s.name, chip, rows, width, blocks, share, 4. * s.sums / s.bytes);
    }
    if (mb < 64) continue;
    int64_t tiles = column_tiles(width, vector);
    for (int64_t items : {tiles, 4 * tiles}) {  // the latter: d_read and d_write of 16 ranks
      const char* name = items == tiles ? "columns" : "outer";
      int64_t usual = items == tiles ? 64 : 32, at_once = 2 * chip.multiprocessors;
      int64_t blocks = items * column_cut(rows, items, 256, usual).pieces;
      worst(name, chip, rows, width, vector, double(blocks) / (ceil_div(blocks, at_once) * at_once));
      if (vector == 8) blocks_over_slots(name, chip, rows, width, items, usual, items == tiles ? 8. / 6 : 32. / 2);
    }
    Shape stream = stream_shape(rows, width, vector, false, chip.multiprocessors);
    int64_t group = ceil_div(ceil_div(rows, kStreamRows), stream.blocks / tiles) * kStreamRows;
    int64_t waves = ceil_div(stream.blocks, 3 * chip.multiprocessors);
    worst("stream", chip, rows, width, vector, double(rows) * tiles / (waves * 3 * chip.multiprocessors * group));
    for (int low_rank : {0, 1}) {
      int elements = tile_elements(width, vector, low_rank), per_block = (low_rank ? 32 : 16) / elements;
      Shape tile = tile_shape(rows, width, low_rank, elements, per_block, chip.multiprocessors);
      int64_t turns = ceil_div(ceil_div(rows, per_block), tile.blocks) * per_block;
      worst(low_rank ? "rank's tiles" : "tiles", chip, rows, width, vector, double(rows) / (turns * tile.blocks));
    }
  }
}
"""


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """[(what, multiprocessors, rows, width, vector, share)] of tensors of 64 MB and more."""
    folder = tmp_path_factory.mktemp("waves")
    source, program = folder / "waves.cpp", folder / "waves"
    source.write_text(PROGRAM)
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", f"-I{ROOT / 'kernels'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:]
    lines = [line.rsplit(" ", 5) for line in done.stdout.splitlines()]
    return [(what, *map(int, numbers[:4]), float(numbers[4])) for what, *numbers in lines]


CHIPS = [108, 114, 132, 142, 148, 170]


@pytest.mark.parametrize("multiprocessors", [*CHIPS, 188])
def test_waves_are_full(shares, multiprocessors):
    """Of the largest chip two shapes have cuts for the second largest alone, since others would cost more than they even out."""
    found = [s for s in shares if s[1] == multiprocessors and "slots" not in s[0]]
    assert len({what for what, *_ in found}) == 11 and len(found) > 300
    least = min(found, key=lambda s: s[-1])
    assert least[-1] >= (0.83 if multiprocessors == 188 else 0.85), least


def test_the_chips_that_most_run_on_lose_no_more_than_their_partials_cost(shares):
    """Behind a norm the larger chip of an architecture has cuts of its own."""
    assert min(s[-1] for s in shares if s[1] == 132 and s[0] in ("scale, bias", "weight, too")) >= 0.95
    assert min(s[-1] for s in shares if s[1] == 114 and s[0] == "rank 4") >= 0.95


@pytest.mark.parametrize("slots", [1, 10, 64, 256])
def test_waves_over_slots_are_full(shares, slots):
    """A block has as many rows as without slots, whatever the slots' sizes."""
    for uneven in ("", " of uneven sizes"):
        found = [s for s in shares if s[0].startswith(f"{slots} slots{uneven}, ") and s[1] in CHIPS]
        assert len({what for what, *_ in found}) == 6 and len(found) > 800
        least = min(found, key=lambda s: s[-1])
        assert least[-1] >= 0.85, least


@pytest.mark.parametrize("slots", [1, 10, 64, 256])
def test_what_partials_over_slots_add_to_waves(shares, slots):
    """Where a block has a slot's border, it has a partial more and a tile that may lack a row."""
    found = [s for s in shares if s[0].startswith(f"{slots} slots") and "with partials" in s[0] and s[1] in CHIPS]
    later = [s[-1] for s in found if s[0].endswith(("columns of", "outer of"))]
    units = {}
    for what, _chip, rows, width, _vector, share in found:
        if not what.endswith(("columns of", "outer of")):
            units.setdefault(rows * width * 2 >> 20, []).append(share)
    assert min(later) >= 0.86 and statistics.mean(later) >= 0.95
    assert len(units) == 7 and all(statistics.mean(each) >= 0.92 for each in units.values())
    assert min(min(each) for each in units.values()) >= 0.74 and min(units[200]) >= 0.91 and min(units[1000]) >= 0.98
