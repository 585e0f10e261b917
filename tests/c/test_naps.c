/*
 * Who sleeps is woken: the progress thread in each state of rest, and a caller
 * that naps while it drives. Here a sleep lasts ten minutes unless somebody
 * ends it, so whoever is forgotten hangs until the time limit of his test.
 * Arguments: the layouts to run.
 */
#include "check.h"
#include "ranks.h"

#include "comm/comm.h"
#include "engine/internal.h"

#include <dirent.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define UNTIL(condition) \
  while (!(condition)) usleep(200)

#define LARGE 2000000 /* floats of a message that leaves only while it is taken */
#define RANKS_MAX 8

/* What the ranks tell each other beside the library, which must not be woken by
 * it. */
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

/* Wait for a work as who computes does: nobody drives but the progress thread.
 * Gives it back. */
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

static int sleeps_with(hfreduceComm_t comm) { return atomic_load(&comm->engine.parked) && hfr_drive_rest() == HFR_THREAD_ASLEEP; }

/* ---------------------------------------------------------------- a caller
 * that naps */

/* A thread of a rank that waits for a call of its own. */
struct waiter {
  pthread_t thread;
  hfreduceComm_t comm;
  enum what what;
  int blocking; /* the call itself blocks; else it is launched, and waited for
                 */
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

/* Rank 0 has a thread that drives and naps, since what it waits for comes only
   after its main thread's own call. Nobody but that thread can make this call
   move, and nothing but the call itself can wake it. */
static const struct seconds {
  const char *name;
  enum what first;
  int first_blocks;
  size_t first_count;
  enum what second;
  int second_blocks;
  int second_later; /* the first one ends before it, and its thread leaves the
                       other to the progress thread */
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

/* ---------------------------------------------------------------- the progress
 * thread by itself */

/* Nobody waits for what was launched, at whatever moment of the thread's rest
 * that was. */
static int unattended(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  hfreduceWork_t work;
  float *x = malloc(300000 * sizeof *x);
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  for (int i = 0; i < 60; i++) {
    size_t count = i % 5 ? 10 : 300000;
    for (size_t j = 0; j < count; j++) x[j] = 1;
    usleep((useconds_t)((i * 211 + rank * 977) % 13000));
    OK(launch(comm, SUM, x, count, 0, &work));
    OK(poll_work(work));
    WANT(x[0] == (float)n && x[count - 1] == (float)n);
  }
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

#define MANY 300

/* Launches that find the thread asleep, and more behind them while it wakes,
 * works and naps. */
static int asleep(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  hfreduceWork_t work[MANY];
  float *x = malloc(MANY * sizeof *x);
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  OK(launch(comm, SUM, x, 1, 0, &work[0])); /* starts the thread */
  OK(poll_work(work[0]));
  for (int round = 0; round < 8; round++) {
    int many = round % 2 ? MANY : 1;
    UNTIL(hfr_drive_rest() == HFR_THREAD_ASLEEP);
    for (int i = 0; i < many; i++) {
      x[i] = 1;
      if (i == MANY / 2) usleep(3000);
      OK(launch(comm, SUM, &x[i], 1, 0, &work[i]));
    }
    for (int i = 0; i < many; i++) {
      OK(poll_work(work[i]));
      WANT(x[i] == (float)n);
    }
  }
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

/* How often the progress thread has gone to sleep, as the kernel counts it; -1 while it is awake. */
static long sleeps(void) {
  DIR *tasks = opendir("/proc/self/task");
  long count = -1;
  for (struct dirent *task; tasks && count < 0 && (task = readdir(tasks));) {
    char path[300], line[200];
    int ours = 0, asleep = 0;
    snprintf(path, sizeof path, "/proc/self/task/%s/status", task->d_name);
    FILE *status = fopen(path, "r");
    while (status && fgets(line, sizeof line, status)) {
      ours |= !strcmp(line, "Name:\thfr-progress\n");
      asleep |= !strncmp(line, "State:\tS", 8);
      if (ours && asleep) sscanf(line, "voluntary_ctxt_switches: %ld", &count);
    }
    if (status) fclose(status);
  }
  if (tasks) closedir(tasks);
  return count;
}

/* The thread sleeps with rank 0's engine until the others come to its sum. What
   is behind the sum in line may let it sleep; a send may not: the others take
   it before they come. */
static int parked(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  enum { SUMS = 6 };
  hfreduceComm_t comm;
  hfreduceWork_t work[SUMS], send;
  float x[SUMS], *y = calloc(LARGE, sizeof *y);
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  for (int round = 0; round < 4; round++) {
    for (int i = 0; i < SUMS; i++) x[i] = 1;
    if (rank) {
      UNTIL(reached(0, round + 1));
      if (rank == 1) OK(call(comm, RECV, y, LARGE, 0));
    }
    for (int r = 1; !rank && r < n; r++) UNTIL(reached(r, round)); /* who still ends the last round would wake it */
    OK(launch(comm, SUM, &x[0], 1, 0, &work[0]));
    long slept = 0;
    UNTIL(rank || (sleeps_with(comm) && (slept = sleeps()) >= 0));
    for (int i = 1; i < SUMS; i++) OK(launch(comm, SUM, &x[i], 1, 0, &work[i]));
    if (!rank) {
      usleep(5000);                                       /* had it been woken, it would have run */
      WANT(comm->layout.nnodes > 1 || sleeps() == slept); /* a connection that comes up wakes it */
      y[LARGE - 1] = (float)round;
      OK(launch(comm, SEND, y, LARGE, 1, &send));
      reach(0, round + 1);
      OK(poll_work(send));
    }
    for (int i = 0; i < SUMS; i++) {
      OK(poll_work(work[i]));
      WANT(x[i] == (float)n);
    }
    WANT(rank > 1 || y[LARGE - 1] == (float)round);
    if (rank) reach(rank, round + 1);
  }
  OK(hfreduceCommDestroy(comm));
  free(y);
  return 0;
}

/* It sleeps with one engine, and works for another all the same. */
static int two_communicators(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t quiet, busy;
  hfreduceWork_t waits, work;
  float x = 1, y;
  (void)arg;
  OK(hfreduceCommInitRank(&quiet, n, *id, rank));
  OK(hfreduceCommSplit(quiet, 0, rank, &busy, NULL));
  if (!rank) {
    OK(launch(quiet, SUM, &x, 1, 0, &waits));
    UNTIL(sleeps_with(quiet));
  }
  for (int i = 0; i < 40; i++) {
    y = 1;
    usleep((useconds_t)((i * 131 + rank * 377) % 3000));
    OK(launch(busy, SUM, &y, 1, 0, &work));
    OK(poll_work(work));
    WANT(y == (float)n);
  }
  if (!rank) {
    int done;
    OK(hfreduceWorkTest(waits, &done));
    WANT(!done);
    UNTIL(sleeps_with(quiet));
    reach(0, 1);
  } else {
    UNTIL(reached(0, 1));
    OK(launch(quiet, SUM, &x, 1, 0, &waits));
  }
  OK(poll_work(waits));
  WANT(x == (float)n);
  OK(hfreduceCommDestroy(busy));
  OK(hfreduceCommDestroy(quiet));
  return 0;
}

/* While it sleeps with one engine another is destroyed; then its own is
 * aborted, by this rank and by another one. */
static int leaving(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm, child, mine, theirs;
  hfreduceWork_t waits, work;
  float x = 1, y = 1;
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  OK(hfreduceCommSplit(comm, 0, rank, &mine, NULL));
  OK(hfreduceCommSplit(comm, 0, rank, &theirs, NULL));
  OK(hfreduceCommSplit(comm, 0, rank, &child, NULL));
  OK(launch(child, SUM, &y, 1, 0, &work));
  OK(poll_work(work));
  hfreduceComm_t waiting = rank ? theirs : mine;
  OK(launch(waiting, SUM, &x, 1, 0, &waits));
  if (n == 2) UNTIL(sleeps_with(waiting)); /* more would wait for each other */
  OK(hfreduceCommDestroy(child));
  reach(rank, 1);
  if (!rank) {
    for (int r = 1; r < n; r++) UNTIL(reached(r, 1));
    if (n == 2) UNTIL(sleeps_with(mine));
    OK(hfreduceCommAbort(mine));
    WANT(poll_work(waits) == hfreduceAborted);
    OK(hfreduceCommAbort(theirs));
  } else {
    WANT(poll_work(waits) != hfreduceSuccess);
  }
  OK(hfreduceBarrier(comm, NULL)); /* all have heard of it */
  OK(hfreduceCommDestroy(mine));
  OK(hfreduceCommDestroy(theirs));
  OK(hfreduceCommDestroy(comm));
  return 0;
}

/* A child has no thread and no kick of its parent's: it starts its own. */
static int in_child(void) {
  int rank = -1;
  hfreduceUniqueId id;
  hfreduceComm_t comm;
  hfreduceWork_t work;
  float x = 3;
  alarm(10);
  OK(hfreduceGetUniqueIdLocal(&id));
  OK(hfreduceCommInitRank(&comm, 1, id, 0));
  for (int i = 0; i < 3; i++) {
    OK(launch(comm, SUM, &x, 1, 0, &work));
    OK(poll_work(work));
    UNTIL(hfr_drive_rest() == HFR_THREAD_ASLEEP);
  }
  WANT(x == 3);
  OK(hfreduceCommDestroy(comm));
  return 0;
}

static int forking(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  hfreduceWork_t work;
  float x = 1;
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  UNTIL(rank == 0 || reached(0, 1));
  OK(launch(comm, SUM, &x, 1, 0, &work));
  if (!rank) {
    UNTIL(sleeps_with(comm));
#ifndef __SANITIZE_THREAD__ /* which starts no threads after a fork */
    int status;
    pid_t pid = fork();
    if (!pid) _exit(in_child());
    WANT(pid > 0 && waitpid(pid, &status, 0) == pid && status == 0);
    WANT(sleeps_with(comm));
#endif
    reach(0, 1);
  }
  OK(poll_work(work));
  WANT(x == (float)n);
  OK(hfreduceCommDestroy(comm));
  return 0;
}

/* What comes to the progress thread between its last look and its sleep: a call on an engine that sleeps beside it, one on the
 * engine with which it goes to sleep, and one that a caller leaves who drove another engine until then. */
enum { ARMED = 1, INSIDE };
static _Atomic int window;
static _Atomic(struct hfr_engine *) until_left; /* the window closes once nobody drives this engine */

static void hold_window(void) {
  int armed = ARMED;
  if (!atomic_compare_exchange_strong(&window, &armed, INSIDE)) return;
  while (atomic_load(&window) == INSIDE) usleep(200);
  struct hfr_engine *e = atomic_exchange(&until_left, NULL);
  /* Where this thread itself has got the engine, and not the caller, nobody leaves it: such a round shows nothing. */
  for (int i = 0; e && atomic_load(&e->driver) && i < 5000; i++) usleep(200);
}

static void open_window(void) {
  atomic_store(&window, ARMED);
  UNTIL(atomic_load(&window) == INSIDE || (hfr_drive_kick(), 0)); /* the thread goes to sleep again and again */
}

enum { NEW_ENGINE, SAME_ENGINE, LEFT_ENGINE, WINDOWS };

static int in_window(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t quiet, busy;
  hfreduceWork_t waits, work;
  (void)arg;
  if (!rank) hfr_before_rest = hold_window;
  OK(hfreduceCommInitRank(&quiet, n, *id, rank));
  OK(hfreduceCommSplit(quiet, 0, rank, &busy, NULL));
  for (int i = 0; i < 3 * WINDOWS; i++) {
    int what = i % WINDOWS, step = 1 + 3 * i;
    hfreduceComm_t comm = what == SAME_ENGINE ? quiet : busy;
    float x = 1, y = (float)(rank + 1), z = 1;
    if (!rank) {
      struct waiter w = {.comm = busy, .what = SUM, .blocking = 1, .count = 1, .x = &z};
      OK(launch(quiet, RECV, &x, 1, 1, &waits)); /* the thread sleeps with this one */
      if (what == LEFT_ENGINE) {
        WANT(begin_waiter(&w) == 0);
        UNTIL(atomic_load(&busy->engine.driver) && atomic_load(&busy->arena.ctrl[busy->arena.local].sleeping));
        OK(launch(busy, RECV, &y, 1, 1, &work));
        UNTIL(!atomic_load(&busy->engine.inbox_full) && atomic_load(&busy->arena.ctrl[busy->arena.local].sleeping));
        open_window();
        atomic_store(&until_left, &busy->engine);
        reach(0, step); /* the others join the sum, and the thread that drives leaves */
      } else {
        open_window();
        OK(launch(comm, RECV, &y, 1, 1, &work));
      }
      atomic_store(&window, 0);
      if (what == LEFT_ENGINE) WANT(end_waiter(&w) == 0);
      UNTIL(!atomic_load(&comm->engine.inbox_full)); /* the thread has taken up the call, before a message can wake it */
      reach(0, step + 1);
      if (what != SAME_ENGINE) OK(poll_work(work));
      reach(0, step + 2);
      OK(poll_work(waits));
      if (what == SAME_ENGINE) OK(poll_work(work));
      WANT(y == 2);
    } else {
      UNTIL(what != LEFT_ENGINE || reached(0, step));
      if (what == LEFT_ENGINE) OK(call(busy, SUM, &z, 1, 0));
      UNTIL(reached(0, step + 1));
      if (rank == 1 && what != SAME_ENGINE) OK(call(busy, SEND, &y, 1, 0));
      UNTIL(reached(0, step + 2));
      if (rank == 1) OK(call(quiet, SEND, &x, 1, 0));
      if (rank == 1 && what == SAME_ENGINE) OK(call(quiet, SEND, &y, 1, 0));
    }
  }
  OK(hfreduceBarrier(quiet, NULL));
  hfr_before_rest = NULL;
  OK(hfreduceCommDestroy(busy));
  OK(hfreduceCommDestroy(quiet));
  return 0;
}

/* Whoever publishes rings each local rank that sleeps, also where there are more ranks than the bits of a mask. No sleep is
 * needed to see it: a bell that is rung moves, and its socket gets a message. */
static void all_bells(void) {
  enum { LOCAL = 70 };
  static struct hfr_arena a[LOCAL];
  CHECK(!hfr_arena_create(&a[0], LOCAL, 4096, 2, 0));
  for (int r = 1; r < LOCAL; r++) CHECK(!hfr_arena_attach(&a[r], dup(a[0].fd), LOCAL, 4096, 2, 0));
  for (int r = 0; r < LOCAL; r++) CHECK(!hfr_arena_join(&a[r], r));
  for (int sleeper = 0; sleeper < LOCAL; sleeper++)
    for (int publisher = 0; publisher < LOCAL; publisher++) {
      if (publisher == sleeper) continue;
      char message[4];
      enum hfr_sleep how = publisher % 2 ? HFR_SLEEP_FUTEX : HFR_SLEEP_POLL;
      uint32_t bell = hfr_arena_sleep_begin(&a[sleeper], how);
      hfr_arena_notify(&a[publisher]);
      int rung = atomic_load(&a[sleeper].ctrl[sleeper].bell) != bell;
      if (how == HFR_SLEEP_POLL) rung &= recv(a[sleeper].bell_fd, message, sizeof message, MSG_DONTWAIT) == 1;
      CHECK(rung, "local rank %d sleeps, and is not woken by %d", sleeper, publisher);
      hfr_arena_sleep_end(&a[sleeper]);
    }
  for (int r = 0; r < LOCAL; r++) hfr_arena_close(&a[r]);
}

/* A wait with a limit ends by it, also when whoever waits drives and sleeps; and so does patience. */
static int timed(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  hfreduceWork_t work;
  float *x = calloc(LARGE, sizeof *x), small = 1;
  int done;
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  if (rank == 0) {
    hfreduceResult_t r = hfreduceGroupStart();
    for (int i = 1; i < n && !r; i++) r = hfreduceRecv(x + i, 1, hfreduceFloat32, i, comm, NULL);
    OK(r);
    OK(hfreduceGroupEndAsync(&work));
    for (int i = 0; i < 5; i++) WANT(hfreduceWorkWait(work, 0.02) == hfreduceInProgress);
    OK(hfreduceCommSetPatience(comm, 0.05));
    WANT(hfreduceAllReduce(&small, &small, 1, hfreduceFloat32, hfreduceSum, comm, NULL) == hfreduceInProgress);
    OK(hfreduceWorkTest(work, &done));
    WANT(!done);
    hfreduceWork_t second;
    OK(hfreduceTakeWork(&second));
    reach(0, 1);
    OK(hfreduceWorkWait(second, -1));
    OK(hfreduceWorkWait(work, -1));
    hfreduceWorkDestroy(second);
    hfreduceWorkDestroy(work);
  } else {
    UNTIL(reached(0, 1));
    OK(hfreduceSend(&small, 1, hfreduceFloat32, 0, comm, NULL));
    OK(hfreduceAllReduce(&small, &small, 1, hfreduceFloat32, hfreduceSum, comm, NULL));
  }
  WANT(small == (float)n);
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    rank_function function;
  } test[] = {{"second_thread", second_thread},
              {"unattended", unattended},
              {"asleep", asleep},
              {"parked", parked},
              {"two_communicators", two_communicators},
              {"in_window", in_window},
              {"leaving", leaving},
              {"forking", forking},
              {"timed", timed}};
  static char *preset[] = {"2", "3", "1,1", "2,1"};
  size_t tests = sizeof test / sizeof *test, n = argc > 1 ? (size_t)argc - 1 : sizeof preset / sizeof *preset;
  char **layouts = argc > 1 ? argv + 1 : preset;
  hfr_nap_ns = 600000000000;
  shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  for (size_t t = 0; t < tests; t++)
    for (size_t i = 0; i < n; i++) {
      memset(shared, 0, sizeof *shared);
      CHECK(run_processes(layouts[i], test[t].function, NULL, 40) == 0, "%s, nodes %s", test[t].name, layouts[i]);
    }
  if (argc > 1) return check_done();
  all_bells();
  for (size_t t = 0; t < tests; t++) {           /* last: a process with threads does not fork well */
    if (test[t].function == in_window) continue; /* ranks that share a progress thread would wait for each other in the window */
    memset(shared, 0, sizeof *shared);
    CHECK(run_threads(2, test[t].function, NULL, 40) == 0, "%s, 2 threads", test[t].name);
  }
  return check_done();
}
