// Sums over a warp, and over blocks. Every sum has a fixed order.
#pragma once

#include "elements.cuh"

namespace isobn::cuda {

template <class T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

// The warp's sums of eight values; each lane has that of value number lane / 4. Lanes exchange the halves that they are
// not to sum, which takes 9 shuffles instead of 40.
__device__ inline float warp_sums(float (&values)[kRows]) {
  int mask = kWarp / 2;
#pragma unroll
  for (int half = kRows / 2; half > 0; half /= 2, mask /= 2) {
    const bool second = threadIdx.x & mask;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float given = second ? values[k] : values[k + half];
      values[k] = (second ? values[k + half] : values[k]) + __shfl_xor_sync(kAllLanes, given, mask);
    }
  }
  values[0] += __shfl_xor_sync(kAllLanes, values[0], 2);
  return values[0] + __shfl_xor_sync(kAllLanes, values[0], 1);
}

// The sum over all blocks of what each left in partial[block][k]; called by a whole warp.
template <int kOf>
__device__ double sum_of_blocks(const double* partial, int blocks, int k) {
  double sum = 0;
  for (int block = threadIdx.x % kWarp; block < blocks; block += kWarp) sum += partial[block * kOf + k];
  return warp_sum(sum);
}

}  // namespace isobn::cuda
