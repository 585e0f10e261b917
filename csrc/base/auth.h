/*
 * The handshake by which both ends of a new connection prove that they know a communicator's secret, before anything else that
 * they say is believed. Challenge and response over nonces; the secret itself never travels. Non-blocking; either role.
 *
 *   server -> client   magic version nonce_s
 *   client -> server   magic version kind vc stream rank target comm_id nonce_c  MAC("client", all of it, nonce_s)
 *   server -> client   MAC("server", nonce_c, nonce_s)
 */
#ifndef HFR_BASE_AUTH_H_
#define HFR_BASE_AUTH_H_
#include "status.h"

#define HFR_PROTOCOL_VERSION 1u
enum hfr_auth_kind { HFR_AUTH_ROOT = 1, HFR_AUTH_CONTROL, HFR_AUTH_DATA, HFR_AUTH_ARENA };

/* What the client says of itself; all of it under the MAC. Little-endian on the wire (all supported machines are). */
struct hfr_auth_hello {
  uint32_t magic, version;
  uint8_t kind, vc;
  uint16_t stream;
  int32_t rank, target; /* who calls; whom (-1: the root service) */
  uint32_t pad;
  uint64_t comm_id;
  uint8_t nonce[16];
  uint8_t mac[16];
};

struct hfr_auth {
  int fd, server, state;
  uint8_t secret[16];
  struct hfr_auth_hello hello; /* client: filled in by hfr_auth_client; server: valid when step returned OK */
  uint8_t nonce_s[16];
  uint8_t buf[96];
  size_t want, have;
  int events; /* POLLIN or POLLOUT: what it waits for */
  /* server: find the secret of a communicator; 0 when it is known */
  int (*lookup)(void *arg, const struct hfr_auth_hello *hello, uint8_t secret[16]);
  void *arg;
};

/* Start on a connected (or, for the client, connecting and now writable) socket. The auth does not own the descriptor. */
void hfr_auth_client(struct hfr_auth *auth, int fd, enum hfr_auth_kind kind, uint64_t comm_id, const uint8_t secret[16], int rank,
                     int target, int vc, int stream);
void hfr_auth_server(struct hfr_auth *auth, int fd, int (*lookup)(void *, const struct hfr_auth_hello *, uint8_t[16]), void *arg);
/* Go on. 1: both sides proven. 0: waits for auth->events. -1: refused or broken; hfr_last_error() says why. */
int hfr_auth_step(struct hfr_auth *auth);
/* Client, blocking form: until proven or deadline (monotonic ns). */
hfreduceResult_t hfr_auth_client_wait(struct hfr_auth *auth, int64_t deadline_ns, const char *whom);
#endif
