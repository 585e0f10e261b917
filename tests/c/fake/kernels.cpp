// The kernels of csrc/device/cuda_reduce.cu on the host: what the CUDA language adds, and a loop that plays the grid.
struct place {
  unsigned x;
};
static place blockIdx, threadIdx, gridDim, blockDim;
#define __global__ __attribute__((visibility("default")))
#define __device__

#include "device/cuda_reduce.cu"

// Threads run one after the other: none may wait for another. One kernel at a time.
extern "C" __global__ void run_on_host(void (*kernel)(u8 *, const u8 *, const u8 *, u64, float), unsigned blocks, unsigned threads,
                                       u8 *dst, const u8 *first, const u8 *second, u64 count, float scale) {
  gridDim.x = blocks, blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) kernel(dst, first, second, count, scale);
}
