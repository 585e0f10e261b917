/*
 * The handshake by which both ends of a new connection prove that they know a communicator's secret, before anything else that
 * they say is believed. Challenge and response over nonces; the secret itself never travels. Non-blocking; either role.
 *
 *   server -> client   magic protocol nonce_s
 *   client -> server   magic protocol kind vc stream rank target build comm_id name release nonce_c
 *                      MAC("client", all of it, nonce_s, the server's protocol)
 *   server -> client   magic verdict release build  MAC("server", nonce_c, nonce_s, protocol, release, build)
 *
 * The handshake itself stays as it is, whatever the protocol's number: the number is that of what follows. So builds of different
 * protocols still prove to each other that they belong together, and what protocol they speak; such a verdict is true, and final.
 * All that is said without a proof (that the secret is another one, that the communicator is not known, a protocol older than
 * this form) may come from anybody who holds the port: a rank warns of it and goes on trying for a while, a root warns and counts
 * it. Nothing that a stranger says makes a rank fail sooner, and nothing at all makes a root fail.
 */
#ifndef HFR_BASE_AUTH_H_
#define HFR_BASE_AUTH_H_
#include "status.h"
#include "version.h"

enum hfr_auth_kind { HFR_AUTH_ROOT = 1, HFR_AUTH_CONTROL, HFR_AUTH_DATA, HFR_AUTH_ARENA };

/* How a handshake ended. Those that the server tells the client have their numbers on the wire. */
enum hfr_auth_verdict {
  HFR_AUTH_WELCOME,
  HFR_AUTH_UNKNOWN,  /* no such communicator here: not yet, no more, or never */
  HFR_AUTH_SECRET,   /* the one that calls has another secret */
  HFR_AUTH_PROTOCOL, /* both know the secret, and speak different protocols: proven */
  HFR_AUTH_USER,     /* there is no secret, and the other side belongs to another user */
  HFR_AUTH_OLD,      /* the other side says that it speaks a protocol from before this form of the handshake */
  HFR_AUTH_BROKEN    /* a connection that broke, or a stranger */
};

/* What the client says of itself; all of it under the MAC. Little-endian on the wire (all supported machines are). */
struct hfr_auth_hello {
  uint32_t magic, protocol;
  uint8_t kind, vc;
  uint16_t stream;
  int32_t rank, target; /* who calls; whom (-1: the root service) */
  uint32_t build;
  uint64_t comm_id;
  uint64_t name; /* of the rendezvous, whatever its secret; 0: it has none */
  uint32_t release, pad;
  uint8_t nonce[16];
  uint8_t mac[16];
};

struct hfr_auth {
  int fd, server, state;
  uint8_t secret[16];
  struct hfr_auth_hello hello; /* client: filled in by hfr_auth_client; server: valid when step returned OK */
  uint8_t nonce_s[16];
  struct hfr_version peer;       /* what the other side runs: valid when step returned 1, or the verdict is HFR_AUTH_PROTOCOL */
  enum hfr_auth_verdict verdict; /* valid when step returned -1 */
  uint8_t buf[96];
  size_t want, have;
  int events; /* POLLIN or POLLOUT: what it waits for */
  /* server: find the secret of a communicator; HFR_AUTH_WELCOME when it is known, else why not */
  enum hfr_auth_verdict (*lookup)(void *arg, const struct hfr_auth_hello *hello, uint8_t secret[16]);
  void *arg;
};

/*
 * The secret that is none: all zeros. Ranks on loopback may go without HFREDUCE_SECRET, and then only processes of this user are
 * let in, and believed: the kernel tells of both ends of a connection inside the machine whose they are.
 */
int hfr_auth_is_public(const uint8_t secret[16]);
/* Start on a connected (or, for the client, connecting and now writable) socket. The auth does not own the descriptor. The client
 * may set hello.name before its first step. */
void hfr_auth_client(struct hfr_auth *auth, int fd, enum hfr_auth_kind kind, uint64_t comm_id, const uint8_t secret[16], int rank,
                     int target, int vc, int stream);
void hfr_auth_server(struct hfr_auth *auth, int fd,
                     enum hfr_auth_verdict (*lookup)(void *, const struct hfr_auth_hello *, uint8_t[16]), void *arg);
/* Go on. 1: both sides proven. 0: waits for auth->events. -1: refused or broken; hfr_last_error() says why, auth->verdict in
 * short.
 */
int hfr_auth_step(struct hfr_auth *auth);
/* Client, blocking form: until proven or deadline (monotonic ns). */
hfreduceResult_t hfr_auth_client_wait(struct hfr_auth *auth, int64_t deadline_ns, const char *whom);
#endif
