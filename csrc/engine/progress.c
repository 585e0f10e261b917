/* Who drives engines: the blocked caller itself, or the one progress thread of the process. */
#include "engine.h"
#include "internal.h"

#include "../base/log.h"
#include "../base/thread.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>

int64_t hfr_nap_ns = 50000000; /* longest sleep: deadlines and departures are looked at this often */
void (*_Atomic hfr_before_rest)(void);
/* A device rings no bell. So sleeps that wait for its words are short: from the first of these they grow with the time waited to
 * the last, which takes 30 ms, and a core is idle to 97 % meanwhile. */
#define FIRST_LOOK_NS 20000ll
#define LOOK_NS 1000000ll
#define LATER_BY 32     /* a sleep ends too late by no more than this part of the time waited */
#define SLACK_NS 1000ul /* by which the system may lengthen sleeps that wait for a device; its preset is 50 us */
/* With nothing to drive the progress thread naps an eighth as long as it has had nothing, from the first of these to the last,
 * and then sleeps until it is woken. To wake it takes as long as several launches: so those that follow each other need not. */
#define FIRST_REST_NS 100000ll
#define LAST_REST_NS 1000000ll
#define CHECK_EVERY 4096 /* idle polls between looks at the clock while spinning */
/* Even where each rank could have a core of its own, the system may have put two on one for a while: then who spins keeps the
 * other from what he waits for. So long waits let others have a turn now and then; where nobody wants it, that takes 0.3 us. */
#define UNSHARED_POLLS 128
#define TURN_EVERY 64

static struct {
  pthread_mutex_t lock; /* list, started */
  pthread_mutex_t busy; /* held by the thread while it touches engines */
  struct hfr_engine *list;
  _Atomic int started;
  int kick_fd;
  _Atomic int rest;     /* enum hfr_rest, of the thread */
  _Atomic int launched; /* something has been launched since the thread looked */
  _Atomic int waiting;  /* threads that want `busy`: mutexes are not fair, so the thread stands back for them */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .busy = PTHREAD_MUTEX_INITIALIZER, .kick_fd = -1};

static int try_drive(struct hfr_engine *e) {
  int free_ = 0;
  return atomic_compare_exchange_strong_explicit(&e->driver, &free_, 1, memory_order_acquire, memory_order_relaxed);
}
static void stop_driving(struct hfr_engine *e) { atomic_store_explicit(&e->driver, 0, memory_order_release); }

int64_t hfr_longer_nap(int64_t ns) {
  ns = ns ? ns + ns / LATER_BY : FIRST_LOOK_NS;
  return ns < LOOK_NS ? ns : LOOK_NS;
}

int hfr_engine_stirs(struct hfr_engine *e) {
  int stirs = 0;
  for (int i = 0; i < 2; i++) {
    const _Atomic uint32_t *word = atomic_load_explicit(&e->started[i], memory_order_acquire);
    uint32_t now = word ? atomic_load_explicit(word, memory_order_relaxed) : 0;
    stirs |= now != atomic_exchange_explicit(&e->started_seen[i], now, memory_order_relaxed);
  }
  return stirs;
}

static void sleep_in(struct hfr_waitset *set, int64_t ns) {
  struct timespec t = {ns / 1000000000, ns % 1000000000};
  ppoll(set->fd, (nfds_t)set->n, ns < 0 ? NULL : &t, NULL);
}

