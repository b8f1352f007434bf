// What crosses from Python to the native kernels: plain pointers, sizes and dtype codes.
//
// The same structs and function names serve kernels/cpu (namespace fastedit::cpu) and kernels/cuda
// (namespace fastedit::cuda, plus a stream). Nothing here knows Python or torch.
//
// A stream of rows is `data` + row stride in elements; elements of a row are adjacent. Outputs are
// contiguous. Edit parameters, z, statistics and all parameter gradients are fp32. A null pointer
// means "absent" for inputs (scale 1, bias 0, rank 0, no slots, coefficient 1) and "not wanted" for
// outputs. Callers have checked shapes, dtypes and devices (fastedit/ops/public.py, fastedit/ops/arrays.py).
#pragma once
#include <cstdint>

namespace fastedit {

enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };
enum NormKind : int { RMS = 0, GEMMA = 1, LAYER = 2 };

constexpr int64_t kMaxRank = 64;
constexpr int64_t kBlockRows = 256;  // rows in one fp32 partial of a column sum (docs/design.md, 4)

// h' = h + k · ((scale − 1) ⊙ h + bias + z @ write),  z = h @ readᵀ + offset,  k = coefficient · g
//
// g = 1 without a gate. With one, s = h · gate, over ‖h‖ where rule[2] is not 0 (a row of zeros has s = 0), and
// g = 1 where s > rule[0], else 0; or, where rule[1] > 0, sigmoid(rule[1] · (s − rule[0])). h is what the form is given.
// Backwards know no gate: their coefficient is k.
struct Form {
  const float* scale;   // (slots, width)
  const float* bias;    // (slots, width)
  const float* read;    // (slots, rank, width)
  const float* offset;  // (slots, rank)
  const float* write;   // (slots, rank, width)
  int64_t rank;         // 0..kMaxRank
  int64_t slots;        // 1 where slot is null
  const int32_t* slot;  // (rows,): −1, or any number out of range, leaves the row's bits alone
  const float* coefficient;    // (rows,), or one number where the stride is 0
  int64_t coefficient_stride;  // 0 or 1
  const float* gate;           // (slots, width), null: none
  const float* rule;           // (slots, 3): threshold, sharpness or 0, 1 for the cosine else 0; given with gate
};

struct EditArgs {
  int64_t rows, width;
  Form form;
  int dtype;            // of hidden and out
  const void* hidden;
  int64_t hidden_stride;
  void* out;
  float* z;             // (rows, rank)
};

// out = residual + E(x), or E(residual + x) where on_sum. Either x and residual share a dtype, or
// residual is fp32; out has residual's dtype.
struct EditAddArgs {
  int64_t rows, width;
  Form form;
  int x_dtype, residual_dtype;
  const void* x;
  int64_t x_stride;
  const void* residual;
  int64_t residual_stride;
  void* out;
  float* z;
  int on_sum;
};

// edit_add, then a norm of the rounded residual'. weight, norm_bias and normed have residual_dtype.
// add.out may be null: then only normed is stored (it is still the norm of the rounded sum).
struct EditAddNormArgs {
  EditAddArgs add;
  int kind;
  float eps;
  const void* weight;     // null only for LAYER
  const void* norm_bias;  // null unless LAYER
  void* normed;
  float* mean;            // (rows,), LAYER only
  float* rstd;            // (rows,)
};

// Where parameter gradients go; all contiguous, shaped like the parameters.
struct FormGrad {
  float *scale, *bias, *read, *offset, *write;
  float* coefficient;  // (rows,), one number per row also where the coefficient is shared
};

// Rows sorted by slot, for parameter gradients over slots; all null where slot is null.
// Slot s owns order[first[s] … first[s+1]) in blocks of kBlockRows rows numbered from block_first[s]; order holds
// every row, the untouched ones before first[0].
struct SlotOrder {
  const int32_t* order;        // (rows,)
  const int32_t* first;        // (slots + 1,)
  const int32_t* block_first;  // (slots + 1,)
};

// k = coefficient (0 for slot −1), q = k (grad @ writeᵀ) + grad_z:
//   d_hidden = grad + k (scale − 1) ⊙ grad + q @ read
//   scale Σ k grad⊙h   bias Σ k grad   read qᵀh   offset Σ q   write (k z)ᵀ grad
//   coefficient Σ_width grad ⊙ ((scale − 1) ⊙ h + bias + z @ write)
struct EditBackwardArgs {
  int64_t rows, width;
  Form form;
  int grad_dtype, hidden_dtype;
  const void* grad;            // null: zero
  int64_t grad_stride;
  const void* hidden;          // null where no wanted gradient reads it
  int64_t hidden_stride;
  const void* residual;        // edit_add on the sum: h = hidden + residual, residual of hidden_dtype
  int64_t residual_stride;
  const float* grad_z;         // (rows, rank), null: zero
  const float* z;              // (rows, rank), given where write or coefficient is wanted and rank > 0
  void* d_hidden;              // hidden_dtype
  FormGrad d_form;
  SlotOrder slot_order;
};

