/* The public calls: arguments are checked here, once; below, they are right. */
#include "base/log.h"
#include "base/param.h"
#include "base/thread.h"
#include "comm/comm.h"
#include "device/device.h"
#include "topo/host.h"
#include "topo/nic.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- library */

hfreduceResult_t hfreduceGetVersion(int *version) {
  if (!version) return hfr_fail(hfreduceInvalidArgument, "hfreduceGetVersion: version is NULL");
  *version = HFREDUCE_VERSION_CODE;
  return hfreduceSuccess;
}

const char *hfreduceGetErrorString(hfreduceResult_t result) {
  static const char *const text[hfreduceNumResults] = {
      "no error",        "unhandled CUDA error", "system error",    "internal error", "invalid argument", "invalid usage",
      "a peer was lost", "in progress",          "deadline passed", "ranks disagree", "aborted",          "data corrupted"};
  return (unsigned)result < hfreduceNumResults ? text[result] : "unknown result code";
}

/* What broke the communicator, if it is one. This thread's last error stays as it is. */
static void look_up_error(hfreduceComm_t comm, const char *function, hfreduceErrorInfo_t *info) {
  hfreduceErrorInfo_t before = *hfr_last_error();
  if (hfr_comm_enter(comm, function, HFR_BRIEF)) {
    *hfr_last_error() = before;
    return;
  }
  hfr_engine_error(&comm->engine, info);
  hfr_comm_leave(comm, HFR_BRIEF);
}

const char *hfreduceGetLastError(hfreduceComm_t comm) {
  if (comm) look_up_error(comm, __func__, hfr_last_error());
  return hfr_last_error()->text;
}

hfreduceResult_t hfreduceGetErrorInfo(hfreduceComm_t comm, hfreduceErrorInfo_t *info) {
  if (!info) return hfr_fail(hfreduceInvalidArgument, "hfreduceGetErrorInfo: info is NULL");
  hfr_error_clear(info);
  if (!comm)
    *info = *hfr_last_error();
  else
    look_up_error(comm, __func__, info);
  return hfreduceSuccess;
}

int hfreduceParamCount(void) { return HFR_PARAM_COUNT; }

hfreduceResult_t hfreduceParamGet(int index, hfreduceParam_t *param) {
  if (!param) return hfr_fail(hfreduceInvalidArgument, "hfreduceParamGet: param is NULL");
  if (index < 0 || index >= HFR_PARAM_COUNT)
    return hfr_fail(hfreduceInvalidArgument, "hfreduceParamGet: index %d; there are %d parameters", index, HFR_PARAM_COUNT);
  enum hfr_param id = (enum hfr_param)index;
  *param = (hfreduceParam_t){hfr_param_name(id), hfr_param_value(id),  hfr_param_preset(id),
                             hfr_param_help(id), hfr_param_is_set(id), hfr_param_alias(id)};
  return hfreduceSuccess;
}

int hfreduceTypeCount(void) {
  int n = 0;
  hfreduceDataType_t dtype;
  while (hfr_dtype_at(n, &dtype)) n++;
  return n;
}

hfreduceResult_t hfreduceTypeGet(int index, hfreduceType_t *type) {
  if (!type) return hfr_fail(hfreduceInvalidArgument, "hfreduceTypeGet: type is NULL");
  hfreduceDataType_t number;
  const struct hfr_dtype *d = hfr_dtype_at(index, &number);
  if (!d)
    return hfr_fail(hfreduceInvalidArgument, "hfreduceTypeGet: index %d; there are %d datatypes", index, hfreduceTypeCount());
  *type = (hfreduceType_t){.name = d->name,
                           .datatype = number,
                           .factor = d->factor,
                           .computed = d->computed,
                           .size = d->size,
                           .is_float = d->kind == HFR_KIND_Float,
                           .ops = d->ops};
  return hfreduceSuccess;
}

void hfreduceLog(hfreduceLogLevel_t level, const char *text) { hfr_log_write((enum hfr_log_level)level, "%s", text); }

