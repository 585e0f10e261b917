/*
 * The stand-in's addresses in a row over chunks of memory, as PyTorch's expandable segments have them. The driver tells of a
 * pointer only the chunk that it lies in, and no context. Copies go across the border of two chunks; an address without a chunk
 * is no memory.
 */
#include "driver.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GRANULARITY ((size_t)2 << 20)

struct fake_properties { /* CUmemAllocationProp */
  int type, handle_types, location_type, location;
  void *windows;
  unsigned char flags[8];
};
struct fake_access { /* CUmemAccessDesc */
  int location_type, location, flags;
};
struct fake_memory {
  int fd, device;
  size_t bytes;
};
static struct range { /* of addresses that were reserved; never given back */
  struct range *next;
  uintptr_t start;
  uint8_t *alias;
  size_t bytes;
} * ranges;

static void *addresses(size_t bytes) {
  void *p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? NULL : p;
}

EXPORT hfr_cu_result cuMemGetAllocationGranularity(size_t *bytes, const struct fake_properties *properties, int option) {
  ENTER("cuMemGetAllocationGranularity");
  (void)properties, (void)option;
  *bytes = GRANULARITY;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuMemAddressReserve(hfr_cu_ptr *pointer, size_t bytes, size_t alignment, hfr_cu_ptr wanted,
                                         unsigned long long flags) {
  ENTER("cuMemAddressReserve");
  (void)alignment, (void)wanted;
  if (!bytes || bytes % GRANULARITY || flags) return HFR_CU_INVALID_VALUE;
  struct range *r = calloc(1, sizeof *r);
  *r = (struct range){NULL, (uintptr_t)addresses(bytes + 4096), addresses(bytes), bytes};
  if (!r->start || !r->alias) return HFR_CU_OUT_OF_MEMORY;
  LOCK();
  r->next = ranges;
  ranges = r;
  UNLOCK();
  *pointer = r->start;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuMemAddressFree(hfr_cu_ptr pointer, size_t bytes) {
  ENTER("cuMemAddressFree");
  (void)pointer, (void)bytes;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuMemCreate(struct fake_memory **memory, size_t bytes, const struct fake_properties *properties,
                                 unsigned long long flags) {
  ENTER_BLOCKING("cuMemCreate");
  if (!bytes || bytes % GRANULARITY || flags || properties->location < 0 || properties->location >= fake.devices)
    return HFR_CU_INVALID_VALUE;
  struct fake_memory *m = calloc(1, sizeof *m);
  *m = (struct fake_memory){memfd_create("stand-in", MFD_CLOEXEC), properties->location, bytes};
  if (m->fd < 0 || ftruncate(m->fd, (off_t)bytes)) return free(m), HFR_CU_OUT_OF_MEMORY;
  *memory = m;
  return HFR_CU_SUCCESS;
}

/* The memory stays while it is mapped. */
EXPORT hfr_cu_result cuMemRelease(struct fake_memory *memory) {
  ENTER("cuMemRelease");
  close(memory->fd);
  free(memory);
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuMemMap(hfr_cu_ptr pointer, size_t bytes, size_t offset, struct fake_memory *memory,
                              unsigned long long flags) {
  ENTER_BLOCKING("cuMemMap");
  hfr_cu_result result = HFR_CU_INVALID_VALUE;
  LOCK();
  struct range *r = ranges;
  while (r && (pointer < r->start || pointer + bytes > r->start + r->bytes)) r = r->next;
  struct fake_block *there = fake_block_of(pointer);
  if (r && !flags && !offset && bytes == memory->bytes && !(pointer % 4096) && (!there || there->freed)) {
    void *alias = mmap(r->alias + (pointer - r->start), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory->fd, 0);
    result = alias == MAP_FAILED ? HFR_CU_OUT_OF_MEMORY : HFR_CU_SUCCESS;
    if (!result) {
      memset(alias, 0xa5, bytes);
      struct fake_block *b = fake_add_block(FAKE_CHUNK, pointer, alias, bytes);
      b->context = NULL;
      b->ordinal = memory->device;
      b->closed = 1;
    }
  }
  UNLOCK();
  return result;
}

EXPORT hfr_cu_result cuMemSetAccess(hfr_cu_ptr pointer, size_t bytes, const struct fake_access *access, size_t count) {
  ENTER("cuMemSetAccess");
  hfr_cu_result result = count && access->flags == 3 ? HFR_CU_SUCCESS : HFR_CU_INVALID_VALUE;
  LOCK();
  for (uintptr_t at = pointer; !result && at < pointer + bytes;) {
    struct fake_block *b = fake_block_of(at);
    if (!b || b->freed || b->kind != FAKE_CHUNK || b->start != at) result = HFR_CU_INVALID_VALUE;
    if (!result) b->closed = 0, at += b->bytes;
  }
  UNLOCK();
  return result;
}

EXPORT hfr_cu_result cuMemUnmap(hfr_cu_ptr pointer, size_t bytes) {
  ENTER_BLOCKING("cuMemUnmap");
  hfr_cu_result result = HFR_CU_SUCCESS;
  LOCK();
  for (struct CUstream_st *s = fake.streams; s; s = s->next) fake_await(s, s->submitted);
  for (uintptr_t at = pointer; !result && at < pointer + bytes;) {
    struct fake_block *b = fake_block_of(at);
    if (!b || b->freed || b->kind != FAKE_CHUNK || b->start != at) result = HFR_CU_INVALID_VALUE;
    if (!result) fake_free_block(b), at += b->bytes;
  }
  UNLOCK();
  return result;
}
