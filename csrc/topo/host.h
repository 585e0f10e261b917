/* Who and where this process is. */
#ifndef HFR_TOPO_HOST_H_
#define HFR_TOPO_HOST_H_
#include <stddef.h>
#include <stdint.h>
/* Tells nodes apart: a hash of boot id and network namespace, or of HFREDUCE_HOSTID when that is set. Read afresh at each call.
 */
void hfr_host_id(uint8_t id[16]);
/* Tells machines apart, by their boot: ranks of one share its cores, whatever containers or namespaces they are in. */
void hfr_machine_id(uint8_t id[16]);
/* Host name, at most 63 characters, NUL-terminated; never empty. */
void hfr_host_name(char name[64]);
/* Bytes of the CPU's second- or third-level cache, as far as it is told; else a common size. */
size_t hfr_cache_bytes(int level);
#endif
