"""Exceptions: one class a kind of failure, each also the builtin that fits.

The C result codes map to them here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from hfreduce._ffi import ffi, lib

__all__ = [
    "AbortedError",
    "CorruptDataError",
    "CudaError",
    "DeadlineError",
    "HfreduceError",
    "InProgressError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidUsageError",
    "MismatchError",
    "PeerLostError",
    "SystemError_",
]


class HfreduceError(Exception):
    """Base of all errors of hfreduce.

    Attributes, None where the core does not know them: `code` (hfreduceResult_t), `rank` (the rank that noticed), `peer` (the
    rank that the error is about), `op` ("all_reduce", ...), `seq` (the operation's sequence number on its communicator),
    `phase` ("connect", "local reduce", "tree up", ...) and `host` (of `rank`).
    """

    default_code: int | None = None

    def __init__(
        self,
        message: str = "",
        *,
        code: int | None = None,
        rank: int | None = None,
        peer: int | None = None,
        op: str | None = None,
        seq: int | None = None,
        phase: str | None = None,
        host: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = self.default_code if code is None else code
        self.rank = rank
        self.peer = peer
        self.op = op
        self.seq = seq
        self.phase = phase
        self.host = host

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), dict(self.__dict__))


def _rebuild(kind: type[HfreduceError], message: str, facts: dict[str, Any]) -> HfreduceError:
    error = kind(message)
    error.__dict__.update(facts)
    return error


class CudaError(HfreduceError, RuntimeError):
    """The CUDA driver refused something."""

    default_code = lib.hfreduceUnhandledCudaError


class SystemError_(HfreduceError, OSError):
    """The operating system refused something; the message has the errno."""

    default_code = lib.hfreduceSystemError


class InternalError(HfreduceError, RuntimeError):
    """A fault of the library."""

    default_code = lib.hfreduceInternalError


class InvalidArgumentError(HfreduceError, ValueError):
    """An argument is wrong; the message says which, why, and what to do."""

    default_code = lib.hfreduceInvalidArgument


class InvalidUsageError(HfreduceError, RuntimeError):
    """The call is not legal here: closed communicator, async_op inside a group, after fork."""

    default_code = lib.hfreduceInvalidUsage


class PeerLostError(HfreduceError, ConnectionError):
    """A peer died, left or cannot be reached."""

    default_code = lib.hfreduceRemoteError


class InProgressError(HfreduceError, TimeoutError):
    """The time given to Work.wait passed; the operation goes on."""

    default_code = lib.hfreduceInProgress


class DeadlineError(HfreduceError, TimeoutError):
    """The communicator's deadline passed: the operation has failed. The message says who was waited for."""

    default_code = lib.hfreduceTimeout


class MismatchError(HfreduceError, RuntimeError):
    """Ranks called different operations, counts, datatypes, ops or roots; the message names both sides."""

    default_code = lib.hfreduceMismatch


class AbortedError(HfreduceError, RuntimeError):
    """The communicator was aborted, here or on another rank."""

    default_code = lib.hfreduceAborted


class CorruptDataError(HfreduceError, RuntimeError):
    """Data failed its checksum."""

    default_code = lib.hfreduceCorrupt


_KINDS: dict[int, type[HfreduceError]] = {
    kind.default_code: kind
    for kind in (
        CudaError,
        SystemError_,
        InternalError,
        InvalidArgumentError,
        InvalidUsageError,
        PeerLostError,
        InProgressError,
        DeadlineError,
        MismatchError,
        AbortedError,
        CorruptDataError,
    )
    if kind.default_code is not None
}


def text(chars: Any) -> str:
    """A C string as str."""
    return bytes(ffi.string(chars)).decode("utf-8", "replace")


def from_info(code: int, info: Any) -> HfreduceError:
    """The exception for result `code`, with the facts of a hfreduceErrorInfo_t (those of another error are ignored)."""
    kind = _KINDS.get(code, HfreduceError)
    if info.code != code:
        return kind(text(lib.hfreduceGetErrorString(code)), code=code)
    return kind(
        text(info.text) or text(lib.hfreduceGetErrorString(code)),
        code=code,
        rank=info.rank if info.rank >= 0 else None,
        peer=info.peer if info.peer >= 0 else None,
        op=text(info.op) or None,
        seq=info.seq if info.seq >= 0 else None,
        phase=text(info.phase) or None,
        host=text(info.host) or None,
    )


def last_error(code: int, comm: Any = ffi.NULL) -> HfreduceError:
    """The exception for `code`, just returned by a call on this thread (and on `comm`, a hfreduceComm_t or NULL)."""
    info = ffi.new("hfreduceErrorInfo_t *")
    lib.hfreduceGetErrorInfo(ffi.NULL, info)
    if info.code != code and comm != ffi.NULL:
        lib.hfreduceGetErrorInfo(comm, info)
    return from_info(code, info)


def check(code: int, comm: Any = ffi.NULL) -> None:
    """Raise unless `code` is hfreduceSuccess."""
    if code:
        raise last_error(code, comm)
