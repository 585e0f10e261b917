/*
 * Groups, which are a thread's own and nest, and the calls of non-blocking communicators. hfreduce's group under ours holds the
 * collectives; ours adds the jobs, which communicators take part, and errors that hfreduce has not seen.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

/* Calls that were issued together and are under way. Each of their communicators has a share. */
struct hfr_nccl_flight {
  _Atomic int shares;
  hfreduceWork_t work;
};

static _Thread_local struct {
  int depth;
  ncclResult_t error; /* the first one: the outermost End returns it */
  char text[HFR_NCCL_TEXT];
  int mode;    /* blocking or not, as its first communicator is; -1: none yet */
  int waiting; /* a call without a stream is among them, so somebody has to wait for it */
  struct hfr_nccl_job *jobs, **jobs_tail;
  ncclComm_t *comms; /* that have calls in it, entered once each */
  int *self;         /* of each: sends to itself less receives from itself */
  int ncomms, cap;
} group;

int hfr_nccl_grouped(void) { return group.depth > 0; }

ncclResult_t hfr_nccl_latch(ncclResult_t code) {
  if (code && code != ncclInProgress && group.depth && !group.error) {
    group.error = code;
    memcpy(group.text, hfr_nccl_text(), sizeof group.text);
  }
  return code;
}

/* All of a group block, or none. */
static ncclResult_t join_mode(const char *f, int blocking) {
  if (group.mode < 0) group.mode = blocking;
  if (group.mode == blocking) return ncclSuccess;
  return hfr_nccl_fail(ncclInvalidArgument, "%s: blocking and non-blocking communicators cannot be in one group", f);
}

ncclResult_t hfr_nccl_group_job(const char *f, struct hfr_nccl_job *job) {
  ncclComm_t leading = job->parent ? job->parent : job->child;
  *group.jobs_tail = job;
  group.jobs_tail = &job->next;
  return join_mode(f, leading->config.blocking);
}

static ncclResult_t group_take(const char *f, ncclComm_t comm, int waiting) {
  HFR_NCCL_TRY(join_mode(f, comm->config.blocking));
  group.waiting |= waiting;
  for (int i = group.ncomms - 1; i >= 0; i--)
    if (group.comms[i] == comm) return ncclSuccess;
  if (group.ncomms == group.cap) {
    int cap = group.cap ? 2 * group.cap : 8;
    ncclComm_t *comms = realloc(group.comms, (size_t)cap * sizeof *comms);
    if (comms) group.comms = comms;
    int *self = realloc(group.self, (size_t)cap * sizeof *self);
    if (self) group.self = self;
    if (!comms || !self) return hfr_nccl_fail(ncclSystemError, "%s: out of memory for a group of %d communicators", f, cap);
    group.cap = cap;
  }
  hfr_nccl_enter_again(comm);
  group.self[group.ncomms] = 0;
  group.comms[group.ncomms++] = comm;
  return ncclSuccess;
}

ncclResult_t hfr_nccl_self(const char *f, ncclComm_t comm, int sends) {
  if (!group.depth)
    return hfr_nccl_latch(hfr_nccl_fail(
        ncclInvalidUsage, "%s: rank %d: a send to this rank itself and its receive must be in one group", f, comm->rank));
  for (int i = 0; i < group.ncomms; i++)
    if (group.comms[i] == comm) group.self[i] += sends;
  return ncclSuccess;
}

/* What a rank sends to itself it has to receive in the same group, or it would wait for itself. */
static ncclResult_t check_selves(void) {
  for (int i = 0; i < group.ncomms; i++)
    if (group.self[i])
      return hfr_nccl_fail(ncclInvalidUsage, "ncclGroupEnd: rank %d has %d %s in the group than the other way round",
                           group.comms[i]->rank, abs(group.self[i]),
                           group.self[i] > 0 ? "more sends to itself" : "more receives from itself");
  return ncclSuccess;
}

void hfr_nccl_group_forget(ncclComm_t comm) {
  for (int i = 0; i < group.ncomms; i++)
    if (group.comms[i] == comm) {
      group.comms[i] = group.comms[--group.ncomms];
      group.self[i] = group.self[group.ncomms];
      hfr_nccl_latch(hfr_nccl_fail(ncclInvalidUsage, "a communicator was ended in the group that has calls on it"));
      hfr_nccl_leave(comm);
      return;
    }
}

/* ---------------------------------------------------------------- flights */

static void share_out(struct hfr_nccl_flight *flight) {
  if (atomic_fetch_sub(&flight->shares, 1) > 1) return;
  hfreduceWorkDestroy(flight->work);
  free(flight);
}

int hfr_nccl_flying(ncclComm_t comm) {
  int done = 0;
  if (!comm->flight) return 0;
  hfreduceResult_t r = hfreduceWorkTest(comm->flight->work, &done);
  if (!done) return 1;
  if (r) {
    comm->failed = hfr_nccl_took(comm, r);
    memcpy(comm->why, hfr_nccl_text(), sizeof comm->why);
  }
  share_out(comm->flight);
  comm->flight = NULL;
  return 0;
}

void hfr_nccl_land(ncclComm_t comm) {
  if (comm->flight) share_out(comm->flight);
  comm->flight = NULL;
}

/* Launch hfreduce's open group without waiting; `n` communicators take part. */
static ncclResult_t take_off(ncclComm_t *comms, int n) {
  struct hfr_nccl_flight *flight = malloc(sizeof *flight);
  if (!flight) {
    hfreduceGroupCancel(hfreduceSystemError);
    hfreduceGroupEnd();
    return hfr_nccl_fail(ncclSystemError, "out of memory for a non-blocking call");
  }
  flight->work = NULL;
  ncclResult_t r = hfr_nccl_took(comms[0], hfreduceGroupEndAsync(&flight->work));
  if (r) {
    free(flight);
    return r;
  }
  atomic_store(&flight->shares, n);
  for (int i = 0; i < n; i++) {
    pthread_mutex_lock(&comms[i]->lock);
    comms[i]->flight = flight;
    pthread_mutex_unlock(&comms[i]->lock);
  }
  for (int i = 0; i < n && !r; i++) r = hfr_nccl_state(comms[i]);
  return r;
}

