/* nccl_device.h includes it and, outside device code, takes this one name of it. */
#ifndef TESTS_NCCL_CUDA_H_
#define TESTS_NCCL_CUDA_H_
typedef int CUmemLocationType; /* an enumeration */
#endif
