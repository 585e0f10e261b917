"""Sealed unique ids: what may be read of them without the key, and what is refused."""

from __future__ import annotations

import os

import pytest

from hfreduce import sealing
from hfreduce.errors import InvalidArgumentError, InvalidUsageError
from hfreduce.unique_id import UNIQUE_ID_BYTES, UniqueId

KEY = bytes(range(sealing.KEY_BYTES))
ID = UniqueId(bytes(i * 7 % 256 for i in range(UNIQUE_ID_BYTES)))


def test_a_sealed_id_comes_back() -> None:
    text = sealing.to_text(ID, KEY)
    assert sealing.from_text(text, KEY) == ID
    assert sealing.to_text(ID, KEY) != text, "each sealing needs a nonce of its own"
    assert sealing.from_text(sealing.to_text(ID, None), None) == ID


def test_nothing_of_the_id_shows() -> None:
    zeros = UniqueId(bytes(UNIQUE_ID_BYTES))
    raw = bytes.fromhex(sealing.to_text(zeros, KEY).partition(":")[2])
    words = [raw[i : i + 8] for i in range(0, len(raw), 8)]
    assert len(set(words)) == len(words), "the stream repeats itself"
    assert bytes(8) not in words


def test_an_id_of_another_key_is_refused() -> None:
    text = sealing.to_text(ID, KEY)
    with pytest.raises(InvalidUsageError, match="another secret"):
        sealing.from_text(text, os.urandom(sealing.KEY_BYTES))
    with pytest.raises(InvalidUsageError, match="set HFREDUCE_SECRET on this rank"):
        sealing.from_text(text, None)
    with pytest.raises(InvalidUsageError, match="not encrypted"):
        sealing.from_text(sealing.to_text(ID, None), KEY)


def test_every_changed_byte_is_noticed() -> None:
    kind, _, digits = sealing.to_text(ID, KEY).partition(":")
    for i in range(0, len(digits), 2):
        changed = digits[:i] + f"{int(digits[i : i + 2], 16) ^ 1:02x}" + digits[i + 2 :]
        with pytest.raises(InvalidUsageError):
            sealing.from_text(f"{kind}:{changed}", KEY)


@pytest.mark.parametrize(
    "text", ["", "strange", "sealed:", "sealed:00", "sealed:xy", "open:00", "open:xy", "other:" + "00" * 128]
)
@pytest.mark.parametrize("key", [None, KEY])
def test_what_is_no_id_is_refused(text: str, key: bytes | None) -> None:
    with pytest.raises(InvalidUsageError):
        sealing.from_text(text, key)


def test_the_key_comes_from_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFREDUCE_SECRET", raising=False)
    assert sealing.job_key() is None
    keys = set()
    for secret in ("00112233", "00112234", "AABB", "aabb"):
        monkeypatch.setenv("HFREDUCE_SECRET", secret)
        key = sealing.job_key()
        assert key is not None and len(key) == sealing.KEY_BYTES and bytes.fromhex(secret) not in key
        keys.add(key)
    assert len(keys) == 3
    monkeypatch.setenv("HFREDUCE_SECRET", "no hex")
    with pytest.raises(InvalidArgumentError, match="HFREDUCE_SECRET"):
        sealing.job_key()
