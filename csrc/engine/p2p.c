/*
 * Sends and receives: a message goes to the oldest posted receive that its source and tag fit, as in MPI.
 *
 * A message is taken off its link once a receive fits it: its payload then goes straight to the user's buffer. A message that
 * nobody asked for stays on the link, and its sender waits, until a receive waits for something behind it. Then it is kept aside
 * on the heap, as many of them as the user's order of calls asks for: nothing but memory bounds that. So is the rest of a message
 * whose receive gets no more room in its window until an older receive has got its own.
 */
#include "engine.h"
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A message that was in the way. */
struct unexpected {
  struct unexpected *next;
  struct hfr_fingerprint fp;
  struct hfr_request *taker; /* a receive that fits came before the end of the message did */
  size_t bytes, skip;        /* skip: went to the receive before the rest had to be kept; not in `data` */
  uint8_t data[];
};

/* What comes from one rank. */
struct hfr_mailbox {
  struct hfr_link *link;
  uint64_t visit;                   /* engine->visit when it was last looked at */
  uint64_t posted;                  /* receives from this rank, ever */
  uint64_t messages;                /* messages begun, ever */
  struct unexpected *aside, **tail; /* in order of arrival; the last one may still be arriving */
  int gone;                         /* the rank left, and its link with it */
  int arriving;                     /* a message has begun and not ended: */
  struct hfr_fingerprint fp;        /* what it is */
  size_t bytes, have, unit;         /* of payload: in all, come, in a part */
  int64_t part;                     /* parts come */
  struct hfr_request *taker;        /* where it goes: to a receive, */
  struct unexpected *kept;          /* or aside */
};

static struct hfr_mailbox *open_mailbox(struct hfr_engine *e, const struct hfr_request *r, int peer) {
  struct hfr_mailbox *b = &e->mailbox[peer];
  if (!b->link && !(b->link = hfr_engine_link(e, peer, HFR_VC_P2P))) {
    hfr_fail_request(e, r, "connect", peer, hfr_last_error()->code, hfr_last_error()->text);
    return NULL;
  }
  if (!b->tail) b->tail = &b->aside;
  return b;
}

static int fits(const struct hfr_request *r, int peer, int tag) {
  const struct hfr_call *c = &r->plan.call;
  return c->receiving && r->source < 0 && (c->root == peer || c->root == HFR_ANY_SOURCE) && c->tag == tag;
}

/* Receive r takes a message of `peer`. 0: they disagree. */
static int take(struct hfr_engine *e, struct hfr_request *r, int peer, const struct hfr_fingerprint *fp) {
  struct hfr_fingerprint mine = r->fp;
  mine.seq = fp->seq; /* tags let messages overtake: sender and receiver count differently */
  if (!hfr_fingerprint_equal(&mine, fp)) {
    hfr_fail_mismatch(e, &r->fp, peer, fp);
    return 0;
  }
  r->source = peer;
  if (!r->started && hfr_request_ready(r)) hfr_request_start(r);
  if (r->plan.call.root == HFR_ANY_SOURCE) e->any_next = (peer + 1) % e->layout->nranks; /* no rank starves the others */
  return 1;
}

static void end_receive(struct hfr_request *r) {
  if (r->plan.call.source) *r->plan.call.source = r->source;
  r->left = 0;
}

/* ---------------------------------------------------------------- kept aside */

/* Put as much of a kept message as there is room for where it belongs. 1: something moved. */
static int take_out(struct hfr_request *r) {
  struct unexpected *u = r->kept;
  struct hfr_window *w = r->window;
  int moved = 0;
  while (hfr_window_reach(w, hfr_window_segment(r, 1, r->kept_bytes))) {
    size_t left = u->bytes - r->kept_bytes, take = w->bytes - r->kept_bytes % w->bytes;
    if (take > left) take = left;
    if (!r->started) hfr_request_start(r);
    if (take) memcpy(hfr_window_place(r, 1, r->kept_bytes), u->data + r->kept_bytes, take);
    r->kept_bytes += take;
    moved = 1;
    if (r->kept_bytes == u->bytes) {
      r->kept = NULL;
      free(u);
      end_receive(r);
      break;
    }
    hfr_window_pass(w, (int)(r->kept_bytes / w->bytes));
  }
  return moved;
}

