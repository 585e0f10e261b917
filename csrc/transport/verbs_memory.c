/*
 * The registration cache.
 *
 * munmap() returns when its event has been read. But its range is free before: another thread may get the same addresses and use
 * them while the event is still to come. So what a message finds in the cache is believed only if its pages are watched ones,
 * which those of a new mapping are not.
 */
#include "verbs_memory.h"

#include "../base/log.h"
#include "../base/param.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#define ENTRIES 128
#define SEEN 64
#define LEAST_BYTES 65536   /* smaller buffers are cheap to copy */
#define LEAST_MESSAGE 16384 /* and so are smaller messages */

enum { FREE, MAKING, LIVE, DEAD };
struct entry {
  int state; /* DEAD: freed once nobody holds it */
  int holders;
  const struct hfr_ib_pd *pd;
  struct hfr_ib_mr *mr;
  uintptr_t begin, end;
  uint64_t used; /* clock of the last use */
};
struct sight {
  uintptr_t begin, end;
  int refused; /* it cannot be watched or registered: not tried again */
};

/* Nothing is allocated or freed under the lock, and nothing by the watching thread: either could unmap watched memory, and wait
 * for that very thread. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct entry entries[ENTRIES];
static struct sight seen[SEEN];
static unsigned next_seen;
static uint64_t clock_now;
static size_t pinned;
static _Atomic int dead; /* entries wait to be freed */

static int faults = -1; /* userfaultfd */
static int started;
static char why_not[200] = "no buffer was seen yet";

/* ---------------------------------------------------------------- being told of unmapped memory */

static void forget(uintptr_t begin, uintptr_t end) {
  for (struct entry *e = entries; e < entries + ENTRIES; e++) {
    if ((e->state != LIVE && e->state != MAKING) || e->end <= begin || e->begin >= end) continue;
    e->state = DEAD;
    dead = 1;
  }
  for (struct sight *s = seen; s < seen + SEEN; s++) /* other memory will lie there */
    if (s->end > begin && s->begin < end) *s = (struct sight){0};
}

/* The caller of munmap() sleeps until its event is read. That is done under the lock, so nobody finds the range in the cache
 * between the caller's return and forget(). */
static void take_events(void) {
  struct uffd_msg event;
  pthread_mutex_lock(&lock);
  while (read(faults, &event, sizeof event) == sizeof event) {
    if (event.event == UFFD_EVENT_UNMAP || event.event == UFFD_EVENT_REMOVE)
      forget(event.arg.remove.start, event.arg.remove.end);
    else if (event.event == UFFD_EVENT_REMAP)
      forget(event.arg.remap.from, event.arg.remap.from + event.arg.remap.len);
  }
  pthread_mutex_unlock(&lock);
}

static void *watch(void *arg) {
  struct pollfd p = {faults, POLLIN, 0};
  (void)arg;
  while (poll(&p, 1, -1) > 0 || errno == EINTR) take_events();
  return NULL;
}

/* In a child the parent's registrations and its watch mean nothing: all of the state is made anew, whatever it was. So the lock
 * is not taken before a fork; who forks holds other locks, whose owners may wait for an unmap event or for this lock. */
static void child_after_fork(void) {
  if (faults >= 0) close(faults);
  faults = -1;
  started = 0;
  dead = 0;
  pinned = 0;
  memset(entries, 0, sizeof entries);
  memset(seen, 0, sizeof seen);
  pthread_mutex_init(&lock, NULL);
}

static int give_up(const char *what) {
  snprintf(why_not, sizeof why_not, "%s: %s", what, strerror(errno));
  HFR_INFO("RDMA: buffers are copied, not registered: %s", why_not);
  if (faults >= 0) close(faults);
  faults = -1;
  return 0;
}

static int start_watching(void) {
  struct uffdio_api api = {.api = UFFD_API,
                           .features = UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_REMAP |
                                       UFFD_FEATURE_PAGEFAULT_FLAG_WP};
  pthread_t thread;
  sigset_t all, old;
  faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
  if (faults < 0) return give_up("userfaultfd");
  if (ioctl(faults, UFFDIO_API, &api)) return give_up("userfaultfd does not tell of unmapped memory");
  sigfillset(&all); /* signals are for the program's own threads */
  pthread_sigmask(SIG_SETMASK, &all, &old);
  errno = pthread_create(&thread, NULL, watch, NULL);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  if (errno) return give_up("cannot start a thread");
  pthread_detach(thread);
  *why_not = 0;
  return 1;
}

