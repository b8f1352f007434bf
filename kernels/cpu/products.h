// Products of a few rows with a matrix that is larger than the caches, and sums of its rows: the matrix goes by once.
#pragma once

#include "cpu/sums.h"
#include "cpu/widen.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

constexpr int64_t kUnitTile = 32;  // units of one task of a product

// out[r][u] = x[r] · matrix[u] + bias[u] for two units (one where they are the same) and R rows.
template <int R>
inline void two_units(const float* x, int64_t columns, const float* first, const float* second, float (&out)[2][R]) {
  typedef typename Lane<kLanes>::F F;
  F sum[2][R] = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    const F a = load_as<F>(first + c), b = load_as<F>(second + c);
    for (int r = 0; r < R; ++r) {
      const F h = load_as<F>(x + r * columns + c);
      sum[0][r] += a * h;
      sum[1][r] += b * h;
    }
  }
  for (int r = 0; r < R; ++r) {
    float tail[2] = {};
    for (int64_t i = c; i < columns; ++i) {
      tail[0] += first[i] * x[r * columns + i];
      tail[1] += second[i] * x[r * columns + i];
    }
    for (int i = 0; i < 2; ++i) out[i][r] = sum_lanes(sum[i][r]) + tail[i];
  }
}

template <int R>
inline void unit_rows(const float* x, int64_t columns, const float* matrix, const float* bias, int64_t units,
                      int64_t u, float* out) {
  const int64_t v = u + 1 < units ? u + 1 : u;
  float z[2][R];
  two_units<R>(x, columns, matrix + u * columns, matrix + v * columns, z);
  for (int r = 0; r < R; ++r) {
    out[r * units + u] = z[0][r] + (bias ? bias[u] : 0.0f);
    out[r * units + v] = z[1][r] + (bias ? bias[v] : 0.0f);
  }
}

// a · b: four sums of lanes, added as a tree; one would wait for itself.
inline float dot(const float* a, const float* b, int64_t columns) {
  typedef typename Lane<kLanes>::F F;
  F sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= columns; c += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) sum[i] += load_as<F>(a + c + i * kLanes) * load_as<F>(b + c + i * kLanes);
  }
  float tail = 0;
  for (; c < columns; ++c) tail += a[c] * b[c];
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail;
}

// out (rows, units) = x (rows, columns) @ matrixᵀ + bias: the matrix goes by once for all rows.
void product(const float* x, int64_t rows, int64_t columns, const float* matrix, const float* bias, int64_t units,
             float* out) {
  each_task((units + kUnitTile - 1) / kUnitTile, units * columns * rows, [=](int64_t task) {
    const int64_t end = task * kUnitTile + kUnitTile < units ? task * kUnitTile + kUnitTile : units;
    for (int64_t u = task * kUnitTile; u < end; u += 2) {
      int64_t r = 0;
      for (; r + kGroup <= rows; r += kGroup) {
        unit_rows<kGroup>(x + r * columns, columns, matrix, bias, units, u, out + r * units);
      }
      for (; r < rows; ++r) unit_rows<1>(x + r * columns, columns, matrix, bias, units, u, out + r * units);
    }
  });
}

// to += Σ_i coefficient[i] · row[i] over N rows of a matrix: `to` is read and written once for all of them.
template <int N>
inline void add_vectors(float* to, const float* const (&row)[N], const float (&k)[N], int64_t columns) {
  each_column(columns, [&](auto lane, int64_t c) {
    typedef typename decltype(lane)::F F;
    F sum = load_as<F>(to + c);
    for (int i = 0; i < N; ++i) sum += k[i] * load_as<F>(row[i] + c);
    memcpy(to + c, &sum, sizeof sum);
  });
}
template <int N>
inline void add_vectors(double* to, const float* const (&row)[N], const float (&k)[N], int64_t columns) {
  int64_t c = 0;
  for (; c + kHalf <= columns; c += kHalf) {
    Double sum = load_as<Double>(to + c);
    for (int i = 0; i < N; ++i) sum += static_cast<double>(k[i]) * load_double(row[i] + c);
    memcpy(to + c, &sum, sizeof sum);
  }
  for (; c < columns; ++c) {
    for (int i = 0; i < N; ++i) to[c] += static_cast<double>(k[i]) * row[i][c];
  }
}

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
