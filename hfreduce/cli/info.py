"""`hfreduce info`: what was built, what is in use and why not more, and every parameter."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import textwrap
from dataclasses import asdict

import numpy as np

from hfreduce import rdma
from hfreduce._version import __version__
from hfreduce.cli.config import include_directory, library_directory
from hfreduce.params import describe, params, version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    python = {
        "hfreduce": __version__,
        "library": f"{version()} in {library_directory()}",
        "in place of NCCL": _nccl(),
        "header": str(include_directory() / "hfreduce.h"),
        "python": f"{platform.python_version()}, numpy {np.__version__}",
        "CPUs for this process": str(len(os.sched_getaffinity(0))),
    }
    found = [(key, value) for key, value in describe() if key]
    devices = rdma.find()
    if args.json:
        everything = {
            "python": python,
            "core": dict(found),
            "rdma": {**devices._asdict(), "ports": [asdict(port) for port in devices.ports]},
            "parameters": [p._asdict() for p in params()],
        }
        print(json.dumps(everything, indent=1))
        return 0
    rows = [*python.items(), *found]
    width = max(len(key) for key, _ in rows) + 1
    for key, value in rows:
        print(f"{key + ':':<{width}} {value}")
    _print_ports(devices)
    print("\nparameters (value, * when set, else the default; meaning):")
    listed = params()
    width = max(len(p.name) for p in listed)
    for param in listed:
        value = (param.value or '""') + (f" * (default {param.preset or 'empty'})" if param.is_set else "")
        print(f"  {param.name:<{width}}  {value}")
        print(textwrap.fill(param.help, 120, initial_indent=" " * (width + 4), subsequent_indent=" " * (width + 4)))
    return 0


def _nccl() -> str:
    """The level of NCCL that our libnccl.so.2 speaks, and where it is."""
    path = library_directory() / "libnccl.so.2"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"cannot be loaded: {error}"
    code = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(code))
    return f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100} in {path}"


def _print_ports(devices: rdma.Ports) -> None:
    if devices.ports:
        print(f"\nRDMA ports (as {devices.source} lists them{'; ' * bool(devices.trouble)}{devices.trouble}):")
    for port in devices.ports:
        facts = [port.state, port.link_layer or "link unknown"]
        facts += [] if port.speed is None else [f"{port.speed:g} Gb/s"]
        facts += [] if port.mtu is None else [f"MTU {port.mtu}"]
        facts += [f"LID {port.lid}"] if port.lid else []
        facts += [f"NUMA node {'unknown' if port.numa_node is None else port.numa_node}"]
        facts += [f"pkeys {' '.join(f'{pkey:#06x}' for pkey in port.pkeys)}"] if port.pkeys else []
        print(f"  {port.device} port {port.number}: {', '.join(facts)}")
        for gid in port.gids:
            print(
                f"    GID {gid.index:<3} {gid.address} ({gid.type or 'type unknown'}{' on ' * bool(gid.interface)}{gid.interface})"
            )
