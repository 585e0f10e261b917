/*
 * The process' side of all communicators: listeners, and the watcher thread that accepts and authenticates connections, serves
 * rendezvous, and watches the control connections, so that a death, an abort or an error of one rank reaches all. Nothing here
 * blocks on a peer.
 */
#include "comm.h"

#include "../base/auth.h"
#include "../base/log.h"
#include "../base/mac.h"
#include "../base/param.h"
#include "../base/thread.h"
#include "../topo/nic.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#define HANDSHAKE_NS 5000000000ll
#define MAX_PENDING 256
#define TICK_MS 250
#define ATTEND_MS 5 /* while a link of a rank that computes comes up anew */

enum watch_kind { WATCH_LISTENER, WATCH_PENDING, WATCH_JOINER };

/* A rendezvous: collects one record a rank, then hands everybody the table. */
struct root {
  struct root *next;
  uint64_t comm_id;
  uint8_t secret[16];
  int nranks, got;
  uint64_t members;           /* what the records say */
  hfreduceErrorInfo_t failed; /* code != 0: joining failed; kept for a while, so that who comes late hears it too */
  int told;                   /* how many have heard it */
  int64_t failed_ns;
  int64_t told_ns;           /* when the waiting were last told who is missing */
  struct hfr_record *record; /* by rank; .nranks == 0: not here yet */
};

struct watch {
  struct watch *next;
  enum watch_kind kind;
  int fd, slot;
  int64_t since_ns;
  struct hfr_addr addr; /* LISTENER */
  struct hfr_auth auth; /* PENDING */
  struct hfr_conn conn; /* JOINER */
  struct root *root;
  int rank, drop;
};

static struct {
  pthread_mutex_t lock;
  int started, kick_fd, pending;
  struct watch *watches;
  struct root *roots;
  struct hfreduceComm *comms;
  long refused;
} rt = {.lock = PTHREAD_MUTEX_INITIALIZER, .kick_fd = -1};

static void kick(void) {
  uint64_t one = 1;
  if (rt.kick_fd >= 0) (void)!write(rt.kick_fd, &one, sizeof one);
}

static struct watch *add_watch(enum watch_kind kind, int fd) {
  struct watch *w = calloc(1, sizeof *w);
  if (!w) return NULL;
  *w = (struct watch){.next = rt.watches, .kind = kind, .fd = fd, .slot = -1, .since_ns = hfr_now_ns(), .rank = -1};
  rt.watches = w;
  return w;
}

/* ---------------------------------------------------------------- rendezvous */

static void drop_root(struct root *root) {
  for (struct root **at = &rt.roots; *at; at = &(*at)->next)
    if (*at == root) {
      *at = root->next;
      break;
    }
  for (struct watch *w = rt.watches; w; w = w->next)
    if (w->kind == WATCH_JOINER && w->root == root) w->root = NULL, w->drop = 1; /* goes once its last frame is out */
  free(root->record);
  free(root);
}

static void tell_joiners(struct root *root, enum hfr_frame type, const void *payload, size_t bytes) {
  for (struct watch *w = rt.watches; w; w = w->next)
    if (w->kind == WATCH_JOINER && w->root == root) hfr_conn_send(&w->conn, type, payload, bytes);
}

#define TOMBSTONE_NS 30000000000ll

/* The rendezvous failed: everybody who joined, or will yet, hears why. */
static void fail_root_with(struct root *root, const hfreduceErrorInfo_t *info) {
  root->failed = *info;
  root->failed_ns = hfr_now_ns();
  for (struct watch *w = rt.watches; w; w = w->next) {
    if (w->kind != WATCH_JOINER || w->root != root) continue;
    hfr_conn_send(&w->conn, HFR_FRAME_ERROR, info, sizeof *info);
    root->told += w->rank >= 0;
    w->root = NULL;
    w->drop = 1;
  }
}