/* ---------------------------------------------------------------- calls */

static ncclResult_t begin(struct hfr_nccl_call *call, const char *f, ncclComm_t comm, cudaStream_t stream) {
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_WORKING));
  *call = (struct hfr_nccl_call){.comm = comm, .core = atomic_load_explicit(&comm->core, memory_order_relaxed)};
  if (group.depth) {
    ncclResult_t r = group_take(f, comm, !stream);
    if (r) hfr_nccl_leave(comm);
    return r;
  }
  atomic_fetch_add_explicit(&comm->calling, 1, memory_order_relaxed);
  if (!comm->config.blocking && !stream) {
    call->alone = 1;
    hfreduceGroupStart();
  }
  return ncclSuccess;
}

ncclResult_t hfr_nccl_begin(struct hfr_nccl_call *call, const char *f, ncclComm_t comm, cudaStream_t stream) {
  return hfr_nccl_latch(begin(call, f, comm, stream));
}

ncclResult_t hfr_nccl_end(struct hfr_nccl_call *call, hfreduceResult_t result) {
  ncclResult_t r;
  if (!call->alone)
    r = hfr_nccl_took(call->comm, result);
  else if (!result)
    r = take_off(&call->comm, 1);
  else
    r = hfr_nccl_took(call->comm, hfreduceGroupEnd()); /* tells the call's error again */
  if (!group.depth) atomic_fetch_sub_explicit(&call->comm->calling, 1, memory_order_relaxed);
  hfr_nccl_leave(call->comm);
  return hfr_nccl_latch(r);
}

void hfr_nccl_drop(struct hfr_nccl_call *call) {
  if (call->alone) {
    hfreduceGroupCancel(hfreduceInvalidUsage);
    hfreduceGroupEnd();
  }
  if (!group.depth) atomic_fetch_sub_explicit(&call->comm->calling, 1, memory_order_relaxed);
  hfr_nccl_leave(call->comm);
}

/* ---------------------------------------------------------------- the group's life */

HFR_NCCL_DEFINE(ncclResult_t, ncclGroupStart, (void)) {
  if (!group.depth++) {
    group.mode = -1;
    group.waiting = 0;
    group.jobs = NULL;
    group.jobs_tail = &group.jobs;
    group.ncomms = 0;
    group.error = ncclSuccess;
    hfreduceGroupStart();
  }
  return ncclSuccess;
}

/* Everything is let go of; the group's error, if any, is told. */
static ncclResult_t cancel_all(void) {
  hfreduceGroupCancel(hfreduceInvalidUsage);
  hfreduceGroupEnd();
  hfr_nccl_jobs_drop(group.jobs);
  return group.error ? hfr_nccl_retell(group.error, group.text) : ncclSuccess;
}

static void let_go(void) {
  for (int i = 0; i < group.ncomms; i++) hfr_nccl_leave(group.comms[i]);
  free(group.comms);
  free(group.self);
  group.comms = NULL;
  group.self = NULL;
  group.ncomms = group.cap = 0;
  group.jobs = NULL;
}

/* Jobs first: collectives of the group are on communicators that were there before. */
static ncclResult_t launch_all(void) {
  int background = group.mode == 0;
  ncclResult_t jobs = group.jobs ? hfr_nccl_jobs_run(group.jobs, background) : ncclSuccess, calls = ncclSuccess;
  group.jobs = NULL;
  if (jobs && jobs != ncclInProgress) {
    hfreduceGroupCancel(hfreduceInvalidUsage);
    hfreduceGroupEnd();
    return jobs;
  }
  for (int i = 0; i < group.ncomms; i++) atomic_fetch_add(&group.comms[i]->calling, 1);
  if (background && group.waiting && group.ncomms)
    calls = take_off(group.comms, group.ncomms);
  else
    calls = hfr_nccl_took(group.ncomms ? group.comms[0] : NULL, hfreduceGroupEnd());
  for (int i = 0; i < group.ncomms; i++) atomic_fetch_sub(&group.comms[i]->calling, 1);
  return calls ? calls : jobs;
}

static ncclResult_t without_start(const char *f) {
  return hfr_nccl_fail(ncclInvalidUsage, "%s without ncclGroupStart on this thread", f);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclGroupEnd, (void)) {
  if (!group.depth) return without_start("ncclGroupEnd");
  if (group.depth == 1) hfr_nccl_latch(check_selves());
  if (--group.depth) return ncclSuccess;
  ncclResult_t r = group.error ? cancel_all() : launch_all();
  let_go();
  return r;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclGroupSimulateEnd, (ncclSimInfo_t * simInfo)) {
  static const char f[] = "ncclGroupSimulateEnd";
  if (!group.depth) return without_start(f);
  if (simInfo && (simInfo->magic != NCCL_SIM_INFO_MAGIC || simInfo->size < sizeof *simInfo))
    hfr_nccl_latch(
        hfr_nccl_fail(ncclInvalidArgument, "%s: simInfo was not initialised; assign NCCL_SIM_INFO_INITIALIZER to it", f));
  if (--group.depth) return ncclSuccess;
  ncclResult_t r = cancel_all();
  let_go();
  if (r) return r;
  /* There is no model of time here; the value that stands for "not known" is what the initialiser gave. */
  if (simInfo) simInfo->estimatedTime = -1.0f;
  return ncclSuccess;
}
