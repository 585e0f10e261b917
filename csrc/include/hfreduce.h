/*
 * hfreduce: collective communication on the CPU, for training.
 *
 * The names, enum values and rules are NCCL's with the prefix changed, so that code moves over by renaming. What differs is
 * said at each function. Every function may be called from any thread. Collectives on one communicator must not overlap: of two
 * that do the later is refused with hfreduceInvalidUsage, and the other one goes on. A collective is in progress until it
 * returns; an asynchronous one is called by the function that launches it (hfreduceGroupEndAsync), and waiting for its work is no
 * call on the communicator. So one thread may launch and another wait. Sends and receives may be called beside, and so may
 * everything else, hfreduceCommAbort and hfreduceCommDestroy too: the calls of other threads then end with hfreduceAborted, those
 * that come later with hfreduceInvalidArgument.
 *
 * Every function that waits ends by a deadline with a result or with an error whose text (hfreduceGetLastError) names rank, host,
 * operation, sequence number and phase. Operations have HFREDUCE_TIMEOUT seconds (1800), init, split and shrink have
 * HFREDUCE_JOIN_TIMEOUT (300); config.timeout caps both.
 */
#ifndef HFREDUCE_H_
#define HFREDUCE_H_

#include <stddef.h>
#include <stdint.h>

#define HFREDUCE_MAJOR 0
#define HFREDUCE_MINOR 1
#define HFREDUCE_PATCH 0
#define HFREDUCE_VERSION_CODE 100 /* 10000 * major + 100 * minor + patch */

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* ---- what follows, up to the end mark, is read by cffi: plain declarations only. [cffi begin] ---- */

#define HFREDUCE_UNIQUE_ID_BYTES 128

typedef struct hfreduceComm *hfreduceComm_t;
typedef struct hfreduceWork *hfreduceWork_t;
typedef struct hfreduceCompletionQueue *hfreduceCompletionQueue_t;
/* A device stream (CUstream): the call returns at once and takes its place in the stream, buffers on the host too. NULL, with
   host memory: the call waits. NULL with device memory, and 1: the legacy default stream; 2: the thread's own. Errors of calls in
   a stream are told by hfreduceCommGetAsyncError and by later calls; what such a call should have written is void then. */
typedef void *hfreduceStream_t;

/* Names a communicator and carries its secret: whoever has it can join. Plain bytes: send it by any trusted channel. */
typedef struct {
  char internal[HFREDUCE_UNIQUE_ID_BYTES];
} hfreduceUniqueId;

/* 0 to 8 are NCCL's; the rest are ours. */
typedef enum {
  hfreduceSuccess = 0,
  hfreduceUnhandledCudaError = 1,
  hfreduceSystemError = 2,     /* the operating system refused something; the text has errno */
  hfreduceInternalError = 3,   /* a fault of the library */
  hfreduceInvalidArgument = 4, /* an argument is wrong; the text says which and why */
  hfreduceInvalidUsage = 5,    /* the call is not legal here: closed communicator, GroupEnd without GroupStart, after fork */
  hfreduceRemoteError = 6,     /* a peer died, left or cannot be reached */
  hfreduceInProgress = 7,
  hfreduceTimeout = 8,  /* the deadline passed; the text says who was waited for */
  hfreduceMismatch = 9, /* ranks called different operations, counts, datatypes, ops or roots; the text names both sides */
  hfreduceAborted = 10, /* hfreduceCommAbort was called, here or on another rank */
  hfreduceCorrupt = 11, /* data failed its checksum */
  hfreduceNumResults = 12
} hfreduceResult_t;

typedef enum {
  hfreduceInt8 = 0,
  hfreduceUint8 = 1,
  hfreduceInt32 = 2,
  hfreduceUint32 = 3,
  hfreduceInt64 = 4,
  hfreduceUint64 = 5,
  hfreduceFloat16 = 6,
  hfreduceFloat32 = 7,
  hfreduceFloat64 = 8,
  hfreduceBfloat16 = 9,
  hfreduceFloat8e4m3 = 10, /* the "fn" form: no infinities; overflow becomes NaN */
  hfreduceFloat8e5m2 = 11,
  hfreduceNumTypes = 12
} hfreduceDataType_t;

