/*
 * The short way for a small blocking all_reduce on one node: what the plan "one-shot" does, written out, with no request, no lock
 * and no system call. On the wire the two are one: a rank may take this way while another executes the plan.
 */
#include "engine.h"
#include "internal.h"

#include "../base/thread.h"

#include <string.h>

struct awaited {
  struct hfr_request *request; /* for errors: has no plan */
  int64_t *give_up_ns;         /* when patience is over; 0: not looked up yet */
  _Atomic uint64_t *counter;
  uint64_t need;
  int local;
};

/* Has the peer got there? Tells a disagreement apart: then the counter might never come. */
static int arrived(struct hfr_engine *e, void *arg) {
  struct awaited *a = arg;
  if (atomic_load_explicit(a->counter, memory_order_acquire) >= a->need) return 1;
  if (atomic_load_explicit(&e->error, memory_order_acquire)) return 1;
  const struct hfr_rank_ctrl *c = &e->arena->ctrl[a->local];
  if (atomic_load_explicit(&c->start, memory_order_acquire) == a->request->fp.seq &&
      !hfr_fingerprint_equal(&c->fp[a->request->fp.seq & 1], &a->request->fp)) {
    struct hfr_fingerprint theirs = c->fp[a->request->fp.seq & 1];
    hfr_fail_mismatch(e, &a->request->fp, hfr_rank_at(e->layout, e->layout->node, a->local), &theirs);
    return 1;
  }
  return 0;
}

enum outcome { FAILED, IMPATIENT, CAME };

static enum outcome await(struct hfr_engine *e, struct awaited *a) {
  struct hfr_backoff b = {0};
  if (atomic_load_explicit(a->counter, memory_order_acquire) >= a->need) return CAME;
  while (!arrived(e, a)) {
    if (!a->request->deadline_ns) {
      int64_t now = hfr_now_ns();
      a->request->deadline_ns = a->request->timeout_ns > 0 ? now + a->request->timeout_ns : INT64_MAX;
      *a->give_up_ns = e->patience_ns > 0 ? now + e->patience_ns : INT64_MAX;
    }
    if (b.idle > e->spins + e->yields && hfr_now_ns() > *a->give_up_ns) return IMPATIENT;
    e->queue = a->request; /* hfr_engine_check looks at the head of the queue; nobody else drives */
    hfr_backoff_wait(e, &b, arrived, a);
    e->queue = NULL;
  }
  return atomic_load_explicit(&e->error, memory_order_acquire) ? FAILED : CAME;
}

/* All peers have taken what lay in the slot that comes next. */
static enum outcome slot_free(struct hfr_engine *e, struct hfr_request *r, int64_t *give_up_ns) {
  uint64_t need = r->base + 1 - (uint64_t)e->geometry.slots;
  if (e->out_known >= need) return CAME;
  for (int i = 0; i < e->arena->nlocal; i++) {
    struct awaited a = {r, give_up_ns, &e->arena->ctrl[i].out, need, i};
    enum outcome o = i == e->arena->local ? CAME : await(e, &a);
    if (o != CAME) return o;
  }
  return CAME;
}

