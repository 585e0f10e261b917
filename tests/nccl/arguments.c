/* One rank, alone: what every call says to wrong arguments, every generation of the configuration, parameters, memory, and what
 * is refused. */
#include "rank.h"

#include <nccl_device.h>

#define BAD_ARGUMENT(part, call) FAILS(ncclInvalidArgument, part, call)

static ncclComm_t comm;
static float send[8], recv[8];

static ncclComm_t alone(ncclConfig_t *config) {
  ncclUniqueId id;
  ncclComm_t made = NULL;
  OK(ncclGetUniqueId(&id));
  OK(ncclCommInitRankConfig(&made, 1, id, 0, config));
  return made;
}

/* ---------------------------------------------------------------- the library */

static void library(void) {
  int version = 0;
  OK(ncclGetVersion(&version));
  CHECK(version == 23203, "version %d", version);
  OK(pncclGetVersion(&version));
  BAD_ARGUMENT("version is NULL", ncclGetVersion(NULL));
  for (int r = 0; r < ncclNumResults; r++) CHECK(strlen(ncclGetErrorString((ncclResult_t)r)) > 4, "text of %d", r);
  CHECK(strcmp(ncclGetErrorString(ncclSuccess), ncclGetErrorString(ncclTimeout)) != 0, "texts differ");
  CHECK(ncclGetErrorString((ncclResult_t)99) != NULL && ncclGetErrorString((ncclResult_t)-1) != NULL, "unknown results");
  BAD_ARGUMENT("uniqueId is NULL", ncclGetUniqueId(NULL));
  ncclEncryptionConfig_t plain = NCCL_ENCRYPTION_CONFIG_INITIALIZER, secret = plain, blank;
  memset(&blank, 0, sizeof blank);
  OK(ncclSetEncryption(&plain));
  secret.mode = NCCL_ENCRYPTION_MODE_PSK;
  secret.psk = "abc";
  FAILS(ncclInvalidUsage, "does not encrypt", ncclSetEncryption(&secret));
  BAD_ARGUMENT("INITIALIZER", ncclSetEncryption(&blank));
  BAD_ARGUMENT("INITIALIZER", ncclSetEncryption(NULL));
}

/* ---------------------------------------------------------------- joining */

static void joining(void) {
  ncclUniqueId id, ids[2], foreign;
  ncclComm_t made = (ncclComm_t)1;
  OK(ncclGetUniqueId(&id));
  memset(&foreign, 7, sizeof foreign);
  BAD_ARGUMENT("comm is NULL", ncclCommInitRank(NULL, 1, id, 0));
  BAD_ARGUMENT("nranks is 0", ncclCommInitRank(&made, 0, id, 0));
  CHECK(!made, "a failed call leaves no handle");
  BAD_ARGUMENT("rank is 1", ncclCommInitRank(&made, 1, id, 1));
  BAD_ARGUMENT("rank is -1", ncclCommInitRank(&made, 2, id, -1));
  BAD_ARGUMENT("unique id", ncclCommInitRank(&made, 1, foreign, 0));
  CHECK(!made, "a failed call leaves no handle");
  BAD_ARGUMENT("nId is 0", ncclCommInitRankScalable(&made, 1, 0, 0, &id, NULL));
  BAD_ARGUMENT("nId is 2", ncclCommInitRankScalable(&made, 1, 0, 2, ids, NULL));
  BAD_ARGUMENT("commIds is NULL", ncclCommInitRankScalable(&made, 1, 0, 1, NULL, NULL));
  OK(ncclCommInitRankScalable(&made, 1, 0, 1, &id, NULL));
  OK(ncclCommDestroy(made));
  BAD_ARGUMENT("comm is NULL", ncclCommInitAll(NULL, 1, NULL));
  BAD_ARGUMENT("ndev is 0", ncclCommInitAll(&made, 0, NULL));
  int wrong[1] = {-3};
  BAD_ARGUMENT("devlist[0] is -3", ncclCommInitAll(&made, 1, wrong));
}