/* fp16, bf16 and fp8 are accumulated in float32 and rounded once a node (and before that once a pair of GPUs joined by NVLink).
   min and max propagate NaN. avg is the sum divided by the number of ranks (integers truncate toward zero). Values from 5 on name
   ops made by hfreduceRedOpCreatePreMulSum. */
typedef enum {
  hfreduceSum = 0,
  hfreduceProd = 1,
  hfreduceMax = 2,
  hfreduceMin = 3,
  hfreduceAvg = 4,
  hfreduceNumOps = 5,
  hfreduceMaxRedOp = 2147483647
} hfreduceRedOp_t;

typedef enum { hfreduceScalarDevice = 0, hfreduceScalarHostImmediate = 1 } hfreduceScalarResidence_t;

/* As HFREDUCE_DEBUG names them. */
typedef enum { hfreduceLogWarn = 1, hfreduceLogInfo = 2, hfreduceLogTrace = 3 } hfreduceLogLevel_t;

/* Flags of hfreduceCommShrink. */
typedef enum { hfreduceShrinkDefault = 0, hfreduceShrinkAbort = 1 } hfreduceShrinkFlags_t;

/* Fill with hfreduceConfigInit, then change what is wanted. */
typedef struct {
  size_t size;
  unsigned int magic;
  unsigned int version;
  /* Seconds that an operation of this communicator may take, and the most that joining may; 0: HFREDUCE_TIMEOUT, else 1800.
     Joining takes at most HFREDUCE_JOIN_TIMEOUT, else 300. */
  double timeout;
  const char *name; /* appears in errors and logs; copied; may be NULL */
  /* While the ranks join: when *cancel becomes other than 0 (by an atomic store of any thread), the call ends within a tenth of a
     second with hfreduceAborted, and so do the others that have joined. NULL: no such word. */
  const int *cancel;
  /* The same by asking: while the ranks join, the calling thread calls interrupted(interrupted_arg) about ten times a second,
     holding no lock, and anything but 0 ends the call. In hfreduceCommSplit comm is then aborted. NULL: it asks nobody. */
  int (*interrupted)(void *arg);
  void *interrupted_arg;
  /* Ordinal of the GPU that this rank will work on: GPUs that NVLink joins reduce in pairs. -1: the one that the thread has when
     it joins, if the program uses CUDA. */
  int device;
} hfreduceConfig_t;

/* Where a rank stands. node numbers nodes in the order of their lowest rank. */
typedef struct {
  int rank, nranks;
  int local_rank, local_nranks;
  int node, nnodes;
  char host[64];
  char transports[64]; /* e.g. "shm", "shm,tcp" */
  uint64_t id;         /* the same on all ranks of a communicator, another for every other one */
} hfreduceCommInfo_t;

/* What has gone between this rank and a peer since the communicator was made, over all channels. Bytes are payload, without the
   library's headers. What collectives exchange inside a node goes through its common memory and is no connection. */
typedef struct {
  int peer;
  char transport[16]; /* "shm", "tcp", "verbs" */
  char local[96];     /* "10.0.0.1:4711", "mlx5_0:1"; of one channel where there are several; "": shared memory, or not up yet */
  char remote[96];
  uint64_t bytes_sent, bytes_received;
  uint64_t messages_sent, messages_received; /* sent: given to the transport; received: taken from it, whole */
  uint64_t stalls;                           /* messages that had to wait for room */
  /* tcp: segments that the kernel sent again. verbs: what the port (`local`) sent again since the communicator uses it, for all
     who share it: queue pairs do not tell their own. shm: 0. */
  uint64_t retries;
} hfreduceConnection_t;

/* The facts of an error, beside its text. -1 or "" where not known. */
typedef struct {
  int code;       /* hfreduceResult_t */
  int rank;       /* who noticed it */
  int peer;       /* who is concerned: waited for, died, disagreed */
  long long seq;  /* sequence number of the operation on its communicator */
  char op[24];    /* "all_reduce", ... */
  char phase[24]; /* "connect", "local reduce", "tree up", ... */
  char host[64];  /* host of `rank` */
  char text[768]; /* the whole message */
} hfreduceErrorInfo_t;

