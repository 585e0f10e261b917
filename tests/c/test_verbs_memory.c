/* The cache of registered buffers: whatever happens to the memory, no stale registration is found. Needs a device; the fake will
 * do.
 */
#include "check.h"

#include "base/param.h"
#include "transport/verbs_memory.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define BYTES ((size_t)1 << 20)
#define LEAST ((size_t)65536)
#define PIECE ((size_t)16384)
static struct hfr_ib_port port;

static uint8_t *map(void *at, size_t bytes) {
  uint8_t *p = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0);
  if (p == MAP_FAILED) abort();
  memset(p, 1, bytes);
  return p;
}

static int cached(const void *data, size_t bytes) {
  int hold = 0;
  uint32_t key = hfr_verbs_memory_key(&port, data, bytes, &hold);
  hfr_verbs_memory_done(hold);
  return key != 0;
}

static void lend(const void *memory, size_t bytes) {
  hfr_verbs_memory_lend(&port, memory, bytes);
  hfr_verbs_memory_lend(&port, memory, bytes);
}

static void test_second_sight(void) {
  uint8_t *p = map(NULL, BYTES);
  hfr_verbs_memory_lend(&port, p, BYTES);
  CHECK(!cached(p, BYTES), "once is not worth it");
  hfr_verbs_memory_lend(&port, p, BYTES);
  CHECK(cached(p, BYTES) && cached(p + 100, PIECE) && cached(p + BYTES - PIECE, PIECE));
  CHECK(!cached(p, BYTES + 1) && !cached(p + BYTES, PIECE) && !cached(p - 1, PIECE), "not beyond its ends");
  CHECK(!cached(p, 100), "small messages are copied");
  lend(p + 4097, 70000);
  CHECK(hfr_verbs_memory_count() == 1, "a part of it needs no registration");
  uint8_t *small = map(NULL, 4096);
  lend(small, 4096);
  CHECK(!cached(small, 4096), "small buffers are copied");
  munmap(small, 4096);
  munmap(p, BYTES);
  CHECK(!cached(p, BYTES) && !cached(p, PIECE));
  map(p, BYTES);
  CHECK(!cached(p, BYTES));
  munmap(p, BYTES);
}

/* Each way to take pages away from an address. */
static void test_gone(void) {
  uint8_t *p = map(NULL, BYTES);
  lend(p, BYTES);
  munmap(p, BYTES);
  map(p, BYTES); /* other pages at the same place */
  CHECK(!cached(p, BYTES), "unmapped and mapped again");
  hfr_verbs_memory_lend(&port, p, BYTES);
  CHECK(!cached(p, BYTES), "seen for the first time");
  hfr_verbs_memory_lend(&port, p, BYTES);
  CHECK(cached(p, BYTES));
  map(p + BYTES / 2, 4096);
  CHECK(!cached(p, BYTES) && !cached(p, PIECE), "mapped over in the middle");
  lend(p, BYTES);
  CHECK(cached(p, BYTES));
  madvise(p + 8192, 4096, MADV_DONTNEED);
  CHECK(!cached(p, BYTES), "emptied");
  lend(p, BYTES);
  munmap(p, BYTES);
  p = map(NULL, BYTES);
  lend(p, BYTES);
  uint8_t *q = mremap(p, BYTES, 2 * BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, map(NULL, 2 * BYTES));
  CHECK(q != MAP_FAILED && !cached(p, BYTES) && !cached(q, BYTES), "moved");
  lend(q, BYTES);
  CHECK(cached(q, BYTES));
  munmap(q + BYTES, BYTES);
  CHECK(cached(q, BYTES), "its neighbour is nothing to it");
  munmap(q + BYTES - 4096, 4096);
  CHECK(!cached(q, PIECE), "its last page went");
  munmap(q, BYTES - 4096);
  uint8_t *heap = malloc(4 * BYTES); /* from mmap, and back to it */
  memset(heap, 1, 4 * BYTES);
  lend(heap, 4 * BYTES);
  CHECK(cached(heap, 4 * BYTES));
  const uint8_t *volatile gone = heap; /* the compiler need not know */
  free(heap);
  CHECK(!cached(gone, PIECE), "freed");
}

