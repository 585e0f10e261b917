/* The life of requests: queued, started, stepped through their plan, ended. */
#include "engine.h"
#include "internal.h"

#include "../base/log.h"
#include "../base/thread.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- errors */

static int set_error(struct hfr_engine *e, const hfreduceErrorInfo_t *info) {
  int first = 0;
  pthread_mutex_lock(&e->lock);
  if (!atomic_load_explicit(&e->error, memory_order_relaxed)) {
    e->why = *info;
    if (e->why.rank < 0) e->why.rank = e->layout->rank;
    if (!e->why.host[0]) snprintf(e->why.host, sizeof e->why.host, "%s", e->host);
    atomic_store_explicit(&e->error, info->code, memory_order_release);
    first = 1;
  }
  pthread_mutex_unlock(&e->lock);
  if (!first) return 0;
  HFR_INFO("communicator broken: %s", e->why.text);
  hfr_engine_wake(e);
  return 1;
}

static int break_and_tell(struct hfr_engine *e, const hfreduceErrorInfo_t *info, int tell) {
  if (!set_error(e, info)) return 0;
  if (tell && e->on_error) e->on_error(e->on_error_arg, &e->why);
  if (e->on_break) e->on_break(e->on_error_arg, &e->why, tell);
  return 1;
}

int hfr_engine_break(struct hfr_engine *e, const hfreduceErrorInfo_t *info) { return break_and_tell(e, info, 0); }
void hfr_engine_fail(struct hfr_engine *e, const hfreduceErrorInfo_t *info) { break_and_tell(e, info, 1); }

void hfr_engine_tell(struct hfr_engine *e, const hfreduceErrorInfo_t *info) {
  if (info->code == hfreduceMismatch) { /* what ranks called is void on all of them */
    hfr_engine_break(e, info);
    return;
  }
  pthread_mutex_lock(&e->lock);
  int first = !atomic_load_explicit(&e->error, memory_order_relaxed) && !atomic_load_explicit(&e->told, memory_order_relaxed);
  if (first) {
    e->why = *info;
    e->told_ns = hfr_now_ns();
    /* Pairs with arrived() and hfr_engine_progress(): what the rank did before it said so is seen by whoever sees this. */
    atomic_store_explicit(&e->told, info->code, memory_order_release);
  }
  pthread_mutex_unlock(&e->lock);
  if (!first) return;
  hfr_engine_settle(e);
  hfr_engine_wake(e);
}

void hfr_engine_believe(struct hfr_engine *e) {
  hfreduceErrorInfo_t info;
  if (hfr_engine_error(e, &info)) break_and_tell(e, &info, 0);
}

void hfr_engine_settle(struct hfr_engine *e) {
  if (!atomic_load_explicit(&e->told, memory_order_acquire) || atomic_load_explicit(&e->error, memory_order_relaxed)) return;
  if (!hfr_drive_begin(e)) return;
  if (!atomic_load_explicit(&e->active, memory_order_acquire)) hfr_engine_believe(e);
  hfr_drive_end(e);
}

int hfr_engine_error(struct hfr_engine *e, hfreduceErrorInfo_t *info) {
  if (!hfr_engine_state(e)) return 0;
  pthread_mutex_lock(&e->lock);
  *info = e->why;
  pthread_mutex_unlock(&e->lock);
  return info->code;
}

void hfr_fail_request(struct hfr_engine *e, const struct hfr_request *r, const char *phase, int peer, hfreduceResult_t code,
                      const char *text) {
  hfreduceErrorInfo_t info;
  hfr_error_clear(&info);
  info.code = code;
  info.rank = e->layout->rank;
  info.peer = peer;
  info.seq = (long long)r->fp.seq;
  snprintf(info.op, sizeof info.op, "%s", hfr_coll_name(r->plan.call.coll));
  snprintf(info.phase, sizeof info.phase, "%s", phase);
  snprintf(info.host, sizeof info.host, "%s", e->host);
  char what[128];
  hfr_describe_fingerprint(&r->fp, what, sizeof what);
  snprintf(info.text, sizeof info.text, "rank %d on %s, %s, phase %s: %.500s", e->layout->rank, e->host, what, phase, text);
  hfr_engine_fail(e, &info);
}

