/*
 * all_reduce over pairs of GPUs that NVLink joins: that they are used, that all ranks get the same bits, what happens when ranks
 * do not go along, and communicators that have no pairs. Beside it, test_cuda and test_cuda_faults run where there are pairs,
 * too.
 *
 * Arguments: [--quick] [case [layout ...]]. Exit status 77: no driver. On a real driver it needs GPUs that NVLink joins.
 */
#include "comm/comm.h"
#include "device/device.h"
#include "gpu.h"
#include "ranks.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Kernels that the stand-in has been given. */
static uint64_t kernels(void) {
  uint64_t (*count)(void);
  *(void **)&count = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), "fake_cuda_kernels");
  return count ? count() : 0;
}

/* Has this machine what the case is about? A real one may have other GPUs, or none that are joined. */
static int joined(int rank, int n) {
  struct hfr_links links;
  if (gpu.devices >= n && !hfr_device_links(rank, &links)) return 1;
  fprintf(stderr, "rank %d: no NVLink for %d ranks here: nothing is tested\n", rank, n);
  return 0;
}

static _Thread_local uint32_t state;
static float any_float(void) {
  state = state * 1664525 + 1013904223;
  return (float)((int32_t)state >> 8) / (float)(1 << 20);
}

/* Values of which no order of additions gives the same bits: all ranks have the same all the same, near the true sum, each time.
 */
static int bits(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const size_t counts[] = {1031, 65536, 300007, 2000003};
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  size_t most = arg ? 300007 : 2000003;
  float *x = gpu_alloc(most * 4), *y = gpu_alloc(most * 4), *mine = malloc(most * 4), *got = malloc(most * 4),
        *again = malloc(most * 4);
  float *theirs = malloc(most * 4), *sum = malloc(most * 4);
  for (int c = 0; c < 4 && counts[c] <= most; c++) {
    size_t count = counts[c];
    uint64_t before = kernels();
    state = (uint32_t)(rank * 97 + c);
    for (size_t i = 0; i < count; i++) mine[i] = any_float();
    gpu_copy(x, mine, count * 4, stream);
    OK(hfreduceAllReduce(x, y, count, hfreduceFloat32, hfreduceSum, comm, stream));
    gpu_read(got, y, count * 4, stream);
    OK(hfreduceAllReduce(x, x, count, hfreduceFloat32, hfreduceSum, comm, stream)); /* in place */
    gpu_read(again, x, count * 4, stream);
    WANT(!memcmp(got, again, count * 4));
    WANT(!gpu.stand_in || kernels() > before);
    memcpy(theirs, got, count * 4);
    OK(hfreduceBroadcast(theirs, theirs, count, hfreduceFloat32, 0, comm, NULL));
    WANT(!memcmp(got, theirs, count * 4));
    OK(hfreduceAllReduce(mine, sum, count, hfreduceFloat32, hfreduceSum, comm, NULL));
    for (size_t i = 0; i < count; i++) WANT(got[i] - sum[i] < 1e-3f && sum[i] - got[i] < 1e-3f);
  }
  const struct hfreduceComm *half = hfr_pairs_half(comm); /* the other pairs of the node read the sums where they came out */
  WANT(!half || half->layout.nlocal == 1 || half->engine.lent > 0);
  WANT(half || !gpu.stand_in);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(y);
  free(mine), free(got), free(again), free(theirs), free(sum);
  return 0;
}

