/* The AVX-512 (F, BW, VL, DQ) level. */
#if defined(__AVX512BW__)
#include <immintrin.h>
#define HFR_VB 64
#define HFR_LEVEL avx512
#include "vector.inc"

#define HFR_HAVE_SELECT
typedef __mmask16 mask;
HFR_INLINE mask less(vu a, vu b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
HFR_INLINE vu pick(mask m, vu yes, vu no) { return (vu)_mm512_mask_mov_epi32((__m512i)no, m, (__m512i)yes); }

#define HFR_HAVE_ADD_IF_NUMBER
HFR_INLINE vu add_if_number(vu u, vu step) {
  return (vu)_mm512_mask_add_epi32((__m512i)u, _mm512_cmp_ps_mask((__m512)u, (__m512)u, _CMP_ORD_Q), (__m512i)u, (__m512i)step);
}

/* maxps takes the second operand if either is NaN: only a NaN in the first needs care. */
#define HFR_HAVE_FLOAT_EXTREME
#define HFR_EXTREME(name, type, suffix, which)                                                                               \
  HFR_INLINE vu name(vu a, vu b) {                                                                                           \
    type x = (type)a, y = (type)b;                                                                                           \
    return (vu)_mm512_mask_mov_##suffix(_mm512_##which##_##suffix(x, y), _mm512_cmp_##suffix##_mask(x, x, _CMP_UNORD_Q), x); \
  }
HFR_EXTREME(max_f32, __m512, ps, max)
HFR_EXTREME(min_f32, __m512, ps, min)
HFR_EXTREME(max_f64, __m512d, pd, max)
HFR_EXTREME(min_f64, __m512d, pd, min)

#define HFR_HAVE_INT_EXTREME
#define HFR_INT_MAX(type, suffix, a, b) (vu) _mm512_max_##suffix((__m512i)(a), (__m512i)(b))
#define HFR_INT_MIN(type, suffix, a, b) (vu) _mm512_min_##suffix((__m512i)(a), (__m512i)(b))
#define HFR_HAVE_INT64_EXTREME
#define HFR_INT64_MAX HFR_INT_MAX
#define HFR_INT64_MIN HFR_INT_MIN

#define HFR_HAVE_HALF
HFR_INLINE vu load_half(const unsigned char *p) { return (vu)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
HFR_INLINE void store_half(unsigned char *p, vu a) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT));
}
HFR_INLINE vu half_low(vu x) { return (vu)_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)x)); }
HFR_INLINE vu half_high(vu x) { return (vu)_mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)x, 1)); }
/* The low 16 bits of the lanes of a, then of b. The instruction interleaves by 128 bits; the permutation undoes that. */
HFR_INLINE vu pack_words(vu a, vu b) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return (vu)_mm512_permutexvar_epi64(order, _mm512_packus_epi32((__m512i)a, (__m512i)b));
}

#define HFR_HAVE_PARTIAL
HFR_INLINE vu load_partial(const void *p, size_t n) { return (vu)_mm512_maskz_loadu_epi8(~0ull >> (64 - n), p); }
HFR_INLINE void store_partial(void *p, vu v, size_t n) { _mm512_mask_storeu_epi8(p, ~0ull >> (64 - n), (__m512i)v); }

#define HFR_HAVE_STREAM
HFR_INLINE void stream_block(unsigned char *dst, const unsigned char *src) {
  _mm512_stream_si512((void *)dst, _mm512_loadu_si512(src));
}

#include "kernels.inc"
#else
typedef int hfr_simd_no_avx512; /* a translation unit may not be empty */
#endif
