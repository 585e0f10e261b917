/* Where ranks meet: a root collects one record of each and hands everybody the table, or says why not. */
#include "runtime.h"

#include "../base/log.h"
#include "../base/thread.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TOMBSTONE_NS 30000000000ll
#define REFUSALS_NS 10000000000ll /* from one warning of a refusal to the next */

/* A rendezvous: collects one record a rank, then hands everybody the table. */
struct hfr_root {
  struct hfr_root *next;
  uint64_t comm_id;
  uint8_t secret[16];
  struct hfr_addr addr; /* of the listener that it uses; family 0: none */
  int nranks, got;
  uint64_t members;           /* what the records say */
  hfreduceErrorInfo_t failed; /* code != 0: joining failed; kept for a while, so that who comes late hears it too */
  int told;                   /* how many have heard it */
  int64_t failed_ns;
  int64_t told_ns;           /* when the waiting were last told who is missing */
  struct hfr_record *record; /* by rank; .nranks == 0: not here yet */
  uint64_t name;             /* of the unique id; 0: none */
  int refused;               /* connections that were meant for it, as it seems, and were refused: the last one, in words */
  char refusal[160];
  int64_t warned_ns;
};

static void drop_root(struct hfr_root *root) {
  for (struct hfr_root **at = &hfr_rt.roots; *at; at = &(*at)->next)
    if (*at == root) {
      *at = root->next;
      break;
    }
  for (struct hfr_watch *w = hfr_rt.watches; w; w = w->next)
    if (w->kind == HFR_WATCH_JOINER && w->root == root) w->root = NULL, w->drop = 1; /* goes once its last frame is out */
  if (root->addr.family) hfr_listen_release(&root->addr);
  free(root->record);
  free(root);
}

static void tell_joiners(struct hfr_root *root, enum hfr_frame type, const void *payload, size_t bytes) {
  for (struct hfr_watch *w = hfr_rt.watches; w; w = w->next)
    if (w->kind == HFR_WATCH_JOINER && w->root == root) hfr_conn_send(&w->conn, type, payload, bytes);
}

/* The rendezvous failed: everybody who joined, or will yet, hears why. */
static void fail_root_with(struct hfr_root *root, const hfreduceErrorInfo_t *info) {
  root->failed = *info;
  root->failed_ns = hfr_now_ns();
  for (struct hfr_watch *w = hfr_rt.watches; w; w = w->next) {
    if (w->kind != HFR_WATCH_JOINER || w->root != root) continue;
    hfr_conn_send(&w->conn, HFR_FRAME_ERROR, info, sizeof *info);
    root->told += w->rank >= 0;
    w->root = NULL;
    w->drop = 1;
  }
}

