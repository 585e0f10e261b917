/*
 * Datatypes: the one table of what each of them is. A new one has its number in include/hfreduce.h, its row here, and what the
 * kernels compute with it in simd/kernels.inc and device/cuda_reduce.cu; everybody else asks this table, from outside through
 * hfreduceTypeGet().
 */
#ifndef HFR_CALL_DTYPE_H_
#define HFR_CALL_DTYPE_H_
#include "../include/hfreduce.h"

#define HFR_OP_BIT(op) (1u << hfreduce##op)
#define HFR_OPS_ALL (HFR_OP_BIT(Sum) | HFR_OP_BIT(Prod) | HFR_OP_BIT(Max) | HFR_OP_BIT(Min) | HFR_OP_BIT(Avg))

/* X(suffix, name, storage, kind, computed, factor, spills, ops)
     suffix    of hfreduceDataType_t
     name      as NumPy and ml_dtypes spell it
     storage   C type of an element's bits
     kind      Int, Uint or Float: the suffix of an hfr_dtype_kind
     computed  the type that a reduction computes in, before it rounds once
     factor    the type that the factor of a premultiplied sum is given in
     spills    1: a sum may overflow where the average of the same numbers would not, so an average scales before its first
               rounding
     ops       the ops that are defined for it
   Small floats are those that are computed in another type: the kernels widen and narrow them. */
#define HFR_DTYPES_WHOLE(X)                                             \
  X(Int8, "int8", int8_t, Int, Int8, Int8, 0, HFR_OPS_ALL)              \
  X(Uint8, "uint8", uint8_t, Uint, Uint8, Uint8, 0, HFR_OPS_ALL)        \
  X(Int32, "int32", int32_t, Int, Int32, Int32, 0, HFR_OPS_ALL)         \
  X(Uint32, "uint32", uint32_t, Uint, Uint32, Uint32, 0, HFR_OPS_ALL)   \
  X(Int64, "int64", int64_t, Int, Int64, Int64, 0, HFR_OPS_ALL)         \
  X(Uint64, "uint64", uint64_t, Uint, Uint64, Uint64, 0, HFR_OPS_ALL)   \
  X(Float32, "float32", float, Float, Float32, Float32, 0, HFR_OPS_ALL) \
  X(Float64, "float64", double, Float, Float64, Float64, 0, HFR_OPS_ALL)
#define HFR_DTYPES_SMALL(X)                                                        \
  X(Float16, "float16", uint16_t, Float, Float32, Float16, 1, HFR_OPS_ALL)         \
  X(Bfloat16, "bfloat16", uint16_t, Float, Float32, Bfloat16, 0, HFR_OPS_ALL)      \
  X(Float8e4m3, "float8_e4m3fn", uint8_t, Float, Float32, Float32, 1, HFR_OPS_ALL) \
  X(Float8e5m2, "float8_e5m2", uint8_t, Float, Float32, Float32, 1, HFR_OPS_ALL)
#define HFR_DTYPES(X) HFR_DTYPES_WHOLE(X) HFR_DTYPES_SMALL(X)

enum hfr_dtype_kind { HFR_KIND_Int, HFR_KIND_Uint, HFR_KIND_Float };

struct hfr_dtype {
  const char *name;
  uint8_t size, factor_size; /* bytes of an element, and of a premultiplied sum's factor; size 0: a number without a type */
  uint8_t kind;
  uint8_t small, spills;
  uint16_t ops; /* bit hfreduceSum and so on */
  hfreduceDataType_t computed, factor;
};

extern const struct hfr_dtype hfr_dtype_table[hfreduceNumTypes];

/* The row of a number that may be any; an unknown one has a row of size 0 named "?". */
static inline const struct hfr_dtype *hfr_dtype(hfreduceDataType_t dtype) {
  extern const struct hfr_dtype hfr_dtype_unknown;
  return (unsigned)dtype < hfreduceNumTypes ? &hfr_dtype_table[dtype] : &hfr_dtype_unknown;
}
/* Bytes of an element; 0 for an unknown datatype. */
static inline size_t hfr_dtype_size(hfreduceDataType_t dtype) { return hfr_dtype(dtype)->size; }
static inline const char *hfr_dtype_name(hfreduceDataType_t dtype) { return hfr_dtype(dtype)->name; }
static inline int hfr_dtype_is_float(hfreduceDataType_t dtype) { return hfr_dtype(dtype)->kind == HFR_KIND_Float; }
/* The index-th type of the table, in the order of numbers; NULL past the end. */
const struct hfr_dtype *hfr_dtype_at(int index, hfreduceDataType_t *dtype);
#endif