static void hand_over(struct hfr_mailbox *b, struct unexpected *u, struct hfr_request *r) {
  struct unexpected **at = &b->aside;
  while (*at != u) at = &(*at)->next;
  *at = u->next;
  if (!*at) b->tail = at;
  if (r->window) {
    r->kept = u;
    r->kept_bytes = u->skip;
    take_out(r);
    return;
  }
  if (u->bytes) memcpy(r->plan.call.recv, u->data, u->bytes);
  free(u);
  end_receive(r);
}

/* The oldest message of `peer` that was kept aside and fits goes to r. 1: there was one, or an error. */
static int take_kept(struct hfr_engine *e, struct hfr_request *r, int peer) {
  struct hfr_mailbox *b = &e->mailbox[peer];
  struct unexpected *u = b->aside;
  while (u && (u->taker || u->fp.root != r->plan.call.tag)) u = u->next;
  if (!u) return 0;
  if (!take(e, r, peer, &u->fp)) return 1;
  if (b->kept == u)
    u->taker = r;
  else
    hand_over(b, u, r);
  return 1;
}

void hfr_p2p_post(struct hfr_engine *e, struct hfr_request *r) {
  int n = e->layout->nranks, root = r->plan.call.root;
  *e->p2p_tail = r;
  e->p2p_tail = &r->next;
  r->source = -1;
  if (!r->plan.call.receiving) {
    struct hfr_link *l = hfr_engine_link(e, root, HFR_VC_P2P);
    if (!l) {
      hfr_fail_request(e, r, "connect", root, hfr_last_error()->code, hfr_last_error()->text);
      return;
    }
    r->ticket = l->tx_ticket++;
    r->fp.seq = r->ticket + 1;
    return;
  }
  r->verified = 1; /* each message is */
  r->left = 1;
  if (!e->mailbox && !(e->mailbox = calloc((size_t)n, sizeof *e->mailbox))) {
    hfr_fail_request(e, r, "start", -1, hfreduceSystemError, "out of memory");
    return;
  }
  r->fp.seq = root == HFR_ANY_SOURCE ? ++e->any_posted : ++e->mailbox[root].posted;
  for (int k = 0; k < n && root == HFR_ANY_SOURCE; k++) {
    int peer = (e->any_next + k) % n;
    if (!open_mailbox(e, r, peer) || take_kept(e, r, peer)) return;
  }
  if (root != HFR_ANY_SOURCE && open_mailbox(e, r, root)) take_kept(e, r, root);
}

/* ---------------------------------------------------------------- arriving */

/* Keep what is still to come of a message aside, while r waits. 0: an error. */
static int keep_aside(struct hfr_engine *e, const struct hfr_request *r, int peer) {
  struct hfr_mailbox *b = &e->mailbox[peer];
  struct unexpected *u = malloc(sizeof *u + b->bytes);
  if (!u) {
    char text[200];
    snprintf(text, sizeof text, "out of memory for a message of %zu bytes from rank %d on %s that came before its receive",
             b->bytes, peer, e->net->host[peer]);
    hfr_fail_request(e, r, "recv", peer, hfreduceSystemError, text);
    return 0;
  }
  *u = (struct unexpected){.fp = b->fp, .taker = b->taker, .bytes = b->bytes, .skip = b->have};
  *b->tail = b->kept = u;
  b->tail = &u->next;
  return 1;
}

/* Its segments lie where those of an older call's do, whose message has not come: it may be behind this one. Calls of one launch
 * are in an order in which that cannot be. */
static int is_held_up(const struct hfr_engine *e, const struct hfr_request *taker) {
  for (const struct hfr_request *r = e->p2p; r && r != taker; r = r->next)
    if (r->plan.call.receiving && r->window && r->left && r->work != taker->work) return 1;
  return 0;
}

