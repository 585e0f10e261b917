/*
 * Preparing a launch of calls in the order of streams: how they are cut into segments, and in which order these take their turns.
 *
 * Collectives go segment by segment, one after the other. Sends and receives go beside them, in rounds: all first segments, then
 * all second ones; within a round by the distance of the peer and the tag, so that what a rank sends in its n-th turn the other
 * receives in its n-th, and no ring can fill up with segments that wait for each other.
 */
#include "stream_launch.h"

#include "../base/log.h"
#include "../base/param.h"

#include <stdlib.h>

/* ---------------------------------------------------------------- segments */

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
  const struct hfr_turn *x = a, *y = b;
  if (x->in_rounds != y->in_rounds) return y->in_rounds - x->in_rounds;
  if (x->round != y->round) return x->round < y->round ? -1 : 1;
  if (x->distance != y->distance) return x->distance < y->distance ? -1 : 1;
  if (x->tag != y->tag) return x->tag < y->tag ? -1 : 1;
  return x->order < y->order ? -1 : x->order > y->order;
}

static void place_turn(struct hfr_turn *t, const struct hfr_batch *b, int nth) {
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

static hfreduceResult_t list_turns(struct hfr_batch *b) {
  int n = 0;
  for (int i = 0; i < b->ncalls; i++) n += b->call[i]->request->window->nsegs;
  b->turn = calloc((size_t)n + 1, sizeof *b->turn);
  if (!b->turn) return hfr_fail(hfreduceSystemError, "out of memory for %d segments", n);
  for (int i = 0; i < b->ncalls; i++) {
    struct hfr_ordered_call *call = b->call[i];
    for (int s = 0; s < call->request->window->nsegs; s++) {
      struct hfr_turn *t = &b->turn[b->nturns++];
      *t = (struct hfr_turn){.call = call, .segment = s};
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
static void place_scalar(struct hfr_turn *t, uint8_t *pinned) {
  struct hfr_memory m;
  if (t->segment || !t->call->call->scalar_from) return;
  hfr_memory_of(t->call->call->scalar_from, &m);
  t->call->request->window->scalar = hfr_is_device(&m) ? pinned : (const uint8_t *)t->call->call->scalar_from;
  t->copy_scalar = hfr_is_device(&m);
}

static void place_areas(struct hfr_turn *t, const struct hfr_stage_ring *ring) {
  struct hfr_segment *g = &t->call->request->window->segment[t->segment];
  size_t at = (size_t)t->slot * ring->pitch;
  g->in = t->call->ordered->staged[0] ? ring->half[0] + at : NULL;
  g->out = t->call->ordered->staged[1] ? ring->half[1] + at : NULL;
}

/* Turns take the slots of the communicator's ring one after the other, and its words grow. */
static void assign_plain(struct hfr_batch *b) {
  struct hfr_stage_ring *ring = b->ring;
  b->starts = b->nturns > 0;
  for (int i = 0; i < b->nturns; i++) {
    struct hfr_turn *t = &b->turn[i];
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
static hfreduceResult_t assign_captured(struct hfr_batch *b) {
  size_t n = (size_t)b->nturns;
  HFR_TRY(hfr_staging_words(b->comm->staging, b->captured, n * (3 * sizeof(uint32_t) + 8), &b->words));
  uint8_t(*scalar)[8] = (uint8_t(*)[8])b->words.host;
  _Atomic uint32_t *ready = (_Atomic uint32_t *)(scalar + n), *done = ready + n, *taken = done + n;
  b->clear = done;
  b->nwords = 2 * n;
  for (int i = 0; i < b->nturns; i++) {
    struct hfr_turn *t = &b->turn[i];
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
static hfreduceResult_t make_captured_ring(struct hfr_batch *b, int which, size_t slot) {
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

static hfreduceResult_t prepare_batch(struct hfr_batch *b) {
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
    atomic_store_explicit(&b->comm->engine.started[which], b->ring->started,
                          memory_order_release); /* pairs with hfr_engine_stirs */
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

/* In one stream what goes out stands before all that waits, so that nothing may have to wait for room that this launch makes. */
static int fits_users_stream(const struct hfr_streams *s, const struct hfr_batch *b) {
  if (b->captured || hfr_copier_by_host(b->comm->staging->copier) || b->nturns > b->ring->slots) return 0;
  for (int i = 0; i < s->ncalls; i++) {
    const struct hfr_ordered_call *c = &s->call[i];
    if (c->comm != b->comm) continue;
    if (c->pair.pairs || c->ordered->stream.handle != b->call[0]->ordered->stream.handle) return 0;
    if (c->request && c->request->window->nsegs > 1) return 0;
  }
  return 1;
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
static hfreduceResult_t check_ranks_here(const struct hfr_streams *s, const struct hfr_batch *b) {
  if (!hfr_copier_by_host(b->comm->staging->copier)) return hfreduceSuccess;
  int here = hfr_runtime_ranks_here(b->comm), come = 0;
  for (int i = 0; i < s->nbatches; i++) come += s->batch[i].ncalls && s->batch[i].comm->uid.comm_id == b->comm->uid.comm_id;
  if (come >= here) return hfreduceSuccess;
  return hfr_fail(hfreduceInvalidUsage,
                  "%s: rank %d: device %d has no stream memory operations, and this process has %d ranks of the communicator, of "
                  "which %d call; call for all of them in one group of one thread, or give each rank a process of its own",
                  hfr_stream_name(b->call[0]->call), b->comm->rank, hfr_copier_device(b->comm->staging->copier), here, come);
}

static struct hfr_batch *batch_of(struct hfr_streams *s, struct hfreduceComm *c) {
  for (int i = 0; i < s->nbatches; i++)
    if (s->batch[i].comm == c) return &s->batch[i];
  s->batch[s->nbatches].comm = c;
  return &s->batch[s->nbatches++];
}

/* The turns of a call of a pair alone, which has no request that they could be counted by. */
static hfreduceResult_t add_alone(struct hfr_batch *b, struct hfr_ordered_call *call) {
  struct hfr_turn *grown = realloc(b->turn, (size_t)(b->nturns + call->pair.nsegs) * sizeof *grown);
  if (!grown) return hfr_fail(hfreduceSystemError, "out of memory for %d segments", call->pair.nsegs);
  b->turn = grown;
  for (int s = 0; s < call->pair.nsegs; s++) b->turn[b->nturns++] = (struct hfr_turn){.call = call, .segment = s};
  return hfreduceSuccess;
}

/* Once a process. The waiting communicators have a stream each at least that waits. */
static void warn_of_queues(int more) {
  static atomic_flag said = ATOMIC_FLAG_INIT;
  int waiting = atomic_load_explicit(&hfr_engines_waiting, memory_order_relaxed) + more, queues = hfr_device_queues();
  if (queues == 1 || waiting < queues || atomic_flag_test_and_set(&said)) return;
  HFR_WARN(
      "streams of %d communicators wait for other ranks at once, and the device has %d hardware queues for all streams: what "
      "stands "
      "behind a wait in its queue waits, too; let fewer wait at a time%s",
      waiting, queues, queues < 32 ? ", or set CUDA_DEVICE_MAX_CONNECTIONS=32 before the program starts" : "");
}

hfreduceResult_t hfr_streams_prepare(struct hfr_ordered_call *calls, int n, struct hfr_streams **out) {
  HFR_TRY(check_captures(calls, n));
  hfr_staging_sweep();
  hfr_gate_tidy(HFR_GATE_KEEP);
  struct hfr_streams *s = calloc(1, sizeof *s);
  if (!s || !(s->batch = calloc((size_t)n, sizeof *s->batch))) return free(s), hfr_fail(hfreduceSystemError, "out of memory");
  hfr_gate_launch(1);
  s->call = calls;
  s->ncalls = n;
  hfreduceResult_t r = hfreduceSuccess;
  for (int i = 0; !r && i < n; i++) {
    struct hfr_batch *b = batch_of(s, calls[i].comm);
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
    struct hfr_batch *b = &s->batch[i];
    if (!b->ncalls) continue;
    r = check_ranks_here(s, b);
    if (r) break;
    r = hfr_copier_enter(b->comm->staging->copier, b->call[0]->ordered->stream.capture != 0);
    if (r) break;
    r = prepare_batch(b);
    if (!r) b->own = fits_users_stream(s, b);
    hfr_copier_leave(b->comm->staging->copier);
  }
  if (!r) warn_of_queues(1);
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
  hfr_gate_launch(-1);
  for (int i = 0; i < s->nbatches; i++) {
    free(s->batch[i].call);
    free(s->batch[i].turn);
  }
  free(s->batch);
  free(s);
}
