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
 *
 * Failover: when a port fails, the ends make new queue pairs, each on its next usable port, and say hello anew over the side
 * channel, with what they have received: the rest is sent again. What was not released still lies in its slot, so no message is
 * lost, and its number says which one it is, so none counts twice.
 */
#ifndef HFR_TRANSPORT_VERBS_LINK_H_
#define HFR_TRANSPORT_VERBS_LINK_H_
#include "connect.h"
#include "verbs_lib.h"
#include "verbs_memory.h"

#include <pthread.h>

#define HFR_VERBS_QPS 16
#define HFR_VERBS_DEPTH 8                      /* messages on their way in a direction, at most */
#define HFR_VERBS_HEADER 64                    /* bytes of a slot before the payload */
#define HFR_VERBS_SQ (4 * HFR_VERBS_DEPTH)     /* sends a queue pair: data, credits, and those not yet known to be done */
#define HFR_VERBS_RQ (4 * HFR_VERBS_DEPTH)     /* receives: as many data and credits, and those not yet posted again */
#define HFR_VERBS_RECEIVE ((uint64_t)1 << 63)  /* of a work request's number: a receive, on the queue pair in its low bits */
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
  uint32_t epoch;              /* how often the link has failed over */
  uint32_t ports;              /* that this end can use */
  uint64_t received, released; /* messages of the other end that have come without a gap, and that it may overwrite */
  uint32_t ahead, unused;      /* bit i: message received + i has come, ahead of one before it */
};

/* Shared by the links of a communicator over one port. */
struct hfr_verbs_base {
  struct hfr_verbs_base *next;
  struct hfr_verbs_link *links;
  int refs;
  const struct hfr_ib *ib;
  struct hfr_ib_port port;
  struct hfr_ib_mr **retired; /* slots of links that have failed over: others may still send from them */
  int nretired;
  struct hfr_ib_mr *arena; /* NULL: what lies in the arena is copied too */
  int left;                /* a link has failed over from it */
  int usable;              /* ports that this rank could use when it began to use this one */
  uint64_t retries_before; /* of the port, then */
};

struct hfr_verbs_qp {
  struct hfr_ib_qp *qp;
  uint32_t psn;
  uint32_t posted, done;         /* sends, ever; done only moves at those that are signalled */
  uint32_t signalled;            /* value of posted after the last one that was */
  int64_t message[HFR_VERBS_SQ]; /* of a send: whose slot it frees; -1: none */
  uint64_t next;                 /* message that comes next on it */
  int owed;                      /* receives to be posted again */
  int receives;                  /* posted, and not completed */
};

enum hfr_verbs_phase { HFR_VERBS_CONNECT, HFR_VERBS_HELLO, HFR_VERBS_READY, HFR_VERBS_UP };

/* Would another port do better? */
enum hfr_verbs_move { HFR_VERBS_STAY, HFR_VERBS_MOVE, HFR_VERBS_ASKED };

struct hfr_verbs_link {
  struct hfr_link link;
  struct hfr_net *net;
  pthread_mutex_t names; /* guards `base` and `theirs` when they change: any thread may ask where the link runs */
  struct hfr_verbs_base *base;
  struct hfr_verbs_link *neighbour; /* on the same base */
  struct hfr_connect connect;
  struct hfr_breakage breakage;
  enum hfr_verbs_phase phase;
  struct hfr_verbs_hello mine, theirs;
  uint8_t out[sizeof(struct hfr_verbs_hello) + 1], in[sizeof(struct hfr_verbs_hello) + 1]; /* then a byte: ready */
  size_t out_bytes, out_sent, in_have;
  int closed; /* the peer has closed the side channel */

  int trouble; /* 1: its queue pairs are of no use; trouble_why tells */
  enum hfr_verbs_move movable;
  hfreduceErrorInfo_t trouble_why;
  int64_t port_down_ns;                    /* since when; 0: it is up */
  uint32_t epoch, in_vain;                 /* failovers; those in a row between which nothing was carried */
  uint64_t received_before, posted_before; /* at the last one */

