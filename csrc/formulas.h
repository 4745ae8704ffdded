// Equations (5)-(9) of isobn_kernels/reference.py, element by element, for every compiled backend.
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
  static constexpr float max = 3.402823466e+38f;
};
template <>
struct Limits<double> {
  static constexpr double max = 1.7976931348623157e+308;
};

// w = 1 - (1-m)^t, or 1 where that is 0: what the statistics are divided by with bias_correction.
ISOBN_INLINE double correction_weight(double momentum, double t) {
  const double w = 1.0 - ::pow(1.0 - momentum, t);
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

}  // namespace isobn