/* Once a process, and once more in a forked child. 1: ranges can be watched. */
static int can_watch(void) {
  static int at_fork;
  if (started) return faults >= 0;
  started = 1;
  const char *why;
  const struct hfr_ib *ib = hfr_ib_load(&why);
  if (!hfr_param_int(HFR_PARAM_IB_CACHE)) {
    snprintf(why_not, sizeof why_not, "HFREDUCE_IB_CACHE is 0");
    return 0;
  }
  if (!ib || !ib->is_fork_initialized || ib->is_fork_initialized() != HFR_IB_FORK_UNNEEDED || getenv("RDMAV_FORK_SAFE") ||
      getenv("IBV_FORK_SAFE")) {
    snprintf(why_not, sizeof why_not,
             "with this kernel, this libibverbs or RDMAV_FORK_SAFE a fork would take registered pages away from the child");
    return 0;
  }
  if (!at_fork) pthread_atfork(NULL, NULL, child_after_fork);
  at_fork = 1;
  return start_watching();
}

static struct uffdio_range pages_of(uintptr_t begin, uintptr_t end) {
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = begin & ~(page - 1);
  return (struct uffdio_range){first, ((end + page - 1) & ~(page - 1)) - first};
}

static int watch_range(uintptr_t begin, uintptr_t end) {
  /* Nothing is ever protected: only the events are wanted. */
  struct uffdio_register watch = {.range = pages_of(begin, end), .mode = UFFDIO_REGISTER_MODE_WP};
  return !ioctl(faults, UFFDIO_REGISTER, &watch);
}

/* Lifting the protection that there is none of fails where a page is not watched. Older kernels (6.1 does) refuse it also for a
 * range of several mappings, each of which may be watched: then its halves are asked for, down to pages. */
static int is_watched(uintptr_t begin, uintptr_t end) {
  struct uffdio_writeprotect lift = {.range = pages_of(begin, end)};
  if (!ioctl(faults, UFFDIO_WRITEPROTECT, &lift)) return 1;
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)lift.range.start, bytes = (uintptr_t)lift.range.len;
  uintptr_t middle = first + bytes / 2 / page * page;
  return errno == ENOENT && bytes > page && is_watched(first, middle) && is_watched(middle, first + bytes);
}

/* ---------------------------------------------------------------- the entries; under the lock */

static struct entry *find(const struct hfr_ib_pd *pd, uintptr_t begin, uintptr_t end) {
  for (struct entry *e = entries; e < entries + ENTRIES; e++)
    if (e->state == LIVE && e->pd == pd && e->begin <= begin && e->end >= end) return e;
  return NULL;
}

static struct sight *recall(uintptr_t begin, uintptr_t end) {
  for (struct sight *s = seen; s < seen + SEEN; s++)
    if (s->begin == begin && s->end == end) return s;
  return NULL;
}

/* A place for a range, after making room for its bytes; NULL when all is in use. */
static struct entry *make_room(size_t bytes) {
  size_t limit = (size_t)hfr_param_int(HFR_PARAM_IB_CACHE);
  for (;;) {
    struct entry *empty = NULL, *oldest = NULL;
    for (struct entry *e = entries; e < entries + ENTRIES; e++) {
      if (e->state == FREE) empty = e;
      if (e->state == LIVE && !e->holders && (!oldest || e->used < oldest->used)) oldest = e;
    }
    if (bytes > limit) return NULL;
    if (empty && pinned + bytes <= limit) return empty;
    if (!oldest) return NULL;
    oldest->state = DEAD;
    dead = 1;
    pthread_mutex_unlock(&lock);
    hfr_verbs_memory_tidy();
    pthread_mutex_lock(&lock);
  }
}

/* ---------------------------------------------------------------- interface */

