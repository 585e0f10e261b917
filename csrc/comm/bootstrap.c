/*
 * How ranks become a communicator:
 *   1. each connects to the root and hands in a record; when all are there, each gets the table;
 *   2. the lowest rank of each node makes the arena and passes it over an abstract Unix socket;
 *   3. each connects to rank 0's listener (the control connection, which stays) and says READY; when all have, rank 0 says GO.
 */
#include "staging.h"

#include "../base/auth.h"
#include "../base/log.h"
#include "../base/mac.h"
#include "../base/param.h"
#include "../base/thread.h"
#include "../topo/host.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define CANCEL_MS 100 /* how often somebody who waits looks whether he is still wanted */

/* Shall joining end? Asks at intervals, without a lock. */
static int cancelled(struct hfreduceComm *c) {
  if (c->cancel && __atomic_load_n(c->cancel, __ATOMIC_ACQUIRE)) return 1;
  if (!c->asks || c->interrupted) return c->interrupted;
  int64_t now = hfr_now_ns();
  if (now - c->asked_ns < CANCEL_MS * 1000000ll / 2) return 0;
  c->asked_ns = now;
  return c->interrupted = c->asks(c->asks_arg) != 0;
}

/* Wait until the descriptor is ready; a while at most, for callers look for more than that. 0: the deadline has passed. */
static int wait_fd(const struct hfreduceComm *c, int fd, int events, int64_t deadline_ns) {
  int64_t left = deadline_ns - hfr_now_ns();
  if (left <= 0) return 0;
  struct pollfd p = {fd, (short)events, 0};
  int ms = left < 1000000000 ? (int)(left / 1000000 + 1) : 1000;
  poll(&p, 1, (c->cancel || c->asks) && ms > CANCEL_MS ? CANCEL_MS : ms);
  return 1;
}

static hfreduceResult_t fail_cancelled(const struct hfreduceComm *c) {
  hfr_fail(hfreduceAborted, "rank %d gave up joining: its %s before all ranks were there", c->rank,
           c->interrupted ? "program was interrupted" : "communicator was aborted");
  hfr_last_error()->peer = c->rank;
  snprintf(hfr_last_error()->op, sizeof hfr_last_error()->op, "init");
  return hfreduceAborted;
}

struct wait_text {
  char text[64];
};

/* Has joining taken so long that it should say for whom it waits? If so, *time has the time, and it need not again until twice
 * that. */
static int should_speak(struct hfreduceComm *c, struct wait_text *time) {
  int64_t now = hfr_now_ns(), after = (int64_t)(hfr_param_real(HFR_PARAM_WARN_AFTER) * 1e9);
  if (after <= 0) return 0;
  if (!c->speak_ns) c->speak_ns = c->join_ns + after;
  if (now < c->speak_ns) return 0;
  while (c->speak_ns <= now) c->speak_ns += c->speak_ns - c->join_ns;
  hfr_log_wait(time->text, sizeof time->text, now - c->join_ns, (int64_t)(c->join_timeout * 1e9));
  return 1;
}

static void nap_ms(int ms) { poll(NULL, 0, ms); }

/* In steps: who is stopped leaves a handshake unfinished. */
static hfreduceResult_t authenticate(struct hfreduceComm *c, struct hfr_auth *auth, int64_t deadline_ns, const char *whom) {
  struct wait_text time;
  for (;;) {
    int64_t step = hfr_now_ns() + CANCEL_MS * 1000000ll;
    hfreduceResult_t r = hfr_auth_client_wait(auth, step < deadline_ns ? step : deadline_ns, whom);
    if (r != hfreduceTimeout || step >= deadline_ns || cancelled(c)) return r;
    if (should_speak(c, &time)) HFR_WARN("rank %d waits for %s to finish the handshake (%s)", c->rank, whom, time.text);
  }
}

/* What a rank has learned of the other side by trying. */
struct dialled {
  const char *whom;
  char address[HFR_ADDR_TEXT];
  char refusal[200];  /* kept: when time is up, the one that refused may have gone itself */
  int error;          /* errno of the last try; 0: it got as far as the handshake */
  int64_t refused_ns; /* since when it has heard nothing but that it does not belong there; 0: the last try ended otherwise */
  const char *advice; /* what to do about that */
};

/* Both sides know the secret, so it is true. */
static hfreduceResult_t fail_protocol(const struct hfreduceComm *c, const struct dialled *d, const struct hfr_auth *auth) {
  char mine[HFR_VERSION_TEXT], theirs[HFR_VERSION_TEXT], host[64];
  hfr_host_name(host);
  return hfr_fail(hfreduceInvalidUsage, "rank %d on %s runs %s, %s at %s runs %s; install the same version on all hosts", c->rank,
                  host, hfr_version_text(&hfr_version, mine), d->whom, d->address, hfr_version_text(&auth->peer, theirs));
}

