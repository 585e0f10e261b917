/*
 * CUDA's driver library, found at run time. Declarations are our own, with the values and signatures of cuda.h, so that no
 * toolkit is needed to build; tests compare them with NVIDIA's header where it is at hand.
 *
 * Loading the library initialises nothing: no context and no device memory exist before a program asks for them.
 */
#ifndef HFR_DEVICE_CUDA_LIB_H_
#define HFR_DEVICE_CUDA_LIB_H_
#include <stddef.h>
#include <stdint.h>

typedef int hfr_cu_result; /* CUresult */
typedef int hfr_cu_device;
typedef uintptr_t hfr_cu_ptr; /* CUdeviceptr */
typedef struct CUctx_st *hfr_cu_context;
typedef struct CUstream_st *hfr_cu_stream;
typedef struct CUevent_st *hfr_cu_event;
typedef struct CUgraph_st *hfr_cu_graph;
typedef struct CUgraphNode_st *hfr_cu_node;
typedef struct CUuserObject_st *hfr_cu_object;
typedef struct CUmod_st *hfr_cu_module;
typedef struct CUfunc_st *hfr_cu_function;
typedef void (*hfr_cu_host_fn)(void *arg);

enum {
  HFR_CU_SUCCESS = 0,
  HFR_CU_INVALID_VALUE = 1,
  HFR_CU_OUT_OF_MEMORY = 2,
  HFR_CU_NOT_INITIALIZED = 3,
  HFR_CU_DEINITIALIZED = 4,
  HFR_CU_NO_DEVICE = 100,
  HFR_CU_INVALID_DEVICE = 101,
  HFR_CU_INVALID_CONTEXT = 201,
  HFR_CU_INVALID_HANDLE = 400,
  HFR_CU_NOT_READY = 600,
  HFR_CU_PEER_ACCESS_ALREADY_ENABLED = 704,
  HFR_CU_CONTEXT_IS_DESTROYED = 709,
  HFR_CU_HOST_MEMORY_ALREADY_REGISTERED = 712,
  HFR_CU_HOST_MEMORY_NOT_REGISTERED = 713,
  HFR_CU_NOT_PERMITTED = 800,
  HFR_CU_NOT_SUPPORTED = 801,
  HFR_CU_CAPTURE_UNSUPPORTED = 900,
  HFR_CU_CAPTURE_INVALIDATED = 901,
  HFR_CU_CAPTURE_MERGE = 902,
  HFR_CU_CAPTURE_UNMATCHED = 903,
  HFR_CU_CAPTURE_UNJOINED = 904,
  HFR_CU_CAPTURE_ISOLATION = 905,
  HFR_CU_CAPTURE_IMPLICIT = 906,
};

enum { /* CUdevice_attribute */
       HFR_CU_ATTR_PCI_BUS = 33,
       HFR_CU_ATTR_PCI_DEVICE = 34,
       HFR_CU_ATTR_COPY_ENGINES = 40,
       HFR_CU_ATTR_PCI_DOMAIN = 50,
       HFR_CU_ATTR_CAPABILITY_MAJOR = 75,
       HFR_CU_ATTR_CAPABILITY_MINOR = 76,
       HFR_CU_ATTR_MEM_OPS_V1 = 92,
       HFR_CU_ATTR_FLUSH_REMOTE_WRITES = 98,
};

enum { HFR_CU_P2P_ACCESS = 2, HFR_CU_P2P_ATOMICS = 3 }; /* CUdevice_P2PAttribute */

enum { /* CUpointer_attribute */
       HFR_CU_POINTER_CONTEXT = 1,
       HFR_CU_POINTER_MEMORY_TYPE = 2,
       HFR_CU_POINTER_SYNC_MEMOPS = 6,
       HFR_CU_POINTER_BUFFER_ID = 7,
       HFR_CU_POINTER_IS_MANAGED = 8,
       HFR_CU_POINTER_DEVICE_ORDINAL = 9,
       HFR_CU_POINTER_RANGE_START = 11,
       HFR_CU_POINTER_RANGE_SIZE = 12,
};

