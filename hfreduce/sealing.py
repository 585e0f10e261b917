"""Unique ids in places that strangers can read, such as torch's stores: encrypted and signed by a key that only the job has.

A sealed id is a nonce, the id xored with HMAC-SHA256(key, nonce and block number), and an HMAC-SHA256 over both (encrypt, then sign).
"""

from __future__ import annotations

import hashlib
import hmac
import os

from hfreduce.errors import InvalidArgumentError, InvalidUsageError
from hfreduce.unique_id import UNIQUE_ID_BYTES, UniqueId

#: Bytes of a key.
KEY_BYTES = 32
_NONCE = 16
_SIGNATURE = 32
_SEALED, _OPEN = "sealed:", "open:"


def job_key() -> bytes | None:
    """The key that HFREDUCE_SECRET stands for; None where it is not set. InvalidArgumentError if it is not hex."""
    secret = os.environ.get("HFREDUCE_SECRET", "")
    if not secret:
        return None
    try:
        return _mac(bytes.fromhex(secret), b"hfreduce: unique ids in stores")
    except ValueError:
        raise InvalidArgumentError("HFREDUCE_SECRET: it is not an even number of hex digits") from None


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()


def _crypt(key: bytes, nonce: bytes, data: bytes) -> bytes:
    blocks = range(-(-len(data) // 32))
    stream = b"".join(_mac(key, b"stream" + nonce + bytes([block])) for block in blocks)
    return bytes(a ^ b for a, b in zip(data, stream))


def to_text(unique_id: UniqueId, key: bytes | None) -> str:
    """What to put into the store. Without a key the id itself, by which whoever reads it can join."""
    if key is None:
        return _OPEN + unique_id.hex()
    nonce = os.urandom(_NONCE)
    sealed = nonce + _crypt(key, nonce, unique_id)
    return _SEALED + (sealed + _mac(key, b"signature" + sealed)).hex()


def from_text(text: str, key: bytes | None) -> UniqueId:
    """The id of what another rank put into the store.

    InvalidUsageError if one side has a key and the other none or another one: an id that is not sealed by the key that this rank
    has may be a stranger's.
    """
    kind, _, digits = text.partition(":")
    try:
        data = bytes.fromhex(digits)
    except ValueError:
        data = b""
    sizes = {_OPEN: UNIQUE_ID_BYTES, _SEALED: _NONCE + UNIQUE_ID_BYTES + _SIGNATURE}
    if len(data) != sizes.get(kind + ":", 0) or not data:
        raise InvalidUsageError("what rank 0 put into the store is no unique id; do all ranks run the same version of hfreduce?")
    if kind + ":" == _OPEN:
        if key is None:
            return UniqueId(data)
        raise InvalidUsageError(
            "the unique id in the store is not encrypted, and this rank knows the job's secret: set HFREDUCE_SECRET on all ranks"
        )
    if key is None:
        raise InvalidUsageError("the unique id in the store is encrypted: set HFREDUCE_SECRET on this rank, as on rank 0")
    sealed, signature = data[:-_SIGNATURE], data[-_SIGNATURE:]
    if not hmac.compare_digest(_mac(key, b"signature" + sealed), signature):
        raise InvalidUsageError(
            "the unique id in the store was encrypted by another secret than this rank's: set HFREDUCE_SECRET to the same on all ranks"
        )
    return UniqueId(_crypt(key, sealed[:_NONCE], sealed[_NONCE:]))
