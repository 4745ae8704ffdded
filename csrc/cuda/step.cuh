// (1)-(10) in one launch, or in two that meet where the barrier was. Equation numbers and symbols are those of
// isobn_kernels/reference.py.
//
// The latency path: a block of threads owns kRows rows of C, or a few times as many, over their whole width. It computes
// the batch's statistics of every feature itself, from a batch that stays in cache, and so needs nothing of another
// block but the two sums E and E'. Before the grid's barrier a block only reads state, after it each writes its own.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "sums.cuh"

namespace isobn::cuda {

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
__device__ void before_barrier(const Step& p, StepShared& shared, float* kept) {
  const int64_t D = p.D;
  const int N = p.N, tid = threadIdx.x, rows = kRows * p.groups, first = int(blockIdx.x) * rows;
  float *const kept_sigma = kept, *const kept_t = kept + rows, *const kept_rows = kept + 2 * rows;
  const X* const x = static_cast<const X*>(p.x);
  const Columns<kWide> columns{int(D)};

  if (tid == 0) {
    shared.E = shared.E_prime = 0;
    const double updates = p.count == nullptr ? 0 : double(*p.count + (kUpdate ? 1 : 0));
    shared.w = p.bias_correction ? float(correction_weight(p.momentum, updates)) : 1.0f;
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
__device__ void after_barrier(const Step& p, StepShared& shared, float* kept) {
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
  if (p.phase != Phase::after_barrier) before_barrier<X, kWide, kUpdate>(p, shared, kept);
  if (p.phase == Phase::whole) cooperative_groups::this_grid().sync();
  if (p.phase != Phase::before_barrier) after_barrier<X, kWide, kUpdate>(p, shared, kept);
}

}  // namespace isobn::cuda
