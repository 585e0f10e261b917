"""Tensors as the core sees them: contiguous memory, or a copy of it, and the way back."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hfreduce._ffi import ffi
from hfreduce.errors import (
    InvalidArgumentError,
)
from hfreduce.torch.dtypes import NATIVE, moved


def address(tensor: Any) -> Any:
    return ffi.cast("void *", tensor.data_ptr())


def is_dense(tensor: Any) -> bool:
    """Whether the core can use its memory as it lies."""
    return bool(tensor.is_contiguous()) and not tensor.is_conj() and not tensor.is_neg()


def dense(tensor: Any) -> Any:
    """The tensor, or a contiguous copy of it."""
    return tensor if is_dense(tensor) else tensor.contiguous().resolve_conj().resolve_neg()


def adjacent(tensors: Sequence[Any]) -> bool:
    """Whether dense tensors of one dtype lie one after the other, as the chunks of one do."""
    place = tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != place or not is_dense(tensor):
            return False
        place += tensor.numel() * tensor.element_size()
    return True


def scatter_back(parts: Sequence[Any], flat: Any) -> Callable[[], None]:
    """A finish that copies consecutive parts of `flat` to the tensors."""

    def finish() -> None:
        place = 0
        for part in parts:
            count = part.numel()
            part.copy_(flat[place : place + count].view(part.shape))
            place += count

    return finish


def one(x: Any, name: str) -> Any:
    """torch passes a single tensor as a list of one."""
    if isinstance(x, torch.Tensor):
        return x
    if len(x) != 1:
        raise InvalidArgumentError(f"{name}: {len(x)} tensors; a call takes one (one device a rank)")
    return x[0]


def in_turn(finishes: Sequence[Callable[[], Any]]) -> Callable[[], None] | None:
    if not finishes:
        return None

    def finish() -> None:
        for each in finishes:
            each()

    return finish


def one_list(lists: Any, name: str) -> Any:
    if len(lists) != 1:
        raise InvalidArgumentError(f"{name}: {len(lists)} lists; a call takes one (one device a rank)")
    return lists[0]


def flattened(parts: Sequence[Any]) -> Any:
    """The parts one after the other, as one tensor: themselves if they lie so."""
    if adjacent(parts):
        total = sum(part.numel() for part in parts)
        return parts[0].as_strided((total,), (1,))
    return torch.cat([part.reshape(-1) for part in parts])


def part_dtype(dtype: Any) -> Any:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(
        dtype, torch.float16 if dtype is torch.complex32 else dtype
    )


def move_code(tensor: Any) -> tuple[int, int]:
    """(hfreduceDataType_t, its elements in one of the tensor's) to move it in parts."""
    code = NATIVE.get(tensor.dtype)
    if code is not None:
        return code, 1
    code, count = moved(torch.empty(1, dtype=tensor.dtype))
    return code, count


def displacements(counts: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(counts, initial=0))[:-1]


def product(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)
