/*
 * Launching calls in the order of streams.
 *
 *   out:  s0 s1 s2 s3 │ s4 s5 ...        segments that the device copies out, as many as the ring has at first, then one for
 *   in:               │ s0 s1 ...        each that is copied in: in this order the queues could even be one
 *
 * Collectives go segment by segment, one after the other. Sends and receives go beside them, in rounds: all first segments, then
 * all second ones; within a round by the distance of the peer and the tag, so that what a rank sends in its n-th turn the other
 * receives in its n-th, and no ring can fill up with segments that wait for each other.
 */
#include "staging.h"

#include "pairs.h"

#include "../base/param.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- segments */

/* A segment's turn in the queues. */
struct turn {
  struct hfr_ordered_call *call;
  int segment, in_rounds;
  int64_t round, distance, tag, order; /* the order of turns */
  int in, out;                         /* 1: it uses the slot's half for the send, the receive buffer */
  int copy_in, copy_out, copy_scalar;
  int slot;
  int wait_in; /* before it is copied out, the slot must be done with... */
  uint32_t in_value;
  _Atomic uint32_t *in_word, *taken;
  const struct hfr_pinned *words;
};

/* The calls of one communicator in a launch. */
struct batch {
  struct hfreduceComm *comm;
  struct hfr_ordered_call **call;
  int ncalls, wide;
  struct turn *turn;
  int nturns, went_out, came_in;
  int starts; /* some turns bring nothing out of the device: they begin when it gets to the launch */
  struct hfr_stage_ring *ring;
  struct hfr_captured *captured;
  struct hfr_pinned words; /* captured: of this launch */
  size_t nwords;           /* to be cleared at its end */
  _Atomic uint32_t *clear;
};

struct hfr_streams {
  struct batch *batch;
  int nbatches;
  struct hfr_ordered_call *call;
  int ncalls;
};

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

#define PIECES 8                      /* that a large row is cut in at least, so that both directions overlap */
#define PIECE_MIN ((size_t)256 << 10) /* below, copy engines take their time to start */

/* How a call is cut: bytes of a row in a segment. */
struct cut {
  int rows;
  size_t unit, row[2], longest, bytes;
};

static void measure(const struct hfr_ordered_call *call, struct cut *cut) {
  const struct hfr_plan *p = &call->request->plan;
  *cut = (struct cut){.unit = hfr_window_unit(p), .row = {SIZE_MAX, SIZE_MAX}};
  if (!cut->unit) cut->unit = 1;
  for (int recv = 0; recv < 2; recv++) {
    int rows = hfr_window_rows(p, recv);
    size_t row =
        p->call.sendcounts ? hfr_stream_uneven(&p->call, recv, p->layout->nranks, 0) * p->esize : p->call.count * p->esize;
    if (p->call.sendcounts) cut->row[recv] = 0;
    if (rows > 1 && !p->call.sendcounts) cut->row[recv] = row;
    if (!call->ordered->staged[recv] || !rows) continue;
    if (rows > cut->rows) cut->rows = rows;
    if (row > cut->longest) cut->longest = row;
  }
}

/* Bytes that a slot must hold at least. */
static size_t least(const struct cut *cut) {
  size_t row = cut->longest < cut->unit ? cut->longest : cut->unit;
  return row * (size_t)cut->rows;
}

static void choose_cut(struct cut *cut, size_t slot) {
  if (!cut->rows || !cut->longest) {
    cut->bytes = SIZE_MAX; /* all of it is one segment */
    return;
  }
  size_t fits = slot / (size_t)cut->rows / cut->unit * cut->unit;
  size_t wanted = round_up(cut->longest / PIECES + 1, cut->unit), floor = round_up(PIECE_MIN / (size_t)cut->rows + 1, cut->unit);
  if (wanted < floor) wanted = floor;
  cut->bytes = wanted < fits ? wanted : fits;
  if (cut->bytes >= cut->longest || !cut->bytes) cut->bytes = cut->longest;
}

