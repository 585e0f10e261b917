/* The calls of libibverbs that the verbs transport uses. */
#include "fabric.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define VECTORS 4
#define STALL_NS 1000000 /* how often a send that cannot be delivered is tried */

struct hfr_ib_device {
  int number;
  char name[16];
};
struct async_event {
  union {
    struct fake_qp *qp;
    int port_num;
  } element;
  int type;
};
static int poll_cq(struct hfr_ib_cq *base, int most, struct hfr_ib_wc *wc);
static int req_notify_cq(struct hfr_ib_cq *base, int solicited_only);

/* ---------------------------------------------------------------- devices */

/* As the real one: it takes registered pages from children, whether the kernel needs that or not. */
static int fork_safe;
int ibv_fork_init(void) { return fork_safe = 1, 0; }
int ibv_is_fork_initialized(void) { return HFR_IB_FORK_UNNEEDED; } /* nothing is pinned */

static void for_children(const void *addr, size_t length, int advice) {
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)addr & ~(page - 1);
  if (fork_safe) madvise((void *)first, ((uintptr_t)addr + length - first + page - 1) & ~(page - 1), advice);
}

struct hfr_ib_device **ibv_get_device_list(int *count) {
  static struct hfr_ib_device devices[FAKE_DEVICES];
  struct hfr_ib_device **list = calloc(FAKE_DEVICES + 1, sizeof *list);
  int n = 0;
  for (int i = 0; list && i < FAKE_DEVICES; i++) {
    char path[300];
    devices[i].number = i;
    snprintf(devices[i].name, sizeof devices[i].name, "fake%d", i);
    snprintf(path, sizeof path, "%.280s/%s", fake_directory(), devices[i].name);
    if (*fake_directory() && !access(path, F_OK)) list[n++] = &devices[i];
  }
  if (count) *count = n;
  return list;
}
void ibv_free_device_list(struct hfr_ib_device **list) { free(list); }
const char *ibv_get_device_name(struct hfr_ib_device *device) { return device->name; }

/* Processes leave nothing behind, but for what is meant to stay: contexts and protection domains. */
static void check_left(void) {
  const struct fake_process *m = &fake_mine;
  if (m->pid != getpid() || !(m->qps | m->cqs | m->regions | m->channels)) return;
  fake_die("left at exit: %d queue pairs, %d completion queues, %d memory regions, %d channels", m->qps, m->cqs, m->regions,
           m->channels);
}

static void begin(void) {
  atexit(check_left);
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY); /* where Yama restricts who may write here */
}

struct hfr_ib_context *ibv_open_device(struct hfr_ib_device *device) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, begin);
  struct fake_context *c = calloc(1, sizeof *c);
  if (!c || fake_fails("open_device", device->number)) return free(c), NULL;
  if (!fake_fabric->said++) fprintf(stderr, "fake verbs: a test double, not RDMA\n");
  c->device = device->number;
  c->base.device = device;
  c->base.poll_cq = poll_cq;
  c->base.req_notify_cq = req_notify_cq;
  c->base.post_send = fake_post_send;
  c->base.post_recv = fake_post_recv;
  c->base.cmd_fd = -1;
  c->base.num_comp_vectors = VECTORS;
  c->base.async_fd = fake_async_listen(c->device);
  fake_mine.port_down[c->device] = fake_script_port_down(c->device);
  fake_mine.context[c->device] = c;
  fake_unlock();
  return &c->base;
}

int ibv_close_device(struct hfr_ib_context *context) {
  close(context->async_fd);
  free(context);
  return 0;
}

/* Other faults than those in the environment, from now on. */
void fake_verbs_script(const char *text) {
  if (!fake_lock()) return;
  fake_script_read(text);
  fake_unlock();
}

int ibv_query_port(struct hfr_ib_context *context, uint8_t port, struct hfr_ib_port_attr *attr) {
  int device = fake_device_of(context);
  if (port != 1) return EINVAL;
  if (fake_fails("query_port", device)) return errno;
  *attr = (struct hfr_ib_port_attr){.state = fake_mine.port_down[device] ? HFR_IB_PORT_DOWN : HFR_IB_PORT_ACTIVE,
                                    .max_mtu = HFR_IB_MTU_4096,
                                    .active_mtu = HFR_IB_MTU_4096,
                                    .gid_tbl_len = 2,
                                    .max_msg_sz = 1u << 30,
                                    .pkey_tbl_len = 1,
                                    .lid = (uint16_t)(device + 1),
                                    .link_layer = (uint8_t)fake_script_link_layer(device),
                                    .flags = fake_script_grh_required(device) ? HFR_IB_PORT_GRH_REQUIRED : 0};
  fake_unlock();
  return 0;
}

