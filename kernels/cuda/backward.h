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
//   reduce   backward_sums.cu    the sum over the leaves' partials
#pragma once
#include "form.h"
#include "launch.h"

namespace fastedit::cuda {

// Columns of each sum among all of them, −1 where it is not meant.
struct Sums {
  int64_t scale = -1, bias = -1, read = -1, write = -1, weight = -1, norm_bias = -1, offset = -1;
  bool vectors() const { return scale >= 0 || bias >= 0 || weight >= 0 || norm_bias >= 0; }
};

// Columns `first` … `first + size` of sums, as the partials of the rows' cut.
struct Partials {
  Cut cut;
  int64_t first, size;
  float* data;
  __host__ __device__ float* of(int64_t number) const { return data + number * size - first; }  // column 0 there
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
  int64_t columns;     // of all sums
  Partials units;      // of the columns that the unit kernel takes, all its launches together
  Partials later;      // of the others, which come last
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

// After the rows: d_read and d_write where they are left, then the pairwise sum of the leaves' partials into
// d_form, d_weight, d_norm_bias.
int finish_sums(const Backward& backward, void* stream);

// Rows as the cut sees them, those of a slot side by side; `order` null: as they come.
struct Unit {
  const int32_t* order;
  int64_t first;
  int count;
  int slot;
  bool inside;  // false for rows that no slot owns
  __device__ int64_t row(int i) const { return order ? __ldg(order + first + i) : first + i; }
};

// The slot of a place in that order. A leaf's rows of it have the partial number leaf + before, where before counts the
// blocks of the slots before it: both rise along the order, and before does at every border, so that no two have the same
// number and a slot's follow one another. Sums that all slots share have the leaf's.
struct Place {
  int64_t end;  // where its rows do
  int before;
  int slot;
  bool inside;
};
__device__ inline Place place_at(const Backward& b, int64_t at) {
  const SlotOrder& order = b.a.slot_order;
  if (!order.order) return {b.a.rows, 0, 0, true};
  const int slot = __ldg(b.a.form.slot + __ldg(order.order + at));
  const bool inside = slot >= 0 && slot < b.a.form.slots;
  const int64_t end = __ldg(order.first + (inside ? slot + 1 : 0));
  // A row more, whatever the order says: one that is another slot tensor's must not stop the kernel for ever.
  return {max(end, at + 1), inside ? __ldg(order.block_first + slot) : 0, inside ? slot : 0, inside};
}

struct Range {
  int64_t begin, end;
};
// The partials of a slot's sums, and of those that all slots share.
__device__ inline Range partials_of_slot(const Backward& b, const Cut& cut, int slot, bool shared) {
  const SlotOrder& order = b.a.slot_order;
  if (!order.order || shared) return {0, b.a.rows ? leaves(cut) : 0};
  const int64_t begin = __ldg(order.first + slot), end = __ldg(order.first + slot + 1);
  if (begin == end) return {};
  const int64_t before = __ldg(order.block_first + slot);
  return {leaf_at(cut, begin / cut.tile) + before, leaf_at(cut, (end - 1) / cut.tile) + before + 1};
}

// A piece's rows of each slot, one after another. A cut of one kind.
template <class F>
__device__ inline void each_slot(const Backward& b, const Cut& cut, int64_t piece, F visit) {
  const int32_t* order = b.a.slot_order.order;
  const int64_t first = cut_start(cut.tiles, cut.pieces, piece) * cut.tile;
  const int count = static_cast<int>(min(int64_t{cut.tile}, b.a.rows - first));
  int done = 0;
#pragma unroll 1
  do {
    const Place place = place_at(b, first + done);
    const int next = order ? static_cast<int>(min(int64_t{count}, place.end - first)) : count;
    visit(Unit{order, first + done, next - done, place.slot, place.inside});
    done = next;
  } while (order && done < count);
}
// Where such rows' sums go. Asked for when they are there, so that no register holds it meanwhile.
__device__ inline float* partials_of_unit(const Backward& b, int64_t piece, const Unit& unit) {
  return b.later.of(piece + place_at(b, unit.first).before);
}

// What one block of the unit kernel takes: rows of several leaves and slots, of which it adds up those of one leaf and one
// slot at a time. What else there is to know of these is looked up at their end, where no row is in registers.
struct Run {
  Unit rows;
  int end, next_end;  // its rows of this leaf and slot end there, and those of the next one
};
// Where the rows of one leaf and slot end that start with the run's row i.
__device__ inline int end_in_run(const Backward& b, const Run& run, int i) {
  const Cut& cut = b.units.cut;
  const int64_t at = run.rows.first + i, leaf_end = next_leaf(cut, at / cut.tile) * cut.tile;
  return static_cast<int>(min(min(leaf_end, place_at(b, at).end) - run.rows.first, int64_t{run.rows.count}));
}
// Rows that a tile may ask for ahead of their turn: of the next leaf and slot; without slots the tiles of all leaves follow
// one another without a gap.
__device__ inline int end_of_next(const Backward& b, const Run& run) {
  return b.a.slot_order.order && run.end < run.rows.count ? end_in_run(b, run, run.end) : run.rows.count;
}
__device__ inline int rows_of_run(const Backward& b, int64_t block, int64_t blocks) {
  const Cut& cut = b.units.cut;
  const int64_t end = min(b.a.rows, run_start(cut, blocks, block + 1) * cut.tile);
  return static_cast<int>(max(int64_t{0}, end - run_start(cut, blocks, block) * cut.tile));
}
__device__ inline Run find_run(const Backward& b, int64_t block, int64_t blocks) {
  const int64_t first = run_start(b.units.cut, blocks, block) * b.units.cut.tile;
  Run run{{b.a.slot_order.order, first, rows_of_run(b, block, blocks), 0, true}, 0, 0};
  if (run.rows.count == 0) return run;
  run.end = end_in_run(b, run, 0), run.next_end = end_of_next(b, run);
  return run;
}
// Goes on to the rows behind `end`; false where the run ends.
__device__ inline bool go_on(const Backward& b, Run& run) {
  if (run.end >= run.rows.count) return false;
  run.end = b.a.slot_order.order ? run.next_end : end_in_run(b, run, run.end);
  run.next_end = end_of_next(b, run);
  return true;
}

// The numbers of the partials that the rows before `end` are the last of: of their leaf and of those without rows behind it,
// and what a slot's have before them.
struct Finished {
  int64_t leaf, of_slot_end, of_all_end, before;
};
__device__ inline Finished finished(const Backward& b, const Run& run) {
  const Cut& cut = b.units.cut;
  const int64_t at = run.rows.first + run.end;
  const Place place = place_at(b, at - 1);
  const int64_t leaf = leaf_at(cut, (at - 1) / cut.tile), behind = at < b.a.rows ? leaf_at(cut, at / cut.tile) : leaf + 1;
  return {leaf, !place.inside ? leaf : at < place.end ? behind : leaf + 1, behind, place.before};
}

}  // namespace fastedit::cuda