static void test_refused(void) {
  int fd = open("/proc/self/exe", O_RDONLY);
  void *file = mmap(NULL, 131072, PROT_READ, MAP_PRIVATE, fd, 0);
  close(fd);
  if (file == MAP_FAILED) return;
  for (int i = 0; i < 3; i++) lend(file, 131072);
  CHECK(!cached(file, 131072), "a file's pages are not watched");
  munmap(file, 131072);
}

/* More than the cache holds: the oldest go; what is held stays until it is given back. */
static void test_limits(void) {
  uint8_t *p = map(NULL, 40 * BYTES);
  int hold = 0;
  lend(p, BYTES);
  uint32_t key = hfr_verbs_memory_key(&port, p, BYTES, &hold);
  CHECK(key != 0);
  for (size_t i = 1; i < 40; i++) lend(p + i * BYTES, BYTES);
  CHECK(hfr_verbs_memory_count() == 16, "%d", hfr_verbs_memory_count());
  CHECK(cached(p + 39 * BYTES, BYTES) && !cached(p + 2 * BYTES, BYTES) && cached(p, BYTES));
  lend(p, 17 * BYTES);
  CHECK(!cached(p, 17 * BYTES), "more than all");
  munmap(p, 40 * BYTES);
  CHECK(hfr_verbs_memory_count() == 0 && !cached(p, BYTES));
  hfr_verbs_memory_done(hold);
  hfr_verbs_memory_tidy();
}

static void test_fork(void) {
  uint8_t *p = map(NULL, BYTES);
  lend(p, BYTES);
  pid_t child = fork();
  if (!child) {
    int wrong = hfr_verbs_memory_count() != 0 || cached(p, BYTES) || p[5] != 1;
    munmap(p, BYTES); /* nobody has to be told */
    _exit(wrong);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0, "status %#x", (unsigned)status);
  CHECK(cached(p, BYTES), "the parent keeps it");
  munmap(p, BYTES);
}

/* Threads that map, lend, use and unmap: what the cache has for a thread's own memory is of this mapping. */
static void *churn(void *arg) {
  unsigned seed = (unsigned)(uintptr_t)arg;
  uintptr_t wrong = 0;
  for (int i = 0; i < 300; i++) {
    size_t bytes = LEAST + rand_r(&seed) % BYTES;
    uint8_t *p = map(NULL, bytes);
    wrong += (uintptr_t)cached(p, bytes);
    lend(p, bytes);
    cached(p, bytes);
    if (rand_r(&seed) % 4 == 0) madvise(p, bytes, MADV_DONTNEED), wrong += (uintptr_t)cached(p, bytes);
    munmap(p, bytes);
    if (rand_r(&seed) % 8 == 0) hfr_verbs_memory_tidy();
  }
  return (void *)wrong;
}

static void test_threads(void) {
  pthread_t thread[4];
  for (uintptr_t i = 0; i < 4; i++) pthread_create(&thread[i], NULL, churn, (void *)(i + 1));
  for (int i = 0; i < 4; i++) {
    void *wrong;
    pthread_join(thread[i], &wrong);
    CHECK(!wrong, "%zu registrations of memory that had gone", (size_t)wrong);
  }
  CHECK(hfr_verbs_memory_count() == 0);
}

int main(void) {
  setenv("HFREDUCE_IB_CACHE", "16M", 1);
  hfr_param_reload();
  if (hfr_ib_choose(0, &port)) return printf("skipped: %s\n", hfr_last_error()->text), 77;
  if (*hfr_verbs_memory_why_not()) return printf("skipped: %s\n", hfr_verbs_memory_why_not()), 77;
  test_second_sight();
  test_gone();
  test_refused();
  test_limits();
  test_fork();
  test_threads();
  hfr_verbs_memory_drop();
  return check_done();
}
