"""Calls on one communicator from several threads at once: values or errors of the expected kind, whatever the order.

In processes of their own, where freed memory is overwritten (MALLOC_PERTURB_): who still uses it does not get away with it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

VICTIMS = ("small", "large", "async", "group", "init", "close")
ATTACKS = ("close", "abort", "async_error", "connections", "split")

#: Two ranks, which are threads. Rank 0's victim thread calls while its main thread attacks.
COMMON = """
import faulthandler, random, sys, threading, time
import numpy as np
import hfreduce
from hfreduce.errors import AbortedError, InvalidUsageError, MismatchError, PeerLostError

faulthandler.enable()
faulthandler.dump_traceback_later(100, exit=True)

def in_threads(*functions):
    results = [None] * len(functions)
    def run(i):
        try:
            results[i] = functions[i]()
        except BaseException as error:
            results[i] = error
    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    return threads, results

def pair():
    name = hfreduce.get_unique_id()
    threads, comms = in_threads(*(lambda r=r: hfreduce.Communicator(r, 2, name, timeout=60) for r in range(2)))
    for thread in threads:
        thread.join()
    assert all(isinstance(comm, hfreduce.Communicator) for comm in comms), comms
    return comms

def call(comm, what, i, other):
    x = np.full(200_000 if what == "large" or (what == "async" and i % 2) else 4, 1.0, np.float32)
    if what == "async":
        comm.all_reduce(x, async_op=True).wait()
    elif what == "group":
        with comm.group():
            comm.all_reduce(x)
    elif what == "init":
        if i < len(other):
            hfreduce.Communicator(comm.rank, 2, other[i], timeout=60).close()
        return
    elif what == "close":
        comm.close()
        return
    else:
        comm.all_reduce(x)
    assert x[-1] == 2, x

def victim(comm, what, calls, other=()):
    for i in range(calls):
        call(comm, what, i, other)
"""

MATRIX = """
def attack(comm, what):
    if what == "async_error" or what == "connections":
        for _ in range(200):
            getattr(comm, what)()
    elif what == "split":
        comm.split(0).close()
    else:
        getattr(comm, what)()

def expected(error, what, attacked):
    looks = attacked in ("async_error", "connections")
    if error is None:
        return True
    if isinstance(error, InvalidUsageError):  # closed before, or refused since the two overlap
        return attacked in ("close", "abort", "split") or what == "close"  # after an abort the test closes, too
    if isinstance(error, MismatchError):
        return attacked == "split"
    return isinstance(error, (AbortedError, PeerLostError)) and (not looks or what == "close")

def then_leave(comm, what, other):
    with comm:  # an attack that comes late finds it gone
        victim(comm, what, 30, other)

for what in sys.argv[1].split(","):
    for attacked in sys.argv[2].split(","):
        if what == "init" and attacked == "split":
            continue  # the other rank does not split
        for _ in range(3):
            print(what, attacked, flush=True)
            first, second = pair()
            other = [hfreduce.get_unique_id() for _ in range(2)]
            threads, results = in_threads(lambda: victim(first, what, 30, other), lambda: then_leave(second, what, other))
            time.sleep(random.random() * 0.003)
            try:
                attack(first, attacked)
                error = None
            except hfreduce.HfreduceError as raised:
                error = raised
            if error is not None and attacked == "split":
                first.abort()
            first.close() if what != "init" and attacked in ("close", "abort") else None
            for thread in threads:
                thread.join()
            for which in (error, *results):
                assert expected(which, what, attacked), (what, attacked, repr(which))
            first.close()
"""

EXIT = """
first, second = pair()
other = [hfreduce.get_unique_id() for _ in range(1)]
in_threads(lambda: victim(first, sys.argv[1], 10**9, other), lambda: victim(second, sys.argv[1], 10**9, other))
time.sleep(0.3)
print("exiting", flush=True)
sys.exit(7)
"""

HANGS = """
first, second = pair()
threads, results = in_threads(lambda: victim(first, sys.argv[1], 10**9))
time.sleep(float(sys.argv[2]))
{end}
"""


def run(program: str, *arguments: str, limit: float = 150) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMON + program, *arguments], env=dict(os.environ, MALLOC_PERTURB_="165"), capture_output=True, text=True, timeout=limit,
        check=False,
    )  # fmt: skip


@pytest.mark.limit(170)
@pytest.mark.parametrize("victim", VICTIMS)
def test_attacks(victim: str) -> None:
    done = run(MATRIX, victim, ",".join(ATTACKS))
    assert done.returncode == 0, f"after {done.stdout.splitlines()[-1:]}: {done.stderr[-3000:]}"


@pytest.mark.limit(170)
@pytest.mark.parametrize("victim", ["small", "large", "async", "group", "init"])
def test_exit_under_daemon_threads(victim: str) -> None:
    done = run(EXIT, victim)
    assert (done.returncode, done.stdout) == (7, "exiting\n"), done.stderr[-3000:]


@pytest.mark.limit(170)
@pytest.mark.parametrize("seconds", ["0.05", "0.6"], ids=["in C", "between looks at signals"])
@pytest.mark.parametrize("victim", ["small", "large"])
def test_exit_while_a_thread_waits(victim: str, seconds: str) -> None:
    """The peer never comes: the interpreter's exit does not wait until the deadline."""
    done = run(HANGS.format(end="sys.exit(7)"), victim, seconds)
    assert done.returncode == 7, done.stderr[-3000:]


@pytest.mark.limit(170)
@pytest.mark.parametrize("seconds", ["0.05", "0.6"], ids=["in C", "between looks at signals"])
@pytest.mark.parametrize("victim", ["small", "large"])
def test_close_and_overlap_while_a_thread_waits(victim: str, seconds: str) -> None:
    """A second thread's call is refused and names both, the first one goes on; close ends it at once, and says so."""
    program = HANGS.format(
        end="""
for async_op in (False, True):
    try:
        first.broadcast(np.ones(4), async_op=async_op)
        raise AssertionError("two calls at once")
    except InvalidUsageError as error:
        assert f"thread {threading.get_native_id()} called it" in str(error), error
        assert f"thread {threads[0].native_id} was in hfreduceAllReduce" in str(error), error
victim(second, sys.argv[1], 1)  # the first call ends, and its values are right
time.sleep(float(sys.argv[2]))
start = time.monotonic()
first.close()
threads[0].join()
assert isinstance(results[0], AbortedError), repr(results[0])
assert "closed the communicator while" in str(results[0]), results[0]
assert time.monotonic() - start < 15, "close waited for a call that could not end"
try:
    second.all_reduce(np.ones(4))
    raise AssertionError("the other rank heard nothing")
except (AbortedError, PeerLostError):
    pass
second.close()
"""
    )
    done = run(program, victim, seconds)
    assert done.returncode == 0, done.stderr[-3000:]
