"""Where things may be passed as arrays: each argument of each call and of each face refuses what is not the caller's own memory, memory
that runs is held, JAX's arrays are read, autograd learns of what is written."""

from __future__ import annotations

import array
import io
import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ranks
from exporting import CopyingInterface, Picture, Series, jax_double

import hfreduce
from hfreduce import InvalidArgumentError, nccl
from hfreduce.buffer import resolve
from hfreduce.distributed import init_process_group

try:
    import torch

    ranks.preload("torch")
except ImportError:
    torch = None  # type: ignore[assignment, unused-ignore]

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


@pytest.fixture
def comm() -> Any:
    with hfreduce.Communicator(0, 1) as one:
        yield one


def good() -> np.ndarray[Any, Any]:
    return np.ones(1)


def refused() -> dict[str, tuple[Any, str]]:
    """One of each way in which memory is not the caller's own, and what its message has."""
    found: dict[str, tuple[Any, str]] = {
        "numpy.float64": (np.float64(1), r"numpy.float64 is not an array but a value.*numpy.array\("),
        "masked": (np.ma.array([1.0]), "it is a masked array"),
        "copying": (CopyingInterface(np.ones(1), True), "makes a new copy"),
        "copying __array__": (Series(np.ones(1), shares=False), "without a copy"),
    }
    if torch is not None:
        found["negative"] = (torch._neg_view(torch.ones(1, dtype=torch.float64)), r"resolve_neg\(\)")
    return found


# --- every call of a communicator ---