static void nap(struct hfr_engine *e, struct hfr_backoff *b, int (*look)(struct hfr_engine *, void *), void *arg) {
  int armed = atomic_load_explicit(&e->armed, memory_order_relaxed) != 0; /* a graph's bell wakes the progress thread only */
  int64_t ns = hfr_nap_ns;
  if (armed || hfr_engine_looks(e)) ns = b->nap_ns = hfr_longer_nap(b->nap_ns);
  int64_t left = b->until_ns ? b->until_ns - hfr_now_ns() : ns;
  if (left < ns) ns = left > 0 ? left : 0;
  struct hfr_waitset set;
  set.n = set.ready = 0;
  enum hfr_sleep how = e->layout->nnodes == 1 ? HFR_SLEEP_FUTEX : HFR_SLEEP_POLL;
  atomic_store_explicit(&e->parked, e->queue != NULL, memory_order_relaxed);
  atomic_store_explicit(&e->napping, 1, memory_order_relaxed);
  uint32_t bell = hfr_arena_sleep_begin(e->arena, how); /* a fence: who launches now finds us, or we find the inbox full */
  if (!atomic_load_explicit(&e->inbox_full, memory_order_relaxed) && !look(e, arg)) {
    if (how == HFR_SLEEP_FUTEX) {
      hfr_arena_sleep_futex(e->arena, bell, ns);
    } else {
      hfr_engine_want(e, &set);
      if (set.n == sizeof set.fd / sizeof *set.fd) set.n--;
      set.fd[set.n++] = (struct pollfd){e->arena->bell_fd, POLLIN, 0};
      sleep_in(&set, set.ready ? 0 : ns);
    }
  }
  atomic_store_explicit(&e->napping, 0, memory_order_relaxed);
  atomic_store_explicit(&e->parked, 0, memory_order_relaxed);
  atomic_thread_fence(memory_order_seq_cst); /* who took us for asleep and left us his launch has counted it: leave() sees that */
  hfr_arena_sleep_end(e->arena);
}

void hfr_backoff_wait(struct hfr_engine *e, struct hfr_backoff *b, int (*look)(struct hfr_engine *, void *), void *arg) {
  int idle = ++b->idle;
  if (idle < e->spins) {
    hfr_cpu_relax();
    if (idle >= UNSHARED_POLLS && idle % TURN_EVERY == 0) sched_yield();
    if (idle % CHECK_EVERY) return;
  } else if (idle < e->spins + e->yields) {
    sched_yield();
    return;
  } else {
    if (idle == e->spins + e->yields) b->nap_ns = 0;
    nap(e, b, look, arg);
  }
  hfr_engine_check(e, hfr_now_ns());
}

/* ---------------------------------------------------------------- in the caller's thread */

struct until {
  struct hfreduceWork *work;
};

static int look_for_progress(struct hfr_engine *e, void *arg) {
  struct until *u = arg;
  return hfr_engine_progress(e) || atomic_load_explicit(&u->work->done, memory_order_acquire);
}

int hfr_drive_begin(struct hfr_engine *e) { return try_drive(e); }

/* Stop driving. What is left is the progress thread's: at once, if somebody waits for it beside `guests` who leave. */
static void leave(struct hfr_engine *e, uint32_t guests) {
  stop_driving(e);
  if (!atomic_load_explicit(&e->active, memory_order_acquire)) return;
  atomic_thread_fence(memory_order_seq_cst); /* who comes now is seen here, or finds that nobody drives */
  if (atomic_load_explicit(&e->guests, memory_order_relaxed) > guests)
    hfr_drive_async(e);
  else
    hfr_drive_soon(e, 0);
}

void hfr_drive_end(struct hfr_engine *e) { leave(e, 0); }

/* As the driver. */
static int drive(struct hfr_engine *e, struct hfreduceWork *work, int64_t deadline_ns) {
  struct until u = {work};
  struct hfr_backoff b = {.until_ns = deadline_ns > 0 ? deadline_ns : 0};
  int done;
  while (!(done = (int)atomic_load_explicit(&work->done, memory_order_acquire))) {
    if (hfr_engine_progress(e)) {
      b.idle = 0;
      continue;
    }
    hfr_backoff_wait(e, &b, look_for_progress, &u);
    if (deadline_ns >= 0 && b.idle > e->spins && hfr_now_ns() >= deadline_ns) break;
  }
  return done;
}

/* Do what can be done now, if nobody drives. */
static void drive_once(struct hfr_engine *e) {
  if (!try_drive(e)) return;
  hfr_engine_progress(e);
  hfr_engine_check(e, hfr_now_ns());
  hfr_engine_progress(e); /* what was found to be late has ended */
  stop_driving(e);
}

/* Another thread drives the engine. Where there is no progress thread, nobody may when that one has what it waits for. */
static int wait_as_guest(struct hfr_engine *e, struct hfreduceWork *work, int64_t deadline_ns) {
  while (!atomic_load_explicit(&pool.started, memory_order_relaxed)) {
    int64_t soon = hfr_now_ns() + LOOK_NS, last = deadline_ns >= 0 && deadline_ns <= soon;
    if (hfr_work_wait(work, last ? deadline_ns : soon)) return 1;
    if (last) return 0;
    drive_once(e);
  }
  return hfr_work_wait(work, deadline_ns);
}

