// Equations of isobn_kernels/reference.py, element by element, for every compiled backend.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define ISOBN_INLINE __host__ __device__ __forceinline__
#else
#define ISOBN_INLINE inline __attribute__((always_inline))
#endif

namespace isobn {

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float max = 3.402823466e+38f, infinity = HUGE_VALF;
};
template <>
struct Limits<double> {
  static constexpr double max = 1.7976931348623157e+308, infinity = HUGE_VAL;
};

// (2) from the sum of y^2 over N rows, for a state of type S. A sum within 1 % of the largest S counts as infinite: then
// no sum of products of two finite columns overflows, whatever the order of its terms.
template <class S, class T>
ISOBN_INLINE S deviation(T squares, T N) {
  return squares < T(0.99) * T(Limits<S>::max) ? S(::sqrt(squares / N)) : Limits<S>::infinity;
}

// Whether the batch updates a feature, and may pass a gradient: only if its s of (2) is finite. Else it is skipped.
template <class S>
ISOBN_INLINE bool is_updated(S s) {
  return s <= Limits<S>::max;
}

// w = 1 - (1-m)^updates, or 1 where that is 0: what the statistics are divided by with bias_correction.
ISOBN_INLINE double correction_weight(double momentum, double updates) {
  const double w = 1.0 - ::pow(1.0 - momentum, updates);
  return w == 0.0 ? 1.0 : w;
}

// 1 / sigma with 1/0 := 0, also where 1 / sigma overflows.
template <class T>
ISOBN_INLINE T reciprocal(T sigma) {
  const T inv = T(1) / sigma;
  return inv <= Limits<T>::max ? inv : T(0);
}

// T is a number or a vector of them.
template <class T>
ISOBN_INLINE T clamp(T r, T low, T high) {
  r = r > high ? high : r;
  return r < low ? low : r;
}

// (5) before its clamp. Where 1/sigma_j := 0 and the first product overflowed, Inf * 0 is the 0 that was meant.
template <class T>
ISOBN_INLINE T correlation(T c, T inv_i, T inv_j) {
  const T r = c * inv_i * inv_j;
  return r == r ? r : T{};
}

// (7)
template <class T>
ISOBN_INLINE T shrinkage(T gamma, T sigma, T eps, T beta) {
  const T u = gamma * sigma + eps;
  return beta == T(0.5) ? T(1) / ::sqrt(u) : T(::pow(u, -beta));
}

// (9): sqrt(E / (E' + eps))
ISOBN_INLINE double energy_ratio(double E, double E_prime, double eps) { return ::sqrt(E / (E_prime + eps)); }

// ---- The gradient through the statistics (stop_gradient=False): see `through_statistics` there ----

// What all features share. `dr` is the sum of g_i t_i.
struct EnergyGradient {
  double r, dE, dE_prime;
};
ISOBN_INLINE EnergyGradient energy_gradient(double E, double E_prime, double dr, double eps) {
  if (E == 0) return {0, 0, 0};  // the scale is the constant 1
  const double r = energy_ratio(E, E_prime, eps);
  return {r, dr * r / (2 * E), -dr * r / (2 * (E_prime + eps))};
}

// What one feature adds: dgamma, du gamma, and its element of the diagonal of G + G^T.
struct FeatureGradient {
  double dgamma, du_gamma, diagonal;
};
ISOBN_INLINE FeatureGradient feature_gradient(const EnergyGradient& all, double g, double C_ii, double sigma,
                                              double gamma, double t, double eps, double beta) {
  if (!(sigma > 0)) return {0, 0, 2 * all.dE};  // the powers may overflow, and are multiplied by 0
  const double dt = (all.r == 0 ? 0 : g * all.r) + 2 * all.dE_prime * C_ii * t;
  const double du = -beta * dt * ::pow(gamma * sigma + eps, -beta - 1);
  return {du * sigma, du * gamma, 2 * (all.dE + all.dE_prime * t * t)};
}

}  // namespace isobn
