"""`hfreduce perf`: measure a collective and print nccl-tests' table."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfreduce import launch
from hfreduce._version import __version__
from hfreduce.cli.run import run_ranks
from hfreduce.communicator import Communicator
from hfreduce.errors import HfreduceError, InvalidArgumentError
from hfreduce.perf import report
from hfreduce.perf.collectives import COLLECTIVES
from hfreduce.perf.measure import Plan, Row, measure
from hfreduce.perf.traffic import line, traffic
from hfreduce.types import DTYPE_NAMES, FROM_NUMPY, OP_NAMES, TYPES, dtype_code, numpy_dtype

_ALIASES = {"half": "float16", "float": "float32", "double": "float64", "f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2"}


def size(value: str) -> int:
    """Parse a number of bytes: 8, 64K, 16M, 8G (1024-based)."""
    number, factor = value, 1
    if value and value[-1].upper() in "KMGT":
        number, factor = value[:-1], 1024 ** ("KMGT".index(value[-1].upper()) + 1)
    try:
        result = int(float(number) * factor)
    except ValueError:
        result = -1
    if result < 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a size such as 8, 64K or 1G")
    return result


def add_arguments(parser: argparse.ArgumentParser, collective: str | None = None) -> None:
    """Declare the command's options; with `collective`, for a program that measures only that one."""
    if collective is None:
        parser.add_argument("collective", choices=[*COLLECTIVES, "all"], help="what to measure")
    else:
        parser.set_defaults(collective=collective)
    parser.add_argument("-b", "--minbytes", type=size, default="8", metavar="SIZE", help="smallest size")
    parser.add_argument("-e", "--maxbytes", type=size, default="64M", metavar="SIZE", help="largest size")
    parser.add_argument("-f", "--stepfactor", type=float, default=2.0, metavar="F", help="factor between sizes")
    parser.add_argument("-i", "--stepbytes", type=size, metavar="SIZE", help="bytes between sizes, instead of a factor")
    parser.add_argument("-n", "--iters", type=int, default=20, metavar="N", help="timed calls a size")
    parser.add_argument("-w", "--warmup_iters", type=int, default=5, metavar="N", help="calls before them")
    parser.add_argument("-c", "--check", type=int, default=1, metavar="0|1", help="check values")
    parser.add_argument("-d", "--datatype", default="float32", help=f"all, or one of {', '.join(DTYPE_NAMES)}")
    parser.add_argument("-o", "--op", default="sum", help=f"all, or one of {', '.join(OP_NAMES)}")
    parser.add_argument("-r", "--root", type=int, default=0, metavar="R", help="root rank")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks to start when no launcher did (2 if not given)")
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--plot", metavar="FILE", help="also draw bus bandwidth over size (needs matplotlib)")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds that an operation, and joining, may take")


