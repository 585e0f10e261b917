"""UniqueId: the 128 bytes that name a communicator and let its ranks in."""

from __future__ import annotations

from typing import Any

from hfreduce._ffi import ffi, lib
from hfreduce.errors import InvalidArgumentError, check

#: Bytes of a unique id.
UNIQUE_ID_BYTES: int = lib.HFREDUCE_UNIQUE_ID_BYTES


class UniqueId(bytes):
    """The name of a communicator, 128 bytes. It carries the secret: send it over a trusted channel, and do not print it."""

    def __new__(cls, value: Any) -> UniqueId:
        try:
            data = bytes(memoryview(value))
        except TypeError:
            raise InvalidArgumentError(f"unique_id: {type(value).__name__} is not bytes-like") from None
        if len(data) != UNIQUE_ID_BYTES:
            raise InvalidArgumentError(f"unique_id: has {len(data)} bytes instead of {UNIQUE_ID_BYTES}")
        return super().__new__(cls, data)

    def __repr__(self) -> str:
        return f"<hfreduce.UniqueId of {len(self)} bytes>"

    __str__ = __repr__

    @classmethod
    def from_address(cls, address: str, secret: str = "", tag: int = 0) -> UniqueId:
        """Make the id that every rank can make by itself.

        address: "host:port" or "[v6]:port" on which rank 0 will listen. secret: hex; without it only a loopback address is
        accepted. tag: tells apart communicators made with one address and secret.
        """
        raw = ffi.new("hfreduceUniqueId *")
        check(lib.hfreduceUniqueIdFromAddress(raw, address.encode(), secret.encode() if secret else ffi.NULL, tag))
        return cls(ffi.buffer(raw))


def get_unique_id(*, local: bool = False) -> UniqueId:
    """Make a name for a new communicator and listen for its ranks in this process (as ncclGetUniqueId does).

    local=True listens on loopback only, for ranks that are all on this machine.
    """
    raw = ffi.new("hfreduceUniqueId *")
    check(lib.hfreduceGetUniqueIdLocal(raw) if local else lib.hfreduceGetUniqueId(raw))
    return UniqueId(ffi.buffer(raw))
