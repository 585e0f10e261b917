/* The table of communicators, and the words by which calls enter them. */
#include "handle.h"
#include "runtime.h"

#include "../base/thread.h"

#include <limits.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 64    /* slots that are made together, so many that they are fresh pages: those of no communicator take no memory */
#define CHUNKS 4096 /* of them, at most */
#define REST 16 /* a freed slot is used again when so many wait: a handle that somebody kept is no other communicator's soon */

#define OPEN HFR_HANDLE_OPEN
#define ORPHAN HFR_HANDLE_ORPHAN
#define INSIDE (ORPHAN - 1)

_Static_assert(offsetof(struct hfreduceComm, handle) == 0, "a handle is the address of its communicator");

#define ALIGN 128 /* cache lines that are fetched in pairs */
union slot {
  struct hfreduceComm comm;
  char space[(sizeof(struct hfreduceComm) + ALIGN - 1) / ALIGN * ALIGN];
};

static _Atomic(union slot *) chunk[CHUNKS];
/* Under the runtime's lock, which a fork holds: */
static struct {
  int chunks, used; /* used: of the last chunk */
  int nfree;
  struct hfreduceComm *first, *last;
} table = {.used = CHUNK};

static struct hfr_handle *of(hfreduceComm_t c) { return &c->handle; }

/* ---------------------------------------------------------------- slots */

static union slot *fresh(void) {
  if (table.used == CHUNK) {
    if (table.chunks == CHUNKS) return NULL;
    char *more = calloc(CHUNK + 1, sizeof(union slot)); /* of the heap: what an open communicator has is no leak */
    if (!more) return NULL;
    more += -(uintptr_t)more % ALIGN;
    atomic_store_explicit(&chunk[table.chunks++], (union slot *)(void *)more, memory_order_release); /* pairs with is_slot() */
    table.used = 0;
  }
  return &atomic_load_explicit(&chunk[table.chunks - 1], memory_order_relaxed)[table.used++];
}

static struct hfreduceComm *oldest_free(void) {
  struct hfreduceComm *c = table.first;
  if (!c) return NULL;
  table.first = c->handle.next;
  table.nfree--;
  memset((char *)c + sizeof c->handle, 0, sizeof *c - sizeof c->handle);
  return c;
}

struct hfreduceComm *hfr_handle_get(void) {
  pthread_mutex_lock(&hfr_rt.lock);
  union slot *new = table.nfree < REST ? fresh() : NULL;
  struct hfreduceComm *c = new ? &new->comm : oldest_free();
  pthread_mutex_unlock(&hfr_rt.lock);
  if (c) atomic_store(&of(c)->leaving, 0);
  return c;
}

static void forget_left(struct hfreduceComm *c) {
  if (of(c)->left) hfr_work_put(of(c)->left);
  of(c)->left = NULL;
}

void hfr_handle_put(struct hfreduceComm *c) {
  forget_left(c);
  pthread_mutex_lock(&hfr_rt.lock);
  atomic_store(&of(c)->uses, 0);
  atomic_store(&of(c)->nranks, 0);
  of(c)->next = NULL;
  if (table.first)
    table.last->handle.next = c;
  else
    table.first = c;
  table.last = c;
  table.nfree++;
  pthread_mutex_unlock(&hfr_rt.lock);
}

void hfr_handle_open(struct hfreduceComm *c, int nranks) {
  atomic_store(&of(c)->nranks, nranks);
  atomic_fetch_add(&of(c)->age, 1);
  atomic_store_explicit(&of(c)->uses, OPEN, memory_order_release); /* pairs with who enters: the communicator is whole */
}

void hfr_handle_after_fork(struct hfreduceComm *c) {
  atomic_store(&of(c)->uses, atomic_load(&of(c)->uses) & OPEN);
  atomic_store(&of(c)->caller, 0);
}

