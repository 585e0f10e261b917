#!/usr/bin/env python3
"""Compare hfreduce's collectives on one node with Open MPI, MPICH (mpi4py) and Gloo (torch), in alternating rounds of the same processes.

    mpirun -np 2 --bind-to none python benchmarks/compare.py                    # with the MPI whose mpirun this is
    hfreduce run -n 2 benchmarks/compare.py                                     # without MPI
    python benchmarks/compare.py --mpirun A/bin/mpirun B/bin/mpirun --ranks 2 4 8 --targets    # one after the other, one table

In each round every library makes a batch of calls, in an order that turns from round to round, so that whatever else the
machine does meets all of them alike; and so do a copy and an addition, from which the limit comes. README.md beside this
file says what the columns mean. A library that is missing is left out, with a line that says why. The exit status is 1 if
one gave wrong values.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cells
import targets
from limits import ADD, COPY, SMALLEST, kernels, limit
from measuring import COLLECTIVES, DTYPES, line_up, machine, markdown, measure, whole_size
from peers import NAMES, OURS, Library, note, open_all

import hfreduce
from hfreduce import launch
from hfreduce.cli.perf import size as parse_size

SIZES = [8, 1 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20]


# --- in the ranks ---


def measure_cell(
    comm: hfreduce.Communicator,
    libraries: Sequence[Library],
    what: tuple[str, str, int],
    rounds: int,
    seconds: float,
) -> tuple[cells.Cell, list[str]]:
    """One collective, datatype and size: the cell, and a line for each library that gave wrong values (and is not in it)."""
    collective, dtype, size = what
    entries, complaints = line_up(comm, libraries, collective, dtype, size)
    whole = whole_size(collective, dtype, size, comm.nranks)
    limited = whole >= SMALLEST and comm.nodes == 1
    if limited:
        entries += kernels(comm, whole)
    times, counts, _ = measure(comm, entries, rounds, seconds)
    found = {entry.name: row.tolist() for entry, row in zip(entries, times)}
    run: dict[str, Any] = {"times": {name: row for name, row in found.items() if name not in (COPY, ADD)}}
    run["limit"] = limit(collective, found, whole, comm.nranks) if limited else None
    run["calls"] = {entry.name: count for entry, count in zip(entries, counts)}
    run["kernels"] = {name: row for name, row in found.items() if name in (COPY, ADD)}
    return {"collective": collective, "dtype": dtype, "size": whole, "nranks": comm.nranks, "runs": [run]}, complaints


def wanted(args: argparse.Namespace, nranks: int) -> list[tuple[str, str, int]]:
    """(collective, dtype, size): what was asked for, or what the targets need."""
    if (args.targets or args.suite) and not (args.collectives or args.dtypes or args.sizes):
        return targets.suite(nranks)
    found = []
    for collective in args.collectives or ["all_reduce"]:
        if collective == "barrier":
            found.append((collective, "float32", 0))
            continue
        found += [(collective, dtype, size) for dtype in args.dtypes or ["float32"] for size in args.sizes or SIZES]
    return found


def rank_main(args: argparse.Namespace) -> int:
    """Measure, as one of the ranks that a launcher has started."""
    with hfreduce.init(args.timeout) as comm:
        libraries = open_all(comm, args.libraries)
        columns = [library.name for library in libraries]
        talks, before, found, complaints = comm.rank == 0, None, [], []
        about = {**machine(), "nranks": comm.nranks, "nodes": comm.nodes, "transports": comm.transports, "rounds": args.rounds}
        about["versions"] = {library.name: library.version for library in libraries}
        note(
            comm,
            f"{comm.nranks} ranks on {comm.nodes} nodes, {about['cores']} cores, {about['processor']}; load {about['load']:.1f}",
        )
        note(comm, "; ".join(f"{library.name}: {library.version}" for library in libraries))
        note(comm, f"us a call: median (p10 to p90) of {args.rounds} alternating batches; ratios: our median / the other's")
        for what in wanted(args, comm.nranks):
            cell, wrong = measure_cell(comm, libraries, what, args.rounds, args.batch / 1e3)
            found.append(cell)
            complaints += wrong
            if talks:
                text = [*cells.title(cell, columns)] if what[:2] != before else []
                print("\n".join([*text, markdown(cells.row(cell, columns), cells.widths(columns))]), flush=True)
            before = what[:2]
            for complaint in wrong:
                note(comm, complaint)
        if talks:
            finish(args, found, [about])
        for library in libraries:
            library.barrier()
        for library in libraries:
            library.close()
    return status(args, found, bool(complaints))


# --- one or more launchers ---


def command(mpirun: str, nranks: int) -> tuple[list[str], dict[str, str]]:
    """The beginning of a command line that starts so many ranks, and the environment that makes mpi4py use the same MPI."""
    found = shutil.which(mpirun)
    if found is None:
        raise SystemExit(f"compare: --mpirun {mpirun}: no such program")
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    openmpi = "Open MPI" in text or "PRRTE" in text
    if not openmpi and "HYDRA" not in text and "MPICH" not in text:
        raise SystemExit(f"compare: {mpirun} is neither Open MPI's nor MPICH's mpirun")
    line = [found, "-np", str(nranks)]
    if openmpi:
        line += ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
        line += [] if os.geteuid() else ["--allow-run-as-root"]
    library = Path(found).absolute().parent.parent / "lib" / ("libmpi.so.40" if openmpi else "libmpi.so.12")
    return line, {"MPI4PY_LIBMPI": str(library)} if library.exists() else {}


def launch_all(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start this file under each launcher, one after the other; show all that they found as one."""
    launchers: list[str | None] = list(args.mpirun) or [None]
    runs, about, wrong = [], [], False
    with tempfile.TemporaryDirectory(prefix="hfreduce-compare-") as folder:
        for nranks in args.ranks:
            for index, mpirun in enumerate(launchers):
                path = Path(folder) / f"{nranks}-{index}.json"
                if mpirun is None:
                    line, env = [sys.executable, "-m", "hfreduce", "run", "-n", str(nranks)], dict[str, str]()
                else:
                    line, env = command(mpirun, nranks)
                line += [sys.executable, os.path.abspath(__file__), *argv, "--json", str(path)]
                code = _run(line, {**os.environ, **env})
                if not path.exists():
                    print(f"compare: {' '.join(line[:3])} failed with status {code}", file=sys.stderr)
                    return code or 1
                wrong |= code != 0
                found = json.loads(path.read_text())
                runs.append(found["cells"])
                about += found["about"]
                print(flush=True)
    merged = cells.merge(runs)
    if len(runs) > 1:
        print("# all runs together; a ratio is to the best peer of the same run, the largest of the runs\n")
        print(cells.table(merged))
    finish(args, merged, about)
    return status(args, merged, wrong)


