/* The process that the library finds itself in: its environment, and another NCCL beside it. */
#include "internal.h"

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern char **environ;

int hfr_nccl_env(const char *name, int otherwise) {
  const char *text = getenv(name);
  char *end;
  if (!text || !*text) return otherwise;
  long value = strtol(text, &end, 10);
  return *end || value < INT_MIN || value > INT_MAX ? otherwise : (int)value;
}

/* ---------------------------------------------------------------- another NCCL */

static const void *base_of(const void *address) {
  Dl_info info;
  return dladdr(address, &info) ? info.dli_fbase : NULL;
}

/* The names of all loaded objects. They are looked at afterwards: the walk holds the loader's lock. */
struct names {
  char **name;
  int n, cap;
};

static int note_name(struct dl_phdr_info *object, size_t size, void *arg) {
  struct names *all = arg;
  (void)size;
  if (!object->dlpi_name || !*object->dlpi_name) return 0;
  if (all->n == all->cap) {
    int cap = all->cap ? 2 * all->cap : 64;
    char **grown = realloc(all->name, (size_t)cap * sizeof *grown);
    if (!grown) return 1;
    all->name = grown;
    all->cap = cap;
  }
  all->name[all->n] = strdup(object->dlpi_name);
  all->n += all->name[all->n] != NULL;
  return 0;
}

/* The object's ncclGetVersion (its own, or of what it depends on) if that is not ours. */
static void *others_symbol(const char *object) {
  void *handle = dlopen(object, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return NULL;
  void *symbol = dlsym(handle, "ncclGetVersion");
  const void *ours = base_of((const void *)(uintptr_t)hfr_nccl_look_around), *theirs = symbol ? base_of(symbol) : NULL;
  dlclose(handle);
  return theirs && theirs != ours ? symbol : NULL;
}

static void tell_of_another(void) {
  void *symbol = NULL;
  Dl_info theirs, ours;
  struct names all = {0};
  dl_iterate_phdr(note_name, &all);
  for (int i = 0; i < all.n; i++) {
    if (!symbol) symbol = others_symbol(all.name[i]);
    free(all.name[i]);
  }
  free(all.name);
  if (!symbol || !dladdr(symbol, &theirs) || !dladdr((const void *)(uintptr_t)hfr_nccl_look_around, &ours)) return;
  ncclResult_t (*get_version)(int *);
  memcpy(&get_version, &symbol, sizeof get_version);
  int version = 0;
  get_version(&version);
  hfr_nccl_log(hfreduceLogWarn,
               "another NCCL is in this process: %s (version %d.%d.%d); what is bound to it does not reach hfreduce. Start the "
               "program with `hfreduce exec`, or with LD_PRELOAD=%s",
               theirs.dli_fname, version / 10000, version / 100 % 100, version % 100, ours.dli_fname);
}

/* ---------------------------------------------------------------- variables without a meaning */

static int understood(const char *name, size_t bytes) {
  static const char *const own[] = {"NCCL_COMM_ID", "NCCL_COMM_BLOCKING", "NCCL_CONF_FILE",
                                    "NCCL_NET",     "NCCL_IB_DISABLE",    "NCCL_DEBUG_SUBSYS"};
  hfreduceParam_t p;
  for (size_t i = 0; i < sizeof own / sizeof *own; i++)
    if (strlen(own[i]) == bytes && !memcmp(own[i], name, bytes)) return 1;
  for (int i = 0; i < hfreduceParamCount(); i++)
    if (!hfreduceParamGet(i, &p) && p.alias && strlen(p.alias) == bytes && !memcmp(p.alias, name, bytes)) return 1;
  return 0;
}

static void tell_of_ignored(void) {
  char names[600] = "";
  size_t n = 0;
  for (char **at = environ; *at && n < sizeof names - 1; at++) {
    size_t bytes = strcspn(*at, "=");
    if (strncmp(*at, "NCCL_", 5) || understood(*at, bytes)) continue;
    int wrote = snprintf(names + n, sizeof names - n, "%s%.*s", n ? ", " : "", (int)bytes, *at);
    n += wrote > 0 ? (size_t)wrote : 0;
  }
  if (n) hfr_nccl_log(hfreduceLogInfo, "set, but without a meaning here: %s", names);
}

static void look_around(void) {
  const char *debug = getenv("NCCL_DEBUG");
  if (debug && !strcmp(debug, "VERSION"))
    fprintf(stderr, "hfreduce %d.%d.%d in the place of NCCL %d.%d.%d\n", HFREDUCE_MAJOR, HFREDUCE_MINOR, HFREDUCE_PATCH,
            NCCL_VERSION_CODE / 10000, NCCL_VERSION_CODE / 100 % 100, NCCL_VERSION_CODE % 100);
  tell_of_another();
  tell_of_ignored();
}

void hfr_nccl_look_around(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, look_around);
}
