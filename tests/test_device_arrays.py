"""Arrays in device memory and streams: what is read from them, what is refused, and what the core is called with.

The arrays are doubles that say of host memory that it is a device's: the core must not be reached with them, so that its functions
are replaced by one that writes down its arguments. What a GPU does with the same calls is for tests that have one.
"""

from __future__ import annotations

import ctypes
import sys
import time
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import hfreduce
from hfreduce import HfreduceError, InvalidArgumentError, device, dlpack
from hfreduce._ffi import ffi, lib
from hfreduce._handle import Handle
from hfreduce.buffer import resolve
from hfreduce.communicator import Communicator
from hfreduce.work import Work

ml_dtypes = pytest.importorskip("ml_dtypes")

LEGACY, PER_THREAD = 1, 2


class Cuda:
    """An array known by __cuda_array_interface__ alone; `more` replaces or adds entries, None in `without` drops them."""

    def __init__(self, x: np.ndarray[Any, Any], *without: str, **more: Any) -> None:
        self.x = x
        face = x.__array_interface__
        said = {"shape": x.shape, "typestr": face["typestr"], "data": face["data"], "version": 3, "strides": None} | more
        self.__cuda_array_interface__ = {name: value for name, value in said.items() if name not in without}


class CudaTyped(Cuda):
    """The same with a dtype, as CuPy and JAX have it."""

    @property
    def dtype(self) -> Any:
        return self.x.dtype


class Pack:
    """An array known by DLPack alone. The capsule is NumPy's, with the device written over."""

    def __init__(
        self, x: np.ndarray[Any, Any], kind: int = dlpack.CUDA, *, versioned: bool = True, read_only: bool = False
    ) -> None:
        self.x, self.kind, self.versioned, self.read_only = x, kind, versioned, read_only
        self.asked: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self, **options: Any) -> Any:
        self.asked.append(options)
        if not self.versioned and "max_version" in options:
            raise TypeError("unexpected keyword argument 'max_version'")
        capsule = self.x.__dlpack__(max_version=(1, 0)) if self.versioned else self.x.__dlpack__()
        tensor, _ = dlpack._opened(capsule, "x")
        tensor.device_type = self.kind
        if self.versioned:
            place = dlpack._capsule_pointer(capsule, b"dltensor_versioned")
            dlpack._VersionedHead.from_address(place).flags = int(self.read_only)
        return capsule


def address(x: np.ndarray[Any, Any]) -> int:
    return int(x.__array_interface__["data"][0])