static hfreduceResult_t fail_refused(const struct hfreduceComm *c, const struct dialled *d) {
  return hfr_fail(hfreduceInvalidUsage, "rank %d was refused by %s at %s for %.3g s: %s; %s", c->rank, d->whom, d->address,
                  (double)(hfr_now_ns() - d->refused_ns) * 1e-9, d->refusal, d->advice);
}

/*
 * A handshake failed. An earlier program may still hold the port, or rank 0 has not opened this communicator yet: the rank goes
 * on trying. That it has another secret, or an older protocol, is not proven, so it is warned of at once and believed only after
 * REFUSED_NS of nothing else. In progress: try again.
 */
#define REFUSED_NS 30000000000ll
static hfreduceResult_t refused(const struct hfreduceComm *c, struct dialled *d, const struct hfr_auth *auth, hfreduceResult_t r,
                                int64_t deadline_ns) {
  if (auth->verdict == HFR_AUTH_PROTOCOL) return fail_protocol(c, d, auth);
  /* A connection that breaks, or falls silent, tells less than what was said before. */
  int tells = r != hfreduceSystemError && r != hfreduceTimeout;
  if (tells || !*d->refusal) snprintf(d->refusal, sizeof d->refusal, "%.190s", hfr_last_error()->text);
  const char *advice = auth->verdict == HFR_AUTH_SECRET ? "give all ranks the same HFREDUCE_SECRET"
                       : auth->verdict == HFR_AUTH_USER ? "run all ranks as one user, or give them the same HFREDUCE_SECRET"
                       : auth->verdict == HFR_AUTH_OLD  ? "install the same hfreduce on all hosts"
                                                        : NULL;
  if (!advice) {
    if (tells) d->refused_ns = 0;
    return hfreduceInProgress;
  }
  d->advice = advice;
  int64_t now = hfr_now_ns();
  if (!d->refused_ns) {
    d->refused_ns = now;
    HFR_WARN("rank %d: %s at %s refuses it: %s; %s. It goes on trying for %.3g s, in case an earlier job still holds the port",
             c->rank, d->whom, d->address, d->refusal, d->advice,
             (double)(deadline_ns - now < REFUSED_NS ? deadline_ns - now : REFUSED_NS) * 1e-9);
  }
  return now - d->refused_ns < REFUSED_NS ? hfreduceInProgress : fail_refused(c, d);
}

/* One try: connected and authenticated, or in progress: try again. */
static hfreduceResult_t dial_once(struct hfreduceComm *c, const struct hfr_addr *addr, enum hfr_auth_kind kind, int target,
                                  int64_t deadline_ns, struct dialled *d, int *out) {
  int fd = -1;
  d->error = ECONNREFUSED;
  if (hfr_socket_connect(addr, &fd)) {
    d->refused_ns = 0;
    return errno == EMFILE || errno == ENFILE ? hfreduceSystemError : hfreduceInProgress; /* that does not pass by itself */
  }
  struct pollfd p = {fd, POLLOUT, 0};
  int64_t again = hfr_now_ns() + 2000000000; /* a lost SYN is better sent anew */
  if (again > deadline_ns) again = deadline_ns;
  while (!cancelled(c) && wait_fd(c, fd, POLLOUT, again) && !poll(&p, 1, 0)) {
  }
  d->error = poll(&p, 1, 0) > 0 ? hfr_socket_error(fd) : ETIMEDOUT;
  if (d->error) {
    if (d->error == ECONNREFUSED) d->refused_ns = 0; /* whoever refused it has gone */
    close(fd);
    return hfreduceInProgress;
  }
  struct hfr_auth auth;
  hfr_socket_tune(fd);
  hfr_auth_client(&auth, fd, kind, kind == HFR_AUTH_ROOT ? hfr_uid_root(&c->uid) : c->uid.comm_id, c->uid.secret, c->rank, target,
                  0, 0);
  auth.hello.name = kind == HFR_AUTH_ROOT ? c->uid.name : 0;
  int64_t limit = hfr_now_ns() + 5000000000;
  hfreduceResult_t r = authenticate(c, &auth, limit < deadline_ns ? limit : deadline_ns, d->whom);
  if (!r) {
    *out = fd;
    return r;
  }
  close(fd);
  return refused(c, d, &auth, r, deadline_ns);
}

