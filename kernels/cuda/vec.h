// A row's elements V at a time, 128 bits an access, and their conversion to fp32 and back.
//
// Pack<T, V> is V adjacent elements as they lie in memory. A load's hint says what becomes of the line:
// kCached for parameters, which the next rows read again; kOnce for a stream that nobody reads again; kL2 for
// one that the next kernel reads again (not into L1, where the parameters are). Any is a dtype known only at
// run time, one element at a time: the path of unaligned views and odd widths.
#pragma once
#include <cuda_runtime.h>
#include <cstdint>
#include "abi.h"

namespace fastedit::cuda {

struct Brain {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Any {
  uint16_t bits;
};

#ifdef __CUDACC__
// A few lines of PTX instead of cuda_bf16.h and cuda_fp16.h, which every architecture would parse again.
__device__ inline uint32_t two_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ inline uint32_t two_f16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ inline float from_f16(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
}
// Vectors as one instruction: left to itself the compiler splits some stores. no_allocate passes L1 by.
__device__ inline uint2 load_no_allocate(const uint2* at) {
  uint2 w;
  asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(w.x), "=r"(w.y) : "l"(at));
  return w;
}
__device__ inline uint4 load_no_allocate(const uint4* at) {
  uint4 w;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
               : "l"(at));
  return w;
}
template <class W>
__device__ inline W load_no_allocate(const W* at) {
  return *at;
}
__device__ inline void put(uint2* at, uint2 w) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(w.x), "r"(w.y) : "memory");
}
__device__ inline void put(uint4* at, uint4 w) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
               : "memory");
}
template <class W>
__device__ inline void put(W* at, W w) {
  *at = w;
}
// A vector on its way into shared memory, past the registers; `to` is read after wait_copies and by this thread
// alone. An earlier read of `to` by this thread is served first: both go through one queue. Where it is not `wanted` zeros
// come, and `from` is not read.
template <class P>
__device__ inline void copy_async(P* to, const void* from, bool wanted) {
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to)), bytes = wanted ? sizeof(P) : 0;
  if constexpr (sizeof(P) == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
// Towards L1, so that a later load waits less; nothing of it is waited for, or changes a result.
__device__ inline void prefetch(const void* at) { asm volatile("prefetch.global.L1 [%0];" ::"l"(at)); }
// Under FASTEDIT_PDL (run.h) a kernel starts while the one before it in its stream ends: it reads and writes after this.
// Parameters, too: the one before may be the optimizer's, and a line that L1 has from before is not read again.
__device__ inline void wait_for_kernel_before() {
#if defined(FASTEDIT_PDL) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#define FASTEDIT_SHARED(name) extern __shared__ __align__(16) float name[]
#endif

__device__ inline float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

template <class T>
struct Elements;
template <>
struct Elements<float> {
  static constexpr int kPerWord = 1;
  __device__ static void unpack(uint32_t word, float* out) { out[0] = __uint_as_float(word); }
  __device__ static uint32_t pack(const float* in) { return __float_as_uint(in[0]); }
};
template <>
struct Elements<Brain> {
  static constexpr int kPerWord = 2;
  __device__ static void unpack(uint32_t word, float* out) {
    out[0] = from_bf16(word);
    out[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static uint32_t pack(const float* in) { return two_bf16(in[0], in[1]); }
};
template <>
struct Elements<Half> {
  static constexpr int kPerWord = 2;
  __device__ static void unpack(uint32_t word, float* out) {
    out[0] = from_f16(word);
    out[1] = from_f16(word >> 16);
  }
  __device__ static uint32_t pack(const float* in) { return two_f16(in[0], in[1]); }
};

template <class T, int V>
struct Pack {
  uint32_t word[V / Elements<T>::kPerWord];
};
template <>
struct Pack<Any, 1> {
  uint32_t word[1];
};

enum Hint { kCached, kOnce, kL2 };

template <Hint hint, class W>
__device__ inline W load_word(const W* at) {
  if constexpr (hint == kOnce) return __ldcs(at);
  if constexpr (hint == kL2) return load_no_allocate(at);
  return __ldg(at);
}

template <Hint hint, class T, int V>
__device__ inline Pack<T, V> load(const void* data, int64_t at, int dtype) {
  Pack<T, V> pack;
  if constexpr (V == 1) {
    if (dtype == F32) pack.word[0] = load_word<hint>(static_cast<const unsigned*>(data) + at);
    else pack.word[0] = load_word<hint>(static_cast<const unsigned short*>(data) + at);
  } else if constexpr (sizeof(pack) == 8) {
    uint2 w = load_word<hint>(reinterpret_cast<const uint2*>(static_cast<const T*>(data) + at));
    pack.word[0] = w.x, pack.word[1] = w.y;
  } else {
    static_assert(sizeof(pack) == 16, "one 128-bit access a stream");
    uint4 w = load_word<hint>(reinterpret_cast<const uint4*>(static_cast<const T*>(data) + at));
    pack.word[0] = w.x, pack.word[1] = w.y, pack.word[2] = w.z, pack.word[3] = w.w;
  }
  return pack;
}
template <class T, int V>
__device__ inline void store(void* data, int64_t at, const Pack<T, V>& pack, int dtype) {
  if constexpr (V == 1) {
    if (dtype == F32) put(static_cast<uint32_t*>(data) + at, pack.word[0]);
    else put(static_cast<uint16_t*>(data) + at, static_cast<uint16_t>(pack.word[0]));
  } else if constexpr (sizeof(pack) == 8) {
    put(reinterpret_cast<uint2*>(static_cast<T*>(data) + at), make_uint2(pack.word[0], pack.word[1]));
  } else {
    put(reinterpret_cast<uint4*>(static_cast<T*>(data) + at),
        make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]));
  }
}

template <class T, int V>
__device__ inline void unpack(const Pack<T, V>& pack, float (&out)[V], int dtype) {
  if constexpr (V == 1) {
    out[0] = dtype == F32  ? __uint_as_float(pack.word[0])
           : dtype == BF16 ? from_bf16(pack.word[0])
                           : from_f16(pack.word[0]);
  } else {
    constexpr int kPer = Elements<T>::kPerWord;
#pragma unroll
    for (int i = 0; i < V / kPer; ++i) Elements<T>::unpack(pack.word[i], out + i * kPer);
  }
}

// Rounds to nearest even: the one rounding of an op.
template <class T, int V>
__device__ inline Pack<T, V> round_to(const float (&in)[V], int dtype) {
  Pack<T, V> pack;
  if constexpr (V == 1) {
    pack.word[0] = dtype == F32  ? __float_as_uint(in[0])
                 : dtype == BF16 ? two_bf16(in[0], 0.f) & 0xffffu
                                 : two_f16(in[0], 0.f) & 0xffffu;
  } else {
    constexpr int kPer = Elements<T>::kPerWord;
#pragma unroll
    for (int i = 0; i < V / kPer; ++i) pack.word[i] = Elements<T>::pack(in + i * kPer);
  }
  return pack;
}

// V fp32 parameters.
template <int V>
__device__ inline void load_vector(float (&out)[V], const float* at) {
  if constexpr (V == 1) {
    out[0] = __ldg(at);
  } else {
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      float4 p = __ldg(reinterpret_cast<const float4*>(at) + i);
      out[4 * i] = p.x, out[4 * i + 1] = p.y, out[4 * i + 2] = p.z, out[4 * i + 3] = p.w;
    }
  }
}
// The same from data[at]; `absent` where there are none.
template <int V>
__device__ inline void load_parameters(float (&out)[V], const float* data, int64_t at, float absent) {
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = absent;
  if (data) load_vector(out, data + at);
}

}  // namespace fastedit::cuda
