"""The library's parameters and its description of itself."""

from __future__ import annotations

from typing import NamedTuple

from hfreduce._ffi import ffi, lib
from hfreduce.errors import check, text


class Param(NamedTuple):
    """One HFREDUCE_ parameter: its value in force and its default as text, and whether the environment or a file gave it."""

    name: str
    value: str
    preset: str
    help: str
    is_set: bool


def params() -> list[Param]:
    """All parameters of the library. Values are read at first use and do not change afterwards."""
    raw = ffi.new("hfreduceParam_t *")
    result = []
    for index in range(lib.hfreduceParamCount()):
        check(lib.hfreduceParamGet(index, raw))
        result.append(Param(text(raw.name), text(raw.value), text(raw.preset), text(raw.help), bool(raw.is_set)))
    return result


def default_timeout() -> float:
    """Seconds that an operation may take when a communicator is not told: HFREDUCE_TIMEOUT, else 1800."""
    return _seconds("HFREDUCE_TIMEOUT")


def join_timeout(timeout: float) -> float:
    """Seconds that joining may take where operations may take `timeout`: HFREDUCE_JOIN_TIMEOUT, else 300, and no more than that."""
    return min(_seconds("HFREDUCE_JOIN_TIMEOUT"), timeout)


def warn_after() -> float:
    """Seconds after which a wait says whom it waits for, and again at doubling intervals; 0: never."""
    return float(next(param.value for param in params() if param.name == "HFREDUCE_WARN_AFTER"))


def _seconds(name: str) -> float:
    param = next(param for param in params() if param.name == name)
    return float(param.value) or float(param.preset)


def describe() -> list[tuple[str, str]]:
    """What was built and what this machine has, as (key, value) in the library's order."""
    size = lib.hfreduceDescribe(ffi.NULL, 0) + 1
    memory = ffi.new("char[]", size)
    lib.hfreduceDescribe(memory, size)
    pairs = []
    for line in text(memory).splitlines():
        key, _, value = line.partition(":")
        pairs.append((key.strip(), value.strip()))
    return pairs


def version() -> str:
    """The C library's version, "major.minor.patch"."""
    raw = ffi.new("int *")
    check(lib.hfreduceGetVersion(raw))
    code = int(raw[0])
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"
