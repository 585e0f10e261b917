/* An engine's links: made at first use, and what they have carried. */
#include "engine.h"

#include <stdio.h>

struct hfr_link *hfr_engine_link(struct hfr_engine *e, int peer, int vc) {
  _Atomic(struct hfr_link *) *slot = &e->link[(size_t)peer * HFR_NVC + (size_t)vc];
  struct hfr_link *link = atomic_load_explicit(slot, memory_order_relaxed); /* the driver's own store */
  if (link) return link;
  int local = e->layout->node_of[peer] == e->layout->node, first = 1;
  for (int other = 0; other < HFR_NVC; other++) first &= !e->link[(size_t)peer * HFR_NVC + (size_t)other];
  if ((local ? &hfr_transport_shm : e->remote)->open(e->net, peer, vc, &link)) return NULL;
  atomic_store_explicit(slot, link, memory_order_release); /* pairs with hfr_engine_connection */
  if (first) {
    int n = atomic_load_explicit(&e->nlinked, memory_order_relaxed);
    e->linked[n] = peer;
    atomic_store_explicit(&e->nlinked, n + 1, memory_order_release); /* pairs with hfr_engine_connections */
  }
  return link;
}

int hfr_engine_connections(struct hfr_engine *e) { return atomic_load_explicit(&e->nlinked, memory_order_acquire); }

static uint64_t look(const _Atomic uint64_t *counter) { return atomic_load_explicit(counter, memory_order_relaxed); }

void hfr_engine_connection(struct hfr_engine *e, int index, hfreduceConnection_t *c) {
  *c = (hfreduceConnection_t){.peer = e->linked[index]};
  for (int vc = 0; vc < HFR_NVC; vc++) {
    struct hfr_link *l = atomic_load_explicit(&e->link[(size_t)c->peer * HFR_NVC + (size_t)vc], memory_order_acquire);
    struct hfr_link_stat stat = {0};
    if (!l) continue;
    snprintf(c->transport, sizeof c->transport, "%s", l->transport->name);
    c->bytes_sent += look(&l->bytes_sent);
    c->bytes_received += look(&l->bytes_received);
    c->messages_sent += look(&l->messages_sent);
    c->messages_received += look(&l->messages_received);
    c->stalls += look(&l->stalls);
    if (l->transport->stat) l->transport->stat(l, &stat);
    if (!stat.shared)
      c->retries += stat.retries;
    else if (stat.retries > c->retries)
      c->retries = stat.retries;
    if (*c->remote || !*stat.local) continue; /* one channel stands for all */
    snprintf(c->local, sizeof c->local, "%s", stat.local);
    snprintf(c->remote, sizeof c->remote, "%s", stat.remote);
  }
}
