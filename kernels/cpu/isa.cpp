// One table of kernels for each instruction set, chosen once at load by what the processor has.
//
// FASTEDIT_CPU_ISA=baseline|avx2|avx512 asks for a lower one; a set the processor lacks is never chosen.
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "abi.h"

namespace fastedit {

namespace baseline { FASTEDIT_DECLARE_OPS }
#ifdef FASTEDIT_X86
namespace avx2 { FASTEDIT_DECLARE_OPS }
namespace avx512 { FASTEDIT_DECLARE_OPS }
#endif

namespace {

struct Kernels {
  const char* name;
  int (*edit)(const EditArgs&, void*);
  int (*edit_add)(const EditAddArgs&, void*);
  int (*edit_add_norm)(const EditAddNormArgs&, void*);
  int (*project)(const ProjectArgs&, void*);
  int (*edit_backward)(const EditBackwardArgs&, void*, void*);
  int (*edit_add_norm_backward)(const EditAddNormBackwardArgs&, void*, void*);
  int (*project_backward)(const ProjectBackwardArgs&, void*, void*);
  int (*value_ascent)(const ValueAscentArgs&, void*);
  int (*moments)(const MomentsArgs&, void*, void*);
  int64_t (*edit_backward_workspace)(const EditBackwardArgs&);
  int64_t (*edit_add_norm_backward_workspace)(const EditAddNormBackwardArgs&);
  int64_t (*project_backward_workspace)(const ProjectBackwardArgs&);
  int64_t (*moments_workspace)(const MomentsArgs&);
};

#define FASTEDIT_TABLE(isa)                                                                                  \
  {#isa, isa::edit, isa::edit_add, isa::edit_add_norm, isa::project, isa::edit_backward,                     \
   isa::edit_add_norm_backward, isa::project_backward, isa::value_ascent, isa::moments,                       \
   isa::edit_backward_workspace, isa::edit_add_norm_backward_workspace, isa::project_backward_workspace,     \
   isa::moments_workspace}

const Kernels kTables[] = {
#ifdef FASTEDIT_X86
    FASTEDIT_TABLE(avx512),
    FASTEDIT_TABLE(avx2),
#endif
    FASTEDIT_TABLE(baseline),
};

bool available(const char* name) {
#ifdef FASTEDIT_X86
  __builtin_cpu_init();
  if (!std::strcmp(name, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(name, "baseline");
}

const Kernels* find(const char* name) {
  for (const Kernels& table : kTables) {
    if (!std::strcmp(table.name, name) && available(name)) return &table;
  }
  return nullptr;
}

const Kernels* best() {
  const char* asked = std::getenv("FASTEDIT_CPU_ISA");
  if (asked && find(asked)) return find(asked);
  for (const Kernels& table : kTables) {
    if (available(table.name)) return &table;
  }
  return &kTables[sizeof(kTables) / sizeof(kTables[0]) - 1];
}

const Kernels* current = best();

}  // namespace

namespace cpu {

const char* isa_name() { return current->name; }

bool set_isa(const char* name) {
  const Kernels* found = find(name);
  if (found) current = found;
  return found != nullptr;
}

int edit(const EditArgs& a, void* s) { return current->edit(a, s); }
int edit_add(const EditAddArgs& a, void* s) { return current->edit_add(a, s); }
int edit_add_norm(const EditAddNormArgs& a, void* s) { return current->edit_add_norm(a, s); }
int project(const ProjectArgs& a, void* s) { return current->project(a, s); }
int edit_backward(const EditBackwardArgs& a, void* w, void* s) { return current->edit_backward(a, w, s); }
int edit_add_norm_backward(const EditAddNormBackwardArgs& a, void* w, void* s) {
  return current->edit_add_norm_backward(a, w, s);
}
int project_backward(const ProjectBackwardArgs& a, void* w, void* s) { return current->project_backward(a, w, s); }
int value_ascent(const ValueAscentArgs& a, void* s) { return current->value_ascent(a, s); }
int moments(const MomentsArgs& a, void* w, void* s) { return current->moments(a, w, s); }
int64_t edit_backward_workspace(const EditBackwardArgs& a) { return current->edit_backward_workspace(a); }
int64_t edit_add_norm_backward_workspace(const EditAddNormBackwardArgs& a) {
  return current->edit_add_norm_backward_workspace(a);
}
int64_t project_backward_workspace(const ProjectBackwardArgs& a) { return current->project_backward_workspace(a); }
int64_t moments_workspace(const MomentsArgs& a) { return current->moments_workspace(a); }

}  // namespace cpu
}  // namespace fastedit