static void fail_root(struct root *root, int peer, const char *text) {
  hfreduceErrorInfo_t info;
  hfr_error_clear(&info);
  info.code = hfreduceInvalidUsage;
  if (peer >= 0) info.code = hfreduceRemoteError, info.peer = peer;
  snprintf(info.op, sizeof info.op, "init");
  snprintf(info.phase, sizeof info.phase, "rendezvous");
  snprintf(info.text, sizeof info.text, "%s", text);
  fail_root_with(root, &info);
}

/* A record came in. Its contents are believed only within bounds. */
static void join(struct watch *w, const uint8_t *payload, size_t bytes) {
  struct hfr_record r;
  struct root *root = w->root;
  char text[400];
  if (bytes != sizeof r || w->rank >= 0) {
    w->conn.dead = 1;
    return;
  }
  if (root->failed.code) { /* late */
    hfr_conn_send(&w->conn, HFR_FRAME_ERROR, &root->failed, sizeof root->failed);
    root->told++;
    w->root = NULL;
    w->drop = 1;
    return;
  }
  memcpy(&r, payload, sizeof r);
  r.host[sizeof r.host - 1] = 0;
  if (r.nranks < 1 || r.nranks > 1000000 || r.rank < 0 || r.rank >= r.nranks) {
    w->conn.dead = 1;
    return;
  }
  if (!root->nranks) {
    root->record = calloc((size_t)r.nranks, sizeof r);
    if (!root->record) {
      w->conn.dead = 1;
      return;
    }
    root->nranks = r.nranks;
  }
  if (r.nranks != root->nranks) {
    snprintf(text, sizeof text,
             "rank %d (process %u on %s) says there are %d ranks, earlier ones said %d; give all the same number", r.rank, r.pid,
             r.host, r.nranks, root->nranks);
    fail_root(root, -1, text);
    return;
  }
  if (root->got && r.members != root->members) {
    snprintf(text, sizeof text,
             "rank %d (process %u on %s) and those that joined before leave out different ranks; give the same list on all",
             r.rank, r.pid, r.host);
    fail_root(root, -1, text);
    return;
  }
  root->members = r.members;
  if (root->record[r.rank].nranks) {
    w->rank = r.rank;
    snprintf(text, sizeof text,
             "rank %d joined twice: process %u on %s and process %u on %s; give each process a rank of its own", r.rank,
             root->record[r.rank].pid, root->record[r.rank].host, r.pid, r.host);
    fail_root(root, -1, text);
    return;
  }
  w->rank = r.rank;
  root->record[r.rank] = r;
  if (++root->got < root->nranks) return;
  tell_joiners(root, HFR_FRAME_TABLE, root->record, (size_t)root->nranks * sizeof r);
  drop_root(root);
}

static void tell_missing(struct root *root, int64_t now) {
  char text[400];
  if (!root->got || root->failed.code || now - root->told_ns < 1000000000) return;
  root->told_ns = now;
  size_t n = (size_t)snprintf(text, sizeof text, "%d of %d ranks have joined, missing", root->got, root->nranks);
  for (int r = 0, named = 0; r < root->nranks && named < 12 && n < sizeof text; r++)
    if (!root->record[r].nranks) n += (size_t)snprintf(text + n, sizeof text - n, "%s rank %d", named++ ? "," : "", r);
  tell_joiners(root, HFR_FRAME_WAITING, text, strlen(text) + 1);
}

/* A rank's deadline passed while others were missing: it says so before it goes, and all hear the same. */
static void gave_up(struct watch *w, const uint8_t *payload) {
  hfreduceErrorInfo_t info;
  struct root *root = w->root;
  memcpy(&info, payload, sizeof info);
  info.op[sizeof info.op - 1] = info.phase[sizeof info.phase - 1] = info.host[sizeof info.host - 1] =
      info.text[sizeof info.text - 1] = 0;
  root->told++; /* it knows */
  w->root = NULL;
  w->drop = 1;
  fail_root_with(root, &info);
}

