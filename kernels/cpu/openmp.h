// The OpenMP library of this process, found at load and not linked (openmp.cpp).
#pragma once

namespace fastedit {
namespace cpu {

// Looks for libgomp: the one at `torch_path` (or null) where it is loaded, one that is loaded, that path, the system's.
// Without one the kernels run on one thread.
void find_openmp(const char* torch_path);
const char* openmp_path();          // of the library in use; "" for one thread, null where the compiler's own is linked
void set_openmp_threads(int count);  // for parallel regions of the calling thread

}  // namespace cpu
}  // namespace fastedit
