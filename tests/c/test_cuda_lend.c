/*
 * What devices bring into the arena is read there by the other local ranks: that it is so, and that nothing comes over it while
 * somebody reads. (test_lending.c has the orders in which that can go; test_cuda.c compares all results with those on host
 * memory.)
 *
 * Arguments: [--quick] [case [layout ...]]. Exit status 77: no driver.
 */
#include "gpu.h"
#include "ranks.h"

#include "comm/comm.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define COUNT (512 * 1024 + 77) /* 2 MiB: eight segments and more in a ring of two */
#define PATTERN(rank, i, salt) (float)(((i)*7 + (size_t)(rank)*13 + (size_t)(salt)*29) % 251)

static void fill(float *x, int rank, int salt) {
  for (size_t i = 0; i < COUNT; i++) x[i] = PATTERN(rank, i, salt);
}
static int came(const float *x, int rank, int salt) {
  for (size_t i = 0; i < COUNT; i++)
    if (x[i] != PATTERN(rank, i, salt)) return 0;
  return 1;
}
static int sum_came(const float *x, int n, int salt) {
  for (size_t i = 0; i < COUNT; i++) {
    float sum = 0;
    for (int r = 0; r < n; r++) sum += PATTERN(r, i, salt);
    if (x[i] != sum) return 0;
  }
  return 1;
}

/* Sum on device memory, and look at the result. `shift` bytes off the beginning of the allocation. */
static int sum_up(int rank, int n, hfreduceComm_t comm, hfr_cu_stream stream, uint8_t *device, float *host, int salt,
                  size_t shift) {
  float *x = (float *)(device + shift);
  fill(host, rank, salt);
  gpu_copy(x, host, COUNT * sizeof *x, stream);
  CU(gpu.stream_sync(stream));
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  gpu_read(host, x, COUNT * sizeof *x, stream);
  WANT(sum_came(host, n, salt));
  return 0;
}

/* Every chunk is lent where a node has several ranks, and none where it has one; also by a communicator that has been idle, when
 * the arena has been at rest; and with a child that has inherited all memory. */