size_t hfreduceDescribe(char *text, size_t size) {
  char host[64], nic[32], address[HFR_ADDR_TEXT], out[16384];
  struct hfr_addr addr;
  int found = !hfr_nic_choose(&addr, nic);
  hfr_host_name(host);
  int n = snprintf(out, sizeof out, "version: %d.%d.%d\ncompiler: %s\nhost: %s\ncpus: %d\nsimd: %s\n", HFREDUCE_MAJOR,
                   HFREDUCE_MINOR, HFREDUCE_PATCH, __VERSION__, host, hfr_ncpus(), hfr_simd_level());
  if (hfr_simd_reason()[0]) n += snprintf(out + n, sizeof out - (size_t)n, "simd reason: %s\n", hfr_simd_reason());
  n += snprintf(out + n, sizeof out - (size_t)n, "transport shm: in use between ranks of one node (memfd)\n");
  if (found)
    n += snprintf(out + n, sizeof out - (size_t)n, "transport tcp: in use between nodes, on %s (%s)\n", nic,
                  hfr_addr_text(&addr, address));
  else
    n += snprintf(out + n, sizeof out - (size_t)n, "transport tcp: loopback only: %.300s\n", hfr_last_error()->text);
  n += (int)hfr_bootstrap_describe(out + n, sizeof out - 1024 - (size_t)n);
  n += (int)hfr_transport_describe(out + n, sizeof out - 1024 - (size_t)n);
  n += snprintf(out + n, sizeof out - (size_t)n, "device host: in use\n");
  n += (int)hfr_device_describe(out + n, sizeof out - 256 - (size_t)n);
  n += snprintf(out + n, sizeof out - (size_t)n, "strangers refused: %ld\n", hfr_runtime_refused());
  if (size) {
    size_t take = (size_t)n < size - 1 ? (size_t)n : size - 1;
    memcpy(text, out, take);
    text[take] = 0;
  }
  return (size_t)n + 1;
}

/* ---------------------------------------------------------------- checks */

static hfreduceResult_t check_comm(hfreduceComm_t c, const char *f) {
  if (c->forked)
    return hfr_fail(hfreduceInvalidUsage, "%s: the communicator belongs to process %d, this is its fork; make a new one here", f,
                    (int)c->pid);
  if (atomic_load_explicit(&c->engine.error, memory_order_acquire))
    return (hfreduceResult_t)hfr_engine_error(&c->engine, hfr_last_error());
  return hfreduceSuccess;
}

static hfreduceResult_t check_count(hfreduceComm_t c, const char *f, size_t count, hfreduceDataType_t dtype, int times) {
  size_t esize = hfr_dtype_size(dtype);
  if (!esize)
    return hfr_fail(hfreduceInvalidArgument, "%s: datatype is %d; it must be 0 to %d", f, (int)dtype, hfreduceNumTypes - 1);
  if (count > PTRDIFF_MAX / esize / (size_t)times)
    return hfr_fail(hfreduceInvalidArgument, "%s: rank %d: count %zu of %zu-byte elements times %d exceeds the address space", f,
                    c->rank, count, esize, times);
  return hfreduceSuccess;
}

static hfreduceResult_t check_root(hfreduceComm_t c, const char *f, const char *what, int root) {
  if (root < 0 || root >= c->nranks)
    return hfr_fail(hfreduceInvalidArgument, "%s: %s is %d; with %d ranks it must be 0 to %d", f, what, root, c->nranks,
                    c->nranks - 1);
  return hfreduceSuccess;
}

static hfreduceResult_t check_pointer(const char *f, const char *what, const void *p, size_t count) {
  if (!p && count) return hfr_fail(hfreduceInvalidArgument, "%s: %s is NULL with count %zu", f, what, count);
  return hfreduceSuccess;
}

/* Any overlap but the one that the call's shape allows would be read half overwritten. */
static hfreduceResult_t check_overlap(const char *f, const void *send, size_t send_bytes, const void *recv, size_t recv_bytes,
                                      int in_place) {
  uintptr_t s = (uintptr_t)send, r = (uintptr_t)recv;
  if (!send || !recv || in_place || s + send_bytes <= r || r + recv_bytes <= s || !send_bytes || !recv_bytes)
    return hfreduceSuccess;
  return hfr_fail(hfreduceInvalidArgument, "%s: sendbuff and recvbuff overlap, but not as in-place operation allows", f);
}

/* Do the buffers lie as the call's shape allows them to overlap? row: bytes of a row. */
static int is_in_place(const struct hfr_call *call, int rank, size_t row) {
  switch (hfr_shape(call)->in_place) {
    case HFR_SAME: return call->send == call->recv;
    case HFR_OWN_OF_RECV: return call->send == (char *)call->recv + (size_t)rank * row;
    case HFR_OWN_OF_SEND: return call->recv == (const char *)call->send + (size_t)rank * row;
    default: return 0;
  }
}

