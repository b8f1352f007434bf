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

// The norm's backward at one row. Ranked and plain edits share every expression, so that a row's bits do not depend on
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
  template <class W>
  auto total(W lane, int64_t c) const {
    const typename W::F also = direct ? R0::template load<W::count>(direct + c) : typename W::F{};
    return (scaled(lane, c) - unit(lane, c) * inner - level) * rstd + also;
  }
};

// total[] gets the gradient of residual'; sums[] (width of d_weight, then of d_norm_bias, as wanted) are added to.
template <class R0, int Wide>
void norm_backward(const EditAddNormBackwardArgs& a, int64_t row, float* total, float* sums) {
  const NormRow<R0, Wide> norm(a, row);
  each_column<Wide>(a.width, [=](auto lane, int64_t c) { Fp32::store<decltype(lane)::count>(total + c, norm.total(lane, c)); });
  if (!sums) return;
  if (a.d_weight) {
    each_column<Wide>(a.width, [=](auto lane, int64_t c) {
      accumulate_columns<decltype(lane)::count>(sums + c, norm.normed_grad(lane, c) * norm.unit(lane, c));
    });
    sums += a.width;
  }
  if (a.d_norm_bias) {
    each_column<Wide>(a.width, [=](auto lane, int64_t c) {
      accumulate_columns<decltype(lane)::count>(sums + c, norm.normed_grad(lane, c));
    });
  }
}

// The whole backward under scale and bias alone, in two passes over a group of rows that stay in the cache: the
// norm's sums, then everything else.
template <class X, class R0, int Wide>
int plain_norm_backward(const EditAddNormBackwardArgs& a) {
  typedef typename X::T E;
  typedef typename R0::T E0;
  const int64_t width = a.width;
  const WantedSums<4> wanted{{a.d_form.scale, a.d_form.bias, a.d_weight, a.d_norm_bias}, width};
  return over_blocks(a.rows, wanted, [&]<int R>(int64_t row, float* const (&sums)[4]) {
    const auto x = rows_at<const E, R>(a.x, row, a.x_stride);
    const auto residual = rows_at<const E0, R>(a.residual, row, a.residual_stride);
    const auto d_x = rows_at<E, R>(a.d_x, row, width);
    const auto d_residual = rows_at<E0, R>(a.d_residual, row, width);
    const bool edit_sum = a.residual, on_sum = a.on_sum, want_x = a.d_x, want_residual = a.d_residual;
    const float* scale = a.form.scale;
    float *d_scale = sums[0], *d_bias = sums[1], *d_weight = sums[2], *d_norm_bias = sums[3];
    NormRow<R0, Wide> norm[R];
    for (int r = 0; r < R; ++r) norm[r] = {a, row + r};
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      typedef typename Lane<L>::F F;
      F total[R], product[R];
      for (int r = 0; r < R; ++r) total[r] = norm[r].total(lane, c);
      if (d_weight) {
        for (int r = 0; r < R; ++r) product[r] = norm[r].normed_grad(lane, c) * norm[r].unit(lane, c);
        accumulate_columns<L>(d_weight + c, sum_of<L>(product));
      }
      if (d_norm_bias) {
        for (int r = 0; r < R; ++r) product[r] = norm[r].normed_grad(lane, c);
        accumulate_columns<L>(d_norm_bias + c, sum_of<L>(product));
      }
      if (d_scale) {
        for (int r = 0; r < R; ++r) {
          F h = X::template load<L>(x.at[r] + c);
          if (edit_sum) h += R0::template load<L>(residual.at[r] + c);
          product[r] = total[r] * h;
        }
        accumulate_columns<L>(d_scale + c, sum_of<L>(product));
      }
      if (d_bias) accumulate_columns<L>(d_bias + c, sum_of<L>(total));
      const F edit_gain = scale ? Fp32::load<L>(scale + c) : splat<L>(1.0f);
      for (int r = 0; r < R; ++r) {
        const F back = edit_gain * total[r];
        if (want_x) X::template store<L>(d_x.at[r] + c, back);
        if (want_residual) R0::template store<L>(d_residual.at[r] + c, on_sum ? back : total[r]);
      }
    });
  });
}

}  // namespace

int64_t edit_add_norm_backward_workspace(const EditAddNormBackwardArgs&) { return 0; }

int edit_add_norm_backward(const EditAddNormBackwardArgs& a, void*, void*) {
  int error = 0;
  with_dtypes(a.x_dtype, a.residual_dtype, [&]<class X, class R0>() {
    if (a.grad_normed && is_plain(a.form, a.d_form)) {
      error = plain_norm_backward<X, R0, X::kWide == R0::kWide ? X::kWide : kLanes>(a);
      return;
    }
    const FormBackward backward{a.form, a.rows, a.width, a.z, a.grad_z, a.d_form, a.slot_order};
    float* norm_out[2] = {a.d_weight, a.d_norm_bias};
    const int64_t norm_columns = (a.d_weight ? a.width : 0) + (a.d_norm_bias ? a.width : 0);
    error = backward.run(
        a.d_x || (a.on_sum && a.d_residual), a.x != nullptr, norm_columns, norm_out,
        [&](int64_t row, Row& to, float* norm_sums) {
          if (a.grad_normed) {
            norm_backward<R0, R0::kWide>(a, row, to.grad_scratch, norm_sums);
          } else if (!a.grad_residual) {
            zero_row(to.grad_scratch, a.width);
          } else {
            load_row<R0>(to.grad_scratch, a.grad_residual, row * a.grad_residual_stride, a.width);
          }
          if (to.d_hidden && a.d_x) to.d_hidden = form_in<X>(to.d_hidden, a.d_x, row * a.width);
          if (!to.hidden) return;
          if (a.residual) {
            load_row<X>(to.hidden_scratch, a.x, row * a.x_stride, a.width);
            add_row<R0>(to.hidden_scratch, a.residual, row * a.residual_stride, a.width);
          } else {
            to.hidden = row_of<X>(to.hidden_scratch, a.x, row * a.x_stride, a.width);
          }
        },
        [&](int64_t row, const Row& from) {
          if (a.d_x) store_row<X>(a.d_x, row * a.width, from.d_hidden, a.width);
          if (a.d_residual) store_row<R0>(a.d_residual, row * a.width, a.on_sum ? from.d_hidden : from.grad, a.width);
        });
  });
  return error;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
