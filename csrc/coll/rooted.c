/*
 * reduce and broadcast: the two halves of the tree all_reduce, with a root that the caller chose.
 *
 * The trees have roots of their own, so that each node stays inner in at most one of them; what the caller's root needs or has
 * takes one more hop from or to them (XSEND, XRECV). Everything is staged in slots. All ranks agree at the end (agree.c's
 * stages): without it a leaf could leave before a mistake is known.
 */
#include "coll.h"

static size_t bytes_of(const struct hfr_plan *p, size_t elems) { return elems * p->esize; }
static int root_node(const struct hfr_plan *p) { return p->layout->node_of[p->call.root]; }
static int root_local(const struct hfr_plan *p) { return p->layout->local_of[p->call.root]; }
static int at_root(const struct hfr_plan *p) { return p->layout->rank == p->call.root; }
static int in_root_node(const struct hfr_plan *p) { return p->layout->node == root_node(p); }
static int in_lane(const struct hfr_plan *p) { return p->layout->local < p->layout->lanes; }
static size_t chunk_bytes(const struct hfr_plan *p, int64_t k) { return bytes_of(p, hfr_chunk_len(p, p->call.count, k)); }
static struct hfr_loc user_chunk(const struct hfr_plan *p, enum hfr_space space, int64_t k, size_t off) {
  return hfr_user(space, bytes_of(p, (size_t)k * p->elems + off));
}

static hfreduceResult_t add_published(struct hfr_plan *p, int role, enum hfr_stage_kind kind, enum hfr_ctr ctr,
                                      const char *name) {
  HFR_ADD(s, p, role, kind, p->nchunks, name);
  s->ctr = (uint8_t)ctr;
  s->final = 1;
  s->premul = (uint8_t)(role == ROLE_IN && p->call.premul);
  return hfreduceSuccess;
}

static hfreduceResult_t add_link(struct hfr_plan *p, int role, enum hfr_stage_kind kind, int t, int node, int vc,
                                 const char *name) {
  HFR_ADD(s, p, role, kind, hfr_tree_iters(p->nchunks, t), name);
  s->peer = hfr_rank_at(p->layout, node, p->layout->local);
  s->vc = (uint8_t)vc;
  s->tree = (uint8_t)t;
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- reduce */

/* Small: the root adds all of it up. */
static int one_shot(const struct hfr_plan *p) { return p->layout->nnodes == 1 && !p->count[ROLE_RED]; }

/* Guard of a RES slot of mine against what still forwards chunk k - slots. */
static void after_forwarding(const struct hfr_plan *p, struct hfr_step *s, int role, int t, int64_t i) {
  for (int d = p->first[role]; d < p->first[role] + p->count[role]; d++)
    if (p->stage[d].tree == t) hfr_after_stage(s, d, i + 1 - p->geometry.slots / 2);
}

static void step_reduce(const struct hfr_plan *p, int stage, int64_t i, struct hfr_step *s) {
  const struct hfr_stage *st = &p->stage[stage];
  const struct hfr_layout *l = p->layout;
  int role = st->role, chunked = role == ROLE_IN || role == ROLE_RED || role == ROLE_OUT || role == ROLE_PUB;
  int t = chunked ? (int)(i & 1) : st->tree;
  int64_t k = chunked ? i : 2 * i + t;
  size_t off = 0;
  if (hfr_step_agree(p, stage, s)) return;
  switch (role) {
    case ROLE_IN:
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_OUT, k + 1 - p->geometry.slots);
      s->nparts = hfr_copy_in_parts(p);
      return;
    case ROLE_RED: /* one node; the root's share is in its place then */
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_IN, k + 1);
      s->bytes = hfr_share(p, k, l->local, &off);
      s->dst = at_root(p) ? hfr_user_at(p, HFR_RECV, k, off) : hfr_slot(HFR_RES, l->local, k, 0);
      s->nparts = l->nlocal;
      return;
    case ROLE_PUB: {
      int x = hfr_tree_stage(p, ROLE_XRECV, t);
      hfr_after_stage(s, x >= 0 ? x : hfr_tree_stage(p, ROLE_UP, t), i / 2 + 1);
      return;
    }
    case ROLE_OUT: /* publishing it also says that I no longer read the others' IN slots */
      if (one_shot(p)) {
        if (!at_root(p)) return;
        hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_IN, k + 1);
        s->bytes = chunk_bytes(p, k);
        s->dst = user_chunk(p, HFR_RECV, k, 0);
        s->nparts = l->nlocal;
        return;
      }
      if (l->nnodes == 1) {
        hfr_after_peers(s, at_root(p) ? HFR_ALL : HFR_ONE, l->local, HFR_CTR_RED, k + 1);
      } else if (in_root_node(p)) {
        hfr_after_peers(s, HFR_LANES, 0, HFR_CTR_RED, k + 1);
      } else if (in_lane(p)) {
        hfr_after_stage(s, hfr_tree_stage(p, ROLE_UP, t), i / 2 + 1);
      }
      s->nparts = !at_root(p) ? 0 : l->nnodes == 1 ? l->nlocal - 1 : l->lanes;
      return;
    default: break;
  }
  s->bytes = bytes_of(p, hfr_lane_slice(p, k, l->local, &off));
  s->src = s->dst = hfr_slot(HFR_RES, l->local, k, bytes_of(p, off));
  switch (role) {
    case ROLE_UP:
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_IN, k + 1);
      after_forwarding(p, s, ROLE_UPSEND, t, i);
      /* The data implies this one: a part of this chunk comes from the root's node, too, whose ranks give theirs only once they
         have received the chunk that lay in the slot before. The guard keeps the slot safe without a look at another node. */
      after_forwarding(p, s, ROLE_XSEND, t, i);
      s->nparts = l->nlocal + (p->pos[t].child[0] >= 0) + (p->pos[t].child[1] >= 0);
      break;
    case ROLE_XRECV: hfr_after_stage(s, hfr_tree_stage(p, ROLE_UPSEND, t), i + 1); break;
    default: hfr_after_stage(s, hfr_tree_stage(p, ROLE_UP, t), i + 1); /* UPSEND, XSEND */
  }
}

