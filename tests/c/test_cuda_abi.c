/* Our declarations of CUDA's driver interface against NVIDIA's header, where it is installed (or in the compiler's path). */
#include "device/cuda_lib.h"

#include <stdio.h>

#if __has_include(<cuda.h>)
#include <cuda.h>
#include <stddef.h>

#define SAME(ours, theirs) _Static_assert((long)(ours) == (long)(theirs), #ours " is " #theirs)
SAME(HFR_CU_INVALID_VALUE, CUDA_ERROR_INVALID_VALUE);
SAME(HFR_CU_OUT_OF_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME(HFR_CU_NOT_INITIALIZED, CUDA_ERROR_NOT_INITIALIZED);
SAME(HFR_CU_DEINITIALIZED, CUDA_ERROR_DEINITIALIZED);
SAME(HFR_CU_NO_DEVICE, CUDA_ERROR_NO_DEVICE);
SAME(HFR_CU_INVALID_DEVICE, CUDA_ERROR_INVALID_DEVICE);
SAME(HFR_CU_INVALID_CONTEXT, CUDA_ERROR_INVALID_CONTEXT);
SAME(HFR_CU_INVALID_HANDLE, CUDA_ERROR_INVALID_HANDLE);
SAME(HFR_CU_NOT_READY, CUDA_ERROR_NOT_READY);
SAME(HFR_CU_PEER_ACCESS_ALREADY_ENABLED, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
SAME(HFR_CU_CONTEXT_IS_DESTROYED, CUDA_ERROR_CONTEXT_IS_DESTROYED);
SAME(HFR_CU_HOST_MEMORY_ALREADY_REGISTERED, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
SAME(HFR_CU_HOST_MEMORY_NOT_REGISTERED, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
SAME(HFR_CU_NOT_PERMITTED, CUDA_ERROR_NOT_PERMITTED);
SAME(HFR_CU_NOT_SUPPORTED, CUDA_ERROR_NOT_SUPPORTED);
SAME(HFR_CU_CAPTURE_UNSUPPORTED, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
SAME(HFR_CU_CAPTURE_INVALIDATED, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
SAME(HFR_CU_CAPTURE_MERGE, CUDA_ERROR_STREAM_CAPTURE_MERGE);
SAME(HFR_CU_CAPTURE_UNMATCHED, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
SAME(HFR_CU_CAPTURE_UNJOINED, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
SAME(HFR_CU_CAPTURE_ISOLATION, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
SAME(HFR_CU_CAPTURE_IMPLICIT, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
SAME(HFR_CU_ATTR_PCI_BUS, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID);
SAME(HFR_CU_ATTR_PCI_DEVICE, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID);
SAME(HFR_CU_ATTR_PCI_DOMAIN, CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID);
SAME(HFR_CU_ATTR_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(HFR_CU_ATTR_CAPABILITY_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(HFR_CU_P2P_ACCESS, CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED);
SAME(HFR_CU_P2P_ATOMICS, CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED);
SAME(HFR_CU_IPC_LAZY_PEER_ACCESS, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
SAME(sizeof(struct hfr_cu_ipc), sizeof(CUipcMemHandle));
SAME(_Alignof(struct hfr_cu_ipc), _Alignof(CUipcMemHandle));
SAME(HFR_CU_ATTR_COPY_ENGINES, CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT);
SAME(HFR_CU_ATTR_MEM_OPS_V1, 92); /* its name moved between versions */
SAME(HFR_CU_POINTER_CONTEXT, CU_POINTER_ATTRIBUTE_CONTEXT);
SAME(HFR_CU_POINTER_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
SAME(HFR_CU_ATTR_FLUSH_REMOTE_WRITES, CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES);
SAME(HFR_CU_POINTER_SYNC_MEMOPS, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS);
SAME(HFR_CU_POINTER_BUFFER_ID, CU_POINTER_ATTRIBUTE_BUFFER_ID);
SAME(HFR_CU_POINTER_IS_MANAGED, CU_POINTER_ATTRIBUTE_IS_MANAGED);
SAME(HFR_CU_POINTER_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
SAME(HFR_CU_POINTER_RANGE_START, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR);
SAME(HFR_CU_POINTER_RANGE_SIZE, CU_POINTER_ATTRIBUTE_RANGE_SIZE);
SAME(HFR_CU_MEMORY_HOST, CU_MEMORYTYPE_HOST);
SAME(HFR_CU_MEMORY_DEVICE, CU_MEMORYTYPE_DEVICE);
SAME(HFR_CU_MEMORY_UNIFIED, CU_MEMORYTYPE_UNIFIED);
SAME(HFR_CU_EVENT_DISABLE_TIMING, CU_EVENT_DISABLE_TIMING);
SAME(HFR_CU_STREAM_NON_BLOCKING, CU_STREAM_NON_BLOCKING);
SAME(HFR_CU_HOST_PORTABLE, CU_MEMHOSTREGISTER_PORTABLE);
SAME(HFR_CU_HOST_DEVICEMAP, CU_MEMHOSTREGISTER_DEVICEMAP);
SAME(HFR_CU_WAIT_GEQ, CU_STREAM_WAIT_VALUE_GEQ);
SAME(HFR_CU_WAIT_FLUSH, CU_STREAM_WAIT_VALUE_FLUSH);
SAME(HFR_CU_WRITE_DEFAULT, CU_STREAM_WRITE_VALUE_DEFAULT);
SAME(HFR_CU_CAPTURE_NONE, CU_STREAM_CAPTURE_STATUS_NONE);
SAME(HFR_CU_CAPTURE_ACTIVE, CU_STREAM_CAPTURE_STATUS_ACTIVE);
SAME(HFR_CU_CAPTURE_BROKEN, CU_STREAM_CAPTURE_STATUS_INVALIDATED);
SAME(HFR_CU_MODE_GLOBAL, CU_STREAM_CAPTURE_MODE_GLOBAL);
SAME(HFR_CU_MODE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
SAME(HFR_CU_MODE_RELAXED, CU_STREAM_CAPTURE_MODE_RELAXED);
SAME(HFR_CU_OBJECT_NO_SYNC, CU_USER_OBJECT_NO_DESTRUCTOR_SYNC);
SAME(HFR_CU_OBJECT_MOVE, CU_GRAPH_USER_OBJECT_MOVE);
SAME(HFR_CU_PROC_LEGACY_STREAM, CU_GET_PROC_ADDRESS_LEGACY_STREAM);
SAME(sizeof(hfr_cu_ptr), sizeof(CUdeviceptr));
SAME(sizeof(struct hfr_cu_copy2d), sizeof(CUDA_MEMCPY2D));
#define FIELD(ours, theirs) SAME(offsetof(struct hfr_cu_copy2d, ours), offsetof(CUDA_MEMCPY2D, theirs))
FIELD(src_x, srcXInBytes);
FIELD(src_y, srcY);
FIELD(src_type, srcMemoryType);
FIELD(src_host, srcHost);
FIELD(src_device, srcDevice);
FIELD(src_array, srcArray);
FIELD(src_pitch, srcPitch);
FIELD(dst_x, dstXInBytes);
FIELD(dst_y, dstY);
FIELD(dst_type, dstMemoryType);
FIELD(dst_host, dstHost);
FIELD(dst_device, dstDevice);
FIELD(dst_array, dstArray);
FIELD(dst_pitch, dstPitch);
FIELD(width, WidthInBytes);
FIELD(height, Height);

/* Signatures of what is called most, as cuda_lib.h has them. */
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuMemcpyAsync), CUresult (*)(CUdeviceptr, CUdeviceptr, size_t, CUstream)),
               "cuMemcpyAsync");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuMemsetD32Async), CUresult (*)(CUdeviceptr, unsigned, size_t, CUstream)),
               "cuMemsetD32Async");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuStreamWaitValue32),
                                            CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned)),
               "cuStreamWaitValue32");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuStreamWriteValue32),
                                            CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned)),
               "cuStreamWriteValue32");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuPointerGetAttributes),
                                            CUresult (*)(unsigned, CUpointer_attribute *, void **, CUdeviceptr)),
               "cuPointerGetAttributes");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuPointerSetAttribute),
                                            CUresult (*)(const void *, CUpointer_attribute, CUdeviceptr)),
               "cuPointerSetAttribute");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuUserObjectCreate),
                                            CUresult (*)(CUuserObject *, void *, CUhostFn, unsigned, unsigned)),
               "cuUserObjectCreate");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuGraphRetainUserObject),
                                            CUresult (*)(CUgraph, CUuserObject, unsigned, unsigned)),
               "cuGraphRetainUserObject");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuStreamCreateWithPriority), CUresult (*)(CUstream *, unsigned, int)),
               "cuStreamCreateWithPriority");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuLaunchHostFunc), CUresult (*)(CUstream, CUhostFn, void *)),
               "cuLaunchHostFunc");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuStreamWaitEvent), CUresult (*)(CUstream, CUevent, unsigned)),
               "cuStreamWaitEvent");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuMemHostRegister), CUresult (*)(void *, size_t, unsigned)),
               "cuMemHostRegister");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuThreadExchangeStreamCaptureMode), CUresult (*)(CUstreamCaptureMode *)),
               "cuThreadExchangeStreamCaptureMode");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuDeviceGetP2PAttribute),
                                            CUresult (*)(int *, CUdevice_P2PAttribute, CUdevice, CUdevice)),
               "cuDeviceGetP2PAttribute");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuCtxEnablePeerAccess), CUresult (*)(CUcontext, unsigned)),
               "cuCtxEnablePeerAccess");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuIpcGetMemHandle), CUresult (*)(CUipcMemHandle *, CUdeviceptr)),
               "cuIpcGetMemHandle");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuIpcOpenMemHandle),
                                            CUresult (*)(CUdeviceptr *, CUipcMemHandle, unsigned)),
               "cuIpcOpenMemHandle");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuIpcCloseMemHandle), CUresult (*)(CUdeviceptr)), "cuIpcCloseMemHandle");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuModuleLoadData), CUresult (*)(CUmodule *, const void *)),
               "cuModuleLoadData");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuModuleGetFunction), CUresult (*)(CUfunction *, CUmodule, const char *)),
               "cuModuleGetFunction");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuFuncLoad), CUresult (*)(CUfunction)), "cuFuncLoad");
_Static_assert(__builtin_types_compatible_p(__typeof__(&cuLaunchKernel),
                                            CUresult (*)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                                         unsigned, CUstream, void **, void **)),
               "cuLaunchKernel");

int main(void) {
  printf("our declarations agree with cuda.h of CUDA %d.%d\n", CUDA_VERSION / 1000, CUDA_VERSION % 1000 / 10);
  return 0;
}
#else
int main(void) {
  printf("no cuda.h here to compare with\n");
  return 77;
}
#endif
