/* Pinned memory of communicators with a device: made, shared with graphs, given back. */
#include "staging.h"

#include "../base/log.h"
#include "../base/param.h"

#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- graveyard */

static struct {
  pthread_mutex_t lock;
  struct hfr_captured *list;
  _Atomic int any;
} dead = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* An owner lets go. Called from threads of the driver too: nothing here may call it. */
static void let_go(struct hfr_captured *g) {
  if (atomic_fetch_sub_explicit(&g->owners, 1, memory_order_acq_rel) > 1) return;
  pthread_mutex_lock(&dead.lock);
  g->next = dead.list;
  dead.list = g;
  atomic_store(&dead.any, 1);
  pthread_mutex_unlock(&dead.lock);
}

void hfr_staging_sweep(void) {
  if (!atomic_load_explicit(&dead.any, memory_order_acquire)) return;
  pthread_mutex_lock(&dead.lock);
  struct hfr_captured *list = dead.list;
  dead.list = NULL;
  atomic_store(&dead.any, 0);
  pthread_mutex_unlock(&dead.lock);
  while (list) {
    struct hfr_captured *g = list;
    list = g->next;
    for (int i = 0; i < g->nmemory; i++) hfr_pinned_free(&g->memory[i]);
    free(g->memory);
    free(g);
  }
}

/* ---------------------------------------------------------------- captures */

static void graph_gone(void *arg) {
  struct hfr_captured *g = arg;
  atomic_store_explicit(&g->replay.dead, 1, memory_order_release); /* pairs with hfr_replay_poll() */
  let_go(g);
  hfr_drive_kick();
}

static void engine_done(void *arg) { let_go(arg); }

hfreduceResult_t hfr_staging_capture(struct hfr_staging *s, const struct hfr_stream *stream, struct hfr_captured **out) {
  if (s->captured && s->captured->id == stream->capture) return *out = s->captured, hfreduceSuccess;
  struct hfr_captured *g = calloc(1, sizeof *g);
  if (!g) return hfr_fail(hfreduceSystemError, "out of memory for a captured call");
  g->id = stream->capture;
  g->replay.ended = engine_done;
  g->replay.arg = g;
  atomic_store(&g->owners, 2); /* the graph and the staging; the engine from its first request on */
  hfreduceResult_t r = hfr_copier_keep(s->copier, stream->graph, graph_gone, g);
  if (r) return let_go(g), r;
  if (s->captured) let_go(s->captured);
  s->captured = g;
  *out = g;
  return hfreduceSuccess;
}

void hfr_staging_arm(struct hfreduceComm *c, struct hfr_captured *g, struct hfr_request *r) {
  if (!g->replay.listed) atomic_fetch_add(&g->owners, 1);
  r->replay = &g->replay;
  hfr_engine_arm(&c->engine, r);
}

static hfreduceResult_t more_memory(struct hfr_staging *s, struct hfr_captured *g, size_t bytes, struct hfr_pinned *memory) {
  struct hfr_pinned *grown = realloc(g->memory, (size_t)(g->nmemory + 1) * sizeof *grown);
  if (!grown) return hfr_fail(hfreduceSystemError, "out of memory for a captured call");
  g->memory = grown;
  HFR_TRY(hfr_pinned_alloc(s->copier, bytes, memory));
  g->memory[g->nmemory++] = *memory;
  return hfreduceSuccess;
}

#define WORDS_BYTES ((size_t)16384)

hfreduceResult_t hfr_staging_words(struct hfr_staging *s, struct hfr_captured *g, size_t bytes, struct hfr_pinned *words) {
  size_t size = (bytes + 63) / 64 * 64;
  if (g->words.bytes - g->used < size) {
    HFR_TRY(more_memory(s, g, size > WORDS_BYTES ? size : WORDS_BYTES, &g->words));
    g->used = 0;
  }
  *words = g->words;
  words->host += g->used;
  words->device += g->used;
  words->bytes = size;
  g->used += size;
  return hfreduceSuccess;
}

/* Where its halves lie: alternating in its own memory, or the send halves at `lent`. */
static void halves(struct hfr_stage_ring *r, uint8_t *lent) {
  r->half[0] = lent ? lent : r->memory.host;
  r->half[1] = lent ? r->memory.host : r->memory.host + r->bytes;
  r->pitch = lent ? r->bytes : 2 * r->bytes;
}