int ibv_query_gid(struct hfr_ib_context *context, uint8_t port, int index, union hfr_ib_gid *gid) {
  if (port != 1 || index < 0 || index > 1) return errno = EINVAL, -1;
  if (!fake_lock()) return -1;
  fake_gid(fake_device_of(context), index, gid);
  fake_unlock();
  return 0;
}

/* ---------------------------------------------------------------- asynchronous events */

int ibv_get_async_event(struct hfr_ib_context *context, struct async_event *event) {
  uint32_t what[2];
  if (recv(context->async_fd, what, sizeof what, 0) != sizeof what) return -1; /* waits, unless the descriptor is told not to */
  *event = (struct async_event){.type = (int)what[0]};
  fake_lock();
  struct fake_qp *q = fake_mine.qp[what[1] % FAKE_QPS];
  if (event->type < 8) /* about a queue pair */
    event->element.qp = q;
  else
    event->element.port_num = 1;
  if (q && event->type < 8) q->events++;
  fake_unlock();
  return 0;
}

void ibv_ack_async_event(struct async_event *event) {
  if (event->type < 8 && event->element.qp) event->element.qp->events--;
}

const char *ibv_event_type_str(int type) {
  static const char *const name[] = {"CQ error",
                                     "local work queue catastrophic error",
                                     "invalid request error",
                                     "local access violation",
                                     "communication established",
                                     "send queue drained",
                                     "path migrated",
                                     "path migration error",
                                     "device fatal",
                                     "port active",
                                     "port error"};
  return type >= 0 && type < (int)(sizeof name / sizeof *name) ? name[type] : "unknown";
}

/* ---------------------------------------------------------------- memory */

struct hfr_ib_pd *ibv_alloc_pd(struct hfr_ib_context *context) {
  struct hfr_ib_pd *pd = calloc(1, sizeof *pd);
  if (!pd || fake_fails("alloc_pd", fake_device_of(context))) return free(pd), NULL;
  *pd = (struct hfr_ib_pd){(struct fake_context *)context, ++fake_fabric->ids};
  fake_unlock();
  return pd;
}
int ibv_dealloc_pd(struct hfr_ib_pd *pd) { return free(pd), 0; }

struct hfr_ib_mr *ibv_reg_mr(struct hfr_ib_pd *pd, void *addr, size_t length, int access) {
  struct hfr_ib_mr *mr = calloc(1, sizeof *mr);
  if (!mr || fake_fails("reg_mr", pd->context->device)) return free(mr), NULL;
  int at = fake_free_entry(fake_fabric->region, sizeof *fake_fabric->region, FAKE_MRS);
  if (access & HFR_IB_ACCESS_REMOTE_WRITE && !(access & HFR_IB_ACCESS_LOCAL_WRITE)) errno = EINVAL, at = -1;
  struct rlimit limit = {0};
  if (fake_script_memlock() && !getrlimit(RLIMIT_MEMLOCK, &limit) && fake_mine.pinned + length > limit.rlim_cur)
    errno = ENOMEM, at = -1;
  if (at < 0) return fake_unlock(), free(mr), NULL;
  fake_mine.pinned += length;
  uint32_t key = (uint32_t)at << 8 | (++fake_fabric->ids & 0xff);
  fake_fabric->region[at] = (struct fake_region){fake_mine.pid, key, pd->id, (uintptr_t)addr, length, access};
  *mr = (struct hfr_ib_mr){&pd->context->base, pd, addr, length, (uint32_t)at, key, key};
  fake_mine.regions++;
  fake_unlock();
  for_children(addr, length, MADV_DONTFORK);
  return mr;
}

struct hfr_ib_mr *ibv_reg_mr_iova2(struct hfr_ib_pd *pd, void *addr, size_t length, uint64_t iova, unsigned access) {
  if (iova != (uintptr_t)addr) return errno = EINVAL, NULL;
  return ibv_reg_mr(pd, addr, length, (int)(access & ~(unsigned)HFR_IB_ACCESS_RELAXED_ORDERING));
}

int ibv_dereg_mr(struct hfr_ib_mr *mr) {
  fake_lock();
  struct fake_region *r = &fake_fabric->region[mr->handle];
  if (r->pid != fake_mine.pid || r->key != mr->lkey) fake_die("a memory region is freed that there is not");
  r->pid = 0;
  fake_mine.regions--;
  fake_mine.pinned -= mr->length;
  fake_unlock();
  for_children(mr->addr, mr->length, MADV_DOFORK);
  free(mr);
  return 0;
}