def number(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


# --- __cuda_array_interface__ ---


@pytest.mark.parametrize("name", hfreduce.DTYPE_NAMES)
def test_interface_of_every_dtype(name: str) -> None:
    code = hfreduce.DTYPE_NAMES.index(name)
    x = np.zeros((3, 4), hfreduce.types.numpy_dtype(code))
    found = resolve(CudaTyped(x), "x", writable=True)
    assert (number(found.pointer), found.elements, found.dtype, found.stream) == (address(x), 12, code, LEGACY)


@pytest.mark.parametrize("version", [0, 2, 3])
def test_interface_versions(version: int) -> None:
    x = np.zeros(5, np.float32)
    found = resolve(Cuda(x, "strides", version=version), "x", writable=True)
    assert (number(found.pointer), found.elements, found.stream) == (address(x), 5, LEGACY)


@pytest.mark.parametrize(("said", "stream"), [(None, LEGACY), (1, 1), (2, 2), (0x7F001234, 0x7F001234), (np.int64(77), 77)])
def test_interface_stream(said: Any, stream: int) -> None:
    assert resolve(Cuda(np.zeros(3), stream=said), "x", writable=True).stream == stream


def test_interface_strides() -> None:
    x = np.zeros((2, 1, 4), np.float32)
    for strides in (None, (16, 16, 4), (16, 999, 4)):  # that of an extent of 1 means nothing
        assert resolve(Cuda(x, strides=strides), "x", writable=True).elements == 8
    empty = np.zeros((0, 3))
    assert resolve(Cuda(empty, strides=(1, 1), data=(0, False)), "x", writable=True).elements == 0
    assert resolve(Cuda(np.zeros(()), strides=()), "x", writable=True).elements == 1


def test_what_is_kept() -> None:
    x = Cuda(np.zeros(3))
    assert resolve(x, "x", writable=True).keep is x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (Cuda(np.zeros(3), "shape"), "x: its __cuda_array_interface__ cannot be read .*'shape'"),
        (Cuda(np.zeros(3), "data"), "x: its __cuda_array_interface__ cannot be read .*'data'"),
        (Cuda(np.zeros(3), "typestr"), "x: its __cuda_array_interface__ cannot be read .*'typestr'"),
        (Cuda(np.zeros(3), data=None), "x: its __cuda_array_interface__ cannot be read"),
        (Cuda(np.zeros(3), data=("a", False)), "x: its __cuda_array_interface__ cannot be read"),
        (Cuda(np.zeros(3), shape=3), "x: its __cuda_array_interface__ cannot be read"),
        (Cuda(np.zeros(3), typestr="float99"), "x: .*typestr 'float99', which is no dtype"),
        (Cuda(np.zeros(3), typestr="|b1"), "x: dtype bool is not supported; view it as uint8"),
        (Cuda(np.zeros(3), typestr=">f4"), "x: dtype >f4 has a foreign byte order"),
        (Cuda(np.zeros(3), typestr="<c8"), "x: dtype complex64 .*view it as float32"),
        (Cuda(np.zeros(3), typestr="|V2"), "x: dtype .*V2 is not supported"),
        (CudaTyped(np.zeros(3, ml_dtypes.float8_e4m3)), "x: dtype float8_e4m3 is not supported"),
        (Cuda(np.zeros(3), mask=Cuda(np.zeros(3, bool))), "x: it is a masked array"),
        (Cuda(np.zeros((3, 4)), strides=(8, 24)), r"x: .*shape \(3, 4\) with strides \(8, 24\) is not C-contiguous"),
        (Cuda(np.zeros(4), strides=(16,)), "x: .*is not C-contiguous"),
        (Cuda(np.zeros((2, 2)), strides=(8,)), "x: .*is not C-contiguous"),
        (Cuda(np.zeros(3), data=(64, True)), "x: it is read-only, and the result is written there"),
        (Cuda(np.zeros(3), data=(0, False)), "x: .*address 0 for 3 elements"),
        (Cuda(np.zeros(3), stream=0), "x: .*gives stream 0"),
        (Cuda(np.zeros(3), stream="s"), "x: .*gives stream 's'"),
    ],
)
def test_interface_refused(x: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        resolve(x, "x", writable=True)


def test_read_only_may_be_read() -> None:
    assert resolve(Cuda(np.zeros(3), data=(64, True)), "x", writable=False).elements == 3


def test_jax_arrays_are_not_written() -> None:
    kind = type("ArrayImpl", (Cuda,), {"__module__": "jaxlib._jax"})
    assert resolve(kind(np.zeros(3)), "x", writable=False).elements == 3
    with pytest.raises(InvalidArgumentError, match="x: it is a JAX array, which is immutable"):
        resolve(kind(np.zeros(3)), "x", writable=True)


# --- DLPack ---


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("kind", [dlpack.CUDA, dlpack.CUDA_MANAGED])
def test_dlpack(kind: int, versioned: bool) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    pack = Pack(x, kind, versioned=versioned)
    found = resolve(pack, "x", writable=True)
    assert (number(found.pointer), found.elements, found.dtype, found.stream) == (address(x), 6, 7, LEGACY)
    assert pack.asked[-1]["stream"] == LEGACY


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"])
def test_dlpack_dtypes(dtype: str) -> None:
    assert resolve(Pack(np.zeros(3, dtype)), "x", writable=True).dtype == hfreduce.DTYPE_NAMES.index(dtype)


@pytest.mark.parametrize(("code", "bits", "name"), [(4, 16, "bfloat16"), (10, 8, "float8_e4m3fn"), (12, 8, "float8_e5m2")])
def test_dlpack_narrow_dtypes(monkeypatch: pytest.MonkeyPatch, code: int, bits: int, name: str) -> None:
    """NumPy exports none of them: write the type into a capsule of its bytes."""

    class Narrow(Pack):
        def __dlpack__(self, **options: Any) -> Any:
            capsule = super().__dlpack__(**options)
            tensor, _ = dlpack._opened(capsule, "x")
            tensor.code, tensor.bits = code, bits
            return capsule

    assert resolve(Narrow(np.zeros(4, f"u{bits // 8}")), "x", writable=True).dtype == hfreduce.DTYPE_NAMES.index(name)


def test_dlpack_offset_and_strides() -> None:
    class Offset(Pack):
        def __dlpack__(self, **options: Any) -> Any:
            capsule = super().__dlpack__(**options)
            dlpack._opened(capsule, "x")[0].byte_offset = 64
            return capsule

    x = np.zeros(32, np.float32)
    assert number(resolve(Offset(x), "x", writable=True).pointer) == address(x) + 64
    with pytest.raises(InvalidArgumentError, match=r"shape \(4, 8\) with strides .* is not C-contiguous"):
        resolve(Pack(x.reshape(8, 4).T), "x", writable=True)


def test_dlpack_stream_handshake() -> None:
    pack = Pack(np.zeros(3))
    for stream, handle in ((0, LEGACY), (2, 2), (0x5000, 0x5000), (types.SimpleNamespace(ptr=0x6000), 0x6000)):
        assert resolve(pack, "x", writable=True, stream=stream).stream == handle
        assert pack.asked[-1]["stream"] == handle


def test_dlpack_memory_lives_as_long_as_it_is_used() -> None:
    """The capsule, which may own more than the array does, is kept, and then gives the memory back: it was not taken over."""

    class Fresh(Pack):
        def __dlpack__(self, **options: Any) -> Any:
            own = self.x.copy()
            self.owned = weakref.ref(own)
            return Pack(own).__dlpack__(**options)

    x = Fresh(np.zeros(3))
    found = resolve(x, "x", writable=True)
    assert x.owned() is not None
    del found
    assert x.owned() is None


def test_dlpack_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="x: it is read-only"):
        resolve(Pack(np.zeros(3), read_only=True), "x", writable=True)
    assert resolve(Pack(np.zeros(3), read_only=True), "x", writable=False).elements == 3
    with pytest.raises(InvalidArgumentError, match="x: it is in memory of DLPack device type 8"):
        resolve(Pack(np.zeros(3), 8), "x", writable=True)
    with pytest.raises(InvalidArgumentError, match=r"x: dtype .*int16.* is not supported"):
        resolve(Pack(np.zeros(3, np.int16)), "x", writable=True)
    with pytest.raises(InvalidArgumentError, match=r"x: dtype .*complex64.* is not supported"):
        resolve(Pack(np.zeros(3, np.complex64)), "x", writable=True)

    class Refusing(Pack):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("still on the tape")

    with pytest.raises(InvalidArgumentError, match="x: Refusing does not give its memory through DLPack: still on the tape"):
        resolve(Refusing(np.zeros(3)), "x", writable=True)

    class Wrong(Pack):
        def __dlpack__(self, **options: Any) -> Any:
            return object()

    with pytest.raises(InvalidArgumentError, match=r"x: .*which is no DLPack capsule"):
        resolve(Wrong(np.zeros(3)), "x", writable=True)

    class Later(Pack):
        def __dlpack__(self, **options: Any) -> Any:
            capsule = super().__dlpack__(**options)
            dlpack._VersionedHead.from_address(dlpack._capsule_pointer(capsule, b"dltensor_versioned")).major = 2
            return capsule

    with pytest.raises(InvalidArgumentError, match=r"x: its DLPack capsule is of version 2\."):
        resolve(Later(np.zeros(3)), "x", writable=True)


