/*
 * Another rank's abort finds this rank in an operation: one that can still complete from what has arrived does so, any other
 * fails. Rank 1 holds the driver of its engine meanwhile, so that nothing moves until the abort was told.
 */
#include "check.h"
#include "ranks.h"

#include "comm/comm.h"
#include "engine/internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define UNTIL(condition) \
  while (!(condition)) usleep(200)

/* What the ranks tell each other beside the library. */
static _Atomic int *step;

enum what { BARRIER, SUM, BROADCAST, SENDING, WHATS };
static const char *const names[] = {"barrier", "all_reduce", "broadcast", "send and recv"};

static hfreduceResult_t call(hfreduceComm_t comm, int rank, enum what what, float *x) {
  switch (what) {
    case BARRIER: return hfreduceBarrier(comm, NULL);
    case SUM: return hfreduceAllReduce(x, x, 2, hfreduceFloat32, hfreduceSum, comm, NULL);
    case BROADCAST: return hfreduceBroadcast(x, x, 2, hfreduceFloat32, 0, comm, NULL);
    default:
      return rank ? hfreduceRecv(x, 2, hfreduceFloat32, 0, comm, NULL) : hfreduceSend(x, 2, hfreduceFloat32, 1, comm, NULL);
  }
}

struct round {
  enum what what;
  int own;   /* rank 1 aborts itself instead */
  int early; /* rank 0 aborts before it has done its part */
};

/* Rank 1, whose engine nobody else drives. */
static int held(hfreduceComm_t comm, int rank, const struct round *round, float *x) {
  struct hfr_engine *e = &comm->engine;
  hfreduceErrorInfo_t info;
  hfreduceWork_t work;
  UNTIL(hfr_drive_begin(e));
  OK(hfreduceGroupStart());
  call(comm, rank, round->what, x);
  OK(hfreduceGroupEndAsync(&work));
  for (int i = 0; i < 100; i++) hfr_engine_progress(e); /* its own part is out */
  atomic_store(&step[1], 1);
  UNTIL(atomic_load(&step[0]) == 1);
  if (round->own) OK(hfreduceCommAbort(comm));
  UNTIL(hfr_engine_error(e, &info));
  WANT(info.code == hfreduceAborted);
  hfr_drive_end(e);
  hfr_drive_async(e);
  hfreduceResult_t r = hfreduceWorkWait(work, 20);
  WANT(r == (round->own || round->early ? hfreduceAborted : hfreduceSuccess));
  if (!r && round->what != BARRIER) WANT(x[0] == (round->what == SUM ? 3 : 1) && x[1] == x[0]);
  hfreduceWorkDestroy(work);
  WANT(hfreduceBarrier(comm, NULL) == hfreduceAborted); /* it has taken effect */
  return 0;
}

static int run(int rank, int nranks, const hfreduceUniqueId *id, void *arg) {
  const struct round *round = arg;
  float x[2] = {(float)rank + 1, (float)rank + 1};
  hfreduceComm_t comm;
  OK(hfreduceCommInitRank(&comm, nranks, *id, rank));
  OK(call(comm, rank, round->what, x)); /* connections are there */
  OK(hfreduceBarrier(comm, NULL));
  x[0] = x[1] = (float)rank + 1;
  if (rank == 1) {
    if (held(comm, rank, round, x)) return 1;
  } else {
    UNTIL(atomic_load(&step[1]) == 1);
    if (!round->early) OK(call(comm, rank, round->what, x));
    if (!round->own) OK(hfreduceCommAbort(comm));
    atomic_store(&step[0], 1);
    if (round->own) {
      hfreduceResult_t error = hfreduceSuccess;
      UNTIL(hfreduceCommGetAsyncError(comm, &error) || error);
    }
  }
  OK(hfreduceCommDestroy(comm));
  return 0;
}

int main(void) {
  step = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  static const char *const layouts[] = {"2", "1,1"};
  for (int l = 0; l < 2; l++)
    for (int what = 0; what < WHATS; what++)
      for (int way = 0; way < 3; way++) {
        struct round round = {.what = (enum what)what, .own = way == 1, .early = way == 2};
        if (what != SENDING && l == 1) continue; /* between nodes rank 0 waits for an answer that rank 1 would have to send */
        step[0] = step[1] = 0;
        CHECK(!run_processes(layouts[l], run, &round, 60), "%s on %s, %s", names[what], layouts[l],
              way == 0   ? "rank 0 aborts"
              : way == 1 ? "rank 1 aborts"
                         : "rank 0 aborts first");
      }
  return check_done();
}
