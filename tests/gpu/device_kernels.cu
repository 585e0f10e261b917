// The kernels of csrc/device/cuda_reduce.cu on a device, behind the interface that tests/c/test_cuda_reduce.c has for the host's
// (tests/c/fake/kernels.cpp): a library whose run_on_host copies the operands in, launches, and copies the result out.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include "device/cuda_reduce.cu"

#define CHECK(call)                                                                                 \
  do {                                                                                              \
    cudaError_t error = call;                                                                       \
    if (error) fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)), fflush(NULL), _Exit(3); \
  } while (0)

typedef void kernel_function(u8 *, const u8 *, const u8 *, u64, float);

// The bytes of an element, by the number in the kernel's name: hfr_pair_float8_e4m3fn_max has 8 bits.
static size_t size_of(kernel_function *kernel) {
  Dl_info info;
  const char *name = dladdr((void *)kernel, &info) && info.dli_sname ? strstr(info.dli_sname, "hfr_pair_") : NULL;
  if (!name) fprintf(stderr, "a kernel has no name\n"), _Exit(3);
  return (size_t)atoi(name + strcspn(name, "0123456789")) / 8;
}

// Kernels see operands at the same offsets within 16 bytes as in the caller's memory, and in place where the caller reduces in place.
extern "C" __attribute__((visibility("default"))) void run_on_host(kernel_function *kernel, unsigned blocks, unsigned threads, u8 *dst,
                                                                   const u8 *first, const u8 *second, u64 count, float scale) {
  enum { ROOM = 1 << 20, BEFORE = 64 };
  static u8 *memory[3];
  size_t bytes = count * size_of(kernel), guard = count < 65536; // beside the result, to see what is written outside
  for (auto &each : memory)
    if (!each) CHECK(cudaMalloc(&each, ROOM));
  u8 *at[3] = {memory[0] + BEFORE + (size_t)dst % 16, memory[1] + BEFORE + (size_t)first % 16, memory[2] + BEFORE + (size_t)second % 16};
  if (dst == first) at[0] = at[1];
  CHECK(cudaMemcpy(at[0] - guard, dst - guard, bytes + 2 * guard, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(at[1], first, bytes, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(at[2], second, bytes, cudaMemcpyHostToDevice));
  void *arguments[] = {&at[0], &at[1], &at[2], &count, &scale};
  CHECK(cudaLaunchKernel((const void *)kernel, dim3(blocks), dim3(threads), arguments, 0, 0));
  CHECK(cudaMemcpy(dst - guard, at[0] - guard, bytes + 2 * guard, cudaMemcpyDeviceToHost));
}
