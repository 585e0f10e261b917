/* The base layer and the host's facts: MAC, CRC32C, parameters, log, errors, addresses, sockets, interfaces. */
#include "check.h"
#include "base/crc32c.h"
#include "base/log.h"
#include "base/mac.h"
#include "base/param.h"
#include "base/socket.h"
#include "base/status.h"
#include "base/thread.h"
#include "topo/host.h"
#include "topo/nic.h"

#include <errno.h>
#include <fcntl.h>
#include <locale.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

/* The portable CRC as well, on machines whose hardware the library prefers. */
#define HFR_CRC32C_PORTABLE
#define hfr_crc32c portable_crc32c
#define hfr_crc32c_copy portable_crc32c_copy
#include "../../csrc/base/crc32c.c"
#undef hfr_crc32c
#undef hfr_crc32c_copy

/* ---- mac ---- */

static int from_hex(const char *hex, uint8_t *bytes) {
  int n = 0;
  for (; hex[2 * n]; n++) sscanf(hex + 2 * n, "%2hhx", &bytes[n]);
  return n;
}

/* Published vectors of SipHash-2-4-128: key 00..0f, message 00, 01, ... of the length given. */
static void test_mac(void) {
  static const struct {
    size_t bytes;
    const char *tag;
  } vectors[] = {
      {0, "a3817f04ba25a8e66df67214c7550293"},  {1, "da87c1d86b99af44347659119b22fc45"},
      {2, "8177228da4a45dc7fca38bdef60affe4"},  {3, "9c70b60c5267a94e5f33b6b02985ed51"},
      {4, "f88164c12d9c8faf7d0f6e7c7bcd5579"},  {5, "1368875980776f8854527a07690e9627"},
      {6, "14eeca338b208613485ea0308fd7a15e"},  {7, "a1f1ebbed8dbc153c0b84aa61ff08239"},
      {8, "3b62a9ba6258f5610f83e264f31497b4"},  {15, "5493e99933b0a8117e08ec0f97cfc3d9"},
      {16, "6ee2a4ca67b054bbfd3315bf85230577"}, {63, "5150d1772f50834a503e069a973fbd7c"},
  };
  uint8_t message[65], key[16], expected[16], tag[16];
  for (int i = 0; i < 65; i++) message[i] = (uint8_t)i;
  memcpy(key, message, 16);
  for (size_t v = 0; v < sizeof vectors / sizeof *vectors; v++) {
    from_hex(vectors[v].tag, expected);
    hfr_mac(key, message, vectors[v].bytes, tag);
    CHECK(!memcmp(tag, expected, 16), "length %zu", vectors[v].bytes);
    CHECK(hfr_mac_equal(tag, expected));
    memmove(message + 1, message, 64); /* unaligned */
    hfr_mac(key, message + 1, vectors[v].bytes, tag);
    CHECK(hfr_mac_equal(tag, expected), "length %zu, unaligned", vectors[v].bytes);
    memmove(message, message + 1, 64);
  }
  for (int bit = 0; bit < 128; bit++) {
    memcpy(tag, expected, 16);
    tag[bit / 8] ^= (uint8_t)(1 << bit % 8);
    CHECK(!hfr_mac_equal(tag, expected), "bit %d", bit);
  }
}

static void test_random(void) {
  uint8_t a[1000] = {0}, b[1000] = {0};
  int counts[2] = {0};
  hfr_random(a, sizeof a);
  hfr_random(b, sizeof b);
  CHECK(memcmp(a, b, sizeof a));
  for (size_t i = 0; i < sizeof a; i++) counts[a[i] & 1]++;
  CHECK(counts[0] > 300 && counts[1] > 300, "%d even, %d odd", counts[0], counts[1]);
  hfr_random(a, 0);
}

/* ---- crc32c ---- */

typedef uint32_t crc_of(uint32_t crc, const void *data, size_t bytes);
typedef uint32_t crc_copy_of(uint32_t crc, void *dst, const void *src, size_t bytes);

static uint32_t crc_bitwise(uint32_t crc, const uint8_t *p, size_t bytes) {
  crc = ~crc;
  while (bytes--) {
    crc ^= *p++;
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
  }
  return ~crc;
}

/* RFC 3720, B.4, and the catalogue's check value. */
static void test_crc_known(crc_of *crc) {
  uint8_t data[32];
  CHECK(crc(0, "123456789", 9) == 0xe3069283);
  CHECK(crc(0, "", 0) == 0);
  memset(data, 0, 32);
  CHECK(crc(0, data, 32) == 0x8a9136aa);
  memset(data, 0xff, 32);
  CHECK(crc(0, data, 32) == 0x62a8ab43);
  for (int i = 0; i < 32; i++) data[i] = (uint8_t)i;
  CHECK(crc(0, data, 32) == 0x46dd794e);
}

static void test_crc_lengths(crc_of *crc, crc_copy_of *copy, const uint8_t *data, uint8_t *out) {
  for (size_t bytes = 0; bytes <= 300; bytes++)
    for (size_t shift = 0; shift < 16; shift++) {
      uint32_t expected = crc_bitwise(0, data + shift, bytes);
      CHECK(crc(0, data + shift, bytes) == expected, "%zu bytes at %zu", bytes, shift);
      memset(out, 0xa5, bytes + 32);
      CHECK(copy(0, out + shift, data, bytes) == crc_bitwise(0, data, bytes), "copy of %zu bytes to %zu", bytes, shift);
      CHECK(!memcmp(out + shift, data, bytes) && out[shift + bytes] == 0xa5, "copy of %zu bytes to %zu", bytes, shift);
    }
}

