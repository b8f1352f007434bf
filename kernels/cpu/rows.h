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

#include "cpu/dots.h"

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

// sink(r, lane, column, finish(r, lane, column, h')) over R rows under one form. k == 0 leaves h alone, k == 1 is
// scale ⊙ h + bias + z @ write. Wide: the columns that hidden, finish and sink can take at once.
//
// All of the group's rows are read and finished before one is stored: rows lie a multiple of 4 KB apart as a rule, and a
// load that agrees with a store before it in the address's last 12 bits waits for it (a fifth of edit_add_norm's time).
// No loop over columns has a branch in it: GCC at -O1 would keep the group's values on the stack.
template <int R, int Wide, class Hidden, class Finish, class Sink>
inline void edit_rows(const Params& params, float k, int64_t width, const float z[][kMaxRank], Hidden hidden, Finish finish,
                      Sink sink) {
  if (R == 1 && k == 0.0f) {
    each_column<Wide>(width, [=](auto lane, int64_t c) { sink(0, lane, c, finish(0, lane, c, hidden(0, lane, c))); });
    return;
  }
  const Params p = params;
  if (p.rank == 0 && k == 1.0f && p.scale && p.bias) {  // RED
    each_column<Wide>(width, [=](auto lane, int64_t c) {
      constexpr int L = decltype(lane)::count;
      const auto scale = Fp32::load<L>(p.scale + c), bias = Fp32::load<L>(p.bias + c);
      decltype(hidden(0, lane, c)) edited[R];
      for (int r = 0; r < R; ++r) edited[r] = finish(r, lane, c, scale * hidden(r, lane, c) + bias);
      for (int r = 0; r < R; ++r) sink(r, lane, c, edited[r]);
    });
    return;
  }
  alignas(64) float sums[R * kRun];
  for (int64_t from = 0; from < width; from += kRun) {
    const int64_t count = from + kRun < width ? kRun : width - from;
    const float* scale = p.scale ? p.scale + from : kOnes.at;
    const float* add = p.bias ? p.bias + from : kZeros;
    int64_t apart = 0;
    if (p.rank) {
      spread<R>(z, p.rank, p.write + from, width, count, add, 0, sums);
      add = sums, apart = kRun;
    }
    // body(r, lane, column, column in the run) → h'
    auto each = [=](auto body) {
      each_column<Wide>(count, [=](auto lane, int64_t at) {
        decltype(hidden(0, lane, at)) edited[R];
        for (int r = 0; r < R; ++r) edited[r] = finish(r, lane, from + at, body(r, lane, from + at, at));
        for (int r = 0; r < R; ++r) sink(r, lane, from + at, edited[r]);
      });
    };
    if (R == 1 && k != 1.0f) {
      each([=](int, auto lane, int64_t c, int64_t at) {
        constexpr int L = decltype(lane)::count;
        const auto h = hidden(0, lane, c);
        return h + ((Fp32::load<L>(scale + at) - 1.0f) * h + Fp32::load<L>(add + at)) * k;
      });
    } else {
      each([=](int r, auto lane, int64_t c, int64_t at) {
        constexpr int L = decltype(lane)::count;
        return Fp32::load<L>(scale + at) * hidden(r, lane, c) + Fp32::load<L>(add + r * apart + at);
      });
    }
  }
}

struct AsItIs {
  template <class W, class F>
  F operator()(int, W, int64_t, F edited) const { return edited; }
};

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
