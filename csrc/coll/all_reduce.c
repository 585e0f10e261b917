/*
 * all_reduce. On one node: one-shot (small) or staged chunks of which each rank reduces its share; what only it needs of them it
 * reads and writes in the user's buffers. Between nodes each lane
 * carries a slice of every chunk, over the double binary tree (even chunks one tree, odd chunks the other) or, for few nodes, by
 * direct exchange:
 *
 *   IN ── all ranks ──► RED | UP ─► UPSEND ─► parent                      tree: partial sums up, the result down
 *                             ▲ children    DOWN ◄─ parent ─► DSEND ─► children
 *                             └► NSEND ─► all nodes, RED of my block, GSEND ─► all nodes     direct: 2 S (n-1)/n bytes a node
 *   PUB (result in RES) ── lanes ──► OUT
 *
 * One rank a node ("direct" plans) needs no staging: sums build up in the user's receive buffer. Much data then goes around a
 * ring (ring.c).
 */
#include "coll.h"

static size_t bytes_of(const struct hfr_plan *p, size_t elems) { return elems * p->esize; }

/* Where the partial or final sum of my slice of chunk k lies. */
static struct hfr_loc mine(const struct hfr_plan *p, int64_t k, size_t off) {
  if (p->direct) return hfr_user(HFR_RECV, bytes_of(p, (size_t)k * p->elems + off));
  return hfr_slot(HFR_RES, p->layout->local, k, bytes_of(p, off));
}

/* User chunk k -> my IN slot. */
static void step_in(const struct hfr_plan *p, int64_t k, struct hfr_step *s) {
  hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_OUT, k + 1 - p->geometry.slots);
  s->nparts = 1;
}

static void part_in(const struct hfr_plan *p, int64_t k, struct hfr_part *part) {
  *part = (struct hfr_part){hfr_user(HFR_SEND, bytes_of(p, (size_t)k * p->elems)), hfr_slot(HFR_IN, p->layout->local, k, 0),
                            bytes_of(p, hfr_chunk_len(p, p->call.count, k))};
}

/* ---------------------------------------------------------------- one node */

static void step_node(const struct hfr_plan *p, int stage, int64_t k, struct hfr_step *s) {
  const struct hfr_layout *l = p->layout;
  size_t off;
  switch (p->stage[stage].role) {
    case ROLE_IN:
      step_in(p, k, s);
      s->nparts = hfr_copy_in_parts(p);
      break;
    case ROLE_RED: /* that my RES slot is free follows: who has staged chunk k has seen all ranks take out chunk k - slots */
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_IN, k + 1);
      s->bytes = hfr_share(p, k, l->local, &off);
      s->dst = hfr_user_at(p, HFR_RECV, k, off);
      s->also = hfr_slot(HFR_RES, l->local, k, 0);
      s->nparts = l->nlocal;
      break;
    default:
      if (p->count[ROLE_RED]) {
        hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_RED, k + 1);
      } else {
        hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_IN, k + 1);
        s->bytes = bytes_of(p, p->call.count);
        s->dst = hfr_user(HFR_RECV, 0);
      }
      s->nparts = p->count[ROLE_RED] ? l->nlocal - 1 : l->nlocal;
  }
}

static void part_node(const struct hfr_plan *p, int stage, int64_t k, int j, struct hfr_part *part) {
  const struct hfr_layout *l = p->layout;
  size_t off, len;
  switch (p->stage[stage].role) {
    case ROLE_IN: *part = hfr_copy_in_part(p, k, j); break;
    case ROLE_RED:
      hfr_share(p, k, l->local, &off);
      part->src = j == l->local && hfr_own_in_place(p) ? hfr_user_at(p, HFR_SEND, k, off) : hfr_slot(HFR_IN, j, k, off);
      break;
    default:
      if (p->count[ROLE_RED]) {
        j += j >= l->local; /* mine is there */
        len = hfr_share(p, k, j, &off);
        *part = (struct hfr_part){hfr_slot(HFR_RES, j, k, 0), hfr_user_at(p, HFR_RECV, k, off), len};
      } else {
        part->src = hfr_slot(HFR_IN, j, k, 0);
      }
  }
}