# --- streams ---


class WithProtocol:
    def __init__(self, handle: Any) -> None:
        self.handle = 0xBAD  # the protocol comes first
        self.pair = (0, handle)

    def __cuda_stream__(self) -> Any:
        return self.pair


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (0, LEGACY),
        (1, 1),
        (2, 2),
        (0x7FFF_1234_5678, 0x7FFF_1234_5678),
        (np.uint64(0x4000), 0x4000),
        (types.SimpleNamespace(cuda_stream=0x5000), 0x5000),
        (types.SimpleNamespace(cuda_stream=0), LEGACY),
        (types.SimpleNamespace(ptr=0x5000), 0x5000),
        (types.SimpleNamespace(ptr=0), LEGACY),
        (types.SimpleNamespace(handle=0x5000), 0x5000),
        (types.SimpleNamespace(handle=ctypes.c_void_p(0x5000)), 0x5000),
        (types.SimpleNamespace(handle=ctypes.c_void_p(0)), LEGACY),
        (WithProtocol(0x6000), 0x6000),
        (WithProtocol(0), LEGACY),
        (types.SimpleNamespace(__cuda_stream__=(0, 0x6000)), 0x6000),
    ],
)
def test_stream_handles(stream: Any, handle: int) -> None:
    assert device.stream_handle(stream) == handle


