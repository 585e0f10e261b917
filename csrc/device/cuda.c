/* CUDA devices: what pointers and streams are, and what there is to tell of the driver. */
#include "cuda.h"

#include "../base/log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

hfreduceResult_t hfr_cuda_fail(const char *call, int result) {
  char text[160];
  return hfr_fail(hfreduceUnhandledCudaError, "%s failed: %s", call, hfr_cu_error(result, text));
}

const struct hfr_cu *hfr_cuda(void) {
  const char *why;
  return hfr_cu_load(&why);
}

int hfr_device_present(void) {
  static _Atomic int known; /* 1: absent, 2: present */
  int state = atomic_load_explicit(&known, memory_order_relaxed);
  if (state) return state - 1;
  state = hfr_cuda() ? 2 : 1;
  atomic_store_explicit(&known, state, memory_order_relaxed);
  return state - 1;
}

/* ---------------------------------------------------------------- pointers */

void hfr_memory_of(const void *pointer, struct hfr_memory *m) {
  *m = (struct hfr_memory){.kind = HFR_MEMORY_HOST, .device = -1};
  const struct hfr_cu *cu = hfr_device_present() ? hfr_cuda() : NULL;
  if (!cu || !pointer) return;
  static int wanted[6] = {HFR_CU_POINTER_CONTEXT,        HFR_CU_POINTER_MEMORY_TYPE, HFR_CU_POINTER_IS_MANAGED,
                          HFR_CU_POINTER_DEVICE_ORDINAL, HFR_CU_POINTER_RANGE_START, HFR_CU_POINTER_RANGE_SIZE};
  void *context = NULL;
  unsigned type = 0, managed = 0;
  int ordinal = -1;
  uintptr_t start = 0;
  size_t bytes = 0;
  void *data[6] = {&context, &type, &managed, &ordinal, &start, &bytes};
  if (cu->pointer_attributes(6, wanted, data, (hfr_cu_ptr)pointer) || !type) return; /* not its own, or nothing is initialised */
  m->kind = managed ? HFR_MEMORY_MANAGED : type == HFR_CU_MEMORY_HOST ? HFR_MEMORY_PINNED : HFR_MEMORY_DEVICE;
  m->device = ordinal;
  m->context = context;
  m->start = start;
  m->bytes = bytes;
}

size_t hfr_memory_reach(const void *pointer, size_t bytes, const struct hfr_memory *m) {
  static int wanted[3] = {HFR_CU_POINTER_MEMORY_TYPE, HFR_CU_POINTER_RANGE_START, HFR_CU_POINTER_RANGE_SIZE};
  const struct hfr_cu *cu = hfr_cuda();
  uintptr_t first = (uintptr_t)pointer, end = m->start + m->bytes;
  if (!m->bytes) return bytes; /* the driver does not say */
  while (end - first < bytes) {
    unsigned type = 0;
    uintptr_t start = 0;
    size_t piece = 0;
    void *data[3] = {&type, &start, &piece};
    if (cu->pointer_attributes(3, wanted, data, end) || !type || !piece || start + piece <= end) break;
    end = start + piece;
  }
  return end - first < bytes ? end - first : bytes;
}

uint64_t hfr_cuda_memory_id(const struct hfr_cu *cu, uintptr_t pointer) {
  static int wanted[3] = {HFR_CU_POINTER_MEMORY_TYPE, HFR_CU_POINTER_IS_MANAGED, HFR_CU_POINTER_BUFFER_ID};
  unsigned type = 0, managed = 0;
  unsigned long long id = 0;
  void *data[3] = {&type, &managed, &id};
  if (cu->pointer_attributes(3, wanted, data, pointer) || type != HFR_CU_MEMORY_DEVICE || managed) return 0;
  return id;
}

unsigned long long hfr_cuda_context_id(const struct hfr_cu *cu, void *context) {
  unsigned long long id = 0;
  return cu->context_id && !cu->context_id(context, &id) ? id : 0;
}

