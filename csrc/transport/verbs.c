/* RDMA: the data path of links (verbs_link.h has the protocol). */
#include "verbs.h"
#include "verbs_link.h"

#include "../base/param.h"
#include "../base/thread.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DRAIN_NS 1000000000ll
/* A switch that restarts a port takes seconds; the device sends again what is under way for about nine. */
#define PORT_GRACE_NS 10000000000ll
#define POLL_BATCH 16

/* The immediate: which message this is and how many of the other direction are released, 15 bits of each. The latter counts over
 * the first queue pair only. */
#define IMM_CREDIT 0x80000000u /* no message, only the count */
#define IMM_MASK 0x7fffu

static int broken(struct hfr_verbs_link *l) { return hfr_broken(&l->breakage, l->net, l->link.peer); }

/* ---------------------------------------------------------------- what the device tells */

static const char *advice(int status) {
  switch (status) {
    case HFR_IB_WC_RETRY_EXC_ERR:
      return "; it does not answer: check that its process runs, that both ports are up and reach each other, and for RoCE that "
             "UDP port 4791 is open and the GIDs are of one network";
    case HFR_IB_WC_RNR_RETRY_EXC_ERR: return "; it had no receive posted";
    case HFR_IB_WC_REM_ACCESS_ERR:
    case HFR_IB_WC_REM_INV_REQ_ERR:
    case HFR_IB_WC_REM_OP_ERR: return "; it refused the access to its memory: its process may have been replaced";
    case HFR_IB_WC_LOC_PROT_ERR:
    case HFR_IB_WC_LOC_LEN_ERR: return "; local memory was unmapped or is not registered";
    case HFR_IB_WC_LOC_QP_OP_ERR:
    case HFR_IB_WC_WR_FLUSH_ERR:
      return "; the queue pair was closed from outside: check that the port and its network interface are up, and the kernel's "
             "log";
    default: return "; check the port's state and the kernel's log";
  }
}

/* Its queue pairs are of no use any more; hfr_last_error() says why. The first trouble tells the cause, later ones follow from
 * it.
 */
static void trouble(struct hfr_verbs_link *l, enum hfr_verbs_move movable) {
  if (l->trouble || l->breakage.since_ns) return;
  l->trouble = 1;
  l->movable = movable;
  l->trouble_why = *hfr_last_error();
}

static void completion_failed(struct hfr_verbs_link *l, const struct hfr_ib_wc *wc) {
  if (l->trouble || l->phase != HFR_VERBS_UP) return; /* flushed */
  hfr_fail(hfreduceRemoteError, "RDMA from %s to its %s failed: %s (status %d, vendor %#x)%s", l->mine.port, l->theirs.port,
           l->base->ib->wc_status_str(wc->status), wc->status, wc->vendor_err, advice(wc->status));
  int path = wc->status == HFR_IB_WC_RETRY_EXC_ERR || wc->status == HFR_IB_WC_WR_FLUSH_ERR ||
             wc->status == HFR_IB_WC_LOC_QP_OP_ERR || wc->status == HFR_IB_WC_FATAL_ERR;
  trouble(l, path ? HFR_VERBS_MOVE : HFR_VERBS_STAY);
}

static void protocol_error(struct hfr_verbs_link *l, const char *what, uint32_t value) {
  hfr_fail(hfreduceCorrupt, "it broke the RDMA protocol: %s %#x", what, value);
  trouble(l, HFR_VERBS_STAY);
}

/* Look at what the port tells. With no other port to go to, one that comes back in time does no harm: the device sends again what
 * was lost meanwhile. A peer that dies meanwhile is known by its other connections. */
