/* Which rank sits on which node: the table that planners work on. Plain data, the same on all ranks but for the first line. */
#ifndef HFR_TOPO_LAYOUT_H_
#define HFR_TOPO_LAYOUT_H_
#include <stddef.h>

struct hfr_layout {
  int rank, node, local, nlocal; /* this rank: its node, its place there, the size of its node */
  int nranks, nnodes;
  int lanes;                    /* smallest node: local ranks 0..lanes-1 carry the network traffic of reductions */
  int max_local;                /* largest node */
  int *node_of, *local_of;      /* by rank */
  int *node_start, *node_ranks; /* ranks of node i: node_ranks[node_start[i] .. node_start[i+1]-1], ascending */
};

/* From one label a rank (equal labels: same node). Nodes are numbered by their lowest rank. 0, or -1 when out of memory. */
int hfr_layout_init(struct hfr_layout *layout, int rank, int nranks, const int *label);
void hfr_layout_fini(struct hfr_layout *layout);

static inline int hfr_node_size(const struct hfr_layout *l, int node) { return l->node_start[node + 1] - l->node_start[node]; }
static inline int hfr_rank_at(const struct hfr_layout *l, int node, int local) {
  return l->node_ranks[l->node_start[node] + local];
}
#endif
