/*
 * A C program that uses hfreduce.h alone. Build and run it on four ranks of this machine:
 *
 *   cc -std=c11 -Wall -Wextra -O2 all_reduce.c -o all_reduce $(hfreduce config --cflags --libs)
 *   hfreduce run -n 4 ./all_reduce
 *
 * or start each rank yourself, on any host, with HFREDUCE_RANK, HFREDUCE_NRANKS, HFREDUCE_ADDR (host:port of rank 0) and
 * HFREDUCE_SECRET (hex; the same on all ranks). With none of them it is one rank.
 */
#include <hfreduce.h>
#include <stdio.h>
#include <stdlib.h>

enum { COUNT = 1 << 20 };

/* End the program when a call fails, with the library's text: it names rank, host, operation and phase. */
static void check(hfreduceResult_t result, hfreduceComm_t comm) {
  if (result == hfreduceSuccess) return;
  fprintf(stderr, "all_reduce: %s: %s\n", hfreduceGetErrorString(result), hfreduceGetLastError(comm));
  exit(1);
}

static int number(const char *name, int otherwise) {
  const char *value = getenv(name);
  return value ? atoi(value) : otherwise;
}

static long count_wrong(const float *values, float expected) {
  long wrong = 0;
  for (long i = 0; i < COUNT; i++) wrong += values[i] != expected + (float)(i % 7);
  return wrong;
}

int main(void) {
  int rank = number("HFREDUCE_RANK", 0), nranks = number("HFREDUCE_NRANKS", 1);
  const char *address = getenv("HFREDUCE_ADDR"), *secret = getenv("HFREDUCE_SECRET");

  hfreduceUniqueId id;
  if (address)
    check(hfreduceUniqueIdFromAddress(&id, address, secret, 0), NULL);
  else
    check(hfreduceGetUniqueIdLocal(&id), NULL); /* one rank needs no address */
  hfreduceComm_t comm;
  check(hfreduceCommInitRank(&comm, nranks, id, rank), NULL);

  void *memory; /* any memory will do; this is cheaper to communicate from */
  check(hfreduceMemAlloc(&memory, COUNT * sizeof(float)), NULL);
  float *x = memory;

  /* Blocking, in place: the average over the ranks. */
  for (long i = 0; i < COUNT; i++) x[i] = (float)(rank + 1 + i % 7);
  check(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceAvg, comm, NULL), comm);
  long wrong = count_wrong(x, (float)(nranks + 1) / 2);

  /* Asynchronous: a group of one call gives a work handle; the library's own thread reduces meanwhile. */
  for (long i = 0; i < COUNT; i++) x[i] = (float)(rank + i % 7);
  hfreduceWork_t work;
  check(hfreduceGroupStart(), NULL);
  check(hfreduceAllReduce(x, x, COUNT, hfreduceFloat32, hfreduceMax, comm, NULL), comm);
  check(hfreduceGroupEndAsync(&work), comm);
  /* ... compute something else here ... */
  check(hfreduceWorkWait(work, -1), comm);
  check(hfreduceWorkDestroy(work), comm);
  wrong += count_wrong(x, (float)(nranks - 1));

  hfreduceCommInfo_t info;
  check(hfreduceCommGetInfo(comm, &info), comm);
  printf("rank %d of %d on %s (node %d of %d): %ld wrong values\n", info.rank, info.nranks, info.host, info.node, info.nnodes,
         wrong);
  check(hfreduceMemFree(memory), NULL);
  check(hfreduceCommDestroy(comm), NULL);
  return wrong != 0;
}
