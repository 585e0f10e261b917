/* Pairs of devices that NVLink joins: found, made to reach each other's memory, and used. */
#include "cuda.h"

#include "../base/log.h"
#include "../base/mac.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---------------------------------------------------------------- links */

static uint32_t pci_of(const struct hfr_cu *cu, int device) {
  int domain = 0, bus = 0, slot = 0;
  if (cu->device_attribute(&domain, HFR_CU_ATTR_PCI_DOMAIN, device) || cu->device_attribute(&bus, HFR_CU_ATTR_PCI_BUS, device) ||
      cu->device_attribute(&slot, HFR_CU_ATTR_PCI_DEVICE, device))
    return 0;
  return (uint32_t)domain << 16 | ((uint32_t)bus & 0xff) << 8 | ((uint32_t)slot & 0xff);
}

/* PCI lets devices reach each other too, but has no atomic operations between them. */
static int by_nvlink(const struct hfr_cu *cu, int from, int to) {
  int access = 0, atomics = 0;
  return !cu->p2p_attribute(&access, HFR_CU_P2P_ACCESS, from, to) && access &&
         !cu->p2p_attribute(&atomics, HFR_CU_P2P_ATOMICS, from, to) && atomics;
}

static const char *why_no_pairs(const struct hfr_cu *cu, int device) {
  if (!hfr_param_int(HFR_PARAM_NVLINK)) return "off until hardware has run pairs: HFREDUCE_NVLINK=1 switches them on";
  if (!cu->p2p_attribute || !cu->peer_enable || !cu->ipc_get || !cu->ipc_open || !cu->ipc_close || !cu->module_load ||
      !cu->module_function || !cu->launch)
    return "the driver is too old";
  return !hfr_cuda_mem_ops_wanted() || !hfr_cuda_mem_ops(cu, device) ? "no stream memory operations" : NULL;
}

const char *hfr_device_links(int device, struct hfr_links *links) {
  const struct hfr_cu *cu = hfr_device_present() ? hfr_cuda() : NULL;
  int count = 0, n = 0;
  *links = (struct hfr_links){0};
  if (!cu || device < 0 || cu->device_count(&count)) return "no driver";
  const char *why = why_no_pairs(cu, device);
  for (int i = 0; !why && i < count && n < HFR_LINKS_MAX; i++)
    if (i != device && by_nvlink(cu, device, i)) links->peer[n++] = pci_of(cu, i);
  if (!why) why = n ? hfr_kernels_why_absent() : "NVLink joins it with no other device that this process sees";
  if (!why) links->self = pci_of(cu, device);
  return why;
}

static int lists(const struct hfr_links *links, uint32_t pci) {
  for (int i = 0; i < HFR_LINKS_MAX; i++)
    if (pci && links->peer[i] == pci) return 1;
  return 0;
}

int hfr_links_join(const struct hfr_links *a, const struct hfr_links *b) {
  return a->self && b->self && lists(a, b->self) && lists(b, a->self);
}

size_t hfr_pair_describe(const struct hfr_cu *cu, int count, char *text, size_t size) {
  size_t n = 0;
  struct hfr_links links;
  for (int i = 0; i < count && n < size; i++) {
    const char *why = hfr_device_links(i, &links);
    if (why && n + 1 < size) n += (size_t)snprintf(text + n, size - n, "device cuda %d NVLink: not used: %s\n", i, why);
    if (why) continue;
    n += (size_t)snprintf(text + n, size - n, "device cuda %d NVLink: joined with", i);
    for (int j = 0; j < count && n < size; j++)
      if (lists(&links, pci_of(cu, j))) n += (size_t)snprintf(text + n, size - n, " %d", j);
    if (n < size)
      n += (size_t)snprintf(text + n, size - n, "; pairs reduce with kernels that NVRTC %d.%d compiles\n",
                            hfr_kernels_compiler() / 100, hfr_kernels_compiler() % 100);
  }
  return n;
}

/* ---------------------------------------------------------------- memory */

/*
 * Memory that another process may have open must not be freed. So it is kept, for the next pair: once the partner says that he
 * writes there no more, which may be long after this side has ended.
 */
struct room {
  struct room *next;
  void *context;
  uintptr_t at;
  uint64_t id; /* of the allocation */
  size_t bytes;
  int used;
  const _Atomic uint32_t *ended; /* the partner's word, on a page that is mapped for it; NULL: it is not waited for */
  int lost;                      /* nobody will say it */
};
#define PAGE 4096

static struct {
  pthread_mutex_t lock;
  struct room *list;
  uint64_t process; /* this one's number */
  pid_t pid;
} rooms = {.lock = PTHREAD_MUTEX_INITIALIZER};

