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

// Twice kLanes columns with the even ones in one register and the odd ones in the other: 16-bit rows come apart and
// together again in one instruction a register, where widening and narrowing cost two and three.
struct Pair {
  typedef Lane<kLanes>::F V;
  V even, odd;
};
inline Pair operator+(Pair a, Pair b) { return {a.even + b.even, a.odd + b.odd}; }
inline Pair operator-(Pair a, Pair b) { return {a.even - b.even, a.odd - b.odd}; }
inline Pair operator*(Pair a, Pair b) { return {a.even * b.even, a.odd * b.odd}; }
inline Pair operator+(Pair a, float b) { return {a.even + b, a.odd + b}; }
inline Pair operator-(Pair a, float b) { return {a.even - b, a.odd - b}; }
inline Pair operator*(Pair a, float b) { return {a.even * b, a.odd * b}; }
inline Pair& operator+=(Pair& a, Pair b) { return a = a + b; }

template <>
struct Lane<2 * kLanes> {
  static constexpr int count = 2 * kLanes;
  typedef Pair F;
};

template <class T, class P>
inline T load_as(const P* p) {
  T v;
  memcpy(&v, p, sizeof(T));
  return v;
}
template <int L>
inline typename Lane<L>::F splat(float x) {
  return typename Lane<L>::F{} + x;
}
// Halves onto halves, down to the first lane.
template <class F>
inline auto sum_lanes(F v) {
  typedef decltype(v[0] + v[0]) E;
  constexpr int n = sizeof(F) / sizeof(E);
  if constexpr (n == 16) v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (n == 16) v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
  if constexpr (n == 8) v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  if constexpr (n >= 4) return (v[0] + v[2]) + (v[1] + v[3]);
  else if constexpr (n == 2) return v[0] + v[1];
  else return v[0];
}

// The lanes' sum in double.
inline double sum_exactly(Lane<kLanes>::F v) {
  typedef Lane<kLanes / 2>::F Half;
  typedef double Wide __attribute__((vector_size(4 * kLanes)));
  Half low, high;
  memcpy(&low, &v, sizeof low);
  memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  return sum_lanes(__builtin_convertvector(low, Wide) + __builtin_convertvector(high, Wide));
}
#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
inline double sum_exactly(Lane<kLanes>::Sum v) { return sum_lanes(v); }
#endif

// A row's element type: load<L>(p, i) gives L floats from column i on, store<L> rounds to nearest even.
struct Fp32 {
  typedef float T;
  static constexpr int kWide = kLanes;  // columns taken at once where a loop's body allows
  template <int L>
  static inline typename Lane<L>::F load(const T* p) {
    if constexpr (L == 2 * kLanes) return take_apart<L / 2>(p);
    else return load_as<typename Lane<L>::F>(p);
  }
  template <int L>
  static inline void store(T* p, typename Lane<L>::F v) {
    if constexpr (L == 2 * kLanes) put_together<L / 2>(p, v);
    else memcpy(p, &v, sizeof v);
  }
  template <int L>
  static inline typename Lane<L>::F rounded(typename Lane<L>::F v) { return v; }
  template <int L>
  static inline typename Lane<L>::F put(T* p, typename Lane<L>::F v) { store<L>(p, v); return v; }
  template <int L>
  static inline typename Lane<L>::F rounded_product(typename Lane<L>::F v) { return v; }
  template <int L>
  static inline void store_product(T* p, typename Lane<L>::F v) { store<L>(p, v); }

 private:
  template <int L>
  static inline Pair take_apart(const float* p) {
    typedef typename Lane<L>::F V;
    const V a = load_as<V>(p), b = load_as<V>(p + L);
    if constexpr (L == 4) {
      return {__builtin_shufflevector(a, b, 0, 2, 4, 6), __builtin_shufflevector(a, b, 1, 3, 5, 7)};
    } else if constexpr (L == 8) {
      return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14),
              __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)};
    } else {
      return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
              __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
    }
  }
  template <int L>
  static inline void put_together(float* p, Pair v) {
    const typename Lane<L>::F even = v.even, odd = v.odd;
    typename Lane<L>::F a, b;
    if constexpr (L == 4) {
      a = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
      b = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
    } else if constexpr (L == 8) {
      a = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
      b = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
    } else {
      a = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      b = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    memcpy(p, &a, sizeof a);
    memcpy(p + L, &b, sizeof b);
  }
};

// 16-bit columns as 32-bit lanes, and the low halves of such lanes back. (GCC 12 makes up to six instructions of
// __builtin_convertvector here, and one of these.)
template <int L>
inline typename Lane<L>::U widen_halves(typename Lane<L>::H h) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (typename Lane<L>::U)_mm512_cvtepu16_epi32((__m256i)h);
#endif
#if defined(__AVX2__)
  if constexpr (L == 8) return (typename Lane<L>::U)_mm256_cvtepu16_epi32((__m128i)h);
#endif
  return __builtin_convertvector(h, typename Lane<L>::U);
}
template <int L>
inline typename Lane<L>::H low_halves(typename Lane<L>::U raw) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (typename Lane<L>::H)_mm512_cvtepi32_epi16((__m512i)raw);
#endif
  return __builtin_convertvector(raw, typename Lane<L>::H);
}

