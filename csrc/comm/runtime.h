/*
 * What the process' side of all communicators shares: the state under one lock, and what its parts call of each other. Inside
 * comm/ only.
 *
 *   listen.c ─► a connection proves who it is ─┬─► rendezvous.c: ranks that join meet at a root
 *                                              ├─► control.c: deaths, aborts and errors reach all ranks
 *                                              └─► the engine's network: data
 *   watcher.c: the thread that calls them          runtime.c: the life of the process, and who is registered
 *
 * Every function here is called with hfr_rt.lock held, and nothing blocks on a peer.
 */
#ifndef HFR_COMM_RUNTIME_H_
#define HFR_COMM_RUNTIME_H_
#include "comm.h"

#include "../base/auth.h"

enum hfr_watch_kind { HFR_WATCH_LISTENER, HFR_WATCH_PENDING, HFR_WATCH_JOINER };
struct hfr_root;
/* A descriptor that the watcher looks at, beside the control connections of communicators. */
struct hfr_watch {
  struct hfr_watch *next;
  enum hfr_watch_kind kind;
  int fd, slot;
  int64_t since_ns;
  struct hfr_addr addr; /* LISTENER; PENDING: the peer's, without its port */
  int users;            /* LISTENER: communicators and roots that are reached through it */
  struct hfr_auth auth; /* PENDING */
  struct hfr_conn conn; /* JOINER */
  struct hfr_root *root;
  int rank, drop;
};

extern struct hfr_runtime {
  pthread_mutex_t lock;
  int started, kick_fd, pending; /* pending: handshakes that have not ended */
  struct hfr_watch *watches;
  struct hfr_root *roots;
  struct hfreduceComm *comms;
  long refused;
} hfr_rt;

/* --- runtime.c --- */
/* Start the watcher, once a process. */
hfreduceResult_t hfr_runtime_start(void);

/* --- watcher.c --- */
/* Have the watcher look at everything anew. Needs no lock. */
void hfr_watcher_kick(void);
/* Watch a descriptor; it goes to the head of the list. NULL: out of memory. */
struct hfr_watch *hfr_watch_add(enum hfr_watch_kind kind, int fd);
/* The watcher thread. It takes the lock itself. */
void *hfr_watcher_main(void *arg);

/* --- listen.c --- */
/* A listener is ready: take in all who have come. Each has to prove who it is. */
void hfr_listen_accept(struct hfr_watch *listener);
/* One user more or less of the listener at exactly this address; with the last it closes. use: 0, or -1: there is none. */
int hfr_listen_use(const struct hfr_addr *addr);
void hfr_listen_release(const struct hfr_addr *addr);
/* Go on with a handshake. 1: the watch is finished with, and its descriptor given away or closed. */
int hfr_listen_pending(struct hfr_watch *pending, int ready, int64_t now_ns);

/* --- rendezvous.c --- */
/* The secret of the root that has this id, and HFR_AUTH_WELCOME; or HFR_AUTH_SECRET: there is one of this name with another
 * secret; or HFR_AUTH_UNKNOWN. */
enum hfr_auth_verdict hfr_root_secret(uint64_t comm_id, uint64_t name, uint8_t secret[16]);
/* A connection for a root was refused: warn, now and then, and let the root's errors tell of it. Without a name it may be for
 * any. Nothing of it is proven, so no root fails. */
void hfr_root_refused(uint64_t comm_id, uint64_t name, const char *from, const char *why);
/* Somebody who proved to know the root's secret speaks another protocol: nobody can join, and all hear why. */
void hfr_root_mismatch(uint64_t comm_id, const char *text);
/* Somebody who proved to know it wants to join: watch him. 0, or -1: there is no such root. */
int hfr_root_welcome(uint64_t comm_id, int fd);
/* A joiner's connection is ready. */
void hfr_root_event(struct hfr_watch *joiner);
/* Tell those who wait whom they wait for, and forget roots that failed long ago. */
void hfr_root_tick(int64_t now_ns);

/* --- control.c --- */
/* The control connection to `peer` is ready. */
void hfr_control_event(struct hfreduceComm *comm, int peer);
/* What broke the engine came from a half: tell the ranks of the other half, unless that has been done. */
void hfr_control_tell(struct hfreduceComm *comm);
/* Do that, and say on all of them that this process lives; who has been silent too long is lost. */
void hfr_control_tick(struct hfreduceComm *comm, int64_t now_ns);
#endif
