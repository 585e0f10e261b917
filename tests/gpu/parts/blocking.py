"""Which calls of the driver return while a stream waits for a word that nobody has written: those that block can deadlock ranks."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import results
from libcuda import Cuda, Word, until
from results import Absent, Wrong

cuda = Cuda()
MIB = 1 << 20
#: Seconds after which the word is written: a call that takes that long was blocked.
HOLD = 0.15 if cuda.stand_in else 0.5
#: The call that has to block, which shows that the wait was pending.
CONTROL = "cuStreamSynchronize of the waiting stream"
PTX = b""".version 6.0
.target sm_52
.address_size 64
.visible .entry nothing() { ret; }
\0"""

#: Memory that is registered stays mapped.
kept: list[Calls] = []


def begin_wait() -> tuple[int, Word]:
    """A stream that waits for a word."""
    stream, word = cuda.stream(), Word(cuda)
    cuda.wait(stream, word.address, 1)
    return stream, word


class Calls:
    """The calls of the matrix, each with what it needs made before the wait begins."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8 * MIB)
        self.place = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        cuda.register(self.place + 4 * MIB, MIB)
        self.device, self.pinned, self.idle, self.other = cuda.alloc(MIB), cuda.pinned(MIB), cuda.stream(), cuda.stream()
        self.event, self.waiting = cuda.event(), 0
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()

    def load(self) -> None:
        if cuda.stand_in:
            raise Absent("needs a GPU: the stand-in runs no kernels of others")
        cuda("cuModuleLoadData", ctypes.byref(self.module), PTX)

    def first_launch(self) -> None:
        cuda("cuModuleGetFunction", ctypes.byref(self.function), self.module, b"nothing")
        none = ctypes.c_void_p()
        cuda("cuLaunchKernel", self.function, 1, 1, 1, 1, 1, 1, 0, ctypes.c_void_p(self.other), none, none)

    def graph(self) -> None:
        graph, made = ctypes.c_void_p(), ctypes.c_void_p()
        cuda("cuStreamBeginCapture_v2", ctypes.c_void_p(self.other), 2)
        cuda.copy(self.device, self.pinned, 64, self.other)
        cuda("cuStreamEndCapture", ctypes.c_void_p(self.other), ctypes.byref(graph))
        cuda("cuGraphInstantiateWithFlags", ctypes.byref(made), graph, ctypes.c_uint64(0))
        cuda("cuGraphLaunch", made, ctypes.c_void_p(self.other))

    def allocate_in_order(self) -> None:
        place = ctypes.c_uint64()
        cuda("cuMemAllocAsync", ctypes.byref(place), ctypes.c_size_t(MIB), ctypes.c_void_p(self.other))

    def all(self) -> dict[str, Callable[[], Any]]:
        return {
            "cuMemcpyAsync": lambda: cuda.copy(self.device, self.pinned, MIB, self.other),
            "cuMemcpyAsync of unpinned memory": lambda: cuda.copy(self.device, self.place, MIB, self.other),
            "cuStreamWriteValue32": lambda: cuda.write(self.other, cuda.seen(self.pinned), 1),
            "cuMemHostRegister": lambda: cuda.register(self.place, MIB),
            "cuMemHostUnregister": lambda: cuda.unregister(self.place + 4 * MIB),
            "cuStreamCreate": cuda.stream,
            "cuStreamDestroy of an idle one": lambda: cuda.destroy(self.idle),
            "cuEventCreate": cuda.event,
            "cuEventRecord": lambda: cuda("cuEventRecord", ctypes.c_void_p(self.event), ctypes.c_void_p(self.other)),
            "cuMemAlloc": lambda: cuda.alloc(64 * MIB if not cuda.stand_in else MIB),
            "cuMemFree": lambda: cuda.free(self.device),
            "cuMemHostAlloc": lambda: cuda.pinned(MIB),
            "cuMemFreeHost": lambda: cuda("cuMemFreeHost", ctypes.c_void_p(self.pinned)),
            "cuMemAllocAsync": self.allocate_in_order,
            "cuModuleLoadData": self.load,
            "first launch of a kernel": self.first_launch,
            "capture, instantiate, launch of a graph": self.graph,
            "cuStreamSynchronize of another stream": lambda: cuda.synchronize(self.other),
            "cuCtxSynchronize": lambda: cuda("cuCtxSynchronize"),
            CONTROL: lambda: cuda.synchronize(self.waiting),
        }


def one(name: str) -> str:
    """Call it while a wait is pending; what became of it. Each in fresh surroundings, so that no call spoils another."""
    calls = Calls()
    kept.append(calls)
    if name == "first launch of a kernel":
        try:
            calls.load()
        except Absent as missing:
            return f"skipped: {missing}"
    stream, word = begin_wait()
    calls.waiting = stream
    release = threading.Timer(HOLD, lambda: setattr(word, "value", 1))
    release.start()
    start = time.monotonic()
    try:
        calls.all()[name]()
        took = time.monotonic() - start
    except Absent as missing:
        return f"skipped: {missing}"
    finally:
        word.value = 1
        release.cancel()
        until(lambda: not cuda.pending(stream), 5)
    return "BLOCKS" if took >= 0.9 * HOLD else f"returns in {took * 1e6:.0f} us"


def matrix() -> tuple[str, dict[str, str]]:
    """The blocking matrix."""
    found = {}
    kept.append(Calls())
    for name in kept[0].all():
        results.step(f"matrix: {name}")
        try:
            found[name] = one(name)
        except RuntimeError as error:
            found[name] = f"error: {error}"
        print(f"{name}: {found[name]}", flush=True)
    blocked = [name for name, what in found.items() if what == "BLOCKS"]
    results.same(CONTROL in blocked, True, f"that {CONTROL} blocks")
    rest = [name for name in blocked if name != CONTROL]
    tried = sum(not what.startswith(("skipped", "error")) for what in found.values()) - 1
    return f"of {tried} calls these block: {', '.join(rest) or 'none'}", found


def exit_with_a_wait_pending() -> str:
    """A process that ends while its stream waits: does it end, and how fast."""
    script = f"import sys; sys.path[:0] = {sys.path!r}\nimport blocking\nblocking.begin_wait()\nprint('waiting', flush=True)\n"
    ways = {}
    for way, last in (("exit", "sys.exit(0)"), ("_exit", "import os; os._exit(0)"), ("SIGKILL", "import time; time.sleep(60)")):
        process = subprocess.Popen([sys.executable, "-c", script + last], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        if not process.stdout.readline():
            raise Wrong("the process ended before its stream waited")
        start = time.monotonic()
        if way == "SIGKILL":
            os.kill(process.pid, signal.SIGKILL)
        try:
            process.wait(5)
            ways[way] = f"{time.monotonic() - start:.2f} s"
        except subprocess.TimeoutExpired:
            process.kill()
            ways[way] = "HANGS"
    return ", ".join(f"{way} {took}" for way, took in ways.items())


if __name__ == "__main__":
    results.run("blocking", matrix, exit_with_a_wait_pending)
