/*
 * The engine of a communicator: its queue of requests and who drives them.
 *
 * One thread at a time drives an engine (it holds `driver`): the caller of a blocking call on an idle communicator, or the
 * process' progress thread. Collectives run one after the other in issue order; sends and receives run beside them: the messages
 * to a peer leave in issue order, and each goes to the oldest receive that fits it (p2p.c).
 */
#ifndef HFR_ENGINE_ENGINE_H_
#define HFR_ENGINE_ENGINE_H_
#include "../topo/host.h"
#include "plan.h"
#include "window.h"

#include <pthread.h>

/* The public work handle: stands for one or several requests. */
struct hfreduceWork {
  _Atomic uint32_t refs;
  _Atomic uint32_t remaining; /* requests not yet ended */
  _Atomic uint32_t done;      /* futex word */
  _Atomic uint32_t sleepers;  /* threads that wait for it on the futex */
  _Atomic int code;           /* first error */
  hfreduceErrorInfo_t info;   /* valid once done, if code */
  struct hfr_engine *engine;  /* of all its requests, alive until done; NULL: several engines */
  /* completion.c */
  _Atomic(struct hfreduceCompletionQueue *) queue; /* who is told; a mark once it has ended */
  struct hfreduceWork *next_done;
  uint64_t token;
  _Atomic int notified;
};

/* The segments that two devices give each other (HFR_PAIR): words of the request's window, one a segment. */
struct hfr_exchange {
  int partner;   /* local rank */
  int back;      /* 0: inputs on their way out, 1: results on their way back */
  uint64_t base; /* segments that came before this operation, since the communicator was made */
  int pushed;    /* of this one, as the partner knows */
};

struct hfr_request {
  struct hfr_request *next;
  struct hfreduceWork *work;
  struct hfr_plan plan;
  struct hfr_fingerprint fp;
  uint64_t base;       /* chunks staged before this operation */
  size_t place;        /* hfr_slot_place() */
  int streams_out;     /* the results go past the caches */
  int lends;           /* chunks that lie in the lending area are read there */
  int64_t deadline_ns; /* set when it starts */
  int64_t timeout_ns;
  int started, verified, reported;
  /* A wait that is long says so: when it does next (0: not looked up yet), since when nothing has moved, and how much had. */
  int64_t speak_ns, still_ns, moves;
  int partial; /* it is part of a call that another request stands for */
  int lent; /* bit 0: the send buffer was lent to the transport, bit 1: the receive buffer, bit 2: a local rank's lending area */
  uint64_t ticket; /* a send's turn on the link */
  int source;      /* a receive: whose message it takes; -1: none yet */
  struct hfr_exchange exchange;
  struct hfr_cursor *cursor; /* one a stage */
  int cursors_cap, left;     /* left: stages not yet finished */
  void *temp;                /* copy of the send buffer (in-place all_to_all) */
  const void *temp_from;     /* what is copied there when the request starts; NULL: it has been */
  size_t temp_bytes;
  struct hfr_window *window; /* how it reaches memory of a device, or waits for a stream; NULL: host memory, at once */
  struct hfr_replay *replay; /* in a graph: whose request it is, and it is used again and again */
  int running;               /* in a graph: in the queue */
  _Atomic int holders;       /* with a window: the engine, and who still puts it into the device's queues */
  void *kept;                /* a receive: its message, which came before its window was open */
  size_t kept_bytes;         /* of it taken out */
  size_t *counts;            /* copy of the uneven counts */
};

/* Calls that a graph holds, in the order in which they were captured: each is a request that runs anew when the graph is
   launched and its first segment is ready. Their order is that of the graph, on all ranks. */
struct hfr_replay {
  struct hfr_replay *next;
  struct hfr_request **request; /* the driver's */
  int n, cap, cursor;           /* cursor: which comes next */
  int listed;
  int bell;                 /* the graph says when it is launched */
  uint32_t replayed;        /* launches that have been gone through; the driver's */
  _Atomic uint32_t rung;    /* launches that were told of; cyclic, and may lag behind */
  _Atomic int dead;         /* no graph will launch them any more */
  void (*ended)(void *arg); /* the engine has let go of them: their memory may go. The driver's thread, or destroy's */
  void *arg;
};

/* Messages that a stage holds in the transport's memory while they are passed on; more than a link has at once. */
#define HFR_KEPT 16
struct hfr_kept {
  const void *data; /* NULL: it has let go of it, or never held it */
  uint64_t token;   /* the transport's */
};

