/*
 * Captured calls: replayed a thousand times with data that changes, beside ordinary calls, and torn down in every order.
 *
 * Arguments: [--quick] [case [layout ...]]. Exit status 77: no driver.
 */
#include "gpu.h"
#include "ranks.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* A graph of everything: a small and a large all_reduce, one in place, an all_gather, messages in a group. */
struct graph {
  hfr_cu_graph graph;
  gpu_exec exec;
};

enum { SMALL = 300, LARGE = 400000, BLOCK = 50000 };
struct data {
  float *small, *large, *result, *block, *blocks, *out, *in, *seed; /* on the device; seed: what a replay begins with */
};

static void open_data(struct data *d, int n) {
  *d = (struct data){.small = gpu_alloc(SMALL * 4),
                     .large = gpu_alloc(LARGE * 4),
                     .result = gpu_alloc(LARGE * 4),
                     .block = gpu_alloc(BLOCK * 4),
                     .blocks = gpu_alloc((size_t)BLOCK * 4 * (size_t)n),
                     .out = gpu_alloc(BLOCK * 4),
                     .in = gpu_alloc(BLOCK * 4),
                     .seed = gpu_alloc(LARGE * 4)};
}
static void close_data(struct data *d) {
  gpu_free(d->small), gpu_free(d->large), gpu_free(d->result), gpu_free(d->block);
  gpu_free(d->blocks), gpu_free(d->out), gpu_free(d->in), gpu_free(d->seed);
}

static _Thread_local int mode = HFR_CU_MODE_GLOBAL; /* global: unsafe calls of any thread are forbidden meanwhile */

static int capture(int rank, int n, hfreduceComm_t comm, hfr_cu_stream stream, struct data *d, struct graph *g) {
  CU(gpu.begin(stream, mode));
  gpu_copy(d->small, d->seed, SMALL * 4, stream);
  gpu_copy(d->large, d->seed, LARGE * 4, stream);
  gpu_copy(d->block, d->seed, BLOCK * 4, stream);
  gpu_copy(d->out, d->seed, BLOCK * 4, stream);
  OK(hfreduceAllReduce(d->small, d->small, SMALL, hfreduceFloat32, hfreduceSum, comm, stream));
  OK(hfreduceAllReduce(d->large, d->result, LARGE, hfreduceFloat32, hfreduceMax, comm, stream));
  OK(hfreduceAllGather(d->block, d->blocks, BLOCK, hfreduceFloat32, comm, stream));
  OK(hfreduceGroupStart());
  OK(hfreduceRecv(d->in, BLOCK, hfreduceFloat32, (rank + n - 1) % n, comm, stream));
  OK(hfreduceSend(d->out, BLOCK, hfreduceFloat32, (rank + 1) % n, comm, stream));
  OK(hfreduceGroupEnd());
  OK(hfreduceBarrier(comm, stream));
  CU(gpu.end(stream, &g->graph));
  CU(gpu.instantiate(&g->exec, g->graph, 0));
  return 0;
}

/* Every element of this rank's seed is `value`; the replay's results follow. */
static void begin(struct data *d, float value, hfr_cu_stream stream) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  CU(gpu.cu->set_async((hfr_cu_ptr)d->seed, bits, LARGE, stream));
}

static int check(int rank, int n, const struct data *d, int i, hfr_cu_stream stream) {
  float small[2], large[2], blocks, in;
  float sum = 0, most = 0;
  for (int r = 0; r < n; r++) sum += (float)(i + r), most = (float)(i + r);
  gpu_read(&small[0], d->small, 4, stream), gpu_read(&small[1], d->small + SMALL - 1, 4, stream);
  gpu_read(&large[0], d->result, 4, stream), gpu_read(&large[1], d->result + LARGE - 1, 4, stream);
  WANT(small[0] == sum && small[1] == sum && large[0] == most && large[1] == most);
  for (int r = 0; r < n; r++) {
    gpu_read(&blocks, d->blocks + (size_t)r * BLOCK + BLOCK - 1, 4, stream);
    WANT(blocks == (float)(i + r));
  }
  gpu_read(&in, d->in + BLOCK - 1, 4, stream);
  WANT(in == (float)(i + (rank + n - 1) % n));
  return 0;
}