/* Around the block sizes of the interleaved streams (384, 3072) and of the copy (6144). */
static void test_crc_blocks(crc_of *crc, crc_copy_of *copy, const uint8_t *data, uint8_t *out, size_t most) {
  static const size_t edges[] = {384, 768, 3072, 3456, 6144, 6528, 9216, 12288, 20000};
  for (size_t e = 0; e < sizeof edges / sizeof *edges; e++)
    for (size_t bytes = edges[e] - 9; bytes <= edges[e] + 9 && bytes <= most - 3; bytes++) {
      uint32_t expected = crc_bitwise(7, data + 3, bytes);
      CHECK(crc(7, data + 3, bytes) == expected, "%zu bytes", bytes);
      CHECK(copy(7, out + 1, data + 3, bytes) == expected && !memcmp(out + 1, data + 3, bytes), "copy of %zu bytes", bytes);
      CHECK(crc(crc(7, data + 3, bytes / 3), data + 3 + bytes / 3, bytes - bytes / 3) == expected, "chain of %zu bytes", bytes);
    }
}

static void test_crc(crc_of *crc, crc_copy_of *copy) {
  enum { MOST = 20016 };
  uint8_t *data = malloc(MOST), *out = malloc(MOST);
  hfr_random(data, MOST);
  test_crc_known(crc);
  test_crc_lengths(crc, copy, data, out);
  test_crc_blocks(crc, copy, data, out, MOST);
  free(data);
  free(out);
}

/* ---- parameters ---- */

static char scratch[64] = "/tmp/hfreduce-test-XXXXXX";

static const char *scratch_path(const char *name) {
  static char path[256];
  snprintf(path, sizeof path, "%s/%s", scratch, name);
  return path;
}

static void write_file(const char *name, const char *content) {
  FILE *file = fopen(scratch_path(name), "w");
  if (!CHECK(file != NULL)) exit(1);
  fputs(content, file);
  fclose(file);
}

/* What the log wrote since the last call; the file is emptied. */
static const char *read_log(void) {
  static char text[65536];
  int fd = open(scratch_path("log"), O_RDWR | O_CREAT, 0600);
  ssize_t got = read(fd, text, sizeof text - 1);
  text[got > 0 ? got : 0] = '\0';
  if (ftruncate(fd, 0)) text[0] = '\0';
  close(fd);
  return text;
}

static int64_t int_from(enum hfr_param id, const char *text) {
  setenv(hfr_param_name(id), text, 1);
  hfr_param_reload();
  int64_t value = hfr_param_int(id);
  unsetenv(hfr_param_name(id));
  return value;
}

static double real_from(enum hfr_param id, const char *text) {
  int_from(id, text);
  return hfr_param_real(id);
}

static void test_param_presets(void) {
  hfr_param_reload();
  CHECK(hfr_param_int(HFR_PARAM_RANK) == -1);
  CHECK(hfr_param_int(HFR_PARAM_CHUNK) == 131072);
  CHECK(hfr_param_real(HFR_PARAM_TIMEOUT) == 1800.0 && hfr_param_real(HFR_PARAM_JOIN_TIMEOUT) == 300.0);
  CHECK(!*hfr_param_text(HFR_PARAM_ADDR));
  for (int id = 0; id < HFR_PARAM_COUNT; id++) {
    CHECK(!strncmp(hfr_param_name((enum hfr_param)id), "HFREDUCE_", 9));
    CHECK(*hfr_param_help((enum hfr_param)id));
    if (id == HFR_PARAM_DEBUG_FILE) continue;
    CHECK(!hfr_param_is_set((enum hfr_param)id), "%s", hfr_param_name((enum hfr_param)id));
    CHECK(!strcmp(hfr_param_value((enum hfr_param)id), hfr_param_preset((enum hfr_param)id)), "%s",
          hfr_param_name((enum hfr_param)id));
  }
}

static void test_param_numbers(void) {
  CHECK(int_from(HFR_PARAM_CHUNK, "8192") == 8192);
  CHECK(int_from(HFR_PARAM_CHUNK, "64K") == 65536);
  CHECK(int_from(HFR_PARAM_CHUNK, "64kB") == 65536);
  CHECK(int_from(HFR_PARAM_CHUNK, "1MiB") == 1 << 20);
  CHECK(int_from(HFR_PARAM_TCP_BUFFER, "1G") == 1 << 30);
  CHECK(int_from(HFR_PARAM_CHUNK, "  2m ") == 2 << 20);
  CHECK(int_from(HFR_PARAM_SLOTS, "010") == 10, "not octal");
  CHECK(int_from(HFR_PARAM_RANK, "-1") == -1);
  CHECK(real_from(HFR_PARAM_TIMEOUT, "2.5") == 2.5);
  CHECK(real_from(HFR_PARAM_TIMEOUT, "1e2") == 100);
  CHECK(!*read_log(), "good values give no warning");
  CHECK(int_from(HFR_PARAM_CHUNK, "") == 131072, "an empty number counts as unset");
  CHECK(!*read_log());
}

static void test_param_bounds(void) {
  CHECK(int_from(HFR_PARAM_CHUNK, "1") == 4096);
  CHECK(strstr(read_log(), "HFREDUCE_CHUNK=1 (from the environment) is outside 4096..16777216: taking 4096") != NULL);
  CHECK(!strcmp(hfr_param_value(HFR_PARAM_CHUNK), "4096") && hfr_param_is_set(HFR_PARAM_CHUNK));
  CHECK(!*read_log(), "warned of once");
  CHECK(int_from(HFR_PARAM_CHUNK, "9999999999G") == 16777216);
  CHECK(int_from(HFR_PARAM_SLOTS, "99999999999999999999999") == 64);
  CHECK(int_from(HFR_PARAM_SLOTS, "-99999999999999999999999") == 0);
  CHECK(real_from(HFR_PARAM_TIMEOUT, "-3") == 0);
  CHECK(real_from(HFR_PARAM_TIMEOUT, "inf") == 1000000);
  CHECK(*read_log());
}