CALLS: dict[str, Callable[..., Any]] = {
    "all_reduce x": lambda c, x, **k: c.all_reduce(x, **k),
    "all_reduce x ": lambda c, x, **k: c.all_reduce(x, good(), **k),
    "all_reduce out": lambda c, x, **k: c.all_reduce(good(), x, **k),
    "reduce x": lambda c, x, **k: c.reduce(x, **k),
    "reduce x ": lambda c, x, **k: c.reduce(x, good(), **k),
    "reduce out": lambda c, x, **k: c.reduce(good(), x, **k),
    "broadcast x": lambda c, x, **k: c.broadcast(x, **k),
    "broadcast x ": lambda c, x, **k: c.broadcast(x, out=good(), **k),
    "broadcast out": lambda c, x, **k: c.broadcast(good(), out=x, **k),
    "all_gather x": lambda c, x, **k: c.all_gather(x, good(), **k),
    "all_gather out": lambda c, x, **k: c.all_gather(good(), x, **k),
    "reduce_scatter x": lambda c, x, **k: c.reduce_scatter(x, good(), **k),
    "reduce_scatter out": lambda c, x, **k: c.reduce_scatter(good(), x, **k),
    "all_to_all x": lambda c, x, **k: c.all_to_all(x, good(), **k),
    "all_to_all out": lambda c, x, **k: c.all_to_all(good(), x, **k),
    "all_to_all x ": lambda c, x, **k: c.all_to_all(x, good(), [1], [1], **k),
    "all_to_all out ": lambda c, x, **k: c.all_to_all(good(), x, [1], [1], **k),
    "gather x": lambda c, x, **k: c.gather(x, good(), **k),
    "gather out": lambda c, x, **k: c.gather(good(), x, **k),
    "scatter x": lambda c, x, **k: c.scatter(x, good(), **k),
    "scatter out": lambda c, x, **k: c.scatter(good(), x, **k),
    "send x": lambda c, x, **k: c.send(x, 0, **k),
    "recv x": lambda c, x, **k: c.recv(x, 0, **k),
    "recv_any x": lambda c, x, **k: c.recv_any(x, **k),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_every_call_refuses(comm: Any, call: str) -> None:
    argument = call.split()[1]
    for x, message in refused().values():
        for options in ({}, {"async_op": True}):
            with pytest.raises(InvalidArgumentError, match=f"{argument}: .*{message}"):
                CALLS[call](comm, x, **options)
        with pytest.raises(InvalidArgumentError, match=f"{argument}: .*{message}"), comm.group():
            CALLS[call](comm, x)
    assert comm.all_reduce(good()).tolist() == [1]


def elsewhere(comm: Any) -> None:
    """Arguments of ranks that are not the root: those that are used are looked at, and no others."""
    value = np.float64(comm.rank)
    if comm.rank == 1:
        for call in (
            lambda: comm.reduce(value),
            lambda: comm.broadcast(value),
            lambda: comm.gather(value),
            lambda: comm.scatter(None, value),
        ):
            with pytest.raises(InvalidArgumentError, match=r"numpy.float64 is not an array but a value"):
                call()
    x = np.full(1, comm.rank + 1.0)
    assert comm.reduce(x, value if comm.rank else x) is x
    assert x[0] == (2 if comm.rank else 3)
    got = np.zeros(2)
    comm.gather(x, value if comm.rank else got)
    comm.scatter(value if comm.rank else got, x)
    assert x[0] == (2 if comm.rank else 3)


def test_ranks_that_are_not_the_root(run_ranks: Any) -> None:
    run_ranks(elsewhere, 2)


def mean_of_losses(comm: Any) -> float:
    """What everybody wants to write, and what the message says to write."""
    loss = np.mean([comm.rank, comm.rank + 1.0])
    with pytest.raises(InvalidArgumentError, match=r"write|x = numpy.array\(x\), pass that, and read the result from it"):
        comm.all_reduce(loss, op="avg")
    x = np.array(loss)
    comm.all_reduce(x, op="avg")
    return float(x)


def test_the_mean_of_losses(run_ranks: Any) -> None:
    assert run_ranks(mean_of_losses, 2) == [1.0, 1.0]


def test_bytes_of_a_picture_are_read(comm: Any) -> None:
    """An exporter that hands over bytes says so: a copy, good enough to be read, at each of the calls that only read."""
    x, out = Picture(np.arange(4.0), bytes), np.zeros(4)
    for call in (
        lambda: comm.all_reduce(x, out),
        lambda: comm.all_gather(x, out),
        lambda: comm.broadcast(x, out=out),
        lambda: comm.all_to_all(x, out),
        lambda: comm.gather(x, out),
    ):
        out[:] = 0
        call()
        assert out.tolist() == [0, 1, 2, 3]


# --- the other faces ---

BACKEND_CALLS: dict[str, Callable[..., Any]] = {
    "all_reduce in_array": lambda b, x: b.all_reduce(x, good()),
    "all_reduce out_array": lambda b, x: b.all_reduce(good(), x),
    "reduce in_array": lambda b, x: b.reduce(x, good()),
    "reduce out_array": lambda b, x: b.reduce(good(), x),
    "reduce_scatter in_array": lambda b, x: b.reduce_scatter(x, good(), 1),
    "reduce_scatter out_array": lambda b, x: b.reduce_scatter(good(), x, 1),
    "broadcast in_out_array": lambda b, x: b.broadcast(x),
    "all_gather in_array": lambda b, x: b.all_gather(x, good(), 1),
    "all_gather out_array": lambda b, x: b.all_gather(good(), x, 1),
    "send array": lambda b, x: b.send(x, 0),
    "recv out_array": lambda b, x: b.recv(x, 0),
    "send_recv in_array": lambda b, x: b.send_recv(x, good(), 0),
    "send_recv out_array": lambda b, x: b.send_recv(good(), x, 0),
}


def test_the_backend_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks.reserved_address() as address:
        host, _, port = address.rpartition(":")
        backend = init_process_group(1, 0, host=host, port=int(port))
    for call, function in BACKEND_CALLS.items():
        argument = call.split()[1]
        for x, message in refused().values():
            with pytest.raises(nccl.NcclError, match=f"NCCL_ERROR_INVALID_ARGUMENT: {argument}: .*{message}"):
                function(backend, x)
    columns = np.ma.array(np.ones((2, 3), np.complex64, order="F"))
    with pytest.raises(nccl.NcclError, match="in_array: it is a masked array"):
        backend.all_reduce(columns, np.ones(6, np.complex64))
    if torch is not None:
        with pytest.raises(
            nccl.NcclError, match=r"in_out_array: the tensor's conjugate bit is set; use in_out_array.resolve_conj\(\)"
        ):
            backend.broadcast(torch.ones(2, dtype=torch.complex64).conj())
    x = good()
    backend.all_reduce(good(), x)
    backend.close()


def test_device_arrays_that_move() -> None:
    """An exporter of device memory that makes a copy each time, here and in the other face."""

    class Moving:
        dtype, shape = np.dtype("f4"), (3,)
        places = 0

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            self.places += 4096
            return {"shape": (3,), "typestr": "<f4", "data": (self.places, False), "version": 3}

    with pytest.raises(
        InvalidArgumentError, match="x: Moving makes a new copy of its memory each time its __cuda_array_interface__"
    ):
        resolve(Moving(), "x", writable=True)
    from hfreduce.distributed import _memory

    with pytest.raises(nccl.NcclError, match="x: Moving makes a new copy"):
        _memory(Moving(), "x", None, writable=True)


@pytest.mark.parametrize("what", [np.float64(3), 3.0, np.array(3), np.zeros(2), "0", None])
def test_addresses_are_integers(what: Any) -> None:
    (one,) = nccl.NcclCommunicator.initAll(1)
    x = good()
    for args in ((what, x.ctypes.data), (x.ctypes.data, what)):
        with pytest.raises(TypeError, match=r"an address is an integer \(x.ctypes.data of a NumPy array.*not a"):
            one.allReduce(*args, 1, nccl.NCCL_DOUBLE, nccl.NCCL_SUM, 0)
    one.allReduce(np.int64(x.ctypes.data), x.ctypes.data, 1, nccl.NCCL_DOUBLE, nccl.NCCL_SUM, 0)
    one.destroy()


# --- gradients ---


def gradients(comm: Any) -> None:
    """What `ready` may be given: its own arrays; not a value, a list, or a copy, to which the result would not come back."""
    reducer = hfreduce.GradientReducer({"w": (4,), "b": ()}, comm, dtype="float64")
    wrong = {
        "w": [
            ([1.0] * 4, "list is not an array"),
            (np.ma.array(np.ones(4)), "it is a masked array"),
            (CopyingInterface(np.ones(4), True), "makes a new copy"),
            (Series(np.ones(4), shares=False), "without a copy"),
            (np.lib.stride_tricks.as_strided(np.ones(1), (4,), (0,)), "share their memory"),
        ],
        "b": [(np.float64(1), r"numpy.float64 is not an array but a value"), (1.0, "float is not an array but a value")],
    }
    if torch is not None:
        wrong["w"] += [
            (torch.ones(4, dtype=torch.float64, requires_grad=True), "requires grad"),
            (torch._neg_view(torch.ones(4, dtype=torch.float64)), "negative bit"),
        ]
    for key, cases in wrong.items():
        for grad, message in cases:
            with pytest.raises(InvalidArgumentError, match=f"grad: .*{message}"):
                reducer.ready(key, grad)
    mean = (comm.nranks + 1) / 2
    right = [
        np.full(4, comm.rank + 1.0),
        np.full(8, comm.rank + 1.0)[::2],
        memoryview(np.full(4, comm.rank + 1.0)),
        Series(np.full(4, comm.rank + 1.0)),
        *([] if torch is None else [torch.full((4,), comm.rank + 1.0, dtype=torch.float64)]),
    ]
    for w in right:
        b = np.array(comm.rank + 1.0)
        reducer.ready("b", b)
        reducer.ready("w", w)
        reducer.synchronize()
        assert b == mean and np.asarray(w).tolist() == [mean] * 4 == reducer.views["w"].tolist()
    fixed = np.full(4, comm.rank + 1.0)  # read-only, as JAX's: the result is in the views alone
    fixed.flags.writeable = False
    reducer.ready("w", np.broadcast_to(fixed[:1], (4,)))
    reducer.ready("b", np.array(comm.rank + 1.0))
    assert reducer.synchronize()["w"].tolist() == [mean] * 4 and fixed[0] == comm.rank + 1
    reducer.close()


def test_gradients_of_numpy(run_ranks: Any) -> None:
    run_ranks(gradients, 2)


def lazy_gradients(comm: Any) -> None:
    """Autograd leaves a gradient with the conjugate bit on rank 1 only: its memory is not its value."""
    from hfreduce.torch import GradientReducer

    torch.set_num_threads(1)
    param = torch.nn.Parameter(torch.zeros(1 << 14, dtype=torch.complex64))
    reducer = GradientReducer([("p", param)], comm=comm)
    param.grad = torch.full((1 << 14,), 1 + 2j * (comm.rank + 1), dtype=torch.complex64)
    if comm.rank == 1:
        param.grad = param.grad.conj()
        assert param.grad.is_conj()
    reducer.ready(param)
    reducer.synchronize()
    assert param.grad[0].item() == 1 - 1j and (param.grad == 1 - 1j).all()
    reducer.close()


@needs_torch
def test_gradients_with_the_conjugate_bit(run_ranks: Any) -> None:
    run_ranks(lazy_gradients, 2)


@needs_torch
def test_parameters_without_memory(comm: Any) -> None:
    from hfreduce.torch import GradientReducer

    class Sharded(torch.Tensor):
        def to_local(self) -> Any:
            return self

        @classmethod
        def __torch_dispatch__(cls, *args: Any) -> Any:
            raise AssertionError("not to be computed with")

    made = torch.Tensor._make_wrapper_subclass(Sharded, (4,), requires_grad=True)
    with pytest.raises(InvalidArgumentError, match=r"params: w: this Sharded has no memory of its own; use .*to_local\(\)"):
        GradientReducer([("w", made)], comm=comm)


@needs_torch
@pytest.mark.parametrize("call", ["in place", "out", "broadcast"])
def test_autograd_learns_of_what_is_written(comm: Any, call: str) -> None:
    """exp() keeps its result for the backward pass: with another one in its place the gradient would be wrong without a word."""
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    comm.all_reduce(y.detach().clone(), out=torch.zeros(3))  # only reads: y is as it was
    comm.send(y, 0, async_op=True)
    comm.recv(torch.zeros(3), 0)
    y.sum().backward(retain_graph=True)
    if call == "in place":
        comm.all_reduce(y)
    elif call == "out":
        comm.all_reduce(torch.zeros(3), out=y)
    else:
        comm.broadcast(torch.zeros(3), out=y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- memory that runs is held ---


def writable_map() -> mmap.mmap:
    return mmap.mmap(-1, mmap.PAGESIZE)


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], type[Exception]]] = {
    "bytearray": (lambda: bytearray(64), lambda x: x.extend(b"more"), BufferError),
    "array.array": (lambda: array.array("d", [0] * 8), lambda x: x.append(1), BufferError),
    "mmap": (writable_map, lambda x: x.close(), BufferError),
    "BytesIO": (lambda: io.BytesIO(bytes(64)), lambda x: x.write(bytes(128)), BufferError),
    "interface over bytearray": (lambda: OverBytes(), lambda x: x.data.extend(b"more"), BufferError),
}


