/* Keyed message authentication: SipHash-2-4 with a 128-bit key and 128-bit tag (Aumasson and Bernstein 2012, and its 128-bit
 * variant). */
#ifndef HFR_BASE_MAC_H_
#define HFR_BASE_MAC_H_
#include <stddef.h>
#include <stdint.h>
void hfr_mac(const uint8_t key[16], const void *data, size_t bytes, uint8_t tag[16]);
/* Constant-time comparison: 1 when equal. */
int hfr_mac_equal(const uint8_t a[16], const uint8_t b[16]);
/* Fill with the kernel's random bytes (getrandom). */
void hfr_random(void *data, size_t bytes);
#endif
