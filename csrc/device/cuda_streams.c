/* Streams of the library's own: how they are made, and those that it lends to callers. */
#include "cuda.h"

#include <pthread.h>
#include <stdlib.h>

hfreduceResult_t hfr_cuda_stream_create(const struct hfr_cu *cu, hfr_cu_stream *stream) {
  int least = 0, greatest = 0;
  if (cu->priority_range && cu->priority_range(&least, &greatest)) greatest = 0;
  int r = cu->stream_create(stream, HFR_CU_STREAM_NON_BLOCKING, greatest);
  return r ? hfr_cuda_fail("cuStreamCreateWithPriority", r) : hfreduceSuccess;
}

/* ---------------------------------------------------------------- lent streams */

/* Kept for ever: a caller's allocator may still record events in a stream that the caller has given back. */
struct lent {
  struct lent *next;
  hfr_cu_stream stream;
  void *context;
  unsigned long long id; /* of the context: a device that is reset makes a new one, at the same address; 0 before CUDA 12 */
  int used;
};
static struct {
  pthread_mutex_t lock;
  struct lent *list; /* the newest first */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* Not while it is captured: to query it then would break the capture. */
static int is_idle(const struct hfr_cu *cu, hfr_cu_stream stream) {
  int status = HFR_CU_CAPTURE_NONE;
  return !cu->stream_capturing(stream, &status) && status == HFR_CU_CAPTURE_NONE && !cu->stream_query(stream);
}

/* Within the context. */
static hfreduceResult_t take(const struct hfr_cu *cu, void *context, struct lent **out) {
  unsigned long long id = 0;
  if (cu->context_id && cu->context_id(context, &id)) id = 0;
  struct lent *l = pool.list;
  while (l && (l->used || l->context != context || l->id != id || !is_idle(cu, l->stream))) l = l->next;
  if (!l) {
    if (!(l = calloc(1, sizeof *l))) return hfr_fail(hfreduceSystemError, "out of memory for a stream");
    hfreduceResult_t r = hfr_cuda_stream_create(cu, &l->stream);
    if (r) return free(l), r;
    l->context = context;
    l->id = id;
    l->next = pool.list;
    pool.list = l;
  }
  l->used = 1;
  *out = l;
  return hfreduceSuccess;
}

hfreduceResult_t hfr_stream_get(int device, void **handle) {
  const struct hfr_cu *cu = hfr_device_present() ? hfr_cuda() : NULL;
  int mode = HFR_CU_MODE_RELAXED;
  hfr_cu_context popped;
  struct lent *lent = NULL;
  if (!cu) return hfr_fail(hfreduceInvalidUsage, "no streams: %s", hfr_device_cuda.why_absent());
  void *context = hfr_device_context(device);
  if (!context) return (hfreduceResult_t)hfr_last_error()->code;
  int r = cu->context_push(context);
  if (r) return hfr_cuda_fail("cuCtxPushCurrent", r);
  if (cu->capture_mode) cu->capture_mode(&mode); /* the thread may capture, which forbids queries by default */
  pthread_mutex_lock(&pool.lock);
  hfreduceResult_t result = take(cu, context, &lent);
  pthread_mutex_unlock(&pool.lock);
  if (cu->capture_mode) cu->capture_mode(&mode);
  cu->context_pop(&popped);
  if (!result) *handle = lent->stream;
  return result;
}

hfreduceResult_t hfr_stream_put(void *handle) {
  pthread_mutex_lock(&pool.lock);
  struct lent *l = pool.list;
  while (l && !(l->used && l->stream == handle)) l = l->next;
  if (l) l->used = 0;
  pthread_mutex_unlock(&pool.lock);
  return l ? hfreduceSuccess
           : hfr_fail(hfreduceInvalidArgument, "stream %p was not lent by the library, or was given back", handle);
}
