/* The library's kernels compiled by the real NVRTC, which needs no GPU: machine code for architectures that it knows, PTX for a
   device that is newer. Exit status 77: there is no NVRTC. */
#include <stdlib.h>
#include <string.h>
#include "check.h"
#include "device/cuda.h"

/* Does the image name this kernel? */
static int names(const char *image, size_t bytes, const char *name) { return memmem(image, bytes, name, strlen(name)) != NULL; }

int main(void) {
  static const int capability[] = {80, 90, 99};
  static const char *const kernel[] = {"hfr_pair_float32_sum", "hfr_pair_bfloat16_sum", "hfr_pair_float8_e4m3fn_max",
                                       "hfr_pair_int64_prod"};
  if (hfr_kernels_why_absent()) return printf("%s\n", hfr_kernels_why_absent()), 77;
  for (size_t i = 0; i < sizeof capability / sizeof *capability; i++) {
    void *image = NULL;
    size_t bytes = 0;
    hfreduceResult_t r = hfr_kernels_compile(capability[i], &image, &bytes);
    CHECK(!r, "compute capability %d: %s", capability[i], hfreduceGetLastError(NULL));
    if (r) continue;
    int is_elf = bytes > 4 && !memcmp(image, "\177ELF", 4);
    CHECK(is_elf == (capability[i] != 99), "compute capability %d: %s", capability[i], is_elf ? "machine code" : "PTX");
    for (size_t k = 0; k < sizeof kernel / sizeof *kernel; k++)
      CHECK(names(image, bytes, kernel[k]), "compute capability %d has no %s", capability[i], kernel[k]);
    printf("compute capability %d.%d: %zu bytes of %s\n", capability[i] / 10, capability[i] % 10, bytes, is_elf ? "code" : "PTX");
    free(image);
  }
  void *image;
  size_t bytes;
  CHECK(hfr_kernels_compile(10, &image, &bytes) == hfreduceInvalidUsage);
  return check_done();
}
