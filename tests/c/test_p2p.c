/* Random programs of tagged sends and receives, over shared memory and TCP, as processes and as threads: every receive gets the
 * message that MPI's rule gives it. */
#include "check.h"
#include "ranks.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 96 /* messages of a program */
#define TAGS 4

struct message {
  int source, target, tag;
  size_t count;
};

/* A program is the same on all ranks: messages in the order in which each source sends its own. A tag of a target is received
 * from given sources, or from any. */
struct program {
  int nranks, n;
  struct message message[MOST];
  uint8_t any[8][TAGS];
};

static uint64_t next_random(uint64_t *state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
static int chance(uint64_t *state, int n) { return (int)(next_random(state) % (unsigned)n); }

static size_t random_count(uint64_t *state, size_t largest) {
  static const size_t edges[] = {0, 1, 7, 4096, 4097, 70000};
  int i = chance(state, 10);
  size_t count = i < 6 ? edges[i] : next_random(state) % (i == 9 ? largest : 3000);
  return count < largest ? count : largest;
}

static void make_program(struct program *p, uint64_t seed, int nranks, size_t largest) {
  uint64_t state = seed;
  size_t common[8][TAGS];
  p->nranks = nranks;
  p->n = 1 + chance(&state, MOST);
  for (int r = 0; r < nranks; r++)
    for (int t = 0; t < TAGS; t++) {
      p->any[r][t] = (uint8_t)chance(&state, 2);
      common[r][t] = random_count(&state, largest);
    }
  for (int i = 0; i < p->n; i++) {
    struct message *m = &p->message[i];
    *m = (struct message){chance(&state, nranks), chance(&state, nranks), chance(&state, TAGS), random_count(&state, largest)};
    if (p->any[m->target][m->tag]) m->count = common[m->target][m->tag];
  }
}

static void fill(uint8_t *data, int id, size_t count) {
  for (size_t i = 0; i < count; i++) data[i] = (uint8_t)((unsigned)id * 97u + i * 7u + (i >> 8));
}

static int same_line(const struct message *a, const struct message *b) {
  return a->source == b->source && a->target == b->target && a->tag == b->tag;
}

/* The k-th message (from 0) of the line that m belongs to. */
static int nth(const struct program *p, const struct message *m, int k) {
  for (int i = 0; i < p->n; i++)
    if (same_line(&p->message[i], m) && k-- == 0) return i;
  return -1;
}

struct receive {
  struct message what; /* source -1: any */
  uint8_t *data;
  int source;
};

/* This rank's receives in the order in which it posts them: random, but those of a line may not be told apart. */
static int make_receives(const struct program *p, int rank, uint64_t *state, struct receive *r) {
  int order[MOST], n = 0;
  for (int i = 0; i < p->n; i++)
    if (p->message[i].target == rank) order[n++] = i;
  for (int i = n - 1; i > 0; i--) {
    int j = chance(state, i + 1), swap = order[i];
    order[i] = order[j], order[j] = swap;
  }
  for (int i = 0; i < n; i++) {
    const struct message *m = &p->message[order[i]];
    int before = 0;
    for (int j = 0; j < i; j++) before += same_line(&p->message[order[j]], m);
    r[i] = (struct receive){.what = p->message[nth(p, m, before)], .source = -7};
    if (p->any[rank][m->tag]) r[i].what.source = -1;
    r[i].data = calloc(1, r[i].what.count + 1);
  }
  return n;
}

static hfreduceResult_t post(struct receive *r, hfreduceComm_t comm) {
  if (r->what.source < 0) return hfreduceRecvAny(r->data, r->what.count, hfreduceUint8, r->what.tag, &r->source, comm, NULL);
  r->source = r->what.source;
  return hfreduceRecvTag(r->data, r->what.count, hfreduceUint8, r->source, r->what.tag, comm, NULL);
}

/* The reference: receives that got a message of one source and tag, in the order in which they were posted, got its messages in
 * the order in which they were sent. */
static int judge(const struct program *p, int rank, struct receive *r, int n) {
  int wrong = 0;
  for (int i = 0; i < n; i++) {
    struct message line = {r[i].source, rank, r[i].what.tag, r[i].what.count};
    int before = 0;
    for (int j = 0; j < i; j++) before += r[j].source == line.source && r[j].what.tag == line.tag;
    int id = nth(p, &line, before);
    uint8_t *want = malloc(line.count + 1);
    fill(want, id, line.count);
    want[line.count] = 0;
    if (id < 0 || p->message[id].count != line.count || memcmp(want, r[i].data, line.count + 1)) {
      fprintf(stderr, "rank %d: receive %d (tag %d, %zu bytes, from %d) has not message %d\n", rank, i, line.tag, line.count,
              line.source, id);
      wrong++;
    }
    free(want);
    free(r[i].data);
  }
  return wrong;
}

/* mode 0: every call by itself, asynchronous, sends and receives mixed; 1: all in a group; 2: receives block, after the sends. */
static int run_program(const struct program *p, int rank, int mode, uint64_t *state, hfreduceComm_t comm) {
  struct receive receive[MOST];
  uint8_t *payload[MOST] = {0};
  hfreduceWork_t work[2 * MOST];
  int n = make_receives(p, rank, state, receive), posted = 0, sent = 0, nwork = 0;
  if (mode == 1) OK(hfreduceGroupStart());
  while (posted < n || sent < p->n) {
    int sending = sent < p->n && (mode == 2 || posted == n || chance(state, 2));
    if (sending && p->message[sent].source != rank) {
      sent++;
      continue;
    }
    if (mode == 0 || (mode == 2 && sending)) OK(hfreduceGroupStart());
    if (sending) {
      const struct message *m = &p->message[sent];
      payload[sent] = malloc(m->count + 1);
      fill(payload[sent], sent, m->count);
      OK(hfreduceSendTag(payload[sent], m->count, hfreduceUint8, m->target, m->tag, comm, NULL));
      sent++;
    } else {
      OK(post(&receive[posted++], comm));
    }
    if (mode == 0 || (mode == 2 && sending)) OK(hfreduceGroupEndAsync(&work[nwork++]));
  }
  if (mode == 1) OK(hfreduceGroupEnd());
  for (int i = 0; i < nwork; i++) {
    OK(hfreduceWorkWait(work[i], -1));
    OK(hfreduceWorkDestroy(work[i]));
  }
  for (int i = 0; i < p->n; i++) free(payload[i]);
  return judge(p, rank, receive, n);
}

struct options {
  int programs;
  size_t largest;
  uint64_t seed;
};

static int random_programs(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  const struct options *o = arg;
  hfreduceComm_t comm;
  int wrong = 0, invalid;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  for (int k = 0; k < o->programs && !wrong; k++) {
    struct program p;
    uint64_t seed = o->seed + (uint64_t)k * 1000 + (uint64_t)n, state = seed * 64 + (uint64_t)rank;
    make_program(&p, seed, n, o->largest);
    wrong = run_program(&p, rank, k % 3, &state, comm);
    if (wrong) fprintf(stderr, "rank %d of %d: program %d, seed %llu\n", rank, n, k, (unsigned long long)seed);
    OK(hfreduceBarrier(comm, NULL)); /* the next program's messages must not meet this one's receives from any source */
  }
  uint8_t x = 0;
  invalid = hfreduceSendTag(&x, 1, hfreduceUint8, 0, -1, comm, NULL) == hfreduceInvalidArgument;
  invalid += hfreduceRecvTag(&x, 1, hfreduceUint8, -1, 0, comm, NULL) == hfreduceInvalidArgument;
  invalid += hfreduceRecvAny(&x, 1, hfreduceUint8, -1, NULL, comm, NULL) == hfreduceInvalidArgument;
  invalid += hfreduceRecv(&x, 1, hfreduceUint8, -1, comm, NULL) == hfreduceInvalidArgument;
  if (invalid != 4) wrong++, fprintf(stderr, "rank %d: %d of 4 wrong calls were refused\n", rank, invalid);
  OK(hfreduceCommDestroy(comm));
  return wrong;
}

/* What was kept aside and never received is freed with the communicator. */
static int left_lying(int rank, int n, const hfreduceUniqueId *id, void *arg) {
  hfreduceComm_t comm;
  uint8_t x[100] = {0};
  (void)arg;
  OK(hfreduceCommInitRank(&comm, n, *id, rank));
  for (int t = 1; t < 4; t++) {
    if (rank == 1) OK(hfreduceSendTag(x, sizeof x, hfreduceUint8, 0, t, comm, NULL));
  }
  if (rank == 0) OK(hfreduceRecvTag(x, sizeof x, hfreduceUint8, 1, 3, comm, NULL));
  OK(hfreduceBarrier(comm, NULL));
  OK(hfreduceCommDestroy(comm));
  return 0;
}

int main(int argc, char **argv) {
  static const char *const preset[] = {"2", "3", "1,1", "1,1,1", "2,1", "2,2"};
  struct options o = {.programs = 30, .largest = 1 << 20, .seed = 1};
  int quick = argc > 1 && !strcmp(argv[1], "--quick");
  if (quick) o.programs = 6, o.largest = 150000;
  if (argc > 1 + quick) o.seed = strtoull(argv[1 + quick], NULL, 10);
  for (size_t i = 0; i < sizeof preset / sizeof *preset; i++)
    CHECK(run_processes(preset[i], random_programs, &o, 100) == 0, "nodes %s", preset[i]);
  setenv("HFREDUCE_TCP_STREAMS", "3", 1);
  CHECK(run_processes("1,1", random_programs, &o, 100) == 0, "three connections");
  unsetenv("HFREDUCE_TCP_STREAMS");
  CHECK(run_processes("2", left_lying, NULL, 30) == 0);
  CHECK(run_processes("1,1", left_lying, NULL, 30) == 0);
  for (int n = 1; n <= 4; n++) CHECK(run_threads(n, random_programs, &o, 100) == 0, "%d threads", n);
  return check_done();
}