static hfreduceResult_t plan_node(struct hfr_plan *p) {
  int oneshot = (int64_t)bytes_of(p, p->call.count) <= hfr_oneshot_bytes(&p->geometry, p->layout->nlocal);
  p->algo = oneshot ? "one-shot" : "node";
  p->step = step_node;
  p->part = part_node;
  hfr_cut(p, p->geometry.chunk / p->esize);
  HFR_ADD(in, p, ROLE_IN, HFR_STAGE_COPY, p->nchunks, "copy-in");
  in->ctr = HFR_CTR_IN;
  in->premul = (uint8_t)p->call.premul;
  if (!oneshot) {
    HFR_ADD(red, p, ROLE_RED, HFR_STAGE_REDUCE, p->nchunks, "local reduce");
    red->ctr = HFR_CTR_RED;
    red->final = red->doubled = 1;
  }
  HFR_ADD(out, p, ROLE_OUT, oneshot ? HFR_STAGE_REDUCE : HFR_STAGE_COPY, p->nchunks, oneshot ? "local reduce" : "copy-out");
  out->ctr = HFR_CTR_OUT;
  out->final = 1;
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- several nodes: what both algorithms share */

static void step_out(const struct hfr_plan *p, int64_t k, struct hfr_step *s) {
  hfr_after_peers(s, HFR_LANES, 0, HFR_CTR_RED, k + 1);
  s->nparts = p->layout->lanes;
}

static void part_out(const struct hfr_plan *p, int64_t k, int j, struct hfr_part *part) {
  size_t off, len = hfr_lane_slice(p, k, j, &off);
  *part = (struct hfr_part){hfr_slot(HFR_RES, j, k, bytes_of(p, off)),
                            hfr_user(HFR_RECV, bytes_of(p, (size_t)k * p->elems + off)), bytes_of(p, len)};
}

static hfreduceResult_t add_staging(struct hfr_plan *p, int before) {
  if (p->direct) return hfreduceSuccess;
  if (before) {
    HFR_ADD(in, p, ROLE_IN, HFR_STAGE_COPY, p->nchunks, "copy-in");
    in->ctr = HFR_CTR_IN;
    in->premul = (uint8_t)p->call.premul;
    return hfreduceSuccess;
  }
  if (p->layout->local < p->layout->lanes) {
    HFR_ADD(pub, p, ROLE_PUB, HFR_STAGE_NOP, p->nchunks, "publish");
    pub->ctr = HFR_CTR_RED;
  }
  HFR_ADD(out, p, ROLE_OUT, HFR_STAGE_COPY, p->nchunks, "copy-out");
  out->ctr = HFR_CTR_OUT;
  return hfreduceSuccess;
}

/* Local source j of my slice of chunk k. */
static struct hfr_loc local_source(const struct hfr_plan *p, int64_t k, int j, size_t off) {
  if (p->direct) return hfr_user(HFR_SEND, bytes_of(p, (size_t)k * p->elems + off));
  return hfr_slot(HFR_IN, j, k, bytes_of(p, off));
}

/* ---------------------------------------------------------------- tree */

static int is_leaf(const struct hfr_plan *p, int t) { return p->pos[t].child[0] < 0 && p->pos[t].child[1] < 0; }

static void step_tree(const struct hfr_plan *p, int stage, int64_t i, struct hfr_step *s) {
  const struct hfr_stage *st = &p->stage[stage];
  const struct hfr_layout *l = p->layout;
  int t = st->tree, role = st->role;
  if (role == ROLE_IN || role == ROLE_OUT || role == ROLE_PUB) t = (int)(i & 1);
  int64_t k = 2 * i + t;
  int top = hfr_tree_stage(p, p->pos[t].parent < 0 ? ROLE_UP : ROLE_DOWN, t); /* the stage that makes the result known here */
  size_t off;
  switch (role) {
    case ROLE_IN: step_in(p, i, s); return;
    case ROLE_OUT: step_out(p, i, s); return;
    case ROLE_PUB: hfr_after_stage(s, top, i / 2 + 1); return;
    default: break;
  }
  s->bytes = bytes_of(p, hfr_lane_slice(p, k, l->local, &off));
  s->src = s->dst = mine(p, k, off);
  switch (role) {
    case ROLE_UP:
      if (!p->direct) hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_IN, k + 1);
      /* My RES slot has been forwarded. The data implies it, too: a child sends its part of this chunk only once it has received
         the result that lay in the slot before. The guard keeps the slot safe without a look at another node. */
      for (int d = p->first[ROLE_DSEND]; !p->direct && d < p->first[ROLE_DSEND] + p->count[ROLE_DSEND]; d++)
        if (p->stage[d].tree == t) hfr_after_stage(s, d, i + 1 - p->geometry.slots / 2);
      s->nparts = (p->direct ? 1 : l->nlocal) + (p->pos[t].child[0] >= 0) + (p->pos[t].child[1] >= 0);
      break;
    case ROLE_UPSEND:
      if (hfr_tree_stage(p, ROLE_UP, t) >= 0)
        hfr_after_stage(s, hfr_tree_stage(p, ROLE_UP, t), i + 1);
      else
        s->src = local_source(p, k, 0, off);
      break;
    case ROLE_DOWN: hfr_after_stage(s, hfr_tree_stage(p, ROLE_UPSEND, t), i + 1); break;
    default: hfr_after_stage(s, top, i + 1); /* DSEND */
  }
}

