// The kernels of the CUDA backend. Equation numbers and symbols are those of isobn_kernels/reference.py.
//
// The latency path: a block of threads owns kRows rows of C, or a few times as many, over their whole width. It computes
// the batch's statistics of every feature itself, from a batch that stays in cache, and so needs nothing of another
// block but the two sums E and E'. Before the grid's barrier a block only reads state, after it each writes its own.
//
// Shared memory is one dynamic piece per kernel, laid out by a struct. Every sum has a fixed order.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../formulas.h"
#include "cuda.h"

extern __shared__ __align__(16) unsigned char isobn_shared[];

namespace isobn::cuda {

constexpr int kRows = 8;     // rows of C at a time: one sector of memory in each column, on the transposed side
constexpr int kColumns = 4;  // columns of a thread: 128 bits of float32
constexpr int kMaxThreads = kMaxFeatures / kColumns;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Elements ----

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

// ---- Sums ----

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

// ---- (1)-(10) in one launch, or in two that meet where the barrier was ----

enum class Phase : int { whole, before_barrier, after_barrier };

struct Step {
  Phase phase;
  int groups;  // the block owns kRows * groups rows of C
  int N;
  int64_t D;
  const void* x;  // (N, D)
  int64_t row_stride, col_stride;
  float *C, *running_std, *scale, *saved_scale;  // saved_scale: null for compute_scale
  int64_t* count;                                // or null
  void* out;                                     // (N, D), contiguous
  float keep, m, gain;                           // 1 - momentum, momentum, momentum / N
  float beta;
  double momentum, eps;
  bool bias_correction;
  double* energies;  // (blocks, 2): each block's part of E and E'
  float* kept;       // (blocks, kept_floats), for two launches
};

// What a block carries over the barrier: sigma and t of its rows, and the rows of the new C.
ISOBN_INLINE size_t kept_floats(int groups, int64_t D) { return size_t(kRows * groups) * (2 + D); }

struct alignas(16) StepShared {
  float y[kMaxRows * kRows];                    // the batch, centred, in the columns that are this group's rows
  float warp_sums[kMaxThreads / kWarp][kRows];  // of R_ij^2
  float mean[kRows], sigma[kRows], inv[kRows], diagonal[kRows];  // of a group's rows; sigma / w, 1 / that
  int updated[kRows];
  double E, E_prime;  // of the groups so far; thread 0's
  float w;
  float ratio;  // (9): sqrt(E / (E' + eps)), or negative where E == 0
};

// (1)-(8): reads state and batch, writes `kept` and this block's energies.
template <class X, bool kWide, bool kUpdate>
__device__ void gather(const Step& p, StepShared& shared, float* kept) {
  const int64_t D = p.D;
  const int N = p.N, tid = threadIdx.x, rows = kRows * p.groups, first = int(blockIdx.x) * rows;
  float *const kept_sigma = kept, *const kept_t = kept + rows, *const kept_rows = kept + 2 * rows;
  const X* const x = static_cast<const X*>(p.x);
  const Columns<kWide> columns{int(D)};

  if (tid == 0) {
    shared.E = shared.E_prime = 0;
    const double t = p.count == nullptr ? 0 : double(*p.count + (kUpdate ? 1 : 0));
    shared.w = p.bias_correction ? float(correction_weight(p.momentum, t)) : 1.0f;
  }

  // (1): the mean over n in sequence, as the sums below, so that it has the same bits in every block.
  float x_0[kColumns] = {}, mean[kColumns] = {}, sigma[kColumns], inv[kColumns];
  bool updated[kColumns];
  if (kUpdate) {
    columns.load(x, p.col_stride, x_0);
#pragma unroll 8
    for (int n = 0; n < N; ++n) {
      float row[kColumns];
      columns.load(x + n * p.row_stride, p.col_stride, row);
#pragma unroll
      for (int v = 0; v < kColumns; ++v) mean[v] += row[v] - x_0[v];
    }
#pragma unroll
    for (int v = 0; v < kColumns; ++v) mean[v] /= float(N);
  }
  columns.load(p.running_std, 1, sigma);

  for (int group = 0; group < p.groups; ++group) {
    const int i0 = first + group * kRows;
    float c[kRows][kColumns];
    if (kWide) load_upper<kWide>(p.C, i0, columns, c);  // early: it arrives while the product is made

    float product[kRows][kColumns] = {};
    if (kUpdate) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (columns.at(v) >= i0 && columns.at(v) < i0 + kRows) shared.mean[columns.at(v) - i0] = mean[v];
      __syncthreads();
      for (int at = tid; at < N * kRows; at += blockDim.x) {
        const int n = at / kRows, r = at % kRows;
        const X* const column = x + (i0 + r) * p.col_stride;
        shared.y[at] = i0 + r < D ? widen(column[n * p.row_stride]) - widen(column[0]) - shared.mean[r] : 0;
      }
      __syncthreads();

      // (2) and (3). C_ij and C_ji come from the same products in the same order.
      float squares[kColumns] = {};
      [[maybe_unused]] constexpr int kUnroll = kWide ? 2 : 1;  // as far as 128 registers reach, on every target
#pragma unroll kUnroll
      for (int n = 0; n < N; ++n) {
        float y[kColumns];
        columns.load(x + n * p.row_stride, p.col_stride, y);
        const Quad<float>* const y_i = reinterpret_cast<const Quad<float>*>(shared.y + n * kRows);
        const Quad<float> low = y_i[0], high = y_i[1];
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          y[v] = y[v] - x_0[v] - mean[v];
          squares[v] = ::fmaf(y[v], y[v], squares[v]);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            product[r][v] = ::fmaf(r < 4 ? low.at[r % 4] : high.at[r % 4], y[v], product[r][v]);
        }
      }
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const float s = deviation<float>(squares[v], float(N));
        updated[v] = is_updated(s);
        if (updated[v] && group == 0) sigma[v] = ::fmaf(p.m, s, p.keep * sigma[v]);  // (4)
      }
    } else {
      __syncthreads();  // w
    }
    if (!kWide) load_upper<kWide>(p.C, i0, columns, c);  // late: a single access for each value takes more registers

    if (group == 0) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v) inv[v] = reciprocal(p.bias_correction ? sigma[v] / shared.w : sigma[v]);
    }
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      const int r = columns.at(v) - i0;
      if (r < 0 || r >= kRows) continue;
      shared.sigma[r] = p.bias_correction ? sigma[v] / shared.w : sigma[v];
      shared.inv[r] = inv[v] / shared.w;
      shared.updated[r] = kUpdate && updated[v];
      kept_sigma[group * kRows + r] = sigma[v];
    }
    __syncthreads();

    // (4), (5) and a thread's part of (6).
    float sums[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float inv_i = shared.inv[r];
      const bool updated_i = shared.updated[r];
      sums[r] = 0;
      if (i0 + r >= D) continue;
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        if (kUpdate && updated_i && updated[v]) c[r][v] = ::fmaf(p.gain, product[r][v], p.keep * c[r][v]);
        const float R = clamp(correlation(c[r][v], inv_i, inv[v]), -1.0f, 1.0f);
        sums[r] = ::fmaf(R, R, sums[r]);  // 0 past the last column: C is loaded as 0 there, and 1/0 := 0
        if (columns.at(v) == i0 + r) shared.diagonal[r] = c[r][v];
      }
      if (kUpdate) columns.store(c[r], kept_rows + (group * kRows + r) * D);
    }
    const float sum = warp_sums(sums);
    if (tid % 4 == 0) shared.warp_sums[tid / kWarp][tid % kWarp / 4] = sum;
    __syncthreads();

    // (6), (7) and this group's part of (8).
    if (tid < kWarp) {
      if (tid < kRows && i0 + tid < D) {
        float gamma = 0;
        for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) gamma += shared.warp_sums[warp][tid];
        kept_t[group * kRows + tid] = shrinkage(gamma / float(D), shared.sigma[tid], float(p.eps), p.beta);
      }
      __syncwarp();
      for (int r = 0; r < kRows && tid == 0 && i0 + r < D; ++r) {
        const double C_ii = shared.diagonal[r] / double(shared.w), t = kept_t[group * kRows + r];
        shared.E += C_ii;
        shared.E_prime += C_ii * t * t;
      }
    }
  }
  if (tid == 0) {
    p.energies[2 * blockIdx.x] = shared.E;
    p.energies[2 * blockIdx.x + 1] = shared.E_prime;
  }
}

