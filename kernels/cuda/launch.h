// Launch shapes: pure functions of sizes, dtypes, vector width and the chip (multiprocessors, architecture, shared memory), so
// that they can be tested where there is no GPU. What a thread block sums along a row, and in which order, depends on the
// width alone: rows and multiprocessors only decide which block takes a row. Down the columns it depends on the
// leaves, too (below).
#pragma once
#include <cstdint>
#include <initializer_list>

#ifdef __CUDACC__
#define FASTEDIT_BOTH __host__ __device__
#else
#define FASTEDIT_BOTH
#endif

namespace fastedit::cuda {

struct Shape {
  int64_t blocks;
  int threads;
  int shared_bytes;
};

constexpr int kLaneColumns = 32;  // vectors side by side in a block of the stream and column kernels
constexpr int kLines = 8;         // warps there, each on a row of its own
constexpr int kStreamRows = 32;   // kLines × 4 rows in flight
// Blocks of the stream kernel that share a multiprocessor, without and with slots or coefficients: 85 and 128
// registers a thread. Two streams are 96 and 64 KB in flight, where bandwidth × latency asks for about 30.
constexpr int kStreamBlocksPerSm[] = {3, 2};
constexpr int kLoopThreads = 512;
constexpr int64_t kMaxBlocks = 2147483647;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Elements of one 128-bit access of the widest stream; 1 is the scalar path.
constexpr int vector_width(int widest_bytes) { return 16 / widest_bytes; }

constexpr int64_t column_tiles(int64_t width, int vector) { return ceil_div(width, kLaneColumns * vector); }

// Rank 0: column tiles × row groups; a block walks its rows with the parameters of its columns in registers. In one to
// four whole waves, whichever shares out the rows most evenly.
inline Shape stream_shape(int64_t rows, int64_t width, int vector, bool per_row, int multiprocessors) {
  int64_t tiles = column_tiles(width, vector);
  if (rows == 0 || tiles == 0) return {0, kLaneColumns * kLines, 0};
  int64_t resident = int64_t{multiprocessors} * kStreamBlocksPerSm[per_row], parts = ceil_div(rows, kStreamRows);
  int64_t groups = least(parts, most(1, resident / tiles)), turns = ceil_div(parts, groups);
  for (int64_t waves = 2, more; waves <= 4 && turns > 1; ++waves) {
    more = least(parts, waves * resident / tiles);
    if (more && waves * ceil_div(parts, more) < turns) groups = more, turns = waves * ceil_div(parts, more);
  }
  return {tiles * groups, kLaneColumns * kLines, 0};
}

// A tile is a few rows of a block, E elements of each in every thread; 0 elements where the row is too wide
// for registers or the path is scalar. Without low-rank parts 16 elements a thread in all: 64 registers
// hold the tile, blocks share a multiprocessor and one block's loads cover another's barrier. With them 32,
// since each read and write vector that comes from L2 serves all rows of the tile.
constexpr int64_t kTileWidth = 16384, kLowRankTileWidth = 8192;
constexpr int tile_elements(int64_t width, int vector, bool low_rank) {
  if (vector == 1 || width > (low_rank ? kLowRankTileWidth : kTileWidth)) return 0;
  return width <= 4096 && !low_rank ? 8 : 16;
}
template <int E, bool kLowRank>
constexpr int kTileRows = (kLowRank ? 32 : 16) / E;
constexpr int tile_threads(int64_t width, int elements) {
  return static_cast<int>(most(1, ceil_div(width, int64_t{elements} * 32)) * 32);
}

// Wider rows, where a cluster shares them (cluster.h): of how many blocks, each with 16 elements in every thread and none
// without its own; 0: they cannot share it evenly. 256 threads let two blocks share a multiprocessor.
constexpr int kClusterElements = 16;
constexpr int cluster_size(int64_t width) {
  for (int threads : {256, 512})
    for (int blocks : {2, 4, 8})
      if (width % (blocks * 32 * kClusterElements) == 0 && width <= int64_t{blocks} * threads * kClusterElements) return blocks;
  return 0;
}
// A tile's sums that its blocks exchange: of each row the dot products' or the norm's one; and the shared memory for it: two
// counts of arrivals, and two buffers of every block's sums.
FASTEDIT_BOTH constexpr int exchanged(int64_t dots, int rows) { return static_cast<int>(dots > 1 ? dots : 1) * rows; }
FASTEDIT_BOTH constexpr int exchange_floats(int sums, int blocks) { return 4 + 2 * sums * blocks; }

// Row kernels: floats of shared memory for block sums, the warps' shares of each dot product, the results.
constexpr int row_shared_bytes(int rank, int rows, int threads) {
  return (2 * 4 * 32 + rank * rows * (threads / 32 + 3) + rank) * 4;
}
inline Shape tile_shape(int64_t rows, int64_t width, int64_t rank, int elements, int per_block,
                        int multiprocessors) {
  int threads = tile_threads(width, elements);
  int64_t registers = elements * per_block == 32 ? 128 : 64;  // by the kernels' launch bounds
  int64_t resident = multiprocessors * least(32, 65536 / (registers * threads));
  return {least(ceil_div(rows, per_block), resident), threads,
          row_shared_bytes(static_cast<int>(rank), per_block, threads)};
}
// A row at a time. Wide rows are few at once, 132 × 2 of 64 KB, so that one is still in L2 when it is read
// again.
inline Shape loop_shape(int64_t rows, int64_t width, int64_t rank, int multiprocessors) {
  bool wide = width > kLowRankTileWidth;
  int threads = wide ? kLoopThreads : kLoopThreads / 2;
  int64_t resident = int64_t{multiprocessors} * (wide ? 2 : 8);
  return {least(rows, resident), threads, row_shared_bytes(static_cast<int>(rank), 1, threads)};
}

// The unit kernel of a backward (backward_unit.h): a block owns a unit's rows and takes `tile` of them at a time.
// Threads follow the width alone, and with them the order of every sum along a row. 128 registers a thread
// bound it: two blocks of 256 share a multiprocessor, a row of more than 512 vectors takes one of 512.
constexpr int kUnitThreads = 512, kUnitRegisters = 128;
constexpr int kCellBytes = 16;  // of the stage: one vector of one stream
template <int V>
constexpr int kUnitTile = V / 4;  // rows at a time
constexpr int unit_threads(int64_t width, int vector) {
  int64_t vectors = most(1, ceil_div(width, vector)), most_threads = vectors > kUnitThreads ? 512 : 256;
  return static_cast<int>(ceil_div(ceil_div(vectors, ceil_div(vectors, most_threads)), 32) * 32);
}
// Shared memory: block sums, each row's dot products, a column's sums, and as they come in the tile's streams
// that total is made of (`total_staged`) and h's (`h_staged`). Without room for h's it comes from memory when it is
// needed, without room for total's these come from L2 again; 0 bytes: not even the sums fit.
struct UnitShape {
  int threads, chunks, shared_bytes;
  int sums_at;  // bytes of shared memory before the first sum
  bool total_staged, h_staged;
};
inline UnitShape unit_shape(int64_t width, int vector, int rank, int tile, int total_streams, int h_streams,
                            int64_t sums, int shared_limit) {
  int threads = unit_threads(width, vector);
  int64_t chunks = ceil_div(width, int64_t{threads} * vector), stream = threads * chunks * kCellBytes * tile;
  int sums_at = static_cast<int>(ceil_div(row_shared_bytes(rank, tile, threads), 16) * 16);
  int64_t bytes = sums_at + threads * chunks * vector * sums * 4;
  UnitShape shape{threads, static_cast<int>(chunks), 0, sums_at, false, false};
  if (bytes > shared_limit) return shape;
  shape.total_staged = bytes + stream * total_streams <= shared_limit;
  if (shape.total_staged) bytes += stream * total_streams;
  shape.h_staged = shape.total_staged && bytes + stream * h_streams <= shared_limit;
  if (shape.h_staged) bytes += stream * h_streams;
  shape.shared_bytes = static_cast<int>(bytes);
  return shape;
}

// The unit kernel on tensor cores (backward_tensor.cu): eight rows at a time, of which a warp takes 64 columns, every warp as
// often. In shared memory lie `shares` sums of each row from every warp, the columns' sums, and one of the tile's streams;
// 0 bytes: they do not fit, or the width has no such
// share for at least half of the warps.
constexpr int kTensorRows = 8, kTensorColumns = 64, kTensorWarps = 8, kTensorFloats = (3 * 4 + 2) * kTensorRows;
inline UnitShape tensor_shape(int64_t width, int shares, int64_t sums, int shared_limit) {
  int chunks = static_cast<int>(width / kTensorColumns), warps = kTensorWarps;
  if (chunks == 0 || width % kTensorColumns) return {};
  while (chunks % warps) --warps;
  if (chunks > kTensorWarps && warps < kTensorWarps / 2) return {};
  int sums_at = (kTensorFloats + shares * kTensorRows * warps) * 4;
  int64_t bytes = sums_at + width * (sums * 4 + kTensorRows * 2);
  return {32 * warps, chunks / warps, bytes <= shared_limit ? static_cast<int>(bytes) : 0, sums_at, true, true};
}

// The chips that an architecture is sold with, as numbers of multiprocessors: the fewest and the most of those that
// the cut below is made for. Others of it run, too, with a less even share of the rows.
struct Chips {
  int fewest, most;
};
constexpr Chips chips_of(int capability) {
  return capability == 80                        ? Chips{108, 108}  // A100
         : capability == 86                      ? Chips{84, 84}    // A40
         : capability == 89                      ? Chips{128, 142}  // RTX 4090, L40
         : capability == 90                      ? Chips{114, 132}  // H100 PCIe, H100 and H200
         : capability == 100 || capability == 103 ? Chips{148, 148}  // B200
         : capability == 120                     ? Chips{170, 188}  // RTX 5090, RTX PRO 6000
                                                 : Chips{128, 128};
}
// Blocks of the unit kernel that share a multiprocessor, of whose memory the system takes a KB for each, and one more
// than a block may ask for.
inline int64_t unit_blocks(int threads, int shared_bytes, int shared_limit) {
  int64_t by_shared = (shared_limit + 1024) / (shared_bytes + 1024), by_registers = 65536 / (kUnitRegisters * threads);
  return most(1, least(8, least(by_shared, by_registers)));
}

// Rows, over slots in the order of their slots, are cut into leaves: what one fp32 running sum of each column adds up, and
// then a partial of it. Tiles of a few rows are cut evenly into as many pieces as the architecture's smaller chip holds
// blocks, in whole waves, and once more for its larger chip; leaves lie between two neighbours of all these cuts. A block
// takes a run of leaves, by the real count of multiprocessors, and both chips' runs are even. The leaves, and with them the
// order of additions, follow from the shape, the dtypes, which sums are wanted and the architecture alone: they are the same
// on every machine of it, run after run. Leaf numbers count both kinds of cuts; where two fall together a number is
// left out, and its partial is 0. A slot's sums have a partial for each leaf that the slot has rows in (backward.h).
struct Cut {
  int64_t tiles, pieces, larger;  // pieces for the larger chip; 0: one kind of cuts
  int tile, blocks;               // rows; blocks of a multiprocessor
};
FASTEDIT_BOTH inline int64_t cut_start(int64_t tiles, int64_t pieces, int64_t i) {
  return tiles == pieces ? i : i * tiles / pieces;
}
FASTEDIT_BOTH inline int64_t cut_at(int64_t tiles, int64_t pieces, int64_t tile) {
  return tiles == pieces ? tile : ((tile + 1) * pieces - 1) / tiles;  // the last piece that starts there or before
}
FASTEDIT_BOTH inline int64_t leaf_at(const Cut& cut, int64_t tile) {
  return cut_at(cut.tiles, cut.pieces, tile) + (cut.larger ? cut_at(cut.tiles, cut.larger, tile) : 0);
}
FASTEDIT_BOTH inline int64_t leaves(const Cut& cut) { return cut.pieces + (cut.larger ? cut.larger - 1 : 0); }
// The first tile of the leaf after the one that has this tile.
FASTEDIT_BOTH inline int64_t next_leaf(const Cut& cut, int64_t tile) {
  int64_t next = cut_start(cut.tiles, cut.pieces, cut_at(cut.tiles, cut.pieces, tile) + 1);
  if (!cut.larger) return next;
  int64_t other = cut_start(cut.tiles, cut.larger, cut_at(cut.tiles, cut.larger, tile) + 1);
  return other < next ? other : next;
}
// Where run i of `runs` starts: at a leaf.
FASTEDIT_BOTH inline int64_t run_start(const Cut& cut, int64_t runs, int64_t i) {
  int64_t even = cut_start(cut.tiles, runs, i);
  return even == 0 ? 0 : next_leaf(cut, even - 1);
}
inline int64_t runs(const Cut& cut, int multiprocessors) {
  return least(leaves(cut), int64_t{multiprocessors} * cut.blocks);
}
// The fewest rows that a piece is made of: `usual`, or where slots have fewer on average as many, since their partials are
// there in any case.
inline int64_t fewest_rows(int64_t rows, int64_t slots, int64_t usual, int64_t at_least) {
  return slots ? most(at_least, least(usual, rows / slots)) : usual;
}
// Pieces of at most `most_rows` rows and, where there are enough, at least `fewest`, for `wave` blocks at a time.
inline int64_t cut_pieces(int64_t rows, int64_t wave, int64_t most_rows, int64_t fewest) {
  int64_t waves = most(1, ceil_div(rows, wave * (most_rows - 8)));  // pieces differ by a tile
  return least(wave * waves, ceil_div(rows, fewest));
}
// `share`: the bytes of a row's streams over those of one partial. The larger chip gets cuts of its own where their
// partials take less than a tenth of the streams, which is less than the unevenness that they end.
inline Cut unit_cut(int64_t rows, int64_t slots, int tile, Chips chips, int64_t blocks, double share, int64_t most_rows) {
  if (rows == 0) return {};
  int64_t fewest = fewest_rows(rows, slots, 8, tile), pieces = cut_pieces(rows, chips.fewest * blocks, most_rows, fewest);
  Cut cut{ceil_div(rows, tile), pieces, 0, tile, static_cast<int>(blocks)};
  int64_t larger = cut_pieces(rows, chips.most * blocks, most_rows, fewest);
  if (larger != cut.pieces && 10 * larger < rows * share) cut.larger = larger;
  return cut;
}
// Partials of each sum: one a leaf; over slots numbers for their borders, too (backward.h), which are the slots' blocks of
// `most_rows` rows.
inline int64_t partials_of(const Cut& cut, int64_t rows, int64_t slots, int64_t most_rows) {
  return rows == 0 ? 0 : leaves(cut) + (slots ? rows / most_rows + least(slots, rows) : 0);
}

// Sums of a column tile or a group of ranks ("items"): one block for each of each piece. Pieces of fewer rows where there are
// few blocks: of 2048 the last wave leaves less than 15 % of 170 multiprocessors' time unused, and a partial of 64 rows is
// 4 % of them.
constexpr int64_t kColumnBlocks = 2048;
inline Cut column_cut(int64_t rows, int64_t items, int64_t most_rows, int64_t fewest) {
  if (rows == 0) return {};
  int64_t piece = most_rows;
  while (piece >= 2 * fewest && items * ceil_div(rows, piece) < kColumnBlocks) piece /= 2;
  return {ceil_div(rows, piece), ceil_div(rows, piece), 0, static_cast<int>(piece), 0};
}
inline Shape column_shape(int64_t pieces, int64_t items, int vector) {
  return {pieces * items, kLaneColumns * kLines, kLines * kLaneColumns * vector * 4};
}

}  // namespace fastedit::cuda
