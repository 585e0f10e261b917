/* Whose is the other end of a connection inside this machine? */
#ifndef HFR_BASE_OWNER_H_
#define HFR_BASE_OWNER_H_

/* 1: the other end of a connected Unix or loopback TCP socket belongs to a process of this process' user, as the kernel has it.
 * 0: to another user, or the kernel does not tell. */
int hfr_owner_is_me(int fd);
#endif
