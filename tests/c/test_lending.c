/*
 * What a device has copied out is lent to the other local ranks, and given back when all of them have read it.
 *
 * Engines of several ranks and their devices are driven by hand in one thread, in random orders: a device is two queues, one that
 * copies segments into the rank's lending area as soon as a word says that it may, and one that copies results away. What comes
 * back to a device is overwritten at once. No driver is needed, and none is tested here (test_cuda.c).
 */
#include "check.h"

#include "coll/coll.h"
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RANKS = 3, SLOTS = 2, CHUNK = 4096, OPS = 24, TURNS = 4096 };
#define SLOT_BYTES ((size_t)2 * RANKS * CHUNK)
#define VALUE(rank, i, salt) (float)(((i)*7 + (size_t)(rank)*13 + (size_t)(salt)*5) % 23)

static uint32_t seed;
static uint32_t draw(uint32_t below) {
  seed = seed * 1664525u + 1013904223u;
  return (seed >> 8) % below;
}

/* One call of a rank. */
struct op {
  struct hfr_call call;
  int salt, device, submitted;
  size_t sends, recvs; /* elements */
  float *send, *recv;
  struct hfreduceWork *work;
};
/* A segment's turn in the queues of a rank's device, which goes through its ring. */
struct turn {
  const struct op *op;
  int segment, back; /* back: its send half was overwritten */
  uint32_t value;
  size_t bytes, row;
  int send_rows, recv_rows;
};
struct side {
  struct hfr_arena arena;
  struct hfr_layout layout;
  struct hfr_net net;
  struct hfr_engine engine;
  uint8_t *out;
  _Atomic uint32_t ready[SLOTS], done[2][SLOTS], taken[SLOTS];
  struct turn turn[TURNS];
  int turns, went_out, came_in;
  struct op op[OPS];
};

static void open_sides(struct side *s, int n) {
  static char host[RANKS][64] = {"a", "b", "c"};
  int label[RANKS] = {0};
  for (int r = 0; r < n; r++) {
    s[r] = (struct side){.net = {.rank = r, .nranks = n, .host = host, .arena = &s[r].arena},
                         .engine = {.layout = &s[r].layout,
                                    .arena = &s[r].arena,
                                    .net = &s[r].net,
                                    .remote = &hfr_transport_tcp,
                                    .host = host[r],
                                    .geometry = {.chunk = CHUNK, .ring_slot = CHUNK / 2, .slots = 4}}};
    hfreduceResult_t result = r ? hfr_arena_attach(&s[r].arena, dup(s[0].arena.fd), n, CHUNK, 4, SLOTS * SLOT_BYTES)
                                : hfr_arena_create(&s[r].arena, n, CHUNK, 4, SLOTS * SLOT_BYTES);
    if (result || hfr_layout_init(&s[r].layout, r, n, label) || hfr_arena_join(&s[r].arena, r) || hfr_engine_init(&s[r].engine))
      abort();
    s[r].out = malloc(SLOTS * SLOT_BYTES);
  }
}

static void close_sides(struct side *s, int n) {
  for (int r = 0; r < n; r++) {
    for (int i = 0; i < OPS; i++) {
      free(s[r].op[i].send), free(s[r].op[i].recv);
      if (s[r].op[i].work) hfr_work_put(s[r].op[i].work);
    }
    hfr_engine_fini(&s[r].engine);
    hfr_arena_close(&s[r].arena);
    hfr_layout_fini(&s[r].layout);
    free(s[r].out);
  }
}

/* ---------------------------------------------------------------- calls */

static void make_op(struct op *o, int rank, int n, enum hfr_coll coll, size_t count, int root, int device, int salt) {
  int many_in = coll == HFR_REDUCE_SCATTER || coll == HFR_ALL_TO_ALL, many_out = coll == HFR_ALL_GATHER || coll == HFR_ALL_TO_ALL;
  *o = (struct op){.salt = salt, .device = device, .sends = count * (many_in ? (size_t)n : 1)};
  o->recvs = coll == HFR_REDUCE && rank != root ? 0 : count * (many_out ? (size_t)n : 1);
  o->send = malloc(o->sends * sizeof *o->send + 1);
  o->recv = calloc(o->recvs + 1, sizeof *o->recv);
  for (size_t i = 0; i < o->sends; i++) o->send[i] = VALUE(rank, i, salt);
  o->call = (struct hfr_call){.coll = coll,
                              .send = o->send,
                              .recv = o->recv,
                              .count = count,
                              .dtype = hfreduceFloat32,
                              .root = coll == HFR_REDUCE || coll == HFR_BROADCAST ? root : -1,
                              .windowed = device};
}