static void part_reduce(const struct hfr_plan *p, int stage, int64_t i, int j, struct hfr_part *part) {
  const struct hfr_stage *st = &p->stage[stage];
  const struct hfr_layout *l = p->layout;
  size_t off, len;
  switch (st->role) {
    case ROLE_IN: *part = hfr_copy_in_part(p, i, j); return;
    case ROLE_RED:
      hfr_share(p, i, l->local, &off);
      part->src = j == l->local && hfr_own_in_place(p) ? hfr_user_at(p, HFR_SEND, i, off) : hfr_slot(HFR_IN, j, i, off);
      return;
    case ROLE_OUT:
      if (one_shot(p)) {
        part->src = hfr_slot(HFR_IN, j, i, 0);
      } else if (l->nnodes == 1) {
        j += j >= l->local; /* mine is there */
        len = hfr_share(p, i, j, &off);
        *part = (struct hfr_part){hfr_slot(HFR_RES, j, i, 0), hfr_user_at(p, HFR_RECV, i, off), len};
      } else {
        len = hfr_lane_slice(p, i, j, &off);
        *part = (struct hfr_part){hfr_slot(HFR_RES, j, i, bytes_of(p, off)), user_chunk(p, HFR_RECV, i, off), bytes_of(p, len)};
      }
      return;
    default: break; /* UP */
  }
  int64_t k = 2 * i + st->tree;
  int c = j - l->nlocal;
  hfr_lane_slice(p, k, l->local, &off);
  if (c >= 0 && p->pos[st->tree].child[0] < 0) c++;
  part->src = c < 0 ? hfr_slot(HFR_IN, j, k, bytes_of(p, off))
                    : hfr_message(hfr_rank_at(l, p->pos[st->tree].child[c], l->local), st->tree);
}

static hfreduceResult_t plan_reduce_network(struct hfr_plan *p) {
  const struct hfr_layout *l = p->layout;
  for (int t = 0; in_lane(p) && t < 2; t++) {
    HFR_ADD(up, p, ROLE_UP, HFR_STAGE_REDUCE, hfr_tree_iters(p->nchunks, t), "tree up");
    up->tree = (uint8_t)t;
    up->final = p->pos[t].parent < 0;
    up->npre = p->avg_pre ? l->nlocal : 0;
  }
  for (int t = 0; in_lane(p) && t < 2; t++)
    if (p->pos[t].parent >= 0) HFR_TRY(add_link(p, ROLE_UPSEND, HFR_STAGE_SEND, t, p->pos[t].parent, t, "tree up"));
  for (int t = 0; in_lane(p) && t < 2; t++)
    if (p->pos[t].parent < 0 && !in_root_node(p))
      HFR_TRY(add_link(p, ROLE_XSEND, HFR_STAGE_SEND, t, root_node(p), HFR_VC_ROOT, "to root"));
  for (int t = 0; in_lane(p) && t < 2; t++)
    if (p->pos[t].parent >= 0 && in_root_node(p))
      HFR_TRY(add_link(p, ROLE_XRECV, HFR_STAGE_RECV, t, hfr_dtree_root(l->nnodes, t), HFR_VC_ROOT, "to root"));
  if (in_lane(p) && in_root_node(p)) HFR_TRY(add_published(p, ROLE_PUB, HFR_STAGE_NOP, HFR_CTR_RED, "publish"));
  return hfreduceSuccess;
}