  uint8_t *memory; /* depth slots to receive in, depth to send from */
  struct hfr_ib_mr *mr;
  struct hfr_ib_comp_channel *channel;
  struct hfr_ib_cq *cq;
  struct hfr_verbs_qp qp[HFR_VERBS_QPS];
  int nqps, depth;
  size_t payload_bytes, slot_bytes; /* largest payload; with its header */
  uint32_t inline_bytes;

  uint64_t sent;                        /* messages whose data is no longer needed, in order */
  uint64_t credited;                    /* messages that the peer has released */
  uint8_t tx_busy[HFR_VERBS_DEPTH];     /* the device may still read the slot, or the data beside it */
  const void *tx_data[HFR_VERBS_DEPTH]; /* the payload, where the caller has it; NULL: it is in the slot */
  uint32_t tx_bytes[HFR_VERBS_DEPTH];   /* of payload */
  int tx_hold[HFR_VERBS_DEPTH];         /* its registration in the cache */
  uint64_t taken, released, told;       /* messages taken out here; that may be overwritten; as far as the peer was told */
  uint8_t rx_kept[HFR_VERBS_DEPTH];     /* taken out, but it must stay */
  uint32_t rx_bytes[HFR_VERBS_DEPTH];   /* arrived in the slot, header included; 0: nothing */
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
/* Make the queue pairs and what belongs to them on the link's base, and the hello that offers them. 0, or -1: hfr_last_error().
 */
int hfr_verbs_make_objects(struct hfr_verbs_link *link);
void hfr_verbs_free_objects(struct hfr_verbs_link *link);
/* Look at the side channel. TALKS: the peer fails over. RAVES: what it says is no hello. */
enum hfr_verbs_side { HFR_VERBS_QUIET, HFR_VERBS_TALKS, HFR_VERBS_RAVES, HFR_VERBS_CLOSED };
enum hfr_verbs_side hfr_verbs_look_aside(struct hfr_verbs_link *link);
/* Put the link on a port. */
hfreduceResult_t hfr_verbs_base_get(struct hfr_verbs_link *link, const struct hfr_ib_port *port);
void hfr_verbs_base_put(struct hfr_verbs_link *link);

/* --- verbs_failover.c --- */
int hfr_verbs_can_fail_over(const struct hfr_verbs_link *link);
/* Leave these queue pairs and begin anew on the next port. 0: the link comes up again. -1: hfr_last_error(). */
int hfr_verbs_fail_over(struct hfr_verbs_link *link);
/* The peer's hello has come: what it lacks is sent again when the link is up. 0, or -1: hfr_last_error(). */
int hfr_verbs_agree(struct hfr_verbs_link *link);
/* Send again. 0, or -1: hfr_last_error(). */
int hfr_verbs_repeat(struct hfr_verbs_link *link);
/* The first message that has not come, and (bit i) whether the i-th from it on has. */
uint64_t hfr_verbs_received(const struct hfr_verbs_link *link);
uint32_t hfr_verbs_ahead(const struct hfr_verbs_link *link);

/* --- verbs.c --- */
/* Post message m, as its slot has it. 0, or -1: hfr_last_error(). */
int hfr_verbs_post_message(struct hfr_verbs_link *link, uint64_t m);
/* Take what has completed; how much that was. While the link is not up, only what has come. */
int hfr_verbs_poll(struct hfr_verbs_link *link);
/* What a message had of the caller is no longer needed. */
void hfr_verbs_message_done(struct hfr_verbs_link *link, uint64_t m);

static inline uint8_t *hfr_verbs_rx_slot(const struct hfr_verbs_link *l, uint64_t message) {
  return l->memory + message % (unsigned)l->depth * l->slot_bytes;
}
static inline uint8_t *hfr_verbs_tx_slot(const struct hfr_verbs_link *l, uint64_t message) {
  return l->memory + ((unsigned)l->depth + message % (unsigned)l->depth) * l->slot_bytes;
}
#endif
