// A backward in one pass over the rows, whatever needs sums along them (the norm's; rank > 0: q;
// d_coefficient):
//   total = grad_residual + norm's gradient at grad_normed
//   q = k (total @ writeᵀ) + grad_z
//   d_coefficient = Σ total ⊙ ((scale − 1) ⊙ h + bias) + z · (total @ writeᵀ)
//   d_h = total + k (scale − 1) ⊙ total + q @ read
// and the sums down the columns (backward_columns.h, backward_outer.h), as far as they fit (backward_sums.cu).
//
// Streams: grad_residual, grad_normed, residual_out, h in, each once; d_x, d_residual out.
// Grid: a block a run of leaves (backward.h), `kUnitTile` rows of one leaf and one slot at a time.
// A thread owns the same columns of every row: a tile's streams lie in shared memory from their arrival
// (cp.async) to the last use, their cells are asked for the next tile as soon as they are read; a column's sums
// stay in shared memory over a leaf's rows of a slot and leave as one fp32 partial of each; those that all slots share over
// the leaf's. Cells and sums are each
// thread's own, so only the sums along a row need barriers. Parameters come through L1, once for a tile.
// Where the stage does not fit (launch.h), h comes when it is needed, and total's streams from L2 again.
// Those rows are added one after another and the partials by backward_sums.cu's tree: the order follows from
// the shape, the dtypes, which sums are wanted, the slots and the architecture (launch.h), never from the grid, which only
// says which block takes which run of them.
#pragma once
#include "backward_streams.h"
#include "plain.h"

namespace fastedit::cuda {
namespace {

// Streams of a row that the stage has room for.
__device__ inline int staged_streams(const Backward& b) {
  int of_total = (b.a.grad_residual != nullptr) + 2 * (b.a.grad_normed != nullptr);
  int of_h = b.reads_h && b.unit.h_staged ? 1 + (b.a.residual != nullptr) : 0;
  return b.unit.total_staged ? of_total + of_h : 0;
}

template <class G, class H, int V, bool kFull, Ranks ranks>
struct UnitTile {
  static constexpr bool kWhole = ranks != kAnyRanks;
  static constexpr int N = kUnitTile<V>;
  using Streams = RowStreams<G, H, V, true>;
  const Backward& b;
  const Run& run;
  int streams;   // staged
  uint4* stage;  // this thread's first cell, and its first four sums: a warp's follow 32 apart, so that those of a
  float4* sums;  // chunk lie at distances that the compiler knows
  int first, live;  // rows of the tile: first … first + live of the run's
  RowEdit edit[N];
  NormRow norm[N];

  __device__ bool has_norm() const { return b.a.grad_normed; }
  __device__ int64_t row(int r) const { return row_of(min(first + r, (kFull ? run.rows.count : run.end) - 1)); }
  __device__ int64_t row_of(int i) const {  // the order from the arguments, where it takes no register
    const int32_t* order = b.a.slot_order.order;
    return order ? __ldg(order + run.rows.first + i) : run.rows.first + i;
  }
  __device__ bool lives(int r) const { return r == 0 || (kFull ? r < live : first + r < run.end); }
  // This thread's columns of chunk c of row r of a tile that starts with row `from`, which a run that is not kFull must have.
  template <class T, class P>
  __device__ P* at(P* data, int64_t stride, int from, int r, int c) const {
    if constexpr (!kFull) return row_at<T, false>(data, row_of(from + r), stride, tile_column<V>(c));
    // Without whole ranks the tile's other rows are steps from its first, since registers do not suffice for a product of each.
    const int step = kWhole ? 0 : r;
    P* of_first = row_at<T, true>(data, run.rows.first + (from + r - step), stride, tile_column<V>(c));
    return row_at<T, true>(of_first, step, stride, 0);
  }
  __device__ uint4* cell(int stream, int r, int c) const {
    return stage + ((c * streams + stream) * N + r) * kWarp;
  }
  template <class T>
  __device__ Pack<T, V>& pack(int stream, int r, int c) const {
    return *reinterpret_cast<Pack<T, V>*>(cell(stream, r, c));
  }
  template <class T>
  __device__ void ask(int stream, int r, int c, const void* data, int64_t stride) const {
    const int from = kFull ? first + N : min(first + N, run.end), end = kFull ? run.rows.count : from < run.end ? run.end : run.next_end;
    const bool wanted = from + r < end;
    copy_async(&pack<T>(stream, r, c), kFull || wanted ? at<T>(data, stride, from, r, c) : data, wanted);
  }

