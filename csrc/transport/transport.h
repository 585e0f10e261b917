/*
 * What a transport offers: links. A link is one direction-pair between this rank and a peer on one virtual channel; it carries
 * whole messages in order, in each direction. Nothing here blocks. All calls on the links of a communicator come from whoever
 * drives it, one thread at a time.
 *
 * The receiver mostly knows what comes next, because both sides execute matching plans: it asks for a message of so many bytes.
 */
#ifndef HFR_TRANSPORT_H_
#define HFR_TRANSPORT_H_
#include "../base/socket.h"
#include "../node/arena.h"

#include <poll.h>

/* Virtual channels keep flows that may overtake each other apart, so that none waits behind another. */
enum hfr_vc { HFR_VC_A, HFR_VC_B, HFR_VC_ROOT, HFR_VC_VERIFY, HFR_VC_P2P, HFR_NVC };

/* Connections that arrived at this process for a communicator, waiting for the link that wants them: [peer][vc][stream] -> fd
 * + 1. */
#define HFR_MAX_STREAMS 16
struct hfr_net {
  int rank, nranks;
  uint64_t comm_id;
  uint8_t secret[16];
  const struct hfr_addr *addr; /* of each rank's listener */
  const char (*host)[64];      /* of each rank */
  struct hfr_arena *arena;     /* this node's */
  const int *local_of;         /* place on its node, by rank */
  int place;                   /* of this rank on its node, the same in all communicators of its process where that can be */
  int streams, checksum;
  int64_t timeout_ns;   /* limit for a connection to come up */
  _Atomic int *arrived; /* nranks * HFR_NVC * streams; set by the acceptor, taken (exchanged with 0) by the link */
  void *shared;         /* what the links between nodes have in common; their transport's */
};

struct hfr_waitset {
  struct pollfd fd[512]; /* more links than this are polled by time */
  int n;
  int ready; /* something can go on already: do not sleep */
};

struct hfr_link {
  const struct hfr_transport *transport;
  int peer, vc;
  uint64_t posted;             /* messages taken by post_send, ever */
  uint64_t tx_turn, tx_ticket; /* order of sends; kept by the engine */
  /* What it has carried, payload only. The driver counts, any thread may look. */
  _Atomic uint64_t bytes_sent, bytes_received, messages_sent, messages_received, stalls;
  uint64_t stalled; /* posted + 1 when a stall was last counted */
};

/* Only the driver writes: no locked instruction is needed. */
static inline void hfr_count(_Atomic uint64_t *counter, uint64_t more) {
  atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + more, memory_order_relaxed);
}
/* post_send has taken a message of so many bytes; it has found no room (asked again or not, a message stalls once); release. */
static inline void hfr_link_count_sent(struct hfr_link *link, size_t bytes) {
  link->posted++;
  hfr_count(&link->messages_sent, 1);
  hfr_count(&link->bytes_sent, bytes);
}
static inline void hfr_link_count_stall(struct hfr_link *link) {
  if (link->stalled == link->posted + 1) return;
  link->stalled = link->posted + 1;
  hfr_count(&link->stalls, 1);
}
static inline void hfr_link_count_received(struct hfr_link *link, size_t bytes) {
  hfr_count(&link->messages_received, 1);
  hfr_count(&link->bytes_received, bytes);
}

/* Where a link runs, and what had to be sent again below it. */
struct hfr_link_stat {
  char local[96], remote[96]; /* "10.0.0.1:4711", "mlx5_0:1"; "": not connected yet, or memory */
  uint64_t retries;
  int shared; /* 1: the retries are the port's, the same for all links over it */
};

enum { HFR_LINK_FAILED = -1, HFR_LINK_AGAIN = 0, HFR_LINK_OK = 1 };

