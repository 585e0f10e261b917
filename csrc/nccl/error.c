/* Results and their texts. */
#include "internal.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Watchdogs ask from threads that had no error themselves: they are told the process' last. */
static _Thread_local char mine[HFR_NCCL_TEXT];
static char anyones[HFR_NCCL_TEXT];
static pthread_mutex_t anyones_lock = PTHREAD_MUTEX_INITIALIZER;

static void record(const char *text) {
  if (text != mine) snprintf(mine, sizeof mine, "%s", text);
  pthread_mutex_lock(&anyones_lock);
  memcpy(anyones, mine, sizeof anyones);
  pthread_mutex_unlock(&anyones_lock);
}

const char *hfr_nccl_text(void) { return mine; }

ncclResult_t hfr_nccl_retell(ncclResult_t code, const char *text) {
  record(text);
  return code;
}

ncclResult_t hfr_nccl_fail(ncclResult_t code, const char *format, ...) {
  char text[HFR_NCCL_TEXT];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  record(text);
  hfr_nccl_log(hfreduceLogInfo, "result %d: %s", (int)code, text);
  return code;
}

void hfr_nccl_log(hfreduceLogLevel_t level, const char *format, ...) {
  char text[1600];
  int n = snprintf(text, sizeof text, "nccl: ");
  va_list args;
  va_start(args, format);
  vsnprintf(text + n, sizeof text - (size_t)n, format, args);
  va_end(args);
  hfreduceLog(level, text);
}

/* The program called ncclAllReduce, not hfreduceAllReduce. */
static void rename_calls(const char *text, char out[HFR_NCCL_TEXT]) {
  static const char ours[] = "hfreduce";
  size_t n = 0;
  while (*text && n + 5 < HFR_NCCL_TEXT) {
    if (!strncmp(text, ours, sizeof ours - 1) && isupper((unsigned char)text[sizeof ours - 1])) {
      memcpy(out + n, "nccl", 4);
      n += 4;
      text += sizeof ours - 1;
    } else {
      out[n++] = *text++;
    }
  }
  out[n] = 0;
}

ncclResult_t hfr_nccl_code(int result, int own) {
  switch (result) {
    case hfreduceMismatch: return ncclInvalidUsage;
    case hfreduceAborted: return own ? ncclInvalidUsage : ncclRemoteError;
    case hfreduceCorrupt: return ncclSystemError;
    default: return result >= 0 && result < ncclNumResults ? (ncclResult_t)result : ncclInternalError;
  }
}

ncclResult_t hfr_nccl_took(ncclComm_t comm, hfreduceResult_t result) {
  hfreduceErrorInfo_t info;
  char text[HFR_NCCL_TEXT];
  if (!result) return ncclSuccess;
  if (result == hfreduceInProgress) return ncclInProgress;
  hfreduceGetErrorInfo(NULL, &info);
  rename_calls(info.text, text);
  record(text);
  return hfr_nccl_code(result, info.peer == (comm ? comm->rank : info.rank));
}

HFR_NCCL_DEFINE(const char *, ncclGetErrorString, (ncclResult_t result)) {
  return hfreduceGetErrorString((unsigned)result < ncclNumResults ? (hfreduceResult_t)result : hfreduceNumResults);
}

HFR_NCCL_DEFINE(const char *, ncclGetLastError, (ncclComm_t comm)) {
  static _Thread_local char told[HFR_NCCL_TEXT];
  told[0] = 0;
  char before[HFR_NCCL_TEXT]; /* asking is no error */
  memcpy(before, mine, sizeof before);
  if (comm && !hfr_nccl_enter(comm, "ncclGetLastError", HFR_NCCL_HANDLE)) {
    hfreduceComm_t core = atomic_load(&comm->core);
    hfreduceErrorInfo_t info = {.code = 0};
    if (core) hfreduceGetErrorInfo(core, &info);
    pthread_mutex_lock(&comm->lock);
    if (info.code)
      rename_calls(info.text, told);
    else if (comm->failed)
      memcpy(told, comm->why, sizeof told);
    pthread_mutex_unlock(&comm->lock);
    hfr_nccl_leave(comm);
  }
  memcpy(mine, before, sizeof mine);
  if (told[0]) return told;
  if (mine[0]) return mine;
  pthread_mutex_lock(&anyones_lock);
  memcpy(told, anyones, sizeof told);
  pthread_mutex_unlock(&anyones_lock);
  return told;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclGetVersion, (int *version)) {
  if (!version) return hfr_nccl_fail(ncclInvalidArgument, "ncclGetVersion: version is NULL");
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
