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
struct Sums { const char* name; int total_streams, h_streams, sums, bytes; bool outer; };  // bytes: 16-bit streams

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

// Of slots with so many rows each: a block a unit, the next one where the first ends.
double over_slots(const std::vector<int64_t>& sizes, int64_t unit, int64_t wave) {
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<int64_t>> ends;
  for (int64_t i = 0; i < wave; ++i) ends.push(0);
  int64_t all = 0, longest = 0;
  for (int64_t size : sizes) {
    all += size;
    for (int64_t first = 0; first < size; first += unit) {
      int64_t end = ends.top() + least(unit, size - first);
      ends.pop(), ends.push(end), longest = most(longest, end);
    }
  }
  return double(all) / (longest * wave);
}
void all_slots(const Chip& chip, int64_t rows, int64_t width, int64_t blocks, double share) {
  for (int64_t slots : {1, 10, 64, 256}) for (int even : {0, 1}) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < slots; ++i) {  // uneven: the last slot has three times the first one's rows
      int64_t begin = rows * i / slots, end = rows * (i + 1) / slots;
      if (!even) begin = (begin + begin * begin / rows) / 2, end = (end + end * end / rows) / 2;
      sizes.push_back(end - begin);
    }
    int64_t unit = 256 / unit_parts(rows, slots, chips_of(chip.capability).most * blocks, share, 256);
    worst(even ? "slots, even" : "slots, uneven", chip, rows, width, 8, over_slots(sizes, unit, chip.multiprocessors * blocks));
  }
}

int main() {
  const Chip chips[] = {{80, 108, 163}, {90, 114, 227}, {90, 132, 227}, {89, 142, 99}, {100, 148, 227}, {120, 170, 99},
                        {89, 128, 99},  {120, 188, 99}, {90, 78, 227},  {86, 72, 99},  {75, 40, 48}};
  const Sums all[] = {{"scale, bias", 3, 1, 2, 12, false}, {"weight, too", 3, 1, 3, 12, false},
                      {"rank 4", 1, 1, 10, 6, false},      {"LoReFT", 1, 1, 8, 6, false},
                      {"rank 4, norm", 3, 1, 11, 12, false}, {"rank 16", 1, 1, 2, 6, true}};
  for (const Chip& chip : chips) for (int64_t width : {1024, 2048, 4096, 8192}) for (int vector : {4, 8})
  for (int64_t mb : {0, 1, 64, 65, 96, 128, 200, 256, 1000}) {
    int64_t rows = (mb << 20) / (width * 16 / vector) + (mb ? 0 : 9);
    for (const Sums& s : all) {
      UnitShape shape = unit_shape(width, vector, 4, vector / 4, s.total_streams, s.h_streams, s.sums, chip.kib * 1024);
      if (!shape.shared_bytes) continue;
      int64_t blocks = s.outer ? 1 : unit_blocks(shape.threads, shape.shared_bytes, chip.kib * 1024);
      double share = s.outer ? 0 : double(s.bytes) * 8 / vector / (8 * s.sums);
      Cut cut = unit_cut(rows, vector / 4, chips_of(chip.capability), blocks, share, 256);
      int64_t wave = chip.multiprocessors * blocks, grid = runs(cut, chip.multiprocessors), longest = 0;
      if (int error = check(cut, rows, grid, &longest))
        return std::printf("%s: rule %d, %ld rows, %ld runs\n", s.name, error, long(rows), long(grid)), 1;
      if (mb < 64) continue;
      worst(s.name, chip, rows, width, vector, double(rows) / (longest * wave));
      if (vector == 8 && !s.outer) all_slots(chip, rows, width, blocks, share);
    }
    if (mb < 64) continue;
    int64_t tiles = column_tiles(width, vector), blocks = tiles * ceil_div(rows, column_unit_rows(rows, tiles, 256));
    int64_t at_once = 2 * chip.multiprocessors;
    worst("columns", chip, rows, width, vector, double(blocks) / (ceil_div(blocks, at_once) * at_once));
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
