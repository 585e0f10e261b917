/* Every collective, every datatype and op, out of place and in place, against sums made here. argv[1] "nonblocking": the same on
 * a non-blocking communicator. */
#include "rank.h"

#include <math.h>

static ncclComm_t comm;
static int blocking = 1;

/* A call: done when it returns, or when the communicator says so. */
static void done(const char *what, ncclResult_t r) {
  if (!blocking && r == ncclInProgress) r = settle(comm);
  CHECK(r == ncclSuccess, "%s gave %d: %s", what, (int)r, ncclGetLastError(comm));
}
#define RUN(call) done(#call, call)

/* ---------------------------------------------------------------- numbers of all datatypes; small, so that every sum is exact */

static const size_t size_of[ncclNumTypes] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

/* Floats of few bits: sign, exponent with this bias, mantissa of so many bits. Only normal numbers and 0 occur here. */
static uint32_t encode(double v, int exponent_bits, int mantissa_bits) {
  int e;
  if (v == 0) return 0;
  double m = frexp(fabs(v), &e); /* m in [0.5, 1) */
  uint32_t fraction = (uint32_t)llround((m * 2 - 1) * (1 << mantissa_bits));
  uint32_t exponent = (uint32_t)(e - 1 + (1 << (exponent_bits - 1)) - 1);
  return (v < 0 ? 1u << (exponent_bits + mantissa_bits) : 0) + (exponent << mantissa_bits) + fraction;
}

static double decode(uint32_t bits, int exponent_bits, int mantissa_bits) {
  uint32_t fraction = bits & ((1u << mantissa_bits) - 1), exponent = bits >> mantissa_bits & ((1u << exponent_bits) - 1);
  if (!exponent && !fraction) return 0;
  double v = ldexp(1 + (double)fraction / (1 << mantissa_bits), (int)exponent - ((1 << (exponent_bits - 1)) - 1));
  return bits >> (exponent_bits + mantissa_bits) & 1 ? -v : v;
}

static void put(void *at, size_t i, ncclDataType_t type, double v) {
  switch (type) {
    case ncclInt8: ((int8_t *)at)[i] = (int8_t)v; break;
    case ncclUint8: ((uint8_t *)at)[i] = (uint8_t)v; break;
    case ncclInt32: ((int32_t *)at)[i] = (int32_t)v; break;
    case ncclUint32: ((uint32_t *)at)[i] = (uint32_t)v; break;
    case ncclInt64: ((int64_t *)at)[i] = (int64_t)v; break;
    case ncclUint64: ((uint64_t *)at)[i] = (uint64_t)v; break;
    case ncclFloat32: ((float *)at)[i] = (float)v; break;
    case ncclFloat64: ((double *)at)[i] = v; break;
    case ncclFloat16: ((uint16_t *)at)[i] = (uint16_t)encode(v, 5, 10); break;
    case ncclBfloat16: ((uint16_t *)at)[i] = (uint16_t)encode(v, 8, 7); break;
    case ncclFloat8e4m3: ((uint8_t *)at)[i] = (uint8_t)encode(v, 4, 3); break;
    default: ((uint8_t *)at)[i] = (uint8_t)encode(v, 5, 2); break;
  }
}

static double get(const void *at, size_t i, ncclDataType_t type) {
  switch (type) {
    case ncclInt8: return ((const int8_t *)at)[i];
    case ncclUint8: return ((const uint8_t *)at)[i];
    case ncclInt32: return ((const int32_t *)at)[i];
    case ncclUint32: return ((const uint32_t *)at)[i];
    case ncclInt64: return (double)((const int64_t *)at)[i];
    case ncclUint64: return (double)((const uint64_t *)at)[i];
    case ncclFloat32: return ((const float *)at)[i];
    case ncclFloat64: return ((const double *)at)[i];
    case ncclFloat16: return decode(((const uint16_t *)at)[i], 5, 10);
    case ncclBfloat16: return decode(((const uint16_t *)at)[i], 8, 7);
    case ncclFloat8e4m3: return decode(((const uint8_t *)at)[i], 4, 3);
    default: return decode(((const uint8_t *)at)[i], 5, 2);
  }
}

/* 1 or 2, so that products and sums of four ranks are exact in two bits of mantissa, but for 7 and 5, which reductions avoid. */
static double value(int r, size_t i) { return 1 + (double)((i * 7 + (size_t)r * 3 + i / 5) % 2); }

