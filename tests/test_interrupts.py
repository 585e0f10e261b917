"""Exceptions of signal handlers, as Ctrl-C is one, end every wait of the Python front end, and leave nobody waiting."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from programs import environment
from ranks import reserved_address

#: Seconds within which an interrupted call must be back; a second is meant, and the machine may be busy. Deadlines are minutes.
SOON = 10.0

HEAD = """
import os, signal, sys, time
import numpy as np
import hfreduce
from hfreduce import nccl

signal.signal(signal.SIGINT, signal.default_int_handler)
rank, nranks, address = int(os.environ["RANK_"]), int(os.environ["NRANKS_"]), os.environ["ADDRESS_"]

def say(*words):
    print(*words, flush=True)

def init(nranks=nranks):
    return hfreduce.Communicator(rank, nranks, hfreduce.UniqueId.from_address(address))

def interrupted(call, kind=KeyboardInterrupt):
    say("in")
    try:
        call()
    except kind:
        say("interrupted")
    else:
        say("returned")

def closed(comm):
    begin = time.monotonic()
    comm.close() if hasattr(comm, "close") else comm.destroy()
    say("closed", time.monotonic() - begin)

def error_of(call):
    begin = time.monotonic()
    try:
        call()
    except Exception as error:
        say("error", type(error).__name__, time.monotonic() - begin, error)
    else:
        say("no error")

def stay():
    sys.stdin.readline()

x = np.ones(4, np.float32)
"""


class Rank:
    """A process that says a line at a time what it does."""

    def __init__(self, program: str, rank: int, nranks: int, address: str) -> None:
        env = environment(
            RANK_=str(rank), NRANKS_=str(nranks), ADDRESS_=address, HFREDUCE_TIMEOUT="200", HFREDUCE_JOIN_TIMEOUT="200"
        )
        self.said = ""
        command = [sys.executable, "-u", "-c", HEAD + program]
        self.process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1
        )

    def line(self, limit: float = 60.0) -> list[str]:
        """The words of what it says next."""
        assert self.process.stdout is not None
        end = time.monotonic() + limit
        while "\n" not in self.said:  # not readline(): select does not know of what that has read ahead
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            text = os.read(self.process.stdout.fileno(), 4096).decode() if ready else ""
            if not text:
                self.end()
                errors = self.process.stderr.read() if self.process.stderr else ""
                raise AssertionError(f"said nothing within {limit} s\n{errors}")
            self.said += text
        line, _, self.said = self.said.partition("\n")
        return line.split()

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Wait until it is in its call, and send it the signal."""
        assert self.line() == ["in"]
        time.sleep(0.7)
        self.process.send_signal(number)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Job:
    """Ranks that run programs of their own."""

    def __init__(self, *programs: str, nranks: int = 0) -> None:
        self._reserved = reserved_address()
        address = self._reserved.__enter__()
        self.ranks = [Rank(program, rank, nranks or len(programs), address) for rank, program in enumerate(programs)]

    def __enter__(self) -> list[Rank]:
        return self.ranks

    def __exit__(self, *error: Any) -> None:
        for rank in self.ranks:
            rank.end()
        self._reserved.__exit__(None, None, None)


def soon(rank: Rank, word: str) -> list[str]:
    """It says this word next, and soon."""
    begin = time.monotonic()
    words = rank.line(SOON)
    assert words[0] == word, words
    assert time.monotonic() - begin < SOON
    return words


# --- joining ---

ALONE = {
    "Communicator": "interrupted(lambda: hfreduce.Communicator(0, 2, hfreduce.get_unique_id(local=True)))",
    "root": "interrupted(init)",
    "nccl": "interrupted(lambda: nccl.NcclCommunicator(2, nccl.get_unique_id(), 0))",
    "nccl group": """
def join():
    unique_id = nccl.get_unique_id()
    nccl.groupStart()
    comms = [nccl.NcclCommunicator(3, unique_id, rank) for rank in range(2)]
    nccl.groupEnd()
interrupted(join)
""",
    "distributed": """
from hfreduce.distributed import init_process_group
host, port = address.rsplit(":", 1)
interrupted(lambda: init_process_group(2, 0, host=host, port=int(port)))
""",
}


@pytest.mark.parametrize("what", ALONE)
def test_joining(what: str) -> None:
    with Job(ALONE[what] + "\ncomm = hfreduce.Communicator(0, 1); comm.all_reduce(x); say('went on')", nranks=2) as (rank,):
        rank.interrupt()
        soon(rank, "interrupted")
        assert rank.line() == ["went", "on"]


def test_joining_where_no_root_is() -> None:
    with Job("say('absent')", "interrupted(init)") as (absent, rank):
        absent.line()
        rank.interrupt()
        soon(rank, "interrupted")


def test_the_others_hear_of_it() -> None:
    """Of three ranks two have come, and one of them is interrupted."""
    with Job("say('in'); error_of(init); stay()", "interrupted(init); stay()", "", nranks=3) as (root, rank, _):
        root.line()
        rank.interrupt()
        soon(rank, "interrupted")
        assert soon(root, "error")[1] == "AbortedError"


def test_any_exception_of_any_handler() -> None:
    program = """
class Mine(Exception):
    pass

def handler(number, frame):
    raise Mine

signal.signal(signal.SIGUSR1, handler)
interrupted(init, Mine)
"""
    with Job(program, nranks=2) as (rank,):
        rank.interrupt(signal.SIGUSR1)
        soon(rank, "interrupted")


