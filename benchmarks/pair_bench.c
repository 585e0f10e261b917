/* What two ranks reach without Python. Rank 0 prints one number for each line of its standard input; rank 1 gets the same lines:
 *
 *     latency BYTES COUNT       microseconds of half a round trip of send and recv, the median
 *     send_recv BYTES COUNT     MB/s of so many sends in a row, the last one acknowledged
 *     all_reduce BYTES COUNT    MB/s that left rank 0, as its connection counted them
 *
 * usage: pair_bench RANK HOST:PORT, once a rank; rdma_perf.py builds and runs it. */
#include <hfreduce.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static hfreduceComm_t comm;
static int rank;

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
  fprintf(stderr, "rank %d: %s\n", rank, hfreduceGetLastError(NULL));
  exit(1);
}

static void *allocate(size_t bytes) {
  void *memory = calloc(bytes + 1, 1);
  if (!memory) exit((fprintf(stderr, "rank %d: out of memory for %zu bytes\n", rank, bytes), 1));
  memset(memory, 1, bytes); /* every page is there */
  return memory;
}

static void send_to_peer(const void *x, size_t bytes) { check(hfreduceSend(x, bytes, hfreduceUint8, 1 - rank, comm, NULL)); }
static void recv_from_peer(void *x, size_t bytes) { check(hfreduceRecv(x, bytes, hfreduceUint8, 1 - rank, comm, NULL)); }

/* Connections come up with the first message of a kind; that is not what is measured. */
static void connect_both_ways(void *x) {
  if (rank == 0) send_to_peer(x, 1);
  recv_from_peer(x, 1);
  if (rank == 1) send_to_peer(x, 1);
}

static double latency(void *x, size_t bytes, size_t count) {
  double *times = allocate((count + 1) * sizeof *times);
  connect_both_ways(x);
  for (size_t i = 0; i <= count; i++) {
    double start = now_us();
    if (rank == 0) send_to_peer(x, bytes);
    recv_from_peer(x, bytes);
    if (rank == 1) send_to_peer(x, bytes);
    times[i] = (now_us() - start) / 2;
  }
  qsort(times, count + 1, sizeof *times, ascending);
  double median = times[(count + 1) / 2];
  free(times);
  return median;
}

static double send_recv(void *x, size_t bytes, size_t count) {
  connect_both_ways(x);
  double start = now_us();
  for (size_t i = 0; i < count; i++)
    if (rank == 0)
      send_to_peer(x, bytes);
    else
      recv_from_peer(x, bytes);
  if (rank == 0)
    recv_from_peer(x, 1);
  else
    send_to_peer(x, 1);
  return (double)bytes * (double)count / (now_us() - start);
}

static double all_reduce(void *x, size_t bytes, size_t count) {
  hfreduceConnection_t before, after;
  check(hfreduceAllReduce(x, x, bytes / 4, hfreduceFloat32, hfreduceMax, comm, NULL));
  check(hfreduceCommGetConnection(comm, 0, &before));
  double start = now_us();
  for (size_t i = 0; i < count; i++) check(hfreduceAllReduce(x, x, bytes / 4, hfreduceFloat32, hfreduceMax, comm, NULL));
  double us = now_us() - start;
  check(hfreduceCommGetConnection(comm, 0, &after));
  return (double)(after.bytes_sent - before.bytes_sent) / us;
}

int main(int argc, char **argv) {
  hfreduceUniqueId id;
  char what[32];
  size_t bytes, count;
  if (argc != 3) return fprintf(stderr, "usage: pair_bench RANK HOST:PORT\n"), 2;
  rank = atoi(argv[1]);
  check(hfreduceUniqueIdFromAddress(&id, argv[2], NULL, 0));
  check(hfreduceCommInitRank(&comm, 2, id, rank));
  while (scanf("%31s %zu %zu", what, &bytes, &count) == 3) {
    void *x = allocate(bytes);
    double value = !strcmp(what, "latency")      ? latency(x, bytes, count)
                   : !strcmp(what, "send_recv")  ? send_recv(x, bytes, count)
                   : !strcmp(what, "all_reduce") ? all_reduce(x, bytes, count)
                                                 : (fprintf(stderr, "%s: not known\n", what), exit(2), 0);
    if (rank == 0) printf("%.3f\n", value), fflush(stdout);
    free(x);
  }
  check(hfreduceCommDestroy(comm));
  return 0;
}
