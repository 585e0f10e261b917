"""The installed package's own word: `hfreduce info`, and an all_reduce of two local ranks on host memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import results
from results import Wrong

import hfreduce

TWO_RANKS = """
import numpy, hfreduce
with hfreduce.init(20) as comm:
    x = numpy.full(1000, comm.rank + 1.0)
    comm.all_reduce(x)
    assert (x == 3).all(), x[0]
"""


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", "hfreduce", *command], capture_output=True, text=True)
    if done.returncode:
        raise Wrong((done.stderr or done.stdout).strip()[-400:])
    return done.stdout


def installed_in_the_private_target() -> str:
    place = Path(hfreduce.__file__).resolve().parent
    results.same(place.parent.name, "target", f"{place}: its parent")
    return f"hfreduce {hfreduce.__version__}"


def hfreduce_info() -> tuple[str, dict[str, str]]:
    text = run("info")
    print(text, flush=True)
    lines = [line.strip() for line in text.splitlines() if "cuda" in line.lower() or "gdrcopy" in line.lower()]
    return "; ".join(lines[:6])[:600], {"info": text}


def two_ranks_on_host_memory() -> None:
    run("run", "-n", "2", sys.executable, "-c", TWO_RANKS)


if __name__ == "__main__":
    results.run("info", installed_in_the_private_target, hfreduce_info, two_ranks_on_host_memory)
