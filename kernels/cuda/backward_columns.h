// The part of a backward that needs sums down the columns, over units of at most kBlockRows rows:
//   scale Σ k total⊙h   bias Σ k total   read Σ q h   offset Σ q   write Σ k z total
//   weight Σ grad_normed⊙unit   norm_bias Σ grad_normed
//
// Streams: grad and hidden in; at rank 0 without a norm also d_x out, so that the whole backward is one pass.
// Grid: column tiles × units (× groups of eight ranks). A lane owns V columns and keeps their fp32 sums in
// registers; a block's eight warps take every eighth row of the unit, and their sums are added as a tree.
// The order of every addition follows from the row's place in its unit alone.
#pragma once
#include "backward_rows.h"
#include "backward_unit.h"

namespace fastedit::cuda {
namespace {

constexpr int kRankGroup = 8;

// Adds the warps' sums of a tile's columns, pairwise, and stores those below `width`.
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
    out[tile * kColumns + i] = ((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7]));
  }
}

__device__ inline NormRow full_norm_row(const Backward& b, int64_t row) {
  NormRow norm = norm_row(b.a, row);
  if (b.norm_means) norm.dot = __ldg(b.norm_means + 2 * row), norm.sum = __ldg(b.norm_means + 2 * row + 1);
  return norm;
}

// One row's share of the vector sums.
template <class G, class H, int V, bool kNorm>
struct ColumnRow {
  int64_t row;
  float k;
  NormRow norm;
  RowStreams<G, H, V, kNorm> streams;

  __device__ void load(const Backward& b, const Unit& unit, int i, int64_t column) {
    row = unit.row(i);
    k = unit.inside ? 1.f : 0.f;
    norm = {};
    if (unit.inside && b.a.form.coefficient)
      k = __ldg(b.a.form.coefficient + row * b.a.form.coefficient_stride);
    if (kNorm && b.a.grad_normed) norm = full_norm_row(b, row);
    streams.template load_total<kOnce>(b.a, row, column);
    if (b.sums.scale >= 0 && unit.inside) streams.template load_h<kOnce>(b, row, column);
  }

  __device__ void add(float (&sum)[kNorm ? 4 : 2][V], const Backward& b, const Unit& unit,
                      const float (&gain)[V], const float (&scale)[V], int64_t column) {
    float total[V], h[V] = {};
    streams.get_total(total, b.a, norm, gain);
    if (b.sums.scale >= 0 && unit.inside) streams.get_h(h, b);
    if constexpr (kNorm) {
      if (b.a.grad_normed) {
        float g[V], r[V];
        streams.get_norm(g, r, b.a);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sum[2][v] = fmaf(g[v], norm.unit(r[v]), sum[2][v]);
          sum[3][v] += g[v];
        }
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float pulled = k == 0.f ? 0.f : k * total[v];
      sum[0][v] = fmaf(pulled, h[v], sum[0][v]);
      sum[1][v] += pulled;
    }
    if (kNorm || !b.columns_d_x) return;
    RowEdit edit{unit.slot, unit.inside, k};
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = pulled_back(total[v], edit, scale[v], 0.f);
    store<H, V>(b.a.d_x, row * b.a.width + column, round_to<H, V>(h, b.a.x_dtype), b.a.x_dtype);
  }
};

