// Vector sums down the columns, over pieces of at most kBlockRows rows:
//   scale Σ k total⊙h   bias Σ k total   weight Σ grad_normed⊙unit   norm_bias Σ grad_normed
//
// Streams: grad and hidden in; at rank 0 without a norm also d_x out, so that the whole backward is one pass.
// With a norm only the scalar path comes here, after backward_rows.h, whatever the width and alignment.
// Grid: column tiles × pieces. A lane owns V columns and keeps their fp32 sums in registers; a block's eight
// warps take every eighth of the piece's rows of a slot, one slot after another, and their sums are added as a tree
// (backward_outer.h's, too). The order of every addition follows from the row's place among those of its piece and slot.
#pragma once
#include "backward_streams.h"
#include "combine.h"
#include "plain.h"

namespace fastedit::cuda {
namespace {

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
    if (b.left.scale >= 0 && unit.inside) streams.template load_h<kOnce>(b, row, column);
  }

  __device__ void add(float (&sum)[kNorm ? 4 : 2][V], const Backward& b, const Unit& unit,
                      const float (&gain)[V], const float (&scale)[V], int64_t column) {
    float total[V], h[V] = {};
    streams.get_total(total, b.a, norm, gain);
    if (b.left.scale >= 0 && unit.inside) streams.get_h(h, b);
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

template <class G, class H, int V, bool kNorm, bool kPlain>
__global__ void __launch_bounds__(kLaneColumns* kLines, 2) column_sums(const Backward given, unsigned tiles) {
  const Backward b = plain_columns<kPlain>(given);
  constexpr int kFlight = kNorm ? 2 : 4, kSums = kNorm ? 4 : 2;
  FASTEDIT_SHARED(shared);
  const EditAddNormBackwardArgs& a = b.a;
  int64_t piece = blockIdx.x / tiles, tile = blockIdx.x % tiles, column = (tile * kLaneColumns + lane()) * V;
  bool all_rows = b.columns_d_x || b.left.weight >= 0 || b.left.norm_bias >= 0;
  float sum[kSums][V] = {}, scale[V], gain[V] = {};
  bool valid = column < a.width;
  if (kNorm && valid) load_gain<G, V>(gain, a.weight, a.kind, column, a.residual_dtype);
  each_slot(b, b.later.cut, piece, [&](const Unit& unit) {
    if (!unit.inside && !all_rows) return;
    if (valid) load_parameters(scale, a.form.scale, unit.slot * a.width + column, 1.f);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[0][v] = sum[1][v] = 0.f;
    const int count = valid ? unit.count : 0;
    for (int first = warp(); first < count; first += kLines * kFlight) {
      ColumnRow<G, H, V, kNorm> rows[kFlight];
#pragma unroll
      for (int i = 0; i < kFlight; ++i) {
        if (first + i * kLines < count) rows[i].load(b, unit, first + i * kLines, column);
      }
#pragma unroll
      for (int i = 0; i < kFlight; ++i) {
        if (first + i * kLines < count) rows[i].add(sum, b, unit, gain, scale, column);
      }
    }
    if (!unit.inside) return;
    float* partials = partials_of_unit(b, piece, unit);
    if (b.left.scale >= 0) combine_warps(sum[0], shared, partials + b.left.scale, tile, a.width);
    if (b.left.bias >= 0) combine_warps(sum[1], shared, partials + b.left.bias, tile, a.width);
  });
  if constexpr (kNorm) {
    float* partials = b.later.of(piece);  // of all slots
    if (b.left.weight >= 0) combine_warps(sum[2], shared, partials + b.left.weight, tile, a.width);
    if (b.left.norm_bias >= 0) combine_warps(sum[3], shared, partials + b.left.norm_bias, tile, a.width);
  }
}

template <class G, class H, int V, bool kNorm>
int run_columns(const Backward& b, void* stream) {
  if (!b.left.vectors()) return 0;
  int64_t tiles = column_tiles(b.a.width, V);
  Shape shape = column_shape(b.later.cut.pieces, tiles, V);
  if constexpr (sizeof(G) == 2 && sizeof(H) == 2 && V > 1 && !kNorm) {
    if (plain_columns(b))
      return launch(column_sums<G, H, V, false, true>, shape, stream, b, static_cast<unsigned>(tiles));
  }
  return launch(column_sums<G, H, V, kNorm, false>, shape, stream, b, static_cast<unsigned>(tiles));
}

}  // namespace
}  // namespace fastedit::cuda
