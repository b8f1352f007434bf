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

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// total[] gets the norm's part; sums[] (width of d_weight, then of d_norm_bias, as wanted) are added to.
template <class R0>
void norm_backward(const EditAddNormBackwardArgs& a, int64_t row, float* total, float* sums) {
  typedef typename R0::T E;
  const int64_t width = a.width;
  const E* grad = static_cast<const E*>(a.grad_normed) + row * a.grad_normed_stride;
  const E* out = static_cast<const E*>(a.residual_out) + row * width;
  const E* weight = static_cast<const E*>(a.weight);
  const float rstd = a.rstd[row], mean = a.kind == LAYER ? a.mean[row] : 0.0f;
  auto unit = [=](auto lane, int64_t c) { return (R0::template load<decltype(lane)::count>(out + c) - mean) * rstd; };
  const int kind = a.kind;
  auto scaled = [=](auto lane, int64_t c) {
    constexpr int L = decltype(lane)::count;
    const auto g = R0::template load<L>(grad + c);
    if (!weight) return g;
    const auto gain = R0::template load<L>(weight + c);
    return kind == GEMMA ? g * (gain + 1.0f) : g * gain;
  };
  const float inner = sum_columns(width, [=](auto lane, int64_t c) { return scaled(lane, c) * unit(lane, c); }) /
                      static_cast<float>(width);
  const float level = a.kind == LAYER ? sum_columns(width, scaled) / static_cast<float>(width) : 0.0f;
  each_column(width, [=](auto lane, int64_t c) {
    const auto value = (scaled(lane, c) - unit(lane, c) * inner - level) * rstd;
    memcpy(total + c, &value, sizeof value);
  });
  if (!sums) return;
  if (a.d_weight) {
    each_column(width, [=](auto lane, int64_t c) {
      accumulate(sums + c, R0::template load<decltype(lane)::count>(grad + c) * unit(lane, c));
    });
    sums += width;
  }
  if (a.d_norm_bias) {
    each_column(width, [=](auto lane, int64_t c) {
      accumulate(sums + c, R0::template load<decltype(lane)::count>(grad + c));
    });
  }
}

}  // namespace

int64_t edit_add_norm_backward_workspace(const EditAddNormBackwardArgs&) { return 0; }

int edit_add_norm_backward(const EditAddNormBackwardArgs& a, void*, void*) {
  int error = 0;
  with_dtypes(a.x_dtype, a.residual_dtype, [&]<class X, class R0>() {
    const FormBackward backward{a.form, a.rows, a.width, a.z, a.grad_z, a.d_form, a.slot_order};
    float* norm_out[2] = {a.d_weight, a.d_norm_bias};
    const int64_t norm_columns = (a.d_weight ? a.width : 0) + (a.d_norm_bias ? a.width : 0);
    error = backward.run(
        a.d_x || (a.on_sum && a.d_residual), a.x != nullptr, norm_columns, norm_out,
        [&](int64_t row, Row& to, float* norm_sums) {
          a.grad_normed ? norm_backward<R0>(a, row, to.grad_scratch, norm_sums) : zero_row(to.grad_scratch, a.width);
          if (a.grad_residual) add_row<R0>(to.grad_scratch, a.grad_residual, row * a.grad_residual_stride, a.width);
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
