/*
 * The part of libibverbs' binary interface that the verbs transport uses, declared by us, so that no rdma-core is needed to
 * build.
 *
 * The data path of libibverbs is inline: post_send, post_recv, poll_cq and req_notify_cq are called through the table of the
 * context. So the layouts below are part of its stable interface (IBVERBS_1.1 and later); tests/c/test_verbs_abi.c proves them
 * against the real header. Objects of which nothing is read stay incomplete.
 */
#ifndef HFR_TRANSPORT_VERBS_ABI_H_
#define HFR_TRANSPORT_VERBS_ABI_H_
#include <stddef.h>
#include <stdint.h>

struct hfr_ib_device;
struct hfr_ib_pd;
struct hfr_ib_srq;
struct hfr_ib_qp;
struct hfr_ib_cq;
struct hfr_ib_wc;
struct hfr_ib_send_wr;
struct hfr_ib_recv_wr;

typedef void (*hfr_ib_unused)(void);

/* Begins with the table; 32 slots, of which four are ours. */
struct hfr_ib_context {
  struct hfr_ib_device *device;
  hfr_ib_unused unused0[11];
  int (*poll_cq)(struct hfr_ib_cq *cq, int num_entries, struct hfr_ib_wc *wc);
  int (*req_notify_cq)(struct hfr_ib_cq *cq, int solicited_only);
  hfr_ib_unused unused1[12];
  int (*post_send)(struct hfr_ib_qp *qp, struct hfr_ib_send_wr *wr, struct hfr_ib_send_wr **bad);
  int (*post_recv)(struct hfr_ib_qp *qp, struct hfr_ib_recv_wr *wr, struct hfr_ib_recv_wr **bad);
  hfr_ib_unused unused2[5];
  int cmd_fd;
  int async_fd;
  int num_comp_vectors;
};

union hfr_ib_gid {
  uint8_t raw[16];
  struct {
    uint64_t subnet_prefix, interface_id;
  } global;
};

struct hfr_ib_port_attr {
  int state, max_mtu, active_mtu; /* enums */
  int gid_tbl_len;
  uint32_t port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr;
  uint16_t pkey_tbl_len, lid, sm_lid;
  uint8_t lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply, active_width, active_speed, phys_state, link_layer, flags;
  uint16_t port_cap_flags2;
};
enum { HFR_IB_PORT_DOWN = 1, HFR_IB_PORT_INIT, HFR_IB_PORT_ARMED, HFR_IB_PORT_ACTIVE };
enum { HFR_IB_PORT_GRH_REQUIRED = 1 }; /* of flags */
enum { HFR_IB_LINK_LAYER_UNSPECIFIED, HFR_IB_LINK_LAYER_INFINIBAND, HFR_IB_LINK_LAYER_ETHERNET };
enum { HFR_IB_MTU_256 = 1, HFR_IB_MTU_512, HFR_IB_MTU_1024, HFR_IB_MTU_2048, HFR_IB_MTU_4096 };

struct hfr_ib_mr {
  struct hfr_ib_context *context;
  struct hfr_ib_pd *pd;
  void *addr;
  size_t length;
  uint32_t handle, lkey, rkey;
};
enum { HFR_IB_ACCESS_LOCAL_WRITE = 1, HFR_IB_ACCESS_REMOTE_WRITE = 2, HFR_IB_ACCESS_RELAXED_ORDERING = 1 << 20 };

struct hfr_ib_comp_channel {
  struct hfr_ib_context *context;
  int fd, refcnt;
};

/* Heads of objects that libibverbs makes; more follows. */
struct hfr_ib_cq {
  struct hfr_ib_context *context;
};
struct hfr_ib_qp {
  struct hfr_ib_context *context;
  void *qp_context;
  struct hfr_ib_pd *pd;
  struct hfr_ib_cq *send_cq, *recv_cq;
  struct hfr_ib_srq *srq;
  uint32_t handle, qp_num;
};

struct hfr_ib_qp_cap {
  uint32_t max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data;
};
struct hfr_ib_qp_init_attr {
  void *qp_context;
  struct hfr_ib_cq *send_cq, *recv_cq;
  struct hfr_ib_srq *srq;
  struct hfr_ib_qp_cap cap;
  int qp_type; /* enum */
  int sq_sig_all;
};
enum { HFR_IB_QPT_RC = 2 };

struct hfr_ib_async_event {
  union {
    void *object;
    int port_num;
  } element;
  int event_type; /* enum */
};
enum { HFR_IB_EVENT_DEVICE_FATAL = 8, HFR_IB_EVENT_PORT_ACTIVE = 9, HFR_IB_EVENT_PORT_ERR = 10 };
enum { HFR_IB_FORK_UNNEEDED = 2 };
enum { HFR_IB_NODE_CA = 1 };

