/*
 * TCP: a link is one or several connections (streams), message i of a direction on stream i mod streams. The kernel's buffers are
 * the flow control: nothing is read that the receiving side has not asked for, so data goes straight to where it is wanted.
 */
#include "connect.h"

#include "../base/crc32c.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define TX_QUEUE 8 /* messages posted and not yet with the kernel, a link */

struct tcp_stream {
  struct hfr_connect connect;
  /* Read for a payload that turned out shorter: read again before the socket. Empty whenever a message has not wholly come. */
  uint8_t *back;
  size_t back_at, back_bytes;
};

struct tx_message {
  struct hfr_msg_header header;
  const uint8_t *data;
  size_t done; /* bytes of header and payload with the kernel */
};

struct tcp_link {
  struct hfr_link link;
  struct hfr_net *net;
  struct tcp_stream stream[HFR_MAX_STREAMS];
  struct tx_message tx[TX_QUEUE];
  uint64_t sent;     /* messages wholly with the kernel, counted in order */
  uint64_t received; /* messages released */
  struct hfr_msg_header rx_header;
  size_t rx_have;           /* bytes of the current message read, header included */
  size_t rx_bytes;          /* payload asked for */
  uint8_t *rx_dst, *rx_own; /* where the payload goes: the caller's place, or a buffer of the link */
  size_t rx_own_bytes;
  int rx_ready;
  struct hfr_breakage breakage;
};

static hfreduceResult_t tcp_open_link(struct hfr_net *net, int peer, int vc, struct hfr_link **out) {
  struct tcp_link *l = calloc(1, sizeof *l);
  if (!l) return hfr_fail(hfreduceSystemError, "out of memory for a link to rank %d", peer);
  l->link = (struct hfr_link){.transport = &hfr_transport_tcp, .peer = peer, .vc = vc};
  l->net = net;
  for (int s = 0; s < net->streams; s++) l->stream[s].connect.fd = -1;
  *out = &l->link;
  return hfreduceSuccess;
}

static int broken(struct tcp_link *l) { return hfr_broken(&l->breakage, l->net, l->link.peer); }
static int lost(struct tcp_link *l, const char *what, int error) {
  return hfr_lost(&l->breakage, l->net, l->link.peer, what, error);
}

/* Bring stream s up as far as possible. OK when it can carry data. */
static int stream_up(struct tcp_link *l, int s) {
  if (l->stream[s].connect.state == HFR_CONNECT_UP) return HFR_LINK_OK;
  if (l->breakage.since_ns) return broken(l);
  int up = hfr_connect_step(&l->stream[s].connect, l->net, l->link.peer, l->link.vc, s);
  return up == HFR_LINK_FAILED ? broken(l) : up;
}

/* Messages of stream s that are not yet with the kernel, in order, as one vector: header, payload, header, payload, ... */
static int gather(struct tcp_link *l, int s, struct iovec iov[2 * TX_QUEUE]) {
  int n = 0;
  for (uint64_t m = l->sent; m < l->link.posted; m++) {
    struct tx_message *x = &l->tx[m % TX_QUEUE];
    size_t h = sizeof x->header, payload_done = x->done > h ? x->done - h : 0;
    if ((int)(m % (unsigned)l->net->streams) != s) continue;
    if (x->done < h) iov[n++] = (struct iovec){(uint8_t *)&x->header + x->done, h - x->done};
    if (x->header.bytes > payload_done)
      iov[n++] = (struct iovec){(uint8_t *)(uintptr_t)x->data + payload_done, x->header.bytes - payload_done};
  }
  return n;
}

/* `bytes` more of stream s are with the kernel. */
static void account(struct tcp_link *l, int s, size_t bytes) {
  for (uint64_t m = l->sent; bytes && m < l->link.posted; m++) {
    struct tx_message *x = &l->tx[m % TX_QUEUE];
    if ((int)(m % (unsigned)l->net->streams) != s) continue;
    size_t rest = sizeof x->header + x->header.bytes - x->done, take = rest < bytes ? rest : bytes;
    x->done += take;
    bytes -= take;
  }
}

