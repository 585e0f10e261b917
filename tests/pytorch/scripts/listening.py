"""A rank that makes groups as `own` (hfreduce.torch.init_process_group) or `torch` (torch.distributed's) and prints where it listens.

One line: RANK ADDRESS ADDRESS..., the addresses without ports.
"""

from __future__ import annotations

import os
import socket
import sys

import torch
import torch.distributed as dist

import hfreduce.torch


def listening() -> set[str]:
    """Addresses of this process's listening TCP sockets."""
    mine = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            mine.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # the directory's own descriptor
            pass
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        with open(f"/proc/net/{table}") as lines:
            for fields in [line.split() for line in lines][1:]:
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                    digits = fields[1].partition(":")[0]  # words of four bytes in the machine's order
                    raw = b"".join(bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8))
                    found.add(socket.inet_ntop(family, raw))
    return found


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "own":
        hfreduce.torch.init_process_group(timeout=60)
    else:
        dist.init_process_group("hfreduce")
    group = dist.new_group(list(range(dist.get_world_size())))
    total = torch.ones(3)
    dist.all_reduce(total, group=group)
    assert total.tolist() == [dist.get_world_size()] * 3
    line = " ".join([str(dist.get_rank()), *sorted(listening())])
    os.write(1, f"{line}\n".encode())  # at once, so that the ranks' lines do not mix
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
