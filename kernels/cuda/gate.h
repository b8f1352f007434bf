// The gate of a row, from two sums along it: s = h · gate, over ‖h‖ for the cosine, against a threshold (abi.h).
#pragma once
#include <cfloat>
#include "norm.h"
#include "tile.h"

namespace fastedit::cuda {

// The warps' shares of sum i, added as finish_dots adds them.
__device__ inline float share_sum(const float* part, int i) {
  float sum = 0.f;
#pragma unroll 4
  for (int w = 0; w < warps(); ++w) sum += part[i * warps() + w];
  return sum;
}

// k of a row. A comparison with NaN is false: such a score closes a hard gate. Where k is 0 without the gate the row
// is none of the edit's, whatever its score.
__device__ inline float gated(const Form& form, const RowEdit& row, float dot, float square) {
  if (row.k == 0.f) return 0.f;
  const float* rule = form.rule + int64_t{row.slot} * 3;
  const float threshold = __ldg(rule), sharpness = __ldg(rule + 1);
  float score = dot;
  if (__ldg(rule + 2) != 0.f && square > 0.f)  // squares that overflow: at right angles, as over an infinite length
    score *= square <= FLT_MAX ? reciprocal_root(square) : 0.f;
  float g = score > threshold ? 1.f : 0.f;
  if (sharpness > 0.f) g = __fdividef(1.f, 1.f + expf(sharpness * (threshold - score)));
  return row.k * g;
}

// Each warp's share of h · gate of row r to part[r warps + warp] and of h · h to part[(N + r) warps + warp].
template <int N, int C, int V>
__device__ inline void tile_gate_sums(const float (&h)[N][C][V], const RowEdit (&row)[N], const float* gate,
                                      int64_t width, float* part) {
  static_assert(2 * N <= 8, "one tree of shuffles");
  float sum[8] = {};
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (tile_column<V>(c) >= width) continue;
    float m[V];
#pragma unroll
    for (int r = 0; r < N; ++r) {
      if (new_slot(row, r)) load_parameters(m, gate, row[r].slot * width + tile_column<V>(c), 0.f);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[r] = fmaf(h[r][c][v], m[v], sum[r]);
        sum[N + r] = fmaf(h[r][c][v], h[r][c][v], sum[N + r]);
      }
    }
  }
  float total = warp_sum_of_eight(sum);
  if (lane() < 2 * N) part[lane() * warps() + warp()] = total;
}

}  // namespace fastedit::cuda
