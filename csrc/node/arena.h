/*
 * The arena: one memory file (memfd) that the ranks of a node share, and the doors through which they wake each other.
 *
 *   [header][control block of each rank][staging slots of each rank: IN x slots, RES x slots][rings: ordered pairs x 2]
 *   [lending area of each rank]                                   only where there are several, and one may have a device
 *
 * A rank writes only its own control block and slots (and the send side of its rings); the others read. Progress is published as
 * counters that only grow: a waiter compares, so nothing is ever reset. Pages that were never touched cost nothing.
 *
 * What a device has copied into its rank's lending area need not go through a slot: the rank names the place where a chunk lies,
 * and the others read it there. It is theirs until all of them have taken the chunk out, just as the slot would be.
 */
#ifndef HFR_NODE_ARENA_H_
#define HFR_NODE_ARENA_H_
#include "../base/status.h"
#include "../call/call.h"
#include "writer.h"
#include <stdatomic.h>

/* START: sequence number of the collective a rank has begun. IN, RED, OUT: chunks staged, reduced, taken out, since the arena was
   made. VER: sequence number of the last collective that all nodes agreed on (written by local rank 0). */
enum hfr_ctr { HFR_CTR_START, HFR_CTR_IN, HFR_CTR_RED, HFR_CTR_OUT, HFR_CTR_VER, HFR_NCTR, HFR_CTR_NONE = 255 };

#define HFR_SLOTS_MAX 64 /* of a rank and kind */

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
  _Atomic uint32_t unpaired;                /* this rank's device writes to its partner's no more */
  _Atomic uint32_t warm;                    /* enum hfr_warm: slots that this rank has made */
  _Alignas(128) _Atomic uint64_t pushed[2]; /* segments that this rank's device has given to its partner, out and back */
  _Alignas(128) _Atomic uint64_t waiters;   /* bit (local rank % 64): asleep until this rank publishes */
  _Alignas(128) _Atomic uint32_t bell;      /* futex word, moves when the rank is rung */
  _Atomic uint32_t sleeping;                /* enum hfr_sleep */
  char bell_name[64];                       /* abstract Unix datagram socket for sleepers in poll(2) */
  /* By chunk number modulo slots: where a lent chunk lies. Written before IN says that the chunk is staged, and not again before
     all OUT say that it was taken out. */
  _Alignas(128) struct hfr_lent {
    _Atomic uint64_t chunk; /* its number + 1: an entry of an earlier chunk is none */
    _Atomic uint64_t at;    /* in the lending area, where its slot would begin */
  } lent[HFR_SLOTS_MAX];
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

/* Slots whose pages have been made. */
enum hfr_warm { HFR_WARM_IN = 1, HFR_WARM_RES = 2 };
/* With more local ranks, those of others are not mapped, for that takes long and each is read less of; nor are RES slots warmed,
   of which a rank writes its share only. */
#define HFR_WARM_RANKS 8

struct hfr_arena {
  uint8_t *map;
  size_t bytes;
  int fd; /* memfd; -1 once all have it */
  int local, nlocal;
  int slots;
  size_t chunk;               /* bytes of a slot */
  size_t ring_slot;           /* bytes of a ring's slot */
  struct hfr_rank_ctrl *ctrl; /* nlocal */
  uint8_t *data, *rings, *lending;
  size_t rank_stride, ring_stride;
  size_t lend; /* bytes of a lending area; 0: there are none. Behind each is room for a chunk, so that who reads one stays inside
                  whatever place is named */
  int left;    /* a device may still write into this rank's lending area: close leaves it mapped */
  int bell_fd;
  /* The driver's: enum hfr_warm; how often IN and RES slots were written until then; operations that used slots; by local rank,
     what it has warmed and this one has mapped. */
  int warm, warmed, uses[2]; /* warmed: some, in the operation that runs */
  uint32_t used;
  uint8_t mapped[HFR_WARM_RANKS];
  struct hfr_writer writer; /* the driver's: for slots and rings */
};

