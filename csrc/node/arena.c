/* The shared memory of a node's ranks and the bells that wake them. */
#include "arena.h"

#include "../base/mac.h"
#include "../base/thread.h"
#include "mapping.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#define ARENA_MAGIC 0x616e657261726668ull /* "hfrarena" */
#define RING_HEADER 4096
_Static_assert(sizeof(struct hfr_ring) <= RING_HEADER, "ring header fits its page");

struct arena_header {
  uint64_t magic, bytes, chunk, lend;
  uint32_t nlocal, slots;
};

static size_t pages(size_t bytes) { return (bytes + 4095) & ~(size_t)4095; }

/* Fill in the geometry; the same on all ranks, so offsets need not be sent. */
static void set_geometry(struct hfr_arena *a, int nlocal, size_t chunk, int slots, size_t lend) {
  a->nlocal = nlocal;
  a->slots = slots;
  a->chunk = pages(chunk);
  a->ring_slot = pages(chunk / 2);
  a->rank_stride = 2 * (size_t)slots * a->chunk;
  a->ring_stride = RING_HEADER + HFR_RING_SLOTS * a->ring_slot;
  a->lend = pages(lend);
  size_t ctrl = pages(sizeof(struct hfr_rank_ctrl) * (size_t)nlocal), lending = a->lend ? a->lend + a->chunk : 0;
  a->bytes = 4096 + ctrl + (size_t)nlocal * (a->rank_stride + (size_t)nlocal * HFR_RING_VCS * a->ring_stride + lending);
}

static hfreduceResult_t map_arena(struct hfr_arena *a) {
  a->map = hfr_node_map(a->fd, a->bytes);
  if (!a->map)
    return hfr_fail(hfreduceSystemError, "cannot map %zu bytes of shared memory for %d local ranks: %s", a->bytes, a->nlocal,
                    strerror(errno));
  a->ctrl = (struct hfr_rank_ctrl *)(a->map + 4096);
  a->data = a->map + 4096 + pages(sizeof(struct hfr_rank_ctrl) * (size_t)a->nlocal);
  a->rings = a->data + (size_t)a->nlocal * a->rank_stride;
  a->lending = a->rings + (size_t)a->nlocal * a->nlocal * HFR_RING_VCS * a->ring_stride;
  return hfreduceSuccess;
}

/* Beyond this limit the kernel does not only refuse, but sends SIGXFSZ, which ends the process. */
static hfreduceResult_t check_file_size(const struct hfr_arena *a) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_FSIZE, &limit) || limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur >= a->bytes) return hfreduceSuccess;
  return hfr_fail(hfreduceSystemError,
                  "the shared memory of %d local ranks takes %zu bytes, but this process may make files of %llu bytes only "
                  "(RLIMIT_FSIZE); raise the limit (ulimit -f unlimited)",
                  a->nlocal, a->bytes, (unsigned long long)limit.rlim_cur);
}

