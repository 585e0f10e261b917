/*
 * Streams share the device's hardware queues: what stands behind a wait in a queue waits with it. The stand-in maps streams to
 * few queues with FAKE_CUDA=queues=1.
 *
 * Arguments: [--quick] [case [layout ...]]. Exit status 77: no driver.
 */
#include "gpu.h"
#include "ranks.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { COUNT = 1000, COMMS = 12 };

/* Receives on many communicators wait, each in a stream of its own, when the sends are called that the other ranks need: more
 * streams than a driver has queues by preset, fewer than it can have. */
static int many(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t parent = gpu_join(rank, n, id), comm[COMMS];
  hfr_cu_stream in[COMMS], out;
  float *x[COMMS], *y = gpu_alloc(COUNT * 4), got;
  (void)arg;
  for (int i = 0; i < COMMS; i++) OK(hfreduceCommSplit(parent, 0, rank, &comm[i], NULL));
  for (int i = 0; i < COMMS; i++) in[i] = gpu_stream(), x[i] = gpu_alloc(COUNT * 4);
  out = gpu_stream();
  CU(gpu.cu->set_async((hfr_cu_ptr)y, 0x3f800000, COUNT, out));
  CU(gpu.stream_sync(out));
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < COMMS; i++) {
      OK(hfreduceCommSetTimeout(comm[i], 10));
      gpu_fill(x[i], 0, COUNT * 4, in[i]);
      CU(gpu.stream_sync(in[i]));
    }
    for (int i = 0; i < COMMS; i++) OK(hfreduceRecv(x[i], COUNT, hfreduceFloat32, (rank + n - 1) % n, comm[i], in[i]));
    usleep(20000);
    for (int i = 0; i < COMMS; i++) OK(hfreduceSend(y, COUNT, hfreduceFloat32, (rank + 1) % n, comm[i], out));
    WANT(gpu_runs_dry(out, 20));
    for (int i = 0; i < COMMS; i++) {
      hfreduceResult_t error;
      WANT(gpu_runs_dry(in[i], 20));
      OK(hfreduceCommGetAsyncError(comm[i], &error));
      WANT(!error);
      gpu_read(&got, x[i] + COUNT - 1, 4, in[i]);
      WANT(got == 1);
    }
  }
  for (int i = 0; i < COMMS; i++) OK(hfreduceCommDestroy(comm[i]));
  OK(hfreduceCommDestroy(parent));
  for (int i = 0; i < COMMS; i++) gpu_free(x[i]);
  gpu_free(y);
  return 0;
}

/* With one queue for all (CUDA_DEVICE_MAX_CONNECTIONS=1) messages must come in groups. */
static int one(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), *y = gpu_alloc(COUNT * 4), got;
  const char *text = getenv("CUDA_DEVICE_MAX_CONNECTIONS");
  (void)arg;
  if (!text || strcmp(text, "1")) return 0;
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
  WANT(hfreduceRecv(y, COUNT, hfreduceFloat32, (rank + n - 1) % n, comm, stream) == hfreduceInvalidUsage);
  WANT(strstr(hfreduceGetLastError(NULL), "in one group") && strstr(hfreduceGetLastError(NULL), "unset"));
  WANT(hfreduceSend(x, COUNT, hfreduceFloat32, (rank + 1) % n, comm, stream) == hfreduceInvalidUsage);
  OK(hfreduceGroupStart());
  OK(hfreduceRecv(y, COUNT, hfreduceFloat32, (rank + n - 1) % n, comm, stream));
  OK(hfreduceSend(x, COUNT, hfreduceFloat32, (rank + 1) % n, comm, stream));
  OK(hfreduceGroupEnd());
  OK(hfreduceAllReduce(y, y, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  gpu_read(&got, y + COUNT - 1, 4, stream);
  WANT(got == (float)n);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(y);
  return 0;
}

/* Two receives of one communicator on two streams, of which the first is held up: the second does not begin the first, whose
 * buffer the stream still uses. Few bytes, so that CPUs write them where they can. */
static int held(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { FEW = 16 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream first = gpu_stream(), second = gpu_stream();
  float *x = gpu_alloc(FEW * 4), *y = gpu_alloc(FEW * 4), got[2];
  _Atomic uint32_t *word;
  hfr_cu_ptr address;
  (void)arg;
  CU(gpu.host_alloc((void **)&word, 4096, 2));
  CU(gpu.cu->host_device_pointer(&address, (void *)word, 0));
  for (int round = 0; round < 3; round++) {
    *word = 0;
    CU(gpu.cu->set_async((hfr_cu_ptr)x, rank ? 0 : 0x3f800000, FEW, first));
    CU(gpu.cu->set_async((hfr_cu_ptr)y, rank ? 0 : 0x40000000, FEW, second));
    CU(gpu.stream_sync(first));
    CU(gpu.stream_sync(second));
    if (rank) {
      CU(gpu.cu->stream_wait_value(first, address, 1, HFR_CU_WAIT_GEQ));
      gpu_fill(x, 0xee, FEW * 4, first);
    }
    OK(hfreduceBroadcast(x, x, FEW, hfreduceFloat32, 0, comm, first));
    OK(hfreduceBroadcast(y, y, FEW, hfreduceFloat32, 0, comm, second));
    usleep(100000);
    *word = 1;
    gpu_read(&got[0], x + FEW - 1, 4, first);
    gpu_read(&got[1], y + FEW - 1, 4, second);
    WANT(got[0] == 1 && got[1] == 2);
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(y);
  CU(gpu.host_free((void *)word));
  return 0;
}

int main(int argc, char **argv) {
  static const struct gpu_case cases[] = {{"many", many, "2"}, {"one", one, "2"}, {"held", held, "2"}};
  return gpu_run_cases(cases, sizeof cases / sizeof *cases, argc, argv);
}
