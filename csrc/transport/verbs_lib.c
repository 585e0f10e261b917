/* Finding libibverbs, its devices and their ports. */
#include "verbs_lib.h"
#include "verbs.h"

#include "../base/log.h"
#include "../base/param.h"
#include "../base/thread.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define SYSFS "/sys/class/infiniband"
#define DEVICES_MAX 64
#define PROBE_BYTES ((size_t)4 << 20)   /* about what a connection registers */
#define ENOUGH_BYTES ((size_t)32 << 20) /* and a small communicator, with its arena */

/* ---------------------------------------------------------------- the library */

static struct hfr_ib ib;
static char absent[200];
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* Tests put a directory of their own in the kernel's place. */
static const char *sysfs(void) {
  const char *other = getenv("HFREDUCE_TEST_SYSFS");
  return other && *other ? other : SYSFS;
}

static int no_devices(void) {
  DIR *directory = opendir(sysfs());
  int found = 0;
  for (struct dirent *entry; directory && (entry = readdir(directory));) found |= entry->d_name[0] != '.';
  if (directory) closedir(directory);
  return !found;
}

static void load(void) {
  void *library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char *error = dlerror();
    snprintf(absent, sizeof absent, "libibverbs.so.1 is not installed (%.120s)", error ? error : "?");
    return;
  }
#define FIND(name, version, result, parameters)                                   \
  if (!(*(void **)&ib.name = dlvsym(library, "ibv_" #name, version)) && !*absent) \
    snprintf(absent, sizeof absent, "libibverbs.so.1 has no ibv_" #name " (%s): it is too old", version);
  HFR_IB_FUNCTIONS(FIND)
#undef FIND
  *(void **)&ib.reg_mr_iova2 = dlvsym(library, "ibv_reg_mr_iova2", "IBVERBS_1.8");
  *(void **)&ib.is_fork_initialized = dlvsym(library, "ibv_is_fork_initialized", "IBVERBS_1.13");
  if (*absent) return;
  /* Where the kernel copies registered pages for a child, nothing is to be done; ibv_fork_init would still take them from the
   * child. */
  if (ib.is_fork_initialized && ib.is_fork_initialized() == HFR_IB_FORK_UNNEEDED) return;
  /* Before anything is registered; else a child's first write moves the pages under the device. */
  int error = ib.fork_init();
  if (error) HFR_INFO("ibv_fork_init: %s; forking with RDMA in use may corrupt its data", strerror(error));
}

const struct hfr_ib *hfr_ib_load(const char **why) {
  pthread_once(&once, load);
  *why = absent;
  return *absent ? NULL : &ib;
}

/* ---------------------------------------------------------------- sysfs */

/* First line of an attribute; 0 when it cannot be read. */
static int attribute(char *text, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));
static int attribute(char *text, size_t size, const char *format, ...) {
  char path[300];
  va_list args;
  va_start(args, format);
  vsnprintf(path, sizeof path, format, args);
  va_end(args);
  FILE *file = fopen(path, "re");
  int got = file && fgets(text, (int)size, file);
  if (file) fclose(file);
  if (!got) return *text = 0;
  text[strcspn(text, "\n")] = 0;
  return 1;
}

static int in_cpu_list(const char *list, int cpu) {
  for (const char *p = list; *p;) {
    char *end;
    long first = strtol(p, &end, 10), last = first;
    if (end == p) return 0;
    if (*end == '-') last = strtol(end + 1, &end, 10);
    if (cpu >= first && cpu <= last) return 1;
    p = end + (*end == ',');
  }
  return 0;
}

/* The NUMA node on which this process may run; -1: several, or not known. */
static int numa_of_process(void) {
  cpu_set_t set;
  int found = -1;
  if (sched_getaffinity(0, sizeof set, &set)) return -1;
  for (int node = 0; node < 64; node++) {
    char list[1024];
    if (!attribute(list, sizeof list, "/sys/devices/system/node/node%d/cpulist", node)) continue;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
      if (!CPU_ISSET(cpu, &set) || !in_cpu_list(list, cpu)) continue;
      if (found >= 0) return -1;
      found = node;
      break;
    }
  }
  return found;
}

/* As the kernel tells it (10: the same node); 10 too where there is nothing to choose by. */
static int numa_distance(int from, int to) {
  char text[512];
  if (from < 0 || to < 0 || !attribute(text, sizeof text, "/sys/devices/system/node/node%d/distance", from)) return 10;
  char *p = text, *end;
  for (int i = 0;; i++, p = end) {
    long distance = strtol(p, &end, 10);
    if (end == p) return 10;
    if (i == to) return (int)distance;
  }
}

/* ---------------------------------------------------------------- devices */

struct device {
  char name[64];
  struct hfr_ib_device *handle;
  struct hfr_ib_context *context;
  struct hfr_ib_pd *pd;
  struct hfr_ib_context *inherited; /* the parent's, in a forked child: not to be touched */
  struct hfr_ib_pd *inherited_pd;
  int tried, error;
  int lost;            /* it has told that it failed or was removed */
  uint64_t ports_down; /* bit by number */
  int64_t asked_ns;    /* when a port was last asked for its state */
  char memory[200];    /* why nothing can be registered */
  char unable[120];    /* why it has no reliable queue pairs that can be used */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct device devices[DEVICES_MAX];
static int ndevices = -1; /* not looked yet */

static void before_fork(void) { pthread_mutex_lock(&lock); }
static void parent_after_fork(void) { pthread_mutex_unlock(&lock); }
/* The parent's contexts are of no use here: the devices are opened anew. */
static void child_after_fork(void) {
  for (int i = 0; i < ndevices; i++) {
    struct device *d = &devices[i];
    if (d->context) d->inherited = d->context, d->inherited_pd = d->pd;
    d->context = NULL;
    d->pd = NULL;
    d->tried = d->error = d->lost = d->memory[0] = d->unable[0] = 0;
    d->ports_down = 0;
  }
  pthread_mutex_init(&lock, NULL);
}

static void list_devices(void) {
  static struct hfr_ib_device **list; /* never freed: it keeps the devices */
  int count = 0;
  ndevices = 0;
  pthread_atfork(before_fork, parent_after_fork, child_after_fork);
  list = ib.get_device_list(&count);
  for (int i = 0; list && i < count && ndevices < DEVICES_MAX; i++) {
    struct device *d = &devices[ndevices++];
    *d = (struct device){.handle = list[i]};
    snprintf(d->name, sizeof d->name, "%s", ib.get_device_name(list[i]));
  }
}

static void limit_text(char text[40]) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_MEMLOCK, &limit) || limit.rlim_cur == RLIM_INFINITY)
    snprintf(text, 40, "unlimited");
  else
    snprintf(text, 40, "%llu KiB", (unsigned long long)limit.rlim_cur / 1024);
}

