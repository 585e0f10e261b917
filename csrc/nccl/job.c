/*
 * Jobs: the making of communicators, and finalizing, which wait for other ranks. In a group every job gets a thread, since one
 * thread may hold several ranks of one communicator; on a non-blocking communicator they go on in the background.
 */
#include "internal.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

struct hfr_nccl_job *hfr_nccl_job_new(ncclComm_t parent, ncclComm_t child, ncclComm_t *out) {
  struct hfr_nccl_job *job = calloc(1, sizeof *job);
  if (!job) {
    hfr_nccl_fail(ncclSystemError, "out of memory for a job");
    return NULL;
  }
  *job = (struct hfr_nccl_job){.parent = parent, .child = child, .out = out};
  return job;
}

static void count_job(ncclComm_t comm, int more) {
  if (!comm) return;
  pthread_mutex_lock(&comm->lock);
  comm->jobs += more;
  pthread_mutex_unlock(&comm->lock);
}

/* From its launch to its end a job's communicators are in progress. */
static void mark(struct hfr_nccl_job *job) {
  job->launched = 1;
  count_job(job->parent, 1);
  count_job(job->child, 1);
}

static void unmark(struct hfr_nccl_job *job) {
  if (!job->launched) return;
  count_job(job->parent, -1);
  count_job(job->child, -1);
}

static void note_failure(ncclComm_t comm, const struct hfr_nccl_job *job) {
  if (!comm) return;
  pthread_mutex_lock(&comm->lock);
  comm->failed = job->result;
  memcpy(comm->why, job->text, sizeof comm->why);
  pthread_mutex_unlock(&comm->lock);
}

/* The caller waits, and hears of a failure by the result: he gets no handle, and the parent stays as it was. */
static void conclude(struct hfr_nccl_job *job) {
  unmark(job);
  if (job->child && !job->result) hfr_nccl_leave(job->child);
  if (job->child && job->result) {
    if (job->out) *job->out = NULL;
    hfr_nccl_retire(job->child, NULL);
  }
  if (job->parent) hfr_nccl_leave(job->parent);
  free(job->exclude);
  free(job);
}

/* Nobody waits: who asks for the communicator's state hears how it went. */
static void conclude_unseen(struct hfr_nccl_job *job) {
  ncclComm_t parent = job->parent, child = job->child;
  if (job->result) note_failure(child ? child : parent, job);
  unmark(job);
  free(job->exclude);
  free(job);
  if (parent) hfr_nccl_leave(parent);
  if (child) hfr_nccl_leave(child);
}

/* The others of its group may wait for ranks that will not come. */
static void call_off(struct hfr_nccl_job *all) {
  for (struct hfr_nccl_job *job = all; job; job = job->next)
    if (job->child) __atomic_store_n(&job->child->cancel, 1, __ATOMIC_RELEASE);
}

static void execute(struct hfr_nccl_job *job) {
  hfreduceComm_t made = NULL;
  job->result = job->run(job, &made);
  if (job->result) memcpy(job->text, hfr_nccl_text(), sizeof job->text);
  if (!made) return;
  hfreduceCommInfo_t info;
  if (!hfreduceCommGetInfo(made, &info)) job->child->nranks = info.nranks, job->child->rank = info.rank;
  atomic_store_explicit(&job->child->core, made, memory_order_release); /* pairs with check_settled(): rank and nranks stand */
}

static void *job_main(void *arg) {
  for (struct hfr_nccl_job *job = arg, *then; job; job = then) {
    then = job->then;
    execute(job);
    if (job->background)
      conclude_unseen(job);
    else if (job->result)
      call_off(job->all);
  }
  return NULL;
}