enum { HFR_CU_MEMORY_HOST = 1, HFR_CU_MEMORY_DEVICE = 2, HFR_CU_MEMORY_UNIFIED = 4 };
enum { HFR_CU_EVENT_DISABLE_TIMING = 2 };
enum { HFR_CU_STREAM_NON_BLOCKING = 1 };
enum { HFR_CU_HOST_PORTABLE = 1, HFR_CU_HOST_DEVICEMAP = 2 };
enum { HFR_CU_WAIT_GEQ = 0, HFR_CU_WAIT_FLUSH = 1 << 30, HFR_CU_WRITE_DEFAULT = 0 };
enum { HFR_CU_CAPTURE_NONE = 0, HFR_CU_CAPTURE_ACTIVE = 1, HFR_CU_CAPTURE_BROKEN = 2 };
enum { HFR_CU_MODE_GLOBAL = 0, HFR_CU_MODE_THREAD_LOCAL = 1, HFR_CU_MODE_RELAXED = 2 };
enum { HFR_CU_OBJECT_NO_SYNC = 1, HFR_CU_OBJECT_MOVE = 1 };
enum { HFR_CU_PROC_LEGACY_STREAM = 1 };
enum { HFR_CU_IPC_LAZY_PEER_ACCESS = 1 };
#define HFR_CU_LEGACY ((hfr_cu_stream)1)
#define HFR_CU_PER_THREAD ((hfr_cu_stream)2)

struct hfr_cu_copy2d { /* CUDA_MEMCPY2D */
  size_t src_x, src_y;
  int src_type;
  const void *src_host;
  hfr_cu_ptr src_device;
  void *src_array;
  size_t src_pitch;
  size_t dst_x, dst_y;
  int dst_type;
  void *dst_host;
  hfr_cu_ptr dst_device;
  void *dst_array;
  size_t dst_pitch;
  size_t width, height;
};

struct hfr_cu_ipc { /* CUipcMemHandle */
  char reserved[64];
};