// (9), (10), and the state: writes what belongs to this block's rows.
template <class X, bool kWide, bool kUpdate>
__device__ void scatter(const Step& p, StepShared& shared, float* kept) {
  const int64_t D = p.D;
  const int tid = threadIdx.x, rows = kRows * p.groups, first = int(blockIdx.x) * rows;
  float *const kept_sigma = kept, *const kept_t = kept + rows, *const kept_rows = kept + 2 * rows;

  if (tid < kWarp) {
    const double E = sum_of_blocks<2>(p.energies, gridDim.x, 0);
    const double E_prime = sum_of_blocks<2>(p.energies, gridDim.x, 1);
    if (tid == 0) shared.ratio = E == 0 ? -1.0f : float(energy_ratio(E, E_prime, p.eps));
  }
  if (kUpdate) {
    const Columns<kWide> columns{int(D)};
    for (int r = 0; r < rows && first + r < D; ++r) {
      float c[kColumns];
      columns.load(kept_rows + r * D, 1, c);
      columns.store(c, p.C + (first + r) * D);
    }
    if (blockIdx.x == 0 && tid == 0 && p.count != nullptr) ++*p.count;
  }
  __syncthreads();
  for (int r = tid; r < rows && first + r < D; r += blockDim.x) {
    const float scale = shared.ratio < 0 ? 1.0f : kept_t[r] * shared.ratio;
    p.scale[first + r] = scale;
    if (!kUpdate) continue;
    kept_t[r] = scale;
    p.saved_scale[first + r] = scale;
    p.running_std[first + r] = kept_sigma[r];
  }
  if (!kUpdate) return;
  __syncthreads();

  const X* const x = static_cast<const X*>(p.x);
  X* const out = static_cast<X*>(p.out);
  constexpr int kStep = kWide ? 4 : 1;
  const int per_row = rows / kStep;
  for (int at = tid; at < p.N * per_row; at += blockDim.x) {
    const int n = at / per_row, r = at % per_row * kStep;
    if (first + r >= D) continue;
    const X* const from = x + n * p.row_stride;
    X* const to = out + n * D + first + r;
    if (kWide) {
      const Quad<X> quad = *reinterpret_cast<const Quad<X>*>(from + first + r);
      Quad<X> scaled;
#pragma unroll
      for (int v = 0; v < 4; ++v) narrow(widen(quad.at[v]) * kept_t[r + v], &scaled.at[v]);
      *reinterpret_cast<Quad<X>*>(to) = scaled;
    } else {
      narrow(widen(from[(first + r) * p.col_stride]) * kept_t[r], to);
    }
  }
}

