"""hfreduce.nccl: cupy.cuda.nccl's names, numbers and signatures, and what the calls do, on host memory against NumPy."""

from __future__ import annotations

import gc
import inspect
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hfreduce import nccl
from hfreduce.nccl import NcclCommunicator, NcclConfig, NcclError

DTYPES = {
    "int8": nccl.NCCL_INT8,
    "uint8": nccl.NCCL_UINT8,
    "int32": nccl.NCCL_INT32,
    "uint32": nccl.NCCL_UINT32,
    "int64": nccl.NCCL_INT64,
    "uint64": nccl.NCCL_UINT64,
    "float16": nccl.NCCL_FLOAT16,
    "float32": nccl.NCCL_FLOAT32,
    "float64": nccl.NCCL_FLOAT64,
}
OPS: dict[int, Callable[..., Any]] = {
    nccl.NCCL_SUM: np.sum,
    nccl.NCCL_PROD: np.prod,
    nccl.NCCL_MAX: np.max,
    nccl.NCCL_MIN: np.min,
}
#: Statuses by NCCL's numbers.
CUDA, SYSTEM, INTERNAL, ARGUMENT, USAGE, REMOTE, IN_PROGRESS, TIMEOUT = range(1, 9)


def ptr(x: np.ndarray[Any, Any]) -> int:
    return int(x.ctypes.data)


def values(rank: int, count: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return ((np.arange(count) + rank) % 3 + 1).astype(dtype)


@pytest.fixture
def one() -> Iterator[NcclCommunicator]:
    comm = NcclCommunicator(1, nccl.get_unique_id(), 0)
    yield comm
    comm.destroy()


@pytest.fixture
def all_of() -> Iterator[Callable[[int], list[NcclCommunicator]]]:
    made: list[NcclCommunicator] = []

    def make(n: int) -> list[NcclCommunicator]:
        comms = NcclCommunicator.initAll(n)
        made.extend(comms)
        return comms

    yield make
    for comm in made:
        comm.destroy()


@pytest.fixture(autouse=True)
def no_open_group() -> Iterator[None]:
    """A test that fails inside a group must not leave it to the next one."""
    yield
    while True:
        try:
            nccl.groupEnd()
        except NcclError as error:
            if "without" in str(error):
                return


# --- names, numbers, signatures ---


def test_constants() -> None:
    assert {name: getattr(nccl, f"NCCL_{name}") for name in ("SUM", "PROD", "MAX", "MIN", "AVG")} == {
        "SUM": 0,
        "PROD": 1,
        "MAX": 2,
        "MIN": 3,
        "AVG": 4,
    }
    numbers = "INT8 0 CHAR 0 UINT8 1 INT32 2 INT 2 UINT32 3 INT64 4 UINT64 5 FLOAT16 6 HALF 6 FLOAT32 7 FLOAT 7 FLOAT64 8 DOUBLE 8 BFLOAT16 9"
    words = numbers.split()
    for name, number in zip(words[::2], words[1::2]):
        assert getattr(nccl, f"NCCL_{name}") == int(number), name
    assert nccl.available is True
    assert nccl.get_version() == nccl.get_build_version() >= 21801  # the first with commSplit
    star: dict[str, Any] = {}
    exec("from hfreduce.nccl import *", star)
    assert {"NcclCommunicator", "NcclError", "groupStart", "get_unique_id", "NCCL_SUM", "check_status"} <= set(star)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("__init__", "ndev commId rank config"),
        ("initAll", "devices"),
        ("commSplit", "color key config"),
        ("allReduce", "sendbuf recvbuf count datatype op stream"),
        ("reduce", "sendbuf recvbuf count datatype op root stream"),
        ("broadcast", "sendbuff recvbuff count datatype root stream"),
        ("bcast", "buff count datatype root stream"),
        ("reduceScatter", "sendbuf recvbuf recvcount datatype op stream"),
        ("allGather", "sendbuf recvbuf count datatype stream"),
        ("send", "sendbuf count datatype peer stream"),
        ("recv", "recvbuf count datatype peer stream"),
        ("destroy", ""),
        ("abort", ""),
        ("device_id", ""),
        ("rank_id", ""),
        ("size", ""),
        ("check_async_error", ""),
    ],
)
def test_signatures(name: str, parameters: str) -> None:
    given = [p for p in inspect.signature(getattr(NcclCommunicator, name)).parameters if p != "self"]
    assert given == parameters.split()