/* Connect and authenticate, trying again while nobody listens: the other side may start later. */
static hfreduceResult_t dial(struct hfreduceComm *c, const struct hfr_addr *addr, enum hfr_auth_kind kind, int target,
                             int64_t deadline_ns, const char *whom, int *out) {
  struct dialled d = {.whom = whom};
  struct wait_text time;
  hfr_addr_text(addr, d.address);
  for (int pause = 5;;) {
    hfreduceResult_t r = dial_once(c, addr, kind, target, deadline_ns, &d, out);
    if (r != hfreduceInProgress) return r;
    if (cancelled(c)) return fail_cancelled(c);
    if (hfr_now_ns() > deadline_ns) break;
    if (should_speak(c, &time))
      HFR_WARN("rank %d waits for %s at %s (%s): %s", c->rank, c->uid.by_address && target < 0 ? "rank 0" : whom, d.address,
               time.text, *d.refusal ? d.refusal : strerror(d.error));
    /* A rank that was told that it does not belong there need not knock often. */
    for (int naps = d.refused_ns ? 10 : 1; naps > 0 && !cancelled(c) && hfr_now_ns() < deadline_ns; naps--) nap_ms(pause);
    if (pause < 100) pause *= 2;
  }
  if (d.refused_ns) return fail_refused(c, &d);
  return hfr_fail(hfreduceTimeout,
                  "rank %d could not reach %s at %s within %.3g s: %s; check that it runs, that the address is right and that no "
                  "firewall is between",
                  c->rank, whom, d.address, c->join_timeout, *d.refusal ? d.refusal : strerror(d.error));
}

/* Even, for two trees. Unless told otherwise so many that a rank's slots are twice its cache: those who read them have then let
   go of a line when it is written again (node/writer.h). */
static int choose_slots(int told, uint64_t chunk) {
  uint64_t slots = told ? (uint64_t)told : 2 * hfr_cache_bytes(2) / chunk;
  if (!told) slots = slots < 4 ? 4 : slots > 32 ? 32 : slots;
  return (int)((slots + 1) / 2 * 2);
}

static uint64_t choose_chunk(void) { return (uint64_t)(hfr_param_int(HFR_PARAM_CHUNK) + 4095) / 4096 * 4096; }

size_t hfr_bootstrap_describe(char *text, size_t size) {
  const struct hfr_geometry g = {.chunk = choose_chunk()};
  int n = snprintf(text, size,
                   "on one node: up to %lld bytes (%lld from 4 ranks on) by the number of ranks in one exchange; above, each "
                   "rank its share of chunks of %zu "
                   "bytes, in %d slots a rank; results of %zu bytes or more, over all ranks, past the caches\n",
                   (long long)hfr_oneshot_bytes(&g, 1), 4 * (long long)hfr_oneshot_bytes(&g, 4), g.chunk,
                   choose_slots((int)hfr_param_int(HFR_PARAM_SLOTS), g.chunk), hfr_stream_from());
  if (hfr_device_present() && n > 0 && (size_t)n < size)
    n += snprintf(text + n, size - (size_t)n,
                  "device memory on one node: comes out in up to %d segments of %lld bytes a rank, in the arena, where the other "
                  "ranks read it\n",
                  (int)hfr_param_int(HFR_PARAM_CUDA_SEGMENTS), (long long)hfr_param_int(HFR_PARAM_CUDA_SEGMENT));
  return n < 0 ? 0 : (size_t)n < size ? (size_t)n : size - 1;
}

static void fill_record(struct hfreduceComm *c, const struct hfr_addr *addr, struct hfr_record *r) {
  memset(r, 0, sizeof *r);
  r->rank = c->rank;
  r->nranks = c->nranks;
  hfr_host_id(r->hostid);
  hfr_machine_id(r->machine);
  hfr_host_name(r->host);
  r->addr = *addr;
  r->pid = (uint32_t)getpid();
  r->members = c->uid.members;
  memcpy(r->transports, c->offer.number, sizeof r->transports);
  r->chunk = choose_chunk();
  r->slots = (uint32_t)choose_slots((int)hfr_param_int(HFR_PARAM_SLOTS), r->chunk);
  const char *algo = hfr_param_text(HFR_PARAM_ALGO);
  r->algo = !strcmp(algo, "tree")     ? HFR_ALGO_TREE
            : !strcmp(algo, "direct") ? HFR_ALGO_DIRECT
            : !strcmp(algo, "ring")   ? HFR_ALGO_RING
                                      : HFR_ALGO_AUTO;
  if (*algo && r->algo == HFR_ALGO_AUTO)
    HFR_WARN("HFREDUCE_ALGO is \"%s\"; it can be tree, direct or ring: choosing by size and node count", algo);
  if (!c->whole) hfr_device_links(c->device, &r->links);
  r->nvlink_min = (uint64_t)hfr_param_int(HFR_PARAM_NVLINK_MIN);
  r->lends = c->devices ? (uint32_t)hfr_param_int(HFR_PARAM_CUDA_SEGMENTS) : 0;
  r->segment = (uint64_t)hfr_param_int(HFR_PARAM_CUDA_SEGMENT);
  r->streams = (uint32_t)hfr_param_int(HFR_PARAM_TCP_STREAMS);
  r->checksum = (uint32_t)hfr_param_int(HFR_PARAM_CHECKSUM);
}

