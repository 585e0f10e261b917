"""hfreduce: collective communication on the CPU, for training.

import hfreduce
comm = hfreduce.init()          # under mpirun, torchrun, srun or `hfreduce run`; alone: one rank
comm.all_reduce(gradient)       # numpy or torch, in place; the sum over all ranks
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hfreduce._version import __version__

if TYPE_CHECKING:
    from hfreduce.communicator import Communicator
    from hfreduce.connection import Connection
    from hfreduce.errors import (
        AbortedError,
        CorruptDataError,
        CudaError,
        DeadlineError,
        HfreduceError,
        InProgressError,
        InternalError,
        InvalidArgumentError,
        InvalidUsageError,
        MismatchError,
        PeerLostError,
        SystemError_,
    )
    from hfreduce.grouping import Group, group
    from hfreduce.launch import init
    from hfreduce.memory import empty, zeros
    from hfreduce.premul import PreMulSum
    from hfreduce.reducer import GradientReducer
    from hfreduce.types import DTYPE_NAMES, OP_NAMES
    from hfreduce.unique_id import UniqueId, get_unique_id
    from hfreduce.work import Work

__all__ = [
    "DTYPE_NAMES",
    "OP_NAMES",
    "AbortedError",
    "Communicator",
    "Connection",
    "CorruptDataError",
    "CudaError",
    "DeadlineError",
    "GradientReducer",
    "Group",
    "HfreduceError",
    "InProgressError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidUsageError",
    "MismatchError",
    "PeerLostError",
    "PreMulSum",
    "SystemError_",
    "UniqueId",
    "Work",
    "__version__",
    "empty",
    "get_unique_id",
    "group",
    "init",
    "zeros",
]


# Each name -> the module that has it.
_WHERE = {
    "AbortedError": "errors",
    "Communicator": "communicator",
    "Connection": "connection",
    "CorruptDataError": "errors",
    "CudaError": "errors",
    "DTYPE_NAMES": "types",
    "DeadlineError": "errors",
    "GradientReducer": "reducer",
    "Group": "grouping",
    "HfreduceError": "errors",
    "InProgressError": "errors",
    "InternalError": "errors",
    "InvalidArgumentError": "errors",
    "InvalidUsageError": "errors",
    "MismatchError": "errors",
    "OP_NAMES": "types",
    "PeerLostError": "errors",
    "PreMulSum": "premul",
    "SystemError_": "errors",
    "UniqueId": "unique_id",
    "Work": "work",
    "empty": "memory",
    "get_unique_id": "unique_id",
    "group": "grouping",
    "init": "launch",
    "zeros": "memory",
}


def __getattr__(name: str) -> Any:
    """Import on first use: NumPy, which most of the names need, takes far longer to import than the rest."""
    if name in _WHERE:
        value = globals()[name] = getattr(importlib.import_module(f"hfreduce.{_WHERE[name]}"), name)
        return value
    try:
        return importlib.import_module(f"hfreduce.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"hfreduce.{name}":
            raise
        raise AttributeError(f"module 'hfreduce' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
