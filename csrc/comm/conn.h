/* Frames over an authenticated, non-blocking stream socket: what the bootstrap and the control connections speak. */
#ifndef HFR_COMM_CONN_H_
#define HFR_COMM_CONN_H_
#include "../base/status.h"

enum hfr_frame {
  HFR_FRAME_JOIN = 1, /* rank -> root: struct hfr_record */
  HFR_FRAME_TABLE,    /* root -> rank: all records, by rank */
  HFR_FRAME_WAITING,  /* root -> rank: text: who is still missing */
  HFR_FRAME_ERROR,    /* both ways: hfreduceErrorInfo_t; at the root: joining failed */
  HFR_FRAME_READY,    /* rank -> rank 0: my node's arena stands */
  HFR_FRAME_GO,       /* rank 0 -> rank: all are ready */
  HFR_FRAME_STUCK,    /* rank -> rank 0: struct hfr_fingerprint of a collective that waits */
  HFR_FRAME_BYE,      /* int32: this rank leaves in good order */
  HFR_FRAME_PING
};

struct hfr_conn {
  int fd;
  int dead; /* nothing more can be read */
  int mute; /* nothing more can be sent */
  uint8_t *rx, *tx;
  size_t rx_have, rx_cap, tx_have, tx_cap;
  size_t max_payload; /* longer frames break the connection */
  int64_t heard_ns;   /* when bytes last came */
};

void hfr_conn_init(struct hfr_conn *conn, int fd, size_t max_payload);
void hfr_conn_close(struct hfr_conn *conn);
/* Queue a frame and send what the kernel takes. */
void hfr_conn_send(struct hfr_conn *conn, enum hfr_frame type, const void *payload, size_t bytes);
void hfr_conn_flush(struct hfr_conn *conn);
/* Read what there is. 0, or -1 when the other side has closed or the connection is broken (dead is set). */
int hfr_conn_fill(struct hfr_conn *conn);
/* Next whole frame: 1 with *payload valid until the next call; 0 none. */
int hfr_conn_next(struct hfr_conn *conn, enum hfr_frame *type, const uint8_t **payload, size_t *bytes);
/* The error that the payload of an ERROR frame carries, its texts ended. 0, or -1 when it is none: another size, a code that does
 * not exist or says that nothing failed. */
int hfr_conn_error(const uint8_t *payload, size_t bytes, hfreduceErrorInfo_t *info);
#endif
