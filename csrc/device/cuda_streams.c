/* Streams of the library's own. */
#include "cuda.h"

hfreduceResult_t hfr_cuda_stream_create(const struct hfr_cu *cu, hfr_cu_stream *stream) {
  int least = 0, greatest = 0;
  if (cu->priority_range && cu->priority_range(&least, &greatest)) greatest = 0;
  int r = cu->stream_create(stream, HFR_CU_STREAM_NON_BLOCKING, greatest);
  return r ? hfr_cuda_fail("cuStreamCreateWithPriority", r) : hfreduceSuccess;
}
