/* Building plans. */
#include "plan.h"

#include <stdlib.h>

struct hfr_stage *hfr_plan_add(struct hfr_plan *plan, int role, enum hfr_stage_kind kind, int64_t niter, const char *name) {
  if (plan->nstages == plan->cap) {
    int cap = plan->cap ? 2 * plan->cap : 16;
    struct hfr_stage *grown = realloc(plan->stage, (size_t)cap * sizeof *grown);
    if (!grown) return NULL;
    plan->stage = grown;
    plan->cap = cap;
  }
  if (!plan->count[role]++) plan->first[role] = plan->nstages;
  struct hfr_stage *s = &plan->stage[plan->nstages++];
  *s = (struct hfr_stage){
      .kind = (uint8_t)kind, .role = (uint8_t)role, .ctr = HFR_CTR_NONE, .peer = -1, .niter = niter, .name = name};
  return s;
}

void hfr_plan_fini(struct hfr_plan *plan) {
  free(plan->stage);
  plan->stage = NULL;
  plan->cap = plan->nstages = 0;
}