template <class G, class H, int V, bool kNorm>
__global__ void __launch_bounds__(kLaneColumns* kLines, 2) column_sums(const Backward b, unsigned tiles) {
  constexpr int kFlight = kNorm ? 2 : 4, kSums = kNorm ? 4 : 2;
  FASTEDIT_SHARED(shared);
  const EditAddNormBackwardArgs& a = b.a;
  int64_t block = blockIdx.x / tiles, tile = blockIdx.x % tiles, column = (tile * kLaneColumns + lane()) * V;
  Unit unit = find_unit(b, block);
  bool all_rows = b.columns_d_x || b.sums.weight >= 0 || b.sums.norm_bias >= 0;
  if (unit.count == 0 || (!unit.inside && !all_rows)) return;

  float sum[kSums][V] = {}, scale[V], gain[V] = {};
  bool valid = column < a.width;
  if (valid) {
    load_parameters(scale, a.form.scale, unit.slot * a.width + column, 1.f);
    if (kNorm) load_gain<G, V>(gain, a.weight, a.kind, column, a.residual_dtype);
  }
  for (int first = warp(); valid && first < unit.count; first += kLines * kFlight) {
    ColumnRow<G, H, V, kNorm> rows[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (first + i * kLines < unit.count) rows[i].load(b, unit, first + i * kLines, column);
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (first + i * kLines < unit.count) rows[i].add(sum, b, unit, gain, scale, column);
    }
  }
  float* partials = b.partials + block * b.sums.size;
  if (b.sums.scale >= 0) combine_warps(sum[0], shared, partials + b.sums.scale, tile, a.width);
  if (b.sums.bias >= 0) combine_warps(sum[1], shared, partials + b.sums.bias, tile, a.width);
  if constexpr (kNorm) {
    if (b.sums.weight >= 0) combine_warps(sum[2], shared, partials + b.sums.weight, tile, a.width);
    if (b.sums.norm_bias >= 0) combine_warps(sum[3], shared, partials + b.sums.norm_bias, tile, a.width);
  }
}

// Σ q over a unit: a warp for each rank, a lane for every 32nd row.
__device__ inline void offset_sums(const Backward& b, const Unit& unit, float* out) {
  int rank = static_cast<int>(b.a.form.rank);
  for (int j = warp(); j < rank; j += warps()) {
    float sum = 0.f;
    for (int i = lane(); b.q && i < unit.count; i += kWarp) sum += __ldg(b.q + unit.row(i) * rank + j);
    sum = warp_sum(sum);
    if (lane() == 0) out[j] = sum;
  }
}

// Eight ranks of Σ q h (kWrite false) or Σ k z total (kWrite) over a unit's rows, for V columns.
template <class G, class H, int V, bool kNorm, bool kWrite>
__device__ inline void add_outer(float (&sum)[kRankGroup][V], const Backward& b, const Unit& unit, int group,
                                 int64_t column) {
  constexpr int kFlight = kNorm && kWrite ? 1 : 2;  // as many as the registers hold
  const EditAddNormBackwardArgs& a = b.a;
  const float* coefficient = kWrite ? a.z : b.q;
  int64_t rank = a.form.rank, ranks = min(int64_t{kRankGroup}, rank - group * kRankGroup);
  if (!coefficient || (kWrite && !b.has_grad)) return;
  float gain[V] = {};
  if (kWrite && kNorm && a.grad_normed) load_gain<G, V>(gain, a.weight, a.kind, column, a.residual_dtype);
  for (int first = warp(); first < unit.count; first += kLines * kFlight) {
    RowStreams<G, H, V, kNorm> streams[kFlight];
    float c[kFlight][kRankGroup] = {};
    NormRow norm[kFlight] = {};
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (first + i * kLines >= unit.count) continue;
      int64_t row = unit.row(first + i * kLines);
      if (kWrite) streams[i].template load_total<kL2>(a, row, column);
      else streams[i].template load_h<kL2>(b, row, column);
      if (kWrite && kNorm && a.grad_normed) norm[i] = full_norm_row(b, row);
      float k =
          kWrite && a.form.coefficient ? __ldg(a.form.coefficient + row * a.form.coefficient_stride) : 1.f;
#pragma unroll
      for (int j = 0; j < kRankGroup; ++j) {
        if (j < ranks)
          c[i][j] = k == 0.f ? 0.f : k * __ldg(coefficient + row * rank + group * kRankGroup + j);
      }
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (first + i * kLines >= unit.count) continue;
      float value[V];
      if (kWrite) streams[i].get_total(value, a, norm[i], gain);
      else streams[i].get_h(value, b);
#pragma unroll
      for (int j = 0; j < kRankGroup; ++j)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[j][v] = fmaf(c[i][j], value[v], sum[j][v]);
    }
  }
}

