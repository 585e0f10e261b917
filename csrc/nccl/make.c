/* How communicators come to be: joined, split, shrunk, grown. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---------------------------------------------------------------- unique ids */

_Static_assert(sizeof(ncclUniqueId) == sizeof(hfreduceUniqueId), "a unique id is 128 bytes on both sides");

/* The id that every rank can make by itself: NCCL_COMM_ID is rank 0's address. The n-th one of each rank is the same. */
static hfreduceResult_t id_from_environment(hfreduceUniqueId *id, const char *address) {
  static _Atomic uint64_t made;
  return hfreduceUniqueIdFromAddress(id, address, getenv("HFREDUCE_SECRET"), atomic_fetch_add(&made, 1));
}

/* An id that nobody else can make, with its rendezvous in this process. */
static ncclResult_t fresh_id(ncclUniqueId *out) {
  hfreduceUniqueId id;
  hfreduceResult_t r = hfreduceGetUniqueId(&id);
  if (r) {
    hfr_nccl_took(NULL, r);
    hfr_nccl_log(hfreduceLogInfo, "only ranks of this machine can join: %s", hfr_nccl_text());
    r = hfreduceGetUniqueIdLocal(&id);
  }
  if (!r) memcpy(out, &id, sizeof id);
  return hfr_nccl_took(NULL, r);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclGetUniqueId, (ncclUniqueId * uniqueId)) {
  hfreduceUniqueId id;
  const char *address = getenv("NCCL_COMM_ID");
  if (!uniqueId) return hfr_nccl_fail(ncclInvalidArgument, "ncclGetUniqueId: uniqueId is NULL");
  hfr_nccl_look_around();
  if (!address || !*address) return fresh_id(uniqueId);
  HFR_NCCL_TRY(hfr_nccl_took(NULL, id_from_environment(&id, address)));
  memcpy(uniqueId, &id, sizeof id);
  return ncclSuccess;
}

/* ---------------------------------------------------------------- joining */

static ncclResult_t run_init(struct hfr_nccl_job *job, hfreduceComm_t *made) {
  hfreduceConfig_t config;
  hfr_nccl_core_config(job->child, &config);
  return hfr_nccl_took(NULL, hfreduceCommInitRankConfig(made, job->nranks, job->id, job->rank, &config));
}

static ncclResult_t init_rank(const char *f, ncclComm_t *comm, int nranks, const ncclUniqueId *id, int rank, int device,
                              const ncclConfig_t *given) {
  ncclConfig_t config;
  if (!comm) return hfr_nccl_fail(ncclInvalidArgument, "%s: comm is NULL", f);
  *comm = NULL;
  if (nranks < 1) return hfr_nccl_fail(ncclInvalidArgument, "%s: nranks is %d; it must be at least 1", f, nranks);
  if (rank < 0 || rank >= nranks)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: rank is %d; with %d ranks it must be 0 to %d", f, rank, nranks, nranks - 1);
  HFR_NCCL_TRY(hfr_nccl_read_config(f, given, NULL, &config));
  hfr_nccl_look_around();
  ncclComm_t child = hfr_nccl_new(rank, nranks, &config);
  if (!child) return hfr_nccl_fail(ncclSystemError, "%s: out of memory for a communicator", f);
  child->device = device;
  if (device < 0) hfreduceDeviceGetCurrent(&child->device); /* here: the job may run in a thread that has none */
  struct hfr_nccl_job *job = hfr_nccl_job_new(NULL, child, comm);
  if (!job) {
    hfr_nccl_retire(child, f);
    return ncclSystemError;
  }
  job->run = run_init;
  job->nranks = nranks;
  job->rank = rank;
  memcpy(&job->id, id, sizeof job->id);
  return hfr_nccl_job_submit(f, job);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommInitRankConfig,
                (ncclComm_t * comm, int nranks, ncclUniqueId commId, int rank, ncclConfig_t *config)) {
  return hfr_nccl_latch(init_rank("ncclCommInitRankConfig", comm, nranks, &commId, rank, -1, config));
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommInitRank, (ncclComm_t * comm, int nranks, ncclUniqueId commId, int rank)) {
  return hfr_nccl_latch(init_rank("ncclCommInitRank", comm, nranks, &commId, rank, -1, NULL));
}