/* Segments that a call is cut in, and what each takes in a slot. */
static int segments_of(const struct cut *cut) {
  return cut->bytes == SIZE_MAX ? 1 : (int)((cut->longest + cut->bytes - 1) / cut->bytes);
}
static size_t bytes_of(const struct cut *cut) { return cut->bytes == SIZE_MAX ? 0 : cut->bytes * (size_t)cut->rows; }

static hfreduceResult_t make_window(struct hfr_ordered_call *call, const struct cut *cut, const struct hfr_stage_ring *ring) {
  struct hfr_request *r = call->request;
  int n = segments_of(cut);
  struct hfr_window *w = calloc(1, sizeof *w + (size_t)n * sizeof w->segment[0]);
  if (!w) return hfr_fail(hfreduceSystemError, "out of memory for %d segments", n);
  w->bytes = cut->bytes;
  w->row[0] = cut->row[0];
  w->row[1] = cut->row[1];
  w->nsegs = n;
  w->again = call->ordered->stream.capture != 0;
  w->wake = hfr_copier_by_host(call->comm->staging->copier);
  w->lends = ring->lent.host && call->ordered->staged[0];
  for (int recv = 0; recv < 2; recv++) {
    const struct hfr_pinned *m = !recv && ring->lent.host ? &ring->lent : &ring->memory;
    w->memory[recv] = m->host;
    w->memory_bytes[recv] = m->bytes;
  }
  r->window = w;
  atomic_store(&r->holders, 2); /* the engine, and this launch */
  return hfreduceSuccess;
}

/* The buffers of a call that has few bytes: CPUs copy them, unless a graph does it again and again, long after the memory may
 * have become other memory. */
static void map_small(struct hfr_ordered_call *call) {
  const struct hfr_plan *p = &call->request->plan;
  struct hfr_window *w = call->request->window;
  size_t most = (size_t)hfr_param_int(HFR_PARAM_GDR_MAX);
  if (w->nsegs > 1 || w->again || p->call.sendcounts || call->pair.pairs) return;
  for (int recv = 0; recv < 2; recv++) {
    size_t bytes = (size_t)hfr_window_rows(p, recv) * p->call.count * p->esize;
    uint8_t *user = recv ? p->call.recv : (uint8_t *)(uintptr_t)p->call.send;
    if (!call->ordered->staged[recv] || !bytes || bytes > most) continue;
    if (!recv && p->call.coll == HFR_P2P) continue; /* it ends when its data is out, and would have to wait for a CPU */
    if (recv && !hfr_copier_sees_writes(call->comm->staging->copier)) continue;
    w->small[recv] = (struct hfr_small){hfr_mapping_get(user, bytes), user, bytes};
  }
}

/* ---------------------------------------------------------------- turns */

static int by_turn(const void *a, const void *b) {
  const struct turn *x = a, *y = b;
  if (x->in_rounds != y->in_rounds) return y->in_rounds - x->in_rounds;
  if (x->round != y->round) return x->round < y->round ? -1 : 1;
  if (x->distance != y->distance) return x->distance < y->distance ? -1 : 1;
  if (x->tag != y->tag) return x->tag < y->tag ? -1 : 1;
  return x->order < y->order ? -1 : x->order > y->order;
}

static void place_turn(struct turn *t, const struct batch *b, int nth) {
  const struct hfr_call *c = t->call->call;
  int n = b->comm->nranks, rank = b->comm->rank;
  t->in_rounds = c->coll == HFR_P2P;
  if (!t->in_rounds) { /* a collective after the other */
    t->round = nth;
    t->order = t->segment;
    return;
  }
  t->round = t->segment;
  t->distance = c->root == HFR_ANY_SOURCE ? n : c->receiving ? (rank - c->root + n) % n : (c->root - rank + n) % n;
  t->tag = c->tag;
  for (int i = 0; i < nth; i++) { /* the k-th send of a tag beside the k-th receive */
    const struct hfr_call *other = b->call[i]->call;
    t->order += other->coll == HFR_P2P && other->root == c->root && other->receiving == c->receiving && other->tag == c->tag;
  }
  t->order = 2 * t->order + c->receiving;
}