static void test_param_malformed(void) {
  static const char *const bad[] = {"x", "12x", "1KK", "K", "64Q", "0x10", "1.5", "--3", "1 2", "64K!"};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    CHECK(int_from(HFR_PARAM_CHUNK, bad[i]) == 131072, "\"%s\"", bad[i]);
    CHECK(!hfr_param_is_set(HFR_PARAM_CHUNK));
    CHECK(strstr(read_log(), "is not a size") != NULL, "\"%s\"", bad[i]);
  }
  CHECK(int_from(HFR_PARAM_SLOTS, "4K") == 0, "suffixes are for sizes");
  CHECK(real_from(HFR_PARAM_TIMEOUT, "nan") == 1800);
  CHECK(real_from(HFR_PARAM_TIMEOUT, "3s") == 1800);
  CHECK(strstr(read_log(), "HFREDUCE_TIMEOUT=3s (from the environment) is not a number: taking 1800") != NULL);
}

static void test_param_misspelt(void) {
  setenv("HFREDUCE_TIMEOT", "5", 1);
  setenv("HFREDUCE_TORCH_RECORD_FIL", "x", 1);
  setenv("HFREDUCE_SOMETHING_ELSE", "", 1);
  setenv("HFREDUCE_A_NAME_LONGER_THAN_ANY_PARAMETER_AND_THAN_THE_BUFFER_THAT_HOLDS_IT_HERE", "1", 1);
  setenv("HFREDUCE_TEST_LIMIT", "5", 1);
  setenv("HFREDUCE_TORCH_SHIM", "0", 1);
  setenv("HFREDUCE_CONF_FILE", "/dev/null", 1);
  hfr_param_reload();
  hfr_param_int(HFR_PARAM_CHUNK);
  const char *log = read_log();
  CHECK(strstr(log, "HFREDUCE_TIMEOT (in the environment) is no parameter and changes nothing: is HFREDUCE_TIMEOUT meant?"), "%s",
        log);
  CHECK(strstr(log, "is HFREDUCE_TORCH_RECORD_FILE meant?"), "%s", log);
  CHECK(strstr(log, "HFREDUCE_SOMETHING_ELSE (in the environment) is no parameter and changes nothing; `hfreduce info`"), "%s",
        log);
  CHECK(strstr(log, "HFREDUCE_A_NAME_LONGER_THAN_ANY"), "%s", log);
  CHECK(!strstr(log, "TEST_LIMIT") && !strstr(log, "TORCH_SHIM") && !strstr(log, "CONF_FILE"), "%s", log);
  hfr_param_int(HFR_PARAM_CHUNK);
  CHECK(!*read_log(), "named once");
  unsetenv("HFREDUCE_TIMEOT");
  unsetenv("HFREDUCE_TORCH_RECORD_FIL");
  unsetenv("HFREDUCE_SOMETHING_ELSE");
  unsetenv("HFREDUCE_A_NAME_LONGER_THAN_ANY_PARAMETER_AND_THAN_THE_BUFFER_THAT_HOLDS_IT_HERE");
  unsetenv("HFREDUCE_TEST_LIMIT");
  unsetenv("HFREDUCE_TORCH_SHIM");
  unsetenv("HFREDUCE_CONF_FILE");
  hfr_param_reload();
  CHECK(!*read_log());
}

static void test_param_text(void) {
  setenv("HFREDUCE_ADDR", " host:1 ", 1);
  setenv("HFREDUCE_SECRET", "c0ffee", 1);
  hfr_param_reload();
  const char *addr = hfr_param_text(HFR_PARAM_ADDR);
  CHECK(!strcmp(addr, "host:1") && hfr_param_is_set(HFR_PARAM_ADDR));
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_SECRET), "c0ffee"));
  CHECK(!strcmp(hfr_param_value(HFR_PARAM_SECRET), "(hidden)"), "not listed");
  unsetenv("HFREDUCE_ADDR");
  unsetenv("HFREDUCE_SECRET");
  hfr_param_reload();
  CHECK(!strcmp(addr, "host:1"), "texts outlive a reload");
  CHECK(!*hfr_param_text(HFR_PARAM_ADDR));
}

static void test_param_aliases(void) {
  setenv("NCCL_SOCKET_IFNAME", "=eth7", 1);
  setenv("NCCL_SOCKET_FAMILY", "AF_INET6", 1);
  setenv("NCCL_CHUNK", "8192", 1);
  hfr_param_reload();
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_SOCKET_IFNAME), "=eth7") && hfr_param_is_set(HFR_PARAM_SOCKET_IFNAME));
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_SOCKET_FAMILY), "AF_INET6"));
  CHECK(!hfr_param_is_set(HFR_PARAM_CHUNK), "only the listed ones have an alias");
  setenv("HFREDUCE_SOCKET_IFNAME", "ib", 1);
  hfr_param_reload();
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_SOCKET_IFNAME), "ib"), "ours wins");
  unsetenv("HFREDUCE_SOCKET_IFNAME");
  unsetenv("NCCL_SOCKET_IFNAME");
  unsetenv("NCCL_SOCKET_FAMILY");
  unsetenv("NCCL_CHUNK");
}