// Items of a unit, in the order of their block numbers: d_read's tiles × groups, d_write's, d_offset. A
// tile's groups are neighbours, so that all but the first find the rows in L2.
struct OuterItems {
  unsigned tiles, groups, read, write, all;
  __host__ __device__ OuterItems(const Backward& b, int vector)
      : tiles(static_cast<unsigned>((b.a.width + kLaneColumns * vector - 1) / (kLaneColumns * vector))),
        groups(static_cast<unsigned>((b.a.form.rank + kRankGroup - 1) / kRankGroup)),
        read(b.sums.read >= 0 && !(b.fused && b.read_fused) ? tiles * groups : 0),
        write(b.sums.write >= 0 && !b.fused ? tiles * groups : 0),
        all(read + write + (b.sums.offset >= 0 && !b.fused)) {}
};

template <class G, class H, int V, bool kNorm>
__global__ void __launch_bounds__(kLaneColumns* kLines, 2) outer_sums(const Backward b) {
  FASTEDIT_SHARED(shared);
  OuterItems items(b, V);
  int64_t block = blockIdx.x / items.all;
  unsigned item = blockIdx.x % items.all;
  Unit unit = find_unit(b, block);
  if (unit.count == 0 || !unit.inside) return;
  float* partials = b.partials + block * b.sums.size;
  bool write = item >= items.read;
  if (write) item -= items.read;
  if (write && item == items.write) return offset_sums(b, unit, partials + b.sums.offset);

  int group = static_cast<int>(item % items.groups);
  int64_t tile = item / items.groups, column = (tile * kLaneColumns + lane()) * V;
  float sum[kRankGroup][V] = {};
  if (column < b.a.width) {
    if (write) add_outer<G, H, V, kNorm, true>(sum, b, unit, group, column);
    else add_outer<G, H, V, kNorm, false>(sum, b, unit, group, column);
  }
  partials += (write ? b.sums.write : b.sums.read) + group * kRankGroup * b.a.width;
#pragma unroll
  for (int j = 0; j < kRankGroup; ++j) {
    if (group * kRankGroup + j >= b.a.form.rank) break;
    combine_warps(sum[j], shared, partials + j * b.a.width, tile, b.a.width);
  }
}

// d_read and d_write first: the vector sums' loads leave L2 as they go.
template <class G, class H, int V, bool kNorm>
int run_columns(const Backward& b, void* stream) {
  OuterItems items(b, V);
  int error = 0;
  if (items.all) error = launch(outer_sums<G, H, V, kNorm>, column_shape(b.units, items.all, V), stream, b);
  if (error || b.fused || !wants_vectors(b.sums)) return error;
  return launch(column_sums<G, H, V, kNorm>, column_shape(b.units, items.tiles, V), stream, b,
                static_cast<unsigned>(items.tiles));
}

template <bool kNorm>
int run_backward(const Backward& b, void* stream) {
  const EditAddNormBackwardArgs& a = b.a;
  if (b.sums.size && a.form.slot && !a.slot_order.order && a.rows) return cudaErrorInvalidValue;
  return with_types(a.x_dtype, a.residual_dtype, [&](auto narrow, auto wider) {
    using H = typename decltype(narrow)::type;
    using G = typename decltype(wider)::type;
    constexpr int V = vector_width(sizeof(G));
    int error = 0;
    if (b.rows_kernel) {
      error = b.vector == 1 ? run_loop<kNorm>(b, stream) : run_unit<G, H, V, kNorm>(b, stream);
    }
    if (!error) {
      error = b.vector == 1 ? run_columns<Any, Any, 1, kNorm>(b, stream)
                            : run_columns<G, H, V, kNorm>(b, stream);
    }
    return error ? error : reduce_units(b, stream);
  });
}

}  // namespace
}  // namespace fastedit::cuda
