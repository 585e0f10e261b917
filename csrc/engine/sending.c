/* The SEND stages of a request: what they send, from where, and when it is no longer needed. */
#include "internal.h"

/* What iteration i of a SEND stage sends. What is passed on leaves from where it arrived, as long as that is held. */
static const void *source(struct hfr_engine *e, struct hfr_request *r, const struct hfr_stage *st, int64_t i,
                          const struct hfr_step *step) {
  const void *kept = st->passes ? r->cursor[st->passes - 1].kept[i % HFR_KEPT].data : NULL;
  return !step->bytes ? NULL : kept ? kept : hfr_place(e, r, &step->src);
}

/* A stage that passes messages on has got further: let go of those that all have passed on. */
static void let_go(struct hfr_engine *e, struct hfr_request *r, int arrival) {
  struct hfr_cursor *c = &r->cursor[arrival];
  int64_t all = c->done;
  for (int s = 0; s < r->plan.nstages; s++)
    if (r->plan.stage[s].kind == HFR_STAGE_SEND && r->plan.stage[s].passes == arrival + 1 && r->cursor[s].done < all)
      all = r->cursor[s].done;
  for (; c->passed < all; c->passed++) {
    struct hfr_kept *k = &c->kept[c->passed % HFR_KEPT];
    struct hfr_link *l = hfr_engine_link(e, r->plan.stage[arrival].peer, r->plan.stage[arrival].vc);
    if (k->data) l->transport->let_go(l, k->token);
    k->data = NULL;
  }
}

/* The first message from a local rank's lending area tells the transport of the whole area. */
static void lend_area(struct hfr_engine *e, struct hfr_request *r, const struct hfr_link *l, const struct hfr_loc *src) {
  if (r->lent & 4 || !l->transport->lend || !hfr_arena_lent(e->arena, src->index, r->base + (uint64_t)src->chunk)) return;
  r->lent |= 4;
  l->transport->lend(e->net, hfr_arena_lending(e->arena, src->index), e->arena->lend);
}

/* The first message from a user's buffer tells the transport of the whole buffer. */
static void lend(struct hfr_engine *e, struct hfr_request *r, const struct hfr_link *l, const struct hfr_loc *src) {
  const struct hfr_call *call = &r->plan.call;
  int from_recv = src->space == HFR_RECV;
  if (src->space == HFR_IN) lend_area(e, r, l, src);
  if ((src->space != HFR_SEND && !from_recv) || r->lent >> from_recv & 1 || !l->transport->lend) return;
  r->lent |= 1 << from_recv;
  if (r->window && (from_recv ? r->window->segment[0].out : r->window->segment[0].in)) {
    l->transport->lend(e->net, r->window->memory[from_recv], r->window->memory_bytes[from_recv]);
    return;
  }
  size_t rows = (size_t)hfr_window_rows(&r->plan, from_recv);
  l->transport->lend(e->net, from_recv ? call->recv : call->send, call->count * r->plan.esize * rows);
}

/* SEND stages have two cursors: handed to the link, and no longer needing their data. */
int hfr_advance_send(struct hfr_engine *e, struct hfr_request *r, int s) {
  struct hfr_stage *st = &r->plan.stage[s];
  struct hfr_cursor *c = &r->cursor[s];
  struct hfr_link *l = hfr_engine_link(e, st->peer, st->vc);
  int moved = 0;
  if (c->posted < st->niter) {
    hfr_load_step(r, s, c->posted);
    int reached = !r->window || hfr_window_reach(r->window, c->need);
    if (reached && hfr_guards_open(e, r, &c->step)) {
      struct hfr_msg_header h = {.magic = HFR_MSG_MAGIC, .bytes = c->step.bytes, .offset = (uint64_t)c->posted, .fp = r->fp};
      lend(e, r, l, &c->step.src);
      int sent = l->transport->post_send(l, &h, source(e, r, st, c->posted, &c->step));
      if (sent == HFR_LINK_FAILED) {
        hfr_fail_request(e, r, st->name, st->peer, hfr_last_error()->code, hfr_last_error()->text);
        return 0;
      }
      if (sent == HFR_LINK_OK) c->posted++, c->have_step = 0, moved = 1;
    }
  }
  if (c->done < c->posted) {
    uint64_t sent = l->transport->sent(l);
    if (sent == UINT64_MAX) {
      hfr_fail_request(e, r, st->name, st->peer, hfr_last_error()->code, hfr_last_error()->text);
      return 0;
    }
    int64_t now = (int64_t)(sent - c->tx_base);
    if (now > c->done) {
      c->done = now;
      moved = 1;
      if (st->passes) let_go(e, r, st->passes - 1);
    }
  }
  return moved;
}