struct hfr_cursor {
  int64_t done;     /* iterations completed */
  int64_t posted;   /* SEND: iterations handed to the link */
  uint64_t tx_base; /* SEND: link->posted when the stage began */
  int have_step;
  struct hfr_step step; /* of iteration `done` (SEND: `posted`) */
  int need;             /* with a window: the segment that the step works on */
  int at;               /* ... and that iteration `done` works on */
  int64_t passed;       /* RECV: iterations that have been passed on to all */
  struct hfr_kept kept[HFR_KEPT];
};

struct hfr_engine {
  const struct hfr_layout *layout;
  struct hfr_arena *arena;
  struct hfr_net *net;
  struct hfr_geometry geometry;
  const struct hfr_transport *remote; /* between nodes */
  _Atomic(struct hfr_link *) *link;   /* [peer * HFR_NVC + vc], made at first use */
  int *linked;                        /* peers with a link, in the order of their first */
  _Atomic int nlinked;
  const void **sources; /* scratch of a reduction */
  pid_t pid;

  _Atomic int driver;                      /* 1: somebody drives */
  _Atomic int napping;                     /* 1: the caller who drives it sleeps, or is about to */
  _Atomic int parked;                      /* 1: whoever drives it sleeps, since its first collective waits for peers */
  pthread_mutex_t lock;                    /* guards inbox, tickets, free requests, error */
  struct hfr_request *inbox, **inbox_tail; /* submitted, not yet seen by a driver */
  _Atomic int inbox_full;
  struct hfr_request *free;
  _Atomic uint32_t active;    /* requests submitted and not ended */
  _Atomic uint32_t calls;     /* of these, so many stand for a call; the others are parts of one */
  _Atomic uint32_t windows;   /* of these, so many work on a device's memory: its words must be looked at */
  _Atomic uint32_t armed;     /* replays whose graph may be launched */
  _Atomic uint32_t due;       /* of these, so many may have been, as the driver last saw: the same */
  struct hfr_replay *replays; /* the driver's */
  /* Words that a device moves when it gets to a launch, in memory that outlives the engine's requests; NULL: none yet. */
  const _Atomic uint32_t *_Atomic started[2];
  _Atomic uint32_t started_seen[2];
  _Atomic uint32_t guests; /* threads that wait for a work of this engine, and may drive it */
  /* the driver's: */
  struct hfr_request *queue, **queue_tail; /* collectives, in order */
  /* Over, but others may still read what they lent; in order. */
  struct hfr_request *lenders, **lenders_tail;
  struct hfr_request *p2p, **p2p_tail; /* running sends and receives, in order of issue */
  struct hfr_mailbox *mailbox;         /* by rank; made at the first receive */
  uint64_t visit;                      /* moves with each look at the mailboxes */
  uint64_t any_posted;                 /* receives from any source, ever */
  int any_next;                        /* where the next of them looks first: the rank after the last one served */
  uint64_t seq;                        /* collectives begun */
  uint64_t base;                       /* chunks staged */
  uint64_t out_known;                  /* all local ranks have taken out this many, as far as we looked */

  _Atomic int error;        /* first error; every wait reads it */
  _Atomic int told;         /* another rank's: it becomes `error` once nothing moves any more */
  hfreduceErrorInfo_t why;  /* of `error`, else of `told`; under lock */
  int64_t told_ns;          /* when `told` was set */
  _Atomic int64_t *left_ns; /* by rank: when it left (0: it has not) */
  _Atomic int anyone_left;
  int64_t timeout_ns;
  _Atomic(const char *) purpose; /* why the library itself issues collectives, as a waiting one says; NULL: it does not */
  _Atomic int64_t leave_ns; /* the communicator is being closed, and what still runs at this time is given up; 0: it is not */
  int64_t patience_ns;      /* a blocking call hands its request to the progress thread after this long; 0: never */
  int spins, yields;        /* polls before sleeping */
  size_t stream_from;       /* bytes of results on a node from which no cache holds them */
  const char *host;
  /* told once, by whichever thread found the error, without locks held */
  void (*on_error)(void *arg, const hfreduceErrorInfo_t *info);
  void *on_error_arg;
  /* told of the first error, wherever it came from; tell: the other ranks have not heard of it yet */
  void (*on_break)(void *arg, const hfreduceErrorInfo_t *info, int tell);
  /* told once a collective that has waited long on several nodes: ranks that use different channels never meet, so somebody must
   * compare */
  void (*on_stuck)(void *arg, const struct hfr_fingerprint *fp);