static void joiner_event(struct watch *w) {
  enum hfr_frame type;
  const uint8_t *payload;
  size_t bytes;
  hfr_conn_flush(&w->conn);
  hfr_conn_fill(&w->conn);
  while (w->root && !w->conn.dead && hfr_conn_next(&w->conn, &type, &payload, &bytes))
    if (type == HFR_FRAME_JOIN)
      join(w, payload, bytes);
    else if (type == HFR_FRAME_ERROR && bytes == sizeof(hfreduceErrorInfo_t) && w->rank >= 0)
      gave_up(w, payload);
  if (!w->conn.dead || !w->root || w->rank < 0) return;
  char text[200];
  snprintf(text, sizeof text, "rank %d on %s left or died while the ranks were joining", w->rank, w->root->record[w->rank].host);
  struct root *root = w->root;
  int rank = w->rank;
  w->root = NULL;
  fail_root(root, rank, text);
}

/* ---------------------------------------------------------------- control connections */

static struct hfr_conn *control_of(struct hfreduceComm *c, int peer) { return &c->control[c->rank == 0 ? peer : 0]; }

static void moved(struct hfreduceComm *c) {
  atomic_fetch_add(&c->go, 1);
  hfr_futex_wake(&c->go, INT32_MAX);
}

/* An error reached this rank from outside. */
static void take_error(struct hfreduceComm *c, const hfreduceErrorInfo_t *info) {
  if (!c->failed) {
    c->early = *info;
    c->failed = 1; /* pairs with who joins (bootstrap.c): the facts are whole */
  }
  moved(c);
  if (c->engine_up) hfr_engine_break(&c->engine, info);
}

static void peer_lost(struct hfreduceComm *c, int peer, const char *how) {
  hfreduceErrorInfo_t info;
  if (atomic_load(&c->closing) || (c->engine_up && atomic_load(&c->engine.left_ns[peer]))) return;
  hfr_error_clear(&info);
  info.code = hfreduceRemoteError;
  info.rank = c->rank;
  info.peer = peer;
  snprintf(info.phase, sizeof info.phase, "watch");
  snprintf(info.op, sizeof info.op, "communicator");
  snprintf(info.text, sizeof info.text, "rank %d on %s %s", peer, c->hosts ? c->hosts[peer] : "?", how);
  if (c->rank == 0)
    for (int r = 1; r < c->nranks; r++)
      if (r != peer && c->control[r].fd >= 0) hfr_conn_send(&c->control[r], HFR_FRAME_ERROR, &info, sizeof info);
  take_error(c, &info);
}

static void peer_left(struct hfreduceComm *c, int rank) {
  if (rank < 0 || rank >= c->nranks || !c->engine_up) return;
  atomic_store(&c->engine.left_ns[rank], hfr_now_ns());
  atomic_store(&c->engine.anyone_left, 1);
}

/* Rank 0: rank says what it waits in. Two that wait in different operations of one number will wait for ever. */
static void compare_stuck(struct hfreduceComm *c, int rank, const struct hfr_fingerprint *fp) {
  char mine[128], theirs[128];
  if (fp->seq) c->stuck[rank] = *fp;
  for (int r = 0; r < c->nranks && fp->seq; r++) {
    if (c->stuck[r].seq != fp->seq || hfr_fingerprint_equal(&c->stuck[r], fp)) continue;
    hfreduceErrorInfo_t info;
    hfr_error_clear(&info);
    info.code = hfreduceMismatch;
    info.rank = rank;
    info.peer = r;
    info.seq = (long long)fp->seq;
    snprintf(info.op, sizeof info.op, "%s", hfr_coll_name(fp->coll));
    snprintf(info.phase, sizeof info.phase, "verify");
    snprintf(info.host, sizeof info.host, "%s", c->hosts[rank]);
    hfr_describe_fingerprint(fp, mine, sizeof mine);
    hfr_describe_fingerprint(&c->stuck[r], theirs, sizeof theirs);
    snprintf(info.text, sizeof info.text,
             "ranks disagree: rank %d on %s called %s but rank %d on %s called %s; all ranks must make the same calls in the "
             "same order",
             rank, c->hosts[rank], mine, r, c->hosts[r], theirs);
    for (int q = 1; q < c->nranks; q++)
      if (c->control[q].fd >= 0) hfr_conn_send(&c->control[q], HFR_FRAME_ERROR, &info, sizeof info);
    take_error(c, &info);
    return;
  }
}

