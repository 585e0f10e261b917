/* What the processes share, and how a send becomes a write, a receive and completions. */
#include "fabric.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x31656b6166736276ull
enum { LOST = -1, NOT_READY = -2 };

struct fake_fabric *fake_fabric;
struct fake_process fake_mine;

_Noreturn void fake_die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "fake verbs, process %d: ", (int)getpid());
  vfprintf(stderr, format, args);
  fputc('\n', stderr);
  va_end(args);
  _exit(98);
}

int64_t fake_now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

int fake_alive(pid_t pid) { return pid && (pid == fake_mine.pid || !kill(pid, 0) || errno != ESRCH); }

/* ---------------------------------------------------------------- the shared file */

const char *fake_directory(void) {
  const char *directory = getenv("HFREDUCE_TEST_SYSFS");
  return directory ? directory : "";
}

static unsigned long fabric_id; /* tells it from others on the machine */

static struct fake_fabric *map(void) {
  char path[300];
  snprintf(path, sizeof path, "%.280s/.fabric", fake_directory());
  int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return NULL;
  struct stat s;
  flock(fd, LOCK_EX);
  if (fstat(fd, &s) || (!s.st_size && ftruncate(fd, sizeof *fake_fabric))) return close(fd), NULL;
  struct fake_fabric *f = mmap(NULL, sizeof *f, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (f == MAP_FAILED) return close(fd), NULL;
  if (f->magic != MAGIC) {
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST); /* processes are killed */
    pthread_mutex_init(&f->lock, &attr);
    f->magic = MAGIC;
  }
  fabric_id = (unsigned long)s.st_ino;
  flock(fd, LOCK_UN); /* closing would not: the mapping keeps the file open */
  close(fd);
  return f;
}

static pthread_once_t once = PTHREAD_ONCE_INIT;
static void map_once(void) { fake_fabric = map(); }

struct fake_fabric *fake_lock(void) {
  pthread_once(&once, map_once);
  if (!fake_fabric) return errno = ENODEV, NULL;
  if (pthread_mutex_lock(&fake_fabric->lock) == EOWNERDEAD) pthread_mutex_consistent(&fake_fabric->lock);
  if (fake_mine.pid != getpid()) {
    memset(&fake_mine, 0, sizeof fake_mine); /* a fork: what there was is the parent's */
    fake_mine.pid = getpid();
    fake_script_read(getenv("FAKE_VERBS"));
  }
  return fake_fabric;
}

void fake_unlock(void) { pthread_mutex_unlock(&fake_fabric->lock); }

int fake_device_of(const struct hfr_ib_context *context) { return ((const struct fake_context *)context)->device; }

int fake_fails(const char *call, int device) {
  if (!fake_lock()) return errno;
  int error = fake_mine.dead[device] ? EIO : fake_script_call(call);
  if (error) fake_unlock();
  return errno = error;
}

int fake_free_entry(void *table, size_t size, int n) {
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < n; i++) {
      pid_t *pid = (pid_t *)((char *)table + (size_t)i * size);
      if (!*pid || (pass && !fake_alive(*pid))) return i;
    }
  errno = ENOMEM;
  return -1;
}

/* ---------------------------------------------------------------- waking */

static socklen_t address_of(const char *name, struct sockaddr_un *a) {
  *a = (struct sockaddr_un){.sun_family = AF_UNIX};
  snprintf(a->sun_path + 1, sizeof a->sun_path - 1, "%s", name);
  return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
}

int fake_listen(const char *name) {
  struct sockaddr_un a;
  socklen_t bytes = address_of(name, &a);
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd >= 0 && !bind(fd, (struct sockaddr *)&a, bytes)) return fd;
  if (fd >= 0) close(fd);
  return -1;
}

void fake_tell(const char *name, const void *what, size_t bytes) {
  struct sockaddr_un a;
  socklen_t length = address_of(name, &a);
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) fake_die("no socket: %s", strerror(errno));
  sendto(fd, what, bytes, MSG_DONTWAIT | MSG_NOSIGNAL, (struct sockaddr *)&a, length);
  close(fd);
}

void fake_channel_name(uint32_t id, char name[64]) { snprintf(name, 64, "fake-verbs-%lx-channel-%u", fabric_id, id); }
static void async_name(pid_t pid, int device, char name[64]) {
  snprintf(name, 64, "fake-verbs-%lx-async-%d-%d", fabric_id, (int)pid, device);
}

void fake_event(const struct fake_pair *p, int type) {
  char name[64];
  uint32_t what[2] = {(uint32_t)type, p->qp_num};
  async_name(p->pid, p->device, name);
  fake_tell(name, what, sizeof what);
}

int fake_async_listen(int device) {
  char name[64];
  async_name(getpid(), device, name);
  return fake_listen(name);
}