hfreduceResult_t hfr_plan_reduce(struct hfr_plan *p) {
  int one_node = p->layout->nnodes == 1;
  int oneshot = one_node && (int64_t)bytes_of(p, p->call.count) <= hfr_oneshot_bytes(&p->geometry, p->layout->nlocal);
  p->algo = oneshot ? "one-shot" : one_node ? "node" : "tree";
  p->step = step_reduce;
  p->part = part_reduce;
  hfr_cut(p, p->geometry.chunk / p->esize);
  HFR_TRY(add_published(p, ROLE_IN, HFR_STAGE_COPY, HFR_CTR_IN, "copy-in"));
  if (one_node && !oneshot) HFR_TRY(add_published(p, ROLE_RED, HFR_STAGE_REDUCE, HFR_CTR_RED, "local reduce"));
  if (!one_node) HFR_TRY(plan_reduce_network(p));
  HFR_TRY(add_published(p, ROLE_OUT, oneshot ? HFR_STAGE_REDUCE : HFR_STAGE_COPY, HFR_CTR_OUT,
                        oneshot ? "local reduce" : "copy-out"));
  return hfr_plan_agree(p);
}

/* ---------------------------------------------------------------- broadcast */

/* Where my slice of chunk k is found on this node: in the root's IN slot on its node, else where it arrived. */
static struct hfr_loc broadcast_slice(const struct hfr_plan *p, int64_t k, size_t off) {
  if (p->direct) return user_chunk(p, in_root_node(p) ? HFR_SEND : HFR_RECV, k, off);
  if (in_root_node(p)) return hfr_slot(HFR_IN, root_local(p), k, bytes_of(p, off));
  return hfr_slot(HFR_RES, p->layout->local, k, bytes_of(p, off));
}

static int arrival_stage(const struct hfr_plan *p, int t) {
  int x = hfr_tree_stage(p, ROLE_XRECV, t);
  return x >= 0 ? x : hfr_tree_stage(p, ROLE_DOWN, t);
}

static void step_broadcast_out(const struct hfr_plan *p, int64_t k, struct hfr_step *s) {
  if (in_root_node(p)) {
    if (!at_root(p)) hfr_after_peers(s, HFR_ONE, root_local(p), HFR_CTR_IN, k + 1);
    for (int role = ROLE_XSEND; role <= ROLE_DSEND;
         role++) /* I forward from the root's slot: it is not free before that is done */
      for (int d = p->first[role]; d < p->first[role] + p->count[role]; d++)
        if (p->stage[d].tree == (k & 1)) hfr_after_stage(s, d, k / 2 + 1);
    s->nparts = 1;
  } else {
    hfr_after_peers(s, HFR_LANES, 0, HFR_CTR_RED, k + 1);
    s->nparts = p->layout->lanes;
  }
}

static void step_broadcast(const struct hfr_plan *p, int stage, int64_t i, struct hfr_step *s) {
  const struct hfr_stage *st = &p->stage[stage];
  const struct hfr_layout *l = p->layout;
  int t = st->tree;
  int64_t k = 2 * i + t;
  size_t off;
  if (hfr_step_agree(p, stage, s)) return;
  switch (st->role) {
    case ROLE_IN:
      if (at_root(p)) hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_OUT, i + 1 - p->geometry.slots);
      s->nparts = at_root(p);
      return;
    case ROLE_COPY: s->nparts = 1; return;
    case ROLE_OUT: step_broadcast_out(p, i, s); return;
    case ROLE_PUB: hfr_after_stage(s, arrival_stage(p, (int)(i & 1)), i / 2 + 1); return;
    default: break;
  }
  s->bytes = bytes_of(p, hfr_lane_slice(p, k, l->local, &off));
  s->src = s->dst = broadcast_slice(p, k, off);
  if (st->role == ROLE_XRECV || st->role == ROLE_DOWN) {
    if (!p->direct) {
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_OUT, k + 1 - p->geometry.slots);
      after_forwarding(p, s, ROLE_DSEND, t, i);
    }
  } else if (!in_root_node(p)) { /* DSEND */
    hfr_after_stage(s, arrival_stage(p, t), i + 1);
  } else if (!p->direct) { /* XSEND, DSEND at the root's node */
    hfr_after_peers(s, HFR_ONE, root_local(p), HFR_CTR_IN, k + 1);
  }
}

