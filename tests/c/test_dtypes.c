/* Every datatype under every op, and moved, on nodes of one and of several ranks. Values are small integers that each datatype
 * holds exactly, partial results included. Arguments: the layouts to run. */
#include "check.h"
#include "ranks.h"

#include "simd/simd.h"

#include <stdlib.h>
#include <string.h>

#define PREMUL ((int)hfreduceNumOps) /* times two, then the sum */
static const size_t counts[] = {3, 1001, 20011};
#define LARGEST 20011

/* At most 8 ranks: sums stay at 16 or below, and even above 8, which two bits of mantissa hold. */
static int input(int op, int rank, int n, size_t i) {
  switch (op) {
    case hfreduceProd: return (i + (size_t)rank) % 5 == 0 ? 2 : 1;
    case hfreduceAvg: return (size_t)rank == i % (size_t)n ? n * (1 + (int)(i % 2)) : 0;
    case hfreduceMax:
    case hfreduceMin: return (int)((i * 3 + (size_t)rank * 5) % 7);
    default: return (i * 7 + (size_t)rank * 3) % 4 != 0;
  }
}

static int output(int op, int n, size_t i) {
  int acc = input(op, 0, n, i);
  for (int r = 1; r < n; r++) {
    int x = input(op, r, n, i);
    acc = op == hfreduceProd  ? acc * x
          : op == hfreduceMax ? (x > acc ? x : acc)
          : op == hfreduceMin ? (x < acc ? x : acc)
                              : acc + x;
  }
  return op == hfreduceAvg ? acc / n : op == PREMUL ? 2 * acc : acc;
}

static void put(void *at, hfreduceDataType_t dtype, size_t i, int value) {
  char *p = (char *)at + i * hfr_dtype_size(dtype);
  int64_t whole = value;
  float real = (float)value;
  if (hfr_convert(p, dtype, &real, hfreduceFloat32, 1)) memcpy(p, &whole, hfr_dtype_size(dtype)); /* little-endian */
}

struct expected {
  char bytes[17][8]; /* of the numbers from 0 to 16 */
  size_t size;
};

static int equal(const struct expected *e, const void *at, int rank, const char *what, size_t count, int op, int n,
                 size_t first) {
  for (size_t i = 0; i < count; i++) {
    int want = output(op, n, first + i);
    if (!memcmp((const char *)at + i * e->size, e->bytes[want], e->size)) continue;
    fprintf(stderr, "rank %d: %s op %d of %zu: element %zu is not %d\n", rank, what, op, count, i, want);
    return 0;
  }
  return 1;
}

static int reductions(int rank, int n, hfreduceComm_t comm, hfreduceDataType_t dtype, int op, size_t count, char *a, char *b) {
  struct expected e = {.size = hfr_dtype_size(dtype)};
  char factor[8];
  hfreduceDataType_t factor_type = dtype == hfreduceFloat8e4m3 || dtype == hfreduceFloat8e5m2 ? hfreduceFloat32 : dtype;
  hfreduceRedOp_t used = (hfreduceRedOp_t)op;
  int root = (int)(count % (size_t)n), wrong = 0;
  const char *name = hfr_dtype_name(dtype);
  for (int v = 0; v <= 16; v++) put(e.bytes[v], dtype, 0, v);
  put(factor, factor_type, 0, 2);
  if (op == PREMUL) OK(hfreduceRedOpCreatePreMulSum(&used, factor, dtype, hfreduceScalarHostImmediate, comm));
  for (size_t i = 0; i < count; i++) put(a, dtype, i, input(op, rank, n, i));
  memset(b, 0x5a, count * e.size);
  OK(hfreduceAllReduce(a, b, count, dtype, used, comm, NULL));
  wrong += !equal(&e, b, rank, name, count, op, n, 0);
  memset(b, 0x5a, count * e.size);
  OK(hfreduceReduce(a, b, count, dtype, used, root, comm, NULL));
  if (rank == root) wrong += !equal(&e, b, rank, name, count, op, n, 0);
  size_t part = count / (size_t)n;
  OK(hfreduceReduceScatter(a, b, part, dtype, used, comm, NULL));
  wrong += !equal(&e, b, rank, name, part, op, n, part * (size_t)rank);
  if (op == hfreduceSum) { /* once: what only moves */
    OK(hfreduceAllGather(a, b, part, dtype, comm, NULL));
    for (int r = 0; r < n; r++)
      for (size_t i = 0; i < part; i++)
        wrong += memcmp(b + ((size_t)r * part + i) * e.size, e.bytes[input(op, r, n, i)], e.size) != 0;
    OK(hfreduceBcast(a, count, dtype, root, comm, NULL));
    for (size_t i = 0; i < count; i++) wrong += memcmp(a + i * e.size, e.bytes[input(op, root, n, i)], e.size) != 0;
  }
  if (op == PREMUL) OK(hfreduceRedOpDestroy(used, comm));
  return wrong;
}

