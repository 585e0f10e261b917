/*
 * Calls on device memory, in the order of streams. Each is compared bit for bit with the same call on host memory, which has
 * tests of its own. Around every call the stream has work: what the call reads is put there before it, what it has written is
 * taken away behind it and overwritten, and nothing waits in between.
 *
 * Arguments: case [layout ...]. A layout as in ranks.h. Exit status 77: no driver.
 */
#include "base/thread.h"
#include "comm/staging.h"
#include "device/cuda.h"
#include "engine/internal.h"
#include "gpu.h"
#include "ranks.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ALL_REDUCE, REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, GATHER, SCATTER, COLLS };
static const char *const coll_name[COLLS] = {"all_reduce",     "reduce",     "broadcast", "all_gather",
                                             "reduce_scatter", "all_to_all", "gather",    "scatter"};

static size_t size_of(hfreduceDataType_t dtype) {
  static const uint8_t size[hfreduceNumTypes] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return size[dtype];
}

/* Elements of the buffers; 0: the rank has none. */
static size_t send_count(int coll, size_t count, int rank, int n, int root) {
  int many = coll == REDUCE_SCATTER || coll == ALL_TO_ALL || (coll == SCATTER && rank == root);
  if ((coll == SCATTER || coll == BROADCAST) && rank != root) return 0;
  return many ? count * (size_t)n : count;
}
static size_t recv_count(int coll, size_t count, int rank, int n, int root) {
  if ((coll == REDUCE || coll == GATHER) && rank != root) return 0;
  return coll == ALL_GATHER || coll == ALL_TO_ALL || coll == GATHER ? count * (size_t)n : count;
}

static hfreduceResult_t call(int coll, const void *send, void *recv, size_t count, hfreduceDataType_t type, hfreduceRedOp_t op,
                             int root, hfreduceComm_t comm, void *stream) {
  switch (coll) {
    case ALL_REDUCE: return hfreduceAllReduce(send, recv, count, type, op, comm, stream);
    case REDUCE: return hfreduceReduce(send, recv, count, type, op, root, comm, stream);
    case BROADCAST: return hfreduceBroadcast(send, recv, count, type, root, comm, stream);
    case ALL_GATHER: return hfreduceAllGather(send, recv, count, type, comm, stream);
    case REDUCE_SCATTER: return hfreduceReduceScatter(send, recv, count, type, op, comm, stream);
    case ALL_TO_ALL: return hfreduceAlltoAll(send, recv, count, type, comm, stream);
    case GATHER: return hfreduceGather(send, recv, count, type, root, comm, stream);
    default: return hfreduceScatter(send, recv, count, type, root, comm, stream);
  }
}

/* Small values that every datatype has exactly, a different one at each place and rank. */
static void fill(uint8_t *p, size_t count, hfreduceDataType_t type, int rank, int salt) {
  for (size_t i = 0; i < count; i++) {
    int v = (int)((i * 7 + (size_t)rank * 13 + (size_t)salt * 5) % 11) - 3;
    uint64_t x = 0;
    switch (type) {
      case hfreduceFloat32: {
        float f = (float)v / 4;
        memcpy(&x, &f, 4);
        break;
      }
      case hfreduceFloat64: {
        double f = (double)v / 4;
        memcpy(&x, &f, 8);
        break;
      }
      case hfreduceFloat16: {
        static const uint16_t half[] = {0xc200, 0xc000, 0xbc00, 0, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700};
        x = half[v + 3];
        break;
      }
      case hfreduceBfloat16: {
        float f = (float)v;
        uint32_t bits;
        memcpy(&bits, &f, 4);
        x = bits >> 16;
        break;
      }
      case hfreduceFloat8e4m3:
      case hfreduceFloat8e5m2: {
        static const uint8_t e4[] = {0xc4, 0xc0, 0xb8, 0, 0x38, 0x40, 0x44, 0x48, 0x4a, 0x4c, 0x4e},
                             e5[] = {0xc2, 0xc0, 0xbc, 0, 0x3c, 0x40, 0x42, 0x44, 0x45, 0x46, 0x47};
        x = (type == hfreduceFloat8e4m3 ? e4 : e5)[v + 3];
        break;
      }
      default: x = (uint64_t)(int64_t)v;
    }
    memcpy(p + i * size_of(type), &x, size_of(type));
  }
}

/* Buffers of one rank: device memory with room around it, and host memory for the reference. */
struct buffers {
  size_t bytes;
  uint8_t *input, *send, *recv, *out; /* on the device: what is put into send, what is taken out of recv */
  uint8_t *host_send, *host_recv, *host_out;
};
static void open_buffers(struct buffers *b, size_t bytes) {
  *b = (struct buffers){.bytes = bytes,
                        .input = gpu_alloc(bytes),
                        .send = gpu_alloc(bytes),
                        .recv = gpu_alloc(bytes),
                        .out = gpu_alloc(bytes),
                        .host_send = malloc(bytes),
                        .host_recv = malloc(bytes),
                        .host_out = malloc(bytes)};
}
static void close_buffers(struct buffers *b) {
  gpu_free(b->input), gpu_free(b->send), gpu_free(b->recv), gpu_free(b->out);
  free(b->host_send), free(b->host_recv), free(b->host_out);
}

