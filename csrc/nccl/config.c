/* Configurations: of any generation of NCCL's structure, checked and completed. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define UNDEF NCCL_CONFIG_UNDEF_INT

/* The end of the last member that a generation has. The structure's size is no guide: padding became members. */
#define END(member) (offsetof(ncclConfig_t, member) + sizeof((ncclConfig_t *)0)->member)
static size_t known_bytes(unsigned int version) {
  static const struct {
    unsigned int before;
    size_t bytes;
  } generation[] = {{21700, END(blocking)},   {21800, END(netName)},
                    {22600, END(splitShare)}, {22700, END(trafficClass)},
                    {22800, END(nvlsCTAs)},   {22900, END(nvlinkCentricSched)},
                    {23000, END(numRmaCtx)},  {23200, END(graphStreamOrdering)}};
  for (size_t i = 0; i < sizeof generation / sizeof *generation; i++)
    if (version < generation[i].before) return generation[i].bytes;
  return END(nvlsHostMode);
}

static void presets(ncclConfig_t *c) {
  *c = (ncclConfig_t){.size = sizeof *c, .magic = NCCL_API_MAGIC, .version = NCCL_VERSION_CODE};
  int *const ints[] = {&c->blocking,
                       &c->cgaClusterSize,
                       &c->minCTAs,
                       &c->maxCTAs,
                       &c->splitShare,
                       &c->trafficClass,
                       &c->collnetEnable,
                       &c->CTAPolicy,
                       &c->shrinkShare,
                       &c->nvlsCTAs,
                       &c->nChannelsPerNetPeer,
                       &c->nvlinkCentricSched,
                       &c->graphUsageMode,
                       &c->numRmaCtx,
                       &c->maxP2pPeers,
                       &c->graphStreamOrdering,
                       &c->launchOrderImplicit,
                       &c->numRmaSig,
                       &c->rmaEagerInit,
                       &c->hostCftMode,
                       &c->nvlsHostMode};
  for (size_t i = 0; i < sizeof ints / sizeof *ints; i++) *ints[i] = UNDEF;
}

static ncclResult_t bad(const char *f, const char *name, int value, const char *range) {
  return hfr_nccl_fail(ncclInvalidArgument, "%s: config.%s is %d; it must be %s, or NCCL_CONFIG_UNDEF_INT", f, name, value,
                       range);
}

static int outside(int value, int low, int high) { return value != UNDEF && (value < low || value > high); }

/* What has no meaning here is held to NCCL's bounds all the same: a program that is wrong there is wrong here. */
static ncclResult_t check_values(const char *f, const ncclConfig_t *c) {
  if (outside(c->blocking, 0, 1)) return bad(f, "blocking", c->blocking, "0 or 1");
  if (outside(c->cgaClusterSize, 0, 8)) return bad(f, "cgaClusterSize", c->cgaClusterSize, "0 to 8");
  if (outside(c->minCTAs, 1, INT_MAX)) return bad(f, "minCTAs", c->minCTAs, "at least 1");
  if (outside(c->maxCTAs, 1, INT_MAX)) return bad(f, "maxCTAs", c->maxCTAs, "at least 1");
  if (c->minCTAs != UNDEF && c->maxCTAs != UNDEF && c->minCTAs > c->maxCTAs)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: config.minCTAs %d is above config.maxCTAs %d", f, c->minCTAs, c->maxCTAs);
  if (outside(c->splitShare, 0, 1)) return bad(f, "splitShare", c->splitShare, "0 or 1");
  if (outside(c->shrinkShare, 0, 1)) return bad(f, "shrinkShare", c->shrinkShare, "0 or 1");
  if (outside(c->collnetEnable, 0, 1)) return bad(f, "collnetEnable", c->collnetEnable, "0 or 1");
  if (outside(c->CTAPolicy, 0, NCCL_CTA_POLICY_EFFICIENCY | NCCL_CTA_POLICY_ZERO))
    return bad(f, "CTAPolicy", c->CTAPolicy, "a sum of NCCL_CTA_POLICY_ values");
  if (outside(c->nvlsCTAs, 1, INT_MAX)) return bad(f, "nvlsCTAs", c->nvlsCTAs, "at least 1");
  return ncclSuccess;
}

ncclResult_t hfr_nccl_read_config(const char *f, const ncclConfig_t *given, ncclComm_t inherit, ncclConfig_t *config) {
  const size_t head = offsetof(ncclConfig_t, blocking);
  presets(config);
  if (!given && inherit) *config = inherit->config;
  if (given) {
    if (given->magic != NCCL_API_MAGIC || given->size < END(blocking))
      return hfr_nccl_fail(ncclInvalidArgument, "%s: the config was not initialised; assign NCCL_CONFIG_INITIALIZER to it", f);
    size_t bytes = known_bytes(given->version);
    if (bytes > given->size) bytes = given->size;
    memcpy((char *)config + head, (const char *)given + head, bytes - head);
  }
  HFR_NCCL_TRY(check_values(f, config));
  /* The environment has the last word, as with NCCL. */
  int blocking = hfr_nccl_env("NCCL_COMM_BLOCKING", UNDEF);
  if (blocking == 0 || blocking == 1) config->blocking = blocking;
  if (config->blocking == UNDEF) config->blocking = 1;
  return ncclSuccess;
}

void hfr_nccl_core_config(const struct ncclComm *comm, hfreduceConfig_t *config) {
  hfreduceConfigInit(config);
  config->name = comm->name[0] ? comm->name : NULL;
  config->cancel = &comm->cancel;
  config->device = comm->device;
}

ncclResult_t hfr_nccl_check_coll_config(const char *f, const ncclCollConfig_t *c) {
  if (!c) return ncclSuccess;
  if (c->magic != NCCL_API_MAGIC || c->size < sizeof *c)
    return hfr_nccl_fail(ncclInvalidArgument, "%s: the config was not initialised; assign NCCL_COLLCONFIG_INITIALIZER to it", f);
  if (outside(c->minCTAs, 1, INT_MAX)) return bad(f, "minCTAs", c->minCTAs, "at least 1");
  if (outside(c->maxCTAs, 1, INT_MAX)) return bad(f, "maxCTAs", c->maxCTAs, "at least 1");
  if (outside(c->nvlsCTAs, 1, INT_MAX)) return bad(f, "nvlsCTAs", c->nvlsCTAs, "at least 1");
  if (outside(c->cgaClusterSize, 0, 8)) return bad(f, "cgaClusterSize", c->cgaClusterSize, "0 to 8");
  if (c->algSelection && *c->algSelection && c->forceAlgSelection)
    return hfr_nccl_fail(
        ncclInvalidUsage,
        "%s: config.algSelection is \"%.60s\", which hfreduce has not: it reduces on the CPU and chooses by size; "
        "leave it NULL, or set forceAlgSelection to 0",
        f, c->algSelection);
  if (c->launchCompletionEvent)
    return hfr_nccl_fail(
        ncclInvalidUsage,
        "%s: config.launchCompletionEvent is set, but hfreduce launches no kernel that it could tell of; leave it "
        "NULL",
        f);
  return ncclSuccess;
}
