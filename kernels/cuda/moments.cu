// moments: mean and M2 = Σ (h − mean)² of each group's rows, a column at a time, in one pass
//
// Streams: hidden in; (2, 2, groups, width) floats out. Partials: three floats a column of a block of kBlockRows rows.
// Grid: column tiles × blocks of a group's rows, then a thread for a column of a group. A lane owns V columns; a block's
// eight warps take every eighth row, four of them in flight.
// fp32 is enough because nothing cancels: a block sums d and d², d = h − the mean of its first 32 rows (of one row it
// would not do: the first token of a sequence can be a thousand times its neighbours). Blocks are merged by Chan's
// formula in row order, mean and M2 each as an unevaluated sum of two floats. The order of every addition follows from
// the row's place in its group alone.
#include "combine.h"
#include "run.h"

namespace fastedit::cuda {
namespace {

constexpr int kFlight = 4, kSample = kFlight * kLines;  // rows in flight in a warp, and in a block

struct MomentBlock {
  int64_t first;
  int count;
};

__device__ inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Blocks are numbered group by group; those beyond the last have no rows.
__device__ inline MomentBlock moment_block(const MomentsArgs& a, int64_t block) {
  const SlotOrder& order = a.group_order;
  int64_t first = block * kBlockRows, end = a.rows;
  if (order.order) {
    if (block >= __ldg(order.block_first + a.groups)) return {0, 0};
    int64_t low = 0, high = a.groups;
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      if (__ldg(order.block_first + middle) <= block) low = middle;
      else high = middle;
    }
    first = __ldg(order.first + low) + (block - __ldg(order.block_first + low)) * kBlockRows;
    end = __ldg(order.first + low + 1);
  }
  return {first, static_cast<int>(at_most(kBlockRows, end - first))};
}

// Every warp gets the block's sums of its lanes' columns.
template <int V>
__device__ inline void sum_warps(float (&sum)[V], float* shared) {
  constexpr int kColumns = kLaneColumns * V;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; ++v) shared[warp() * kColumns + lane() * V + v] = sum[v];
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float w[kLines];
#pragma unroll
    for (int line = 0; line < kLines; ++line) w[line] = shared[line * kColumns + lane() * V + v];
    sum[v] = sum_of_eight(w);
  }
}

template <int V>
__device__ inline void store_floats(float* out, const float (&value)[V]) {
  if constexpr (V == 1) put(out, value[0]);
  else {
#pragma unroll
    for (int i = 0; i < V; i += 4)
      put(reinterpret_cast<uint4*>(out + i),
          make_uint4(__float_as_uint(value[i]), __float_as_uint(value[i + 1]), __float_as_uint(value[i + 2]),
                     __float_as_uint(value[i + 3])));
  }
}

// body(h) for the warp's rows among the kSample of a block from `base` on, all loaded before the first is used.
template <Hint hint, class T, int V, class Body>
__device__ inline void each_row(const MomentsArgs& a, const MomentBlock& block, int base, int64_t column, Body body) {
  Pack<T, V> rows[kFlight];
#pragma unroll
  for (int i = 0; i < kFlight; ++i) {
    int at = base + warp() + i * kLines;
    if (at >= block.count || column >= a.width) continue;
    int64_t row = a.group_order.order ? __ldg(a.group_order.order + block.first + at) : block.first + at;
    rows[i] = load<hint, T, V>(a.hidden, row * a.hidden_stride + column, a.dtype);
  }
#pragma unroll
  for (int i = 0; i < kFlight; ++i) {
    if (base + warp() + i * kLines >= block.count || column >= a.width) continue;
    float h[V];
    unpack<T, V>(rows[i], h, a.dtype);
    body(h);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kLaneColumns* kLines, 2)
    moment_sums(const MomentsArgs a, float* partials, unsigned tiles) {
  FASTEDIT_SHARED(shared);
  int64_t number = blockIdx.x / tiles, column = (int64_t{blockIdx.x % tiles} * kLaneColumns + lane()) * V;
  MomentBlock block = moment_block(a, number);
  if (block.count == 0) return;
  float shift[V] = {}, sum[V] = {}, squares[V] = {};
  each_row<kL2, T, V>(a, block, 0, column, [&](const float (&h)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) shift[v] += h[v];
  });
  sum_warps(shift, shared);
#pragma unroll
  for (int v = 0; v < V; ++v) shift[v] /= static_cast<float>(min(kSample, block.count));
  for (int base = 0; base < block.count; base += kSample) {
    each_row<kOnce, T, V>(a, block, base, column, [&](const float (&h)[V]) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float d = h[v] - shift[v];
        sum[v] += d;
        squares[v] = fmaf(d, d, squares[v]);
      }
    });
  }
  float* out = partials + number * 3 * a.width;
  if (column < a.width && warp() == 0) store_floats(out + column, shift);
  combine_warps(sum, shared, out + a.width, blockIdx.x % tiles, a.width);
  combine_warps(squares, shared, out + 2 * a.width, blockIdx.x % tiles, a.width);
}

