/* Completion queues: works that have ended, for threads that wait for whichever ends next. */
#include "engine.h"

#include "../base/status.h"
#include "../base/thread.h"

#include <stdlib.h>

struct hfreduceCompletionQueue {
  pthread_mutex_t lock;
  struct hfreduceWork *head, **tail;
  int closed;            /* under lock */
  _Atomic uint32_t bell; /* futex: moves with every work that comes */
};

/* Says in work->queue that the work has ended: who comes now queues it himself. */
static struct hfreduceCompletionQueue ended;

static void push(struct hfreduceCompletionQueue *q, struct hfreduceWork *w) {
  w->next_done = NULL;
  pthread_mutex_lock(&q->lock);
  *q->tail = w;
  q->tail = &w->next_done;
  atomic_fetch_add_explicit(&q->bell, 1, memory_order_release);
  hfr_futex_wake(&q->bell, 1); /* under the lock: the queue may be destroyed once its last token is taken */
  pthread_mutex_unlock(&q->lock);
}

void hfr_work_notify(struct hfreduceWork *w) {
  struct hfreduceCompletionQueue *q = atomic_exchange_explicit(&w->queue, &ended, memory_order_acq_rel);
  if (q) push(q, w);
}

struct hfreduceWork *hfr_work_new(uint32_t nrequests) {
  struct hfreduceWork *w = malloc(sizeof *w); /* most of it is the error's text: not cleared for each call */
  if (!w) return NULL;
  atomic_init(&w->refs, nrequests ? 2 : 1);
  atomic_init(&w->remaining, nrequests);
  atomic_init(&w->done, !nrequests);
  atomic_init(&w->sleepers, 0);
  atomic_init(&w->code, 0);
  atomic_init(&w->queue, NULL);
  atomic_init(&w->notified, 0);
  w->engine = NULL;
  return w;
}

void hfr_work_put(struct hfreduceWork *w) {
  if (atomic_fetch_sub_explicit(&w->refs, 1, memory_order_acq_rel) == 1) free(w);
}

hfreduceResult_t hfreduceCompletionQueueCreate(hfreduceCompletionQueue_t *queue) {
  if (!queue) return hfr_fail(hfreduceInvalidArgument, "hfreduceCompletionQueueCreate: queue is NULL");
  struct hfreduceCompletionQueue *q = calloc(1, sizeof *q);
  *queue = q;
  if (!q) return hfr_fail(hfreduceSystemError, "out of memory for a completion queue");
  pthread_mutex_init(&q->lock, NULL);
  q->tail = &q->head;
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceWorkNotify(hfreduceWork_t work, hfreduceCompletionQueue_t queue, uint64_t token) {
  if (!work || !queue) return hfr_fail(hfreduceInvalidArgument, "hfreduceWorkNotify: %s is NULL", work ? "queue" : "work");
  if (atomic_exchange(&work->notified, 1))
    return hfr_fail(hfreduceInvalidUsage, "hfreduceWorkNotify: this work has been given to a completion queue before");
  work->token = token;
  atomic_fetch_add(&work->refs, 1); /* the queue's, until the token is taken */
  struct hfreduceCompletionQueue *none = NULL;
  if (!atomic_compare_exchange_strong(&work->queue, &none, queue))
    push(queue, work);
  else
    hfr_drive_kick(); /* who takes the token does not drive */
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceCompletionQueuePop(hfreduceCompletionQueue_t queue, double timeout, uint64_t *token) {
  if (!queue || !token)
    return hfr_fail(hfreduceInvalidArgument, "hfreduceCompletionQueuePop: %s is NULL", queue ? "token" : "queue");
  int64_t deadline = timeout < 0 ? -1 : hfr_now_ns() + (int64_t)(timeout * 1e9);
  for (;;) {
    uint32_t bell = atomic_load_explicit(&queue->bell, memory_order_acquire);
    pthread_mutex_lock(&queue->lock);
    struct hfreduceWork *w = queue->head;
    if (w && !(queue->head = w->next_done)) queue->tail = &queue->head;
    int closed = queue->closed;
    pthread_mutex_unlock(&queue->lock);
    if (w) {
      *token = w->token;
      hfr_work_put(w);
      return hfreduceSuccess;
    }
    if (closed) return hfreduceAborted;
    int64_t left = deadline < 0 ? -1 : deadline - hfr_now_ns();
    if (deadline >= 0 && left <= 0) return hfreduceInProgress;
    hfr_futex_wait(&queue->bell, bell, left);
  }
}

hfreduceResult_t hfreduceCompletionQueueClose(hfreduceCompletionQueue_t queue) {
  if (!queue) return hfr_fail(hfreduceInvalidArgument, "hfreduceCompletionQueueClose: queue is NULL");
  pthread_mutex_lock(&queue->lock);
  queue->closed = 1;
  atomic_fetch_add_explicit(&queue->bell, 1, memory_order_release);
  hfr_futex_wake(&queue->bell, INT32_MAX);
  pthread_mutex_unlock(&queue->lock);
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceCompletionQueueDestroy(hfreduceCompletionQueue_t queue) {
  if (!queue) return hfreduceSuccess;
  while (queue->head) {
    struct hfreduceWork *w = queue->head;
    queue->head = w->next_done;
    hfr_work_put(w);
  }
  pthread_mutex_destroy(&queue->lock);
  free(queue);
  return hfreduceSuccess;
}