void hfr_runtime_stuck(struct hfreduceComm *c, const struct hfr_fingerprint *fp) {
  pthread_mutex_lock(&rt.lock);
  if (c->rank == 0)
    compare_stuck(c, 0, fp);
  else if (c->ncontrol && c->control[0].fd >= 0)
    hfr_conn_send(&c->control[0], HFR_FRAME_STUCK, fp, sizeof *fp);
  pthread_mutex_unlock(&rt.lock);
}

static void control_frame(struct hfreduceComm *c, int peer, enum hfr_frame type, const uint8_t *payload, size_t bytes) {
  hfreduceErrorInfo_t info;
  struct hfr_fingerprint fp;
  int32_t rank;
  switch (type) {
    case HFR_FRAME_READY:
      if (c->rank == 0) {
        c->ready++;
        moved(c);
      }
      break;
    case HFR_FRAME_GO:
      c->went = 1;
      moved(c);
      break;
    case HFR_FRAME_STUCK:
      if (c->rank != 0 || bytes != sizeof fp || !c->engine_up) break;
      memcpy(&fp, payload, sizeof fp);
      compare_stuck(c, peer, &fp);
      break;
    case HFR_FRAME_BYE:
      if (bytes != sizeof rank) break;
      memcpy(&rank, payload, sizeof rank);
      if (c->rank == 0 && rank != peer) break;
      peer_left(c, rank);
      if (c->rank == 0)
        for (int r = 1; r < c->nranks; r++)
          if (r != peer && c->control[r].fd >= 0) hfr_conn_send(&c->control[r], HFR_FRAME_BYE, &rank, sizeof rank);
      break;
    case HFR_FRAME_ERROR:
      if (bytes != sizeof info) break;
      memcpy(&info, payload, sizeof info);
      info.op[sizeof info.op - 1] = info.phase[sizeof info.phase - 1] = info.host[sizeof info.host - 1] =
          info.text[sizeof info.text - 1] = 0;
      if (info.code <= 0 || info.code >= hfreduceNumResults) break;
      if (c->rank == 0)
        for (int r = 1; r < c->nranks; r++)
          if (r != peer && c->control[r].fd >= 0) hfr_conn_send(&c->control[r], HFR_FRAME_ERROR, &info, sizeof info);
      take_error(c, &info);
      break;
    default: break;
  }
}

static void control_event(struct hfreduceComm *c, int peer) {
  enum hfr_frame type;
  const uint8_t *payload;
  size_t bytes;
  struct hfr_conn *conn = control_of(c, peer);
  hfr_conn_flush(conn);
  hfr_conn_fill(conn);
  int dead = conn->dead; /* frames before the end still count */
  conn->dead = 0;
  while (!conn->dead && hfr_conn_next(conn, &type, &payload, &bytes)) control_frame(c, peer, type, payload, bytes);
  if (!dead && !conn->dead) return;
  hfr_conn_close(conn);
  peer_lost(c, peer, "died or lost its connection");
}

