// (10) alone: evaluation, and the backward of the default mode.
#pragma once

#include "elements.cuh"

namespace isobn::cuda {

struct Apply {
  int64_t N, D;
  const void* x;
  int64_t row_stride, col_stride;
  const float* scale;
  void* out;  // (N, D), contiguous
};

// Rows on the grid's first axis, which has no small limit, columns on its second.
template <class X, bool kWide>
__global__ void apply(const Apply p) {
  constexpr int kStep = kWide ? 4 : 1;
  const int64_t j = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kStep, n = blockIdx.x;
  if (j >= p.D) return;
  const X* const from = static_cast<const X*>(p.x) + n * p.row_stride;
  X* const to = static_cast<X*>(p.out) + n * p.D + j;
  if (kWide) {
    const Quad<X> quad = *reinterpret_cast<const Quad<X>*>(from + j);
    const Quad<float> scale = *reinterpret_cast<const Quad<float>*>(p.scale + j);
    Quad<X> scaled;
#pragma unroll
    for (int v = 0; v < 4; ++v) narrow(widen(quad.at[v]) * scale.at[v], &scaled.at[v]);
    *reinterpret_cast<Quad<X>*>(to) = scaled;
  } else {
    narrow(widen(from[j * p.col_stride]) * p.scale[j], to);
  }
}

}  // namespace isobn::cuda
