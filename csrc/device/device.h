/*
 * Where buffers can live: a table of devices. Host memory is always the last entry and owns what no other device claims. Device
 * code is found at run time, so every build has every entry; `why_absent` tells what is missing.
 */
#ifndef HFR_DEVICE_DEVICE_H_
#define HFR_DEVICE_DEVICE_H_
#include "../base/status.h"

struct hfr_device {
  const char *name;
  /* NULL when usable, else a line that says what is missing. Any thread. */
  const char *(*why_absent)(void);
  /* Does this pointer belong to the device? Any thread; called once a buffer and call. */
  int (*owns)(const void *ptr);
  /* Memory that is cheap to communicate from. Caller owns it until release. InvalidArgument for a foreign pointer. */
  hfreduceResult_t (*alloc)(void **ptr, size_t bytes);
  hfreduceResult_t (*release)(void *ptr);
};

extern const struct hfr_device hfr_device_host;

/* The i-th device, NULL past the end. */
const struct hfr_device *hfr_device_at(int i);
/* The device that a pointer belongs to; never NULL. */
const struct hfr_device *hfr_device_of(const void *ptr);
#endif
