/* What becomes of a communicator that is made: asked, revoked, suspended, finalized, destroyed, aborted. */
#include "internal.h"

#include <string.h>

/* ---------------------------------------------------------------- ending */

static ncclResult_t run_finalize(struct hfr_nccl_job *job, hfreduceComm_t *made) {
  (void)made;
  return hfr_nccl_took(job->parent, hfreduceCommFinalize(atomic_load(&job->parent->core)));
}

static ncclResult_t finalize(ncclComm_t comm) {
  static const char f[] = "ncclCommFinalize";
  if (!comm) return ncclSuccess;
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_SETTLED));
  ncclResult_t r = ncclSuccess;
  if (atomic_load(&comm->revoked))
    r = hfr_nccl_fail(ncclInvalidUsage, "%s: rank %d: the communicator was revoked; destroy it", f, comm->rank);
  else if (atomic_exchange(&comm->finalized, 1))
    r = hfr_nccl_fail(ncclInvalidArgument, "%s: rank %d: the communicator was finalized already", f, comm->rank);
  struct hfr_nccl_job *job = r ? NULL : hfr_nccl_job_new(comm, NULL, NULL);
  if (!job) {
    hfr_nccl_leave(comm);
    return r ? r : ncclSystemError;
  }
  job->run = run_finalize;
  return hfr_nccl_job_submit(f, job);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommFinalize, (ncclComm_t comm)) { return hfr_nccl_latch(finalize(comm)); }

HFR_NCCL_DEFINE(ncclResult_t, ncclCommDestroy, (ncclComm_t comm)) {
  static const char f[] = "ncclCommDestroy";
  if (!comm) return ncclSuccess;
  hfr_nccl_group_forget(comm);
  HFR_NCCL_TRY(hfr_nccl_latch(hfr_nccl_enter(comm, f, HFR_NCCL_HANDLE)));
  pthread_mutex_lock(&comm->lock);
  int busy = comm->jobs;
  pthread_mutex_unlock(&comm->lock);
  if (!busy) return hfr_nccl_latch(hfr_nccl_retire(comm, f));
  hfr_nccl_leave(comm);
  return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidArgument,
                                      "%s: an earlier call on this communicator is still in progress; wait until "
                                      "ncclCommGetAsyncError no longer says so, or abort it",
                                      f));
}

/* Programs also end what is whole by an abort: that is no fault for the others, so nothing is said to them unless something runs.
 */
HFR_NCCL_DEFINE(ncclResult_t, ncclCommAbort, (ncclComm_t comm)) {
  static const char f[] = "ncclCommAbort";
  int pending = 0;
  if (!comm) return ncclSuccess;
  hfr_nccl_group_forget(comm);
  HFR_NCCL_TRY(hfr_nccl_latch(hfr_nccl_enter(comm, f, HFR_NCCL_HANDLE)));
  __atomic_store_n(&comm->cancel, 1, __ATOMIC_RELEASE);
  hfreduceComm_t core = atomic_load(&comm->core);
  if (core) {
    hfreduceCommPending(core, &pending);
    if (pending || atomic_load(&comm->calling)) hfreduceCommAbort(core);
  }
  return hfr_nccl_latch(hfr_nccl_retire(comm, f));
}

/* The operations of all ranks end; what was revoked can be split, shrunk and destroyed. */
static ncclResult_t revoke(ncclComm_t comm, int flags) {
  static const char f[] = "ncclCommRevoke";
  if (flags != NCCL_REVOKE_DEFAULT)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: revokeFlags are %#x; only 0 is known", f, (unsigned)flags);
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_HANDLE));
  ncclResult_t r = ncclSuccess;
  hfreduceComm_t core = atomic_load(&comm->core);
  if (!core)
    r = hfr_nccl_fail(ncclInvalidArgument, "%s: the communicator is not made yet; abort it instead", f);
  else if (atomic_exchange(&comm->revoked, 1))
    r = hfr_nccl_fail(ncclInvalidUsage, "%s: rank %d: the communicator was revoked already", f, comm->rank);
  else
    r = hfr_nccl_took(comm, hfreduceCommAbort(core));
  hfr_nccl_leave(comm);
  return r;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommRevoke, (ncclComm_t comm, int revokeFlags)) {
  return hfr_nccl_latch(revoke(comm, revokeFlags));
}

