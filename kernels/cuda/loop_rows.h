// Rows too wide for registers, odd widths and unaligned views: a row at a time (edit_add_norm.cu), and what these rows
// share with the tiles of row_kernels.h.
#pragma once
#include "gate.h"
#include "launch.h"
#include "norm.h"
#include "tile.h"

namespace fastedit::cuda {
namespace {

template <class R, int V>
__device__ inline void load_affine(float (&gain)[V], float (&shift)[V], const EditAddNormArgs& a,
                                   int64_t column) {
  int dtype = a.add.residual_dtype;
  load_gain<R, V>(gain, a.weight, a.kind, column, dtype);
#pragma unroll
  for (int v = 0; v < V; ++v) shift[v] = 0.f;
  if (a.norm_bias) unpack<R, V>(load<kCached, R, V>(a.norm_bias, column, dtype), shift, dtype);
}

// V columns of `normed` from the rounded residual' in r.
template <class R, int V>
__device__ inline Pack<R, V> normed(const float (&r)[V], const float (&gain)[V], const float (&shift)[V],
                                    int kind, int dtype, float mean, float rstd) {
  float unit[V];
#pragma unroll
  for (int v = 0; v < V; ++v) unit[v] = (r[v] - mean) * rstd;
  if (kind == RMS) unpack<R, V>(round_to<R, V>(unit, dtype), unit, dtype);
#pragma unroll
  for (int v = 0; v < V; ++v) unit[v] = fmaf(unit[v], gain[v], shift[v]);
  return round_to<R, V>(unit, dtype);
}

// True where rounding and back loses an element's bits.
template <int V>
__device__ inline bool any_nan(const float (&r)[V]) {
  bool found = false;
#pragma unroll
  for (int v = 0; v < V; ++v) found |= r[v] != r[v];
  return found;
}

// One row at a time, any width.
template <class X, class R, int V>
struct LoopRow {
  const EditAddArgs& a;
  int64_t row;
  RowEdit edit;
  const float* z;  // shared

  __device__ void before(int64_t column, float (&h)[V], float (&residual)[V]) const {
    unpack<X, V>(load<kCached, X, V>(a.x, row * a.x_stride + column, a.x_dtype), h, a.x_dtype);
    for (float& r : residual) r = 0.f;
    if (!a.residual) return;
    Pack<R, V> pack = load<kCached, R, V>(a.residual, row * a.residual_stride + column, a.residual_dtype);
    unpack<R, V>(pack, residual, a.residual_dtype);
    if (!a.on_sum) return;
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] += residual[v], residual[v] = 0.f;
  }

  // What h is multiplied by for sum j of a gated row: a read row, then the gate, then h itself.
  __device__ void load_summed(float (&m)[V], int j, int64_t column, const float (&h)[V]) const {
    const int64_t slot = edit.slot;
    if (j < a.form.rank) {
      load_parameters(m, a.form.read, (slot * a.form.rank + j) * a.width + column, 0.f);
    } else if (j == a.form.rank) {
      load_parameters(m, a.form.gate, slot * a.width + column, 0.f);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) m[v] = h[v];
    }
  }

