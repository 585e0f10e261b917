/* A launch of calls that streams order: what stream.c prepares and stream_run.c puts into the queues. Inside those two only. */
#ifndef HFR_COMM_STREAM_LAUNCH_H_
#define HFR_COMM_STREAM_LAUNCH_H_
#include "pairs.h"
#include "staging.h"

/* A segment's turn in the queues. */
struct hfr_turn {
  struct hfr_ordered_call *call;
  int segment, in_rounds;
  int64_t round, distance, tag, order; /* the order of turns */
  int in, out;                         /* 1: it uses the slot's half for the send, the receive buffer */
  int copy_in, copy_out, copy_scalar;
  int slot;
  int wait_in; /* before it is copied out, the slot must be done with... */
  uint32_t in_value;
  _Atomic uint32_t *in_word, *taken;
  const struct hfr_pinned *words;
};

/* The calls of one communicator in a launch. */
struct hfr_batch {
  struct hfreduceComm *comm;
  struct hfr_ordered_call **call;
  int ncalls;
  struct hfr_turn *turn;
  int nturns, went_out, came_in;
  int own;    /* it goes into the user's stream: each call is one segment, and the ring has room for all */
  int starts; /* the device says that it has got to the launch: turns that bring nothing out begin then, and nobody sleeps on */
  struct hfr_stage_ring *ring;
  struct hfr_captured *captured;
  struct hfr_pinned words; /* captured: of this launch */
  size_t nwords;           /* to be cleared at its end */
  _Atomic uint32_t *clear;
};

struct hfr_streams {
  struct hfr_batch *batch;
  int nbatches;
  struct hfr_ordered_call *call;
  int ncalls;
};
#endif
