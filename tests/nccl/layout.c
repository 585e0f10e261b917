/* Print every size, offset and value of NCCL's public types. Compiled twice, against NVIDIA's header and ours: the output is the
 * same. */
#ifdef OWN
#include "../../csrc/nccl/types.h"
#else
#include <nccl.h>
#include <nccl_device.h>
#endif

#include <stddef.h>
#include <stdio.h>

#define SIZE(type) printf("sizeof %s %zu\n", #type, sizeof(type))
#define AT(type, member) printf("%s.%s at %zu, %zu bytes\n", #type, #member, offsetof(type, member), sizeof(((type *)0)->member))
#define VALUE(name) printf("%s %lld\n", #name, (long long)(name))

static void structures(void) {
  SIZE(ncclUniqueId);
  SIZE(ncclComm_t);
  SIZE(ncclWindow_t);
  SIZE(ncclResult_t);
  SIZE(ncclDataType_t);
  SIZE(ncclRedOp_t);
  SIZE(ncclScalarResidence_t);
  SIZE(ncclConfig_t);
  AT(ncclConfig_t, size);
  AT(ncclConfig_t, magic);
  AT(ncclConfig_t, version);
  AT(ncclConfig_t, blocking);
  AT(ncclConfig_t, cgaClusterSize);
  AT(ncclConfig_t, minCTAs);
  AT(ncclConfig_t, maxCTAs);
  AT(ncclConfig_t, netName);
  AT(ncclConfig_t, splitShare);
  AT(ncclConfig_t, trafficClass);
  AT(ncclConfig_t, commName);
  AT(ncclConfig_t, collnetEnable);
  AT(ncclConfig_t, CTAPolicy);
  AT(ncclConfig_t, shrinkShare);
  AT(ncclConfig_t, nvlsCTAs);
  AT(ncclConfig_t, nChannelsPerNetPeer);
  AT(ncclConfig_t, nvlinkCentricSched);
  AT(ncclConfig_t, graphUsageMode);
  AT(ncclConfig_t, numRmaCtx);
  AT(ncclConfig_t, maxP2pPeers);
  AT(ncclConfig_t, graphStreamOrdering);
  AT(ncclConfig_t, launchOrderImplicit);
  AT(ncclConfig_t, numRmaSig);
  AT(ncclConfig_t, rmaEagerInit);
  AT(ncclConfig_t, hostCftMode);
  AT(ncclConfig_t, nvlsHostMode);
  SIZE(ncclConfigExt_t);
  AT(ncclConfigExt_t, next);
  AT(ncclConfigExt_t, key.vendorId);
  AT(ncclConfigExt_t, key.optionId);
  AT(ncclConfigExt_t, val);
  SIZE(ncclCollConfig_t);
  AT(ncclCollConfig_t, ext);
  AT(ncclCollConfig_t, minCTAs);
  AT(ncclCollConfig_t, maxCTAs);
  AT(ncclCollConfig_t, nvlsCTAs);
  AT(ncclCollConfig_t, cgaClusterSize);
  AT(ncclCollConfig_t, algSelection);
  AT(ncclCollConfig_t, forceAlgSelection);
  AT(ncclCollConfig_t, CTAPolicy);
  AT(ncclCollConfig_t, userProfilerTag);
  AT(ncclCollConfig_t, launchCompletionEvent);
  SIZE(ncclSimInfo_t);
  AT(ncclSimInfo_t, estimatedTime);
  SIZE(ncclEncryptionConfig_t);
  AT(ncclEncryptionConfig_t, mode);
  AT(ncclEncryptionConfig_t, psk);
  SIZE(ncclWaitSignalDesc_t);
  AT(ncclWaitSignalDesc_t, opCnt);
  AT(ncclWaitSignalDesc_t, peer);
  AT(ncclWaitSignalDesc_t, sigIdx);
  AT(ncclWaitSignalDesc_t, ctx);
  SIZE(ncclTeam_t);
  AT(ncclTeam_t, nRanks);
  AT(ncclTeam_t, rank);
  AT(ncclTeam_t, stride);
  SIZE(ncclMultimemHandle_t);
  SIZE(ncclCftLeId);
}