void hfr_verbs_memory_tidy(void) {
  const char *why;
  if (!dead) return;
  const struct hfr_ib *ib = hfr_ib_load(&why);
  for (int more = 1; more;) {
    struct hfr_ib_mr *mr = NULL;
    more = 0;
    pthread_mutex_lock(&lock);
    for (struct entry *e = entries; dead && e < entries + ENTRIES && !more; e++) {
      if (e->state != DEAD || e->holders) continue;
      mr = e->mr;
      pinned -= e->end - e->begin;
      *e = (struct entry){0};
      more = 1;
    }
    if (!more) {
      dead = 0;
      for (struct entry *e = entries; e < entries + ENTRIES; e++) dead |= e->state == DEAD;
    }
    pthread_mutex_unlock(&lock);
    if (mr) ib->dereg_mr(mr);
  }
}

void hfr_verbs_memory_lend(const struct hfr_ib_port *port, const void *memory, size_t bytes) {
  uintptr_t begin = (uintptr_t)memory, end = begin + bytes;
  if (bytes < LEAST_BYTES) return;
  hfr_verbs_memory_tidy();
  pthread_mutex_lock(&lock);
  struct entry *e = NULL;
  struct sight *s = recall(begin, end);
  if (!can_watch() || find(port->pd, begin, end) || (s && s->refused)) {
    pthread_mutex_unlock(&lock);
    return;
  }
  if (!s) {
    seen[next_seen++ % SEEN] = (struct sight){begin, end, 0};
  } else if ((e = make_room(bytes))) {
    if (!is_watched(begin, end)) forget(begin, end); /* entries that overlap it may be of what was mapped there before */
    *e = (struct entry){.state = MAKING, .holders = 1, .pd = port->pd, .begin = begin, .end = end};
    pinned += bytes;
  }
  pthread_mutex_unlock(&lock);
  if (!e) return;
  /* Watched first: what is unmapped from here on makes the entry DEAD. */
  struct hfr_ib_mr *mr = watch_range(begin, end) ? hfr_ib_register(port, (void *)begin, bytes, 0) : NULL;
  pthread_mutex_lock(&lock);
  e->mr = mr;
  e->holders = 0;
  e->used = ++clock_now;
  if (!mr) {
    pinned -= bytes;
    e->state = FREE;
    if ((s = recall(begin, end))) s->refused = 1;
  } else if (e->state == MAKING) {
    e->state = LIVE;
  }
  pthread_mutex_unlock(&lock);
}

uint32_t hfr_verbs_memory_key(const struct hfr_ib_port *port, const void *data, size_t bytes, int *hold) {
  uintptr_t begin = (uintptr_t)data;
  uint32_t key = 0;
  if (bytes < LEAST_MESSAGE) return 0;
  pthread_mutex_lock(&lock);
  struct entry *e = find(port->pd, begin, begin + bytes);
  if (e && !is_watched(begin, begin + bytes)) {
    if (errno != EAGAIN) forget(begin, begin + bytes); /* EAGAIN: an event is to be read, perhaps of other memory */
    e = NULL;
  }
  if (e) {
    e->holders++;
    e->used = ++clock_now;
    key = e->mr->lkey;
    *hold = (int)(e - entries) + 1;
  }
  pthread_mutex_unlock(&lock);
  return key;
}

void hfr_verbs_memory_done(int hold) {
  if (!hold) return;
  pthread_mutex_lock(&lock);
  entries[hold - 1].holders--;
  pthread_mutex_unlock(&lock);
}

void hfr_verbs_memory_drop(void) {
  pthread_mutex_lock(&lock);
  forget(0, UINTPTR_MAX);
  pthread_mutex_unlock(&lock);
  hfr_verbs_memory_tidy();
}

const char *hfr_verbs_memory_why_not(void) {
  pthread_mutex_lock(&lock);
  can_watch();
  pthread_mutex_unlock(&lock);
  return why_not;
}

int hfr_verbs_memory_count(void) {
  int count = 0;
  pthread_mutex_lock(&lock);
  for (struct entry *e = entries; e < entries + ENTRIES; e++) count += e->state == LIVE;
  pthread_mutex_unlock(&lock);
  return count;
}
