/*
 * The short way for small blocking collectives on one node: what their plans of one chunk do, written out, with no request, no
 * lock and no system call. Every rank puts what others need into its slot, waits until all have, and takes what it needs from
 * theirs. On the wire the two are one: a rank may take this way while another executes the plan.
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

/* Has the peer got there? Where it has begun another call the counter might never come: this rank says so at once. Without that
 * look the peer, which compares fingerprints as well, would break the communicator a little later. */
static int arrived(struct hfr_engine *e, void *arg) {
  struct awaited *a = arg;
  if (atomic_load_explicit(a->counter, memory_order_acquire) >= a->need) return 1;
  if (atomic_load_explicit(&e->error, memory_order_acquire)) return 1;
  if (atomic_load_explicit(&e->told, memory_order_acquire)) {
    /* Once more: it may have come before that was told. */
    if (atomic_load_explicit(a->counter, memory_order_acquire) < a->need) hfr_engine_believe(e);
    return 1;
  }
  const struct hfr_rank_ctrl *c = &e->arena->ctrl[a->local];
  if (atomic_load_explicit(&c->start, memory_order_acquire) == a->request->fp.seq &&
      !hfr_fingerprint_equal(&c->fp[a->request->fp.seq & 1], &a->request->fp)) {
    struct hfr_fingerprint theirs = c->fp[a->request->fp.seq & 1];
    hfr_fail_mismatch(e, &a->request->fp, hfr_rank_at(e->layout, e->layout->node, a->local), &theirs);
    return 1;
  }
  return 0;
}

enum outcome { FAILED, INTERRUPTED, CAME };

/* Is there more to do than to wait? Another thread has launched what nobody but the driver takes up, and what the peers may
 * need before they come here; or patience is over. Asked once the wait has become a sleep. */
static int interrupted(const struct hfr_engine *e, const struct awaited *a) {
  return atomic_load_explicit(&e->inbox_full, memory_order_relaxed) || hfr_now_ns() > *a->give_up_ns;
}

static enum outcome await(struct hfr_engine *e, struct awaited *a) {
  struct hfr_backoff b = {0};
  if (atomic_load_explicit(a->counter, memory_order_acquire) >= a->need) return CAME;
  while (!arrived(e, a)) {
    if (!a->request->deadline_ns) {
      int64_t now = hfr_now_ns();
      a->request->deadline_ns = a->request->timeout_ns > 0 ? now + a->request->timeout_ns : INT64_MAX;
      a->request->speak_ns = 0;
      *a->give_up_ns = e->patience_ns > 0 ? now + e->patience_ns : INT64_MAX;
    }
    if (b.idle > e->spins + e->yields && interrupted(e, a)) return INTERRUPTED;
    e->queue = a->request; /* hfr_engine_check looks at the head of the queue; nobody else drives */
    hfr_backoff_wait(e, &b, arrived, a);
    e->queue = NULL;
  }
  return atomic_load_explicit(&e->error, memory_order_acquire) ? FAILED : CAME;
}

/* All peers have taken what lay in the slot that comes next. */
static enum outcome slot_free(struct hfr_engine *e, struct hfr_request *r, int64_t *give_up_ns) {
  uint64_t need = r->base + 1 - (uint64_t)e->geometry.slots;
  if (e->out_known >= need) return CAME; /* saves the loop, which would find the same */
  for (int i = 0; i < e->arena->nlocal; i++) {
    struct awaited a = {r, give_up_ns, &e->arena->ctrl[i].out, need, i};
    enum outcome o = i == e->arena->local ? CAME : await(e, &a);
    if (o != CAME) return o;
  }
  return CAME;
}

/* ---------------------------------------------------------------- what goes in, and what is made of it */

/* Bytes that a rank stages, the same on all; -1: the call is not small, or of another kind. */
static int64_t staged_bytes(const struct hfr_engine *e, const struct hfr_call *call) {
  int n = e->arena->nlocal;
  const struct hfr_shape *shape = hfr_shape(call);
  if (!shape->small) return -1;
  if (!shape->send) return 0; /* a barrier */
  int64_t limit = hfr_oneshot_bytes(&e->geometry, hfr_root_sends(call) ? 1 : n);
  int blocks = shape->send == HFR_ROWS ? n : 1;
  if (blocks > 1) {
    int64_t block = (int64_t)hfr_block_bytes(&e->geometry, n, hfr_dtype_size(call->dtype));
    if (block < limit) limit = block;
  }
  if (!call->count || call->count > (size_t)limit || call->premul || call->sendcounts) return -1;
  int64_t bytes = (int64_t)(call->count * hfr_dtype_size(call->dtype));
  return bytes <= limit ? bytes * blocks : -1;
}

int hfr_oneshot_takes(const struct hfr_engine *e, const struct hfr_call *call) {
  return e->layout->nnodes == 1 && staged_bytes(e, call) >= 0;
}

/* What is mine, of several blocks, nobody else reads: what lies before and behind it goes in. */
static void put_in(struct hfr_engine *e, const struct hfr_call *call, const struct hfr_request *r, size_t bytes) {
  struct hfr_arena *a = e->arena;
  size_t per = call->count * hfr_dtype_size(call->dtype);
  size_t before = per < bytes ? per * (size_t)a->local : bytes, after = per < bytes ? before + per : bytes;
  uint8_t *slot = hfr_arena_in(a, a->local, r->base) + r->place;
  if (hfr_root_sends(call) && call->root != e->layout->rank) return;
  if (bytes >= HFR_ROTATED_MIN) hfr_arena_warm(a, HFR_WARM_IN);
  hfr_writer_copy(&a->writer, slot, call->send, before);
  if (after < bytes) hfr_writer_copy(&a->writer, slot + after, (const uint8_t *)call->send + after, bytes - after);
}

