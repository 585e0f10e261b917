/*
 * A test double of CUDA's driver library, for machines with no GPU. It is no GPU and measures none: it says so in the name of its
 * devices and in every message. What it has is what the order of streams is about: device memory that CPUs cannot touch, streams
 * that run on threads of their own, events, waits for words in memory, copies that take their time, capture and replay.
 *
 *   program ──► memory.c   pointers: what they are, how far they reach, whether they are freed
 *           ──► chunks.c   addresses in a row over chunks of memory, as allocators with segments that grow have them
 *           ──► queue.c    streams and events: operations in queues, run by threads
 *           ──► graph.c    capture, graphs, user objects
 *           ──► pair.c     what joins two devices: peer access, memory of other processes; and kernels, which CPUs run
 *           ──► api.c      contexts, devices, versions, the script
 *
 * What would hang, corrupt or crash on a device ends the process with a line that says why: copies past the end of memory, the
 * use of freed memory or of destroyed streams, calls from a host function, calls from a thread that must make none (hfr-*).
 *
 * Environment: FAKE_CUDA, words:
 *   devices=N            2
 *   delay=US seed=S      each operation waits up to so many microseconds first
 *   reuse=1              memory that is freed is given again, at the same address
 *   flush=0              waits for words cannot flush: what comes over the bus by itself is never seen by work behind them
 *   memops=0             a driver of 11.4 whose kernel module does not grant stream memory operations
 *   nvlink=N             N devices each, from the first on, are joined by NVLink (0: none, the preset)
 *   depth=N              who puts more than N operations into a stream waits until they are fewer (0: there is no limit)
 *   stale=crash          the handle of a stream that is gone, by itself or with its context, ends the process, as drivers may
 *   queues=1             streams of a device share its hardware queues, round robin: CUDA_DEVICE_MAX_CONNECTIONS, or 8
 *   block=1              calls that make or free memory, streams, events, modules, graphs wait while a stream waits for a word
 *   fail=CALL:N:RESULT   the N-th call of this function gives this CUresult (0: every one)
 * CUDA_LAUNCH_BLOCKING=1: a kernel's launch waits for it.
 * CUDA_DEVICE_MAX_CONNECTIONS=1: all streams of a device share one queue, as in hardware that has but one.
 */
#ifndef FAKE_CUDA_DRIVER_H_
#define FAKE_CUDA_DRIVER_H_
#include "device/cuda_lib.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#define FAKE_DEVICES_MAX 8
#define EXPORT __attribute__((visibility("default")))

struct CUctx_st {
  int device, destroyed, primary;
  unsigned long long id;
  struct CUstream_st *legacy;
};

/* ---- memory.c ---- */
enum fake_kind { FAKE_DEVICE, FAKE_CHUNK, FAKE_MANAGED, FAKE_PINNED, FAKE_REGISTERED, FAKE_IMPORTED };
struct fake_block {
  struct fake_block *next;
  enum fake_kind kind;
  uintptr_t start, device; /* as CPUs and as devices see it */
  uint8_t *alias;          /* through which copies go */
  size_t bytes;
  int freed;
  struct CUctx_st *context;
  uint64_t id;            /* of the allocation: memory that was freed and given again has another */
  int fd;                 /* of memory that other processes may open; else -1 */
  _Atomic int *importers; /* that have it open, in memory that all of them share; NULL: it cannot be opened */
  int ordinal, closed;    /* CHUNK: of its device, for it has no context; nobody may reach it yet */
};
struct fake_block *fake_add_block(enum fake_kind kind, uintptr_t start, uint8_t *alias, size_t bytes);
/* What others put on the bus towards device memory (fake/gdrapi.c) arrives. Under the lock. */
void fake_arrive(void);
/* Under the lock. The block that holds this address, freed ones too; NULL: none, it is plain host memory. */
struct fake_block *fake_block_of(uintptr_t address);
/* The bytes there, for a copy that `what` names: ends the process when they are no memory. Under the lock. */
uint8_t *fake_bytes(uintptr_t address, size_t bytes, const char *what);

/* Free a block of a device. Under the lock. */
void fake_free_block(struct fake_block *block);
/* Device memory of a context. Under the lock. */
void fake_free_all(const struct CUctx_st *context);