  // Asks for one vector of each stream of row r of the next tile; zeros where it has no such row.
  __device__ void ask_for(int r, int c) const {
    if (!b.unit.total_staged || beyond<V, kFull>(c, b.a.width)) return;
    const EditAddNormBackwardArgs& a = b.a;
    int stream = 0;
    if (a.grad_residual) ask<G>(stream++, r, c, a.grad_residual, a.grad_residual_stride);
    if (has_norm()) {
      ask<G>(stream++, r, c, a.grad_normed, a.grad_normed_stride);
      ask<G>(stream++, r, c, a.residual_out, a.width);
    }
    if (!b.reads_h || !b.unit.h_staged) return;
    ask<H>(stream++, r, c, a.x, a.x_stride);
    if (a.residual) ask<typename Streams::S>(stream, r, c, a.residual, a.residual_stride);
  }
  __device__ void take_norm(Streams& s, int r, int c) const {
    if (!has_norm()) return;
    int stream = b.a.grad_residual != nullptr;
    if (!b.unit.total_staged) {
      if (lives(r)) s.template load_norm<kL2>(b.a, row(r), tile_column<V>(c));
      return;
    }
    s.grad_normed = pack<G>(stream, r, c), s.residual_out = pack<G>(stream + 1, r, c);
  }
  __device__ void take_total(Streams& s, int r, int c) const {
    if (!b.unit.total_staged) {
      if (lives(r)) s.template load_total<kL2>(b.a, row(r), tile_column<V>(c));
      return;
    }
    if (b.a.grad_residual) s.grad = pack<G>(0, r, c);
    take_norm(s, r, c);
  }
  __device__ void take_h(Streams& s, int r, int c) const {
    if (!b.reads_h) return;
    if (!b.unit.h_staged) {
      if (lives(r)) s.template load_h<kOnce>(b, row(r), tile_column<V>(c));
      return;
    }
    int stream = (b.a.grad_residual != nullptr) + 2 * has_norm();
    s.x = pack<H>(stream, r, c);
    if (b.a.residual) s.residual = pack<typename Streams::S>(stream + 1, r, c);
  }
  __device__ void gain_of(float (&gain)[V], int c) const {
    if (has_norm()) load_gain<G, V>(gain, b.a.weight, b.a.kind, tile_column<V>(c), b.a.residual_dtype);
  }
  __device__ void total_of(float (&total)[N][V], const Streams (&s)[N], const float (&gain)[V]) const {
#pragma unroll
    for (int r = 0; r < N; ++r) s[r].get_total(total[r], b.a, norm[r], gain);
  }

  // The two means that the norm's gradient takes of each row; kept for the columns where they are wanted.
  __device__ void find_means(float* shared, int& turn) {
    float dot[N] = {}, sum[N] = {}, inverse = 1.f / static_cast<float>(b.a.width);
#pragma unroll 1
    for (int c = 0; c < b.unit.chunks && !beyond<V, kFull>(c, b.a.width); ++c) {
      Streams s[N] = {};
      float g[V], x[V], gain[V];
#pragma unroll
      for (int r = 0; r < N; ++r) take_norm(s[r], r, c);
      gain_of(gain, c);
#pragma unroll
      for (int r = 0; r < N; ++r) {
        s[r].get_norm(g, x, b.a);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          dot[r] = fmaf(g[v] * gain[v], norm[r].unit(x[v]), dot[r]);
          if (b.a.kind == LAYER) sum[r] = fmaf(g[v], gain[v], sum[r]);
        }
      }
    }
    block_sum(dot, shared, turn);
    if (b.a.kind == LAYER) block_sum(sum, shared, turn);
#pragma unroll
    for (int r = 0; r < N; ++r) {
      norm[r].dot = dot[r] * inverse;
      norm[r].sum = sum[r] * inverse;
      if (!b.norm_means || threadIdx.x > 0 || r >= live) continue;
      b.norm_means[2 * row(r)] = norm[r].dot;
      b.norm_means[2 * row(r) + 1] = norm[r].sum;
    }
  }

