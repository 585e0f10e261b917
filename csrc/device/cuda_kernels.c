/*
 * Kernels of the library, compiled for the device at hand by NVRTC, which is found at run time (libnvrtc.so of CUDA 11.2 or
 * newer). Their source is a part of the library: no toolkit is needed to build it.
 */
#include "cuda.h"

#include "../call/dtype.h"

#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The text of cuda_reduce.cu; csrc/build.py tells the assembler where it is. */
__asm__(
    ".pushsection .rodata\n"
    ".type cuda_reduce_source, %object\n"
    "cuda_reduce_source:\n"
    ".incbin \"cuda_reduce.cu\"\n"
    ".byte 0\n"
    ".size cuda_reduce_source, . - cuda_reduce_source\n"
    ".popsection\n");
extern const char cuda_reduce_source[] __attribute__((visibility("hidden")));

typedef struct nvrtc_program *program;

#define FUNCTIONS(X)                                                                                                     \
  X(Version, (int *major, int *minor))                                                                                   \
  X(GetNumSupportedArchs, (int *n))                                                                                      \
  X(GetSupportedArchs, (int *archs))                                                                                     \
  X(CreateProgram, (program * p, const char *source, const char *name, int n, const char *const *, const char *const *)) \
  X(CompileProgram, (program p, int n, const char *const *options))                                                      \
  X(GetProgramLogSize, (program p, size_t * bytes))                                                                      \
  X(GetProgramLog, (program p, char *text))                                                                              \
  X(GetCUBINSize, (program p, size_t * bytes))                                                                           \
  X(GetCUBIN, (program p, char *image))                                                                                  \
  X(GetPTXSize, (program p, size_t * bytes))                                                                             \
  X(GetPTX, (program p, char *image))                                                                                    \
  X(DestroyProgram, (program * p))

static struct {
#define MEMBER(name, parameters) int(*name) parameters;
  FUNCTIONS(MEMBER)
#undef MEMBER
  int major, minor;
  char absent[160];
  pthread_once_t once;
} nvrtc = {.once = PTHREAD_ONCE_INIT};

/* Where the versions are: a name for the loader (which also finds what another library of the program has loaded), and pip's
 * wheels' place in the directory of packages. */
static const struct place {
  int major;
  const char *name, *wheel;
} places[] = {
    {13, "libnvrtc.so.13", "nvidia/cu13/lib/libnvrtc.so.13"},
    {12, "libnvrtc.so.12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"},
    {11, "libnvrtc.so.11.2", "nvidia/cuda_nvrtc/lib/libnvrtc.so.11.2"},
    {0, "libnvrtc.so", ""},
};

/* Directories of packages: those that hold a library which is loaded from one of `marks` in them. */
struct roots {
  int n;
  char path[4][PATH_MAX];
};

/* Called under the loader's lock, so it loads nothing. */
static int note_root(struct dl_phdr_info *loaded, size_t size, void *arg) {
  static const char *const marks[] = {"/hfreduce/lib/", "/torch/lib/", "/nvidia/"};
  struct roots *r = arg;
  (void)size;
  for (size_t i = 0; loaded->dlpi_name && i < sizeof marks / sizeof *marks; i++) {
    const char *end = strstr(loaded->dlpi_name, marks[i]);
    if (!end || end - loaded->dlpi_name >= PATH_MAX) continue;
    char *path = r->path[r->n];
    memcpy(path, loaded->dlpi_name, (size_t)(end - loaded->dlpi_name));
    path[end - loaded->dlpi_name] = 0;
    int known = 0;
    while (strcmp(r->path[known], path)) known++;
    if (known == r->n && ++r->n == (int)(sizeof r->path / sizeof *r->path)) return 1;
  }
  return 0;
}

static void *in_wheels(const struct roots *r, const char *wheel) {
  char path[PATH_MAX + 64];
  void *library = NULL;
  for (int i = 0; i < r->n && !library; i++) {
    snprintf(path, sizeof path, "%s/%s", r->path[i], wheel);
    library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  }
  return library;
}

