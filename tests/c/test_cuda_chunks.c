/*
 * Buffers over many chunks of physical memory at addresses in a row, as PyTorch's expandable segments have them: the driver tells
 * of a pointer only the chunk that it lies in. Every collective on them is compared bit for bit with the same one on host memory.
 *
 * Arguments: [--quick] [case [layout ...]]. Exit status 77: no driver.
 */
#include "gpu.h"
#include "ranks.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB ((size_t)1 << 20)

struct properties { /* CUmemAllocationProp */
  int type, handle_types, location_type, location;
  void *windows;
  unsigned char flags[8];
};
struct access { /* CUmemAccessDesc */
  int location_type, location, flags;
};
typedef void *memory_handle;
static struct {
  hfr_cu_result (*reserve)(hfr_cu_ptr *, size_t, size_t, hfr_cu_ptr, unsigned long long);
  hfr_cu_result (*create)(memory_handle *, size_t, const struct properties *, unsigned long long);
  hfr_cu_result (*map)(hfr_cu_ptr, size_t, size_t, memory_handle, unsigned long long);
  hfr_cu_result (*access)(hfr_cu_ptr, size_t, const struct access *, size_t);
  hfr_cu_result (*unmap)(hfr_cu_ptr, size_t);
  hfr_cu_result (*release)(memory_handle);
} vmm;

static void find(void *member, const char *name) {
  *(void **)member = hfr_cu_find(name, name);
  if (*(void **)member) return;
  fprintf(stderr, "the driver has no %s\n", name);
  abort();
}

static void open_vmm(void) {
  find(&vmm.reserve, "cuMemAddressReserve"), find(&vmm.create, "cuMemCreate"), find(&vmm.map, "cuMemMap");
  find(&vmm.access, "cuMemSetAccess"), find(&vmm.unmap, "cuMemUnmap"), find(&vmm.release, "cuMemRelease");
}

static void map_chunk(hfr_cu_ptr at, size_t chunk, int device) {
  struct properties kind = {.type = 1, .location_type = 1, .location = device};
  struct access access = {1, device, 3};
  memory_handle memory;
  CU(vmm.create(&memory, chunk, &kind, 0));
  CU(vmm.map(at, chunk, 0, memory, 0));
  CU(vmm.access(at, chunk, &access, 1));
  CU(vmm.release(memory)); /* it stays while it is mapped */
}

/* `chunks` of them, and behind them addresses with no memory. */
static uint8_t *chunks(int rank, size_t chunk, size_t count) {
  hfr_cu_ptr start;
  CU(vmm.reserve(&start, chunk * (count + 1), 0, 0, 0));
  for (size_t i = 0; i < count; i++) map_chunk(start + i * chunk, chunk, rank % gpu.devices);
  return (uint8_t *)start;
}

static void fill(float *p, size_t count, int rank) {
  for (size_t i = 0; i < count; i++) p[i] = (float)((i * 7 + (size_t)rank * 13) % 1024);
}