/* One parameter of the library, as `hfreduce info` lists it. Strings live as long as the process. */
typedef struct {
  const char *name;   /* "HFREDUCE_TIMEOUT" */
  const char *value;  /* in force, as text */
  const char *preset; /* the default, as text */
  const char *help;
  int is_set;        /* 1: the environment or a configuration file gave it */
  const char *alias; /* NCCL's name for it, understood where ours is not set; NULL: none */
} hfreduceParam_t;

/* What a datatype is. */
typedef struct {
  const char *name;            /* "float32", "float8_e4m3fn": as NumPy and ml_dtypes spell it; lives as long as the process */
  hfreduceDataType_t datatype; /* its number */
  hfreduceDataType_t factor;   /* the type of the factor that hfreduceRedOpCreatePreMulSum takes for it */
  hfreduceDataType_t computed; /* the type that reductions compute in before they round once */
  int size;                    /* bytes of an element */
  int is_float;
  unsigned int ops; /* bit hfreduceSum, hfreduceProd, ...: the ops that are defined for it */
} hfreduceType_t;

/* --- library --- */
hfreduceResult_t hfreduceGetVersion(int *version);
const char *hfreduceGetErrorString(hfreduceResult_t result);
/* The text of the last error on `comm`, or on this thread if comm is NULL; "" if none. Valid until the next call on this thread.
 */
const char *hfreduceGetLastError(hfreduceComm_t comm);
/* The same as facts; comm NULL: this thread's last error. */
hfreduceResult_t hfreduceGetErrorInfo(hfreduceComm_t comm, hfreduceErrorInfo_t *info);
/* Number of parameters, and the i-th. InvalidArgument past the end. */
int hfreduceParamCount(void);
hfreduceResult_t hfreduceParamGet(int index, hfreduceParam_t *param);
/* Number of datatypes, and the i-th. InvalidArgument past the end. */
int hfreduceTypeCount(void);
hfreduceResult_t hfreduceTypeGet(int index, hfreduceType_t *type);
/* What was built and what this machine has, one "key: value" a line; returns the length it needs, writes at most size bytes. */
size_t hfreduceDescribe(char *text, size_t size);

/* A line for the library's log (HFREDUCE_DEBUG, HFREDUCE_DEBUG_FILE). */
void hfreduceLog(hfreduceLogLevel_t level, const char *text);

/* --- communicators --- */
/* Make a name for a new communicator and listen for its ranks in this process, until they have all come or the process ends. */
hfreduceResult_t hfreduceGetUniqueId(hfreduceUniqueId *id);
/* As above, but restricted to this machine: listens on loopback only. */
hfreduceResult_t hfreduceGetUniqueIdLocal(hfreduceUniqueId *id);
/* The name that every rank can make by itself: rank 0 listens on address ("host:port", "[v6]:port"), secret is hex (NULL or "":
   only a loopback address is accepted). tag distinguishes communicators made with one address and secret. Listening starts in
   CommInitRank on rank 0. */
hfreduceResult_t hfreduceUniqueIdFromAddress(hfreduceUniqueId *id, const char *address, const char *secret, uint64_t tag);
/* Join. Returns when all ranks have joined. Collective. */
hfreduceResult_t hfreduceCommInitRank(hfreduceComm_t *comm, int nranks, hfreduceUniqueId id, int rank);
hfreduceResult_t hfreduceCommInitRankConfig(hfreduceComm_t *comm, int nranks, hfreduceUniqueId id, int rank,
                                            hfreduceConfig_t *config);
/* Fill config with the defaults. */
void hfreduceConfigInit(hfreduceConfig_t *config);
/* Make new communicators, one a color, ranks ordered by (key, rank). color -1: take part in the call but in no group; *newcomm is
   then NULL. config NULL: inherit;
   its timeout 0 and device -1 are comm's. Collective over comm. */
