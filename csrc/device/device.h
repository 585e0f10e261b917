/*
 * Where buffers can live: a table of devices. Host memory is always the last entry and owns what no other device claims. Device
 * code is found at run time, so every build has every entry; `why_absent` tells what is missing.
 *
 * Below it: what the floors above need of an accelerator to move data between its memory and the CPUs in the order of its
 * streams.
 */
#ifndef HFR_DEVICE_DEVICE_H_
#define HFR_DEVICE_DEVICE_H_
#include "../base/status.h"

#include <stdatomic.h>

struct hfr_device {
  const char *name;
  /* NULL when usable, else a line that says what is missing. Any thread. */
  const char *(*why_absent)(void);
  /* Does this pointer belong to the device? Any thread; called once a buffer and call. */
  int (*owns)(const void *ptr);
  /* Memory that is cheap to communicate from. Caller owns it until release. InvalidArgument for a foreign pointer. */
  hfreduceResult_t (*alloc)(void **ptr, size_t bytes);
  hfreduceResult_t (*release)(void *ptr);
};

extern const struct hfr_device hfr_device_host, hfr_device_cuda;

/* The i-th device, NULL past the end. */
const struct hfr_device *hfr_device_at(int i);
/* The device that a pointer belongs to; never NULL. */
const struct hfr_device *hfr_device_of(const void *ptr);
/* What accelerators there are, one "key: value" a line. Writes at most size bytes, the NUL included; returns how many without it.
   Initialises the driver, but makes no context. */
size_t hfr_device_describe(char *text, size_t size);

/* ---------------------------------------------------------------- pointers and streams */

/* 1: there is a driver, so a pointer or a stream may be a device's. Costs one load after the first call. */
int hfr_device_present(void);

enum hfr_memory_kind {
  HFR_MEMORY_HOST,    /* the driver does not know it */
  HFR_MEMORY_PINNED,  /* host memory that the driver gave or registered: CPUs and devices reach it */
  HFR_MEMORY_MANAGED, /* moves between them: CPUs leave it alone while streams run */
  HFR_MEMORY_DEVICE,
};
struct hfr_memory {
  enum hfr_memory_kind kind;
  int device;    /* its ordinal; -1: none, or not known */
  void *context; /* NULL: not known */
  uintptr_t start;
  size_t bytes; /* of the piece from start on; 0: not known */
};
/* What a pointer is. `start` and `bytes` tell of the piece of physical memory there: allocators whose segments grow (PyTorch's
   expandable segments) map many pieces to addresses in a row. Any thread; changes nothing in the driver, and gives HOST while the
   program has not initialised it. */
void hfr_memory_of(const void *pointer, struct hfr_memory *memory);
/* How many of the `bytes` from `pointer` on lie in memory that the driver knows, with no gap between its pieces. `memory` is what
   hfr_memory_of said of the pointer, and is no HOST memory. */
size_t hfr_memory_reach(const void *pointer, size_t bytes, const struct hfr_memory *memory);

struct hfr_stream {
  void *handle; /* CUstream; NULL and 1 are the legacy default stream, 2 the thread's own */
  void *context;
  int device;
  uint64_t capture; /* id of the capture that it is in; 0: none */
  void *graph;      /* being captured */
};
/* Look at a stream. A default stream is the one of `context`, or of the thread's current context where that is NULL.
   InvalidArgument for a stream that is none, where the driver tells (it may crash on a stale handle), InvalidUsage for one whose
   capture has failed; `who` begins the message. */
hfreduceResult_t hfr_stream_look(const char *who, void *handle, void *context, struct hfr_stream *stream);

/* A stream of the device's default context for one caller, until it is put: of the greatest priority, never a captured one, with
   nothing in it. It is never destroyed, and may be put with work in it: it is given again when that has ended. Any thread; breaks
   no capture. */
hfreduceResult_t hfr_stream_get(int device, void **handle);
hfreduceResult_t hfr_stream_put(void *handle);