static void check_port(struct hfr_verbs_link *l) {
  enum hfr_ib_health health = hfr_ib_health(&l->base->port);
  if (health == HFR_IB_WHOLE) {
    l->port_down_ns = 0;
    return;
  }
  int64_t now = hfr_now_ns();
  if (!l->port_down_ns) l->port_down_ns = now;
  if (health == HFR_IB_PORT_LOST && now - l->port_down_ns < PORT_GRACE_NS && !hfr_verbs_can_fail_over(l)) return;
  hfr_fail(hfreduceRemoteError, "RDMA from %s to its %s cannot go on: %s", l->mine.port, l->theirs.port,
           health == HFR_IB_PORT_LOST ? "the port went down; check its cable, its network interface and the switch"
                                      : "the device failed or was removed; check the kernel's log");
  trouble(l, HFR_VERBS_MOVE);
}

/* What the peer does on the side channel. 1: it has closed it. */
static int listen_aside(struct hfr_verbs_link *l) {
  enum hfr_verbs_side side = hfr_verbs_look_aside(l);
  if (side == HFR_VERBS_TALKS) {
    hfr_fail(hfreduceRemoteError, "it has left its RDMA port %s and wants to go on over another", l->theirs.port);
    trouble(l, HFR_VERBS_ASKED);
  } else if (side == HFR_VERBS_RAVES) {
    hfr_fail(hfreduceCorrupt, "it broke the RDMA protocol: what came over the side channel is no hello");
    trouble(l, HFR_VERBS_STAY);
  }
  return side == HFR_VERBS_CLOSED;
}

/* Trouble found: go on over another port, or end. */
static int resolve(struct hfr_verbs_link *l) {
  if (l->trouble_why.code != hfreduceCorrupt && hfr_verbs_look_aside(l) == HFR_VERBS_TALKS) l->movable = HFR_VERBS_ASKED;
  if (l->movable != HFR_VERBS_STAY && hfr_verbs_can_fail_over(l)) {
    if (!hfr_verbs_fail_over(l)) return HFR_LINK_AGAIN;
    l->trouble_why = *hfr_last_error();
  }
  *hfr_last_error() = l->trouble_why;
  return broken(l);
}

void hfr_verbs_message_done(struct hfr_verbs_link *l, uint64_t m) {
  unsigned slot = (unsigned)(m % (unsigned)l->depth);
  l->tx_busy[slot] = 0;
  hfr_verbs_memory_done(l->tx_hold[slot]);
  l->tx_hold[slot] = 0;
}

static void send_done(struct hfr_verbs_link *l, uint64_t id) {
  struct hfr_verbs_qp *q = &l->qp[id >> 32];
  for (uint32_t last = (uint32_t)id; q->done != last + 1; q->done++) {
    int64_t m = q->message[q->done % HFR_VERBS_SQ];
    if (m >= 0) hfr_verbs_message_done(l, (uint64_t)m);
  }
}

/* The peer has released `count` messages (its low bits). */
static void take_credit(struct hfr_verbs_link *l, uint32_t count) {
  uint32_t more = (count - (uint32_t)l->credited) & IMM_MASK;
  if (more <= l->link.posted - l->credited)
    l->credited += more;
  else
    protocol_error(l, "released messages that were not sent,", count);
}

static void received(struct hfr_verbs_link *l, const struct hfr_ib_wc *wc) {
  struct hfr_verbs_qp *q = &l->qp[wc->wr_id & ~HFR_VERBS_RECEIVE];
  uint32_t imm = ntohl(wc->imm_data);
  if (++q->owed >= HFR_VERBS_REPOST && l->phase == HFR_VERBS_UP) {
    int n = q->owed;
    q->owed = 0;
    if (hfr_verbs_post_receives(l, q, n)) trouble(l, HFR_VERBS_STAY);
  }
  if (q == l->qp) take_credit(l, imm >> 16 & IMM_MASK); /* over one queue pair they never overtake each other */
  if (imm & IMM_CREDIT) return;
  uint64_t m = q->next;
  if ((imm & IMM_MASK) != (m & IMM_MASK) || m - l->released >= (unsigned)l->depth || wc->byte_len < HFR_VERBS_HEADER ||
      wc->byte_len > l->slot_bytes) {
    protocol_error(l, "unexpected message", imm);
    return;
  }
  q->next += (unsigned)l->nqps;
  l->rx_bytes[m % (unsigned)l->depth] = wc->byte_len;
}

