/* Pairs of GPUs: who is whose partner, agreed on and made with the communicator. */
#include "pairs.h"

#include "../base/log.h"
#include "../base/param.h"
#include "staging.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- who */

/* Each rank that has none yet gets the next one on its node that NVLink joins it with. */
hfreduceResult_t hfr_pairs_match(struct hfreduceComm *c, const struct hfr_record *table) {
  const struct hfr_layout *l = &c->layout;
  int *partner = malloc((size_t)c->nranks * sizeof *partner), all = 1;
  c->partner = -1;
  c->nvlink_min = table[0].nvlink_min;
  if (!partner) return hfr_fail(hfreduceSystemError, "out of memory for %d ranks", c->nranks);
  for (int r = 0; r < c->nranks; r++) partner[r] = -1;
  for (int r = 0; r < c->nranks && all; r++) {
    for (int q = r + 1; partner[r] < 0 && q < c->nranks; q++)
      if (partner[q] < 0 && l->node_of[q] == l->node_of[r] && hfr_links_join(&table[r].links, &table[q].links))
        partner[r] = q, partner[q] = r;
    all = partner[r] >= 0;
  }
  if (all) c->partner = partner[c->rank];
  free(partner);
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- making */

/* What a rank tells the others of its side. */
struct offer {
  uint64_t segment; /* 0: it cannot */
  struct hfr_pair_memory memory;
};

static hfreduceResult_t make_words(struct hfr_pairs *p) {
  struct hfr_copier *copier = hfr_pair_copier(p->pair);
  HFR_TRY(hfr_copier_enter(copier, 0));
  hfreduceResult_t r = hfr_pinned_alloc(copier, 4 * HFR_PAIR_WORDS * sizeof(uint32_t), &p->words);
  hfr_copier_leave(copier);
  HFR_TRY(r);
  for (int back = 0; back < 2; back++) {
    p->ready[back] = (_Atomic uint32_t *)p->words.host + (size_t)(2 * back) * HFR_PAIR_WORDS;
    p->done[back] = p->ready[back] + HFR_PAIR_WORDS;
  }
  return hfreduceSuccess;
}

static hfreduceResult_t make_side(struct hfreduceComm *c, struct hfr_pairs *p, struct hfr_pair_memory *memory) {
  p->device = c->device;
  p->context = hfr_device_context_here(c->device);
  if (!p->context) return (hfreduceResult_t)hfr_last_error()->code;
  HFR_TRY(hfr_pair_create(p->device, p->context, 3 * HFR_PAIR_DEPTH * p->segment, &p->pair, memory));
  return make_words(p);
}

/* 1 when all ranks say so; < 0: the communicator failed. */
static int all_say(struct hfreduceComm *c, int yes) {
  uint64_t all = (uint64_t)yes;
  return hfr_min_now(c, &all) ? -1 : (int)all;
}

static void say_why(const struct hfreduceComm *c) {
  HFR_WARN("rank %d: GPUs will not reduce over NVLink: %s", c->rank, hfr_last_error()->text);
}

/* Tell each other of the memory, and reach the partner's. As all_say. */
static int meet(struct hfreduceComm *c, struct hfr_pairs *p) {
  struct offer *all = calloc((size_t)c->nranks, sizeof *all), mine = {.segment = p->segment};
  if (!all) {
    hfr_fail(hfreduceSystemError, "out of memory for %d ranks", c->nranks);
    return -1;
  }
  int made = !make_side(c, p, &mine.memory);
  if (!made) say_why(c), mine.segment = 0;
  int ok = !hfr_gather_now(c, &mine, all, sizeof mine, 0, NULL);
  for (int r = 0; ok && r < c->nranks; r++) made &= all[r].segment == p->segment;
  if (made && hfr_pair_meet(p->pair, &all[c->partner].memory)) say_why(c), made = 0;
  free(all);
  if (!ok) return -1;
  /* An error in this last word is not that of joining: a quick rank's first operation may have failed. The next call tells. */
  return all_say(c, made) > 0;
}

static hfreduceResult_t number_ranks(struct hfreduceComm *c, struct hfr_pairs *p) {
  p->ranks = calloc((size_t)p->half->nranks, sizeof *p->ranks);
  if (!p->ranks) return hfr_fail(hfreduceSystemError, "out of memory for %d ranks", p->half->nranks);
  return hfr_gather_now(p->half, &c->rank, p->ranks, sizeof c->rank, 0, NULL);
}

static void drop(struct hfreduceComm *c, struct hfr_pairs *p) {
  int drained = 1;
  if (p->half) hfr_comm_dispose(p->half);
  if (p->pair) drained = hfr_pair_destroy(p->pair, &c->arena.ctrl[p->partner].unpaired, hfr_close_limit_ns(c));
  if (drained) atomic_store(&c->arena.ctrl[c->arena.local].unpaired, 1); /* pairs with the partner's look at his room */
  if (drained) hfr_pinned_free(&p->words);                               /* else the device may still write there */
  free(p->ranks);
  free(p);
}

/* *agreed: all ranks have what they need. */
static hfreduceResult_t make(struct hfreduceComm *c, struct hfr_pairs *p, int *agreed) {
  HFR_TRY(hfr_comm_split_half(c, !p->lower, &p->half));
  HFR_TRY(number_ranks(c, p));
  uint64_t segment = hfr_staging_slot(p->half);
  HFR_TRY(hfr_min_now(c, &segment));
  p->segment = (size_t)segment;
  *agreed = meet(c, p);
  return *agreed < 0 ? (hfreduceResult_t)hfr_last_error()->code : hfreduceSuccess;
}

hfreduceResult_t hfr_pairs_make(struct hfreduceComm *c) {
  struct hfr_pairs *p = calloc(1, sizeof *p);
  int agreed = 0;
  if (!p) return hfr_fail(hfreduceSystemError, "out of memory");
  p->lower = c->rank < c->partner;
  p->partner = c->layout.local_of[c->partner];
  p->least = (size_t)c->nvlink_min;
  hfreduceResult_t r = make(c, p, &agreed);
  if (r || !agreed) {
    hfreduceErrorInfo_t why = *hfr_last_error();
    drop(c, p);
    *hfr_last_error() = why;
    return r;
  }
  HFR_INFO("rank %d reduces with rank %d over NVLink, from %zu bytes on", c->rank, c->partner, p->least);
  atomic_store(&c->pairs, p);
  if (hfr_engine_error(&p->half->engine, hfr_last_error())) hfr_pairs_broke(p->half, hfr_last_error(), 0); /* before that */
  return hfreduceSuccess;
}

struct hfreduceComm *hfr_pairs_half(const struct hfreduceComm *c) {
  const struct hfr_pairs *p = atomic_load(&c->pairs);
  return p ? p->half : NULL;
}

/* ---------------------------------------------------------------- ending */

void hfr_pairs_broke(struct hfreduceComm *c, const hfreduceErrorInfo_t *info, int tell) {
  struct hfreduceComm *half = hfr_pairs_half(c);
  if (half) hfr_engine_break(&half->engine, info); /* its other ranks hear of it from their whole */
  const struct hfr_pairs *p = c->whole ? atomic_load(&c->whole->pairs) : NULL;
  if (!p) return;
  hfreduceErrorInfo_t told = *info;
  int n = snprintf(told.text, sizeof told.text, "among ranks");
  for (int i = 0; i < c->nranks && n < 200; i++) n += snprintf(told.text + n, sizeof told.text - (size_t)n, " %d", p->ranks[i]);
  snprintf(told.text + n, sizeof told.text - (size_t)n, "%s of the NVLink pairs, numbered 0 to %d: %.400s",
           n >= 200 ? ", ..." : "", c->nranks - 1, info->text);
  if (info->rank >= 0 && info->rank < c->nranks) told.rank = p->ranks[info->rank];
  if (info->peer >= 0 && info->peer < c->nranks) told.peer = p->ranks[info->peer];
  if (tell)
    hfr_engine_fail(&c->whole->engine, &told);
  else if (hfr_engine_break(&c->whole->engine, &told))
    atomic_store(&c->whole->untold, 1); /* for the watcher, which may be who calls, with the runtime's lock */
}

void hfr_pairs_destroy(struct hfreduceComm *c) {
  if (c->pairs) drop(c, c->pairs);
  c->pairs = NULL;
}

/* ---------------------------------------------------------------- calls */

int hfr_pairs_want(struct hfreduceComm *c, const struct hfr_call *call, const struct hfr_ordered *o, hfreduceResult_t *result) {
  const struct hfr_pairs *p = atomic_load(&c->pairs);
  *result = hfreduceSuccess;
  if (!p || call->coll != HFR_ALL_REDUCE || call->premul || call->count * hfr_dtype_size(call->dtype) < p->least) return 0;
  /* A pair alone has no CPU that divides. */
  if (call->op == hfreduceAvg && p->half->nranks == 1 && !hfr_dtype_is_float(call->dtype)) return 0;
  if (!o->on || !o->staged[0] || !o->staged[1] || o->stream.capture) return 0;
  if (o->stream.device == p->device && o->stream.context == p->context) return 1;
  *result =
      hfr_fail(hfreduceInvalidArgument,
               "hfreduceAllReduce: rank %d: the communicator was made for device %d, which NVLink joins with that of rank "
               "%d, but this call is on device %d%s; make the communicator when the device that it will work on is "
               "current, or set HFREDUCE_NVLINK=0",
               c->rank, p->device, c->partner, o->stream.device, o->stream.device == p->device ? " in another CUDA context" : "");
  return 0;
}

/* Sums of fp16 and fp8 may overflow where the average would not. */
float hfr_pairs_scale(const struct hfreduceComm *c, const struct hfr_call *call) {
  return call->op == hfreduceAvg && (hfr_dtype(call->dtype)->small || hfr_pairs_half(c)->nranks == 1) ? 0.5f : 1;
}

struct hfr_call hfr_pairs_half_call(const struct hfreduceComm *c, const struct hfr_call *call) {
  struct hfr_call half = *call;
  size_t esize = hfr_dtype_size(call->dtype), grain = 64 / esize;
  /* Both halves have as many elements, so that both are cut alike; what the upper one lacks is made up. */
  half.count = ((call->count + 1) / 2 + grain - 1) / grain * grain;
  if (call->op == hfreduceAvg && hfr_pairs_scale(c, call) == 1)
    half.over = c->nranks; /* else the pair's sum is an average already */
  return half;
}
