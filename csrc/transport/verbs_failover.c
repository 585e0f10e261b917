/* When a port fails: the link goes on over another one (verbs_link.h has the rule). */
#include "verbs_link.h"

#include "../base/log.h"
#include "../base/param.h"
#include "../base/thread.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FLUSH_NS 500000000ll /* a device that still works hands posted receives back much sooner */
#define IN_VAIN_MAX 3        /* ports are tried in turn; so often without a message between, the peer cannot be reached */

uint64_t hfr_verbs_received(const struct hfr_verbs_link *l) {
  uint64_t m = l->taken;
  while (m - l->released < (unsigned)l->depth && l->rx_bytes[m % (unsigned)l->depth]) m++;
  return m;
}

uint32_t hfr_verbs_ahead(const struct hfr_verbs_link *l) {
  uint32_t ahead = 0;
  uint64_t first = hfr_verbs_received(l);
  for (uint64_t m = first; m - l->released < (unsigned)l->depth; m++)
    if (l->rx_bytes[m % (unsigned)l->depth]) ahead |= (uint32_t)1 << (m - first);
  return ahead;
}

int hfr_verbs_can_fail_over(const struct hfr_verbs_link *l) {
  struct hfr_ib_port next;
  int usable;
  if (!hfr_param_int(HFR_PARAM_IB_FAILOVER) || l->phase != HFR_VERBS_UP || l->breakage.since_ns || l->closed ||
      l->in_vain >= IN_VAIN_MAX || !hfr_ib_next_port(&l->base->port, &next, &usable))
    return 0;
  /* With one port on either side there is nothing to try; but what the peer asks for is done. */
  return l->movable == HFR_VERBS_ASKED || l->theirs.ports > 1 || strcmp(next.name, l->base->port.name) != 0;
}

static int has_receives(const struct hfr_verbs_link *l) {
  for (int i = 0; i < HFR_VERBS_QPS; i++)
    if (l->qp[i].qp && l->qp[i].receives > 0) return 1;
  return 0;
}

/* What had come before the failure counts, and the sender may have been told so. Some of it may still be on its way from the
 * device: all has been seen when the last posted receive has come back. */
static void drain(struct hfr_verbs_link *l) {
  struct hfr_ib_qp_attr attr = {.qp_state = HFR_IB_QPS_ERR};
  for (int i = 0; i < HFR_VERBS_QPS; i++)
    if (l->qp[i].qp) l->base->ib->modify_qp(l->qp[i].qp, &attr, HFR_IB_QP_STATE);
  int64_t limit = hfr_now_ns() + FLUSH_NS;
  while (hfr_verbs_poll(l) > 0 ||
         (has_receives(l) && hfr_ib_health(&l->base->port) != HFR_IB_DEVICE_LOST && hfr_now_ns() < limit))
    if (has_receives(l)) usleep(20);
}

/* What other links pass on from this one's slots is under way with this registration. */
static void retire_slots(struct hfr_verbs_link *l) {
  struct hfr_verbs_base *b = l->base;
  if (!l->mr || b->refs == 1) return;
  struct hfr_ib_mr **more = realloc(b->retired, (size_t)(b->nretired + 1) * sizeof *more);
  if (!more) return;
  more[b->nretired++] = l->mr;
  b->retired = more;
  l->mr = NULL;
}

int hfr_verbs_fail_over(struct hfr_verbs_link *l) {
  struct hfr_ib_port next;
  char from[sizeof next.name];
  int usable, first = !l->base->left; /* of the communicator's links: one warning is enough */
  l->base->left = 1;
  memcpy(from, l->base->port.name, sizeof from);
  l->phase = HFR_VERBS_HELLO;
  drain(l);
  uint64_t received = hfr_verbs_received(l);
  l->in_vain = received == l->received_before && l->link.posted == l->posted_before ? l->in_vain + 1 : 0;
  l->received_before = received;
  l->posted_before = l->link.posted;
  l->epoch++;
  if (!hfr_ib_next_port(&l->base->port, &next, &usable)) {
    hfr_fail(hfreduceRemoteError, "%.600s; no other RDMA port can be used here", l->trouble_why.text);
    return -1;
  }
  retire_slots(l);
  hfr_verbs_free_objects(l);
  hfr_verbs_base_put(l);
  if (hfr_verbs_base_get(l, &next)) return -1;
  l->trouble = 0;
  l->port_down_ns = 0;
  if (hfr_verbs_make_objects(l)) return -1;
  hfr_log_write(first ? HFR_LOG_WARN : HFR_LOG_INFO, "RDMA with rank %d on %s goes on over %s, no longer over %s: %s",
                l->link.peer, l->net->host[l->link.peer], next.name, from, l->trouble_why.text);
  return 0;
}

/* Has message m come to the peer, perhaps ahead of one that has not? */
static int came(const struct hfr_verbs_hello *h, uint64_t m) {
  return m < h->received || (m - h->received < 32 && h->ahead >> (m - h->received) & 1);
}

int hfr_verbs_agree(struct hfr_verbs_link *l) {
  const struct hfr_verbs_hello *h = &l->theirs;
  uint64_t posted = l->link.posted;
  if (h->epoch != l->mine.epoch || h->received > posted || h->received < l->credited || h->released > h->received ||
      h->released < l->credited) {
    hfr_fail(hfreduceCorrupt,
             "it broke the RDMA protocol: after %u failovers (here %u) it has %llu messages and released %llu of %llu", h->epoch,
             l->mine.epoch, (unsigned long long)h->received, (unsigned long long)h->released, (unsigned long long)posted);
    return -1;
  }
  /* Completions may have been lost, of those already credited too. What is sent again is held again. */
  for (unsigned slot = 0; slot < (unsigned)l->depth; slot++) hfr_verbs_message_done(l, slot);
  l->credited = h->released;
  for (uint64_t m = h->received; m < posted; m++) {
    if (came(h, m) || !l->tx_data[m % (unsigned)l->depth] || m >= l->sent) continue;
    hfr_fail(
        hfreduceRemoteError,
        "%.400s; message %llu, which the device had acknowledged, is lost (the peer has %llu and %#x beyond them, of %llu), and "
        "its buffer may have changed since",
        l->trouble_why.text, (unsigned long long)m, (unsigned long long)h->received, h->ahead, (unsigned long long)posted);
    return -1;
  }
  return 0;
}

int hfr_verbs_repeat(struct hfr_verbs_link *l) {
  /* Under way again, also those behind one that cannot be posted. */
  for (uint64_t m = l->theirs.received; m < l->link.posted; m++)
    if (!came(&l->theirs, m)) l->tx_busy[m % (unsigned)l->depth] = 1;
  for (uint64_t m = l->theirs.received; m < l->link.posted; m++)
    if (!came(&l->theirs, m) && hfr_verbs_post_message(l, m)) return -1;
  return 0;
}