/* A configuration of each generation: what lies behind its end must not be looked at. */
static void generations(void) {
  static const struct {
    unsigned version;
    size_t size;
  } of[] = {{21400, 24}, {21700, 40}, {21800, 48}, {22600, 48},  {22700, 72}, {22800, 80},
            {22900, 88}, {23000, 96}, {23100, 96}, {23203, 120}, {23400, 160}};
  for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
    ncclConfig_t whole = NCCL_CONFIG_INITIALIZER;
    unsigned char *memory = malloc(of[i].size);
    memset(memory, 0x81, of[i].size); /* a negative number, and a pointer to nowhere */
    size_t known = of[i].size < sizeof whole ? of[i].size : sizeof whole;
    if (of[i].version == 21400) known = offsetof(ncclConfig_t, cgaClusterSize); /* then comes padding */
    if (of[i].version == 21800) known = offsetof(ncclConfig_t, trafficClass);
    memcpy(memory, &whole, known);
    ncclConfig_t *config = (ncclConfig_t *)(void *)memory;
    config->size = of[i].size;
    config->version = of[i].version;
    ncclComm_t made = alone(config);
    OK(ncclAllReduce(send, recv, 8, ncclFloat, ncclSum, made, NULL));
    OK(ncclCommDestroy(made));
    free(memory);
  }
  /* One that says it is of the newest generation, and is shorter: what its size leaves out holds nonsense. */
  ncclConfig_t cut = NCCL_CONFIG_INITIALIZER;
  cut.size = offsetof(ncclConfig_t, minCTAs);
  memset((char *)&cut + cut.size, 0x81, sizeof cut - cut.size);
  ncclComm_t made = alone(&cut);
  OK(ncclCommDestroy(made));
}

static void configurations(void) {
  ncclUniqueId id;
  ncclComm_t made = NULL;
  OK(ncclGetUniqueId(&id));
#define WRONG(member, value, part)                                        \
  do {                                                                    \
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;                        \
    config.member = value;                                                \
    BAD_ARGUMENT(part, ncclCommInitRankConfig(&made, 1, id, 0, &config)); \
    CHECK(!made, "no handle");                                            \
  } while (0)
  WRONG(magic, 0, "NCCL_CONFIG_INITIALIZER");
  WRONG(size, 8, "NCCL_CONFIG_INITIALIZER");
  WRONG(blocking, 2, "blocking is 2");
  WRONG(cgaClusterSize, 9, "cgaClusterSize");
  WRONG(minCTAs, 0, "minCTAs");
  WRONG(maxCTAs, -4, "maxCTAs");
  WRONG(splitShare, 3, "splitShare");
  WRONG(shrinkShare, -1, "shrinkShare");
  WRONG(collnetEnable, 2, "collnetEnable");
  WRONG(CTAPolicy, 8, "CTAPolicy");
  WRONG(nvlsCTAs, 0, "nvlsCTAs");
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.minCTAs = 8;
  config.maxCTAs = 4;
  BAD_ARGUMENT("minCTAs 8 is above", ncclCommInitRankConfig(&made, 1, id, 0, &config));
  config.minCTAs = 1;
  config.blocking = 1;
  config.netName = "Socket";
  config.commName = "a name that is longer than the thirty-one bytes that are kept of it";
  OK(ncclCommInitRankConfig(&made, 1, id, 0, &config));
  OK(ncclCommDestroy(made));
}

/* ---------------------------------------------------------------- handles */

