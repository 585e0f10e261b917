"""Run training functions on ranks that stay alive from test to test, and compare what they trained.

A server process imports torch once and forks the ranks; ranks are reused by every test and thrown away after a failure. Each run
makes its own default process group, over a store that the test process hosts, and destroys it.

HFREDUCE_TEST_TORCH_BACKEND names the backend under test: "hfreduce" (the default), "gloo", or "module:name" for one that importing
a module registers; "torch.testing._internal.distributed.fake_pg:fake", which communicates nothing, must fail every comparison.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import functools
import importlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, reduction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import PATIENCE

#: Seconds that one run may take unless the test says otherwise.
TIMEOUT = float(os.environ.get("HFREDUCE_TEST_TORCH_TIMEOUT", "60"))
#: Seconds that the other ranks get to end once one has failed: enough for "peer lost" to reach them.
GRACE = 15.0
#: Modules that the server imports before it forks.
PRELOAD = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "torch.distributed.checkpoint",
    "torch.distributed.optim",
    "torch._dynamo",
)


def backend_under_test() -> tuple[str, str]:
    """The module to import, which may be "", and the backend's name."""
    value = os.environ.get("HFREDUCE_TEST_TORCH_BACKEND", "hfreduce")
    module, _, name = value.rpartition(":")
    return ("hfreduce.torch" if value == "hfreduce" else module), name


# --- comparing ---


def assert_equal(actual: Any, expected: Any, rtol: float, atol: float, where: str = "result") -> None:
    """Compare nested dicts, lists, tensors and numbers; NaN equals NaN. AssertionError says where they differ."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), f"{where}: {type(actual)} instead of a tensor"
        assert actual.dtype == expected.dtype, f"{where}: {actual.dtype} instead of {expected.dtype}"
        torch.testing.assert_close(
            actual, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{where} differs: {text}"
        )
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), f"{where}: keys {list(actual)} instead of {list(expected)}"
        for key in expected:
            assert_equal(actual[key], expected[key], rtol, atol, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{where}: {len(actual)} items instead of {len(expected)}"
        for i, (one, other) in enumerate(zip(actual, expected)):
            assert_equal(one, other, rtol, atol, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert abs(actual - expected) <= atol + rtol * abs(expected), f"{where}: {actual} instead of {expected}"
    else:
        assert actual == expected, f"{where}: {actual!r} instead of {expected!r}"


# --- the ranks' side ---


@dataclass
class Job:
    """A function to call on a rank, and the process group to call it in."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    nranks: int
    module: str
    backend: str  # "" for none: one process by itself
    port: int
    prefix: str
    timeout: float


_kept: list[Any] = []


@functools.cache
def _store(port: int) -> Any:
    """This rank's connection to the test process's store, kept: torch looks up the peer's name, which takes seconds on some machines."""
    return dist.TCPStore("127.0.0.1", port, is_master=False)


def _call(job: Job) -> Any:
    if job.module:
        importlib.import_module(job.module)
    torch.manual_seed(0)
    if not job.backend:
        return job.function(*job.args)
    limit = datetime.timedelta(seconds=job.timeout)
    store: Any
    if job.backend == "fake":
        store = importlib.import_module(job.module).FakeStore()
    else:
        store = dist.PrefixStore(job.prefix, _store(job.port))
        store.set_timeout(limit)
    dist.init_process_group(job.backend, store=store, rank=job.rank, world_size=job.nranks, timeout=limit)
    # Gloo's group aborts the process if one of its own threads drops it last, as PowerSGD's callbacks do: the next run does.
    _kept[:] = [dist.group.WORLD] if job.backend == "gloo" else []
    value = job.function(*job.args)
    dist.destroy_process_group()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    return value


def _rank_main(pipe: connection.Connection, where: str) -> None:
    """Serve jobs until the pipe closes or one fails: a rank that failed has state that nobody knows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stacks = open(where + ".stacks", "w")  # noqa: SIM115 (open as long as the process lives)
    log = os.open(where + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    code = 0
    with contextlib.suppress(EOFError):
        while code == 0:
            data = pipe.recv_bytes()
            os.ftruncate(log, 0)
            try:
                reply = pickle.dumps((True, _call(pickle.loads(data))))
            except BaseException:
                reply, code = pickle.dumps((False, traceback.format_exc())), 1
            sys.stdout.flush()
            sys.stderr.flush()
            pipe.send_bytes(reply)
    os._exit(code)


def _server_main(pipe: connection.Connection) -> None:
    """Fork a rank for each message (a path for its files); its pipe follows. For a pid, wait for its end and send its wait status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else inductor would start a pool of processes
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else Gloo resolves the host's name, which may be slow or fail
    torch.set_num_threads(1)
    for module in (*PRELOAD, backend_under_test()[0]):
        if module:
            with contextlib.suppress(ImportError):  # what this torch lacks, the tests that need it say
                importlib.import_module(module)
    with contextlib.suppress(EOFError):
        while True:
            message = pipe.recv()
            if isinstance(message, int):
                try:
                    pipe.send(os.waitpid(message, 0)[1])
                except ChildProcessError:  # it was waited for before
                    pipe.send(0)
                continue
            handle = reduction.recv_handle(pipe)
            pid = os.fork()
            if pid == 0:
                pipe.close()
                _rank_main(connection.Connection(handle), message)
            os.close(handle)
            pipe.send(pid)


# --- the test process's side ---


