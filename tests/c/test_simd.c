/* Every SIMD level against a reference that shares no code with it: values are decoded and rounded with ldexp and rint, in
 * double. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "node/writer.h"
#include "simd/simd.h"
#include "simd/simd_internal.h"

enum { MAX_SOURCES = 8, MAX_COUNT = 1501, GUARD = 64 };

static const char *const op_names[] = {"sum", "prod", "max", "min"};

/* ---- reference: formats ---- */

static const struct format {
  int size, exponent, mantissa;
} formats[hfreduceNumTypes] = {
    [hfreduceFloat16] = {2, 5, 10},  [hfreduceBfloat16] = {2, 8, 7},   [hfreduceFloat32] = {4, 8, 23},
    [hfreduceFloat64] = {8, 11, 52}, [hfreduceFloat8e4m3] = {1, 4, 3}, [hfreduceFloat8e5m2] = {1, 5, 2},
};
static int is_float(hfreduceDataType_t t) { return formats[t].size > 0; }

static uint64_t read_bits(const void *p, size_t size) {
  uint64_t v = 0;
  memcpy(&v, p, size); /* little endian, as every target is */
  return v;
}

static double value_of(uint64_t bits, hfreduceDataType_t t) {
  const struct format *f = &formats[t];
  const int bias = (1 << (f->exponent - 1)) - 1, top = (1 << f->exponent) - 1;
  const int e = (int)(bits >> f->mantissa) & top;
  const uint64_t m = bits & ((1ull << f->mantissa) - 1);
  double v;
  if (t == hfreduceFloat8e4m3 ? e == top && m == 7 : e == top && m)
    v = NAN;
  else if (e == top && t != hfreduceFloat8e4m3)
    v = INFINITY;
  else if (e == 0)
    v = ldexp((double)m, 1 - bias - f->mantissa);
  else
    v = ldexp((double)(m | 1ull << f->mantissa), e - bias - f->mantissa);
  return bits >> (f->exponent + f->mantissa) & 1 ? -v : v;
}

/* x as the datatype would hold it, rounded once. */
static double rounded(double x, hfreduceDataType_t t) {
  const struct format *f = &formats[t];
  const int bias = (1 << (f->exponent - 1)) - 1;
  if (t == hfreduceFloat64 || isnan(x) || x == 0) return x;
  const double largest = t == hfreduceFloat8e4m3 ? 448 : ldexp(2 - ldexp(1, -f->mantissa), bias);
  const double over = t == hfreduceFloat8e4m3 ? NAN : INFINITY;
  if (isinf(x)) return copysign(over, x);
  int e = ilogb(x);
  if (e < 1 - bias) e = 1 - bias;
  const double y = ldexp(rint(ldexp(x, f->mantissa - e)), e - f->mantissa);
  return fabs(y) > largest ? copysign(over, x) : y;
}

static int same(double a, double b) { return isnan(a) ? isnan(b) : a == b && signbit(a) == signbit(b); }

/* ---- reference: reduction of one element ---- */

static float apply_f32(float a, float b, enum hfr_op op) {
  if (op == HFR_OP_SUM) return a + b;
  if (op == HFR_OP_PROD) return a * b;
  if (isnan(a) || isnan(b)) return NAN;
  return (op == HFR_OP_MAX ? a > b : a < b) ? a : b;
}

static double apply_f64(double a, double b, enum hfr_op op) {
  if (op == HFR_OP_SUM) return a + b;
  if (op == HFR_OP_PROD) return a * b;
  if (isnan(a) || isnan(b)) return NAN;
  return (op == HFR_OP_MAX ? a > b : a < b) ? a : b;
}

static double expect_float(const uint64_t *v, int nsrc, hfreduceDataType_t t, enum hfr_op op, const struct hfr_scale *s) {
  volatile double d = value_of(v[0], t); /* volatile: no multiplication may be fused with the addition that follows */
  volatile float f = (float)d;
  for (int j = 1; j <= nsrc; j++) {
    if (j == s->npre) f = f * (float)s->pre, d = d * s->pre;
    if (j == nsrc) break;
    f = apply_f32(f, (float)value_of(v[j], t), op);
    d = apply_f64(d, value_of(v[j], t), op);
  }
  if (s->div > 1) f = f / (float)s->div, d = d / (double)s->div;
  return t == hfreduceFloat64 ? d : rounded(f, t);
}

