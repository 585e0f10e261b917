"""Checks of arguments that calls on a communicator share; InvalidArgumentError names the argument and says what it must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hfreduce.buffer import Buffer
from hfreduce.errors import InvalidArgumentError
from hfreduce.types import TYPES


def seconds(timeout: Any) -> float:
    """A timeout as a float: positive and finite."""
    try:
        value = float(timeout)
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"timeout: {timeout!r} is not a number of seconds") from None
    if not (value > 0 and math.isfinite(value)):
        raise InvalidArgumentError(f"timeout: {timeout!r} is not a positive, finite number of seconds")
    return value


def integer(value: Any, name: str) -> int:
    """An int, or what has __index__, as an int."""
    if type(value) is int:
        return value
    try:
        return int(value.__index__())
    except AttributeError:
        raise InvalidArgumentError(f"{name}: {value!r} is not an integer") from None


def rank_of(value: Any, nranks: int, name: str) -> int:
    """A rank, from 0 to nranks - 1."""
    if type(value) is int and 0 <= value < nranks:
        return value
    rank = integer(value, name)
    if not 0 <= rank < nranks:
        raise InvalidArgumentError(f"{name}: {rank} is not from 0 to {nranks - 1} (nranks is {nranks})")
    return rank


def tag_of(tag: Any) -> int:
    """A tag, from 0 to 2**31 - 1."""
    if type(tag) is int and 0 <= tag < 2**31:
        return tag
    value = integer(tag, "tag")
    if not 0 <= value < 2**31:
        raise InvalidArgumentError(f"tag: {value} is not from 0 to {2**31 - 1}")
    return value


def same_dtype(source: Buffer, target: Buffer) -> None:
    """x and out are of one dtype."""
    if source.dtype != target.dtype:
        raise InvalidArgumentError(f"out: dtype {TYPES[target.dtype].name} differs from x's {TYPES[source.dtype].name}")


def alike(source: Buffer, target: Buffer) -> Buffer:
    """x, of the dtype and the number of elements that out has."""
    if source.dtype != target.dtype:
        same_dtype(source, target)
    if source.elements != target.elements:
        raise InvalidArgumentError(f"out: has {target.elements} elements, x has {source.elements}; they must be equal")
    return source


def equal_parts(part: Buffer, part_name: str, whole: Buffer, whole_name: str, nranks: int) -> None:
    """The whole is of the part's dtype, and holds nranks parts."""
    if part.dtype != whole.dtype:
        raise InvalidArgumentError(
            f"{whole_name}: dtype {TYPES[whole.dtype].name} differs from {part_name}'s {TYPES[part.dtype].name}"
        )
    if whole.elements != part.elements * nranks:
        divisible = "" if whole.elements % nranks == 0 else f" (and {whole.elements} is not divisible by nranks)"
        raise InvalidArgumentError(
            f"{whole_name}: has {whole.elements} elements; with {part.elements} in {part_name} it must have nranks * "
            f"{part.elements} = {part.elements * nranks}{divisible}"
        )


def counts_of(counts: Sequence[int], name: str, nranks: int) -> list[int]:
    """nranks numbers of elements, none of them negative."""
    try:
        values = [integer(count, name) for count in counts]
    except TypeError:
        raise InvalidArgumentError(f"{name}: {type(counts).__name__} is not a sequence of {nranks} integers") from None
    if len(values) != nranks:
        raise InvalidArgumentError(f"{name}: has {len(values)} entries, nranks is {nranks}")
    if any(value < 0 for value in values):
        raise InvalidArgumentError(f"{name}: {values} has a negative entry")
    return values


def sums_to(values: Sequence[int], name: str, total: int, array: str) -> None:
    """The counts are those of all elements of the array."""
    if sum(values) != total:
        raise InvalidArgumentError(f"{name}: sums to {sum(values)}, but {array} has {total} elements")


def places(values: Sequence[int]) -> list[int]:
    """Where parts of so many elements begin, one after the other."""
    found, place = [], 0
    for value in values:
        found.append(place)
        place += value
    return found
