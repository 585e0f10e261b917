/*
 * The double binary tree over n nodes (after Sanders, Speck, Traeff 2009): pure arithmetic.
 *
 * Tree 0 is the in-order binary tree on positions 1..n: odd positions are leaves, an even position p with lowest set bit b has
 * its left child at p - b/2 and its right child at p + b/2 (or the first below it that exists). Tree 1 is the same tree shifted
 * by one position, so a node that is inner in one is a leaf in the other.
 */
#ifndef HFR_TOPO_TREE_H_
#define HFR_TOPO_TREE_H_

struct hfr_tree_pos {
  int parent;   /* -1 at the root */
  int child[2]; /* -1 where there is none; child[0] is used before child[1] */
};
/* Place of `node` (0..nnodes-1) in tree 0 and tree 1. nnodes >= 1. */
void hfr_dtree(int nnodes, int node, struct hfr_tree_pos pos[2]);
/* Root of tree t. */
int hfr_dtree_root(int nnodes, int t);
#endif
