/* Parameters by NCCL's calls: every parameter of hfreduce, under its own name and under NCCL's where it has one. */
#include "internal.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A handle is the address of the parameter's entry here. */
struct ncclParamHandle {
  hfreduceParam_t param;
};

static struct ncclParamHandle *all;
static const char **keys;
static int nparams, nkeys;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load(void) {
  nparams = hfreduceParamCount();
  all = calloc((size_t)nparams, sizeof *all);
  keys = calloc(2 * (size_t)nparams, sizeof *keys);
  if (!all || !keys) nparams = 0;
  for (int i = 0; i < nparams; i++) {
    hfreduceParamGet(i, &all[i].param);
    keys[nkeys++] = all[i].param.name;
    if (all[i].param.alias) keys[nkeys++] = all[i].param.alias;
  }
}

static struct ncclParamHandle *find(const char *key) {
  pthread_once(&once, load);
  for (int i = 0; i < nparams; i++)
    if (!strcmp(key, all[i].param.name) || (all[i].param.alias && !strcmp(key, all[i].param.alias))) return &all[i];
  return NULL;
}

static ncclResult_t check(const char *f, ncclParamHandle_t h, const void *out) {
  pthread_once(&once, load);
  if (!out) return hfr_nccl_fail(ncclInvalidArgument, "%s: out is NULL", f);
  if (nparams && h >= all && h < all + nparams && ((uintptr_t)h - (uintptr_t)all) % sizeof *all == 0) return ncclSuccess;
  return hfr_nccl_fail(ncclInvalidArgument, "%s: the handle is not of ncclParamBind", f);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclParamBind, (ncclParamHandle_t * out, const char *key)) {
  static const char f[] = "ncclParamBind";
  if (!out || !key) return hfr_nccl_fail(ncclInvalidArgument, "%s: %s is NULL", f, out ? "key" : "out");
  *out = find(key);
  return *out ? ncclSuccess : hfr_nccl_fail(ncclInvalidArgument, "%s: there is no parameter %.100s", f, key);
}

/* Integers and sizes ("128K", "1MiB"); 0 where the text is none. */
static int read_number(const char *text, int64_t *number) {
  char *end;
  errno = 0;
  long long n = strtoll(text, &end, 10);
  if (end == text || errno) return 0;
  const char *units = "KMG", *unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
  if (*end && !unit) return 0;
  if (unit && end[1] && strcmp(end + 1, "iB") && strcmp(end + 1, "B") && strcmp(end + 1, "b")) return 0;
  return !__builtin_mul_overflow((int64_t)n, unit ? (int64_t)1 << (10 * (unit - units + 1)) : 1, number);
}

static ncclResult_t get_integer(const char *f, ncclParamHandle_t h, const void *out, int64_t low, uint64_t high, int64_t *value) {
  HFR_NCCL_TRY(check(f, h, out));
  if (!read_number(h->param.value, value))
    return hfr_nccl_fail(ncclInvalidArgument, "%s: %s is \"%.100s\", which is no integer", f, h->param.name, h->param.value);
  if (*value < low || (*value > 0 && (uint64_t)*value > high))
    return hfr_nccl_fail(ncclInvalidArgument, "%s: %s is %lld, which does not fit", f, h->param.name, (long long)*value);
  return ncclSuccess;
}

#define GETTER(name, type, low, high)                                        \
  HFR_NCCL_DEFINE(ncclResult_t, name, (ncclParamHandle_t h, type * out)) {   \
    int64_t value;                                                           \
    HFR_NCCL_TRY(get_integer(#name, h, out, low, (uint64_t)(high), &value)); \
    *out = (type)value;                                                      \
    return ncclSuccess;                                                      \
  }
GETTER(ncclParamGetI8, int8_t, INT8_MIN, INT8_MAX)
GETTER(ncclParamGetI16, int16_t, INT16_MIN, INT16_MAX)
GETTER(ncclParamGetI32, int32_t, INT32_MIN, INT32_MAX)
GETTER(ncclParamGetI64, int64_t, INT64_MIN, INT64_MAX)
GETTER(ncclParamGetU8, uint8_t, 0, UINT8_MAX)
GETTER(ncclParamGetU16, uint16_t, 0, UINT16_MAX)
GETTER(ncclParamGetU32, uint32_t, 0, UINT32_MAX)
GETTER(ncclParamGetU64, uint64_t, 0, UINT64_MAX)

HFR_NCCL_DEFINE(ncclResult_t, ncclParamGetStr, (ncclParamHandle_t h, const char **out)) {
  HFR_NCCL_TRY(check("ncclParamGetStr", h, out));
  *out = h->param.value;
  return ncclSuccess;
}

/* Integers as eight bytes, all else as the text with its NUL. */
HFR_NCCL_DEFINE(ncclResult_t, ncclParamGet, (ncclParamHandle_t h, void *out, int maxLen, int *len)) {
  static const char f[] = "ncclParamGet";
  int64_t number;
  HFR_NCCL_TRY(check(f, h, out));
  if (!len) return hfr_nccl_fail(ncclInvalidArgument, "%s: len is NULL", f);
  int is_number = read_number(h->param.value, &number);
  const void *from = is_number ? (const void *)&number : h->param.value;
  *len = is_number ? (int)sizeof number : (int)strlen(h->param.value) + 1;
  if (*len > maxLen)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: %s has %d bytes, there is room for %d", f, h->param.name, *len, maxLen);
  memcpy(out, from, (size_t)*len);
  return ncclSuccess;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclParamGetParameter, (const char *key, const char **value, int *valueLen)) {
  static const char f[] = "ncclParamGetParameter";
  if (!key || !value) return hfr_nccl_fail(ncclInvalidArgument, "%s: %s is NULL", f, key ? "value" : "key");
  struct ncclParamHandle *h = find(key);
  if (!h) return hfr_nccl_fail(ncclInvalidArgument, "%s: there is no parameter %.100s", f, key);
  *value = h->param.value;
  if (valueLen) *valueLen = (int)strlen(*value);
  return ncclSuccess;
}

HFR_NCCL_DEFINE(ncclResult_t, ncclParamGetAllParameterKeys, (const char ***table, int *tableLen)) {
  static const char f[] = "ncclParamGetAllParameterKeys";
  if (!table || !tableLen) return hfr_nccl_fail(ncclInvalidArgument, "%s: %s is NULL", f, table ? "tableLen" : "table");
  pthread_once(&once, load);
  *table = keys;
  *tableLen = nkeys;
  return ncclSuccess;
}

HFR_NCCL_DEFINE(void, ncclParamDumpAll, (void)) {
  pthread_once(&once, load);
  for (int i = 0; i < nparams; i++)
    hfr_nccl_log(hfreduceLogInfo, "%s=%s%s", all[i].param.name, all[i].param.value, all[i].param.is_set ? "" : " (preset)");
}

/* Parameters are read once a process, so there is nothing to read again. */
HFR_NCCL_DEFINE(void, ncclResetDebugInit, (void)) {}
