"""Cases with values that are checked, and the loop that times them: every library in turn, round after round, in the same processes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from time import monotonic, perf_counter_ns, sleep
from typing import Any, NamedTuple

import numpy as np
from peers import ROOT, CannotError, Library, agreed, note, numpy_dtype

import hfreduce
from hfreduce.perf import patterns

Array = np.ndarray[Any, Any]
Call = Callable[[], object]

COLLECTIVES = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all", "barrier"]
DTYPES = ["float32", "bfloat16", "float16"]
#: Collectives whose buffers have a part for every rank.
_PARTS = ("all_gather", "reduce_scatter", "all_to_all")
#: Calls timed as one, at most: a batch is only to be long beside the clock's resolution and a barrier's skew.
_MOST_CALLS = 2000
_said: set[tuple[str, str, str]] = set()


class Case(NamedTuple):
    """A call of a library on buffers of its own; and what it takes to check it."""

    call: Call
    fill: Callable[[], None]
    wrong: Callable[[], int]
    zero: Callable[[], None]


class Entry(NamedTuple):
    """What takes part in the rounds.

    alone: its calls do not wait for other ranks, so that a batch lasts from the first rank's begin to the last one's end. (With
    more ranks than cores one after the other may run, each in little time.)
    """

    name: str
    call: Call
    barrier: Call
    alone: bool = False


def whole_size(collective: str, dtype: str, size: int, nranks: int) -> int:
    """The bytes that are really used for `size`: whole elements, of each part at least one; 0 for a barrier.

    As in nccl-tests, the size is that of the whole vector: all_gather's receive buffer, reduce_scatter's send buffer.
    """
    if collective == "barrier":
        return 0
    unit = numpy_dtype(dtype).itemsize * (nranks if collective in _PARTS else 1)
    return max(size // unit, 1) * unit


def line_up(
    comm: hfreduce.Communicator, libraries: Sequence[Library], collective: str, dtype: str, size: int
) -> tuple[list[Entry], list[str]]:
    """Those libraries that have the collective and gave the right values when it was called once; a line for each wrong one.

    Of what a library has not, rank 0 says so. Collective.
    """
    entries, complaints = [], []
    for library in libraries:
        call, wrong = _prepare(comm, library, collective, dtype, size)
        if wrong:
            complaints.append(f"{library.name}, {collective} of {dtype}, {size} bytes: {wrong} WRONG values")
        elif call is not None:
            entries.append(Entry(library.name, call, library.barrier))
    return entries, complaints


def _prepare(comm: hfreduce.Communicator, library: Library, collective: str, dtype: str, size: int) -> tuple[Call | None, int]:
    """A call on buffers that are zero, so that in-place sums stay; and how many values were wrong in one on known values.

    None where the library cannot.
    """
    if collective == "barrier":
        barrier = library.bind(collective, dtype, None, None)
        return barrier, _early(comm, barrier)
    case, why = None, "another rank cannot"
    try:
        case = _case(comm, library, collective, dtype, size)
    except (CannotError, ImportError) as error:
        why = str(error)
    if not agreed(comm, case is not None) or case is None:
        _left_out(comm, library, collective, dtype, why)
        return None, 0
    case.fill()
    failure = ""
    try:
        case.call()
    except Exception as error:  # torch and mpi4py raise what they like; all ranks alike, as the arguments are
        failure = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not agreed(comm, not failure):
        _left_out(comm, library, collective, dtype, failure or why)
        return None, 0
    wrong = np.array([case.wrong()], np.int64)
    comm.all_reduce(wrong)
    case.zero()
    return case.call, int(wrong[0])


def _left_out(comm: hfreduce.Communicator, library: Library, collective: str, dtype: str, why: str) -> None:
    """Say so, once for all sizes."""
    if (library.name, collective, dtype) not in _said:
        _said.add((library.name, collective, dtype))
        note(comm, f"{library.name}, {collective} of {dtype}: left out: {why}")


def _case(comm: hfreduce.Communicator, library: Library, collective: str, dtype: str, size: int) -> Case:
    """Buffers of the library, the call on them, and what must be in them before and after. CannotError as of `bind`."""
    rank, n, kind = comm.rank, comm.nranks, numpy_dtype(dtype)
    whole = whole_size(collective, dtype, size, n)
    part = whole // n
    if collective in _PARTS:
        send, x = library.memory(part if collective == "all_gather" else whole)
        recv, y = library.memory(part if collective == "reduce_scatter" else whole)
    else:
        recv, y = library.memory(whole)
        send, x = recv, y
    source, target = x.view(kind), y.view(kind)
    parts = np.split(target, n) if collective in ("all_gather", "all_to_all") else []

    def fill() -> None:
        y[...] = 0x55
        if collective in ("all_reduce", "reduce"):
            patterns.fill(source, patterns.reduced_input(rank, n, "sum", kind))
        elif collective == "reduce_scatter":
            for piece in np.split(source, n):
                patterns.fill(piece, patterns.reduced_input(rank, n, "sum", kind))
        elif collective == "all_to_all":
            for peer, piece in enumerate(np.split(source, n)):
                patterns.fill(piece, patterns.moved(rank * n + peer, kind))
        elif collective == "all_gather" or rank == ROOT:
            patterns.fill(source, patterns.moved(rank, kind))

    def wrong() -> int:
        if collective in ("all_reduce", "reduce_scatter") or (collective == "reduce" and rank == ROOT):
            return patterns.wrong(target, patterns.reduced(n, "sum", kind))
        if collective == "broadcast":
            return patterns.wrong(target, patterns.moved(ROOT, kind))
        keys = [peer * n + rank for peer in range(n)] if collective == "all_to_all" else range(n)
        return sum(patterns.wrong(piece, patterns.moved(key, kind)) for piece, key in zip(parts, keys))

    def zero() -> None:
        x[...] = 0
        y[...] = 0

    return Case(library.bind(collective, dtype, send, recv), fill, wrong, zero)


def _early(comm: hfreduce.Communicator, barrier: Call) -> int:
    """Ranks that leave a barrier before the last has come to it. All ranks read the same clock: they are on one machine."""
    early = 0
    for late in range(comm.nranks):
        comm.barrier()
        if comm.rank == late:
            sleep(0.01)
        times = np.array([monotonic(), 0.0])
        barrier()
        times[1] = monotonic()
        everyone = np.empty(2 * comm.nranks)
        comm.all_gather(times, everyone)
        early += int((everyone[1::2] < everyone[::2].max()).sum())
    return early


def measure(
    comm: hfreduce.Communicator, entries: Sequence[Entry], rounds: int, seconds: float, beside: Sequence[Callable[[], float]] = ()
) -> tuple[Array, list[int], Array]:
    """Time every entry once a round, in an order that turns.

    Of an entry so many calls are timed as one that they take about `seconds` together (after two rounds that warm up).
    beside: counters that are read before each batch, and after it and one more barrier. Returns microseconds a call (entry, round), of the slowest
    rank; the calls a batch by entry; and what the counters of this rank grew by a call (entry, round, counter).
    """
    begins, ends = (np.zeros((len(entries), rounds)) for _ in range(2))
    grown = np.zeros((len(entries), rounds, len(beside)))
    counts = [1] * len(entries)
    for turn in range(-2, rounds):
        for place in range(len(entries)):
            index = (turn + place) % len(entries)
            entry = entries[index]
            entry.barrier()
            entry.call()  # the caches hold what the library before has touched
            entry.barrier()
            before = [read() for read in beside]
            begin = perf_counter_ns()
            for _ in range(counts[index]):
                entry.call()
            end = perf_counter_ns()
            if beside:
                entry.barrier()  # what this rank has yet to send to others, or they to this one, is counted too
            if turn >= 0:
                begins[index, turn], ends[index, turn] = begin, end
                grown[index, turn] = [(read() - old) / counts[index] for read, old in zip(beside, before)]
            else:
                longest = np.array([(end - begin) / counts[index]])
                comm.all_reduce(longest, op="max")  # all ranks must make as many calls
                counts[index] = int(min(max(seconds * 1e9 / max(float(longest[0]), 1.0), 1), _MOST_CALLS))
    times = ends - begins
    comm.all_reduce(times, op="max")
    if any(entry.alone for entry in entries):  # of ranks on one machine, which has one such clock
        comm.all_reduce(begins, op="min")
        comm.all_reduce(ends, op="max")
        alone = [entry.alone for entry in entries]
        times[alone] = (ends - begins)[alone]
    return times / 1e3 / np.array(counts)[:, None], counts, grown


# --- words and numbers ---


def human(size: int) -> str:
    """8 B, 64 KiB; what is no whole number of KiB stays in bytes."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024 or unit == "MiB" or size % 1024:
            return f"{size} {unit}"
        size //= 1024
    raise AssertionError


def micros(value: float) -> str:
    """Three digits or more of a number of microseconds."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def spread(times: Any, show: Callable[[float], str] = micros) -> str:
    """Median and, in brackets, the tenth and ninetieth percentile."""
    low, middle, high = np.percentile(times, [10, 50, 90])
    return f"{show(middle)} ({show(low)} to {show(high)})"


def markdown(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line of a table, the first cell to the left."""
    padded = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
    return f"| {' | '.join(padded)} |"


def rule(widths: Sequence[int]) -> str:
    """The line under a table's head."""
    return "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def machine() -> dict[str, Any]:
    """What the numbers depend on: for the head of tables and for JSON."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }
