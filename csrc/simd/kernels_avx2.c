/* The AVX2 (with F16C) level. */
#if defined(__AVX2__)
#include <immintrin.h>
#define HFR_VB 32
#define HFR_LEVEL avx2
#include "vector.inc"

#define HFR_HAVE_SELECT
typedef vu mask;
HFR_INLINE mask less(vu a, vu b) { return (vu)_mm256_cmpgt_epi32((__m256i)b, (__m256i)a); }
HFR_INLINE vu pick(mask m, vu yes, vu no) { return (vu)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, (__m256i)m); }

/* maxps takes the second operand if either is NaN: only a NaN in the first needs care. */
#define HFR_HAVE_FLOAT_EXTREME
#define HFR_EXTREME(name, type, suffix, which)                                                                      \
  HFR_INLINE vu name(vu a, vu b) {                                                                                  \
    type x = (type)a, y = (type)b;                                                                                  \
    return (vu)_mm256_blendv_##suffix(_mm256_##which##_##suffix(x, y), x, _mm256_cmp_##suffix(x, x, _CMP_UNORD_Q)); \
  }
HFR_EXTREME(max_f32, __m256, ps, max)
HFR_EXTREME(min_f32, __m256, ps, min)
HFR_EXTREME(max_f64, __m256d, pd, max)
HFR_EXTREME(min_f64, __m256d, pd, min)

#define HFR_HAVE_INT_EXTREME
#define HFR_INT_MAX(type, suffix, a, b) (vu) _mm256_max_##suffix((__m256i)(a), (__m256i)(b))
#define HFR_INT_MIN(type, suffix, a, b) (vu) _mm256_min_##suffix((__m256i)(a), (__m256i)(b))

#define HFR_HAVE_HALF
HFR_INLINE vu load_half(const unsigned char *p) { return (vu)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
HFR_INLINE void store_half(unsigned char *p, vu a) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
}
HFR_INLINE vu half_low(vu x) { return (vu)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)x)); }
HFR_INLINE vu half_high(vu x) { return (vu)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)x, 1)); }
/* The low 16 bits of the lanes of a, then of b. The instruction interleaves by 128 bits; the permutation undoes that. */
HFR_INLINE vu pack_words(vu a, vu b) { return (vu)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)a, (__m256i)b), 0xd8); }

#define HFR_HAVE_STREAM
HFR_INLINE void stream_block(unsigned char *dst, const unsigned char *src) {
  __m256i low = _mm256_loadu_si256((const __m256i *)src), high = _mm256_loadu_si256((const __m256i *)(src + 32));
  _mm256_stream_si256((__m256i *)dst, low);
  _mm256_stream_si256((__m256i *)(dst + 32), high);
}

#include "kernels.inc"
#else
typedef int hfr_simd_no_avx2; /* a translation unit may not be empty */
#endif
