/* Communicators: made, split, left, broken off. */
#include "stream.h"

#include "../base/log.h"
#include "../base/mac.h"
#include "../base/param.h"
#include "../base/thread.h"
#include "../topo/host.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONFIG_MAGIC 0x68667263u

_Static_assert(sizeof(struct hfr_uid) <= HFREDUCE_UNIQUE_ID_BYTES, "the unique id holds our fields");

/* ---------------------------------------------------------------- unique ids */

void hfr_uid_pack(const struct hfr_uid *uid, hfreduceUniqueId *id) {
  memset(id, 0, sizeof *id);
  memcpy(id->internal, uid, sizeof *uid);
}

static hfreduceResult_t new_id(hfreduceUniqueId *id, int local) {
  struct hfr_uid uid = {.magic = HFR_UID_MAGIC, .version = 1, .local = (uint8_t)local};
  if (!id) return hfr_fail(hfreduceInvalidArgument, "hfreduceGetUniqueId: id is NULL");
  hfr_random(&uid.comm_id, sizeof uid.comm_id);
  hfr_random(uid.secret, sizeof uid.secret);
  HFR_TRY(hfr_runtime_listen(local, NULL, &uid.root));
  hfreduceResult_t r = hfr_runtime_open_root(&uid);
  hfr_runtime_unlisten(&uid.root); /* now the root uses it */
  if (!r) hfr_uid_pack(&uid, id);
  return r;
}

hfreduceResult_t hfreduceGetUniqueId(hfreduceUniqueId *id) { return new_id(id, 0); }
hfreduceResult_t hfreduceGetUniqueIdLocal(hfreduceUniqueId *id) { return new_id(id, 1); }

