#!/usr/bin/env python3
"""What starting costs: import time, initialisation of N local ranks, memory that a communicator adds to a rank.

    python benchmarks/startup.py --ranks 64

Starts its own ranks. README.md beside this file says how each number is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMPORT = """
import time
a, start = time.perf_counter(), time.process_time()
import numpy
b = time.perf_counter()
import hfreduce
c, end = time.perf_counter(), time.process_time()
print(1e3 * (b - a), 1e3 * (c - b), 1e3 * (end - start))
"""


def import_times(repeats: int) -> dict[str, float]:
    """Median milliseconds in a new process: numpy, then hfreduce on top of it; and the processor's time for both."""
    rows = []
    for turn in range(repeats + 1):
        text = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        if turn:  # the first one reads the files from disk
            rows.append([float(value) for value in text.stdout.split()])
    numpy, ours, cpu = (statistics.median(column) for column in zip(*rows))
    return {"numpy_ms": numpy, "hfreduce_ms": ours, "together_ms": numpy + ours, "cpu_ms": cpu}


def memory() -> dict[str, int]:
    """Bytes of this process now: resident, and its proportional share of what is shared."""
    found = {}
    with open("/proc/self/smaps_rollup") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("Rss", "Pss"):
                found[name.lower()] = int(value.split()[0]) << 10
    return found


def rank_main(folder: Path) -> None:
    """One rank: init, use, a second communicator; write what it saw."""
    import numpy as np

    import hfreduce

    largest = 4 << 20
    x = np.ones(largest // 4, np.float32)  # touched before the first reading
    rank, nranks = int(os.environ["HFREDUCE_RANK"]), int(os.environ["HFREDUCE_NRANKS"])
    (folder / f"ready{rank}").touch()
    while sum(name.startswith("ready") for name in os.listdir(folder)) < nranks:  # imports and process starts do not count
        time.sleep(0.02)
    seen: dict[str, Any] = {"before": memory()}
    seen["begin"] = time.monotonic()
    comm = hfreduce.init()
    seen["end"] = time.monotonic()
    comm.barrier()
    seen["created"] = memory()
    for size in (4, 4096, 1 << 16, 1 << 20, largest):
        comm.all_reduce(x[: size // 4], op="avg")
    comm.barrier()
    seen["used"] = memory()
    comm.barrier()
    begin = time.monotonic()
    second = comm.duplicate()
    seen["duplicate"] = time.monotonic() - begin
    second.all_reduce(x, op="avg")
    comm.barrier()
    seen["second"] = memory()
    comm.barrier()
    (folder / f"seen{rank}").write_text(json.dumps(seen))
    comm.barrier()


def start(nranks: int) -> dict[str, Any]:
    """Run nranks ranks of this file; seconds and MiB."""
    with tempfile.TemporaryDirectory(prefix="hfreduce-startup-") as folder:
        begin = time.monotonic()
        command = [sys.executable, "-m", "hfreduce", "run", "-n", str(nranks), os.path.abspath(__file__), "--as-rank", folder]
        subprocess.run(command, check=True, cwd=folder, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
        whole = time.monotonic() - begin
        seen = [json.loads((Path(folder) / f"seen{rank}").read_text()) for rank in range(nranks)]
    added = {}
    for phase, base in (("created", "before"), ("used", "before"), ("second", "used")):
        for kind in ("rss", "pss"):
            values = [(rank[phase][kind] - rank[base][kind]) / 2**20 for rank in seen]
            added[f"{phase}_{kind}_mib"] = {"mean": statistics.mean(values), "max": max(values)}
    return {
        "nranks": nranks,
        "init_seconds": max(rank["end"] for rank in seen) - min(rank["begin"] for rank in seen),
        "init_seconds_from_last": max(rank["end"] for rank in seen) - max(rank["begin"] for rank in seen),
        "duplicate_seconds": max(rank["duplicate"] for rank in seen),
        "whole_seconds": whole,
        "added": added,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 64], metavar="N")
    parser.add_argument("--imports", type=int, default=11, help="processes that import; 0: leave it out")
    parser.add_argument("--json", metavar="FILE", help="also write the results")
    parser.add_argument("--as-rank", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        rank_main(Path(args.as_rank))
        return 0
    result: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "starts": []}
    if args.imports:
        result["import"] = times = import_times(args.imports)
        print(
            f"import hfreduce: {times['together_ms']:.0f} ms, of which numpy {times['numpy_ms']:.0f} ms "
            f"({times['cpu_ms']:.0f} ms on the CPU; medians of {args.imports} processes)",
            flush=True,
        )
    for nranks in args.ranks:
        found = start(nranks)
        result["starts"].append(found)
        print(f"{nranks} ranks on {result['cores']} cores:")
        print(
            f"  init {found['init_seconds']:.2f} s from the first call to the last return ({found['init_seconds_from_last']:.2f} s "
            f"from the last call); duplicate {found['duplicate_seconds']:.3f} s; whole run {found['whole_seconds']:.1f} s"
        )
        for phase, words in (("created", "first communicator, made"), ("used", "and used"), ("second", "a second one, used")):
            rss, pss = (found["added"][f"{phase}_{kind}_mib"] for kind in ("rss", "pss"))
            print(
                f"  {words:<26} adds a rank: RSS {rss['mean']:6.2f} MiB (max {rss['max']:6.2f}), "
                f"PSS {pss['mean']:6.2f} MiB (max {pss['max']:6.2f})",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