static void part_tree(const struct hfr_plan *p, int stage, int64_t i, int j, struct hfr_part *part) {
  const struct hfr_stage *st = &p->stage[stage];
  const struct hfr_layout *l = p->layout;
  if (st->role == ROLE_IN) {
    part_in(p, i, part);
  } else if (st->role == ROLE_OUT) {
    part_out(p, i, j, part);
  } else {
    size_t off;
    int64_t k = 2 * i + st->tree;
    int local = p->direct ? 1 : l->nlocal, c = j - local;
    hfr_lane_slice(p, k, l->local, &off);
    if (c >= 0 && p->pos[st->tree].child[0] < 0) c++;
    part->src = c < 0 ? local_source(p, k, j, off) : hfr_message(hfr_rank_at(l, p->pos[st->tree].child[c], l->local), st->tree);
  }
}

static hfreduceResult_t plan_tree(struct hfr_plan *p) {
  const struct hfr_layout *l = p->layout;
  p->algo = "tree";
  p->step = step_tree;
  p->part = part_tree;
  HFR_TRY(add_staging(p, 1));
  for (int t = 0; l->local < l->lanes && t < 2; t++) {
    if (p->direct && is_leaf(p, t) && p->pos[t].parent >= 0) continue; /* sent from where it lies */
    HFR_ADD(up, p, ROLE_UP, HFR_STAGE_REDUCE, hfr_tree_iters(p->nchunks, t), "tree up");
    up->tree = (uint8_t)t;
    up->final = p->pos[t].parent < 0;
    up->npre = p->avg_pre ? l->nlocal : 0;
  }
  for (int t = 0; l->local < l->lanes && t < 2; t++) {
    if (p->pos[t].parent < 0) continue;
    HFR_ADD(up, p, ROLE_UPSEND, HFR_STAGE_SEND, hfr_tree_iters(p->nchunks, t), "tree up");
    up->peer = hfr_rank_at(l, p->pos[t].parent, l->local);
    up->tree = up->vc = (uint8_t)t;
  }
  for (int t = 0; l->local < l->lanes && t < 2; t++) {
    if (p->pos[t].parent < 0) continue;
    HFR_ADD(down, p, ROLE_DOWN, HFR_STAGE_RECV, hfr_tree_iters(p->nchunks, t), "tree down");
    down->peer = hfr_rank_at(l, p->pos[t].parent, l->local);
    down->tree = down->vc = (uint8_t)t;
  }
  for (int t = 0; l->local < l->lanes && t < 2; t++) HFR_TRY(hfr_add_dsends(p, t, hfr_tree_stage(p, ROLE_DOWN, t), -1));
  return add_staging(p, 0);
}

/* ---------------------------------------------------------------- direct exchange */

/* Block b (a node's) of my slice of chunk k. */
static size_t block(const struct hfr_plan *p, int64_t k, int b, size_t *off) {
  size_t slice_off, block_off, len = hfr_lane_slice(p, k, p->layout->local, &slice_off);
  len = hfr_split(len, p->layout->nnodes, b, p->esize, &block_off);
  *off = slice_off + block_off;
  return len;
}

static void step_direct(const struct hfr_plan *p, int stage, int64_t k, struct hfr_step *s) {
  const struct hfr_stage *st = &p->stage[stage];
  const struct hfr_layout *l = p->layout;
  size_t off;
  switch (st->role) {
    case ROLE_IN: step_in(p, k, s); break;
    case ROLE_OUT: step_out(p, k, s); break;
    case ROLE_UP: /* the node's own sum of my slice */
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_IN, k + 1);
      hfr_after_role(p, s, ROLE_GSEND, k + 1 - p->geometry.slots);
      s->bytes = bytes_of(p, hfr_lane_slice(p, k, l->local, &off));
      s->dst = mine(p, k, off);
      s->nparts = l->nlocal;
      break;
    case ROLE_NSEND:
      hfr_after_role(p, s, ROLE_UP, k + 1);
      s->bytes = bytes_of(p, block(p, k, st->arg, &off));
      s->src = p->direct ? local_source(p, k, 0, off) : mine(p, k, off);
      break;
    case ROLE_RED: /* my block over all nodes */
      hfr_after_role(p, s, ROLE_UP, k + 1);
      s->bytes = bytes_of(p, block(p, k, l->node, &off));
      s->dst = mine(p, k, off);
      s->nparts = l->nnodes;
      break;
    case ROLE_GSEND:
      hfr_after_role(p, s, ROLE_RED, k + 1);
      s->bytes = bytes_of(p, block(p, k, l->node, &off));
      s->src = mine(p, k, off);
      break;
    case ROLE_GRECV:
      /* It overwrites what NSEND sends to that node. The data implies that NSEND is over: that node sends its sum only once it
         has received my part of it. The guard keeps the slot safe without a look at another node. */
      hfr_after_stage(s, p->first[ROLE_NSEND] + (stage - p->first[ROLE_GRECV]), k + 1);
      s->bytes = bytes_of(p, block(p, k, st->arg, &off));
      s->dst = mine(p, k, off);
      break;
    default: /* PUB */ hfr_after_role(p, s, ROLE_RED, k + 1); hfr_after_role(p, s, ROLE_GRECV, k + 1);
  }
}

