/*
 * A verbs link against a peer that breaks the rules: at the handshake, then over queue pairs. The link is rank 1's to rank 0,
 * opened with a connection that "arrived"; this file plays rank 0 through libibverbs itself. Each case has to end in an error of
 * the right kind that names the peer, in time; nothing may be written outside the link's memory, and nothing may stay behind.
 *
 * test_verbs_peer [WORD]: only cases whose name has WORD in it; prints what each gave.
 */
#include "check.h"

#include "base/param.h"
#include "base/thread.h"
#include "transport/verbs_link.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK 16384
#define LATE 3.0 /* seconds */
#define CREDIT 0x80000000u

/* ---------------------------------------------------------------- both ends */

static struct hfr_arena arena;
static struct hfr_addr addr[2];
static char host[2][64] = {"mars", "venus"};
static int local_of[2];
static _Atomic int arrived[2 * HFR_NVC];
static struct hfr_net net = {.rank = 1,
                             .nranks = 2,
                             .addr = addr,
                             .host = host,
                             .arena = &arena,
                             .local_of = local_of,
                             .streams = 1,
                             .timeout_ns = 5000000000ll,
                             .arrived = arrived};

struct enemy {
  int fd; /* its end of the connection */
  struct hfr_ib_port port;
  const struct hfr_ib *ib;
  uint8_t *memory;
  size_t bytes;
  struct hfr_ib_mr *mr;
  struct hfr_ib_cq *cq;
  struct hfr_ib_qp *qp;
  struct hfr_verbs_hello mine, theirs;
  int status; /* of its last send; -1: no completion */
};

static struct hfr_link *l;
static struct hfr_verbs_link *v; /* the same */
static const struct hfr_msg_header *header;
static const void *data;

/* The link looks for a message, as an operation would: polling, then asleep. */
static int look(void) {
  static struct hfr_waitset set;
  static int idle;
  int r = l->transport->recv(l, NULL, 0, &header, &data);
  if (r != HFR_LINK_AGAIN || ++idle % 50) return r;
  set.n = 0;
  l->transport->want(l, 1, &set);
  poll(set.fd, (nfds_t)set.n, 5);
  return HFR_LINK_AGAIN;
}

static void open_ends(struct enemy *e) {
  int pair[2];
  memset(e, 0, sizeof *e);
  const char *why;
  CHECK(!hfr_ib_choose(0, &e->port));
  e->ib = hfr_ib_load(&why);
  CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair));
  atomic_store(&arrived[HFR_VC_A], pair[0] + 1);
  e->fd = pair[1];
  CHECK(!hfr_transport_verbs.open(&net, 0, HFR_VC_A, &l));
  v = (struct hfr_verbs_link *)l;
}

static void close_ends(struct enemy *e) {
  if (e->qp) e->ib->destroy_qp(e->qp);
  if (e->cq) e->ib->destroy_cq(e->cq);
  if (e->mr) e->ib->dereg_mr(e->mr);
  free(e->memory);
  int64_t began = hfr_now_ns();
  l->transport->close(l);
  CHECK(hfr_now_ns() - began < 2000000000ll, "closing took %.1f s", (double)(hfr_now_ns() - began) * 1e-9);
  if (e->fd >= 0) close(e->fd);
  CHECK(!net.shared, "what links share is freed with the last");
}

/* Until the link fails or has a message; 0: it did neither in time. */
static int until_settled(double seconds) {
  int64_t limit = hfr_now_ns() + (int64_t)(seconds * 1e9);
  int r;
  while ((r = look()) == HFR_LINK_AGAIN && hfr_now_ns() < limit) continue;
  return r;
}

/* ---------------------------------------------------------------- a peer that knows the protocol */

static int take(struct enemy *e, void *to, size_t bytes) {
  int64_t limit = hfr_now_ns() + 3000000000ll;
  for (size_t have = 0; have < bytes;) {
    if (look() == HFR_LINK_FAILED || hfr_now_ns() > limit) return -1;
    ssize_t n = recv(e->fd, (char *)to + have, bytes - have, MSG_DONTWAIT);
    if (n > 0) have += (size_t)n;
  }
  return 0;
}
static void give(struct enemy *e, const void *from, size_t bytes) { send(e->fd, from, bytes, MSG_NOSIGNAL); }

