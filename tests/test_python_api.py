"""The Python face: arrays it takes and refuses, Work, groups, memory, errors (values are the conformance tests' matter)."""

from __future__ import annotations

import array
import ast
import copy
import ctypes
import gc
import pickle
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hfreduce
from hfreduce import InvalidArgumentError, InvalidUsageError, errors, types

ml_dtypes = pytest.importorskip("ml_dtypes")


@pytest.fixture
def comm() -> Any:
    with hfreduce.Communicator(0, 1) as one:
        yield one


def every_dtype() -> list[np.dtype[Any]]:
    return [types.numpy_dtype(code) for code in range(len(hfreduce.DTYPE_NAMES))]


# --- arrays that are taken ---


@pytest.mark.parametrize("dtype", every_dtype(), ids=str)
def test_every_dtype(comm: Any, dtype: np.dtype[Any]) -> None:
    x = np.arange(5).astype(dtype)
    assert comm.all_reduce(x) is x
    out = np.zeros(5, dtype)
    assert comm.all_reduce(x, out) is out
    assert out.tobytes() == x.tobytes()


class WithInterface:
    """An array that is known by __array_interface__ alone."""

    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self.x = x
        self.__array_interface__ = x.__array_interface__


class WithDLPack:
    """An array that is known by DLPack alone, old (unversioned) or new."""

    def __init__(self, x: np.ndarray[Any, Any], versioned: bool) -> None:
        self.x, self.versioned = x, versioned

    def __dlpack__(self, **options: Any) -> Any:
        if self.versioned:
            return self.x.__dlpack__(**options)
        if options.get("max_version"):
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.x.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


