/*
 * all_gather and reduce_scatter, duals of each other. Inside a node data goes through the IN slots; between nodes every rank
 * exchanges with one carrier rank on each other node (its lane-mate, or where that node is smaller the one at its place modulo
 * the size), so each block crosses once to each node.
 *
 *   all_gather:      IN ─► NSEND to the carriers; carriers: NRECV into RES, PUB; OUT copies all blocks
 *   reduce_scatter:  IN (all blocks) ─► PARTIAL, the node's sum of a remote rank's block, NSEND to it; OUT reduces local sources
 * and the other nodes' partial sums
 *
 * One rank a node: messages go from and to the user's buffers.
 */
#include "coll.h"

static size_t bytes_of(const struct hfr_plan *p, size_t elems) { return elems * p->esize; }

/* Local rank of `node` that carries for a rank at place `local` of another node. */
static int carrier(const struct hfr_plan *p, int node, int local) {
  return hfr_rank_at(p->layout, node, local % hfr_node_size(p->layout, node));
}

/* Do I carry for rank r of another node? */
static int i_carry(const struct hfr_plan *p, int r) {
  const struct hfr_layout *l = p->layout;
  return l->node_of[r] != l->node && l->local_of[r] % l->nlocal == l->local;
}

/* The most ranks that anybody carries for, anywhere: all ranks must cut alike. */
static int most_carried(const struct hfr_layout *l) {
  int most = 0;
  for (int n = 0; n < l->nnodes; n++) {
    int sum = 0; /* for place 0 of node n, which carries the most */
    for (int m = 0; m < l->nnodes; m++)
      if (m != n) sum += (hfr_node_size(l, m) + hfr_node_size(l, n) - 1) / hfr_node_size(l, n);
    if (sum > most) most = sum;
  }
  return most;
}

/* Elements of a piece when `pieces` of them share a slot. */
static size_t piece(const struct hfr_plan *p, int pieces) { return hfr_block_bytes(&p->geometry, pieces, p->esize) / p->esize; }

static size_t len(const struct hfr_plan *p, int64_t k) { return hfr_chunk_len(p, p->call.count, k); }
/* Chunk k of rank r's block in the large buffer. */
static struct hfr_loc block_of(const struct hfr_plan *p, enum hfr_space space, int r, int64_t k) {
  return hfr_user(space, bytes_of(p, (size_t)r * p->call.count + (size_t)k * p->elems));
}

static hfreduceResult_t add_exchange(struct hfr_plan *p, int role, enum hfr_stage_kind kind, int peer, int arg,
                                     const char *name) {
  HFR_ADD(s, p, role, kind, p->nchunks, name);
  s->peer = peer;
  s->arg = arg;
  s->vc = HFR_VC_A;
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- all_gather */

static void step_gather(const struct hfr_plan *p, int stage, int64_t k, struct hfr_step *s) {
  const struct hfr_stage *st = &p->stage[stage];
  const struct hfr_layout *l = p->layout;
  size_t bytes = bytes_of(p, len(p, k));
  switch (st->role) {
    case ROLE_IN:
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_OUT, k + 1 - p->geometry.slots);
      s->nparts = 1;
      break;
    case ROLE_NSEND:
      hfr_after_role(p, s, ROLE_IN, k + 1);
      s->src = p->direct ? hfr_user(HFR_SEND, bytes_of(p, (size_t)k * p->elems)) : hfr_slot(HFR_IN, l->local, k, 0);
      s->bytes = bytes;
      break;
    case ROLE_NRECV:
      if (!p->direct) hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_OUT, k + 1 - p->geometry.slots);
      s->dst = p->direct ? block_of(p, HFR_RECV, st->arg, k)
                         : hfr_slot(HFR_RES, l->local, k, bytes_of(p, (size_t)(stage - p->first[ROLE_NRECV]) * p->elems));
      s->bytes = bytes;
      break;
    case ROLE_PUB: hfr_after_role(p, s, ROLE_NRECV, k + 1); break;
    case ROLE_COPY: s->nparts = 1; break;
    default: /* OUT; it also frees my IN slot, so what is sent from it must have gone */
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_IN, k + 1);
      if (l->nnodes > 1) hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_RED, k + 1);
      hfr_after_role(p, s, ROLE_NSEND, k + 1);
      s->nparts = l->nranks;
  }
}

