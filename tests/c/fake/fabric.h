/*
 * A test double of libibverbs and of the network under it: reliable queue pairs between the processes of one machine, with no
 * support by the kernel. It implements what verbs_abi.h declares, strictly: keys, bounds, access, states, masks, sizes of queues,
 * and the order of reliable connections; what would hang or corrupt on a real device ends the process with a line that says why.
 *
 *   post_send ──► the queue pair's ring (its process) ──pump()──► peer's memory (process_vm_writev)
 *                                                          └────► completions of both ends (the fabric, shared)
 *
 * The fabric is a file that all processes map: queue pairs, memory regions and completion queues, under one lock. A message is
 * delivered by its sender, whole; what cannot be delivered now (peer not there, port down, no receive posted) stays at the head
 * of the ring until its retries are used up, as on a real one.
 *
 * Environment:
 *   HFREDUCE_TEST_SYSFS  directory with one directory a device (fake0, fake1, ...); the fabric is .fabric in it
 *   FAKE_VERBS           faults, see script.c; read with the process' first call
 */
#ifndef FAKE_FABRIC_H_
#define FAKE_FABRIC_H_
#include "transport/verbs_abi.h"

#include <pthread.h>
#include <sys/types.h>

#define FAKE_DEVICES 4
#define FAKE_QPS 4096
#define FAKE_MRS 4096
#define FAKE_CQS 1024
#define FAKE_CQE 4096
#define FAKE_RQ 512
#define FAKE_INLINE 512
#define FAKE_SGE 4

/* Entries of the fabric belong to a process; pid 0: free. */
struct fake_region {
  pid_t pid;
  uint32_t key, pd;
  uint64_t begin, bytes;
  int access;
};
struct fake_completion {
  struct hfr_ib_wc wc;
  int64_t visible_ns; /* not to be polled before */
  uint32_t retired;   /* of a send: so many are no longer in the ring */
  int recv;
};
struct fake_completions {
  pid_t pid;
  uint32_t channel; /* 0: none */
  uint32_t id, capacity, count;
  int armed;
  struct fake_completion entry[FAKE_CQE];
};
struct fake_pair {
  pid_t pid;
  uint32_t qp_num, pd;
  int device, state, port_down, broken; /* broken: its device died */
  int send_cq, recv_cq, access;
  uint32_t dest, dlid, sq_psn, rq_psn;
  int global; /* addressed by dgid, else by dlid */
  union hfr_ib_gid dgid;
  uint32_t max_recv, rq_first, rq_count;
  uint64_t rq_id[FAKE_RQ];
  int64_t send_visible_ns, recv_visible_ns; /* of the last completion: none overtakes another */
};
struct fake_fabric {
  uint64_t magic, writes, bytes; /* what was delivered, ever */
  pthread_mutex_t lock;
  uint32_t ids, said; /* the last one given; that this is no RDMA */
  struct fake_pair pair[FAKE_QPS];
  struct fake_region region[FAKE_MRS];
  struct fake_completions cq[FAKE_CQS];
};

struct hfr_ib_pd {
  struct fake_context *context;
  uint32_t id;
};
struct fake_context {
  struct hfr_ib_context base; /* first */
  int device;
};
struct fake_channel {
  struct hfr_ib_comp_channel base;
  uint32_t id;
  int socket, cqs;
};
struct fake_cq {
  struct hfr_ib_cq base;
  int index, timer, unacked, pairs;
  void *context;
  struct fake_channel *channel;
};
struct fake_send {
  uint64_t id, remote;
  struct hfr_ib_sge sge[FAKE_SGE];
  int nsge, opcode, number; /* number: which of this process, from 1 */
  unsigned flags;
  uint32_t imm, rkey, posted;
  uint8_t data[FAKE_INLINE];
};
struct fake_qp {
  struct hfr_ib_qp base;
  int index, rnr_retry, events;
  uint32_t max_send, max_sge, max_inline;
  uint32_t posted, executed, retired;
  int sq_sig_all;
  int64_t retry_ns, rnr_ns; /* how long it tries */
  int64_t stalled_ns;       /* since when the head could not be delivered; 0: it was not tried */
  struct fake_send *ring;
};

