/* Shared memory: a link over the two rings that a pair of local ranks has in the arena. */
#include "transport.h"

#include <stdlib.h>
#include <string.h>

struct shm_link {
  struct hfr_link link;
  struct hfr_arena *arena;
  struct hfr_ring *tx, *rx;
  uint64_t tail_seen; /* cached tx->tail: saves a miss a message */
  /* The header of the message at hand, copied once: the sender can still write to the ring's, and what was judged must be what is
     acted upon. */
  struct hfr_msg_header at_hand;
  uint64_t copied; /* messages whose header was */
};

static hfreduceResult_t shm_open_link(struct hfr_net *net, int peer, int vc, struct hfr_link **out) {
  struct shm_link *l = calloc(1, sizeof *l);
  if (!l) return hfr_fail(hfreduceSystemError, "out of memory for a link to rank %d", peer);
  int ring = vc == HFR_VC_P2P; /* collectives use one channel inside a node */
  l->link = (struct hfr_link){.transport = &hfr_transport_shm, .peer = peer, .vc = vc};
  l->arena = net->arena;
  l->tx = hfr_arena_ring_at(net->arena, net->arena->local, net->local_of[peer], ring);
  l->rx = hfr_arena_ring_at(net->arena, net->local_of[peer], net->arena->local, ring);
  l->link.posted = atomic_load_explicit(&l->tx->head, memory_order_relaxed);
  l->copied = atomic_load_explicit(&l->rx->tail, memory_order_relaxed);
  *out = &l->link;
  return hfreduceSuccess;
}

static int shm_post_send(struct hfr_link *link, const struct hfr_msg_header *header, const void *data) {
  struct shm_link *l = (struct shm_link *)link;
  uint64_t head = link->posted;
  if (head - l->tail_seen >= HFR_RING_SLOTS) {
    l->tail_seen =
        atomic_load_explicit(&l->tx->tail, memory_order_acquire); /* pairs with shm_release: the slot is free to overwrite */
    if (head - l->tail_seen >= HFR_RING_SLOTS) {
      hfr_link_count_stall(link);
      return HFR_LINK_AGAIN;
    }
  }
  if (header->bytes > l->arena->ring_slot) {
    hfr_fail(hfreduceInternalError, "message of %llu bytes for a ring slot of %zu", (unsigned long long)header->bytes,
             l->arena->ring_slot);
    return HFR_LINK_FAILED;
  }
  l->tx->header[head % HFR_RING_SLOTS] = *header;
  hfr_writer_copy(&l->arena->writer, hfr_ring_data(l->arena, l->tx, head), data, header->bytes);
  atomic_store_explicit(&l->tx->head, head + 1, memory_order_release); /* pairs with the load in shm_recv */
  hfr_link_count_sent(link, header->bytes);
  hfr_arena_notify(l->arena);
  return HFR_LINK_OK;
}

static uint64_t shm_sent(struct hfr_link *link) { return link->posted; /* copied on post */ }

static int shm_recv(struct hfr_link *link, void *dst, size_t bytes, const struct hfr_msg_header **header, const void **data) {
  struct shm_link *l = (struct shm_link *)link;
  (void)dst;
  uint64_t tail = atomic_load_explicit(&l->rx->tail, memory_order_relaxed);
  if (atomic_load_explicit(&l->rx->head, memory_order_acquire) == tail) return HFR_LINK_AGAIN;
  if (l->copied == tail) {
    l->at_hand = l->rx->header[tail % HFR_RING_SLOTS];
    l->copied++;
  }
  *header = &l->at_hand;
  *data = l->at_hand.bytes == bytes ? hfr_ring_data(l->arena, l->rx, tail) : NULL;
  return HFR_LINK_OK;
}

static void shm_release(struct hfr_link *link) {
  struct shm_link *l = (struct shm_link *)link;
  uint64_t tail = atomic_load_explicit(&l->rx->tail, memory_order_relaxed);
  hfr_link_count_received(link, l->at_hand.bytes);
  atomic_store_explicit(&l->rx->tail, tail + 1, memory_order_release); /* pairs with shm_post_send */
  hfr_arena_notify(l->arena);
}

static void shm_want(struct hfr_link *link, int recv, struct hfr_waitset *set) { (void)link, (void)recv, (void)set; }
static void shm_close(struct hfr_link *link) { free(link); }
static void shm_after_fork(struct hfr_link *link) { (void)link; }

const struct hfr_transport hfr_transport_shm = {
    .name = "shm",
    .open = shm_open_link,
    .post_send = shm_post_send,
    .sent = shm_sent,
    .recv = shm_recv,
    .release = shm_release,
    .want = shm_want,
    .close = shm_close,
    .after_fork = shm_after_fork,
};
