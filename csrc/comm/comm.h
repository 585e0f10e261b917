/* A communicator, and the process' side of it: listeners, the watcher thread, who is registered. */
#ifndef HFR_COMM_COMM_H_
#define HFR_COMM_COMM_H_
#include "../base/socket.h"
#include "../coll/coll.h"
#include "../engine/engine.h"
#include "conn.h"
#include "handle.h"

/* The inside of a hfreduceUniqueId. */
struct hfr_uid {
  uint32_t magic, version;
  uint64_t comm_id;
  uint8_t secret[16];
  struct hfr_addr root;
  uint8_t by_address; /* rank 0 opens the root itself (hfreduceUniqueIdFromAddress) */
  uint8_t local;      /* loopback: all ranks are on this machine */
  uint8_t pad[2];
  /* of a shrunken communicator, else 0: the name of its rendezvous, if not comm_id; and of whom it consists, on which all must
   * agree */
  uint64_t root_id, members;
  uint64_t name; /* by address: of the rendezvous, whatever the secret; tells another secret from another communicator */
};
#define HFR_UID_MAGIC 0x44557266u

/* What a rank tells the root of itself, and all others learn of it. */
struct hfr_record {
  int32_t rank, nranks;
  uint8_t hostid[16], machine[16];
  char host[64];
  struct hfr_addr addr; /* of its process' listener */
  uint32_t pid;
  uint64_t members;                       /* of its unique id */
  uint8_t transports[HFR_TRANSPORTS_MAX]; /* that it can use between nodes, best first; rank 0's order holds */
  struct hfr_links links;                 /* of its device */
  uint32_t lends;                         /* segments that it may have in its lending area; 0: it has no driver */
  uint64_t segment;                       /* HFREDUCE_CUDA_SEGMENT */
  /* rank 0's values hold for all */
  uint32_t slots, algo, streams, checksum;
  uint64_t chunk, nvlink_min;
};

struct hfr_staging;
struct hfr_pairs;
struct hfreduceComm {
  struct hfr_handle handle;
  pid_t pid;
  int forked; /* set in a forked child: the communicator is the parent's. A flag, because getpid() is a system call */
  char name[32];
  struct hfr_uid uid;
  int rank, nranks;
  struct hfr_layout layout;
  struct hfr_arena arena;
  size_t lend; /* bytes of the arena's lending areas */
  struct hfr_net net;
  struct hfr_transport_offer offer;
  struct hfr_engine engine;
  _Atomic int engine_up; /* engine and arena are usable; the watcher looks */
  char (*hosts)[64];
  int ranks_here; /* on this machine, of whatever nodes */
  struct hfr_addr *addrs;
  struct hfr_addr door[2]; /* listeners that it uses: its process', and by address the root's; family 0: none */
  hfreduceConfig_t config;
  double timeout, join_timeout; /* seconds: of an operation; of joining, which is no more */
  const int *cancel;            /* the config's, while joining */
  int (*asks)(void *arg);       /* the config's `interrupted`, while joining, and its argument */
  void *asks_arg;
  int64_t asked_ns;          /* when it was called last */
  int interrupted;           /* it has said so */
  int64_t join_ns, speak_ns; /* when joining began, and when it says next whom it waits for (0: not looked up yet) */
  struct hfr_shrunk *shrunk; /* what it was shrunk to (shrink.c) */
  _Atomic int closing;
  /* control connections: rank 0 has one to each rank, the others one to rank 0 ([0]). Under the runtime's lock. */
  struct hfr_conn *control;
  int ncontrol;
  struct hfr_fingerprint *stuck; /* rank 0: what each rank said it waits in; seq 0: nothing */
  /* written by the watcher, awaited by who joins */
  _Atomic uint32_t go;             /* futex: moves when the state below does */
  _Atomic int ready, went, failed; /* rank 0: how many others are; all are ready; an error came before that */
  hfreduceErrorInfo_t early;       /* valid once failed */
  _Atomic int untold;              /* the engine's error came from a half: ranks of the other half have not heard of it */
  /* the watcher's: collectives begun when it last looked, and for how many looks */
  uint64_t seen;
  int idle;
  struct hfr_staging *staging; /* its device side; NULL before the first call with a stream or device memory (stream.h) */
  struct hfr_staging
      *provided; /* made for a context that was there when the communicator was, until the first such call takes it */
  int device;    /* that it will work on, as far as known when it was made; -1: none */
  int partner;   /* rank whose device NVLink joins with this one's, where all ranks have one; -1: none */
  uint64_t nvlink_min;
  _Atomic(struct hfr_pairs *) pairs; /* NULL: none, or no use is made of them (pairs.h); the watcher looks */
  struct hfreduceComm *whole;        /* this one is half of it, and not the user's */
  int devices;                       /* this process has a driver: pointers may be a device's */
  struct hfreduceComm *next;         /* registered */
  /* user-made ops: values from hfreduceNumOps */
  struct hfr_premul {
    int used;
    hfreduceDataType_t dtype;
    const void *at; /* where each call reads the factor; NULL: it is `scalar` */
    uint8_t scalar[8];
    const void *from; /* device-visible: read by each operation; NULL: `scalar` has it */
  } * ops;
  int nops;
  pthread_mutex_t ops_lock;
};

