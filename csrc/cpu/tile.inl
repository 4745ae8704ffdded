// One tile of the covariance: (3)-(6). Included by kernels.inl.

namespace isobn::cpu {
namespace {

// R_ij^2 of (5), clamped: as no NaN is larger than 0, the one of Inf * 0 becomes the 0 that was meant.
template <class V>
inline V squared_correlation(V c, V inv_i, V inv_j) {
  const V r = c * inv_i * inv_j, square = r * r, zero = {}, one = zero + 1;
  const V known = square > zero ? square : zero;
  return known < one ? known : one;
}
#if defined(__AVX512F__)
inline __m512 squared_correlation(__m512 c, __m512 inv_i, __m512 inv_j) {
  const __m512 r = c * inv_i * inv_j;
  return _mm512_min_ps(_mm512_max_ps(r * r, _mm512_setzero_ps()), _mm512_set1_ps(1));
}
#elif defined(__AVX__)
inline __m256 squared_correlation(__m256 c, __m256 inv_i, __m256 inv_j) {
  const __m256 r = c * inv_i * inv_j;
  return _mm256_min_ps(_mm256_max_ps(r * r, _mm256_setzero_ps()), _mm256_set1_ps(1));
}
#endif

// Rows [0, R) of a tile: C_ij <- keep C_ij + gain B_ij, and the sums of R_ij^2 along the rows and down the columns.
// `fresh` holds B and becomes C; `C` is its place in the matrix, or null. Without kUpdate C_ij is `old`, and nothing
// but the sums is written.
template <bool kUpdate, int R, class S>
inline void correlate(const Tile<S>& tile, int row, const S* old, int64_t old_stride, S* fresh, S* C, S* row_sums,
                      S* col_sums) {
  using V = typename Vector<S>::type;
  constexpr int L = Vector<S>::lanes;
  const V keep = V{} + tile.keep, gain = V{} + tile.gain;
  const S* const inv_j = tile.inv_j;
  V sums[R] = {}, inv_i[R];
  for (int i = 0; i < R; ++i) inv_i[i] = V{} + tile.inv_i[row + i];
  old += row * old_stride;
  fresh += row * P;
  const int64_t D = tile.D;
  if (kUpdate && C != nullptr) C += row * D;
#pragma GCC unroll 1
  for (int j = 0; j < P; j += L) {
    V column = *reinterpret_cast<const V*>(col_sums + j);
    const V inv = *reinterpret_cast<const V*>(inv_j + j);
    for (int i = 0; i < R; ++i) {
      V c = *reinterpret_cast<const V*>(old + i * old_stride + j);
      if (kUpdate) {
        V* const to = reinterpret_cast<V*>(fresh + i * P + j);
        c = keep * c + gain * *to;
        *to = c;
        if (C != nullptr) *reinterpret_cast<V*>(C + i * D + j) = c;
      }
      const V square = squared_correlation(c, inv_i[i], inv);
      sums[i] += square;
      column += square;
    }
    *reinterpret_cast<V*>(col_sums + j) = column;
  }
  store_sums(sums, row_sums + row);
}

// R rows of a tile: the last of their product, and what becomes of it.
template <bool kUpdate, int R, class S>
inline void process_rows(const Tile<S>& tile, int row, const S* old, int64_t old_stride, S* fresh, S* C, S* col_sums) {
  if (kUpdate && tile.updated_i != nullptr) {  // rare: a feature that this batch does not update keeps its bits
    for (int i = row; i < row + R; ++i)
      for (int j = 0; j < P; ++j) {
        const S c = old[i * old_stride + j];
        S* const to = fresh + i * P + j;
        *to = tile.updated_i[i] && tile.updated_j[j] ? tile.keep * c + tile.gain * *to : c;
      }
    correlate<false, R>(tile, row, fresh, int64_t(P), fresh, C, tile.row_sums, col_sums);
  } else {
    correlate<kUpdate, R>(tile, row, old, old_stride, fresh, C, tile.row_sums, col_sums);
  }
}

template <bool kUpdate, class S>
void process_tile(const Tile<S>& tile) {
  constexpr int64_t kChunk = 128;  // rows of the batch at a time: two panel pieces of 32 KB
  const bool on_diagonal = tile.i0 == tile.j0;
  S* const C = tile.C + tile.i0 * tile.D + tile.j0;
  S* const fresh = tile.scratch;
  S* const other = tile.scratch + P * P;

  // The old values: in place, but for a tile at the edge (padded with zeros) or on the diagonal, whose lower half is
  // taken from its upper one. The new lower half then equals the upper bit for bit: the same products, the same order.
  const S* old = C;
  int64_t old_stride = tile.D;
  S padded[P * P];
  if (on_diagonal || tile.wj < P) {
    for (int i = 0; i < P; ++i) {
      const int present = i < tile.hi ? tile.wj : 0;
      std::memcpy(padded + i * P, old + i * tile.D, size_t(present) * sizeof(S));
      std::memset(padded + i * P + present, 0, size_t(P - present) * sizeof(S));
    }
    old = padded;
    old_stride = P;
  }
  if (on_diagonal) {
    transpose<false>(padded, other, int64_t(P), P);
    for (int i = 0; i < P; ++i)
      for (int j = 0; j < P; ++j) padded[i * P + j] = j < i ? other[i * P + j] : padded[i * P + j];
  }

  int64_t done = 0;  // rows of the batch that the product has, but for the last chunk
  for (; kUpdate && tile.N - done > kChunk; done += kChunk)
    product(tile.y_i + done * P, int64_t(1), int64_t(P), P, tile.y_j + done * P, kChunk, fresh, done > 0);
  // The last chunk row by row with what follows it, which keeps other parts of the processor busy than the product.
  S col_sums[P] = {};
  const bool whole = tile.wj == P && tile.updated_i == nullptr;
  const auto finish = [&](auto R, int row) {
    if (kUpdate) {
      for (int i = row; i < row + R(); ++i)  // for the product to hide what it takes to fetch them
        for (int j = 0; j < P; j += 64 / sizeof(S)) __builtin_prefetch(old + i * old_stride + j);
      product_rows<R()>(tile.y_i + done * P + row, int64_t(1), int64_t(P), tile.y_j + done * P, tile.N - done,
                        fresh + row * P, done > 0);
    }
    process_rows<kUpdate, R()>(tile, row, old, old_stride, fresh, whole ? C : nullptr, col_sums);
  };
  int row = 0;
  for (; row + kRows <= tile.hi; row += kRows) finish(std::integral_constant<int, kRows>(), row);
  for (; row < tile.hi; ++row) finish(std::integral_constant<int, 1>(), row);

  if (kUpdate && !whole)
    for (int i = 0; i < tile.hi; ++i) std::memcpy(C + i * tile.D, fresh + i * P, size_t(tile.wj) * sizeof(S));
  if (on_diagonal)
    for (int i = 0; i < tile.hi; ++i) tile.diagonal[i] = (kUpdate ? fresh : padded)[i * P + i];
  if (on_diagonal) return;
  std::memcpy(tile.col_sums, col_sums, sizeof col_sums);

  if (kUpdate) {
    S* const mirror = tile.C + tile.j0 * tile.D + tile.i0;
    if (tile.stream)
      transpose<true>(fresh, mirror, tile.D, tile.wj);
    else
      transpose<false>(fresh, mirror, tile.D, tile.wj);
#if defined(__AVX__)
    if (tile.stream) _mm_sfence();
#endif
  }
}

}  // namespace
}  // namespace isobn::cpu
