// Enough of CUDA to run csrc/cuda/*.cu on the host, for tests: every thread of a block is a fiber, and blocks and threads
// run one after the other, in ascending or descending order, each up to its next barrier. Memory that another thread
// should have written before a barrier that is missing is then, in one order or the other, not yet written; shared memory
// starts as NaN. A barrier that some threads of a block do not reach is an error.
//
// Every kernel has one parameter, a struct. Shared memory is the dynamic kind only. See emulation.cpp for the scheduler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- Threads ----

namespace emulation {
enum class Barrier { warp, block, grid };
void wait(Barrier barrier);
void* exchange(const void* value, size_t bytes, unsigned source_lane);  // what that lane of the warp gave
}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::Barrier::block); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::wait(emulation::Barrier::warp); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  T got;
  std::memcpy(&got, emulation::exchange(&value, sizeof value, (threadIdx.x % 32) ^ unsigned(mask)), sizeof got);
  return got;
}

// ---- The runtime ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101, cudaErrorCooperativeLaunchTooLarge = 720 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrCooperativeLaunch, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
using cudaStream_t = struct EmulatedStream*;
constexpr unsigned cudaStreamNonBlocking = 1;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);

namespace emulation {
using Kernel = void (*)(const void* call);
cudaError_t launch(Kernel run, const void* call, const void* kernel, dim3 grid, dim3 block, size_t shared,
                   bool cooperative);
cudaError_t allow_shared(const void* kernel, size_t bytes);
cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t shared);

template <class Params>
struct Call {
  void (*kernel)(Params);
  const void* params;
  static void run(const void* call) {
    const Call* self = static_cast<const Call*>(call);
    self->kernel(*static_cast<const Params*>(self->params));
  }
};
}  // namespace emulation

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  const emulation::Call<Params> call{kernel, arguments[0]};
  return emulation::launch(&emulation::Call<Params>::run, &call, reinterpret_cast<const void*>(kernel), grid, block, shared,
                           false);
}
template <class Params>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t) {
  const emulation::Call<Params> call{kernel, arguments[0]};
  return emulation::launch(&emulation::Call<Params>::run, &call, reinterpret_cast<const void*>(kernel), grid, block, shared,
                           true);
}
template <class Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params), cudaFuncAttribute, int bytes) {
  return emulation::allow_shared(reinterpret_cast<const void*>(kernel), size_t(bytes));
}
template <class Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Params), int threads,
                                                          size_t shared) {
  return emulation::occupancy(blocks, reinterpret_cast<const void*>(kernel), threads, shared);
}
