/*
 * Memory, registrations and windows. hfreduce registers by itself what it needs, so a registration is a promise that is checked
 * and kept; what would give a GPU's kernels a window on other ranks' memory is refused.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

/* What CommRegister and CommWindowRegister hand out. */
struct hfr_nccl_region {
  struct hfr_nccl_region *next;
  void *ptr;
  size_t size;
  int window;
};

HFR_NCCL_DEFINE(ncclResult_t, ncclMemAlloc, (void **ptr, size_t size)) {
  if (!ptr) return hfr_nccl_fail(ncclInvalidArgument, "ncclMemAlloc: ptr is NULL");
  return hfr_nccl_took(NULL, hfreduceDeviceMemAlloc(ptr, size));
}

HFR_NCCL_DEFINE(ncclResult_t, ncclMemFree, (void *ptr)) { return hfr_nccl_took(NULL, hfreduceMemFree(ptr)); }

void hfr_nccl_forget_regions(ncclComm_t comm) {
  for (struct hfr_nccl_region *r = comm->regions, *next; r; r = next) {
    next = r->next;
    free(r);
  }
  comm->regions = NULL;
}

static ncclResult_t add(const char *f, ncclComm_t comm, void *ptr, size_t size, int window, struct hfr_nccl_region **out) {
  if (!ptr || !size)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: buff is %p with size %zu; give memory to register", f, ptr, size);
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_WORKING));
  struct hfr_nccl_region *r = malloc(sizeof *r);
  if (r) {
    pthread_mutex_lock(&comm->lock);
    *r = (struct hfr_nccl_region){comm->regions, ptr, size, window};
    comm->regions = r;
    pthread_mutex_unlock(&comm->lock);
  }
  hfr_nccl_leave(comm);
  *out = r;
  return r ? ncclSuccess : hfr_nccl_fail(ncclSystemError, "%s: out of memory for a handle", f);
}

/* The communicator's region that is called `handle`; taken out of its list if `take`. NULL: there is none. Under the lock. */
static struct hfr_nccl_region *find(ncclComm_t comm, const void *handle, int window, int take) {
  for (struct hfr_nccl_region **at = &comm->regions; *at; at = &(*at)->next)
    if (*at == handle && (*at)->window == window) {
      struct hfr_nccl_region *r = *at;
      if (take) *at = r->next;
      return r;
    }
  return NULL;
}

static ncclResult_t drop(const char *f, ncclComm_t comm, const void *handle, int window) {
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_HANDLE));
  pthread_mutex_lock(&comm->lock);
  struct hfr_nccl_region *r = find(comm, handle, window, 1);
  pthread_mutex_unlock(&comm->lock);
  free(r);
  hfr_nccl_leave(comm);
  if (r || !handle) return ncclSuccess;
  return hfr_nccl_fail(ncclInvalidArgument, "%s: %p was not registered with this communicator, or no longer is", f, handle);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommRegister, (const ncclComm_t comm, void *buff, size_t size, void **handle)) {
  static const char f[] = "ncclCommRegister";
  struct hfr_nccl_region *region = NULL;
  if (!handle) return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidArgument, "%s: handle is NULL", f));
  *handle = NULL;
  HFR_NCCL_TRY(hfr_nccl_latch(add(f, comm, buff, size, 0, &region)));
  *handle = region;
  return ncclSuccess;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommDeregister, (const ncclComm_t comm, void *handle)) {
  return hfr_nccl_latch(drop("ncclCommDeregister", comm, handle, 0));
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommWindowRegister,
                (ncclComm_t comm, void *buff, size_t size, ncclWindow_t *win, int winFlags)) {
  static const char f[] = "ncclCommWindowRegister";
  const int known = NCCL_WIN_COLL_SYMMETRIC | NCCL_WIN_STRICT_ORDERING | NCCL_WIN_GIN_ONLY | NCCL_WIN_CFT_COUNTED;
  struct hfr_nccl_region *region = NULL;
  if (!win) return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidArgument, "%s: win is NULL", f));
  *win = NULL;
  if (winFlags & ~known)
    return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidArgument, "%s: winFlags are %#x, which are not known", f, (unsigned)winFlags));
  if (winFlags)
    return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidUsage,
                                        "%s: winFlags are %#x, but hfreduce has no symmetric memory: its collectives run on the "
                                        "CPU and take any buffer as it is; leave the registration out, or give NCCL_WIN_DEFAULT",
                                        f, (unsigned)winFlags));
  HFR_NCCL_TRY(hfr_nccl_latch(add(f, comm, buff, size, 1, &region)));
  *win = (ncclWindow_t)region;
  return ncclSuccess;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclCommWindowDeregister, (ncclComm_t comm, ncclWindow_t win)) {
  return hfr_nccl_latch(drop("ncclCommWindowDeregister", comm, win, 1));
}

HFR_NCCL_DEFINE(ncclResult_t, ncclWinGetUserPtr, (ncclComm_t comm, ncclWindow_t win, void **outUserPtr)) {
  static const char f[] = "ncclWinGetUserPtr";
  if (!outUserPtr) return hfr_nccl_fail(ncclInvalidArgument, "%s: outUserPtr is NULL", f);
  *outUserPtr = NULL;
  HFR_NCCL_TRY(hfr_nccl_enter(comm, f, HFR_NCCL_HANDLE));
  pthread_mutex_lock(&comm->lock);
  struct hfr_nccl_region *r = find(comm, win, 1, 0);
  if (r) *outUserPtr = r->ptr;
  pthread_mutex_unlock(&comm->lock);
  hfr_nccl_leave(comm);
  return r ? ncclSuccess : hfr_nccl_fail(ncclInvalidArgument, "%s: win is no window of this communicator", f);
}
