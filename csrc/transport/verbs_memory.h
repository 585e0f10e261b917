/*
 * Registrations of users' buffers, kept from one operation to the next.
 *
 * A registration pins pages. When a buffer is freed and its addresses are mapped anew, the device would go on sending the old
 * pages: so each cached range is watched (userfaultfd), and what is unmapped, moved or emptied is forgotten before munmap()
 * returns to its caller. Where the kernel gives no such notice, or a fork would take the pages away from a child, nothing is
 * cached and data is copied instead. A process has one cache. All functions are thread-safe.
 */
#ifndef HFR_TRANSPORT_VERBS_MEMORY_H_
#define HFR_TRANSPORT_VERBS_MEMORY_H_
#include "verbs_lib.h"

/* A coming operation sends from this buffer. Registered when it is seen for the second time: what is used once is cheaper to
 * copy.
 */
void hfr_verbs_memory_lend(const struct hfr_ib_port *port, const void *memory, size_t bytes);
/* Key under which the port's device reads these bytes, 0 if they are not registered or too few to be worth it. *hold keeps the
 * registration until it is given to hfr_verbs_memory_done. */
uint32_t hfr_verbs_memory_key(const struct hfr_ib_port *port, const void *data, size_t bytes, int *hold);
void hfr_verbs_memory_done(int hold);
/* Free what was forgotten meanwhile. */
void hfr_verbs_memory_tidy(void);
/* Forget everything: nobody sends any more. */
void hfr_verbs_memory_drop(void);
/* Why buffers are not cached; "" if they are. */
const char *hfr_verbs_memory_why_not(void);
/* Buffers that are registered now. */
int hfr_verbs_memory_count(void);
#endif