static int lent(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  uint8_t *x = gpu_alloc(COUNT * 4 + 16);
  float *host = malloc(COUNT * 4);
  int several = comm->layout.nlocal > 1, status;
  size_t chunks = (COUNT * sizeof(float) + comm->engine.geometry.chunk - 1) / comm->engine.geometry.chunk;
  WANT(several == (comm->arena.lend > 0));
  for (int i = 0; i < 5; i++) {
    if (i == 2 && !arg) usleep(900000);
    pid_t child = i == 3 ? fork() : 0;
    if (i == 3 && !child) {
      usleep(100000);
      _exit(0);
    }
    if (sum_up(rank, n, comm, stream, x, host, i, (size_t)i % 3)) return 1;
    WANT(comm->engine.lent == (several ? chunks * (uint64_t)(i + 1) : 0));
    if (child) WANT(waitpid(child, &status, 0) == child && !status);
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  free(host);
  return 0;
}

/* Memory that cannot be pinned (FAKE_CUDA says so) is not lent, and all works as it does without. */
static int unpinned(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  uint8_t *x = gpu_alloc(COUNT * 4);
  float *host = malloc(COUNT * 4);
  (void)arg;
  for (int i = 0; i < 3; i++)
    if (sum_up(rank, n, comm, stream, x, host, i, 0)) return 1;
  WANT(!comm->engine.lent);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  free(host);
  return 0;
}

/* The root's device could be through with several calls before the others, of which some work on host memory, have begun to read
 * the first: its segments must wait for them. */
static int late(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { CALLS = 4 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x[CALLS], *host = malloc(COUNT * 4);
  for (int i = 0; i < CALLS; i++) x[i] = gpu_alloc(COUNT * 4);
  for (int round = 0; round < (arg ? n : 3 * n); round++) {
    int root = round % n;
    for (int i = 0; i < CALLS; i++) {
      fill(host, rank, round + i);
      gpu_copy(x[i], host, COUNT * 4, stream);
      CU(gpu.stream_sync(stream));
    }
    if (rank != root) usleep(30000);
    for (int i = 0; i < CALLS; i++) {
      int on_host = rank != root && (rank + round) % 2;
      OK(hfreduceBroadcast(on_host ? host : x[i], on_host ? host : x[i], COUNT, hfreduceFloat32, root, comm,
                           on_host ? NULL : stream));
      if (on_host) WANT(came(host, root, round + i));
      if (rank != root) usleep(3000);
      if (on_host) gpu_copy(x[i], host, COUNT * 4, stream);
    }
    for (int i = 0; i < CALLS; i++) {
      gpu_read(host, x[i], COUNT * 4, stream);
      WANT(came(host, root, round + i));
    }
  }
  WANT(comm->engine.lent > 0 || comm->layout.nlocal == 1);
  OK(hfreduceCommDestroy(comm));
  for (int i = 0; i < CALLS; i++) gpu_free(x[i]);
  free(host);
  return 0;
}

/* Small and large calls by turns, in groups with messages, where every rank's memory is of another kind each time. */
static int by_turns(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), *y = gpu_alloc(COUNT * 4), *z = gpu_alloc(COUNT * 4), *host = malloc(COUNT * 4), small[64];
  uint32_t seed = (uint32_t)rank * 7919 + 1;
  for (int i = 0; i < (arg ? 12 : 60); i++) {
    seed = seed * 1664525u + 1013904223u;
    int on_host = (seed >> 9) % 3 == 0, next = (rank + 1) % n, before = (rank + n - 1) % n;
    for (int k = 0; k < 64; k++) small[k] = (float)(rank + k);
    OK(hfreduceAllReduce(small, small, 64, hfreduceFloat32, hfreduceSum, comm, NULL));
    WANT(small[63] == (float)(n * 63 + n * (n - 1) / 2));
    fill(host, rank, i);
    gpu_copy(x, host, COUNT * 4, stream);
    gpu_copy(z, host, COUNT * 4, stream);
    CU(gpu.stream_sync(stream));
    OK(hfreduceGroupStart());
    OK(hfreduceRecv(y, COUNT, hfreduceFloat32, before, comm, stream));
    OK(hfreduceSend(x, COUNT, hfreduceFloat32, next, comm, stream));
    OK(hfreduceAllReduce(on_host ? host : z, on_host ? host : z, COUNT, hfreduceFloat32, hfreduceSum, comm,
                         on_host ? NULL : stream));
    OK(hfreduceGroupEnd());
    if (!on_host) gpu_read(host, z, COUNT * 4, stream);
    WANT(sum_came(host, n, i));
    gpu_read(host, y, COUNT * 4, stream);
    WANT(came(host, before, i));
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(y), gpu_free(z);
  free(host);
  return 0;
}

/* Aborted while others still read what was lent, and those that come after it are in the queues already. */
static int aborted(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t parent = gpu_join(rank, n, id), comm;
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  gpu_fill(x, 0, COUNT * 4, stream);
  CU(gpu.stream_sync(stream));
  for (int i = 0; i < (arg ? 3 : 10); i++) {
    OK(hfreduceCommSplit(parent, 0, rank, &comm, NULL));
    hfreduceResult_t r = hfreduceSuccess;
    for (int k = 0; k < 6 && !r; k++) {
      r = hfreduceBroadcast(x, x, COUNT, hfreduceFloat32, 0, comm, stream);
      if (rank == i % n && k == 3) {
        usleep((useconds_t)(i * 300));
        OK(hfreduceCommAbort(comm));
      }
    }
    CU(gpu.stream_sync(stream));
    WANT(!r || r == hfreduceAborted);
    OK(hfreduceCommDestroy(comm));
  }
  OK(hfreduceCommDestroy(parent));
  gpu_free(x);
  return 0;
}

int main(int argc, char **argv) {
  static const struct gpu_case cases[] = {
      {"lent", lent, "1 2 3 1,1 2,2"},      {"unpinned", unpinned, ""},         {"late", late, "2 3 2,2 t3"},
      {"by_turns", by_turns, "2 3 2,1 t2"}, {"aborted", aborted, "2 3 2,1 t2"},
  };
  setenv("HFREDUCE_CUDA_SEGMENT", "128K", 0); /* a ring that calls go round */
  setenv("HFREDUCE_CUDA_SEGMENTS", "2", 0);
  return gpu_run_cases(cases, sizeof cases / sizeof *cases, argc, argv);
}
