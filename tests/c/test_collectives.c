/* Every collective in C, over shared memory and between nodes, as processes of one or several nodes and as threads. Values are
 * checked against closed forms. Arguments: --quick, then the layouts to run. */
#include "check.h"
#include "ranks.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The value that rank r has at position i: small, so that float32 sums are exact. */
static int64_t value(int r, size_t i) { return (int64_t)((i * 7 + (size_t)r * 13) % 31) - 9; }
static int64_t sum_at(int n, size_t i) {
  int64_t s = 0;
  for (int r = 0; r < n; r++) s += value(r, i);
  return s;
}

static int wrong;
static void expect(int rank, const char *what, size_t count, size_t i, double got, double want) {
  if (got == want) return;
  if (wrong++ < 5) fprintf(stderr, "rank %d: %s of %zu: element %zu is %g, expected %g\n", rank, what, count, i, got, want);
}

/* Called with misaligned buffers too: the stores below would be the test's fault, not the library's. */
__attribute__((no_sanitize("alignment"))) static int one_size(int rank, int n, hfreduceComm_t comm, size_t count, float *a,
                                                              float *b) {
  size_t nn = (size_t)n, me = (size_t)rank;
  int root = (int)(count % nn);
  /* all_reduce, out of place, then in place */
  for (size_t i = 0; i < count; i++) a[i] = (float)value(rank, i);
  memset(b, 0xff, count * nn * sizeof *b);
  OK(hfreduceAllReduce(a, b, count, hfreduceFloat32, hfreduceSum, comm, NULL));
  for (size_t i = 0; i < count; i++) expect(rank, "all_reduce", count, i, b[i], (double)sum_at(n, i));
  OK(hfreduceAllReduce(a, a, count, hfreduceFloat32, hfreduceSum, comm, NULL));
  for (size_t i = 0; i < count; i++) expect(rank, "all_reduce in place", count, i, a[i], (double)sum_at(n, i));
  /* reduce */
  for (size_t i = 0; i < count; i++) a[i] = (float)value(rank, i);
  memset(b, 0xff, count * nn * sizeof *b);
  OK(hfreduceReduce(a, rank == root ? b : NULL, count, hfreduceFloat32, hfreduceSum, root, comm, NULL));
  for (size_t i = 0; rank == root && i < count; i++) expect(rank, "reduce", count, i, b[i], (double)sum_at(n, i));
  /* broadcast */
  for (size_t i = 0; i < count; i++) a[i] = (float)value(rank, i);
  OK(hfreduceBcast(a, count, hfreduceFloat32, root, comm, NULL));
  for (size_t i = 0; i < count; i++) expect(rank, "broadcast", count, i, a[i], (double)value(root, i));
  OK(hfreduceBroadcast(rank == root ? a : NULL, b, count, hfreduceFloat32, root, comm, NULL));
  for (size_t i = 0; i < count; i++) expect(rank, "broadcast out of place", count, i, b[i], (double)value(root, i));
  /* all_gather, out of place and in place */
  for (size_t i = 0; i < count; i++) a[i] = (float)value(rank, i);
  OK(hfreduceAllGather(a, b, count, hfreduceFloat32, comm, NULL));
  for (size_t i = 0; i < count * nn; i++) expect(rank, "all_gather", count, i, b[i], (double)value((int)(i / count), i % count));
  memset(b, 0xff, count * nn * sizeof *b);
  memcpy(b + me * count, a, count * sizeof *b);
  OK(hfreduceAllGather(b + me * count, b, count, hfreduceFloat32, comm, NULL));
  for (size_t i = 0; i < count * nn; i++)
    expect(rank, "all_gather in place", count, i, b[i], (double)value((int)(i / count), i % count));
  /* reduce_scatter, out of place and in place */
  for (size_t i = 0; i < count * nn; i++) b[i] = (float)value(rank, i);
  OK(hfreduceReduceScatter(b, a, count, hfreduceFloat32, hfreduceSum, comm, NULL));
  for (size_t i = 0; i < count; i++) expect(rank, "reduce_scatter", count, i, a[i], (double)sum_at(n, me * count + i));
  OK(hfreduceReduceScatter(b, b + me * count, count, hfreduceFloat32, hfreduceSum, comm, NULL));
  for (size_t i = 0; i < count; i++)
    expect(rank, "reduce_scatter in place", count, i, b[me * count + i], (double)sum_at(n, me * count + i));
  /* all_to_all, in place and out of place */
  float *c = malloc(count * nn * sizeof *c + 1);
  for (size_t i = 0; i < count * nn; i++) b[i] = c[i] = (float)value(rank, i);
  OK(hfreduceAlltoAll(b, b, count, hfreduceFloat32, comm, NULL));
  for (size_t i = 0; i < count * nn; i++)
    expect(rank, "all_to_all in place", count, i, b[i], (double)value((int)(i / count), me * count + i % count));
  OK(hfreduceAlltoAll(c, b, count, hfreduceFloat32, comm, NULL));
  for (size_t i = 0; i < count * nn; i++)
    expect(rank, "all_to_all", count, i, b[i], (double)value((int)(i / count), me * count + i % count));
  free(c);
  /* gather, scatter */
  for (size_t i = 0; i < count; i++) a[i] = (float)value(rank, i);
  OK(hfreduceGather(a, rank == root ? b : NULL, count, hfreduceFloat32, root, comm, NULL));
  for (size_t i = 0; rank == root && i < count * nn; i++)
    expect(rank, "gather", count, i, b[i], (double)value((int)(i / count), i % count));
  for (size_t i = 0; i < count * nn; i++) b[i] = (float)value(rank, i);
  OK(hfreduceScatter(rank == root ? b : NULL, a, count, hfreduceFloat32, root, comm, NULL));
  for (size_t i = 0; i < count; i++) expect(rank, "scatter", count, i, a[i], (double)value(root, me * count + i));
  /* a ring of sends and receives in one group; asynchronous all_reduces behind it */
  for (size_t i = 0; i < count; i++) a[i] = (float)value(rank, i);
  OK(hfreduceGroupStart());
  OK(hfreduceSend(a, count, hfreduceFloat32, (rank + 1) % n, comm, NULL));
  OK(hfreduceRecv(b, count, hfreduceFloat32, (rank + n - 1) % n, comm, NULL));
  OK(hfreduceGroupEnd());
  for (size_t i = 0; i < count; i++) expect(rank, "send/recv", count, i, b[i], (double)value((rank + n - 1) % n, i));
  hfreduceWork_t work[3];
  for (int w = 0; w < 3; w++) {
    OK(hfreduceGroupStart());
    OK(hfreduceAllReduce(a, b + (size_t)(w % n) * count, count, hfreduceFloat32, w == 1 ? hfreduceMax : hfreduceSum, comm, NULL));
    OK(hfreduceGroupEndAsync(&work[w]));
  }
  for (int w = 0; w < 3; w++) {
    OK(hfreduceWorkWait(work[w], -1));
    OK(hfreduceWorkDestroy(work[w]));
  }
  for (size_t i = 0; i < count; i++)
    expect(rank, "async all_reduce", count, i, b[(size_t)(2 % n) * count + i], (double)sum_at(n, i));
  OK(hfreduceBarrier(comm, NULL));
  return 0;
}

