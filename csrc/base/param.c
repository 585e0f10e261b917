/*
 * The parameters' values: from the environment, else from configuration files, else their presets.
 *
 * Sources, first hit wins: the environment; $HFREDUCE_CONF_FILE if set, else ~/.hfreduce.conf; $NCCL_CONF_FILE if set, else
 * ~/.nccl.conf; /etc/hfreduce.conf; /etc/nccl.conf. Within one source our name beats NCCL's. Files hold NAME=value lines; '#' at
 * the start of a word begins a comment.
 */
#include "param.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "log.h"

/* Parameters whose NCCL_ spelling is understood too. */
/* clang-format off */
#define HFR_PARAM_NCCL_ALIASES(X)                                                                                        \
  X(SOCKET_IFNAME) X(SOCKET_FAMILY) X(DEBUG) X(DEBUG_FILE) X(IB_HCA) X(IB_GID_INDEX) X(IB_SL) X(IB_TC) X(IB_TIMEOUT)     \
  X(IB_RETRY_CNT) X(IB_QPS_PER_CONNECTION) X(IB_PCI_RELAXED_ORDERING) X(IB_PKEY) X(HOSTID)
/* clang-format on */

#define PREFIX "HFREDUCE_"
#define FILE_MAX_BYTES 65536
#define WARNING_BYTES 512

enum kind { KIND_INT, KIND_SIZE, KIND_REAL, KIND_TEXT };

struct spec {
  const char *name, *preset, *help;
  enum kind kind;
  int64_t min, max;
};

static const struct spec specs[HFR_PARAM_COUNT] = {
#define SPEC(id, name, kind, preset, min, max, help) {name, preset, help, KIND_##kind, min, max},
    HFR_PARAMS(SPEC)
#undef SPEC
};

static const char *const nccl_names[HFR_PARAM_COUNT] = {
#define ALIAS(id) [HFR_PARAM_##id] = "NCCL_" #id,
    HFR_PARAM_NCCL_ALIASES(ALIAS)
#undef ALIAS
};

struct value {
  const char *text;
  int64_t number;
  double real;
  int is_set;
};

static struct value values[HFR_PARAM_COUNT];
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* ---- texts that live as long as the process ---- */

struct interned {
  struct interned *next;
  char text[];
};
static struct interned *pool;

/* Equal texts share one address (log.c relies on it), so that reloading does not grow the pool. Out of memory: "". */
static const char *intern(const char *text) {
  for (struct interned *p = pool; p; p = p->next)
    if (!strcmp(p->text, text)) return p->text;
  size_t bytes = strlen(text) + 1;
  struct interned *added = malloc(sizeof *added + bytes);
  if (!added) return "";
  memcpy(added->text, text, bytes);
  added->next = pool;
  pool = added;
  return added->text;
}

/* ---- warnings: kept while loading, because the log itself asks for parameters ---- */

#define WARNINGS_MAX 32
static char warnings[WARNINGS_MAX][WARNING_BYTES];
static int nwarnings;
static atomic_int warnings_pending;

