/*
 * Shrinking: the ranks that stay make a new communicator, with no word over the old one.
 *
 * Every rank knows the address of every other's listener, the secret, and who stays. So each derives by itself the name and the
 * secret of the new communicator, and the lowest rank that stays serves its rendezvous. That works as well when the old
 * communicator is broken, whoever died.
 */
#include "comm.h"

#include "../base/auth.h"
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

/* How often this rank has called for a communicator of these ranks. Who is one of them has called as often, whatever other sets
   he was in meanwhile. */
struct hfr_shrunk {
  struct hfr_shrunk *next;
  uint64_t members, count;
};

void hfr_shrunk_free(struct hfreduceComm *c) {
  for (struct hfr_shrunk *s = c->shrunk, *next; s; s = next) {
    next = s->next;
    free(s);
  }
}

static struct hfr_shrunk *find_set(struct hfreduceComm *c, uint64_t members) {
  for (struct hfr_shrunk *s = c->shrunk; s; s = s->next)
    if (s->members == members) return s;
  struct hfr_shrunk *s = calloc(1, sizeof *s);
  if (!s) return NULL;
  *s = (struct hfr_shrunk){.next = c->shrunk, .members = members};
  return c->shrunk = s;
}

/* A tag over what all who stay know alike. */
static void derive(const struct hfreduceComm *c, const char *what, uint64_t first, uint64_t count, uint8_t out[16]) {
  struct {
    char what[16];
    uint64_t comm_id, first, count;
  } text = {.comm_id = c->uid.comm_id, .first = first, .count = count};
  strncpy(text.what, what, sizeof text.what - 1);
  hfr_mac(c->uid.secret, &text, sizeof text, out);
}

/* The rendezvous has no name of the set, so that ranks with different lists meet there, and hear of it. */
static hfreduceResult_t name_of_the_rest(struct hfreduceComm *c, const int *now, struct hfr_uid *uid) {
  uint8_t tag[16];
  uint64_t first = 0;
  *uid = (struct hfr_uid){.magic = HFR_UID_MAGIC, .version = 1, .local = c->uid.local};
  while (now[first] < 0) first++;
  hfr_mac(c->uid.secret, now, (size_t)c->nranks * sizeof *now, tag);
  memcpy(&uid->members, tag, sizeof uid->members);
  pthread_mutex_lock(&c->ops_lock);
  struct hfr_shrunk *set = find_set(c, uid->members);
  uint64_t count = set ? set->count++ : 0;
  pthread_mutex_unlock(&c->ops_lock);
  if (!set) return hfr_fail(hfreduceSystemError, "out of memory for a list of %d ranks", c->nranks);
  derive(c, "meeting", first, count, tag);
  memcpy(&uid->root_id, tag, sizeof uid->root_id);
  if (!hfr_auth_is_public(c->uid.secret)) derive(c, "secret", first, count, uid->secret); /* else it stays none */
  derive(c, "comm", uid->members, count, tag);
  memcpy(&uid->comm_id, tag, sizeof uid->comm_id);
  uid->root = c->addrs[first];
  return hfreduceSuccess;
}

static hfreduceResult_t check_arguments(hfreduceComm_t c, const int *exclude, int nexclude, hfreduceComm_t *newcomm, int flags) {
  static const char f[] = "hfreduceCommShrink";
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

static hfreduceResult_t shrink(hfreduceComm_t comm, const int *exclude, int nexclude, hfreduceComm_t *newcomm,
                               hfreduceConfig_t *config, int flags) {
  HFR_TRY(check_arguments(comm, exclude, nexclude, newcomm, flags));
  int *now = malloc((size_t)comm->nranks * sizeof *now);
  if (!now) return hfr_fail(hfreduceSystemError, "out of memory for %d ranks", comm->nranks);
  if (flags & hfreduceShrinkAbort) hfr_comm_abort(comm);
  int n = renumber(comm->nranks, exclude, nexclude, now), rank = now[comm->rank];
  struct hfr_uid uid;
  hfreduceResult_t r = name_of_the_rest(comm, now, &uid);
  free(now);
  HFR_TRY(r);
  hfreduceUniqueId id;
  hfreduceConfig_t settings = hfr_comm_heir(comm, config);
  hfr_uid_pack(&uid, &id);
  if (rank == 0) HFR_TRY(hfr_runtime_open_root(&uid));
  return hfr_comm_init(newcomm, n, &id, rank, &settings, NULL);
}

/* Not a collective over `comm`: it may be called beside one that hangs. */
hfreduceResult_t hfreduceCommShrink(hfreduceComm_t comm, const int *exclude, int nexclude, hfreduceComm_t *newcomm,
                                    hfreduceConfig_t *config, int flags) {
  HFR_TRY(hfr_comm_enter(comm, "hfreduceCommShrink", HFR_WAITS));
  hfreduceResult_t r = shrink(comm, exclude, nexclude, newcomm, config, flags);
  hfr_comm_leave(comm, HFR_WAITS);
  return r;
}
