/*
 * Every public call of NCCL 2.32.3, each under two names: nccl* is weak, so that a tool may put its own in front, and pnccl* is
 * strong, so that the tool can call on. A test compiles these declarations beside NVIDIA's, so they cannot differ.
 */
#ifndef HFR_NCCL_CALLS_H_
#define HFR_NCCL_CALLS_H_

#define HFR_NCCL_CALL(result, name, parameters) \
  result name parameters;                       \
  result p##name parameters

/* --- library --- */
HFR_NCCL_CALL(ncclResult_t, ncclGetVersion, (int *version));
HFR_NCCL_CALL(const char *, ncclGetErrorString, (ncclResult_t result));
HFR_NCCL_CALL(const char *, ncclGetLastError, (ncclComm_t comm));
HFR_NCCL_CALL(void, ncclResetDebugInit, (void));
HFR_NCCL_CALL(ncclResult_t, ncclSetEncryption, (const ncclEncryptionConfig_t *config));

/* --- communicators --- */
HFR_NCCL_CALL(ncclResult_t, ncclGetUniqueId, (ncclUniqueId * uniqueId));
HFR_NCCL_CALL(ncclResult_t, ncclCommInitRank, (ncclComm_t * comm, int nranks, ncclUniqueId commId, int rank));
HFR_NCCL_CALL(ncclResult_t, ncclCommInitRankConfig,
              (ncclComm_t * comm, int nranks, ncclUniqueId commId, int rank, ncclConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclCommInitRankScalable,
              (ncclComm_t * newcomm, int nranks, int myrank, int nId, ncclUniqueId *commIds, ncclConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclCommInitAll, (ncclComm_t * comm, int ndev, const int *devlist));
HFR_NCCL_CALL(ncclResult_t, ncclCommSplit, (ncclComm_t comm, int color, int key, ncclComm_t *newcomm, ncclConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclCommShrink,
              (ncclComm_t comm, int *excludeRanksList, int excludeRanksCount, ncclComm_t *newcomm, ncclConfig_t *config,
               int shrinkFlags));
HFR_NCCL_CALL(ncclResult_t, ncclCommGetUniqueId, (ncclComm_t comm, ncclUniqueId *uniqueId));
HFR_NCCL_CALL(ncclResult_t, ncclCommGrow,
              (ncclComm_t comm, int nRanks, const ncclUniqueId *uniqueId, int rank, ncclComm_t *newcomm, ncclConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclCommFinalize, (ncclComm_t comm));
HFR_NCCL_CALL(ncclResult_t, ncclCommDestroy, (ncclComm_t comm));
HFR_NCCL_CALL(ncclResult_t, ncclCommAbort, (ncclComm_t comm));
HFR_NCCL_CALL(ncclResult_t, ncclCommRevoke, (ncclComm_t comm, int revokeFlags));
HFR_NCCL_CALL(ncclResult_t, ncclCommSuspend, (ncclComm_t comm, int flags));
HFR_NCCL_CALL(ncclResult_t, ncclCommResume, (ncclComm_t comm));
HFR_NCCL_CALL(ncclResult_t, ncclCommGetAsyncError, (ncclComm_t comm, ncclResult_t *asyncError));
HFR_NCCL_CALL(ncclResult_t, ncclCommCount, (const ncclComm_t comm, int *count));
HFR_NCCL_CALL(ncclResult_t, ncclCommCuDevice, (const ncclComm_t comm, int *device));
HFR_NCCL_CALL(ncclResult_t, ncclCommUserRank, (const ncclComm_t comm, int *rank));
HFR_NCCL_CALL(ncclResult_t, ncclCommMemStats, (ncclComm_t comm, ncclCommMemStat_t stat, uint64_t *value));
HFR_NCCL_CALL(ncclResult_t, ncclCommQueryProperties, (ncclComm_t comm, ncclCommProperties_t *props));

/* --- groups --- */
HFR_NCCL_CALL(ncclResult_t, ncclGroupStart, (void));
HFR_NCCL_CALL(ncclResult_t, ncclGroupEnd, (void));
HFR_NCCL_CALL(ncclResult_t, ncclGroupSimulateEnd, (ncclSimInfo_t * simInfo));

/* --- collectives; each again with a configuration of the one call --- */
#define HFR_NCCL_REDUCING                                                                                       \
  const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype, ncclRedOp_t op, ncclComm_t comm, \
      cudaStream_t stream
#define HFR_NCCL_ROOTED \
  const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype, int root, ncclComm_t comm, cudaStream_t stream
#define HFR_NCCL_MOVING \
  const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype, ncclComm_t comm, cudaStream_t stream
#define HFR_NCCL_REDUCING_ROOTED                                                                                          \
  const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype, ncclRedOp_t op, int root, ncclComm_t comm, \
      cudaStream_t stream
HFR_NCCL_CALL(ncclResult_t, ncclAllReduce, (HFR_NCCL_REDUCING));
HFR_NCCL_CALL(ncclResult_t, ncclAllReduceConfig, (HFR_NCCL_REDUCING, const ncclCollConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclReduceScatter, (HFR_NCCL_REDUCING));
HFR_NCCL_CALL(ncclResult_t, ncclReduceScatterConfig, (HFR_NCCL_REDUCING, const ncclCollConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclReduce, (HFR_NCCL_REDUCING_ROOTED));
HFR_NCCL_CALL(ncclResult_t, ncclReduceConfig, (HFR_NCCL_REDUCING_ROOTED, const ncclCollConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclBroadcast, (HFR_NCCL_ROOTED));
HFR_NCCL_CALL(ncclResult_t, ncclBroadcastConfig, (HFR_NCCL_ROOTED, const ncclCollConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclGather, (HFR_NCCL_ROOTED));
HFR_NCCL_CALL(ncclResult_t, ncclGatherConfig, (HFR_NCCL_ROOTED, const ncclCollConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclScatter, (HFR_NCCL_ROOTED));
HFR_NCCL_CALL(ncclResult_t, ncclScatterConfig, (HFR_NCCL_ROOTED, const ncclCollConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclAllGather, (HFR_NCCL_MOVING));
HFR_NCCL_CALL(ncclResult_t, ncclAllGatherConfig, (HFR_NCCL_MOVING, const ncclCollConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclAlltoAll, (HFR_NCCL_MOVING));
HFR_NCCL_CALL(ncclResult_t, ncclAlltoAllConfig, (HFR_NCCL_MOVING, const ncclCollConfig_t *config));
HFR_NCCL_CALL(ncclResult_t, ncclBcast,
              (void *buff, size_t count, ncclDataType_t datatype, int root, ncclComm_t comm, cudaStream_t stream));
HFR_NCCL_CALL(ncclResult_t, ncclSend,
              (const void *sendbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm, cudaStream_t stream));
HFR_NCCL_CALL(ncclResult_t, ncclRecv,
              (void *recvbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm, cudaStream_t stream));
HFR_NCCL_CALL(ncclResult_t, ncclRedOpCreatePreMulSum,
              (ncclRedOp_t * op, void *scalar, ncclDataType_t datatype, ncclScalarResidence_t residence, ncclComm_t comm));
HFR_NCCL_CALL(ncclResult_t, ncclRedOpDestroy, (ncclRedOp_t op, ncclComm_t comm));

/* --- memory --- */
HFR_NCCL_CALL(ncclResult_t, ncclMemAlloc, (void **ptr, size_t size));
HFR_NCCL_CALL(ncclResult_t, ncclMemFree, (void *ptr));
HFR_NCCL_CALL(ncclResult_t, ncclCommRegister, (const ncclComm_t comm, void *buff, size_t size, void **handle));
HFR_NCCL_CALL(ncclResult_t, ncclCommDeregister, (const ncclComm_t comm, void *handle));
HFR_NCCL_CALL(ncclResult_t, ncclCommWindowRegister, (ncclComm_t comm, void *buff, size_t size, ncclWindow_t *win, int winFlags));
HFR_NCCL_CALL(ncclResult_t, ncclCommWindowDeregister, (ncclComm_t comm, ncclWindow_t win));
HFR_NCCL_CALL(ncclResult_t, ncclWinGetUserPtr, (ncclComm_t comm, ncclWindow_t win, void **outUserPtr));

/* --- what a GPU's kernels would do by themselves --- */
HFR_NCCL_CALL(ncclResult_t, ncclPutSignal,
              (const void *localbuff, size_t count, ncclDataType_t datatype, int peer, ncclWindow_t peerWin, size_t peerWinOffset,
               int sigIdx, int ctx, unsigned int flags, ncclComm_t comm, cudaStream_t stream));
HFR_NCCL_CALL(ncclResult_t, ncclSignal,
              (int peer, int sigIdx, int ctx, unsigned int flags, ncclComm_t comm, cudaStream_t stream));
HFR_NCCL_CALL(ncclResult_t, ncclWaitSignal, (int nDesc, ncclWaitSignalDesc_t *signalDescs, ncclComm_t comm, cudaStream_t stream));
HFR_NCCL_CALL(ncclResult_t, ncclDevCommCreate,
              (ncclComm_t comm, ncclDevCommRequirements_t const *reqs, ncclDevComm_t *outDevComm));
HFR_NCCL_CALL(ncclResult_t, ncclDevCommDestroy, (ncclComm_t comm, ncclDevComm_t const *devComm));
HFR_NCCL_CALL(ncclResult_t, ncclGetLsaMultimemDevicePointer, (ncclWindow_t window, size_t offset, void **outPtr));
HFR_NCCL_CALL(ncclResult_t, ncclGetMultimemDevicePointer,
              (ncclWindow_t window, size_t offset, ncclMultimemHandle_t multimem, void **outPtr));
HFR_NCCL_CALL(ncclResult_t, ncclGetLsaDevicePointer, (ncclWindow_t window, size_t offset, int lsaRank, void **outPtr));
HFR_NCCL_CALL(ncclResult_t, ncclGetPeerDevicePointer, (ncclWindow_t window, size_t offset, int peer, void **outPtr));
HFR_NCCL_CALL(ncclResult_t, ncclGetMultimemDeviceLeInfo,
              (ncclWindow_t window, size_t offset, ncclCftLeId *leId, size_t *leOffset));
HFR_NCCL_CALL(ncclResult_t, ncclGetCftDeviceLeInfo,
              (ncclWindow_t window, size_t offset, int peerCft, ncclTeam_t cftTeam, ncclCftLeId *leId, size_t *leOffset));
HFR_NCCL_CALL(ncclResult_t, ncclGetPeerDeviceLeInfo,
              (ncclWindow_t window, size_t offset, int peerWorld, ncclCftLeId *leId, size_t *leOffset));
HFR_NCCL_CALL(ncclTeam_t, ncclTeamWorld, (ncclComm_t comm));
HFR_NCCL_CALL(ncclTeam_t, ncclTeamLsa, (ncclComm_t comm));
HFR_NCCL_CALL(ncclTeam_t, ncclTeamRail, (ncclComm_t comm));
HFR_NCCL_CALL(ncclTeam_t, ncclTeamCft, (ncclComm_t comm, ncclCftTeamMode_t mode));
HFR_NCCL_CALL(ncclTeam_t, ncclTeamCftMultimem, (ncclComm_t comm));
HFR_NCCL_CALL(int, ncclTeamRankToWorld, (ncclComm_t comm, ncclTeam_t team, int rank));
HFR_NCCL_CALL(int, ncclTeamRankToLsa, (ncclComm_t comm, ncclTeam_t team, int rank));
HFR_NCCL_CALL(ncclResult_t, ncclLsaBarrierCreateRequirement,
              (ncclTeam_t team, int nBarriers, ncclLsaBarrierHandle_t *outHandle, ncclDevResourceRequirements_t *outReq));
HFR_NCCL_CALL(ncclResult_t, ncclGinBarrierCreateRequirement,
              (ncclComm_t comm, ncclTeam_t team, int nBarriers, ncclGinBarrierHandle_t *outHandle,
               ncclDevResourceRequirements_t *outReq));
HFR_NCCL_CALL(int, ncclLLA2ACalcSlots, (int maxElts, int maxEltSize));
HFR_NCCL_CALL(ncclResult_t, ncclLLA2ACreateRequirement,
              (int nBlocks, int nSlots, ncclLLA2AHandle_t *outHandle, ncclDevResourceRequirements_t *outReq));
HFR_NCCL_CALL(ncclResult_t, ncclGinOutboxCreateRequirement,
              (int nBlocks, int size_log2, struct ncclGinOutboxHandle *outHandle, ncclDevResourceRequirements_t *outReq));
HFR_NCCL_CALL(ncclResult_t, ncclGinInboxA2ACreateRequirement,
              (ncclTeam_t peers, int nBlocks, int size_log2, struct ncclGinInboxA2AHandle *outHandle,
               ncclDevResourceRequirements_t *outReq));

/* --- parameters --- */
HFR_NCCL_CALL(ncclResult_t, ncclParamBind, (ncclParamHandle_t * out, const char *key));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetI8, (ncclParamHandle_t h, int8_t *out));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetI16, (ncclParamHandle_t h, int16_t *out));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetI32, (ncclParamHandle_t h, int32_t *out));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetI64, (ncclParamHandle_t h, int64_t *out));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetU8, (ncclParamHandle_t h, uint8_t *out));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetU16, (ncclParamHandle_t h, uint16_t *out));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetU32, (ncclParamHandle_t h, uint32_t *out));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetU64, (ncclParamHandle_t h, uint64_t *out));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetStr, (ncclParamHandle_t h, const char **out));
HFR_NCCL_CALL(ncclResult_t, ncclParamGet, (ncclParamHandle_t h, void *out, int maxLen, int *len));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetParameter, (const char *key, const char **value, int *valueLen));
HFR_NCCL_CALL(ncclResult_t, ncclParamGetAllParameterKeys, (const char ***table, int *tableLen));
HFR_NCCL_CALL(void, ncclParamDumpAll, (void));
#undef HFR_NCCL_CALL
#endif