/* ---- queue.c ---- */
enum fake_what { FAKE_NOP, FAKE_COPY, FAKE_SET, FAKE_WRITE, FAKE_WAIT, FAKE_HOST, FAKE_GRAPH, FAKE_KERNEL };
struct fake_after { /* so many operations of a stream */
  struct CUstream_st *stream;
  uint64_t count;
};
struct fake_op {
  struct fake_op *next;
  enum fake_what what;
  struct CUstream_st *stream;
  uintptr_t to, from; /* COPY, SET (to), WRITE and WAIT (to) */
  size_t to_pitch, from_pitch, width, rows;
  uint32_t value;
  int size; /* SET: of an element; WAIT: 1 if it flushes */
  hfr_cu_host_fn function;
  void *arg;
  struct fake_exec *exec;
  const struct fake_launch *launch; /* KERNEL; kept for ever, for a graph may run it again */
  struct fake_after *after;
  int nafter;
};
struct fake_queue {
  struct fake_op *head, **tail;
  int started;
};
struct fake_node;
struct CUstream_st {
  struct CUstream_st *next;
  struct CUctx_st *context;
  unsigned flags;
  int destroyed, priority;
  uint64_t submitted, completed;
  struct fake_queue own, *queue;
  struct fake_capture *capture;
  struct fake_node **tip; /* what the next captured operation follows */
  int ntips;
};
struct fake_exec;
struct CUevent_st {
  int recorded, destroyed;
  struct fake_after at;
  struct fake_capture *capture;
  uint64_t capture_id;
  struct fake_node **node;
  int nnodes;
};
/* The stream that a handle means here and now; NULL: none. Under the lock. */
struct CUstream_st *fake_stream(hfr_cu_stream handle);
/* Put an operation into a stream, or into the graph that it captures. Under the lock. */
hfr_cu_result fake_put(struct CUstream_st *stream, struct fake_op op);
/* Do what an operation says, but for graphs. Not under the lock. */
void fake_execute(const struct fake_op *op);
/* Wait for the first `count` operations of a stream. Under the lock, which it gives up meanwhile. */
void fake_await(struct CUstream_st *stream, uint64_t count);

/* ---- graph.c ---- */
struct fake_capture {
  struct fake_capture *next;
  uint64_t id;
  struct CUstream_st *origin;
  int mode, broken;
  pthread_t thread;
  struct CUgraph_st *graph;
};
/* Under the lock: */
hfr_cu_result fake_record(struct CUstream_st *stream, const struct fake_op *op);
hfr_cu_result fake_join(struct CUstream_st *stream, struct CUevent_st *event);
void fake_mark(struct CUstream_st *stream, struct CUevent_st *event);
/* Not under the lock: a call that must not be made while streams are captured, unless the thread says otherwise. 0: go on. */
hfr_cu_result fake_unsafe(void);
void fake_run_graph(struct fake_exec *exec);

/* ---- pair.c ---- */
void fake_run_kernel(const struct fake_launch *launch);

/* ---- api.c ---- */
extern struct fake_driver {
  pthread_mutex_t lock;
  pthread_cond_t moved; /* something completed, or came */
  pid_t pid;            /* that initialised it; 0: none has */
  int devices, delay_us, version, mem_ops, one_queue, blocking, reuse, flush, nvlink, depth, stale_crash, block, queues;
  int waits; /* of streams for words, that have begun and are not over */
  uint64_t allocations;
  unsigned long long contexts; /* so far */
  struct CUstream_st *streams; /* destroyed ones too */
  struct fake_capture *captures;
  struct CUctx_st primary[FAKE_DEVICES_MAX];
  int retained[FAKE_DEVICES_MAX];
  struct fake_queue shared[FAKE_DEVICES_MAX][32];
  unsigned made[FAKE_DEVICES_MAX]; /* streams */
  uint64_t copies, launches, kernels;
} fake;
extern _Thread_local int fake_in_host_function;
extern _Thread_local int fake_capture_mode;
/* Every call begins with it. 0: go on. */
hfr_cu_result fake_enter(const char *call, int needs_init);
struct CUctx_st *fake_current(void);
/* The call is one of those that may block: wait until no stream waits. Under the lock, which it gives up meanwhile. */
void fake_blocks(void);
void fake_delay(void);
_Noreturn void fake_die(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define ENTER(call)                               \
  do {                                            \
    hfr_cu_result entered_ = fake_enter(call, 1); \
    if (entered_) return entered_;                \
  } while (0)
#define ENTER_BLOCKING(call) \
  do {                       \
    ENTER(call);             \
    LOCK();                  \
    fake_blocks();           \
    UNLOCK();                \
  } while (0)
#define LOCK() pthread_mutex_lock(&fake.lock)
#define UNLOCK() pthread_mutex_unlock(&fake.lock)
#endif
