// Statistics across ranks: (1)-(6) in parts. Included by kernels.inl.

namespace isobn::cpu {
namespace {

// High and low half of a number: their sum is the number, and a sum of many equal halves is exact.
inline double high_half(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  bits &= ~uint64_t(0) << 27;
  std::memcpy(&x, &bits, 8);
  return x;
}

template <class X, class S>
void column_sums_of(const Strided& x, int64_t N, int width, double* high, double* low) {
  const X* data = static_cast<const X*>(x.data);
  double sums[P] = {}, low_sums[P] = {};
  S row[P];
  for (int64_t n = 0; n < N; ++n) {
    load_row(data + n * x.row_stride, x.col_stride, width, row);
    for (int j = 0; j < P; ++j) {
      if constexpr (sizeof(S) == 8) {
        const double h = high_half(row[j]);
        sums[j] += h;
        low_sums[j] += row[j] - h;
      } else {
        sums[j] += double(row[j]);
      }
    }
  }
  std::memcpy(high, sums, size_t(width) * sizeof(double));
  if constexpr (sizeof(S) == 8) std::memcpy(low, low_sums, size_t(width) * sizeof(double));
}

template <class X, class S>
void centre_rows_about(const Strided& x, int64_t N, int width, const double* high, const double* low, S* y) {
  const X* data = static_cast<const X*>(x.data);
  for (int64_t n = 0; n < N; ++n) {
    S* row = y + n * P;
    load_row(data + n * x.row_stride, x.col_stride, width, row);
    for (int j = 0; j < P; ++j) {
      if constexpr (sizeof(S) == 8) {
        const double h = high_half(row[j]);
        row[j] = (h - high[j]) + ((row[j] - h) - low[j]);
      } else {
        row[j] = S(double(row[j]) - high[j]);
      }
    }
  }
}

template <class S>
void column_sums(const Strided& x, int64_t N, int width, double* high, double* low) {
  ISOBN_BY_DTYPE(column_sums_of, x.dtype, x, N, width, high, low)
}
template <class S>
void centre_about(const Strided& x, int64_t N, int width, const double* high, const double* low, S* y) {
  ISOBN_BY_DTYPE(centre_rows_about, x.dtype, x, N, width, high, low, y)
}

// Element (i, j) of an upper triangle that lies row by row.
template <class S>
inline S* packed_at(S* packed, int64_t D, int64_t i, int64_t j) {
  return packed + i * D - i * (i + 1) / 2 + j;
}

// Elements [first, end) of a row of a tile. The whole row is worth a copy without a call.
template <class S>
inline void copy_row(S* to, const S* from, int first, int end) {
  if (end - first == P)
    std::memcpy(to, from, P * sizeof(S));
  else
    std::memcpy(to + first, from + first, size_t(end - first) * sizeof(S));
}

template <class S>
void gram_tile(const Tile<S>& tile, S* packed) {
  constexpr int64_t kChunk = 128;
  S* const sums = tile.scratch;
  int64_t done = 0;
  for (; tile.N - done > kChunk; done += kChunk)
    product(tile.y_i + done * P, int64_t(1), int64_t(P), tile.hi, tile.y_j + done * P, kChunk, sums, done > 0);
  const auto finish = [&](auto R, int row) {
    for (int i = row; i < row + R(); ++i)  // for the product to hide what it takes to fetch them
      for (int j = 0; j < P; j += 64 / sizeof(S))
        __builtin_prefetch(packed_at(packed, tile.D, tile.i0 + i, tile.j0 + j), 1);
    product_rows<R()>(tile.y_i + done * P + row, int64_t(1), int64_t(P), tile.y_j + done * P, tile.N - done,
                      sums + row * P, done > 0);
    for (int i = row; i < row + R(); ++i)
      copy_row(packed_at(packed, tile.D, tile.i0 + i, tile.j0), sums + i * P, tile.i0 == tile.j0 ? i : 0, tile.wj);
  };
  int row = 0;
  for (; row + kRows <= tile.hi; row += kRows) finish(std::integral_constant<int, kRows>(), row);
  for (; row < tile.hi; ++row) finish(std::integral_constant<int, 1>(), row);
}

// A product that the compiler must not join with an addition to one that is rounded once.
template <class V>
ISOBN_INLINE V rounded(V product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// to = keep C + gain gram for P columns, with one rounding for each product and for the sum, whatever the instruction
// set: the ranks' C are equal.
template <class S>
inline void next_covariance(const S* C, const S* gram, S keep, S gain, S* to, S* copy) {
  using V = typename Vector<S>::type;
  for (int j = 0; j < P; j += Vector<S>::lanes) {
    const V c = rounded(keep * *reinterpret_cast<const V*>(C + j)) +
                rounded(gain * *reinterpret_cast<const V*>(gram + j));
    *reinterpret_cast<V*>(to + j) = c;
    *reinterpret_cast<V*>(copy + j) = c;
  }
}

// R rows of one tile of a row of tiles, which starts at row i and column j0 of the matrix.
template <int R, class S>
inline void next_rows(const RowOfTiles<S>& tiles, int row, int64_t j0) {
  const int64_t D = tiles.D, i0 = tiles.i0;
  const int width = D - j0 < P ? int(D - j0) : P;
  const bool on_diagonal = j0 == i0;
  S* const fresh = tiles.scratch + (on_diagonal ? 0 : P * P);
  for (int i = row; i < row + R; ++i) {
    const S* const C = tiles.C + (i0 + i) * D + j0;
    S* const packed = packed_at(tiles.packed, D, i0 + i, j0);
    S* const to = fresh + i * P;
    if (!on_diagonal && width == P && tiles.updated == nullptr) {
      next_covariance(C, packed, tiles.keep, tiles.gain, to, packed);
      continue;
    }
    const int first = on_diagonal ? i : 0;
    S old[P] = {}, gram[P] = {};
    copy_row(old, C, first, width);
    copy_row(gram, packed, first, width);
    next_covariance(old, gram, tiles.keep, tiles.gain, to, gram);
    if (tiles.updated != nullptr)  // rare: a feature that this batch does not update keeps its bits
      for (int j = 0; j < P; ++j) to[j] = tiles.updated[i0 + i] && tiles.updated[j0 + j] ? to[j] : old[j];
    copy_row(packed, to, first, width);
    for (int j = 0; j < first; ++j) to[j] = fresh[j * P + i];
    if (on_diagonal) tiles.diagonal[i0 + i] = to[i];
  }
  Tile<S> tile{};
  tile.inv_i = tiles.row_inv + i0;
  tile.inv_j = tiles.inv + j0;
  S* const row_sums = tiles.partial + j0 / P * tiles.padded + i0;
  S none[P] = {};  // the sums of the diagonal tile's rows say it all
  S* const col_sums = on_diagonal ? none : tiles.partial + i0 / P * tiles.padded + j0;
  correlate<false, R>(tile, row, fresh, int64_t(P), fresh, static_cast<S*>(nullptr), row_sums, col_sums);
}

// Row by row over all tiles: the processor foresees the next elements of C and of the packed triangle.
template <class S>
void next_row_of_tiles(const RowOfTiles<S>& tiles) {
  const int64_t behind = tiles.i0 + P;
  S* const col_sums = tiles.partial + tiles.i0 / P * tiles.padded + behind;
  std::memset(col_sums, 0, size_t(tiles.padded - behind) * sizeof(S));
  int row = 0;
  for (; row + kRows <= tiles.hi; row += kRows)
    for (int64_t j0 = tiles.i0; j0 < tiles.D; j0 += P) next_rows<kRows>(tiles, row, j0);
  for (; row < tiles.hi; ++row)
    for (int64_t j0 = tiles.i0; j0 < tiles.D; j0 += P) next_rows<1>(tiles, row, j0);
}

template <class S>
void store_row_of_tiles(const RowOfTiles<S>& tiles) {
  const int64_t D = tiles.D, i0 = tiles.i0;
  for (int64_t i = i0; i < i0 + tiles.hi; ++i) {
    if (i + 2 < D)  // rows are short: the processor foresees little of the next one
      for (int64_t j = i; j < D; j += 64 / sizeof(S)) __builtin_prefetch(tiles.C + (i + 2) * D + j, 1);
    std::memcpy(tiles.C + i * D + i, packed_at(tiles.packed, D, i, i), size_t(D - i) * sizeof(S));
  }
  for (int64_t i = i0; i < i0 + tiles.hi; ++i)
    for (int64_t j = i0; j < i; ++j) tiles.C[i * D + j] = *packed_at(tiles.packed, D, j, i);
  S* const fresh = tiles.scratch;
  for (int64_t j0 = i0 + P; j0 < D; j0 += P) {
    const int width = D - j0 < P ? int(D - j0) : P;
    for (int i = 0; i < P; ++i) copy_row(fresh + i * P, packed_at(tiles.packed, D, i0 + i, j0), 0, width);
    if (tiles.stream)
      transpose<true>(fresh, tiles.C + j0 * D + i0, D, width);
    else
      transpose<false>(fresh, tiles.C + j0 * D + i0, D, width);
  }
#if defined(__AVX__)
  if (tiles.stream) _mm_sfence();
#endif
}

}  // namespace
}  // namespace isobn::cpu
