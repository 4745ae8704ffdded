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

namespace isobn::cpu {
namespace {

template <class S>
struct Vector {
  // aligned(sizeof(S)): loads and stores are unaligned ones.
  typedef S type __attribute__((vector_size(ISOBN_VECTOR_BYTES), aligned(sizeof(S)), may_alias));
  static constexpr int lanes = ISOBN_VECTOR_BYTES / sizeof(S);
};

// Sum of a vector's lanes, by halves.
#if defined(__x86_64__)
inline float sum_lanes(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}
inline double sum_lanes(__m128d v) { return _mm_cvtsd_f64(_mm_add_sd(v, _mm_unpackhi_pd(v, v))); }
#if defined(__AVX__)
inline float sum_lanes(__m256 v) { return sum_lanes(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))); }
inline double sum_lanes(__m256d v) {
  return sum_lanes(_mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1)));
}
#endif
#if defined(__AVX512F__)
inline float sum_lanes(__m512 v) {
  return sum_lanes(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
inline double sum_lanes(__m512d v) {
  return sum_lanes(_mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1)));
}
#endif
#else
template <class V>
inline auto sum_lanes(V v) {
  auto sum = v[0];
  for (size_t l = 1; l < sizeof(V) / sizeof(sum); ++l) sum += v[l];
  return sum;
}
#endif

// The sums of R vectors.
template <int R, class V, class S>
inline void store_sums(const V (&sums)[R], S* to) {
  for (int i = 0; i < R; ++i) to[i] = sum_lanes(sums[i]);
}
#if defined(__AVX512F__)
inline void store_sums(const __m512 (&sums)[4], float* to) {  // together, in a third of the instructions
  const __m512 a = _mm512_unpacklo_ps(sums[0], sums[1]) + _mm512_unpackhi_ps(sums[0], sums[1]);
  const __m512 b = _mm512_unpacklo_ps(sums[2], sums[3]) + _mm512_unpackhi_ps(sums[2], sums[3]);
  const __m512 c = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}
#endif

// ---- 16-bit types ----

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Exponent and fraction moved to their float places are the value times 2^-112; this scales subnormals right too.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline void narrow(float f, float* x) { *x = f; }
inline void narrow(double f, double* x) { *x = f; }
inline void narrow(float f, BFloat* x) {
  const uint32_t bits = float_to_bits(f);
  x->bits = f != f ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
}
inline void narrow(float f, Half* x) {
  const uint32_t sign = (float_to_bits(f) >> 16) & 0x8000u;
  const uint32_t magnitude = float_to_bits(f) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24, the subnormal step
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  x->bits = uint16_t(sign | half);
}

// ---- Rows of a panel ----

// Elements [0, width) of a row as S, zeros up to P.
template <class X, class S>
inline void load_row(const X* x, int64_t stride, int width, S* row) {
  if (stride == 1 && width == P) {
#if defined(__F16C__)
    if constexpr (sizeof(X) == 2 && !__is_same(X, BFloat)) {
      for (int j = 0; j < P; j += 8)
        _mm256_storeu_ps(row + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + j))));
      return;
    }
#endif
    for (int j = 0; j < P; ++j) row[j] = widen(x[j]);
    return;
  }
  for (int j = 0; j < width; ++j) row[j] = widen(x[j * stride]);
  for (int j = width; j < P; ++j) row[j] = S(0);
}

