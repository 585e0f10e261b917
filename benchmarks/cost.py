#!/usr/bin/env python3
"""What an all_reduce costs beside time: CPU seconds a GB, memory a rank, and what it loads and stores.

    mpirun -np 2 --bind-to none python benchmarks/cost.py            # beside MPI and Gloo
    hfreduce run -n 2 benchmarks/cost.py                             # beside Gloo

The libraries are opened one after the other, so that each one's memory shows; then they take turns in the same processes.
README.md beside this file says how each number is taken, and how the derived ones follow.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import platform
import struct
import sys
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any

import numpy as np
from measuring import human, line_up, machine, markdown, measure, rule, spread
from peers import NAMES, OURS, CannotError, Library, note, open_all

import hfreduce
from hfreduce.cli.perf import size as parse_size

#: Loads and stores of each rank for each byte of its vector, n ranks on a node, large messages, counting caches like memory. README.md derives
#: them. MPI chooses among many algorithms, so there is no one number.
DERIVED: dict[str, Callable[[int], float]] = {
    "hfreduce": lambda n: 5 - 1 / n,
    "numpy": lambda n: 5 - 1 / n,
    "gloo": lambda n: 11 * (n - 1) / n,
}
#: Bytes from which the algorithms are those that DERIVED is of.
_LARGE = 1 << 20
_LINE = 64  # bytes of a cache line


# --- memory of a process ---


def memory() -> dict[str, float]:
    """MiB of this process: resident now (VmRSS) and at most since `reset_peak` (VmHWM)."""
    found = {}
    with open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                found[name] = int(value.split()[0]) / 1024
    return found


def reset_peak() -> bool:
    """Let VmHWM begin anew; whether the kernel did."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return memory()["VmHWM"] - memory()["VmRSS"] < 1


