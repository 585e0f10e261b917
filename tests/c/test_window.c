/*
 * Segments and plans: whatever the collective, layout and datatype, no step reaches into two segments, all that a step touches
 * lies in one, stages never go back to an earlier one, and every byte of the user's buffers has its own place in a segment. Pure
 * arithmetic: no network and no device.
 */
#include "check.h"

#include "coll/coll.h"
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

struct setting {
  const char *nodes;
  int rank;
  enum hfr_coll coll;
  hfreduceDataType_t dtype;
  size_t count;
};

static int parse(const char *nodes, int *label) {
  int n = 0, first = 0;
  for (const char *p = nodes; *p; p++) {
    if (*p == ',') continue;
    first = n;
    for (int i = *p - '0'; i > 0; i--) label[n++] = first;
  }
  return n;
}

static void note(const struct setting *s, const struct hfr_window *w, const char *what, int stage, int64_t i) {
  CHECK(0, "%s: nodes %s, rank %d, %s of %zu x %s, segments of %zu: stage %d, iteration %lld", what, s->nodes, s->rank,
        hfr_coll_name(s->coll), s->count, hfr_dtype_name(s->dtype), w->bytes, stage, (long long)i);
}

/* The segment of a location, or -1; complains when it reaches into two. */
static int segment_of(const struct setting *s, const struct hfr_request *r, const struct hfr_loc *l, size_t bytes, int stage,
                      int64_t i) {
  if ((l->space != HFR_SEND && l->space != HFR_RECV) || !bytes) return -1;
  int recv = l->space == HFR_RECV, first = hfr_window_segment(r, recv, l->off),
      last = hfr_window_segment(r, recv, l->off + bytes - 1);
  uint8_t *from = hfr_window_place(r, recv, l->off), *to = hfr_window_place(r, recv, l->off + bytes - 1);
  if (first != last || to != from + bytes - 1) note(s, r->window, "a step reaches into two segments", stage, i);
  return first;
}

static void walk_stage(const struct setting *s, const struct hfr_request *r, int stage) {
  const struct hfr_plan *p = &r->plan;
  const struct hfr_stage *st = &p->stage[stage];
  int before = 0;
  for (int64_t i = 0; i < st->niter; i++) {
    struct hfr_step step = {0};
    int at = -1, seen[64], n = 0;
    p->step(p, stage, i, &step);
    if (st->kind == HFR_STAGE_SEND) seen[n++] = segment_of(s, r, &step.src, step.bytes, stage, i);
    if (st->kind == HFR_STAGE_RECV || st->kind == HFR_STAGE_REDUCE) seen[n++] = segment_of(s, r, &step.dst, step.bytes, stage, i);
    for (int j = 0; (st->kind == HFR_STAGE_COPY || st->kind == HFR_STAGE_REDUCE) && j < step.nparts; j++) {
      struct hfr_part part;
      p->part(p, stage, i, j, &part);
      int copy = st->kind == HFR_STAGE_COPY;
      seen[n++] = segment_of(s, r, &part.src, copy ? part.bytes : step.bytes, stage, i);
      if (copy) seen[n++] = segment_of(s, r, &part.dst, part.bytes, stage, i);
    }
    for (int k = 0; k < n; k++) {
      if (seen[k] >= 0 && at >= 0 && seen[k] != at) note(s, r->window, "a step works on two segments", stage, i);
      if (seen[k] >= 0) at = seen[k];
    }
    if (at != hfr_window_of_step(r, stage, i, &step)) note(s, r->window, "the segment of a step is another one", stage, i);
    if (at >= 0 && at < before) note(s, r->window, "a stage goes back", stage, i);
    if (at >= 0) before = at;
  }
}

/* Where rows and segments lie is one to one: no two bytes of a buffer share a place. */
static void walk_places(const struct setting *s, const struct hfr_request *r, int recv) {
  const struct hfr_window *w = r->window;
  size_t row = s->count * r->plan.esize, rows = (size_t)hfr_window_rows(&r->plan, recv);
  for (size_t k = 0; k < rows; k++)
    for (int g = 0; g < w->nsegs; g++) {
      size_t off = k * row + (size_t)g * w->bytes;
      uint8_t *area = recv ? w->segment[g].out : w->segment[g].in;
      if (hfr_window_segment(r, recv, off) != g || hfr_window_place(r, recv, off) != area + k * w->bytes)
        note(s, w, "a row does not begin where it should", recv, g);
    }
}