  // Each warp's share of total @ writeᵀ, as tile_dots leaves it.
  __device__ void pull(float* part) const {
    constexpr int kTogether = 8 / N;
    const int rank = static_cast<int>(b.a.form.rank);
    const float* group = b.a.form.write;  // of slot 0
#pragma unroll 1
    for (int from = 0; from < rank; from += kTogether, group += kTogether * b.a.width) {
      float sum[8] = {};
#pragma unroll 1
      for (int c = 0; c < b.unit.chunks && !beyond<V, kFull>(c, b.a.width); ++c) {
        Streams s[N] = {};
        float total[N][V], gain[V] = {}, m[V];
#pragma unroll
        for (int r = 0; r < N; ++r) take_total(s[r], r, c);
        gain_of(gain, c);
        total_of(total, s, gain);
        const float* row = group + tile_column<V>(c);
#pragma unroll
        for (int g = 0; g < kTogether; ++g, row += b.a.width) {
          if (!kWhole && from + g >= rank) break;
#pragma unroll
          for (int r = 0; r < N; ++r) {
            if (new_slot(edit, r)) load_vector(m, row + int64_t{edit[r].slot} * rank * b.a.width);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[g * N + r] = fmaf(total[r][v], m[v], sum[g * N + r]);
          }
        }
      }
      float all = warp_sum_of_eight(sum);
      if (lane() < 8 && (kWhole || from + lane() / N < rank)) part[(from * N + lane()) * warps() + warp()] = all;
    }
  }

  __device__ void find_d_coefficient(float* shared, int& turn, const float* pulled) const {
    float sum[N] = {};
#pragma unroll 1
    for (int c = 0; c < b.unit.chunks && !beyond<V, kFull>(c, b.a.width); ++c) {
      Streams s[N] = {};
      float total[N][V], h[V], gain[V] = {}, scale[V], bias[V];
#pragma unroll
      for (int r = 0; r < N; ++r) take_total(s[r], r, c), take_h(s[r], r, c);
      gain_of(gain, c);
      total_of(total, s, gain);
#pragma unroll
      for (int r = 0; r < N; ++r) {
        if (new_slot(edit, r)) {
          load_parameters(scale, b.a.form.scale, edit[r].slot * b.a.width + tile_column<V>(c), 1.f);
          load_parameters(bias, b.a.form.bias, edit[r].slot * b.a.width + tile_column<V>(c), 0.f);
        }
        h_of(h, s[r], true);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[r] = fmaf(total[r][v], fmaf(scale[v] - 1.f, h[v], bias[v]), sum[r]);
      }
    }
    block_sum(sum, shared, turn);
#pragma unroll
    for (int r = 0; r < N; ++r) {
      if (threadIdx.x == 0 && r < live) store_d_coefficient<N>(b, row(r), r, sum[r], pulled);
    }
  }
  __device__ void h_of(float (&h)[V], const Streams& s, bool wanted) const {
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = 0.f;
    if (b.reads_h && wanted) s.get_h(h, b);
  }

  // Adds Σ_r weight(r) · value(r)[v] to the thread's sums of V columns; a quarter-warp's float4s are neighbours. Then `at` is
  // the chunk's next sum.
  template <class F>
  __device__ void add_to(float4*& at, F term) const {
#pragma unroll
    for (int i = 0; i < V / 4; ++i, at += kWarp) {
      float4 held = *at;
#pragma unroll
      for (int r = 0; r < N; ++r) {
        held.x = term(r, 4 * i, held.x), held.y = term(r, 4 * i + 1, held.y);
        held.z = term(r, 4 * i + 2, held.z), held.w = term(r, 4 * i + 3, held.w);
      }
      *at = held;
    }
  }

