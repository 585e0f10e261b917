/*
 * Peers that are let in, for they know the secret or share the node's memory, and then do not keep to the protocol. A rank
 * refuses what cannot be, says so, and reads and writes nothing that is not its own: run this under ASan.
 */
#include "check.h"

#include "base/auth.h"
#include "base/crc32c.h"
#include "base/thread.h"
#include "comm/comm.h"
#include "topo/host.h"
#include "transport/transport.h"

#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---------------------------------------------------------------- a local rank rewrites the header of a message */

static void test_shared_header(void) {
  struct hfr_arena mine, theirs;
  const size_t chunk = 8192;
  int local_of[2] = {0, 1};
  struct hfr_net net[2] = {{.rank = 0, .nranks = 2, .arena = &mine, .local_of = local_of},
                           {.rank = 1, .nranks = 2, .arena = &theirs, .local_of = local_of}};
  struct hfr_link *in = NULL, *out = NULL;
  if (!CHECK(!hfr_arena_create(&mine, 2, chunk, 2, 0) && !hfr_arena_join(&mine, 0), "%s", hfr_last_error()->text)) return;
  if (!CHECK(!hfr_arena_attach(&theirs, dup(mine.fd), 2, chunk, 2, 0) && !hfr_arena_join(&theirs, 1), "%s",
             hfr_last_error()->text))
    return;
  CHECK(!hfr_transport_shm.open(&net[0], 1, HFR_VC_P2P, &in) && !hfr_transport_shm.open(&net[1], 0, HFR_VC_P2P, &out));
  struct hfr_ring *ring = hfr_arena_ring_at(&theirs, 1, 0, 1);
  for (int round = 0; round < 2 * HFR_RING_SLOTS; round++) {
    uint8_t payload[100] = {(uint8_t)round};
    struct hfr_msg_header h = {.magic = HFR_MSG_MAGIC, .bytes = sizeof payload, .offset = (uint64_t)round, .fp = {.seq = 7}};
    const struct hfr_msg_header *got = NULL;
    const void *data = NULL;
    CHECK(hfr_transport_shm.post_send(out, &h, payload) == HFR_LINK_OK);
    /* Asked without a size first, as by a receive that does not know what comes. */
    CHECK(hfr_transport_shm.recv(in, NULL, 0, &got, &data) == HFR_LINK_OK && !data && got->bytes == sizeof payload);
    struct hfr_msg_header *theirs_now = &ring->header[round % HFR_RING_SLOTS];
    theirs_now->bytes = UINT64_MAX;
    theirs_now->offset = 99;
    theirs_now->fp.count = UINT64_MAX;
    CHECK(got->bytes == sizeof payload && got->offset == (uint64_t)round && got->fp.count == 0, "bytes %llu",
          (unsigned long long)got->bytes);
    CHECK(hfr_transport_shm.recv(in, payload, sizeof payload, &got, &data) == HFR_LINK_OK && data, "what was judged is gone");
    CHECK(got->bytes == sizeof payload && data && *(const uint8_t *)data == round);
    hfr_transport_shm.release(in);
    CHECK(atomic_load(&in->bytes_received) == (uint64_t)(round + 1) * sizeof payload);
    CHECK(hfr_transport_shm.recv(in, NULL, 0, &got, &data) == HFR_LINK_AGAIN, "a header of a message that has not come");
  }
  hfr_transport_shm.close(in);
  hfr_transport_shm.close(out);
  hfr_arena_close(&theirs);
  hfr_arena_close(&mine);
}

/* ---------------------------------------------------------------- errors from the wire */