static void heartbeat(struct hfreduceComm *c, int64_t now) {
  int64_t limit = (int64_t)(hfr_param_real(HFR_PARAM_HEARTBEAT) * 1e9);
  if (!limit || !c->went) return;
  for (int i = 0; i < c->ncontrol; i++) {
    struct hfr_conn *conn = &c->control[i];
    if (conn->fd < 0) continue;
    hfr_conn_send(conn, HFR_FRAME_PING, NULL, 0);
    if (now - conn->heard_ns < limit) continue;
    char how[120];
    snprintf(how, sizeof how, "has been silent for %.1f s: stopped, or its host is unreachable",
             (double)(now - conn->heard_ns) * 1e-9);
    hfr_conn_close(conn);
    peer_lost(c, c->rank == 0 ? i : 0, how);
  }
}

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
  for (struct hfreduceComm *c = rt.comms; c; c = c->next)
    if (atomic_load_explicit(&c->engine_up, memory_order_acquire) && !c->forked) again |= hfr_engine_attend(&c->engine);
  return again;
}

/* ---------------------------------------------------------------- accepting */

static int find_secret(void *arg, const struct hfr_auth_hello *hello, uint8_t secret[16]) {
  (void)arg;
  if (hello->kind == HFR_AUTH_ROOT) {
    for (struct root *r = rt.roots; r; r = r->next)
      if (r->comm_id == hello->comm_id) return memcpy(secret, r->secret, 16), 0;
    return -1;
  }
  for (struct hfreduceComm *c = rt.comms; c; c = c->next)
    if (c->uid.comm_id == hello->comm_id && c->rank == hello->target) return memcpy(secret, c->uid.secret, 16), 0;
  return -1;
}

