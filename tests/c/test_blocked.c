/* What a blocked engine waits for, over a link whose messages come when the test says: a message that is taken in while the
 * engine looks for what to wait for must keep it awake, since nothing will wake it any more. */
#include "check.h"

#include "coll/coll.h"
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

#define COUNT 16384

static struct hfr_link link_of[HFR_NVC];
static int answers_after; /* AGAIN so often, then a message */
static int wanted;        /* calls of want for receiving */
static float theirs[COUNT];
static struct hfr_fingerprint expected;

static hfreduceResult_t fake_open(struct hfr_net *net, int peer, int vc, struct hfr_link **link);

static int fake_post_send(struct hfr_link *link, const struct hfr_msg_header *header, const void *data) {
  (void)data;
  expected = header->fp;
  hfr_link_count_sent(link, header->bytes);
  return HFR_LINK_OK;
}
static uint64_t fake_sent(struct hfr_link *link) { return link->posted; }
static int fake_recv(struct hfr_link *link, void *dst, size_t bytes, const struct hfr_msg_header **header, const void **data) {
  static struct hfr_msg_header h;
  (void)dst;
  if (link->vc != HFR_VC_A || answers_after-- > 0) return HFR_LINK_AGAIN;
  h = (struct hfr_msg_header){.magic = HFR_MSG_MAGIC, .bytes = bytes, .fp = expected};
  *header = &h;
  *data = theirs;
  return HFR_LINK_OK;
}
static void fake_release(struct hfr_link *link) { (void)link; }
static void fake_want(struct hfr_link *link, int recv, struct hfr_waitset *set) { (void)link, (void)set, wanted += recv; }
static void fake_close(struct hfr_link *link) { (void)link; }

static const struct hfr_transport fake = {.name = "fake",
                                          .open = fake_open,
                                          .post_send = fake_post_send,
                                          .sent = fake_sent,
                                          .recv = fake_recv,
                                          .release = fake_release,
                                          .want = fake_want,
                                          .close = fake_close};

static hfreduceResult_t fake_open(struct hfr_net *net, int peer, int vc, struct hfr_link **link) {
  (void)net;
  link_of[vc] = (struct hfr_link){.transport = &fake, .peer = peer, .vc = vc};
  *link = &link_of[vc];
  return hfreduceSuccess;
}

int main(void) {
  static float mine[COUNT];
  static char host[2][64] = {"here", "there"};
  static struct hfr_waitset set;
  struct hfr_arena arena = {0};
  struct hfr_net net = {.rank = 0, .nranks = 2, .host = host, .arena = &arena};
  struct hfr_layout layout;
  struct hfr_engine engine = {.layout = &layout,
                              .arena = &arena,
                              .net = &net,
                              .remote = &fake,
                              .host = host[0],
                              .geometry = {.chunk = sizeof mine, .ring_slot = 4096, .slots = 2, .algo = HFR_ALGO_DIRECT}};
  struct hfr_call call = {
      .coll = HFR_ALL_REDUCE, .send = mine, .recv = mine, .count = COUNT, .dtype = hfreduceFloat32, .root = -1};
  const int label[2] = {0, 1};
  struct hfreduceWork *work = hfr_work_new(1);
  if (!work || hfr_layout_init(&layout, 0, 2, label) || hfr_arena_create(&arena, 1, sizeof mine, 2, 0) ||
      hfr_arena_join(&arena, 0) || hfr_engine_init(&engine))
    abort();
  struct hfr_request *r = hfr_request_get(&engine);
  if (!r || hfr_plan_build(&r->plan, &layout, &engine.geometry, &call)) abort();
  r->fp = (struct hfr_fingerprint){.count = COUNT, .root = -1, .coll = HFR_ALL_REDUCE, .dtype = hfreduceFloat32};
  r->work = work;
  work->engine = &engine;
  hfr_engine_submit(&engine, r);

  /* All is sent; nothing has come: the engine waits for it. */
  answers_after = 1 << 20;
  while (hfr_engine_progress(&engine))
    ;
  set.n = set.ready = wanted = 0;
  hfr_engine_want(&engine, &set);
  CHECK(!set.ready && wanted > 0, "ready %d, %d wanted", set.ready, wanted);

  /* It comes with the very question whether it is missing. */
  answers_after = 1;
  CHECK(!hfr_engine_progress(&engine));
  set.n = set.ready = 0;
  hfr_engine_want(&engine, &set);
  CHECK(set.ready, "the engine would sleep, with all that it needs there");
  CHECK(hfr_engine_progress(&engine), "awake for nothing");

  hfreduceErrorInfo_t why = {.code = hfreduceAborted, .rank = -1};
  hfr_engine_break(&engine, &why);
  hfr_engine_progress(&engine);
  CHECK(atomic_load(&work->done));
  hfr_work_put(work);
  hfr_engine_fini(&engine);
  hfr_arena_close(&arena);
  hfr_layout_fini(&layout);
  return check_done();
}
