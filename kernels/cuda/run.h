// From the torch-free arguments to a launch: dtypes to types, alignment to vector width, launch errors.
#pragma once
#include <atomic>
#include "launch.h"
#include "vec.h"

namespace fastedit::cuda {

template <class T>
struct Type {
  using type = T;
};

// The dtype pairs that the ABI allows: equal, or fp32 beside a 16-bit stream.
template <class F>
int with_types(int narrow, int wide, F run) {
  if (narrow == F32 && wide == F32) return run(Type<float>{}, Type<float>{});
  if (narrow == BF16 && wide == BF16) return run(Type<Brain>{}, Type<Brain>{});
  if (narrow == F16 && wide == F16) return run(Type<Half>{}, Type<Half>{});
  if (narrow == BF16 && wide == F32) return run(Type<Brain>{}, Type<float>{});
  if (narrow == F16 && wide == F32) return run(Type<Half>{}, Type<float>{});
  return cudaErrorInvalidValue;
}
constexpr int kShared = 48 * 1024;  // what a block gets without asking
inline int element_bytes(int dtype) { return dtype == F32 ? 4 : 2; }

// Collects the streams of a call; `vector` is what one access may hold, 1 as soon as one stream forbids more.
struct Alignment {
  int64_t rows, width;
  int vector;
  Alignment(int64_t rows, int64_t width, int widest_dtype)
      : rows(rows), width(width), vector(vector_width(element_bytes(widest_dtype))) {
    if (width % vector) vector = 1;
  }
  Alignment& stream(const void* data, int64_t stride, int dtype) {
    bool fits = reinterpret_cast<uintptr_t>(data) % (vector * element_bytes(dtype)) == 0;
    if (data && !(fits && (rows <= 1 || stride % vector == 0))) vector = 1;
    return *this;
  }
  Alignment& parameter(const float* data) {
    if (reinterpret_cast<uintptr_t>(data) % 16) vector = 1;
    return *this;
  }
  Alignment& form(const Form& f) {
    return parameter(f.scale).parameter(f.bias).parameter(f.read).parameter(f.write).parameter(f.gate);
  }
};

// A number that the current device has, asked for once; 0 where there is no device.
template <class Ask>
int of_device(Ask ask) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  value = known[device].load(std::memory_order_relaxed);
  if (value == 0) {
    value = ask([device](cudaDeviceAttr attribute) {
      int found = 0;
      return cudaDeviceGetAttribute(&found, attribute, device) == cudaSuccess ? found : 0;
    });
    known[device].store(value, std::memory_order_relaxed);
  }
  return value;
}
inline int multiprocessors() {
  return static_cast<int>(most(1, of_device([](auto get) { return get(cudaDevAttrMultiProcessorCount); })));
}
// What a block may have of shared memory, when it asks.
inline int shared_limit() {
  return static_cast<int>(
      most(kShared, of_device([](auto get) { return get(cudaDevAttrMaxSharedMemoryPerBlockOptin); })));
}
// 90 for compute capability 9.0.
inline int capability() {
  return of_device([](auto get) {
    return 10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor);
  });
}

template <class... P, class... A>
int launch(void (*kernel)(P...), const Shape& shape, void* stream, const A&... args) {
  if (shape.blocks == 0) return cudaSuccess;
  if (shape.blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (shape.shared_bytes > kShared) {
    int error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error) {
      cudaGetLastError();  // or the next good launch would report it
      return error;
    }
  }
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(shape.blocks), shape.threads, shape.shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(args...);
#else
  emulator::launch(kernel, shape.blocks, shape.threads, shape.shared_bytes, args...);
#endif
  return cudaGetLastError();
}

// Switches, off until a GPU has shown a gain: FASTEDIT_PDL, FASTEDIT_CLUSTERS (bench/gpu/switches.py). Both need sm_90.
#if defined(FASTEDIT_PDL) || defined(FASTEDIT_CLUSTERS)
// True where the device has it and the kernel's code was made for it.
template <class... P>
bool has_sm90(void (*kernel)(P...), const Shape& shape) {
  cudaFuncAttributes made{};
  return capability() >= 90 && cudaFuncGetAttributes(&made, kernel) == 0 && made.ptxVersion >= 90 && shape.blocks > 0 &&
         shape.blocks <= kMaxBlocks && shape.shared_bytes <= kShared;
}
template <class... P, class... A>
int launch_with(cudaLaunchAttribute attribute, void (*kernel)(P...), const Shape& shape, void* stream, const A&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks)), config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = 1;
  int error = cudaLaunchKernelEx(&config, kernel, args...);
  return error ? (cudaGetLastError(), error) : cudaGetLastError();
}
#endif

// The same for a kernel that calls wait_for_kernel_before() (vec.h): under FASTEDIT_PDL it is launched while the kernel before
// it ends.
template <class... P, class... A>
int launch_early(void (*kernel)(P...), const Shape& shape, void* stream, const A&... args) {
#ifdef FASTEDIT_PDL
  if (has_sm90(kernel, shape)) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    return launch_with(early, kernel, shape, stream, args...);
  }
#endif
  return launch(kernel, shape, stream, args...);
}

#ifdef FASTEDIT_CLUSTERS
// In clusters of so many blocks (cluster.h); kNoClusters where they cannot be had.
constexpr int kNoClusters = -1;
template <class... P, class... A>
int launch_clusters(int blocks, void (*kernel)(P...), const Shape& shape, void* stream, const A&... args) {
  if (!has_sm90(kernel, shape)) return kNoClusters;
  cudaLaunchAttribute clusters{};
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim.x = blocks, clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
  return launch_with(clusters, kernel, shape, stream, args...);
}
#endif

}  // namespace fastedit::cuda
