/* Challenge-response on a fresh connection. */
#include "auth.h"

#include "mac.h"
#include "owner.h"
#include "thread.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>

#define MAGIC_SERVER 0x53524648u /* "HFRS" */
#define MAGIC_CLIENT 0x43524648u /* "HFRC" */
#define MAGIC_ANSWER 0x41524648u /* "HFRA" */
#define OLDEST_PROTOCOL 2u       /* that has this form of the handshake */
#define HEAD 8                   /* bytes of a hello that tell a stranger */

struct greeting {
  uint32_t magic, protocol;
  uint8_t nonce[16];
};

struct answer {
  uint32_t magic, verdict, release, build;
  uint8_t mac[16];
};

enum { SEND_GREETING, RECV_HEAD, RECV_HELLO, SEND_ANSWER, DONE, /* client: */ RECV_GREETING, SEND_HELLO, RECV_ANSWER };

_Static_assert(sizeof(struct hfr_auth_hello) == 80 && sizeof(struct greeting) == 24 && sizeof(struct answer) == 32,
               "the wire format has no padding");

int hfr_auth_is_public(const uint8_t secret[16]) {
  static const uint8_t none[16];
  return !memcmp(secret, none, sizeof none);
}

static void expect(struct hfr_auth *a, int state, size_t bytes) {
  a->state = state;
  a->want = bytes;
  a->have = 0;
  a->events = state == SEND_GREETING || state == SEND_ANSWER || state == SEND_HELLO ? POLLOUT : POLLIN;
}

static void hello_mac(const struct hfr_auth *a, uint32_t servers_protocol, uint8_t mac[16]) {
  enum { SAID = offsetof(struct hfr_auth_hello, mac) };
  uint8_t text[6 + SAID + 16 + 4] = "client";
  memcpy(text + 6, &a->hello, SAID);
  memcpy(text + 6 + SAID, a->nonce_s, 16);
  memcpy(text + 6 + SAID + 16, &servers_protocol, 4);
  hfr_mac(a->secret, text, sizeof text, mac);
}

static void answer_mac(const struct hfr_auth *a, const struct hfr_version *server, uint8_t mac[16]) {
  uint8_t text[6 + 32 + 12] = "server";
  memcpy(text + 6, a->hello.nonce, 16);
  memcpy(text + 22, a->nonce_s, 16);
  memcpy(text + 38, &server->protocol, 4);
  memcpy(text + 42, &server->release, 4);
  memcpy(text + 46, &server->build, 4);
  hfr_mac(a->secret, text, sizeof text, mac);
}

void hfr_auth_client(struct hfr_auth *a, int fd, enum hfr_auth_kind kind, uint64_t comm_id, const uint8_t secret[16], int rank,
                     int target, int vc, int stream) {
  *a = (struct hfr_auth){.fd = fd};
  memcpy(a->secret, secret, 16);
  a->hello = (struct hfr_auth_hello){.magic = MAGIC_CLIENT,
                                     .protocol = hfr_version.protocol,
                                     .build = hfr_version.build,
                                     .release = hfr_version.release,
                                     .kind = (uint8_t)kind,
                                     .vc = (uint8_t)vc,
                                     .stream = (uint16_t)stream,
                                     .rank = rank,
                                     .target = target,
                                     .comm_id = comm_id};
  hfr_random(a->hello.nonce, 16);
  expect(a, RECV_GREETING, sizeof(struct greeting));
}

void hfr_auth_server(struct hfr_auth *a, int fd,
                     enum hfr_auth_verdict (*lookup)(void *, const struct hfr_auth_hello *, uint8_t[16]), void *arg) {
  *a = (struct hfr_auth){.fd = fd, .server = 1, .lookup = lookup, .arg = arg};
  hfr_random(a->nonce_s, 16);
  struct greeting g = {MAGIC_SERVER, hfr_version.protocol, {0}};
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
      a->verdict = HFR_AUTH_BROKEN;
      if (n == 0)
        hfr_fail(hfreduceRemoteError, "the other side closed the connection during the handshake (is it hfreduce?)");
      else
        hfr_fail(hfreduceSystemError, "connection broke during the handshake: %s", strerror(errno));
      return -1;
    }
  }
  return 1;
}

static int refuse(struct hfr_auth *a, enum hfr_auth_verdict verdict, const char *why) {
  a->verdict = verdict;
  hfr_fail(hfreduceRemoteError, "handshake refused: %s", why);
  return -1;
}

static int refuse_old(struct hfr_auth *a, uint32_t protocol) {
  a->verdict = HFR_AUTH_OLD;
  hfr_fail(hfreduceRemoteError,
           "handshake refused: the other side says that it speaks protocol %u of hfreduce, this one speaks %u", protocol,
           hfr_version.protocol);
  return -1;
}

/* Both are proven, and cannot talk. */
static int refuse_protocol(struct hfr_auth *a) {
  char mine[HFR_VERSION_TEXT], theirs[HFR_VERSION_TEXT];
  a->verdict = HFR_AUTH_PROTOCOL;
  hfr_fail(hfreduceInvalidUsage, "the other side runs %s, this one %s; install the same version on all hosts",
           hfr_version_text(&a->peer, theirs), hfr_version_text(&hfr_version, mine));
  return -1;
}