/* Adopt an error that a frame brought. */
static hfreduceResult_t adopt(const uint8_t *payload, size_t bytes) {
  hfreduceErrorInfo_t info;
  if (hfr_conn_error(payload, bytes, &info))
    return hfr_fail(hfreduceInternalError, "the root sent an error of %zu bytes that is none: its code does not exist", bytes);
  hfr_fail((hfreduceResult_t)info.code, "%s", info.text);
  *hfr_last_error() = info;
  return (hfreduceResult_t)info.code;
}

static hfreduceResult_t rendezvous(struct hfreduceComm *c, const struct hfr_addr *mine, struct hfr_record *table,
                                   int64_t deadline_ns) {
  int fd;
  HFR_TRY(dial(c, &c->uid.root, HFR_AUTH_ROOT, -1, deadline_ns, "the root", &fd));
  struct hfr_conn conn;
  struct hfr_record record;
  size_t whole = (size_t)c->nranks * sizeof record;
  hfreduceResult_t result = hfreduceInProgress;
  char missing[402] = "the root has not answered";
  int speaker = 0;
  struct wait_text time;
  hfr_conn_init(&conn, fd, whole > sizeof(hfreduceErrorInfo_t) ? whole : sizeof(hfreduceErrorInfo_t));
  fill_record(c, mine, &record);
  hfr_conn_send(&conn, HFR_FRAME_JOIN, &record, sizeof record);
  while (result == hfreduceInProgress) {
    enum hfr_frame type;
    const uint8_t *payload;
    size_t bytes;
    hfr_conn_flush(&conn);
    hfr_conn_fill(&conn);
    while (result == hfreduceInProgress && hfr_conn_next(&conn, &type, &payload, &bytes)) {
      if (type == HFR_FRAME_ERROR) result = adopt(payload, bytes);
      if (type == HFR_FRAME_WAITING && bytes > 1 && bytes < sizeof missing) {
        memcpy(missing, payload, bytes);
        speaker = missing[bytes - 1];
        missing[bytes - 1] = 0;
      }
      if (type == HFR_FRAME_TABLE && bytes == whole) memcpy(table, payload, whole), result = hfreduceSuccess;
    }
    if (result != hfreduceInProgress) break;
    if (speaker && should_speak(c, &time)) HFR_WARN("%s (%s)", missing, time.text);
    if (conn.dead)
      result = hfr_fail(hfreduceRemoteError,
                        "rank %d: the root closed the connection while ranks were joining (did its process end?)", c->rank);
    else if (cancelled(c) || !wait_fd(c, fd, POLLIN, deadline_ns)) {
      result = cancelled(c) ? fail_cancelled(c)
                            : hfr_fail(hfreduceTimeout, "rank %d: not all ranks joined within %.3g s: %s", c->rank,
                                       c->join_timeout, missing);
      snprintf(hfr_last_error()->op, sizeof hfr_last_error()->op, "init");
      hfr_conn_send(&conn, HFR_FRAME_ERROR, hfr_last_error(),
                    sizeof(hfreduceErrorInfo_t)); /* the others need not find out by themselves */
    }
  }
  if (result == hfreduceTimeout || result == hfreduceAborted) { /* let the root take our word in before this process may end */
    int64_t limit = hfr_now_ns() + 500000000;
    while (!hfr_conn_fill(&conn) && wait_fd(c, fd, POLLIN, limit)) {
    }
  }
  hfr_conn_close(&conn);
  return result;
}

/* The transport between nodes: the first of rank 0's that all ranks can use. */
static hfreduceResult_t choose_transport(struct hfreduceComm *c, const struct hfr_record *table) {
  uint8_t common[HFR_TRANSPORTS_MAX];
  char first[64], other[64];
  memcpy(common, table[0].transports, sizeof common);
  hfr_transport_list(common, first);
  if (!c->offer.number[0])
    return hfr_fail(
        hfreduceInvalidUsage,
        "HFREDUCE_TRANSPORT is \"%.100s\", of which rank %d can use none between nodes (%.400s); leave it empty to use "
        "the best that all ranks have",
        hfr_param_text(HFR_PARAM_TRANSPORT), c->rank, c->offer.why);
  for (int r = 0; r < c->nranks; r++) {
    hfr_transport_meet(common, table[r].transports);
    if (hfr_transport_at(common[0])) continue;
    hfr_transport_list(table[r].transports, other);
    return hfr_fail(
        hfreduceInvalidUsage,
        "the ranks have no transport between nodes in common: rank 0 on %s offers %s, rank %d on %s offers %s; give all "
        "the same HFREDUCE_TRANSPORT, or none",
        c->hosts[0], first, r, c->hosts[r], other);
  }
  c->engine.remote = hfr_transport_at(common[0]);
  if (*c->offer.why) HFR_INFO("between nodes: %s (%s)", c->engine.remote->name, c->offer.why);
  return hfreduceSuccess;
}