class OverBytes:
    """An array whose interface gives a bytearray."""

    def __init__(self) -> None:
        self.data = bytearray(64)
        self.__array_interface__ = {"shape": (8,), "typestr": "<f8", "version": 3, "data": self.data}


def hold(comm: Any) -> None:
    """While rank 0's call runs, which rank 1 has not joined, nothing can take the memory away; after it, everything can."""
    gate = comm.duplicate()
    for name, (make, take, error) in HELD.items():
        x = make()
        given = x.getbuffer() if name == "BytesIO" else x
        if comm.rank == 0:
            work = comm.all_reduce(given, op="max", async_op=True)
            del given
            with pytest.raises(error):
                take(x)
            gate.barrier()
            work.wait()
            del work
        else:
            gate.barrier()
            comm.all_reduce(given, op="max")
            del given
        comm.barrier()  # the communicator lets go of what has ended
        take(x)
    resized = np.zeros(8)
    holders = sys.getrefcount(resized)
    if comm.rank == 0:
        work = comm.all_reduce(resized, async_op=True)
        assert sys.getrefcount(resized) > holders
        with pytest.raises(ValueError, match="cannot resize"):
            resized.resize(1 << 16)
        gate.barrier()
        work.wait()
        del work
    else:
        gate.barrier()
        comm.all_reduce(resized)
    comm.barrier()
    assert sys.getrefcount(resized) == holders
    gate.close()


