/*
 * Faults of RDMA devices, made by the fake libibverbs (fake/): each ends in a typed error on every rank, in time, and leaves
 * nothing behind (the fake looks when a process ends). With failover the same faults of a port are survived. And what is odd but
 * right.
 *
 * verbs_faults [--quick] [WORD]: only cases whose name has WORD in it.
 */
#include "check.h"
#include "ranks.h"

#include "base/param.h"
#include "base/thread.h"
#include "transport/verbs_lib.h"

#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define COUNT 100000
#define ROUNDS 300
#define LATE 5.0 /* seconds: far from the deadline of 30 s and the heartbeat's 8 s */

static struct fault {
  const char *name, *script, *text; /* of FAKE_VERBS; in the error of the rank that has the fault */
  enum { LINK, START, BOTH } where; /* START: there is no communicator; BOTH: either end may notice first */
} now;

static const char *transports(const hfreduceComm_t comm) {
  static hfreduceCommInfo_t info;
  hfreduceCommGetInfo(comm, &info);
  return info.transports;
}

/* Sums, small and large, until one fails or all are done; every value is checked. */
static hfreduceResult_t sums(hfreduceComm_t comm, int rank, int n, int rounds, int *wrong) {
  hfreduceResult_t r = hfreduceSuccess;
  float *x = malloc(COUNT * sizeof *x);
  for (int k = 0; k < rounds && !r; k++) {
    size_t count = k % 3 ? 1 : COUNT;
    for (size_t i = 0; i < count; i++) x[i] = (float)(rank + (int)(i % 7) + k);
    r = hfreduceAllReduce(x, x, count, hfreduceFloat32, hfreduceSum, comm, NULL);
    for (size_t i = 0; i < count && !r; i++) *wrong += x[i] != (float)(n * (n - 1) / 2 + n * ((int)(i % 7) + k));
  }
  free(x);
  return r;
}

/* The fault is the last rank's. */
static int fails(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct fault *f = arg;
  int mine = rank == n - 1, wrong = 0;
  hfreduceComm_t comm;
  hfreduceErrorInfo_t why = {0};
  if (mine) setenv("FAKE_VERBS", f->script, 1);
  hfr_param_reload();
  int64_t began = hfr_now_ns();
  hfreduceResult_t r = hfreduceCommInitRank(&comm, n, *id, rank);
  if (f->where == START) {
    const char *text = hfreduceGetLastError(NULL);
    wrong += r != hfreduceInvalidUsage || (mine && !strstr(text, f->text));
    if (wrong) fprintf(stderr, "%s: rank %d: error %d: %s\n", f->name, rank, (int)r, text);
    return wrong;
  }
  if (r) return fprintf(stderr, "%s: rank %d: %s\n", f->name, rank, hfreduceGetLastError(NULL)), 1;
  r = sums(comm, rank, n, ROUNDS, &wrong);
  double seconds = (double)(hfr_now_ns() - began) * 1e-9;
  hfreduceGetErrorInfo(comm, &why);
  wrong += !strstr(transports(comm), "verbs") || seconds > LATE;
  wrong += r != hfreduceRemoteError && r != hfreduceSystemError; /* trouble of one's own making, or with the peer */
  wrong += why.peer < 0 || why.peer >= n || (f->where == LINK && why.peer == n - 1);
  if (mine || f->where == LINK) wrong += !strstr(why.text, f->text) || !strstr(why.text, "fake0:1"); /* the others are told */
  if (wrong || getenv("VERBOSE"))
    fprintf(stderr, "%s: rank %d after %.3f s: error %d, peer %d, %d wrong: %s\n", f->name, rank, seconds, (int)r, why.peer,
            wrong, why.text);
  hfreduceCommDestroy(comm);
  return wrong;
}