def run(args: argparse.Namespace) -> int:
    """Measure, in the ranks of the launcher; without one, start ranks that do."""
    try:
        _validate(args)
        found = launch.detect(os.environ)
        if found.launcher == "none":
            # the ranks import this very package, wherever they are started
            start = "import sys; sys.path[0] = sys.argv.pop(1); from hfreduce.cli import main; sys.exit(main())"
            package = str(Path(__file__).resolve().parents[2])
            return run_ranks([sys.executable, "-c", start, package, *args.command_line], 2 if args.ranks is None else args.ranks)
        if args.ranks not in (None, found.nranks):
            raise InvalidArgumentError(f"--ranks {args.ranks}: {found.launcher} has started {found.nranks}; leave it out")
        with launch.init(args.timeout) as comm:
            return _measure(comm, args)
    except HfreduceError as error:
        print(f"hfreduce perf: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def script(path: str, argv: Sequence[str] | None = None) -> int:
    """Be the program benchmarks/<collective>_perf.py at `path`; return the exit status."""
    name = os.path.basename(path).rpartition("_perf")[0]
    parser = argparse.ArgumentParser(
        description=f"Measure {name}: the same as `hfreduce perf {name}`.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_arguments(parser, name)
    args = parser.parse_args(argv)
    args.command_line = ["perf", name, *(sys.argv[1:] if argv is None else argv)]
    return run(args)


def _validate(args: argparse.Namespace) -> None:
    if args.maxbytes < args.minbytes:
        raise InvalidArgumentError(f"-e {args.maxbytes} is less than -b {args.minbytes}")
    if args.stepbytes is None and not args.stepfactor > 1:
        raise InvalidArgumentError(f"-f {args.stepfactor} is not greater than 1")
    if args.stepbytes == 0:
        raise InvalidArgumentError("-i 0 would never end")
    if args.iters < 1 or args.warmup_iters < 0:
        raise InvalidArgumentError("-n must be at least 1, and -w at least 0")
    if args.ranks is not None and args.ranks < 1:
        raise InvalidArgumentError(f"--ranks {args.ranks} is less than 1")
    if args.op != "all" and args.op not in OP_NAMES:
        raise InvalidArgumentError(f"-o {args.op} is not one of {', '.join(OP_NAMES)}, all")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgumentError("--plot needs matplotlib: pip install matplotlib")
    _dtypes(args.datatype)


def _dtypes(name: str) -> list[Any]:
    if name == "all":
        names = [t.name for t in TYPES.values() if t.code in FROM_NUMPY or importlib.util.find_spec("ml_dtypes") is not None]
    else:
        names = [_ALIASES.get(name, name)]
    for unknown in set(names) - set(DTYPE_NAMES):
        raise InvalidArgumentError(f"-d {unknown} is not one of {', '.join(DTYPE_NAMES)}, all")
    return [numpy_dtype(dtype_code(n)) for n in names]


def _sizes(args: argparse.Namespace) -> list[int]:
    sizes, at = [], args.minbytes
    while at <= args.maxbytes:
        sizes.append(at)
        at = at + args.stepbytes if args.stepbytes is not None else max(at + 1, int(at * args.stepfactor))
    return sizes


def _plans(args: argparse.Namespace) -> list[Plan]:
    plans = []
    for collective in COLLECTIVES if args.collective == "all" else (args.collective,):
        ops = list(OP_NAMES) if args.op == "all" else [args.op]
        for dtype in _dtypes(args.datatype):
            for op in ops if COLLECTIVES[collective].reduces else ops[:1]:
                plans.append(
                    Plan(collective, dtype, op, args.root, _sizes(args), args.iters, args.warmup_iters, bool(args.check))
                )
    return plans


def _measure(comm: Communicator, args: argparse.Namespace) -> int:
    if not 0 <= args.root < comm.nranks:
        raise InvalidArgumentError(f"-r {args.root} is not from 0 to {comm.nranks - 1}")
    places = _places(comm)
    talks = comm.rank == 0
    if talks:
        step = f"{args.stepfactor:g}(factor)" if args.stepbytes is None else f"{args.stepbytes}(bytes)"
        print(
            f"# hfreduce {__version__} on {platform.machine()}: {comm.nranks} ranks, {comm.nodes} nodes, "
            f"transports {','.join(comm.transports) or 'none'}"
        )
        print(
            f"# nThread 1 nGpus 0 minBytes {args.minbytes} maxBytes {args.maxbytes} step: {step} "
            f"warmup iters: {args.warmup_iters} iters: {args.iters} agg iters: 1 validation: {int(bool(args.check))} graph: 0"
        )
        print("#\n# Using devices")
        for rank, place in enumerate(places):
            print(f"#  Rank {rank:2} {place}")
        print("#", flush=True)
    plans = _plans(args)
    progress = _Progress(sum(len(plan.sizes) for plan in plans), talks)
    results: list[tuple[Plan, list[Row]]] = []
    for index, plan in enumerate(plans):
        if talks and (index == 0 or plan.collective != plans[index - 1].collective):
            print(f"# {plan.collective}\n{report.header()}", flush=True)
        rows = []
        progress.show(plan, 0)
        for row in measure(comm, plan):
            rows.append(row)
            progress.clear()
            if talks:
                print(report.line(plan, row), flush=True)
            progress.show(plan, len(rows))
        results.append((plan, rows))
    progress.clear()
    everything = [row for _, rows in results for row in rows]
    carried = traffic(comm)
    if talks:
        for one in carried:
            print(f"# Transport            : {line(one)}")
        print(report.footer(everything), flush=True)
        setup: dict[str, Any] = {"hfreduce": __version__, "machine": platform.platform(), "ranks": places}
        if args.json:
            setup |= {"nranks": comm.nranks, "nodes": comm.nodes, "transports": comm.transports}
            setup["traffic"] = [one._asdict() for one in carried]
            report.write_json(args.json, setup, results)
        if args.plot:
            report.write_plot(args.plot, f"{comm.nranks} ranks, {comm.nodes} nodes, {','.join(comm.transports)}", results)
    return 1 if report.wrong_values(everything) else 0


def _places(comm: Communicator) -> list[str]:
    """Where each rank runs, as text."""
    import numpy as np

    width = 128
    place = f"Pid {os.getpid():6} on {comm.host:>10} device  0 CPU (node {comm.node}, local rank {comm.local_rank})"
    mine = f"Group  0 {place}".encode()[:width]
    everyone = np.zeros((comm.nranks, width), dtype=np.uint8)
    comm.all_gather(np.frombuffer(mine.ljust(width), dtype=np.uint8), everyone)
    return [bytes(row).decode("utf-8", "replace").rstrip() for row in everyone]


class _Progress:
    """One line on standard error, if a terminal, once a run has taken a second."""

    def __init__(self, total: int, talks: bool) -> None:
        self.total, self.done = total, 0
        self.active = talks and sys.stderr.isatty()
        self.start = time.monotonic()

    def show(self, plan: Plan, finished: int) -> None:
        if finished:
            self.done += 1
        if self.active and finished < len(plan.sizes) and time.monotonic() - self.start > 1:
            print(
                f"\rmeasuring {plan.sizes[finished]} B ({self.done + 1} of {self.total}) ...", end="", file=sys.stderr, flush=True
            )

    def clear(self) -> None:
        if self.active:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
