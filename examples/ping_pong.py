#!/usr/bin/env python3
"""Latency and bandwidth of send and recv between ranks 0 and 1: `hfreduce run -n 2 ping_pong.py`, or under any launcher."""

from __future__ import annotations

import argparse
import sys
from time import perf_counter_ns

import numpy as np

import hfreduce


def main() -> int:
    """Print the table; the exit status is 1 if a byte arrived wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--largest", type=int, default=16, metavar="MIB", help="size of the largest message")
    parser.add_argument("--round-trips", type=int, default=0, metavar="N", help="round trips a size; 0: by the size")
    args = parser.parse_args()
    with hfreduce.init() as comm:
        if comm.nranks < 2:
            sys.exit("ping_pong: needs two ranks: hfreduce run -n 2 ping_pong.py")
        pair = comm.split(0 if comm.rank < 2 else None)  # further ranks only watch
        wrong = measure(pair, args) if pair is not None else 0
        return 1 if wrong else 0


def measure(pair: hfreduce.Communicator, args: argparse.Namespace) -> int:
    """Send each size to and fro; return the number of wrong bytes."""
    peer = 1 - pair.rank
    wrong = 0
    if pair.rank == 0:
        print(f"# transport {','.join(pair.transports)}; latency is half a round trip, bandwidth is the size over its median")
        print(f"# {'size (B)':>10} {'round trips':>11} {'p50 (us)':>9} {'p99 (us)':>9} {'GB/s':>7} {'#wrong':>6}")
    size = 1
    while size <= args.largest << 20:
        trips = args.round_trips or max(10, min(1000, (16 << 20) // size))
        mine = np.resize(np.arange(251, dtype=np.uint8), size)  # a prime period: no chunk size of the library is a multiple
        theirs = np.zeros(size, np.uint8)
        times = np.empty(trips)
        for trip in range(-5, trips):  # five to warm up
            begin = perf_counter_ns()
            if pair.rank == 0:
                pair.send(mine, peer)
                pair.recv(theirs, peer)
            else:
                pair.recv(theirs, peer)
                pair.send(theirs, peer)  # what came, so that rank 0 checks both ways
            if trip >= 0:
                times[trip] = (perf_counter_ns() - begin) / 2e3
        bad = int(np.count_nonzero(mine != theirs))
        wrong += bad
        if pair.rank == 0:
            p50, p99 = np.percentile(times, [50, 99])
            print(f"{size:>12} {trips:>11} {p50:>9.2f} {p99:>9.2f} {size / p50 / 1e3:>7.3f} {bad:>6}", flush=True)
        size *= 4
    return wrong


if __name__ == "__main__":
    sys.exit(main())
