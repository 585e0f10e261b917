"""Tensors that each rank can make for every rank, and what a collective over them must give, in plain torch arithmetic.

Values are small integers, so that sums and products of a few ranks are exact in every dtype and in every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def _present(*names: str) -> list[torch.dtype]:
    return [getattr(torch, name) for name in names if hasattr(torch, name)]


SIGNED = _present("int8", "int16", "int32", "int64")
UNSIGNED = _present("uint8", "uint16", "uint32", "uint64")
INTEGERS = SIGNED + UNSIGNED
FLOATS = _present("float16", "bfloat16", "float32", "float64")
COMPLEX = _present("complex64", "complex128")
HALF_COMPLEX = _present("complex32")
FLOATS8 = _present("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
#: Every dtype that a tensor on the CPU can have, quantized ones apart.
ALL = INTEGERS + FLOATS + COMPLEX + HALF_COMPLEX + FLOATS8 + [torch.bool]

OP = dist.ReduceOp


def ops_of(dtype: torch.dtype) -> list[Any]:
    """The reductions that are defined for a dtype."""
    if dtype == torch.bool:
        return [OP.SUM, OP.PRODUCT, OP.MIN, OP.MAX, OP.BAND, OP.BOR, OP.BXOR]
    if dtype.is_complex:
        return [OP.SUM, OP.AVG]
    if dtype.is_floating_point:
        return [OP.SUM, OP.AVG, OP.PRODUCT, OP.MIN, OP.MAX]
    return [OP.SUM, OP.AVG, OP.PRODUCT, OP.MIN, OP.MAX, OP.BAND, OP.BOR, OP.BXOR]


def make(shape: int | Sequence[int], dtype: torch.dtype, rank: int, salt: int = 0) -> torch.Tensor:
    """The tensor of `rank`; another salt, another tensor."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_complex:
        parts = torch.randint(-3, 4, (*shape, 2), generator=generator).to(torch.float64)
        return torch.view_as_complex(parts).to(dtype)
    if dtype in FLOATS8:
        powers = torch.randint(-2, 3, shape, generator=generator)  # all that float8_e8m0fnu has
        return torch.exp2(powers.to(torch.float32)).to(dtype)
    low = 0 if dtype in UNSIGNED else -3
    return torch.randint(low, 4, shape, generator=generator).to(dtype)


def scattered(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values, "dense", "strided" (every second element of a larger tensor) or "transposed" in memory."""
    if how == "strided":
        wide = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
        view = wide.select(-1, 0)
    elif how == "transposed" and tensor.dim() >= 2:
        view = torch.empty_like(tensor.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1)
    else:
        return tensor.clone(memory_format=torch.contiguous_format)
    view.copy_(tensor)
    return view


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64


def _fold(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    result = tensors[0]
    for tensor in tensors[1:]:
        result = function(result, tensor)
    return result


def reduced(tensors: Sequence[torch.Tensor], op: Any = OP.SUM) -> torch.Tensor:
    """The reduction of one tensor a rank, computed in the widest type. Integer averages truncate toward zero."""
    dtype = tensors[0].dtype
    if dtype == torch.bool:
        either = {OP.SUM: torch.logical_or, OP.MAX: torch.logical_or, OP.BOR: torch.logical_or, OP.BXOR: torch.logical_xor}
        return _fold(either.get(op, torch.logical_and), tensors)
    wide = [tensor.to(_wide(dtype)) for tensor in tensors]
    if op == OP.AVG:
        total = _fold(torch.add, wide)
        integers = not (dtype.is_floating_point or dtype.is_complex)
        mean = torch.div(total, len(wide), rounding_mode="trunc") if integers else total / len(wide)
        return mean.to(dtype)
    functions = {
        OP.SUM: torch.add,
        OP.PRODUCT: torch.mul,
        OP.MIN: torch.minimum,
        OP.MAX: torch.maximum,
        OP.BAND: torch.bitwise_and,
        OP.BOR: torch.bitwise_or,
        OP.BXOR: torch.bitwise_xor,
    }
    return _fold(functions[op], wide).to(dtype)


def comparable(tensor: torch.Tensor) -> torch.Tensor:
    """The values, in a dtype that torch.equal knows."""
    dtype = tensor.dtype
    if dtype in FLOATS8:
        return tensor.contiguous().reshape(-1).view(torch.uint8).reshape(tensor.shape)
    return tensor if dtype == torch.bool else tensor.to(_wide(dtype))


def expect(actual: torch.Tensor, wanted: torch.Tensor, *what: Any, rounding: bool = False) -> None:
    """AssertionError, naming `what`, unless equal in shape, dtype and values (rounding: to within the dtype's rounding)."""
    where = ", ".join(str(part) for part in what)
    assert actual.dtype == wanted.dtype, f"{where}: dtype {actual.dtype}, not {wanted.dtype}"
    assert actual.shape == wanted.shape, f"{where}: shape {tuple(actual.shape)}, not {tuple(wanted.shape)}"
    if rounding:
        torch.testing.assert_close(actual, wanted, msg=lambda text: f"{where}: {text}")
    elif not torch.equal(comparable(actual), comparable(wanted)):
        raise AssertionError(f"{where}:\n{actual}\nnot\n{wanted}")


def finish(work: Any) -> None:
    """Wait for a work; None is that of a synchronous call."""
    if work is not None:
        work.wait()


def tell(what: str) -> None:
    """Let `hear(what)` of other ranks return: order between ranks without timing, beside the group under test."""
    dist.distributed_c10d._get_default_store().set(f"told/{what}", "1")


def hear(what: str) -> None:
    """Wait until a rank has told."""
    dist.distributed_c10d._get_default_store().wait([f"told/{what}"])


def told(what: str) -> bool:
    """Whether a rank has told."""
    return bool(dist.distributed_c10d._get_default_store().check([f"told/{what}"]))
