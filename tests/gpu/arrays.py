"""Arrays in device memory for the parts that run ranks, and values that all of the library's 12 datatypes have exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from libcuda import Cuda, until

Array = Any  # np.ndarray

#: Name, NumPy's type of the bits, bytes; in the order of the library's enum.
NUMPY = ["int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"]
DTYPES = [*NUMPY, "bfloat16", "float8_e4m3", "float8_e5m2"]


def encode(values: Array, dtype: str) -> Array:
    """Small whole numbers and quarters as this datatype's bits: exact, or AssertionError."""
    if dtype in NUMPY:
        return values.astype(dtype)
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any()
        return (bits >> 16).astype(np.uint16)
    if dtype == "float8_e5m2":
        half = values.astype(np.float16).view(np.uint16)
        assert not (half & 0xFF).any()
        return (half >> 8).astype(np.uint8)
    single = values.astype(np.float32).view(np.uint32)
    assert not (single & 0xFFFFF).any()
    exponent = (single >> 23).astype(np.int64) - 127 + 7  # e4m3: bias 7
    return np.where(values == 0, 0, (exponent << 3) | ((single >> 20) & 7).astype(np.int64)).astype(np.uint8)


def number(dtype: str) -> int:
    """The library's number of the datatype."""
    from hfreduce import nccl

    names = {"float8_e4m3": "FLOAT8E4M3", "float8_e5m2": "FLOAT8E5M2"}
    return int(getattr(nccl, f"NCCL_{names.get(dtype, dtype.upper())}"))


class Device:
    """An array in device memory, used on one stream, with CUDA's array interface."""

    def __init__(self, cuda: Cuda, x: Array, stream: int) -> None:
        self.cuda, self.shape, self.dtype, self.stream, self.size = cuda, x.shape, x.dtype, stream, x.nbytes
        self.address = cuda.alloc(max(self.size, 1))
        self.put(x)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        place = (self.address, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": place, "version": 3, "stream": self.stream}

    def put(self, x: Array) -> None:
        """Copy x in, on the stream, and wait."""
        self.cuda.copy(self.address, x.ctypes.data, self.size, self.stream)
        self.cuda.synchronize(self.stream)

    def get(self) -> Array:
        """The values, after all that is on the stream."""
        self.cuda.synchronize(self.stream)
        x = np.empty(self.shape, self.dtype)
        self.cuda.copy(x.ctypes.data, self.address, self.size, self.stream)
        self.cuda.synchronize(self.stream)
        return x

    def free(self) -> None:
        self.cuda.free(self.address)


def drains(cuda: Cuda, stream: int, seconds: float) -> bool:
    """Whether the stream runs dry in that time."""
    return until(lambda: not cuda.pending(stream), seconds)