/* The last rank's port fails, and all goes on over the other one. */
static int moves(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct fault *f = arg;
  int wrong = 0;
  hfreduceComm_t comm;
  setenv("FAKE_VERBS", rank == n - 1 ? f->script : f->text, 1);
  setenv("HFREDUCE_DEBUG", "NONE", 1); /* no warnings */
  hfr_param_reload();
  hfreduceResult_t r = hfreduceCommInitRank(&comm, n, *id, rank);
  if (r) return fprintf(stderr, "%s: rank %d: %s\n", f->name, rank, hfreduceGetLastError(NULL)), 1;
  r = sums(comm, rank, n, ROUNDS, &wrong);
  int moved = strstr(hfreduceGetLastError(NULL), "fake0:1") != NULL; /* this thread has met the trouble, and got over it */
  wrong += r != hfreduceSuccess || (rank == n - 1 && !moved);
  if (wrong)
    fprintf(stderr, "%s: rank %d: error %d, %s, %d wrong: %s\n", f->name, rank, (int)r, moved ? "moved" : "nothing happened",
            wrong, hfreduceGetLastError(comm));
  if (*f->text) usleep(100000); /* longer than the other end may be told late: that this one has closed is told at once */
  hfreduceCommDestroy(comm);
  return wrong;
}

/* The last rank's port goes and comes back, and there is no other: that costs the time, and nothing else. */
static int flaps(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct fault *f = arg;
  int wrong = 0;
  hfreduceComm_t comm;
  if (rank == n - 1) setenv("FAKE_VERBS", f->script, 1);
  hfr_param_reload();
  hfreduceResult_t r = hfreduceCommInitRank(&comm, n, *id, rank);
  if (r) return fprintf(stderr, "%s: rank %d: %s\n", f->name, rank, hfreduceGetLastError(NULL)), 1;
  int64_t began = hfr_now_ns();
  r = sums(comm, rank, n, ROUNDS, &wrong);
  double seconds = (double)(hfr_now_ns() - began) * 1e-9;
  wrong += r != hfreduceSuccess || seconds < 2; /* the port was down meanwhile */
  if (wrong)
    fprintf(stderr, "%s: rank %d after %.1f s: error %d: %s\n", f->name, rank, seconds, (int)r, hfreduceGetLastError(comm));
  hfreduceCommDestroy(comm);
  return wrong;
}

/* Odd, but right: all ranks have it. */
static int works(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct fault *f = arg;
  int wrong = 0;
  hfreduceComm_t comm;
  setenv("FAKE_VERBS", f->script, 1);
  hfr_param_reload();
  hfreduceResult_t r = hfreduceCommInitRank(&comm, n, *id, rank);
  if (r) return fprintf(stderr, "%s: rank %d: %s\n", f->name, rank, hfreduceGetLastError(NULL)), 1;
  r = sums(comm, rank, n, ROUNDS / 3, &wrong);
  wrong += r != hfreduceSuccess || !strstr(transports(comm), "verbs");
  if (wrong) fprintf(stderr, "%s: rank %d: error %d, %d wrong: %s\n", f->name, rank, (int)r, wrong, hfreduceGetLastError(comm));
  hfreduceCommDestroy(comm);
  return wrong;
}

/* What cannot carry RDMA is no error where TCP may do its work: all ranks fall back, and say why. */
static int falls_back(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct fault *f = arg;
  int wrong = 0;
  hfreduceComm_t comm;
  if (rank == n - 1) setenv("FAKE_VERBS", f->script, 1);
  setenv("HFREDUCE_TRANSPORT", "verbs,tcp", 1);
  hfr_param_reload();
  hfreduceResult_t r = hfreduceCommInitRank(&comm, n, *id, rank);
  if (r) return fprintf(stderr, "%s: rank %d: %s\n", f->name, rank, hfreduceGetLastError(NULL)), 1;
  r = sums(comm, rank, n, 5, &wrong);
  wrong += r != hfreduceSuccess || strcmp(transports(comm), "tcp") != 0;
  if (wrong)
    fprintf(stderr, "%s: rank %d: error %d, %s: %s\n", f->name, rank, (int)r, transports(comm), hfreduceGetLastError(comm));
  hfreduceCommDestroy(comm);
  return wrong;
}

