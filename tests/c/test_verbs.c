/* The verbs transport: its rules, what it says of this machine and, where there is a device, links over it. */
#include "check.h"
#include "ranks.h"

#include "base/param.h"
#include "base/thread.h"
#include "transport/transport.h"
#include "transport/verbs_lib.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

static void test_match(void) {
  static const struct {
    const char *rule, *device;
    int port, match;
  } cases[] = {
      {"", "mlx5_0", 1, 1},          {"mlx5", "mlx5_0", 1, 1},         {"mlx5_0", "mlx5_01", 1, 1},
      {"=mlx5_0", "mlx5_01", 1, 0},  {"=mlx5_0", "mlx5_0", 2, 1},      {"mlx5_0:2", "mlx5_0", 1, 0},
      {"mlx5_0:2", "mlx5_0", 2, 1},  {"rxe,mlx5", "mlx5_1", 1, 1},     {"rxe,mlx4", "mlx5_1", 1, 0},
      {"^mlx5", "mlx5_1", 1, 0},     {"^mlx5", "rxe0", 1, 1},          {"^mlx5_0:1", "mlx5_0", 2, 1},
      {"^mlx5_0:1", "mlx5_0", 1, 0}, {"^=mlx5_1", "mlx5_10", 1, 1},    {"^=mlx5_1", "mlx5_1", 1, 0},
      {"^", "rxe0", 1, 1},           {"=rxe0:1,rxe1:1", "rxe1", 1, 1}, {",,", "rxe0", 1, 0},
      {"rxe0:", "rxe0", 1, 0},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    CHECK(hfr_ib_match(cases[i].rule, cases[i].device, cases[i].port) == cases[i].match, "rule \"%s\", %s:%d", cases[i].rule,
          cases[i].device, cases[i].port);
}

/* What the ranks agree on is in every rank's offer, in the order of the first. */
static void test_meet(void) {
  static const struct {
    uint8_t first[HFR_TRANSPORTS_MAX], other[HFR_TRANSPORTS_MAX], met[HFR_TRANSPORTS_MAX];
  } cases[] = {{{1, 2}, {1, 2}, {1, 2}}, {{1, 2}, {2, 1}, {1, 2}}, {{2, 1}, {1, 2}, {2, 1}},
               {{1, 2}, {2}, {2}},       {{1, 2}, {1}, {1}},       {{1}, {2}, {0}},
               {{2}, {1, 2}, {2}},       {{1, 2}, {0}, {0}},       {{0}, {1, 2}, {0}}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    uint8_t common[HFR_TRANSPORTS_MAX];
    char got[64], want[64];
    memcpy(common, cases[i].first, sizeof common);
    hfr_transport_meet(common, cases[i].other);
    hfr_transport_list(common, got);
    hfr_transport_list(cases[i].met, want);
    CHECK(!memcmp(common, cases[i].met, sizeof common), "case %zu: %s, not %s", i, got, want);
  }
}

static void test_params(void) {
  setenv("NCCL_IB_HCA", "^mlx5_3", 1);
  setenv("NCCL_IB_GID_INDEX", "3", 1);
  setenv("NCCL_IB_QPS_PER_CONNECTION", "4", 1);
  setenv("HFREDUCE_IB_TC", "300", 1);
  hfr_param_reload();
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_IB_HCA), "^mlx5_3"));
  CHECK(hfr_param_int(HFR_PARAM_IB_GID_INDEX) == 3 && hfr_param_int(HFR_PARAM_IB_QPS_PER_CONNECTION) == 4);
  CHECK(hfr_param_int(HFR_PARAM_IB_TC) == 255, "bounded");
  unsetenv("NCCL_IB_HCA");
  unsetenv("NCCL_IB_GID_INDEX");
  unsetenv("NCCL_IB_QPS_PER_CONNECTION");
  unsetenv("HFREDUCE_IB_TC");
  hfr_param_reload();
}

