// The CUDA backend: the four functions of isobn_kernels/reference.py on raw pointers of one device. No torch, no Python.
//
// x is float32, float16 or bfloat16; all state is float32. Every function
// enqueues its launches on `on.stream` and returns; it reads nothing back and waits for nothing. `workspace` has
// workspace_bytes(...) bytes, aligned as the allocators of CUDA align. Every error of CUDA is thrown as
// std::runtime_error with its name.
#pragma once

#include <string>

#include "../types.h"

namespace isobn::cuda {

constexpr int kMaxRows = 128;       // of a batch: their sums are taken in one run of float32
constexpr int kMaxFeatures = 2048;  // a block's threads have four each, and its rows of C lie in shared memory

struct Where {
  int device;
  void* stream;  // cudaStream_t
};

size_t workspace_bytes(Function function, int64_t D);

// 2 <= N <= kMaxRows. Updates the state and `scale`; writes `saved_scale` (D,) and `out`, contiguous (N, D).
void train_forward(const Strided& x, int64_t N, int64_t D, const State& state, float* scale, float* saved_scale,
                   void* out, const Options& options, const Where& on, void* workspace);

void compute_scale(int64_t D, const State& state, float* scale, const Options& options, const Where& on,
                   void* workspace);

// N >= 1.
void apply_scale(const Strided& x, int64_t N, int64_t D, const float* scale, void* out, const Where& on);

// 2 <= N <= kMaxRows; `state` as the forward left it. dx is contiguous (N, D).
void train_backward(const Strided& dout, const Strided& x, int64_t N, int64_t D, const State& state, const float* scale,
                    void* dx, const Options& options, const Where& on, void* workspace);

// Versions of CUDA as 1000 major + 10 minor: what the driver supports (0: there is none), what this was built with.
int driver_version();
int runtime_version();

// Launches an empty kernel and waits for it. Returns what failed, in words, or nothing.
std::string probe(int device);

// Whether train_forward is one cooperative launch there, or two ordinary ones.
bool one_launch(DType dtype, int64_t D, int device);

}  // namespace isobn::cuda