void hfr_fail_mismatch(struct hfr_engine *e, const struct hfr_fingerprint *mine, int peer, const struct hfr_fingerprint *theirs) {
  hfreduceErrorInfo_t info;
  char a[128], b[128];
  hfr_error_clear(&info);
  info.code = hfreduceMismatch;
  info.rank = e->layout->rank;
  info.peer = peer;
  info.seq = (long long)mine->seq;
  snprintf(info.op, sizeof info.op, "%s", hfr_coll_name(mine->coll));
  snprintf(info.phase, sizeof info.phase, "verify");
  hfr_describe_fingerprint(mine, a, sizeof a);
  hfr_describe_fingerprint(theirs, b, sizeof b);
  snprintf(
      info.text, sizeof info.text,
      "ranks disagree: rank %d on %s called %s but rank %d on %s called %s; all ranks must make the same calls in the same order",
      e->layout->rank, e->host, a, peer, e->net->host[peer], b);
  hfr_engine_fail(e, &info);
}

/* ---------------------------------------------------------------- pool and queue */

struct hfr_request *hfr_request_get(struct hfr_engine *e) {
  pthread_mutex_lock(&e->lock);
  struct hfr_request *r = e->free;
  if (r) e->free = r->next;
  pthread_mutex_unlock(&e->lock);
  if (!r) return calloc(1, sizeof *r);
  struct hfr_stage *stage = r->plan.stage;
  int cap = r->plan.cap, cursors_cap = r->cursors_cap;
  struct hfr_cursor *cursor = r->cursor;
  *r = (struct hfr_request){.cursor = cursor, .cursors_cap = cursors_cap};
  r->plan.stage = stage;
  r->plan.cap = cap;
  return r;
}

void hfr_request_put(struct hfr_engine *e, struct hfr_request *r) {
  free(r->temp);
  free(r->counts);
  hfr_window_free(r->window);
  free(r->kept);
  r->kept = NULL;
  r->temp = NULL;
  r->counts = NULL;
  r->window = NULL;
  pthread_mutex_lock(&e->lock);
  r->next = e->free;
  e->free = r;
  pthread_mutex_unlock(&e->lock);
}

void hfr_request_let_go(struct hfr_engine *e, struct hfr_request *r) {
  if (r->window && atomic_fetch_sub_explicit(&r->holders, 1, memory_order_acq_rel) > 1) return;
  hfr_request_put(e, r);
}

/* One of the requests of a work (NULL: of none) is over. */
static void tell(struct hfreduceWork *w, const hfreduceErrorInfo_t *error) {
  if (!w) return;
  int none = 0;
  if (error && atomic_compare_exchange_strong(&w->code, &none, error->code)) w->info = *error; /* read once it is done */
  if (atomic_fetch_sub_explicit(&w->remaining, 1, memory_order_acq_rel) == 1) {
    /* Pairs with hfr_work_wait(): its count is seen here, or its thread sees `done`. */
    atomic_store_explicit(&w->done, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&w->sleepers, memory_order_seq_cst)) hfr_futex_wake(&w->done, INT32_MAX);
    hfr_work_notify(w);
    hfr_work_put(w);
  }
}

_Atomic int hfr_windows_open, hfr_engines_waiting;

void hfr_window_count(struct hfr_engine *e, int more) {
  uint32_t before = atomic_fetch_add_explicit(&e->windows, (uint32_t)more, memory_order_relaxed);
  int now = before + (uint32_t)more > 0, was = before > 0;
  if (now != was) atomic_fetch_add_explicit(&hfr_engines_waiting, now - was, memory_order_relaxed);
  atomic_fetch_add_explicit(&hfr_windows_open, more, memory_order_relaxed);
}

/* The request is over: tell its work, recycle it. */
static void finish(struct hfr_engine *e, struct hfr_request *r, const hfreduceErrorInfo_t *error) {
  struct hfreduceWork *w = r->work;
  if (r->window) {
    hfr_window_release(r->window, !error);
    hfr_window_count(e, -1);
  }
  r->running = 0;
  if (!r->partial) atomic_fetch_sub_explicit(&e->calls, 1, memory_order_relaxed);
  if (!r->replay) hfr_request_let_go(e, r);
  atomic_fetch_sub_explicit(&e->active, 1, memory_order_release); /* pairs with hfreduceCommFinalize */
  tell(w, error);
}

void hfr_engine_submit(struct hfr_engine *e, struct hfr_request *r) {
  r->next = NULL;
  pthread_mutex_lock(&e->lock);
  *e->inbox_tail = r;
  e->inbox_tail = &r->next;
  if (!r->replay) atomic_fetch_add_explicit(&e->active, 1, memory_order_relaxed);
  if (!r->replay && !r->partial) atomic_fetch_add_explicit(&e->calls, 1, memory_order_relaxed);
  if (!r->replay && r->window) hfr_window_count(e, 1);
  atomic_store_explicit(&e->inbox_full, 1, memory_order_release);
  pthread_mutex_unlock(&e->lock);
}

