// Vectors of L floats in the compiler's own vector types, and rows of fp32, bf16 or fp16 as such vectors.
//
// kLanes is the register's width in the instruction set being compiled; L = 1 serves a row's tail, so one
// body (a generic lambda over Lane<L>) does both. Everything is in an anonymous namespace and no standard
// library template appears: a weak symbol compiled for AVX-512 could be linked in for every machine.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <int L>
struct Lane {
  static constexpr int count = L;
  typedef float F __attribute__((vector_size(4 * L)));
  typedef uint32_t U __attribute__((vector_size(4 * L)));
  typedef int32_t I __attribute__((vector_size(4 * L)));
  typedef uint16_t H __attribute__((vector_size(2 * L)));
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  typedef F Sum;  // of products: the multiply's own rounding is fused away
#else
  typedef double Sum __attribute__((vector_size(8 * L)));
#endif
};
template <class T, class P>
inline T load_as(const P* p) {
  T v;
  memcpy(&v, p, sizeof(T));
  return v;
}
template <int L>
inline typename Lane<L>::F splat(float x) {
  return x - typename Lane<L>::F{};
}
template <class F>
inline auto sum_lanes(F v) {
  typedef decltype(v[0] + v[0]) E;
  constexpr int n = sizeof(F) / sizeof(E);
  E part[n];
  memcpy(part, &v, sizeof v);
  for (int half = n / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// A row's element type: load<L>(p, i) gives L floats from column i on, store<L> rounds to nearest even.
struct Fp32 {
  typedef float T;
  template <int L>
  static inline typename Lane<L>::F load(const T* p) { return load_as<typename Lane<L>::F>(p); }
  template <int L>
  static inline void store(T* p, typename Lane<L>::F v) { memcpy(p, &v, sizeof v); }
  template <int L>
  static inline typename Lane<L>::F rounded(typename Lane<L>::F v) { return v; }
};

struct Bf16 {
  typedef uint16_t T;
  template <int L>
  static inline typename Lane<L>::F load(const T* p) {
    typedef typename Lane<L>::U U;
    return (typename Lane<L>::F)(__builtin_convertvector(load_as<typename Lane<L>::H>(p), U) << 16);
  }
  template <int L>
  static inline typename Lane<L>::U bits(typename Lane<L>::F v) {
    typedef typename Lane<L>::U U;
    const U raw = (U)v;
    const U even = raw + 0x7fffu + ((raw >> 16) & 1u);
    return (v == v) ? even : (U{} + 0x7fc00000u);
  }
  template <int L>
  static inline void store(T* p, typename Lane<L>::F v) {
    const auto half = __builtin_convertvector(bits<L>(v) >> 16, typename Lane<L>::H);
    memcpy(p, &half, sizeof half);
  }
  template <int L>
  static inline typename Lane<L>::F rounded(typename Lane<L>::F v) {
    return (typename Lane<L>::F)(bits<L>(v) & 0xffff0000u);
  }
};

struct Fp16 {
  typedef uint16_t T;
  template <int L>
  static inline typename Lane<L>::F widen(typename Lane<L>::H h) {
#if defined(__AVX512F__)
    if constexpr (L == 16) return (typename Lane<L>::F)_mm512_cvtph_ps((__m256i)h);
#endif
#if defined(__F16C__)
    if constexpr (L == 8) return (typename Lane<L>::F)_mm256_cvtph_ps((__m128i)h);
#endif
    // Exponent rebiased by one exact multiply, which also makes subnormals normal; inf and nan put back.
    typedef typename Lane<L>::U U;
    typedef typename Lane<L>::F F;
    const U raw = __builtin_convertvector(h, U);
    const U magnitude = (raw & 0x7fffu) << 13;
    const F scaled = (F)magnitude * 0x1p112f;
    const U special = (U)((typename Lane<L>::I)((raw & 0x7c00u) == 0x7c00u)) & 0x7f800000u;
    return (F)((U)scaled | special | ((raw & 0x8000u) << 16));
  }
  template <int L>
  static inline typename Lane<L>::H narrow(typename Lane<L>::F v) {
#if defined(__AVX512F__)
    if constexpr (L == 16) return (typename Lane<L>::H)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#endif
#if defined(__F16C__)
    if constexpr (L == 8) return (typename Lane<L>::H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
    typedef typename Lane<L>::U U;
    typedef typename Lane<L>::F F;
    const U raw = (U)v, sign = (raw >> 16) & 0x8000u, magnitude = raw & 0x7fffffffu;
    const U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const U subnormal = (U)((F)magnitude + 0.5f) - 0x3f000000u;  // adding 0.5 rounds at 2^-24, fp16's last place
    U half = (magnitude < (113u << 23)) ? subnormal : normal;
    half = (magnitude >= 0x477ff000u) ? (U{} + 0x7c00u) : half;
    half = (magnitude > 0x7f800000u) ? (U{} + 0x7e00u) : half;
    return __builtin_convertvector(half | sign, typename Lane<L>::H);
  }
  template <int L>
  static inline typename Lane<L>::F load(const T* p) { return widen<L>(load_as<typename Lane<L>::H>(p)); }
  template <int L>
  static inline void store(T* p, typename Lane<L>::F v) {
    const auto half = narrow<L>(v);
    memcpy(p, &half, sizeof half);
  }
  template <int L>
  static inline typename Lane<L>::F rounded(typename Lane<L>::F v) { return widen<L>(narrow<L>(v)); }
};

// body(Lane<L>{}, column) over a row: whole registers, then single columns.
template <class Body>
inline void each_column(int64_t width, Body body) {
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) body(Lane<kLanes>{}, column);
  for (; column < width; ++column) body(Lane<1>{}, column);
}

// Σ over a row of body(lane, column), in kSums running registers (32 partial sums in every instruction set):
// the order depends on the width alone.
constexpr int kSums = 32 / kLanes;

template <class F>
inline auto sum_registers(const F (&part)[kSums]) {
  F total[kSums];
  for (int i = 0; i < kSums; ++i) total[i] = part[i];
  for (int half = kSums / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) total[i] += total[i + half];
  }
  return sum_lanes(total[0]);
}

template <class Body>
inline float sum_columns(int64_t width, Body body) {
  typename Lane<kLanes>::F part[kSums] = {};
  int64_t column = 0;
  for (; column + kSums * kLanes <= width; column += kSums * kLanes) {
    for (int i = 0; i < kSums; ++i) part[i] += body(Lane<kLanes>{}, column + i * kLanes);
  }
  for (int i = 0; column + kLanes <= width; column += kLanes, ++i) part[i] += body(Lane<kLanes>{}, column);
  float sum = sum_registers(part), tail = 0.0f;
  for (; column < width; ++column) tail += body(Lane<1>{}, column)[0];
  return sum + tail;
}

}  // namespace
}  // namespace FASTEDIT_ISA
}  // namespace fastedit
