/* The stand-in's links between devices: peer access, memory that processes share, and the kernels that use it, run by CPUs. */
#include "driver.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---------------------------------------------------------------- links */

EXPORT hfr_cu_result cuDeviceGetP2PAttribute(int *value, int attribute, hfr_cu_device from, hfr_cu_device to) {
  ENTER("cuDeviceGetP2PAttribute");
  if (from < 0 || to < 0 || from >= fake.devices || to >= fake.devices || from == to) return HFR_CU_INVALID_DEVICE;
  if (attribute != HFR_CU_P2P_ACCESS && attribute != HFR_CU_P2P_ATOMICS) return HFR_CU_INVALID_VALUE;
  *value = fake.nvlink > 1 && from / fake.nvlink == to / fake.nvlink;
  return HFR_CU_SUCCESS;
}

static struct CUctx_st *peers[64][2];
static int npeers;

EXPORT hfr_cu_result cuCtxEnablePeerAccess(hfr_cu_context peer, unsigned flags) {
  ENTER("cuCtxEnablePeerAccess");
  struct CUctx_st *here = fake_current();
  if (!here || !peer || peer == here) return HFR_CU_INVALID_CONTEXT;
  if (flags || npeers == 64) return HFR_CU_INVALID_VALUE;
  hfr_cu_result r = HFR_CU_SUCCESS;
  LOCK();
  for (int i = 0; i < npeers; i++)
    if (peers[i][0] == here && peers[i][1] == peer) r = HFR_CU_PEER_ACCESS_ALREADY_ENABLED;
  if (!r) peers[npeers][0] = here, peers[npeers++][1] = peer;
  UNLOCK();
  return r;
}

/* ---------------------------------------------------------------- memory of another process */

struct handle {
  char magic[8];
  pid_t pid;
  int fd;
  uint64_t id;
  size_t bytes;
};
_Static_assert(sizeof(struct handle) <= sizeof(struct hfr_cu_ipc), "a handle has 64 bytes");

EXPORT hfr_cu_result cuIpcGetMemHandle(struct hfr_cu_ipc *handle, hfr_cu_ptr pointer) {
  ENTER("cuIpcGetMemHandle");
  LOCK();
  struct fake_block *b = fake_block_of(pointer);
  int wrong = !b || b->freed || b->kind != FAKE_DEVICE || b->start != pointer || b->fd < 0;
  struct handle h = {"standin", getpid(), wrong ? -1 : b->fd, wrong ? 0 : b->id, wrong ? 0 : b->bytes};
  UNLOCK();
  memset(handle, 0, sizeof *handle);
  memcpy(handle, &h, sizeof h);
  return wrong ? HFR_CU_INVALID_VALUE : HFR_CU_SUCCESS;
}

static struct import {
  struct import *next;
  struct handle handle;
  uintptr_t start;
  struct fake_block *block;
  struct CUctx_st *context;
  int opened;
} * imports;

static struct import *import(const struct handle *h) {
  char path[64];
  size_t size = (h->bytes + 4095) / 4096 * 4096;
  snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)h->pid, h->fd);
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return NULL;
  uint8_t *seen = mmap(NULL, size, PROT_NONE, MAP_SHARED, fd, 0);
  uint8_t *alias = mmap(NULL, size + 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (seen == MAP_FAILED || alias == MAP_FAILED) return NULL;
  struct import *i = calloc(1, sizeof *i);
  i->handle = *h;
  i->block = fake_add_block(FAKE_IMPORTED, (uintptr_t)seen, alias, h->bytes);
  i->block->importers = (_Atomic int *)(alias + size);
  i->start = (uintptr_t)seen;
  i->context = fake_current();
  i->next = imports;
  return imports = i;
}

