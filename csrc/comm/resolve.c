/* Which way a call goes: what its pointers are, whether they reach far enough, and whose stream it was given. */
#include "pairs.h"
#include "staging.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

const char *hfr_stream_name(const struct hfr_call *call) {
  if (call->coll == HFR_P2P) return call->receiving ? "hfreduceRecv" : "hfreduceSend";
  return call->sendcounts ? "hfreduceAlltoAllv" : hfr_shape(call)->function;
}

size_t hfr_stream_uneven(const struct hfr_call *c, int recv, int nranks, int extent) {
  const size_t *count = recv ? c->recvcounts : c->sendcounts, *at = recv ? c->recvdispls : c->senddispls;
  size_t most = 0;
  for (int r = 0; r < nranks; r++) {
    size_t n = extent && count[r] ? at[r] + count[r] : count[r];
    if (n > most) most = n;
  }
  return most;
}

/* Bytes of a buffer that the call works on at this rank; 0: it leaves it alone. */
static size_t extent(const struct hfreduceComm *c, const struct hfr_call *call, int recv) {
  size_t esize = hfr_dtype_size(call->dtype);
  if (call->sendcounts) return hfr_stream_uneven(call, recv, c->nranks, 1) * esize;
  return (size_t)hfr_rows_of(call, recv, c->rank, c->nranks) * call->count * esize;
}

/* Does the process have this byte? Host memory that was freed, and device memory that was, look alike to the driver: unknown. */
static int readable(const void *at) {
  char byte;
  struct iovec mine = {&byte, 1}, theirs = {(void *)(uintptr_t)at, 1};
  return process_vm_readv(getpid(), &mine, 1, &theirs, 1, 0) == 1 || errno != EFAULT;
}

static hfreduceResult_t check_buffer(const struct hfreduceComm *c, const struct hfr_call *call, int recv, size_t bytes,
                                     const struct hfr_memory *m) {
  const char *f = hfr_stream_name(call), *what = recv ? "recvbuff" : "sendbuff";
  const uint8_t *p = recv ? call->recv : call->send;
  if (m->kind == HFR_MEMORY_HOST) {
    if (readable(p) && readable(p + bytes - 1)) return hfreduceSuccess;
    return hfr_fail(hfreduceInvalidArgument,
                    "%s: rank %d: %s %p is neither memory of a device nor mapped host memory over its %zu bytes: was it freed?",
                    f, c->rank, what, (const void *)p, bytes);
  }
  size_t left = hfr_memory_reach(p, bytes, m);
  if (left >= bytes) return hfreduceSuccess;
  return hfr_fail(hfreduceInvalidArgument,
                  "%s: rank %d: %s %p has %zu bytes to the end of its allocation, but the call needs %zu (count %zu of %s)", f,
                  c->rank, what, (const void *)p, left, bytes, call->count, hfr_dtype_name(call->dtype));
}

static hfreduceResult_t check_device(const struct hfreduceComm *c, const struct hfr_call *call, int recv,
                                     const struct hfr_memory *m, const struct hfr_stream *s) {
  const char *f = hfr_stream_name(call), *what = recv ? "recvbuff" : "sendbuff";
  if (m->kind != HFR_MEMORY_DEVICE) return hfreduceSuccess; /* managed memory belongs to all */
  if (m->device >= 0 && m->device != s->device)
    return hfr_fail(hfreduceInvalidArgument, "%s: rank %d: %s lies on device %d, but the stream belongs to device %d", f, c->rank,
                    what, m->device, s->device);
  if (m->context && m->context != s->context)
    return hfr_fail(hfreduceInvalidArgument,
                    "%s: rank %d: %s belongs to another CUDA context of device %d than the stream; use one context for both", f,
                    c->rank, what, s->device);
  return hfreduceSuccess;
}

/* The context whose default stream is meant by NULL: where the data is. */
static hfreduceResult_t context_of(const struct hfr_memory m[2], void **context) {
  *context = NULL;
  for (int recv = 0; recv < 2; recv++) {
    if (!hfr_is_device(&m[recv])) continue;
    *context = m[recv].context ? m[recv].context : hfr_device_context(m[recv].device);
    return *context ? hfreduceSuccess : (hfreduceResult_t)hfr_last_error()->code;
  }
  return hfreduceSuccess;
}

hfreduceResult_t hfr_stream_resolve(struct hfreduceComm *c, struct hfr_call *call, hfreduceStream_t stream,
                                    struct hfr_ordered *o) {
  const char *f = hfr_stream_name(call);
  struct hfr_memory m[2];
  size_t bytes[2];
  void *context;
  *o = (struct hfr_ordered){0};
  if (stream && !hfr_device_present())
    return hfr_fail(hfreduceInvalidArgument,
                    "%s: rank %d: a stream was given, but there is no device layer: %s; pass NULL with "
                    "host memory",
                    f, c->rank, hfr_device_cuda.why_absent());
  for (int recv = 0; recv < 2; recv++) {
    bytes[recv] = extent(c, call, recv);
    hfr_memory_of(bytes[recv] ? (recv ? call->recv : call->send) : NULL, &m[recv]);
    o->staged[recv] = hfr_is_device(&m[recv]);
  }
  o->on = stream || o->staged[0] || o->staged[1];
  for (int recv = 0; recv < 2; recv++)
    if (bytes[recv] && (o->on || c->staging)) HFR_TRY(check_buffer(c, call, recv, bytes[recv], &m[recv]));
  if (!o->on) {
    if (!call->scalar_from) return hfreduceSuccess;
    hfreduceResult_t r = hfr_device_read(call->scalar, call->scalar_from, call->scalar_bytes);
    call->scalar_from = NULL;
    return r;
  }
  HFR_TRY(context_of(m, &context));
  HFR_TRY(hfr_stream_look(f, stream, context, &o->stream));
  for (int recv = 0; recv < 2; recv++) HFR_TRY(check_device(c, call, recv, &m[recv], &o->stream));
  HFR_TRY(hfr_staging_get(c, f, &o->stream));
  hfreduceResult_t r;
  o->paired = hfr_pairs_want(c, call, o, &r);
  return o->paired ? hfr_staging_get(hfr_pairs_half(c), f, &o->stream) : r;
}

int hfr_stream_is_copy(const struct hfreduceComm *c, const struct hfr_call *call, const struct hfr_ordered *o) {
  return o->on && c->nranks == 1 && !call->premul && !call->sendcounts && o->staged[0] && o->staged[1] && call->coll != HFR_P2P;
}