static void test_param_file(void) {
  write_file(
      "conf",
      "# comment\n\n HFREDUCE_SLOTS = 8 # eight\nNCCL_SOCKET_IFNAME=nccl0\nHFREDUCE_SOCKET_IFNAME=ours#0\r\nHFREDUCE_CHUNK=64K\n"
      "HFREDUCE_CHUNK=1M\nNCCL_IB_HCA=x\nHFREDUCE_TYPO=1\nno assignment\n=\n====\nHFREDUCE_TIMEOUT=abc\nHFREDUCE_ADDR=h:1");
  setenv("HFREDUCE_CONF_FILE", scratch_path("conf"), 1);
  hfr_param_reload();
  CHECK(hfr_param_int(HFR_PARAM_SLOTS) == 8 && hfr_param_is_set(HFR_PARAM_SLOTS));
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_SOCKET_IFNAME), "ours#0"), "\"%s\"", hfr_param_text(HFR_PARAM_SOCKET_IFNAME));
  CHECK(hfr_param_int(HFR_PARAM_CHUNK) == 65536, "the first line wins");
  CHECK(hfr_param_real(HFR_PARAM_TIMEOUT) == 1800);
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_ADDR), "h:1"), "no newline at the end");
  const char *log = read_log();
  CHECK(strstr(log, "unknown parameter HFREDUCE_TYPO") && !strstr(log, "NCCL_IB_HCA"), "%s", log);
  CHECK(strstr(log, "HFREDUCE_TIMEOUT=abc (from /tmp/") != NULL, "%s", log);
  setenv("NCCL_SOCKET_IFNAME", "env0", 1);
  CHECK(int_from(HFR_PARAM_SLOTS, "3") == 3, "the environment wins");
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_SOCKET_IFNAME), "env0"), "also under NCCL's name");
  unsetenv("NCCL_SOCKET_IFNAME");
  read_log();
}

/* NCCL's own file counts after ours, under all the names that are understood. */
static void test_param_nccl_file(void) {
  write_file("ours", "HFREDUCE_SLOTS=8\n");
  write_file("nccl.conf", "NCCL_SOCKET_IFNAME=nccl0\nHFREDUCE_SLOTS=6\nHFREDUCE_CHUNK=64K\nNCCL_HOSTID=box\nNCCL_ALGO=Ring\n");
  setenv("HFREDUCE_CONF_FILE", scratch_path("ours"), 1);
  setenv("NCCL_CONF_FILE", scratch_path("nccl.conf"), 1);
  hfr_param_reload();
  CHECK(hfr_param_int(HFR_PARAM_SLOTS) == 8, "ours wins");
  CHECK(hfr_param_int(HFR_PARAM_CHUNK) == 65536);
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_SOCKET_IFNAME), "nccl0"), "%s", hfr_param_text(HFR_PARAM_SOCKET_IFNAME));
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_HOSTID), "box"), "%s", hfr_param_text(HFR_PARAM_HOSTID));
  CHECK(!strstr(read_log(), "NCCL_ALGO"), "NCCL's other parameters may stand there");
  unsetenv("NCCL_CONF_FILE");
  unsetenv("HFREDUCE_CONF_FILE");
  unlink(scratch_path("ours"));
  unlink(scratch_path("nccl.conf"));
}

/* NCCL_NET and NCCL_IB_DISABLE say which transport. */
static void test_param_nccl_net(void) {
  static const struct {
    const char *net, *disable, *ours, *expected;
  } cases[] = {{"IB", NULL, NULL, "verbs"}, {"Socket", NULL, NULL, "tcp"},     {NULL, "1", NULL, "tcp"},  {NULL, "0", NULL, ""},
               {"IB", "1", NULL, "tcp"},    {"Socket", "1", "verbs", "verbs"}, {"plugin", NULL, NULL, ""}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    if (cases[i].net) setenv("NCCL_NET", cases[i].net, 1);
    if (cases[i].disable) setenv("NCCL_IB_DISABLE", cases[i].disable, 1);
    if (cases[i].ours) setenv("HFREDUCE_TRANSPORT", cases[i].ours, 1);
    hfr_param_reload();
    CHECK(!strcmp(hfr_param_text(HFR_PARAM_TRANSPORT), cases[i].expected), "case %zu: \"%s\"", i,
          hfr_param_text(HFR_PARAM_TRANSPORT));
    unsetenv("NCCL_NET");
    unsetenv("NCCL_IB_DISABLE");
    unsetenv("HFREDUCE_TRANSPORT");
  }
}

/* No file, a directory, a FIFO (must not block), one that is too long; then the one in the home directory. */
static void test_param_odd_files(void) {
  setenv("HFREDUCE_CONF_FILE", scratch_path("absent"), 1);
  hfr_param_reload();
  CHECK(hfr_param_int(HFR_PARAM_SLOTS) == 0 && strstr(read_log(), "cannot be read"));
  setenv("HFREDUCE_CONF_FILE", scratch, 1);
  hfr_param_reload();
  CHECK(hfr_param_int(HFR_PARAM_SLOTS) == 0 && strstr(read_log(), "cannot be read"));
  CHECK(!mkfifo(scratch_path("fifo"), 0600));
  setenv("HFREDUCE_CONF_FILE", scratch_path("fifo"), 1);
  hfr_param_reload();
  CHECK(hfr_param_int(HFR_PARAM_SLOTS) == 0 && strstr(read_log(), "cannot be read"));
  unlink(scratch_path("fifo"));
  char *big = malloc(70001);
  setenv("HFREDUCE_CONF_FILE", scratch_path("conf"), 1);
  static const char slots[] = "HFREDUCE_SLOTS=5";
  for (size_t bytes = 65535; bytes <= 65537; bytes++) { /* the parameter stands at the end: all of the file is read, or nothing */
    memset(big, '\n', bytes);
    strcpy(big + bytes - strlen(slots), slots);
    write_file("conf", big);
    hfr_param_reload();
    int taken = hfr_param_int(HFR_PARAM_SLOTS) == 5, refused = strstr(read_log(), "longer than 64 KiB") != NULL;
    CHECK(taken == (bytes <= 65536) && refused == !taken, "%zu bytes: taken %d, refused %d", bytes, taken, refused);
  }
  memset(big, 'x', 60000);
  memcpy(big, "HFREDUCE_ADDR=", 14);
  strcpy(big + 60000, "\nHFREDUCE_SLOTS=5\n");
  write_file("conf", big);
  hfr_param_reload();
  CHECK(hfr_param_int(HFR_PARAM_SLOTS) == 5 && !*hfr_param_text(HFR_PARAM_ADDR) && strstr(read_log(), "longer than 4095 bytes"));
  free(big);
  unlink(scratch_path("conf"));
  unsetenv("HFREDUCE_CONF_FILE");
  write_file(".hfreduce.conf", "HFREDUCE_SLOTS=6\n");
  hfr_param_reload();
  CHECK(hfr_param_int(HFR_PARAM_SLOTS) == 6, "HOME is %s", getenv("HOME"));
  unlink(scratch_path(".hfreduce.conf"));
  hfr_param_reload();
}