void hfr_request_start(struct hfr_request *r) {
  r->started = 1;
  r->speak_ns = 0;
  r->deadline_ns = r->timeout_ns > 0 ? hfr_now_ns() + r->timeout_ns : INT64_MAX;
}

/* What the device or the stream had to bring first has come: the factor, and what an operation in place would overwrite. */
static void take_late_input(struct hfr_request *r) {
  if (r->window && r->window->scalar) memcpy(r->plan.call.scalar, r->window->scalar, r->plan.call.scalar_bytes);
  if (r->temp_from) memcpy(r->temp, r->temp_from, r->temp_bytes);
}

/* Does it use slots all over, sooner or later? */
static int uses_slots_all_over(const struct hfr_plan *p) {
  return p->nchunks > 1 || p->staged >= HFR_ROTATED_MIN || (p->nchunks && p->call.count * p->esize >= HFR_ROTATED_MIN);
}

/* Those that this rank will write. */
static void warm_slots(struct hfr_engine *e, const struct hfr_request *r) {
  const struct hfr_plan *p = &r->plan;
  int only_reads = !hfr_window_rows(p, 0) && e->layout->nnodes == 1;
  if (!uses_slots_all_over(p)) return;
  for (int s = 0; s < p->nstages; s++) {
    if (!p->stage[s].niter) continue;
    if (p->stage[s].ctr == HFR_CTR_IN && !r->lends && !only_reads) hfr_arena_warm(e->arena, HFR_WARM_IN);
    if (p->stage[s].ctr == HFR_CTR_RED) hfr_arena_warm(e->arena, HFR_WARM_RES);
  }
}

static void begin_collective(struct hfr_engine *e, struct hfr_request *r) {
  warm_slots(e, r);
  struct hfr_rank_ctrl *me = &e->arena->ctrl[e->arena->local];
  r->fp.seq = ++e->seq;
  r->base = e->base;
  r->place = hfr_slot_place(&e->geometry, r->base, r->plan.staged);
  me->fp[r->fp.seq & 1] = r->fp;
  atomic_store_explicit(&me->start, r->fp.seq, memory_order_release); /* pairs with verify(): the fingerprint is whole */
  hfr_arena_notify(e->arena);
}

/* Results that the cache cannot hold, in memory that nobody has just read, are better not fetched before they are written.
   Between nodes, partial results are sent on from there. */
static int streams_out(const struct hfr_engine *e, const struct hfr_request *r) {
  const struct hfr_call *c = &r->plan.call;
  size_t blocks = (size_t)hfr_window_rows(&r->plan, 1);
  int in_place = c->send == c->recv && hfr_shape(c)->in_place == HFR_SAME && hfr_shape(c)->reduces;
  return e->layout->nnodes == 1 && !in_place && !c->windowed && c->coll != HFR_P2P &&
         c->count * blocks * r->plan.esize * (size_t)e->arena->nlocal >= e->stream_from;
}

/* Set the cursors of a request to its beginning. 0: a link cannot be made. */
static int rewind_stages(struct hfr_engine *e, struct hfr_request *r) {
  hfr_request_start(r);
  take_late_input(r);
  r->streams_out = streams_out(e, r);
  r->lends = r->window && r->window->lends && !hfr_oneshot_takes(e, &r->plan.call);
  if (r->cursors_cap < r->plan.nstages) {
    free(r->cursor);
    r->cursor = malloc((size_t)r->plan.nstages * sizeof *r->cursor);
    r->cursors_cap = r->cursor ? r->plan.nstages : 0;
    if (!r->cursor) {
      hfr_fail_request(e, r, "start", -1, hfreduceSystemError, "out of memory");
      return 0;
    }
  }
  for (int s = 0; s < r->plan.nstages; s++) {
    struct hfr_stage *st = &r->plan.stage[s];
    struct hfr_cursor *c = &r->cursor[s];
    c->done = c->posted = c->passed = 0;
    c->have_step = 0;
    if (st->kind == HFR_STAGE_RECV && st->passes) memset(c->kept, 0, sizeof c->kept);
    r->left += st->niter > 0;
    if (st->kind != HFR_STAGE_SEND) continue;
    struct hfr_link *l = hfr_engine_link(e, st->peer, st->vc);
    if (!l) {
      hfr_fail_request(e, r, "connect", st->peer, hfr_last_error()->code, hfr_last_error()->text);
      return 0;
    }
    c->tx_base = l->posted;
  }
  if (r->window) hfr_window_begin(r);
  return 1;
}

/* A request reaches the head of its line. 0: its link cannot be made. */
static int begin(struct hfr_engine *e, struct hfr_request *r) {
  if (!rewind_stages(e, r)) return 0;
  if (r->plan.call.coll == HFR_P2P)
    r->verified = 1; /* pairs are verified by message headers */
  else
    begin_collective(e, r);
  return 1;
}

