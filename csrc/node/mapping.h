/*
 * Where a process maps an arena.
 *
 * Each rank maps it by itself, also where several ranks are threads of one process: then one place has several addresses, and
 * ThreadSanitizer, which goes by addresses, never finds that a load took what a store of another rank released, nor that one did
 * not. So in builds under ThreadSanitizer ranks of one process share a mapping, which goes with its last user.
 */
#ifndef HFR_NODE_MAPPING_H_
#define HFR_NODE_MAPPING_H_
#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_THREAD__)
#define HFR_ONE_MAPPING 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HFR_ONE_MAPPING 1
#endif
#endif
#ifndef HFR_ONE_MAPPING
#define HFR_ONE_MAPPING 0
#endif

/* Map all of a memory file, for reading and writing. NULL: errno says why not. */
uint8_t *hfr_node_map(int fd, size_t bytes);
/* One user less of a mapping; but the part from `from` to `to` stays mapped for as long as the process lives (NULL: none). */
void hfr_node_unmap(uint8_t *map, size_t bytes, uint8_t *from, uint8_t *to);
#endif