/* ---------------------------------------------------------------- suspending */

/* An idle communicator gives its memory back by itself (half a second after its last operation); there is nothing to do but to
   hold the program to its word. */
static ncclResult_t suspend(ncclComm_t comm, const char *f, int on) {
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_SETTLED));
  ncclResult_t r = ncclSuccess;
  if (atomic_exchange(&comm->suspended, on) == on)
    r = hfr_nccl_fail(ncclInvalidUsage, "%s: rank %d: the communicator is %s", f, comm->rank,
                      on ? "suspended already" : "not suspended");
  hfr_nccl_leave(comm);
  return r;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommSuspend, (ncclComm_t comm, int flags)) {
  static const char f[] = "ncclCommSuspend";
  if (flags != NCCL_SUSPEND_MEM)
    return hfr_nccl_latch(
        hfr_nccl_fail(ncclInvalidArgument, "%s: flags are %#x; only NCCL_SUSPEND_MEM is known", f, (unsigned)flags));
  return hfr_nccl_latch(suspend(comm, f, 1));
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommResume, (ncclComm_t comm)) { return hfr_nccl_latch(suspend(comm, "ncclCommResume", 0)); }

/* ---------------------------------------------------------------- asking */

HFR_NCCL_DEFINE(ncclResult_t, ncclCommGetAsyncError, (ncclComm_t comm, ncclResult_t *asyncError)) {
  static const char f[] = "ncclCommGetAsyncError";
  if (!asyncError) return hfr_nccl_fail(ncclInvalidArgument, "%s: asyncError is NULL", f);
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_HANDLE));
  *asyncError = hfr_nccl_state(comm);
  /* A revoked communicator is broken on purpose: it is well once it is quiet. */
  if (atomic_load(&comm->revoked) && *asyncError != ncclInProgress) *asyncError = ncclSuccess;
  hfr_nccl_leave(comm);
  return ncclSuccess;
}

static ncclResult_t ask(ncclComm_t comm, const char *f, const char *what, int *out) {
  if (!out) return hfr_nccl_fail(ncclInvalidArgument, "%s: %s is NULL", f, what);
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_SETTLED));
  return ncclSuccess;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommCount, (const ncclComm_t comm, int *count)) {
  HFR_NCCL_TRY(ask(comm, "ncclCommCount", "count", count));
  *count = comm->nranks;
  hfr_nccl_leave(comm);
  return ncclSuccess;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommUserRank, (const ncclComm_t comm, int *rank)) {
  HFR_NCCL_TRY(ask(comm, "ncclCommUserRank", "rank", rank));
  *rank = comm->rank;
  hfr_nccl_leave(comm);
  return ncclSuccess;
}

static int device_of(ncclComm_t comm) {
  int device = -1;
  hfreduceCommCuDevice(atomic_load(&comm->core), &device);
  return device >= 0 ? device : comm->device;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommCuDevice, (const ncclComm_t comm, int *device)) {
  HFR_NCCL_TRY(ask(comm, "ncclCommCuDevice", "device", device));
  *device = device_of(comm);
  hfr_nccl_leave(comm);
  return ncclSuccess;
}

