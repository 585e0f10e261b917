"""Faults: ranks that die, stop, leave, disagree or never come, strangers at the door; the error, its time, and what is left behind.

The times are the contract's: 1 s to notice a death, the deadline plus half a second for anything else, the heartbeat for a
stopped process. time.monotonic() is one clock for all processes of a machine, so times of different ranks are compared.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hfreduce
from hfreduce import (
    AbortedError,
    Communicator,
    DeadlineError,
    HfreduceError,
    InvalidUsageError,
    MismatchError,
    PeerLostError,
    UniqueId,
)

# Seconds, on a machine that other work shares: each is far from the deadline that would have ended the wait otherwise. How long
# it takes on quiet cores (a death is known within a second) is measured by the benchmarks.
NOTICE = 6.0  # from a death to the error at every survivor
SLACK = 6.0  # from a deadline to its error


class Hosts:
    """The variables of the ranks: rank r plays host nodes[r]; `more` for all, `special` for some."""

    def __init__(
        self, nodes: tuple[int, ...], more: dict[str, str] | None = None, special: dict[int, dict[str, str]] | None = None
    ):
        self.nodes, self.more, self.special = nodes, more or {}, special or {}

    def __call__(self, rank: int) -> dict[str, str]:
        spin = {"HFREDUCE_SPIN": "16"} if len(self.nodes) > (os.cpu_count() or 1) else {}
        return {"HFREDUCE_HOSTID": f"host{self.nodes[rank]}", **spin, **self.more, **self.special.get(rank, {})}


def joined(rank: int, nranks: int, tag: int, timeout: float = 10.0) -> Communicator:
    """A communicator among the ranks of run_ranks(comm=False); each tag another one."""
    unique_id = UniqueId.from_address(os.environ["HFREDUCE_ADDR"], os.environ["HFREDUCE_SECRET"], tag)
    return Communicator(rank, nranks, unique_id, timeout=timeout)


def resources() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def left_over(before: tuple[int, int]) -> str:
    """What this process has more than before, in words; "" if nothing. What is closed asynchronously has 2 s."""
    end = time.monotonic() + 2
    while (now := resources()) > before or now[1] > before[1]:
        if time.monotonic() > end:
            links = {}
            for fd in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    links[fd] = os.readlink(f"/proc/self/fd/{fd}")
            return f"descriptors and threads were {before}, are {now}: {links}"
        time.sleep(0.02)
    return ""


@pytest.fixture(autouse=True)
def shared_memory_files() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "hf" in name.lower()]


def warm_up(rank: int, nranks: int) -> tuple[int, int]:
    """Start what a process needs once (watcher, progress thread, listeners); what it then holds."""
    with joined(rank, nranks, 1000) as comm:
        comm.all_reduce(np.ones(1), async_op=True).wait()
        comm.barrier()
    time.sleep(0.3)
    return resources()


# --- loops in which a rank is killed ---


def _ring(comm: Communicator, x: Any) -> None:
    with comm.group():
        comm.send(x, (comm.rank + 1) % comm.nranks)
        comm.recv(np.empty_like(x), (comm.rank - 1) % comm.nranks)


LOOPS: dict[str, tuple[int, Callable[[Communicator, Any], Any]]] = {
    "all_reduce small": (4, lambda comm, x: comm.all_reduce(x)),
    "all_reduce": (300_000, lambda comm, x: comm.all_reduce(x)),
    "all_reduce async": (300_000, lambda comm, x: comm.all_reduce(x, async_op=True).wait()),
    "all_gather": (100_000, lambda comm, x: comm.all_gather(x, np.empty(x.size * comm.nranks, x.dtype))),
    "reduce_scatter": (20_000 * 60, lambda comm, x: comm.reduce_scatter(x, np.empty(x.size // comm.nranks, x.dtype))),
    "broadcast": (300_000, lambda comm, x: comm.broadcast(x)),
    "send/recv": (300_000, _ring),
    "barrier": (1, lambda comm, x: comm.barrier()),
}


def later(seconds: float, signal_: int, note: str) -> None:
    """Send this process a signal in a while, leaving the time and the pid in the file `note`."""

    def act() -> None:
        time.sleep(seconds)
        Path(note + ".new").write_text(f"{time.monotonic()} {os.getpid()}")
        os.rename(note + ".new", note)
        os.kill(os.getpid(), signal_)

    threading.Thread(target=act, daemon=True).start()


def lose_one(rank: int, nranks: int, loop: str, victim: int, signal_: int, note: str) -> dict[str, Any]:
    """Loop until the victim is lost; then look for leaks and start again without it."""
    before = warm_up(rank, nranks)
    comm = joined(rank, nranks, 1)
    count, call = LOOPS[loop]
    x = np.zeros(count, np.float32)
    comm.barrier()
    if rank == victim:
        later(0.3, signal_, note)
    result: dict[str, Any] = {"rounds": 0}
    try:
        while True:
            call(comm, x)
            result["rounds"] += 1
    except HfreduceError as error:
        result.update(time=time.monotonic(), error=error)
    started = time.monotonic()
    with contextlib.suppress(HfreduceError):
        comm.barrier()  # a broken communicator stays broken, at once
        result["late"] = "a call on the broken communicator succeeded"
    result["again"] = time.monotonic() - started
    comm.close()
    result["close"] = time.monotonic() - started
    result["left"] = left_over(before)
    if rank == victim:
        return result
    survivors = [r for r in range(nranks) if r != victim]
    time.sleep(0.3)  # the kernel closes the dead process' sockets one after another: its listener may be the last
    result["sum"] = float(len(survivors))
    if signal_ == signal.SIGKILL or victim:  # a stopped rank 0 still holds the address
        with joined(survivors.index(rank), len(survivors), 2) as again:
            result["sum"] = float(again.all_reduce(np.ones(1000, np.float32))[-1])
    if signal_ == signal.SIGSTOP and rank == survivors[0]:
        os.kill(int(Path(note).read_text().split()[1]), signal.SIGCONT)
    return result


def check_survivors(outcomes: list[Any], victim: int, lost_at: float, within: float) -> None:
    nranks = len(outcomes)
    for outcome in outcomes:
        if outcome.rank == victim:
            continue
        assert outcome.ok, str(outcome)
        value = outcome.value
        error = value["error"]
        assert isinstance(error, PeerLostError), repr(error)
        assert isinstance(error, ConnectionError)
        assert error.peer == victim, f"rank {outcome.rank}: peer {error.peer}, not {victim}: {error}"
        assert f"rank {victim} on " in str(error), str(error)
        elapsed = value["time"] - lost_at
        assert -0.1 < elapsed < within, f"rank {outcome.rank} noticed after {elapsed:.3f} s: {error}"
        assert value["rounds"] > 0
        assert "late" not in value, value["late"]
        assert value["again"] < 3, f"the broken communicator took {value['again']:.3f} s to say so"
        assert value["close"] < 5, f"closing took {value['close']:.3f} s"
        assert not value["left"], f"rank {outcome.rank}: {value['left']}"
        assert value["sum"] == nranks - 1


# Two trees over three nodes of two, and five nodes of one: roots, inner nodes and leaves; leaders and others.
KILLS = (
    [((0, 0, 0, 0), loop, victim) for loop in LOOPS for victim in (0, 2)]
    + [((0, 0, 1, 1, 2, 2), "all_reduce", victim) for victim in range(6)]
    + [((0, 1, 2, 3, 4), "all_reduce", victim) for victim in range(5)]
    + [((0, 0, 1, 1), loop, victim) for loop in LOOPS if loop != "all_reduce" for victim in (0, 3)]
)


@pytest.mark.limit(60)
@pytest.mark.parametrize(
    ("nodes", "loop", "victim"), KILLS, ids=lambda value: "".join(map(str, value)) if isinstance(value, tuple) else str(value)
)
def test_kill(run_ranks: Any, tmp_path: Path, nodes: tuple[int, ...], loop: str, victim: int) -> None:
    note = tmp_path / "killed"
    outcomes = run_ranks(
        lose_one, len(nodes), len(nodes), loop, victim, signal.SIGKILL, str(note),
        env=Hosts(nodes), comm=False, check=False, timeout=30,
    )  # fmt: skip
    assert note.exists(), "\n".join(map(str, outcomes))
    check_survivors(outcomes, victim, float(note.read_text().split()[0]), NOTICE)


@pytest.mark.limit(60)
@pytest.mark.parametrize("victim", [0, 1, 3])
@pytest.mark.parametrize("nodes", [(0, 0, 0, 0), (0, 1, 2, 3)], ids=["node", "tcp"])
def test_stop(run_ranks: Any, tmp_path: Path, nodes: tuple[int, ...], victim: int) -> None:
    """SIGSTOP: told by the heartbeat. Woken up, the rank itself gets an error, too."""
    note = tmp_path / "stopped"
    outcomes = run_ranks(
        lose_one, 4, 4, "all_reduce", victim, signal.SIGSTOP, str(note),
        env=Hosts(nodes, {"HFREDUCE_HEARTBEAT": "2"}), comm=False, check=False, timeout=40,
    )  # fmt: skip
    check_survivors(outcomes, victim, float(note.read_text().split()[0]), 2 + NOTICE)
    assert outcomes[victim].ok, str(outcomes[victim])
    assert isinstance(outcomes[victim].value["error"], PeerLostError)
    assert not outcomes[victim].value["left"]


# --- leaving ---


def leave(rank: int, nranks: int, how: str, note: str) -> tuple[float, HfreduceError] | None:
    comm = joined(rank, nranks, 1)
    x = np.ones(50_000, np.float32)
    comm.all_reduce(x)
    if rank == 1:
        time.sleep(0.3)
        Path(note).write_text(str(time.monotonic()))
        if how == "close":
            comm.close()
            time.sleep(2)
        elif how == "_exit":
            os._exit(0)
        else:
            globals()["kept"] = comm  # nobody closes it
        return None
    try:
        comm.all_reduce(x)
    except HfreduceError as error:
        return time.monotonic(), error
    raise AssertionError("all_reduce succeeded without rank 1")


@pytest.mark.limit(40)
@pytest.mark.parametrize("how", ["close", "exit", "_exit"])
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2), (0, 1, 1)], ids=["node", "tcp", "mixed"])
def test_leave_while_others_wait(run_ranks: Any, tmp_path: Path, nodes: tuple[int, ...], how: str) -> None:
    note = tmp_path / "left"
    outcomes = run_ranks(leave, 3, 3, how, str(note), env=Hosts(nodes), comm=False, check=False, timeout=20)
    for rank in (0, 2):
        assert outcomes[rank].ok, str(outcomes[rank])
        when, error = outcomes[rank].value
        assert isinstance(error, PeerLostError), repr(error)
        assert error.peer == 1, str(error)
        assert "rank 1 on " in str(error)
        assert when - float(note.read_text()) < NOTICE, f"rank {rank}: {when - float(note.read_text())} s: {error}"


def finish_and_go(comm: Communicator) -> bool:
    """Ranks leave as soon as they are done, in some order: no error."""
    for _ in range(20):
        comm.all_reduce(np.ones(20_000, np.float32))
        comm.broadcast(np.ones(3), root=comm.nranks - 1)
    time.sleep(0.1 * ((comm.rank * 7) % 3))
    return True


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2, 2)], ids=str)
def test_leaving_in_good_order_is_no_error(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    for _ in range(3):
        run_ranks(finish_and_go, len(nodes), env=Hosts(nodes))


def go_on_without(comm: Communicator) -> str:
    """Rank 1 leaves in good order; the others send to each other after that. What they find wrong."""
    x = np.zeros(1000, np.float32)
    comm.barrier()
    if comm.rank == 1:
        return ""
    time.sleep(1)
    for number in range(3):
        if comm.rank == 0:
            comm.send(np.full(1000, number + 1.0, np.float32), 2)
        else:
            comm.recv(x, 0)
            assert (x == number + 1).all()
    return str(comm.async_error() or "")


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2)], ids=["node", "tcp"])
def test_those_who_stay_go_on(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    """A rank that has left is missed only where it is waited for."""
    assert run_ranks(go_on_without, 3, env=Hosts(nodes)) == [""] * 3


# --- deadlines ---


def absent(comm: Communicator, victim: int, count: int, way: str) -> tuple[float, HfreduceError] | None:
    comm.barrier()
    comm.timeout = 1.5
    if comm.rank == victim:
        end = time.monotonic() + 20  # one that ignores its deadline finds this rank gone then, which is another error
        while comm.async_error() is None and time.monotonic() < end:
            time.sleep(0.01)
        return None
    x = np.ones(count, np.float32)
    start = time.monotonic()
    try:
        if way == "async":
            comm.all_reduce(x, async_op=True).wait()
        elif way == "polled":  # nobody drives it but the progress thread, which sleeps with it
            work = comm.all_reduce(x, async_op=True)
            while not work.done() and time.monotonic() - start < 15:
                time.sleep(0.01)
            if (error := work.exception()) is not None:
                raise error
        elif way == "barrier":
            comm.barrier()
        else:
            comm.all_reduce(x)
    except HfreduceError as error:
        return time.monotonic() - start, error
    raise AssertionError("the operation succeeded without a rank")


@pytest.mark.limit(40)
@pytest.mark.parametrize("way", ["blocking", "async", "polled", "barrier"])
@pytest.mark.parametrize("count", [4, 100_000])
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2), (0, 0, 1, 1)], ids=["node", "tcp", "mixed"])
def test_deadline(run_ranks: Any, nodes: tuple[int, ...], count: int, way: str) -> None:
    if way == "barrier" and count > 4:
        pytest.skip("a barrier has no count")
    victim = 1
    outcomes = run_ranks(absent, len(nodes), victim, count, way, env=Hosts(nodes), timeout=30, check=False)
    for outcome in outcomes:
        if outcome.rank == victim:
            continue
        assert outcome.ok, str(outcome)
        elapsed, error = outcome.value
        assert isinstance(error, DeadlineError), repr(error)
        assert isinstance(error, TimeoutError)
        assert elapsed < 1.5 + SLACK, f"rank {outcome.rank}: {elapsed:.3f} s: {error}"
        assert error.op == ("barrier" if way == "barrier" else "all_reduce")
        assert error.seq == 2  # after the first barrier
        assert error.phase
        assert error.host
        assert error.rank is not None
        assert error.host in str(error)
        assert f"phase {error.phase}" in str(error)
        assert error.peer is not None
        # Who has no part in a link with the absent rank names the one that it waits for itself, which waits for the absent one.
        direct = len(set(nodes)) == 1 or nodes == (0, 1, 2)
        assert re.search(rf"waiting for (rank \d+ on \S+, )*rank {victim if direct else '[0-9]+'} on ", str(error)), str(error)


# --- mismatches ---


def _all_reduce(comm: Communicator, **how: Any) -> Any:
    how = {"dtype": np.float32, "op": "sum", **how}
    return comm.all_reduce(np.ones(how["count"], how["dtype"]), op=how["op"], async_op=how["async_op"])


def _broadcast(comm: Communicator, **how: Any) -> Any:
    return comm.broadcast(np.ones(how["count"], how.get("dtype", np.float32)), how.get("root", 0), async_op=how["async_op"])


def _reduce(comm: Communicator, **how: Any) -> Any:
    return comm.reduce(
        np.ones(how["count"], np.float32), op=how.get("op", "sum"), root=how.get("root", 0), async_op=how["async_op"]
    )


def _all_gather(comm: Communicator, **how: Any) -> Any:
    x = np.ones(how["count"], how.get("dtype", np.float32))
    return comm.all_gather(x, np.zeros(x.size * comm.nranks, x.dtype), async_op=how["async_op"])


def _reduce_scatter(comm: Communicator, **how: Any) -> Any:
    x = np.ones(how["count"] * comm.nranks, np.float32)
    return comm.reduce_scatter(x, np.zeros(how["count"], np.float32), how.get("op", "sum"), async_op=how["async_op"])


def _all_to_all(comm: Communicator, **how: Any) -> Any:
    x = np.ones(how["count"] * comm.nranks, np.float32)
    return comm.all_to_all(x, np.zeros_like(x), async_op=how["async_op"])


def _gather(comm: Communicator, **how: Any) -> Any:
    root = how.get("root", 0)
    x = np.ones(how["count"], np.float32)
    out = np.zeros(x.size * comm.nranks, np.float32) if root == comm.rank else None
    return comm.gather(x, out, root, async_op=how["async_op"])


def _scatter(comm: Communicator, **how: Any) -> Any:
    root = how.get("root", 0)
    out = np.zeros(how["count"], np.float32)
    x = np.ones(out.size * comm.nranks, np.float32) if root == comm.rank else None
    return comm.scatter(x, out, root, async_op=how["async_op"])


def _barrier(comm: Communicator, **how: Any) -> Any:
    return comm.barrier(async_op=how["async_op"])


# What the one calls, what the others call; counts are added.
DISAGREEMENTS: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[..., Any], dict[str, Any]]] = {
    "op": (_all_reduce, {"op": "max"}, _all_reduce, {}),
    "dtype": (_all_reduce, {"dtype": np.int32}, _all_reduce, {}),
    "count": (_all_reduce, {"more": 1}, _all_reduce, {}),
    "count by much": (_all_reduce, {"more": 200_000}, _all_reduce, {}),
    "count 0": (_all_reduce, {"count": 0}, _all_reduce, {}),
    "broadcast root": (_broadcast, {"root": 1}, _broadcast, {}),
    "broadcast count": (_broadcast, {"more": 1}, _broadcast, {}),
    "broadcast dtype": (_broadcast, {"dtype": np.int32}, _broadcast, {}),
    "reduce root": (_reduce, {"root": 1}, _reduce, {}),
    "reduce op": (_reduce, {"op": "prod"}, _reduce, {}),
    "reduce count": (_reduce, {"more": 3}, _reduce, {}),
    "all_gather count": (_all_gather, {"more": 1}, _all_gather, {}),
    "all_gather dtype": (_all_gather, {"dtype": np.uint32}, _all_gather, {}),
    "reduce_scatter op": (_reduce_scatter, {"op": "avg"}, _reduce_scatter, {}),
    "reduce_scatter count": (_reduce_scatter, {"more": 1}, _reduce_scatter, {}),
    "all_to_all count": (_all_to_all, {"more": 1}, _all_to_all, {}),
    "gather root": (_gather, {"root": 1}, _gather, {}),
    "gather count": (_gather, {"more": 1}, _gather, {}),
    "scatter root": (_scatter, {"root": 1}, _scatter, {}),
    "scatter count": (_scatter, {"more": 1}, _scatter, {}),
    "all_reduce, broadcast": (_all_reduce, {}, _broadcast, {}),
    "broadcast, reduce": (_broadcast, {}, _reduce, {}),
    "all_gather, reduce_scatter": (_all_gather, {}, _reduce_scatter, {}),
    "all_gather, all_reduce": (_all_gather, {}, _all_reduce, {}),
    "barrier, all_reduce": (_barrier, {}, _all_reduce, {}),
    "all_reduce, barrier": (_all_reduce, {}, _barrier, {}),
    "gather, scatter": (_gather, {}, _scatter, {}),
}


def disagree(rank: int, nranks: int, chosen: list[tuple[Any, ...]]) -> list[str]:
    """Disagreements x who disagrees x size x way, each on a communicator of its own. What was wrong, in words."""
    complaints = []
    before = None
    for number, (name, odd, count, async_op, rounds) in enumerate(chosen):
        comm = joined(rank, nranks, number, timeout=3)
        where = f"{name}, rank {odd} of {nranks}, count {count}, {'async' if async_op else 'blocking'}, after {rounds}: "
        one, one_how, other, other_how = DISAGREEMENTS[name]
        call, how = (one, dict(one_how)) if rank == odd else (other, dict(other_how))
        how = {"count": count + how.pop("more", 0), "async_op": async_op, **how}
        start = time.monotonic()
        try:
            for _ in range(rounds):
                _all_reduce(comm, count=count, async_op=False)
            result = call(comm, **how)
            if async_op:
                result.wait()
            complaints.append(f"{where}succeeded on rank {rank}")
        except MismatchError as error:
            sides = {int(side) for side in re.findall(r"rank (\d+) on ", str(error))}
            if len(sides) < 2 or odd not in sides:
                complaints.append(f"{where}rank {rank} was not told both sides: {error}")
            if time.monotonic() - start > 2:
                complaints.append(f"{where}rank {rank} was told after {time.monotonic() - start:.2f} s: {error}")
        except HfreduceError as error:
            complaints.append(f"{where}rank {rank} got {error!r}")
        comm.close()
        if before is None:
            time.sleep(0.3)
            before = resources()
    # the progress thread may have started since
    left = left_over((before[0] + 1, before[1] + 1)) if before else ""
    return complaints + ([left] if left else [])


# Across nodes these use different channels on the two sides, so that neither reads a message of the other.
APART = ("count 0", "all_reduce, broadcast", "barrier, all_reduce", "all_reduce, barrier")
MISMATCH_NODES = [(0, 0), (0, 0, 0), (0, 1), (0, 1, 2), (0, 0, 1, 1), (0, 1, 1), (0, 1, 2, 3, 4)]


def run_disagreements(run_ranks: Any, nodes: tuple[int, ...], names: list[str], most: int) -> None:
    nranks = len(nodes)
    combinations = list(itertools.product(names, range(nranks), (4, 100_000), (False, True), (0, 2)))
    dice = random.Random(repr(nodes))
    chosen = dice.sample(combinations, min(len(combinations), most))
    results = run_ranks(disagree, nranks, nranks, chosen, env=Hosts(nodes), comm=False, timeout=80)
    complaints = [line for result in results for line in result]
    assert not complaints, f"{len(complaints)} complaints\n" + "\n".join(complaints[:40])


@pytest.mark.limit(100)
@pytest.mark.parametrize("nodes", MISMATCH_NODES, ids=str)
def test_mismatch(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    names = [name for name in DISAGREEMENTS if len(set(nodes)) == 1 or name not in APART]
    run_disagreements(run_ranks, nodes, names, 70)


@pytest.mark.limit(100)
@pytest.mark.parametrize("nodes", [(0, 1), (0, 1, 2), (0, 0, 1, 1)], ids=str)
def test_mismatch_on_different_channels(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_disagreements(run_ranks, nodes, list(APART), 4)


def unequal_pair(rank: int, sent: int, received: int, dtype: str) -> None:
    with joined(rank, 2, 1, timeout=5) as comm, pytest.raises(MismatchError, match="rank"):
        if rank == 0:
            comm.send(np.ones(sent, np.float32), 1)
            comm.barrier()  # a small send may be over before its receive is posted; what follows must fail
        else:
            comm.recv(np.zeros(received, dtype), 0)


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0), (0, 1)], ids=["node", "tcp"])
@pytest.mark.parametrize(
    ("sent", "received", "dtype"),
    [(10, 20, "float32"), (20, 10, "float32"), (10, 10, "int32"), (0, 5, "float32"), (5, 0, "float32"), (300_000, 300_001, "float32"), (300_000, 10, "float32")],
)  # fmt: skip
def test_send_and_recv_disagree(run_ranks: Any, nodes: tuple[int, ...], sent: int, received: int, dtype: str) -> None:
    run_ranks(unequal_pair, 2, sent, received, dtype, env=Hosts(nodes), comm=False, timeout=20)


def uneven_counts(rank: int, nranks: int, sent: int, expected: int, scale: int) -> None:
    """An all_to_all in which rank 0 sends rank 1 another count than rank 1 expects; all others agree on 3."""
    sends, recvs = [3 * scale] * nranks, [3 * scale] * nranks
    if rank == 0:
        sends[1] = sent * scale
    if rank == 1:
        recvs[0] = expected * scale
    with joined(rank, nranks, 1, timeout=15) as comm:
        x, out = np.ones(sum(sends), np.float32), np.zeros(sum(recvs), np.float32)
        with pytest.raises(MismatchError, match=r"rank 0 on \S+ sends message .* where rank 1 expects"):
            comm.all_to_all(x, out, sends, recvs)
            comm.barrier()  # a rank whose own messages are right may have ended before; what follows must fail


@pytest.mark.limit(60)
@pytest.mark.parametrize("nodes", [(0, 0), (0, 1), (0, 0, 1)], ids=str)
@pytest.mark.parametrize(("sent", "expected"), [(5, 7), (0, 7), (9, 7), (5, 0)])
@pytest.mark.parametrize("scale", [1, 100_000])
def test_uneven_all_to_all_disagrees(run_ranks: Any, nodes: tuple[int, ...], sent: int, expected: int, scale: int) -> None:
    n = len(nodes)
    run_ranks(uneven_counts, n, n, sent, expected, scale, env=Hosts(nodes), comm=False, timeout=40)


# --- abort ---


def aborted(comm: Communicator, count: int, async_op: bool) -> float:
    comm.barrier()
    if comm.rank == 1:
        time.sleep(1.0)
        with pytest.raises(AbortedError, match="rank 0"):
            comm.all_reduce(np.ones(count, np.float32))
        return 0.0
    threads = [threading.Timer(0.3, comm.abort)] if comm.rank == 0 else []
    start = time.monotonic()
    for thread in threads:
        thread.start()
    with pytest.raises(AbortedError, match="rank 0"):
        result = comm.all_reduce(np.ones(count, np.float32), async_op=async_op)
        if async_op:
            result.wait()
    elapsed = time.monotonic() - start
    for thread in threads:
        thread.join()
    assert isinstance(comm.async_error(), AbortedError)
    comm.abort()  # twice is legal
    return elapsed


@pytest.mark.limit(40)
@pytest.mark.parametrize("async_op", [False, True], ids=["blocking", "async"])
@pytest.mark.parametrize("count", [4, 100_000])
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2)], ids=["node", "tcp"])
def test_abort_from_another_thread(run_ranks: Any, nodes: tuple[int, ...], count: int, async_op: bool) -> None:
    times = run_ranks(aborted, 3, count, async_op, env=Hosts(nodes))
    assert max(times) < 0.3 + SLACK, times


# --- strangers ---


def listening_ports() -> list[int]:
    """TCP ports on which this process listens, on IPv4."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{fd}")
            if link.startswith("socket:["):
                inodes.add(link[8:-1])
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sorted({int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes})


