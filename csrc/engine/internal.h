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
/* HFR_P2P: is the request first in line on its link? */
int hfr_my_turn(struct hfr_engine *engine, const struct hfr_request *request);
/* The error as this request tells it: one that came from outside gets the operation that it interrupted. */
hfreduceErrorInfo_t hfr_as_told_by(struct hfr_engine *engine, const struct hfr_request *request, const hfreduceErrorInfo_t *why);
#endif
