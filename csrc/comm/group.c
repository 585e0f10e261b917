/* Issuing: single calls, and groups of calls that launch together. Groups are a thread's own. */
#include "comm.h"

#include "../base/thread.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct grouped {
  struct hfreduceComm *comm;
  struct hfr_call call;
};

static _Thread_local struct {
  int depth, n, cap;
  struct grouped *list;
  hfreduceResult_t error; /* the first of a call in the group: End returns it */
  hfreduceErrorInfo_t info;
} group;

/* Uneven counts live in the caller's arrays: keep our own. One block: sendcounts, senddispls, recvcounts, recvdispls. */
static size_t *copy_counts(struct hfr_call *call, int nranks) {
  size_t n = (size_t)nranks, *block = malloc(4 * n * sizeof *block);
  const size_t **from[4] = {&call->sendcounts, &call->senddispls, &call->recvcounts, &call->recvdispls};
  for (int i = 0; block && i < 4; i++) {
    memcpy(block + (size_t)i * n, *from[i], n * sizeof *block);
    *from[i] = block + (size_t)i * n;
  }
  return block;
}

static hfreduceResult_t plan_request(struct hfreduceComm *c, const struct hfr_call *call, struct hfr_request **out) {
  struct hfr_engine *e = &c->engine;
  struct hfr_request *r = hfr_request_get(e);
  if (!r) return hfr_fail(hfreduceSystemError, "out of memory for a request");
  struct hfr_call mine = *call;
  hfreduceResult_t result = hfreduceSuccess;
  if (mine.sendcounts && !(r->counts = copy_counts(&mine, c->nranks)))
    result = hfr_fail(hfreduceSystemError, "out of memory for counts");
  if (!result && mine.coll == HFR_ALL_TO_ALL && mine.send == mine.recv && mine.count && !mine.sendcounts) {
    size_t bytes = mine.count * (size_t)c->nranks * hfr_dtype_size(mine.dtype);
    r->temp = malloc(bytes);
    if (r->temp)
      mine.send = memcpy(r->temp, mine.send, bytes);
    else
      result =
          hfr_fail(hfreduceSystemError, "out of memory for %zu bytes: all_to_all in place needs a copy of its buffer", bytes);
  }
  if (!result) result = hfr_plan_build(&r->plan, &c->layout, &e->geometry, &mine);
  if (result) {
    hfr_request_put(e, r);
    return result;
  }
  r->fp = (struct hfr_fingerprint){.count = mine.count,
                                   .root = mine.coll == HFR_P2P ? mine.tag : mine.root,
                                   .coll = (uint8_t)mine.coll,
                                   .op = (uint8_t)(mine.premul ? 5 : mine.op),
                                   .dtype = (uint8_t)mine.dtype};
  r->timeout_ns = e->timeout_ns;
  *out = r;
  return hfreduceSuccess;
}

/* Launch n calls as one work. */
static hfreduceResult_t launch(struct grouped *g, int n, struct hfreduceWork **out) {
  struct hfreduceWork *w = hfr_work_new((uint32_t)n);
  struct hfr_request *first = NULL, **tail = &first;
  hfreduceResult_t result = w ? hfreduceSuccess : hfr_fail(hfreduceSystemError, "out of memory for a work handle");
  for (int i = 0; !result && i < n; i++, tail = *tail ? &(*tail)->next : tail) {
    result = plan_request(g[i].comm, &g[i].call, tail);
    if (!result) (*tail)->next = NULL, (*tail)->work = w;
  }
  if (result) { /* nothing has started: all or none */
    for (struct hfr_request *next; first; first = next, g++) {
      next = first->next;
      hfr_request_put(&g->comm->engine, first);
    }
    free(w);
    return result;
  }
  int one = n > 0;
  for (int i = 1; i < n; i++) one &= g[i].comm == g[0].comm;
  w->engine = one ? &g[0].comm->engine : NULL;
  for (struct hfr_request *next; first; first = next, g++) {
    next = first->next;
    hfr_engine_submit(&g->comm->engine, first);
  }
  *out = w;
  return hfreduceSuccess;
}