int hfr_drive_until(struct hfr_engine *e, struct hfreduceWork *work, int64_t deadline_ns) {
  if (!try_drive(e)) {
    atomic_fetch_add(&e->guests, 1);
    hfr_drive_async(e);
    int ended = wait_as_guest(e, work, deadline_ns);
    atomic_fetch_sub(&e->guests, 1);
    return ended;
  }
  int done = drive(e, work, deadline_ns);
  hfr_drive_end(e);
  return done;
}

/* The engine may be gone after it. */
static void end_as_guest(struct hfr_engine *e) {
  leave(e, 1);
  atomic_fetch_sub(&e->guests, 1);
}

#define STEAL_TRIES 64 /* the progress thread holds an engine for one pass at a time, unless it sleeps with it */

/* The engine of an unfinished work, which stays until the guest has left. NULL: it has ended, or has several. */
static struct hfr_engine *enter_as_guest(struct hfreduceWork *work) {
  struct hfr_engine *e = NULL;
  pthread_mutex_lock(&pool.lock); /* pairs with hfr_drive_stop(): an engine with unfinished work has not got past it */
  if (!atomic_load_explicit(&work->done, memory_order_acquire) && work->engine) {
    e = work->engine;
    atomic_fetch_add(&e->guests, 1);
  }
  pthread_mutex_unlock(&pool.lock);
  return e;
}

int hfr_work_drive(struct hfreduceWork *work, int64_t deadline_ns) {
  struct hfr_engine *e = enter_as_guest(work);
  int done = 0;
  if (e) {
    for (int i = 0; i < STEAL_TRIES && !(done = (int)atomic_load_explicit(&work->done, memory_order_acquire)); i++) {
      if (try_drive(e)) {
        done = drive(e, work, deadline_ns);
        end_as_guest(e);
        return done;
      }
      hfr_cpu_relax();
    }
    if (!done) done = wait_as_guest(e, work, deadline_ns);
    atomic_fetch_sub(&e->guests, 1);
    return done;
  }
  return hfr_work_wait(work, deadline_ns);
}

void hfr_work_look(struct hfreduceWork *work) {
  if (atomic_load_explicit(&pool.started, memory_order_relaxed)) return;
  struct hfr_engine *e = enter_as_guest(work);
  if (!e) return;
  drive_once(e);
  atomic_fetch_sub(&e->guests, 1);
}

int hfr_work_wait(struct hfreduceWork *work, int64_t deadline_ns) {
  int done = (int)atomic_load_explicit(&work->done, memory_order_acquire);
  if (done) return 1;
  atomic_fetch_add_explicit(&work->sleepers, 1, memory_order_seq_cst); /* before the next look; pairs with finish() */
  while (!(done = (int)atomic_load_explicit(&work->done, memory_order_seq_cst))) {
    int64_t left = deadline_ns < 0 ? -1 : deadline_ns - hfr_now_ns();
    if (deadline_ns >= 0 && left <= 0) break;
    hfr_futex_wait(&work->done, 0, left);
  }
  atomic_fetch_sub_explicit(&work->sleepers, 1, memory_order_relaxed);
  return done;
}

/* ---------------------------------------------------------------- the progress thread */

#define MAX_ENGINES 256

/* One pass over the engines. Those in `held` are driven by us already. *mine: how many we could drive. */
static int pass(struct hfr_engine **engine, int n, const char *held, int *mine) {
  int moved = 0;
  *mine = 0;
  for (int i = 0; i < n; i++) {
    if (!held && !try_drive(engine[i])) continue;
    if (held && !held[i]) continue;
    ++*mine;
    moved |= hfr_engine_progress(engine[i]);
    if (!held) stop_driving(engine[i]);
  }
  return moved;
}

/* What the thread remembers from one sleep to the next. */
struct sleeper {
  char held[MAX_ENGINES]; /* engines that it drives while it sleeps */
  int nheld, looks;       /* looks: some of them wait for a device */
  int64_t nap_ns;         /* of the last sleep in a row that waited for a device */
  int64_t stirred_ns;     /* when a device, or what waits for one, last moved */
  int tight;              /* the system may lengthen a sleep by SLACK_NS only */
  int had_work;
  int64_t rest_ns; /* of the next sleep with nothing to drive */
  struct hfr_waitset set;
};

