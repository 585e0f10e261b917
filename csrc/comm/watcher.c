/* The watcher: one thread a process that waits for all descriptors, has their owners serve them, and looks after what is due. */
#include "runtime.h"

#include "../base/thread.h"

#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#define TICK_MS 250
#define ATTEND_MS 5 /* while a link of a rank that computes comes up anew */

void hfr_watcher_kick(void) {
  uint64_t one = 1;
  if (hfr_rt.kick_fd >= 0) (void)!write(hfr_rt.kick_fd, &one, sizeof one);
}

struct hfr_watch *hfr_watch_add(enum hfr_watch_kind kind, int fd) {
  struct hfr_watch *w = calloc(1, sizeof *w);
  if (!w) return NULL;
  *w = (struct hfr_watch){.next = hfr_rt.watches, .kind = kind, .fd = fd, .slot = -1, .since_ns = hfr_now_ns(), .rank = -1};
  hfr_rt.watches = w;
  return w;
}

/* ---------------------------------------------------------------- what is looked at */

struct polled {
  struct pollfd *fd;
  int n, cap;
};

static int want(struct polled *p, int fd, int events) {
  if (p->n == p->cap) {
    int cap = p->cap ? 2 * p->cap : 64;
    struct pollfd *grown = realloc(p->fd, (size_t)cap * sizeof *grown);
    if (!grown) return -1;
    p->fd = grown;
    p->cap = cap;
  }
  p->fd[p->n] = (struct pollfd){fd, (short)events, 0};
  return p->n++;
}

static void collect(struct polled *p) {
  p->n = 0;
  want(p, hfr_rt.kick_fd, POLLIN);
  for (struct hfr_watch *w = hfr_rt.watches; w; w = w->next) {
    int events = w->kind == HFR_WATCH_PENDING                     ? w->auth.events
                 : w->kind == HFR_WATCH_JOINER && w->conn.tx_have ? POLLIN | POLLOUT
                                                                  : POLLIN;
    w->slot = want(p, w->fd, events);
  }
}

/* Control connections follow the watches, in the order of the communicators. */
static void collect_controls(struct polled *p) {
  for (struct hfreduceComm *c = hfr_rt.comms; c; c = c->next)
    for (int i = 0; i < c->ncontrol; i++)
      if (c->control[i].fd >= 0) want(p, c->control[i].fd, c->control[i].tx_have ? POLLIN | POLLOUT : POLLIN);
}

static short happened(const struct polled *p, int from, int fd) {
  for (int i = from; i < p->n; i++)
    if (p->fd[i].fd == fd) return p->fd[i].revents;
  return 0;
}

static void serve_watches(const struct polled *p, int64_t now) {
  for (struct hfr_watch **at = &hfr_rt.watches; *at;) {
    struct hfr_watch *w = *at;
    int ready = w->slot >= 0 && p->fd[w->slot].revents, over = 0;
    w->slot = -1;
    if (w->kind == HFR_WATCH_LISTENER && ready) hfr_listen_accept(w);
    if (w->kind == HFR_WATCH_PENDING) over = hfr_listen_pending(w, ready, now);
    if (w->kind == HFR_WATCH_JOINER) {
      if (ready) hfr_root_event(w);
      if (w->conn.dead || (w->drop && !w->conn.tx_have)) hfr_conn_close(&w->conn), over = 1;
    }
    /* handlers put new watches at the head: find our place again */
    at = &hfr_rt.watches;
    while (*at != w) at = &(*at)->next;
    if (over) {
      *at = w->next;
      free(w);
    } else {
      at = &w->next;
    }
  }
}

static void serve_controls(const struct polled *p, int from) {
  int next = from; /* collected in this very order: mostly the next entry is the one */
  for (struct hfreduceComm *c = hfr_rt.comms; c; c = c->next)
    for (int i = 0; i < c->ncontrol; i++) {
      int fd = c->control[i].fd;
      if (fd < 0) continue;
      short events = next < p->n && p->fd[next].fd == fd ? p->fd[next++].revents : happened(p, from, fd);
      if (events) hfr_control_event(c, c->rank == 0 ? i : 0);
    }
}

/* ---------------------------------------------------------------- what is due */

#define IDLE_TICKS 2 /* half a second without a new collective */

/* A communicator that has gone quiet gives its slots' pages back to the page cache: dozens of groups then cost a rank what the
   few that work cost. Whoever touches them again faults them in. */
static void rest(struct hfreduceComm *c) {
  if (!atomic_load_explicit(&c->engine_up, memory_order_acquire) || !c->arena.map) return;
  uint64_t begun = atomic_load_explicit(&c->arena.ctrl[c->arena.local].start, memory_order_relaxed);
  if (begun != c->seen)
    c->idle = 0;
  else if (++c->idle == IDLE_TICKS)
    hfr_arena_rest(&c->arena);
  c->seen = begun;
}

/* 1: one of the communicators has links to be looked after again soon. */
static int attend(void) {
  int again = 0;
  for (struct hfreduceComm *c = hfr_rt.comms; c; c = c->next)
    if (atomic_load_explicit(&c->engine_up, memory_order_acquire) && !c->forked) again |= hfr_engine_attend(&c->engine);
  return again;
}

static void tick(int64_t now) {
  hfr_root_tick(now);
  for (struct hfreduceComm *c = hfr_rt.comms; c; c = c->next) {
    hfr_control_tick(c, now);
    rest(c);
  }
}

void *hfr_watcher_main(void *arg) {
  struct polled p = {0};
  int64_t ticked = hfr_now_ns();
  int attending = 0;
  (void)arg;
  pthread_mutex_lock(&hfr_rt.lock);
  for (;;) {
    collect(&p);
    int from = p.n;
    collect_controls(&p);
    int quiet = !hfr_rt.comms && !hfr_rt.roots && !hfr_rt.pending;
    pthread_mutex_unlock(&hfr_rt.lock);
    poll(p.fd, (nfds_t)p.n, quiet ? -1 : attending ? ATTEND_MS : TICK_MS);
    pthread_mutex_lock(&hfr_rt.lock);
    uint64_t drain;
    if (p.fd[0].revents) (void)!read(hfr_rt.kick_fd, &drain, sizeof drain);
    int64_t now = hfr_now_ns();
    serve_watches(&p, now);
    serve_controls(&p, from);
    if (attending) attending = attend();
    if (now - ticked < TICK_MS * 1000000ll) continue;
    ticked = now;
    tick(now);
    attending = attend();
    hfr_transport_tidy();
  }
  return NULL;
}
