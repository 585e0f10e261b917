/* Issuing: single calls, and groups of calls that launch together. Groups are a thread's own. */
#include "pairs.h"
#include "staging.h"

#include "../base/thread.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* all_reduce over pairs of devices is four requests, in this order. */
enum part { ALL_OF_IT, AGREE, EXCHANGE_OUT, EXCHANGE_BACK, HALF };

struct grouped {
  struct hfreduceComm *comm;
  uint32_t age;           /* the communicator's, when the call was put into a group */
  int first, coll, enter; /* find_comms() */
  int64_t limit_ns;       /* its deadline; 0: the communicator's */
  struct hfr_call call;
  struct hfr_ordered ordered; /* by a stream */
  enum part part;
  const struct grouped *of; /* the call that it is a part of */
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

/* all_to_all in place sends from a copy. One that a stream orders is made when its turn comes; in segments none is needed. */
static hfreduceResult_t copy_in_place(struct hfr_request *r, struct hfr_call *call, const struct hfr_ordered *o, int nranks) {
  size_t bytes = call->count * (size_t)nranks * hfr_dtype_size(call->dtype);
  if (o && o->staged[0]) return hfreduceSuccess;
  r->temp = malloc(bytes);
  if (!r->temp)
    return hfr_fail(hfreduceSystemError, "out of memory for %zu bytes: all_to_all in place needs a copy of its buffer", bytes);
  if (o && o->on) {
    r->temp_from = call->send;
    r->temp_bytes = bytes;
  } else {
    memcpy(r->temp, call->send, bytes);
  }
  call->send = r->temp;
  return hfreduceSuccess;
}

/* o: NULL or how a stream orders it. */
static hfreduceResult_t plan_request(struct hfreduceComm *c, const struct hfr_call *call, const struct hfr_ordered *o,
                                     struct hfr_request **out) {
  struct hfr_engine *e = &c->engine;
  struct hfr_request *r = hfr_request_get(e);
  if (!r) return hfr_fail(hfreduceSystemError, "out of memory for a request");
  struct hfr_call mine = *call;
  hfreduceResult_t result = hfreduceSuccess;
  mine.windowed = o && (o->staged[0] || o->staged[1]);
  if (mine.sendcounts && !(r->counts = copy_counts(&mine, c->nranks)))
    result = hfr_fail(hfreduceSystemError, "out of memory for counts");
  if (!result && hfr_swaps_in_place(&mine)) result = copy_in_place(r, &mine, o, c->nranks);
  if (!result) result = hfr_plan_build(&r->plan, &c->layout, &e->geometry, &mine);
  if (result) {
    hfr_request_put(e, r);
    return result;
  }
  r->fp = hfr_call_fingerprint(&mine);
  r->timeout_ns = e->timeout_ns;
  *out = r;
  return hfreduceSuccess;
}

/* The request of a part; *out stays NULL where none is needed. */
static hfreduceResult_t plan_part(const struct grouped *g, struct hfr_request **out) {
  struct hfr_engine *e = &g->comm->engine;
  if (g->part == ALL_OF_IT) return plan_request(g->comm, &g->call, g->ordered.on ? &g->ordered : NULL, out);
  if (g->part == HALF) return g->comm->nranks > 1 ? plan_request(g->comm, &g->call, &g->ordered, out) : hfreduceSuccess;
  if (g->part == AGREE) {
    HFR_TRY(plan_request(g->comm, &g->call, &g->ordered, out)); /* of no data, but with the whole call's fingerprint */
  } else {
    *out = hfr_request_get(e);
    if (!*out) return hfr_fail(hfreduceSystemError, "out of memory for a request");
    (*out)->plan.layout = &g->comm->layout;
    (*out)->plan.call = g->call;
    (*out)->timeout_ns = e->timeout_ns;
  }
  (*out)->fp = hfr_call_fingerprint(&g->of->call);
  (*out)->fp.way = 1;
  (*out)->partial = g->part != EXCHANGE_BACK; /* which ends last */
  (*out)->fp.seq = atomic_load(&g->comm->pairs)->calls;
  return hfreduceSuccess;
}

/* Launch n calls on host memory, which no stream orders, as one work. */
static hfreduceResult_t launch_host(struct grouped *g, int n, struct hfreduceWork **out) {
  struct hfreduceWork *w = hfr_work_new((uint32_t)n);
  struct hfr_request *first = NULL, **tail = &first;
  hfreduceResult_t result = w ? hfreduceSuccess : hfr_fail(hfreduceSystemError, "out of memory for a work handle");
  for (int i = 0; !result && i < n; i++, tail = *tail ? &(*tail)->next : tail) {
    result = plan_request(g[i].comm, &g[i].call, NULL, tail);
    if (!result) (*tail)->next = NULL, (*tail)->work = w;
    if (!result && g[i].limit_ns) (*tail)->timeout_ns = g[i].limit_ns;
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

/* ---------------------------------------------------------------- launching */

/* What the half of a call is to its pair; its requests come one after the other. */
static struct hfr_paired pair_of(const struct grouped *g, struct hfr_request **r) {
  return (struct hfr_paired){.pairs = atomic_load(&g->of->comm->pairs),
                             .whole = g->of->comm,
                             .call = &g->of->call,
                             .exchange = {r[-2], r[-1]},
                             .half = g->call.count * hfr_dtype_size(g->call.dtype)};
}

/* Plan the calls; those that a stream orders get their windows. On failure nothing is left of it. */
static hfreduceResult_t prepare(struct grouped *g, int n, struct hfr_request **r, struct hfr_ordered_call *ordered,
                                struct hfr_streams **streams) {
  hfreduceResult_t result = hfreduceSuccess;
  int by_stream = 0;
  for (int i = 0; !result && i < n; i++) {
    int copy = g[i].part == ALL_OF_IT && hfr_stream_is_copy(g[i].comm, &g[i].call, &g[i].ordered);
    if (!copy) result = plan_part(&g[i], &r[i]);
    if (!result && g[i].ordered.on && g[i].part != EXCHANGE_OUT && g[i].part != EXCHANGE_BACK)
      ordered[by_stream++] =
          (struct hfr_ordered_call){.comm = g[i].comm,
                                    .call = &g[i].call,
                                    .ordered = &g[i].ordered,
                                    .request = r[i],
                                    .pair = g[i].part == HALF ? pair_of(&g[i], &r[i]) : (struct hfr_paired){0}};
    if (!result && i && g[i].ordered.on != g[0].ordered.on && (g[i].ordered.stream.capture || g[0].ordered.stream.capture))
      result =
          hfr_fail(hfreduceInvalidUsage,
                   "hfreduceGroupEnd: a stream of the group is captured, but another call is on host memory without a stream, "
                   "which would run at once; take it out of the group");
  }
  if (!result && by_stream) result = hfr_streams_prepare(ordered, by_stream, streams);
  for (int i = 0; result && i < n; i++)
    if (r[i]) hfr_request_put(&g[i].comm->engine, r[i]);
  return result;
}

/* A work for `n` requests, and for the caller if he wants it. engine: of all of them; NULL: several. */
static struct hfreduceWork *new_work(int n, int caller, struct hfr_engine *engine) {
  struct hfreduceWork *w = hfr_work_new((uint32_t)n);
  if (!w) return NULL;
  w->engine = engine;
  if (!caller) hfr_work_put(w);
  return w;
}

/* Is this call's request part of the work of a launch? host: of those that somebody waits for only. Captured ones have none. */
static int counted(const struct grouped *g, const struct hfr_request *r, int host) {
  return r && !g->ordered.stream.capture && (!host || !g->ordered.on);
}

static struct hfr_engine *common_engine(const struct grouped *g, struct hfr_request **r, int n, int host, int *count) {
  struct hfr_engine *engine = NULL;
  int several = 0;
  *count = 0;
  for (int i = 0; i < n; i++) {
    if (!counted(&g[i], r[i], host)) continue;
    several |= *count && engine != &g[i].comm->engine;
    engine = &g[i].comm->engine;
    ++*count;
  }
  return several ? NULL : engine;
}

/* Launch n requests. *out stands for those that are done at once, on host memory (all: and for those that streams order). */
static hfreduceResult_t launch_parts(struct grouped *g, int n, int all, struct hfreduceWork **out) {
  int ordered_calls = 0;
  for (int i = 0; i < n; i++) ordered_calls += g[i].ordered.on;
  if (!ordered_calls) return launch_host(g, n, out);
  HFR_TRY(hfr_drive_ready());
  struct hfr_request **r = calloc((size_t)n + 1, sizeof *r);
  struct hfr_ordered_call *ordered = calloc((size_t)n + 1, sizeof *ordered);
  struct hfr_streams *streams = NULL;
  struct hfreduceWork *host = NULL, *others = NULL;
  hfreduceResult_t result = r && ordered ? prepare(g, n, r, ordered, &streams) : hfr_fail(hfreduceSystemError, "out of memory");
  int nhost = 0, nall = 0;
  if (!result) {
    struct hfr_engine *engine = common_engine(g, r, n, !all, &nhost), *of_all = common_engine(g, r, n, 0, &nall);
    host = new_work(nhost, 1, engine);
    if (nall > nhost) others = new_work(nall - nhost, 0, of_all);
    if (!host || (nall > nhost && !others)) { /* nothing has started: all or none */
      result = hfr_fail(hfreduceSystemError, "out of memory for a work handle");
      for (int i = 0; i < n; i++)
        if (r[i]) hfr_request_put(&g[i].comm->engine, r[i]);
      if (streams) hfr_streams_drop(streams);
      free(host);
      free(others);
    }
  }
  if (!result && streams) hfr_streams_commit(streams);
  for (int i = 0; !result && i < n; i++) {
    if (!counted(&g[i], r[i], 0)) continue;
    r[i]->work = counted(&g[i], r[i], !all) ? host : others;
    hfr_engine_submit(&g[i].comm->engine, r[i]);
  }
  if (!result && streams) {
    /* Before it: the driver may make this thread wait when a stream holds very much, and only the engine gets on with that. */
    for (int i = 0; i < n; i++)
      if (g[i].ordered.on && !g[i].ordered.stream.capture) hfr_drive_async(&g[i].comm->engine);
    result = hfr_streams_run(streams);
    for (int i = 0; i < n; i++)
      if (g[i].ordered.on && g[i].ordered.stream.capture) hfr_drive_async(&g[i].comm->engine);
    if (result) hfr_work_put(host);
  }
  free(r);
  free(ordered);
  *out = host;
  return result;
}

/* Put the parts of a call over pairs at *to. */
static void spread(struct grouped **to, const struct grouped *g) {
  for (enum part part = AGREE; part <= HALF; part++) {
    struct grouped *p = (*to)++;
    *p = *g;
    p->part = part;
    p->of = g;
    if (part == HALF) {
      p->comm = hfr_pairs_half(g->comm);
      p->call = hfr_pairs_half_call(g->comm, &g->call);
    } else if (part == AGREE) {
      p->call.count = 0;
    } else {
      p->call.coll = HFR_PAIR;
    }
  }
  atomic_load(&g->comm->pairs)->calls++;
}

/* The same for calls, of which each is one request or several. */
static hfreduceResult_t launch(struct grouped *g, int n, int all, struct hfreduceWork **out) {
  int paired = 0;
  for (int i = 0; i < n; i++) paired += g[i].ordered.paired;
  if (!paired) return launch_parts(g, n, all, out);
  struct grouped *parts = calloc((size_t)n + 3 * (size_t)paired, sizeof *parts), *to = parts;
  if (!parts) return hfr_fail(hfreduceSystemError, "out of memory for a group of %d calls", n);
  for (int i = 0; i < n; i++)
    if (g[i].ordered.paired)
      spread(&to, &g[i]);
    else
      *to++ = g[i];
  hfreduceResult_t r = launch_parts(parts, (int)(to - parts), all, out);
  free(parts);
  return r;
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
  for (int i = 1; i < n; i++) /* the caller drives one engine */
    if (g[i].comm != g[0].comm) HFR_TRY(hfr_drive_ready());
  HFR_TRY(launch(g, n, 0, &w));
  if (w->engine) {
    hfr_drive_until(w->engine, w, -1);
  } else if (!atomic_load_explicit(&w->done, memory_order_acquire)) {
    for (int i = 0; i < n; i++) hfr_drive_async(&g[i].comm->engine);
    hfr_work_wait(w, -1);
  }
  return conclude(w);
}

/* What a blocking call of this thread lost patience with, until it is taken. */
static _Thread_local struct hfreduceWork *pending;

static hfreduceResult_t set_pending(struct hfreduceWork *w) {
  if (pending) hfr_work_put(pending);
  pending = w;
  return hfreduceInProgress;
}

static hfreduceResult_t leave_pending(struct hfreduceComm *c, const struct hfr_call *call, struct hfreduceWork *w) {
  if (call->coll != HFR_P2P) hfr_comm_goes_on(c, w);
  return set_pending(w);
}

/* The patience of all the calls' communicators; 0: one has none. */
static int64_t common_patience(const struct grouped *g, int n) {
  int64_t least = INT64_MAX;
  for (int i = 0; i < n; i++)
    if (g[i].comm->engine.patience_ns < least) least = g[i].comm->engine.patience_ns;
  return least;
}

/* As run_blocking, with that patience. */
static hfreduceResult_t run_group(struct grouped *g, int n) {
  int64_t patience = common_patience(g, n);
  struct hfreduceWork *w;
  if (!patience) return run_blocking(g, n);
  HFR_TRY(launch(g, n, 0, &w));
  int64_t end = hfr_now_ns() + patience;
  int done = (int)atomic_load_explicit(&w->done, memory_order_acquire);
  if (!done && w->engine) {
    done = hfr_drive_until(w->engine, w, end);
  } else if (!done) {
    for (int i = 0; i < n; i++) hfr_drive_async(&g[i].comm->engine);
    done = hfr_work_wait(w, end);
  }
  if (done) return conclude(w);
  for (int i = 0; i < n; i++)
    if (g[i].enter && g[i].coll) hfr_comm_goes_on(g[i].comm, w);
  return set_pending(w);
}

static hfreduceResult_t run_patiently(struct hfreduceComm *c, const struct hfr_call *call) {
  struct grouped one = {.comm = c, .call = *call};
  struct hfreduceWork *w;
  if (!c->engine.patience_ns) return run_blocking(&one, 1);
  HFR_TRY(launch(&one, 1, 0, &w));
  if (hfr_drive_until(&c->engine, w, hfr_now_ns() + c->engine.patience_ns)) return conclude(w);
  return leave_pending(c, call, w);
}

/* What the short way began goes on as a request. The short way drives the engine: no more after it. */
static hfreduceResult_t adopt(struct hfreduceComm *c, const struct hfr_call *call, int copied, struct hfreduceWork **out) {
  struct hfr_request *r = NULL;
  struct hfreduceWork *w = hfr_work_new(1);
  hfreduceResult_t result =
      w ? plan_request(c, call, NULL, &r) : hfr_fail(hfreduceSystemError, "out of memory for a work handle");
  if (result) { /* the others count on this rank */
    hfr_engine_fail(&c->engine, hfr_last_error());
    free(w);
  } else {
    w->engine = &c->engine;
    r->work = w;
    hfr_engine_adopt(&c->engine, r, copied);
    *out = w;
  }
  hfr_drive_end(&c->engine);
  return result;
}

static hfreduceResult_t issue_at_once(struct hfreduceComm *c, const struct hfr_call *call) {
  hfreduceResult_t r;
  enum hfr_oneshot how = hfr_oneshot(&c->engine, call, &r);
  if (how == HFR_ONESHOT_DONE) return r;
  if (how == HFR_ONESHOT_NO) return run_patiently(c, call);
  struct hfreduceWork *w;
  HFR_TRY(adopt(c, call, how == HFR_ONESHOT_COPIED, &w));
  if (c->engine.patience_ns) return leave_pending(c, call, w);
  hfr_drive_until(&c->engine, w, -1);
  return conclude(w);
}

/* Into the thread's open group. */
static hfreduceResult_t remember(const struct grouped *call) {
  if (group.n == group.cap) {
    int cap = group.cap ? 2 * group.cap : 16;
    struct grouped *grown = realloc(group.list, (size_t)cap * sizeof *grown);
    if (!grown) return hfr_fail(hfreduceSystemError, "out of memory for a group of %d calls", cap);
    group.list = grown;
    group.cap = cap;
  }
  group.list[group.n] = *call;
  group.list[group.n++].age = atomic_load_explicit(&call->comm->handle.age, memory_order_relaxed);
  return hfreduceSuccess;
}

/* The call may be a stream's to order. */
static hfreduceResult_t issue_by_stream(struct hfreduceComm *c, const struct hfr_call *call, hfreduceStream_t stream) {
  struct grouped one = {.comm = c, .call = *call};
  HFR_TRY(hfr_stream_resolve(c, &one.call, stream, &one.ordered));
  if (group.depth) return remember(&one);
  if (one.ordered.on && call->coll == HFR_P2P && hfr_device_queues() == 1)
    return hfr_fail(
        hfreduceInvalidUsage,
        "%s: rank %d: with CUDA_DEVICE_MAX_CONNECTIONS=1 all streams of the device share one queue, so a message that "
        "waits would hold up the one that its peer needs first; call send and receive in one group "
        "(hfreduceGroupStart, hfreduceGroupEnd), or unset the variable",
        hfr_stream_name(call), c->rank);
  return one.ordered.on ? run_blocking(&one, 1) : issue_at_once(c, &one.call);
}

hfreduceResult_t hfr_issue(struct hfreduceComm *c, const struct hfr_call *call, hfreduceStream_t stream) {
  if (stream || c->devices) return issue_by_stream(c, call, stream);
  if (!group.depth) return issue_at_once(c, call);
  return remember(&(struct grouped){.comm = c, .call = *call});
}

#define ASK_NS 100000000ll

hfreduceResult_t hfr_gather_now(struct hfreduceComm *c, const void *mine, void *all, size_t bytes, int64_t limit_ns,
                                const hfreduceConfig_t *config) {
  struct grouped one = {
      .comm = c,
      .limit_ns = limit_ns,
      .call = {.coll = HFR_ALL_GATHER, .send = mine, .recv = all, .count = bytes, .dtype = hfreduceUint8, .root = -1}};
  struct hfreduceWork *w;
  int aborted = 0;
  if (!config || !config->interrupted) return run_blocking(&one, 1);
  HFR_TRY(launch(&one, 1, 0, &w));
  while (!hfr_drive_until(&c->engine, w, hfr_now_ns() + ASK_NS))
    if (!aborted && config->interrupted(config->interrupted_arg)) hfr_comm_abort(c), aborted = 1;
  return conclude(w);
}

hfreduceResult_t hfr_min_now(struct hfreduceComm *c, uint64_t *value) {
  struct grouped one = {.comm = c,
                        .call = {.coll = HFR_ALL_REDUCE,
                                 .send = value,
                                 .recv = value,
                                 .count = 1,
                                 .dtype = hfreduceUint64,
                                 .op = hfreduceMin,
                                 .root = -1}};
  return run_blocking(&one, 1);
}

/* ---------------------------------------------------------------- groups */

/* A call in an open group was wrong: the group's End will say so. */
static hfreduceResult_t latch(hfreduceResult_t result) {
  if (result && group.depth && !group.error) {
    group.error = result;
    group.info = *hfr_last_error();
  }
  return result;
}

/* A call of a group only leaves a note: it is the end of the group that launches. */
hfreduceResult_t hfr_call_enter(hfreduceComm_t c, const char *function, int coll) {
  if (group.depth) return latch(hfr_comm_enter(c, function, HFR_BRIEF));
  return coll ? hfr_comm_begin(c, function) : hfr_comm_enter(c, function, HFR_WAITS);
}

hfreduceResult_t hfr_call_leave(hfreduceComm_t c, int coll, hfreduceResult_t result) {
  if (group.depth)
    hfr_comm_leave(c, HFR_BRIEF);
  else if (coll)
    hfr_comm_end(c);
  else
    hfr_comm_leave(c, HFR_WAITS);
  return result ? latch(result) : result;
}

static void leave_all(struct grouped *list, int n, const struct grouped *but) {
  for (struct grouped *g = list; g < list + n && g != but; g++) {
    if (!g->enter) continue;
    if (g->coll)
      hfr_comm_end(g->comm);
    else
      hfr_comm_leave(g->comm, HFR_WAITS);
  }
}

/* Note at the first call on each communicator whether there is a collective among those on it. */
static void find_comms(struct grouped *list, int n) {
  for (int i = 0; i < n; i++) {
    int first = i && list[i - 1].comm == list[i].comm ? list[i - 1].first : 0;
    while (list[first].comm != list[i].comm) first++;
    list[i].first = first;
    list[i].enter = first == i;
    list[i].coll = 0;
    list[first].coll |= list[i].call.coll != HFR_P2P;
  }
}

/* The end of a group enters all its communicators, each once, or none. */
static hfreduceResult_t enter_all(const char *function, struct grouped *list, int n) {
  find_comms(list, n);
  for (struct grouped *g = list; g < list + n; g++) {
    if (!g->enter) continue;
    hfreduceResult_t r = g->coll ? hfr_comm_begin(g->comm, function) : hfr_comm_enter(g->comm, function, HFR_WAITS);
    if (!r && !hfr_handle_is(g->comm, g->age)) {
      r = hfr_fail(hfreduceInvalidUsage, "%s: a communicator was destroyed while the group was open that has calls on it",
                   function);
      leave_all(list, n, g + 1);
    } else if (r) {
      leave_all(list, n, g);
    }
    HFR_TRY(r);
  }
  return hfreduceSuccess;
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
  if (!r && n)
    r = enter_all("hfreduceGroupEnd", list, n);
  else
    n = 0;
  if (!r && n) {
    r = run_group(list, n);
    leave_all(list, n, NULL);
  }
  free(list);
  return r;
}

hfreduceResult_t hfreduceGroupCancel(hfreduceResult_t result) {
  if (!group.depth) return hfr_fail(hfreduceInvalidUsage, "hfreduceGroupCancel outside a group of this thread");
  if (!result) return hfr_fail(hfreduceInvalidArgument, "hfreduceGroupCancel: result is hfreduceSuccess; give an error");
  latch(result);
  return hfreduceSuccess;
}

/* What was launched on host memory goes on while the caller does something else. */
static void leave_to_thread(const struct grouped *list, int n) {
  int in_line = 1;
  for (int i = 0; i < n; i++) {
    in_line &= list[i].call.coll != HFR_P2P;
    if (i + 1 < n && list[i + 1].comm == list[i].comm) continue; /* the last of its communicator stands for all */
    if (!list[i].ordered.on) hfr_drive_soon(&list[i].comm->engine, in_line);
    in_line = 1;
  }
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
  if (!r) r = hfr_drive_ready();
  if (!r) r = enter_all("hfreduceGroupEndAsync", list, n);
  if (!r) {
    r = launch(list, n, 1, work);
    if (!r) leave_to_thread(list, n);
    leave_all(list, n, NULL);
  }
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
  if (!atomic_load_explicit(&work->done, memory_order_acquire)) hfr_work_look(work);
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