/* Read the link's hello and make one that fits it. */
static void prepare(struct enemy *e) {
  struct hfr_ib_qp_init_attr init = {.cap = {64, 64, 1, 1, 0}, .qp_type = HFR_IB_QPT_RC};
  struct hfr_ib_qp_attr attr = {
      .qp_state = HFR_IB_QPS_INIT, .port_num = (uint8_t)e->port.number, .qp_access_flags = HFR_IB_ACCESS_REMOTE_WRITE};
  CHECK(!take(e, &e->theirs, sizeof e->theirs), "%s", hfr_last_error()->text);
  e->bytes = (e->theirs.depth + 2) * e->theirs.slot_bytes;
  e->memory = calloc(1, e->bytes);
  e->mr = hfr_ib_register(&e->port, e->memory, e->bytes, 1);
  e->cq = e->ib->create_cq(e->port.context, 256, NULL, NULL, 0);
  init.send_cq = init.recv_cq = e->cq;
  e->qp = e->ib->create_qp(e->port.pd, &init);
  CHECK(e->mr && e->cq && e->qp, "%s", strerror(errno));
  CHECK(!e->ib->modify_qp(e->qp, &attr, HFR_IB_QP_STATE | HFR_IB_QP_PKEY_INDEX | HFR_IB_QP_PORT | HFR_IB_QP_ACCESS_FLAGS));
  e->mine = e->theirs;
  e->mine.address = (uintptr_t)e->memory;
  e->mine.rkey = e->mr->rkey;
  memset(e->mine.qpn, 0, sizeof e->mine.qpn);
  e->mine.qpn[0] = e->qp->qp_num;
  e->mine.psn[0] = 4711;
}

static void connect_enemy(struct enemy *e) {
  struct hfr_ib_qp_attr attr = {.qp_state = HFR_IB_QPS_RTR,
                                .path_mtu = e->theirs.mtu,
                                .dest_qp_num = e->theirs.qpn[0],
                                .rq_psn = e->theirs.psn[0],
                                .max_dest_rd_atomic = 1,
                                .min_rnr_timer = 12,
                                .ah_attr = {.dlid = e->theirs.lid, .port_num = (uint8_t)e->port.number}};
  if (e->theirs.link_layer == HFR_IB_LINK_LAYER_ETHERNET) {
    attr.ah_attr.is_global = 1;
    memcpy(attr.ah_attr.grh.dgid.raw, e->theirs.gid, 16);
    attr.ah_attr.grh.sgid_index = (uint8_t)e->port.gid_index;
    attr.ah_attr.grh.hop_limit = 64;
  }
  CHECK(!e->ib->modify_qp(e->qp, &attr,
                          HFR_IB_QP_STATE | HFR_IB_QP_AV | HFR_IB_QP_PATH_MTU | HFR_IB_QP_DEST_QPN | HFR_IB_QP_RQ_PSN |
                              HFR_IB_QP_MAX_DEST_RD_ATOMIC | HFR_IB_QP_MIN_RNR_TIMER));
  attr = (struct hfr_ib_qp_attr){
      .qp_state = HFR_IB_QPS_RTS, .sq_psn = 4711, .timeout = 14, .retry_cnt = 3, .rnr_retry = 3, .max_rd_atomic = 1};
  CHECK(!e->ib->modify_qp(e->qp, &attr,
                          HFR_IB_QP_STATE | HFR_IB_QP_SQ_PSN | HFR_IB_QP_TIMEOUT | HFR_IB_QP_RETRY_CNT | HFR_IB_QP_RNR_RETRY |
                              HFR_IB_QP_MAX_QP_RD_ATOMIC));
}

static void post_receives(struct enemy *e, int n) {
  for (int i = 0; i < n; i++) {
    struct hfr_ib_recv_wr wr = {0}, *bad;
    CHECK(!e->qp->context->post_recv(e->qp, &wr, &bad));
  }
}

