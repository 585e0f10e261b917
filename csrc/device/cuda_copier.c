/*
 * Copiers: two queues of a CUDA device. They are two streams beside the user's:
 *
 *   user's stream ──event──► [to host:   wait for room, copy, write "ready"] ─┐
 *                  └─event─► [to device: wait for "done", copy, write "taken"]◄┘ event ──► user's stream
 *
 * A launch of calls of one segment each has both its queues in the user's stream itself: no event leads to another stream, and
 * one stream less holds a wait, of which the hardware has few queues. Where a queue ends then, an event says: what comes next in
 * this queue, wherever it is, goes on behind it.
 *
 * Captured calls have a pair of streams of their own, so that an ordinary call beside a capture does not end up in the graph.
 *
 * All streams and events are made with the copier: a driver may let the call that makes or destroys one wait until no stream
 * waits for a word, and the word may be the business of the thread that then hangs in the call.
 *
 * Where streams cannot wait for memory, host functions do. A driver may run those of all streams one after the other, in any
 * order, so a function that waits must never stand before one that it waits for. Hence words are written by the device even then,
 * both directions of a copier share one stream, and the functions of all copiers of the process stand in one line, in the order
 * of the calls: as on the other ranks.
 */
#include "cuda.h"

#include "../base/log.h"
#include "../base/thread.h"

#include <pthread.h>
#include <stdlib.h>

struct hfr_copier {
  const struct hfr_cu *cu;
  int device, by_host;
  unsigned flush; /* a queue that has waited for a word sees what CPUs wrote into its memory before */
  hfr_cu_context context;
  unsigned long long context_id;
  hfr_cu_stream stream[2][2]; /* [capturing][queue] */
  hfr_cu_event begun[2], joined[2], ended[2];
  hfr_cu_event chained;
  hfr_cu_stream bell;
  hfr_cu_event rung;
  int ringing;                     /* the bell's stream is still to be joined */
  hfr_cu_event waited;             /* by_host: behind its last host function outside graphs */
  hfr_cu_event mark[2][HFR_MARKS]; /* the first are made at once, those of pairs of devices when they are needed */
  hfr_cu_stream user;              /* own: the launch that runs is in the user's stream; */
  int own, placed[2];              /* ... and has begun in that queue */
  hfr_cu_event tail[2];
  int away[2], used[2]; /* the queue ends at `tail`, in some stream of the user's; the copier's stream of that queue was used */
  int capturing;        /* between enter and leave */
  int mode;             /* the thread's capture mode, to be put back */
  struct host_op *kept; /* what host functions in graphs read */
};

/* The line of host functions: where it ends now. */
static struct {
  pthread_mutex_t lock;
  hfr_cu_event end; /* some copier's `waited`; NULL: nobody is in it */
} line = {.lock = PTHREAD_MUTEX_INITIALIZER};

#define TRY_CU(copier, member, call, ...)       \
  do {                                          \
    int r_ = (copier)->cu->member(__VA_ARGS__); \
    if (r_) return hfr_cuda_fail(call, r_);     \
  } while (0)

/* ---------------------------------------------------------------- birth and death */

static hfreduceResult_t open_event(const struct hfr_copier *c, hfr_cu_event *event) {
  if (!*event) TRY_CU(c, event_create, "cuEventCreate", event, HFR_CU_EVENT_DISABLE_TIMING);
  return hfreduceSuccess;
}

static hfreduceResult_t open_pair(struct hfr_copier *c, int capturing) {
  for (int q = 0; q < 2; q++)
    if (!c->stream[capturing][q] && (q == 0 || !c->by_host)) HFR_TRY(hfr_cuda_stream_create(c->cu, &c->stream[capturing][q]));
  if (c->by_host) c->stream[capturing][1] = c->stream[capturing][0];
  hfr_cu_event *event[3] = {&c->begun[capturing], &c->joined[capturing], &c->ended[capturing]};
  for (int i = 0; i < 3; i++) HFR_TRY(open_event(c, event[i]));
  return hfreduceSuccess;
}

/* All that the copier will ever need, but for what a driver has no support for. */
static hfreduceResult_t open_all(struct hfr_copier *c, int marks) {
  int captures = c->cu->capture_info != NULL;
  for (int capturing = 0; capturing <= captures; capturing++) {
    HFR_TRY(open_pair(c, capturing));
    for (int i = 0; i < marks && !c->by_host; i++) HFR_TRY(open_event(c, &c->mark[capturing][i]));
  }
  HFR_TRY(open_event(c, &c->chained));
  for (int q = 0; q < 2; q++) HFR_TRY(open_event(c, &c->tail[q]));
  if (c->by_host) return open_event(c, &c->waited);
  if (!captures) return hfreduceSuccess;
  HFR_TRY(hfr_cuda_stream_create(c->cu, &c->bell));
  return open_event(c, &c->rung);
}