static float expected(const struct op *o, int rank, int n, size_t i) {
  size_t count = o->call.count, j = (size_t)rank * count + i;
  float sum = 0;
  switch (o->call.coll) {
    case HFR_BROADCAST: return VALUE(o->call.root, i, o->salt);
    case HFR_ALL_GATHER: return VALUE(i / count, i % count, o->salt);
    case HFR_ALL_TO_ALL: return VALUE(i / count, (size_t)rank * count + i % count, o->salt);
    default:
      for (int r = 0; r < n; r++) sum += VALUE(r, o->call.coll == HFR_REDUCE_SCATTER ? j : i, o->salt);
      return sum;
  }
}

static void check_result(const struct op *o, int rank, int n) {
  size_t i = 0;
  while (i < o->recvs && o->recv[i] == expected(o, rank, n, i)) i++;
  CHECK(i == o->recvs, "%s of %zu, rank %d of %d, %s memory: element %zu is %g", hfr_coll_name(o->call.coll), o->call.count, rank,
        n, o->device ? "device" : "host", i, (double)o->recv[i]);
}

/* ---------------------------------------------------------------- a device and its ring */

/* The window of a call: its segments take the ring's slots in turn. */
static void open_window(struct side *s, const struct op *o, struct hfr_request *r) {
  size_t unit = hfr_window_unit(&r->plan), row = o->call.count * sizeof(float), bytes = unit * (1 + draw(2));
  int n = (int)((row + bytes - 1) / bytes);
  struct hfr_window *w = calloc(1, sizeof *w + (size_t)n * sizeof w->segment[0]);
  *w = (struct hfr_window){.bytes = bytes, .row = {SIZE_MAX, SIZE_MAX}, .nsegs = n, .lends = 1};
  r->window = w;
  atomic_store(&r->holders, 1);
  for (int recv = 0; recv < 2; recv++)
    if (hfr_window_rows(&r->plan, recv) > 1) w->row[recv] = row;
  for (int i = 0; i < n; i++) {
    int slot = s->turns % SLOTS;
    struct turn *t = &s->turn[s->turns++];
    struct hfr_segment *g = &w->segment[i];
    *t = (struct turn){o, i, 0, (uint32_t)s->turns, bytes, row, hfr_window_rows(&r->plan, 0), hfr_window_rows(&r->plan, 1)};
    g->in = hfr_arena_lending(&s->arena, s->arena.local) + (size_t)slot * SLOT_BYTES;
    g->out = s->out + (size_t)slot * SLOT_BYTES;
    g->ready = &s->ready[slot];
    g->done[0] = &s->done[0][slot];
    g->done[1] = &s->done[1][slot];
    g->value = g->ready_value = t->value;
    if (s->turns > SLOTS) g->taken = &s->taken[slot], g->taken_value = t->value - SLOTS;
  }
}

static void copy_rows(struct side *s, const struct turn *t, int recv) {
  int slot = (int)(t - s->turn) % SLOTS;
  uint8_t *area =
      recv ? s->out + (size_t)slot * SLOT_BYTES : hfr_arena_lending(&s->arena, s->arena.local) + (size_t)slot * SLOT_BYTES;
  size_t at = (size_t)t->segment * t->bytes, width = t->row - at < t->bytes ? t->row - at : t->bytes;
  for (int i = 0; i < (recv ? t->recv_rows : t->send_rows); i++) {
    uint8_t *user = (uint8_t *)(recv ? t->op->recv : t->op->send) + (size_t)i * t->row + at;
    memcpy(recv ? user : area + (size_t)i * t->bytes, recv ? area + (size_t)i * t->bytes : user, width);
  }
}

static int raised(const struct side *s, const struct turn *t, int recv) {
  return (int32_t)(atomic_load(&s->done[recv][(t - s->turn) % SLOTS]) - t->value) >= 0;
}

