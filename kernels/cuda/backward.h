// What the backward kernels share: which sums are wanted, where their partials lie, which rows a block takes.
//
// edit_backward and project_backward fill the same struct as edit_add_norm_backward and leave the norm out.
// Kinds of kernel:
//   units    backward_unit.h     sums along the rows and, as far as they fit on the chip, down the columns
//            backward_tensor.cu  the same of four ranks on tensor cores; off unless compiled with FASTEDIT_TENSOR
//   columns  backward_columns.h  rank 0 without a norm: one pass, column tiles
//   rows     backward_rows.h     sums along the rows, for odd widths, unaligned views and rows of which not one
//                                vector sum fits on the chip; columns takes the rest
//   outer    backward_sums.cu    d_read and d_write where the units leave them over
//   reduce   backward_sums.cu    the sum over the units' partials
#pragma once
#include "form.h"
#include "launch.h"

namespace fastedit::cuda {

// Offsets of each sum in a unit's partials, −1 where it is not meant.
struct Sums {
  int64_t scale = -1, bias = -1, read = -1, write = -1, weight = -1, norm_bias = -1, offset = -1;
  bool vectors() const { return scale >= 0 || bias >= 0 || weight >= 0 || norm_bias >= 0; }
};

struct Backward {
  EditAddNormBackwardArgs a;
  int sum_dtype;  // of a.residual
  int vector;     // elements of one access; 1 is the scalar path
  bool has_grad;  // a gradient comes in through the rows, not through z alone
  bool pulls;     // q has a part grad @ writeᵀ
  bool unit_kernel, rows_kernel;
  bool tensor;         // the unit kernel is backward_tensor.cu's, which takes every sum
  bool columns_d_x;    // the column kernel stores d_x
  const float* q;      // (rows, rank) for d_read and d_offset: the workspace's, or grad_z itself; null: zero
  float* q_out;        // (rows, rank), null where nobody reads it
  float* norm_means;   // (rows, 2): NormRow::dot and sum, null where nobody reads them
  float* total;        // (rows, width) for d_write behind a norm, null where nobody reads it
  float* partials;     // (units, partial_size)
  int64_t partial_size;
  int64_t units;       // with slots an upper bound, since the host does not know the slots' sizes
  int64_t unit_rows;   // of one unit at most, where there is no cut
  int64_t parts;       // units of one of slot_order's blocks
  Cut cut;             // rows without slots under the unit kernel: its leaves are the units; else no pieces
  Sums wanted, taken, left;  // every sum; those of the next launch of the unit kernel; those of later launches
  int unit_sums;       // columns of sums that are taken
  bool reads_h;        // the unit kernel takes h with the row
  UnitShape unit;
  int64_t workspace_bytes;
};

Backward plan_backward(const EditAddNormBackwardArgs& args, int sum_dtype, bool norm, void* workspace);

// Turns a launch of the unit kernel that left vector sums over into the next one; an error where that has no room
// for any of them, since the launch after it would be the same.
int next_launch(Backward& backward);

// Every launch of the unit kernel (edit_add_norm_backward.cu), and that on tensor cores (backward_tensor.cu).
int run_units(const Backward& backward, void* stream);
int run_tensor_units(const Backward& backward, void* stream);

// After the rows: d_read and d_write where they are left, then the pairwise sum of the units' partials into
// d_form, d_weight, d_norm_bias.
int finish_sums(const Backward& backward, void* stream);

// Rows that share a slot; a unit has at most kBlockRows of them. `order` null: rows first … first + count.
struct Unit {
  const int32_t* order;
  int64_t first;
  int count;
  int slot;
  bool inside;  // false for the rows that no slot owns
  __device__ int64_t row(int i) const { return order ? __ldg(order + first + i) : first + i; }
};

__device__ inline int64_t device_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Units of a slot's rows, and of all rows, the untouched ones last.
struct UnitRange {
  int64_t begin, end;
};
__device__ inline UnitRange units_of_slot(const Backward& b, int slot) {
  const SlotOrder& order = b.a.slot_order;
  if (!order.order) return {0, b.units};
  return {__ldg(order.block_first + slot) * b.parts, __ldg(order.block_first + slot + 1) * b.parts};
}
__device__ inline UnitRange all_units(const Backward& b) {
  const SlotOrder& order = b.a.slot_order;
  if (!order.order) return {0, b.units};
  int64_t owned = __ldg(order.block_first + b.a.form.slots), before = __ldg(order.first);
  int64_t after = b.a.rows - __ldg(order.first + b.a.form.slots);
  return {0, (owned + device_ceil_div(before, kBlockRows) + device_ceil_div(after, kBlockRows)) * b.parts};
}

// The part of one of the blocks of kBlockRows that begin … end is cut into.
__device__ inline Unit unit_of(const Backward& b, int64_t begin, int64_t end, int64_t block, int64_t part,
                               int slot, bool inside) {
  int64_t first = begin + block * kBlockRows + part * b.unit_rows;
  return {b.a.slot_order.order, first, static_cast<int>(max(int64_t{0}, min(b.unit_rows, end - first))), slot,
          inside};
}

__device__ inline Unit find_unit(const Backward& b, int64_t unit) {
  const SlotOrder& order = b.a.slot_order;
  if (b.cut.pieces) {  // of one kind
    int64_t first = cut_start(b.cut.tiles, b.cut.pieces, unit) * b.cut.tile;
    int64_t end = min(b.a.rows, cut_start(b.cut.tiles, b.cut.pieces, unit + 1) * b.cut.tile);
    return {nullptr, first, static_cast<int>(end - first), 0, true};
  }
  if (!order.order) return unit_of(b, 0, b.a.rows, 0, unit, 0, true);
  int64_t slots = b.a.form.slots, owned = __ldg(order.block_first + slots);
  int64_t block = unit / b.parts, part = unit % b.parts;
  if (block >= owned) {
    int64_t before = __ldg(order.first), blocks = device_ceil_div(before, kBlockRows);
    block -= owned;
    if (block < blocks) return unit_of(b, 0, before, block, part, 0, false);
    return unit_of(b, __ldg(order.first + slots), b.a.rows, block - blocks, part, 0, false);
  }
  int64_t low = 0, high = slots;  // block_first[low] <= block < block_first[high]
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (__ldg(order.block_first + middle) <= block) low = middle;
    else high = middle;
  }
  return unit_of(b, __ldg(order.first + low), __ldg(order.first + low + 1), block - __ldg(order.block_first + low),
                 part, static_cast<int>(low), true);
}

