"""What a stranger can reach of a job in torch: the ids that lie in its store, and the ports that its ranks listen on."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hfreduce import sealing
from hfreduce.errors import InvalidUsageError, MismatchError

SCRIPT = Path(__file__).parent / "scripts" / "listening.py"
SECRET, OTHER = "00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100"


class Read(dist.Store):  # type: ignore[misc, unused-ignore]
    """A store that notes the unique ids that ranks put into it, as a stranger with a connection could."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.ids: list[str] = []

    def set(self, key: str, value: Any) -> None:
        text = value if isinstance(value, str) else bytes(value).decode(errors="replace")
        if key.endswith("unique_id"):
            self.ids.append(text)
        self.inner.set(key, text)

    def get(self, key: str) -> bytes:
        return bytes(self.inner.get(key))

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self.inner.wait(keys, *timeout)

    def add(self, key: str, value: int) -> int:
        return int(self.inner.add(key, value))

    def check(self, keys: list[str]) -> bool:
        return bool(self.inner.check(keys))

    def delete_key(self, key: str) -> bool:
        return bool(self.inner.delete_key(key))


def ids_in_the_store(secret: str) -> tuple[list[str], list[str]]:
    """What a stranger reads of a default group and of another one, and the names that the ids would have in the clear."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    inner = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    os.environ.pop("HFREDUCE_SECRET", None)
    if secret:
        os.environ["HFREDUCE_SECRET"] = secret
    store = Read(dist.PrefixStore("read", inner))
    plain: list[str] = []
    sealed = sealing.to_text

    def to_text(unique_id: Any, key: Any) -> str:
        plain.append(unique_id.hex())
        return sealed(unique_id, key)

    sealing.to_text = to_text
    try:
        dist.init_process_group("hfreduce", store=store, rank=rank, world_size=nranks, timeout=timedelta(seconds=30))
        group = dist.new_group([0, 1])
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
        assert total.item() == nranks
    finally:
        sealing.to_text = sealed
        os.environ.pop("HFREDUCE_SECRET", None)
    return store.ids, plain


@pytest.mark.parametrize("secret", [SECRET, ""])
def test_a_stranger_cannot_join_by_what_lies_in_the_store(ranks: Any, secret: str) -> None:
    (ids, plain), (nothing, _) = ranks.run(ids_in_the_store, 2, secret)
    assert len(ids) == len(plain) == 2 and not nothing
    for i, (text, unique_id) in enumerate(zip(ids, plain)):
        if i == 0 and not secret:  # nothing before the default group carries a key
            assert text.endswith(unique_id)
            continue
        assert unique_id not in text and unique_id[8:40] not in text
        for key in (None, os.urandom(sealing.KEY_BYTES)):
            with pytest.raises(InvalidUsageError, match="HFREDUCE_SECRET"):
                sealing.from_text(text, key)


def with_secrets(secrets: list[str]) -> str:
    import hfreduce.torch

    rank = dist.get_rank()
    os.environ["HFREDUCE_SECRET"] = secrets[rank]
    store = dist.PrefixStore("secrets", dist.distributed_c10d._get_default_store())
    try:
        hfreduce.torch.create_process_group(store, rank, 2, 5.0).shutdown()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        del os.environ["HFREDUCE_SECRET"]
    return "joined"


@pytest.mark.parametrize(
    ("secrets", "words"),
    [
        ([SECRET, SECRET], "joined"),
        ([SECRET, OTHER], "another secret"),
        ([SECRET, ""], "is encrypted"),
        (["", SECRET], "not encrypted"),
    ],
)
def test_ranks_of_other_secrets_say_so(ranks: Any, secrets: list[str], words: str) -> None:
    said = ranks.run(with_secrets, 2, secrets)
    assert words in said[1], said
    assert (said[0] == "joined") == (words == "joined"), said
    assert words == "joined" or said[1].startswith(InvalidUsageError.__name__), said
    assert MismatchError.__name__ not in said[0]


@pytest.mark.limit(150)
@pytest.mark.parametrize("how", ["own", "torch"])
def test_a_job_on_one_machine_listens_on_loopback_alone(how: str) -> None:
    launcher = ["hfreduce", "run", "-n", "2"]
    if how == "torch":
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("HFREDUCE_")}
    command = [sys.executable, "-m", *launcher, *([sys.executable] if how == "own" else []), str(SCRIPT), how]
    done = subprocess.run(command, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 "))
    assert lines == ["0 127.0.0.1", "1 127.0.0.1"], done.stdout + done.stderr
