/*
 * Peers that are let in, for they know the secret or share the node's memory, and then do not keep to the protocol. A rank
 * refuses what cannot be, says so, and reads and writes nothing that is not its own: run this under ASan.
 */
#include "check.h"

#include "comm/comm.h"
#include "transport/transport.h"

#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- a local rank rewrites the header of a message */

static void test_shared_header(void) {
  struct hfr_arena mine, theirs;
  const size_t chunk = 8192;
  int local_of[2] = {0, 1};
  struct hfr_net net[2] = {{.rank = 0, .nranks = 2, .arena = &mine, .local_of = local_of},
                           {.rank = 1, .nranks = 2, .arena = &theirs, .local_of = local_of}};
  struct hfr_link *in = NULL, *out = NULL;
  if (!CHECK(!hfr_arena_create(&mine, 2, chunk, 2, 0) && !hfr_arena_join(&mine, 0), "%s", hfr_last_error()->text)) return;
  if (!CHECK(!hfr_arena_attach(&theirs, dup(mine.fd), 2, chunk, 2, 0) && !hfr_arena_join(&theirs, 1), "%s",
             hfr_last_error()->text))
    return;
  CHECK(!hfr_transport_shm.open(&net[0], 1, HFR_VC_P2P, &in) && !hfr_transport_shm.open(&net[1], 0, HFR_VC_P2P, &out));
  struct hfr_ring *ring = hfr_arena_ring_at(&theirs, 1, 0, 1);
  for (int round = 0; round < 2 * HFR_RING_SLOTS; round++) {
    uint8_t payload[100] = {(uint8_t)round};
    struct hfr_msg_header h = {.magic = HFR_MSG_MAGIC, .bytes = sizeof payload, .offset = (uint64_t)round, .fp = {.seq = 7}};
    const struct hfr_msg_header *got = NULL;
    const void *data = NULL;
    CHECK(hfr_transport_shm.post_send(out, &h, payload) == HFR_LINK_OK);
    /* Asked without a size first, as by a receive that does not know what comes. */
    CHECK(hfr_transport_shm.recv(in, NULL, 0, &got, &data) == HFR_LINK_OK && !data && got->bytes == sizeof payload);
    struct hfr_msg_header *theirs_now = &ring->header[round % HFR_RING_SLOTS];
    theirs_now->bytes = UINT64_MAX;
    theirs_now->offset = 99;
    theirs_now->fp.count = UINT64_MAX;
    CHECK(got->bytes == sizeof payload && got->offset == (uint64_t)round && got->fp.count == 0, "bytes %llu",
          (unsigned long long)got->bytes);
    CHECK(hfr_transport_shm.recv(in, payload, sizeof payload, &got, &data) == HFR_LINK_OK && data, "what was judged is gone");
    CHECK(got->bytes == sizeof payload && data && *(const uint8_t *)data == round);
    hfr_transport_shm.release(in);
    CHECK(atomic_load(&in->bytes_received) == (uint64_t)(round + 1) * sizeof payload);
    CHECK(hfr_transport_shm.recv(in, NULL, 0, &got, &data) == HFR_LINK_AGAIN, "a header of a message that has not come");
  }
  hfr_transport_shm.close(in);
  hfr_transport_shm.close(out);
  hfr_arena_close(&theirs);
  hfr_arena_close(&mine);
}

/* ---------------------------------------------------------------- errors from the wire */

static void test_error_frames(void) {
  static const int none[] = {0, -1, hfreduceInProgress, hfreduceNumResults, 1 << 30};
  hfreduceErrorInfo_t sent, got;
  hfr_error_clear(&sent);
  memset(sent.text, 'x', sizeof sent.text);
  sent.code = hfreduceAborted;
  const uint8_t *payload = (const uint8_t *)&sent;
  CHECK(!hfr_conn_error(payload, sizeof sent, &got) && got.code == hfreduceAborted);
  CHECK(strlen(got.text) == sizeof got.text - 1);
  CHECK(hfr_conn_error(payload, sizeof sent - 1, &got) == -1);
  for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
    sent.code = none[i];
    CHECK(hfr_conn_error(payload, sizeof sent, &got) == -1, "%d", none[i]);
  }
}

int main(void) {
  test_shared_header();
  test_error_frames();
  return check_done();
}