void hfr_engine_adopt(struct hfr_engine *e, struct hfr_request *r, int copied) {
  r->next = NULL;
  r->fp.seq = e->seq;
  r->base = e->base;
  r->place = hfr_slot_place(&e->geometry, r->base, r->plan.staged);
  atomic_fetch_add_explicit(&e->active, 1, memory_order_relaxed);
  atomic_fetch_add_explicit(&e->calls, 1, memory_order_relaxed);
  if (rewind_stages(e, r) && copied) { /* plans on one node begin with their copy-in */
    r->cursor[0].done = r->plan.stage[0].niter;
    r->left--;
  }
  *e->queue_tail = r; /* empty: hfr_oneshot saw to that */
  e->queue_tail = &r->next;
}

/* ---------------------------------------------------------------- steps */

/* Have all local ranks begun this very operation? Compares fingerprints before anybody's data is touched. */
static int verify(struct hfr_engine *e, struct hfr_request *r) {
  for (int i = 0; i < e->arena->nlocal; i++) {
    if (i == e->arena->local) continue;
    const struct hfr_rank_ctrl *c = &e->arena->ctrl[i];
    if (atomic_load_explicit(&c->start, memory_order_acquire) < r->fp.seq) return 0;
    struct hfr_fingerprint theirs = c->fp[r->fp.seq & 1];
    if (!hfr_fingerprint_equal(&theirs, &r->fp)) {
      hfr_fail_mismatch(e, &r->fp, hfr_rank_at(e->layout, e->layout->node, i), &theirs);
      return 0;
    }
  }
  r->verified = 1;
  e->out_known = r->base; /* who has begun this operation has ended those before it */
  return 1;
}

int hfr_counter_reached(const struct hfr_engine *e, const struct hfr_request *r, const struct hfr_guard *g) {
  int from = 0, to = e->arena->nlocal;
  if (g->who == HFR_ONE) from = g->first, to = from + 1;
  if (g->who == HFR_LANES) to = e->layout->lanes;
  uint64_t need = g->ctr == HFR_CTR_START || g->ctr == HFR_CTR_VER ? r->fp.seq : (uint64_t)((int64_t)r->base + g->need);
  for (int i = from; i < to; i++)
    if (atomic_load_explicit(hfr_arena_ctr(e->arena, i, (enum hfr_ctr)g->ctr), memory_order_acquire) < need) return 0;
  return 1;
}

int hfr_guards_open(struct hfr_engine *e, struct hfr_request *r, const struct hfr_step *s) {
  for (int j = 0; j < s->nguards; j++) {
    const struct hfr_guard *g = &s->guard[j];
    if (g->who == HFR_OWN) {
      for (int i = g->first; i < g->first + g->n; i++)
        if (r->cursor[i].done < g->need) return 0;
    } else {
      /* Slots of earlier operations may be waited for unverified; data of this one not. */
      if (g->need > 0 && !r->verified && !verify(e, r)) return 0;
      if (!hfr_counter_reached(e, r, g)) return 0;
    }
  }
  return 1;
}

uint8_t *hfr_place(const struct hfr_engine *e, const struct hfr_request *r, const struct hfr_loc *l) {
  uint8_t *lent;
  if (r->window && (l->space == HFR_SEND || l->space == HFR_RECV)) return hfr_window_place(r, l->space == HFR_RECV, l->off);
  switch (l->space) {
    case HFR_SEND: return (uint8_t *)(uintptr_t)r->plan.call.send + l->off;
    case HFR_RECV: return (uint8_t *)r->plan.call.recv + l->off;
    case HFR_IN:
      lent = hfr_arena_lent(e->arena, l->index, r->base + (uint64_t)l->chunk);
      return lent ? lent + l->off : hfr_arena_in(e->arena, l->index, r->base + (uint64_t)l->chunk) + r->place + l->off;
    default: return hfr_arena_res(e->arena, l->index, r->base + (uint64_t)l->chunk) + r->place + l->off;
  }
}

/* Is this header the message that the plan expects? */
static int header_ok(struct hfr_engine *e, struct hfr_request *r, const struct hfr_stage *st, int peer, int64_t i, size_t bytes,
                     const struct hfr_msg_header *h) {
  if (!hfr_fingerprint_equal(&h->fp, &r->fp)) {
    hfr_fail_mismatch(e, &r->fp, peer, &h->fp);
    return 0;
  }
  if (h->bytes == bytes && h->offset == (uint64_t)i) return 1;
  char text[256];
  snprintf(text, sizeof text,
           "ranks disagree: rank %d on %s sends message %llu of %llu bytes where rank %d expects message %lld of %zu bytes; "
           "check the counts of both sides",
           peer, e->net->host[peer], (unsigned long long)h->offset, (unsigned long long)h->bytes, e->layout->rank, (long long)i,
           bytes);
  hfr_fail_request(e, r, st->name, peer, hfreduceMismatch, text);
  return 0;
}