static uint64_t number_of_process(void) {
  pthread_mutex_lock(&rooms.lock);
  if (rooms.pid != getpid()) {
    hfr_random(&rooms.process, sizeof rooms.process);
    rooms.list = NULL; /* a forked child's memory is not the parent's */
    rooms.pid = getpid();
  }
  pthread_mutex_unlock(&rooms.lock);
  return rooms.process;
}

static void *page_of(const _Atomic uint32_t *word) { return (void *)((uintptr_t)word & ~(uintptr_t)(PAGE - 1)); }

/* Has the partner ended? Then the page of his word goes. */
static int is_free(struct room *r) {
  if (r->used || r->lost) return 0;
  if (r->ended && !atomic_load_explicit(r->ended, memory_order_acquire)) return 0;
  if (r->ended) munmap(page_of(r->ended), PAGE);
  r->ended = NULL;
  return 1;
}

/* A context may have been destroyed, with its memory, and another one, and other memory, have their addresses: it goes by the
 * number of the allocation. */
static struct room *find_room(const struct hfr_cu *cu, void *context, size_t bytes) {
  for (struct room *r = rooms.list; r; r = r->next) {
    if (r->context != context || r->bytes != bytes || !is_free(r)) continue;
    if (r->id && hfr_cuda_memory_id(cu, r->at) == r->id) return r;
    r->lost = 1;
  }
  return NULL;
}

static hfreduceResult_t take_room(const struct hfr_cu *cu, void *context, size_t bytes, struct room **out) {
  int failed = 0;
  pthread_mutex_lock(&rooms.lock);
  struct room *r = find_room(cu, context, bytes);
  if (!r && (r = calloc(1, sizeof *r))) {
    *r = (struct room){.next = rooms.list, .context = context, .bytes = bytes};
    failed = cu->mem_alloc(&r->at, bytes);
    if (!failed) r->id = hfr_cuda_memory_id(cu, r->at);
    if (failed)
      free(r), r = NULL;
    else
      rooms.list = r;
  }
  if (r) r->used = 1;
  pthread_mutex_unlock(&rooms.lock);
  *out = r;
  if (failed) return hfr_cuda_fail("cuMemAlloc", failed);
  return r ? hfreduceSuccess : hfr_fail(hfreduceSystemError, "out of memory");
}

/* The word's memory may go before the word is said: its page is mapped once more. */
static void give_room(struct room *r, const _Atomic uint32_t *ended) {
  uint8_t *page = ended ? mremap(page_of(ended), 0, PAGE, MREMAP_MAYMOVE) : NULL;
  pthread_mutex_lock(&rooms.lock);
  r->used = 0;
  r->lost = page == MAP_FAILED;
  if (page && !r->lost) r->ended = (const _Atomic uint32_t *)(page + ((uintptr_t)ended & (PAGE - 1)));
  pthread_mutex_unlock(&rooms.lock);
}

/* ---------------------------------------------------------------- pairs */

struct hfr_pair {
  const struct hfr_cu *cu;
  struct hfr_copier *copier;
  const struct hfr_kernels *kernels;
  struct room *room;
  uintptr_t theirs;
  size_t bytes;
  int opened; /* theirs is another process' memory */
};

#define GRAIN \
  ((size_t)2 << 20) /* what is smaller the driver may put beside other memory, all of which a handle gives access to */

#define TRY_CU(pair, member, call, ...)       \
  do {                                        \
    int r_ = (pair)->cu->member(__VA_ARGS__); \
    if (r_) return hfr_cuda_fail(call, r_);   \
  } while (0)

static hfreduceResult_t open_side(struct hfr_pair *p, int device, void *context, struct hfr_pair_memory *mine) {
  HFR_TRY(hfr_kernels_load(device, context, &p->kernels));
  HFR_TRY(take_room(p->cu, context, p->bytes, &p->room));
  struct hfr_cu_ipc handle;
  TRY_CU(p, ipc_get, "cuIpcGetMemHandle", &handle, p->room->at);
  mine->pointer = p->room->at;
  mine->bytes = p->bytes;
  memcpy(mine->handle, &handle, sizeof mine->handle);
  return hfreduceSuccess;
}