static int push_stream(struct tcp_link *l, int s) {
  struct iovec iov[2 * TX_QUEUE];
  int n;
  while ((n = gather(l, s, iov)) > 0) {
    int up = stream_up(l, s);
    if (up != HFR_LINK_OK) return up;
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = (size_t)n};
    ssize_t w = sendmsg(l->stream[s].connect.fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (w < 0) return errno == EAGAIN || errno == EINTR ? HFR_LINK_AGAIN : lost(l, "sending failed", errno);
    account(l, s, (size_t)w);
  }
  return HFR_LINK_OK;
}

/* Give the kernel what it takes. OK or FAILED: whether it took all is seen in l->sent. */
static int push(struct tcp_link *l) {
  int failed = 0;
  for (int s = 0; s < l->net->streams && !failed; s++) failed = push_stream(l, s) == HFR_LINK_FAILED;
  while (l->sent < l->link.posted &&
         l->tx[l->sent % TX_QUEUE].done == sizeof(struct hfr_msg_header) + l->tx[l->sent % TX_QUEUE].header.bytes)
    l->sent++;
  return failed ? HFR_LINK_FAILED : HFR_LINK_OK;
}

static int tcp_post_send(struct hfr_link *link, const struct hfr_msg_header *header, const void *data) {
  struct tcp_link *l = (struct tcp_link *)link;
  if (l->breakage.since_ns) return broken(l);
  if (link->posted - l->sent >= TX_QUEUE) {
    if (push(l) == HFR_LINK_FAILED) return HFR_LINK_FAILED;
    if (link->posted - l->sent >= TX_QUEUE) {
      hfr_link_count_stall(link);
      return HFR_LINK_AGAIN;
    }
  }
  struct tx_message *x = &l->tx[link->posted % TX_QUEUE];
  *x = (struct tx_message){.header = *header, .data = data};
  if (l->net->checksum) x->header.crc = hfr_crc32c(0, data, header->bytes);
  hfr_link_count_sent(link, header->bytes);
  return push(l) == HFR_LINK_FAILED ? HFR_LINK_FAILED : HFR_LINK_OK;
}

static uint64_t tcp_sent(struct hfr_link *link) {
  struct tcp_link *l = (struct tcp_link *)link;
  if (l->sent < link->posted && push(l) == HFR_LINK_FAILED) return UINT64_MAX;
  return l->sent;
}

static int check_message(struct tcp_link *l) {
  if (l->net->checksum && hfr_crc32c(0, l->rx_dst, l->rx_bytes) != l->rx_header.crc) {
    hfr_fail(hfreduceCorrupt, "message of %zu bytes from rank %d on %s failed its checksum: memory or network corrupts data",
             l->rx_bytes, l->link.peer, l->net->host[l->link.peer]);
    hfr_last_error()->peer = l->link.peer;
    return HFR_LINK_FAILED;
  }
  return HFR_LINK_OK;
}

/* Prepare the place for a payload of `bytes`. */
static int rx_begin(struct tcp_link *l, void *dst, size_t bytes) {
  l->rx_bytes = bytes;
  l->rx_dst = dst;
  if (!dst && l->rx_own_bytes < bytes) {
    free(l->rx_own);
    l->rx_own = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    l->rx_own_bytes = l->rx_own ? bytes : 0;
    if (!l->rx_own) {
      hfr_fail(hfreduceSystemError, "out of memory for a message of %zu bytes", bytes);
      return HFR_LINK_FAILED;
    }
  }
  if (!dst) l->rx_dst = l->rx_own;
  return HFR_LINK_OK;
}