static void handles(void) {
  ncclComm_t gone = alone(NULL), foreign = (ncclComm_t)(void *)send, child = (ncclComm_t)1;
  int n;
  ncclResult_t state;
  ncclRedOp_t op;
  float one = 1;
  OK(ncclCommDestroy(gone));
  ncclComm_t wrong[] = {NULL, gone, foreign};
  for (int i = 0; i < 3; i++) {
    ncclComm_t c = wrong[i];
    const char *part = i ? "not a communicator" : "comm is NULL";
    BAD_ARGUMENT(part, ncclAllReduce(send, recv, 8, ncclFloat, ncclSum, c, NULL));
    BAD_ARGUMENT(part, ncclSend(send, 8, ncclFloat, 0, c, NULL));
    BAD_ARGUMENT(part, ncclCommCount(c, &n));
    BAD_ARGUMENT(part, ncclCommUserRank(c, &n));
    BAD_ARGUMENT(part, ncclCommCuDevice(c, &n));
    BAD_ARGUMENT(part, ncclCommGetAsyncError(c, &state));
    BAD_ARGUMENT(part, ncclCommSplit(c, 0, 0, &child, NULL));
    CHECK(!child, "no handle");
    BAD_ARGUMENT(part, ncclCommShrink(c, NULL, 0, &child, NULL, 0));
    BAD_ARGUMENT(part, ncclCommRevoke(c, 0));
    BAD_ARGUMENT(part, ncclCommSuspend(c, NCCL_SUSPEND_MEM));
    BAD_ARGUMENT(part, ncclRedOpCreatePreMulSum(&op, &one, ncclFloat, ncclScalarHostImmediate, c));
    BAD_ARGUMENT(part, ncclRedOpDestroy(ncclSum, c));
    BAD_ARGUMENT(part, ncclPutSignal(send, 1, ncclFloat, 0, NULL, 0, 0, 0, 0, c, NULL));
    CHECK(ncclGetLastError(c) != NULL, "a text at any rate");
    CHECK(ncclTeamWorld(c).nRanks == 0, "a team of nobody");
  }
  OK(ncclCommDestroy(NULL)); /* as NCCL does */
  OK(ncclCommAbort(NULL));
  OK(ncclCommFinalize(NULL));
  BAD_ARGUMENT("not a communicator", ncclCommDestroy(gone));
  BAD_ARGUMENT("not a communicator", ncclCommAbort(gone));
  BAD_ARGUMENT("not a communicator", ncclCommFinalize(foreign));
  for (int i = 0; i < 100; i++) { /* a slot that was freed is not the next one given */
    ncclComm_t next = alone(NULL);
    if (!i) CHECK(next != gone, "a freed handle is given again at once");
    OK(ncclCommAbort(next));
  }
}

static void asking(void) {
  int n = -5;
  uint64_t bytes = 7;
  ncclResult_t state = ncclInternalError;
  OK(ncclCommCount(comm, &n));
  CHECK(n == 1, "count %d", n);
  OK(ncclCommUserRank(comm, &n));
  CHECK(n == 0, "rank %d", n);
  OK(ncclCommCuDevice(comm, &n));
  OK(ncclCommGetAsyncError(comm, &state));
  CHECK(state == ncclSuccess, "state %d", (int)state);
  BAD_ARGUMENT("count is NULL", ncclCommCount(comm, NULL));
  BAD_ARGUMENT("rank is NULL", ncclCommUserRank(comm, NULL));
  BAD_ARGUMENT("device is NULL", ncclCommCuDevice(comm, NULL));
  BAD_ARGUMENT("asyncError is NULL", ncclCommGetAsyncError(comm, NULL));
  OK(ncclCommMemStats(comm, ncclStatGpuMemTotal, &bytes));
  CHECK(bytes == 0, "%llu bytes of device memory", (unsigned long long)bytes);
  BAD_ARGUMENT("stat is 9", ncclCommMemStats(comm, (ncclCommMemStat_t)9, &bytes));
  BAD_ARGUMENT("value is NULL", ncclCommMemStats(comm, ncclStatGpuMemTotal, NULL));
  ncclCommProperties_t props = {.size = sizeof props, .magic = NCCL_API_MAGIC, .version = NCCL_VERSION_CODE}, small = props;
  OK(ncclCommQueryProperties(comm, &props));
  CHECK(props.rank == 0 && props.nRanks == 1 && !props.deviceApiSupport && !props.hostRmaSupport && props.commHash, "properties");
  small.size = offsetof(ncclCommProperties_t, commHash);
  small.commHash = 77;
  OK(ncclCommQueryProperties(comm, &small));
  CHECK(small.commHash == 77, "a smaller structure was overrun");
  props.magic = 0;
  BAD_ARGUMENT("INITIALIZER", ncclCommQueryProperties(comm, &props));
  BAD_ARGUMENT("props is NULL", ncclCommQueryProperties(comm, NULL));
}

/* ---------------------------------------------------------------- collectives */