static hfreduceResult_t cannot_register(const char *device, size_t bytes, int error) {
  char limit[40];
  limit_text(limit);
  return hfr_fail(hfreduceSystemError, "cannot register %zu bytes with %s: %s; the limit on locked memory is %s%s", bytes, device,
                  strerror(error), limit, strcmp(limit, "unlimited") ? " (raise it: ulimit -l unlimited)" : "");
}

static struct hfr_ib_mr *register_with(struct hfr_ib_pd *pd, void *memory, size_t bytes, int remote) {
  int access = remote ? HFR_IB_ACCESS_LOCAL_WRITE | HFR_IB_ACCESS_REMOTE_WRITE : 0;
  if (hfr_param_int(HFR_PARAM_IB_PCI_RELAXED_ORDERING) && ib.reg_mr_iova2)
    return ib.reg_mr_iova2(pd, memory, bytes, (uintptr_t)memory, (unsigned)access | HFR_IB_ACCESS_RELAXED_ORDERING);
  return ib.reg_mr(pd, memory, bytes, access);
}

struct hfr_ib_mr *hfr_ib_register(const struct hfr_ib_port *port, void *memory, size_t bytes, int remote) {
  struct hfr_ib_mr *mr = register_with(port->pd, memory, bytes, remote);
  if (!mr) cannot_register(port->name, bytes, errno);
  return mr;
}

/* Can a connection's memory be registered? Better found now than in the first operation. */
static void try_memory(struct device *d) {
  struct rlimit limit;
  size_t bytes = PROBE_BYTES, page = (size_t)sysconf(_SC_PAGESIZE);
  /* Where a limit is too low for what is to come, does it hold for this process? With CAP_IPC_LOCK it does not. */
  if (!getrlimit(RLIMIT_MEMLOCK, &limit) && limit.rlim_cur >= bytes && limit.rlim_cur < ENOUGH_BYTES)
    bytes = (size_t)limit.rlim_cur / page * page + page;
  void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return;
  struct hfr_ib_mr *mr = register_with(d->pd, memory, bytes, 1);
  if (mr) {
    ib.dereg_mr(mr);
  } else {
    cannot_register(d->name, bytes, errno);
    snprintf(d->memory, sizeof d->memory, "%.190s", hfr_last_error()->text);
  }
  munmap(memory, bytes);
}

