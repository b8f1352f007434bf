// The kernels of everything that needs a sum along the row, and their launches: see edit_add_norm.cu, which has
// them without a gate, and edit_gated.cu, which has them with one.
#pragma once
#include "gate.h"
#include "norm.h"
#include "run.h"
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

// z of a tile's rows, in shared memory as z[j N + r], and stored where it is wanted. Behind a gate each row's k
// comes after them.
template <bool kGated, int N, int C, int V>
__device__ inline const float* tile_project(const float (&h)[N][C][V], RowEdit (&row)[N], const EditAddArgs& a,
                                            int64_t first, float* shared) {
  int rank = static_cast<int>(a.form.rank);
  float* z = shared + kBlockSumFloats;
  float* part = z + (rank + kGated) * N;
  tile_dots(h, row, a.form.read, rank, a.width, part);
  if constexpr (kGated) tile_gate_sums(h, row, a.form.gate, a.width, part + rank * N * warps());
  finish_dots<N>(rank + kGated, part, [&](int j, int r, float sum) {
    RowEdit edit = row_edit(a.form, min(first + r, a.rows - 1));
    if constexpr (kGated) {
      if (j == rank) {
        z[j * N + r] = gated(a.form, edit, sum, share_sum(part, (j + 1) * N + r));
        return;
      }
    }
    if (a.form.offset) sum += __ldg(a.form.offset + int64_t{edit.slot} * rank + j);
    sum = edit.inside ? sum : 0.f;
    z[j * N + r] = sum;
    if (a.z && first + r < a.rows) a.z[(first + r) * rank + j] = sum;
  });
  if constexpr (kGated) {
#pragma unroll
    for (int r = 0; r < N; ++r) row[r].k = z[rank * N + r];
  }
  return z;
}

// The tile's residual': stored, and left rounded in h for the norm.
template <class X, class R, bool kLowRank, bool kGated, int N, int C, int V>
__device__ inline void tile_edit(float (&h)[N][C][V], const Pack<R, V> (&residual)[N][C],
                                 const RowEdit (&row)[N], const EditAddArgs& a, const float* z,
                                 int64_t first) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int column = tile_column<V>(c);
    if (column >= a.width) continue;
    float scale[V], bias[V], added[N][V] = {};
    if (kLowRank && a.form.write) {
      tile_combine(added, z, row, a.form.write, static_cast<int>(a.form.rank), a.width, column);
    }
#pragma unroll
    for (int r = 0; r < N; ++r) {
      if (new_slot(row, r)) {
        load_parameters(scale, a.form.scale, row[r].slot * a.width + column, 1.f);
        load_parameters(bias, a.form.bias, row[r].slot * a.width + column, 0.f);
      }
      float before[V];
      unpack<R, V>(residual[r][c], before, a.residual_dtype);
      bool outer = a.residual && !a.on_sum;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float e = edited(h[r][c][v], row[r].k, scale[v], bias[v], added[r][v]);
        h[r][c][v] = outer ? before[v] + e : e;
      }
      Pack<R, V> rounded = round_to<R, V>(h[r][c], a.residual_dtype);
      unpack<R, V>(rounded, h[r][c], a.residual_dtype);
      if (!a.out || first + r >= a.rows) continue;
      // The row's bits, NaN payloads too. Rows without a gate are not looked at: their k = 0 are rare.
      if (!a.residual && row[r].k == 0.f && (!kGated || any_nan(h[r][c]))) {
        rounded = load<kCached, R, V>(a.x, (first + r) * a.x_stride + column, a.x_dtype);
      }
      store<R, V>(a.out, (first + r) * a.width + column, rounded, a.residual_dtype);
    }
  }
}

template <class R, int N, int C, int V>
__device__ inline void tile_norm(float (&r)[N][C][V], const EditAddNormArgs& a, int64_t first, float* shared,
                                 int& turn) {
  const float inverse = 1.f / static_cast<float>(a.add.width);
  float mean[N] = {}, rstd[N] = {};
  if (a.kind == LAYER) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int v = 0; v < V; ++v) mean[i] += r[i][c][v];
    block_sum(mean, shared, turn);
#pragma unroll
    for (int i = 0; i < N; ++i) mean[i] *= inverse;
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (tile_column<V>(c) >= a.add.width) continue;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float centred = r[i][c][v] - mean[i];
        rstd[i] = fmaf(centred, centred, rstd[i]);
      }
  }
  block_sum(rstd, shared, turn);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    rstd[i] = reciprocal_root(fmaf(rstd[i], inverse, a.eps));
    if (threadIdx.x == 0 && first + i < a.add.rows) {
      if (a.kind == LAYER && a.mean) a.mean[first + i] = mean[i];
      if (a.rstd) a.rstd[first + i] = rstd[i];
    }
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int column = tile_column<V>(c), dtype = a.add.residual_dtype;
    if (column >= a.add.width) continue;
    float gain[V], shift[V];
    load_affine<R, V>(gain, shift, a, column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (first + i >= a.add.rows) continue;
      store<R, V>(a.normed, (first + i) * a.add.width + column,
                  normed<R, V>(r[i][c], gain, shift, a.kind, dtype, mean[i], rstd[i]), dtype);
    }
  }
}