hfreduceResult_t hfreduceCommSplit(hfreduceComm_t comm, int color, int key, hfreduceComm_t *newcomm, hfreduceConfig_t *config);
/* Make a communicator of comm's ranks without the nexclude that exclude lists; they keep their order. Collective over those that
   stay, who all give the same list; the others do not call. Needs nothing of comm but who its ranks are, so it works after a rank
   has died or comm was aborted. flags: hfreduceShrinkAbort ends comm's operations first, as hfreduceCommAbort does. config NULL:
   inherit. comm stays, to be destroyed. */
hfreduceResult_t hfreduceCommShrink(hfreduceComm_t comm, const int *exclude, int nexclude, hfreduceComm_t *newcomm,
                                    hfreduceConfig_t *config, int flags);
/* Operations that were issued on comm and have not ended. May be called beside them. */
hfreduceResult_t hfreduceCommPending(hfreduceComm_t comm, int *count);
/* Wait for what was issued. With a patience (below): hfreduceInProgress when it has not ended by then; call again. */
hfreduceResult_t hfreduceCommFinalize(hfreduceComm_t comm);
/* The first half of Destroy, for callers with a patience: wait for what was issued, 30 s at most since the first call; what then
   still runs is given up, with a warning. hfreduceInProgress when the patience is over; call again. Own addition. */
hfreduceResult_t hfreduceCommLeave(hfreduceComm_t comm);
/* Wait for what was issued, as Leave but for all of the 30 s; leave, free. Never fails on a broken communicator. Not collective,
   but peers that still wait for this rank get an error. A call of another thread that waits for other ranks (a blocking call, a
   split) is broken off by hfreduceAborted, here and on all ranks. */
hfreduceResult_t hfreduceCommDestroy(hfreduceComm_t comm);
/* End every wait on comm, here and on all ranks, with hfreduceAborted. The handle stays valid until hfreduceCommDestroy. */
hfreduceResult_t hfreduceCommAbort(hfreduceComm_t comm);
/* The communicator's state: hfreduceSuccess, or the error that broke it. */
hfreduceResult_t hfreduceCommGetAsyncError(hfreduceComm_t comm, hfreduceResult_t *error);
hfreduceResult_t hfreduceCommCount(hfreduceComm_t comm, int *count);
hfreduceResult_t hfreduceCommUserRank(hfreduceComm_t comm, int *rank);
/* Where this process listens for the communicator's ranks: "host:port", "[v6]:port", on the interface that was chosen, or on
   loopback. text has room for size bytes (80 are enough), the end included. */
hfreduceResult_t hfreduceCommGetAddress(hfreduceComm_t comm, char *text, size_t size);
/* The device that the communicator is bound to by its first call with device memory or a stream; -1: none. */
hfreduceResult_t hfreduceCommCuDevice(hfreduceComm_t comm, int *device);
hfreduceResult_t hfreduceCommGetInfo(hfreduceComm_t comm, hfreduceCommInfo_t *info);
/* Peers with which this rank has exchanged something; grows as operations need them. These two may be called beside a running
 * operation. */
hfreduceResult_t hfreduceCommConnectionCount(hfreduceComm_t comm, int *count);
/* The index-th of them, in the order in which they came. */
hfreduceResult_t hfreduceCommGetConnection(hfreduceComm_t comm, int index, hfreduceConnection_t *connection);
/* The deadline in seconds for operations issued from now on. */
hfreduceResult_t hfreduceCommSetTimeout(hfreduceComm_t comm, double seconds);
/* A blocking call, or the end of a group of calls on such communicators, that has not ended after so many seconds (0, the
   default: wait on) returns hfreduceInProgress; the operation goes on, and its buffers must live until then. So a caller can look
   at its signals now and then. It may return so earlier when another thread issues a call on the same communicator. Until the
   operation has ended, collectives of other threads overlap with it. */
hfreduceResult_t hfreduceCommSetPatience(hfreduceComm_t comm, double seconds);
/* The work of this thread's blocking call that returned hfreduceInProgress. Once. */
hfreduceResult_t hfreduceTakeWork(hfreduceWork_t *work);

/* --- collectives: count is in elements; any alignment; see NCCL for the in-place rules, which hold here. count 0 is legal and
   still checked against the other ranks. --- */
hfreduceResult_t hfreduceAllReduce(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype,
                                   hfreduceRedOp_t op, hfreduceComm_t comm, hfreduceStream_t stream);