  struct hfr_engine *next_active; /* the progress thread's list */
  int listed;
  uint64_t collectives, fast, lent; /* counters for the curious; lent: chunks */
};

hfreduceResult_t hfr_engine_init(struct hfr_engine *engine);
void hfr_engine_fini(struct hfr_engine *engine);

/* A request with an empty plan, from the pool. NULL: out of memory. */
struct hfr_request *hfr_request_get(struct hfr_engine *engine);
void hfr_request_put(struct hfr_engine *engine, struct hfr_request *request);
/* One of its holders is done with a submitted request; the last one puts it back. */
void hfr_request_let_go(struct hfr_engine *engine, struct hfr_request *request);
/* Hand a planned request over. Its work's `remaining` counts it already. Order of calls is order of issue. */
void hfr_engine_submit(struct hfr_engine *engine, struct hfr_request *request);
/* Have `request`, which was captured and belongs to a replay, run with each launch. Order of calls is order of capture. */
void hfr_engine_arm(struct hfr_engine *engine, struct hfr_request *request);
/* The graph was launched: whoever drives shall look. Any thread; calls no driver. */
void hfr_replay_ring(void *replay);
/* Windows of the process' engines that are open: from when their requests are submitted, or a graph launches them, until these
   end. Meanwhile a stream waits, or will wait, for a word. */
extern _Atomic int hfr_windows_open;
/* Engines that have any. */
extern _Atomic int hfr_engines_waiting;
/* Results of so many bytes on a node are not left in the caches: the inputs and the slots want room there too. */
static inline size_t hfr_stream_from(void) { return hfr_cache_bytes(3) / 4; }
/* Does the engine wait for words that a device writes? Then sleeps are short. */
static inline int hfr_engine_looks(const struct hfr_engine *engine) {
  return atomic_load_explicit(&engine->windows, memory_order_relaxed) || atomic_load_explicit(&engine->due, memory_order_relaxed);
}
/* Has the device got to a launch since this was asked last? Then what it copies out will be there soon. The progress thread's. */
int hfr_engine_stirs(struct hfr_engine *engine);
/* Go on with what hfr_oneshot began and does not wait for any longer, as a request; copied: its data lies in the arena. The
 * caller drives the engine, and still does afterwards. */
void hfr_engine_adopt(struct hfr_engine *engine, struct hfr_request *request, int copied);
/* Do what can be done now for all requests. 1: something moved. Driver only. */
int hfr_engine_progress(struct hfr_engine *engine);
/* As blocked requests: note what would wake them. Driver only. */
void hfr_engine_want(struct hfr_engine *engine, struct hfr_waitset *set);
/* A rank that computes looks after its links now and then: a peer may wait for what one of them has still to do. 1: look again
 * soon. Any thread that does not drive. */
int hfr_engine_attend(struct hfr_engine *engine);
/* Slow-path checks: deadlines, ranks that left. Driver only. */
void hfr_engine_check(struct hfr_engine *engine, int64_t now_ns);
/* Break the communicator: first error wins, all waits end, on_error is told. Any thread. Fields rank, host may be left empty. */
void hfr_engine_fail(struct hfr_engine *engine, const hfreduceErrorInfo_t *info);
/* The same without telling on_error: for errors that came from there. 1 if it was the first. */
int hfr_engine_break(struct hfr_engine *engine, const hfreduceErrorInfo_t *info);
/* As hfr_engine_break for the error of another rank: operations that can still complete from what has arrived do so first. */
void hfr_engine_tell(struct hfr_engine *engine, const hfreduceErrorInfo_t *info);
/* The communicator's state: its error, or what was told. Any thread. */
static inline int hfr_engine_state(const struct hfr_engine *engine) {
  int code = atomic_load_explicit(&engine->error, memory_order_acquire);
  return code ? code : atomic_load_explicit(&engine->told, memory_order_acquire);
}
/* Let an error that was told take effect, if nobody drives who would. To be called now and then. */
void hfr_engine_settle(struct hfr_engine *engine);
/* The driver: nothing moves any more, so what was told takes effect. */
void hfr_engine_believe(struct hfr_engine *engine);
/* Copy the facts of the error, or of what was told; 0 if there is none. */
int hfr_engine_error(struct hfr_engine *engine, hfreduceErrorInfo_t *info);
/* The link to a peer, made at first use. NULL: hfr_last_error(). Driver only. */
struct hfr_link *hfr_engine_link(struct hfr_engine *engine, int peer, int vc);
/* How many peers it has links to, and what those to the index-th have carried. Any thread, beside the driver. */
int hfr_engine_connections(struct hfr_engine *engine);
void hfr_engine_connection(struct hfr_engine *engine, int index, hfreduceConnection_t *connection);
/* Wake whoever drives or waits. Any thread. */
void hfr_engine_wake(struct hfr_engine *engine);

