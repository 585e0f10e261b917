"""The parts of a first contact, most valuable first, each with its time limit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part: parts/<name>.py, a process of its own that is killed after `seconds`."""

    name: str
    seconds: int
    title: str
    installed: bool = True  # it needs the installed package; else the driver alone, while the package is still built


PARTS = [
    Part("machine", 20, "what is there", installed=False),
    Part("registered", 20, "registered memory of two processes, a fork, the order of copies and words", installed=False),
    Part("pointers", 30, "what the driver tells of pointers, memory in chunks", installed=False),
    Part("blocking", 60, "calls that block while a stream waits", installed=False),
    Part("aliasing", 40, "how many streams can wait", installed=False),
    Part("costs", 30, "words, events, calls, naps", installed=False),
    Part("copies", 30, "copies of the driver alone, by size", installed=False),
    Part("info", 20, "the installed package"),
    Part("ctests", 110, "the C tests of device memory"),
    Part("collectives", 60, "every collective and datatype against NumPy"),
    Part("speed", 70, "bandwidth and latency, beside the driver, Gloo and NCCL"),
    Part("overlap", 40, "a matrix product beside an all_reduce"),
    Part("pytorch", 90, "PyTorch on CUDA tensors, and its NCCL backend on this library"),
    Part("arraylibs", 60, "CuPy, JAX, Numba"),
    Part("replay", 30, "a captured all_reduce, replayed"),
    Part("kernels", 60, "the kernels of NVLink pairs against the CPU's code"),
    Part("sanitizer", 60, "compute-sanitizer"),
]