def test_unique_ids_are_bytes_and_differ() -> None:
    a, b = nccl.get_unique_id(), nccl.get_unique_id()
    assert isinstance(a, bytes) and len(a) == 128 and a != b
    assert pickle.loads(pickle.dumps(a)) == a


@pytest.mark.parametrize("form", ["bytes", "bytearray", "unsigned", "signed", "numpy"])
def test_forms_of_unique_id(form: str) -> None:
    """CuPy 14 gives bytes, earlier ones a tuple of signed characters."""
    raw = nccl.get_unique_id()
    signed = tuple(b - 256 if b > 127 else b for b in raw)
    forms = {"bytes": bytes(raw), "bytearray": bytearray(raw), "unsigned": tuple(raw), "signed": signed}
    forms["numpy"] = tuple(np.array(signed, np.int8))
    comm = NcclCommunicator(1, forms[form], 0)
    assert comm.size() == 1
    comm.destroy()


def test_wrong_unique_ids() -> None:
    with pytest.raises(ValueError, match="commId length 4 != 128"):
        NcclCommunicator(1, b"abcd", 0)
    with pytest.raises(TypeError, match="commId"):
        NcclCommunicator(1, "a" * 128, 0)
    with pytest.raises(ValueError, match="no byte"):
        NcclCommunicator(1, (256,) * 128, 0)
    with pytest.raises(NcclError, match="unique id was not made") as caught:
        NcclCommunicator(1, bytes(128), 0)
    assert caught.value.status == ARGUMENT


# --- errors as objects ---


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (1, "UNHANDLED_CUDA_ERROR"),
        (2, "SYSTEM_ERROR"),
        (3, "INTERNAL_ERROR"),
        (4, "INVALID_ARGUMENT"),
        (5, "INVALID_USAGE"),
        (6, "REMOTE_ERROR"),
        (7, "IN_PROGRESS"),
        (8, "TIMEOUT"),
    ],
)
def test_error_objects(status: int, name: str) -> None:
    error = NcclError(status)
    assert isinstance(error, RuntimeError)
    assert error.status == status
    assert str(error).startswith(f"NCCL_ERROR_{name}: ") and len(str(error)) > len(name) + 15
    with pytest.raises(NcclError) as caught:
        nccl.check_status(status)
    assert caught.value.args == error.args
    nccl.check_status(0)


def test_errors_survive_pickling(one: NcclCommunicator) -> None:
    with pytest.raises(NcclError) as caught:
        one.allReduce(8, 8, 1, 77, 0, 0)
    for error in (NcclError(1), caught.value):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.args, copy.status, str(copy)) == (NcclError, error.args, error.status, str(error))


# --- one rank ---


def test_one_rank(one: NcclCommunicator) -> None:
    assert (one.rank_id(), one.size(), one.device_id()) == (0, 1, -1)
    assert isinstance(one.comm, int) and one.comm != 0
    one.check_async_error()
    x, y = values(0, 10), np.zeros(10, np.float32)
    one.allReduce(ptr(x), ptr(y), 10, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, 0)
    assert (x == y).all()


def test_keywords(one: NcclCommunicator) -> None:
    x, y = values(0, 10), np.zeros(10, np.float32)
    one.allReduce(sendbuf=ptr(x), recvbuf=ptr(y), count=10, datatype=7, op=0, stream=0)
    assert (x == y).all()
    other = NcclCommunicator(ndev=1, commId=nccl.get_unique_id(), rank=0, config=NcclConfig(split_share=1))
    assert other.size() == 1
    other.destroy()


def test_destroy_and_what_comes_after() -> None:
    comm = NcclCommunicator(1, nccl.get_unique_id(), 0)
    comm.destroy()
    assert comm.comm == 0
    comm.destroy()
    comm.abort()
    x = np.zeros(3, np.float32)
    for call in (
        comm.rank_id,
        comm.size,
        comm.device_id,
        comm.check_async_error,
        lambda: comm.allReduce(ptr(x), ptr(x), 3, 7, 0, 0),
        lambda: comm.send(ptr(x), 3, 7, 0, 0),
        lambda: comm.commSplit(0, 0),
    ):
        with pytest.raises(NcclError, match="the communicator is destroyed") as caught:
            call()
        assert caught.value.status == ARGUMENT