int hfr_verbs_poll(struct hfr_verbs_link *l) {
  struct hfr_ib_wc wc[POLL_BATCH];
  int n, all = 0;
  if (!l->cq) return 0;
  do {
    n = l->cq->context->poll_cq(l->cq, POLL_BATCH, wc);
    for (int i = 0; i < n; i++) {
      if (wc[i].wr_id & HFR_VERBS_RECEIVE) l->qp[wc[i].wr_id & ~HFR_VERBS_RECEIVE].receives--;
      if (wc[i].status != HFR_IB_WC_SUCCESS)
        completion_failed(l, &wc[i]);
      else if (wc[i].opcode == HFR_IB_WC_RECV_RDMA_WITH_IMM)
        received(l, &wc[i]);
      else
        send_done(l, wc[i].wr_id);
    }
    all += n > 0 ? n : 0;
    if (n < 0) {
      hfr_fail(hfreduceSystemError, "%s: its completion queue is in error; check the kernel's log", l->mine.port);
      trouble(l, HFR_VERBS_MOVE);
    }
  } while (n == POLL_BATCH);
  while (l->sent < l->link.posted && !(l->tx_busy[l->sent % (unsigned)l->depth] && l->tx_data[l->sent % (unsigned)l->depth]))
    l->sent++;
  return all;
}

/* ---------------------------------------------------------------- sending */

static int has_room(const struct hfr_verbs_qp *q) { return q->posted - q->done < HFR_VERBS_SQ; }

/* Post a write on queue pair q; message -1: none of whose slots it uses. Not everything is signalled: a completion tells of all
 * before it. */
static int post(struct hfr_verbs_link *l, struct hfr_verbs_qp *q, struct hfr_ib_send_wr *wr, int64_t message) {
  struct hfr_ib_send_wr *bad;
  if (message >= 0 || q->posted + 1 - q->signalled >= HFR_VERBS_SQ / 4) wr->send_flags |= HFR_IB_SEND_SIGNALED;
  wr->wr_id = (uint64_t)(q - l->qp) << 32 | q->posted;
  wr->rkey = l->theirs.rkey;
  q->message[q->posted % HFR_VERBS_SQ] = message;
  int error = q->qp->context->post_send(q->qp, wr, &bad);
  if (error) {
    hfr_fail(hfreduceSystemError, "%s took no send for rank %d on %s: %s", l->mine.port, l->link.peer, l->net->host[l->link.peer],
             strerror(error));
    trouble(l, HFR_VERBS_MOVE);
    return -1;
  }
  q->posted++;
  if (wr->send_flags & HFR_IB_SEND_SIGNALED) q->signalled = q->posted;
  return 0;
}

/* Tell the peer what was released, when that is half of its slots: it has the other half meanwhile. */
static void give_credit(struct hfr_verbs_link *l) {
  struct hfr_verbs_qp *q = &l->qp[0];
  if (l->released - l->told < (unsigned)l->depth / 2 || l->trouble || l->phase != HFR_VERBS_UP) return;
  if (!has_room(q)) hfr_verbs_poll(l);
  if (!has_room(q)) return; /* asked again with the next progress */
  struct hfr_ib_send_wr wr = {.opcode = HFR_IB_WR_RDMA_WRITE_WITH_IMM,
                              .imm_data = htonl(IMM_CREDIT | ((uint32_t)l->released & IMM_MASK) << 16),
                              .remote_addr = l->theirs.address};
  if (!post(l, q, &wr, -1)) l->told = l->released;
}

/* Make progress. OK: the link is up and whole. */
static int progress(struct hfr_verbs_link *l) {
  if (l->breakage.since_ns) return broken(l);
  if (l->phase != HFR_VERBS_UP) {
    int up = hfr_verbs_bring_up(l);
    if (up != HFR_LINK_OK) return up;
  }
  hfr_verbs_poll(l);
  give_credit(l);
  return l->trouble ? resolve(l) : HFR_LINK_OK;
}

