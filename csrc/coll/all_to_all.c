/* An even all_to_all on one node, through the slots: IN holds a piece for each of the others, OUT takes mine out of theirs. */
#include "coll.h"

static struct hfr_loc piece(const struct hfr_plan *p, enum hfr_space space, int r, int64_t k) {
  return hfr_user(space, ((size_t)r * p->call.count + (size_t)k * p->elems) * p->esize);
}

static void step_all_to_all(const struct hfr_plan *p, int stage, int64_t k, struct hfr_step *s) {
  int in = p->stage[stage].role == ROLE_IN;
  hfr_after_peers(s, HFR_ALL, 0, in ? HFR_CTR_OUT : HFR_CTR_IN, in ? k + 1 - p->geometry.slots : k + 1);
  s->nparts = p->layout->nranks - in;
}

static void part_all_to_all(const struct hfr_plan *p, int stage, int64_t k, int j, struct hfr_part *part) {
  int me = p->layout->rank, in = p->stage[stage].role == ROLE_IN;
  size_t bytes = hfr_chunk_len(p, p->call.count, k) * p->esize;
  if (in) {
    j += j >= me; /* mine stays where it lies */
    *part = (struct hfr_part){piece(p, HFR_SEND, j, k), hfr_slot(HFR_IN, me, k, (size_t)j * p->elems * p->esize), bytes};
  } else {
    struct hfr_loc from = j == me ? piece(p, HFR_SEND, me, k) : hfr_slot(HFR_IN, j, k, (size_t)me * p->elems * p->esize);
    *part = (struct hfr_part){from, piece(p, HFR_RECV, j, k), bytes};
  }
}

hfreduceResult_t hfr_plan_all_to_all(struct hfr_plan *p) {
  size_t room = hfr_block_bytes(&p->geometry, p->layout->nranks, p->esize) / p->esize;
  p->algo = "node";
  p->step = step_all_to_all;
  p->part = part_all_to_all;
  hfr_cut(p, p->call.count < room ? p->call.count : room);
  HFR_ADD(in, p, ROLE_IN, HFR_STAGE_COPY, p->nchunks, "copy-in");
  in->ctr = HFR_CTR_IN;
  HFR_ADD(out, p, ROLE_OUT, HFR_STAGE_COPY, p->nchunks, "copy-out");
  out->ctr = HFR_CTR_OUT;
  return hfreduceSuccess;
}
