// edit_backward, of edit and of edit_add (backward.h has the formulas; h = hidden + residual on the sum).
//
// Streams: grad and hidden in (hidden only where a gradient reads it), d_hidden out. One pass over both, before which a
// rank reads the group's grad for q; with slots the parameter sums take a second pass, over rows sorted by slot. Threads
// over fixed blocks of rows, whose sums are added as a fixed tree (sums.h).
#include "cpu/add.h"
#include "cpu/backward.h"
#include "cpu/backward_plain.h"

namespace fastedit {
namespace FASTEDIT_ISA {

namespace {

template <class X, class G, bool OnSum>
int plain_backward(const EditBackwardArgs& a) {
  typedef typename X::T E;
  constexpr int Wide = X::kWide == G::kWide ? X::kWide : kLanes;
  constexpr bool kSafe = sizeof(E) == 2 && sizeof(typename G::T) == 2;
  const int64_t width = a.width;
  const WantedSums<2> wanted{{a.d_form.scale, a.d_form.bias}, width};
  const bool whole = a.hidden && a.d_hidden && a.form.scale && a.d_form.scale && a.d_form.bias;
  return over_blocks(a.rows, wanted, whole, [&]<int R>(int64_t row, float* const (&sums)[2], const Spare& spare) {
    const auto grad = rows_or<const typename G::T, R>(a.grad, spare.zeros, row, a.grad_stride);
    const auto hidden = rows_or<const E, R>(a.hidden, spare.zeros, row, a.hidden_stride);
    const auto residual = rows_or<const E, R>(a.residual, spare.zeros, row, a.residual_stride);
    const auto back = rows_or<E, R>(a.d_hidden, spare.outputs, row, width);
    const float* scale = a.form.scale ? a.form.scale : spare.ones;
    float *d_scale = sums[0], *d_bias = sums[1];
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      typedef typename Lane<L>::F F;
      F g[R], product[R];
      for (int r = 0; r < R; ++r) g[r] = G::template load<L>(grad.at[r] + c);
      for (int r = 0; r < R; ++r) {
        F h = X::template load<L>(hidden.at[r] + c);
        if constexpr (OnSum) h += X::template load<L>(residual.at[r] + c);
        product[r] = g[r] * h;
      }
      accumulate<L>(d_scale + c, sum_of<L>(product));
      accumulate<L>(d_bias + c, sum_of<L>(g));
      const F gain = canonical<L>(Fp32::load<L>(scale + c));
      for (int r = 0; r < R; ++r) store_of<X, kSafe, L>(back.at[r] + c, gain * g[r]);
    });
  });
}

struct Grad : GradSource {
  Stream grad;
  Scratch zeros;
  explicit Grad(const EditBackwardArgs& a)
      : grad{a.grad_dtype, a.grad, a.grad_stride}, zeros(a.grad ? 0 : a.width) {
    dtype = a.grad_dtype;
    if (a.grad) return;
    memset(zeros.floats(), 0, static_cast<size_t>(a.width) * sizeof(float));
    grad = {a.grad_dtype, zeros.floats(), 0};
  }
  const void* row(int64_t row, float*, float*) const override { return grad.row(row); }
};

}  // namespace

int64_t edit_backward_workspace(const EditBackwardArgs&) { return 0; }

int edit_backward(const EditBackwardArgs& a, void*, void*) {
  if (a.grad && is_plain(a.form, a.d_form)) {
    int error = 0;
    with_dtypes(a.hidden_dtype, a.grad_dtype, [&]<class X, class G>() {
      error = a.residual ? plain_backward<X, G, true>(a) : plain_backward<X, G, false>(a);
    });
    return error;
  }
  const FormBackward backward{
      .form = a.form, .rows = a.rows, .width = a.width, .z = a.z, .grad_z = a.grad_z, .d = a.d_form,
      .slot_order = a.slot_order,
      .hidden = {a.hidden_dtype, a.hidden, a.hidden_stride},
      .residual = {a.hidden_dtype, a.residual, a.residual_stride},
      .d_hidden = {a.hidden_dtype, a.d_hidden, a.width},
      .d_residual = {},
      .on_sum = false,
  };
  float* none[2] = {nullptr, nullptr};
  return backward.run(Grad(a), 0, none);
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
