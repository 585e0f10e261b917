/* The table of shapes. */
#include "shape.h"

const struct hfr_shape hfr_shape_table[HFR_NCOLL] = {
    /* name, function, send, recv, in place, rooted, reduces, small */
    [HFR_ALL_REDUCE] = {"all_reduce", "hfreduceAllReduce", HFR_ROW, HFR_ROW, HFR_SAME, 0, 1, 1},
    [HFR_REDUCE] = {"reduce", "hfreduceReduce", HFR_ROW, HFR_ROOT_ROW, HFR_SAME, 1, 1, 1},
    [HFR_BROADCAST] = {"broadcast", "hfreduceBroadcast", HFR_ROOT_ROW, HFR_ROW, HFR_SAME, 1, 0, 1},
    [HFR_ALL_GATHER] = {"all_gather", "hfreduceAllGather", HFR_ROW, HFR_ROWS, HFR_OWN_OF_RECV, 0, 0, 1},
    [HFR_REDUCE_SCATTER] = {"reduce_scatter", "hfreduceReduceScatter", HFR_ROWS, HFR_ROW, HFR_OWN_OF_SEND, 0, 1, 1},
    [HFR_ALL_TO_ALL] = {"all_to_all", "hfreduceAlltoAll", HFR_ROWS, HFR_ROWS, HFR_SAME, 0, 0, 1},
    [HFR_GATHER] = {"gather", "hfreduceGather", HFR_ROW, HFR_ROOT_ROWS, HFR_OWN_OF_RECV, 1, 0, 0},
    [HFR_SCATTER] = {"scatter", "hfreduceScatter", HFR_ROOT_ROWS, HFR_ROW, HFR_OWN_OF_SEND, 1, 0, 0},
    [HFR_BARRIER] = {"barrier", "hfreduceBarrier", HFR_NONE, HFR_NONE, HFR_APART, 0, 0, 1},
    [HFR_P2P] = {"send/recv", "hfreduceSend", HFR_SENDER_ROW, HFR_RECEIVER_ROW, HFR_APART, 0, 0, 0},
    [HFR_PAIR] = {"pair exchange", "hfreduceAllReduce", HFR_NONE, HFR_NONE, HFR_APART, 0, 0, 0},
};
