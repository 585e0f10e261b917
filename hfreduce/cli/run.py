"""`hfreduce run`: N ranks of a program on this machine, without MPI."""

from __future__ import annotations

import argparse
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
from typing import Any, BinaryIO

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
    Standard input goes to rank 0 if it is no terminal. Call it from the main thread.
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
        self.partial: dict[BinaryIO, bytes] = {}
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
            self._flush()
        finally:
            self._signal_all(signal.SIGKILL)
            for child in self.children:
                child.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_wakeup)
            self.selector.close()
            os.close(reader)
            os.close(writer)
        return self.status

    def _start(self) -> None:
        prepare = _die_with_parent()
        pipe = subprocess.PIPE if self.label else None
        for rank in range(self.nranks):
            child = subprocess.Popen(
                self.command,
                env={**self.env, "HFREDUCE_RANK": str(rank)},
                stdin=None if rank == 0 and sys.stdin is not None and not sys.stdin.isatty() else subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                preexec_fn=prepare,
            )
            self.children.append(child)
            for stream, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                if stream is not None:
                    os.set_blocking(stream.fileno(), False)
                    self.selector.register(stream, selectors.EVENT_READ, (rank, sink))

    def _alive(self) -> bool:
        """Reap what has ended; when a rank has failed, see to the end of the others."""
        alive = False
        for rank, child in enumerate(self.children):
            code = child.poll()
            if code is None:
                alive = True
            elif code and not self.status:
                self.status = code if code > 0 else 128 - code
                if not self.signalled and any(other.poll() is None for other in self.children):
                    how = f"exited with status {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                    print(
                        f"hfreduce run: rank {rank} (pid {child.pid}) {how}; the others get {GRACE:g} s to end",
                        file=sys.stderr,
                        flush=True,
                    )
                self.terminate_at = time.monotonic() + GRACE
        now = time.monotonic()
        if self.end is not None and now >= self.end and alive and not self.status:
            print(f"hfreduce run: not done after {self.timeout} s; the ranks are ended", file=sys.stderr, flush=True)
            self.status, self.terminate_at = 124, now
        if self.terminate_at is not None and now >= self.terminate_at:
            self._signal_all(signal.SIGTERM)
            self.terminate_at, self.kill_at = None, now + _KILL_AFTER
        if self.kill_at is not None and now >= self.kill_at:
            self._signal_all(signal.SIGKILL)
            self.kill_at = None
        return alive

    def _wait(self, reader: int) -> None:
        due = [t for t in (self.end if not self.status else None, self.terminate_at, self.kill_at) if t is not None]
        left = max(0.0, min(due) - time.monotonic()) if due else None
        for key, _ in self.selector.select(left):
            if key.fileobj == reader:
                try:
                    os.read(reader, 4096)
                except BlockingIOError:
                    pass
            else:
                self._copy(key)

    def _copy(self, key: selectors.SelectorKey) -> None:
        """Pass on whole lines, each with its rank before it."""
        stream: Any = key.fileobj
        data = os.read(stream.fileno(), 65536)
        lines = (self.partial.pop(stream, b"") + data).split(b"\n")
        rest = lines.pop()
        if not data:
            self.selector.unregister(stream)
            lines += [rest] if rest else []
        elif rest:
            self.partial[stream] = rest
        rank, sink = key.data
        for line in lines:
            sink.buffer.write(b"[%d] %s\n" % (rank, line))
        sink.flush()

    def _flush(self) -> None:
        """What the ranks wrote last. Does not wait for grandchildren that hold the pipes open."""
        while any(key.data for key in self.selector.get_map().values()):
            ready = [key for key, _ in self.selector.select(0.05) if key.data]
            if not ready:
                break
            for key in ready:
                self._copy(key)

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
