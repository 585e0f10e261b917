"""What small things cost: a word to the device and back, a hop over an event, each call of the driver, a nap of 20 us."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable

import results
from libcuda import Cuda, Word, until
from results import Wrong

cuda = Cuda()
ROUNDS = 50 if cuda.stand_in else 2000


def microseconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median of so many calls."""
    took = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        call()
        took.append(time.perf_counter_ns() - start)
    return statistics.median(took) / 1000


def ping_pong_of_words() -> str:
    """The CPU writes a word, a stream that waits for it writes another, the CPU reads that."""
    stream, there, back = cuda.stream(), Word(cuda), Word(cuda)
    took = []
    for i in range(1, ROUNDS + 1):
        cuda.wait(stream, there.address, i)
        cuda.write(stream, back.address, i)
        start = time.perf_counter_ns()
        there.value = i
        if not until(lambda: back.value >= i, 5):  # noqa: B023
            raise Wrong(f"round {i} did not come back within 5 s")
        took.append(time.perf_counter_ns() - start)
    results.same(back.value, ROUNDS, "the word")
    return f"{statistics.median(took) / 1000:.1f} us there and back, best {min(took) / 1000:.1f}"


def word_from_an_empty_stream() -> str:
    """The stream is idle; a write is queued, and the CPU reads the word."""
    stream, word = cuda.stream(), Word(cuda)
    took = []
    for i in range(1, ROUNDS + 1):
        start = time.perf_counter_ns()
        cuda.write(stream, word.address, i)
        if not until(lambda: word.value >= i, 5):  # noqa: B023
            raise Wrong(f"round {i} did not come within 5 s")
        took.append(time.perf_counter_ns() - start)
    return f"{statistics.median(took) / 1000:.1f} us"


def hop_over_an_event() -> str:
    """The same, with the write on a second stream that waits for an event of the first."""
    first, second, word, event = cuda.stream(), cuda.stream(), Word(cuda), cuda.event()
    took = []
    for i in range(1, ROUNDS + 1):
        start = time.perf_counter_ns()
        cuda("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(first))
        cuda("cuStreamWaitEvent", ctypes.c_void_p(second), ctypes.c_void_p(event), 0)
        cuda.write(second, word.address, i)
        if not until(lambda: word.value >= i, 5):  # noqa: B023
            raise Wrong(f"round {i} did not come within 5 s")
        took.append(time.perf_counter_ns() - start)
    return f"{statistics.median(took) / 1000:.1f} us"


def small_copies() -> tuple[str, dict[str, float]]:
    """A copy of 8 bytes, 4 KiB and 64 KiB to pinned memory with a word behind it, until the CPU reads the word."""
    stream, word = cuda.stream(), Word(cuda)
    device, host = cuda.alloc(1 << 16), cuda.pinned(1 << 16)
    found: dict[str, float] = {}
    for size in (8, 4096, 65536):
        before = word.value

        def one(size: int = size) -> None:
            now = word.value + 1
            cuda.copy(host, device, size, stream)
            cuda.write(stream, word.address, now)
            until(lambda: word.value >= now, 5)

        found[str(size)] = round(microseconds(one), 1)
        results.same(word.value > before, True, "the word grew")
    return ", ".join(f"{size} B {us} us" for size, us in found.items()), found


def calls_of_the_driver() -> tuple[str, dict[str, float]]:
    """The CPU's time in each call; through ctypes, which adds about a microsecond."""
    stream, other, word, event = cuda.stream(), cuda.stream(), Word(cuda), cuda.event()
    device, host = cuda.alloc(4096), cuda.pinned(4096)
    calls: dict[str, Callable[[], object]] = {
        "cuDriverGetVersion (ctypes alone)": lambda: cuda("cuDriverGetVersion", ctypes.byref(ctypes.c_int())),
        "cuMemcpyAsync 4 KiB": lambda: cuda.copy(host, device, 4096, stream),
        "cuStreamWriteValue32": lambda: cuda.write(stream, word.address, 0),
        "cuStreamWaitValue32": lambda: cuda.wait(stream, word.address, 0),
        "cuEventRecord": lambda: cuda("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream)),
        "cuStreamWaitEvent": lambda: cuda("cuStreamWaitEvent", ctypes.c_void_p(other), ctypes.c_void_p(event), 0),
        "cuStreamQuery": lambda: cuda.pending(stream),
    }
    found = {}
    for name, call in calls.items():
        found[name] = round(microseconds(call, min(ROUNDS, 500)), 2)  # fewer than a queue holds
        cuda.synchronize(stream)
        cuda.synchronize(other)
    return ", ".join(f"{name} {us} us" for name, us in found.items()), found


def nap_of_20_us() -> str:
    """How long ppoll sleeps that is asked for 20 us: with the kernel's timer slack (50 us) and with none."""
    libc = ctypes.CDLL(None)

    class Time(ctypes.Structure):
        _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]

    def nap() -> None:
        libc.ppoll(None, ctypes.c_ulong(0), ctypes.byref(Time(0, 20_000)), None)

    preset = microseconds(nap, 300)
    libc.prctl(29, ctypes.c_ulong(1), 0, 0, 0)  # PR_SET_TIMERSLACK
    return f"{preset:.0f} us, with PR_SET_TIMERSLACK {microseconds(nap, 300):.0f} us"


if __name__ == "__main__":
    results.run(
        "costs",
        ping_pong_of_words,
        word_from_an_empty_stream,
        hop_over_an_event,
        small_copies,
        calls_of_the_driver,
        nap_of_20_us,
    )