def peak_of(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Its result; MiB by which memory grew meanwhile at most, and MiB that stayed."""
    reset_peak()
    before = memory()["VmRSS"]
    result = call()
    after = memory()
    return result, after["VmHWM"] - before, after["VmRSS"] - before


def calls_peak(library: Library, size: int) -> float | None:
    """MiB at most in calls on a buffer of `size`, beyond that buffer. None where the library cannot."""
    before = memory()["VmRSS"]
    handle, view = library.memory(size)
    view[...] = 0  # the buffer is there before the calls
    try:
        call = library.bind("all_reduce", "float32", handle, handle)
    except CannotError:
        return None
    reset_peak()
    for _ in range(5):
        call()
    return memory()["VmHWM"] - before - size / 2**20


# --- counters of the processor ---


class Counter:
    """A perf event of this process, all threads that are there and that they will start. OSError where there is none.

    type, config: as of perf_event_open(2).
    """

    LLC_MISSES = (0, 3)  # PERF_TYPE_HARDWARE, PERF_COUNT_HW_CACHE_MISSES
    PAGE_FAULTS = (1, 2)  # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_PAGE_FAULTS
    _INHERIT, _SIZE = 1 << 1, 112

    def __init__(self, type: int, config: int) -> None:
        number = {"x86_64": 298, "aarch64": 241}.get(platform.machine())
        if number is None:
            raise OSError(f"no perf_event_open known for {platform.machine()}")
        attributes = bytearray(self._SIZE)
        struct.pack_into("=IIQ", attributes, 0, type, self._SIZE, config)
        struct.pack_into("=Q", attributes, 40, self._INHERIT)
        memory = (ctypes.c_char * self._SIZE).from_buffer(attributes)
        libc = ctypes.CDLL(None, use_errno=True)
        self._files: list[int] = []
        for thread in os.listdir("/proc/self/task"):
            file = libc.syscall(number, memory, int(thread), -1, ctypes.c_long(-1), ctypes.c_ulong(0))
            if file < 0:
                error = ctypes.get_errno()
                self.close()
                raise OSError(error, os.strerror(error))
            self._files.append(file)

    def read(self) -> float:
        """Events so far."""
        return float(sum(struct.unpack("=Q", os.read(file, 8))[0] for file in self._files))

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files.clear()


# --- tables ---


def everywhere(comm: hfreduce.Communicator, value: float, op: str = "max") -> float:
    """The value over all ranks."""
    array = np.array([value])
    comm.all_reduce(array, op=op)
    return float(array[0])


def memory_table(comm: hfreduce.Communicator, opened: Sequence[tuple[Library, float, float]], size: int) -> list[dict[str, Any]]:
    """A row a library: what opening it took and what calls take beyond the buffer, of the rank where that is most."""
    rows = []
    for library, peak, stays in opened:
        calls = calls_peak(library, size)
        found = {"open_peak_mib": peak, "open_stays_mib": stays, "calls_peak_mib": calls if calls is not None else float("nan")}
        rows.append({"library": library.name, **{name: everywhere(comm, value) for name, value in found.items()}})
    return rows


def cpu_rows(
    comm: hfreduce.Communicator, libraries: Sequence[Library], size: int, args: argparse.Namespace, llc: Counter | None
) -> list[dict[str, Any]]:
    """A row a library for one size: time of a call, CPU seconds a GB of all ranks together, cores that they kept busy."""
    entries, complaints = line_up(comm, libraries, "all_reduce", "float32", size)
    if complaints:
        raise SystemExit(f"cost: {complaints[0]}")
    reads = [process_time] + ([llc.read] if llc is not None else [])
    times, _, grown = measure(comm, entries, args.rounds, args.batch / 1e3, reads)
    grown = np.ascontiguousarray(grown)
    comm.all_reduce(grown)  # all ranks together
    rows = []
    for entry, time, counts in zip(entries, times, grown):
        seconds = counts[:, 0]
        row = {"library": entry.name, "size": size, "us": time.tolist(), "cpu_s_per_gb": (seconds / (size / 1e9)).tolist()}
        row["cores_busy"] = float(np.median(seconds / (time / 1e6)))
        derived = DERIVED.get(entry.name) if size >= _LARGE and comm.nodes == 1 else None
        row["derived_bytes_per_byte"] = derived(comm.nranks) if derived is not None else None
        row["missed_bytes_per_byte"] = None if llc is None else float(np.median(counts[:, 1])) * _LINE / size / comm.nranks
        rows.append(row)
    return rows


def show(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table in Markdown."""
    widths = [max(len(line[i]) for line in [titles, *lines]) for i in range(len(titles))]
    print("\n".join(["", markdown(titles, widths), rule(widths), *(markdown(line, widths) for line in lines)]), flush=True)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default = [64 << 10, 1 << 20, 16 << 20, 64 << 20]
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=default, metavar="SIZE", help="64K 1M ...")
    parser.add_argument("--memory-size", type=parse_size, default=64 << 20, metavar="SIZE", help="buffer of the memory table")
    parser.add_argument("--libraries", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=float, default=50, metavar="MS", help="how long a batch is to take; at least a call")
    parser.add_argument("--json", metavar="FILE", help="also write every number")
    args = parser.parse_args()
    if args.rounds < 1 or min([*args.sizes, args.memory_size]) < 4:
        parser.error("--rounds is at least 1, a size at least 4 bytes")
    with contextlib.suppress(ImportError):
        if "gloo" in args.libraries:
            importlib.import_module("torch.distributed")  # a program of torch's has it anyhow
    resets = reset_peak()
    comm, *first = peak_of(lambda: hfreduce.init(120))
    with comm:
        opened = []
        for name in args.libraries:
            found, *own = peak_of(lambda name=name: open_all(comm, [name]))  # type: ignore[misc]
            grown = first if name in OURS else own
            opened += [(library, *grown) for library in found]
        libraries = [library for library, _, _ in opened]
        about = {**machine(), "nranks": comm.nranks, "versions": {library.name: library.version for library in libraries}}
        note(
            comm,
            f"all_reduce, float32, sum, in place; {comm.nranks} ranks, {about['cores']} cores, {about['processor']}; load {about['load']:.1f}",
        )
        note(comm, "; ".join(f"{library.name}: {library.version}" for library in libraries))
        if not resets:
            note(comm, "VmHWM cannot be reset here: peaks are those of the whole process, and too large")
        memories = memory_table(comm, opened, args.memory_size)
        llc, why = None, ""
        try:
            llc = Counter(*Counter.LLC_MISSES)
        except OSError as error:
            why = str(error)
        if everywhere(comm, float(llc is None)):
            note(comm, f"no counter of cache misses ({why or 'on another rank'}): traffic is derived only")
            llc = None
        if comm.rank == 0:
            titles = [
                "library",
                "open, peak MiB",
                "open, stays MiB",
                f"calls of {human(args.memory_size)}, peak MiB beyond the buffer",
            ]
            show(titles, [[row["library"], *(f"{row[key]:.1f}" for key in list(row)[1:])] for row in memories])
        rows: list[dict[str, Any]] = []
        for size in args.sizes:
            rows += cpu_rows(comm, libraries, size, args, llc)
        if comm.rank == 0:
            titles = [
                "library, size",
                "us a call",
                "CPU s a GB, all ranks",
                "cores busy",
                "bytes a byte, derived",
                "bytes a byte, missed",
            ]
            lines = []
            for row in rows:
                derived, missed = row["derived_bytes_per_byte"], row["missed_bytes_per_byte"]
                line = [
                    f"{row['library']}, {human(row['size'])}",
                    spread(row["us"]),
                    spread(row["cpu_s_per_gb"], lambda x: f"{x:.3f}"),
                ]
                line.append(f"{row['cores_busy']:.2f}")
                lines.append([*line, "" if derived is None else f"{derived:.2f}", "" if missed is None else f"{missed:.2f}"])
            show(titles, lines)
            if args.json:
                with open(args.json, "w") as file:
                    json.dump({"about": about, "memory": memories, "cpu": rows}, file, indent=1)
        for library in libraries:
            library.barrier()
        for library in libraries:
            library.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
