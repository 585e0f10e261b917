/* The arena's memory: what a rank that gets it from the local leader refuses, and what stays mapped after it was closed. */
#include "check.h"

#include "node/arena.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHUNK 8192
#define SLOTS 2
#define LEND 65536

/* A file of so many bytes with such seals; beginning with those of `like`, unless that is NULL. */
static int make_file(size_t bytes, int seals, const struct hfr_arena *like) {
  int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(fd >= 0 && !ftruncate(fd, (off_t)bytes));
  if (like) CHECK(pwrite(fd, like->map, 4096, 0) == 4096);
  CHECK(!fcntl(fd, F_ADD_SEALS, seals));
  return fd;
}

static int attached(int fd) {
  struct hfr_arena a;
  hfreduceResult_t r = hfr_arena_attach(&a, fd, 2, CHUNK, SLOTS, 0);
  hfr_arena_close(&a);
  return r == hfreduceSuccess;
}

static void test_attach(void) {
  struct hfr_arena a;
  CHECK(!hfr_arena_create(&a, 2, CHUNK, SLOTS, 0), "%s", hfr_last_error()->text);
  CHECK(attached(dup(a.fd)), "%s", hfr_last_error()->text);
  CHECK(attached(make_file(a.bytes, F_SEAL_SHRINK, &a)), "%s", hfr_last_error()->text);
  CHECK(!attached(make_file(a.bytes, 0, &a)), "who has it could shrink it");
  CHECK(!attached(make_file(a.bytes, F_SEAL_GROW, &a)), "who has it could shrink it");
  CHECK(!attached(make_file(a.bytes + 4096, F_SEAL_SHRINK, &a)), "another size");
  CHECK(!attached(make_file(a.bytes - 4096, F_SEAL_SHRINK, &a)), "another size");
  CHECK(!attached(make_file(a.bytes, F_SEAL_SHRINK, NULL)), "no arena");
  CHECK(!attached(open("/dev/null", O_RDWR | O_CLOEXEC)), "no file in memory");
  hfr_arena_close(&a);
}

/* Bytes of arenas that this process maps. */
static size_t mapped(void) {
  char line[400];
  size_t sum = 0;
  unsigned long from, to;
  FILE *maps = fopen("/proc/self/maps", "re");
  while (CHECK(maps) && fgets(line, sizeof line, maps))
    if (strstr(line, "/memfd:hfreduce") && sscanf(line, "%lx-%lx", &from, &to) == 2) sum += to - from;
  if (maps) fclose(maps);
  return sum;
}

static void test_close(int left) {
  struct hfr_arena a;
  CHECK(!hfr_arena_create(&a, 2, CHUNK, SLOTS, LEND) && !hfr_arena_join(&a, 0), "%s", hfr_last_error()->text);
  CHECK(mapped() == a.bytes);
  uint8_t *mine = hfr_arena_lending(&a, 0);
  mine[0] = mine[LEND - 1] = 7;
  a.left = left;
  hfr_arena_close(&a);
  CHECK(a.fd == -1 && a.bell_fd == -1 && !a.map);
  CHECK(mapped() == (left ? LEND : 0), "%zu bytes", mapped());
  if (!left) return;
  CHECK(mine[0] == 7 && mine[LEND - 1] == 7, "a device may still write there");
  munmap(mine, LEND);
}

/* An arena at rest has what it had, and this rank's lending area keeps its pages: they may be pinned. */
static void test_rest(void) {
  struct hfr_arena a;
  unsigned char present = 0;
  CHECK(!hfr_arena_create(&a, 2, CHUNK, SLOTS, LEND) && !hfr_arena_join(&a, 1), "%s", hfr_last_error()->text);
  hfr_arena_in(&a, 0, 0)[5] = 1;
  hfr_arena_res(&a, 1, 1)[CHUNK - 1] = 2;
  hfr_arena_lending(&a, 0)[0] = 3;
  hfr_arena_lending(&a, 1)[LEND - 1] = 4;
  hfr_arena_rest(&a);
  CHECK(!mincore(hfr_arena_lending(&a, 1) + LEND - 4096, 4096, &present) && (present & 1));
  CHECK(hfr_arena_in(&a, 0, 0)[5] == 1 && hfr_arena_res(&a, 1, 1)[CHUNK - 1] == 2);
  CHECK(hfr_arena_lending(&a, 0)[0] == 3 && hfr_arena_lending(&a, 1)[LEND - 1] == 4);
  hfr_arena_close(&a);
}

int main(void) {
  test_attach();
  test_close(0);
  test_close(1);
  test_rest();
  return check_done();
}
