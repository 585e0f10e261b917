#!/usr/bin/env python3
"""Compare hfreduce over RDMA with perftest on the same devices, and with hfreduce over TCP, in one alternating run.

    python benchmarks/rdma_perf.py                        # two ranks on this machine, on its first two RDMA ports
    python benchmarks/rdma_perf.py --devices mlx5_0 mlx5_1:2 --rounds 9 --json rdma.json

Two ranks, each a node of its own, talk over verbs, two others over TCP's loopback; perftest's programs (ib_write_bw,
ib_write_lat) run between the same two ports. In each round everything is measured once, one after the other, in an order that
turns from round to round, so that whatever else the machine does meets all of them alike. README.md beside this file says what
the rows mean. What is missing is left out, with a line that says why.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import secrets
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import hfreduce
from hfreduce import rdma

MIB = 1 << 20
SIZES = (1 * MIB, 4 * MIB, 16 * MIB)
ALL_REDUCE = 16 * MIB
REFERENCES = (1 * MIB, 4 * MIB)  # of ib_write_bw; more than 8 MiB a message is beyond some devices
LATENCY_BYTES = 8


# ---------------------------------------------------------------- in the ranks


def send_recv(comm: hfreduce.Communicator, size: int, count: int, in_flight: int) -> float:
    """Bytes a second of `count` sends from rank 0 to 1, so many of them under way at once; the last is acknowledged."""
    x, last = [np.ones(size, np.uint8) for _ in range(in_flight)], np.ones(1, np.uint8)
    move = comm.send if comm.rank == 0 else comm.recv
    start = time.perf_counter()
    if in_flight == 1:
        for _ in range(count):
            move(x[0], 1 - comm.rank)
    else:
        works: deque[hfreduce.Work] = deque()
        for i in range(count):
            if len(works) == in_flight:
                works.popleft().wait()
            works.append(move(x[i % in_flight], 1 - comm.rank, async_op=True))
        for work in works:
            work.wait()
    (comm.recv if comm.rank == 0 else comm.send)(last, 1 - comm.rank)
    return size * count / (time.perf_counter() - start)


def ping_pong(comm: hfreduce.Communicator, size: int, count: int, in_flight: int) -> float:
    """Seconds of half a round trip, the median."""
    x, times = np.ones(size, np.uint8), []
    for _ in range(count):
        start = time.perf_counter()
        if comm.rank == 0:
            comm.send(x, 1)
            comm.recv(x, 1)
        else:
            comm.recv(x, 0)
            comm.send(x, 0)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / 2


def all_reduce(comm: hfreduce.Communicator, size: int, count: int, in_flight: int) -> float:
    """Bytes a second that left this rank, as its connection counted them."""
    x = np.ones(size // 4, np.float32)
    comm.all_reduce(x[:1])
    before, start = comm.connections()[0].bytes_sent, time.perf_counter()
    for _ in range(count):
        comm.all_reduce(x, op="max")
    return (comm.connections()[0].bytes_sent - before) / (time.perf_counter() - start)


MEASURE: dict[str, Callable[[hfreduce.Communicator, int, int, int], float]] = {
    "send_recv": send_recv,
    "ping_pong": ping_pong,
    "all_reduce": all_reduce,
}


def serve(pipe: Any, environment: dict[str, str]) -> None:
    """Be a rank: measure what comes through the pipe."""
    os.environ.update(environment)
    try:
        with hfreduce.init() as comm:
            pipe.send(comm.transports)
            while (order := pipe.recv()) is not None:
                name, *arguments = order
                pipe.send(MEASURE[name](comm, *arguments))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


class Pair:
    """Two ranks, each a node, over one transport."""

    def __init__(self, transport: str, own: list[dict[str, str]]) -> None:
        self.transport, self.pipes = transport, []
        self.own = [{"HFREDUCE_HOSTID": f"node{rank}", "HFREDUCE_TRANSPORT": transport, **own[rank]} for rank in range(2)]
        shared = {"HFREDUCE_NRANKS": "2", "HFREDUCE_ADDR": f"127.0.0.1:{free_port()}", "HFREDUCE_SECRET": secrets.token_hex(16)}
        fork = multiprocessing.get_context("fork")  # what was imported need not be imported again
        for rank in range(2):
            here, there = fork.Pipe()
            environment = {**shared, **self.own[rank], "HFREDUCE_RANK": str(rank)}
            fork.Process(target=serve, args=(there, environment), daemon=True).start()
            there.close()
            self.pipes.append(here)
        for rank in range(2):
            transports = self._answer(rank)
            if transport not in transports:
                raise SystemExit(f"{transport} was wanted, but {','.join(transports)} runs")

    def measure(self, name: str, size: int, count: int, in_flight: int = 1) -> float:
        """What rank 0 says."""
        for pipe in self.pipes:
            pipe.send((name, size, count, in_flight))
        value, _ = (self._answer(rank) for rank in range(2))
        return float(value)

    def measure_in_c(self, program: Path, name: str, size: int, count: int) -> float:
        """What rank 0 of two processes of pair_bench.c says."""
        place, line = f"127.0.0.1:{free_port()}", f"{name} {size} {count}\n"
        ranks = []
        try:
            for rank in range(2):
                environment, pipe = {**os.environ, **self.own[rank]}, subprocess.PIPE
                command = [program, str(rank), place]
                ranks.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True))
                stdin = ranks[rank].stdin
                assert stdin is not None
                stdin.write(line)
                stdin.close()
                ranks[rank].stdin = None
            outputs = [process.communicate(timeout=300)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(process.wait() for process in ranks):
            raise SystemExit(f"pair_bench failed over {self.transport}")
        return float(outputs[0])

    def _answer(self, rank: int) -> Any:
        if not self.pipes[rank].poll(300):
            raise SystemExit(f"rank {rank} over {self.transport} has not answered for 300 s")
        try:
            answer = self.pipes[rank].recv()
        except EOFError:
            answer = "its process ended"
        if isinstance(answer, str):
            raise SystemExit(f"rank {rank} over {self.transport}: {answer}")
        return answer


def free_port() -> int:
    """A port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def build_pair_bench(folder: str) -> Path | None:
    """Compile pair_bench.c; None, with a line that says why, where that cannot be done."""
    program, source = Path(folder, "pair_bench"), Path(__file__).with_name("pair_bench.c")
    flags = [sys.executable, "-m", "hfreduce", "config", "--cflags", "--libs"]
    try:
        words = shlex.split(subprocess.run(flags, capture_output=True, text=True, check=True).stdout)
        compiler = shlex.split(os.environ.get("CC", "gcc"))
        subprocess.run([*compiler, "-O2", str(source), "-o", str(program), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"# pair_bench.c is left out: {getattr(error, 'stderr', None) or error}")
        return None
    return program


# ---------------------------------------------------------------- perftest


class End(NamedTuple):
    """A port, and the GID by which perftest is to name it (-1: InfiniBand needs none)."""

    device: str
    port: int
    gid: int


def perftest(tool: str, ends: list[End], size: int, iterations: int, *options: str) -> list[float]:
    """Run server and client; the numbers of the result's line."""
    port = str(free_port())

    def start(end: End, *host: str) -> subprocess.Popen[str]:
        command = [
            tool,
            "-d",
            end.device,
            "-i",
            str(end.port),
            "-p",
            port,
            "-s",
            str(size),
            "-n",
            str(iterations),
            "-F",
            *options,
        ]
        command += [] if end.gid < 0 else ["-x", str(end.gid)]
        return subprocess.Popen([*command, *host], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    server = start(ends[1])
    try:
        for _ in range(100):
            time.sleep(0.1)
            if listens(int(port)) or server.poll() is not None:
                break
        client = start(ends[0], "127.0.0.1")
        try:
            output, _ = client.communicate(timeout=300)
        finally:
            client.kill()
    finally:
        server.kill()
        said, _ = server.communicate()
    rows = [line.split() for line in output.splitlines() if line.split()[:1] == [str(size)]]
    if client.returncode or not rows:
        raise SystemExit(f"{tool} failed:\n{output}\n{said}")
    return [float(word) for word in rows[-1]]


def listens(port: int) -> bool:
    """Whether somebody listens on the port of this host; perftest takes one connection, so none is made to see."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return any(line[3] == "0A" and int(line[1].rpartition(":")[2], 16) == port for line in lines)


def choose_ends(names: list[str], gid: int | None) -> list[End]:
    """The ports for ranks 0 and 1: those named, else the first active ones."""
    ports = [port for port in rdma.find().ports if port.state == "active"]
    if not ports:
        raise SystemExit("no RDMA port is active here (`hfreduce info` lists them): there is nothing to compare")
    chosen = []
    for name in names or [f"{port.device}:{port.number}" for port in ports[:2]]:
        device, _, number = name.partition(":")
        fits = [port for port in ports if port.device == device and port.number == int(number or 1)]
        if not fits:
            raise SystemExit(f"{name}: not an active port; there are {', '.join(f'{p.device}:{p.number}' for p in ports)}")
        best = sorted(fits[0].gids, key=lambda g: (g.type != "RoCE v2", "." not in g.address, g.address.startswith("fe80")))
        index = gid if gid is not None else best[0].index if best and fits[0].link_layer == "Ethernet" else -1
        chosen.append(End(device, fits[0].number, index))
    return [chosen[0], chosen[-1]]


# ---------------------------------------------------------------- the table


class Row(NamedTuple):
    """A measurement: its name, unit, what it is compared with, and how it is made."""

    name: str
    unit: str
    against: str
    run: Callable[[], float]


def rows_of(args: argparse.Namespace, ends: list[End], pairs: list[Pair], program: Path | None) -> list[Row]:
    """Everything that one round measures."""
    rows = []
    tools = {tool: shutil.which(tool) for tool in ("ib_write_bw", "ib_write_lat")}
    for tool, path in tools.items():
        if path is None:
            print(f"# {tool} is left out: it is not on PATH (package perftest)")

    def bandwidth(size: int, *options: str) -> Callable[[], float]:
        count = max(5, args.volume // size)  # BW average, in MiB/s

        def run() -> float:
            for _ in range(3):  # on a loaded machine it now and then says 0.00
                average = perftest("ib_write_bw", ends, size, count, *options)[3]
                if average:
                    return average * MIB / 1e6
            raise SystemExit("ib_write_bw says 0 MiB/s, three times")

        return run

    if tools["ib_write_bw"]:
        for size in REFERENCES:
            rows.append(Row(f"ib_write_bw {size // MIB} MiB", "MB/s", "", bandwidth(size)))
        rows.append(Row("ib_write_bw -b 1 MiB, both ways", "MB/s", "", bandwidth(MIB, "-b")))
    if tools["ib_write_lat"]:
        latency = "ib_write_lat", ends, LATENCY_BYTES, args.iterations  # t_typical, in microseconds
        rows.append(Row(f"ib_write_lat {LATENCY_BYTES} B", "us", "", lambda: perftest(*latency)[4]))

    def calls(name: str, size: int) -> int:
        return int(args.iterations) if name in ("latency", "ping_pong") else max(4, args.volume // size)

    def python(pair: Pair, name: str, size: int, scale: float, in_flight: int = 1) -> Callable[[], float]:
        return lambda: pair.measure(name, size, calls(name, size), in_flight) * scale

    for pair in pairs:

        def add(name: str, how: str, unit: str, against: str, run: Callable[[], float], on: str = pair.transport) -> None:
            rows.append(Row(f"{name}, {how}, {on}", unit, against, run))

        for size in SIZES:
            name = f"send/recv {size // MIB} MiB"
            against = f"ib_write_bw {max(r for r in REFERENCES if r <= size) // MIB} MiB"
            if program is not None:
                add(name, "C", "MB/s", against, partial(pair.measure_in_c, program, "send_recv", size, calls("send_recv", size)))
            for in_flight, how in ((1, "Python"), (4, "Python, 4 in flight")):
                add(name, how, "MB/s", against, python(pair, "send_recv", size, 1e-6, in_flight))
        name, against = f"all_reduce {ALL_REDUCE // MIB} MiB, each way", "ib_write_bw 1 MiB"
        if program is not None:
            count = calls("all_reduce", ALL_REDUCE)
            add(name, "C", "MB/s", against, partial(pair.measure_in_c, program, "all_reduce", ALL_REDUCE, count))
        add(name, "Python", "MB/s", against, python(pair, "all_reduce", ALL_REDUCE, 1e-6))
        name, against = f"send/recv {LATENCY_BYTES} B, half round trip", f"ib_write_lat {LATENCY_BYTES} B"
        if program is not None:
            add(name, "C", "us", against, partial(pair.measure_in_c, program, "latency", LATENCY_BYTES, args.iterations))
        add(name, "Python", "us", against, python(pair, "ping_pong", LATENCY_BYTES, 1e6))
    return rows


def measure(rows: list[Row], rounds: int) -> dict[str, list[float]]:
    """The values of each row, by round."""
    values: dict[str, list[float]] = {row.name: [] for row in rows}
    for turn in range(-1, rounds):  # the first does not count: connections come up
        shift = turn % len(rows)
        for row in rows[shift:] + rows[:shift]:
            start = time.monotonic()
            value = row.run()
            took = f"{time.monotonic() - start:.1f} s"
            print(f"# round {turn + 1} of {rounds}: {row.name}: {value:.1f} {row.unit} in {took}", file=sys.stderr, flush=True)
            if turn >= 0:
                values[row.name].append(value)
    return values


def ratio(values: dict[str, list[float]], name: str, against: str) -> float | None:
    """The median of the rounds' ratios; None without the other."""
    if against not in values:
        return None
    return statistics.median(mine / other for mine, other in zip(values[name], values[against]))


def table(rows: list[Row], values: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Print the table; return it as records."""
    records = []
    width = max(len(row.name) for row in rows)
    print(f"{'':<{width}}  {'median':>8} {'min':>8} {'max':>8}       {'/ perftest':>10}  {'/ TCP':>7}")
    for row in rows:
        mine = values[row.name]
        tcp = row.name.removesuffix("verbs") + "tcp" if row.name.endswith("verbs") else ""
        ratios = [ratio(values, row.name, row.against), ratio(values, row.name, tcp)]
        shown = ["" if r is None else f"{r:.2f}" for r in ratios]
        middle = statistics.median(mine)
        print(
            f"{row.name:<{width}}  {middle:8.1f} {min(mine):8.1f} {max(mine):8.1f} {row.unit:<4}  {shown[0]:>10}  {shown[1]:>7}"
        )
        records.append(
            {"name": row.name, "unit": row.unit, "median": middle, "rounds": mine, "perftest": ratios[0], "tcp": ratios[1]}
        )
    return records


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=[], metavar="DEV[:PORT]", help="port of rank 0, and of rank 1 if another")
    parser.add_argument("--gid-index", type=int, help="for perftest and hfreduce (none: RoCE v2 with an IPv4 address first)")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--volume", type=int, default=64 * MIB, help="bytes a measurement of bandwidth moves, about")
    parser.add_argument("--iterations", type=int, default=1000, help="round trips a measurement of latency makes")
    parser.add_argument(
        "--match", default="", metavar="REGEX", help="only the rows whose names match, and what they are compared with"
    )
    parser.add_argument("--no-tcp", action="store_true", help="leave TCP out")
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args()
    ends = choose_ends(args.devices, args.gid_index)
    own = [{"HFREDUCE_IB_HCA": f"={end.device}:{end.port}"} for end in ends]
    if args.gid_index is not None:
        own = [{**one, "HFREDUCE_IB_GID_INDEX": str(args.gid_index)} for one in own]
    pairs = [Pair("verbs", own)] + ([] if args.no_tcp else [Pair("tcp", [{}, {}])])
    names = [f"{end.device}:{end.port} (GID {end.gid})" for end in ends]
    print(f"# hfreduce {hfreduce.__version__}, {platform.node()}, {len(os.sched_getaffinity(0))} CPUs, {args.rounds} rounds")
    print(f"# rank 0 on {names[0]}, rank 1 on {names[1]}")
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(args, ends, pairs, build_pair_bench(folder))
        wanted = [row for row in rows if re.search(args.match, row.name)]
        needed = {row.against for row in wanted} | {row.name for row in wanted}
        rows = [row for row in rows if row.name in needed]
        values = measure(rows, args.rounds)
    records = table(rows, values)
    for pair in pairs:
        for pipe in pair.pipes:
            pipe.send(None)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"hfreduce": hfreduce.__version__, "machine": platform.platform(), "ports": names, "rows": records},
                file,
                indent=1,
            )
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
