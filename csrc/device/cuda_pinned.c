/*
 * Pinned memory. The pool keeps freed blocks pinned and gives them out again: a driver may keep the calls that pin and unpin
 * waiting until no stream waits for a word. A caller that knows that none does has the pool unpin them (hfr_pinned_trim).
 */
#include "cuda.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct kept {
  struct kept *next;
  struct hfr_pinned memory;
};
static struct {
  pthread_mutex_t lock;
  struct kept *list;
  _Atomic size_t bytes;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

#define MPOL_PREFERRED_NODE 1

static hfreduceResult_t pin(struct hfr_copier *c, uint8_t *p, size_t size, struct hfr_pinned *m) {
  const struct hfr_cu *cu = hfr_cuda();
  int on = hfr_copier_device(c), node = hfr_cuda_numa(cu, on);
  if (node >= 0 && node < 64) {
    unsigned long mask = 1ul << node;
    syscall(SYS_mbind, p, size, MPOL_PREFERRED_NODE, &mask, sizeof mask * 8, 0); /* better there, but anywhere will do */
  }
  uintptr_t device = 0;
  int r = cu->host_register(p, size, HFR_CU_HOST_PORTABLE | HFR_CU_HOST_DEVICEMAP);
  if (!r && (r = cu->host_device_pointer(&device, p, 0))) cu->host_unregister(p);
  if (r) {
    int forbidden = r == HFR_CU_NOT_PERMITTED || r == HFR_CU_NOT_SUPPORTED;
    hfr_cuda_fail("cuMemHostRegister", r);
    char text[200];
    snprintf(text, sizeof text, "%.199s", hfr_last_error()->text);
    return hfr_fail(hfreduceUnhandledCudaError, "cannot pin %zu bytes for device %d: %s; %s", size, on, text,
                    forbidden
                        ? "the driver forbids registering host memory, as it does in confidential mode: copy to host memory, "
                          "and call on that"
                        : "lower HFREDUCE_CUDA_SEGMENT or raise ulimit -l");
  }
  *m = (struct hfr_pinned){.host = p,
                           .device = device,
                           .bytes = size,
                           .context = hfr_copier_context(c),
                           .context_id = hfr_cuda_context_id(cu, hfr_copier_context(c))};
  return hfreduceSuccess;
}

/* The smallest block of this context that holds so much, unless it holds a lot more. */
static int take(void *context, size_t size, struct hfr_pinned *m) {
  unsigned long long id = hfr_cuda_context_id(hfr_cuda(), context);
  struct kept **best = NULL;
  pthread_mutex_lock(&pool.lock);
  for (struct kept **at = &pool.list; *at; at = &(*at)->next) {
    const struct hfr_pinned *k = &(*at)->memory;
    if (k->context != context || k->context_id != id || k->bytes < size || k->bytes > 2 * size + 16384) continue;
    if (!best || k->bytes < (*best)->memory.bytes) best = at;
  }
  struct kept *taken = best ? *best : NULL;
  if (taken) {
    *best = taken->next;
    pool.bytes -= taken->memory.bytes;
    *m = taken->memory;
  }
  pthread_mutex_unlock(&pool.lock);
  free(taken);
  return taken != NULL;
}

hfreduceResult_t hfr_pinned_alloc(struct hfr_copier *c, size_t bytes, struct hfr_pinned *m) {
  size_t size = (bytes + 4095) / 4096 * 4096;
  if (take(hfr_copier_context(c), size, m)) return memset(m->host, 0, size), hfreduceSuccess;
  uint8_t *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return hfr_fail(hfreduceSystemError, "cannot get %zu bytes of pinned memory: %s", size, strerror(errno));
  madvise(p, size, MADV_DONTFORK); /* a child's copy-on-write would move the pages under the device */
  hfreduceResult_t r = pin(c, p, size, m);
  if (r) munmap(p, size);
  return r;
}

/* A child may have them too: pages of a shared mapping are not copied on write. */
hfreduceResult_t hfr_pinned_share(struct hfr_copier *c, void *pages, size_t bytes, struct hfr_pinned *m) {
  HFR_TRY(pin(c, pages, bytes, m));
  m->borrowed = 1;
  return hfreduceSuccess;
}

static void unpin(struct hfr_pinned *m) {
  const struct hfr_cu *cu = hfr_cuda();
  hfr_cu_context popped;
  int mode = HFR_CU_MODE_RELAXED;
  if (cu->capture_mode) cu->capture_mode(&mode);
  /* A context, or a driver, that is gone has let go of it already. */
  if (!cu->context_push(m->context)) {
    cu->host_unregister(m->host);
    cu->context_pop(&popped);
  }
  if (cu->capture_mode) cu->capture_mode(&mode);
  if (!m->borrowed) munmap(m->host, m->bytes);
}

void hfr_pinned_free(struct hfr_pinned *m) {
  if (!m->host) return;
  struct kept *k = m->borrowed ? NULL : malloc(sizeof *k);
  if (k) {
    pthread_mutex_lock(&pool.lock);
    *k = (struct kept){pool.list, *m};
    pool.list = k;
    pool.bytes += m->bytes;
    pthread_mutex_unlock(&pool.lock);
  } else {
    unpin(m);
  }
  *m = (struct hfr_pinned){0};
}

size_t hfr_pinned_kept(void) { return atomic_load_explicit(&pool.bytes, memory_order_relaxed); }

void hfr_pinned_trim(size_t keep) {
  while (hfr_pinned_kept() > keep) {
    pthread_mutex_lock(&pool.lock);
    struct kept *k = pool.list;
    if (k) {
      pool.list = k->next;
      pool.bytes -= k->memory.bytes;
    }
    pthread_mutex_unlock(&pool.lock);
    if (!k) return;
    unpin(&k->memory);
    free(k);
  }
}
