/* The stand-in's memory: device memory is mapped twice, closed where the program's pointers lead and open where copies go. */
#include "driver.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define REGISTERED_AT ((uintptr_t)1 << 46) /* registered memory has another address for the device */

static struct fake_block *blocks;

struct fake_block *fake_block_of(uintptr_t address) {
  for (struct fake_block *b = blocks; b; b = b->next)
    if ((address >= b->start && address < b->start + b->bytes) || (address >= b->device && address < b->device + b->bytes))
      if (!b->freed || b->kind == FAKE_DEVICE || b->kind == FAKE_CHUNK || b->kind == FAKE_MANAGED || b->kind == FAKE_IMPORTED)
        return b; /* a freed range of a device is never reused */
  return NULL;
}

/* A block that has any of these bytes. */
static struct fake_block *fake_block_in(uintptr_t start, size_t bytes) {
  for (struct fake_block *b = blocks; b; b = b->next)
    if (!b->freed && start < b->start + b->bytes && b->start < start + bytes) return b;
  return NULL;
}

uint8_t *fake_bytes(uintptr_t address, size_t bytes, const char *what) {
  struct fake_block *b = fake_block_of(address);
  if (!b) return (uint8_t *)address; /* plain host memory */
  size_t at = address - (address >= b->device && address < b->device + b->bytes ? b->device : b->start);
  if (b->freed) fake_die("%s at %#zx: the memory is freed", what, (size_t)address);
  for (size_t have = b->bytes - at; bytes > have;) { /* a copy may go on into the next chunk of the same addresses */
    struct fake_block *next = b->kind == FAKE_CHUNK ? fake_block_of(b->start + at + have) : NULL;
    if (!next || next->freed || next->closed || next->kind != FAKE_CHUNK || next->alias != b->alias + at + have)
      fake_die("%s of %zu bytes at %#zx: only %zu are left of the allocation", what, bytes, (size_t)address, have);
    have += next->bytes;
  }
  if (b->closed) fake_die("%s at %#zx: the chunk is mapped, but access to it was never set", what, (size_t)address);
  return b->alias + at;
}

struct fake_block *fake_add_block(enum fake_kind kind, uintptr_t start, uint8_t *alias, size_t bytes) {
  struct fake_block *b = calloc(1, sizeof *b);
  *b = (struct fake_block){blocks, kind, start, start, alias, bytes, 0, fake_current(), ++fake.allocations, -1, NULL, -2, 0};
  blocks = b;
  return b;
}

/* Where memory of this size lay that was freed; NULL: nowhere. */
static void *take_freed(size_t size) {
  LOCK();
  struct fake_block **at = &blocks, *b;
  while ((b = *at) && !(b->freed && b->kind == FAKE_DEVICE && (b->bytes + 4095) / 4096 * 4096 == size)) at = &b->next;
  if (b) *at = b->next;
  UNLOCK();
  uintptr_t start = b ? b->start : 0;
  free(b);
  return (void *)start;
}