/* Once a process: what its user should know. */
static void warn_once(const struct hfr_copier *c) {
  static atomic_flag queues = ATOMIC_FLAG_INIT, host = ATOMIC_FLAG_INIT;
  if (hfr_cuda_one_queue() && !atomic_flag_test_and_set(&queues))
    HFR_WARN(
        "CUDA_DEVICE_MAX_CONNECTIONS=1: while a collective waits for other ranks, other streams of this process wait with it");
  if (c->by_host && !atomic_flag_test_and_set(&host))
    HFR_WARN(
        "CUDA device %d: no stream memory operations (%s); host functions wait instead, which is slower, and keeps other host "
        "functions of the process, and its other communicators, waiting",
        c->device, hfr_cuda_mem_ops_wanted() ? "the driver has none" : "HFREDUCE_CUDA_MEMOPS=0");
}

hfreduceResult_t hfr_copier_create(int device, void *context, int marks, struct hfr_copier **out) {
  struct hfr_copier *c = calloc(1, sizeof *c);
  if (!c) return hfr_fail(hfreduceSystemError, "out of memory");
  c->cu = hfr_cuda();
  c->device = device;
  c->context = context;
  c->context_id = hfr_cuda_context_id(c->cu, context);
  c->by_host = !hfr_cuda_mem_ops_wanted() || !hfr_cuda_mem_ops(c->cu, device);
  int flush = 0;
  if (!c->by_host && !hfr_mapping_why_absent() && !c->cu->device_attribute(&flush, HFR_CU_ATTR_FLUSH_REMOTE_WRITES, device))
    c->flush = flush ? HFR_CU_WAIT_FLUSH : 0;
  hfreduceResult_t r = hfr_copier_enter(c, 0);
  if (r) return free(c), r;
  r = open_all(c, marks);
  hfr_copier_leave(c);
  if (r) return hfr_copier_destroy(c, 0), r;
  warn_once(c);
  *out = c;
  return hfreduceSuccess;
}

/* A host function's argument. */
struct host_op {
  struct host_op *next; /* in a graph: kept until the copier goes */
  _Atomic uint32_t *word;
  uint32_t value;
  int in_graph;
};

/* Have both streams run dry? A context that is gone has nothing running in it; nothing ever runs in the captured pair. */
static int drain(struct hfr_copier *c, int64_t limit_ns) {
  int64_t end = hfr_now_ns() + limit_ns;
  for (int q = 0; q < 2; q++)
    while (c->stream[0][q] && c->cu->stream_query(c->stream[0][q]) == HFR_CU_NOT_READY) {
      struct timespec t = {0, 100000};
      if (hfr_now_ns() > end) return 0;
      nanosleep(&t, NULL);
    }
  for (int q = 0; q < 2; q++)
    while (c->away[q] && c->cu->event_query(c->tail[q]) == HFR_CU_NOT_READY) {
      struct timespec t = {0, 100000};
      if (hfr_now_ns() > end) return 0;
      nanosleep(&t, NULL);
    }
  return 1;
}

/* Whoever comes next in the line need not wait for this one's functions: nothing keeps those waiting any more. */
static void leave_line(const struct hfr_copier *c) {
  pthread_mutex_lock(&line.lock);
  if (line.end == c->waited) line.end = NULL;
  pthread_mutex_unlock(&line.lock);
}

int hfr_copier_drain(struct hfr_copier *c, int64_t limit_ns) {
  leave_line(c);
  if (hfr_copier_enter(c, 0)) return 1;
  int drained = drain(c, limit_ns);
  hfr_copier_leave(c);
  if (!drained)
    HFR_WARN(
        "CUDA device %d: copies of a communicator still wait for the user's stream after %.3g s; their memory is left to the "
        "process",
        c->device, (double)limit_ns * 1e-9);
  return drained;
}

