"""hfreduce for PyTorch: the process-group backend "hfreduce", and gradient sync without a process group.

import hfreduce.torch
torch.distributed.init_process_group("hfreduce")

Installed with pip, the backend is known after `import torch` alone (entry point torch.backends).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hfreduce.torch.backend import communicator, register

if TYPE_CHECKING:
    from hfreduce.torch.ddp import DistributedDataParallel
    from hfreduce.torch.launch import init_process_group
    from hfreduce.torch.process_group import ProcessGroup
    from hfreduce.torch.reducer import GradientReducer

__all__ = ["DistributedDataParallel", "GradientReducer", "ProcessGroup", "communicator", "init_process_group", "register"]

_WHERE = {
    "DistributedDataParallel": "ddp",
    "GradientReducer": "reducer",
    "ProcessGroup": "process_group",
    "init_process_group": "launch",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hfreduce.torch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hfreduce.torch.{_WHERE[name]}"), name)
