/* Queue pairs: their states, and what is posted on them. */
#include "fabric.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct hfr_ib_qp *ibv_create_qp(struct hfr_ib_pd *pd, struct hfr_ib_qp_init_attr *attr) {
  struct fake_qp *q = calloc(1, sizeof *q);
  const struct hfr_ib_qp_cap *cap = &attr->cap;
  struct fake_send *ring = calloc(cap->max_send_wr, sizeof *ring);
  if (!q || !ring || fake_fails("create_qp", pd->context->device)) return free(q), free(ring), NULL;
  int at = fake_free_entry(fake_fabric->pair, sizeof *fake_fabric->pair, FAKE_QPS);
  if (attr->qp_type != HFR_IB_QPT_RC || !cap->max_send_wr || cap->max_recv_wr > FAKE_RQ || cap->max_send_sge > FAKE_SGE ||
      cap->max_inline_data > fake_script_inline())
    errno = EINVAL, at = -1;
  if (at < 0) return fake_unlock(), free(q), free(ring), NULL;
  uint32_t number = (++fake_fabric->ids * FAKE_QPS + (uint32_t)at) & 0xffffff;
  *q = (struct fake_qp){.base = {&pd->context->base, attr->qp_context, pd, attr->send_cq, attr->recv_cq, NULL, 0, number},
                        .index = at,
                        .max_send = cap->max_send_wr,
                        .max_sge = cap->max_send_sge,
                        .max_inline = cap->max_inline_data,
                        .sq_sig_all = attr->sq_sig_all,
                        .ring = ring};
  struct fake_pair *p = &fake_fabric->pair[at];
  memset(p, 0, offsetof(struct fake_pair, rq_id));
  p->send_visible_ns = p->recv_visible_ns = 0;
  p->pid = fake_mine.pid;
  p->qp_num = number;
  p->pd = pd->id;
  p->device = pd->context->device;
  p->port_down = fake_mine.port_down[p->device];
  p->send_cq = ((struct fake_cq *)attr->send_cq)->index;
  p->recv_cq = ((struct fake_cq *)attr->recv_cq)->index;
  p->max_recv = cap->max_recv_wr;
  ((struct fake_cq *)attr->send_cq)->pairs++;
  ((struct fake_cq *)attr->recv_cq)->pairs++;
  fake_mine.qp[at] = q;
  fake_mine.qps++;
  fake_unlock();
  return &q->base;
}

static void forget_completions(struct fake_completions *cq, uint32_t number) {
  uint32_t kept = 0;
  for (uint32_t i = 0; i < cq->count; i++)
    if (cq->entry[i].wc.qp_num != number) cq->entry[kept++] = cq->entry[i];
  cq->count = kept;
}

int ibv_destroy_qp(struct hfr_ib_qp *base) {
  struct fake_qp *q = (struct fake_qp *)base;
  if (q->events) fake_die("a queue pair is destroyed with %d events not acknowledged: that never returns", q->events);
  fake_lock();
  struct fake_pair *p = &fake_fabric->pair[q->index];
  forget_completions(&fake_fabric->cq[p->send_cq], p->qp_num);
  forget_completions(&fake_fabric->cq[p->recv_cq], p->qp_num);
  p->pid = 0;
  p->qp_num = 0;
  ((struct fake_cq *)base->send_cq)->pairs--;
  ((struct fake_cq *)base->recv_cq)->pairs--;
  fake_mine.qp[q->index] = NULL;
  fake_mine.qps--;
  fake_unlock();
  free(q->ring);
  free(q);
  return 0;
}

enum {
  TO_INIT = HFR_IB_QP_PKEY_INDEX | HFR_IB_QP_PORT | HFR_IB_QP_ACCESS_FLAGS,
  TO_RTR = HFR_IB_QP_AV | HFR_IB_QP_PATH_MTU | HFR_IB_QP_DEST_QPN | HFR_IB_QP_RQ_PSN | HFR_IB_QP_MAX_DEST_RD_ATOMIC |
           HFR_IB_QP_MIN_RNR_TIMER,
  TO_RTS = HFR_IB_QP_SQ_PSN | HFR_IB_QP_TIMEOUT | HFR_IB_QP_RETRY_CNT | HFR_IB_QP_RNR_RETRY | HFR_IB_QP_MAX_QP_RD_ATOMIC
};