/* ---------------------------------------------------------------- completion channels */

struct hfr_ib_comp_channel *ibv_create_comp_channel(struct hfr_ib_context *context) {
  struct fake_channel *c = calloc(1, sizeof *c);
  char name[64];
  if (!c || fake_fails("create_comp_channel", fake_device_of(context))) return free(c), NULL;
  c->id = ++fake_fabric->ids;
  fake_channel_name(c->id, name);
  c->base.context = context;
  c->base.fd = epoll_create1(EPOLL_CLOEXEC); /* of the socket that others write to, and the timers of late completions */
  c->socket = fake_listen(name);
  struct epoll_event event = {.events = EPOLLIN};
  if (c->base.fd < 0 || c->socket < 0 || epoll_ctl(c->base.fd, EPOLL_CTL_ADD, c->socket, &event))
    fake_die("no channel: %s", strerror(errno));
  fake_mine.channels++;
  fake_unlock();
  return &c->base;
}

int ibv_destroy_comp_channel(struct hfr_ib_comp_channel *base) {
  struct fake_channel *c = (struct fake_channel *)base;
  if (c->cqs) return EBUSY;
  fake_lock();
  fake_mine.channels--;
  fake_unlock();
  close(c->socket);
  close(base->fd);
  free(c);
  return 0;
}

/* Its completion queue that has an event. */
static struct fake_cq *take_event(struct fake_channel *c) {
  uint32_t id = 0;
  uint64_t expired;
  int told = recv(c->socket, &id, sizeof id, MSG_DONTWAIT) == sizeof id;
  for (int i = 0; i < FAKE_CQS; i++) {
    struct fake_cq *cq = fake_mine.cq[i];
    struct fake_completions *shared = &fake_fabric->cq[i];
    if (!cq || cq->channel != c) continue;
    if (told && shared->id == id) return cq;
    if (!told && read(cq->timer, &expired, sizeof expired) == sizeof expired && shared->armed) return shared->armed = 0, cq;
  }
  return NULL;
}

int ibv_get_cq_event(struct hfr_ib_comp_channel *base, struct hfr_ib_cq **cq, void **context) {
  struct fake_channel *c = (struct fake_channel *)base;
  for (;;) {
    fake_lock();
    struct fake_cq *found = take_event(c);
    if (found) found->unacked++;
    fake_unlock();
    if (found) {
      *cq = &found->base;
      *context = found->context;
      return 0;
    }
    if (fcntl(base->fd, F_GETFL) & O_NONBLOCK) return errno = EAGAIN, -1;
    poll(&(struct pollfd){base->fd, POLLIN, 0}, 1, -1);
  }
}

void ibv_ack_cq_events(struct hfr_ib_cq *cq, unsigned count) {
  fake_lock();
  ((struct fake_cq *)cq)->unacked -= (int)count;
  fake_unlock();
}

/* ---------------------------------------------------------------- completion queues */

struct hfr_ib_cq *ibv_create_cq(struct hfr_ib_context *context, int cqe, void *cq_context, struct hfr_ib_comp_channel *channel,
                                int comp_vector) {
  struct fake_cq *cq = calloc(1, sizeof *cq);
  if (!cq || fake_fails("create_cq", fake_device_of(context))) return free(cq), NULL;
  if (channel && fake_script_vector() >= 0 && comp_vector != fake_script_vector())
    fake_die("a completion queue is of vector %d", comp_vector);
  int at = cqe < 1 || cqe > FAKE_CQE || comp_vector < 0 || comp_vector >= VECTORS
               ? (errno = EINVAL, -1)
               : fake_free_entry(fake_fabric->cq, sizeof *fake_fabric->cq, FAKE_CQS);
  if (at < 0) return fake_unlock(), free(cq), NULL;
  struct fake_completions *shared = &fake_fabric->cq[at];
  *cq = (struct fake_cq){
      .base.context = context, .index = at, .timer = -1, .context = cq_context, .channel = (struct fake_channel *)channel};
  shared->pid = fake_mine.pid;
  shared->id = ++fake_fabric->ids;
  shared->capacity = (uint32_t)cqe;
  shared->count = 0;
  shared->armed = 0;
  shared->channel = channel ? cq->channel->id : 0;
  if (channel) {
    struct epoll_event event = {.events = EPOLLIN};
    cq->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (cq->timer < 0 || epoll_ctl(channel->fd, EPOLL_CTL_ADD, cq->timer, &event)) fake_die("no timer: %s", strerror(errno));
    cq->channel->cqs++;
  }
  fake_mine.cq[at] = cq;
  fake_mine.cqs++;
  fake_unlock();
  return &cq->base;
}

