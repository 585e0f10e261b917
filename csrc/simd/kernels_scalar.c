/* The level that every machine has: portable vectors of 16 bytes, which the compiler maps to the baseline of its target or to
 * scalar code. */
#define HFR_VB 16
#define HFR_LEVEL scalar
#include "vector.inc"
#include "kernels.inc"