static double reference(ncclRedOp_t op, size_t i) {
  double v = value(0, i);
  for (int r = 1; r < nranks; r++) {
    double w = value(r, i);
    v = op == ncclProd ? v * w : op == ncclMax ? fmax(v, w) : op == ncclMin ? fmin(v, w) : v + w;
  }
  return op == ncclAvg ? v / nranks : v;
}

/* Integers cut the average off; narrow floats round it. */
static int near(double got, double want, ncclDataType_t type) {
  if (type < ncclFloat16) return got == trunc(want);
  double step = type == ncclFloat16      ? 1.0 / 1024
                : type == ncclBfloat16   ? 1.0 / 128
                : type == ncclFloat8e4m3 ? 1.0 / 8
                : type == ncclFloat8e5m2 ? 1.0 / 4
                                         : 1e-6;
  return fabs(got - want) <= want * step / 2;
}

/* ---------------------------------------------------------------- collectives */

static void expect(const char *what, const void *got, size_t at, size_t n, ncclDataType_t type, ncclRedOp_t op, size_t from) {
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < n; i++)
    if (!near(get(got, at + i, type), reference(op, from + i), type) && !wrong++) first = i;
  CHECK(!wrong, "%s, type %d, op %d, %zu elements: %zu wrong, the first at %zu: %g, not %g", what, (int)type, (int)op, n, wrong,
        first, get(got, at + first, type), reference(op, from + first));
}

static void fill(void *at, size_t n, ncclDataType_t type) {
  for (size_t i = 0; i < n; i++) put(at, i, type, value(rank, i));
}

static void reductions(size_t n, ncclDataType_t type, ncclRedOp_t op) {
  size_t all = n * (size_t)nranks, bytes = all * size_of[type];
  void *send = malloc(bytes + 8), *recv = malloc(bytes + 8);
  int root = nranks - 1;
  fill(send, all, type);
  RUN(ncclAllReduce(send, recv, n, type, op, comm, NULL));
  expect("all_reduce", recv, 0, n, type, op, 0);
  RUN(ncclReduce(send, recv, n, type, op, root, comm, NULL));
  if (rank == root) expect("reduce", recv, 0, n, type, op, 0);
  RUN(ncclReduceScatter(send, recv, n, type, op, comm, NULL));
  expect("reduce_scatter", recv, 0, n, type, op, (size_t)rank * n);
  memcpy(recv, send, bytes);
  RUN(ncclAllReduce(recv, recv, n, type, op, comm, NULL));
  expect("all_reduce in place", recv, 0, n, type, op, 0);
  memcpy(recv, send, bytes);
  RUN(ncclReduceScatter(recv, (char *)recv + (size_t)rank * n * size_of[type], n, type, op, comm, NULL));
  expect("reduce_scatter in place", recv, (size_t)rank * n, n, type, op, (size_t)rank * n);
  free(send);
  free(recv);
}

/* Block b of `got` is what rank `from`(b) has at `offset`(b). */
static void expect_blocks(const char *what, const int32_t *got, size_t n, int blocks, int transposed) {
  size_t wrong = 0;
  for (int b = 0; b < blocks; b++)
    for (size_t i = 0; i < n; i++) wrong += got[(size_t)b * n + i] != b * 100000 + (int)(transposed ? (size_t)rank * n + i : i);
  CHECK(!wrong, "%s of %zu: %zu wrong", what, n, wrong);
}

static void movements(size_t n) {
  size_t all = n * (size_t)nranks;
  int32_t *send = malloc(all * 4 + 4), *recv = malloc(all * 4 + 4);
  int root = nranks / 2;
  for (size_t i = 0; i < all; i++) send[i] = rank * 100000 + (int)i;
  RUN(ncclAllGather(send, recv, n, ncclInt32, comm, NULL));
  expect_blocks("all_gather", recv, n, nranks, 0);
  memset(recv, 0, all * 4);
  memcpy(recv + (size_t)rank * n, send, n * 4);
  RUN(ncclAllGather(recv + (size_t)rank * n, recv, n, ncclInt32, comm, NULL));
  expect_blocks("all_gather in place", recv, n, nranks, 0);
  RUN(ncclAlltoAll(send, recv, n, ncclInt32, comm, NULL));
  expect_blocks("all_to_all", recv, n, nranks, 1);
  memset(recv, 0, all * 4);
  RUN(ncclGather(send, recv, n, ncclInt32, root, comm, NULL));
  if (rank == root) expect_blocks("gather", recv, n, nranks, 0);
  RUN(ncclScatter(rank == root ? send : NULL, recv, n, ncclInt32, root, comm, NULL));
  for (size_t i = 0; i < n; i++)
    if (!CHECK(recv[i] == root * 100000 + (int)((size_t)rank * n + i), "scatter at %zu", i)) break;
  RUN(ncclBroadcast(send, recv, n, ncclInt32, root, comm, NULL));
  for (size_t i = 0; i < n; i++)
    if (!CHECK(recv[i] == root * 100000 + (int)i, "broadcast at %zu", i)) break;
  RUN(ncclBcast(send, n, ncclInt32, root, comm, NULL));
  CHECK(!memcmp(send, recv, n * 4), "bcast of %zu", n);
  free(send);
  free(recv);
}

