/* Calls in words. */
#include "shape.h"

#include <stdio.h>

const char *hfr_coll_name(int coll) { return coll >= 0 && coll < HFR_NCOLL ? hfr_shape_table[coll].name : "?"; }

void hfr_describe_fingerprint(const struct hfr_fingerprint *fp, char *text, size_t size) {
  static const char *const op[] = {"sum", "prod", "max", "min", "avg", "premul_sum"};
  int n = snprintf(text, size, "%s%s #%llu(", hfr_coll_name(fp->coll), fp->way ? " over NVLink pairs" : "",
                   (unsigned long long)fp->seq);
  static const struct hfr_shape unknown = {.send = HFR_ROW};
  const struct hfr_shape *shape = fp->coll < HFR_NCOLL ? &hfr_shape_table[fp->coll] : &unknown;
  if ((shape->send || fp->coll == HFR_PAIR) && n > 0 && (size_t)n < size)
    n += snprintf(text + n, size - (size_t)n, "count %llu, %s", (unsigned long long)fp->count,
                  hfr_dtype_name((hfreduceDataType_t)fp->dtype));
  if (shape->reduces && (size_t)n < size) n += snprintf(text + n, size - (size_t)n, ", %s", fp->op < 6 ? op[fp->op] : "?");
  if (fp->coll == HFR_P2P ? fp->root > 0 : fp->root >= 0)
    if ((size_t)n < size) n += snprintf(text + n, size - (size_t)n, fp->coll == HFR_P2P ? ", tag %d" : ", root %d", fp->root);
  if ((size_t)n < size) snprintf(text + n, size - (size_t)n, ")");
}
