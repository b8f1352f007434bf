// What the CPU kernels share: threads over rows, groups of rows under one set of parameters, and the form.
//
// Rows are taken in groups of kGroup: where all of them see the same parameters at coefficient 1, a loaded
// scale, bias, read or write serves the whole group (fp32 parameters are up to four times the traffic of a
// bf16 row); else each row goes alone. A row's arithmetic is the same either way, lane by lane, so its result
// depends neither on the other rows nor on the thread count.
#pragma once
#include <math.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "abi.h"
#include "cpu/vec.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

constexpr int kGroup = 4;
constexpr int64_t kGrain = 1 << 15;  // elements a thread must get: waking a team costs some microseconds

// body(task) for task in [0, tasks), on at most one thread per kGrain of the elements.
template <class Body>
inline void each_task(int64_t tasks, int64_t elements, Body body) {
#ifdef _OPENMP
  int64_t threads = elements / kGrain;
  if (threads > tasks) threads = tasks;
  if (threads > 1 && threads > omp_get_max_threads()) threads = omp_get_max_threads();
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
#endif
  (void)elements;
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

// fp32 scratch for the length of one task; aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats > 0 && posix_memalign(&data_, 64, static_cast<size_t>(floats) * sizeof(float)) != 0) data_ = nullptr;
    if (floats > 0 && !data_) abort();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats() const { return static_cast<float*>(data_); }

 private:
  void* data_ = nullptr;
};

// The parameters one row sees.
struct Params {
  const float *scale, *bias, *read, *offset, *write;
  int64_t rank;
};

inline int32_t slot_of(const Form& form, int64_t row) {
  if (!form.slot) return 0;
  const int32_t slot = form.slot[row];
  return slot >= 0 && slot < form.slots ? slot : -1;
}

inline Params params_of(const Form& form, int64_t width, int32_t slot) {
  const int64_t s = slot < 0 ? 0 : slot;
  Params p{};
  p.scale = form.scale ? form.scale + s * width : nullptr;
  p.bias = form.bias ? form.bias + s * width : nullptr;
  p.read = form.read ? form.read + s * form.rank * width : nullptr;
  p.offset = form.offset ? form.offset + s * form.rank : nullptr;
  p.write = form.write ? form.write + s * form.rank * width : nullptr;
  p.rank = form.read ? form.rank : 0;
  return p;
}

inline float coefficient_of(const Form& form, int64_t row, int32_t slot) {
  if (slot < 0) return 0.0f;
  return form.coefficient ? form.coefficient[row * form.coefficient_stride] : 1.0f;
}

// Starts to load a row's parameters while the row before is edited: in a large bank each row's lie somewhere else.
inline void fetch(const Params& p, int64_t width) {
  for (int64_t c = 0; c < width; c += 16) {
    if (p.scale) __builtin_prefetch(p.scale + c);
    if (p.bias) __builtin_prefetch(p.bias + c);
  }
}

// body.template operator()<R>(first_row, params, k) for each group: R = kGroup at k = 1, else R = 1.
template <class Body>
inline void each_group(const Form& form, int64_t rows, int64_t width, Body body) {
  each_task((rows + kGroup - 1) / kGroup, rows * width, [&](int64_t task) {
    const int64_t first = task * kGroup, last = first + kGroup < rows ? first + kGroup : rows;
    bool together = last - first == kGroup;
    const int32_t slot = slot_of(form, first);
    for (int64_t row = first; row < last && together; ++row) {
      const int32_t own = slot_of(form, row);
      together = own == slot && coefficient_of(form, row, own) == 1.0f;
    }
    if (together) {
      body.template operator()<kGroup>(first, params_of(form, width, slot), 1.0f);
      return;
    }
    for (int64_t row = first; row < last; ++row) {
      const int32_t own = slot_of(form, row);
      if (form.slot && row + 1 < rows) fetch(params_of(form, width, slot_of(form, row + 1)), width);
      body.template operator()<1>(row, params_of(form, width, own), coefficient_of(form, row, own));
    }
  });
}

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

// z[r][j] = Σ h_r ⊙ read_j + offset_j. hidden(r, lane, column) gives h.
template <int R, class Hidden>
inline void project_rows(const float* read, const float* offset, int64_t rank, int64_t width, Hidden hidden,
                         float z[][kMaxRank]) {
  for (int64_t j = 0; j < rank; ++j) {
    dot_rows<R>(read + j * width, width, hidden, [=](int r, auto sum) {
      z[r][j] = static_cast<float>(sum + (offset ? offset[j] : 0.0f));
    });
  }
}

inline float gate_at(const float* rule, float s) {
  const float threshold = rule[0], sharpness = rule[1];
  if (sharpness > 0.0f) return 1.0f / (1.0f + expf(-sharpness * (s - threshold)));
  return s > threshold ? 1.0f : 0.0f;
}

// g of R rows under one gate (abi.h, Form), into g[r]. A cosine takes its two sums in one pass over the row: the row is
// what all is multiplied by, the gate and the row itself are the two "rows".
template <int R, class Hidden>
inline void open_gate(const float* gate, const float* rule, int64_t width, Hidden hidden, float* g) {
  if (rule[2] == 0.0f) {
    dot_rows<R>(gate, width, hidden, [=](int r, auto sum) { g[r] = gate_at(rule, static_cast<float>(sum)); });
    return;
  }
  for (int r = 0; r < R; ++r) {
    auto row = [=](auto lane, int64_t c) { return hidden(r, lane, c); };
    auto gate_and_row = [=](int which, auto lane, int64_t c) {
      return which == 0 ? Fp32::load<decltype(lane)::count>(gate + c) : hidden(r, lane, c);
    };
    float sums[2];
    dot_rows<2>(width, row, gate_and_row, [&sums](int which, auto sum) { sums[which] = static_cast<float>(sum); });
    const float length = sqrtf(sums[1]);
    g[r] = gate_at(rule, length > 0.0f ? sums[0] / length : sums[0]);
  }
}