/* One call, in place or not, `shift` bytes off the beginning of the allocations. */
static int one_call(int rank, int n, hfreduceComm_t comm, hfr_cu_stream stream, struct buffers *b, int coll, size_t count,
                    hfreduceDataType_t type, hfreduceRedOp_t op, int in_place, size_t shift) {
  size_t size = size_of(type);
  int root = (int)(count % (size_t)n);
  size_t sends = send_count(coll, count, rank, n, root) * size, recvs = recv_count(coll, count, rank, n, root) * size;
  uint8_t *send = b->send + shift, *recv = b->recv + shift, *hsend = b->host_send, *hrecv = b->host_recv;
  fill(hsend, send_count(coll, count, rank, n, root), type, rank, coll);
  if (sends) gpu_copy(b->input, hsend, sends, stream);
  CU(gpu.stream_sync(stream));
  if (in_place && coll != ALL_TO_ALL) {
    if (coll == ALL_GATHER || (coll == GATHER && rank == root))
      send = recv + (size_t)rank * count * size;
    else if (coll == REDUCE_SCATTER || (coll == SCATTER && rank == root))
      recv = send + (size_t)rank * count * size;
    else if (coll == ALL_REDUCE || rank == root)
      recv = send;
  } else if (in_place) {
    recv = send;
  }
  gpu_fill(b->send, 0xee, b->bytes, stream);
  if (recv != send) gpu_fill(b->recv, 0xee, b->bytes, stream);
  gpu_copy(send, b->input, sends, stream);
  OK(call(coll, send, recvs ? recv : NULL, count, type, op, root, comm, stream));
  gpu_copy(b->out, recv, recvs, stream);
  gpu_fill(b->recv, 0xdd, b->bytes, stream);
  gpu_fill(b->send, 0xdd, b->bytes, stream);
  memset(hrecv, 0xee, b->bytes);
  OK(call(coll, sends ? hsend : NULL, recvs ? hrecv : NULL, count, type, op, root, comm, NULL));
  gpu_read(b->host_out, b->out, recvs, stream);
  if (!recvs || !memcmp(b->host_out, hrecv, recvs)) return 0;
  size_t i = 0;
  while (b->host_out[i] == hrecv[i]) i++;
  fprintf(stderr, "rank %d of %d: %s of %zu x type %d, op %d%s, shift %zu: byte %zu of %zu is %#x, on host memory %#x\n", rank, n,
          coll_name[coll], count, type, op, in_place ? ", in place" : "", shift, i, recvs, b->host_out[i], hrecv[i]);
  return 1;
}

/* ---------------------------------------------------------------- cases */

/* Every collective, small and large, in place and not, aligned and not. */
static int collectives(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const size_t sizes[] = {0, 1, 3, 1000, 16385, 70001, 700001};
  hfreduceComm_t comm = gpu_join(rank, n, id);
  size_t largest = arg ? 70001 : 700001;
  hfr_cu_stream stream = gpu_stream();
  struct buffers b;
  open_buffers(&b, (largest * (size_t)n + 64) * sizeof(float));
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
    for (int coll = 0; coll < COLLS && sizes[s] <= largest; coll++)
      for (int in_place = 0; in_place < 2; in_place++)
        if (one_call(rank, n, comm, stream, &b, coll, sizes[s], hfreduceFloat32, hfreduceSum, in_place, s % 3)) return 1;
  OK(hfreduceBarrier(comm, stream));
  CU(gpu.stream_sync(stream));
  OK(hfreduceCommDestroy(comm));
  close_buffers(&b);
  return 0;
}