/* All ranks meet at the first id: a rendezvous here is one small message a rank, and needs no more. */
HFR_NCCL_DEFINE(ncclResult_t, ncclCommInitRankScalable,
                (ncclComm_t * newcomm, int nranks, int myrank, int nId, ncclUniqueId *commIds, ncclConfig_t *config)) {
  static const char f[] = "ncclCommInitRankScalable";
  if (!commIds) return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidArgument, "%s: commIds is NULL", f));
  if (nId < 1 || (nranks >= 1 && nId > nranks))
    return hfr_nccl_latch(
        hfr_nccl_fail(ncclInvalidArgument, "%s: nId is %d; with %d ranks it must be 1 to %d", f, nId, nranks, nranks));
  return hfr_nccl_latch(init_rank(f, newcomm, nranks, commIds, myrank, -1, config));
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommInitAll, (ncclComm_t * comm, int ndev, const int *devlist)) {
  static const char f[] = "ncclCommInitAll";
  hfreduceUniqueId id;
  ncclUniqueId same;
  ncclResult_t r = ncclSuccess;
  if (!comm) return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidArgument, "%s: comm is NULL", f));
  if (ndev < 1) return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidArgument, "%s: ndev is %d; it must be at least 1", f, ndev));
  for (int i = 0; devlist && i < ndev; i++)
    if (devlist[i] < 0) return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidArgument, "%s: devlist[%d] is %d", f, i, devlist[i]));
  HFR_NCCL_TRY(hfr_nccl_latch(hfr_nccl_took(NULL, hfreduceGetUniqueIdLocal(&id))));
  memcpy(&same, &id, sizeof same);
  pncclGroupStart();
  for (int i = 0; i < ndev && !r; i++) r = hfr_nccl_latch(init_rank(f, &comm[i], ndev, &same, i, devlist ? devlist[i] : i, NULL));
  return pncclGroupEnd();
}

/* ---------------------------------------------------------------- from another communicator */

/* A job on comm that makes *newcomm (`color` >= 0) or nothing. The caller has entered comm; on failure it has left. */
static struct hfr_nccl_job *child_job(const char *f, ncclComm_t comm, int color, ncclComm_t *newcomm, const ncclConfig_t *given,
                                      ncclResult_t *result) {
  ncclConfig_t config;
  ncclComm_t child = NULL;
  struct hfr_nccl_job *job = NULL;
  *result = hfr_nccl_read_config(f, given, comm, &config);
  if (!*result && color >= 0 && !(child = hfr_nccl_new(-1, -1, &config)))
    *result = hfr_nccl_fail(ncclSystemError, "%s: out of memory for a communicator", f);
  if (!*result && !(job = hfr_nccl_job_new(comm, child, newcomm))) *result = ncclSystemError;
  if (*result) {
    if (child) hfr_nccl_retire(child, f);
    hfr_nccl_leave(comm);
  } else if (child) {
    child->device = comm->device;
  }
  return job;
}

/* A revoked communicator carries nothing any more, so its ranks first make a sound one of themselves. */
static ncclResult_t run_split(struct hfr_nccl_job *job, hfreduceComm_t *made) {
  hfreduceConfig_t config, plain;
  hfreduceComm_t core = atomic_load(&job->parent->core), sound = NULL;
  hfr_nccl_core_config(job->child ? job->child : job->parent, &config);
  if (!atomic_load(&job->parent->revoked))
    return hfr_nccl_took(job->parent, hfreduceCommSplit(core, job->color, job->key, made, &config));
  plain = config;
  plain.name = NULL;
  HFR_NCCL_TRY(hfr_nccl_took(NULL, hfreduceCommShrink(core, NULL, 0, &sound, &plain, hfreduceShrinkDefault)));
  ncclResult_t r = hfr_nccl_took(NULL, hfreduceCommSplit(sound, job->color, job->key, made, &config));
  hfreduceCommDestroy(sound);
  return r;
}

