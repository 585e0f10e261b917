"""Waits: their deadlines, what they say of themselves, and how a signal handler's exception ends them."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
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


# --- waits that speak ---


def lines(log: Path) -> list[str]:
    """Warnings without their heads."""
    return [line.partition(" WARN ")[2] for line in log.read_text().splitlines()] if log.exists() else []


def times(said: list[str], pattern: str) -> list[float]:
    """Seconds in the lines that match a pattern with one group."""
    return [float(match[1]) for line in said if (match := re.fullmatch(pattern, line))]


def doubling(seconds: list[float], first: float) -> bool:
    """Said at `first`, then at intervals that double, or later where the machine is busy."""
    assert seconds
    return seconds[0] < first + SOON and all(told > first * 2**i - 0.1 for i, told in enumerate(seconds))


def call_and_wait(comm: Any, kind: str) -> None:
    """Rank 0 comes late; to send, rank 2 too."""
    x = np.ones(4, np.float32)
    if kind == "recv":
        if comm.rank == 1:
            for work in [comm.recv(x.copy(), peer, async_op=True) for peer in (0, 2)]:
                work.wait()
        else:
            time.sleep(2.6)
            comm.send(x, 1)
        return
    if comm.rank == 0:
        time.sleep(2.6)
    if kind == "barrier":
        comm.barrier()
    elif kind == "nobody":
        work = comm.all_reduce(x, async_op=True)
        time.sleep(3.0)
        work.wait()
    else:
        comm.all_reduce(x)


@pytest.mark.parametrize("nodes", [[0, 0, 0], [0, 1, 1]], ids=["one node", "two nodes"])
@pytest.mark.parametrize(
    ("kind", "named"), [("all", "all_reduce"), ("nobody", "all_reduce"), ("barrier", "barrier"), ("recv", "recv")]
)
def test_a_wait_says_for_whom(run_ranks: Any, tmp_path: Path, nodes: list[int], kind: str, named: str) -> None:
    log = tmp_path / "log"

    def env(rank: int) -> dict[str, str]:
        return {"HFREDUCE_WARN_AFTER": "0.5", "HFREDUCE_DEBUG_FILE": str(log), "HFREDUCE_HOSTID": f"node{nodes[rank]}"}

    run_ranks(call_and_wait, 3, kind, comm_timeout=60.0, env=env)
    said = lines(log)
    more = "; 1 more send or receive waits" if kind == "recv" else ""
    for rank in (1,) if kind == "recv" else (1, 2):
        seconds = times(said, rf"rank {rank} on \S+ waits for rank \d on \S+ in {named} #1 \(([0-9.]+) s of 60 s{more}\)")
        assert doubling(seconds, 0.5), said
        assert len(seconds) >= 2, said
        if rank == 1:
            assert any(f"rank 1 on {socket.gethostname().partition('.')[0]} waits for rank 0 on" in line for line in said), said
    assert not any(line.startswith("rank 0") for line in said), said


def test_no_wait_speaks_when_told_not_to(run_ranks: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_ranks(call_and_wait, 2, "all", env={"HFREDUCE_WARN_AFTER": "0", "HFREDUCE_DEBUG_FILE": str(log)})
    assert not lines(log)


def make_and_wait(comm: Any, how: str) -> None:
    if comm.rank == 2:
        time.sleep(3.6)
    (comm.split(0) if how == "split" else comm.shrink([0])).close() if comm.rank or how == "split" else None


@pytest.mark.parametrize("how", ["split", "shrink"])
def test_split_and_shrink_say_for_whom(run_ranks: Any, tmp_path: Path, how: str) -> None:
    log = tmp_path / "log"
    run_ranks(make_and_wait, 3, how, comm_timeout=60.0, env={"HFREDUCE_WARN_AFTER": "1.5", "HFREDUCE_DEBUG_FILE": str(log)})
    pattern = (
        r"rank 1 on \S+ waits for rank 2 on \S+ in all_gather #1 of split \(([0-9.]+) s of 60 s\)"
        if how == "split"
        else r"1 of 2 ranks have joined, missing rank 1 \(([0-9.]+) s of 60 s\)"
    )
    assert doubling(times(lines(log), pattern), 1.5), lines(log)


COMING = """
import hfreduce
hfreduce.init().close()
"""


def test_joining_says_who_is_missing(tmp_path: Path) -> None:
    """First rank 1 alone, then the root, then the last."""
    log = tmp_path / "log"
    with reserved_address() as address:
        shared = {"HFREDUCE_ADDR": address, "HFREDUCE_NRANKS": "3", "HFREDUCE_WARN_AFTER": "1.5", "HFREDUCE_TIMEOUT": ""}
        ranks = []
        for rank, pause in ((1, 2.5), (0, 4.0), (2, 0.0)):
            ranks.append(start(COMING, HFREDUCE_RANK=str(rank), HFREDUCE_DEBUG_FILE=f"{log}{rank}", **shared))
            time.sleep(pause)
        for process in ranks:
            code, _, err = ended(process)
            assert code == 0, err
    told = {rank: lines(Path(f"{log}{rank}")) for rank in range(3)}
    alone = times(told[1], rf"rank 1 waits for rank 0 at {re.escape(address)} \(([0-9.]+) s of 300 s\): Connection refused")
    root = times(told[0], r"2 of 3 ranks have joined, missing rank 2 \(([0-9.]+) s of 300 s\)")
    assert doubling(alone, 1.5), told
    assert doubling(root, 1.5), told
    assert not told[2] and not any("missing" in line for line in told[1]), told
