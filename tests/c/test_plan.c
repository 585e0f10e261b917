/*
 * The planners, with no network: every rank's plan is built and all are executed in this one thread, on small buffers, under a
 * random but reproducible schedule.
 *
 * The simulator is the engine (engine/request.c) without the waiting: it obeys guards, counters and links to the letter, and then
 * is as unkind as they allow. Ranks, stages and the network stall at random until nothing else can move, links have the least
 * credit, posted data leaves late, messages arrive in part. It fails on a deadlock, on a slot read when it holds another chunk
 * (each 8 bytes of a slot carry the number of their chunk) or written by somebody else's rank, on data changed under a pending
 * send, on bounds, on messages that the receiver does not expect, on counters, and on results.
 *
 *   test_plan [--quick] [seed [nranks]]
 */
#include "check.h"
#include "coll/coll.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define MAX_RANKS 128
#define BASE_SLOTS(s) ((uint64_t)(s)->geometry.slots) /* counters start there, as in hfr_engine_init */

/* ---------------------------------------------------------------- chance */

static uint64_t mix(uint64_t x) { /* splitmix64 */
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
static uint64_t chance_state;
static unsigned chance(unsigned n) { return (unsigned)(mix(chance_state++) >> 33) % n; }
/* What rank r holds at i in operation `serial`: no two chunks alike; fp16 values such that averages over a power of two are
 * exact. */
static int64_t value(int serial, hfreduceDataType_t dtype, int r, size_t i) {
  uint64_t h = mix(((uint64_t)serial << 48) ^ ((uint64_t)r << 32) ^ i);
  return dtype == hfreduceFloat16 ? (int64_t)(h % 17) - 8 : (int64_t)(h % 2000003) - 1000001;
}

/* ---------------------------------------------------------------- what is simulated */

enum {
  LAYOUT_ONE,
  LAYOUT_SINGLE,
  LAYOUT_PAIRS,
  LAYOUT_FOURS,
  LAYOUT_EIGHTS,
  LAYOUT_UNEVEN,
  LAYOUT_ROBIN,
  LAYOUT_RANDOM,
  NLAYOUTS
};
static const char *const layout_name[] = {"one node", "1/node",    "2/node",      "4/node",
                                          "8/node",   "3,1,2,...", "round robin", "random"};

struct op {
  enum hfr_coll coll;
  enum hfr_algo algo;
  hfreduceDataType_t dtype;
  hfreduceRedOp_t redop;
  size_t count;
  int serial, root, inplace, premul, uneven, shift; /* shift: HFR_P2P to rank + shift */
  int64_t *want;                                    /* of reductions: the whole result */
};

struct message {
  struct message *next;
  uint64_t seq;
  int serial, vc;
  int64_t iter;
  size_t bytes;
  const uint8_t *src; /* where it lies until taken */
  uint8_t data[];     /* what lay there when it was posted */
};
struct channel {
  struct message *first, *last;
  int count, taken; /* the first `taken` have left the sender's memory */
  uint64_t posted, sent;
};

struct cursor {
  int64_t done, posted;
  uint64_t tx_base;
};
struct request {
  struct request *next;
  const struct op *op;
  struct hfr_plan plan;
  struct cursor *cursor;
  size_t *counts;
  uint64_t base, seq;
  int started, verified, left;
  uint8_t *memory, *send, *recv; /* send and recv may lie in one block */
  size_t send_bytes, recv_bytes;
};
struct rank {
  struct hfr_layout layout;
  uint64_t ctr[HFR_NCTR], seq, base;
  uint8_t *slot;     /* IN x slots, RES x slots */
  uint64_t *tag;     /* number of the chunk, for each 8 bytes of slot */
  uint64_t *p2p_seq; /* [2 * peer + receiving] */
  int next_op;
  struct request *current, *p2p;
};

static struct sim {
  int n, nops, credit, trouble;
  const char *layout;
  uint64_t seed;
  struct hfr_geometry geometry;
  struct rank rank[MAX_RANKS];
  struct channel **channel; /* [(from * n + to) * HFR_NVC + vc] */
  struct op op[64];
  /* the scheduler's mood */
  int stall_mode, stalled_rank, lazy, force;
  uint64_t stall_seed;
} sim;

static const char *describe(const struct op *op) {
  static char text[256];
  snprintf(text, sizeof text, "%s%s #%d count %zu root %d algo %d op %d dtype %d%s%s", op->uneven ? "uneven " : "",
           hfr_coll_name(op->coll), op->serial, op->count, op->root, op->algo, op->redop, op->dtype,
           op->inplace ? " in place" : "", op->premul ? " premul" : "");
  return text;
}

/* The first trouble ends a run: what follows is its consequence. */
#define TROUBLE(r, req, stage_, ...)                                                                                            \
  do {                                                                                                                          \
    if (!sim.trouble++) {                                                                                                       \
      char what_[160];                                                                                                          \
      snprintf(what_, sizeof what_, __VA_ARGS__);                                                                               \
      CHECK(!"trouble", "%s\n  n %d, %s, slots %d, credit %d, seed %" PRIu64 ": %s: rank %d, stage %s (role %d)", what_, sim.n, \
            sim.layout, sim.geometry.slots, sim.credit, sim.seed, describe((req)->op), (r),                                     \
            (stage_) < 0 ? "-" : (req)->plan.stage[stage_].name, (stage_) < 0 ? -1 : (req)->plan.stage[stage_].role);           \
    }                                                                                                                           \
  } while (0)

static void *grab(size_t bytes) {
  void *p = calloc(bytes ? bytes : 1, 1);
  if (!p) abort();
  return p;
}

/* ---------------------------------------------------------------- places */

/* Address of a place of `bytes` bytes, after checking that it may be read or written now. NULL: trouble. */
static uint8_t *place(int me, struct request *q, int stage, const struct hfr_loc *loc, size_t bytes, int writing) {
  struct rank *r = &sim.rank[me];
  if (!bytes) return r->slot; /* anywhere */
  if (loc->space == HFR_SEND || loc->space == HFR_RECV) {
    uint8_t *user = loc->space == HFR_SEND ? q->send : q->recv;
    size_t size = loc->space == HFR_SEND ? q->send_bytes : q->recv_bytes;
    if (loc->off > size || bytes > size - loc->off) {
      TROUBLE(me, q, stage, "%zu bytes at %zu of a %s buffer of %zu", bytes, loc->off,
              loc->space == HFR_SEND ? "send" : "receive", size);
      return NULL;
    }
    if (writing && loc->space == HFR_SEND) TROUBLE(me, q, stage, "writes the send buffer");
    return user + loc->off;
  }
  if ((loc->space != HFR_IN && loc->space != HFR_RES) || loc->index < 0 || loc->index >= r->layout.nlocal) {
    TROUBLE(me, q, stage, "no such place: space %d of local rank %d", loc->space, loc->index);
    return NULL;
  }
  if (writing && loc->index != r->layout.local) TROUBLE(me, q, stage, "writes the slot of local rank %d", loc->index);
  if (loc->off > sim.geometry.chunk || bytes > sim.geometry.chunk - loc->off || loc->chunk < 0 || loc->chunk >= q->plan.nchunks) {
    TROUBLE(me, q, stage, "%zu bytes at %zu of a slot of %zu, chunk %" PRId64 " of %" PRId64, bytes, loc->off, sim.geometry.chunk,
            loc->chunk, q->plan.nchunks);
    return NULL;
  }
  struct rank *owner = &sim.rank[hfr_rank_at(&r->layout, r->layout.node, loc->index)];
  uint64_t number = q->base + (uint64_t)loc->chunk, slots = (uint64_t)sim.geometry.slots;
  size_t at = (size_t)((loc->space == HFR_RES ? slots : 0) + number % slots) * sim.geometry.chunk + loc->off;
  for (size_t g = at / 8; g <= (at + bytes - 1) / 8; g++) {
    if (writing) {
      owner->tag[g] = number;
    } else if (owner->tag[g] != number) {
      TROUBLE(me, q, stage,
              "reads chunk %" PRIu64 " in the %s slot of local rank %d where chunk %" PRIu64 " lies (counting from %" PRIu64 ")",
              number, loc->space == HFR_IN ? "IN" : "RES", loc->index, owner->tag[g], q->base);
      return NULL;
    }
  }
  return owner->slot + at;
}

static int apart(const uint8_t *a, const uint8_t *b, size_t bytes) { return a == b || a + bytes <= b || b + bytes <= a; }

/* ---------------------------------------------------------------- links */

static int is_local(int a, int b) { return sim.rank[a].layout.node_of[a] == sim.rank[a].layout.node_of[b]; }

static struct channel *channel(int from, int to, int vc) {
  if (is_local(from, to) && vc != HFR_VC_P2P) vc = HFR_VC_A; /* one ring, as transport/shm.c has it */
  struct channel **c = &sim.channel[((size_t)from * (size_t)sim.n + (size_t)to) * HFR_NVC + (size_t)vc];
  if (!*c) *c = grab(sizeof **c);
  return *c;
}

/* The link takes the oldest message that still lies in the sender's memory. */
static void take(int from, struct request *q, int stage, struct channel *c) {
  struct message *m = c->first;
  for (int i = 0; i < c->taken; i++) m = m->next;
  if (m->bytes && memcmp(m->data, m->src, m->bytes))
    TROUBLE(from, q, stage, "message %" PRId64 " changed before it was sent", m->iter);
  c->taken++;
  c->sent++;
}

/* Take as the network pleases. */
static void take_some(int from, struct request *q, int stage, struct channel *c) {
  while (c->count > c->taken && c->taken < sim.credit && (sim.force || !sim.lazy || chance(4) == 0)) take(from, q, stage, c);
}

static int post(int me, struct request *q, int stage, const struct hfr_step *s, int64_t iter) {
  struct hfr_stage *st = &q->plan.stage[stage];
  struct channel *c = channel(me, st->peer, st->vc);
  int local = is_local(me, st->peer);
  if (local ? c->count >= HFR_RING_SLOTS : c->count - c->taken >= (sim.credit ? sim.credit : 1)) return 0;
  if (s->bytes > (local ? sim.geometry.ring_slot : sim.geometry.chunk)) TROUBLE(me, q, stage, "a message of %zu bytes", s->bytes);
  if (local && st->vc != HFR_VC_P2P && st->vc != HFR_VC_A) TROUBLE(me, q, stage, "channel %d inside a node", st->vc);
  const uint8_t *src = place(me, q, stage, &s->src, s->bytes, 0);
  if (!src) return 0;
  struct message *m = grab(sizeof *m + s->bytes);
  *m = (struct message){.seq = q->seq, .serial = q->op->serial, .vc = st->vc, .iter = iter, .bytes = s->bytes, .src = src};
  memcpy(m->data, src, s->bytes);
  if (c->first)
    c->last->next = m;
  else
    c->first = m;
  c->last = m;
  c->count++;
  c->posted++;
  if (local) take(me, q, stage, c);
  return 1;
}

/* The next message, or NULL if it is not there. Stays until release(). */
static struct message *receive(int me, struct request *q, int stage, int peer, int vc, int64_t iter, size_t bytes) {
  struct channel *c = channel(peer, me, vc);
  struct message *m = c->first;
  if (!m || sim.trouble) return NULL;
  if (m->seq != q->seq || m->serial != q->op->serial || m->iter != iter || m->bytes != bytes || m->vc != vc) {
    TROUBLE(me, q, stage,
            "rank %d sends message %" PRId64 " of %zu bytes on channel %d (operation %d), expected %" PRId64 " of %zu on %d",
            peer, m->iter, m->bytes, m->vc, m->serial, iter, bytes, vc);
    return NULL;
  }
  if (!c->taken) take(peer, q, stage, c); /* read straight from the sender: there was no buffer */
  return m;
}

static void release(int me, int peer, int vc) {
  struct channel *c = channel(peer, me, vc);
  struct message *m = c->first;
  c->first = m->next;
  c->count--;
  c->taken--;
  free(m);
}

/* ---------------------------------------------------------------- steps, as in engine/request.c */

static int verify(int me, struct request *q) {
  const struct hfr_layout *l = &sim.rank[me].layout;
  for (int i = 0; i < l->nlocal; i++)
    if (sim.rank[hfr_rank_at(l, l->node, i)].ctr[HFR_CTR_START] < q->seq) return 0;
  q->verified = 1;
  return 1;
}

static int counter_reached(int me, const struct request *q, const struct hfr_guard *g) {
  const struct hfr_layout *l = &sim.rank[me].layout;
  int from = 0, to = l->nlocal;
  if (g->who == HFR_ONE) from = g->first, to = from + 1;
  if (g->who == HFR_LANES) to = l->lanes;
  uint64_t need = g->ctr == HFR_CTR_START || g->ctr == HFR_CTR_VER ? q->seq : (uint64_t)((int64_t)q->base + g->need);
  for (int i = from; i < to; i++)
    if (sim.rank[hfr_rank_at(l, l->node, i)].ctr[g->ctr] < need) return 0;
  return 1;
}

static int guards_open(int me, struct request *q, int stage, const struct hfr_step *s) {
  if (s->nguards > HFR_MAX_GUARDS) TROUBLE(me, q, stage, "%d guards", s->nguards);
  for (int j = 0; j < s->nguards; j++) {
    const struct hfr_guard *g = &s->guard[j];
    if (g->who == HFR_OWN) {
      if (g->first < 0 || g->first + g->n > q->plan.nstages)
        TROUBLE(me, q, stage, "waits for stages %d..%d", g->first, g->first + g->n - 1);
      for (int i = g->first; i < g->first + g->n; i++)
        if (q->cursor[i].done < g->need) return 0;
    } else if ((g->need > 0 && !q->verified && !verify(me, q)) || !counter_reached(me, q, g)) {
      return 0;
    }
  }
  return 1;
}

static int do_copy(int me, struct request *q, int stage, int64_t i, const struct hfr_step *s) {
  for (int j = 0; j < s->nparts; j++) {
    struct hfr_part p;
    q->plan.part(&q->plan, stage, i, j, &p);
    const uint8_t *src = place(me, q, stage, &p.src, p.bytes, 0);
    uint8_t *dst = src ? place(me, q, stage, &p.dst, p.bytes, 1) : NULL;
    if (!dst) return 0;
    if (!apart(dst, src, p.bytes)) TROUBLE(me, q, stage, "part %d overlaps its source", j);
    if (q->plan.stage[stage].premul)
      hfr_premul(dst, src, p.bytes / q->plan.esize, q->plan.call.dtype, q->plan.call.scalar);
    else if (dst != src && p.bytes)
      memcpy(dst, src, p.bytes);
  }
  return 1;
}

static int do_reduce(int me, struct request *q, int stage, int64_t i, const struct hfr_step *s) {
  const struct hfr_stage *st = &q->plan.stage[stage];
  const struct hfr_call *call = &q->plan.call;
  struct hfr_loc from[MAX_RANKS + 8];
  const void *source[MAX_RANKS + 8];
  if (!s->bytes && !s->nparts) return 1;
  if (s->nparts > sim.n + 8) {
    TROUBLE(me, q, stage, "%d sources: more than the engine has room for", s->nparts);
    return 0;
  }
  for (int j = 0; j < s->nparts; j++) {
    struct hfr_part p;
    q->plan.part(&q->plan, stage, i, j, &p);
    from[j] = p.src;
    if (p.src.space != HFR_MSG) {
      if (!(source[j] = place(me, q, stage, &p.src, s->bytes, 0))) return 0;
    } else {
      struct message *m = receive(me, q, stage, p.src.index, p.src.vc, i, s->bytes);
      if (!m) return 0;
      source[j] = m->data;
    }
  }
  struct hfr_scale scale = {0};
  int avg = call->op == hfreduceAvg;
  if (avg && q->plan.avg_pre)
    scale.npre = st->npre, scale.pre = 1.0 / sim.n;
  else if (avg && (st->final || s->final))
    scale.div = (uint64_t)sim.n;
  if (s->bytes) {
    uint8_t *dst = place(me, q, stage, &s->dst, s->bytes, 1);
    for (int j = 0; dst && j < s->nparts; j++)
      if (!apart(dst, source[j], s->bytes)) TROUBLE(me, q, stage, "source %d overlaps the result", j);
    if (sim.trouble) return 0;
    hfr_reduce(dst, source, s->nparts, s->bytes / q->plan.esize, call->dtype, avg ? HFR_OP_SUM : (enum hfr_op)call->op, &scale);
    uint8_t *also = st->doubled ? place(me, q, stage, &s->also, s->bytes, 1) : NULL;
    if (also) memcpy(also, dst, s->bytes);
  }
  for (int j = 0; j < s->nparts; j++)
    if (from[j].space == HFR_MSG) release(me, from[j].index, from[j].vc);
  return 1;
}

static int do_recv(int me, struct request *q, int stage, int64_t i, const struct hfr_step *s) {
  const struct hfr_stage *st = &q->plan.stage[stage];
  struct message *waiting = channel(st->peer, me, st->vc)->first;
  if (waiting && waiting->bytes == s->bytes && !is_local(me, st->peer) && !sim.force &&
      chance(4) == 0) { /* half of it has come so far */
    uint8_t *dst = place(me, q, stage, &s->dst, s->bytes / 2, 1);
    if (dst) memcpy(dst, waiting->data, s->bytes / 2);
    return 0;
  }
  struct message *m = receive(me, q, stage, st->peer, st->vc, i, s->bytes);
  if (!m) return 0;
  uint8_t *dst = place(me, q, stage, &s->dst, s->bytes, 1);
  if (!dst) return 0;
  memcpy(dst, m->data, s->bytes);
  release(me, st->peer, st->vc);
  return 1;
}

static void load_step(struct request *q, int stage, int64_t i, struct hfr_step *s) {
  memset(s, 0, sizeof *s);
  s->src.space = s->dst.space = 255; /* whoever uses a place must have set it */
  q->plan.step(&q->plan, stage, i, s);
}

static int advance_send(int me, struct request *q, int stage) {
  struct hfr_stage *st = &q->plan.stage[stage];
  struct cursor *c = &q->cursor[stage];
  struct channel *ch = channel(me, st->peer, st->vc);
  int moved = 0;
  if (c->posted < st->niter) {
    struct hfr_step s;
    load_step(q, stage, c->posted, &s);
    if (guards_open(me, q, stage, &s) && post(me, q, stage, &s, c->posted)) c->posted++, moved = 1;
  }
  take_some(me, q, stage, ch);
  int64_t now = (int64_t)(ch->sent - c->tx_base);
  if (now > c->done) c->done = now, moved = 1;
  return moved;
}

static int advance(int me, struct request *q, int stage) {
  struct hfr_stage *st = &q->plan.stage[stage];
  struct cursor *c = &q->cursor[stage];
  int moved;
  if (c->done == st->niter || sim.trouble) return 0;
  if (st->kind == HFR_STAGE_SEND) {
    moved = advance_send(me, q, stage);
  } else {
    struct hfr_step s;
    load_step(q, stage, c->done, &s);
    moved = guards_open(me, q, stage, &s) && (st->kind == HFR_STAGE_COPY     ? do_copy(me, q, stage, c->done, &s)
                                              : st->kind == HFR_STAGE_REDUCE ? do_reduce(me, q, stage, c->done, &s)
                                              : st->kind == HFR_STAGE_RECV   ? do_recv(me, q, stage, c->done, &s)
                                                                             : 1);
    if (moved) c->done++;
  }
  if (moved && st->ctr != HFR_CTR_NONE) {
    uint64_t now = st->ctr == HFR_CTR_VER ? q->seq : q->base + (uint64_t)c->done, *ctr = &sim.rank[me].ctr[st->ctr];
    if (now <= *ctr) TROUBLE(me, q, stage, "counter %d goes from %" PRIu64 " to %" PRIu64, st->ctr, *ctr, now);
    *ctr = now;
  }
  if (moved && c->done == st->niter) q->left--;
  return moved;
}

/* ---------------------------------------------------------------- calls: their buffers and results */

static size_t uneven_count(const struct op *op, int from, int to) {
  uint64_t h = mix(((uint64_t)op->serial << 40) ^ ((uint64_t)from << 20) ^ (uint64_t)to);
  return h & 3 ? (h >> 8) % (op->count + 1) : 0; /* a quarter are empty */
}
/* Blocks of an uneven all_to_all lie one element apart. */
static size_t uneven_offset(const struct op *op, int from, int to, int sending) {
  size_t at = 0;
  for (int p = 0; p < (sending ? to : from); p++) at += 1 + (sending ? uneven_count(op, from, p) : uneven_count(op, p, to));
  return at;
}

static int64_t factor(int r) { return r % 5 - 3; }

/* Elements of the send and the receive buffer. */
static void sizes(const struct op *op, int me, int receiving, size_t *send, size_t *recv) {
  size_t n = (size_t)sim.n, all = n * op->count, at_root = me == op->root;
  *send = *recv = op->count;
  switch (op->coll) {
    case HFR_REDUCE: *recv *= at_root; break;
    case HFR_BROADCAST: *send *= at_root; break;
    case HFR_ALL_GATHER: *recv = all; break;
    case HFR_REDUCE_SCATTER: *send = all; break;
    case HFR_ALL_TO_ALL:
      *send = op->uneven ? uneven_offset(op, me, sim.n, 1) : all;
      *recv = op->uneven ? uneven_offset(op, sim.n, me, 0) : all;
      break;
    case HFR_GATHER: *recv = all * at_root; break;
    case HFR_SCATTER: *send = all * at_root; break;
    case HFR_BARRIER: *send = *recv = 0; break;
    case HFR_P2P: *(receiving ? send : recv) = 0; break;
    default: break;
  }
}

static void put(const struct op *op, uint8_t *at, size_t i, int64_t v) {
  if (op->dtype == hfreduceInt64) {
    memcpy(at + 8 * i, &v, 8);
  } else {
    float f = (float)v;
    hfr_convert(at + 2 * i, hfreduceFloat16, &f, hfreduceFloat32, 1);
  }
}

/* The element as the sum's share: fp16 results times nranks are whole. */
static double get(const struct op *op, const uint8_t *at, size_t i) {
  if (op->dtype == hfreduceInt64) {
    int64_t v;
    memcpy(&v, at + 8 * i, 8);
    return (double)v;
  }
  float f;
  hfr_convert(&f, hfreduceFloat32, at + 2 * i, hfreduceFloat16, 1);
  return f;
}

/* Buffers: one block, that no two calls share; in place they overlap by NCCL's rules. */
static void make_buffers(struct request *q, int me, int receiving) {
  const struct op *op = q->op;
  size_t send, recv, esize = hfr_dtype_size(op->dtype), shift = (size_t)me * op->count * esize;
  sizes(op, me, receiving, &send, &recv);
  q->send_bytes = send * esize;
  q->recv_bytes = recv * esize;
  q->memory = grab(q->send_bytes + q->recv_bytes);
  memset(q->memory, 0x5a, q->send_bytes + q->recv_bytes);
  q->recv = q->memory + q->send_bytes;
  q->send = q->memory;
  int both = q->send_bytes && q->recv_bytes;
  if (op->inplace && both) {
    switch (op->coll) {
      case HFR_ALL_REDUCE:
      case HFR_REDUCE:
      case HFR_BROADCAST: q->recv = q->send; break;
      case HFR_ALL_GATHER:
      case HFR_GATHER: q->send = q->recv + shift; break;
      case HFR_REDUCE_SCATTER:
      case HFR_SCATTER: q->recv = q->send + shift; break;
      default: break;
    }
  }
  for (size_t i = 0; i < send; i++) put(op, q->send, i, value(op->serial, op->dtype, me, i));
}

static void make_want(struct op *op, size_t n) {
  op->want = grab(n * sizeof *op->want);
  for (size_t i = 0; i < n; i++) {
    int64_t acc = op->redop == hfreduceMax ? INT64_MIN : 0;
    for (int r = 0; r < sim.n; r++) {
      int64_t v = value(op->serial, op->dtype, r, i) * (op->premul ? factor(r) : 1);
      acc = op->redop != hfreduceMax ? acc + v : v > acc ? v : acc;
    }
    op->want[i] = op->redop == hfreduceAvg && op->dtype == hfreduceInt64 ? acc / sim.n : acc;
  }
}

/* What must be at i of the receive buffer. */
static double expected(const struct op *op, int me, size_t i) {
  size_t block = op->count ? i / op->count : 0, in = op->count ? i % op->count : 0, mine = (size_t)me * op->count;
  double share = op->dtype == hfreduceFloat16 && op->redop == hfreduceAvg ? 1.0 / sim.n : 1.0;
  switch (op->coll) {
    case HFR_ALL_REDUCE:
    case HFR_REDUCE: return (double)op->want[i] * share;
    case HFR_REDUCE_SCATTER: return (double)op->want[mine + i] * share;
    case HFR_BROADCAST: return (double)value(op->serial, op->dtype, op->root, i);
    case HFR_ALL_GATHER:
    case HFR_GATHER: return (double)value(op->serial, op->dtype, (int)block, in);
    case HFR_ALL_TO_ALL: return (double)value(op->serial, op->dtype, (int)block, mine + in);
    case HFR_SCATTER: return (double)value(op->serial, op->dtype, op->root, mine + i);
    default: return (double)value(op->serial, op->dtype, (me + sim.n - op->shift) % sim.n, i);
  }
}

static void check_uneven(struct request *q, int me) {
  const struct op *op = q->op;
  size_t at = 0;
  for (int j = 0; j < sim.n; j++) {
    size_t count = uneven_count(op, j, me), from = uneven_offset(op, j, me, 1);
    for (size_t i = 0; i < count; i++)
      if (get(op, q->recv, at + i) != (double)value(op->serial, op->dtype, j, from + i))
        TROUBLE(me, q, -1, "element %zu from rank %d is wrong", i, j);
    at += count;
    if (q->recv[at++ * 8] != 0x5a) TROUBLE(me, q, -1, "writes behind the block of rank %d", j);
  }
}

static void check_results(struct request *q, int me, int receiving) {
  const struct op *op = q->op;
  size_t esize = q->plan.esize, elems = q->recv_bytes / esize;
  if (op->coll == HFR_BARRIER || (op->coll == HFR_P2P && !receiving)) elems = 0;
  if (op->uneven) check_uneven(q, me), elems = 0;
  for (size_t i = 0; i < elems && !sim.trouble; i++) {
    double got = get(op, q->recv, i), want = expected(op, me, i);
    if (got != want)
      TROUBLE(me, q, -1, "element %zu of %zu is %g, expected %g (chunks of %zu)", i, elems, got, want, q->plan.elems);
  }
  if (!op->inplace)
    for (size_t i = 0; i < q->send_bytes / esize; i++)
      if (get(op, q->send, i) != (double)value(op->serial, op->dtype, me, i))
        TROUBLE(me, q, -1, "the send buffer has changed at %zu", i);
}

/* ---------------------------------------------------------------- requests */

static int uses_messages_twice(const struct request *q) { /* two stages on one link would count each other's messages */
  static uint32_t seen[MAX_RANKS * HFR_NVC * 2], now;
  now++;
  for (int s = 0; s < q->plan.nstages; s++) {
    const struct hfr_stage *st = &q->plan.stage[s];
    if (st->kind != HFR_STAGE_SEND && st->kind != HFR_STAGE_RECV) continue;
    uint32_t *mark = &seen[(st->peer * HFR_NVC + st->vc) * 2 + (st->kind == HFR_STAGE_SEND)];
    if (*mark == now) return 1;
    *mark = now;
  }
  return 0;
}

/* A receive has no plan of its own: it takes the parts that the sender's plan cuts, as engine/p2p.c does. */
static void step_receive(const struct hfr_plan *p, int stage, int64_t i, struct hfr_step *s) {
  size_t unit = hfr_message_bytes(p->layout, &p->geometry, p->stage[stage].peer, p->esize), at = (size_t)i * unit,
         left = p->call.count * p->esize - at;
  s->bytes = left < unit ? left : unit;
  s->dst = hfr_user(HFR_RECV, at);
}

static void plan_receive(struct request *q) {
  struct hfr_plan *p = &q->plan;
  if (p->nstages) TROUBLE(p->layout->rank, q, 0, "a receive with %d stages", p->nstages);
  size_t bytes = p->call.count * p->esize, unit = hfr_message_bytes(p->layout, &p->geometry, p->call.root, p->esize);
  struct hfr_stage *s = hfr_plan_add(p, 0, HFR_STAGE_RECV, bytes ? (int64_t)((bytes + unit - 1) / unit) : 1, "recv");
  s->peer = p->call.root;
  s->vc = HFR_VC_P2P;
  p->step = step_receive;
}

static struct request *make_request(int me, struct op *op, int receiving) {
  struct rank *r = &sim.rank[me];
  struct request *q = grab(sizeof *q);
  q->op = op;
  make_buffers(q, me, receiving);
  struct hfr_geometry geometry = sim.geometry;
  geometry.algo = op->algo;
  struct hfr_call call = {.coll = op->coll,
                          .receiving = receiving,
                          .send = q->send,
                          .recv = q->recv,
                          .count = op->count,
                          .dtype = op->dtype,
                          .op = op->redop,
                          .root = op->root,
                          .premul = op->premul};
  if (op->coll == HFR_P2P) call.root = (me + (receiving ? sim.n - op->shift : op->shift)) % sim.n;
  if (op->premul) memcpy(call.scalar, &(int64_t){factor(me)}, 8);
  if (op->uneven) {
    size_t n = (size_t)sim.n, *at = q->counts = grab(4 * n * sizeof *at);
    for (int p = 0; p < sim.n; p++) {
      at[p] = uneven_count(op, me, p);
      at[n + (size_t)p] = uneven_offset(op, me, p, 1);
      at[2 * n + (size_t)p] = uneven_count(op, p, me);
      at[3 * n + (size_t)p] = uneven_offset(op, p, me, 0);
    }
    call.count = 0;
    call.sendcounts = at, call.senddispls = at + n, call.recvcounts = at + 2 * n, call.recvdispls = at + 3 * n;
  }
  if (hfr_plan_build(&q->plan, &r->layout, &geometry, &call)) abort();
  if (op->coll == HFR_P2P && receiving) plan_receive(q);
  q->cursor = grab((size_t)q->plan.nstages * sizeof *q->cursor);
  for (int s = 0; s < q->plan.nstages; s++)
    if (q->plan.stage[s].niter < 0) TROUBLE(me, q, s, "%" PRId64 " iterations", q->plan.stage[s].niter);
  if (uses_messages_twice(q)) TROUBLE(me, q, -1, "two stages share a link");
  return q;
}

static void start(int me, struct request *q) {
  struct rank *r = &sim.rank[me];
  q->started = 1;
  for (int s = 0; s < q->plan.nstages; s++) {
    struct hfr_stage *st = &q->plan.stage[s];
    q->left += st->niter > 0;
    if (st->kind == HFR_STAGE_SEND) q->cursor[s].tx_base = channel(me, st->peer, st->vc)->posted;
  }
  if (q->op->coll == HFR_P2P) {
    q->verified = 1;
    q->seq = ++r->p2p_seq[2 * q->plan.call.root + q->plan.call.receiving];
  } else {
    q->seq = ++r->seq;
    q->base = r->base;
    r->ctr[HFR_CTR_START] = q->seq;
  }
}

static void free_request(struct request *q) {
  hfr_plan_fini(&q->plan);
  free(q->cursor);
  free(q->counts);
  free(q->memory);
  free(q);
}

static void end_collective(int me, struct request *q) {
  struct rank *r = &sim.rank[me];
  uint64_t end = q->base + (uint64_t)q->plan.nchunks;
  for (int c = HFR_CTR_IN; c <= HFR_CTR_OUT; c++) {
    if (r->ctr[c] > end) TROUBLE(me, q, -1, "counter %d ends at %" PRIu64 ", not %" PRIu64, c, r->ctr[c], end);
    r->ctr[c] = end;
  }
  r->base = end;
}

/* ---------------------------------------------------------------- the schedule */

static int stalled(int me, int stage) {
  if (sim.force) return 0;
  uint64_t h = mix(sim.stall_seed ^ ((uint64_t)me << 32) ^ (uint64_t)(unsigned)stage),
           of_rank = mix(sim.stall_seed + (uint64_t)me);
  switch (sim.stall_mode) {
    case 0: return 0;
    case 1: return of_rank & 1;
    case 2: return me == sim.stalled_rank;
    case 3: return h & 1;
    case 4: return me != sim.stalled_rank;
    case 5: return (h & 7) == 0;
    default: return (h & 3) != 0;
  }
}

static int progress(int me, struct request *q) {
  int moved = 0, n = q->plan.nstages, from = n ? (int)chance((unsigned)n) : 0;
  for (int k = 0; k < n && !sim.trouble; k++) {
    int s = from + k < n ? from + k : from + k - n;
    if (q->cursor[s].done == q->plan.stage[s].niter || stalled(me, s)) continue;
    for (unsigned burst = chance(4); advance(me, q, s); burst--) {
      moved = 1;
      if (!burst) break;
    }
  }
  if (!q->verified && verify(me, q)) moved = 1;
  return moved;
}

static int progress_p2p(int me) {
  int moved = 0;
  for (struct request **at = &sim.rank[me].p2p; *at;) {
    struct request *q = *at, *before = sim.rank[me].p2p;
    int receiving = q->plan.call.receiving;
    for (; before != q; before = before->next) /* in order for each peer and direction */
      if (before->plan.call.root == q->plan.call.root && before->plan.call.receiving == receiving) break;
    if (before == q) {
      if (!q->started) start(me, q);
      moved |= progress(me, q);
      if (!q->left) {
        check_results(q, me, receiving);
        *at = q->next;
        free_request(q);
        moved = 1;
        continue;
      }
    }
    at = &q->next;
  }
  return moved;
}

static void submit_p2p(int me, struct op *op) {
  struct request **tail = &sim.rank[me].p2p;
  for (int k = 0; k < 2; k++) {
    while (*tail) tail = &(*tail)->next;
    *tail = make_request(me, op, k ^ (op->serial & 1));
  }
}

static int progress_rank(int me) {
  struct rank *r = &sim.rank[me];
  int moved = 0;
  if (!r->current && r->next_op < sim.nops) {
    struct op *op = &sim.op[r->next_op++];
    moved = 1;
    if (op->coll == HFR_P2P) {
      submit_p2p(me, op);
    } else {
      r->current = make_request(me, op, 0);
      start(me, r->current);
    }
  }
  if (r->p2p) moved |= progress_p2p(me);
  struct request *q = r->current;
  if (!q) return moved;
  moved |= progress(me, q);
  if (q->verified && !q->left && !sim.trouble) {
    end_collective(me, q);
    check_results(q, me, 0);
    free_request(q);
    r->current = NULL;
    moved = 1;
  }
  return moved;
}

static int pass(void) {
  int moved = 0, from = (int)chance((unsigned)sim.n);
  for (int k = 0; k < sim.n && !sim.trouble; k++) {
    int me = (from + k) % sim.n;
    if (sim.stall_mode == 4 && !sim.force && me != sim.stalled_rank) continue;
    moved |= progress_rank(me);
  }
  return moved;
}

static int all_done(void) {
  for (int r = 0; r < sim.n; r++)
    if (sim.rank[r].current || sim.rank[r].p2p || sim.rank[r].next_op < sim.nops) return 0;
  return 1;
}

static void report_deadlock(void) {
  int shown = 0;
  for (int r = 0; r < sim.n; r++) {
    struct request *q = sim.rank[r].current ? sim.rank[r].current : sim.rank[r].p2p;
    if (!q) continue;
    TROUBLE(r, q, -1, "deadlock");
    for (int s = 0; s < q->plan.nstages && shown < 20; s++)
      if (q->cursor[s].done < q->plan.stage[s].niter)
        fprintf(stderr, "  rank %d %s: %s (role %d) stands at %" PRId64 " (posted %" PRId64 ") of %" PRId64 "\n", r,
                describe(q->op), q->plan.stage[s].name, q->plan.stage[s].role, q->cursor[s].done, q->cursor[s].posted,
                q->plan.stage[s].niter),
            shown++;
  }
}

static void run_schedule(void) {
  while (!sim.trouble && !all_done()) {
    static const int mode[] = {0, 0, 1, 2, 3, 4, 5, 6};
    sim.stall_mode = mode[chance(8)];
    sim.stalled_rank = (int)chance((unsigned)sim.n);
    sim.stall_seed = mix(chance_state);
    sim.lazy = chance(2) == 0;
    sim.force = 0;
    int moved = 0;
    while (pass()) {
      moved = 1;
      if (chance(8) == 0 || sim.trouble) break;
    }
    sim.force = 1;
    if (!moved && !sim.trouble && !pass() && !all_done()) report_deadlock();
  }
}

/* ---------------------------------------------------------------- scenarios */

static void make_labels(int kind, int n, int *label) {
  static const int cycle[] = {3, 1, 2, 5, 1};
  int nodes = n / 3 > 2 ? n / 3 : 2, left = cycle[0], node = 0;
  for (int r = 0; r < n; r++) {
    switch (kind) {
      case LAYOUT_ONE: label[r] = 7; break;
      case LAYOUT_SINGLE: label[r] = -r; break;
      case LAYOUT_PAIRS: label[r] = r / 2; break;
      case LAYOUT_FOURS: label[r] = r / 4; break;
      case LAYOUT_EIGHTS: label[r] = r / 8; break;
      case LAYOUT_UNEVEN:
        label[r] = node;
        if (!--left) left = cycle[++node % 5];
        break;
      case LAYOUT_ROBIN: label[r] = r % nodes; break;
      default: label[r] = (int)chance((unsigned)(1 + n / 2)); break;
    }
  }
}

static void open_sim(int n, int kind, int slots, int credit, uint64_t seed) {
  int label[MAX_RANKS];
  memset(&sim, 0, sizeof sim);
  chance_state = mix(seed) ^ (uint64_t)n ^ ((uint64_t)kind << 8);
  sim.n = n;
  sim.layout = layout_name[kind];
  sim.seed = seed;
  sim.credit = credit;
  /* A slot holds a piece for every rank: a floor that real chunks are far above. */
  sim.geometry = (struct hfr_geometry){.chunk = n <= 64 ? 512 : 1024, .ring_slot = 256, .slots = slots};
  make_labels(kind, n, label);
  sim.channel = grab((size_t)n * (size_t)n * HFR_NVC * sizeof *sim.channel);
  for (int r = 0; r < n; r++) {
    struct rank *k = &sim.rank[r];
    size_t bytes = 2 * (size_t)slots * sim.geometry.chunk;
    if (hfr_layout_init(&k->layout, r, n, label)) abort();
    k->slot = grab(bytes);
    k->tag = grab(bytes);
    k->p2p_seq = grab(2 * (size_t)n * sizeof *k->p2p_seq);
    k->base = k->ctr[HFR_CTR_IN] = k->ctr[HFR_CTR_RED] = k->ctr[HFR_CTR_OUT] = BASE_SLOTS(&sim);
  }
}

static void close_sim(void) {
  for (int r = 0; r < sim.n; r++) {
    struct rank *k = &sim.rank[r];
    if (k->current) free_request(k->current);
    for (struct request *q; (q = k->p2p);) k->p2p = q->next, free_request(q);
    hfr_layout_fini(&k->layout);
    free(k->slot), free(k->tag), free(k->p2p_seq);
  }
  for (size_t i = 0; i < (size_t)sim.n * (size_t)sim.n * HFR_NVC; i++) {
    struct channel *c = sim.channel[i];
    if (c && c->first && !sim.trouble) CHECK(!"message left over", "n %d, %s, seed %" PRIu64, sim.n, sim.layout, sim.seed);
    for (struct message *m; c && (m = c->first);) c->first = m->next, free(m);
    free(c);
  }
  for (int i = 0; i < sim.nops; i++) free(sim.op[i].want);
  free(sim.channel);
}

/* Elements of a chunk of such a call. */
static size_t chunk_elems(const struct op *op) {
  struct hfr_plan plan = {0};
  struct hfr_geometry geometry = sim.geometry;
  struct hfr_call call = {.coll = op->coll,
                          .count = 1 << 20,
                          .dtype = op->dtype,
                          .op = op->redop,
                          .root = op->root < 0 ? 0 : op->root,
                          .premul = op->premul};
  geometry.algo = op->algo;
  if (hfr_plan_build(&plan, &sim.rank[0].layout, &geometry, &call)) abort();
  hfr_plan_fini(&plan);
  return plan.elems ? plan.elems : sim.geometry.ring_slot / 8;
}

/* An operation with a count that gives about `chunks` chunks (-1: a single element). */
static void add_op(struct op op, int chunks, size_t most) {
  op.serial = sim.nops;
  if (op.coll != HFR_BARRIER && chunks) {
    size_t unit = chunk_elems(&op);
    op.count = chunks < 0 ? 1 : (size_t)chunks * unit - (unit > 1 ? chance((unsigned)unit) : 0);
    if (op.count > most) op.count = most - chance((unsigned)(most / 2 + 1));
  }
  int wide = op.coll == HFR_REDUCE_SCATTER;
  struct op *at = &sim.op[sim.nops++];
  *at = op;
  if (op.coll == HFR_ALL_REDUCE || op.coll == HFR_REDUCE || wide) make_want(at, op.count * (wide ? (size_t)sim.n : 1));
}

static int some_chunks(void) {
  static const int chunks[] = {-1, 1, 1, 2, 3, 3, 4, 5, 7, 10};
  return chunks[chance(10)];
}

/* Every collective, in an order that differs from seed to seed, back to back on one state. */
static void run_scenario(int n, int kind, int slots, int credit, uint64_t seed) {
  open_sim(n, kind, slots, credit, seed);
  struct op todo[40] = {0};
  int ntodo = 0, both = n & (n - 1) ? 0 : 1;
  size_t wide = (size_t)(2000000 / (n * n)) / 8, most = (size_t)(4000000 / n) / 8;
  for (int algo = HFR_ALGO_AUTO; algo <= HFR_ALGO_RING; algo++)
    todo[ntodo++] = (struct op){.coll = HFR_ALL_REDUCE, .algo = (enum hfr_algo)algo, .redop = hfreduceSum};
  todo[ntodo++] = (struct op){.coll = HFR_ALL_REDUCE, .algo = (enum hfr_algo)chance(4), .redop = hfreduceMax};
  todo[ntodo++] = (struct op){.coll = HFR_ALL_REDUCE,
                              .algo = (enum hfr_algo)chance(4),
                              .redop = hfreduceAvg,
                              .dtype = both ? hfreduceFloat16 : hfreduceInt64};
  todo[ntodo++] = (struct op){.coll = HFR_ALL_REDUCE, .algo = (enum hfr_algo)chance(4), .premul = 1};
  for (int k = 0; k < 2; k++) {
    todo[ntodo++] = (struct op){
        .coll = HFR_REDUCE, .redop = k ? hfreduceAvg : hfreduceSum, .dtype = k && both ? hfreduceFloat16 : hfreduceInt64};
    todo[ntodo++] = (struct op){
        .coll = HFR_REDUCE_SCATTER, .redop = k ? hfreduceAvg : hfreduceSum, .dtype = k && both ? hfreduceFloat16 : hfreduceInt64};
    todo[ntodo++] = (struct op){.coll = HFR_BROADCAST};
    todo[ntodo++] = (struct op){.coll = HFR_ALL_GATHER};
  }
  todo[ntodo++] = (struct op){.coll = HFR_REDUCE, .premul = 1};
  todo[ntodo++] = (struct op){.coll = HFR_REDUCE_SCATTER, .premul = 1};
  todo[ntodo++] = (struct op){.coll = HFR_ALL_TO_ALL};
  todo[ntodo++] = (struct op){.coll = HFR_ALL_TO_ALL, .uneven = 1};
  todo[ntodo++] = (struct op){.coll = HFR_GATHER};
  todo[ntodo++] = (struct op){.coll = HFR_SCATTER};
  todo[ntodo++] = (struct op){.coll = HFR_BARRIER};
  for (int k = 0; k < 3; k++) todo[ntodo++] = (struct op){.coll = HFR_P2P, .shift = (int)chance((unsigned)n)};
  int empty = (int)chance((unsigned)ntodo);
  while (ntodo) {
    int i = (int)chance((unsigned)ntodo);
    struct op op = todo[i];
    todo[i] = todo[--ntodo];
    if (op.dtype != hfreduceFloat16) op.dtype = hfreduceInt64;
    op.root = op.coll == HFR_REDUCE || op.coll == HFR_BROADCAST || op.coll == HFR_GATHER || op.coll == HFR_SCATTER
                  ? (int)chance((unsigned)n)
                  : -1;
    op.inplace = (int)chance(2) && op.coll != HFR_ALL_TO_ALL && op.coll != HFR_P2P;
    int all = op.coll == HFR_ALL_GATHER || op.coll == HFR_ALL_TO_ALL || op.coll == HFR_REDUCE_SCATTER;
    add_op(op, i == empty ? 0 : some_chunks(), (all ? wide : most) + 1);
  }
  run_schedule();
  CHECK(!sim.trouble, "n %d, %s, slots %d, credit %d, seed %" PRIu64, n, sim.layout, slots, credit, seed);
  close_sim();
}

/* ---------------------------------------------------------------- what plans cost */

struct cost {
  uint64_t total, most, by_tree[2]; /* bytes that leave nodes; of the busiest node; up each tree */
  int peers;                        /* most remote ranks that a rank talks to */
};

static struct cost cost_of(int n, const int *label, size_t count, enum hfr_algo algo, size_t chunk) {
  struct cost cost = {0};
  uint64_t node_bytes[MAX_RANKS] = {0};
  struct hfr_geometry geometry = {.chunk = chunk, .ring_slot = 8192, .slots = 4, .algo = algo};
  struct hfr_call call = {.coll = HFR_ALL_REDUCE, .count = count, .dtype = hfreduceFloat32, .op = hfreduceSum, .root = -1};
  for (int me = 0; me < n; me++) {
    struct hfr_layout layout;
    struct hfr_plan plan = {0};
    uint8_t peer[MAX_RANKS] = {0};
    int peers = 0;
    if (hfr_layout_init(&layout, me, n, label) || hfr_plan_build(&plan, &layout, &geometry, &call)) abort();
    for (int s = 0; s < plan.nstages; s++) {
      const struct hfr_stage *st = &plan.stage[s];
      for (int64_t i = 0; i < st->niter; i++) {
        struct hfr_step step = {0};
        plan.step(&plan, s, i, &step);
        if (st->kind == HFR_STAGE_SEND && layout.node_of[st->peer] != layout.node) {
          cost.total += step.bytes;
          node_bytes[layout.node] += step.bytes;
          if (st->role == ROLE_UPSEND) cost.by_tree[st->tree] += step.bytes;
        }
        for (int j = 0; i == 0 && st->kind == HFR_STAGE_REDUCE && j < step.nparts; j++) {
          struct hfr_part part;
          plan.part(&plan, s, i, j, &part);
          if (part.src.space == HFR_MSG) peer[part.src.index] = 1;
        }
      }
      if (st->peer >= 0) peer[st->peer] = 1;
    }
    for (int p = 0; p < n; p++) peers += peer[p] && layout.node_of[p] != layout.node;
    if (peers > cost.peers) cost.peers = peers;
    hfr_plan_fini(&plan);
    hfr_layout_fini(&layout);
  }
  for (int i = 0; i < n; i++)
    if (node_bytes[i] > cost.most) cost.most = node_bytes[i];
  return cost;
}

static void check_costs(int n, int kind) {
  int label[MAX_RANKS];
  struct hfr_layout layout;
  chance_state = mix((uint64_t)n * NLAYOUTS + (uint64_t)kind);
  make_labels(kind, n, label);
  if (hfr_layout_init(&layout, 0, n, label)) abort();
  int nodes = layout.nnodes;
  size_t chunk = 65536, count = 40 * chunk / 4 + 1234;
  uint64_t bytes = 4 * count, links = (uint64_t)nodes - 1; /* a tree's */
  if (nodes > 1) {
    struct cost tree = cost_of(n, label, count, HFR_ALGO_TREE, chunk), direct = cost_of(n, label, count, HFR_ALGO_DIRECT, chunk);
    uint64_t gap = tree.by_tree[0] > tree.by_tree[1] ? tree.by_tree[0] - tree.by_tree[1] : tree.by_tree[1] - tree.by_tree[0];
    CHECK(tree.peers <= 6, "n %d, %s: %d peers", n, layout_name[kind], tree.peers);
    CHECK(tree.total == 2 * links * bytes, "n %d, %s: tree sends %" PRIu64 " in all", n, layout_name[kind], tree.total);
    CHECK(tree.by_tree[0] + tree.by_tree[1] == links * bytes && gap <= links * chunk,
          "n %d, %s: %" PRIu64 " and %" PRIu64 " up the trees", n, layout_name[kind], tree.by_tree[0], tree.by_tree[1]);
    CHECK(tree.most <= 2 * bytes + 2 * chunk, "n %d, %s: a node sends %" PRIu64 " of %" PRIu64, n, layout_name[kind], tree.most,
          bytes);
    /* Blocks are whole multiples of 64 bytes: the largest is up to 72 bytes above its share, and goes to all others. */
    uint64_t ideal = 2 * bytes * links / (uint64_t)nodes, slack = 41u * (uint64_t)layout.lanes * links * 72u;
    CHECK(direct.total == 2 * links * bytes, "n %d, %s: direct sends %" PRIu64 " in all", n, layout_name[kind], direct.total);
    CHECK(direct.most <= ideal + slack, "n %d, %s: a node sends %" PRIu64 ", ideal %" PRIu64, n, layout_name[kind], direct.most,
          ideal);
    struct cost ring = cost_of(n, label, count, HFR_ALGO_RING, chunk);
    CHECK(ring.total == direct.total && ring.most <= ideal + slack, "n %d, %s: a node sends %" PRIu64 ", ideal %" PRIu64, n,
          layout_name[kind], ring.most, ideal);
    if (layout.max_local == 1) CHECK(ring.peers <= 2, "n %d: %d peers in the ring", n, ring.peers);
  }
  hfr_layout_fini(&layout);
}

static void check_pairs_cost_no_more(void) {
  static const int pairs[] = {0, 0, 1, 1, 2, 2, 3, 3}, single[] = {0, 1, 2, 3};
  for (int algo = HFR_ALGO_AUTO; algo <= HFR_ALGO_RING; algo++)
    for (size_t count = 4096; count < 4000000; count = count * 3 + 7) {
      struct cost a = cost_of(8, pairs, count, (enum hfr_algo)algo, 65536),
                  b = cost_of(4, single, count, (enum hfr_algo)algo, 65536);
      CHECK(a.total == b.total, "algo %d, count %zu: %" PRIu64 " bytes with two ranks a node, %" PRIu64 " with one", algo, count,
            a.total, b.total);
      uint64_t slack = (4 * count / 65536 + 1) * 2 * 3 * 72 + 2 * 65536 * (algo == HFR_ALGO_TREE);
      CHECK(a.most <= b.most + slack, "algo %d, count %zu: busiest node %" PRIu64 " and %" PRIu64, algo, count, a.most, b.most);
    }
}

/* Stages and the guards that name them are counted by ranks: as many as a large job has. */
static void check_many_ranks(int n, enum hfr_coll coll, int to_all) {
  struct hfr_geometry geometry = {.chunk = 65536, .ring_slot = 8192, .slots = 4};
  struct hfr_call call = {.coll = coll, .count = 4, .dtype = hfreduceFloat32, .op = hfreduceSum, .root = n / 2};
  int *label = malloc((size_t)n * sizeof *label);
  struct hfr_layout layout;
  struct hfr_plan plan = {0};
  int wrong = 0;
  for (int r = 0; label && r < n; r++) label[r] = r / 32;
  if (!label || hfr_layout_init(&layout, n / 2, n, label) || hfr_plan_build(&plan, &layout, &geometry, &call)) abort();
  for (int s = 0; s < plan.nstages; s++) {
    struct hfr_step step = {0};
    plan.step(&plan, s, 0, &step);
    for (int j = 0; j < step.nguards; j++) {
      const struct hfr_guard *g = &step.guard[j];
      if (g->who == HFR_OWN && (g->first < 0 || g->n <= 0 || g->first + g->n > plan.nstages)) wrong++;
      if (g->who == HFR_OWN && g->n > 1 && plan.count[plan.stage[g->first].role] != g->n) wrong++;
    }
  }
  CHECK(!wrong, "coll %d, %d ranks: %d guards name stages that are none", (int)coll, n, wrong);
  int sends = plan.count[ROLE_NSEND], receives = plan.count[ROLE_NRECV];
  CHECK(plan.nstages > 0 && (!to_all || (sends == n - 1 && receives == n - 1) || (to_all == 2 && receives == n - 1)),
        "coll %d, %d ranks: %d sends and %d receives", (int)coll, n, sends, receives);
  hfr_plan_fini(&plan);
  hfr_layout_fini(&layout);
  free(label);
}

int main(int argc, char **argv) {
  static const int credits[] = {1, 8, 0};
  int quick = argc > 1 && !strcmp(argv[1], "--quick"), only = argc > 2 + quick ? atoi(argv[2 + quick]) : 0;
  uint64_t seed = argc > 1 + quick ? strtoull(argv[1 + quick], NULL, 0) : 1;
  for (int n = 1; n <= MAX_RANKS; n++) {
    if (only ? n != only : quick && n > 18 && n != 33 && n != 64 && n != 128) continue;
    for (int kind = 0; kind < NLAYOUTS; kind++) {
      /* All layouts of few ranks, many times; of many ranks two, which change with n. */
      int turns = only ? 4 : n > 24 ? (n + kind) % 4 == 0 : quick ? 1 : n > 12 ? 2 : 8;
      for (int turn = 0; turn < turns; turn++)
        run_scenario(n, kind, (turn + n + kind) & 1 ? 2 : 4, credits[(turn / 2 + n + kind) % 3], seed * 1000 + (uint64_t)turn);
    }
    for (int kind = 0; kind < NLAYOUTS; kind++)
      if (n <= 40 || (n + kind) % 8 == 0) check_costs(n, kind);
  }
  check_pairs_cost_no_more();
  check_many_ranks(100000, HFR_ALL_TO_ALL, 1);
  check_many_ranks(100000, HFR_GATHER, 2);
  for (int coll = 0; coll < HFR_BARRIER; coll++) check_many_ranks(100000, (enum hfr_coll)coll, 0);
  return check_done();
}
