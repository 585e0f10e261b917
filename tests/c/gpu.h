/* What tests do with a GPU: memory, streams and graphs through the driver's interface, on a real driver or on the stand-in
 * (fake/cuda), which must be in the loader's path then. */
#ifndef TESTS_GPU_H_
#define TESTS_GPU_H_
#include "device/cuda_lib.h"

#include "ranks.h"

#include <hfreduce.h>

typedef struct exec *gpu_exec;
extern struct gpu {
  const struct hfr_cu *cu;
  int devices, stand_in;
  int tells_stale;   /* the driver refuses streams that are gone; a real one may crash on them */
  const char *apart; /* the case whose threads need a device each: else one's default stream is the other's */
  hfr_cu_result (*managed)(hfr_cu_ptr *pointer, size_t bytes, unsigned flags);
  hfr_cu_result (*host_alloc)(void **pointer, size_t bytes, unsigned flags);
  hfr_cu_result (*host_free)(void *pointer);
  hfr_cu_result (*stream_sync)(hfr_cu_stream stream);
  hfr_cu_result (*stream_priority)(hfr_cu_stream stream, int *priority);
  hfr_cu_result (*set_current)(hfr_cu_context context);
  hfr_cu_result (*set8)(hfr_cu_ptr to, unsigned char value, size_t bytes, hfr_cu_stream stream);
  hfr_cu_result (*begin)(hfr_cu_stream stream, int mode);
  hfr_cu_result (*end)(hfr_cu_stream stream, hfr_cu_graph *graph);
  hfr_cu_result (*instantiate)(gpu_exec *exec, hfr_cu_graph graph, unsigned long long flags);
  hfr_cu_result (*launch)(gpu_exec exec, hfr_cu_stream stream);
  hfr_cu_result (*graph_destroy)(hfr_cu_graph graph);
  hfr_cu_result (*exec_destroy)(gpu_exec exec);
  hfr_cu_result (*context_create)(hfr_cu_context *context, unsigned flags, hfr_cu_device device);
  hfr_cu_result (*context_destroy)(hfr_cu_context context);
  hfr_cu_result (*reset)(hfr_cu_device device);
} gpu;

/* Open the driver and make the primary context of a device (modulo how many there are) the thread's. 0: there is no driver, or no
 * device. Ends the process when a driver's call fails. */
int gpu_open(int device);
void gpu_check(hfr_cu_result result, const char *what);
#define CU(call) gpu_check(call, #call)

void *gpu_alloc(size_t bytes);
void gpu_free(void *pointer);
hfr_cu_stream gpu_stream(void);
/* Copy, in the stream; the host's side is pageable or pinned. */
void gpu_copy(void *to, const void *from, size_t bytes, hfr_cu_stream stream);
void gpu_fill(void *to, int byte, size_t bytes, hfr_cu_stream stream);
/* Copy to the host, after all that is in the stream. */
void gpu_read(void *to, const void *from, size_t bytes, hfr_cu_stream stream);

/* The stream runs dry within so many seconds. */
int gpu_runs_dry(hfr_cu_stream stream, double seconds);
/* Wait for the communicator's error so many seconds, and give it. */
hfreduceResult_t gpu_error_of(hfreduceComm_t comm, double seconds);
double gpu_now(void);

/* A rank's start: a device and a communicator. Ends the process when there is none. */
hfreduceComm_t gpu_join(int rank, int nranks, const hfreduceUniqueId *id);

/* What a program consists of. Its arguments: [--quick] [case [layout ...]]; a layout as in ranks.h, "t4": four threads. */
struct gpu_case {
  const char *name;
  rank_function function; /* arg: not NULL when quick */
  const char *layouts;
};
/* The exit status: 77 where there is no driver. */
int gpu_run_cases(const struct gpu_case *cases, int n, int argc, char **argv);
#endif
