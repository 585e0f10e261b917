/* Network interfaces: which address to listen on. */
#ifndef HFR_TOPO_NIC_H_
#define HFR_TOPO_NIC_H_
#include "../base/socket.h"

struct hfr_nic {
  char name[32];
  struct hfr_addr addr; /* port 0 */
  int up, loopback;
};
/* List interface addresses that are up (getifaddrs), at most max, in the system's order; IPv6 link-local ones are left out.
 * Returns how many. */
int hfr_nic_list(struct hfr_nic *nics, int max);
/* The rule of HFREDUCE_SOCKET_IFNAME on a name: "eth,ib" = starts with one of them; "=eth0" = equals; "^docker" = does not start
   with; "^=eth0" = does not equal. "" admits all but loopback, docker and virbr. */
int hfr_nic_match(const char *rule, const char *name);
/* The address to offer to other hosts: the first admitted one, not loopback if there is any other, of the preferred family if
   there is one. InvalidUsage naming the rule and what exists, when the rule admits none. */
hfreduceResult_t hfr_nic_choose(struct hfr_addr *addr, char name[32]);
#endif
