/* What is made of messages alone: send/recv, all_to_all between nodes and uneven, gather, scatter. Between local ranks they go
 * through rings, else over the network. */
#include "coll.h"

static size_t message_bytes(const struct hfr_plan *p, int peer) {
  return hfr_message_bytes(p->layout, &p->geometry, peer, p->esize);
}

/* What goes to (sending) or comes from `peer`: bytes, and where it starts in the user's buffer. */
static size_t extent(const struct hfr_plan *p, int sending, int peer, size_t *off) {
  const struct hfr_call *c = &p->call;
  if (c->sendcounts) {
    *off = (sending ? c->senddispls : c->recvdispls)[peer] * p->esize;
    return (sending ? c->sendcounts : c->recvcounts)[peer] * p->esize;
  }
  *off = hfr_has_many(c, !sending) ? (size_t)peer * c->count * p->esize : 0;
  return c->count * p->esize;
}

static void step_exchange(const struct hfr_plan *p, int stage, int64_t i, struct hfr_step *s) {
  const struct hfr_stage *st = &p->stage[stage];
  if (hfr_step_agree(p, stage, s)) return;
  s->nparts = 1;
  if (st->role == ROLE_COPY) return;
  size_t off, whole = extent(p, st->role == ROLE_NSEND, st->peer, &off), unit = message_bytes(p, st->peer), at = (size_t)i * unit;
  s->bytes = whole - at < unit ? whole - at : unit;
  s->src = hfr_user(HFR_SEND, off + at);
  s->dst = hfr_user(HFR_RECV, off + at);
}

static void part_exchange(const struct hfr_plan *p, int stage, int64_t i, int j, struct hfr_part *part) {
  size_t from, to, bytes = extent(p, 1, p->layout->rank, &from);
  (void)stage, (void)j;
  extent(p, 0, p->layout->rank, &to);
  *part = hfr_copy_part(p, hfr_user(HFR_SEND, from), hfr_user(HFR_RECV, to), bytes, p->geometry.chunk, i);
}

/* An empty message is sent too: that is how the other side knows. */
static hfreduceResult_t add_message_stage(struct hfr_plan *p, int sending, int peer, const char *name) {
  size_t off, bytes = extent(p, sending, peer, &off), unit = message_bytes(p, peer);
  HFR_ADD(s, p, sending ? ROLE_NSEND : ROLE_NRECV, sending ? HFR_STAGE_SEND : HFR_STAGE_RECV,
          bytes ? (int64_t)((bytes + unit - 1) / unit) : 1, name);
  s->peer = peer;
  s->vc = p->call.coll == HFR_P2P ? HFR_VC_P2P : HFR_VC_A;
  return hfreduceSuccess;
}

static hfreduceResult_t add_self_copy(struct hfr_plan *p) {
  size_t from, bytes = extent(p, 1, p->layout->rank, &from);
  HFR_ADD(copy, p, ROLE_COPY, HFR_STAGE_COPY, hfr_copy_iters(p, bytes, p->geometry.chunk), "copy-out");
  (void)copy;
  return hfreduceSuccess;
}

hfreduceResult_t hfr_plan_exchange(struct hfr_plan *p) {
  const struct hfr_layout *l = p->layout;
  const struct hfr_call *c = &p->call;
  int me = l->rank, n = l->nranks, root = c->root;
  p->algo = "messages";
  p->step = step_exchange;
  p->part = part_exchange;
  if (c->coll == HFR_P2P) /* a receive has no stages: messages find it (engine/p2p.c) */
    return c->receiving ? hfreduceSuccess : add_message_stage(p, 1, root, "send");
  int rooted = hfr_shape(c)->rooted, with_all = !rooted || me == root; /* the others have to do with the root alone */
  int sends = hfr_rows_of(c, 0, me, n) > 0, receives = hfr_rows_of(c, 1, me, n) > 0;
  for (int d = 1; with_all && hfr_has_many(c, 0) && d < n; d++)
    HFR_TRY(add_message_stage(p, 1, (me + d) % n, "send")); /* neighbours first: the load spreads */
  if (!with_all && sends) HFR_TRY(add_message_stage(p, 1, root, "send"));
  for (int d = 1; with_all && hfr_has_many(c, 1) && d < n; d++) HFR_TRY(add_message_stage(p, 0, (me + n - d) % n, "recv"));
  if (!with_all && receives) HFR_TRY(add_message_stage(p, 0, root, "recv"));
  if (with_all) HFR_TRY(add_self_copy(p));
  return rooted ? hfr_plan_agree(p) : hfreduceSuccess;
}