/* Can it connect? Some devices know datagrams only, iWARP ones connect by other means. Better found while there is TCP to fall
 * back to. */
static void try_pair(struct device *d) {
  char type[40];
  if (attribute(type, sizeof type, "%s/%s/node_type", sysfs(), d->name) && atoi(type) != HFR_IB_NODE_CA) {
    snprintf(d->unable, sizeof d->unable, "the device is no channel adapter of InfiniBand or RoCE (node type %s)", type);
    return;
  }
  struct hfr_ib_cq *cq = ib.create_cq(d->context, 2, NULL, NULL, 0);
  struct hfr_ib_qp_init_attr init = {.send_cq = cq, .recv_cq = cq, .cap = {1, 1, 1, 1, 0}, .qp_type = HFR_IB_QPT_RC};
  struct hfr_ib_qp *qp = cq ? ib.create_qp(d->pd, &init) : NULL;
  if (!qp) snprintf(d->unable, sizeof d->unable, "the device makes no reliable queue pair: %s", strerror(errno));
  if (qp) ib.destroy_qp(qp);
  if (cq) ib.destroy_cq(cq);
}

static void open_device(struct device *d) {
  if (d->tried) return;
  d->tried = 1;
  errno = 0;
  d->context = ib.open_device(d->handle);
  if (d->context && !(d->pd = ib.alloc_pd(d->context))) {
    d->error = errno;
    ib.close_device(d->context);
    d->context = NULL;
  }
  if (!d->context && !d->error) d->error = errno;
  if (d->pd) try_memory(d);
  if (d->pd) try_pair(d);
  if (d->pd) fcntl(d->context->async_fd, F_SETFL, fcntl(d->context->async_fd, F_GETFL) | O_NONBLOCK);
}

/* Take what the device has told. Of queue pairs and queues the completions tell as well. */
static void take_events(struct device *d) {
  struct hfr_ib_async_event event;
  while (d->context && !ib.get_async_event(d->context, &event)) {
    uint64_t bit = (uint64_t)1 << (event.element.port_num & 63);
    if (event.event_type == HFR_IB_EVENT_DEVICE_FATAL) d->lost = 1;
    if (event.event_type == HFR_IB_EVENT_PORT_ERR) d->ports_down |= bit;
    if (event.event_type == HFR_IB_EVENT_PORT_ACTIVE) d->ports_down &= ~bit;
    ib.ack_async_event(&event);
  }
}

#define ASK_NS 200000000ll

/* Not every device tells: one whose network interface is deleted may just fall silent. So it is asked now and then. */
static void ask(struct device *d, int number) {
  struct hfr_ib_port_attr attr;
  uint64_t bit = (uint64_t)1 << (number & 63);
  int64_t now = hfr_now_ns();
  if (now - d->asked_ns < ASK_NS) return;
  d->asked_ns = now;
  memset(&attr, 0, sizeof attr);
  if (ib.query_port(d->context, (uint8_t)number, &attr))
    d->lost = 1;
  else if (attr.state == HFR_IB_PORT_ACTIVE)
    d->ports_down &= ~bit;
  else
    d->ports_down |= bit;
}

enum hfr_ib_health hfr_ib_health(const struct hfr_ib_port *port) {
  enum hfr_ib_health health = HFR_IB_WHOLE;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < ndevices; i++) {
    struct device *d = &devices[i];
    if (d->context != port->context) continue;
    take_events(d);
    ask(d, port->number);
    health = d->lost ? HFR_IB_DEVICE_LOST : d->ports_down >> port->number & 1 ? HFR_IB_PORT_LOST : HFR_IB_WHOLE;
  }
  pthread_mutex_unlock(&lock);
  return health;
}

/* ---------------------------------------------------------------- GIDs */

static int is_mapped_ipv4(const union hfr_ib_gid *gid) {
  static const uint8_t prefix[12] = {[10] = 0xff, [11] = 0xff};
  return !memcmp(gid->raw, prefix, sizeof prefix);
}

static void gid_text(const union hfr_ib_gid *gid, char text[48]) {
  if (is_mapped_ipv4(gid))
    inet_ntop(AF_INET, gid->raw + 12, text, 48);
  else
    inet_ntop(AF_INET6, gid->raw, text, 48);
}