/* Bytes that each rank of this node may lend: as many as the one of them wants that wants most. Ranks that disagree on it could
 * not share an arena, so nothing but the table counts. */
static hfreduceResult_t size_lending(struct hfreduceComm *c, const struct hfr_record *table) {
  size_t most = 0;
  for (int r = 0; r < c->nranks; r++) {
    const struct hfr_record *t = &table[r];
    if (t->lends > 64 || t->segment > (1ull << 30))
      return hfr_fail(hfreduceInternalError, "rank %d announced impossible parameters: %u segments of %llu bytes", r, t->lends,
                      (unsigned long long)t->segment);
    if (c->layout.node_of[r] != c->layout.node) continue;
    size_t bytes = t->lends * hfr_staging_slot_of(&c->layout, &c->engine.geometry, (size_t)t->segment);
    if (bytes > most) most = bytes;
  }
  c->lend = c->layout.nlocal > 1 ? most : 0;
  return hfreduceSuccess;
}

/* This rank's place on its node, by which the ranks of a node divide its RDMA ports. It is that of the first communicator of its
 * process, usually of all ranks: within a group that has one rank on each node all places are 0. A process with several ranks has
 * no one place. */
static int place_on_node(const struct hfreduceComm *c, const struct hfr_record *table) {
  static _Atomic uint64_t first; /* process and place + 1, so that a forked child finds its own */
  const struct hfr_record *mine = &table[c->rank];
  uint64_t found = (uint64_t)getpid() << 32 | (uint32_t)(c->layout.local + 1), before = 0;
  for (int r = 0; r < c->nranks; r++)
    if (r != c->rank && table[r].pid == mine->pid && !memcmp(table[r].machine, mine->machine, sizeof mine->machine))
      return c->layout.local;
  while (before >> 32 != found >> 32)
    if (atomic_compare_exchange_weak(&first, &before, found)) return c->layout.local;
  return (int)(before & 0xffffffffu) - 1;
}

/* Check the table's contents and take from it what all need. */
static hfreduceResult_t adopt_table(struct hfreduceComm *c, const struct hfr_record *table) {
  int n = c->nranks;
  int *label = malloc((size_t)n * sizeof *label);
  c->hosts = calloc((size_t)n, sizeof *c->hosts);
  c->addrs = calloc((size_t)n, sizeof *c->addrs);
  if (!label || !c->hosts || !c->addrs) return free(label), hfr_fail(hfreduceSystemError, "out of memory for %d ranks", n);
  for (int r = 0; r < n; r++) {
    memcpy(c->hosts[r], table[r].host, 63);
    c->ranks_here += !memcmp(table[r].machine, table[c->rank].machine, sizeof table[r].machine);
    c->addrs[r] = table[r].addr;
    label[r] = r;
    if (r > 0 && !memcmp(table[r].hostid, table[r - 1].hostid, 16)) {
      label[r] = label[r - 1];
      continue;
    }
    for (int q = 0; q < r; q++)
      if (label[q] == q && !memcmp(table[r].hostid, table[q].hostid, 16)) {
        label[r] = q;
        break;
      }
  }
  int failed = hfr_layout_init(&c->layout, c->rank, n, label);
  free(label);
  if (failed) return hfr_fail(hfreduceSystemError, "out of memory for %d ranks", n);
  c->engine.remote = &hfr_transport_tcp;
  if (c->layout.nnodes > 1) HFR_TRY(choose_transport(c, table));
  const struct hfr_record *zero = &table[0];
  if (zero->slots < 2 || zero->slots > HFR_SLOTS_MAX || zero->slots % 2 || zero->chunk < 4096 || zero->chunk > (16 << 20) ||
      zero->chunk % 4096 || zero->streams < 1 || zero->streams > HFR_MAX_STREAMS)
    return hfr_fail(hfreduceInternalError, "rank 0 announced impossible parameters: %u slots of %llu bytes, %u streams",
                    zero->slots, (unsigned long long)zero->chunk, zero->streams);
  if (zero->chunk / (unsigned)n < 8) /* all_gather and reduce_scatter put a piece a rank in a slot */
    return hfr_fail(hfreduceInvalidUsage, "HFREDUCE_CHUNK is %llu bytes on rank 0; %d ranks need at least %d",
                    (unsigned long long)zero->chunk, n, 8 * n);
  c->engine.geometry = (struct hfr_geometry){
      .chunk = zero->chunk, .ring_slot = zero->chunk / 2, .slots = (int)zero->slots, .algo = (enum hfr_algo)zero->algo};
  if (c->whole) c->engine.geometry = c->whole->engine.geometry;
  HFR_TRY(hfr_pairs_match(c, table));
  HFR_TRY(size_lending(c, table));
  c->net = (struct hfr_net){.rank = c->rank,
                            .nranks = n,
                            .comm_id = c->uid.comm_id,
                            .addr = c->addrs,
                            .host = (const char(*)[64])c->hosts,
                            .arena = &c->arena,
                            .local_of = c->layout.local_of,
                            .place = place_on_node(c, table),
                            .streams = (int)zero->streams,
                            .checksum = zero->checksum != 0};
  memcpy(c->net.secret, c->uid.secret, 16);
  c->net.arrived = calloc((size_t)n * HFR_NVC * (size_t)c->net.streams, sizeof *c->net.arrived);
  return c->net.arrived ? hfreduceSuccess : hfr_fail(hfreduceSystemError, "out of memory for %d ranks", n);
}