// total = grad_residual + (gradient of the norm at grad_normed); d_residual = total, or d_x where on_sum;
// d_x and d_form as in EditBackwardArgs with grad = total, kept in fp32 throughout.
struct EditAddNormBackwardArgs {
  int64_t rows, width;
  Form form;
  int x_dtype, residual_dtype;
  const void* grad_residual;   // null: zero; residual_dtype
  int64_t grad_residual_stride;
  const void* grad_normed;     // null: zero; residual_dtype
  int64_t grad_normed_stride;
  const void* residual_out;    // contiguous, residual_dtype; null where grad_normed is null
  const void* x;               // null where no wanted gradient reads it
  int64_t x_stride;
  const void* residual;        // only where on_sum and x is given
  int64_t residual_stride;
  const void* weight;
  const float* mean;
  const float* rstd;
  const float* grad_z;
  const float* z;
  int on_sum, kind;
  void* d_x;                   // x_dtype
  void* d_residual;            // residual_dtype; where on_sum and dtypes are equal pass only d_x
  FormGrad d_form;
  float* d_weight;             // (width,)
  float* d_norm_bias;          // (width,)
  SlotOrder slot_order;
};

struct ProjectArgs {
  int64_t rows, width, rank;
  int dtype;
  const void* hidden;
  int64_t hidden_stride;
  const float* read;
  const float* offset;
  float* z;
};

struct ProjectBackwardArgs {
  int64_t rows, width, rank;
  int dtype;
  const float* grad_z;
  const void* hidden;          // null where d_read is not wanted
  int64_t hidden_stride;
  const float* read;           // null where d_hidden is not wanted
  void* d_hidden;
  float* d_read;
  float* d_offset;
};

// Count, mean and sum of squared deviations of each group's rows. Results are unevaluated sums of two floats, the high
// ones first; a group without rows has zeros.
struct MomentsArgs {
  int64_t rows, width, groups;
  int dtype;
  const void* hidden;
  int64_t hidden_stride;
  SlotOrder group_order;  // rows sorted by group; all null: every row is in group 0
  float* mean;            // (2, groups, width)
  float* m2;              // (2, groups, width)
};

// h' = h + step_size Σ_t dV/dh(h_t) over h_0 = h, h_1, …, h_{steps − 1}, V an MLP of one or two hidden layers with ReLU.
// On the CPU the kernel goes from hidden to out. On a GPU, where the caller's dense products are the vendor's, it goes
// from z and slope to total, one hidden layer alone; the fields of the other way are null.
struct ValueAscentArgs {
  int64_t rows, width, units, units2, steps;  // units2: 0 without a second hidden layer
  float step_size;
  int dtype;
  const void* hidden;
  int64_t hidden_stride;
  const float* weight;   // (units, width)
  const float* bias;     // (units,)
  const float* weight2;  // (units2, units)
  const float* bias2;    // (units2,)
  const float* head;     // (units2 or units,)
  const float* gram;     // (units, units): weight weightᵀ
  void* out;
  const float* z;        // (rows, units): weight h + bias
  const float* slope;    // (rows, units): gram (1[z > 0] ⊙ head)
  float* total;          // (rows, units): Σ_t 1[z_t > 0] ⊙ head
};

// Declares the ops in one backend's namespace. Each returns 0, or the runtime's error code.
// `workspace` holds the fp32 partials of a backward's column sums: op_workspace(args) bytes (a pure
// function of the arguments), 0 and null for forwards. `stream` is a cudaStream_t, unused on the CPU.
#define FASTEDIT_DECLARE_OPS                                                              \
  int edit(const EditArgs&, void* stream);                                                \
  int edit_add(const EditAddArgs&, void* stream);                                         \
  int edit_add_norm(const EditAddNormArgs&, void* stream);                                \
  int project(const ProjectArgs&, void* stream);                                          \
  int edit_backward(const EditBackwardArgs&, void* workspace, void* stream);              \
  int edit_add_norm_backward(const EditAddNormBackwardArgs&, void* workspace, void* stream); \
  int project_backward(const ProjectBackwardArgs&, void* workspace, void* stream);        \
  int value_ascent(const ValueAscentArgs&, void* stream);                                 \
  int moments(const MomentsArgs&, void* workspace, void* stream);                         \
  int64_t moments_workspace(const MomentsArgs&);                                          \
  int64_t edit_backward_workspace(const EditBackwardArgs&);                               \
  int64_t edit_add_norm_backward_workspace(const EditAddNormBackwardArgs&);               \
  int64_t project_backward_workspace(const ProjectBackwardArgs&);

// FORWARD(…, op, Args) and BACKWARD(…, op, Args) for every op, behind the arguments given: for tables of them.
// BACKWARD is any op that takes a workspace. The edits are what XLA calls know, too (csrc/xla.cpp).
#define FASTEDIT_EACH_OP(FORWARD, BACKWARD, ...)            \
  FASTEDIT_EACH_EDIT_OP(FORWARD, BACKWARD, __VA_ARGS__)     \
  FORWARD(__VA_ARGS__, value_ascent, ValueAscentArgs)       \
  BACKWARD(__VA_ARGS__, moments, MomentsArgs)
#define FASTEDIT_EACH_EDIT_OP(FORWARD, BACKWARD, ...)                      \
  FORWARD(__VA_ARGS__, edit, EditArgs)                                \
  FORWARD(__VA_ARGS__, edit_add, EditAddArgs)                         \
  FORWARD(__VA_ARGS__, edit_add_norm, EditAddNormArgs)                \
  FORWARD(__VA_ARGS__, project, ProjectArgs)                          \
  BACKWARD(__VA_ARGS__, edit_backward, EditBackwardArgs)              \
  BACKWARD(__VA_ARGS__, edit_add_norm_backward, EditAddNormBackwardArgs) \
  BACKWARD(__VA_ARGS__, project_backward, ProjectBackwardArgs)

namespace cpu { FASTEDIT_DECLARE_OPS }
namespace cuda { FASTEDIT_DECLARE_OPS }

}  // namespace fastedit
