"""How many streams can wait before another stream is held up with them: streams share the device's hardware queues."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import results
from libcuda import Cuda, Word, until
from results import Wrong

COUNTS = (0, 1, 2, 4, 7, 8, 15, 16, 31, 32, 40)
PROBES = 8
PATIENCE = 0.25


def held_up(cuda: Cuda, waiting: int) -> int:
    """With so many streams waiting, how many of PROBES other streams do not get their work done."""
    gate, words = Word(cuda), [Word(cuda) for _ in range(PROBES)]
    streams = [cuda.stream() for _ in range(waiting + PROBES)]
    place = cuda.alloc(4096)
    for stream in streams[:waiting]:
        cuda.wait(stream, gate.address, 1)
    for stream, word in zip(streams[waiting:], words):
        cuda.fill(place, 5, 1024, stream)
        cuda.write(stream, word.address, 1)
    until(lambda: all(word.value for word in words), PATIENCE)
    stalled = sum(not word.value for word in words)
    gate.value = 1
    for stream in streams:
        if not until(lambda: not cuda.pending(stream), 5):  # noqa: B023
            raise Wrong("a stream did not go on after its word was written")
        cuda.destroy(stream)
    return stalled


def child() -> None:
    """Print how many probes were held up, by the number of waiting streams."""
    cuda = Cuda()
    counts = [c for c in COUNTS if not cuda.stand_in or c <= 8]
    print(json.dumps({count: held_up(cuda, count) for count in counts}), flush=True)
    os._exit(0)


def connections(number: str) -> tuple[str, dict[str, int]]:
    """In a process of its own, whose driver reads CUDA_DEVICE_MAX_CONNECTIONS."""
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_DEVICE_MAX_CONNECTIONS"}
    if number:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = number
    done = subprocess.run([sys.executable, __file__, "child"], env=environment, capture_output=True, text=True, timeout=40)
    if done.returncode:
        raise Wrong((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    results.same(found["0"], 0, "streams held up with none waiting")
    first = next((count for count, stalled in found.items() if stalled), None)
    most = max(found, key=int)
    if first is None:
        return f"{PROBES} other streams run beside up to {most} that wait", found
    return f"from {first} waiting streams on others are held up: " + ", ".join(
        f"{c}: {s} of {PROBES}" for c, s in found.items()
    ), found


def as_preset() -> tuple[str, dict[str, int]]:
    return connections("")


def with_32_connections() -> tuple[str, dict[str, int]]:
    return connections("32")


def with_1_connection() -> tuple[str, dict[str, int]]:
    return connections("1")


if __name__ == "__main__":
    if sys.argv[1:] == ["child"]:
        child()
    results.run("aliasing", as_preset, with_32_connections, with_1_connection)