/* Which place has remote rank r's piece among those that its carrier on my node holds? As the carrier's NRECV stages count. */
static int carried_place(const struct hfr_plan *p, int r) {
  const struct hfr_layout *l = p->layout;
  int local = l->local_of[r] % l->nlocal, place = 0;
  for (int q = 0; q < r; q++) place += l->node_of[q] != l->node && l->local_of[q] % l->nlocal == local;
  return place;
}

static void part_gather(const struct hfr_plan *p, int stage, int64_t k, int j, struct hfr_part *part) {
  const struct hfr_layout *l = p->layout;
  size_t bytes = bytes_of(p, len(p, k));
  struct hfr_loc own = hfr_user(HFR_SEND, bytes_of(p, (size_t)k * p->elems));
  if (p->stage[stage].role == ROLE_IN)
    *part = (struct hfr_part){own, hfr_slot(HFR_IN, l->local, k, 0), bytes};
  else if (p->stage[stage].role == ROLE_COPY || j == l->rank)
    *part = (struct hfr_part){own, block_of(p, HFR_RECV, l->rank, k), bytes};
  else if (l->node_of[j] == l->node)
    *part = (struct hfr_part){hfr_slot(HFR_IN, l->local_of[j], k, 0), block_of(p, HFR_RECV, j, k), bytes};
  else
    *part =
        (struct hfr_part){hfr_slot(HFR_RES, l->local_of[j] % l->nlocal, k, bytes_of(p, (size_t)carried_place(p, j) * p->elems)),
                          block_of(p, HFR_RECV, j, k), bytes};
}

hfreduceResult_t hfr_plan_all_gather(struct hfr_plan *p) {
  const struct hfr_layout *l = p->layout;
  p->algo = l->nnodes == 1 ? "node" : "direct";
  p->step = step_gather;
  p->part = part_gather;
  hfr_cut(p, piece(p, p->direct ? 1 : most_carried(l)));
  if (!p->direct) {
    HFR_ADD(in, p, ROLE_IN, HFR_STAGE_COPY, p->nchunks, "copy-in");
    in->ctr = HFR_CTR_IN;
  }
  for (int d = 1; d < l->nnodes; d++) {
    int node = (l->node + d) % l->nnodes;
    HFR_TRY(add_exchange(p, ROLE_NSEND, HFR_STAGE_SEND, carrier(p, node, l->local), node, "gather"));
  }
  for (int r = 0; r < l->nranks; r++)
    if (i_carry(p, r)) HFR_TRY(add_exchange(p, ROLE_NRECV, HFR_STAGE_RECV, r, r, "gather"));
  if (p->direct) {
    HFR_ADD(copy, p, ROLE_COPY, HFR_STAGE_COPY, p->nchunks, "copy-out");
    (void)copy;
    return hfreduceSuccess;
  }
  if (l->nnodes > 1) {
    HFR_ADD(pub, p, ROLE_PUB, HFR_STAGE_NOP, p->nchunks, "publish");
    pub->ctr = HFR_CTR_RED;
  }
  HFR_ADD(out, p, ROLE_OUT, HFR_STAGE_COPY, p->nchunks, "copy-out");
  out->ctr = HFR_CTR_OUT;
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- reduce_scatter */

/* My own block is read where it lies: no other rank needs it. Not if the factor has still to be applied. */
static int own_in_place(const struct hfr_plan *p) { return !p->direct && !p->call.premul; }

static void step_scatter(const struct hfr_plan *p, int stage, int64_t k, struct hfr_step *s) {
  const struct hfr_stage *st = &p->stage[stage];
  const struct hfr_layout *l = p->layout;
  int nth;
  s->bytes = bytes_of(p, len(p, k));
  switch (st->role) {
    case ROLE_IN:
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_OUT, k + 1 - p->geometry.slots);
      s->nparts = l->nranks - own_in_place(p);
      break;
    case ROLE_PARTIAL:
      nth = stage - p->first[ROLE_PARTIAL];
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_IN, k + 1);
      hfr_after_stage(s, p->first[ROLE_NSEND] + nth, k + 1 - p->geometry.slots);
      s->dst = hfr_slot(HFR_RES, l->local, k, bytes_of(p, (size_t)nth * p->elems));
      s->nparts = l->nlocal;
      break;
    case ROLE_NSEND:
      nth = stage - p->first[ROLE_NSEND];
      if (!p->direct) hfr_after_stage(s, p->first[ROLE_PARTIAL] + nth, k + 1);
      s->src =
          p->direct ? block_of(p, HFR_SEND, st->arg, k) : hfr_slot(HFR_RES, l->local, k, bytes_of(p, (size_t)nth * p->elems));
      break;
    default: /* OUT; it also says that I no longer read the others' IN slots */
      if (!p->direct) hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_IN, k + 1);
      hfr_after_role(p, s, ROLE_PARTIAL, k + 1);
      s->dst = hfr_user(HFR_RECV, bytes_of(p, (size_t)k * p->elems));
      s->nparts = (p->direct ? 1 : l->nlocal) + l->nnodes - 1;
  }
}