/* A handle that is open already gives the same memory once more; to open it in the process that it is of is an error. */
EXPORT hfr_cu_result cuIpcOpenMemHandle_v2(hfr_cu_ptr *pointer, struct hfr_cu_ipc given, unsigned flags) {
  ENTER("cuIpcOpenMemHandle");
  struct handle h;
  memcpy(&h, &given, sizeof h);
  if (!fake_current()) return HFR_CU_INVALID_CONTEXT;
  if (strcmp(h.magic, "standin") || flags != HFR_CU_IPC_LAZY_PEER_ACCESS) return HFR_CU_INVALID_VALUE;
  if (h.pid == getpid()) return HFR_CU_INVALID_CONTEXT;
  LOCK();
  struct import *i = imports;
  while (i && (memcmp(&i->handle, &h, sizeof h) || !i->opened)) i = i->next;
  if (!i) i = import(&h);
  if (i && !i->opened++) atomic_fetch_add(i->block->importers, 1);
  if (i) *pointer = i->start;
  UNLOCK();
  return i ? HFR_CU_SUCCESS : HFR_CU_INVALID_VALUE;
}

EXPORT hfr_cu_result cuIpcCloseMemHandle(hfr_cu_ptr pointer) {
  ENTER("cuIpcCloseMemHandle");
  if (!fake_current()) return HFR_CU_INVALID_CONTEXT;
  LOCK();
  struct import *i = imports;
  while (i && (i->start != pointer || !i->opened)) i = i->next;
  if (i && !--i->opened) {
    for (struct CUstream_st *s = fake.streams; s; s = s->next) fake_await(s, s->submitted); /* as freeing does */
    atomic_fetch_sub(i->block->importers, 1);
    i->block->freed = 1;
  }
  UNLOCK();
  return i ? HFR_CU_SUCCESS : HFR_CU_INVALID_VALUE;
}

/* ---------------------------------------------------------------- kernels */

typedef void kernel_function(void *dst, const void *first, const void *second, unsigned long long count, float scale);
struct CUfunc_st {
  struct CUfunc_st *next;
  struct CUctx_st *context;
  unsigned long long id; /* of the context, then */
  kernel_function *run;
  size_t size; /* of an element */
  int loaded;
  char name[48];
};
struct CUmod_st {
  struct CUctx_st *context;
  unsigned long long id;
};
struct fake_launch {
  const struct CUfunc_st *function;
  unsigned blocks, threads;
  uintptr_t dst, first, second;
  unsigned long long count;
  float scale;
};

/* The library's own kernels, compiled for the host, lie beside this library. */
static void *kernels(void) {
  static void *library;
  char path[600];
  Dl_info self;
  if (library) return library;
  dladdr((void *)&kernels, &self);
  const char *end = strrchr(self.dli_fname, '/');
  snprintf(path, sizeof path, "%.*s/kernels.so", (int)(end ? end - self.dli_fname : 1), end ? self.dli_fname : ".");
  library = dlopen(path, RTLD_NOW);
  if (!library) fake_die("no kernels: %s", dlerror());
  return library;
}

/* What stands in for the compiler (fake/nvrtc.c) makes no code. */
EXPORT hfr_cu_result cuModuleLoadData(hfr_cu_module *module, const void *image) {
  ENTER_BLOCKING("cuModuleLoadData");
  if (!fake_current()) return HFR_CU_INVALID_CONTEXT;
  if (strcmp(image, "code for the stand-in, 9.0")) fake_die("cuModuleLoadData: this is code for a GPU");
  *module = calloc(1, sizeof **module);
  (*module)->context = fake_current();
  (*module)->id = fake_current()->id;
  return HFR_CU_SUCCESS;
}

