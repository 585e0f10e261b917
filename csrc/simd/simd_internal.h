/* Between simd.c and the instances of kernels.inc: what a level provides. Nothing outside simd/ and its tests includes this. */
#ifndef HFR_SIMD_SIMD_INTERNAL_H_
#define HFR_SIMD_SIMD_INTERNAL_H_
#include "simd.h"

enum hfr_simd_post { HFR_POST_NONE, HFR_POST_MUL, HFR_POST_DIV };

/* struct hfr_scale made ready for vectors: constants are bit patterns of the accumulation type, repeated to fill 64 bits. */
struct hfr_simd_scale {
  int npre; /* multiply by pre before source npre; 0: never */
  uint64_t pre;
  enum hfr_simd_post post; /* floats only: integers are divided by simd.c */
  uint64_t post_value;
};

/* dst = reduction of src[0..nsrc-1] over `bytes` bytes of storage. */
typedef void hfr_simd_reduce(unsigned char *dst, const unsigned char *const *src, int nsrc, size_t bytes,
                             const struct hfr_simd_scale *scale);

struct hfr_simd_kernels {
  const char *name;
  hfr_simd_reduce *reduce[hfreduceNumTypes][4]; /* by datatype and enum hfr_op */
  /* count elements of fp16, bf16 or fp8 to float32 and back; no overlap. */
  void (*widen)(float *dst, const unsigned char *src, size_t count, hfreduceDataType_t src_dtype);
  void (*narrow)(unsigned char *dst, const float *src, size_t count, hfreduceDataType_t dst_dtype);
  /* Copy blocks of 64 bytes to dst, which is aligned to 64, past the caches; whole before any later store. NULL: it cannot. */
  void (*stream)(unsigned char *dst, const unsigned char *src, size_t blocks);
};

extern const struct hfr_simd_kernels hfr_simd_kernels_scalar;
#if defined(__x86_64__)
extern const struct hfr_simd_kernels hfr_simd_kernels_avx2;
extern const struct hfr_simd_kernels hfr_simd_kernels_avx512;
#elif defined(__aarch64__)
extern const struct hfr_simd_kernels hfr_simd_kernels_neon;
#endif

/* Tests and benchmarks: use this level ("scalar", ...; NULL: as at first use). 0 if it is not built or this CPU lacks it. Not to
   be called beside a running reduction. */
int hfr_simd_select(const char *level);
#endif
