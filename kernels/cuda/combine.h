// A block's eight warps have each summed every eighth row: their sums of a tile's columns, added pairwise.
#pragma once
#include "launch.h"
#include "reduce.h"

namespace fastedit::cuda {

__device__ inline float sum_of_eight(const float* leaf) {
  return ((leaf[0] + leaf[1]) + (leaf[2] + leaf[3])) + ((leaf[4] + leaf[5]) + (leaf[6] + leaf[7]));
}

// Stores the columns below `width`.
template <int V>
__device__ inline void combine_warps(const float (&sum)[V], float* shared, float* out, int64_t tile,
                                     int64_t width) {
  constexpr int kColumns = kLaneColumns * V;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; ++v) shared[warp() * kColumns + lane() * V + v] = sum[v];
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns && tile * kColumns + i < width; i += blockDim.x) {
    float w[kLines];
#pragma unroll
    for (int line = 0; line < kLines; ++line) w[line] = shared[line * kColumns + i];
    out[tile * kColumns + i] = sum_of_eight(w);
  }
}

}  // namespace fastedit::cuda
