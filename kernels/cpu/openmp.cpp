// GCC's OpenMP calls, passed on to the libgomp that torch uses, so that both have one pool of threads. A wheel that linked
// libgomp would bring a copy of its own, and a machine without one could not load the kernels at all.
#include "cpu/openmp.h"

#ifdef FASTEDIT_FIND_OPENMP
#include <dlfcn.h>
#include <link.h>

#ifndef FASTEDIT_SYSTEM_OPENMP
#define FASTEDIT_SYSTEM_OPENMP "libgomp.so.1"
#endif

extern "C" {
typedef void Body(void*);
void GOMP_parallel(Body*, void*, unsigned, unsigned);
int omp_get_max_threads();
int omp_get_num_threads();
int omp_get_thread_num();
int omp_in_parallel();
}

namespace {

void alone(Body* body, void* data, unsigned, unsigned) { body(data); }
int one() { return 1; }
int zero() { return 0; }
void ignore(int) {}

struct Calls {
  void (*parallel)(Body*, void*, unsigned, unsigned) = alone;
  int (*max_threads)() = one;
  int (*num_threads)() = one;
  int (*thread_num)() = zero;
  int (*in_parallel)() = zero;
  void (*set_threads)(int) = ignore;
};
Calls calls;
char path[4096] = "";

template <class F>
bool look_up(void* library, const char* name, F& function) {
  void* found = dlsym(library, name);
  if (found) function = reinterpret_cast<F>(found);
  return found != nullptr;
}

// Whether the library was there and had all of it. It stays loaded.
bool use(const char* name, int flags) {
  void* library = name ? dlopen(name, RTLD_NOW | flags) : nullptr;
  if (!library) return false;
  Calls found;
  const bool whole = look_up(library, "GOMP_parallel", found.parallel) && look_up(library, "omp_get_max_threads", found.max_threads) &&
                     look_up(library, "omp_get_num_threads", found.num_threads) && look_up(library, "omp_get_thread_num", found.thread_num) &&
                     look_up(library, "omp_in_parallel", found.in_parallel) && look_up(library, "omp_set_num_threads", found.set_threads);
  if (!whole) return false;
  calls = found;
  link_map* map = nullptr;
  if (dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 && map) {
    int i = 0;
    for (; map->l_name[i] && i < 4095; ++i) path[i] = map->l_name[i];
    path[i] = 0;
  }
  return true;
}

}  // namespace

// What GCC's code calls; hidden, so that they are this module's alone.
extern "C" {
void GOMP_parallel(Body* body, void* data, unsigned threads, unsigned flags) { calls.parallel(body, data, threads, flags); }
int omp_get_max_threads() { return calls.max_threads(); }
int omp_get_num_threads() { return calls.num_threads(); }
int omp_get_thread_num() { return calls.thread_num(); }
int omp_in_parallel() { return calls.in_parallel(); }
}

namespace fastedit {
namespace cpu {

void find_openmp(const char* torch_path) {
  const char* const system = FASTEDIT_SYSTEM_OPENMP;
  (void)(use(torch_path, RTLD_NOLOAD) || use(system, RTLD_NOLOAD) || use(torch_path, 0) || use(system, 0));
}
const char* openmp_path() { return path; }
void set_openmp_threads(int count) { calls.set_threads(count); }

}  // namespace cpu
}  // namespace fastedit
#else
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastedit {
namespace cpu {

void find_openmp(const char*) {}
#ifdef _OPENMP
const char* openmp_path() { return nullptr; }
void set_openmp_threads(int count) { omp_set_num_threads(count); }
#else
const char* openmp_path() { return ""; }
void set_openmp_threads(int) {}
#endif

}  // namespace cpu
}  // namespace fastedit
#endif