/* ---------------------------------------------------------------- completions */

void fake_complete(struct fake_pair *p, int recv, const struct hfr_ib_wc *wc, uint32_t retired) {
  struct fake_completions *cq = &fake_fabric->cq[recv ? p->recv_cq : p->send_cq];
  int64_t *last = recv ? &p->recv_visible_ns : &p->send_visible_ns, delay = fake_script_delay_ns();
  if (cq->count == cq->capacity) fake_die("a completion queue of %u is overrun", cq->capacity);
  int64_t visible = delay ? fake_now_ns() + delay : 0;
  if (visible > *last) *last = visible;
  cq->entry[cq->count++] = (struct fake_completion){*wc, *last, retired, recv};
  if (!cq->armed || !cq->channel) return;
  char name[64];
  cq->armed = 0;
  fake_channel_name(cq->channel, name);
  fake_tell(name, &cq->id, sizeof cq->id);
}

void fake_break(struct fake_pair *p) {
  p->state = HFR_IB_QPS_ERR;
  if (p->recv_visible_ns < p->send_visible_ns) p->recv_visible_ns = p->send_visible_ns; /* the cause comes first */
  for (; p->rq_count; p->rq_count--, p->rq_first++) {
    struct hfr_ib_wc wc = {
        .wr_id = p->rq_id[p->rq_first % FAKE_RQ], .status = HFR_IB_WC_WR_FLUSH_ERR, .qp_num = p->qp_num, .vendor_err = 0xfa};
    fake_complete(p, 1, &wc, 0);
  }
}

/* ---------------------------------------------------------------- delivery */

void fake_gid(int device, int index, union hfr_ib_gid *gid) {
  int infiniband = fake_script_link_layer(device) == HFR_IB_LINK_LAYER_INFINIBAND;
  memset(gid, 0, sizeof *gid);
  if (infiniband && index) return; /* its table has one */
  if (index) {
    gid->raw[10] = gid->raw[11] = 0xff;
    gid->raw[12] = 127;
    gid->raw[15] = (uint8_t)(1 + device);
  } else {
    gid->raw[0] = 0xfe;
    gid->raw[1] = 0x80;
    gid->raw[7] = (uint8_t)(infiniband ? fake_script_subnet(device) : 0);
    gid->raw[15] = (uint8_t)(0x10 + device);
  }
}

/* Do packets that p sends come to the device? */
static int reaches(const struct fake_pair *p, int device) {
  static const union hfr_ib_gid none;
  union hfr_ib_gid each;
  if (fake_script_link_layer(p->device) != fake_script_link_layer(device)) return 0;
  if (!p->global) return p->dlid == (uint32_t)device + 1 && fake_script_subnet(p->device) == fake_script_subnet(device);
  for (int i = 0; i < 2; i++) {
    fake_gid(device, i, &each);
    if (!memcmp(&each, &p->dgid, sizeof each)) return memcmp(&each, &none, sizeof none) != 0;
  }
  return 0;
}

/* Whom p's packets reach, if it takes them as p's. */
static struct fake_pair *peer_of(const struct fake_pair *p) {
  struct fake_pair *o = &fake_fabric->pair[p->dest % FAKE_QPS];
  int fits = o->qp_num == p->dest && o->dest == p->qp_num && o->rq_psn == p->sq_psn && reaches(p, o->device) &&
             (o->state == HFR_IB_QPS_RTR || o->state == HFR_IB_QPS_RTS) && !o->port_down && fake_alive(o->pid);
  return fits ? o : NULL;
}

static int allowed(pid_t pid, uint32_t pd, uint32_t key, uint64_t at, uint64_t bytes, int access) {
  const struct fake_region *r = &fake_fabric->region[(key >> 8) % FAKE_MRS];
  return r->pid == pid && r->key == key && r->pd == pd && (r->access & access) == access && at >= r->begin && bytes <= r->bytes &&
         at - r->begin <= r->bytes - bytes;
}

