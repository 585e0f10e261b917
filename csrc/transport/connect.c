/* Connections of links: made, authenticated, lost. */
#include "connect.h"

#include "../base/thread.h"

#include <string.h>

#define BROKEN_GRACE_NS 500000000ll

int hfr_broken(struct hfr_breakage *b, const struct hfr_net *net, int peer) {
  if (!b->since_ns) {
    char text[HFR_ADDR_TEXT];
    char reason[sizeof b->why.text];
    memcpy(reason, hfr_last_error()->text, sizeof reason);
    hfr_fail(hfreduceRemoteError, "connection with rank %d on %s (%s): %.500s", peer, net->host[peer],
             hfr_addr_text(&net->addr[peer], text), reason);
    b->why = *hfr_last_error();
    b->why.peer = peer;
    b->since_ns = hfr_now_ns();
  }
  if (hfr_now_ns() - b->since_ns < BROKEN_GRACE_NS) return HFR_LINK_AGAIN;
  *hfr_last_error() = b->why;
  return HFR_LINK_FAILED;
}

int hfr_lost(struct hfr_breakage *b, const struct hfr_net *net, int peer, const char *what, int error) {
  if (!b->since_ns) hfr_fail(hfreduceRemoteError, "%s: %s", what, error ? strerror(error) : "closed by the peer");
  return hfr_broken(b, net, peer);
}

int hfr_connect_step(struct hfr_connect *c, struct hfr_net *net, int peer, int vc, int stream) {
  if (c->state == HFR_CONNECT_UP) return HFR_LINK_OK;
  if (c->state == HFR_CONNECT_IDLE) {
    if (net->rank > peer) {
      _Atomic int *box = &net->arrived[((size_t)peer * HFR_NVC + (size_t)vc) * (size_t)net->streams + (size_t)stream];
      int fd = atomic_exchange_explicit(box, 0, memory_order_acquire);
      if (!fd) return HFR_LINK_AGAIN;
      c->fd = fd - 1;
      hfr_socket_tune(c->fd);
      c->state = HFR_CONNECT_UP;
      return HFR_LINK_OK;
    }
    int fd;
    if (hfr_socket_connect(&net->addr[peer], &fd)) return HFR_LINK_FAILED;
    c->fd = fd;
    c->state = HFR_CONNECT_CONNECTING;
  }
  if (c->state == HFR_CONNECT_CONNECTING) {
    struct pollfd p = {c->fd, POLLOUT, 0};
    if (poll(&p, 1, 0) <= 0) return HFR_LINK_AGAIN;
    int error = hfr_socket_error(c->fd);
    if (error) {
      hfr_fail(hfreduceRemoteError, "cannot connect: %s", strerror(error));
      return HFR_LINK_FAILED;
    }
    hfr_socket_tune(c->fd);
    hfr_auth_client(&c->auth, c->fd, HFR_AUTH_DATA, net->comm_id, net->secret, net->rank, peer, vc, stream);
    c->state = HFR_CONNECT_AUTH;
  }
  int r = hfr_auth_step(&c->auth);
  if (r < 0) return HFR_LINK_FAILED;
  if (r > 0) c->state = HFR_CONNECT_UP;
  return r > 0 ? HFR_LINK_OK : HFR_LINK_AGAIN;
}

short hfr_connect_events(const struct hfr_connect *c) {
  return c->state == HFR_CONNECT_CONNECTING ? POLLOUT : c->state == HFR_CONNECT_AUTH ? (short)c->auth.events : POLLIN;
}
