// Whether a device can run these kernels: its architecture may not be among those built, its driver may be older than the
// runtime that the module carries. What a first launch would fail with is found by a launch that does nothing.
//
// Exported under C names, for fastedit/ops/cuda_device.py.
#include <cuda_runtime.h>

#include <cstdint>

namespace fastedit::cuda {
namespace {

__global__ void nothing() {}

cudaError_t launch_nothing() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);  // cudaErrorNoKernelImageForDevice without code for it
  if (error) return error;
  cudaStream_t stream;
  error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error) return error;
  nothing<<<1, 1, 0, stream>>>();
  error = cudaGetLastError();
  cudaError_t waited = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  return error ? error : waited;
}

}  // namespace
}  // namespace fastedit::cuda

#define FASTEDIT_EXPORT extern "C" __attribute__((visibility("default")))

// 0, or the CUDA error that a launch on `device` ends with; the current device stays what it was.
FASTEDIT_EXPORT int fastedit_cuda_probe(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  // Another stream's graph may be under capture: what waits here is no part of it.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (!error) error = cudaSetDevice(device);
  if (!error) error = fastedit::cuda::launch_nothing();
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaSetDevice(before);
  cudaGetLastError();  // what failed here is said here: the next launch must not fail with it
  return error;
}

FASTEDIT_EXPORT const char* fastedit_cuda_error_name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}
FASTEDIT_EXPORT const char* fastedit_cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// 13000 for CUDA 13.0: what the driver serves, and what the module was built with. 0 where there is no driver.
FASTEDIT_EXPORT int fastedit_cuda_version(int of_driver) {
  int version = 0;
  if (of_driver) cudaDriverGetVersion(&version);
  else cudaRuntimeGetVersion(&version);
  return version;
}
