// The backward of four ranks with its products on tensor cores (tensor.h): backward_unit.h's formulas, streams, leaves and
// partials for the calls that plain.h names, in tiles of eight rows. Compiled with FASTEDIT_TENSOR, which is off until a
// GPU has shown a gain.
//
// Behind a norm total = grad_residual + rstd (g − rstd dot r), with g = grad_normed ⊙ weight and r = residual_out, so that
//   total @ writeᵀ = grad_residual @ writeᵀ + rstd (grad_normed @ (weight ⊙ write)ᵀ − rstd dot r @ writeᵀ),
// three products of 16-bit operands, and dot comes from the same pass. In the second pass, when q is known, total is fp32.
//
// Streams: grad_residual, which waits for the second pass in shared memory, and h once; the norm's two once from memory and
// once more, soon after, from L2. d_x and d_residual out. Parameters once for eight rows.
// Grid: a block a run of leaves (backward.h). A warp takes 64 columns of a tile at a time. In the first pass a thread has a
// row and 8 + 8 columns. In the second it has two rows and eight columns, and of the ranks' sums one of eight and 16 columns,
// which are its own from row to row; of d_scale and d_bias eight lanes have eight columns each.
// Rows are added eight at a time within a product, whose order is the hardware's and the same in every run, and then one tile
// after another.
#ifdef FASTEDIT_TENSOR
#include "backward_streams.h"
#include "combine.h"
#include "plain.h"
#include "tensor.h"

namespace fastedit::cuda {
namespace {

constexpr int kTensorRanks = 4, kSums = 2 * kTensorRanks + 2, kV = 8, kVectors = kTensorColumns / kV;

// In shared memory: q and z of each rank and row of a tile, a norm's rstd and dot of each row, Σ q, and the warps' shares of
// what is summed along the rows.
struct RowSums {
  float *q, *z, *norm, *offset, *share;
  __device__ explicit RowSums(float* shared)
      : q(shared), z(q + kTensorRanks * kTensorRows), norm(z + kTensorRanks * kTensorRows), offset(norm + 2 * kTensorRows),
        share(offset + kTensorRanks * kTensorRows) {}
};

template <class T, bool kNorm>
struct TensorTile {
  using Vector = Pack<T, kV>;
  static constexpr int kShares = (kNorm ? 2 * kTensorRanks + 1 : kTensorRanks) * kTensorRows;  // of a warp
  const Backward& b;
  RowSums rows;
  float4* sums;  // of all warps: 64 columns take kSums × 16
  uint4* stage;  // of all warps: 64 columns take 64 vectors, by the row's last bit, the vector, and the row's other bits
  int first, end, live;  // rows of the tile: first … first + live, of those before end
  const int group = lane() / 4, member = lane() % 4;

