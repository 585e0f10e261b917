/* Segments of requests that work on a device's memory: opened, found, passed. */
#include "window.h"

#include "../base/thread.h"
#include "engine.h"
#include "internal.h"

#include <limits.h>
#include <stdlib.h>

#define LAST INT_MAX /* a stage that touches no user memory, or has ended */

static int cyclic_reached(uint32_t now, uint32_t value) { return (int32_t)(now - value) >= 0; }

int hfr_window_rows(const struct hfr_plan *p, int recv) {
  const struct hfr_call *c = &p->call;
  return c->count || c->sendcounts ? hfr_rows_of(c, recv, p->layout->rank, p->layout->nranks) : 0;
}

size_t hfr_window_unit(const struct hfr_plan *p) {
  int by_messages = !p->nchunks || p->layout->nranks == 1;
  return by_messages ? p->geometry.chunk : p->elems * p->esize; /* a chunk holds whole messages, also those between local ranks */
}

/* ---------------------------------------------------------------- open, found */

int hfr_window_reach(struct hfr_window *w, int s) {
  for (; w->opened <= s && w->opened < w->nsegs; w->opened++) {
    const struct hfr_segment *g = &w->segment[w->opened];
    if (!cyclic_reached(atomic_load_explicit(g->ready, memory_order_acquire), g->ready_value)) return 0;
    if (g->taken && !cyclic_reached(atomic_load_explicit(g->taken, memory_order_acquire), g->taken_value)) return 0;
    if (w->small[0].mapping) hfr_mapping_read(w->small[0].mapping, g->in, w->small[0].user, w->small[0].bytes);
  }
  return 1;
}

/* Row and offset in it of an offset in a buffer. */
static size_t row_of(const struct hfr_request *r, int recv, size_t *off) {
  size_t row = r->window->row[recv], i = 0;
  if (row == SIZE_MAX) return 0;
  if (row) {
    i = *off / row;
    *off %= row;
    return i;
  }
  const struct hfr_call *c = &r->plan.call;
  const size_t *at = recv ? c->recvdispls : c->senddispls, *count = recv ? c->recvcounts : c->sendcounts;
  size_t n = (size_t)r->plan.layout->nranks, element = *off / r->plan.esize;
  while (i < n && (element < at[i] || element >= at[i] + count[i])) i++;
  *off = i < n ? *off - at[i] * r->plan.esize : 0; /* not found: an empty block */
  return i < n ? i : 0;
}

int hfr_window_segment(const struct hfr_request *r, int recv, size_t off) {
  row_of(r, recv, &off);
  size_t s = off / r->window->bytes;
  return s < (size_t)r->window->nsegs ? (int)s : r->window->nsegs - 1;
}

uint8_t *hfr_window_place(const struct hfr_request *r, int recv, size_t off) {
  const struct hfr_window *w = r->window;
  const struct hfr_segment *g = &w->segment[hfr_window_segment(r, recv, off)];
  uint8_t *area = recv ? g->out : g->in;
  if (!area) return (recv ? (uint8_t *)r->plan.call.recv : (uint8_t *)(uintptr_t)r->plan.call.send) + off;
  size_t row = row_of(r, recv, &off);
  return area + row * w->bytes + (off - (size_t)(g - w->segment) * w->bytes);
}

/* ---------------------------------------------------------------- passed */

/* Does the location lie in a user's buffer? Then *s grows to its segment, unless nothing is there. */
static int touches(const struct hfr_request *r, const struct hfr_loc *l, size_t bytes, int *s) {
  if (l->space != HFR_SEND && l->space != HFR_RECV) return 0;
  if (bytes) {
    int at = hfr_window_segment(r, l->space == HFR_RECV, l->off);
    if (at > *s) *s = at;
  }
  return 1;
}