static void *read_params(void *unused) {
  (void)unused;
  for (int i = 0; i < 1000; i++)
    if (hfr_param_int(HFR_PARAM_SLOTS) != 7 || hfr_log_level() != HFR_LOG_INFO) return "wrong";
  return NULL;
}

/* First use by several threads at once, in a fresh process (this one's first use is over). */
static void first_use_by_threads(void) {
  pthread_t threads[8];
  setenv("HFREDUCE_SLOTS", "7", 1);
  setenv("NCCL_DEBUG", "info", 1);
  for (int i = 0; i < 8; i++) pthread_create(&threads[i], NULL, read_params, NULL);
  void *wrong = NULL, *result;
  for (int i = 0; i < 8; i++) {
    pthread_join(threads[i], &result);
    if (result) wrong = result;
  }
  exit(wrong ? 1 : 0);
}

static int exit_status_of(void (*body)(void)) {
  int status = -1;
  fflush(NULL);
  pid_t pid = fork();
  if (!pid) {
    body();
    _exit(0);
  }
  waitpid(pid, &status, 0);
  return status;
}

/* ---- log and errors ---- */

static void test_log(void) {
  static const struct {
    const char *text;
    enum hfr_log_level level;
  } levels[] = {{"NONE", HFR_LOG_NONE}, {"VERSION", HFR_LOG_WARN}, {"warn", HFR_LOG_WARN},
                {"INFO", HFR_LOG_INFO}, {"Trace", HFR_LOG_TRACE},  {"?", HFR_LOG_WARN}};
  char expected[256], host[64];
  for (size_t i = 0; i < sizeof levels / sizeof *levels; i++) {
    setenv("NCCL_DEBUG", levels[i].text, 1);
    hfr_param_reload();
    CHECK(hfr_log_level() == levels[i].level, "%s", levels[i].text);
    HFR_WARN("w");
    HFR_INFO("i");
    HFR_TRACE("t");
    int lines = 0;
    for (const char *p = read_log(); (p = strchr(p, '\n')); p++) lines++;
    CHECK(lines == (int)levels[i].level, "%s: %d lines", levels[i].text, lines);
  }
  hfr_host_name(host);
  host[strcspn(host, ".")] = '\0';
  errno = ENOENT;
  HFR_WARN("forged\n\x1b[31mline %m\x7f");
  CHECK(errno == ENOENT);
  snprintf(expected, sizeof expected, "hfreduce [%s:%d:-] WARN forged ?[31mline %s?\n", host, (int)getpid(), strerror(ENOENT));
  const char *line = read_log();
  CHECK(!strcmp(line, expected), "%s", line);
  hfr_log_set_rank(12);
  HFR_WARN("%5000d", 1);
  line = read_log();
  CHECK(strstr(line, ":12] WARN ") && strlen(line) < 2048 && line[strlen(line) - 1] == '\n', "a long line is cut");
  hfr_log_set_rank(-1);
  unsetenv("NCCL_DEBUG");
  hfr_param_reload();
}

/* A forked child opens its own file, named after it. */
static void log_from_child(void) { HFR_WARN("from a child"); }

static void test_log_name(void) {
  char path[256], host[64], name[128];
  struct stat status;
  setenv("HFREDUCE_DEBUG_FILE", scratch_path("log.%h.%p"), 1);
  hfr_param_reload();
  pid_t pid = fork();
  if (!pid) {
    log_from_child();
    _exit(0);
  }
  waitpid(pid, NULL, 0);
  hfr_host_name(host);
  host[strcspn(host, ".")] = '\0';
  snprintf(name, sizeof name, "log.%s.%d", host, (int)pid);
  snprintf(path, sizeof path, "%s", scratch_path(name));
  CHECK(!stat(path, &status) && status.st_size > 0, "%s", path);
  unlink(path);
  setenv("HFREDUCE_DEBUG_FILE", scratch_path("log"), 1);
  hfr_param_reload();
}

static void *other_threads_error(void *unused) {
  (void)unused;
  return hfr_last_error()->code ? "not empty" : NULL;
}

static hfreduceResult_t fails(void) { return hfr_fail(hfreduceTimeout, "waited %d s", 30); }

static hfreduceResult_t tries(void) {
  HFR_TRY(hfreduceSuccess);
  HFR_TRY(fails());
  return hfreduceSuccess;
}