/* What is the device's again holds nothing that anybody may still read. */
static int spoil(struct side *s) {
  int did = 0;
  for (int i = s->went_out > SLOTS ? s->went_out - SLOTS : 0; i < s->went_out; i++) {
    struct turn *t = &s->turn[i];
    if (t->back || !raised(s, t, 0)) continue;
    t->back = did = 1;
    memset(hfr_arena_lending(&s->arena, s->arena.local) + (size_t)(i % SLOTS) * SLOT_BYTES, 0x5a, SLOT_BYTES);
  }
  return did;
}

/* These do the next thing, if it is time: 1. */
static int copy_out(struct side *s) {
  if (s->went_out == s->turns) return 0;
  struct turn *t = &s->turn[s->went_out];
  if (s->went_out >= SLOTS && !raised(s, t - SLOTS, 0)) return 0;
  copy_rows(s, t, 0);
  atomic_store(&s->ready[s->went_out++ % SLOTS], t->value);
  return 1;
}
static int come_in(struct side *s) {
  if (s->came_in == s->went_out || !raised(s, &s->turn[s->came_in], 1)) return 0;
  copy_rows(s, &s->turn[s->came_in], 1);
  atomic_store(&s->taken[s->came_in % SLOTS], s->turn[s->came_in].value);
  s->came_in++;
  return 1;
}

static void submit(struct side *s, struct op *o) {
  struct hfr_request *r = hfr_request_get(&s->engine);
  if (!r || hfr_plan_build(&r->plan, &s->layout, &s->engine.geometry, &o->call) || !(o->work = hfr_work_new(1))) abort();
  r->fp = hfr_call_fingerprint(&o->call);
  r->timeout_ns = s->engine.timeout_ns;
  r->work = o->work;
  o->work->engine = &s->engine;
  if (o->device) open_window(s, o, r);
  o->submitted = 1;
  hfr_engine_submit(&s->engine, r);
}

/* ---------------------------------------------------------------- cases */

static int submit_next(struct side *s, int nops) {
  for (int i = 0; i < nops; i++)
    if (!s->op[i].submitted) return submit(s, &s->op[i]), 1;
  return 0;
}

static int at_end(const struct side *s, int nops) {
  return s->op[nops - 1].submitted && s->came_in == s->turns && !atomic_load(&s->engine.active);
}

/* Until all is done, or nothing moves any more. */
static int run(struct side *s, int n, int nops) {
  int slow = (int)draw((uint32_t)n + 1), left = n; /* a rank that seldom has its turn */
  for (int idle = 0; left && idle < 4000; idle++) {
    int r = (int)draw((uint32_t)n);
    if (r == slow && draw(20)) continue;
    switch (draw(5)) {
      case 0: idle = submit_next(&s[r], nops) ? 0 : idle; break;
      case 1: idle = copy_out(&s[r]) ? 0 : idle; break;
      case 2: idle = come_in(&s[r]) ? 0 : idle; break;
      case 3: idle = spoil(&s[r]) ? 0 : idle; break;
      default: idle = hfr_engine_progress(&s[r].engine) ? 0 : idle;
    }
    left = 0;
    for (int q = 0; q < n && q < RANKS; q++) left += !at_end(&s[q], nops);
  }
  return !left;
}

/* Calls one after the other, of every collective, on host and device memory, through a ring of few segments. */
static void orders(int n) {
  static const enum hfr_coll colls[] = {HFR_ALL_REDUCE, HFR_REDUCE,         HFR_BROADCAST,
                                        HFR_ALL_GATHER, HFR_REDUCE_SCATTER, HFR_ALL_TO_ALL};
  static struct side s[RANKS];
  open_sides(s, n);
  for (int i = 0; i < OPS; i++) {
    enum hfr_coll coll = colls[draw(6)];
    size_t count = 1 + draw(draw(2) ? 200 : 12000);
    int root = (int)draw((uint32_t)n);
    for (int r = 0; r < n; r++) make_op(&s[r].op[i], r, n, coll, count, root, draw(3) > 0, i);
  }
  uint32_t began = seed;
  CHECK(run(s, n, OPS), "%d ranks, order %u: nothing moves any more", n, began);
  for (int r = 0; r < n; r++) {
    CHECK(s[r].engine.lent > 0, "%d ranks, order %u: rank %d lent nothing", n, began, r);
    CHECK(!s[r].engine.lenders && !atomic_load(&s[r].engine.windows), "something is left over");
    for (int i = 0; i < OPS; i++) check_result(&s[r].op[i], r, n);
  }
  close_sides(s, n);
}

