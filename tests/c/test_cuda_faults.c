/*
 * What goes wrong on streams: bad pointers and streams, calls that disagree, deadlines, aborts, ranks that die, drivers that
 * fail. Each must give its error in time, let every stream run dry, and leave nothing behind.
 *
 * Arguments: [--quick] [case [layout ...]]. Exit status 77: no driver.
 */
#include "gpu.h"
#include "ranks.h"

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define COUNT 100000

/* Refused: InvalidArgument, with all these words. */
static int refuses(hfreduceResult_t result, const char *a, const char *b) {
  const char *text = hfreduceGetLastError(NULL);
  return result == hfreduceInvalidArgument && strstr(text, a) && strstr(text, b);
}

static int pointers(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), *freed = gpu_alloc(COUNT * 4), *host = malloc(COUNT * 4), got;
  char me[32];
  hfreduceResult_t error;
  (void)arg;
  snprintf(me, sizeof me, "rank %d", rank);
  gpu_free(freed);
  /* the first call already is a bad one: it must not bind the communicator */
  WANT(refuses(hfreduceAllReduce(x, freed, COUNT, hfreduceFloat32, hfreduceSum, comm, stream), "recvbuff", "freed"));
  WANT(refuses(hfreduceAllReduce(freed, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream), "sendbuff", me));
  WANT(refuses(hfreduceAllReduce(freed, freed, COUNT, hfreduceFloat32, hfreduceSum, comm, stream), "sendbuff", me));
  WANT(refuses(hfreduceAllReduce(x, x, COUNT + 1, hfreduceFloat32, hfreduceSum, comm, stream), "sendbuff",
               "end of its allocation"));
  WANT(refuses(hfreduceAllReduce(x + 1, x + 1, COUNT, hfreduceFloat32, hfreduceSum, comm, stream), "399996", me));
  WANT(n == 1 || refuses(hfreduceAllGather(x, x, COUNT / (size_t)n + 1, hfreduceFloat32, comm, stream), "buff", "AllGather"));
  WANT(n == 1 || refuses(hfreduceReduceScatter(x, host, COUNT / (size_t)n + 1, hfreduceFloat32, hfreduceSum, comm, stream),
                         "sendbuff", me));
  WANT(refuses(hfreduceSend(x, COUNT * 4 + 1, hfreduceUint8, (rank + 1) % n, comm, stream), "sendbuff", me));
  WANT(refuses(hfreduceRecv(freed, 1, hfreduceUint8, (rank + 1) % n, comm, stream), "recvbuff", me));
  /* the rest of a call that was refused in a group does not run */
  OK(hfreduceGroupStart());
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  WANT(hfreduceAllReduce(x, freed, COUNT, hfreduceFloat32, hfreduceSum, comm, stream) == hfreduceInvalidArgument);
  WANT(hfreduceGroupEnd() == hfreduceInvalidArgument);
  if (gpu.devices > 1) { /* another device */
    hfr_cu_context mine, other;
    CU(gpu.cu->context_current(&mine));
    CU(gpu.cu->primary_retain(&other, (rank + 1) % gpu.devices));
    CU(gpu.set_current(other));
    float *far = gpu_alloc(COUNT * 4);
    hfr_cu_stream there = gpu_stream();
    CU(gpu.set_current(mine));
    WANT(refuses(hfreduceAllReduce(far, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream), "sendbuff lies on device", me));
    WANT(refuses(hfreduceAllReduce(x, far, COUNT, hfreduceFloat32, hfreduceSum, comm, stream), "recvbuff lies on device", me));
    WANT(refuses(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, there), "the stream belongs to device", me));
    OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceMax, comm, stream));
    WANT(refuses(hfreduceAllReduce(far, far, COUNT, hfreduceFloat32, hfreduceSum, comm, there), "bound to device", me));
    gpu_free(far);
  } else {
    OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceMax, comm, stream));
  }
  hfr_cu_context mine, own, popped;
  CU(gpu.cu->context_current(&mine));
  CU(gpu.context_create(&own, 0, rank % gpu.devices)); /* another context of the same device */
  hfr_cu_stream foreign = gpu_stream();
  CU(gpu.cu->context_pop(&popped));
  CU(gpu.set_current(mine));
  WANT(refuses(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, foreign), "another CUDA context", me));
  CU(gpu.context_destroy(own));
  if (gpu.tells_stale) {
    WANT(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, foreign) == hfreduceInvalidArgument);
    hfr_cu_stream gone = gpu_stream();
    CU(gpu.cu->stream_destroy(gone));
    WANT(refuses(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, gone), "destroyed", "stream"));
  }
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream)); /* nothing of it broke anything */
  gpu_read(&got, x + COUNT - 1, 4, stream);
  WANT(got == (float)n);
  OK(hfreduceCommGetAsyncError(comm, &error));
  WANT(!error);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  free(host);
  return 0;
}