hfreduceResult_t hfr_arena_create(struct hfr_arena *a, int nlocal, size_t chunk, int slots, size_t lend) {
  *a = (struct hfr_arena){.fd = -1, .bell_fd = -1};
  set_geometry(a, nlocal, chunk, slots, lend);
  a->fd = memfd_create("hfreduce", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (a->fd < 0) return hfr_fail(hfreduceSystemError, "memfd_create failed: %s", hfr_errno_text(errno));
  HFR_TRY(check_file_size(a));
  if (ftruncate(a->fd, (off_t)a->bytes) || fcntl(a->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
    return hfr_fail(hfreduceSystemError, "cannot size and seal %zu bytes of shared memory: %s", a->bytes, strerror(errno));
  HFR_TRY(map_arena(a));
  *(struct arena_header *)a->map =
      (struct arena_header){ARENA_MAGIC, a->bytes, a->chunk, a->lend, (uint32_t)nlocal, (uint32_t)slots};
  return hfreduceSuccess;
}

hfreduceResult_t hfr_arena_attach(struct hfr_arena *a, int fd, int nlocal, size_t chunk, int slots, size_t lend) {
  *a = (struct hfr_arena){.fd = fd, .bell_fd = -1};
  set_geometry(a, nlocal, chunk, slots, lend);
  struct stat st;
  int seals = fcntl(fd, F_GET_SEALS);
  /* Without the seals a peer could shrink the file under us: every access would be a SIGBUS. */
  if (fstat(fd, &st) || (size_t)st.st_size != a->bytes || seals < 0 || !(seals & F_SEAL_SHRINK))
    return hfr_fail(hfreduceInternalError,
                    "shared memory from the local leader has %lld bytes and seals %#x, expected %zu bytes, sealed",
                    (long long)st.st_size, (unsigned)seals, a->bytes);
  HFR_TRY(map_arena(a));
  const struct arena_header *h = (const struct arena_header *)a->map;
  if (h->magic != ARENA_MAGIC || h->bytes != a->bytes)
    return hfr_fail(hfreduceInternalError, "shared memory from the local leader is not an arena");
  return hfreduceSuccess;
}

hfreduceResult_t hfr_arena_join(struct hfr_arena *a, int local) {
  a->local = local;
  struct hfr_rank_ctrl *c = &a->ctrl[local];
  uint8_t nonce[16];
  hfr_random(nonce, sizeof nonce);
  int n = snprintf(c->bell_name, sizeof c->bell_name, "hfr-bell-");
  for (int i = 0; i < 16; i++) n += snprintf(c->bell_name + n, sizeof c->bell_name - (size_t)n, "%02x", nonce[i]);
  a->bell_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  struct sockaddr_un addr = {.sun_family = AF_UNIX};
  memcpy(addr.sun_path + 1, c->bell_name, (size_t)n);
  if (a->bell_fd < 0 ||
      bind(a->bell_fd, (struct sockaddr *)&addr, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n)))
    return hfr_fail(hfreduceSystemError, "cannot open the wake-up socket: %s", hfr_errno_text(errno));
  return hfreduceSuccess;
}

#ifndef MADV_POPULATE_WRITE /* Linux 5.14 */
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

static void populate(const struct hfr_arena *a, int local, int what, int advice) {
  /* On an older kernel, and where memory is short, each page comes when it is touched. */
  if (what & HFR_WARM_IN) (void)!madvise(hfr_arena_in(a, local, 0), (size_t)a->slots * a->chunk, advice);
  if (what & HFR_WARM_RES) (void)!madvise(hfr_arena_res(a, local, 0), (size_t)a->slots * a->chunk, advice);
}

void hfr_arena_warm_up(struct hfr_arena *a, int what) {
  a->warm |= what;
  a->warmed = 1;
  if (a->nlocal == 1 || (what == HFR_WARM_RES && a->nlocal > HFR_WARM_RANKS)) return;
  populate(a, a->local, what, MADV_POPULATE_WRITE);
  atomic_fetch_or_explicit(&a->ctrl[a->local].warm, (uint32_t)what, memory_order_release);
}

/* Only what its owner has made: to look at a page makes it too, and it is to lie where the owner runs. */
void hfr_arena_map_warm(struct hfr_arena *a) {
  a->warmed = 0;
  for (int i = 0; i < a->nlocal && a->nlocal <= HFR_WARM_RANKS; i++) {
    int what = (int)atomic_load_explicit(&a->ctrl[i].warm, memory_order_acquire) & ~a->mapped[i];
    if (i == a->local || !what) continue;
    populate(a, i, what, MADV_POPULATE_READ);
    a->mapped[i] |= (uint8_t)what;
  }
}

static void rest(uint8_t *from, uint8_t *to) {
  if (from < to) madvise(from, (size_t)(to - from), MADV_DONTNEED);
}

void hfr_arena_rest(struct hfr_arena *a) {
  uint8_t *end = a->map + a->bytes, *mine = a->lend ? hfr_arena_lending(a, a->local) : end;
  rest(a->data, mine);
  rest(mine + a->lend, end);
}

void hfr_arena_close(struct hfr_arena *a) {
  hfr_arena_after_fork(a);
  if (!a->map) return;
  uint8_t *mine = a->left && a->lend ? hfr_arena_lending(a, a->local) : NULL;
  hfr_node_unmap(a->map, a->bytes, mine, mine ? mine + a->lend : NULL);
  a->map = NULL;
}

void hfr_arena_after_fork(struct hfr_arena *a) {
  if (a->fd >= 0) close(a->fd);
  if (a->bell_fd >= 0) close(a->bell_fd);
  a->fd = a->bell_fd = -1;
}

void hfr_arena_ring(struct hfr_arena *a, int target) {
  struct hfr_rank_ctrl *c = &a->ctrl[target];
  atomic_fetch_add_explicit(&c->bell, 1, memory_order_seq_cst);
  uint32_t how = atomic_load_explicit(&c->sleeping, memory_order_seq_cst);
  if (how == HFR_SLEEP_FUTEX) {
    hfr_futex_wake(&c->bell, 1);
  } else if (how == HFR_SLEEP_POLL) {
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    char name[sizeof c->bell_name];
    memcpy(name, c->bell_name, sizeof name);
    size_t n = strnlen(name, sizeof name - 1);
    memcpy(addr.sun_path + 1, name, n);
    /* A full queue means that it is rung already; a missing socket that the rank has gone. */
    (void)!sendto(a->bell_fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL, (struct sockaddr *)&addr,
                  (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + n));
  }
}

void hfr_arena_wake_waiters(struct hfr_arena *a) {
  uint64_t mask = atomic_exchange_explicit(&a->ctrl[a->local].waiters, 0, memory_order_seq_cst);
  for (int r = 0; r < a->nlocal; r++)
    if (r != a->local && (mask >> (r % 64) & 1)) hfr_arena_ring(a, r);
}

uint32_t hfr_arena_sleep_begin(struct hfr_arena *a, enum hfr_sleep how) {
  struct hfr_rank_ctrl *me = &a->ctrl[a->local];
  uint32_t bell = atomic_load_explicit(&me->bell, memory_order_seq_cst);
  atomic_store_explicit(&me->sleeping, how, memory_order_seq_cst);
  for (int r = 0; r < a->nlocal; r++)
    if (r != a->local) atomic_fetch_or_explicit(&a->ctrl[r].waiters, 1ull << (a->local % 64), memory_order_seq_cst);
  /* Pairs with hfr_arena_notify: either the publisher sees our bit, or we see its counter in the look that follows. */
  atomic_thread_fence(memory_order_seq_cst);
  return bell;
}

void hfr_arena_sleep_futex(struct hfr_arena *a, uint32_t bell, int64_t timeout_ns) {
  hfr_futex_wait(&a->ctrl[a->local].bell, bell, timeout_ns);
}

void hfr_arena_sleep_end(struct hfr_arena *a) {
  struct hfr_rank_ctrl *me = &a->ctrl[a->local];
  uint32_t how = atomic_exchange_explicit(&me->sleeping, HFR_AWAKE, memory_order_seq_cst);
  char drain[64];
  if (how == HFR_SLEEP_POLL)
    while (recv(a->bell_fd, drain, sizeof drain, MSG_DONTWAIT) >= 0) {
    }
}
