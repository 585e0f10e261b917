/*
 * all_reduce over a pair of GPUs: what goes into its two queues.
 *
 *   out:   push 0, push 1, wait 0, add 0, push 2, wait 1, add 1 ...         "wait": until the partner has pushed that segment
 *   back:  push 0, push 1, wait 0, take 0, push 2, wait 1, take 1 ...
 *
 * One push ahead, over all calls of a launch, so that the link is busy while a word goes round, and no wait stands in front of a
 * push that the partner's wait of the same step needs. Neither queue waits for the other, nor do those to and from the host wait
 * for what comes back.
 */
#include "pairs.h"

#include "staging.h"

#include <stdlib.h>

enum area { OUT, SUM, BACK };

static size_t place(const struct hfr_pairs *p, enum area area, uint64_t number) {
  return ((size_t)area * HFR_PAIR_DEPTH + number % HFR_PAIR_DEPTH) * p->segment;
}

static size_t bytes_of(const struct hfr_call *call) { return call->count * hfr_dtype_size(call->dtype); }

/* A segment of one's own half or the partner's: where it lies in a buffer, and how much there is of it. */
static size_t piece(const struct hfr_ordered_call *c, int own, int s, size_t *at) {
  size_t half = c->pair.half, start = own == c->pair.pairs->lower ? 0 : half, whole = bytes_of(c->pair.call);
  size_t end = start ? whole : half, first = start + (size_t)s * c->pair.bytes;
  *at = first;
  if (first >= end) return 0;
  return end - first < c->pair.bytes ? end - first : c->pair.bytes;
}

/* ---------------------------------------------------------------- preparing */

static struct hfr_window *make_window(int nsegs, size_t bytes) {
  struct hfr_window *w = calloc(1, sizeof *w + (size_t)nsegs * sizeof w->segment[0]);
  if (!w) return NULL;
  w->bytes = bytes;
  w->row[0] = w->row[1] = SIZE_MAX;
  w->nsegs = nsegs;
  return w;
}

hfreduceResult_t hfr_pairs_prepare(struct hfr_ordered_call *c, int nsegs, size_t bytes) {
  for (int back = 0; back < 2; back++) {
    struct hfr_request *r = c->pair.exchange[back];
    r->window = make_window(nsegs, bytes);
    if (!r->window) return hfr_fail(hfreduceSystemError, "out of memory for %d segments", nsegs);
    atomic_store(&r->holders, 2); /* the engine, and this launch */
  }
  c->pair.nsegs = nsegs;
  c->pair.bytes = bytes;
  return hfreduceSuccess;
}

void hfr_pairs_number(struct hfr_ordered_call *c) {
  struct hfr_pairs *p = c->pair.pairs;
  for (int back = 0; back < 2; back++) {
    struct hfr_request *r = c->pair.exchange[back];
    r->exchange = (struct hfr_exchange){.partner = p->partner, .back = back, .base = p->segments};
    for (int s = 0; s < c->pair.nsegs; s++) {
      uint64_t number = p->segments + (uint64_t)s;
      r->window->segment[s] = (struct hfr_segment){.ready = &p->ready[back][number % HFR_PAIR_WORDS],
                                                   .done = {NULL, &p->done[back][number % HFR_PAIR_WORDS]},
                                                   .value = (uint32_t)number + 1,
                                                   .ready_value = (uint32_t)number + 1};
    }
  }
  c->pair.base = p->segments;
  p->segments += (uint64_t)c->pair.nsegs;
}

#define PIECES 8 /* of a half at least, so that both directions overlap */
#define PIECE_MIN ((size_t)256 << 10)

void hfr_pairs_cut(const struct hfr_ordered_call *c, int *nsegs, size_t *bytes) {
  size_t wanted = (c->pair.half / PIECES + 63) / 64 * 64;
  if (wanted < PIECE_MIN) wanted = PIECE_MIN;
  *bytes = wanted < c->pair.pairs->segment ? wanted : c->pair.pairs->segment;
  *nsegs = (int)((c->pair.half + *bytes - 1) / *bytes);
}

/* ---------------------------------------------------------------- steps */

static enum hfr_queue queue_of(int back) { return back ? HFR_TO_DEVICE : HFR_TO_HOST; }

/* Give the partner segment s of its half of the input, or of one's own half of the result. */
static hfreduceResult_t push(const struct hfr_ordered_call *c, int back, int s) {
  struct hfr_pairs *p = c->pair.pairs;
  uint64_t number = c->pair.base + (uint64_t)s;
  size_t at, bytes = piece(c, back, s, &at);
  uintptr_t from = (back ? (uintptr_t)c->pair.call->recv : (uintptr_t)c->pair.call->send) + at;
  HFR_TRY(hfr_pair_push(p->pair, queue_of(back), place(p, back ? BACK : OUT, number), from, bytes));
  return hfr_copier_write(hfr_pair_copier(p->pair), queue_of(back), &p->words, &p->ready[back][number % HFR_PAIR_WORDS],
                          (uint32_t)number + 1);
}

