/*
 * Memory orders of what the ranks of a node share. The ranks are threads; under ThreadSanitizer they have one mapping of the
 * arena (node/mapping.h), so a slot, a ring or a fingerprint that is read without having been released, or written again before
 * its readers have let go, is a data race that it reports. Kernels are scalar: it sees no streaming stores.
 *
 * Ranks must meet nowhere but in the arena: a lock or an atomic of the test, or of a progress thread that serves both, would
 * order what the arena's own words are to order. So the calls block and the ranks count nothing in common; only at the end are
 * there works.
 */
#include "check.h"
#include "ranks.h"

#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#define MOST 6000 /* floats a rank: more chunks than slots */

struct buffers {
  float *a, *b; /* MOST, and MOST for each rank */
};

static void fill(float *x, size_t count, int rank) {
  for (size_t i = 0; i < count; i++) x[i] = (float)(rank + 1 + (int)(i % 5));
}
static int is_sum(const float *x, size_t count, int n) {
  for (size_t i = 0; i < count; i++)
    if (x[i] != (float)(n * (n + 1) / 2 + n * (int)(i % 5))) return 0;
  return 1;
}
static int is_of(const float *x, size_t count, int rank) {
  for (size_t i = 0; i < count; i++)
    if (x[i] != (float)(rank + 1 + (int)(i % 5))) return 0;
  return 1;
}

/* Each collective once. Every `round` has another root. */
static int collectives(int rank, int n, hfreduceComm_t comm, size_t count, int round, const struct buffers *x) {
  int root = round % n;
  size_t each = count / (size_t)n;
  fill(x->a, count, rank);
  OK(hfreduceAllReduce(x->a, x->b, count, hfreduceFloat32, hfreduceSum, comm, NULL));
  WANT(is_sum(x->b, count, n));
  OK(hfreduceReduce(x->a, x->b, count, hfreduceFloat32, hfreduceSum, root, comm, NULL));
  OK(hfreduceReduce(x->a, x->b, count, hfreduceFloat32, hfreduceSum, (root + 1) % n, comm, NULL));
  WANT(rank != (root + 1) % n || is_sum(x->b, count, n));
  OK(hfreduceBroadcast(x->a, x->b, count, hfreduceFloat32, root, comm, NULL));
  WANT(is_of(x->b, count, root));
  OK(hfreduceBroadcast(x->a, x->b, count, hfreduceFloat32, (root + 1) % n, comm, NULL));
  OK(hfreduceAllGather(x->a, x->b, count, hfreduceFloat32, comm, NULL));
  for (int r = 0; r < n; r++) WANT(is_of(x->b + (size_t)r * count, count, r));
  OK(hfreduceReduceScatter(x->a, x->b, each, hfreduceFloat32, hfreduceSum, comm, NULL));
  OK(hfreduceAlltoAll(x->a, x->b, each, hfreduceFloat32, comm, NULL));
  OK(hfreduceGather(x->a, x->b, count, hfreduceFloat32, root, comm, NULL));
  OK(hfreduceScatter(x->b, x->a, each, hfreduceFloat32, root, comm, NULL));
  OK(hfreduceBarrier(comm, NULL));
  return 0;
}

/* A small operation, whose slots the others read, and at once one of many chunks, which writes them again. A rank comes late to
   that, so that the others have nothing to go by but its word that it has taken out what it wanted. */
static int small_then_large(int rank, int n, hfreduceComm_t comm, int round, const struct buffers *x) {
  fill(x->a, MOST, rank);
  OK(hfreduceAllGather(x->a, x->b, 200, hfreduceFloat32, comm, NULL));
  if (rank == round % n) usleep(2000);
  OK(hfreduceAllReduce(x->a, x->b, MOST, hfreduceFloat32, hfreduceSum, comm, NULL));
  WANT(is_sum(x->b, MOST, n));
  return 0;
}

/* The other way round. The last chunk of the large one is short: its root has put it in, and comes to the small one, while the
 * others still read the chunk before, whose slot the small one needs. */
static int large_then_small(int rank, int n, hfreduceComm_t comm, int round, const struct buffers *x) {
  enum { LARGE = 5 * 1024 + 16 };
  fill(x->a, LARGE, rank);
  OK(hfreduceBroadcast(x->a, x->b, LARGE, hfreduceFloat32, round % n, comm, NULL));
  OK(hfreduceAllReduce(x->a, x->b + LARGE, 200, hfreduceFloat32, hfreduceSum, comm, NULL));
  WANT(is_of(x->b, LARGE, round % n));
  WANT(is_sum(x->b + LARGE, 200, n));
  return 0;
}

/* Around the ring, several messages long: its slots are used again. */
static int messages(int rank, int n, hfreduceComm_t comm, size_t count, const struct buffers *x) {
  int next = (rank + 1) % n, before = (rank + n - 1) % n;
  fill(x->a, count, rank);
  if (rank % 2) OK(hfreduceRecv(x->b, count, hfreduceFloat32, before, comm, NULL));
  OK(hfreduceSend(x->a, count, hfreduceFloat32, next, comm, NULL));
  if (rank % 2 == 0) OK(hfreduceRecv(x->b, count, hfreduceFloat32, before, comm, NULL));
  WANT(is_of(x->b, count, before));
  return 0;
}

/* What the progress thread drives: its caller has nothing but the word that the work has ended, and looks at the result at once.
 */
static int works(int rank, int n, hfreduceComm_t comm, int finalize, const struct buffers *x) {
  hfreduceWork_t work;
  fill(x->a, MOST, rank);
  OK(hfreduceGroupStart());
  OK(hfreduceAllReduce(x->a, x->b, MOST, hfreduceFloat32, hfreduceSum, comm, NULL));
  OK(hfreduceGroupEndAsync(&work));
  for (int done = finalize; !done; usleep(100)) OK(hfreduceWorkTest(work, &done));
  if (finalize) OK(hfreduceCommFinalize(comm));
  WANT(is_sum(x->b, MOST, n));
  OK(hfreduceWorkDestroy(work));
  return 0;
}

static int run(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const size_t sizes[] = {1, 60, 250, MOST};
  int rounds = *(int *)arg;
  hfreduceComm_t comm;
  struct buffers x = {malloc(MOST * sizeof(float)), malloc(MOST * sizeof(float) * (size_t)n)};
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  for (int round = 0; round < rounds; round++) {
    if (small_then_large(rank, n, comm, round, &x)) return 1;
    if (large_then_small(rank, n, comm, round, &x)) return 1;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
      if (collectives(rank, n, comm, sizes[s], round, &x)) return 1;
      if (messages(rank, n, comm, sizes[s], &x)) return 1;
    }
  }
  for (int i = 0; i <= rounds; i++)
    if (works(rank, n, comm, i == rounds, &x)) return 1;
  OK(hfreduceCommDestroy(comm));
  free(x.a);
  free(x.b);
  return 0;
}

int main(int argc, char **argv) {
  int rounds = argc > 1 ? atoi(argv[1]) : 20;
  setenv("HFREDUCE_SIMD", "scalar", 1);
  setenv("HFREDUCE_CHUNK", "4096", 1);
  setenv("HFREDUCE_SLOTS", "2", 1);
  for (int n = 2; n <= 3; n++) CHECK(run_threads(n, run, &rounds, 100) == 0, "%d threads", n);
  return check_done();
}