/* All as it should be, up to where the link carries messages. */
static void be_nice(struct enemy *e, int receives) {
  uint8_t ready = 1, answer = 0;
  int64_t limit = hfr_now_ns() + 3000000000ll;
  connect_enemy(e);
  post_receives(e, receives);
  give(e, &e->mine, sizeof e->mine);
  CHECK(!take(e, &answer, 1) && answer == 1, "%s", hfr_last_error()->text);
  give(e, &ready, 1);
  while (v->phase != HFR_VERBS_UP && look() == HFR_LINK_AGAIN && hfr_now_ns() < limit) continue;
  CHECK(v->phase == HFR_VERBS_UP, "%s", hfr_last_error()->text);
}

/* Write from the enemy's memory to `at` in the link's, and wait for the completion while the link looks. */
static void strike(struct enemy *e, uint64_t at, uint32_t bytes, uint32_t imm) {
  struct hfr_ib_sge sge = {(uintptr_t)e->memory, bytes, e->mr->lkey};
  struct hfr_ib_send_wr wr = {.opcode = HFR_IB_WR_RDMA_WRITE_WITH_IMM,
                              .send_flags = HFR_IB_SEND_SIGNALED,
                              .sg_list = &sge,
                              .num_sge = bytes ? 1 : 0,
                              .imm_data = htonl(imm),
                              .remote_addr = at,
                              .rkey = e->theirs.rkey},
                        *bad;
  struct hfr_ib_wc wc;
  int64_t limit = hfr_now_ns() + 2000000000ll;
  e->status = -1;
  if (e->qp->context->post_send(e->qp, &wr, &bad)) return;
  while (e->status < 0 && hfr_now_ns() < limit) {
    if (e->cq->context->poll_cq(e->cq, 1, &wc) != 1) continue;
    if (wc.status || wc.opcode != HFR_IB_WC_RECV_RDMA_WITH_IMM) e->status = wc.status;
  }
}

/* Put a message into the enemy's memory. */
static void compose(struct enemy *e, uint32_t magic, uint64_t bytes) {
  struct hfr_msg_header h = {.magic = magic, .bytes = bytes};
  memcpy(e->memory, &h, sizeof h);
}
static uint64_t slot(const struct enemy *e, int i) { return e->theirs.address + (uint64_t)i * e->theirs.slot_bytes; }

/* A message from the link to the enemy. */
static void let_it_send(size_t bytes) {
  static uint8_t payload[CHUNK];
  struct hfr_msg_header h = {.magic = HFR_MSG_MAGIC, .bytes = bytes};
  for (int r = HFR_LINK_AGAIN, i = 0; r == HFR_LINK_AGAIN && i < 1000; i++) r = l->transport->post_send(l, &h, payload);
}

/* ---------------------------------------------------------------- cases */

typedef void (*attack)(struct enemy *e);

/* At the handshake. */
static void wrong_magic(struct enemy *e) { e->mine.magic ^= 1; }
static void other_version(struct enemy *e) { e->mine.version++; }
static void no_depth(struct enemy *e) { e->mine.depth = 0; }
static void great_depth(struct enemy *e) { e->mine.depth = 0x80000008u; }
static void no_qps(struct enemy *e) { e->mine.nqps = 0; }
static void many_qps(struct enemy *e) { e->mine.nqps = HFR_VERBS_QPS + 1; }
static void negative_qps(struct enemy *e) { e->mine.nqps = 0xffffffffu; }
static void small_slots(struct enemy *e) { e->mine.slot_bytes = 64; }
static void great_slots(struct enemy *e) { e->mine.slot_bytes = UINT64_MAX - 63; }
static void no_mtu(struct enemy *e) { e->mine.mtu = 0; }
static void great_mtu(struct enemy *e) { e->mine.mtu = 255; }
static void other_layer(struct enemy *e) { e->mine.link_layer = 77; }
static void bad_qpn(struct enemy *e) { e->mine.qpn[0] = 0xfffffffeu; }
static void all_ones(struct enemy *e) { memset(&e->mine, 0xff, sizeof e->mine); }
static void rude_name(struct enemy *e) {
  e->mine.depth = 1;
  memset(e->mine.port, '\033', sizeof e->mine.port);
  memcpy(e->mine.port, "x\nrank 7: all is well\r", 22);
}