static uint64_t expect_integer(const uint64_t *v, int nsrc, hfreduceDataType_t t, enum hfr_op op, uint64_t div) {
  const int is_signed = t == hfreduceInt8 || t == hfreduceInt32 || t == hfreduceInt64, unused = 64 - 8 * (int)hfr_dtype_size(t);
  /* Sign-extended, so that one comparison serves all widths. */
#define EXTEND(x) (is_signed ? (uint64_t)((int64_t)((x) << unused) >> unused) : (x) << unused >> unused)
#define GREATER(a, b) (is_signed ? (int64_t)(a) > (int64_t)(b) : (a) > (b))
  uint64_t a = EXTEND(v[0]);
  for (int j = 1; j < nsrc; j++) {
    const uint64_t b = EXTEND(v[j]);
    a = op == HFR_OP_SUM ? a + b : op == HFR_OP_PROD ? a * b : GREATER(a, b) == (op == HFR_OP_MAX) ? a : b;
    a = EXTEND(a);
  }
  if (div > 1) a = is_signed && (int64_t)a < 0 ? -(-a / div) : a / div;
  return a << unused >> unused;
}

/* ---- data ---- */

static uint64_t random_state = 88172645463325252ull;
static uint64_t random_bits(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

/* Half the elements near one, so that results differ in the last bit only; the rest any bits: NaN, infinities, subnormals, signed
 * zeros. */
static void fill(unsigned char *p, size_t count, hfreduceDataType_t t) {
  static const uint64_t special[] = {0, 1, 2, 3};
  const size_t size = hfr_dtype_size(t);
  for (size_t i = 0; i < count; i++) {
    uint64_t bits = random_bits(), kind = bits >> 61;
    const struct format *f = &formats[t];
    if (is_float(t) && kind < 4) {
      const uint64_t bias = (1u << (f->exponent - 1)) - 1, spread = random_bits() % 4;
      bits = (bits & ((1ull << f->mantissa) - 1)) | (bias - 2 + spread) << f->mantissa |
             (bits >> 40 & 1) << (f->exponent + f->mantissa);
    } else if (is_float(t) && kind == 4) { /* zeros, least subnormals, infinities and what follows them */
      const uint64_t top = random_bits() & 1 ? ((1ull << f->exponent) - 1) << f->mantissa : 0;
      bits = (top + special[bits & 3]) | (bits >> 40 & 1) << (f->exponent + f->mantissa);
    }
    memcpy(p + i * size, &bits, size);
  }
}

/* ---- the cases ---- */

static unsigned char sources[MAX_SOURCES][MAX_COUNT * 8 + 3 * GUARD], output[MAX_COUNT * 8 + 3 * GUARD];
static unsigned char scalar_output[sizeof output];

struct one_case {
  hfreduceDataType_t dtype;
  enum hfr_op op;
  int nsrc;
  size_t count;
  int skew;  /* bytes off alignment */
  int alias; /* source that is also the destination; -1: none */
  struct hfr_scale scale;
};

static void verify(const struct one_case *c, const unsigned char *result, unsigned char (*saved)[sizeof sources[0]],
                   const size_t *at) {
  const size_t size = hfr_dtype_size(c->dtype);
  for (size_t i = 0; i < c->count; i++) {
    uint64_t v[MAX_SOURCES];
    for (int j = 0; j < c->nsrc; j++) v[j] = read_bits(saved[j] + at[j] + i * size, size);
    const uint64_t got = read_bits(result + i * size, size);
#define WHERE "%s %s %s nsrc %d count %zu skew %d alias %d element %zu: got %llx"
#define WHERE_ARGS \
  hfr_simd_level(), hfr_dtype_name(c->dtype), op_names[c->op], c->nsrc, c->count, c->skew, c->alias, i, (unsigned long long)got
    if (is_float(c->dtype)) {
      const double want = expect_float(v, c->nsrc, c->dtype, c->op, &c->scale);
      CHECK(same(value_of(got, c->dtype), want), WHERE " want %a", WHERE_ARGS, want);
    } else {
      const uint64_t want = expect_integer(v, c->nsrc, c->dtype, c->op, c->scale.div);
      CHECK(got == want, WHERE " want %llx", WHERE_ARGS, (unsigned long long)want);
    }
  }
}

/* The first element of which two levels give different bits; count if none. Which of two NaN an addition hands on is the
   compiler's choice (it may swap the operands), so NaN is as good as NaN. */
static size_t first_difference(const unsigned char *a, const unsigned char *b, size_t count, hfreduceDataType_t t) {
  const size_t size = hfr_dtype_size(t);
  if (!memcmp(a, b, count * size)) return count;
  for (size_t i = 0; i < count; i++) {
    const uint64_t x = read_bits(a + i * size, size), y = read_bits(b + i * size, size);
    if (x != y && !(is_float(t) && isnan(value_of(x, t)) && isnan(value_of(y, t)))) return i;
  }
  return count;
}

/* Reduces at every level; the first is "scalar", and the others must give its bits. */
static void run_case(const struct one_case *c) {
  static unsigned char saved[MAX_SOURCES][sizeof sources[0]];
  const size_t size = hfr_dtype_size(c->dtype), bytes = c->count * size;
  size_t at[MAX_SOURCES];
  for (int j = 0; j < c->nsrc; j++) {
    at[j] = GUARD + (size_t)(c->skew ? (c->skew + 5 * j) % 32 : 0);
    fill(sources[j] + at[j], c->count, c->dtype);
  }
  memcpy(saved, sources, sizeof saved);
  for (const char *const *level = (const char *const[]){"scalar", "avx2", "avx512", "neon", NULL}; *level; level++) {
    if (!hfr_simd_select(*level)) continue;
    const void *src[MAX_SOURCES];
    for (int j = 0; j < c->nsrc; j++) src[j] = sources[j] + at[j];
    unsigned char *dst = c->alias >= 0 ? sources[c->alias] + at[c->alias] : output + GUARD + c->skew;
    unsigned char before[GUARD], after[GUARD];
    memcpy(before, dst - GUARD, GUARD);
    memcpy(after, dst + bytes, GUARD);
    hfr_reduce(dst, src, c->nsrc, c->count, c->dtype, c->op, &c->scale);
    CHECK(!memcmp(before, dst - GUARD, GUARD) && !memcmp(after, dst + bytes, GUARD), "%s %s wrote outside", *level,
          hfr_dtype_name(c->dtype));
    if (!strcmp(*level, "scalar")) {
      verify(c, dst, saved, at);
      memcpy(scalar_output, dst, bytes);
    } else {
      const size_t i = first_difference(scalar_output, dst, c->count, c->dtype);
      CHECK(i == c->count, "%s differs from scalar: %s %s nsrc %d count %zu at %zu: %llx, scalar %llx", *level,
            hfr_dtype_name(c->dtype), op_names[c->op], c->nsrc, c->count, i, (unsigned long long)read_bits(dst + i * size, size),
            (unsigned long long)read_bits(scalar_output + i * size, size));
    }
    memcpy(sources, saved, sizeof saved);
  }
}

static void test_reductions(void) {
  static const int nsrcs[] = {1, 2, 3, 5, 8};
  static const size_t counts[] = {0, 1, 7, 31, 64, 100, 1001, MAX_COUNT};
  static const struct hfr_scale scales[] = {{0},
                                            {.div = 4},
                                            {.div = 3},
                                            {.npre = 1, .pre = 0.37},
                                            {.npre = 2, .pre = -1.7, .div = 5},
                                            {.npre = 100, .pre = 1e-3, .div = 300}};
  for (int d = 0; d < hfreduceNumTypes; d++)
    for (int op = 0; op < 4; op++)
      for (size_t n = 0; n < sizeof nsrcs / sizeof *nsrcs; n++)
        for (size_t k = 0; k < sizeof counts / sizeof *counts; k++)
          for (size_t s = 0; s < sizeof scales / sizeof *scales; s++) {
            struct one_case c = {(hfreduceDataType_t)d, (enum hfr_op)op, nsrcs[n], counts[k], 0, -1, scales[s]};
            if (c.scale.npre > c.nsrc) c.scale.npre = c.nsrc;
            run_case(&c);
            c.skew = 1 + (int)((n + k + s) % 16);
            c.alias = (int)((k + s) % (size_t)c.nsrc);
            run_case(&c);
          }
}

static void test_premul(void) {
  for (int d = 0; d < hfreduceNumTypes; d++) {
    const hfreduceDataType_t t = (hfreduceDataType_t)d;
    const int fp8 = t == hfreduceFloat8e4m3 || t == hfreduceFloat8e5m2;
    const size_t size = hfr_dtype_size(t), count = 333;
    const float f32 = 1.7f;
    uint64_t scalar = 0xc5c5c5c5c5c5c5c5ull, factor_bits = 0;
    if (fp8)
      memcpy(&scalar, &f32, sizeof f32);
    else if (is_float(t))
      fill((unsigned char *)&scalar, 1, t);
    factor_bits = read_bits(&scalar, fp8 ? 4 : size);
    fill(sources[0], count, t);
    for (const char *const *level = (const char *const[]){"scalar", "avx2", "avx512", "neon", NULL}; *level; level++) {
      if (!hfr_simd_select(*level)) continue;
      hfr_premul(output, sources[0], count, t, &scalar);
      for (size_t i = 0; i < count; i++) {
        const uint64_t in = read_bits(sources[0] + i * size, size), got = read_bits(output + i * size, size);
        if (is_float(t)) {
          const double x = value_of(in, t), y = value_of(factor_bits, fp8 ? hfreduceFloat32 : t);
          const double want = t == hfreduceFloat64 ? x * y : rounded((float)x * (float)y, t);
          CHECK(same(value_of(got, t), want), "premul %s %s element %zu: got %llx want %a", *level, hfr_dtype_name(t), i,
                (unsigned long long)got, want);
        } else {
          const uint64_t want = in * factor_bits & (~0ull >> (64 - 8 * size));
          CHECK(got == want, "premul %s %s element %zu: got %llx want %llx", *level, hfr_dtype_name(t), i,
                (unsigned long long)got, (unsigned long long)want);
        }
      }
    }
  }
}

static void test_convert(void) {
  const size_t count = MAX_COUNT;
  for (int from = 0; from < hfreduceNumTypes; from++)
    for (int to = 0; to < hfreduceNumTypes; to++) {
      const hfreduceDataType_t a = (hfreduceDataType_t)from, b = (hfreduceDataType_t)to;
      if (!is_float(a) || !is_float(b)) {
        CHECK(hfr_convert(output, b, sources[0], a, 0) == hfreduceInvalidArgument);
        continue;
      }
      const size_t in = hfr_dtype_size(a), out = hfr_dtype_size(b);
      fill(sources[0], count, a);
      /* Just above the middle between two values: what is rounded twice comes out wrong. */
      if (a == hfreduceFloat64 && b != hfreduceFloat64)
        for (size_t i = 0; i < count; i += 3) {
          const double x = (1 + ldexp(1 + 2.0 * (double)(random_bits() % 4), -formats[b].mantissa - 1)) * (1 + ldexp(1, -45)) *
                           (i % 2 ? -1 : 1);
          memcpy(sources[0] + i * in, &x, sizeof x);
        }
      for (const char *const *level = (const char *const[]){"scalar", "avx2", "avx512", "neon", NULL}; *level; level++) {
        if (!hfr_simd_select(*level)) continue;
        CHECK(hfr_convert(output + 1, b, sources[0], a, count) == hfreduceSuccess);
        for (size_t i = 0; i < count; i++) {
          const double want = rounded(value_of(read_bits(sources[0] + i * in, in), a), b);
          const uint64_t got = read_bits(output + 1 + i * out, out);
          CHECK(same(value_of(got, b), want), "convert %s %s to %s element %zu: got %llx want %a", *level, hfr_dtype_name(a),
                hfr_dtype_name(b), i, (unsigned long long)got, want);
        }
      }
    }
}

/* Every length and both alignments around whole lines: the bytes, and nothing beside them. */
static void test_stream_copy(void) {
  enum { MOST = 700 };
  _Alignas(64) static unsigned char from[MOST + 2 * GUARD], to[MOST + 2 * GUARD];
  for (size_t i = 0; i < sizeof from; i++) from[i] = (unsigned char)random_bits();
  for (const char *const *level = (const char *const[]){"scalar", "avx2", "avx512", "neon", NULL}; *level; level++) {
    if (!hfr_simd_select(*level)) continue;
    for (size_t bytes = 0; bytes <= MOST; bytes += bytes < 200 ? 1 : 37)
      for (size_t shift = 0; shift < 66; shift += 13) {
        size_t back = shift * 5 % 64;
        memset(to, 0xa5, sizeof to);
        hfr_stream_copy(to + shift, from + back, bytes);
        int beside = 0;
        for (size_t i = 0; i < sizeof to; i++) beside += (i < shift || i >= shift + bytes) && to[i] != 0xa5;
        CHECK(!memcmp(to + shift, from + back, bytes) && !beside, "%s: %zu bytes from %zu to %zu", *level, bytes, back, shift);
      }
  }
  hfr_simd_select(NULL);
}

/* The way that costs less is taken, and the bytes arrive by both. */
static void test_writer(void) {
  enum { BYTES = 40000 };
  static unsigned char from[BYTES], to[BYTES];
  for (int dear = 0; dear < 2; dear++) {
    struct hfr_writer w = {.cost = {dear ? 1e9 : 1e-9, dear ? 1e-9 : 1e9}};
    for (int i = 0; i < 200; i++) {
      size_t bytes = i % 3 ? 1 + random_bits() % BYTES : BYTES;
      for (size_t j = 0; j < bytes; j += 97) from[j] = (unsigned char)random_bits();
      hfr_writer_copy(&w, to, from, bytes);
      CHECK(!memcmp(to, from, bytes));
      if (i == 1)
        CHECK(w.streams == (dear && hfr_can_stream()), "plain stores %s: streams %d", dear ? "dear" : "cheap", w.streams);
    }
    CHECK(!hfr_can_stream() || (w.cost[0] < 9e8 && w.cost[1] < 9e8), "both ways are timed again: %g %g", w.cost[0], w.cost[1]);
  }
}

/* What a way of copying costs from now on, so many times. Whether stores stream then. */
static int learn(struct hfr_writer *w, int streams, double cost, int times) {
  while (times--) hfr_writer_learn(w, streams, cost);
  return w->streams;
}

/* Costs that drift: the writer leaves either way when it has become the dear one, but not for one slow copy. */
static void test_writer_learns(void) {
  struct hfr_writer w = {0};
  CHECK(!learn(&w, 0, 100, 1), "one way alone is known");
  CHECK(!learn(&w, 1, 26, 1) && learn(&w, 1, 24, 3), "streaming must save three quarters: %g %g", w.cost[0], w.cost[1]);
  CHECK(learn(&w, 1, 1e6, 1) || w.cost[1] < 40, "one slow copy: %g", w.cost[1]);
  CHECK(!learn(&w, 1, 90, 60), "streaming has become dear, and is left: %g %g", w.cost[0], w.cost[1]);
  CHECK(w.cost[1] > 80, "a cost that stays is learnt: %g", w.cost[1]);
  CHECK(!learn(&w, 0, 300, 60) && learn(&w, 0, 500, 60), "so have plain stores: %g %g", w.cost[0], w.cost[1]);
  CHECK(learn(&w, 0, 380, 60), "they are still dear: %g %g", w.cost[0], w.cost[1]);
  CHECK(!learn(&w, 0, 50, 10), "the ranks have moved, and plain stores are cheap again: %g %g", w.cost[0], w.cost[1]);
}

/* Also while it streams does the writer look at plain stores now and then, and the other way round. */
static void test_writer_probes(void) {
  enum { BYTES = 16 << 10 };
  static unsigned char from[BYTES], to[BYTES];
  for (int streams = 0; streams < 2 && hfr_can_stream(); streams++) {
    struct hfr_writer w = {.streams = streams, .cost = {streams ? 1e9 : 1e-9, streams ? 1e-9 : 1e9}};
    int i = 0;
    while (i < 1000 && w.cost[!streams] == 1e9) hfr_writer_copy(&w, to, from, BYTES), i++;
    CHECK(i < 1000, "%s stores were never timed again", streams ? "plain" : "streaming");
    while (i < 5000 && w.streams == streams) { /* the way that is taken is dear from here on */
      w.cost[streams] = 1e9;
      hfr_writer_copy(&w, to, from, BYTES);
      i++;
    }
    CHECK(w.streams != streams, "the writer stays with %s stores", streams ? "streaming" : "plain");
  }
}

static void test_names(void) {
  CHECK(hfr_dtype_size(hfreduceFloat64) == 8 && hfr_dtype_size(hfreduceFloat8e5m2) == 1 && hfr_dtype_size(hfreduceNumTypes) == 0);
  CHECK(!strcmp(hfr_dtype_name(hfreduceBfloat16), "bfloat16") && !strcmp(hfr_dtype_name((hfreduceDataType_t)-1), "?"));
  CHECK(!hfr_simd_select("sse9"));
  CHECK(hfr_simd_select("scalar") && !strcmp(hfr_simd_level(), "scalar"));
  CHECK(hfr_simd_select(NULL));
  printf("level %s (%s)\n", hfr_simd_level(), *hfr_simd_reason() ? hfr_simd_reason() : "the highest built");
}

int main(void) {
  test_names();
  test_reductions();
  test_premul();
  test_convert();
  test_stream_copy();
  test_writer();
  test_writer_learns();
  test_writer_probes();
  return check_done();
}