hfreduceResult_t hfr_staging_room(struct hfr_staging *s, struct hfr_captured *g, int slots, size_t bytes) {
  struct hfr_stage_ring *r = &g->ring;
  struct hfr_pinned memory = {0};
  if (r->slots >= slots && r->bytes >= bytes) return hfreduceSuccess;
  if (slots < r->slots) slots = r->slots;
  if (r->bytes && bytes < 2 * r->bytes) bytes = bytes <= r->bytes ? r->bytes : 2 * r->bytes; /* it may go on growing */
  /* Earlier calls of the graph keep the ring that they have. */
  if (bytes) HFR_TRY(hfr_staging_words(s, g, 2 * (size_t)slots * bytes, &memory));
  *r = (struct hfr_stage_ring){.memory = memory, .bytes = bytes, .slots = slots};
  halves(r, NULL);
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- rings */

size_t hfr_staging_slot_of(const struct hfr_layout *layout, const struct hfr_geometry *g, size_t segment) {
  size_t slot = (segment + g->chunk - 1) / g->chunk * g->chunk, chunk = g->chunk;
  if (layout->max_local == 1) chunk *= (size_t)layout->nnodes; /* what direct exchange makes of a chunk then */
  return slot > chunk ? slot : chunk;
}

size_t hfr_staging_slot(const struct hfreduceComm *c) {
  return hfr_staging_slot_of(&c->layout, &c->engine.geometry, (size_t)hfr_param_int(HFR_PARAM_CUDA_SEGMENT));
}

int hfr_staging_slots(int which) { return which == HFR_RING_WIDE ? 2 : (int)hfr_param_int(HFR_PARAM_CUDA_SEGMENTS); }

/* Pin so much of the lending area. What cannot be pinned is not missed: then the others read copies in the slots. */
static void pin_lending(struct hfr_staging *s, size_t bytes, struct hfr_pinned *lent) {
  if (bytes > s->arena->lend) return;
  if (!hfr_pinned_share(s->copier, hfr_arena_lending(s->arena, s->arena->local), bytes, lent)) return;
  HFR_INFO("what the device copies out is copied once more for the other local ranks: %s", hfr_last_error()->text);
  hfr_error_clear(hfr_last_error());
}

hfreduceResult_t hfr_staging_ring(struct hfr_staging *s, int which, size_t bytes) {
  struct hfr_stage_ring *r = &s->ring[which];
  if (r->bytes) return hfreduceSuccess;
  size_t slots = (size_t)hfr_staging_slots(which);
  size_t words = (4 * slots + 1) * sizeof *r->ready + slots * sizeof *r->scalar;
  r->use = calloc(slots, sizeof *r->use);
  if (!r->use) return hfr_fail(hfreduceSystemError, "out of memory");
  if (which == HFR_RING_PLAIN) pin_lending(s, slots * bytes, &r->lent);
  size_t data = (r->lent.host ? 1 : 2) * slots * bytes;
  hfreduceResult_t result = hfr_pinned_alloc(s->copier, data + words, &r->memory);
  if (result) {
    hfr_pinned_free(&r->lent);
    free(r->use);
    r->use = NULL;
    return result;
  }
  r->scalar = (uint8_t(*)[8])(r->memory.host + data);
  r->ready = (_Atomic uint32_t *)(r->scalar + slots);
  r->done[0] = r->ready + slots;
  r->done[1] = r->done[0] + slots;
  r->taken = r->done[1] + slots;
  r->started = r->taken + slots;
  r->bytes = bytes;
  r->slots = (int)slots;
  r->turn = 1;
  halves(r, r->lent.host);
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- birth and death */

static int marks(void) {
  int slots = hfr_staging_slots(HFR_RING_PLAIN);
  return slots > hfr_staging_slots(HFR_RING_WIDE) ? slots : hfr_staging_slots(HFR_RING_WIDE);
}

/* The plain ring, and the words of a first graph: in what is kept for the next. */
static hfreduceResult_t pin_all(struct hfreduceComm *c, struct hfr_staging *s) {
  struct hfr_pinned words;
  HFR_TRY(hfr_copier_enter(s->copier, 0));
  hfreduceResult_t r = hfr_staging_ring(s, HFR_RING_PLAIN, hfr_staging_slot(c));
  if (!r && !(r = hfr_pinned_alloc(s->copier, WORDS_BYTES, &words))) hfr_pinned_free(&words);
  hfr_copier_leave(s->copier);
  return r;
}

static _Atomic int alive; /* stagings of the process */

/* While the gate is closed; else, if streams wait now, all the same unless it is too early: *out is not set then. */
static hfreduceResult_t make(struct hfreduceComm *c, int device, void *context, int early, struct hfr_staging **out) {
  hfr_gate_tidy(HFR_GATE_KEEP);
  int closed = hfr_gate_close();
  if (!closed && early) return hfreduceSuccess;
  struct hfr_staging *s = calloc(1, sizeof *s);
  if (!s) return (closed ? hfr_gate_open() : (void)0), hfr_fail(hfreduceSystemError, "out of memory");
  s->arena = &c->arena;
  atomic_fetch_add(&alive, 1);
  hfreduceResult_t r = hfr_copier_create(device, context, marks(), &s->copier);
  if (!r) r = pin_all(c, s);
  if (closed) hfr_gate_open();
  if (!r) return *out = s, r;
  hfreduceErrorInfo_t why = *hfr_last_error();
  hfr_staging_destroy(s, 0);
  return *hfr_last_error() = why, r;
}

void hfr_staging_provide(struct hfreduceComm *c) {
  int device;
  void *context = hfr_device_context_now(&device);
  if (!context || !make(c, device, context, 1, &c->provided)) return;
  HFR_INFO("rank %d: device %d is not prepared for: %s", c->rank, device, hfr_last_error()->text);
  hfr_error_clear(hfr_last_error());
}

hfreduceResult_t hfr_staging_get(struct hfreduceComm *c, const char *who, const struct hfr_stream *stream) {
  struct hfr_staging *s = c->staging;
  if (s) {
    if (hfr_copier_device(s->copier) != stream->device)
      return hfr_fail(
          hfreduceInvalidArgument,
          "%s: rank %d: the communicator is bound to device %d by its first call with a stream or device memory, this "
          "call is on device %d; make a communicator for each device",
          who, c->rank, hfr_copier_device(s->copier), stream->device);
    if (hfr_copier_context(s->copier) != stream->context)
      return hfr_fail(hfreduceInvalidArgument, "%s: rank %d: the stream belongs to another CUDA context than earlier calls", who,
                      c->rank);
    return hfreduceSuccess;
  }
  if (c->provided && !hfr_copier_serves(c->provided->copier, stream->device, stream->context)) {
    hfr_staging_destroy(c->provided, 0); /* it was guessed from the context that made the communicator */
    c->provided = NULL;
  }
  if (!c->provided) HFR_TRY(make(c, stream->device, stream->context, 0, &c->provided));
  s = c->staging = c->provided;
  c->provided = NULL;
  HFR_INFO("rank %d works on device %d: %d segments of %zu bytes each way%s", c->rank, stream->device,
           (int)hfr_param_int(HFR_PARAM_CUDA_SEGMENTS), hfr_staging_slot(c),
           c->arena.lend ? "; those that come out lie in the arena, where the other local ranks read them" : "");
  return hfreduceSuccess;
}

int hfr_staging_device(const struct hfr_staging *s) { return s ? hfr_copier_device(s->copier) : -1; }

void hfr_staging_destroy(struct hfr_staging *s, double timeout) {
  if (!s) return;
  int drained = !s->copier || hfr_copier_drain(s->copier, (int64_t)(timeout * 1e9));
  struct hfr_pinned *lent = &s->ring[HFR_RING_PLAIN].lent;
  if (lent->host && !drained) s->arena->left = 1; /* the device may still write there */
  for (int i = 0; i < 2; i++) {
    if (drained) hfr_pinned_free(&s->ring[i].memory);
    free(s->ring[i].use);
  }
  if (s->captured) let_go(s->captured);
  if (drained && s->copier) hfr_gate_give_back(s->copier, lent, s->arena);
  if (!drained) hfr_copier_forget(s->copier);
  free(s);
  hfr_staging_sweep();
  hfr_gate_tidy(atomic_fetch_sub(&alive, 1) > 1 ? HFR_GATE_KEEP : 0);
}
