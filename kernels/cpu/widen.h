// A run of a row as fp32, and back: for kernels whose arithmetic is the same whatever the rows' dtype, so that it is
// compiled once and not three times.
#pragma once
#include "cpu/vec.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

template <class T>
inline void widen_as(const void* from, int64_t at, float* to, int64_t count) {
  const typename T::T* p = static_cast<const typename T::T*>(from) + at;
  each_column(count, [=](auto lane, int64_t c) {
    const auto v = T::template load<decltype(lane)::count>(p + c);
    memcpy(to + c, &v, sizeof v);
  });
}

template <class T>
inline void narrow_as(const float* from, void* to, int64_t at, int64_t count) {
  typename T::T* p = static_cast<typename T::T*>(to) + at;
  each_column(count, [=](auto lane, int64_t c) {
    constexpr int L = decltype(lane)::count;
    T::template store<L>(p + c, load_as<typename Lane<L>::F>(from + c));
  });
}

// Elements [at, at + count) of a stream: in place where it is fp32, else in `space`.
inline const float* widen(int dtype, const void* from, int64_t at, float* space, int64_t count) {
  if (dtype == F32) return static_cast<const float*>(from) + at;
  if (dtype == BF16) widen_as<Bf16>(from, at, space, count);
  if (dtype == F16) widen_as<Fp16>(from, at, space, count);
  return space;
}

inline void narrow(int dtype, const float* from, void* to, int64_t at, int64_t count) {
  if (dtype == F32) memcpy(static_cast<float*>(to) + at, from, static_cast<size_t>(count) * sizeof(float));
  if (dtype == BF16) narrow_as<Bf16>(from, to, at, count);
  if (dtype == F16) narrow_as<Fp16>(from, to, at, count);
}

// One register of doubles, and half a register of floats to widen into it.
constexpr int kHalf = kLanes / 2;
typedef double Double __attribute__((vector_size(4 * kLanes)));
inline Double load_double(const float* p) { return __builtin_convertvector(load_as<Lane<kHalf>::F>(p), Double); }

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