static ncclResult_t check_parent(const char *f, ncclComm_t comm) {
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_SETTLED));
  ncclResult_t r = ncclSuccess;
  if (atomic_load(&comm->finalized))
    r = hfr_nccl_fail(ncclInvalidArgument, "%s: rank %d: the communicator was finalized; only destroy it", f, comm->rank);
  else if (atomic_load(&comm->suspended))
    r = hfr_nccl_fail(ncclInvalidUsage, "%s: rank %d: the communicator is suspended; call ncclCommResume first", f, comm->rank);
  if (r) hfr_nccl_leave(comm);
  return r;
}

static ncclResult_t split(ncclComm_t comm, int color, int key, ncclComm_t *newcomm, const ncclConfig_t *config) {
  static const char f[] = "ncclCommSplit";
  ncclResult_t r;
  if (!newcomm) return hfr_nccl_fail(ncclInvalidArgument, "%s: newcomm is NULL", f);
  *newcomm = NULL;
  if (color < NCCL_SPLIT_NOCOLOR)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: color is %d; it must be 0 or more, or NCCL_SPLIT_NOCOLOR", f, color);
  HFR_NCCL_TRY(check_parent(f, comm));
  struct hfr_nccl_job *job = child_job(f, comm, color, newcomm, config, &r);
  if (!job) return r;
  job->run = run_split;
  job->color = color;
  job->key = key;
  return hfr_nccl_job_submit(f, job);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommSplit, (ncclComm_t comm, int color, int key, ncclComm_t *newcomm, ncclConfig_t *config)) {
  return hfr_nccl_latch(split(comm, color, key, newcomm, config));
}

static ncclResult_t run_shrink(struct hfr_nccl_job *job, hfreduceComm_t *made) {
  hfreduceConfig_t config;
  hfr_nccl_core_config(job->child, &config);
  int flags = job->flags & NCCL_SHRINK_ABORT ? hfreduceShrinkAbort : hfreduceShrinkDefault;
  hfreduceComm_t core = atomic_load(&job->parent->core);
  return hfr_nccl_took(NULL, hfreduceCommShrink(core, job->exclude, job->nexclude, made, &config, flags));
}

/* The ranks of a list, kept until the job is done. */
static int *copy_ranks(const char *f, const int *list, int count) {
  int *copy = malloc(((size_t)count + 1) * sizeof *copy);
  if (!copy) hfr_nccl_fail(ncclSystemError, "%s: out of memory for a list of %d ranks", f, count);
  if (copy && count) memcpy(copy, list, (size_t)count * sizeof *copy);
  return copy;
}

static ncclResult_t check_excluded(const char *f, ncclComm_t comm, const int *list, int count) {
  for (int i = 0; i < count && atomic_load(&comm->core); i++) {
    if (list[i] < 0 || list[i] >= comm->nranks)
      return hfr_nccl_fail(ncclInvalidArgument, "%s: excludeRanksList[%d] is %d; with %d ranks it must be 0 to %d", f, i, list[i],
                           comm->nranks, comm->nranks - 1);
    if (list[i] == comm->rank)
      return hfr_nccl_fail(ncclInvalidArgument, "%s: excludeRanksList[%d] is this rank, %d, which would not call then", f, i,
                           comm->rank);
  }
  return ncclSuccess;
}

/* What is under way on comm ends. A blocking call of another thread returns to it by itself. */
static void end_operations(ncclComm_t comm) {
  hfreduceComm_t core = atomic_load(&comm->core);
  int pending = 1;
  if (!core || hfreduceCommAbort(core)) return;
  while (!hfreduceCommPending(core, &pending) && pending) {
    struct timespec nap = {0, 1000000};
    nanosleep(&nap, NULL);
  }
  hfr_nccl_state(comm); /* the flights have landed */
}

