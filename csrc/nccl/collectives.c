/*
 * Collectives, sends and receives. hfreduce checks their arguments, and its rules are NCCL's; here only the two libraries' types
 * and handles meet. The plain call is the one with a configuration, without one.
 */
#include "internal.h"

#include <math.h>
#include <string.h>

#define TYPE ((hfreduceDataType_t)datatype)
#define OP ((hfreduceRedOp_t)op)

/* `expr` calls hfreduce on call.core. */
#define ISSUE(name, expr)                                             \
  do {                                                                \
    struct hfr_nccl_call call;                                        \
    ncclResult_t result_ = hfr_nccl_begin(&call, name, comm, stream); \
    return result_ ? result_ : hfr_nccl_end(&call, expr);             \
  } while (0)

#define ISSUE_CONFIGURED(name, expr)                                                    \
  do {                                                                                  \
    if (config) HFR_NCCL_TRY(hfr_nccl_latch(hfr_nccl_check_coll_config(name, config))); \
    ISSUE(name, expr);                                                                  \
  } while (0)

HFR_NCCL_DEFINE(ncclResult_t, ncclAllReduceConfig, (HFR_NCCL_REDUCING, const ncclCollConfig_t *config)) {
  ISSUE_CONFIGURED("ncclAllReduce", hfreduceAllReduce(sendbuff, recvbuff, count, TYPE, OP, call.core, stream));
}
HFR_NCCL_DEFINE(ncclResult_t, ncclAllReduce, (HFR_NCCL_REDUCING)) {
  return pncclAllReduceConfig(sendbuff, recvbuff, count, datatype, op, comm, stream, NULL);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclReduceScatterConfig, (HFR_NCCL_REDUCING, const ncclCollConfig_t *config)) {
  ISSUE_CONFIGURED("ncclReduceScatter", hfreduceReduceScatter(sendbuff, recvbuff, count, TYPE, OP, call.core, stream));
}
HFR_NCCL_DEFINE(ncclResult_t, ncclReduceScatter, (HFR_NCCL_REDUCING)) {
  return pncclReduceScatterConfig(sendbuff, recvbuff, count, datatype, op, comm, stream, NULL);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclReduceConfig, (HFR_NCCL_REDUCING_ROOTED, const ncclCollConfig_t *config)) {
  ISSUE_CONFIGURED("ncclReduce", hfreduceReduce(sendbuff, recvbuff, count, TYPE, OP, root, call.core, stream));
}
HFR_NCCL_DEFINE(ncclResult_t, ncclReduce, (HFR_NCCL_REDUCING_ROOTED)) {
  return pncclReduceConfig(sendbuff, recvbuff, count, datatype, op, root, comm, stream, NULL);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclBroadcastConfig, (HFR_NCCL_ROOTED, const ncclCollConfig_t *config)) {
  ISSUE_CONFIGURED("ncclBroadcast", hfreduceBroadcast(sendbuff, recvbuff, count, TYPE, root, call.core, stream));
}
HFR_NCCL_DEFINE(ncclResult_t, ncclBroadcast, (HFR_NCCL_ROOTED)) {
  return pncclBroadcastConfig(sendbuff, recvbuff, count, datatype, root, comm, stream, NULL);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclBcast,
                (void *buff, size_t count, ncclDataType_t datatype, int root, ncclComm_t comm, cudaStream_t stream)) {
  return pncclBroadcastConfig(buff, buff, count, datatype, root, comm, stream, NULL);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclGatherConfig, (HFR_NCCL_ROOTED, const ncclCollConfig_t *config)) {
  ISSUE_CONFIGURED("ncclGather", hfreduceGather(sendbuff, recvbuff, count, TYPE, root, call.core, stream));
}
HFR_NCCL_DEFINE(ncclResult_t, ncclGather, (HFR_NCCL_ROOTED)) {
  return pncclGatherConfig(sendbuff, recvbuff, count, datatype, root, comm, stream, NULL);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclScatterConfig, (HFR_NCCL_ROOTED, const ncclCollConfig_t *config)) {
  ISSUE_CONFIGURED("ncclScatter", hfreduceScatter(sendbuff, recvbuff, count, TYPE, root, call.core, stream));
}
HFR_NCCL_DEFINE(ncclResult_t, ncclScatter, (HFR_NCCL_ROOTED)) {
  return pncclScatterConfig(sendbuff, recvbuff, count, datatype, root, comm, stream, NULL);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclAllGatherConfig, (HFR_NCCL_MOVING, const ncclCollConfig_t *config)) {
  ISSUE_CONFIGURED("ncclAllGather", hfreduceAllGather(sendbuff, recvbuff, count, TYPE, call.core, stream));
}
HFR_NCCL_DEFINE(ncclResult_t, ncclAllGather, (HFR_NCCL_MOVING)) {
  return pncclAllGatherConfig(sendbuff, recvbuff, count, datatype, comm, stream, NULL);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclAlltoAllConfig, (HFR_NCCL_MOVING, const ncclCollConfig_t *config)) {
  ISSUE_CONFIGURED("ncclAlltoAll", hfreduceAlltoAll(sendbuff, recvbuff, count, TYPE, call.core, stream));
}
HFR_NCCL_DEFINE(ncclResult_t, ncclAlltoAll, (HFR_NCCL_MOVING)) {
  return pncclAlltoAllConfig(sendbuff, recvbuff, count, datatype, comm, stream, NULL);
}