hfreduceResult_t hfreduceReduce(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype,
                                hfreduceRedOp_t op, int root, hfreduceComm_t comm, hfreduceStream_t stream);
hfreduceResult_t hfreduceBroadcast(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype, int root,
                                   hfreduceComm_t comm, hfreduceStream_t stream);
hfreduceResult_t hfreduceBcast(void *buff, size_t count, hfreduceDataType_t datatype, int root, hfreduceComm_t comm,
                               hfreduceStream_t stream);
/* recvbuff holds nranks * sendcount. */
hfreduceResult_t hfreduceAllGather(const void *sendbuff, void *recvbuff, size_t sendcount, hfreduceDataType_t datatype,
                                   hfreduceComm_t comm, hfreduceStream_t stream);
/* sendbuff holds nranks * recvcount. */
hfreduceResult_t hfreduceReduceScatter(const void *sendbuff, void *recvbuff, size_t recvcount, hfreduceDataType_t datatype,
                                       hfreduceRedOp_t op, hfreduceComm_t comm, hfreduceStream_t stream);
/* Both buffers hold nranks * count. In place is legal (NCCL's is not) and takes a temporary copy. */
hfreduceResult_t hfreduceAlltoAll(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype,
                                  hfreduceComm_t comm, hfreduceStream_t stream);
/* Uneven: counts and displacements are arrays of nranks elements, in elements. Buffers must not overlap. */
hfreduceResult_t hfreduceAlltoAllv(const void *sendbuff, const size_t *sendcounts, const size_t *senddispls, void *recvbuff,
                                   const size_t *recvcounts, const size_t *recvdispls, hfreduceDataType_t datatype,
                                   hfreduceComm_t comm, hfreduceStream_t stream);
/* recvbuff (root only) holds nranks * count. */
hfreduceResult_t hfreduceGather(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype, int root,
                                hfreduceComm_t comm, hfreduceStream_t stream);
/* sendbuff (root only) holds nranks * count. */
hfreduceResult_t hfreduceScatter(const void *sendbuff, void *recvbuff, size_t count, hfreduceDataType_t datatype, int root,
                                 hfreduceComm_t comm, hfreduceStream_t stream);
/* A send may wait for its receive, which must have its count and datatype. These two are the ones below with tag 0. */
hfreduceResult_t hfreduceSend(const void *sendbuff, size_t count, hfreduceDataType_t datatype, int peer, hfreduceComm_t comm,
                              hfreduceStream_t stream);
hfreduceResult_t hfreduceRecv(void *recvbuff, size_t count, hfreduceDataType_t datatype, int peer, hfreduceComm_t comm,
                              hfreduceStream_t stream);
/* With a tag, from 0 on: a receive takes the messages of its peer and tag in the order in which they were sent; messages with
   other tags do not stand in its way, but are kept on the heap if they must be taken first to get at it. A message that fits
   several receives goes to the one posted first. As MPI matches. Own additions. */
hfreduceResult_t hfreduceSendTag(const void *sendbuff, size_t count, hfreduceDataType_t datatype, int peer, int tag,
                                 hfreduceComm_t comm, hfreduceStream_t stream);
hfreduceResult_t hfreduceRecvTag(void *recvbuff, size_t count, hfreduceDataType_t datatype, int peer, int tag,
                                 hfreduceComm_t comm, hfreduceStream_t stream);
/* From whichever rank sends with this tag, this one too. *source (unless NULL) is that rank: written before the call returns or
   its work is done, and it must live until then. */
hfreduceResult_t hfreduceRecvAny(void *recvbuff, size_t count, hfreduceDataType_t datatype, int tag, int *source,
                                 hfreduceComm_t comm, hfreduceStream_t stream);
hfreduceResult_t hfreduceBarrier(hfreduceComm_t comm, hfreduceStream_t stream);

/* An op that multiplies this rank's input by *scalar (of the datatype; float32 for fp8) before summing. Local; each rank may have
   its own factor. hfreduceScalarHostImmediate: read now. hfreduceScalarDevice: read by each call that takes the op; in memory
   that a device reaches when the operation runs, and it must live until then. An op may be destroyed as soon as the calls that
   take it have returned. */