/* *copied: the data lies in the arena, and the others may have seen it. */
static enum outcome exchange(struct hfr_engine *e, const struct hfr_call *call, struct hfr_request *r, size_t bytes,
                             int *copied) {
  struct hfr_arena *a = e->arena;
  struct hfr_rank_ctrl *me = &a->ctrl[a->local];
  me->fp[r->fp.seq & 1] = r->fp;
  atomic_store_explicit(&me->start, r->fp.seq, memory_order_release);
  int64_t give_up_ns = 0;
  enum outcome o = slot_free(e, r, &give_up_ns);
  if (o != CAME) return o;
  size_t place = hfr_slot_place(&e->geometry, r->base, bytes);
  hfr_writer_copy(&a->writer, hfr_arena_in(a, a->local, r->base) + place, call->send, bytes);
  atomic_store_explicit(&me->in, r->base + 1,
                        memory_order_release); /* pairs with await() and counter_reached(): slot and fingerprint are whole */
  hfr_arena_notify(a);
  *copied = 1;
  for (int i = 0; i < a->nlocal; i++) {
    e->sources[i] = hfr_arena_in(a, i, r->base) + place;
    if (i == a->local) continue;
    struct awaited w = {r, &give_up_ns, &a->ctrl[i].in, r->base + 1, i};
    o = await(e, &w);
    if (o != CAME) return o;
    const struct hfr_fingerprint *theirs = &a->ctrl[i].fp[r->fp.seq & 1];
    if (!hfr_fingerprint_equal(theirs, &r->fp)) {
      struct hfr_fingerprint copy = *theirs;
      hfr_fail_mismatch(e, &r->fp, hfr_rank_at(e->layout, e->layout->node, i), &copy);
      return FAILED;
    }
  }
  e->out_known = r->base;
  struct hfr_scale scale = {.div = call->op == hfreduceAvg ? (uint64_t)a->nlocal : 0};
  hfr_reduce(call->recv, e->sources, a->nlocal, call->count, call->dtype,
             call->op == hfreduceAvg ? HFR_OP_SUM : (enum hfr_op)call->op, &scale);
  atomic_store_explicit(&me->red, r->base + 1, memory_order_relaxed);
  /* Pairs with slot_free(). No notify, which is a fence: who sleeps for this slot needs my next operation as well, and that one
   * notifies. */
  atomic_store_explicit(&me->out, r->base + 1, memory_order_release);
  return CAME;
}

enum hfr_oneshot hfr_oneshot_all_reduce(struct hfr_engine *e, const struct hfr_call *call, hfreduceResult_t *result) {
  size_t bytes = call->count * hfr_dtype_size(call->dtype);
  int idle = 0;
  if (e->layout->nnodes != 1 || !bytes || call->premul || (int64_t)bytes > hfr_oneshot_bytes(&e->geometry, e->arena->nlocal) ||
      call->count > (size_t)hfr_oneshot_bytes(&e->geometry, e->arena->nlocal))
    return HFR_ONESHOT_NO;
  if (atomic_load_explicit(&e->active, memory_order_acquire) ||
      !atomic_compare_exchange_strong_explicit(&e->driver, &idle, 1, memory_order_acquire, memory_order_relaxed))
    return HFR_ONESHOT_NO;
  if (e->layout->nlocal == 1) {
    if (call->recv != call->send) memcpy(call->recv, call->send, bytes);
    e->seq++;
    atomic_store_explicit(&e->driver, 0, memory_order_release);
    *result = hfreduceSuccess;
    return HFR_ONESHOT_DONE;
  }
  /* A plain object: only what errors and checks read is set. */
  struct hfr_request r;
  r.next = NULL;
  r.plan.nstages = 0;
  r.plan.call = *call;
  r.fp = (struct hfr_fingerprint){.seq = ++e->seq,
                                  .count = call->count,
                                  .root = -1,
                                  .coll = HFR_ALL_REDUCE,
                                  .op = (uint8_t)call->op,
                                  .dtype = (uint8_t)call->dtype};
  r.base = e->base;
  r.timeout_ns = e->timeout_ns;
  r.deadline_ns = 0; /* looked up when a wait gets long: reading the clock costs as much as the exchange */
  r.started = 1;
  r.verified = 0;
  int copied = 0;
  enum outcome outcome = exchange(e, call, &r, bytes, &copied);
  if (outcome == IMPATIENT) return copied ? HFR_ONESHOT_COPIED : HFR_ONESHOT_BEGUN;
  e->base++;
  e->collectives++;
  e->fast++;
  atomic_store_explicit(&e->driver, 0, memory_order_release);
  if (atomic_load_explicit(&e->active, memory_order_acquire)) hfr_drive_async(e);
  *result = hfreduceSuccess;
  if (outcome == FAILED) {
    hfreduceErrorInfo_t why;
    *result = (hfreduceResult_t)hfr_engine_error(e, &why);
    *hfr_last_error() = hfr_as_told_by(e, &r, &why);
  }
  return HFR_ONESHOT_DONE;
}
