/*
 * The short way from a NumPy array to a call: reads the array object's fields instead of asking for its buffer, which takes
 * longer than a small all_reduce. Compiled into the cffi module only.
 *
 * The layout is NumPy's published one (PyArrayObject_fields, the head of PyArray_Descr), the same since 1.7; hfr_ndarray_known()
 * compares it with what Python says of a sample before anybody relies on it, in an order in which a wrong layout is found before
 * a pointer from it is followed.
 */
#ifndef HFR_PYTHON_NDARRAY_H_
#define HFR_PYTHON_NDARRAY_H_
#include <hfreduce.h>

/* ---- [cffi begin] ---- */
/* Does the object at `array` lie as we think? Expected: its data address, number of dimensions, first dimension, id of its dtype,
 * NumPy's type number. */
int hfr_ndarray_known(uintptr_t array, uintptr_t data, int ndim, size_t dim0, uintptr_t dtype, int type_num);
/* all_reduce in place of a plain, writable, C-contiguous, aligned array in native byte order. -1: not such an array; nothing was
 * done. */
int hfr_ndarray_all_reduce(uintptr_t array, int op, hfreduceComm_t comm);
/* ---- [cffi end] ---- */

struct hfr_ndarray {
  ptrdiff_t refcount;
  void *type;
  void *data;
  int ndim;
  ptrdiff_t *dims, *strides;
  void *base;
  struct hfr_ndarray_dtype {
    ptrdiff_t refcount;
    void *type, *scalar_type;
    char kind, code, byteorder, flags;
    int type_num;
  } * dtype;
  int flags;
};
#define HFR_NDARRAY_FLAGS (0x0001 | 0x0100 | 0x0400) /* C-contiguous, aligned, writable */

int hfr_ndarray_known(uintptr_t array, uintptr_t data, int ndim, size_t dim0, uintptr_t dtype, int type_num) {
  const struct hfr_ndarray *a = (const struct hfr_ndarray *)array;
  return (uintptr_t)a->data == data && a->ndim == ndim && (uintptr_t)a->dtype == dtype && (size_t)a->dims[0] == dim0 &&
         (a->flags & HFR_NDARRAY_FLAGS) == HFR_NDARRAY_FLAGS && a->dtype->type_num == type_num;
}

int hfr_ndarray_all_reduce(uintptr_t array, int op, hfreduceComm_t comm) {
  /* by NumPy's type number: int8 uint8, int32 uint32, int64 uint64 as long and as long long, float32 float64, float16 */
  static const signed char datatype[24] = {
      -1, 0,  1,  -1, -1, 2,  3, sizeof(long) == 8 ? 4 : 2, sizeof(long) == 8 ? 5 : 3, 4, 5, 7, 8, -1, -1, -1, -1,
      -1, -1, -1, -1, -1, -1, 6};
  const struct hfr_ndarray *a = (const struct hfr_ndarray *)array;
  const struct hfr_ndarray_dtype *d = a->dtype;
  if ((a->flags & HFR_NDARRAY_FLAGS) != HFR_NDARRAY_FLAGS || (unsigned)d->type_num >= sizeof datatype ||
      datatype[d->type_num] < 0 || (d->byteorder != '=' && d->byteorder != '|'))
    return -1;
  size_t count = 1;
  for (int i = 0; i < a->ndim; i++) count *= (size_t)a->dims[i];
  return (int)hfreduceAllReduce(a->data, a->data, count, (hfreduceDataType_t)datatype[d->type_num], (hfreduceRedOp_t)op, comm,
                                NULL);
}
#endif
