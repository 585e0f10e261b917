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
enum {
  HFR_NDARRAY_ALL_REDUCE,
  HFR_NDARRAY_REDUCE,
  HFR_NDARRAY_BROADCAST,
  HFR_NDARRAY_ALL_GATHER,
  HFR_NDARRAY_REDUCE_SCATTER,
  HFR_NDARRAY_ALL_TO_ALL
};
/* A collective on plain, C-contiguous, aligned arrays in native byte order: from `array` to `out`, or in its place where that is
 * 0. call: which, plus 256 times the op. Few arguments, because each is converted. -1: they are not such arrays, or do not
 * fit; nothing was done. */
int hfr_ndarray_call(int call, uintptr_t array, uintptr_t out, int root, hfreduceComm_t comm);
/* Launch the same. NULL: nothing was launched, and hfr_ndarray_why() says why to the thread: -1 as above, or the result. */
hfreduceWork_t hfr_ndarray_launch(int call, uintptr_t array, uintptr_t out, int root, hfreduceComm_t comm);
int hfr_ndarray_why(void);
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
#define HFR_NDARRAY_READ (0x0001 | 0x0100)            /* C-contiguous, aligned */
#define HFR_NDARRAY_WRITE (HFR_NDARRAY_READ | 0x0400) /* and writable */

int hfr_ndarray_known(uintptr_t array, uintptr_t data, int ndim, size_t dim0, uintptr_t dtype, int type_num) {
  const struct hfr_ndarray *a = (const struct hfr_ndarray *)array;
  return (uintptr_t)a->data == data && a->ndim == ndim && (uintptr_t)a->dtype == dtype && (size_t)a->dims[0] == dim0 &&
         (a->flags & HFR_NDARRAY_WRITE) == HFR_NDARRAY_WRITE && a->dtype->type_num == type_num;
}

/* The array's datatype, or -1; flags: HFR_NDARRAY_*. */
static int hfr_ndarray_look(const struct hfr_ndarray *a, int flags, size_t *count) {
  /* by NumPy's type number: int8 uint8, int32 uint32, int64 uint64 as long and as long long, float32 float64, float16 */
  static const signed char datatype[24] = {
      -1, 0,  1,  -1, -1, 2,  3, sizeof(long) == 8 ? 4 : 2, sizeof(long) == 8 ? 5 : 3, 4, 5, 7, 8, -1, -1, -1, -1,
      -1, -1, -1, -1, -1, -1, 6};
  const struct hfr_ndarray_dtype *d = a->dtype;
  if ((a->flags & flags) != flags || (unsigned)d->type_num >= sizeof datatype || (d->byteorder != '=' && d->byteorder != '|'))
    return -1;
  *count = 1;
  for (int i = 0; i < a->ndim; i++) *count *= (size_t)a->dims[i];
  return datatype[d->type_num];
}

int hfr_ndarray_call(int call, uintptr_t array, uintptr_t out, int root, hfreduceComm_t comm) {
  const struct hfr_ndarray *a = (const struct hfr_ndarray *)array, *b = (const struct hfr_ndarray *)out;
  size_t count, other = 0;
  int type = hfr_ndarray_look(a, b ? HFR_NDARRAY_READ : HFR_NDARRAY_WRITE, &count), n = 0;
  if (type < 0 || (b && hfr_ndarray_look(b, HFR_NDARRAY_WRITE, &other) != type)) return -1;
  hfreduceDataType_t t = (hfreduceDataType_t)type;
  hfreduceRedOp_t op = (hfreduceRedOp_t)(call >> 8);
  if (b && hfreduceCommCount(comm, &n)) return -1;
  if (!b) other = count;
  void *to = b ? b->data : a->data;
  switch (call & 255) {
    case HFR_NDARRAY_ALL_REDUCE: return other != count ? -1 : (int)hfreduceAllReduce(a->data, to, count, t, op, comm, NULL);
    case HFR_NDARRAY_REDUCE: return other != count ? -1 : (int)hfreduceReduce(a->data, to, count, t, op, root, comm, NULL);
    case HFR_NDARRAY_BROADCAST: return other != count ? -1 : (int)hfreduceBroadcast(a->data, to, count, t, root, comm, NULL);
    case HFR_NDARRAY_ALL_GATHER:
      return !b || other != count * (size_t)n ? -1 : (int)hfreduceAllGather(a->data, b->data, count, t, comm, NULL);
    case HFR_NDARRAY_REDUCE_SCATTER:
      return !b || count != other * (size_t)n ? -1 : (int)hfreduceReduceScatter(a->data, b->data, other, t, op, comm, NULL);
    case HFR_NDARRAY_ALL_TO_ALL:
      return !b || count != other || count % (size_t)n
                 ? -1
                 : (int)hfreduceAlltoAll(a->data, b->data, count / (size_t)n, t, comm, NULL);
    default: return -1;
  }
}

static _Thread_local int hfr_ndarray_code;

int hfr_ndarray_why(void) { return hfr_ndarray_code; }

hfreduceWork_t hfr_ndarray_launch(int call, uintptr_t array, uintptr_t out, int root, hfreduceComm_t comm) {
  hfreduceWork_t work = NULL;
  hfreduceGroupStart();
  if ((hfr_ndarray_code = hfr_ndarray_call(call, array, out, root, comm)) < 0)
    hfreduceGroupEnd(); /* of nothing */
  else
    hfr_ndarray_code = (int)hfreduceGroupEndAsync(&work); /* also says what was wrong with the call */
  return work;
}
#endif