def faces(x: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {
        "memoryview": memoryview(x),
        "array_interface": WithInterface(x),
        "dlpack": WithDLPack(x, False),
        "dlpack versioned": WithDLPack(x, True),
        "ndarray subclass": x.view(type("Mine", (np.ndarray,), {})),
        "ctypes": (ctypes.c_float * x.size).from_buffer(x),
    }


@pytest.mark.parametrize("face", list(faces(np.zeros(3, np.float32))))
def test_faces_share_memory(comm: Any, face: str) -> None:
    x = np.arange(3, dtype=np.float32)
    target = np.zeros(3, dtype=np.float32)
    comm.all_reduce(faces(x)[face], out=faces(target)[face])
    assert target.tolist() == [0, 1, 2]


def test_bytes_and_array_array(comm: Any) -> None:
    out = bytearray(3)
    assert comm.broadcast(b"abc", out=out) is out
    assert out == b"abc"
    a = array.array("d", [1, 2])
    assert comm.all_reduce(a) is a


def test_zero_and_scalar_shapes(comm: Any) -> None:
    assert comm.all_reduce(np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert comm.all_reduce(np.array(2.0)) == 2.0


def test_torch_tensors(comm: Any) -> None:
    torch = pytest.importorskip("torch")
    x = torch.arange(4, dtype=torch.bfloat16)
    assert comm.all_reduce(x) is x
    out = torch.zeros(4, dtype=torch.bfloat16)
    comm.all_reduce(x, out, "max")
    assert out.tolist() == [0, 1, 2, 3]
    with pytest.raises(InvalidArgumentError, match=r"x: .*not contiguous; use x.contiguous\(\)"):
        comm.all_reduce(torch.zeros(4, 4).t())
    with pytest.raises(InvalidArgumentError, match=r"x: dtype torch.bool is not supported"):
        comm.all_reduce(torch.zeros(4, dtype=torch.bool))
    with pytest.raises(InvalidArgumentError, match=r"x: the tensor is on device meta"):
        comm.all_reduce(torch.zeros(4, device="meta"))


# --- arrays that are refused, with the argument's name, the reason and a remedy ---


def read_only(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x.flags.writeable = False
    return x


class OnDevice:
    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("must not be asked")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 8, 0  # kDLMetal


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0, 2.0], "x: list is not an array.*numpy.asarray"),
        (None, "x: NoneType is not an array"),
        (3.0, "x: float is not an array"),
        (np.zeros(3, bool), "x: dtype bool is not supported; view it as uint8"),
        (np.zeros(3, np.complex64), "x: dtype complex64 .*view it as float32"),
        (np.zeros(3, np.int16), "x: dtype int16 .*convert it to int32"),
        (np.zeros(3, object), "x: dtype object is not supported"),
        (np.zeros(3, [("a", "f4")]), "x: dtype .* is not supported"),
        (np.zeros(3, ">f4"), "x: dtype >f4 has a foreign byte order"),
        (np.zeros(3, ml_dtypes.float8_e4m3), "x: dtype float8_e4m3 is not supported"),
        (np.zeros(8)[::2], "x: .*not C-contiguous; use numpy.ascontiguousarray"),
        (np.zeros((3, 4)).T, "x: .*not C-contiguous; pass x.T"),
        (read_only(np.zeros(3)), "x: it is read-only.*out="),
        (b"abc", "x: it is read-only"),
        (WithInterface(read_only(np.zeros(3))), "x: it is read-only"),
        (WithDLPack(read_only(np.zeros(3, np.float32)), True), "x: (it is read-only|numpy cannot take)"),
        (OnDevice(), "x: it is in memory of DLPack device type 8"),
    ],
    ids=lambda value: (
        type(value).__name__ if hasattr(value, "__dict__") else repr(value)
    ),  # no addresses: every process finds the same
)
def test_refused(comm: Any, x: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        comm.all_reduce(x)
    assert isinstance(caught.value, ValueError)
    assert caught.value.code == 4


def call_wrongly(comm: Any) -> list[tuple[Any, str]]:
    f = np.zeros
    return [
        (lambda: comm.all_reduce(f(3), f(4)), "out: has 4 elements, x has 3"),
        (lambda: comm.all_reduce(f(3), f(3, np.float32)), "out: dtype float32 differs from x's float64"),
        (lambda: comm.all_reduce(f(3), read_only(f(3))), "out: it is read-only"),
        (lambda: comm.all_reduce(f(3), f(6)[::2]), "out: .*not C-contiguous"),
        (lambda: comm.all_reduce(f(6)[::2], f(3)), "x: .*not C-contiguous"),
        (lambda: comm.all_reduce(f(3), op="mean"), "op: 'mean' is not one of sum, prod, max, min, avg"),
        (lambda: comm.all_reduce(f(3), op=[1]), r"op: \[1\] is not one of"),
        (lambda: comm.all_reduce(f(3), op=-1), "op: -1 is not one of"),
        (lambda: comm.all_reduce(f(3), stream=object()), "stream: object is no stream"),
        (lambda: comm.reduce(f(3), root=1), r"root: 1 is not from 0 to 0 \(nranks is 1\)"),
        (lambda: comm.broadcast(f(3), root=-1), "root: -1 is not from 0 to 0"),
        (lambda: comm.broadcast(f(3), root=0.5), "root: 0.5 is not an integer"),
        (lambda: comm.send(f(3), 7), "peer: 7 is not from 0 to 0"),
        (lambda: comm.recv(b"abc", 0), "x: it is read-only"),
        (lambda: comm.all_gather(f(3), f(4)), r"out: has 4 elements; with 3 in x it must have nranks \* 3 = 3"),
        (lambda: comm.all_gather(f(3), f(3, np.int32)), "out: dtype int32 differs from x's float64"),
        (lambda: comm.reduce_scatter(f(5), f(3)), "x: has 5 elements; with 3 in out"),
        (lambda: comm.gather(f(3)), r"out: the root needs an array of nranks \* 3 = 3 elements"),
        (lambda: comm.scatter(None, f(3)), "x: the root needs an array of"),
        (lambda: comm.all_to_all(f(3), f(4)), "out: has 4 elements, x has 3"),
        (lambda: comm.all_to_all(f(3), f(3), [3]), "recv_counts: give both"),
        (lambda: comm.all_to_all(f(3), f(3), [1, 2], [3]), "send_counts: has 2 entries, nranks is 1"),
        (lambda: comm.all_to_all(f(3), f(3), [2], [3]), "send_counts: sums to 2, but x has 3"),
        (lambda: comm.all_to_all(f(3), f(3), [3], [-3]), "recv_counts: .*negative"),
        (lambda: comm.pre_mul_sum("a", "float32"), "factor: 'a' is not a float32 number"),
        (lambda: comm.pre_mul_sum(1, "float12"), "dtype: 'float12' is not a dtype"),
        (lambda: setattr(comm, "timeout", 0), "timeout: 0 is not a positive"),
        (lambda: hfreduce.Communicator(0, 0), "nranks: 0 is less than 1"),
        (lambda: hfreduce.Communicator(2, 2, bytes(128)), "rank: 2 is not from 0 to 1"),
        (lambda: hfreduce.Communicator(0, 2), "unique_id: None is for a single rank"),
        (lambda: hfreduce.Communicator(0, 1, b"short"), "unique_id: has 5 bytes instead of 128"),
        (lambda: hfreduce.Communicator(0, 1, "text"), "unique_id: str is not bytes-like"),
        (lambda: hfreduce.Communicator(0, 1, timeout=-1), "timeout: -1 is not a positive"),
        (lambda: hfreduce.empty(-1), "shape: .*negative"),
        (lambda: hfreduce.empty(3, bool), "dtype: dtype bool is not supported"),
    ]


@pytest.mark.parametrize("index", range(len(call_wrongly(None))))
def test_wrong_calls(comm: Any, index: int) -> None:
    call, message = call_wrongly(comm)[index]
    with pytest.raises(InvalidArgumentError, match=message):
        call()
    assert comm.all_reduce(np.ones(2)).tolist() == [1, 1]  # nothing was broken


def three_ranks(comm: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="x: 4 elements are not divisible by nranks 3; pad it"):
        comm.all_to_all(np.zeros(4), np.zeros(4))
    with pytest.raises(InvalidArgumentError, match=r"x: has 7 .*\(and 7 is not divisible by nranks\)"):
        comm.reduce_scatter(np.zeros(7), np.zeros(2))
    x = np.full(2, comm.rank, np.float32)
    assert comm.all_reduce(x).tolist() == [3, 3]


def test_not_divisible(run_ranks: Any) -> None:
    run_ranks(three_ranks, 3)


# --- the communicator ---


def test_properties(comm: Any) -> None:
    assert (comm.rank, comm.nranks, comm.local_rank, comm.local_nranks, comm.node, comm.nodes) == (0, 1, 0, 1, 0, 1)
    assert isinstance(comm.host, str)
    assert isinstance(comm.transports, tuple)
    assert "rank 0 of 1" in repr(comm)
    comm.timeout = 5
    assert comm.timeout == 5.0
    assert comm.async_error() is None


def test_closed() -> None:
    comm = hfreduce.Communicator(0, 1)
    comm.close()
    comm.close()
    assert comm.closed
    assert "closed" in repr(comm)
    for call in (
        lambda: comm.all_reduce(np.ones(1)),
        lambda: comm.all_reduce(np.ones(1), np.ones(1)),
        lambda: comm.barrier(),
        lambda: comm.split(0),
        lambda: comm.group(),
        lambda: comm.async_error(),
    ):
        with pytest.raises(InvalidUsageError, match="the communicator is closed"):
            call()
    comm.abort()


def test_split_and_duplicate(comm: Any) -> None:
    assert comm.split(None) is None
    assert comm.split(-1) is None
    with comm.split(3, 1) as other, comm.duplicate() as twin:
        assert (other.rank, other.nranks, other.timeout) == (0, 1, comm.timeout)
        assert twin.all_reduce(np.ones(1))[0] == 1


def test_pre_mul_sum(comm: Any) -> None:
    op = comm.pre_mul_sum(0.5, "float32")
    assert comm.all_reduce(np.full(3, 4, np.float32), op=op).tolist() == [2, 2, 2]
    with hfreduce.Communicator(0, 1) as other, pytest.raises(InvalidArgumentError, match="made by another communicator"):
        other.all_reduce(np.ones(1, np.float32), op=op)
    with pytest.raises(InvalidArgumentError, match="the op was made for float32, the data is float64"):
        comm.all_reduce(np.ones(1), op=op)
    del op
    gc.collect()


def test_uneven_all_to_all(comm: Any) -> None:
    out = np.zeros(3)
    assert comm.all_to_all(np.arange(3.0), out, [3], [3]) is out
    assert out.tolist() == [0, 1, 2]


# --- Work and groups ---


def test_work(comm: Any) -> None:
    x, out = np.arange(4.0), np.zeros(4)
    work = comm.all_reduce(x, out, async_op=True)
    assert work.wait(5) is out
    assert work.wait() is out
    assert work.result is out
    assert work.done()
    assert work.exception() is None
    assert out.tolist() == [0, 1, 2, 3]
    assert "done" in repr(work)
    with pytest.raises(InvalidArgumentError, match="timeout: -1"):
        work.wait(-1)


def test_work_releases_its_buffers(comm: Any) -> None:
    x = np.ones(4).view(type("Mine", (np.ndarray,), {}))
    alive = weakref.ref(x)
    comm.all_reduce(x, async_op=True)  # dropped at once
    comm.all_reduce(np.ones(1))
    del x
    gc.collect()
    assert alive() is None


def test_work_that_has_ended_holds_its_result_alone(comm: Any) -> None:
    x, out = np.ones(4).view(type("Mine", (np.ndarray,), {})), np.zeros(4)
    alive = weakref.ref(x)
    work = comm.all_reduce(x, out, async_op=True)
    work.wait()
    del x
    gc.collect()
    assert alive() is None
    assert work.result is out and out.tolist() == [1, 1, 1, 1]


def test_group(comm: Any) -> None:
    x, y = np.arange(3.0), np.zeros(3)
    with comm.group():
        comm.send(x, 0)
        comm.recv(y, 0)
    assert y.tolist() == x.tolist()
    z = np.zeros(3)
    with comm.group(async_op=True) as group:
        comm.send(x, 0)
        with comm.group():
            comm.recv(z, 0)
    results = group.work.wait()
    assert results[0] is x
    assert z.tolist() == x.tolist()


def test_group_mistakes(comm: Any) -> None:
    with pytest.raises(InvalidUsageError, match="async_op is not for calls inside a group"), comm.group():
        comm.all_reduce(np.ones(1), async_op=True)
    with comm.group(), pytest.raises(InvalidUsageError, match="only the outermost"), comm.group(async_op=True):
        pass
    assert comm.all_reduce(np.ones(1))[0] == 1


def give_up_a_group(comm: Any, kind: str) -> None:
    """Rank 0's body raises with a message queued that rank 1 does not expect: had it gone, rank 1 would receive it instead of 7."""
    x = np.full(2, 99.0)
    if comm.rank == 0:
        if kind == "nested":
            with pytest.raises(InvalidUsageError, match=r"nothing of this group was launched.*KeyError"), comm.group() as outer:
                comm.send(x, 1)
                with pytest.raises(KeyError), comm.group():
                    comm.send(x, 1)
                    raise KeyError("mine")
            with outer:  # and it may be used again
                comm.send(np.full(2, 7.0), 1)
        elif kind == "wrong call":
            with pytest.raises(InvalidArgumentError, match="peer: 9"), comm.group():
                comm.send(x, 1)
                comm.send(x, 9)
            comm.send(np.full(2, 7.0), 1)
        else:
            with pytest.raises(KeyError, match="mine"), comm.group(async_op=kind == "asynchronous") as group:
                comm.send(x, 1)
                raise KeyError("mine")
            assert group.work is None
            comm.send(np.full(2, 7.0), 1)
    else:
        got = np.zeros(2)
        comm.recv(got, 0)
        assert got.tolist() == [7, 7]
    assert comm.all_reduce(np.ones(1))[0] == 2  # nothing is left over


@pytest.mark.parametrize("kind", ["blocking", "asynchronous", "nested", "wrong call"])
def test_group_whose_body_raises_launches_nothing(run_ranks: Any, kind: str) -> None:
    run_ranks(give_up_a_group, 2, kind)


def raise_inside_with(comm: Any) -> None:
    """Rank 0 raises while an all_reduce runs that rank 1 never joins: without an abort, leaving would wait for the deadline."""
    start = time.monotonic()
    if comm.rank == 0:
        with pytest.raises(KeyError), comm:
            comm.all_reduce(np.ones(2), async_op=True)
            raise KeyError
        assert comm.closed
    else:
        with pytest.raises(hfreduce.HfreduceError) as caught:
            comm.recv(np.zeros(2), 0)  # is told at once that rank 0 has left, and how
        assert isinstance(caught.value, hfreduce.AbortedError), caught.value
    assert time.monotonic() - start < 30  # of 120


def test_with_communicator_whose_body_raises_aborts(run_ranks: Any) -> None:
    run_ranks(raise_inside_with, 2, comm_timeout=120.0, timeout=60.0)


@pytest.mark.parametrize("way", ["pickle", "copy", "deepcopy", "nccl"])
def test_communicators_are_not_values(comm: Any, way: str) -> None:
    if way == "nccl":
        from hfreduce import nccl

        (other,) = nccl.NcclCommunicator.initAll(1)
        for make in (pickle.dumps, copy.copy):
            with pytest.raises(nccl.NcclError, match=r"neither pickled nor copied.*get_unique_id"):
                make(other)
        other.destroy()
        return
    make = {"pickle": pickle.dumps, "copy": copy.copy, "deepcopy": copy.deepcopy}[way]
    with pytest.raises(InvalidUsageError, match=r"neither pickled nor copied.*hfreduce.init\(\).*unique id.*duplicate\(\)"):
        make(comm)
    with pytest.raises(InvalidUsageError, match="neither pickled nor copied"):
        make([comm]) if way != "copy" else make(comm)
    assert comm.all_reduce(np.ones(2)).tolist() == [1, 1]


def late_peer(comm: Any) -> None:
    x = np.ones(8, np.float32)
    if comm.rank == 1:
        comm.barrier(async_op=True).wait()
        time.sleep(1.0)
        comm.all_reduce(x)
        return
    comm.barrier(async_op=True).wait()
    work = comm.all_reduce(x, async_op=True)
    assert not work.done()
    assert work.exception() is None
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="it goes on"):
        work.wait(0.2)
    assert time.monotonic() - start > 0.15
    assert work.wait(5) is x
    assert x[0] == 2