def test_memory_that_runs_is_held(run_ranks: Any) -> None:
    run_ranks(hold, 2, comm_timeout=30.0, timeout=60.0)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="classes have no __buffer__ before Python 3.12")
def test_buffers_of_copies(comm: Any) -> None:
    class Copying:
        def __buffer__(self, flags: int) -> memoryview:
            return memoryview(bytearray(8))

    with pytest.raises(
        InvalidArgumentError, match="x: Copying makes a new copy of its memory each time it is asked for its buffer"
    ):
        comm.all_reduce(Copying())


# --- JAX ---

NARROW = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]


def read_jax(comm: Any, make: Callable[[np.ndarray[Any, Any]], Any], dtype: str) -> None:
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x, out = make(np.arange(1.0, 5.0)), np.zeros(4, kind)
    assert comm.all_reduce(x, out) is out and out.tolist() == [1, 2, 3, 4]
    assert comm.broadcast(x) is x  # the root only reads
    comm.send(x, 0, async_op=True)
    comm.recv(out, 0)
    for call in (lambda: comm.all_reduce(x), lambda: comm.all_reduce(out, out=x), lambda: comm.recv(x, 0)):
        with pytest.raises(InvalidArgumentError, match="it is a JAX array, which is immutable"):
            call()


@pytest.mark.parametrize("dtype", NARROW)
def test_jax_double(comm: Any, dtype: str) -> None:
    read_jax(comm, lambda x: jax_double(x, dtype), dtype)


@pytest.mark.parametrize("dtype", [*NARROW, "float32", "int32"])
def test_jax(comm: Any, dtype: str) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    read_jax(comm, lambda x: jax.numpy.asarray(x, dtype=dtype), dtype)
    with pytest.raises(InvalidArgumentError, match=r"x: numpy cannot take this .*Tracer \(TracerArrayConversionError"):
        jax.jit(lambda x: comm.all_reduce(x, np.zeros(4)))(jax.numpy.zeros(4))
