/* Mappings of arenas: one for each rank, or, under ThreadSanitizer, one for all ranks of the process. */
#include "mapping.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

static uint8_t *map_file(int fd, size_t bytes) {
  void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  return map == MAP_FAILED ? NULL : map;
}

#if HFR_ONE_MAPPING
static struct mapping {
  struct mapping *next;
  uint8_t *map;
  ino_t file; /* a file that is mapped keeps its number */
  int users;
} * mappings;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

uint8_t *hfr_node_map(int fd, size_t bytes) {
  struct stat st;
  if (fstat(fd, &st)) return NULL;
  pthread_mutex_lock(&lock);
  struct mapping *m = mappings;
  while (m && m->file != st.st_ino) m = m->next;
  if (!m && (m = calloc(1, sizeof *m))) {
    *m = (struct mapping){.next = mappings, .map = map_file(fd, bytes), .file = st.st_ino};
    if (m->map) {
      mappings = m;
    } else {
      free(m);
      m = NULL;
    }
  }
  if (m) m->users++;
  uint8_t *map = m ? m->map : NULL;
  pthread_mutex_unlock(&lock);
  return map;
}

void hfr_node_unmap(uint8_t *map, size_t bytes, uint8_t *from, uint8_t *to) {
  if (from < to) return; /* a part cannot stay while other ranks use the rest: all of it stays */
  pthread_mutex_lock(&lock);
  struct mapping **at = &mappings, *m;
  while ((*at)->map != map) at = &(*at)->next;
  m = *at;
  if (--m->users == 0) {
    *at = m->next;
    munmap(map, bytes);
    free(m);
  }
  pthread_mutex_unlock(&lock);
}
#else
static void unmap(uint8_t *from, uint8_t *to) {
  if (from < to) munmap(from, (size_t)(to - from));
}

uint8_t *hfr_node_map(int fd, size_t bytes) { return map_file(fd, bytes); }

void hfr_node_unmap(uint8_t *map, size_t bytes, uint8_t *from, uint8_t *to) {
  if (from >= to) from = to = map + bytes;
  unmap(map, from);
  unmap(to, map + bytes);
}
#endif