  // The warp's 64 columns number i of b.unit.chunks, as many for every warp.
  __device__ int chunk_at(int i) const { return i * warps() + warp(); }
  template <class P>
  __device__ P* at(P* data, int64_t stride, int row, int column) const {
    return row_at<T, true>(data, first + row, stride, column);
  }
  __device__ Vector& cell(int chunk, int row, int vector) const {
    return *reinterpret_cast<Vector*>(stage + (chunk * 2 + row % 2) * kWarp + vector * 4 + row / 2);
  }
  // A pass's vectors of 64 columns that come from memory, asked for while those before them are worked on; zeros where the
  // tile has no such row.
  struct Streams {
    Vector x[2], normed[2], out[2];
  };
  __device__ Streams first_streams(int i) const {
    Streams s{};
    const int row = row_at_n(group);
    if constexpr (kNorm) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row >= live || i >= b.unit.chunks) continue;
        const int column = chunk_at(i) * kTensorColumns + (member + 4 * half) * kV;
        s.normed[half] = load<kL2, T, kV>(at(b.a.grad_normed, b.a.grad_normed_stride, row, column), 0, 0);
        s.out[half] = load<kL2, T, kV>(at(b.a.residual_out, b.a.width, row, column), 0, 0);
      }
    }
    return s;
  }

  // The warp's shares of what is summed along the rows. Group g has rank g % 4 as m and, behind a norm from group 4 on, the
  // weighted one; n is a row: those of 16 lanes that read the stage together lie in different banks.
  static __device__ int row_at_n(int n) { return n % 4 * 2 + n / 4; }
  __device__ void pull() const {
    const EditAddNormBackwardArgs& a = b.a;
    const int row = row_at_n(group);
    float pulled[3][4] = {}, dot = 0.f;  // with grad_residual, grad_normed, residual_out
    Streams next = first_streams(0);
#pragma unroll 1
    for (int c = 0; c < b.unit.chunks; ++c) {
      const int chunk = chunk_at(c);
      const Streams now = next;
      next = first_streams(c + 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int vector = member + 4 * half, column = chunk * kTensorColumns + vector * kV;
        float value[kNorm ? 3 : 1][kV], write[kV], gain[kV], share[3][4] = {};
        unpack<T, kV>(cell(chunk, row, vector), value[0], 0);
        load_vector(write, a.form.write + (group % 4) * static_cast<int>(a.width) + column);
        if constexpr (kNorm) {
          unpack<T, kV>(now.normed[half], value[1], 0), unpack<T, kV>(now.out[half], value[2], 0);
          load_gain<T, kV>(gain, a.weight, a.kind, column, 0);
#pragma unroll
          for (int v = 0; v < kV; ++v) {
            dot = fmaf(value[1][v] * gain[v], value[2][v], dot);
            write[v] *= group < 4 ? 1.f : gain[v];
          }
        }
#pragma unroll
        for (int v = 0; v < kV; v += 2) {
          const Parts even = parts(write[v]), odd = parts(write[v + 1]);
#pragma unroll
          for (int i = 0; i < (kNorm ? 3 : 1); ++i)
            multiply(share[i], even.high, even.low, odd.high, odd.low, value[i][v], value[i][v + 1]);
        }
#pragma unroll
        for (int i = 0; i < (kNorm ? 3 : 1); ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) pulled[i][j] += share[i][j];
      }
    }
    leave_shares(pulled, dot);
  }
  __device__ void leave_shares(const float (&pulled)[3][4], float dot) const {
    float found[4] = {pulled[0][0] + pulled[0][2], pulled[0][1] + pulled[0][3]};
    if constexpr (kNorm) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row_at_n(2 * member + i);
        const float weighted = __shfl_xor_sync(kAllLanes, pulled[1][i] + pulled[1][i + 2], 16);
        found[i] = fmaf(rstd(row), weighted, found[i]);
        found[2 + i] = pulled[2][i] + pulled[2][i + 2];
      }
      dot += __shfl_xor_sync(kAllLanes, dot, 1);
      dot += __shfl_xor_sync(kAllLanes, dot, 2);
    }
    float* place = rows.share + warp() * kShares;
