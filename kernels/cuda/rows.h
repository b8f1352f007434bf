// Everything that needs a sum along the row: z, gates and the norms. Defined in edit_add_norm.cu.
#pragma once
#include "abi.h"

namespace fastedit::cuda {

// edit_add_norm with parts left out: residual null is edit, normed null is no norm, out and normed null is
// project.
int edit_rows(const EditAddNormArgs& args, void* stream);

// Its rows behind a gate (edit_gated.cu).
int edit_gated_rows(const EditAddNormArgs& args, void* stream);

// Ranks that are a multiple of eight on tensor cores (rows_tensor.cu), where FASTEDIT_TENSOR has them and they serve.
bool tensor_rows_serve(const EditAddNormArgs& args);
int run_tensor_rows(const EditAddNormArgs& args, void* stream);

// True where rank 0 needs no sum along the row, so that the stream kernel serves.
inline bool streams(const Form& form) { return form.rank == 0 && !form.gate; }

}  // namespace fastedit::cuda
