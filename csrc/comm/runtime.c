/* The process' side of all communicators: who is registered, and what comes at the process' start, at a fork and at its end. */
#include "runtime.h"

#include "../base/log.h"
#include "../base/param.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

struct hfr_runtime hfr_rt = {.lock = PTHREAD_MUTEX_INITIALIZER, .kick_fd = -1};

/* ---------------------------------------------------------------- the life of the process */

/* At exit: tell the peers that this is no crash. */
static void at_exit(void) {
  if (pthread_mutex_trylock(&hfr_rt.lock)) return;
  for (struct hfreduceComm *c = hfr_rt.comms; c; c = c->next) {
    int32_t rank = c->rank;
    if (c->pid != getpid()) continue;
    hfr_control_tell(c);
    for (int i = 0; i < c->ncontrol; i++)
      if (c->control[i].fd >= 0) hfr_conn_send(&c->control[i], HFR_FRAME_BYE, &rank, sizeof rank);
  }
  pthread_mutex_unlock(&hfr_rt.lock);
}

static void before_fork(void) { pthread_mutex_lock(&hfr_rt.lock); }
static void parent_after_fork(void) { pthread_mutex_unlock(&hfr_rt.lock); }

/* The child has no threads of ours and must not keep connections open that tell peers that the parent lives. */
static void child_after_fork(void) {
  if (hfr_rt.kick_fd >= 0) close(hfr_rt.kick_fd);
  for (struct hfr_watch *w = hfr_rt.watches; w; w = w->next) close(w->fd);
  for (struct hfreduceComm *c = hfr_rt.comms; c; c = c->next) {
    c->forked = 1;
    hfr_handle_after_fork(c);
    for (int i = 0; i < c->ncontrol; i++)
      if (c->control[i].fd >= 0) close(c->control[i].fd), c->control[i].fd = -1;
    if (!c->engine_up) continue;
    for (size_t i = 0; i < (size_t)c->nranks * HFR_NVC; i++) {
      struct hfr_link *link = c->engine.link[i];
      if (link) link->transport->after_fork(link);
    }
    hfr_arena_after_fork(&c->arena);
  }
  memset(&hfr_rt, 0, sizeof hfr_rt);
  pthread_mutex_init(&hfr_rt.lock, NULL);
  hfr_rt.kick_fd = -1;
  hfr_drive_after_fork();
}

/* Connections need descriptors, about one a rank in rank 0, and the usual limit of 1024 is for programs that use select(). NCCL
 * raises it, too. */
static void raise_descriptors(void) {
  struct rlimit limit;
  if (!hfr_param_int(HFR_PARAM_RAISE_NOFILE) || getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur >= limit.rlim_max) return;
  rlim_t before = limit.rlim_cur;
  limit.rlim_cur = limit.rlim_max;
  if (!setrlimit(RLIMIT_NOFILE, &limit))
    HFR_INFO("this process may open %llu descriptors now, %llu before", (unsigned long long)limit.rlim_max,
             (unsigned long long)before);
}

hfreduceResult_t hfr_runtime_start(void) {
  static int registered;
  pthread_attr_t attr;
  pthread_t thread;
  sigset_t all, old;
  if (hfr_rt.started) return hfreduceSuccess;
  raise_descriptors();
  hfr_rt.kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (hfr_rt.kick_fd < 0) return hfr_fail(hfreduceSystemError, "eventfd failed: %s", hfr_errno_text(errno));
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* signals belong to the program's threads */
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, 512 * 1024);
  int error = pthread_create(&thread, &attr, hfr_watcher_main, NULL);
  pthread_attr_destroy(&attr);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  if (error) {
    close(hfr_rt.kick_fd);
    hfr_rt.kick_fd = -1;
    return hfr_fail(hfreduceSystemError,
                    "cannot start the watcher thread: %s; see the limits of threads and memory (ulimit -u, -v)", strerror(error));
  }
  hfr_rt.started = 1;
  if (!registered++) {
    atexit(at_exit);
    pthread_atfork(before_fork, parent_after_fork, child_after_fork);
  }
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- communicators */

hfreduceResult_t hfr_runtime_add(struct hfreduceComm *c) {
  c->ncontrol = c->rank == 0 ? c->nranks : 1;
  c->control = calloc((size_t)c->ncontrol, sizeof *c->control);
  if (c->rank == 0) c->stuck = calloc((size_t)c->nranks, sizeof *c->stuck);
  if (!c->control || (c->rank == 0 && !c->stuck))
    return hfr_fail(hfreduceSystemError, "out of memory for %d control connections", c->ncontrol);
  for (int i = 0; i < c->ncontrol; i++) c->control[i].fd = -1;
  pthread_mutex_lock(&hfr_rt.lock);
  c->next = hfr_rt.comms;
  hfr_rt.comms = c;
  pthread_mutex_unlock(&hfr_rt.lock);
  hfr_watcher_kick();
  return hfreduceSuccess;
}

int hfr_runtime_ranks_here(const struct hfreduceComm *c) {
  int n = 0;
  pthread_mutex_lock(&hfr_rt.lock);
  for (const struct hfreduceComm *each = hfr_rt.comms; each; each = each->next) n += each->uid.comm_id == c->uid.comm_id;
  pthread_mutex_unlock(&hfr_rt.lock);
  return n;
}

void hfr_runtime_remove(struct hfreduceComm *c) {
  int32_t rank = c->rank;
  pthread_mutex_lock(&hfr_rt.lock);
  for (struct hfreduceComm **at = &hfr_rt.comms; *at; at = &(*at)->next)
    if (*at == c) {
      *at = c->next;
      break;
    }
  hfr_control_tell(c);
  for (int i = 0; i < c->ncontrol; i++) {
    if (c->control[i].fd < 0) continue;
    hfr_conn_send(&c->control[i], HFR_FRAME_BYE, &rank, sizeof rank);
    shutdown(c->control[i].fd, SHUT_WR);
    /* What lies unread would turn the close into a reset, which could overtake our last frames. */
    char drain[512];
    while (recv(c->control[i].fd, drain, sizeof drain, MSG_DONTWAIT) > 0) {
    }
    hfr_conn_close(&c->control[i]);
  }
  for (int i = 0; i < 2; i++)
    if (c->door[i].family) hfr_listen_release(&c->door[i]);
  memset(c->door, 0, sizeof c->door);
  free(c->control);
  free(c->stuck);
  c->stuck = NULL;
  c->control = NULL;
  c->ncontrol = 0;
  pthread_mutex_unlock(&hfr_rt.lock);
  hfr_watcher_kick();
}