/* The head of a message has come, while r waited for one: whose is it? 0: an error. */
static int begin_message(struct hfr_engine *e, struct hfr_request *r, int peer, const struct hfr_fingerprint *fp) {
  struct hfr_mailbox *b = &e->mailbox[peer];
  size_t esize = hfr_dtype_size((hfreduceDataType_t)fp->dtype);
  if (fp->coll != HFR_P2P || fp->seq != b->messages + 1 || !esize || fp->count > PTRDIFF_MAX / esize) {
    char text[256], what[128];
    hfr_describe_fingerprint(fp, what, sizeof what);
    snprintf(text, sizeof text, "rank %d on %s sends %s where message %llu was expected", peer, e->net->host[peer], what,
             (unsigned long long)b->messages + 1);
    hfr_fail_request(e, r, "recv", peer, hfreduceInternalError, text);
    return 0;
  }
  b->fp = *fp;
  b->bytes = (size_t)fp->count * esize;
  b->unit = hfr_message_bytes(e->layout, &e->geometry, peer, esize);
  b->have = 0;
  b->part = 0;
  b->taker = e->p2p; /* the oldest that wants it, asked or not: one whose window is shut was not */
  while (b->taker && !fits(b->taker, peer, fp->root)) b->taker = b->taker->next;
  if (b->taker && !take(e, b->taker, peer, fp)) return 0;
  if ((!b->taker || !hfr_request_ready(b->taker)) && !keep_aside(e, r, peer)) return 0;
  b->messages++;
  b->arriving = 1;
  return 1;
}

static void end_message(struct hfr_mailbox *b) {
  struct unexpected *u = b->kept;
  b->arriving = 0;
  b->kept = NULL;
  if (!u)
    end_receive(b->taker);
  else if (u->taker)
    hand_over(b, u, u->taker);
}

/* Where the next part goes; NULL: there is no room yet. */
static uint8_t *next_place(const struct hfr_mailbox *b) {
  if (b->kept) return b->kept->data + b->have;
  struct hfr_request *r = b->taker;
  if (!r->window) return (uint8_t *)r->plan.call.recv + b->have;
  return hfr_window_reach(r->window, hfr_window_segment(r, 1, b->have)) ? hfr_window_place(r, 1, b->have) : NULL;
}

static size_t next_part(const struct hfr_mailbox *b) {
  size_t left = b->bytes - b->have;
  return left < b->unit ? left : b->unit;
}

/* Is this header the part that comes next? */
static int part_ok(struct hfr_engine *e, const struct hfr_request *r, int peer, const struct hfr_msg_header *h) {
  const struct hfr_mailbox *b = &e->mailbox[peer];
  if (hfr_fingerprint_equal(&h->fp, &b->fp) && h->bytes == next_part(b) && h->offset == (uint64_t)b->part) return 1;
  char text[256];
  snprintf(text, sizeof text, "rank %d on %s sends part %llu of %llu bytes where part %lld of %zu bytes was expected", peer,
           e->net->host[peer], (unsigned long long)h->offset, (unsigned long long)h->bytes, (long long)b->part, next_part(b));
  hfr_fail_request(e, r, "recv", peer, hfreduceInternalError, text);
  return 0;
}