/* As recvmsg: what was put back comes first. */
static ssize_t read_stream(struct tcp_stream *t, struct iovec *iov, int n) {
  if (!t->back) {
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = (size_t)n};
    return recvmsg(t->connect.fd, &msg, MSG_DONTWAIT);
  }
  size_t taken = 0;
  for (int i = 0; i < n; i++) {
    size_t left = t->back_bytes - t->back_at, take = left < iov[i].iov_len ? left : iov[i].iov_len;
    if (take) memcpy(iov[i].iov_base, t->back + t->back_at, take);
    t->back_at += take;
    taken += take;
  }
  if (t->back_at == t->back_bytes) {
    free(t->back);
    t->back = NULL;
  }
  return (ssize_t)taken;
}

/* The message at hand has another size than was asked for, and now the caller says where it goes. Its beginning lies where it
 * was expected to go; what was read beyond its end belongs to the messages behind it. */
static int rx_redirect(struct tcp_link *l, struct tcp_stream *t, void *dst, size_t bytes) {
  size_t have = l->rx_have - sizeof l->rx_header, mine = have < bytes ? have : bytes, extra = have - mine;
  if (extra) {
    size_t rest = t->back ? t->back_bytes - t->back_at : 0;
    uint8_t *back = malloc(extra + rest);
    if (!back) {
      hfr_fail(hfreduceSystemError, "out of memory for %zu bytes", extra + rest);
      return HFR_LINK_FAILED;
    }
    memcpy(back, l->rx_dst + mine, extra);
    if (rest) memcpy(back + extra, t->back + t->back_at, rest);
    free(t->back);
    t->back = back;
    t->back_at = 0;
    t->back_bytes = extra + rest;
  }
  if (mine) memmove(dst, l->rx_dst, mine);
  l->rx_dst = dst;
  l->rx_bytes = bytes;
  l->rx_have = sizeof l->rx_header + mine;
  l->rx_ready = 0;
  return HFR_LINK_OK;
}

static int tcp_recv(struct hfr_link *link, void *dst, size_t bytes, const struct hfr_msg_header **header, const void **data) {
  struct tcp_link *l = (struct tcp_link *)link;
  int s = (int)(l->received % (unsigned)l->net->streams);
  if (l->rx_ready && l->rx_bytes != l->rx_header.bytes && bytes == l->rx_header.bytes &&
      rx_redirect(l, &l->stream[s], dst, bytes) == HFR_LINK_FAILED)
    return HFR_LINK_FAILED;
  if (!l->rx_ready) {
    if (l->breakage.since_ns) return broken(l);
    int up = stream_up(l, s);
    if (up != HFR_LINK_OK) return up;
    if (!l->rx_have && rx_begin(l, dst, bytes) == HFR_LINK_FAILED) return HFR_LINK_FAILED;
    size_t h = sizeof l->rx_header;
    while (l->rx_have < h + l->rx_bytes) {
      struct iovec iov[2];
      int n = 0;
      if (l->rx_have < h) iov[n++] = (struct iovec){(uint8_t *)&l->rx_header + l->rx_have, h - l->rx_have};
      size_t payload_have = l->rx_have > h ? l->rx_have - h : 0;
      if (l->rx_bytes > payload_have) iov[n++] = (struct iovec){l->rx_dst + payload_have, l->rx_bytes - payload_have};
      ssize_t r = read_stream(&l->stream[s], iov, n);
      if (r < 0 && (errno == EAGAIN || errno == EINTR)) return HFR_LINK_AGAIN;
      if (r <= 0) return lost(l, "receiving failed", r ? errno : 0);
      size_t had = l->rx_have;
      l->rx_have += (size_t)r;
      if (had < h && l->rx_have >= h && (l->rx_header.magic != HFR_MSG_MAGIC || l->rx_header.bytes != l->rx_bytes))
        break; /* the engine judges the header */
    }
    if (l->rx_header.magic != HFR_MSG_MAGIC) {
      hfr_fail(hfreduceCorrupt, "message from rank %d on %s has a broken header", link->peer, l->net->host[link->peer]);
      return HFR_LINK_FAILED;
    }
    if (l->rx_header.bytes == l->rx_bytes && check_message(l) != HFR_LINK_OK) return HFR_LINK_FAILED;
    l->rx_ready = 1;
  }
  *header = &l->rx_header;
  *data = l->rx_header.bytes == l->rx_bytes ? l->rx_dst : NULL;
  return HFR_LINK_OK;
}