  // z and, behind a gate, the row's k as z[rank]: the gate is a row behind the read rows, and h is one behind it.
  template <bool kGated>
  __device__ void project(float* z, float* part) const {
    int rank = static_cast<int>(a.form.rank), sums = rank + (kGated ? 2 : 0);
    for (int first = 0; first < sums; first += 8) {
      float sum[8] = {};
      for (int64_t column = int64_t{threadIdx.x} * V; column < a.width; column += blockDim.x * V) {
        float h[V], residual[V], m[V];
        before(column, h, residual);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (first + j >= sums) break;
          if constexpr (kGated) load_summed(m, first + j, column, h);
          else load_parameters(m, a.form.read, (int64_t{edit.slot} * rank + first + j) * a.width + column, 0.f);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[j] = fmaf(h[v], m[v], sum[j]);
        }
      }
      float total = warp_sum_of_eight(sum);
      if (lane() < 8 && first + lane() < sums) part[(first + lane()) * warps() + warp()] = total;
    }
    finish_dots<1>(rank + kGated, part, [&](int j, int, float sum) {
      if constexpr (kGated) {
        if (j == rank) {
          z[j] = gated(a.form, edit, sum, share_sum(part, j + 1));
          return;
        }
      }
      if (a.form.offset) sum += __ldg(a.form.offset + int64_t{edit.slot} * rank + j);
      z[j] = edit.inside ? sum : 0.f;
      if (a.z) a.z[row * rank + j] = z[j];
    });
  }

  // residual' of V columns, rounded.
  __device__ Pack<R, V> edited_at(int64_t column) const {
    float h[V], residual[V], scale[V], shift[V], m[V];
    before(column, h, residual);
    load_parameters(scale, a.form.scale, edit.slot * a.width + column, 1.f);
    load_parameters(shift, a.form.bias, edit.slot * a.width + column, 0.f);
    for (int j = 0; a.form.write && j < a.form.rank; ++j) {
      load_parameters(m, a.form.write, (edit.slot * a.form.rank + j) * a.width + column, 0.f);
#pragma unroll
      for (int v = 0; v < V; ++v) shift[v] = fmaf(z[j], m[v], shift[v]);
    }
    bool outer = a.residual && !a.on_sum;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float e = edited(h[v], edit.k, scale[v], shift[v]);
      h[v] = outer ? residual[v] + e : e;
    }
    return round_to<R, V>(h, a.residual_dtype);
  }
};

// Two blocks share a multiprocessor. Of four elements an access this must be said: sm_120 would otherwise choose 40 registers
// and spill.
template <class X, class R, int V, bool kGated>
__global__ void __launch_bounds__(kLoopThreads, V == 4 ? 2 : 0) loop_rows_kernel(const EditAddNormArgs a) {
  FASTEDIT_SHARED(shared);
  const EditAddArgs& add = a.add;
  float* z = shared + kBlockSumFloats;
  int turn = 0;
  const float inverse = 1.f / static_cast<float>(add.width);
  const int64_t begin = int64_t{threadIdx.x} * V, step = blockDim.x * V;
  for (int64_t row = blockIdx.x; row < add.rows; row += gridDim.x) {
    LoopRow<X, R, V> loop{add, row, row_edit(add.form, row), z};
    if (kGated || add.form.rank) loop.template project<kGated>(z, z + add.form.rank + kGated);
    if (kGated) loop.edit.k = z[add.form.rank];
    if (!add.out && !a.normed) continue;
    float r[V], mean[1] = {}, square[1] = {};
    for (int64_t column = begin; column < add.width; column += step) {
      Pack<R, V> pack = loop.edited_at(column);
      unpack<R, V>(pack, r, add.residual_dtype);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        mean[0] += r[v];
        square[0] = fmaf(r[v], r[v], square[0]);
      }
      if (!add.out) continue;
      if (!add.residual && loop.edit.k == 0.f && (!kGated || any_nan(r))) {
        pack = load<kCached, R, V>(add.x, row * add.x_stride + column, add.x_dtype);
      }
      store<R, V>(add.out, row * add.width + column, pack, add.residual_dtype);
    }
    if (!a.normed) continue;
    bool layer = a.kind == LAYER;
    if (layer) block_sum(mean, shared, turn), square[0] = 0.f;
    mean[0] = layer ? mean[0] * inverse : 0.f;
    for (int64_t column = begin; layer && column < add.width; column += step) {
      unpack<R, V>(loop.edited_at(column), r, add.residual_dtype);
#pragma unroll
      for (int v = 0; v < V; ++v) square[0] = fmaf(r[v] - mean[0], r[v] - mean[0], square[0]);
    }
    block_sum(square, shared, turn);
    float rstd = reciprocal_root(fmaf(square[0], inverse, a.eps));
    if (threadIdx.x == 0 && layer && a.mean) a.mean[row] = mean[0];
    if (threadIdx.x == 0 && a.rstd) a.rstd[row] = rstd;
    for (int64_t column = begin; column < add.width; column += step) {
      unpack<R, V>(loop.edited_at(column), r, add.residual_dtype);
      float gain[V], shift[V];
      load_affine<R, V>(gain, shift, a, column);
      store<R, V>(a.normed, row * add.width + column,
                  normed<R, V>(r, gain, shift, a.kind, add.residual_dtype, mean[0], rstd),
                  add.residual_dtype);
    }
  }
}

}  // namespace
}  // namespace fastedit::cuda
