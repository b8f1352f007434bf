// value_ascent:  h' = h + a Σ_t dV/dh(h_t),  h_{t+1} = h_t + a dV/dh(h_t)   (RE-Control, arXiv 2406.05954)
//
// One hidden layer, V = head · relu(W h + b): dV/dh = Wᵀ m with m = 1[z > 0] ⊙ head, so with gram = W Wᵀ the steps stay
// in z: z += a gram m. Two, V = head · relu(W₂ relu(z) + b₂): z += a gram q with q = 1[z > 0] ⊙ v, v = W₂ᵀ m₂.
// Streams, one hidden layer: W once for z, gram once for the first slope gram m, after that those of gram's rows (it
// is symmetric) whose units change sign, and W once more for Wᵀ Σ m. For a batch the three passes are one each.
//
// Threads over tiles of units in the products, over rows in the steps. The states of the steps (z, slope, v) are fp64:
// they are sums of hundreds of fp32 vectors, and what they decide, a sign, is all that the result takes from them.
// Every sum's order follows width and units alone: a row depends neither on the other rows nor on the thread count.
#include "cpu/sums.h"
#include "cpu/widen.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

constexpr int64_t kAscentRows = 32;   // rows in one go: what bounds the scratch
constexpr int64_t kUnitTile = 32;     // units of one task of a product
constexpr int64_t kPartials = 16;     // runs of units whose fp32 sums Wᵀ total is added from
constexpr int64_t kColumnTile = 512;  // columns of four weight rows and of the sums that the first cache holds

// Scratch memory, or all of it null.
struct Memory {
  explicit Memory(size_t bytes) : data(static_cast<char*>(malloc(bytes))), at(data) {}
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(at);
    at += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return out;
  }
  char *data, *at;
};

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

// sums (kPartials, rows, width): run p of units' Σ_u total[r][u] W[u]; then out = x + a (their sum), rounded once.
void finish(const ValueAscentArgs& a, const float* x, const float* total, int64_t first, int64_t rows, float* sums) {
  const int64_t units = a.units, width = a.width, run = ((units + kPartials - 1) / kPartials + 3) / 4 * 4;
  each_task(kPartials, units * width * rows, [=](int64_t task) {
    float* sum = sums + task * rows * width;
    memset(sum, 0, static_cast<size_t>(rows * width) * sizeof(float));
    const int64_t end = (task + 1) * run < units ? (task + 1) * run : units;
    for (int64_t u = task * run; u < end; u += 4) {
      for (int64_t c = 0; c < width; c += kColumnTile) {
        const int64_t columns = c + kColumnTile < width ? kColumnTile : width - c;
        const float* row[4];
        for (int i = 0; i < 4; ++i) row[i] = a.weight + (u + i < end ? u + i : u) * width + c;
        for (int64_t r = 0; r < rows; ++r) {
          float k[4];
          for (int i = 0; i < 4; ++i) k[i] = u + i < end ? total[r * units + u + i] : 0.0f;
          if (k[0] != 0 || k[1] != 0 || k[2] != 0 || k[3] != 0) add_vectors(sum + r * width + c, row, k, columns);
        }
      }
    }
  });
  each_task(rows, rows * width * kPartials, [=](int64_t r) {
    float* sum = sums + r * width;
    for (int64_t p = 1; p < kPartials; ++p) add_scaled(sum, sums + (p * rows + r) * width, 1.0f, width);
    const float step_size = a.step_size;
    each_column(width, [=](auto lane, int64_t c) {
      typedef typename decltype(lane)::F F;
      const F h = load_as<F>(x + r * width + c) + step_size * load_as<F>(sum + c);
      memcpy(sum + c, &h, sizeof h);
    });
    narrow(a.dtype, sum, a.out, (first + r) * width, width);
  });
}

// Which of a row's units are on, and those that have changed since `add`.
struct Signs {
  char* on;
  int32_t* flipped;
  int64_t count;