def test_dropping_destroys() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        NcclCommunicator(1, nccl.get_unique_id(), 0)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 5  # the listener and what the process has once


def test_config() -> None:
    assert NcclConfig().split_share == 0
    assert NcclConfig(1).split_share == 1
    with pytest.raises(AttributeError):
        NcclConfig().split_share = 1  # type: ignore[misc]
    with pytest.raises(NcclError, match="timeout is -1") as caught:
        NcclCommunicator(1, nccl.get_unique_id(), 0, NcclConfig(timeout=-1))
    assert caught.value.status == ARGUMENT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, p: c.allReduce(p, p, 3, 12, 0, 0), "datatype is 12"),
        (lambda c, p: c.allReduce(p, p, 3, 7, 5, 0), "op is 5"),
        (lambda c, p: c.allReduce(0, p, 3, 7, 0, 0), "sendbuff is NULL with count 3"),
        (lambda c, p: c.allReduce(p, p + 4, 3, 7, 0, 0), "overlap"),
        (lambda c, p: c.reduce(p, p, 3, 7, 0, 1, 0), "root is 1"),
        (lambda c, p: c.broadcast(p, p, 3, 7, -1, 0), "root is -1"),
        (lambda c, p: c.bcast(p, 3, 7, 9, 0), "root is 9"),
        (lambda c, p: c.allGather(p, 0, 3, 7, 0), "recvbuff is NULL"),
        (lambda c, p: c.reduceScatter(p, p, 3, 99, 0, 0), "datatype is 99"),
        (lambda c, p: c.send(p, 3, 7, 1, 0), "peer is 1"),
        (lambda c, p: c.recv(p, 3, 7, -1, 0), "peer is -1"),
        (lambda c, p: c.commSplit(-2, 0), "color is -2"),
        (lambda c, p: NcclCommunicator(2, nccl.get_unique_id(), 2), "rank: 2 is not from 0 to 1"),
        (lambda c, p: NcclCommunicator(0, nccl.get_unique_id(), 0), "ndev: 0 is less than 1"),
        (lambda c, p: NcclCommunicator.initAll([0, -1]), "negative"),
        (lambda c, p: NcclCommunicator.initAll(-1), "devices: -1"),
    ],
)
def test_wrong_arguments(one: NcclCommunicator, call: Callable[..., Any], message: str) -> None:
    x = np.zeros(3, np.float32)
    with pytest.raises(NcclError, match=message) as caught:
        call(one, ptr(x))
    assert caught.value.status == ARGUMENT
    one.check_async_error()  # nothing was sent: it goes on
    one.allReduce(ptr(x), ptr(x), 3, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, 0)


