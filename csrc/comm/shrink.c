/*
 * Shrinking: the ranks that stay make a new communicator, with no word over the old one.
 *
 * Every rank knows the address of every other's listener, the secret, and who stays. So each derives by itself the name and the
 * secret of the new communicator, and the lowest rank that stays serves its rendezvous. That works as well when the old
 * communicator is broken, whoever died.
 */
#include "comm.h"

#include "../base/mac.h"

#include <stdlib.h>
#include <string.h>

/* out[r]: r's rank in the new communicator, -1: excluded. Returns how many stay. */
static int renumber(int nranks, const int *exclude, int nexclude, int *out) {
  int n = 0;
  memset(out, 0, (size_t)nranks * sizeof *out);
  for (int i = 0; i < nexclude; i++) out[exclude[i]] = -1;
  for (int r = 0; r < nranks; r++)
    if (!out[r]) out[r] = n++;
  return n;
}

/* A tag over what all who stay know alike. */
static void derive(struct hfreduceComm *c, const char *what, int first, uint8_t out[16]) {
  struct {
    char what[16];
    uint64_t comm_id, count, first;
  } text = {.comm_id = c->uid.comm_id, .count = c->shrinks, .first = (uint64_t)first};
  strncpy(text.what, what, sizeof text.what - 1);
  hfr_mac(c->uid.secret, &text, sizeof text, out);
}

static struct hfr_uid name_of_the_rest(struct hfreduceComm *c, const int *now) {
  struct hfr_uid uid = {.magic = HFR_UID_MAGIC, .version = 1, .local = c->uid.local};
  uint8_t tag[16];
  int first = 0;
  while (now[first] < 0) first++;
  derive(c, "shrink id", first, tag);
  memcpy(&uid.comm_id, tag, sizeof uid.comm_id);
  derive(c, "shrink secret", first, uid.secret);
  hfr_mac(uid.secret, now, (size_t)c->nranks * sizeof *now, tag);
  memcpy(&uid.members, tag, sizeof uid.members);
  uid.root = c->addrs[first];
  return uid;
}

static hfreduceResult_t check_arguments(hfreduceComm_t c, const int *exclude, int nexclude, hfreduceComm_t *newcomm, int flags) {
  static const char f[] = "hfreduceCommShrink";
  HFR_TRY(hfr_comm_check(c, f));
  if (!newcomm) return hfr_fail(hfreduceInvalidArgument, "%s: newcomm is NULL", f);
  *newcomm = NULL;
  if (c->forked)
    return hfr_fail(hfreduceInvalidUsage, "%s: the communicator belongs to process %d, this is its fork", f, (int)c->pid);
  if (flags & ~hfreduceShrinkAbort)
    return hfr_fail(hfreduceInvalidArgument, "%s: flags are %#x; only 0 and 1 are known", f, flags);
  if (nexclude < 0 || (nexclude && !exclude))
    return hfr_fail(hfreduceInvalidArgument, "%s: %s", f, nexclude < 0 ? "nexclude is negative" : "exclude is NULL");
  for (int i = 0; i < nexclude; i++) {
    if (exclude[i] < 0 || exclude[i] >= c->nranks)
      return hfr_fail(hfreduceInvalidArgument, "%s: exclude[%d] is %d; with %d ranks it must be 0 to %d", f, i, exclude[i],
                      c->nranks, c->nranks - 1);
    if (exclude[i] == c->rank)
      return hfr_fail(hfreduceInvalidArgument, "%s: exclude[%d] is this rank, %d; a rank that is left out does not call", f, i,
                      c->rank);
  }
  return hfreduceSuccess;
}

hfreduceResult_t hfreduceCommShrink(hfreduceComm_t comm, const int *exclude, int nexclude, hfreduceComm_t *newcomm,
                                    hfreduceConfig_t *config, int flags) {
  HFR_TRY(check_arguments(comm, exclude, nexclude, newcomm, flags));
  int *now = malloc((size_t)comm->nranks * sizeof *now);
  if (!now) return hfr_fail(hfreduceSystemError, "out of memory for %d ranks", comm->nranks);
  if (flags & hfreduceShrinkAbort) hfreduceCommAbort(comm);
  int n = renumber(comm->nranks, exclude, nexclude, now), rank = now[comm->rank];
  struct hfr_uid uid = name_of_the_rest(comm, now);
  free(now);
  comm->shrinks++;
  hfreduceUniqueId id;
  hfreduceConfig_t inherited;
  hfreduceConfigInit(&inherited);
  inherited.timeout = comm->timeout;
  hfr_uid_pack(&uid, &id);
  if (rank == 0) HFR_TRY(hfr_runtime_open_root(&uid));
  return hfreduceCommInitRankConfig(newcomm, n, id, rank, config ? config : &inherited);
}