/* Each rank has one port of its own, so all goes from one to the other. */
static int across(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  setenv("HFREDUCE_IB_HCA", rank % 2 ? "=fake1" : "=fake0", 1);
  return works(rank, n, id, arg);
}

/* Ranks of two nodes, two on each: all of a node's ports are used, also by groups that have one rank on each node. */
static int spreads(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  char script[40];
  hfreduceComm_t world, made;
  hfreduceUniqueId own = {{0}};
  hfreduceConnection_t link;
  int wrong = 0, count = 0;
  (void)arg;
  snprintf(script, sizeof script, "vector=%d", rank % 2);
  setenv("FAKE_VERBS", script, 1);
  hfr_param_reload();
  if (hfreduceCommInitRank(&world, n, *id, rank) || sums(world, rank, n, 5, &wrong)) return 1;
  for (int way = 0; way < 2 && !wrong; way++) { /* split, and made anew */
    if (!way && hfreduceCommSplit(world, rank % 2, rank, &made, NULL)) return 1;
    if (way && rank < 2 && hfreduceGetUniqueId(&own)) return 1;
    for (int root = 0; way && root < 2; root++) {
      hfreduceUniqueId each = own;
      if (hfreduceBroadcast(&each, &each, sizeof each, hfreduceUint8, root, world, NULL)) return 1;
      if (root == rank % 2) own = each;
    }
    if (way && hfreduceCommInitRank(&made, 2, own, rank / 2)) return 1;
    wrong += sums(made, rank / 2, 2, 5, &wrong) != hfreduceSuccess;
    if (hfreduceCommConnectionCount(made, &count) || !count) return 1;
    for (int i = 0; i < count; i++) {
      hfreduceCommGetConnection(made, i, &link);
      if (!strcmp(link.local, rank % 2 ? "fake1:1" : "fake0:1")) continue;
      fprintf(stderr, "rank %d, %s: %s\n", rank, way ? "made anew" : "split", link.local);
      wrong++;
    }
    hfreduceCommDestroy(made);
  }
  hfreduceCommDestroy(world);
  return wrong;
}

static const char *word = "";
static int chosen(const char *name) { return strstr(name, word) != NULL; }

static void run(const char *nodes, rank_function function, const struct fault *f) {
  if (!chosen(f->name)) return;
  now = *f;
  CHECK(run_processes(nodes, function, &now, 60) == 0, "%s, nodes %s", now.name, nodes);
}

/* Every status that a send or a receive can end with; the send is a small or a large one. */
static void test_statuses(int quick) {
  static const int few[] = {HFR_IB_WC_LOC_PROT_ERR, HFR_IB_WC_REM_ACCESS_ERR, HFR_IB_WC_RETRY_EXC_ERR,
                            HFR_IB_WC_RNR_RETRY_EXC_ERR};
  const char *why;
  for (int i = 1; i <= (quick ? 4 : 21); i++) {
    int status = quick ? few[i - 1] : i;
    char name[40], script[40], text[100];
    const struct hfr_ib *ib = hfr_ib_load(&why);
    snprintf(text, sizeof text, "%s (status %d", ib->wc_status_str(status), status);
    snprintf(name, sizeof name, "send status %d", status);
    snprintf(script, sizeof script, "wr=%d:%d", 6 + i % 3, status);
    run(i == 4 ? "1,1,1" : "1,1", fails, &(struct fault){name, script, text, LINK});
    if (i % 4) continue;
    snprintf(name, sizeof name, "receive status %d", status);
    snprintf(script, sizeof script, "recv=%d:%d", 6 + i % 5, status);
    run("1,1", fails, &(struct fault){name, script, text, LINK});
  }
}

