/* The door: listeners, and connections that have to prove who they are before anything they say is believed. */
#include "runtime.h"

#include "../base/log.h"
#include "../base/param.h"
#include "../base/thread.h"
#include "../topo/host.h"
#include "../topo/nic.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define HANDSHAKE_NS 5000000000ll
#define MAX_PENDING 256

/* ---------------------------------------------------------------- strangers */

static enum hfr_auth_verdict find_secret(void *arg, const struct hfr_auth_hello *hello, uint8_t secret[16]) {
  (void)arg;
  if (hello->kind == HFR_AUTH_ROOT) return hfr_root_secret(hello->comm_id, hello->name, secret);
  for (struct hfreduceComm *c = hfr_rt.comms; c; c = c->next) {
    if (c->uid.comm_id != hello->comm_id || c->rank != hello->target) continue;
    memcpy(secret, c->uid.secret, 16);
    return HFR_AUTH_WELCOME;
  }
  return HFR_AUTH_UNKNOWN;
}

/* Give an authenticated connection to whom it is for. 0 taken, -1 not wanted. */
static int deliver(struct hfr_watch *w) {
  const struct hfr_auth_hello *h = &w->auth.hello;
  if (h->kind == HFR_AUTH_ROOT) return hfr_root_welcome(h->comm_id, w->fd);
  struct hfreduceComm *c = hfr_rt.comms;
  while (c && (c->uid.comm_id != h->comm_id || c->rank != h->target)) c = c->next;
  if (!c || h->rank < 0 || h->rank >= c->nranks) return -1;
  if (h->kind == HFR_AUTH_CONTROL && c->rank == 0 && h->rank > 0 && c->control[h->rank].fd < 0) {
    hfr_conn_init(&c->control[h->rank], w->fd, sizeof(hfreduceErrorInfo_t));
    return 0;
  }
  if (h->kind == HFR_AUTH_DATA && c->engine_up && h->vc < HFR_NVC && h->stream < c->net.streams && h->rank < c->rank) {
    int empty = 0;
    if (!atomic_compare_exchange_strong(&c->net.arrived[((size_t)h->rank * HFR_NVC + h->vc) * (size_t)c->net.streams + h->stream],
                                        &empty, w->fd + 1))
      return -1;
    hfr_engine_wake(&c->engine);
    return 0;
  }
  return -1;
}

/* The address that a connection comes from, as it was when it was accepted: a peer that has closed it meanwhile has none. */
static const char *caller(const struct hfr_watch *w, char text[INET6_ADDRSTRLEN]) {
  const char *host =
      w->addr.family ? inet_ntop(w->addr.family == 4 ? AF_INET : AF_INET6, w->addr.ip, text, INET6_ADDRSTRLEN) : NULL;
  return host ? host : strcpy(text, "?");
}

static void refuse(struct hfr_watch *w, const char *why) {
  char from[INET6_ADDRSTRLEN];
  hfr_rt.refused++;
  HFR_INFO("refused a connection from %s (%ld so far): %s", caller(w, from), hfr_rt.refused, why);
  close(w->fd);
}

/* The handshake has failed: let the rendezvous that it was meant for know, so that those who wait there can say so. */
static void tell_root(const struct hfr_watch *w) {
  const struct hfr_auth *a = &w->auth;
  char from[INET6_ADDRSTRLEN], mine[HFR_VERSION_TEXT], theirs[HFR_VERSION_TEXT], host[64], text[400];
  caller(w, from);
  if (a->verdict == HFR_AUTH_OLD) hfr_root_refused(0, 0, from, "an older protocol of hfreduce");
  if (a->hello.kind != HFR_AUTH_ROOT) return;
  if (a->verdict == HFR_AUTH_SECRET) hfr_root_refused(a->hello.comm_id, a->hello.name, from, "wrong secret");
  if (a->verdict == HFR_AUTH_USER) hfr_root_refused(a->hello.comm_id, a->hello.name, from, "a process of another user");
  if (a->verdict != HFR_AUTH_PROTOCOL) return;
  hfr_host_name(host);
  snprintf(text, sizeof text, "rank %d at %s runs %s, the root on %s %s; install the same version on all hosts", a->hello.rank,
           from, hfr_version_text(&a->peer, theirs), host, hfr_version_text(&hfr_version, mine));
  hfr_root_mismatch(a->hello.comm_id, text);
}

