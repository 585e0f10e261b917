/* What nccl.h wants of CUDA, so that programs on host memory are compiled without a toolkit: two handles, and
   what CUDA's header brings along. */
#ifndef TESTS_NCCL_CUDA_RUNTIME_H_
#define TESTS_NCCL_CUDA_RUNTIME_H_
#include <stdbool.h>
#include <stddef.h>
#define CUDART_VERSION 13000
typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
#endif
