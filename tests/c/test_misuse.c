/*
 * What a program must not do, or may do but seldom does: calls on one communicator from two threads at once. They end with values
 * or with errors of the expected kind, whatever the order in which the threads come; no memory is touched that is gone.
 * Arguments: how often each pair of the matrix runs.
 */
#include "check.h"
#include "ranks.h"

#include "comm/comm.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define UNTIL(condition) \
  while (!(condition)) usleep(100)
#define LARGE 100000 /* floats: no short way */

static _Atomic int step; /* what the ranks, which are threads, tell each other beside the library */

static hfreduceResult_t join_timed(hfreduceComm_t *comm, int rank, int nranks, const hfreduceUniqueId *id, double timeout) {
  hfreduceConfig_t config;
  hfreduceConfigInit(&config);
  config.timeout = timeout;
  return hfreduceCommInitRankConfig(comm, nranks, *id, rank, &config);
}

static hfreduceResult_t sum(hfreduceComm_t comm, float *x, size_t n) {
  return hfreduceAllReduce(x, x, n, hfreduceFloat32, hfreduceSum, comm, NULL);
}

static hfreduceResult_t sum_async(hfreduceComm_t comm, float *x, size_t n) {
  hfreduceWork_t work;
  hfreduceGroupStart();
  sum(comm, x, n);
  hfreduceResult_t r = hfreduceGroupEndAsync(&work);
  if (r) return r;
  r = hfreduceWorkWait(work, -1);
  hfreduceWorkDestroy(work);
  return r;
}

static hfreduceResult_t sum_in_group(hfreduceComm_t comm, float *x, size_t n) {
  float y[4] = {0};
  hfreduceGroupStart();
  sum(comm, x, n);
  hfreduceBcast(y, 4, hfreduceFloat32, 0, comm, NULL);
  return hfreduceGroupEnd();
}

static hfreduceResult_t split(hfreduceComm_t comm) {
  hfreduceComm_t part = NULL;
  hfreduceResult_t r = hfreduceCommSplit(comm, 0, 0, &part, NULL);
  if (part) hfreduceCommDestroy(part);
  return r;
}

/* ---------------------------------------------------------------- overlapping calls */

enum second { BLOCKING, LAUNCH, GROUP, SPLIT, BARRIER, SECONDS };

static hfreduceResult_t second_call(enum second what, hfreduceComm_t comm, float *x) {
  switch (what) {
    case BLOCKING: return sum(comm, x, 4);
    case LAUNCH: return sum_async(comm, x, 4);
    case GROUP: return sum_in_group(comm, x, 4);
    case SPLIT: return split(comm);
    default: return hfreduceBarrier(comm, NULL);
  }
}

struct call {
  pthread_t thread;
  hfreduceComm_t comm;
  float *x;
  size_t n;
  _Atomic uint32_t tid;
  hfreduceResult_t result;
  char text[800];
};

static void *call_in_thread(void *arg) {
  struct call *c = arg;
  c->tid = hfr_thread_id();
  c->result = hfreduceBcast(c->x, c->n, hfreduceFloat32, 1, c->comm, NULL);
  snprintf(c->text, sizeof c->text, "%s", hfreduceGetLastError(NULL));
  return NULL;
}

/* Rank 0's thread waits in a broadcast for rank 1. What its main thread calls meanwhile is refused, and leaves no trace. */
static int overlap(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  static float x[LARGE];
  float y[4];
  (void)arg;
  OK(join_timed(&comm, rank, nranks, id, 60));
  for (int i = 0; i < 2 * SECONDS; i++) {
    size_t n = i % 2 ? LARGE : 4;
    for (int j = 0; j < 4; j++) y[j] = (float)rank;
    if (rank) {
      float *mine = calloc(n, sizeof *mine);
      mine[n - 1] = (float)i;
      UNTIL(step == 2 * i + 1);
      OK(hfreduceBcast(mine, n, hfreduceFloat32, 1, comm, NULL));
      free(mine);
    } else {
      struct call first = {.comm = comm, .x = x, .n = n};
      char who[2][64];
      WANT(!pthread_create(&first.thread, NULL, call_in_thread, &first));
      UNTIL(atomic_load(&comm->handle.caller) && atomic_load(&comm->handle.call));
      usleep(i < SECONDS ? 0 : 20000);
      hfreduceResult_t r = second_call((enum second)(i % SECONDS), comm, y);
      const char *text = hfreduceGetLastError(NULL);
      snprintf(who[0], sizeof who[0], "thread %u was in hfreduceBcast", first.tid);
      snprintf(who[1], sizeof who[1], "thread %u called it", hfr_thread_id());
      CHECK(r == hfreduceInvalidUsage && strstr(text, who[0]) && strstr(text, who[1]), "%d: %d: %s", i, (int)r, text);
      step = 2 * i + 1;
      pthread_join(first.thread, NULL);
      CHECK(!first.result && x[n - 1] == (float)i, "%d: %d: %s", i, (int)first.result, first.text);
    }
    OK(second_call((enum second)(i % SECONDS), comm, y));
    CHECK(i % SECONDS >= SPLIT || y[0] == 1, "%d: %g", i, (double)y[0]);
  }
  OK(hfreduceCommDestroy(comm));
  return 0;
}

