/* Unique ids made from an address: who gets the same name, and who must not. */
#include "check.h"

#include "comm/comm.h"

#include <string.h>

#define SECRET "00112233445566778899aabbccddeeff"

static struct hfr_uid made(const char *address, const char *secret, uint64_t tag) {
  hfreduceUniqueId id;
  struct hfr_uid uid = {0};
  if (CHECK(!hfreduceUniqueIdFromAddress(&id, address, secret, tag), "%s: %s", address, hfreduceGetLastError(NULL)))
    memcpy(&uid, id.internal, sizeof uid);
  return uid;
}

int main(void) {
  struct hfr_uid one = made("127.0.0.1:20001", SECRET, 7), again = made("127.0.0.1:20001", SECRET, 7);
  CHECK(one.comm_id == again.comm_id && !memcmp(one.secret, again.secret, 16)); /* ranks of one job */
  CHECK(made("10.1.2.3:20001", SECRET, 7).comm_id == one.comm_id);              /* which see rank 0 under another address */
  CHECK(made("127.0.0.1:20001", SECRET, 8).comm_id != one.comm_id);             /* its next communicator */
  CHECK(made("127.0.0.1:20002", SECRET, 7).comm_id != one.comm_id); /* another job on the machine, whatever its secret */
  CHECK(made("127.0.0.1:20001", NULL, 7).comm_id != made("127.0.0.1:20002", NULL, 7).comm_id);
  struct hfr_uid other = made("127.0.0.1:20001", "ff112233445566778899aabbccddeeff", 7);
  CHECK(other.comm_id != one.comm_id && memcmp(other.secret, one.secret, 16));
  return check_done();
}
