/*
 * Putting a prepared launch into the queues.
 *
 *   out:  s0 s1 s2 s3 │ s4 s5 ...        segments that the device copies out, as many as the ring has at first, then one for
 *   in:               │ s0 s1 ...        each that is copied in: in this order the queues could even be one
 */
#include "stream_launch.h"

#include <stdio.h>

/* Copy segment s of the send buffer to the host, or of the receive buffer to the device. */
static hfreduceResult_t copy_segment(const struct hfr_batch *b, const struct hfr_turn *t, int recv) {
  const struct hfr_request *r = t->call->request;
  const struct hfr_window *w = r->window;
  const struct hfr_call *c = &r->plan.call;
  struct hfr_copier *copier = b->comm->staging->copier;
  enum hfr_queue queue = recv ? HFR_TO_DEVICE : HFR_TO_HOST;
  uint8_t *area = recv ? w->segment[t->segment].out : w->segment[t->segment].in;
  uintptr_t user = (uintptr_t)(recv ? c->recv : c->send);
  size_t esize = r->plan.esize, at = (size_t)t->segment * w->bytes, row = c->count * esize;
  if (!c->sendcounts) {
    size_t width = row - at < w->bytes ? row - at : w->bytes;
    return hfr_copier_copy(copier, queue, area, w->bytes, user + at, row, width, (size_t)hfr_window_rows(&r->plan, recv));
  }
  for (int i = 0; i < b->comm->nranks; i++) {
    size_t bytes = (recv ? c->recvcounts : c->sendcounts)[i] * esize, start = (recv ? c->recvdispls : c->senddispls)[i] * esize;
    if (bytes <= at) continue;
    size_t width = bytes - at < w->bytes ? bytes - at : w->bytes;
    HFR_TRY(hfr_copier_copy(copier, queue, area + (size_t)i * w->bytes, width, user + start + at, width, width, 1));
  }
  return hfreduceSuccess;
}

/* To host: the launch has started, and those that bring nothing may begin. They never wait behind a copy that waits for room. */
static hfreduceResult_t start(const struct hfr_batch *b) {
  struct hfr_copier *copier = b->comm->staging->copier;
  if (b->starts) return hfr_copier_write(copier, HFR_TO_HOST, &b->ring->memory, b->ring->started, b->ring->starts);
  for (int i = 0; b->captured && i < b->nturns; i++) {
    const struct hfr_turn *t = &b->turn[i];
    if (!t->in) HFR_TRY(hfr_copier_write(copier, HFR_TO_HOST, t->words, t->call->request->window->segment[t->segment].ready, 1));
  }
  return hfreduceSuccess;
}

/* All calls of the batch are over pairs of devices: of a half. */
static int is_paired(const struct hfr_batch *b) { return b->nturns && b->turn[0].call->pair.pairs; }

/* To host: wait for room, copy, say ready. */
static hfreduceResult_t bring_out(const struct hfr_batch *b, const struct hfr_turn *t) {
  if (is_paired(b) && !t->call->request) return hfr_pairs_out_alone(t->call, t->segment);
  if (!t->in) return hfreduceSuccess;
  struct hfr_copier *copier = b->comm->staging->copier;
  struct hfr_window *w = t->call->request->window;
  const struct hfr_segment *g = &w->segment[t->segment];
  if (t->wait_in) HFR_TRY(hfr_copier_wait(copier, HFR_TO_HOST, t->words, t->in_word, t->in_value));
  if (t->copy_scalar)
    HFR_TRY(hfr_copier_copy(copier, HFR_TO_HOST, (void *)(uintptr_t)w->scalar, 8, (uintptr_t)t->call->call->scalar_from, 8,
                            t->call->call->scalar_bytes, 1));
  if (t->call->pair.pairs)
    HFR_TRY(hfr_pairs_out(t->call, copier, g->in, t->segment));
  else if (t->copy_in)
    HFR_TRY(copy_segment(b, t, 0));
  HFR_TRY(hfr_copier_write(copier, HFR_TO_HOST, t->words, g->ready, g->ready_value));
  return hfr_copier_mark(copier, t->slot);
}

/* A pair pushes the next segment ahead. */
static hfreduceResult_t go_out(const struct hfr_batch *b, int i) {
  const struct hfr_turn *t = &b->turn[i];
  if (is_paired(b) && i + 1 < b->nturns) HFR_TRY(hfr_pairs_push(t[1].call, t[1].segment));
  return bring_out(b, t);
}