static void *sum_in_thread(void *arg) {
  struct call *c = arg;
  c->result = sum(c->comm, c->x, c->n);
  snprintf(c->text, sizeof c->text, "%s", hfreduceGetLastError(NULL));
  return NULL;
}

static int in_another_thread(struct call *c) {
  return pthread_create(&c->thread, NULL, sum_in_thread, c) || pthread_join(c->thread, NULL);
}

/* A call that ran out of patience is still inside, but for its own thread; a message is no collective. */
static int patience(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  float x[4] = {1, 1, 1, 1}, y[4] = {1, 1, 1, 1}, z[4] = {1, 1, 1, 1}, m = 7;
  (void)arg;
  OK(join_timed(&comm, rank, nranks, id, 60));
  if (rank) {
    OK(hfreduceRecv(&m, 1, hfreduceFloat32, 0, comm, NULL));
    UNTIL(step == 1);
    OK(sum(comm, x, 4));
    OK(sum(comm, z, 4));
  } else {
    struct call other = {.comm = comm, .x = y, .n = 4};
    hfreduceWork_t work[2];
    OK(hfreduceCommSetPatience(comm, 0.02));
    WANT(sum(comm, x, 4) == hfreduceInProgress);
    OK(hfreduceTakeWork(&work[0]));
    WANT(!in_another_thread(&other));
    CHECK(other.result == hfreduceInvalidUsage && strstr(other.text, "was in hfreduceAllReduce"), "%d: %s", (int)other.result,
          other.text);
    WANT(sum(comm, z, 4) == hfreduceInProgress);
    OK(hfreduceTakeWork(&work[1]));
    OK(hfreduceCommSetPatience(comm, 0));
    OK(hfreduceSend(&m, 1, hfreduceFloat32, 1, comm, NULL));
    step = 1;
    for (int i = 0; i < 2; i++) {
      OK(hfreduceWorkWait(work[i], -1));
      hfreduceWorkDestroy(work[i]);
    }
    CHECK(x[3] == 2 && z[3] == 2);
    WANT(!in_another_thread(&other));
    CHECK(!other.result && y[3] == 2, "%d: %s", (int)other.result, other.text);
  }
  if (rank) OK(sum(comm, y, 4));
  OK(hfreduceCommDestroy(comm));
  return 0;
}

/* ---------------------------------------------------------------- closing under a call */

/* Its rank closes the communicator while a thread of it waits in a call: both hear why, and the other rank too. */
static int close_under(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  static float x[LARGE];
  size_t n = *(size_t *)arg;
  OK(join_timed(&comm, rank, nranks, id, 60));
  if (rank) {
    float y[4];
    UNTIL(step == 1);
    /* The other rank's call may have arrived before the news of its end: a call made then would be told that the two disagree. */
    hfreduceResult_t r = hfreduceSuccess;
    UNTIL(hfreduceCommGetAsyncError(comm, &r) || r);
    r = sum(comm, y, 4);
    CHECK(r == hfreduceAborted && strstr(hfreduceGetLastError(NULL), "closed the communicator while"), "%d: %s", (int)r,
          hfreduceGetLastError(NULL));
  } else {
    struct call first = {.comm = comm, .x = x, .n = n};
    WANT(!pthread_create(&first.thread, NULL, call_in_thread, &first));
    UNTIL(atomic_load(&comm->handle.caller));
    OK(hfreduceCommDestroy(comm));
    CHECK(hfreduceCommDestroy(comm) == hfreduceInvalidArgument);
    CHECK(sum(comm, x, 4) == hfreduceInvalidArgument);
    pthread_join(first.thread, NULL);
    CHECK(
        first.result == hfreduceAborted && strstr(first.text, "closed the communicator while") && strstr(first.text, "broadcast"),
        "%d: %s", (int)first.result, first.text);
    step = 1;
    return 0;
  }
  OK(hfreduceCommDestroy(comm));
  return 0;
}

