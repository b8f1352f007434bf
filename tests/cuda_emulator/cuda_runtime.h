// A CUDA emulator for tests: enough of cuda_runtime.h to compile kernels/cuda/*.cu with a C++ compiler.
//
// The threads of a block are fibers of one operating-system thread, run one after another between barriers,
// in an order that a test chooses: a missing barrier then shows as a result that depends on the order. A
// barrier or shuffle that not all threads reach, a misaligned vector access and a write past the shared
// memory asked for make the launch fail. The blocks of a cluster run by turns, each until it waits for the
// others; what one sends another comes when the last of the expected bytes does, and is poison from the sending on. Shared memory starts out poisoned, and so is the target of an asynchronous
// copy from the moment it is asked for until the thread waits. Every access that goes through vec.h's functions is
// counted for the tensor it falls into.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define FASTEDIT_SHARED(name) float* name = ::emulator::shared_memory()
#define __syncthreads() ::emulator::block_barrier(__FILE__, __LINE__)

using std::fmaf;
using std::max;
using std::min;

struct uint2 {
  alignas(8) uint32_t x;
  uint32_t y;
};
struct uint4 {
  alignas(16) uint32_t x;
  uint32_t y, z, w;
};
struct float4 {
  alignas(16) float x;
  float y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x = 1) : x(x) {}
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

enum {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;
enum { cudaLaunchAttributeClusterDimension = 4, cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

extern int multiprocessors, shared_limit, last_error, cluster_size;
constexpr int kMaxCluster = 8;  // that every chip with clusters has

inline int architecture() {
  int kib = shared_limit / 1024;
  return kib == 227 ? 90 : kib == 163 ? 80 : kib == 99 ? 89 : 75;
}

int device_number();
void fail(const char* what);
void block_barrier(const char* file, int line);
void wait_for_cluster(const char* file, int line);
void init_arrivals(const void* at);
void expect_arrivals(const void* at, int bytes);
void wait_for_arrivals(const void* at, int parity);
void send(float* to, float value, const void* arrivals, int rank);
float exchange(float value, int source_lane, const char* file, int line);
constexpr int kFragment = 6;  // of A and B in a product of matrices
void product(float (&sum)[4], const float (&fragment)[kFragment], int columns, const char* file, int line);
float* shared_memory();
void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);
void note_launch(const void* kernel, int64_t blocks, int threads, int shared_bytes);
void allow_shared(int bytes);  // for the next launch
void cluster_next(int blocks);
void copy_later(void* to, const void* from, int bytes);
void copy_now();
void count(const void* at, int bytes, bool store);

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, const A&... args) {
  note_launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes);
  run(blocks, threads, shared_bytes, [&] { kernel(args...); });
}

template <class T>
void check_aligned(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) fail("misaligned access");
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline uint32_t bf16_bits(float value) {
  uint32_t bits = bits_of(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
// Nearest even; adding 0.5 leaves a subnormal half's steps of 2^-24 in the last bits.
inline uint32_t f16_bits(float value) {
  uint32_t sign = bits_of(value) >> 31 << 15, size = bits_of(value) & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fff;
  if (size >= 0x477ff000) return sign | 0x7c00;
  if (size < 0x38800000) return sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000);
  return sign | ((size + 0xfff + ((size >> 13) & 1) - (112u << 23)) >> 13);
}
inline float f16_value(uint32_t bits) {
  uint32_t sign = (bits & 0x8000) << 16, size = bits & 0x7fff;
  if (size >= 0x7c00) return float_of(sign | 0x7f800000 | (size & 0x3ff) << 13);
  if (size < 0x400) return float_of(sign | bits_of(static_cast<float>(size) * 0x1p-24f));
  return float_of(sign | (size << 13) + (112u << 23));
}

}  // namespace emulator

#define __shfl_xor_sync(mask, value, lane_mask) \
  ::emulator::exchange(value, (threadIdx.x % 32) ^ (lane_mask), __FILE__, __LINE__)