/* Room for the next message here and there? */
static int can_post(const struct hfr_verbs_link *l) {
  uint64_t m = l->link.posted;
  return m - l->credited < (unsigned)l->depth && !l->tx_busy[m % (unsigned)l->depth] && has_room(&l->qp[m % (unsigned)l->nqps]);
}

static int covers(const struct hfr_ib_mr *mr, uintptr_t at, size_t bytes) {
  uintptr_t begin = (uintptr_t)mr->addr;
  return at >= begin && bytes <= mr->length && at - begin <= mr->length - bytes;
}

/* Key under which the device reads these bytes: in the node's arena, in a link's slot, or in a user's registered buffer, which
 * *hold then keeps. 0: they are not registered. */
static uint32_t key_of(const struct hfr_verbs_link *l, const void *data, size_t bytes, int *hold) {
  const struct hfr_verbs_base *b = l->base;
  uintptr_t at = (uintptr_t)data;
  if (b->arena && covers(b->arena, at, bytes)) return b->arena->lkey;
  for (const struct hfr_verbs_link *other = b->links; other; other = other->neighbour)
    if (other->mr && covers(other->mr, at, bytes)) return other->mr->lkey;
  return hfr_verbs_memory_key(&b->port, data, bytes, hold);
}

int hfr_verbs_post_message(struct hfr_verbs_link *l, uint64_t m) {
  unsigned slot = (unsigned)(m % (unsigned)l->depth);
  uint8_t *own = hfr_verbs_tx_slot(l, m);
  uint32_t bytes = l->tx_bytes[slot], key = 0;
  int inline_ = HFR_VERBS_HEADER + bytes <= l->inline_bytes;
  if (l->tx_data[slot] && (inline_ || !(key = key_of(l, l->tx_data[slot], bytes, &l->tx_hold[slot])))) {
    memcpy(own + HFR_VERBS_HEADER, l->tx_data[slot], bytes);
    l->tx_data[slot] = NULL;
  }
  int apart = l->tx_data[slot] != NULL;
  struct hfr_ib_sge sge[2] = {{(uintptr_t)own, HFR_VERBS_HEADER + (apart ? 0 : bytes), l->mr->lkey},
                              {(uintptr_t)l->tx_data[slot], bytes, key}};
  struct hfr_ib_send_wr wr = {.opcode = HFR_IB_WR_RDMA_WRITE_WITH_IMM,
                              .sg_list = sge,
                              .num_sge = apart ? 2 : 1,
                              .send_flags = inline_ ? HFR_IB_SEND_INLINE : 0, /* copied while posting */
                              .imm_data = htonl(((uint32_t)l->released & IMM_MASK) << 16 | ((uint32_t)m & IMM_MASK)),
                              .remote_addr = l->theirs.address + slot * l->slot_bytes};
  l->tx_busy[slot] = !inline_;
  struct hfr_verbs_qp *q = &l->qp[m % (unsigned)l->nqps];
  if (post(l, q, &wr, inline_ ? -1 : (int64_t)m)) return -1;
  if (q == l->qp) l->told = l->released;
  return 0;
}

static int verbs_post_send(struct hfr_link *link, const struct hfr_msg_header *header, const void *data) {
  struct hfr_verbs_link *l = (struct hfr_verbs_link *)link;
  size_t bytes = header->bytes;
  if (l->phase != HFR_VERBS_UP || l->trouble || !can_post(l)) {
    int r = progress(l);
    if (r != HFR_LINK_OK) return r;
    if (!can_post(l)) {
      hfr_link_count_stall(link);
      return HFR_LINK_AGAIN;
    }
  }
  if (bytes > l->payload_bytes) {
    hfr_fail(hfreduceInternalError, "message of %zu bytes for a slot of %zu", bytes, l->payload_bytes);
    return HFR_LINK_FAILED;
  }
  unsigned slot = (unsigned)(link->posted % (unsigned)l->depth);
  memcpy(hfr_verbs_tx_slot(l, link->posted), header, sizeof *header);
  l->tx_data[slot] = bytes ? data : NULL;
  l->tx_bytes[slot] = (uint32_t)bytes;
  /* If posting fails, it is sent again over another port, or the link breaks. */
  hfr_verbs_post_message(l, link->posted);
  hfr_link_count_sent(link, bytes);
  return HFR_LINK_OK;
}

