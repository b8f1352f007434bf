// The instruction sets the CPU kernels are compiled for, and the one in use.
#pragma once

namespace fastedit::cpu {

const char* isa_name();           // "baseline", "avx2" or "avx512"
bool set_isa(const char* name);   // false if not compiled in or not on this processor

}  // namespace fastedit::cpu
