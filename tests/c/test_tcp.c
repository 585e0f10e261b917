/* Connections that corrupt data, or break while both processes live: this program stands between the library and the system's
 * sendmsg and recvmsg. Two ranks on two nodes. */
#include "check.h"
#include "ranks.h"

#include "node/arena.h"

#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define LARGE 300000 /* floats: more than a message carries, and than the kernel takes at once */

static _Atomic int flips;         /* payloads of which recvmsg still turns a bit */
static _Atomic int magics;        /* headers of which it still turns one */
static _Atomic int refusing;      /* sendmsg fails on data connections */
static _Atomic int sends_on = -1; /* the connection on which data was sent last */

static int carries_data(int fd, const struct msghdr *message) {
  int domain = 0;
  socklen_t bytes = sizeof domain;
  if (message->msg_control || getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &bytes) || domain == AF_UNIX) return 0;
  return 1;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
  ssize_t (*next)(int, const struct msghdr *, int) = (ssize_t(*)(int, const struct msghdr *, int))dlsym(RTLD_NEXT, "sendmsg");
  if (!carries_data(fd, message)) return next(fd, message, flags);
  sends_on = fd;
  if (refusing) return errno = ECONNRESET, -1;
  return next(fd, message, flags);
}

/* A message is read as its header and its payload, and then, where it has not wholly come, as the rest of its payload. */
ssize_t recvmsg(int fd, struct msghdr *message, int flags) {
  ssize_t (*next)(int, struct msghdr *, int) = (ssize_t(*)(int, struct msghdr *, int))dlsym(RTLD_NEXT, "recvmsg");
  ssize_t got = next(fd, message, flags);
  if (got <= 0 || !carries_data(fd, message)) return got;
  const struct iovec *v = message->msg_iov;
  if (magics && v[0].iov_len == sizeof(struct hfr_msg_header)) {
    ((uint8_t *)v[0].iov_base)[0] ^= 0x10;
    magics--;
  }
  if (!flips) return got;
  size_t at = message->msg_iovlen > 1 ? v[0].iov_len : 0;
  if (!at && v[0].iov_len <= sizeof(struct hfr_msg_header)) return got;
  if ((size_t)got <= at) return got;
  ((uint8_t *)v[message->msg_iovlen - 1].iov_base)[0] ^= 0x10;
  flips--;
  return got;
}

struct fault {
  size_t count;
  const char *checksum, *streams;
  int way; /* of the call */
};
enum { BROADCAST, SEND, SUM };
static const char *const way_name[] = {"broadcast", "send", "all_reduce"};

static hfreduceResult_t call(hfreduceComm_t comm, const struct fault *f, int rank, float *x) {
  switch (f->way) {
    case BROADCAST: return hfreduceBroadcast(x, x, f->count, hfreduceFloat32, 0, comm, NULL);
    case SEND:
      return rank ? hfreduceRecv(x, f->count, hfreduceFloat32, 0, comm, NULL)
                  : hfreduceSend(x, f->count, hfreduceFloat32, 1, comm, NULL);
    default: return hfreduceAllReduce(x, x, f->count, hfreduceFloat32, hfreduceSum, comm, NULL);
  }
}

/* Join, with a deadline far behind every error that is expected, and bring the connections up. */
static hfreduceResult_t begin(hfreduceComm_t *comm, const struct fault *f, int rank, int n, const hfreduceUniqueId *id, float *x,
                              int *fd) {
  setenv("HFREDUCE_TIMEOUT", "25", 1);
  setenv("HFREDUCE_CHECKSUM", f->checksum, 1);
  setenv("HFREDUCE_TCP_STREAMS", f->streams, 1);
  for (int i = 0; i < LARGE; i++) x[i] = 1;
  hfreduceResult_t r = hfreduceCommInitRank(comm, n, *id, rank);
  for (int i = 0; !r && i < 4; i++) r = call(*comm, f, rank, x);
  *fd = sends_on; /* that of such calls, not of the barrier */
  for (int i = 0; i < LARGE; i++) x[i] = 1;
  return r ? r : hfreduceBarrier(*comm, NULL);
}

