/* Half a round trip of send and recv between two ranks, without Python: rank 0 prints the median in microseconds.
 * usage: latency_bench RANK HOST:PORT BYTES ITERATIONS, once a rank; rdma_perf.py builds and runs it. */
#include <hfreduce.h>

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static int ascending(const void *a, const void *b) {
  return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static void check(hfreduceResult_t result) {
  if (result == hfreduceSuccess) return;
  fprintf(stderr, "%s\n", hfreduceGetLastError(NULL));
  exit(1);
}

int main(int argc, char **argv) {
  hfreduceUniqueId id;
  hfreduceComm_t comm;
  if (argc != 5) return fprintf(stderr, "usage: latency_bench RANK HOST:PORT BYTES ITERATIONS\n"), 2;
  int rank = atoi(argv[1]);
  size_t bytes = (size_t)atol(argv[3]), count = (size_t)atol(argv[4]) + 1;
  char *x = calloc(bytes + 1, 1);
  double *times = calloc(count, sizeof *times);
  check(hfreduceUniqueIdFromAddress(&id, argv[2], NULL, 0));
  check(hfreduceCommInitRank(&comm, 2, id, rank));
  for (size_t i = 0; i < count; i++) {
    double start = now_us();
    if (rank == 0) check(hfreduceSend(x, bytes, hfreduceUint8, 1, comm, NULL));
    check(hfreduceRecv(x, bytes, hfreduceUint8, 1 - rank, comm, NULL));
    if (rank == 1) check(hfreduceSend(x, bytes, hfreduceUint8, 0, comm, NULL));
    times[i] = (now_us() - start) / 2;
  }
  qsort(times, count, sizeof *times, ascending);
  if (rank == 0) printf("%.3f\n", times[count / 2]);
  check(hfreduceCommDestroy(comm));
  free(times);
  free(x);
  return 0;
}
