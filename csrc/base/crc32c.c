/*
 * CRC32C. The CRC instructions take 8 bytes a cycle but answer after three, so three streams run side by side: a block is three
 * lanes of `lane` bytes, and their CRCs are joined by a carry-less multiplication:
 *
 *     | lane 0 | lane 1 | lane 2 |     crc = c0 * x^(16 lane) + c1 * x^(8 lane) + c2   (mod P)
 *
 * The product of two 32-bit reflected polynomials is one bit short of 64, and the CRC instruction that reduces it multiplies by
 * x^32, so the factors are x^(8 n - 33) mod P, bit-reflected.
 */
#include "crc32c.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define POLYNOMIAL 0x82f63b78u /* reflected */
#define COPY_BLOCK 6144        /* two long blocks; source and destination stay in L1 */

typedef uint32_t crc_fn(uint32_t state, const uint8_t *p, size_t bytes);

/* ---- slicing by 8 ---- */

static uint32_t slices[8][256];
static pthread_once_t slices_once = PTHREAD_ONCE_INIT;

/* slices[k][b]: the state after byte b and k zero bytes. */
static void fill_slices(void) {
  for (uint32_t byte = 0; byte < 256; byte++) {
    uint32_t state = byte;
    for (int k = 0; k < 8; k++) {
      for (int bit = 0; bit < 8; bit++) state = state >> 1 ^ (state & 1 ? POLYNOMIAL : 0);
      slices[k][byte] = state;
    }
  }
}

static uint64_t load_le64(const uint8_t *p) {
  uint64_t word;
  memcpy(&word, p, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

static uint32_t crc_portable(uint32_t state, const uint8_t *p, size_t bytes) {
  for (; bytes >= 8; bytes -= 8, p += 8) {
    uint64_t word = load_le64(p) ^ state;
    state = slices[7][word & 0xff] ^ slices[6][word >> 8 & 0xff] ^ slices[5][word >> 16 & 0xff] ^ slices[4][word >> 24 & 0xff] ^
            slices[3][word >> 32 & 0xff] ^ slices[2][word >> 40 & 0xff] ^ slices[1][word >> 48 & 0xff] ^ slices[0][word >> 56];
  }
  for (; bytes; bytes--) state = state >> 8 ^ slices[0][(state ^ *p++) & 0xff];
  return state;
}

/* ---- hardware: four primitives an architecture ---- */

#if defined(HFR_CRC32C_PORTABLE)
/* The tests build this file a second time without hardware. */
#elif defined(__x86_64__)
#include <nmmintrin.h>
#include <wmmintrin.h>
#define HAVE_HARDWARE 1
#define HARDWARE __attribute__((target("sse4.2,pclmul")))

static int hardware_present(void) { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul"); }

HARDWARE static inline uint32_t step1(uint32_t state, uint8_t byte) { return _mm_crc32_u8(state, byte); }

HARDWARE static inline uint32_t step8(uint32_t state, uint64_t word) { return (uint32_t)_mm_crc32_u64(state, word); }

HARDWARE static inline uint64_t multiply(uint32_t a, uint32_t b) {
  return (uint64_t)_mm_cvtsi128_si64(_mm_clmulepi64_si128(_mm_cvtsi32_si128((int)a), _mm_cvtsi32_si128((int)b), 0));
}

#elif defined(__aarch64__) && defined(__linux__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#include <sys/auxv.h>
#define HAVE_HARDWARE 1
#define HARDWARE
#define ARM_HWCAP_PMULL (1ul << 4)
#define ARM_HWCAP_CRC32 (1ul << 7)

static int hardware_present(void) {
  unsigned long need = ARM_HWCAP_PMULL | ARM_HWCAP_CRC32;
  return (getauxval(AT_HWCAP) & need) == need;
}

/* Assembly, because compilers disagree on how a function asks for the crc extension. */
static inline uint32_t step1(uint32_t state, uint8_t byte) {
  __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(state) : "r"((uint32_t)byte));
  return state;
}

static inline uint32_t step8(uint32_t state, uint64_t word) {
  __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(state) : "r"(word));
  return state;
}

static inline uint64_t multiply(uint32_t a, uint32_t b) {
  uint64_t product;
  __asm__(".arch_extension aes\n\tfmov d30, %x1\n\tfmov d31, %x2\n\tpmull v30.1q, v30.1d, v31.1d\n\tfmov %x0, d30"
          : "=r"(product)
          : "r"((uint64_t)a), "r"((uint64_t)b)
          : "v30", "v31");
  return product;
}
#endif

#if defined(HAVE_HARDWARE)
struct factors {
  size_t lane;       /* bytes, a multiple of 8 */
  uint32_t one, two; /* shift a CRC over one lane, over two */
};
static const struct factors long_lane = {1024, 0x170076fa, 0xa51b6135};
static const struct factors short_lane = {128, 0x0d3b6092, 0xb9e02b86};

HARDWARE static inline __attribute__((always_inline)) uint32_t three_lanes(uint32_t state, const uint8_t **data, size_t *bytes,
                                                                           const struct factors f) {
  const uint8_t *p = *data;
  size_t left = *bytes;
  for (; left >= 3 * f.lane; left -= 3 * f.lane, p += 3 * f.lane) {
    uint32_t c0 = state, c1 = 0, c2 = 0;
    for (size_t i = 0; i < f.lane; i += 8) {
      c0 = step8(c0, load_le64(p + i));
      c1 = step8(c1, load_le64(p + f.lane + i));
      c2 = step8(c2, load_le64(p + 2 * f.lane + i));
    }
    state = step8(0, multiply(c0, f.two) ^ multiply(c1, f.one)) ^ c2;
  }
  *data = p;
  *bytes = left;
  return state;
}

HARDWARE static uint32_t crc_hardware(uint32_t state, const uint8_t *p, size_t bytes) {
  state = three_lanes(state, &p, &bytes, long_lane);
  state = three_lanes(state, &p, &bytes, short_lane);
  for (; bytes >= 8; bytes -= 8, p += 8) state = step8(state, load_le64(p));
  for (; bytes; bytes--) state = step1(state, *p++);
  return state;
}
#endif

/* ---- which of them ---- */

static crc_fn crc_first_use;
static _Atomic(crc_fn *) chosen = crc_first_use;

static uint32_t crc_first_use(uint32_t state, const uint8_t *p, size_t bytes) {
  crc_fn *crc = crc_portable;
#if defined(HAVE_HARDWARE)
  if (hardware_present()) crc = crc_hardware;
#endif
  if (crc == crc_portable) pthread_once(&slices_once, fill_slices);
  atomic_store_explicit(&chosen, crc, memory_order_release); /* pairs with the acquire in update: the slices are filled */
  return crc(state, p, bytes);
}

static uint32_t update(uint32_t state, const uint8_t *p, size_t bytes) {
  return atomic_load_explicit(&chosen, memory_order_acquire)(state, p, bytes);
}

uint32_t hfr_crc32c(uint32_t crc, const void *data, size_t bytes) { return ~update(~crc, data, bytes); }

uint32_t hfr_crc32c_copy(uint32_t crc, void *dst, const void *src, size_t bytes) {
  uint8_t *to = dst;
  const uint8_t *from = src;
  uint32_t state = ~crc;
  while (bytes) {
    size_t block = bytes < COPY_BLOCK ? bytes : COPY_BLOCK;
    memcpy(to, from, block);
    state = update(state, to, block); /* of the copy: that is what will be used, even if src changes meanwhile */
    to += block;
    from += block;
    bytes -= block;
  }
  return ~state;
}