  // Everything that is one column's own: d_residual, d_x, the sums; and the next tile's streams are asked for.
  __device__ void finish(int c, const LowRank& low) const {
    const EditAddNormBackwardArgs& a = b.a;
    const Form& form = a.form;
    int column = tile_column<V>(c), rank = static_cast<int>(form.rank);
    Streams s[N] = {};
    float total[N][V], gain[V] = {}, scale[V];
#pragma unroll
    for (int r = 0; r < N; ++r) take_total(s[r], r, c), take_h(s[r], r, c);
    gain_of(gain, c);
    total_of(total, s, gain);
#pragma unroll
    for (int r = 0; r < N; ++r) ask_for(r, c);
    if (a.d_x || (a.d_residual && a.on_sum)) {
      float added[N][1][V] = {};
      constexpr int kTogether = ranks == kFourRanks ? kRanks : kRanks / 2;
      if (rank && form.read) tile_combine<kWhole, kTogether>(added, low.q, edit, form.read, rank, a.width, c);
      RoundedRow<G, H, V> d_h[N];
      auto store_row = [&](int r) {
        if (lives(r)) d_h[r].store(b, at<H>(a.d_x, a.width, first, r, c), at<G>(a.d_residual, a.width, first, r, c));
      };
#pragma unroll
      for (int r = 0; r < N; ++r) {
        if (new_slot(edit, r)) load_parameters(scale, form.scale, edit[r].slot * a.width + column, 1.f);
#pragma unroll
        for (int v = 0; v < V; ++v) added[r][0][v] = pulled_back(total[r][v], edit[r], scale[v], added[r][0][v]);
        d_h[r].round(added[r][0], b);
        if (!kWhole) store_row(r);
      }
#pragma unroll
      for (int r = 0; kWhole && r < N; ++r) store_row(r);  // with no branch between the rows they share what is unpacked
    }
#pragma unroll
    for (int r = 0; r < N; ++r) {
      if (!a.d_residual || a.on_sum || !lives(r)) continue;
      store<G, V>(at<G>(a.d_residual, a.width, first, r, c), 0, round_to<G, V>(total[r], a.residual_dtype), a.residual_dtype);
    }
    if (b.total) {
#pragma unroll
      for (int r = 0; r < N; ++r) {
        if (lives(r)) store_total(total[r], b.total + row(r) * a.width + column);
      }
    }
    float h[N][V];
#pragma unroll
    for (int r = 0; r < N; ++r) h_of(h[r], s[r], edit[r].inside);
    auto pulled = [&](int r, int v) { return edit[r].k == 0.f ? 0.f : edit[r].k * total[r][v]; };
    float4* sum = sums + c * b.unit_sums * (V / 4) * kWarp;
    if (b.taken.scale >= 0)
      add_to(sum, [&](int r, int v, float held) { return fmaf(pulled(r, v), h[r][v], held); });
    if (b.taken.bias >= 0) add_to(sum, [&](int r, int v, float held) { return held + pulled(r, v); });
    if (has_norm()) {
      float g[N][V], unit[N][V];
#pragma unroll
      for (int r = 0; r < N; ++r) {
        s[r].get_norm(g[r], unit[r], a);
#pragma unroll
        for (int v = 0; v < V; ++v) unit[r][v] = norm[r].unit(unit[r][v]);
      }
      if (b.taken.weight >= 0)
        add_to(sum, [&](int r, int v, float held) { return fmaf(g[r][v], unit[r][v], held); });
      if (b.taken.norm_bias >= 0) add_to(sum, [&](int r, int v, float held) { return held + g[r][v]; });
    }
    if (b.taken.read >= 0 || b.taken.write >= 0) add_ranks(sum, rank, low, h, total);
  }
  // Σ_r q h of each rank to the sums from `read` on, and Σ_r k z total to those after them, as far as they are taken.
  __device__ void add_ranks(float4* read, int rank, const LowRank& low, const float (&h)[N][V],
                            const float (&total)[N][V]) const {
    constexpr int K = kWhole ? kRanks / 2 : 1;  // sums under way, as many as the registers have room for
    float4* write = read + (b.taken.read >= 0 ? rank * (V / 4) * kWarp : 0);
    const float *q = low.q, *kz = low.kz, *end = q + rank * N;
    auto add = [&](float4*& at, const float* from, const float (&value)[N][V]) {
      float weights[K * N];
      if constexpr (kWhole) load_shared(weights, from);
      else
#pragma unroll
        for (int r = 0; r < N; ++r) weights[r] = from[r];
#pragma unroll
      for (int g = 0; g < K; ++g)
        add_to(at, [&](int r, int v, float held) { return fmaf(weights[g * N + r], value[r][v], held); });
    };
#pragma unroll 1
    do {  // the rank is not 0
      if (b.taken.read >= 0) add(read, q, h);
      if (b.taken.write >= 0) add(write, kz, total);
      q += K * N, kz += K * N;
    } while (q < end);
  }

