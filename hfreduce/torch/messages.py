"""Messages between two ranks, and barriers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hfreduce._ffi import ffi, lib
from hfreduce.errors import (
    DeadlineError,
    InvalidArgumentError,
)
from hfreduce.torch.calls import operation, options_of
from hfreduce.torch.dtypes import moved
from hfreduce.torch.errors import as_torch
from hfreduce.torch.group import Group
from hfreduce.torch.tensors import (
    address,
    dense,
    is_dense,
    one,
)
from hfreduce.torch.tracing import untraced


@untraced
class Messages(Group):
    """Needs Group."""

    # --- messages ---

    def _peer(self, peer: int, name: str) -> int:
        if not 0 <= peer < self._size:
            raise InvalidArgumentError(f"{name}: {peer} is not a rank of this group of {self._size}")
        return peer

    @operation
    def send(self, tensors: Any, dst: int, tag: int = 0) -> Any:
        tensor = self._checked(one(tensors, "tensors"))
        buffer = dense(tensor)
        code, count = moved(buffer)
        call = (lib.hfreduceSendTag, (address(buffer), count, code, self._peer(dst, "dst"), tag))
        return self._run("send", [call], (tensor, buffer), [tensor])

    @operation
    def recv(self, tensors: Any, src: int, tag: int = 0) -> Any:
        tensor, buffer, finish = self._landing(tensors)
        code, count = moved(buffer)
        call = (lib.hfreduceRecvTag, (address(buffer), count, code, self._peer(src, "src"), tag))
        return self._run("recv", [call], (tensor, buffer), [tensor], None, finish, lambda: src)

    @operation
    def recv_anysource(self, tensors: Any, tag: int = 0) -> Any:
        tensor, buffer, finish = self._landing(tensors)
        code, count = moved(buffer)
        source = ffi.new("int *", -1)
        call = (lib.hfreduceRecvAny, (address(buffer), count, code, tag, source))
        return self._run("recv_anysource", [call], (tensor, buffer, source), [tensor], None, finish, lambda: int(source[0]))

    recvAnysource = recv_anysource

    def _landing(self, tensors: Any) -> tuple[Any, Any, Callable[[], None] | None]:
        tensor = self._checked(one(tensors, "tensors"))
        if is_dense(tensor):
            return tensor, tensor, None
        buffer = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return tensor, buffer, functools.partial(tensor.copy_, buffer)

    # --- barriers ---

    @operation
    def barrier(self, opts: Any = None, timeout: Any = None) -> Any:
        opts = options_of(dist.BarrierOptions, opts, None, timeout)
        return self._run("barrier", [(lib.hfreduceBarrier, ())], (), [], opts)

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """Wait until all ranks have come here; RuntimeError that names those that have not within `timeout` (a timedelta).

        Through the store, so that it says who is missing also when the communicator is of no use any more.
        """
        if isinstance(getattr(timeout, "timeout", None), timedelta):  # BarrierOptions
            timeout = timeout.timeout
        seconds = timeout.total_seconds() if timeout is not None and timeout.days >= 0 else self._default_seconds
        self._record("monitored_barrier", (), "", None)
        key = f"hfreduce/monitored_barrier/{next(self._barriers)}"
        self._store.set(f"{key}/{self._rank}", b"1")
        end = time.monotonic() + seconds
        if self._rank:
            try:
                self._store.wait([f"{key}/verdict"], timedelta(seconds=seconds + 5))
                verdict = self._store.get(f"{key}/verdict").decode()
            except RuntimeError:
                verdict = f"Rank {self._rank} has waited {seconds} s in monitoredBarrier; rank 0 did not come, or died"
            if verdict:
                raise as_torch(DeadlineError(f"[Rank {self._rank}]: {verdict}", rank=self._rank, op="monitored_barrier"))
            return
        missing = []
        for rank in range(1, self._size):
            left = max(end - time.monotonic(), 0.001)
            try:
                self._store.wait([f"{key}/{rank}"], timedelta(seconds=left))
            except RuntimeError:
                missing.append(rank)
                if not wait_all_ranks:
                    break
        verdict = ""
        if missing:
            who = f"Rank{'s' if wait_all_ranks else ''} {', '.join(map(str, missing))}"
            verdict = f"{who} failed to pass monitoredBarrier in {int(seconds * 1000)} ms (Rank 0 timed out in monitoredBarrier)"
        self._store.set(f"{key}/verdict", verdict)
        if verdict:
            raise as_torch(DeadlineError(f"[Rank 0]: {verdict}", rank=0, peer=missing[0], op="monitored_barrier"))
