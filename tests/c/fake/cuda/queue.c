/* The stand-in's streams and events. */
#include "driver.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---------------------------------------------------------------- what operations do */

static int reached(uint32_t now, uint32_t value) { return (int32_t)(now - value) >= 0; }

static _Atomic uint32_t *word_at(uintptr_t address, const char *what) {
  LOCK();
  struct fake_block *b = fake_block_of(address);
  if (!b || b->kind == FAKE_MANAGED || address % 4)
    fake_die("%s: %#zx is no address of a word on the device", what, (size_t)address);
  if (b->kind == FAKE_REGISTERED && address < b->device)
    fake_die("%s: %#zx is the host's address of registered memory", what, (size_t)address);
  _Atomic uint32_t *word = (_Atomic uint32_t *)fake_bytes(address, 4, what);
  UNLOCK();
  return word;
}

static void copy(const struct fake_op *op) {
  for (size_t i = 0; i < op->rows; i++) {
    LOCK();
    uint8_t *to = fake_bytes(op->to + i * op->to_pitch, op->width, "copy to");
    const uint8_t *from = fake_bytes(op->from + i * op->from_pitch, op->width, "copy from");
    fake.copies++;
    UNLOCK();
    memmove(to, from, op->width);
  }
}

static void set(const struct fake_op *op) {
  LOCK();
  uint8_t *to = fake_bytes(op->to, op->width * (size_t)op->size, "memset");
  UNLOCK();
  /* A few words may be flags that the host looks at. Not all: ThreadSanitizer keeps a clock for every word that was released,
   * and data of a few MiB would cost it GiB, until the system kills a rank. */
  int flags = op->width <= 4096 && (uintptr_t)to % 4 == 0;
  if (op->size == 1)
    memset(to, (int)op->value, op->width);
  else
    for (size_t i = 0; i < op->width; i++)
      if (flags)
        atomic_store_explicit((_Atomic uint32_t *)(to + 4 * i), op->value, memory_order_release);
      else
        memcpy(to + 4 * i, &op->value, 4);
}

/* Host functions run one after the other in a thread of the driver, whatever stream or graph they come from. */
static pthread_mutex_t one_host_function = PTHREAD_MUTEX_INITIALIZER;

void fake_execute(const struct fake_op *op) {
  fake_delay();
  switch (op->what) {
    case FAKE_COPY: copy(op); break;
    case FAKE_SET: set(op); break;
    case FAKE_WRITE: atomic_store_explicit(word_at(op->to, "cuStreamWriteValue32"), op->value, memory_order_release); break;
    case FAKE_WAIT: {
      _Atomic uint32_t *word = word_at(op->to, "cuStreamWaitValue32");
      LOCK();
      fake.waits++;
      UNLOCK();
      for (int i = 0; !reached(atomic_load_explicit(word, memory_order_acquire), op->value); i++) {
        struct timespec t = {0, i < 50 ? 10000 : 200000};
        nanosleep(&t, NULL);
      }
      LOCK();
      fake.waits--;
      pthread_cond_broadcast(&fake.moved);
      if (op->size) fake_arrive();
      UNLOCK();
      break;
    }
    case FAKE_HOST:
      pthread_mutex_lock(&one_host_function);
      fake_in_host_function = 1;
      op->function(op->arg);
      fake_in_host_function = 0;
      pthread_mutex_unlock(&one_host_function);
      break;
    case FAKE_GRAPH: fake_run_graph(op->exec); break;
    case FAKE_KERNEL: fake_run_kernel(op->launch); break;
    default: break;
  }
}

/* ---------------------------------------------------------------- queues */

void fake_await(struct CUstream_st *s, uint64_t count) {
  while (s->completed < count) pthread_cond_wait(&fake.moved, &fake.lock);
}

