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
/* Can streams of the device wait for and write words of memory? */
int hfr_cuda_mem_ops(const struct hfr_cu *cu, int device);
static inline int hfr_cuda_mem_ops_wanted(void) { return hfr_param_int(HFR_PARAM_CUDA_MEMOPS) != 0; }
/* "0000:3b:00.0"; 0: not known. */
int hfr_cuda_pci(const struct hfr_cu *cu, int device, char text[16]);
/* NUMA node of the device; -1: not known. */
int hfr_cuda_numa(const struct hfr_cu *cu, int device);
/* A line on GDRCopy, as hfr_device_describe writes it; what snprintf returns. */
size_t hfr_gdrcopy_describe(char *text, size_t size);
/* CUDA_DEVICE_MAX_CONNECTIONS=1: all streams share one queue in the hardware. */
int hfr_cuda_one_queue(void);
#endif
