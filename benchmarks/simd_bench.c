/* Speed of the reductions on L2-resident buffers, beside memcpy in the same run: for each level and datatype, alternating,
   medians. GB/s counts every byte that is read or written: nsrc + 1 buffers for a reduction, 2 for memcpy. ratio is the one over
   the other. Usage: simd_bench [bytes of a buffer, default 196608: nine of them fit 2 MiB of L2] [level] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "simd/simd.h"
#include "simd/simd_internal.h"

enum { MAX_SOURCES = 8, ROUNDS = 31 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *v, int n) {
  qsort(v, (size_t)n, sizeof *v, by_value);
  return v[n / 2];
}

struct task {
  char *dst;
  const void *src[MAX_SOURCES];
  size_t bytes;
  hfreduceDataType_t dtype;
  enum hfr_op op;
};

/* Seconds a call; nsrc 0 is memcpy. */
static double timed(const struct task *t, int nsrc, int repeat) {
  size_t count = t->bytes / hfr_dtype_size(t->dtype);
  double start = now();
  for (int i = 0; i < repeat; i++) {
    if (!nsrc)
      memcpy(t->dst, t->src[0], t->bytes);
    else
      hfr_reduce(t->dst, t->src, nsrc, count, t->dtype, t->op, NULL);
    __asm__ volatile("" ::: "memory");
  }
  return (now() - start) / repeat;
}

static void report(const struct task *t, const char *what) {
  const int nsrcs[] = {0, 2, 4, 8};
  double seconds[4][ROUNDS];
  int repeat = (int)(8e6 / (double)t->bytes) + 1;
  for (int k = 0; k < 4; k++) timed(t, nsrcs[k], 2);
  for (int r = 0; r < ROUNDS; r++)
    for (int k = 0; k < 4; k++) seconds[k][r] = timed(t, nsrcs[k], repeat);
  double copy = 2 * (double)t->bytes / median(seconds[0], ROUNDS) / 1e9;
  printf("%-7s %-14s %-4s %8.1f", hfr_simd_level(), hfr_dtype_name(t->dtype), what, copy);
  for (int k = 1; k < 4; k++) {
    double rate = (nsrcs[k] + 1) * (double)t->bytes / median(seconds[k], ROUNDS) / 1e9;
    printf(" %8.1f %5.2f", rate, rate / copy);
  }
  putchar('\n');
}

int main(int argc, char **argv) {
  const char *levels[] = {"scalar", "avx2", "avx512", "neon"};
  struct task t = {.bytes = argc > 1 ? strtoul(argv[1], NULL, 0) : 196608};
  t.bytes = (t.bytes + 4095) & ~(size_t)4095;
  char *memory = aligned_alloc(4096, (MAX_SOURCES + 1) * t.bytes);
  if (!memory) return 1;
  /* Bytes 0x30 are small normal numbers in every floating type. */
  memset(memory, 0x30, (MAX_SOURCES + 1) * t.bytes);
  t.dst = memory;
  for (int j = 0; j < MAX_SOURCES; j++) t.src[j] = memory + (size_t)(j + 1) * t.bytes;
  printf("%-7s %-14s %-4s %8s %8s %5s %8s %5s %8s %5s   (%zu bytes a buffer)\n", "level", "dtype", "op", "memcpy", "2 src",
         "ratio", "4 src", "ratio", "8 src", "ratio", t.bytes);
  for (size_t l = 0; l < sizeof levels / sizeof *levels; l++) {
    if ((argc > 2 && strcmp(argv[2], levels[l])) || !hfr_simd_select(levels[l])) continue;
    for (int d = 0; d < hfreduceNumTypes; d++) {
      t.dtype = (hfreduceDataType_t)d;
      t.op = HFR_OP_SUM;
      report(&t, "sum");
    }
    t.dtype = hfreduceFloat32;
    t.op = HFR_OP_MAX;
    report(&t, "max");
  }
  free(memory);
  return 0;
}
