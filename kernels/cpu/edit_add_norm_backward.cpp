// edit_add_norm_backward: the norm's backward at the rounded residual', the residual's own gradient added, and
// the edit's backward (backward.h) with that total as G, all in fp32 before one rounding on each store.
//
//   unit = (r − mean) · rstd     g = grad_normed ⊙ gain     (gain = weight, or 1 + weight for GEMMA)
//   total = rstd · (g − unit · mean(g ⊙ unit) [− mean(g) for LAYER]) + grad_residual
//   d_weight Σ grad_normed ⊙ unit     d_norm_bias Σ grad_normed
//
// Streams: grad_normed, grad_residual, residual' in (and x where a gradient reads it); d_x and d_residual out.
// Threads over fixed blocks of rows.
#include "cpu/add.h"
#include "cpu/backward.h"
#include "cpu/backward_plain.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// The norm's backward at one row. Ranked and plain edits share total_of, so that a row's bits do not depend on
// which of the two took it.
template <class R0, int Wide>
struct NormRow {
  typedef typename R0::T E;
  const E *grad, *out, *direct, *weight;
  float mean, rstd, inner, level;
  bool gemma;

  NormRow() = default;
  NormRow(const EditAddNormBackwardArgs& a, int64_t row)
      : grad(static_cast<const E*>(a.grad_normed) + row * a.grad_normed_stride),
        out(static_cast<const E*>(a.residual_out) + row * a.width),
        direct(a.grad_residual ? static_cast<const E*>(a.grad_residual) + row * a.grad_residual_stride : nullptr),
        weight(static_cast<const E*>(a.weight)),
        mean(a.kind == LAYER ? a.mean[row] : 0.0f),
        rstd(a.rstd[row]),
        inner(0.0f),
        level(0.0f),
        gemma(a.kind == GEMMA) {
    if (rstd != rstd) rstd = NAN;  // they may be any NaN
    if (mean != mean) mean = NAN;
  }
  // The two means along the row.
  void sum(const EditAddNormBackwardArgs& a) {
    const NormRow self = *this;
    const float width = static_cast<float>(a.width);
    inner = sum_columns<Wide>(a.width, [=](auto lane, int64_t c) {
      return self.scaled(lane, c) * self.unit(lane, c);
    }) / width;
    if (a.kind != LAYER) return;
    level = sum_columns<Wide>(a.width, [=](auto lane, int64_t c) { return self.scaled(lane, c); }) / width;
  }

  template <class W>
  auto normed_grad(W, int64_t c) const { return R0::template load<W::count>(grad + c); }
  template <class W>
  auto unit(W, int64_t c) const { return (R0::template load<W::count>(out + c) - mean) * rstd; }
  template <class W>
  typename W::F gain(W, int64_t c) const {
    if (!weight) return splat<W::count>(1.0f);
    const auto value = R0::template load<W::count>(weight + c);
    return gemma ? value + 1.0f : value;
  }
  template <class W>
  auto scaled(W lane, int64_t c) const { return normed_grad(lane, c) * gain(lane, c); }
  // The gradient of residual': the norm's part and what came to residual' directly.
  template <class F>
  F total_of(F normed_grad, F gain, F stored, F also) const {
    return (normed_grad * gain - (stored - mean) * rstd * inner - level) * rstd + also;
  }
  template <class W>
  auto total(W lane, int64_t c) const {
    const typename W::F also = direct ? R0::template load<W::count>(direct + c) : typename W::F{};
    return total_of(normed_grad(lane, c), gain(lane, c), R0::template load<W::count>(out + c), also);
  }
};

// d_weight's and d_norm_bias's sums, where wanted, of one row.
template <class R0, int Wide>
void norm_sums(const NormRow<R0, Wide> norm, float* d_weight, float* d_norm_bias, int64_t width) {
  if (d_weight) {
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      accumulate<decltype(lane)::count>(d_weight + c, norm.normed_grad(lane, c) * norm.unit(lane, c));
    });
  }
  if (d_norm_bias) {
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      accumulate<decltype(lane)::count>(d_norm_bias + c, norm.normed_grad(lane, c));
    });
  }
}