/* The next message of a link, judged. OK with data, AGAIN, or FAILED (recorded). */
static int receive(struct hfr_engine *e, struct hfr_request *r, const struct hfr_stage *st, int peer, int vc, int64_t i,
                   void *dst, size_t bytes, const void **data) {
  const struct hfr_msg_header *h;
  struct hfr_link *l = hfr_engine_link(e, peer, vc);
  int got = l ? l->transport->recv(l, dst, bytes, &h, data) : HFR_LINK_FAILED;
  if (got == HFR_LINK_FAILED) hfr_fail_request(e, r, st->name, peer, hfr_last_error()->code, hfr_last_error()->text);
  if (got == HFR_LINK_OK && !header_ok(e, r, st, peer, i, bytes, h)) return HFR_LINK_FAILED;
  return got;
}

static int do_copy(struct hfr_engine *e, struct hfr_request *r, int s, int64_t i, const struct hfr_step *step) {
  const struct hfr_stage *st = &r->plan.stage[s];
  if (r->lends && !st->premul && hfr_request_lend(e, r, s, i, step)) return 1;
  for (int j = 0; j < step->nparts; j++) {
    struct hfr_part p;
    r->plan.part(&r->plan, s, i, j, &p);
    uint8_t *dst = hfr_place(e, r, &p.dst), *src = hfr_place(e, r, &p.src);
    if (st->premul)
      hfr_premul(dst, src, p.bytes / r->plan.esize, r->plan.call.dtype, r->plan.call.scalar);
    else if (dst != src && (p.dst.space == HFR_IN || p.dst.space == HFR_RES) && e->arena->nlocal > 1)
      hfr_writer_copy(&e->arena->writer, dst, src, p.bytes);
    else if (dst != src && p.dst.space == HFR_RECV && r->streams_out)
      hfr_stream_copy(dst, src, p.bytes);
    else if (dst != src && p.bytes)
      memcpy(dst, src, p.bytes);
  }
  return 1;
}

#define TILE 8192 /* bytes of a result that the innermost cache still has when they are copied on */

/* Reduce e->sources to dst, and also to `also` unless it is NULL. shared: other ranks read dst; past: it goes past the caches. */
static void reduce_into(struct hfr_engine *e, uint8_t *dst, uint8_t *also, int shared, int past, int nsources, size_t bytes,
                        hfreduceDataType_t dtype, enum hfr_op op, const struct hfr_scale *scale) {
  struct hfr_writer *writer = &e->arena->writer;
  size_t size = hfr_dtype_size(dtype);
  int by_tile = past || (shared && e->arena->nlocal > 1 && writer->streams);
  if (!also && !by_tile) {
    hfr_reduce(dst, e->sources, nsources, bytes / size, dtype, op, scale);
    return;
  }
  uint8_t scratch[TILE];
  for (size_t at = 0; at < bytes; at += TILE) {
    size_t n = bytes - at < TILE ? bytes - at : TILE;
    uint8_t *to = by_tile ? scratch : dst + at;
    hfr_reduce(to, e->sources, nsources, n / size, dtype, op, scale);
    if (by_tile && past)
      hfr_stream_copy(dst + at, to, n);
    else if (by_tile)
      hfr_writer_copy(writer, dst + at, to, n);
    if (also) hfr_writer_copy(writer, also + at, to, n);
    for (int j = 0; j < nsources; j++) e->sources[j] = (const uint8_t *)e->sources[j] + n;
  }
}