/* The process' side (runtime.h): */
/* --- listen.c --- */
/* Start what a process needs (watcher thread, listener). The listener's address goes to *addr: loopback; or where
   HFREDUCE_SOCKET_IFNAME says; or, that unset, on the way to `root` (NULL: not known yet). The caller is a user of the listener
   until it calls hfr_runtime_unlisten; with its last user a listener closes. */
hfreduceResult_t hfr_runtime_listen(int loopback, const struct hfr_addr *root, struct hfr_addr *addr);
/* Also listen on exactly this address. */
hfreduceResult_t hfr_runtime_listen_at(struct hfr_addr *addr);
void hfr_runtime_unlisten(const struct hfr_addr *addr);
/* Strangers refused so far. */
long hfr_runtime_refused(void);

/* --- rendezvous.c --- */
static inline uint64_t hfr_uid_root(const struct hfr_uid *uid) { return uid->root_id ? uid->root_id : uid->comm_id; }
/* Serve the rendezvous of a communicator in this process, as a user of the listener at its address until all have joined. */
hfreduceResult_t hfr_runtime_open_root(const struct hfr_uid *uid);
/* Joining failed and its root is in this process: let the ranks that come late hear why before this process may end; at most
 * limit_ns. */
void hfr_runtime_linger(const struct hfr_uid *uid, int64_t limit_ns);

/* --- control.c --- */
/* Hand an authenticated control connection to the watcher (ranks other than 0). */
void hfr_runtime_control(struct hfreduceComm *comm, int fd);
/* Send a frame on all control connections but `except`. */
void hfr_runtime_flood(struct hfreduceComm *comm, enum hfr_frame type, const void *payload, size_t bytes, int except);
/* A collective waits long here: tell rank 0, who compares. */
void hfr_runtime_stuck(struct hfreduceComm *comm, const struct hfr_fingerprint *fp);

/* --- runtime.c --- */
hfreduceResult_t hfr_runtime_add(struct hfreduceComm *comm);
/* Leave: say BYE if the communicator stood, forget the connections. */
void hfr_runtime_remove(struct hfreduceComm *comm);
/* Ranks of this communicator that this process has, this one among them. */
int hfr_runtime_ranks_here(const struct hfreduceComm *comm);

/* --- comm.c --- */
/* Seconds that closing waits for what still runs, at most. */
#define HFR_CLOSE_LIMIT 30.0
static inline int64_t hfr_close_limit_ns(const struct hfreduceComm *comm) {
  return (int64_t)((comm->timeout < HFR_CLOSE_LIMIT ? comm->timeout : HFR_CLOSE_LIMIT) * 1e9);
}
void hfr_uid_pack(const struct hfr_uid *uid, hfreduceUniqueId *id);
/* How to make a communicator on behalf of a call on `comm`: by the call's config, unless it is NULL. Closing `comm` calls it off.
 */
