/*
 * Calls that run in the order of a device's streams: on device memory, or on host memory with a stream given.
 *
 * At call time everything is put into the device's queues (device/device.h) and the requests into the engine, each with a window
 * (engine/window.h) through which it reaches the buffers; nothing waits. From then on the device and the driver of the engine
 * only exchange words in pinned memory.
 */
#ifndef HFR_COMM_STREAM_H_
#define HFR_COMM_STREAM_H_
#include "../device/device.h"
#include "comm.h"

/* How a call reaches its buffers. */
struct hfr_ordered {
  int on; /* by a stream; 0: host memory, at once */
  struct hfr_stream stream;
  int staged[2]; /* the send, the receive buffer lies where only the device may go */
  int paired;    /* all_reduce over pairs of devices (pairs.h) */
};

/* Of a call of a half: what it is to the pair. */
struct hfr_paired {
  struct hfr_pairs *pairs; /* NULL: an ordinary call */
  struct hfreduceComm *whole;
  const struct hfr_call *call;     /* of the whole */
  struct hfr_request *exchange[2]; /* segments on their way out, and back */
  size_t half;                     /* bytes */
  size_t bytes;                    /* of a segment */
  int nsegs;
  uint64_t base; /* number of the first, since the communicator was made */
};

/* One call of a launch. */
struct hfr_ordered_call {
  struct hfreduceComm *comm;
  const struct hfr_call *call;
  const struct hfr_ordered *ordered;
  struct hfr_request *request; /* planned; owned by the launch until it is submitted */
  struct hfr_paired pair;
};

/* Look at the buffers of a checked call and at the stream that was given with it, and say in *ordered which way it goes.
   InvalidArgument and InvalidUsage name what is wrong. `call` is completed: a factor in device memory is read at once where the
   call does not wait for a stream. */
hfreduceResult_t hfr_stream_resolve(struct hfreduceComm *comm, struct hfr_call *call, hfreduceStream_t stream,
                                    struct hfr_ordered *ordered);
/* 1: the call is no more than a copy within the device, and has no request. */
int hfr_stream_is_copy(const struct hfreduceComm *comm, const struct hfr_call *call, const struct hfr_ordered *ordered);

/* A launch: the calls of a group, by communicator. */
struct hfr_streams;
/* Give the requests their windows. Nothing is in any queue yet: on failure the caller puts the requests back. */
hfreduceResult_t hfr_streams_prepare(struct hfr_ordered_call *calls, int n, struct hfr_streams **streams);
/* Nothing can fail any more before they run: the calls take their places in the rings. To be called before the requests are
   submitted. */
void hfr_streams_commit(struct hfr_streams *streams);
/* Put everything into the queues, all copies from the devices that find room before anything that waits. An error breaks the
   communicator that it concerns. Frees `streams`. The requests were submitted before, but those of captured calls, which this
   arms. */
hfreduceResult_t hfr_streams_run(struct hfr_streams *streams);
void hfr_streams_drop(struct hfr_streams *streams);

/* The device side of a communicator goes, after its engine: what is still in the queues ends first, or is left behind. */
void hfr_staging_destroy(struct hfr_staging *staging, double timeout);
/* The device that a communicator is bound to by its first call with device memory; -1: none. */
int hfr_staging_device(const struct hfr_staging *staging);
#endif