// What one block of the unit kernel takes: a unit, or the rows of several leaves one after another.
struct Run {
  Unit rows;
  int64_t leaf;  // the first one
  int end;       // its rows
};
__device__ inline Run find_run(const Backward& b, int64_t block, int64_t blocks) {
  if (!b.cut.pieces) {
    Unit unit = find_unit(b, block);
    return {unit, block, unit.count};
  }
  int64_t begin = run_start(b.cut, blocks, block), end = run_start(b.cut, blocks, block + 1);
  if (begin >= end) return {};
  int64_t first = begin * b.cut.tile, rows = min(b.a.rows, end * b.cut.tile) - first;
  int64_t leaf_end = (next_leaf(b.cut, begin) - begin) * b.cut.tile;
  return {{nullptr, first, static_cast<int>(rows), 0, true}, leaf_at(b.cut, begin), static_cast<int>(leaf_end)};
}
// The leaf that starts with the run's row `end`, and in run.end where it ends. Leaves between the two have no rows.
__device__ inline int64_t next_in_run(const Backward& b, Run& run) {
  if (!b.cut.pieces) return run.leaf + 1;
  int64_t tile = (run.rows.first + run.end) / b.cut.tile;
  if (tile >= b.cut.tiles) return leaves(b.cut);
  run.end = static_cast<int>(next_leaf(b.cut, tile) * b.cut.tile - run.rows.first);
  return leaf_at(b.cut, tile);
}

}  // namespace fastedit::cuda