/* ---------------------------------------------------------------- the arena */

/* A name that only those who know the secret can tell. */
static void arena_name(const struct hfreduceComm *c, char name[64]) {
  uint8_t text[20] = "arena", tag[16];
  int32_t node = c->layout.node;
  memcpy(text + 8, &node, sizeof node);
  memcpy(text + 12, &c->uid.comm_id, 8);
  hfr_mac(c->uid.secret, text, sizeof text, tag);
  int n = snprintf(name, 64, "hfr-arena-");
  for (int i = 0; i < 16; i++) n += snprintf(name + n, 64 - (size_t)n, "%02x", tag[i]);
}

static enum hfr_auth_verdict arena_secret(void *arg, const struct hfr_auth_hello *hello, uint8_t secret[16]) {
  struct hfreduceComm *c = arg;
  if (hello->kind != HFR_AUTH_ARENA || hello->comm_id != c->uid.comm_id) return HFR_AUTH_UNKNOWN;
  memcpy(secret, c->uid.secret, 16);
  return HFR_AUTH_WELCOME;
}

struct visitor {
  struct hfr_auth auth;
  int done;
};

/* Leader: hand the arena to every other local rank. Strangers are dropped; each may take its time, none holds up the others. */
static hfreduceResult_t hand_out(struct hfreduceComm *c, int listener, int64_t deadline_ns) {
  int n = c->layout.nlocal, served = 1, nvisitors = 0, cap = 4 * n;
  hfreduceResult_t result = hfreduceSuccess;
  struct wait_text time;
  struct visitor *v = calloc((size_t)cap, sizeof *v);
  struct pollfd *fds = calloc((size_t)cap + 1, sizeof *fds);
  if (!v || !fds) result = hfr_fail(hfreduceSystemError, "out of memory");
  while (!result && served < n) {
    int nfds = 0;
    fds[nfds++] = (struct pollfd){listener, POLLIN, 0};
    for (int i = 0; i < nvisitors; i++) fds[nfds++] = (struct pollfd){v[i].done ? -1 : v[i].auth.fd, (short)v[i].auth.events, 0};
    poll(fds, (nfds_t)nfds, 100);
    for (int i = 0; i < nvisitors; i++) {
      int r = v[i].done ? 0 : hfr_auth_step(&v[i].auth);
      if (r == 0) continue;
      if (r > 0) served += !hfr_unix_send_fd(v[i].auth.fd, c->arena.fd);
      close(v[i].auth.fd);
      v[i].done = 1;
    }
    int fd;
    while (nvisitors < cap && (fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
      v[nvisitors].done = 0;
      hfr_auth_server(&v[nvisitors++].auth, fd, arena_secret, c);
    }
    if (served < n && should_speak(c, &time))
      HFR_WARN("rank %d waits for %d of the %d ranks of this host to fetch the shared memory (%s)", c->rank, n - served, n,
               time.text);
    if (c->failed)
      *hfr_last_error() = c->early, result = (hfreduceResult_t)c->early.code;
    else if (cancelled(c))
      result = fail_cancelled(c);
    else if (served < n && hfr_now_ns() > deadline_ns)
      result = hfr_fail(hfreduceTimeout, "rank %d: %d of %d local ranks did not fetch the shared memory within %.3g s", c->rank,
                        n - served, n, c->join_timeout);
  }
  for (int i = 0; v && i < nvisitors; i++)
    if (!v[i].done) close(v[i].auth.fd);
  free(v);
  free(fds);
  return result;
}

static hfreduceResult_t fetch(struct hfreduceComm *c, const char *name, int64_t deadline_ns) {
  int leader = hfr_rank_at(&c->layout, c->layout.node, 0);
  struct wait_text time;
  for (;;) {
    int sock, fd = -1, r = -1;
    if (!hfr_unix_connect(name, &sock)) {
      struct hfr_auth auth;
      hfr_auth_client(&auth, sock, HFR_AUTH_ARENA, c->uid.comm_id, c->uid.secret, c->rank, leader, 0, 0);
      if (!authenticate(c, &auth, deadline_ns, "the local leader"))
        while ((r = hfr_unix_recv_fd(sock, &fd)) == -EAGAIN && !cancelled(c) && wait_fd(c, sock, POLLIN, deadline_ns)) {
        }
      close(sock);
      const struct hfr_geometry *g = &c->engine.geometry;
      if (!r) return hfr_arena_attach(&c->arena, fd, c->layout.nlocal, g->chunk, g->slots, c->lend);
    } else if (errno == EMFILE || errno == ENFILE) {
      return hfreduceSystemError;
    }
    if (cancelled(c)) return fail_cancelled(c);
    if (should_speak(c, &time))
      HFR_WARN("rank %d waits for rank %d on this host to hand out the shared memory (%s)", c->rank, leader, time.text);
    if (hfr_now_ns() > deadline_ns)
      return hfr_fail(hfreduceTimeout, "rank %d: rank %d on this host did not hand out the shared memory within %.3g s", c->rank,
                      leader, c->join_timeout);
    nap_ms(2);
  }
}

static hfreduceResult_t get_arena(struct hfreduceComm *c, int64_t deadline_ns) {
  char name[64];
  int listener;
  arena_name(c, name);
  if (c->layout.local > 0) {
    HFR_TRY(fetch(c, name, deadline_ns));
    return hfr_arena_join(&c->arena, c->layout.local);
  }
  HFR_TRY(hfr_arena_create(&c->arena, c->layout.nlocal, c->engine.geometry.chunk, c->engine.geometry.slots, c->lend));
  HFR_TRY(hfr_arena_join(&c->arena, 0));
  if (c->layout.nlocal == 1) return hfreduceSuccess;
  HFR_TRY(hfr_unix_listen(name, c->layout.nlocal, &listener));
  hfreduceResult_t r = hand_out(c, listener, deadline_ns);
  close(listener);
  return r;
}

/* ---------------------------------------------------------------- ready, go */

static void on_engine_error(void *arg, const hfreduceErrorInfo_t *info) {
  struct hfreduceComm *c = arg;
  if (!atomic_load(&c->closing)) hfr_runtime_flood(c, HFR_FRAME_ERROR, info, sizeof *info, -1);
}

static void on_engine_break(void *arg, const hfreduceErrorInfo_t *info, int tell) { hfr_pairs_broke(arg, info, tell); }

static void on_stuck(void *arg, const struct hfr_fingerprint *fp) { hfr_runtime_stuck(arg, fp); }

static hfreduceResult_t start_engine(struct hfreduceComm *c) {
  struct hfr_engine *e = &c->engine;
  e->layout = &c->layout;
  e->arena = &c->arena;
  e->net = &c->net;
  e->host = c->hosts[c->rank];
  e->timeout_ns = (int64_t)(c->timeout * 1e9);
  e->on_error = on_engine_error;
  e->on_error_arg = c;
  e->on_stuck = on_stuck;
  e->on_break = on_engine_break;
  int crowded = c->ranks_here > hfr_ncpus();
  int64_t spin = hfr_param_int(HFR_PARAM_SPIN);
  /* Spinning keeps the awaited rank from running when ranks are more than cores; over the network a poll is a system call, and
   * its answer tens of microseconds away. */
  e->spins = spin >= 0 ? (int)spin : crowded ? 16 : c->layout.nnodes > 1 && !e->remote->polls_memory ? 64 : 2000;
  e->yields = crowded ? 64 : 16;
  HFR_TRY(hfr_engine_init(e));
  c->engine_up = 1;
  return hfreduceSuccess;
}

static hfreduceResult_t ready_go(struct hfreduceComm *c, int64_t deadline_ns) {
  struct wait_text time;
  if (c->rank > 0) {
    int fd;
    HFR_TRY(dial(c, &c->addrs[0], HFR_AUTH_CONTROL, 0, deadline_ns, "rank 0", &fd));
    hfr_runtime_control(c, fd);
    hfr_runtime_flood(c, HFR_FRAME_READY, NULL, 0, -1);
  }
  for (;;) {
    uint32_t seen = atomic_load(&c->go);
    if (c->went)
      return hfreduceSuccess; /* before errors: a quick peer's first operation may have failed already, which is not init's error
                               */
    if (c->failed) {
      *hfr_last_error() = c->early;
      return (hfreduceResult_t)c->early.code;
    }
    if (c->rank == 0 && c->ready == c->nranks - 1) {
      c->went = 1;
      hfr_runtime_flood(c, HFR_FRAME_GO, NULL, 0, -1);
    }
    if (c->went) return hfreduceSuccess;
    if (cancelled(c)) return fail_cancelled(c);
    if (should_speak(c, &time)) {
      if (c->rank == 0)
        HFR_WARN("%d of %d ranks are ready (%s)", c->ready + 1, c->nranks, time.text);
      else
        HFR_WARN("rank %d on %s waits for rank 0 on %s to say that all ranks are ready (%s)", c->rank, c->hosts[c->rank],
                 c->hosts[0], time.text);
    }
    int64_t left = deadline_ns - hfr_now_ns();
    if (left <= 0)
      return hfr_fail(hfreduceTimeout, "rank %d: %d of %d ranks were ready within %.3g s", c->rank,
                      c->rank == 0 ? c->ready + 1 : -1, c->nranks, c->join_timeout);
    hfr_futex_wait(&c->go, seen, left < 100000000 ? left : 100000000);
  }
}

/* The watcher looks every quarter of a second, and a busy host delays it: a shorter heartbeat would break every communicator. */
#define HEARTBEAT_LEAST 0.5
static hfreduceResult_t check_heartbeat(void) {
  double seconds = hfr_param_real(HFR_PARAM_HEARTBEAT);
  if (seconds <= 0 || seconds >= HEARTBEAT_LEAST) return hfreduceSuccess;
  return hfr_fail(hfreduceInvalidArgument,
                  "HFREDUCE_HEARTBEAT is %g s; it must be 0 (a silent rank never counts as lost) or at least %g s", seconds,
                  HEARTBEAT_LEAST);
}

static hfreduceResult_t bootstrap(struct hfreduceComm *c, int64_t deadline_ns) {
  struct hfr_addr mine;
  HFR_TRY(check_heartbeat());
  HFR_TRY(hfr_transport_offer(hfr_param_text(HFR_PARAM_TRANSPORT), &c->offer));
  HFR_TRY(hfr_runtime_listen(c->uid.local, &c->uid.root, &mine));
  c->door[0] = mine;
  if (c->uid.by_address && c->rank == 0) {
    HFR_TRY(hfr_runtime_listen_at(&c->uid.root));
    c->door[1] = c->uid.root;
    HFR_TRY(hfr_runtime_open_root(&c->uid));
  }
  HFR_TRY(hfr_runtime_add(c));
  struct hfr_record *table = calloc((size_t)c->nranks, sizeof *table);
  if (!table) return hfr_fail(hfreduceSystemError, "out of memory for %d ranks", c->nranks);
  hfreduceResult_t r = rendezvous(c, &mine, table, deadline_ns);
  if (r == hfreduceInvalidUsage)
    hfr_runtime_linger(&c->uid, 1000000000); /* the ranks contradict each other: all should hear it */
  if (!r) r = adopt_table(c, table);
  free(table);
  if (!r) r = get_arena(c, deadline_ns);
  if (!r) r = start_engine(c);
  if (!r && c->devices) hfr_staging_provide(c); /* no rank calls before all are ready */
  if (!r) r = ready_go(c, deadline_ns);
  if (r == hfreduceAborted && cancelled(c)) /* those that have control connections need not wait for the deadline */
    hfr_runtime_flood(c, HFR_FRAME_ERROR, hfr_last_error(), sizeof(hfreduceErrorInfo_t), -1);
  HFR_TRY(r);
  if (c->arena.fd >= 0) close(c->arena.fd); /* the mapping is enough */
  c->arena.fd = -1;
  HFR_INFO("communicator %s: rank %d of %d, local %d of %d, node %d of %d", c->name, c->rank, c->nranks, c->layout.local,
           c->layout.nlocal, c->layout.node, c->layout.nnodes);
  return hfreduceSuccess;
}

/* What the system refuses it refuses to this rank: services below do not know its number. */
hfreduceResult_t hfr_bootstrap(struct hfreduceComm *c, int64_t deadline_ns) {
  hfreduceResult_t r = bootstrap(c, deadline_ns);
  char host[64], text[sizeof hfr_last_error()->text];
  if (r != hfreduceSystemError || !strncmp(hfr_last_error()->text, "rank ", 5)) return r;
  memcpy(text, hfr_last_error()->text, sizeof text);
  hfr_host_name(host);
  snprintf(hfr_last_error()->text, sizeof text, "rank %d on %s: %.600s", c->rank, host, text);
  return r;
}
