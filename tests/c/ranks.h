/* Run a function as N ranks: forked processes (with a node label each, so that one machine plays several nodes) or threads of
 * this process. Every run has a time limit. */
#ifndef TESTS_RANKS_H_
#define TESTS_RANKS_H_
#include <hfreduce.h>
#include <stdio.h>

/* In a function with `rank` that returns the number of failures. */
#define OK(call)                                                                                                          \
  do {                                                                                                                    \
    hfreduceResult_t ok_ = (call);                                                                                        \
    if (ok_) {                                                                                                            \
      fprintf(stderr, "%s:%d rank %d: %s -> %d: %s\n", __FILE__, __LINE__, rank, #call, ok_, hfreduceGetLastError(NULL)); \
      return 1;                                                                                                           \
    }                                                                                                                     \
  } while (0)
#define WANT(condition)                                                                                                       \
  do {                                                                                                                        \
    if (!(condition)) {                                                                                                       \
      fprintf(stderr, "%s:%d rank %d: %s is false (%s)\n", __FILE__, __LINE__, rank, #condition, hfreduceGetLastError(NULL)); \
      return 1;                                                                                                               \
    }                                                                                                                         \
  } while (0)

/* `nodes`: sizes, e.g. "2,1,1": ranks 0 and 1 on node 0, and so on; or "0.1.0": the node of each rank. The function returns the
 * number of failures. */
typedef int (*rank_function)(int rank, int nranks, const hfreduceUniqueId *id, void *arg);
/* Number of failed ranks. Prints who failed, who hung (killed after `limit_s`). */
int run_processes(const char *nodes, rank_function function, void *arg, int limit_s);
int run_threads(int nranks, rank_function function, void *arg, int limit_s);
int count_ranks(const char *nodes);
#endif