/* ---------------------------------------------------------------- server */

/* The other side is one that may know the secret at all. */
static int may_talk(const struct hfr_auth *a) { return !hfr_auth_is_public(a->secret) || hfr_owner_is_me(a->fd); }

static int got_head(struct hfr_auth *a) {
  uint32_t magic, protocol;
  memcpy(&magic, a->buf, 4);
  memcpy(&protocol, a->buf + 4, 4);
  if (magic != MAGIC_CLIENT) return refuse(a, HFR_AUTH_BROKEN, "a stranger that does not speak this protocol");
  if (protocol < OLDEST_PROTOCOL) return refuse_old(a, protocol);
  a->state = RECV_HELLO;
  a->want = sizeof a->hello; /* behind the head */
  return 0;
}

static void got_hello(struct hfr_auth *a) {
  uint8_t mac[16];
  struct answer answer = {.magic = MAGIC_ANSWER, .release = hfr_version.release, .build = hfr_version.build};
  memcpy(&a->hello, a->buf, sizeof a->hello);
  a->verdict = a->lookup(a->arg, &a->hello, a->secret);
  if (a->verdict == HFR_AUTH_WELCOME) {
    hello_mac(a, hfr_version.protocol, mac);
    if (!hfr_mac_equal(mac, a->hello.mac)) a->verdict = HFR_AUTH_SECRET;
  }
  if (a->verdict == HFR_AUTH_WELCOME && !may_talk(a)) a->verdict = HFR_AUTH_USER;
  answer.verdict = a->verdict;
  if (a->verdict == HFR_AUTH_WELCOME) answer_mac(a, &hfr_version, answer.mac);
  expect(a, SEND_ANSWER, sizeof answer);
  memcpy(a->buf, &answer, sizeof answer);
}

static int answered(struct hfr_auth *a) {
  if (a->verdict == HFR_AUTH_SECRET) return refuse(a, HFR_AUTH_SECRET, "wrong secret");
  if (a->verdict == HFR_AUTH_USER) return refuse(a, HFR_AUTH_USER, "a process of another user");
  if (a->verdict != HFR_AUTH_WELCOME) return refuse(a, a->verdict, "unknown communicator");
  a->state = DONE;
  a->peer = (struct hfr_version){a->hello.protocol, a->hello.release, a->hello.build};
  return a->peer.protocol == hfr_version.protocol ? 0 : refuse_protocol(a);
}

/* ---------------------------------------------------------------- client */

static int got_greeting(struct hfr_auth *a) {
  struct greeting g;
  memcpy(&g, a->buf, sizeof g);
  if (g.magic != MAGIC_SERVER) return refuse(a, HFR_AUTH_BROKEN, "what listens there is not hfreduce; check address and port");
  if (g.protocol < OLDEST_PROTOCOL) return refuse_old(a, g.protocol);
  if (!may_talk(a))
    return refuse(a, HFR_AUTH_USER,
                  "what listens there is a process of another user, and there is no secret to tell it from ours");
  a->peer.protocol = g.protocol;
  memcpy(a->nonce_s, g.nonce, 16);
  hello_mac(a, g.protocol, a->hello.mac);
  expect(a, SEND_HELLO, sizeof a->hello);
  memcpy(a->buf, &a->hello, sizeof a->hello);
  return 0;
}

static int got_answer(struct hfr_auth *a) {
  uint8_t mac[16];
  struct answer answer;
  memcpy(&answer, a->buf, sizeof answer);
  if (answer.magic != MAGIC_ANSWER) return refuse(a, HFR_AUTH_BROKEN, "the other side does not answer as hfreduce does");
  if (answer.verdict == HFR_AUTH_SECRET) return refuse(a, HFR_AUTH_SECRET, "the other side has another secret");
  if (answer.verdict == HFR_AUTH_USER)
    return refuse(a, HFR_AUTH_USER, "the other side belongs to another user, or cannot tell, and there is no secret");
  if (answer.verdict != HFR_AUTH_WELCOME)
    return refuse(a, HFR_AUTH_UNKNOWN,
                  "the other side does not know this communicator (has it made it yet? is its secret the same?)");
  a->peer.release = answer.release;
  a->peer.build = answer.build;
  answer_mac(a, &a->peer, mac);
  if (!hfr_mac_equal(mac, answer.mac)) return refuse(a, HFR_AUTH_BROKEN, "the other side does not know the secret");
  a->state = DONE;
  return a->peer.protocol == hfr_version.protocol ? 0 : refuse_protocol(a);
}

int hfr_auth_step(struct hfr_auth *a) {
  while (a->state != DONE) {
    int r = transfer(a);
    if (r <= 0) return r;
    switch (a->state) {
      case SEND_GREETING: expect(a, RECV_HEAD, HEAD); break;
      case RECV_HEAD: r = got_head(a); break;
      case RECV_HELLO: got_hello(a); break;
      case SEND_ANSWER: r = answered(a); break;
      case RECV_GREETING: r = got_greeting(a); break;
      case SEND_HELLO: expect(a, RECV_ANSWER, sizeof(struct answer)); break;
      default: r = got_answer(a);
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