// The whole backward under scale and bias alone, in two passes over a group of rows that stay in the cache: the
// norm's sums, then everything else.
template <class X, class R0, bool OnSum>
int plain_norm_backward(const EditAddNormBackwardArgs& a) {
  typedef typename X::T E;
  typedef typename R0::T E0;
  constexpr int Wide = X::kWide == R0::kWide ? X::kWide : kLanes;
  constexpr bool kSafe = sizeof(E) == 2 && sizeof(E0) == 2;
  const int64_t width = a.width;
  const WantedSums<4> wanted{{a.d_form.scale, a.d_form.bias, a.d_weight, a.d_norm_bias}, width};
  const bool given = a.x && a.grad_residual && a.form.scale && (a.residual || !OnSum);
  const bool whole = given && a.d_x && (a.d_residual || OnSum) && a.d_form.scale && a.d_form.bias;
  return over_blocks(a.rows, wanted, whole, [&]<int R>(int64_t row, float* const (&sums)[4], const Spare& spare) {
    const auto x = rows_or<const E, R>(a.x, spare.zeros, row, a.x_stride);
    const auto residual = rows_or<const E0, R>(a.residual, spare.zeros, row, a.residual_stride);
    const auto normed = rows_or<const E0, R>(a.grad_normed, spare.zeros, row, a.grad_normed_stride);
    const auto direct = rows_or<const E0, R>(a.grad_residual, spare.zeros, row, a.grad_residual_stride);
    const auto out = rows_or<const E0, R>(a.residual_out, spare.zeros, row, width);
    const auto d_x = rows_or<E, R>(a.d_x, spare.outputs, row, width);
    const auto d_residual = rows_or<E0, R>(a.d_residual, spare.outputs, row, width);
    const float* scale = a.form.scale ? a.form.scale : spare.ones;
    float *d_scale = sums[0], *d_bias = sums[1];
    NormRow<R0, Wide> norm[R];
    for (int r = 0; r < R; ++r) {
      norm[r] = {a, row + r};
      norm[r].sum(a);
      norm_sums(norm[r], a.d_weight ? sums[2] : nullptr, a.d_norm_bias ? sums[3] : nullptr, width);
    }
    const E0* weight = static_cast<const E0*>(a.weight);
    const float more = a.kind == GEMMA ? 1.0f : 0.0f;
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      typedef typename Lane<L>::F F;
      const F norm_gain = R0::template load<L>(weight + c) + more;
      F total[R], product[R];
      for (int r = 0; r < R; ++r) {
        total[r] = norm[r].total_of(R0::template load<L>(normed.at[r] + c), norm_gain, R0::template load<L>(out.at[r] + c),
                                    R0::template load<L>(direct.at[r] + c));
      }
      for (int r = 0; r < R; ++r) {
        F h = X::template load<L>(x.at[r] + c);
        if constexpr (OnSum) h += R0::template load<L>(residual.at[r] + c);
        product[r] = total[r] * h;
      }
      accumulate<L>(d_scale + c, sum_of<L>(product));
      accumulate<L>(d_bias + c, sum_of<L>(total));
      const F gain = canonical<L>(Fp32::load<L>(scale + c));
      for (int r = 0; r < R; ++r) store_of<X, kSafe, L>(d_x.at[r] + c, gain * total[r]);
      if constexpr (OnSum) return;  // d_residual is d_x
      for (int r = 0; r < R; ++r) store_of<R0, kSafe, L>(d_residual.at[r] + c, total[r]);
    });
  });
}

struct NormGrad : GradSource {
  const EditAddNormBackwardArgs& a;
  explicit NormGrad(const EditAddNormBackwardArgs& args) : a(args) { dtype = F32; }
  const void* row(int64_t row, float* space, float* own_sums) const override {
    if (a.grad_normed) {
      with_dtype(a.residual_dtype, [&]<class R0>() {
        constexpr int Wide = R0::kWide;
        NormRow<R0, Wide> norm(a, row);
        norm.sum(a);
        each_column<Wide>(a.width, [=](auto lane, int64_t c) {
          Fp32::store<decltype(lane)::count>(space + c, norm.total(lane, c));
        });
        if (!own_sums) return;
        float* d_norm_bias = a.d_norm_bias ? own_sums + (a.d_weight ? a.width : 0) : nullptr;
        norm_sums(norm, a.d_weight ? own_sums : nullptr, d_norm_bias, a.width);
      });
      return space;
    }
    const Stream grad{a.residual_dtype, a.grad_residual, a.grad_residual_stride};
    if (a.grad_residual) return widen(grad.dtype, grad.row(row), 0, space, a.width);
    memset(space, 0, static_cast<size_t>(a.width) * sizeof(float));
    return space;
  }
};

}  // namespace

int64_t edit_add_norm_backward_workspace(const EditAddNormBackwardArgs&) { return 0; }

int edit_add_norm_backward(const EditAddNormBackwardArgs& a, void*, void*) {
  const bool both = a.on_sum && a.d_residual;  // one result twice
  if (a.grad_normed && a.weight && !both && is_plain(a.form, a.d_form)) {
    int error = 0;
    with_dtypes(a.x_dtype, a.residual_dtype, [&]<class X, class R0>() {
      error = a.on_sum ? plain_norm_backward<X, R0, true>(a) : plain_norm_backward<X, R0, false>(a);
    });
    return error;
  }
  const FormBackward backward{
      .form = a.form, .rows = a.rows, .width = a.width, .z = a.z, .grad_z = a.grad_z, .d = a.d_form,
      .slot_order = a.slot_order,
      .hidden = {a.x_dtype, a.x, a.x_stride},
      .residual = {a.residual_dtype, a.residual, a.residual_stride},
      .d_hidden = {a.x_dtype, a.d_x, a.width},
      .d_residual = {a.residual_dtype, a.d_residual, a.width},
      .on_sum = a.on_sum != 0,
  };
  float* norm_out[2] = {a.d_weight, a.d_norm_bias};
  return backward.run(NormGrad(a), (a.d_weight ? a.width : 0) + (a.d_norm_bias ? a.width : 0), norm_out);
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
