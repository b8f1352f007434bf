// The kernels of everything that needs a sum along the row, and their launches: see edit_add_norm.cu, which has
// them without a gate, and edit_gated.cu, which has them with one.
#pragma once
#include "loop_rows.h"
#include "plain.h"
#include "run.h"

namespace fastedit::cuda {
namespace {

// z of a tile's rows, in shared memory as z[j N + r], and stored where it is wanted. Behind a gate each row's k
// comes after them.
template <bool kGated, bool kFull, bool kWhole, class Team, int N, int C, int V>
__device__ inline const float* tile_project(const float (&h)[N][C][V], RowEdit (&row)[N], const EditAddArgs& a,
                                            int64_t first, float* shared, Team& team) {
  int rank = static_cast<int>(a.form.rank);
  float* z = shared + kBlockSumFloats;
  float* part = z + (rank + kGated) * N;
  tile_dots<kFull, kWhole>(h, row, a.form.read, rank, a.width, part);
  if constexpr (kGated) tile_gate_sums(h, row, a.form.gate, a.width, part + rank * N * warps());
  team.add_shares(part, (rank + 2 * kGated) * N);
  finish_dots<N>(rank + kGated, part, [&](int j, int r, float sum) {
    RowEdit edit = row_edit(a.form, tile_row(first, r, a.rows));
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

// bias of K chunks from `first` on, for each row.
template <int N, int K, int V>
__device__ inline void tile_bias(float (&shift)[N][K][V], const RowEdit (&row)[N], const EditAddArgs& a, int first) {
#pragma unroll
  for (int r = 0; r < N; ++r)
#pragma unroll
    for (int c = 0; c < K; ++c) {
      if (new_slot(row, r)) {
        load_parameters(shift[r][c], a.form.bias, row[r].slot * a.width + tile_column<V>(first + c), 0.f);
        continue;
      }
#pragma unroll
      for (int v = 0; v < V; ++v) shift[r][c][v] = shift[r - 1][c][v];
    }
}

// The tile's residual': stored, and left rounded in h for the norm.
template <class X, class R, bool kLowRank, bool kGated, bool kFull, bool kWhole, int N, int C, int V>
__device__ inline void tile_edit(float (&h)[N][C][V], const Pack<R, V> (&residual)[N][C],
                                 const RowEdit (&row)[N], const EditAddArgs& a, const float* z,
                                 int64_t first) {
  constexpr int K = kFull && kLowRank ? C : 1;  // chunks at a time: all where registers allow
#pragma unroll
  for (int first_c = 0; first_c < C; first_c += K) {
    if (beyond<V, kFull>(first_c, a.width)) continue;
    float shift[kLowRank ? N : 1][K][V], scale[V];  // without a rank one for all rows of a slot
    if constexpr (kLowRank) {
      tile_bias(shift, row, a, first_c);
      if (a.form.write) tile_combine<kWhole>(shift, z, row, a.form.write, static_cast<int>(a.form.rank), a.width, first_c);
    }
#pragma unroll
    for (int i = 0; i < K * N; ++i) {
      const int c = first_c + i / N, r = i % N, column = tile_column<V>(c);
      if (new_slot(row, r)) {
        load_parameters(scale, a.form.scale, row[r].slot * a.width + column, 1.f);
        if (!kLowRank) load_parameters(shift[0][0], a.form.bias, row[r].slot * a.width + column, 0.f);
      }
      float before[V];
      unpack<R, V>(residual[r][c], before, a.residual_dtype);
      bool outer = a.residual && !a.on_sum;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float e = edited(h[r][c][v], row[r].k, scale[v], shift[kLowRank ? r : 0][i / N][v]);
        h[r][c][v] = outer ? before[v] + e : e;
      }
      Pack<R, V> rounded = round_to<R, V>(h[r][c], a.residual_dtype);
      unpack<R, V>(rounded, h[r][c], a.residual_dtype);
      if (!a.out || (r > 0 && first + r >= a.rows)) continue;
      // The row's bits, NaN payloads too. Rows without a gate are not looked at: their k = 0 are rare.
      if (!a.residual && row[r].k == 0.f && (!kGated || any_nan(h[r][c]))) {
        rounded = load<kCached, R, V>(row_at<R, kFull>(a.x, first + r, a.x_stride, column), 0, a.x_dtype);
      }
      store<R, V>(row_at<R, kFull>(a.out, first + r, a.width, column), 0, rounded, a.residual_dtype);
    }
  }
}

template <class R, bool kFull, class Team, int N, int C, int V>
__device__ inline void tile_norm(float (&r)[N][C][V], const EditAddNormArgs& a, int64_t first, float* shared, int& turn,
                                 Team& team) {
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
    team.add(mean);
#pragma unroll
    for (int i = 0; i < N; ++i) mean[i] *= inverse;
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (beyond<V, kFull>(c, a.add.width)) continue;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float centred = r[i][c][v] - mean[i];
        rstd[i] = fmaf(centred, centred, rstd[i]);
      }
  }
  block_sum(rstd, shared, turn);
  team.add(rstd);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    rstd[i] = reciprocal_root(fmaf(rstd[i], inverse, a.eps));
    if (threadIdx.x == 0 && (i == 0 || first + i < a.add.rows)) {
      if (a.kind == LAYER && a.mean) a.mean[first + i] = mean[i];
      if (a.rstd) a.rstd[first + i] = rstd[i];
    }
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    int column = tile_column<V>(c), dtype = a.add.residual_dtype;
    if (beyond<V, kFull>(c, a.add.width)) continue;
    float gain[V], shift[V];
    load_affine<R, V>(gain, shift, a, column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i > 0 && first + i >= a.add.rows) continue;
      store<R, V>(row_at<R, kFull>(a.normed, first + i, a.add.width, column), 0,
                  normed<R, V>(r[i][c], gain, shift, a.kind, dtype, mean[i], rstd[i]), dtype);
    }
  }
}

