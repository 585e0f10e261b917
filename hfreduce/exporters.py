"""NumPy arrays over the memory of other objects on the host: __array_interface__, the buffer protocol, __array__. Never over a copy.

An exporter may answer each request with a new copy, in which nobody would see a result, and need not say so. So it is asked twice, and
refused if the two answers lie apart. What it marks as read-only and hands over whole (bytes) may be a copy for a call that only reads.
"""

from __future__ import annotations

import array
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

from hfreduce.errors import InvalidArgumentError

Array = np.ndarray[Any, Any]

# Their buffers are what they are made of.
_BUFFERS = (memoryview, bytes, bytearray, array.array, mmap.mmap)

_OWN = "whose memory is its own, such as a NumPy array, and read the result from that"


class _Face:
    """An object with this __array_interface__ and no other face, that keeps the owner of the memory."""

    def __init__(self, said: Mapping[str, Any], owner: Any) -> None:
        self.__array_interface__ = said
        self.owner = owner


def _place(x: Array) -> int:
    return int(x.__array_interface__["data"][0])


def _check_same(first: Array, second: Array, x: Any, name: str, how: str) -> None:
    """Both arrays live, so that equal places are the same memory."""
    if first.size and _place(first) != _place(second):
        raise InvalidArgumentError(
            f"{name}: {type(x).__name__} makes a new copy of its memory each time {how}, and the result would be lost in it; pass an array "
            f"{_OWN}"
        )


def refuse_value(x: Any, name: str) -> InvalidArgumentError:
    """The error for a number: NumPy's, or Python's."""
    kind = f"numpy.{type(x).__name__}" if type(x).__module__ == "numpy" else type(x).__name__
    return InvalidArgumentError(
        f"{name}: {kind} is not an array but a value, to which no result can be written; make an array of it with "
        f"{name} = numpy.array({name}), pass that, and read the result from it"
    )


def check_unmasked(x: Array, name: str) -> Array:
    """A NumPy array itself. InvalidArgumentError if it is a masked one, whose mask would be ignored."""
    if isinstance(x, np.ma.MaskedArray):
        raise InvalidArgumentError(
            f"{name}: it is a masked array, and calls know no masks; pass {name}.data, which shares its memory, or a copy made with "
            f"{name}.filled(value)"
        )
    return x


def from_interface(x: Any, said: Any, name: str) -> Array:
    """The array of an object whose __array_interface__ was just read as `said`; `name` is its argument's.

    InvalidArgumentError if it is masked, cannot be read, or names new memory each time that is not marked as read-only.
    """
    first = _of_interface(x, said, name)
    gap = np.empty(first.nbytes, np.uint8)  # takes the place of a copy that is gone by now
    second = _of_interface(x, x.__array_interface__, name)
    del gap
    whole = not isinstance(said.get("data"), tuple)  # an object that is held, not an address
    if not whole or first.flags.writeable:
        _check_same(first, second, x, name, "its __array_interface__ is read")
    return first


def _of_interface(x: Any, said: Any, name: str) -> Array:
    try:
        if said.get("mask") is not None:
            raise InvalidArgumentError(
                f"{name}: it is a masked array, and calls know no masks; pass its data, or a copy that is filled"
            )
        data = said.get("data")
        if isinstance(data, tuple):
            if said.get("offset"):
                raise InvalidArgumentError(
                    f"{name}: its __array_interface__ gives an address and the offset {said['offset']}; the protocol has offsets in a "
                    f"buffer only"
                )
        else:
            said = {**said, "data": memoryview(x if data is None else data)}  # held, so that the exporter cannot move it
        return np.asarray(_Face(said, x))
    except InvalidArgumentError:
        raise
    except Exception as error:  # whatever a wrong description leads to
        raise InvalidArgumentError(
            f"{name}: the __array_interface__ of {type(x).__name__} cannot be read ({type(error).__name__}: {error})"
        ) from None


def from_buffer(x: Any, view: memoryview, name: str) -> Array:
    """The array over x's buffer, of which `view` was just made. It holds the buffer: x can neither move nor resize it meanwhile."""
    found = _of_buffer(x, view, name)
    if not isinstance(x, _BUFFERS) and not view.readonly:
        _check_same(found, _of_buffer(x, memoryview(x), name), x, name, "it is asked for its buffer")
    return found


def _of_buffer(x: Any, view: memoryview, name: str) -> Array:
    try:
        return np.asarray(view)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise InvalidArgumentError(f"{name}: numpy cannot take the buffer of this {type(x).__name__}: {error}") from None


def from_method(x: Any, name: str) -> Array:
    """The array that x.__array__ gives when no copy is allowed."""
    try:
        first, second = x.__array__(copy=False), x.__array__(copy=False)
    except TypeError:
        raise InvalidArgumentError(
            f"{name}: {type(x).__name__} makes a NumPy array of itself (__array__), but cannot say whether that is a copy; pass "
            f"an array {_OWN}"
        ) from None
    except (ValueError, RuntimeError, BufferError) as error:
        raise InvalidArgumentError(
            f"{name}: {type(x).__name__} cannot make a NumPy array of itself without a copy ({error}); pass an array {_OWN}"
        ) from None
    if not isinstance(first, np.ndarray) or not isinstance(second, np.ndarray):
        raise InvalidArgumentError(
            f"{name}: the __array__ of {type(x).__name__} gives a {type(first).__name__}, which is no array"
        )
    _check_same(first, second, x, name, "its __array__ is called (though told to make none)")
    return check_unmasked(first, name)


def from_immutable(x: Any, name: str) -> Array:
    """The array of an object that never changes (JAX's arrays), to be read only: a copy is as good as its memory."""
    try:
        return np.asarray(x)
    except Exception as error:  # each library has its own
        raise InvalidArgumentError(
            f"{name}: numpy cannot take this {type(x).__name__} ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from None