static void test_error_frames(void) {
  static const int none[] = {0, -1, hfreduceInProgress, hfreduceNumResults, 1 << 30};
  hfreduceErrorInfo_t sent, got;
  hfr_error_clear(&sent);
  memset(sent.text, 'x', sizeof sent.text);
  sent.code = hfreduceAborted;
  const uint8_t *payload = (const uint8_t *)&sent;
  CHECK(!hfr_conn_error(payload, sizeof sent, &got) && got.code == hfreduceAborted);
  CHECK(strlen(got.text) == sizeof got.text - 1);
  CHECK(hfr_conn_error(payload, sizeof sent - 1, &got) == -1);
  for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
    sent.code = none[i];
    CHECK(hfr_conn_error(payload, sizeof sent, &got) == -1, "%d", none[i]);
  }
}

/* A frame that announces more than the reader takes breaks the connection at once; the largest frame is taken whole. */
static void test_frame_length(uint32_t announced, int taken) {
  enum { MOST = 1000 };
  int fd[2];
  struct hfr_conn conn;
  enum hfr_frame type;
  const uint8_t *payload;
  size_t bytes = 0;
  uint8_t frame[8 + MOST + 1] = {0};
  const uint32_t header[2] = {HFR_FRAME_JOIN, announced};
  if (!CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fd))) return;
  memcpy(frame, header, sizeof header);
  hfr_conn_init(&conn, fd[0], MOST);
  CHECK(send(fd[1], frame, sizeof frame - 1, MSG_NOSIGNAL) == sizeof frame - 1);
  CHECK(!hfr_conn_fill(&conn));
  CHECK(hfr_conn_next(&conn, &type, &payload, &bytes) == taken && conn.dead == !taken, "a frame of %u bytes: dead %d", announced,
        conn.dead);
  if (taken) CHECK(type == HFR_FRAME_JOIN && bytes == announced);
  hfr_conn_close(&conn);
  close(fd[1]);
}

/* ---------------------------------------------------------------- a rank that speaks the protocol, and lies */

#define SLOTS 8

/* Wait for a descriptor, at most `seconds`. */
static int ready(int fd, short events, int seconds) {
  struct pollfd p = {fd, events, 0};
  return poll(&p, 1, seconds * 1000) > 0;
}

/* Connect to one of the library's listeners and prove to know the secret. -1: refused. */
static int call_in(const struct hfr_addr *addr, enum hfr_auth_kind kind, uint64_t comm_id, const uint8_t secret[16], int rank,
                   int target) {
  struct hfr_auth auth;
  int fd;
  if (!CHECK(!hfr_socket_connect(addr, &fd) && ready(fd, POLLOUT, 20), "%s", hfr_last_error()->text)) return -1;
  hfr_auth_client(&auth, fd, kind, comm_id, secret, rank, target, 0, 0);
  if (!hfr_auth_client_wait(&auth, hfr_now_ns() + 20000000000ll, "the library")) return fd;
  close(fd);
  return -1;
}

static uint8_t known_secret[16];
static enum hfr_auth_verdict tell_secret(void *arg, const struct hfr_auth_hello *hello, uint8_t secret[16]) {
  (void)arg, (void)hello;
  memcpy(secret, known_secret, 16);
  return HFR_AUTH_WELCOME;
}

/* Take in a connection of the library, as one that knows the secret. */
static int take_in(int listener, const uint8_t secret[16]) {
  struct hfr_auth auth;
  if (!CHECK(ready(listener, POLLIN, 20), "nobody came")) return -1;
  int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), r;
  memcpy(known_secret, secret, 16);
  hfr_auth_server(&auth, fd, tell_secret, NULL);
  while (!(r = hfr_auth_step(&auth)) && ready(fd, (short)auth.events, 20)) {
  }
  if (CHECK(r > 0, "%s", hfr_last_error()->text)) return fd;
  close(fd);
  return -1;
}

/* The next frame, or 0 when the connection closed or nothing came for 20 s. */
static int next_frame(struct hfr_conn *conn, enum hfr_frame *type, const uint8_t **payload, size_t *bytes) {
  for (;;) {
    if (hfr_conn_next(conn, type, payload, bytes)) return 1;
    if (conn->dead || !ready(conn->fd, POLLIN, 20)) return 0;
    hfr_conn_fill(conn);
  }
}

