// The streams of a residual add under an edit, shared by edit_add and edit_add_norm.
#pragma once
#include "cpu/rows.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// The rows of both streams from `row` on: x(r, lane, column), residual(…) and their total.
template <class X, class R0, int R>
struct AddRows {
  RowPointers<const typename X::T, R> x_rows;
  RowPointers<const typename R0::T, R> residual_rows;
  AddRows(const EditAddArgs& a, int64_t row)
      : x_rows(static_cast<const typename X::T*>(a.x) + row * a.x_stride, a.x_stride),
        residual_rows(static_cast<const typename R0::T*>(a.residual) + row * a.residual_stride, a.residual_stride) {}
  auto x() const {
    return [at = x_rows](int r, auto lane, int64_t c) { return X::template load<decltype(lane)::count>(at.at[r] + c); };
  }
  auto residual() const {
    return [at = residual_rows](int r, auto lane, int64_t c) {
      return R0::template load<decltype(lane)::count>(at.at[r] + c);
    };
  }
  auto total() const {
    return [x = x(), residual = residual()](int r, auto lane, int64_t c) { return residual(r, lane, c) + x(r, lane, c); };
  }
};

// body.template operator()<R>(row, params, k) for each group of rows, as each_group has it; a gate sees what the form
// is given: x, or the sum in fp32.
template <class X, class R0, class Body>
inline void each_add(const EditAddArgs& a, Body body) {
  if (a.on_sum) {
    each_gated_group(a.form, a.rows, a.width, [&]<int R>(int64_t row) { return AddRows<X, R0, R>(a, row).total(); }, body);
  } else {
    each_gated_group(a.form, a.rows, a.width, [&]<int R>(int64_t row) { return AddRows<X, R0, R>(a, row).x(); }, body);
  }
}

// sink(r, lane, column, residual' in fp32, not yet rounded) for R rows; X and R0 are the dtypes of x and residual.
template <class X, class R0, int R, class Sink>
inline void add_rows(const EditAddArgs& a, int64_t row, const Params& p, float k, Sink sink) {
  const AddRows<X, R0, R> rows(a, row);
  const auto x = rows.x();
  const auto residual = rows.residual();
  const auto total = rows.total();

  constexpr int Wide = X::kWide == R0::kWide ? X::kWide : kLanes;
  float z[R][kMaxRank];
  if (p.rank && (k != 0.0f || a.z)) {
    if (slot_of(a.form, row) < 0) {
      memset(z, 0, sizeof z);
    } else if (a.on_sum) {
      project_rows<R>(p.read, p.offset, p.rank, a.width, total, z);
    } else {
      project_rows<R>(p.read, p.offset, p.rank, a.width, x, z);
    }
    for (int r = 0; r < R; ++r) store_z(a.z, z[r], row + r, p.rank);
  }
  if (a.on_sum) {
    edit_rows<R, Wide>(p, k, a.width, z, total, AsItIs{}, sink);
  } else {
    auto add = [=](int r, auto lane, int64_t c, auto edited) { return residual(r, lane, c) + edited; };
    edit_rows<R, Wide>(p, k, a.width, z, x, add, sink);
  }
}

// body.template operator()<X, Residual>() for the dtypes of x and residual: one dtype, or bf16 onto fp32 (autocast's
// mix on a CPU; fp16 onto fp32 is left to the reference, a fifth of the compile time being its only use here).
template <class Body>
inline void with_dtypes(int x, int residual, Body body) {
  if (x == F32 && residual == F32) body.template operator()<Fp32, Fp32>();
  if (x == BF16 && residual == BF16) body.template operator()<Bf16, Bf16>();
  if (x == F16 && residual == F16) body.template operator()<Fp16, Fp16>();
  if (x == BF16 && residual == F32) body.template operator()<Bf16, Fp32>();
}

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