static void *run(void *arg) {
  struct fake_queue *q = arg;
  LOCK();
  for (;;) {
    while (!q->head) pthread_cond_wait(&fake.moved, &fake.lock);
    struct fake_op *op = q->head;
    for (int i = 0; i < op->nafter; i++) fake_await(op->after[i].stream, op->after[i].count);
    UNLOCK();
    fake_execute(op);
    LOCK();
    q->head = op->next;
    if (!q->head) q->tail = &q->head;
    op->stream->completed++;
    free(op->after);
    free(op);
    pthread_cond_broadcast(&fake.moved);
  }
  return NULL;
}

static void start(struct fake_queue *q) {
  pthread_t thread;
  if (q->started++) return;
  q->tail = &q->head;
  if (pthread_create(&thread, NULL, run, q)) fake_die("no thread for a stream");
  pthread_detach(thread);
}

static void follow(struct fake_op *op, struct CUstream_st *s, uint64_t count) {
  if (s->completed >= count) return;
  op->after = realloc(op->after, (size_t)(op->nafter + 1) * sizeof *op->after);
  op->after[op->nafter++] = (struct fake_after){s, count};
}

hfr_cu_result fake_put(struct CUstream_st *s, struct fake_op wanted) {
  if (s->capture) return fake_record(s, &wanted);
  struct fake_op *op = malloc(sizeof *op);
  *op = wanted;
  op->stream = s;
  op->next = NULL;
  struct CUstream_st *legacy = s->context->legacy;
  if (s == legacy) { /* the legacy stream comes after all blocking streams, and they after it */
    for (struct CUstream_st *other = fake.streams; other; other = other->next)
      if (other != s && other->context == s->context && !(other->flags & HFR_CU_STREAM_NON_BLOCKING))
        follow(op, other, other->submitted);
  } else if (legacy && !(s->flags & HFR_CU_STREAM_NON_BLOCKING)) {
    follow(op, legacy, legacy->submitted);
  }
  s->submitted++;
  start(s->queue);
  *s->queue->tail = op;
  s->queue->tail = &op->next;
  pthread_cond_broadcast(&fake.moved);
  if (fake.depth && s->submitted > (uint64_t)fake.depth) fake_await(s, s->submitted - (uint64_t)fake.depth);
  if (fake.blocking && wanted.what == FAKE_KERNEL) fake_await(s, s->submitted);
  return HFR_CU_SUCCESS;
}

/* ---------------------------------------------------------------- streams */

static struct CUstream_st *new_stream(struct CUctx_st *context, unsigned flags) {
  struct CUstream_st *s = calloc(1, sizeof *s);
  s->context = context;
  s->flags = flags;
  struct fake_queue *shared = fake.shared[context->device];
  s->queue = fake.one_queue ? shared : fake.queues ? &shared[fake.made[context->device]++ % (unsigned)fake.queues] : &s->own;
  s->next = fake.streams;
  fake.streams = s;
  return s;
}

struct CUstream_st *fake_stream(hfr_cu_stream handle) {
  static _Thread_local struct {
    struct CUctx_st *context;
    struct CUstream_st *stream;
  } mine[FAKE_DEVICES_MAX];
  if (handle && handle != HFR_CU_LEGACY && handle != HFR_CU_PER_THREAD) {
    struct CUstream_st *s = fake.streams;
    while (s && s != handle) s = s->next;
    if (!s) fake_die("%p is no stream", (void *)handle);
    if (fake.stale_crash && (s->destroyed || s->context->destroyed)) fake_die("%p is a stream no more", (void *)handle);
    return s;
  }
  struct CUctx_st *c = fake_current();
  if (!c) return NULL;
  if (handle == HFR_CU_PER_THREAD) {
    int i = 0;
    while (mine[i].context && mine[i].context != c && i < FAKE_DEVICES_MAX - 1) i++;
    if (mine[i].context != c) mine[i].context = c, mine[i].stream = new_stream(c, 0);
    return mine[i].stream;
  }
  if (!c->legacy) c->legacy = new_stream(c, 0);
  return c->legacy;
}