/* Each with its own configuration, which here changes nothing but what is refused. */
static void configured(void) {
  ncclCollConfig_t config = NCCL_COLLCONFIG_INITIALIZER;
  float send[8], recv[8];
  config.minCTAs = 1;
  config.maxCTAs = 4;
  config.userProfilerTag = 7;
  for (int i = 0; i < 8; i++) send[i] = (float)(rank + i);
  size_t n = (size_t)(8 / nranks);
  RUN(ncclAllReduceConfig(send, recv, 8, ncclFloat, ncclMax, comm, NULL, &config));
  CHECK(recv[3] == (float)(nranks + 2), "all_reduce with a config: %g", recv[3]);
  RUN(ncclReduceConfig(send, recv, 8, ncclFloat, ncclMin, 0, comm, NULL, &config));
  CHECK(rank || recv[3] == 3, "reduce with a config: %g", recv[3]);
  RUN(ncclBroadcastConfig(send, recv, 8, ncclFloat, 0, comm, NULL, &config));
  CHECK(recv[3] == 3, "broadcast with a config: %g", recv[3]);
  RUN(ncclAllGatherConfig(send, recv, n, ncclFloat, comm, NULL, &config));
  CHECK(recv[(size_t)(nranks - 1) * n] == (float)(nranks - 1), "all_gather with a config");
  RUN(ncclReduceScatterConfig(send, recv, n, ncclFloat, ncclMin, comm, NULL, &config));
  CHECK(recv[0] == (float)rank * (float)n, "reduce_scatter with a config: %g", recv[0]);
  RUN(ncclAlltoAllConfig(send, recv, n, ncclFloat, comm, NULL, &config));
  CHECK(recv[(size_t)(nranks - 1) * n] == (float)(nranks - 1) + (float)rank * (float)n, "all_to_all with a config");
  RUN(ncclGatherConfig(send, recv, n, ncclFloat, 0, comm, NULL, &config));
  CHECK(rank || recv[(size_t)(nranks - 1) * n] == (float)(nranks - 1), "gather with a config");
  RUN(ncclScatterConfig(send, recv, n, ncclFloat, 0, comm, NULL, &config));
  CHECK(recv[0] == (float)rank * (float)n, "scatter with a config");
  config.magic = 1;
  FAILS(ncclInvalidArgument, "NCCL_COLLCONFIG_INITIALIZER",
        ncclAllReduceConfig(send, recv, 8, ncclFloat, ncclSum, comm, NULL, &config));
  config.magic = NCCL_API_MAGIC;
  config.algSelection = "RING";
  FAILS(ncclInvalidUsage, "RING", ncclAllReduceConfig(send, recv, 8, ncclFloat, ncclSum, comm, NULL, &config));
  config.forceAlgSelection = 0;
  RUN(ncclAllReduceConfig(send, recv, 8, ncclFloat, ncclSum, comm, NULL, &config));
  config.launchCompletionEvent = (cudaEvent_t)&config;
  FAILS(ncclInvalidUsage, "launchCompletionEvent", ncclAllReduceConfig(send, recv, 8, ncclFloat, ncclSum, comm, NULL, &config));
}

/* ---------------------------------------------------------------- user-made ops */

static void premultiplied(ncclDataType_t type) {
  uint64_t factor = 0, send[4] = {0}, recv[4] = {0};
  double want = 0;
  ncclRedOp_t op;
  put(&factor, 0, type, rank + 1);
  put(send, 0, type, 1);
  for (int r = 0; r < nranks; r++) want += r + 1;
  OK(ncclRedOpCreatePreMulSum(&op, &factor, type, ncclScalarHostImmediate, comm));
  CHECK((int)op >= ncclNumOps, "a user-made op is %d", (int)op);
  put(&factor, 0, type, 0); /* was read already */
  OK(ncclGroupStart());
  GIVES(ncclSuccess, ncclAllReduce(send, recv, 1, type, op, comm, NULL));
  OK(ncclRedOpDestroy(op, comm)); /* legal: the call has it */
  done("a group with a user-made op", ncclGroupEnd());
  CHECK(near(get(recv, 0, type), want, type), "premul of type %d: %g, not %g", (int)type, get(recv, 0, type), want);
  FAILS(ncclInvalidArgument, "op is", ncclAllReduce(send, recv, 1, type, op, comm, NULL));
  GIVES(ncclInvalidArgument, ncclRedOpDestroy(op, comm));
}