/* Ranks that disagree: all get the error, and all streams go on. */
static int mismatch(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  (void)arg;
  gpu_fill(x, 0, COUNT * 4, stream);
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  OK(hfreduceAllReduce(x, x, rank == 1 ? COUNT - 1 : COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  WANT(gpu_error_of(comm, 5) == hfreduceMismatch && strstr(hfreduceGetLastError(comm), "99999"));
  WANT(gpu_runs_dry(stream, 5));
  WANT(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream) == hfreduceMismatch);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

/* A rank that does not come: the deadline ends the others' streams. */
static int deadline(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  (void)arg;
  OK(hfreduceCommSetTimeout(comm, 0.5));
  gpu_fill(x, 0, COUNT * 4, stream);
  double start = gpu_now();
  if (rank != n - 1)
    for (int i = 0; i < 20; i++) { /* more than there are segments: some wait for the slots of others */
      hfreduceResult_t r = hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream);
      WANT(!r || r == hfreduceTimeout);
    }
  WANT(gpu_error_of(comm, 5) == hfreduceTimeout && strstr(hfreduceGetLastError(comm), "deadline"));
  WANT(gpu_runs_dry(stream, 5) && gpu_now() - start < 4);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

static void *abort_later(void *arg) {
  usleep(300000);
  hfreduceCommAbort(arg);
  return NULL;
}

/* Aborted by another thread while streams wait. */
static int aborted(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  pthread_t thread;
  (void)arg;
  gpu_fill(x, 0, COUNT * 4, stream);
  for (int i = 0; i < 10 && rank == 0; i++) OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  if (rank == 0) OK(hfreduceSend(x, COUNT, hfreduceFloat32, n - 1, comm, stream));
  if (rank == n - 1) OK(hfreduceRecv(x, 7, hfreduceFloat32, rank, comm, stream)); /* nobody sends that */
  if (rank == 0) pthread_create(&thread, NULL, abort_later, comm);
  WANT(gpu_error_of(comm, 5) == hfreduceAborted);
  WANT(gpu_runs_dry(stream, 3));
  if (rank == 0) pthread_join(thread, NULL);
  WANT(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream) == hfreduceAborted);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

/* A rank is killed while the streams of the others wait for it. */
static int killed(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  (void)arg;
  gpu_fill(x, 0, COUNT * 4, stream);
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  CU(gpu.stream_sync(stream));
  if (rank == n - 1) {
    usleep(300000);
    if (fork())
      for (;;) pause();       /* the rank hangs ... */
    kill(getppid(), SIGKILL); /* ... and dies */
    _exit(0);
  }
  double start = gpu_now();
  for (int i = 0; i < 10; i++) {
    hfreduceResult_t r = hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream);
    WANT(!r || r == hfreduceRemoteError);
  }
  WANT(gpu_error_of(comm, 5) == hfreduceRemoteError);
  WANT(gpu_runs_dry(stream, 3) && gpu_now() - start < 3);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

struct release {
  _Atomic uint32_t *word;
};
static void *release_later(void *arg) {
  usleep(400000);
  *((struct release *)arg)->word = 1;
  return NULL;
}

/* Destroyed with work pending: it ends first. One whose stream never gets there is given up. */
static int destroyed(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t parent = gpu_join(rank, n, id), comm;
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), got;
  struct release r;
  hfr_cu_ptr address;
  pthread_t thread;
  (void)arg;
  CU(gpu.host_alloc((void **)&r.word, 4096, 2));
  CU(gpu.cu->host_device_pointer(&address, (void *)r.word, 0));
  if (!gpu.cu->stream_wait_value || gpu.cu->stream_wait_value(stream, address, 0, 0)) return 0;
  for (int hopeless = 0; hopeless < 2; hopeless++) {
    OK(hfreduceCommSplit(parent, 0, rank, &comm, NULL));
    OK(hfreduceCommSetTimeout(comm, 0.5));
    *r.word = 0;
    CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
    CU(gpu.cu->stream_wait_value(stream, address, 1, HFR_CU_WAIT_GEQ));
    OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
    double start = gpu_now();
    if (!hopeless) pthread_create(&thread, NULL, release_later, &r);
    OK(hfreduceCommDestroy(comm));
    WANT(gpu_now() - start < 25);
    if (!hopeless) {
      WANT(gpu_now() - start > 0.2);
      pthread_join(thread, NULL);
      gpu_read(&got, x + COUNT - 1, 4, stream);
      WANT(got == (float)n);
    }
    *r.word = 1;
    CU(gpu.stream_sync(stream));
  }
  OK(hfreduceCommDestroy(parent));
  gpu_free(x);
  CU(gpu.host_free((void *)r.word));
  return 0;
}

static void *destroy_there(void *arg) { return (void *)(intptr_t)hfreduceCommDestroy(arg); }

/* Destroyed by a thread that never had a context. */
static int elsewhere(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), got;
  pthread_t thread;
  void *result;
  (void)arg;
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  pthread_create(&thread, NULL, destroy_there, comm);
  pthread_join(thread, &result);
  WANT(!result);
  gpu_read(&got, x + COUNT - 1, 4, stream);
  WANT(got == (float)n);
  gpu_free(x);
  return 0;
}

