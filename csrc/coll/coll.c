/* Which planner, and what they share. */
#include "coll.h"

hfreduceResult_t hfr_add_dsends(struct hfr_plan *p, int t, int arrival, int skip) {
  const struct hfr_layout *l = p->layout;
  for (int c = 0; c < 2; c++) {
    int child = p->pos[t].child[c];
    if (child < 0 || child == skip) continue;
    HFR_ADD(s, p, ROLE_DSEND, HFR_STAGE_SEND, hfr_tree_iters(p->nchunks, t), "tree down");
    s->peer = hfr_rank_at(l, child, l->local);
    s->vc = (uint8_t)t;
    s->tree = (uint8_t)t;
    if (arrival < 0) continue;
    s->passes = arrival + 1;
    p->stage[arrival].passes++;
  }
  return hfreduceSuccess;
}

struct hfr_part hfr_copy_in_part(const struct hfr_plan *p, int64_t k, int j) {
  size_t off, begin = 0, end = hfr_chunk_len(p, p->call.count, k) * p->esize;
  if (hfr_own_in_place(p)) {
    size_t mine = hfr_share(p, k, p->layout->local, &off);
    if (j)
      begin = off + mine;
    else
      end = off;
  }
  return (struct hfr_part){hfr_user_at(p, HFR_SEND, k, begin), hfr_slot(HFR_IN, p->layout->local, k, begin), end - begin};
}

/* ---------------------------------------------------------------- agreement between nodes */

hfreduceResult_t hfr_plan_agree(struct hfr_plan *p) {
  const struct hfr_layout *l = p->layout;
  if (l->nnodes == 1) return hfreduceSuccess;
  if (l->local == 0) {
    const struct hfr_tree_pos *t = &p->pos[0];
    for (int c = 0; c < 2; c++) {
      if (t->child[c] < 0) continue;
      HFR_ADD(s, p, ROLE_VUPRECV, HFR_STAGE_RECV, 1, "agree up");
      s->peer = hfr_rank_at(l, t->child[c], 0);
      s->vc = HFR_VC_VERIFY;
    }
    if (t->parent >= 0) {
      HFR_ADD(up, p, ROLE_VUPSEND, HFR_STAGE_SEND, 1, "agree up");
      up->peer = hfr_rank_at(l, t->parent, 0);
      up->vc = HFR_VC_VERIFY;
      HFR_ADD(down, p, ROLE_VDOWN, HFR_STAGE_RECV, 1, "agree down"); /* moves `up` when the stages grow */
      down->peer = hfr_rank_at(l, t->parent, 0);
      down->vc = HFR_VC_VERIFY;
    }
    for (int c = 0; c < 2; c++) {
      if (t->child[c] < 0) continue;
      HFR_ADD(s, p, ROLE_VDSEND, HFR_STAGE_SEND, 1, "agree down");
      s->peer = hfr_rank_at(l, t->child[c], 0);
      s->vc = HFR_VC_VERIFY;
    }
    HFR_ADD(pub, p, ROLE_VPUB, HFR_STAGE_NOP, 1, "agree");
    pub->ctr = HFR_CTR_VER;
  } else {
    HFR_ADD(w, p, ROLE_VWAIT, HFR_STAGE_NOP, 1, "agree");
    (void)w;
  }
  return hfreduceSuccess;
}

int hfr_step_agree(const struct hfr_plan *p, int stage, struct hfr_step *s) {
  switch (p->stage[stage].role) {
    case ROLE_VUPRECV: return 1;
    case ROLE_VUPSEND: /* this node and all below it are of one mind */
      hfr_after_role(p, s, ROLE_VUPRECV, 1);
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_START, 1);
      return 1;
    case ROLE_VDOWN: hfr_after_role(p, s, ROLE_VUPSEND, 1); return 1;
    case ROLE_VDSEND:
    case ROLE_VPUB:
      hfr_after_role(p, s, ROLE_VUPRECV, 1);
      hfr_after_role(p, s, ROLE_VDOWN, 1);
      hfr_after_peers(s, HFR_ALL, 0, HFR_CTR_START, 1);
      return 1;
    case ROLE_VWAIT: hfr_after_peers(s, HFR_ONE, 0, HFR_CTR_VER, 1); return 1;
    default: return 0;
  }
}

