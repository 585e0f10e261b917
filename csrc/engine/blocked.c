/* A blocked request: what would wake it, whom it lacks, and whether its time is up. */
#include "engine.h"
#include "internal.h"

#include "../base/log.h"
#include "../base/param.h"

#include <stdio.h>
#include <string.h>

static int message_missing(struct hfr_engine *e, const struct hfr_loc *src, size_t bytes) {
  const struct hfr_msg_header *h;
  const void *data;
  struct hfr_link *l = hfr_engine_link(e, src->index, src->vc);
  return l && l->transport->recv(l, NULL, bytes, &h, &data) == HFR_LINK_AGAIN;
}

/* A reduction waits for the messages among its parts that have not come. To ask for one may take it in: if all are there now,
 * that was what the others would have woken us for. */
static void want_parts(struct hfr_engine *e, struct hfr_request *r, int s, struct hfr_waitset *set) {
  const struct hfr_cursor *c = &r->cursor[s];
  int missing = 0;
  for (int j = 0; j < c->step.nparts; j++) {
    struct hfr_part p;
    struct hfr_link *l;
    r->plan.part(&r->plan, s, c->done, j, &p);
    if (p.src.space != HFR_MSG || !message_missing(e, &p.src, c->step.bytes) || !(l = hfr_engine_link(e, p.src.index, p.src.vc)))
      continue;
    missing++;
    l->transport->want(l, 1, set);
  }
  if (!missing) set->ready = 1;
}

static void want_request(struct hfr_engine *e, struct hfr_request *r, struct hfr_waitset *set) {
  if (!r->started) return;
  for (int s = 0; s < r->plan.nstages; s++) {
    struct hfr_stage *st = &r->plan.stage[s];
    struct hfr_cursor *c = &r->cursor[s];
    if (c->done == st->niter) continue;
    int posted = st->kind == HFR_STAGE_SEND && c->done < c->posted;
    if (r->window && c->have_step && !posted && !hfr_window_reach(r->window, c->need)) continue; /* it would not be taken */
    struct hfr_link *l;
    if (st->kind == HFR_STAGE_SEND && (posted || (c->have_step && hfr_guards_open(e, r, &c->step))) &&
        (l = hfr_engine_link(e, st->peer, st->vc)))
      l->transport->want(l, 0, set);
    if (st->kind == HFR_STAGE_RECV && c->have_step && hfr_guards_open(e, r, &c->step) &&
        (l = hfr_engine_link(e, st->peer, st->vc)))
      l->transport->want(l, 1, set);
    if (st->kind == HFR_STAGE_REDUCE && c->have_step && hfr_guards_open(e, r, &c->step)) want_parts(e, r, s, set);
  }
}

void hfr_engine_want(struct hfr_engine *e, struct hfr_waitset *set) {
  if (e->queue) want_request(e, e->queue, set);
  e->visit++;
  for (struct hfr_request *r = e->p2p; r; r = r->next) {
    if (r->plan.call.coll == HFR_PAIR) continue; /* the arena's bell is rung */
    if (r->plan.call.receiving)
      hfr_p2p_want(e, r, set);
    else if (hfr_my_turn(e, r))
      want_request(e, r, set);
  }
  struct hfr_request *waiting = e->queue ? e->queue : e->p2p;
  if (waiting && e->remote->attend && e->layout->nnodes > 1 && e->remote->attend(e->net) == HFR_LINK_FAILED)
    hfr_fail_request(e, waiting, "network", hfr_last_error()->peer, hfr_last_error()->code, hfr_last_error()->text);
}

int hfr_engine_attend(struct hfr_engine *e) {
  if (e->layout->nnodes == 1 || !e->remote->attend || atomic_load_explicit(&e->active, memory_order_acquire) ||
      !hfr_drive_begin(e))
    return 0;
  int again = e->remote->attend(e->net) == HFR_LINK_AGAIN; /* if one has failed, the next operation over it tells */
  hfr_drive_end(e);
  return again;
}

/* A collective that waits longer than this tells its fingerprint. */
#define STUCK_NS 200000000ll

