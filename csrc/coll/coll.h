/* Planners: one file a collective, all pure. */
#ifndef HFR_COLL_COLL_H_
#define HFR_COLL_COLL_H_
#include "../engine/plan.h"

/* Plan a call for this rank. `plan` comes zeroed but for `stage` and `cap` (reused memory). The call must have been checked.
 * SystemError when out of memory. */
hfreduceResult_t hfr_plan_build(struct hfr_plan *plan, const struct hfr_layout *layout, const struct hfr_geometry *geometry,
                                const struct hfr_call *call);

/* Below: for planners only. Roles of stages; a planner uses those that it needs. */
enum hfr_role {
  ROLE_IN,     /* user -> IN slot, published */
  ROLE_RED,    /* IN slots -> my share in my RES slot */
  ROLE_OUT,    /* slots -> user, published */
  ROLE_UP,     /* local sources and children -> partial sum; two, one a tree */
  ROLE_UPSEND, /* partial -> parent; two */
  ROLE_XSEND,  /* to or from a root that is not the tree's: extra hop; two */
  ROLE_XRECV,
  ROLE_DOWN,  /* result from the parent; two */
  ROLE_DSEND, /* result -> children; up to four, `tree` and arg = child */
  ROLE_PUB,   /* publish RED */
  ROLE_NSEND, /* to a rank of another node; arg = rank or node */
  ROLE_NRECV,
  ROLE_GSEND, /* second exchange of the direct algorithm */
  ROLE_GRECV,
  ROLE_PARTIAL, /* node's sum of a remote rank's block */
  ROLE_COPY,
  ROLE_VUPRECV, /* agreement between nodes (agree.c) */
  ROLE_VUPSEND,
  ROLE_VDOWN,
  ROLE_VDSEND,
  ROLE_VPUB,
  ROLE_VWAIT,
  ROLE_COUNT
};
_Static_assert(ROLE_COUNT <= HFR_MAX_ROLES, "roles fit the plan");

hfreduceResult_t hfr_plan_all_reduce(struct hfr_plan *plan);
/* all_reduce between nodes of one rank each: what plan->direct says. */
hfreduceResult_t hfr_plan_ring(struct hfr_plan *plan);
hfreduceResult_t hfr_plan_reduce(struct hfr_plan *plan);
hfreduceResult_t hfr_plan_broadcast(struct hfr_plan *plan);
hfreduceResult_t hfr_plan_all_gather(struct hfr_plan *plan);
hfreduceResult_t hfr_plan_reduce_scatter(struct hfr_plan *plan);
hfreduceResult_t hfr_plan_all_to_all(struct hfr_plan *plan); /* even, on one node */
hfreduceResult_t hfr_plan_exchange(struct hfr_plan *plan);   /* other all_to_all, gather, scatter, send/recv */

/* Stages by which all nodes agree that all ranks make this call: a gather up and a release down tree 0, no payload. For
   operations whose data does not by itself bring every rank in touch with every other: rooted ones, barriers, and count 0. */
hfreduceResult_t hfr_plan_agree(struct hfr_plan *plan);
/* Handles the stages of hfr_plan_agree; 1 if `stage` is one. */
int hfr_step_agree(const struct hfr_plan *plan, int stage, struct hfr_step *step);

#define HFR_ADD(var, plan, role, kind, niter, name)                    \
  struct hfr_stage *var = hfr_plan_add(plan, role, kind, niter, name); \
  if (!var) return hfr_fail(hfreduceSystemError, "out of memory for a plan of %d stages", (plan)->nstages)

/* Iterations of tree t out of n chunks: chunk k belongs to tree k % 2. */
static inline int64_t hfr_tree_iters(int64_t n, int t) { return (n - t + 1) / 2; }
/* The stage of `role` on tree t, or -1. */
static inline int hfr_tree_stage(const struct hfr_plan *p, int role, int t) {
  for (int s = p->first[role]; s < p->first[role] + p->count[role]; s++)
    if (p->stage[s].tree == t) return s;
  return -1;
}
/* Slice of chunk k that lane `lane` carries: offset in the chunk and length, in elements. */
static inline size_t hfr_lane_slice(const struct hfr_plan *p, int64_t k, int lane, size_t *off) {
  return hfr_split(hfr_chunk_len(p, p->call.count, k), p->layout->lanes, lane, p->esize, off);
}
/* Cut `count` elements in chunks of `elems`. */
static inline void hfr_cut(struct hfr_plan *p, size_t elems) {
  p->elems = elems ? elems : 1;
  p->nchunks = (int64_t)((p->call.count + p->elems - 1) / p->elems);
}
/* Iterations of a copy that needs no others, of `bytes` bytes: one, unless the buffers are reached in segments. */
static inline int64_t hfr_copy_iters(const struct hfr_plan *p, size_t bytes, size_t unit) {
  return p->call.windowed && bytes ? (int64_t)((bytes + unit - 1) / unit) : 1;
}
/* Its i-th part. */
static inline struct hfr_part hfr_copy_part(const struct hfr_plan *p, struct hfr_loc src, struct hfr_loc dst, size_t bytes,
                                            size_t unit, int64_t i) {
  if (!p->call.windowed) return (struct hfr_part){src, dst, bytes};
  size_t at = (size_t)i * unit;
  src.off += at;
  dst.off += at;
  return (struct hfr_part){src, dst, bytes - at < unit ? bytes - at : unit};
}

/* --- one node, where each rank reduces its share of each chunk --- */
/* My own share is read where it lies: no other rank needs it. Not if the factor has still to be applied. */
static inline int hfr_own_in_place(const struct hfr_plan *p) { return p->count[ROLE_RED] && !p->call.premul; }
/* The share of chunk k that local rank `local` reduces: its bytes, and in *off where it begins in the chunk, in bytes. */
static inline size_t hfr_share(const struct hfr_plan *p, int64_t k, int local, size_t *off) {
  size_t elems = hfr_split(hfr_chunk_len(p, p->call.count, k), p->layout->nlocal, local, p->esize, off);
  *off *= p->esize;
  return elems * p->esize;
}
/* A place in chunk k of a user's buffer. */
static inline struct hfr_loc hfr_user_at(const struct hfr_plan *p, enum hfr_space space, int64_t k, size_t off) {
  return hfr_user(space, (size_t)k * p->elems * p->esize + off);
}
/* The j-th part of copy-in: all of the chunk; or, of two, what lies before and behind my share. */
struct hfr_part hfr_copy_in_part(const struct hfr_plan *p, int64_t k, int j);
static inline int hfr_copy_in_parts(const struct hfr_plan *p) { return 1 + hfr_own_in_place(p); }

/* Stages that hand a tree's result to the children, but for the node `skip` (-1: none). */
hfreduceResult_t hfr_add_dsends(struct hfr_plan *plan, int t, int arrival, int skip);
#endif
