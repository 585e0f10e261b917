/* What the CUDA files share. */
#ifndef HFR_DEVICE_CUDA_H_
#define HFR_DEVICE_CUDA_H_
#include "cuda_lib.h"
#include "device.h"

#include "../base/param.h"

/* The driver; NULL: there is none. */
const struct hfr_cu *hfr_cuda(void);
/* Record that a driver's call gave this CUresult. */
hfreduceResult_t hfr_cuda_fail(const char *call, int result);
/* What tells an allocation from others, whenever they were; 0: it is no memory of a device alone. */
uint64_t hfr_cuda_memory_id(const struct hfr_cu *cu, uintptr_t pointer);
/* Tells a context from others that had its address; 0: the driver has no numbers for them. */
unsigned long long hfr_cuda_context_id(const struct hfr_cu *cu, void *context);
/* Can streams of the device wait for and write words of memory? */
int hfr_cuda_mem_ops(const struct hfr_cu *cu, int device);
static inline int hfr_cuda_mem_ops_wanted(void) { return hfr_param_int(HFR_PARAM_CUDA_MEMOPS) != 0; }
/* "0000:3b:00.0"; 0: not known. */
int hfr_cuda_pci(const struct hfr_cu *cu, int device, char text[16]);
/* NUMA node of the device; -1: not known. */
int hfr_cuda_numa(const struct hfr_cu *cu, int device);
/* A line on GDRCopy, as hfr_device_describe writes it; what snprintf returns. */
size_t hfr_gdrcopy_describe(char *text, size_t size);
/* --- cuda_kernels.c --- */
/* NULL: kernels can be compiled, else what is missing. Any thread. */
const char *hfr_kernels_why_absent(void);
/* Its version: major * 100 + minor. */
int hfr_kernels_compiler(void);
/* Compile cuda_reduce.cu for a compute capability (80 is 8.0) to an image that cuModuleLoadData takes; the caller frees it.
   Takes a second or so. */
hfreduceResult_t hfr_kernels_compile(int capability, void **image, size_t *bytes);
/* The kernels of a device's context, compiled and loaded once; they stay until the process ends. The context is current. */
struct hfr_kernels;
hfreduceResult_t hfr_kernels_load(int device, void *context, const struct hfr_kernels **kernels);
hfr_cu_function hfr_kernels_pair(const struct hfr_kernels *kernels, hfreduceDataType_t dtype, hfreduceRedOp_t op);
/* --- cuda_pair.c --- */
/* A line on NVLink, as hfr_device_describe writes it; what snprintf returns. */
size_t hfr_pair_describe(const struct hfr_cu *cu, int count, char *text, size_t size);
/* --- cuda_copier.c --- */
hfr_cu_stream hfr_copier_stream(const struct hfr_copier *copier, enum hfr_queue queue);
/* --- cuda_streams.c --- */
/* A stream of the current context beside the user's, of the greatest priority: a kernel of ours takes few blocks, and must not
   wait until those of a product that fills the device have ended. */
hfreduceResult_t hfr_cuda_stream_create(const struct hfr_cu *cu, hfr_cu_stream *stream);
/* CUDA_DEVICE_MAX_CONNECTIONS=1: all streams share one queue in the hardware. */
int hfr_cuda_one_queue(void);
#endif
