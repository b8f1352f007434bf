// project: z = hidden @ readᵀ + offset. One stream in, rows × rank floats out.
// The same kernels, and so the same bits, as the z of edit (edit_add_norm.cu: grid, tiles, determinism).
// Its backward is edit_backward's with z's gradient alone (edit_backward.cu).
#include "rows.h"

namespace fastedit::cuda {

int project(const ProjectArgs& args, void* stream) {
  EditAddNormArgs a{};
  a.add.rows = args.rows, a.add.width = args.width;
  a.add.form.rank = args.rank, a.add.form.read = args.read, a.add.form.offset = args.offset;
  a.add.form.slots = 1;
  a.add.x_dtype = a.add.residual_dtype = args.dtype;
  a.add.x = args.hidden, a.add.x_stride = args.hidden_stride;
  a.add.z = args.z;
  return edit_rows(a, stream);
}

}  // namespace fastedit::cuda
