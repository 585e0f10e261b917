/* Addresses, TCP sockets, and abstract Unix sockets that pass descriptors. */
#include "socket.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "param.h"

#define HOST_MAX 256

/* ---- addresses ---- */

union any_address {
  struct sockaddr any;
  struct sockaddr_in v4;
  struct sockaddr_in6 v6;
};

static const uint8_t mapped_prefix[12] = {[10] = 0xff, [11] = 0xff}; /* ::ffff:0:0/96, IPv4 inside IPv6 */

/* The system's form; 0 when the family is none. */
static socklen_t to_system(const struct hfr_addr *addr, union any_address *system) {
  memset(system, 0, sizeof *system);
  if (addr->family == 4) {
    system->v4.sin_family = AF_INET;
    system->v4.sin_port = htons(addr->port);
    memcpy(&system->v4.sin_addr, addr->ip, 4);
    return sizeof system->v4;
  }
  if (addr->family == 6) {
    system->v6.sin6_family = AF_INET6;
    system->v6.sin6_port = htons(addr->port);
    memcpy(&system->v6.sin6_addr, addr->ip, 16);
    return sizeof system->v6;
  }
  return 0;
}

/* Mapped addresses become IPv4, so that equal addresses compare equal. */
static void set_ip(struct hfr_addr *addr, int family, const void *ip) {
  const uint8_t *bytes = ip;
  if (family == 6 && !memcmp(bytes, mapped_prefix, sizeof mapped_prefix)) {
    family = 4;
    bytes += sizeof mapped_prefix;
  }
  addr->family = (uint8_t)family;
  memset(addr->ip, 0, sizeof addr->ip);
  memcpy(addr->ip, bytes, family == 4 ? 4 : 16);
}

const char *hfr_addr_text(const struct hfr_addr *addr, char text[HFR_ADDR_TEXT]) {
  char ip[INET6_ADDRSTRLEN] = "";
  if (addr->family == 4)
    snprintf(text, HFR_ADDR_TEXT, "%s:%u", inet_ntop(AF_INET, addr->ip, ip, sizeof ip), addr->port);
  else if (addr->family == 6)
    snprintf(text, HFR_ADDR_TEXT, "[%s]:%u", inet_ntop(AF_INET6, addr->ip, ip, sizeof ip), addr->port);
  else
    snprintf(text, HFR_ADDR_TEXT, "(no address)");
  return text;
}

int hfr_addr_is_loopback(const struct hfr_addr *addr) {
  static const uint8_t v6[16] = {[15] = 1};
  if (addr->family == 4) return addr->ip[0] == 127;
  if (addr->family != 6) return 0;
  return !memcmp(addr->ip, v6, 16) || (!memcmp(addr->ip, mapped_prefix, sizeof mapped_prefix) && addr->ip[12] == 127);
}

static hfreduceResult_t parse_port(const char *digits, const char *text, uint16_t *port) {
  char *end;
  long number = *digits >= '0' && *digits <= '9' ? strtol(digits, &end, 10) : -1;
  if (number < 0 || *end || number > 65535)
    return hfr_fail(hfreduceInvalidArgument, "address \"%.300s\": \"%.20s\" is not a port (0 to 65535)", text, digits);
  *port = (uint16_t)number;
  return hfreduceSuccess;
}

/* Split "host:port" or "[host]:port"; *bracketed tells which. */
static hfreduceResult_t split_address(const char *text, char host[HOST_MAX], const char **digits, int *bracketed) {
  const char *begin = text, *end, *colon;
  *bracketed = text[0] == '[';
  if (*bracketed) {
    begin = text + 1;
    end = strchr(begin, ']');
    colon = end ? end + 1 : NULL;
  } else {
    end = colon = strrchr(text, ':');
  }
  if (!colon || *colon != ':')
    return hfr_fail(hfreduceInvalidArgument, "address \"%.300s\": expected host:port or [IPv6]:port", text);
  if (!*bracketed && memchr(text, ':', (size_t)(colon - text)))
    return hfr_fail(hfreduceInvalidArgument, "address \"%.300s\": write an IPv6 address in brackets, [IPv6]:port", text);
  if (end == begin) return hfr_fail(hfreduceInvalidArgument, "address \"%.300s\" has no host", text);
  if (end - begin >= HOST_MAX) return hfr_fail(hfreduceInvalidArgument, "address: host name longer than %d bytes", HOST_MAX - 1);
  memcpy(host, begin, (size_t)(end - begin));
  host[end - begin] = '\0';
  *digits = colon + 1;
  return hfreduceSuccess;
}

static int preferred_family(void) { return !strcmp(hfr_param_text(HFR_PARAM_SOCKET_FAMILY), "AF_INET6") ? 6 : 4; }

