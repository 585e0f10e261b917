/*
 * The kernels for pairs of GPUs, compiled for the host (fake/kernels.cpp, a shared library whose path is the argument), against
 * simd/: bit by bit, for every datatype and operation, at any alignment and length, in place and not, as grids of several sizes.
 */
#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "simd/simd.h"

typedef void kernel_function(void *dst, const void *first, const void *second, unsigned long long count, float scale);
static void (*run)(kernel_function *kernel, unsigned blocks, unsigned threads, void *dst, const void *first, const void *second,
                   unsigned long long count, float scale);

enum { MOST = 3000, ROOM = 64 };
static const char *const op_name[] = {"sum", "prod", "max", "min"};

static uint64_t state = 88172645463325252ull;
static uint64_t random_bits(void) {
  state ^= state << 13, state ^= state >> 7;
  return state ^= state << 17;
}

static int is_nan(const uint8_t *p, hfreduceDataType_t type) {
  double wide = 0;
  if (type == hfreduceFloat64) return memcpy(&wide, p, 8), isnan(wide);
  if (type == hfreduceFloat32) {
    float f;
    return memcpy(&f, p, 4), isnan(f);
  }
  return hfr_convert(&wide, hfreduceFloat64, p, type, 1) == hfreduceSuccess && isnan(wide);
}

/* Any bits, and next to each other such as give ties, overflow and subnormal results: small changes of a few values. */
static void fill(uint8_t *p, size_t count, size_t size) {
  static const uint64_t top[] = {0, 0x3f, 0x7f, 0x80, 0x3c, 0x7c, 0x01, 0xff};
  for (size_t i = 0; i < count; i++) {
    uint64_t bits = random_bits();
    if (i % 3 == 0) bits = top[bits % 8] << (8 * size - 8) | (bits >> 32 & 0x0707070707070707ull);
    memcpy(p + i * size, &bits, size);
  }
}

/* Elements that differ, but for NaN in both: which one an addition hands on is a compiler's choice. */
static size_t differ(const uint8_t *a, const uint8_t *b, size_t count, hfreduceDataType_t type) {
  size_t size = hfr_dtype_size(type), n = 0;
  for (size_t i = 0; i < count; i++)
    n += memcmp(a + i * size, b + i * size, size) && !(is_nan(a + i * size, type) && is_nan(b + i * size, type));
  return n;
}

static void one_case(kernel_function *kernel, hfreduceDataType_t type, int op, size_t count, const size_t at[3], int in_place,
                     unsigned blocks, int parts) {
  static uint8_t first[MOST * 8 + ROOM], second[sizeof first], out[sizeof first], want[sizeof first];
  size_t size = hfr_dtype_size(type);
  uint8_t *a = first + at[0], *b = second + at[1], *dst = in_place ? a : out + at[2];
  fill(a, count, size);
  fill(b, count, size);
  struct hfr_scale scale = {.npre = 2, .pre = 1.0f / (float)parts};
  hfr_reduce(want, (const void *[]){a, b}, 2, count, type, (enum hfr_op)op, parts > 1 ? &scale : NULL);
  memset(out, 0xee, sizeof out);
  uint8_t before = dst == a ? 0 : dst[-1], behind = dst[count * size];
  run(kernel, blocks, 64, dst, a, b, count, 1.0f / (float)parts);
  size_t n = differ(dst, want, count, type);
  CHECK(!n, "%s %s of %zu at %zu, %zu, %zu%s, %u blocks, of %d: %zu elements differ", hfr_dtype_name(type), op_name[op], count,
        at[0], at[1], at[2], in_place ? ", in place" : "", blocks, parts, n);
  CHECK(dst[count * size] == behind && (dst == a || dst[-1] == before), "%s %s of %zu writes outside", hfr_dtype_name(type),
        op_name[op], count);
}

/* An average's sums are scaled in the kernel. */
static int is_float(hfreduceDataType_t type) { return type >= hfreduceFloat16; }

static void every_case(kernel_function *kernel, hfreduceDataType_t type, int op) {
  static const size_t counts[] = {0, 1, 2, 15, 16, 17, 63, 255, 1000, MOST};
  static const size_t starts[][3] = {{16, 16, 16}, {16, 32, 48}, {24, 24, 24}, {17, 17, 17},
                                     {18, 20, 24}, {19, 16, 21}, {20, 36, 20}};
  for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
    for (size_t s = 0; s < sizeof starts / sizeof *starts; s++)
      for (int in_place = 0; in_place < 2; in_place++)
        for (int parts = 1; parts <= (op == 0 && is_float(type) ? 6 : 1); parts += 5)
          one_case(kernel, type, op, counts[c], starts[s], in_place, 1 + (unsigned)(c + s) % 3, parts);
}

/* All pairs of values of the datatypes that have 256. */
static void all_bytes(kernel_function *kernel, hfreduceDataType_t type, int op) {
  static uint8_t a[65536], b[65536], out[65536], want[65536];
  for (int i = 0; i < 65536; i++) a[i] = (uint8_t)i, b[i] = (uint8_t)(i >> 8);
  hfr_reduce(want, (const void *[]){a, b}, 2, 65536, type, (enum hfr_op)op, NULL);
  run(kernel, 2, 64, out, a, b, 65536, 1);
  size_t n = differ(out, want, 65536, type);
  CHECK(!n, "%s %s: %zu of all pairs differ", hfr_dtype_name(type), op_name[op], n);
}

int main(int argc, char **argv) {
  void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : NULL;
  if (!library) return printf("no kernels: %s\n", argc > 1 ? dlerror() : "give the path of their library"), 77;
  *(void **)&run = dlsym(library, "run_on_host");
  CHECK(run != NULL);
  for (int type = 0; type < hfreduceNumTypes; type++)
    for (int op = 0; op < 4; op++) {
      char name[64];
      kernel_function *kernel;
      snprintf(name, sizeof name, "hfr_pair_%s_%s", hfr_dtype_name((hfreduceDataType_t)type), op_name[op]);
      *(void **)&kernel = dlsym(library, name);
      CHECK(kernel != NULL, "there is no %s", name);
      if (!kernel) continue;
      every_case(kernel, (hfreduceDataType_t)type, op);
      if (hfr_dtype_size((hfreduceDataType_t)type) == 1) all_bytes(kernel, (hfreduceDataType_t)type, op);
    }
  return check_done();
}
