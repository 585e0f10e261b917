/* The table of transports between nodes. */
#include "transport.h"
#include "verbs.h"

#include <string.h>

static const struct hfr_transport *const remote[] = {&hfr_transport_tcp}; /* best first */

hfreduceResult_t hfr_transport_select(const char *names, const struct hfr_transport **out) {
  if (!*names) {
    *out = remote[0];
    return hfreduceSuccess;
  }
  for (const char *p = names; *p;) {
    size_t n = strcspn(p, ",");
    for (size_t i = 0; i < sizeof remote / sizeof *remote; i++)
      if (strlen(remote[i]->name) == n && !memcmp(remote[i]->name, p, n)) {
        *out = remote[i];
        return hfreduceSuccess;
      }
    p += n + (p[n] == ',');
  }
  return hfr_fail(hfreduceInvalidUsage, "HFREDUCE_TRANSPORT is \"%s\"; between nodes this build has: tcp", names);
}

size_t hfr_transport_describe(char *text, size_t size) { return hfr_verbs_describe(text, size); }