/* Take the next part of what comes from `peer`, for r or on its way there. 1: something moved. */
static int receive_part(struct hfr_engine *e, struct hfr_request *r, int peer) {
  struct hfr_mailbox *b = &e->mailbox[peer];
  const struct hfr_call *call = &r->plan.call;
  const struct hfr_msg_header *h;
  const void *data;
  uint8_t *place = NULL;
  size_t bytes = 0;
  int began = 0;
  if (b->arriving) {
    place = next_place(b);
    bytes = next_part(b);
    if (!place && bytes) {
      if (!is_held_up(e, b->taker)) return 0;
      if (!keep_aside(e, r, peer)) return 1;
      place = next_place(b);
    }
  } else if (call->root != HFR_ANY_SOURCE) { /* most likely it is r's, so the transport may put it there; else it is moved */
    size_t whole = call->count * r->plan.esize, unit = hfr_message_bytes(e->layout, &e->geometry, peer, r->plan.esize);
    place = r->window ? hfr_window_place(r, 1, 0) : call->recv;
    bytes = whole < unit ? whole : unit;
  }
  int got = b->link->transport->recv(b->link, place, bytes, &h, &data);
  if (got == HFR_LINK_OK) {
    if (!b->arriving && (began = 1) && !begin_message(e, r, peer, &h->fp)) return 1;
    if (!part_ok(e, r, peer, h)) return 1;
    place = next_place(b);
    bytes = next_part(b);
    if (!data) got = b->link->transport->recv(b->link, place, bytes, &h, &data);
  }
  if (got == HFR_LINK_FAILED) {
    if (r->source < 0 && call->root == HFR_ANY_SOURCE && !b->arriving && atomic_load(&e->left_ns[peer]))
      b->gone = 1; /* the others may still send */
    else
      hfr_fail_request(e, r, "recv", peer, hfr_last_error()->code, hfr_last_error()->text);
    return 1;
  }
  if (got == HFR_LINK_AGAIN) return began;
  if (bytes && data != place) memcpy(place, data, bytes);
  b->link->transport->release(b->link);
  b->have += bytes;
  b->part++;
  if (b->have == b->bytes)
    end_message(b);
  else if (!b->kept && b->taker->window)
    hfr_window_pass(b->taker->window, (int)(b->have / b->taker->window->bytes));
  return 1;
}

/* Not looked at since engine->visit moved? It counts as looked at now. */
static int first_visit(struct hfr_engine *e, struct hfr_mailbox *b) {
  if (b->visit == e->visit) return 0;
  b->visit = e->visit;
  return 1;
}

int hfr_p2p_receive(struct hfr_engine *e, struct hfr_request *r) {
  int moved = 0, n = e->layout->nranks, any = r->source < 0 && r->plan.call.root == HFR_ANY_SOURCE;
  if (r->kept) return take_out(r);
  if (!hfr_request_ready(r)) return 0;
  for (int k = 0, first = e->any_next; k < (any ? n : 1) && r->left; k++) {
    int peer = any ? (first + k) % n : r->source >= 0 ? r->source : r->plan.call.root;
    if ((any && e->mailbox[peer].gone) || !first_visit(e, &e->mailbox[peer])) continue;
    if (!r->started) hfr_request_start(r); /* it is the oldest that waits for this rank */
    moved |= receive_part(e, r, peer);
    if (r->source >= 0 || atomic_load_explicit(&e->error, memory_order_relaxed)) break;
  }
  return moved;
}

int64_t hfr_p2p_parts(const struct hfr_engine *e, const struct hfr_request *r) {
  const struct hfr_mailbox *b = r->source >= 0 ? &e->mailbox[r->source] : NULL;
  return b && b->arriving && b->taker == r ? b->part : 0;
}

void hfr_p2p_want(struct hfr_engine *e, const struct hfr_request *r, struct hfr_waitset *set) {
  int from = r->source >= 0 ? r->source : r->plan.call.root, any = from == HFR_ANY_SOURCE;
  int aside = r->source >= 0 && e->mailbox[r->source].kept; /* its message, or one in front of it */
  if (r->kept || (!aside && r->window && !hfr_window_reach(r->window, r->window->passed))) return; /* it would not be taken */
  for (int peer = any ? 0 : from; peer < (any ? e->layout->nranks : from + 1); peer++) {
    struct hfr_mailbox *b = &e->mailbox[peer];
    if (first_visit(e, b)) b->link->transport->want(b->link, 1, set);
  }
}

void hfr_p2p_fini(struct hfr_engine *e) {
  for (int peer = 0; e->mailbox && peer < e->layout->nranks; peer++)
    while (e->mailbox[peer].aside) {
      struct unexpected *u = e->mailbox[peer].aside;
      e->mailbox[peer].aside = u->next;
      free(u);
    }
  free(e->mailbox);
}
