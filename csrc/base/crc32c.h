/* CRC32C (Castagnoli), hardware where the CPU has it (SSE4.2 with three interleaved streams, ARMv8 crc), else slicing-by-8. */
#ifndef HFR_BASE_CRC32C_H_
#define HFR_BASE_CRC32C_H_
#include <stddef.h>
#include <stdint.h>
/* Standard conventions (initial and final inversion inside): crc of "123456789" is 0xe3069283; chain by passing the previous
 * result, 0 first. */
uint32_t hfr_crc32c(uint32_t crc, const void *data, size_t bytes);
/* crc32c of src while copying it to dst (no overlap): one pass over memory. */
uint32_t hfr_crc32c_copy(uint32_t crc, void *dst, const void *src, size_t bytes);
#endif