static hfreduceResult_t outcome(struct hfreduceWork *w) {
  int code = atomic_load(&w->code);
  if (code) *hfr_last_error() = w->info;
  return (hfreduceResult_t)code;
}

/* The result of a work that has ended. Gives it back. */
static hfreduceResult_t conclude(struct hfreduceWork *w) {
  hfreduceResult_t r = outcome(w);
  hfr_work_put(w);
  return r;
}

static hfreduceResult_t run_blocking(struct grouped *g, int n) {
  struct hfreduceWork *w;
  HFR_TRY(launch(g, n, &w));
  if (w->engine) {
    hfr_drive_until(w->engine, w, -1);
  } else {
    for (int i = 0; i < n; i++) hfr_drive_async(&g[i].comm->engine);
    hfr_work_wait(w, -1);
  }
  return conclude(w);
}

/* What a blocking call of this thread lost patience with, until it is taken. */
static _Thread_local struct hfreduceWork *pending;

static hfreduceResult_t leave_pending(struct hfreduceWork *w) {
  if (pending) hfr_work_put(pending);
  pending = w;
  return hfreduceInProgress;
}

static hfreduceResult_t run_patiently(struct hfreduceComm *c, const struct hfr_call *call) {
  struct grouped one = {c, *call};
  struct hfreduceWork *w;
  if (!c->engine.patience_ns) return run_blocking(&one, 1);
  HFR_TRY(launch(&one, 1, &w));
  if (hfr_drive_until(&c->engine, w, hfr_now_ns() + c->engine.patience_ns)) return conclude(w);
  return leave_pending(w);
}

/* What the short way began goes on as a request. The short way drives the engine. */
static hfreduceResult_t adopt(struct hfreduceComm *c, const struct hfr_call *call, int copied) {
  struct hfr_request *r = NULL;
  struct hfreduceWork *w = hfr_work_new(1);
  hfreduceResult_t result = w ? plan_request(c, call, &r) : hfr_fail(hfreduceSystemError, "out of memory for a work handle");
  if (result) { /* the others count on this rank */
    hfr_engine_fail(&c->engine, hfr_last_error());
    free(w);
  } else {
    w->engine = &c->engine;
    r->work = w;
    hfr_engine_adopt(&c->engine, r, copied);
    result = leave_pending(w);
  }
  hfr_drive_end(&c->engine);
  return result;
}

hfreduceResult_t hfr_issue(struct hfreduceComm *c, const struct hfr_call *call) {
  if (!group.depth) {
    hfreduceResult_t r;
    enum hfr_oneshot how = call->coll == HFR_ALL_REDUCE ? hfr_oneshot_all_reduce(&c->engine, call, &r) : HFR_ONESHOT_NO;
    if (how == HFR_ONESHOT_DONE) return r;
    return how == HFR_ONESHOT_NO ? run_patiently(c, call) : adopt(c, call, how == HFR_ONESHOT_COPIED);
  }
  if (group.n == group.cap) {
    int cap = group.cap ? 2 * group.cap : 16;
    struct grouped *grown = realloc(group.list, (size_t)cap * sizeof *grown);
    if (!grown) return hfr_fail(hfreduceSystemError, "out of memory for a group of %d calls", cap);
    group.list = grown;
    group.cap = cap;
  }
  group.list[group.n++] = (struct grouped){c, *call};
  return hfreduceSuccess;
}

/* A call in an open group was wrong: the group's End will say so. */
hfreduceResult_t hfr_group_latch(hfreduceResult_t result);
hfreduceResult_t hfr_group_latch(hfreduceResult_t result) {
  if (result && group.depth && !group.error) {
    group.error = result;
    group.info = *hfr_last_error();
  }
  return result;
}

hfreduceResult_t hfreduceGroupStart(void) {
  group.depth++;
  return hfreduceSuccess;
}