void *hfr_device_context(int device) {
  static _Atomic(hfr_cu_context) known[64];
  hfr_cu_context context = NULL;
  if (device >= 0 && device < 64 && (context = atomic_load(&known[device]))) return context;
  int r = hfr_cuda()->primary_retain(&context, device);
  if (r) return hfr_cuda_fail("cuDevicePrimaryCtxRetain", r), NULL;
  if (device >= 0 && device < 64) atomic_store(&known[device], context);
  return context;
}

void *hfr_device_context_here(int device) {
  hfr_cu_context context = NULL;
  int on = -1;
  if (!hfr_cuda()->context_current(&context) && context && !hfr_cuda()->context_device(&on) && on == device) return context;
  return hfr_device_context(device);
}

void *hfr_device_context_now(int *device) {
  const struct hfr_cu *cu = hfr_device_present() ? hfr_cuda() : NULL;
  hfr_cu_context context = NULL;
  return !cu || cu->context_current(&context) || !context || cu->context_device(device) ? NULL : context;
}

int hfr_device_current(void) {
  const struct hfr_cu *cu = hfr_device_present() ? hfr_cuda() : NULL;
  hfr_cu_context context = NULL;
  int device = 0;
  if (!cu || cu->context_current(&context) || (context && cu->context_device(&device))) return -1;
  return device;
}

hfreduceResult_t hfr_device_read(void *to, const void *from, size_t bytes) {
  struct hfr_memory m;
  hfr_cu_context context = NULL;
  const struct hfr_cu *cu = hfr_cuda();
  hfr_memory_of(from, &m);
  if (!cu || m.kind == HFR_MEMORY_HOST || m.kind == HFR_MEMORY_PINNED) return memcpy(to, from, bytes), hfreduceSuccess;
  if (m.context) cu->context_push(m.context);
  int r = cu->copy((hfr_cu_ptr)to, (hfr_cu_ptr)from, bytes);
  if (m.context) cu->context_pop(&context);
  return r ? hfr_cuda_fail("cuMemcpy", r) : hfreduceSuccess;
}

/* ---------------------------------------------------------------- streams */

static int is_default(const void *handle) { return !handle || handle == HFR_CU_LEGACY || handle == HFR_CU_PER_THREAD; }

static hfreduceResult_t look_at_capture(const char *who, const struct hfr_cu *cu, struct hfr_stream *s) {
  int status = HFR_CU_CAPTURE_NONE, r;
  s->capture = 0;
  s->graph = NULL;
  if (cu->capture_info)
    r = cu->capture_info(s->handle, &status, &s->capture, (hfr_cu_graph *)&s->graph, NULL, NULL);
  else
    r = cu->stream_capturing(s->handle, &status);
  if (r == HFR_CU_CAPTURE_IMPLICIT)
    return hfr_fail(hfreduceInvalidUsage,
                    "%s: the legacy default stream was given while another stream is captured; capture and call on one stream",
                    who);
  if (r == HFR_CU_INVALID_HANDLE || r == HFR_CU_CONTEXT_IS_DESTROYED)
    return hfr_fail(hfreduceInvalidArgument, "%s: stream %p is not a stream, or was destroyed", who, s->handle);
  if (r) return hfr_cuda_fail("cuStreamIsCapturing", r);
  if (status == HFR_CU_CAPTURE_BROKEN)
    return hfr_fail(hfreduceInvalidUsage, "%s: the capture of stream %p was invalidated by an earlier error", who, s->handle);
  if (status == HFR_CU_CAPTURE_ACTIVE && !cu->capture_info)
    return hfr_fail(hfreduceInvalidUsage, "%s: stream %p is captured, which CUDA driver %d.%d has no support for here", who,
                    s->handle, cu->version / 1000, cu->version % 1000 / 10);
  if (status == HFR_CU_CAPTURE_NONE) s->capture = 0, s->graph = NULL;
  return hfreduceSuccess;
}