/* Over queue pairs. */
static void wrong_number(struct enemy *e) { compose(e, HFR_MSG_MAGIC, 8), strike(e, slot(e, 0), 72, 5); }
static void twice(struct enemy *e) {
  compose(e, HFR_MSG_MAGIC, 8);
  strike(e, slot(e, 0), 72, 0);
  strike(e, slot(e, 0), 72, 0);
}
static void unsent_credit(struct enemy *e) { strike(e, slot(e, 0), 0, CREDIT | 3u << 16); }
static void negative_credit(struct enemy *e) { strike(e, slot(e, 0), 0, CREDIT | 0x4000u << 16); }
static void no_bytes(struct enemy *e) { strike(e, slot(e, 0), 0, 0); }
static void half_a_header(struct enemy *e) { compose(e, HFR_MSG_MAGIC, 0), strike(e, slot(e, 0), HFR_VERBS_HEADER - 1, 0); }
static void beyond_slot(struct enemy *e) {
  compose(e, HFR_MSG_MAGIC, e->theirs.slot_bytes + 1 - HFR_VERBS_HEADER);
  strike(e, slot(e, 0), (uint32_t)e->theirs.slot_bytes + 1, 0);
}
static void bad_magic(struct enemy *e) { compose(e, 0xdeadbeef, 8), strike(e, slot(e, 0), 72, 0); }
static void other_length(struct enemy *e) { compose(e, HFR_MSG_MAGIC, 9), strike(e, slot(e, 0), 72, 0); }
static void huge_length(struct enemy *e) { compose(e, HFR_MSG_MAGIC, UINT64_MAX - 55), strike(e, slot(e, 0), 72, 0); }
static void no_credit(struct enemy *e) {
  compose(e, HFR_MSG_MAGIC, 8);
  for (unsigned m = 0; m <= e->theirs.depth; m++) strike(e, slot(e, (int)(m % e->theirs.depth)), 72, m);
}
static void be_refused(struct enemy *e, uint64_t at) {
  strike(e, at, 64, 0);
  CHECK(e->status == HFR_IB_WC_REM_ACCESS_ERR, "status %d", e->status);
}
static void before_memory(struct enemy *e) { be_refused(e, slot(e, 0) - 64); }
static void after_memory(struct enemy *e) { be_refused(e, slot(e, 2 * (int)e->theirs.depth)); }
static void across_the_end(struct enemy *e) { be_refused(e, slot(e, 2 * (int)e->theirs.depth) - 32); }
static void wrong_key(struct enemy *e) { e->theirs.rkey ^= 0x100, be_refused(e, slot(e, 0)); }
static void goes(struct enemy *e) {
  e->ib->destroy_qp(e->qp);
  e->qp = NULL;
  let_it_send(8000);
}
static void breaks(struct enemy *e) {
  struct hfr_ib_qp_attr attr = {.qp_state = HFR_IB_QPS_ERR};
  e->ib->modify_qp(e->qp, &attr, HFR_IB_QP_STATE);
  let_it_send(8);
}
static void hangs_up(struct enemy *e) { close(e->fd), e->fd = -1; }
static void garbage(struct enemy *e) { give(e, "hello?", 6); }
static void sends_to_nobody(struct enemy *e) { (void)e, let_it_send(8000); }
static void sends_little_to_nobody(struct enemy *e) { (void)e, let_it_send(8); }

