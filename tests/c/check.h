/* The C tests' one tool: CHECK counts, prints what failed with its place, and check_done gives the summary and the exit status.
 */
#ifndef HFR_TESTS_CHECK_H_
#define HFR_TESTS_CHECK_H_
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>

#define CHECK_PRINTED_MAX 50 /* a loop gone wrong need not fill the disk */

static atomic_long check_passed, check_failed;

/* CHECK(condition) or CHECK(condition, "values: %d", n); gives the condition's truth. Any thread may use it; the condition is
 * evaluated once. */
#define CHECK(condition, ...) check_note((condition) ? 1 : 0, __FILE__, __LINE__, #condition, " " __VA_ARGS__)

static inline __attribute__((format(printf, 5, 6))) int check_note(int ok, const char *file, int line, const char *condition,
                                                                   const char *format, ...) {
  if (ok) {
    check_passed++;
    return 1;
  }
  if (check_failed++ < CHECK_PRINTED_MAX) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fprintf(stderr, "%s:%d: %s is false:%s\n", file, line, condition, text);
  }
  return 0;
}

/* Print the summary; the value for main to return. */
static inline int check_done(void) {
  printf("%ld checks passed, %ld failed\n", (long)check_passed, (long)check_failed);
  return check_failed ? 1 : 0;
}
#endif