#pragma unroll
    for (int i = 0; i < (kNorm ? 4 : 2); ++i) {  // rows 0 and 2 of a lane's first one on
      const int of_rank = group + i / 2 * kTensorRanks;
      if (group < kTensorRanks) place[of_rank * kTensorRows + row_at_n(2 * member) + i % 2 * 2] = found[i];
    }
    if (kNorm && member == 0) place[2 * kTensorRanks * kTensorRows + row_at_n(group)] = dot;
    __syncthreads();
  }
  __device__ float rstd(int row) const { return row < live ? __ldg(b.a.rstd + first + row) : 0.f; }

  // q and z of the tile's rows, 0 where a row is absent, and a norm's dot: a lane of the first warp for each rank and row.
  __device__ void finish_rows() const {
    if (warp() == 0) {
      const int j = lane() / kTensorRows, r = lane() % kTensorRows;
      auto sum = [&](int i) {
        float sum = 0.f;
#pragma unroll 4
        for (int w = 0; w < warps(); ++w) sum += rows.share[w * kShares + i * kTensorRows + r];
        return sum;
      };
      float q = sum(j);
      if constexpr (kNorm) {
        const float of_row = rstd(r), dot = __fdividef(sum(2 * kTensorRanks) * of_row, static_cast<float>(b.a.width));
        q = fmaf(-of_row * of_row * dot, sum(kTensorRanks + j), q);
        if (j == 0) rows.norm[2 * r] = of_row, rows.norm[2 * r + 1] = dot;
      }
      const int64_t at = int64_t{first + r} * kTensorRanks + j;
      if (b.a.grad_z && r < live) q += __ldg(b.a.grad_z + at);
      q = r < live ? q : 0.f;
      rows.offset[lane()] += q;
      rows.q[lane()] = q, rows.z[lane()] = b.a.z && r < live ? __ldg(b.a.z + at) : 0.f;
    }
    __syncthreads();
  }

  // Where the lane's vector of row 2 member begins, which the second pass steps from; of the tile that is next or under way.
  struct Places {
    const char *grad, *x, *normed, *out;
    char *d_x, *d_residual;
  };
  __device__ Places places() const {
    const EditAddNormBackwardArgs& a = b.a;
    auto place = [&](auto data, int64_t stride) { return at(data, stride, 2 * member, group * kV); };
    Places p{};
    p.grad = static_cast<const char*>(place(a.grad_residual, a.grad_residual_stride));
    p.x = static_cast<const char*>(place(a.x, a.x_stride)), p.d_x = static_cast<char*>(place(a.d_x, a.width));
    if constexpr (!kNorm) return p;
    p.normed = static_cast<const char*>(place(a.grad_normed, a.grad_normed_stride));
    p.out = static_cast<const char*>(place(a.residual_out, a.width));
    p.d_residual = static_cast<char*>(place(a.d_residual, a.width));
    return p;
  }
  template <class P>
  __device__ static P* step(P* place, int64_t stride, int r, int chunk) {
    return row_at<T, true>(place + chunk * (kTensorColumns * sizeof(T)), r, stride, 0);
  }
  __device__ Streams second_streams(const Places& p, int i) const {
    Streams s{};
    const int there = i < b.unit.chunks ? live - 2 * member : 0;  // rows of the two
    auto take = [&](Vector& vector, const char* place, int64_t stride, int r) {
      if (r < there) vector = load<kOnce, T, kV>(step(place, stride, r, chunk_at(i)), 0, 0);
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      take(s.x[r], p.x, b.a.x_stride, r);
      if constexpr (kNorm) take(s.normed[r], p.normed, b.a.grad_normed_stride, r), take(s.out[r], p.out, b.a.width, r);
    }
    return s;
  }
  __device__ void give(const float (&value)[kV], char* place, int r, int chunk) const {
    if (2 * member + r < live) store<T, kV>(step(place, b.a.width, r, chunk), 0, round_to<T, kV>(value, 0), 0);
  }
  // The thread's vectors of grad_residual, `ahead` rows below the tile's.
  __device__ void ask_for(const Places& p, int ahead, int chunk) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      copy_async(&cell(chunk, 2 * member + r, group), step(p.grad, b.a.grad_residual_stride, ahead + r, chunk),
                 first + ahead + 2 * member + r < end);
  }

  // What the second pass multiplies by: of rows 2 member and 2 member + 1, q and z of rank group % 4 as A, with ones in place of
  // z where the rank is q's; q of rank `member` and row `group` as B; rstd and a norm's dot.
  struct Weights {
    Parts q[2], z[2], of_read;
    float norm[4];
  };
  __device__ Weights weights() const {
    Weights w;
    const int own = group % kTensorRanks * kTensorRows + 2 * member;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      w.q[r] = parts(rows.q[own + r]), w.z[r] = group < kTensorRanks ? Parts{1.f, 0.f, 0.f} : parts(rows.z[own + r]);
    w.of_read = parts(rows.q[member * kTensorRows + group]);
    if constexpr (kNorm) load_shared(w.norm, rows.norm + 4 * member);
    return w;
  }

  // q @ read of two rows and eight columns.
  __device__ void add_ranks(float (&added)[2][kV], const Parts& q, int column) const {
    float read[kV];
    load_vector(read, b.a.form.read + member * static_cast<int>(b.a.width) + column);
#pragma unroll
    for (int v = 0; v < kV; v += 2) {
      const Parts even = cut(read[v]), odd = cut(read[v + 1]);
      float sum[4] = {};
      multiply(sum, even.high, odd.high, q.low);
      multiply(sum, even.low, odd.low, q.high);
      multiply(sum, even.high, odd.high, q.high);
      added[0][v] = sum[0], added[1][v] = sum[1], added[0][v + 1] = sum[2], added[1][v + 1] = sum[3];
    }
  }

  __device__ void finish(int i, const Places& p, const Weights& w, Streams& next) const {
    const EditAddNormBackwardArgs& a = b.a;
    const int chunk = chunk_at(i), column = chunk * kTensorColumns + group * kV;
    const Streams now = next;
    next = second_streams(p, i + 1);
    float total[2][kV], h[2][kV], gain[kV], scale[kV], added[2][kV];
    if constexpr (kNorm) load_gain<T, kV>(gain, a.weight, a.kind, column, 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      unpack<T, kV>(cell(chunk, 2 * member + r, group), total[r], 0);
      if constexpr (kNorm) {
        const NormRow norm{0.f, w.norm[2 * r], w.norm[2 * r + 1], 0.f};
        float g[kV], out[kV];
        unpack<T, kV>(now.normed[r], g, 0), unpack<T, kV>(now.out[r], out, 0);
#pragma unroll
        for (int v = 0; v < kV; ++v) total[r][v] += norm.gradient(g[v] * gain[v], out[v]);
        give(total[r], p.d_residual, r, chunk);
      }
    }
    ask_for(p, kTensorRows, chunk);
    add_ranks(added, w.of_read, column);
    load_vector(scale, a.form.scale + column);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int v = 0; v < kV; ++v) added[r][v] = fmaf(scale[v], total[r][v], added[r][v]);
      give(added[r], p.d_x, r, chunk);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) unpack<T, kV>(now.x[r], h[r], 0);
    add_sums(sums + chunk * kSums * 16, w, total, h);
  }

  // total's parts in a product: one where it is 16 bits wide.
  static constexpr int kParts = kNorm ? 3 : 1;
  __device__ static void split(float (&factor)[kParts][2], const float (&total)[2][kV], int v) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[0][r] = total[r][v];
      if constexpr (kNorm) {
        const Parts all = parts(total[r][v]);
        factor[0][r] = all.high, factor[1][r] = all.low, factor[2][r] = all.rest;
      }
    }
  }
  // The lanes whose group is one of the two columns n that they have of a sum: 0, 4, 9, 13, 18, 22, 27, 31.
  __device__ bool diagonal() const { return group / 2 == member; }

  // Where four of the columns' sums lie: of rank and vectors 2 member + n, of the lane's own vector, of vectors 2 member + n.
  __device__ int rank_cell(int half, int n) const { return (half * 2 + n) * kWarp + lane(); }
  __device__ int scale_cell(int half) const { return 4 * kWarp + half * kVectors + group; }
  __device__ int bias_cell(int half, int n) const { return 4 * kWarp + (2 + half) * kVectors + 2 * member + n; }

  // For each column v of a vector, with n = vector: d_read with m = rank, d_bias and d_write with m below 4 and from 4 on, the
  // low parts 8 further on; with m = vector, of the next column from 8 on, d_scale is the diagonal of hᵀ total.
  __device__ void add_sums(float4* at, const Weights& w, const float (&total)[2][kV], const float (&h)[2][kV]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float rank[2][4], bias[2][4], scale[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int v = 4 * half + i;
        float factor[kParts][2], of_h[4] = {}, of_total[4] = {}, square[4] = {};
        split(factor, total, v);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          multiply(of_h, w.q[r].high, w.q[r].low, h[r][v]);
          multiply(of_h, 0.f, w.q[r].rest, h[r][v]);
        }
#pragma unroll
        for (int p = kParts - 1; p >= 0; --p) {  // the small ones first
          multiply(of_total, w.z[0].high, w.z[0].low, w.z[1].high, w.z[1].low, factor[p][0], factor[p][1]);
          multiply(square, h[0][v & 6], h[0][v | 1], h[1][v & 6], h[1][v | 1], factor[p][0], factor[p][1]);
        }
        multiply(of_total, 0.f, w.z[0].rest, 0.f, w.z[1].rest, factor[0][0], factor[0][1]);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          bias[n][i] = of_total[n] + of_total[n + 2];
          rank[n][i] = group < kTensorRanks ? of_h[n] + of_h[n + 2] : bias[n][i];
        }
        scale[i] = group % 2 ? square[v % 2 * 2 + 1] : square[v % 2 * 2];
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        add_to(at[rank_cell(half, n)], rank[n]);
        if (group == 0) add_to(at[bias_cell(half, n)], bias[n]);
      }
      if (diagonal()) add_to(at[scale_cell(half)], scale);
    }
  }
  __device__ static void add_to(float4& sum, const float (&more)[4]) {
    float4 held = sum;
    held.x += more[0], held.y += more[1], held.z += more[2], held.w += more[3];
    sum = held;
  }

  // This thread's cells of the sums, in add_sums' order: visit(cell, where its four columns lie in a leaf's partials).
  template <class F>
  __device__ void each_sum(F visit) const {
    const Sums& to = b.taken;
#pragma unroll 1
    for (int c = 0; c < b.unit.chunks; ++c) {
      const int chunk = chunk_at(c);
      float4* at = sums + chunk * kSums * 16;
      const int64_t column = chunk * kTensorColumns, own = column + member * 2 * kV;
      const int64_t rank = (group < kTensorRanks ? to.read : to.write) + group % kTensorRanks * b.a.width + own;
      for (int half = 0; half < 2; ++half) {
        for (int n = 0; n < 2; ++n) {
          visit(at[rank_cell(half, n)], rank + n * kV + 4 * half);
          if (group == 0) visit(at[bias_cell(half, n)], to.bias + own + n * kV + 4 * half);
        }
        if (diagonal()) visit(at[scale_cell(half)], to.scale + column + group * kV + 4 * half);
      }
    }
  }
  __device__ void clear() const {
    each_sum([](float4& cell, int64_t) { cell = float4{}; });
    if (warp() == 0) rows.offset[lane()] = 0.f;
  }
  __device__ void leave(float* partials) const {
    each_sum([&](float4& cell, int64_t to) { put_four(partials + to, cell.x, cell.y, cell.z, cell.w); });
    if (b.taken.offset >= 0 && threadIdx.x < kTensorRanks) {
      float row[kTensorRows];
      load_shared(row, rows.offset + threadIdx.x * kTensorRows);
      partials[b.taken.offset + threadIdx.x] = sum_of_eight(row);
    }
    __syncwarp();
  }
};

