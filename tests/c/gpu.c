/* The driver's interface, as tests use it. */
#include "gpu.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct gpu gpu;

void gpu_check(hfr_cu_result result, const char *what) {
  char text[160];
  if (!result) return;
  fprintf(stderr, "%s: %s\n", what, hfr_cu_error(result, text));
  abort();
}

static void find(void *member, const char *name, const char *symbol) {
  *(void **)member = hfr_cu_find(name, symbol);
  if (*(void **)member) return;
  fprintf(stderr, "the driver has no %s\n", name);
  abort();
}

/* By its symbol: cuGetProcAddress gives another form of the function, that of the version asked for. */
static void find_symbol(void *member, const char *symbol) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *(void **)member = driver ? dlsym(driver, symbol) : NULL;
  if (driver) dlclose(driver); /* the device layer has it open */
  if (*(void **)member) return;
  fprintf(stderr, "the driver has no %s\n", symbol);
  abort();
}

static void find_all(void) {
  find(&gpu.managed, "cuMemAllocManaged", "cuMemAllocManaged");
  find(&gpu.host_alloc, "cuMemHostAlloc", "cuMemHostAlloc");
  find(&gpu.host_free, "cuMemFreeHost", "cuMemFreeHost");
  find(&gpu.stream_sync, "cuStreamSynchronize", "cuStreamSynchronize");
  find(&gpu.stream_priority, "cuStreamGetPriority", "cuStreamGetPriority");
  find(&gpu.set_current, "cuCtxSetCurrent", "cuCtxSetCurrent");
  find(&gpu.set8, "cuMemsetD8Async", "cuMemsetD8Async");
  find(&gpu.begin, "cuStreamBeginCapture", "cuStreamBeginCapture_v2");
  find(&gpu.end, "cuStreamEndCapture", "cuStreamEndCapture");
  find(&gpu.instantiate, "cuGraphInstantiateWithFlags", "cuGraphInstantiateWithFlags");
  find(&gpu.launch, "cuGraphLaunch", "cuGraphLaunch");
  find(&gpu.graph_destroy, "cuGraphDestroy", "cuGraphDestroy");
  find(&gpu.exec_destroy, "cuGraphExecDestroy", "cuGraphExecDestroy");
  find_symbol(&gpu.context_create, "cuCtxCreate_v2");
  find(&gpu.context_destroy, "cuCtxDestroy", "cuCtxDestroy_v2");
  find(&gpu.reset, "cuDevicePrimaryCtxReset", "cuDevicePrimaryCtxReset_v2");
}

static void open_once(void) {
  const char *why;
  char name[128] = "";
  gpu.cu = hfr_cu_load(&why);
  if (!gpu.cu || gpu.cu->init(0) || gpu.cu->device_count(&gpu.devices)) gpu.devices = 0;
  if (!gpu.devices) return;
  find_all();
  gpu.cu->device_name(name, sizeof name, 0);
  gpu.stand_in = strstr(name, "stand-in") != NULL;
  const char *script = getenv("FAKE_CUDA");
  gpu.tells_stale = gpu.stand_in && !(script && strstr(script, "stale=crash"));
}

int gpu_open(int device) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  hfr_cu_context context;
  pthread_once(&once, open_once);
  if (!gpu.devices) return 0;
  CU(gpu.cu->primary_retain(&context, device % gpu.devices));
  CU(gpu.set_current(context));
  return 1;
}

void *gpu_alloc(size_t bytes) {
  hfr_cu_ptr p;
  CU(gpu.cu->mem_alloc(&p, bytes ? bytes : 1));
  return (void *)p;
}

void gpu_free(void *pointer) { CU(gpu.cu->mem_free((hfr_cu_ptr)pointer)); }

hfr_cu_stream gpu_stream(void) {
  hfr_cu_stream s;
  CU(gpu.cu->stream_create(&s, HFR_CU_STREAM_NON_BLOCKING, 0));
  return s;
}

void gpu_copy(void *to, const void *from, size_t bytes, hfr_cu_stream stream) {
  if (bytes) CU(gpu.cu->copy_async((hfr_cu_ptr)to, (hfr_cu_ptr)from, bytes, stream));
}