/* A group has a call on a communicator whose slot another one has when the group ends. */
static int reuse_slot(hfreduceComm_t old) {
  hfreduceComm_t now = NULL;
  hfreduceUniqueId own;
  float x = 1;
  int rank = 0;
  for (int round = 0; round < 2; round++) {
    for (int i = 0; i < 1000 && now != old; i++) {
      if (now) OK(hfreduceCommDestroy(now));
      OK(hfreduceGetUniqueIdLocal(&own));
      OK(hfreduceCommInitRank(&now, 1, own, 0));
    }
    WANT(now == old);
    if (round == 0) {
      OK(hfreduceGroupStart());
      OK(sum(old, &x, 1));
      OK(hfreduceCommDestroy(old));
      now = NULL;
    }
  }
  CHECK(hfreduceGroupEnd() == hfreduceInvalidUsage &&
        strstr(hfreduceGetLastError(NULL), "was destroyed while the group was open"));
  OK(sum(now, &x, 1));
  OK(hfreduceCommDestroy(now));
  return 0;
}

/* Handles that were destroyed are no others' soon; what a group remembers of one is judged at its end. */
static int stale_handles(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t old, comm[8];
  hfreduceUniqueId own;
  float x = 1, y = 1;
  int n;
  (void)arg;
  OK(join_timed(&old, rank, nranks, id, 60));
  OK(hfreduceGroupStart());
  OK(sum(old, &x, 1));
  OK(hfreduceCommDestroy(old));
  for (int i = 0; i < 8; i++) {
    OK(hfreduceGetUniqueIdLocal(&own));
    OK(hfreduceCommInitRank(&comm[i], 1, own, 0));
    WANT(comm[i] != old);
  }
  CHECK(hfreduceGroupEnd() == hfreduceInvalidArgument);
  CHECK(hfreduceCommCount(old, &n) == hfreduceInvalidArgument);
  if (reuse_slot(old)) return 1;
  CHECK(sum((hfreduceComm_t)((char *)comm[0] + 8), &y, 1) == hfreduceInvalidArgument);
  CHECK(sum((hfreduceComm_t)&n, &y, 1) == hfreduceInvalidArgument);
  for (int i = 0; i < 8; i++) {
    OK(sum(comm[i], &y, 1));
    OK(hfreduceCommDestroy(comm[i]));
  }
  return 0;
}

/* ---------------------------------------------------------------- the matrix */

enum victim { V_BLOCKING, V_LARGE, V_ASYNC, V_GROUP, V_MESSAGE, V_INIT, V_CLOSE, VICTIMS };
enum attack { A_CLOSE, A_ABORT, A_ERROR, A_CONNECTIONS, A_SPLIT, ATTACKS };
static const char *const victim_name[] = {"a small call", "a large call", "an async call", "a group",
                                          "a message",    "init",         "close"};
static const char *const attack_name[] = {"close", "abort", "async_error", "connections", "split"};
#define CALLS 30

struct pair {
  enum victim victim;
  enum attack attack;
  hfreduceUniqueId other[2]; /* for init */
};

struct victim_thread {
  pthread_t thread;
  hfreduceComm_t comm;
  const struct pair *pair;
  int rank;
  _Atomic int began;
  hfreduceResult_t result;
  char text[800];
};

static hfreduceResult_t make_another(const struct victim_thread *v, int i) {
  hfreduceComm_t other;
  hfreduceResult_t r = join_timed(&other, v->rank, 2, &v->pair->other[i % 2], 60);
  if (!r) r = hfreduceCommDestroy(other);
  return r;
}

static hfreduceResult_t one_call(const struct victim_thread *v, int i, float *x) {
  switch (v->pair->victim) {
    case V_BLOCKING: return sum(v->comm, x, 4);
    case V_LARGE: return sum(v->comm, x, LARGE);
    case V_ASYNC: return sum_async(v->comm, x, i % 2 ? LARGE : 4);
    case V_GROUP: return sum_in_group(v->comm, x, 4);
    case V_MESSAGE:
      return v->rank ? hfreduceRecv(x, 4, hfreduceFloat32, 0, v->comm, NULL)
                     : hfreduceSend(x, 4, hfreduceFloat32, 1, v->comm, NULL);
    case V_INIT: return i < 2 ? make_another(v, i) : hfreduceSuccess;
    default: return i ? hfreduceSuccess : hfreduceCommDestroy(v->comm);
  }
}