/* Whatever this machine has, there is a line for each port or a reason, and a choice or an error. */
static void test_describe(void) {
  char text[4096], little[10];
  struct hfr_ib_port port;
  size_t n = hfr_transport_describe(text, sizeof text);
  CHECK(n == strlen(text) && !strncmp(text, "transport verbs: ", 17) && text[n - 1] == '\n', "%s", text);
  CHECK(hfr_transport_describe(little, sizeof little) == 9 && !strncmp(little, text, 9));
  CHECK(hfr_transport_describe(little, 0) == 0);
  hfr_error_clear(hfr_last_error());
  CHECK(hfr_ib_choose(0, &port) ? *hfr_last_error()->text != 0 : port.context != NULL, "%s", hfr_last_error()->text);
}

#define COUNT 300000

/* Sums over verbs, large and small, so often that slots, credits and 15-bit counts come round. */
static int sums(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfr_param_reload(); /* main() has read them before this rank's label was set */
  hfreduceComm_t comm;
  hfreduceCommInfo_t info;
  int wrong = 0;
  int small = *(int *)arg;
  float *x = malloc(COUNT * sizeof *x), one = 1;
  if (hfreduceCommInitRank(&comm, n, *id, rank)) return fprintf(stderr, "init: %s\n", hfreduceGetLastError(NULL)), 1;
  hfreduceCommGetInfo(comm, &info);
  wrong += !strstr(info.transports, "verbs");
  for (int k = 0; k < 3; k++) {
    for (int i = 0; i < COUNT; i++) x[i] = (float)(rank + i % 7 + k);
    wrong += hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, NULL) != hfreduceSuccess;
    for (int i = 0; i < COUNT; i++) wrong += x[i] != (float)(n * (n - 1) / 2 + n * (i % 7 + k));
  }
  for (int k = 0; k < small && !wrong; k++) {
    float y = 0;
    wrong += hfreduceAllReduce(&one, &y, 1, hfreduceFloat32, hfreduceSum, comm, NULL) != hfreduceSuccess || y != (float)n;
  }
  if (wrong) fprintf(stderr, "rank %d: %d wrong; %s; %s\n", rank, wrong, info.transports, hfreduceGetLastError(comm));
  hfreduceCommDestroy(comm);
  free(x);
  return wrong;
}

/* Each rank on a port of its own, so that what it sends crosses the network. */
static int apart(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  struct hfr_ib_port ports[HFR_IB_PORTS_MAX];
  const char *why;
  char rule[100];
  int count = hfr_ib_ports(ports, HFR_IB_PORTS_MAX, &why);
  snprintf(rule, sizeof rule, "=%s", ports[rank % count].name);
  setenv("HFREDUCE_IB_HCA", rule, 1);
  return sums(rank, n, id, arg);
}

/* The last rank dies between two operations: the others hear it within a second, though the device sends again for longer. */
static int death(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfr_param_reload();
  hfreduceComm_t comm;
  float *x = calloc(COUNT, sizeof *x);
  hfreduceErrorInfo_t why;
  (void)arg;
  if (hfreduceCommInitRank(&comm, n, *id, rank)) return 1;
  if (hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, NULL)) return 1;
  int64_t began = hfr_now_ns();
  if (rank == n - 1) {
    usleep(100000); /* the others end the first one: what a dead process had posted is lost */
    kill(getpid(), SIGKILL);
  }
  hfreduceResult_t r = hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceSum, comm, NULL);
  double seconds = (double)(hfr_now_ns() - began) * 1e-9;
  hfreduceGetErrorInfo(comm, &why);
  fprintf(stderr, "rank %d after %.3f s: %s\n", rank, seconds, why.text);
  hfreduceCommDestroy(comm);
  free(x);
  return r != hfreduceRemoteError || why.peer != n - 1 || seconds > 1;
}

static int refused(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfr_param_reload();
  hfreduceComm_t comm;
  hfreduceResult_t r = hfreduceCommInitRank(&comm, n, *id, rank);
  const char *text = hfreduceGetLastError(NULL);
  if (r == hfreduceInvalidUsage && strstr(text, (const char *)arg)) return 0;
  fprintf(stderr, "rank %d: %d: %s\n", rank, (int)r, text);
  return 1;
}