static int conform(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const size_t sizes[] = {0, 1, 3, 17, 1000, 4096, 16385, 100003, 700001};
  hfreduceComm_t comm, half;
  size_t largest = *(size_t *)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  float *a = malloc(largest * (size_t)n * sizeof *a + 64), *b = malloc(largest * (size_t)n * sizeof *b + 64);
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
    if (sizes[s] <= largest && one_size(rank, n, comm, sizes[s], a, b)) return 1;
  if (one_size(rank, n, comm, 1001, (float *)((char *)a + 1), (float *)((char *)b + 3))) return 1; /* misaligned */
  OK(hfreduceCommSplit(comm, rank % 2, -rank, &half, NULL));
  int members, mine;
  OK(hfreduceCommCount(half, &members));
  OK(hfreduceCommUserRank(half, &mine));
  int32_t x = rank, y = 0, want = 0;
  for (int r = rank % 2; r < n; r += 2) want += r;
  OK(hfreduceAllReduce(&x, &y, 1, hfreduceInt32, hfreduceSum, half, NULL));
  expect(rank, "split", 1, 0, y, want);
  OK(hfreduceCommDestroy(half));
  OK(hfreduceCommDestroy(comm));
  free(a);
  free(b);
  return wrong;
}

int main(int argc, char **argv) {
  static const char *const preset[] = {"1",   "2",   "3",     "5",         "1,1",       "1,1,1",
                                       "2,2", "1,2", "3,1,2", "1,1,1,1,1", "0.1.0.2.1", "2,2,2,2"};
  size_t largest = 700001;
  int quick = argc > 1 && !strcmp(argv[1], "--quick");
  if (quick) largest = 17000;
  for (int i = 1 + quick; i < argc; i++) CHECK(run_processes(argv[i], conform, &largest, 120) == 0, "nodes %s", argv[i]);
  if (argc > 1 + quick) return check_done();
  for (size_t i = 0; i < sizeof preset / sizeof *preset; i++)
    CHECK(run_processes(preset[i], conform, &largest, 120) == 0, "nodes %s", preset[i]);
  for (int n = 1; n <= 4; n++) CHECK(run_threads(n, conform, &largest, 120) == 0, "%d threads", n);
  return check_done();
}
