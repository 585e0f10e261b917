/* Our declarations of libibverbs' interface agree with the real header: all of it is decided while compiling. */
#include "check.h"

#if defined(__has_include)
#if __has_include(<infiniband/verbs.h>)
#define HAVE_VERBS
#endif
#endif

#ifndef HAVE_VERBS

int main(void) {
  printf("skipped: no <infiniband/verbs.h> here (Debian: libibverbs-dev)\n");
  return 77;
}

#else

#include <infiniband/verbs.h>

#include "transport/verbs_abi.h"

#define SAME(condition) _Static_assert(condition, #condition)
#define SIZE(ours, theirs) SAME(sizeof(struct hfr_ib_##ours) == sizeof(struct theirs))
/* A field of one name on both sides; the real one may be called otherwise. */
#define FIELD_AS(type, field, real)                                                 \
  SAME(offsetof(struct hfr_ib_##type, field) == offsetof(struct ibv_##type, real)); \
  SAME(sizeof(((struct hfr_ib_##type *)0)->field) == sizeof(((struct ibv_##type *)0)->real))
#define FIELD(type, field) FIELD_AS(type, field, field)
#define VALUE(name) SAME((int)HFR_IB_##name == (int)IBV_##name)

FIELD(context, device);
FIELD_AS(context, poll_cq, ops.poll_cq);
FIELD_AS(context, req_notify_cq, ops.req_notify_cq);
FIELD_AS(context, post_send, ops.post_send);
FIELD_AS(context, post_recv, ops.post_recv);
FIELD(context, cmd_fd);
FIELD(context, async_fd);
FIELD(context, num_comp_vectors);

SAME(sizeof(union hfr_ib_gid) == sizeof(union ibv_gid));

SIZE(port_attr, ibv_port_attr);
FIELD(port_attr, state);
FIELD(port_attr, active_mtu);
FIELD(port_attr, gid_tbl_len);
FIELD(port_attr, max_msg_sz);
FIELD(port_attr, pkey_tbl_len);
FIELD(port_attr, lid);
FIELD(port_attr, active_width);
FIELD(port_attr, active_speed);
FIELD(port_attr, link_layer);
FIELD(port_attr, flags);
FIELD(port_attr, port_cap_flags2);
#ifdef IBV_QPF_GRH_REQUIRED
SAME((int)HFR_IB_PORT_GRH_REQUIRED == (int)IBV_QPF_GRH_REQUIRED);
#endif
VALUE(PORT_DOWN);
VALUE(PORT_INIT);
VALUE(PORT_ARMED);
VALUE(PORT_ACTIVE);
VALUE(LINK_LAYER_UNSPECIFIED);
VALUE(LINK_LAYER_INFINIBAND);
VALUE(LINK_LAYER_ETHERNET);
VALUE(MTU_256);
VALUE(MTU_512);
VALUE(MTU_1024);
VALUE(MTU_2048);
VALUE(MTU_4096);

SIZE(mr, ibv_mr);
FIELD(mr, addr);
FIELD(mr, length);
FIELD(mr, lkey);
FIELD(mr, rkey);
VALUE(ACCESS_LOCAL_WRITE);
VALUE(ACCESS_REMOTE_WRITE);
VALUE(ACCESS_RELAXED_ORDERING);

SIZE(comp_channel, ibv_comp_channel);
FIELD(comp_channel, fd);

FIELD(cq, context);
FIELD(qp, context);
FIELD(qp, send_cq);
FIELD(qp, recv_cq);
FIELD(qp, qp_num);

SIZE(qp_cap, ibv_qp_cap);
FIELD(qp_cap, max_send_wr);
FIELD(qp_cap, max_recv_wr);
FIELD(qp_cap, max_send_sge);
FIELD(qp_cap, max_recv_sge);
FIELD(qp_cap, max_inline_data);
SIZE(qp_init_attr, ibv_qp_init_attr);
FIELD(qp_init_attr, send_cq);
FIELD(qp_init_attr, recv_cq);
FIELD(qp_init_attr, srq);
FIELD(qp_init_attr, cap);
FIELD(qp_init_attr, qp_type);
FIELD(qp_init_attr, sq_sig_all);
VALUE(QPT_RC);

SIZE(global_route, ibv_global_route);
FIELD(global_route, dgid);
FIELD(global_route, flow_label);
FIELD(global_route, sgid_index);
FIELD(global_route, hop_limit);
FIELD(global_route, traffic_class);
SIZE(ah_attr, ibv_ah_attr);
FIELD(ah_attr, grh);
FIELD(ah_attr, dlid);
FIELD(ah_attr, sl);
FIELD(ah_attr, src_path_bits);
FIELD(ah_attr, static_rate);
FIELD(ah_attr, is_global);
FIELD(ah_attr, port_num);
SIZE(qp_attr, ibv_qp_attr);
FIELD(qp_attr, qp_state);
FIELD(qp_attr, path_mtu);
FIELD(qp_attr, rq_psn);
FIELD(qp_attr, sq_psn);
FIELD(qp_attr, dest_qp_num);
FIELD(qp_attr, qp_access_flags);
FIELD(qp_attr, cap);
FIELD(qp_attr, ah_attr);
FIELD(qp_attr, pkey_index);
FIELD(qp_attr, max_rd_atomic);
FIELD(qp_attr, max_dest_rd_atomic);
FIELD(qp_attr, min_rnr_timer);
FIELD(qp_attr, port_num);
FIELD(qp_attr, timeout);
FIELD(qp_attr, retry_cnt);
FIELD(qp_attr, rnr_retry);
FIELD(qp_attr, rate_limit);
VALUE(QPS_RESET);
VALUE(QPS_INIT);
VALUE(QPS_RTR);
VALUE(QPS_RTS);
VALUE(QPS_ERR);
VALUE(QP_STATE);
VALUE(QP_ACCESS_FLAGS);
VALUE(QP_PKEY_INDEX);
VALUE(QP_PORT);
VALUE(QP_AV);
VALUE(QP_PATH_MTU);
VALUE(QP_TIMEOUT);
VALUE(QP_RETRY_CNT);
VALUE(QP_RNR_RETRY);
VALUE(QP_RQ_PSN);
VALUE(QP_MAX_QP_RD_ATOMIC);
VALUE(QP_MIN_RNR_TIMER);
VALUE(QP_SQ_PSN);
VALUE(QP_MAX_DEST_RD_ATOMIC);
VALUE(QP_DEST_QPN);

SIZE(sge, ibv_sge);
FIELD(sge, addr);
FIELD(sge, length);
FIELD(sge, lkey);
SIZE(recv_wr, ibv_recv_wr);
FIELD(recv_wr, wr_id);
FIELD(recv_wr, next);
FIELD(recv_wr, sg_list);
FIELD(recv_wr, num_sge);
SIZE(send_wr, ibv_send_wr);
FIELD(send_wr, wr_id);
FIELD(send_wr, next);
FIELD(send_wr, sg_list);
FIELD(send_wr, num_sge);
FIELD(send_wr, opcode);
FIELD(send_wr, send_flags);
FIELD(send_wr, imm_data);
FIELD_AS(send_wr, remote_addr, wr.rdma.remote_addr);
FIELD_AS(send_wr, rkey, wr.rdma.rkey);
VALUE(WR_RDMA_WRITE);
VALUE(WR_RDMA_WRITE_WITH_IMM);
VALUE(SEND_SIGNALED);
VALUE(SEND_INLINE);

SIZE(wc, ibv_wc);
FIELD(wc, wr_id);
FIELD(wc, status);
FIELD(wc, opcode);
FIELD(wc, vendor_err);
FIELD(wc, byte_len);
FIELD(wc, imm_data);
FIELD(wc, qp_num);
FIELD(wc, wc_flags);
VALUE(WC_SUCCESS);
VALUE(WC_LOC_LEN_ERR);
VALUE(WC_LOC_QP_OP_ERR);
VALUE(WC_LOC_PROT_ERR);
VALUE(WC_WR_FLUSH_ERR);
VALUE(WC_REM_INV_REQ_ERR);
VALUE(WC_REM_ACCESS_ERR);
VALUE(WC_REM_OP_ERR);
VALUE(WC_RETRY_EXC_ERR);
VALUE(WC_RNR_RETRY_EXC_ERR);
VALUE(WC_FATAL_ERR);
VALUE(WC_RDMA_WRITE);
VALUE(WC_RECV_RDMA_WITH_IMM);
VALUE(WC_WITH_IMM);

SIZE(async_event, ibv_async_event);
FIELD_AS(async_event, element.object, element.cq);
FIELD_AS(async_event, element.port_num, element.port_num);
FIELD(async_event, event_type);
VALUE(EVENT_DEVICE_FATAL);
VALUE(EVENT_PORT_ACTIVE);
VALUE(EVENT_PORT_ERR);
VALUE(FORK_UNNEEDED);
VALUE(NODE_CA);

int main(void) {
  CHECK(sizeof(struct hfr_ib_wc) == sizeof(struct ibv_wc));
  return check_done();
}

#endif