static int is_slot(const struct hfreduceComm *c) {
  for (int i = 0; i < CHUNKS; i++) {
    const union slot *first = atomic_load_explicit(&chunk[i], memory_order_acquire);
    if (!first) return 0;
    uintptr_t offset = (uintptr_t)c - (uintptr_t)first;
    if (offset < CHUNK * sizeof *first) return offset % sizeof *first == 0;
  }
  return 0;
}

int hfr_handle_is(hfreduceComm_t c, uint32_t age) {
  return is_slot(c) && (atomic_load(&of(c)->uses) & OPEN) && atomic_load(&of(c)->age) == age;
}

int hfr_handle_nranks(hfreduceComm_t c) {
  if (!is_slot(c) || !(atomic_load_explicit(&of(c)->uses, memory_order_acquire) & OPEN)) return 0;
  return atomic_load_explicit(&of(c)->nranks, memory_order_relaxed);
}

/* ---------------------------------------------------------------- coming and going */

static hfreduceResult_t fail_unknown(hfreduceComm_t c, const char *function) {
  if (!c) return hfr_fail(hfreduceInvalidArgument, "%s: comm is NULL", function);
  return hfr_fail(hfreduceInvalidArgument, "%s: comm is %p, which is not a communicator, or was destroyed", function, (void *)c);
}

/* A call has left, and the communicator is shut: the last one out frees what who shut it has left behind. Each of two that leave
 * at once may see that it is the last. */
static void left_shut(hfreduceComm_t c) {
  uint32_t only = ORPHAN;
  if (atomic_load(&of(c)->uses) == ORPHAN && !atomic_load(&of(c)->caller) &&
      atomic_compare_exchange_strong(&of(c)->uses, &only, 0))
    hfr_comm_tear_down(c);
  else
    hfr_futex_wake(&of(c)->uses, INT_MAX);
}

hfreduceResult_t hfr_comm_enter(hfreduceComm_t c, const char *function, enum hfr_stay stay) {
  if (!is_slot(c)) return fail_unknown(c, function);
  uint32_t was = atomic_load_explicit(&of(c)->uses, memory_order_relaxed);
  do {
    if (!(was & OPEN)) return fail_unknown(c, function);
  } while (!atomic_compare_exchange_weak_explicit(&of(c)->uses, &was, was + (uint32_t)stay, memory_order_acquire,
                                                  memory_order_relaxed));
  return hfreduceSuccess;
}

void hfr_comm_leave(hfreduceComm_t c, enum hfr_stay stay) {
  uint32_t was = atomic_fetch_sub_explicit(&of(c)->uses, (uint32_t)stay, memory_order_seq_cst);
  if (!(was & OPEN)) left_shut(c);
}

void hfr_comm_end(hfreduceComm_t c) {
  atomic_store_explicit(&of(c)->call, NULL, memory_order_relaxed);
  if (__builtin_expect((atomic_load_explicit(&of(c)->uses, memory_order_relaxed) & OPEN) != 0, 1)) {
    atomic_store_explicit(&of(c)->caller, 0,
                          memory_order_release); /* pairs with hfr_handle_await(), which looks again and again */
    return;
  }
  atomic_store(&of(c)->caller, 0);
  left_shut(c);
}

/* The name of the collective that is inside. */
static const char *name_of_call(hfreduceComm_t c) {
  const char *call = NULL;
  for (int i = 0; !call && i < 1000 && atomic_load(&of(c)->caller); i++) {
    if (i) sched_yield();
    call = atomic_load(&of(c)->call);
  }
  return call ? call : "a collective";
}

static hfreduceResult_t fail_overlap(const char *function, uint32_t other, const char *call) {
  if (other == hfr_thread_id())
    return hfr_fail(hfreduceInvalidUsage,
                    "%s: this thread (%u) is in %s on this communicator already; a signal handler that interrupts a call cannot "
                    "make another one on its communicator",
                    function, other, call);
  return hfr_fail(hfreduceInvalidUsage,
                  "%s: thread %u called it while thread %u was in %s on this communicator; calls on one communicator must not "
                  "overlap: use it in one thread at a time, or make a communicator for each thread (hfreduceCommSplit, "
                  "duplicate())",
                  function, hfr_thread_id(), other, call);
}

