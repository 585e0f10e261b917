/* How RDMA links come up and go: memory, queue pairs, and what the ends tell each other first. */
#include "verbs_link.h"

#include "../base/log.h"
#include "../base/mac.h"
#include "../base/param.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define HELLO_MAGIC 0x76726668u /* "hfrv" */
#define HELLO_VERSION 2u
/* What can go inline differs between devices, and some count more exactly than by powers of two. A header is 64 bytes: below 72
 * not even a message of 8 bytes fits. */
static const uint32_t inline_steps[] = {256, 220, 101, 96, 72, 64, 0};

_Static_assert(sizeof(struct hfr_msg_header) <= HFR_VERBS_HEADER, "a slot has room for the header");

/* ---------------------------------------------------------------- what links share */

static _Atomic int bases; /* of this process */

static struct hfr_verbs_base *make_base(struct hfr_net *net, const struct hfr_ib_port *port) {
  struct hfr_verbs_base *b = calloc(1, sizeof *b);
  const struct hfr_arena *a = net->arena;
  struct hfr_ib_port next;
  const char *why;
  if (!b) {
    hfr_fail(hfreduceSystemError, "out of memory for RDMA");
    return NULL;
  }
  b->port = *port;
  b->ib = hfr_ib_load(&why);
  hfr_ib_next_port(port, &next, &b->usable);
  b->retries_before = hfr_ib_retries(&b->port);
  b->arena = hfr_ib_register(&b->port, a->data, (size_t)a->nlocal * a->rank_stride, 0);
  if (!b->arena) HFR_INFO("%s; what is sent is copied first", hfr_last_error()->text);
  bases++;
  HFR_INFO("RDMA over %s, GID %d %s (%s)", b->port.name, b->port.gid_index, b->port.gid_text, b->port.gid_type);
  return b;
}

hfreduceResult_t hfr_verbs_base_get(struct hfr_verbs_link *l, const struct hfr_ib_port *port) {
  struct hfr_verbs_base *b = l->net->shared;
  while (b && strcmp(b->port.name, port->name)) b = b->next;
  if (!b) {
    if (!(b = make_base(l->net, port))) return hfr_last_error()->code;
    b->next = l->net->shared;
    l->net->shared = b;
  }
  b->refs++;
  l->neighbour = b->links;
  b->links = l;
  pthread_mutex_lock(&l->names);
  l->base = b;
  pthread_mutex_unlock(&l->names);
  return hfreduceSuccess;
}

void hfr_verbs_base_put(struct hfr_verbs_link *l) {
  struct hfr_verbs_base *b = l->base, **at = (struct hfr_verbs_base **)&l->net->shared;
  struct hfr_verbs_link **mine = &b->links;
  while (*mine != l) mine = &(*mine)->neighbour;
  *mine = l->neighbour;
  pthread_mutex_lock(&l->names);
  l->base = NULL;
  pthread_mutex_unlock(&l->names);
  if (--b->refs) return;
  while (*at != b) at = &(*at)->next;
  *at = b->next;
  if (b->arena) b->ib->dereg_mr(b->arena);
  for (int i = 0; i < b->nretired; i++) b->ib->dereg_mr(b->retired[i]);
  free(b->retired);
  free(b);
  if (!--bases) hfr_verbs_memory_drop();
}

/* ---------------------------------------------------------------- objects of the device */

static int failed(const struct hfr_verbs_link *l, const char *what) {
  hfr_fail(hfreduceSystemError, "cannot %s on %s for the link to rank %d on %s: %s", what, l->base->port.name, l->link.peer,
           l->net->host[l->link.peer], strerror(errno));
  return -1;
}

static size_t slots_bytes(const struct hfr_verbs_link *l) { return 2 * (size_t)l->depth * l->slot_bytes; }