static int hex_digit(char c) {
  return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The 16-byte key that a secret of any length stands for, and the communicator's number under it. */
static hfreduceResult_t derive(struct hfr_uid *uid, const char *secret, uint64_t tag) {
  uint8_t bytes[256], key[16] = {0}, out[16];
  size_t n = secret ? strlen(secret) : 0;
  if (n % 2 || n > 2 * sizeof bytes)
    return hfr_fail(hfreduceInvalidArgument, "the secret must be an even number of hex digits, at most %zu; it has %zu",
                    2 * sizeof bytes, n);
  for (size_t i = 0; i < n / 2; i++) {
    int hi = hex_digit(secret[2 * i]), lo = hex_digit(secret[2 * i + 1]);
    if (hi < 0 || lo < 0)
      return hfr_fail(hfreduceInvalidArgument, "the secret has a character at %zu that is not a hex digit", 2 * i);
    bytes[i] = (uint8_t)(hi * 16 + lo);
  }
  if (n && n < 32)
    return hfr_fail(hfreduceInvalidArgument, "the secret has %zu hex digits; give 32 or more (for example: openssl rand -hex 16)",
                    n);
  if (n) hfr_mac(key, bytes, n / 2, uid->secret); /* else it stays the secret that is none */
  /* The port, too: jobs on one machine may have the same secret, or none, and must not meet. Not the host's address, which ranks
   * may see differently. */
  const uint64_t name[2] = {tag, uid->root.port};
  hfr_mac(uid->secret, name, sizeof name, out);
  memcpy(&uid->comm_id, out, 8);
  hfr_mac(key, name, sizeof name, out);
  memcpy(&uid->name, out, 8);
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceUniqueIdFromAddress(hfreduceUniqueId *id, const char *address, const char *secret, uint64_t tag) {
  struct hfr_uid uid = {.magic = HFR_UID_MAGIC, .version = 1, .by_address = 1};
  if (!id || !address) return hfr_fail(hfreduceInvalidArgument, "hfreduceUniqueIdFromAddress: %s is NULL", id ? "address" : "id");
  HFR_TRY(hfr_addr_parse(address, &uid.root));
  if (!uid.root.port)
    return hfr_fail(hfreduceInvalidArgument, "address %s: give a port above 0, the same for all ranks", address);
  uid.local = (uint8_t)hfr_addr_is_loopback(&uid.root);
  if ((!secret || !*secret) && !uid.local)
    return hfr_fail(hfreduceInvalidArgument,
                    "address %s is reachable from other machines, so a secret is needed: set HFREDUCE_SECRET on all ranks to the "
                    "same hex digits "
                    "(for example from: openssl rand -hex 16)",
                    address);
  HFR_TRY(derive(&uid, secret, tag));
  hfr_uid_pack(&uid, id);
  return hfreduceSuccess;
}

/* ---------------------------------------------------------------- making */

void hfreduceConfigInit(hfreduceConfig_t *config) {
  *config = (hfreduceConfig_t){.size = sizeof *config, .magic = CONFIG_MAGIC, .version = HFREDUCE_VERSION_CODE, .device = -1};
}

static void free_comm(struct hfreduceComm *c) {
  if (c->engine_up) hfr_engine_fini(&c->engine);
  hfr_staging_destroy(c->provided, 0);
  hfr_staging_destroy(c->staging, (double)hfr_close_limit_ns(c) * 1e-9);
  for (size_t i = 0; c->net.arrived && i < (size_t)c->nranks * HFR_NVC * (size_t)c->net.streams; i++)
    if (c->net.arrived[i]) close(c->net.arrived[i] - 1);
  free((void *)c->net.arrived);
  hfr_arena_close(&c->arena);
  hfr_layout_fini(&c->layout);
  free(c->hosts);
  free(c->addrs);
  free(c->ops);
  hfr_shrunk_free(c);
  pthread_mutex_destroy(&c->ops_lock);
  hfr_handle_put(c);
}

void hfr_comm_dispose(struct hfreduceComm *c) {
  atomic_store(&c->closing, 1);
  hfr_runtime_remove(c);
  if (c->engine_up) hfr_drive_stop(&c->engine);
  hfr_pairs_destroy(c);
  free_comm(c);
}

static hfreduceResult_t check_config(const hfreduceConfig_t *config) {
  if (config && (config->size != sizeof *config || config->magic != CONFIG_MAGIC))
    return hfr_fail(hfreduceInvalidArgument,
                    "hfreduceCommInitRankConfig: the config was not filled by hfreduceConfigInit of this version");
  if (config && !(config->timeout >= 0))
    return hfr_fail(hfreduceInvalidArgument, "hfreduceCommInitRankConfig: timeout is %g s; it must be positive", config->timeout);
  return hfreduceSuccess;
}

static hfreduceResult_t check_init(hfreduceComm_t *comm, int nranks, const hfreduceUniqueId *id, int rank,
                                   const hfreduceConfig_t *config, struct hfr_uid *uid) {
  if (!comm) return hfr_fail(hfreduceInvalidArgument, "hfreduceCommInitRank: comm is NULL");
  *comm = NULL;
  if (nranks < 1) return hfr_fail(hfreduceInvalidArgument, "hfreduceCommInitRank: nranks is %d; it must be at least 1", nranks);
  if (rank < 0 || rank >= nranks)
    return hfr_fail(hfreduceInvalidArgument, "hfreduceCommInitRank: rank is %d; with %d ranks it must be 0 to %d", rank, nranks,
                    nranks - 1);
  memcpy(uid, id, sizeof *uid);
  if (uid->magic != HFR_UID_MAGIC || uid->version != 1)
    return hfr_fail(
        hfreduceInvalidArgument,
        "hfreduceCommInitRank: the unique id was not made by hfreduceGetUniqueId or hfreduceUniqueIdFromAddress of this version");
  return check_config(config);
}

/* A parameter of 0 s is its preset. */
static double seconds_of(enum hfr_param id) {
  double seconds = hfr_param_real(id);
  return seconds > 0 ? seconds : strtod(hfr_param_preset(id), NULL);
}

/* Seconds that ranks may take to join a communicator whose operations may take `timeout`. */
static double join_timeout(double timeout) {
  double seconds = seconds_of(HFR_PARAM_JOIN_TIMEOUT);
  return seconds < timeout ? seconds : timeout;
}

hfreduceResult_t hfr_comm_init(hfreduceComm_t *comm, int nranks, const hfreduceUniqueId *id, int rank,
                               const hfreduceConfig_t *config, struct hfreduceComm *whole) {
  struct hfr_uid uid;
  HFR_TRY(check_init(comm, nranks, id, rank, config, &uid));
  struct hfreduceComm *c = hfr_handle_get();
  if (!c) return hfr_fail(hfreduceSystemError, "out of memory for a communicator");
  c->pid = getpid();
  c->uid = uid;
  c->rank = rank;
  c->nranks = nranks;
  c->arena.fd = c->arena.bell_fd = -1;
  c->timeout = config && config->timeout > 0 ? config->timeout : seconds_of(HFR_PARAM_TIMEOUT);
  c->join_timeout = join_timeout(c->timeout);
  if (config && config->name)
    snprintf(c->name, sizeof c->name, "%s", config->name);
  else
    snprintf(c->name, sizeof c->name, "%016llx", (unsigned long long)uid.comm_id);
  c->cancel = config ? config->cancel : NULL;
  c->asks = config ? config->interrupted : NULL;
  c->asks_arg = config ? config->interrupted_arg : NULL;
  c->devices = hfr_device_present();
  c->whole = whole;
  c->partner = -1;
  c->device = config && config->device >= 0 ? config->device : hfr_device_current();
  pthread_mutex_init(&c->ops_lock, NULL);
  if (!whole) hfr_log_set_rank(rank);
  c->join_ns = hfr_now_ns();
  hfreduceResult_t r = hfr_bootstrap(c, c->join_ns + (int64_t)(c->join_timeout * 1e9));
  if (!r && c->partner >= 0) r = hfr_pairs_make(c);
  if (r) {
    hfreduceErrorInfo_t why = *hfr_last_error();
    hfr_comm_dispose(c);
    if (!why.op[0]) snprintf(why.op, sizeof why.op, "init");
    if (why.rank < 0) why.rank = rank;
    *hfr_last_error() = why;
    return r;
  }
  c->cancel = NULL;
  if (!whole) hfr_handle_open(c, nranks);
  c->asks = NULL;
  *comm = c;
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceCommInitRankConfig(hfreduceComm_t *comm, int nranks, hfreduceUniqueId id, int rank,
                                            hfreduceConfig_t *config) {
  return hfr_comm_init(comm, nranks, &id, rank, config, NULL);
}

hfreduceResult_t hfreduceCommInitRank(hfreduceComm_t *comm, int nranks, hfreduceUniqueId id, int rank) {
  return hfreduceCommInitRankConfig(comm, nranks, id, rank, NULL);
}

/* ---------------------------------------------------------------- leaving */

#define GRACE_NS 100000000ll /* for calls that are about to end by themselves when the communicator is closed */

/* Parts of a call over pairs of devices do not count, but the last of them may outlive it by a moment. */
static int pending_calls(hfreduceComm_t c) {
  int calls = (int)atomic_load_explicit(&c->engine.calls, memory_order_relaxed);
  return calls ? calls : atomic_load_explicit(&c->engine.active, memory_order_acquire) > 0;
}

/* Operations never started: their streams do not get to them. */
static void give_up(hfreduceComm_t c, double seconds) {
  hfreduceErrorInfo_t info;
  hfr_error_clear(&info);
  info.code = hfreduceTimeout;
  info.rank = c->rank;
  snprintf(info.op, sizeof info.op, "finalize");
  snprintf(info.phase, sizeof info.phase, "stream");
  snprintf(info.text, sizeof info.text,
           "rank %d on %s: %d operations still waited for their streams %.3g s after the communicator was to be finalized",
           c->rank, c->hosts[c->rank], pending_calls(c), seconds);
  hfr_engine_fail(&c->engine, &info);
}

/* Started operations are given up by the driver, which knows whom they wait for: it gets this long to do so. */
#define GIVE_UP_GRACE_NS 2000000000ll

/* Wait until no operation runs. hfreduceInProgress: that is not so after patience_ns (0: it waits on). Every operation has its
 * deadline once it has started, and the driver gives it up at engine.leave_ns. What waits for a stream has not started: it gets
 * as long as one here. */
static hfreduceResult_t wait_for_calls(hfreduceComm_t comm, int64_t patience_ns) {
  uint32_t active, before = 0;
  int64_t begin = hfr_now_ns(), limit = 0, leave = atomic_load(&comm->engine.leave_ns);
  while ((active = atomic_load_explicit(&comm->engine.active, memory_order_acquire))) {
    struct timespec t = {0, 200000};
    int64_t now = hfr_now_ns();
    if (active != before) limit = now + comm->engine.timeout_ns + GIVE_UP_GRACE_NS;
    if (leave && now > leave + GIVE_UP_GRACE_NS)
      give_up(comm, HFR_CLOSE_LIMIT);
    else if (now > limit)
      give_up(comm, comm->timeout);
    before = active;
    hfr_drive_async(&comm->engine);
    if (patience_ns && now - begin > patience_ns) return hfreduceInProgress;
    nanosleep(&t, NULL);
  }
  struct hfreduceComm *half = hfr_pairs_half(comm);
  if (!half) return hfreduceSuccess;
  atomic_store(&half->engine.leave_ns, leave);
  return wait_for_calls(half, patience_ns); /* an error of it is this one's too */
}

static hfreduceResult_t finalize(hfreduceComm_t comm) {
  HFR_TRY(wait_for_calls(comm, comm->engine.patience_ns));
  int code = hfr_engine_error(&comm->engine, hfr_last_error());
  return (hfreduceResult_t)code;
}

hfreduceResult_t hfreduceCommFinalize(hfreduceComm_t comm) {
  HFR_TRY(hfr_comm_enter(comm, __func__, HFR_WAITS));
  hfreduceResult_t r = comm->pid == getpid() ? finalize(comm) : hfreduceSuccess;
  hfr_comm_leave(comm, HFR_WAITS);
  return r;
}

/* End every wait, for this rank's reason. */
static void break_off(hfreduceComm_t comm, const hfreduceErrorInfo_t *why) {
  hfr_engine_fail(&comm->engine, why);
  struct hfreduceComm *half = hfr_pairs_half(comm);
  if (atomic_load(&comm->engine.active)) hfr_drive_async(&comm->engine);
  if (half && atomic_load(&half->engine.active)) hfr_drive_async(&half->engine);
}

static hfreduceErrorInfo_t abortion(const struct hfreduceComm *comm, const char *op) {
  hfreduceErrorInfo_t info;
  hfr_error_clear(&info);
  info.code = hfreduceAborted;
  info.rank = info.peer = comm->rank;
  snprintf(info.op, sizeof info.op, "%s", op);
  return info;
}

/* The communicator is to be closed. Calls of other threads that wait for other ranks are broken off, unless they are ending. */
static void break_waits(hfreduceComm_t comm) {
  uint32_t caller;
  const char *call;
  int64_t end = hfr_now_ns() + GRACE_NS;
  while (hfr_handle_waits(comm, &caller, &call)) {
    struct timespec t = {0, 500000};
    nanosleep(&t, NULL);
    if (hfr_now_ns() < end) continue;
    hfreduceErrorInfo_t info = abortion(comm, "close");
    int n = snprintf(info.text, sizeof info.text, "rank %d on %s: thread %u closed the communicator while ", comm->rank,
                     comm->hosts[comm->rank], hfr_thread_id());
    if (caller)
      snprintf(info.text + n, sizeof info.text - (size_t)n, "thread %u was in %s", caller, call);
    else
      snprintf(info.text + n, sizeof info.text - (size_t)n, "another thread waited in a call on it");
    break_off(comm, &info);
    return;
  }
}

/* As Finalize, but what still runs after HFR_CLOSE_LIMIT is given up. */
static hfreduceResult_t leave(hfreduceComm_t comm, int64_t patience_ns) {
  int64_t unset = 0;
  atomic_compare_exchange_strong(&comm->engine.leave_ns, &unset, hfr_now_ns() + (int64_t)(HFR_CLOSE_LIMIT * 1e9));
  return wait_for_calls(comm, patience_ns);
}

hfreduceResult_t hfreduceCommLeave(hfreduceComm_t comm) {
  hfreduceResult_t r = hfreduceSuccess;
  HFR_TRY(hfr_comm_enter(comm, __func__, HFR_BRIEF));
  if (comm->pid == getpid()) {
    break_waits(comm);
    r = leave(comm, comm->engine.patience_ns);
  }
  hfr_comm_leave(comm, HFR_BRIEF);
  return r;
}

void hfr_comm_tear_down(struct hfreduceComm *comm) {
  hfreduceErrorInfo_t before = *hfr_last_error(); /* of the call that was the last to leave */
  leave(comm, 0);
  hfr_comm_dispose(comm);
  *hfr_last_error() = before;
}

hfreduceResult_t hfreduceCommDestroy(hfreduceComm_t comm) {
  HFR_TRY(hfr_comm_enter(comm, __func__, HFR_BRIEF));
  if (comm->pid != getpid()) { /* the parent's; a forked child only forgets it */
    hfr_comm_leave(comm, HFR_BRIEF);
    return hfreduceSuccess;
  }
  if (!hfr_handle_shut(comm)) {
    hfr_comm_leave(comm, HFR_BRIEF);
    return hfr_fail(hfreduceInvalidArgument, "%s: comm is being destroyed by another thread", __func__);
  }
  break_waits(comm);
  if (hfr_handle_await(comm, (int64_t)(HFR_CLOSE_LIMIT * 1e9)))
    hfr_comm_tear_down(comm);
  else
    hfr_handle_orphan(comm);
  return hfreduceSuccess;
}

void hfr_comm_abort(struct hfreduceComm *comm) {
  hfreduceErrorInfo_t info = abortion(comm, "abort");
  snprintf(info.text, sizeof info.text, "the communicator was aborted by rank %d on %s", comm->rank, comm->hosts[comm->rank]);
  break_off(comm, &info);
}

hfreduceResult_t hfreduceCommAbort(hfreduceComm_t comm) {
  hfreduceResult_t r = hfreduceSuccess;
  HFR_TRY(hfr_comm_enter(comm, "hfreduceCommAbort", HFR_BRIEF));
  if (comm->pid == getpid()) {
    hfr_comm_abort(comm);
  } else {
    r = hfr_fail(hfreduceInvalidUsage, "hfreduceCommAbort: the communicator belongs to process %d, this is its fork",
                 (int)comm->pid);
  }
  hfr_comm_leave(comm, HFR_BRIEF);
  return r;
}

/* ---------------------------------------------------------------- asking */

/* For calls that only look: `expr` reads or writes what `pointer` points to. */
#define ASK(what, pointer, expr)                                                \
  do {                                                                          \
    hfreduceResult_t r_ = hfreduceSuccess;                                      \
    HFR_TRY(hfr_comm_enter(comm, __func__, HFR_BRIEF));                         \
    if (!(pointer))                                                             \
      r_ = hfr_fail(hfreduceInvalidArgument, "%s: %s is NULL", __func__, what); \
    else                                                                        \
      r_ = (expr);                                                              \
    hfr_comm_leave(comm, HFR_BRIEF);                                            \
    return r_;                                                                  \
  } while (0)
#define TELL(pointer, value) ASK(#pointer, pointer, (*(pointer) = (value), hfreduceSuccess))

hfreduceResult_t hfreduceCommGetAsyncError(hfreduceComm_t comm, hfreduceResult_t *error) {
  TELL(error, (hfreduceResult_t)hfr_engine_state(&comm->engine));
}

hfreduceResult_t hfreduceCommPending(hfreduceComm_t comm, int *count) { TELL(count, pending_calls(comm)); }

hfreduceResult_t hfreduceCommCount(hfreduceComm_t comm, int *count) {
  int n = hfr_handle_nranks(comm);
  if (n && count) {
    *count = n;
    return hfreduceSuccess;
  }
  TELL(count, comm->nranks);
}

hfreduceResult_t hfreduceCommUserRank(hfreduceComm_t comm, int *rank) { TELL(rank, comm->rank); }

hfreduceResult_t hfreduceCommCuDevice(hfreduceComm_t comm, int *device) { TELL(device, hfr_staging_device(comm->staging)); }

static hfreduceResult_t get_address(hfreduceComm_t comm, char *text, size_t size) {
  char address[HFR_ADDR_TEXT];
  hfr_addr_text(&comm->addrs[comm->rank], address);
  if (strlen(address) >= size)
    return hfr_fail(hfreduceInvalidArgument, "hfreduceCommGetAddress: %zu bytes are too few for %s", size, address);
  memcpy(text, address, strlen(address) + 1);
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceCommGetAddress(hfreduceComm_t comm, char *text, size_t size) {
  ASK("text", text, get_address(comm, text, size));
}

static hfreduceResult_t get_info(hfreduceComm_t comm, hfreduceCommInfo_t *info) {
  const struct hfr_layout *l = &comm->layout;
  *info = (hfreduceCommInfo_t){.rank = l->rank,
                               .nranks = l->nranks,
                               .local_rank = l->local,
                               .local_nranks = l->nlocal,
                               .node = l->node,
                               .nnodes = l->nnodes,
                               .id = comm->uid.comm_id};
  snprintf(info->host, sizeof info->host, "%s", comm->hosts[comm->rank]);
  snprintf(info->transports, sizeof info->transports, "%s%s%s", l->max_local > 1 || l->nnodes == 1 ? "shm" : "",
           l->max_local > 1 && l->nnodes > 1 ? "," : "", l->nnodes > 1 ? comm->engine.remote->name : "");
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceCommGetInfo(hfreduceComm_t comm, hfreduceCommInfo_t *info) { ASK("info", info, get_info(comm, info)); }

static hfreduceResult_t check_mine(hfreduceComm_t c, const char *function) {
  if (!c->forked) return hfreduceSuccess;
  return hfr_fail(hfreduceInvalidUsage, "%s: the communicator belongs to process %d, this is its fork", function, (int)c->pid);
}

static hfreduceResult_t connection_count(hfreduceComm_t comm, const char *function, int *count) {
  HFR_TRY(check_mine(comm, function));
  *count = hfr_engine_connections(&comm->engine);
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceCommConnectionCount(hfreduceComm_t comm, int *count) {
  ASK("count", count, connection_count(comm, __func__, count));
}

static hfreduceResult_t get_connection(hfreduceComm_t comm, const char *function, int index, hfreduceConnection_t *connection) {
  HFR_TRY(check_mine(comm, function));
  int count = hfr_engine_connections(&comm->engine);
  if (index < 0 || index >= count)
    return hfr_fail(hfreduceInvalidArgument, "%s: index is %d; there are %d connections", function, index, count);
  hfr_engine_connection(&comm->engine, index, connection);
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceCommGetConnection(hfreduceComm_t comm, int index, hfreduceConnection_t *connection) {
  ASK("connection", connection, get_connection(comm, __func__, index, connection));
}

static hfreduceResult_t set_timeout(hfreduceComm_t comm, const char *function, double seconds) {
  struct hfreduceComm *half = hfr_pairs_half(comm);
  if (!(seconds > 0)) return hfr_fail(hfreduceInvalidArgument, "%s: %g s; it must be positive", function, seconds);
  comm->timeout = seconds;
  comm->join_timeout = join_timeout(seconds);
  comm->engine.timeout_ns = (int64_t)(seconds * 1e9);
  return half ? set_timeout(half, function, seconds) : hfreduceSuccess;
}

hfreduceResult_t hfreduceCommSetTimeout(hfreduceComm_t comm, double seconds) {
  ASK("comm", comm, set_timeout(comm, __func__, seconds));
}

static hfreduceResult_t set_patience(hfreduceComm_t comm, const char *function, double seconds) {
  if (!(seconds >= 0)) return hfr_fail(hfreduceInvalidArgument, "%s: %g s; it must be 0 or more", function, seconds);
  comm->engine.patience_ns = (int64_t)(seconds * 1e9);
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceCommSetPatience(hfreduceComm_t comm, double seconds) {
  ASK("comm", comm, set_patience(comm, __func__, seconds));
}

/* ---------------------------------------------------------------- splitting */

struct split_entry {
  int32_t color, key, rank, pad;
};

static int by_key(const void *a, const void *b) {
  const struct split_entry *x = a, *y = b;
  return x->key != y->key ? (x->key < y->key ? -1 : 1) : x->rank - y->rank;
}

hfreduceConfig_t hfr_comm_heir(struct hfreduceComm *comm, const hfreduceConfig_t *config) {
  hfreduceConfig_t heir;
  hfreduceConfigInit(&heir);
  if (config) heir = *config;
  if (heir.timeout == 0) heir.timeout = comm->timeout;
  if (heir.device < 0) heir.device = comm->device;
  if (!heir.cancel) heir.cancel = (const int *)&comm->handle.leaving;
  return heir;
}

static hfreduceResult_t split(hfreduceComm_t comm, int color, int key, hfreduceComm_t *newcomm, const hfreduceConfig_t *config,
                              struct hfreduceComm *whole) {
  if (!newcomm) return hfr_fail(hfreduceInvalidArgument, "hfreduceCommSplit: newcomm is NULL");
  *newcomm = NULL;
  if (color < -1)
    return hfr_fail(hfreduceInvalidArgument, "hfreduceCommSplit: color is %d; it must be 0 or more, or -1 for none", color);
  HFR_TRY(check_config(config));
  hfreduceConfig_t settings = hfr_comm_heir(comm, config);
  hfreduceUniqueId id = {{0}};
  int n = comm->nranks, members = 0, mine = -1;
  struct split_entry me = {color, key, comm->rank, 0}, *all = calloc((size_t)n, sizeof *all);
  hfreduceUniqueId *ids = calloc((size_t)n, sizeof *ids);
  if (!all || !ids) {
    free(all);
    free(ids);
    return hfr_fail(hfreduceSystemError, "out of memory for a split of %d ranks", n);
  }
  /* Who goes where, then the new ids from each group's first rank: both over the communicator itself. */
  int64_t limit_ns = (int64_t)(join_timeout(settings.timeout) * 1e9);
  atomic_store_explicit(&comm->engine.purpose, "split", memory_order_relaxed);
  hfreduceResult_t r = hfr_gather_now(comm, &me, all, sizeof me, limit_ns, &settings);
  for (int i = 0; !r && i < n; i++)
    if (all[i].color == color && color >= 0) all[members++] = all[i];
  qsort(all, (size_t)members, sizeof *all, by_key);
  for (int i = 0; i < members; i++)
    if (all[i].rank == comm->rank) mine = i;
  int first = members ? all[0].rank : -1;
  if (!r && first == comm->rank) r = new_id(&id, comm->uid.local);
  if (!r) r = hfr_gather_now(comm, &id, ids, sizeof id, limit_ns, &settings);
  atomic_store_explicit(&comm->engine.purpose, NULL, memory_order_relaxed);
  if (!r && members) r = hfr_comm_init(newcomm, members, &ids[first], mine, &settings, whole);
  free(all);
  free(ids);
  return r;
}

hfreduceResult_t hfreduceCommSplit(hfreduceComm_t comm, int color, int key, hfreduceComm_t *newcomm, hfreduceConfig_t *config) {
  HFR_TRY(hfr_comm_begin(comm, "hfreduceCommSplit"));
  hfreduceResult_t r = check_mine(comm, "hfreduceCommSplit");
  if (!r) r = split(comm, color, key, newcomm, config, NULL); /* now, whatever waits for the end of a group of this thread */
  hfr_comm_end(comm);
  return r;
}

hfreduceResult_t hfr_comm_split_half(struct hfreduceComm *whole, int color, struct hfreduceComm **half) {
  char name[sizeof whole->name + 8];
  hfreduceConfig_t config;
  hfreduceConfigInit(&config);
  snprintf(name, sizeof name, "%.24s.half%d", whole->name, color);
  config.timeout = whole->timeout;
  config.name = name;
  config.cancel = whole->cancel;
  config.interrupted = whole->asks;
  config.interrupted_arg = whole->asks_arg;
  return split(whole, color, whole->rank, half, &config, whole);
}