/* Hardware queues that the streams of a device share, as far as the environment tells. What is behind a wait in a queue waits,
 * too. */
int hfr_device_queues(void);
/* The context that programs use by default on a device; it stays until the process ends. NULL: hfr_last_error(). */
void *hfr_device_context(int device);
/* The context that this thread has there, or that one. */
void *hfr_device_context_here(int device);
/* The context that is this thread's now, and its device; NULL: none, or no driver is initialised. */
void *hfr_device_context_now(int *device);
/* The device that this thread works on, as CUDA's runtime sees it (none chosen: 0); -1: the program has initialised no driver. */
int hfr_device_current(void);
/* Copy now, waiting for it; for single values. */
hfreduceResult_t hfr_device_read(void *to, const void *from, size_t bytes);

/* ---------------------------------------------------------------- mappings */

/* A piece of device memory that CPUs read and write by themselves, through the device's window on the bus: for messages so small
   that a copy engine needs longer to start than CPUs to copy. Mappings are kept and found again by their memory; one whose memory
   was freed is given up when the next is asked for. */
struct hfr_mapping;
/* NULL when there is such a thing, else a line that says what is missing. Any thread. */
const char *hfr_mapping_why_absent(void);
/* A mapping of this memory, to be put; NULL: there is none, and the device has to copy. Any thread that may call the driver. */
struct hfr_mapping *hfr_mapping_get(const void *pointer, size_t bytes);
/* The others call no driver. NULL is legal. */
void hfr_mapping_put(struct hfr_mapping *mapping);
/* While its memory is allocated. What the device has written before it wrote a word is read after the word was; what is written
   here is seen by a queue that waits for a word which is written later, if hfr_copier_sees_writes(). */
void hfr_mapping_read(const struct hfr_mapping *mapping, void *to, const void *from, size_t bytes);
void hfr_mapping_write(const struct hfr_mapping *mapping, void *to, const void *from, size_t bytes);

/* ---------------------------------------------------------------- copiers */

/* Host memory that a device reads and writes by itself. */
struct hfr_pinned {
  uint8_t *host; /* NULL: none */
  uintptr_t device;
  size_t bytes;
  void *context; /* that it was registered in; its number, since another context may have its address; 0: not known */
  unsigned long long context_id;
  int borrowed; /* it was there before, and stays */
};

/*
 * Two queues of a device, one a direction, so that copies out and in overlap. What is put into them runs in order, later; the
 * call returns at once. Between enter and leave, which the same thread calls; one thread at a time. Errors are UnhandledCudaError
 * and leave what was put in before in the queues.
 *
 * A word that the device writes is released: who reads it with acquire sees the copies before it. A queue that waits for a word
 * goes on once (int32)(*word - value) >= 0.
 */
struct hfr_copier;
enum hfr_queue { HFR_TO_HOST, HFR_TO_DEVICE };

/* With its marks below `marks`, all that it needs, since a driver may let calls that make something wait for streams that wait.
 */
hfreduceResult_t hfr_copier_create(int device, void *context, int marks, struct hfr_copier **copier);
/* Wait until the queues have run dry: 1; after limit_ns: 0, with a warning, and the copier is left to the process. */
int hfr_copier_drain(struct hfr_copier *copier, int64_t limit_ns);
/* Free a copier whose queues have not run dry: the process keeps all that the device may still use. */
void hfr_copier_forget(struct hfr_copier *copier);
/* Drain the queues as hfr_copier_drain does, and return as it does; if they ran dry, destroy all streams and events of the
   copier. A driver may keep this call waiting while any stream waits for a word, as it may all calls that pin or unpin memory. */
int hfr_copier_destroy(struct hfr_copier *copier, int64_t limit_ns);
int hfr_copier_device(const struct hfr_copier *copier);
void *hfr_copier_context(const struct hfr_copier *copier);
/* It is of that context, and that is the one that it was made for: not another one at its address. */
int hfr_copier_serves(const struct hfr_copier *copier, int device, void *context);
/* 1: words are waited for by host functions, which somebody has to wake (hfr_futex_wake). The driver may run those of a process
 * one at a time: then no wait may need one that is put into any copier's queue after it. */