  void look(int64_t unit, bool now) {
    if (now == static_cast<bool>(on[unit])) return;
    on[unit] = now;
    flipped[count++] = static_cast<int32_t>(unit);
  }
  // to += ± head[unit] · matrix[unit] for each that has changed, in the units' order.
  void add(double* to, const float* matrix, const float* head, int64_t columns) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) add_next<4>(to, matrix, head, columns, i);
    for (; i < count; ++i) add_next<1>(to, matrix, head, columns, i);
    count = 0;
  }

 private:
  template <int N>
  void add_next(double* to, const float* matrix, const float* head, int64_t columns, int64_t i) const {
    const float* row[N];
    float k[N];
    for (int n = 0; n < N; ++n) {
      const int64_t unit = flipped[i + n];
      row[n] = matrix + unit * columns;
      k[n] = on[unit] ? head[unit] : -head[unit];
    }
    add_vectors(to, row, k, columns);
  }
};

// z += a · slope; true where a sign has changed.
inline bool advance(double* z, const double* slope, double a, int64_t count) {
  typedef decltype(Double{} > Double{}) Mask;
  Mask changed = {};
  int64_t u = 0;
  for (; u + kHalf <= count; u += kHalf) {
    const Double old = load_as<Double>(z + u), now = old + a * load_as<Double>(slope + u);
    changed |= (old > 0.0) ^ (now > 0.0);
    memcpy(z + u, &now, sizeof now);
  }
  bool any = false;
  for (int i = 0; i < kHalf; ++i) any |= changed[i] != 0;
  for (; u < count; ++u) {
    const double old = z[u];
    z[u] = old + a * slope[u];
    any |= (old > 0) != (z[u] > 0);
  }
  return any;
}

// A block of rows on its way: `kAscentRows` rows of everything.
struct Ascent {
  const ValueAscentArgs& a;
  int64_t rows;
  float *x, *z32, *product32, *hidden2, *total, *sums;
  double *z, *slope, *sum;
  char* on;
  int32_t *flipped, *steps_on;
};

// One hidden layer, one row: total = head ⊙ (the number of steps for which the unit is on). A unit that goes on in time
// for step t is counted −t now and + steps at the end.
void steps_of_row(const Ascent& s, int64_t r) {
  const ValueAscentArgs& a = s.a;
  const int64_t units = a.units, at = r * units;
  double *z = s.z + at, *slope = s.slope + at;
  int32_t* steps_on = s.steps_on + at;
  Signs signs{s.on + at, s.flipped + at, 0};
  for (int64_t u = 0; u < units; ++u) {
    z[u] = s.z32[at + u];
    slope[u] = s.product32[at + u];
    signs.on[u] = z[u] > 0;
    steps_on[u] = 0;
  }
  for (int64_t t = 1; t < a.steps; ++t) {
    for (int64_t u = 0; u < units; u += 64) {
      const int64_t end = u + 64 < units ? u + 64 : units;
      if (!advance(z + u, slope + u, a.step_size, end - u)) continue;
      for (int64_t i = u; i < end; ++i) signs.look(i, z[i] > 0);
    }
    for (int64_t i = 0; i < signs.count; ++i) {
      const int32_t unit = signs.flipped[i], step = static_cast<int32_t>(t);
      steps_on[unit] += signs.on[unit] ? -step : step;
    }
    signs.add(slope, a.gram, a.head, units);
  }
  for (int64_t u = 0; u < units; ++u) {
    const int64_t count = steps_on[u] + (signs.on[u] ? a.steps : 0);
    s.total[at + u] = static_cast<float>(count) * a.head[u];
  }
}

void one_hidden_layer(const Ascent& s) {
  const ValueAscentArgs& a = s.a;
  const int64_t units = a.units;
  each_task(s.rows, s.rows * units, [=](int64_t r) {  // m of the first step
    for (int64_t u = r * units; u < (r + 1) * units; ++u) s.total[u] = s.z32[u] > 0 ? a.head[u - r * units] : 0.0f;
  });
  if (a.steps == 0) memset(s.total, 0, static_cast<size_t>(s.rows * units) * sizeof(float));
  if (a.steps <= 1) return;
  product(s.total, s.rows, units, a.gram, nullptr, units, s.product32);
  each_task(s.rows, s.rows * units * a.steps, [=](int64_t r) { steps_of_row(s, r); });
}