// One block a multiprocessor is enough: without saying so, some compilers spill registers to fit in more.
template <class X, bool kWide, bool kUpdate>
__global__ void __launch_bounds__(kMaxThreads, 1) step(const Step p) {
  StepShared& shared = *reinterpret_cast<StepShared*>(isobn_shared);
  float* const kept = p.phase == Phase::whole ? reinterpret_cast<float*>(isobn_shared + sizeof(StepShared))
                                              : p.kept + blockIdx.x * kept_floats(p.groups, p.D);
  if (p.phase != Phase::after_barrier) gather<X, kWide, kUpdate>(p, shared, kept);
  if (p.phase == Phase::whole) cooperative_groups::this_grid().sync();
  if (p.phase != Phase::before_barrier) scatter<X, kWide, kUpdate>(p, shared, kept);
}

// ---- (10) alone ----

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

// ---- The gradient through the statistics (stop_gradient=False), in three launches ----

constexpr int kGradientThreads = kRows * kWarp;  // a warp for each row

struct Gradient {
  int N;
  int64_t D;
  const void *x, *dout;
  int64_t row_stride, col_stride, dout_row_stride, dout_col_stride;
  const float *C, *running_std, *scale;
  const int64_t* count;  // or null
  void* dx;              // (N, D), contiguous
  float gain;            // momentum / N
  float beta;
  double momentum, eps;
  bool bias_correction;
  int blocks;        // of backward_rows
  double* energies;  // (blocks, 3): each block's part of E, E' and dr
  // Per feature: of (1), (2), (6), (7), sum_n dout_n x_n, 1 / sigma; then what backward_features makes of them.
  float *mean, *s, *gamma, *t, *g, *inv, *dgamma, *du_gamma, *diagonal;
};

