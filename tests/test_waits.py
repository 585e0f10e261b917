"""Waits: their deadlines, what they say of themselves, and how a signal handler's exception ends them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from programs import environment
from ranks import reserved_address

import hfreduce

#: Seconds: far more than anything here takes, far less than the deadlines that must not be what ends a wait.
SOON = 8.0


def start(program: str, *, stderr: Any = subprocess.PIPE, **variables: str) -> subprocess.Popen[str]:
    """Run Python text in a process with no parameters but these."""
    env = environment(**variables)
    if not env["HFREDUCE_TIMEOUT"]:
        del env["HFREDUCE_TIMEOUT"]
    return subprocess.Popen(
        [sys.executable, "-c", program], env=env, text=True, stdout=subprocess.PIPE, stderr=stderr, cwd=Path(__file__).parent
    )


def ended(process: subprocess.Popen[str], limit: float = 60.0) -> tuple[int, str, str]:
    """Its exit status, output and errors; it is killed when the limit passes."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still ran after {limit} s\n{out}\n{err}") from None
    return process.returncode, out, err


# --- deadlines ---

PRESETS = """
import hfreduce
from hfreduce.params import join_timeout
comm = hfreduce.Communicator(0, 1)
print(comm.timeout, join_timeout(comm.timeout), join_timeout(7.0), hfreduce.Communicator(0, 1, timeout=7).timeout)
"""


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, [1800, 300, 7, 7]),
        ({"HFREDUCE_TIMEOUT": "50"}, [50, 50, 7, 7]),
        ({"HFREDUCE_JOIN_TIMEOUT": "2"}, [1800, 2, 2, 7]),
        ({"HFREDUCE_TIMEOUT": "0", "HFREDUCE_JOIN_TIMEOUT": "0"}, [1800, 300, 7, 7]),
    ],
)
def test_presets(variables: dict[str, str], told: list[float]) -> None:
    code, out, err = ended(start(PRESETS, **{"HFREDUCE_TIMEOUT": "", **variables}))
    assert code == 0, err
    assert [float(word) for word in out.split()] == told


JOIN = """
import hfreduce, time
made = {made}
begin = time.monotonic()
try:
    {join}
except TimeoutError as error:
    print(f"{{time.monotonic() - begin:.2f}} {{error}}")
"""


@pytest.mark.parametrize(
    ("made", "join", "variables"),
    [
        ("None", "hfreduce.Communicator(0, 2, hfreduce.get_unique_id(local=True))", {"HFREDUCE_JOIN_TIMEOUT": "1"}),
        ("None", "hfreduce.Communicator(0, 2, hfreduce.get_unique_id(local=True), timeout=1)", {}),
        ("None", "hfreduce.Communicator(0, 2, hfreduce.get_unique_id(local=True))", {"HFREDUCE_TIMEOUT": "1"}),
        ("None", "from hfreduce import nccl; nccl.NcclCommunicator(2, nccl.get_unique_id(), 0)", {"HFREDUCE_JOIN_TIMEOUT": "1"}),
    ],
    ids=["join_timeout", "timeout", "the operations' timeout", "nccl"],
)
def test_joining_ends_by_its_deadline(made: str, join: str, variables: dict[str, str]) -> None:
    program = JOIN.format(made=made, join=join).replace("except TimeoutError", "except Exception")
    code, out, err = ended(start(program, **{"HFREDUCE_TIMEOUT": "", **variables}), 30)
    assert code == 0, err
    assert 0.9 < float(out.split()[0]) < SOON, out
    assert "within 1 s" in out, out


def join_deadlines(comm: Any) -> list[float]:
    """Seconds until a split and a shrink that nobody else calls fail."""
    if comm.rank:
        time.sleep(3.5)
        return []
    seconds = []
    for call in (lambda: comm.split(0), lambda: comm.shrink([2])):
        begin = time.monotonic()
        with pytest.raises(hfreduce.DeadlineError):
            call()
        seconds.append(time.monotonic() - begin)
    return seconds


def test_split_and_shrink_have_the_deadline_of_joining(run_ranks: Any) -> None:
    seconds = run_ranks(join_deadlines, 3, comm_timeout=60.0, env={"HFREDUCE_JOIN_TIMEOUT": "1"})[0]
    assert all(0.9 < each < SOON for each in seconds), seconds


LEAVING = """
import hfreduce, numpy as np, sys, time
comm = hfreduce.init()
if comm.rank == 1:
    print("joined", flush=True)
    sys.stdin.read()
work = comm.recv(np.zeros(4), 1, async_op=True)
begin = time.monotonic()
if {close}:
    comm.close()
    print(f"{{time.monotonic() - begin:.1f}}")
"""


@pytest.mark.slow
def test_close_and_exit_wait_half_a_minute() -> None:
    """Two programs with a receive that nobody answers: one closes the communicator, one comes to its end."""
    jobs, silent = [], []
    with reserved_address() as one, reserved_address() as other:
        begin = time.monotonic()
        for address, close in ((one, True), (other, False)):
            shared = {"HFREDUCE_ADDR": address, "HFREDUCE_NRANKS": "2", "HFREDUCE_TIMEOUT": "600"}
            program = LEAVING.format(close=close)
            jobs.append(start(program, HFREDUCE_RANK="0", **shared))
            command = [sys.executable, "-c", program]
            silent.append(subprocess.Popen(command, env=environment(HFREDUCE_RANK="1", **shared), stdin=subprocess.PIPE))
        try:
            ends = [ended(process, 70) for process in jobs]
            assert 29 < time.monotonic() - begin < 60
        finally:
            for process in silent:
                process.kill()
                process.wait()
    for code, _, err in ends:
        assert code == 0, err
        assert "is being closed" in err, err
        assert "waiting for rank 1 on" in err, err
    assert 29 < float(ends[0][1]) < 45, ends[0]
