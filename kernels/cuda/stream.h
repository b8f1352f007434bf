// Rank 0, the edit that RED, (IA)³ and steering are: out = E(x), residual + E(x) or E(residual + x) with
// E(h) = h + k · ((scale − 1) ⊙ h + bias).
//
// Streams: x (and residual) in, out; nothing else grows with the rows but slot and coefficient.
// Grid: column tiles × row groups. A lane owns V columns and keeps their scale and bias in registers over
// all its rows (with slots: until the slot changes); four rows' loads are in flight before the first use.
// No sums, so nothing to make deterministic: a row's result depends on the row alone.
#pragma once
#include "form.h"
#include "run.h"

namespace fastedit::cuda {
namespace {

// The parameters of V columns for the slot last asked for.
template <int V>
struct Held {
  float scale[V], bias[V];
  int slot = -1;
  __device__ void hold(const Form& form, int wanted, int64_t width, int64_t column) {
    if (wanted == slot) return;
    slot = wanted;
    load_parameters(scale, form.scale, slot * width + column, 1.f);
    load_parameters(bias, form.bias, slot * width + column, 0.f);
  }
};

template <class X, class R, int V, bool kAdd, bool kPerRow>
__global__ void __launch_bounds__(kLaneColumns* kLines, kStreamBlocksPerSm[kPerRow])
    stream_rows(const EditAddArgs a, unsigned tiles) {
  constexpr int kFlight = kStreamRows / kLines;
  int line = threadIdx.x / kLaneColumns;
  int64_t groups = gridDim.x / tiles, group = blockIdx.x / tiles;
  int64_t column = (int64_t{blockIdx.x % tiles} * kLaneColumns + threadIdx.x % kLaneColumns) * V;
  if (column >= a.width) return;
  Held<V> held;
  wait_for_kernel_before();
  if (!kPerRow) held.hold(a.form, 0, a.width, column);

  for (int64_t first = group * kStreamRows + line; first < a.rows; first += groups * kStreamRows) {
    Pack<X, V> x[kFlight];
    Pack<R, V> residual[kFlight];
    RowEdit edit[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      int64_t row = first + i * kLines;
      if (row >= a.rows) continue;
      x[i] = load<kOnce, X, V>(a.x, row * a.x_stride + column, a.x_dtype);
      if (kAdd)
        residual[i] = load<kOnce, R, V>(a.residual, row * a.residual_stride + column, a.residual_dtype);
    }
#pragma unroll
    for (int i = 0; kPerRow && i < kFlight; ++i)
      edit[i] = row_edit(a.form, min(first + i * kLines, a.rows - 1));
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      int64_t row = first + i * kLines;
      if (row >= a.rows) continue;
      float k = kPerRow ? edit[i].k : 1.f;
      if constexpr (!kAdd) {  // an untouched row keeps its bits, NaN payloads too
        if (k == 0.f) {
          store<X, V>(a.out, row * a.width + column, x[i], a.x_dtype);
          continue;
        }
      }
      if (kPerRow && k != 0.f) held.hold(a.form, edit[i].slot, a.width, column);
      float h[V], r[V] = {};
      unpack<X, V>(x[i], h, a.x_dtype);
      if (kAdd) unpack<R, V>(residual[i], r, a.residual_dtype);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (kAdd && a.on_sum) h[v] += r[v];
        float e = k == 0.f ? h[v] : edited(h[v], k, held.scale[v], held.bias[v]);
        h[v] = kAdd && !a.on_sum ? r[v] + e : e;
      }
      store<R, V>(a.out, row * a.width + column, round_to<R, V>(h, a.residual_dtype), a.residual_dtype);
    }
  }
}

template <class X, class R, int V, bool kAdd>
int run_stream(const EditAddArgs& a, void* stream) {
  bool per_row = V == 1 || a.form.slot || a.form.coefficient;
  Shape shape = stream_shape(a.rows, a.width, V, per_row, multiprocessors());
  unsigned tiles = static_cast<unsigned>(column_tiles(a.width, V));
  if constexpr (V > 1) {
    if (!per_row) return launch_early(stream_rows<X, R, V, kAdd, false>, shape, stream, a, tiles);
  }
  return launch_early(stream_rows<X, R, V, kAdd, true>, shape, stream, a, tiles);
}

}  // namespace
}  // namespace fastedit::cuda