/* The op as the engine wants it: premultiplied sums resolved. */
static hfreduceResult_t resolve_op(hfreduceComm_t c, const char *f, hfreduceRedOp_t op, hfreduceDataType_t dtype,
                                   struct hfr_call *call) {
  if ((int)op >= 0 && (int)op < hfreduceNumOps) {
    if (!(hfr_dtype(dtype)->ops >> op & 1))
      return hfr_fail(hfreduceInvalidArgument, "%s: op %d is not defined for %s", f, (int)op, hfr_dtype_name(dtype));
    call->op = op;
    return hfreduceSuccess;
  }
  int i = (int)op - hfreduceNumOps;
  hfreduceResult_t r = hfreduceSuccess;
  pthread_mutex_lock(&c->ops_lock);
  if (i < 0 || i >= c->nops || !c->ops[i].used)
    r = hfr_fail(hfreduceInvalidArgument,
                 "%s: op is %d; it must be 0 to %d or one made by hfreduceRedOpCreatePreMulSum on this communicator", f, (int)op,
                 hfreduceNumOps - 1);
  else if (c->ops[i].dtype != dtype)
    r = hfr_fail(hfreduceInvalidArgument, "%s: the op was made for %s, the data is %s", f, hfr_dtype_name(c->ops[i].dtype),
                 hfr_dtype_name(dtype));
  if (!r) {
    call->op = hfreduceSum;
    call->premul = 1;
    call->scalar_bytes = hfr_dtype(dtype)->factor_size;
    memcpy(call->scalar, c->ops[i].at ? c->ops[i].at : c->ops[i].scalar, call->scalar_bytes);
    call->scalar_from = c->ops[i].from;
  }
  pthread_mutex_unlock(&c->ops_lock);
  return r;
}

/* Each public call on a communicator enters it; `body` checks `call` and issues it. */
#define ENTERED(coll, body)                        \
  do {                                             \
    HFR_TRY(hfr_call_enter(comm, __func__, coll)); \
    return hfr_call_leave(comm, coll, body);       \
  } while (0)
#define COLLECTIVE(body) ENTERED(1, body)
#define MESSAGE(body) ENTERED(0, body)

/* ---------------------------------------------------------------- collectives */

/* Check a collective against its shape, and take it. call->op: as the caller gave it. */
static hfreduceResult_t collective(struct hfr_call *call, hfreduceComm_t c, hfreduceStream_t stream) {
  const struct hfr_shape *shape = hfr_shape(call);
  const char *f = shape->function;
  HFR_TRY(check_comm(c, f));
  HFR_TRY(check_count(c, f, call->count, call->dtype, hfr_has_many(call, 0) || hfr_has_many(call, 1) ? c->nranks : 1));
  if (shape->rooted) HFR_TRY(check_root(c, f, "root", call->root));
  int sends = hfr_rows_of(call, 0, c->rank, c->nranks), receives = hfr_rows_of(call, 1, c->rank, c->nranks);
  if (sends) HFR_TRY(check_pointer(f, "sendbuff", call->send, call->count));
  if (receives) HFR_TRY(check_pointer(f, "recvbuff", call->recv, call->count));
  size_t row = call->count * hfr_dtype_size(call->dtype);
  if (sends && receives)
    HFR_TRY(
        check_overlap(f, call->send, row * (size_t)sends, call->recv, row * (size_t)receives, is_in_place(call, c->rank, row)));
  if (shape->reduces) HFR_TRY(resolve_op(c, f, call->op, call->dtype, call));
  return hfr_issue(c, call, stream);
}

