"""numpy arrays in memory that is cheap to communicate from (hfreduceMemAlloc)."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex, Union

import numpy as np

from hfreduce._ffi import ffi, lib
from hfreduce.errors import InvalidArgumentError, check
from hfreduce.types import dtype_code, numpy_dtype

Shape = Union[SupportsIndex, Iterable[SupportsIndex]]


def empty(shape: Shape, dtype: Any = "float32") -> np.ndarray[Any, Any]:
    """Make an array of `shape`, not initialised, page-aligned, on huge pages where the system grants them.

    dtype: any that hfreduce reduces, as numpy dtype, torch dtype or name ("bfloat16", "float8_e4m3fn" and "float8_e5m2" need
    ml_dtypes). The memory is given back when the array and all its views are gone. SystemError_ when the system has none left.
    """
    dims = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
    if any(n < 0 for n in dims):
        raise InvalidArgumentError(f"shape: {dims} has a negative extent")
    kind = numpy_dtype(dtype_code(dtype))
    count = math.prod(dims)
    size = max(count, 1) * kind.itemsize
    pointer = ffi.new("void **")
    check(lib.hfreduceMemAlloc(pointer, size))
    owner = ffi.gc(pointer[0], lib.hfreduceMemFree, size)
    return np.frombuffer(ffi.buffer(owner, size), dtype=kind, count=count).reshape(dims)


def zeros(shape: Shape, dtype: Any = "float32") -> np.ndarray[Any, Any]:
    """As `empty`, filled with zeros."""
    array = empty(shape, dtype)
    array[...] = 0
    return array
