// edit_add_norm:  residual' = edit_add(x, residual),  then a norm of residual' as rounded
//
//   RMS    normed = weight · round(r · rstd)            rstd = rsqrt(mean(r²) + eps)
//   GEMMA  normed = r · rstd · (1 + weight)
//   LAYER  normed = (r − mean) · rstd · weight + norm_bias
//
// Streams: x and residual in, residual' (unless unwanted) and normed out. The squares are summed as residual' is stored;
// the normalisation (and LAYER's statistics) read the group's rounded rows back from where they were stored, still in
// cache (at 512×4096 in bf16 a second, fp32 copy of them cost a third of the time). Threads over groups of rows; a row's
// sums run in an order given by the width alone.
#include <math.h>

#include "cpu/add.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// Σ of squares of a 16-bit row, taken along while its columns are stored in order. (An fp32 row's are summed in a sweep
// of their own, in more running sums: its norm shows their rounding, and the sweep costs nothing beside the memory.)
template <class R0>
struct Squares {
  static constexpr bool kAlong = sizeof(typename R0::T) == 2;
  typename Lane<R0::kWide>::F wide{};
  typename Lane<kLanes>::F narrow{};
  float tail = 0.0f;

  void add(Lane<2 * kLanes>, Pair v) {
    if constexpr (R0::kWide > kLanes) wide += v * v;
  }
  void add(Lane<kLanes>, typename Lane<kLanes>::F v) { narrow += v * v; }
  void add(Lane<1>, typename Lane<1>::F v) { tail += v[0] * v[0]; }
  float total() const {
    if constexpr (R0::kWide > kLanes) return sum_lanes(wide.even + wide.odd + narrow) + tail;
    else return sum_lanes(narrow) + tail;
  }
};

// mean and rstd of a row as stored.
template <class R0>
void statistics(const EditAddNormArgs& a, const typename R0::T* stored, const Squares<R0>& squares, float& mean, float& rstd) {
  const int64_t width = a.add.width;
  auto value = [=](auto lane, int64_t c) { return R0::template load<decltype(lane)::count>(stored + c); };
  mean = a.kind == LAYER ? sum_columns<R0::kWide>(width, value) / static_cast<float>(width) : 0.0f;
  float sum = squares.total();
  if (a.kind == LAYER || !Squares<R0>::kAlong) {
    sum = sum_columns<R0::kWide>(width, [=](auto lane, int64_t c) {
      const auto centred = value(lane, c) - mean;
      return centred * centred;
    });
  }
  rstd = 1.0f / sqrtf(sum / static_cast<float>(width) + a.eps);
  if (rstd != rstd) rstd = NAN;  // eps may be any NaN
}

// The norm of R stored rows. Each body reads all of them before it stores one, as edit_rows does.
template <class R0, int R>
void normalise(const EditAddNormArgs& a, const RowPointers<typename R0::T, R> rows, int64_t row, const Squares<R0>* squares) {
  typedef typename R0::T E;
  const int64_t width = a.add.width;
  const E* weight = static_cast<const E*>(a.weight);
  const E* norm_bias = static_cast<const E*>(a.norm_bias);
  const RowPointers<E, R> normed(static_cast<E*>(a.normed) + row * width, width);
  constexpr int Wide = R0::kWide;
  struct {
    float mean, rstd;
  } of[R];
  for (int r = 0; r < R; ++r) {
    statistics<R0>(a, rows.at[r], squares[r], of[r].mean, of[r].rstd);
    if (a.mean) a.mean[row + r] = of[r].mean;
    if (a.rstd) a.rstd[row + r] = of[r].rstd;
  }
  auto value = [=](int r, auto lane, int64_t c) { return R0::template load<decltype(lane)::count>(rows.at[r] + c); };
  // value(r, lane, column) → what is stored there, rounded
  auto each = [=](auto value_of) {
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      const auto value_at = value_of(lane, c);
      typename Lane<L>::F out[R];
      for (int r = 0; r < R; ++r) out[r] = value_at(r, value(r, lane, c));
      for (int r = 0; r < R; ++r) R0::template store_product<L>(normed.at[r] + c, out[r]);
    });
  };
  if (a.kind == RMS) {
    each([=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      return [=, gain = R0::template load<L>(weight + c)](int r, auto v) {
        return gain * R0::template rounded_product<L>(v * of[r].rstd);
      };
    });
  } else if (a.kind == GEMMA) {
    each([=](auto lane, int64_t c) {
      return [=, gain = R0::template load<decltype(lane)::count>(weight + c) + 1.0f](int r, auto v) {
        return v * of[r].rstd * gain;
      };
    });
  } else {
    each([=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      typedef typename Lane<L>::F F;
      const F gain = weight ? R0::template load<L>(weight + c) : splat<L>(1.0f);
      const F shift = norm_bias ? R0::template load<L>(norm_bias + c) : F{};
      return [=](int r, auto v) { return (v - of[r].mean) * of[r].rstd * gain + shift; };
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
      Squares<R0> squares[R];
      add_rows<X, R0, R>(a.add, row, p, k, [to, into = squares](int r, auto lane, int64_t c, auto sum) {
        const auto stored = R0::template put<decltype(lane)::count>(to.at[r] + c, sum);
        if constexpr (Squares<R0>::kAlong) into[r].add(lane, stored);
      });
      normalise<R0, R>(a, to, row, squares);
    });
  });
  return 0;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
