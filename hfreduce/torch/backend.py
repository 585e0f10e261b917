"""Registration of the backend with torch.distributed, and making a process group from what torch hands over."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

#: The backend's name in init_process_group.
NAME = "hfreduce"


def register() -> None:
    """Make the backend known to torch.distributed; again is no fault. Imports nothing of the core until a group is made."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise ImportError("this torch was built without torch.distributed")
    if NAME.upper() in dist.Backend._plugins:
        return
    devices = ["cpu", "cuda"] if torch.version.cuda else ["cpu"]
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=devices)


def _create(options: Any, backend_options: Any) -> Any:
    """What torch calls for a new group: its store, rank, size and timeout are in `options`."""
    import torch
    import torch.distributed as dist

    from hfreduce.torch.process_group import join
    from hfreduce.torch.versions import warn_if_newer

    warn_if_newer(torch.__version__)
    timeout = options.timeout
    chosen = getattr(backend_options, "_timeout", None)
    if isinstance(chosen, timedelta):
        timeout = chosen
    return join(
        options.store,
        options.group_rank,
        options.group_size,
        timeout.total_seconds(),
        name=options.group_id,
        global_ranks=list(options.global_ranks_in_group),
        first=not dist.is_initialized(),
    )


def communicator(group: Any = None) -> Any:
    """The hfreduce.Communicator of a process group (None: the default group).

    Without an initialised process group: hfreduce.init(). TypeError if the group is of another backend.
    """
    import torch.distributed as dist

    if group is None and not dist.is_initialized():
        from hfreduce.launch import init

        return init()
    group = dist.group.WORLD if group is None else group
    found = found_in(group, "communicator")
    if found is None:
        raise TypeError(f'the group\'s backend is {dist.get_backend(group)!r}, not "{NAME}"')
    return found.communicator


def found_in(group: Any, attribute: str) -> Any:
    """The group, or its backend of some device, if it is ours: if it has that attribute. None if none has."""
    import torch

    for found in (group, _backend_of(group, torch.device("cpu")), _backend_of(group, torch.device("cuda"))):
        if hasattr(found, attribute):
            return found
    return None


def _backend_of(group: Any, device: Any) -> Any:
    try:
        found = group._get_backend(device)
    except RuntimeError:
        return None
    return getattr(found, "wrapped_pg", found)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
