/*
 * Control connections: a death, an abort or an error of one rank reaches all, over rank 0. So do the questions whether ranks that
 * wait long wait in the same operation.
 */
#include "runtime.h"

#include "../base/param.h"
#include "../base/thread.h"

#include <stdio.h>
#include <string.h>

static struct hfr_conn *control_of(struct hfreduceComm *c, int peer) { return &c->control[c->rank == 0 ? peer : 0]; }

static void moved(struct hfreduceComm *c) {
  atomic_fetch_add(&c->go, 1);
  hfr_futex_wake(&c->go, INT32_MAX);
}

/* An error reached this rank from outside. */
static void take_error(struct hfreduceComm *c, const hfreduceErrorInfo_t *info) {
  atomic_store(&c->untold, 0); /* it comes by rank 0, which tells everybody */
  if (!c->failed) {
    c->early = *info;
    c->failed = 1; /* pairs with who joins (bootstrap.c): the facts are whole */
  }
  moved(c);
  if (c->engine_up) hfr_engine_tell(&c->engine, info);
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
  pthread_mutex_lock(&hfr_rt.lock);
  if (c->rank == 0)
    compare_stuck(c, 0, fp);
  else if (c->ncontrol && c->control[0].fd >= 0)
    hfr_conn_send(&c->control[0], HFR_FRAME_STUCK, fp, sizeof *fp);
  pthread_mutex_unlock(&hfr_rt.lock);
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
      if (hfr_conn_error(payload, bytes, &info)) break;
      if (c->rank == 0)
        for (int r = 1; r < c->nranks; r++)
          if (r != peer && c->control[r].fd >= 0) hfr_conn_send(&c->control[r], HFR_FRAME_ERROR, &info, sizeof info);
      take_error(c, &info);
      break;
    default: break;
  }
}

void hfr_control_event(struct hfreduceComm *c, int peer) {
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

void hfr_control_tell(struct hfreduceComm *c) {
  hfreduceErrorInfo_t info;
  if (!atomic_exchange(&c->untold, 0) || !hfr_engine_error(&c->engine, &info)) return;
  for (int i = 0; i < c->ncontrol; i++)
    if (c->control[i].fd >= 0) hfr_conn_send(&c->control[i], HFR_FRAME_ERROR, &info, sizeof info);
}

void hfr_control_tick(struct hfreduceComm *c, int64_t now) {
  hfr_control_tell(c);
  if (c->engine_up) hfr_engine_settle(&c->engine);
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

void hfr_runtime_control(struct hfreduceComm *c, int fd) {
  pthread_mutex_lock(&hfr_rt.lock);
  hfr_conn_init(&c->control[0], fd, sizeof(hfreduceErrorInfo_t));
  pthread_mutex_unlock(&hfr_rt.lock);
  hfr_watcher_kick();
}

void hfr_runtime_flood(struct hfreduceComm *c, enum hfr_frame type, const void *payload, size_t bytes, int except) {
  pthread_mutex_lock(&hfr_rt.lock);
  for (int i = 0; i < c->ncontrol; i++)
    if (i != except && c->control[i].fd >= 0) hfr_conn_send(&c->control[i], type, payload, bytes);
  pthread_mutex_unlock(&hfr_rt.lock);
  hfr_watcher_kick(); /* what did not fit goes out from the watcher */
}
