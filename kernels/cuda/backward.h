// What the backward kernels share: which sums are wanted, where their partials lie, which rows a block takes.
//
// edit_backward and project_backward fill the same struct as edit_add_norm_backward and leave the norm out.
// Three kinds of kernel: rows (what needs a sum along the row: the norm's gradient, q, d_coefficient, and
// with them d_x), columns (sums over a unit of at most kBlockRows rows), and a reduction over the units.
#pragma once
#include "form.h"
#include "launch.h"

namespace fastedit::cuda {

// Offsets of each sum in a unit's partials, −1 where it is not wanted.
struct Sums {
  int64_t scale = -1, bias = -1, read = -1, offset = -1, write = -1, weight = -1, norm_bias = -1, size = 0;
};

struct Backward {
  EditAddNormBackwardArgs a;
  int sum_dtype;  // of a.residual
  bool has_grad;  // a gradient comes in through the rows, not through z alone
  bool pulls;     // q has a part grad @ writeᵀ
  bool rows_kernel;
  bool columns_d_x;   // the column kernel stores d_x: rank 0 and no norm, one pass over grad and hidden
  const float* q;     // (rows, rank) for d_read and d_offset: the workspace's, or grad_z itself; null: zero
  float* q_out;       // (rows, rank), null where nobody reads it
  float* norm_means;  // (rows, 2): NormRow::dot and sum, null where nobody reads them
  float* partials;    // (units, sums.size)
  int64_t units;      // with slots an upper bound, since the host does not know the slots' sizes
  Sums sums;
  int64_t workspace_bytes;
};

Backward plan_backward(const EditAddNormBackwardArgs& args, int sum_dtype, bool norm, void* workspace);

// The second half of a backward: the pairwise sum of the units' partials into d_form, d_weight, d_norm_bias.
int reduce_units(const Backward& backward, void* stream);

// At most kBlockRows rows that share a slot; `order` null: rows first … first + count.
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
  return {__ldg(order.block_first + slot), __ldg(order.block_first + slot + 1)};
}
__device__ inline UnitRange all_units(const Backward& b) {
  const SlotOrder& order = b.a.slot_order;
  if (!order.order) return {0, b.units};
  int64_t owned = __ldg(order.block_first + b.a.form.slots), before = __ldg(order.first);
  int64_t after = b.a.rows - __ldg(order.first + b.a.form.slots);
  return {0, owned + device_ceil_div(before, kBlockRows) + device_ceil_div(after, kBlockRows)};
}

__device__ inline Unit unit_of(const SlotOrder& order, int64_t begin, int64_t end, int64_t block, int slot,
                               bool inside) {
  int64_t first = begin + block * kBlockRows;
  return {order.order, first, static_cast<int>(max(int64_t{0}, min(kBlockRows, end - first))), slot, inside};
}

__device__ inline Unit find_unit(const Backward& b, int64_t unit) {
  const SlotOrder& order = b.a.slot_order;
  if (!order.order) return unit_of(order, 0, b.a.rows, unit, 0, true);
  int64_t slots = b.a.form.slots, owned = __ldg(order.block_first + slots);
  if (unit >= owned) {
    int64_t before = __ldg(order.first), blocks = device_ceil_div(before, kBlockRows);
    unit -= owned;
    if (unit < blocks) return unit_of(order, 0, before, unit, 0, false);
    return unit_of(order, __ldg(order.first + slots), b.a.rows, unit - blocks, 0, false);
  }
  int64_t low = 0, high = slots;  // block_first[low] <= unit < block_first[high]
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (__ldg(order.block_first + middle) <= unit) low = middle;
    else high = middle;
  }
  return unit_of(order, __ldg(order.first + low), __ldg(order.first + low + 1),
                 unit - __ldg(order.block_first + low), static_cast<int>(low), true);
}

}  // namespace fastedit::cuda
