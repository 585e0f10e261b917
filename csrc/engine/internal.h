/* Shared by the engine's files only. */
#ifndef HFR_ENGINE_INTERNAL_H_
#define HFR_ENGINE_INTERNAL_H_
#include "engine.h"

/* Break the communicator from within request r: adds where it stood to `text`. */
void hfr_fail_request(struct hfr_engine *engine, const struct hfr_request *request, const char *phase, int peer,
                      hfreduceResult_t code, const char *text);
/* Are all guards of a step open? Verifies the operation when a guard concerns its data. */
int hfr_guards_open(struct hfr_engine *engine, struct hfr_request *request, const struct hfr_step *step);
/* Have the local ranks that a guard names published what it needs? */
int hfr_counter_reached(const struct hfr_engine *engine, const struct hfr_request *request, const struct hfr_guard *guard);
/* Where a location lies, user's memory or slot. */
uint8_t *hfr_place(const struct hfr_engine *engine, const struct hfr_request *request, const struct hfr_loc *loc);
/* Ask the plan for iteration i of a stage, unless its cursor has it. */
void hfr_load_step(struct hfr_request *request, int stage, int64_t i);
/* Try to move a SEND stage. 1: it moved. (sending.c) */
int hfr_advance_send(struct hfr_engine *engine, struct hfr_request *request, int stage);
/* --- lending.c --- */
/* Instead of copying what a step of a COPY stage copies to the rank's IN slot: lend it where it lies, if all of it lies in the
   lending area as it would in the slot. 1: it is lent, once IN says so. */
int hfr_request_lend(struct hfr_engine *engine, struct hfr_request *request, int stage, int64_t i, const struct hfr_step *step);
/* Give the device back what all local ranks have taken out of that which the request has passed. It has a window. 1: something
   was. */
int hfr_request_give_back(struct hfr_engine *engine, struct hfr_request *request);
/* HFR_P2P, sending: is the request first in line on its link? */
int hfr_my_turn(struct hfr_engine *engine, const struct hfr_request *request);
/* --- p2p.c: driver only --- */
/* Put a send or receive in line; a receive takes a message that was kept aside for it. */
void hfr_p2p_post(struct hfr_engine *engine, struct hfr_request *request);
/* Look for the messages that a receive waits for, unless that was done since engine->visit moved. A message goes to whom it fits:
   to this receive, to a later one, or aside. Receives are asked in the order of their issue. 1: something moved. */
int hfr_p2p_receive(struct hfr_engine *engine, struct hfr_request *request);
/* Parts that have come of the message that a receive takes. */
int64_t hfr_p2p_parts(const struct hfr_engine *engine, const struct hfr_request *request);
/* Note what would wake a receive, unless that was done since engine->visit moved. */
void hfr_p2p_want(struct hfr_engine *engine, const struct hfr_request *request, struct hfr_waitset *set);
void hfr_p2p_fini(struct hfr_engine *engine);

/* --- pairing.c: driver only --- */
void hfr_pairing_post(struct hfr_engine *engine, struct hfr_request *request);
/* 1: something moved. */
int hfr_pairing_progress(struct hfr_engine *engine, struct hfr_request *request);

/* --- request.c --- */
/* So many more windows of the engine are open. */
void hfr_window_count(struct hfr_engine *engine, int more);

/* --- replay.c: driver only --- */
/* A captured request came: it joins the others of its graph. */
void hfr_replay_add(struct hfr_engine *engine, struct hfr_request *request);
/* Start what graphs have launched. 1: something moved. */
int hfr_replay_poll(struct hfr_engine *engine);
void hfr_replay_fini(struct hfr_engine *engine);

/* May it start: has its first segment come? */
static inline int hfr_request_ready(struct hfr_request *request) {
  return !request->window || hfr_window_reach(request->window, 0);
}
/* --- progress.c, for tests --- */
/* NAPPING: it looks again within a millisecond by itself. ASLEEP: it has to be woken. */
enum hfr_rest { HFR_THREAD_AWAKE, HFR_THREAD_NAPPING, HFR_THREAD_ASLEEP };
/* How long to sleep after a sleep of so many ns (0: the first one in a row) while a device may write a word: it is at most 20 us
   and a 32nd of the time waited so far, and at most 1 ms. */
int64_t hfr_longer_nap(int64_t ns);
/* The progress thread does not sleep for so long after a device got to a launch, or a launch on a device moved. */
#define HFR_STIR_NS 500000ll
/* What the progress thread does at this moment. */
enum hfr_rest hfr_drive_rest(void);
/* How long a sleep lasts at most. A test that lengthens it sees who is not woken: he sleeps on. */
extern int64_t hfr_nap_ns;
/* Called by the progress thread when it is about to sleep, has found which engines it drives meanwhile, and has not yet said that
   it sleeps: what comes in between must not be left lying. NULL but in a test. */
extern void (*_Atomic hfr_before_rest)(void);

/* The clock of a request starts. */
void hfr_request_start(struct hfr_request *request);
/* The error as this request tells it: one that came from outside gets the operation that it interrupted. */
hfreduceErrorInfo_t hfr_as_told_by(struct hfr_engine *engine, const struct hfr_request *request, const hfreduceErrorInfo_t *why);
#endif
