/*
 * Two ranks whose devices push segments into each other's memory.
 *
 *   device here      push ──► "ready" ┐                        ┌ "done" ──► it may use what arrived
 *   engine here                       └► pushed ──► partner's ─┘
 *
 * A device cannot tell by itself what has arrived in its memory, and words that one process' device waits for and another
 * process' device writes could not be called back when a rank dies. So the engines pass the word on: both have pushed segment k,
 * then both are let go on. Exchanges run beside all other requests; those of one direction come in the order of the calls.
 */
#include "engine.h"
#include "internal.h"

void hfr_pairing_post(struct hfr_engine *e, struct hfr_request *r) {
  *e->p2p_tail = r;
  e->p2p_tail = &r->next;
  r->verified = 1; /* the operation that it is a part of is, by a request of its own */
  r->left = 1;
}

int hfr_pairing_progress(struct hfr_engine *e, struct hfr_request *r) {
  struct hfr_exchange *x = &r->exchange;
  struct hfr_window *w = r->window;
  _Atomic uint64_t *mine = &e->arena->ctrl[e->arena->local].pushed[x->back];
  int before = x->pushed, passed = w->passed;
  if (!r->started && hfr_request_ready(r)) hfr_request_start(r);
  while (x->pushed < w->nsegs && hfr_window_reach(w, x->pushed)) x->pushed++;
  if (x->pushed > before) {
    /* Not backwards: a device pushes in order, so the next operation may have been seen to be further already. */
    uint64_t now = x->base + (uint64_t)x->pushed;
    if (now > atomic_load_explicit(mine, memory_order_relaxed))
      atomic_store_explicit(mine, now, memory_order_release); /* pairs with the partner's load below */
    hfr_arena_notify(e->arena);
  }
  int64_t theirs = (int64_t)(atomic_load_explicit(&e->arena->ctrl[x->partner].pushed[x->back], memory_order_acquire) - x->base);
  hfr_window_pass(w, theirs < x->pushed ? (int)(theirs > 0 ? theirs : 0) : x->pushed);
  if (w->passed == w->nsegs) r->left = 0;
  return x->pushed > before || w->passed > passed;
}