static hfr_cu_result allocate(const char *call, enum fake_kind kind, size_t bytes, int open, uintptr_t *pointer) {
  ENTER_BLOCKING(call);
  if (!bytes) return HFR_CU_INVALID_VALUE;
  if (!fake_current()) return HFR_CU_INVALID_CONTEXT;
  hfr_cu_result r = fake_unsafe();
  if (r) return r;
  size_t size = (bytes + 4095) / 4096 * 4096;
  int fd = memfd_create("stand-in", MFD_CLOEXEC), shared = kind == FAKE_DEVICE && fake.nvlink;
  size_t whole = shared ? size + 4096 : size; /* behind it: who has it open */
  if (fd < 0 || ftruncate(fd, (off_t)whole)) return HFR_CU_OUT_OF_MEMORY;
  void *place = kind == FAKE_DEVICE && fake.reuse ? take_freed(size) : NULL;
  /* A page behind it that is nobody's: allocations do not touch each other. */
  if (!place) place = mmap(NULL, size + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (place == MAP_FAILED) return HFR_CU_OUT_OF_MEMORY;
  void *seen = mmap(place, size, open ? PROT_READ | PROT_WRITE : PROT_NONE, MAP_SHARED | MAP_FIXED, fd, 0);
  void *alias = open ? seen : mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (!shared) close(fd);
  if (seen == MAP_FAILED || alias == MAP_FAILED) return HFR_CU_OUT_OF_MEMORY;
  memset(alias, 0xa5, size); /* memory that nobody has written holds nothing useful */
  LOCK();
  struct fake_block *b = fake_add_block(kind, (uintptr_t)seen, alias, bytes);
  b->fd = shared ? fd : -1;
  b->importers = shared ? (_Atomic int *)(alias + size) : NULL;
  UNLOCK();
  *pointer = (uintptr_t)seen;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuMemAlloc_v2(hfr_cu_ptr *pointer, size_t bytes) {
  return allocate("cuMemAlloc", FAKE_DEVICE, bytes, 0, pointer);
}
EXPORT hfr_cu_result cuMemAllocManaged(hfr_cu_ptr *pointer, size_t bytes, unsigned flags) {
  return (void)flags, allocate("cuMemAllocManaged", FAKE_MANAGED, bytes, 1, pointer);
}
EXPORT hfr_cu_result cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  return (void)flags, allocate("cuMemHostAlloc", FAKE_PINNED, bytes, 1, (uintptr_t *)pointer);
}

void fake_free_block(struct fake_block *b) {
  b->freed = 1;
  if (b->fd >= 0) close(b->fd);
  if (b->kind == FAKE_CHUNK) /* the addresses stay reserved */
    mmap(b->alias, b->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  else if (b->alias != (uint8_t *)b->start)
    munmap(b->alias, (b->bytes + 4095) / 4096 * 4096);
  mmap((void *)b->start, (b->bytes + 4095) / 4096 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1,
       0);
}

void fake_free_all(const struct CUctx_st *context) {
  for (struct fake_block *b = blocks; b; b = b->next)
    if (b->context == context && b->kind == FAKE_DEVICE && !b->freed) fake_free_block(b);
}

static hfr_cu_result release(const char *call, uintptr_t pointer, int pinned) {
  ENTER_BLOCKING(call);
  hfr_cu_result r = fake_current() ? fake_unsafe() : HFR_CU_INVALID_CONTEXT;
  if (r) return r;
  LOCK();
  /* Freeing waits for the device: whoever still uses it then does so afterwards. */
  for (struct CUstream_st *s = fake.streams; s && !pinned; s = s->next) fake_await(s, s->submitted);
  struct fake_block *b = fake_block_of(pointer);
  int wrong = !b || b->freed || b->start != pointer || (b->kind == FAKE_PINNED) != pinned || b->kind == FAKE_REGISTERED ||
              b->kind == FAKE_CHUNK;
  if (!wrong && b->importers && atomic_load(b->importers))
    fake_die("cuMemFree at %#zx: another process has the memory open", (size_t)pointer);
  if (!wrong) fake_free_block(b);
  UNLOCK();
  return wrong ? HFR_CU_INVALID_VALUE : HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuMemFree_v2(hfr_cu_ptr pointer) { return release("cuMemFree", pointer, 0); }
EXPORT hfr_cu_result cuMemFreeHost(void *pointer) { return release("cuMemFreeHost", (uintptr_t)pointer, 1); }

EXPORT hfr_cu_result cuMemHostRegister_v2(void *memory, size_t bytes, unsigned flags) {
  ENTER_BLOCKING("cuMemHostRegister");
  (void)flags;
  if (!fake_current()) return HFR_CU_INVALID_CONTEXT;
  hfr_cu_result r = fake_unsafe();
  if (r) return r;
  LOCK();
  struct fake_block *b = fake_block_in((uintptr_t)memory, bytes);
  if (!b) {
    b = fake_add_block(FAKE_REGISTERED, (uintptr_t)memory, memory, bytes);
    b->device = b->start + REGISTERED_AT;
    b = NULL;
  }
  UNLOCK();
  return b ? HFR_CU_HOST_MEMORY_ALREADY_REGISTERED : HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuMemHostUnregister(void *memory) {
  ENTER_BLOCKING("cuMemHostUnregister");
  if (!fake_current()) fake_die("cuMemHostUnregister: no context is current, so that the memory would stay pinned");
  hfr_cu_result r = fake_unsafe();
  if (r) return r;
  LOCK();
  struct fake_block *b = fake_block_of((uintptr_t)memory);
  int wrong = !b || b->kind != FAKE_REGISTERED || b->start != (uintptr_t)memory;
  if (!wrong) b->freed = 1, b->bytes = 0;
  UNLOCK();
  return wrong ? HFR_CU_HOST_MEMORY_NOT_REGISTERED : HFR_CU_SUCCESS;
}

/* For tests of this library alone: bytes of memory that is registered now. */
EXPORT size_t fake_cuda_registered(void);
EXPORT size_t fake_cuda_registered(void) {
  size_t sum = 0;
  LOCK();
  for (const struct fake_block *b = blocks; b; b = b->next) sum += b->kind == FAKE_REGISTERED ? b->bytes : 0;
  UNLOCK();
  return sum;
}

EXPORT hfr_cu_result cuMemHostGetDevicePointer_v2(hfr_cu_ptr *pointer, void *memory, unsigned flags) {
  ENTER("cuMemHostGetDevicePointer");
  (void)flags;
  LOCK();
  struct fake_block *b = fake_block_of((uintptr_t)memory);
  int wrong = !b || b->kind <= FAKE_CHUNK || b->freed;
  if (!wrong) *pointer = b->device + ((uintptr_t)memory - b->start);
  UNLOCK();
  return wrong ? HFR_CU_INVALID_VALUE : HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuPointerGetAttributes(unsigned count, int *attributes, void **data, hfr_cu_ptr pointer) {
  ENTER("cuPointerGetAttributes");
  LOCK();
  struct fake_block *b = fake_block_of(pointer);
  if (b && b->freed) b = NULL;
  for (unsigned i = 0; i < count; i++) switch (attributes[i]) {
      case HFR_CU_POINTER_CONTEXT: *(void **)data[i] = b ? b->context : NULL; break;
      case HFR_CU_POINTER_MEMORY_TYPE:
        *(unsigned *)data[i] = !b                                                    ? 0
                               : b->kind <= FAKE_MANAGED || b->kind == FAKE_IMPORTED ? HFR_CU_MEMORY_DEVICE
                                                                                     : HFR_CU_MEMORY_HOST;
        break;
      case HFR_CU_POINTER_IS_MANAGED: *(unsigned *)data[i] = b && b->kind == FAKE_MANAGED; break;
      case HFR_CU_POINTER_BUFFER_ID: *(uint64_t *)data[i] = b ? b->id : 0; break;
      case HFR_CU_POINTER_DEVICE_ORDINAL: *(int *)data[i] = !b ? -2 : b->context ? b->context->device : b->ordinal; break;
      case HFR_CU_POINTER_RANGE_START: *(uintptr_t *)data[i] = b ? b->start : 0; break;
      case HFR_CU_POINTER_RANGE_SIZE: *(size_t *)data[i] = b ? b->bytes : 0; break;
      default: fake_die("cuPointerGetAttributes: attribute %d is not made", attributes[i]);
    }
  UNLOCK();
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuPointerSetAttribute(const void *value, int attribute, hfr_cu_ptr pointer) {
  ENTER("cuPointerSetAttribute");
  LOCK();
  struct fake_block *b = fake_block_of(pointer);
  int wrong = attribute != HFR_CU_POINTER_SYNC_MEMOPS || !*(const unsigned *)value || !b || b->freed || b->kind > FAKE_CHUNK;
  UNLOCK();
  return wrong ? HFR_CU_INVALID_VALUE : HFR_CU_SUCCESS;
}

/* ---------------------------------------------------------------- from the bus */

static struct posted {
  struct posted *next;
  uintptr_t to;
  uint64_t newest; /* allocation that the mapping knew */
  size_t bytes;
  uint8_t data[];
} * posted, **posted_tail = &posted;

void fake_arrive(void) {
  struct posted *p;
  while ((p = posted)) {
    struct fake_block *b = fake_block_of(p->to);
    if (!b || b->freed || b->id > p->newest)
      fake_die("a write of %zu bytes to %#zx arrives when its memory is freed", p->bytes, (size_t)p->to);
    memcpy(fake_bytes(p->to, p->bytes, "a write over the bus"), p->data, p->bytes);
    posted = p->next;
    free(p);
  }
  posted_tail = &posted;
}

/* For fake/gdrapi.c: is there device memory at the address? The number of the newest allocation then, else 0. A mapping knows
 * what was allocated when it was made: memory that came later, at the same address, it does not reach. */
EXPORT uint64_t fake_cuda_allocation(uintptr_t address);
EXPORT uint64_t fake_cuda_allocation(uintptr_t address) {
  LOCK();
  struct fake_block *b = fake_block_of(address);
  uint64_t newest = b && !b->freed && b->kind <= FAKE_CHUNK ? fake.allocations : 0;
  UNLOCK();
  return newest;
}
EXPORT void fake_cuda_bus_read(void *to, uintptr_t from, size_t bytes, uint64_t newest);
EXPORT void fake_cuda_bus_read(void *to, uintptr_t from, size_t bytes, uint64_t newest) {
  LOCK();
  struct fake_block *b = fake_block_of(from);
  const struct fake_block *end = fake_block_of(from + bytes - 1);
  if (!b || b->freed || b->id > newest || !end || end->id > newest)
    fake_die("a mapping at %#zx is read when its memory is freed", (size_t)from);
  memcpy(to, fake_bytes(from, bytes, "a read over the bus"), bytes);
  UNLOCK();
}
EXPORT void fake_cuda_bus_write(uintptr_t to, const void *from, size_t bytes, uint64_t newest);
EXPORT void fake_cuda_bus_write(uintptr_t to, const void *from, size_t bytes, uint64_t newest) {
  struct posted *p = malloc(sizeof *p + bytes);
  *p = (struct posted){NULL, to, newest, bytes};
  memcpy(p->data, from, bytes);
  LOCK();
  *posted_tail = p;
  posted_tail = &p->next;
  UNLOCK();
}