static hfreduceResult_t list_turns(struct batch *b) {
  int n = 0;
  for (int i = 0; i < b->ncalls; i++) n += b->call[i]->request->window->nsegs;
  b->turn = calloc((size_t)n + 1, sizeof *b->turn);
  if (!b->turn) return hfr_fail(hfreduceSystemError, "out of memory for %d segments", n);
  for (int i = 0; i < b->ncalls; i++) {
    struct hfr_ordered_call *call = b->call[i];
    for (int s = 0; s < call->request->window->nsegs; s++) {
      struct turn *t = &b->turn[b->nturns++];
      *t = (struct turn){.call = call, .segment = s};
      const struct hfr_plan *p = &call->request->plan;
      t->in = p->call.coll == HFR_P2P ? !p->call.receiving : hfr_window_rows(p, 0) > 0;
      t->out = p->call.coll == HFR_P2P ? p->call.receiving : hfr_window_rows(p, 1) > 0 || !t->in;
      t->copy_in = call->ordered->staged[0] && hfr_window_rows(p, 0) && !call->request->window->small[0].mapping;
      t->copy_out = call->ordered->staged[1] && hfr_window_rows(p, 1) && !call->request->window->small[1].mapping;
      place_turn(t, b, i);
    }
  }
  qsort(b->turn, (size_t)n, sizeof *b->turn, by_turn);
  return hfreduceSuccess;
}

/* Where the device puts the factor of a premultiplied sum. */
static void place_scalar(struct turn *t, uint8_t *pinned) {
  struct hfr_memory m;
  if (t->segment || !t->call->call->scalar_from) return;
  hfr_memory_of(t->call->call->scalar_from, &m);
  t->call->request->window->scalar = hfr_is_device(&m) ? pinned : (const uint8_t *)t->call->call->scalar_from;
  t->copy_scalar = hfr_is_device(&m);
}

static void place_areas(struct turn *t, const struct hfr_stage_ring *ring) {
  struct hfr_segment *g = &t->call->request->window->segment[t->segment];
  size_t at = (size_t)t->slot * ring->pitch;
  g->in = t->call->ordered->staged[0] ? ring->half[0] + at : NULL;
  g->out = t->call->ordered->staged[1] ? ring->half[1] + at : NULL;
}

/* Turns take the slots of the communicator's ring one after the other, and its words grow. */
static void assign_plain(struct batch *b) {
  struct hfr_stage_ring *ring = b->ring;
  for (int i = 0; i < b->nturns; i++) b->starts |= !b->turn[i].in;
  for (int i = 0; i < b->nturns; i++) {
    struct turn *t = &b->turn[i];
    struct hfr_segment *g = &t->call->request->window->segment[t->segment];
    int s = t->slot = ring->next;
    struct hfr_stage_use *use = &ring->use[s];
    ring->next = (s + 1) % ring->slots;
    place_areas(t, ring);
    place_scalar(t, ring->scalar[s]);
    g->ready = &ring->ready[s];
    g->done[0] = t->in ? &ring->done[0][s] : NULL;
    g->done[1] = t->out ? &ring->done[1][s] : NULL;
    g->value = g->ready_value = ring->turn++;
    if (!t->in) { /* nothing has to come first */
      g->ready = ring->started;
      g->ready_value = ring->starts + 1;
    }
    t->taken = &ring->taken[s];
    t->words = &ring->memory;
    if (t->in) {
      t->wait_in = use->in;
      t->in_word = &ring->done[0][s];
      t->in_value = use->in_value;
      use->in = 1;
      use->in_value = g->value;
    }
    if (t->out) {
      g->taken = use->out ? &ring->taken[s] : NULL;
      g->taken_value = use->out_value;
      use->out = 1;
      use->out_value = g->value;
    }
  }
  ring->starts += (uint32_t)b->starts;
}