/* An average of halves that overflow when they are added: each sum is scaled before it is rounded. */
static int averages(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { COUNT = 4099 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  uint16_t *x = gpu_alloc(COUNT * 2), got[COUNT];
  uint8_t *tiny = gpu_alloc(COUNT), tiny_got[COUNT];
  double *wide = gpu_alloc(COUNT * 8), wide_got[COUNT];
  int32_t *whole = gpu_alloc(COUNT * 4), whole_got[COUNT];
  (void)arg;
  for (int i = 0; i < COUNT; i++) got[i] = 0x7b00, wide_got[i] = rank + i, whole_got[i] = -3 * rank - 1; /* 0x7b00: 57344 */
  gpu_copy(x, got, sizeof got, stream);
  gpu_copy(wide, wide_got, sizeof wide_got, stream);
  gpu_copy(whole, whole_got, sizeof whole_got, stream);
  CU(gpu.stream_sync(stream));
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat16, hfreduceAvg, comm, stream));
  OK(hfreduceAllReduce(wide, wide, COUNT, hfreduceFloat64, hfreduceAvg, comm, stream));
  OK(hfreduceAllReduce(whole, whole, COUNT, hfreduceInt32, hfreduceAvg, comm, stream));
  gpu_read(got, x, sizeof got, stream);
  gpu_read(wide_got, wide, sizeof wide_got, stream);
  gpu_read(whole_got, whole, sizeof whole_got, stream);
  hfreduceCommInfo_t info;
  OK(hfreduceCommGetInfo(comm, &info));
  /* subnormal numbers of e4m3: none is lost on a node (between nodes partial sums are scaled, too) */
  for (int value = 1; value < 9 && info.nnodes == 1; value++) {
    gpu_fill(tiny, value, COUNT, stream);
    OK(hfreduceAllReduce(tiny, tiny, COUNT, hfreduceFloat8e4m3, hfreduceAvg, comm, stream));
    gpu_read(tiny_got, tiny, COUNT, stream);
    for (int i = 0; i < COUNT; i++) WANT(tiny_got[i] == value);
  }
  int sum = 0;
  for (int r = 0; r < n; r++) sum += -3 * r - 1;
  for (int i = 0; i < COUNT; i++) {
    WANT(got[i] == 0x7b00);
    WANT(wide_got[i] == i + (n - 1) / 2.0);
    WANT(whole_got[i] == sum / n);
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(wide), gpu_free(whole), gpu_free(tiny);
  return 0;
}