// Of a single slot, before the rows: else a block's first tile waits three times, for rows, parameters and weight. A
// thread's V columns are a sector of 32 bytes in fp32.
template <class R, int V>
__device__ inline void ask_for_parameters(const EditAddNormArgs& a) {
  int column = tile_column<V>(0);
  if (a.add.form.scale) prefetch(a.add.form.scale + column);
  if (a.add.form.bias) prefetch(a.add.form.bias + column);
  prefetch(static_cast<const R*>(a.weight) + column);
}

// Rows of shared sums: z's and, behind a gate, h · gate and h · h.
template <bool kGated>
__host__ __device__ inline int64_t summed(const Form& form) {
  return form.rank + (kGated ? 2 : 0);
}

template <class X, class R, int V, int E, bool kLowRank, bool kGated, Part part, bool kWhole>
__global__ void __launch_bounds__(kLowRank || E == 8 ? 512 : 1024, kLowRank || E == 16 ? 1 : 2)
    tile_rows_kernel(const EditAddNormArgs given) {
  const EditAddNormArgs a = plain<part, kLowRank, kWhole>(given);
  constexpr int N = kTileRows<E, kLowRank>, C = E / V;
  constexpr bool kFull = part != kGeneral, kCluster = part == kClustered;
  FASTEDIT_SHARED(whole);
  float* shared = whole;
  const EditAddArgs& add = a.add;
  int turn = 0;
  wait_for_kernel_before();
  if constexpr (kFull && !kLowRank && C == 1) ask_for_parameters<R, V>(a);  // others have no register left for it
  using Row = std::conditional_t<kFull, int, int64_t>;
  std::conditional_t<kCluster, Cluster, Alone> team(shared, exchanged(summed<kGated>(add.form), N));
  const Row rows = static_cast<Row>(add.rows), step = static_cast<Row>(gridDim.x) / team.blocks() * N;
  for (Row first = static_cast<Row>(blockIdx.x) / team.blocks() * N; first < rows; first += step) {
    Pack<X, V> x[N][C] = {};
    Pack<R, V> residual[N][C] = {};
    RowEdit row[N];
#pragma unroll
    for (int r = 0; r < N; ++r) {
      const Row at = tile_row(first, r, rows);  // the last tile repeats its first row and stores it once
#pragma unroll
      for (int c = 0; c < C; ++c) {
        int column = tile_column<V>(c);
        if (beyond<V, kFull>(c, add.width)) continue;
        x[r][c] = load<kOnce, X, V>(row_at<X, kFull>(add.x, at, add.x_stride, column), 0, add.x_dtype);
        if (!add.residual) continue;
        residual[r][c] =
            load<kOnce, R, V>(row_at<R, kFull>(add.residual, at, add.residual_stride, column), 0, add.residual_dtype);
      }
    }
#pragma unroll
    for (int r = 0; r < N; ++r) row[r] = row_edit(add.form, tile_row(first, r, rows));
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
    if constexpr (kLowRank) {
      if (!kCluster || kGated || add.form.rank) z = tile_project<kGated, kFull, kWhole>(h, row, add, first, shared, team);
    }
    if ((part == kGeneral || kCluster) && !add.out && !a.normed) continue;
    tile_edit<X, R, kLowRank, kGated, kFull, kWhole>(h, residual, row, add, z, first);
    if (a.normed) tile_norm<R, kFull>(h, a, first, shared, turn, team);
  }
}

