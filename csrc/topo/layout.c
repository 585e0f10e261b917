/* The table of ranks and nodes. */
#include "layout.h"

#include <stdlib.h>

int hfr_layout_init(struct hfr_layout *l, int rank, int nranks, const int *label) {
  int *block = calloc((size_t)nranks * 5 + 2, sizeof *block);
  if (!block) return -1;
  *l = (struct hfr_layout){.rank = rank, .nranks = nranks};
  l->node_of = block;
  l->local_of = block + nranks;
  l->node_ranks = block + 2 * (size_t)nranks;
  l->node_start = block + 3 * (size_t)nranks;  /* nranks + 1 */
  int *first = block + 4 * (size_t)nranks + 1; /* lowest rank of a node; labels are unbounded, so compare with each node's */
  for (int r = 0; r < nranks; r++) {
    int n = r > 0 && label[r] == label[r - 1] ? l->node_of[r - 1] : 0; /* neighbours share a node as a rule */
    while (n < l->nnodes && label[first[n]] != label[r]) n++;
    if (n == l->nnodes) first[l->nnodes++] = r;
    l->node_of[r] = n;
    l->local_of[r] = l->node_start[n + 1]++; /* counts for now */
  }
  l->lanes = nranks;
  for (int n = 0; n < l->nnodes; n++) {
    int size = l->node_start[n + 1];
    if (size < l->lanes) l->lanes = size;
    if (size > l->max_local) l->max_local = size;
    l->node_start[n + 1] += l->node_start[n];
  }
  for (int r = 0; r < nranks; r++) l->node_ranks[l->node_start[l->node_of[r]] + l->local_of[r]] = r;
  l->node = l->node_of[rank];
  l->local = l->local_of[rank];
  l->nlocal = hfr_node_size(l, l->node);
  return 0;
}

void hfr_layout_fini(struct hfr_layout *l) {
  free(l->node_of);
  *l = (struct hfr_layout){0};
}