/* All datatypes and ops; factors of premultiplied sums in host and in device memory. */
static int types(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const int colls[] = {ALL_REDUCE, REDUCE_SCATTER, REDUCE};
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  struct buffers b;
  (void)arg;
  open_buffers(&b, (1003 * (size_t)n + 8) * 8);
  void *factor = gpu_alloc(8);
  for (int type = 0; type < hfreduceNumTypes; type++) {
    for (int op = 0; op < hfreduceNumOps; op++)
      for (int c = 0; c < 3; c++)
        if (one_call(rank, n, comm, stream, &b, colls[c], 1003, (hfreduceDataType_t)type, (hfreduceRedOp_t)op, op % 2, 0))
          return 1;
    uint8_t three[8] = {0};
    hfreduceRedOp_t here, there;
    fill(three, 1, type >= hfreduceFloat8e4m3 ? hfreduceFloat32 : (hfreduceDataType_t)type, rank, 1);
    gpu_copy(factor, three, 8, stream);
    CU(gpu.stream_sync(stream));
    OK(hfreduceRedOpCreatePreMulSum(&here, three, (hfreduceDataType_t)type, hfreduceScalarHostImmediate, comm));
    OK(hfreduceRedOpCreatePreMulSum(&there, factor, (hfreduceDataType_t)type, hfreduceScalarDevice, comm));
    for (int c = 0; c < 3; c++) {
      if (one_call(rank, n, comm, stream, &b, colls[c], 500, (hfreduceDataType_t)type, here, 0, 0)) return 1;
      if (one_call(rank, n, comm, stream, &b, colls[c], 500, (hfreduceDataType_t)type, there, 0, 0)) return 1;
    }
    OK(hfreduceRedOpDestroy(here, comm));
    OK(hfreduceRedOpDestroy(there, comm));
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(factor);
  close_buffers(&b);
  return 0;
}

/* A factor in device memory counts as it is when the stream gets to the call. */
static int late_factor(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(8 * sizeof *x), *y = gpu_alloc(8 * sizeof *y), *factor = gpu_alloc(4), got[8];
  hfreduceRedOp_t op;
  (void)arg;
  gpu_fill(factor, 0, 4, stream);
  CU(gpu.stream_sync(stream));
  OK(hfreduceRedOpCreatePreMulSum(&op, factor, hfreduceFloat32, hfreduceScalarDevice, comm));
  for (int i = 1; i < 20; i++) {
    float want = 0, f = (float)i;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x40000000, 8, stream)); /* 2.0 */
    CU(gpu.cu->set_async((hfr_cu_ptr)factor, bits, 1, stream));
    OK(hfreduceAllReduce(x, y, 8, hfreduceFloat32, op, comm, stream));
    gpu_fill(factor, 0xff, 4, stream);
    gpu_read(got, y, sizeof got, stream);
    for (int r = 0; r < n; r++) want += 2 * f;
    WANT(got[0] == want && got[7] == want);
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(y), gpu_free(factor);
  return 0;
}

/* Is what came from `from` there? */
static int came(const uint8_t *p, size_t bytes, int from, int salt) {
  for (size_t i = 0; i < bytes; i++)
    if (p[i] != (uint8_t)(i * 31 + (size_t)from * 7 + (size_t)salt)) return 0;
  return 1;
}
static void bring(uint8_t *device, size_t bytes, int rank, int salt, hfr_cu_stream stream) {
  uint8_t *p = malloc(bytes + 1);
  for (size_t i = 0; i < bytes; i++) p[i] = (uint8_t)(i * 31 + (size_t)rank * 7 + (size_t)salt);
  gpu_copy(device, p, bytes, stream);
  CU(gpu.stream_sync(stream));
  free(p);
}