/* --- who drives (progress.c) --- */
/* Run until `work` is done: in this thread if nobody drives, else wait for who does. deadline_ns < 0: until it ends by itself. 1
 * done, 0 time is up. */
int hfr_drive_until(struct hfr_engine *engine, struct hfreduceWork *work, int64_t deadline_ns);
/* Let the progress thread drive, at once: somebody waits. */
void hfr_drive_async(struct hfr_engine *engine);
/* Let it drive within a millisecond, and if possible without waking it, which takes as long as several launches: the caller
 * computes, or will wait and then drives himself. in_line: what was launched are collectives, behind those of the engine. */
void hfr_drive_soon(struct hfr_engine *engine, int in_line);
/* Before something is launched that nobody waits for at once: is there a thread that will drive it? SystemError: none can be
 * started. Without one, those who wait drive. */
hfreduceResult_t hfr_drive_ready(void);
/* Who only looks at a work drives its engine for a moment where no progress thread does. Any thread. */
void hfr_work_look(struct hfreduceWork *work);
/* Wait for a work that others drive. 1 done, 0 time is up. */
int hfr_work_wait(struct hfreduceWork *work, int64_t deadline_ns);
/* Wait for a work, and drive its engine meanwhile if nobody else does. Any thread. */
int hfr_work_drive(struct hfreduceWork *work, int64_t deadline_ns);
/* The driver's role, for who does more than one of the above in it. 1: it is ours. */
int hfr_drive_begin(struct hfr_engine *engine);
void hfr_drive_end(struct hfr_engine *engine);
/* Take the engine off the progress thread's list and out of its hands. */
void hfr_drive_stop(struct hfr_engine *engine);
/* Have the progress thread look at its engines at once, if it sleeps. Any thread. */
void hfr_drive_kick(void);
/* In a forked child: there is no progress thread; the next hfr_drive_async starts one. */
void hfr_drive_after_fork(void);

/* Fast path for small blocking collectives on one node: one synchronisation, no request (engine/oneshot.c). */
enum hfr_oneshot {
  HFR_ONESHOT_NO,     /* take the normal way */
  HFR_ONESHOT_DONE,   /* done or failed: *result */
  HFR_ONESHOT_BEGUN,  /* patience is over, or another thread has launched something; the caller drives the engine now and goes on
                         with hfr_engine_adopt(.., 0) */
  HFR_ONESHOT_COPIED, /* ... with hfr_engine_adopt(.., 1) */
};
enum hfr_oneshot hfr_oneshot(struct hfr_engine *engine, const struct hfr_call *call, hfreduceResult_t *result);
/* May another rank take this way for the call? Then its data must lie in the slots. */
int hfr_oneshot_takes(const struct hfr_engine *engine, const struct hfr_call *call);

/* --- completion.c --- */
/* A work has ended: tell its queue. */
void hfr_work_notify(struct hfreduceWork *work);
/* A work of so many requests, held by its caller and, as long as it runs, by its operation; one of none has ended. NULL: out of
 * memory. */
struct hfreduceWork *hfr_work_new(uint32_t nrequests);
void hfr_work_put(struct hfreduceWork *work);

/* A message that names both sides of a disagreement. */
void hfr_fail_mismatch(struct hfr_engine *engine, const struct hfr_fingerprint *mine, int peer,
                       const struct hfr_fingerprint *theirs);
/* Patience of one wait: spins, then yields, then sleeps. */
struct hfr_backoff {
  int idle;
  int64_t nap_ns;   /* of the last nap in a row */
  int64_t until_ns; /* it sleeps no longer than until then; 0: it need not know */
};
/* Nothing moved: wait a little. look() is asked once more before sleeping; when it says 1 there is no sleep. */
void hfr_backoff_wait(struct hfr_engine *engine, struct hfr_backoff *backoff, int (*look)(struct hfr_engine *, void *),
                      void *arg);
#endif
