/* A test double of CUDA's runtime compiler: it compiles nothing, and gives an image that only the stand-in for the driver takes.
 */
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define IMAGE "code for the stand-in, 9.0"

EXPORT int nvrtcVersion(int *major, int *minor);
EXPORT int nvrtcVersion(int *major, int *minor) { return *major = 12, *minor = 0, 0; }
EXPORT int nvrtcGetNumSupportedArchs(int *n);
EXPORT int nvrtcGetNumSupportedArchs(int *n) { return *n = 1, 0; }
EXPORT int nvrtcGetSupportedArchs(int *archs);
EXPORT int nvrtcGetSupportedArchs(int *archs) { return *archs = 90, 0; }
EXPORT int nvrtcCreateProgram(void **p, const char *source, const char *name, int n, const char *const *a, const char *const *b);
EXPORT int nvrtcCreateProgram(void **p, const char *source, const char *name, int n, const char *const *a, const char *const *b) {
  (void)name, (void)n, (void)a, (void)b;
  *p = IMAGE;
  return strstr(source, "hfr_pair_") ? 0 : 1;
}
EXPORT int nvrtcCompileProgram(void *p, int n, const char *const *options);
EXPORT int nvrtcCompileProgram(void *p, int n, const char *const *options) {
  (void)p;
  for (int i = 0; i < n; i++)
    if (!strcmp(options[i], "--gpu-architecture=sm_90")) return 0;
  return 5; /* NVRTC_ERROR_INVALID_OPTION */
}
EXPORT int nvrtcGetProgramLogSize(void *p, size_t *bytes);
EXPORT int nvrtcGetProgramLogSize(void *p, size_t *bytes) { return (void)p, *bytes = 1, 0; }
EXPORT int nvrtcGetProgramLog(void *p, char *text);
EXPORT int nvrtcGetProgramLog(void *p, char *text) { return (void)p, *text = 0, 0; }
EXPORT int nvrtcGetCUBINSize(void *p, size_t *bytes);
EXPORT int nvrtcGetCUBINSize(void *p, size_t *bytes) { return (void)p, *bytes = sizeof IMAGE, 0; }
EXPORT int nvrtcGetCUBIN(void *p, char *image);
EXPORT int nvrtcGetCUBIN(void *p, char *image) { return memcpy(image, p, sizeof IMAGE), 0; }
EXPORT int nvrtcGetPTXSize(void *p, size_t *bytes);
EXPORT int nvrtcGetPTXSize(void *p, size_t *bytes) { return (void)p, (void)bytes, 1; }
EXPORT int nvrtcGetPTX(void *p, char *image);
EXPORT int nvrtcGetPTX(void *p, char *image) { return (void)p, (void)image, 1; }
EXPORT int nvrtcDestroyProgram(void **p);
EXPORT int nvrtcDestroyProgram(void **p) { return *p = NULL, 0; }