/* Each call that makes a link fails in turn. */
static void test_coming_up(void) {
  static const struct fault calls[] = {
      {"no device", "open_device=0:13", "cannot open the device: Permission denied", START},
      {"no protection domain", "alloc_pd=0:12", "cannot open the device: Cannot allocate memory", START},
      {"nothing can be registered", "reg_mr=0:12", "cannot register", START},
      {"no port", "query_port=0:5", "cannot query the port", START},
      {"port down", "down=0 down=1", "the port is down", START},
      {"no slots", "reg_mr=4:12", "cannot register", LINK},
      {"no channel", "create_comp_channel=1:24", "create a completion channel", LINK},
      {"no completion queue", "create_cq=3:12", "create a completion queue", LINK},
      {"no reliable queue pair", "create_qp=0:95", "the device makes no reliable queue pair: Operation not supported", START},
      {"neither InfiniBand nor Ethernet", "layer=0", "its link layer is neither", START},
      {"not INIT", "modify_qp=1:22", "initialize a queue pair", LINK},
      {"not RTR", "modify_qp=2:110", "connect a queue pair", LINK},
      {"not RTS", "modify_qp=3:22", "start a queue pair", LINK},
      {"no receives", "post_recv=1:12", "post receives", LINK},
      {"receives end", "post_recv=40:12", "post receives", LINK},
      {"no first send", "post_send=1:12", "took no send", LINK},
      {"sends end", "post_send=40:12", "took no send", LINK},
  };
  for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) run("1,1", fails, &calls[i]);
}

/* As a service or a container starts programs: 8 MiB may be locked, which is enough for one connection and not for three. */
static int small_limit(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_MEMLOCK, &limit)) return 1;
  limit.rlim_cur = (rlim_t)8 << 20;
  if (limit.rlim_max < limit.rlim_cur || setrlimit(RLIMIT_MEMLOCK, &limit)) return 0; /* it is lower here */
  setenv("FAKE_VERBS", "memlock=1", 1);
  return falls_back(rank, n, id, arg);
}

/* Set an attribute of a device; "" takes it away. */
static void attribute(const char *device, const char *name, const char *value) {
  char path[300];
  snprintf(path, sizeof path, "%.200s/%s/%s", getenv("HFREDUCE_TEST_SYSFS"), device, name);
  if (!*value) {
    unlink(path);
    return;
  }
  FILE *file = fopen(path, "w");
  if (!file) abort();
  fprintf(file, "%s\n", value);
  fclose(file);
}

/* Ports that cannot carry reliable connections: TCP, or another device. */
static void test_unable(void) {
  run("1,1", falls_back, &(struct fault){"unable: datagrams only", "create_qp=0:95", "", LINK});
  run("1,1", falls_back, &(struct fault){"unable: no link layer", "layer=0", "", LINK});
  run("1,1,1,1", small_limit, &(struct fault){"unable: little may be locked", "memlock=1", "", LINK});
  run("1,1", works, &(struct fault){"unable: the first device only", "layer0=0", "", LINK});
  for (int i = 0; i < 2; i++) attribute(i ? "fake1" : "fake0", "node_type", "4: RNIC");
  run("1,1", fails, &(struct fault){"unable: iWARP", "", "no channel adapter of InfiniBand or RoCE (node type 4: RNIC)", START});
  for (int i = 0; i < 2; i++) attribute(i ? "fake1" : "fake0", "node_type", "1: CA");
  run("1,1", works, &(struct fault){"unable: but channel adapters are", "", "", LINK});
  for (int i = 0; i < 2; i++) attribute(i ? "fake1" : "fake0", "node_type", "");
}

/* InfiniBand's ways to name a port. */
static void test_addresses(void) {
  run("1,1", across, &(struct fault){"address: LID", "layer=1", "", LINK});
  run("1,1", across, &(struct fault){"address: the header is required", "layer=1 grh=1", "", LINK});
  run("1,1", across, &(struct fault){"address: two subnets", "layer=1 prefix0=1 prefix1=2", "", LINK});
  setenv("NCCL_IB_GID_INDEX", "3", 1);
  run("1,1", across, &(struct fault){"address: an index meant for RoCE", "layer=1", "", LINK});
  unsetenv("NCCL_IB_GID_INDEX");
}