int hfr_copier_by_host(const struct hfr_copier *copier);
/* 1: its queues, and what is in a stream behind them, see what CPUs wrote through a mapping before they wrote the word. */
int hfr_copier_sees_writes(const struct hfr_copier *copier);

/* capturing: what follows goes into the graph that the user's stream captures. */
hfreduceResult_t hfr_copier_enter(struct hfr_copier *copier, int capturing);
void hfr_copier_leave(struct hfr_copier *copier);
/* Zeroed pages near the device. The caller allocates within enter and leave; it may free in any thread. Freed pages stay pinned,
   and the next caller gets them first: neither call reaches the driver then. */
hfreduceResult_t hfr_pinned_alloc(struct hfr_copier *copier, size_t bytes, struct hfr_pinned *memory);
/* Pin whole pages of a shared mapping, which must stay mapped until they are freed: that unpins them. Pages that nobody has
   touched yet come to lie near the device. Within enter and leave. */
hfreduceResult_t hfr_pinned_share(struct hfr_copier *copier, void *pages, size_t bytes, struct hfr_pinned *memory);
void hfr_pinned_free(struct hfr_pinned *memory);
/* Unpin freed pages until no more than `keep` bytes of them are pinned; tell how many bytes are. */
void hfr_pinned_trim(size_t keep);
size_t hfr_pinned_kept(void);

/* Both queues go on after what is in the stream now; the queue to the device after what is in the other; and what is put into the
   stream from now on after a queue. */
hfreduceResult_t hfr_copier_after(struct hfr_copier *copier, void *stream);
/* Instead of hfr_copier_after: both queues of the launch that begins are the stream itself, until hfr_copier_before. Nothing goes
   out after the first that comes in. Not in captures, nor where host functions wait. */
hfreduceResult_t hfr_copier_own(struct hfr_copier *copier, void *stream);
hfreduceResult_t hfr_copier_join(struct hfr_copier *copier);
hfreduceResult_t hfr_copier_before(struct hfr_copier *copier, enum hfr_queue queue, void *stream);
/* Mark where the queue to the host stands, under one of HFR_MARKS numbers; and have the other go on only after such a mark. Words
   alone would do while all goes well, but the driver should see the order too, and after an error nothing may be overwritten that
   is still being read. */
#define HFR_MARKS 72
#define HFR_PAIR_MARKS 4 /* of the copier of a pair of devices */
hfreduceResult_t hfr_copier_mark(struct hfr_copier *copier, int number);
hfreduceResult_t hfr_copier_follow(struct hfr_copier *copier, int number);
/* Across copiers of one device: `queue` of one goes on after that queue of the other, as it is now; or after a mark of it. Not in
   captures. */
hfreduceResult_t hfr_copier_chain(struct hfr_copier *copier, struct hfr_copier *after, enum hfr_queue queue);
hfreduceResult_t hfr_copier_follow_mark(struct hfr_copier *copier, enum hfr_queue queue, struct hfr_copier *after, int number);
/* Copy `rows` rows of `width` bytes between device (or managed) memory and pinned memory. */
hfreduceResult_t hfr_copier_copy(struct hfr_copier *copier, enum hfr_queue queue, void *host, size_t host_pitch, uintptr_t device,
                                 size_t device_pitch, size_t width, size_t rows);
/* The word lies in `memory`. */
hfreduceResult_t hfr_copier_write(struct hfr_copier *copier, enum hfr_queue queue, const struct hfr_pinned *memory,
                                  _Atomic uint32_t *word, uint32_t value);
hfreduceResult_t hfr_copier_wait(struct hfr_copier *copier, enum hfr_queue queue, const struct hfr_pinned *memory,
                                 _Atomic uint32_t *word, uint32_t value);
