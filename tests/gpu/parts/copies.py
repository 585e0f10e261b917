"""Copies by the driver alone, pinned memory, by size: to the host, to the device, both at once. The library's figures are compared with these."""

from __future__ import annotations

import ctypes
import mmap
import time

import results
from libcuda import Cuda

cuda = Cuda()
MIB = 1 << 20
SIZES = (MIB // 4, MIB) if cuda.stand_in else (MIB // 4, MIB // 2, MIB, 2 * MIB, 4 * MIB, 16 * MIB, 64 * MIB)
TOTAL = 4 * MIB if cuda.stand_in else 1024 * MIB
LARGEST = SIZES[-1]


class Lane:
    """One direction: a stream, memory on both sides."""

    def __init__(self, out: bool) -> None:
        self.stream, self.device, self.host = cuda.stream(), cuda.alloc(LARGEST), cuda.pinned(LARGEST)
        self.to, self.source = (self.host, self.device) if out else (self.device, self.host)

    def queue(self, size: int) -> None:
        for _ in range(TOTAL // size):
            cuda.copy(self.to, self.source, size, self.stream)


def rate(size: int, *lanes: Lane) -> float:
    """GB/s of each of the lanes, all at once; the better of two runs."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        for lane in lanes:
            lane.queue(size)
        for lane in lanes:
            cuda.synchronize(lane.stream)
        best = min(best, time.perf_counter() - start)
    return TOTAL // size * size / best / 1e9


def table(*lanes: Lane) -> tuple[str, dict[str, float]]:
    found = {f"{size >> 10} KiB": round(rate(size, *lanes), 2) for size in SIZES}
    each = " each way" if len(lanes) > 1 else ""
    return f"{max(found.values())} GB/s{each} (" + ", ".join(f"{size} {gbs}" for size, gbs in found.items()) + ")", found


def values_after_copies() -> None:
    """There and back, so that the rates are those of copies that happen."""
    out, back = Lane(True), Lane(False)
    ctypes.memset(back.host, 0x5A, MIB // 4)
    cuda.copy(back.device, back.host, MIB // 4, back.stream)
    cuda.copy(out.host, back.device, MIB // 4, back.stream)
    cuda.synchronize(back.stream)
    results.same(ctypes.string_at(out.host, MIB // 4), b"\x5a" * (MIB // 4), "copies there and back")


def to_the_host() -> tuple[str, dict[str, float]]:
    return table(Lane(True))


def to_the_device() -> tuple[str, dict[str, float]]:
    return table(Lane(False))


def both_at_once() -> tuple[str, dict[str, float]]:
    return table(Lane(True), Lane(False))


def two_streams_to_the_host() -> tuple[str, dict[str, float]]:
    return table(Lane(True), Lane(True))


def registered_memory() -> str:
    """The largest size to the host, into memory that was registered as the library's rings are, beside cuMemHostAlloc's."""
    memory = mmap.mmap(-1, LARGEST)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    cuda.register(address, LARGEST)
    lane = Lane(True)
    allocated = rate(LARGEST, lane)
    lane.to = address
    return f"{rate(LARGEST, lane):.2f} GB/s, beside {allocated:.2f} into memory of cuMemHostAlloc"


if __name__ == "__main__":
    results.run(
        "copies",
        to_the_host,
        to_the_device,
        both_at_once,
        two_streams_to_the_host,
        registered_memory,
        values_after_copies,
    )