hfreduceConfig_t hfr_comm_heir(struct hfreduceComm *comm, const hfreduceConfig_t *config);

/* Join: hfreduceCommInitRankConfig is this, and the arguments are checked here. whole: the new one is a
   half of it (NULL: of none). */
hfreduceResult_t hfr_comm_init(hfreduceComm_t *comm, int nranks, const hfreduceUniqueId *id, int rank,
                               const hfreduceConfig_t *config, struct hfreduceComm *whole);
/* End every wait on comm, on all its ranks. The caller is inside comm, in the process that made it. */
void hfr_comm_abort(struct hfreduceComm *comm);

/* --- shrink.c --- */
void hfr_shrunk_free(struct hfreduceComm *comm);

/* Make a communicator of some ranks, as hfreduceCommSplit, that is a half of `whole`: with its geometry, and no pairs of its own.
 */
hfreduceResult_t hfr_comm_split_half(struct hfreduceComm *whole, int color, struct hfreduceComm **half);
/* Out of everybody's reach, then gone. */
void hfr_comm_dispose(struct hfreduceComm *comm);

/* --- pairs.c --- */
/* Set comm->partner from what the ranks have told of their devices. */
hfreduceResult_t hfr_pairs_match(struct hfreduceComm *comm, const struct hfr_record *table);
/* All ranks together, once the communicator stands: agree on pairs and make them. Those that cannot be made are none. */
hfreduceResult_t hfr_pairs_make(struct hfreduceComm *comm);
/* An engine broke: the other one of whole and half does too. */
void hfr_pairs_broke(struct hfreduceComm *comm, const hfreduceErrorInfo_t *info, int tell);
/* With all that is a half's; the whole is in nobody's reach any more. */
void hfr_pairs_destroy(struct hfreduceComm *comm);
struct hfreduceComm *hfr_pairs_half(const struct hfreduceComm *comm); /* NULL: none */

/* --- bootstrap.c --- */
hfreduceResult_t hfr_bootstrap(struct hfreduceComm *comm, int64_t deadline_ns);
/* How the ranks of one node would do it here, by size, in a line: what rank 0 with this process' parameters and caches chooses;
 * and in another what becomes of device memory, where there is a driver.
 * Writes at most size bytes, the NUL included; returns how many without it. */
size_t hfr_bootstrap_describe(char *text, size_t size);

/* --- group.c --- */
/* What every public call begins and ends with that may be part of a group of its thread, and be told by the group's end if it is
   wrong: it enters `comm`, and leaves if it came in; leave returns `result`. coll: whether it is a collective. */
hfreduceResult_t hfr_call_enter(hfreduceComm_t comm, const char *function, int coll);
hfreduceResult_t hfr_call_leave(hfreduceComm_t comm, int coll, hfreduceResult_t result);
/* Take a checked call: into the thread's open group, or launch it and wait; or put it into its stream's order. */
hfreduceResult_t hfr_issue(struct hfreduceComm *comm, const struct hfr_call *call, hfreduceStream_t stream);
/* Calls on host memory that the library makes for itself: they run now, though the thread may have a group open, and to their
   end. The caller is inside, or the communicator is nobody's yet. limit_ns: the deadline; 0: the communicator's. config: whose
   `interrupted` is asked meanwhile (NULL: nobody is); when it says so, comm is aborted, for its ranks no longer agree on what
   comes next. */
hfreduceResult_t hfr_gather_now(struct hfreduceComm *comm, const void *mine, void *all, size_t bytes, int64_t limit_ns,
                                const hfreduceConfig_t *config);
hfreduceResult_t hfr_min_now(struct hfreduceComm *comm, uint64_t *value);
#endif