static ncclResult_t shrink(ncclComm_t comm, const int *list, int count, ncclComm_t *newcomm, const ncclConfig_t *config,
                           int flags) {
  static const char f[] = "ncclCommShrink";
  ncclResult_t r;
  if (!newcomm) return hfr_nccl_fail(ncclInvalidArgument, "%s: newcomm is NULL", f);
  *newcomm = NULL;
  if (flags & ~NCCL_SHRINK_ABORT)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: shrinkFlags are %#x; only NCCL_SHRINK_ABORT is known", f, (unsigned)flags);
  if (count < 0 || (count && !list))
    return hfr_nccl_fail(ncclInvalidArgument, "%s: excludeRanksList is %p, excludeRanksCount %d", f, (const void *)list, count);
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_HANDLE));
  r = check_excluded(f, comm, list, count);
  if (!r && flags & NCCL_SHRINK_ABORT) end_operations(comm);
  hfr_nccl_leave(comm);
  HFR_NCCL_TRY(r);
  int *kept = copy_ranks(f, list, count);
  if (!kept) return ncclSystemError;
  struct hfr_nccl_job *job = NULL;
  r = check_parent(f, comm);
  if (!r) job = child_job(f, comm, 0, newcomm, config, &r);
  if (!job) {
    free(kept);
    return r;
  }
  job->run = run_shrink;
  job->flags = flags;
  job->exclude = kept;
  job->nexclude = count;
  return hfr_nccl_job_submit(f, job);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommShrink,
                (ncclComm_t comm, int *excludeRanksList, int excludeRanksCount, ncclComm_t *newcomm, ncclConfig_t *config,
                 int shrinkFlags)) {
  return hfr_nccl_latch(shrink(comm, excludeRanksList, excludeRanksCount, newcomm, config, shrinkFlags));
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommGetUniqueId, (ncclComm_t comm, ncclUniqueId *uniqueId)) {
  static const char f[] = "ncclCommGetUniqueId";
  if (!uniqueId) return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidArgument, "%s: uniqueId is NULL", f));
  HFR_NCCL_TRY(hfr_nccl_latch(hfr_nccl_enter(comm, f, HFR_NCCL_WORKING)));
  ncclResult_t r = ncclSuccess;
  pthread_mutex_lock(&comm->lock);
  int open = comm->grow_open;
  pthread_mutex_unlock(&comm->lock);
  if (open)
    r = hfr_nccl_fail(ncclInvalidUsage, "%s: rank %d: the id that it gave before was not used by ncclCommGrow yet", f,
                      comm->rank);
  if (!r) r = fresh_id(uniqueId); /* only this rank makes one: NCCL_COMM_ID's would be counted on all */
  if (!r) {
    pthread_mutex_lock(&comm->lock);
    comm->grow_open = 1;
    comm->grow_id = *uniqueId;
    pthread_mutex_unlock(&comm->lock);
  }
  hfr_nccl_leave(comm);
  return hfr_nccl_latch(r);
}

/* What each rank of the old communicator knows of the id; the one that has it tells the others. */
struct offer {
  int32_t has, nranks;
  hfreduceUniqueId id;
};

/* The old ranks agree on the id, which one of them has. */
static ncclResult_t find_id(struct hfr_nccl_job *job, struct offer *all) {
  struct offer mine = {.has = job->flags, .nranks = job->nranks, .id = job->id};
  int found = -1;
  HFR_NCCL_TRY(hfr_nccl_took(job->parent,
                             hfreduceAllGather(&mine, all, sizeof mine, hfreduceUint8, atomic_load(&job->parent->core), NULL)));
  for (int i = 0; i < job->parent->nranks; i++) {
    if (all[i].nranks != job->nranks)
      return hfr_nccl_fail(ncclInvalidArgument,
                           "ncclCommGrow: rank %d grows to %d ranks, rank %d to %d; give all the same nRanks", job->rank,
                           job->nranks, i, all[i].nranks);
    if (!all[i].has) continue;
    if (found >= 0 && memcmp(&all[i].id, &all[found].id, sizeof mine.id))
      return hfr_nccl_fail(ncclInvalidArgument, "ncclCommGrow: ranks %d and %d give different unique ids", found, i);
    found = i;
  }
  if (found < 0)
    return hfr_nccl_fail(ncclInvalidArgument,
                         "ncclCommGrow: no rank gives the unique id; the one that called ncclCommGetUniqueId passes it");
  job->id = all[found].id;
  return ncclSuccess;
}