/* Sums in place and not, copies of one row and of many, beginning just before a border and ending behind the last one. */
static int across(int rank, int n, const hfreduceUniqueId *id, void *quick) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  open_vmm();
  hfr_cu_stream stream = gpu_stream();
  size_t chunk = quick ? 2 * MIB : 20 * MIB, bytes = quick ? 7 * MIB : 64 * MIB, many = bytes / chunk + 2;
  size_t count = bytes / 4, part = count / (size_t)n;
  float *a = (float *)(chunks(rank, chunk, many) + chunk - 4), *b = (float *)(chunks(rank, chunk, many) + 12);
  float *host = malloc(bytes), *want = malloc(bytes), *got = malloc(bytes);
  fill(host, count, rank);
  for (int what = 0; what < 4; what++) {
    size_t result = what == 2 ? part : what == 3 ? part * (size_t)n : count;
    gpu_copy(a, host, bytes, stream);
    gpu_fill(b, 0xee, bytes, stream);
    switch (what) {
      case 0:
        OK(hfreduceAllReduce(a, b, count, hfreduceFloat32, hfreduceSum, comm, stream));
        OK(hfreduceAllReduce(host, want, count, hfreduceFloat32, hfreduceSum, comm, NULL));
        break;
      case 1:
        gpu_copy(b, host, bytes, stream);
        OK(hfreduceAllReduce(b, b, count, hfreduceFloat32, hfreduceSum, comm, stream));
        break;
      case 2:
        OK(hfreduceReduceScatter(a, b, part, hfreduceFloat32, hfreduceSum, comm, stream));
        OK(hfreduceReduceScatter(host, want, part, hfreduceFloat32, hfreduceSum, comm, NULL));
        break;
      default:
        OK(hfreduceAlltoAll(a, b, part / (size_t)n, hfreduceFloat32, comm, stream));
        OK(hfreduceAlltoAll(host, want, part / (size_t)n, hfreduceFloat32, comm, NULL));
        result = part / (size_t)n * (size_t)n;
    }
    gpu_read(got, b, result * 4, stream);
    WANT(!memcmp(got, want, result * 4));
  }
  OK(hfreduceCommDestroy(comm));
  free(host), free(want), free(got);
  return 0;
}

/* A gap between two chunks, and the end of the last one, are refused, and say how far the memory goes. */
static int gap(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  open_vmm();
  hfr_cu_stream stream = gpu_stream();
  size_t chunk = 2 * MIB, count = chunk / 4;
  uint8_t *x = chunks(rank, chunk, 3);
  char left[80];
  (void)arg;
  gpu_fill(x, 0, 3 * chunk, stream);
  WANT(hfreduceAllReduce(x + 4, x + 4, 3 * count, hfreduceFloat32, hfreduceSum, comm, stream) == hfreduceInvalidArgument);
  snprintf(left, sizeof left, "has %zu bytes to the end", 3 * chunk - 4);
  WANT(strstr(hfreduceGetLastError(NULL), left));
  OK(hfreduceAllReduce(x, x, 3 * count, hfreduceFloat32, hfreduceSum, comm, stream));
  CU(gpu.stream_sync(stream));
  CU(vmm.unmap((hfr_cu_ptr)x + chunk, chunk));
  WANT(hfreduceAllReduce(x, x, 3 * count, hfreduceFloat32, hfreduceSum, comm, stream) == hfreduceInvalidArgument);
  snprintf(left, sizeof left, "has %zu bytes to the end", chunk);
  WANT(strstr(hfreduceGetLastError(NULL), left));
  OK(hfreduceAllReduce(x, x, count, hfreduceFloat32, hfreduceSum, comm, stream));
  CU(gpu.stream_sync(stream));
  OK(hfreduceCommDestroy(comm));
  return 0;
}

/* A few bytes on both sides of a border, when the second chunk becomes other memory between calls: nobody may copy to what it
 * was. */
static int remapped(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  open_vmm();
  hfr_cu_stream stream = gpu_stream();
  size_t chunk = 2 * MIB;
  uint8_t *start = chunks(rank, chunk, 2);
  float *x = (float *)(start + chunk - 32), got[16];
  (void)arg;
  for (int round = 0; round < 4; round++) {
    CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, 16, stream));
    OK(hfreduceAllReduce(x, x, 16, hfreduceFloat32, hfreduceSum, comm, stream));
    gpu_read(got, x, sizeof got, stream);
    for (int i = 0; i < 16; i++) WANT(got[i] == (float)n);
    CU(vmm.unmap((hfr_cu_ptr)start + chunk, chunk));
    map_chunk((hfr_cu_ptr)start + chunk, chunk, rank % gpu.devices);
  }
  OK(hfreduceCommDestroy(comm));
  return 0;
}

int main(int argc, char **argv) {
  static const struct gpu_case cases[] = {{"across", across, "2 1,1"}, {"gap", gap, "1 2"}, {"remapped", remapped, "2 1,1"}};
  return gpu_run_cases(cases, sizeof cases / sizeof *cases, argc, argv);
}
