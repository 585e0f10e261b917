/*
 * Handles of communicators: judged before they are believed, and who is inside.
 *
 * A communicator lies in a slot of a table that is never unmapped, so that a call can ask a handle's slot whether it is open
 * before it reads anything else. Calls enter and leave; who closes the communicator shuts it, so that nobody comes in any more,
 * and waits until all have left.
 *
 * A collective enters by writing its thread into `caller` and then looks whether the slot is open; who shuts it closes it and
 * then looks at `caller`. All other calls are counted in `uses`. So a collective costs one locked instruction, and finds out by
 * the same one whether another thread's is inside.
 */
#ifndef HFR_COMM_HANDLE_H_
#define HFR_COMM_HANDLE_H_
#include "../include/hfreduce.h"

#include <stdatomic.h>
#include <stdint.h>

/* What a communicator begins with. Only these words may be touched before a call is inside. */
struct hfr_handle {
  _Atomic uint32_t uses;      /* HFR_HANDLE_*, and how many calls are inside, by enum hfr_stay; 0: free, or being made or freed */
  _Atomic uint32_t caller;    /* the thread whose collective is inside; 0: none */
  _Atomic(const char *) call; /* its name, a literal; NULL: none is inside, or it is about to write it */
  _Atomic uint32_t age;       /* how often the slot was opened: tells communicators apart that one slot held */
  _Atomic int nranks;         /* while it is open; 0 else */
  _Atomic int leaving;        /* it was shut: who joins another communicator on its behalf gives up */
  struct hfreduceComm *next;  /* free */
  struct hfreduceWork *left;  /* the caller's: a collective that came back and goes on (hfr_comm_goes_on) */
  uint32_t left_by;           /* the thread that called it */
  const char *left_call;
};
#define HFR_HANDLE_OPEN 0x80000000u
#define HFR_HANDLE_ORPHAN 0x40000000u /* who shut it has gone: the last to leave frees it */

/* A call's share of `uses`: one that is over in a moment, or one that waits for other ranks. */
enum hfr_stay { HFR_BRIEF = 1, HFR_WAITS = 1 << 15 };

/* A slot for a communicator that is about to be made, cleared, closed. NULL: out of memory. Takes the runtime's lock. */
struct hfreduceComm *hfr_handle_get(void);
/* Back to the table; it is the last to be used again. Nobody is inside. Takes the runtime's lock. */
void hfr_handle_put(struct hfreduceComm *comm);
/* From here on it is the user's. */
void hfr_handle_open(struct hfreduceComm *comm, int nranks);
/* In a forked child, whose parent's other threads may have been inside. */
void hfr_handle_after_fork(struct hfreduceComm *comm);

/* Every public call on a communicator but a collective enters and, if that was successful, leaves. `function` is its name.
   InvalidArgument: `comm` is no communicator, or not any more. */
hfreduceResult_t hfr_comm_enter(hfreduceComm_t comm, const char *function, enum hfr_stay stay);
void hfr_comm_leave(hfreduceComm_t comm, enum hfr_stay stay);
/* So does a collective outside a group. `function` is a literal. Also InvalidUsage: a collective of another thread, or of this
   one, which a signal handler interrupts, is inside. */
hfreduceResult_t hfr_comm_begin(hfreduceComm_t comm, const char *function);
void hfr_comm_end(hfreduceComm_t comm);
/* By a collective that is about to end: it comes back to its caller, who looks at signals, and goes on as `work`. Until that has
   ended other threads are told that it is inside. Its own thread may call the next one: an exception made it asynchronous. */
void hfr_comm_goes_on(struct hfreduceComm *comm, struct hfreduceWork *work);
/* Is it the communicator of that age, and open? Any pointer may be asked. */
int hfr_handle_is(hfreduceComm_t comm, uint32_t age);
/* Ranks of an open communicator; 0: it is not one. Any pointer may be asked. */
int hfr_handle_nranks(hfreduceComm_t comm);

/* By a call that is inside, briefly: let nobody in any more. 0: another thread did so before. */
int hfr_handle_shut(struct hfreduceComm *comm);
/* Wait until only the call that shut it is inside. 0: after so many ns there still were others. */
int hfr_handle_await(struct hfreduceComm *comm, int64_t limit_ns);
/* By a call that is inside, briefly: is one of the others a call of another thread that waits for other ranks? One that came back
   and goes on counts. *caller: the thread whose collective it is, 0: it is something else; *call: its name. */
int hfr_handle_waits(struct hfreduceComm *comm, uint32_t *caller, const char **call);
/* The call that shut it leaves, and others are inside: the last of these ends its life. */
void hfr_handle_orphan(struct hfreduceComm *comm);
/* This thread, as the kernel numbers it. */
uint32_t hfr_thread_id(void);

/* --- comm.c --- */
/* Nobody is inside, nobody can come. */
void hfr_comm_tear_down(struct hfreduceComm *comm);
#endif
