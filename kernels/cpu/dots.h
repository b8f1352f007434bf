// Products of rows with the few vectors of a form's low-rank part: dot products along rows, and vectors spread over rows.
#pragma once
#include "abi.h"
#include "cpu/vec.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// Columns that are taken together where something is made of them beforehand: fp32 of a group's rows are then 8 KB.
constexpr int kRun = 512;
struct Ones {
  float at[kRun];
  constexpr Ones() : at{} {
    for (float& one : at) one = 1.0f;
  }
};
alignas(64) constexpr Ones kOnes;
alignas(64) constexpr float kZeros[kRun] = {};

// The R row pointers of a stream. Bodies capture them, and all else, by value: behind a reference the compiler must
// read every pointer and stride again after each store (that cost 1.16 of a plain add's time where this costs 1).
template <class T, int R>
struct RowPointers {
  T* at[R];
  RowPointers(T* first, int64_t stride) {
    for (int r = 0; r < R; ++r) at[r] = first + r * stride;
  }
};

// to(r, Σ weight ⊙ h_r) for R rows, in the type that products are summed in; weight(lane, column), hidden(r, lane, column).
template <int R, class Weight, class Hidden, class To>
inline void dot_rows(int64_t width, Weight weight, Hidden hidden, To to) {
  typedef typename Lane<kLanes>::Sum Sum;
  auto wide = [](auto v) { return __builtin_convertvector(v, Sum); };
  Sum part[R][kSums] = {};
  decltype(part[0][0][0] + part[0][0][0]) tail[R] = {};
  int64_t column = 0;
  for (; column + kSums * kLanes <= width; column += kSums * kLanes) {
    for (int i = 0; i < kSums; ++i) {
      const Sum a = wide(weight(Lane<kLanes>{}, column + i * kLanes));
      for (int r = 0; r < R; ++r) part[r][i] += a * wide(hidden(r, Lane<kLanes>{}, column + i * kLanes));
    }
  }
  for (int i = 0; column + kLanes <= width; column += kLanes, ++i) {
    const Sum a = wide(weight(Lane<kLanes>{}, column));
    for (int r = 0; r < R; ++r) part[r][i] += a * wide(hidden(r, Lane<kLanes>{}, column));
  }
  for (; column < width; ++column) {
    for (int r = 0; r < R; ++r) tail[r] += weight(Lane<1>{}, column)[0] * hidden(r, Lane<1>{}, column)[0];
  }
  for (int r = 0; r < R; ++r) to(r, sum_registers(part[r]) + tail[r]);
}

template <int R, class Hidden, class To>
inline void dot_rows(const float* weight, int64_t width, Hidden hidden, To to) {
  dot_rows<R>(width, [=](auto lane, int64_t c) { return Fp32::load<decltype(lane)::count>(weight + c); }, hidden, to);
}

// to(r, j, Σ read_j ⊙ h_r), in double, for R rows and J read vectors: a loaded h serves all J, a loaded read all R.
// Every sum is one running register, which is added to the total and begun anew after 16 additions: with R J of them no
// addition waits for another, and chains are short whatever the width. The order depends on the width alone.
template <int R, int J, class Hidden, class To>
inline void dot_block(const float* read, int64_t width, Hidden hidden, To to) {
  typedef typename Lane<kLanes>::F F;
  typedef typename Lane<kLanes>::Sum Sum;
  Sum total[R][J] = {};
  double tail[R][J] = {};
  const int64_t whole = width / kLanes * kLanes;
  constexpr int64_t kChain = 16 * kLanes;
  for (int64_t first = 0; first < whole; first += kChain) {
    const int64_t end = first + kChain < whole ? first + kChain : whole;
    Sum part[R][J] = {};
    for (int64_t column = first; column < end; column += kLanes) {
      Sum h[R];
      for (int r = 0; r < R; ++r) h[r] = __builtin_convertvector(hidden(r, Lane<kLanes>{}, column), Sum);
      for (int j = 0; j < J; ++j) {
        const Sum a = __builtin_convertvector(load_as<F>(read + j * width + column), Sum);
        for (int r = 0; r < R; ++r) part[r][j] += a * h[r];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < J; ++j) total[r][j] += part[r][j];
    }
  }
  for (int64_t column = whole; column < width; ++column) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < J; ++j) tail[r][j] += read[j * width + column] * hidden(r, Lane<1>{}, column)[0];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < J; ++j) to(r, j, sum_exactly(total[r][j]) + tail[r][j]);
  }
}

