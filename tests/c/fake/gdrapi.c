/*
 * A test double of GDRCopy's library, over the stand-in for CUDA's driver (fake/cuda): no GPU, and no figures. What CPUs write
 * into a mapping arrives in device memory with the next wait that flushes, and never without one: hardware promises no more.
 *
 * Environment: FAKE_GDR, words:
 *   absent      the kernel module is not there: gdr_open fails
 *   nopin=N     the N-th pin and all later ones fail
 *   count       at the end of the process: how many mappings were made and copies went through them, to standard error
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define PAGE 65536ul

struct gdr {
  int pins;
};
struct handle {
  unsigned long h;
};
struct info {
  uint64_t va, mapped_size;
  uint32_t page_size;
  uint64_t tm_cycles;
  uint32_t cycles_per_ms;
  unsigned mapped : 1, wc_mapping : 1;
  int mapping_type;
};
struct memory {
  uintptr_t va;
  size_t bytes;
  uint64_t newest; /* allocation when it was pinned */
  uint8_t *seen;   /* addresses only: no access goes past this library */
};

static uint64_t (*allocation)(uintptr_t address);
static void (*bus_read)(void *to, uintptr_t from, size_t bytes, uint64_t newest);
static void (*bus_write)(uintptr_t to, const void *from, size_t bytes, uint64_t newest);
static _Atomic long made, alive, reads, writes;

static void die(const char *what) {
  fprintf(stderr, "stand-in for GDRCopy (test double): %s\n", what);
  abort();
}

static int scripted(const char *word) {
  const char *script = getenv("FAKE_GDR"), *at = script ? strstr(script, word) : NULL;
  return !at ? 0 : at[strlen(word)] == '=' ? atoi(at + strlen(word) + 1) : 1;
}

/* The engine's thread copies, and does nothing else. */
static void not_from_the_engine(const char *call) {
  char name[16] = "";
  prctl(PR_GET_NAME, name);
  if (!strncmp(name, "hfr-", 4)) die(call);
}

static void tell(void) {
  fprintf(stderr, "GDRCopy (test double): %ld mappings, %ld alive, %ld reads, %ld writes\n", (long)made, (long)alive, (long)reads,
          (long)writes);
}

EXPORT void gdr_runtime_get_version(int *major, int *minor) { *major = 2, *minor = 5; }

EXPORT struct gdr *gdr_open(void) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (!driver || scripted("absent")) return NULL;
  *(void **)&allocation = dlsym(driver, "fake_cuda_allocation");
  *(void **)&bus_read = dlsym(driver, "fake_cuda_bus_read");
  *(void **)&bus_write = dlsym(driver, "fake_cuda_bus_write");
  if (!allocation || !bus_read || !bus_write) die("the driver is not the stand-in");
  if (scripted("count")) atexit(tell);
  return calloc(1, sizeof(struct gdr));
}

EXPORT int gdr_pin_buffer(struct gdr *g, unsigned long at, size_t bytes, uint64_t token, uint32_t space, struct handle *handle) {
  uint64_t newest = 0;
  not_from_the_engine("gdr_pin_buffer in the engine's thread");
  if (scripted("nopin") && ++g->pins >= scripted("nopin")) return ENOMEM;
  for (uintptr_t p = at; p < at + bytes && !newest; p += 4096) newest = allocation(p); /* pages hold neighbours */
  if (!newest || token || space) return EINVAL;
  struct memory *m = calloc(1, sizeof *m);
  *m = (struct memory){.va = at / PAGE * PAGE, .newest = newest};
  m->bytes = (at + bytes - m->va + PAGE - 1) / PAGE * PAGE;
  handle->h = (unsigned long)m;
  return 0;
}

EXPORT int gdr_unpin_buffer(struct gdr *g, struct handle handle) {
  struct memory *m = (struct memory *)handle.h;
  (void)g;
  not_from_the_engine("gdr_unpin_buffer in the engine's thread");
  if (m->seen) die("gdr_unpin_buffer before gdr_unmap");
  free(m);
  return 0;
}

EXPORT int gdr_map(struct gdr *g, struct handle handle, void **at, size_t bytes) {
  struct memory *m = (struct memory *)handle.h;
  (void)g;
  if (bytes > m->bytes || m->seen) return EINVAL;
  m->seen = mmap(NULL, m->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  *at = m->seen;
  made++;
  alive++;
  return 0;
}

EXPORT int gdr_unmap(struct gdr *g, struct handle handle, void *at, size_t bytes) {
  struct memory *m = (struct memory *)handle.h;
  (void)g, (void)bytes;
  not_from_the_engine("gdr_unmap in the engine's thread");
  if (at != m->seen) die("gdr_unmap of something else than was mapped");
  munmap(m->seen, m->bytes);
  m->seen = NULL;
  alive--;
  return 0;
}

EXPORT int gdr_get_info_v2(struct gdr *g, struct handle handle, struct info *info) {
  struct memory *m = (struct memory *)handle.h;
  (void)g;
  *info = (struct info){
      .va = m->va, .mapped_size = m->bytes, .page_size = PAGE, .mapped = m->seen != NULL, .wc_mapping = 1, .mapping_type = 1};
  return 0;
}

static uintptr_t device_address(const struct memory *m, const uint8_t *at, size_t bytes) {
  if (!m->seen || at < m->seen || at + bytes > m->seen + m->bytes) die("a copy outside of the mapping");
  return m->va + (uintptr_t)(at - m->seen);
}

EXPORT int gdr_copy_to_mapping(struct handle handle, void *to, const void *from, size_t bytes) {
  struct memory *m = (struct memory *)handle.h;
  bus_write(device_address(m, to, bytes), from, bytes, m->newest);
  writes++;
  return 0;
}

EXPORT int gdr_copy_from_mapping(struct handle handle, void *to, const void *from, size_t bytes) {
  struct memory *m = (struct memory *)handle.h;
  bus_read(to, device_address(m, from, bytes), bytes, m->newest);
  reads++;
  return 0;
}
