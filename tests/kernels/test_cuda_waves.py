"""How evenly the rows of a large tensor are shared out among a chip's multiprocessors: pure functions of kernels/cuda/launch.h.

The share of the time that multiprocessors work is rows over (rows of the longest block × blocks that run at once × waves).
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
struct Work { double tiles, partials; };
Work work_of(const Cut& cut, const std::vector<int64_t>& first, int64_t begin, int64_t end, int tile, double partial) {
  Work work{};
  for (size_t s = 0; begin < end; ++work.partials) {
    while (first[s + 1] <= begin) ++s;
    int64_t next = least(least(end, first[s + 1]), next_leaf(cut, begin / cut.tile) * cut.tile);
    work.tiles += static_cast<double>(ceil_div(next - begin, tile) * tile), begin = next;
  }
  work.partials *= partial;
  return work;
}
// The unit kernel: a run a block, in one wave. Once without what partials take, as for rows without slots, once with it.
void runs_over_slots(const char* name, const Chip& chip, int64_t rows, int64_t width, const Cut& cut, int64_t wave, double partial) {
  const int64_t grid = runs(cut, chip.multiprocessors);
  for (int64_t slots : {1, 10, 64, 256}) for (bool even : {true, false}) {
    const std::vector<int64_t> first = borders(rows, slots, even);
    double longest = 0, longest_work = 0, work = 0;
    for (int64_t i = 0; i < grid; ++i) {
      const int64_t begin = run_start(cut, grid, i) * cut.tile, end = least(rows, run_start(cut, grid, i + 1) * cut.tile);
      const Work found = work_of(cut, first, begin, end, cut.tile, partial);
      if (found.tiles > longest) longest = found.tiles;
      if (found.tiles + found.partials > longest_work) longest_work = found.tiles + found.partials;
      work += found.tiles + found.partials;
    }
    std::printf("%ld slots of %s sizes, %s/%d %ld %ld 8 %.4f\n", slots, even ? "even" : "uneven", name, chip.multiprocessors, rows, width, rows / (longest * wave));
    std::printf("%ld slots of %s sizes with partials, %s/%d %ld %ld 8 %.4f\n", slots, even ? "even" : "uneven", name, chip.multiprocessors, rows, width, work / (longest_work * wave));
  }
}
// Blocks that take a piece's slots one after another, in the order of the grid as places become free.
void blocks_over_slots(const char* name, const Chip& chip, int64_t rows, int64_t width, const Cut& cut, int64_t items, double partial) {
  for (int64_t slots : {1, 10, 64, 256}) for (bool even : {true, false}) {
    const std::vector<int64_t> first = borders(rows, slots, even);
    std::priority_queue<double, std::vector<double>, std::greater<double>> ends;
    for (int64_t i = 0; i < 2 * chip.multiprocessors; ++i) ends.push(0);
    double longest = 0, work = 0;
    for (int64_t i = 0; i < cut.pieces; ++i) {
      const Work found = work_of(cut, first, i * cut.tile, least(rows, (i + 1) * cut.tile), kLines, partial);
      for (int64_t item = 0; item < items; ++item) {
        const double end = ends.top() + found.tiles + found.partials;
        ends.pop(), ends.push(end), longest = end > longest ? end : longest, work += found.tiles + found.partials;
      }
    }
    std::printf("%ld slots of %s sizes with partials, %s/%d %ld %ld 8 %.4f\n", slots, even ? "even" : "uneven", name, chip.multiprocessors, rows, width, work / (longest * 2 * chip.multiprocessors));
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
      if (vector == 8) runs_over_slots(s.name, chip, rows, width, cut, wave, 4. * s.sums / s.bytes);
    }
    if (mb < 64) continue;
    int64_t tiles = column_tiles(width, vector);
    for (int64_t items : {tiles, 4 * tiles}) {  // the latter: d_read and d_write of 16 ranks
      Cut cut = column_cut(rows, items, 256, items == tiles ? 64 : 32);
      int64_t blocks = items * cut.pieces, at_once = 2 * chip.multiprocessors;
      const char* name = items == tiles ? "columns" : "outer";
      worst(name, chip, rows, width, vector, double(blocks) / (ceil_div(blocks, at_once) * at_once));
      if (vector == 8) blocks_over_slots(name, chip, rows, width, cut, items, items == tiles ? 8. / 6 : 32. / 2);
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


@pytest.mark.parametrize("multiprocessors", [108, 114, 132, 142, 148, 170])
def test_waves_are_full(shares, multiprocessors):
    found = [s for s in shares if s[1] == multiprocessors and not s[0].startswith("slots")]
    assert len({what for what, *_ in found}) == 10 and len(found) > 300
    # Sums of a large rank have the smaller chip's cuts alone, since of their partials each costs most: 18 or 19 rows each.
    for large in (False, True):
        least = min((s for s in found if (s[0] == "rank 16") == large), key=lambda s: s[-1])
        assert least[-1] >= (0.82 if large else 0.85), least


def test_the_chips_that_most_run_on_lose_no_more_than_their_partials_cost(shares):
    """Behind a norm the larger chip of an architecture has cuts of its own."""
    assert min(s[-1] for s in shares if s[1] == 132 and s[0] in ("scale, bias", "weight, too")) >= 0.95
    assert min(s[-1] for s in shares if s[1] == 114 and s[0] == "rank 4") >= 0.95


def test_over_slots_waves_are_mostly_full(shares):
    """A slot's rows are units of their own, and a unit of few rows costs a partial: from 1000 MB on no call is below 85 %."""
    for kind in ("slots, even", "slots, uneven"):
        by_size = {}
        for what, _chip, rows, width, _vector, share in shares:
            if what == kind:
                by_size.setdefault(rows * width * 2 >> 20, []).append(share)
        assert len(by_size) == 7 and all(statistics.mean(found) >= 0.84 for found in by_size.values())
        assert min(by_size[1000]) >= 0.85 and min(by_size[256]) >= 0.7 and min(min(found) for found in by_size.values()) >= 0.45
