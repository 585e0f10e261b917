/*
 * libibverbs, found at run time, and the ports that it offers. Loaded once a process; a device stays open until the process ends,
 * and a forked child opens it anew. All functions are thread-safe.
 */
#ifndef HFR_TRANSPORT_VERBS_LIB_H_
#define HFR_TRANSPORT_VERBS_LIB_H_
#include "../base/status.h"
#include "verbs_abi.h"

/* X(name, version of the symbol, result, parameters) */
#define HFR_IB_FUNCTIONS(X)                                                                                              \
  X(fork_init, "IBVERBS_1.1", int, (void))                                                                               \
  X(get_device_list, "IBVERBS_1.1", struct hfr_ib_device **, (int *count))                                               \
  X(get_device_name, "IBVERBS_1.1", const char *, (struct hfr_ib_device * device))                                       \
  X(open_device, "IBVERBS_1.1", struct hfr_ib_context *, (struct hfr_ib_device * device))                                \
  X(close_device, "IBVERBS_1.1", int, (struct hfr_ib_context * context))                                                 \
  X(query_port, "IBVERBS_1.1", int, (struct hfr_ib_context * context, uint8_t port, struct hfr_ib_port_attr * attr))     \
  X(query_gid, "IBVERBS_1.1", int, (struct hfr_ib_context * context, uint8_t port, int index, union hfr_ib_gid *gid))    \
  X(alloc_pd, "IBVERBS_1.1", struct hfr_ib_pd *, (struct hfr_ib_context * context))                                      \
  X(dealloc_pd, "IBVERBS_1.1", int, (struct hfr_ib_pd * pd))                                                             \
  X(reg_mr, "IBVERBS_1.1", struct hfr_ib_mr *, (struct hfr_ib_pd * pd, void *addr, size_t length, int access))           \
  X(dereg_mr, "IBVERBS_1.1", int, (struct hfr_ib_mr * mr))                                                               \
  X(create_comp_channel, "IBVERBS_1.0", struct hfr_ib_comp_channel *, (struct hfr_ib_context * context))                 \
  X(destroy_comp_channel, "IBVERBS_1.0", int, (struct hfr_ib_comp_channel * channel))                                    \
  X(create_cq, "IBVERBS_1.1", struct hfr_ib_cq *,                                                                        \
    (struct hfr_ib_context * context, int cqe, void *cq_context, struct hfr_ib_comp_channel *channel, int comp_vector))  \
  X(destroy_cq, "IBVERBS_1.1", int, (struct hfr_ib_cq * cq))                                                             \
  X(get_cq_event, "IBVERBS_1.1", int, (struct hfr_ib_comp_channel * channel, struct hfr_ib_cq * *cq, void **cq_context)) \
  X(ack_cq_events, "IBVERBS_1.1", void, (struct hfr_ib_cq * cq, unsigned count))                                         \
  X(create_qp, "IBVERBS_1.1", struct hfr_ib_qp *, (struct hfr_ib_pd * pd, struct hfr_ib_qp_init_attr * attr))            \
  X(modify_qp, "IBVERBS_1.1", int, (struct hfr_ib_qp * qp, struct hfr_ib_qp_attr * attr, int mask))                      \
  X(destroy_qp, "IBVERBS_1.1", int, (struct hfr_ib_qp * qp))                                                             \
  X(get_async_event, "IBVERBS_1.1", int, (struct hfr_ib_context * context, struct hfr_ib_async_event * event))           \
  X(ack_async_event, "IBVERBS_1.1", void, (struct hfr_ib_async_event * event))                                           \
  X(wc_status_str, "IBVERBS_1.1", const char *, (int status))

struct hfr_ib {
#define HFR_IB_MEMBER(name, version, result, parameters) result(*name) parameters;
  HFR_IB_FUNCTIONS(HFR_IB_MEMBER)
#undef HFR_IB_MEMBER
  /* Knows optional access flags; NULL before IBVERBS_1.8. */
  struct hfr_ib_mr *(*reg_mr_iova2)(struct hfr_ib_pd *pd, void *addr, size_t length, uint64_t iova, unsigned access);
  /* NULL before IBVERBS_1.13. */
  int (*is_fork_initialized)(void);
};
/* NULL: *why says why there is none; it lives as long as the process. */
const struct hfr_ib *hfr_ib_load(const char **why);

#define HFR_IB_PORTS_MAX 64
struct hfr_ib_port {
  char name[80]; /* "mlx5_0:1" */
  int number;
  struct hfr_ib_context *context; /* NULL if it could not be opened */
  struct hfr_ib_pd *pd;
  struct hfr_ib_port_attr attr;
  int gid_index; /* -1: none is needed, or none was found */
  union hfr_ib_gid gid;
  char gid_text[48], gid_type[24];
  double gbps;       /* 0: not known */
  int numa;          /* -1: not known */
  int soft;          /* the device is a driver on this machine's cores (Soft-RoCE, Soft-iWARP) */
  char why_not[400]; /* "": it can be used */
};
/* The ports of all devices in their present state, those first that can be used, of these the fastest, of equals the nearest to
 * this process' cores; at most max. 0: *why says why there is none. */
int hfr_ib_ports(struct hfr_ib_port *ports, int max, const char **why);
/* The port for the rank at place `place` of its node: the ranks of a node spread over the ports that are as fast and near as the
 * first. */
hfreduceResult_t hfr_ib_choose(int place, struct hfr_ib_port *port);
/* The usable port that comes after this one, by name and round, perhaps itself. *usable: how many there are. 0: none. */
int hfr_ib_next_port(const struct hfr_ib_port *port, struct hfr_ib_port *next, int *usable);
/* What the device has told of this port since it was opened. */
enum hfr_ib_health { HFR_IB_WHOLE, HFR_IB_PORT_LOST, HFR_IB_DEVICE_LOST };
enum hfr_ib_health hfr_ib_health(const struct hfr_ib_port *port);
/* The rule of HFREDUCE_IB_HCA on a port: "mlx5,rxe" = devices whose names begin so; "=mlx5_0:1" = exactly this port; "^..."
 * excludes; "" admits all. */
int hfr_ib_match(const char *rule, const char *device, int port);
/* Messages that the port has sent again, as far as its driver counts them; they only grow. They are of the port: a queue pair
 * does not tell its own. */
uint64_t hfr_ib_retries(const struct hfr_ib_port *port);
/* Register memory that peers write (remote) or that is only sent from. NULL: hfr_last_error(). */
struct hfr_ib_mr *hfr_ib_register(const struct hfr_ib_port *port, void *memory, size_t bytes, int remote);
#endif