/* What a rank sent before it left may still be on its way for so long. */
#define LEFT_GRACE_NS 500000000ll

/* Ranks that a stuck request lacks, as text. */
struct culprits {
  struct hfr_engine *engine;
  const char *phase;
  const char *lead; /* in front of the first name */
  int peer, named;
  int gone; /* a rank that is waited for and has left, or -1 */
  int64_t now_ns;
  char text[400];
  size_t used;
};

static void name_rank(struct culprits *c, const char *phase, int rank) {
  int64_t left = atomic_load_explicit(&c->engine->left_ns[rank], memory_order_relaxed);
  if (c->peer < 0) c->peer = rank, c->phase = phase;
  if (left && c->now_ns - left > LEFT_GRACE_NS) c->gone = rank;
  if (c->named++ < 8 && c->used < sizeof c->text)
    c->used += (size_t)snprintf(c->text + c->used, sizeof c->text - c->used, "%srank %d on %s", c->named > 1 ? ", " : c->lead,
                                rank, c->engine->net->host[rank]);
}

/* Name the local ranks that keep guard g shut; 1 if an own stage does. */
static int name_guard(struct culprits *c, struct hfr_request *r, const struct hfr_guard *g, const char *phase) {
  const struct hfr_layout *lay = c->engine->layout;
  if (g->who == HFR_OWN) {
    for (int i = g->first; i < g->first + g->n; i++)
      if (r->cursor[i].done < g->need) return 1;
    return 0;
  }
  int from = g->who == HFR_ONE ? g->first : 0, to = g->who == HFR_ONE ? from + 1 : g->who == HFR_LANES ? lay->lanes : lay->nlocal;
  for (int i = from; i < to; i++) {
    struct hfr_guard one = *g;
    one.who = HFR_ONE;
    one.first = i;
    if (i != lay->local && !hfr_counter_reached(c->engine, r, &one)) name_rank(c, phase, hfr_rank_at(lay, lay->node, i));
  }
  return 0;
}

static void name_stage(struct culprits *c, struct hfr_request *r, int s) {
  struct hfr_stage *st = &r->plan.stage[s];
  struct hfr_cursor *cur = &r->cursor[s];
  if (cur->done == st->niter) return;
  if (r->window && cur->have_step && !hfr_window_reach(r->window, cur->need)) {
    snprintf(c->text, sizeof c->text, "waiting for the copies of its own device (segment %d of %d)", cur->need + 1,
             r->window->nsegs);
    c->phase = "device copy";
    return;
  }
  if (st->kind == HFR_STAGE_SEND && cur->done < cur->posted) name_rank(c, st->name, st->peer);
  if (!cur->have_step) return;
  int own = 0;
  for (int j = 0; j < cur->step.nguards; j++) own |= name_guard(c, r, &cur->step.guard[j], st->name);
  if (own || c->named) return;
  if (st->kind == HFR_STAGE_RECV || st->kind == HFR_STAGE_SEND) name_rank(c, st->name, st->peer);
  for (int j = 0; st->kind == HFR_STAGE_REDUCE && j < cur->step.nparts; j++) {
    struct hfr_part p;
    r->plan.part(&r->plan, s, cur->done, j, &p);
    if (p.src.space == HFR_MSG && message_missing(c->engine, &p.src, cur->step.bytes)) name_rank(c, st->name, p.src.index);
  }
}

/* Whom does a receive wait for? From any source: all the others, and only when all have left can none of them send. */
static void name_sources(struct culprits *c, const struct hfr_request *r) {
  const struct hfr_layout *lay = c->engine->layout;
  int from = r->source >= 0 ? r->source : r->plan.call.root, stay = 0;
  if (from != HFR_ANY_SOURCE) {
    name_rank(c, "recv", from);
    return;
  }
  snprintf(c->text, sizeof c->text, "waiting for any source");
  c->lead = "waiting for any source: ";
  for (int rank = 0; rank < lay->nranks; rank++) {
    if (rank == lay->rank) continue;
    c->gone = -1;
    name_rank(c, "recv", rank);
    stay |= c->gone < 0;
  }
  if (stay) c->gone = -1;
  c->peer = -1;
  c->phase = "recv";
}

/* Of a pair's devices, one's own may be the late one. */
static void name_partner(struct culprits *c, struct hfr_request *r) {
  const struct hfr_layout *lay = c->engine->layout;
  const struct hfr_exchange *x = &r->exchange;
  if (x->pushed > r->window->passed) {
    name_rank(c, x->back ? "NVLink results" : "NVLink inputs", hfr_rank_at(lay, lay->node, x->partner));
    return;
  }
  snprintf(c->text, sizeof c->text, "waiting for the copies of its own device over NVLink (segment %d of %d)", x->pushed + 1,
           r->window->nsegs);
  c->phase = "device copy";
}

/* Who and what does the request wait for: the first stage that is stuck on others, and the peers it lacks. */
static void find_culprits(struct hfr_engine *e, struct hfr_request *r, int64_t now, struct culprits *c) {
  const struct hfr_layout *lay = e->layout;
  *c = (struct culprits){
      .engine = e, .phase = "start", .lead = "waiting for ", .peer = -1, .gone = -1, .now_ns = now, .text = "waiting"};
  if (r->plan.call.coll == HFR_P2P && r->plan.call.receiving) {
    name_sources(c, r);
    return;
  }
  if (r->plan.call.coll == HFR_PAIR) {
    name_partner(c, r);
    return;
  }
  if (!r->verified)
    for (int i = 0; i < lay->nlocal; i++)
      if (i != lay->local && atomic_load(&e->arena->ctrl[i].start) < r->fp.seq)
        name_rank(c, "verify", hfr_rank_at(lay, lay->node, i));
  for (int s = 0; !c->named && s < r->plan.nstages; s++) name_stage(c, r, s);
}

/* ---------------------------------------------------------------- waits that speak */

/* How far it is: moves with every step, so that what advances is not taken for stuck. */
static int64_t moves_of(const struct hfr_engine *e, const struct hfr_request *r) {
  int64_t moves = r->verified;
  if (r->plan.call.coll == HFR_P2P && r->plan.call.receiving) return hfr_p2p_parts(e, r);
  if (r->plan.call.coll == HFR_PAIR) return r->exchange.pushed;
  for (int s = 0; s < r->plan.nstages; s++) moves += r->cursor[s].done + r->cursor[s].posted;
  return moves;
}

/* Has it waited so long that it should say so now? If so, it need not again until twice that time. */
static int should_speak(const struct hfr_engine *e, struct hfr_request *r, int64_t now) {
  int64_t after = (int64_t)(hfr_param_real(HFR_PARAM_WARN_AFTER) * 1e9), moves = moves_of(e, r);
  if (after <= 0 || r->timeout_ns <= 0) return 0;
  if (!r->speak_ns || moves != r->moves) {
    r->still_ns = r->speak_ns ? now : r->deadline_ns - r->timeout_ns;
    r->speak_ns = r->still_ns + after;
    r->moves = moves;
  }
  if (now < r->speak_ns) return 0;
  while (r->speak_ns <= now) r->speak_ns += r->speak_ns - r->still_ns;
  return 1;
}

/* others: so many sends and receives that wait as long. */
static void speak(struct hfr_engine *e, struct hfr_request *r, int64_t now, int others) {
  struct culprits c;
  char more[64] = "", time[64];
  const char *purpose = atomic_load_explicit(&e->purpose, memory_order_relaxed);
  const struct hfr_call *call = &r->plan.call;
  find_culprits(e, r, now, &c);
  if (others)
    snprintf(more, sizeof more, "; %d more %s", others, others > 1 ? "sends and receives wait" : "send or receive waits");
  hfr_log_wait(time, sizeof time, now - (r->deadline_ns - r->timeout_ns), r->timeout_ns);
  HFR_WARN("rank %d on %s waits%s in %s #%llu%s%s (%s%s)", e->layout->rank, e->host, c.text + strlen("waiting"),
           call->coll != HFR_P2P ? hfr_coll_name(call->coll)
           : call->receiving     ? "recv"
                                 : "send",
           (unsigned long long)r->fp.seq, purpose ? " of " : "", purpose ? purpose : "", time, more);
}

