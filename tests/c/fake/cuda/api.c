/* The stand-in's devices, contexts, versions, and the faults that a test wants. */
#include "driver.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

struct fake_driver fake = {.lock = PTHREAD_MUTEX_INITIALIZER, .moved = PTHREAD_COND_INITIALIZER};
_Thread_local int fake_in_host_function;

void fake_die(const char *format, ...) {
  char text[400];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  fprintf(stderr, "stand-in for CUDA (test double, no GPU): %s\n", text);
  fflush(NULL);
  abort();
}

/* ---------------------------------------------------------------- the script */

#define FAULTS_MAX 8
static struct fault {
  char call[48];
  int number, result, seen;
} faults[FAULTS_MAX];
static int nfaults;
static _Atomic uint64_t random_state;

static void read_script(void) {
  static int done;
  char word[96];
  int used;
  const char *p = getenv("FAKE_CUDA");
  if (done++) return;
  fake.devices = 2;
  fake.version = 12040;
  fake.mem_ops = fake.flush = 1;
  uint64_t seed = 1;
  for (p = p ? p : ""; sscanf(p, " %95s%n", word, &used) == 1; p += used) {
    struct fault f = {.number = 0};
    int value;
    if (sscanf(word, "devices=%d", &value) == 1)
      fake.devices = value;
    else if (sscanf(word, "delay=%d", &value) == 1)
      fake.delay_us = value;
    else if (sscanf(word, "seed=%d", &value) == 1)
      seed = (uint64_t)value;
    else if (sscanf(word, "reuse=%d", &value) == 1)
      fake.reuse = value;
    else if (sscanf(word, "flush=%d", &value) == 1)
      fake.flush = value;
    else if (sscanf(word, "nvlink=%d", &value) == 1)
      fake.nvlink = value;
    else if (sscanf(word, "depth=%d", &value) == 1)
      fake.depth = value;
    else if (!strcmp(word, "stale=crash"))
      fake.stale_crash = 1;
    else if (sscanf(word, "queues=%d", &value) == 1)
      fake.queues = value;
    else if (sscanf(word, "block=%d", &value) == 1)
      fake.block = value;
    else if (!strcmp(word, "memops=0"))
      fake.mem_ops = 0, fake.version = 11040;
    else if (sscanf(word, "fail=%47[^:]:%d:%d", f.call, &f.number, &f.result) == 3 && nfaults < FAULTS_MAX)
      faults[nfaults++] = f;
    else
      fake_die("cannot read \"%s\" in FAKE_CUDA", word);
  }
  random_state = seed * 0x9e3779b97f4a7c15u;
  const char *queues = getenv("CUDA_DEVICE_MAX_CONNECTIONS");
  const char *blocking = getenv("CUDA_LAUNCH_BLOCKING");
  fake.blocking = blocking && !strcmp(blocking, "1");
  fake.one_queue = queues && !strcmp(queues, "1");
  if (fake.queues) fake.queues = queues && atoi(queues) > 0 && atoi(queues) < 32 ? atoi(queues) : queues ? 32 : 8;
}

void fake_delay(void) {
  if (!fake.delay_us) return;
  uint64_t x = random_state;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  random_state = x;
  struct timespec t = {0, (long)(x % (uint64_t)fake.delay_us) * 1000};
  nanosleep(&t, NULL);
}

void fake_blocks(void) {
  while (fake.block && fake.waits) pthread_cond_wait(&fake.moved, &fake.lock);
}

/* For tests of this library alone: how many waits of streams for words are pending. */
EXPORT int fake_cuda_waits(void);
EXPORT int fake_cuda_waits(void) {
  LOCK();
  int n = fake.waits;
  UNLOCK();
  return n;
}

hfr_cu_result fake_enter(const char *call, int needs_init) {
  char name[16] = "";
  if (fake_in_host_function) fake_die("%s: called from a host function", call);
  prctl(PR_GET_NAME, name);
  if (!strncmp(name, "hfr-", 4)) fake_die("%s: called from the thread %s", call, name);
  LOCK();
  read_script();
  hfr_cu_result r = HFR_CU_SUCCESS;
  for (int i = 0; i < nfaults; i++)
    if (!strcmp(faults[i].call, call) && (++faults[i].seen == faults[i].number || !faults[i].number)) r = faults[i].result;
  if (needs_init && fake.pid != getpid()) r = HFR_CU_NOT_INITIALIZED; /* nor in a child of who initialised it */
  UNLOCK();
  return r;
}

/* ---------------------------------------------------------------- devices */