def visit(ports: list[int], until: threading.Event, held: list[socket.socket]) -> int:
    """Behave badly at the ports until told to stop: garbage, HTTP, a true greeting then rubbish, silence, resets."""
    dice, visits = random.Random(1), 0
    words = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"CRFH" + bytes(60),
        b"HFRC" + b"\xff" * 60,
        b"\xff" * 100_000,
        b"",
        b"H",
    ]
    while not until.is_set():
        for port in ports:
            with contextlib.suppress(OSError):
                stranger = socket.create_connection(("127.0.0.1", port), 1)
                stranger.settimeout(0.2)
                word = dice.choice([*words, dice.randbytes(dice.randrange(1, 500))])
                if dice.random() < 0.5:
                    with contextlib.suppress(OSError):
                        stranger.recv(1000)
                with contextlib.suppress(OSError):
                    stranger.sendall(word)
                visits += 1
                fate = dice.random()
                if fate < 0.3 and len(held) < 100:
                    held.append(stranger)  # silent, half open for us
                    if fate < 0.1:
                        stranger.shutdown(socket.SHUT_WR)
                elif fate < 0.6:
                    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                    stranger.close()
                else:
                    stranger.close()
        time.sleep(0.005)
    return visits


def among_strangers(rank: int, nranks: int) -> int:
    """Join while strangers knock at the rendezvous, work while they knock everywhere, join again with 300 at the door."""
    until, held, counts = threading.Event(), [], []  # type: ignore[var-annotated]
    if rank == 1:
        address = int(os.environ["HFREDUCE_ADDR"].rsplit(":", 1)[1])
        early = threading.Thread(target=lambda: counts.append(visit([address], until, held)))
        early.start()
        time.sleep(1.0)  # the others wait at the rendezvous, with the strangers
    comm = joined(rank, nranks, 1)
    assert listening_ports()
    knocking = threading.Thread(target=lambda: counts.append(visit(listening_ports(), until, held)))
    knocking.start()
    end = time.monotonic() + 2
    going = np.ones(1)
    while going[0]:
        assert comm.all_reduce(np.ones(2000, np.float32))[5] == nranks
        going[0] = float(time.monotonic() < end)
        comm.broadcast(going)
    until.set()
    knocking.join()
    if rank == 1:
        early.join()
    port = listening_ports()[0]
    crowd = []
    if rank == 0:
        for port in listening_ports():
            for _ in range(300):
                crowd.append(socket.create_connection(("127.0.0.1", port), 5))
    comm.barrier()
    for _ in range(100):
        assert comm.all_reduce(np.ones(2000, np.float32))[5] == nranks
    with joined(rank, nranks, 2, timeout=15) as second:
        assert second.all_reduce(np.ones(3))[0] == nranks
    comm.barrier()
    comm.close()
    for stranger in held + crowd:
        stranger.close()
    return sum(counts)


