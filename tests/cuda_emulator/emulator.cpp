// Fibers, barriers and shuffles behind cuda_runtime.h. A fiber switches by setjmp and longjmp, about ten
// nanoseconds; its stack is made once, with makecontext, and serves every later block.
#include "cuda_runtime.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

namespace emulator {

Index thread_index, block_index, block_size, grid_size;
int multiprocessors = 3, shared_limit = 227 * 1024, last_error = cudaSuccess;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kGuard = 64;  // floats behind the shared memory asked for
const float kPoison = float_of(0x7fc0dead);

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Copy {
  char* to;
  const void* from;
  int bytes;
};

struct Fiber {
  jmp_buf jump;
  ucontext_t context;
  bool started = false;
  State state = State::kDone;
  const char* file = nullptr;
  int line = 0;
  float sent[2][kFragment];  // by turns, so that one rendezvous a shuffle is enough
  int turn = 0;
  std::vector<Copy> copies;  // asked for and not waited for
};

struct Launch {
  int64_t kernel, blocks, threads, shared_bytes;  // kernel: its address in the library
};

struct Watched {
  const char* begin;
  int64_t bytes, loaded, stored;
};

std::vector<Fiber> fibers;
std::vector<float> shared;
jmp_buf scheduler;
const std::function<void()>* body;
int current = -1;
int order_seed = 0, shared_allowed = 48 * 1024;
std::vector<Watched> watched;
std::vector<std::pair<const char*, const char*>> allowed;  // memory of the call's arguments; empty: everything is
size_t last_allowed = 0;
std::vector<Launch> launches;
std::string message;

void leave(State state) {
  fibers[current].state = state;
  if (_setjmp(fibers[current].jump) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*body)();
    leave(State::kDone);
  }
}

void resume(int index) {
  Fiber& fiber = fibers[index];
  current = index;
  thread_index.x = index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  getcontext(&fiber.context);
  fiber.context.uc_stack = {stack, 0, kStack};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

// Ascending, descending, or shuffled by the seed.
std::vector<int> order_of(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  uint32_t random = 2654435761u * order_seed;
  for (int i = count - 1; order_seed > 1 && i > 0; --i) {
    random = random * 1664525u + 1013904223u;
    std::swap(order[i], order[(random >> 8) % (i + 1)]);
  }
  return order;
}

bool all_at(State state, int begin, int end) {
  for (int i = begin; i < end; ++i) {
    const Fiber &fiber = fibers[i], &first = fibers[begin];
    if (fiber.state != state || fiber.line != first.line || fiber.file != first.file) return false;
  }
  return true;
}

void release(int begin, int end) {
  for (int i = begin; i < end; ++i) fibers[i].state = State::kReady;
}

// Runs a warp until it needs the block; false if its lanes have parted at a shuffle.
bool run_warp(int begin, const std::vector<int>& lanes) {
  for (;;) {
    bool ran = false;
    for (int lane : lanes) {
      if (fibers[begin + lane].state != State::kReady) continue;
      resume(begin + lane);
      ran = true;
    }
    if (all_at(State::kAtShuffle, begin, begin + 32)) release(begin, begin + 32);
    else if (!ran) break;
  }
  for (int i = begin; i < begin + 32; ++i) {
    if (fibers[i].state == State::kAtShuffle) return false;
  }
  return true;
}

bool run_block(int threads) {
  std::vector<int> lanes = order_of(32), warps = order_of(threads / 32);
  release(0, threads);
  for (;;) {
    for (int warp : warps) {
      if (!run_warp(warp * 32, lanes)) return fail("a shuffle that not all lanes of the warp reach"), false;
    }
    bool done = true;
    for (int i = 0; i < threads; ++i) done = done && fibers[i].state == State::kDone;
    if (done) return true;
    if (!all_at(State::kAtBarrier, 0, threads)) return fail("a barrier that not all threads reach"), false;
    release(0, threads);
  }
}

}  // namespace

void fail(const char* what) {
  if (last_error == cudaSuccess) {
    char where[160];
    std::snprintf(where, sizeof where, "%s (block %u, thread %u)", what, block_index.x, thread_index.x);
    message = where;
  }
  last_error = cudaErrorLaunchFailure;
}

float* shared_memory() { return shared.data(); }

int device_number() {
  static std::vector<std::pair<int, int>> chips;
  std::pair<int, int> chip{multiprocessors, shared_limit};
  auto at = std::find(chips.begin(), chips.end(), chip);
  if (at == chips.end()) chips.push_back(chip), at = chips.end() - 1;
  return static_cast<int>(at - chips.begin());
}

void note_launch(const void* kernel, int64_t blocks, int threads, int shared_bytes) {
  Dl_info info{};
  dladdr(kernel, &info);
  int64_t address = static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase);
  launches.push_back({address, blocks, threads, shared_bytes});
}

void allow_shared(int bytes) { shared_allowed = bytes; }

void copy_later(void* to, const void* from, int bytes) {
  char* at = static_cast<char*>(to);
  const char *begin = reinterpret_cast<char*>(shared.data()), *end = begin + 4 * (shared.size() - kGuard);
  if (at < begin || at + bytes > end) return fail("a copy past the shared memory");
  std::memset(at, 0xff, bytes);
  fibers[current].copies.push_back({at, from, bytes});
}

void copy_now() {
  for (const Copy& copy : fibers[current].copies) std::memcpy(copy.to, copy.from, copy.bytes);
  fibers[current].copies.clear();
}

