/* The NEON level: portable vectors of 16 bytes are NEON on aarch64; only fp16 has better instructions. */
#if defined(__aarch64__)
#include <arm_neon.h>
#define HFR_VB 16
#define HFR_LEVEL neon
#include "vector.inc"

#define HFR_HAVE_HALF
HFR_INLINE vu load_half(const unsigned char *p) {
  uint8x8_t x = vld1_u8(p);
  return (vu)vcvt_f32_f16(vreinterpret_f16_u8(x));
}
HFR_INLINE void store_half(unsigned char *p, vu a) { vst1_u8(p, vreinterpret_u8_f16(vcvt_f16_f32((float32x4_t)a))); }
HFR_INLINE vu half_low(vu x) { return (vu)vcvt_f32_f16(vget_low_f16((float16x8_t)x)); }
HFR_INLINE vu half_high(vu x) { return (vu)vcvt_high_f32_f16((float16x8_t)x); }
/* The low 16 bits of the lanes of a, then of b. */
HFR_INLINE vu pack_words(vu a, vu b) { return (vu)vuzp1q_u16((uint16x8_t)a, (uint16x8_t)b); }

#include "kernels.inc"
#else
typedef int hfr_simd_no_neon; /* a translation unit may not be empty */
#endif