/* Bytes of this process' memory that a fork leaves to the parent alone: what is pinned for copies is such memory. */
static size_t kept_from_children(void) {
  char line[4096];
  size_t kb = 0, sum = 0;
  FILE *maps = fopen("/proc/self/smaps", "r");
  while (maps && fgets(line, sizeof line, maps)) {
    sscanf(line, "Size: %zu kB", &kb);
    if (!strncmp(line, "VmFlags:", 8) && strstr(line, " dc")) sum += kb << 10;
  }
  if (maps) fclose(maps);
  return sum;
}

/* A driver that fails in the middle of a launch (FAKE_CUDA says where): every rank gets an error, every stream runs dry. */
static int failing(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  size_t before = kept_from_children();
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4 * 8);
  (void)arg;
  gpu_fill(x, 0, COUNT * 4 * 8, stream);
  OK(hfreduceCommSetTimeout(comm, 2));
  hfreduceResult_t r = hfreduceSuccess;
  for (int i = 0; i < 40 && !r; i++) r = hfreduceAllReduce(x, x, COUNT * 8, hfreduceFloat32, hfreduceSum, comm, stream);
  WANT(r);
  WANT(gpu_runs_dry(stream, 5));
  OK(hfreduceCommDestroy(comm));
  WANT(kept_from_children() == before);
  gpu_free(x);
  return 0;
}

int main(int argc, char **argv) {
  static const struct gpu_case cases[] = {
      {"pointers", pointers, "1 2"},
      {"mismatch", mismatch, "2 1,1 3"},
      {"deadline", deadline, "2 1,1"},
      {"aborted", aborted, "2 1,1 t2"},
      {"killed", killed, ""},
      {"destroyed", destroyed, "2 1,1"},
      {"elsewhere", elsewhere, "2 1,1"},
      {"failing", failing, ""},
  };
  return gpu_run_cases(cases, sizeof cases / sizeof *cases, argc, argv);
}