static struct hfr_record record_of(int rank, int nranks, const struct hfr_addr *addr, int same_node) {
  struct hfr_record r = {.rank = rank, .nranks = nranks, .addr = *addr, .host = "liar", .segment = 2 << 20, .nvlink_min = 4096};
  struct hfr_transport_offer offer;
  CHECK(!hfr_transport_offer("tcp", &offer), "%s", hfr_last_error()->text);
  if (same_node) hfr_host_id(r.hostid);
  memcpy(r.transports, offer.number, sizeof r.transports);
  r.slots = SLOTS;
  r.chunk = 131072;
  r.streams = 1;
  return r;
}

/* A rank that keeps to the protocol, in a thread: it joins, makes one call of two ranks, and tells how that ended. */
struct honest {
  pthread_t thread;
  hfreduceUniqueId id;
  int rank, receives, joined;
  double timeout;
  hfreduceErrorInfo_t error;
  hfreduceResult_t result;
};

static void *honest_main(void *arg) {
  struct honest *h = arg;
  hfreduceComm_t comm = NULL;
  hfreduceConfig_t config;
  float x[16] = {0};
  hfreduceConfigInit(&config);
  config.timeout = h->timeout;
  h->result = hfreduceCommInitRankConfig(&comm, 2, h->id, h->rank, &config);
  h->joined = !h->result;
  if (!h->result)
    h->result = h->receives ? hfreduceRecv(x, 16, hfreduceFloat32, 1 - h->rank, comm, NULL) : hfreduceBarrier(comm, NULL);
  h->error = *hfr_last_error();
  if (comm) hfreduceCommDestroy(comm);
  return NULL;
}

static void begin(struct honest *h, int rank, int receives, double timeout) {
  *h = (struct honest){.rank = rank, .receives = receives, .timeout = timeout};
  CHECK(!hfreduceGetUniqueIdLocal(&h->id), "%s", hfreduceGetLastError(NULL));
}

/* A liar's own listener, and its place at the rendezvous as `rank`. The connection to the root; -1. */
static int join_as(struct honest *h, int rank, int same_node, int *listener, struct hfr_uid *uid, struct hfr_conn *conn,
                   struct hfr_record table[2]) {
  struct hfr_addr mine = {.family = 4, .ip = {127, 0, 0, 1}};
  enum hfr_frame type;
  const uint8_t *payload;
  size_t bytes;
  memcpy(uid, h->id.internal, sizeof *uid);
  CHECK(!hfr_socket_listen(&mine, 8, listener), "%s", hfr_last_error()->text);
  int fd = call_in(&uid->root, HFR_AUTH_ROOT, uid->comm_id, uid->secret, rank, -1);
  if (!CHECK(fd >= 0, "%s", hfr_last_error()->text)) return -1;
  struct hfr_record r = record_of(rank, 2, &mine, same_node);
  hfr_conn_init(conn, fd, 1 << 20);
  hfr_conn_send(conn, HFR_FRAME_JOIN, &r, sizeof r);
  CHECK(!pthread_create(&h->thread, NULL, honest_main, h));
  while (next_frame(conn, &type, &payload, &bytes))
    if (type == HFR_FRAME_TABLE && bytes == 2 * sizeof r) return memcpy(table, payload, bytes), 0;
  CHECK(0, "no table came");
  return -1;
}