/* X(member, name, symbol where there is no cuGetProcAddress, parameters): every function gives a CUresult. */
#define HFR_CU_FUNCTIONS(X)                                                                                                      \
  X(init, "cuInit", "cuInit", (unsigned flags))                                                                                  \
  X(driver_version, "cuDriverGetVersion", "cuDriverGetVersion", (int *version))                                                  \
  X(error_name, "cuGetErrorName", "cuGetErrorName", (hfr_cu_result error, const char **text))                                    \
  X(error_string, "cuGetErrorString", "cuGetErrorString", (hfr_cu_result error, const char **text))                              \
  X(device_count, "cuDeviceGetCount", "cuDeviceGetCount", (int *count))                                                          \
  X(device_get, "cuDeviceGet", "cuDeviceGet", (hfr_cu_device * device, int ordinal))                                             \
  X(device_name, "cuDeviceGetName", "cuDeviceGetName", (char *name, int size, hfr_cu_device device))                             \
  X(device_memory, "cuDeviceTotalMem", "cuDeviceTotalMem_v2", (size_t * bytes, hfr_cu_device device))                            \
  X(device_attribute, "cuDeviceGetAttribute", "cuDeviceGetAttribute", (int *value, int attribute, hfr_cu_device device))         \
  X(primary_retain, "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain", (hfr_cu_context * context, hfr_cu_device device))    \
  X(primary_release, "cuDevicePrimaryCtxRelease", "cuDevicePrimaryCtxRelease_v2", (hfr_cu_device device))                        \
  X(context_push, "cuCtxPushCurrent", "cuCtxPushCurrent_v2", (hfr_cu_context context))                                           \
  X(context_pop, "cuCtxPopCurrent", "cuCtxPopCurrent_v2", (hfr_cu_context * context))                                            \
  X(context_current, "cuCtxGetCurrent", "cuCtxGetCurrent", (hfr_cu_context * context))                                           \
  X(context_id, "cuCtxGetId", "cuCtxGetId", (hfr_cu_context context, unsigned long long *id))                                    \
  X(context_device, "cuCtxGetDevice", "cuCtxGetDevice", (hfr_cu_device * device))                                                \
  X(pointer_attributes, "cuPointerGetAttributes", "cuPointerGetAttributes",                                                      \
    (unsigned count, int *attributes, void **data, hfr_cu_ptr pointer))                                                          \
  X(pointer_set, "cuPointerSetAttribute", "cuPointerSetAttribute", (const void *value, int attribute, hfr_cu_ptr pointer))       \
  X(mem_alloc, "cuMemAlloc", "cuMemAlloc_v2", (hfr_cu_ptr * pointer, size_t bytes))                                              \
  X(mem_free, "cuMemFree", "cuMemFree_v2", (hfr_cu_ptr pointer))                                                                 \
  X(host_register, "cuMemHostRegister", "cuMemHostRegister_v2", (void *memory, size_t bytes, unsigned flags))                    \
  X(host_unregister, "cuMemHostUnregister", "cuMemHostUnregister", (void *memory))                                               \
  X(host_device_pointer, "cuMemHostGetDevicePointer", "cuMemHostGetDevicePointer_v2",                                            \
    (hfr_cu_ptr * pointer, void *memory, unsigned flags))                                                                        \
  X(copy, "cuMemcpy", "cuMemcpy", (hfr_cu_ptr to, hfr_cu_ptr from, size_t bytes))                                                \
  X(copy_async, "cuMemcpyAsync", "cuMemcpyAsync", (hfr_cu_ptr to, hfr_cu_ptr from, size_t bytes, hfr_cu_stream stream))          \
  X(copy_2d_async, "cuMemcpy2DAsync", "cuMemcpy2DAsync_v2", (const struct hfr_cu_copy2d *copy, hfr_cu_stream stream))            \
  X(set_async, "cuMemsetD32Async", "cuMemsetD32Async", (hfr_cu_ptr pointer, unsigned value, size_t count, hfr_cu_stream stream)) \
  X(priority_range, "cuCtxGetStreamPriorityRange", "cuCtxGetStreamPriorityRange", (int *least, int *greatest))                   \
  X(stream_create, "cuStreamCreateWithPriority", "cuStreamCreateWithPriority",                                                   \
    (hfr_cu_stream * stream, unsigned flags, int priority))                                                                      \
  X(stream_destroy, "cuStreamDestroy", "cuStreamDestroy_v2", (hfr_cu_stream stream))                                             \
  X(stream_query, "cuStreamQuery", "cuStreamQuery", (hfr_cu_stream stream))                                                      \
  X(stream_context, "cuStreamGetCtx", "cuStreamGetCtx", (hfr_cu_stream stream, hfr_cu_context * context))                        \
  X(stream_wait_event, "cuStreamWaitEvent", "cuStreamWaitEvent", (hfr_cu_stream stream, hfr_cu_event event, unsigned flags))     \
  X(stream_capturing, "cuStreamIsCapturing", "cuStreamIsCapturing", (hfr_cu_stream stream, int *status))                         \
  X(capture_info, "cuStreamGetCaptureInfo", "cuStreamGetCaptureInfo_v2",                                                         \
    (hfr_cu_stream stream, int *status, uint64_t *id, hfr_cu_graph *graph, const hfr_cu_node **nodes, size_t *count))            \
  X(capture_mode, "cuThreadExchangeStreamCaptureMode", "cuThreadExchangeStreamCaptureMode", (int *mode))                         \
  X(stream_wait_value, "cuStreamWaitValue32", "cuStreamWaitValue32_v2",                                                          \
    (hfr_cu_stream stream, hfr_cu_ptr address, uint32_t value, unsigned flags))                                                  \
  X(stream_write_value, "cuStreamWriteValue32", "cuStreamWriteValue32_v2",                                                       \
    (hfr_cu_stream stream, hfr_cu_ptr address, uint32_t value, unsigned flags))                                                  \
  X(launch_host_fn, "cuLaunchHostFunc", "cuLaunchHostFunc", (hfr_cu_stream stream, hfr_cu_host_fn function, void *arg))          \
  X(event_create, "cuEventCreate", "cuEventCreate", (hfr_cu_event * event, unsigned flags))                                      \
  X(event_destroy, "cuEventDestroy", "cuEventDestroy_v2", (hfr_cu_event event))                                                  \
  X(event_query, "cuEventQuery", "cuEventQuery", (hfr_cu_event event))                                                           \
  X(event_record, "cuEventRecord", "cuEventRecord", (hfr_cu_event event, hfr_cu_stream stream))                                  \
  X(object_create, "cuUserObjectCreate", "cuUserObjectCreate",                                                                   \
    (hfr_cu_object * object, void *value, hfr_cu_host_fn destroy, unsigned references, unsigned flags))                          \
  X(object_release, "cuUserObjectRelease", "cuUserObjectRelease", (hfr_cu_object object, unsigned count))                        \
  X(graph_retain, "cuGraphRetainUserObject", "cuGraphRetainUserObject",                                                          \
    (hfr_cu_graph graph, hfr_cu_object object, unsigned count, unsigned flags))                                                  \
  X(p2p_attribute, "cuDeviceGetP2PAttribute", "cuDeviceGetP2PAttribute",                                                         \
    (int *value, int attribute, hfr_cu_device from, hfr_cu_device to))                                                           \
  X(peer_enable, "cuCtxEnablePeerAccess", "cuCtxEnablePeerAccess", (hfr_cu_context peer, unsigned flags))                        \
  X(ipc_get, "cuIpcGetMemHandle", "cuIpcGetMemHandle", (struct hfr_cu_ipc * handle, hfr_cu_ptr pointer))                         \
  X(ipc_open, "cuIpcOpenMemHandle", "cuIpcOpenMemHandle_v2", (hfr_cu_ptr * pointer, struct hfr_cu_ipc handle, unsigned flags))   \
  X(ipc_close, "cuIpcCloseMemHandle", "cuIpcCloseMemHandle", (hfr_cu_ptr pointer))                                               \
  X(module_load, "cuModuleLoadData", "cuModuleLoadData", (hfr_cu_module * module, const void *image))                            \
  X(module_function, "cuModuleGetFunction", "cuModuleGetFunction",                                                               \
    (hfr_cu_function * function, hfr_cu_module module, const char *name))                                                        \
  X(function_load, "cuFuncLoad", "cuFuncLoad", (hfr_cu_function function))                                                       \
  X(launch, "cuLaunchKernel", "cuLaunchKernel",                                                                                  \
    (hfr_cu_function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,            \
     unsigned block_z, unsigned shared, hfr_cu_stream stream, void **parameters, void **extra))