/* Change the state as the specification allows it: from the one before, with all that it needs. */
static int change(struct fake_qp *q, struct fake_pair *p, const struct hfr_ib_qp_attr *a, int mask) {
  int wanted = mask & ~HFR_IB_QP_STATE;
  if (!(mask & HFR_IB_QP_STATE)) return EINVAL;
  switch (a->qp_state) {
    case HFR_IB_QPS_RESET:
      forget_completions(&fake_fabric->cq[p->send_cq], p->qp_num);
      forget_completions(&fake_fabric->cq[p->recv_cq], p->qp_num);
      p->rq_count = q->executed = q->posted = q->retired = 0;
      break;
    case HFR_IB_QPS_INIT:
      if (p->state != HFR_IB_QPS_RESET || wanted != TO_INIT || a->port_num != 1 || a->pkey_index) return EINVAL;
      p->access = (int)a->qp_access_flags;
      break;
    case HFR_IB_QPS_RTR:
      if (p->state != HFR_IB_QPS_INIT || wanted != TO_RTR || a->path_mtu < HFR_IB_MTU_256 || a->path_mtu > HFR_IB_MTU_4096 ||
          a->dest_qp_num >> 24 || a->rq_psn >> 24 || a->ah_attr.port_num != 1)
        return EINVAL;
      if (a->ah_attr.is_global && a->ah_attr.grh.sgid_index > 1) return EINVAL;
      if (!a->ah_attr.is_global &&
          (fake_script_link_layer(p->device) == HFR_IB_LINK_LAYER_ETHERNET || fake_script_grh_required(p->device)))
        return EINVAL;
      p->dest = a->dest_qp_num;
      p->rq_psn = a->rq_psn;
      if (q->max_inline < fake_script_least_inline()) fake_die("a queue pair takes only %u bytes inline", q->max_inline);
      p->dlid = a->ah_attr.dlid;
      p->global = a->ah_attr.is_global;
      p->dgid = a->ah_attr.grh.dgid;
      break;
    case HFR_IB_QPS_RTS:
      if (p->state != HFR_IB_QPS_RTR || wanted != TO_RTS || a->sq_psn >> 24) return EINVAL;
      p->sq_psn = a->sq_psn;
      q->rnr_retry = a->rnr_retry;
      q->rnr_ns = (a->rnr_retry + 1) * 640000ll; /* a min_rnr_timer of 12 at the peer */
      q->retry_ns = a->timeout ? (a->retry_cnt + 1) * (4096ll << a->timeout) : INT64_MAX;
      break;
    case HFR_IB_QPS_ERR: fake_break(p); return 0;
    default: return EINVAL;
  }
  p->state = a->qp_state;
  return 0;
}

int ibv_modify_qp(struct hfr_ib_qp *base, struct hfr_ib_qp_attr *attr, int mask) {
  struct fake_qp *q = (struct fake_qp *)base;
  if (fake_fails("modify_qp", fake_device_of(base->context))) return errno;
  int error = change(q, &fake_fabric->pair[q->index], attr, mask);
  fake_unlock();
  return errno = error;
}

static int take_send(struct fake_qp *q, const struct hfr_ib_send_wr *wr) {
  int state = fake_fabric->pair[q->index].state, error = fake_script_call("post_send");
  uint32_t bytes = 0;
  if (error) return error;
  if (state != HFR_IB_QPS_RTS && state != HFR_IB_QPS_ERR) return EINVAL;
  if ((wr->opcode != HFR_IB_WR_RDMA_WRITE && wr->opcode != HFR_IB_WR_RDMA_WRITE_WITH_IMM) || wr->num_sge > (int)q->max_sge)
    return EINVAL;
  if (q->posted - q->retired >= q->max_send) return ENOMEM; /* those count whose completion was not polled */
  struct fake_send *s = &q->ring[q->posted % q->max_send];
  *s = (struct fake_send){.id = wr->wr_id,
                          .remote = wr->remote_addr,
                          .rkey = wr->rkey,
                          .opcode = wr->opcode,
                          .flags = wr->send_flags,
                          .imm = wr->imm_data,
                          .nsge = wr->num_sge};
  for (int i = 0; i < wr->num_sge; i++) {
    s->sge[i] = wr->sg_list[i];
    if (wr->send_flags & HFR_IB_SEND_INLINE) {
      if (bytes + s->sge[i].length > q->max_inline) return EINVAL;
      memcpy(s->data + bytes, (const void *)(uintptr_t)s->sge[i].addr, s->sge[i].length);
    }
    bytes += s->sge[i].length;
  }
  s->number = fake_script_next_send();
  q->posted++;
  return 0;
}

int fake_post_send(struct hfr_ib_qp *base, struct hfr_ib_send_wr *wr, struct hfr_ib_send_wr **bad) {
  struct fake_qp *q = (struct fake_qp *)base;
  int error = 0;
  fake_lock();
  for (; wr && !error; wr = error ? wr : wr->next)
    if ((error = take_send(q, wr))) *bad = wr;
  fake_pump(q);
  fake_unlock();
  return error;
}

static int take_receive(struct fake_pair *p, const struct hfr_ib_recv_wr *wr) {
  int error = fake_script_call("post_recv");
  if (error) return error;
  if (p->state == HFR_IB_QPS_RESET || wr->num_sge) return EINVAL; /* only for immediates */
  if (p->rq_count >= p->max_recv) return ENOMEM;
  p->rq_id[(p->rq_first + p->rq_count++) % FAKE_RQ] = wr->wr_id;
  if (p->state == HFR_IB_QPS_ERR) fake_break(p);
  return 0;
}

int fake_post_recv(struct hfr_ib_qp *base, struct hfr_ib_recv_wr *wr, struct hfr_ib_recv_wr **bad) {
  struct fake_pair *p = &fake_fabric->pair[((struct fake_qp *)base)->index];
  int error = 0;
  fake_lock();
  for (; wr && !error; wr = error ? wr : wr->next)
    if ((error = take_receive(p, wr))) *bad = wr;
  fake_unlock();
  return error;
}