/* Rank 1 of a node of its own, until rank 0 says that all may go. The control connection goes to *control. */
static int ready_as_one(struct honest *h, int *listener, struct hfr_uid *uid, struct hfr_conn *control) {
  struct hfr_conn conn;
  struct hfr_record table[2];
  enum hfr_frame type;
  const uint8_t *payload;
  size_t bytes;
  if (join_as(h, 1, 0, listener, uid, &conn, table)) return -1;
  hfr_conn_close(&conn);
  int fd = call_in(&table[0].addr, HFR_AUTH_CONTROL, uid->comm_id, uid->secret, 1, 0);
  if (!CHECK(fd >= 0, "%s", hfr_last_error()->text)) return -1;
  hfr_conn_init(control, fd, 1 << 20);
  hfr_conn_send(control, HFR_FRAME_READY, NULL, 0);
  while (next_frame(control, &type, &payload, &bytes))
    if (type == HFR_FRAME_GO) return 0;
  CHECK(0, "rank 0 did not say go");
  return -1;
}

/* ---------------------------------------------------------------- records */

/* A record that cannot be is dropped with its connection, and nobody else suffers: two ranks still join. */
static void test_impossible_records(void) {
  static const int said[][2] = {{2, 2}, {3, 3}, {-1, 2}, {0, 0}, {0, 1000001}, {INT32_MAX, 2}, {INT32_MIN, INT32_MAX}};
  struct honest h, other;
  begin(&h, 0, 0, 60);
  struct hfr_uid uid;
  memcpy(&uid, h.id.internal, sizeof uid);
  for (size_t i = 0; i < sizeof said / sizeof *said; i++) {
    struct hfr_conn conn;
    enum hfr_frame type;
    const uint8_t *payload;
    size_t bytes;
    struct hfr_record r = record_of(said[i][0], said[i][1], &uid.root, 0);
    int fd = call_in(&uid.root, HFR_AUTH_ROOT, uid.comm_id, uid.secret, 1, -1);
    if (!CHECK(fd >= 0, "%s", hfr_last_error()->text)) return;
    hfr_conn_init(&conn, fd, 1 << 20);
    hfr_conn_send(&conn, HFR_FRAME_JOIN, &r, sizeof r);
    CHECK(!next_frame(&conn, &type, &payload, &bytes) && conn.dead, "rank %d of %d was taken in", r.rank, r.nranks);
    hfr_conn_close(&conn);
  }
  other = h;
  other.rank = 1;
  pthread_create(&h.thread, NULL, honest_main, &h);
  pthread_create(&other.thread, NULL, honest_main, &other);
  pthread_join(h.thread, NULL);
  pthread_join(other.thread, NULL);
  CHECK(!h.result && !other.result, "%d %s; %d %s", h.result, h.error.text, other.result, other.error.text);
}

/* ---------------------------------------------------------------- control frames */

/* Rank 0 waits in a barrier; the liar says that it waits in something else, in a frame that is one byte short, and leaves. */
static void test_short_control_frame(void) {
  struct honest h;
  struct hfr_conn control;
  struct hfr_uid uid;
  int listener = -1;
  begin(&h, 0, 0, 60);
  if (!ready_as_one(&h, &listener, &uid, &control)) {
    struct hfr_fingerprint fp = {.seq = 1, .count = 5, .root = 0, .coll = HFR_BROADCAST, .dtype = hfreduceFloat32};
    hfr_conn_send(&control, HFR_FRAME_STUCK, &fp, sizeof fp - 1);
    hfr_conn_send(&control, HFR_FRAME_BYE, "\1", 1);
    for (int i = 0; i < 30; i++) { /* rank 0 compares once it has waited for a while itself */
      usleep(100000);
      hfr_conn_send(&control, HFR_FRAME_STUCK, &fp, sizeof fp - 1);
    }
    hfr_conn_close(&control);
    pthread_join(h.thread, NULL);
    CHECK(h.joined && h.result == hfreduceRemoteError && strstr(h.error.text, "died or lost its connection"), "%d %s", h.result,
          h.error.text);
  }
  close(listener);
}

/* ---------------------------------------------------------------- messages */

/* Rank 0 receives 16 floats, the first message of this peer; the liar announces a message that no memory can hold, or another
 * than the first. */