static void part_direct(const struct hfr_plan *p, int stage, int64_t k, int j, struct hfr_part *part) {
  const struct hfr_layout *l = p->layout;
  size_t off;
  switch (p->stage[stage].role) {
    case ROLE_IN: part_in(p, k, part); break;
    case ROLE_OUT: part_out(p, k, j, part); break;
    case ROLE_UP:
      hfr_lane_slice(p, k, l->local, &off);
      part->src = local_source(p, k, j, off);
      break;
    default:
      block(p, k, l->node, &off);
      if (j != l->node)
        part->src = hfr_message(hfr_rank_at(l, j, l->local), HFR_VC_A);
      else
        part->src = p->direct ? local_source(p, k, 0, off) : mine(p, k, off);
  }
}

static hfreduceResult_t plan_direct(struct hfr_plan *p) {
  const struct hfr_layout *l = p->layout;
  p->algo = "direct";
  p->step = step_direct;
  p->part = part_direct;
  HFR_TRY(add_staging(p, 1));
  if (l->local < l->lanes) {
    if (!p->direct) {
      HFR_ADD(up, p, ROLE_UP, HFR_STAGE_REDUCE, p->nchunks, "local reduce");
      up->npre = p->avg_pre ? l->nlocal : 0;
    }
    for (int pass = 0; pass < 3; pass++) {
      static const int role[3] = {ROLE_NSEND, ROLE_GSEND, ROLE_GRECV};
      if (pass == 1) {
        HFR_ADD(red, p, ROLE_RED, HFR_STAGE_REDUCE, p->nchunks, "network reduce");
        red->final = 1;
      }
      for (int d = 1; d < l->nnodes; d++) { /* start with my neighbour, so that not all send to node 0 first */
        int node = (l->node + d) % l->nnodes;
        HFR_ADD(s, p, role[pass], pass == 2 ? HFR_STAGE_RECV : HFR_STAGE_SEND, p->nchunks, pass == 0 ? "scatter" : "gather");
        s->arg = node;
        s->peer = hfr_rank_at(l, node, l->local);
        s->vc = pass == 0 ? HFR_VC_A : HFR_VC_B;
      }
    }
  }
  return add_staging(p, 0);
}

/* The tree takes the fewest messages, but sends up to 2 S a node. Direct exchange and the ring send 2 S (n-1)/n: the former in
 * two hops, but n-1 messages each way at once, which fight for the links; the latter in 2 (n-1) hops, each link with one flow.
 * HFREDUCE_ALGO's help has these bounds, too. */
static enum hfr_algo choose(const struct hfr_plan *p) {
  size_t n = (size_t)p->layout->nnodes, bytes = bytes_of(p, p->call.count);
  if (n > 8 || bytes < 4096 * n) return HFR_ALGO_TREE;
  return p->direct && n > 2 && bytes >= 8 * n * p->geometry.chunk ? HFR_ALGO_RING : HFR_ALGO_DIRECT;
}

hfreduceResult_t hfr_plan_all_reduce(struct hfr_plan *p) {
  const struct hfr_layout *l = p->layout;
  if (l->nnodes == 1) return plan_node(p);
  enum hfr_algo algo = p->geometry.algo == HFR_ALGO_AUTO ? choose(p) : p->geometry.algo;
  if (algo == HFR_ALGO_RING && p->direct) return hfr_plan_ring(p);
  if (algo == HFR_ALGO_RING) algo = HFR_ALGO_DIRECT; /* a ring through slots would need more of them */
  size_t elems = p->geometry.chunk / p->esize;
  if (algo == HFR_ALGO_DIRECT && p->direct) elems *= (size_t)l->nnodes; /* nothing is staged: keep messages large */
  hfr_cut(p, elems);
  return algo == HFR_ALGO_DIRECT ? plan_direct(p) : plan_tree(p);
}