def test_wait_timeout_lets_the_operation_go_on(run_ranks: Any) -> None:
    run_ranks(late_peer, 2)


def failing_work(comm: Any) -> tuple[str, Any, Any]:
    if comm.rank == 1:
        return ("", None, None)
    work = comm.all_reduce(np.ones(8), async_op=True)
    with pytest.raises(hfreduce.HfreduceError) as caught:
        work.wait()
    error = work.exception()
    assert error is caught.value
    assert isinstance(error, (ConnectionError, TimeoutError))
    assert work.done()
    with pytest.raises(type(error)):
        work.wait()
    return (str(error), error.op, error.rank)


def test_work_reports_its_error(run_ranks: Any) -> None:
    text, op, rank = run_ranks(failing_work, 2, comm_timeout=2.0)[0]
    assert text
    assert op == "all_reduce"
    assert rank == 0


# --- memory ---


@pytest.mark.parametrize("dtype", hfreduce.DTYPE_NAMES)
def test_empty(dtype: str) -> None:
    x = hfreduce.empty((3, 5), dtype)
    assert x.shape == (3, 5)
    assert x.dtype.name == dtype
    assert x.ctypes.data % 4096 == 0
    assert x.flags.writeable and x.flags.c_contiguous
    y = hfreduce.zeros(7, dtype)
    assert y.tobytes() == bytes(y.nbytes)
    assert hfreduce.zeros((), dtype).shape == ()
    assert hfreduce.empty((0, 2), dtype).size == 0