int hfr_copier_destroy(struct hfr_copier *c, int64_t limit_ns) {
  int drained = hfr_copier_drain(c, limit_ns);
  if (drained && !hfr_copier_enter(c, 0)) {
    if (c->waited) c->cu->event_destroy(c->waited);
    if (c->chained) c->cu->event_destroy(c->chained);
    for (int q = 0; q < 2; q++)
      if (c->tail[q]) c->cu->event_destroy(c->tail[q]);
    for (int pair = 0; pair < 2; pair++) {
      for (int q = 0; q < (c->by_host ? 1 : 2); q++)
        if (c->stream[pair][q]) c->cu->stream_destroy(c->stream[pair][q]);
      for (int i = 0; i < HFR_MARKS; i++)
        if (c->mark[pair][i]) c->cu->event_destroy(c->mark[pair][i]);
      if (pair && c->bell) c->cu->stream_destroy(c->bell);
      if (pair && c->rung) c->cu->event_destroy(c->rung);
      if (c->begun[pair]) c->cu->event_destroy(c->begun[pair]);
      if (c->joined[pair]) c->cu->event_destroy(c->joined[pair]);
      if (c->ended[pair]) c->cu->event_destroy(c->ended[pair]);
    }
    hfr_copier_leave(c);
  }
  hfr_copier_forget(c);
  return drained;
}

void hfr_copier_forget(struct hfr_copier *c) { free(c); /* `kept` stays: a graph may be launched once more */ }

int hfr_copier_device(const struct hfr_copier *c) { return c->device; }
void *hfr_copier_context(const struct hfr_copier *c) { return c->context; }
int hfr_copier_serves(const struct hfr_copier *c, int device, void *context) {
  return c->device == device && c->context == context && c->context_id == hfr_cuda_context_id(c->cu, context);
}
int hfr_copier_by_host(const struct hfr_copier *c) { return c->by_host; }
int hfr_copier_sees_writes(const struct hfr_copier *c) { return c->flush != 0; }

hfreduceResult_t hfr_copier_enter(struct hfr_copier *c, int capturing) {
  TRY_CU(c, context_push, "cuCtxPushCurrent", c->context);
  c->capturing = capturing;
  c->mode = HFR_CU_MODE_RELAXED; /* what a capture elsewhere forbids by default is safe here: nothing waits */
  if (c->cu->capture_mode) c->cu->capture_mode(&c->mode);
  return hfreduceSuccess;
}

void hfr_copier_leave(struct hfr_copier *c) {
  hfr_cu_context popped;
  if (c->cu->capture_mode) c->cu->capture_mode(&c->mode);
  c->cu->context_pop(&popped);
}

/* ---------------------------------------------------------------- order */

static uintptr_t device_address(const struct hfr_pinned *m, const void *at) {
  return m->device + (uintptr_t)((const uint8_t *)at - m->host);
}

static hfr_cu_stream stream_of(const struct hfr_copier *c, enum hfr_queue queue) {
  return c->own && !c->capturing ? c->user : c->stream[c->capturing][queue];
}

static hfreduceResult_t end_queue(struct hfr_copier *c, enum hfr_queue queue) {
  TRY_CU(c, event_record, "cuEventRecord", c->tail[queue], c->user);
  c->away[queue] = 1;
  c->placed[queue] = 0;
  return hfreduceSuccess;
}