@pytest.mark.parametrize("stream", [object(), "s", 1.5, True, -1, 1 << 64, types.SimpleNamespace(ptr="a")])
def test_no_streams(stream: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"stream: .*(is no stream|is not the address)"):
        device.stream_handle(stream)


def test_wrong_protocol() -> None:
    bad = WithProtocol(0)
    bad.pair = 7  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError, match="stream: its __cuda_stream__ gives 7"):
        device.stream_handle(bad)


# --- what the core is called with ---


class Recorder:
    """Stands in for Handle.issue."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, function: Any, arguments: Any, keep: Any, result: Any, async_op: bool, stream: Any) -> Any:
        self.calls.append((function, tuple(arguments), async_op, None if stream is None else number(stream)))
        return result


@pytest.fixture
def comm() -> Iterator[Communicator]:
    with Communicator(0, 1) as one:
        yield one


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(Handle, "issue", lambda self, *arguments: recorder(*arguments))
    return recorder


def calls_of(comm: Communicator, x: Any, out: Any, stream: Any) -> dict[Any, Any]:
    return {
        lib.hfreduceAllReduce: lambda: comm.all_reduce(x, out, stream=stream),
        lib.hfreduceReduce: lambda: comm.reduce(x, out, stream=stream),
        lib.hfreduceBroadcast: lambda: comm.broadcast(x, out=out, stream=stream),
        lib.hfreduceAllGather: lambda: comm.all_gather(x, out, stream=stream),
        lib.hfreduceReduceScatter: lambda: comm.reduce_scatter(x, out, stream=stream),
        lib.hfreduceAlltoAll: lambda: comm.all_to_all(x, out, stream=stream),
        lib.hfreduceAlltoAllv: lambda: comm.all_to_all(x, out, [3], [3], stream=stream),
        lib.hfreduceGather: lambda: comm.gather(x, out, stream=stream),
        lib.hfreduceScatter: lambda: comm.scatter(x, out, stream=stream),
        lib.hfreduceSendTag: lambda: comm.send(x, 0, stream=stream),
        lib.hfreduceRecvTag: lambda: comm.recv(out, 0, stream=stream),
        lib.hfreduceRecvAny: lambda: comm.recv_any(out, stream=stream),
        lib.hfreduceBarrier: lambda: comm.barrier(stream=stream),
    }


@pytest.mark.parametrize("given", [None, 0x5000, types.SimpleNamespace(cuda_stream=0x5000)])
def test_every_call_hands_over_addresses_and_stream(comm: Communicator, recorder: Recorder, given: Any) -> None:
    a, b = np.zeros(3, np.float32), np.zeros(3, np.float32)
    x, out = Cuda(a, stream=0x9000), Cuda(b, stream=0x9000)
    for function, call in calls_of(comm, x, out, given).items():
        recorder.calls.clear()
        try:
            call()
        except AttributeError:
            assert function is lib.hfreduceRecvAny  # waits for the Work that the recorder does not give
        if function is lib.hfreduceBarrier and given is None:
            assert not recorder.calls  # it has neither arrays nor a stream: the short way
            continue
        ((called, arguments, _, stream),) = recorder.calls
        assert called is function
        if function is lib.hfreduceBarrier:
            assert stream == 0x5000
            continue
        assert stream == (0x9000 if given is None else 0x5000)
        addresses = {number(argument) for argument in arguments if isinstance(argument, ffi.CData) and "void" in str(argument)}
        wanted = {
            lib.hfreduceSendTag: {address(a)},
            lib.hfreduceRecvTag: {address(b)},
            lib.hfreduceRecvAny: {address(b)},
        }
        assert addresses == wanted.get(function, {address(a), address(b)})


def test_in_place_and_async(comm: Communicator, recorder: Recorder) -> None:
    a = np.zeros(3, np.float32)
    x = Cuda(a)
    assert comm.all_reduce(x, async_op=True) is x
    ((_, arguments, async_op, stream),) = recorder.calls
    assert number(arguments[0]) == number(arguments[1]) == address(a) and async_op and stream == LEGACY


def test_host_memory_without_a_stream_has_none(comm: Communicator, recorder: Recorder) -> None:
    a, b = np.zeros(3, np.float32), np.zeros(3, np.float32)
    for call in calls_of(comm, a, b, None).values():
        call()
    assert {stream for *_, stream in recorder.calls} == {None}


def test_host_memory_beside_device_memory(comm: Communicator, recorder: Recorder) -> None:
    comm.all_reduce(np.zeros(3, np.float32), Cuda(np.zeros(3, np.float32), stream=2))
    comm.all_reduce(Cuda(np.zeros(3, np.float32), stream=2), np.zeros(3, np.float32))
    comm.all_reduce(np.zeros(3, np.float32), np.zeros(3, np.float32), stream=0)
    assert [stream for *_, stream in recorder.calls] == [2, 2, LEGACY]


def test_arrays_on_two_streams(comm: Communicator, recorder: Recorder) -> None:
    x, out = Cuda(np.zeros(3), stream=0x10), Cuda(np.zeros(3), stream=0x20)
    with pytest.raises(InvalidArgumentError, match="stream: x is used on stream 0x10 and out on stream 0x20; say with stream="):
        comm.all_reduce(x, out)
    comm.all_reduce(x, out, stream=0x20)
    assert recorder.calls[-1][-1] == 0x20


def fake_library(monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> Any:
    monkeypatch.setitem(sys.modules, name, module)
    return type("ndarray", (CudaTyped,), {"__module__": f"{name}._core.core"})


def test_current_stream_of_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    current = types.SimpleNamespace(ptr=0x7000)
    cuda = types.SimpleNamespace(get_current_stream=lambda: current)
    kind = fake_library(monkeypatch, "cupy", types.SimpleNamespace(cuda=cuda))
    assert resolve(kind(np.zeros(3), stream=1), "x", writable=True).stream == 0x7000
    current.ptr = 0
    assert resolve(kind(np.zeros(3), stream=1), "x", writable=True).stream == LEGACY


class Tensor:
    """What hfreduce asks of a torch tensor, on a CUDA device."""

    def __init__(self, x: np.ndarray[Any, Any], **more: Any) -> None:
        self.x = x
        self.device = types.SimpleNamespace(type="cuda", index=1)
        self.layout, self.dtype = "torch.strided", x.dtype
        self.__dict__.update(more)

    def data_ptr(self) -> int:
        return address(self.x)

    def numel(self) -> int:
        return int(self.x.size)

    def is_contiguous(self) -> bool:
        return bool(self.x.flags.c_contiguous)

    def is_neg(self) -> bool:
        return False

    is_nested = False

    def stride(self) -> tuple[int, ...]:
        return self.x.strides

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


def test_torch_tensors_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def current_stream(place: Any) -> Any:
        asked.append(place)
        return types.SimpleNamespace(cuda_stream=0x8000)

    written: list[Any] = []
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(current_stream=current_stream),
        autograd=types.SimpleNamespace(graph=types.SimpleNamespace(increment_version=written.append)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    x = Tensor(np.zeros((2, 3), ml_dtypes.bfloat16))
    found = resolve(x, "x", writable=True)
    assert (number(found.pointer), found.elements, found.dtype, found.stream) == (address(x.x), 6, 9, 0x8000)
    assert asked == [x.device] and found.keep is x and written == [x]
    with pytest.raises(InvalidArgumentError, match=r"not contiguous; use x.contiguous\(\)"):
        resolve(Tensor(np.zeros((2, 3)).T), "x", writable=True)
    with pytest.raises(InvalidArgumentError, match=r"x: the tensor is on device .*xpu.*; memory of the host and of CUDA devices"):
        resolve(Tensor(np.zeros(3), device=types.SimpleNamespace(type="xpu")), "x", writable=True)


# --- work on a stream ---


def ordered_work(comm: Communicator) -> None:
    """A host operation in the place of one on a stream: the Work is the same, apart from what its wait() waits for."""
    x = np.full(3, comm.rank + 1.0)
    if comm.rank == 1:
        comm.barrier()
        time.sleep(0.5)
        comm.all_reduce(x)
        return
    comm.barrier()
    code = lib.hfreduceGroupStart() or lib.hfreduceAllReduce(
        ffi.cast("void *", address(x)), ffi.cast("void *", address(x)), 3, 8, 0, comm._handle.pointer, ffi.NULL
    )
    handle = ffi.new("hfreduceWork_t *")
    assert not code and not lib.hfreduceGroupEndAsync(handle)
    kept = [x]
    work = Work(handle[0], kept, x, comm._handle.running, ordered=True)
    assert work.wait() is x and not work.done()
    with pytest.raises(hfreduce.InProgressError):
        work.wait(timeout=0.05)
    assert work._keep is kept  # the arrays are held until it has ended
    assert work.wait(timeout=10) is x and work.done() and work._keep is None
    assert (x == 3).all()


def test_work_on_a_stream_is_not_waited_for(run_ranks: Any) -> None:
    run_ranks(ordered_work, 2)


def ordered_failure(comm: Communicator) -> None:
    x = np.zeros(3)
    code = lib.hfreduceGroupStart() or lib.hfreduceRecv(ffi.cast("void *", address(x)), 3, 8, 0, comm._handle.pointer, ffi.NULL)
    handle = ffi.new("hfreduceWork_t *")
    assert not code and not lib.hfreduceGroupEndAsync(handle)
    work = Work(handle[0], [x], None, comm._handle.running, ordered=True)
    comm.abort()
    end = time.monotonic() + 5
    while not work.done() and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(hfreduce.AbortedError):
        work.wait()


def test_work_on_a_stream_that_failed(run_ranks: Any) -> None:
    run_ranks(ordered_failure, 1)


# --- the core ---


def test_without_a_gpu_the_core_says_so(comm: Communicator) -> None:
    """Nothing may be read at an address that is no host memory: the stream, always given, keeps the core from it."""
    x = Cuda(np.zeros(3, np.float32), data=(0x10, False))  # would crash
    for call in (
        lambda: comm.all_reduce(x),
        lambda: comm.broadcast(x),
        lambda: comm.send(x, 0),
        lambda: comm.recv_any(x),
        lambda: comm.all_reduce(x, async_op=True),
        lambda: comm.all_reduce(np.zeros(3, np.float32), stream=0x5000),
        lambda: comm.barrier(stream=0x5000),
    ):
        with pytest.raises(HfreduceError, match=r"hfreduce[A-Z]\w+: .*\(on stream 0x\w+, as calls on device memory are\)"):
            call()
    with pytest.raises(HfreduceError), comm.group():
        comm.all_reduce(x)
    y = np.ones(3, np.float32)
    assert (comm.all_reduce(y) == 1).all()  # it goes on


def has_gpu() -> str:
    """Why there is none; "" if there is one and the core can use it."""
    text = ffi.new("char[]", 1 << 16)
    lib.hfreduceDescribe(text, 1 << 16)
    lines = [line for line in ffi.string(text).decode().splitlines() if line.startswith("device cuda")]
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    return "" if lines and "not in this version" not in lines[0] else "the core has no device layer"


@pytest.mark.parametrize("library", ["torch", "cupy", "numba"])
def test_on_a_gpu(comm: Communicator, library: str) -> None:
    missing = has_gpu()
    if missing:
        pytest.skip(f"no GPU: {missing}")
    module = pytest.importorskip("numba.cuda" if library == "numba" else library)
    if library == "torch":
        x = module.arange(1000, dtype=module.float32, device="cuda")
        assert comm.all_reduce(x) is x
        assert (x.cpu() == module.arange(1000)).all()
    elif library == "cupy":
        x = module.arange(1000, dtype="f")
        with module.cuda.Stream(non_blocking=True) as stream:
            comm.all_reduce(x, stream=stream)
            assert (x.get() == np.arange(1000)).all()
    else:
        x = module.to_device(np.arange(1000, dtype=np.float32))
        comm.all_reduce(x)
        assert (x.copy_to_host() == np.arange(1000)).all()