/* Execute a send: its status, or why it has to wait. */
static int deliver(struct fake_qp *q, struct fake_pair *p, const struct fake_send *s) {
  struct iovec local[FAKE_SGE], remote = {(void *)(uintptr_t)s->remote, 0};
  if (p->state == HFR_IB_QPS_ERR) return HFR_IB_WC_WR_FLUSH_ERR;
  int status = fake_script_send_status(s->number);
  if (status) return status;
  for (int i = 0; i < s->nsge; i++) {
    local[i] = (struct iovec){(void *)(uintptr_t)s->sge[i].addr, s->sge[i].length};
    remote.iov_len += s->sge[i].length;
    if (s->flags & HFR_IB_SEND_INLINE) continue;
    if (!allowed(p->pid, p->pd, s->sge[i].lkey, s->sge[i].addr, s->sge[i].length, 0)) return HFR_IB_WC_LOC_PROT_ERR;
  }
  if (s->flags & HFR_IB_SEND_INLINE) local[0] = (struct iovec){(void *)s->data, remote.iov_len};
  struct fake_pair *o = p->port_down ? NULL : peer_of(p);
  if (!o) return LOST;
  if (remote.iov_len && (!(o->access & HFR_IB_ACCESS_REMOTE_WRITE) ||
                         !allowed(o->pid, o->pd, s->rkey, s->remote, remote.iov_len, HFR_IB_ACCESS_REMOTE_WRITE))) {
    fake_event(o, 3); /* IBV_EVENT_QP_ACCESS_ERR */
    fake_break(o);
    return HFR_IB_WC_REM_ACCESS_ERR;
  }
  int pieces = s->flags & HFR_IB_SEND_INLINE ? 1 : s->nsge;
  if (remote.iov_len && process_vm_writev(o->pid, local, (unsigned long)pieces, &remote, 1, 0) != (ssize_t)remote.iov_len) {
    if (errno == ESRCH) return LOST;
    if (errno == EPERM) fake_die("process_vm_writev is not permitted here");
    return HFR_IB_WC_LOC_PROT_ERR;
  }
  if (s->opcode == HFR_IB_WR_RDMA_WRITE_WITH_IMM) {
    if (!o->rq_count) return NOT_READY;
    struct hfr_ib_wc wc = {.wr_id = o->rq_id[o->rq_first % FAKE_RQ],
                           .opcode = HFR_IB_WC_RECV_RDMA_WITH_IMM,
                           .byte_len = (uint32_t)remote.iov_len,
                           .imm_data = s->imm,
                           .qp_num = o->qp_num,
                           .src_qp = p->qp_num,
                           .wc_flags = HFR_IB_WC_WITH_IMM};
    o->rq_first++;
    o->rq_count--;
    fake_complete(o, 1, &wc, 0);
  }
  fake_fabric->writes++;
  fake_fabric->bytes += remote.iov_len;
  (void)q;
  return HFR_IB_WC_SUCCESS;
}

/* The status of a send that could not be delivered so far; 0: it is tried again. */
static int given_up(struct fake_qp *q, int why) {
  int64_t now = fake_now_ns();
  if (!q->stalled_ns) q->stalled_ns = now;
  if (why == LOST) return now - q->stalled_ns > q->retry_ns ? HFR_IB_WC_RETRY_EXC_ERR : 0;
  return q->rnr_retry != 7 && now - q->stalled_ns > q->rnr_ns ? HFR_IB_WC_RNR_RETRY_EXC_ERR : 0; /* 7: for ever */
}

/* What the script wants to happen before a send. */
static void happen(struct fake_pair *p, int type) {
  int device = p->device;
  if (type == 10 || type == 9) fake_mine.port_down[device] = type == 10; /* IBV_EVENT_PORT_ERR, PORT_ACTIVE */
  int64_t flap = type == 10 ? fake_script_flap_ns() : 0;
  fake_mine.port_up_ns[device] = flap ? fake_now_ns() + flap : 0;
  if (type == 8) fake_mine.dead[device] = 1; /* IBV_EVENT_DEVICE_FATAL */
  fake_event(p, type);
  for (int i = 0; i < FAKE_QPS; i++) {
    struct fake_pair *each = &fake_fabric->pair[i];
    if (each->pid != fake_mine.pid || each->device != device) continue;
    each->port_down = fake_mine.port_down[device];
    if (fake_mine.dead[device] && each->state != HFR_IB_QPS_ERR) fake_break(each);
  }
}

void fake_pump(struct fake_qp *q) {
  struct fake_pair *p = &fake_fabric->pair[q->index];
  int64_t up = fake_mine.port_up_ns[p->device];
  if (up && fake_now_ns() > up) happen(p, 9);
  for (; q->executed != q->posted; q->executed++) {
    const struct fake_send *s = &q->ring[q->executed % q->max_send];
    int event = q->stalled_ns ? -1 : fake_script_event(s->number);
    if (event >= 0) happen(p, event);
    int status = deliver(q, p, s);
    if (status < 0 && !(status = given_up(q, status))) return;
    q->stalled_ns = 0;
    struct hfr_ib_wc wc = {.wr_id = s->id, .status = status, .opcode = HFR_IB_WC_RDMA_WRITE, .qp_num = p->qp_num};
    if (status) wc.vendor_err = 0xfa;
    if (status || q->sq_sig_all || s->flags & HFR_IB_SEND_SIGNALED) fake_complete(p, 0, &wc, q->executed + 1);
    if (status && p->state != HFR_IB_QPS_ERR) fake_break(p);
  }
}
