/*
 * Writing what other cores read next.
 *
 * A plain store to a line that another core still holds has to take it away there first. Between cores with a common cache that
 * is cheap once the line has left theirs; between core complexes or sockets it takes ten times as long as the copy. A streaming
 * store goes to memory and asks nobody; then the readers fetch from memory. Which is better depends on where the ranks run, and
 * that changes: so both are timed now and then.
 */
#ifndef HFR_NODE_WRITER_H_
#define HFR_NODE_WRITER_H_
#include <stddef.h>
#include <stdint.h>

struct hfr_writer {
  uint32_t turn;
  int streams;    /* what is done now */
  double cost[2]; /* time a byte, smoothed, of plain and of streaming stores; 0: not known. In the clock's own unit */
};

/* memcpy to memory that other ranks read. Stores that follow are seen after it. One thread at a time. */
void hfr_writer_copy(struct hfr_writer *writer, void *dst, const void *src, size_t bytes);
/* A copy by streaming (or plain) stores has cost so much a byte: choose the way of the next copies. hfr_writer_copy calls it. */
void hfr_writer_learn(struct hfr_writer *writer, int streams, double cost);
#endif