/* Read entry i of the port's table; 0 when it is empty. */
static int read_gid(const struct device *d, int port, int i, union hfr_ib_gid *gid, char type[24]) {
  static const union hfr_ib_gid none;
  if (ib.query_gid(d->context, (uint8_t)port, i, gid) || !memcmp(gid, &none, sizeof none)) return 0;
  if (!attribute(type, 24, "%s/%s/ports/%d/gid_attrs/types/%d", sysfs(), d->name, port, i)) snprintf(type, 24, "type unknown");
  return 1;
}

/* RoCE v2 is routed and what switches are set up for; an IPv4 address is what administrators gave. */
static int gid_score(const union hfr_ib_gid *gid, const char *type) {
  int v2 = !strcmp(type, "RoCE v2"), link_local = gid->raw[0] == 0xfe && (gid->raw[1] & 0xc0) == 0x80;
  return 4 * v2 + (is_mapped_ipv4(gid) ? 2 : !link_local);
}

/* InfiniBand has one GID that counts, its first: an index that is meant for RoCE ports is nothing to it. */
static void choose_gid(const struct device *d, struct hfr_ib_port *p) {
  int infiniband = p->attr.link_layer == HFR_IB_LINK_LAYER_INFINIBAND;
  int wanted = infiniband ? 0 : (int)hfr_param_int(HFR_PARAM_IB_GID_INDEX), best = -1, score = -1, limit = p->attr.gid_tbl_len;
  char there[240] = "";
  size_t used = 0;
  union hfr_ib_gid gid;
  char type[24], text[48];
  for (int i = 0; i < limit && i < 1024; i++) {
    if (!read_gid(d, p->number, i, &gid, type)) continue;
    gid_text(&gid, text);
    if (used < sizeof there)
      used += (size_t)snprintf(there + used, sizeof there - used, "%s%d %s (%s)", used ? ", " : "", i, text, type);
    int s = wanted < 0 ? gid_score(&gid, type) : i == wanted;
    if (s <= score || (wanted >= 0 && i != wanted)) continue;
    score = s;
    best = i;
    p->gid = gid;
    memcpy(p->gid_type, type, sizeof type);
    memcpy(p->gid_text, text, sizeof text);
  }
  p->gid_index = best;
  if (best >= 0 || infiniband || *p->why_not) return;
  if (wanted >= 0)
    snprintf(p->why_not, sizeof p->why_not, "HFREDUCE_IB_GID_INDEX is %d; its GIDs: %s", wanted, *there ? there : "none");
  else if (p->attr.link_layer == HFR_IB_LINK_LAYER_ETHERNET)
    snprintf(p->why_not, sizeof p->why_not, "it has no GID: give its network interface an address");
}

/* ---------------------------------------------------------------- ports */

int hfr_ib_match(const char *rule, const char *device, int port) {
  int exclude = *rule == '^';
  rule += exclude;
  int exact = *rule == '=';
  rule += exact;
  if (!*rule) return 1;
  for (int hit; *rule;) {
    size_t bytes = strcspn(rule, ","), name = strcspn(rule, ",:");
    hit = name && !strncmp(device, rule, name) && (!exact || !device[name]);
    if (hit && name < bytes && atoi(rule + name + 1) != port) hit = 0;
    if (hit) return !exclude;
    rule += bytes + (rule[bytes] == ',');
  }
  return exclude;
}

static const char *state_name(int state) {
  static const char *const name[] = {"in no state", "down", "initializing", "armed", "active"};
  return state >= 0 && state <= 4 ? name[state] : "in an unknown state";
}

