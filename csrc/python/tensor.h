/* The short way from a torch tensor to a call: addresses as integers, as Tensor.data_ptr() gives them. Compiled into the cffi
 * module only. */
#ifndef HFR_PYTHON_TENSOR_H_
#define HFR_PYTHON_TENSOR_H_
#include <hfreduce.h>

/* ---- [cffi begin] ---- */
int hfr_tensor_all_reduce(uintptr_t data, size_t count, int datatype, int op, hfreduceComm_t comm);
/* ---- [cffi end] ---- */

int hfr_tensor_all_reduce(uintptr_t data, size_t count, int datatype, int op, hfreduceComm_t comm) {
  return (int)hfreduceAllReduce((void *)data, (void *)data, count, (hfreduceDataType_t)datatype, (hfreduceRedOp_t)op, comm, NULL);
}
#endif
