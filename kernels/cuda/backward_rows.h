// The part of a backward that needs sums along the row (kNorm: the norm's; rank > 0: q; d_coefficient):
//   total = grad_residual + norm's gradient at grad_normed
//   q = k (total @ writeᵀ) + grad_z
//   d_coefficient = Σ total ⊙ ((scale − 1) ⊙ h + bias) + z · (total @ writeᵀ)
//   d_h = total + k (scale − 1) ⊙ total + q @ read
//
// Streams: grad_residual, grad_normed, residual_out in (h only for d_coefficient); d_x, d_residual out.
// Grid and registers as in edit_add_norm.cu: tiles of rows in registers, what the columns need later (q, the
// norm's two means) to the workspace. Rows too wide, of odd width or unaligned go through loop_backward.
// Every sum belongs to one row and has a shape that the width fixes.
#pragma once
#include "backward.h"
#include "norm.h"
#include "run.h"
#include "tile.h"

namespace fastedit::cuda {
namespace {

// residual of the h that the edit saw: hidden's dtype in edit_backward, residual's own with a norm.
template <class G, class H, bool kNorm>
struct SumTypeOf {
  using type = H;
};
template <class G, class H>
struct SumTypeOf<G, H, true> {
  using type = G;
};
template <class G, class H, bool kNorm>
using SumType = typename SumTypeOf<G, H, kNorm>::type;

__device__ inline NormRow norm_row(const EditAddNormBackwardArgs& a, int64_t row) {
  return {a.kind == LAYER ? __ldg(a.mean + row) : 0.f, __ldg(a.rstd + row), 0.f, 0.f};
}

// V columns of a row's streams, as they came: loaded first, used later, so that many loads are in flight.
template <class G, class H, int V, bool kNorm>
struct RowStreams {
  using S = SumType<G, H, kNorm>;
  Pack<G, V> grad, grad_normed, residual_out;
  Pack<H, V> x;
  Pack<S, V> residual;

  template <Hint hint>
  __device__ void load_total(const EditAddNormBackwardArgs& a, int64_t row, int64_t column) {
    int dtype = a.residual_dtype;
    if (a.grad_residual)
      grad = load<hint, G, V>(a.grad_residual, row * a.grad_residual_stride + column, dtype);
    if (!kNorm || !a.grad_normed) return;
    grad_normed = load<hint, G, V>(a.grad_normed, row * a.grad_normed_stride + column, dtype);
    residual_out = load<hint, G, V>(a.residual_out, row * a.width + column, dtype);
  }
  template <Hint hint>
  __device__ void load_h(const Backward& b, int64_t row, int64_t column) {
    x = load<hint, H, V>(b.a.x, row * b.a.x_stride + column, b.a.x_dtype);
    if (b.a.residual)
      residual = load<hint, S, V>(b.a.residual, row * b.a.residual_stride + column, b.sum_dtype);
  }

  // h: x, or x + residual.
  __device__ void get_h(float (&h)[V], const Backward& b) const {
    unpack<H, V>(x, h, b.a.x_dtype);
    if (!b.a.residual) return;
    float r[V];
    unpack<S, V>(residual, r, b.sum_dtype);
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] += r[v];
  }
  // grad_normed, and the rounded residual' whose norm it is the gradient of.
  __device__ void get_norm(float (&g)[V], float (&r)[V], const EditAddNormBackwardArgs& a) const {
    unpack<G, V>(grad_normed, g, a.residual_dtype);
    unpack<G, V>(residual_out, r, a.residual_dtype);
  }
  __device__ void get_total(float (&total)[V], const EditAddNormBackwardArgs& a, const NormRow& norm,
                            const float (&gain)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) total[v] = 0.f;
    if (a.grad_residual) unpack<G, V>(grad, total, a.residual_dtype);
    if (!kNorm || !a.grad_normed) return;
    float g[V], r[V];
    get_norm(g, r, a);
#pragma unroll
    for (int v = 0; v < V; ++v) total[v] += norm.gradient(g[v] * gain[v], r[v]);
  }
};

// q of the rows first … in shared memory, pulled = total @ writeᵀ beside it, and q stored where it is wanted.
template <int N>
__device__ inline void finish_q(const Backward& b, const float* part, int64_t first, float* q,
                                float* pulled) {
  int rank = static_cast<int>(b.a.form.rank);
  finish_dots<N>(rank, b.pulls ? part : nullptr, [&](int j, int r, float sum) {
    int64_t row = min(first + r, b.a.rows - 1);
    RowEdit edit = row_edit(b.a.form, row);
    float from_z = b.a.grad_z ? __ldg(b.a.grad_z + row * rank + j) : 0.f;
    pulled[j * N + r] = sum;
    q[j * N + r] = edit.inside ? (edit.k == 0.f ? from_z : fmaf(edit.k, sum, from_z)) : 0.f;
    if (b.q_out && first + r < b.a.rows) b.q_out[row * rank + j] = q[j * N + r];
  });
}