static hfreduceResult_t await_partner(const struct hfr_ordered_call *c, int back, int s) {
  struct hfr_pairs *p = c->pair.pairs;
  uint64_t number = c->pair.base + (uint64_t)s;
  return hfr_copier_wait(hfr_pair_copier(p->pair), queue_of(back), &p->words, &p->done[back][number % HFR_PAIR_WORDS],
                         (uint32_t)number + 1);
}

static hfreduceResult_t add(const struct hfr_ordered_call *c, int s, uintptr_t to) {
  struct hfr_pairs *p = c->pair.pairs;
  const struct hfr_call *call = c->pair.call;
  size_t at, bytes = piece(c, 1, s, &at), esize = hfr_dtype_size(call->dtype);
  struct hfr_pair_sum sum = {.to = to,
                             .own = (uintptr_t)call->send + at,
                             .from = place(p, OUT, c->pair.base + (uint64_t)s),
                             .count = bytes / esize,
                             .esize = esize,
                             .lower = p->lower,
                             .dtype = call->dtype,
                             .op = call->op == hfreduceAvg ? hfreduceSum : call->op,
                             .scale = hfr_pairs_scale(c->pair.whole, call)};
  return hfr_pair_reduce(p->pair, HFR_TO_HOST, &sum);
}

/* ---------------------------------------------------------------- with the host, and alone */

#define SUM_MARK (HFR_MARKS - HFR_PAIR_DEPTH) /* of the copier to the host: a sum has been copied out */

hfreduceResult_t hfr_pairs_out(const struct hfr_ordered_call *c, struct hfr_copier *copier, uint8_t *area, int s) {
  struct hfr_pairs *p = c->pair.pairs;
  uint64_t number = c->pair.base + (uint64_t)s;
  int mark = SUM_MARK + (int)(number % HFR_PAIR_DEPTH);
  uintptr_t sum = hfr_pair_address(p->pair, place(p, SUM, number));
  size_t at = (size_t)s * c->pair.bytes, left = c->pair.half - at, bytes = left < c->pair.bytes ? left : c->pair.bytes;
  HFR_TRY(await_partner(c, 0, s));
  if (number >= HFR_PAIR_DEPTH) HFR_TRY(hfr_copier_follow_mark(hfr_pair_copier(p->pair), HFR_TO_HOST, copier, mark));
  HFR_TRY(add(c, s, sum));
  HFR_TRY(hfr_copier_chain(copier, hfr_pair_copier(p->pair), HFR_TO_HOST));
  HFR_TRY(hfr_copier_copy(copier, HFR_TO_HOST, area, bytes, sum, bytes, bytes, 1));
  return hfr_copier_mark(copier, mark);
}

hfreduceResult_t hfr_pairs_back(const struct hfr_ordered_call *c, struct hfr_copier *copier, const uint8_t *area, int s,
                                const struct hfr_pinned *words, _Atomic uint32_t *copied, uint32_t value) {
  size_t at, bytes = piece(c, 1, s, &at);
  HFR_TRY(hfr_copier_copy(copier, HFR_TO_DEVICE, (void *)(uintptr_t)area, bytes, (uintptr_t)c->pair.call->recv + at, bytes, bytes,
                          1));
  HFR_TRY(hfr_copier_write(copier, HFR_TO_DEVICE, words, copied, value));
  HFR_TRY(hfr_copier_chain(hfr_pair_copier(c->pair.pairs->pair), copier, HFR_TO_DEVICE));
  return push(c, 1, s);
}

hfreduceResult_t hfr_pairs_out_alone(const struct hfr_ordered_call *c, int s) {
  size_t at;
  piece(c, 1, s, &at);
  HFR_TRY(await_partner(c, 0, s));
  HFR_TRY(add(c, s, (uintptr_t)c->pair.call->recv + at));
  return hfr_copier_mark(hfr_pair_copier(c->pair.pairs->pair), (int)((c->pair.base + (uint64_t)s) % HFR_PAIR_DEPTH));
}

hfreduceResult_t hfr_pairs_back_alone(const struct hfr_ordered_call *c, int s) {
  HFR_TRY(hfr_copier_follow(hfr_pair_copier(c->pair.pairs->pair), (int)((c->pair.base + (uint64_t)s) % HFR_PAIR_DEPTH)));
  return push(c, 1, s);
}

hfreduceResult_t hfr_pairs_push(const struct hfr_ordered_call *c, int s) { return push(c, 0, s); }

hfreduceResult_t hfr_pairs_take(const struct hfr_ordered_call *c, int s) {
  struct hfr_pairs *p = c->pair.pairs;
  size_t at, bytes = piece(c, 0, s, &at);
  HFR_TRY(await_partner(c, 1, s));
  return hfr_pair_take(p->pair, HFR_TO_DEVICE, (uintptr_t)c->pair.call->recv + at, place(p, BACK, c->pair.base + (uint64_t)s),
                       bytes);
}
