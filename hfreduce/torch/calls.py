"""The spellings of torch's calls: options objects, or op, root and timeout one by one; names for the profiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hfreduce.errors import (
    HfreduceError,
)


class Options:
    """Backend options as torch's code expects to find them on a backend; plain, so that they can be copied."""

    def __init__(self, timeout: timedelta, group_name: str = "", global_ranks: Sequence[int] = ()) -> None:
        self.backend = "hfreduce"
        self._timeout = timeout
        self.group_name = group_name
        self.global_ranks_in_group = list(global_ranks)
        self.is_high_priority_stream = False


#: c10d's method -> the name of the operation that torch.profiler shows for the other backends.
_LABELS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_base": "_all_gather_base",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_base": "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "recv_anysource": "recvAnySource",
}

profiling: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: False)


def operation(method: Any) -> Any:
    """Name the operation in torch.profiler, and raise errors that are torch's too."""
    name = method.__name__.strip("_")
    label = "hfreduce:" + _LABELS.get(name, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if profiling():
                with torch.autograd.profiler.record_function(label):
                    return method(self, *args, **kwargs)
            return method(self, *args, **kwargs)
        except HfreduceError as error:
            raise self._as_torch(error) from None

    return call


class AllgatherOptions:
    """torch binds no constructor for these in some versions."""

    def __init__(self) -> None:
        self.timeout = timedelta(milliseconds=-1)
        self.asyncOp = True


def options_of(kind: Any, opts: Any, op: Any, timeout: Any) -> Any:
    """The options of a call, from whichever of its spellings was used: an options object, or op and timeout in its place."""
    if isinstance(opts, (dist.ReduceOp, dist.ReduceOp.RedOpType)):
        opts, op, timeout = None, opts, op if isinstance(op, timedelta) else timeout
    elif isinstance(opts, timedelta):
        opts, timeout = None, opts
    if opts is None:
        opts = kind()
        if op is not None:
            opts.reduceOp = op if isinstance(op, dist.ReduceOp) else dist.ReduceOp(op)
        if timeout is not None:
            opts.timeout = timeout
    return opts
