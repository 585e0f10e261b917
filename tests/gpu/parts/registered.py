"""Memory that two processes share and register, with a fork between; and whether the CPU sees a copy whole once it sees the word behind it."""

from __future__ import annotations

import ctypes
import mmap
import os
import time

import results
from libcuda import Cuda, Word, until
from results import Wrong

SIZE = 1 << 21
ROUNDS, SECONDS = 100_000, 6.0


def shared() -> tuple[mmap.mmap, int]:
    fd = os.memfd_create("first-contact")
    os.ftruncate(fd, SIZE)
    memory = mmap.mmap(fd, SIZE)
    os.close(fd)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def write_from_a_device(address: int, value: int) -> None:
    cuda = Cuda()
    cuda.register(address, SIZE)
    stream = cuda.stream()
    cuda.write(stream, cuda.seen(address) + 4 * value, value)
    cuda.synchronize(stream)


def in_a_process(function: object, *arguments: object) -> int:
    """Fork, call, and return the child's status; the child's own errors go to the log."""
    child = os.fork()
    if not child:
        try:
            function(*arguments)  # type: ignore[operator]
            os._exit(0)
        except BaseException as error:
            print(f"child: {error}", flush=True)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def two_processes_register_one_memfd() -> None:
    """Both children call the driver for themselves: this process has not called it yet."""
    memory, address = shared()
    for value in (1, 2):
        results.same(in_a_process(write_from_a_device, address, value), 0, f"status of process {value}")
    words = [int.from_bytes(memory[4 * i : 4 * i + 4], "little") for i in (1, 2)]
    results.same(words, [1, 2], "words written by the devices of two processes")


def a_fork_after_registering() -> None:
    """A process that has registered memory forks a child, which ends; the device still reaches the parent's pages afterwards."""
    memory, address = shared()
    cuda = Cuda()
    cuda.register(address, SIZE)
    stream, word = cuda.stream(), cuda.seen(address)
    child = os.fork()
    if not child:
        os._exit(0)
    memory[8:12] = b"\1\0\0\0"  # private pages would be copied here
    cuda.write(stream, word, 7)
    cuda.synchronize(stream)
    os.waitpid(child, 0)
    cuda.write(stream, word + 4, 8)
    cuda.synchronize(stream)
    results.same(memory[0:12], bytes([7, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0]), "words")
    cuda.unregister(address)


def the_word_comes_behind_the_copy() -> str:
    """Rounds of set, copy to the host, write the word: once the CPU reads the word it compares the whole payload."""
    memory, address = shared()
    cuda = Cuda()
    cuda.register(address, SIZE)
    stream, word, base = cuda.stream(), Word(cuda), cuda.seen(address)
    counts = (1024, 16384, 1024, 256)
    source = cuda.alloc(4 * max(counts))
    begin, done = time.monotonic(), 0
    most = 300 if cuda.stand_in else ROUNDS
    for i in range(1, most + 1):
        count = counts[i % 4]
        cuda.fill(source, i, count, stream)
        cuda.copy(base, source, 4 * count, stream)
        cuda.write(stream, word.address, i)
        if not until(lambda: word.value >= i, 5):  # noqa: B023
            raise Wrong(f"the word of round {i} did not come within 5 s")
        got, want = memory[: 4 * count], i.to_bytes(4, "little") * count
        if got != want or i == 1:
            results.same(got, want, f"payload of round {i}")
        done = i
        if i % 100 == 0 and time.monotonic() - begin > SECONDS:
            break
    return f"{done} rounds of up to 64 KiB in order, {(time.monotonic() - begin) / done * 1e6:.1f} us each"


if __name__ == "__main__":
    results.run("registered", two_processes_register_one_memfd, a_fork_after_registering, the_word_comes_behind_the_copy)
