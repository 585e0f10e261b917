/* Addresses and sockets. Every descriptor made here is close-on-exec and non-blocking. */
#ifndef HFR_BASE_SOCKET_H_
#define HFR_BASE_SOCKET_H_
#include "status.h"
#include <netinet/in.h>

#define HFR_ADDR_TEXT 80
/* A host-independent wire form of an address: 20 bytes. */
struct hfr_addr {
  uint8_t family; /* 4, 6, or 0 = none */
  uint8_t pad;
  uint16_t port;  /* host order */
  uint8_t ip[16]; /* network order; first 4 for IPv4 */
};
/* "1.2.3.4:5", "[::1]:5" */
const char *hfr_addr_text(const struct hfr_addr *addr, char text[HFR_ADDR_TEXT]);
int hfr_addr_is_loopback(const struct hfr_addr *addr);
/* "host:port", "[v6]:port"; names are resolved (prefers IPv4 unless HFREDUCE_SOCKET_FAMILY says otherwise). InvalidArgument says
 * what was wrong. */
hfreduceResult_t hfr_addr_parse(const char *text, struct hfr_addr *addr);
/* Listening TCP socket on addr (port 0: any; addr->port is filled in). SO_REUSEADDR. */
hfreduceResult_t hfr_socket_listen(struct hfr_addr *addr, int backlog, int *fd);
/* Start a connection: *fd is connecting; writable when settled. Local refusal is an error; remote refusal shows in
 * hfr_socket_error. */
hfreduceResult_t hfr_socket_connect(const struct hfr_addr *addr, int *fd);
/* SO_ERROR: 0 when connected. */
int hfr_socket_error(int fd);
/* TCP_NODELAY, keepalive, and buffer sizes from HFREDUCE_TCP_BUFFER. */
void hfr_socket_tune(int fd);
/* Abstract Unix socket `name`: listen on / connect to it (connect is immediate: hfreduceSystemError with errno ECONNREFUSED when
 * nobody listens). */
hfreduceResult_t hfr_unix_listen(const char *name, int backlog, int *fd);
hfreduceResult_t hfr_unix_connect(const char *name, int *fd);
/* Pass a descriptor over a connected Unix socket with one byte. 0 or -errno; -EAGAIN when it would block. */
int hfr_unix_send_fd(int sock, int fd);
int hfr_unix_recv_fd(int sock, int *fd);
#endif