/* Set words to 0. */
hfreduceResult_t hfr_copier_clear(struct hfr_copier *copier, enum hfr_queue queue, const struct hfr_pinned *memory,
                                  _Atomic uint32_t *first, size_t count);
/* Within enter and leave of a capture, once a graph, after hfr_copier_after: have ring(arg) called each time the graph is
   launched, beside its other work, soon or, where the driver is busy, late; it must not call the driver. The next hfr_copier_join
   ends it. */
hfreduceResult_t hfr_copier_bell(struct hfr_copier *copier, void (*ring)(void *arg), void *arg);
/* Copy within the device's memory, in a stream. */
hfreduceResult_t hfr_copier_move(struct hfr_copier *copier, void *stream, uintptr_t to, uintptr_t from, size_t bytes);
/* Call release(arg) when neither the graph nor anything made of it exists any more; it must not call the driver, and may run in
   any thread. On failure it has been called. */
hfreduceResult_t hfr_copier_keep(struct hfr_copier *copier, void *graph, void (*release)(void *arg), void *arg);

/* ---------------------------------------------------------------- pairs */

/*
 * Two devices that NVLink joins. Each has some memory that the other writes: what is pushed into a queue here arrives there. What
 * has arrived is added to one's own by a kernel. Who has pushed what, the two tell each other by other means.
 */
struct hfr_pair;

#define HFR_LINKS_MAX 16
struct hfr_links { /* PCI addresses: domain, bus, device in 16, 8, 8 bits; 0: none */
  uint32_t self;   /* 0: this device cannot be one of a pair */
  uint32_t peer[HFR_LINKS_MAX];
};
/* What NVLink joins a device with, as far as this process sees. NULL, or why the device cannot be one of a pair: text that lasts.
   Any thread; makes no context. */
const char *hfr_device_links(int device, struct hfr_links *links);
int hfr_links_join(const struct hfr_links *a, const struct hfr_links *b);

/* What a rank tells its partner of its memory; bytes only. */
struct hfr_pair_memory {
  uint64_t process; /* random */
  uintptr_t pointer, context;
  uint64_t bytes;
  char handle[64];
};
/* A pair's side here, with so many bytes for the other to write. */
hfreduceResult_t hfr_pair_create(int device, void *context, size_t bytes, struct hfr_pair **pair, struct hfr_pair_memory *mine);
/* Reach the partner's memory. */
hfreduceResult_t hfr_pair_meet(struct hfr_pair *pair, const struct hfr_pair_memory *theirs);
/* Waits for the queues as hfr_copier_destroy, and gives what that gives: 1: this side writes to the partner's memory no more. The
   memory here is used again once the word `ended`, in shared memory, says the same of the partner; NULL: he has none of it. */
int hfr_pair_destroy(struct hfr_pair *pair, const _Atomic uint32_t *ended, int64_t limit_ns);
/* Its queues: those to the host and to the device are no more than the first and the second here. */
struct hfr_copier *hfr_pair_copier(const struct hfr_pair *pair);

/* As the copier's: between its enter and leave. `at` are offsets in the memory that a side has for the other; device addresses.
 */
hfreduceResult_t hfr_pair_push(struct hfr_pair *pair, enum hfr_queue queue, size_t at, uintptr_t from, size_t bytes);
hfreduceResult_t hfr_pair_take(struct hfr_pair *pair, enum hfr_queue queue, uintptr_t to, size_t at, size_t bytes);
uintptr_t hfr_pair_address(const struct hfr_pair *pair, size_t at);
/* to = own op what arrived at `from`; lower: own comes first. op: sum, prod, max, min. scale: of sums of floats, before they are
   rounded. */
struct hfr_pair_sum {
  uintptr_t to, own;
  size_t from, count, esize; /* elements, bytes of one */
  int lower;
  hfreduceDataType_t dtype;
  hfreduceRedOp_t op;
  float scale;
};
hfreduceResult_t hfr_pair_reduce(struct hfr_pair *pair, enum hfr_queue queue, const struct hfr_pair_sum *sum);
#endif
