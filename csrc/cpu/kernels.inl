// Inner loops of the CPU backend, compiled once per instruction set (see baseline.cpp, avx2.cpp, avx512.cpp).
// ISOBN_SET names the set, ISOBN_VECTOR_BYTES is its vector width. Everything but the tables has internal linkage, so
// that no function compiled for one set is ever linked into another.
//
// Plain loops over the P columns of a panel are left to the compiler's vectoriser; the matrix product and the transpose
// are written with vectors, where that was measured to matter.

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../formulas.h"
#include "kernels.h"

#include "vectors.inl"
#include "elements.inl"
#include "rows.inl"
#include "product.inl"
#include "transpose.inl"
#include "tile.inl"
#include "gradient.inl"
#include "across_ranks.inl"

namespace isobn::cpu {
namespace {

template <class S>
constexpr Kernels<S> table() {
  return {&centre<S>,      &process_tile<true, S>, &process_tile<false, S>, &apply<S>, &dot<S>, &gradient<S>,
          &column_sums<S>, &centre_about<S>, &gram_tile<S>, &next_row_of_tiles<S>, &store_row_of_tiles<S>};
}

}  // namespace

template <>
const Kernels<float> KernelsOf<float>::ISOBN_SET = table<float>();
template <>
const Kernels<double> KernelsOf<double>::ISOBN_SET = table<double>();

}  // namespace isobn::cpu
