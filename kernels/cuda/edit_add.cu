// edit_add: out = residual + E(x), or E(residual + x) where on_sum: the traffic of the plain add.
// Two streams in, one out. Rank 0 is the stream kernel (stream.h: grid, registers, determinism); a rank
// above 0 or a gate needs sums along the row (edit_add_norm.cu, edit_gated.cu).
#include "rows.h"
#include "stream.h"

namespace fastedit::cuda {

int edit_add(const EditAddArgs& a, void* stream) {
  if (!streams(a.form)) {
    EditAddNormArgs rows{};
    rows.add = a;
    return edit_rows(rows, stream);
  }
  int vector = Alignment(a.rows, a.width, a.residual_dtype)
                   .stream(a.x, a.x_stride, a.x_dtype)
                   .stream(a.residual, a.residual_stride, a.residual_dtype)
                   .stream(a.out, a.width, a.residual_dtype)
                   .form(a.form)
                   .vector;
  return with_types(a.x_dtype, a.residual_dtype, [&](auto x, auto residual) {
    using X = typename decltype(x)::type;
    using R = typename decltype(residual)::type;
    return vector == 1 ? run_stream<Any, Any, 1, true>(a, stream)
                       : run_stream<X, R, vector_width(sizeof(R)), true>(a, stream);
  });
}

}  // namespace fastedit::cuda