// Whether an access lies within one of the arguments. Neighbouring accesses mostly fall into the one before.
bool is_allowed(const char* at, int bytes) {
  for (size_t i = 0; i < allowed.size(); ++i) {
    const auto& [begin, end] = allowed[(last_allowed + i) % allowed.size()];
    if (at < begin || at + bytes > end) continue;
    last_allowed = (last_allowed + i) % allowed.size();
    return true;
  }
  return allowed.empty();
}

void count(const void* at, int bytes, bool store) {
  if (!is_allowed(static_cast<const char*>(at), bytes)) fail(store ? "a store outside the arguments" : "a load outside the arguments");
  for (Watched& w : watched) {
    int64_t offset = static_cast<const char*>(at) - w.begin;
    if (offset >= 0 && offset < w.bytes) (store ? w.stored : w.loaded) += bytes;
  }
}

void block_barrier(const char* file, int line) {
  fibers[current].file = file;
  fibers[current].line = line;
  leave(State::kAtBarrier);
}

// Waits for the warp with what this lane sends, and says which of its turns that is.
int send(const float* values, int count, const char* file, int line) {
  Fiber& self = fibers[current];
  int turn = self.turn ^= 1;
  std::copy_n(values, count, self.sent[turn]);
  self.file = file;
  self.line = line;
  leave(State::kAtShuffle);
  return turn;
}

float exchange(float value, int source_lane, const char* file, int line) {
  int turn = send(&value, 1, file, line);
  return fibers[current / 32 * 32 + source_lane].sent[turn][0];
}

// c + Σ terms as tensor cores are known to add, at their coarsest: every term is cut off two bits behind the last of a float
// of the largest one's exponent, and so is the sum behind its own last bit.
float cut_sum(const double* terms, int count) {
  double largest = 0, sum = 0;
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(terms[i])) return static_cast<float>(std::accumulate(terms, terms + count, 0.0));
    largest = std::max(largest, std::fabs(terms[i]));
  }
  if (largest == 0) return 0.f;
  double step = std::ldexp(1.0, std::ilogb(largest) - 24);
  for (int i = 0; i < count; ++i) sum += std::trunc(terms[i] / step) * step;
  float nearest = static_cast<float>(sum);
  return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.f) : nearest;
}

// sum += A B of tf32 by the PTX ISA's fragments of m16n8k8 and m16n8k4: lane 4 group + member has A's (group, member),
// (group + 8, member), (group, member + 4), (group + 8, member + 4), then B's (member, group), (member + 4, group), and of the
// sums (group, 2 member), (group, 2 member + 1) and the same of group + 8.
void product(float (&sum)[4], const float (&fragment)[kFragment], int columns, const char* file, int line) {
  for (float operand : fragment)
    if (bits_of(operand) & 0x1fff) fail("an operand of a product that is no tf32");
  int turn = send(fragment, kFragment, file, line), lane = current % 32;
  const Fiber* warp = &fibers[current - lane];
  for (int i = 0; i < 4; ++i) {
    int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    double terms[9] = {sum[i]};
    for (int k = 0; k < columns; ++k) {
      double a = warp[m % 8 * 4 + k % 4].sent[turn][m / 8 + k / 4 * 2], b = warp[n * 4 + k % 4].sent[turn][4 + k / 4];
      terms[1 + k] = a * b;
    }
    sum[i] = cut_sum(terms, 1 + columns);
  }
}

void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (last_error != cudaSuccess) return;
  int allowed = shared_allowed;
  shared_allowed = 48 * 1024;
  if (threads % 32 || threads < 32 || threads > 1024 || shared_bytes > min(allowed, shared_limit)) {
    fail("launch shape");
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (fibers.empty()) fibers = std::vector<Fiber>(1024);
  body = &kernel;
  grid_size.x = blocks;
  block_size.x = threads;
  for (int64_t i = 0; i < blocks; ++i) {
    block_index.x = order_seed % 2 ? blocks - 1 - i : i;
    shared.assign(shared_bytes / 4 + kGuard, kPoison);
    for (int t = 0; t < threads; ++t) fibers[t].turn = 0, fibers[t].copies.clear();
    if (!run_block(threads)) {
      for (Fiber& fiber : fibers) {  // those in the middle of the kernel are lost, with their stacks
        if (fiber.state != State::kDone) fiber = Fiber();
      }
      return;
    }
    for (int g = 0; g < kGuard; ++g) {
      if (bits_of(shared[shared_bytes / 4 + g]) != bits_of(kPoison))
        return fail("a write past the shared memory");
    }
    for (int t = 0; t < threads; ++t) {
      if (!fibers[t].copies.empty()) return fail("a copy that nobody waits for");
    }
    if (last_error != cudaSuccess) return;
  }
}

extern "C" {
void emulator_set(int sms, int seed, int shared) {
  multiprocessors = sms, order_seed = seed, shared_limit = shared;
}
void emulator_watch(const void* begin, int64_t bytes) {
  watched.push_back({static_cast<const char*>(begin), bytes, 0, 0});
}
void emulator_allow_all() { allowed.clear(), last_allowed = 0; }
void emulator_allow(const void* begin, int64_t bytes) {
  allowed.push_back({static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes});
}
void emulator_forget() { watched.clear(), launches.clear(), emulator_allow_all(); }
int64_t emulator_launches() { return launches.size(); }
int64_t emulator_launch(int index, int field) { return (&launches[index].kernel)[field]; }
int64_t emulator_loaded(int index) { return watched[index].loaded; }
int64_t emulator_stored(int index) { return watched[index].stored; }
const char* emulator_message() { return message.c_str(); }
}

}  // namespace emulator
