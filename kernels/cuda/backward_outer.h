// Sums down the columns that a rank above 0 has, where the unit kernel leaves them over or does not run:
//   read Σ q h   offset Σ q   write Σ k z total
//
// Streams: h for d_read, total for d_write, each from HBM once and from L2 for each further group of eight ranks.
// Grid: column tiles × groups of eight ranks × pieces. A lane owns V columns and keeps eight sums of each in
// registers; warps take every eighth of the piece's rows of a slot, one slot after another, and their sums are added as a
// tree (combine.h). The order of every addition follows from the row's place among those of its piece and slot.
#pragma once
#include "backward_streams.h"
#include "combine.h"

namespace fastedit::cuda {
namespace {

constexpr int kRankGroup = 8;

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
template <class G, class H, int V, bool kWrite>
__device__ inline void add_outer(float (&sum)[kRankGroup][V], const Backward& b, const Unit& unit, int group,
                                 int64_t column) {
  constexpr int kFlight = 2;
  const EditAddNormBackwardArgs& a = b.a;
  const float* coefficient = kWrite ? a.z : b.q;
  int64_t rank = a.form.rank, ranks = min(int64_t{kRankGroup}, rank - group * kRankGroup);
  if (!coefficient || (kWrite && !b.has_grad)) return;
  const float gain[V] = {};
  for (int first = warp(); first < unit.count; first += kLines * kFlight) {
    RowStreams<G, H, V, false> streams[kFlight];
    float c[kFlight][kRankGroup] = {};
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (first + i * kLines >= unit.count) continue;
      int64_t row = unit.row(first + i * kLines);
      if (kWrite) streams[i].template load_total<kL2>(a, row, column);
      else streams[i].template load_h<kL2>(b, row, column);
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
      if (kWrite) streams[i].get_total(value, a, {}, gain);
      else streams[i].get_h(value, b);
#pragma unroll
      for (int j = 0; j < kRankGroup; ++j)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[j][v] = fmaf(c[i][j], value[v], sum[j][v]);
    }
  }
}

// Items of a piece, in the order of their block numbers: d_read's tiles × groups, d_write's, d_offset. A
// tile's groups are neighbours, so that all but the first find the rows in L2.
struct OuterItems {
  unsigned tiles, groups, read, write, all;
  __host__ __device__ OuterItems(const Backward& b, int vector)
      : tiles(static_cast<unsigned>((b.a.width + kLaneColumns * vector - 1) / (kLaneColumns * vector))),
        groups(static_cast<unsigned>((b.a.form.rank + kRankGroup - 1) / kRankGroup)),
        read(b.left.read >= 0 ? tiles * groups : 0),
        write(b.left.write >= 0 ? tiles * groups : 0),
        all(read + write + (b.left.offset >= 0)) {}
};

template <class G, class H, int V>
__global__ void __launch_bounds__(kLaneColumns* kLines, 2) outer_sums(const Backward b) {
  FASTEDIT_SHARED(shared);
  OuterItems items(b, V);
  unsigned item = blockIdx.x % items.all;
  bool write = item >= items.read;
  if (write) item -= items.read;
  int group = static_cast<int>(item % items.groups);
  int64_t tile = item / items.groups, column = (tile * kLaneColumns + lane()) * V;
  int64_t piece = blockIdx.x / items.all;
  each_slot(b, b.later.cut, piece, [&](const Unit& unit) {
    if (!unit.inside) return;
    if (write && item == items.write) return offset_sums(b, unit, partials_of_unit(b, piece, unit) + b.left.offset);
    float sum[kRankGroup][V] = {};
    if (column < b.a.width) {
      if (write) add_outer<G, H, V, true>(sum, b, unit, group, column);
      else add_outer<G, H, V, false>(sum, b, unit, group, column);
    }
    float* partials = partials_of_unit(b, piece, unit);
    partials += (write ? b.left.write : b.left.read) + group * kRankGroup * b.a.width;
#pragma unroll
    for (int j = 0; j < kRankGroup; ++j) {
      if (group * kRankGroup + j >= b.a.form.rank) break;
      combine_warps(sum[j], shared, partials + j * b.a.width, tile, b.a.width);
    }
  });
}

template <class G, class H, int V>
int run_outer(const Backward& b, void* stream) {
  OuterItems items(b, V);
  if (items.all == 0) return 0;
  return launch(outer_sums<G, H, V>, column_shape(b.later.cut.pieces, items.all, V), stream, b);
}

}  // namespace
}  // namespace fastedit::cuda