static void hold(struct sleeper *s, struct hfr_engine **engine, int n) {
  int64_t now = hfr_now_ns();
  s->nheld = 0;
  for (int i = 0; i < n; i++) {
    s->held[i] = (char)try_drive(engine[i]);
    if (!s->held[i]) continue;
    s->nheld++;
    hfr_engine_check(engine[i], now);
    hfr_arena_sleep_begin(engine[i]->arena, HFR_SLEEP_POLL);
    atomic_store_explicit(&engine[i]->parked, engine[i]->queue != NULL, memory_order_relaxed);
  }
}

static void let_go(struct sleeper *s, struct hfr_engine **engine, int n) {
  for (int i = 0; i < n; i++) {
    if (!s->held[i]) continue;
    atomic_store_explicit(&engine[i]->parked, 0, memory_order_relaxed);
    hfr_arena_sleep_end(engine[i]->arena);
    stop_driving(engine[i]);
  }
}

/* How long to sleep with nothing to drive; < 0: until woken. n engines have work, of which we hold some. */
static int64_t rest_ns(struct sleeper *s, int n) {
  if (atomic_exchange_explicit(&pool.launched, 0, memory_order_relaxed) || (s->had_work && !n)) s->rest_ns = FIRST_REST_NS;
  s->had_work = n > 0;
  if (s->nheld) return hfr_nap_ns;
  int64_t ns = s->rest_ns;
  if (ns < LAST_REST_NS)
    s->rest_ns += ns / 8;
  else if (!n)
    return -1;
  return ns;
}

/* Only a wait for a device is worth it: where the callers drive, a progress thread that wakes earlier takes their core. */
static void set_slack(struct sleeper *s, int tight) {
  if (s->tight == tight) return;
  prctl(PR_SET_TIMERSLACK, tight ? SLACK_NS : 0ul); /* 0: the preset */
  s->tight = tight;
}

static void sleep_on_bells(struct sleeper *s, struct hfr_engine **engine, int n, int64_t ns) {
  struct hfr_waitset *set = &s->set;
  set->n = set->ready = 0;
  for (int i = 0; i < n; i++) {
    if (!s->held[i]) continue;
    hfr_engine_want(engine[i], set);
    if (set->n < (int)(sizeof set->fd / sizeof *set->fd) - 1)
      set->fd[set->n++] = (struct pollfd){engine[i]->arena->bell_fd, POLLIN, 0};
  }
  if (set->n == sizeof set->fd / sizeof *set->fd) set->n--;
  set->fd[set->n++] = (struct pollfd){pool.kick_fd, POLLIN, 0};
  if (!n) pthread_mutex_unlock(&pool.busy);
  sleep_in(set, set->ready ? 0 : ns);
  if (!n) pthread_mutex_lock(&pool.busy);
}

/* Has the list changed since n engines were found on it? */
static int list_changed(int n) {
  int listed = 0;
  pthread_mutex_lock(&pool.lock);
  for (struct hfr_engine *e = pool.list; e; e = e->next_active) listed++;
  pthread_mutex_unlock(&pool.lock);
  return listed != n && n < MAX_ENGINES;
}

static void sleep_in_poll(struct sleeper *s, struct hfr_engine **engine, int n) {
  int mine;
  hold(s, engine, n);
  int64_t ns = rest_ns(s, n);
  void (*before_rest)(void) = atomic_load_explicit(&hfr_before_rest, memory_order_relaxed);
  if (before_rest) before_rest();
  /* Pairs with hfr_drive_kick() and hfr_drive_soon(): they write to us, or we see the request in this pass. */
  atomic_store_explicit(&pool.rest, s->nheld || ns < 0 ? HFR_THREAD_ASLEEP : HFR_THREAD_NAPPING, memory_order_seq_cst);
  atomic_thread_fence(memory_order_seq_cst);
  int moved = list_changed(n) | pass(engine, n, s->held, &mine);
  for (int i = 0; i < n; i++) /* whoever drove it may have left it to us when we were still awake */
    if (!s->held[i] && !atomic_load_explicit(&engine[i]->driver, memory_order_seq_cst)) moved = 1;
  s->looks = 0; /* after the pass, which may have taken in what waits for a device */
  for (int i = 0; i < n; i++) s->looks |= hfr_engine_looks(engine[i]);
  if (s->looks) s->nap_ns = hfr_longer_nap(s->nap_ns);
  set_slack(s, s->looks != 0);
  if (!moved) sleep_on_bells(s, engine, n, !s->nheld ? ns : s->looks ? s->nap_ns : hfr_nap_ns);
  atomic_store_explicit(&pool.rest, HFR_THREAD_AWAKE, memory_order_seq_cst);
  uint64_t drain;
  (void)!read(pool.kick_fd, &drain, sizeof drain);
  let_go(s, engine, n);
}