// z[r][j] = Σ h_r ⊙ read_j + offset_j. hidden(r, lane, column) gives h.
template <int R, class Hidden, class Z>
inline void project_rows(const float* read, const float* offset, int64_t rank, int64_t width, Hidden hidden,
                         Z z[][kMaxRank]) {
  constexpr int J = kLanes == 16 ? 4 : 2;  // R J running sums, R of h and one of read fit the registers
  auto block = [=]<int N>(int64_t first) {
    dot_block<R, N>(read + first * width, width, hidden, [=](int r, int j, double sum) {
      z[r][first + j] = static_cast<Z>(sum + (offset ? offset[first + j] : 0.0f));
    });
  };
  int64_t j = 0;
  for (; j + J <= rank; j += J) block.template operator()<J>(j);
  for (; j < rank; ++j) block.template operator()<1>(j);
}

// body.template operator()<T>() for the rows' dtype.
template <class Body>
inline void with_dtype(int dtype, Body body) {
  if (dtype == F32) body.template operator()<Fp32>();
  if (dtype == BF16) body.template operator()<Bf16>();
  if (dtype == F16) body.template operator()<Fp16>();
}

// The same of rows as they lie in memory.
template <int R, class Z>
inline void project_stream(int dtype, const void* const* rows, const float* read, const float* offset, int64_t rank,
                           int64_t width, Z z[][kMaxRank]) {
  with_dtype(dtype, [&]<class T>() {
    typedef const typename T::T E;
    RowPointers<E, R> from(nullptr, 0);
    for (int r = 0; r < R; ++r) from.at[r] = static_cast<E*>(rows[r]);
    project_rows<R>(read, offset, rank, width, [=](int r, auto lane, int64_t c) {
      return T::template load<decltype(lane)::count>(from.at[r] + c);
    }, z);
  });
}

// to_r = begin_r + Σ_j by[r][j] direction_j for `count` columns of R rows. Directions lie `width` apart, the rows of `begin`
// and `to` as told.
template <int R>
inline void spread(const float by[][kMaxRank], int64_t rank, const float* directions, int64_t width, int64_t count,
                   const float* begin, int64_t apart, float* to, int64_t to_apart = kRun) {
  auto add = [&]<int N>(int64_t first) {
    float factor[R][N];
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) factor[r][n] = by[r][first + n];
    }
    each_column(count, [=, start = begin, step = apart, from = directions + first * width](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      typedef typename Lane<L>::F F;
      typedef typename Lane<L>::Sum Sum;
      Sum sum[R];
      for (int r = 0; r < R; ++r) sum[r] = __builtin_convertvector(load_as<F>(start + r * step + c), Sum);
      for (int n = 0; n < N; ++n) {
        const Sum direction = __builtin_convertvector(load_as<F>(from + n * width + c), Sum);
        for (int r = 0; r < R; ++r) sum[r] += factor[r][n] * direction;
      }
      for (int r = 0; r < R; ++r) Fp32::store<L>(to + r * to_apart + c, __builtin_convertvector(sum[r], F));
    });
    begin = to, apart = to_apart;
  };
  int64_t j = 0;
  for (; j + 4 <= rank; j += 4) add.template operator()<4>(j);
  for (; j < rank; ++j) add.template operator()<1>(j);
}

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
