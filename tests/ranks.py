"""Run a function on N ranks, each a process (or all threads of one), under a hard time limit; say what became of each rank."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Environment for one rank: the same for all, or made from the rank.
Environment = Any  # Mapping[str, str], or a function from the rank to one, or None

# Ranks are forked from a server that has imported hfreduce and used nothing of it: quick to start, and each reads its own
# environment.
#: What a limit in seconds, which is meant for quiet cores, is multiplied by: a machine may have other work. Only what hangs meets it.
PATIENCE = float(os.environ.get("HFREDUCE_TEST_PATIENCE", "3"))
_context = multiprocessing.get_context("forkserver")
_preload = ["numpy", "hfreduce", "ranks"]
_context.set_forkserver_preload(_preload)


def preload(module: str) -> None:
    """Let the server import a module that takes long. To be called when a test module is imported: the server starts later."""
    if module not in _preload:
        _preload.append(module)
        _context.set_forkserver_preload(_preload)


@dataclass
class Outcome:
    """What became of a rank: its value; or its error (and traceback); or how it ended without a word."""

    rank: int
    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    exitcode: int | None = None
    hung: bool = False
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the function returned."""
        return self.error is None and not self.traceback

    def __str__(self) -> str:
        if self.ok:
            return f"rank {self.rank}: returned {self.value!r:.200}"
        return f"rank {self.rank}: {'HUNG' if self.hung else 'failed'} after {self.seconds:.2f} s\n{self.traceback.rstrip()}"


@contextlib.contextmanager
def reserved_address() -> Iterator[str]:
    """A loopback address on which nobody else will listen meanwhile, but a rank can."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


def run_ranks(
    function: Callable[..., Any],
    nranks: int,
    *args: Any,
    timeout: float = 30.0,
    comm_timeout: float = 30.0,
    env: Environment = None,
    threads: bool = False,
    comm: bool = True,
    check: bool = True,
) -> list[Any]:
    """Call function(comm, *args) on nranks ranks; return the values by rank, or with check=False the Outcomes.

    function and args must be picklable (a function of a test module is). timeout: seconds, times PATIENCE, after which ranks that
    have not ended are made to say where they stand, and killed. comm_timeout: the communicator's. comm=False: function(rank, *args),
    with the variables of hfreduce.init set. threads: the ranks are threads of one process. With check, AssertionError tells
    of every rank if any failed.
    """
    with tempfile.TemporaryDirectory(prefix="hfreduce-ranks-") as folder, reserved_address() as address:
        shared = {"HFREDUCE_NRANKS": str(nranks), "HFREDUCE_ADDR": address, "HFREDUCE_SECRET": secrets.token_hex(16)}
        processes = []
        for first in [0] if threads else range(nranks):
            environment = {**shared, "HFREDUCE_RANK": str(first), **((env(first) if callable(env) else env) or {})}
            reader, writer = _context.Pipe(duplex=False)
            where = Path(folder) / f"stacks-{first}"
            what = (function, args, comm, comm_timeout)
            process = _context.Process(
                target=_rank_main, args=(first, nranks if threads else 0, environment, str(where), writer, what), daemon=True
            )
            process.start()
            writer.close()
            processes.append((process, reader, where))
        outcomes: list[Outcome] = []
        start = time.monotonic()
        for first, (process, reader, where) in enumerate(processes):
            ranks = range(nranks) if threads else [first]
            outcomes += _collect(process, reader, where, ranks, start, start + timeout * PATIENCE)
    if not check:
        return outcomes
    if not all(outcome.ok for outcome in outcomes):
        raise AssertionError(f"{sum(not o.ok for o in outcomes)} of {nranks} ranks failed\n" + "\n".join(map(str, outcomes)))
    return [outcome.value for outcome in outcomes]


def _collect(process: Any, reader: Any, where: Path, ranks: Sequence[int], start: float, end: float) -> list[Outcome]:
    try:
        if reader.poll(max(0.0, end - time.monotonic())):
            outcomes: list[Outcome] = pickle.loads(reader.recv_bytes())
            process.join(5.0)  # what it does at exit counts too
            if process.is_alive():
                for outcome in outcomes:
                    outcome.hung, outcome.traceback = True, "hung at exit\n" + _stacks(process, where)
            for outcome in outcomes:
                outcome.exitcode = process.exitcode
                if process.exitcode and outcome.ok:
                    outcome.traceback = f"returned, but its process ended with exit code {process.exitcode}"
            return outcomes
        text, hung = "did not end in time; it stood at\n" + _stacks(process, where), True
    except EOFError:
        process.join(5.0)
        text, hung = f"its process ended without a word, exit code {process.exitcode}", False
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        reader.close()
    seconds = time.monotonic() - start
    return [Outcome(r, traceback=text, exitcode=process.exitcode, hung=hung, seconds=seconds) for r in ranks]


def _stacks(process: Any, where: Path) -> str:
    """The Python stacks of all threads of a rank."""
    if process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
    try:
        wait = Path(f"/proc/{process.pid}/wchan").read_text()
    except OSError:
        wait = "?"
    return f"(kernel: {wait})\n" + (where.read_text() if where.exists() else "(no stacks)")


def _rank_main(first: int, nthreads: int, env: Mapping[str, str], where: str, writer: Any, what: tuple[Any, ...]) -> None:
    os.environ.update(env)
    with open(where, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        outcomes: dict[int, Outcome] = {}
        if nthreads:
            import hfreduce

            unique_id = hfreduce.get_unique_id(local=True)
            workers = [
                threading.Thread(target=_one_rank, args=(rank, nthreads, unique_id, outcomes, *what)) for rank in range(nthreads)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        else:
            _one_rank(first, int(env["HFREDUCE_NRANKS"]), None, outcomes, *what)
        try:
            data = pickle.dumps([outcomes[rank] for rank in sorted(outcomes)])
        except Exception:  # a value or error that cannot be pickled: its text will do
            for outcome in outcomes.values():
                outcome.value = repr(outcome.value)
                if outcome.error is not None:
                    outcome.error = RuntimeError(repr(outcome.error))
            data = pickle.dumps([outcomes[rank] for rank in sorted(outcomes)])
        writer.send_bytes(data)
        writer.close()
        faulthandler.unregister(signal.SIGUSR1)


def _one_rank(
    rank: int,
    nranks: int,
    unique_id: Any,
    outcomes: dict[int, Outcome],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    comm: bool,
    timeout: float,
) -> None:
    import hfreduce

    start, outcome = time.monotonic(), Outcome(rank)
    try:
        if not comm:
            outcome.value = function(rank, *args)
        else:
            with (
                hfreduce.init(timeout)
                if unique_id is None
                else hfreduce.Communicator(rank, nranks, unique_id, timeout=timeout) as mine
            ):
                outcome.value = function(mine, *args)
    except BaseException as error:
        outcome.error, outcome.traceback = error, traceback.format_exc()
    outcome.seconds = time.monotonic() - start
    outcomes[rank] = outcome
