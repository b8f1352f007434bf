// moments: count, mean and M2 = Σ (h − mean)² of each group's rows, a column at a time, in one pass
//
// Streams: hidden in; (groups, width) out. Threads over fixed blocks of a group's rows (sums.h). A block sums d and d²
// in fp64, d = h − the block's first row, so that nothing cancels where the mean is large beside the deviations;
// blocks are merged in row order by Chan's formula. The order depends on the rows and groups alone.
#include "cpu/sums.h"
#include "cpu/widen.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

constexpr int64_t kMomentTile = 512;  // columns whose 2 × 8 bytes of sums stay in the first cache

struct MomentSums {
  float shift[kMomentTile];
  double sum[kMomentTile], squares[kMomentTile];
};

inline void add_one(MomentSums& t, const float* h, int64_t c) {
  const double d = static_cast<double>(h[c]) - t.shift[c];
  t.sum[c] += d;
  t.squares[c] += d * d;
}

// N rows: the sums are read and written once for all of them.
template <int N>
inline void add_deviations(MomentSums& t, const float* const (&h)[N], int64_t count) {
  int64_t c = 0;
  for (; c + kHalf <= count; c += kHalf) {
    const Double shift = load_double(t.shift + c);
    Double sum = load_as<Double>(t.sum + c), squares = load_as<Double>(t.squares + c);
    for (int r = 0; r < N; ++r) {
      const Double d = load_double(h[r] + c) - shift;
      sum += d;
      squares += d * d;
    }
    memcpy(t.sum + c, &sum, sizeof sum);
    memcpy(t.squares + c, &squares, sizeof squares);
  }
  for (; c < count; ++c) {
    for (int r = 0; r < N; ++r) add_one(t, h[r], c);
  }
}

// A block's mean and M2 over its rows [first, last), one column tile.
void block_moments(const MomentsArgs& a, const ColumnSums& blocks, int64_t block, int64_t column, int64_t count,
                   double* mean, double* m2) {
  MomentSums t;
  float space[kGroup][kMomentTile];
  const int64_t first = blocks.first(block), last = blocks.last(block);
  auto row = [&](int64_t i, float* to) {
    return widen(a.dtype, a.hidden, blocks.row(i) * a.hidden_stride + column, to, count);
  };
  memcpy(t.shift, row(first, space[0]), static_cast<size_t>(count) * sizeof(float));
  memset(t.sum, 0, sizeof t.sum);
  memset(t.squares, 0, sizeof t.squares);
  int64_t i = first;
  for (; i + kGroup <= last; i += kGroup) {
    const float* h[kGroup];
    for (int r = 0; r < kGroup; ++r) h[r] = row(i + r, space[r]);
    add_deviations(t, h, count);
  }
  for (; i < last; ++i) {
    const float* const h[1] = {row(i, space[0])};
    add_deviations(t, h, count);
  }
  const double rows = static_cast<double>(last - first);
  for (int64_t c = 0; c < count; ++c) {
    const double shifted = t.sum[c] / rows, left = t.squares[c] - t.sum[c] * shifted;
    mean[c] = t.shift[c] + shifted;
    m2[c] = left < 0 ? 0 : left;
  }
}

inline void store_pair(float* out, int64_t at, int64_t low, double value) {
  out[at] = static_cast<float>(value);
  const double rest = value - out[at];
  out[at + low] = rest == rest ? static_cast<float>(rest) : 0.0f;  // inf − inf
}

// A group's blocks, one column: Chan's merge in row order.
void merge_blocks(const MomentsArgs& a, const ColumnSums& blocks, const double* partial, int64_t begin, int64_t end,
                  int64_t group, int64_t c) {
  double count = 0, mean = 0, m2 = 0;
  for (int64_t b = begin; b < end; ++b) {
    const double* at = partial + b * 2 * a.width;
    const double rows = static_cast<double>(blocks.last(b) - blocks.first(b));
    const double delta = at[c] - mean, share = rows / (count + rows);
    mean = b == begin ? at[c] : mean + delta * share;
    m2 += at[a.width + c] + (b == begin ? 0 : delta * delta * count * share);
    count += rows;
  }
  const int64_t low = a.groups * a.width, at = group * a.width + c;
  store_pair(a.mean, at, low, mean);
  store_pair(a.m2, at, low, m2);
}

}  // namespace

int64_t moments_workspace(const MomentsArgs&) { return 0; }

int moments(const MomentsArgs& a, void*, void*) {
  const bool sorted = a.group_order.order;
  const ColumnSums blocks = sorted ? ColumnSums(a.group_order, a.groups, 0) : ColumnSums(a.rows, 0);
  const int64_t count = blocks.blocks(), tiles = (a.width + kMomentTile - 1) / kMomentTile;
  double* partial = static_cast<double*>(malloc(static_cast<size_t>(count * a.width + 1) * 2 * sizeof(double)));
  if (!partial) return kOutOfMemory;
  each_task(count, a.rows * a.width, [&](int64_t block) {
    double* to = partial + block * 2 * a.width;
    for (int64_t c = 0; c < a.width; c += kMomentTile) {
      const int64_t columns = c + kMomentTile < a.width ? kMomentTile : a.width - c;
      block_moments(a, blocks, block, c, columns, to + c, to + a.width + c);
    }
  });
  each_task(a.groups * tiles, count * a.width, [&](int64_t task) {
    const int64_t group = task / tiles, c = task % tiles * kMomentTile;
    const int64_t begin = sorted ? a.group_order.block_first[group] : 0;
    const int64_t end = sorted ? a.group_order.block_first[group + 1] : count;
    const int64_t stop = c + kMomentTile < a.width ? c + kMomentTile : a.width;
    for (int64_t i = c; i < stop; ++i) merge_blocks(a, blocks, partial, begin, end, group, i);
  });
  free(partial);
  return 0;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
