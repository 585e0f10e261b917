/* A communicator's life, on the ranks of `hfreduce run`: split, shrunk, grown, revoked, suspended, finalized, called off.
 * argv[1] "nonblocking": all of it polled. */
#include "rank.h"

#include <nccl_device.h>

#include <pthread.h>

static int blocking = 1;

/* A call that a non-blocking communicator may take up in the background. */
static void done(ncclComm_t on, const char *what, ncclResult_t r) {
  if (!blocking && r == ncclInProgress) r = settle(on);
  CHECK(r == ncclSuccess, "%s gave %d: %s", what, (int)r, ncclGetLastError(on));
}

static void sum_over(ncclComm_t comm, const char *what) {
  int n = 0;
  float x = 1, y = 0;
  OK(ncclCommCount(comm, &n));
  done(comm, what, ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, comm, NULL));
  CHECK(y == (float)n, "%s: %g of %d", what, y, n);
}

static void end(ncclComm_t comm) {
  done(comm, "finalize", ncclCommFinalize(comm));
  FAILS(ncclInvalidArgument, "finalized", ncclAllReduce(&rank, &nranks, 1, ncclInt, ncclSum, comm, NULL));
  GIVES(ncclInvalidArgument, ncclCommFinalize(comm));
  OK(ncclCommDestroy(comm));
}

static void splits(ncclComm_t comm) {
  ncclComm_t half = NULL, reversed = NULL, none = (ncclComm_t)1;
  int me, n;
  FAILS(ncclInvalidArgument, "color is -7", ncclCommSplit(comm, -7, 0, &half, NULL));
  FAILS(ncclInvalidArgument, "newcomm is NULL", ncclCommSplit(comm, 0, 0, NULL, NULL));
  done(comm, "split", ncclCommSplit(comm, rank % 2, rank, &half, NULL));
  done(half, "split", ncclSuccess);
  OK(ncclCommCount(half, &n));
  OK(ncclCommUserRank(half, &me));
  CHECK(n == (nranks + 1 - rank % 2) / 2 && me == rank / 2, "half: %d of %d", me, n);
  sum_over(half, "half");
  done(comm, "split", ncclCommSplit(comm, 7, nranks - rank, &reversed, NULL));
  OK(ncclCommUserRank(reversed, &me));
  CHECK(me == nranks - 1 - rank, "reversed: %d", me);
  sum_over(reversed, "reversed");
  sum_over(comm, "the parent");
  done(comm, "split", ncclCommSplit(comm, rank ? 0 : NCCL_SPLIT_NOCOLOR, 0, &none, NULL));
  CHECK(!none == !rank, "no color, no communicator");
  if (none) sum_over(none, "all but one"), end(none);
  end(half);
  end(reversed);
}

static uint64_t hash_of(ncclComm_t comm, int expected_rank) {
  ncclCommProperties_t props = {.size = sizeof props, .magic = NCCL_API_MAGIC, .version = NCCL_VERSION_CODE};
  OK(ncclCommQueryProperties(comm, &props));
  CHECK(props.commHash && props.rank == expected_rank, "properties: rank %d, hash %llx", props.rank,
        (unsigned long long)props.commHash);
  return props.commHash;
}

static void properties(ncclComm_t comm) {
  ncclResult_t r;
  uint64_t hash[8], suspended = 7;
  hash[7] = hash_of(comm, rank);
  done(comm, "all_gather", ncclAllGather(&hash[7], hash, 1, ncclUint64, comm, NULL));
  for (int i = 0; i < nranks && i < 7; i++) CHECK(hash[i] == hash[0], "one hash on all ranks");
  FAILS(ncclInvalidArgument, "flags", ncclCommSuspend(comm, 0));
  FAILS(ncclInvalidUsage, "not suspended", ncclCommResume(comm));
  OK(ncclCommSuspend(comm, NCCL_SUSPEND_MEM));
  FAILS(ncclInvalidUsage, "is suspended", ncclAllReduce(&rank, &nranks, 1, ncclInt, ncclSum, comm, NULL));
  FAILS(ncclInvalidUsage, "suspended already", ncclCommSuspend(comm, NCCL_SUSPEND_MEM));
  OK(ncclCommMemStats(comm, ncclStatGpuMemSuspended, &suspended));
  CHECK(suspended == 1, "suspended: %d", (int)suspended);
  OK(ncclCommResume(comm));
  OK(ncclCommGetAsyncError(comm, &r));
  sum_over(comm, "resumed");
}

static void shrinks(ncclComm_t comm) {
  int last = nranks - 1, me;
  ncclComm_t rest = NULL, all = NULL, again = NULL;
  FAILS(ncclInvalidArgument, "this rank", ncclCommShrink(comm, &rank, 1, &rest, NULL, 0));
  FAILS(ncclInvalidArgument, "must be 0 to", ncclCommShrink(comm, &nranks, 1, &rest, NULL, 0));
  FAILS(ncclInvalidArgument, "shrinkFlags", ncclCommShrink(comm, &last, 1, &rest, NULL, 4));
  FAILS(ncclInvalidArgument, "excludeRanksList", ncclCommShrink(comm, NULL, 1, &rest, NULL, 0));
  CHECK(!rest, "no handle");
  if (rank != last) {
    done(comm, "shrink", ncclCommShrink(comm, &last, 1, &rest, NULL, NCCL_SHRINK_DEFAULT));
    OK(ncclCommUserRank(rest, &me));
    CHECK(me == rank, "%d", me);
    sum_over(rest, "the rest");
    end(rest);
  }
  sum_over(comm, "the parent, as before");
  done(comm, "shrink", ncclCommShrink(comm, NULL, 0, &all, NULL, NCCL_SHRINK_DEFAULT));
  sum_over(all, "none left out");
  done(comm, "shrink", ncclCommShrink(comm, NULL, 0, &again, NULL, NCCL_SHRINK_DEFAULT)); /* another one of the same ranks */
  sum_over(again, "none left out, again");
  CHECK(hash_of(all, rank) != hash_of(again, rank), "two communicators of the same ranks have names of their own");
  sum_over(all, "the first of the two");
  end(all);
  sum_over(again, "the second of the two");
  end(again);
}