/* Many calls in flight, of all sizes, in groups with others, in two streams; nothing waits in between. */
static int crowd(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { CALLS = 12, MOST = 400000 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream[2] = {gpu_stream(), gpu_stream()};
  int32_t *x[CALLS], *small = gpu_alloc(64), *message = gpu_alloc(4000), *got = malloc((size_t)MOST * 4);
  int rounds = arg ? 3 : 10;
  for (int i = 0; i < CALLS; i++) x[i] = gpu_alloc((size_t)MOST * 4);
  for (int round = 0; round < rounds; round++) {
    for (int i = 0; i < CALLS; i++) CU(gpu.cu->set_async((hfr_cu_ptr)x[i], (unsigned)(rank + i + round), MOST, stream[i % 2]));
    CU(gpu.cu->set_async((hfr_cu_ptr)small, 1, 16, stream[0]));
    for (int i = 0; i < CALLS; i += 3) {
      OK(hfreduceGroupStart());
      for (int k = i; k < i + 3; k++) {
        size_t count = (size_t)MOST / (size_t)(k % 4 == 0 ? 1 : k % 4 == 1 ? 7 : 100);
        OK(hfreduceAllReduce(x[k], x[k], count, hfreduceInt32, k % 2 ? hfreduceMax : hfreduceSum, comm, stream[k % 2]));
      }
      if (i == 3) OK(hfreduceAllReduce(small, small, 16, hfreduceInt32, hfreduceSum, comm, stream[0]));
      if (i == 6) OK(hfreduceSend(x[10], 1000, hfreduceInt32, (rank + 1) % n, comm, stream[0]));
      if (i == 6) OK(hfreduceRecv(message, 1000, hfreduceInt32, (rank + n - 1) % n, comm, stream[0]));
      OK(hfreduceGroupEnd());
    }
    for (int i = 0; i < CALLS; i++) {
      size_t count = (size_t)MOST / (size_t)(i % 4 == 0 ? 1 : i % 4 == 1 ? 7 : 100);
      int sum = n * (n - 1) / 2 + n * (i + round), max = n - 1 + i + round;
      gpu_read(got, x[i], (size_t)MOST * 4, stream[i % 2]);
      for (size_t k = 0; k < MOST; k++) WANT(got[k] == (k >= count ? rank + i + round : i % 2 ? max : sum));
    }
    gpu_read(got, small, 64, stream[0]);
    WANT(got[15] == n);
  }
  OK(hfreduceCommDestroy(comm));
  for (int i = 0; i < CALLS; i++) gpu_free(x[i]);
  gpu_free(small), gpu_free(message);
  free(got);
  return 0;
}

#define COUNT 100000

/* A rank whose buffer lies in host memory, one that captures: it cannot go along, and all hear of it. */
static int apart(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfr_cu_stream stream;
  hfreduceComm_t parent = gpu_join(rank, n, id), comm;
  float *x = gpu_alloc(COUNT * 4), *host = calloc(COUNT, 4);
  (void)arg;
  stream = gpu_stream();
  gpu_fill(x, 0, COUNT * 4, stream);
  if (!joined(rank, n)) return 0;
  OK(hfreduceCommSplit(parent, 0, rank, &comm, NULL));
  OK(hfreduceCommSetTimeout(comm, 20));
  hfreduceResult_t r = hfreduceAllReduce(rank == 1 ? host : x, rank == 1 ? host : x, COUNT, hfreduceFloat32, hfreduceSum, comm,
                                         rank == 1 ? NULL : stream);
  /* The others' launches return at once; one that comes late may be told already. */
  WANT(r == hfreduceMismatch || (rank != 1 && r == hfreduceSuccess));
  WANT(gpu_error_of(comm, 5) == hfreduceMismatch && strstr(hfreduceGetLastError(comm), "over NVLink pairs"));
  WANT(gpu_runs_dry(stream, 5));
  OK(hfreduceCommDestroy(comm));
  /* the other communicator is none the worse for it */
  float got, one = 1;
  uint32_t pattern;
  memcpy(&pattern, &one, 4);
  CU(gpu.cu->set_async((hfr_cu_ptr)x, pattern, COUNT, stream));
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, parent, stream));
  gpu_read(&got, x + COUNT - 1, 4, stream);
  WANT(got == (float)n);
  OK(hfreduceCommDestroy(parent));
  gpu_free(x);
  free(host);
  return 0;
}

/* The call is on another device than the communicator was made for. */
static int elsewhere(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_context other;
  (void)arg;
  if (!joined(rank, n)) return 0;
  CU(gpu.cu->primary_retain(&other, (rank + 2) % gpu.devices));
  CU(gpu.set_current(other));
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  WANT(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream) == hfreduceInvalidArgument);
  WANT(strstr(hfreduceGetLastError(NULL), "was made for device") && strstr(hfreduceGetLastError(NULL), "HFREDUCE_NVLINK=0"));
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

/* Aborted while its half waits for ranks that neither call nor leave: the streams go on at once, and later the others' do. */
static int aborted(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  (void)arg;
  gpu_fill(x, 0, COUNT * 4, stream);
  CU(gpu.stream_sync(stream));
  if (rank < 2) {
    for (int i = 0; i < 10; i++) OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
    usleep(200000);
    if (rank == 0) OK(hfreduceCommAbort(comm));
    WANT(gpu_error_of(comm, 2) == hfreduceAborted);
    WANT(gpu_runs_dry(stream, 1.5));
  } else {
    sleep(3);
    WANT(gpu_error_of(comm, 1) == hfreduceAborted);
    WANT(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream) == hfreduceAborted);
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

static int sum_is_right(int rank, int n, hfreduceComm_t comm, hfr_cu_stream stream, float *x) {
  float got[2];
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  gpu_read(got, x + COUNT - 1, 4, stream);
  gpu_read(got + 1, x, 4, stream);
  WANT(got[0] == (float)n && got[1] == (float)n);
  return 0;
}

/* Communicators come and go, made of each other: each has pairs of its own, where all of its ranks have a partner. */
static int family(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id), child;
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  int last = n - 1;
  for (int i = 0; i < (arg ? 4 : 20); i++) {
    uint64_t before = kernels();
    OK(hfreduceCommSplit(comm, rank / 2, -rank, &child, NULL));
    if (sum_is_right(rank, 2, child, stream, x)) return 1;
    WANT(!gpu.stand_in || kernels() > before);
    OK(hfreduceCommDestroy(child));
  }
  uint64_t before = kernels();
  if (rank == last) {
    OK(hfreduceCommDestroy(comm));
  } else {
    OK(hfreduceCommShrink(comm, &last, 1, &child, NULL, 0)); /* one rank has lost its partner */
    if (sum_is_right(rank, n - 1, child, stream, x)) return 1;
    WANT(kernels() == before);
    OK(hfreduceCommDestroy(child));
    OK(hfreduceCommDestroy(comm));
  }
  gpu_free(x);
  return 0;
}

