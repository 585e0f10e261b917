/* What this library is, as its peers must know it. */
#ifndef HFR_BASE_VERSION_H_
#define HFR_BASE_VERSION_H_
#include <stdint.h>

struct hfr_version {
  uint32_t
      protocol;     /* of all that follows the handshake: frames, records, messages, the arena. Builds with another cannot talk */
  uint32_t release; /* HFREDUCE_VERSION_CODE */
  uint32_t build;   /* hash of the C sources; 0: not known */
};
extern const struct hfr_version hfr_version;

#define HFR_VERSION_TEXT 64
/* "hfreduce 0.1.0 1a2b3c4d (protocol 2)" */
const char *hfr_version_text(const struct hfr_version *version, char text[HFR_VERSION_TEXT]);
#endif