static void test_status(void) {
  pthread_t thread;
  void *result;
  hfr_error_clear(hfr_last_error());
  CHECK(hfr_last_error()->code == 0 && hfr_last_error()->rank == -1 && hfr_last_error()->seq == -1 && !*hfr_last_error()->text);
  errno = EINTR;
  CHECK(tries() == hfreduceTimeout && errno == EINTR);
  CHECK(hfr_last_error()->code == hfreduceTimeout && !strcmp(hfr_last_error()->text, "waited 30 s"));
  hfr_last_error()->peer = 3;
  CHECK(hfr_fail(hfreduceRemoteError, "outer: %s", hfr_last_error()->text) == hfreduceRemoteError);
  CHECK(!strcmp(hfr_last_error()->text, "outer: waited 30 s") && hfr_last_error()->peer == -1);
  hfr_fail(hfreduceInternalError, "%2000d", 1);
  CHECK(strlen(hfr_last_error()->text) == sizeof hfr_last_error()->text - 1);
  pthread_create(&thread, NULL, other_threads_error, NULL);
  pthread_join(thread, &result);
  CHECK(!result, "%s", (char *)result);
}

/* ---- addresses ---- */

static void check_address(const char *text, int family, int port, int loopback, const char *formatted) {
  struct hfr_addr addr;
  char out[HFR_ADDR_TEXT];
  if (!CHECK(hfr_addr_parse(text, &addr) == hfreduceSuccess, "%s: %s", text, hfr_last_error()->text)) return;
  CHECK(addr.family == family && addr.port == port, "%s: family %d port %d", text, addr.family, addr.port);
  CHECK(hfr_addr_is_loopback(&addr) == loopback, "%s", text);
  if (formatted) CHECK(!strcmp(hfr_addr_text(&addr, out), formatted), "%s became %s", text, out);
}

static void test_addresses(void) {
  char out[HFR_ADDR_TEXT];
  struct hfr_addr none = {0}, mapped = {.family = 6, .ip = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}};
  CHECK(sizeof(struct hfr_addr) == 20);
  check_address("1.2.3.4:5", 4, 5, 0, "1.2.3.4:5");
  check_address("127.0.0.1:65535", 4, 65535, 1, "127.0.0.1:65535");
  check_address("127.9.9.9:0", 4, 0, 1, "127.9.9.9:0");
  check_address("[::1]:80", 6, 80, 1, "[::1]:80");
  check_address("[2001:db8::7]:29500", 6, 29500, 0, "[2001:db8::7]:29500");
  check_address("[::ffff:127.0.0.1]:7", 4, 7, 1, "127.0.0.1:7");
  check_address("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe]:65535", 6, 65535, 0,
                "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe]:65535");
  check_address("localhost:1234", 4, 1234, 1, NULL);
  CHECK(hfr_addr_is_loopback(&mapped) && !hfr_addr_is_loopback(&none));
  CHECK(!strcmp(hfr_addr_text(&none, out), "(no address)"));
}

static void test_bad_addresses(void) {
  static const char *const bad[] = {"",
                                    ":",
                                    ":5",
                                    "host",
                                    "1.2.3.4",
                                    "1.2.3.4:",
                                    "1.2.3.4:65536",
                                    "1.2.3.4:-1",
                                    "1.2.3.4: 5",
                                    "1.2.3.4:+5",
                                    "1.2.3.4:5x",
                                    "::1:5",
                                    "[::1]",
                                    "[::1]5",
                                    "[::1:5",
                                    "[]:5",
                                    "[1.2.3.4]:5",
                                    "[fe80::1%lo]:5",
                                    "1.2.3.4:99999999999999999999",
                                    "no.such.host.invalid:5"};
  char giant[2000];
  struct hfr_addr addr = {.family = 99};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    CHECK(hfr_addr_parse(bad[i], &addr) == hfreduceInvalidArgument, "\"%s\"", bad[i]);
    CHECK(strlen(hfr_last_error()->text) > 10);
  }
  memset(giant, 'a', sizeof giant);
  strcpy(giant + sizeof giant - 3, ":5");
  CHECK(hfr_addr_parse(giant, &addr) == hfreduceInvalidArgument);
  memset(giant, ':', sizeof giant - 1);
  CHECK(hfr_addr_parse(giant, &addr) == hfreduceInvalidArgument);
  for (size_t bytes = 255; bytes <= 256; bytes++) { /* the longest host name there may be, and one byte more */
    memset(giant, 'a', bytes);
    strcpy(giant + bytes, ":5");
    CHECK(hfr_addr_parse(giant, &addr) == hfreduceInvalidArgument);
    CHECK(!strstr(hfr_last_error()->text, "longer than 255") == (bytes == 255), "%s", hfr_last_error()->text);
  }
  CHECK(addr.family == 99, "set only on success");
}

/* ---- sockets ---- */

static int wait_for(int fd, short events) {
  struct pollfd p = {.fd = fd, .events = events};
  return poll(&p, 1, 5000) == 1;
}

static int has_flags(int fd) { return (fcntl(fd, F_GETFD) & FD_CLOEXEC) && (fcntl(fd, F_GETFL) & O_NONBLOCK); }

static void test_tcp(const char *text) {
  struct hfr_addr addr, taken;
  int listener, client, again, rc;
  CHECK(hfr_addr_parse(text, &addr) == hfreduceSuccess);
  rc = hfr_socket_listen(&addr, 4, &listener);
  if (rc != hfreduceSuccess && addr.family == 6) { /* a machine without IPv6 */
    printf("skipped: %s\n", hfr_last_error()->text);
    return;
  }
  if (!CHECK(rc == hfreduceSuccess && addr.port, "%s", hfr_last_error()->text)) return;
  CHECK(has_flags(listener));
  taken = addr;
  CHECK(hfr_socket_listen(&taken, 4, &again) == hfreduceSystemError && errno == EADDRINUSE);
  CHECK(strstr(hfr_last_error()->text, "another process has the port") != NULL, "%s", hfr_last_error()->text);
  CHECK(hfr_socket_connect(&addr, &client) == hfreduceSuccess && has_flags(client));
  CHECK(wait_for(client, POLLOUT) && hfr_socket_error(client) == 0 && wait_for(listener, POLLIN));
  hfr_socket_tune(client);
  close(client);
  close(listener);
  rc = hfr_socket_connect(&addr, &client); /* nobody listens any more */
  CHECK(rc == hfreduceRemoteError ||
            (rc == hfreduceSuccess && wait_for(client, POLLOUT) && hfr_socket_error(client) == ECONNREFUSED),
        "%d", rc);
  if (rc == hfreduceSuccess) close(client);
  CHECK(hfr_socket_error(-1) == EBADF);
}