EXPORT hfr_cu_result cuInit(unsigned flags) {
  hfr_cu_result r = fake_enter("cuInit", 0);
  if (r) return r;
  if (flags) return HFR_CU_INVALID_VALUE;
  LOCK();
  if (fake.pid && fake.pid != getpid())
    r = HFR_CU_NOT_INITIALIZED;
  else if (!fake.devices)
    r = HFR_CU_NO_DEVICE;
  else
    fake.pid = getpid();
  for (int i = 0; i < fake.devices; i++) fake.primary[i] = (struct CUctx_st){.device = i, .primary = 1, .id = ++fake.contexts};
  UNLOCK();
  return r;
}

EXPORT hfr_cu_result cuDriverGetVersion(int *version) {
  hfr_cu_result r = fake_enter("cuDriverGetVersion", 0);
  *version = fake.version;
  return r;
}

static const struct {
  int result;
  const char *name, *text;
} results[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
};

static hfr_cu_result text_of(hfr_cu_result error, int name, const char **text) {
  for (size_t i = 0; i < sizeof results / sizeof *results; i++)
    if (results[i].result == error) return *text = name ? results[i].name : results[i].text, HFR_CU_SUCCESS;
  *text = NULL;
  return HFR_CU_INVALID_VALUE;
}
EXPORT hfr_cu_result cuGetErrorName(hfr_cu_result error, const char **text) { return text_of(error, 1, text); }
EXPORT hfr_cu_result cuGetErrorString(hfr_cu_result error, const char **text) { return text_of(error, 0, text); }