/* With a device: this process has opened it already, and so shows that a fork does not inherit it. */
static void test_links(int quick) {
  int few = 100, many = quick ? 2000 : 40000, none = 0;
  setenv("HFREDUCE_TRANSPORT", "verbs", 1);
  CHECK(run_processes("1,1", sums, &many, 100) == 0);
  CHECK(run_processes("1,2,1", sums, &few, 100) == 0);
  CHECK(run_processes("1,1,1", apart, &few, 100) == 0);
  setenv("HFREDUCE_IB_QPS_PER_CONNECTION", "3", 1);
  CHECK(run_processes("1,1", apart, &few, 100) == 0, "three queue pairs");
  CHECK(run_processes("1,1", sums, &few, 100) == 0, "three queue pairs");
  unsetenv("HFREDUCE_IB_QPS_PER_CONNECTION");
  setenv("HFREDUCE_CHUNK", "2M", 1);
  CHECK(run_processes("1,1", sums, &few, 100) == 0, "four slots");
  unsetenv("HFREDUCE_CHUNK");
  setenv("HFREDUCE_IB_MTU", "512", 1);
  CHECK(run_processes("1,1", sums, &none, 100) == 0, "small packets");
  unsetenv("HFREDUCE_IB_MTU");
  CHECK(run_processes("1,1", death, NULL, 30) == 1, "only the dead rank failed");
  CHECK(run_processes("1,1,1", death, NULL, 30) == 1, "only the dead rank failed");
  setenv("HFREDUCE_IB_HCA", "=nosuch:1", 1);
  CHECK(run_processes("1,1", refused, "leaves it out", 30) == 0);
  unsetenv("HFREDUCE_IB_HCA");
  setenv("HFREDUCE_IB_GID_INDEX", "77", 1);
  CHECK(run_processes("1,1", refused, "its GIDs: 0 ", 30) == 0);
  unsetenv("HFREDUCE_IB_GID_INDEX");
  unsetenv("HFREDUCE_TRANSPORT");
}

/* A list of names falls back to what there is; a name that is not there is an error. */
static int falls_back(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfr_param_reload();
  hfreduceComm_t comm;
  hfreduceCommInfo_t info;
  float x = 1, y = 0;
  (void)arg;
  if (hfreduceCommInitRank(&comm, n, *id, rank)) return 1;
  hfreduceCommGetInfo(comm, &info);
  int wrong =
      strcmp(info.transports, "tcp") || hfreduceAllReduce(&x, &y, 1, hfreduceFloat32, hfreduceSum, comm, NULL) || y != (float)n;
  hfreduceCommDestroy(comm);
  return wrong;
}

/* Ranks that are alike but for the last, which offers TCP alone: all use that. */
static int last_without(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  setenv("HFREDUCE_TRANSPORT", rank == n - 1 ? "tcp" : "verbs,tcp", 1);
  return falls_back(rank, n, id, arg);
}

static void test_choice(int have) {
  setenv("HFREDUCE_TRANSPORT", have ? "tcp,verbs" : "verbs,tcp", 1);
  CHECK(run_processes("1,1", falls_back, NULL, 30) == 0);
  CHECK(run_processes("1,1,1", last_without, NULL, 30) == 0);
  setenv("HFREDUCE_TRANSPORT", "pigeon", 1);
  CHECK(run_processes("1,1", refused, "between nodes there are: verbs, tcp", 30) == 0);
  setenv("HFREDUCE_TRANSPORT", "verbs", 1);
  if (!have) CHECK(run_processes("1,1", refused, "can use none between nodes (verbs: ", 30) == 0);
  unsetenv("HFREDUCE_TRANSPORT");
}

int main(int argc, char **argv) {
  struct hfr_ib_port port;
  test_match();
  test_meet();
  test_params();
  test_describe();
  int have = !hfr_ib_choose(0, &port);
  test_choice(have);
  if (have)
    test_links(argc > 1 && !strcmp(argv[1], "--quick"));
  else
    printf("no links were made over RDMA: none of its ports can be used here\n");
  return check_done();
}
