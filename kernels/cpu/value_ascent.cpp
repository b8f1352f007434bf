// value_ascent:  h' = h + a Σ_t dV/dh(h_t),  h_{t+1} = h_t + a dV/dh(h_t)   (RE-Control, arXiv 2406.05954)
//
// One hidden layer, V = head · relu(W h + b): dV/dh = Wᵀ m with m = 1[z > 0] ⊙ head, so with gram = W Wᵀ the steps stay
// in z: z += a gram m. Two, V = head · relu(W₂ relu(z) + b₂): z += a gram q with q = 1[z > 0] ⊙ v, v = W₂ᵀ m₂.
// Streams, one hidden layer: W once for z, gram once for the first slope gram m, after that those of gram's rows (it
// is symmetric) whose units change sign, and W once more for Wᵀ Σ m. For a batch the three passes are one each.
// Two: gram once per step, for q is dense, and of W₂ the rows of the units whose sign may have changed (`Looks`).
//
// Threads over tiles of units in the products, over rows in the steps. The states of the steps (z, slope, v) are fp64:
// they are sums of hundreds of fp32 vectors, and what they decide, a sign, is all that the result takes from them.
// Every sum's order follows width and units alone: a row depends neither on the other rows nor on the thread count.
#include "cpu/products.h"
#include "cpu/widen.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

constexpr int64_t kAscentRows = 32;   // rows in one go: what bounds the scratch
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
  struct Looks {
    double *due, *way, *size, *norm;
  } looks;
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

// Looks: which units of the second hidden layer must be looked at. From one look to the next z₂ moves by no more than
// norm = ‖W₂[unit]‖ times the way that relu(z), now of length `size`, has gone in between (Cauchy–Schwarz and the triangle
// inequality). Until that way is `due` a unit keeps its sign. The slack is more than the rounding of two fp32 sums, so
// that every sign is the one that a look at each step finds.
inline void looked_at(const Ascent& s, int64_t r, int64_t unit) {
  const double slack = (s.a.units / kLanes + 8) * 0x1p-23, value = s.hidden2[r * s.a.units2 + unit];
  const double safe = 0.999 * __builtin_fabs(value) / s.looks.norm[unit] - slack * s.looks.size[r];
  s.looks.due[r * s.a.units2 + unit] = s.looks.way[r] + safe;
}

inline bool is_due(const Ascent& s, int64_t r, int64_t unit) {  // a NaN is
  return !(s.looks.due[r * s.a.units2 + unit] > s.looks.way[r]);
}

inline void look(const Ascent& s, int64_t r, int64_t unit) {
  const ValueAscentArgs& a = s.a;
  s.hidden2[r * a.units2 + unit] = dot(s.z32 + r * a.units, a.weight2 + unit * a.units, a.units) + a.bias2[unit];
  looked_at(s, r, unit);
}

void look_at_all(const Ascent& s) {
  const ValueAscentArgs& a = s.a;
  product(s.z32, s.rows, a.units, a.weight2, a.bias2, a.units2, s.hidden2);
  each_task(a.units2, a.units2 * (a.units + s.rows), [=](int64_t unit) {
    for (int64_t r = 0; r < s.rows; ++r) looked_at(s, r, unit);
  });
}

// hidden2 with the signs of W₂ x + b₂, x in z32. Where more than half are due, a product is faster than single units.
void second_layer(const Ascent& s) {
  const ValueAscentArgs& a = s.a;
  int64_t count = 0;
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t unit = 0; unit < a.units2; ++unit) count += is_due(s, r, unit);
  }
  if (2 * count > s.rows * a.units2) return look_at_all(s);
  each_task((a.units2 + kUnitTile - 1) / kUnitTile, count * a.units, [=](int64_t task) {
    const int64_t end = (task + 1) * kUnitTile < a.units2 ? (task + 1) * kUnitTile : a.units2;
    for (int64_t unit = task * kUnitTile; unit < end; ++unit) {
      for (int64_t r = 0; r < s.rows; ++r) {
        if (is_due(s, r, unit)) look(s, r, unit);
      }
    }
  });
}

// The norms of W₂'s rows, and where z stands.
void prepare_looks(const Ascent& s) {
  const ValueAscentArgs& a = s.a;
  each_task(a.units2, a.units2 * a.units, [=](int64_t unit) {
    const float* row = a.weight2 + unit * a.units;
    s.looks.norm[unit] = __builtin_sqrt(dot(row, row, a.units));
  });
  for (int64_t r = 0; r < s.rows; ++r) {
    double square = 0;
    for (int64_t u = r * a.units; u < (r + 1) * a.units; ++u) square += s.z[u] > 0 ? s.z[u] * s.z[u] : 0;
    s.looks.way[r] = 0;
    s.looks.size[r] = __builtin_sqrt(square);
  }
}

// z += a · gram q, and how far relu(z) has gone.
void move_row(const Ascent& s, int64_t r) {
  const double step_size = s.a.step_size;
  double moved = 0, square = 0;
  for (int64_t u = r * s.a.units; u < (r + 1) * s.a.units; ++u) {
    const double old = s.z[u] > 0 ? s.z[u] : 0;
    s.z[u] += step_size * s.product32[u];
    const double now = s.z[u] > 0 ? s.z[u] : 0;
    moved += (now - old) * (now - old);
    square += now * now;
  }
  s.looks.way[r] += __builtin_sqrt(moved);
  s.looks.size[r] = __builtin_sqrt(square);
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
  prepare_looks(s);
  for (int64_t t = 0; t < a.steps; ++t) {
    each_task(s.rows, all, [=](int64_t r) {
      for (int64_t u = r * units; u < (r + 1) * units; ++u) s.z32[u] = s.z[u] > 0 ? static_cast<float>(s.z[u]) : 0.0f;
    });
    if (t == 0) look_at_all(s);
    else second_layer(s);
    each_task(s.rows, all * 4, [=](int64_t r) { gradient_of_row(s, r); });
    if (t + 1 == a.steps) break;
    product(s.z32, s.rows, units, a.gram, nullptr, units, s.product32);
    each_task(s.rows, all, [=](int64_t r) { move_row(s, r); });
  }
  for (int64_t u = 0; u < all; ++u) s.total[u] = static_cast<float>(s.sum[u]);
}

}  // namespace

int value_ascent(const ValueAscentArgs& a, void*) {
  const int64_t most = a.rows < kAscentRows ? a.rows : kAscentRows, units = most * a.units, width = most * a.width;
  const int64_t signs = most * (a.units > a.units2 ? a.units : a.units2);
  const int64_t floats = width * (1 + kPartials) + units * 3 + most * a.units2;
  const int64_t doubles = units * (a.units2 ? 3 : 2) + (most + 1) * a.units2 + 2 * most;
  Memory memory(static_cast<size_t>(floats + 2 * signs) * 4 + static_cast<size_t>(doubles) * 8 +
                static_cast<size_t>(signs) + 4096);
  if (!memory.data) return kOutOfMemory;
  Ascent s{a, 0, memory.take<float>(width), memory.take<float>(units), memory.take<float>(units),
           memory.take<float>(most * a.units2), memory.take<float>(units), memory.take<float>(width * kPartials),
           memory.take<double>(units), memory.take<double>(units), memory.take<double>(a.units2 ? units : 0),
           {memory.take<double>(most * a.units2), memory.take<double>(most), memory.take<double>(most),
            memory.take<double>(a.units2)},
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
