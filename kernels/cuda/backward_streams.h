// One row's streams in a backward, q of a tile's rows, and the stores: what the unit kernel (backward_unit.h),
// the row kernel (backward_rows.h) and the column kernels (backward_columns.h) share.
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
    if (a.grad_residual)
      grad = load<hint, G, V>(a.grad_residual, row * a.grad_residual_stride + column, a.residual_dtype);
    if (kNorm && a.grad_normed) load_norm<hint>(a, row, column);
  }
  template <Hint hint>
  __device__ void load_norm(const EditAddNormBackwardArgs& a, int64_t row, int64_t column) {
    grad_normed = load<hint, G, V>(a.grad_normed, row * a.grad_normed_stride + column, a.residual_dtype);
    residual_out = load<hint, G, V>(a.residual_out, row * a.width + column, a.residual_dtype);
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

__device__ inline void put_four(float* to, float x, float y, float z, float w) {
  put(reinterpret_cast<uint4*>(to),
      make_uint4(__float_as_uint(x), __float_as_uint(y), __float_as_uint(z), __float_as_uint(w)));
}
template <int V>
__device__ inline void store_total(const float (&total)[V], float* to) {
#pragma unroll
  for (int i = 0; i < V; i += 4) put_four(to + i, total[i], total[i + 1], total[i + 2], total[i + 3]);
}

// Shared memory of a tile's dot products, each (rank, N) but part and offset.
struct LowRank {
  float *q, *pulled, *kz, *part, *offset;
  __device__ LowRank(float* shared, int rank, int tile)
      : q(shared + kBlockSumFloats),
        pulled(q + rank * tile),
        kz(pulled + rank * tile),
        part(kz + rank * tile),       // (rank, N, warps)
        offset(part + rank * tile * warps()) {}  // Σ q over the unit's rows, (rank,)
};

// q of a tile's rows and beside it pulled = total @ writeᵀ and k z; q also to the workspace where the columns
// want it. row_at(r) is a row to read from, also where r is not `live`.
template <int N, class F>
__device__ inline void finish_q(const Backward& b, const LowRank& low, int live, F row_at) {
  int rank = static_cast<int>(b.a.form.rank);
  finish_dots<N>(rank, b.pulls ? low.part : nullptr, [&](int j, int r, float sum) {
    int64_t row = row_at(r);
    RowEdit edit = row_edit(b.a.form, row);
    float from_z = b.a.grad_z ? __ldg(b.a.grad_z + row * rank + j) : 0.f;
    float q = edit.k == 0.f ? from_z : fmaf(edit.k, sum, from_z);
    low.pulled[j * N + r] = sum;
    low.q[j * N + r] = edit.inside && r < live ? q : 0.f;
    low.kz[j * N + r] = b.a.z && edit.k != 0.f && r < live ? edit.k * __ldg(b.a.z + row * rank + j) : 0.f;
    if (b.q_out && r < live) b.q_out[row * rank + j] = low.q[j * N + r];
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

// d_h of V columns of a row as they go to d_x and, where the edit was on the sum, to d_residual.
template <class G, class H, int V>
struct RoundedRow {
  Pack<H, V> x;
  Pack<G, V> residual;
  __device__ void round(const float (&d_h)[V], const Backward& b) {
    x = round_to<H, V>(d_h, b.a.x_dtype), residual = round_to<G, V>(d_h, b.a.residual_dtype);
  }
  __device__ void store(const Backward& b, void* d_x, void* d_residual, int64_t at = 0) const {
    if (b.a.d_x) cuda::store<H, V>(d_x, at, x, b.a.x_dtype);
    if (b.a.on_sum && b.a.d_residual) cuda::store<G, V>(d_residual, at, residual, b.a.residual_dtype);
  }
};

}  // namespace
}  // namespace fastedit::cuda