hfreduceResult_t hfreduceAllReduce(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype,
                                   hfreduceRedOp_t op, hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {
      .coll = HFR_ALL_REDUCE, .send = sendbuff, .recv = recvbuff, .count = count, .dtype = datatype, .op = op, .root = -1};
  COLLECTIVE(collective(&call, comm, stream));
}
hfreduceResult_t hfreduceReduce(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype,
                                hfreduceRedOp_t op, int root, hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {
      .coll = HFR_REDUCE, .send = sendbuff, .recv = recvbuff, .count = count, .dtype = datatype, .op = op, .root = root};
  COLLECTIVE(collective(&call, comm, stream));
}
hfreduceResult_t hfreduceBroadcast(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype, int root,
                                   hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {
      .coll = HFR_BROADCAST, .send = sendbuff, .recv = recvbuff, .count = count, .dtype = datatype, .root = root};
  COLLECTIVE(collective(&call, comm, stream));
}
hfreduceResult_t hfreduceBcast(void *buff, size_t count, hfreduceDataType_t datatype, int root, hfreduceComm_t comm,
                               hfreduceStream_t stream) {
  struct hfr_call call = {.coll = HFR_BROADCAST, .send = buff, .recv = buff, .count = count, .dtype = datatype, .root = root};
  COLLECTIVE(collective(&call, comm, stream));
}
hfreduceResult_t hfreduceAllGather(const void *sendbuff, void *recvbuff, size_t sendcount, hfreduceDataType_t datatype,
                                   hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {
      .coll = HFR_ALL_GATHER, .send = sendbuff, .recv = recvbuff, .count = sendcount, .dtype = datatype, .root = -1};
  COLLECTIVE(collective(&call, comm, stream));
}
hfreduceResult_t hfreduceReduceScatter(const void *sendbuff, void *recvbuff, size_t recvcount, hfreduceDataType_t datatype,
                                       hfreduceRedOp_t op, hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {.coll = HFR_REDUCE_SCATTER,
                          .send = sendbuff,
                          .recv = recvbuff,
                          .count = recvcount,
                          .dtype = datatype,
                          .op = op,
                          .root = -1};
  COLLECTIVE(collective(&call, comm, stream));
}
hfreduceResult_t hfreduceAlltoAll(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype,
                                  hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {
      .coll = HFR_ALL_TO_ALL, .send = sendbuff, .recv = recvbuff, .count = count, .dtype = datatype, .root = -1};
  COLLECTIVE(collective(&call, comm, stream));
}
hfreduceResult_t hfreduceGather(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype, int root,
                                hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {
      .coll = HFR_GATHER, .send = sendbuff, .recv = recvbuff, .count = count, .dtype = datatype, .root = root};
  COLLECTIVE(collective(&call, comm, stream));
}
hfreduceResult_t hfreduceScatter(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype, int root,
                                 hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {
      .coll = HFR_SCATTER, .send = sendbuff, .recv = recvbuff, .count = count, .dtype = datatype, .root = root};
  COLLECTIVE(collective(&call, comm, stream));
}

/* Bytes from the start of the buffer to the end of its last block. */
static hfreduceResult_t check_extents(hfreduceComm_t c, const char *f, const char *what, const size_t *counts,
                                      const size_t *displs, size_t esize, size_t *bytes) {
  *bytes = 0;
  for (int r = 0; r < c->nranks; r++) {
    size_t limit = PTRDIFF_MAX / esize;
    if (counts[r] > limit || displs[r] > limit || counts[r] + displs[r] > limit)
      return hfr_fail(hfreduceInvalidArgument, "%s: %s count %zu at %zu for rank %d exceeds the address space", f, what,
                      counts[r], displs[r], r);
    if (counts[r] && (counts[r] + displs[r]) * esize > *bytes) *bytes = (counts[r] + displs[r]) * esize;
  }
  return hfreduceSuccess;
}

static hfreduceResult_t all_to_allv(const void *send, const size_t *sendcounts, const size_t *senddispls, void *recv,
                                    const size_t *recvcounts, const size_t *recvdispls, hfreduceDataType_t dtype,
                                    hfreduceComm_t c, hfreduceStream_t stream) {
  static const char f[] = "hfreduceAlltoAllv";
  struct hfr_call call = {.coll = HFR_ALL_TO_ALL,
                          .send = send,
                          .recv = recv,
                          .dtype = dtype,
                          .root = -1,
                          .sendcounts = sendcounts,
                          .senddispls = senddispls,
                          .recvcounts = recvcounts,
                          .recvdispls = recvdispls};
  size_t send_bytes, recv_bytes;
  HFR_TRY(check_comm(c, f));
  HFR_TRY(check_count(c, f, 0, dtype, 1));
  if (!sendcounts || !senddispls || !recvcounts || !recvdispls)
    return hfr_fail(hfreduceInvalidArgument, "%s: an array of counts or displacements is NULL", f);
  HFR_TRY(check_extents(c, f, "send", sendcounts, senddispls, hfr_dtype_size(dtype), &send_bytes));
  HFR_TRY(check_extents(c, f, "recv", recvcounts, recvdispls, hfr_dtype_size(dtype), &recv_bytes));
  HFR_TRY(check_pointer(f, "sendbuff", send, send_bytes));
  HFR_TRY(check_pointer(f, "recvbuff", recv, recv_bytes));
  HFR_TRY(check_overlap(f, send, send_bytes, recv, recv_bytes, 0));
  if (sendcounts[c->rank] != recvcounts[c->rank])
    return hfr_fail(hfreduceInvalidArgument, "%s: rank %d sends %zu elements to itself but expects %zu", f, c->rank,
                    sendcounts[c->rank], recvcounts[c->rank]);
  return hfr_issue(c, &call, stream);
}
hfreduceResult_t hfreduceAlltoAllv(const void *sendbuff, const size_t *sendcounts, const size_t *senddispls, void *recvbuff,
                                   const size_t *recvcounts, const size_t *recvdispls, hfreduceDataType_t datatype,
                                   hfreduceComm_t comm, hfreduceStream_t stream) {
  COLLECTIVE(all_to_allv(sendbuff, sendcounts, senddispls, recvbuff, recvcounts, recvdispls, datatype, comm, stream));
}

