/*
 * The table of communicators. Slots are never unmapped, so that a pointer can be judged before it is believed; a slot that was
 * freed is the last to be used again.
 */
#include "internal.h"

#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CHUNK 32
#define CHUNKS 4096

#define CLOSED 0x80000000u /* nobody may enter */
#define ORPHAN 0x40000000u /* who closed it has gone: the last to leave frees it */
#define COUNT 0x3fffffffu
#define PATIENCE_S 10 /* that who closes waits for those inside: an aborted operation ends in milliseconds */

static _Atomic(struct ncclComm *) chunk[CHUNKS];
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static struct ncclComm *free_first, **free_last = &free_first; /* under the lock */
static int nchunks;

static void put_free(struct ncclComm *c) {
  c->next_free = NULL;
  *free_last = c;
  free_last = &c->next_free;
}

static struct ncclComm *get_free(void) {
  pthread_mutex_lock(&table_lock);
  if (!free_first && nchunks < CHUNKS) {
    struct ncclComm *more = calloc(CHUNK, sizeof *more);
    for (int i = 0; more && i < CHUNK; i++) {
      pthread_mutex_init(&more[i].lock, NULL);
      atomic_store_explicit(&more[i].uses, CLOSED, memory_order_relaxed);
      put_free(&more[i]);
    }
    if (more) atomic_store_explicit(&chunk[nchunks++], more, memory_order_release); /* pairs with is_slot() */
  }
  struct ncclComm *c = free_first;
  if (c && !(free_first = c->next_free)) free_last = &free_first;
  pthread_mutex_unlock(&table_lock);
  return c;
}

static int is_slot(const struct ncclComm *c) {
  for (int i = 0; i < CHUNKS; i++) {
    const struct ncclComm *first = atomic_load_explicit(&chunk[i], memory_order_acquire);
    if (!first) return 0;
    uintptr_t offset = (uintptr_t)c - (uintptr_t)first;
    if ((uintptr_t)c >= (uintptr_t)first && offset < CHUNK * sizeof *c) return offset % sizeof *c == 0;
  }
  return 0;
}

/* A slot's contents but its lock and its uses. */
static void clear(struct ncclComm *c) {
  atomic_store(&c->core, NULL);
  c->rank = c->nranks = c->device = -1;
  memset(&c->config, 0, sizeof c->config);
  c->name[0] = c->why[0] = 0;
  c->cancel = c->jobs = c->grow_open = 0;
  atomic_store(&c->revoked, 0);
  atomic_store(&c->finalized, 0);
  atomic_store(&c->suspended, 0);
  atomic_store(&c->calling, 0);
  c->failed = ncclSuccess;
  c->flight = NULL;
  c->regions = NULL;
}

ncclComm_t hfr_nccl_new(int rank, int nranks, const ncclConfig_t *config) {
  struct ncclComm *c = get_free();
  if (!c) return NULL;
  clear(c);
  c->rank = rank;
  c->nranks = nranks;
  c->config = *config;
  c->config.netName = NULL;
  if (config->commName) {
    strncpy(c->name, config->commName, sizeof c->name - 1);
    c->config.commName = c->name;
  }
  atomic_store_explicit(&c->uses, 1, memory_order_release); /* pairs with enter(): the slot is whole */
  return c;
}

/* 1: entered. */
static int enter(struct ncclComm *c) {
  uint32_t was = atomic_load_explicit(&c->uses, memory_order_relaxed);
  do {
    if (was & CLOSED) return 0;
  } while (!atomic_compare_exchange_weak_explicit(&c->uses, &was, was + 1, memory_order_acquire, memory_order_relaxed));
  return 1;
}

void hfr_nccl_enter_again(ncclComm_t comm) { atomic_fetch_add_explicit(&comm->uses, 1, memory_order_relaxed); }

/* Nobody is inside, nobody can come. */
static void tear_down(struct ncclComm *c) {
  hfreduceComm_t core = atomic_load(&c->core);
  if (core) hfreduceCommDestroy(core);
  hfr_nccl_land(c);
  hfr_nccl_forget_regions(c);
  atomic_store(&c->core, NULL);
  pthread_mutex_lock(&table_lock);
  atomic_store(&c->uses, CLOSED);
  put_free(c);
  pthread_mutex_unlock(&table_lock);
}