static void test_absurd_message(uint64_t count, int tag, uint64_t number) {
  struct honest h;
  struct hfr_conn control;
  struct hfr_uid uid;
  int listener = -1;
  begin(&h, 0, 1, 20);
  if (!ready_as_one(&h, &listener, &uid, &control)) {
    struct {
      struct hfr_msg_header header;
      float payload[16];
    } message = {.header = {.magic = HFR_MSG_MAGIC,
                            .bytes = count * sizeof(float) <= 64 ? count * sizeof(float) : 64,
                            .fp = {.seq = number, .count = count, .root = tag, .coll = HFR_P2P, .dtype = hfreduceFloat32}}};
    message.header.crc = hfr_crc32c(0, message.payload, message.header.bytes);
    int data = take_in(listener, uid.secret);
    if (data >= 0) CHECK(send(data, &message, sizeof message, MSG_NOSIGNAL) == sizeof message);
    pthread_join(h.thread, NULL);
    CHECK(h.result == hfreduceInternalError && strstr(h.error.text, "where message 1 was expected"),
          "message %llu of %llu floats, tag %d: %d %s", (unsigned long long)number, (unsigned long long)count, tag, h.result,
          h.error.text);
    close(data);
    hfr_conn_close(&control);
  }
  close(listener);
}

/* ---------------------------------------------------------------- a false root, a leader that stops */

/* The root knows the secret, and answers with an error that is none: the rank must not take it for a table. */
static void test_root_with_a_false_error(int code) {
  struct hfr_addr mine = {.family = 4, .ip = {127, 0, 0, 1}};
  struct hfr_uid uid = {.magic = HFR_UID_MAGIC, .version = 1, .comm_id = 77, .secret = "fifteen letters", .local = 1};
  struct honest h = {.rank = 1, .timeout = 20};
  int listener;
  hfreduceErrorInfo_t info;
  if (!CHECK(!hfr_socket_listen(&mine, 8, &listener), "%s", hfr_last_error()->text)) return;
  uid.root = mine;
  hfr_uid_pack(&uid, &h.id);
  CHECK(!pthread_create(&h.thread, NULL, honest_main, &h));
  int fd = take_in(listener, uid.secret);
  if (fd >= 0) {
    struct hfr_conn conn;
    hfr_conn_init(&conn, fd, 1 << 20);
    hfr_error_clear(&info);
    info.code = code;
    hfr_conn_send(&conn, HFR_FRAME_ERROR, &info, sizeof info);
    pthread_join(h.thread, NULL);
    hfr_conn_close(&conn);
  }
  CHECK(!h.joined && h.result == hfreduceInternalError && strstr(h.error.text, "its code does not exist"), "code %d: %d %s", code,
        h.result, h.error.text);
  close(listener);
}

/* The liar is rank 0 and the leader of the node: it joins, and hands out no shared memory. */
static void test_leader_that_stops(void) {
  struct honest h;
  struct hfr_conn conn;
  struct hfr_record table[2];
  struct hfr_uid uid;
  int listener = -1;
  begin(&h, 1, 0, 2);
  int64_t start = hfr_now_ns();
  if (!join_as(&h, 0, 1, &listener, &uid, &conn, table)) {
    pthread_join(h.thread, NULL);
    CHECK(h.result == hfreduceTimeout && strstr(h.error.text, "rank 0 on this host did not hand out the shared memory"), "%d %s",
          h.result, h.error.text);
    CHECK(hfr_now_ns() - start < 60000000000ll);
  }
  hfr_conn_close(&conn);
  close(listener);
}

/* ---------------------------------------------------------------- a stranger who knows the communicator's number */

