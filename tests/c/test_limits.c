/* What the system refuses: threads that cannot be started, files that may not grow. Errors say so, and nothing is left behind. */
#include "check.h"
#include "ranks.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define TIMES 100

static _Atomic int *step; /* what the ranks, which are processes, tell each other beside the library */

/* The library's calls come here. */
static _Atomic int refuse;
int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg) {
  int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
  *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
  return refuse ? EAGAIN : real(thread, attr, start, arg);
}

static int open_descriptors(void) {
  int n = 0;
  DIR *dir = opendir("/proc/self/fd");
  while (readdir(dir)) n++;
  closedir(dir);
  return n;
}

static hfreduceResult_t sum(hfreduceComm_t comm, float *x) {
  return hfreduceAllReduce(x, x, 4, hfreduceFloat32, hfreduceSum, comm, NULL);
}

static hfreduceResult_t launch_sum(hfreduceComm_t comm, float *x, hfreduceWork_t *work) {
  hfreduceGroupStart();
  sum(comm, x);
  return hfreduceGroupEndAsync(work);
}

static int told(const char *what) { return strstr(hfreduceGetLastError(NULL), what) != NULL; }

static int poll_work(hfreduceWork_t work, hfreduceResult_t *r) {
  int done = 0;
  for (int i = 0; i < 100000 && !done; i++) {
    *r = hfreduceWorkTest(work, &done);
    if (!done) usleep(200);
  }
  hfreduceWorkDestroy(work);
  return done;
}

/* No progress thread: nothing is launched; calls that are waited for end well, or by their deadline. */
static int no_progress_thread(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  hfreduceWork_t work;
  hfreduceResult_t r = hfreduceSuccess;
  float x[4] = {1, 1, 1, 1};
  (void)arg;
  OK(hfreduceCommInitRank(&comm, nranks, *id, rank));
  refuse = 1;
  int before = open_descriptors();
  for (int i = 0; i < TIMES; i++)
    if (!CHECK(launch_sum(comm, x, &work) == hfreduceSystemError && !work && told("progress thread"), "%s",
               hfreduceGetLastError(NULL)))
      break;
  CHECK(open_descriptors() == before, "%d descriptors, %d before", open_descriptors(), before);
  OK(sum(comm, x));
  CHECK(x[3] == 2);
  /* A call that came back for lack of patience is driven by who looks at it. */
  if (rank) {
    while (*step < 1) usleep(200);
    OK(sum(comm, x));
  } else {
    OK(hfreduceCommSetPatience(comm, 0.02));
    WANT(sum(comm, x) == hfreduceInProgress);
    OK(hfreduceTakeWork(&work));
    *step = 1;
    WANT(poll_work(work, &r) && !r);
    OK(hfreduceCommSetPatience(comm, 0));
  }
  CHECK(x[3] == 4);
  OK(hfreduceBarrier(comm, NULL));
  if (!rank) {
    OK(hfreduceCommSetPatience(comm, 0.02));
    OK(hfreduceCommSetTimeout(comm, 0.3));
    WANT(sum(comm, x) == hfreduceInProgress);
    OK(hfreduceTakeWork(&work));
    WANT(poll_work(work, &r));
    CHECK(r == hfreduceTimeout, "%d: %s", (int)r, hfreduceGetLastError(NULL));
  } else {
    hfreduceResult_t error = hfreduceSuccess;
    while (!error) usleep(1000), hfreduceCommGetAsyncError(comm, &error);
    CHECK(error == hfreduceTimeout, "%d", (int)error);
  }
  OK(hfreduceCommDestroy(comm));
  return check_failed != 0;
}

/* Then one can be started after all. */
static int thread_after_all(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  hfreduceWork_t work;
  float x[4] = {1, 1, 1, 1};
  (void)arg;
  OK(hfreduceCommInitRank(&comm, nranks, *id, rank));
  refuse = 1;
  WANT(launch_sum(comm, x, &work) == hfreduceSystemError);
  refuse = 0;
  OK(launch_sum(comm, x, &work));
  OK(hfreduceWorkWait(work, -1));
  hfreduceWorkDestroy(work);
  WANT(x[3] == 2);
  OK(hfreduceCommDestroy(comm));
  return 0;
}

/* Every call that needs the watcher fails, and no descriptor stays open. */
static int no_watcher(void) {
  hfreduceUniqueId id;
  refuse = 1;
  hfreduceGetUniqueIdLocal(&id);
  int before = open_descriptors();
  for (int i = 0; i < TIMES; i++)
    if (!CHECK(hfreduceGetUniqueIdLocal(&id) == hfreduceSystemError && told("watcher thread"), "%s", hfreduceGetLastError(NULL)))
      break;
  CHECK(open_descriptors() == before, "%d descriptors, %d before", open_descriptors(), before);
  return check_failed != 0;
}

/* ulimit -f: an error, not the end of the process by SIGXFSZ. */
static int small_files(void) {
  struct rlimit limit = {65536, RLIM_INFINITY};
  hfreduceUniqueId id;
  hfreduceComm_t comm;
  float x[4] = {1, 1, 1, 1};
  int rank = 0;
  if (setrlimit(RLIMIT_FSIZE, &limit)) return 1;
  OK(hfreduceGetUniqueIdLocal(&id));
  CHECK(hfreduceCommInitRank(&comm, 1, id, 0) == hfreduceSystemError && told("RLIMIT_FSIZE"), "%s", hfreduceGetLastError(NULL));
  limit.rlim_cur = RLIM_INFINITY;
  if (setrlimit(RLIMIT_FSIZE, &limit)) return 1;
  OK(hfreduceGetUniqueIdLocal(&id));
  OK(hfreduceCommInitRank(&comm, 1, id, 0));
  OK(sum(comm, x));
  OK(hfreduceCommDestroy(comm));
  return check_failed != 0;
}

/* In a process of its own: the first thing that the library does there. */
static void alone(const char *name, int (*function)(void)) {
  int status = 0;
  fflush(NULL);
  pid_t pid = fork();
  if (!pid) {
    alarm(100);
    exit(function());
  }
  CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && !WEXITSTATUS(status), "%s: status %#x", name, status);
}

int main(void) {
  step = mmap(NULL, sizeof *step, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  alone("no watcher", no_watcher);
  alone("small files", small_files);
  CHECK(!run_processes("2", no_progress_thread, NULL, 100));
  CHECK(!run_processes("2", thread_after_all, NULL, 100));
  return check_done();
}
