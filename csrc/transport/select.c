/* The table of transports between nodes. */
#include "transport.h"
#include "verbs.h"
#include "verbs_memory.h"

#include <stdio.h>
#include <string.h>

static const struct hfr_transport *const remote[] = {&hfr_transport_verbs, &hfr_transport_tcp}; /* best first */
#define COUNT ((int)(sizeof remote / sizeof *remote))
_Static_assert(COUNT <= HFR_TRANSPORTS_MAX, "an offer holds all of them");

const struct hfr_transport *hfr_transport_at(int number) { return number >= 1 && number <= COUNT ? remote[number - 1] : NULL; }

/* Add a transport to an offer if it can be used here and is not in it. */
static void add(struct hfr_transport_offer *offer, int number) {
  const hfreduceErrorInfo_t before = *hfr_last_error(); /* that one cannot be used is no error yet */
  const char *why = remote[number - 1]->why_not ? remote[number - 1]->why_not() : NULL;
  size_t used = strlen(offer->why);
  if (why) {
    snprintf(offer->why + used, sizeof offer->why - used, "%s%s: %s", used ? "; " : "", remote[number - 1]->name, why);
    *hfr_last_error() = before;
    return;
  }
  int at = 0;
  while (offer->number[at] && offer->number[at] != number) at++;
  offer->number[at] = (uint8_t)number;
}

hfreduceResult_t hfr_transport_offer(const char *names, struct hfr_transport_offer *offer) {
  memset(offer, 0, sizeof *offer);
  int known = 0;
  for (int i = 1; i <= COUNT && !*names; i++) add(offer, i);
  for (const char *p = names; *p;) {
    size_t n = strcspn(p, ",");
    for (int i = 1; i <= COUNT; i++)
      if (strlen(remote[i - 1]->name) == n && !memcmp(remote[i - 1]->name, p, n)) add(offer, i), known++;
    p += n + (p[n] == ',');
  }
  if (known || !*names) return hfreduceSuccess;
  return hfr_fail(hfreduceInvalidUsage, "HFREDUCE_TRANSPORT is \"%.200s\"; between nodes there are: verbs, tcp", names);
}

void hfr_transport_meet(uint8_t common[HFR_TRANSPORTS_MAX], const uint8_t other[HFR_TRANSPORTS_MAX]) {
  int kept = 0;
  for (int i = 0; i < HFR_TRANSPORTS_MAX; i++)
    if (common[i] && memchr(other, common[i], HFR_TRANSPORTS_MAX)) common[kept++] = common[i];
  memset(common + kept, 0, (size_t)(HFR_TRANSPORTS_MAX - kept));
}

void hfr_transport_list(const uint8_t offer[HFR_TRANSPORTS_MAX], char text[64]) {
  size_t used = 0;
  snprintf(text, 64, "none");
  for (int i = 0; i < HFR_TRANSPORTS_MAX && used < 64; i++)
    if (hfr_transport_at(offer[i]))
      used += (size_t)snprintf(text + used, 64 - used, "%s%s", used ? ", " : "", hfr_transport_at(offer[i])->name);
}

size_t hfr_transport_describe(char *text, size_t size) { return hfr_verbs_describe(text, size); }

void hfr_transport_tidy(void) { hfr_verbs_memory_tidy(); }