class Rank:
    """A rank as the test process sees it."""

    def __init__(self, pipe: connection.Connection, pid: int, where: str) -> None:
        self.pipe, self.pid, self.where = pipe, pid, where

    def stacks(self) -> str:
        """Where it stands: the Python stacks of all its threads, the kernel function it waits in, the end of its output."""
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.3)
        try:
            wait = Path(f"/proc/{self.pid}/wchan").read_text()
        except OSError:
            wait = "?"
        stacks = Path(self.where + ".stacks")
        return f"(kernel: {wait})\n{stacks.read_text() if stacks.exists() else '(no stacks)'}{self.log()}"

    def log(self) -> str:
        """The end of what it wrote to stdout and stderr."""
        with contextlib.suppress(OSError):
            text = Path(self.where + ".log").read_text(errors="replace")[-3000:]
            return f"--- its output:\n{text}" if text else ""
        return ""


class Ranks:
    """A pool of rank processes; `run` calls a function on the first of them, `compare` against a reference."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hfreduce-torch-")
        self._store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._numbers = itertools.count()
        self._ranks: list[Rank] = []
        self._server: Any = None
        self._pipe: Any = None

    @property
    def backend(self) -> str:
        """Name of the backend under test."""
        return backend_under_test()[1]

    def run(
        self,
        function: Callable[..., Any],
        nranks: int,
        *args: Any,
        backend: str | None = None,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """Call function(*args) on nranks ranks that share a default process group; return the values by rank.

        function must be one that pickle finds by name. backend None: the one under test; "": no process group, nranks is 1.
        timeout: seconds, times PATIENCE, after which ranks that have not ended are made to say where they stand, and all are killed.
        AssertionError tells what became of every rank if any failed.
        """
        __tracebackhide__ = True
        module, name = backend_under_test() if backend is None else ("", backend)
        prefix = f"run-{next(self._numbers)}"
        try:
            self._fork(nranks)
            for rank in range(nranks):
                job = Job(function, args, rank, nranks, module, name, self._store.port, prefix, timeout)
                try:
                    self._ranks[rank].pipe.send_bytes(pickle.dumps(job))
                except BrokenPipeError:
                    text = f"rank {rank} died after the run before, {self._end_of(self._ranks[rank])}"
                    raise AssertionError(text) from None
            texts, values = self._collect(nranks, time.monotonic() + timeout * PATIENCE)
        except BaseException:
            self.kill()
            raise
        if texts:
            self.kill()
            lost = "\n".join(f"=== rank {rank}: {texts.get(rank, 'returned')}" for rank in range(nranks))
            raise AssertionError(f"{function.__name__} on {name or 'one process'}: {len(texts)} of {nranks} ranks failed\n{lost}")
        return values

    def compare(
        self,
        function: Callable[..., Any],
        nranks: int,
        *args: Any,
        reference: Callable[..., Any] | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-6,
        identical: Sequence[str] = (),
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """Run function on the backend under test and on Gloo, or reference(*args) in one process, and compare each rank's value.

        The tolerances' defaults fit float32 sums of a few terms in another order, carried through a few steps of training;
        an update that went wrong is off by more than a hundred times as much. identical: keys of the value, a dict, whose bits
        must be the same on all ranks. Returns the values of the backend under test.
        """
        __tracebackhide__ = True
        if reference is None:
            expected = self.run(function, nranks, *args, backend="gloo", timeout=timeout)
        else:
            expected = self.run(reference, 1, *args, backend="", timeout=timeout) * nranks
        actual = self.run(function, nranks, *args, timeout=timeout)
        for rank in range(nranks):
            assert_equal(actual[rank], expected[rank], rtol, atol, f"rank {rank}")
            for key in identical:
                assert_equal(actual[rank][key], actual[0][key], 0.0, 0.0, f"rank {rank} against rank 0: {key}")
        return actual

    def _fork(self, nranks: int) -> None:
        if self._server is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._server = context.Process(target=_server_main, args=(theirs,), name="torch-ranks", daemon=True)
            self._server.start()
            theirs.close()
        while len(self._ranks) < nranks:
            where = str(Path(self._folder.name) / f"rank-{next(self._numbers)}")
            mine, theirs = multiprocessing.Pipe()
            self._pipe.send(where)
            reduction.send_handle(self._pipe, theirs.fileno(), self._server.pid)
            theirs.close()
            self._ranks.append(Rank(mine, self._pipe.recv(), where))

    def _collect(self, nranks: int, end: float) -> tuple[dict[int, str], list[Any]]:
        """What became of the ranks that failed, in words, and the values of the others."""
        texts: dict[int, str] = {}
        values: list[Any] = [None] * nranks
        waiting = {rank.pipe: i for i, rank in enumerate(self._ranks[:nranks])}
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                for rank in waiting.values():
                    texts[rank] = f"HUNG at\n{self._ranks[rank].stacks()}"
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    good, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    good, value = False, f"died, {self._end_of(self._ranks[rank])}"
                if good:
                    values[rank] = value
                else:
                    texts[rank] = f"{value}{self._ranks[rank].log()}"
                    end = min(end, time.monotonic() + GRACE)
        return texts, values

    def _end_of(self, rank: Rank) -> str:
        """How a rank that is dead ended."""
        self._pipe.send(rank.pid)
        return f"exit code {os.waitstatus_to_exitcode(self._pipe.recv())}\n{rank.stacks()}"

    def kill(self) -> None:
        """End all ranks at once; the next run forks new ones."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.pipe.close()
            with contextlib.suppress(OSError):
                os.kill(rank.pid, signal.SIGKILL)
        for rank in ranks:
            self._pipe.send(rank.pid)
            self._pipe.recv()

    def close(self) -> None:
        """End the ranks and their server."""
        for rank in self._ranks:
            rank.pipe.close()
        if self._server is not None:
            self._pipe.close()
            self._server.join(10.0)
            if self._server.is_alive():
                self._server.kill()
                self._server.join()
        self._folder.cleanup()


@contextlib.contextmanager
def pool() -> Iterator[Ranks]:
    """A pool of ranks, ended on leaving."""
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.close()
