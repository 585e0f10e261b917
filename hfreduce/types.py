"""Datatypes and reduction ops: numpy, ml_dtypes and torch dtypes to hfreduceDataType_t, names to hfreduceRedOp_t."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hfreduce._ffi import ffi, lib
from hfreduce.errors import InvalidArgumentError


class Type(NamedTuple):
    """A datatype as csrc/call/dtype.h has it."""

    name: str  #: numpy's (or ml_dtypes') name; torch's is the same
    code: int  #: hfreduceDataType_t
    size: int  #: bytes of an element
    factor: int  #: hfreduceDataType_t of a premultiplied sum's factor
    is_float: bool


def _read_types() -> dict[int, Type]:
    found = {}
    one = ffi.new("hfreduceType_t *")
    for index in range(lib.hfreduceTypeCount()):
        lib.hfreduceTypeGet(index, one)
        name = ffi.string(one.name).decode()
        found[int(one.datatype)] = Type(name, int(one.datatype), int(one.size), int(one.factor), bool(one.is_float))
    return found


#: hfreduceDataType_t -> what it is.
TYPES: dict[int, Type] = _read_types()
#: The supported datatypes by name, in the order of their codes.
DTYPE_NAMES: tuple[str, ...] = tuple(each.name for each in TYPES.values())
#: The ops by name, in the order of their codes.
OP_NAMES: tuple[str, ...] = ("sum", "prod", "max", "min", "avg")

_BY_NAME: dict[str, int] = {each.name: each.code for each in TYPES.values()}
_TORCH: dict[str, int] = {f"torch.{name}": code for name, code in _BY_NAME.items()}

#: numpy dtype -> code; ml_dtypes' entries are added when first seen. The communicators' fast path reads it.
DTYPES: dict[Any, int] = {np.dtype(name): code for name, code in _BY_NAME.items() if hasattr(np, name)}
#: The codes of numpy's own dtypes; the rest are ml_dtypes'.
FROM_NUMPY: frozenset[int] = frozenset(DTYPES.values())
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
    name = TYPES[code].name
    if code in FROM_NUMPY:
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
