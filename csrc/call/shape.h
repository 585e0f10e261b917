/*
 * Shapes of calls: the one table of which buffers a rank has in a call, how many rows of `count` elements each of them holds, and
 * which ranks send and receive them. A new collective is a row here, a planner (coll/) and its public call. All code that checks,
 * copies or sends a call's buffers asks this table.
 */
#ifndef HFR_CALL_SHAPE_H_
#define HFR_CALL_SHAPE_H_
#include "call.h"

/* Rows of a buffer, by rank. In a buffer of more than one row, row r goes to rank r or comes from it. */
enum hfr_rows {
  HFR_NONE,     /* no rank has the buffer */
  HFR_ROW,      /* every rank has one row */
  HFR_ROWS,     /* every rank has a row for each rank */
  HFR_ROOT_ROW, /* the root alone has it: one row */
  HFR_ROOT_ROWS,
  HFR_SENDER_ROW, /* of a message: the side that sends has one row, the other side has none */
  HFR_RECEIVER_ROW,
};

/* Where the two buffers may overlap. */
enum hfr_in_place {
  HFR_APART,       /* nowhere */
  HFR_SAME,        /* both begin at the same byte */
  HFR_OWN_OF_RECV, /* the send buffer is this rank's own row of the receive buffer */
  HFR_OWN_OF_SEND, /* the receive buffer is this rank's own row of the send buffer */
};

struct hfr_shape {
  const char *name;     /* "all_reduce", as errors say it */
  const char *function; /* "hfreduceAllReduce" */
  uint8_t send, recv;   /* enum hfr_rows */
  uint8_t in_place;     /* enum hfr_in_place */
  uint8_t rooted;       /* the call names a root: the rank that sends to all or receives from all */
  uint8_t reduces;      /* the ranks' rows become one; else they are moved */
  uint8_t small;        /* small ones may take the short way (engine/oneshot.c) */
};

/* By enum hfr_coll. */
extern const struct hfr_shape hfr_shape_table[HFR_NCOLL];
static inline const struct hfr_shape *hfr_shape(const struct hfr_call *call) { return &hfr_shape_table[call->coll]; }

static inline enum hfr_rows hfr_rows_kind(const struct hfr_call *call, int recv) {
  const struct hfr_shape *s = hfr_shape(call);
  return (enum hfr_rows)(recv ? s->recv : s->send);
}
/* Has the buffer, where there is one, a row for each rank? */
static inline int hfr_has_many(const struct hfr_call *call, int recv) {
  enum hfr_rows kind = hfr_rows_kind(call, recv);
  return kind == HFR_ROWS || kind == HFR_ROOT_ROWS;
}
/* Rows of `count` elements that rank `rank` of `nranks` has in a buffer (recv: the receive buffer). */
static inline int hfr_rows_of(const struct hfr_call *call, int recv, int rank, int nranks) {
  switch (hfr_rows_kind(call, recv)) {
    case HFR_ROW: return 1;
    case HFR_ROWS: return nranks;
    case HFR_ROOT_ROW: return rank == call->root;
    case HFR_ROOT_ROWS: return rank == call->root ? nranks : 0;
    case HFR_SENDER_ROW: return !call->receiving;
    case HFR_RECEIVER_ROW: return call->receiving;
    default: return 0;
  }
}
/* Do all ranks send, or the root alone? */
static inline int hfr_root_sends(const struct hfr_call *call) {
  enum hfr_rows kind = hfr_rows_kind(call, 0);
  return kind == HFR_ROOT_ROW || kind == HFR_ROOT_ROWS;
}
/* Rows change places within one buffer: a rank sends from a copy of it. */
static inline int hfr_swaps_in_place(const struct hfr_call *call) {
  return hfr_shape(call)->in_place == HFR_SAME && hfr_rows_kind(call, 0) == HFR_ROWS && call->send == call->recv && call->count &&
         !call->sendcounts;
}
#endif