/* The device is reset between two communicators: what was loaded in its context is gone. */
static int reset(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t parent, comm;
  (void)arg;
  OK(hfreduceCommInitRank(&parent, n, *id, rank)); /* with no device yet: it lives on */
  if (!gpu_open(rank)) exit(77);
  for (int i = 0; i < 3; i++) {
    enum { LARGE = 24 << 20 }; /* with reuse=1 it lies where the pair's memory did */
    void *large = gpu_alloc(LARGE);
    hfr_cu_stream stream = gpu_stream();
    float *x = gpu_alloc(COUNT * 4);
    uint64_t before = kernels();
    gpu_fill(large, 77, LARGE, stream);
    OK(hfreduceCommSplit(parent, 0, rank, &comm, NULL));
    if (sum_is_right(rank, n, comm, stream, x)) return 1;
    WANT(!gpu.stand_in || kernels() > before);
    OK(hfreduceCommDestroy(comm));
    uint8_t *got = malloc(LARGE);
    gpu_read(got, large, LARGE, stream);
    for (int k = 0; k < LARGE; k++) WANT(got[k] == 77);
    free(got);
    OK(hfreduceBarrier(parent, NULL)); /* who still has this device's memory open would lose it */
    CU(gpu.reset(rank % gpu.devices));
    OK(hfreduceBarrier(parent, NULL));
    if (!gpu_open(rank)) return 1;
  }
  OK(hfreduceCommDestroy(parent));
  return 0;
}