static void test_tcp_refusals(void) {
  struct hfr_addr none = {0}, foreign = {.family = 4, .ip = {192, 0, 2, 1}}; /* TEST-NET-1: nobody's */
  int fd;
  CHECK(hfr_socket_listen(&none, 1, &fd) == hfreduceInternalError && hfr_socket_connect(&none, &fd) == hfreduceInternalError);
  CHECK(hfr_socket_listen(&foreign, 1, &fd) == hfreduceSystemError);
}

static int count_fds(void) {
  int count = 0;
  for (int fd = 0; fd < 1024; fd++) count += fcntl(fd, F_GETFD) >= 0;
  return count;
}

/* A message with n copies of a descriptor, as no honest peer sends it. */
static void send_fds(int sock, int fd, int n) {
  char byte = 0;
  union {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(64 * sizeof(int))];
  } control = {.bytes = {0}};
  struct iovec data = {&byte, 1};
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
  if (n) {
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE((size_t)n * sizeof(int));
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN((size_t)n * sizeof(int));
    for (int i = 0; i < n; i++) memcpy(CMSG_DATA(header) + (size_t)i * sizeof(int), &fd, sizeof fd);
  }
  CHECK(sendmsg(sock, &message, 0) == 1);
}

static void test_unix_names(void) {
  char name[200];
  int fd, listener, second;
  snprintf(name, sizeof name, "hfreduce-test-%d", (int)getpid());
  CHECK(hfr_unix_connect(name, &fd) == hfreduceSystemError && errno == ECONNREFUSED);
  CHECK(hfr_unix_listen(name, 1, &listener) == hfreduceSuccess && has_flags(listener));
  CHECK(hfr_unix_listen(name, 1, &second) == hfreduceSystemError && errno == EADDRINUSE);
  close(listener);
  CHECK(hfr_unix_connect(name, &fd) == hfreduceSystemError, "the name goes with its socket");
  memset(name, 'n', sizeof name);
  name[108] = '\0';
  CHECK(hfr_unix_listen(name, 1, &fd) == hfreduceInternalError && hfr_unix_listen("", 1, &fd) == hfreduceInternalError);
  name[107] = '\0';
  if (CHECK(hfr_unix_listen(name, 1, &listener) == hfreduceSuccess)) close(listener);
}

static void test_fd_passing(void) {
  char name[64], text[8] = "";
  int listener, client, server, memory, received = -1, before = count_fds();
  snprintf(name, sizeof name, "hfreduce-test-fd-%d", (int)getpid());
  CHECK(hfr_unix_listen(name, 4, &listener) == hfreduceSuccess);
  CHECK(hfr_unix_connect(name, &client) == hfreduceSuccess && has_flags(client));
  CHECK(wait_for(listener, POLLIN));
  server = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
  CHECK(hfr_unix_recv_fd(server, &received) == -EAGAIN);
  memory = memfd_create("test", MFD_CLOEXEC);
  CHECK(write(memory, "shared", 6) == 6);
  CHECK(hfr_unix_send_fd(client, memory) == 0 && hfr_unix_recv_fd(server, &received) == 0);
  CHECK(received != memory && pread(received, text, 6, 0) == 6 && !strcmp(text, "shared"));
  CHECK(fcntl(received, F_GETFD) & FD_CLOEXEC);
  close(received);
  received = -1;
  static const int wrong[] = {0, 2, 3, 8, 9, 40};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    send_fds(client, memory, wrong[i]);
    CHECK(hfr_unix_recv_fd(server, &received) == -EBADMSG && received == -1, "%d descriptors", wrong[i]);
    CHECK(count_fds() == before + 4, "%d descriptors: %d open, %d expected", wrong[i], count_fds(), before + 4);
  }
  int rc = 0, sent = 0;
  while (sent < 100000 && !(rc = hfr_unix_send_fd(client, memory))) sent++;
  CHECK(rc == -EAGAIN || rc == -ETOOMANYREFS, "a full socket says so: %d after %d", rc, sent);
  close(client);
  for (int i = 0; i < sent; i++) {
    if (!CHECK(hfr_unix_recv_fd(server, &received) == 0)) break;
    close(received);
  }
  CHECK(hfr_unix_recv_fd(server, &received) == -ECONNRESET, "the end of the stream");
  CHECK(hfr_unix_send_fd(server, memory) == -EPIPE, "no signal");
  CHECK(hfr_unix_send_fd(-1, memory) == -EBADF && hfr_unix_recv_fd(-1, &received) == -EBADF);
  close(server);
  close(listener);
  close(memory);
  CHECK(count_fds() == before);
}

/* ---- host and interfaces ---- */

static void test_host(void) {
  uint8_t first[16], second[16], given[16], machine[16];
  char name[64];
  hfr_host_name(name);
  CHECK(*name && strlen(name) < 64);
  hfr_host_id(first);
  hfr_host_id(second);
  CHECK(hfr_mac_equal(first, second));
  hfr_machine_id(machine);
  CHECK(!hfr_mac_equal(first, machine), "a machine may hold several nodes");
  setenv("HFREDUCE_HOSTID", "node-a", 1);
  hfr_param_reload();
  hfr_machine_id(second);
  CHECK(hfr_mac_equal(machine, second), "nodes that are pretended share their machine's cores");
  hfr_host_id(given);
  CHECK(!hfr_mac_equal(first, given));
  setenv("HFREDUCE_HOSTID", "node-b", 1);
  hfr_param_reload();
  hfr_host_id(second);
  CHECK(!hfr_mac_equal(second, given));
  unsetenv("HFREDUCE_HOSTID");
  hfr_param_reload();
  CHECK(hfr_ncpus() >= 1);
}

