// The gradient through the statistics (stop_gradient=False), in three launches.
#pragma once

#include "sums.cuh"

namespace isobn::cuda {

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

}  // namespace isobn::cuda
