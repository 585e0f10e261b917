/* Chunks that lie in a segment of the lending area: lent to the other local ranks there, and given back to the device. */
#include "internal.h"

int hfr_request_lend(struct hfr_engine *e, struct hfr_request *r, int s, int64_t i, const struct hfr_step *step) {
  struct hfr_arena *a = e->arena;
  const uint8_t *area = hfr_arena_lending(a, a->local);
  uint64_t chunk = 0;
  size_t begin = 0;
  for (int j = 0; j < step->nparts; j++) {
    struct hfr_part p;
    r->plan.part(&r->plan, s, i, j, &p);
    if (p.dst.space != HFR_IN || p.src.space != HFR_SEND) return 0;
    if (!p.bytes) continue;
    size_t at = (size_t)((uintptr_t)hfr_place(e, r, &p.src) - (uintptr_t)area);
    if (at >= a->lend || at < p.dst.off || (chunk && at - p.dst.off != begin)) return 0;
    begin = at - p.dst.off;
    chunk = r->base + (uint64_t)p.dst.chunk;
  }
  if (!chunk) return 0; /* chunk 0 there is none: hfr_engine_init() */
  hfr_arena_lend(a, chunk, begin);
  r->window->segment[r->cursor[s].need].lent = chunk + 1;
  e->lent++;
  return 1;
}

/* Chunks that all local ranks have taken out: they will not look at them again. */
static uint64_t taken_out(const struct hfr_engine *e) {
  uint64_t least = UINT64_MAX;
  for (int i = 0; i < e->arena->nlocal; i++) {
    uint64_t out = atomic_load_explicit(&e->arena->ctrl[i].out, memory_order_acquire); /* pairs with its store in advance() */
    if (out < least) least = out;
  }
  return least;
}

int hfr_request_give_back(struct hfr_engine *e, struct hfr_request *r) {
  return hfr_window_owed(r->window) && hfr_window_give_back(r->window, taken_out(e));
}