static void one(const struct setting *s, const struct hfr_geometry *geometry, size_t units) {
  int label[64], n = parse(s->nodes, label);
  struct hfr_layout layout;
  struct hfr_request r = {0};
  struct hfr_call call = {.coll = s->coll, .count = s->count, .dtype = s->dtype, .root = n - 1, .windowed = 1};
  if (!CHECK(!hfr_layout_init(&layout, s->rank, n, label)) || !CHECK(!hfr_plan_build(&r.plan, &layout, geometry, &call))) return;
  size_t row = s->count * r.plan.esize, bytes = hfr_window_unit(&r.plan) * units;
  int nsegs = (int)((row + bytes - 1) / bytes);
  struct hfr_window *w = calloc(1, sizeof *w + (size_t)nsegs * sizeof w->segment[0]);
  *w = (struct hfr_window){.bytes = bytes, .nsegs = nsegs, .row = {SIZE_MAX, SIZE_MAX}};
  for (int recv = 0; recv < 2; recv++)
    if (hfr_window_rows(&r.plan, recv) > 1) w->row[recv] = row;
  for (int g = 0; g < nsegs; g++) { /* never written: only the arithmetic counts */
    w->segment[g].in = (uint8_t *)((uintptr_t)(2 * g + 1) << 36);
    w->segment[g].out = (uint8_t *)((uintptr_t)(2 * g + 2) << 36);
  }
  r.window = w;
  for (int stage = 0; stage < r.plan.nstages; stage++) walk_stage(s, &r, stage);
  for (int recv = 0; recv < 2; recv++) walk_places(s, &r, recv);
  CHECK(1);
  free(w);
  hfr_plan_fini(&r.plan);
  hfr_layout_fini(&layout);
}

/* A word that the device waits for goes forwards only, also past its end, and whether it is passed or given back. */
static void test_words(void) {
  static const struct {
    uint32_t was, value, is;
  } cases[] = {{4, 5, 5},           {5, 5, 5},           {6, 5, 6},
               {0xfffffffeu, 1, 1}, {1, 0xfffffffeu, 1}, {0x7fffffffu, 0x80000001u, 0x80000001u}};
  struct hfr_window *w = calloc(1, sizeof *w + sizeof w->segment[0]);
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
    for (int lent = 0; lent < 2; lent++) {
      _Atomic uint32_t sent = cases[k].was, received = cases[k].was;
      *w = (struct hfr_window){.nsegs = 1, .opened = 1};
      w->segment[0] = (struct hfr_segment){.done = {&sent, &received}, .value = cases[k].value, .lent = (uint64_t)lent};
      hfr_window_pass(w, 1);
      CHECK(received == cases[k].is, "case %zu: the word is %u", k, received);
      CHECK(sent == (lent ? cases[k].was : cases[k].is), "case %zu: before it is given back the word is %u", k, sent);
      hfr_window_give_back(w, 1);
      CHECK(sent == cases[k].is, "case %zu, lent %d: the word is %u", k, lent, sent);
    }
  free(w);
}

int main(void) {
  test_words();
  static const char *const nodes[] = {"1", "2", "3", "11", "111", "22", "31", "213", "11111", "44", "555"};
  static const hfreduceDataType_t dtypes[] = {hfreduceInt8, hfreduceFloat16, hfreduceFloat32, hfreduceFloat64};
  for (int algo = HFR_ALGO_AUTO; algo <= HFR_ALGO_RING; algo++)
    for (size_t chunk = 4096; chunk <= 131072; chunk *= 32) {
      struct hfr_geometry geometry = {.chunk = chunk, .ring_slot = chunk / 2, .slots = 4, .algo = (enum hfr_algo)algo};
      for (size_t k = 0; k < sizeof nodes / sizeof *nodes; k++) {
        int label[64], n = parse(nodes[k], label);
        for (int coll = 0; coll < HFR_BARRIER; coll++)
          for (size_t t = 0; t < 4; t++)
            for (int rank = 0; rank < n; rank += 1 + n / 4)
              for (size_t units = 1; units <= 3; units += 2) {
                static const size_t counts[] = {1, 77, 4096, 100003};
                for (size_t c = 0; c < 4; c++)
                  one(&(struct setting){nodes[k], rank, (enum hfr_coll)coll, dtypes[t], counts[c]}, &geometry, units);
              }
      }
    }
  return check_done();
}