def test_empty_outlives_its_base() -> None:
    x = hfreduce.zeros(1 << 16)[5:9]
    gc.collect()
    x[:] = 3
    assert x.sum() == 12


# --- errors ---


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("InvalidArgumentError", ValueError),
        ("InvalidUsageError", RuntimeError),
        ("PeerLostError", ConnectionError),
        ("DeadlineError", TimeoutError),
        ("InProgressError", TimeoutError),
        ("MismatchError", RuntimeError),
        ("SystemError_", OSError),
        ("CorruptDataError", RuntimeError),
        ("AbortedError", RuntimeError),
        ("InternalError", RuntimeError),
        ("CudaError", RuntimeError),
    ],
)
def test_errors_are_builtins(name: str, builtin: type[Exception]) -> None:
    kind = getattr(hfreduce, name)
    assert issubclass(kind, (hfreduce.HfreduceError,))
    assert issubclass(kind, builtin)
    error = kind("what happened", rank=1, peer=2, op="reduce", seq=3, phase="tree up", host="a")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == "what happened"
    assert (again.rank, again.peer, again.op, again.seq, again.phase, again.host) == (1, 2, "reduce", 3, "tree up", "a")
    assert again.code == kind.default_code


def test_every_result_code_has_a_class() -> None:
    assert set(errors._KINDS) == set(range(1, errors.lib.hfreduceNumResults))