// high + low, high the nearest float.
struct Exact {
  float high = 0.f, low = 0.f;
  __device__ void set(float a, float b) {
    high = a + b;
    float part = high - a;
    low = (a - (high - part)) + (b - part);
  }
  __device__ void add(float value) {
    Exact next;
    next.set(high, value);
    set(next.high, next.low + low);
  }
};

__global__ void __launch_bounds__(256) moment_merge(const MomentsArgs a, const float* partials, unsigned tiles) {
  int64_t group = blockIdx.x / tiles, column = int64_t{blockIdx.x % tiles} * blockDim.x + threadIdx.x;
  if (column >= a.width) return;
  const SlotOrder& order = a.group_order;
  int64_t begin = order.order ? __ldg(order.block_first + group) : 0;
  int64_t end = order.order ? __ldg(order.block_first + group + 1) : (a.rows + kBlockRows - 1) / kBlockRows;
  int64_t total = order.order ? __ldg(order.first + group + 1) - __ldg(order.first + group) : a.rows;
  Exact mean, m2;
  for (int64_t b = begin; b < end; ++b) {
    const float* at = partials + b * 3 * a.width + column;
    int64_t before = (b - begin) * kBlockRows, rows = at_most(kBlockRows, total - before);
    float shift = __ldcs(at), sum = __ldcs(at + a.width), shifted = sum / static_cast<float>(rows);
    if (before == 0) mean.set(shift, shifted);
    else {
      float delta = (shift - mean.high) + (shifted - mean.low);
      float share = static_cast<float>(rows) / static_cast<float>(before + rows);
      mean.add(delta * share);
      m2.add(delta * delta * (static_cast<float>(before) * share));
    }
    float left = fmaf(-sum, shifted, __ldcs(at + 2 * a.width));
    m2.add(left < 0.f ? 0.f : left);  // rounding; a NaN stays
  }
  int64_t low = a.groups * a.width, at = group * a.width + column;
  a.mean[at] = mean.high, a.mean[at + low] = mean.low;
  a.m2[at] = m2.high, a.m2[at + low] = m2.low;
}

int64_t moment_blocks(const MomentsArgs& a) {
  return ceil_div(a.rows, kBlockRows) + (a.group_order.order ? least(a.groups, a.rows) : 0);
}

template <class T, int V>
int run_sums(const MomentsArgs& a, float* partials, void* stream) {
  int64_t tiles = column_tiles(a.width, V);
  return launch(moment_sums<T, V>, column_shape(moment_blocks(a), tiles, V), stream, a, partials,
                static_cast<unsigned>(tiles));
}

}  // namespace

int64_t moments_workspace(const MomentsArgs& a) {
  return moment_blocks(a) * 3 * a.width * static_cast<int64_t>(sizeof(float));
}

int moments(const MomentsArgs& a, void* workspace, void* stream) {
  float* partials = static_cast<float*>(workspace);
  int vector = Alignment(a.rows, a.width, a.dtype).stream(a.hidden, a.hidden_stride, a.dtype).parameter(partials).vector;
  int error = with_types(a.dtype, a.dtype, [&](auto type, auto) {
    using T = typename decltype(type)::type;
    if (vector == 1) return run_sums<Any, 1>(a, partials, stream);
    return run_sums<T, vector_width(sizeof(T))>(a, partials, stream);
  });
  if (error) return error;
  int64_t tiles = ceil_div(a.width, 256);
  return launch(moment_merge, Shape{a.groups * tiles, 256, 0}, stream, a, partials, static_cast<unsigned>(tiles));
}

}  // namespace fastedit::cuda