static void step_agree_only(const struct hfr_plan *p, int stage, int64_t i, struct hfr_step *s) {
  (void)i;
  hfr_step_agree(p, stage, s);
}

/* ---------------------------------------------------------------- one rank */

static void step_alone(const struct hfr_plan *p, int stage, int64_t i, struct hfr_step *s) {
  (void)p, (void)i, (void)stage;
  s->nparts = 1;
}

static void part_alone(const struct hfr_plan *p, int stage, int64_t i, int j, struct hfr_part *part) {
  (void)stage, (void)j;
  *part = hfr_copy_part(p, hfr_user(HFR_SEND, 0), hfr_user(HFR_RECV, 0), p->call.count * p->esize, p->geometry.chunk, i);
}

static hfreduceResult_t plan_alone(struct hfr_plan *p) {
  p->algo = "copy";
  p->step = step_alone;
  p->part = part_alone;
  if (!p->call.count) return hfreduceSuccess;
  HFR_ADD(s, p, ROLE_COPY, HFR_STAGE_COPY, hfr_copy_iters(p, p->call.count * p->esize, p->geometry.chunk), "copy");
  s->premul = (uint8_t)p->call.premul;
  return hfreduceSuccess;
}

static hfreduceResult_t plan_all_to_all(struct hfr_plan *p) {
  return p->layout->nnodes == 1 ? hfr_plan_all_to_all(p) : hfr_plan_exchange(p);
}

/* Of calls with data, among several ranks. */
static hfreduceResult_t (*const planner[HFR_NCOLL])(struct hfr_plan *plan) = {
    [HFR_ALL_REDUCE] = hfr_plan_all_reduce,
    [HFR_REDUCE] = hfr_plan_reduce,
    [HFR_BROADCAST] = hfr_plan_broadcast,
    [HFR_ALL_GATHER] = hfr_plan_all_gather,
    [HFR_REDUCE_SCATTER] = hfr_plan_reduce_scatter,
    [HFR_ALL_TO_ALL] = plan_all_to_all,
    [HFR_GATHER] = hfr_plan_exchange,
    [HFR_SCATTER] = hfr_plan_exchange,
};

hfreduceResult_t hfr_plan_build(struct hfr_plan *p, const struct hfr_layout *layout, const struct hfr_geometry *geometry,
                                const struct hfr_call *call) {
  p->layout = layout;
  p->geometry = *geometry;
  p->call = *call;
  p->esize = hfr_dtype_size(call->dtype);
  if (call->coll == HFR_P2P) return hfr_plan_exchange(p);
  if (layout->nnodes > 1) hfr_dtree(layout->nnodes, layout->node, p->pos);
  if (call->sendcounts) return hfr_plan_exchange(p);
  if (!call->count || !hfr_shape(call)->send) {
    p->algo = "agree";
    p->step = step_agree_only;
    return hfr_plan_agree(p);
  }
  if (layout->nranks == 1) return plan_alone(p);
  /* Partial sums of narrow floats travel between nodes in their own type: scale before they are rounded, or fp16 overflows where
   * the average would not. */
  p->avg_pre = call->op == hfreduceAvg && layout->nnodes > 1 && hfr_dtype(call->dtype)->spills;
  p->direct = layout->max_local == 1 && !call->premul && !p->avg_pre;
  hfreduceResult_t r = planner[call->coll](p);
  if (layout->nnodes == 1 && p->nchunks == 1) {
    size_t rows = hfr_shape(call)->send == HFR_ROWS ? (size_t)layout->nranks : 1; /* that a rank stages in a slot */
    p->staged = call->count * p->esize * rows;
  }
  return r;
}