static void tcp_release(struct hfr_link *link) {
  struct tcp_link *l = (struct tcp_link *)link;
  hfr_link_count_received(link, l->rx_header.bytes);
  l->received++;
  l->rx_have = 0;
  l->rx_ready = 0;
}

static void tcp_want(struct hfr_link *link, int recv, struct hfr_waitset *set) {
  struct tcp_link *l = (struct tcp_link *)link;
  if (l->breakage.since_ns) return; /* the grace is timed */
  for (int s = 0; s < l->net->streams; s++) {
    struct tcp_stream *t = &l->stream[s];
    if (t->connect.fd < 0 || set->n == (int)(sizeof set->fd / sizeof *set->fd))
      continue; /* an arriving connection rings the bell */
    if (t->connect.state == HFR_CONNECT_UP && recv && (int)(l->received % (unsigned)l->net->streams) != s) continue;
    struct iovec iov[2 * TX_QUEUE];
    if (t->connect.state == HFR_CONNECT_UP && !recv && !gather(l, s, iov)) continue;
    short events = t->connect.state == HFR_CONNECT_UP && !recv ? POLLOUT : hfr_connect_events(&t->connect);
    set->fd[set->n++] = (struct pollfd){t->connect.fd, events, 0};
  }
}

/* "10.0.0.1:4711" of one end of a connection; "" when it has none yet. */
static void end_text(int fd, int (*ask)(int, struct sockaddr *, socklen_t *), char *text, size_t size) {
  union {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
  } system;
  socklen_t bytes = sizeof system;
  char full[HFR_ADDR_TEXT];
  struct hfr_addr addr = {0};
  if (ask(fd, &system.any, &bytes)) return;
  if (system.any.sa_family == AF_INET) {
    addr = (struct hfr_addr){.family = 4, .port = ntohs(system.v4.sin_port)};
    memcpy(addr.ip, &system.v4.sin_addr, 4);
  } else if (system.any.sa_family == AF_INET6) {
    addr = (struct hfr_addr){.family = 6, .port = ntohs(system.v6.sin6_port)};
    memcpy(addr.ip, &system.v6.sin6_addr, 16);
  }
  if (addr.family) snprintf(text, size, "%s", hfr_addr_text(&addr, full));
}

static void tcp_stat(struct hfr_link *link, struct hfr_link_stat *stat) {
  struct tcp_link *l = (struct tcp_link *)link;
  for (int s = 0; s < l->net->streams; s++) {
    int fd = l->stream[s].connect.fd;
    struct tcp_info info;
    socklen_t bytes = sizeof info;
    if (fd < 0) continue;
    memset(&info, 0, sizeof info); /* an older kernel fills in less */
    if (!getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes)) stat->retries += info.tcpi_total_retrans;
    if (*stat->remote) continue; /* the first stream stands for all */
    end_text(fd, getpeername, stat->remote, sizeof stat->remote);
    if (*stat->remote) end_text(fd, getsockname, stat->local, sizeof stat->local);
  }
}

static void tcp_after_fork(struct hfr_link *link) {
  struct tcp_link *l = (struct tcp_link *)link;
  for (int s = 0; s < l->net->streams; s++)
    if (l->stream[s].connect.fd >= 0) close(l->stream[s].connect.fd);
}

static void tcp_close(struct hfr_link *link) {
  struct tcp_link *l = (struct tcp_link *)link;
  tcp_after_fork(link);
  for (int s = 0; s < l->net->streams; s++) free(l->stream[s].back);
  free(l->rx_own);
  free(link);
}

const struct hfr_transport hfr_transport_tcp = {
    .name = "tcp",
    .open = tcp_open_link,
    .post_send = tcp_post_send,
    .sent = tcp_sent,
    .recv = tcp_recv,
    .release = tcp_release,
    .want = tcp_want,
    .stat = tcp_stat,
    .close = tcp_close,
    .after_fork = tcp_after_fork,
};
