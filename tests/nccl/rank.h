/* What the programs of NCCL's interface share: checks of result codes, and a communicator of the ranks of `hfreduce run`. */
#ifndef TESTS_NCCL_RANK_H_
#define TESTS_NCCL_RANK_H_
#include <nccl.h>

#include "../c/check.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* The call gives this result; says what it was instead, with NCCL's text. */
#define GIVES(expected, call)                                                                                                   \
  do {                                                                                                                          \
    ncclResult_t gives_ = (call);                                                                                               \
    CHECK(gives_ == (expected), "%s gave %d (%s), not %d: %s", #call, (int)gives_, ncclGetErrorString(gives_), (int)(expected), \
          gives_ ? ncclGetLastError(NULL) : "");                                                                                \
  } while (0)
#define OK(call) GIVES(ncclSuccess, call)
/* ... and its text has this in it. */
#define FAILS(expected, part, call)                                                                               \
  do {                                                                                                            \
    GIVES(expected, call);                                                                                        \
    CHECK(strstr(ncclGetLastError(NULL), part) != NULL, "%s: the text is \"%s\"", #call, ncclGetLastError(NULL)); \
  } while (0)

static int rank, nranks;

static inline double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void nap(double s) {
  struct timespec t = {(time_t)s, (long)((s - (double)(time_t)s) * 1e9)};
  nanosleep(&t, NULL);
}

/* Poll until the communicator is no longer in progress; its state, ncclInProgress after 10 s. */
static inline ncclResult_t settle(ncclComm_t comm) {
  ncclResult_t state = ncclInProgress;
  for (double end = seconds() + 10; seconds() < end;) {
    if (ncclCommGetAsyncError(comm, &state)) state = ncclInvalidArgument;
    if (state != ncclInProgress) break;
    nap(0.001);
  }
  return state;
}

/* As `hfreduce run` started us. Every rank can make the same id by itself. */
static inline void find_rank(void) {
  const char *r = getenv("HFREDUCE_RANK"), *n = getenv("HFREDUCE_NRANKS"), *address = getenv("HFREDUCE_ADDR");
  rank = r ? atoi(r) : 0;
  nranks = n ? atoi(n) : 1;
  if (address) setenv("NCCL_COMM_ID", address, 1);
}

static inline ncclComm_t join_with(ncclConfig_t *config) {
  ncclUniqueId id;
  ncclComm_t comm = NULL;
  find_rank();
  OK(ncclGetUniqueId(&id));
  ncclResult_t r = ncclCommInitRankConfig(&comm, nranks, id, rank, config);
  if (r == ncclInProgress) r = settle(comm);
  if (r) {
    fprintf(stderr, "rank %d: cannot join: %s\n", rank, ncclGetLastError(comm));
    exit(1);
  }
  return comm;
}
#endif
