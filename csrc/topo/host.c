/* Host name, and the identity that decides which ranks share memory. */
#include "host.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../base/mac.h"
#include "../base/param.h"

/* First line of a small file; "" when it cannot be read. */
static void read_line(const char *path, char *text, size_t size) {
  ssize_t got = 0;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd >= 0) {
    got = read(fd, text, size - 1);
    close(fd);
  }
  text[got > 0 ? got : 0] = '\0';
  text[strcspn(text, "\n")] = '\0';
}

/* As the kernel tells of the first CPU; 0: it does not. */
static size_t told_cache_bytes(int level) {
  for (int i = 0; i < 8; i++) {
    char path[96], text[32], unit = 0;
    size_t size = 0;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/level", i);
    read_line(path, text, sizeof text);
    if (text[0] != '0' + level) continue;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
    read_line(path, text, sizeof text);
    if (sscanf(text, "%zu%c", &size, &unit) > 1) size <<= unit == 'K' ? 10 : unit == 'M' ? 20 : 0;
    return size;
  }
  return 0;
}

/* sysconf() comes second: of the third level it may mean all that a socket has, of which a core reaches a part. */
size_t hfr_cache_bytes(int level) {
  static _Atomic size_t known[4];
  size_t bytes = atomic_load_explicit(&known[level], memory_order_relaxed);
  if (bytes) return bytes;
  long fallback = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
  bytes = told_cache_bytes(level);
  if (!bytes) bytes = fallback > 0 ? (size_t)fallback : level == 2 ? (size_t)1 << 20 : (size_t)32 << 20;
  atomic_store_explicit(&known[level], bytes, memory_order_relaxed);
  return bytes;
}

void hfr_host_name(char name[64]) {
  if (gethostname(name, 64)) name[0] = '\0';
  name[63] = '\0';
  if (!name[0]) strcpy(name, "localhost");
}

/* Without a boot id (no /proc) the installation's id and the name stand in: two machines of one image differ at least by name. */
static void boot_text(char text[256]) {
  char id[96], host[64];
  read_line("/proc/sys/kernel/random/boot_id", id, sizeof id);
  if (id[0]) {
    snprintf(text, 256, "boot %s", id);
    return;
  }
  read_line("/etc/machine-id", id, sizeof id);
  hfr_host_name(host);
  snprintf(text, 256, "machine %s host %s", id, host);
}

static const uint8_t key[16] = {0}; /* every rank must get the same hash: it tells apart, it hides nothing */

void hfr_machine_id(uint8_t id[16]) {
  char boot[256];
  boot_text(boot);
  hfr_mac(key, boot, strlen(boot), id);
}

void hfr_host_id(uint8_t id[16]) {
  const char *given = hfr_param_text(HFR_PARAM_HOSTID);
  if (*given) {
    hfr_mac(key, given, strlen(given), id);
    return;
  }
  char boot[256], text[384];
  struct stat netns;
  boot_text(boot);
  if (stat("/proc/self/ns/net", &netns)) memset(&netns, 0, sizeof netns);
  int n =
      snprintf(text, sizeof text, "%s netns %llu:%llu", boot, (unsigned long long)netns.st_dev, (unsigned long long)netns.st_ino);
  hfr_mac(key, text, (size_t)n, id);
}
