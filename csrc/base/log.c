/* Log lines: composed on the stack, written with one write(2), with no lock that a fork could leave taken. */
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "param.h"

#define LINE_MAX_BYTES 2048
#define HOST_MAX_BYTES 65

static _Thread_local int log_rank = -1;

void hfr_log_set_rank(int rank) { log_rank = rank; }

static enum hfr_log_level level_from_text(const char *text) {
  if (!strcasecmp(text, "NONE")) return HFR_LOG_NONE;
  if (!strcasecmp(text, "INFO")) return HFR_LOG_INFO;
  if (!strcasecmp(text, "TRACE")) return HFR_LOG_TRACE;
  return HFR_LOG_WARN;
}

enum hfr_log_level hfr_log_level(void) {
  /* Parameter texts are never freed and equal texts share one address, so the address tells whether the level is still that of
   * the text. */
  static _Atomic(const char *) cached_text;
  static atomic_int cached_level;
  const char *text = hfr_param_text(HFR_PARAM_DEBUG);
  /* acquire: pairs with the release below, so the level seen is the text's. */
  if (atomic_load_explicit(&cached_text, memory_order_acquire) == text)
    return (enum hfr_log_level)atomic_load_explicit(&cached_level, memory_order_relaxed);
  enum hfr_log_level level = level_from_text(text);
  atomic_store_explicit(&cached_level, (int)level, memory_order_relaxed);
  atomic_store_explicit(&cached_text, text, memory_order_release);
  return level;
}

static void short_host(char host[HOST_MAX_BYTES]) {
  if (gethostname(host, HOST_MAX_BYTES - 1)) strcpy(host, "?");
  host[HOST_MAX_BYTES - 1] = '\0';
  host[strcspn(host, ".")] = '\0';
}

/* Expand %h and %p. 0 when it does not fit. */
static int expand_name(const char *pattern, char *name, size_t size) {
  char host[HOST_MAX_BYTES];
  short_host(host);
  size_t used = 0;
  for (const char *p = pattern; *p && used < size; p++) {
    int n;
    if (p[0] == '%' && p[1] == 'h')
      n = snprintf(name + used, size - used, "%s", host), p++;
    else if (p[0] == '%' && p[1] == 'p')
      n = snprintf(name + used, size - used, "%d", (int)getpid()), p++;
    else
      n = snprintf(name + used, size - used, "%c", *p);
    used += (size_t)n;
  }
  return used < size;
}

static int open_log(const char *pattern) {
  char name[4096];
  int fd = -1;
  if (!expand_name(pattern, name, sizeof name))
    errno = ENAMETOOLONG;
  else
    fd = open(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY, 0644); /* O_APPEND: processes may share one file */
  if (fd >= 0) return fd;
  dprintf(STDERR_FILENO, "hfreduce: HFREDUCE_DEBUG_FILE=%s cannot be opened (%s): logging to stderr\n", pattern, strerror(errno));
  return STDERR_FILENO;
}

/*
 * The descriptor to write to. One word holds the pid that opened it and the descriptor: a forked child sees a foreign pid and
 * opens its own file (the name may contain %p).
 */
static int log_fd(void) {
  static _Atomic uint64_t opened;
  const char *pattern = hfr_param_text(HFR_PARAM_DEBUG_FILE);
  if (!*pattern) return STDERR_FILENO;
  uint64_t pid = (uint64_t)getpid(), before = atomic_load(&opened);
  if (before >> 32 == pid) return (int)(uint32_t)before;
  int fd = open_log(pattern);
  if (atomic_compare_exchange_strong(&opened, &before, pid << 32 | (uint32_t)fd)) {
    if (before && (uint32_t)before != STDERR_FILENO) close((int)(uint32_t)before);
    return fd;
  }
  if (fd != STDERR_FILENO) close(fd); /* another thread was first */
  return (int)(uint32_t)before;
}

/* Host, pid and rank; the length. */
static size_t compose_head(char *line, size_t size, enum hfr_log_level level) {
  static const char *const names[] = {"NONE", "WARN", "INFO", "TRACE"};
  char host[HOST_MAX_BYTES], rank[16] = "-";
  short_host(host);
  if (log_rank >= 0) snprintf(rank, sizeof rank, "%d", log_rank);
  return (size_t)snprintf(line, size, "hfreduce [%s:%d:%s] %s ", host, (int)getpid(), rank, names[level]);
}

void hfr_log_wait(char *text, size_t size, int64_t waited_ns, int64_t limit_ns) {
  double waited = (double)waited_ns * 1e-9;
  snprintf(text, size, "%.*f s of %.4g s", waited < 9.95 ? 1 : 0, waited < 9.95 ? waited : (double)(waited_ns / 1000000000),
           (double)limit_ns * 1e-9);
}

void hfr_log_write(enum hfr_log_level level, const char *format, ...) {
  int saved_errno = errno;
  if (level > HFR_LOG_NONE && level <= HFR_LOG_TRACE && level <= hfr_log_level()) {
    char line[LINE_MAX_BYTES];
    size_t head = compose_head(line, sizeof line, level), room = sizeof line - 1 - head; /* 1 for the newline */
    va_list args;
    va_start(args, format);
    errno = saved_errno; /* for %m */
    int n = vsnprintf(line + head, room, format, args);
    va_end(args);
    size_t text = n < 0 ? 0 : (size_t)n < room ? (size_t)n : room - 1;
    /* Text may quote what a peer sent: it must not forge lines or drive a terminal. */
    for (char *p = line + head; p < line + head + text; p++)
      if (((unsigned char)*p < ' ' && *p != '\t') || *p == 0x7f) *p = *p == '\n' ? ' ' : '?';
    line[head + text] = '\n';
    int fd = log_fd();
    while (write(fd, line, head + text + 1) < 0 && errno == EINTR) {
    }
  }
  errno = saved_errno;
}
