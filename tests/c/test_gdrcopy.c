/*
 * Small messages of device memory that CPUs copy through mappings (device/gdrcopy.c). What the collectives give is test_cuda's
 * affair, which runs beside this with and without the library; here: memory that is freed and given again, many buffers, what
 * calls may not do to memory after an error.
 *
 * On the stand-ins (fake/cuda, fake/gdrapi.c), or where there is a device and GDRCopy.
 */
#include "gpu.h"
#include "ranks.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Sum of small integers at the beginning of `bytes` of device memory; what it should be. */
static int sum_up(int rank, int n, hfreduceComm_t comm, hfr_cu_stream stream, float *x, size_t count, float salt) {
  float *host = calloc(count, 4), want = 0;
  for (int r = 0; r < n; r++) want += (float)r + salt;
  for (size_t i = 0; i < count; i++) host[i] = (float)rank + salt;
  gpu_copy(x, host, count * 4, stream);
  OK(hfreduceAllReduce(x, x, count, hfreduceFloat32, hfreduceSum, comm, stream));
  gpu_read(host, x, count * 4, stream);
  for (size_t i = 0; i < count; i++) WANT(host[i] == want);
  free(host);
  return 0;
}

/* Memory that is freed is other memory when it is given again, also at the same address: its old mapping must not be used. */
static int freed(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  void *first = NULL;
  int again = 0;
  (void)arg;
  for (int i = 0; i < 10; i++) {
    float *x = gpu_alloc(4096);
    if (!i) first = x;
    again += i && x == first;
    if (sum_up(rank, n, comm, stream, x, 200, (float)i)) return 1;
    gpu_free(x);
  }
  WANT(again || !gpu.stand_in || !getenv("FAKE_CUDA")); /* FAKE_CUDA=reuse=1: else nothing was tested */
  OK(hfreduceCommDestroy(comm));
  return 0;
}

/* More buffers than mappings are kept, in turn and again; and parts of one large buffer. */
static int many(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { BUFFERS = 80 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x[BUFFERS], *large = gpu_alloc(8 << 20);
  (void)arg;
  for (int i = 0; i < BUFFERS; i++) x[i] = gpu_alloc(100000);
  for (int round = 0; round < 2; round++)
    for (int i = 0; i < BUFFERS; i++)
      if (sum_up(rank, n, comm, stream, x[i] + 17 * round, 100, (float)(i + round))) return 1;
  for (size_t at = 0; at < (8 << 20) / 4 - 2000; at += 16384 * 9 - 5) /* also across the mappings' pages */
    if (sum_up(rank, n, comm, stream, large + at, 2000, 1)) return 1;
  OK(hfreduceCommDestroy(comm));
  for (int i = 0; i < BUFFERS; i++) gpu_free(x[i]);
  gpu_free(large);
  return 0;
}

/* Many calls on the same mapping before the first of them runs, on messages as well. */
static int pending(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { CALLS = 40, COUNT = 300 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(CALLS * COUNT * 4), *y = gpu_alloc(COUNT * 4), *host = calloc(CALLS * COUNT, 4);
  (void)arg;
  for (int i = 0; i < CALLS * COUNT; i++) host[i] = (float)(i / COUNT);
  gpu_copy(x, host, CALLS * COUNT * 4, stream);
  for (int i = 0; i < CALLS; i++)
    OK(hfreduceAllReduce(x + i * COUNT, x + i * COUNT, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  OK(hfreduceGroupStart());
  OK(hfreduceSend(x + COUNT, COUNT, hfreduceFloat32, (rank + 1) % n, comm, stream));
  OK(hfreduceRecv(y, COUNT, hfreduceFloat32, (rank + n - 1) % n, comm, stream));
  OK(hfreduceGroupEnd());
  gpu_fill(x + COUNT, 0, COUNT * 4, stream); /* it has left */
  gpu_read(host, y, COUNT * 4, stream);
  for (int i = 0; i < COUNT; i++) WANT(host[i] == (float)n);
  gpu_read(host, x, CALLS * COUNT * 4, stream);
  for (int i = 0; i < CALLS * COUNT; i++) WANT(host[i] == (i / COUNT == 1 ? 0 : (float)(i / COUNT * n)));
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(y);
  free(host);
  return 0;
}

/* A call that is broken off before its stream has got to it leaves the memory alone: it still belongs to what is in the stream.
 */
static int broken_off(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream(), other = gpu_stream();
  float *x = gpu_alloc(4096), got[100];
  _Atomic uint32_t *word;
  hfr_cu_ptr address;
  (void)arg;
  CU(gpu.host_alloc((void **)&word, 4096, 2));
  CU(gpu.cu->host_device_pointer(&address, word, 0));
  *word = 0;
  if (sum_up(rank, n, comm, stream, x, 100, 1)) return 1;        /* what lies in the slot could be written */
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x40e00000, 100, stream)); /* 7.0 */
  CU(gpu.stream_sync(stream));
  CU(gpu.cu->stream_wait_value(stream, address, 1, HFR_CU_WAIT_GEQ));
  OK(hfreduceAllReduce(x, x, 100, hfreduceFloat32, hfreduceSum, comm, stream));
  usleep(200000); /* the others are so far, too */
  OK(hfreduceCommAbort(comm));
  for (int pending = 1, i = 0; pending; i++, usleep(1000)) { /* the call ends, though its stream has not got to it */
    OK(hfreduceCommPending(comm, &pending));
    WANT(i < 20000);
  }
  CU(gpu.cu->stream_wait_value(other, address, 0, HFR_CU_WAIT_GEQ | (getenv("FAKE_GDR") ? HFR_CU_WAIT_FLUSH : 0)));
  gpu_read(got, x, sizeof got, other);
  for (int i = 0; i < 100; i++) WANT(got[i] == 7);
  *word = 1;
  CU(gpu.stream_sync(stream));
  gpu_free(x);
  CU(gpu.host_free(word));
  return 0;
}

int main(int argc, char **argv) {
  static const struct gpu_case cases[] = {
      {"freed", freed, "1 2 1,1"},
      {"many", many, "2 1,1"},
      {"pending", pending, "1 2 3,1 t2"},
      {"broken_off", broken_off, "2 1,1"},
  };
  return gpu_run_cases(cases, sizeof cases / sizeof *cases, argc, argv);
}