/* Sends and receives in groups: rings, all pairs at once (more than a ring of segments holds), tags out of order, any source. */
static int messages(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const size_t sizes[] = {0, 1, 4097, 300000, 3000000};
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  size_t most = arg ? 300000 : 3000000;
  uint8_t *send = gpu_alloc(most * (size_t)n), *recv = gpu_alloc(most * (size_t)(n + 1)), *host = malloc(most);
  for (size_t s = 0; s < 5 && sizes[s] <= most; s++) {
    size_t bytes = sizes[s];
    bring(send, bytes, rank, 1, stream);
    OK(hfreduceGroupStart());
    OK(hfreduceRecv(recv, bytes, hfreduceUint8, (rank + n - 1) % n, comm, stream));
    OK(hfreduceSend(send, bytes, hfreduceUint8, (rank + 1) % n, comm, stream));
    OK(hfreduceGroupEnd());
    gpu_fill(send, 0, bytes, stream); /* it has left */
    gpu_read(host, recv, bytes, stream);
    WANT(came(host, bytes, (rank + n - 1) % n, 1));
    for (int p = 0; p < n; p++) bring(send + (size_t)p * bytes, bytes, rank, p, stream);
    OK(hfreduceGroupStart());
    for (int p = 0; p < n; p++) OK(hfreduceRecv(recv + (size_t)p * bytes, bytes, hfreduceUint8, p, comm, stream));
    for (int p = n - 1; p >= 0; p--) OK(hfreduceSend(send + (size_t)p * bytes, bytes, hfreduceUint8, p, comm, stream));
    OK(hfreduceGroupEnd());
    for (int p = 0; p < n; p++) {
      gpu_read(host, recv + (size_t)p * bytes, bytes, stream);
      WANT(came(host, bytes, p, rank));
    }
    if (bytes > 300000) continue;
    int source[2] = {-1, -1};
    OK(hfreduceGroupStart());
    for (int tag = 5; tag >= 0; tag--)
      OK(hfreduceRecvTag(recv + (size_t)tag * bytes / 6, bytes / 6, hfreduceUint8, (rank + n - 1) % n, tag, comm, stream));
    for (int tag = 0; tag < 6; tag++)
      OK(hfreduceSendTag(send + (size_t)tag * bytes / 6, bytes / 6, hfreduceUint8, (rank + 1) % n, tag, comm, stream));
    OK(hfreduceRecvAny(recv + bytes, bytes, hfreduceUint8, 9, source, comm, stream));
    OK(hfreduceSendTag(send, bytes, hfreduceUint8, (rank + n - 1) % n, 9, comm, stream));
    OK(hfreduceGroupEnd());
    gpu_read(host, recv + bytes, bytes, stream);
    WANT(source[0] == (rank + 1) % n && came(host, bytes, source[0], 0));
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(send), gpu_free(recv);
  free(host);
  return 0;
}

/* Receives first, then sends, each a call and a stream of its own; the messages come in the other order. */
static int one_by_one(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { MESSAGES = 2 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream[2 * MESSAGES];
  size_t bytes = arg ? 800000 : 4000000;
  uint8_t *recv[MESSAGES], *send[MESSAGES], *host = malloc(bytes);
  for (int i = 0; i < 2 * MESSAGES; i++) stream[i] = gpu_stream();
  for (int i = 0; i < MESSAGES; i++) recv[i] = gpu_alloc(bytes), send[i] = gpu_alloc(bytes);
  OK(hfreduceCommSetTimeout(comm, 5));
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < MESSAGES; i++) bring(send[i], bytes, rank, round + i, stream[i]);
    for (int i = 0; i < MESSAGES; i++) OK(hfreduceRecvTag(recv[i], bytes, hfreduceUint8, (rank + n - 1) % n, i, comm, stream[i]));
    for (int i = MESSAGES - 1; i >= 0; i--)
      OK(hfreduceSendTag(send[i], bytes, hfreduceUint8, (rank + 1) % n, i, comm, stream[MESSAGES + i]));
    for (int i = 0; i < MESSAGES; i++) {
      gpu_read(host, recv[i], bytes, stream[i]);
      WANT(came(host, bytes, (rank + n - 1) % n, round + i));
    }
    for (int i = 0; i < MESSAGES; i++) CU(gpu.stream_sync(stream[MESSAGES + i]));
  }
  OK(hfreduceCommDestroy(comm));
  for (int i = 0; i < MESSAGES; i++) gpu_free(recv[i]), gpu_free(send[i]);
  free(host);
  return 0;
}