static int do_reduce(struct hfr_engine *e, struct hfr_request *r, int s, int64_t i, const struct hfr_step *step) {
  const struct hfr_stage *st = &r->plan.stage[s];
  const struct hfr_call *call = &r->plan.call;
  if (!step->bytes && !step->nparts) return 1;
  struct hfr_loc from[step->nparts];
  for (int j = 0; j < step->nparts; j++) {
    struct hfr_part p;
    r->plan.part(&r->plan, s, i, j, &p);
    from[j] = p.src;
    if (p.src.space != HFR_MSG) {
      e->sources[j] = hfr_place(e, r, &p.src);
    } else {
      int got = receive(e, r, st, p.src.index, p.src.vc, i, NULL, step->bytes, &e->sources[j]);
      if (got != HFR_LINK_OK) return 0;
    }
  }
  struct hfr_scale scale = {0};
  int op = call->op == hfreduceAvg ? HFR_OP_SUM : (int)call->op;
  if (call->op == hfreduceAvg && r->plan.avg_pre) {
    scale.npre = st->npre;
    scale.pre = 1.0 / e->layout->nranks;
  } else if (call->op == hfreduceAvg && (st->final || step->final)) {
    scale.div = (uint64_t)(call->over ? call->over : e->layout->nranks);
  }
  if (step->bytes)
    reduce_into(e, hfr_place(e, r, &step->dst), st->doubled ? hfr_place(e, r, &step->also) : NULL, step->dst.space != HFR_RECV,
                step->dst.space == HFR_RECV && r->streams_out, step->nparts, step->bytes, call->dtype, (enum hfr_op)op, &scale);
  for (int j = 0; j < step->nparts; j++) {
    if (from[j].space != HFR_MSG) continue;
    struct hfr_link *l = hfr_engine_link(e, from[j].index, from[j].vc);
    l->transport->release(l);
  }
  return 1;
}

static int do_recv(struct hfr_engine *e, struct hfr_request *r, int s, int64_t i, const struct hfr_step *step) {
  const struct hfr_stage *st = &r->plan.stage[s];
  void *dst = step->bytes ? hfr_place(e, r, &step->dst) : NULL;
  const void *data = NULL;
  if (st->passes && i - r->cursor[s].passed >= HFR_KEPT) return 0;
  if (receive(e, r, st, st->peer, st->vc, i, dst, step->bytes, &data) != HFR_LINK_OK) return 0;
  if (step->bytes && data != dst) memcpy(dst, data, step->bytes);
  struct hfr_link *l = hfr_engine_link(e, st->peer, st->vc);
  if (st->passes && step->bytes && data != dst && l->transport->keep)
    r->cursor[s].kept[i % HFR_KEPT] = (struct hfr_kept){data, l->transport->keep(l)};
  else
    l->transport->release(l);
  return 1;
}

void hfr_load_step(struct hfr_request *r, int s, int64_t i) {
  struct hfr_cursor *c = &r->cursor[s];
  if (c->have_step) return;
  c->step.nguards = c->step.nparts = c->step.final = 0;
  c->step.bytes = 0;
  r->plan.step(&r->plan, s, i, &c->step);
  c->have_step = 1;
  if (r->window) c->need = hfr_window_of_step(r, s, i, &c->step);
}

/* Try to move stage s by an iteration. 1: it moved. */
static int advance(struct hfr_engine *e, struct hfr_request *r, int s) {
  struct hfr_stage *st = &r->plan.stage[s];
  struct hfr_cursor *c = &r->cursor[s];
  if (c->done == st->niter) return 0;
  int moved;
  if (st->kind == HFR_STAGE_SEND) {
    moved = hfr_advance_send(e, r, s);
  } else {
    hfr_load_step(r, s, c->done);
    if (r->window && !hfr_window_reach(r->window, c->need)) return 0;
    moved = hfr_guards_open(e, r, &c->step) && (st->kind == HFR_STAGE_COPY     ? do_copy(e, r, s, c->done, &c->step)
                                                : st->kind == HFR_STAGE_REDUCE ? do_reduce(e, r, s, c->done, &c->step)
                                                : st->kind == HFR_STAGE_RECV   ? do_recv(e, r, s, c->done, &c->step)
                                                                               : 1);
    if (moved) c->done++, c->have_step = 0;
  }
  if (moved && st->ctr != HFR_CTR_NONE) {
    uint64_t value = st->ctr == HFR_CTR_VER ? r->fp.seq : r->base + (uint64_t)c->done;
    atomic_store_explicit(hfr_arena_ctr(e->arena, e->arena->local, (enum hfr_ctr)st->ctr), value,
                          memory_order_release); /* pairs with hfr_counter_reached() */
    hfr_arena_notify(e->arena);
  }
  if (moved && r->window) hfr_window_move(r, s);
  if (moved && c->done == st->niter) r->left--;
  return moved;
}

/* Bring IN, RED and OUT of this rank to where the operation leaves them, whichever of them it used. Nothing is published with
   these stores: a stage that wrote or read slots has moved its counter to the end by itself, in advance(). */
static void end_collective(struct hfr_engine *e, struct hfr_request *r) {
  uint64_t end = r->base + (uint64_t)r->plan.nchunks;
  struct hfr_rank_ctrl *me = &e->arena->ctrl[e->arena->local];
  e->base = end;
  e->collectives++;
  if (atomic_load_explicit(&me->in, memory_order_relaxed) < end) atomic_store_explicit(&me->in, end, memory_order_release);
  if (atomic_load_explicit(&me->red, memory_order_relaxed) < end) atomic_store_explicit(&me->red, end, memory_order_release);
  if (atomic_load_explicit(&me->out, memory_order_relaxed) < end) {
    atomic_store_explicit(&me->out, end, memory_order_release);
    hfr_arena_notify(e->arena);
  }
  if (uses_slots_all_over(&r->plan)) hfr_arena_used(e->arena);
}