static void calls(void) {
  BAD_ARGUMENT("ncclAllReduce: sendbuff is NULL", ncclAllReduce(NULL, recv, 8, ncclFloat, ncclSum, comm, NULL));
  BAD_ARGUMENT("recvbuff is NULL", ncclAllReduce(send, NULL, 8, ncclFloat, ncclSum, comm, NULL));
  BAD_ARGUMENT("datatype is 12", ncclAllReduce(send, recv, 8, ncclNumTypes, ncclSum, comm, NULL));
  BAD_ARGUMENT("op is 5", ncclAllReduce(send, recv, 8, ncclFloat, ncclNumOps, comm, NULL));
  BAD_ARGUMENT("op is -1", ncclReduceScatter(send, recv, 8, ncclFloat, (ncclRedOp_t)-1, comm, NULL));
  BAD_ARGUMENT("exceeds the address space", ncclAllGather(send, recv, SIZE_MAX / 2, ncclFloat, comm, NULL));
  BAD_ARGUMENT("root is 1", ncclReduce(send, recv, 8, ncclFloat, ncclSum, 1, comm, NULL));
  BAD_ARGUMENT("root is -1", ncclBroadcast(send, recv, 8, ncclFloat, -1, comm, NULL));
  BAD_ARGUMENT("root is 4", ncclBcast(recv, 8, ncclFloat, 4, comm, NULL));
  BAD_ARGUMENT("root is 1", ncclGather(send, recv, 8, ncclFloat, 1, comm, NULL));
  BAD_ARGUMENT("root is 1", ncclScatter(send, recv, 8, ncclFloat, 1, comm, NULL));
  BAD_ARGUMENT("datatype is -1", ncclAlltoAll(send, recv, 8, (ncclDataType_t)-1, comm, NULL));
  BAD_ARGUMENT("peer is 1", ncclSend(send, 8, ncclFloat, 1, comm, NULL));
  OK(ncclGroupStart());
  BAD_ARGUMENT("recvbuff is NULL", ncclRecv(NULL, 8, ncclFloat, 0, comm, NULL));
  BAD_ARGUMENT("recvbuff is NULL", ncclGroupEnd());
  OK(ncclAllReduce(NULL, NULL, 0, ncclFloat, ncclSum, comm, NULL)); /* nothing is nothing */
  BAD_ARGUMENT("datatype", ncclAllReduce(NULL, NULL, 0, (ncclDataType_t)77, ncclSum, comm, NULL));
  ncclRedOp_t op;
  float one = 1;
  BAD_ARGUMENT("op is NULL", ncclRedOpCreatePreMulSum(NULL, &one, ncclFloat, ncclScalarHostImmediate, comm));
  BAD_ARGUMENT("scalar is NULL", ncclRedOpCreatePreMulSum(&op, NULL, ncclFloat, ncclScalarHostImmediate, comm));
  BAD_ARGUMENT("datatype", ncclRedOpCreatePreMulSum(&op, &one, (ncclDataType_t)50, ncclScalarHostImmediate, comm));
  BAD_ARGUMENT("residence", ncclRedOpCreatePreMulSum(&op, &one, ncclFloat, (ncclScalarResidence_t)3, comm));
  OK(ncclRedOpCreatePreMulSum(&op, &one, ncclFloat, ncclScalarHostImmediate, comm));
  BAD_ARGUMENT("made for", ncclAllReduce(send, recv, 8, ncclInt32, op, comm, NULL));
  OK(ncclRedOpDestroy(op, comm));
  BAD_ARGUMENT("ncclRedOpDestroy", ncclRedOpDestroy(op, comm));
  BAD_ARGUMENT("ncclRedOpDestroy", ncclRedOpDestroy(ncclSum, comm));
  OK(ncclAllReduce(send, recv, 8, ncclFloat, ncclSum, comm, NULL)); /* and after all that it works */
}

/* ---------------------------------------------------------------- memory */