/* The newest whose code this driver takes: one of a newer major version makes code that it refuses. */
static void *find(void) {
  const struct hfr_cu *cu = hfr_cuda();
  struct roots *roots = calloc(1, sizeof *roots);
  void *library = NULL;
  if (roots) dl_iterate_phdr(note_root, roots);
  for (size_t i = 0; i < sizeof places / sizeof *places && !library; i++) {
    if (cu && places[i].major > cu->version / 1000) continue;
    library = dlopen(places[i].name, RTLD_NOW | RTLD_LOCAL);
    if (!library && roots && *places[i].wheel) library = in_wheels(roots, places[i].wheel);
  }
  free(roots);
  return library;
}

static void load(void) {
  void *library = find();
  if (!library) {
    const struct hfr_cu *cu = hfr_cuda();
    snprintf(nvrtc.absent, sizeof nvrtc.absent,
             "no libnvrtc.so.%d on the loader's path or among the wheels: install CUDA's runtime compiler (pip: %s)",
             cu && cu->version < 13000 ? 12 : 13, cu && cu->version < 13000 ? "nvidia-cuda-nvrtc-cu12" : "nvidia-cuda-nvrtc");
    return;
  }
#define FIND(name, parameters)                                                    \
  if (!(*(void **)&nvrtc.name = dlsym(library, "nvrtc" #name)) && !*nvrtc.absent) \
    snprintf(nvrtc.absent, sizeof nvrtc.absent, "libnvrtc.so has no nvrtc" #name ": it is older than CUDA 11.2");
  FUNCTIONS(FIND)
#undef FIND
  if (!*nvrtc.absent && nvrtc.Version(&nvrtc.major, &nvrtc.minor))
    snprintf(nvrtc.absent, sizeof nvrtc.absent, "libnvrtc.so does not tell its version");
}

const char *hfr_kernels_why_absent(void) {
  pthread_once(&nvrtc.once, load);
  return *nvrtc.absent ? nvrtc.absent : NULL;
}

int hfr_kernels_compiler(void) { return nvrtc.major * 100 + nvrtc.minor; }

/* The newest architecture that the compiler knows and a device of this capability runs; 0: none. */
static int best_arch(int capability) {
  int n = 0, best = 0, *archs;
  if (nvrtc.GetNumSupportedArchs(&n) || n < 1 || !(archs = calloc((size_t)n, sizeof *archs))) return 0;
  if (!nvrtc.GetSupportedArchs(archs))
    for (int i = 0; i < n; i++)
      if (archs[i] <= capability && archs[i] > best) best = archs[i];
  free(archs);
  return best;
}

static hfreduceResult_t compiler_failed(program p, const char *what, int arch) {
  char text[700] = "";
  size_t bytes = 0;
  char *log = !nvrtc.GetProgramLogSize(p, &bytes) && bytes ? malloc(bytes) : NULL;
  if (log && !nvrtc.GetProgramLog(p, log)) snprintf(text, sizeof text, "%s", log);
  free(log);
  return hfr_fail(hfreduceUnhandledCudaError, "NVRTC %d.%d: %s failed for compute capability %d.%d: %.600s", nvrtc.major,
                  nvrtc.minor, what, arch / 10, arch % 10, text);
}

/* The machine's code, or, for a device that the compiler does not know, what its driver makes code of. */
static hfreduceResult_t take_image(program p, int arch, int exact, void **image, size_t *bytes) {
  if (exact ? nvrtc.GetCUBINSize(p, bytes) : nvrtc.GetPTXSize(p, bytes)) return compiler_failed(p, "taking the code", arch);
  char *code = malloc(*bytes ? *bytes : 1);
  if (!code) return hfr_fail(hfreduceSystemError, "out of memory for %zu bytes of code", *bytes);
  if (exact ? nvrtc.GetCUBIN(p, code) : nvrtc.GetPTX(p, code)) return free(code), compiler_failed(p, "taking the code", arch);
  *image = code;
  return hfreduceSuccess;
}

hfreduceResult_t hfr_kernels_compile(int capability, void **image, size_t *bytes) {
  const char *why = hfr_kernels_why_absent();
  char target[40];
  program p;
  if (why) return hfr_fail(hfreduceInvalidUsage, "kernels cannot be compiled: %s", why);
  int arch = best_arch(capability);
  if (!arch)
    return hfr_fail(hfreduceInvalidUsage, "NVRTC %d.%d knows no architecture that a device of compute capability %d.%d runs",
                    nvrtc.major, nvrtc.minor, capability / 10, capability % 10);
  snprintf(target, sizeof target, "--gpu-architecture=%s_%d", arch == capability ? "sm" : "compute", arch);
  const char *const options[] = {target, "--std=c++17", "--fmad=false"}; /* each operation rounds by itself, as on CPUs */
  if (nvrtc.CreateProgram(&p, cuda_reduce_source, "cuda_reduce.cu", 0, NULL, NULL))
    return hfr_fail(hfreduceUnhandledCudaError, "NVRTC %d.%d: nvrtcCreateProgram failed", nvrtc.major, nvrtc.minor);
  hfreduceResult_t r = nvrtc.CompileProgram(p, sizeof options / sizeof *options, options)
                           ? compiler_failed(p, "compiling", arch)
                           : take_image(p, arch, arch == capability, image, bytes);
  nvrtc.DestroyProgram(&p);
  return r;
}

/* ---------------------------------------------------------------- loading */

#define OPS 4

struct hfr_kernels {
  struct hfr_kernels *next;
  void *context;
  unsigned long long id; /* of the context: a device that is reset makes a new one, at the same address; 0 before CUDA 12 */
  hfr_cu_function pair[hfreduceNumTypes][OPS];
};

static struct {
  pthread_mutex_t lock;
  struct hfr_kernels *list;
  int capability; /* of the image: devices of one machine are mostly alike */
  void *image;
} loaded = {.lock = PTHREAD_MUTEX_INITIALIZER};

static hfreduceResult_t find_functions(const struct hfr_cu *cu, hfr_cu_module module, struct hfr_kernels *k) {
  static const char *const op[OPS] = {"sum", "prod", "max", "min"};
  char name[64];
  for (int t = 0; t < hfreduceNumTypes; t++)
    for (int o = 0; o < OPS; o++) {
      snprintf(name, sizeof name, "hfr_pair_%s_%s", hfr_dtype_name((hfreduceDataType_t)t), op[o]);
      int r = cu->module_function(&k->pair[t][o], module, name);
      if (r) return hfr_cuda_fail("cuModuleGetFunction", r);
      /* Now: a kernel that is loaded at its first launch may wait for what is in the streams before it. */
      if (cu->function_load && (r = cu->function_load(k->pair[t][o]))) return hfr_cuda_fail("cuFuncLoad", r);
    }
  return hfreduceSuccess;
}

static hfreduceResult_t load_here(int device, struct hfr_kernels *k) {
  const struct hfr_cu *cu = hfr_cuda();
  int major = 0, minor = 0;
  hfr_cu_module module;
  size_t bytes;
  int r = cu->device_attribute(&major, HFR_CU_ATTR_CAPABILITY_MAJOR, device);
  if (!r) r = cu->device_attribute(&minor, HFR_CU_ATTR_CAPABILITY_MINOR, device);
  if (r) return hfr_cuda_fail("cuDeviceGetAttribute", r);
  int capability = 10 * major + minor;
  if (!loaded.image || loaded.capability != capability) {
    free(loaded.image);
    loaded.image = NULL;
    HFR_TRY(hfr_kernels_compile(capability, &loaded.image, &bytes));
    loaded.capability = capability;
  }
  if ((r = cu->module_load(&module, loaded.image))) return hfr_cuda_fail("cuModuleLoadData", r);
  return find_functions(cu, module, k);
}

hfreduceResult_t hfr_kernels_load(int device, void *context, const struct hfr_kernels **kernels) {
  hfreduceResult_t r = hfreduceSuccess;
  unsigned long long id = 0;
  const struct hfr_cu *cu = hfr_cuda();
  if (cu->context_id && cu->context_id(context, &id)) id = 0;
  pthread_mutex_lock(&loaded.lock);
  struct hfr_kernels *k = loaded.list;
  while (k && (k->context != context || k->id != id)) k = k->next;
  if (!k && !(k = calloc(1, sizeof *k))) r = hfr_fail(hfreduceSystemError, "out of memory for kernels");
  if (!r && !k->context) {
    r = load_here(device, k);
    if (r) {
      free(k);
    } else {
      k->context = context;
      k->id = id;
      k->next = loaded.list;
      loaded.list = k;
    }
  }
  pthread_mutex_unlock(&loaded.lock);
  if (!r) *kernels = k;
  return r;
}

hfr_cu_function hfr_kernels_pair(const struct hfr_kernels *k, hfreduceDataType_t dtype, hfreduceRedOp_t op) {
  return k->pair[dtype][op];
}