static void *be_victim(void *arg) {
  struct victim_thread *v = arg;
  float *x = calloc(LARGE, sizeof *x);
  for (int i = 0; !v->result && i < CALLS; i++) {
    x[0] = 1;
    v->result = one_call(v, i, x);
    v->began = 1;
  }
  if (v->result) snprintf(v->text, sizeof v->text, "%s", hfreduceGetLastError(NULL));
  free(x);
  return NULL;
}

static hfreduceResult_t attack(enum attack what, hfreduceComm_t comm) {
  hfreduceResult_t error, r = hfreduceSuccess;
  hfreduceConnection_t connection;
  int n;
  switch (what) {
    case A_CLOSE: return hfreduceCommDestroy(comm);
    case A_ABORT: return hfreduceCommAbort(comm);
    case A_SPLIT: return split(comm);
    default:
      for (int i = 0; i < 200 && !r; i++) {
        r = what == A_ERROR ? hfreduceCommGetAsyncError(comm, &error) : hfreduceCommConnectionCount(comm, &n);
        if (!r && what == A_CONNECTIONS && n) hfreduceCommGetConnection(comm, 0, &connection);
        hfreduceGetLastError(comm);
      }
      return r;
  }
}

/* Errors that a victim or an attack may end with. */
static int expected(hfreduceResult_t r, const struct pair *p) {
  int looks = p->attack == A_ERROR || p->attack == A_CONNECTIONS;
  switch (r) {
    case hfreduceSuccess: return 1;
    case hfreduceInvalidArgument: return p->attack == A_CLOSE || p->victim == V_CLOSE; /* destroyed before */
    case hfreduceAborted: return !looks;
    case hfreduceRemoteError: return !looks;                /* the other rank has left */
    case hfreduceInvalidUsage: return p->attack == A_SPLIT; /* whichever of the two came later */
    case hfreduceMismatch: return p->attack == A_SPLIT;
    default: return 0;
  }
}

static int run_pair(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  const struct pair *p = arg;
  struct victim_thread v = {.pair = p, .rank = rank};
  hfreduceResult_t r = hfreduceSuccess;
  OK(join_timed(&v.comm, rank, nranks, id, 60));
  if (rank) {
    be_victim(&v);
  } else {
    unsigned seed = (unsigned)hfr_thread_id();
    WANT(!pthread_create(&v.thread, NULL, be_victim, &v));
    UNTIL(v.began || p->victim == V_INIT || p->victim == V_CLOSE);
    usleep((unsigned)rand_r(&seed) % 300);
    r = attack(p->attack, v.comm);
    CHECK(expected(r, p), "%s beside %s: %d: %s", attack_name[p->attack], victim_name[p->victim], (int)r,
          hfreduceGetLastError(NULL));
    if (p->attack == A_SPLIT && r) hfreduceCommAbort(v.comm);
    pthread_join(v.thread, NULL);
  }
  CHECK(expected(v.result, p), "rank %d: %s beside %s: %d: %s", rank, victim_name[p->victim], attack_name[p->attack],
        (int)v.result, v.text);
  r = hfreduceCommDestroy(v.comm);
  CHECK(!r || r == hfreduceInvalidArgument);
  return 0;
}

static void run_matrix(int times) {
  for (int i = 0; i < VICTIMS * ATTACKS; i++)
    for (int k = 0; k < times; k++) {
      struct pair p = {.victim = (enum victim)(i / ATTACKS), .attack = (enum attack)(i % ATTACKS)};
      if (p.attack == A_SPLIT && (p.victim == V_INIT || p.victim == V_MESSAGE)) continue; /* rank 1 does not split */
      for (int j = 0; j < 2; j++) CHECK(!hfreduceGetUniqueIdLocal(&p.other[j]));
      if (!CHECK(!run_threads(2, run_pair, &p, 100), "%s beside %s", attack_name[p.attack], victim_name[p.victim])) return;
    }
}

/* ---------------------------------------------------------------- the process' end */

