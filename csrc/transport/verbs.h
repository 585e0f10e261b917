/* What the transports' table knows of verbs. */
#ifndef HFR_TRANSPORT_VERBS_H_
#define HFR_TRANSPORT_VERBS_H_
#include <stddef.h>

/* One line a port of an RDMA device, or why there is none; as hfr_transport_describe. */
size_t hfr_verbs_describe(char *text, size_t size);
#endif
