// What the compiled backends take: the same structures for CPU and CUDA. Python reads the numbers of the enumerations
// from the extensions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace isobn {

enum class DType : int { float32, float64, float16, bfloat16 };

inline size_t item_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The functions that need a workspace.
enum class Function : int { train_forward, compute_scale, train_backward };

// A matrix of any strides, in elements.
struct Strided {
  const void* data;
  DType dtype;
  int64_t row_stride;
  int64_t col_stride;
};

// The statistics, contiguous; float32, or float64 for a batch of float64.
struct State {
  void* running_cov;             // (D, D)
  void* running_std;             // (D,)
  int64_t* num_batches_tracked;  // one element, or null
};

struct Options {
  double momentum, eps, beta;
  bool bias_correction;
};

}  // namespace isobn
