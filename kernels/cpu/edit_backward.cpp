// edit_backward, of edit and of edit_add (backward.h has the formulas; h = hidden + residual on the sum).
//
// Streams: grad and hidden in (hidden only where a gradient reads it), d_hidden out. One pass over both; with
// slots the parameter sums take a second pass, over rows sorted by slot. Threads over fixed blocks of rows.
#include "cpu/add.h"
#include "cpu/backward.h"

namespace fastedit {
namespace FASTEDIT_ISA {

int64_t edit_backward_workspace(const EditBackwardArgs&) { return 0; }

int edit_backward(const EditBackwardArgs& a, void*, void*) {
  int error = 0;
  with_dtypes(a.hidden_dtype, a.grad_dtype, [&]<class X, class G>() {
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