/* A receive that was called first must not keep back what the sends behind it lead to: rank 1 answers only then. */
static int answer(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { BYTES = 300000 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream first = gpu_stream(), stream = gpu_stream();
  uint8_t *x = gpu_alloc(BYTES), *y = gpu_alloc(BYTES), *host = malloc(BYTES);
  (void)arg;
  OK(hfreduceCommSetTimeout(comm, 5));
  for (int i = 0; i < 5; i++) {
    if (rank == 0) {
      bring(x, BYTES, 0, i, stream);
      OK(hfreduceRecvTag(y, BYTES, hfreduceUint8, 1, 0, comm, first));
      for (int tag = 1; tag < 4; tag++) OK(hfreduceSendTag(x, BYTES, hfreduceUint8, 1, tag, comm, stream));
      gpu_read(host, y, BYTES, first);
    } else {
      for (int tag = 1; tag < 4; tag++) OK(hfreduceRecvTag(x, BYTES, hfreduceUint8, 0, tag, comm, stream));
      OK(hfreduceSendTag(x, BYTES, hfreduceUint8, 0, 0, comm, stream));
      gpu_read(host, x, BYTES, stream);
    }
    WANT(came(host, BYTES, 0, i));
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(y);
  free(host);
  return 0;
}

/* Blocks of different sizes, in no order, with gaps. */
static int uneven(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  size_t unit = arg ? 3001 : 90001, sc[16], sd[16], rc[16], rd[16], total = 0, at = 5;
  for (int p = n - 1; p >= 0; p--) {
    sc[p] = unit * (size_t)((rank + 2 * p) % 4); /* also none */
    rc[p] = unit * (size_t)((p + 2 * rank) % 4);
    sd[p] = at;
    rd[p] = at + 3;
    at += (sc[p] > rc[p] ? sc[p] : rc[p]) + 7;
  }
  total = at + 16;
  float *send = gpu_alloc(total * 4), *recv = gpu_alloc(total * 4), *a = malloc(total * 4), *b = malloc(total * 4),
        *c = malloc(total * 4);
  fill((uint8_t *)a, total, hfreduceFloat32, rank, 3);
  for (int i = 0; i < 3; i++) {
    gpu_copy(send, a, total * 4, stream);
    memset(b, 0xee, total * 4);
    gpu_fill(recv, 0xee, total * 4, stream);
    OK(hfreduceAlltoAllv(send, sc, sd, recv, rc, rd, hfreduceFloat32, comm, stream));
    OK(hfreduceAlltoAllv(a, sc, sd, b, rc, rd, hfreduceFloat32, comm, NULL));
    gpu_read(c, recv, total * 4, stream);
    WANT(!memcmp(b, c, total * 4)); /* the gaps too */
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(send), gpu_free(recv);
  free(a), free(b), free(c);
  return 0;
}

/* Ranks with device memory beside ranks with host memory, in one operation. */
static int mixed(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const size_t sizes[] = {0, 7, 5000, 70001, 700001};
  hfreduceComm_t comm;
  int device = rank % 2 == 0;
  size_t most = arg ? 70001 : 700001, bytes = most * (size_t)n * 4;
  if (device && !gpu_open(rank)) exit(77);
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  hfr_cu_stream stream = device ? gpu_stream() : NULL;
  uint8_t *send = device ? gpu_alloc(bytes) : NULL, *recv = device ? gpu_alloc(bytes) : NULL;
  uint8_t *a = malloc(bytes), *b = malloc(bytes), *c = malloc(bytes);
  for (size_t s = 0; s < 5 && sizes[s] <= most; s++)
    for (int coll = 0; coll < COLLS; coll++) {
      int root = (int)(sizes[s] % (size_t)n);
      size_t sends = send_count(coll, sizes[s], rank, n, root), recvs = recv_count(coll, sizes[s], rank, n, root);
      fill(a, sends, hfreduceFloat32, rank, 9);
      OK(call(coll, a, b, sizes[s], hfreduceFloat32, hfreduceSum, root, comm, NULL));
      if (device) gpu_copy(send, a, sends * 4, stream);
      OK(call(coll, device ? send : a, device ? recv : c, sizes[s], hfreduceFloat32, hfreduceSum, root, comm, stream));
      if (device) gpu_read(c, recv, recvs * 4, stream);
      WANT(!memcmp(b, c, recvs * 4));
    }
  /* messages between them */
  fill(a, 5000, hfreduceFloat32, rank, 2);
  if (device) gpu_copy(send, a, 20000, stream);
  OK(hfreduceGroupStart());
  OK(hfreduceRecv(device ? recv : c, 5000, hfreduceFloat32, (rank + n - 1) % n, comm, stream));
  OK(hfreduceSend(device ? send : a, 5000, hfreduceFloat32, (rank + 1) % n, comm, stream));
  OK(hfreduceGroupEnd());
  if (device) gpu_read(c, recv, 20000, stream);
  fill(b, 5000, hfreduceFloat32, (rank + n - 1) % n, 2);
  WANT(!memcmp(b, c, 20000));
  OK(hfreduceCommDestroy(comm));
  if (device) gpu_free(send), gpu_free(recv);
  free(a), free(b), free(c);
  return 0;
}

/* Managed, pinned and plain memory in the order of a stream, and one buffer of one kind with one of another. */
static int kinds(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { COUNT = 200003 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  size_t bytes = (size_t)COUNT * 4 * (size_t)n;
  void *memory[4];
  hfr_cu_ptr managed;
  uint8_t *in = malloc(bytes), *want = malloc(bytes), *got = malloc(bytes);
  (void)arg;
  CU(gpu.managed(&managed, bytes, 1));
  memory[0] = gpu_alloc(bytes), memory[1] = (void *)managed, memory[3] = malloc(bytes);
  CU(gpu.host_alloc(&memory[2], bytes, 0));
  uint8_t *second = gpu_alloc(bytes), *pinned;
  CU(gpu.host_alloc((void **)&pinned, bytes, 0));
  for (int coll = 0; coll < COLLS; coll++)
    for (int from = 0; from < 4; from++)
      for (int to = 0; to < 4; to++) {
        size_t sends = send_count(coll, COUNT, rank, n, 0) * 4, recvs = recv_count(coll, COUNT, rank, n, 0) * 4;
        void *send = memory[from], *recv = from == to ? (from == 2 ? pinned : from == 0 ? second : NULL) : memory[to];
        if (!recv) continue;
        fill(in, sends / 4, hfreduceFloat32, rank, from + to);
        OK(call(coll, in, want, COUNT, hfreduceFloat32, hfreduceSum, 0, comm, NULL));
        if (from < 2)
          gpu_copy(send, in, sends, stream);
        else
          memcpy(send, in, sends);
        if (from < 2) CU(gpu.stream_sync(stream));
        OK(call(coll, send, recv, COUNT, hfreduceFloat32, hfreduceSum, 0, comm, stream));
        CU(gpu.stream_sync(stream));
        if (to < 2)
          gpu_read(got, recv, recvs, stream);
        else
          memcpy(got, recv, recvs);
        WANT(!memcmp(got, want, recvs));
      }
  OK(hfreduceCommDestroy(comm));
  gpu_free(memory[0]), gpu_free(memory[1]), gpu_free(second), free(memory[3]);
  CU(gpu.host_free(memory[2]));
  CU(gpu.host_free(pinned));
  free(in), free(want), free(got);
  return 0;
}

static int64_t now_ms(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Default streams, several streams in a group, several communicators in a group, chains with no host in between, and streams that
 * get to the call late. */
static int streams(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { COUNT = 40000 };
  hfreduceComm_t comm = gpu_join(rank, n, id), other;
  hfr_cu_stream one = gpu_stream(), two = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), *y = gpu_alloc(COUNT * 4), *z = gpu_alloc(COUNT * 4), got[4];
  OK(hfreduceCommSplit(comm, 0, -rank, &other, NULL));
  for (int i = 0; i < (arg ? 5 : 20); i++) {
    void *stream = i % 3 == 0 ? NULL : i % 3 == 1 ? (void *)1 : (void *)2;
    CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
    OK(hfreduceAllReduce(x, y, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
    gpu_read(got, y + COUNT - 4, sizeof got, stream);
    WANT(got[0] == (float)n && got[3] == (float)n);
    /* two communicators and two streams in one group, in another order on every other rank */
    CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, one));
    CU(gpu.cu->set_async((hfr_cu_ptr)z, 0x40000000, COUNT, two));
    OK(hfreduceGroupStart());
    if (rank % 2) OK(hfreduceAllReduce(z, z, COUNT, hfreduceFloat32, hfreduceSum, other, two));
    OK(hfreduceAllReduce(x, y, COUNT, hfreduceFloat32, hfreduceSum, comm, one));
    if (rank % 2 == 0) OK(hfreduceAllReduce(z, z, COUNT, hfreduceFloat32, hfreduceSum, other, two));
    OK(hfreduceGroupEnd());
    gpu_read(got, y, sizeof got, one);
    WANT(got[0] == (float)n);
    gpu_read(got, z + COUNT - 4, sizeof got, two);
    WANT(got[3] == 2 * (float)n);
  }
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0, COUNT, one));
  for (int i = 0; i < 30; i++) { /* x grows by what the chain made of it: x = sum of the ranks' x */
    CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, 1, one));
    OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceMax, comm, one));
    OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, one));
  }
  gpu_read(got, x, sizeof got, one);
  WANT(got[0] == (float)n && got[1] == 0);
  OK(hfreduceCommDestroy(other));
  OK(hfreduceCommDestroy(comm));
  gpu_free(x), gpu_free(y), gpu_free(z);
  return 0;
}