static uint64_t verbs_sent(struct hfr_link *link) {
  struct hfr_verbs_link *l = (struct hfr_verbs_link *)link;
  if (l->sent == link->posted) return l->sent;
  int r = progress(l);
  return r == HFR_LINK_FAILED && l->sent < link->posted ? UINT64_MAX : l->sent;
}

/* ---------------------------------------------------------------- receiving */

/* The message in the slot at hand is believed once, from a copy. */
static int check_message(struct hfr_verbs_link *l, uint32_t arrived) {
  memcpy(&l->rx_header, hfr_verbs_rx_slot(l, l->taken), sizeof l->rx_header);
  if (l->rx_header.magic == HFR_MSG_MAGIC && l->rx_header.bytes == arrived - HFR_VERBS_HEADER) {
    l->rx_ready = 1;
    return HFR_LINK_OK;
  }
  hfr_fail(hfreduceCorrupt, "message from rank %d on %s has a broken header", l->link.peer, l->net->host[l->link.peer]);
  hfr_last_error()->peer = l->link.peer;
  return HFR_LINK_FAILED;
}

static int verbs_recv(struct hfr_link *link, void *dst, size_t bytes, const struct hfr_msg_header **header, const void **data) {
  struct hfr_verbs_link *l = (struct hfr_verbs_link *)link;
  uint32_t *arrived = &l->rx_bytes[l->taken % (unsigned)l->depth];
  (void)dst; /* it lies in its slot */
  if (!l->rx_ready) {
    if (!*arrived) {
      int r = progress(l);
      if (!*arrived) return r == HFR_LINK_FAILED ? r : HFR_LINK_AGAIN; /* what came before an end still counts */
    }
    if (check_message(l, *arrived) != HFR_LINK_OK) return HFR_LINK_FAILED;
  }
  *header = &l->rx_header;
  *data = l->rx_header.bytes == bytes ? hfr_verbs_rx_slot(l, l->taken) + HFR_VERBS_HEADER : NULL;
  return HFR_LINK_OK;
}

/* The message at hand has been taken out. */
static void took(struct hfr_verbs_link *l) {
  hfr_link_count_received(&l->link, l->rx_header.bytes);
  l->rx_bytes[l->taken % (unsigned)l->depth] = 0;
  l->rx_ready = 0;
  l->taken++;
}

/* Slots are given back in order, up to the first that is kept. */
static void give_back(struct hfr_verbs_link *l) {
  while (l->released < l->taken && !l->rx_kept[l->released % (unsigned)l->depth]) l->released++;
  give_credit(l);
}

static void verbs_release(struct hfr_link *link) {
  struct hfr_verbs_link *l = (struct hfr_verbs_link *)link;
  took(l);
  give_back(l);
}

static uint64_t verbs_keep(struct hfr_link *link) {
  struct hfr_verbs_link *l = (struct hfr_verbs_link *)link;
  uint64_t token = l->taken;
  l->rx_kept[token % (unsigned)l->depth] = 1;
  took(l);
  return token;
}

static void verbs_let_go(struct hfr_link *link, uint64_t token) {
  struct hfr_verbs_link *l = (struct hfr_verbs_link *)link;
  l->rx_kept[token % (unsigned)l->depth] = 0;
  give_back(l);
}

static void verbs_lend(struct hfr_net *net, const void *memory, size_t bytes) {
  /* Where the cores do the device's work they copy in any case, and gather from a user's pages more slowly than from a slot. */
  int asked = hfr_param_is_set(HFR_PARAM_IB_CACHE);
  for (struct hfr_verbs_base *b = net->shared; b; b = b->next)
    if (!b->port.soft || asked) hfr_verbs_memory_lend(&b->port, memory, bytes);
}

/* ---------------------------------------------------------------- waiting */