// each_group for a form that may have a gate: a row's k is its coefficient · g, computed while the row is on its way
// into the cache for the edit. hidden_of.template operator()<R>(row) gives R rows as the form is given them.
template <class HiddenOf, class Body>
inline void each_gated_group(const Form& form, int64_t rows, int64_t width, HiddenOf hidden_of, Body body) {
  if (!form.gate) return each_group(form, rows, width, body);
  each_task((rows + kGroup - 1) / kGroup, rows * width, [&](int64_t task) {
    const int64_t first = task * kGroup;
    const int count = static_cast<int>(first + kGroup < rows ? kGroup : rows - first);
    int32_t slot[kGroup];
    float k[kGroup], g[kGroup] = {};
    bool alike = count == kGroup;  // under one gate, which then is read once for all
    for (int r = 0; r < count; ++r) {
      slot[r] = slot_of(form, first + r);
      k[r] = coefficient_of(form, first + r, slot[r]);
      alike = alike && slot[r] == slot[0] && k[r] != 0.0f;
    }
    auto gate_of = [&](int r) { return form.gate + static_cast<int64_t>(slot[r]) * width; };
    if (alike) {
      open_gate<kGroup>(gate_of(0), form.rule + 3 * slot[0], width, hidden_of.template operator()<kGroup>(first), g);
    } else {
      for (int r = 0; r < count; ++r) {  // a row at coefficient 0 is not looked at: it keeps its bits, NaN among them
        if (k[r] == 0.0f) continue;
        open_gate<1>(gate_of(r), form.rule + 3 * slot[r], width, hidden_of.template operator()<1>(first + r), g + r);
      }
    }
    bool together = alike;
    for (int r = 0; r < count; ++r) {
      k[r] *= g[r];
      together = together && k[r] == 1.0f;
    }
    if (together) {
      body.template operator()<kGroup>(first, params_of(form, width, slot[0]), 1.0f);
      return;
    }
    for (int r = 0; r < count; ++r) body.template operator()<1>(first + r, params_of(form, width, slot[r]), k[r]);
  });
}

inline void store_z(float* out, const float* z, int64_t row, int64_t rank) {
  if (out) memcpy(out + row * rank, z, static_cast<size_t>(rank) * sizeof(float));
}

// The R row pointers of a stream. Bodies capture them, and all else, by value: behind a reference the compiler must
// read every pointer and stride again after each store (that cost 1.16 of a plain add's time where this costs 1).
template <class T, int R>
struct RowPointers {
  T* at[R];
  RowPointers(T* first, int64_t stride) {
    for (int r = 0; r < R; ++r) at[r] = first + r * stride;
  }
};

// sink(r, lane, column, h') over R rows under one form. k == 0 leaves h alone, k == 1 is scale ⊙ h + bias + z @ write.
// Wide: the columns that hidden and sink can take at once.
template <int R, int Wide, class Hidden, class Sink>
inline void edit_rows(const Params& params, float k, int64_t width, const float z[][kMaxRank], Hidden hidden, Sink sink) {
  if (R == 1 && k == 0.0f) {
    each_column<Wide>(width, [=](auto lane, int64_t c) { sink(0, lane, c, hidden(0, lane, c)); });
    return;
  }
  const Params p = params;
  if (p.rank == 0 && k == 1.0f && p.scale && p.bias) {  // RED, with no branch in the loop
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      const auto scale = Fp32::load<L>(p.scale + c), bias = Fp32::load<L>(p.bias + c);
      for (int r = 0; r < R; ++r) sink(r, lane, c, scale * hidden(r, lane, c) + bias);
    });
    return;
  }
  each_column(width, [=](auto lane, int64_t c) {
    constexpr int L = decltype(lane)::count;
    typedef typename Lane<L>::F F;
    typedef typename Lane<L>::Sum Sum;
    const F scale = p.scale ? load_as<F>(p.scale + c) : splat<L>(1.0f);
    const F bias = p.bias ? load_as<F>(p.bias + c) : F{};
    F edited[R];
    for (int r = 0; r < R; ++r) {
      const F h = hidden(r, lane, c);
      edited[r] = (R == 1 && k != 1.0f) ? (scale - 1.0f) * h + bias : scale * h + bias;
    }
    if (p.rank) {
      Sum added[R] = {};
      for (int64_t j = 0; j < p.rank; ++j) {
        const Sum write = __builtin_convertvector(load_as<F>(p.write + j * width + c), Sum);
        for (int r = 0; r < R; ++r) added[r] += z[r][j] * write;
      }
      for (int r = 0; r < R; ++r) {
        edited[r] = __builtin_convertvector(__builtin_convertvector(edited[r], Sum) + added[r], F);
      }
    }
    for (int r = 0; r < R; ++r) {
      if (R == 1 && k != 1.0f) edited[r] = hidden(r, lane, c) + k * edited[r];
      sink(r, lane, c, edited[r]);
    }
  });
}

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
