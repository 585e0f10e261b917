/* As nccl.h beside it. */
#include "nccl.h"
