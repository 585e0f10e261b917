"""hfreduce.distributed: cupyx.distributed's calls on NumPy arrays against NumPy; device arrays by what the core is called with."""

from __future__ import annotations

import inspect
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ranks
from test_device_arrays import Cuda, CudaTyped, Pack, address, number

from hfreduce import nccl
from hfreduce._ffi import lib
from hfreduce.distributed import NCCLBackend, init_process_group
from hfreduce.nccl import NcclError

ARGUMENT, USAGE, TIMEOUT = 4, 5, 8


def place() -> tuple[str, int]:
    """Host and port that the test has reserved for this group."""
    host, _, port = os.environ["HFREDUCE_ADDR"].rpartition(":")
    return host, int(port)


def join(n: int, rank: int) -> NCCLBackend:
    host, port = place()
    return init_process_group(n, rank, host=host, port=port)


# --- names ---


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("__init__", "n_devices rank host=127.0.0.1 port=13333 use_mpi=False"),
        ("all_reduce", "in_array out_array op=sum stream=None"),
        ("reduce", "in_array out_array root=0 op=sum stream=None"),
        ("broadcast", "in_out_array root=0 stream=None"),
        ("reduce_scatter", "in_array out_array count op=sum stream=None"),
        ("all_gather", "in_array out_array count stream=None"),
        ("send", "array peer stream=None"),
        ("recv", "out_array peer stream=None"),
        ("send_recv", "in_array out_array peer stream=None"),
        ("scatter", "in_array out_array root=0 stream=None"),
        ("gather", "in_array out_array root=0 stream=None"),
        ("all_to_all", "in_array out_array stream=None"),
        ("barrier", ""),
        ("stop", ""),
    ],
)
def test_signatures(name: str, parameters: str) -> None:
    given = list(inspect.signature(getattr(NCCLBackend, name)).parameters.values())[1:]
    assert " ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in given) == parameters