/* A rank that sends to itself or receives from itself outside a group would wait for itself. */
#define ISSUE_MESSAGE(name, sends, expr)                                                           \
  do {                                                                                             \
    struct hfr_nccl_call call;                                                                     \
    HFR_NCCL_TRY(hfr_nccl_begin(&call, name, comm, stream));                                       \
    ncclResult_t unmatched_ = peer == comm->rank ? hfr_nccl_self(name, comm, sends) : ncclSuccess; \
    if (!unmatched_) return hfr_nccl_end(&call, expr);                                             \
    hfr_nccl_drop(&call);                                                                          \
    return unmatched_;                                                                             \
  } while (0)

HFR_NCCL_DEFINE(ncclResult_t, ncclSend,
                (const void *sendbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm, cudaStream_t stream)) {
  ISSUE_MESSAGE("ncclSend", 1, hfreduceSend(sendbuff, count, TYPE, peer, call.core, stream));
}
HFR_NCCL_DEFINE(ncclResult_t, ncclRecv,
                (void *recvbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm, cudaStream_t stream)) {
  ISSUE_MESSAGE("ncclRecv", -1, hfreduceRecv(recvbuff, count, TYPE, peer, call.core, stream));
}

/* ---------------------------------------------------------------- user-made ops */

/* An fp8 number as a float: NCCL takes the factor of an fp8 sum in the type itself, hfreduce in the one that hfreduceTypeGet
   names, float32. e4m3 has no infinities, e5m2 is IEEE's. */
static float fp8_value(uint8_t bits, int mantissa_bits) {
  int bias = mantissa_bits == 3 ? 7 : 15, top = mantissa_bits == 3 ? 15 : 31;
  int exponent = bits >> mantissa_bits & top, mantissa = bits & ((1 << mantissa_bits) - 1);
  float value;
  if (exponent == top && (mantissa_bits == 2 || mantissa == 7))
    value = mantissa_bits == 2 && !mantissa ? INFINITY : NAN;
  else if (exponent)
    value = ldexpf((float)(mantissa | 1 << mantissa_bits), exponent - bias - mantissa_bits);
  else
    value = ldexpf((float)mantissa, 1 - bias - mantissa_bits);
  return bits & 0x80 ? -value : value;
}

static ncclResult_t premul(ncclRedOp_t *op, void *scalar, ncclDataType_t datatype, ncclScalarResidence_t residence,
                           ncclComm_t comm) {
  static const char f[] = "ncclRedOpCreatePreMulSum";
  int fp8 = datatype == ncclFloat8e4m3 || datatype == ncclFloat8e5m2;
  hfreduceRedOp_t made;
  float wide;
  if (!op || !scalar) return hfr_nccl_fail(ncclInvalidArgument, "%s: %s is NULL", f, op ? "scalar" : "op");
  if (fp8 && residence == ncclScalarDevice) /* hfreduce reads a float32 through the pointer */
    return hfr_nccl_fail(ncclInvalidArgument, "%s: an fp8 factor must be ncclScalarHostImmediate", f);
  if (fp8) {
    wide = fp8_value(*(const uint8_t *)scalar, datatype == ncclFloat8e4m3 ? 3 : 2);
    scalar = &wide;
  }
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_WORKING));
  ncclResult_t r = hfr_nccl_took(
      comm, hfreduceRedOpCreatePreMulSum(&made, scalar, TYPE, (hfreduceScalarResidence_t)residence, atomic_load(&comm->core)));
  if (!r) *op = (ncclRedOp_t)made;
  hfr_nccl_leave(comm);
  return r;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclRedOpCreatePreMulSum,
                (ncclRedOp_t * op, void *scalar, ncclDataType_t datatype, ncclScalarResidence_t residence, ncclComm_t comm)) {
  return hfr_nccl_latch(premul(op, scalar, datatype, residence, comm));
}

/* Legal while calls that took the op are under way: they have a copy. */
HFR_NCCL_DEFINE(ncclResult_t, ncclRedOpDestroy, (ncclRedOp_t op, ncclComm_t comm)) {
  static const char f[] = "ncclRedOpDestroy";
  HFR_NCCL_TRY(hfr_nccl_latch(hfr_nccl_enter(comm, f, HFR_NCCL_HANDLE)));
  hfreduceComm_t core = atomic_load(&comm->core);
  ncclResult_t r = core ? hfr_nccl_took(comm, hfreduceRedOpDestroy((hfreduceRedOp_t)op, core))
                        : hfr_nccl_fail(ncclInvalidArgument, "%s: the communicator is not made yet", f);
  hfr_nccl_leave(comm);
  return hfr_nccl_latch(r);
}
