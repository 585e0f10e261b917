/* Calls in words. */
#include "call.h"

#include <stdio.h>

const char *hfr_coll_name(int coll) {
  static const char *const name[HFR_NCOLL] = {"all_reduce", "reduce",  "broadcast", "all_gather", "reduce_scatter", "all_to_all",
                                              "gather",     "scatter", "barrier",   "send/recv",  "pair exchange"};
  return coll >= 0 && coll < HFR_NCOLL ? name[coll] : "?";
}

void hfr_describe_fingerprint(const struct hfr_fingerprint *fp, char *text, size_t size) {
  static const char *const op[] = {"sum", "prod", "max", "min", "avg", "premul_sum"};
  int n = snprintf(text, size, "%s%s #%llu(", hfr_coll_name(fp->coll), fp->way ? " over NVLink pairs" : "",
                   (unsigned long long)fp->seq);
  if (fp->coll != HFR_BARRIER && n > 0 && (size_t)n < size)
    n += snprintf(text + n, size - (size_t)n, "count %llu, %s", (unsigned long long)fp->count,
                  hfr_dtype_name((hfreduceDataType_t)fp->dtype));
  if ((fp->coll == HFR_ALL_REDUCE || fp->coll == HFR_REDUCE || fp->coll == HFR_REDUCE_SCATTER) && (size_t)n < size)
    n += snprintf(text + n, size - (size_t)n, ", %s", fp->op < 6 ? op[fp->op] : "?");
  if (fp->coll == HFR_P2P ? fp->root > 0 : fp->root >= 0)
    if ((size_t)n < size) n += snprintf(text + n, size - (size_t)n, fp->coll == HFR_P2P ? ", tag %d" : ", root %d", fp->root);
  if ((size_t)n < size) snprintf(text + n, size - (size_t)n, ")");
}
