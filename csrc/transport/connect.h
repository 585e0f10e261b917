/* What links that begin with a TCP connection share: how it comes up, authenticated, and how its end is told. */
#ifndef HFR_TRANSPORT_CONNECT_H_
#define HFR_TRANSPORT_CONNECT_H_
#include "../base/auth.h"
#include "transport.h"

enum hfr_connect_state { HFR_CONNECT_IDLE, HFR_CONNECT_CONNECTING, HFR_CONNECT_AUTH, HFR_CONNECT_UP };

/* One connection between this rank and a peer: the lower rank connects, the higher one accepts (its process' listener hands the
 * descriptor over through hfr_net.arrived). */
struct hfr_connect {
  enum hfr_connect_state state;
  _Atomic int fd; /* -1: none yet. Set once by the driver; any thread may look at the connection's state in the kernel */
  struct hfr_auth auth;
};
/* Bring it up as far as possible. OK: it can carry data. FAILED: hfr_last_error() says why. Nothing blocks. */
int hfr_connect_step(struct hfr_connect *connect, struct hfr_net *net, int peer, int vc, int stream);
/* What poll(2) should wait for while it comes up. */
short hfr_connect_events(const struct hfr_connect *connect);

/* A connection that broke, and why. Mostly that is a consequence: the control connections get half a second to tell the cause
 * (who died, who disagreed). */
struct hfr_breakage {
  int64_t since_ns; /* 0: whole */
  hfreduceErrorInfo_t why;
};
/* Remember the thread's last error, told with the peer's name, as the reason, and start the grace; called again: AGAIN until the
 * grace is over, then FAILED with the reason as the thread's last error. */
int hfr_broken(struct hfr_breakage *breakage, const struct hfr_net *net, int peer);
/* The same, for a failed system call. error 0: the peer has closed. */
int hfr_lost(struct hfr_breakage *breakage, const struct hfr_net *net, int peer, const char *what, int error);
#endif
