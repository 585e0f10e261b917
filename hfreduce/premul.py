"""PreMulSum: the op that scales each rank's input by a factor of its own."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from hfreduce._ffi import ffi, lib
from hfreduce._handle import Handle
from hfreduce.errors import InvalidArgumentError, check
from hfreduce.types import DTYPE_NAMES, TYPES, dtype_code, numpy_dtype


class PreMulSum:
    """An op that multiplies this rank's input by a factor before summing.

    Made by Communicator.pre_mul_sum, freed when dropped.
    """

    def __init__(self, handle: Handle, factor: Any, dtype: Any) -> None:
        self._handle = weakref.ref(handle)
        self.code = -1
        code = dtype_code(dtype)
        self.dtype = DTYPE_NAMES[code]
        self.factor = factor
        scalar_type = numpy_dtype(TYPES[code].factor)
        try:
            scalar = np.asarray(factor, dtype=scalar_type).reshape(())
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidArgumentError(f"factor: {factor!r} is not a {scalar_type.name} number ({error})") from None
        memory = ffi.new("char[]", scalar.tobytes())
        result = ffi.new("hfreduceRedOp_t *")
        pointer = handle.open()
        check(lib.hfreduceRedOpCreatePreMulSum(result, memory, code, lib.hfreduceScalarHostImmediate, pointer), pointer)
        self.code = int(result[0])

    def resolve(self, handle: Handle) -> int:
        """Its number, for a call on the communicator of `handle`."""
        if self._handle() is not handle:
            raise InvalidArgumentError(
                "op: this pre_mul_sum was made by another communicator; make one with this one's pre_mul_sum"
            )
        return self.code

    def __del__(self) -> None:
        handle = self._handle()
        if handle is not None and self.code >= 0 and not handle.closed:
            lib.hfreduceRedOpDestroy(self.code, handle.pointer)

    def __repr__(self) -> str:
        return f"<hfreduce.PreMulSum {self.factor} {self.dtype}>"
