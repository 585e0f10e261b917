/*
 * The faults that a test wants: words in FAKE_VERBS, or given to fake_verbs_script() while running (what was counted and what
 * happened is then forgotten). N counts from 1 in this process.
 *
 *   CALL=N:ERRNO     the N-th call fails: open_device alloc_pd reg_mr create_comp_channel create_cq create_qp modify_qp post_send
 *                    post_recv query_port; N 0: every call
 *   wr=N:STATUS      the N-th send ends so (enum ibv_wc_status), and nothing of it arrives
 *   recv=N:STATUS    the N-th receive ends so
 *   event=N:TYPE     before the N-th send (enum ibv_event_type): DEVICE_FATAL kills the device, PORT_ERR its port, PORT_ACTIVE
 *                    brings it back; others are only told
 *   delay=US seed=S  completions become visible up to so many microseconds late, in order within a queue pair only
 *   inline=BYTES     what fits inline (create_qp refuses more); preset 220
 *   least=BYTES      a queue pair that connects with less inline ends the process
 *   vector=V         a completion queue with a channel that is of another completion vector ends the process
 *   memlock=1        the limit on locked memory (RLIMIT_MEMLOCK) holds for what is registered
 *   down=DEVICE      its port is down (0, 1, ...)
 *   prefix=P         an InfiniBand port is of this subnet, preset 0; prefixD=P as for layer. LIDs do not reach beyond it
 *   grh=1            an InfiniBand port requires the global route header
 *   flap=MS          a port that fails by an event is up again after so many milliseconds
 *   layer=L          link layer: 1 InfiniBand, 2 Ethernet (preset), 0 neither; layerD=L: of device D
 */
#include "fabric.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RULES 32
#define DEFAULT_INLINE 220

struct rule {
  char what[32];
  int number, value, seen;
};
static struct rule rules[RULES];
static int nrules, sends;
static uint64_t random_state;
static char last[1024];

void fake_script_read(const char *text) {
  char word[64];
  int used;
  nrules = sends = 0;
  snprintf(last, sizeof last, "%s", text ? text : "");
  for (const char *p = last; sscanf(p, " %63s%n", word, &used) == 1; p += used) {
    char *equals = strchr(word, '=');
    if (!equals || nrules == RULES) fake_die("cannot read \"%s\" in FAKE_VERBS", word);
    struct rule *r = &rules[nrules++];
    *equals = 0;
    *r = (struct rule){.number = atoi(equals + 1)};
    snprintf(r->what, sizeof r->what, "%.31s", word);
    char *colon = strchr(equals + 1, ':');
    if (colon) r->value = atoi(colon + 1);
  }
  random_state = 0;
}

static struct rule *find(const char *what) {
  for (int i = 0; i < nrules; i++)
    if (!strcmp(rules[i].what, what)) return &rules[i];
  return NULL;
}

static int number_of(const char *what, int preset) {
  struct rule *r = find(what);
  return r ? r->number : preset;
}

/* The value of the rule of this name that is due with this call. */
static int due(const char *what) {
  int value = 0;
  for (int i = 0; i < nrules; i++)
    if (!strcmp(rules[i].what, what) && (++rules[i].seen == rules[i].number || !rules[i].number)) value = rules[i].value;
  return value;
}

int fake_script_call(const char *name) { return due(name); }
int fake_script_receive_status(void) { return due("recv"); }
int fake_script_next_send(void) { return ++sends; }

int fake_script_send_status(int number) {
  for (int i = 0; i < nrules; i++)
    if (!strcmp(rules[i].what, "wr") && (rules[i].number == number || !rules[i].number)) return rules[i].value;
  return 0;
}

int fake_script_event(int number) {
  for (int i = 0; i < nrules; i++)
    if (!strcmp(rules[i].what, "event") && rules[i].number <= number && !rules[i].seen++) return rules[i].value;
  return -1;
}

int64_t fake_script_delay_ns(void) {
  int64_t most = (int64_t)number_of("delay", 0) * 1000;
  if (!most) return 0;
  if (!random_state) random_state = (uint64_t)number_of("seed", 1) * 0x9e3779b97f4a7c15u;
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (int64_t)(random_state % (uint64_t)most);
}

int64_t fake_script_flap_ns(void) { return number_of("flap", 0) * 1000000ll; }
uint32_t fake_script_inline(void) { return (uint32_t)number_of("inline", DEFAULT_INLINE); }

/* The rule of one device (its number follows the name), else that of all. */
static int number_for(const char *what, int device, int preset) {
  char name[32];
  snprintf(name, sizeof name, "%.24s%d", what, device);
  return number_of(name, number_of(what, preset));
}

int fake_script_subnet(int device) { return number_for("prefix", device, 0); }
int fake_script_grh_required(int device) { return number_for("grh", device, 0); }
uint32_t fake_script_least_inline(void) { return (uint32_t)number_of("least", 0); }
int fake_script_memlock(void) { return number_of("memlock", 0); }
int fake_script_vector(void) { return number_of("vector", -1); }
int fake_script_link_layer(int device) { return number_for("layer", device, HFR_IB_LINK_LAYER_ETHERNET); }

int fake_script_port_down(int device) {
  for (int i = 0; i < nrules; i++)
    if (!strcmp(rules[i].what, "down") && rules[i].number == device) return 1;
  return 0;
}