EXPORT hfr_cu_result cuDeviceGetCount(int *count) {
  ENTER("cuDeviceGetCount");
  *count = fake.devices;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuDeviceGet(hfr_cu_device *device, int ordinal) {
  ENTER("cuDeviceGet");
  if (ordinal < 0 || ordinal >= fake.devices) return HFR_CU_INVALID_DEVICE;
  *device = ordinal;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuDeviceGetName(char *name, int size, hfr_cu_device device) {
  ENTER("cuDeviceGetName");
  snprintf(name, (size_t)size, "stand-in %d (test double), no GPU", device);
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuDeviceTotalMem_v2(size_t *bytes, hfr_cu_device device) {
  ENTER("cuDeviceTotalMem");
  (void)device;
  *bytes = (size_t)1 << 30;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuDeviceGetAttribute(int *value, int attribute, hfr_cu_device device) {
  ENTER("cuDeviceGetAttribute");
  switch (attribute) {
    case HFR_CU_ATTR_PCI_BUS: *value = 0x10 + device; break;
    case HFR_CU_ATTR_PCI_DEVICE: *value = 0; break;
    case HFR_CU_ATTR_PCI_DOMAIN: *value = 0xfffe; break;
    case HFR_CU_ATTR_CAPABILITY_MAJOR: *value = 9; break;
    case HFR_CU_ATTR_CAPABILITY_MINOR: *value = 0; break;
    case HFR_CU_ATTR_COPY_ENGINES: *value = 2; break;
    case HFR_CU_ATTR_MEM_OPS_V1: *value = fake.mem_ops; break;
    case HFR_CU_ATTR_FLUSH_REMOTE_WRITES: *value = fake.flush; break;
    default: return HFR_CU_INVALID_VALUE;
  }
  return HFR_CU_SUCCESS;
}

/* ---------------------------------------------------------------- contexts */

static _Thread_local struct CUctx_st *stack[64];
static _Thread_local int depth;

struct CUctx_st *fake_current(void) {
  return depth ? stack[depth - 1] : NULL;
}

EXPORT hfr_cu_result cuDevicePrimaryCtxRetain(hfr_cu_context *context, hfr_cu_device device) {
  ENTER("cuDevicePrimaryCtxRetain");
  if (device < 0 || device >= fake.devices) return HFR_CU_INVALID_DEVICE;
  LOCK();
  fake.retained[device]++;
  UNLOCK();
  *context = &fake.primary[device];
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuDevicePrimaryCtxRelease_v2(hfr_cu_device device) {
  ENTER("cuDevicePrimaryCtxRelease");
  LOCK();
  int held = fake.retained[device] > 0;
  fake.retained[device] -= held;
  UNLOCK();
  return held ? HFR_CU_SUCCESS : HFR_CU_INVALID_CONTEXT;
}

EXPORT hfr_cu_result cuCtxCreate_v2(hfr_cu_context *context, unsigned flags, hfr_cu_device device) {
  ENTER("cuCtxCreate");
  (void)flags;
  *context = calloc(1, sizeof **context);
  (*context)->device = device;
  LOCK();
  (*context)->id = ++fake.contexts;
  UNLOCK();
  stack[depth++] = *context;
  return HFR_CU_SUCCESS;
}

/* What cuGetProcAddress gives for cuCtxCreate from version 11.4 of the interface on. */
EXPORT hfr_cu_result cuCtxCreate_v3(hfr_cu_context *context, void *affinity, int count, unsigned flags, hfr_cu_device device) {
  (void)context, (void)affinity, (void)count, (void)flags, (void)device;
  fake_die("cuCtxCreate: a caller that means the form of three parameters got that of five: take cuCtxCreate_v2 by its symbol");
}

EXPORT hfr_cu_result cuCtxDestroy_v2(hfr_cu_context context) {
  ENTER("cuCtxDestroy");
  context->destroyed = 1;
  if (fake_current() == context) depth--;
  return HFR_CU_SUCCESS;
}

/* What lives in the context goes with it; another one, at the same address, takes its place. */
EXPORT hfr_cu_result cuDevicePrimaryCtxReset_v2(hfr_cu_device device) {
  ENTER("cuDevicePrimaryCtxReset");
  if (device < 0 || device >= fake.devices) return HFR_CU_INVALID_DEVICE;
  struct CUctx_st *c = &fake.primary[device];
  LOCK();
  for (struct CUstream_st *s = fake.streams; s; s = s->next)
    if (s->context == c) fake_await(s, s->submitted), s->destroyed = 1;
  c->legacy = NULL;
  c->id = ++fake.contexts;
  fake_free_all(c);
  UNLOCK();
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuCtxGetId(hfr_cu_context context, unsigned long long *id) {
  ENTER("cuCtxGetId");
  *id = context ? context->id : 0;
  return context ? HFR_CU_SUCCESS : HFR_CU_INVALID_CONTEXT;
}

EXPORT hfr_cu_result cuCtxPushCurrent_v2(hfr_cu_context context) {
  ENTER("cuCtxPushCurrent");
  if (!context) return HFR_CU_INVALID_CONTEXT;
  if (context->destroyed) return HFR_CU_CONTEXT_IS_DESTROYED;
  if (depth == 64) fake_die("cuCtxPushCurrent: 64 contexts on the stack: a pop is missing");
  stack[depth++] = context;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuCtxPopCurrent_v2(hfr_cu_context *context) {
  ENTER("cuCtxPopCurrent");
  if (!depth) return HFR_CU_INVALID_CONTEXT;
  *context = stack[--depth];
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuCtxSetCurrent(hfr_cu_context context) {
  ENTER("cuCtxSetCurrent");
  depth = context ? 1 : 0;
  stack[0] = context;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuCtxGetCurrent(hfr_cu_context *context) {
  ENTER("cuCtxGetCurrent");
  *context = fake_current();
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuCtxGetDevice(hfr_cu_device *device) {
  ENTER("cuCtxGetDevice");
  if (!fake_current()) return HFR_CU_INVALID_CONTEXT;
  *device = fake_current()->device;
  return HFR_CU_SUCCESS;
}

/* ---------------------------------------------------------------- finding functions */

EXPORT hfr_cu_result cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  static const char *const suffix[] = {"_v3", "_v2", ""};
  char symbol[80];
  Dl_info self;
  hfr_cu_result r = fake_enter("cuGetProcAddress", 0);
  *function = NULL;
  if (r || version > fake.version || flags != HFR_CU_PROC_LEGACY_STREAM) return r ? r : HFR_CU_INVALID_VALUE;
  dladdr((void *)&fake_enter, &self);
  void *library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  for (int i = version < 11040; i < 3 && !*function; i++) {
    snprintf(symbol, sizeof symbol, "%s%s", name, suffix[i]);
    *function = dlsym(library, symbol);
  }
  dlclose(library);
  *status = *function ? 0 : 1;
  return *function ? HFR_CU_SUCCESS : 500;
}

/* For tests of this library alone: what went through it, and how many kernels ran. */
EXPORT uint64_t fake_cuda_kernels(void);
EXPORT uint64_t fake_cuda_kernels(void) {
  LOCK();
  uint64_t n = fake.kernels;
  UNLOCK();
  return n;
}
EXPORT void fake_cuda_counts(uint64_t *copies, uint64_t *launches);
EXPORT void fake_cuda_counts(uint64_t *copies, uint64_t *launches) {
  LOCK();
  *copies = fake.copies;
  *launches = fake.launches;
  UNLOCK();
}