def test_a_handler_that_does_not_raise_ends_nothing() -> None:
    handled = "signal.signal(signal.SIGINT, lambda *_: say('handled'))\n"
    with Job(handled + "interrupted(init); stay()", "stay(); init(); stay()") as (rank, late):
        rank.interrupt()
        soon(rank, "handled")
        late.go_on()
        assert rank.line() == ["returned"]


# --- from another communicator, and the end ---

#: What rank 0 does while rank 1 does not take part, and what rank 1 does once rank 0 was interrupted, with the errors it may get.
PAIRED = {
    "split": ("interrupted(lambda: comm.split(0))", "comm.split(0)", "AbortedError"),
    "duplicate": ("interrupted(comm.duplicate)", "comm.duplicate()", "AbortedError"),
    "shrink": ("interrupted(lambda: comm.shrink([2]))", "comm.shrink([2])", "AbortedError"),
    "all_reduce": ("interrupted(lambda: comm.all_reduce(x))", "comm.barrier()", "MismatchError AbortedError"),
    "group": (
        """
def group():
    with comm.group():
        comm.send(x, 1)
        comm.recv(x.copy(), 1)
interrupted(group)
""",
        "comm.barrier()",
        "AbortedError",
    ),
    "group of two": (
        """
other = hfreduce.Communicator(0, 1)
def group():
    with hfreduce.group():
        comm.recv(x.copy(), 1)
        other.all_reduce(x)
interrupted(group)
""",
        "comm.barrier()",
        "AbortedError",
    ),
    "work": ("interrupted(comm.all_reduce(x, async_op=True).wait)", "comm.barrier()", "MismatchError AbortedError"),
    "close": ("work = comm.recv(x, 1, async_op=True); interrupted(comm.close)", "comm.barrier()", "AbortedError"),
    "reducer": ("interrupted(reducer.synchronize)", "comm.barrier()", "MismatchError AbortedError"),
}


@pytest.mark.parametrize("what", PAIRED)
def test_with_a_peer(what: str) -> None:
    call, other, errors = PAIRED[what]
    nranks = 3 if what == "shrink" else 2
    make = "comm = init()\n" + ("reducer = hfreduce.GradientReducer([x], comm)\n" if what == "reducer" else "")
    first = f"{make}{call}\nclosed(comm)\nstay()"
    second = f"{make}say('joined')\nstay()\nerror_of(lambda: {other})\nclosed(comm)\nstay()"
    with Job(first, second, *["init()\nstay()"] * (nranks - 2)) as (rank, peer, *_):
        peer.line()
        rank.interrupt()
        soon(rank, "interrupted")
        assert float(soon(rank, "closed")[1]) < SOON
        peer.go_on()
        told = soon(peer, "error")
        assert told[1] in errors.split() + ["PeerLostError"], told
        soon(peer, "closed")


NCCL = {
    "allReduce": "comm.allReduce(x.ctypes.data, x.ctypes.data, 4, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, 0)",
    "group": """
    nccl.groupStart()
    comm.recv(x.ctypes.data, 4, nccl.NCCL_FLOAT32, 1, 0)
    nccl.groupEnd()
""",
    "commSplit": "comm.commSplit(0, 0)",
}


@pytest.mark.parametrize("what", NCCL)
def test_with_a_peer_in_nccls_names(what: str) -> None:
    make = "comm = nccl.NcclCommunicator(2, bytes(hfreduce.UniqueId.from_address(address)), rank)\n"
    first = make + f"def call():\n    {NCCL[what].strip()}\ninterrupted(call)\nclosed(comm)\nstay()"
    second = make + "say('joined')\nstay()\nerror_of(lambda: comm.recv(x.ctypes.data, 4, nccl.NCCL_FLOAT32, 0, 0))\nstay()"
    with Job(first, second) as (rank, peer):
        peer.line()
        rank.interrupt()
        soon(rank, "interrupted")
        soon(rank, "closed")
        peer.go_on()
        assert soon(peer, "error")[1] == "NcclError"


def test_an_interrupted_operation_goes_on() -> None:
    """Who waits for it again gets its result."""
    first = """
comm = init()
y = x.copy()
work = comm.all_reduce(y, async_op=True)
interrupted(work.wait)
say("waits")
work.wait()
comm.barrier()
closed(comm)
say(*y)
"""
    with Job(first, "comm = init(); say('joined'); stay(); comm.all_reduce(x); comm.barrier(); stay()") as (rank, peer):
        peer.line()
        rank.interrupt()
        soon(rank, "interrupted")
        soon(rank, "waits")
        peer.go_on()
        soon(rank, "closed")
        assert rank.line() == ["2.0"] * 4


# --- torch ---

TORCH = """
import datetime
import hfreduce.torch
import torch
import torch.distributed as dist

where = os.environ["TMPDIR"] + "/store" + address.rsplit(":", 1)[1]

def torch_init():
    dist.init_process_group("hfreduce", init_method=f"file://{where}", rank=rank, world_size=nranks,
                            timeout=datetime.timedelta(seconds=200))
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("rank", [0, 1])
def test_torch_joining(rank: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    programs = ["say('absent')", "say('absent')"]
    programs[rank] = TORCH + "interrupted(torch_init); os._exit(0)"
    with Job(*programs) as ranks:
        ranks[rank].interrupt()
        soon(ranks[rank], "interrupted")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("call", ["dist.new_group([0, 1])", "dist.barrier()", "dist.recv(torch.ones(4), 1)"])
def test_torch_with_a_peer(call: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    first = TORCH + f"torch_init(); interrupted(lambda: {call}); os._exit(0)"
    with Job(first, TORCH + "torch_init(); say('joined'); stay(); os._exit(0)") as (rank, peer):
        peer.line()
        rank.interrupt()
        soon(rank, "interrupted")
