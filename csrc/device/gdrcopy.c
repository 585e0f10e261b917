/*
 * Mappings of device memory by GDRCopy's library, found at run time: libgdrapi.so.2 and the kernel module gdrdrv that it needs.
 *
 * Not proven on hardware yet: what is tested is the order of calls, against a double of the library (tests/c/fake/gdrapi.c).
 * Two rules of the hardware shape this file's use. Mapped pages are the device's of 64 KiB, and hold neighbours of the buffer,
 * too. And what CPUs write is not ordered with work that was given to the device before, unless that waits for a word and
 * flushes (hfr_copier_sees_writes); without that only the way out of the device goes through mappings.
 */
#include "cuda.h"

#include "../base/log.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#define MAJOR 2 /* of the library's interface: what is declared here */
#define PAGE ((uintptr_t)65536)
#define KEPT_MAX 64 /* mappings: devices show only so much memory at once */

struct gdr;
struct gdr_handle {
  unsigned long h;
};
struct gdr_info { /* gdr_info_v2_t */
  uint64_t va, mapped_size;
  uint32_t page_size;
  uint64_t tm_cycles;
  uint32_t cycles_per_ms;
  unsigned mapped : 1, wc_mapping : 1;
  int mapping_type;
};

#define FUNCTIONS(X)                                                                                                \
  X(open, struct gdr *, (void))                                                                                     \
  X(runtime_get_version, void, (int *major, int *minor))                                                            \
  X(pin_buffer, int, (struct gdr *, unsigned long at, size_t, uint64_t token, uint32_t space, struct gdr_handle *)) \
  X(unpin_buffer, int, (struct gdr *, struct gdr_handle))                                                           \
  X(map, int, (struct gdr *, struct gdr_handle, void **at, size_t))                                                 \
  X(unmap, int, (struct gdr *, struct gdr_handle, void *at, size_t))                                                \
  X(get_info_v2, int, (struct gdr *, struct gdr_handle, struct gdr_info *))                                         \
  X(copy_to_mapping, int, (struct gdr_handle, void *to, const void *from, size_t))                                  \
  X(copy_from_mapping, int, (struct gdr_handle, void *to, const void *from, size_t))

static struct {
#define MEMBER(name, result, parameters) result(*name) parameters;
  FUNCTIONS(MEMBER)
#undef MEMBER
  struct gdr *gdr;
  int minor;
  char absent[200];
  pthread_once_t once;
} lib = {.once = PTHREAD_ONCE_INIT};

struct hfr_mapping {
  struct hfr_mapping *next; /* the one used last comes first */
  uint64_t id;              /* of the memory: another one at the same address has another */
  uintptr_t device;         /* its pages, as the device sees them, ... */
  size_t bytes;
  uint8_t *host; /* ... and as CPUs do; NULL: they cannot be mapped */
  void *mapped;  /* what the library gave */
  uintptr_t of;  /* the memory that it was made for */
  struct gdr_handle handle;
  _Atomic int users;
};

static struct {
  pthread_mutex_t lock;
  struct hfr_mapping *list;
  int n;
} kept = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---------------------------------------------------------------- the library */