// A row's d_coefficient from its sum over the width and, at rank > 0, z and pulled.
template <int N>
__device__ inline void store_d_coefficient(const Backward& b, int64_t row, int r, float sum,
                                           const float* pulled) {
  for (int j = 0; b.pulls && j < b.a.form.rank; ++j)
    sum += b.a.z[row * b.a.form.rank + j] * pulled[j * N + r];
  b.a.d_form.coefficient[row] = row_edit(b.a.form, row).inside ? sum : 0.f;
}

// d_h of V columns of a row, to d_x and, where the edit was on the sum, to d_residual.
template <class G, class H, int V>
__device__ inline void store_d_h(const float (&d_h)[V], const Backward& b, int64_t row, int64_t column) {
  int64_t at = row * b.a.width + column;
  if (b.a.d_x) store<H, V>(b.a.d_x, at, round_to<H, V>(d_h, b.a.x_dtype), b.a.x_dtype);
  if (!b.a.on_sum || !b.a.d_residual) return;
  store<G, V>(b.a.d_residual, at, round_to<G, V>(d_h, b.a.residual_dtype), b.a.residual_dtype);
}

// The two means of each row that the norm's gradient takes, kept for the columns where they are wanted.
template <class G, class H, int N, int C, int V>
__device__ inline void find_means(NormRow (&norm)[N], const RowStreams<G, H, V, true> (&streams)[N][C],
                                  const Backward& b, int64_t first, float* shared, int& turn) {
  const EditAddNormBackwardArgs& a = b.a;
  float sum[2 * N] = {}, inverse = 1.f / static_cast<float>(a.width);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int column = tile_column<V>(c);
    if (column >= a.width) continue;
    float g[V], r[V], gain[V];
    load_gain<G, V>(gain, a.weight, a.kind, column, a.residual_dtype);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      streams[i][c].get_norm(g, r, a);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[2 * i] = fmaf(g[v] * gain[v], norm[i].unit(r[v]), sum[2 * i]);
        sum[2 * i + 1] = fmaf(g[v], gain[v], sum[2 * i + 1]);
      }
    }
  }
  block_sum(sum, shared, turn);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    norm[i].dot = sum[2 * i] * inverse;
    norm[i].sum = a.kind == LAYER ? sum[2 * i + 1] * inverse : 0.f;
    if (!b.norm_means || threadIdx.x > 0 || first + i >= a.rows) continue;
    b.norm_means[2 * (first + i)] = norm[i].dot;
    b.norm_means[2 * (first + i) + 1] = norm[i].sum;
  }
}

// Each row's Σ total ⊙ ((scale − 1) ⊙ h + bias), this thread's share.
template <class G, class H, bool kNorm, int N, int C, int V>
__device__ inline void add_update(float (&sum)[N], const float (&total)[N][C][V], const RowEdit (&row)[N],
                                  const Backward& b, int64_t first) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int column = tile_column<V>(c);
    if (column >= b.a.width) continue;
    float scale[V], bias[V];
#pragma unroll
    for (int r = 0; r < N; ++r) {
      if (new_slot(row, r)) {
        load_parameters(scale, b.a.form.scale, row[r].slot * b.a.width + column, 1.f);
        load_parameters(bias, b.a.form.bias, row[r].slot * b.a.width + column, 0.f);
      }
      float h[V] = {};
      if (b.a.x) {
        RowStreams<G, H, V, kNorm> streams;
        streams.template load_h<kL2>(b, min(first + r, b.a.rows - 1), column);
        streams.get_h(h, b);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sum[r] = fmaf(total[r][c][v], fmaf(scale[v] - 1.f, h[v], bias[v]), sum[r]);
    }
  }
}