// Two hidden layers, one step of one row: v follows the signs of the second, `slope` is v here.
void gradient_of_row(const Ascent& s, int64_t r) {
  const ValueAscentArgs& a = s.a;
  const int64_t units = a.units, at = r * units;
  Signs signs{s.on + r * a.units2, s.flipped + r * a.units2, 0};
  for (int64_t u = 0; u < a.units2; ++u) signs.look(u, s.hidden2[r * a.units2 + u] > 0);
  signs.add(s.slope + at, a.weight2, a.head, units);
  for (int64_t u = at; u < at + units; ++u) {
    const double q = s.z[u] > 0 ? s.slope[u] : 0.0;
    s.sum[u] += q;
    s.z32[u] = static_cast<float>(q);
  }
}

void two_hidden_layers(const Ascent& s) {
  const ValueAscentArgs& a = s.a;
  const int64_t units = a.units, all = s.rows * units;
  memset(s.slope, 0, static_cast<size_t>(all) * sizeof(double));
  memset(s.sum, 0, static_cast<size_t>(all) * sizeof(double));
  memset(s.on, 0, static_cast<size_t>(s.rows * a.units2));
  for (int64_t u = 0; u < all; ++u) s.z[u] = s.z32[u];
  for (int64_t t = 0; t < a.steps; ++t) {
    each_task(s.rows, all, [=](int64_t r) {
      for (int64_t u = r * units; u < (r + 1) * units; ++u) s.z32[u] = s.z[u] > 0 ? static_cast<float>(s.z[u]) : 0.0f;
    });
    product(s.z32, s.rows, units, a.weight2, a.bias2, a.units2, s.hidden2);
    each_task(s.rows, all * 4, [=](int64_t r) { gradient_of_row(s, r); });
    if (t + 1 == a.steps) break;
    product(s.z32, s.rows, units, a.gram, nullptr, units, s.product32);
    const double step_size = a.step_size;
    each_task(s.rows, all, [=](int64_t r) {
      for (int64_t u = r * units; u < (r + 1) * units; ++u) s.z[u] += step_size * s.product32[u];
    });
  }
  for (int64_t u = 0; u < all; ++u) s.total[u] = static_cast<float>(s.sum[u]);
}

}  // namespace

int value_ascent(const ValueAscentArgs& a, void*) {
  const int64_t most = a.rows < kAscentRows ? a.rows : kAscentRows, units = most * a.units, width = most * a.width;
  const int64_t signs = most * (a.units > a.units2 ? a.units : a.units2);
  const int64_t floats = width * (1 + kPartials) + units * 3 + most * a.units2, doubles = units * (a.units2 ? 3 : 2);
  Memory memory(static_cast<size_t>(floats + 2 * signs) * 4 + static_cast<size_t>(doubles) * 8 + static_cast<size_t>(signs) + 4096);
  if (!memory.data) return kOutOfMemory;
  Ascent s{a, 0, memory.take<float>(width), memory.take<float>(units), memory.take<float>(units),
           memory.take<float>(most * a.units2), memory.take<float>(units), memory.take<float>(width * kPartials),
           memory.take<double>(units), memory.take<double>(units), memory.take<double>(a.units2 ? units : 0),
           memory.take<char>(signs), memory.take<int32_t>(signs), memory.take<int32_t>(signs)};
  for (int64_t first = 0; first < a.rows; first += most) {
    s.rows = first + most < a.rows ? most : a.rows - first;
    for (int64_t r = 0; r < s.rows; ++r) {
      float* to = s.x + r * a.width;
      const float* from = widen(a.dtype, a.hidden, (first + r) * a.hidden_stride, to, a.width);
      if (from != to) memcpy(to, from, static_cast<size_t>(a.width) * sizeof(float));
    }
    product(s.x, s.rows, a.width, a.weight, a.bias, a.units, s.z32);
    if (a.units2) two_hidden_layers(s);
    else one_hidden_layer(s);
    finish(a, s.x, s.total, first, s.rows, s.sums);
  }
  return 0;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