static void test_nic_rules(void) {
  static const struct {
    const char *rule, *name;
    int match;
  } cases[] = {
      {"", "eth0", 1},          {"", "lo", 0},        {"", "docker0", 0},        {"", "virbr0", 0},
      {"", "local0", 1},        {"eth", "eth0", 1},   {"eth", "ib0", 0},         {"eth,ib", "ib1", 1},
      {"eth,ib", "ens3", 0},    {"eth0", "eth01", 1}, {"=eth0", "eth0", 1},      {"=eth0", "eth01", 0},
      {"=eth0,ib0", "ib0", 1},  {"=eth", "eth0", 0},  {"^docker", "docker0", 0}, {"^docker", "eth0", 1},
      {"^docker,lo", "lo", 0},  {"^docker", "lo", 1}, {"^=eth0", "eth0", 0},     {"^=eth0", "eth01", 1},
      {"^=eth0,ib0", "ib0", 0}, {"lo", "lo", 1},      {"eth,,ib", "ens0", 0},    {",", "eth0", 0},
      {"eth,", "eth0", 1},      {"^", "eth0", 1},     {"=", "eth0", 0},          {"longer-than-it", "l", 0},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    CHECK(hfr_nic_match(cases[i].rule, cases[i].name) == cases[i].match, "rule \"%s\" on %s", cases[i].rule, cases[i].name);
}

static void test_nic_choice(void) {
  struct hfr_nic nics[64];
  struct hfr_addr addr;
  char name[32];
  int count = hfr_nic_list(nics, 64), admitted = 0;
  CHECK(count >= 0 && hfr_nic_list(nics, 0) == 0);
  for (int i = 0; i < count; i++) {
    CHECK(nics[i].up && *nics[i].name && (nics[i].addr.family == 4 || nics[i].addr.family == 6) && nics[i].addr.port == 0);
    admitted += !nics[i].loopback && hfr_nic_match("", nics[i].name);
  }
  setenv("HFREDUCE_SOCKET_IFNAME", "=no-such-nic", 1);
  hfr_param_reload();
  CHECK(hfr_nic_choose(&addr, name) == hfreduceInvalidUsage);
  CHECK(strstr(hfr_last_error()->text, "=no-such-nic") && (!count || strstr(hfr_last_error()->text, nics[0].name)), "%s",
        hfr_last_error()->text);
  unsetenv("HFREDUCE_SOCKET_IFNAME");
  hfr_param_reload();
  if (!count) return;
  CHECK(hfr_nic_choose(&addr, name) == hfreduceSuccess && (!admitted || !hfr_addr_is_loopback(&addr)), "%s", name);
  setenv("HFREDUCE_SOCKET_IFNAME", "lo", 1);
  hfr_param_reload();
  if (hfr_nic_choose(&addr, name) == hfreduceSuccess) CHECK(!strncmp(name, "lo", 2));
  unsetenv("HFREDUCE_SOCKET_IFNAME");
  hfr_param_reload();
}

/* In a network namespace of its own, as far as this user may make one. */
static void test_nic_down(void) {
  struct hfr_nic nics[4];
  struct ifreq lo = {.ifr_name = "lo"};
  struct sockaddr_in *addr = (struct sockaddr_in *)&lo.ifr_addr;
  int fd;
  long before = check_failed;
  if (unshare(CLONE_NEWNET) || (fd = socket(AF_INET, SOCK_DGRAM, 0)) < 0) return;
  *addr = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x0a090807)};
  if (ioctl(fd, SIOCSIFADDR, &lo)) return;
  lo.ifr_flags = 0;
  CHECK(!ioctl(fd, SIOCSIFFLAGS, &lo));
  CHECK(hfr_nic_list(nics, 4) == 0, "an interface that is down counts");
  lo.ifr_flags = IFF_UP;
  CHECK(!ioctl(fd, SIOCSIFFLAGS, &lo));
  CHECK(hfr_nic_list(nics, 4) > 0, "one that is up does not");
  if (check_failed > before) _exit(1);
}

/* Nothing of the caller's environment counts; warnings go to a file that the tests read. */
static void isolate(void) {
  if (!mkdtemp(scratch)) exit(1);
  clearenv();
  setenv("HOME", scratch, 1);
  setenv("HFREDUCE_DEBUG_FILE", scratch_path("log"), 1);
}

static void run_all(void) {
  test_mac();
  test_random();
  test_crc(hfr_crc32c, hfr_crc32c_copy);
  test_crc(portable_crc32c, portable_crc32c_copy);
  test_param_presets();
  test_param_numbers();
  test_param_bounds();
  test_param_malformed();
  test_param_misspelt();
  test_param_text();
  test_param_aliases();
  test_param_file();
  test_param_nccl_file();
  test_param_nccl_net();
  test_param_odd_files();
  test_log();
  test_log_name();
  test_status();
  test_addresses();
  test_bad_addresses();
  test_tcp("127.0.0.1:0");
  test_tcp("[::1]:0");
  test_tcp_refusals();
  test_unix_names();
  test_fd_passing();
  test_host();
  test_nic_rules();
  test_nic_choice();
  CHECK(exit_status_of(test_nic_down) == 0);
}

int main(void) {
  isolate();
  CHECK(exit_status_of(first_use_by_threads) == 0);
  run_all();
  unlink(scratch_path("log"));
  CHECK(!rmdir(scratch), "%s is left behind", scratch);
  return check_done();
}