template <class X, class S>
inline void store_row(const S* row, int width, X* x) {
#if defined(__F16C__)
  if constexpr (sizeof(X) == 2 && !__is_same(X, BFloat)) {
    if (width == P) {
      for (int j = 0; j < P; j += 8)
        _mm_storeu_si128((__m128i*)(x + j),
                         _mm256_cvtps_ph(_mm256_loadu_ps(row + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      return;
    }
  }
#endif
  if (width == P) {
    for (int j = 0; j < P; ++j) narrow(row[j], x + j);
  } else {
    for (int j = 0; j < width; ++j) narrow(row[j], x + j);
  }
}

// Column sums of many rows: a short run in S, then the runs in double, so that the error does not grow with N.
template <class S>
class ColumnSums {
 public:
  void add(const S* row) {
    for (int v = 0; v < NV; ++v) run_[v] += reinterpret_cast<const V*>(row)[v];
    if (++rows_ == 128) flush();
  }
  void add_products(const S* a, const S* b) {
    for (int v = 0; v < NV; ++v) run_[v] += reinterpret_cast<const V*>(a)[v] * reinterpret_cast<const V*>(b)[v];
    if (++rows_ == 128) flush();
  }
  const double* total() {
    flush();
    return total_;
  }

 private:
  using V = typename Vector<S>::type;
  static constexpr int NV = P / Vector<S>::lanes;

  void flush() {
    S run[P];
    for (int v = 0; v < NV; ++v) {
      reinterpret_cast<V*>(run)[v] = run_[v];
      run_[v] = V{};
    }
    for (int j = 0; j < P; ++j) total_[j] += run[j];
    rows_ = 0;
  }
  V run_[NV] = {};
  double total_[P] = {};
  int rows_ = 0;
};

template <class X, class S>
bool centre_rows(const Strided& x, int64_t N, int width, S* y, S* s) {
  const X* data = static_cast<const X*>(x.data);
  S first[P];
  load_row(data, x.col_stride, width, first);
  ColumnSums<S> sums;
  for (int64_t n = 0; n < N; ++n) {
    S* z = y + n * P;
    load_row(data + n * x.row_stride, x.col_stride, width, z);
    for (int j = 0; j < P; ++j) z[j] -= first[j];
    sums.add(z);
  }
  S mean[P];
  const double* const total = sums.total();
  for (int j = 0; j < P; ++j) mean[j] = S(total[j] / double(N));
  ColumnSums<S> squares;
  for (int64_t n = 0; n < N; ++n) {
    S* row = y + n * P;
    for (int j = 0; j < P; ++j) row[j] -= mean[j];
    squares.add_products(row, row);
  }
  bool all_updated = true;
  const double* const total_squares = squares.total();
  for (int j = 0; j < P; ++j) {
    s[j] = deviation<S>(total_squares[j], double(N));
    if (is_updated(s[j])) continue;
    all_updated = false;
    for (int64_t n = 0; n < N; ++n) y[n * P + j] = S(0);
  }
  return all_updated;
}

template <class X, class S>
void apply_rows(const Strided& x, int64_t rows, int width, const S* scale, void* out, int64_t D) {
  const X* data = static_cast<const X*>(x.data);
  X* to = static_cast<X*>(out);
  S row[P];
  for (int64_t n = 0; n < rows; ++n) {
    load_row(data + n * x.row_stride, x.col_stride, width, row);
    for (int j = 0; j < P; ++j) row[j] *= scale[j];
    store_row(row, width, to + n * D);
  }
}

template <class X, class S>
void dot_rows(const Strided& a, const Strided& b, int64_t N, int width, S* g) {
  S row_a[P], row_b[P];
  ColumnSums<S> sums;
  for (int64_t n = 0; n < N; ++n) {
    load_row(static_cast<const X*>(a.data) + n * a.row_stride, a.col_stride, width, row_a);
    load_row(static_cast<const X*>(b.data) + n * b.row_stride, b.col_stride, width, row_b);
    sums.add_products(row_a, row_b);
  }
  const double* const total = sums.total();
  for (int j = 0; j < P; ++j) g[j] = S(total[j]);
}

// Calls the loop for the dtype of x: the 16-bit types have float state, the others their own.
#define ISOBN_BY_DTYPE(function, dtype, ...)                               \
  if constexpr (sizeof(S) == 8) {                                          \
    return function<double, S>(__VA_ARGS__);                               \
  } else {                                                                 \
    if ((dtype) == DType::float16) return function<Half, S>(__VA_ARGS__);  \
    if ((dtype) == DType::bfloat16) return function<BFloat, S>(__VA_ARGS__); \
    return function<float, S>(__VA_ARGS__);                                \
  }

template <class S>
bool centre(const Strided& x, int64_t N, int width, S* y, S* s) {
  ISOBN_BY_DTYPE(centre_rows, x.dtype, x, N, width, y, s)
}
template <class S>
void apply(const Strided& x, int64_t rows, int width, const S* scale, void* out, int64_t D) {
  ISOBN_BY_DTYPE(apply_rows, x.dtype, x, rows, width, scale, out, D)
}
template <class S>
void dot(const Strided& dout, const Strided& x, int64_t N, int width, S* g) {
  ISOBN_BY_DTYPE(dot_rows, x.dtype, dout, x, N, width, g)
}

// ---- Matrix product ----

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

// ---- Transpose of a (P, P) tile ----

#if defined(__AVX__)
// An 8 x 8 block of a tile, transposed.
inline void transpose_block(const float* from, __m256* r) {
  __m256 t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * P);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
// to[j * stride + i] = from[i * P + j], each cache line of `to` written at once; past the caches if asked to.
template <bool kStream>
inline void transpose(const float* from, float* to, int64_t stride, int width) {
  for (int j = 0; j < width; j += 8)
    for (int i = 0; i < P; i += 16) {
      __m256 left[8], right[8];
      transpose_block(from + i * P + j, left);
      transpose_block(from + (i + 8) * P + j, right);
#pragma GCC unroll 8
      for (int l = 0; l < 8; ++l) {
        if (j + l == width) break;
        float* const line = to + (j + l) * stride + i;
        if (kStream) {
          _mm256_stream_ps(line, left[l]);
          _mm256_stream_ps(line + 8, right[l]);
        } else {
          _mm256_storeu_ps(line, left[l]);
          _mm256_storeu_ps(line + 8, right[l]);
        }
      }
    }
}
#endif
template <bool kStream, class S>
inline void transpose(const S* from, S* to, int64_t stride, int width) {
  for (int j = 0; j < width; j += 8)
    for (int i = 0; i < P; ++i)
      for (int l = j; l < (width - j < 8 ? width : j + 8); ++l) to[l * stride + i] = from[i * P + l];
}

// ---- One tile of the covariance ----

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

// ---- Gradient for stop_gradient=False, one panel of columns ----

template <class X, class S>
void gradient_rows(const GradientPanel<S>& panel) {
  const int64_t D = panel.D, j0 = panel.j0;
  S* const M = panel.scratch;            // G + G^T, rows of panel i, columns of panel j
  S* const Z = panel.scratch + P * P;    // y (G + G^T)
  S h_over_s[P] = {};
  for (int64_t n0 = 0; n0 < panel.N; n0 += rows_per_chunk) {
    const int rows = int(panel.N - n0 < rows_per_chunk ? panel.N - n0 : rows_per_chunk);
    double dR_R[P] = {};
    for (int64_t i0 = 0; i0 < D; i0 += P) {
      const int height = int(D - i0 < P ? D - i0 : P);
      for (int i = 0; i < height; ++i) {
        const S* C = panel.C + (i0 + i) * D + j0;
        const S row_inv = panel.row_inv[i0 + i], inv_i = panel.inv[i0 + i], dgamma_i = panel.dgamma[i0 + i];
        S row[P];
        for (int j = 0; j < panel.wj; ++j) row[j] = C[j];
        for (int j = panel.wj; j < P; ++j) row[j] = S(0);
        for (int j = 0; j < P; ++j) {
          // In the order of the upper triangle: |R_ij| < 1 is decided once for i and j.
          const bool above = i0 + i <= j0 + j;
          const S R = correlation(row[j], above ? row_inv : panel.row_inv[j0 + j], above ? panel.inv[j0 + j] : inv_i);
          const S dR = R < S(1) && R > S(-1) ? panel.pair_gain * (dgamma_i + panel.dgamma[j0 + j]) * R : S(0);
          M[i * P + j] = correlation(dR, inv_i, panel.inv[j0 + j]);
          dR_R[j] += dR * R;
        }
        if (i0 == j0) M[i * P + i] += panel.diag[i0 + i];
      }
      product(panel.y + i0 * panel.N + n0 * P, int64_t(P), int64_t(1), rows, M, int64_t(height), Z, i0 > 0);
    }
    if (n0 == 0)
      for (int j = 0; j < P; ++j) {
        const S s = panel.s[j0 + j];
        const S h = panel.du_gamma[j0 + j] - S(dR_R[j]) * panel.inv[j0 + j];
        h_over_s[j] = panel.updated[j0 + j] && s > S(0) ? h / s : S(0);
      }
    for (int n = 0; n < rows; ++n) {
      S row[P];
      load_row(static_cast<const X*>(panel.dout.data) + (n0 + n) * panel.dout.row_stride, panel.dout.col_stride,
               panel.wj, row);
      const S* y = panel.y + j0 * panel.N + (n0 + n) * P;
      for (int j = 0; j < P; ++j) {
        const S through_statistics = panel.gain * (Z[n * P + j] + y[j] * h_over_s[j]);
        row[j] = row[j] * panel.scale[j0 + j] + (panel.updated[j0 + j] ? through_statistics : S(0));
      }
      store_row(row, panel.wj, static_cast<X*>(panel.dx) + (n0 + n) * D);
    }
  }
}

template <class S>
void gradient(const GradientPanel<S>& panel) {
  ISOBN_BY_DTYPE(gradient_rows, panel.dout.dtype, panel)
}

template <class S>
constexpr Kernels<S> table() {
  return {&centre<S>, &process_tile<true, S>, &process_tile<false, S>, &apply<S>, &dot<S>, &gradient<S>};
}

}  // namespace

template <>
const Kernels<float> KernelsOf<float>::ISOBN_SET = table<float>();
template <>
const Kernels<double> KernelsOf<double>::ISOBN_SET = table<double>();

}  // namespace isobn::cpu