static int replay(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  struct data d;
  struct graph g, second;
  hfreduceResult_t error;
  open_data(&d, n);
  if (capture(rank, n, comm, stream, &d, &g) || capture(rank, n, comm, stream, &d, &second)) return 1;
  int times = arg ? 25 : n == 2 ? 1000 : 200;
  for (int i = 0; i < times; i++) {
    begin(&d, (float)(i + rank), stream);
    CU(gpu.launch(i % 7 == 3 ? second.exec : g.exec, stream));
    if (i % 10 == 5) /* ordinary calls in between, ordered by the stream */
      OK(hfreduceAllReduce(d.large, d.large, LARGE, hfreduceFloat32, hfreduceSum, comm, stream));
    if (i % 20 == 7) {
      float x = 1;
      CU(gpu.stream_sync(stream)); /* a call on host memory is ordered by nothing else */
      OK(hfreduceAllReduce(&x, &x, 1, hfreduceFloat32, hfreduceSum, comm, NULL));
      WANT(x == (float)n);
    }
    if ((i < 20 || i % 50 == 0 || i == times - 1) && check(rank, n, &d, i, stream)) return 1;
  }
  OK(hfreduceCommGetAsyncError(comm, &error));
  WANT(!error);
  CU(gpu.stream_sync(stream));
  CU(gpu.exec_destroy(g.exec)), CU(gpu.graph_destroy(g.graph));
  CU(gpu.graph_destroy(second.graph));
  begin(&d, (float)(5 + rank), stream); /* the other still works, and what was made of it keeps it alive */
  CU(gpu.launch(second.exec, stream));
  if (check(rank, n, &d, 5, stream)) return 1;
  OK(hfreduceCommDestroy(comm));
  CU(gpu.exec_destroy(second.exec));
  close_data(&d);
  return 0;
}

/* As ranks that are threads: what one captures must not forbid what another does. */
static int threads(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  mode = HFR_CU_MODE_THREAD_LOCAL;
  (void)arg;
  return replay(rank, n, id, "few");
}

/* Graphs and communicators go in either order, replayed or not; a new communicator comes after each. */
static int teardown(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t parent = gpu_join(rank, n, id), comm;
  hfr_cu_stream stream = gpu_stream();
  struct data d;
  (void)arg;
  open_data(&d, n);
  for (int i = 0; i < 8; i++) {
    struct graph g;
    OK(hfreduceCommSplit(parent, 0, rank, &comm, NULL));
    if (capture(rank, n, comm, stream, &d, &g)) return 1;
    for (int k = 0; k < i % 3; k++) {
      begin(&d, (float)(k + rank), stream);
      CU(gpu.launch(g.exec, stream));
      if (check(rank, n, &d, k, stream)) return 1;
    }
    if (i & 1) OK(hfreduceCommDestroy(comm));
    CU(gpu.graph_destroy(g.graph));
    if (i & 2) usleep(3000); /* the driver tells that a graph is gone when it likes */
    CU(gpu.exec_destroy(g.exec));
    if (!(i & 1)) OK(hfreduceCommDestroy(comm));
  }
  OK(hfreduceCommDestroy(parent));
  close_data(&d);
  return 0;
}

/* What cannot be captured is refused, and nothing breaks. */
static int refused(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream(), other = gpu_stream();
  float *x = gpu_alloc(400), *y = gpu_alloc(400), host[100] = {0};
  hfr_cu_graph graph;
  (void)arg;
  gpu_fill(x, 0, 400, stream);
  gpu_fill(y, 0, 400, stream);
  CU(gpu.stream_sync(stream));
  CU(gpu.begin(stream, HFR_CU_MODE_GLOBAL));
  OK(hfreduceGroupStart());
  OK(hfreduceAllReduce(x, x, 100, hfreduceFloat32, hfreduceSum, comm, stream));
  OK(hfreduceAllReduce(y, y, 100, hfreduceFloat32, hfreduceSum, comm, other));
  WANT(hfreduceGroupEnd() == hfreduceInvalidUsage && strstr(hfreduceGetLastError(NULL), "captured"));
  OK(hfreduceGroupStart());
  OK(hfreduceAllReduce(x, x, 100, hfreduceFloat32, hfreduceSum, comm, stream));
  OK(hfreduceAllReduce(host, host, 100, hfreduceFloat32, hfreduceSum, comm, NULL));
  WANT(hfreduceGroupEnd() == hfreduceInvalidUsage && strstr(hfreduceGetLastError(NULL), "captured"));
  CU(gpu.end(stream, &graph));
  CU(gpu.graph_destroy(graph));
  OK(hfreduceAllReduce(x, x, 100, hfreduceFloat32, hfreduceSum, comm, stream));
  CU(gpu.stream_sync(stream));
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(y);
  return 0;
}