@pytest.mark.limit(60)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2)], ids=["node", "tcp"])
def test_strangers(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    visits = run_ranks(among_strangers, 3, 3, env=Hosts(nodes), comm=False, timeout=45)
    assert sum(visits) > 100


def join_only(rank: int, timeout: float = 2.0) -> tuple[float, HfreduceError | None]:
    start = time.monotonic()
    try:
        hfreduce.init(timeout=timeout).close()
    except HfreduceError as error:
        return time.monotonic() - start, error
    return time.monotonic() - start, None


def gave_up(error: HfreduceError | None, words: str, outcomes: list[Any]) -> None:
    """Somebody's deadline passes first and names who is missing; to the others that one then has left."""
    values = [outcome.value if hasattr(outcome, "value") else outcome for outcome in outcomes]
    assert any(isinstance(e, DeadlineError) and words in str(e) for _, e in values), values
    assert isinstance(error, (DeadlineError, PeerLostError)), repr(error)
    if isinstance(error, PeerLostError):
        assert "while the ranks were joining" in str(error), str(error)
    else:
        assert words in str(error), str(error)


@pytest.mark.limit(40)
def test_wrong_secret(run_ranks: Any) -> None:
    outcomes = run_ranks(join_only, 3, env=Hosts((0, 1, 2), special={2: {"HFREDUCE_SECRET": "ab" * 16}}), comm=False, check=False)
    for outcome in outcomes:
        assert outcome.ok, str(outcome)
        elapsed, error = outcome.value
        assert elapsed < 2 + SLACK
        if outcome.rank == 2:
            assert isinstance(error, HfreduceError)
            assert "secret" in str(error), str(error)
        else:
            gave_up(error, "missing rank 2", outcomes)


@pytest.mark.limit(40)
def test_missing_rank(run_ranks: Any) -> None:
    outcomes = run_ranks(join_only, 2, env={"HFREDUCE_NRANKS": "4"}, comm=False)
    for elapsed, error in outcomes:
        gave_up(error, "missing rank 2, rank 3", outcomes)
        assert elapsed < 2 + SLACK


@pytest.mark.limit(40)
@pytest.mark.parametrize(
    ("special", "words"),
    [({2: {"HFREDUCE_RANK": "1"}}, "rank 1 joined twice"), ({2: {"HFREDUCE_NRANKS": "4"}}, "give all the same number")],
    ids=["duplicate", "nranks"],
)
def test_ranks_that_cannot_be(run_ranks: Any, special: dict[int, dict[str, str]], words: str) -> None:
    for elapsed, error in run_ranks(join_only, 3, 20.0, env=Hosts((0, 1, 2), special=special), comm=False):
        assert isinstance(error, HfreduceError)
        assert words in str(error), str(error)
        assert elapsed < NOTICE


# --- fork ---


def fork_and_use(comm: Communicator) -> str:
    """A forked child: an error where it uses the parent's communicator, one of its own works, and the parent goes on."""
    x = np.ones(1000, np.float32)
    comm.all_reduce(x, async_op=True).wait()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        said = "nothing"
        try:
            signal.alarm(15)
            for call in (
                lambda: comm.all_reduce(x),
                lambda: comm.all_reduce(np.ones(100_000)),
                lambda: comm.all_reduce(x, async_op=True),
                lambda: comm.barrier(),
                lambda: comm.split(0),
                lambda: comm.send(x, 0),
            ):
                start = time.monotonic()
                with pytest.raises(InvalidUsageError, match="fork"):
                    call()
                assert time.monotonic() - start < 5
            with Communicator(0, 1) as alone:
                assert alone.all_reduce(np.ones(5), async_op=True).wait()[0] == 1
                with alone.duplicate() as twice:
                    assert twice.all_reduce(np.ones(5))[0] == 1
            comm.close()
            said = "fine"
        except BaseException as error:
            said = repr(error)
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    for _ in range(50):
        comm.all_reduce(np.ones(1000, np.float32))
    said = os.read(reader, 10000).decode()
    os.waitpid(child, 0)
    comm.all_reduce(np.ones(1000, np.float32))
    comm.barrier()
    return said


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0), (0, 1)], ids=["node", "tcp"])
def test_fork(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    assert run_ranks(fork_and_use, 2, env=Hosts(nodes)) == ["fine", "fine"]


def fork_and_count(rank: int, nranks: int) -> list[str]:
    """What a forked child still holds of the descriptors that the library opened in its parent."""

    def descriptors() -> dict[str, str]:
        return {
            fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
        }

    before = descriptors()
    with joined(rank, nranks, 1) as comm, comm.duplicate() as twice:
        for one in (comm, twice):
            one.all_reduce(np.ones(100_000), async_op=True).wait()
            _ring(one, np.ones(1000))
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            left = {fd: link for fd, link in descriptors().items() if before.get(fd) != link}
            os.write(writer, "\n".join(f"{fd} is {left[fd]}" for fd in left if int(fd) not in (reader, writer)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            held = pipe.read().splitlines()
        os.waitpid(child, 0)
        comm.barrier()
    return held


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0), (0, 1)], ids=["node", "tcp"])
def test_forked_child_holds_no_descriptors(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    assert run_ranks(fork_and_count, 2, 2, env=Hosts(nodes), comm=False) == [[], []]


def die_with_a_child(rank: int, nranks: int, victim: int, note: str) -> tuple[float, HfreduceError]:
    comm = joined(rank, nranks, 1)
    x = np.ones(100_000, np.float32)
    comm.all_reduce(x)
    if rank == victim:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(6)
            # it keeps every descriptor that it inherited: the connections of its parent stay open
            while True:
                time.sleep(1)
        later(0.3, signal.SIGKILL, note)
    try:
        while True:
            comm.all_reduce(x)
    except HfreduceError as error:
        return time.monotonic(), error


@pytest.mark.limit(40)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2)], ids=["node", "tcp"])
def test_death_is_noticed_though_a_forked_child_lives(
    run_ranks: Any, tmp_path: Path, nodes: tuple[int, ...], victim: int
) -> None:
    note = tmp_path / "killed"
    outcomes = run_ranks(die_with_a_child, 3, 3, victim, str(note), env=Hosts(nodes), comm=False, check=False, timeout=12)
    for outcome in outcomes:
        if outcome.rank != victim:
            assert outcome.ok, str(outcome)
            when, error = outcome.value
            assert isinstance(error, PeerLostError), repr(error)
            assert error.peer == victim
            assert when - float(note.read_text().split()[0]) < NOTICE