/* What a send has brought out is the user's again. A graph waits for it: it may be launched again at once. */
static int ends_outside(const struct hfr_batch *b, const struct hfr_turn *t) {
  return t->in_rounds && t->copy_in && !b->captured;
}

/* To device: wait until the host is done, copy, say taken. */
static hfreduceResult_t bring_in(const struct hfr_batch *b, const struct hfr_turn *t) {
  if (is_paired(b) && !t->call->request) return hfr_pairs_back_alone(t->call, t->segment);
  struct hfr_copier *copier = b->comm->staging->copier;
  const struct hfr_segment *g = &t->call->request->window->segment[t->segment];
  if (ends_outside(b, t)) return hfreduceSuccess;
  if (t->in) HFR_TRY(hfr_copier_follow(copier, t->slot));
  HFR_TRY(hfr_copier_wait(copier, HFR_TO_DEVICE, t->words, g->done[t->out], g->value));
  if (!t->out) return hfreduceSuccess;
  if (t->call->pair.pairs) return hfr_pairs_back(t->call, copier, g->out, t->segment, t->words, t->taken, g->value);
  if (t->copy_out) HFR_TRY(copy_segment(b, t, 1));
  return hfr_copier_write(copier, HFR_TO_DEVICE, t->words, t->taken, g->value);
}

static int first_use_of_stream(const struct hfr_streams *s, int i) {
  for (int j = 0; j < i; j++)
    if (s->call[j].comm == s->call[i].comm && s->call[j].ordered->stream.handle == s->call[i].ordered->stream.handle) return 0;
  return 1;
}

/* ... and takes what its partner has pushed one behind. */
static hfreduceResult_t come_in(const struct hfr_batch *b, int i) {
  const struct hfr_turn *t = &b->turn[i];
  HFR_TRY(bring_in(b, t));
  return is_paired(b) && i > 0 ? hfr_pairs_take(t[-1].call, t[-1].segment) : hfreduceSuccess;
}

enum phase { BEGIN, START, FILL, STEP, END };

/* The queue in which the launch ends. One of sends alone must not end behind receives that were called before it: what they wait
 * for may come only after it. */
static enum hfr_queue last_queue(const struct hfr_batch *b) {
  for (int i = 0; i < b->nturns; i++)
    if (!ends_outside(b, &b->turn[i])) return HFR_TO_DEVICE;
  return HFR_TO_HOST;
}

/* The pair's queues, for a call of a half. */
static hfreduceResult_t begin_or_end_pair(const struct hfr_ordered_call *c, int end) {
  struct hfr_copier *copier = hfr_pair_copier(c->pair.pairs->pair);
  if (!end) return hfr_copier_after(copier, c->ordered->stream.handle);
  HFR_TRY(hfr_copier_join(copier));
  return hfr_copier_before(copier, HFR_TO_DEVICE, c->ordered->stream.handle);
}

static hfreduceResult_t begin_or_end(const struct hfr_streams *s, struct hfr_batch *b, int end) {
  struct hfr_copier *copier = b->comm->staging->copier;
  enum hfr_queue last = last_queue(b);
  if (end && is_paired(b)) HFR_TRY(hfr_pairs_take(b->turn[b->nturns - 1].call, b->turn[b->nturns - 1].segment));
  if (end && b->ncalls && last == HFR_TO_DEVICE) HFR_TRY(hfr_copier_join(copier));
  if (end && b->clear) HFR_TRY(hfr_copier_clear(copier, HFR_TO_DEVICE, &b->words, b->clear, b->nwords));
  for (int i = 0; i < s->ncalls; i++) {
    const struct hfr_ordered_call *c = &s->call[i];
    if (c->comm != b->comm) continue;
    if (c->pair.pairs) HFR_TRY(begin_or_end_pair(c, end));
    if (!end && !c->request && !c->pair.pairs && c->call->count) {
      size_t bytes = c->call->count * hfr_dtype_size(c->call->dtype);
      HFR_TRY(hfr_copier_move(copier, c->ordered->stream.handle, (uintptr_t)c->call->recv, (uintptr_t)c->call->send, bytes));
    }
    if (!b->ncalls || !first_use_of_stream(s, i)) continue;
    HFR_TRY(end      ? hfr_copier_before(copier, last, c->ordered->stream.handle)
            : b->own ? hfr_copier_own(copier, c->ordered->stream.handle)
                     : hfr_copier_after(copier, c->ordered->stream.handle));
  }
  if (end || !b->captured || b->captured->replay.bell || hfr_copier_by_host(copier)) return hfreduceSuccess;
  b->captured->replay.bell = 1; /* not by host functions: it would wait behind those that wait */
  return hfr_copier_bell(copier, hfr_replay_ring, &b->captured->replay);
}