static void grows(ncclComm_t comm) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  int last = nranks - 1, me;
  ncclComm_t some = NULL, grown = NULL;
  ncclUniqueId id;
  config.blocking = blocking;
  memset(&id, 0, sizeof id);
  FAILS(ncclInvalidArgument, "uniqueId is NULL", ncclCommGrow(NULL, 3, NULL, 2, &grown, &config));
  FAILS(ncclInvalidArgument, "rank is 3", ncclCommGrow(NULL, 3, &id, 3, &grown, &config));
  FAILS(ncclInvalidArgument, "has", ncclCommGrow(comm, nranks, NULL, -1, &grown, &config));
  /* the last rank plays the new one: the others know each other already */
  done(comm, "split", ncclCommSplit(comm, rank == last ? NCCL_SPLIT_NOCOLOR : 0, rank, &some, NULL));
  int root = nranks > 2 ? 1 : 0;
  if (rank == root) {
    ncclUniqueId other;
    OK(ncclCommGetUniqueId(some, &id));
    FAILS(ncclInvalidUsage, "was not used", ncclCommGetUniqueId(some, &other));
  }
  done(comm, "the id's way to the new rank", ncclBcast(&id, sizeof id, ncclChar, root, comm, NULL));
  if (rank == last)
    done(grown, "grow", ncclCommGrow(NULL, nranks, &id, rank, &grown, &config));
  else
    done(some, "grow", ncclCommGrow(some, nranks, rank == root ? &id : NULL, -1, &grown, NULL));
  if (!blocking) CHECK(settle(grown) == ncclSuccess, "grown: %s", ncclGetLastError(grown));
  OK(ncclCommUserRank(grown, &me));
  CHECK(me == rank, "rank %d is %d", rank, me);
  sum_over(grown, "grown");
  end(grown);
  if (some) {
    if (rank == root) OK(ncclCommGetUniqueId(some, &id)); /* the one before is used up */
    end(some);
  }
}

static void revokes(ncclComm_t comm) {
  ncclComm_t part = NULL, rest = NULL;
  int last = nranks - 1;
  FAILS(ncclInvalidArgument, "revokeFlags", ncclCommRevoke(comm, 1));
  OK(ncclCommRevoke(comm, 0));
  CHECK(settle(comm) == ncclSuccess, "revoked and quiet");
  FAILS(ncclInvalidUsage, "revoked", ncclAllReduce(&rank, &nranks, 1, ncclInt, ncclSum, comm, NULL));
  GIVES(ncclInvalidUsage, ncclCommFinalize(comm));
  FAILS(ncclInvalidUsage, "revoked already", ncclCommRevoke(comm, 0));
  done(comm, "split after revoke", ncclCommSplit(comm, rank % 2, 0, &part, NULL));
  sum_over(part, "a part of what was revoked");
  end(part);
  if (rank != last) {
    done(comm, "shrink after revoke", ncclCommShrink(comm, &last, 1, &rest, NULL, NCCL_SHRINK_DEFAULT));
    sum_over(rest, "the rest of what was revoked");
    end(rest);
  }
  OK(ncclCommDestroy(comm));
}

/* ---------------------------------------------------------------- alone, with a peer that never comes */

static void *abort_later(void *arg) {
  nap(0.2);
  OK(ncclCommAbort(__atomic_load_n((ncclComm_t *)arg, __ATOMIC_ACQUIRE)));
  return NULL;
}

static void called_off(void) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  ncclUniqueId id;
  ncclComm_t comm = NULL;
  ncclResult_t state;
  pthread_t thread;
  unsetenv("NCCL_COMM_ID");
  OK(ncclGetUniqueId(&id));
  config.blocking = 0;
  double start = seconds();
  GIVES(ncclInProgress, ncclCommInitRankConfig(&comm, 2, id, 0, &config));
  CHECK(comm != NULL, "a handle");
  nap(0.1);
  OK(ncclCommGetAsyncError(comm, &state));
  CHECK(state == ncclInProgress, "state %d", (int)state);
  FAILS(ncclInvalidArgument, "in progress", ncclAllReduce(&rank, &nranks, 1, ncclInt, ncclSum, comm, NULL));
  FAILS(ncclInvalidArgument, "in progress", ncclCommDestroy(comm));
  OK(ncclCommAbort(comm));
  CHECK(seconds() - start < 2, "an abort of what is not made took %.3f s", seconds() - start);
  FAILS(ncclInvalidArgument, "not a communicator", ncclCommGetAsyncError(comm, &state));
  /* and a blocking one, by another thread */
  OK(ncclGetUniqueId(&id));
  start = seconds();
  comm = NULL;
  pthread_create(&thread, NULL, abort_later, &comm);
  FAILS(ncclInvalidUsage, "gave up joining", ncclCommInitRank(&comm, 2, id, 0));
  CHECK(seconds() - start < 3, "it took %.3f s", seconds() - start);
  pthread_join(thread, NULL);
}

int main(int argc, char **argv) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  blocking = config.blocking = argc < 2 || strcmp(argv[1], "nonblocking") != 0;
  ncclComm_t comm = join_with(&config);
  splits(comm);
  properties(comm);
  shrinks(comm);
  grows(comm);
  revokes(comm);
  called_off();
  return check_done();
}