struct hfr_transport {
  const char *name;
  int polls_memory; /* 1: to ask it for progress costs no system call */
  /* Why it cannot be used here; NULL when it can. The text is valid until the thread's next call. NULL: it always can. */
  const char *(*why_not)(void);
  /* Make a link. Returns at once; the connection may still be forming. Owner: the caller, until close. */
  hfreduceResult_t (*open)(struct hfr_net *net, int peer, int vc, struct hfr_link **link);
  /* Take a message. OK: taken; data must stay as it is until sent() has counted it. AGAIN: no room now. */
  int (*post_send)(struct hfr_link *link, const struct hfr_msg_header *header, const void *data);
  /* How many posted messages no longer need their data. Makes progress. FAILED shows as UINT64_MAX. */
  uint64_t (*sent)(struct hfr_link *link);
  /* Has the next message, of `bytes` bytes, arrived? OK: *header and *data are valid until release(). dst, unless NULL, is where
     the payload is wanted: the transport may put it there (*data == dst) or not. Asked again with the same arguments until it is
     OK (dst NULL with bytes 0 commits to nothing). A message of another size is OK too, with no data: the header tells. Asked
     again with that size (0 too) and a dst, which may take until it is OK again, the transport gives its data after all. */
  int (*recv)(struct hfr_link *link, void *dst, size_t bytes, const struct hfr_msg_header **header, const void **data);
  void (*release)(struct hfr_link *link);
  /* Instead of release(): the next message comes, but this one's payload stays where it is until let_go() gets the token, so that
     it can be passed on from there; what is kept takes room from what comes. NULL: it cannot. */
  uint64_t (*keep)(struct hfr_link *link);
  void (*let_go)(struct hfr_link *link, uint64_t token);
  /* Operations send from this buffer, perhaps again and again: a chance to register it. NULL: of no use. */
  void (*lend)(struct hfr_net *net, const void *memory, size_t bytes);
  /* Add what would wake this link up (recv: a message arriving; else room to send) to the set. Shared memory adds nothing: bells
   * ring. */
  void (*want)(struct hfr_link *link, int recv, struct hfr_waitset *set);
  /* The driver is about to wait, or has had nothing to do for a while: look after the links that it does not wait for, whose
     peers may wait for what they still have to do. AGAIN: one comes up anew, look again soon. FAILED: one is broken,
     hfr_last_error() says which. NULL: they look after themselves. */
  int (*attend)(struct hfr_net *net);
  /* Fill in *stat, which is all zero. Any thread, beside the driver, until close; takes system calls. NULL: nothing to tell. */
  void (*stat)(struct hfr_link *link, struct hfr_link_stat *stat);
  void (*close)(struct hfr_link *link);
  /* In a forked child: close descriptors only. */
  void (*after_fork)(struct hfr_link *link);
};

extern const struct hfr_transport hfr_transport_shm, hfr_transport_tcp, hfr_transport_verbs;

/* --- the transports between nodes, by number from 1 --- */
#define HFR_TRANSPORTS_MAX 4
struct hfr_transport_offer {
  uint8_t number[HFR_TRANSPORTS_MAX]; /* that can be used here, best first; 0 ends */
  char why[600];                      /* why the others cannot */
};
/* What this rank offers: those of `names` (comma-separated, in order of preference; "": all, best first) that can be used here.
 * InvalidUsage says what exists when none of the names is known. */
hfreduceResult_t hfr_transport_offer(const char *names, struct hfr_transport_offer *offer);
/* Strike out of `common` what `other` has not. */
void hfr_transport_meet(uint8_t common[HFR_TRANSPORTS_MAX], const uint8_t other[HFR_TRANSPORTS_MAX]);
/* "verbs, tcp" */
void hfr_transport_list(const uint8_t offer[HFR_TRANSPORTS_MAX], char text[64]);
/* NULL: there is none of this number. */
const struct hfr_transport *hfr_transport_at(int number);

/* Free what is no longer of use; now and then, any thread. */
void hfr_transport_tidy(void);
/* The network hardware beside plain interfaces, one "key: value" a line: what there is, or why there is none. Writes at most size
 * bytes, the NUL included; returns how many without it. */
size_t hfr_transport_describe(char *text, size_t size);

/* A link that FAILED has recorded why in hfr_last_error() of the calling thread. */
#endif