static hfreduceResult_t resolve_name(const char *host, struct hfr_addr *addr) {
  struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *list = NULL;
  int rc = getaddrinfo(host, NULL, &hints, &list), wanted = preferred_family();
  if (rc)
    return hfr_fail(hfreduceInvalidArgument, "host \"%s\" cannot be resolved: %s", host,
                    rc == EAI_SYSTEM ? strerror(errno) : gai_strerror(rc));
  for (struct addrinfo *p = list; p; p = p->ai_next) {
    const union any_address *system = (const union any_address *)p->ai_addr;
    if (addr->family == wanted) break;
    if (p->ai_family == AF_INET && addr->family != 4) set_ip(addr, 4, &system->v4.sin_addr);
    if (p->ai_family == AF_INET6 && addr->family != 6 && (wanted == 6 || !addr->family)) set_ip(addr, 6, &system->v6.sin6_addr);
  }
  freeaddrinfo(list);
  if (!addr->family) return hfr_fail(hfreduceInvalidArgument, "host \"%s\" has neither an IPv4 nor an IPv6 address", host);
  return hfreduceSuccess;
}

hfreduceResult_t hfr_addr_parse(const char *text, struct hfr_addr *addr) {
  struct hfr_addr parsed = {0};
  char host[HOST_MAX];
  const char *digits = text;
  uint8_t ip[16];
  int bracketed;
  HFR_TRY(split_address(text, host, &digits, &bracketed));
  HFR_TRY(parse_port(digits, text, &parsed.port));
  if (inet_pton(AF_INET6, host, ip) == 1)
    set_ip(&parsed, 6, ip);
  else if (bracketed) /* also "fe80::1%eth0": an interface's name means nothing to a peer, so link-local addresses cannot be used
                       */
    return hfr_fail(hfreduceInvalidArgument, "address \"%.300s\": \"%s\" is not an IPv6 address (zones are not supported)", text,
                    host);
  else if (inet_pton(AF_INET, host, ip) == 1)
    set_ip(&parsed, 4, ip);
  else
    HFR_TRY(resolve_name(host, &parsed));
  *addr = parsed;
  return hfreduceSuccess;
}

/* ---- TCP ---- */

static void set_option(int fd, int level, int option, int value) { setsockopt(fd, level, option, &value, sizeof value); }

/* Before connect and listen: the window scale is agreed in the handshake. */
static void set_buffers(int fd) {
  int bytes = (int)hfr_param_int(HFR_PARAM_TCP_BUFFER);
  if (!bytes) return;
  set_option(fd, SOL_SOCKET, SO_SNDBUF, bytes);
  set_option(fd, SOL_SOCKET, SO_RCVBUF, bytes);
}

/* Close without disturbing the errno that the caller is to see. */
static void close_keep_errno(int fd) {
  int saved = errno;
  close(fd);
  errno = saved;
}

/* A TCP socket for the address's family; *system is filled. */
static hfreduceResult_t open_tcp(const struct hfr_addr *addr, union any_address *system, socklen_t *bytes, int *fd) {
  *bytes = to_system(addr, system);
  if (!*bytes) return hfr_fail(hfreduceInternalError, "no address to open a socket for (family %d)", addr->family);
  *fd = socket(system->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (*fd < 0)
    return hfr_fail(hfreduceSystemError, "cannot create a TCP socket for IPv%d: %s", addr->family, hfr_errno_text(errno));
  set_buffers(*fd);
  return hfreduceSuccess;
}

hfreduceResult_t hfr_socket_listen(struct hfr_addr *addr, int backlog, int *fd) {
  union any_address system;
  socklen_t bytes = 0;
  char text[HFR_ADDR_TEXT];
  int sock = -1;
  HFR_TRY(open_tcp(addr, &system, &bytes, &sock));
  set_option(sock, SOL_SOCKET, SO_REUSEADDR, 1);
  if (bind(sock, &system.any, bytes) || listen(sock, backlog) || getsockname(sock, &system.any, &bytes)) {
    close_keep_errno(sock);
    return hfr_fail(hfreduceSystemError, "cannot listen on %s: %s%s", hfr_addr_text(addr, text), strerror(errno),
                    errno == EADDRINUSE      ? "; another process has the port"
                    : errno == EADDRNOTAVAIL ? "; no interface of this host has the address"
                                             : "");
  }
  addr->port = ntohs(addr->family == 4 ? system.v4.sin_port : system.v6.sin6_port);
  *fd = sock;
  return hfreduceSuccess;
}

hfreduceResult_t hfr_socket_connect(const struct hfr_addr *addr, int *fd) {
  union any_address system;
  socklen_t bytes = 0;
  char text[HFR_ADDR_TEXT];
  int sock = -1;
  HFR_TRY(open_tcp(addr, &system, &bytes, &sock));
  /* Interrupted, a connection goes on being made, as with EINPROGRESS. */
  if (connect(sock, &system.any, bytes) && errno != EINPROGRESS && errno != EINTR) {
    close_keep_errno(sock);
    /* The kernel may answer for a peer on this machine at once. */
    return hfr_fail(errno == ECONNREFUSED ? hfreduceRemoteError : hfreduceSystemError, "cannot connect to %s: %s",
                    hfr_addr_text(addr, text), strerror(errno));
  }
  *fd = sock;
  return hfreduceSuccess;
}

int hfr_socket_error(int fd) {
  int error = 0;
  socklen_t bytes = sizeof error;
  return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &bytes) ? errno : error;
}