static size_t element_size(const char *name) {
  static const struct {
    const char *type;
    size_t size;
  } sizes[] = {{"float8", 1}, {"bfloat16", 2}, {"float16", 2}, {"float32", 4}, {"float64", 8}, {"uint8", 1},
               {"uint32", 4}, {"uint64", 8},   {"int8", 1},    {"int32", 4},   {"int64", 8}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    if (!strncmp(name, sizes[i].type, strlen(sizes[i].type))) return sizes[i].size;
  return 0;
}

EXPORT hfr_cu_result cuModuleGetFunction(hfr_cu_function *function, hfr_cu_module module, const char *name) {
  ENTER("cuModuleGetFunction");
  kernel_function *run;
  *(void **)&run = dlsym(kernels(), name);
  if (!run || strncmp(name, "hfr_pair_", 9)) return 500; /* CUDA_ERROR_NOT_FOUND */
  struct CUfunc_st *f = calloc(1, sizeof *f);
  f->context = module->context;
  f->id = module->id;
  f->run = run;
  f->size = element_size(name + 9);
  snprintf(f->name, sizeof f->name, "%s", name);
  LOCK();
  static struct CUfunc_st *all; /* so that nothing is lost */
  f->next = all;
  all = f;
  UNLOCK();
  *function = f;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuFuncLoad(hfr_cu_function function) {
  ENTER_BLOCKING("cuFuncLoad");
  function->loaded = 1;
  return HFR_CU_SUCCESS;
}

/* A kernel reaches the memory of its own context; that of another one only where peer access is enabled. */
static void check_reach(const struct CUfunc_st *f, uintptr_t address) {
  struct fake_block *b = fake_block_of(address);
  if (!b || b->kind == FAKE_REGISTERED) fake_die("%s: %#zx is no memory of a device", f->name, (size_t)address);
  if (b->kind == FAKE_IMPORTED || b->context == f->context || b->kind == FAKE_MANAGED) return;
  for (int i = 0; i < npeers; i++)
    if (peers[i][0] == f->context && peers[i][1] == b->context) return;
  fake_die("%s: %#zx is memory of another context, without peer access", f->name, (size_t)address);
}

EXPORT hfr_cu_result cuLaunchKernel(hfr_cu_function f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                    unsigned bz, unsigned shared, hfr_cu_stream stream, void **p, void **extra) {
  ENTER("cuLaunchKernel");
  if (gy != 1 || gz != 1 || by != 1 || bz != 1 || !gx || !bx || bx > 1024 || shared || extra) return HFR_CU_INVALID_VALUE;
  struct fake_launch *l = calloc(1, sizeof *l);
  *l = (struct fake_launch){
      f, gx, bx, *(uintptr_t *)p[0], *(uintptr_t *)p[1], *(uintptr_t *)p[2], *(unsigned long long *)p[3], *(float *)p[4]};
  LOCK();
  struct CUstream_st *s = fake_stream(stream);
  if (f->id != f->context->id) fake_die("%s: the context that it was loaded in is gone", f->name);
  if (!s || s->context != f->context) fake_die("%s: launched in a stream of another context", f->name);
  if (!f->loaded) fake_die("%s: loaded by its first launch, which may wait for all streams of the device", f->name);
  check_reach(f, l->dst), check_reach(f, l->first), check_reach(f, l->second);
  fake.kernels++;
  hfr_cu_result r = fake_put(s, (struct fake_op){.what = FAKE_KERNEL, .launch = l});
  UNLOCK();
  return r;
}

void fake_run_kernel(const struct fake_launch *l) {
  static void (*run)(kernel_function *, unsigned, unsigned, void *, const void *, const void *, unsigned long long, float);
  size_t bytes = (size_t)l->count * l->function->size;
  LOCK();
  if (!run) *(void **)&run = dlsym(kernels(), "run_on_host");
  void *dst = fake_bytes(l->dst, bytes, l->function->name);
  const void *first = fake_bytes(l->first, bytes, l->function->name), *second = fake_bytes(l->second, bytes, l->function->name);
  UNLOCK();
  static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER; /* they have no memory of their own for where they stand */
  pthread_mutex_lock(&one);
  run(l->function->run, l->blocks, l->threads, dst, first, second, l->count, l->scale);
  pthread_mutex_unlock(&one);
}