static void load(void) {
  int major = 0;
  if (!hfr_param_int(HFR_PARAM_GDR_MAX)) {
    snprintf(lib.absent, sizeof lib.absent, "switched off by HFREDUCE_GDR_MAX=0");
    return;
  }
  void *library = dlopen("libgdrapi.so.2", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(lib.absent, sizeof lib.absent, "not installed (no libgdrapi.so.2)");
    return;
  }
#define FIND(name, result, parameters)                                       \
  if (!(*(void **)&lib.name = dlsym(library, "gdr_" #name)) && !*lib.absent) \
    snprintf(lib.absent, sizeof lib.absent, "libgdrapi.so.2 has no gdr_" #name ": it is too old");
  FUNCTIONS(FIND)
#undef FIND
  if (*lib.absent) return;
  lib.runtime_get_version(&major, &lib.minor);
  if (major != MAJOR)
    snprintf(lib.absent, sizeof lib.absent, "libgdrapi.so.2 is of version %d.%d, and %d is known", major, lib.minor, MAJOR);
  else if (!(lib.gdr = lib.open()))
    snprintf(lib.absent, sizeof lib.absent, "gdr_open failed: is the kernel module gdrdrv loaded, and /dev/gdrdrv open to us?");
}

const char *hfr_mapping_why_absent(void) {
  pthread_once(&lib.once, load);
  return *lib.absent ? lib.absent : NULL;
}

size_t hfr_gdrcopy_describe(char *text, size_t size) {
  const char *why = hfr_mapping_why_absent();
  if (why) return (size_t)snprintf(text, size, "device cuda GDRCopy: not used: %s\n", why);
  return (size_t)snprintf(text, size, "device cuda GDRCopy: version %d.%d, for messages of at most %lld bytes\n", MAJOR,
                          lib.minor, (long long)hfr_param_int(HFR_PARAM_GDR_MAX));
}

/* ---------------------------------------------------------------- made and given up */

/* Have the pages mapped; an error is the library's. */
static int map_pages(struct hfr_mapping *m) {
  struct gdr_info info = {0};
  int r = lib.pin_buffer(lib.gdr, m->device, m->bytes, 0, 0, &m->handle);
  if (r) return r;
  if (!(r = lib.map(lib.gdr, m->handle, &m->mapped, m->bytes))) {
    r = lib.get_info_v2(lib.gdr, m->handle, &info);
    if (!r && info.va <= m->device && info.va + info.mapped_size >= m->device + m->bytes) {
      m->host = (uint8_t *)m->mapped + (m->device - info.va);
      return 0;
    }
    lib.unmap(lib.gdr, m->handle, m->mapped, m->bytes);
  }
  lib.unpin_buffer(lib.gdr, m->handle);
  return r ? r : -1;
}

static void give_up(struct hfr_mapping **at) {
  struct hfr_mapping *m = *at;
  *at = m->next;
  kept.n--;
  if (m->host) {
    lib.unmap(lib.gdr, m->handle, m->mapped, m->bytes);
    lib.unpin_buffer(lib.gdr, m->handle);
  }
  free(m);
}

/* Idle ones whose memory was freed go, and the one that was idle longest if there are too many. */
static void tidy(const struct hfr_cu *cu) {
  struct hfr_mapping **last = NULL, **at = &kept.list;
  while (*at) {
    struct hfr_mapping *m = *at;
    int idle = !atomic_load_explicit(&m->users, memory_order_acquire); /* pairs with hfr_mapping_put(): it copies no more */
    if (idle && hfr_cuda_memory_id(cu, m->of) != m->id) {
      give_up(at);
      continue;
    }
    if (idle) last = at;
    at = &m->next;
  }
  if (kept.n >= KEPT_MAX && last) give_up(last);
}

static struct hfr_mapping *make(const struct hfr_cu *cu, uint64_t id, uintptr_t from, size_t bytes) {
  unsigned on = 1;
  tidy(cu);
  struct hfr_mapping *m = kept.n < KEPT_MAX ? calloc(1, sizeof *m) : NULL;
  if (!m) return NULL;
  *m = (struct hfr_mapping){.id = id, .device = from / PAGE * PAGE, .of = from};
  m->bytes = (from + bytes - m->device + PAGE - 1) / PAGE * PAGE;
  /* What the driver does at once and not in a stream is then over when its call returns, as for all memory that others reach. */
  int whole = hfr_cuda_memory_id(cu, from + bytes - 1) == id; /* else its end may be freed while its beginning is not */
  int r = cu->pointer_set && whole ? cu->pointer_set(&on, HFR_CU_POINTER_SYNC_MEMOPS, from) : HFR_CU_NOT_SUPPORTED;
  if (!r) r = map_pages(m);
  if (r) HFR_INFO("GDRCopy cannot map %zu bytes of device memory at %#zx (%d): the device copies", m->bytes, m->device, r);
  m->next = kept.list;
  kept.list = m;
  kept.n++;
  return m;
}

struct hfr_mapping *hfr_mapping_get(const void *pointer, size_t bytes) {
  const struct hfr_cu *cu = hfr_cuda();
  uintptr_t from = (uintptr_t)pointer;
  uint64_t id = cu && !hfr_mapping_why_absent() ? hfr_cuda_memory_id(cu, from) : 0;
  if (!id) return NULL;
  pthread_mutex_lock(&kept.lock);
  struct hfr_mapping **at = &kept.list, *m;
  while ((m = *at) && (m->id != id || from < m->device || from + bytes > m->device + m->bytes)) at = &m->next;
  if (m) {
    *at = m->next;
    m->next = kept.list;
    kept.list = m;
  } else {
    m = make(cu, id, from, bytes);
  }
  if (m && !m->host) m = NULL;
  if (m) atomic_fetch_add_explicit(&m->users, 1, memory_order_relaxed);
  pthread_mutex_unlock(&kept.lock);
  return m;
}

void hfr_mapping_put(struct hfr_mapping *m) {
  if (m) atomic_fetch_sub_explicit(&m->users, 1, memory_order_release); /* pairs with tidy() */
}

/* ---------------------------------------------------------------- copies */

static uint8_t *place(const struct hfr_mapping *m, const void *device) { return m->host + ((uintptr_t)device - m->device); }

/* Both fail only for what is not mapped. */
void hfr_mapping_read(const struct hfr_mapping *m, void *to, const void *from, size_t bytes) {
  lib.copy_from_mapping(m->handle, to, place(m, from), bytes);
}

void hfr_mapping_write(const struct hfr_mapping *m, void *to, const void *from, size_t bytes) {
  lib.copy_to_mapping(m->handle, place(m, to), from, bytes);
}
