// What the norms' forward and backward share.
#pragma once
#include "vec.h"

namespace fastedit::cuda {

// 1 / sqrt(x): the hardware's approximation and one Newton step, as near as a division and a square root
// but without their calls.
__device__ inline float reciprocal_root(float x) {
  float y = rsqrtf(x);
  return fmaf(0.5f * y, fmaf(-x * y, y, 1.f), y);
}

// What the norm multiplies V columns by.
template <class R, int V>
__device__ inline void load_gain(float (&gain)[V], const void* weight, int kind, int64_t column, int dtype) {
#pragma unroll
  for (int v = 0; v < V; ++v) gain[v] = 1.f;
  if (!weight) return;
  unpack<R, V>(load<kCached, R, V>(weight, column, dtype), gain, dtype);
#pragma unroll
  for (int v = 0; v < V; ++v) gain[v] += kind == GEMMA ? 1.f : 0.f;
}

// A row's statistics; dot = mean(g ⊙ unit) and sum = mean(g), 0 but for LAYER, are the backward's.
struct NormRow {
  float mean, rstd, dot, sum;
  __device__ float unit(float r) const { return (r - mean) * rstd; }
  __device__ float gradient(float g, float r) const { return rstd * (g - fmaf(unit(r), dot, sum)); }
};

}  // namespace fastedit::cuda
