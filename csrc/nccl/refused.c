/*
 * What cannot work: communication that a GPU's own kernels start. hfreduce moves data by copy engines and CPUs, so no rank has an
 * address in another's memory. These calls check what they can and say so; a program that probes for the device API finds none.
 */
#include "internal.h"

#define NO_DEVICE_API "hfreduce has no device API: data is moved by copy engines and reduced on the CPU; "

static ncclResult_t refuse(const char *f, const char *instead) {
  return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidUsage, "%s: " NO_DEVICE_API "%s", f, instead));
}

/* A call on a communicator: that is checked first, as NCCL does. */
static ncclResult_t refuse_on(ncclComm_t comm, const char *f, const char *instead) {
  HFR_NCCL_TRY(hfr_nccl_latch(hfr_nccl_enter(comm, f, HFR_NCCL_HANDLE)));
  hfr_nccl_leave(comm);
  return refuse(f, instead);
}

#define WITH_SENDS "use ncclSend and ncclRecv"
#define WITH_COLLECTIVES "use the collectives"

HFR_NCCL_DEFINE(ncclResult_t, ncclPutSignal,
                (const void *localbuff, size_t count, ncclDataType_t datatype, int peer, ncclWindow_t peerWin,
                 size_t peerWinOffset, int sigIdx, int ctx, unsigned int flags, ncclComm_t comm, cudaStream_t stream)) {
  (void)localbuff, (void)count, (void)datatype, (void)peer, (void)peerWin, (void)peerWinOffset;
  (void)sigIdx, (void)ctx, (void)flags, (void)stream;
  return refuse_on(comm, "ncclPutSignal", WITH_SENDS);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclSignal,
                (int peer, int sigIdx, int ctx, unsigned int flags, ncclComm_t comm, cudaStream_t stream)) {
  (void)peer, (void)sigIdx, (void)ctx, (void)flags, (void)stream;
  return refuse_on(comm, "ncclSignal", WITH_SENDS);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclWaitSignal,
                (int nDesc, ncclWaitSignalDesc_t *signalDescs, ncclComm_t comm, cudaStream_t stream)) {
  (void)nDesc, (void)signalDescs, (void)stream;
  return refuse_on(comm, "ncclWaitSignal", WITH_SENDS);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclDevCommCreate,
                (ncclComm_t comm, ncclDevCommRequirements_t const *reqs, ncclDevComm_t *outDevComm)) {
  (void)reqs, (void)outDevComm;
  return refuse_on(comm, "ncclDevCommCreate", WITH_COLLECTIVES);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclDevCommDestroy, (ncclComm_t comm, ncclDevComm_t const *devComm)) {
  (void)devComm;
  return refuse_on(comm, "ncclDevCommDestroy", WITH_COLLECTIVES);
}

/* ---------------------------------------------------------------- addresses in other ranks' memory */

static ncclResult_t no_address(const char *f, void **out) {
  if (!out) return hfr_nccl_latch(hfr_nccl_fail(ncclInvalidArgument, "%s: outPtr is NULL", f));
  *out = NULL;
  return refuse(f, WITH_COLLECTIVES);
}

HFR_NCCL_DEFINE(ncclResult_t, ncclGetLsaMultimemDevicePointer, (ncclWindow_t window, size_t offset, void **outPtr)) {
  (void)window, (void)offset;
  return no_address("ncclGetLsaMultimemDevicePointer", outPtr);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclGetMultimemDevicePointer,
                (ncclWindow_t window, size_t offset, ncclMultimemHandle_t multimem, void **outPtr)) {
  (void)window, (void)offset, (void)multimem;
  return no_address("ncclGetMultimemDevicePointer", outPtr);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclGetLsaDevicePointer, (ncclWindow_t window, size_t offset, int lsaRank, void **outPtr)) {
  (void)window, (void)offset, (void)lsaRank;
  return no_address("ncclGetLsaDevicePointer", outPtr);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclGetPeerDevicePointer, (ncclWindow_t window, size_t offset, int peer, void **outPtr)) {
  (void)window, (void)offset, (void)peer;
  return no_address("ncclGetPeerDevicePointer", outPtr);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclGetMultimemDeviceLeInfo,
                (ncclWindow_t window, size_t offset, ncclCftLeId *leId, size_t *leOffset)) {
  (void)window, (void)offset, (void)leId, (void)leOffset;
  return refuse("ncclGetMultimemDeviceLeInfo", WITH_COLLECTIVES);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclGetCftDeviceLeInfo,
                (ncclWindow_t window, size_t offset, int peerCft, ncclTeam_t cftTeam, ncclCftLeId *leId, size_t *leOffset)) {
  (void)window, (void)offset, (void)peerCft, (void)cftTeam, (void)leId, (void)leOffset;
  return refuse("ncclGetCftDeviceLeInfo", WITH_COLLECTIVES);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclGetPeerDeviceLeInfo,
                (ncclWindow_t window, size_t offset, int peerWorld, ncclCftLeId *leId, size_t *leOffset)) {
  (void)window, (void)offset, (void)peerWorld, (void)leId, (void)leOffset;
  return refuse("ncclGetPeerDeviceLeInfo", WITH_COLLECTIVES);
}

