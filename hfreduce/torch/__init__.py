"""hfreduce for PyTorch: the process-group backend "hfreduce", and gradient sync without a process group.

import hfreduce.torch
torch.distributed.init_process_group("hfreduce")

Installed with pip, the backend is known after `import torch` alone from torch 2.5 on (entry point torch.backends).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch as _torch

from hfreduce.torch import versions as _versions

_versions.refuse_too_old(_torch.__version__)

from hfreduce.torch.backend import communicator, register  # noqa: E402 (what it needs may be absent from older versions)

if TYPE_CHECKING:
    from hfreduce.torch.ddp import DistributedDataParallel
    from hfreduce.torch.launch import init_process_group
    from hfreduce.torch.process_group import ProcessGroup, create_process_group
    from hfreduce.torch.reducer import GradientReducer

__all__ = [
    "DistributedDataParallel",
    "GradientReducer",
    "ProcessGroup",
    "communicator",
    "create_process_group",
    "init_process_group",
    "register",
]

_WHERE = {
    "DistributedDataParallel": "ddp",
    "GradientReducer": "reducer",
    "ProcessGroup": "process_group",
    "create_process_group": "process_group",
    "init_process_group": "launch",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hfreduce.torch' has no attribute {name!r}")
    _versions.warn_if_newer(_torch.__version__)
    return getattr(importlib.import_module(f"hfreduce.torch.{_WHERE[name]}"), name)