void gpu_fill(void *to, int byte, size_t bytes, hfr_cu_stream stream) {
  if (bytes) CU(gpu.set8((hfr_cu_ptr)to, (unsigned char)byte, bytes, stream));
}

void gpu_read(void *to, const void *from, size_t bytes, hfr_cu_stream stream) {
  CU(gpu.stream_sync(stream));
  if (!bytes) return;
  CU(gpu.cu->copy_async((hfr_cu_ptr)to, (hfr_cu_ptr)from, bytes, stream));
  CU(gpu.stream_sync(stream));
}

double gpu_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int gpu_runs_dry(hfr_cu_stream stream, double seconds) {
  for (double end = gpu_now() + seconds; gpu.cu->stream_query(stream) == HFR_CU_NOT_READY; usleep(1000))
    if (gpu_now() > end) return 0;
  return 1;
}

hfreduceResult_t gpu_error_of(hfreduceComm_t comm, double seconds) {
  hfreduceResult_t error = hfreduceSuccess;
  for (double end = gpu_now() + seconds; !error && gpu_now() < end; usleep(1000)) hfreduceCommGetAsyncError(comm, &error);
  return error;
}

hfreduceComm_t gpu_join(int rank, int n, const hfreduceUniqueId *id) {
  hfreduceComm_t comm = NULL;
  if (!gpu_open(rank)) exit(77);
  if (!hfreduceCommInitRank(&comm, n, *id, rank)) return comm;
  fprintf(stderr, "rank %d: init: %s\n", rank, hfreduceGetLastError(NULL));
  exit(1);
}

/* ---------------------------------------------------------------- cases */

#define LIMIT_S 100

static int run_one(const struct gpu_case *c, const char *layout, void *quick) {
  int failed = *layout == 't' ? run_threads(atoi(layout + 1), c->function, quick, LIMIT_S)
                              : run_processes(layout, c->function, quick, LIMIT_S);
  if (failed) fprintf(stderr, "%s, %s: %d ranks failed\n", c->name, layout, failed);
  return failed != 0;
}

/* 0 no driver, 1 a driver, 2 the stand-in. In a process of its own: the ranks are forked, and a driver does not survive that. */
static int which_driver(void) {
  int status;
  fflush(NULL);
  pid_t probe = fork();
  if (!probe) _exit(!gpu_open(0) ? 0 : gpu.stand_in ? 2 : 1);
  return waitpid(probe, &status, 0) == probe && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

int gpu_run_cases(const struct gpu_case *cases, int n, int argc, char **argv) {
  int quick = argc > 1 && !strcmp(argv[1], "--quick"), ran = 0, failed = 0, skipped = 0, driver = which_driver();
  if (!driver) return printf("no CUDA driver here\n"), 77;
  for (int threads = 0; threads < 2; threads++) /* a process that has called the driver forks no more ranks */
    for (int i = 0; i < n; i++) {
      char layouts[200], *rest = layouts, *one;
      if (argc > 1 + quick && strcmp(argv[1 + quick], cases[i].name)) continue;
      snprintf(layouts, sizeof layouts, "%s", cases[i].layouts);
      if (argc > 2 + quick) snprintf(layouts, sizeof layouts, "%s", argv[2 + quick]);
      for (int j = 3 + quick; j < argc; j++)
        snprintf(layouts + strlen(layouts), sizeof layouts - strlen(layouts), " %s", argv[j]);
      while ((one = strsep(&rest, " "))) {
        if (!*one || (*one == 't') != threads) continue;
        if (threads && gpu.apart && !strcmp(gpu.apart, cases[i].name) && gpu_open(0) && gpu.devices < atoi(one + 1)) {
          printf("%s %s: skipped: it needs a device for each of %s threads, and there is %d\n", cases[i].name, one, one + 1,
                 gpu.devices);
          skipped++;
          continue;
        }
        ran++;
        failed += run_one(&cases[i], one, quick ? argv : NULL);
      }
    }
  if (!ran && skipped) return 77;
  printf("on %s: %d runs, %d failed\n", driver == 2 ? "a stand-in driver (test double, no GPU)" : "a CUDA driver", ran, failed);
  return failed || !ran;
}