def test_unique_id() -> None:
    unique_id = hfreduce.get_unique_id(local=True)
    assert isinstance(unique_id, bytes)
    assert len(unique_id) == 128
    assert unique_id.hex() not in repr(unique_id) + str(unique_id)
    one = hfreduce.UniqueId.from_address("127.0.0.1:1234", "00ff" * 8)
    assert one == hfreduce.UniqueId.from_address("127.0.0.1:1234", "00ff" * 8)
    assert one != hfreduce.UniqueId.from_address("127.0.0.1:1234", "00ff" * 8, tag=1)
    with pytest.raises(InvalidArgumentError):
        hfreduce.UniqueId.from_address("127.0.0.1")
    with pytest.raises(InvalidArgumentError):
        hfreduce.UniqueId.from_address("192.0.2.1:80")


# --- the package ---


def test_stub_names_the_header() -> None:
    """_core.pyi and the cffi module declare the same names."""
    stub = set(
        re.findall(
            r"^    (?:def )?(h?freduce\w+|HFREDUCE\w+|hfr_\w+|HFR_\w+)",
            Path(hfreduce.__file__).with_name("_core.pyi").read_text(),
            re.MULTILINE,
        )
    )
    assert stub == set(dir(errors.lib))


@pytest.mark.parametrize(
    "name", ["i1", "u1", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "longlong", "ulonglong", ">f4", "i2", "?", "c8"]
)
def test_fast_path_takes_what_it_understands(name: str) -> None:
    """The short way from an array to a call (csrc/python/ndarray.h): every dtype arrives as itself, or goes the long way."""
    from hfreduce.communicator import _known_layout

    assert _known_layout(), "NumPy's arrays lie otherwise than csrc/python/ndarray.h says: small calls are slow"
    with hfreduce.Communicator(0, 1) as comm:
        handle, dtype = comm._handle.pointer, np.dtype(name)
        plain = (dtype.isnative and dtype.kind in "iuf" and dtype.itemsize != 2) or dtype == np.float16
        for x in (np.ones(7, dtype), np.ones((2, 3, 4), dtype), np.ones((), dtype), np.ones((0, 4), dtype)):
            for call in range(6):  # in place, and from one array to another
                other = np.zeros_like(x)
                for out in (id(other), *([0] if call < 3 else [])):
                    assert (errors.lib.hfr_ndarray_call(call, id(x), out, 0, handle) == 0) == plain
                    work = errors.lib.hfr_ndarray_launch(call, id(x), out, 0, handle)
                    assert bool(work) == plain
                    assert (errors.lib.hfr_ndarray_why() == 0) == plain
                    if plain:
                        assert errors.lib.hfreduceWorkWait(work, 10.0) == 0
                        errors.lib.hfreduceWorkDestroy(work)
                assert (other == x).all() == (plain or x.size == 0)
                larger = np.ones(x.size + 1, dtype)
                assert errors.lib.hfr_ndarray_call(call, id(x), id(larger), 0, handle) == -1
                assert call < 3 or errors.lib.hfr_ndarray_call(call, id(x), 0, 0, handle) == -1
        for x in (np.ones((4, 5), dtype).T, np.ones(8, dtype)[::2], np.frombuffer(b"12345678" * 2, dtype)):
            assert errors.lib.hfr_ndarray_call(0, id(x), 0, 0, handle) == -1
            assert not errors.lib.hfr_ndarray_launch(0, id(x), 0, 0, handle)
            assert errors.lib.hfr_ndarray_why() == -1
            assert errors.lib.hfr_ndarray_call(3, id(np.ones(x.size, dtype)), id(x), 0, handle) == -1
        assert errors.lib.hfreduceGroupEnd() != 0, "a call that was refused has left a group open"