/* What this process has; emptied after a fork. Guarded by the fabric's lock. */
struct fake_process {
  pid_t pid;
  struct fake_qp *qp[FAKE_QPS];
  struct fake_cq *cq[FAKE_CQS];
  struct fake_context *context[FAKE_DEVICES];
  int port_down[FAKE_DEVICES], dead[FAKE_DEVICES];
  int64_t port_up_ns[FAKE_DEVICES]; /* when a port that is down comes back; 0: never by itself */
  int qps, cqs, regions, channels;
  uint64_t pinned; /* bytes registered */
};
extern struct fake_process fake_mine;
extern struct fake_fabric *fake_fabric; /* NULL until fake_lock() */

/* --- fabric.c --- */
/* Map the fabric when that has not been done, and lock it. NULL: there is none, errno says why. */
struct fake_fabric *fake_lock(void);
void fake_unlock(void);
const char *fake_directory(void);
/* Say what is wrong and end the process. */
_Noreturn void fake_die(const char *format, ...) __attribute__((format(printf, 1, 2)));
int fake_alive(pid_t pid);
int64_t fake_now_ns(void);
/* A datagram to the abstract socket `name`; nobody there: lost. */
void fake_tell(const char *name, const void *what, size_t bytes);
/* Is this call to fail, by the script or because the device is dead? Its errno, or 0: and locked. */
int fake_fails(const char *call, int device);
int fake_device_of(const struct hfr_ib_context *context);
/* The first free of n entries of `size` bytes that begin with a pid; -1: ENOMEM. Those of dead processes are free. */
int fake_free_entry(void *table, size_t size, int n);
/* A bound datagram socket of this name; -1: errno. */
int fake_listen(const char *name);
int fake_async_listen(int device);
void fake_channel_name(uint32_t id, char name[64]);
void fake_gid(int device, int index, union hfr_ib_gid *gid);
/* All below: locked. */
/* A completion of pair p, which is `retired` sends long in the past; recv: of its receive queue. */
void fake_complete(struct fake_pair *p, int recv, const struct hfr_ib_wc *wc, uint32_t retired);
/* Into the error state: what is posted comes back flushed. */
void fake_break(struct fake_pair *p);
/* Execute what can be executed now. */
void fake_pump(struct fake_qp *q);
/* An asynchronous event (enum ibv_event_type) for the process that has pair p, about it or about its port. */
void fake_event(const struct fake_pair *p, int type);

/* --- pairs.c --- */
int fake_post_send(struct hfr_ib_qp *qp, struct hfr_ib_send_wr *wr, struct hfr_ib_send_wr **bad);
int fake_post_recv(struct hfr_ib_qp *qp, struct hfr_ib_recv_wr *wr, struct hfr_ib_recv_wr **bad);

/* --- script.c --- */
/* Read what is in FAKE_VERBS or what a test says later; what was counted begins anew. */
void fake_script_read(const char *text);
/* Should the next call of this name fail? Its errno, or 0. */
int fake_script_call(const char *name);
int fake_script_next_send(void);         /* its number */
int fake_script_send_status(int number); /* of this send; 0 */
int fake_script_receive_status(void);    /* of the next receive; 0 */
int fake_script_event(int number);       /* to happen before this send; -1: none */
int64_t fake_script_delay_ns(void);      /* of the next completion */
uint32_t fake_script_inline(void);       /* the most that fits */
uint32_t fake_script_least_inline(void);
int fake_script_memlock(void);         /* the limit on locked memory holds */
int fake_script_vector(void);          /* -1: any */
int fake_script_port_down(int device); /* at first */
int64_t fake_script_flap_ns(void);     /* how long a port that fails is down; 0: for good */
int fake_script_link_layer(int device);
int fake_script_subnet(int device);
int fake_script_grh_required(int device);
#endif
