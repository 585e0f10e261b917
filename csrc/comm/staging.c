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
    for (int i = 0; i < g->nwords; i++) hfr_pinned_free(&g->words[i]);
    free(g->words);
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

hfreduceResult_t hfr_staging_words(struct hfr_staging *s, struct hfr_captured *g, size_t bytes, struct hfr_pinned *words) {
  struct hfr_pinned *grown = realloc(g->words, (size_t)(g->nwords + 1) * sizeof *grown);
  if (!grown) return hfr_fail(hfreduceSystemError, "out of memory for a captured call");
  g->words = grown;
  HFR_TRY(hfr_pinned_alloc(s->copier, bytes, words));
  g->words[g->nwords++] = *words;
  return hfreduceSuccess;
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
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- rings */

size_t hfr_staging_slot(const struct hfreduceComm *c) {
  const struct hfr_geometry *g = &c->engine.geometry;
  size_t slot = (size_t)hfr_param_int(HFR_PARAM_CUDA_SEGMENT), chunk = g->chunk;
  if (c->layout.max_local == 1) chunk *= (size_t)c->layout.nnodes; /* what direct exchange makes of a chunk then */
  slot = (slot + g->chunk - 1) / g->chunk * g->chunk;
  return slot > chunk ? slot : chunk;
}

int hfr_staging_slots(int which) { return which == HFR_RING_WIDE ? 2 : (int)hfr_param_int(HFR_PARAM_CUDA_SEGMENTS); }

hfreduceResult_t hfr_staging_ring(struct hfr_staging *s, int which, size_t bytes) {
  struct hfr_stage_ring *r = &s->ring[which];
  if (r->bytes) return hfreduceSuccess;
  size_t slots = (size_t)hfr_staging_slots(which);
  size_t data = 2 * slots * bytes, words = (4 * slots + 1) * sizeof *r->ready + slots * sizeof *r->scalar;
  r->use = calloc(slots, sizeof *r->use);
  if (!r->use) return hfr_fail(hfreduceSystemError, "out of memory");
  hfreduceResult_t result = hfr_pinned_alloc(s->copier, data + words, &r->memory);
  if (result) {
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
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- birth and death */

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
  s = calloc(1, sizeof *s);
  if (!s) return hfr_fail(hfreduceSystemError, "out of memory");
  hfreduceResult_t r = hfr_copier_create(stream->device, stream->context, &s->copier);
  if (r) return free(s), r;
  c->staging = s;
  HFR_INFO("rank %d works on device %d: %d segments of %zu bytes each way", c->rank, stream->device,
           (int)hfr_param_int(HFR_PARAM_CUDA_SEGMENTS), hfr_staging_slot(c));
  return hfreduceSuccess;
}

int hfr_staging_device(const struct hfr_staging *s) { return s ? hfr_copier_device(s->copier) : -1; }

void hfr_staging_destroy(struct hfr_staging *s, double timeout) {
  if (!s) return;
  int drained = hfr_copier_destroy(s->copier, (int64_t)(timeout * 1e9));
  for (int i = 0; i < 2; i++) {
    if (drained) hfr_pinned_free(&s->ring[i].memory); /* else the device may still write there */
    free(s->ring[i].use);
  }
  if (s->captured) let_go(s->captured);
  free(s);
  hfr_staging_sweep();
}