static void memory(void) {
  void *p = NULL, *handle = NULL, *at = NULL;
  ncclWindow_t win = NULL;
  OK(ncclMemAlloc(&p, 1 << 20));
  CHECK(p && (uintptr_t)p % 4096 == 0, "pages: %p", p);
  memset(p, 1, 1 << 20);
  BAD_ARGUMENT("ptr is NULL", ncclMemAlloc(NULL, 1));
  OK(ncclCommRegister(comm, p, 1 << 20, &handle));
  CHECK(handle != NULL, "a handle");
  BAD_ARGUMENT("handle is NULL", ncclCommRegister(comm, p, 1, NULL));
  BAD_ARGUMENT("size 0", ncclCommRegister(comm, p, 0, &at));
  BAD_ARGUMENT("was not registered", ncclCommDeregister(comm, send));
  BAD_ARGUMENT("was not registered", ncclCommWindowDeregister(comm, (ncclWindow_t)handle));
  OK(ncclCommDeregister(comm, handle));
  BAD_ARGUMENT("was not registered", ncclCommDeregister(comm, handle));
  OK(ncclCommWindowRegister(comm, p, 1 << 20, &win, NCCL_WIN_DEFAULT));
  OK(ncclWinGetUserPtr(comm, win, &at));
  CHECK(at == p, "the window's pointer");
  OK(ncclCommWindowDeregister(comm, win));
  BAD_ARGUMENT("no window", ncclWinGetUserPtr(comm, win, &at));
  win = (ncclWindow_t)1;
  FAILS(ncclInvalidUsage, "no symmetric memory", ncclCommWindowRegister(comm, p, 1 << 20, &win, NCCL_WIN_COLL_SYMMETRIC));
  CHECK(!win, "no window");
  BAD_ARGUMENT("winFlags", ncclCommWindowRegister(comm, p, 1 << 20, &win, 0x100));
  OK(ncclCommRegister(comm, p, 4096, &handle)); /* left to the end of the communicator */
  OK(ncclMemFree(p));
  BAD_ARGUMENT("ncclMemFree", ncclMemFree(send));
  OK(ncclMemFree(NULL));
}

/* ---------------------------------------------------------------- what is refused */

static void refused(void) {
  void *at = &at;
  ncclWindow_t win = (ncclWindow_t)(void *)send;
  ncclTeam_t world = ncclTeamWorld(comm), lsa = ncclTeamLsa(comm);
  ncclMultimemHandle_t multimem = {NULL};
  ncclCftLeId le;
  size_t offset;
  ncclWaitSignalDesc_t wait = {1, 0, 0, 0};
#define REFUSED(call) FAILS(ncclInvalidUsage, "no device API", call)
  REFUSED(ncclPutSignal(send, 1, ncclFloat, 0, win, 0, 0, 0, 0, comm, NULL));
  REFUSED(ncclSignal(0, 0, 0, 0, comm, NULL));
  REFUSED(ncclWaitSignal(1, &wait, comm, NULL));
  REFUSED(ncclDevCommCreate(comm, NULL, NULL));
  REFUSED(ncclDevCommDestroy(comm, NULL));
  REFUSED(ncclGetLsaMultimemDevicePointer(win, 0, &at));
  CHECK(!at, "no address");
  REFUSED(ncclGetMultimemDevicePointer(win, 0, multimem, &at));
  REFUSED(ncclGetLsaDevicePointer(win, 0, 0, &at));
  REFUSED(ncclGetPeerDevicePointer(win, 0, 0, &at));
  BAD_ARGUMENT("outPtr is NULL", ncclGetPeerDevicePointer(win, 0, 0, NULL));
  REFUSED(ncclGetMultimemDeviceLeInfo(win, 0, &le, &offset));
  REFUSED(ncclGetCftDeviceLeInfo(win, 0, 0, world, &le, &offset));
  REFUSED(ncclGetPeerDeviceLeInfo(win, 0, 0, &le, &offset));
  REFUSED(ncclLsaBarrierCreateRequirement(lsa, 1, NULL, NULL));
  REFUSED(ncclGinBarrierCreateRequirement(comm, world, 1, NULL, NULL));
  REFUSED(ncclLLA2ACreateRequirement(1, 1, NULL, NULL));
  CHECK(ncclLLA2ACalcSlots(3, 12) == 6, "slots");
  CHECK(world.nRanks == 1 && world.rank == 0 && world.stride == 1, "the world");
  CHECK(lsa.nRanks == 1 && ncclTeamRail(comm).nRanks == 1, "teams");
  CHECK(ncclTeamCft(comm, NCCL_CFT_TEAM_FLAT).nRanks == 1 && ncclTeamCftMultimem(comm).nRanks == 1, "teams");
  CHECK(ncclTeamRankToWorld(comm, lsa, 0) == 0 && ncclTeamRankToLsa(comm, world, 0) == 0, "ranks in teams");
}

/* ---------------------------------------------------------------- parameters */

