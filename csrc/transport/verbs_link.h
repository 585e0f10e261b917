/*
 * A link over RDMA: reliable queue pairs, made over the authenticated TCP connection that every link begins with. That connection
 * stays as the side channel by which an end learns that the other has closed.
 *
 *   sender                                       receiver
 *   message m: [header][payload] ──RDMA WRITE──► slot m mod depth   + immediate: m, and how many of the other direction are
 * released ◄─immediate──── credit, when half of the slots were released and nothing went that way
 *
 * Slots are registered once. A sender has at most depth messages that were not released, so no slot is overwritten, and receives
 * are posted ahead for all of them: the receiver is never not ready. Message m goes over queue pair m mod nqps.
 */
#ifndef HFR_TRANSPORT_VERBS_LINK_H_
#define HFR_TRANSPORT_VERBS_LINK_H_
#include "connect.h"
#include "verbs_lib.h"

#define HFR_VERBS_QPS 16
#define HFR_VERBS_DEPTH 8                      /* messages on their way in a direction, at most */
#define HFR_VERBS_HEADER 64                    /* bytes of a slot before the payload */
#define HFR_VERBS_SQ (4 * HFR_VERBS_DEPTH)     /* sends a queue pair: data, credits, and those not yet known to be done */
#define HFR_VERBS_RQ (4 * HFR_VERBS_DEPTH)     /* receives: as many data and credits, and those not yet posted again */
#define HFR_VERBS_REPOST (HFR_VERBS_DEPTH / 2) /* receives are posted again so many at a time */

/* What the ends tell each other, little-endian; nothing in it is used unchecked. */
struct hfr_verbs_hello {
  uint32_t magic, version;
  uint32_t depth, nqps;
  uint64_t slot_bytes, address;
  uint32_t rkey;
  uint16_t lid;
  uint8_t link_layer, mtu;
  uint8_t gid[16];
  char port[80];
  uint32_t qpn[HFR_VERBS_QPS], psn[HFR_VERBS_QPS];
};

/* Shared by the links of a communicator. */
struct hfr_verbs_base {
  int refs;
  const struct hfr_ib *ib;
  struct hfr_ib_port port;
  struct hfr_ib_mr *arena; /* NULL: what lies in the arena is copied too */
  uint64_t retries_before; /* of the port, when the communicator began to use it */
};

struct hfr_verbs_qp {
  struct hfr_ib_qp *qp;
  uint32_t psn;
  uint32_t posted, done;         /* sends, ever; done only moves at those that are signalled */
  uint32_t signalled;            /* value of posted after the last one that was */
  int64_t message[HFR_VERBS_SQ]; /* of a send: whose slot it frees; -1: none */
  uint64_t next;                 /* message that comes next on it */
  int owed;                      /* receives to be posted again */
};

enum hfr_verbs_phase { HFR_VERBS_CONNECT, HFR_VERBS_HELLO, HFR_VERBS_READY, HFR_VERBS_UP };

struct hfr_verbs_link {
  struct hfr_link link;
  struct hfr_net *net;
  struct hfr_verbs_base *base;
  struct hfr_connect connect;
  struct hfr_breakage breakage;
  _Atomic(enum hfr_verbs_phase) phase; /* above HELLO, any thread may read `theirs` */
  struct hfr_verbs_hello mine, theirs;
  uint8_t out[sizeof(struct hfr_verbs_hello) + 1], in[sizeof(struct hfr_verbs_hello) + 1]; /* then a byte: ready */
  size_t out_bytes, out_sent, in_have;
  int closed; /* the peer has closed the side channel */

  uint8_t *memory; /* depth slots to receive in, depth to send from */
  struct hfr_ib_mr *mr;
  struct hfr_ib_comp_channel *channel;
  struct hfr_ib_cq *cq;
  struct hfr_verbs_qp qp[HFR_VERBS_QPS];
  int nqps, depth;
  size_t payload_bytes, slot_bytes; /* largest payload; with its header */
  uint32_t inline_bytes;

  uint64_t sent;                      /* messages whose data is no longer needed, in order */
  uint64_t credited;                  /* messages that the peer has released */
  uint8_t tx_busy[HFR_VERBS_DEPTH];   /* the device may still read the slot, or the data beside it */
  uint8_t tx_lent[HFR_VERBS_DEPTH];   /* the data is the caller's */
  uint64_t consumed, told;            /* messages released here; as far as the peer was told */
  uint32_t rx_bytes[HFR_VERBS_DEPTH]; /* arrived in the slot, header included; 0: nothing */
  int rx_ready;
  struct hfr_msg_header rx_header; /* a copy: the slot's could still change */
};

/* --- verbs_connect.c --- */
/* Bring the link up as far as possible. OK: it can carry data. */
int hfr_verbs_bring_up(struct hfr_verbs_link *link);
/* Free what it has of the device and the side channel. */
void hfr_verbs_tear_down(struct hfr_verbs_link *link);
/* Post n receives. 0, or -1: hfr_last_error(). */
int hfr_verbs_post_receives(struct hfr_verbs_link *link, struct hfr_verbs_qp *qp, int n);
/* Look at the side channel: 1 if the peer has closed it. */
int hfr_verbs_peer_closed(struct hfr_verbs_link *link);
hfreduceResult_t hfr_verbs_base_get(struct hfr_net *net, struct hfr_verbs_base **base);
void hfr_verbs_base_put(struct hfr_net *net);

static inline uint8_t *hfr_verbs_rx_slot(const struct hfr_verbs_link *l, uint64_t message) {
  return l->memory + message % (unsigned)l->depth * l->slot_bytes;
}
static inline uint8_t *hfr_verbs_tx_slot(const struct hfr_verbs_link *l, uint64_t message) {
  return l->memory + ((unsigned)l->depth + message % (unsigned)l->depth) * l->slot_bytes;
}
#endif
