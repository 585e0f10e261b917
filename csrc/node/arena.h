/*
 * The arena: one memory file (memfd) that the ranks of a node share, and the doors through which they wake each other.
 *
 *   [header][control block of each rank][staging slots of each rank: IN x slots, RES x slots][rings: ordered pairs x 2]
 *
 * A rank writes only its own control block and slots (and the send side of its rings); the others read. Progress is published as
 * counters that only grow: a waiter compares, so nothing is ever reset. Pages that were never touched cost nothing.
 */
#ifndef HFR_NODE_ARENA_H_
#define HFR_NODE_ARENA_H_
#include "../base/status.h"
#include "writer.h"
#include <stdatomic.h>

/* START: sequence number of the collective a rank has begun. IN, RED, OUT: chunks staged, reduced, taken out, since the arena was
   made. VER: sequence number of the last collective that all nodes agreed on (written by local rank 0). */
enum hfr_ctr { HFR_CTR_START, HFR_CTR_IN, HFR_CTR_RED, HFR_CTR_OUT, HFR_CTR_VER, HFR_NCTR, HFR_CTR_NONE = 255 };

/* What a rank says it is doing; compared by its peers before any data is used. */
struct hfr_fingerprint {
  uint64_t seq;
  uint64_t count;
  int32_t root; /* or the tag of a send/recv; -1: none */
  uint8_t coll, op, dtype;
  uint8_t way; /* 1: by pairs of devices (engine/pairing.c) */
};
static inline int hfr_fingerprint_equal(const struct hfr_fingerprint *a, const struct hfr_fingerprint *b) {
  return a->seq == b->seq && a->count == b->count && a->root == b->root && a->coll == b->coll && a->op == b->op &&
         a->dtype == b->dtype && a->way == b->way;
}

/* 128-byte groups, because neighbouring lines are fetched in pairs. */
struct hfr_rank_ctrl {
  /* START, IN and the fingerprints share lines: one miss tells a peer all it needs to begin. Two fingerprints, by parity of seq:
     a rank begins seq + 2 only after all have begun, so checked, seq + 1. */
  _Alignas(128) _Atomic uint64_t start;
  _Atomic uint64_t in;
  struct hfr_fingerprint fp[2];
  _Alignas(128) _Atomic uint64_t red;
  _Alignas(128) _Atomic uint64_t out;
  _Atomic uint64_t ver;
  _Alignas(128) _Atomic uint64_t pushed[2]; /* segments that this rank's device has given to its partner, out and back */
  _Alignas(128) _Atomic uint64_t waiters; /* bit (local rank % 64): asleep until this rank publishes */
  _Alignas(128) _Atomic uint32_t bell;    /* futex word, moves when the rank is rung */
  _Atomic uint32_t sleeping;              /* enum hfr_sleep */
  char bell_name[64];                     /* abstract Unix datagram socket for sleepers in poll(2) */
};
enum hfr_sleep { HFR_AWAKE, HFR_SLEEP_FUTEX, HFR_SLEEP_POLL };

#define HFR_RING_VCS 2
struct hfr_msg_header {
  uint32_t magic;
  uint32_t crc;    /* of the payload; 0 when checksums are off */
  uint64_t bytes;  /* of payload */
  uint64_t offset; /* of the payload in its stream of iterations: which message of the operation this is */
  struct hfr_fingerprint fp;
};
#define HFR_MSG_MAGIC 0x31724648u
#define HFR_RING_SLOTS 4
struct hfr_ring {
  _Alignas(128) _Atomic uint64_t head; /* messages written; only the sender writes it */
  _Alignas(128) _Atomic uint64_t tail; /* messages taken; only the receiver writes it */
  _Alignas(128) struct hfr_msg_header header[HFR_RING_SLOTS];
};

