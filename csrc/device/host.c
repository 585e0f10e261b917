/* Host memory. */
#include "device.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HUGE_PAGE ((size_t)2 << 20)
static struct block {
  struct block *next;
  void *ptr;
  size_t bytes;
} * blocks;
static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;

static hfreduceResult_t host_alloc(void **ptr, size_t size) {
  *ptr = NULL;
  size_t unit = size >= HUGE_PAGE ? HUGE_PAGE : 4096, bytes = (size + unit - 1) / unit * unit;
  if (bytes < size) return hfr_fail(hfreduceInvalidArgument, "hfreduceMemAlloc: %zu bytes exceed the address space", size);
  if (!bytes) bytes = unit;
  struct block *b = malloc(sizeof *b);
  /* Huge pages need their alignment: map more, give back the ends. */
  uint8_t *p = b ? mmap(NULL, bytes + unit, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
  if (p == MAP_FAILED) {
    free(b);
    return hfr_fail(hfreduceSystemError, "hfreduceMemAlloc: cannot get %zu bytes: %s", size, strerror(errno));
  }
  uint8_t *start = (uint8_t *)(((uintptr_t)p + unit - 1) / unit * unit);
  if (start > p) munmap(p, (size_t)(start - p));
  munmap(start + bytes, (size_t)(p + unit - start));
  if (unit == HUGE_PAGE) madvise(start, bytes, MADV_HUGEPAGE);
  pthread_mutex_lock(&blocks_lock);
  *b = (struct block){blocks, start, bytes};
  blocks = b;
  pthread_mutex_unlock(&blocks_lock);
  *ptr = start;
  return hfreduceSuccess;
}

static hfreduceResult_t host_release(void *ptr) {
  pthread_mutex_lock(&blocks_lock);
  struct block **at = &blocks;
  while (*at && (*at)->ptr != ptr) at = &(*at)->next;
  struct block *b = *at;
  if (b) *at = b->next;
  pthread_mutex_unlock(&blocks_lock);
  if (!b) return hfr_fail(hfreduceInvalidArgument, "hfreduceMemFree: %p was not given by hfreduceMemAlloc, or is freed", ptr);
  munmap(b->ptr, b->bytes);
  free(b);
  return hfreduceSuccess;
}

static const char *host_why_absent(void) { return NULL; }
static int host_owns(const void *ptr) { return (void)ptr, 1; }

const struct hfr_device hfr_device_host = {"host", host_why_absent, host_owns, host_alloc, host_release};

static const struct hfr_device *const devices[] = {&hfr_device_cuda, &hfr_device_host};

const struct hfr_device *hfr_device_at(int i) {
  return i >= 0 && (size_t)i < sizeof devices / sizeof *devices ? devices[i] : NULL;
}

const struct hfr_device *hfr_device_of(const void *ptr) {
  for (int i = 0; hfr_device_at(i); i++)
    if (devices[i]->owns(ptr)) return devices[i];
  return &hfr_device_host;
}