/* A stream that operations may be put into; ends the process if it was destroyed. */
static struct CUstream_st *usable(hfr_cu_stream handle, const char *call) {
  struct CUstream_st *s = fake_stream(handle);
  if (s && s->destroyed) fake_die("%s: the stream was destroyed", call);
  if (s && s->context->destroyed) return NULL;
  return s;
}

#define GREATEST_PRIORITY (-5) /* smaller numbers come first */

EXPORT hfr_cu_result cuStreamCreateWithPriority(hfr_cu_stream *stream, unsigned flags, int priority) {
  ENTER_BLOCKING("cuStreamCreateWithPriority");
  if (!fake_current()) return HFR_CU_INVALID_CONTEXT;
  LOCK();
  *stream = new_stream(fake_current(), flags);
  (*stream)->priority = priority > 0 ? 0 : priority < GREATEST_PRIORITY ? GREATEST_PRIORITY : priority;
  UNLOCK();
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  ENTER("cuCtxGetStreamPriorityRange");
  *least = 0;
  *greatest = GREATEST_PRIORITY;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuStreamGetPriority(hfr_cu_stream stream, int *priority) {
  ENTER("cuStreamGetPriority");
  LOCK();
  struct CUstream_st *s = usable(stream, "cuStreamGetPriority");
  if (s) *priority = s->priority;
  UNLOCK();
  return s ? HFR_CU_SUCCESS : HFR_CU_INVALID_CONTEXT;
}
EXPORT hfr_cu_result cuStreamCreate(hfr_cu_stream *stream, unsigned flags) {
  return cuStreamCreateWithPriority(stream, flags, 0);
}

EXPORT hfr_cu_result cuStreamDestroy_v2(hfr_cu_stream stream) {
  ENTER_BLOCKING("cuStreamDestroy");
  LOCK();
  usable(stream, "cuStreamDestroy")->destroyed = 1; /* what it holds still runs */
  UNLOCK();
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuStreamQuery(hfr_cu_stream stream) {
  ENTER("cuStreamQuery");
  hfr_cu_result r = fake_unsafe();
  if (r) return r;
  LOCK();
  struct CUstream_st *s = usable(stream, "cuStreamQuery");
  r = !s ? HFR_CU_INVALID_CONTEXT : s->completed < s->submitted ? HFR_CU_NOT_READY : HFR_CU_SUCCESS;
  UNLOCK();
  return r;
}

EXPORT hfr_cu_result cuStreamSynchronize(hfr_cu_stream stream) {
  ENTER("cuStreamSynchronize");
  hfr_cu_result r = fake_unsafe();
  if (r) return r;
  LOCK();
  struct CUstream_st *s = usable(stream, "cuStreamSynchronize");
  if (s) fake_await(s, s->submitted);
  UNLOCK();
  return s ? HFR_CU_SUCCESS : HFR_CU_INVALID_CONTEXT;
}

EXPORT hfr_cu_result cuCtxSynchronize(void) {
  ENTER("cuCtxSynchronize");
  LOCK();
  for (struct CUstream_st *s = fake.streams; s; s = s->next)
    if (s->context == fake_current()) fake_await(s, s->submitted);
  UNLOCK();
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuStreamGetCtx(hfr_cu_stream stream, hfr_cu_context *context) {
  ENTER("cuStreamGetCtx");
  LOCK();
  struct CUstream_st *s = fake_stream(stream);
  hfr_cu_result r = !s                      ? HFR_CU_INVALID_CONTEXT
                    : s->destroyed          ? HFR_CU_INVALID_HANDLE
                    : s->context->destroyed ? HFR_CU_CONTEXT_IS_DESTROYED
                                            : 0;
  if (!r) *context = s->context;
  UNLOCK();
  return r;
}

/* ---------------------------------------------------------------- events */

EXPORT hfr_cu_result cuEventCreate(hfr_cu_event *event, unsigned flags) {
  ENTER_BLOCKING("cuEventCreate");
  (void)flags;
  *event = calloc(1, sizeof **event);
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuEventDestroy_v2(hfr_cu_event event) {
  ENTER_BLOCKING("cuEventDestroy");
  LOCK();
  free(event->node);
  free(event);
  UNLOCK();
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuEventRecord(hfr_cu_event event, hfr_cu_stream stream) {
  ENTER("cuEventRecord");
  LOCK();
  struct CUstream_st *s = usable(stream, "cuEventRecord");
  hfr_cu_result r = s ? HFR_CU_SUCCESS : HFR_CU_INVALID_CONTEXT;
  if (s && s->capture) {
    fake_mark(s, event);
  } else if (s) {
    r = fake_put(s, (struct fake_op){.what = FAKE_NOP}); /* so that the legacy stream's rules hold for events too */
    event->at = (struct fake_after){s, s->submitted};
    event->capture = NULL;
  }
  if (!r) event->recorded = 1;
  UNLOCK();
  return r;
}

EXPORT hfr_cu_result cuEventQuery(hfr_cu_event event) {
  ENTER("cuEventQuery");
  LOCK();
  int over = !event->recorded || event->at.stream->completed >= event->at.count;
  UNLOCK();
  return over ? HFR_CU_SUCCESS : HFR_CU_NOT_READY;
}

EXPORT hfr_cu_result cuStreamWaitEvent(hfr_cu_stream stream, hfr_cu_event event, unsigned flags) {
  ENTER("cuStreamWaitEvent");
  (void)flags;
  LOCK();
  struct CUstream_st *s = usable(stream, "cuStreamWaitEvent");
  hfr_cu_result r = !s ? HFR_CU_INVALID_CONTEXT : HFR_CU_SUCCESS;
  if (s && event->recorded && event->capture) {
    r = fake_join(s, event);
  } else if (s && event->recorded && s->capture) {
    s->capture->broken = 1;
    r = HFR_CU_CAPTURE_ISOLATION;
  } else if (s && event->recorded) {
    struct fake_op op = {.what = FAKE_NOP};
    follow(&op, event->at.stream, event->at.count);
    r = fake_put(s, op);
  }
  UNLOCK();
  return r;
}

/* ---------------------------------------------------------------- operations */

static hfr_cu_result put(hfr_cu_stream stream, const char *call, struct fake_op op) {
  LOCK();
  struct CUstream_st *s = usable(stream, call);
  hfr_cu_result r = s ? fake_put(s, op) : HFR_CU_INVALID_CONTEXT;
  UNLOCK();
  return r;
}

/* Host memory that is not pinned is copied before the call returns, and so is host memory to host memory. */
static hfr_cu_result put_copy(hfr_cu_stream stream, const char *call, struct fake_op op) {
  LOCK();
  for (size_t i = 0; i<op.rows; i += op.rows> 1 ? op.rows - 1 : 1) {
    fake_bytes(op.to + i * op.to_pitch, op.width, call);
    fake_bytes(op.from + i * op.from_pitch, op.width, call);
  }
  struct fake_block *to = fake_block_of(op.to), *from = fake_block_of(op.from);
  int at_once = !to || !from || (to->kind >= FAKE_PINNED && from->kind >= FAKE_PINNED);
  struct CUstream_st *s = usable(stream, call);
  hfr_cu_result r = s ? fake_put(s, op) : HFR_CU_INVALID_CONTEXT;
  if (!r && at_once && !s->capture) fake_await(s, s->submitted);
  UNLOCK();
  return r;
}

EXPORT hfr_cu_result cuMemcpyAsync(hfr_cu_ptr to, hfr_cu_ptr from, size_t bytes, hfr_cu_stream stream) {
  ENTER("cuMemcpyAsync");
  return put_copy(stream, "cuMemcpyAsync",
                  (struct fake_op){.what = FAKE_COPY, .to = to, .from = from, .width = bytes, .rows = 1});
}

EXPORT hfr_cu_result cuMemcpy2DAsync_v2(const struct hfr_cu_copy2d *c, hfr_cu_stream stream) {
  ENTER("cuMemcpy2DAsync");
  struct fake_op op = {
      .what = FAKE_COPY, .to_pitch = c->dst_pitch, .from_pitch = c->src_pitch, .width = c->width, .rows = c->height};
  if (c->dst_pitch < c->width || c->src_pitch < c->width) return HFR_CU_INVALID_VALUE;
  op.to = (c->dst_type == HFR_CU_MEMORY_HOST ? (uintptr_t)c->dst_host : c->dst_device) + c->dst_y * c->dst_pitch + c->dst_x;
  op.from = (c->src_type == HFR_CU_MEMORY_HOST ? (uintptr_t)c->src_host : c->src_device) + c->src_y * c->src_pitch + c->src_x;
  return put_copy(stream, "cuMemcpy2DAsync", op);
}

EXPORT hfr_cu_result cuMemcpy(hfr_cu_ptr to, hfr_cu_ptr from, size_t bytes) {
  ENTER("cuMemcpy");
  hfr_cu_result r = fake_unsafe();
  if (r) return r;
  r = put_copy(NULL, "cuMemcpy", (struct fake_op){.what = FAKE_COPY, .to = to, .from = from, .width = bytes, .rows = 1});
  return r ? r : cuStreamSynchronize(NULL);
}

static hfr_cu_result put_set(const char *call, hfr_cu_ptr to, uint32_t value, size_t count, int size, hfr_cu_stream stream) {
  ENTER(call);
  LOCK();
  fake_bytes(to, count * (size_t)size, call);
  UNLOCK();
  return put(stream, call, (struct fake_op){.what = FAKE_SET, .to = to, .value = value, .width = count, .size = size});
}
EXPORT hfr_cu_result cuMemsetD32Async(hfr_cu_ptr to, unsigned value, size_t count, hfr_cu_stream stream) {
  if (to % 4) return HFR_CU_INVALID_VALUE;
  return put_set("cuMemsetD32Async", to, value, count, 4, stream);
}
EXPORT hfr_cu_result cuMemsetD8Async(hfr_cu_ptr to, unsigned char value, size_t count, hfr_cu_stream stream) {
  return put_set("cuMemsetD8Async", to, value, count, 1, stream);
}

EXPORT hfr_cu_result cuStreamWriteValue32_v2(hfr_cu_stream stream, hfr_cu_ptr word, uint32_t value, unsigned flags) {
  ENTER("cuStreamWriteValue32");
  if (!fake.mem_ops || flags) return HFR_CU_NOT_SUPPORTED;
  return put(stream, "cuStreamWriteValue32", (struct fake_op){.what = FAKE_WRITE, .to = word, .value = value});
}
EXPORT hfr_cu_result cuStreamWaitValue32_v2(hfr_cu_stream stream, hfr_cu_ptr word, uint32_t value, unsigned flags) {
  ENTER("cuStreamWaitValue32");
  int flushes = flags == HFR_CU_WAIT_FLUSH;
  if (!fake.mem_ops || (flags && !flushes) || (flushes && !fake.flush)) return HFR_CU_NOT_SUPPORTED;
  return put(stream, "cuStreamWaitValue32", (struct fake_op){.what = FAKE_WAIT, .to = word, .value = value, .size = flushes});
}
EXPORT hfr_cu_result cuLaunchHostFunc(hfr_cu_stream stream, hfr_cu_host_fn function, void *arg) {
  ENTER("cuLaunchHostFunc");
  return put(stream, "cuLaunchHostFunc", (struct fake_op){.what = FAKE_HOST, .function = function, .arg = arg});
}
