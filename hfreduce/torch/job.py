"""What the ranks of a job share once they have met: a key for the unique ids of later groups, and who is on which machine.

torch's store can be read by whoever reaches its port. So ids go through it encrypted: by the key that rank 0 of the default group made
and sent over that group's communicator; for the default group itself by HFREDUCE_SECRET, or by a key that the launcher's
communicator carried (launch.py). With torchrun and no HFREDUCE_SECRET there is nothing before the default group to carry a key.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hfreduce.communicator import Communicator
from hfreduce.sealing import KEY_BYTES


class Job(NamedTuple):
    """key: seals unique ids. nodes: the node of each rank of the job."""

    key: bytes
    nodes: tuple[int, ...]

    def is_local(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks are all on one machine. No ranks: all of the job."""
        return len({self.nodes[rank] for rank in ranks} if ranks else set(self.nodes)) == 1


def agree(comm: Communicator) -> Job:
    """Make the job of a communicator's ranks. Collective."""
    key = bytearray(os.urandom(KEY_BYTES))
    nodes = array("i", [0] * comm.nranks)
    comm.broadcast(key, root=0)
    comm.all_gather(array("i", [comm.node]), nodes)
    return Job(bytes(key), tuple(nodes))


_handed: Job | None = None


@contextlib.contextmanager
def handing(job: Job) -> Iterator[None]:
    """The default group that is made inside is this job's: its ranks have met before."""
    global _handed
    _handed = job
    try:
        yield
    finally:
        _handed = None


def of_default_group() -> Job | None:
    """The job of the default group, or while that is being made, the one that was handed over; None if there is none."""
    import torch.distributed as dist

    from hfreduce.torch.backend import found_in

    if not dist.is_initialized():
        return _handed
    group: Any = found_in(dist.group.WORLD, "job")
    return None if group is None else group.job


def starts_local(rank: int, size: int) -> bool:
    """Whether torchrun's variables, or another launcher's that sets them, say that the default group's ranks are on this machine."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return [os.environ.get(name, "") for name in names] == [str(rank), str(size), str(size)]
