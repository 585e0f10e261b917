/* Log lines to stderr or HFREDUCE_DEBUG_FILE: "hfreduce [host:pid:rank] LEVEL text". One write(2) a line, so lines of ranks do
 * not mix. */
#ifndef HFR_BASE_LOG_H_
#define HFR_BASE_LOG_H_
#include <stddef.h>
#include <stdint.h>

enum hfr_log_level { HFR_LOG_NONE, HFR_LOG_WARN, HFR_LOG_INFO, HFR_LOG_TRACE };
/* Level in force: HFREDUCE_DEBUG, else NCCL_DEBUG (NONE, VERSION, WARN, INFO, TRACE; anything else is WARN). Preset WARN. */
enum hfr_log_level hfr_log_level(void);
/* Rank printed by this thread's lines; -1 (preset) prints "-". */
void hfr_log_set_rank(int rank);
void hfr_log_write(enum hfr_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* How long a wait has lasted and may last, as messages of waits say it: "10 s of 1800 s". */
void hfr_log_wait(char *text, size_t size, int64_t waited_ns, int64_t limit_ns);
#define HFR_WARN(...) hfr_log_write(HFR_LOG_WARN, __VA_ARGS__)
#define HFR_INFO(...)                                                              \
  do {                                                                             \
    if (hfr_log_level() >= HFR_LOG_INFO) hfr_log_write(HFR_LOG_INFO, __VA_ARGS__); \
  } while (0)
#define HFR_TRACE(...)                                                               \
  do {                                                                               \
    if (hfr_log_level() >= HFR_LOG_TRACE) hfr_log_write(HFR_LOG_TRACE, __VA_ARGS__); \
  } while (0)
#endif
