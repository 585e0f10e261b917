"""`hfreduce run`: N ranks of a program on this machine, without MPI."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from hfreduce.cli.forward import Forwarder, Sink

# After a rank has failed the others get so long to notice and say so; after SIGTERM, so long to end.
GRACE = 3.0
_KILL_AFTER = 2.0
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("-n", "--ranks", type=int, default=2, metavar="N", help="number of ranks")
    parser.add_argument("--timeout", type=float, metavar="S", help="end everything after S seconds, with status 124")
    parser.add_argument("-l", "--label", action="store_true", help="put the rank before each line of output")
    parser.add_argument("program", help="program; a name that ends in .py is run by this Python")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")


def run(args: argparse.Namespace) -> int:
    """Run it."""
    if args.ranks < 1:
        print(f"hfreduce run: -n {args.ranks} is less than 1", file=sys.stderr)
        return 2
    if args.program.endswith(".py"):
        command = [sys.executable, args.program, *args.args]
    else:
        if shutil.which(args.program) is None:
            print(f"hfreduce run: {args.program}: not found, or not executable", file=sys.stderr)
            return 127
        command = [args.program, *args.args]
    return run_ranks(command, args.ranks, timeout=args.timeout, label=args.label)


def run_ranks(
    command: Sequence[str],
    nranks: int,
    *,
    timeout: float | None = None,
    label: bool = False,
    env: Mapping[str, str] | None = None,
) -> int:
    """Start nranks processes of command with HFREDUCE_RANK, _NRANKS, _ADDR (a free loopback port) and _SECRET (random), and
    wait for them.

    SIGINT, SIGTERM and SIGHUP are passed on to them; they die with this process. When one fails the others are ended after
    a short grace. Returns 0, the status of the first that failed (128 + signal if by one), or 124 after `timeout` seconds.
    Standard input goes to rank 0 if it is no terminal. What the ranks write is passed on by whole lines, each before it by its
    rank with `label`; a single rank without labels writes by itself. Call it from the main thread.
    """
    with socket.socket() as reserved:  # bound, not listening: nobody else is given the port, and rank 0 can listen on it
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        shared = {
            **(os.environ if env is None else env),
            "HFREDUCE_NRANKS": str(nranks),
            "HFREDUCE_ADDR": f"127.0.0.1:{reserved.getsockname()[1]}",
            "HFREDUCE_SECRET": secrets.token_hex(16),
        }
        return _Ranks(command, nranks, shared, timeout, label).run()


def _die_with_parent() -> Callable[[], None]:
    """For the child, between fork and exec: its own process group, and SIGKILL when the launcher ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        os.setpgid(0, 0)
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it ended in between
            os._exit(1)

    return prepare


class _Ranks:
    def __init__(self, command: Sequence[str], nranks: int, env: Mapping[str, str], timeout: float | None, label: bool) -> None:
        self.command, self.nranks, self.env, self.label = list(command), nranks, env, label
        self.end = None if timeout is None else time.monotonic() + timeout
        self.timeout = timeout
        self.children: list[subprocess.Popen[bytes]] = []
        self.selector = selectors.DefaultSelector()
        self.forwarder = Forwarder(self.selector)
        self.out, self.err = (
            Sink(os.open(os.devnull, os.O_WRONLY) if f is None else f.fileno()) for f in (sys.stdout, sys.stderr)
        )
        self.status = 0  # of the first that failed
        self.terminate_at: float | None = None
        self.kill_at: float | None = None
        self.signalled = 0

    def run(self) -> int:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        old_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # any signal, SIGCHLD too, ends the wait below
        handlers: dict[signal.Signals, Any] = {s: signal.signal(s, self._forward) for s in _FORWARDED}
        handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.selector.register(reader, selectors.EVENT_READ)
        try:
            self._start()
            while self._alive():
                self._wait(reader)
            self.forwarder.finish()
        finally:
            self._signal_all(signal.SIGKILL)
            for child in self.children:
                child.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_wakeup)
            self.forwarder.close()
            self.selector.close()
            os.close(reader)
            os.close(writer)
        return self.status

    def _start(self) -> None:
        prepare = _die_with_parent()
        for file in (sys.stdout, sys.stderr):
            if file is not None:
                file.flush()
        for rank in range(self.nranks):
            # One rank has nobody to mix with: it writes by itself, also to a terminal.
            label = b"[%d] " % rank if self.label else b""
            alone = self.nranks == 1 and not self.label
            ends = [] if alone else [self.forwarder.open(sink, label) for sink in (self.out, self.err)]
            try:
                child = subprocess.Popen(
                    self.command,
                    env={**self.env, "HFREDUCE_RANK": str(rank)},
                    stdin=None if rank == 0 and sys.stdin is not None and not sys.stdin.isatty() else subprocess.DEVNULL,
                    stdout=ends[0] if ends else None,
                    stderr=ends[1] if ends else None,
                    preexec_fn=prepare,
                )
            finally:
                for end in ends:
                    os.close(end)
            self.children.append(child)

    def _say(self, text: str) -> None:
        """A line of the launcher's own, beside those of the ranks."""
        with contextlib.suppress(OSError):
            self.err.write(None, f"hfreduce run: {text}\n".encode(errors="replace"))

    def _alive(self) -> bool:
        """Reap what has ended; when a rank has failed, see to the end of the others."""
        alive = False
        for rank, child in enumerate(self.children):
            code = child.poll()
            if code is None:
                alive = True
            elif code and not self.status:
                self.status = code if code > 0 else 128 - code
                self.forwarder.drain()  # its own last words come first
                if not self.signalled and any(other.poll() is None for other in self.children):
                    how = f"exited with status {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                    self._say(f"rank {rank} (pid {child.pid}) {how}; the others get {GRACE:g} s to end")
                self.terminate_at = time.monotonic() + GRACE
        now = time.monotonic()
        if self.end is not None and now >= self.end and alive and not self.status:
            self._say(f"not done after {self.timeout} s; the ranks are ended")
            self.status, self.terminate_at = 124, now
        if self.terminate_at is not None and now >= self.terminate_at:
            self._signal_all(signal.SIGTERM)
            self.terminate_at, self.kill_at = None, now + _KILL_AFTER
        if self.kill_at is not None and now >= self.kill_at:
            self._signal_all(signal.SIGKILL)
            self.kill_at = None
        return alive

    def _wait(self, reader: int) -> None:
        dues = (self.end if not self.status else None, self.terminate_at, self.kill_at, self.forwarder.due())
        due = min((t for t in dues if t is not None), default=None)
        for key, _ in self.selector.select(None if due is None else max(0.0, due - time.monotonic())):
            if key.fd != reader:
                if key.fd in self.forwarder.streams:  # not closed by what was done for another
                    self.forwarder.copy(key.fd)
                continue
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 4096)
        self.forwarder.flush()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signalled += 1
        self._signal_all(signal.SIGKILL if self.signalled > 2 else number)  # the third time in earnest

    def _signal_all(self, number: int) -> None:
        for child in self.children:
            if child.returncode is None:  # not reaped: the number is still its own
                try:
                    os.killpg(child.pid, number)
                except ProcessLookupError:
                    pass
