// edit_add_norm:  residual' = edit_add(x, residual),  then a norm of residual' as rounded
//
//   RMS    normed = weight · round(r · rstd)            rstd = rsqrt(mean(r²) + eps)
//   GEMMA  normed = r · rstd · (1 + weight)
//   LAYER  normed = (r − mean) · rstd · weight + norm_bias
//
// Streams: x and residual in, residual' (unless unwanted) and normed out. The statistics and the normalisation read
// the group's rounded rows back from where they were stored, still in cache (at 512×4096 in bf16 a second, fp32 copy of
// them cost a third of the time). Threads over groups of rows; a row's sums run in an order given by the width alone.
#include <math.h>

#include "cpu/add.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

template <class R0>
void normalise(const EditAddNormArgs& a, const typename R0::T* rows, int64_t row) {
  typedef typename R0::T E;
  const int64_t width = a.add.width;
  const E* weight = static_cast<const E*>(a.weight);
  const E* norm_bias = static_cast<const E*>(a.norm_bias);
  E* normed = static_cast<E*>(a.normed) + row * width;
  constexpr int Wide = R0::kWide;
  auto value = [=](auto lane, int64_t c) { return R0::template load<decltype(lane)::count>(rows + c); };
  float mean = 0.0f;
  if (a.kind == LAYER) mean = sum_columns<Wide>(width, value) / static_cast<float>(width);
  const float square = sum_columns<Wide>(width, [=](auto lane, int64_t c) {
    const auto centred = value(lane, c) - mean;
    return centred * centred;
  });
  float rstd = 1.0f / sqrtf(square / static_cast<float>(width) + a.eps);
  if (rstd != rstd) rstd = NAN;  // eps may be any NaN
  if (a.mean) a.mean[row] = mean;
  if (a.rstd) a.rstd[row] = rstd;
  if (a.kind == RMS) {
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      const auto unit = R0::template rounded_product<L>(value(lane, c) * rstd);
      R0::template store_product<L>(normed + c, R0::template load<L>(weight + c) * unit);
    });
  } else if (a.kind == GEMMA) {
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      R0::template store_product<L>(normed + c, value(lane, c) * rstd * (R0::template load<L>(weight + c) + 1.0f));
    });
  } else {
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      typedef typename Lane<L>::F F;
      const F gain = weight ? R0::template load<L>(weight + c) : splat<L>(1.0f);
      const F shift = norm_bias ? R0::template load<L>(norm_bias + c) : F{};
      R0::template store_product<L>(normed + c, (value(lane, c) - mean) * rstd * gain + shift);
    });
  }
}

}  // namespace

int edit_add_norm(const EditAddNormArgs& a, void*) {
  const int64_t width = a.add.width;
  with_dtypes(a.add.x_dtype, a.add.residual_dtype, [&]<class X, class R0>() {
    typename R0::T* out = static_cast<typename R0::T*>(a.add.out);
    each_add<X, R0>(a.add, [&]<int R>(int64_t row, const Params& p, float k) {
      Scratch spare(out ? 0 : (R * width * static_cast<int64_t>(sizeof *out) + 3) / 4);
      typename R0::T* first = out ? out + row * width : reinterpret_cast<typename R0::T*>(spare.floats());
      const RowPointers<typename R0::T, R> to(first, width);
      add_rows<X, R0, R>(a.add, row, p, k, [=](int r, auto lane, int64_t c, auto sum) {
        R0::template store<decltype(lane)::count>(to.at[r] + c, sum);
      });
      for (int r = 0; r < R; ++r) normalise<R0>(a, to.at[r], row + r);
    });
  });
  return 0;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
