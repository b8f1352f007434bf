// The backward of scale and bias alone under one set of parameters: RED's training, steering's, and the add's.
//
//   d_hidden = scale ⊙ G      d_scale Σ G⊙h      d_bias Σ G
//
// Rows go from their own dtypes to their own dtypes with nothing between: backward.h, which serves ranks, slots and
// coefficients, brings them into fp32 first (1.3 to 2.5 times the time). One loop without branches serves every set of
// wanted results: what is not wanted, or not given, is a row of scratch. A norm without a weight is left to backward.h.
#pragma once
#include "cpu/sums.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

inline bool is_plain(const Form& form, const FormGrad& d) {
  return !form.read && !form.slot && !form.coefficient && !d.coefficient;
}

// Column sums that a call may want, each of `width`, in the order in which they lie in a block's partial.
template <int N>
struct WantedSums {
  float* out[N];
  int64_t width;

  int64_t columns() const {
    int64_t count = 0;
    for (int i = 0; i < N; ++i) count += out[i] ? width : 0;
    return count;
  }
  void place(float* partial, float* spare, float* (&at)[N]) const {
    for (int i = 0; i < N; ++i) {
      at[i] = out[i] ? partial : spare;
      if (out[i]) partial += width;
    }
  }
};

struct Spare {
  float *zeros = nullptr, *ones = nullptr, *sums = nullptr, *outputs = nullptr;
  Spare(float* at, int64_t width) {
    if (!at) return;
    zeros = at, sums = at + width, ones = at + 2 * width, outputs = at + 3 * width;
    memset(zeros, 0, 2 * static_cast<size_t>(width) * sizeof(float));
    for (int64_t c = 0; c < width; ++c) ones[c] = 1.0f;
  }
};

// body.template operator()<R>(first row, where each sum goes, spare) over groups of rows, blocks being the threads' tasks.
// spare: rows of zeros, of ones, of sums and of outputs that nobody wants; null where `whole`: all wanted, all given.
template <int N, class Body>
inline int over_blocks(int64_t rows, const WantedSums<N>& wanted, bool whole, Body body) {
  ColumnSums sums(rows, wanted.columns());
  if (!sums.ok()) return kOutOfMemory;
  each_task(sums.blocks(), rows * wanted.width, [&](int64_t block) {
    const int64_t width = wanted.width;
    Scratch scratch(whole ? 0 : 4 * width);
    const Spare spare(scratch.floats(), width);
    float* at[N];
    wanted.place(sums.partial(block), spare.sums, at);
    const int64_t last = sums.last(block);
    int64_t row = sums.first(block);
    for (; row + kGroup <= last; row += kGroup) body.template operator()<kGroup>(row, at, spare);
    for (; row < last; ++row) body.template operator()<1>(row, at, spare);
  });
  const float* total = wanted.columns() ? sums.reduce() : nullptr;
  for (int i = 0; i < N; ++i) {
    float* to = wanted.out[i];
    copy_sum(to, total, wanted.width);
  }
  return 0;
}

// R rows of a stream from `row` on, or one row instead of each where the stream is absent.
template <class T, int R, class P>
inline RowPointers<T, R> rows_or(P* data, const void* instead, int64_t row, int64_t stride) {
  T* other = static_cast<T*>(const_cast<void*>(instead));
  return {data ? static_cast<T*>(data) + row * stride : other, data ? stride : 0};
}
// Stores, where Safe, what can be no NaN that rounding would carry into the sign (vec.h, rounded_product).
template <class T, bool Safe, int L>
inline void store_of(typename T::T* p, typename Lane<L>::F v) {
  if constexpr (Safe) T::template store_product<L>(p, v);
  else T::template store<L>(p, v);
}
template <int L, int R>
inline typename Lane<L>::F sum_of(const typename Lane<L>::F (&value)[R]) {
  typename Lane<L>::F total = value[0];
  for (int r = 1; r < R; ++r) total += value[r];
  return total;
}

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