  // The sums of add_to's number `sum` onwards go to the partials, where there are some, and start again.
  __device__ void leave(int& sum, int count, int64_t offset, float* partials) const {
#pragma unroll 1
    for (int j = 0; offset >= 0 && j < count; ++j, ++sum) {
#pragma unroll 1
      for (int c = 0; c < b.unit.chunks && !beyond<V, kFull>(c, b.a.width); ++c) {
        float4* at = sums + (c * b.unit_sums + sum) * (V / 4) * kWarp;
#pragma unroll
        for (int i = 0; i < V / 4; ++i, at += kWarp) {
          float* to = partials + offset + j * b.a.width + tile_column<V>(c) + 4 * i;
          if (kFull || partials) put_four(to, at->x, at->y, at->z, at->w);
          *at = float4{};
        }
      }
    }
  }
  // A slot's sums, and unless `of_all` is null those that all slots share.
  __device__ void leave_all(float* of_slot, float* of_all, float* offset) const {
    int sum = 0, rank = static_cast<int>(b.a.form.rank);
    leave(sum, 1, b.taken.scale, of_slot);
    leave(sum, 1, b.taken.bias, of_slot);
    if (kFull || of_all) {
      leave(sum, 1, b.taken.weight, of_all);
      leave(sum, 1, b.taken.norm_bias, of_all);
    } else {
      sum += (b.taken.weight >= 0) + (b.taken.norm_bias >= 0);
    }
    leave(sum, rank, b.taken.read, of_slot);
    leave(sum, rank, b.taken.write, of_slot);
    for (int j = threadIdx.x; b.taken.offset >= 0 && j < rank; j += blockDim.x) {
      if (kFull || of_slot) of_slot[b.taken.offset + j] = offset[j];
      offset[j] = 0.f;
    }
  }
};

template <class G, class H, int V, BackwardPart part, Ranks ranks>
__global__ void __launch_bounds__(kUnitThreads, 1) unit_backward(const Backward given) {
  const Backward b = plain<part, ranks>(given);
  constexpr bool kFull = part != kGeneralBackward && part != kOverSlots;
  constexpr int N = kUnitTile<V>;
  FASTEDIT_SHARED(shared);
  Run run = find_run(b, blockIdx.x, gridDim.x);
  if (run.rows.count == 0) return;
  int rank = static_cast<int>(b.a.form.rank), turn = 0;
  LowRank low(shared, rank, N);
  const int held = b.unit_sums * b.unit.chunks * (V / 4), streams = staged_streams(b);  // of a thread
  float4* sums = reinterpret_cast<float4*>(shared) + b.unit.sums_at / 16;
  uint4* stage = reinterpret_cast<uint4*>(sums + held * blockDim.x);
  sums += warp() * held * kWarp + lane();
  stage += warp() * streams * N * b.unit.chunks * kWarp + lane();
  UnitTile<G, H, V, kFull, ranks> tile{b, run, streams, stage, sums, -N, 0, {}, {}};
#pragma unroll 1
  for (int c = 0; c < b.unit.chunks; ++c)
#pragma unroll
    for (int r = 0; r < N; ++r) tile.ask_for(r, c);
#pragma unroll 1
  for (int i = 0; i < held; ++i) sums[i * kWarp] = float4{};
  for (int j = threadIdx.x; j < rank; j += blockDim.x) low.offset[j] = 0.f;

  tile.first = 0;
  do {
    for (; tile.first < run.end; tile.first += N) {
      tile.live = min(N, run.end - tile.first);
#pragma unroll
      for (int r = 0; r < N; ++r) {
        tile.edit[r] = row_edit(b.a.form, tile.row(r));
        tile.norm[r] = {};
        if (tile.has_norm()) tile.norm[r] = norm_row(b.a, tile.row(r));
      }
      wait_copies();
      if (tile.has_norm()) tile.find_means(shared, turn);
      if (rank) {
        if (b.pulls) tile.pull(low.part);
        finish_q<N>(b, low, tile.live, [&](int r) { return tile.row(r); });
        for (int j = threadIdx.x; j < rank; j += blockDim.x)
#pragma unroll
          for (int r = 0; r < N; ++r) low.offset[j] += low.q[j * N + r];
      }
      if (b.a.d_form.coefficient) tile.find_d_coefficient(shared, turn, low.pulled);
#pragma unroll 1
      for (int c = 0; c < b.unit.chunks && !beyond<V, kFull>(c, b.a.width); ++c) tile.finish(c, low);
    }
    if (!kFull || part == kPlainReftNorm)  // anew: in no register so far; other plain kernels would spill
      tile.first = run.end, run.rows.count = rows_of_run(b, blockIdx.x, gridDim.x);
    Finished of = finished(b, run);
#pragma unroll 1
    do {  // this leaf, and those without rows behind it
      float* of_all = kFull || of.leaf < of.of_all_end ? b.units.of(of.leaf) : nullptr;
      float* of_slot = kFull ? of_all : of.leaf < of.of_slot_end ? b.units.of(of.leaf + of.before) : nullptr;
      tile.leave_all(of_slot, of_all, low.offset);
    } while (++of.leaf < of.of_all_end);
  } while (go_on(b, run));
  wait_copies();  // the zeros of rows that do not come
}

}  // namespace
}  // namespace fastedit::cuda