void hfr_comm_goes_on(struct hfreduceComm *c, struct hfreduceWork *work) {
  forget_left(c);
  atomic_fetch_add_explicit(&work->refs, 1, memory_order_relaxed);
  of(c)->left = work;
  of(c)->left_by = hfr_thread_id();
  of(c)->left_call = atomic_load_explicit(&of(c)->call, memory_order_relaxed);
}

/* The caller is inside. */
static hfreduceResult_t check_left(hfreduceComm_t c, const char *function) {
  if (atomic_load_explicit(&of(c)->left->done, memory_order_acquire)) {
    forget_left(c);
  } else if (of(c)->left_by != hfr_thread_id()) {
    hfreduceResult_t r = fail_overlap(function, of(c)->left_by, of(c)->left_call);
    hfr_comm_end(c);
    return r;
  }
  return hfreduceSuccess;
}

hfreduceResult_t hfr_comm_begin(hfreduceComm_t c, const char *function) {
  uint32_t none = 0;
  if (!is_slot(c)) return fail_unknown(c, function);
  if (!atomic_compare_exchange_strong(&of(c)->caller, &none, hfr_thread_id())) {
    if (!hfr_handle_nranks(c)) return fail_unknown(c, function);
    return fail_overlap(function, none, name_of_call(c));
  }
  /* After `caller`, in the order of all: who shuts the slot sees the caller, or the caller sees that it is shut. */
  if (!(atomic_load(&of(c)->uses) & OPEN)) {
    hfr_comm_end(c);
    return fail_unknown(c, function);
  }
  if (__builtin_expect(of(c)->left != NULL, 0)) HFR_TRY(check_left(c, function));
  atomic_store_explicit(&of(c)->call, function, memory_order_relaxed);
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- the end */

int hfr_handle_shut(struct hfreduceComm *c) {
  if (!(atomic_fetch_and(&of(c)->uses, ~OPEN) & OPEN)) return 0;
  atomic_store(&of(c)->leaving, 1);
  return 1;
}

int hfr_handle_await(struct hfreduceComm *c, int64_t limit_ns) {
  int64_t end = hfr_now_ns() + limit_ns;
  for (;;) {
    uint32_t uses = atomic_load(&of(c)->uses);
    if (uses == HFR_BRIEF && !atomic_load(&of(c)->caller)) return 1;
    if (hfr_now_ns() >= end) return 0;
    hfr_futex_wait(&of(c)->uses, uses, 1000000);
  }
}

int hfr_handle_waits(struct hfreduceComm *c, uint32_t *caller, const char **call) {
  uint32_t me = hfr_thread_id();
  *caller = 0;
  if (!atomic_compare_exchange_strong(&of(c)->caller, caller, me)) {
    *call = name_of_call(c);
    return 1;
  }
  /* Until its end nobody writes what was left. */
  if (of(c)->left && of(c)->left_by != me && !atomic_load_explicit(&of(c)->left->done, memory_order_acquire)) {
    *caller = of(c)->left_by;
    *call = of(c)->left_call;
  }
  hfr_comm_end(c);
  return *caller || (atomic_load(&of(c)->uses) & INSIDE) >= HFR_WAITS;
}

void hfr_handle_orphan(struct hfreduceComm *c) {
  atomic_fetch_or(&of(c)->uses, ORPHAN);
  hfr_comm_leave(c, HFR_BRIEF);
}

static _Thread_local uint32_t thread_id;
static void forget_thread_id(void) { thread_id = 0; }

/* A forked child's thread has another number. */
static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_thread_id); }

uint32_t hfr_thread_id(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (__builtin_expect(!thread_id, 0)) {
    pthread_once(&once, watch_forks);
    thread_id = (uint32_t)syscall(SYS_gettid);
  }
  return thread_id;
}