hfreduceResult_t hfr_stream_look(const char *who, void *handle, void *context, struct hfr_stream *s) {
  const struct hfr_cu *cu = hfr_cuda();
  hfr_cu_context popped;
  int r = HFR_CU_SUCCESS;
  *s = (struct hfr_stream){.handle = handle, .context = context, .device = -1};
  if (!is_default(handle)) {
    s->context = NULL;
    r = cu->stream_context(handle, (hfr_cu_context *)&s->context);
    if (r == HFR_CU_INVALID_HANDLE || r == HFR_CU_CONTEXT_IS_DESTROYED || r == HFR_CU_INVALID_VALUE)
      return hfr_fail(hfreduceInvalidArgument, "%s: stream %p is not a stream, or was destroyed", who, handle);
    if (r == HFR_CU_NOT_INITIALIZED)
      return hfr_fail(hfreduceInvalidArgument, "%s: stream %p cannot be one: this process has not initialised CUDA", who, handle);
    if (r) return hfr_cuda_fail("cuStreamGetCtx", r);
  } else if (!context) {
    cu->context_current((hfr_cu_context *)&s->context);
    if (!s->context)
      return hfr_fail(hfreduceInvalidArgument, "%s: the default stream was given, but this thread has no CUDA context", who);
  }
  if ((r = cu->context_push(s->context))) {
    if (r == HFR_CU_CONTEXT_IS_DESTROYED || r == HFR_CU_INVALID_CONTEXT)
      return hfr_fail(hfreduceInvalidArgument, "%s: the CUDA context of stream %p was destroyed", who, handle);
    return hfr_cuda_fail("cuCtxPushCurrent", r);
  }
  r = cu->context_device(&s->device);
  hfreduceResult_t result = r ? hfr_cuda_fail("cuCtxGetDevice", r) : look_at_capture(who, cu, s);
  cu->context_pop(&popped);
  return result;
}

/* ---------------------------------------------------------------- what there is */

int hfr_cuda_mem_ops(const struct hfr_cu *cu, int device) {
  int can = 0;
  if (!cu->stream_wait_value || !cu->stream_write_value) return 0;
  /* From 11.7 on, the second version of the calls needs no permission; before, the kernel module had to grant it. */
  return cu->version >= 11070 || (!cu->device_attribute(&can, HFR_CU_ATTR_MEM_OPS_V1, device) && can);
}

int hfr_cuda_pci(const struct hfr_cu *cu, int device, char text[16]) {
  int domain = 0, bus = 0, slot = 0;
  if (cu->device_attribute(&domain, HFR_CU_ATTR_PCI_DOMAIN, device) || cu->device_attribute(&bus, HFR_CU_ATTR_PCI_BUS, device) ||
      cu->device_attribute(&slot, HFR_CU_ATTR_PCI_DEVICE, device))
    return 0;
  snprintf(text, 16, "%04x:%02x:%02x.0", (unsigned)domain & 0xffff, (unsigned)bus & 0xff, (unsigned)slot & 0xff);
  return 1;
}

int hfr_cuda_numa(const struct hfr_cu *cu, int device) {
  char pci[16], path[80];
  int node = -1;
  if (!hfr_cuda_pci(cu, device, pci)) return -1;
  snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/numa_node", pci);
  FILE *file = fopen(path, "re");
  if (file && fscanf(file, "%d", &node) != 1) node = -1;
  if (file) fclose(file);
  return node;
}

int hfr_cuda_one_queue(void) { return hfr_device_queues() == 1; }

static int describe_device(const struct hfr_cu *cu, int ordinal, char *text, size_t size) {
  char name[128] = "?", pci[16] = "?", numa[16] = "unknown";
  hfr_cu_device device;
  size_t bytes = 0;
  int engines = 0;
  if (cu->device_get(&device, ordinal)) return 0;
  cu->device_name(name, sizeof name, device);
  cu->device_memory(&bytes, device);
  cu->device_attribute(&engines, HFR_CU_ATTR_COPY_ENGINES, device);
  hfr_cuda_pci(cu, device, pci);
  if (hfr_cuda_numa(cu, device) >= 0) snprintf(numa, sizeof numa, "%d", hfr_cuda_numa(cu, device));
  return snprintf(text, size,
                  "device cuda %d: %s, PCI %s, NUMA node %s, %.1f GiB, %d copy engines, stream memory operations %s\n", ordinal,
                  name, pci, numa, (double)bytes / (1 << 30), engines,
                  !hfr_cuda_mem_ops(cu, device) ? "no: host functions instead"
                  : !hfr_cuda_mem_ops_wanted()  ? "switched off: host functions instead"
                                                : "yes");
}

