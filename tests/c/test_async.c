/* Work that outlives the call: patience, completion queues, threads that wait for works of engines that they may drive,
 * or look at what goes on. Arguments: the layouts to run. */
#include "check.h"
#include "ranks.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void pause_ms(int ms) { usleep((useconds_t)ms * 1000); }

static int all_ones(const float *x, size_t count, float want) {
  for (size_t i = 0; i < count; i++)
    if (x[i] != want) return 0;
  return 1;
}

/* A rank that comes late: the others' blocking calls return in between, and go on. */
static int patience(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const size_t sizes[] = {1, 40, 5000, 300000};
  hfreduceComm_t comm;
  hfreduceWork_t work = NULL;
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  WANT(hfreduceTakeWork(&work) == hfreduceInvalidUsage && !work);
  WANT(hfreduceCommSetPatience(comm, -1) == hfreduceInvalidArgument);
  OK(hfreduceCommSetPatience(comm, 0.02));
  float *x = malloc(300000 * sizeof *x);
  int lost = 0;
  for (int round = 0; round < 8; round++) {
    size_t count = sizes[round % 4];
    int late = (round / 4 + round) % n;
    for (size_t i = 0; i < count; i++) x[i] = 1;
    /* twice as many operations as slots before it: a late rank may hold a slot, or its data */
    for (int i = 0; i < 2 * (round % 3); i++) {
      float y = 1;
      hfreduceResult_t r = hfreduceAllReduce(&y, &y, 1, hfreduceFloat32, hfreduceSum, comm, NULL);
      if (r == hfreduceInProgress) {
        OK(hfreduceTakeWork(&work));
        OK(hfreduceWorkWait(work, -1));
        OK(hfreduceWorkDestroy(work));
      } else {
        OK(r);
      }
      WANT(y == (float)n);
    }
    if (rank == late && n > 1) pause_ms(150);
    hfreduceResult_t r = hfreduceAllReduce(x, x, count, hfreduceFloat32, hfreduceSum, comm, NULL);
    if (r == hfreduceInProgress) {
      lost++;
      OK(hfreduceTakeWork(&work));
      int done = 0;
      while (!done) OK(hfreduceWorkTest(work, &done));
      OK(hfreduceWorkDestroy(work));
    } else {
      OK(r);
    }
    WANT(all_ones(x, count, (float)n));
  }
  WANT(n == 1 || lost > 0);
  OK(hfreduceCommSetPatience(comm, 0));
  OK(hfreduceBarrier(comm, NULL));
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

/* A blocking call without patience, to which the last rank does not come: whoever waits in it looks at the deadline by itself. */
static int deadlines(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  static const size_t sizes[] = {1, 300000};
  hfreduceComm_t comm;
  float *x = calloc(300000, sizeof *x);
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  for (size_t k = 0; k < sizeof sizes / sizeof *sizes && n > 1; k++) {
    hfreduceComm_t child;
    hfreduceResult_t r = hfreduceSuccess;
    OK(hfreduceCommSplit(comm, 0, rank, &child, NULL));
    OK(hfreduceCommSetTimeout(child, 0.5));
    if (rank < n - 1) {
      r = hfreduceAllReduce(x, x, sizes[k], hfreduceFloat32, hfreduceSum, child, NULL);
      WANT(r == hfreduceTimeout);
    }
    for (int ms = 0; !r && ms < 6000; ms++) { /* then it leaves, which is another error */
      pause_ms(1);
      OK(hfreduceCommGetAsyncError(child, &r));
    }
    OK(hfreduceCommDestroy(child));
  }
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

#define WORKS 40
struct popper {
  hfreduceCompletionQueue_t queue;
  _Atomic int seen[WORKS];
  _Atomic int taken;
};

static void *pop_all(void *arg) {
  struct popper *p = arg;
  uint64_t token;
  hfreduceResult_t r;
  while ((r = hfreduceCompletionQueuePop(p->queue, -1, &token)) != hfreduceAborted)
    if (r == hfreduceSuccess && token < WORKS) {
      p->seen[token]++;
      p->taken++;
    }
  return NULL;
}

static int queues(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  struct popper p;
  pthread_t thread[3];
  hfreduceWork_t work[WORKS];
  static _Thread_local float x[WORKS][64];
  (void)arg;
  memset(&p, 0, sizeof p);
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  OK(hfreduceCompletionQueueCreate(&p.queue));
  uint64_t token;
  WANT(hfreduceCompletionQueuePop(p.queue, 0, &token) == hfreduceInProgress);
  WANT(hfreduceCompletionQueuePop(p.queue, 0.01, &token) == hfreduceInProgress);
  for (int i = 0; i < 3; i++) WANT(pthread_create(&thread[i], NULL, pop_all, &p) == 0);
  for (int i = 0; i < WORKS; i++) {
    for (int j = 0; j < 64; j++) x[i][j] = 1;
    OK(hfreduceGroupStart());
    OK(hfreduceAllReduce(x[i], x[i], 64, hfreduceFloat32, hfreduceSum, comm, NULL));
    OK(hfreduceGroupEndAsync(&work[i]));
    if (i % 3 == 0) OK(hfreduceWorkWait(work[i], -1)); /* some have ended before they are notified */
    OK(hfreduceWorkNotify(work[i], p.queue, (uint64_t)i));
    WANT(hfreduceWorkNotify(work[i], p.queue, 0) == hfreduceInvalidUsage);
    if (i % 4 == 0) OK(hfreduceWorkDestroy(work[i])); /* the token still comes */
  }
  for (int ms = 0; p.taken < WORKS && ms < 20000; ms++) pause_ms(1);
  WANT(p.taken == WORKS);
  OK(hfreduceCompletionQueueClose(p.queue));
  for (int i = 0; i < 3; i++) pthread_join(thread[i], NULL);
  for (int i = 0; i < WORKS; i++) {
    WANT(p.seen[i] == 1);
    WANT(all_ones(x[i], 64, (float)n));
    if (i % 4) OK(hfreduceWorkDestroy(work[i]));
  }
  WANT(hfreduceCompletionQueuePop(p.queue, -1, &token) == hfreduceAborted);
  OK(hfreduceCompletionQueueDestroy(p.queue));
  OK(hfreduceCommDestroy(comm));
  return 0;
}

/* Several threads wait for one work while the communicator's owner destroys it: nobody touches an engine that is gone. */
static void *wait_for(void *arg) { return (void *)(uintptr_t)hfreduceWorkWait(arg, -1); }

static int guests(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  (void)arg;
  float *x = calloc(100000, sizeof *x);
  hfreduceComm_t comm;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  for (int i = 0; i < 12; i++) {
    hfreduceComm_t child;
    hfreduceWork_t work;
    pthread_t thread[3];
    OK(hfreduceCommSplit(comm, 0, rank, &child, NULL));
    OK(hfreduceGroupStart());
    OK(hfreduceAllReduce(x, x, i % 2 ? 100000 : 10, hfreduceFloat32, hfreduceSum, child, NULL));
    OK(hfreduceGroupEndAsync(&work));
    for (int t = 0; t < 3; t++) WANT(pthread_create(&thread[t], NULL, wait_for, work) == 0);
    OK(hfreduceCommDestroy(child));
    for (int t = 0; t < 3; t++) {
      void *r;
      pthread_join(thread[t], &r);
      WANT(!r);
    }
    OK(hfreduceWorkDestroy(work));
  }
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

struct looker {
  hfreduceComm_t comm;
  _Atomic int stop;
  int wrong;
};

static void *look_on(void *arg) {
  struct looker *l = arg;
  uint64_t before = 0;
  do {
    int count = 0;
    uint64_t sum = 0;
    l->wrong += hfreduceCommConnectionCount(l->comm, &count) != hfreduceSuccess;
    for (int i = 0; i < count; i++) {
      hfreduceConnection_t c;
      l->wrong += hfreduceCommGetConnection(l->comm, i, &c) != hfreduceSuccess || !*c.transport;
      sum += c.bytes_sent + c.bytes_received;
    }
    l->wrong += sum < before;
    before = sum;
  } while (!l->stop);
  return NULL;
}

/* A thread that looks at the connections while they come up and carry. */
static int lookers(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  struct looker looker = {0};
  pthread_t thread;
  float *x = calloc(300000, sizeof *x);
  hfreduceConnection_t c;
  int count;
  (void)arg;
  OK(hfreduceCommInitRank(&looker.comm, n, *id, rank));
  WANT(hfreduceCommGetConnection(looker.comm, 0, &c) == hfreduceInvalidArgument);
  pthread_create(&thread, NULL, look_on, &looker);
  for (int i = 0; i < 20; i++) {
    OK(hfreduceAllReduce(x, x, 300000, hfreduceFloat32, hfreduceSum, looker.comm, NULL));
    OK(hfreduceGroupStart());
    OK(hfreduceSend(x, 1000, hfreduceFloat32, (rank + 1) % n, looker.comm, NULL));
    OK(hfreduceRecv(x + 1000, 1000, hfreduceFloat32, (rank + n - 1) % n, looker.comm, NULL));
    OK(hfreduceGroupEnd());
  }
  looker.stop = 1;
  pthread_join(thread, NULL);
  WANT(!looker.wrong);
  OK(hfreduceCommConnectionCount(looker.comm, &count));
  WANT(count >= 1 && count <= n);
  for (int i = 0; i < count; i++) OK(hfreduceCommGetConnection(looker.comm, i, &c));
  WANT(hfreduceCommGetConnection(looker.comm, count, &c) == hfreduceInvalidArgument);
  WANT(hfreduceCommGetConnection(looker.comm, 0, NULL) == hfreduceInvalidArgument);
  OK(hfreduceCommDestroy(looker.comm));
  free(x);
  return 0;
}

/* The caller's arrays of an uneven all_to_all are its own again once it is launched. */
static int arrays(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { RANKS = 4, MOST = 3 * 40000 + RANKS }; /* floats of a block: several messages */
  hfreduceComm_t comm;
  hfreduceWork_t work;
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  float *x = calloc(RANKS * MOST, sizeof *x), *y = calloc(RANKS * MOST, sizeof *y);
  for (int round = 0; round < 8; round++) {
    size_t array[4][RANKS], size = round % 2 ? 40000 : 1; /* sendcounts, senddispls, recvcounts, recvdispls */
    for (int p = 0; p < n; p++) {
      array[0][p] = (size_t)(1 + (rank + 2 * p) % 3) * size;
      array[2][p] = (size_t)(1 + (p + 2 * rank) % 3) * size;
      array[1][p] = (size_t)(n - 1 - p) * MOST;
      array[3][p] = (size_t)(p + 1) % (size_t)n * MOST;
      for (size_t i = 0; i < array[0][p]; i++) x[array[1][p] + i] = (float)(1 + 100 * round + 10 * rank + p);
    }
    memset(y, 0, RANKS * MOST * sizeof *y);
    if (rank == round / 2 % n) pause_ms(20); /* the others' launches lie there for a while */
    OK(hfreduceGroupStart());
    OK(hfreduceAlltoAllv(x, array[0], array[1], y, array[2], array[3], hfreduceFloat32, comm, NULL));
    OK(hfreduceGroupEndAsync(&work));
    for (int i = 0; i < 4; i++)
      for (int p = 0; p < n; p++) array[i][p] = i % 2 ? 5 : 0;
    OK(hfreduceWorkWait(work, -1));
    OK(hfreduceWorkDestroy(work));
    for (int p = 0; p < n; p++) {
      const float *block = y + (size_t)(p + 1) % (size_t)n * MOST;
      size_t count = (size_t)(1 + (p + 2 * rank) % 3) * size;
      WANT(all_ones(block, count, (float)(1 + 100 * round + 10 * p + rank)));
      WANT(all_ones(block + count, MOST - count, 0));
    }
  }
  OK(hfreduceBarrier(comm, NULL));
  OK(hfreduceCommDestroy(comm));
  free(x);
  free(y);
  return 0;
}

struct caller {
  hfreduceComm_t comm;
  float y;
  hfreduceResult_t result;
};

static void *sum_one(void *arg) {
  struct caller *c = arg;
  c->result = hfreduceAllReduce(&c->y, &c->y, 1, hfreduceFloat32, hfreduceSum, c->comm, NULL);
  return NULL;
}

/* A work of two communicators whose halves end on two threads: one drives the first, and goes on to wait there for a call of its
 * own; the progress thread drives the second. Who finds the work ended finds both results. */
static int halves(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { COUNT = 64 };
  hfreduceComm_t comm, other;
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  OK(hfreduceCommSplit(comm, 0, rank, &other, NULL));
  for (int round = 0; round < 8; round++) {
    float x[2][COUNT];
    hfreduceWork_t work;
    pthread_t thread;
    struct caller caller = {comm, 1, hfreduceSuccess};
    int done = 0;
    for (int i = 0; i < COUNT; i++) x[0][i] = 1, x[1][i] = 2;
    if (rank) pause_ms(20); /* rank 0's thread is inside */
    OK(hfreduceGroupStart());
    OK(hfreduceAllReduce(x[0], x[0], COUNT, hfreduceFloat32, hfreduceSum, comm, NULL));
    OK(hfreduceAllReduce(x[1], x[1], COUNT, hfreduceFloat32, hfreduceSum, other, NULL));
    OK(hfreduceGroupEndAsync(&work));
    if (!rank) WANT(pthread_create(&thread, NULL, sum_one, &caller) == 0);
    while (!done) OK(hfreduceWorkTest(work, &done));
    WANT(all_ones(x[0], COUNT, (float)n) && all_ones(x[1], COUNT, (float)(2 * n)));
    if (rank) sum_one(&caller);
    if (!rank) pthread_join(thread, NULL);
    OK(caller.result);
    WANT(caller.y == (float)n);
    OK(hfreduceWorkDestroy(work));
  }
  OK(hfreduceCommDestroy(other));
  OK(hfreduceCommDestroy(comm));
  return 0;
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    rank_function function;
  } test[] = {{"patience", patience}, {"queues", queues}, {"guests", guests},      {"lookers", lookers},
              {"arrays", arrays},     {"halves", halves}, {"deadlines", deadlines}};
  static char *preset[] = {"1", "2", "3", "1,1", "2,1"};
  size_t tests = sizeof test / sizeof *test, n = argc > 1 ? (size_t)argc - 1 : sizeof preset / sizeof *preset;
  char **layouts = argc > 1 ? argv + 1 : preset;
  for (size_t t = 0; t < tests; t++)
    for (size_t i = 0; i < n; i++)
      CHECK(run_processes(layouts[i], test[t].function, NULL, 60) == 0, "%s, nodes %s", test[t].name, layouts[i]);
  if (argc > 1) return check_done();
  /* last: a process with threads does not fork well */
  for (size_t t = 0; t < tests; t++) CHECK(run_threads(2, test[t].function, NULL, 60) == 0, "%s, 2 threads", test[t].name);
  return check_done();
}
