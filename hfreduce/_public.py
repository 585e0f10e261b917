"""Every public name of the package; imported when the first of them is used."""

from __future__ import annotations

from hfreduce.communicator import Communicator, PreMulSum
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
    "empty",
    "get_unique_id",
    "group",
    "init",
    "zeros",
]
