#!/usr/bin/env python3
"""What asynchrony costs and hides, and what many tensors cost against one buffer.

    mpirun -np 2 --bind-to none python benchmarks/overlap.py          # beside MPI and Gloo
    hfreduce run -n 2 benchmarks/overlap.py                           # beside Gloo

1. launch: the caller's time in an asynchronous all_reduce, until it may go on computing.
2. overlap: compute alone, communication alone, both at once. The ranks share the machine's cores, so that only what
   communication spends waiting can be hidden where there is no core more than ranks.
3. tensors: the gradients of ResNet-50 and of GPT-2 small (gradient_sizes.py), reduced one by one in a group, beside one buffer
   that holds them all.

Everything in alternating rounds of the same processes, all values checked; README.md beside this file says how each number is taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter, thread_time
from typing import Any

import numpy as np
from gradient_sizes import MODELS, Shape, count
from measuring import human, machine, markdown, rule, spread
from peers import NAMES, CannotError, Library, agreed, note, open_all

import hfreduce
from hfreduce.cli.perf import size as parse_size

Array = np.ndarray[Any, Any]
Step = Callable[[], Any]

PARTS = ["launch", "overlap", "tensors"]
LAUNCH_AIM = 3.0  # microseconds of the caller's time
TENSORS_AIM = 1.15  # times one fused buffer


class Table:
    """Prints rows in Markdown as they come, and keeps them."""

    def __init__(self, comm: hfreduce.Communicator, title: str, columns: Sequence[str]) -> None:
        self.comm, self.rows = comm, list[dict[str, Any]]()
        self.widths = [max(len(columns[0]), 47), *(max(len(column), 26) for column in columns[1:])]
        if comm.rank == 0:
            print(f"\n{title}\n\n{markdown(columns, self.widths)}\n{rule(self.widths)}", flush=True)

    def add(self, cells: Sequence[str], **data: Any) -> None:
        """A row, and what goes to JSON of it."""
        self.rows.append(data)
        if self.comm.rank == 0:
            print(markdown(cells, self.widths), flush=True)


def verdict(value: float, aim: float, unit: str = "") -> str:
    """As in "met (at most 3 us)"."""
    return f"{'met' if value <= aim else 'MISSED'} (at most {aim:g}{unit})"


def alternate(comm: hfreduce.Communicator, steps: Sequence[Step], rounds: int, warm: int = 2) -> list[list[Any]]:
    """What each step returned in each round, by step; the order turns from round to round. Barriers between steps."""
    found: list[list[Any]] = [[] for _ in steps]
    for turn in range(-warm, rounds):
        for place in range(len(steps)):
            index = (turn + place) % len(steps)
            comm.barrier()
            value = steps[index]()
            if turn >= 0:
                found[index].append(value)
    return found


def slowest(comm: hfreduce.Communicator, times: Any) -> Array:
    """The same times, each of the rank that took longest."""
    array = np.array(times, np.float64)
    comm.all_reduce(array, op="max")
    return array


def checked_start(comm: hfreduce.Communicator, library: Library, size: int) -> Callable[[], Any] | None:
    """An asynchronous all_reduce of float32 zeros; after one of ones, whose sum must be right. None where there is none."""
    handle, view = library.memory(size)
    start = None
    try:
        start = library.start("float32", handle)
    except (CannotError, AttributeError) as error:
        note(comm, f"{library.name}: left out: {error}")
    if not agreed(comm, start is not None) or start is None:
        return None
    values = view.view(np.float32)
    values[:] = 1
    start()()
    if not agreed(comm, bool((values == comm.nranks).all())):
        raise SystemExit(f"overlap: {library.name} gives a wrong sum of {size} bytes")
    values[:] = 0
    return start


# --- 1: launching ---


def launch_step(start: Callable[[], Any], calls: int) -> tuple[float, float, float]:
    """Seconds: median of a launch by the clock, median of one by the caller's thread's time on the CPU, mean of launch and wait.

    The two clocks take turns, since reading the second is a system call.
    """
    clocks: list[Callable[[], float]] = [perf_counter, thread_time]
    launches: list[list[float]] = [[], []]
    first = perf_counter()
    for turn in range(calls):
        clock = clocks[turn % 2]
        begin = clock()
        wait = start()
        launches[turn % 2].append(clock() - begin)
        wait()
    return float(np.median(launches[0])), float(np.median(launches[1])), (perf_counter() - first) / calls


def launch(comm: hfreduce.Communicator, libraries: Sequence[Library], args: argparse.Namespace) -> Table:
    """The caller's microseconds, from the call until it returns; the operation is waited for outside them."""
    columns = ["library, size", "launch", "launch, on the CPU", "launch and wait", "target"]
    table = Table(comm, "launch of an asynchronous all_reduce, us", columns)
    for size in args.launch_sizes:
        started = [(library, start) for library in libraries if (start := checked_start(comm, library, size))]
        calls = max(4, min(100, (4 << 20) // size))
        steps = [partial(launch_step, start, calls) for _, start in started]
        for (library, _), times in zip(started, slowest(comm, alternate(comm, steps, args.rounds))):
            launched, cpu, whole = times.T * 1e6
            target = verdict(float(np.median(launched)), LAUNCH_AIM, " us") if library.name == "hfreduce" else ""
            cells = [f"{library.name}, {human(size)}", spread(launched), spread(cpu), spread(whole), target]
            data = {"launch_us": launched.tolist(), "launch_cpu_us": cpu.tolist(), "whole_us": whole.tolist()}
            table.add(cells, library=library.name, size=size, **data)
    return table


# --- 2: overlap ---


def busy(seconds: float) -> Callable[[], None]:
    """A computation that takes about so long on one core: products of matrices that fit in a first-level cache, no BLAS threads."""
    a, b, out = (np.full((48, 48), 1.0 / 48, np.float32) for _ in range(3))

    def work(turns: int) -> None:
        for _ in range(turns):
            np.einsum("ij,jk->ik", a, b, out=out)

    work(20)
    turns, took = 20, 0.0
    while took < 0.02:
        turns *= 2
        begin = perf_counter()
        work(turns)
        took = perf_counter() - begin
    needed = max(1, round(turns * seconds / took))
    return lambda: work(needed)


def overlap(comm: hfreduce.Communicator, libraries: Sequence[Library], args: argparse.Namespace) -> Table:
    """Compute as long as communication takes alone; then both. Hidden: what both save, of the shorter one."""
    columns = ["library, size", "compute alone", "communication alone", "both", "hidden"]
    table = Table(comm, "compute and asynchronous all_reduce, ms", columns)
    for size in args.overlap_sizes:
        for library in libraries:
            start = checked_start(comm, library, size)
            if start is None:
                continue

            def communicate(start: Callable[[], Any] = start) -> float:
                begin = perf_counter()
                start()()
                return perf_counter() - begin

            (alone,) = alternate(comm, [communicate], 5)
            compute = busy(float(np.median(slowest(comm, alone))))

            def calculate(compute: Callable[[], None] = compute) -> float:
                begin = perf_counter()
                compute()
                return perf_counter() - begin

            def both(start: Callable[[], Any] = start, compute: Callable[[], None] = compute) -> float:
                begin = perf_counter()
                wait = start()
                compute()
                wait()
                return perf_counter() - begin

            times = slowest(comm, alternate(comm, [calculate, communicate, both], args.rounds)) * 1e3
            a, b, c = np.median(times, axis=1)
            hidden = float((a + b - c) / min(a, b))
            cells = [
                f"{library.name}, {human(size)}",
                *(spread(row, lambda x: f"{x:.2f}") for row in times),
                f"{100 * hidden:.0f} %",
            ]
            table.add(cells, library=library.name, size=size, ms=times.tolist(), hidden=hidden)
    return table


# --- 3: many tensors ---


def gradients(comm: hfreduce.Communicator, shapes: Sequence[Shape], plain: bool) -> tuple[Array, list[Array]]:
    """One buffer of all shapes, and as many tensors of their own, with the same random values, another set on each rank."""
    make: Callable[..., Array] = np.empty if plain else hfreduce.empty
    total = sum(map(count, shapes))
    fused = make(total, np.float32)
    np.random.default_rng(comm.rank).random(out=fused, dtype=np.float32)
    tensors, at = [], 0
    for shape in shapes:
        tensor = make(shape, np.float32)
        tensor[...] = fused[at : at + count(shape)].reshape(shape)
        tensors.append(tensor)
        at += count(shape)
    return fused, tensors


def check_sums(comm: hfreduce.Communicator, fused: Array, tensors: Sequence[Array]) -> None:
    """Every sum against one that is made here, of all ranks' values made anew, in float64; a piece at a time."""
    sources = [np.random.default_rng(rank) for rank in range(comm.nranks)]
    at, close = 0, True
    for tensor in tensors:
        flat = tensor.reshape(-1)
        for begin in range(0, flat.size, 1 << 20):
            piece = flat[begin : begin + (1 << 20)]
            expected = np.zeros(piece.size, np.float64)
            for source in sources:
                expected += source.random(piece.size, dtype=np.float32)
            for found in (piece, fused[at : at + piece.size]):
                close &= np.allclose(found, expected, rtol=1e-6 * comm.nranks, atol=0)
            at += piece.size
    if not agreed(comm, close and at == fused.size):
        raise SystemExit("overlap: wrong sums of the gradients")


def ways(comm: hfreduce.Communicator, fused: Array, tensors: Sequence[Array]) -> Iterator[tuple[str, list[Array], Step]]:
    """(name, what is reduced, step): each way to reduce a model's gradients."""

    def grouped() -> None:
        with comm.group():
            for tensor in tensors:
                comm.all_reduce(tensor)

    def single() -> None:
        for tensor in tensors:
            comm.all_reduce(tensor)

    yield "one fused buffer", [fused], lambda: comm.all_reduce(fused)
    yield "one by one in a group", list(tensors), grouped
    yield "one by one, each waited for", list(tensors), single


def tensors(comm: hfreduce.Communicator, libraries: Sequence[Library], args: argparse.Namespace) -> Table:
    """Milliseconds of each way, and by that of the fused buffer."""
    columns = ["model, memory, way", "ms", "of fused", "target"]
    table = Table(comm, "a model's gradients, float32, sum, ms", columns)
    kinds = [library.name for library in libraries if library.name in ("hfreduce", "numpy")]
    for model in args.models:
        shapes = MODELS[model]()
        if args.tensors:
            shapes = shapes[-args.tensors :]
        for kind in kinds:
            fused, single = gradients(comm, shapes, kind == "numpy")
            comm.all_reduce(fused)
            with comm.group():
                for tensor in single:
                    comm.all_reduce(tensor)
            check_sums(comm, fused, single)
            named = list(ways(comm, fused, single))

            def timed(arrays: list[Array], step: Step) -> float:
                for array in arrays:
                    array *= 1 / comm.nranks  # sums of sums would grow without end
                comm.barrier()
                begin = perf_counter()
                step()
                return perf_counter() - begin

            steps = [lambda arrays=arrays, step=step: timed(arrays, step) for _, arrays, step in named]
            times = slowest(comm, alternate(comm, steps, args.rounds)) * 1e3
            base = float(np.median(times[0]))
            for (way, _, _), row in zip(named, times):
                ratio = float(np.median(row)) / base
                target = verdict(ratio, TENSORS_AIM) if "group" in way else ""
                table.add(
                    [f"{model}, {kind}, {way}", spread(row, lambda x: f"{x:.2f}"), f"{ratio:.2f}", target],
                    **{"model": model, "memory": kind, "way": way, "ms": row.tolist(), "of_fused": ratio, "tensors": len(shapes)},
                )
    return table


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--libraries", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--launch-sizes", nargs="+", type=parse_size, default=[8, 64 << 10, 1 << 20, 16 << 20], metavar="SIZE")
    parser.add_argument("--overlap-sizes", nargs="+", type=parse_size, default=[1 << 20, 16 << 20, 64 << 20], metavar="SIZE")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tensors", type=int, metavar="N", help="only the last N tensors of each model")
    parser.add_argument("--json", metavar="FILE", help="also write every time measured")
    args = parser.parse_args()
    if args.rounds < 1 or min([*args.launch_sizes, *args.overlap_sizes]) < 4:
        parser.error("--rounds is at least 1, a size at least 4 bytes")
    with hfreduce.init(120) as comm:
        libraries = open_all(comm, args.libraries)
        about = {**machine(), "nranks": comm.nranks, "versions": {library.name: library.version for library in libraries}}
        note(comm, f"{comm.nranks} ranks, {about['cores']} cores, {about['processor']}; load {about['load']:.1f}")
        note(comm, "; ".join(f"{library.name}: {library.version}" for library in libraries))
        note(comm, f"of the slowest rank: median (p10 to p90) of {args.rounds} alternating rounds")
        parts: dict[str, Callable[..., Table]] = {"launch": launch, "overlap": overlap, "tensors": tensors}
        found = {name: parts[name](comm, libraries, args).rows for name in args.only}
        if comm.rank == 0 and args.json:
            with open(args.json, "w") as file:
                json.dump({"about": about, **found}, file, indent=1)
        for library in libraries:
            library.barrier()
        for library in libraries:
            library.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