/* A graph that is launched after its communicator broke gets to its end. */
static int broken(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  struct data d;
  struct graph g;
  (void)arg;
  open_data(&d, n);
  if (capture(rank, n, comm, stream, &d, &g)) return 1;
  begin(&d, (float)rank, stream);
  CU(gpu.launch(g.exec, stream));
  if (check(rank, n, &d, 0, stream)) return 1;
  if (rank == 0) OK(hfreduceCommAbort(comm));
  for (int i = 0; i < 5; i++) {
    CU(gpu.launch(g.exec, stream));
    CU(gpu.stream_sync(stream));
  }
  hfreduceResult_t error = hfreduceSuccess;
  for (int i = 0; i < 2000 && !error; i++) {
    OK(hfreduceCommGetAsyncError(comm, &error));
    usleep(1000);
  }
  WANT(error == hfreduceAborted);
  CU(gpu.exec_destroy(g.exec)), CU(gpu.graph_destroy(g.graph));
  OK(hfreduceCommDestroy(comm));
  close_data(&d);
  return 0;
}

/* What the stand-in counts; 0 on a driver, which does not tell. */
static size_t counted(const char *what) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  size_t (*count)(void) = NULL;
  if (library) *(void **)&count = dlsym(library, what);
  return count ? count() : 0;
}
static size_t pinned(void) { return counted("fake_cuda_registered"); } /* bytes */

/* A forbidden call has invalidated the capture: the library says so, and the stream works again once the capture has ended. */
static int invalidated(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { COUNT = 100 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), got;
  hfr_cu_graph graph;
  hfr_cu_ptr p;
  (void)arg;
  CU(gpu.begin(stream, HFR_CU_MODE_GLOBAL));
  WANT(gpu.cu->mem_alloc(&p, 4096)); /* a capture of this mode forbids it */
  WANT(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream) == hfreduceInvalidUsage);
  WANT(strstr(hfreduceGetLastError(NULL), "was invalidated by an earlier error"));
  WANT(gpu.end(stream, &graph));
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  gpu_read(&got, x + COUNT - 1, 4, stream);
  WANT(got == (float)n);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

/* The driver does not let the graph have the object that tells of its end (FAKE_CUDA says so): nothing stays behind. */
static int unretained(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { COUNT = 100 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), got;
  hfr_cu_graph graph;
  (void)arg;
  CU(gpu.begin(stream, mode));
  WANT(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream) == hfreduceUnhandledCudaError);
  WANT(strstr(hfreduceGetLastError(NULL), "cuGraphRetainUserObject"));
  CU(gpu.end(stream, &graph));
  CU(gpu.graph_destroy(graph));
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  gpu_read(&got, x + COUNT - 1, 4, stream);
  WANT(got == (float)n);
  OK(hfreduceCommDestroy(comm));
  for (int i = 0; i < 5000 && counted("fake_cuda_objects"); i++) usleep(1000); /* a thread of the driver destroys it */
  WANT(!counted("fake_cuda_objects"));
  gpu_free(x);
  return 0;
}

static int64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000ll + t.tv_nsec / 1000;
}

static long wakeups(void) {
  struct rusage use;
  getrusage(RUSAGE_SELF, &use);
  return use.ru_nvcsw;
}

/* A graph that nobody launches costs next to nothing: no thread that looks for it all the time, no more pinned memory than its
 * calls need. When it is launched, its bell says so. */
