/* Finding CUDA's driver library and the functions in it. */
#include "cuda_lib.h"
#include "device.h"

#include "../base/param.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WANTED 12000 /* the version of the interface that cuda_lib.h declares */

static struct hfr_cu cu;
static void *library;
static char absent[240];
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* cuGetProcAddress of 12.0 and newer, and of 11.3. */
static hfr_cu_result (*proc_v2)(const char *name, void **function, int version, uint64_t flags, int *status);
static hfr_cu_result (*proc_v1)(const char *name, void **function, int version, uint64_t flags);

void *hfr_cu_find(const char *name, const char *symbol) {
  void *function = NULL;
  int status = 0, version = cu.version && cu.version < WANTED ? cu.version : WANTED;
  if (!library) return NULL;
  if (proc_v2 && !proc_v2(name, &function, version, HFR_CU_PROC_LEGACY_STREAM, &status) && function) return function;
  if (!proc_v2 && proc_v1 && !proc_v1(name, &function, version, HFR_CU_PROC_LEGACY_STREAM) && function) return function;
  return dlsym(library, symbol);
}

/* ---------------------------------------------------------------- hardware queues */

#define QUEUES "CUDA_DEVICE_MAX_CONNECTIONS"
#define QUEUES_MOST 32

static int queues = 8; /* the driver's preset */

/* Has the program initialised the driver already? Then it has read the environment. */
static int is_initialised(void) {
  int devices;
  void *here = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  hfr_cu_result (*count)(int *) = NULL;
  if (here) *(void **)&count = dlsym(here, "cuDeviceGetCount");
  int yes = count && count(&devices) != HFR_CU_NOT_INITIALIZED;
  if (here) dlclose(here);
  return yes;
}

/* Streams share the device's hardware queues, and what stands behind a wait in one of them waits with it: as many queues as there
 * can be, unless the user says otherwise. When the library is loaded, for the driver reads it when it is initialised. */
__attribute__((constructor)) static void widen(void) {
  const char *text = getenv(QUEUES), *off = getenv("HFREDUCE_CUDA");
  char most[8];
  if (text && atoi(text) > 0) queues = atoi(text) < QUEUES_MOST ? atoi(text) : QUEUES_MOST;
  if (text || (off && !strcmp(off, "0")) || is_initialised()) return;
  snprintf(most, sizeof most, "%d", QUEUES_MOST);
  if (!setenv(QUEUES, most, 0)) queues = QUEUES_MOST;
}

int hfr_device_queues(void) { return queues; }

static int is_optional(const char *member) {
#define SAME(name) || !strcmp(member, #name)
  return 0 HFR_CU_OPTIONAL(SAME);
#undef SAME
}

static void load(void) {
  if (!hfr_param_int(HFR_PARAM_CUDA)) {
    snprintf(absent, sizeof absent, "switched off by HFREDUCE_CUDA=0");
    return;
  }
  library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char *error = dlerror();
    snprintf(absent, sizeof absent, "no CUDA driver (%.160s)", error ? error : "libcuda.so.1 cannot be loaded");
    return;
  }
  *(void **)&proc_v2 = dlsym(library, "cuGetProcAddress_v2");
  *(void **)&proc_v1 = dlsym(library, "cuGetProcAddress");
  *(void **)&cu.driver_version = dlsym(library, "cuDriverGetVersion");
  if (!cu.driver_version || cu.driver_version(&cu.version)) cu.version = 0;
#define FIND(member, name, symbol, parameters)                                                                                   \
  if (!(*(void **)&cu.member = hfr_cu_find(name, symbol)) && !is_optional(#member) && !*absent)                                  \
    snprintf(absent, sizeof absent, "the CUDA driver %d.%d has no %s: it is too old", cu.version / 1000, cu.version % 1000 / 10, \
             name);
  HFR_CU_FUNCTIONS(FIND)
#undef FIND
}

const struct hfr_cu *hfr_cu_load(const char **why) {
  pthread_once(&once, load);
  *why = absent;
  return *absent ? NULL : &cu;
}

const char *hfr_cu_error(hfr_cu_result result, char text[160]) {
  const char *name = NULL, *meaning = NULL;
  if (cu.error_name && cu.error_name(result, &name)) name = NULL;
  if (cu.error_string && cu.error_string(result, &meaning)) meaning = NULL;
  snprintf(text, 160, "%s (%d: %s)", name ? name : "unknown CUDA error", result, meaning ? meaning : "?");
  return text;
}