static void reduce_all(struct hfr_engine *e, const struct hfr_call *call) {
  int n = e->arena->nlocal, avg = call->op == hfreduceAvg;
  struct hfr_scale scale = {.div = avg ? (uint64_t)n : 0};
  hfr_reduce(call->recv, e->sources, n, call->count, call->dtype, avg ? HFR_OP_SUM : (enum hfr_op)call->op, &scale);
}

static void copy_unless_there(void *dst, const void *src, size_t bytes) {
  if (dst != src) memcpy(dst, src, bytes);
}

/* e->sources: the slots. */
static void take_out(struct hfr_engine *e, const struct hfr_call *call) {
  const struct hfr_shape *shape = hfr_shape(call);
  int me = e->layout->rank, n = e->arena->nlocal, rows = hfr_rows_of(call, 1, me, n), many = shape->send == HFR_ROWS;
  size_t per = call->count * hfr_dtype_size(call->dtype), mine = many ? per * (size_t)me : 0;
  if (!rows) return; /* a barrier, or the root's alone */
  if (shape->reduces) {
    for (int i = 0; many && i < n; i++)
      e->sources[i] = (i == me ? (const uint8_t *)call->send : (const uint8_t *)e->sources[i]) + mine;
    reduce_all(e, call);
    return;
  }
  int first = hfr_root_sends(call) ? call->root : 0, last = hfr_root_sends(call) ? first : n - 1;
  for (int i = first; i <= last; i++) {
    const uint8_t *from = (i == me ? (const uint8_t *)call->send : (const uint8_t *)e->sources[i]) + mine;
    copy_unless_there((uint8_t *)call->recv + (rows > 1 ? per * (size_t)i : 0), from, per);
  }
}

/* ---------------------------------------------------------------- the exchange */

/* *copied: the data lies in the arena, and the others may have seen it. */
static enum outcome exchange(struct hfr_engine *e, const struct hfr_call *call, struct hfr_request *r, size_t bytes,
                             int *copied) {
  struct hfr_arena *a = e->arena;
  struct hfr_rank_ctrl *me = &a->ctrl[a->local];
  int64_t give_up_ns = 0;
  me->fp[r->fp.seq & 1] = r->fp;
  atomic_store_explicit(&me->start, r->fp.seq, memory_order_release);
  if (bytes) {
    enum outcome o = slot_free(e, r, &give_up_ns);
    if (o != CAME) return o;
    put_in(e, call, r, bytes);
    atomic_store_explicit(&me->in, r->base + 1,
                          memory_order_release); /* pairs with await() and counter_reached(): slot and fingerprint are whole */
    *copied = 1;
  }
  hfr_arena_notify(a);
  for (int i = 0; i < a->nlocal; i++) {
    e->sources[i] = hfr_arena_in(a, i, r->base) + r->place;
    if (i == a->local) continue;
    struct awaited w = {r, &give_up_ns, bytes ? &a->ctrl[i].in : &a->ctrl[i].start, bytes ? r->base + 1 : r->fp.seq, i};
    enum outcome o = await(e, &w);
    if (o != CAME) return o;
    const struct hfr_fingerprint *theirs = &a->ctrl[i].fp[r->fp.seq & 1];
    if (!hfr_fingerprint_equal(theirs, &r->fp)) {
      struct hfr_fingerprint copy = *theirs;
      hfr_fail_mismatch(e, &r->fp, hfr_rank_at(e->layout, e->layout->node, i), &copy);
      return FAILED;
    }
  }
  e->out_known = r->base;
  take_out(e, call);
  if (!bytes) return CAME;
  atomic_store_explicit(&me->red, r->base + 1, memory_order_relaxed);
  /* Pairs with slot_free(). No notify, which is a fence: who sleeps for this slot needs my next operation as well, and that one
   * notifies. */
  atomic_store_explicit(&me->out, r->base + 1, memory_order_release);
  if (bytes >= HFR_ROTATED_MIN) hfr_arena_used(a);
  return CAME;
}

enum hfr_oneshot hfr_oneshot(struct hfr_engine *e, const struct hfr_call *call, hfreduceResult_t *result) {
  int idle = 0;
  int64_t bytes = e->layout->nnodes == 1 ? staged_bytes(e, call) : -1;
  if (bytes < 0 || atomic_load_explicit(&e->active, memory_order_acquire) ||
      !atomic_compare_exchange_strong_explicit(&e->driver, &idle, 1, memory_order_acquire, memory_order_relaxed))
    return HFR_ONESHOT_NO;
  if (atomic_load_explicit(&e->active, memory_order_acquire)) { /* a graph has launched something meanwhile */
    hfr_drive_end(e);
    return HFR_ONESHOT_NO;
  }
  if (e->layout->nlocal == 1) {
    if (bytes) copy_unless_there(call->recv, call->send, (size_t)bytes);
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
  r.fp = hfr_call_fingerprint(call);
  r.fp.seq = ++e->seq;
  r.base = e->base;
  r.place = hfr_slot_place(&e->geometry, r.base, (size_t)bytes);
  r.timeout_ns = e->timeout_ns;
  r.deadline_ns = 0; /* looked up when a wait gets long: reading the clock costs as much as the exchange */
  r.started = 1;
  r.verified = 0;
  int copied = 0;
  enum outcome outcome = exchange(e, call, &r, (size_t)bytes, &copied);
  if (outcome == INTERRUPTED) return copied ? HFR_ONESHOT_COPIED : HFR_ONESHOT_BEGUN;
  e->base += bytes > 0;
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
