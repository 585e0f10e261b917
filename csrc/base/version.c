/* The protocol's number, and the hash of the sources that the build passes to this file alone. */
#include "version.h"

#include <stdio.h>

#include "../include/hfreduce.h"

/* Count up with every change of what travels between ranks after the handshake. */
#ifndef HFR_PROTOCOL
#define HFR_PROTOCOL 2u
#endif
#ifndef HFR_BUILD
#define HFR_BUILD 0u
#endif

const struct hfr_version hfr_version = {HFR_PROTOCOL, HFREDUCE_VERSION_CODE, HFR_BUILD};

const char *hfr_version_text(const struct hfr_version *v, char text[HFR_VERSION_TEXT]) {
  snprintf(text, HFR_VERSION_TEXT, "hfreduce %u.%u.%u %08x (protocol %u)", v->release / 10000, v->release / 100 % 100,
           v->release % 100, v->build, v->protocol);
  return text;
}
