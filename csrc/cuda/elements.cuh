// What all CUDA kernels share: elements of a batch, columns of a thread, and the upper triangle of C.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../formulas.h"
#include "cuda.h"

// Shared memory is one dynamic piece per kernel, laid out by a struct.
extern __shared__ __align__(16) unsigned char isobn_shared[];

namespace isobn::cuda {

constexpr int kRows = 8;     // rows of C at a time: one sector of memory in each column, on the transposed side
constexpr int kColumns = 4;  // columns of a thread: 128 bits of float32
constexpr int kMaxThreads = kMaxFeatures / kColumns;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float f, float* x) { *x = f; }
__device__ inline void narrow(float f, __half* x) { *x = __float2half_rn(f); }
__device__ inline void narrow(float f, __nv_bfloat16* x) { *x = __float2bfloat16_rn(f); }

// Four elements in one access: 128 bits of float32, 64 of a 16-bit type. The address is a multiple of that.
template <class X>
struct alignas(4 * sizeof(X)) Quad {
  X at[4];
};

// The columns of a thread: four neighbours, whose accesses are one where they may be wide. They are the same ones where
// not, so that sums over columns have one order and their bits do not depend on alignment or strides.
template <bool kWide>
struct Columns {
  int D;

  __device__ int at(int v) const { return kColumns * threadIdx.x + v; }
  template <class X>
  __device__ void load(const X* row, int64_t col_stride, float (&to)[kColumns]) const {
    if (kWide) {
      if (at(0) < D) {
        const Quad<X> quad = *reinterpret_cast<const Quad<X>*>(row + at(0));
#pragma unroll
        for (int v = 0; v < kColumns; ++v) to[v] = widen(quad.at[v]);
      } else {
#pragma unroll
        for (int v = 0; v < kColumns; ++v) to[v] = 0;
      }
    } else {
#pragma unroll
      for (int v = 0; v < kColumns; ++v) to[v] = at(v) < D ? widen(row[int64_t(at(v)) * col_stride]) : 0;
    }
  }
  __device__ void store(const float (&from)[kColumns], float* row) const {
    if (kWide) {
      if (at(0) < D) *reinterpret_cast<Quad<float>*>(row + at(0)) = {from[0], from[1], from[2], from[3]};
    } else {
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (at(v) < D) row[at(v)] = from[v];
    }
  }
};

// C_ij by its upper triangle.
__device__ inline float upper(const float* C, int64_t D, int64_t i, int64_t j) { return i < j ? C[i * D + j] : C[j * D + i]; }

// Rows [i0, i0 + kRows) of C in a thread's columns, by its upper triangle; 0 outside of it.
template <bool kWide>
__device__ void load_upper(const float* C, int i0, const Columns<kWide>& columns, float (&c)[kRows][kColumns]) {
  const int64_t D = columns.D;
  if (kWide && columns.at(0) >= i0 + kRows) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (i0 + r < D)
        columns.load(C + (i0 + r) * D, 1, c[r]);
      else
        for (int v = 0; v < kColumns; ++v) c[r][v] = 0;
  } else if (kWide && columns.at(kColumns - 1) < i0) {
#pragma unroll
    for (int v = 0; v < kColumns; ++v)
#pragma unroll
      for (int r = 0; r < kRows; r += 4) {
        Quad<float> quad = {0, 0, 0, 0};
        if (i0 + r < D) quad = *reinterpret_cast<const Quad<float>*>(C + columns.at(v) * D + i0 + r);
#pragma unroll
        for (int k = 0; k < 4; ++k) c[r + k][v] = quad.at[k];
      }
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        c[r][v] = i0 + r < D && columns.at(v) < D ? upper(C, D, i0 + r, columns.at(v)) : 0;
  }
}

}  // namespace isobn::cuda
