/*
 * Ranks that compute sums and pass messages round, checking every value, while something is done to their processes, devices or
 * network from outside. Each says how it ended:
 *
 *     rank 0 (shm,verbs): done after 2.00 s, 310 rounds, 0 wrong
 *     rank 1 (shm,verbs): error 6, peer 2, after 0.31 s, 97 rounds, 0 wrong, closed in 0.02 s: ...the message...
 *     rank 0: no communicator: error 5: ...the message...
 *
 * steady [-s SECONDS] [-t DEADLINE] [-a] NODES [COMMAND]
 *   -a: rank r uses only the r-th port, so that what it sends crosses the network.
 *   COMMAND is run by the shell once all ranks are at work, with their pids in PID0, PID1, ...; "after" counts from its start.
 */
#include "ranks.h"

#include "base/param.h"
#include "base/thread.h"
#include "transport/verbs_lib.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

#define RANKS_MAX 64
#define LARGEST 300000

static struct {
  double seconds, deadline;
  int apart;
} option = {2, 30, 0};

/* Seen by all processes. */
static struct shared {
  _Atomic int pid[RANKS_MAX], at_work;
  _Atomic int64_t began_ns;
} * shared;

static float value(int rank, size_t i, int round) { return (float)((i + (size_t)rank * 5 + (size_t)round) % 11); }

/* One sum and one message round the ring; *stop is set on all ranks alike. */
static hfreduceResult_t one_round(hfreduceComm_t comm, int rank, int n, int round, float *a, float *b, int *wrong, int *stop) {
  static const size_t sizes[] = {1, 40, 5000, 100003, LARGEST};
  size_t count = sizes[round % 5];
  hfreduceResult_t r;
  for (size_t i = 0; i < count; i++) a[i] = value(rank, i, round);
  if ((r = hfreduceAllReduce(a, b, count, hfreduceFloat32, hfreduceSum, comm, NULL))) return r;
  for (size_t i = 0; i < count; i++) {
    float want = 0;
    for (int k = 0; k < n; k++) want += value(k, i, round);
    *wrong += b[i] != want;
  }
  int from = (rank + n - 1) % n;
  hfreduceGroupStart();
  hfreduceSend(a, count, hfreduceFloat32, (rank + 1) % n, comm, NULL);
  hfreduceRecv(b, count, hfreduceFloat32, from, comm, NULL);
  if ((r = hfreduceGroupEnd())) return r;
  for (size_t i = 0; i < count; i++) *wrong += b[i] != value(from, i, round);
  int32_t over = round >= 5 && hfr_now_ns() - shared->began_ns > (int64_t)(option.seconds * 1e9);
  r = hfreduceAllReduce(&over, &over, 1, hfreduceInt32, hfreduceMax, comm, NULL);
  *stop = over;
  return r;
}

static int work(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  hfreduceCommInfo_t info;
  hfreduceErrorInfo_t why;
  hfreduceConfig_t config;
  int rounds = 0, wrong = 0, stop = 0;
  (void)arg;
  if (option.apart) {
    struct hfr_ib_port ports[HFR_IB_PORTS_MAX];
    const char *none;
    char rule[100];
    int count = hfr_ib_ports(ports, HFR_IB_PORTS_MAX, &none);
    if (!count) return fprintf(stderr, "rank %d: %s\n", rank, none), 1;
    snprintf(rule, sizeof rule, "=%s", ports[rank % count].name);
    setenv("HFREDUCE_IB_HCA", rule, 1);
  }
  hfr_param_reload();
  hfreduceConfigInit(&config);
  config.timeout = option.deadline;
  hfreduceResult_t r = hfreduceCommInitRankConfig(&comm, n, *id, rank, &config);
  if (r) return printf("rank %d: no communicator: error %d: %s\n", rank, (int)r, hfreduceGetLastError(NULL)), 1;
  hfreduceCommGetInfo(comm, &info);
  float *a = malloc(LARGEST * sizeof *a), *b = malloc(LARGEST * sizeof *b);
  shared->pid[rank] = getpid();
  for (; !r && !stop; rounds++) {
    r = one_round(comm, rank, n, rounds, a, b, &wrong, &stop);
    if (rounds == 5) shared->at_work++; /* every size has come once: all links are up */
  }
  int64_t now = hfr_now_ns();
  double after = (double)(now - shared->began_ns) * 1e-9;
  hfreduceGetErrorInfo(comm, &why);
  hfreduceCommDestroy(comm);
  if (r)
    printf("rank %d (%s): error %d, peer %d, after %.2f s, %d rounds, %d wrong, closed in %.2f s: %s\n", rank, info.transports,
           (int)r, why.peer, after, rounds, wrong, (double)(hfr_now_ns() - now) * 1e-9, why.text);
  else
    printf("rank %d (%s): done after %.2f s, %d rounds, %d wrong\n", rank, info.transports, after, rounds, wrong);
  free(a);
  free(b);
  return wrong != 0;
}

/* A process of its own waits until all are at work and then runs the command. */
static pid_t start_command(const char *command, int n) {
  pid_t child = fork();
  if (child) return setpgid(child, child), child;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  setpgid(0, 0);
  while (shared->at_work < n) usleep(1000);
  for (int r = 0; r < n; r++) {
    char name[16], pid[16];
    snprintf(name, sizeof name, "PID%d", r);
    snprintf(pid, sizeof pid, "%d", shared->pid[r]);
    setenv(name, pid, 1);
  }
  shared->began_ns = hfr_now_ns();
  execl("/bin/sh", "sh", "-c", command, (char *)NULL);
  _exit(127);
}

int main(int argc, char **argv) {
  int c, status = 0;
  while ((c = getopt(argc, argv, "s:t:a")) != -1) switch (c) {
      case 's': option.seconds = atof(optarg); break;
      case 't': option.deadline = atof(optarg); break;
      case 'a': option.apart = 1; break;
      default: return 2;
    }
  int n = optind < argc ? count_ranks(argv[optind]) : 0;
  if (n < 1 || n > RANKS_MAX) return fprintf(stderr, "which nodes?\n"), 2;
  shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return perror("mmap"), 1;
  shared->began_ns = optind + 1 < argc ? INT64_MAX : hfr_now_ns(); /* with a command: not before it */
  pid_t child = optind + 1 < argc ? start_command(argv[optind + 1], n) : 0;
  int failed = run_processes(argv[optind], work, NULL, (int)option.seconds + 30);
  if (child) {
    kill(-child, SIGTERM); /* it may still wait for ranks that never came */
    waitpid(child, &status, 0);
  }
  return failed != 0;
}