static void fail_root(struct hfr_root *root, int peer, const char *text) {
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
static void join(struct hfr_watch *w, const uint8_t *payload, size_t bytes) {
  struct hfr_record r;
  struct hfr_root *root = w->root;
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

static void tell_missing(struct hfr_root *root, int64_t now) {
  char text[400];
  if (!root->got || root->failed.code || now - root->told_ns < 1000000000) return;
  root->told_ns = now;
  size_t n = (size_t)snprintf(text, sizeof text, "%d of %d ranks have joined, missing", root->got, root->nranks);
  for (int r = 0, named = 0; r < root->nranks && named < 12 && n < sizeof text; r++)
    if (!root->record[r].nranks) n += (size_t)snprintf(text + n, sizeof text - n, "%s rank %d", named++ ? "," : "", r);
  if (root->refused && n < sizeof text)
    n += (size_t)snprintf(text + n, sizeof text - n, "; %d connection%s refused: %s", root->refused,
                          root->refused > 1 ? "s were" : " was", root->refusal);
  if (n > sizeof text - 3) n = sizeof text - 3; /* cut off, with room for the mark */
  text[n] = 0;
  const struct hfr_watch *first = NULL;
  for (const struct hfr_watch *w = hfr_rt.watches; w; w = w->next)
    if (w->kind == HFR_WATCH_JOINER && w->root == root && w->rank >= 0 && (!first || w->rank < first->rank)) first = w;
  /* One of those who wait says it on standard error: the text ends with its mark. */
  for (struct hfr_watch *w = hfr_rt.watches; w; w = w->next) {
    if (w->kind != HFR_WATCH_JOINER || w->root != root) continue;
    text[n + 1] = w == first;
    hfr_conn_send(&w->conn, HFR_FRAME_WAITING, text, n + 2);
  }
}

/* A rank's deadline passed while others were missing: it says so before it goes, and all hear the same. */
static void gave_up(struct hfr_watch *w, const uint8_t *payload, size_t bytes) {
  hfreduceErrorInfo_t info;
  struct hfr_root *root = w->root;
  if (hfr_conn_error(payload, bytes, &info)) {
    w->conn.dead = 1;
    return;
  }
  root->told++; /* it knows */
  w->root = NULL;
  w->drop = 1;
  fail_root_with(root, &info);
}

void hfr_root_event(struct hfr_watch *w) {
  enum hfr_frame type;
  const uint8_t *payload;
  size_t bytes;
  hfr_conn_flush(&w->conn);
  hfr_conn_fill(&w->conn);
  while (w->root && !w->conn.dead && hfr_conn_next(&w->conn, &type, &payload, &bytes))
    if (type == HFR_FRAME_JOIN)
      join(w, payload, bytes);
    else if (type == HFR_FRAME_ERROR && w->rank >= 0)
      gave_up(w, payload, bytes);
  if (!w->conn.dead || !w->root || w->rank < 0) return;
  char text[200];
  snprintf(text, sizeof text, "rank %d on %s left or died while the ranks were joining", w->rank, w->root->record[w->rank].host);
  struct hfr_root *root = w->root;
  int rank = w->rank;
  w->root = NULL;
  fail_root(root, rank, text);
}

void hfr_root_tick(int64_t now) {
  for (struct hfr_root *r = hfr_rt.roots, *next; r; r = next) {
    next = r->next;
    if (r->failed.code && now - r->failed_ns > TOMBSTONE_NS)
      drop_root(r);
    else
      tell_missing(r, now);
  }
}

static struct hfr_root *find_root(uint64_t comm_id) {
  struct hfr_root *r = hfr_rt.roots;
  while (r && r->comm_id != comm_id) r = r->next;
  return r;
}

enum hfr_auth_verdict hfr_root_secret(uint64_t comm_id, uint64_t name, uint8_t secret[16]) {
  const struct hfr_root *r = find_root(comm_id);
  if (r) {
    memcpy(secret, r->secret, 16);
    return HFR_AUTH_WELCOME;
  }
  for (r = hfr_rt.roots; r; r = r->next)
    if (name && r->name == name) return HFR_AUTH_SECRET;
  return HFR_AUTH_UNKNOWN;
}

void hfr_root_refused(uint64_t comm_id, uint64_t name, const char *from, const char *why) {
  int64_t now = hfr_now_ns();
  for (struct hfr_root *r = hfr_rt.roots; r; r = r->next) {
    if (r->failed.code || (name && r->name != name && r->comm_id != comm_id)) continue;
    r->refused++;
    snprintf(r->refusal, sizeof r->refusal, "%s from %s", why, from);
    if (r->warned_ns && now - r->warned_ns < REFUSALS_NS) continue;
    r->warned_ns = now;
    HFR_WARN("refused a connection while ranks are joining: %s from %s (%d so far)", why, from, r->refused);
  }
}

void hfr_root_mismatch(uint64_t comm_id, const char *text) {
  struct hfr_root *r = find_root(comm_id);
  if (!r || r->failed.code) return;
  HFR_WARN("%s", text);
  fail_root(r, -1, text);
}

int hfr_root_welcome(uint64_t comm_id, int fd) {
  struct hfr_root *r = find_root(comm_id);
  struct hfr_watch *w = r ? hfr_watch_add(HFR_WATCH_JOINER, fd) : NULL;
  if (!w) return -1;
  hfr_conn_init(&w->conn, fd, sizeof(hfreduceErrorInfo_t));
  w->root = r;
  return 0;
}

hfreduceResult_t hfr_runtime_open_root(const struct hfr_uid *uid) {
  struct hfr_root *r = calloc(1, sizeof *r);
  if (!r) return hfr_fail(hfreduceSystemError, "out of memory");
  r->comm_id = hfr_uid_root(uid);
  memcpy(r->secret, uid->secret, 16);
  r->name = uid->name;
  pthread_mutex_lock(&hfr_rt.lock);
  for (struct hfr_root *old = hfr_rt.roots, *next; old; old = next) { /* a failed one of this name has served its turn */
    next = old->next;
    if (old->comm_id == r->comm_id && old->failed.code) drop_root(old);
  }
  if (!hfr_listen_use(&uid->root)) r->addr = uid->root;
  r->next = hfr_rt.roots;
  hfr_rt.roots = r;
  pthread_mutex_unlock(&hfr_rt.lock);
  hfr_watcher_kick();
  return hfreduceSuccess;
}

void hfr_runtime_linger(const struct hfr_uid *uid, int64_t limit_ns) {
  int64_t end = hfr_now_ns() + limit_ns;
  for (int waiting = 1; waiting && hfr_now_ns() < end;) {
    waiting = 0;
    pthread_mutex_lock(&hfr_rt.lock);
    for (struct hfr_root *r = hfr_rt.roots; r; r = r->next)
      if (r->comm_id == hfr_uid_root(uid)) waiting = r->failed.code && r->told < r->nranks;
    pthread_mutex_unlock(&hfr_rt.lock);
    if (waiting) poll(NULL, 0, 5);
  }
}
