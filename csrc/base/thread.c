/* How many CPUs the scheduler will give this process. */
#include "thread.h"

#include <errno.h>
#include <sched.h>

int hfr_ncpus(void) {
  /* The kernel refuses a mask smaller than its own, which may exceed cpu_set_t's 1024 CPUs. */
  for (int capacity = CPU_SETSIZE; capacity <= 1 << 20; capacity *= 2) {
    cpu_set_t *set = CPU_ALLOC(capacity);
    if (!set) break;
    size_t bytes = CPU_ALLOC_SIZE(capacity);
    int rc = sched_getaffinity(0, bytes, set), refused = rc ? errno : 0;
    int count = rc ? 0 : CPU_COUNT_S(bytes, set);
    CPU_FREE(set);
    if (count > 0) return count;
    if (refused != EINVAL) break;
  }
  long online = sysconf(_SC_NPROCESSORS_ONLN);
  return online > 0 ? (int)online : 1;
}
