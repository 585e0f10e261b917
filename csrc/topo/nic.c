/* Network interfaces, and the choice of the address that peers are told. */
#include "nic.h"

#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>

#include "../base/param.h"

#define NICS_MAX 128

/* Fill in the address; 0 when it is of no use to a peer: another family, or link-local IPv6, which needs an interface's name
 * beside it. */
static int take_address(const struct sockaddr *system, struct hfr_addr *addr) {
  memset(addr, 0, sizeof *addr);
  if (!system) return 0;
  if (system->sa_family == AF_INET) {
    addr->family = 4;
    memcpy(addr->ip, &((const struct sockaddr_in *)system)->sin_addr, 4);
    return 1;
  }
  if (system->sa_family != AF_INET6) return 0;
  const struct in6_addr *ip = &((const struct sockaddr_in6 *)system)->sin6_addr;
  addr->family = 6;
  memcpy(addr->ip, ip, 16);
  return !IN6_IS_ADDR_LINKLOCAL(ip);
}

int hfr_nic_list(struct hfr_nic *nics, int max) {
  struct ifaddrs *list;
  int count = 0;
  if (getifaddrs(&list)) return 0;
  for (struct ifaddrs *p = list; p && count < max; p = p->ifa_next) {
    struct hfr_nic *nic = &nics[count];
    if (!(p->ifa_flags & IFF_UP) || !take_address(p->ifa_addr, &nic->addr)) continue;
    snprintf(nic->name, sizeof nic->name, "%s", p->ifa_name);
    nic->up = 1;
    nic->loopback = (p->ifa_flags & IFF_LOOPBACK) != 0;
    count++;
  }
  freeifaddrs(list);
  return count;
}

/* Whether the name is in the comma-separated list, or begins with an entry of it. */
static int in_list(const char *list, const char *name, int exact) {
  while (*list) {
    size_t bytes = strcspn(list, ",");
    if (bytes && !strncmp(list, name, bytes) && (!exact || !name[bytes])) return 1;
    list += bytes + (list[bytes] == ',');
  }
  return 0;
}

int hfr_nic_match(const char *rule, const char *name) {
  if (!*rule) return !in_list("lo", name, 1) && !in_list("docker,virbr", name, 0);
  int exclude = *rule == '^';
  rule += exclude;
  int exact = *rule == '=';
  rule += exact;
  return in_list(rule, name, exact) != exclude;
}

/* Does an entry before the i-th have its name? The kernel lists all IPv4 addresses of all interfaces, then all IPv6 ones. */
static int named_before(const struct hfr_nic *nics, int i) {
  for (int j = 0; j < i; j++)
    if (!strcmp(nics[j].name, nics[i].name)) return 1;
  return 0;
}

/* "lo docker0 eth0": each interface once. */
static void name_all(const struct hfr_nic *nics, int count, char *text, size_t size) {
  size_t used = 0;
  snprintf(text, size, "none");
  for (int i = 0; i < count && used < size; i++)
    if (!named_before(nics, i)) used += (size_t)snprintf(text + used, size - used, "%s%s", used ? " " : "", nics[i].name);
}

hfreduceResult_t hfr_nic_choose(struct hfr_addr *addr, char name[32]) {
  struct hfr_nic nics[NICS_MAX];
  int count = hfr_nic_list(nics, NICS_MAX), best = -1, best_score = -1;
  const char *rule = hfr_param_text(HFR_PARAM_SOCKET_IFNAME);
  int family = !strcmp(hfr_param_text(HFR_PARAM_SOCKET_FAMILY), "AF_INET6") ? 6 : 4;
  for (int i = 0; i < count; i++) {
    /* Loopback is the last resort of the preset rule: a machine without a network still runs alone. */
    if (!hfr_nic_match(rule, nics[i].name) && (*rule || !nics[i].loopback)) continue;
    int score = 2 * !nics[i].loopback + (nics[i].addr.family == family);
    if (score > best_score) {
      best = i;
      best_score = score;
    }
  }
  if (best < 0) {
    char all[400];
    name_all(nics, count, all, sizeof all);
    return hfr_fail(hfreduceInvalidUsage,
                    "HFREDUCE_SOCKET_IFNAME=\"%s\" admits no interface that is up and has an address; there are: %s", rule, all);
  }
  *addr = nics[best].addr;
  memcpy(name, nics[best].name, sizeof nics[best].name);
  return hfreduceSuccess;
}