/* Sends and receives. `call` has the buffer, count, datatype, peer (root) and tag. */
static hfreduceResult_t p2p(struct hfr_call call, const char *f, int any, hfreduceComm_t c, hfreduceStream_t stream) {
  call.coll = HFR_P2P;
  HFR_TRY(check_comm(c, f));
  HFR_TRY(check_count(c, f, call.count, call.dtype, 1));
  if (!any) HFR_TRY(check_root(c, f, "peer", call.root));
  if (call.tag < 0) return hfr_fail(hfreduceInvalidArgument, "%s: tag is %d; it must not be negative", f, call.tag);
  HFR_TRY(check_pointer(f, call.receiving ? "recvbuff" : "sendbuff", call.receiving ? call.recv : call.send, call.count));
  return hfr_issue(c, &call, stream);
}
hfreduceResult_t hfreduceSend(const void *sendbuff, size_t count, hfreduceDataType_t datatype, int peer, hfreduceComm_t comm,
                              hfreduceStream_t stream) {
  struct hfr_call call = {.send = sendbuff, .count = count, .dtype = datatype, .root = peer};
  MESSAGE(p2p(call, "hfreduceSend", 0, comm, stream));
}
hfreduceResult_t hfreduceRecv(void *recvbuff, size_t count, hfreduceDataType_t datatype, int peer, hfreduceComm_t comm,
                              hfreduceStream_t stream) {
  struct hfr_call call = {.receiving = 1, .recv = recvbuff, .count = count, .dtype = datatype, .root = peer};
  MESSAGE(p2p(call, "hfreduceRecv", 0, comm, stream));
}
hfreduceResult_t hfreduceSendTag(const void *sendbuff, size_t count, hfreduceDataType_t datatype, int peer, int tag,
                                 hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {.send = sendbuff, .count = count, .dtype = datatype, .root = peer, .tag = tag};
  MESSAGE(p2p(call, "hfreduceSendTag", 0, comm, stream));
}
hfreduceResult_t hfreduceRecvTag(void *recvbuff, size_t count, hfreduceDataType_t datatype, int peer, int tag,
                                 hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {.receiving = 1, .recv = recvbuff, .count = count, .dtype = datatype, .root = peer, .tag = tag};
  MESSAGE(p2p(call, "hfreduceRecvTag", 0, comm, stream));
}
hfreduceResult_t hfreduceRecvAny(void *recvbuff, size_t count, hfreduceDataType_t datatype, int tag, int *source,
                                 hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {
      .receiving = 1, .recv = recvbuff, .count = count, .dtype = datatype, .root = HFR_ANY_SOURCE, .tag = tag, .source = source};
  MESSAGE(p2p(call, "hfreduceRecvAny", 1, comm, stream));
}

hfreduceResult_t hfreduceBarrier(hfreduceComm_t comm, hfreduceStream_t stream) {
  struct hfr_call call = {.coll = HFR_BARRIER, .dtype = hfreduceUint8, .root = -1};
  COLLECTIVE(collective(&call, comm, stream));
}

/* ---------------------------------------------------------------- user ops */