def test_fast_launch_is_the_same_call() -> None:
    """An asynchronous all_reduce of a plain array goes a short way, too; what that cannot do goes the long way, as a blocking one does."""
    with hfreduce.Communicator(0, 1) as comm:
        assert comm.all_reduce(np.full(5, 3.0), op="max", async_op=True).wait().tolist() == [3.0] * 5
        out = np.zeros(5)
        assert comm.all_reduce(np.full(5, 3.0), out, async_op=True).wait() is out
        assert out.tolist() == [3.0] * 5
        transposed = np.ones((4, 5)).T
        twice = comm.pre_mul_sum(2.0, np.float32)
        assert comm.all_reduce(np.ones(3, np.float32), op=twice, async_op=True).wait().tolist() == [2.0] * 3
        assert comm.all_reduce(np.ones(3, np.int32), op=3, async_op=True).wait().tolist() == [1] * 3
        with pytest.raises(InvalidArgumentError, match="not C-contiguous"):
            comm.all_reduce(transposed, async_op=True)
        with pytest.raises(InvalidArgumentError, match="read-only"):
            comm.all_reduce(np.frombuffer(b"12345678", np.float32), async_op=True)
        with pytest.raises(InvalidArgumentError, match="op"):
            comm.all_reduce(np.ones(3), op="median", async_op=True)
    with pytest.raises(InvalidUsageError, match="closed"):
        comm.all_reduce(np.ones(3), async_op=True)