static ncclResult_t start_thread(struct hfr_nccl_job *job) {
  pthread_attr_t attr;
  sigset_t all, old;
  pthread_attr_init(&attr);
  if (job->background) pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* signals belong to the program's threads */
  int error = pthread_create(&job->thread, &attr, job_main, job);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attr);
  if (!error) return ncclSuccess;
  hfr_nccl_fail(ncclSystemError, "cannot start a thread for a communicator: %s", strerror(error));
  for (; job; job = job->then) {
    job->result = ncclSystemError;
    memcpy(job->text, hfr_nccl_text(), sizeof job->text);
  }
  return ncclSystemError;
}

void hfr_nccl_jobs_drop(struct hfr_nccl_job *list) {
  for (struct hfr_nccl_job *job = list, *next; job; job = next) {
    next = job->next;
    job->result = ncclInvalidUsage;
    conclude(job);
  }
}

/* Jobs on one parent talk over it, so they run one after the other, in the order of the calls. 1: a thread is due for this one.
 */
static int leads(struct hfr_nccl_job *list, struct hfr_nccl_job *job) {
  for (struct hfr_nccl_job *earlier = list; job->parent && earlier != job; earlier = earlier->next) {
    if (earlier->parent != job->parent) continue;
    while (earlier->then) earlier = earlier->then;
    earlier->then = job;
    return 0;
  }
  return 1;
}

static ncclResult_t run_background(struct hfr_nccl_job *list) {
  ncclResult_t result = ncclInProgress;
  struct hfr_nccl_job *first[2] = {NULL, NULL}, **tail = first; /* those that lead: a job is gone as soon as its thread is done */
  for (struct hfr_nccl_job *job = list; job; job = job->next) {
    job->background = 1;
    if (leads(list, job)) {
      *tail = job;
      tail = &job->all;
    }
  }
  for (struct hfr_nccl_job *job = first[0], *next; job; job = next) {
    next = job->all;
    if (!start_thread(job)) continue;
    result = ncclSystemError;
    for (struct hfr_nccl_job *each = job, *then; each; each = then) {
      then = each->then;
      conclude_unseen(each);
    }
  }
  return result;
}

static ncclResult_t run_waiting(struct hfr_nccl_job *list) {
  ncclResult_t result = ncclSuccess;
  char text[HFR_NCCL_TEXT] = "";
  for (struct hfr_nccl_job *job = list; job; job = job->next) {
    job->all = list;
    job->waited = leads(list, job);
  }
  for (struct hfr_nccl_job *job = list; job; job = job->next)
    if (job->waited && start_thread(job)) {
      job->waited = 0;
      call_off(list);
    }
  for (struct hfr_nccl_job *job = list; job; job = job->next)
    if (job->waited) pthread_join(job->thread, NULL);
  for (struct hfr_nccl_job *job = list, *next; job; job = next) {
    next = job->next;
    /* who was called off is not the cause */
    if (job->result && (!result || (result == ncclInvalidUsage && job->result != ncclInvalidUsage))) {
      result = job->result;
      memcpy(text, job->text, sizeof text);
    }
    conclude(job);
  }
  return result ? hfr_nccl_retell(result, text) : ncclSuccess;
}

ncclResult_t hfr_nccl_jobs_run(struct hfr_nccl_job *list, int background) {
  for (struct hfr_nccl_job *job = list; job; job = job->next) mark(job);
  return background ? run_background(list) : run_waiting(list);
}

ncclResult_t hfr_nccl_job_submit(const char *f, struct hfr_nccl_job *job) {
  ncclComm_t leading = job->parent ? job->parent : job->child;
  if (job->out) *job->out = job->child;
  if (hfr_nccl_grouped()) return hfr_nccl_group_job(f, job);
  mark(job);
  if (!leading->config.blocking) return run_background(job);
  execute(job); /* here: no thread, and the caller's device */
  ncclResult_t result = job->result;
  char text[HFR_NCCL_TEXT];
  memcpy(text, job->text, sizeof text);
  conclude(job);
  return result ? hfr_nccl_retell(result, text) : ncclSuccess;
}
