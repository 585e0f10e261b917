/*
 * The double binary tree as arithmetic on positions.
 *
 * Positions 1..12, tree 0 (node = position - 1):
 *
 *                 8
 *          ┌──────┴─────┐
 *          4            12
 *       ┌──┴──┐       ┌─┘
 *       2     6      10
 *      ┌┴┐   ┌┴┐    ┌─┴┐
 *      1 3   5 7    9  11
 *
 * In tree 1 node i has position i + 2, wrapping to 1: positions change parity, so inner (even) nodes become leaves (odd). At the
 * wrap the new position is 1, a leaf, whatever the parity of the old one.
 */
#include "tree.h"

static int lowest_bit(int p) { return p & -p; }

static int parent_position(int nnodes, int p) {
  int bit = lowest_bit(p), below = p - bit;
  int up = below | (bit << 1); /* p - bit or p + bit: the neighbour one level up on the side that has the higher bit */
  return up <= nnodes ? up : below;
}

static int left_position(int p) { return p - lowest_bit(p) / 2; }

/* The right subtree is cut at nnodes; its root is the first position down its left edge that exists. */
static int right_position(int nnodes, int p) {
  int step = lowest_bit(p) / 2;
  while (step && p + step > nnodes) step /= 2;
  return p + step;
}

static int position_of(int nnodes, int t, int node) { return (node + t) % nnodes + 1; }

static int node_at(int nnodes, int t, int position) { return (position - 1 - t + nnodes) % nnodes; }

int hfr_dtree_root(int nnodes, int t) {
  int top = 1;
  while (top <= nnodes / 2) top *= 2;
  return node_at(nnodes, t, top);
}

void hfr_dtree(int nnodes, int node, struct hfr_tree_pos pos[2]) {
  for (int t = 0; t < 2; t++) {
    int p = position_of(nnodes, t, node), parent = parent_position(nnodes, p);
    int left = left_position(p), right = right_position(nnodes, p);
    pos[t].parent = parent ? node_at(nnodes, t, parent) : -1;
    pos[t].child[0] = left != p ? node_at(nnodes, t, left) : -1;
    pos[t].child[1] = right != p ? node_at(nnodes, t, right) : -1;
  }
}