struct Bf16 {
  typedef uint16_t T;
  static constexpr int kWide = 2 * kLanes;
  template <int L>
  static inline typename Lane<L>::F load(const T* p) {
    if constexpr (L == 2 * kLanes) {
      typedef Lane<kLanes>::U U;
      const U both = load_as<U>(p);
      return {(Pair::V)(both << 16), (Pair::V)(both & 0xffff0000u)};
    } else {
      return (typename Lane<L>::F)(widen_halves<L>(load_as<typename Lane<L>::H>(p)) << 16);
    }
  }
  template <int L>
  static inline typename Lane<L>::F rounded(typename Lane<L>::F v) {
    return high_halves<L>(v, [](auto half) { return bits(half); });
  }
  template <int L>
  static inline void store(T* p, typename Lane<L>::F v) {
    store_bits<L>(p, v, [](auto half) { return bits(half); });
  }
  // Stores, and returns what was stored.
  template <int L>
  static inline typename Lane<L>::F put(T* p, typename Lane<L>::F v) {
    const typename Lane<L>::F kept = rounded<L>(v);
    if constexpr (L == 2 * kLanes) {
      typedef Lane<kLanes>::U U;
      const U both = ((U)kept.even >> 16) | (U)kept.odd;
      memcpy(p, &both, sizeof both);
    } else {
      const auto half = low_halves<L>((typename Lane<L>::U)kept >> 16);
      memcpy(p, &half, sizeof half);
    }
    return kept;
  }
  // The same for values computed from 16-bit and canonical ones: a NaN among them ends in zeros (or is the processor's own),
  // which rounding cannot carry over into the sign, so it need not be looked for.
  template <int L>
  static inline typename Lane<L>::F rounded_product(typename Lane<L>::F v) {
    return high_halves<L>(v, [](auto half) { return nearest_even(half); });
  }
  template <int L>
  static inline void store_product(T* p, typename Lane<L>::F v) {
    store_bits<L>(p, v, [](auto half) { return nearest_even(half); });
  }

 private:
  template <class F>
  static inline auto nearest_even(F v) {
    typedef typename Lane<sizeof(F) / 4>::U U;
    const U raw = (U)v;
    return raw + 0x7fffu + ((raw >> 16) & 1u);
  }
  template <class F>
  static inline auto bits(F v) {
    typedef typename Lane<sizeof(F) / 4>::U U;
    return (v == v) ? nearest_even(v) : (U{} + 0x7fc00000u);
  }
  template <int L, class Round>
  static inline typename Lane<L>::F high_halves(typename Lane<L>::F v, Round round) {
    if constexpr (L == 2 * kLanes) {
      return {(Pair::V)(round(v.even) & 0xffff0000u), (Pair::V)(round(v.odd) & 0xffff0000u)};
    } else {
      return (typename Lane<L>::F)(round(v) & 0xffff0000u);
    }
  }
  template <int L, class Round>
  static inline void store_bits(T* p, typename Lane<L>::F v, Round round) {
    if constexpr (L == 2 * kLanes) {
      const auto both = (round(v.even) >> 16) | (round(v.odd) & 0xffff0000u);
      memcpy(p, &both, sizeof both);
    } else {
      const auto half = low_halves<L>(round(v) >> 16);
      memcpy(p, &half, sizeof half);
    }
  }
};

struct Fp16 {
  typedef uint16_t T;
  static constexpr int kWide = kLanes;
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
  template <int L>
  static inline typename Lane<L>::F put(T* p, typename Lane<L>::F v) {
    const auto half = narrow<L>(v);
    memcpy(p, &half, sizeof half);
    return widen<L>(half);
  }
  template <int L>
  static inline typename Lane<L>::F rounded_product(typename Lane<L>::F v) { return rounded<L>(v); }
  template <int L>
  static inline void store_product(T* p, typename Lane<L>::F v) { store<L>(p, v); }
};

// Every NaN as 0x7fc00000.
template <int L>
inline typename Lane<L>::F canonical(typename Lane<L>::F v) {
  if constexpr (L == 2 * kLanes) {
    return {canonical<L / 2>(v.even), canonical<L / 2>(v.odd)};
  } else {
    typedef typename Lane<L>::U U;
    return (typename Lane<L>::F)((v == v) ? (U)v : (U{} + 0x7fc00000u));
  }
}

// body(Lane<L>{}, column) over a row: pairs of registers where Wide = 2 kLanes, whole registers, then single columns.
template <int Wide = kLanes, class Body>
inline void each_column(int64_t width, Body body) {
  int64_t column = 0;
  if constexpr (Wide > kLanes) {
    for (; column + Wide <= width; column += Wide) body(Lane<Wide>{}, column);
  }
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

template <int Wide = kLanes, class Body>
inline float sum_columns(int64_t width, Body body) {
  typedef typename Lane<kLanes>::F F;
  F part[kSums] = {};
  int64_t column = 0;
  if constexpr (Wide > kLanes) {  // as many chains of additions as below, each in two registers
    Pair pair[2][kSums / 2] = {};
    for (; column + 2 * kSums * kLanes <= width; column += 2 * kSums * kLanes) {
      for (int i = 0; i < kSums; ++i) {
        pair[i / (kSums / 2)][i % (kSums / 2)] += body(Lane<Wide>{}, column + i * Wide);
      }
    }
    for (int i = 0; i < kSums / 2; ++i) {
      part[i] = pair[0][i].even + pair[1][i].even;
      part[i + kSums / 2] = pair[0][i].odd + pair[1][i].odd;
    }
  }
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