static void look_at(const struct device *d, struct hfr_ib_port *p) {
  char text[64];
  int pkey = (int)hfr_param_int(HFR_PARAM_IB_PKEY);
  if (attribute(text, sizeof text, "%s/%s/ports/%d/rate", sysfs(), d->name, p->number)) p->gbps = strtod(text, NULL);
  p->soft =
      attribute(text, sizeof text, "%s/%s/node_desc", sysfs(), d->name) && (!strncmp(text, "rxe", 3) || !strncmp(text, "siw", 3));
  p->numa = attribute(text, sizeof text, "%s/%s/device/numa_node", sysfs(), d->name) ? atoi(text) : -1;
  if (!d->context) {
    snprintf(p->why_not, sizeof p->why_not, "cannot open the device: %s", strerror(d->error));
    return;
  }
  p->context = d->context;
  p->pd = d->pd;
  if (d->lost) {
    snprintf(p->why_not, sizeof p->why_not, "the device failed or was removed");
    return;
  }
  int error = ib.query_port(d->context, (uint8_t)p->number, &p->attr);
  if (error)
    snprintf(p->why_not, sizeof p->why_not, "cannot query the port: %s", strerror(error));
  else if (!hfr_ib_match(hfr_param_text(HFR_PARAM_IB_HCA), d->name, p->number))
    snprintf(p->why_not, sizeof p->why_not, "HFREDUCE_IB_HCA=\"%.200s\" leaves it out", hfr_param_text(HFR_PARAM_IB_HCA));
  else if (*d->unable)
    snprintf(p->why_not, sizeof p->why_not, "%s", d->unable);
  else if (p->attr.link_layer != HFR_IB_LINK_LAYER_INFINIBAND && p->attr.link_layer != HFR_IB_LINK_LAYER_ETHERNET)
    snprintf(p->why_not, sizeof p->why_not, "its link layer is neither InfiniBand nor Ethernet");
  else if (p->attr.state != HFR_IB_PORT_ACTIVE)
    snprintf(p->why_not, sizeof p->why_not, "the port is %s", state_name(p->attr.state));
  else if (pkey >= p->attr.pkey_tbl_len)
    snprintf(p->why_not, sizeof p->why_not, "HFREDUCE_IB_PKEY is index %d; its table has %d", pkey, p->attr.pkey_tbl_len);
  else if (*d->memory)
    snprintf(p->why_not, sizeof p->why_not, "%s", d->memory);
  if (!error) choose_gid(d, p);
}

/* Ports are numbered from 1; sysfs lists them. */
static int has_port(const struct device *d, int number) {
  char text[64];
  return attribute(text, sizeof text, "%s/%s/ports/%d/state", sysfs(), d->name, number);
}

/* Is port a worse than b for a process on NUMA node `here`? 0: they are equals. A slow port that is near is still slow. */
static int worse(const struct hfr_ib_port *a, const struct hfr_ib_port *b, int here) {
  if (!*a->why_not != !*b->why_not) return *a->why_not ? 1 : -1;
  if (a->gbps != b->gbps) return a->gbps < b->gbps ? 1 : -1;
  return numa_distance(here, a->numa) - numa_distance(here, b->numa);
}

int hfr_ib_ports(struct hfr_ib_port *ports, int max, const char **why) {
  static const char none[] = "no RDMA devices (" SYSFS " is empty)";
  static const char unknown[] = "libibverbs knows none of the devices in " SYSFS " (is their provider installed?)";
  int n = 0, here = numa_of_process();
  if (no_devices()) { /* most machines: nothing is loaded */
    *why = none;
    return 0;
  }
  if (!hfr_ib_load(why)) return 0;
  pthread_mutex_lock(&lock);
  if (ndevices < 0) list_devices();
  for (int i = 0; i < ndevices; i++) {
    open_device(&devices[i]);
    for (int number = 1; n < max && has_port(&devices[i], number); number++) {
      struct hfr_ib_port p = {.number = number, .gid_index = -1};
      snprintf(p.name, sizeof p.name, "%s:%d", devices[i].name, number);
      look_at(&devices[i], &p);
      int at = n++; /* equals by name: libibverbs lists devices as the kernel found them */
      for (int by; at > 0; at--) {
        if ((by = worse(&ports[at - 1], &p, here)) < 0 || (!by && strverscmp(ports[at - 1].name, p.name) <= 0)) break;
        ports[at] = ports[at - 1];
      }
      ports[at] = p;
    }
  }
  pthread_mutex_unlock(&lock);
  *why = n ? "" : unknown;
  return n;
}

hfreduceResult_t hfr_ib_choose(int place, struct hfr_ib_port *port) {
  struct hfr_ib_port ports[HFR_IB_PORTS_MAX];
  const char *why;
  int n = hfr_ib_ports(ports, HFR_IB_PORTS_MAX, &why), here = numa_of_process(), near = 0;
  if (!n) return hfr_fail(hfreduceSystemError, "%s", why);
  if (*ports[0].why_not) {
    char text[600];
    size_t used = 0;
    for (int i = 0; i < n && used < sizeof text; i++)
      used += (size_t)snprintf(text + used, sizeof text - used, "%s%s: %s", i ? "; " : "", ports[i].name, ports[i].why_not);
    return hfr_fail(hfreduceInvalidUsage, "no RDMA port can be used: %s", text);
  }
  while (near < n && !*ports[near].why_not && !worse(&ports[near], &ports[0], here)) near++;
  *port = ports[place % near];
  return hfreduceSuccess;
}