/* Engines that have work; those that ran dry leave the list. */
static int snapshot(struct hfr_engine **engine) {
  int n = 0;
  pthread_mutex_lock(&pool.lock);
  for (struct hfr_engine **at = &pool.list; *at;) {
    struct hfr_engine *e = *at;
    if (!atomic_load_explicit(&e->active, memory_order_acquire) && !atomic_load_explicit(&e->armed, memory_order_acquire) &&
        !atomic_load_explicit(&e->inbox_full, memory_order_acquire)) {
      *at = e->next_active;
      e->listed = 0;
      continue;
    }
    if (n < MAX_ENGINES) engine[n++] = e;
    at = &e->next_active;
  }
  pthread_mutex_unlock(&pool.lock);
  return n;
}

/* Is a device at work, so that its words will move before a sleep would be over? moved: a pass has just moved something. */
static int is_stirring(struct sleeper *s, struct hfr_engine **engine, int n, int moved) {
  int looks = 0, stirs = 0;
  for (int i = 0; i < n; i++) looks |= hfr_engine_looks(engine[i]);
  if (!looks) return 0;
  for (int i = 0; i < n; i++) stirs |= hfr_engine_stirs(engine[i]);
  int64_t now = hfr_now_ns();
  if (stirs || moved) s->stirred_ns = now, s->nap_ns = 0;
  return now - s->stirred_ns < HFR_STIR_NS;
}

static void *progress_main(void *arg) {
  struct hfr_engine *engine[MAX_ENGINES];
  struct sleeper sleeper = {.rest_ns = FIRST_REST_NS};
  int idle = 0, moved = 0;
  (void)arg;
  prctl(PR_SET_NAME, "hfr-progress");
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, NULL);
  for (;;) {
    while (atomic_load_explicit(&pool.waiting, memory_order_relaxed)) sched_yield();
    pthread_mutex_lock(&pool.busy);
    int n = snapshot(engine), patience = 0, yields = 0, mine;
    for (int i = 0; i < n; i++) {
      if (engine[i]->spins > patience) patience = engine[i]->spins;
      if (engine[i]->yields > yields) yields = engine[i]->yields;
    }
    patience /= 8; /* the caller computes meanwhile: leave it the core soon */
    if (pass(engine, n, NULL, &mine)) {
      idle = 0;
      moved = 1;
    } else if (mine && ++idle < patience) {
      hfr_cpu_relax();
    } else if (mine && idle < patience + yields) {
      sched_yield();
    } else if (mine && is_stirring(&sleeper, engine, n, moved)) {
      moved = 0;
      sched_yield();
    } else { /* also while those who wait drive themselves: we would only take their core */
      moved = 0;
      sleep_in_poll(&sleeper, engine, n);
      idle = sleeper.looks ? patience + yields : 0; /* a short sleep: no spinning again */
    }
    pthread_mutex_unlock(&pool.busy);
  }
  return NULL;
}

/* Under pool.lock. */
static int ensure_thread(void) {
  if (pool.started) return 0;
  pool.kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  pthread_attr_t attr;
  pthread_t thread;
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, 512 * 1024);
  int error = pool.kick_fd < 0 ? errno : pthread_create(&thread, &attr, progress_main, NULL);
  pthread_attr_destroy(&attr);
  if (error && pool.kick_fd >= 0) close(pool.kick_fd);
  if (error)
    pool.kick_fd = -1;
  else
    atomic_store(&pool.started, 1);
  return error;
}

