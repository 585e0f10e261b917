/*
 * Windows: how a request works on buffers that no CPU may touch.
 *
 * The buffers are cut along the elements of each rank's block into segments. A device copies segment after segment into pinned
 * memory and says "ready"; the request works on it there and says "done"; the device copies the result away and says "taken".
 * Segments lie in a ring: several are in flight, and memory is bounded.
 *
 *   user's send buffer   │ block of rank 0      │ block of rank 1      │ ...         (one row a block; one row where there is
 *                        └seg 0─┘└seg 1─┘└s 2─┘ └seg 0─┘└seg 1─┘└s 2─┘               but one)
 *   pinned, segment 0    [seg 0 of row 0][seg 0 of row 1] ...
 *
 * The plan knows nothing of it: it is the plan of host memory, and ranks of both kinds work together. A step waits until its
 * segment is open; a segment is passed when no stage will come back to it. The words are the device's to write and nobody rings a
 * bell when it does: who drives such a request looks now and then.
 *
 * Rows of the send buffer may lie in the rank's lending area of the arena. Then a chunk that the other local ranks are to read is
 * not copied to a slot but lent: they read it in the segment, and that half of the segment goes back to the device only when all
 * of them have taken it out, which may be after the request itself is through.
 *
 *   send half      [copied out by the device]─ready─[worked on, lent]──passed──[others read]──all OUT──done[0]
 *   receive half               ...taken─────────────[worked on]────────passed──done[1]──[copied in by the device]─taken
 */
#ifndef HFR_ENGINE_WINDOW_H_
#define HFR_ENGINE_WINDOW_H_
#include "../device/device.h"
#include "plan.h"

struct hfr_segment {
  uint8_t *in, *out;             /* rows of the send and the receive buffer; NULL: that buffer is reached by itself */
  const _Atomic uint32_t *taken; /* NULL: `out` is free from the beginning */
  _Atomic uint32_t *ready;
  _Atomic uint32_t *done[2]; /* with the send, with the receive buffer; NULL: the call has none. Two words, because sends and
                                receives that share a slot end in any order */
  uint32_t value;            /* what `done` reaches */
  uint32_t ready_value, taken_value; /* what the others have reached then; all cyclic */
  uint64_t lent; /* the chunk of the arena after the last one that lies here for the others to read; 0: none does */
};

struct hfr_window {
  size_t bytes;  /* of a row in a segment */
  size_t row[2]; /* of a row in the user's send and receive buffer; SIZE_MAX: one row; 0: uneven, the call's counts tell */
  int nsegs;
  int opened, passed; /* segments; the driver's */
  int back;           /* segments whose send half is the device's again, of those passed */
  int lends;          /* `in` lies in the lending area */
  int again;          /* in a graph: opened anew with each replay, and `ready` is taken back */
  int wake;           /* host functions sleep on `done` */
  const void *scalar; /* where the device puts the call's factor; NULL: the call has it */
  struct hfr_small {
    struct hfr_mapping *mapping; /* NULL: the device copies */
    uint8_t *user;
    size_t bytes;
  } small[2];            /* the only segment's send and receive buffer are so small that who drives the request copies them */
  const void *memory[2]; /* where all of the ring's halves lie, for transports that register what they send from */
  size_t memory_bytes[2];
  struct hfr_segment segment[];
};

/* Bytes that the segments of a planned call are a multiple of: no step may reach into two of them. */
size_t hfr_window_unit(const struct hfr_plan *plan);
/* Rows of a buffer of the call (recv: the receive buffer) that its plan works on here; 0: it leaves that buffer alone. */
int hfr_window_rows(const struct hfr_plan *plan, int recv);

struct hfr_request;
/* May segment s be worked on? */
int hfr_window_reach(struct hfr_window *window, int s);
/* Where offset `off` of the send or receive buffer lies now. */
uint8_t *hfr_window_place(const struct hfr_request *request, int recv, size_t off);
/* The segment of an offset. */
int hfr_window_segment(const struct hfr_request *request, int recv, size_t off);
/* The stages stand at their beginning. */
void hfr_window_begin(struct hfr_request *request);
/* The segment that a step works on; -1: none. */
int hfr_window_of_step(const struct hfr_request *request, int stage, int64_t i, const struct hfr_step *step);
/* A stage has moved: hand over the segments that all have passed. */
void hfr_window_move(struct hfr_request *request, int stage);
/* Segments below `low` are done, all but what is lent of them. */
void hfr_window_pass(struct hfr_window *window, int low);
/* Is something lent that the others may still read? */
static inline int hfr_window_owed(const struct hfr_window *window) { return window->back < window->passed; }
/* All local ranks have taken out this many chunks: lent halves go back to the device. 1: something moved. */
int hfr_window_give_back(struct hfr_window *window, uint64_t taken_out);
/* The request has ended, well (whole) or badly: every wait of the device ends. */
void hfr_window_release(struct hfr_window *window, int whole);
void hfr_window_free(struct hfr_window *window);
#endif