/* What must be lent, and what must not be: that lies otherwise in the slots, or is read there by ranks that know nothing of it.
 */
static void counts(void) {
  static const struct {
    enum hfr_coll coll;
    int n;
    size_t count, lent[RANKS];
  } c[] = {
      {HFR_ALL_REDUCE, 2, 10 * 1024 + 1, {10, 11}},
      {HFR_ALL_REDUCE, 3, 5000, {5, 5, 5}},
      {HFR_ALL_REDUCE, 2, 1024, {0, 0}},
      {HFR_ALL_REDUCE, 2, 1025, {1, 2}},
      {HFR_REDUCE, 3, 5000, {5, 5, 5}},
      {HFR_BROADCAST, 3, 5000, {0, 5, 0}},
      {HFR_ALL_GATHER, 3, 3000, {3, 3, 3}},
      {HFR_REDUCE_SCATTER, 2, 5120, {10, 10}},
      {HFR_ALL_TO_ALL, 2, 5120, {10, 10}},
  };
  static struct side s[RANKS];
  for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
    open_sides(s, c[i].n);
    for (int r = 0; r < c[i].n; r++) make_op(&s[r].op[0], r, c[i].n, c[i].coll, c[i].count, 1, 1, 3);
    CHECK(run(s, c[i].n, 1));
    for (int r = 0; r < c[i].n; r++) {
      CHECK(s[r].engine.lent == c[i].lent[r], "%s of %zu on %d ranks: rank %d lent %llu chunks, not %zu",
            hfr_coll_name(c[i].coll), c[i].count, c[i].n, r, (unsigned long long)s[r].engine.lent, c[i].lent[r]);
      check_result(&s[r].op[0], r, c[i].n);
    }
    close_sides(s, c[i].n);
  }
}

/* Rank 0 has brought a broadcast that fits its ring to its end, of which rank 1 has begun but read nothing. */
static void lend_and_end(struct side *s, int64_t timeout_ns) {
  open_sides(s, 2);
  for (int r = 0; r < 2; r++) {
    s[r].engine.timeout_ns = timeout_ns;
    make_op(&s[r].op[0], r, 2, HFR_BROADCAST, 2000, 0, r == 0, 4);
    submit(&s[r], &s[r].op[0]);
  }
  while (hfr_engine_progress(&s[1].engine)) {
  }
  for (int i = 0; i < 100; i++) hfr_engine_progress(&s[0].engine), copy_out(&s[0]), come_in(&s[0]);
}

/* The end of an operation, the receive half and the next operation wait for nobody. */
static void ends_at_once(void) {
  static struct side s[RANKS];
  lend_and_end(s, 0);
  CHECK(atomic_load(&s[0].op[0].work->done) && s[0].came_in == s[0].turns, "it waits for its readers");
  CHECK(s[0].engine.lenders && atomic_load(&s[0].engine.active) == 1 && !raised(&s[0], &s[0].turn[s[0].turns - 1], 0));
  make_op(&s[0].op[1], 0, 2, HFR_ALL_REDUCE, 3000, 0, 0, 5);
  submit(&s[0], &s[0].op[1]);
  hfr_engine_progress(&s[0].engine);
  CHECK(s[0].engine.seq == 2, "the next one waits for them");
  make_op(&s[1].op[1], 1, 2, HFR_ALL_REDUCE, 3000, 0, 0, 5);
  CHECK(run(s, 2, 2));
  for (int r = 0; r < 2; r++)
    for (int i = 0; i < 2; i++) check_result(&s[r].op[i], r, 2);
  close_sides(s, 2);
}