# --- a signal handler that raises ---


class Interrupted(Exception):
    """What the signal handler raises."""


def interrupted_early(comm: Any, way: str) -> tuple[int, float]:
    """Rank 0 is interrupted before a blocking call has come back to Python for the first time."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted

    x = np.full(100_000, comm.rank + 1.0)
    calls = {
        "array": lambda: comm.all_reduce(x),
        "list": lambda: comm.all_reduce(memoryview(x)),
        "barrier": comm.barrier,
    }
    comm.barrier()
    if comm.rank:
        time.sleep(1)
        calls[way]()
        return 0, float(x[0])
    before = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    with pytest.raises(Interrupted):
        calls[way]()
    signal.signal(signal.SIGUSR1, before)
    running = list(comm._handle.running)
    for work in running:
        work.wait()
    return len(running), float(x[0])


@pytest.mark.limit(30)
@pytest.mark.parametrize("way", ["array", "list", "barrier"])
def test_interrupted_call_goes_on(run_ranks: Any, way: str) -> None:
    """It becomes asynchronous work, which keeps the arrays and can be waited for."""
    value = 1.0 if way == "barrier" else 3.0
    assert run_ranks(interrupted_early, 2, way)[0] == (1, value)


# --- many communicators ---


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many_times(rank: int, nranks: int, times: int) -> tuple[str, int]:
    before = warm_up(rank, nranks)
    resident = 0
    for number in range(times):
        with joined(rank, nranks, 5000 + number) as comm:
            assert comm.all_reduce(np.ones(10))[0] == nranks
            if number % 10 == 0:
                comm.all_reduce(np.ones(100_000), async_op=True).wait()
            comm.barrier()
        if number == times // 4:
            resident = _resident()
    return left_over(before), _resident() - resident


@pytest.mark.limit(90)
@pytest.mark.parametrize("nodes", [(0, 0), (0, 1)], ids=["node", "tcp"])
def test_200_communicators_leak_nothing(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    for left, grown in run_ranks(many_times, 2, 2, 200, env=Hosts(nodes), comm=False, timeout=75):
        assert not left
        assert grown < 4 << 20, f"{grown >> 10} KiB more after 150 more communicators"


def sixteen(comm: Communicator) -> list[float]:
    """Sixteen at once: async operations on all, issued and awaited in different orders on different ranks."""
    before = resources()
    comms = [comm.duplicate() for _ in range(16)]
    resources_used = resources()[0] - before[0]
    assert resources()[1] - before[1] <= 1, "a thread for each communicator"
    arrays = [np.full(20_000 + number, float(comm.rank + number), np.float32) for number in range(16)]
    order = list(range(16))
    random.Random(comm.rank).shuffle(order)
    works = {number: comms[number].all_reduce(arrays[number], async_op=True) for number in order}
    random.Random(comm.rank + 100).shuffle(order)
    for number in order:
        works[number].wait()
        expected = sum(r + number for r in range(comm.nranks))
        assert (arrays[number] == expected).all(), number
    for one in comms[::2]:
        one.close()
    comm.barrier()
    for one in comms[1::2]:
        assert one.all_reduce(np.ones(3))[0] == comm.nranks
    comm.barrier()
    for one in comms[1::2]:
        one.close()
    assert not left_over((before[0] + 8, before[1] + 1))
    return [float(resources_used)]


@pytest.mark.limit(60)
@pytest.mark.parametrize(
    ("nodes", "threads"), [((0, 0, 0), False), ((0, 1, 2), False), ((0, 0, 0), True)], ids=["node", "tcp", "threads"]
)
def test_sixteen_communicators_at_once(run_ranks: Any, nodes: tuple[int, ...], threads: bool) -> None:
    if threads:
        run_ranks(sixteen_in_threads, 3, threads=True, timeout=40)
    else:
        run_ranks(sixteen, len(nodes), env=Hosts(nodes), timeout=40)


def sixteen_in_threads(comm: Communicator) -> None:
    comms = [comm.duplicate() for _ in range(16)]
    works = [one.all_reduce(np.full(5000, comm.rank + 1.0), async_op=True) for one in reversed(comms)]
    for work in works:
        assert (work.wait() == comm.nranks * (comm.nranks + 1) / 2).all()
    comm.barrier()
    for one in comms:
        one.close()


def split_up(comm: Communicator) -> None:
    rank, n = comm.rank, comm.nranks
    with comm.split(rank % 2, key=-rank) as part:  # type: ignore[union-attr]
        members = sorted((r for r in range(n) if r % 2 == rank % 2), key=lambda r: -r)
        assert (part.rank, part.nranks) == (members.index(rank), len(members))
        got = np.zeros(part.nranks, np.int64)
        part.all_gather(np.array([rank]), got)
        assert got.tolist() == members
        part.barrier()
    part_or_none = comm.split(None if rank == 0 else 5)
    assert (part_or_none is None) == (rank == 0)
    if part_or_none is not None:
        assert part_or_none.nranks == n - 1
        assert part_or_none.all_reduce(np.ones(40_000))[9] == n - 1
        part_or_none.barrier()
        part_or_none.close()
    with comm.split(rank) as alone:  # type: ignore[union-attr]
        assert (alone.rank, alone.nranks) == (0, 1)
        assert alone.all_reduce(np.ones(3))[0] == 1
    with comm.duplicate() as same, same.duplicate() as third:
        assert (same.rank, same.nranks, same.node, same.nodes) == (rank, n, comm.node, comm.nodes)
        works = [c.all_reduce(np.ones(9), async_op=True) for c in ((third, same, comm) if rank % 2 else (comm, same, third))]
        assert [float(work.wait()[0]) for work in works] == [n] * 3
        comm.barrier()
    comm.barrier()


@pytest.mark.limit(40)
@pytest.mark.parametrize("threads", [False, True], ids=["processes", "threads"])
@pytest.mark.parametrize("nodes", [(0, 0, 0, 0, 0), (0, 1, 1, 0, 2)], ids=["node", "mixed"])
def test_split(run_ranks: Any, nodes: tuple[int, ...], threads: bool) -> None:
    if threads and len(set(nodes)) > 1:
        pytest.skip("the ranks of one process are on one node")
    run_ranks(split_up, len(nodes), env=Hosts(nodes), threads=threads)


def split_late(comm: Any) -> float:
    if comm.rank == 1:
        time.sleep(1.0)  # longer than a blocking call waits before it looks at the program's signals
    with comm.split(comm.rank % 2) as part:
        return float(part.all_reduce(np.ones(1))[0])


@pytest.mark.limit(40)
def test_split_waits_for_ranks_that_come_late(run_ranks: Any) -> None:
    assert run_ranks(split_late, 4) == [2.0] * 4


def lose_a_part(rank: int, nranks: int, note: str) -> HfreduceError | float:
    """A death breaks the communicators that the dead rank was in, and no other."""
    comm = joined(rank, nranks, 1)
    part = comm.split(int(rank >= 2))
    assert part is not None
    part.all_reduce(np.ones(10))
    comm.barrier()
    if rank == 3:
        later(0.2, signal.SIGKILL, note)
        time.sleep(10)
    if rank == 2:
        with pytest.raises(PeerLostError) as caught:
            part.all_reduce(np.ones(10))
        return caught.value
    end = time.monotonic() + 1.5
    going = np.ones(1)
    rounds = 0
    while going[0] == 2 or not rounds:
        going[0] = float(time.monotonic() < end)
        part.all_reduce(going)
        rounds += 1
    assert isinstance(comm.async_error(), PeerLostError)
    with pytest.raises(PeerLostError):
        comm.barrier()
    return float(rounds)


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 1, 1)], ids=["node", "tcp", "mixed"])
def test_death_breaks_only_its_communicators(run_ranks: Any, tmp_path: Path, nodes: tuple[int, ...]) -> None:
    outcomes = run_ranks(lose_a_part, 4, 4, str(tmp_path / "killed"), env=Hosts(nodes), comm=False, check=False, timeout=15)
    assert all(outcome.ok for outcome in outcomes[:3]), "\n".join(map(str, outcomes))
    assert outcomes[2].value.peer == 1  # its rank in the part


def time_to_join(rank: int, nranks: int, begin: float) -> tuple[float, float]:
    time.sleep(max(0.0, begin - time.monotonic()))
    start = time.monotonic()
    comm = joined(rank, nranks, 1, timeout=60)
    took = time.monotonic() - start
    assert comm.all_reduce(np.ones(1))[0] == nranks
    comm.barrier()
    comm.close()
    return start, took


@pytest.mark.limit(120)
def test_64_local_ranks(run_ranks: Any) -> None:
    """The time is printed, not judged: 64 processes on the cores of a test machine."""
    begin = time.monotonic() + 5
    results = run_ranks(time_to_join, 64, 64, begin, comm=False, timeout=100)
    first, last = min(start for start, _ in results), max(start + took for start, took in results)
    print(
        f"64 local ranks: {last - first:.2f} s from the first call to the last return, slowest call {max(t for _, t in results):.2f} s"
    )


# --- shrinking ---


def shrink_after_death(rank: int, nranks: int, victims: list[int], abort: bool) -> tuple[int, float]:
    comm = joined(rank, nranks, 1)
    x = np.full(100_000, 2.0**rank, np.float32)
    if rank in victims:
        comm.all_reduce(x)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises((PeerLostError, AbortedError)):  # the latter from a survivor that is quicker to shrink
        for _ in range(10_000):
            comm.all_reduce(x)
    start = time.monotonic()
    rest = comm.shrink(victims, abort=abort)
    seconds = time.monotonic() - start
    y = np.full(50_000, 2.0**rank, np.float32)
    rest.all_reduce(y)
    assert (y == sum(2.0**r for r in range(nranks) if r not in victims)).all()
    assert rest.rank == sum(r not in victims for r in range(rank))
    if rest.nranks > 1:  # and that one's ranks can go on so
        again = rest.shrink([rest.nranks - 1]) if rest.rank < rest.nranks - 1 else None
        if again is not None:
            again.barrier()
            again.close()
    size = rest.nranks
    rest.close()
    comm.close()
    return size, seconds


@pytest.mark.parametrize("nodes", [(0, 0), (0, 0, 0), (0, 0, 1, 1), (0, 1, 2)])
@pytest.mark.parametrize(("victims", "abort"), [([0], False), ([0], True), ([1], False), ([1], True)])
def test_shrink(run_ranks: Any, nodes: tuple[int, ...], victims: list[int], abort: bool) -> None:
    """Survivors go on together, whoever died: the rank that held all control connections, or the leader of a node."""
    n = len(nodes)
    outcomes = run_ranks(shrink_after_death, n, n, victims, abort, comm=False, check=False, env=Hosts(nodes))
    for rank, outcome in enumerate(outcomes):
        if rank in victims:
            continue
        assert outcome.ok, outcome
        size, seconds = outcome.value
        assert size == n - len(victims)
        assert seconds < NOTICE


def shrink_differently(rank: int, nranks: int) -> str | None:
    comm = joined(rank, nranks, 1, timeout=3)
    if rank == nranks - 1:
        time.sleep(1)
        comm.close()
        return None
    with pytest.raises(InvalidUsageError) as caught:
        comm.shrink([nranks - 1] if rank == 0 else [nranks - 2 if rank == 1 else 1])
    comm.close()
    return str(caught.value)


def test_shrink_with_different_lists(run_ranks: Any) -> None:
    """Ranks that leave out different ranks hear so, and do not wait for each other."""
    told = run_ranks(shrink_differently, 4, 4, comm=False)
    assert all("leave out different ranks" in text for text in told[:2]), told


def shrink_wrongly(comm: Communicator) -> None:
    for exclude, words in (([comm.nranks], "must be 0 to"), ([-1], "must be 0 to"), ([comm.rank], "this rank")):
        with pytest.raises(hfreduce.InvalidArgumentError, match=words):
            comm.shrink(exclude)
    same = comm.shrink([])  # all stay: another communicator of the same ranks, and this one is as it was
    assert (same.rank, same.nranks) == (comm.rank, comm.nranks)
    for each in (same, comm):
        x = np.ones(3)
        each.all_reduce(x)
        assert (x == comm.nranks).all()
    same.close()


def test_shrink_arguments(run_ranks: Any) -> None:
    run_ranks(shrink_wrongly, 2)


def shrink_twice(comm: Communicator) -> list[float]:
    """Two communicators of all ranks, both made by shrink, and used at the same time."""
    with comm.shrink([]) as first, comm.shrink([]) as second:
        x, y = np.full(50_000, comm.rank + 1.0), np.full(50_000, comm.rank + 10.0)
        works = [first.all_reduce(x, async_op=True), second.all_reduce(y, async_op=True)]
        if comm.rank:
            works.reverse()
        for work in works:
            work.wait()
        second.barrier()
        first.barrier()
    return [x[-1], y[-1]]


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0), (0, 1)], ids=["node", "tcp"])
def test_shrinks_to_the_same_ranks_are_two(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    assert run_ranks(shrink_twice, 2, env=Hosts(nodes)) == [[3.0, 21.0]] * 2
