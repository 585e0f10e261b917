/* Groups: one process and one thread that holds all ranks of a communicator, as NCCL's InitAll is used; errors in groups; threads
 * that are a rank each. argv[1] "nonblocking" is for the first of these. */
#include "rank.h"

#include <pthread.h>

#define N 3

static ncclComm_t comms[N];
static int blocking = 1;

static void all_settle(ncclComm_t *c, int n, ncclResult_t r, const char *what) {
  CHECK(r == ncclSuccess || (!blocking && r == ncclInProgress), "%s gave %d: %s", what, (int)r, ncclGetLastError(NULL));
  for (int i = 0; i < n; i++)
    if (c[i]) CHECK(settle(c[i]) == ncclSuccess, "%s, communicator %d: %s", what, i, ncclGetLastError(c[i]));
}

/* A sum over all ranks of these communicators, in one group. */
static void sum_over(ncclComm_t *c, int n, const char *what) {
  float x[N] = {0}, y[N] = {0};
  OK(ncclGroupStart());
  for (int i = 0; i < n; i++) {
    x[i] = (float)(1 << i);
    OK(ncclAllReduce(&x[i], &y[i], 1, ncclFloat, ncclSum, c[i], NULL));
  }
  all_settle(c, n, ncclGroupEnd(), what);
  for (int i = 0; i < n; i++) CHECK(y[i] == (float)((1 << n) - 1), "%s: rank %d has %g", what, i, y[i]);
}

static void init_in_a_group(void) {
  ncclUniqueId id;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = blocking;
  OK(ncclGetUniqueId(&id));
  OK(ncclGroupStart());
  OK(ncclGroupStart()); /* nested: nothing happens at the inner end */
  for (int i = 0; i < N; i++) OK(ncclCommInitRankConfig(&comms[i], N, id, i, &config));
  OK(ncclGroupEnd());
  CHECK(comms[0] != NULL, "the handle is there at once");
  FAILS(ncclInvalidArgument, "in progress", ncclCommCount(comms[0], &(int){0}));
  all_settle(comms, N, ncclGroupEnd(), "init");
  for (int i = 0; i < N; i++) {
    int r, n;
    OK(ncclCommUserRank(comms[i], &r));
    OK(ncclCommCount(comms[i], &n));
    CHECK(r == i && n == N, "rank %d of %d is %d of %d", i, N, r, n);
  }
  sum_over(comms, N, "all_reduce");
}

static void many_calls(void) {
  float x[N][4], y[N][4], z[N][4 * N];
  OK(ncclGroupStart());
  for (int k = 0; k < 4; k++)
    for (int i = 0; i < N; i++) {
      x[i][k] = (float)(i + k);
      if (k % 2) OK(ncclGroupStart());
      OK(ncclAllReduce(&x[i][k], &y[i][k], 1, ncclFloat, ncclMax, comms[i], NULL));
      OK(ncclAllGather(&x[i][k], z[i] + k * N, 1, ncclFloat, comms[i], NULL));
      OK(ncclSend(&x[i][k], 1, ncclFloat, (i + 1) % N, comms[i], NULL));
      if (k % 2) OK(ncclGroupEnd());
    }
  float got[N][4];
  for (int k = 0; k < 4; k++)
    for (int i = 0; i < N; i++) OK(ncclRecv(&got[i][k], 1, ncclFloat, (i + N - 1) % N, comms[i], NULL));
  all_settle(comms, N, ncclGroupEnd(), "many calls");
  for (int i = 0; i < N; i++)
    for (int k = 0; k < 4; k++) {
      CHECK(y[i][k] == (float)(N - 1 + k), "max %g", y[i][k]);
      CHECK(got[i][k] == (float)((i + N - 1) % N + k), "received %g", got[i][k]);
      for (int r = 0; r < N; r++) CHECK(z[i][k * N + r] == (float)(r + k), "gathered %g", z[i][k * N + r]);
    }
}

/* Two splits of each communicator in one group: the jobs of one communicator keep their order. */
static void split_in_a_group(void) {
  ncclComm_t part[N], back[N];
  OK(ncclGroupStart());
  for (int i = 0; i < N; i++) OK(ncclCommSplit(comms[i], i == 1 ? NCCL_SPLIT_NOCOLOR : 5, 0, &part[i], NULL));
  for (int i = 0; i < N; i++) OK(ncclCommSplit(comms[i], 0, -i, &back[i], NULL));
  ncclResult_t r = ncclGroupEnd();
  all_settle(comms, N, r, "split");
  all_settle(part, N, ncclSuccess, "split");
  CHECK(part[1] == NULL, "no color, no communicator");
  for (int i = 0; i < N; i++) {
    int me;
    OK(ncclCommUserRank(back[i], &me));
    CHECK(me == N - 1 - i, "by key: %d", me);
  }
  ncclComm_t two[2] = {part[0], part[2]};
  sum_over(two, 2, "the part");
  OK(ncclCommDestroy(part[0]));
  OK(ncclCommDestroy(part[2]));
  OK(ncclGroupStart());
  for (int i = 0; i < N; i++) OK(ncclCommFinalize(back[i]));
  all_settle(back, N, ncclGroupEnd(), "finalize");
  for (int i = 0; i < N; i++) OK(ncclCommDestroy(back[i]));
}

