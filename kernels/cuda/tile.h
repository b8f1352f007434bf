// A register tile: `kRows` rows, E elements of each in every thread, as C vectors of V columns.
//
// A block owns the tile's rows, so that sums along a row need the block alone, and every parameter is
// loaded once for kRows rows. Rows are independent: their sums run in an order that the width fixes.
#pragma once
#include <type_traits>
#include "form.h"
#include "reduce.h"

namespace fastedit::cuda {

template <int V>
__device__ inline int tile_column(int c) {
  return (c * blockDim.x + threadIdx.x) * V;
}

// A column of a row of T. Where kShort, rows and strides are below 2^31 (plain.h): one multiply-add instead of five.
template <class T, bool kShort, class P>
__device__ inline P* row_at(P* data, int64_t row, int64_t stride, int column) {
  static_assert(!std::is_same_v<T, Any>, "bytes of an element");
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  if constexpr (kShort) {
    return static_cast<Byte*>(data) + uint64_t{static_cast<uint32_t>(column) * uint32_t{sizeof(T)}} +
           uint64_t{static_cast<uint32_t>(row)} * (static_cast<uint32_t>(stride) * uint32_t{sizeof(T)});
  }
  return static_cast<Byte*>(data) + (row * stride + column) * int64_t{sizeof(T)};
}

// True where a thread has no column c; where a tile is `kFull`, every thread has all of its columns.
template <int V, bool kFull>
__device__ inline bool beyond(int c, int64_t width) {
  return !kFull && tile_column<V>(c) >= width;
}

// Row r of the tile from `first` on, which is below `rows`, or its first row where there is no such row.
template <class Row>
__device__ inline Row tile_row(Row first, int r, Row rows) {
  return r > 0 && first + r < rows ? first + r : first;
}

constexpr int kRanks = 4;  // that a loop over ranks takes at a time, where their number is a multiple of it

// True where row r reads other parameters than the row before it.
template <int N>
__device__ inline bool new_slot(const RowEdit (&row)[N], int r) {
  return r == 0 || row[r].slot != row[r - 1].slot;
}

// Each warp's share of value · matrix[j] for every rank j and row r, to part[(j kRows + r) warps + warp]. Where
// kWhole, the rank is a multiple of kRanks.
template <bool kFull, bool kWhole, int N, int C, int V>
__device__ inline void tile_dots(const float (&value)[N][C][V], const RowEdit (&row)[N], const float* matrix,
                                 int rank, int64_t width, float* part) {
  constexpr int kTogether = 8 / N;  // ranks that share one tree of shuffles
  static_assert(!kWhole || kTogether == kRanks, "whole trees");
#pragma unroll 1
  for (int first = 0; first < rank; first += kTogether) {
    float sum[8] = {};
#pragma unroll
    for (int g = 0; g < kTogether; ++g) {
      if (!kWhole && first + g >= rank) break;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (beyond<V, kFull>(c, width)) continue;
        float m[V];
#pragma unroll
        for (int r = 0; r < N; ++r) {
          if (new_slot(row, r)) {
            load_vector(m, matrix + (int64_t{row[r].slot} * rank + first + g) * width + tile_column<V>(c));
          }
#pragma unroll
          for (int v = 0; v < V; ++v) sum[g * N + r] = fmaf(value[r][c][v], m[v], sum[g * N + r]);
        }
      }
    }
    float total = warp_sum_of_eight(sum);
    if (lane() < 8 && (kWhole || first + lane() / N < rank)) part[(first * N + lane()) * warps() + warp()] = total;
  }
}

// Adds the warps' shares: finish(j, r, sum) is called once for each rank j and row r of the tile. Without
// shares the sums are 0.
template <int N, class F>
__device__ inline void finish_dots(int rank, const float* part, F finish) {
  __syncthreads();
  for (int i = threadIdx.x; i < rank * N; i += blockDim.x) {
    float sum = 0.f;
#pragma unroll 4
    for (int w = 0; w < (part ? warps() : 0); ++w) sum += part[i * warps() + w];
    finish(i / N, i % N, sum);
  }
  __syncthreads();
}

// M aligned floats of shared memory.
template <int M>
__device__ inline void load_shared(float (&out)[M], const float* from) {
  static_assert(M % 4 == 0, "whole vectors");
#pragma unroll
  for (int i = 0; i < M / 4; ++i) {
    const float4 four = reinterpret_cast<const float4*>(from)[i];
    out[4 * i] = four.x, out[4 * i + 1] = four.y, out[4 * i + 2] = four.z, out[4 * i + 3] = four.w;
  }
}

// added[r][c] += Σ_j weight[j kRows + r] · matrix[j] over the V columns of each of C chunks from `first` on, which the
// thread has.
template <bool kWhole, int kTogether = kRanks / 2, int N, int C, int V>
__device__ inline void tile_combine(float (&added)[N][C][V], const float* weight, const RowEdit (&row)[N],
                                    const float* matrix, int rank, int64_t width, int first) {
  const float* from[N];
#pragma unroll
  for (int r = 0; r < N; ++r) from[r] = matrix + int64_t{row[r].slot} * rank * width + tile_column<V>(first);
  auto add = [&](const float* weights) {
    float m[C][V] = {};
#pragma unroll
    for (int r = 0; r < N; ++r) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (new_slot(row, r)) load_vector(m[c], from[r] + c * blockDim.x * V);
      }
      from[r] += width;
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int v = 0; v < V; ++v) added[r][c][v] = fmaf(weights[r], m[c][v], added[r][c][v]);
    }
  };
  if constexpr (kWhole) {
    constexpr int K = kTogether;  // ranks at a time: vectors under way, as many as the registers have room for
    const float* end = weight + rank * N;
#pragma unroll 1
    do {  // the rank is not 0
      float weights[K * N];
      load_shared(weights, weight);
#pragma unroll
      for (int g = 0; g < K; ++g) add(weights + g * N);
      weight += K * N;
    } while (weight < end);
  } else {
#pragma unroll 1
    for (int j = 0; j < rank; ++j) add(weight + j * N);
  }
}

}  // namespace fastedit::cuda
