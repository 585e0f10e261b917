/*
 * Who sleeps is woken: a caller that naps while it drives. Here a sleep lasts ten minutes unless somebody ends it, so whoever is
 * forgotten hangs until the time limit of his test. Arguments: the layouts to run.
 */
#include "check.h"
#include "ranks.h"

#include "comm/comm.h"
#include "engine/internal.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define OK(call)                                                                                       \
  do {                                                                                                 \
    hfreduceResult_t result_ = (call);                                                                 \
    if (result_) {                                                                                     \
      fprintf(stderr, "rank %d: %s: %d: %s\n", rank, #call, (int)result_, hfreduceGetLastError(NULL)); \
      return 1;                                                                                        \
    }                                                                                                  \
  } while (0)
#define WANT(condition)                                                               \
  do {                                                                                \
    if (!(condition)) {                                                               \
      fprintf(stderr, "rank %d: line %d: %s is false\n", rank, __LINE__, #condition); \
      return 1;                                                                       \
    }                                                                                 \
  } while (0)
#define UNTIL(condition) \
  while (!(condition)) usleep(200)

#define LARGE 2000000 /* floats of a message that leaves only while it is taken */
#define RANKS_MAX 8

/* What the ranks tell each other beside the library, which must not be woken by it. */
static struct shared { _Atomic int step[RANKS_MAX]; } * shared;

static void reach(int rank, int step) { atomic_store(&shared->step[rank], step); }
static int reached(int rank, int step) { return atomic_load(&shared->step[rank]) >= step; }

/* Sends and receives of one float or LARGE ones, and sums. */
enum what { SUM, SEND, RECV };

static hfreduceResult_t call(hfreduceComm_t comm, enum what what, float *x, size_t count, int peer) {
  switch (what) {
    case SUM: return hfreduceAllReduce(x, x, count, hfreduceFloat32, hfreduceSum, comm, NULL);
    case SEND: return hfreduceSend(x, count, hfreduceFloat32, peer, comm, NULL);
    default: return hfreduceRecv(x, count, hfreduceFloat32, peer, comm, NULL);
  }
}

static hfreduceResult_t launch(hfreduceComm_t comm, enum what what, float *x, size_t count, int peer, hfreduceWork_t *work) {
  hfreduceResult_t r = hfreduceGroupStart();
  if (!r) r = call(comm, what, x, count, peer);
  hfreduceResult_t end = hfreduceGroupEndAsync(work);
  return r ? r : end;
}

/* Wait for a work as who computes does: nobody drives but the progress thread. Gives it back. */
static hfreduceResult_t poll_work(hfreduceWork_t work) {
  int done = 0;
  hfreduceResult_t r = hfreduceSuccess;
  while (!r && !done) {
    r = hfreduceWorkTest(work, &done);
    if (!done) usleep(200);
  }
  hfreduceWorkDestroy(work);
  return r;
}

/* ---------------------------------------------------------------- a caller that naps */

/* A thread of a rank that waits for a call of its own. */
struct waiter {
  pthread_t thread;
  hfreduceComm_t comm;
  enum what what;
  int blocking; /* the call itself blocks; else it is launched, and waited for */
  int peer, rank;
  size_t count;
  float *x;
  int failed;
};

static void *wait_in_thread(void *arg) {
  struct waiter *w = arg;
  hfreduceWork_t work;
  hfreduceResult_t r;
  if (w->blocking) {
    r = call(w->comm, w->what, w->x, w->count, w->peer);
  } else {
    r = launch(w->comm, w->what, w->x, w->count, w->peer, &work);
    if (!r) r = hfreduceWorkWait(work, -1), hfreduceWorkDestroy(work);
  }
  if (r) fprintf(stderr, "rank %d: a thread's call: %d: %s\n", w->rank, (int)r, hfreduceGetLastError(NULL));
  w->failed = r != hfreduceSuccess;
  return NULL;
}

static int begin_waiter(struct waiter *w) { return pthread_create(&w->thread, NULL, wait_in_thread, w); }
static int end_waiter(struct waiter *w) { return pthread_join(w->thread, NULL) || w->failed; }

/* Rank 0 has a thread that drives and naps, since what it waits for comes only after its main thread's own call. Nobody but that
   thread can make this call move, and nothing but the call itself can wake it. */
static const struct seconds {
  const char *name;
  enum what first;
  int first_blocks;
  size_t first_count;
  enum what second;
  int second_blocks;
  int second_later; /* the first one ends before it, and its thread leaves the other to the progress thread */
} seconds[] = {
    {"a send behind a receive", RECV, 0, 1, SEND, 0, 0},
    {"a blocking send behind a receive", RECV, 0, 1, SEND, 1, 0},
    {"a send behind a blocking receive", RECV, 1, 1, SEND, 0, 0},
    {"a sum behind a receive", RECV, 0, 1, SUM, 0, 0},
    {"a blocking sum behind a receive", RECV, 0, 1, SUM, 1, 0},
    {"a send behind a sum", SUM, 0, LARGE, SEND, 0, 0},
    {"a receive behind a sum", SUM, 0, LARGE, RECV, 0, 0},
    {"a blocking send behind a blocking sum", SUM, 1, LARGE, SEND, 1, 0},
    {"a send behind a small blocking sum", SUM, 1, 1, SEND, 0, 0},
    {"a blocking receive behind a small blocking sum", SUM, 1, 1, RECV, 1, 0},
    {"a receive that outlasts a receive", RECV, 0, 1, RECV, 0, 1},
    {"a receive that outlasts a small blocking sum", SUM, 1, 1, RECV, 0, 1},
};

/* The other ranks: the call that answers rank 0's, `what` as rank 0 sees it. */
static hfreduceResult_t answer(hfreduceComm_t comm, int rank, enum what what, float *x, size_t count) {
  if (what == SUM) return call(comm, SUM, x, count, 0);
  return rank != 1 ? hfreduceSuccess : call(comm, what == SEND ? RECV : SEND, x, count, 0);
}

static int second_launch(hfreduceComm_t comm, int rank, int n, int step, const struct seconds *s, float *x, float *y) {
  size_t second_count = s->second == SUM ? 1 : LARGE;
  for (size_t i = 0; i < LARGE; i++) x[i] = y[i] = (float)(rank + 1);
  if (rank) {
    if (!s->second_later) OK(answer(comm, rank, s->second, y, second_count));
    UNTIL(!s->second_later || reached(0, step));
    OK(answer(comm, rank, s->first, x, s->first_count));
    UNTIL(!s->second_later || reached(0, step + 1));
    if (s->second_later) OK(answer(comm, rank, s->second, y, second_count));
  } else {
    struct waiter w = {.comm = comm, .what = s->first, .blocking = s->first_blocks, .peer = 1, .count = s->first_count, .x = x};
    hfreduceWork_t work;
    WANT(begin_waiter(&w) == 0);
    UNTIL(atomic_load(&comm->engine.driver) && atomic_load(&comm->arena.ctrl[comm->arena.local].sleeping));
    usleep(20000); /* it is on its way to sleep, or there */
    if (s->second_blocks) {
      OK(call(comm, s->second, y, second_count, 1));
    } else {
      OK(launch(comm, s->second, y, second_count, 1, &work));
      reach(0, step);
      if (s->second_later) WANT(end_waiter(&w) == 0);
      reach(0, step + 1);
      OK(poll_work(work));
    }
    if (!s->second_later) WANT(end_waiter(&w) == 0);
  }
  float sum = (float)(n * (n + 1) / 2);
  if (s->first == SUM) WANT(x[s->first_count - 1] == sum);
  if (s->first == RECV && rank == 0) WANT(x[0] == 2);
  if (s->second == SUM) WANT(y[0] == sum);
  if (s->second == SEND && rank == 1) WANT(y[LARGE - 1] == 1);
  if (s->second == RECV && rank == 0) WANT(y[LARGE - 1] == 2);
  return 0;
}

static int second_thread(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  (void)arg;
  float *x = malloc(LARGE * sizeof *x), *y = malloc(LARGE * sizeof *y);
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  for (size_t i = 0; i < sizeof seconds / sizeof *seconds; i++) {
    if (second_launch(comm, rank, n, 1 + 2 * (int)i, &seconds[i], x, y))
      return fprintf(stderr, "rank %d: %s\n", rank, seconds[i].name), 1;
  }
  OK(hfreduceCommDestroy(comm));
  free(x);
  free(y);
  return 0;
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    rank_function function;
  } test[] = {{"second_thread", second_thread}};
  static char *preset[] = {"2", "3", "1,1", "2,1"};
  size_t tests = sizeof test / sizeof *test, n = argc > 1 ? (size_t)argc - 1 : sizeof preset / sizeof *preset;
  char **layouts = argc > 1 ? argv + 1 : preset;
  hfr_nap_ns = 600000000000;
  shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  for (size_t t = 0; t < tests; t++)
    for (size_t i = 0; i < n; i++) {
      memset(shared, 0, sizeof *shared);
      CHECK(run_processes(layouts[i], test[t].function, NULL, 20) == 0, "%s, nodes %s", test[t].name, layouts[i]);
    }
  if (argc > 1) return check_done();
  for (size_t t = 0; t < tests; t++) { /* last: a process with threads does not fork well */
    memset(shared, 0, sizeof *shared);
    CHECK(run_threads(2, test[t].function, NULL, 20) == 0, "%s, 2 threads", test[t].name);
  }
  return check_done();
}
