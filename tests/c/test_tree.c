/* The double binary tree, for every number of nodes up to 4096. */
#include "check.h"
#include "topo/tree.h"

#include <string.h>

#define NODES_MAX 4096

static struct hfr_tree_pos places[NODES_MAX][2];
static int depths[NODES_MAX];

static int ceil_log2(int n) {
  int bits = 0;
  while (1 << bits < n) bits++;
  return bits;
}

static int is_inner(const struct hfr_tree_pos *pos) { return pos->child[0] >= 0 || pos->child[1] >= 0; }

/* Parents and children name each other, no child is named twice, and the root is the one node without a parent. */
static int links_agree(int n, int t) {
  int roots = 0, edges = 0;
  for (int i = 0; i < n; i++) {
    const struct hfr_tree_pos *pos = &places[i][t];
    if (pos->parent < -1 || pos->parent >= n || pos->parent == i) return 0;
    if (pos->parent < 0) {
      roots++;
      if (hfr_dtree_root(n, t) != i) return 0;
    } else if ((places[pos->parent][t].child[0] == i) + (places[pos->parent][t].child[1] == i) != 1) {
      return 0;
    }
    if (pos->child[0] < 0 && pos->child[1] >= 0) return 0;
    for (int c = 0; c < 2; c++) {
      int child = pos->child[c];
      if (child < -1 || child >= n || (child >= 0 && places[child][t].parent != i)) return 0;
      edges += child >= 0;
    }
  }
  return roots == 1 && edges == n - 1;
}

/* Depth of the tree in edges; -1 when the walk from the root does not meet every node exactly once: a cycle or a second
 * component. */
static int walk(int n, int t) {
  static int queue[NODES_MAX];
  int head = 0, tail = 0, deepest = 0;
  memset(depths, -1, sizeof depths);
  queue[tail++] = hfr_dtree_root(n, t);
  depths[queue[0]] = 0;
  while (head < tail) {
    int node = queue[head++];
    for (int c = 0; c < 2; c++) {
      int child = places[node][t].child[c];
      if (child < 0) continue;
      if (depths[child] >= 0) return -1;
      depths[child] = depths[node] + 1;
      if (depths[child] > deepest) deepest = depths[child];
      queue[tail++] = child;
    }
  }
  return tail == n ? deepest : -1;
}

static int distinct_neighbours(int node) {
  int seen[6], count = 0;
  for (int k = 0; k < 6; k++) {
    const struct hfr_tree_pos *pos = &places[node][k / 3];
    int peer = k % 3 < 2 ? pos->child[k % 3] : pos->parent, known = peer < 0;
    for (int j = 0; j < count; j++) known |= seen[j] == peer;
    if (!known) seen[count++] = peer;
  }
  return count;
}

static void check_nodes(int n) {
  for (int i = 0; i < n; i++) hfr_dtree(n, i, places[i]);
  for (int t = 0; t < 2; t++) {
    if (!CHECK(links_agree(n, t), "%d nodes, tree %d", n, t)) continue;
    int depth = walk(n, t);
    CHECK(depth >= 0, "%d nodes, tree %d does not span", n, t);
    CHECK(depth <= ceil_log2(n) + 1, "%d nodes, tree %d has depth %d", n, t, depth);
  }
  int inner_twice = 0, most = 0;
  for (int i = 0; i < n; i++) {
    int neighbours = distinct_neighbours(i);
    inner_twice += is_inner(&places[i][0]) && is_inner(&places[i][1]);
    if (neighbours > most) most = neighbours;
  }
  CHECK(inner_twice == 0, "%d nodes: %d are inner in both trees", n, inner_twice);
  CHECK(most <= 6, "%d nodes: %d neighbours", n, most);
}

/* The drawing in tree.c. */
static void check_drawing(void) {
  struct hfr_tree_pos pos[2];
  hfr_dtree(12, 7, pos);
  CHECK(pos[0].parent == -1 && pos[0].child[0] == 3 && pos[0].child[1] == 11);
  hfr_dtree(12, 11, pos);
  CHECK(pos[0].parent == 7 && pos[0].child[0] == 9 && pos[0].child[1] == -1);
  CHECK(pos[1].child[0] == -1, "node 11 has position 1 in tree 1");
  CHECK(hfr_dtree_root(12, 0) == 7 && hfr_dtree_root(12, 1) == 6);
}

int main(void) {
  check_drawing();
  for (int n = 1; n <= NODES_MAX; n++) check_nodes(n);
  return check_done();
}