/* The port or the device goes while in use. */
static void test_events(void) {
  setenv("HFREDUCE_IB_TIMEOUT", "12", 1); /* 17 ms */
  setenv("HFREDUCE_IB_RETRY_CNT", "2", 1);
  run("1,1", fails, &(struct fault){"event: device fatal", "event=20:8", "RDMA from fake0:1", BOTH});
  run("1,1", fails, &(struct fault){"event: port error", "event=20:10", "RDMA from fake0:1", BOTH});
  run("1,1,1", fails, &(struct fault){"event: port error", "event=20:10", "RDMA from fake0:1", BOTH});
  unsetenv("HFREDUCE_IB_TIMEOUT");
  unsetenv("HFREDUCE_IB_RETRY_CNT");
  run("1,1", flaps, &(struct fault){"event: the port is down for 2 s", "event=20:10 flap=2000", "", LINK});
  run("2,1", flaps, &(struct fault){"event: the port is down for 2 s", "event=30:10 flap=2000", "", LINK});
}

/* With failover: at many moments, over one queue pair and several. */
static void test_failover(int quick) {
  static const int statuses[] = {HFR_IB_WC_LOC_QP_OP_ERR, HFR_IB_WC_WR_FLUSH_ERR, HFR_IB_WC_RETRY_EXC_ERR, HFR_IB_WC_FATAL_ERR};
  char name[60], script[40];
  unsetenv("HFREDUCE_IB_FAILOVER");
  for (int i = 0; i < (quick ? 4 : 28); i++) {
    int status = statuses[i % 4], several = i / 4 % 2;
    if (several) setenv("HFREDUCE_IB_QPS_PER_CONNECTION", "3", 1);
    snprintf(name, sizeof name, "failover at %d: status %d%s", 3 + i, status, several ? ", 3 queue pairs" : "");
    snprintf(script, sizeof script, "wr=%d:%d", 3 + i, status);
    run(i % 5 == 4 ? "1,1,1" : i % 5 == 3 ? "2,1" : "1,1", moves, &(struct fault){name, script, "", LINK});
    unsetenv("HFREDUCE_IB_QPS_PER_CONNECTION");
  }
  /* Completions are still on their way when the queue pair fails: what they tell of has come. */
  setenv("HFREDUCE_IB_QPS_PER_CONNECTION", "3", 1);
  for (int i = 0; i < (quick ? 3 : 8); i++) {
    snprintf(name, sizeof name, "failover: told late, %d", i);
    snprintf(script, sizeof script, "delay=20000 seed=%d wr=%d:12", i + 1, 7 + i);
    run("1,1", moves, &(struct fault){name, script, "delay=20000", LINK});
  }
  unsetenv("HFREDUCE_IB_QPS_PER_CONNECTION");
  /* A receive that fails although its sender was told that it arrived: such a message is gone, unless it was copied. */
  run("1,1", fails, &(struct fault){"failover: acknowledged and lost", "recv=9:12", "is lost", BOTH});
  setenv("HFREDUCE_IB_TIMEOUT", "12", 1);
  setenv("HFREDUCE_IB_RETRY_CNT", "2", 1);
  run("1,1", moves, &(struct fault){"failover: device fatal", "event=20:8", "", LINK});
  run("1,1", moves, &(struct fault){"failover: port error", "event=20:10", "", LINK});
  run("1,1,1", moves, &(struct fault){"failover: port error", "event=30:10", "", LINK});
  run("1,1", moves, &(struct fault){"failover: a send is not taken", "post_send=40:12", "", LINK});
  unsetenv("HFREDUCE_IB_TIMEOUT");
  unsetenv("HFREDUCE_IB_RETRY_CNT");
  setenv("HFREDUCE_IB_FAILOVER", "0", 1);
}

