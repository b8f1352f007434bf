// The commonest calls, as facts that the compiler knows: one slot, every row edited whole, 16-bit streams, no
// LayerNorm. A kernel that is told its Part works on a copy of its arguments in which what such a call never has is
// written as absent, so that the code for it goes. Results are the general kernel's to the bit.
#pragma once
#include "backward.h"
#include "cluster.h"
#include "tile.h"

namespace fastedit::cuda {

// One by one: of two facts joined by && the compiler has seen neither alone.
template <class... Facts>
__device__ inline void assume(Facts... facts) {
#ifdef __CUDACC__
  (__builtin_assume(static_cast<bool>(facts)), ...);
#endif
}

// Sum: the edit is on the sum. kClustered: any call, where a cluster of blocks
// shares a row (cluster.h).
enum Part { kGeneral, kPlainEdit, kPlainAdd, kPlainSum, kPlainNorm, kPlainSumNorm, kClustered };

__host__ __device__ inline bool is_plain(const Form& form) {
  return !form.slot && !form.coefficient && !form.gate;
}

// So many that a row or a stride in bytes of 16-bit elements fits into 32 bits, also a tile or a grid's step further on.
inline bool is_short(int64_t rows, int64_t width, int64_t stride, int64_t other) {
  return rows < (1 << 30) && most(width, most(stride, other)) < int64_t{1} << 31;
}

inline Part part_of(const EditAddNormArgs& a) {
  const EditAddArgs& add = a.add;
  if (!is_short(add.rows, add.width, add.x_stride, add.residual_stride)) return kGeneral;
  if (!is_plain(add.form) || !add.out || (add.form.rank && !add.form.write)) return kGeneral;
  if (!add.residual) return a.normed ? kGeneral : kPlainEdit;
  if (!a.normed) return add.on_sum ? kPlainSum : kPlainAdd;
  return a.kind == LAYER || a.norm_bias ? kGeneral : add.on_sum ? kPlainSumNorm : kPlainNorm;
}

__device__ inline Form plain(Form form) {
  form.slot = nullptr, form.coefficient = nullptr, form.gate = nullptr, form.slots = 1;
  return form;
}

template <class P>
__device__ inline void move(P*& data, int64_t bytes) {
  if (data) data = reinterpret_cast<P*>(reinterpret_cast<uintptr_t>(data) + bytes);
}

// As if the row began with this block's columns. What there is once for a row is for the first block to store.
__device__ inline EditAddNormArgs own_columns(EditAddNormArgs a) {
  const int64_t first = int64_t{cluster_rank()} * blockDim.x * kClusterElements;
  const int64_t x = first * (a.add.x_dtype == F32 ? 4 : 2), residual = first * (a.add.residual_dtype == F32 ? 4 : 2);
  Form& form = a.add.form;
  move(a.add.x, x), move(a.add.residual, residual), move(a.add.out, residual), move(a.normed, residual);
  move(a.weight, residual), move(a.norm_bias, residual);
  move(form.scale, 4 * first), move(form.bias, 4 * first), move(form.gate, 4 * first);
  move(form.read, 4 * first), move(form.write, 4 * first);
  if (cluster_rank() > 0) a.add.z = a.mean = a.rstd = nullptr;
  return a;
}

template <Part part, bool kLowRank, bool kWhole>
__device__ inline EditAddNormArgs plain(EditAddNormArgs a) {
  if constexpr (part == kGeneral) return a;
  if constexpr (part == kClustered) return own_columns(a);
  a.add.form = plain(a.add.form);
  a.mean = nullptr, a.norm_bias = nullptr;
  constexpr bool kNorm = part == kPlainNorm || part == kPlainSumNorm;
  a.add.on_sum = part == kPlainSum || part == kPlainSumNorm;
  if (part == kPlainEdit) a.add.residual = nullptr;
  if (!kNorm) a.normed = nullptr, a.rstd = nullptr;
  a.kind = a.kind == GEMMA ? GEMMA : RMS;
  assume(a.add.out);
  if (part != kPlainEdit) assume(a.add.residual);
  if (kNorm) assume(a.normed, a.weight);
  if (kLowRank) assume(static_cast<int>(a.add.form.rank) > 0, a.add.form.read, a.add.form.write);
  if (kWhole) assume(a.add.form.rank % kRanks == 0);
  return a;
}

// Backwards: RED's behind a norm, a rank's with bias, and LoReFT's, which has neither scale nor bias, both behind a norm and
// without one. Every gradient of what is there is wanted but d_weight, which may be; the tile's streams lie in shared memory.
// RED's without a norm is column_sums.
// The general kernel is another one over slots, whose rows come in an order, and elsewhere.
enum BackwardPart { kGeneralBackward, kPlainRed, kPlainRankNorm, kPlainRank, kPlainReftNorm, kPlainReft, kOverSlots };

inline BackwardPart backward_part(const Backward& b, int64_t columns) {
  const EditAddNormBackwardArgs& a = b.a;
  bool norm = a.grad_normed, rank = a.form.rank > 0, reft = rank && !a.form.scale && b.taken.scale < 0 && b.taken.bias < 0;
  if (!is_short(a.rows, a.grad_residual_stride, a.grad_normed_stride, a.x_stride)) return kGeneralBackward;
  if (!is_plain(a.form) || a.slot_order.order || a.residual || a.on_sum || a.width != columns) return kGeneralBackward;
  if (!a.grad_residual || !a.d_x || a.d_form.coefficient || b.total || b.norm_means || b.q_out) return kGeneralBackward;
  if (!b.reads_h || !b.unit.total_staged || !b.unit.h_staged) return kGeneralBackward;
  if (norm && (a.kind == LAYER || !a.weight || !a.d_residual || b.taken.norm_bias >= 0)) return kGeneralBackward;
  if (rank && (!a.form.read || !b.pulls || b.taken.read < 0 || b.taken.write < 0)) return kGeneralBackward;
  if (reft) return norm ? kPlainReftNorm : kPlainReft;
  if (b.taken.bias < 0) return kGeneralBackward;
  return !rank ? norm && b.taken.scale >= 0 ? kPlainRed : kGeneralBackward : norm ? kPlainRankNorm : kPlainRank;
}

// What a kernel knows of the rank: nothing, that it is a multiple of kRanks, that it is four.
enum Ranks { kAnyRanks, kWholeRanks, kFourRanks };

template <BackwardPart part, Ranks ranks>
__device__ inline Backward plain(Backward b) {
  EditAddNormBackwardArgs& a = b.a;
  if (part == kOverSlots) {
    assume(a.slot_order.order, a.form.slot);
    return b;
  }
  if (part == kGeneralBackward) {
    a.slot_order = {};
    return b;
  }
  a.form = plain(a.form);
  a.slot_order = {};
  a.residual = nullptr, a.on_sum = 0, a.kind = a.kind == GEMMA ? GEMMA : RMS, a.mean = nullptr;
  a.d_form.coefficient = nullptr;
  b.total = b.norm_means = b.q_out = nullptr;
  b.reads_h = b.unit.total_staged = b.unit.h_staged = true;
  b.taken.norm_bias = -1;
  assume(a.grad_residual, a.d_x, b.unit.chunks > 0);
  if (part == kPlainReft || part == kPlainReftNorm) {
    a.form.scale = a.form.bias = nullptr, b.taken.scale = b.taken.bias = -1;
  } else {
    assume(b.taken.bias >= 0);
  }
  if (part == kPlainRank || part == kPlainReft) {
    a.grad_normed = nullptr, a.d_residual = nullptr, b.taken.weight = -1;
  } else {
    assume(a.grad_normed, a.weight, a.d_residual);
  }
  if (part == kPlainRed) {
    a.form.rank = 0, a.form.read = a.form.write = nullptr, b.pulls = false, b.taken.read = b.taken.write = b.taken.offset = -1;
    assume(b.taken.scale >= 0, a.form.scale);
  } else {
    b.pulls = true;
    if (ranks == kFourRanks) a.form.rank = 4;
    assume(static_cast<int>(a.form.rank) > 0, a.form.read, a.form.write, b.taken.read >= 0, b.taken.write >= 0);
  }
  return b;
}

// RED's backward without a norm: every row's d_x, d_scale and d_bias.
inline bool plain_columns(const Backward& b) {
  const EditAddNormBackwardArgs& a = b.a;
  return is_plain(a.form) && !a.slot_order.order && !a.residual && a.grad_residual && b.columns_d_x && b.left.scale >= 0 &&
         b.left.bias >= 0;
}

template <bool kPlain>
__device__ inline Backward plain_columns(Backward b) {
  if constexpr (!kPlain) return b;
  b.a.form = plain(b.a.form);
  b.a.slot_order = {}, b.later.cut.tiles = b.later.cut.pieces;
  b.a.residual = nullptr, b.columns_d_x = true;
  assume(b.a.grad_residual, b.a.form.scale, b.left.scale >= 0, b.left.bias >= 0);
  return b;
}

}  // namespace fastedit::cuda