/* Without these the device layer works, but the features that need them do not: NULL then. */
#define HFR_CU_OPTIONAL(X) \
  X(context_id)            \
  X(priority_range)        \
  X(pointer_set)           \
  X(stream_wait_value)     \
  X(stream_write_value)    \
  X(capture_info)          \
  X(capture_mode)          \
  X(object_create)         \
  X(object_release)        \
  X(graph_retain)          \
  X(p2p_attribute)         \
  X(peer_enable)           \
  X(ipc_get)               \
  X(ipc_open)              \
  X(ipc_close)             \
  X(module_load)           \
  X(module_function)       \
  X(function_load)         \
  X(launch)

struct hfr_cu {
#define HFR_CU_MEMBER(member, name, symbol, parameters) hfr_cu_result(*member) parameters;
  HFR_CU_FUNCTIONS(HFR_CU_MEMBER)
#undef HFR_CU_MEMBER
  int version; /* the driver's: 1000 * major + 10 * minor */
};

/* NULL: *why says why there is none; it lives as long as the process. Any thread. */
const struct hfr_cu *hfr_cu_load(const char **why);
/* The address of a function that the table does not have, as cuda.h of version 12.0 declares it; NULL: it is not there. */
void *hfr_cu_find(const char *name, const char *symbol);
/* The name of a result and what it means: "CUDA_ERROR_INVALID_VALUE (invalid argument)". */
const char *hfr_cu_error(hfr_cu_result result, char text[160]);
#endif
