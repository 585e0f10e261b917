/* Compiles only if every declaration of ours is NVIDIA's: the compiler compares the two. */
#include <nccl.h>
#include <nccl_device.h>

/* Off Linux, as NVIDIA's header tells it by a macro of its build, it hides this one behind an empty macro. */
#undef ncclResetDebugInit
#undef pncclResetDebugInit
struct ncclGinOutboxHandle;
struct ncclGinInboxA2AHandle;
#include "../../csrc/nccl/calls.h"