template <class X, class R, int V, int E, bool kLowRank, bool kGated>
__global__ void __launch_bounds__(kLowRank || E == 8 ? 512 : 1024, kLowRank || E == 16 ? 1 : 2)
    tile_rows_kernel(const EditAddNormArgs a) {
  constexpr int N = kTileRows<E, kLowRank>, C = E / V;
  FASTEDIT_SHARED(shared);
  const EditAddArgs& add = a.add;
  int turn = 0;
  for (int64_t first = int64_t{blockIdx.x} * N; first < add.rows; first += int64_t{gridDim.x} * N) {
    Pack<X, V> x[N][C] = {};
    Pack<R, V> residual[N][C] = {};
    RowEdit row[N];
#pragma unroll
    for (int r = 0; r < N; ++r) {
      int64_t at = min(first + r, add.rows - 1);  // the last tile repeats the last row and stores it once
#pragma unroll
      for (int c = 0; c < C; ++c) {
        int column = tile_column<V>(c);
        if (column >= add.width) continue;
        x[r][c] = load<kOnce, X, V>(add.x, at * add.x_stride + column, add.x_dtype);
        if (!add.residual) continue;
        residual[r][c] =
            load<kOnce, R, V>(add.residual, at * add.residual_stride + column, add.residual_dtype);
      }
    }
#pragma unroll
    for (int r = 0; r < N; ++r) row[r] = row_edit(add.form, min(first + r, add.rows - 1));
    float h[N][C][V];
#pragma unroll
    for (int r = 0; r < N; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float before[V];
        unpack<X, V>(x[r][c], h[r][c], add.x_dtype);
        unpack<R, V>(residual[r][c], before, add.residual_dtype);
#pragma unroll
        for (int v = 0; v < V; ++v) h[r][c][v] = add.on_sum ? h[r][c][v] + before[v] : h[r][c][v];
      }
    const float* z = nullptr;
    if constexpr (kLowRank) z = tile_project<kGated>(h, row, add, first, shared);
    if (!add.out && !a.normed) continue;
    tile_edit<X, R, kLowRank, kGated>(h, residual, row, add, z, first);
    if (a.normed) tile_norm<R>(h, a, first, shared, turn);
  }
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
    float h[V], residual[V], scale[V], bias[V], added[V] = {}, m[V];
    before(column, h, residual);
    load_parameters(scale, a.form.scale, edit.slot * a.width + column, 1.f);
    load_parameters(bias, a.form.bias, edit.slot * a.width + column, 0.f);
    for (int j = 0; a.form.write && j < a.form.rank; ++j) {
      load_parameters(m, a.form.write, (edit.slot * a.form.rank + j) * a.width + column, 0.f);
#pragma unroll
      for (int v = 0; v < V; ++v) added[v] = fmaf(z[j], m[v], added[v]);
    }
    bool outer = a.residual && !a.on_sum;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float e = edited(h[v], edit.k, scale[v], bias[v], added[v]);
      h[v] = outer ? residual[v] + e : e;
    }
    return round_to<R, V>(h, a.residual_dtype);
  }
};

template <class X, class R, int V, bool kGated>
__global__ void __launch_bounds__(kLoopThreads) loop_rows_kernel(const EditAddNormArgs a) {
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

// Rows of shared sums: z's and, behind a gate, h · gate and h · h.
template <bool kGated>
int64_t summed(const Form& form) {
  return form.rank + (kGated ? 2 : 0);
}

template <class X, class R, int V, int E, bool kLowRank, bool kGated>
int run_tiles(const EditAddNormArgs& a, void* stream) {
  Shape shape = tile_shape(a.add.rows, a.add.width, summed<kGated>(a.add.form), E, kTileRows<E, kLowRank>,
                           multiprocessors());
  return launch(tile_rows_kernel<X, R, V, E, kLowRank, kGated>, shape, stream, a);
}

template <class X, class R, int V, bool kGated>
int run_rows(const EditAddNormArgs& a, void* stream) {
  const EditAddArgs& add = a.add;
  bool low_rank = kGated || add.form.rank > 0;  // a gate is a row to read, as those of a rank are
  if constexpr (V > 1) {
    int elements = tile_elements(add.width, V, low_rank);
    if (elements && low_rank) return run_tiles<X, R, V, 16, true, kGated>(a, stream);
    if constexpr (!kGated) {
      if (elements == 8) return run_tiles<X, R, V, 8, false, false>(a, stream);
      if (elements == 16) return run_tiles<X, R, V, 16, false, false>(a, stream);
    }
  }
  Shape shape = loop_shape(add.rows, add.width, summed<kGated>(add.form), multiprocessors());
  return launch(loop_rows_kernel<X, R, V, kGated>, shape, stream, a);
}

// By dtypes and alignment.
template <bool kGated>
int run_any_rows(const EditAddNormArgs& a, void* stream) {
  const EditAddArgs& add = a.add;
  int vector = Alignment(add.rows, add.width, add.residual_dtype)
                   .stream(add.x, add.x_stride, add.x_dtype)
                   .stream(add.residual, add.residual_stride, add.residual_dtype)
                   .stream(add.out, add.width, add.residual_dtype)
                   .stream(a.normed, add.width, add.residual_dtype)
                   .stream(a.weight, 0, add.residual_dtype)
                   .stream(a.norm_bias, 0, add.residual_dtype)
                   .form(add.form)
                   .vector;
  return with_types(add.x_dtype, add.residual_dtype, [&](auto x, auto residual) {
    using X = typename decltype(x)::type;
    using R = typename decltype(residual)::type;
    return vector == 1 ? run_rows<Any, Any, 1, kGated>(a, stream)
                       : run_rows<X, R, vector_width(sizeof(R)), kGated>(a, stream);
  });
}

}  // namespace
}  // namespace fastedit::cuda
