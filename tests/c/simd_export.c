/* Gives the private functions of simd/ exported names, for tests/test_datatypes.py to load with ctypes. */
#include "simd/simd.h"
#include "simd/simd_internal.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT int test_select(const char *level) { return hfr_simd_select(level); }
EXPORT const char *test_level(void) { return hfr_simd_level(); }
EXPORT const char *test_dtype_name(int dtype) { return hfr_dtype_name((hfreduceDataType_t)dtype); }
EXPORT void test_reduce(void *dst, const void *const *src, int nsrc, size_t count, int dtype, int op, int npre, double pre,
                        uint64_t div) {
  const struct hfr_scale scale = {npre, pre, div};
  hfr_reduce(dst, src, nsrc, count, (hfreduceDataType_t)dtype, (enum hfr_op)op, &scale);
}
EXPORT int test_convert(void *dst, int dst_dtype, const void *src, int src_dtype, size_t count) {
  return hfr_convert(dst, (hfreduceDataType_t)dst_dtype, src, (hfreduceDataType_t)src_dtype, count);
}