static void parameters(void) { /* the test's runner sets HFREDUCE_CHUNK=64K NCCL_SOCKET_IFNAME=lo0 HFREDUCE_TIMEOUT=12.5 */
  ncclParamHandle_t chunk, name, slots;
  int8_t i8;
  int16_t i16;
  int32_t i32;
  int64_t i64;
  uint8_t u8;
  uint16_t u16;
  uint32_t u32;
  uint64_t u64;
  const char *text, **keys;
  char bytes[64];
  int n;
  OK(ncclParamBind(&chunk, "HFREDUCE_CHUNK"));
  OK(ncclParamBind(&slots, "HFREDUCE_SLOTS"));
  OK(ncclParamBind(&name, "NCCL_SOCKET_IFNAME"));
  OK(ncclParamGetI32(chunk, &i32));
  OK(ncclParamGetI64(chunk, &i64));
  OK(ncclParamGetU32(chunk, &u32));
  OK(ncclParamGetU64(chunk, &u64));
  CHECK(i32 == 65536 && i64 == 65536 && u32 == 65536 && u64 == 65536, "64K is %d", i32);
  BAD_ARGUMENT("does not fit", ncclParamGetI8(chunk, &i8));
  BAD_ARGUMENT("does not fit", ncclParamGetI16(chunk, &i16));
  BAD_ARGUMENT("does not fit", ncclParamGetU16(chunk, &u16));
  OK(ncclParamGetI8(slots, &i8));
  OK(ncclParamGetI16(slots, &i16));
  OK(ncclParamGetU8(slots, &u8));
  OK(ncclParamGetU16(slots, &u16));
  CHECK(i8 == 4 && i16 == 4 && u8 == 4 && u16 == 4, "slots %d", i8);
  ncclParamHandle_t spin, timeout;
  OK(ncclParamBind(&spin, "HFREDUCE_SPIN"));
  OK(ncclParamBind(&timeout, "HFREDUCE_TIMEOUT"));
  OK(ncclParamGetI8(spin, &i8));
  CHECK(i8 == -1, "spin %d", i8);
  BAD_ARGUMENT("does not fit", ncclParamGetU64(spin, &u64));
  BAD_ARGUMENT("no integer", ncclParamGetI64(timeout, &i64));
  BAD_ARGUMENT("no integer", ncclParamGetI64(name, &i64));
  OK(ncclParamGetStr(name, &text));
  CHECK(!strcmp(text, "lo0"), "ifname %s", text);
  OK(ncclParamGet(name, bytes, (int)sizeof bytes, &n));
  CHECK(n == 4 && !strcmp(bytes, "lo0"), "%d bytes", n);
  OK(ncclParamGet(chunk, bytes, (int)sizeof bytes, &n));
  memcpy(&i64, bytes, sizeof i64);
  CHECK(n == 8 && i64 == 65536, "%d bytes", n);
  BAD_ARGUMENT("there is room for 2", ncclParamGet(name, bytes, 2, &n));
  OK(ncclParamGetParameter("HFREDUCE_SOCKET_IFNAME", &text, &n));
  CHECK(!strcmp(text, "lo0") && n == 3, "by our name: %s", text);
  BAD_ARGUMENT("no parameter NCCL_NONE", ncclParamGetParameter("NCCL_NONE", &text, &n));
  BAD_ARGUMENT("no parameter", ncclParamBind(&chunk, "NCCL_NONE"));
  BAD_ARGUMENT("not of ncclParamBind", ncclParamGetI64((ncclParamHandle_t)(void *)bytes, &i64));
  BAD_ARGUMENT("out is NULL", ncclParamGetI64(slots, NULL));
  BAD_ARGUMENT("key is NULL", ncclParamBind(&slots, NULL));
  OK(ncclParamGetAllParameterKeys(&keys, &n));
  int seen = 0;
  for (int i = 0; i < n; i++) seen += !strcmp(keys[i], "NCCL_DEBUG") || !strcmp(keys[i], "HFREDUCE_DEBUG");
  CHECK(n > 30 && seen == 2, "%d keys", n);
  BAD_ARGUMENT("table is NULL", ncclParamGetAllParameterKeys(NULL, &n));
  ncclParamDumpAll();
  pncclParamDumpAll();
}

int main(void) {
  for (int i = 0; i < 8; i++) send[i] = (float)i;
  library();
  joining();
  generations();
  configurations();
  comm = alone(NULL);
  handles();
  asking();
  calls();
  memory();
  refused();
  parameters();
  OK(ncclCommDestroy(comm));
  return check_done();
}
