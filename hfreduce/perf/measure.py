"""The measuring loop: run a collective over a range of sizes, check its values, time each call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np

from hfreduce.communicator import Communicator
from hfreduce.memory import empty
from hfreduce.perf.collectives import COLLECTIVES, Setup, Task


class Plan(NamedTuple):
    """What to measure. sizes: bytes, in nccl-tests' meaning."""

    collective: str
    dtype: np.dtype[Any]
    op: str
    root: int
    sizes: list[int]
    iterations: int
    warmup: int
    check: bool


class Half(NamedTuple):
    """One half of a row.

    Time, p50, p99: microseconds over all calls of all ranks; bandwidths: 1e9 bytes/s; wrong: None when not checked.
    """

    time: float
    algbw: float
    busbw: float
    wrong: int | None
    p50: float
    p99: float


@dataclass(frozen=True)
class Row:
    """One line of the table; in_place is None where the collective has none."""

    size: int
    count: int
    out_of_place: Half
    in_place: Half | None


def measure(comm: Communicator, plan: Plan) -> Iterator[Row]:
    """Yield a row for each size. All ranks iterate alike; all get the same rows."""
    entry = COLLECTIVES[plan.collective]
    item = plan.dtype.itemsize
    unit = item * (comm.nranks if entry.per_rank else 1)
    largest = max([*plan.sizes, unit])
    memory = (empty(largest // item * item, "uint8"), empty(largest // item * item, "uint8"))
    for size in plan.sizes:
        count = size // unit
        halves: list[Half | None] = []
        for in_place in (False, True):
            if in_place and not entry.in_place:
                halves.append(None)
                continue
            task = entry.make(Setup(comm, count, plan.dtype, plan.op, plan.root, memory, in_place))
            halves.append(_half(comm, plan, task, count * unit, entry.bus(comm.nranks)))
        assert halves[0] is not None
        yield Row(count * unit, count, halves[0], halves[1])


def _half(comm: Communicator, plan: Plan, task: Task, size: int, bus: float) -> Half:
    task.fill()
    comm.barrier()
    wrong: int | None = None
    if plan.check:
        task.call()
        total = np.array([task.wrong()], dtype=np.int64)
        wrong = int(comm.all_reduce(total)[0])
    call = task.call
    for _ in range(plan.warmup):
        call()
    times = np.zeros(plan.iterations, dtype=np.float64)
    comm.barrier()
    for index in range(plan.iterations):
        start = perf_counter_ns()
        call()
        times[index] = perf_counter_ns() - start
    everyone = np.empty(plan.iterations * comm.nranks, dtype=np.float64)
    comm.all_gather(times, everyone)
    everyone /= 1e3
    mean = float(everyone.mean())
    algbw = size / mean / 1e3 if mean else 0.0
    return Half(mean, algbw, algbw * bus, wrong, float(np.percentile(everyone, 50)), float(np.percentile(everyone, 99)))