static int progress_request(struct hfr_engine *e, struct hfr_request *r) {
  int moved = 0;
  for (int s = 0; s < r->plan.nstages; s++) {
    moved |= advance(e, r, s);
    if (atomic_load_explicit(&e->error, memory_order_relaxed)) return 1;
  }
  if (!r->verified && verify(e, r)) moved = 1;
  if (r->window) moved |= hfr_request_give_back(e, r);
  return moved;
}

static int over(const struct hfr_request *r) { return r->started && r->verified && r->left == 0; }

/* ---------------------------------------------------------------- the engine */

static void take_inbox(struct hfr_engine *e) {
  pthread_mutex_lock(&e->lock);
  struct hfr_request *r = e->inbox;
  e->inbox = NULL;
  e->inbox_tail = &e->inbox;
  atomic_store_explicit(&e->inbox_full, 0, memory_order_relaxed);
  pthread_mutex_unlock(&e->lock);
  while (r) {
    struct hfr_request *next = r->next;
    r->next = NULL;
    if (r->replay) {
      hfr_replay_add(e, r);
    } else if (r->plan.call.coll == HFR_PAIR) {
      hfr_pairing_post(e, r);
    } else if (r->plan.call.coll == HFR_P2P) {
      hfr_p2p_post(e, r);
    } else {
      *e->queue_tail = r;
      e->queue_tail = &r->next;
    }
    r = next;
  }
}

hfreduceErrorInfo_t hfr_as_told_by(struct hfr_engine *e, const struct hfr_request *r, const hfreduceErrorInfo_t *why) {
  hfreduceErrorInfo_t told = *why;
  if (why->seq >= 0) return told;
  char what[128];
  hfr_describe_fingerprint(&r->fp, what, sizeof what);
  told.seq = (long long)r->fp.seq;
  snprintf(told.op, sizeof told.op, "%s", hfr_coll_name(r->fp.coll));
  snprintf(told.text, sizeof told.text, "rank %d on %s, %s, phase %s: %.560s", e->layout->rank, e->host, what,
           why->phase[0] ? why->phase : "any", why->text);
  return told;
}

static void fail_list(struct hfr_engine *e, struct hfr_request **list, const hfreduceErrorInfo_t *why) {
  while (*list) {
    struct hfr_request *r = *list;
    hfreduceErrorInfo_t told = hfr_as_told_by(e, r, why);
    *list = r->next;
    finish(e, r, &told);
  }
}

/* A collective is through, and all its stages have passed all that was lent. The next one may begin, since the others wait for
   this rank's part in it while this rank waits until they have read. */
static void end_or_linger(struct hfr_engine *e, struct hfr_request *r) {
  end_collective(e, r);
  if (r->window) hfr_request_give_back(e, r);
  if (!r->window || !hfr_window_owed(r->window)) {
    finish(e, r, NULL);
    return;
  }
  tell(r->work, NULL);
  r->work = NULL;
  r->next = NULL;
  *e->lenders_tail = r;
  e->lenders_tail = &r->next;
}

/* regardless: nobody is waited for any more. */
static int finish_lenders(struct hfr_engine *e, int regardless) {
  int moved = 0;
  while (e->lenders) {
    struct hfr_request *r = e->lenders;
    moved |= hfr_request_give_back(e, r);
    if (hfr_window_owed(r->window) && !regardless) break;
    e->lenders = r->next;
    if (!e->lenders) e->lenders_tail = &e->lenders;
    finish(e, r, NULL);
    moved = 1;
  }
  return moved;
}

static void fail_all(struct hfr_engine *e) {
  hfreduceErrorInfo_t why;
  hfr_engine_error(e, &why);
  take_inbox(e);
  finish_lenders(e, 1);
  fail_list(e, &e->queue, &why);
  e->queue_tail = &e->queue;
  fail_list(e, &e->p2p, &why);
  e->p2p_tail = &e->p2p;
}

int hfr_my_turn(struct hfr_engine *e, const struct hfr_request *r) {
  const struct hfr_link *l = hfr_engine_link(e, r->plan.call.root, HFR_VC_P2P); /* made when the send was put in line */
  return r->ticket == l->tx_turn;
}