/* ---------------------------------------------------------------- waits that end */

enum haste { IN_TIME, LATE, CLOSING };

/* Is its time up, or that of the communicator? */
static enum haste haste_of(const struct hfr_engine *e, const struct hfr_request *r, int64_t now) {
  int64_t leave = atomic_load_explicit(&e->leave_ns, memory_order_relaxed);
  return now > r->deadline_ns ? LATE : leave && now > leave ? CLOSING : IN_TIME;
}

/* Somebody who is waited for has gone, or it takes too long. */
static void complain(struct hfr_engine *e, struct hfr_request *r, const struct culprits *c, enum haste haste) {
  char text[600];
  if (c->gone >= 0) {
    snprintf(text, sizeof text, "rank %d on %s has closed the communicator or exited; %s", c->gone, e->net->host[c->gone],
             c->text);
    hfr_fail_request(e, r, c->phase, c->gone, hfreduceRemoteError, text);
  } else if (haste == LATE) {
    snprintf(text, sizeof text, "deadline of %.3g s passed %s", (double)r->timeout_ns * 1e-9, c->text);
    hfr_fail_request(e, r, c->phase, c->peer, hfreduceTimeout, text);
  } else if (haste == CLOSING) {
    snprintf(text, sizeof text, "given up, since the communicator is being closed and waits no longer; it was %s", c->text);
    hfr_fail_request(e, r, c->phase, c->peer, hfreduceTimeout, text);
    HFR_WARN("%s", e->why.text); /* who closes is told of no error */
  }
}

/* The request is over, but others may still read what it lent. */
static void check_lender(struct hfr_engine *e, struct hfr_request *r, int64_t now) {
  const struct hfr_layout *lay = e->layout;
  struct culprits c = {.engine = e, .phase = "copy-out", .lead = "waiting for ", .peer = -1, .gone = -1, .now_ns = now};
  enum haste haste = haste_of(e, r, now);
  if (haste == IN_TIME && !atomic_load_explicit(&e->anyone_left, memory_order_relaxed)) return;
  for (int i = 0; i < lay->nlocal; i++)
    if (atomic_load_explicit(&e->arena->ctrl[i].out, memory_order_relaxed) < r->base + (uint64_t)r->plan.nchunks)
      name_rank(&c, "copy-out", hfr_rank_at(lay, lay->node, i));
  if (c.named) complain(e, r, &c, haste);
}

static void check_request(struct hfr_engine *e, struct hfr_request *r, int64_t now) {
  if (!r->started) return;
  struct culprits c;
  enum haste haste = haste_of(e, r, now);
  if (!r->reported && e->on_stuck && e->layout->nnodes > 1 && r->plan.call.coll < HFR_P2P && r->timeout_ns > 0 &&
      now - (r->deadline_ns - r->timeout_ns) > STUCK_NS) {
    r->reported = 1;
    e->on_stuck(e->on_error_arg, &r->fp);
  }
  if (haste == IN_TIME && !atomic_load_explicit(&e->anyone_left, memory_order_relaxed)) return;
  find_culprits(e, r, now, &c);
  complain(e, r, &c, haste);
}

void hfr_engine_check(struct hfr_engine *e, int64_t now) {
  for (struct hfr_request *r = e->lenders; r && !atomic_load_explicit(&e->error, memory_order_relaxed); r = r->next)
    check_lender(e, r, now);
  if (e->queue) check_request(e, e->queue, now);
  if (e->queue && e->queue->started && !atomic_load_explicit(&e->error, memory_order_relaxed) && should_speak(e, e->queue, now))
    speak(e, e->queue, now, 0);
  struct hfr_request *first = NULL;
  int silent = 0;
  for (struct hfr_request *r = e->p2p; r && !atomic_load_explicit(&e->error, memory_order_relaxed); r = r->next) {
    check_request(e, r, now);
    if (!r->started || !should_speak(e, r, now)) continue;
    silent += first != NULL;
    if (!first) first = r;
  }
  if (first && !atomic_load_explicit(&e->error, memory_order_relaxed)) speak(e, first, now, silent);
}