struct hfr_arena {
  uint8_t *map;
  size_t bytes;
  int fd; /* memfd; -1 once all have it */
  int local, nlocal;
  int slots;
  size_t chunk;               /* bytes of a slot */
  size_t ring_slot;           /* bytes of a ring's slot */
  struct hfr_rank_ctrl *ctrl; /* nlocal */
  uint8_t *data, *rings;
  size_t rank_stride, ring_stride;
  int bell_fd;
  struct hfr_writer writer; /* the driver's: for slots and rings */
};

/* Create (leader): memfd of the right size, sealed against resizing. */
hfreduceResult_t hfr_arena_create(struct hfr_arena *arena, int nlocal, size_t chunk, int slots);
/* Map an arena that came as descriptor `fd` (owned from here on); checks its size and its seals. */
hfreduceResult_t hfr_arena_attach(struct hfr_arena *arena, int fd, int nlocal, size_t chunk, int slots);
/* Take place `local`: opens the bell. */
hfreduceResult_t hfr_arena_join(struct hfr_arena *arena, int local);
void hfr_arena_close(struct hfr_arena *arena);
/* Unmap the pages of slots and rings from this process until they are touched again; their content stays. Any thread, any time.
 */
void hfr_arena_rest(struct hfr_arena *arena);
/* In a forked child: close the descriptors, leave the mapping. */
void hfr_arena_after_fork(struct hfr_arena *arena);

static inline uint8_t *hfr_arena_in(const struct hfr_arena *a, int local, uint64_t chunk_no) {
  return a->data + (size_t)local * a->rank_stride + (chunk_no % (unsigned)a->slots) * a->chunk;
}
static inline uint8_t *hfr_arena_res(const struct hfr_arena *a, int local, uint64_t chunk_no) {
  return a->data + (size_t)local * a->rank_stride + ((unsigned)a->slots + chunk_no % (unsigned)a->slots) * a->chunk;
}
static inline struct hfr_ring *hfr_arena_ring_at(const struct hfr_arena *a, int from, int to, int vc) {
  return (struct hfr_ring *)(a->rings + (((size_t)from * a->nlocal + to) * HFR_RING_VCS + vc) * a->ring_stride);
}
static inline uint8_t *hfr_ring_data(const struct hfr_arena *a, struct hfr_ring *ring, uint64_t message) {
  return (uint8_t *)ring + 4096 + (message % HFR_RING_SLOTS) * a->ring_slot;
}
static inline _Atomic uint64_t *hfr_arena_ctr(const struct hfr_arena *a, int local, enum hfr_ctr ctr) {
  struct hfr_rank_ctrl *c = &a->ctrl[local];
  switch (ctr) {
    case HFR_CTR_START: return &c->start;
    case HFR_CTR_IN: return &c->in;
    case HFR_CTR_RED: return &c->red;
    case HFR_CTR_OUT: return &c->out;
    default: return &c->ver;
  }
}

void hfr_arena_wake_waiters(struct hfr_arena *arena);
/* Call after publishing (release store of a counter or ring index): wakes who sleeps on this rank. The fence orders the
   publication before the look at `waiters`; it pairs with the one in hfr_arena_sleep_begin. */
static inline void hfr_arena_notify(struct hfr_arena *a) {
  if (a->nlocal == 1) return;
  atomic_thread_fence(memory_order_seq_cst);
  if (atomic_load_explicit(&a->ctrl[a->local].waiters, memory_order_relaxed)) hfr_arena_wake_waiters(a);
}
/* Wake local rank `target` from whatever it sleeps in. Any thread. */
void hfr_arena_ring(struct hfr_arena *arena, int target);

/* Announce that this rank is about to sleep; returns the bell's value to sleep on. After it the caller must look once more for
 * work. */
uint32_t hfr_arena_sleep_begin(struct hfr_arena *arena, enum hfr_sleep how);
/* Sleep on the futex until rung or the time is up (HFR_SLEEP_FUTEX only). */
void hfr_arena_sleep_futex(struct hfr_arena *arena, uint32_t bell, int64_t timeout_ns);
/* Awake again; empties the bell socket. */
void hfr_arena_sleep_end(struct hfr_arena *arena);
#endif
