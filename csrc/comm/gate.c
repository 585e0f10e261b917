/*
 * The gate of driver calls that may hang. A driver may keep calls that make or give back memory, streams and events waiting until
 * no stream waits for a word. The word may depend on the very thread that the driver keeps waiting: the thread would make the
 * next call that its peer needs, or other ranks of its process share its device. Then nothing goes on. So a communicator makes
 * all that it needs early (hfr_staging_provide), and puts aside what it gives back until no window of the process is open. While
 * the gate is closed no launch begins.
 */
#include "staging.h"

#include <stdlib.h>
#include <sys/mman.h>

struct aside {
  struct aside *next;
  struct hfr_copier *copier;
  struct hfr_pinned lent;
  uint8_t *mapped; /* what the arena has left mapped */
  size_t bytes;
};

static struct {
  pthread_mutex_t lock;
  int launching; /* launches on their way into the queues */
  struct aside *aside;
  _Atomic int any;
} gate = {.lock = PTHREAD_MUTEX_INITIALIZER};

void hfr_gate_launch(int more) {
  pthread_mutex_lock(&gate.lock);
  gate.launching += more;
  pthread_mutex_unlock(&gate.lock);
}

int hfr_gate_close(void) {
  pthread_mutex_lock(&gate.lock);
  if (!gate.launching && !atomic_load(&hfr_windows_open)) return 1;
  pthread_mutex_unlock(&gate.lock);
  return 0;
}

void hfr_gate_open(void) { pthread_mutex_unlock(&gate.lock); }

static void give_back(struct aside *a) {
  hfr_copier_destroy(a->copier, 0);
  hfr_pinned_free(&a->lent);
  if (a->mapped) munmap(a->mapped, a->bytes);
}

void hfr_gate_give_back(struct hfr_copier *copier, struct hfr_pinned *lent, struct hfr_arena *arena) {
  struct aside now = {.copier = copier, .lent = *lent}, *later;
  if (hfr_gate_close()) {
    give_back(&now);
    hfr_gate_open();
    return;
  }
  if (lent->host) {
    now.mapped = hfr_arena_lending(arena, arena->local);
    now.bytes = arena->lend;
    arena->left = 1;
  }
  if (!(later = malloc(sizeof *later))) return; /* left to the process */
  pthread_mutex_lock(&gate.lock);
  *later = now;
  later->next = gate.aside;
  gate.aside = later;
  atomic_store(&gate.any, 1);
  pthread_mutex_unlock(&gate.lock);
}

void hfr_gate_tidy(size_t keep) {
  if (!atomic_load_explicit(&gate.any, memory_order_relaxed) && hfr_pinned_kept() <= keep) return;
  if (!hfr_gate_close()) return;
  for (struct aside *a; (a = gate.aside);) {
    gate.aside = a->next;
    give_back(a);
    free(a);
  }
  atomic_store(&gate.any, 0);
  hfr_pinned_trim(keep);
  hfr_gate_open();
}