static int progress_p2p(struct hfr_engine *e) {
  int moved = 0;
  e->visit++;
  for (struct hfr_request **at = &e->p2p; *at;) {
    struct hfr_request *r = *at;
    if (r->plan.call.coll == HFR_PAIR) {
      moved |= hfr_pairing_progress(e, r);
    } else if (r->plan.call.receiving) {
      moved |= hfr_p2p_receive(e, r);
    } else if (hfr_my_turn(e, r)) {
      if (!r->started && hfr_request_ready(r) && !begin(e, r)) return 1;
      if (r->started) moved |= progress_request(e, r);
    }
    if (atomic_load_explicit(&e->error, memory_order_relaxed)) return 1;
    if (over(r)) {
      if (r->plan.call.coll == HFR_P2P && !r->plan.call.receiving) hfr_engine_link(e, r->plan.call.root, HFR_VC_P2P)->tx_turn++;
      *at = r->next;
      if (!*at) e->p2p_tail = at;
      finish(e, r, NULL);
      moved = 1;
    } else {
      at = &r->next;
    }
  }
  return moved;
}

/* The driver goes on this long, if something always moves, after another rank's error was told. */
#define TOLD_GRACE_NS 1000000000ll

int hfr_engine_progress(struct hfr_engine *e) {
  int told = atomic_load_explicit(&e->told, memory_order_acquire); /* before the look at what has arrived */
  int moved = 0;
  if (atomic_load_explicit(&e->inbox_full, memory_order_acquire)) take_inbox(e), moved = 1;
  if (e->replays) moved |= hfr_replay_poll(e);
  if (!atomic_load_explicit(&e->error, memory_order_acquire)) {
    if (e->queue) {
      struct hfr_request *r = e->queue;
      if (r->started || (hfr_request_ready(r) && begin(e, r))) moved |= progress_request(e, r);
      if (!atomic_load_explicit(&e->error, memory_order_relaxed) && over(r)) {
        e->queue = r->next;
        if (!e->queue) e->queue_tail = &e->queue;
        end_or_linger(e, r);
        moved = 1;
      }
    }
    if (e->lenders) moved |= finish_lenders(e, 0);
    if (e->p2p) moved |= progress_p2p(e);
  }
  if (told && (!moved || hfr_now_ns() - e->told_ns > TOLD_GRACE_NS)) hfr_engine_believe(e);
  if (atomic_load_explicit(&e->error, memory_order_acquire) &&
      (e->queue || e->lenders || e->p2p || atomic_load_explicit(&e->inbox_full, memory_order_relaxed))) {
    fail_all(e);
    moved = 1;
  }
  return moved;
}

/* ---------------------------------------------------------------- birth and death */

hfreduceResult_t hfr_engine_init(struct hfr_engine *e) {
  int n = e->layout->nranks;
  pthread_mutex_init(&e->lock, NULL);
  e->inbox_tail = &e->inbox;
  e->queue_tail = &e->queue;
  e->lenders_tail = &e->lenders;
  e->p2p_tail = &e->p2p;
  e->pid = getpid();
  e->stream_from = hfr_stream_from();
  e->base = (uint64_t)e->geometry.slots; /* so that needs of earlier operations never go below zero */
  e->link = calloc((size_t)n * HFR_NVC, sizeof *e->link);
  e->linked = calloc((size_t)n, sizeof *e->linked);
  e->left_ns = calloc((size_t)n, sizeof *e->left_ns);
  e->sources = calloc((size_t)n + 8, sizeof *e->sources);
  if (!e->link || !e->linked || !e->left_ns || !e->sources) return hfr_fail(hfreduceSystemError, "out of memory for %d ranks", n);
  struct hfr_rank_ctrl *me = &e->arena->ctrl[e->arena->local];
  atomic_store(&me->in, e->base);
  atomic_store(&me->red, e->base);
  atomic_store(&me->out, e->base);
  return hfreduceSuccess;
}

void hfr_engine_fini(struct hfr_engine *e) {
  for (size_t i = 0; e->link && i < (size_t)e->layout->nranks * HFR_NVC; i++) {
    struct hfr_link *link = e->link[i];
    if (link) link->transport->close(link);
  }
  take_inbox(e); /* captured calls that nobody has driven yet */
  hfr_replay_fini(e);
  hfr_window_count(e, -(int)atomic_load(&e->windows)); /* of what never ended */
  while (e->free) {
    struct hfr_request *r = e->free;
    e->free = r->next;
    hfr_plan_fini(&r->plan);
    free(r->cursor);
    free(r);
  }
  hfr_p2p_fini(e);
  free((void *)e->link);
  free(e->linked);
  free((void *)e->left_ns);
  free(e->sources);
  pthread_mutex_destroy(&e->lock);
}