static int all_dtypes(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  char *a = malloc(LARGEST * 8), *b = malloc(LARGEST * 8);
  int wrong = 0;
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  for (int dtype = 0; dtype < hfreduceNumTypes; dtype++)
    for (int op = 0; op <= PREMUL; op++)
      for (size_t k = 0; k < sizeof counts / sizeof *counts; k++)
        wrong += reductions(rank, n, comm, (hfreduceDataType_t)dtype, op, counts[k], a, b);
  OK(hfreduceCommDestroy(comm));
  free(a);
  free(b);
  return wrong;
}

/* The average of one number that every rank has, of which even two exceed what the datatype can hold. Powers of two, so that no
 * step rounds. */
static int wide_averages(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const struct {
    hfreduceDataType_t dtype;
    int value;
  } cases[] = {{hfreduceFloat16, 32768}, {hfreduceFloat8e4m3, 256}, {hfreduceFloat8e5m2, 32768}};
  enum { COUNT = 2048 };
  hfreduceComm_t comm;
  char *a = malloc(COUNT * 2), *b = malloc(COUNT * 2);
  int wrong = 0;
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
    hfreduceDataType_t dtype = cases[k].dtype;
    size_t bytes = COUNT * hfr_dtype_size(dtype);
    for (size_t i = 0; i < COUNT; i++) put(a, dtype, i, cases[k].value);
    memset(b, 0, bytes);
    OK(hfreduceAllReduce(a, b, COUNT, dtype, hfreduceAvg, comm, NULL));
    wrong += memcmp(a, b, bytes) != 0;
    memset(b, 0, bytes);
    OK(hfreduceReduce(a, b, COUNT, dtype, hfreduceAvg, 1, comm, NULL));
    wrong += rank == 1 && memcmp(a, b, bytes) != 0;
    memset(b, 0, bytes);
    OK(hfreduceReduceScatter(a, b, COUNT / (size_t)n, dtype, hfreduceAvg, comm, NULL));
    wrong += memcmp(a, b, bytes / (size_t)n) != 0;
    if (wrong) fprintf(stderr, "rank %d: averages of %s are not %d\n", rank, hfr_dtype_name(dtype), cases[k].value);
  }
  OK(hfreduceCommDestroy(comm));
  free(a);
  free(b);
  return wrong;
}

int main(int argc, char **argv) {
  static const char *const powers[] = {"2", "1,1", "2,2"};
  static char *preset[] = {"3", "1,1", "2,1", "1,1,1,1,1", "2,2,2,2"};
  char **layouts = argc > 1 ? argv + 1 : preset;
  size_t n = argc > 1 ? (size_t)argc - 1 : sizeof preset / sizeof *preset;
  for (size_t i = 0; i < n; i++) CHECK(run_processes(layouts[i], all_dtypes, NULL, 120) == 0, "nodes %s", layouts[i]);
  for (size_t i = 0; i < sizeof powers / sizeof *powers; i++)
    CHECK(run_processes(powers[i], wide_averages, NULL, 60) == 0, "averages, nodes %s", powers[i]);
  return check_done();
}