hfreduceResult_t hfr_drive_ready(void) {
  if (atomic_load_explicit(&pool.started, memory_order_relaxed)) return hfreduceSuccess;
  pthread_mutex_lock(&pool.lock);
  int error = ensure_thread();
  pthread_mutex_unlock(&pool.lock);
  if (!error) return hfreduceSuccess;
  return hfr_fail(hfreduceSystemError,
                  "cannot start the progress thread, which drives operations that nobody waits for: %s; see the limits of "
                  "threads and memory (ulimit -u, -v), or make blocking calls",
                  hfr_errno_text(error));
}

static void write_kick(void) {
  uint64_t one = 1;
  if (pool.kick_fd < 0) return;
  (void)!write(pool.kick_fd, &one, sizeof one);
}

/* Pairs with sleep_in_poll(): the thread sees what we have written, or we see that it sleeps. */
static int rest_of_thread(void) {
  atomic_thread_fence(memory_order_seq_cst);
  return atomic_load_explicit(&pool.rest, memory_order_seq_cst);
}

enum hfr_rest hfr_drive_rest(void) { return (enum hfr_rest)rest_of_thread(); }

void hfr_drive_kick(void) {
  if (rest_of_thread() != HFR_THREAD_AWAKE) write_kick();
}

/* 0: there is no thread, and none can be started. */
static int list_engine(struct hfr_engine *e) {
  pthread_mutex_lock(&pool.lock);
  int there = !ensure_thread();
  if (!e->listed) {
    e->listed = 1;
    e->next_active = pool.list;
    pool.list = e;
  }
  pthread_mutex_unlock(&pool.lock);
  return there;
}

/* Wake whoever sleeps with it: a caller, or the progress thread; `rest` is the thread's. */
static void wake_driver(struct hfr_engine *e, int rest) {
  if (atomic_load_explicit(&e->napping, memory_order_relaxed))
    hfr_engine_wake(e); /* and the thread is told when he leaves */
  else if (rest != HFR_THREAD_AWAKE)
    write_kick();
}

void hfr_drive_async(struct hfr_engine *e) {
  if (!list_engine(e)) drive_once(e); /* those who wait for it come again */
  wake_driver(e, rest_of_thread());
}

void hfr_drive_soon(struct hfr_engine *e, int in_line) {
  list_engine(e);
  atomic_store_explicit(&pool.launched, 1, memory_order_relaxed);
  int rest = rest_of_thread();
  if (in_line && atomic_load_explicit(&e->parked, memory_order_relaxed)) return;
  wake_driver(e, rest == HFR_THREAD_ASLEEP ? rest : HFR_THREAD_AWAKE); /* from a nap it looks by itself */
}

static void unlist_engine(struct hfr_engine *e) {
  pthread_mutex_lock(&pool.lock);
  for (struct hfr_engine **at = &pool.list; *at; at = &(*at)->next_active)
    if (*at == e) {
      *at = e->next_active;
      break;
    }
  e->listed = 0;
  pthread_mutex_unlock(&pool.lock);
}

/* A pass of the progress thread that still knows the engine is over. */
static void await_pass(struct hfr_engine *e) {
  hfr_drive_kick();
  hfr_engine_wake(e);
  atomic_fetch_add(&pool.waiting, 1);
  pthread_mutex_lock(&pool.busy);
  pthread_mutex_unlock(&pool.busy);
  atomic_fetch_sub(&pool.waiting, 1);
}

/* Nobody waits for a work of the engine any more. Those that do are on their way out; they may list it once more. */
static int no_guests(struct hfr_engine *e) {
  pthread_mutex_lock(&pool.lock); /* pairs with hfr_work_drive() */
  int guests = (int)atomic_load(&e->guests);
  pthread_mutex_unlock(&pool.lock);
  return !guests;
}

void hfr_drive_stop(struct hfr_engine *e) {
  /* All requests have ended, but the work of the last one may not know it before the pass in which it ended is over. Until then
   * somebody may begin to wait for it. */
  do {
    while (!no_guests(e)) sched_yield();
    unlist_engine(e);
    await_pass(e);
  } while (!no_guests(e));
}

void hfr_drive_after_fork(void) {
  if (pool.kick_fd >= 0) close(pool.kick_fd);
  memset(&pool, 0, sizeof pool);
  pthread_mutex_init(&pool.lock, NULL);
  pthread_mutex_init(&pool.busy, NULL);
  pool.kick_fd = -1;
}

void hfr_engine_wake(struct hfr_engine *e) { hfr_arena_ring(e->arena, e->arena->local); }
