/* A call: what one rank asked for, with its arguments checked, and what it tells the others of it. */
#ifndef HFR_CALL_CALL_H_
#define HFR_CALL_CALL_H_
#include "dtype.h"

enum hfr_coll {
  HFR_ALL_REDUCE,
  HFR_REDUCE,
  HFR_BROADCAST,
  HFR_ALL_GATHER,
  HFR_REDUCE_SCATTER,
  HFR_ALL_TO_ALL,
  HFR_GATHER,
  HFR_SCATTER,
  HFR_BARRIER,
  HFR_P2P,
  HFR_PAIR, /* two ranks whose devices exchange segments: no plan, engine/pairing.c */
  HFR_NCOLL
};
const char *hfr_coll_name(int coll);

#define HFR_ANY_SOURCE (-1)

struct hfr_call {
  enum hfr_coll coll;
  int receiving; /* HFR_P2P: this side receives */
  int tag;       /* HFR_P2P */
  int *source;   /* receiving: told whose message it was; may be NULL */
  const void *send;
  void *recv;
  size_t count; /* elements a rank, as in the public call; 0 for an uneven all_to_all */
  hfreduceDataType_t dtype;
  hfreduceRedOp_t op; /* sum .. avg; a premultiplied sum is hfreduceSum with premul set */
  int root;           /* or peer (HFR_ANY_SOURCE: whoever sends); -1 */
  int premul;
  uint8_t scalar[8];
  const void *scalar_from; /* the factor lies there, and is read when the operation starts; NULL: it is in `scalar` */
  uint8_t scalar_bytes;
  int over;     /* avg divides by so many; 0: the ranks of the communicator */
  int windowed; /* the buffers are reached in segments: no copy covers all of them at once */
  const size_t *sendcounts, *senddispls, *recvcounts, *recvdispls; /* uneven all_to_all, else NULL; owned by the request */
};

/* What ranks compare, so that no data of one operation is taken for another's: the call, and its number on the communicator. */
struct hfr_fingerprint {
  uint64_t seq;
  uint64_t count;
  int32_t root; /* or the tag of a send/recv; -1: none */
  uint8_t coll, op, dtype;
  uint8_t way; /* 1: by pairs of devices (engine/pairing.c) */
};
static inline int hfr_fingerprint_equal(const struct hfr_fingerprint *a, const struct hfr_fingerprint *b) {
  return a->seq == b->seq && a->count == b->count && a->root == b->root && a->coll == b->coll && a->op == b->op &&
         a->dtype == b->dtype && a->way == b->way;
}
/* What a rank says of a call; its number comes when it begins. */
static inline struct hfr_fingerprint hfr_call_fingerprint(const struct hfr_call *call) {
  return (struct hfr_fingerprint){.count = call->count,
                                  .root = call->coll == HFR_P2P ? call->tag : call->root,
                                  .coll = (uint8_t)call->coll,
                                  .op = (uint8_t)(call->premul ? 5 : call->op),
                                  .dtype = (uint8_t)call->dtype};
}
/* It in words: "all_reduce #3(count 5, float32, sum)". A fingerprint from outside may hold anything. */
void hfr_describe_fingerprint(const struct hfr_fingerprint *fp, char *text, size_t size);
#endif