/* Builds of one protocol can talk, and are rarely meant to differ. Once a process and other build, not for every connection. */
static void compare_builds(const struct hfr_watch *w) {
  static uint32_t told;
  const struct hfr_auth *a = &w->auth;
  char from[INET6_ADDRSTRLEN], mine[HFR_VERSION_TEXT], theirs[HFR_VERSION_TEXT];
  if (a->hello.kind != HFR_AUTH_ROOT || a->peer.build == hfr_version.build || a->peer.build == told) return;
  told = a->peer.build;
  HFR_WARN("rank %d at %s runs %s, the root %s: the protocols agree and it joins, but install the same version on all hosts",
           a->hello.rank, caller(w, from), hfr_version_text(&a->peer, theirs), hfr_version_text(&hfr_version, mine));
}

/* 1: the handshake is over. */
static int step(struct hfr_watch *w) {
  int r = hfr_auth_step(&w->auth);
  if (r == 0) return 0;
  if (r < 0) {
    char why[400];
    snprintf(why, sizeof why, "%.399s", hfr_last_error()->text);
    tell_root(w);
    refuse(w, why);
    return 1;
  }
  compare_builds(w);
  if (deliver(w)) refuse(w, "nobody waits for it");
  return 1;
}

int hfr_listen_pending(struct hfr_watch *w, int ready, int64_t now) {
  int over = ready && step(w);
  if (!over && now - w->since_ns > HANDSHAKE_NS) {
    refuse(w, w->since_ns ? "no handshake within 5 s" : "too many unfinished handshakes");
    over = 1;
  }
  hfr_rt.pending -= over;
  return over;
}

/* Too many half-open handshakes: the oldest goes. Who means it needs a millisecond, so a crowd of strangers cannot keep ranks
 * out. */
static void expire_oldest(void) {
  struct hfr_watch *oldest = NULL;
  for (struct hfr_watch *w = hfr_rt.watches; w; w = w->next)
    if (w->kind == HFR_WATCH_PENDING && w->since_ns) oldest = w; /* new ones come to the head */
  if (oldest) oldest->since_ns = 0;
}

/* Those who knock are not let in until descriptors are free again. */
static void warn_of_descriptors(void) {
  static int64_t warned_ns;
  int64_t now = hfr_now_ns();
  if (warned_ns && now - warned_ns < 10000000000ll) return;
  warned_ns = now;
  HFR_WARN("cannot accept connections: %s", hfr_errno_text(errno));
}

void hfr_listen_accept(struct hfr_watch *w) {
  for (;;) {
    union {
      struct sockaddr any;
      struct sockaddr_in v4;
      struct sockaddr_in6 v6;
    } peer = {.any.sa_family = AF_UNSPEC};
    socklen_t bytes = sizeof peer;
    int fd = accept4(w->fd, &peer.any, &bytes, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      if (errno == EMFILE || errno == ENFILE) warn_of_descriptors();
      return;
    }
    struct hfr_watch *p = hfr_watch_add(HFR_WATCH_PENDING, fd);
    if (!p) {
      close(fd);
      return;
    }
    p->addr.family = peer.any.sa_family == AF_INET ? 4 : peer.any.sa_family == AF_INET6 ? 6 : 0;
    memcpy(p->addr.ip, p->addr.family == 4 ? (void *)&peer.v4.sin_addr : (void *)&peer.v6.sin6_addr,
           p->addr.family == 4 ? 4 : 16);
    hfr_auth_server(&p->auth, fd, find_secret, NULL);
    if (++hfr_rt.pending > MAX_PENDING) expire_oldest();
  }
}

/* ---------------------------------------------------------------- listeners */

static hfreduceResult_t listen_at(struct hfr_addr *addr, int any_port) {
  for (struct hfr_watch *w = hfr_rt.watches; w; w = w->next)
    if (w->kind == HFR_WATCH_LISTENER && w->addr.family == addr->family && !memcmp(w->addr.ip, addr->ip, 16) &&
        (any_port || w->addr.port == addr->port)) {
      *addr = w->addr;
      w->users++;
      return hfreduceSuccess;
    }
  int fd;
  HFR_TRY(hfr_socket_listen(addr, 512, &fd));
  struct hfr_watch *w = hfr_watch_add(HFR_WATCH_LISTENER, fd);
  if (!w) return close(fd), hfr_fail(hfreduceSystemError, "out of memory");
  w->addr = *addr;
  w->users = 1;
  hfr_watcher_kick();
  return hfreduceSuccess;
}