/* As hfr_window_of_step; *touched tells whether the stage works on user memory at all. */
static int look(const struct hfr_request *r, int stage, int64_t i, const struct hfr_step *step, int *touched) {
  int kind = r->plan.stage[stage].kind, s = -1;
  *touched = 0;
  if (kind == HFR_STAGE_SEND) *touched |= touches(r, &step->src, step->bytes, &s);
  if (kind == HFR_STAGE_RECV || kind == HFR_STAGE_REDUCE) *touched |= touches(r, &step->dst, step->bytes, &s);
  for (int j = 0; (kind == HFR_STAGE_COPY || kind == HFR_STAGE_REDUCE) && j < step->nparts; j++) {
    struct hfr_part p;
    r->plan.part(&r->plan, stage, i, j, &p);
    *touched |= touches(r, &p.src, kind == HFR_STAGE_COPY ? p.bytes : step->bytes, &s);
    if (kind == HFR_STAGE_COPY) *touched |= touches(r, &p.dst, p.bytes, &s);
  }
  return s;
}

int hfr_window_of_step(const struct hfr_request *r, int stage, int64_t i, const struct hfr_step *step) {
  int touched;
  return look(r, stage, i, step, &touched);
}

/* Where a stage stands now. */
static int stands_at(const struct hfr_request *r, int stage, int before) {
  const struct hfr_stage *st = &r->plan.stage[stage];
  const struct hfr_cursor *c = &r->cursor[stage];
  struct hfr_step step = {0};
  int touched;
  if (c->done >= st->niter) return LAST;
  r->plan.step(&r->plan, stage, c->done, &step);
  int s = look(r, stage, c->done, &step, &touched);
  return !touched ? LAST : s > before ? s : before;
}

void hfr_window_begin(struct hfr_request *r) {
  for (int s = 0; s < r->plan.nstages; s++) r->cursor[s].at = stands_at(r, s, 0);
}

void hfr_window_move(struct hfr_request *r, int stage) {
  int at = r->cursor[stage].at, low = LAST;
  if (at == LAST) return;
  r->cursor[stage].at = stands_at(r, stage, at);
  if (r->cursor[stage].at == at) return;
  for (int s = 0; s < r->plan.nstages; s++)
    if (r->cursor[s].at < low) low = r->cursor[s].at;
  hfr_window_pass(r->window, low);
}

/* Never backwards: the word of a slot in the ring may have been moved on already when requests end out of order. */
static void raise_word(struct hfr_window *w, _Atomic uint32_t *word, uint32_t value) {
  if (cyclic_reached(atomic_load_explicit(word, memory_order_relaxed), value)) return;
  atomic_store_explicit(word, value, memory_order_release); /* pairs with the device's wait: the result is whole */
  if (w->wake) hfr_futex_wake(word, INT32_MAX);
}

void hfr_window_pass(struct hfr_window *w, int low) {
  if (w->small[1].mapping && w->passed < low && w->passed < w->opened)
    hfr_mapping_write(w->small[1].mapping, w->small[1].user, w->segment[0].out, w->small[1].bytes);
  for (; w->passed < low && w->passed < w->nsegs; w->passed++) {
    struct hfr_segment *g = &w->segment[w->passed];
    if (w->again) atomic_store_explicit(g->ready, 0, memory_order_relaxed); /* before the graph can go on to its end */
    for (int recv = 0; recv < 2; recv++)
      if (g->done[recv] && (recv || !g->lent)) raise_word(w, g->done[recv], g->value);
  }
  while (hfr_window_owed(w) && !w->segment[w->back].lent) w->back++;
}

int hfr_window_give_back(struct hfr_window *w, uint64_t taken_out) {
  int before = w->back;
  for (; hfr_window_owed(w) && w->segment[w->back].lent <= taken_out; w->back++) {
    struct hfr_segment *g = &w->segment[w->back];
    if (g->lent && g->done[0]) raise_word(w, g->done[0], g->value);
  }
  return w->back != before;
}

void hfr_window_release(struct hfr_window *w, int whole) {
  if (!whole) w->opened = 0; /* no user's memory is written: the stream may not have got to the call, or the memory be gone */
  hfr_window_pass(w, LAST);
  hfr_window_give_back(w, UINT64_MAX);
}

void hfr_window_free(struct hfr_window *w) {
  if (!w) return;
  for (int recv = 0; recv < 2; recv++) hfr_mapping_put(w->small[recv].mapping);
  free(w);
}
