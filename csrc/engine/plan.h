/*
 * A plan: what one rank does for one operation, as stages that each run through a number of iterations (mostly: one a chunk).
 *
 * A stage's iterations run in order; different stages overlap as their guards allow: that is the pipeline. A guard compares a
 * counter with a need: of an own stage, or one that local ranks publish in the arena. Planners (coll/) are pure: a plan depends
 * on the call, the layout and the geometry alone, so it is tested without a network. The executor (engine/request.c) knows no
 * collective.
 */
#ifndef HFR_ENGINE_PLAN_H_
#define HFR_ENGINE_PLAN_H_
#include "../call/shape.h"
#include "../node/arena.h"
#include "../simd/simd.h"
#include "../topo/layout.h"
#include "../topo/tree.h"
#include "../transport/transport.h"

/* What all ranks of a communicator agree on beside the layout. */
enum hfr_algo { HFR_ALGO_AUTO, HFR_ALGO_TREE, HFR_ALGO_DIRECT, HFR_ALGO_RING };
struct hfr_geometry {
  size_t chunk;     /* bytes of a slot: unit of pipelining */
  size_t ring_slot; /* largest message between local ranks */
  int slots;        /* a rank and kind; even */
  enum hfr_algo algo;
};

enum hfr_space { HFR_SEND, HFR_RECV, HFR_IN, HFR_RES, HFR_MSG };
/* A place: in the user's buffers (off in bytes), in slot `chunk` of local rank `index`, or the message next to come from rank
 * `index` on channel vc. */
struct hfr_loc {
  uint8_t space, vc;
  int32_t index;
  int64_t chunk;
  size_t off;
};

enum hfr_who { HFR_OWN, HFR_ALL, HFR_ONE, HFR_LANES };
/* OWN: stages first..first+n-1 have each completed `need` iterations. ALL, ONE (local rank first), LANES: counter ctr of those
   local ranks has reached `need`, counted from the beginning of the operation (needs <= 0 concern chunks of earlier operations).
 */
struct hfr_guard {
  uint8_t who, ctr;
  int32_t first, n;
  int64_t need;
};

enum hfr_stage_kind { HFR_STAGE_NOP, HFR_STAGE_COPY, HFR_STAGE_REDUCE, HFR_STAGE_SEND, HFR_STAGE_RECV };
#define HFR_MAX_GUARDS 6
struct hfr_step {
  int nguards;
  struct hfr_guard guard[HFR_MAX_GUARDS];
  struct hfr_loc src, dst; /* SEND: src; RECV, REDUCE: dst */
  struct hfr_loc also;     /* REDUCE, of a `doubled` stage: the result goes there too */
  size_t bytes;            /* of dst (REDUCE, RECV) or src (SEND) */
  int nparts;              /* COPY: parts; REDUCE: sources; enumerated by plan->part */
  int final;               /* REDUCE: as the stage's, where only some iterations complete a result */
};
struct hfr_part {
  struct hfr_loc src, dst; /* REDUCE: src only */
  size_t bytes;
};

struct hfr_stage {
  uint8_t kind, role; /* role: the planner's own numbering */
  uint8_t ctr;        /* counter published after each iteration, or HFR_CTR_NONE */
  uint8_t vc;
  uint8_t premul;  /* COPY: apply the call's factor */
  uint8_t final;   /* REDUCE: the result is complete (avg divides here) */
  uint8_t doubled; /* REDUCE: to two places, step.also is the other */
  uint8_t tree;    /* the planner's: which tree */
  int32_t npre;    /* REDUCE: this many leading sources are scaled by 1/nranks when plan->avg_pre */
  int32_t peer;    /* SEND, RECV: global rank */
  int32_t arg;     /* the planner's: a rank, a child, a node */
  int32_t passes;  /* SEND: 1 + the RECV stage whose messages it passes on, iteration by iteration; RECV: how many do so */
  int64_t niter;
  const char *name; /* phase, as errors name it */
};

#define HFR_MAX_ROLES 24
struct hfr_plan {
  const struct hfr_layout *layout;
  struct hfr_geometry geometry;
  struct hfr_call call;
  size_t esize;
  int nstages, cap;
  struct hfr_stage *stage;
  int32_t first[HFR_MAX_ROLES], count[HFR_MAX_ROLES]; /* stages of a role: contiguous */
  int64_t nchunks;  /* by which IN, RED and OUT grow over the operation, on every local rank alike */
  size_t elems;     /* elements of a chunk */
  size_t staged;    /* one node, one chunk: what a rank has of a slot, in bytes; else 0 */
  int direct;       /* one rank a node: no staging */
  int avg_pre;      /* avg scales before the first rounding (npre) instead of dividing at the end */
  int temp;         /* the send buffer is copied first (in-place all_to_all) */
  const char *algo; /* "one-shot", "node", "tree", "direct", ... */
  struct hfr_tree_pos pos[2];
  void (*step)(const struct hfr_plan *plan, int stage, int64_t i, struct hfr_step *step);
  void (*part)(const struct hfr_plan *plan, int stage, int64_t i, int j, struct hfr_part *part);
};

