/* Reductions and conversions on host memory: one loop body, instantiated for scalar, AVX2, AVX-512 and NEON; the level is chosen
   at first use (CPU, capped by HFREDUCE_SIMD). All functions are thread-safe, allocate nothing and give the same bits at every
   level. Any alignment of any pointer (also not a multiple of the element size). */
#ifndef HFR_SIMD_SIMD_H_
#define HFR_SIMD_SIMD_H_
#include "../call/dtype.h"

enum hfr_op { HFR_OP_SUM, HFR_OP_PROD, HFR_OP_MAX, HFR_OP_MIN }; /* equal to hfreduceSum .. hfreduceMin */

/* Scaling inside a reduction. The result of an element is
     acc = src[0] op ... op src[npre-1];  if (npre) acc *= pre;  acc = acc op src[npre] op ... ;  if (div > 1) acc /= div;  round
   once. pre is used for floating types only. div divides: floats by IEEE division in the accumulation type (float32 for fp16,
   bf16, fp8; else the type itself), integers truncating toward zero. Zero-initialise for no scaling. */
struct hfr_scale {
  int npre;
  double pre;
  uint64_t div;
};

/* dst[i] = reduction over src[0..nsrc-1], in that order, for i < count. nsrc >= 1. fp16, bf16, fp8 accumulate in float32 and
   round once (nearest even; fp8 e4m3 overflow is NaN, e5m2 overflow is infinity, as ml_dtypes and torch do). Integer sums and
   products wrap. max/min propagate NaN (of floats; any NaN in gives NaN out). dst may equal any src[j]; otherwise no overlap.
   scale may be NULL. */
void hfr_reduce(void *dst, const void *const *src, int nsrc, size_t count, hfreduceDataType_t dtype, enum hfr_op op,
                const struct hfr_scale *scale);

/* dst[i] = src[i] * *scalar. scalar is of the type that call/dtype.h says; small floats multiply in float32 and
 * round once. dst may equal src. */
void hfr_premul(void *dst, const void *src, size_t count, hfreduceDataType_t dtype, const void *scalar);

/* Convert between floating datatypes (fp8, fp16, bf16, fp32, fp64), rounding to nearest even. No overlap. InvalidArgument (no
 * message) for integers. */
hfreduceResult_t hfr_convert(void *dst, hfreduceDataType_t dst_dtype, const void *src, hfreduceDataType_t src_dtype,
                             size_t count);

/* memcpy whose stores go past the caches to memory: they need not ask who holds the lines. As memcpy where the level has no such
   stores (hfr_can_stream 0). Stores that follow are seen after it. */
void hfr_stream_copy(void *dst, const void *src, size_t bytes);
int hfr_can_stream(void);

/* "avx512", ... : the level in use; and why a higher one is not ("" if it is the highest built). */
const char *hfr_simd_level(void);
const char *hfr_simd_reason(void);
#endif
