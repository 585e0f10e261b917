"""Joining: who is let in and who is told why not, what joining leaves open, and variables that are refused or misspelt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import environment

import hfreduce
from hfreduce import Communicator, get_unique_id

PACKAGE = Path(hfreduce.__file__).parent


def python(code: str, limit: float = 60, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, with no parameters but these."""
    return subprocess.run([sys.executable, "-c", code], env=environment(**more), capture_output=True, text=True, timeout=limit)


# --- variables ---


def test_no_variable_that_is_read_counts_as_misspelt() -> None:
    texts = [path.read_text() for path in PACKAGE.rglob("*.py")]
    names = {name for text in texts for name in re.findall(r"\bHFREDUCE_[A-Z0-9_]*[A-Z0-9]\b", text)}
    names -= {name for name in names if re.fullmatch(r"HFREDUCE_(MAJOR|MINOR|PATCH|VERSION_CODE|UNIQUE_ID_BYTES|H)", name)}
    assert {"HFREDUCE_RANK", "HFREDUCE_TORCH_SHIM", "HFREDUCE_TIMEOUT"} <= names, names
    done = python("import hfreduce; hfreduce.get_unique_id(local=True)", **dict.fromkeys(names, ""))
    assert done.returncode == 0, done.stderr
    assert "no parameter" not in done.stderr, done.stderr


def test_a_misspelt_variable_is_named_once() -> None:
    code = "import hfreduce\nfor _ in range(2): hfreduce.Communicator(0, 1, hfreduce.get_unique_id(local=True)).close()"
    done = python(code, HFREDUCE_TIMEOT="5")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("HFREDUCE_TIMEOT (in the environment) is no parameter") == 1, done.stderr
    assert "is HFREDUCE_TIMEOUT meant?" in done.stderr, done.stderr


@pytest.mark.parametrize(("seconds", "good"), [("0", True), ("0.5", True), ("8", True), ("0.49", False), ("0.001", False)])
def test_a_heartbeat_below_half_a_second_is_refused(seconds: str, good: bool) -> None:
    code = "import hfreduce; hfreduce.Communicator(0, 1, hfreduce.get_unique_id(local=True)).close()"
    done = python(code, HFREDUCE_HEARTBEAT=seconds)
    if good:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0, "the communicator was made"
        assert "InvalidArgumentError" in done.stderr, done.stderr
        assert f"HFREDUCE_HEARTBEAT is {seconds} s" in done.stderr, done.stderr
        assert "at least 0.5 s" in done.stderr, done.stderr


# --- listeners ---


def _listening() -> set[int]:
    """TCP ports on which this process listens, on IPv4."""
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}


CYCLES = """
import os, socket, hfreduce
from hfreduce import Communicator, get_unique_id

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

def cycle(by_address):
    unique_id = UniqueId.from_address(f"127.0.0.1:{free_port()}", "ab" * 16) if by_address else get_unique_id(local=True)
    with Communicator(0, 1, unique_id) as comm:
        comm.barrier()

for by_address in (False, True):
    cycle(by_address)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        cycle(by_address)
    print(by_address, before, len(os.listdir("/proc/self/fd")))
"""


def test_listeners_close_with_their_last_user() -> None:
    done = python(CYCLES, limit=100)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2, done.stdout
    for by_address, before, after in lines:
        assert int(after) <= int(before), f"by_address {by_address}: {before} descriptors became {after} in 200 cycles"


def test_a_listener_stays_for_an_id_that_nobody_has_used() -> None:
    before = _listening()
    waiting = get_unique_id(local=True)  # handed out, not joined
    ports = _listening() - before
    for _ in range(3):
        Communicator(0, 1, get_unique_id(local=True)).close()
    assert ports <= _listening(), "the listener closed before the id was used"
    Communicator(0, 1, waiting, timeout=20).close()
    assert not (_listening() - before), "the listener is still open"
