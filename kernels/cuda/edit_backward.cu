// edit_backward: with k = coefficient (0 for slot −1) and q = k (grad @ writeᵀ) + grad_z
//   d_hidden = grad + k (scale − 1) ⊙ grad + q @ read, and the parameters' gradients (abi.h).
//
// Rank 0: one pass, grad and hidden in, d_hidden out, fp32 partials of the sums beside it
// (backward_columns.h). Rank > 0 or d_coefficient: the same streams once, a block a run of whole rows
// (backward_unit.h), as long as the sums fit on the chip; d_read and d_write of larger ranks read hidden and
// grad again (backward_outer.h). Then the pairwise sum of the partials (backward_sums.cu). Grids, registers and
// the order of additions are told there; no atomics.
#include "backward_run.h"

namespace fastedit::cuda {
namespace {

EditAddNormBackwardArgs without_norm(const EditBackwardArgs& args) {
  EditAddNormBackwardArgs a{};
  a.rows = args.rows, a.width = args.width, a.form = args.form;
  a.x_dtype = args.hidden_dtype, a.residual_dtype = args.grad ? args.grad_dtype : args.hidden_dtype;
  a.grad_residual = args.grad, a.grad_residual_stride = args.grad_stride;
  a.x = args.hidden, a.x_stride = args.hidden_stride;
  a.residual = args.residual, a.residual_stride = args.residual_stride;
  a.grad_z = args.grad_z, a.z = args.z;
  a.d_x = args.d_hidden, a.d_form = args.d_form, a.slot_order = args.slot_order;
  return a;
}

EditBackwardArgs of_project(const ProjectBackwardArgs& args) {
  EditBackwardArgs a{};
  a.rows = args.rows, a.width = args.width;
  a.form.rank = args.rank, a.form.read = args.read, a.form.slots = 1;
  a.grad_dtype = a.hidden_dtype = args.dtype;
  a.hidden = args.hidden, a.hidden_stride = args.hidden_stride;
  a.grad_z = args.grad_z, a.d_hidden = args.d_hidden;
  a.d_form.read = args.d_read, a.d_form.offset = args.d_offset;
  return a;
}

}  // namespace

int64_t edit_backward_workspace(const EditBackwardArgs& args) {
  return plan_backward(without_norm(args), args.hidden_dtype, false, nullptr).workspace_bytes;
}

int edit_backward(const EditBackwardArgs& args, void* workspace, void* stream) {
  return run_backward<false>(plan_backward(without_norm(args), args.hidden_dtype, false, workspace), stream);
}

int64_t project_backward_workspace(const ProjectBackwardArgs& args) {
  return edit_backward_workspace(of_project(args));
}

int project_backward(const ProjectBackwardArgs& args, void* workspace, void* stream) {
  return edit_backward(of_project(args), workspace, stream);
}

}  // namespace fastedit::cuda