def test_arguments_of_wrong_type(one: NcclCommunicator) -> None:
    x = np.zeros(3, np.float32)
    with pytest.raises(OverflowError):
        one.allReduce(ptr(x), ptr(x), -3, 7, 0, 0)
    for wrong in (None, 3.0, "3", x):
        with pytest.raises(TypeError):
            one.allReduce(wrong, ptr(x), 3, 7, 0, 0)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            one.allReduce(ptr(x), ptr(x), 3, 7, 0, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        one.allReduce(ptr(x), ptr(x), 3.0, 7, 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int or a list of int"):
        NcclCommunicator.initAll((0, 1))


# --- several ranks: processes ---


def every_call(rank: int, n: int, unique_id: bytes, dtype: str) -> None:
    comm = NcclCommunicator(n, unique_id, rank)
    assert (comm.rank_id(), comm.size()) == (rank, n)
    code, count = DTYPES[dtype], 1003
    each = np.stack([values(r, count, dtype) for r in range(n)])
    for op, reference in OPS.items():
        expected = reference(each, axis=0).astype(dtype)
        x, y = each[rank].copy(), np.zeros(count, dtype)
        comm.allReduce(ptr(x), ptr(y), count, code, op, 0)
        assert (y == expected).all(), op
        assert (x == each[rank]).all()
        comm.allReduce(ptr(x), ptr(x), count, code, op, 0)
        assert (x == expected).all(), op
    root = n - 1
    x, y = each[rank].copy(), np.zeros(count, dtype)
    comm.reduce(ptr(x), ptr(y), count, code, nccl.NCCL_MAX, root, 0)
    assert (y == (each.max(axis=0) if rank == root else 0)).all()
    comm.broadcast(ptr(x), ptr(y), count, code, root, 0)
    assert (y == each[root]).all() and (x == each[rank]).all()
    comm.bcast(ptr(x), count, code, 0, 0)
    assert (x == each[0]).all()
    x, wide = each[rank].copy(), np.zeros((n, count), dtype)
    comm.allGather(ptr(x), ptr(wide), count, code, 0)
    assert (wide == each).all()
    y = np.zeros(count, dtype)
    comm.reduceScatter(ptr(wide), ptr(y), count, code, nccl.NCCL_SUM, 0)
    assert (y == (each[rank] * n).astype(dtype)).all()
    right, left = (rank + 1) % n, (rank - 1) % n
    nccl.groupStart()
    comm.send(ptr(x), count, code, right, 0)
    comm.recv(ptr(y), count, code, left, 0)
    nccl.groupEnd()
    assert (y == each[left]).all()
    comm.check_async_error()
    comm.destroy()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_call(run_ranks: Any, n: int) -> None:
    run_ranks(every_call, n, n, bytes(nccl.get_unique_id()), "float32", comm=False)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_dtype(run_ranks: Any, dtype: str) -> None:
    run_ranks(every_call, 2, 2, tuple(nccl.get_unique_id()), dtype, comm=False)


def narrow_types(rank: int, unique_id: bytes) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    comm = NcclCommunicator(2, unique_id, rank)
    for name, code in (("bfloat16", nccl.NCCL_BFLOAT16), ("float8_e4m3fn", nccl.NCCL_FLOAT8E4M3), ("float8_e5m2", 11)):
        x = np.arange(8).astype(getattr(ml_dtypes, name))
        comm.allReduce(ptr(x), ptr(x), 8, code, nccl.NCCL_AVG, 0)
        assert (x.astype(np.float32) == np.arange(8)).all(), name
    comm.destroy()


def test_narrow_types_and_avg(run_ranks: Any) -> None:
    run_ranks(narrow_types, 2, bytes(nccl.get_unique_id()), comm=False)


def split_by_parity(rank: int, unique_id: bytes) -> tuple[int, int, float]:
    comm = NcclCommunicator(4, unique_id, rank)
    half = comm.commSplit(rank % 2, -rank)
    assert half is not None
    x = np.array([rank], np.float64)
    half.allReduce(ptr(x), ptr(x), 1, nccl.NCCL_FLOAT64, nccl.NCCL_SUM, 0)
    assert comm.commSplit(0 if rank < 3 else -1, rank, NcclConfig(split_share=1)) is None or rank < 3
    found = half.rank_id(), half.size(), float(x[0])
    comm.destroy()
    half.destroy()
    return found


def test_comm_split(run_ranks: Any) -> None:
    assert run_ranks(split_by_parity, 4, bytes(nccl.get_unique_id()), comm=False) == [(1, 2, 2), (1, 2, 4), (0, 2, 2), (0, 2, 4)]


# --- several ranks: one thread ---


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_init_all(all_of: Any, n: int) -> None:
    comms = all_of(n)
    assert [comm.rank_id() for comm in comms] == [comm.device_id() for comm in comms] == list(range(n))
    assert {comm.size() for comm in comms} == {n}
    x = [values(r, 100, "int64") for r in range(n)]
    y = [np.zeros(100, np.int64) for _ in range(n)]
    nccl.groupStart()
    for comm, source, target in zip(comms, x, y):
        comm.allReduce(ptr(source), ptr(target), 100, nccl.NCCL_INT64, nccl.NCCL_SUM, 0)
    nccl.groupEnd()
    for target in y:
        assert (target == sum(x)).all()


def test_init_all_of_a_list() -> None:
    comms = NcclCommunicator.initAll([3, 1, 1])
    assert [comm.device_id() for comm in comms] == [3, 1, 1]
    assert [comm.rank_id() for comm in comms] == [0, 1, 2]
    nccl.groupStart()
    halves = [comm.commSplit(0, -rank) for rank, comm in enumerate(comms)]
    nccl.groupEnd()
    assert [half.device_id() for half in halves if half] == [3, 1, 1]
    for comm in comms + [half for half in halves if half]:
        comm.destroy()
    assert NcclCommunicator.initAll([]) == []


def test_send_and_recv_of_one_thread(all_of: Any) -> None:
    first, second = all_of(2)
    x, y = np.arange(10), np.zeros(10, np.int64)
    nccl.groupStart()
    first.send(ptr(x), 10, nccl.NCCL_INT64, 1, 0)
    second.recv(ptr(y), 10, nccl.NCCL_INT64, 0, 0)
    assert not y.any()  # nothing has begun
    nccl.groupEnd()
    assert (x == y).all()


def test_groups_nest(all_of: Any) -> None:
    first, second = all_of(2)
    x, y = np.arange(10), np.zeros(10, np.int64)
    nccl.groupStart()
    nccl.groupStart()
    first.send(ptr(x), 10, nccl.NCCL_INT64, 1, 0)
    nccl.groupEnd()
    second.recv(ptr(y), 10, nccl.NCCL_INT64, 0, 0)
    nccl.groupEnd()
    assert (x == y).all()
    with pytest.raises(NcclError, match="without") as caught:
        nccl.groupEnd()
    assert caught.value.status == USAGE


def test_making_communicators_in_a_group() -> None:
    unique_id = nccl.get_unique_id()
    nccl.groupStart()
    comms = [NcclCommunicator(3, unique_id, rank) for rank in range(3)]
    assert [comm.comm for comm in comms] == [0, 0, 0]
    nccl.groupEnd()
    nccl.groupStart()
    parts = [comm.commSplit(-1 if rank == 1 else 0, -rank) for rank, comm in enumerate(comms)]
    nccl.groupEnd()
    assert parts[1] is None
    assert [part.rank_id() for part in parts if part] == [1, 0]
    for comm in comms + [part for part in parts if part]:
        comm.destroy()


def test_an_error_in_a_group_launches_nothing(all_of: Any) -> None:
    first, second = all_of(2)
    x, y = np.arange(10), np.zeros(10, np.int64)
    nccl.groupStart()
    first.send(ptr(x), 10, nccl.NCCL_INT64, 1, 0)
    second.recv(ptr(y), 10, nccl.NCCL_INT64, 0, 0)
    with pytest.raises(NcclError, match="datatype is 55"):
        first.allReduce(ptr(x), ptr(x), 10, 55, 0, 0)
    with pytest.raises(NcclError, match="datatype is 55") as caught:
        nccl.groupEnd()
    assert caught.value.status == ARGUMENT and not y.any()
    nccl.groupStart()
    first.send(ptr(x), 10, nccl.NCCL_INT64, 1, 0)
    second.recv(ptr(y), 10, nccl.NCCL_INT64, 0, 0)
    with pytest.raises(NcclError):
        second.commSplit(-9, 0)
        nccl.groupEnd()
    assert not y.any()


def test_destroyed_inside_a_group(all_of: Any) -> None:
    """What is queued outlives destroy(), as it does where calls are on streams."""
    first, second = all_of(2)
    x, y = np.arange(10), np.zeros(10, np.int64)
    nccl.groupStart()
    first.send(ptr(x), 10, nccl.NCCL_INT64, 1, 0)
    second.recv(ptr(y), 10, nccl.NCCL_INT64, 0, 0)
    first.destroy()
    second.destroy()
    nccl.groupEnd()
    assert (x == y).all()


def test_subclasses() -> None:
    class Mine(NcclCommunicator):
        pass

    comms: list[Any] = [Mine.__new__(Mine), Mine.__new__(Mine)]
    NcclCommunicator._initAll(comms, 2)
    assert [comm.rank_id() for comm in comms] == [0, 1]
    nccl.groupStart()
    parts = [comm.commSplit(0, 0) for comm in comms]
    nccl.groupEnd()
    assert {type(part) for part in parts} == {Mine}
    for comm in comms + parts:
        comm.destroy()


# --- when something goes wrong between ranks ---


def status_of(call: Callable[[], Any]) -> tuple[int, str]:
    try:
        call()
    except NcclError as error:
        return error.status, str(error)
    return 0, ""


def disagree(rank: int, unique_id: bytes, what: str) -> tuple[int, str, int]:
    comm = NcclCommunicator(2, unique_id, rank)
    x, wide = np.ones(8, np.float32), np.ones(16, np.float32)
    p, q = ptr(x), ptr(wide)
    calls = {
        "count": lambda: comm.allReduce(p, p, 8 - rank, 7, 0, 0),
        "datatype": lambda: comm.allReduce(p, p, 8, 7 - 5 * rank, 0, 0),
        "op": lambda: comm.allReduce(p, p, 8, 7, rank, 0),
        "root": lambda: comm.bcast(p, 8, 7, rank, 0),
        "call": lambda: comm.allGather(p, q, 8, 7, 0) if rank else comm.allReduce(p, p, 8, 7, 0, 0),
    }
    status, message = status_of(calls[what])
    after, _ = status_of(comm.check_async_error)
    comm.destroy()
    return status, message, after


@pytest.mark.parametrize("what", ["count", "datatype", "op", "root", "call"])
def test_ranks_disagree(run_ranks: Any, what: str) -> None:
    for status, message, after in run_ranks(disagree, 2, bytes(nccl.get_unique_id()), what, comm=False):
        assert status == after == USAGE, message
        assert message.startswith("NCCL_ERROR_INVALID_USAGE: ") and "rank 0" in message and "rank 1" in message


def lose_a_peer(rank: int, unique_id: bytes) -> tuple[int, str, float]:
    comm = NcclCommunicator(2, unique_id, rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    x = np.ones(8, np.float32)
    start = time.monotonic()
    status, message = status_of(lambda: comm.allReduce(ptr(x), ptr(x), 8, 7, 0, 0))
    return status, message, time.monotonic() - start


def test_a_peer_dies(run_ranks: Any) -> None:
    survivor, _ = run_ranks(lose_a_peer, 2, bytes(nccl.get_unique_id()), comm=False, check=False)
    status, message, seconds = survivor.value
    assert status == REMOTE and "rank 1" in message and seconds < 5


def wait_alone(rank: int, unique_id: bytes) -> tuple[int, str]:
    comm = NcclCommunicator(2, unique_id, rank, NcclConfig(timeout=1.0 if rank == 0 else 30.0))
    x = np.ones(8, np.float32)
    if rank == 1:
        time.sleep(2.0)
    found = status_of(lambda: comm.allReduce(ptr(x), ptr(x), 8, 7, 0, 0))
    comm.destroy()
    return found


def test_the_deadline_passes(run_ranks: Any) -> None:
    (status, message), (other, _) = run_ranks(wait_alone, 2, bytes(nccl.get_unique_id()), comm=False)
    assert status == TIMEOUT and "rank 1" in message
    assert other != 0


def test_joining_has_a_deadline() -> None:
    with pytest.raises(NcclError, match="missing rank 1") as caught:
        NcclCommunicator(2, nccl.get_unique_id(), 0, NcclConfig(timeout=1))
    assert caught.value.status == TIMEOUT


def test_abort_ends_a_call_in_another_thread(all_of: Any) -> None:
    first, second = all_of(2)
    x, found = np.ones(8, np.float32), []
    caller = threading.Thread(
        target=lambda: found.append(status_of(lambda: first.allReduce(ptr(x), ptr(x), 8, 7, 0, 0))), daemon=True
    )
    caller.start()
    time.sleep(0.3)
    first.abort()
    caller.join(5)
    assert found and found[0][0] == USAGE, found  # one's own abort is no remote error: csrc/nccl/error.c says the same
    assert first.comm == 0
    deadline = time.monotonic() + 5
    while status_of(second.check_async_error)[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert status_of(second.check_async_error)[0] == REMOTE


def test_abort_ends_a_group_in_another_thread(all_of: Any) -> None:
    first, _ = all_of(2)
    x, found = np.ones(8, np.float32), []

    def call() -> None:
        nccl.groupStart()
        first.recv(ptr(x), 8, 7, 1, 0)
        found.append(status_of(nccl.groupEnd))

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    time.sleep(0.3)
    first.abort()
    caller.join(5)
    assert [status for status, _ in found] == [USAGE] and first.comm == 0


def test_streams_are_passed_on(one: NcclCommunicator) -> None:
    """Where there is no GPU, a stream is refused, and nothing else is done with it."""
    x, y = values(0, 4), np.zeros(4, np.float32)
    status, message = status_of(lambda: one.allReduce(ptr(x), ptr(y), 4, 7, 0, 0x7F00DEAD))
    assert status in (CUDA, ARGUMENT, USAGE) and "stream" in message
    assert not y.any()
    one.allReduce(ptr(x), ptr(y), 4, 7, 0, 0)
    assert (x == y).all()