/* The last send of an operation fails when the sender has gone on: it has let go of the data, and waits on other links. */
static void test_unwaited(void) {
  char name[40], script[40];
  for (int n = 10; n < 26; n += 6) { /* after sums of one chunk and of several; told at once, or when all sleep */
    snprintf(name, sizeof name, "unwaited send %d", n);
    snprintf(script, sizeof script, "wr=%d:11", n);
    run("1,1", fails, &(struct fault){name, script, "remote operation error", LINK});
    snprintf(name, sizeof name, "unwaited send %d, told late", n);
    snprintf(script, sizeof script, "wr=%d:11 delay=60000 seed=%d", n, n);
    run("1,1", fails, &(struct fault){name, script, "remote operation error", LINK});
  }
}

/* The fake sees what a process leaves behind; else all the above proves less. */
static int leaves(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  int wrong = 0;
  hfreduceComm_t comm;
  (void)arg;
  hfr_param_reload();
  if (hfreduceCommInitRank(&comm, n, *id, rank) || sums(comm, rank, n, 100, &wrong)) return 1;
  return hfreduceBarrier(comm, NULL) != hfreduceSuccess; /* ended well, but for what is left */
}

/* Rank 0 receives from whoever sends; that rank 1 leaves meanwhile, in good order, is nothing to it. */
static int any_source(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  int source = -1, wrong = 0;
  float x[4] = {0};
  (void)arg;
  hfr_param_reload();
  if (hfreduceCommInitRank(&comm, n, *id, rank)) return 1;
  if (rank == 2) usleep(1500000);
  for (int k = 1; k < 3 && !rank; k++) {
    hfreduceResult_t r = hfreduceRecvAny(x, 4, hfreduceFloat32, 5, &source, comm, NULL);
    if (r || source != k || x[3] != (float)k)
      fprintf(stderr, "message %d: error %d, from %d: %s\n", k, (int)r, source, hfreduceGetLastError(comm)), wrong++;
  }
  for (int i = 0; i < 4; i++) x[i] = (float)rank;
  if (rank) wrong += hfreduceSendTag(x, 4, hfreduceFloat32, 0, 5, comm, NULL) != hfreduceSuccess;
  hfreduceCommDestroy(comm);
  return wrong;
}

/* Rank 0 computes, and does not know that its last message is lost with its port. Rank 1 gets it all the same, over the other. */
static int computes(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  float x = (float)rank;
  int wrong = 0;
  (void)arg;
  if (!rank) setenv("FAKE_VERBS", "wr=2:12", 1);
  setenv("HFREDUCE_DEBUG", "NONE", 1); /* no warnings */
  hfr_param_reload();
  if (hfreduceCommInitRank(&comm, n, *id, rank)) return 1;
  int64_t began = hfr_now_ns();
  for (int k = 1; k < 3; k++) {
    if (!rank) x = (float)k;
    hfreduceResult_t r =
        rank ? hfreduceRecv(&x, 1, hfreduceFloat32, 0, comm, NULL) : hfreduceSend(&x, 1, hfreduceFloat32, 1, comm, NULL);
    if (r || x != (float)k)
      fprintf(stderr, "message %d: error %d, %g: %s\n", k, (int)r, (double)x, hfreduceGetLastError(comm)), wrong++;
  }
  double seconds = (double)(hfr_now_ns() - began) * 1e-9;
  if (rank && seconds > 4) fprintf(stderr, "the second message came after %.1f s\n", seconds), wrong++;
  if (!rank) usleep(8000000);
  wrong += hfreduceBarrier(comm, NULL) != hfreduceSuccess;
  hfreduceCommDestroy(comm);
  return wrong;
}