def test_every_public_name_is_there_and_documented() -> None:
    for name in hfreduce.__all__:
        value = getattr(hfreduce, name)
        assert name.startswith("__") or name.endswith("_NAMES") or value.__doc__, name
    for name in dir(hfreduce.Communicator):
        assert name.startswith("_") or getattr(hfreduce.Communicator, name).__doc__, name


def test_the_list_of_public_names_says_where_each_is() -> None:
    """What type checkers read, what `import *` gives and what is imported on first use are the same names of the same modules."""
    tree = ast.parse(Path(str(hfreduce.__file__)).read_text())
    (seen_by_checkers,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in seen_by_checkers.body if isinstance(node, ast.ImportFrom)]
    assert {name.name: str(node.module) for node in imports for name in node.names} == {
        name: f"hfreduce.{module}" for name, module in hfreduce._WHERE.items()
    }
    assert sorted(hfreduce.__all__) == sorted({*hfreduce._WHERE, "__version__"})


def test_nobody_reaches_into_a_communicator() -> None:
    """Faces use the handle's public methods: `comm._x` stands only in the module of the class that has the name."""
    homes = {"communicator.py", "nccl.py"}
    for path in Path(str(hfreduce.__file__)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            of = node.value
            name = of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else ""
            if name in ("comm", "_comm", "handle", "_handle"):
                assert path.name in homes and name == "comm", f"{path.name}:{node.lineno}: {name}.{node.attr}"


def test_docstrings_are_whole() -> None:
    """No line wrapper took a docstring for string literals: none has a line that ends with a lone quote, or begins with one."""
    for path in Path(str(hfreduce.__file__)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for line in (ast.get_docstring(node) or "").splitlines():
                    assert line.count('"') % 2 == 0, f"{path.name}: {line}"


def test_import_is_light() -> None:
    """No launcher, framework or tool is imported before it is needed."""
    code = "import sys, hfreduce; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    for heavy in ("torch", "mpi4py", "matplotlib", "ml_dtypes", "cffi"):
        assert heavy not in modules, heavy
    assert not [m for m in modules if m.startswith(("hfreduce.cli", "hfreduce.perf"))]