/* Turns that may go out before the first comes in. */
static int room(const struct hfr_batch *b) {
  int slots = b->ring ? b->ring->slots : HFR_PAIR_DEPTH;
  return slots < b->nturns ? slots : b->nturns;
}

static hfreduceResult_t run_phase(const struct hfr_streams *s, struct hfr_batch *b, enum phase phase) {
  switch (phase) {
    case START:
      if (is_paired(b)) HFR_TRY(hfr_pairs_push(b->turn[0].call, b->turn[0].segment));
      return b->ncalls ? start(b) : hfreduceSuccess;
    case FILL: return b->went_out < room(b) ? go_out(b, b->went_out++) : hfreduceSuccess;
    case STEP:
      if (b->came_in < b->nturns) HFR_TRY(come_in(b, b->came_in++));
      return b->went_out < b->nturns ? go_out(b, b->went_out++) : hfreduceSuccess;
    default: return begin_or_end(s, b, phase == END);
  }
}

/* The queues have all: ordinary requests are the engine's alone now. Captured ones run from now on; if they could not be
 * captured, they are undone. */
static void let_go(const struct hfr_streams *s, int failed) {
  for (int i = 0; i < s->ncalls; i++) {
    struct hfr_ordered_call *c = &s->call[i];
    for (int back = 0; c->pair.pairs && back < 2; back++) hfr_request_let_go(&c->pair.whole->engine, c->pair.exchange[back]);
    if (!c->request) continue;
    if (!c->ordered->stream.capture)
      hfr_request_let_go(&c->comm->engine, c->request);
    else if (failed)
      hfr_request_put(&c->comm->engine, c->request);
    else
      hfr_staging_arm(c->comm, c->comm->staging->captured, c->request);
  }
}

/* One phase on all communicators, in turn. *more: FILL and STEP do one segment of each, and some are left. An error tells where
 * it came from. */
static hfreduceResult_t run_all(const struct hfr_streams *s, enum phase phase, int *more) {
  int capturing = s->call[0].ordered->stream.capture != 0;
  *more = 0;
  for (int i = 0; i < s->nbatches; i++) {
    struct hfr_batch *b = &s->batch[i];
    struct hfr_copier *copier = b->comm->staging->copier;
    hfreduceResult_t r = hfr_copier_enter(copier, capturing);
    if (!r) {
      r = run_phase(s, b, phase);
      hfr_copier_leave(copier);
    }
    if (r) {
      hfreduceErrorInfo_t *why = hfr_last_error();
      why->rank = b->comm->rank;
      snprintf(why->op, sizeof why->op, "%s", hfr_coll_name(s->call[0].call->coll));
      snprintf(why->phase, sizeof why->phase, "launch");
      return r;
    }
    *more |= phase == FILL ? b->went_out < room(b) : b->came_in < b->nturns;
  }
  return hfreduceSuccess;
}

hfreduceResult_t hfr_streams_run(struct hfr_streams *s) {
  int capturing = s->call[0].ordered->stream.capture != 0, more;
  hfreduceResult_t result = run_all(s, BEGIN, &more);
  if (!result) result = run_all(s, START, &more);
  for (more = 1; !result && more;) result = run_all(s, FILL, &more);
  for (more = 1; !result && more;) result = run_all(s, STEP, &more);
  if (!result) result = run_all(s, END, &more);
  hfreduceErrorInfo_t why = *hfr_last_error();
  let_go(s, result != hfreduceSuccess);
  /* What is in the queues already waits for this rank's part, here and elsewhere: only an error ends that. */
  for (int i = 0; result && !capturing && i < s->nbatches; i++) hfr_engine_fail(&s->batch[i].comm->engine, &why);
  if (result) *hfr_last_error() = why;
  hfr_streams_drop(s);
  return result;
}
