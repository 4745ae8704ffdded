// The matrix product of two panels. Included by kernels.inl.

namespace isobn::cpu {
namespace {

constexpr int kRows = 4;  // rows of a product that are computed together

// acc[r][c] (+)= sum_k a[r * a_row + k * a_k] * b[k * P + c] for R rows and NV vectors of columns, held in registers.
template <class S, int R, int NV>
inline void product_block(const S* a, int64_t a_row, int64_t a_k, const S* b, int64_t K, S* acc, bool accumulate) {
  using V = typename Vector<S>::type;
  constexpr int L = Vector<S>::lanes;
  V sum[R][NV] = {};
  for (int64_t k = 0; k < K; ++k) {
    V column[NV];
    for (int v = 0; v < NV; ++v) column[v] = *reinterpret_cast<const V*>(b + k * P + v * L);
    for (int r = 0; r < R; ++r) {
      const S factor = a[r * a_row + k * a_k];
      for (int v = 0; v < NV; ++v) sum[r][v] += factor * column[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) {
      V* to = reinterpret_cast<V*>(acc + r * P + v * L);
      *to = accumulate ? *to + sum[r][v] : sum[r][v];
    }
}

// acc (R, P) (+)= a (R, K) b (K, P).
template <int R, class S>
inline void product_rows(const S* a, int64_t a_row, int64_t a_k, const S* b, int64_t K, S* acc, bool accumulate) {
  constexpr int NV = ISOBN_VECTOR_BYTES == 64 ? 4 : 2;  // R NV accumulators, NV columns and a factor fit the registers
  for (int c = 0; c < P; c += NV * Vector<S>::lanes)
    product_block<S, R, NV>(a, a_row, a_k, b + c, K, acc + c, accumulate);
}

// acc (rows, P) (+)= a (rows, K) b (K, P).
template <class S>
inline void product(const S* a, int64_t a_row, int64_t a_k, int rows, const S* b, int64_t K, S* acc, bool accumulate) {
  const int blocked = rows - rows % kRows;
  for (int r = 0; r < blocked; r += kRows)
    product_rows<kRows>(a + r * a_row, a_row, a_k, b, K, acc + r * P, accumulate);
  for (int r = blocked; r < rows; ++r) product_rows<1>(a + r * a_row, a_row, a_k, b, K, acc + r * P, accumulate);
}

}  // namespace
}  // namespace isobn::cpu