void hfr_socket_tune(int fd) {
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  /* Heartbeats find lost peers; keepalive only ends connections that nobody watches any more (about 30 s). */
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 15);
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
  set_buffers(fd);
}

/* ---- Unix sockets ---- */

/* Abstract names begin with a NUL, count by length, and vanish with their socket: nothing stays behind. */
static hfreduceResult_t open_unix(const char *name, struct sockaddr_un *system, socklen_t *bytes, int *fd) {
  size_t length = strlen(name);
  *system = (struct sockaddr_un){.sun_family = AF_UNIX};
  if (!length || length > sizeof system->sun_path - 1)
    return hfr_fail(hfreduceInternalError, "Unix socket name of %zu bytes (1 to %zu)", length, sizeof system->sun_path - 1);
  memcpy(system->sun_path + 1, name, length);
  *bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
  *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (*fd < 0) return hfr_fail(hfreduceSystemError, "cannot create a Unix socket: %s", hfr_errno_text(errno));
  return hfreduceSuccess;
}

hfreduceResult_t hfr_unix_listen(const char *name, int backlog, int *fd) {
  struct sockaddr_un system;
  socklen_t bytes = 0;
  int sock = -1;
  HFR_TRY(open_unix(name, &system, &bytes, &sock));
  if (bind(sock, (struct sockaddr *)&system, bytes) || listen(sock, backlog)) {
    close_keep_errno(sock);
    return hfr_fail(hfreduceSystemError, "cannot listen on Unix socket @%s: %s", name, strerror(errno));
  }
  *fd = sock;
  return hfreduceSuccess;
}

hfreduceResult_t hfr_unix_connect(const char *name, int *fd) {
  struct sockaddr_un system;
  socklen_t bytes = 0;
  int sock = -1, rc;
  HFR_TRY(open_unix(name, &system, &bytes, &sock));
  do rc = connect(sock, (struct sockaddr *)&system, bytes);
  while (rc && errno == EINTR);
  if (rc) {
    close_keep_errno(sock);
    return hfr_fail(hfreduceSystemError, "cannot connect to Unix socket @%s: %s", name, strerror(errno));
  }
  *fd = sock;
  return hfreduceSuccess;
}

int hfr_unix_send_fd(int sock, int fd) {
  char byte = 0;
  struct iovec data = {&byte, 1};
  union {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(sizeof(int))];
  } control = {.bytes = {0}};
  struct msghdr message = {
      .msg_iov = &data, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(header), &fd, sizeof fd);
  ssize_t sent;
  do sent = sendmsg(sock, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  while (sent < 0 && errno == EINTR);
  return sent < 0 ? -errno : 0;
}

/* Gather the descriptors of a message, whose control buffer has room for `max`; how many there are. */
static int collect_fds(struct msghdr *message, int *fds, int max) {
  int count = 0;
  for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    int here = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    for (int i = 0; i < here && count < max; i++) memcpy(&fds[count++], CMSG_DATA(header) + (size_t)i * sizeof(int), sizeof(int));
  }
  return count;
}

int hfr_unix_recv_fd(int sock, int *fd) {
  enum { MAX = 8 }; /* what exceeds the buffer is closed by the kernel, which sets MSG_CTRUNC */
  char byte;
  struct iovec data = {&byte, 1};
  union {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(MAX * sizeof(int))];
  } control;
  struct msghdr message = {
      .msg_iov = &data, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
  int fds[MAX];
  ssize_t got;
  do got = recvmsg(sock, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  while (got < 0 && errno == EINTR);
  if (got < 0) return -errno;
  int count = collect_fds(&message, fds, MAX);
  if (got == 1 && count == 1 && !(message.msg_flags & MSG_CTRUNC)) {
    *fd = fds[0];
    return 0;
  }
  for (int i = 0; i < count; i++) close(fds[i]);
  return got == 0 ? -ECONNRESET : -EBADMSG; /* the peer has closed; not one descriptor */
}