/* Whoever has listened on the network knows comm_id; only the proof tells that a caller has the secret, too. */
static void test_wrong_proof(int bit) {
  struct honest h;
  struct hfr_uid uid;
  struct hfr_auth auth;
  int fd;
  begin(&h, 0, 0, 60);
  memcpy(&uid, h.id.internal, sizeof uid);
  uid.secret[bit / 8] ^= (uint8_t)(1 << bit % 8);
  if (!CHECK(!hfr_socket_connect(&uid.root, &fd) && ready(fd, POLLOUT, 20), "%s", hfr_last_error()->text)) return;
  hfr_auth_client(&auth, fd, HFR_AUTH_ROOT, uid.comm_id, uid.secret, 1, -1, 0, 0);
  CHECK(hfr_auth_client_wait(&auth, hfr_now_ns() + 20000000000ll, "the root") && auth.verdict == HFR_AUTH_SECRET,
        "bit %d: verdict %d: %s", bit, auth.verdict, hfr_last_error()->text);
  close(fd);
}

/* ---------------------------------------------------------------- another user */

/* Loopback without a secret: whoever reads the source can speak the handshake, but the kernel tells whose the connection is. The
 * liar makes its socket as another user, and then believes any root. */
static void test_another_user(void) {
  struct hfr_addr root = {.family = 4, .ip = {127, 0, 0, 1}};
  struct hfr_uid uid;
  struct honest h = {.rank = 0, .timeout = 60}, other;
  char text[HFR_ADDR_TEXT];
  int fd;
  if (geteuid()) return; /* only root can become another user */
  if (!CHECK(!hfr_socket_listen(&root, 1, &fd), "%s", hfr_last_error()->text)) return;
  close(fd);
  CHECK(!hfreduceUniqueIdFromAddress(&h.id, hfr_addr_text(&root, text), NULL, 7), "%s", hfr_last_error()->text);
  memcpy(&uid, h.id.internal, sizeof uid);
  CHECK(hfr_auth_is_public(uid.secret));
  CHECK(!pthread_create(&h.thread, NULL, honest_main, &h));
  for (int i = 0; i < 1000 && (hfr_socket_connect(&root, &fd) || !ready(fd, POLLOUT, 20) || hfr_socket_error(fd)); i++)
    usleep(20000);
  close(fd);
  CHECK(!seteuid(65534) && !hfr_socket_connect(&root, &fd) && !seteuid(0) && ready(fd, POLLOUT, 20), "%s",
        hfr_last_error()->text);
  struct hfr_auth auth;
  hfr_auth_client(&auth, fd, HFR_AUTH_ROOT, uid.comm_id, uid.secret, 1, -1, 0, 0);
  CHECK(hfr_auth_client_wait(&auth, hfr_now_ns() + 20000000000ll, "the root") && auth.verdict == HFR_AUTH_USER, "verdict %d: %s",
        auth.verdict, hfr_last_error()->text);
  close(fd);
  other = h;
  other.rank = 1;
  CHECK(!pthread_create(&other.thread, NULL, honest_main, &other));
  pthread_join(h.thread, NULL);
  pthread_join(other.thread, NULL);
  CHECK(!h.result && !other.result, "%d %s; %d %s", h.result, h.error.text, other.result, other.error.text);
}

int main(void) {
  alarm(200); /* a wait that does not end is a failure */
  setenv("HFREDUCE_DEBUG", "NONE", 1);
  test_shared_header();
  test_error_frames();
  test_frame_length(1000, 1);
  test_frame_length(1001, 0);
  test_frame_length(UINT32_MAX, 0);
  test_impossible_records();
  test_short_control_frame();
  test_absurd_message((1ull << 62) + 4, 0, 1);
  test_absurd_message((1ull << 62) + 4, 5, 1);
  test_absurd_message(1ull << 61, 5, 1);
  test_absurd_message(16, 0, 0);
  test_absurd_message(16, 0, 2);
  test_root_with_a_false_error(0);
  test_root_with_a_false_error(hfreduceInProgress);
  test_root_with_a_false_error(1000);
  test_leader_that_stops();
  test_wrong_proof(0);
  test_wrong_proof(127);
  test_another_user();
  return check_done();
}