/* ---------------------------------------------------------------- what a device communicator would be asked to hold */

HFR_NCCL_DEFINE(ncclResult_t, ncclLsaBarrierCreateRequirement,
                (ncclTeam_t team, int nBarriers, ncclLsaBarrierHandle_t *outHandle, ncclDevResourceRequirements_t *outReq)) {
  (void)team, (void)nBarriers, (void)outHandle, (void)outReq;
  return refuse("ncclLsaBarrierCreateRequirement", WITH_COLLECTIVES);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclGinBarrierCreateRequirement,
                (ncclComm_t comm, ncclTeam_t team, int nBarriers, ncclGinBarrierHandle_t *outHandle,
                 ncclDevResourceRequirements_t *outReq)) {
  (void)team, (void)nBarriers, (void)outHandle, (void)outReq;
  return refuse_on(comm, "ncclGinBarrierCreateRequirement", WITH_COLLECTIVES);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclLLA2ACreateRequirement,
                (int nBlocks, int nSlots, ncclLLA2AHandle_t *outHandle, ncclDevResourceRequirements_t *outReq)) {
  (void)nBlocks, (void)nSlots, (void)outHandle, (void)outReq;
  return refuse("ncclLLA2ACreateRequirement", WITH_COLLECTIVES);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclGinOutboxCreateRequirement,
                (int nBlocks, int size_log2, struct ncclGinOutboxHandle *outHandle, ncclDevResourceRequirements_t *outReq)) {
  (void)nBlocks, (void)size_log2, (void)outHandle, (void)outReq;
  return refuse("ncclGinOutboxCreateRequirement", WITH_COLLECTIVES);
}
HFR_NCCL_DEFINE(ncclResult_t, ncclGinInboxA2ACreateRequirement,
                (ncclTeam_t peers, int nBlocks, int size_log2, struct ncclGinInboxA2AHandle *outHandle,
                 ncclDevResourceRequirements_t *outReq)) {
  (void)peers, (void)nBlocks, (void)size_log2, (void)outHandle, (void)outReq;
  return refuse("ncclGinInboxA2ACreateRequirement", WITH_COLLECTIVES);
}

/* Arithmetic only: slots of eight bytes. */
HFR_NCCL_DEFINE(int, ncclLLA2ACalcSlots, (int maxElts, int maxEltSize)) { return maxElts * ((maxEltSize + 7) / 8); }

HFR_NCCL_DEFINE(ncclResult_t, ncclSetEncryption, (const ncclEncryptionConfig_t *config)) {
  static const char f[] = "ncclSetEncryption";
  if (!config || config->magic != NCCL_API_MAGIC || config->size < sizeof *config)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: config is not initialised; assign NCCL_ENCRYPTION_CONFIG_INITIALIZER to it",
                         f);
  if (config->mode == NCCL_ENCRYPTION_MODE_NONE) return ncclSuccess;
  if (config->mode != NCCL_ENCRYPTION_MODE_PSK)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: mode is %d, which is not known", f, config->mode);
  return hfr_nccl_fail(
      ncclInvalidUsage,
      "%s: hfreduce does not encrypt: its connections prove that they know the unique id's secret, and data on the "
      "network is checked, but can be read; run it on a network that is private",
      f);
}
