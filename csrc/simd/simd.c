/* Chooses the SIMD level at first use and turns the public arguments into what the kernels want. */
#include "simd.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include "../base/log.h"
#include "../base/param.h"
#include "simd_internal.h"

/* ---- levels ---- */

#if defined(__x86_64__)
/* Asked by hand because clang's __builtin_cpu_supports does not know the name. */
static int cpu_has_f16c(void) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
static int cpu_has_avx2(void) { return __builtin_cpu_supports("avx2") && cpu_has_f16c(); }
static int cpu_has_avx512(void) {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
static int cpu_any(void) { return 1; }

/* Lowest first. */
static const struct level {
  const struct hfr_simd_kernels *kernels;
  int (*present)(void);
} levels[] = {
    {&hfr_simd_kernels_scalar, cpu_any},
#if defined(__x86_64__)
    {&hfr_simd_kernels_avx2, cpu_has_avx2},
    {&hfr_simd_kernels_avx512, cpu_has_avx512},
#elif defined(__aarch64__)
    {&hfr_simd_kernels_neon, cpu_any},
#endif
};
enum { NLEVELS = sizeof levels / sizeof levels[0] };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const struct hfr_simd_kernels *_Atomic current;
static char reason[128];

static int level_find(const char *name) {
  for (int i = 0; i < NLEVELS; i++)
    if (!strcmp(levels[i].kernels->name, name)) return i;
  return -1;
}

static void level_choose(void) {
  const char *wish = hfr_param_text(HFR_PARAM_SIMD);
  int top = *wish ? level_find(wish) : NLEVELS - 1;
  reason[0] = 0;
  if (top < 0) {
    snprintf(reason, sizeof reason, "HFREDUCE_SIMD=%.32s is not a level of this build", wish);
    HFR_WARN("%s; the best level is used", reason);
    top = NLEVELS - 1;
  } else if (top < NLEVELS - 1) {
    snprintf(reason, sizeof reason, "HFREDUCE_SIMD=%s", wish);
  }
  int i = top;
  while (!levels[i].present()) i--;
  if (i < top) snprintf(reason, sizeof reason, "this CPU lacks %s", levels[i + 1].kernels->name);
  /* Release: pairs with the acquire in kernels(), which may see the level without having gone through pthread_once. */
  atomic_store_explicit(&current, levels[i].kernels, memory_order_release);
}

static const struct hfr_simd_kernels *kernels(void) {
  const struct hfr_simd_kernels *k = atomic_load_explicit(&current, memory_order_acquire);
  if (__builtin_expect(!k, 0)) {
    pthread_once(&once, level_choose);
    k = atomic_load_explicit(&current, memory_order_acquire);
  }
  return k;
}

int hfr_simd_select(const char *level) {
  kernels();
  if (!level) {
    level_choose();
    return 1;
  }
  int i = level_find(level);
  if (i < 0 || !levels[i].present()) return 0;
  atomic_store_explicit(&current, levels[i].kernels, memory_order_release); /* pairs with kernels() */
  return 1;
}

const char *hfr_simd_level(void) { return kernels()->name; }
const char *hfr_simd_reason(void) {
  kernels();
  return reason;
}

/* ---- reductions ---- */

/* x in the accumulation type of dtype (floats only), filling 64 bits. */
static uint64_t float_pattern(double x, hfreduceDataType_t dtype) {
  uint64_t bits = 0;
  uint32_t low;
  float f = (float)x;
  if (dtype == hfreduceFloat64) {
    memcpy(&bits, &x, sizeof bits);
    return bits;
  }
  memcpy(&low, &f, sizeof low);
  return (uint64_t)low << 32 | low;
}

/* Multiplying by the reciprocal of a power of two rounds exactly as dividing does, and is several times faster. */
static void scale_prepare(struct hfr_simd_scale *out, const struct hfr_scale *scale, int nsrc, hfreduceDataType_t dtype) {
  memset(out, 0, sizeof *out);
  if (!hfr_dtype_is_float(dtype)) return;
  if (scale->npre > 0) {
    out->npre = scale->npre < nsrc ? scale->npre : nsrc;
    out->pre = float_pattern(scale->pre, dtype);
  }
  if (scale->div > 1) {
    int power = !(scale->div & (scale->div - 1));
    out->post = power ? HFR_POST_MUL : HFR_POST_DIV;
    /* From the integer straight to float32: by way of double it would be rounded twice. */
    double divisor = dtype == hfreduceFloat64 ? (double)scale->div : (double)(float)scale->div;
    out->post_value = float_pattern(power ? 1.0 / divisor : divisor, dtype);
  }
}

/* x /= div toward zero, for any div: also beyond the range of the type. */
#define HFR_DIVIDE_UNSIGNED(type)           \
  for (size_t i = 0; i < count; i++) {      \
    type x;                                 \
    memcpy(&x, p + i * sizeof x, sizeof x); \
    x = (type)(x / div);                    \
    memcpy(p + i * sizeof x, &x, sizeof x); \
  }
#define HFR_DIVIDE_SIGNED(type)                                         \
  for (size_t i = 0; i < count; i++) {                                  \
    type x;                                                             \
    memcpy(&x, p + i * sizeof x, sizeof x);                             \
    uint64_t magnitude = (x < 0 ? 0 - (uint64_t)x : (uint64_t)x) / div; \
    x = (type)(x < 0 ? 0 - magnitude : magnitude);                      \
    memcpy(p + i * sizeof x, &x, sizeof x);                             \
  }
#define HFR_DIVIDE_Int HFR_DIVIDE_SIGNED
#define HFR_DIVIDE_Uint HFR_DIVIDE_UNSIGNED
#define HFR_DIVIDE_Float(type) /* the kernels have done it */
#define HFR_DIVIDE(suffix, name, storage, kind, ...) \
  case hfreduce##suffix: HFR_DIVIDE_##kind(storage) break;
static void divide_integers(unsigned char *p, size_t count, hfreduceDataType_t dtype, uint64_t div) {
  switch (dtype) {
    HFR_DTYPES(HFR_DIVIDE)
    default: break;
  }
}

void hfr_reduce(void *dst, const void *const *src, int nsrc, size_t count, hfreduceDataType_t dtype, enum hfr_op op,
                const struct hfr_scale *scale) {
  struct hfr_simd_scale ready, *vector_scale = NULL;
  const size_t bytes = count * hfr_dtype_size(dtype);
  if (scale && (scale->npre > 0 || scale->div > 1)) {
    scale_prepare(&ready, scale, nsrc, dtype);
    if (ready.npre || ready.post) vector_scale = &ready;
  }
  if (nsrc == 1 && !vector_scale) {
    if (bytes && dst != src[0]) memcpy(dst, src[0], bytes);
  } else {
    kernels()->reduce[dtype][op](dst, (const unsigned char *const *)src, nsrc, bytes, vector_scale);
  }
  if (scale && scale->div > 1 && !hfr_dtype_is_float(dtype)) divide_integers(dst, count, dtype, scale->div);
}

/* ---- premul and conversions ---- */

/* The integer *scalar repeated over 64 bits. */
static uint64_t integer_pattern(const void *scalar, size_t size) {
  uint64_t bits;
  for (size_t i = 0; i < sizeof bits; i += size) memcpy((char *)&bits + i, scalar, size);
  return bits;
}

void hfr_premul(void *dst, const void *src, size_t count, hfreduceDataType_t dtype, const void *scalar) {
  struct hfr_simd_scale scale = {.npre = 1};
  const struct hfr_dtype *d = hfr_dtype(dtype);
  if (d->small && d->factor == dtype) {
    float f;
    kernels()->widen(&f, scalar, 1, dtype);
    scale.pre = float_pattern(f, dtype);
  } else {
    scale.pre = integer_pattern(scalar, d->factor_size);
  }
  const unsigned char *const one[1] = {src};
  kernels()->reduce[dtype][HFR_OP_SUM](dst, one, 1, count * hfr_dtype_size(dtype), &scale);
}

int hfr_can_stream(void) { return kernels()->stream != NULL; }

void hfr_stream_copy(void *dst, const void *src, size_t bytes) {
  unsigned char *d = dst;
  const unsigned char *s = src;
  size_t head = -(uintptr_t)d % 64, blocks = bytes > head ? (bytes - head) / 64 : 0;
  if (!blocks || !kernels()->stream) {
    if (bytes) memcpy(d, s, bytes);
    return;
  }
  if (head) memcpy(d, s, head);
  kernels()->stream(d + head, s + head, blocks);
  size_t done = head + 64 * blocks;
  if (done < bytes) memcpy(d + done, s + done, bytes - done);
}

/* Round to odd: the last bit records that something was cut off, so that a second rounding, to 11 bits or fewer, is as good as a
 * single one. */
static float float_from_double_odd(double x) {
  float f = (float)x;
  uint32_t bits;
  if ((double)f == x || x != x) return f;
  memcpy(&bits, &f, sizeof bits);
  if (((double)f > x) == (x > 0)) bits--; /* back to the neighbour toward zero; from infinity to the largest finite */
  bits |= 1;
  memcpy(&f, &bits, sizeof f);
  return f;
}

static void load_floats(float *out, const unsigned char *src, size_t n, hfreduceDataType_t dtype, int odd) {
  if (dtype == hfreduceFloat32) {
    memcpy(out, src, n * sizeof *out);
  } else if (dtype == hfreduceFloat64) {
    for (size_t i = 0; i < n; i++) {
      double x;
      memcpy(&x, src + i * sizeof x, sizeof x);
      out[i] = odd ? float_from_double_odd(x) : (float)x;
    }
  } else {
    kernels()->widen(out, src, n, dtype);
  }
}

static void store_floats(unsigned char *dst, const float *in, size_t n, hfreduceDataType_t dtype) {
  if (dtype == hfreduceFloat32) {
    memcpy(dst, in, n * sizeof *in);
  } else if (dtype == hfreduceFloat64) {
    for (size_t i = 0; i < n; i++) {
      double x = in[i];
      memcpy(dst + i * sizeof x, &x, sizeof x);
    }
  } else {
    kernels()->narrow(dst, in, n, dtype);
  }
}

hfreduceResult_t hfr_convert(void *dst, hfreduceDataType_t dst_dtype, const void *src, hfreduceDataType_t src_dtype,
                             size_t count) {
  if (!hfr_dtype_is_float(dst_dtype) || !hfr_dtype_is_float(src_dtype)) return hfreduceInvalidArgument;
  const size_t in = hfr_dtype_size(src_dtype), out = hfr_dtype_size(dst_dtype);
  if (dst_dtype == src_dtype) {
    if (count) memcpy(dst, src, count * in);
    return hfreduceSuccess;
  }
  float tile[512];
  const size_t step = sizeof tile / sizeof tile[0];
  for (size_t i = 0; i < count; i += step) {
    const size_t n = count - i < step ? count - i : step;
    load_floats(tile, (const unsigned char *)src + i * in, n, src_dtype, dst_dtype != hfreduceFloat32);
    store_floats((unsigned char *)dst + i * out, tile, n, dst_dtype);
  }
  return hfreduceSuccess;
}
