"""What the process group's logic is mixed into: a Backend that torch's C++ calls in full where there is one, else torch's ProcessGroup.

torch after 2.14 lets Python subclass its Backend; up to then the shim (shim.py), where it was built, has one to subclass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hfreduce.communicator import Communicator
from hfreduce.torch import shim
from hfreduce.torch.keeping import keep_works
from hfreduce.torch.process_group import ProcessGroup, ProcessGroupMixin
from hfreduce.torch.work import CoalescedWork, DeviceWork, Work


def _subclassable() -> Any:
    """The Backend that Python can subclass; None if there is none."""
    from torch._C._distributed_c10d import Backend

    try:
        type("Probe", (Backend,), {})(0, 1)
    except TypeError:  # it has no constructor
        native = shim.load()
        return None if native is None else native.Backend
    return Backend


@functools.cache
def group_class() -> Any:
    """The class of this process's groups. It is chosen at first use and then stays."""
    base = _subclassable()
    if base is None:
        keep_works((Work, DeviceWork, CoalescedWork))
        return ProcessGroup
    from torch._C._distributed_c10d import Backend as TorchBackend

    class Backend(ProcessGroupMixin, base):  # type: ignore[misc, valid-type, unused-ignore]
        """The operations as a backend of torch's own ProcessGroup, one for a device type."""

        _native = shim.load()

        def __init__(
            self, comm: Communicator, store: Any, timeout: timedelta, name: str = "", global_ranks: Sequence[int] = ()
        ) -> None:
            base.__init__(self, comm.rank, comm.nranks)
            self._setup(comm, store, timeout, name, global_ranks)
            if hasattr(TorchBackend, "Options"):  # C++ insists on its own type; before torch 2.5 it does not ask
                options = TorchBackend.Options("hfreduce", timeout)
                for field, value in (("group_name", name), ("global_ranks_in_group", list(global_ranks))):
                    if hasattr(options, field):  # not up to torch 2.6
                        setattr(options, field, value)
                self._options = options
            if dist.is_gloo_available():  # TORCH_DISTRIBUTED_DEBUG=DETAIL: torch itself compares the ranks' calls, over Gloo
                self._detail, self._plain = False, True

        @property
        def supports_splitting(self) -> bool:
            return True

        def split(self, store: Any, ranks: Sequence[int], opts: Any = None) -> Any:
            """The backend of some of this group's ranks; collective over all of it. None on a rank that is not among them."""
            return self.split_group(ranks, getattr(opts, "_timeout", None))

        def eager_connect_single_device(self, device: Any) -> None:
            """Nothing: a group is connected when it is made."""

        def perform_nocolor_split(self, device: Any) -> None:
            """Nothing: new_group makes its communicator with its own members alone."""

    _deny_the_rest(Backend, TorchBackend)
    return Backend


def _deny_the_rest(cls: Any, base: Any) -> None:
    """Answer False where torch asks whether a backend supports what this one does not know of.

    torch's property calls the C++ method, which asks the Python object for that property: without an answer of ours, for ever.
    """
    for name in dir(base):
        if (
            name.startswith("supports_")
            and isinstance(getattr(base, name), property)
            and getattr(cls, name) is getattr(base, name)
        ):
            setattr(cls, name, False)