template <class G, class H, int N, int C, int V>
__device__ inline void tile_d_h(const float (&total)[N][C][V], const RowEdit (&row)[N], const Backward& b,
                                const float* q, int64_t first) {
  const Form& form = b.a.form;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int column = tile_column<V>(c);
    if (column >= b.a.width) continue;
    float scale[V], added[N][V] = {}, d_h[V];
    if (form.rank && form.read) {
      tile_combine(added, q, row, form.read, static_cast<int>(form.rank), b.a.width, column);
    }
#pragma unroll
    for (int r = 0; r < N; ++r) {
      if (new_slot(row, r)) load_parameters(scale, form.scale, row[r].slot * b.a.width + column, 1.f);
#pragma unroll
      for (int v = 0; v < V; ++v) d_h[v] = pulled_back(total[r][c][v], row[r], scale[v], added[r][v]);
      if (first + r < b.a.rows) store_d_h<G, H, V>(d_h, b, first + r, column);
    }
  }
}

template <class G, class H, int V, bool kNorm>
__global__ void __launch_bounds__(512) tile_backward(const Backward b) {
  constexpr int N = kNorm ? 1 : 2, C = 16 / V;
  FASTEDIT_SHARED(shared);
  const EditAddNormBackwardArgs& a = b.a;
  int rank = static_cast<int>(a.form.rank), turn = 0;
  float *q = shared + kBlockSumFloats, *pulled = q + rank * N, *part = pulled + rank * N;
  for (int64_t first = int64_t{blockIdx.x} * N; first < a.rows; first += int64_t{gridDim.x} * N) {
    RowStreams<G, H, V, kNorm> streams[N][C];
    RowEdit row[N];
    NormRow norm[N] = {};
#pragma unroll
    for (int r = 0; r < N; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        int64_t at = min(first + r, a.rows - 1);
        if (tile_column<V>(c) < a.width) streams[r][c].template load_total<kL2>(a, at, tile_column<V>(c));
      }
#pragma unroll
    for (int r = 0; r < N; ++r) {
      int64_t at = min(first + r, a.rows - 1);
      row[r] = row_edit(a.form, at);
      if (kNorm && a.grad_normed) norm[r] = norm_row(a, at);
    }
    if constexpr (kNorm) {
      if (a.grad_normed) find_means(norm, streams, b, first, shared, turn);
    }
    float total[N][C][V] = {};
#pragma unroll
    for (int c = 0; c < C; ++c) {
      int column = tile_column<V>(c);
      if (column >= a.width) continue;
      float gain[V] = {};
      if (kNorm && a.grad_normed) load_gain<G, V>(gain, a.weight, a.kind, column, a.residual_dtype);
#pragma unroll
      for (int r = 0; r < N; ++r) {
        streams[r][c].get_total(total[r][c], a, norm[r], gain);
        if (!kNorm || !a.d_residual || a.on_sum || first + r >= a.rows) continue;
        store<G, V>(a.d_residual, (first + r) * a.width + column,
                    round_to<G, V>(total[r][c], a.residual_dtype), a.residual_dtype);
      }
    }
    if (rank) {
      if (b.pulls) tile_dots(total, row, a.form.write, rank, a.width, part);
      finish_q<N>(b, part, first, q, pulled);
    }
    if (a.d_form.coefficient) {
      float sum[N] = {};
      add_update<G, H, kNorm>(sum, total, row, b, first);
      block_sum(sum, shared, turn);
#pragma unroll
      for (int r = 0; r < N; ++r) {
        if (threadIdx.x == 0 && first + r < a.rows) store_d_coefficient<N>(b, first + r, r, sum[r], pulled);
      }
    }
    if (a.d_x || (a.d_residual && a.on_sum)) tile_d_h<G, H>(total, row, b, q, first);
  }
}

// One row at a time, any width and alignment; total is formed again where it is needed.
template <bool kNorm>
struct LoopBackward {
  const Backward& b;
  int64_t row;
  RowEdit edit;
  NormRow norm;

  __device__ float total(int64_t column) const {
    RowStreams<Any, Any, 1, kNorm> streams;
    float total[1], gain[1] = {};
    if (kNorm && b.a.grad_normed) load_gain<Any, 1>(gain, b.a.weight, b.a.kind, column, b.a.residual_dtype);
    streams.template load_total<kL2>(b.a, row, column);
    streams.get_total(total, b.a, norm, gain);
    return total[0];
  }

