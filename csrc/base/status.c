/* The last error of each thread. */
#include "status.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#include "log.h"

static _Thread_local hfreduceErrorInfo_t last_error = {.rank = -1, .peer = -1, .seq = -1};

hfreduceErrorInfo_t *hfr_last_error(void) { return &last_error; }

void hfr_error_clear(hfreduceErrorInfo_t *info) {
  memset(info, 0, sizeof *info);
  info->rank = info->peer = -1;
  info->seq = -1;
}

const char *hfr_errno_text(int error) {
  static _Thread_local char text[160];
  struct rlimit limit;
  if (error == EMFILE && !getrlimit(RLIMIT_NOFILE, &limit)) {
    snprintf(text, sizeof text, "this process may open %llu descriptors (ulimit -n) and all are in use; raise the limit",
             (unsigned long long)limit.rlim_cur);
    return text;
  }
  if (error == ENFILE) return "the system has no descriptors left (sysctl fs.file-max)";
  return strerror(error);
}

hfreduceResult_t hfr_fail(hfreduceResult_t code, const char *format, ...) {
  int saved_errno = errno;           /* callers look at it after the failure (ECONNREFUSED: retry) */
  char text[sizeof last_error.text]; /* apart, because the arguments may quote the previous error */
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  hfr_error_clear(&last_error);
  last_error.code = (int)code;
  memcpy(last_error.text, text, sizeof text);
  HFR_TRACE("error %d: %s", (int)code, text);
  errno = saved_errno;
  return code;
}