/* In a graph every turn has words of its own, which go from 0 to 1 and back in each launch. */
static hfreduceResult_t assign_captured(struct batch *b) {
  size_t n = (size_t)b->nturns;
  HFR_TRY(hfr_staging_words(b->comm->staging, b->captured, n * (3 * sizeof(uint32_t) + 8), &b->words));
  uint8_t(*scalar)[8] = (uint8_t(*)[8])b->words.host;
  _Atomic uint32_t *ready = (_Atomic uint32_t *)(scalar + n), *done = ready + n, *taken = done + n;
  b->clear = done;
  b->nwords = 2 * n;
  for (int i = 0; i < b->nturns; i++) {
    struct turn *t = &b->turn[i];
    struct hfr_segment *g = &t->call->request->window->segment[t->segment];
    t->slot = i % b->ring->slots;
    place_areas(t, b->ring);
    place_scalar(t, scalar[i]);
    g->ready = &ready[i];
    g->done[t->out] = &done[i]; /* raised once only: the graph may be at its end, and have cleared it, a moment later */
    g->value = g->ready_value = g->taken_value = 1;
    t->taken = &taken[i];
    t->words = &b->words;
    for (int before = i - b->ring->slots; t->in && before >= 0 && !t->wait_in; before -= b->ring->slots)
      if (b->turn[before].in) t->wait_in = 1, t->in_value = 1, t->in_word = &done[before];
    for (int before = i - b->ring->slots; t->out && before >= 0 && !g->taken; before -= b->ring->slots)
      if (b->turn[before].out) g->taken = &taken[before];
  }
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- preparing */

/* The ring of a graph: no larger than what its calls need, in which `slot` bytes are the most that a slot may have. */
static hfreduceResult_t make_captured_ring(struct batch *b, int which, size_t slot) {
  struct hfr_staging *s = b->comm->staging;
  int segments = 0, most = hfr_staging_slots(which);
  size_t bytes = 0;
  struct cut cut;
  HFR_TRY(hfr_staging_capture(s, &b->call[0]->ordered->stream, &b->captured));
  for (int i = 0; i < b->ncalls; i++) {
    measure(b->call[i], &cut);
    choose_cut(&cut, slot);
    segments += segments_of(&cut);
    if (bytes_of(&cut) > bytes) bytes = bytes_of(&cut);
  }
  b->ring = &b->captured->ring;
  return hfr_staging_room(s, b->captured, segments < most ? segments : most, round_up(bytes, 64));
}

static hfreduceResult_t prepare_batch(struct batch *b) {
  struct hfr_staging *s = b->comm->staging;
  size_t slot = hfr_staging_slot(b->comm), needs = 0;
  struct cut cut;
  for (int i = 0; i < b->ncalls; i++) {
    measure(b->call[i], &cut);
    if (least(&cut) > needs) needs = least(&cut);
  }
  int which = needs > slot ? HFR_RING_WIDE : HFR_RING_PLAIN;
  if (which == HFR_RING_WIDE) slot = b->comm->engine.geometry.chunk * (size_t)b->comm->nranks;
  if (b->call[0]->ordered->stream.capture) {
    HFR_TRY(make_captured_ring(b, which, slot));
  } else {
    b->ring = &s->ring[which];
    HFR_TRY(hfr_staging_ring(s, which, slot));
  }
  for (int i = 0; i < b->ncalls; i++) {
    const struct hfr_pairs *pairs = b->call[i]->pair.pairs;
    measure(b->call[i], &cut);
    choose_cut(&cut, pairs && pairs->segment < slot ? pairs->segment : slot);
    HFR_TRY(make_window(b->call[i], &cut, b->ring));
    map_small(b->call[i]);
    if (pairs) HFR_TRY(hfr_pairs_prepare(b->call[i], b->call[i]->request->window->nsegs, cut.bytes));
  }
  HFR_TRY(list_turns(b));
  return b->captured ? assign_captured(b) : hfreduceSuccess;
}

/* All in one capture, or none in any: what runs at once and what runs later cannot be one launch. */
static hfreduceResult_t check_captures(const struct hfr_ordered_call *call, int n) {
  for (int i = 1; i < n; i++)
    if (call[i].ordered->stream.capture != call[0].ordered->stream.capture)
      return hfr_fail(
          hfreduceInvalidUsage,
          "hfreduceGroupEnd: %s is on a stream that is captured and %s is not, or in another graph; capture all calls of "
          "a group, or none",
          hfr_stream_name(call[call[i].ordered->stream.capture ? i : 0].call),
          hfr_stream_name(call[call[i].ordered->stream.capture ? 0 : i].call));
  return hfreduceSuccess;
}

/* A host function that waits may keep all others of the process from running: what it waits for must be in the queues before it.
 * So ranks of one communicator, if they share a process, come together: the launch puts all copies out in front of all waits. */
static hfreduceResult_t check_ranks_here(const struct hfr_streams *s, const struct batch *b) {
  if (!hfr_copier_by_host(b->comm->staging->copier)) return hfreduceSuccess;
  int here = hfr_runtime_ranks_here(b->comm), come = 0;
  for (int i = 0; i < s->nbatches; i++) come += s->batch[i].ncalls && s->batch[i].comm->uid.comm_id == b->comm->uid.comm_id;
  if (come >= here) return hfreduceSuccess;
  return hfr_fail(hfreduceInvalidUsage,
                  "%s: rank %d: device %d has no stream memory operations, and this process has %d ranks of the communicator, of "
                  "which %d call; call for all of them in one group of one thread, or give each rank a process of its own",
                  hfr_stream_name(b->call[0]->call), b->comm->rank, hfr_copier_device(b->comm->staging->copier), here, come);
}

static struct batch *batch_of(struct hfr_streams *s, struct hfreduceComm *c) {
  for (int i = 0; i < s->nbatches; i++)
    if (s->batch[i].comm == c) return &s->batch[i];
  s->batch[s->nbatches].comm = c;
  return &s->batch[s->nbatches++];
}

/* The turns of a call of a pair alone, which has no request that they could be counted by. */
static hfreduceResult_t add_alone(struct batch *b, struct hfr_ordered_call *call) {
  struct turn *grown = realloc(b->turn, (size_t)(b->nturns + call->pair.nsegs) * sizeof *grown);
  if (!grown) return hfr_fail(hfreduceSystemError, "out of memory for %d segments", call->pair.nsegs);
  b->turn = grown;
  for (int s = 0; s < call->pair.nsegs; s++) b->turn[b->nturns++] = (struct turn){.call = call, .segment = s};
  return hfreduceSuccess;
}

hfreduceResult_t hfr_streams_prepare(struct hfr_ordered_call *calls, int n, struct hfr_streams **out) {
  HFR_TRY(check_captures(calls, n));
  hfr_staging_sweep();
  struct hfr_streams *s = calloc(1, sizeof *s);
  if (!s || !(s->batch = calloc((size_t)n, sizeof *s->batch))) return free(s), hfr_fail(hfreduceSystemError, "out of memory");
  s->call = calls;
  s->ncalls = n;
  hfreduceResult_t r = hfreduceSuccess;
  for (int i = 0; !r && i < n; i++) {
    struct batch *b = batch_of(s, calls[i].comm);
    if (!b->call && !(b->call = calloc((size_t)n, sizeof *b->call))) r = hfr_fail(hfreduceSystemError, "out of memory");
    if (!r && calls[i].request) b->call[b->ncalls++] = &calls[i];
  }
  for (int i = 0; !r && i < n; i++) {
    int nsegs;
    size_t bytes;
    if (!calls[i].pair.pairs || calls[i].request) continue;
    hfr_pairs_cut(&calls[i], &nsegs, &bytes);
    r = hfr_pairs_prepare(&calls[i], nsegs, bytes);
    if (!r) r = add_alone(batch_of(s, calls[i].comm), &calls[i]);
  }
  for (int i = 0; !r && i < s->nbatches; i++) {
    struct batch *b = &s->batch[i];
    if (!b->ncalls) continue;
    r = check_ranks_here(s, b);
    if (r) break;
    r = hfr_copier_enter(b->comm->staging->copier, b->call[0]->ordered->stream.capture != 0);
    if (r) break;
    r = prepare_batch(b);
    hfr_copier_leave(b->comm->staging->copier);
  }
  if (r)
    hfr_streams_drop(s);
  else
    *out = s;
  return r;
}

void hfr_streams_commit(struct hfr_streams *s) {
  for (int i = 0; i < s->nbatches; i++)
    if (s->batch[i].ncalls && !s->batch[i].captured) assign_plain(&s->batch[i]);
  for (int i = 0; i < s->ncalls; i++)
    if (s->call[i].pair.pairs) hfr_pairs_number(&s->call[i]);
}

void hfr_streams_drop(struct hfr_streams *s) {
  for (int i = 0; i < s->nbatches; i++) {
    free(s->batch[i].call);
    free(s->batch[i].turn);
  }
  free(s->batch);
  free(s);
}

/* ---------------------------------------------------------------- running */

/* Copy segment s of the send buffer to the host, or of the receive buffer to the device. */
static hfreduceResult_t copy_segment(const struct batch *b, const struct turn *t, int recv) {
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

/* To host: those that bring nothing may begin. They never wait behind a copy that waits for room. */
static hfreduceResult_t start(const struct batch *b) {
  struct hfr_copier *copier = b->comm->staging->copier;
  if (b->starts) return hfr_copier_write(copier, HFR_TO_HOST, &b->ring->memory, b->ring->started, b->ring->starts);
  for (int i = 0; b->captured && i < b->nturns; i++) {
    const struct turn *t = &b->turn[i];
    if (!t->in) HFR_TRY(hfr_copier_write(copier, HFR_TO_HOST, t->words, t->call->request->window->segment[t->segment].ready, 1));
  }
  return hfreduceSuccess;
}

/* All calls of the batch are over pairs of devices: of a half. */
static int is_paired(const struct batch *b) { return b->nturns && b->turn[0].call->pair.pairs; }

/* To host: wait for room, copy, say ready. */
static hfreduceResult_t bring_out(const struct batch *b, const struct turn *t) {
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

/* A pair pushes the next segment ahead, but that of another call only behind all of this one: the exchanges of two calls would
 * get in each other's way. */
static hfreduceResult_t go_out(const struct batch *b, int i) {
  const struct turn *t = &b->turn[i], *next = is_paired(b) && i + 1 < b->nturns ? t + 1 : NULL;
  if (next && next->call == t->call) HFR_TRY(hfr_pairs_push(next->call, next->segment));
  HFR_TRY(bring_out(b, t));
  return next && next->call != t->call ? hfr_pairs_push(next->call, next->segment) : hfreduceSuccess;
}

/* What a send has brought out is the user's again. A graph waits for it: it may be launched again at once. */
static int ends_outside(const struct batch *b, const struct turn *t) { return t->in_rounds && t->copy_in && !b->captured; }

/* To device: wait until the host is done, copy, say taken. */
static hfreduceResult_t bring_in(const struct batch *b, const struct turn *t) {
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

static hfreduceResult_t come_in(const struct batch *b, int i) {
  const struct turn *t = &b->turn[i], *last = is_paired(b) && i > 0 ? t - 1 : NULL;
  if (last && last->call != t->call) HFR_TRY(hfr_pairs_take(last->call, last->segment));
  HFR_TRY(bring_in(b, t));
  return last && last->call == t->call ? hfr_pairs_take(last->call, last->segment) : hfreduceSuccess;
}

enum phase { BEGIN, START, FILL, STEP, END };

/* The queue in which the launch ends. One of sends alone must not end behind receives that were called before it: what they wait
 * for may come only after it. */
static enum hfr_queue last_queue(const struct batch *b) {
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

static hfreduceResult_t begin_or_end(const struct hfr_streams *s, struct batch *b, int end) {
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
    HFR_TRY(end ? hfr_copier_before(copier, last, c->ordered->stream.handle)
                : hfr_copier_after(copier, c->ordered->stream.handle));
  }
  if (end || !b->captured || b->captured->replay.bell || hfr_copier_by_host(copier)) return hfreduceSuccess;
  b->captured->replay.bell = 1; /* not by host functions: it would wait behind those that wait */
  return hfr_copier_bell(copier, hfr_replay_ring, &b->captured->replay);
}

/* Turns that may go out before the first comes in. */
static int room(const struct batch *b) {
  int slots = b->ring ? b->ring->slots : HFR_PAIR_DEPTH;
  return slots < b->nturns ? slots : b->nturns;
}

static hfreduceResult_t run_phase(const struct hfr_streams *s, struct batch *b, enum phase phase) {
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
    struct batch *b = &s->batch[i];
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