/* A half's connection breaks, which no rank of the other half sees. */
static int half_lost(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  int pending;
  (void)arg;
  if (sum_is_right(rank, n, comm, stream, x)) return 1;
  OK(hfreduceBarrier(comm, NULL));
  if (rank % 2) OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  if (rank % 2) OK(hfreduceCommPending(comm, &pending));
  if (rank % 2) WANT(pending == 1);
  usleep(200000); /* until all have left the barrier */
  if (rank == 2) shutdown(hfr_pairs_half(comm)->control[0].fd, SHUT_RDWR);
  WANT(gpu_error_of(comm, 5) == hfreduceRemoteError);
  WANT(strstr(hfreduceGetLastError(comm), "among ranks 0 2 of the NVLink pairs"));
  WANT(gpu_runs_dry(stream, 5));
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

/* There are no pairs: an odd number of ranks, one device for all, switched off, or a driver that fails when they are made. */
static int none(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  (void)arg;
  if (sum_is_right(rank, n, comm, stream, x)) return 1;
  WANT(!kernels());
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

/* One rank's driver fails when it makes its side: all of them do without. */
static int one_sided(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  if (rank == n - 1) setenv("FAKE_CUDA", "devices=4 nvlink=2 fail=cuIpcOpenMemHandle:1:1", 1);
  return none(rank, n, id, arg);
}

/* A launch that could not be prepared, for the driver had no memory (FAKE_CUDA says where), leaves the rings as they were. */
static int unprepared(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  (void)arg;
  WANT(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  for (int i = 0; i < 6; i++)
    if (sum_is_right(rank, n, comm, stream, x)) return 1;
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

/* A communicator made while the thread has a group open, and one split off. */
static int in_group(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm, child;
  (void)arg;
  if (!gpu_open(rank)) exit(77);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), got;
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
  OK(hfreduceGroupStart());
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  OK(hfreduceCommSplit(comm, 0, -rank, &child, NULL));
  OK(hfreduceGroupEnd());
  gpu_read(&got, x, 4, stream);
  WANT(got == (float)n);
  if (sum_is_right(rank, n, child, stream, x)) return 1;
  OK(hfreduceCommDestroy(child));
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  return 0;
}

/* Two communicators in a group, not in the same order on all ranks: with one queue in the hardware too, no wait may stand in
   front of what another rank's wait needs. */
static int any_order(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { LARGE = 3000000 };
  hfreduceComm_t parent = gpu_join(rank, n, id), comm[2];
  hfr_cu_stream stream[2] = {gpu_stream(), gpu_stream()};
  float *x[2], got;
  (void)arg;
  for (int i = 0; i < 2; i++) {
    OK(hfreduceCommSplit(parent, 0, rank, &comm[i], NULL));
    OK(hfreduceCommSetTimeout(comm[i], 10));
    x[i] = gpu_alloc(LARGE * 4);
    CU(gpu.cu->set_async((hfr_cu_ptr)x[i], 0x3f800000, LARGE, stream[i]));
    CU(gpu.stream_sync(stream[i]));
  }
  OK(hfreduceGroupStart());
  for (int k = 0; k < 2; k++) {
    int i = rank % 2 ? 1 - k : k;
    OK(hfreduceAllReduce(x[i], x[i], LARGE, hfreduceFloat32, hfreduceSum, comm[i], stream[i]));
  }
  OK(hfreduceGroupEnd());
  for (int i = 0; i < 2; i++) {
    WANT(gpu_runs_dry(stream[i], 8));
    gpu_read(&got, x[i] + LARGE - 1, 4, stream[i]);
    WANT(got == (float)n);
    OK(hfreduceCommDestroy(comm[i]));
    gpu_free(x[i]);
  }
  OK(hfreduceCommDestroy(parent));
  return 0;
}

static int large_is_right(int rank, int n, hfreduceComm_t comm, hfr_cu_stream stream, const float *x, size_t count) {
  float got;
  WANT(gpu_runs_dry(stream, 12));
  gpu_read(&got, x + count - 1, 4, stream);
  WANT(got == (float)n);
  OK(hfreduceCommDestroy(comm));
  return 0;
}

/* A large call where streams hold few operations (FAKE_CUDA's depth), so that the launch itself waits for the device. */
static int long_queue(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { LARGE = 4000000 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(LARGE * 4);
  (void)arg;
  OK(hfreduceCommSetTimeout(comm, 10));
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, LARGE, stream));
  CU(gpu.stream_sync(stream));
  OK(hfreduceAllReduce(x, x, LARGE, hfreduceFloat32, hfreduceSum, comm, stream));
  return large_is_right(rank, n, comm, stream, x, LARGE);
}

/* The same for all ranks by one thread: it must not wait for one device before the others have what that one waits for. */
static int one_caller(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { LARGE = 4000000 };
  static struct {
    hfreduceComm_t comm;
    hfr_cu_stream stream;
    hfr_cu_context context;
    float *x;
  } all[8];
  static _Atomic int ready, called;
  (void)arg;
  all[rank].comm = gpu_join(rank, n, id);
  all[rank].stream = gpu_stream();
  all[rank].x = gpu_alloc(LARGE * 4);
  CU(gpu.cu->context_current(&all[rank].context));
  CU(gpu.cu->set_async((hfr_cu_ptr)all[rank].x, 0x3f800000, LARGE, all[rank].stream));
  CU(gpu.stream_sync(all[rank].stream));
  atomic_fetch_add(&ready, 1);
  while (atomic_load(&ready) % n) usleep(1000);
  if (rank == 0) {
    OK(hfreduceGroupStart());
    for (int r = 0; r < n; r++) {
      CU(gpu.set_current(all[r].context));
      OK(hfreduceAllReduce(all[r].x, all[r].x, LARGE, hfreduceFloat32, hfreduceSum, all[r].comm, all[r].stream));
    }
    OK(hfreduceGroupEnd());
    CU(gpu.set_current(all[0].context));
    atomic_store(&called, 1);
  }
  while (!atomic_load(&called)) usleep(1000);
  return large_is_right(rank, n, all[rank].comm, all[rank].stream, all[rank].x, LARGE);
}

/* A call that the partner never makes pushes into his memory all the same: it must not be another communicator's by then. */
static int stray(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t parent = gpu_join(rank, n, id), first, second;
  hfr_cu_stream late = gpu_stream(), stream = gpu_stream();
  hfr_cu_ptr gate;
  _Atomic uint32_t *word;
  float *x = gpu_alloc(COUNT * 4), *y = gpu_alloc(COUNT * 4), got[2];
  (void)arg;
  CU(gpu.host_alloc((void **)&word, 4096, 2));
  CU(gpu.cu->host_device_pointer(&gate, (void *)word, 0));
  atomic_store(word, 0);
  if (!gpu.cu->stream_wait_value || gpu.cu->stream_wait_value(stream, gate, 0, 0)) return 0;
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x42c80000, COUNT, late)); /* 100 */
  CU(gpu.cu->set_async((hfr_cu_ptr)y, 0x3f800000, COUNT, stream));
  CU(gpu.stream_sync(late));
  OK(hfreduceCommSplit(parent, 0, rank, &first, NULL));
  if (rank == 0) { /* one call too many, which its stream gets to late */
    CU(gpu.cu->stream_wait_value(late, gate, 1, HFR_CU_WAIT_GEQ));
    OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, first, late));
  } else {
    OK(hfreduceCommDestroy(first));
  }
  OK(hfreduceCommSplit(parent, 0, rank, &second, NULL));
  if (rank == 1) CU(gpu.cu->stream_wait_value(stream, gate, 1, HFR_CU_WAIT_GEQ));
  OK(hfreduceAllReduce(y, y, COUNT, hfreduceFloat32, hfreduceSum, second, stream));
  usleep(rank == 0 ? 300000 : 900000);
  atomic_store(word, 1);
  gpu_read(got, y, 4, stream);
  gpu_read(got + 1, y + COUNT - 1, 4, stream);
  WANT(got[0] == (float)n && got[1] == (float)n);
  if (rank == 0) OK(hfreduceCommDestroy(first));
  OK(hfreduceCommDestroy(second));
  OK(hfreduceCommDestroy(parent));
  gpu_free(x), gpu_free(y);
  CU(gpu.host_free((void *)word));
  return 0;
}

int main(int argc, char **argv) {
  setenv("HFREDUCE_NVLINK", "1", 0); /* off by preset */
  static const struct gpu_case cases[] = {
      {"bits", bits, "2 4 2,2 t4"},
      {"averages", averages, "2 4 2,2"},
      {"crowd", crowd, "2 4 2,2 t4"},
      {"apart", apart, "2 4 2,2"},
      {"elsewhere", elsewhere, "4"},
      {"aborted", aborted, "4 2,2 t4"},
      {"family", family, "4"},
      {"half_lost", half_lost, "4 2,2"},
      {"reset", reset, "2 4"},
      {"one_sided", one_sided, "2 4"},
      {"any_order", any_order, "2 4"},
      {"in_group", in_group, "2 4"},
      {"stray", stray, "2"},
      {"long_queue", long_queue, "2 4"},
      {"one_caller", one_caller, ""},
      {"unprepared", unprepared, ""},
      {"none", none, ""},
  };
  return gpu_run_cases(cases, sizeof cases / sizeof *cases, argc, argv);
}
