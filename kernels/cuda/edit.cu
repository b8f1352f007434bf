// edit: out = h + k · ((scale − 1) ⊙ h + bias + z @ write), z = h @ readᵀ + offset.
// One stream in, one out. Rank 0 is the stream kernel (stream.h: grid, registers, determinism); a rank
// above 0 or a gate needs sums along the row (edit_add_norm.cu, edit_gated.cu).
#include "rows.h"
#include "stream.h"

namespace fastedit::cuda {

int edit(const EditArgs& args, void* stream) {
  EditAddArgs a{args.rows,          args.width, args.form, args.dtype, args.dtype, args.hidden,
                args.hidden_stride, nullptr,    0,         args.out,   args.z,     0};
  if (!streams(a.form)) {
    EditAddNormArgs rows{};
    rows.add = a;
    return edit_rows(rows, stream);
  }
  int vector = Alignment(a.rows, a.width, args.dtype)
                   .stream(a.x, a.x_stride, args.dtype)
                   .stream(a.out, a.width, args.dtype)
                   .form(a.form)
                   .vector;
  return with_types(args.dtype, args.dtype, [&](auto type, auto) {
    using T = typename decltype(type)::type;
    return vector == 1 ? run_stream<Any, Any, 1, false>(a, stream)
                       : run_stream<T, T, vector_width(sizeof(T)), false>(a, stream);
  });
}

}  // namespace fastedit::cuda