def test_init_process_group_signature() -> None:
    given = inspect.signature(init_process_group).parameters
    assert list(given) == ["n_devices", "rank", "backend", "host", "port", "use_mpi"]
    assert {p.kind for name, p in given.items() if name not in ("n_devices", "rank")} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init_process_group(0, 0), "n_devices: 0"),
        (lambda: init_process_group(2, 2), "rank: 2 is not from 0 to 1"),
        (lambda: init_process_group(2, -1), "rank: -1"),
        (lambda: init_process_group(1, 0, backend="gloo"), "backend: 'gloo'"),
    ],
)
def test_wrong_groups(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_other_hosts_need_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFREDUCE_SECRET", raising=False)
    with pytest.raises(NcclError, match="secret") as caught:
        init_process_group(2, 0, host="192.0.2.1", port=4000)
    assert caught.value.status == ARGUMENT


def test_place_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks.reserved_address() as free:
        host, _, port = free.rpartition(":")
        monkeypatch.setenv("CUPYX_DISTRIBUTED_HOST", host)
        monkeypatch.setenv("CUPYX_DISTRIBUTED_PORT", port)
        pair = {}
        workers = [threading.Thread(target=lambda r=r: pair.update({r: init_process_group(2, r)})) for r in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
    assert sorted(pair) == [0, 1] and pair[1].rank == 1
    for group in pair.values():
        group.stop()
        group.close()
        group.close()


# --- the calls, on NumPy arrays ---


def block(rank: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    x = ((np.arange(np.prod(shape)) + rank) % 5).astype(dtype).reshape(shape)
    return x * (1 + 2j) if x.dtype.kind == "c" else x


def every_call(rank: int, n: int, dtype: str) -> None:
    group = join(n, rank)
    shape = (3, 4)
    each = [block(r, shape, dtype).astype(dtype) for r in range(n)]
    total = sum(each[1:], each[0])
    mine = each[rank]

    out = np.zeros(shape, dtype)
    group.all_reduce(mine, out)
    assert (out == total).all()
    out = mine.copy()
    group.all_reduce(out, out)
    assert (out == total).all()
    if out.dtype.kind != "c":
        for op, reference in {"prod": np.prod, "max": np.max, "min": np.min}.items():
            group.all_reduce(mine, out, op)
            assert (out == reference(each, axis=0).astype(dtype)).all(), op

    for root in range(n):
        out = np.zeros(shape, dtype)
        group.reduce(mine, out if rank == root else None, root)
        assert (out == (total if rank == root else 0)).all()
        out = mine.copy()
        group.broadcast(out, root)
        assert (out == each[root]).all()
        rows = np.stack([each[root] + i for i in range(n)]).astype(dtype)
        out = np.zeros(shape, dtype)
        group.scatter(rows if rank == root else None, out, root)
        assert (out == each[root] + rank).all()
        rows = np.zeros((n, *shape), dtype)
        group.gather(mine, rows if rank == root else None, root)
        assert (rows == (np.stack(each) if rank == root else 0)).all()

    rows = np.zeros((n, *shape), dtype)
    group.all_gather(mine, rows, mine.size)
    assert (rows == np.stack(each)).all()
    rows = np.full((n, 5), 9, dtype)
    group.all_gather(mine, rows, 2)  # the first two of mine, one after the other in rows
    assert rows.reshape(-1)[: 2 * n].tolist() == np.stack([x.reshape(-1)[:2] for x in each]).reshape(-1).tolist()
    assert (rows.reshape(-1)[2 * n :] == 9).all()
    out = np.zeros(shape, dtype)
    rows = np.stack([mine + i for i in range(n)]).astype(dtype)
    group.reduce_scatter(rows, out, mine.size)
    assert (out == total + n * rank).all()
    out = np.zeros_like(rows)
    group.all_to_all(rows, out)
    assert (out == np.stack(each) + rank).all()

    out = np.zeros(shape, dtype)
    group.send_recv(mine, out, rank)  # to itself
    assert (out == mine).all()
    if n > 1:
        peer = rank ^ 1
        if peer < n:
            group.send_recv(mine, out, peer)
            assert (out == each[peer]).all()
        if rank == 0:
            group.send(mine, n - 1)
        elif rank == n - 1:
            group.recv(out, 0)
            assert (out == each[0]).all()
    group.barrier()
    group.stop()
    group.barrier()
    group.close()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_call(run_ranks: Any, n: int) -> None:
    run_ranks(every_call, n, n, "float32", comm=False)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float64", "complex64", "complex128"]
)
def test_every_dtype(run_ranks: Any, dtype: str) -> None:
    run_ranks(every_call, 2, 2, dtype, comm=False)


def orders(rank: int) -> None:
    """Fortran order is sent as it lies in memory, as in CuPy: both sides must have the same."""
    group = join(2, rank)
    for dtype in ("float32", "complex64"):
        x = np.asfortranarray(block(rank, (3, 4), dtype).astype(dtype))
        out = np.zeros((3, 4), dtype, order="F")
        group.all_reduce(x, out)
        assert (out == block(0, (3, 4), dtype) + block(1, (3, 4), dtype)).all()
        group.broadcast(x, 1)
        assert (x == block(1, (3, 4), dtype)).all()
    number = np.array(1j * rank, np.complex64)
    group.all_reduce(number, number)
    assert number == 1j
    wide = np.zeros(9, np.float32)
    group.all_reduce(np.ones(4, np.float32), wide)
    assert wide.tolist() == [2] * 4 + [0] * 5
    group.close()


def test_orders_and_larger_outputs(run_ranks: Any) -> None:
    run_ranks(orders, 2, comm=False)


def one_after_the_other(rank: int) -> None:
    for _ in range(3):
        group = join(2, rank)
        x = np.full(4, float(rank))
        group.all_reduce(x, x)
        assert (x == 1).all()
        if rank:
            group.stop()
        del group


def test_groups_at_one_address_one_after_the_other(run_ranks: Any) -> None:
    run_ranks(one_after_the_other, 2, comm=False)


def again_after_a_failure(rank: int) -> int:
    """Rank 0 tries and gives up before rank 1 comes."""
    if rank:
        time.sleep(1.5)
    for failures in range(20):
        try:
            group = join(2, rank)
        except NcclError as error:
            if error.status != TIMEOUT:
                raise
        else:
            group.barrier()
            return failures
    raise AssertionError("never")


def test_a_group_can_be_tried_again(run_ranks: Any) -> None:
    failures = run_ranks(again_after_a_failure, 2, comm=False, env={"HFREDUCE_TIMEOUT": "1"})
    assert failures[0] >= 1 and failures[1] <= failures[0]


def late(rank: int) -> float:
    group = join(2, rank)
    group.barrier()
    start = time.monotonic()
    if rank == 0:
        time.sleep(0.7)
    group.barrier()
    return time.monotonic() - start


def test_barrier_waits(run_ranks: Any) -> None:
    assert all(0.5 < seconds < 5 for seconds in run_ranks(late, 2, comm=False))


def on_torch(rank: int) -> None:
    torch = pytest.importorskip("torch")
    group = join(2, rank)
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        x, out = torch.full((3, 2), rank + 1, dtype=dtype), torch.zeros(3, 2, dtype=dtype)
        group.all_reduce(x, out)
        assert (out == 3).all()
    with pytest.raises(ValueError, match="can only be summed"):
        group.all_reduce(x, out, "max")
    group.close()


def test_torch_tensors(run_ranks: Any) -> None:
    pytest.importorskip("torch")
    run_ranks(on_torch, 2, comm=False)


class World:
    """What is used of mpi4py's COMM_WORLD, for one process."""

    def __init__(self) -> None:
        self.barriers = 0

    def Get_rank(self) -> int:
        return 0

    def bcast(self, value: Any, root: int) -> Any:
        assert root == 0
        return value

    def Barrier(self) -> None:
        self.barriers += 1


def test_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    package = types.ModuleType("mpi4py")
    package.MPI = types.SimpleNamespace(COMM_WORLD=world)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    group = init_process_group(1, 0, use_mpi=True)
    group.barrier()
    assert world.barriers == 1
    x = np.ones(3)
    group.all_reduce(x, x)
    group.close()


def test_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.warns(UserWarning, match="use_mpi: mpi4py cannot be imported"):
        group = init_process_group(1, 0, use_mpi=True)
    group.barrier()
    group.close()


# --- what is refused ---


@pytest.fixture
def one() -> Iterator[NCCLBackend]:
    with ranks.reserved_address() as free:
        host, _, port = free.rpartition(":")
        group = init_process_group(1, 0, host=host, port=int(port))
    yield group
    group.close()


def f(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: g.all_reduce(f(4), f(3)), NcclError, "out_array: has 3 elements; it must have 4"),
        (lambda g: g.all_reduce(f(4), f(4, dtype="f8")), NcclError, "out_array: its dtype differs"),
        (lambda g: g.all_reduce(f(4), f(2, dtype="F")), NcclError, "out_array: its dtype differs"),
        (lambda g: g.all_reduce(f(8)[::2], f(4)), NcclError, "in_array: .*neither C- nor F-contiguous"),
        (lambda g: g.all_reduce(f(4), f(8)[::2]), NcclError, "out_array: .*neither C- nor F-contiguous"),
        (lambda g: g.all_reduce(f(4, 4, dtype="F")[::2].T, f(16)), NcclError, "in_array: .*neither C- nor F-contiguous"),
        (lambda g: g.all_reduce([1.0], f(1)), NcclError, "in_array: list is not an array"),
        (lambda g: g.all_reduce(b"abcd", f(1)), NcclError, "dtype"),
        (lambda g: g.all_reduce(f(4), b"abcd"), NcclError, "out_array: it is read-only"),
        (lambda g: g.all_reduce(f(4, dtype="?"), f(4, dtype="?")), TypeError, "in_array: dtype bool is not supported"),
        (lambda g: g.all_reduce(f(4, dtype="h"), f(4, dtype="h")), TypeError, "in_array: dtype int16 is not supported"),
        (lambda g: g.all_reduce(f(4), f(4), "mean"), RuntimeError, "op: 'mean' is not one of sum, prod, max, min"),
        (lambda g: g.all_reduce(f(4, dtype="F"), f(4, dtype="F"), "prod"), ValueError, "can only be summed"),
        (lambda g: g.reduce(f(4), None), NcclError, "out_array: NoneType is not an array"),
        (lambda g: g.reduce(f(4), f(4), 1), NcclError, "root is 1"),
        (lambda g: g.broadcast(f(4), -1), NcclError, "root is -1"),
        (lambda g: g.reduce_scatter(f(4), f(4), 5), NcclError, r"in_array: has 4 elements; it must have 5"),
        (lambda g: g.reduce_scatter(f(4), f(3), 4), NcclError, "out_array: has 3 elements; it must have 4"),
        (lambda g: g.all_gather(f(4), f(4), 5), NcclError, "in_array: has 4 elements; it must have 5"),
        (lambda g: g.all_gather(f(4), f(3), 4), NcclError, "out_array: has 3 elements; it must have 4"),
        (lambda g: g.all_gather(f(4), f(4), -1), OverflowError, "negative"),
        (lambda g: g.scatter(f(2, 3), f(3)), NcclError, "in_array: scatter needs 1 in its first dimension"),
        (lambda g: g.scatter(f(1, 3), f(2)), NcclError, "in_array: has 3 elements; with 2 in out_array"),
        (lambda g: g.gather(f(3), f(3)), NcclError, "out_array: gather needs 1 in its first dimension"),
        (lambda g: g.gather(f(2), f(1, 3)), NcclError, "out_array: has 3 elements; with 2 in in_array"),
        (lambda g: g.all_to_all(f(2, 3), f(1, 3)), NcclError, "in_array: all_to_all needs 1"),
        (lambda g: g.all_to_all(f(1, 3), f(1, 4)), NcclError, "out_array: has 4 elements, in_array has 3"),
        (lambda g: g.send(f(3), 1), NcclError, "peer is 1"),
        (lambda g: g.send_recv(f(3), f(3), 1), NcclError, "peer is 1"),
        (lambda g: g.recv(b"abc", 0), NcclError, "out_array: it is read-only"),
        (lambda g: g.all_reduce(f(3), f(3), stream="s"), NcclError, "stream: str is no stream"),
        (lambda g: g.all_reduce(types.SimpleNamespace(tocsr=0), f(3)), TypeError, "sparse matrices are not supported"),
    ],
)
def test_wrong_arguments(one: NCCLBackend, call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(one)
    if error is NcclError:
        assert caught.value.status == ARGUMENT  # type: ignore[attr-defined]
    x = np.ones(3)
    one.all_reduce(x, x)  # nothing was sent, no group is left open: it goes on
    assert (x == 1).all()


def test_after_close(one: NCCLBackend) -> None:
    one.close()
    with pytest.raises(NcclError, match="the communicator is destroyed") as caught:
        one.broadcast(np.zeros(3))
    assert caught.value.status == ARGUMENT


def disagree(rank: int) -> tuple[int, str]:
    group = join(2, rank)
    try:
        group.broadcast(np.zeros(4 + rank, np.float32))
    except NcclError as error:
        return error.status, str(error)
    return 0, ""


def test_ranks_disagree(run_ranks: Any) -> None:
    for status, message in run_ranks(disagree, 2, comm=False):
        assert status == USAGE and "4" in message and "5" in message


# --- device arrays: what the core is called with ---


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(nccl, "issue", lambda comm, *arguments, stream: made.append((*arguments, stream)))
    return made


def test_device_arrays(one: NCCLBackend, calls: list[tuple[Any, ...]]) -> None:
    a, b = f(6), f(6)
    one.all_reduce(Cuda(a, stream=7), Cuda(b, stream=7))
    one.all_reduce(Cuda(a, stream=7), Cuda(b, stream=8), stream=types.SimpleNamespace(ptr=0x5000))
    one.all_reduce(Pack(a), CudaTyped(b), "max")
    found = [(function, number(x), number(y), count, dtype, op, stream) for function, x, y, count, dtype, op, stream in calls]
    wanted = (lib.hfreduceAllReduce, address(a), address(b), 6, lib.hfreduceFloat32)
    assert found == [(*wanted, lib.hfreduceSum, 7), (*wanted, lib.hfreduceSum, 0x5000), (*wanted, lib.hfreduceMax, 1)]


def test_complex_device_arrays(one: NCCLBackend, calls: list[tuple[Any, ...]]) -> None:
    a = f(2, 3, dtype=np.complex64)
    fortran = np.asfortranarray(a)
    for x in (Cuda(a), CudaTyped(a), CudaTyped(a, strides=a.strides), CudaTyped(fortran, strides=fortran.strides)):
        one.all_reduce(x, x)
        assert number(calls[-1][1]) == address(x.x) and calls[-1][3:5] == (12, lib.hfreduceFloat32)
        one.all_gather(x, x, 6)
        assert calls[-1][3:5] == (12, lib.hfreduceFloat32)
        with pytest.raises(ValueError, match="can only be summed"):
            one.all_reduce(x, x, "min")
    one.send(CudaTyped(f(3, dtype=np.complex128)), 0)
    assert calls[-1][2:4] == (6, lib.hfreduceFloat64)


def test_device_arrays_in_fortran_order(one: NCCLBackend, calls: list[tuple[Any, ...]]) -> None:
    x = np.asfortranarray(f(3, 4))
    one.broadcast(CudaTyped(x, strides=x.strides))
    assert number(calls[-1][1]) == number(calls[-1][2]) == address(x) and calls[-1][3] == 12
    with pytest.raises(NcclError, match=r"in_out_array: .*is not C-contiguous"):
        one.broadcast(CudaTyped(f(3, 4), strides=(32, 4)))


def test_refused_device_arrays(one: NCCLBackend) -> None:
    with pytest.raises(TypeError, match="dtype int16"):
        one.broadcast(Cuda(f(3, dtype="h")))
    with pytest.raises(NcclError, match="cannot be read"):
        one.broadcast(Cuda(f(3), "shape"))
    with pytest.raises(NcclError, match="out_array: it is read-only"):
        one.recv(Cuda(f(3), data=(64, True)), 0)