static void add(struct hfr_waitset *set, int fd, short events) {
  if (fd >= 0 && set->n < (int)(sizeof set->fd / sizeof *set->fd)) set->fd[set->n++] = (struct pollfd){fd, events, 0};
}

static void verbs_want(struct hfr_link *link, int recv, struct hfr_waitset *set) {
  struct hfr_verbs_link *l = (struct hfr_verbs_link *)link;
  (void)recv;                       /* messages, credits and completions all come through one queue */
  if (l->breakage.since_ns) return; /* the grace is timed */
  if (l->phase != HFR_VERBS_UP) {
    add(set, l->connect.fd, l->out_sent < l->out_bytes ? POLLOUT : hfr_connect_events(&l->connect));
    return;
  }
  struct hfr_ib_cq *cq;
  void *context;
  unsigned events = 0;
  while (!l->base->ib->get_cq_event(l->channel, &cq, &context)) events++; /* of earlier sleeps */
  if (events) l->base->ib->ack_cq_events(l->cq, events);
  /* Armed before the last look: what completes after it makes the channel readable. */
  l->cq->context->req_notify_cq(l->cq, 0);
  int work = hfr_verbs_poll(l);
  check_port(l);
  if (!work && !l->trouble && listen_aside(l)) {
    hfr_lost(&l->breakage, l->net, l->link.peer, "RDMA link", 0);
  } else if (work || l->trouble) {
    add(set, l->connect.fd, POLLOUT); /* there is work: writable at once */
  } else {
    add(set, l->channel->fd, POLLIN);
    add(set, l->connect.fd, POLLIN);
    add(set, l->base->port.context->async_fd, POLLIN);
  }
}

static int has_unfinished(const struct hfr_verbs_link *l) {
  for (int i = 0; i < l->nqps; i++)
    if (l->qp[i].done != l->qp[i].posted) return 1;
  return 0;
}

/* A link that nobody waits for: what it has sent may be lost with its port, or its peer wants to leave. Whether the peer has
 * closed is of no interest: it may have all that it needs. */
static int attend_link(struct hfr_verbs_link *l, int healthy) {
  /* Who waits for it is told by it; nothing is lost with a link that has sent nothing, or to a peer that has left. */
  if (l->breakage.since_ns) return l->closed || !l->link.posted ? HFR_LINK_OK : broken(l);
  if (l->phase == HFR_VERBS_UP) {
    if (has_unfinished(l)) hfr_verbs_poll(l);
    if (!healthy || l->port_down_ns) check_port(l);
    if (listen_aside(l)) return HFR_LINK_OK;
  }
  return l->trouble || (l->epoch && l->phase != HFR_VERBS_UP) ? progress(l) : HFR_LINK_OK;
}

static int verbs_attend(struct hfr_net *net) {
  int result = HFR_LINK_OK;
  /* A link that fails over goes to another base, and its old one may go with it. */
  for (struct hfr_verbs_base *b = net->shared, *next_base; b; b = next_base) {
    int healthy = hfr_ib_health(&b->port) == HFR_IB_WHOLE;
    next_base = b->next;
    for (struct hfr_verbs_link *l = b->links, *next; l; l = next) {
      next = l->neighbour;
      int r = attend_link(l, healthy);
      if (r == HFR_LINK_FAILED) return r;
      if (r == HFR_LINK_AGAIN) result = r;
    }
  }
  return result;
}

/* ---------------------------------------------------------------- birth and death */

static const char *verbs_why_not(void) {
  struct hfr_ib_port port;
  return hfr_ib_choose(0, &port) ? hfr_last_error()->text : NULL;
}