/* ---------------------------------------------------------------- errors */

static void errors(void) {
  float x = 1, y[N] = {-1, -1, -1};
  FAILS(ncclInvalidUsage, "without ncclGroupStart", ncclGroupEnd());
  FAILS(ncclInvalidUsage, "without ncclGroupStart", ncclGroupSimulateEnd(NULL));
  OK(ncclGroupStart());
  OK(ncclGroupStart());
  OK(ncclAllReduce(&x, &y[0], 1, ncclFloat, ncclSum, comms[0], NULL));
  FAILS(ncclInvalidArgument, "root is 9", ncclBroadcast(&x, &y[1], 1, ncclFloat, 9, comms[1], NULL));
  FAILS(ncclInvalidArgument, "datatype", ncclAllReduce(&x, &y[2], 1, (ncclDataType_t)40, ncclSum, comms[2], NULL));
  OK(ncclGroupEnd()); /* the inner one tells nothing */
  FAILS(ncclInvalidArgument, "root is 9", ncclGroupEnd());
  CHECK(y[0] == -1, "nothing was launched: %g", y[0]);
  sum_over(comms, N, "after an error");
  /* errors that hfreduce does not see */
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  ncclComm_t made = (ncclComm_t)1;
  ncclUniqueId id;
  config.blocking = blocking;
  OK(ncclGetUniqueId(&id));
  OK(ncclGroupStart());
  OK(ncclAllReduce(&x, &y[0], 1, ncclFloat, ncclSum, comms[0], NULL));
  OK(ncclCommInitRankConfig(&made, 1, id, 0, &config));
  FAILS(ncclInvalidArgument, "nranks is -2", ncclCommInitRank(&made, -2, id, 0));
  OK(ncclCommInitRankConfig(&made, 1, id, 0, &config));
  FAILS(ncclInvalidArgument, "nranks is -2", ncclGroupEnd());
  CHECK(!made, "no handle is left");
  CHECK(y[0] == -1, "nothing was launched");
  /* the state of a group is forgotten with it */
  OK(ncclGroupStart());
  OK(ncclGroupEnd());
  sum_over(comms, N, "after another");
}

/* What a rank sends to itself has to be received in the same group. */
static void to_itself(void) {
  float x = 3, y = -1;
  FAILS(ncclInvalidUsage, "must be in one group", ncclSend(&x, 1, ncclFloat, 0, comms[0], NULL));
  FAILS(ncclInvalidUsage, "must be in one group", ncclRecv(&y, 1, ncclFloat, 1, comms[1], NULL));
  OK(ncclGroupStart());
  OK(ncclSend(&x, 1, ncclFloat, 1, comms[1], NULL));
  FAILS(ncclInvalidUsage, "1 more sends to itself", ncclGroupEnd());
  OK(ncclGroupStart());
  OK(ncclRecv(&y, 1, ncclFloat, 2, comms[2], NULL));
  OK(ncclGroupStart());
  OK(ncclSend(&x, 1, ncclFloat, 2, comms[2], NULL));
  OK(ncclGroupEnd()); /* an inner end does not count */
  all_settle(comms, N, ncclGroupEnd(), "to itself");
  CHECK(y == 3, "from itself: %g", y);
  sum_over(comms, N, "after messages to itself");
}

static void simulated(void) {
  ncclSimInfo_t info = NCCL_SIM_INFO_INITIALIZER, blank;
  float x = 1, y = -1;
  memset(&blank, 0, sizeof blank);
  OK(ncclGroupStart());
  OK(ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, comms[0], NULL));
  OK(ncclGroupSimulateEnd(&info));
  CHECK(y == -1, "nothing was launched");
  OK(ncclGroupStart());
  FAILS(ncclInvalidArgument, "INITIALIZER", ncclGroupSimulateEnd(&blank));
  sum_over(comms, N, "after a simulation");
}

