// The ops under C names for ctypes, and the structs' sizes: for the emulator, and for a GPU (bench/gpu/bits.py).
#include "abi.h"

namespace fe = fastedit;

#define EXPORT_FORWARD(op, Args) \
  extern "C" int op(const fe::Args* args) { return fe::cuda::op(*args, nullptr); }
#define EXPORT_BACKWARD(op, Args)                            \
  extern "C" int op(const fe::Args* args, void* workspace) { \
    return fe::cuda::op(*args, workspace, nullptr);          \
  }                                                          \
  extern "C" int64_t op##_workspace(const fe::Args* args) { return fe::cuda::op##_workspace(*args); }

EXPORT_FORWARD(edit, EditArgs)
EXPORT_FORWARD(edit_add, EditAddArgs)
EXPORT_FORWARD(edit_add_norm, EditAddNormArgs)
EXPORT_FORWARD(project, ProjectArgs)
EXPORT_FORWARD(value_ascent, ValueAscentArgs)
EXPORT_BACKWARD(moments, MomentsArgs)
EXPORT_BACKWARD(edit_backward, EditBackwardArgs)
EXPORT_BACKWARD(edit_add_norm_backward, EditAddNormBackwardArgs)
EXPORT_BACKWARD(project_backward, ProjectBackwardArgs)

extern "C" int64_t struct_bytes(int index) {
  const int64_t bytes[] = {sizeof(fe::EditArgs),           sizeof(fe::EditAddArgs),
                           sizeof(fe::EditAddNormArgs),    sizeof(fe::ProjectArgs),
                           sizeof(fe::EditBackwardArgs),   sizeof(fe::EditAddNormBackwardArgs),
                           sizeof(fe::ProjectBackwardArgs),  sizeof(fe::MomentsArgs),
                           sizeof(fe::ValueAscentArgs)};
  return bytes[index];
}
