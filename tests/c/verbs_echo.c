/* One link of the verbs transport, alone: of what peer 0 sends over connection FD, every n-th message comes back to it, in order.
 * usage: verbs_echo FD CHUNK MESSAGES N */
#include "base/thread.h"
#include "transport/transport.h"
#include "transport/verbs_lib.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BUFFERS 8 /* echoes whose data the link may still need */

static const struct hfr_transport *const verbs = &hfr_transport_verbs;

static int failed(const char *what) {
  fprintf(stderr, "%s: %s\n", what, hfr_last_error()->text);
  return 1;
}

/* Nothing to do until the link says so. */
static void rest(struct hfr_link *link, int recv) {
  struct hfr_waitset set = {.n = 0};
  verbs->want(link, recv, &set);
  poll(set.fd, (nfds_t)set.n, 10);
}

/* The next message, whatever its size. */
static int receive(struct hfr_link *link, const struct hfr_msg_header **header, const void **data) {
  int r;
  while ((r = verbs->recv(link, NULL, 0, header, data)) == HFR_LINK_AGAIN) rest(link, 1);
  if (r == HFR_LINK_OK && (*header)->bytes) {
    static uint8_t dst[1];
    r = verbs->recv(link, dst, (*header)->bytes, header, data);
  }
  return r;
}

static int echo(struct hfr_link *link, struct hfr_arena *arena, uint8_t *heap, size_t chunk, long messages, long every) {
  for (long m = 0; m < messages; m++) {
    const struct hfr_msg_header *header;
    const void *data;
    uint64_t sent, n = link->posted;
    int r = receive(link, &header, &data);
    if (r != HFR_LINK_OK || (header->bytes && !data)) return failed("recv");
    if ((m + 1) % every) { /* the link has to tell of its release by itself */
      verbs->release(link);
      continue;
    }
    while ((sent = verbs->sent(link)) != UINT64_MAX && link->posted - sent >= BUFFERS) rest(link, 0);
    if (sent == UINT64_MAX) return failed("sent");
    /* by turns from registered memory and from any other */
    uint8_t *copy = n % 2 ? heap + n % BUFFERS * chunk : hfr_arena_in(arena, 0, n);
    struct hfr_msg_header reply = *header;
    if (reply.bytes) memcpy(copy, data, reply.bytes);
    verbs->release(link);
    while ((r = verbs->post_send(link, &reply, copy)) == HFR_LINK_AGAIN) rest(link, 0);
    if (r != HFR_LINK_OK) return failed("post_send");
  }
  while (verbs->sent(link) < link->posted) rest(link, 0);
  return verbs->sent(link) == UINT64_MAX ? failed("sent") : 0;
}

int main(int argc, char **argv) {
  struct hfr_ib_port port;
  struct hfr_arena arena = {.fd = -1, .bell_fd = -1};
  struct hfr_addr addr[2] = {{0}};
  static const char host[2][64] = {"peer", "here"};
  static const int local_of[2];
  static _Atomic int arrived[2 * HFR_NVC];
  struct hfr_link *link;
  if (argc != 5) return fprintf(stderr, "usage: verbs_echo FD CHUNK MESSAGES N\n"), 2;
  size_t chunk = (size_t)atol(argv[2]);
  long messages = atol(argv[3]);
  alarm(100);
  if (hfr_ib_choose(0, &port)) return failed("no port"), 77;
  if (hfr_arena_create(&arena, 1, chunk, BUFFERS, 0) || hfr_arena_join(&arena, 0)) return failed("arena");
  arrived[HFR_VC_A] = atoi(argv[1]) + 1; /* from peer 0; who accepted it has checked who it is */
  struct hfr_net net = {.rank = 1,
                        .nranks = 2,
                        .addr = addr,
                        .host = host,
                        .arena = &arena,
                        .local_of = local_of,
                        .streams = 1,
                        .timeout_ns = 10000000000ll,
                        .arrived = arrived};
  uint8_t *heap = malloc(BUFFERS * chunk);
  if (verbs->open(&net, 0, HFR_VC_A, &link)) return failed("open");
  int code = echo(link, &arena, heap, chunk, messages, atol(argv[4]));
  printf("%llu messages, %llu bytes\n", (unsigned long long)link->messages_received, (unsigned long long)link->bytes_received);
  verbs->close(link);
  hfr_arena_close(&arena);
  free(heap);
  return code;
}
