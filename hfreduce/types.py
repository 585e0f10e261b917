"""Datatypes and reduction ops: numpy, ml_dtypes and torch dtypes to hfreduceDataType_t, names to hfreduceRedOp_t."""

from __future__ import annotations

from typing import Any

import numpy as np

from hfreduce._ffi import lib
from hfreduce.errors import InvalidArgumentError

# numpy's (or ml_dtypes') name, torch's name, code
_TABLE: tuple[tuple[str, str, int], ...] = (
    ("int8", "int8", lib.hfreduceInt8),
    ("uint8", "uint8", lib.hfreduceUint8),
    ("int32", "int32", lib.hfreduceInt32),
    ("uint32", "uint32", lib.hfreduceUint32),
    ("int64", "int64", lib.hfreduceInt64),
    ("uint64", "uint64", lib.hfreduceUint64),
    ("float16", "float16", lib.hfreduceFloat16),
    ("float32", "float32", lib.hfreduceFloat32),
    ("float64", "float64", lib.hfreduceFloat64),
    ("bfloat16", "bfloat16", lib.hfreduceBfloat16),
    ("float8_e4m3fn", "float8_e4m3fn", lib.hfreduceFloat8e4m3),
    ("float8_e5m2", "float8_e5m2", lib.hfreduceFloat8e5m2),
)
#: The supported datatypes by name, in the order of their codes.
DTYPE_NAMES: tuple[str, ...] = tuple(name for name, _, _ in _TABLE)
#: The ops by name, in the order of their codes.
OP_NAMES: tuple[str, ...] = ("sum", "prod", "max", "min", "avg")

_FROM_NUMPY = 9  # the first nine are numpy's own, the rest are ml_dtypes'
_BY_NAME: dict[str, int] = {name: code for name, _, code in _TABLE}
_TORCH: dict[str, int] = {f"torch.{name}": code for _, name, code in _TABLE}

#: numpy dtype -> code; ml_dtypes' entries are added when first seen. The communicators' fast path reads it.
DTYPES: dict[Any, int] = {np.dtype(name): code for name, _, code in _TABLE[:_FROM_NUMPY]}
#: What `op` may be, apart from an op made by Communicator.pre_mul_sum -> code.
OPS: dict[Any, int] = {
    "sum": lib.hfreduceSum,
    "prod": lib.hfreduceProd,
    "max": lib.hfreduceMax,
    "min": lib.hfreduceMin,
    "avg": lib.hfreduceAvg,
}
OPS.update({code: code for code in tuple(OPS.values())})

_HINTS = {
    "bool": "view it as uint8 (x.view('uint8') shares the memory): max is then 'or', min is 'and'",
    "complex64": "view it as float32 (sums of complex numbers are sums of their parts)",
    "complex128": "view it as float64 (sums of complex numbers are sums of their parts)",
    "object": "convert it to a numeric dtype",
    "int16": "convert it to int32",
    "uint16": "convert it to int32 or uint32",
}


def _unsupported(dtype: Any, name: str, argument: str) -> InvalidArgumentError:
    hint = _HINTS.get(name, "convert it first")
    return InvalidArgumentError(f"{argument}: dtype {dtype} is not supported; {hint}. Supported: {', '.join(DTYPE_NAMES)}")


def dtype_code(dtype: Any, argument: str = "dtype") -> int:
    """hfreduceDataType_t of a numpy or ml_dtypes dtype, a torch dtype, or a name such as "bfloat16".

    InvalidArgumentError, naming `argument`, for anything else: bool, complex, 16-bit integers, another byte order, structures.
    """
    if isinstance(dtype, str) and dtype in _BY_NAME:
        return _BY_NAME[dtype]
    if type(dtype).__module__ == "torch":
        code = _TORCH.get(str(dtype))
        if code is None:
            raise _unsupported(dtype, str(dtype).rpartition(".")[2], argument)
        return code
    try:
        numpy = np.dtype(dtype)
    except TypeError as error:
        raise InvalidArgumentError(f"{argument}: {dtype!r} is not a dtype. Supported: {', '.join(DTYPE_NAMES)}") from error
    code = DTYPES.get(numpy)
    if code is None:
        if not numpy.isnative:
            raise InvalidArgumentError(
                f"{argument}: dtype {numpy.str} has a foreign byte order; convert it with x.astype('{numpy.name}')"
            )
        if numpy.type.__module__ != "ml_dtypes" or numpy.name not in _BY_NAME:
            raise _unsupported(numpy, numpy.name, argument)
        code = DTYPES[numpy] = _BY_NAME[numpy.name]
    return code


def numpy_dtype(code: int) -> np.dtype[Any]:
    """The numpy dtype of a hfreduceDataType_t; bfloat16 and the two float8 need the package ml_dtypes."""
    name = DTYPE_NAMES[code]
    if code < _FROM_NUMPY:
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise InvalidArgumentError(f"dtype: {name} in numpy needs the package ml_dtypes (pip install ml_dtypes)") from error
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    DTYPES[dtype] = code
    return dtype


def op_code(op: Any) -> int:
    """hfreduceRedOp_t of a name or number; ops from Communicator.pre_mul_sum are the communicator's to resolve."""
    try:
        code = OPS.get(op)
    except TypeError:  # not hashable
        code = None
    if code is None and isinstance(op, int) and lib.hfreduceNumOps <= op <= lib.hfreduceMaxRedOp:
        code = int(op)
    if code is None:
        raise InvalidArgumentError(f"op: {op!r} is not one of {', '.join(OP_NAMES)}, an op number, or an op made by pre_mul_sum")
    return code
