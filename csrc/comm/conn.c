/* Framed, buffered, non-blocking connections. */
#include "conn.h"

#include "../base/thread.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

struct frame_header {
  uint32_t type, bytes;
};

void hfr_conn_init(struct hfr_conn *c, int fd, size_t max_payload) {
  *c = (struct hfr_conn){.fd = fd, .max_payload = max_payload, .heard_ns = hfr_now_ns()};
}

void hfr_conn_close(struct hfr_conn *c) {
  if (c->fd >= 0) close(c->fd);
  free(c->rx);
  free(c->tx);
  *c = (struct hfr_conn){.fd = -1, .dead = 1};
}

static int reserve(uint8_t **buf, size_t *cap, size_t need) {
  if (need <= *cap) return 0;
  size_t grown = *cap ? *cap : 512;
  while (grown < need) grown *= 2;
  uint8_t *p = realloc(*buf, grown);
  if (!p) return -1;
  *buf = p;
  *cap = grown;
  return 0;
}

void hfr_conn_flush(struct hfr_conn *c) {
  while (c->tx_have && !c->dead) {
    ssize_t n = send(c->fd, c->tx, c->tx_have, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) { /* what the other side sent before it went must still be read: fill() finds the end */
      c->mute = 1;
      c->tx_have = 0;
      return;
    }
    memmove(c->tx, c->tx + n, c->tx_have - (size_t)n);
    c->tx_have -= (size_t)n;
  }
}

void hfr_conn_send(struct hfr_conn *c, enum hfr_frame type, const void *payload, size_t bytes) {
  struct frame_header h = {(uint32_t)type, (uint32_t)bytes};
  if (c->dead || c->mute || reserve(&c->tx, &c->tx_cap, c->tx_have + sizeof h + bytes)) return;
  memcpy(c->tx + c->tx_have, &h, sizeof h);
  if (bytes) memcpy(c->tx + c->tx_have + sizeof h, payload, bytes);
  c->tx_have += sizeof h + bytes;
  hfr_conn_flush(c);
}

int hfr_conn_fill(struct hfr_conn *c) {
  while (!c->dead) {
    if (reserve(&c->rx, &c->rx_cap, c->rx_have + 4096)) break;
    ssize_t n = recv(c->fd, c->rx + c->rx_have, c->rx_cap - c->rx_have, MSG_DONTWAIT);
    if (n > 0) {
      c->rx_have += (size_t)n;
      c->heard_ns = hfr_now_ns();
      if (c->rx_have > c->max_payload + 65536) return 0; /* take frames out first */
      continue;
    }
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return 0;
    break;
  }
  c->dead = 1;
  return -1;
}

int hfr_conn_next(struct hfr_conn *c, enum hfr_frame *type, const uint8_t **payload, size_t *bytes) {
  struct frame_header h;
  if (c->rx_have < sizeof h) return 0;
  memcpy(&h, c->rx, sizeof h);
  if (h.bytes > c->max_payload) {
    c->dead = 1;
    return 0;
  }
  size_t whole = sizeof h + h.bytes;
  if (c->rx_have < whole) return 0;
  /* The frame moves behind the rest of the buffer's contents, so that it stays valid while the rest shifts down. */
  if (reserve(&c->rx, &c->rx_cap, c->rx_have + h.bytes + 1)) {
    c->dead = 1;
    return 0;
  }
  memcpy(c->rx + c->rx_have, c->rx + sizeof h, h.bytes);
  memmove(c->rx, c->rx + whole, c->rx_have - whole + h.bytes);
  c->rx_have -= whole;
  *type = (enum hfr_frame)h.type;
  *payload = c->rx + c->rx_have;
  *bytes = h.bytes;
  return 1;
}

int hfr_conn_error(const uint8_t *payload, size_t bytes, hfreduceErrorInfo_t *info) {
  if (bytes != sizeof *info) return -1;
  memcpy(info, payload, sizeof *info);
  info->op[sizeof info->op - 1] = info->phase[sizeof info->phase - 1] = info->host[sizeof info->host - 1] =
      info->text[sizeof info->text - 1] = 0;
  return info->code <= hfreduceSuccess || info->code >= hfreduceNumResults || info->code == hfreduceInProgress ? -1 : 0;
}