/* Two communicators of a process, each on its own stream, at work at the same time; calls of more segments than a ring has. */
static int several(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  size_t count = arg ? 300000 : 3000000;
  hfreduceComm_t comm[2] = {gpu_join(rank, n, id), NULL};
  hfr_cu_stream stream[2] = {gpu_stream(), gpu_stream()};
  float *x[2] = {gpu_alloc(count * 4), gpu_alloc(count * 4)}, *got = malloc(count * 4);
  OK(hfreduceCommSplit(comm[0], 0, -rank, &comm[1], NULL));
  for (int i = 0; i < 6; i++) {
    if (i % n == rank) usleep(5000);
    for (int k = 0; k < 2; k++) {
      CU(gpu.cu->set_async((hfr_cu_ptr)x[k], 0x3f800000, count, stream[k]));
      for (int again = 0; again < 3; again++)
        OK(hfreduceAllReduce(x[k], x[k], count, hfreduceFloat32, hfreduceSum, comm[k], stream[k]));
    }
    for (int k = 0; k < 2; k++) {
      gpu_read(got, x[k], count * 4, stream[k]);
      for (size_t at = 0; at < count; at++) WANT(got[at] == (float)(n * n * n));
    }
  }
  for (int k = 1; k >= 0; k--) {
    OK(hfreduceCommDestroy(comm[k]));
    gpu_free(x[k]);
  }
  free(got);
  return 0;
}

enum { HERE = 3 }; /* ranks of one process */
struct here {
  pthread_t thread;
  int rank;
  hfreduceUniqueId id;
  hfreduceComm_t comm;
  hfr_cu_stream stream;
  float *x;
};
static void *join_here(void *arg) {
  struct here *h = arg;
  h->comm = gpu_join(h->rank, HERE, &h->id);
  h->stream = gpu_stream();
  h->x = gpu_alloc(3000000 * 4);
  return NULL;
}

static int sums_here(int rank, struct here *h, size_t count, float want) {
  float got[2];
  for (int r = 0; r < HERE; r++) {
    gpu_read(&got[0], h[r].x, 4, h[r].stream), gpu_read(&got[1], h[r].x + count - 1, 4, h[r].stream);
    WANT(got[0] == want && got[1] == want);
  }
  return 0;
}

/* All ranks are in one process, and one thread calls for them all: in groups, as NCCL wants it. One call alone waits for the
 * others; where host functions wait, that would be for ever, and it is refused. */
