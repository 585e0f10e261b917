/* Plain or streaming stores to shared memory, whichever costs less where the ranks run now. */
#include "writer.h"

#include "../base/thread.h"
#include "../simd/simd.h"

#include <string.h>

#define STREAM_MIN 1024          /* bytes; below, the fence costs more than it saves */
#define ALWAYS_TIMED (16u << 10) /* bytes; shorter copies are timed each TIMED_EVERY-th time, to save the clock */
#define TIMED_EVERY 16
#define PROBE_EVERY 64 /* timed copies do it the other way each so many turns */
/* A reader has streamed data from memory and plain data from a cache: streaming must save more than it costs there. */
#define WORTH 4

static uint64_t ticks(void) {
#if defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#else
  return (uint64_t)hfr_now_ns();
#endif
}

/* Falls fast and rises slowly: what makes a copy slow once (a page fault, another process) says nothing of its kind. */
static void smooth(double *cost, double now) {
  if (*cost == 0)
    *cost = now;
  else if (now < *cost)
    *cost = (*cost + now) / 2;
  else
    *cost += ((now < 4 * *cost ? now : 4 * *cost) - *cost) / 8;
}

static void copy(int streams, void *dst, const void *src, size_t bytes) {
  if (streams)
    hfr_stream_copy(dst, src, bytes);
  else
    memcpy(dst, src, bytes);
}

void hfr_writer_learn(struct hfr_writer *w, int streams, double cost) {
  smooth(&w->cost[streams], cost);
  w->streams = w->cost[0] > WORTH * w->cost[1] && w->cost[1] > 0;
}

void hfr_writer_copy(struct hfr_writer *w, void *dst, const void *src, size_t bytes) {
  if (bytes < STREAM_MIN || !hfr_can_stream()) {
    if (bytes) memcpy(dst, src, bytes);
    return;
  }
  uint32_t turn = ++w->turn;
  if (bytes < ALWAYS_TIMED && turn % TIMED_EVERY) {
    copy(w->streams, dst, src, bytes);
    return;
  }
  int other = turn % PROBE_EVERY == 0 || w->cost[!w->streams] == 0, streams = w->streams ^ other;
  uint64_t begin = ticks();
  copy(streams, dst, src, bytes);
  hfr_writer_learn(w, streams, (double)(ticks() - begin) / (double)bytes);
}