hfreduceResult_t hfreduceRedOpCreatePreMulSum(hfreduceRedOp_t *op, void *scalar, hfreduceDataType_t datatype,
                                              hfreduceScalarResidence_t residence, hfreduceComm_t comm);
hfreduceResult_t hfreduceRedOpDestroy(hfreduceRedOp_t op, hfreduceComm_t comm);

/* --- groups: calls between Start and End of a thread are launched together by the outermost End. --- */
hfreduceResult_t hfreduceGroupStart(void);
/* Launch, and wait for the calls that no stream orders. */
hfreduceResult_t hfreduceGroupEnd(void);
/* The open group of this thread has come to nothing: its calls are forgotten, those that follow too, and the outermost End
   returns `result` (not hfreduceSuccess). InvalidUsage outside a group. */
hfreduceResult_t hfreduceGroupCancel(hfreduceResult_t result);
/* Launch; *work stands for all calls of the group (also a group of one: that is how one call is made asynchronous). The buffers
   must live until the work is done. */
hfreduceResult_t hfreduceGroupEndAsync(hfreduceWork_t *work);

/* --- work --- */
/* Wait at most `timeout` seconds (< 0: until the operation's own deadline). hfreduceInProgress if it passed: the operation goes
 * on. */
hfreduceResult_t hfreduceWorkWait(hfreduceWork_t work, double timeout);
/* *done = 1 when it has ended, well or badly. Returns the operation's error, if any. */
hfreduceResult_t hfreduceWorkTest(hfreduceWork_t work, int *done);
/* The facts of its error; code 0 if none. */
hfreduceResult_t hfreduceWorkErrorInfo(hfreduceWork_t work, hfreduceErrorInfo_t *info);
/* Give the handle back. An operation that still runs goes on. */
hfreduceResult_t hfreduceWorkDestroy(hfreduceWork_t work);

/* --- completion queues: for threads that wait for whichever work ends next. Any number of threads may pop. --- */
hfreduceResult_t hfreduceCompletionQueueCreate(hfreduceCompletionQueue_t *queue);
/* Put token into queue when work has ended, well or badly; at once if it has. Once a work. The queue outlives the work's
 * operation. */
hfreduceResult_t hfreduceWorkNotify(hfreduceWork_t work, hfreduceCompletionQueue_t queue, uint64_t token);
/* Take the oldest token; wait for one at most `timeout` seconds (< 0: for ever). hfreduceInProgress if none came, hfreduceAborted
 * if the queue is closed and empty. */
hfreduceResult_t hfreduceCompletionQueuePop(hfreduceCompletionQueue_t queue, double timeout, uint64_t *token);
/* End the waits of those who pop, now and from now on. */
hfreduceResult_t hfreduceCompletionQueueClose(hfreduceCompletionQueue_t queue);
/* Only when nobody pops and no notified work is unfinished. */
hfreduceResult_t hfreduceCompletionQueueDestroy(hfreduceCompletionQueue_t queue);

/* --- memory that is cheap to communicate from: page-aligned, huge pages where the system grants them --- */
hfreduceResult_t hfreduceMemAlloc(void **ptr, size_t size);
/* Memory of the thread's current device (none chosen: device 0), as ncclMemAlloc gives it; where there is none, as above. */
hfreduceResult_t hfreduceDeviceMemAlloc(void **ptr, size_t size);
/* The thread's current device, as above; -1: the program has initialised none. */
hfreduceResult_t hfreduceDeviceGetCurrent(int *device);
/* Takes what either gave. */
hfreduceResult_t hfreduceMemFree(void *ptr);

/* --- streams beside the caller's own: never one that others are given in turn, and that a wait in it would hold up --- */
/* A stream of the device's default context, with nothing in it, for one caller until it is put. It is never destroyed.
   InvalidUsage where there is no driver. Any thread; also while streams are captured. */
hfreduceResult_t hfreduceStreamGet(hfreduceStream_t *stream, int device);
/* Give it back, also with work in it. InvalidArgument for any other stream. */
hfreduceResult_t hfreduceStreamPut(hfreduceStream_t stream);

/* ---- [cffi end] ---- */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