static void warn_later(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void warn_later(const char *format, ...) {
  if (nwarnings == WARNINGS_MAX) return;
  va_list args;
  va_start(args, format);
  vsnprintf(warnings[nwarnings++], WARNING_BYTES, format, args);
  va_end(args);
  atomic_store(&warnings_pending, 1);
}

static void emit_warnings(void) {
  for (int i = 0; i < nwarnings; i++) HFR_WARN("%s", warnings[i]);
}

/* ---- values ---- */

/* The text without leading and trailing white space, copied to `out`; 0 when it does not fit. */
static int trim(const char *text, char *out, size_t size) {
  while (isspace((unsigned char)*text)) text++;
  size_t bytes = strlen(text);
  while (bytes && isspace((unsigned char)text[bytes - 1])) bytes--;
  if (bytes >= size) return 0;
  memcpy(out, text, bytes);
  out[bytes] = '\0';
  return 1;
}

/* Independent of the program's locale, which may want a decimal comma. */
static double parse_c_double(const char *text, char **end) {
  locale_t c = newlocale(LC_ALL_MASK, "C", (locale_t)0);
  double real = c ? strtod_l(text, end, c) : strtod(text, end);
  if (c) freelocale(c);
  return real;
}

/* Factor of a size's suffix ("K", "kb", "MiB", ...); 0 when it is none. */
static int64_t suffix_factor(const char *suffix) {
  static const char letters[] = "KMG";
  if (!*suffix) return 1;
  const char *letter = strchr(letters, toupper((unsigned char)*suffix));
  if (!letter) return 0;
  suffix++;
  if (*suffix == 'i') suffix++;
  if (toupper((unsigned char)*suffix) == 'B') suffix++;
  return *suffix ? 0 : (int64_t)1 << (10 * (letter - letters + 1));
}

/* An integer with an optional suffix; what overflows becomes the extreme, to be clamped. 0 when malformed. */
static int parse_integer(const char *text, enum kind kind, int64_t *number) {
  char *end;
  int64_t n = strtoll(text, &end, 10);
  if (end == text) return 0;
  int64_t factor = kind == KIND_SIZE ? suffix_factor(end) : !*end;
  if (!factor) return 0;
  if (__builtin_mul_overflow(n, factor, number)) *number = n < 0 ? INT64_MIN : INT64_MAX;
  return 1;
}

/* Read `text` as the parameter's kind. 0 when malformed; *clamped when a bound was taken. */
static int parse_value(const struct spec *spec, const char *text, struct value *value, int *clamped) {
  *clamped = 0;
  value->text = text;
  if (spec->kind == KIND_TEXT) return 1;
  if (spec->kind == KIND_REAL) {
    char *end;
    value->real = parse_c_double(text, &end);
    if (end == text || *end || isnan(value->real)) return 0;
    *clamped = value->real < (double)spec->min || value->real > (double)spec->max;
    value->number = value->real < (double)spec->min ? spec->min : *clamped ? spec->max : (int64_t)value->real;
    if (*clamped) value->real = (double)value->number;
    return 1;
  }
  if (!parse_integer(text, spec->kind, &value->number)) return 0;
  int64_t wanted = value->number;
  value->number = wanted < spec->min ? spec->min : wanted > spec->max ? spec->max : wanted;
  value->real = (double)value->number;
  *clamped = value->number != wanted;
  return 1;
}

/* Presets are our own text: they parse. */
static void set_preset(int id) {
  int clamped;
  values[id] = (struct value){0};
  parse_value(&specs[id], specs[id].preset, &values[id], &clamped);
}

/* Take `text`, which `source` gave under `name`. Nothing is taken, and 0 returned, when it is an empty number (as a shell leaves
 * it). */
static int set_value(int id, const char *name, const char *text, const char *source) {
  const struct spec *spec = &specs[id];
  struct value value = {.is_set = 1};
  char trimmed[4096], bound[32];
  int clamped;
  if (!trim(text, trimmed, sizeof trimmed)) {
    warn_later("%s (from %s) is longer than %zu bytes: ignored", name, source, sizeof trimmed - 1);
    return 1;
  }
  if (!*trimmed && spec->kind != KIND_TEXT) return 0;
  if (!parse_value(spec, trimmed, &value, &clamped)) {
    warn_later("%s=%.100s (from %s) is not a %s: taking %s", name, trimmed, source,
               spec->kind == KIND_SIZE ? "size such as 65536, 64K or 1M" : "number", spec->preset);
    return 1;
  }
  if (clamped) {
    snprintf(bound, sizeof bound, "%lld", (long long)value.number);
    warn_later("%s=%.100s (from %s) is outside %lld..%lld: taking %s", name, trimmed, source, (long long)spec->min,
               (long long)spec->max, bound);
  }
  value.text = intern(clamped ? bound : trimmed);
  values[id] = value;
  return 1;
}

/* ---- sources ---- */

/* done[id] once a source has decided it. */
static void load_environment(char done[HFR_PARAM_COUNT]) {
  for (int id = 0; id < HFR_PARAM_COUNT; id++) {
    const char *text = getenv(specs[id].name), *alias = nccl_names[id] ? getenv(nccl_names[id]) : NULL;
    if (text) done[id] = (char)set_value(id, specs[id].name, text, "the environment");
    if (!done[id] && alias) done[id] = (char)set_value(id, nccl_names[id], alias, "the environment");
  }
}

/* Read a configuration file of at most FILE_MAX_BYTES; NULL when there is none. `wanted`: the user named it. The caller frees. */
static char *read_file(const char *path, int wanted) {
  struct stat status;
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* O_NONBLOCK: a FIFO must not block us */
  char *content = NULL;
  ssize_t got = -1;
  if (fd >= 0 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && (content = malloc(FILE_MAX_BYTES + 1)))
    got = read(fd, content, FILE_MAX_BYTES + 1);
  if (fd >= 0) close(fd);
  if (got >= 0 && got <= FILE_MAX_BYTES) {
    content[got] = '\0';
    return content;
  }
  if (wanted || got > FILE_MAX_BYTES)
    warn_later("configuration file %s: %s", path, got > FILE_MAX_BYTES ? "longer than 64 KiB, ignored" : "cannot be read");
  free(content);
  return NULL;
}

/* Index of the parameter called `name`, under our name (*alias 0) or NCCL's (1); -1 when there is none. */
static int find_name(const char *name, int *alias) {
  for (int id = 0; id < HFR_PARAM_COUNT; id++) {
    *alias = nccl_names[id] && !strcmp(nccl_names[id], name);
    if (*alias || !strcmp(specs[id].name, name)) return id;
  }
  return -1;
}

static void cut_comment(char *line) {
  for (char *p = line; *p; p++)
    if (*p == '#' && (p == line || isspace((unsigned char)p[-1]))) {
      *p = '\0';
      return;
    }
}

/* One line. In pass 0 our names count, in pass 1 NCCL's: so ours win whatever their order. The first line of a name wins. */
static void load_line(char *line, const char *path, int pass, char done[HFR_PARAM_COUNT]) {
  char name[64];
  cut_comment(line);
  char *equals = strchr(line, '=');
  if (!equals) return;
  *equals = '\0';
  int alias, known = trim(line, name, sizeof name), id = known ? find_name(name, &alias) : -1;
  if (id < 0) {
    if (pass == 0 && known && !strncmp(name, PREFIX, strlen(PREFIX)))
      warn_later("configuration file %s: unknown parameter %s", path, name);
    return;
  }
  if (alias == pass && !done[id]) done[id] = (char)set_value(id, name, equals + 1, path);
}

static void load_file(const char *path, int wanted, char done[HFR_PARAM_COUNT]) {
  for (int pass = 0; pass < 2; pass++) {
    char *content = read_file(path, wanted && pass == 0), *rest = content, *line;
    while (rest && (line = strsep(&rest, "\n"))) load_line(line, path, pass, done);
    free(content);
  }
}

/* The file that `variable` names, else the one called `hidden` at home. */
static void load_user_file(const char *variable, const char *hidden, char done[HFR_PARAM_COUNT]) {
  char path[4096];
  const char *named = getenv(variable), *home = getenv("HOME");
  if (named && *named)
    load_file(named, 1, done);
  else if (home && *home && snprintf(path, sizeof path, "%s/%s", home, hidden) < (int)sizeof path)
    load_file(path, 0, done);
}

/* Two of NCCL's variables say otherwise what HFREDUCE_TRANSPORT says. */
static void translate_transport(const char done[HFR_PARAM_COUNT]) {
  const char *disabled = getenv("NCCL_IB_DISABLE"), *net = getenv("NCCL_NET"), *transport = NULL;
  if (done[HFR_PARAM_TRANSPORT]) return;
  if (net && !strcasecmp(net, "IB")) transport = "verbs";
  if (net && !strcasecmp(net, "Socket")) transport = "tcp";
  if (disabled && atoi(disabled)) transport = "tcp";
  if (transport) set_value(HFR_PARAM_TRANSPORT, "HFREDUCE_TRANSPORT", transport, "NCCL_NET or NCCL_IB_DISABLE");
}

/* ---- names that are no parameter ---- */

/* Variables that are read elsewhere: above, and by the Python half and its build. */
static const char *const other_names[] = {"HFREDUCE_CONF_FILE", "HFREDUCE_TORCH_RECORD", "HFREDUCE_TORCH_RECORD_FILE",
                                          "HFREDUCE_TORCH_SHIM", "HFREDUCE_WERROR"};
#define OTHERS (sizeof other_names / sizeof *other_names)
#define TEST_PREFIX "HFREDUCE_TEST_" /* whatever follows is the tests' */
#define NAME_MAX_BYTES 64

/* Letters to insert, drop or change to make b of a (Levenshtein). Both are shorter than NAME_MAX_BYTES. */
static int distance(const char *a, const char *b) {
  int row[NAME_MAX_BYTES], na = (int)strlen(a), nb = (int)strlen(b);
  for (int j = 0; j <= nb; j++) row[j] = j;
  for (int i = 1; i <= na; i++) {
    int diagonal = row[0];
    row[0] = i;
    for (int j = 1; j <= nb; j++) {
      int changed = diagonal + (a[i - 1] != b[j - 1]), shorter = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
      diagonal = row[j];
      row[j] = changed < shorter ? changed : shorter;
    }
  }
  return row[nb];
}

static const char *known_name(int i) { return i < HFR_PARAM_COUNT ? specs[i].name : other_names[i - HFR_PARAM_COUNT]; }

/* The known name that `name` is most like, *far changes away. */
static const char *nearest_name(const char *name, int *far) {
  const char *nearest = known_name(0);
  *far = NAME_MAX_BYTES;
  for (int i = 0; i < HFR_PARAM_COUNT + (int)OTHERS; i++) {
    int here = distance(name, known_name(i));
    if (here < *far) *far = here, nearest = known_name(i);
  }
  return nearest;
}

/* A misspelt variable would change nothing in silence. */
static void warn_of_unknown(void) {
  extern char **environ;
  for (char **entry = environ; entry && *entry; entry++) {
    char name[NAME_MAX_BYTES];
    size_t bytes = strcspn(*entry, "=");
    int far;
    if (strncmp(*entry, PREFIX, strlen(PREFIX)) || !strncmp(*entry, TEST_PREFIX, strlen(TEST_PREFIX))) continue;
    if (bytes >= sizeof name) bytes = sizeof name - 1;
    memcpy(name, *entry, bytes);
    name[bytes] = '\0';
    const char *nearest = nearest_name(name, &far);
    if (!far) continue;
    if (far <= 3)
      warn_later("%s (in the environment) is no parameter and changes nothing: is %s meant?", name, nearest);
    else
      warn_later("%s (in the environment) is no parameter and changes nothing; `hfreduce info` lists all", name);
  }
}

static void load(void) {
  char done[HFR_PARAM_COUNT] = {0};
  for (int id = 0; id < HFR_PARAM_COUNT; id++) set_preset(id);
  load_environment(done);
  load_user_file("HFREDUCE_CONF_FILE", ".hfreduce.conf", done);
  load_user_file("NCCL_CONF_FILE", ".nccl.conf", done);
  load_file("/etc/hfreduce.conf", 0, done);
  load_file("/etc/nccl.conf", 0, done);
  translate_transport(done);
  warn_of_unknown();
}

static const struct value *get(enum hfr_param id) {
  pthread_once(&once, load);
  /* Cleared first: the log asks for its level through here. */
  if (atomic_load_explicit(&warnings_pending, memory_order_relaxed) && atomic_exchange(&warnings_pending, 0)) emit_warnings();
  return &values[id];
}

int64_t hfr_param_int(enum hfr_param id) { return get(id)->number; }
double hfr_param_real(enum hfr_param id) { return get(id)->real; }
const char *hfr_param_text(enum hfr_param id) { return get(id)->text; }
const char *hfr_param_name(enum hfr_param id) { return specs[id].name; }
const char *hfr_param_preset(enum hfr_param id) { return specs[id].preset; }
const char *hfr_param_help(enum hfr_param id) { return specs[id].help; }
int hfr_param_is_set(enum hfr_param id) { return get(id)->is_set; }
const char *hfr_param_alias(enum hfr_param id) { return nccl_names[id]; }

/* What is listed may end in a log or a bug report: the secret stays out of it. */
const char *hfr_param_value(enum hfr_param id) {
  const char *text = get(id)->text;
  return id == HFR_PARAM_SECRET && *text ? "(hidden)" : text;
}

void hfr_param_reload(void) {
  pthread_once(&once, load);
  nwarnings = 0;
  load();
}
