/*
 * all_reduce around a ring of nodes, one rank each. A chunk has a block a node; a block travels once around and grows, then once
 * more as the result. Each rank sends to one neighbour and receives from the other, so that links carry one flow each way,
 * whatever the number of nodes, and 2 S (n-1)/n bytes as in the direct exchange. Blocks go in pieces, so that a piece is passed
 * on while the next one arrives. In step s of n-1 node v does this, blocks counted modulo n:
 *
 *   previous ──A──► RED: block v-s-1 += mine ──► NSEND in step s+1 (in step 0: its own block v) ──A──► next
 *   previous ──B──► GRECV: block v-s         ──► GSEND in step s+1 (in step 0: block v+1, whole now) ──B──► next
 *
 * Stages run through chunks, in them through steps, in these through pieces. The second round of a chunk overlaps with the first
 * one of the chunk after it.
 */
#include "coll.h"

#define PIECES 4 /* a block: more hide a neighbour's delays better, each costs system calls */

static int64_t iterations(const struct hfr_plan *p) { return (int64_t)(p->layout->nnodes - 1) * PIECES; }

/* An iteration taken apart. */
struct turn {
  int64_t chunk;
  int step, piece;
};

static struct turn turn_at(const struct hfr_plan *p, int64_t i) {
  int64_t in_chunk = i % iterations(p);
  return (struct turn){i / iterations(p), (int)(in_chunk / PIECES), (int)(in_chunk % PIECES)};
}

/* The turn's piece of the block of node `b`, which may be below 0 or above n - 1. Bytes; *off counts from the buffer's start. */
static size_t piece(const struct hfr_plan *p, struct turn t, int b, size_t *off) {
  int n = p->layout->nnodes;
  size_t block_off, piece_off, len = hfr_chunk_len(p, p->call.count, t.chunk);
  len = hfr_split(len, n, (b % n + n) % n, p->esize, &block_off);
  len = hfr_split(len, PIECES, t.piece, p->esize, &piece_off);
  *off = ((size_t)t.chunk * p->elems + block_off + piece_off) * p->esize;
  return len * p->esize;
}

static void step_ring(const struct hfr_plan *p, int stage, int64_t i, struct hfr_step *s) {
  struct turn t = turn_at(p, i);
  int64_t before = i + 1 - PIECES; /* the same piece one step earlier is done when so many iterations are */
  int me = p->layout->node, last = p->layout->nnodes - 2;
  size_t off;
  switch (p->stage[stage].role) {
    case ROLE_NSEND:
      if (t.step) hfr_after_role(p, s, ROLE_RED, before);
      s->bytes = piece(p, t, me - t.step, &off);
      s->src = hfr_user(t.step ? HFR_RECV : HFR_SEND, off);
      break;
    case ROLE_RED:
      s->bytes = piece(p, t, me - t.step - 1, &off);
      s->dst = hfr_user(HFR_RECV, off);
      s->nparts = 2;
      s->final = t.step == last;
      break;
    case ROLE_GSEND: /* step 0: what RED's last step of this chunk has made */
      hfr_after_role(p, s, t.step ? ROLE_GRECV : ROLE_RED, t.step ? before : i + 1 + (int64_t)last * PIECES);
      s->bytes = piece(p, t, me + 1 - t.step, &off);
      s->src = hfr_user(HFR_RECV, off);
      break;
    default: /* GRECV overwrites what NSEND sent in the same step. The result holds that already, so it has arrived; but a
                transport may send again what has not been acknowledged. */
      hfr_after_role(p, s, ROLE_NSEND, i + 1);
      s->bytes = piece(p, t, me - t.step, &off);
      s->dst = hfr_user(HFR_RECV, off);
  }
}

/* The sources of RED. */
static void part_ring(const struct hfr_plan *p, int stage, int64_t i, int j, struct hfr_part *part) {
  struct turn t = turn_at(p, i);
  size_t off;
  (void)stage;
  piece(p, t, p->layout->node - t.step - 1, &off);
  part->src = j ? hfr_message(hfr_rank_at(p->layout, (p->layout->node + p->layout->nnodes - 1) % p->layout->nnodes, 0), HFR_VC_A)
                : hfr_user(HFR_SEND, off);
}

hfreduceResult_t hfr_plan_ring(struct hfr_plan *p) {
  const struct hfr_layout *l = p->layout;
  int next = hfr_rank_at(l, (l->node + 1) % l->nnodes, 0), previous = hfr_rank_at(l, (l->node + l->nnodes - 1) % l->nnodes, 0);
  p->algo = "ring";
  p->step = step_ring;
  p->part = part_ring;
  hfr_cut(p, p->geometry.chunk / p->esize * 2 * (size_t)l->nnodes); /* pieces of half a slot's size */
  int64_t niter = p->nchunks * iterations(p);
  HFR_ADD(nsend, p, ROLE_NSEND, HFR_STAGE_SEND, niter, "ring reduce");
  nsend->peer = next;
  nsend->vc = HFR_VC_A;
  HFR_ADD(red, p, ROLE_RED, HFR_STAGE_REDUCE, niter, "ring reduce");
  red->peer = previous;
  HFR_ADD(gsend, p, ROLE_GSEND, HFR_STAGE_SEND, niter, "ring gather");
  gsend->peer = next;
  gsend->vc = HFR_VC_B;
  HFR_ADD(grecv, p, ROLE_GRECV, HFR_STAGE_RECV, niter, "ring gather");
  grecv->peer = previous;
  grecv->vc = HFR_VC_B;
  return hfreduceSuccess;
}