static int idle(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { COUNT = 300, LAUNCHES = 8, WATCH_US = 600000, PAUSE_US = 70000 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), got;
  struct graph g;
  (void)arg;
  size_t before = pinned();
  CU(gpu.begin(stream, mode));
  OK(hfreduceBarrier(comm, stream)); /* needs no segment */
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  CU(gpu.end(stream, &g.graph));
  CU(gpu.instantiate(&g.exec, g.graph, 0));
  WANT(pinned() - before <= 16384);
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
  CU(gpu.launch(g.exec, stream));
  CU(gpu.stream_sync(stream));
  usleep(PAUSE_US);
  long woken = wakeups();
  usleep(WATCH_US);
  woken = wakeups() - woken;
  if (woken > WATCH_US / 10000) fprintf(stderr, "rank %d: %ld wake-ups in %d ms\n", rank, woken, WATCH_US / 1000);
  WANT(woken <= WATCH_US / 10000);
  int64_t took = 0;
  for (int i = 0; i < LAUNCHES; i++) {
    usleep(PAUSE_US);
    OK(hfreduceBarrier(comm, NULL)); /* all ranks at once */
    usleep(PAUSE_US);                /* its driver sleeps deeply again */
    int64_t start = now_us();
    CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
    CU(gpu.launch(g.exec, stream));
    gpu_read(&got, x + COUNT - 1, 4, stream);
    took += now_us() - start;
    WANT(got == (float)n);
  }
  if (took > LAUNCHES * 12000) fprintf(stderr, "rank %d: a launch takes %lld us\n", rank, (long long)took / LAUNCHES);
  WANT(took <= LAUNCHES * 12000); /* who finds out by looking takes half of 50 ms */
  CU(gpu.exec_destroy(g.exec)), CU(gpu.graph_destroy(g.graph));
  usleep(200000); /* the driver tells that a graph is gone when it likes */
  OK(hfreduceCommDestroy(comm));
  WANT(!pinned());
  gpu_free(x);
  return 0;
}

static hfreduceStream_t get_stream(void) {
  hfreduceStream_t stream = NULL;
  hfr_cu_device device;
  CU(gpu.cu->context_device(&device));
  return hfreduceStreamGet(&stream, device) ? NULL : stream;
}

/* Streams that the library lends: one that waits is lent to nobody else, nor one in a capture, which asking does not break. */
static int lent_streams(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  hfr_cu_event event;
  uint32_t *word;
  hfr_cu_ptr address;
  struct graph g;
  (void)arg;
  CU(gpu.host_alloc((void **)&word, 4096, 2));
  CU(gpu.cu->host_device_pointer(&address, word, 0));
  CU(gpu.cu->event_create(&event, HFR_CU_EVENT_DISABLE_TIMING));
  hfreduceStream_t one = get_stream(), two = get_stream();
  WANT(one && two && one != two);
  OK(hfreduceStreamPut(one));
  WANT(get_stream() == one);
  *word = 0;
  CU(gpu.cu->stream_wait_value(one, address, 1, HFR_CU_WAIT_GEQ));
  OK(hfreduceStreamPut(one));
  OK(hfreduceStreamPut(two));
  WANT(hfreduceStreamPut(two) == hfreduceInvalidArgument && hfreduceStreamPut(stream) == hfreduceInvalidArgument);
  WANT(get_stream() == two);
  CU(gpu.begin(stream, HFR_CU_MODE_GLOBAL));
  CU(gpu.cu->event_record(event, stream));
  CU(gpu.cu->stream_wait_event(two, event, 0));
  OK(hfreduceStreamPut(two));
  hfreduceStream_t three = get_stream();
  WANT(three && three != one && three != two);
  CU(gpu.cu->event_record(event, two));
  CU(gpu.cu->stream_wait_event(stream, event, 0));
  CU(gpu.end(stream, &g.graph)); /* it was not broken */
  *word = 1;
  CU(gpu.stream_sync(one));
  hfreduceStream_t four = get_stream(), five = get_stream();
  WANT((four == one && five == two) || (four == two && five == one));
  OK(hfreduceStreamPut(three));
  OK(hfreduceStreamPut(four));
  OK(hfreduceStreamPut(five));
  CU(gpu.graph_destroy(g.graph));
  CU(gpu.cu->event_destroy(event));
  CU(gpu.host_free(word));
  OK(hfreduceCommDestroy(comm));
  return 0;
}

int main(int argc, char **argv) {
  static const struct gpu_case cases[] = {
      {"replay", replay, "2 1,1 3,1"},   {"threads", threads, "t2"},     {"teardown", teardown, "2 1,1"},
      {"refused", refused, "2"},         {"broken", broken, "2 1,1"},    {"idle", idle, "2 1,1"},
      {"invalidated", invalidated, "2"}, {"unretained", unretained, ""}, {"lent_streams", lent_streams, "1"},
  };
  return gpu_run_cases(cases, sizeof cases / sizeof *cases, argc, argv);
}