/* A reader that takes too long, or has gone: the lender says who it is. An error ends the wait. */
static void readers_that_stay_away(int gone) {
  static struct side s[RANKS];
  hfreduceErrorInfo_t why;
  lend_and_end(s, gone ? 0 : 1);
  if (gone) {
    atomic_store(&s[0].engine.left_ns[1], 1);
    atomic_store(&s[0].engine.anyone_left, 1);
  }
  hfr_engine_check(&s[0].engine, INT64_C(1) << 62);
  CHECK(hfr_engine_error(&s[0].engine, &why) == (gone ? hfreduceRemoteError : hfreduceTimeout));
  CHECK(why.peer == 1 && strstr(why.text, "rank 1 on b") && strstr(why.text, "copy-out"), "%s", why.text);
  hfr_engine_progress(&s[0].engine);
  CHECK(raised(&s[0], &s[0].turn[s[0].turns - 1], 0) && !atomic_load(&s[0].engine.active));
  CHECK(!atomic_load(&s[0].op[0].work->code), "it had ended well");
  spoil(&s[0]); /* who comes late reads this */
  while (hfr_engine_progress(&s[1].engine)) {
  }
  CHECK(atomic_load(&s[1].op[0].work->done));
  close_sides(s, 2);
}

/* Places that a damaged arena names: the data is wrong, and no other memory is touched. */
static void nonsense(void) {
  static const uint64_t at[] = {UINT64_MAX, 1ull << 40, SLOTS * SLOT_BYTES, SLOTS * SLOT_BYTES - 1, UINT64_MAX - 4095};
  static struct side s[RANKS];
  for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
    lend_and_end(s, 0);
    for (int k = 0; k < HFR_SLOTS_MAX; k++) atomic_store(&s[1].arena.ctrl[0].lent[k].at, at[i]);
    while (hfr_engine_progress(&s[1].engine)) {
    }
    CHECK(atomic_load(&s[1].op[0].work->done) && !atomic_load(&s[1].op[0].work->code));
    CHECK(run(s, 2, 1));
    close_sides(s, 2);
  }
}

static size_t resident(const uint8_t *from, size_t bytes) {
  char line[256];
  size_t begin, end, kib, sum = 0;
  int in = 0;
  FILE *f = fopen("/proc/self/smaps", "r");
  while (f && fgets(line, sizeof line, f)) {
    if (sscanf(line, "%zx-%zx ", &begin, &end) == 2) in = begin >= (uintptr_t)from && end <= (uintptr_t)from + bytes;
    if (in && sscanf(line, "Rss: %zu", &kib) == 1) sum += kib << 10;
  }
  if (f) fclose(f);
  return sum;
}

/* At rest the pages of this rank's own area stay where they are, and all content stays. */
static void at_rest(void) {
  static struct side s[RANKS];
  lend_and_end(s, 0);
  struct hfr_arena *a = &s[0].arena;
  for (int r = 0; r < 2; r++) memset(hfr_arena_lending(a, r) + SLOT_BYTES, 7, SLOT_BYTES);
  memset(a->data, 7, CHUNK);
  size_t before = resident(a->map, a->bytes);
  hfr_arena_rest(a);
  size_t after = resident(a->map, a->bytes), mine = SLOT_BYTES;
  CHECK(before >= 2 * mine + CHUNK && after + mine + CHUNK <= before && after >= mine, "%zu bytes, then %zu", before, after);
  CHECK(a->data[0] == 7 && hfr_arena_lending(a, 1)[SLOT_BYTES] == 7);
  CHECK(run(s, 2, 1));
  check_result(&s[1].op[0], 1, 2);
  close_sides(s, 2);
}

/* Closed while a device may still write there: the lending area stays, all else goes. */
static void left_mapped(void) {
  static struct side s[RANKS];
  open_sides(s, 2);
  uint8_t *area = hfr_arena_lending(&s[1].arena, 1), *data = s[1].arena.data;
  unsigned char resident;
  s[1].arena.left = 1;
  close_sides(s, 2);
  memset(area, 1, SLOTS * SLOT_BYTES);
  CHECK(mincore(data, 4096, &resident) < 0, "the slots are still mapped");
  munmap(area, SLOTS * SLOT_BYTES);
}

int main(void) {
  counts();
  ends_at_once();
  for (int gone = 0; gone < 2; gone++) readers_that_stay_away(gone);
  nonsense();
  at_rest();
  left_mapped();
  for (seed = 1; seed < 4000000000u; seed += 71000000u) {
    uint32_t before = seed;
    orders(2);
    orders(RANKS);
    seed = before;
  }
  return check_done();
}
