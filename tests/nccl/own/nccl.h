/* Stands in for NVIDIA's header where that is not there: our declarations, which tests hold against NVIDIA's where it is. */
#ifndef NCCL_H_
#define NCCL_H_
#include "../../../csrc/nccl/types.h"
#include "../../../csrc/nccl/calls.h"
#define UNDEF NCCL_CONFIG_UNDEF_INT
#define NCCL_CONFIG_INITIALIZER                                                                                                  \
  {                                                                                                                              \
    sizeof(ncclConfig_t), NCCL_API_MAGIC, NCCL_VERSION_CODE, UNDEF, UNDEF, UNDEF, UNDEF, NULL, UNDEF, UNDEF, NULL, UNDEF, UNDEF, \
        UNDEF, UNDEF, UNDEF, UNDEF, UNDEF, UNDEF, UNDEF, UNDEF, UNDEF, UNDEF, UNDEF, UNDEF, UNDEF                                \
  }
#define NCCL_COLLCONFIG_INITIALIZER \
  { sizeof(ncclCollConfig_t), NCCL_API_MAGIC, NCCL_VERSION_CODE, NULL, UNDEF, UNDEF, UNDEF, UNDEF, NULL, 1, UNDEF, 0, NULL }
#define NCCL_SIM_INFO_INITIALIZER \
  { sizeof(ncclSimInfo_t), NCCL_SIM_INFO_MAGIC, NCCL_VERSION_CODE, -1.0f }
#define NCCL_ENCRYPTION_CONFIG_INITIALIZER \
  { sizeof(ncclEncryptionConfig_t), NCCL_API_MAGIC, NCCL_VERSION_CODE, NCCL_ENCRYPTION_MODE_NONE, NULL }
#define NCCL_COMM_PROPERTIES_INITIALIZER \
  { sizeof(ncclCommProperties_t), NCCL_API_MAGIC, NCCL_VERSION_CODE }
#endif