static void part_broadcast(const struct hfr_plan *p, int stage, int64_t i, int j, struct hfr_part *part) {
  size_t off = 0, len;
  switch (p->stage[stage].role) {
    case ROLE_IN:
      *part = (struct hfr_part){user_chunk(p, HFR_SEND, i, 0), hfr_slot(HFR_IN, p->layout->local, i, 0), chunk_bytes(p, i)};
      break;
    case ROLE_COPY:
      *part =
          hfr_copy_part(p, hfr_user(HFR_SEND, 0), hfr_user(HFR_RECV, 0), bytes_of(p, p->call.count), bytes_of(p, p->elems), i);
      break;
    default:
      if (at_root(p)) {
        *part = (struct hfr_part){user_chunk(p, HFR_SEND, i, 0), user_chunk(p, HFR_RECV, i, 0), chunk_bytes(p, i)};
      } else if (in_root_node(p)) {
        *part = (struct hfr_part){hfr_slot(HFR_IN, root_local(p), i, 0), user_chunk(p, HFR_RECV, i, 0), chunk_bytes(p, i)};
      } else {
        len = hfr_lane_slice(p, i, j, &off);
        *part = (struct hfr_part){hfr_slot(HFR_RES, j, i, bytes_of(p, off)), user_chunk(p, HFR_RECV, i, off), bytes_of(p, len)};
      }
  }
}

static hfreduceResult_t plan_broadcast_network(struct hfr_plan *p) {
  const struct hfr_layout *l = p->layout;
  for (int t = 0; in_lane(p) && t < 2; t++)
    if (in_root_node(p) && p->pos[t].parent >= 0)
      HFR_TRY(add_link(p, ROLE_XSEND, HFR_STAGE_SEND, t, hfr_dtree_root(l->nnodes, t), HFR_VC_ROOT, "from root"));
  for (int t = 0; in_lane(p) && t < 2; t++)
    if (!in_root_node(p) && p->pos[t].parent < 0)
      HFR_TRY(add_link(p, ROLE_XRECV, HFR_STAGE_RECV, t, root_node(p), HFR_VC_ROOT, "from root"));
  for (int t = 0; in_lane(p) && t < 2; t++)
    if (!in_root_node(p) && p->pos[t].parent >= 0)
      HFR_TRY(add_link(p, ROLE_DOWN, HFR_STAGE_RECV, t, p->pos[t].parent, t, "tree down"));
  for (int t = 0; in_lane(p) && t < 2; t++)
    HFR_TRY(hfr_add_dsends(p, t, arrival_stage(p, t), root_node(p))); /* the root's node has it already */
  if (in_lane(p) && !in_root_node(p) && !p->direct) HFR_TRY(add_published(p, ROLE_PUB, HFR_STAGE_NOP, HFR_CTR_RED, "publish"));
  return hfreduceSuccess;
}

hfreduceResult_t hfr_plan_broadcast(struct hfr_plan *p) {
  p->algo = p->layout->nnodes == 1 ? "node" : "tree";
  p->step = step_broadcast;
  p->part = part_broadcast;
  hfr_cut(p, p->geometry.chunk / p->esize);
  if (!p->direct) HFR_TRY(add_published(p, ROLE_IN, HFR_STAGE_COPY, HFR_CTR_IN, "copy-in"));
  if (p->layout->nnodes > 1) HFR_TRY(plan_broadcast_network(p));
  if (!p->direct) {
    HFR_TRY(add_published(p, ROLE_OUT, HFR_STAGE_COPY, HFR_CTR_OUT, "copy-out"));
  } else if (at_root(p)) {
    HFR_ADD(copy, p, ROLE_COPY, HFR_STAGE_COPY, hfr_copy_iters(p, bytes_of(p, p->call.count), bytes_of(p, p->elems)), "copy-out");
    (void)copy;
  }
  return hfr_plan_agree(p);
}