static void test_computing(void) {
  if (!chosen("computes")) return;
  unsetenv("HFREDUCE_IB_FAILOVER");
  CHECK(run_processes("1,1", computes, NULL, 60) == 0);
  setenv("HFREDUCE_IB_FAILOVER", "0", 1);
}

static void test_leaving(void) {
  if (chosen("any source")) CHECK(run_processes("1,1,1", any_source, NULL, 60) == 0);
}

static void test_left(void) {
  if (chosen("left")) CHECK(run_processes("1,1", leaves, NULL, 60) == 2);
}

/* A port that is slower than the other one is left alone while that is up. */
static int fastest(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  hfreduceConnection_t link;
  int wrong = 0, count = 0;
  hfr_param_reload();
  if (hfreduceCommInitRank(&comm, n, *id, rank) || sums(comm, rank, n, 5, &wrong)) return 1;
  hfreduceCommConnectionCount(comm, &count);
  for (int i = 0; i < count; i++) {
    hfreduceCommGetConnection(comm, i, &link);
    if (strcmp(link.transport, "verbs") || !*link.local || !strcmp(link.local, arg)) continue;
    fprintf(stderr, "rank %d: %s to rank %d, not %s\n", rank, link.local, link.peer, (const char *)arg);
    wrong++;
  }
  hfreduceCommDestroy(comm);
  return wrong;
}

static void test_ports(void) {
  if (chosen("ports")) CHECK(run_processes("2,2", spreads, NULL, 60) == 0);
  if (!chosen("rates")) return;
  static char first[] = "fake0:1", second[] = "fake1:1";
  attribute("fake1", "ports/1/rate", "25 Gb/sec (1X EDR)");
  CHECK(run_processes("2,2", fastest, first, 60) == 0);
  attribute("fake1", "ports/1/rate", "400 Gb/sec (4X NDR)");
  CHECK(run_processes("2,2", fastest, second, 60) == 0);
  attribute("fake1", "ports/1/rate", "100 Gb/sec (4X EDR)");
}

static void test_odd(int quick) {
  static const struct fault odd[] = {
      {"nothing inline", "inline=0", "", LINK},
      {"little inline", "inline=64", "", LINK},
      {"inline: no power of two", "inline=101 least=101", "", LINK},
      {"inline: a small message fits", "inline=96 least=96", "", LINK},
      {"InfiniBand", "layer=1", "", LINK},
      {"late completions", "delay=500 seed=7", "", LINK},
      {"the second device", "down=0", "", LINK},
      {"a port that says it is active", "event=5:9", "", LINK},
      {"the arena is not registered", "reg_mr=3:12", "", LINK},
  };
  for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) run("1,2", works, &odd[i]);
  setenv("HFREDUCE_IB_QPS_PER_CONNECTION", "4", 1); /* completions of several queue pairs, in any order */
  for (int seed = 1; seed <= (quick ? 1 : 4); seed++) {
    char script[40];
    snprintf(script, sizeof script, "delay=400 seed=%d", seed);
    run("1,1,1", works, &(struct fault){"late completions in any order", script, "", LINK});
  }
  unsetenv("HFREDUCE_IB_QPS_PER_CONNECTION");
}

int main(int argc, char **argv) {
  int quick = argc > 1 && !strcmp(argv[1], "--quick");
  const char *why;
  if (argc > 1 + quick) word = argv[1 + quick];
  const struct hfr_ib *ib = getenv("HFREDUCE_TEST_SYSFS") ? hfr_ib_load(&why) : NULL;
  if (!ib) return printf("no fake libibverbs; tests/test_verbs_fake.py has one\n"), 77;
  setenv("HFREDUCE_TRANSPORT", "verbs", 1);
  setenv("HFREDUCE_IB_FAILOVER", "0", 1);
  test_left();
  test_leaving();
  test_computing();
  test_coming_up();
  test_unable();
  test_addresses();
  test_statuses(quick);
  test_unwaited();
  test_events();
  test_failover(quick);
  test_odd(quick);
  test_ports();
  return check_done();
}