static hfreduceResult_t create_op(hfreduceRedOp_t *op, void *scalar, hfreduceDataType_t datatype,
                                  hfreduceScalarResidence_t residence, hfreduceComm_t comm) {
  static const char f[] = "hfreduceRedOpCreatePreMulSum";
  HFR_TRY(check_comm(comm, f));
  if (!op || !scalar) return hfr_fail(hfreduceInvalidArgument, "%s: %s is NULL", f, op ? "scalar" : "op");
  HFR_TRY(check_count(comm, f, 1, datatype, 1));
  if (residence != hfreduceScalarDevice && residence != hfreduceScalarHostImmediate)
    return hfr_fail(hfreduceInvalidArgument, "%s: residence is %d", f, (int)residence);
  struct hfr_memory memory = {.kind = HFR_MEMORY_HOST};
  if (residence == hfreduceScalarDevice) hfr_memory_of(scalar, &memory);
  int slot = 0;
  hfreduceResult_t r = hfreduceSuccess;
  pthread_mutex_lock(&comm->ops_lock);
  while (slot < comm->nops && comm->ops[slot].used) slot++;
  if (slot == comm->nops) {
    struct hfr_premul *grown = realloc(comm->ops, (size_t)(comm->nops + 8) * sizeof *grown);
    if (grown) {
      memset(grown + comm->nops, 0, 8 * sizeof *grown);
      comm->ops = grown;
      comm->nops += 8;
    } else {
      r = hfr_fail(hfreduceSystemError, "%s: out of memory", f);
    }
  }
  if (!r) {
    int there = residence == hfreduceScalarDevice, by_device = memory.kind != HFR_MEMORY_HOST;
    comm->ops[slot] = (struct hfr_premul){
        .used = 1, .dtype = datatype, .at = there && !by_device ? scalar : NULL, .from = by_device ? scalar : NULL};
    if (!there) memcpy(comm->ops[slot].scalar, scalar, hfr_dtype(datatype)->factor_size);
    *op = (hfreduceRedOp_t)(hfreduceNumOps + slot);
  }
  pthread_mutex_unlock(&comm->ops_lock);
  return r;
}

hfreduceResult_t hfreduceRedOpCreatePreMulSum(hfreduceRedOp_t *op, void *scalar, hfreduceDataType_t datatype,
                                              hfreduceScalarResidence_t residence, hfreduceComm_t comm) {
  HFR_TRY(hfr_comm_enter(comm, __func__, HFR_BRIEF));
  hfreduceResult_t r = create_op(op, scalar, datatype, residence, comm);
  hfr_comm_leave(comm, HFR_BRIEF);
  return r;
}

hfreduceResult_t hfreduceRedOpDestroy(hfreduceRedOp_t op, hfreduceComm_t comm) {
  static const char f[] = "hfreduceRedOpDestroy";
  HFR_TRY(hfr_comm_enter(comm, f, HFR_BRIEF));
  int i = (int)op - hfreduceNumOps;
  hfreduceResult_t r = hfreduceSuccess;
  pthread_mutex_lock(&comm->ops_lock);
  if (i < 0 || i >= comm->nops || !comm->ops[i].used)
    r = hfr_fail(hfreduceInvalidArgument, "%s: op %d was not made by hfreduceRedOpCreatePreMulSum, or is destroyed", f, (int)op);
  else
    comm->ops[i].used = 0;
  pthread_mutex_unlock(&comm->ops_lock);
  hfr_comm_leave(comm, HFR_BRIEF);
  return r;
}

/* ---------------------------------------------------------------- memory */

hfreduceResult_t hfreduceMemAlloc(void **ptr, size_t size) {
  if (!ptr) return hfr_fail(hfreduceInvalidArgument, "hfreduceMemAlloc: ptr is NULL");
  return hfr_device_host.alloc(ptr, size);
}

hfreduceResult_t hfreduceDeviceMemAlloc(void **ptr, size_t size) {
  if (!ptr) return hfr_fail(hfreduceInvalidArgument, "hfreduceDeviceMemAlloc: ptr is NULL");
  *ptr = NULL;
  return (hfr_device_cuda.why_absent() ? &hfr_device_host : &hfr_device_cuda)->alloc(ptr, size);
}

hfreduceResult_t hfreduceDeviceGetCurrent(int *device) {
  if (!device) return hfr_fail(hfreduceInvalidArgument, "hfreduceDeviceGetCurrent: device is NULL");
  *device = hfr_device_current();
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceMemFree(void *ptr) { return ptr ? hfr_device_of(ptr)->release(ptr) : hfreduceSuccess; }

/* ---------------------------------------------------------------- streams */

hfreduceResult_t hfreduceStreamGet(hfreduceStream_t *stream, int device) {
  if (!stream) return hfr_fail(hfreduceInvalidArgument, "hfreduceStreamGet: stream is NULL");
  *stream = NULL;
  return hfr_stream_get(device, stream);
}

hfreduceResult_t hfreduceStreamPut(hfreduceStream_t stream) { return hfr_stream_put(stream); }
