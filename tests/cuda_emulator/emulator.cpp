// Fibers, barriers and shuffles behind cuda_runtime.h. A fiber switches by setjmp and longjmp, about ten
// nanoseconds; its stack is made once, with makecontext, and serves every later block.
#include "cuda_runtime.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <map>
#include <numeric>
#include <string>
#include <vector>

// Under AddressSanitizer, which must know whose stack it is and what of the shared memory was asked for.
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif
uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

int multiprocessors = 3, shared_limit = 227 * 1024, last_error = cudaSuccess, cluster_size = 1;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kGuard = 64;  // floats behind the shared memory asked for
const float kPoison = float_of(0x7fc0dead);

enum class State { kReady, kAtBarrier, kAtCluster, kAtShuffle, kWaiting, kDone };

struct Copy {
  char* to;
  const void* from;
  int bytes;
};

// What a block of a cluster waits for.
struct Arrivals {
  int parity = 0;  // of the phase that has not ended
  bool expected = false;
  int64_t bytes = 0;  // that are expected and have not come; below 0 before they are expected
  std::vector<std::pair<float*, float>> sent;
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
  const Arrivals* waits_for = nullptr;
  int parity = 0;
  std::vector<Copy> copies;  // asked for and not waited for
  void *stack = nullptr, *frames = nullptr;
};

struct Launch {
  int64_t kernel, blocks, threads, shared_bytes;  // kernel: its address in the library
};

struct Watched {
  const char* begin;
  int64_t bytes, loaded, stored;
};

std::vector<Fiber> fibers;
std::vector<float> shared;  // of the cluster's blocks, each with its guard
int shared_floats = 0;      // of a block without its guard
jmp_buf scheduler;
const std::function<void()>* body;
int current = -1;
int order_seed = 0, shared_allowed = 48 * 1024, next_cluster = 1;
int64_t first_block = 0, resumed = 0;  // of the cluster that runs; how often a fiber went on
std::map<const void*, Arrivals> arrivals;
std::vector<Watched> watched;
std::vector<std::pair<const char*, const char*>> allowed;  // memory of the call's arguments; empty: everything is
size_t last_allowed = 0;
std::vector<Launch> launches;
std::string message;

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
size_t scheduler_bytes;
void* scheduler_frames;
#endif

void leave(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  ASAN(__sanitizer_start_switch_fiber(&fiber.frames, scheduler_stack, scheduler_bytes);)
  if (_setjmp(fiber.jump) == 0) _longjmp(scheduler, 1);
  ASAN(__sanitizer_finish_switch_fiber(fibers[current].frames, &scheduler_stack, &scheduler_bytes);)
}

void fiber_main() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);)
  for (;;) {
    (*body)();
    leave(State::kDone);
  }
}

void resume(int index) {
  Fiber& fiber = fibers[index];
  ++resumed;
  current = index;
  threadIdx.x = index % blockDim.x;
  blockIdx.x = first_block + index / blockDim.x;
  if (!fiber.started) fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (_setjmp(scheduler)) {
    ASAN(__sanitizer_finish_switch_fiber(scheduler_frames, nullptr, nullptr);)
    return;
  }
  ASAN(__sanitizer_start_switch_fiber(&scheduler_frames, fiber.stack, kStack);)
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack, 0, kStack};
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

bool all_done(int begin, int end) {
  return std::all_of(&fibers[begin], &fibers[begin] + (end - begin), [](const Fiber& f) { return f.state == State::kDone; });
}

int shared_stride() { return (shared_floats + 3) / 4 * 4 + kGuard; }
float* shared_of(int rank) { return shared.data() + rank * shared_stride(); }

void release(int begin, int end) {
  for (int i = begin; i < end; ++i) fibers[i].state = State::kReady;
}

bool can_go_on(const Fiber& fiber) {
  return fiber.state == State::kReady || (fiber.state == State::kWaiting && fiber.waits_for->parity != fiber.parity);
}