ISOBN_INLINE int gradient_vectors() { return 9; }

struct alignas(16) GradientShared {
  float y[kMaxRows][kWarp + 1];  // one column more than a warp: rows begin in different banks
  float M[kRows][kWarp + 1];     // G + G^T
  float h_over_s[kRows];
  double energies[kRows][3];
  EnergyGradient all;
  float w;
};

// The state's weight w, in shared memory before the next barrier.
template <class Params>
__device__ void share_weight(const Params& p, float* w) {
  if (threadIdx.x == 0)
    *w = p.bias_correction ? float(correction_weight(p.momentum, p.count == nullptr ? 0 : double(*p.count))) : 1.0f;
}

// (1), (2), (5)-(8) and g = sum_n dout_n x_n: a block for kRows features, a warp for each.
template <class X>
__global__ void __launch_bounds__(kGradientThreads) backward_rows(const Gradient p) {
  GradientShared& shared = *reinterpret_cast<GradientShared*>(isobn_shared);
  const int64_t D = p.D, i = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  const int row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  share_weight(p, &shared.w);
  __syncthreads();
  if (lane == 0)
    for (int k = 0; k < 3; ++k) shared.energies[row][k] = 0;
  if (i < D) {
    const float w = shared.w, sigma = p.running_std[i] / w, inv_i = reciprocal(sigma);
    float R_squares = 0;
    for (int64_t j = lane; j < D; j += kWarp) {
      const float inv_j = reciprocal(p.running_std[j] / w);
      const float R = clamp(correlation(upper(p.C, D, i, j), inv_i / w, inv_j), -1.0f, 1.0f);
      R_squares = ::fmaf(R, R, R_squares);
    }
    const float gamma = warp_sum(R_squares) / float(D);
    const float t = shrinkage(gamma, sigma, float(p.eps), p.beta);

    const X* const x = static_cast<const X*>(p.x) + i * p.col_stride;
    const X* const dout = static_cast<const X*>(p.dout) + i * p.dout_col_stride;
    const float x_0 = widen(x[0]);
    float sum = 0, g = 0;
    for (int n = lane; n < p.N; n += kWarp) {
      const float x_n = widen(x[n * p.row_stride]);
      sum += x_n - x_0;
      g = ::fmaf(widen(dout[n * p.dout_row_stride]), x_n, g);
    }
    const float mean = warp_sum(sum) / float(p.N);
    g = warp_sum(g);
    float squares = 0;
    for (int n = lane; n < p.N; n += kWarp) {
      const float y = widen(x[n * p.row_stride]) - x_0 - mean;
      squares = ::fmaf(y, y, squares);
    }
    squares = warp_sum(squares);
    if (lane == 0) {
      p.mean[i] = mean;
      p.s[i] = deviation<float>(squares, float(p.N));
      p.gamma[i] = gamma;
      p.t[i] = t;
      p.g[i] = g;
      p.inv[i] = inv_i;
      const double C_ii = p.C[i * D + i] / double(w);
      shared.energies[row][0] = C_ii;
      shared.energies[row][1] = C_ii * t * t;
      shared.energies[row][2] = double(g) * t;
    }
  }
  __syncthreads();
  if (threadIdx.x < 3) {
    double sum = 0;
    for (int r = 0; r < kRows; ++r) sum += shared.energies[r][threadIdx.x];
    p.energies[3 * blockIdx.x + threadIdx.x] = sum;
  }
}