/* Create (leader): memfd of the right size, sealed against resizing. lend: bytes that a rank may lend; 0: no lending. */
hfreduceResult_t hfr_arena_create(struct hfr_arena *arena, int nlocal, size_t chunk, int slots, size_t lend);
/* Map an arena that came as descriptor `fd` (owned from here on); checks its size and its seals. */
hfreduceResult_t hfr_arena_attach(struct hfr_arena *arena, int fd, int nlocal, size_t chunk, int slots, size_t lend);
/* Take place `local`: opens the bell. */
hfreduceResult_t hfr_arena_join(struct hfr_arena *arena, int local);
void hfr_arena_close(struct hfr_arena *arena);
/* Have the kernel make all pages of this rank's IN or RES slots (HFR_WARM_IN, HFR_WARM_RES) in one go, once, and say so. */
void hfr_arena_warm_up(struct hfr_arena *arena, int what);
/* Have it map those slots of others that they have warmed. */
void hfr_arena_map_warm(struct hfr_arena *arena);
/* An operation of some size is about to write this rank's IN or RES slots. Such operations use the slots from the first to the
   last, and each new page takes longer than a small operation: hundreds of calls would be slow. So the slots are warmed, unless
   these are the first few: then they may be the last, and memory would be held for nothing. Driver only. */
#define HFR_WARM_AFTER 5
static inline void hfr_arena_warm(struct hfr_arena *a, int what) {
  if (!(a->warm & what) && ++a->uses[what == HFR_WARM_RES] > HFR_WARM_AFTER) hfr_arena_warm_up(a, what);
}
/* Such an operation is over, whether this rank wrote slots or only read them. Once it has warmed some, the others mostly have,
   too; else it looks when they may have, and now and then. */
static inline void hfr_arena_used(struct hfr_arena *a) {
  uint32_t n = ++a->used;
  if (a->warmed || n == HFR_WARM_AFTER + 1 || n % 64 == 0) hfr_arena_map_warm(a);
}
/* Unmap the pages of slots, rings and the others' lending areas from this process until they are touched again; their content
   stays. This rank's own area, which may be pinned, is left alone. Any thread, any time. */
void hfr_arena_rest(struct hfr_arena *arena);
/* In a forked child: close the descriptors, leave the mapping. */
void hfr_arena_after_fork(struct hfr_arena *arena);

static inline uint8_t *hfr_arena_in(const struct hfr_arena *a, int local, uint64_t chunk_no) {
  return a->data + (size_t)local * a->rank_stride + (chunk_no % (unsigned)a->slots) * a->chunk;
}
static inline uint8_t *hfr_arena_res(const struct hfr_arena *a, int local, uint64_t chunk_no) {
  return a->data + (size_t)local * a->rank_stride + ((unsigned)a->slots + chunk_no % (unsigned)a->slots) * a->chunk;
}
static inline uint8_t *hfr_arena_lending(const struct hfr_arena *a, int local) {
  return a->lending + (size_t)local * (a->lend + a->chunk);
}
/* Name the place, `at` bytes into this rank's lending area, where chunk chunk_no lies as it would in its slot. Before IN says so:
   that store releases it. */
static inline void hfr_arena_lend(struct hfr_arena *a, uint64_t chunk_no, size_t at) {
  struct hfr_lent *l = &a->ctrl[a->local].lent[chunk_no % (unsigned)a->slots];
  atomic_store_explicit(&l->at, at, memory_order_relaxed);
  atomic_store_explicit(&l->chunk, chunk_no + 1, memory_order_relaxed);
}
/* Where local rank `local` has named a place for this chunk; NULL: its slot has it. After IN was seen to say that it is staged.
 */
static inline uint8_t *hfr_arena_lent(const struct hfr_arena *a, int local, uint64_t chunk_no) {
  if (!a->lend) return NULL;
  const struct hfr_lent *l = &a->ctrl[local].lent[chunk_no % (unsigned)a->slots];
  if (atomic_load_explicit(&l->chunk, memory_order_relaxed) != chunk_no + 1) return NULL;
  uint64_t at = atomic_load_explicit(&l->at, memory_order_relaxed);
  return hfr_arena_lending(a, local) + (at < a->lend ? at : 0); /* it may be nonsense: then the data is, too */
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