def _run(line: Sequence[str], env: dict[str, str]) -> int:
    """Run a launcher; it gets the signals that end this process."""
    child = subprocess.Popen(line, env=env)

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, end)
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, old)


# --- both ---


def finish(args: argparse.Namespace, found: list[cells.Cell], about: list[dict[str, Any]]) -> None:
    """Targets, JSON and plot, from the cells alone."""
    verdicts = targets.judge(found) if args.targets else []
    if args.targets:
        print("\n" + "\n".join(targets.lines(verdicts)), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"about": about, "cells": found, "targets": targets.as_json(verdicts)}, file, indent=1)
    if args.plot:
        cells.plot(found, args.plot)


def status(args: argparse.Namespace, found: list[cells.Cell], wrong: bool) -> int:
    """The exit status: 1 for wrong values; with --strict also for a missed target, or without targets for a faster peer."""
    if not args.strict or wrong:
        return int(wrong)
    if args.targets:
        return int(not all(verdict.met for verdict in targets.judge(found)))
    ratios = [cells.of_peer(cell, ours) for cell in found for ours in OURS]
    return int(any(ratio is not None and ratio.value > 1 for ratio in ratios))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those of them that the ranks of a launcher get."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    ranks = parser.add_argument_group("what the ranks measure")
    ranks.add_argument("--collectives", nargs="+", choices=[*COLLECTIVES, "all"], help="all_reduce if not given")
    ranks.add_argument("--dtypes", nargs="+", choices=[*DTYPES, "all"], help="float32 if not given")
    ranks.add_argument(
        "--sizes", nargs="+", type=parse_size, metavar="SIZE", help="8 64K 1M ...; of the whole vector, as in nccl-tests"
    )
    ranks.add_argument(
        "--libraries", nargs="+", default=NAMES, choices=NAMES, help="numpy is hfreduce on arrays that NumPy allocated"
    )
    ranks.add_argument("--rounds", type=int, default=25, help="batches a library and size")
    ranks.add_argument("--batch", type=float, default=4, metavar="MS", help="how long a batch is to take; at least a call")
    ranks.add_argument("--timeout", type=float, default=120, metavar="S", help="seconds that a rank waits for the others")
    ranks.add_argument(
        "--targets", action="store_true", help="judge what the project aims at; alone, measure all that this needs"
    )
    ranks.add_argument("--suite", action="store_true", help="measure what the targets need, without judging")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 for a missed target; without --targets for a faster peer"
    )
    parser.add_argument("--json", metavar="FILE", help="also write every time measured")
    parser.add_argument("--plot", metavar="FILE", help="also draw time over size (needs matplotlib)")
    parser.add_argument("--mpirun", nargs="+", default=[], metavar="PATH", help="start the ranks with these, one after the other")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2], metavar="N", help="ranks to start when no launcher did")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.batch < 0 or min(args.ranks) < 1 or 0 in (args.sizes or []):
        parser.error("--rounds, --ranks and --sizes are at least 1, --batch is at least 0")
    if args.plot and not cells.can_plot():
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if "all" in (args.collectives or []):
        args.collectives = COLLECTIVES
    if "all" in (args.dtypes or []):
        args.dtypes = DTYPES
    passed = ["--rounds", str(args.rounds), "--batch", str(args.batch), "--timeout", str(args.timeout)]
    for option in ("collectives", "dtypes", "sizes", "libraries"):
        values = getattr(args, option)
        passed += [f"--{option}", *map(str, values)] if values else []
    return args, passed + (["--suite"] if args.targets or args.suite else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Be a rank, or start ranks."""
    args, passed = parse(sys.argv[1:] if argv is None else argv)
    if launch.detect(os.environ).launcher != "none":
        return rank_main(args)
    return launch_all(args, passed)


if __name__ == "__main__":
    sys.exit(main())