/* Give an authenticated connection to whom it is for. 0 taken, -1 not wanted. */
static int deliver(struct watch *w) {
  const struct hfr_auth_hello *h = &w->auth.hello;
  if (h->kind == HFR_AUTH_ROOT) {
    for (struct root *r = rt.roots; r; r = r->next)
      if (r->comm_id == h->comm_id) {
        struct watch *j = add_watch(WATCH_JOINER, w->fd);
        if (!j) return -1;
        hfr_conn_init(&j->conn, w->fd, sizeof(hfreduceErrorInfo_t));
        j->root = r;
        return 0;
      }
    return -1;
  }
  struct hfreduceComm *c = rt.comms;
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

static void refuse(struct watch *w, const char *why) {
  struct sockaddr_storage peer;
  socklen_t len = sizeof peer;
  char who[64] = "?";
  if (!getpeername(w->fd, (struct sockaddr *)&peer, &len) && peer.ss_family == AF_INET) {
    const uint8_t *ip = (const uint8_t *)&((struct sockaddr_in *)&peer)->sin_addr;
    snprintf(who, sizeof who, "%u.%u.%u.%u", ip[0], ip[1], ip[2], ip[3]);
  }
  rt.refused++;
  HFR_INFO("refused a connection from %s (%ld so far): %s", who, rt.refused, why);
  close(w->fd);
}

/* 1: the watch is finished with. */
static int pending_event(struct watch *w) {
  int r = hfr_auth_step(&w->auth);
  if (r == 0) return 0;
  if (r < 0)
    refuse(w, hfr_last_error()->text);
  else if (deliver(w))
    refuse(w, "nobody waits for it");
  rt.pending--;
  return 1;
}

/* Too many half-open handshakes: the oldest goes. Who means it needs a millisecond, so a crowd of strangers cannot keep ranks
 * out. */
static void expire_oldest(void) {
  struct watch *oldest = NULL;
  for (struct watch *w = rt.watches; w; w = w->next)
    if (w->kind == WATCH_PENDING && w->since_ns) oldest = w; /* new ones come to the head */
  if (oldest) oldest->since_ns = 0;
}

static void accept_all(struct watch *w) {
  for (;;) {
    int fd = accept4(w->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    struct watch *p = add_watch(WATCH_PENDING, fd);
    if (!p) {
      close(fd);
      return;
    }
    hfr_auth_server(&p->auth, fd, find_secret, NULL);
    if (++rt.pending > MAX_PENDING) expire_oldest();
  }
}

/* ---------------------------------------------------------------- the watcher */

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
  want(p, rt.kick_fd, POLLIN);
  for (struct watch *w = rt.watches; w; w = w->next) {
    int events = w->kind == WATCH_PENDING                     ? w->auth.events
                 : w->kind == WATCH_JOINER && w->conn.tx_have ? POLLIN | POLLOUT
                                                              : POLLIN;
    w->slot = want(p, w->fd, events);
  }
}

/* Control connections follow the watches, in the order of rt.comms; `first` tells a communicator that came after collect(). */
static void collect_controls(struct polled *p) {
  for (struct hfreduceComm *c = rt.comms; c; c = c->next)
    for (int i = 0; i < c->ncontrol; i++)
      if (c->control[i].fd >= 0) want(p, c->control[i].fd, c->control[i].tx_have ? POLLIN | POLLOUT : POLLIN);
}

static short happened(const struct polled *p, int from, int fd) {
  for (int i = from; i < p->n; i++)
    if (p->fd[i].fd == fd) return p->fd[i].revents;
  return 0;
}

static void serve_watches(const struct polled *p, int64_t now) {
  for (struct watch **at = &rt.watches; *at;) {
    struct watch *w = *at;
    int ready = w->slot >= 0 && p->fd[w->slot].revents, over = 0;
    w->slot = -1;
    if (w->kind == WATCH_LISTENER && ready) accept_all(w);
    if (w->kind == WATCH_PENDING) {
      if (ready) over = pending_event(w);
      if (!over && now - w->since_ns > HANDSHAKE_NS)
        refuse(w, w->since_ns ? "no handshake within 5 s" : "too many unfinished handshakes"), rt.pending--, over = 1;
    }
    if (w->kind == WATCH_JOINER) {
      if (ready) joiner_event(w);
      if (w->conn.dead || (w->drop && !w->conn.tx_have)) hfr_conn_close(&w->conn), over = 1;
    }
    /* handlers put new watches at the head: find our place again */
    at = &rt.watches;
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
  for (struct hfreduceComm *c = rt.comms; c; c = c->next)
    for (int i = 0; i < c->ncontrol; i++) {
      int fd = c->control[i].fd;
      if (fd < 0) continue;
      short events = next < p->n && p->fd[next].fd == fd ? p->fd[next++].revents : happened(p, from, fd);
      if (events) control_event(c, c->rank == 0 ? i : 0);
    }
}

static void *watcher_main(void *arg) {
  struct polled p = {0};
  int64_t ticked = hfr_now_ns();
  int attending = 0;
  (void)arg;
  pthread_mutex_lock(&rt.lock);
  for (;;) {
    collect(&p);
    int from = p.n;
    collect_controls(&p);
    int quiet = !rt.comms && !rt.roots && !rt.pending;
    pthread_mutex_unlock(&rt.lock);
    poll(p.fd, (nfds_t)p.n, quiet ? -1 : attending ? ATTEND_MS : TICK_MS);
    pthread_mutex_lock(&rt.lock);
    uint64_t drain;
    if (p.fd[0].revents) (void)!read(rt.kick_fd, &drain, sizeof drain);
    int64_t now = hfr_now_ns();
    serve_watches(&p, now);
    serve_controls(&p, from);
    if (attending) attending = attend();
    if (now - ticked < TICK_MS * 1000000ll) continue;
    ticked = now;
    for (struct root *r = rt.roots, *next; r; r = next) {
      next = r->next;
      if (r->failed.code && now - r->failed_ns > TOMBSTONE_NS)
        drop_root(r);
      else
        tell_missing(r, now);
    }
    for (struct hfreduceComm *c = rt.comms; c; c = c->next) {
      heartbeat(c, now);
      rest(c);
    }
    attending = attend();
    hfr_transport_tidy();
  }
  return NULL;
}

/* ---------------------------------------------------------------- process life */

/* At exit: tell the peers that this is no crash. */
static void at_exit(void) {
  if (pthread_mutex_trylock(&rt.lock)) return;
  for (struct hfreduceComm *c = rt.comms; c; c = c->next) {
    int32_t rank = c->rank;
    if (c->pid != getpid()) continue;
    for (int i = 0; i < c->ncontrol; i++)
      if (c->control[i].fd >= 0) hfr_conn_send(&c->control[i], HFR_FRAME_BYE, &rank, sizeof rank);
  }
  pthread_mutex_unlock(&rt.lock);
}

static void before_fork(void) { pthread_mutex_lock(&rt.lock); }
static void parent_after_fork(void) { pthread_mutex_unlock(&rt.lock); }

/* The child has no threads of ours and must not keep connections open that tell peers that the parent lives. */
static void child_after_fork(void) {
  if (rt.kick_fd >= 0) close(rt.kick_fd);
  for (struct watch *w = rt.watches; w; w = w->next) close(w->fd);
  for (struct hfreduceComm *c = rt.comms; c; c = c->next) {
    c->forked = 1;
    for (int i = 0; i < c->ncontrol; i++)
      if (c->control[i].fd >= 0) close(c->control[i].fd), c->control[i].fd = -1;
    if (!c->engine_up) continue;
    for (size_t i = 0; i < (size_t)c->nranks * HFR_NVC; i++) {
      struct hfr_link *link = c->engine.link[i];
      if (link) link->transport->after_fork(link);
    }
    hfr_arena_after_fork(&c->arena);
  }
  memset(&rt, 0, sizeof rt);
  pthread_mutex_init(&rt.lock, NULL);
  rt.kick_fd = -1;
  hfr_drive_after_fork();
}

static hfreduceResult_t start(void) {
  static int registered;
  pthread_attr_t attr;
  pthread_t thread;
  sigset_t all, old;
  if (rt.started) return hfreduceSuccess;
  rt.kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (rt.kick_fd < 0) return hfr_fail(hfreduceSystemError, "eventfd failed: %s", strerror(errno));
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* signals belong to the program's threads */
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, 512 * 1024);
  int error = pthread_create(&thread, &attr, watcher_main, NULL);
  pthread_attr_destroy(&attr);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  if (error) return hfr_fail(hfreduceSystemError, "cannot start the watcher thread: %s", strerror(error));
  rt.started = 1;
  if (!registered++) {
    atexit(at_exit);
    pthread_atfork(before_fork, parent_after_fork, child_after_fork);
  }
  return hfreduceSuccess;
}

static hfreduceResult_t listen_at(struct hfr_addr *addr, int any_port) {
  for (struct watch *w = rt.watches; w; w = w->next)
    if (w->kind == WATCH_LISTENER && w->addr.family == addr->family && !memcmp(w->addr.ip, addr->ip, 16) &&
        (any_port || w->addr.port == addr->port)) {
      *addr = w->addr;
      return hfreduceSuccess;
    }
  int fd;
  HFR_TRY(hfr_socket_listen(addr, 512, &fd));
  struct watch *w = add_watch(WATCH_LISTENER, fd);
  if (!w) return close(fd), hfr_fail(hfreduceSystemError, "out of memory");
  w->addr = *addr;
  kick();
  return hfreduceSuccess;
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
  pthread_mutex_lock(&rt.lock);
  hfreduceResult_t r = start();
  if (!r) r = listen_at(addr, 1);
  pthread_mutex_unlock(&rt.lock);
  return r;
}

hfreduceResult_t hfr_runtime_listen_at(struct hfr_addr *addr) {
  for (int attempt = 0;; attempt++) {
    pthread_mutex_lock(&rt.lock);
    hfreduceResult_t r = start();
    if (!r) r = listen_at(addr, 0);
    pthread_mutex_unlock(&rt.lock);
    if (r != hfreduceSystemError || attempt == 20) return r;
    poll(NULL, 0, 50); /* a process that was just killed may hold the address for another moment */
  }
}

hfreduceResult_t hfr_runtime_open_root(const struct hfr_uid *uid) {
  struct root *r = calloc(1, sizeof *r);
  if (!r) return hfr_fail(hfreduceSystemError, "out of memory");
  r->comm_id = hfr_uid_root(uid);
  memcpy(r->secret, uid->secret, 16);
  pthread_mutex_lock(&rt.lock);
  for (struct root *old = rt.roots, *next; old; old = next) { /* a failed one of this name has served its turn */
    next = old->next;
    if (old->comm_id == r->comm_id && old->failed.code) drop_root(old);
  }
  r->next = rt.roots;
  rt.roots = r;
  pthread_mutex_unlock(&rt.lock);
  kick();
  return hfreduceSuccess;
}

void hfr_runtime_linger(const struct hfr_uid *uid, int64_t limit_ns) {
  int64_t end = hfr_now_ns() + limit_ns;
  for (int waiting = 1; waiting && hfr_now_ns() < end;) {
    waiting = 0;
    pthread_mutex_lock(&rt.lock);
    for (struct root *r = rt.roots; r; r = r->next)
      if (r->comm_id == hfr_uid_root(uid)) waiting = r->failed.code && r->told < r->nranks;
    pthread_mutex_unlock(&rt.lock);
    if (waiting) poll(NULL, 0, 5);
  }
}

hfreduceResult_t hfr_runtime_add(struct hfreduceComm *c) {
  c->ncontrol = c->rank == 0 ? c->nranks : 1;
  c->control = calloc((size_t)c->ncontrol, sizeof *c->control);
  if (c->rank == 0) c->stuck = calloc((size_t)c->nranks, sizeof *c->stuck);
  if (!c->control || (c->rank == 0 && !c->stuck))
    return hfr_fail(hfreduceSystemError, "out of memory for %d control connections", c->ncontrol);
  for (int i = 0; i < c->ncontrol; i++) c->control[i].fd = -1;
  pthread_mutex_lock(&rt.lock);
  c->next = rt.comms;
  rt.comms = c;
  pthread_mutex_unlock(&rt.lock);
  kick();
  return hfreduceSuccess;
}

int hfr_runtime_ranks_here(const struct hfreduceComm *c) {
  int n = 0;
  pthread_mutex_lock(&rt.lock);
  for (const struct hfreduceComm *each = rt.comms; each; each = each->next) n += each->uid.comm_id == c->uid.comm_id;
  pthread_mutex_unlock(&rt.lock);
  return n;
}

void hfr_runtime_remove(struct hfreduceComm *c) {
  int32_t rank = c->rank;
  pthread_mutex_lock(&rt.lock);
  for (struct hfreduceComm **at = &rt.comms; *at; at = &(*at)->next)
    if (*at == c) {
      *at = c->next;
      break;
    }
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
  free(c->control);
  free(c->stuck);
  c->stuck = NULL;
  c->control = NULL;
  c->ncontrol = 0;
  pthread_mutex_unlock(&rt.lock);
  kick();
}

void hfr_runtime_control(struct hfreduceComm *c, int fd) {
  pthread_mutex_lock(&rt.lock);
  hfr_conn_init(&c->control[0], fd, sizeof(hfreduceErrorInfo_t));
  pthread_mutex_unlock(&rt.lock);
  kick();
}

void hfr_runtime_flood(struct hfreduceComm *c, enum hfr_frame type, const void *payload, size_t bytes, int except) {
  pthread_mutex_lock(&rt.lock);
  for (int i = 0; i < c->ncontrol; i++)
    if (i != except && c->control[i].fd >= 0) hfr_conn_send(&c->control[i], type, payload, bytes);
  pthread_mutex_unlock(&rt.lock);
  kick(); /* what did not fit goes out from the watcher */
}

long hfr_runtime_refused(void) { return rt.refused; }