/* Close one level. 1: it was the outermost, the *n calls of *list are to be launched, or *result says why not. The list is the
   caller's to free: a thread may end after any group. */
static int close_level(struct grouped **list, int *n, hfreduceResult_t *result) {
  *result = hfreduceSuccess;
  if (!group.depth) {
    *result = hfr_fail(hfreduceInvalidUsage, "hfreduceGroupEnd without hfreduceGroupStart on this thread");
    return 1;
  }
  if (--group.depth) return 0;
  *list = group.list;
  *n = group.n;
  group.list = NULL;
  group.n = group.cap = 0;
  if (group.error) {
    *result = group.error;
    *hfr_last_error() = group.info;
    group.error = hfreduceSuccess;
  }
  return 1;
}

hfreduceResult_t hfreduceGroupEnd(void) {
  int n = 0;
  struct grouped *list = NULL;
  hfreduceResult_t r;
  if (!close_level(&list, &n, &r)) return r;
  if (!r && n) r = run_blocking(list, n);
  free(list);
  return r;
}

hfreduceResult_t hfreduceGroupCancel(hfreduceResult_t result) {
  if (!group.depth) return hfr_fail(hfreduceInvalidUsage, "hfreduceGroupCancel outside a group of this thread");
  if (!result) return hfr_fail(hfreduceInvalidArgument, "hfreduceGroupCancel: result is hfreduceSuccess; give an error");
  hfr_group_latch(result);
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceGroupEndAsync(hfreduceWork_t *work) {
  int n = 0;
  struct grouped *list = NULL;
  hfreduceResult_t r;
  if (!work) return hfr_fail(hfreduceInvalidArgument, "hfreduceGroupEndAsync: work is NULL");
  *work = NULL;
  if (!close_level(&list, &n, &r))
    return hfr_fail(hfreduceInvalidUsage,
                    "hfreduceGroupEndAsync inside another group: only the outermost end can be asynchronous");
  if (!r) r = launch(list, n, work);
  for (int i = 0; !r && i < n; i++)
    if (!i || list[i].comm != list[i - 1].comm) hfr_drive_async(&list[i].comm->engine);
  free(list);
  return r;
}

hfreduceResult_t hfreduceWorkWait(hfreduceWork_t work, double timeout) {
  if (!work) return hfr_fail(hfreduceInvalidArgument, "hfreduceWorkWait: work is NULL");
  int64_t deadline = timeout < 0 ? -1 : hfr_now_ns() + (int64_t)(timeout * 1e9);
  if (!(timeout == 0 ? hfr_work_wait(work, deadline) : hfr_work_drive(work, deadline))) return hfreduceInProgress;
  return outcome(work);
}

hfreduceResult_t hfreduceTakeWork(hfreduceWork_t *work) {
  if (!work) return hfr_fail(hfreduceInvalidArgument, "hfreduceTakeWork: work is NULL");
  *work = pending;
  if (!pending)
    return hfr_fail(hfreduceInvalidUsage, "hfreduceTakeWork: no blocking call of this thread returned hfreduceInProgress");
  pending = NULL;
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceWorkTest(hfreduceWork_t work, int *done) {
  if (!work || !done) return hfr_fail(hfreduceInvalidArgument, "hfreduceWorkTest: %s is NULL", work ? "done" : "work");
  *done = (int)atomic_load_explicit(&work->done, memory_order_acquire);
  return *done ? outcome(work) : hfreduceSuccess;
}

hfreduceResult_t hfreduceWorkErrorInfo(hfreduceWork_t work, hfreduceErrorInfo_t *info) {
  if (!work || !info) return hfr_fail(hfreduceInvalidArgument, "hfreduceWorkErrorInfo: %s is NULL", work ? "info" : "work");
  hfr_error_clear(info);
  if (atomic_load_explicit(&work->done, memory_order_acquire) && atomic_load(&work->code)) *info = work->info;
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceWorkDestroy(hfreduceWork_t work) {
  if (work) hfr_work_put(work);
  return hfreduceSuccess;
}