static const struct {
  const char *name;
  attack attack;
  int code;
  const char *text;
} hellos[] =
    {
        {"wrong magic", wrong_magic, hfreduceRemoteError, "does not speak version"},
        {"other version", other_version, hfreduceRemoteError, "install one version everywhere"},
        {"no depth", no_depth, hfreduceRemoteError, "0 slots of"},
        {"absurd depth", great_depth, hfreduceRemoteError, "2147483656 slots of"},
        {"no queue pairs", no_qps, hfreduceRemoteError, " 0 queue pairs"},
        {"one queue pair too many", many_qps, hfreduceRemoteError, " 17 queue pairs"},
        {"negative queue pairs", negative_qps, hfreduceRemoteError, "4294967295 queue pairs"},
        {"small slots", small_slots, hfreduceRemoteError, "slots of 64 bytes"},
        {"absurd slots", great_slots, hfreduceRemoteError, "does not fit"},
        {"no MTU", no_mtu, hfreduceRemoteError, "MTU code 0"},
        {"absurd MTU", great_mtu, hfreduceRemoteError, "MTU code 255"},
        {"other link layer", other_layer, hfreduceRemoteError, "link layer 77"},
        {"impossible queue pair number", bad_qpn, 0, "connect a queue pair"},
        {"all ones", all_ones, hfreduceRemoteError, "does not speak version"},
        {"control characters in a name", rude_name, hfreduceRemoteError, "does not fit"},
},
  strikes[] = {
      {"wrong message number", wrong_number, hfreduceRemoteError, "protocol"},
      {"a message twice", twice, hfreduceRemoteError, "protocol"},
      {"credit for what was not sent", unsent_credit, hfreduceRemoteError, "protocol"},
      {"credit of half the range", negative_credit, hfreduceRemoteError, "protocol"},
      {"no bytes", no_bytes, hfreduceRemoteError, "protocol"},
      {"half a header", half_a_header, hfreduceRemoteError, "protocol"},
      {"a message beyond its slot", beyond_slot, hfreduceRemoteError, "protocol"},
      {"wrong magic in a header", bad_magic, hfreduceCorrupt, "broken header"},
      {"another length in a header", other_length, hfreduceCorrupt, "broken header"},
      {"absurd length in a header", huge_length, hfreduceCorrupt, "broken header"},
      {"more messages than slots", no_credit, hfreduceRemoteError, "protocol"},
      {"a write before the memory", before_memory, hfreduceRemoteError, "RDMA"},
      {"a write after the memory", after_memory, hfreduceRemoteError, "RDMA"},
      {"a write across the end", across_the_end, hfreduceRemoteError, "RDMA"},
      {"a write with a wrong key", wrong_key, hfreduceRemoteError, "RDMA"},
      {"queue pair gone", goes, hfreduceRemoteError, "status 12"},
      {"queue pair in error", breaks, hfreduceRemoteError, "status 12"},
      {"connection closed", hangs_up, hfreduceRemoteError, "closed by the peer"},
      {"garbage after ready", garbage, hfreduceRemoteError, ""},
};

static const char *word = "";

/* How it ended: the right error about rank 0, with clean text. */
static void judge(const char *name, int code, const char *text, int64_t began) {
  int r = until_settled(LATE);
  const hfreduceErrorInfo_t *why = hfr_last_error();
  double seconds = (double)(hfr_now_ns() - began) * 1e-9;
  printf("%-30s %6.3f s  error %d: %.300s\n", name, seconds, r == HFR_LINK_FAILED ? why->code : 0, why->text);
  CHECK(r == HFR_LINK_FAILED, "%s: %d after %.3f s", name, r, seconds);
  CHECK(r != HFR_LINK_FAILED || ((!code || why->code == code) && why->peer == 0 && strstr(why->text, text)),
        "%s: error %d, peer %d: %s", name, why->code, why->peer, why->text);
  for (const char *p = why->text; *p; p++)
    if (!CHECK((unsigned char)*p >= ' ', "%s: a control character in the message", name)) break;
}

static void test_hellos(void) {
  for (size_t i = 0; i < sizeof hellos / sizeof *hellos; i++) {
    struct enemy e;
    if (!strstr(hellos[i].name, word)) continue;
    open_ends(&e);
    prepare(&e);
    hellos[i].attack(&e);
    int64_t began = hfr_now_ns();
    give(&e, &e.mine, sizeof e.mine);
    judge(hellos[i].name, hellos[i].code, hellos[i].text, began);
    close_ends(&e);
  }
}

