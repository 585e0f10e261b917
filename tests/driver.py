"""What Python tests need of CUDA's driver: the machine's, or the stand-in of tests/c/fake/cuda, a test double and no GPU."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import stand_ins


def find_driver() -> str:
    """What to load as CUDA's driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return str(Path(stand_ins.cuda_stand_in()) / "libcuda.so.1")
    return "libcuda.so.1"


class Driver:
    """What the tests need of the driver, on device 0."""

    def __init__(self, path: str) -> None:
        os.environ.setdefault("FAKE_CUDA", "delay=300")  # the stand-in's copies take their time, so that a missing order shows
        self.cuda = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # the core's dlopen finds it by its name
        context = ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self("cuCtxSetCurrent", context)

    def __call__(self, function: str, *arguments: Any) -> None:
        code = getattr(self.cuda, function)(*arguments)
        assert code == 0, f"{function}: {code}"

    def stream(self) -> int:
        handle = ctypes.c_void_p()
        self("cuStreamCreate", ctypes.byref(handle), 1)  # non-blocking
        assert handle.value
        return handle.value

    def wait(self, stream: int | None) -> None:
        self("cuStreamSynchronize", ctypes.c_void_p(stream))
