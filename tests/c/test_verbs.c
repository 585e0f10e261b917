/* The verbs transport's rules and what it says of this machine; needs no device. */
#include "check.h"

#include "base/param.h"
#include "transport/transport.h"
#include "transport/verbs_lib.h"

#include <stdlib.h>
#include <string.h>

static void test_match(void) {
  static const struct {
    const char *rule, *device;
    int port, match;
  } cases[] = {
      {"", "mlx5_0", 1, 1},          {"mlx5", "mlx5_0", 1, 1},         {"mlx5_0", "mlx5_01", 1, 1},
      {"=mlx5_0", "mlx5_01", 1, 0},  {"=mlx5_0", "mlx5_0", 2, 1},      {"mlx5_0:2", "mlx5_0", 1, 0},
      {"mlx5_0:2", "mlx5_0", 2, 1},  {"rxe,mlx5", "mlx5_1", 1, 1},     {"rxe,mlx4", "mlx5_1", 1, 0},
      {"^mlx5", "mlx5_1", 1, 0},     {"^mlx5", "rxe0", 1, 1},          {"^mlx5_0:1", "mlx5_0", 2, 1},
      {"^mlx5_0:1", "mlx5_0", 1, 0}, {"^=mlx5_1", "mlx5_10", 1, 1},    {"^=mlx5_1", "mlx5_1", 1, 0},
      {"^", "rxe0", 1, 1},           {"=rxe0:1,rxe1:1", "rxe1", 1, 1}, {",,", "rxe0", 1, 0},
      {"rxe0:", "rxe0", 1, 0},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    CHECK(hfr_ib_match(cases[i].rule, cases[i].device, cases[i].port) == cases[i].match, "rule \"%s\", %s:%d", cases[i].rule,
          cases[i].device, cases[i].port);
}

static void test_params(void) {
  setenv("NCCL_IB_HCA", "^mlx5_3", 1);
  setenv("NCCL_IB_GID_INDEX", "3", 1);
  setenv("NCCL_IB_QPS_PER_CONNECTION", "4", 1);
  setenv("HFREDUCE_IB_TC", "300", 1);
  hfr_param_reload();
  CHECK(!strcmp(hfr_param_text(HFR_PARAM_IB_HCA), "^mlx5_3"));
  CHECK(hfr_param_int(HFR_PARAM_IB_GID_INDEX) == 3 && hfr_param_int(HFR_PARAM_IB_QPS_PER_CONNECTION) == 4);
  CHECK(hfr_param_int(HFR_PARAM_IB_TC) == 255, "bounded");
  unsetenv("NCCL_IB_HCA");
  unsetenv("NCCL_IB_GID_INDEX");
  unsetenv("NCCL_IB_QPS_PER_CONNECTION");
  unsetenv("HFREDUCE_IB_TC");
  hfr_param_reload();
}

/* Whatever this machine has, there is a line for each port or a reason, and a choice or an error. */
static void test_describe(void) {
  char text[4096], little[10];
  struct hfr_ib_port port;
  size_t n = hfr_transport_describe(text, sizeof text);
  CHECK(n == strlen(text) && !strncmp(text, "rdma", 4) && text[n - 1] == '\n', "%s", text);
  CHECK(hfr_transport_describe(little, sizeof little) == 9 && !strncmp(little, text, 9));
  CHECK(hfr_transport_describe(little, 0) == 0);
  hfr_error_clear(hfr_last_error());
  CHECK(hfr_ib_choose(0, &port) ? *hfr_last_error()->text != 0 : port.context != NULL);
}

int main(void) {
  test_match();
  test_params();
  test_describe();
  return check_done();
}