  __device__ void find_means(float* shared, int& turn) {
    float sum[2] = {}, g[1], r[1], gain[1], inverse = 1.f / static_cast<float>(b.a.width);
    norm = norm_row(b.a, row);
    for (int64_t column = threadIdx.x; column < b.a.width; column += blockDim.x) {
      RowStreams<Any, Any, 1, kNorm> streams;
      streams.template load_total<kL2>(b.a, row, column);
      streams.get_norm(g, r, b.a);
      load_gain<Any, 1>(gain, b.a.weight, b.a.kind, column, b.a.residual_dtype);
      sum[0] = fmaf(g[0] * gain[0], norm.unit(r[0]), sum[0]);
      sum[1] = fmaf(g[0], gain[0], sum[1]);
    }
    block_sum(sum, shared, turn);
    norm.dot = sum[0] * inverse;
    norm.sum = b.a.kind == LAYER ? sum[1] * inverse : 0.f;
    if (!b.norm_means || threadIdx.x > 0) return;
    b.norm_means[2 * row] = norm.dot;
    b.norm_means[2 * row + 1] = norm.sum;
  }

  __device__ void pull(float* part) const {
    int rank = static_cast<int>(b.a.form.rank);
    const float* write = b.a.form.write + int64_t{edit.slot} * rank * b.a.width;
    for (int first = 0; first < rank; first += 8) {
      float sum[8] = {};
      for (int64_t column = threadIdx.x; column < b.a.width; column += blockDim.x) {
        float grad = total(column);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (first + j < rank) sum[j] = fmaf(grad, __ldg(write + (first + j) * b.a.width + column), sum[j]);
        }
      }
      float all = warp_sum_of_eight(sum);
      if (lane() < 8 && first + lane() < rank) part[(first + lane()) * warps() + warp()] = all;
    }
  }

  __device__ void store_all(const float* q) const {
    const Form& form = b.a.form;
    const float* read = form.read + int64_t{edit.slot} * form.rank * b.a.width;
    for (int64_t column = threadIdx.x; column < b.a.width; column += blockDim.x) {
      float grad = total(column), added = 0.f, d_h[1], at_total[1] = {grad};
      for (int j = 0; form.read && j < form.rank; ++j)
        added = fmaf(q[j], __ldg(read + j * b.a.width + column), added);
      float scale = form.scale ? __ldg(form.scale + edit.slot * b.a.width + column) : 1.f;
      d_h[0] = pulled_back(grad, edit, scale, added);
      store_d_h<Any, Any, 1>(d_h, b, row, column);
      if (!kNorm || !b.a.d_residual || b.a.on_sum) continue;
      store<Any, 1>(b.a.d_residual, row * b.a.width + column, round_to<Any, 1>(at_total, b.a.residual_dtype),
                    b.a.residual_dtype);
    }
  }
};

template <bool kNorm>
__global__ void __launch_bounds__(kLoopThreads) loop_backward(const Backward b) {
  FASTEDIT_SHARED(shared);
  const EditAddNormBackwardArgs& a = b.a;
  int rank = static_cast<int>(a.form.rank), turn = 0;
  float *q = shared + kBlockSumFloats, *pulled = q + rank, *part = pulled + rank;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    LoopBackward<kNorm> loop{b, row, row_edit(a.form, row), {}};
    if (kNorm && a.grad_normed) loop.find_means(shared, turn);
    if (rank) {
      if (b.pulls) loop.pull(part);
      finish_q<1>(b, part, row, q, pulled);
    }
    if (a.d_form.coefficient) {
      float sum[1] = {}, h[1];
      for (int64_t column = threadIdx.x; column < a.width; column += blockDim.x) {
        int64_t at = loop.edit.slot * a.width + column;
        float update = a.form.bias ? __ldg(a.form.bias + at) : 0.f;
        if (a.form.scale && a.x) {
          RowStreams<Any, Any, 1, kNorm> streams;
          streams.template load_h<kL2>(b, row, column);
          streams.get_h(h, b);
          update = fmaf(__ldg(a.form.scale + at) - 1.f, h[0], update);
        }
        sum[0] = fmaf(loop.total(column), update, sum[0]);
      }
      block_sum(sum, shared, turn);
      if (threadIdx.x == 0) store_d_coefficient<1>(b, row, 0, sum[0], pulled);
    }
    if (a.d_x || a.d_residual) loop.store_all(q);
  }
}

template <class G, class H, int V, bool kNorm>
int run_backward_rows(const Backward& b, void* stream) {
  const EditAddNormBackwardArgs& a = b.a;
  if constexpr (V > 1) {
    if (a.width <= kLowRankTileWidth) {
      Shape shape = tile_shape(a.rows, a.width, a.form.rank, 16, kNorm ? 1 : 2, multiprocessors());
      return launch(tile_backward<G, H, V, kNorm>, shape, stream, b);
    }
  }
  return launch(loop_backward<kNorm>, loop_shape(a.rows, a.form.rank, multiprocessors()), stream, b);
}

}  // namespace
}  // namespace fastedit::cuda
