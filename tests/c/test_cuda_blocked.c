/*
 * A driver may keep the calls that make or give back memory, streams and events waiting while any stream waits for a word. The
 * stand-in does so with FAKE_CUDA=block=1. No call on a communicator may then depend on one of these: each case has a stream that
 * waits for what this very thread, or another rank of the process, does next.
 *
 * Arguments: [--quick] [case [layout ...]]. Exit status 77: no driver.
 */
#include "gpu.h"
#include "ranks.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { COUNT = 1000 };

/* Streams of the process that wait for words; -1: the driver does not tell. */
static int waits(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  int (*count)(void) = NULL;
  if (library) *(void **)&count = dlsym(library, "fake_cuda_waits");
  return count ? count() : -1;
}

/* A wait has begun. */
static void until_pending(void) {
  for (int i = 0; i < 5000 && !waits(); i++) usleep(1000);
  if (waits() < 0) usleep(50000);
}

static void gone(hfr_cu_stream stream, const char *what, int rank) {
  if (gpu_runs_dry(stream, 20)) return;
  fprintf(stderr, "rank %d: the stream still waits in \"%s\"\n", rank, what);
  exit(1);
}

/* What a case does between a receive that waits and the send that the other rank needs. */
struct between {
  int n;
  hfreduceComm_t comm, second;
  hfr_cu_stream stream; /* with nothing on it */
  float *x;
  hfr_cu_graph graph;
  gpu_exec exec;
};

static int receive_first(int rank, int n, const hfreduceUniqueId *id, int (*before)(int, struct between *),
                         int (*between)(int, struct between *)) {
  hfreduceComm_t comm = gpu_join(rank, n, id), second;
  OK(hfreduceCommSplit(comm, 0, rank, &second, NULL));
  hfr_cu_stream in = gpu_stream(), out = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), *y = gpu_alloc(COUNT * 4), got;
  struct between b = {n, comm, second, gpu_stream(), gpu_alloc(COUNT * 4), NULL, NULL};
  OK(hfreduceCommSetTimeout(comm, 8));
  OK(hfreduceCommSetTimeout(second, 8));
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, out));
  CU(gpu.cu->set_async((hfr_cu_ptr)b.x, 0x3f800000, COUNT, b.stream));
  CU(gpu.stream_sync(out));
  CU(gpu.stream_sync(b.stream));
  if (before && before(rank, &b)) return 1;
  OK(hfreduceRecv(y, COUNT, hfreduceFloat32, (rank + n - 1) % n, comm, in));
  until_pending();
  double start = gpu_now();
  if (between && between(rank, &b)) return 1;
  OK(hfreduceSend(x, COUNT, hfreduceFloat32, (rank + 1) % n, comm, out));
  WANT(gpu_now() - start < 7); /* no call was kept until the receive gave up */
  gone(in, "the receive", rank);
  gone(out, "the send", rank);
  gpu_read(&got, y + COUNT - 1, 4, in);
  WANT(got == 1);
  hfreduceResult_t error;
  OK(hfreduceCommGetAsyncError(comm, &error));
  WANT(!error);
  if (b.second) OK(hfreduceCommDestroy(b.second));
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(y), gpu_free(b.x);
  return 0;
}

/* A receive, then the send, for both the first of their kind. */
static int message(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  (void)arg;
  return receive_first(rank, n, id, NULL, NULL);
}

/* A first call on another communicator in between. */
static int sum_on_second(int rank, struct between *b) {
  float got;
  OK(hfreduceAllReduce(b->x, b->x, COUNT, hfreduceFloat32, hfreduceSum, b->second, b->stream));
  gone(b->stream, "the first call on another communicator", rank);
  gpu_read(&got, b->x + COUNT - 1, 4, b->stream);
  WANT(got == (float)b->n);
  return 0;
}
static int first_call(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  (void)arg;
  return receive_first(rank, n, id, NULL, sum_on_second);
}

/* Another communicator is destroyed in between, one that was used, or not. */
static int destroy_second(int rank, struct between *b) {
  hfreduceComm_t comm = b->second;
  b->second = NULL;
  OK(hfreduceCommDestroy(comm));
  return 0;
}
static int destroyed(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  (void)arg;
  return receive_first(rank, n, id, sum_on_second, destroy_second);
}
static int destroyed_unused(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  (void)arg;
  return receive_first(rank, n, id, NULL, destroy_second);
}

/* A graph is destroyed in between: its memory may be given back at any later launch. */
static int graph_before(int rank, struct between *b) {
  hfr_cu_graph graph;
  gpu_exec exec;
  CU(gpu.begin(b->stream, HFR_CU_MODE_THREAD_LOCAL));
  OK(hfreduceAllReduce(b->x, b->x, COUNT, hfreduceFloat32, hfreduceMax, b->comm, b->stream));
  CU(gpu.end(b->stream, &graph));
  CU(gpu.instantiate(&exec, graph, 0));
  CU(gpu.launch(exec, b->stream));
  CU(gpu.stream_sync(b->stream));
  b->graph = graph;
  b->exec = exec;
  /* The communicator holds it until another takes its place. */
  CU(gpu.begin(b->stream, HFR_CU_MODE_THREAD_LOCAL));
  OK(hfreduceAllReduce(b->x, b->x, COUNT, hfreduceFloat32, hfreduceMax, b->comm, b->stream));
  CU(gpu.end(b->stream, &graph));
  CU(gpu.graph_destroy(graph));
  return 0;
}
static int destroy_graph(int rank, struct between *b) {
  (void)rank;
  CU(gpu.exec_destroy(b->exec)), CU(gpu.graph_destroy(b->graph));
  usleep(200000); /* the driver tells that a graph is gone when it likes */
  return 0;
}
static int graph_gone(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  (void)arg;
  return receive_first(rank, n, id, graph_before, destroy_graph);
}

/* A first call is captured in between. */
static int capture(int rank, struct between *b) {
  hfr_cu_graph graph;
  CU(gpu.begin(b->stream, HFR_CU_MODE_THREAD_LOCAL));
  OK(hfreduceAllReduce(b->x, b->x, 100, hfreduceFloat32, hfreduceMax, b->second, b->stream));
  CU(gpu.end(b->stream, &graph));
  CU(gpu.graph_destroy(graph));
  return 0;
}
static int captured(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  (void)arg;
  return receive_first(rank, n, id, NULL, capture);
}

/* Ranks that are threads: each waits for what another has not called yet, for whom it is the first call. */
static int late(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  (void)arg;
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), got;
  OK(hfreduceCommSetTimeout(comm, 8));
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
  CU(gpu.stream_sync(stream));
  float here = 1; /* all have made what is theirs */
  OK(hfreduceAllReduce(&here, &here, 1, hfreduceFloat32, hfreduceSum, comm, NULL));
  if (rank) until_pending();
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  gone(stream, "the all_reduce", rank);
  here = 1; /* nobody frees before all are through */
  OK(hfreduceAllReduce(&here, &here, 1, hfreduceFloat32, hfreduceSum, comm, NULL));
  gpu_read(&got, x + COUNT - 1, 4, stream);
  WANT(got == (float)n);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

int main(int argc, char **argv) {
  static const struct gpu_case cases[] = {
      {"message", message, "2 1,1"},   {"first_call", first_call, "2"},
      {"destroyed", destroyed, "2"},   {"destroyed_unused", destroyed_unused, "2"},
      {"graph_gone", graph_gone, "2"}, {"captured", captured, "2"},
      {"late", late, "t2 t4"},
  };
  return gpu_run_cases(cases, sizeof cases / sizeof *cases, argc, argv);
}