/* Hellos that end too early, and one that comes byte by byte. */
static void test_slow(void) {
  static const size_t parts[] = {0, 1, sizeof(struct hfr_verbs_hello) / 2, sizeof(struct hfr_verbs_hello) - 1,
                                 sizeof(struct hfr_verbs_hello)};
  struct enemy e;
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
    if (!strstr("truncated hello", word)) continue;
    open_ends(&e);
    prepare(&e);
    int64_t began = hfr_now_ns();
    give(&e, &e.mine, parts[i]);
    for (int k = 0; k < 20; k++) CHECK(look() == HFR_LINK_AGAIN, "it waits for more than %zu bytes", parts[i]);
    hangs_up(&e);
    judge("truncated hello", hfreduceRemoteError, "receiving failed", began);
    close_ends(&e);
  }
  if (!strstr("slow hello", word)) return;
  open_ends(&e);
  prepare(&e);
  connect_enemy(&e);
  post_receives(&e, 8);
  for (size_t i = 0; i < sizeof e.mine; i++) {
    give(&e, (uint8_t *)&e.mine + i, 1);
    CHECK(look() == HFR_LINK_AGAIN);
  }
  uint8_t answer;
  CHECK(!take(&e, &answer, 1));
  give(&e, "\1", 1);
  compose(&e, HFR_MSG_MAGIC, 8);
  for (int i = 0; i < 100 && v->phase != HFR_VERBS_UP; i++) look();
  strike(&e, slot(&e, 0), 72, 0);
  CHECK(until_settled(LATE) == HFR_LINK_OK && header->bytes == 8 && e.status == 0, "a slow peer is a good one");
  if (v->phase == HFR_VERBS_UP) l->transport->release(l);
  close_ends(&e);
}

static void test_strikes(void) {
  for (size_t i = 0; i < sizeof strikes / sizeof *strikes; i++) {
    struct enemy e;
    if (!strstr(strikes[i].name, word)) continue;
    open_ends(&e);
    prepare(&e);
    be_nice(&e, 32);
    int64_t began = hfr_now_ns();
    strikes[i].attack(&e);
    for (int r; (r = until_settled(0.2)) == HFR_LINK_OK;) { /* what was right before it is good */
      CHECK(header->bytes == 8);
      l->transport->release(l);
    }
    judge(strikes[i].name, strikes[i].code, strikes[i].text, began);
    close_ends(&e);
  }
}

/* Keys and receives that the link was promised, and that are not there. */
static void test_promises(void) {
  static const struct {
    const char *name;
    uint32_t key;
    uint64_t address;
    int receives;
    attack attack;
    const char *text;
  } cases[] = {
      {"a wrong key promised", 0x100, 0, 32, sends_to_nobody, "(status 10"},
      {"a wrong address promised", 0, 1ull << 40, 32, sends_to_nobody, "(status 10"},
      {"an absurd address promised", 0, 0 - (1ull << 20), 32, sends_to_nobody, "(status 10"},
      {"no receives posted", 0, 0, 0, sends_to_nobody, "(status 13"},
      {"no receives posted, inline", 0, 0, 0, sends_little_to_nobody, "(status 13"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct enemy e;
    if (!strstr(cases[i].name, word)) continue;
    open_ends(&e);
    prepare(&e);
    e.mine.rkey ^= cases[i].key;
    e.mine.address += cases[i].address;
    be_nice(&e, cases[i].receives);
    int64_t began = hfr_now_ns();
    cases[i].attack(&e);
    judge(cases[i].name, hfreduceRemoteError, cases[i].text, began);
    close_ends(&e);
  }
}

int main(int argc, char **argv) {
  struct hfr_ib_port port;
  if (argc > 1) word = argv[1];
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (hfr_ib_choose(0, &port)) return printf("no RDMA port to play a peer on: %s\n", hfr_last_error()->text), 77;
  setenv("HFREDUCE_IB_FAILOVER", "0", 1); /* what would be a reason to meet again over another port is the end */
  setenv("HFREDUCE_IB_TIMEOUT", "13", 1); /* 34 ms */
  setenv("HFREDUCE_IB_RETRY_CNT", "3", 1);
  hfr_param_reload();
  if (hfr_arena_create(&arena, 1, CHUNK, 4, 0) || hfr_arena_join(&arena, 0))
    return fprintf(stderr, "%s\n", hfr_last_error()->text), 1;
  test_hellos();
  test_slow();
  test_strikes();
  test_promises();
  hfr_arena_close(&arena);
  return check_done();
}
