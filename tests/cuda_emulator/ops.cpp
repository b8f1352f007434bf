// Kernels that break the rules on purpose, and other questions of tests.
#include "cuda/backward.h"
#include "cuda/launch.h"
#include "cuda/run.h"
#include "cuda/vec.h"

namespace fe = fastedit;

// next_launch's answer for one vector sum of `width` columns that a launch left over.
extern "C" int next_launch(int64_t width) {
  fe::cuda::Backward backward{};
  backward.vector = 8;
  backward.a.width = width;
  backward.left.scale = 0;
  return fe::cuda::next_launch(backward);
}

namespace {

void some_leave(float* out) {
  if (threadIdx.x < 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
void two_barriers(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
  out[threadIdx.x] = 1;
}
void half_a_warp(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
}
void past_the_end(float*) {
  FASTEDIT_SHARED(shared);
  shared[16 + threadIdx.x / 32] = 0;
}
void misaligned(float* out) { out[0] = __ldg(reinterpret_cast<float4*>(out + 1)).x; }
void a_block_leaves(float* out) {
  if (blockIdx.x == 1) return;
  cluster_barrier();
  out[threadIdx.x] = 1;
}
// A float to the other block of two, which expects so many bytes.
void sends(float* out, int rank, int bytes, bool early = false) {
  FASTEDIT_SHARED(shared);
  uint64_t* arrivals = reinterpret_cast<uint64_t*>(shared);
  if (threadIdx.x == 0) init_arrivals(arrivals), expect_arrivals(arrivals, bytes);
  cluster_barrier();
  if (threadIdx.x == 0) send(shared + 4, 3, arrivals, rank < 0 ? 1 - cluster_rank() : rank);
  const float at_once = shared[4];
  wait_for_arrivals(arrivals, 0);
  out[64 * cluster_rank() + threadIdx.x] = early ? at_once : shared[4];
}
void sends_well(float* out) { sends(out, -1, 4); }
void reads_before_the_wait(float* out) { sends(out, -1, 4, true); }
void sends_too_little(float* out) { sends(out, -1, 8); }
void sends_too_much(float* out) { sends(out, 1 - cluster_rank(), cluster_rank() ? 4 : 2); }
void sends_beyond_the_cluster(float* out) { sends(out, 2, 4); }
void sends_to_nobody(float* out) {
  FASTEDIT_SHARED(shared);
  if (threadIdx.x == 0) send(shared + 4, 3, reinterpret_cast<uint64_t*>(shared), 1 - cluster_rank());
}
void race(float* out) {
  FASTEDIT_SHARED(shared);
  if (threadIdx.x == 63) shared[0] = 2;
  out[threadIdx.x] = shared[0];
}

}  // namespace

// A launch that asks for more shared memory than there is, and then a good one, whose error is returned.
extern "C" int refused_then_good(float* out) {
  void (*kernel)(float*) = [](float* out) { out[threadIdx.x] = 1; };
  int refused = fe::cuda::launch(kernel, fe::cuda::Shape{1, 32, 300 * 1024}, nullptr, out);
  return refused ? fe::cuda::launch(kernel, fe::cuda::Shape{1, 32, 0}, nullptr, out) : -1;
}

extern "C" int break_rule(int index, float* out) {
  void (*rules[])(float*) = {some_leave, two_barriers, half_a_warp, past_the_end, misaligned, race};
  emulator::launch(rules[index], 1, 64, 64, out);
  return cudaGetLastError();
}

// Of so many blocks in clusters of two.
extern "C" int break_cluster_rule(int index, int blocks, float* out) {
  void (*rules[])(float*) = {sends_well,     reads_before_the_wait,    a_block_leaves, sends_too_little,
                             sends_too_much, sends_beyond_the_cluster, sends_to_nobody};
  emulator::cluster_next(2);
  emulator::launch(rules[index], blocks, 64, 64, out);
  return cudaGetLastError();
}

namespace {

// c += a b for matrices in memory, 16 × columns and columns × 8, by the PTX ISA's formulas for m16n8k8 and m16n8k4 of tf32.
void product_kernel(const float* a, const float* b, float* c, int columns) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  auto of_a = [&](int i) {
    const int row = i == 0 || i == 2 ? group : group + 8, column = i < 2 ? in_group : in_group + 4;
    return a[row * columns + column];
  };
  auto of_b = [&](int i) { return b[(i == 0 ? in_group : in_group + 4) * 8 + group]; };
  auto of_c = [&](int i) -> float& { return c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)]; };
  float sum[4] = {of_c(0), of_c(1), of_c(2), of_c(3)};
  if (columns == 8) multiply(sum, of_a(0), of_a(1), of_a(2), of_a(3), of_b(0), of_b(1));
  else multiply(sum, of_a(0), of_a(1), of_b(0));
  for (int i = 0; i < 4; ++i) of_c(i) = sum[i];
}

}  // namespace

extern "C" int product(const float* a, const float* b, float* c, int columns) {
  emulator::launch(product_kernel, 1, 32, 0, a, b, c, columns);
  return cudaGetLastError();
}