static void properties(void) {
  SIZE(ncclCommProperties_t);
  AT(ncclCommProperties_t, rank);
  AT(ncclCommProperties_t, nRanks);
  AT(ncclCommProperties_t, cudaDev);
  AT(ncclCommProperties_t, nvmlDev);
  AT(ncclCommProperties_t, deviceApiSupport);
  AT(ncclCommProperties_t, multimemSupport);
  AT(ncclCommProperties_t, ginType);
  AT(ncclCommProperties_t, nLsaTeams);
  AT(ncclCommProperties_t, hostRmaSupport);
  AT(ncclCommProperties_t, railedGinType);
  AT(ncclCommProperties_t, commHash);
  AT(ncclCommProperties_t, ginMinStride);
  AT(ncclCommProperties_t, ginConnectionType);
  AT(ncclCommProperties_t, ginSupport);
  AT(ncclCommProperties_t, devCommRuntimeVersionSize);
  AT(ncclCommProperties_t, cftSupport);
  AT(ncclCommProperties_t, cftMulticastSupport);
  AT(ncclCommProperties_t, cftCountedSupport);
}

static void values(void) {
  VALUE(NCCL_VERSION_CODE);
  VALUE(NCCL_UNIQUE_ID_BYTES);
  VALUE(NCCL_API_MAGIC);
  VALUE(NCCL_CONFIG_UNDEF_INT);
  VALUE(NCCL_SPLIT_NOCOLOR);
  VALUE(NCCL_SHRINK_DEFAULT);
  VALUE(NCCL_SHRINK_ABORT);
  VALUE(NCCL_REVOKE_DEFAULT);
  VALUE(NCCL_SUSPEND_MEM);
  VALUE(NCCL_WIN_DEFAULT);
  VALUE(NCCL_WIN_COLL_SYMMETRIC);
  VALUE(NCCL_WIN_STRICT_ORDERING);
  VALUE(NCCL_WIN_GIN_ONLY);
  VALUE(NCCL_WIN_CFT_COUNTED);
  VALUE(NCCL_CTA_POLICY_EFFICIENCY);
  VALUE(NCCL_CTA_POLICY_ZERO);
  VALUE(ncclSuccess);
  VALUE(ncclUnhandledCudaError);
  VALUE(ncclSystemError);
  VALUE(ncclInternalError);
  VALUE(ncclInvalidArgument);
  VALUE(ncclInvalidUsage);
  VALUE(ncclRemoteError);
  VALUE(ncclInProgress);
  VALUE(ncclTimeout);
  VALUE(ncclNumResults);
  VALUE(ncclSum);
  VALUE(ncclProd);
  VALUE(ncclMax);
  VALUE(ncclMin);
  VALUE(ncclAvg);
  VALUE(ncclNumOps);
  VALUE(ncclMaxRedOp);
  VALUE(ncclInt8);
  VALUE(ncclUint8);
  VALUE(ncclChar);
  VALUE(ncclInt);
  VALUE(ncclHalf);
  VALUE(ncclFloat);
  VALUE(ncclDouble);
  VALUE(ncclInt32);
  VALUE(ncclUint32);
  VALUE(ncclInt64);
  VALUE(ncclUint64);
  VALUE(ncclFloat16);
  VALUE(ncclFloat32);
  VALUE(ncclFloat64);
  VALUE(ncclBfloat16);
  VALUE(ncclFloat8e4m3);
  VALUE(ncclFloat8e5m2);
  VALUE(ncclNumTypes);
  VALUE(ncclScalarDevice);
  VALUE(ncclScalarHostImmediate);
  VALUE(NCCL_ENCRYPTION_MODE_NONE);
  VALUE(NCCL_ENCRYPTION_MODE_PSK);
  VALUE(ncclStatGpuMemSuspend);
  VALUE(ncclStatGpuMemSuspended);
  VALUE(ncclStatGpuMemPersist);
  VALUE(ncclStatGpuMemTotal);
  VALUE(NCCL_GIN_CONNECTION_NONE);
  VALUE(NCCL_GIN_CONNECTION_CUSTOM_STRIDE);
  VALUE(NCCL_GIN_TYPE_NONE);
  VALUE(NCCL_GIN_MAX_TYPES);
  VALUE(NCCL_CFT_TEAM_FLAT);
  VALUE(NCCL_CFT_TEAM_HIER_LSA);
}

int main(void) {
  structures();
  properties();
  values();
  return 0;
}
