"""Doubles of what other libraries export: memory that is shared or copied, by each protocol, and said to be so or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Array = np.ndarray[Any, Any]


class Interface:
    """An object with this __array_interface__."""

    def __init__(self, x: Array, *without: str, **more: Any) -> None:
        self.x = x
        self.__array_interface__ = {k: v for k, v in (x.__array_interface__ | more).items() if k not in without}


class CopyingInterface:
    """Each reading of the interface gives the address of a new copy; `keep` holds the last one, else it is gone at once."""

    def __init__(self, x: Array, keep: bool) -> None:
        self.x, self.keep = x, keep

    @property
    def __array_interface__(self) -> dict[str, Any]:
        copy = self.x.copy()
        self.last = copy if self.keep else None
        return dict(copy.__array_interface__)


class Picture:
    """Each reading of the interface gives a new object that holds the bytes, as PIL's images do."""

    def __init__(self, x: Array, kind: Callable[[bytes], Any]) -> None:
        self.x, self.kind = x, kind

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": self.x.shape, "typestr": self.x.dtype.str, "version": 3, "data": self.kind(self.x.tobytes())}


class Pack:
    """An array known by DLPack. Its words: "old" knows no options, "versioned" all of numpy's."""

    def __init__(self, x: Array, words: str = "versioned") -> None:
        self.x, self.words = x, words

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        if self.words == "old":
            if options:
                raise TypeError("unexpected keyword argument")
            return self.x.__dlpack__()
        return self.x.__dlpack__(**({"max_version": (1, 0)} if "max_version" in options else {}))


class CopyingPack(Pack):
    """It makes a copy each time, and says nothing ("old", "silent"), marks it ("marked"), or refuses when none is allowed ("refuses")."""

    def __dlpack__(self, **options: Any) -> Any:
        if self.words == "refuses" and options.get("copy") is False:
            raise BufferError("not without a copy")
        capsule = Pack(self.x.copy(), self.words).__dlpack__(**options)
        if self.words == "marked":
            from hfreduce import dlpack

            dlpack._VersionedHead.from_address(dlpack._capsule_pointer(capsule, b"dltensor_versioned")).flags = 2
        return capsule


class Series:
    """An object with __array__ alone, as pandas' and pyarrow's. copy: it knows that argument; shares: its memory can be had."""

    def __init__(self, x: Array, *, copy: bool = True, shares: bool = True, read_only: bool = False) -> None:
        self.x, self.knows, self.shares = x, copy, shares
        self.shown = x.view()
        self.shown.flags.writeable = not read_only

    def __array__(self, dtype: Any = None, **more: Any) -> Array:
        if more and not self.knows:
            raise TypeError("__array__() got an unexpected keyword argument 'copy'")
        if self.shares:
            return self.shown
        if more.get("copy") is False:
            raise ValueError("a copy would be needed")
        return self.x.copy()


class LyingSeries(Series):
    """It promises no copy, and makes one."""

    def __array__(self, dtype: Any = None, **more: Any) -> Array:
        return self.x.copy()


def jax_double(x: Array, dtype: str) -> Any:
    """What JAX's array is to us: no buffer of bf16 or fp8, an old DLPack capsule, a read-only NumPy array on demand."""
    ml_dtypes = pytest.importorskip("ml_dtypes")

    class ArrayImpl:
        def __init__(self) -> None:
            self.x = x.astype(getattr(ml_dtypes, dtype))
            self.x.flags.writeable = False

        def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
            return self.x

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("numpy knows no such type")

    ArrayImpl.__module__ = "jaxlib._jax"
    return ArrayImpl()