// Runs a warp until it needs the block; false if its lanes have parted at a shuffle.
bool run_warp(int begin, const std::vector<int>& lanes) {
  for (;;) {
    bool ran = false;
    for (int lane : lanes) {
      if (!can_go_on(fibers[begin + lane])) continue;
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

// Runs a block until it ends or needs the others of its cluster.
bool run_block(int begin, int threads) {
  std::vector<int> lanes = order_of(32), warps = order_of(threads / 32);
  for (;;) {
    for (int warp : warps) {
      if (!run_warp(begin + warp * 32, lanes)) return fail("a shuffle that not all lanes of the warp reach"), false;
    }
    if (all_done(begin, begin + threads) || all_at(State::kAtCluster, begin, begin + threads)) return true;
    if (all_at(State::kAtBarrier, begin, begin + threads)) {
      release(begin, begin + threads);
      continue;
    }
    bool waiting = false, goes_on = false;
    for (int i = begin; i < begin + threads; ++i) {
      waiting = waiting || fibers[i].state == State::kWaiting;
      goes_on = goes_on || can_go_on(fibers[i]);
    }
    if (!waiting) return fail("a barrier that not all threads reach"), false;
    if (!goes_on) return true;
  }
}

bool run_cluster(int threads) {
  std::vector<int> ranks = order_of(cluster_size);
  int all = threads * cluster_size;
  release(0, all);
  for (;;) {
    int64_t before = resumed;
    for (int rank : ranks) {
      if (!run_block(rank * threads, threads)) return false;
    }
    if (all_done(0, all)) return true;
    if (all_at(State::kAtCluster, 0, all)) release(0, all);
    else if (resumed == before) return fail("blocks of a cluster that wait for each other"), false;
  }
}

}  // namespace

void fail(const char* what) {
  if (last_error == cudaSuccess) {
    char where[160];
    std::snprintf(where, sizeof where, "%s (block %u, thread %u)", what, blockIdx.x, threadIdx.x);
    message = where;
  }
  last_error = cudaErrorLaunchFailure;
}

float* shared_memory() { return shared_of(current / blockDim.x); }

void init_arrivals(const void* at) { arrivals[at] = {}; }

static Arrivals* find_arrivals(const void* at) {
  auto found = arrivals.find(at);
  if (found == arrivals.end()) return fail("arrivals that nobody has counted from the start"), nullptr;
  return &found->second;
}

static void end_phase(Arrivals* count) {
  if (count->expected && count->bytes < 0) fail("more arrivals than expected");
  if (!count->expected || count->bytes != 0) return;
  for (const auto& [to, value] : count->sent) *to = value;
  *count = {count->parity ^ 1, false, 0, {}};
}

void expect_arrivals(const void* at, int bytes) {
  Arrivals* count = find_arrivals(at);
  if (!count) return;
  if (count->expected) fail("arrivals expected twice");
  count->expected = true;
  count->bytes += bytes;
  end_phase(count);
}

void wait_for_arrivals(const void* at, int parity) {
  Fiber& self = fibers[current];
  self.waits_for = find_arrivals(at);
  self.parity = parity;
  if (self.waits_for && self.waits_for->parity == parity) leave(State::kWaiting);
}

// The shared memory of a block is gone when it has ended.
void send(float* to, float value, const void* at, int rank) {
  int64_t place = to - shared_memory(), begin = int64_t{rank} * blockDim.x;
  if (place < 0 || place >= shared_floats || rank < 0 || rank >= cluster_size) return fail("no place of the cluster's shared memory");
  if (all_done(begin, begin + blockDim.x)) return fail("shared memory of a block that has ended");
  float* there = shared_of(rank) + place;
  Arrivals* count = find_arrivals(shared_of(rank) + (static_cast<const float*>(at) - shared_memory()));
  if (!count) return;
  *there = kPoison;
  count->sent.push_back({there, value});
  count->bytes -= 4;
  end_phase(count);
}

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
void cluster_next(int blocks) { next_cluster = blocks; }

void copy_later(void* to, const void* from, int bytes) {
  char* at = static_cast<char*>(to);
  const char *begin = reinterpret_cast<char*>(shared_memory()), *end = begin + 4 * shared_floats;
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

void wait_for_cluster(const char* file, int line) {
  fibers[current].file = file;
  fibers[current].line = line;
  leave(State::kAtCluster);
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
  cluster_size = next_cluster;
  next_cluster = 1;
  bool clusters = cluster_size == 1 || (cluster_size <= kMaxCluster && blocks % cluster_size == 0 && architecture() >= 90);
  if (!clusters || threads % 32 || threads < 32 || threads > 1024 || shared_bytes > min(allowed, shared_limit)) {
    fail("launch shape");
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (fibers.empty()) fibers = std::vector<Fiber>(1024 * kMaxCluster);
  body = &kernel;
  gridDim.x = blocks;
  blockDim.x = threads;
  shared_floats = shared_bytes / 4;
  for (int64_t i = 0; i < blocks; i += cluster_size) {
    first_block = order_seed % 2 ? blocks - cluster_size - i : i;
    shared.assign(cluster_size * shared_stride(), kPoison);
    arrivals.clear();
    for (int t = 0; t < threads * cluster_size; ++t) fibers[t].turn = 0, fibers[t].copies.clear();
    ASAN(for (int r = 0; r < cluster_size; ++r) ASAN_POISON_MEMORY_REGION(shared_of(r) + shared_floats, 4 * kGuard);)
    const bool whole = run_cluster(threads);
    ASAN(for (int r = 0; r < cluster_size; ++r) ASAN_UNPOISON_MEMORY_REGION(shared_of(r) + shared_floats, 4 * kGuard);)
    if (!whole) {
      for (Fiber& fiber : fibers) {  // those in the middle of the kernel are lost, with their stacks
        if (fiber.state != State::kDone) fiber = Fiber();
      }
      return;
    }
    for (int g = 0; g < kGuard * cluster_size; ++g) {
      if (bits_of(shared_of(g / kGuard)[shared_floats + g % kGuard]) != bits_of(kPoison))
        return fail("a write past the shared memory");
    }
    for (int t = 0; t < threads * cluster_size; ++t) {
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