void hfr_nccl_leave(ncclComm_t comm) {
  uint32_t now = atomic_fetch_sub_explicit(&comm->uses, 1, memory_order_acq_rel) - 1;
  if (now == (CLOSED | ORPHAN))
    tear_down(comm);
  else if (now & CLOSED)
    syscall(SYS_futex, &comm->uses, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

ncclResult_t hfr_nccl_retire(ncclComm_t comm, const char *f) {
  struct timespec now, end;
  if (atomic_fetch_or(&comm->uses, CLOSED) & CLOSED) {
    hfr_nccl_leave(comm);
    return f ? hfr_nccl_fail(ncclInvalidArgument, "%s: comm is being ended by another thread", f) : ncclInvalidArgument;
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  end.tv_sec += PATIENCE_S;
  for (uint32_t uses; ((uses = atomic_load(&comm->uses)) & COUNT) > 1;) {
    struct timespec nap = {0, 50000000};
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec > end.tv_sec || (now.tv_sec == end.tv_sec && now.tv_nsec > end.tv_nsec)) {
      atomic_fetch_or(&comm->uses, ORPHAN);
      hfr_nccl_leave(comm);
      return ncclSuccess;
    }
    syscall(SYS_futex, &comm->uses, FUTEX_WAIT_PRIVATE, uses, &nap, NULL, 0);
  }
  tear_down(comm);
  return ncclSuccess;
}

/* Under comm->lock. */
static ncclResult_t state_locked(ncclComm_t comm) {
  if (hfr_nccl_flying(comm) || comm->jobs) return ncclInProgress;
  if (comm->failed) return comm->failed;
  hfreduceComm_t core = atomic_load(&comm->core);
  if (!core) return ncclInProgress; /* about to be made by a thread of the caller's */
  hfreduceResult_t error = hfreduceSuccess;
  hfreduceCommGetAsyncError(core, &error);
  if (!error) return ncclSuccess;
  hfreduceErrorInfo_t info;
  hfreduceGetErrorInfo(core, &info);
  return hfr_nccl_code(error, info.peer == comm->rank);
}

ncclResult_t hfr_nccl_state(ncclComm_t comm) {
  pthread_mutex_lock(&comm->lock);
  ncclResult_t state = state_locked(comm);
  pthread_mutex_unlock(&comm->lock);
  return state;
}

static ncclResult_t check_working(ncclComm_t comm, const char *f) {
  if (atomic_load_explicit(&comm->revoked, memory_order_relaxed))
    return hfr_nccl_fail(ncclInvalidUsage, "%s: rank %d: the communicator was revoked; shrink, split or destroy it", f,
                         comm->rank);
  if (atomic_load_explicit(&comm->finalized, memory_order_relaxed))
    return hfr_nccl_fail(ncclInvalidArgument, "%s: rank %d: the communicator was finalized; only destroy it", f, comm->rank);
  if (atomic_load_explicit(&comm->suspended, memory_order_relaxed))
    return hfr_nccl_fail(ncclInvalidUsage, "%s: rank %d: the communicator is suspended; call ncclCommResume first", f,
                         comm->rank);
  return ncclSuccess;
}

/* What a blocking communicator is at is found by the call itself, with a better text. */
static ncclResult_t check_settled(ncclComm_t comm, const char *f, enum hfr_nccl_need need) {
  if (comm->config.blocking && atomic_load_explicit(&comm->core, memory_order_acquire) && need != HFR_NCCL_SETTLED)
    return check_working(comm, f);
  ncclResult_t state = hfr_nccl_state(comm);
  if (state == ncclInProgress)
    return hfr_nccl_fail(ncclInvalidArgument,
                         "%s: an earlier call on this communicator is still in progress; wait until "
                         "ncclCommGetAsyncError no longer says so",
                         f);
  if (!atomic_load(&comm->core) || (need == HFR_NCCL_WORKING && comm->failed)) return hfr_nccl_retell(state, comm->why);
  return need == HFR_NCCL_WORKING ? check_working(comm, f) : ncclSuccess;
}

ncclResult_t hfr_nccl_enter(ncclComm_t comm, const char *f, enum hfr_nccl_need need) {
  if (!comm) return hfr_nccl_fail(ncclInvalidArgument, "%s: comm is NULL", f);
  if (!is_slot(comm) || !enter(comm))
    return hfr_nccl_fail(ncclInvalidArgument, "%s: comm is %p, which is not a communicator, or was destroyed or aborted", f,
                         (void *)comm);
  if (need == HFR_NCCL_HANDLE) return ncclSuccess;
  ncclResult_t r = check_settled(comm, f, need);
  if (r) hfr_nccl_leave(comm);
  return r;
}
