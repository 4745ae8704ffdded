// The transpose of a (P, P) tile. Included by kernels.inl.

namespace isobn::cpu {
namespace {

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

}  // namespace
}  // namespace isobn::cpu