int hfr_ib_next_port(const struct hfr_ib_port *port, struct hfr_ib_port *next, int *usable) {
  struct hfr_ib_port ports[HFR_IB_PORTS_MAX];
  const char *why;
  int n = hfr_ib_ports(ports, HFR_IB_PORTS_MAX, &why), first = -1, after = -1;
  *usable = 0;
  for (int i = 0; i < n; i++) {
    if (*ports[i].why_not || hfr_ib_health(&ports[i]) != HFR_IB_WHOLE) continue;
    ++*usable;
    if (first < 0 || strcmp(ports[i].name, ports[first].name) < 0) first = i;
    if (strcmp(ports[i].name, port->name) > 0 && (after < 0 || strcmp(ports[i].name, ports[after].name) < 0)) after = i;
  }
  if (*usable) *next = ports[after >= 0 ? after : first];
  return *usable > 0;
}

uint64_t hfr_ib_retries(const struct hfr_ib_port *port) {
  /* What a sender does again: an acknowledgement did not come, one came out of order, the receiver was not ready. */
  static const char *const counter[] = {
      "local_ack_timeout_err", "packet_seq_err",    "implied_nak_seq_err", "rnr_nak_retry_err", /* mlx4, mlx5 */
      "to_retransmits",        "seq_err_naks_rcvd", "rnr_naks_rcvd",                            /* bnxt_re */
      "completer_retry_err",   "rcvd_rnr_err",                                                  /* rxe */
  };
  uint64_t sum = 0;
  char text[32];
  int device = (int)strcspn(port->name, ":");
  for (size_t i = 0; i < sizeof counter / sizeof *counter; i++)
    if (attribute(text, sizeof text, "%s/%.*s/ports/%d/hw_counters/%s", sysfs(), device, port->name, port->number, counter[i]))
      sum += strtoull(text, NULL, 10);
  return sum;
}

static const char *layer_name(int layer) {
  return layer == HFR_IB_LINK_LAYER_INFINIBAND ? "InfiniBand" : layer == HFR_IB_LINK_LAYER_ETHERNET ? "Ethernet" : "link unknown";
}

/* "active, Ethernet, 100 Gb/s, MTU 4096, GID 3 10.0.0.1 (RoCE v2), NUMA node 0" */
static void port_text(const struct hfr_ib_port *p, char *text, size_t size) {
  size_t n = 0;
  if (p->context)
    n = (size_t)snprintf(text, size, "%s, %s, MTU %d", state_name(p->attr.state), layer_name(p->attr.link_layer),
                         p->attr.active_mtu ? 128 << p->attr.active_mtu : 0);
  if (p->gbps > 0 && n < size) n += (size_t)snprintf(text + n, size - n, "%s%g Gb/s", n ? ", " : "", p->gbps);
  if (p->gid_index >= 0 && n < size)
    n += (size_t)snprintf(text + n, size - n, "%sGID %d %s (%s)", n ? ", " : "", p->gid_index, p->gid_text, p->gid_type);
  if (p->numa >= 0 && n < size) n += (size_t)snprintf(text + n, size - n, "%sNUMA node %d", n ? ", " : "", p->numa);
  if (*p->why_not && n < size) snprintf(text + n, size - n, "%snot used: %s", n ? "; " : "", p->why_not);
}

size_t hfr_verbs_describe(char *text, size_t size) {
  struct hfr_ib_port ports[HFR_IB_PORTS_MAX];
  const char *why;
  size_t n = 0;
  int count = hfr_ib_ports(ports, HFR_IB_PORTS_MAX, &why);
  if (!size) return 0;
  *text = 0;
  if (!count)
    n = (size_t)snprintf(text, size, "transport verbs: not usable: %s\n", why);
  else if (*ports[0].why_not)
    n = (size_t)snprintf(text, size, "transport verbs: not usable: no port is, see below\n");
  else
    n = (size_t)snprintf(text, size, "transport verbs: preferred between nodes, on %s\n", ports[0].name);
  for (int i = 0; i < count && n < size; i++) {
    char line[700] = "";
    port_text(&ports[i], line, sizeof line);
    n += (size_t)snprintf(text + n, size - n, "rdma %.*s port %d: %s\n", (int)strcspn(ports[i].name, ":"), ports[i].name,
                          ports[i].number, line);
  }
  return n < size ? n : size - 1;
}
