// value_ascent: the steps of one hidden layer, z += a · slope, slope = gram m, m = 1[z > 0] ⊙ head (kernels/cpu's
// value_ascent.cpp has the formulas). The two dense products around them are the caller's.
//
// Streams: of gram, which is symmetric, the rows of units that change sign: 0.3 % of them a step where RE-Control was
// measured, so of 30 steps' products one tenth of one. From L2 as far as it holds gram (64 MB at 4,096 units).
// Grid: a block for a row of hidden states. z, slope and what slope's additions have lost lie in shared memory; a warp
// owns a run of units, and puts those that changed sign into a list of its own, in their order. All warps then
// go through all lists. So every sum has one order, and a row depends on nothing but itself.
#include "reduce.h"
#include "run.h"

namespace fastedit::cuda {
namespace {

constexpr int kAscentThreads = 1024, kUnitBytes = 16;

// Of each unit: z, slope, slope's lost digits, a place in its warp's list; behind them the lists' lengths.
struct AscentState {
  float *z, *slope, *lost;
  int *list, *found;
  __device__ AscentState(float* shared, int units) {
    z = shared, slope = z + units, lost = slope + units;
    list = reinterpret_cast<int*>(lost + units), found = list + units;
  }
};

// Moves the units [first, first + run) of a warp by one step; returns how many changed sign, listed as unit or ~unit
// as they go on or off. A unit that goes on at step t is counted −t, one that goes off t: what is on at the end adds all.
__device__ inline int step_units(const AscentState& s, float* steps_on, int first, int run, int units, float step_size,
                                 int t) {
  int found = 0;
  for (int base = first; base < first + run; base += kWarp) {
    int unit = base + lane();
    bool on = false, flipped = false;
    if (unit < units) {
      float old = s.z[unit], now = fmaf(step_size, s.slope[unit], old);
      s.z[unit] = now;
      on = now > 0.f;
      flipped = on != (old > 0.f);
      if (flipped) put(steps_on + unit, load_no_allocate(steps_on + unit) + static_cast<float>(on ? -t : t));
    }
    unsigned mask = __ballot_sync(kAllLanes, flipped);
    if (flipped) s.list[first + found + __popc(mask & ((1u << lane()) - 1))] = on ? unit : ~unit;
    found += __popc(mask);
  }
  return found;
}

// slope[unit] += ± head[j] · gram[j][unit] over all lists, compensated: hundreds of terms, and no drift.
__device__ inline void add_flips(const AscentState& s, const ValueAscentArgs& a, int unit, int run) {
  float slope = s.slope[unit], lost = s.lost[unit];
  for (int w = 0; w < warps(); ++w) {
    const int* list = s.list + w * run;
    int count = s.found[w];
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      int code = list[i];
      int64_t j = code < 0 ? ~code : code;
      float k = __ldg(a.head + j), term = __ldg(a.gram + j * a.units + unit);
      float y = fmaf(code < 0 ? -k : k, term, -lost), sum = slope + y;
      lost = (sum - slope) - y;
      slope = sum;
    }
  }
  s.slope[unit] = slope, s.lost[unit] = lost;
}

__global__ void __launch_bounds__(kAscentThreads, 1) ascent_steps(const ValueAscentArgs a, int run) {
  FASTEDIT_SHARED(shared);
  int units = static_cast<int>(a.units), steps = static_cast<int>(a.steps), first = warp() * run;
  int end = min(first + run, units);
  AscentState s(shared, warps() * run);
  const int64_t row = int64_t{blockIdx.x} * units;
  float* steps_on = a.total + row;
  for (int unit = first + lane(); unit < end; unit += kWarp) {
    s.z[unit] = __ldg(a.z + row + unit), s.slope[unit] = __ldg(a.slope + row + unit);
    s.lost[unit] = 0.f, put(steps_on + unit, 0.f);
  }
  for (int t = 1; t < steps; ++t) {
    int found = step_units(s, steps_on, first, run, units, a.step_size, t);
    if (lane() == 0) s.found[warp()] = found;
    __syncthreads();
    for (int unit = first + lane(); unit < end; unit += kWarp) add_flips(s, a, unit, run);
    __syncthreads();
  }
  for (int unit = first + lane(); unit < end; unit += kWarp) {
    float count = load_no_allocate(steps_on + unit) + (s.z[unit] > 0.f ? static_cast<float>(steps) : 0.f);
    put(steps_on + unit, count * __ldg(a.head + unit));
  }
}

}  // namespace

int value_ascent(const ValueAscentArgs& a, void* stream) {
  if (!a.z || !a.slope || !a.total || a.units2) return cudaErrorInvalidValue;
  int warp_count = static_cast<int>(least(kAscentThreads / kWarp, ceil_div(a.units, kWarp)));
  int run = static_cast<int>(ceil_div(a.units, int64_t{warp_count} * kWarp)) * kWarp;
  int64_t bytes = int64_t{warp_count} * run * kUnitBytes + warp_count * 4;
  if (bytes > shared_limit()) return cudaErrorInvalidConfiguration;
  return launch(ascent_steps, Shape{a.rows, warp_count * kWarp, static_cast<int>(bytes)}, stream, a, run);
}

}  // namespace fastedit::cuda
