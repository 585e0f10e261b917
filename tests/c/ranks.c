/* Ranks as processes or threads. */
#include "ranks.h"

#include <arpa/inet.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Node of each rank; returns how many ranks. */
static int parse_nodes(const char *nodes, int *node_of) {
  int n = 0, node = 0;
  if (strchr(nodes, '.')) {
    for (const char *p = nodes; *p; p++)
      if (*p != '.') node_of[n++] = *p - '0';
    return n;
  }
  for (const char *p = nodes; *p; node++) {
    for (int i = atoi(p); i > 0; i--) node_of[n++] = node;
    p += strcspn(p, ",");
    if (*p) p++;
  }
  return n;
}

int count_ranks(const char *nodes) {
  int node_of[512];
  return parse_nodes(nodes, node_of);
}

/* A port that nobody listens on, from below those that the system gives to outgoing connections: it stays free. */
static int free_port(void) {
  static unsigned tried;
  for (int i = 0; i < 1000; i++) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int port = 10000 + (int)(((unsigned)getpid() * 37 + 7919 * tried++) % 20000);
    a.sin_port = htons((uint16_t)port);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), taken = bind(fd, (struct sockaddr *)&a, sizeof a);
    close(fd);
    if (!taken) return port;
  }
  return perror("port"), 0;
}

static int make_id(hfreduceUniqueId *id, int port) {
  char address[64];
  snprintf(address, sizeof address, "127.0.0.1:%d", port);
  if (!hfreduceUniqueIdFromAddress(id, address, "00112233445566778899aabbccddeeff", 7)) return 0;
  fprintf(stderr, "id: %s\n", hfreduceGetLastError(NULL));
  return -1;
}

int run_processes(const char *nodes, rank_function function, void *arg, int limit_s) {
  int node_of[512], n = parse_nodes(nodes, node_of), failed = 0, left = n, port = free_port();
  pid_t pid[512];
  fflush(NULL);
  for (int r = 0; r < n; r++) {
    pid[r] = fork();
    if (pid[r]) continue;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    char label[32];
    hfreduceUniqueId id;
    snprintf(label, sizeof label, "test-node-%d", node_of[r]);
    setenv("HFREDUCE_HOSTID", label, 1);
    int status = make_id(&id, port) ? 1 : function(r, n, &id, arg) != 0;
    fflush(NULL);
    exit(status);
  }
  time_t start = time(NULL);
  char ended[512] = {0};
  while (left) {
    int status;
    for (int r = 0; r < n; r++) {
      if (ended[r] || waitpid(pid[r], &status, WNOHANG) != pid[r]) continue;
      ended[r] = 1;
      left--;
      if (!status) continue;
      failed++;
      fprintf(stderr, "nodes %s: rank %d ended with %s %d\n", nodes, r, WIFSIGNALED(status) ? "signal" : "status",
              WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    }
    if (time(NULL) - start > limit_s)
      for (int r = 0; r < n; r++)
        if (!ended[r]) fprintf(stderr, "nodes %s: rank %d hung for %d s\n", nodes, r, limit_s), kill(pid[r], SIGKILL);
    struct timespec t = {0, 1000000};
    nanosleep(&t, NULL);
  }
  return failed;
}

struct thread_rank {
  pthread_t thread;
  int rank, nranks, result;
  hfreduceUniqueId id;
  rank_function function;
  void *arg;
};

static void *thread_main(void *arg) {
  struct thread_rank *t = arg;
  t->result = t->function(t->rank, t->nranks, &t->id, t->arg);
  return NULL;
}

int run_threads(int nranks, rank_function function, void *arg, int limit_s) {
  struct thread_rank *t = calloc((size_t)nranks, sizeof *t);
  hfreduceUniqueId id;
  int failed = 0;
  alarm((unsigned)limit_s); /* SIGALRM ends the process: a hang is a failure that CI shows */
  if (hfreduceGetUniqueIdLocal(&id)) return fprintf(stderr, "id: %s\n", hfreduceGetLastError(NULL)), 1;
  for (int r = 0; r < nranks; r++) {
    t[r] = (struct thread_rank){.rank = r, .nranks = nranks, .id = id, .function = function, .arg = arg};
    pthread_create(&t[r].thread, NULL, thread_main, &t[r]);
  }
  for (int r = 0; r < nranks; r++) {
    pthread_join(t[r].thread, NULL);
    if (t[r].result) failed++, fprintf(stderr, "thread rank %d of %d: %d failures\n", r, nranks, t[r].result);
  }
  alarm(0);
  free(t);
  return failed;
}
