/* Captured calls: requests that run anew each time the device launches their graph. */
#include "engine.h"
#include "internal.h"

#include <stdlib.h>

void hfr_engine_arm(struct hfr_engine *e, struct hfr_request *r) {
  if (!r->replay->listed) {
    r->replay->listed = 1;
    atomic_fetch_add_explicit(&e->armed, 1, memory_order_relaxed);
  }
  hfr_engine_submit(e, r);
}

void hfr_replay_add(struct hfr_engine *e, struct hfr_request *r) {
  struct hfr_replay *p = r->replay, **at = &e->replays;
  while (*at && *at != p) at = &(*at)->next;
  if (!*at) { /* graphs in the order of their capture */
    p->next = NULL;
    *at = p;
  }
  if (p->n == p->cap) {
    int cap = p->cap ? 2 * p->cap : 8;
    struct hfr_request **grown = realloc(p->request, (size_t)cap * sizeof *grown);
    if (!grown) {
      hfr_fail_request(e, r, "capture", -1, hfreduceSystemError, "out of memory for a captured call");
      hfr_window_release(r->window, 0);
      return;
    }
    p->request = grown;
    p->cap = cap;
  }
  p->request[p->n++] = r;
}

void hfr_replay_ring(void *replay) {
  struct hfr_replay *p = replay;
  atomic_fetch_add_explicit(&p->rung, 1, memory_order_release); /* pairs with is_due() */
  hfr_drive_kick();
}

/* Has it been launched, or may it have been, and is not at its end yet? */
static int is_due(const struct hfr_replay *p) {
  return !p->bell || p->cursor || (int32_t)(atomic_load_explicit(&p->rung, memory_order_acquire) - p->replayed) > 0;
}

/* From the beginning, as if it had just been issued. */
static void issue(struct hfr_engine *e, struct hfr_request *r) {
  r->started = r->verified = r->reported = r->left = 0;
  r->running = 1;
  r->next = NULL;
  atomic_fetch_add_explicit(&e->active, 1, memory_order_relaxed);
  atomic_fetch_add_explicit(&e->calls, 1, memory_order_relaxed);
  hfr_window_count(e, 1);
  if (r->plan.call.coll == HFR_P2P) {
    hfr_p2p_post(e, r);
    return;
  }
  r->next = e->queue; /* in front of what still waits for its stream: by the order of streams that comes after the graph */
  if (!e->queue) e->queue_tail = &r->next;
  e->queue = r;
}

/* Has the graph launched this request? Then its window begins anew. */
static int launched(struct hfr_request *r) {
  struct hfr_window *w = r->window;
  if (r->running) return 0;
  w->opened = 0;
  if (!hfr_window_reach(w, 0)) return 0;
  w->passed = w->back = 0;
  return 1;
}

static void forget(struct hfr_engine *e, struct hfr_replay *p) {
  for (int i = 0; i < p->n; i++) {
    struct hfr_request *r = p->request[i];
    r->replay = NULL;
    hfr_request_put(e, r);
  }
  free(p->request);
  atomic_fetch_sub_explicit(&e->armed, 1, memory_order_relaxed);
  p->ended(p->arg);
}

static int any_running(const struct hfr_replay *p) {
  for (int i = 0; i < p->n; i++)
    if (p->request[i]->running) return 1;
  return 0;
}

int hfr_replay_poll(struct hfr_engine *e) {
  int moved = 0, broken = atomic_load_explicit(&e->error, memory_order_relaxed);
  uint32_t due = 0;
  for (struct hfr_replay **at = &e->replays; *at;) {
    struct hfr_replay *p = *at;
    if (atomic_load_explicit(&p->dead, memory_order_acquire) && !any_running(p)) {
      *at = p->next;
      forget(e, p);
      moved = 1;
      continue;
    }
    for (int left = p->n; left > 0; left--) {
      struct hfr_request *r = p->request[p->cursor];
      int busy = r->plan.call.coll != HFR_P2P && e->queue && (e->queue->started || hfr_request_ready(e->queue));
      if (busy || !launched(r)) break;
      /* Launched, so captured to the end: what the inbox still has of it belongs to this launch, too. */
      if (atomic_load_explicit(&e->inbox_full, memory_order_acquire)) break;
      if (broken)
        hfr_window_release(r->window, 0); /* the graph gets to its end; its results are void */
      else
        issue(e, r);
      p->cursor = (p->cursor + 1) % p->n;
      p->replayed += p->cursor == 0;
      moved = 1;
    }
    due += (uint32_t)is_due(p);
    at = &p->next;
  }
  atomic_store_explicit(&e->due, due, memory_order_relaxed);
  return moved;
}

void hfr_replay_fini(struct hfr_engine *e) {
  while (e->replays) {
    struct hfr_replay *p = e->replays;
    e->replays = p->next;
    for (int i = 0; i < p->n; i++) hfr_window_release(p->request[i]->window, 0);
    forget(e, p);
  }
}
