// A backward's launches, in order: units; or rows and then vector sums; and then the second half.
#pragma once
#include "backward_columns.h"
#include "backward_rows.h"

namespace fastedit::cuda {
namespace {

template <bool kNorm>
int run_backward(const Backward& b, void* stream) {
  const EditAddNormBackwardArgs& a = b.a;
  if (b.columns && a.form.slot && !a.slot_order.order && a.rows) return cudaErrorInvalidValue;
  if (b.unit_kernel) {
    int error = run_units(b, stream);
    return error ? error : finish_sums(b, stream);
  }
  int error = with_types(a.x_dtype, a.residual_dtype, [&](auto narrow, auto wide) {
    using H = typename decltype(narrow)::type;
    using G = typename decltype(wide)::type;
    constexpr int V = vector_width(sizeof(G));
    int error = b.rows_kernel ? run_loop<kNorm>(b, stream) : cudaSuccess;
    if (error) return error;
    if constexpr (!kNorm) {
      if (b.vector > 1) return run_columns<G, H, V, false>(b, stream);
    }
    return run_columns<Any, Any, 1, kNorm>(b, stream);
  });
  return error ? error : finish_sums(b, stream);
}

}  // namespace
}  // namespace fastedit::cuda
