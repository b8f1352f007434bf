// edit_add_norm:  residual' = edit_add(x, residual),  then a norm of residual' as rounded
//
//   RMS    normed = weight · round(r · rstd)            rstd = rsqrt(mean(r²) + eps)
//   GEMMA  normed = r · rstd · (1 + weight)
//   LAYER  normed = (r − mean) · rstd · weight + norm_bias
//
// Streams: x and residual in, residual' (unless unwanted) and normed out. A group's rounded rows wait in fp32
// scratch, in cache, between the statistics and the normalisation. Threads over groups of rows; a row's sums
// run in an order given by the width alone.
#include <math.h>

#include "cpu/add.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

template <class R0>
void normalise(const EditAddNormArgs& a, const float* rows, int64_t row) {
  typedef typename R0::T E;
  const int64_t width = a.add.width;
  const E* weight = static_cast<const E*>(a.weight);
  const E* norm_bias = static_cast<const E*>(a.norm_bias);
  E* normed = static_cast<E*>(a.normed) + row * width;
  auto value = [=](auto lane, int64_t c) { return load_as<typename decltype(lane)::F>(rows + c); };
  float mean = 0.0f;
  if (a.kind == LAYER) mean = sum_columns(width, value) / static_cast<float>(width);
  const float square = sum_columns(width, [=](auto lane, int64_t c) {
    const auto centred = value(lane, c) - mean;
    return centred * centred;
  });
  const float rstd = 1.0f / sqrtf(square / static_cast<float>(width) + a.eps);
  if (a.mean) a.mean[row] = mean;
  if (a.rstd) a.rstd[row] = rstd;
  if (a.kind == RMS) {
    each_column(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      const auto unit = R0::template rounded<L>(value(lane, c) * rstd);
      R0::template store<L>(normed + c, R0::template load<L>(weight + c) * unit);
    });
  } else if (a.kind == GEMMA) {
    each_column(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      R0::template store<L>(normed + c, value(lane, c) * rstd * (R0::template load<L>(weight + c) + 1.0f));
    });
  } else {
    each_column(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      typedef typename Lane<L>::F F;
      const F gain = weight ? R0::template load<L>(weight + c) : splat<L>(1.0f);
      const F shift = norm_bias ? R0::template load<L>(norm_bias + c) : F{};
      R0::template store<L>(normed + c, (value(lane, c) - mean) * rstd * gain + shift);
    });
  }
}

}  // namespace

int edit_add_norm(const EditAddNormArgs& a, void*) {
  const int64_t width = a.add.width;
  with_dtypes(a.add.x_dtype, a.add.residual_dtype, [&]<class X, class R0>() {
    typename R0::T* out = static_cast<typename R0::T*>(a.add.out);
    each_group(a.add.form, a.add.rows, width, [&]<int R>(int64_t row, const Params& p, float k) {
      Scratch rounded(R * width);
      const RowPointers<float, R> wait(rounded.floats(), width);
      const RowPointers<typename R0::T, R> to(out ? out + row * width : nullptr, out ? width : 0);
      add_rows<X, R0, R>(a.add, row, p, k, [=](int r, auto lane, int64_t c, auto sum) {
        constexpr int L = decltype(lane)::count;
        const auto stored = R0::template rounded<L>(sum);
        memcpy(wait.at[r] + c, &stored, sizeof stored);
        if (to.at[r]) R0::template store<L>(to.at[r] + c, stored);
      });
      for (int r = 0; r < R; ++r) normalise<R0>(a, rounded.floats() + r * width, row + r);
    });
  });
  return 0;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