static void mixed(void) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  ncclUniqueId id;
  ncclComm_t other = NULL;
  float x = 1, y = 0;
  config.blocking = !blocking;
  OK(ncclGetUniqueId(&id));
  ncclResult_t r = ncclCommInitRankConfig(&other, 1, id, 0, &config);
  CHECK(r == ncclSuccess || r == ncclInProgress, "init gave %d", (int)r);
  CHECK(settle(other) == ncclSuccess, "init");
  OK(ncclGroupStart());
  OK(ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, comms[0], NULL));
  FAILS(ncclInvalidArgument, "cannot be in one group", ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, other, NULL));
  FAILS(ncclInvalidArgument, "cannot be in one group", ncclGroupEnd());
  /* a communicator that ends in the group that uses it */
  OK(ncclGroupStart());
  OK(ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, other, NULL));
  double start = seconds();
  OK(ncclCommAbort(other));
  CHECK(seconds() - start < 5, "it waited %g s for its own group to leave", seconds() - start);
  FAILS(ncclInvalidUsage, "in the group", ncclGroupEnd());
  sum_over(comms, N, "after a mixed group");
}

/* ---------------------------------------------------------------- ranks that disagree: all hear the same */

static void disagree(void) {
  float x[8] = {0}, y[8];
  OK(ncclGroupStart());
  for (int i = 0; i < N; i++) OK(ncclAllReduce(x, y, (size_t)(i == 1 ? 2 : 3), ncclFloat, ncclSum, comms[i], NULL));
  ncclResult_t r = ncclGroupEnd();
  if (blocking)
    CHECK(r == ncclInvalidUsage && strstr(ncclGetLastError(NULL), "ranks disagree"), "%d: %s", (int)r, ncclGetLastError(NULL));
  for (int i = 0; i < N; i++) {
    CHECK(settle(comms[i]) == ncclInvalidUsage, "rank %d is at %d", i, (int)settle(comms[i]));
    CHECK(strstr(ncclGetLastError(comms[i]), "ranks disagree") != NULL, "rank %d: %s", i, ncclGetLastError(comms[i]));
    GIVES(ncclInvalidUsage, ncclAllReduce(x, y, 1, ncclFloat, ncclSum, comms[i], NULL)); /* it stays so */
  }
}

/* ---------------------------------------------------------------- a thread a rank */

static void *be_a_rank(void *arg) {
  ncclComm_t c = arg;
  float x = 1, y = 0;
  for (int i = 0; i < 200; i++) {
    OK(ncclAllReduce(&x, &y, 1, ncclFloat, ncclSum, c, NULL));
    CHECK(y == N, "sum %g", y);
    OK(ncclGroupStart()); /* groups of other threads do not see each other */
    if (i % 50 == 7) GIVES(ncclInvalidArgument, ncclAllReduce(&x, NULL, 1, ncclFloat, ncclSum, c, NULL));
    OK(ncclBroadcast(&x, &y, 1, ncclFloat, i % N, c, NULL));
    GIVES(i % 50 == 7 ? ncclInvalidArgument : ncclSuccess, ncclGroupEnd());
  }
  return NULL;
}

static void *watch(void *stop) {
  ncclResult_t state;
  while (!__atomic_load_n((int *)stop, __ATOMIC_ACQUIRE)) {
    for (int i = 0; i < N; i++) {
      OK(ncclCommGetAsyncError(comms[i], &state));
      CHECK(state == ncclSuccess, "state %d", (int)state);
      ncclGetLastError(comms[i]);
    }
    nap(0.0005);
  }
  return NULL;
}

static void threads(void) {
  pthread_t thread[N], watcher;
  int devices[N] = {0, 0, 0}, stop = 0, device = -7; /* several ranks of one device: NCCL refuses that */
  OK(ncclCommInitAll(comms, N, devices));
  OK(ncclCommCuDevice(comms[2], &device));
  CHECK(device == 0, "device %d", device);
  pthread_create(&watcher, NULL, watch, &stop);
  for (int i = 0; i < N; i++) pthread_create(&thread[i], NULL, be_a_rank, comms[i]);
  for (int i = 0; i < N; i++) pthread_join(thread[i], NULL);
  __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
  pthread_join(watcher, NULL);
  for (int i = 0; i < N; i++) OK(ncclCommDestroy(comms[i]));
}

int main(int argc, char **argv) {
  blocking = argc < 2 || strcmp(argv[1], "nonblocking") != 0;
  setenv("HFREDUCE_SPIN", "16", 1);
  init_in_a_group();
  many_calls();
  split_in_a_group();
  errors();
  to_itself();
  simulated();
  mixed();
  disagree();
  for (int i = 0; i < N; i++) OK(ncclCommAbort(comms[i]));
  threads();
  return check_done();
}
