/*
 * What the files of the NCCL layer share. Everything of hfreduce is reached through its public header.
 *
 * A ncclComm_t is a slot of a table (handle.c), so that a stale or foreign pointer is an error and no crash. Who works with a
 * slot enters and leaves it; closing it waits until all have left. What takes long is a job (job.c): it runs in the caller's
 * thread, or in threads of its own in a group or on a non-blocking communicator.
 */
#ifndef HFR_NCCL_INTERNAL_H_
#define HFR_NCCL_INTERNAL_H_
#include "../include/hfreduce.h"
#include "types.h"
#include "calls.h"

#include <pthread.h>
#include <stdatomic.h>

/* Define a public call: pnccl* strong, nccl* its weak alias. */
#define HFR_NCCL_DEFINE(result, name, parameters)                                        \
  result name parameters __attribute__((visibility("default"), weak, alias("p" #name))); \
  __attribute__((visibility("default"))) result p##name parameters

/* `expr` failed: return its code from the calling function. */
#define HFR_NCCL_TRY(expr)                        \
  do {                                            \
    ncclResult_t hfr_try_ = (expr);               \
    if (hfr_try_ != ncclSuccess) return hfr_try_; \
  } while (0)

#define HFR_NCCL_TEXT 800

/* --- error.c: results and their texts. The last error's text is kept by thread, and once more for threads that had none. --- */
/* Record what went wrong and return `code`. */
ncclResult_t hfr_nccl_fail(ncclResult_t code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* A result of hfreduce, on this communicator if it was on one, as NCCL's; its text is recorded, with NCCL's names for the calls.
 */
ncclResult_t hfr_nccl_took(ncclComm_t comm, hfreduceResult_t result);
/* The code alone; `own`: this rank itself brought it about. */
ncclResult_t hfr_nccl_code(int result, int own);
/* This thread's text. */
const char *hfr_nccl_text(void);
/* An error that another thread found, for this one to tell. */
ncclResult_t hfr_nccl_retell(ncclResult_t code, const char *text);
void hfr_nccl_log(hfreduceLogLevel_t level, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* --- handle.c --- */
struct hfr_nccl_flight;
struct hfr_nccl_region;

struct ncclComm {
  _Atomic uint32_t uses; /* how many work with it, and the marks of handle.c; futex */
  struct ncclComm *next_free;
  _Atomic(hfreduceComm_t) core; /* NULL until its job is done */
  int rank, nranks;
  int device;          /* that CommInitAll named, or the caller's when it was made; -1: none */
  ncclConfig_t config; /* complete; the strings are `name` and NULL */
  char name[32];
  int cancel; /* hfreduceConfig_t's: ends its making */
  _Atomic int revoked, finalized, suspended;
  _Atomic int calling;            /* threads that are in a collective of it */
  pthread_mutex_t lock;           /* of what follows */
  int jobs;                       /* that work with it in the background */
  ncclResult_t failed;            /* what a job or a flight ended with, if badly */
  char why[HFR_NCCL_TEXT];        /* ... */
  struct hfr_nccl_flight *flight; /* non-blocking calls under way */
  struct hfr_nccl_region *regions;
  int grow_open; /* CommGetUniqueId gave `grow_id`, which no CommGrow has used yet */
  ncclUniqueId grow_id;
};

enum hfr_nccl_need {
  HFR_NCCL_HANDLE,  /* any communicator */
  HFR_NCCL_SETTLED, /* ... that is made, with nothing going on in the background */
  HFR_NCCL_WORKING  /* ... and takes collectives: not revoked, finalized, suspended or broken */
};

/* Enter the communicator for function f. On success hfr_nccl_leave is due. */
ncclResult_t hfr_nccl_enter(ncclComm_t comm, const char *f, enum hfr_nccl_need need);
void hfr_nccl_leave(ncclComm_t comm);
/* The same for whom has entered already: one more leave is due. */
void hfr_nccl_enter_again(ncclComm_t comm);
/* What the communicator is at: ncclInProgress, ncclSuccess, or the error that broke it. */
ncclResult_t hfr_nccl_state(ncclComm_t comm);
/* A slot for a new communicator, which its maker has entered. NULL: out of memory. */
ncclComm_t hfr_nccl_new(int rank, int nranks, const ncclConfig_t *config);
/* Leave, and end the handle: nobody can enter it any more; it is freed, with hfreduce's communicator, when all have left, for
   which this call waits a while. InvalidArgument when somebody else ends it; f NULL: that is no error. */
ncclResult_t hfr_nccl_retire(ncclComm_t comm, const char *f);

/* --- config.c --- */
/* Check a configuration of any generation and complete it. NULL: `inherit`'s, or the presets. */
ncclResult_t hfr_nccl_read_config(const char *f, const ncclConfig_t *given, ncclComm_t inherit, ncclConfig_t *config);
/* What hfreduce makes of it. */
void hfr_nccl_core_config(const struct ncclComm *comm, hfreduceConfig_t *config);
ncclResult_t hfr_nccl_check_coll_config(const char *f, const ncclCollConfig_t *config);

/* --- job.c --- */
struct hfr_nccl_job {
  struct hfr_nccl_job *next;
  struct hfr_nccl_job *then,
      *all; /* as they run: the next on the same parent, by the same thread; the first of those beside it */
  ncclResult_t (*run)(struct hfr_nccl_job *job, hfreduceComm_t *made);
  ncclComm_t parent, child; /* entered, both, while the job lives; either may be NULL */
  ncclComm_t *out;          /* the caller's variable for `child` */
  hfreduceUniqueId id;
  int nranks, rank;
  int color, key;                   /* split */
  int *exclude, nexclude;           /* shrink */
  int flags;                        /* shrink; grow: 1, this rank has the id */
  int launched, background, waited; /* it runs; the caller does not wait; a thread of its own is to be joined */
  pthread_t thread;
  ncclResult_t result;
  char text[HFR_NCCL_TEXT];
};

/* A job with its communicators entered. NULL: out of memory, told. */
struct hfr_nccl_job *hfr_nccl_job_new(ncclComm_t parent, ncclComm_t child, ncclComm_t *out);
/* Run it now, in this thread or the background, or put it into this thread's group. Frees it in the end. */
ncclResult_t hfr_nccl_job_submit(const char *f, struct hfr_nccl_job *job);
/* Run several, and wait for all unless `background`. Returns the first error, or ncclInProgress. */
ncclResult_t hfr_nccl_jobs_run(struct hfr_nccl_job *list, int background);
/* They come to nothing. */
void hfr_nccl_jobs_drop(struct hfr_nccl_job *list);

/* --- group.c --- */
/* Whether this thread has a group open. */
int hfr_nccl_grouped(void);
/* The group, if one is open, comes to nothing; returns `code`, whose text is recorded already. */
ncclResult_t hfr_nccl_latch(ncclResult_t code);
/* The group takes a job. */
ncclResult_t hfr_nccl_group_job(const char *f, struct hfr_nccl_job *job);
/* A call in it sends to its own rank (1) or receives from it (-1): its counterpart must be in the same group. */
ncclResult_t hfr_nccl_self(const char *f, ncclComm_t comm, int sends);
/* The communicator goes: a group of this thread that holds calls on it comes to nothing, and lets go of it. */
void hfr_nccl_group_forget(ncclComm_t comm);

/* A collective between its checks and its issue. */
struct hfr_nccl_call {
  ncclComm_t comm;
  hfreduceComm_t core;
  int alone; /* non-blocking and ungrouped: a group of its own */
};
ncclResult_t hfr_nccl_begin(struct hfr_nccl_call *call, const char *f, ncclComm_t comm, cudaStream_t stream);
ncclResult_t hfr_nccl_end(struct hfr_nccl_call *call, hfreduceResult_t result);
/* It is not issued after all. */
void hfr_nccl_drop(struct hfr_nccl_call *call);
/* Under comm->lock: what non-blocking calls have come to, noted in comm. 1: they are under way. */
int hfr_nccl_flying(ncclComm_t comm);
/* The communicator goes: let go of them. */
void hfr_nccl_land(ncclComm_t comm);

/* --- memory.c --- */
/* The communicator goes: so do its registrations. */
void hfr_nccl_forget_regions(ncclComm_t comm);

/* --- process.c --- */
/* Once a process, when the first communicator is made: what the user should know of his surroundings. */
void hfr_nccl_look_around(void);
/* Value of an environment variable that is an integer; `otherwise` where there is none. */
int hfr_nccl_env(const char *name, int otherwise);
#endif