static ncclResult_t run_grow(struct hfr_nccl_job *job, hfreduceComm_t *made) {
  if (job->parent) {
    struct offer *all = calloc((size_t)job->parent->nranks, sizeof *all);
    if (!all) return hfr_nccl_fail(ncclSystemError, "ncclCommGrow: out of memory for %d ranks", job->parent->nranks);
    ncclResult_t r = find_id(job, all);
    free(all);
    HFR_NCCL_TRY(r);
  }
  HFR_NCCL_TRY(run_init(job, made));
  if (job->parent) {
    pthread_mutex_lock(&job->parent->lock);
    job->parent->grow_open = 0;
    pthread_mutex_unlock(&job->parent->lock);
  }
  return ncclSuccess;
}

static ncclResult_t check_grow(const char *f, ncclComm_t comm, int nranks, const ncclUniqueId *id, int rank,
                               ncclComm_t *newcomm) {
  if (!newcomm) return hfr_nccl_fail(ncclInvalidArgument, "%s: newcomm is NULL", f);
  *newcomm = NULL;
  if (!comm && !id) return hfr_nccl_fail(ncclInvalidArgument, "%s: uniqueId is NULL; a new rank needs it", f);
  if (!comm && (rank < 0 || rank >= nranks))
    return hfr_nccl_fail(ncclInvalidArgument, "%s: rank is %d; with %d ranks a new one must be below", f, rank, nranks);
  if (!comm) return ncclSuccess;
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_WORKING));
  ncclResult_t r = ncclSuccess;
  if (nranks <= comm->nranks)
    r = hfr_nccl_fail(ncclInvalidArgument, "%s: nRanks is %d; the communicator has %d already", f, nranks, comm->nranks);
  else if (rank != -1 && rank != comm->rank)
    r = hfr_nccl_fail(ncclInvalidArgument, "%s: rank is %d; a rank of the communicator keeps its own (%d): give -1", f, rank,
                      comm->rank);
  if (r) hfr_nccl_leave(comm);
  return r;
}

static ncclResult_t grow(ncclComm_t comm, int nranks, const ncclUniqueId *id, int rank, ncclComm_t *newcomm,
                         const ncclConfig_t *given) {
  static const char f[] = "ncclCommGrow";
  ncclConfig_t config;
  ncclResult_t r;
  struct hfr_nccl_job *job = NULL;
  HFR_NCCL_TRY(check_grow(f, comm, nranks, id, rank, newcomm));
  if (comm) {
    job = child_job(f, comm, 0, newcomm, given, &r);
  } else {
    ncclComm_t child = NULL;
    r = hfr_nccl_read_config(f, given, NULL, &config);
    if (!r && !(child = hfr_nccl_new(rank, nranks, &config)))
      r = hfr_nccl_fail(ncclSystemError, "%s: out of memory for a communicator", f);
    if (child && !(job = hfr_nccl_job_new(NULL, child, newcomm))) r = ncclSystemError, hfr_nccl_retire(child, f);
  }
  if (!job) return r;
  job->run = run_grow;
  job->nranks = nranks;
  job->rank = comm ? comm->rank : rank;
  job->flags = id != NULL;
  if (id) memcpy(&job->id, id, sizeof job->id);
  return hfr_nccl_job_submit(f, job);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommGrow,
                (ncclComm_t comm, int nRanks, const ncclUniqueId *uniqueId, int rank, ncclComm_t *newcomm,
                 ncclConfig_t *config)) {
  return hfr_nccl_latch(grow(comm, nRanks, uniqueId, rank, newcomm, config));
}
