// Vectors of the instruction set, and sums of their lanes. Included by kernels.inl.

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

}  // namespace
}  // namespace isobn::cpu
