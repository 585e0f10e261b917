/*
 * all_reduce over pairs of GPUs that NVLink joins, where every rank has a partner on its node. Inside comm/ only.
 *
 *   lower    [own half │ other half]──push──┐      ┌──push──[other half │ own half]    upper
 *                 │                         ▼      ▼                         │
 *                 └──────────► own half += what the partner pushed ◄─────────┘         on the GPUs, by a kernel
 *                                           │
 *               all_reduce of the lower halves among the lower ranks of all pairs, of the upper among the upper: `half`
 *                                           │
 *                 own half of the result ──push──► the partner, and its half here
 *
 * So the CPUs get one copy a pair instead of two. `half` is a communicator like any other, and its all_reduce goes the way of all
 * device memory (stream.h); only what is copied out is the pair's sum.
 *
 * Which way a call goes must be known to all ranks alike, so it depends on nothing but the call. A rank that cannot go along (its
 * buffer lies in host memory, or it captures) goes the ordinary way, and the fingerprint tells: the communicator agrees on every
 * call, by an operation without data.
 */
#ifndef HFR_COMM_PAIRS_H_
#define HFR_COMM_PAIRS_H_
#include "stream.h"

/* Segments that lie in the memory of a pair's device at once: a rank pushes one ahead, and has then seen its partner push the one
   before last, behind which it had used the one before that. */
#define HFR_PAIR_DEPTH 4
#define HFR_PAIR_WORDS 8 /* of each kind, used in turn; more than there are segments */

struct hfr_pairs {
  struct hfr_pair *pair;
  struct hfreduceComm *half;
  int *ranks; /* of half, as the whole numbers them */
  int device;
  void *context;
  int partner; /* local rank */
  int lower;
  size_t segment, least; /* bytes: of a slot in the devices' memory; of a call that goes this way */
  uint64_t segments;     /* launched so far, on both alike */
  uint64_t calls;
  struct hfr_pinned words;
  _Atomic uint32_t *ready[2], *done[2]; /* out, back */
};

/* --- pairs.c --- */
/* 1: the call goes over pairs, on all ranks; `ordered` is how a stream orders it. Else 0, or an error: *result. */
int hfr_pairs_want(struct hfreduceComm *comm, const struct hfr_call *call, const struct hfr_ordered *ordered,
                   hfreduceResult_t *result);
/* By what the sums of a pair are multiplied before they are rounded. */
float hfr_pairs_scale(const struct hfreduceComm *comm, const struct hfr_call *call);
/* The call of `half` that stands for this one. */
struct hfr_call hfr_pairs_half_call(const struct hfreduceComm *comm, const struct hfr_call *call);

/* --- pairs_stream.c: within enter and leave of the pair's copier --- */
/* Give the exchanges of a call their windows: so many segments of `bytes` bytes each. */
hfreduceResult_t hfr_pairs_prepare(struct hfr_ordered_call *call, int nsegs, size_t bytes);
/* The call comes next: its segments get their numbers and words. */
void hfr_pairs_number(struct hfr_ordered_call *call);
/* How a call without a request on `half`, which has one rank, is cut. */
void hfr_pairs_cut(const struct hfr_ordered_call *call, int *nsegs, size_t *bytes);
/* The steps of segment s, in this order. The next segment is pushed before the sum of this one, its result pushed before this one
   is taken; whoever puts steps of several communicators into queues does a step of each in turn. */
hfreduceResult_t hfr_pairs_push(const struct hfr_ordered_call *call, int s);
/* The pair's sum goes to `area` in pinned memory, in the copier's queue to the host. */
hfreduceResult_t hfr_pairs_out(const struct hfr_ordered_call *call, struct hfr_copier *copier, uint8_t *area, int s);
/* ... and the result from there to this device, and to the partner's memory. `copied`, a word of `words`, is raised when the area
 * is free again. */
hfreduceResult_t hfr_pairs_back(const struct hfr_ordered_call *call, struct hfr_copier *copier, const uint8_t *area, int s,
                                const struct hfr_pinned *words, _Atomic uint32_t *copied, uint32_t value);
/* Instead of the last two, for a pair alone. */
hfreduceResult_t hfr_pairs_out_alone(const struct hfr_ordered_call *call, int s);
hfreduceResult_t hfr_pairs_back_alone(const struct hfr_ordered_call *call, int s);
/* The partner's half, from where it has pushed it. */
hfreduceResult_t hfr_pairs_take(const struct hfr_ordered_call *call, int s);
#endif
