"""hfreduce: collective communication on the CPU, for training.

import hfreduce
comm = hfreduce.init()          # under mpirun, torchrun, srun or `hfreduce run`; alone: one rank
comm.all_reduce(gradient)       # numpy or torch, in place; the sum over all ranks
"""

from __future__ import annotations

from hfreduce._version import __version__
from hfreduce.communicator import Communicator, PreMulSum
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
from hfreduce.group import Group, group
from hfreduce.launch import init
from hfreduce.memory import empty, zeros
from hfreduce.types import DTYPE_NAMES, OP_NAMES
from hfreduce.unique_id import UniqueId, get_unique_id
from hfreduce.work import Work

__all__ = [
    "DTYPE_NAMES",
    "OP_NAMES",
    "AbortedError",
    "Communicator",
    "CorruptDataError",
    "CudaError",
    "DeadlineError",
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
