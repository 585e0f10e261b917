/*
 * Calls on device memory, in the order of streams. Each is compared bit for bit with the same call on host memory, which has
 * tests of its own. Around every call the stream has work: what the call reads is put there before it, what it has written is
 * taken away behind it and overwritten, and nothing waits in between.
 *
 * Arguments: case [layout ...]. A layout as in ranks.h. Exit status 77: no driver.
 */
#include "check.h"
#include "gpu.h"
#include "ranks.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define OK(call)                                                                                                          \
  do {                                                                                                                    \
    hfreduceResult_t ok_ = (call);                                                                                        \
    if (ok_) {                                                                                                            \
      fprintf(stderr, "%s:%d rank %d: %s -> %d: %s\n", __FILE__, __LINE__, rank, #call, ok_, hfreduceGetLastError(NULL)); \
      return 1;                                                                                                           \
    }                                                                                                                     \
  } while (0)
#define WANT(condition)                                                                                                       \
  do {                                                                                                                        \
    if (!(condition)) {                                                                                                       \
      fprintf(stderr, "%s:%d rank %d: %s is false (%s)\n", __FILE__, __LINE__, rank, #condition, hfreduceGetLastError(NULL)); \
      return 1;                                                                                                               \
    }                                                                                                                         \
  } while (0)

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

/* A rank's start: its device and its communicator. */
static hfreduceComm_t join(int rank, int n, const hfreduceUniqueId *id) {
  hfreduceComm_t comm = NULL;
  if (!gpu_open(rank)) exit(77);
  if (hfreduceCommInitRank(&comm, n, *id, rank))
    fprintf(stderr, "rank %d: init: %s\n", rank, hfreduceGetLastError(NULL)), exit(1);
  return comm;
}

/* ---------------------------------------------------------------- cases */

/* Every collective, small and large, in place and not, aligned and not. */
static int collectives(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const size_t sizes[] = {0, 1, 3, 1000, 16385, 70001, 700001};
  hfreduceComm_t comm = join(rank, n, id);
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

/* ---------------------------------------------------------------- main */

struct test_case {
  const char *name;
  rank_function function;
  const char *layouts;
  int threads; /* also as ranks of one process */
};
static const struct test_case cases[] = {
    {"collectives", collectives, "1 2 3 1,1 1,1,1 2,2 3,1", 2},
};

int main(int argc, char **argv) {
  int quick = argc > 1 && !strcmp(argv[1], "--quick");
  const char *name = argc > 1 + quick ? argv[1 + quick] : "all";
  pid_t probe = fork();
  if (!probe) _exit(gpu_open(0) ? (gpu.stand_in ? 1 : 0) : 77);
  int status;
  waitpid(probe, &status, 0);
  if (WEXITSTATUS(status) == 77) return printf("no CUDA driver here\n"), 77;
  printf("on %s\n", WEXITSTATUS(status) ? "a stand-in driver (test double, no GPU)" : "a CUDA driver");
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const struct test_case *c = &cases[i];
    char layouts[200], *rest = layouts, *one;
    if (strcmp(name, "all") && strcmp(name, c->name)) continue;
    snprintf(layouts, sizeof layouts, "%s", argc > 2 + quick ? "" : c->layouts);
    for (int j = 2 + quick; j < argc; j++)
      CHECK(run_processes(argv[j], c->function, quick ? argv : NULL, 100) == 0, "%s, nodes %s", c->name, argv[j]);
    while ((one = strsep(&rest, " ")))
      if (*one) CHECK(run_processes(one, c->function, quick ? argv : NULL, 100) == 0, "%s, nodes %s", c->name, one);
  }
  return check_done();
}
