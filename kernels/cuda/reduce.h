// Sums over a warp and over a block, in an order fixed by the lane and warp numbers alone.
#pragma once
#include <cuda_runtime.h>

namespace fastedit::cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return threadIdx.x % kWarp; }
__device__ inline int warp() { return threadIdx.x / kWarp; }
__device__ inline int warps() { return blockDim.x / kWarp; }

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

// Lane l gets the warp's sum of value[l % 8]: 9 exchanges for eight sums, where eight trees take 40.
__device__ inline float warp_sum_of_eight(float (&value)[8]) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    bool upper = lane() & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      float keep = upper ? value[i + half] : value[i];
      float send = upper ? value[i] : value[i + half];
      value[i] = keep + __shfl_xor_sync(kAllLanes, send, half);
    }
  }
  float sum = value[0];
  sum += __shfl_xor_sync(kAllLanes, sum, 8);
  sum += __shfl_xor_sync(kAllLanes, sum, 16);
  return sum;
}

// Room for block_sum of up to four values: two buffers, so that one barrier a call is enough.
constexpr int kBlockSumFloats = 2 * 4 * kMaxWarps;

// Every thread gets the block's sums of N values. `turn` alternates the buffers between calls.
template <int N>
__device__ inline void block_sum(float (&value)[N], float* shared, int& turn) {
  static_assert(N <= 4, "kBlockSumFloats");
  float* buffer = shared + (turn++ & 1) * 4 * kMaxWarps;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float sum = warp_sum(value[i]);
    if (lane() == 0) buffer[i * kMaxWarps + warp()] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = warp_sum(lane() < warps() ? buffer[i * kMaxWarps + lane()] : 0.f);
}

}  // namespace fastedit::cuda