/* What is staged lies in host memory, so no device memory is counted. */
HFR_NCCL_DEFINE(ncclResult_t, ncclCommMemStats, (ncclComm_t comm, ncclCommMemStat_t stat, uint64_t *value)) {
  static const char f[] = "ncclCommMemStats";
  if (!value) return hfr_nccl_fail(ncclInvalidArgument, "%s: value is NULL", f);
  if ((int)stat < ncclStatGpuMemSuspend || (int)stat > ncclStatGpuMemTotal)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: stat is %d; it must be 0 to %d", f, (int)stat, ncclStatGpuMemTotal);
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_SETTLED));
  *value = stat == ncclStatGpuMemSuspended ? (uint64_t)atomic_load(&comm->suspended) : 0;
  hfr_nccl_leave(comm);
  return ncclSuccess;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommQueryProperties, (ncclComm_t comm, ncclCommProperties_t *props)) {
  static const char f[] = "ncclCommQueryProperties";
  const size_t head = offsetof(ncclCommProperties_t, rank);
  hfreduceCommInfo_t info;
  if (!props) return hfr_nccl_fail(ncclInvalidArgument, "%s: props is NULL", f);
  if (props->magic != NCCL_API_MAGIC || props->size < head)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: props was not initialised; assign NCCL_COMM_PROPERTIES_INITIALIZER to it", f);
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_SETTLED));
  ncclResult_t r = hfr_nccl_took(comm, hfreduceCommGetInfo(atomic_load(&comm->core), &info));
  ncclCommProperties_t all = {.rank = comm->rank,
                              .nRanks = comm->nranks,
                              .cudaDev = device_of(comm),
                              .nvmlDev = device_of(comm),
                              .nLsaTeams = comm->nranks,
                              .commHash = info.id};
  hfr_nccl_leave(comm);
  if (!r) memcpy((char *)props + head, (char *)&all + head, (props->size < sizeof all ? props->size : sizeof all) - head);
  return r;
}

/* ---------------------------------------------------------------- teams: pure arithmetic */

/* No rank reaches another's memory by loads and stores, so each is a team of its own there. */
static ncclTeam_t team(ncclComm_t comm, const char *f, int alone) {
  ncclTeam_t t = {0, 0, 0};
  if (hfr_nccl_enter(comm, f, HFR_NCCL_SETTLED)) return t;
  t = alone ? (ncclTeam_t){1, 0, 1} : (ncclTeam_t){comm->nranks, comm->rank, 1};
  hfr_nccl_leave(comm);
  return t;
}

HFR_NCCL_DEFINE(ncclTeam_t, ncclTeamWorld, (ncclComm_t comm)) { return team(comm, "ncclTeamWorld", 0); }
HFR_NCCL_DEFINE(ncclTeam_t, ncclTeamRail, (ncclComm_t comm)) { return team(comm, "ncclTeamRail", 0); }
HFR_NCCL_DEFINE(ncclTeam_t, ncclTeamLsa, (ncclComm_t comm)) { return team(comm, "ncclTeamLsa", 1); }
HFR_NCCL_DEFINE(ncclTeam_t, ncclTeamCft, (ncclComm_t comm, ncclCftTeamMode_t mode)) {
  (void)mode;
  return team(comm, "ncclTeamCft", 1);
}
HFR_NCCL_DEFINE(ncclTeam_t, ncclTeamCftMultimem, (ncclComm_t comm)) { return team(comm, "ncclTeamCftMultimem", 1); }

/* Where `rank` of `of` stands in a team in which this rank is `mine`; both are numbered along the world. */
static int rank_in(int mine, ncclTeam_t of, int rank) { return mine + (rank - of.rank) * of.stride; }

HFR_NCCL_DEFINE(int, ncclTeamRankToWorld, (ncclComm_t comm, ncclTeam_t team_, int rank)) {
  ncclTeam_t world = team(comm, "ncclTeamRankToWorld", 0);
  return world.nRanks ? rank_in(world.rank, team_, rank) : -1;
}

HFR_NCCL_DEFINE(int, ncclTeamRankToLsa, (ncclComm_t comm, ncclTeam_t team_, int rank)) {
  ncclTeam_t lsa = team(comm, "ncclTeamRankToLsa", 1);
  return lsa.nRanks ? rank_in(lsa.rank, team_, rank) : -1;
}