static void *be_victim_for_ever(void *arg) {
  struct victim_thread *v = arg;
  for (;;) {
    be_victim(v);
    v->result = hfreduceSuccess;
  }
  return NULL;
}

static int exit_under(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  struct victim_thread v = {.pair = arg, .rank = rank};
  OK(join_timed(&v.comm, rank, nranks, id, 60));
  if (rank) be_victim_for_ever(&v);
  WANT(!pthread_create(&v.thread, NULL, be_victim_for_ever, &v));
  UNTIL(v.began);
  usleep(2000);
  exit(33);
}

static void run_exits(void) {
  static const enum victim victims[] = {V_BLOCKING, V_LARGE, V_ASYNC, V_GROUP, V_INIT, V_CLOSE};
  for (size_t i = 0; i < sizeof victims / sizeof *victims; i++) {
    int status = 0;
    pid_t pid = fork();
    if (!pid) {
      struct pair p = {.victim = victims[i]};
      for (int j = 0; j < 2; j++) hfreduceGetUniqueIdLocal(&p.other[j]);
      run_threads(2, exit_under, &p, 60);
      _exit(1);
    }
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 33, "exit beside %s: status %#x",
          victim_name[victims[i]], status);
  }
}

/* ---------------------------------------------------------------- a forked child */

/* The child forgets its parent's communicator; neither the parent nor the other rank hears of it. */
static int destroy_in_child(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  float x = 1;
  (void)arg;
  OK(join_timed(&comm, rank, nranks, id, 60));
  OK(sum(comm, &x, 1));
  if (rank == 0) {
    int status = -1;
    pid_t child = fork();
    if (!child) _exit(hfreduceCommDestroy(comm));
    WANT(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(status == 0, "the child's call: %x", (unsigned)status);
  }
  OK(hfreduceBarrier(comm, NULL));
  x = 1;
  OK(sum(comm, &x, 1));
  CHECK(x == (float)nranks, "%g", (double)x);
  OK(hfreduceCommDestroy(comm));
  return 0;
}

/* ---------------------------------------------------------------- buffers that overlap */

/* The input lies in the result, but not where in-place operation has it: it would be read half overwritten. Nothing is sent. */
static int overlapping_buffers(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  float x[64] = {0}, *at = x + 16;
  (void)arg;
  OK(join_timed(&comm, rank, nranks, id, 60));
  for (int away = -7; away <= 7; away++) {
    hfreduceResult_t want = away ? hfreduceInvalidArgument : hfreduceSuccess;
    CHECK(hfreduceAllReduce(at + away, at, 8, hfreduceFloat32, hfreduceSum, comm, NULL) == want, "all_reduce, %d away", away);
    CHECK(hfreduceReduceScatter(at + away, at + 8 * rank, 8, hfreduceFloat32, hfreduceSum, comm, NULL) == want,
          "reduce_scatter, %d away", away);
    CHECK(hfreduceAllGather(at + 8 * rank + away, at, 8, hfreduceFloat32, comm, NULL) == want, "all_gather, %d away", away);
  }
  CHECK(strstr(hfreduceGetLastError(NULL), "overlap"), "%s", hfreduceGetLastError(NULL));
  /* Side by side is no overlap. */
  OK(hfreduceAllReduce(at - 8, at, 8, hfreduceFloat32, hfreduceSum, comm, NULL));
  OK(hfreduceAllReduce(at + 8, at, 8, hfreduceFloat32, hfreduceSum, comm, NULL));
  OK(hfreduceCommDestroy(comm));
  return 0;
}

int main(int argc, char **argv) {
  run_exits(); /* first: a process with threads does not fork well */
  CHECK(run_processes("2", destroy_in_child, NULL, 100) == 0);
  CHECK(run_processes("1,1", destroy_in_child, NULL, 100) == 0);
  CHECK(run_threads(2, overlap, NULL, 100) == 0);
  step = 0;
  CHECK(run_threads(2, patience, NULL, 100) == 0);
  for (size_t n = 4; n <= LARGE; n += LARGE - 4) {
    step = 0;
    CHECK(run_threads(2, close_under, &n, 100) == 0);
  }
  CHECK(run_threads(1, stale_handles, NULL, 100) == 0);
  CHECK(run_threads(2, overlapping_buffers, NULL, 100) == 0);
  run_matrix(argc > 1 ? atoi(argv[1]) : 5);
  return check_done();
}
