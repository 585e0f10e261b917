/* The table of datatypes. */
#include "dtype.h"

#define HFR_ROW(suffix, text, storage, what, in, scalar, overflows, legal)                                     \
  [hfreduce##suffix] = {.name = text,                                                                          \
                        .size = sizeof(storage),                                                               \
                        .factor_size = hfreduce##scalar == hfreduce##suffix ? sizeof(storage) : sizeof(float), \
                        .kind = HFR_KIND_##what,                                                               \
                        .small = hfreduce##in != hfreduce##suffix,                                             \
                        .spills = overflows,                                                                   \
                        .ops = legal,                                                                          \
                        .computed = hfreduce##in,                                                              \
                        .factor = hfreduce##scalar},
#define HFR_COUNT(...) +1
#define HFR_FACTOR_IS_KNOWN(suffix, text, storage, what, in, scalar, overflows, legal)        \
  _Static_assert(hfreduce##scalar == hfreduce##suffix || hfreduce##scalar == hfreduceFloat32, \
                 "a factor is of the type or a float32");

const struct hfr_dtype hfr_dtype_table[hfreduceNumTypes] = {HFR_DTYPES(HFR_ROW)};
const struct hfr_dtype hfr_dtype_unknown = {.name = "?"};
_Static_assert(0 HFR_DTYPES(HFR_COUNT) == hfreduceNumTypes, "every datatype has its row");
HFR_DTYPES(HFR_FACTOR_IS_KNOWN)

const struct hfr_dtype *hfr_dtype_at(int index, hfreduceDataType_t *dtype) {
  if (index < 0 || index >= hfreduceNumTypes) return NULL;
  *dtype = (hfreduceDataType_t)index;
  return &hfr_dtype_table[index];
}
