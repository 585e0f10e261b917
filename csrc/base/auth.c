/* Challenge-response on a fresh connection. */
#include "auth.h"

#include "mac.h"
#include "thread.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>

#define MAGIC_SERVER 0x53524648u /* "HFRS" */
#define MAGIC_CLIENT 0x43524648u /* "HFRC" */

struct greeting {
  uint32_t magic, version;
  uint8_t nonce[16];
};

enum { SEND_GREETING, RECV_HELLO, SEND_PROOF, DONE, /* client: */ RECV_GREETING, SEND_HELLO, RECV_PROOF };

_Static_assert(sizeof(struct hfr_auth_hello) == 64 && sizeof(struct greeting) == 24, "the wire format has no padding");

static void expect(struct hfr_auth *a, int state, size_t bytes) {
  a->state = state;
  a->want = bytes;
  a->have = 0;
  a->events = state == SEND_GREETING || state == SEND_PROOF || state == SEND_HELLO ? POLLOUT : POLLIN;
}

static void hello_mac(const struct hfr_auth *a, uint8_t mac[16]) {
  uint8_t text[6 + offsetof(struct hfr_auth_hello, mac) + 16] = "client";
  memcpy(text + 6, &a->hello, offsetof(struct hfr_auth_hello, mac));
  memcpy(text + 6 + offsetof(struct hfr_auth_hello, mac), a->nonce_s, 16);
  hfr_mac(a->secret, text, sizeof text, mac);
}

static void proof_mac(const struct hfr_auth *a, uint8_t mac[16]) {
  uint8_t text[6 + 32] = "server";
  memcpy(text + 6, a->hello.nonce, 16);
  memcpy(text + 22, a->nonce_s, 16);
  hfr_mac(a->secret, text, sizeof text, mac);
}

void hfr_auth_client(struct hfr_auth *a, int fd, enum hfr_auth_kind kind, uint64_t comm_id, const uint8_t secret[16], int rank,
                     int target, int vc, int stream) {
  *a = (struct hfr_auth){.fd = fd};
  memcpy(a->secret, secret, 16);
  a->hello = (struct hfr_auth_hello){.magic = MAGIC_CLIENT,
                                     .version = HFR_PROTOCOL_VERSION,
                                     .kind = (uint8_t)kind,
                                     .vc = (uint8_t)vc,
                                     .stream = (uint16_t)stream,
                                     .rank = rank,
                                     .target = target,
                                     .comm_id = comm_id};
  hfr_random(a->hello.nonce, 16);
  expect(a, RECV_GREETING, sizeof(struct greeting));
}

void hfr_auth_server(struct hfr_auth *a, int fd, int (*lookup)(void *, const struct hfr_auth_hello *, uint8_t[16]), void *arg) {
  *a = (struct hfr_auth){.fd = fd, .server = 1, .lookup = lookup, .arg = arg};
  hfr_random(a->nonce_s, 16);
  struct greeting g = {MAGIC_SERVER, HFR_PROTOCOL_VERSION, {0}};
  memcpy(g.nonce, a->nonce_s, 16);
  expect(a, SEND_GREETING, sizeof g);
  memcpy(a->buf, &g, sizeof g);
}

/* Move bytes until the current message is whole. 1 whole, 0 again, -1 broken. */
static int transfer(struct hfr_auth *a) {
  while (a->have < a->want) {
    ssize_t n = a->events == POLLOUT ? send(a->fd, a->buf + a->have, a->want - a->have, MSG_NOSIGNAL | MSG_DONTWAIT)
                                     : recv(a->fd, a->buf + a->have, a->want - a->have, MSG_DONTWAIT);
    if (n > 0) {
      a->have += (size_t)n;
    } else if (n < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOTCONN)) {
      return 0;
    } else {
      if (n == 0)
        hfr_fail(hfreduceRemoteError,
                 "the other side closed the connection during the handshake (another secret, another communicator, or not "
                 "hfreduce)");
      else
        hfr_fail(hfreduceSystemError, "connection broke during the handshake: %s", strerror(errno));
      return -1;
    }
  }
  return 1;
}

static int refuse(const char *why) {
  hfr_fail(hfreduceRemoteError, "handshake refused: %s", why);
  return -1;
}

static int got_hello(struct hfr_auth *a) {
  uint8_t mac[16];
  memcpy(&a->hello, a->buf, sizeof a->hello);
  if (a->hello.magic != MAGIC_CLIENT) return refuse("a stranger that does not speak this protocol");
  if (a->hello.version != HFR_PROTOCOL_VERSION)
    return refuse("the peer speaks another version of the protocol; install the same hfreduce everywhere");
  if (a->lookup(a->arg, &a->hello, a->secret)) return refuse("unknown communicator");
  hello_mac(a, mac);
  if (!hfr_mac_equal(mac, a->hello.mac)) return refuse("wrong secret");
  expect(a, SEND_PROOF, 16);
  proof_mac(a, a->buf);
  return 0;
}

static int got_greeting(struct hfr_auth *a) {
  struct greeting g;
  memcpy(&g, a->buf, sizeof g);
  if (g.magic != MAGIC_SERVER) return refuse("what listens there is not hfreduce; check address and port");
  if (g.version != HFR_PROTOCOL_VERSION)
    return refuse("the peer speaks another version of the protocol; install the same hfreduce everywhere");
  memcpy(a->nonce_s, g.nonce, 16);
  hello_mac(a, a->hello.mac);
  expect(a, SEND_HELLO, sizeof a->hello);
  memcpy(a->buf, &a->hello, sizeof a->hello);
  return 0;
}

static int got_proof(struct hfr_auth *a) {
  uint8_t mac[16];
  proof_mac(a, mac);
  if (!hfr_mac_equal(mac, a->buf)) return refuse("the other side does not know the secret");
  a->state = DONE;
  return 0;
}

int hfr_auth_step(struct hfr_auth *a) {
  while (a->state != DONE) {
    int r = transfer(a);
    if (r <= 0) return r;
    switch (a->state) {
      case SEND_GREETING: expect(a, RECV_HELLO, sizeof a->hello); break;
      case RECV_HELLO: r = got_hello(a); break;
      case SEND_PROOF: a->state = DONE; break;
      case RECV_GREETING: r = got_greeting(a); break;
      case SEND_HELLO: expect(a, RECV_PROOF, 16); break;
      default: r = got_proof(a);
    }
    if (r < 0) return r;
  }
  return 1;
}

hfreduceResult_t hfr_auth_client_wait(struct hfr_auth *a, int64_t deadline_ns, const char *whom) {
  for (;;) {
    int r = hfr_auth_step(a);
    if (r > 0) return hfreduceSuccess;
    if (r < 0) return hfr_last_error()->code;
    int64_t left = deadline_ns - hfr_now_ns();
    if (left <= 0) return hfr_fail(hfreduceTimeout, "%s accepted the connection but did not finish the handshake in time", whom);
    struct pollfd p = {a->fd, (short)a->events, 0};
    poll(&p, 1, (int)(left / 1000000 + 1));
  }
}
