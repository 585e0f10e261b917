/* The device side of one communicator: its queues, and rings of pinned segments. Inside comm/ only. */
#ifndef HFR_COMM_STAGING_H_
#define HFR_COMM_STAGING_H_
#include "stream.h"

/*
 * Segments of pinned memory, each with room for rows of a send and of a receive buffer, and the words by which device and engine
 * hand them to each other. Used in turn. In a graph the words belong to the captured calls instead, since what their nodes
 * compare is fixed.
 *
 * Where a node has several ranks, the send halves of the plain ring lie in the rank's lending area of the arena, if that can be
 * pinned, so that the others read them there (engine/window.h).
 */
struct hfr_stage_ring {
  struct hfr_pinned memory;                  /* words and halves, but for those that lie in the lending area: */
  struct hfr_pinned lent;                    /* send halves */
  uint8_t *half[2];                          /* of slot 0, for the send and the receive buffer */
  size_t pitch;                              /* from one slot to the next */
  size_t bytes;                              /* of one direction of a slot; 0: not made yet */
  int slots, next;                           /* what follows is for rings outside graphs */
  uint32_t turn;                             /* value of the next use; cyclic */
  _Atomic uint32_t *ready, *done[2], *taken; /* of each slot; done: with its send, with its receive half */
  _Atomic uint32_t *started;                 /* launches that the device has got to */
  uint32_t starts;
  uint8_t (*scalar)[8];
  struct hfr_stage_use {
    int in, out;                  /* somebody used that half of the slot, */
    uint32_t in_value, out_value; /* ... last with these values */
  } * use;
};

/* What a graph holds of a communicator. Its owners: the graph, the engine, and the staging while it may be added to. Freed by
   whoever comes by after all let go, since neither may call the driver. */
struct hfr_captured {
  struct hfr_captured *next;
  uint64_t id; /* of the capture */
  _Atomic int owners;
  struct hfr_stage_ring ring; /* as large as its calls need */
  struct hfr_pinned *memory;  /* all that it has */
  int nmemory;
  struct hfr_pinned words; /* of its launches: the newest piece of it, and how much of that they use */
  size_t used;
  struct hfr_replay replay;
};

enum { HFR_RING_PLAIN, HFR_RING_WIDE }; /* wide: a segment that holds a message of every rank; made when one is needed */

struct hfr_staging {
  struct hfr_copier *copier;
  struct hfr_arena *arena; /* the communicator's */
  struct hfr_stage_ring ring[2];
  struct hfr_captured *captured; /* the capture that goes on, or the last one */
};

/* --- resolve.c --- */
/* The public name of a call, for messages. */
const char *hfr_stream_name(const struct hfr_call *call);
/* Elements of the largest block of an uneven call; extent: where its last one ends. */
size_t hfr_stream_uneven(const struct hfr_call *call, int recv, int nranks, int extent);
/* Memory that no CPU may touch while streams run. */
static inline int hfr_is_device(const struct hfr_memory *m) {
  return m->kind == HFR_MEMORY_DEVICE || m->kind == HFR_MEMORY_MANAGED;
}

/* --- staging.c --- */
/* If this thread has a context and no window of the process is open, make the device side before the first call, which the thread
   may make while streams wait. The ranks are not told to go yet. What fails is tried again at the first call. */
void hfr_staging_provide(struct hfreduceComm *comm);
/* The communicator's device side, made at its first call. InvalidArgument when it was made for another device. */
hfreduceResult_t hfr_staging_get(struct hfreduceComm *comm, const char *who, const struct hfr_stream *stream);
/* Between enter and leave: make the ring unless it is there, with slots of so many bytes each way. */
hfreduceResult_t hfr_staging_ring(struct hfr_staging *staging, int which, size_t bytes);
/* Slots that a ring has at most. */
int hfr_staging_slots(int which);
/* Bytes of a slot of the plain ring of a rank whose HFREDUCE_CUDA_SEGMENT is `segment`. */
size_t hfr_staging_slot_of(const struct hfr_layout *layout, const struct hfr_geometry *geometry, size_t segment);
/* The same for this rank. */
size_t hfr_staging_slot(const struct hfreduceComm *comm);
/* Between enter and leave: what the graph in capture holds of this communicator. */
hfreduceResult_t hfr_staging_capture(struct hfr_staging *staging, const struct hfr_stream *stream,
                                     struct hfr_captured **captured);
/* Between enter and leave: see to it that the graph's ring has so much room. */
hfreduceResult_t hfr_staging_room(struct hfr_staging *staging, struct hfr_captured *captured, int slots, size_t bytes);
/* Zeroed pinned memory that lives as long as the graph. */
hfreduceResult_t hfr_staging_words(struct hfr_staging *staging, struct hfr_captured *captured, size_t bytes,
                                   struct hfr_pinned *words);
/* The request runs with every launch of the graph from now on. */
void hfr_staging_arm(struct hfreduceComm *comm, struct hfr_captured *captured, struct hfr_request *request);
/* Free what graphs have let go of: their memory is kept pinned for others. Any thread that may call the driver. */
void hfr_staging_sweep(void);

/* --- gate.c: any thread that may call the driver --- */
/* So many launches more are on their way into the queues. */
void hfr_gate_launch(int more);
/* 1: no window of the process is open, and none opens until hfr_gate_open: driver calls return. 0: some are; there is nothing to
 * open. */
int hfr_gate_close(void);
void hfr_gate_open(void);
/* Destroy a copier that has run dry, and unpin what is lent of the arena: now, or put them aside until no window is open. */
void hfr_gate_give_back(struct hfr_copier *copier, struct hfr_pinned *lent, struct hfr_arena *arena);
/* Do what is put aside, and unpin what is kept beyond `keep` bytes, if no window is open. */
void hfr_gate_tidy(size_t keep);
#define HFR_GATE_KEEP ((size_t)64 << 20) /* while communicators live */
#endif