template <class X, class R, int V, int E, bool kLowRank, bool kWhole>
int run_plain(const EditAddNormArgs& a, Part part, const Shape& shape, void* stream) {
  auto run = [&](auto kernel) { return launch_early(kernel, shape, stream, a); };
  if constexpr (kLowRank) {
    if (part == kPlainEdit) return run(tile_rows_kernel<X, R, V, E, true, false, kPlainEdit, kWhole>);
    if (part == kPlainAdd) return run(tile_rows_kernel<X, R, V, E, true, false, kPlainAdd, kWhole>);
    if (part == kPlainSum) return run(tile_rows_kernel<X, R, V, E, true, false, kPlainSum, kWhole>);
  }
  return part == kPlainNorm ? run(tile_rows_kernel<X, R, V, E, kLowRank, false, kPlainNorm, kWhole>)
                            : run(tile_rows_kernel<X, R, V, E, kLowRank, false, kPlainSumNorm, kWhole>);
}

template <class X, class R, int V, int E, bool kLowRank, bool kGated>
int run_tiles(const EditAddNormArgs& a, void* stream) {
  Shape shape = tile_shape(a.add.rows, a.add.width, summed<kGated>(a.add.form), E, kTileRows<E, kLowRank>,
                           multiprocessors());
  if constexpr (sizeof(X) == 2 && sizeof(R) == 2 && !kGated) {
    bool full = int64_t{shape.threads} * E == a.add.width;  // no thread without its columns
    Part part = full ? part_of(a) : kGeneral;
    if constexpr (kLowRank) {
      if (part && a.add.form.rank % kRanks == 0) return run_plain<X, R, V, E, true, true>(a, part, shape, stream);
    }
    if (part) return run_plain<X, R, V, E, kLowRank, false>(a, part, shape, stream);
  }
  return launch_early(tile_rows_kernel<X, R, V, E, kLowRank, kGated, kGeneral, false>, shape, stream, a);
}

#ifdef FASTEDIT_CLUSTERS
// kNoClusters where the loop is left to take the rows.
template <class X, class R, int V, bool kGated>
int run_clusters(const EditAddNormArgs& a, void* stream) {
  const EditAddArgs& add = a.add;
  int blocks = cluster_size(add.width);
  if (!blocks || !is_short(add.rows, add.width, add.x_stride, add.residual_stride)) return kNoClusters;
  constexpr int kRows = kTileRows<kClusterElements, true>;
  Shape shape = tile_shape(add.rows, add.width / blocks, summed<kGated>(add.form), kClusterElements, kRows,
                           static_cast<int>(most(1, multiprocessors() / blocks)));
  shape.blocks *= blocks;
  shape.shared_bytes += 4 * exchange_floats(exchanged(summed<kGated>(add.form), kRows), blocks);
  auto kernel = tile_rows_kernel<X, R, V, kClusterElements, true, kGated, kClustered, false>;
  return launch_clusters(blocks, kernel, shape, stream, a);
}
#endif

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
#ifdef FASTEDIT_CLUSTERS
    if (int error = run_clusters<X, R, V, kGated>(a, stream); error != kNoClusters) return error;
#endif
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
