/* SipHash-2-4 with a 128-bit tag, and random bytes. */
#include "mac.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/random.h>
#include <sys/types.h>
#include <unistd.h>

struct sip {
  uint64_t v0, v1, v2, v3;
};

/* Byte by byte: no alignment or byte order is assumed; compilers make one load or store of it. */
static uint64_t load_le64(const uint8_t *p) {
  uint64_t word = 0;
  for (int i = 0; i < 8; i++) word |= (uint64_t)p[i] << (8 * i);
  return word;
}

static void store_le64(uint8_t *p, uint64_t word) {
  for (int i = 0; i < 8; i++) p[i] = (uint8_t)(word >> (8 * i));
}

static uint64_t rotate(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

static void sip_rounds(struct sip *s, int rounds) {
  while (rounds--) {
    s->v0 += s->v1;
    s->v2 += s->v3;
    s->v1 = rotate(s->v1, 13) ^ s->v0;
    s->v3 = rotate(s->v3, 16) ^ s->v2;
    s->v0 = rotate(s->v0, 32);
    s->v2 += s->v1;
    s->v0 += s->v3;
    s->v1 = rotate(s->v1, 17) ^ s->v2;
    s->v3 = rotate(s->v3, 21) ^ s->v0;
    s->v2 = rotate(s->v2, 32);
  }
}

static void sip_absorb(struct sip *s, uint64_t word) {
  s->v3 ^= word;
  sip_rounds(s, 2);
  s->v0 ^= word;
}

void hfr_mac(const uint8_t key[16], const void *data, size_t bytes, uint8_t tag[16]) {
  const uint8_t *p = data;
  uint64_t k0 = load_le64(key), k1 = load_le64(key + 8);
  /* "somepseudorandomlygeneratedbytes"; 0xee sets the 128-bit variant apart from the 64-bit one. */
  struct sip s = {k0 ^ 0x736f6d6570736575, k1 ^ 0x646f72616e646f6d ^ 0xee, k0 ^ 0x6c7967656e657261, k1 ^ 0x7465646279746573};
  uint64_t last = (uint64_t)(bytes & 0xff) << 56;
  for (; bytes >= 8; bytes -= 8, p += 8) sip_absorb(&s, load_le64(p));
  for (size_t i = 0; i < bytes; i++) last |= (uint64_t)p[i] << (8 * i);
  sip_absorb(&s, last);
  s.v2 ^= 0xee;
  sip_rounds(&s, 4);
  store_le64(tag, s.v0 ^ s.v1 ^ s.v2 ^ s.v3);
  s.v1 ^= 0xdd;
  sip_rounds(&s, 4);
  store_le64(tag + 8, s.v0 ^ s.v1 ^ s.v2 ^ s.v3);
}

int hfr_mac_equal(const uint8_t a[16], const uint8_t b[16]) {
  /* volatile: the compiler may not leave the loop at the first difference, whose place the time would tell. */
  volatile uint8_t different = 0;
  for (int i = 0; i < 16; i++) different = (uint8_t)(different | (a[i] ^ b[i]));
  return different == 0;
}

void hfr_random(void *data, size_t bytes) {
  uint8_t *p = data;
  int urandom = -1; /* where a sandbox or an old kernel has no getrandom */
  while (bytes) {
    ssize_t got = urandom < 0 ? getrandom(p, bytes, 0) : read(urandom, p, bytes);
    if (got > 0) {
      p += got;
      bytes -= (size_t)got;
    } else if (got < 0 && errno == EINTR) {
      continue;
    } else if (urandom >= 0 || (urandom = open("/dev/urandom", O_RDONLY | O_CLOEXEC)) < 0) {
      abort(); /* secrets come from here: going on with predictable bytes would be worse */
    }
  }
  if (urandom >= 0) close(urandom);
}