/* In the user's stream: go on where the queue ended. What goes out is all there before the first that comes in. */
static hfreduceResult_t take_place(struct hfr_copier *c, enum hfr_queue queue) {
  if (!c->own || c->capturing || c->placed[queue]) return hfreduceSuccess;
  if (queue == HFR_TO_DEVICE && c->placed[HFR_TO_HOST]) HFR_TRY(end_queue(c, HFR_TO_HOST));
  c->placed[queue] = 1;
  if (!c->away[queue] && !c->used[queue]) return hfreduceSuccess;
  if (!c->away[queue]) TRY_CU(c, event_record, "cuEventRecord", c->tail[queue], c->stream[0][queue]);
  TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", c->user, c->tail[queue], 0);
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_own(struct hfr_copier *c, void *stream) {
  c->own = 1;
  c->user = stream;
  c->placed[0] = c->placed[1] = 0;
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_after(struct hfr_copier *c, void *stream) {
  c->own = 0;
  for (int q = 0; q < 2 && !c->capturing; q++) {
    if (c->away[q]) TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", c->stream[0][q], c->tail[q], 0);
    c->away[q] = 0;
    c->used[q] = 1;
  }
  TRY_CU(c, event_record, "cuEventRecord", c->begun[c->capturing], stream);
  for (int q = 0; q < (c->by_host ? 1 : 2); q++)
    TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", c->stream[c->capturing][q], c->begun[c->capturing], 0);
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_join(struct hfr_copier *c) {
  if (c->capturing && c->ringing) {
    c->ringing = 0;
    TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", stream_of(c, HFR_TO_DEVICE), c->rung, 0);
  }
  if (c->by_host || (c->own && !c->capturing)) return hfreduceSuccess;
  TRY_CU(c, event_record, "cuEventRecord", c->joined[c->capturing], stream_of(c, HFR_TO_HOST));
  TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", stream_of(c, HFR_TO_DEVICE), c->joined[c->capturing], 0);
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_before(struct hfr_copier *c, enum hfr_queue queue, void *stream) {
  if (c->own && !c->capturing) {
    for (int q = 0; q < 2; q++)
      if (c->placed[q]) HFR_TRY(end_queue(c, (enum hfr_queue)q));
    c->own = 0;
    return hfreduceSuccess;
  }
  TRY_CU(c, event_record, "cuEventRecord", c->ended[c->capturing], stream_of(c, queue));
  TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", stream, c->ended[c->capturing], 0);
  /* In a graph the next call's segments lie where this one's did. */
  if (c->capturing && !c->by_host) TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", stream_of(c, HFR_TO_HOST), c->ended[1], 0);
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_mark(struct hfr_copier *c, int number) {
  hfr_cu_event *event = &c->mark[c->capturing][number];
  if (c->by_host || (c->own && !c->capturing)) return hfreduceSuccess;
  HFR_TRY(open_event(c, event));
  TRY_CU(c, event_record, "cuEventRecord", *event, stream_of(c, HFR_TO_HOST));
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_follow(struct hfr_copier *c, int number) {
  if (c->by_host || (c->own && !c->capturing)) return hfreduceSuccess;
  TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", stream_of(c, HFR_TO_DEVICE), c->mark[c->capturing][number], 0);
  return hfreduceSuccess;
}

hfr_cu_stream hfr_copier_stream(const struct hfr_copier *c, enum hfr_queue queue) { return stream_of(c, queue); }

hfreduceResult_t hfr_copier_chain(struct hfr_copier *c, struct hfr_copier *after, enum hfr_queue queue) {
  TRY_CU(c, event_record, "cuEventRecord", after->chained, stream_of(after, queue));
  TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", stream_of(c, queue), after->chained, 0);
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_follow_mark(struct hfr_copier *c, enum hfr_queue queue, struct hfr_copier *after, int number) {
  TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", stream_of(c, queue), after->mark[0][number], 0);
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- copies */

#define PITCH_MAX ((size_t)1 << 31) /* what a device takes as a pitch is a little less than this */

hfreduceResult_t hfr_copier_copy(struct hfr_copier *c, enum hfr_queue queue, void *host, size_t host_pitch, uintptr_t device,
                                 size_t device_pitch, size_t width, size_t rows) {
  hfr_cu_stream stream = stream_of(c, queue);
  if (!width || !rows) return hfreduceSuccess;
  HFR_TRY(take_place(c, queue));
  if (rows > 1 && host_pitch == width && device_pitch == width) width *= rows, rows = 1;
  if (rows > 1 && device_pitch < PITCH_MAX / 2) {
    struct hfr_cu_copy2d copy = {.width = width, .height = rows};
    if (queue == HFR_TO_HOST) {
      copy.src_type = HFR_CU_MEMORY_UNIFIED, copy.src_device = device, copy.src_pitch = device_pitch;
      copy.dst_type = HFR_CU_MEMORY_HOST, copy.dst_host = host, copy.dst_pitch = host_pitch;
    } else {
      copy.src_type = HFR_CU_MEMORY_HOST, copy.src_host = host, copy.src_pitch = host_pitch;
      copy.dst_type = HFR_CU_MEMORY_UNIFIED, copy.dst_device = device, copy.dst_pitch = device_pitch;
    }
    TRY_CU(c, copy_2d_async, "cuMemcpy2DAsync", &copy, stream);
    return hfreduceSuccess;
  }
  for (size_t i = 0; i < rows; i++) {
    uintptr_t h = (uintptr_t)host + i * host_pitch, d = device + i * device_pitch;
    TRY_CU(c, copy_async, "cuMemcpyAsync", queue == HFR_TO_HOST ? h : d, queue == HFR_TO_HOST ? d : h, width, stream);
  }
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_move(struct hfr_copier *c, void *stream, uintptr_t to, uintptr_t from, size_t bytes) {
  if (bytes && to != from) TRY_CU(c, copy_async, "cuMemcpyAsync", to, from, bytes, stream);
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- words */

/* A host function: it calls nothing of the driver. */
static void wait_word(void *arg) {
  struct host_op *op = arg;
  uint32_t now;
  while ((int32_t)((now = atomic_load_explicit(op->word, memory_order_acquire)) - op->value) < 0)
    hfr_futex_wait(op->word, now, 50000000);
  if (!op->in_graph) free(op);
}

/* Behind all host functions that the process has issued before. Within a graph the stream's own order must do: what is outside
 * of it cannot be waited for there. */
static hfreduceResult_t stand_in_line(struct hfr_copier *c, hfr_cu_stream stream, struct host_op *op) {
  if (!c->capturing && line.end && line.end != c->waited) TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", stream, line.end, 0);
  TRY_CU(c, launch_host_fn, "cuLaunchHostFunc", stream, wait_word, op);
  return hfreduceSuccess;
}

static hfreduceResult_t wait_by_host(struct hfr_copier *c, hfr_cu_stream stream, _Atomic uint32_t *word, uint32_t value) {
  struct host_op *op = malloc(sizeof *op);
  if (!op) return hfr_fail(hfreduceSystemError, "out of memory");
  *op = (struct host_op){.word = word, .value = value, .in_graph = c->capturing};
  pthread_mutex_lock(&line.lock);
  hfreduceResult_t r = stand_in_line(c, stream, op);
  if (!r && c->capturing) op->next = c->kept, c->kept = op;
  if (!r && !c->capturing) {
    int failed = c->cu->event_record(c->waited, stream);
    if (failed) r = hfr_cuda_fail("cuEventRecord", failed); /* the function is the stream's already */
    line.end = failed ? line.end : c->waited;
  } else if (r) {
    free(op);
  }
  pthread_mutex_unlock(&line.lock);
  return r;
}

hfreduceResult_t hfr_copier_write(struct hfr_copier *c, enum hfr_queue queue, const struct hfr_pinned *m, _Atomic uint32_t *word,
                                  uint32_t value) {
  HFR_TRY(take_place(c, queue));
  if (c->by_host) {
    TRY_CU(c, set_async, "cuMemsetD32Async", device_address(m, word), value, 1, stream_of(c, queue));
    return hfreduceSuccess;
  }
  TRY_CU(c, stream_write_value, "cuStreamWriteValue32", stream_of(c, queue), device_address(m, word), value,
         HFR_CU_WRITE_DEFAULT);
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_wait(struct hfr_copier *c, enum hfr_queue queue, const struct hfr_pinned *m, _Atomic uint32_t *word,
                                 uint32_t value) {
  HFR_TRY(take_place(c, queue));
  if (c->by_host) return wait_by_host(c, stream_of(c, queue), word, value);
  TRY_CU(c, stream_wait_value, "cuStreamWaitValue32", stream_of(c, queue), device_address(m, word), value,
         HFR_CU_WAIT_GEQ | c->flush);
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_clear(struct hfr_copier *c, enum hfr_queue queue, const struct hfr_pinned *m, _Atomic uint32_t *first,
                                  size_t count) {
  TRY_CU(c, set_async, "cuMemsetD32Async", device_address(m, first), 0, count, stream_of(c, queue));
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- graphs */

hfreduceResult_t hfr_copier_bell(struct hfr_copier *c, void (*ring)(void *), void *arg) {
  TRY_CU(c, stream_wait_event, "cuStreamWaitEvent", c->bell, c->begun[1], 0);
  TRY_CU(c, launch_host_fn, "cuLaunchHostFunc", c->bell, ring, arg);
  TRY_CU(c, event_record, "cuEventRecord", c->rung, c->bell);
  c->ringing = 1;
  return hfreduceSuccess;
}

hfreduceResult_t hfr_copier_keep(struct hfr_copier *c, void *graph, void (*release)(void *), void *arg) {
  hfr_cu_object object;
  int r = 0, able = c->cu->object_create && c->cu->graph_retain && c->cu->object_release;
  if (!able || (r = c->cu->object_create(&object, arg, release, 1, HFR_CU_OBJECT_NO_SYNC))) {
    release(arg);
    if (able) return hfr_cuda_fail("cuUserObjectCreate", r);
    return hfr_fail(hfreduceInvalidUsage, "CUDA driver %d.%d cannot tell when a graph is destroyed: calls cannot be captured",
                    c->cu->version / 1000, c->cu->version % 1000 / 10);
  }
  r = c->cu->graph_retain(graph, object, 1, HFR_CU_OBJECT_MOVE);
  if (!r) return hfreduceSuccess;
  c->cu->object_release(object, 1); /* calls release(arg) */
  return hfr_cuda_fail("cuGraphRetainUserObject", r);
}
