/* Faults, on the ranks of `hfreduce run`. argv[1]: "kill": the last rank dies by SIGKILL in the middle; "kill first": rank 0; the
 * others hear of it, shrink and go on. "abort": a thread of rank 0 aborts what all hang in. "leave": ranks end what is whole by
 * aborts, at different times, and nobody is disturbed. */
#include "rank.h"

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static ncclComm_t comm;

static ncclResult_t sum_over(ncclComm_t c, float want) {
  float x = 1, y = 0;
  ncclResult_t r = ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, c, NULL);
  if (!r) CHECK(y == want, "sum %g, not %g", y, want);
  return r;
}

/* In a child, so that `hfreduce run` sees no rank that failed: the rank is the child, its parent only waits. */
static int die_in_private(int victim) {
  if (rank != victim) return 0;
  pid_t child = fork();
  if (child > 0) {
    int status;
    while (1) {
      if (waitpid(child, &status, 0) == child) break;
    }
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %x", status);
    exit(check_done());
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  return 1;
}

static void survive(int victim, int flags) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  ncclComm_t rest = NULL;
  ncclResult_t r = ncclSuccess, state;
  die_in_private(victim);
  comm = join_with(&config);
  OK(sum_over(comm, (float)nranks));
  if (rank == victim) {
    nap(0.2);
    kill(getpid(), SIGKILL);
  }
  double start = seconds();
  while (!r && seconds() < start + 10) r = sum_over(comm, (float)nranks);
  CHECK(r == ncclRemoteError, "a death gave %d: %s", (int)r, ncclGetLastError(comm));
  CHECK(seconds() - start < 3, "it took %.3f s to hear of it", seconds() - start);
  OK(ncclCommGetAsyncError(comm, &state));
  CHECK(state == ncclRemoteError, "state %d", (int)state);
  char name[40];
  snprintf(name, sizeof name, "rank %d", victim);
  CHECK(flags || strstr(ncclGetLastError(comm), name), "who: %s",
        ncclGetLastError(comm)); /* with flags, maybe a survivor's abort */
  start = seconds();
  OK(ncclCommShrink(comm, &victim, 1, &rest, NULL, flags));
  CHECK(seconds() - start < 3, "shrinking took %.3f s", seconds() - start);
  for (int i = 0; i < 100 && rest; i++) OK(sum_over(rest, (float)(nranks - 1)));
  OK(ncclCommAbort(comm));
  OK(ncclCommDestroy(rest));
}

static void *abort_it(void *arg) {
  (void)arg;
  nap(0.3);
  OK(ncclCommAbort(comm));
  return NULL;
}

/* Rank 0 waits in a collective that the others do not call; its watchdog ends that; the others hear of it in theirs. */
static void abort_from_outside(void) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  ncclResult_t r, state;
  pthread_t watchdog;
  float x = 1, y;
  comm = join_with(&config);
  double start = seconds();
  if (rank == 0) {
    pthread_create(&watchdog, NULL, abort_it, NULL);
    r = ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, comm, NULL);
    CHECK(r == ncclInvalidUsage && strstr(ncclGetLastError(NULL), "aborted"), "%d: %s", (int)r, ncclGetLastError(NULL));
    CHECK(seconds() - start < 2, "it took %.3f s", seconds() - start);
    pthread_join(watchdog, NULL);
    GIVES(ncclInvalidArgument, ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, comm, NULL));
    return;
  }
  for (double until = seconds() + 5; seconds() < until; nap(0.01)) {
    OK(ncclCommGetAsyncError(comm, &state));
    if (state) break;
  }
  CHECK(state == ncclRemoteError, "state %d", (int)state);
  CHECK(strstr(ncclGetLastError(comm), "aborted by rank 0") != NULL, "%s", ncclGetLastError(comm));
  GIVES(ncclRemoteError, ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, comm, NULL));
  OK(ncclCommAbort(comm));
}

/* A non-blocking call that never ends, aborted. */
static void abort_in_flight(void) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  ncclResult_t state = ncclSuccess;
  float x = 1, y;
  config.blocking = 0;
  comm = join_with(&config);
  if (rank == 0) {
    GIVES(ncclInProgress, ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, comm, NULL));
    nap(0.2);
    OK(ncclCommGetAsyncError(comm, &state));
    CHECK(state == ncclInProgress, "state %d", (int)state);
    double start = seconds();
    OK(ncclCommAbort(comm));
    CHECK(seconds() - start < 2, "it took %.3f s", seconds() - start);
    return;
  }
  for (double until = seconds() + 5; !state && seconds() < until; nap(0.01)) OK(ncclCommGetAsyncError(comm, &state));
  CHECK(state == ncclRemoteError, "state %d", (int)state);
  OK(ncclCommAbort(comm));
}

static void leave(void) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  float *x = malloc(400000), *y = malloc(400000);
  comm = join_with(&config);
  for (int i = 0; i < 100000; i++) x[i] = (float)rank;
  for (int i = 0; i < 20; i++) {
    ncclComm_t copy = NULL;
    OK(ncclCommSplit(comm, 0, rank, &copy, NULL));
    OK(ncclAllReduce(x, y, 100000, ncclFloat, ncclSum, copy, NULL)); /* some ranks are done before others */
    OK(ncclCommAbort(copy));
  }
  OK(ncclCommAbort(comm));
  free(x);
  free(y);
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  find_rank();
  if (!strcmp(what, "kill")) survive(nranks - 1, NCCL_SHRINK_DEFAULT);
  if (!strcmp(what, "kill-first")) survive(0, NCCL_SHRINK_ABORT);
  if (!strcmp(what, "abort")) abort_from_outside();
  if (!strcmp(what, "flight")) abort_in_flight();
  if (!strcmp(what, "leave")) leave();
  CHECK(check_passed > 0, "no such case: %s", what);
  return check_done();
}