static int one_caller(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  size_t count = arg ? 300000 : 3000000;
  const char *script = getenv("FAKE_CUDA"), *wanted = getenv("HFREDUCE_CUDA_MEMOPS");
  int by_host = (script && strstr(script, "memops=0")) || (wanted && !strcmp(wanted, "0"));
  struct here h[HERE] = {0};
  hfreduceUniqueId local;
  (void)id, (void)n;
  if (!gpu_open(rank)) exit(77);
  OK(hfreduceGetUniqueIdLocal(&local));
  for (int r = 0; r < HERE; r++) {
    h[r].rank = r, h[r].id = local;
    pthread_create(&h[r].thread, NULL, join_here, &h[r]);
  }
  for (int r = 0; r < HERE; r++) pthread_join(h[r].thread, NULL);
  for (int i = 0; i < 4; i++) {
    for (int r = 0; r < HERE; r++) CU(gpu.cu->set_async((hfr_cu_ptr)h[r].x, 0x3f800000, count, h[r].stream));
    for (int again = 0; again < 3; again++) {
      OK(hfreduceGroupStart());
      for (int r = 0; r < HERE; r++)
        OK(hfreduceAllReduce(h[r].x, h[r].x, count, hfreduceFloat32, hfreduceSum, h[r].comm, h[r].stream));
      OK(hfreduceGroupEnd());
    }
    if (sums_here(rank, h, count, 27)) return 1;
    for (int r = 0; r < HERE; r++) {
      hfreduceResult_t alone = hfreduceAllReduce(h[r].x, h[r].x, 9, hfreduceFloat32, hfreduceMax, h[r].comm, h[r].stream);
      WANT(alone == (by_host ? hfreduceInvalidUsage : hfreduceSuccess));
      WANT(!by_host ||
           (strstr(hfreduceGetLastError(NULL), "this process has 3 ranks") && strstr(hfreduceGetLastError(NULL), "one group")));
    }
  }
  for (int r = 0; r < HERE; r++) CU(gpu.stream_sync(h[r].stream));
  for (int r = 0; r < HERE; r++) {
    OK(hfreduceCommDestroy(h[r].comm));
    gpu_free(h[r].x);
  }
  return 0;
}

