/*
 * The owner of a connection's other end. A Unix socket tells it. Of a loopback TCP connection both ends are lines in the kernel's
 * table of connections, each with the user that made it: a user's processes find each other there, whatever directories they see.
 */
#include "owner.h"

#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define END_TEXT 40
union end {
  struct sockaddr any;
  struct sockaddr_in v4;
  struct sockaddr_in6 v6;
};

/* As /proc/net/tcp and tcp6 write it: words of the address in host order, port. */
static void end_text(const union end *end, char text[END_TEXT]) {
  if (end->any.sa_family == AF_INET) {
    snprintf(text, END_TEXT, "%08X:%04X", end->v4.sin_addr.s_addr, ntohs(end->v4.sin_port));
    return;
  }
  const uint32_t *word = end->v6.sin6_addr.s6_addr32;
  snprintf(text, END_TEXT, "%08X%08X%08X%08X:%04X", word[0], word[1], word[2], word[3], ntohs(end->v6.sin6_port));
}

/* The user of the socket whose own end is `local` and whose other end is `remote`. 0, or -1: it is not in the table. */
static int find_owner(const char *table, const char *local, const char *remote, unsigned *user) {
  char line[512], one[64], other[64];
  int found = -1;
  FILE *file = fopen(table, "re");
  while (file && found && fgets(line, sizeof line, file))
    if (sscanf(line, " %*s %63s %63s %*s %*s %*s %*s %u", one, other, user) == 3 && !strcmp(one, local) && !strcmp(other, remote))
      found = 0;
  if (file) fclose(file);
  return found;
}

static int unix_owner_is_me(int fd) {
  struct ucred peer;
  socklen_t bytes = sizeof peer;
  return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) && peer.uid == geteuid();
}

int hfr_owner_is_me(int fd) {
  union end mine, theirs;
  socklen_t bytes = sizeof mine;
  char local[END_TEXT], remote[END_TEXT];
  unsigned user;
  if (getsockname(fd, &mine.any, &bytes)) return 0;
  if (mine.any.sa_family == AF_UNIX) return unix_owner_is_me(fd);
  bytes = sizeof theirs;
  if (getpeername(fd, &theirs.any, &bytes)) return 0;
  if (mine.any.sa_family != AF_INET && mine.any.sa_family != AF_INET6) return 0;
  end_text(&mine, local);
  end_text(&theirs, remote);
  const char *table = mine.any.sa_family == AF_INET ? "/proc/net/tcp" : "/proc/net/tcp6";
  /* A table that changes while it is read may lose a line. */
  for (int look = 0; look < 3; look++)
    if (!find_owner(table, remote, local, &user)) return user == geteuid();
  return 0;
}
