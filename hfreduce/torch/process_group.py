"""The process group: every operation of torch.distributed on a hfreduce.Communicator, for CPU and CUDA tensors.

One mixin holds the logic, under torch's names of the operations; what it is mixed into depends on what the installed torch
offers (base.py). A call checks its tensors, says which addresses the core shall use, and returns a Work. Tensors that the core
cannot use as they lie (not contiguous, lists of parts) go through a contiguous copy, and the Work's `finish` brings the result
to its place.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hfreduce import sealing
from hfreduce.communicator import Communicator
from hfreduce.errors import (
    HfreduceError,
    InvalidUsageError,
)
from hfreduce.launch import text_in_store
from hfreduce.params import default_timeout, join_timeout
from hfreduce.torch import job
from hfreduce.torch.errors import as_torch
from hfreduce.torch.messages import Messages
from hfreduce.torch.moves import Moves
from hfreduce.torch.reductions import Reductions
from hfreduce.torch.tracing import untraced
from hfreduce.torch.work import CoalescedWork
from hfreduce.unique_id import get_unique_id


@untraced
class ProcessGroupMixin(Reductions, Messages):
    """The operations. `_setup` takes the place of a constructor: torch's bases have their own."""

    # --- coalescing, splitting ---

    def start_coalescing(self, device: Any = None) -> None:
        if self._coalescing is not None:
            raise as_torch(InvalidUsageError("coalescing has been started already"))
        self._coalescing = []

    def end_coalescing(self, device: Any = None) -> Any:
        works, self._coalescing = self._coalescing, None
        if works is None:
            raise as_torch(InvalidUsageError("coalescing was not started"))
        return CoalescedWork(works)

    _start_coalescing = startCoalescing = start_coalescing
    _end_coalescing = endCoalescing = end_coalescing

    def split_group(
        self,
        ranks: Sequence[int],
        timeout: Any = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> Any:
        """A group of some of this group's ranks; collective over all of it, each rank passing the ranks of its own new group.

        None on a rank that is in none.
        """
        ranks = sorted(ranks)
        for rank in ranks:
            self._peer(rank, "ranks")
        mine = self._rank in ranks
        chosen = timeout if timeout is not None else self._options._timeout
        try:
            comm = self._comm.split(
                ranks[0] if mine else None, ranks.index(self._rank) if mine else 0, timeout=chosen.total_seconds()
            )
        except HfreduceError as error:
            raise self._as_torch(error) from None
        number = next(self._splits)
        if comm is None:
            return None
        name = group_name or f"{self._name}:split:{number}:{ranks[0]}"
        store = dist.PrefixStore(f"{name}/", self._store)
        known = self._global_ranks or list(range(self._size))
        group = make(comm, store, chosen, name, [known[rank] for rank in ranks])
        group.setGroupDesc(group_desc or f"{self._desc}:split:{number}")
        return group

    splitGroup = split_group

    # --- other names of the same: torch has renamed them more than once ---

    all_gather_single = allgather_into_tensor = Moves._allgather_base
    all_gather_single_coalesced = Moves.allgather_into_tensor_coalesced
    reduce_scatter_single = reduce_scatter_tensor = Reductions._reduce_scatter_base
    reduce_scatter_single_coalesced = Reductions.reduce_scatter_tensor_coalesced
    all_to_all_single = Moves.alltoall_base


# --- making groups ---


class ProcessGroup(ProcessGroupMixin, dist.ProcessGroup):  # type: ignore[misc, no-redef, unused-ignore]
    """The group as a Python subclass of torch's ProcessGroup: what torch up to 2.13 offers without a compiler."""

    def __init__(
        self, comm: Communicator, store: Any, timeout: timedelta, name: str = "", global_ranks: Sequence[int] = ()
    ) -> None:
        dist.ProcessGroup.__init__(self, comm.rank, comm.nranks)
        self._setup(comm, store, timeout, name, global_ranks)

    # torch 2.4 looks for names in C++, where a group of Python's has none

    @property
    def group_name(self) -> str:
        return self.getGroupName()

    @property
    def group_desc(self) -> str:
        return self.getGroupDesc()

    def _set_group_name(self, name: str) -> None:
        self.setGroupName(name)

    def _set_group_desc(self, desc: str) -> None:
        self.setGroupDesc(desc)


def make(comm: Communicator, store: Any, timeout: timedelta, name: str = "", global_ranks: Sequence[int] = ()) -> Any:
    """A process group on a communicator, or a backend for torch's own: see base.py."""
    from hfreduce.torch.base import group_class

    return group_class()(comm, store, timeout, name, global_ranks)


def create_process_group(
    store: Any,
    rank: int,
    size: int,
    timeout: timedelta | float | None = None,
    *,
    name: str = "",
    global_ranks: Sequence[int] = (),
) -> Any:
    """Make a process group of its own, beside torch.distributed.init_process_group, for libraries that manage groups themselves.

    store: a torch.distributed.Store that all of the group's ranks have; each group needs a PrefixStore with a prefix of its own.
    rank: 0 to size - 1, another one on each rank. timeout: how long the call waits for the other ranks, and the deadline of the
    group's operations: a timedelta or seconds, None: HFREDUCE_TIMEOUT. name: for messages. global_ranks: the ranks' numbers in
    the whole job, where they have such.

    Returns what torch.distributed calls a backend: an object with allreduce, broadcast, allgather, send, recv, barrier and so
    on, as torch.distributed.ProcessGroup has them, each returning a Work; with abort, shutdown, rank, size, and `communicator`.
    Where this torch lets Python subclass its ProcessGroup only, the object is one. It is not registered with torch.distributed.

    The ids by which ranks join travel through the store: encrypted where HFREDUCE_SECRET is set, on all ranks alike, else in the clear.

    Collective: returns when all ranks have come, or raises DeadlineError, which names those that are missing. Raises
    InvalidArgumentError for a rank or size out of range. Each error is also a torch.distributed.DistBackendError.
    """
    return join(
        store,
        rank,
        size,
        timeout.total_seconds() if isinstance(timeout, timedelta) else timeout,
        name=name,
        global_ranks=global_ranks,
        first=False,
        members=False,
    )


def join(
    store: Any,
    rank: int,
    size: int,
    seconds: float | None,
    *,
    name: str,
    global_ranks: Sequence[int],
    first: bool,
    members: bool = True,
) -> Any:
    """Make a group of a store's ranks. first: it is the default group. members: its ranks are of the default group, or that itself."""
    try:
        if size == 1:
            comm = Communicator(rank, 1, timeout=seconds, name=name or None)
            shared = None
        else:
            shared = job.of_default_group() if members else None
            key = shared.key if shared is not None else sealing.job_key()
            where = "hfreduce/unique_id"
            if rank == 0:
                known = shared is not None and shared.is_local(global_ranks)
                local = known or (first and job.starts_local(rank, size))
                unique_id = get_unique_id(local=local)
                store.set(where, sealing.to_text(unique_id, key))
            else:
                unique_id = sealing.from_text(
                    text_in_store(store, where, rank, join_timeout(default_timeout() if seconds is None else seconds)), key
                )
            comm = Communicator(rank, size, unique_id, timeout=seconds, name=name or None)
            # torchrun's store outlives a restart: ranks of the next attempt must find neither this id nor what we say later.
            if rank == 0:
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    store.delete_key(where)
            store = dist.PrefixStore(hashlib.sha256(unique_id).hexdigest()[:16], store)
        if first and shared is None:
            shared = job.agree(comm)
    except HfreduceError as error:
        raise as_torch(error) from None
    group = make(comm, store, timedelta(seconds=comm.timeout), name, global_ranks)
    if first:
        group.job = shared
    return group