static int make_memory(struct hfr_verbs_link *l) {
  if (!l->memory) {
    void *memory = mmap(NULL, slots_bytes(l), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return failed(l, "map memory");
    l->memory = memory;
  }
  l->mr = hfr_ib_register(&l->base->port, l->memory, slots_bytes(l), 1);
  return l->mr ? 0 : -1;
}

static int make_cq(struct hfr_verbs_link *l) {
  const struct hfr_ib *ib = l->base->ib;
  struct hfr_ib_context *context = l->base->port.context;
  if (!(l->channel = ib->create_comp_channel(context))) return failed(l, "create a completion channel");
  if (fcntl(l->channel->fd, F_SETFL, fcntl(l->channel->fd, F_GETFL) | O_NONBLOCK)) return failed(l, "set up the channel");
  int vectors = context->num_comp_vectors; /* the ranks of a node wake different cores */
  int vector = vectors > 1 ? l->net->place % vectors : 0;
  l->cq = ib->create_cq(context, l->nqps * (HFR_VERBS_SQ + HFR_VERBS_RQ), l, l->channel, vector);
  return l->cq ? 0 : failed(l, "create a completion queue");
}

/* Ask for less to go inline until the device agrees. */
static int make_qp(struct hfr_verbs_link *l, struct hfr_verbs_qp *q) {
  for (const uint32_t *ask = inline_steps;; ask++) {
    struct hfr_ib_qp_init_attr init = {
        .send_cq = l->cq, .recv_cq = l->cq, .cap = {HFR_VERBS_SQ, HFR_VERBS_RQ, 2, 1, *ask}, .qp_type = HFR_IB_QPT_RC};
    if ((q->qp = l->base->ib->create_qp(l->base->port.pd, &init))) {
      if (init.cap.max_inline_data < l->inline_bytes) l->inline_bytes = init.cap.max_inline_data;
      break;
    }
    if (!*ask) return failed(l, "create a queue pair");
  }
  struct hfr_ib_qp_attr attr = {.qp_state = HFR_IB_QPS_INIT,
                                .pkey_index = (uint16_t)hfr_param_int(HFR_PARAM_IB_PKEY),
                                .port_num = (uint8_t)l->base->port.number,
                                .qp_access_flags = HFR_IB_ACCESS_REMOTE_WRITE};
  int mask = HFR_IB_QP_STATE | HFR_IB_QP_PKEY_INDEX | HFR_IB_QP_PORT | HFR_IB_QP_ACCESS_FLAGS;
  if ((errno = l->base->ib->modify_qp(q->qp, &attr, mask))) return failed(l, "initialize a queue pair");
  hfr_random(&q->psn, sizeof q->psn);
  q->psn &= 0xffffff;
  return 0;
}

int hfr_verbs_post_receives(struct hfr_verbs_link *l, struct hfr_verbs_qp *q, int n) {
  struct hfr_ib_recv_wr wr[HFR_VERBS_RQ], *bad;
  for (int i = 0; i < n; i++) /* immediates only: what is written lands in the slots */
    wr[i] = (struct hfr_ib_recv_wr){.wr_id = HFR_VERBS_RECEIVE | (uint64_t)(q - l->qp), .next = i + 1 < n ? &wr[i + 1] : NULL};
  errno = n ? q->qp->context->post_recv(q->qp, wr, &bad) : 0;
  if (!errno) q->receives += n;
  return errno ? failed(l, "post receives") : 0;
}

int hfr_verbs_make_objects(struct hfr_verbs_link *l) {
  const struct hfr_ib_port *port = &l->base->port;
  l->nqps = (int)hfr_param_int(HFR_PARAM_IB_QPS_PER_CONNECTION);
  l->inline_bytes = inline_steps[0];
  if (make_memory(l) || make_cq(l)) return -1;
  l->mine = (struct hfr_verbs_hello){.magic = HELLO_MAGIC,
                                     .version = HELLO_VERSION,
                                     .depth = (uint32_t)l->depth,
                                     .nqps = (uint32_t)l->nqps,
                                     .slot_bytes = l->slot_bytes,
                                     .address = (uintptr_t)l->memory,
                                     .rkey = l->mr->rkey,
                                     .lid = port->attr.lid,
                                     .link_layer = port->attr.link_layer,
                                     .mtu = (uint8_t)port->attr.active_mtu,
                                     .epoch = l->epoch,
                                     .ports = (uint32_t)l->base->usable,
                                     .received = hfr_verbs_received(l),
                                     .released = l->released,
                                     .ahead = hfr_verbs_ahead(l)};
  l->told = l->released;
  int most = (int)hfr_param_int(HFR_PARAM_IB_MTU);
  while (most && l->mine.mtu > HFR_IB_MTU_256 && 128 << l->mine.mtu > most) l->mine.mtu--;
  memcpy(l->mine.gid, port->gid.raw, 16);
  memcpy(l->mine.port, port->name, sizeof l->mine.port);
  for (int i = 0; i < l->nqps; i++) {
    if (make_qp(l, &l->qp[i])) return -1;
    l->mine.qpn[i] = l->qp[i].qp->qp_num;
    l->mine.psn[i] = l->qp[i].psn;
  }
  memcpy(l->out, &l->mine, sizeof l->mine);
  l->out_bytes = sizeof l->mine;
  l->out_sent = l->in_have = 0;
  return 0;
}

void hfr_verbs_free_objects(struct hfr_verbs_link *l) {
  const struct hfr_ib *ib = l->base->ib;
  for (int i = 0; i < HFR_VERBS_QPS; i++) {
    if (l->qp[i].qp) ib->destroy_qp(l->qp[i].qp);
    memset(&l->qp[i], 0, sizeof l->qp[i]);
  }
  if (l->cq) ib->destroy_cq(l->cq);
  if (l->channel) ib->destroy_comp_channel(l->channel);
  if (l->mr) ib->dereg_mr(l->mr);
  l->cq = NULL;
  l->channel = NULL;
  l->mr = NULL;
}

/* ---------------------------------------------------------------- meeting the peer */

static int check_hello(struct hfr_verbs_link *l) {
  const struct hfr_verbs_hello *h = &l->theirs;
  if (h->magic != HELLO_MAGIC || h->version != HELLO_VERSION) {
    hfr_fail(
        hfreduceRemoteError,
        "rank %d on %s does not speak version %u of the RDMA protocol (magic %#x, version %u); install one version everywhere",
        l->link.peer, l->net->host[l->link.peer], HELLO_VERSION, h->magic, h->version);
    return -1;
  }
  if (h->depth == l->mine.depth && h->slot_bytes == l->mine.slot_bytes && h->nqps >= 1 && h->nqps <= HFR_VERBS_QPS &&
      h->link_layer == l->mine.link_layer && h->mtu >= HFR_IB_MTU_256 && h->mtu <= HFR_IB_MTU_4096)
    return hfr_verbs_agree(l);
  hfr_fail(
      hfreduceRemoteError,
      "rank %d on %s cannot be met over RDMA: its port %s (link layer %u, MTU code %u, %u slots of %llu bytes, %u queue pairs) "
      "does not fit %s (link layer %u, MTU code %u, %u slots of %llu bytes); HFREDUCE_IB_HCA chooses among ports",
      l->link.peer, l->net->host[l->link.peer], h->port, h->link_layer, h->mtu, h->depth, (unsigned long long)h->slot_bytes,
      h->nqps, l->mine.port, l->mine.link_layer, l->mine.mtu, l->mine.depth, (unsigned long long)l->mine.slot_bytes);
  return -1;
}

/* RoCE is addressed by GID. InfiniBand by LID within a subnet, unless the port wants the GID's header in any case. */
static int by_gid(const struct hfr_verbs_link *l) {
  static const uint8_t none[16];
  const struct hfr_ib_port *port = &l->base->port;
  const uint8_t *gid = l->theirs.gid;
  int subnets_differ = memcmp(gid, none, 16) && memcmp(gid, port->gid.raw, sizeof port->gid.global.subnet_prefix) != 0;
  return port->attr.link_layer == HFR_IB_LINK_LAYER_ETHERNET || port->attr.flags & HFR_IB_PORT_GRH_REQUIRED ||
         (port->gid_index >= 0 && subnets_differ);
}

static int connect_qp(struct hfr_verbs_link *l, int i) {
  const struct hfr_ib *ib = l->base->ib;
  const struct hfr_ib_port *port = &l->base->port;
  const struct hfr_verbs_hello *h = &l->theirs;
  struct hfr_ib_qp *qp = l->qp[i].qp;
  struct hfr_ib_qp_attr attr = {.qp_state = HFR_IB_QPS_RTR,
                                .path_mtu = h->mtu < l->mine.mtu ? h->mtu : l->mine.mtu,
                                .dest_qp_num = h->qpn[i],
                                .rq_psn = h->psn[i] & 0xffffff,
                                .max_dest_rd_atomic = 1,
                                .min_rnr_timer = 12};
  attr.ah_attr =
      (struct hfr_ib_ah_attr){.dlid = h->lid, .sl = (uint8_t)hfr_param_int(HFR_PARAM_IB_SL), .port_num = (uint8_t)port->number};
  if (by_gid(l)) {
    attr.ah_attr.is_global = 1;
    memcpy(attr.ah_attr.grh.dgid.raw, h->gid, 16);
    attr.ah_attr.grh.sgid_index = (uint8_t)port->gid_index;
    attr.ah_attr.grh.hop_limit = 64;
    attr.ah_attr.grh.traffic_class = (uint8_t)hfr_param_int(HFR_PARAM_IB_TC);
  }
  int mask = HFR_IB_QP_STATE | HFR_IB_QP_AV | HFR_IB_QP_PATH_MTU | HFR_IB_QP_DEST_QPN | HFR_IB_QP_RQ_PSN |
             HFR_IB_QP_MAX_DEST_RD_ATOMIC | HFR_IB_QP_MIN_RNR_TIMER;
  errno = h->qpn[i] >> 24 ? EINVAL : ib->modify_qp(qp, &attr, mask); /* not all providers look */
  if (errno) return failed(l, "connect a queue pair (is there a route to the peer's port?)");
  attr = (struct hfr_ib_qp_attr){.qp_state = HFR_IB_QPS_RTS,
                                 .sq_psn = l->qp[i].psn,
                                 .timeout = (uint8_t)hfr_param_int(HFR_PARAM_IB_TIMEOUT),
                                 .retry_cnt = (uint8_t)hfr_param_int(HFR_PARAM_IB_RETRY_CNT),
                                 .rnr_retry = 6, /* 7 is for ever; receives are posted ahead of all credit */
                                 .max_rd_atomic = 1};
  mask = HFR_IB_QP_STATE | HFR_IB_QP_SQ_PSN | HFR_IB_QP_TIMEOUT | HFR_IB_QP_RETRY_CNT | HFR_IB_QP_RNR_RETRY |
         HFR_IB_QP_MAX_QP_RD_ATOMIC;
  if ((errno = ib->modify_qp(qp, &attr, mask))) return failed(l, "start a queue pair");
  /* The first message that comes over it; what came ahead is not sent again. */
  uint64_t first = l->mine.received, n = (unsigned)l->nqps, m = first + ((uint64_t)i + n - first % n) % n;
  while (m - first < 32 && l->mine.ahead >> (m - first) & 1) m += n;
  l->qp[i].next = m;
  return hfr_verbs_post_receives(l, &l->qp[i], HFR_VERBS_RQ);
}

static int connect_all(struct hfr_verbs_link *l) {
  pthread_mutex_lock(&l->names);
  memcpy(&l->theirs, l->in, sizeof l->theirs);
  l->theirs.port[sizeof l->theirs.port - 1] = 0;
  for (char *p = l->theirs.port; *p; p++)
    if (*p < ' ' || *p > '~') *p = '?'; /* it is printed */
  pthread_mutex_unlock(&l->names);
  if (check_hello(l)) return -1;
  if ((int)l->theirs.nqps < l->nqps) l->nqps = (int)l->theirs.nqps; /* what is too much stays idle */
  for (int i = 0; i < l->nqps; i++)
    if (connect_qp(l, i)) return -1;
  l->out[l->out_bytes++] = 1;
  return 0;
}

/* Give and take on the side channel. OK: `want` bytes have come and all ours are out. */
static int talk(struct hfr_verbs_link *l, size_t want) {
  while (l->out_sent < l->out_bytes) {
    ssize_t n = send(l->connect.fd, l->out + l->out_sent, l->out_bytes - l->out_sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return HFR_LINK_AGAIN;
    if (n < 0) return hfr_lost(&l->breakage, l->net, l->link.peer, "sending failed", errno);
    l->out_sent += (size_t)n;
  }
  while (l->in_have < want) {
    ssize_t n = recv(l->connect.fd, l->in + l->in_have, want - l->in_have, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return HFR_LINK_AGAIN;
    l->closed = n == 0;
    if (n <= 0) return hfr_lost(&l->breakage, l->net, l->link.peer, "receiving failed", n ? errno : 0);
    l->in_have += (size_t)n;
  }
  return HFR_LINK_OK;
}

/* Trouble of this end's own making, told as it is and at once: no other rank knows better. */
static int hopeless(struct hfr_verbs_link *l) {
  hfr_last_error()->peer = l->link.peer;
  l->breakage.why = *hfr_last_error();
  l->breakage.since_ns = 1;
  return HFR_LINK_FAILED;
}

int hfr_verbs_bring_up(struct hfr_verbs_link *l) {
  int r;
  if (l->phase == HFR_VERBS_UP) return HFR_LINK_OK;
  if (l->breakage.since_ns) return hfr_broken(&l->breakage, l->net, l->link.peer);
  if (l->phase == HFR_VERBS_CONNECT) {
    r = hfr_connect_step(&l->connect, l->net, l->link.peer, l->link.vc, 0);
    if (r == HFR_LINK_FAILED) return hfr_broken(&l->breakage, l->net, l->link.peer);
    if (r != HFR_LINK_OK) return r;
    if (hfr_verbs_make_objects(l)) return hopeless(l);
    l->phase = HFR_VERBS_HELLO;
  }
  if (l->phase == HFR_VERBS_HELLO) {
    if ((r = talk(l, sizeof l->theirs)) != HFR_LINK_OK) return r;
    if (connect_all(l)) return hopeless(l);
    l->phase = HFR_VERBS_READY;
  }
  /* What is written before the peer's queue pairs are up would only be lost and sent again much later. */
  if ((r = talk(l, sizeof l->theirs + 1)) != HFR_LINK_OK) return r;
  l->phase = HFR_VERBS_UP;
  return hfr_verbs_repeat(l) && !l->trouble ? hopeless(l) : HFR_LINK_OK; /* trouble: it may fail over once more */
}

enum hfr_verbs_side hfr_verbs_look_aside(struct hfr_verbs_link *l) {
  static const uint32_t magic = HELLO_MAGIC;
  uint32_t said;
  if (l->closed || l->connect.fd < 0) return l->closed ? HFR_VERBS_CLOSED : HFR_VERBS_QUIET;
  ssize_t n = recv(l->connect.fd, &said, sizeof said, MSG_DONTWAIT | MSG_PEEK);
  if (n > 0) return memcmp(&said, &magic, (size_t)n) ? HFR_VERBS_RAVES : HFR_VERBS_TALKS;
  l->closed = n == 0 || (errno != EAGAIN && errno != EINTR);
  return l->closed ? HFR_VERBS_CLOSED : HFR_VERBS_QUIET;
}

void hfr_verbs_tear_down(struct hfr_verbs_link *l) {
  if (l->base) hfr_verbs_free_objects(l);
  for (int i = 0; i < HFR_VERBS_DEPTH; i++) hfr_verbs_memory_done(l->tx_hold[i]);
  if (l->memory) munmap(l->memory, slots_bytes(l));
  if (l->connect.fd >= 0) close(l->connect.fd); /* last: it tells the peer that nothing more will be answered */
  if (l->base) hfr_verbs_base_put(l);
  pthread_mutex_destroy(&l->names);
}