/* Append a stage; contiguous by role. Returns it, zeroed but for role, kind and ctr NONE; valid until the next one is added; NULL
   when out of memory. */
struct hfr_stage *hfr_plan_add(struct hfr_plan *plan, int role, enum hfr_stage_kind kind, int64_t niter, const char *name);
void hfr_plan_fini(struct hfr_plan *plan);

/* Up to so many bytes every local rank reads everything in one synchronisation; above, the ranks share the work. The more ranks,
   the more a second synchronisation costs: from four on it is worth reading twice as much. */
static inline int64_t hfr_oneshot_bytes(const struct hfr_geometry *g, int nlocal) {
  int64_t limit = (nlocal < 4 ? 65536 : 131072) / (nlocal > 1 ? nlocal : 1);
  return limit < (int64_t)g->chunk ? limit : (int64_t)g->chunk;
}

/* Bytes of a block when `blocks` of them share a slot; whole lines if it holds so many. */
static inline size_t hfr_block_bytes(const struct hfr_geometry *g, int blocks, size_t esize) {
  size_t bytes = g->chunk / (size_t)(blocks > 1 ? blocks : 1), grain = bytes >= 64 ? 64 : esize;
  return bytes / grain * grain;
}

/* Where in its slot an operation of one chunk lies, of which a rank stages `bytes`: each time the slots have been round, in a
   place of its own, so that the readers' caches have let go of a line before it is written again (node/writer.h). base: chunks
   staged before. Very small ones stay where they are: their memory is to stay small too. */
#define HFR_ROTATED_MIN 4096
static inline size_t hfr_slot_place(const struct hfr_geometry *g, uint64_t base, size_t bytes) {
  size_t pitch = (bytes + 127) / 128 * 128;
  return bytes < HFR_ROTATED_MIN || pitch > g->chunk ? 0 : base / (unsigned)g->slots % (g->chunk / pitch) * pitch;
}

/* Largest message to or from a peer, in whole elements; more goes in parts of this size. */
static inline size_t hfr_message_bytes(const struct hfr_layout *l, const struct hfr_geometry *g, int peer, size_t esize) {
  size_t bytes = l->node_of[peer] == l->node ? g->ring_slot : g->chunk;
  return bytes / esize * esize;
}

/* --- what planners build steps with --- */
static inline struct hfr_guard *hfr_guard_add(struct hfr_step *s) { return &s->guard[s->nguards++]; }
/* All stages of a role have completed `need` iterations; nothing if there are none. */
static inline void hfr_after_role(const struct hfr_plan *p, struct hfr_step *s, int role, int64_t need) {
  if (p->count[role] && need > 0) *hfr_guard_add(s) = (struct hfr_guard){HFR_OWN, 0, p->first[role], p->count[role], need};
}
static inline void hfr_after_stage(struct hfr_step *s, int stage, int64_t need) {
  if (need > 0) *hfr_guard_add(s) = (struct hfr_guard){HFR_OWN, 0, stage, 1, need};
}
static inline void hfr_after_peers(struct hfr_step *s, enum hfr_who who, int one, enum hfr_ctr ctr, int64_t need) {
  *hfr_guard_add(s) = (struct hfr_guard){(uint8_t)who, (uint8_t)ctr, one, 1, need};
}
static inline struct hfr_loc hfr_user(enum hfr_space space, size_t off) { return (struct hfr_loc){(uint8_t)space, 0, 0, 0, off}; }
static inline struct hfr_loc hfr_slot(enum hfr_space space, int local, int64_t chunk, size_t off) {
  return (struct hfr_loc){(uint8_t)space, 0, local, chunk, off};
}
static inline struct hfr_loc hfr_message(int peer, int vc) { return (struct hfr_loc){HFR_MSG, (uint8_t)vc, peer, 0, 0}; }

/* Part i of n elements split in `parts`: offset and length in elements; all but the last a multiple of 64 bytes. */
static inline size_t hfr_split(size_t n, int parts, int i, size_t esize, size_t *off) {
  size_t grain = 64 / esize, per = (n + (size_t)parts - 1) / (size_t)parts;
  per = (per + grain - 1) / grain * grain;
  *off = per * (size_t)i < n ? per * (size_t)i : n;
  return n - *off < per ? n - *off : per;
}
/* Elements of chunk k of count elements cut in chunks of p->elems. */
static inline size_t hfr_chunk_len(const struct hfr_plan *p, size_t count, int64_t k) {
  size_t at = (size_t)k * p->elems;
  return count - at < p->elems ? count - at : p->elems;
}
#endif
