// Rows too wide for one block's registers, shared by a cluster of blocks on neighbouring multiprocessors (sm_90 and above): each
// block has a run of columns, and sends its sums into the shared memory of the others. Nothing but sums crosses, and no
// barrier of the cluster but the first: one would wait for every store and empty L1 of the parameters.
//
// Compiled and launched only under FASTEDIT_CLUSTERS, which is off until a GPU has shown that it is right and a gain.
#pragma once
#include <cstdint>
#include "launch.h"
#include "reduce.h"

namespace fastedit::cuda {

#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
__device__ inline int cluster_blocks() { return static_cast<int>(__clusterSizeInBlocks()); }
__device__ inline int cluster_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
__device__ inline void cluster_barrier() { __cluster_barrier_arrive(), __cluster_barrier_wait(); }
__device__ inline unsigned shared_address(const void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); }

// An mbarrier: a phase of it ends when one thread has said how many bytes to expect, and they have come.
__device__ inline void init_arrivals(uint64_t* arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrivals)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void expect_arrivals(uint64_t* arrivals, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)), "r"(bytes) : "memory");
}
__device__ inline void wait_for_arrivals(uint64_t* arrivals, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(arrivals)), "r"(parity) : "memory");
}
// To the same place of another block, or of this one, whose `arrivals` count it.
__device__ inline void send(float* to, float value, uint64_t* arrivals, int rank) {
  asm volatile(
      "{\n.reg .b32 at, count;\n"
      "mapa.shared::cluster.u32 at, %0, %3;\n"
      "mapa.shared::cluster.u32 count, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [at], %1, [count];\n}" ::"r"(shared_address(to)),
      "r"(__float_as_uint(value)), "r"(shared_address(arrivals)), "r"(rank)
      : "memory");
}
#else  // never launched
__device__ inline int cluster_blocks() { return 1; }
__device__ inline int cluster_rank() { return 0; }
__device__ inline void cluster_barrier() {}
__device__ inline void init_arrivals(uint64_t*) {}
__device__ inline void expect_arrivals(uint64_t*, int) {}
__device__ inline void wait_for_arrivals(uint64_t*, int) {}
__device__ inline void send(float*, float, uint64_t*, int) {}
#endif
#endif

// Who has a row: a block alone, whose sums are the row's,
struct Alone {
  static constexpr int kBlocks = 1;
  __device__ explicit Alone(float*&, int) {}
  __device__ int blocks() const { return 1; }
  template <int N>
  __device__ void add(float (&)[N]) {}
  __device__ void add_shares(float*, int) {}
};

// or a cluster. Two buffers by turns: who has the others' sums of one turn knows that they have read those of the turn before.
// Each holds every block's sums, which are added in the order of the blocks, and so of the columns.
class Cluster {
 public:
  // Takes its room from the front of `shared`, for so many sums at a time.
  __device__ Cluster(float*& shared, int most_sums)
      : arrivals_(reinterpret_cast<uint64_t*>(shared)), buffer_(shared + 4), size_(most_sums * cluster_blocks()) {
    shared += exchange_floats(most_sums, cluster_blocks());
    if (threadIdx.x == 0) init_arrivals(arrivals_), init_arrivals(arrivals_ + 1);
    cluster_barrier();
  }
  __device__ int blocks() const { return cluster_blocks(); }

  // Sums that every thread of the block has, of all blocks.
  template <int N>
  __device__ void add(float (&value)[N]) {
    begin(N);
    if (threadIdx.x < cluster_blocks()) {
#pragma unroll
      for (int i = 0; i < N; ++i) put_sum(i, value[i], threadIdx.x);
    }
    wait();
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = sum(i);
    ++turn_;
  }

  // The warps' shares of so many sums, part[i warps + warp]: the row's sums instead, as the share of the first warp.
  __device__ void add_shares(float* part, int sums) {
    begin(sums);
    __syncthreads();
    for (int i = threadIdx.x; i < sums; i += blockDim.x) {
      float own = 0.f;
      for (int w = 0; w < warps(); ++w) own += part[i * warps() + w];
      for (int rank = 0; rank < cluster_blocks(); ++rank) put_sum(i, own, rank);
    }
    wait();
    for (int i = threadIdx.x; i < sums; i += blockDim.x) {
      for (int w = 0; w < warps(); ++w) part[i * warps() + w] = w == 0 ? sum(i) : 0.f;
    }
    ++turn_;
  }

 private:
  __device__ float* buffer() const { return buffer_ + (turn_ & 1) * size_; }
  __device__ uint64_t* arrivals() const { return arrivals_ + (turn_ & 1); }
  __device__ void begin(int sums) {
    if (threadIdx.x == 0) expect_arrivals(arrivals(), sums * cluster_blocks() * 4);
  }
  __device__ void put_sum(int i, float value, int rank) {
    send(buffer() + i * cluster_blocks() + cluster_rank(), value, arrivals(), rank);
  }
  __device__ void wait() const { wait_for_arrivals(arrivals(), turn_ >> 1 & 1); }
  __device__ float sum(int i) const {
    float total = 0.f;
    for (int rank = 0; rank < cluster_blocks(); ++rank) total += buffer()[i * cluster_blocks() + rank];
    return total;
  }

  uint64_t* arrivals_;
  float* buffer_;
  int size_, turn_ = 0;
};

}  // namespace fastedit::cuda
