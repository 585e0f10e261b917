/* Every HFREDUCE_ parameter, in one table: name, kind, preset, bounds, meaning. Values are read from the environment at first use
   and do not change afterwards (hfr_param_reload is for tests). A malformed or out-of-range value is warned of once and the
   preset (or nearest bound) taken. Sizes take suffixes K, M, G (1024-based). */
#ifndef HFR_BASE_PARAM_H_
#define HFR_BASE_PARAM_H_
#include <stdint.h>

/* X(id, name, kind, preset, min, max, help): kind INT, SIZE, REAL or TEXT. The NCCL spelling (NCCL_ for HFREDUCE_) of entries
   whose id is in HFR_PARAM_NCCL_ALIASES in param.c is understood when ours is unset. */
#define HFR_PARAMS(X)                                                                                                            \
  X(RANK, "HFREDUCE_RANK", INT, "-1", -1, 1000000, "rank of this process for init() (-1: from the launcher)")                    \
  X(NRANKS, "HFREDUCE_NRANKS", INT, "-1", -1, 1000000, "number of ranks for init() (-1: from the launcher)")                     \
  X(ADDR, "HFREDUCE_ADDR", TEXT, "", 0, 0, "host:port on which rank 0 listens")                                                  \
  X(SECRET, "HFREDUCE_SECRET", TEXT, "", 0, 0, "shared secret in hex; without it HFREDUCE_ADDR must be a loopback address")      \
  X(HOSTID, "HFREDUCE_HOSTID", TEXT, "", 0, 0, "overrides what tells nodes apart (boot id and network namespace)")               \
  X(TIMEOUT, "HFREDUCE_TIMEOUT", REAL, "1800", 0, 1000000, "seconds that an operation may take")                                 \
  X(JOIN_TIMEOUT, "HFREDUCE_JOIN_TIMEOUT", REAL, "300", 0, 1000000,                                                              \
    "seconds that init, split and shrink may take; a shorter timeout of the operations holds for them too")                      \
  X(WARN_AFTER, "HFREDUCE_WARN_AFTER", REAL, "10", 0, 1000000,                                                                   \
    "seconds after which a wait says whom it waits for, and again at doubling intervals (0: never)")                             \
  X(HEARTBEAT, "HFREDUCE_HEARTBEAT", REAL, "8", 0, 100000,                                                                       \
    "seconds of silence after which a peer counts as lost (0: never; else at least 0.5)")                                        \
  X(SOCKET_IFNAME, "HFREDUCE_SOCKET_IFNAME", TEXT, "", 0, 0, "interfaces by prefix; ^a,b excludes, =a,b is exact")               \
  X(SOCKET_FAMILY, "HFREDUCE_SOCKET_FAMILY", TEXT, "", 0, 0, "AF_INET or AF_INET6: addresses to prefer")                         \
  X(TCP_STREAMS, "HFREDUCE_TCP_STREAMS", INT, "1", 1, 16, "TCP connections a channel between two ranks")                         \
  X(TCP_BUFFER, "HFREDUCE_TCP_BUFFER", SIZE, "0", 0, 1073741824, "socket buffer in bytes (0: the system's autotuning)")          \
  X(CHECKSUM, "HFREDUCE_CHECKSUM", INT, "1", 0, 1, "1: CRC32C on every message over TCP")                                        \
  X(TRANSPORT, "HFREDUCE_TRANSPORT", TEXT, "", 0, 0, "transports between nodes, in order of preference (empty: automatic)")      \
  X(IB_HCA, "HFREDUCE_IB_HCA", TEXT, "", 0, 0, "RDMA ports by device prefix; ^a,b excludes, =a is exact, a:1 is port 1 of a")    \
  X(IB_GID_INDEX, "HFREDUCE_IB_GID_INDEX", INT, "-1", -1, 1023,                                                                  \
    "GID of the RDMA port (-1: RoCE v2 with an IPv4 address first; not for InfiniBand)")                                         \
  X(IB_SL, "HFREDUCE_IB_SL", INT, "0", 0, 15, "service level of RDMA connections")                                               \
  X(IB_TC, "HFREDUCE_IB_TC", INT, "0", 0, 255, "traffic class of RDMA connections (RoCE: the IP header's)")                      \
  X(IB_TIMEOUT, "HFREDUCE_IB_TIMEOUT", INT, "18", 1, 31, "RDMA acknowledge timeout: 4.096 us times two to the power of this")    \
  X(IB_RETRY_CNT, "HFREDUCE_IB_RETRY_CNT", INT, "7", 0, 7, "how often an unacknowledged RDMA packet is sent again")              \
  X(IB_QPS_PER_CONNECTION, "HFREDUCE_IB_QPS_PER_CONNECTION", INT, "1", 1, 16, "queue pairs an RDMA connection")                  \
  X(IB_PCI_RELAXED_ORDERING, "HFREDUCE_IB_PCI_RELAXED_ORDERING", INT, "2", 0, 2,                                                 \
    "PCI relaxed ordering: 0 no, 1 and 2 if offered")                                                                            \
  X(IB_PKEY, "HFREDUCE_IB_PKEY", INT, "0", 0, 65535, "index of the RDMA port's partition key")                                   \
  X(IB_MTU, "HFREDUCE_IB_MTU", INT, "0", 0, 4096, "largest RDMA packet in bytes: 256 to 4096 (0: the port's)")                   \
  X(IB_CACHE, "HFREDUCE_IB_CACHE", SIZE, "1G", 0, 1099511627776,                                                                 \
    "bytes of buffers that stay registered for RDMA between operations (0: always copied)")                                      \
  X(IB_FAILOVER, "HFREDUCE_IB_FAILOVER", INT, "1", 0, 1, "1: an RDMA connection whose port fails goes on over another port")     \
  X(CUDA, "HFREDUCE_CUDA", INT, "1", 0, 1, "0: leave CUDA alone; device memory and streams are then refused")                    \
  X(CUDA_MEMOPS, "HFREDUCE_CUDA_MEMOPS", INT, "1", 0, 1, "0: host functions instead of stream memory operations")                \
  X(CUDA_SEGMENT, "HFREDUCE_CUDA_SEGMENT", SIZE, "2M", 65536, 1073741824, "most bytes that a device copies at once")             \
  X(CUDA_SEGMENTS, "HFREDUCE_CUDA_SEGMENTS", INT, "4", 2, 64,                                                                    \
    "segments of pinned memory each way, a communicator with a device")                                                          \
  X(GDR_MAX, "HFREDUCE_GDR_MAX", SIZE, "8K", 0, 1048576,                                                                         \
    "device memory of at most so many bytes is copied by CPUs, through GDRCopy where it is installed (0: never)")                \
  X(NVLINK, "HFREDUCE_NVLINK", INT, "0", 0, 1, "1: GPUs that NVLink joins reduce in pairs; not run on hardware yet")             \
  X(NVLINK_MIN, "HFREDUCE_NVLINK_MIN", SIZE, "256K", 4096, 1099511627776,                                                        \
    "bytes from which all_reduce uses pairs of GPUs joined by NVLink (rank 0's holds)")                                          \
  X(NVLINK_BLOCKS, "HFREDUCE_NVLINK_BLOCKS", INT, "8", 1, 1024,                                                                  \
    "blocks of 512 threads that reduce in a pair: what it takes of the GPU")                                                     \
  X(CHUNK, "HFREDUCE_CHUNK", SIZE, "131072", 4096, 16777216, "bytes of a staging slot, the unit of pipelining (rank 0's holds)") \
  X(SLOTS, "HFREDUCE_SLOTS", INT, "0", 0, 64, "staging slots a rank (0: twice its second-level cache; rank 0's holds)")          \
  X(ALGO, "HFREDUCE_ALGO", TEXT, "", 0, 0,                                                                                       \
    "network algorithm: tree, direct or ring; empty: the tree for more than 8 nodes or less than 4 KiB a node, for all_reduce "  \
    "between 3 nodes or more of one rank each the ring from 8 chunks a node on, else direct (rank 0's holds)")                   \
  X(SPIN, "HFREDUCE_SPIN", INT, "-1", -1, 1000000000, "polls before a wait yields and sleeps (-1: by ranks and cores)")          \
  X(SIMD, "HFREDUCE_SIMD", TEXT, "", 0, 0, "scalar, avx2, avx512 or neon: the level to use at most (empty: the best there is)")  \
  X(RAISE_NOFILE, "HFREDUCE_RAISE_NOFILE", INT, "1", 0, 1,                                                                       \
    "1: the process may open as many descriptors as the hard limit says; 0: as the soft one does")                               \
  X(DEBUG, "HFREDUCE_DEBUG", TEXT, "WARN", 0, 0, "log level: NONE, WARN, INFO, TRACE")                                           \
  X(DEBUG_FILE, "HFREDUCE_DEBUG_FILE", TEXT, "", 0, 0, "file for log lines; %h is the host, %p the process id")

enum hfr_param {
#define HFR_PARAM_ID(id, name, kind, preset, min, max, help) HFR_PARAM_##id,
  HFR_PARAMS(HFR_PARAM_ID)
#undef HFR_PARAM_ID
      HFR_PARAM_COUNT
};

/* Value of an INT or SIZE parameter. */
int64_t hfr_param_int(enum hfr_param id);
double hfr_param_real(enum hfr_param id);
/* Value of a TEXT parameter; "" when unset. Lives as long as the process. */
const char *hfr_param_text(enum hfr_param id);
/* As the public hfreduceParam_t wants it. */
const char *hfr_param_name(enum hfr_param id);
const char *hfr_param_value(enum hfr_param id);
const char *hfr_param_preset(enum hfr_param id);
const char *hfr_param_help(enum hfr_param id);
int hfr_param_is_set(enum hfr_param id);
/* NCCL's name for it; NULL: none. */
const char *hfr_param_alias(enum hfr_param id);
/* Read the environment again (tests only; not thread-safe). */
void hfr_param_reload(void);
#endif