struct hfr_ib_global_route {
  union hfr_ib_gid dgid;
  uint32_t flow_label;
  uint8_t sgid_index, hop_limit, traffic_class;
};
struct hfr_ib_ah_attr {
  struct hfr_ib_global_route grh;
  uint16_t dlid;
  uint8_t sl, src_path_bits, static_rate, is_global, port_num;
};
struct hfr_ib_qp_attr {
  int qp_state, cur_qp_state, path_mtu, path_mig_state; /* enums */
  uint32_t qkey, rq_psn, sq_psn, dest_qp_num;
  unsigned qp_access_flags;
  struct hfr_ib_qp_cap cap;
  struct hfr_ib_ah_attr ah_attr, alt_ah_attr;
  uint16_t pkey_index, alt_pkey_index;
  uint8_t en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt,
      rnr_retry, alt_port_num, alt_timeout;
  uint32_t rate_limit;
};
enum { HFR_IB_QPS_RESET, HFR_IB_QPS_INIT, HFR_IB_QPS_RTR, HFR_IB_QPS_RTS, HFR_IB_QPS_SQD, HFR_IB_QPS_SQE, HFR_IB_QPS_ERR };
enum {
  HFR_IB_QP_STATE = 1 << 0,
  HFR_IB_QP_ACCESS_FLAGS = 1 << 3,
  HFR_IB_QP_PKEY_INDEX = 1 << 4,
  HFR_IB_QP_PORT = 1 << 5,
  HFR_IB_QP_AV = 1 << 7,
  HFR_IB_QP_PATH_MTU = 1 << 8,
  HFR_IB_QP_TIMEOUT = 1 << 9,
  HFR_IB_QP_RETRY_CNT = 1 << 10,
  HFR_IB_QP_RNR_RETRY = 1 << 11,
  HFR_IB_QP_RQ_PSN = 1 << 12,
  HFR_IB_QP_MAX_QP_RD_ATOMIC = 1 << 13,
  HFR_IB_QP_MIN_RNR_TIMER = 1 << 15,
  HFR_IB_QP_SQ_PSN = 1 << 16,
  HFR_IB_QP_MAX_DEST_RD_ATOMIC = 1 << 17,
  HFR_IB_QP_DEST_QPN = 1 << 20
};

struct hfr_ib_sge {
  uint64_t addr;
  uint32_t length, lkey;
};
struct hfr_ib_recv_wr {
  uint64_t wr_id;
  struct hfr_ib_recv_wr *next;
  struct hfr_ib_sge *sg_list;
  int num_sge;
};
/* Of the unions only what RDMA writes use; the whole has the real one's size. */
struct hfr_ib_send_wr {
  uint64_t wr_id;
  struct hfr_ib_send_wr *next;
  struct hfr_ib_sge *sg_list;
  int num_sge;
  int opcode; /* enum */
  unsigned send_flags;
  uint32_t imm_data; /* network byte order */
  uint64_t remote_addr;
  uint32_t rkey;
  uint32_t unused0[5];
  uint64_t unused1[7];
};
enum { HFR_IB_WR_RDMA_WRITE, HFR_IB_WR_RDMA_WRITE_WITH_IMM };
enum { HFR_IB_SEND_SIGNALED = 1 << 1, HFR_IB_SEND_INLINE = 1 << 3 };

struct hfr_ib_wc {
  uint64_t wr_id;
  int status, opcode; /* enums; opcode is valid on success only */
  uint32_t vendor_err, byte_len;
  uint32_t imm_data; /* network byte order */
  uint32_t qp_num, src_qp;
  unsigned wc_flags;
  uint16_t pkey_index, slid;
  uint8_t sl, dlid_path_bits;
};
enum {
  HFR_IB_WC_SUCCESS,
  HFR_IB_WC_LOC_LEN_ERR,
  HFR_IB_WC_LOC_QP_OP_ERR,
  HFR_IB_WC_LOC_PROT_ERR = 4,
  HFR_IB_WC_WR_FLUSH_ERR,
  HFR_IB_WC_REM_INV_REQ_ERR = 9,
  HFR_IB_WC_REM_ACCESS_ERR,
  HFR_IB_WC_REM_OP_ERR,
  HFR_IB_WC_RETRY_EXC_ERR,
  HFR_IB_WC_RNR_RETRY_EXC_ERR,
  HFR_IB_WC_FATAL_ERR = 19
};
enum { HFR_IB_WC_RDMA_WRITE = 1, HFR_IB_WC_RECV_RDMA_WITH_IMM = 129 };
enum { HFR_IB_WC_WITH_IMM = 1 << 1 };
#endif