/* The rank whose data was corrupted says so, naming the sender; where nobody checks, the data is wrong. */
static int corrupt(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct fault *f = arg;
  hfreduceComm_t comm;
  int fd;
  float *x = malloc(LARGE * sizeof *x);
  OK(begin(&comm, f, rank, n, id, x, &fd));
  if (rank) flips = 1;
  hfreduceResult_t r = call(comm, f, rank, x);
  if (!strcmp(f->checksum, "0")) {
    size_t wrong = 0;
    float want = f->way == SUM ? (float)n : 1;
    for (size_t i = 0; i < f->count; i++) wrong += x[i] != want;
    WANT(!r && !flips);
    WANT(wrong == (rank ? 1 : f->way == SUM ? wrong : 0));
    OK(hfreduceCommDestroy(comm));
    free(x);
    return 0;
  }
  if (!r && !rank) r = hfreduceBarrier(comm, NULL); /* what it sent may have left before it was refused */
  if (rank) {
    WANT(r == hfreduceCorrupt && !flips);
    WANT(strstr(hfreduceGetLastError(NULL), "from rank 0") && strstr(hfreduceGetLastError(NULL), "checksum"));
  } else {
    WANT(r == hfreduceCorrupt || r == hfreduceRemoteError);
  }
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

/* A header that is none is no message, whatever it says of its payload, and with no checksum too. */
static int no_header(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct fault *f = arg;
  hfreduceComm_t comm;
  int fd;
  float *x = malloc(LARGE * sizeof *x);
  OK(begin(&comm, f, rank, n, id, x, &fd));
  if (rank) magics = 1;
  hfreduceResult_t r = call(comm, f, rank, x);
  if (!r && !rank) r = hfreduceBarrier(comm, NULL); /* what it sent may have left before it was refused */
  WANT(rank ? r == hfreduceCorrupt && !magics : r == hfreduceCorrupt || r == hfreduceRemoteError);
  WANT(!rank || strstr(hfreduceGetLastError(NULL), "from rank 0") && strstr(hfreduceGetLastError(NULL), "broken header"));
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

/* A connection is closed in one direction, and nothing else happens: who waits for data finds the end, and tells the other rank.
 */
static int closed(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct fault *f = arg;
  hfreduceComm_t comm;
  hfreduceResult_t r = hfreduceSuccess;
  int fd;
  float *x = malloc(LARGE * sizeof *x);
  OK(begin(&comm, f, rank, n, id, x, &fd));
  if (rank)
    r = call(comm, f, rank, x);
  else
    WANT(fd >= 0 && !shutdown(fd, SHUT_WR));
  for (int ms = 0; !r && ms < 15000; ms++) { /* below the deadline */
    usleep(1000);
    OK(hfreduceCommGetAsyncError(comm, &r));
  }
  WANT(r == hfreduceRemoteError);
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

/* Both ranks learn of a connection that is lost in one direction only: the receiver, too, which sees nothing of it itself. */
static int one_way(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct fault *f = arg;
  hfreduceComm_t comm;
  int fd;
  float *x = malloc(LARGE * sizeof *x);
  OK(begin(&comm, f, rank, n, id, x, &fd));
  if (!rank) refusing = 1;
  hfreduceResult_t r = call(comm, f, rank, x);
  WANT(r == hfreduceRemoteError);
  WANT(rank || strstr(hfreduceGetLastError(NULL), "sending failed"));
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

/* A connection is reset, as a middlebox does that has forgotten it. */
static int reset(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct fault *f = arg;
  const struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
  hfreduceComm_t comm;
  int fd;
  float *x = malloc(LARGE * sizeof *x);
  OK(begin(&comm, f, rank, n, id, x, &fd));
  if (!rank) WANT(fd >= 0 && !connect(fd, &nowhere, sizeof nowhere));
  hfreduceResult_t r = hfreduceSuccess;
  for (int i = 0; !r && i < 4; i++) r = call(comm, f, rank, x); /* one of several streams */
  WANT(r == hfreduceRemoteError);
  OK(hfreduceCommDestroy(comm));
  free(x);
  return 0;
}

int main(void) {
  static const struct {
    size_t count;
    const char *streams;
  } shape[] = {{3, "1"}, {LARGE, "1"}, {LARGE, "3"}};
  struct fault message = {3, "0", "1", SEND};
  CHECK(!run_processes("1,1", no_header, &message, 60), "a broken header");
  CHECK(!run_processes("1,1", closed, &message, 24), "a connection that ends");
  for (int way = BROADCAST; way <= SUM; way++)
    for (int s = 0; s < 3; s++) {
      struct fault f = {shape[s].count, "1", shape[s].streams, way};
      CHECK(!run_processes("1,1", corrupt, &f, 60), "corrupted %s of %zu, %s streams", way_name[way], f.count, f.streams);
      CHECK(!run_processes("1,1", one_way, &f, 60), "one-way loss in %s of %zu, %s streams", way_name[way], f.count, f.streams);
      CHECK(!run_processes("1,1", reset, &f, 60), "reset before %s of %zu, %s streams", way_name[way], f.count, f.streams);
      f.checksum = "0";
      CHECK(!run_processes("1,1", corrupt, &f, 60), "unchecked %s of %zu, %s streams", way_name[way], f.count, f.streams);
    }
  return check_done();
}