/* A call whose stream is held up returns at once, and costs next to nothing until the stream gets there. */
static int patience(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { COUNT = 1000000 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4), got[4];
  _Atomic uint32_t *word;
  hfr_cu_ptr address;
  hfreduceResult_t error;
  (void)arg;
  CU(gpu.host_alloc((void **)&word, 4096, 2));
  CU(gpu.cu->host_device_pointer(&address, word, 0));
  if (!gpu.cu->stream_wait_value || gpu.cu->stream_wait_value(stream, address, 0, 0)) return 0; /* nothing to hold it up with */
  OK(hfreduceCommSetTimeout(comm, 1)); /* it begins when the stream gets there */
  *word = 0;
  CU(gpu.cu->set_async((hfr_cu_ptr)x, 0x3f800000, COUNT, stream));
  CU(gpu.cu->stream_wait_value(stream, address, 1, HFR_CU_WAIT_GEQ));
  int64_t start = now_ms(CLOCK_MONOTONIC);
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  WANT(now_ms(CLOCK_MONOTONIC) - start < 900);
  int64_t cpu = now_ms(CLOCK_PROCESS_CPUTIME_ID);
  usleep(1600000);
  cpu = now_ms(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  WANT(cpu < 500);
  OK(hfreduceCommGetAsyncError(comm, &error));
  WANT(!error);
  *word = 1;
  gpu_read(got, x + COUNT - 4, sizeof got, stream);
  WANT(got[3] == (float)n);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  CU(gpu.host_free(word));
  return 0;
}

/* Many calls at once, and a rank that comes late: segments wait for those before them in their slots, on both sides. */
static int backlog(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { CALLS = 24, COUNT = 50000 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc((size_t)CALLS * COUNT * 4), *got = malloc((size_t)CALLS * COUNT * 4);
  (void)arg;
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < CALLS; i++) {
      float value = (float)(i + 1);
      uint32_t bits;
      memcpy(&bits, &value, 4);
      CU(gpu.cu->set_async((hfr_cu_ptr)(x + (size_t)i * COUNT), bits, COUNT, stream));
    }
    CU(gpu.stream_sync(stream));
    if (rank == round % n) usleep(60000);
    OK(hfreduceGroupStart());
    for (int i = 0; i < CALLS; i++)
      OK(hfreduceAllReduce(x + (size_t)i * COUNT, x + (size_t)i * COUNT, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
    OK(hfreduceGroupEnd());
    gpu_read(got, x, (size_t)CALLS * COUNT * 4, stream);
    for (size_t i = 0; i < (size_t)CALLS * COUNT; i++) WANT(got[i] == (float)n * (float)(i / COUNT + 1));
  }
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  free(got);
  return 0;
}

static struct watch {
  _Atomic(const _Atomic uint32_t *) ready;
  _Atomic uint32_t value;
  _Atomic int64_t started_ns; /* when the device got there, or a little later; 0: it has not */
  _Atomic int early;
} watch;

/* The progress thread is about to sleep. Too early: the device has got to the launch, so the segment is on its way. */
static void about_to_sleep(void) {
  int64_t started = atomic_load(&watch.started_ns);
  if (!started || hfr_now_ns() - started >= HFR_STIR_NS) return;
  if (atomic_load(atomic_load(&watch.ready)) != atomic_load(&watch.value)) atomic_store(&watch.early, 1);
}

/* The device says when it gets to a launch, and then the progress thread does not sleep through the end of the first copy. (A
 * sleep that began just before is no fault.) */
static int naps(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { COUNT = 1000, ROUNDS = 30 };
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_stream stream = gpu_stream();
  float *x = gpu_alloc(COUNT * 4);
  _Atomic uint32_t *word;
  hfr_cu_ptr address;
  int early = 0;
  (void)arg;
  CU(gpu.host_alloc((void **)&word, 4096, 2));
  CU(gpu.cu->host_device_pointer(&address, (void *)word, 0));
  *word = 0;
  if (!gpu.cu->stream_wait_value || gpu.cu->stream_wait_value(stream, address, 0, 0)) return 0;
  gpu_fill(x, 0, COUNT * 4, stream);
  OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
  CU(gpu.stream_sync(stream));
  for (int i = 0; i < ROUNDS; i++) {
    const struct hfr_stage_ring *ring = &comm->staging->ring[HFR_RING_PLAIN];
    int slot = ring->next;
    *word = 0;
    CU(gpu.cu->stream_wait_value(stream, address, 1, HFR_CU_WAIT_GEQ));
    OK(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, stream));
    atomic_store(&watch.early, 0);
    atomic_store(&watch.ready, &ring->ready[slot]);
    atomic_store(&watch.value, ring->turn - 1);
    atomic_store(&hfr_before_rest, about_to_sleep);
    usleep(3000);
    WANT(atomic_load(ring->started) != ring->starts);
    *word = 1;
    for (double end = gpu_now() + 20; atomic_load(ring->started) != ring->starts;) WANT(gpu_now() < end);
    atomic_store(&watch.started_ns, hfr_now_ns());
    CU(gpu.stream_sync(stream));
    atomic_store(&hfr_before_rest, NULL);
    atomic_store(&watch.started_ns, 0);
    early += atomic_load(&watch.early);
  }
  if (early > ROUNDS / 2) fprintf(stderr, "rank %d: slept through the copy in %d of %d rounds\n", rank, early, ROUNDS);
  WANT(early <= ROUNDS / 2);
  int64_t waited = 0;
  for (int64_t ns = hfr_longer_nap(0); waited < 1000000000; waited += ns, ns = hfr_longer_nap(ns))
    WANT(ns > 0 && ns <= 20000 + waited / 32 && ns <= 1000000);
  OK(hfreduceCommDestroy(comm));
  gpu_free(x);
  CU(gpu.host_free((void *)word));
  return 0;
}

/* The library's streams go first where the device chooses: a kernel of a pair is launched in them, too. */
static int priority(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm = gpu_join(rank, n, id);
  hfr_cu_context context;
  hfr_cu_device device;
  struct hfr_copier *copier;
  int least, greatest, given;
  (void)arg;
  CU(gpu.cu->context_current(&context));
  CU(gpu.cu->context_device(&device));
  CU(gpu.cu->priority_range(&least, &greatest));
  OK(hfr_copier_create(device, context, 0, &copier));
  for (int queue = 0; queue < 2; queue++) {
    CU(gpu.stream_priority(hfr_copier_stream(copier, (enum hfr_queue)queue), &given));
    WANT(given == greatest && (least > greatest || !gpu.stand_in));
  }
  hfr_copier_destroy(copier, 0);
  OK(hfreduceCommDestroy(comm));
  return 0;
}

int main(int argc, char **argv) {
  static const struct gpu_case cases[] = {
      {"collectives", collectives, "1 2 3 1,1 1,1,1 2,2 3,1 t2 t4"},
      {"types", types, "1 2 1,1 3,1"},
      {"late_factor", late_factor, "1 2 1,1"},
      {"messages", messages, "1 2 3,1 1,1 t4"},
      {"one_by_one", one_by_one, "2 3,1 1,1"},
      {"answer", answer, "2 1,1"},
      {"uneven", uneven, "1 2 3 1,1 3,1"},
      {"mixed", mixed, "2 3 1,1 2,2"},
      {"kinds", kinds, "1 2 1,1"},
      {"streams", streams, "2 3,1 t2"},
      {"several", several, "2 2,1"},
      {"one_caller", one_caller, "1"},
      {"patience", patience, "2"},
      {"naps", naps, "2"},
      {"priority", priority, "1"},
      {"backlog", backlog, "2 1,1"},
  };
  gpu.apart = "streams";
  return gpu_run_cases(cases, sizeof cases / sizeof *cases, argc, argv);
}