template <class T, BackwardPart part>
__global__ void __launch_bounds__(32 * kTensorWarps, 1) tensor_backward(const Backward given) {
  const Backward b = plain<part, kFourRanks>(given);
  FASTEDIT_SHARED(shared);
  Run run = find_run(b, blockIdx.x, gridDim.x);
  if (run.rows.count == 0) return;
  const int first = static_cast<int>(run.rows.first);  // the rows of plain calls fit
  run.rows = {nullptr, 0, first + run.rows.count, 0, true}, run.end += first;
  float4* sums = reinterpret_cast<float4*>(shared) + b.unit.sums_at / 16;
  uint4* stage = reinterpret_cast<uint4*>(sums + kSums * (b.a.width / 4));
  TensorTile<T, part == kPlainRankNorm> tile{
      b, RowSums(shared), sums, stage, first, run.rows.count, 0};
  auto places = tile.places();
#pragma unroll 1
  for (int c = 0; c < b.unit.chunks; ++c) tile.ask_for(places, 0, tile.chunk_at(c));
  tile.clear();

  do {
    for (; tile.first < run.end; tile.first += kTensorRows) {
      tile.live = min(kTensorRows, tile.end - tile.first);
      wait_copies();
      __syncwarp();
      places = tile.places();
      tile.pull();
      auto next = tile.second_streams(places, 0);
      tile.finish_rows();
      const auto weights = tile.weights();
#pragma unroll 1
      for (int c = 0; c < b.unit.chunks; ++c) tile.finish(c, places, weights, next);
    }
    const Finished of = finished(b, run);
#pragma unroll 1
    for (int64_t leaf = of.leaf; leaf < of.of_slot_end; ++leaf) {  // this one, and those without rows behind it
      tile.leave(b.units.of(leaf));
      tile.clear();
    }
  } while (go_on(b, run));
  wait_copies();  // the zeros of rows that do not come
}

}  // namespace

int run_tensor_units(const Backward& b, void* stream) {
  Shape shape{runs(b.units.cut, multiprocessors()), b.unit.threads, b.unit.shared_bytes};
  auto run = [&](auto kernel) { return launch(kernel, shape, stream, b); };
  const bool norm = b.a.grad_normed;
  if (b.a.x_dtype == BF16)
    return norm ? run(tensor_backward<Brain, kPlainRankNorm>) : run(tensor_backward<Brain, kPlainRank>);
  return norm ? run(tensor_backward<Half, kPlainRankNorm>) : run(tensor_backward<Half, kPlainRank>);
}

}  // namespace fastedit::cuda
#endif