static void part_scatter(const struct hfr_plan *p, int stage, int64_t k, int j, struct hfr_part *part) {
  const struct hfr_stage *st = &p->stage[stage];
  const struct hfr_layout *l = p->layout;
  size_t elems = p->elems;
  int local = p->direct ? 1 : l->nlocal;
  switch (st->role) {
    case ROLE_IN:
      j += own_in_place(p) && j >= l->rank;
      *part = (struct hfr_part){block_of(p, HFR_SEND, j, k), hfr_slot(HFR_IN, l->local, k, bytes_of(p, (size_t)j * elems)),
                                bytes_of(p, len(p, k))};
      break;
    case ROLE_PARTIAL: part->src = hfr_slot(HFR_IN, j, k, bytes_of(p, (size_t)st->arg * elems)); break;
    default:
      if (j < local) {
        part->src = p->direct || (j == l->local && own_in_place(p))
                        ? block_of(p, HFR_SEND, l->rank, k)
                        : hfr_slot(HFR_IN, j, k, bytes_of(p, (size_t)l->rank * elems));
      } else {
        int node = j - local;
        if (node >= l->node) node++;
        part->src = hfr_message(carrier(p, node, l->local), HFR_VC_A);
      }
  }
}

hfreduceResult_t hfr_plan_reduce_scatter(struct hfr_plan *p) {
  const struct hfr_layout *l = p->layout;
  p->algo = l->nnodes == 1 ? "node" : "direct";
  p->step = step_scatter;
  p->part = part_scatter;
  size_t elems = piece(p, p->direct ? 1 : l->nranks);
  hfr_cut(p, p->call.count < elems ? p->call.count : elems); /* blocks of one chunk lie close together */
  if (!p->direct) {
    HFR_ADD(in, p, ROLE_IN, HFR_STAGE_COPY, p->nchunks, "copy-in");
    in->ctr = HFR_CTR_IN;
    in->premul = (uint8_t)p->call.premul;
  }
  for (int d = 0; d < l->nranks; d++) { /* start behind me, so that not all send to rank 0 first */
    int r = (l->rank + d) % l->nranks;
    if (!i_carry(p, r) || p->direct) continue;
    HFR_ADD(s, p, ROLE_PARTIAL, HFR_STAGE_REDUCE, p->nchunks, "local reduce");
    s->arg = r;
    s->npre = p->avg_pre ? l->nlocal : 0;
  }
  for (int d = 0; d < l->nranks; d++) {
    int r = (l->rank + d) % l->nranks;
    if (i_carry(p, r)) HFR_TRY(add_exchange(p, ROLE_NSEND, HFR_STAGE_SEND, r, r, "scatter"));
  }
  HFR_ADD(out, p, ROLE_OUT, HFR_STAGE_REDUCE, p->nchunks, "local reduce");
  out->ctr = p->direct ? HFR_CTR_NONE : HFR_CTR_OUT;
  out->final = 1;
  out->npre = p->avg_pre ? l->nlocal : 0;
  return hfreduceSuccess;
}
