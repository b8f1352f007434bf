// edit_backward, of edit and of edit_add (backward.h has the formulas; h = hidden + residual on the sum).
//
// Streams: grad and hidden in (hidden only where a gradient reads it), d_hidden out. One pass over both; with
// slots the parameter sums take a second pass, over rows sorted by slot. Threads over fixed blocks of rows.
#include "cpu/add.h"
#include "cpu/backward.h"
#include "cpu/backward_plain.h"

namespace fastedit {
namespace FASTEDIT_ISA {

namespace {

template <class X, class G>
int plain_backward(const EditBackwardArgs& a) {
  typedef typename X::T E;
  constexpr int Wide = X::kWide == G::kWide ? X::kWide : kLanes;
  const int64_t width = a.width;
  const float* scale = a.form.scale;
  const WantedSums<2> wanted{{a.d_form.scale, a.d_form.bias}, width};
  return over_blocks(a.rows, wanted, [&]<int R>(int64_t row, float* const (&sums)[2]) {
    const auto grad = rows_at<const typename G::T, R>(a.grad, row, a.grad_stride);
    const auto hidden = rows_at<const E, R>(a.hidden, row, a.hidden_stride);
    const auto residual = rows_at<const E, R>(a.residual, row, a.residual_stride);
    const auto back = rows_at<E, R>(a.d_hidden, row, width);
    const bool on_sum = a.residual, want_back = a.d_hidden;
    float *d_scale = sums[0], *d_bias = sums[1];
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      typedef typename Lane<L>::F F;
      F g[R];
      for (int r = 0; r < R; ++r) g[r] = G::template load<L>(grad.at[r] + c);
      if (d_scale) {
        F product[R];
        for (int r = 0; r < R; ++r) {
          F h = X::template load<L>(hidden.at[r] + c);
          if (on_sum) h += X::template load<L>(residual.at[r] + c);
          product[r] = g[r] * h;
        }
        accumulate_columns<L>(d_scale + c, sum_of<L>(product));
      }
      if (d_bias) accumulate_columns<L>(d_bias + c, sum_of<L>(g));
      if (!want_back) return;
      const F gain = scale ? Fp32::load<L>(scale + c) : splat<L>(1.0f);
      for (int r = 0; r < R; ++r) X::template store<L>(back.at[r] + c, gain * g[r]);
    });
  });
}

}  // namespace

int64_t edit_backward_workspace(const EditBackwardArgs&) { return 0; }

int edit_backward(const EditBackwardArgs& a, void*, void*) {
  int error = 0;
  with_dtypes(a.hidden_dtype, a.grad_dtype, [&]<class X, class G>() {
    if (a.grad && is_plain(a.form, a.d_form)) {
      error = plain_backward<X, G>(a);
      return;
    }
    const FormBackward backward{a.form, a.rows, a.width, a.z, a.grad_z, a.d_form, a.slot_order};
    float* none[2] = {nullptr, nullptr};
    error = backward.run(
        a.d_hidden != nullptr, a.hidden != nullptr, 0, none,
        [&](int64_t row, Row& to, float*) {
          if (a.grad) {
            to.grad = row_of<G>(to.grad_scratch, a.grad, row * a.grad_stride, a.width);
          } else {
            zero_row(to.grad_scratch, a.width);
          }
          if (to.d_hidden && a.d_hidden) to.d_hidden = form_in<X>(to.d_hidden, a.d_hidden, row * a.width);
          if (!to.hidden) return;
          if (a.residual) {
            load_row<X>(to.hidden_scratch, a.hidden, row * a.hidden_stride, a.width);
            add_row<X>(to.hidden_scratch, a.residual, row * a.residual_stride, a.width);
          } else {
            to.hidden = row_of<X>(to.hidden_scratch, a.hidden, row * a.hidden_stride, a.width);
          }
        },
        [&](int64_t row, const Row& from) {
          if (from.d_hidden) store_row<X>(a.d_hidden, row * a.width, from.d_hidden, a.width);
        });
  });
  return error;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