static struct hfr_watch **find_listener(const struct hfr_addr *addr) {
  struct hfr_watch **at = &hfr_rt.watches;
  while (*at && ((*at)->kind != HFR_WATCH_LISTENER || memcmp(&(*at)->addr, addr, sizeof *addr))) at = &(*at)->next;
  return at;
}

int hfr_listen_use(const struct hfr_addr *addr) {
  struct hfr_watch *w = *find_listener(addr);
  if (w) w->users++;
  return w ? 0 : -1;
}

void hfr_listen_release(const struct hfr_addr *addr) {
  struct hfr_watch **at = find_listener(addr), *w = *at;
  if (!w || --w->users) return;
  *at = w->next;
  /* The watcher may be asleep on it, which would keep it open; and a child between fork and exec has a copy. */
  shutdown(w->fd, SHUT_RDWR);
  close(w->fd);
  free(w);
  hfr_watcher_kick();
}

/* My address on the way to `peer`: what the kernel would send from. Nothing is sent. */
static int route_to(const struct hfr_addr *peer, struct hfr_addr *mine) {
  struct sockaddr_storage to = {0}, from;
  socklen_t len = sizeof from;
  struct sockaddr_in *in4 = (struct sockaddr_in *)&to;
  struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&to;
  if (peer->family == 4) {
    *in4 = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(9)};
    memcpy(&in4->sin_addr, peer->ip, 4);
  } else {
    *in6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons(9)};
    memcpy(&in6->sin6_addr, peer->ip, 16);
  }
  int fd = socket(to.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  int failed = fd < 0 || connect(fd, (struct sockaddr *)&to, peer->family == 4 ? sizeof *in4 : sizeof *in6) ||
               getsockname(fd, (struct sockaddr *)&from, &len);
  if (fd >= 0) close(fd);
  if (failed) return -1;
  *mine = (struct hfr_addr){.family = peer->family};
  if (peer->family == 4)
    memcpy(mine->ip, &((struct sockaddr_in *)&from)->sin_addr, 4);
  else
    memcpy(mine->ip, &((struct sockaddr_in6 *)&from)->sin6_addr, 16);
  return 0;
}

hfreduceResult_t hfr_runtime_listen(int loopback, const struct hfr_addr *root, struct hfr_addr *addr) {
  char name[32];
  if (loopback) {
    *addr = (struct hfr_addr){.family = 4, .ip = {127, 0, 0, 1}};
    if (root && root->family == 6) *addr = (struct hfr_addr){.family = 6, .ip = {[15] = 1}};
  } else if (!root || *hfr_param_text(HFR_PARAM_SOCKET_IFNAME) || *hfr_param_text(HFR_PARAM_SOCKET_FAMILY) ||
             route_to(root, addr)) {
    HFR_TRY(hfr_nic_choose(addr, name));
  }
  addr->port = 0;
  pthread_mutex_lock(&hfr_rt.lock);
  hfreduceResult_t r = hfr_runtime_start();
  if (!r) r = listen_at(addr, 1);
  pthread_mutex_unlock(&hfr_rt.lock);
  return r;
}

hfreduceResult_t hfr_runtime_listen_at(struct hfr_addr *addr) {
  for (int attempt = 0;; attempt++) {
    pthread_mutex_lock(&hfr_rt.lock);
    hfreduceResult_t r = hfr_runtime_start();
    if (!r) r = listen_at(addr, 0);
    pthread_mutex_unlock(&hfr_rt.lock);
    if (r != hfreduceSystemError || attempt == 20) return r;
    poll(NULL, 0, 50); /* a process that was just killed may hold the address for another moment */
  }
}

void hfr_runtime_unlisten(const struct hfr_addr *addr) {
  pthread_mutex_lock(&hfr_rt.lock);
  hfr_listen_release(addr);
  pthread_mutex_unlock(&hfr_rt.lock);
}

long hfr_runtime_refused(void) { return hfr_rt.refused; }