inline int cluster_blocks() { return emulator::cluster_size; }
inline int cluster_rank() { return blockIdx.x % emulator::cluster_size; }
inline void init_arrivals(uint64_t* arrivals) { emulator::init_arrivals(arrivals); }
inline void expect_arrivals(uint64_t* arrivals, int bytes) { emulator::expect_arrivals(arrivals, bytes); }
inline void wait_for_arrivals(uint64_t* arrivals, int parity) { emulator::wait_for_arrivals(arrivals, parity); }
inline void send(float* to, float value, uint64_t* arrivals, int rank) { emulator::send(to, value, arrivals, rank); }
#define cluster_barrier() ::emulator::wait_for_cluster(__FILE__, __LINE__)
#define __syncwarp() ((void)::emulator::exchange(0.f, 0, __FILE__, __LINE__))
inline void multiply_at(const char* file, int line, float (&sum)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  emulator::product(sum, {a0, a1, a2, a3, b0, b1}, 8, file, line);
}
inline void multiply_at(const char* file, int line, float (&sum)[4], float a0, float a1, float b0) {
  emulator::product(sum, {a0, a1, 0.f, 0.f, b0, 0.f}, 4, file, line);
}
#define multiply(...) multiply_at(__FILE__, __LINE__, __VA_ARGS__)

inline unsigned ballot(bool vote, const char* file, int line) {
  uint32_t bits = uint32_t{vote} << threadIdx.x % 32;
  for (int mask = 16; mask > 0; mask /= 2) {
    const float theirs = emulator::exchange(emulator::float_of(bits), (threadIdx.x % 32) ^ mask, file, line);
    bits |= emulator::bits_of(theirs);
  }
  return bits;
}
#define __ballot_sync(mask, vote) ballot(vote, __FILE__, __LINE__)
#define __popc(bits) __builtin_popcount(bits)

template <class T>
T __ldg(const T* at) {
  emulator::check_aligned(at);
  emulator::count(at, sizeof(T), false);
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return __ldg(at);
}
template <class T>
T load_no_allocate(const T* at) {
  return __ldg(at);
}
template <class T>
void put(T* at, T value) {
  emulator::check_aligned(at);
  emulator::count(at, sizeof(T), true);
  *at = value;
}
template <class P>
void copy_async(P* to, const void* from, bool wanted) {
  static_assert(sizeof(P) == 8 || sizeof(P) == 16, "cp.async");
  static const P zeros{};
  if (reinterpret_cast<uintptr_t>(to) % sizeof(P) || reinterpret_cast<uintptr_t>(from) % sizeof(P))
    emulator::fail("misaligned access");
  if (wanted) emulator::count(from, sizeof(P), false);
  emulator::copy_later(to, wanted ? from : &zeros, sizeof(P));
}
inline void prefetch(const void*) {}
inline void wait_for_kernel_before() {}
inline void wait_copies() { emulator::copy_now(); }

inline float __uint_as_float(uint32_t bits) { return emulator::float_of(bits); }
inline uint32_t __float_as_uint(float value) { return emulator::bits_of(value); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline uint32_t two_bf16(float low, float high) {
  return emulator::bf16_bits(low) | emulator::bf16_bits(high) << 16;
}
inline uint32_t two_f16(float low, float high) {
  return emulator::f16_bits(low) | emulator::f16_bits(high) << 16;
}
inline float from_f16(uint32_t bits) { return emulator::f16_value(bits & 0xffff); }

// A device for each chip that a test describes, since kernels/cuda asks each device once.
inline int cudaGetDevice(int* device) { return *device = emulator::device_number(), cudaSuccess; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount       ? emulator::multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? emulator::architecture() / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? emulator::architecture() % 10
                                                            : emulator::shared_limit;
  return cudaSuccess;
}
inline int cudaFuncSetAttribute(const void*, int, int bytes) {
  if (bytes > emulator::shared_limit) return emulator::last_error = cudaErrorInvalidValue;
  return emulator::allow_shared(bytes), cudaSuccess;
}
template <class... P>
int cudaFuncGetAttributes(cudaFuncAttributes* made, void (*)(P...)) {
  return made->ptxVersion = emulator::architecture(), cudaSuccess;
}
template <class... P, class... A>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... args) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) emulator::cluster_next(attribute.val.clusterDim.x);
  }
  emulator::launch(kernel, config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, args...);
  return emulator::last_error;
}
inline int cudaGetLastError() {
  int error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}