/* A factor in memory that is read by each call. */
static void premultiplied_later(void) {
  float factor = -1, send = 1, recv = 0;
  ncclRedOp_t op;
  OK(ncclRedOpCreatePreMulSum(&op, &factor, ncclFloat, ncclScalarDevice, comm));
  for (int i = 1; i < 4; i++) {
    factor = (float)i;
    RUN(ncclAllReduce(&send, &recv, 1, ncclFloat, op, comm, NULL));
    CHECK(recv == (float)(i * nranks), "premul with a factor that changes: %g", recv);
  }
  OK(ncclRedOpDestroy(op, comm));
}

/* ---------------------------------------------------------------- sends and receives */

static void ring(size_t n) {
  int32_t *send = malloc(n * 4 + 4), *recv = malloc(n * 4 + 4);
  int right = (rank + 1) % nranks, left = (rank + nranks - 1) % nranks;
  for (size_t i = 0; i < n; i++) send[i] = rank * 100000 + (int)i;
  OK(ncclGroupStart());
  OK(ncclSend(send, n, ncclInt32, right, comm, NULL));
  OK(ncclRecv(recv, n, ncclInt32, left, comm, NULL));
  done("a group with a ring", ncclGroupEnd());
  for (size_t i = 0; i < n; i++)
    if (!CHECK(recv[i] == left * 100000 + (int)i, "ring of %zu at %zu: %d", n, i, recv[i])) break;
  if (nranks > 1 && rank < 2) { /* ungrouped */
    if (rank == 0) RUN(ncclSend(send, n, ncclInt32, 1, comm, NULL));
    if (rank == 1) RUN(ncclRecv(recv, n, ncclInt32, 0, comm, NULL));
    if (rank == 1) CHECK(!n || recv[n - 1] == (int)n - 1, "ungrouped send of %zu", n);
  }
  free(send);
  free(recv);
}

static void exchange(void) { /* all to all by sends, twice in one group, with a collective between */
  int32_t send[2][4], recv[2][4], sum = rank, total = -1;
  OK(ncclGroupStart());
  for (int k = 0; k < 2; k++)
    for (int p = 0; p < nranks; p++) {
      send[k][p] = k * 1000 + rank * 10 + p;
      OK(ncclSend(&send[k][p], 1, ncclInt32, p, comm, NULL));
      OK(ncclRecv(&recv[k][p], 1, ncclInt32, p, comm, NULL));
      if (!k && !p) OK(ncclAllReduce(&sum, &total, 1, ncclInt32, ncclSum, comm, NULL));
    }
  done("a group with an exchange", ncclGroupEnd());
  CHECK(total == nranks * (nranks - 1) / 2, "a collective among sends: %d", total);
  for (int k = 0; k < 2; k++)
    for (int p = 0; p < nranks; p++) CHECK(recv[k][p] == k * 1000 + p * 10 + rank, "from %d: %d", p, recv[k][p]);
}

int main(int argc, char **argv) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  blocking = config.blocking = argc < 2 || strcmp(argv[1], "nonblocking") != 0;
  config.commName = "collectives";
  comm = join_with(&config);
  static const size_t sizes[] = {0, 1, 13, 5000, 200001};
  for (int type = 0; type < ncclNumTypes; type++)
    for (int op = 0; op < ncclNumOps; op++)
      for (size_t s = 0; s < 4; s++)
        if (s < 3 || op == ncclSum) reductions(sizes[s], (ncclDataType_t)type, (ncclRedOp_t)op);
  reductions(sizes[4], ncclFloat32, ncclSum);
  for (size_t s = 0; s < 5; s++) movements(sizes[s]), ring(sizes[s]);
  configured();
  exchange();
  for (int type = 0; type < ncclNumTypes; type++) premultiplied((ncclDataType_t)type);
  premultiplied_later();
  OK(ncclCommFinalize(comm) == ncclInProgress ? settle(comm) : ncclSuccess);
  OK(ncclCommDestroy(comm));
  return check_done();
}