int ibv_destroy_cq(struct hfr_ib_cq *base) {
  struct fake_cq *cq = (struct fake_cq *)base;
  if (cq->pairs) return EBUSY;
  if (cq->unacked) fake_die("a completion queue is destroyed with %d events not acknowledged: that never returns", cq->unacked);
  fake_lock();
  fake_fabric->cq[cq->index].pid = 0;
  fake_mine.cq[cq->index] = NULL;
  fake_mine.cqs--;
  if (cq->channel) cq->channel->cqs--;
  fake_unlock();
  if (cq->timer >= 0) close(cq->timer);
  free(cq);
  return 0;
}

/* Sends of the queue pairs that report to cq go on as soon as somebody looks; 1: some still wait. */
static int pump_all(const struct fake_cq *cq) {
  int waiting = 0;
  for (int i = 0, left = fake_mine.qps; left && i < FAKE_QPS; i++) {
    struct fake_qp *q = fake_mine.qp[i];
    if (!q) continue;
    left--;
    if (q->base.send_cq != &cq->base || q->executed == q->posted) continue;
    fake_pump(q);
    waiting |= q->executed != q->posted;
  }
  return waiting;
}

/* A completion leaves its queue. */
static void take(const struct fake_completion *e, struct hfr_ib_wc *wc) {
  struct fake_qp *q = fake_mine.qp[e->wc.qp_num % FAKE_QPS];
  *wc = e->wc;
  if (!e->recv) q->retired = e->retired;
  int status = e->recv && !wc->status ? fake_script_receive_status() : 0;
  if (!status) return;
  wc->status = status;
  if (fake_fabric->pair[q->index].state != HFR_IB_QPS_ERR) fake_break(&fake_fabric->pair[q->index]);
}

static int poll_cq(struct hfr_ib_cq *base, int most, struct hfr_ib_wc *wc) {
  const struct fake_cq *cq = (struct fake_cq *)base;
  struct fake_completions *shared = &fake_fabric->cq[cq->index];
  int n = 0;
  fake_lock();
  pump_all(cq);
  int64_t now = fake_now_ns();
  for (uint32_t i = 0; i < shared->count && n < most;) {
    if (shared->entry[i].visible_ns > now) {
      i++;
      continue;
    }
    struct fake_completion e = shared->entry[i];
    memmove(&shared->entry[i], &shared->entry[i + 1], (--shared->count - i) * sizeof e);
    take(&e, &wc[n++]);
  }
  fake_unlock();
  return n;
}

static int req_notify_cq(struct hfr_ib_cq *base, int solicited_only) {
  const struct fake_cq *cq = (struct fake_cq *)base;
  struct fake_completions *shared = &fake_fabric->cq[cq->index];
  (void)solicited_only;
  fake_lock();
  int64_t now = fake_now_ns(), next = pump_all(cq) ? now + STALL_NS : 0;
  shared->armed = 1;
  for (uint32_t i = 0; i < shared->count; i++) {
    int64_t at = shared->entry[i].visible_ns;
    if (at > now && (!next || at < next)) next = at;
  }
  struct itimerspec when = {.it_value = {next / 1000000000, next % 1000000000}};
  if (cq->timer >= 0) timerfd_settime(cq->timer, TFD_TIMER_ABSTIME, &when, NULL);
  fake_unlock();
  return 0;
}

/* ---------------------------------------------------------------- names */

const char *ibv_wc_status_str(int status) {
  static const char *const name[] = {"success",
                                     "local length error",
                                     "local QP operation error",
                                     "local EE context operation error",
                                     "local protection error",
                                     "Work Request Flushed Error",
                                     "memory management operation error",
                                     "bad response error",
                                     "local access error",
                                     "remote invalid request error",
                                     "remote access error",
                                     "remote operation error",
                                     "transport retry counter exceeded",
                                     "RNR retry counter exceeded",
                                     "local RDD violation error",
                                     "remote invalid RD request",
                                     "aborted error",
                                     "invalid EE context number",
                                     "invalid EE context state",
                                     "fatal error",
                                     "response timeout error",
                                     "general error"};
  return status >= 0 && status < (int)(sizeof name / sizeof *name) ? name[status] : "unknown";
}
