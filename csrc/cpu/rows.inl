// Rows of a panel: loads, stores and sums; (1), (2), (10) and the products with dout. Included by kernels.inl.

namespace isobn::cpu {
namespace {

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

}  // namespace
}  // namespace isobn::cpu
