/* Errors: whoever first decides which error it is records it with hfr_fail; callers pass the code on. */
#ifndef HFR_BASE_STATUS_H_
#define HFR_BASE_STATUS_H_
#include "../include/hfreduce.h"

/* Record a message (printf style) as this thread's last error and return `code`. The message says what was wrong, with the facts,
   and what to do. */
hfreduceResult_t hfr_fail(hfreduceResult_t code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* This thread's last error. Never NULL; code 0 and empty text when there was none. Fields beside code and text may be filled by
   the caller through it. */
hfreduceErrorInfo_t *hfr_last_error(void);

/* strerror(error); of descriptors that have run out with the limit and what to do. Valid until the thread's next call. */
const char *hfr_errno_text(int error);

/* Reset an info: code 0, numbers -1, strings empty. */
void hfr_error_clear(hfreduceErrorInfo_t *info);

/* `expr` failed: return its code from the calling function. */
#define HFR_TRY(expr)                                 \
  do {                                                \
    hfreduceResult_t hfr_try_ = (expr);               \
    if (hfr_try_ != hfreduceSuccess) return hfr_try_; \
  } while (0)
#endif
