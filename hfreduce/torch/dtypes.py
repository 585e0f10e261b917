"""torch's dtypes and reduction ops in the core's terms.

The core reduces the datatypes of hfreduce.types.TYPES and moves bytes. What else torch has is reduced as a type that holds it
(int16 in int32), as its parts (complex), or as bytes with a fitting op (bool).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hfreduce._ffi import lib
from hfreduce.errors import InvalidArgumentError
from hfreduce.types import TYPES


def _present(table: dict[str, Any]) -> dict[Any, Any]:
    return {getattr(torch, name): value for name, value in table.items() if hasattr(torch, name)}


#: dtype -> hfreduceDataType_t, where the core has the type itself.
NATIVE: dict[Any, int] = _present({each.name: each.code for each in TYPES.values()})
#: dtype -> (hfreduceDataType_t of a part, parts an element): sums of these are sums of their parts.
_PARTS: dict[Any, tuple[int, int]] = _present(
    {
        "complex32": (lib.hfreduceFloat16, 2),
        "complex64": (lib.hfreduceFloat32, 2),
        "complex128": (lib.hfreduceFloat64, 2),
    }
)
#: dtype -> the type that it is reduced in; the result is rounded (or wraps) back once.
_WIDER: dict[Any, Any] = _present(
    {
        "int16": torch.int32,
        "uint16": torch.int32,
        "float8_e4m3fnuz": torch.float32,
        "float8_e5m2fnuz": torch.float32,
        "float8_e8m0fnu": torch.float32,
    }
)

_OP = dist.ReduceOp
#: hash(ReduceOp) -> hfreduceRedOp_t: reading `.op` costs more than a small all_reduce.
CORE_OPS: dict[int, int] = {
    hash(_OP(_OP.SUM)): lib.hfreduceSum,
    hash(_OP(_OP.PRODUCT)): lib.hfreduceProd,
    hash(_OP(_OP.MAX)): lib.hfreduceMax,
    hash(_OP(_OP.MIN)): lib.hfreduceMin,
    hash(_OP(_OP.AVG)): lib.hfreduceAvg,
}
_PREMUL = hash(dist._make_nccl_premul_sum(1.0)) if hasattr(dist, "_make_nccl_premul_sum") else -1
_BITWISE = {
    hash(_OP(_OP.BAND)): torch.bitwise_and,
    hash(_OP(_OP.BOR)): torch.bitwise_or,
    hash(_OP(_OP.BXOR)): torch.bitwise_xor,
}
_NAMES = {hash(_OP(getattr(_OP, name))): name for name in ("SUM", "PRODUCT", "MAX", "MIN", "AVG", "BAND", "BOR", "BXOR")}
_NAMES[_PREMUL] = "PREMUL_SUM"


class Reduction(NamedTuple):
    """How to reduce a dtype with an op.

    Either in the core: in `wider` (None: as it is), as `code` with `parts` core elements an element, with `op`; `factor` is that
    of a premultiplied sum (None: another op). Or, where `local` is given, by gathering and folding with that function.
    """

    code: int
    parts: int
    op: int
    wider: Any = None
    factor: float | None = None
    local: Any = None


_cache: dict[tuple[Any, int], Reduction] = {}


def reduction(dtype: Any, op: Any) -> Reduction:
    """How to reduce tensors of dtype with a ReduceOp. InvalidArgumentError where torch defines no such reduction."""
    key = hash(op)
    if key == _PREMUL:
        factor = op.factor if hasattr(op, "factor") else op.__getstate__()[1]
        plain = reduction(dtype, _OP(_OP.SUM))
        if dtype is torch.bool:
            raise _invalid(dtype, key)
        return plain._replace(factor=float(factor))
    found = _cache.get((dtype, key))
    if found is None:
        found = _cache[dtype, key] = _find(dtype, key)
    return found


def _invalid(dtype: Any, key: int) -> InvalidArgumentError:
    return InvalidArgumentError(f"op: {_NAMES.get(key, key)} is not defined for {dtype}")


def _find(dtype: Any, key: int) -> Reduction:
    if key in _BITWISE:
        if dtype.is_floating_point or dtype.is_complex:
            raise _invalid(dtype, key)
        return Reduction(lib.hfreduceUint8, dtype.itemsize, -1, local=_BITWISE[key])
    if key not in CORE_OPS:
        raise _invalid(dtype, key)
    op = CORE_OPS[key]
    if dtype is torch.bool:  # as NCCL: a sum is "or", a product is "and"
        if op == lib.hfreduceAvg:
            raise _invalid(dtype, key)
        return Reduction(lib.hfreduceUint8, 1, lib.hfreduceMax if op in (lib.hfreduceSum, lib.hfreduceMax) else lib.hfreduceMin)
    if dtype in NATIVE:
        return Reduction(NATIVE[dtype], 1, op)
    if dtype in _PARTS:
        code, parts = _PARTS[dtype]
        if op == lib.hfreduceProd:
            return Reduction(lib.hfreduceUint8, dtype.itemsize, -1, local=torch.mul)
        if op not in (lib.hfreduceSum, lib.hfreduceAvg):
            raise _invalid(dtype, key)
        return Reduction(code, parts, op)
    if dtype in _WIDER:
        wider = _WIDER[dtype]
        return Reduction(NATIVE[wider], 1, op, wider=wider)
    raise InvalidArgumentError(f"dtype: {dtype} cannot be reduced; convert it first")


def moved(tensor: Any) -> tuple[int, int]:
    """(hfreduceDataType_t, count) to move a tensor's elements as they are."""
    code = NATIVE.get(tensor.dtype)
    if code is not None:
        return code, tensor.numel()
    if tensor.dtype in _PARTS:
        code, parts = _PARTS[tensor.dtype]
        return code, parts * tensor.numel()
    return lib.hfreduceUint8, tensor.numel() * tensor.element_size()


def op_name(op: Any) -> str:
    """ "SUM", "AVG", ..."""
    return _NAMES.get(hash(op), str(op))