size_t hfr_device_describe(char *text, size_t size) {
  const char *why;
  const struct hfr_cu *cu = hfr_cu_load(&why);
  char reason[160];
  int count = 0, r = cu ? cu->init(0) : 0;
  size_t n = 0;
  if (!cu || r || (r = cu->device_count(&count)) || !count) {
    n = (size_t)snprintf(text, size, "device cuda: none: %s\n",
                         !cu ? why
                         : r ? hfr_cu_error(r, reason)
                             : "the driver has no device");
    return n < size ? n : size - 1;
  }
  n = (size_t)snprintf(text, size, "device cuda: driver %d.%d, %d device%s\n", cu->version / 1000, cu->version % 1000 / 10, count,
                       count > 1 ? "s" : "");
  for (int i = 0; i < count && n < size; i++) n += (size_t)describe_device(cu, i, text + n, size - n);
  if (n < size) n += hfr_gdrcopy_describe(text + n, size - n);
  if (n < size) n += hfr_pair_describe(cu, count, text + n, size - n);
  if (hfr_cuda_one_queue() && n < size)
    n += (size_t)snprintf(text + n, size - n,
                          "device cuda warning: CUDA_DEVICE_MAX_CONNECTIONS=1: while a collective waits, other streams of the "
                          "process wait with it\n");
  return n < size ? n : size - 1;
}

/* ---------------------------------------------------------------- the device's entry */

static const char *cuda_why_absent(void) {
  const char *why;
  return hfr_cu_load(&why) ? NULL : why;
}

static int cuda_owns(const void *ptr) {
  struct hfr_memory m;
  hfr_memory_of(ptr, &m);
  return m.kind == HFR_MEMORY_DEVICE || m.kind == HFR_MEMORY_MANAGED;
}

/* In the thread's current context; as for the runtime, that is device 0's where none was chosen. */
static hfreduceResult_t cuda_alloc(void **ptr, size_t bytes) {
  const struct hfr_cu *cu = hfr_cuda();
  hfr_cu_context current = NULL;
  if (!cu) return hfr_fail(hfreduceInvalidUsage, "no device memory: %s", cuda_why_absent());
  cu->context_current(&current);
  void *preset = current ? NULL : hfr_device_context(0);
  if (!current && !preset) return (hfreduceResult_t)hfr_last_error()->code;
  if (preset) cu->context_push(preset);
  int r = cu->mem_alloc((hfr_cu_ptr *)ptr, bytes ? bytes : 1);
  if (preset) cu->context_pop(&current);
  return r ? hfr_cuda_fail("cuMemAlloc", r) : hfreduceSuccess;
}

/* In the context that it is of: the thread may have another one, or none. */
static hfreduceResult_t cuda_release(void *ptr) {
  const struct hfr_cu *cu = hfr_cuda();
  hfr_cu_context popped;
  struct hfr_memory m;
  hfr_memory_of(ptr, &m);
  int pushed = m.context && !cu->context_push(m.context);
  int r = cu->mem_free((hfr_cu_ptr)ptr);
  if (pushed) cu->context_pop(&popped);
  if (r == HFR_CU_INVALID_VALUE)
    return hfr_fail(hfreduceInvalidArgument, "%p is not the beginning of device memory, or is freed", ptr);
  return r ? hfr_cuda_fail("cuMemFree", r) : hfreduceSuccess;
}

const struct hfr_device hfr_device_cuda = {"cuda", cuda_why_absent, cuda_owns, cuda_alloc, cuda_release};