static hfreduceResult_t verbs_open_link(struct hfr_net *net, int peer, int vc, struct hfr_link **out) {
  struct hfr_verbs_link *l = calloc(1, sizeof *l);
  if (!l) return hfr_fail(hfreduceSystemError, "out of memory for a link to rank %d", peer);
  struct hfr_verbs_base *base = net->shared;
  struct hfr_ib_port port;
  hfreduceResult_t r = hfreduceSuccess;
  pthread_mutex_init(&l->names, NULL);
  l->net = net;
  if (!base) r = hfr_ib_choose(net->place, &port);
  if (!r) r = hfr_verbs_base_get(l, base ? &base->port : &port);
  if (r) return free(l), r;
  l->link = (struct hfr_link){.transport = &hfr_transport_verbs, .peer = peer, .vc = vc};
  l->connect.fd = -1;
  l->payload_bytes = net->arena->chunk;
  l->slot_bytes = HFR_VERBS_HEADER + l->payload_bytes;
  l->depth = l->payload_bytes <= (1 << 20) ? HFR_VERBS_DEPTH : l->payload_bytes <= (4 << 20) ? 4 : 2;
  *out = &l->link;
  return hfreduceSuccess;
}

/* Has all that was posted arrived? What is not signalled by itself is told of by a write behind it. */
static int arrived(struct hfr_verbs_link *l) {
  int all = 1;
  for (int i = 0; i < l->nqps && !l->trouble; i++) {
    struct hfr_verbs_qp *q = &l->qp[i];
    struct hfr_ib_send_wr wr = {
        .opcode = HFR_IB_WR_RDMA_WRITE, .send_flags = HFR_IB_SEND_SIGNALED, .remote_addr = l->theirs.address};
    if (q->signalled != q->posted && has_room(q)) post(l, q, &wr, -1);
    all &= q->done == q->posted;
  }
  return all;
}

/* What was taken is on its way; give it the time to arrive, over another port if need be, unless the peer has gone. */
static void drain(struct hfr_verbs_link *l) {
  int64_t limit = hfr_now_ns() + DRAIN_NS;
  while (hfr_now_ns() < limit && progress(l) != HFR_LINK_FAILED && !l->breakage.since_ns) {
    if (l->phase == HFR_VERBS_UP && arrived(l) && !l->trouble) return;
    if (l->phase == HFR_VERBS_UP && listen_aside(l)) return;
    if (l->phase == HFR_VERBS_UP) check_port(l);
    usleep(20);
  }
}

static void verbs_close(struct hfr_link *link) {
  struct hfr_verbs_link *l = (struct hfr_verbs_link *)link;
  /* If it ends before its sends, their data may be gone: nothing of it can be sent again. */
  if ((l->phase == HFR_VERBS_UP || l->epoch) && l->sent == l->link.posted) drain(l);
  hfr_verbs_tear_down(l);
  free(l);
}

/* Queue pairs do not tell what they send again, but the port does, for all that run over it. */
static void verbs_stat(struct hfr_link *link, struct hfr_link_stat *stat) {
  struct hfr_verbs_link *l = (struct hfr_verbs_link *)link;
  pthread_mutex_lock(&l->names);
  if (l->base) {
    snprintf(stat->local, sizeof stat->local, "%s", l->base->port.name);
    snprintf(stat->remote, sizeof stat->remote, "%s", l->theirs.port);
    stat->retries = hfr_ib_retries(&l->base->port) - l->base->retries_before;
  }
  pthread_mutex_unlock(&l->names);
  stat->shared = 1;
}

/* The device's objects are the parent's: to touch them here would be to touch its own. */
static void verbs_after_fork(struct hfr_link *link) {
  struct hfr_verbs_link *l = (struct hfr_verbs_link *)link;
  if (l->connect.fd >= 0) close(l->connect.fd);
}

const struct hfr_transport hfr_transport_verbs = {
    .name = "verbs",
    .polls_memory = 1,
    .why_not = verbs_why_not,
    .open = verbs_open_link,
    .post_send = verbs_post_send,
    .sent = verbs_sent,
    .recv = verbs_recv,
    .release = verbs_release,
    .keep = verbs_keep,
    .let_go = verbs_let_go,
    .lend = verbs_lend,
    .want = verbs_want,
    .attend = verbs_attend,
    .stat = verbs_stat,
    .close = verbs_close,
    .after_fork = verbs_after_fork,
};