hfreduceResult_t hfr_pair_create(int device, void *context, size_t bytes, struct hfr_pair **out, struct hfr_pair_memory *mine) {
  struct hfr_pair *p = calloc(1, sizeof *p);
  if (!p) return hfr_fail(hfreduceSystemError, "out of memory");
  *mine = (struct hfr_pair_memory){.process = number_of_process(), .context = (uintptr_t)context};
  p->cu = hfr_cuda();
  p->bytes = bytes = (bytes + GRAIN - 1) / GRAIN * GRAIN;
  hfreduceResult_t r = hfr_copier_create(device, context, HFR_PAIR_MARKS, &p->copier);
  if (!r) r = hfr_copier_enter(p->copier, 0);
  if (!r) {
    r = open_side(p, device, context, mine);
    hfr_copier_leave(p->copier);
  }
  if (!r) return *out = p, r;
  hfreduceErrorInfo_t why = *hfr_last_error();
  hfr_pair_destroy(p, NULL, 1000000000);
  *hfr_last_error() = why;
  return r;
}

static hfreduceResult_t reach(struct hfr_pair *p, const struct hfr_pair_memory *theirs) {
  struct hfr_cu_ipc handle;
  if (theirs->process != number_of_process()) {
    memcpy(&handle, theirs->handle, sizeof handle);
    TRY_CU(p, ipc_open, "cuIpcOpenMemHandle", &p->theirs, handle, HFR_CU_IPC_LAZY_PEER_ACCESS);
    p->opened = 1;
    return hfreduceSuccess;
  }
  int r = p->cu->peer_enable((hfr_cu_context)theirs->context, 0);
  if (r && r != HFR_CU_PEER_ACCESS_ALREADY_ENABLED) return hfr_cuda_fail("cuCtxEnablePeerAccess", r);
  p->theirs = theirs->pointer;
  return hfreduceSuccess;
}

hfreduceResult_t hfr_pair_meet(struct hfr_pair *p, const struct hfr_pair_memory *theirs) {
  if (theirs->bytes != p->bytes)
    return hfr_fail(hfreduceInternalError, "the partner over NVLink has %llu bytes for this rank, which needs %zu",
                    (unsigned long long)theirs->bytes, p->bytes);
  HFR_TRY(hfr_copier_enter(p->copier, 0));
  hfreduceResult_t r = reach(p, theirs);
  hfr_copier_leave(p->copier);
  return r;
}

int hfr_pair_destroy(struct hfr_pair *p, const _Atomic uint32_t *ended, int64_t limit_ns) {
  void *context = p->copier ? hfr_copier_context(p->copier) : NULL;
  int drained = p->copier ? hfr_copier_destroy(p->copier, limit_ns) : 1;
  hfr_cu_context popped;
  if (drained && p->opened && !p->cu->context_push(context)) {
    p->cu->ipc_close(p->theirs);
    p->cu->context_pop(&popped);
  }
  if (drained && p->room) give_room(p->room, ended);
  free(p);
  return drained;
}

struct hfr_copier *hfr_pair_copier(const struct hfr_pair *p) {
  return p->copier;
}
uintptr_t hfr_pair_address(const struct hfr_pair *p, size_t at) { return p->room->at + at; }

/* ---------------------------------------------------------------- work */

hfreduceResult_t hfr_pair_push(struct hfr_pair *p, enum hfr_queue queue, size_t at, uintptr_t from, size_t bytes) {
  if (bytes) TRY_CU(p, copy_async, "cuMemcpyAsync", p->theirs + at, from, bytes, hfr_copier_stream(p->copier, queue));
  return hfreduceSuccess;
}

hfreduceResult_t hfr_pair_take(struct hfr_pair *p, enum hfr_queue queue, uintptr_t to, size_t at, size_t bytes) {
  if (bytes) TRY_CU(p, copy_async, "cuMemcpyAsync", to, p->room->at + at, bytes, hfr_copier_stream(p->copier, queue));
  return hfreduceSuccess;
}

#define THREADS 512

hfreduceResult_t hfr_pair_reduce(struct hfr_pair *p, enum hfr_queue queue, const struct hfr_pair_sum *sum) {
  uintptr_t to = sum->to, arrived = p->room->at + sum->from;
  uintptr_t first = sum->lower ? sum->own : arrived, second = sum->lower ? arrived : sum->own;
  unsigned long long count = sum->count;
  float scale = sum->scale;
  void *parameters[] = {&to, &first, &second, &count, &scale};
  if (!count) return hfreduceSuccess;
  size_t needed = (sum->count * sum->esize + 16 * THREADS - 1) / (16 * THREADS);
  unsigned most = (unsigned)hfr_param_int(HFR_PARAM_NVLINK_BLOCKS), blocks = needed < most ? (unsigned)needed : most;
  TRY_CU(p, launch, "cuLaunchKernel", hfr_kernels_pair(p->kernels, sum->dtype, sum->op), blocks, 1, 1, THREADS, 1, 1, 0,
         hfr_copier_stream(p->copier, queue), parameters, NULL);
  return hfreduceSuccess;
}