// From the sums over all features: dgamma, du gamma and the diagonal of G + G^T. A thread for each feature.
__global__ void __launch_bounds__(kGradientThreads) backward_features(const Gradient p) {
  GradientShared& shared = *reinterpret_cast<GradientShared*>(isobn_shared);
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  share_weight(p, &shared.w);
  if (threadIdx.x < kWarp) {
    const double E = sum_of_blocks<3>(p.energies, p.blocks, 0), E_prime = sum_of_blocks<3>(p.energies, p.blocks, 1);
    const double dr = sum_of_blocks<3>(p.energies, p.blocks, 2);
    if (threadIdx.x == 0) {
      shared.all = energy_gradient(E, E_prime, dr, p.eps);
    }
  }
  __syncthreads();
  if (i >= p.D) return;
  const double C_ii = p.C[i * p.D + i] / double(shared.w);
  const FeatureGradient of = feature_gradient(shared.all, p.g[i], C_ii, p.running_std[i] / shared.w, p.gamma[i], p.t[i],
                                              p.eps, p.beta);
  p.dgamma[i] = float(of.dgamma);
  p.du_gamma[i] = float(of.du_gamma);
  p.diagonal[i] = float(of.diagonal);
}

// dx: a block for kRows features j. Tiles of kWarp features i: y_ni, and G_ij + G_ji as it is needed.
template <class X>
__global__ void __launch_bounds__(kGradientThreads) gradient(const Gradient p) {
  GradientShared& shared = *reinterpret_cast<GradientShared*>(isobn_shared);
  constexpr int kOutputs = kMaxRows * kRows / kGradientThreads;  // of a thread
  const int64_t D = p.D, j0 = int64_t(blockIdx.x) * kRows;
  const int row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t j = j0 + row;
  const X* const x = static_cast<const X*>(p.x);
  share_weight(p, &shared.w);
  __syncthreads();
  const float w = shared.w, pair_gain = 2.0f / float(D), gain = p.gain / w;
  const float inv_j = j < D ? p.inv[j] : 0, dgamma_j = j < D ? p.dgamma[j] : 0;

  float sums[kOutputs] = {}, dR_R = 0;
  for (int64_t i0 = 0; i0 < D; i0 += kWarp) {
    const int64_t i = i0 + lane;
    const bool updated = i < D && is_updated(p.s[i]);
    const float x_0 = updated ? widen(x[i * p.col_stride]) : 0, mean = updated ? p.mean[i] : 0;
    for (int n = row; n < p.N; n += kRows)
      shared.y[n][lane] = updated ? widen(x[n * p.row_stride + i * p.col_stride]) - x_0 - mean : 0;
    float M = 0;
    if (i < D && j < D) {
      // In the order of the upper triangle: |R_ij| < 1 is decided once for i and j.
      const bool above = i <= j;
      const float inv_i = p.inv[i];
      const float R = correlation(upper(p.C, D, i, j), (above ? inv_i : inv_j) / w, above ? inv_j : inv_i);
      const float dR = R < 1 && R > -1 ? pair_gain * (p.dgamma[i] + dgamma_j) * R : 0;
      M = correlation(dR, inv_i, inv_j) + (i == j ? p.diagonal[j] : 0);
      dR_R = ::fmaf(dR, R, dR_R);
    }
    shared.M[row][lane] = M;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      const int n = (threadIdx.x + k * kGradientThreads) / kRows, r = threadIdx.x % kRows;
      if (n >= p.N) break;
#pragma unroll 8
      for (int l = 0; l < kWarp; ++l) sums[k] = ::fmaf(shared.y[n][l], shared.M[r][l], sums[k]);
    }
    __syncthreads();
  }
  dR_R = warp_sum(dR_R);
  if (lane == 0) {
    const float h = j < D ? p.du_gamma[j] - dR_R * inv_j : 0;
    shared.h_over_s[row] = j < D && p.s[j] > 0 ? h / p.s[j] : 0;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
    const int n = (threadIdx.x + k * kGradientThreads) / kRows, r = threadIdx.x % kRows;
    const int64_t at = j0 + r;
    if (n >= p.N || at >= D) break;
    float value = widen(static_cast<const X*>(p.dout)[n * p.dout_row_stride + at * p.dout_col_stride]) * p.scale[at];
    if (is_updated(p.s[at])) {
      const float y = widen(x[n * p.row_stride + at * p.col_stride]) - widen(x[at * p.col_stride]) - p.mean[at];
      value += gain * (sums[k] + y * shared.h_over_s[r]);
    }
    narrow(value, static_cast<X*>(p.dx) + n * D + at);
  }
}

// Nothing: whether a kernel of this module can run at all.
struct Probe {};
__global__ void probe_kernel(const Probe) {}

}  // namespace isobn::cuda
