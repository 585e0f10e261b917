"""Every kind of thing that a caller may pass as an array: what comes of it in place, as an input, and as an output.

The rule: a result goes to the caller's own memory, where the caller sees it, and an input is what the caller has at that moment. What
cannot keep it is refused, with a message that says what to write instead.
"""

from __future__ import annotations

import array
import ctypes
import io
import mmap
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import ranks
from exporting import CopyingInterface, CopyingPack, Interface, LyingSeries, Pack, Picture, Series

import hfreduce
from hfreduce import InvalidArgumentError
from hfreduce.buffer import resolve

Array = np.ndarray[Any, Any]

try:
    import torch

    ranks.preload("torch")
except ImportError:
    torch = None  # type: ignore[assignment, unused-ignore]


# --- the table ---


class Kind(NamedTuple):
    """How to make it of four float64, how to read its elements, and what comes of it in three places: TAKEN, or a message."""

    name: str
    make: Callable[[Array], Any]
    read: Callable[[Any], Any]
    in_place: Any
    source: Any
    out: Any


TAKEN = object()
READ_ONLY = "it is read-only, and the result is written there"


def kind_of(
    name: str, make: Callable[[Array], Any], read: Any = np.asarray, *, all_: Any = None, source: Any = None, out: Any = None
) -> Kind:
    """all_: what comes of it anywhere, unless said otherwise; out: in place and as output."""
    written = TAKEN if out is None and all_ is None else all_ if out is None else out
    return Kind(name, make, read, written, source or all_ or TAKEN, written)


def read_only(x: Array) -> Array:
    x.flags.writeable = False
    return x


def mapped(x: Array, access: int = mmap.ACCESS_WRITE) -> mmap.mmap:
    """Anonymous memory with the elements as bytes."""
    if access == mmap.ACCESS_READ:
        return mmap.mmap(-1, x.size, access=access)  # zeros
    memory = mmap.mmap(-1, x.size)
    memory[:] = as_bytes(x)
    return memory


def memory_map(x: Array) -> Array:
    """numpy.memmap of a file that is gone as soon as it is mapped."""
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.write(x.tobytes())
        file.flush()
        return np.memmap(file, x.dtype, "r+", shape=x.shape)


def as_bytes(x: Array) -> bytes:
    return x.astype(np.uint8).tobytes()


def released(view: Any) -> Any:
    view.release()
    return view


CLASSED = type("Mine", (np.ndarray,), {})
VALUE = (
    r"{0}: .*is not an array but a value.*write|{0}: .*is not an array but a value.*{0} = numpy.array\({0}\), pass that, and read"
)
MASKED = r"{0}: it is a masked array.*{0}.data, which shares its memory, or a copy made with {0}.filled"
NO_ARRAY = "{0}: .* is not an array. Give a numpy array.*numpy.asarray"
NEW_COPY = "{0}: .*makes a new copy of its memory each time"
STRIDED = r"{0}: .*not C-contiguous"

NUMPY = [
    kind_of("plain", np.array),
    kind_of("of no dimension", lambda x: x[:1].reshape(()), lambda x: x.reshape(1)),
    kind_of("empty", lambda x: x[:0]),
    kind_of("numpy.float64", lambda x: x[0], all_=VALUE),
    kind_of("a sum", lambda x: x.sum(), all_=VALUE),
    kind_of("a mean", np.mean, all_=VALUE),
    kind_of("numpy.int64", lambda x: x.astype(np.int64)[0], all_=VALUE),
    kind_of("numpy.bool", lambda x: x[0] > 0, all_=VALUE),
    kind_of("numpy.str_", lambda x: np.str_("1"), all_=VALUE),
    kind_of("a field of a record", lambda x: x.view([("a", "f8"), ("b", "f8")])[0], all_=VALUE),
    kind_of("masked", lambda x: np.ma.array(x, mask=[False, True, False, False]), all_=MASKED),
    kind_of("masked, nothing hidden", lambda x: np.ma.array(x), all_=MASKED),
    kind_of("the masked constant", lambda x: np.ma.masked, all_=MASKED),
    kind_of("matrix", np.matrix, lambda x: np.asarray(x).reshape(-1)),
    kind_of("recarray", lambda x: x.view(np.recarray)),
    kind_of("subclass", lambda x: x.view(CLASSED)),
    kind_of("memmap", memory_map),
    kind_of("structured", lambda x: x.view([("a", "f8"), ("b", "f8")]), all_="{0}: dtype .* is not supported"),
    kind_of("of objects", lambda x: x.astype(object), all_="{0}: dtype object is not supported"),
    kind_of(
        "foreign byte order", lambda x: x.astype(x.dtype.newbyteorder()), all_="{0}: dtype .* has a foreign byte order.*astype"
    ),
    kind_of("read-only", read_only, out=READ_ONLY),
    kind_of("strided", lambda x: np.repeat(x, 2)[::2], all_=STRIDED),
    kind_of("reversed", lambda x: x[::-1], all_=STRIDED),
    kind_of("broadcast", lambda x: np.broadcast_to(x[:1], (4,)), all_=STRIDED),
    kind_of(
        "broadcast and writable",
        lambda x: np.lib.stride_tricks.as_strided(x, (4,), (0,)),
        all_=STRIDED,
        out=STRIDED + ".*ascontiguousarray, and read the result from that",
    ),
    kind_of(
        "sliding windows",
        lambda x: np.lib.stride_tricks.sliding_window_view(x, 2, writeable=True),
        all_=STRIDED,
    ),
    kind_of(
        "iterator of a strided one",
        lambda x: np.repeat(x, 2)[::2].flat,
        all_="{0}: flatiter makes a NumPy array of itself .*cannot say whether that is a copy|" + NEW_COPY,
    ),
    kind_of("a class", lambda x: np.float64, all_="{0}: float64 is a class"),
]

PYTHON = [
    kind_of("int", lambda x: 3, all_=VALUE),
    kind_of("float", lambda x: 3.0, all_=VALUE),
    kind_of("complex", lambda x: 3j, all_=VALUE),
    kind_of("bool", lambda x: True, all_=VALUE),
    kind_of("list", lambda x: x.tolist(), all_=NO_ARRAY),
    kind_of("str", lambda x: "1234", all_=NO_ARRAY),
    kind_of("bytes", as_bytes, lambda x: np.frombuffer(x, np.uint8), out=READ_ONLY),
    kind_of("bytearray", lambda x: bytearray(as_bytes(x)), lambda x: np.frombuffer(x, np.uint8)),
    kind_of("array.array", lambda x: array.array("d", x)),
    kind_of("ctypes array", lambda x: (ctypes.c_double * 4)(*x)),
    kind_of("ctypes number", lambda x: ctypes.c_double(x[0]), lambda x: [x.value]),
    kind_of(
        "ctypes pointers", lambda x: (ctypes.c_void_p * 4)(), all_="{0}: numpy cannot take the buffer of this c_void_p_Array_4"
    ),
    kind_of("ctypes characters", lambda x: (ctypes.c_char * 4)(), all_=r"{0}: dtype \|S1 is not supported"),
    kind_of("mmap", mapped, lambda x: np.frombuffer(x, np.uint8)),
    kind_of("read-only mmap", lambda x: mapped(x, mmap.ACCESS_READ), lambda x: None, out=READ_ONLY),
    kind_of("BytesIO", lambda x: io.BytesIO(as_bytes(x)), all_=NO_ARRAY),
    kind_of("BytesIO's buffer", lambda x: io.BytesIO(as_bytes(x)).getbuffer()),
    kind_of("PickleBuffer", lambda x: pickle.PickleBuffer(x.copy())),
    kind_of("released PickleBuffer", lambda x: released(pickle.PickleBuffer(x)), all_="{0}: its memory cannot be reached"),
    kind_of("memoryview", lambda x: memoryview(x)),
    kind_of("strided memoryview", lambda x: memoryview(x)[::2], all_=STRIDED),
    kind_of("released memoryview", lambda x: released(memoryview(x)), all_="{0}: its memory cannot be reached"),
]

EXPORTERS = [
    kind_of("interface", Interface, lambda x: x.x),
    kind_of("interface, read-only", lambda x: Interface(read_only(x)), lambda x: x.x, out=READ_ONLY),
    kind_of("interface, strided", lambda x: Interface(x[::2]), all_=STRIDED),
    kind_of("interface, masked", lambda x: Interface(x, mask=x), all_="{0}: it is a masked array"),
    kind_of("interface, address and offset", lambda x: Interface(x, offset=8), all_="{0}: .*an address and the offset 8"),
    kind_of(
        "interface without shape",
        lambda x: Interface(x, "shape"),
        all_="{0}: the __array_interface__ of Interface cannot be read",
    ),
    kind_of(
        "interface without data", lambda x: Interface(x, "data"), all_="{0}: the __array_interface__ of Interface cannot be read"
    ),
    kind_of(
        "interface over bytearray",
        lambda x: Interface(x, data=bytearray(x.tobytes())),
        lambda x: np.frombuffer(x.__array_interface__["data"]),
    ),
    kind_of(
        "interface over bytearray, offset",
        lambda x: Interface(x, data=bytearray(bytes(8) + x.tobytes()), offset=8),
        lambda x: np.frombuffer(x.__array_interface__["data"])[1:],
    ),
    kind_of("interface over bytes", lambda x: Picture(x, bytes), lambda x: x.x, out=READ_ONLY),
    kind_of("interface over new bytearrays", lambda x: Picture(x, bytearray), all_=NEW_COPY),
    kind_of("interface of copies", lambda x: CopyingInterface(x, True), all_=NEW_COPY),
    kind_of("interface of copies that are gone", lambda x: CopyingInterface(x, False), all_=NEW_COPY),
    kind_of("DLPack", Pack, lambda x: x.x),
    kind_of("DLPack of old", lambda x: Pack(x, "old"), lambda x: x.x),
    kind_of("DLPack of old, strided", lambda x: Pack(x[::2], "old"), all_=STRIDED),
    kind_of("DLPack, strided", lambda x: Pack(x[::2]), all_=STRIDED),
    kind_of("DLPack, read-only", lambda x: Pack(read_only(x)), lambda x: x.x, out=READ_ONLY),
    kind_of("DLPack of old, copying", lambda x: CopyingPack(x, "old"), all_=NEW_COPY),
    kind_of("DLPack, copying", lambda x: CopyingPack(x, "silent"), all_=NEW_COPY),
    kind_of(
        "DLPack, copying and saying so",
        lambda x: CopyingPack(x, "marked"),
        lambda x: x.x,
        out="{0}: .*a copy of its memory, in which nobody",
    ),
    kind_of(
        "DLPack, no copy refused", lambda x: CopyingPack(x, "refuses"), lambda x: x.x, out="{0}: .*DLPack: not without a copy"
    ),
    kind_of("__array__", Series, lambda x: x.x),
    kind_of("__array__, read-only", lambda x: Series(x, read_only=True), lambda x: x.x, out=READ_ONLY),
    kind_of("__array__ of old", lambda x: Series(x, copy=False), all_="{0}: Series makes .*cannot say whether that is a copy"),
    kind_of("__array__, copying", lambda x: Series(x, shares=False), all_="{0}: Series cannot make .*without a copy"),
    kind_of("__array__, lying", LyingSeries, all_=NEW_COPY),
]

NEGATIVE = r"{0}: the tensor's negative bit is set.*{0}.resolve_neg\(\), and read the result from that"
HOLLOW = "{0}: this .* has no memory of its own; pass the plain"


def tensors() -> list[Kind]:
    t: Any = torch.from_numpy

    def jagged(x: Array) -> Any:
        return torch.nested.nested_tensor([t(x[:1]), t(x[1:])], layout=torch.jagged)

    def freed(x: Array) -> Any:
        tensor = t(x).clone()
        tensor.untyped_storage().resize_(0)
        return tensor

    def sharded(x: Array) -> Any:
        """A subclass that stands for another tensor, as DTensor does."""

        class Sharded(torch.Tensor):
            def to_local(self) -> Any:
                return self.local

            @classmethod
            def __torch_dispatch__(cls, *args: Any) -> Any:
                raise AssertionError("not to be computed with")

        made = torch.Tensor._make_wrapper_subclass(Sharded, (4,), dtype=torch.float64)
        made.local = t(x)
        return made

    def fake(x: Array) -> Any:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            return torch.zeros(4, dtype=torch.float64)

    def inferred(x: Array) -> Any:
        with torch.inference_mode():
            return t(x).clone()

    def values(x: Any) -> Any:
        return x.detach().numpy()

    return [
        kind_of("tensor", t, values),
        kind_of("tensor of no dimension", lambda x: t(x)[0], lambda x: [x.item()]),
        kind_of("empty tensor", lambda x: t(x)[:0], values),
        kind_of("parameter", lambda x: torch.nn.Parameter(t(x)), values),
        kind_of("loss", lambda x: t(x).clone().requires_grad_() * 1, values),
        kind_of("inference tensor", inferred, values),
        kind_of("subclass", lambda x: t(x).as_subclass(type("Mine", (torch.Tensor,), {})), values),
        kind_of("lazy clone", lambda x: torch._lazy_clone(t(x).clone()), values),
        kind_of("an element", lambda x: t(x)[0].item(), all_=VALUE),
        kind_of("storage", lambda x: t(x).untyped_storage(), all_=NO_ARRAY),
        kind_of("class", lambda x: torch.Tensor, all_="{0}: Tensor is a class"),
        kind_of("negative view", lambda x: torch._neg_view(t(x)), all_=NEGATIVE),
        kind_of("imaginary part of a conjugate", lambda x: torch.complex(t(x), t(x)).conj().imag, all_=NEGATIVE),
        kind_of(
            "complex",
            lambda x: torch.complex(t(x), t(x)).conj(),
            all_="{0}: dtype torch.complex128 is not supported; view it as float64",
        ),
        kind_of(
            "expanded",
            lambda x: t(x)[:1].expand(4),
            all_="{0}: .*not contiguous; use {0}.contiguous",
            out="{0}: .*contiguous\\(\\), and read the result",
        ),
        kind_of("unfolded", lambda x: t(x).unfold(0, 2, 1), all_="{0}: .*not contiguous"),
        kind_of("sparse", lambda x: t(x).to_sparse(), all_=r"{0}: the tensor's layout is torch.sparse_coo; use {0}.to_dense\(\)"),
        kind_of(
            "nested",
            lambda x: torch.nested.nested_tensor([t(x[:1]), t(x[1:])]),
            all_=r"{0}: it is a nested tensor; pass {0}.values\(\)",
        ),
        kind_of("jagged", jagged, all_=r"{0}: it is a nested tensor; pass {0}.values\(\)"),
        kind_of("meta", lambda x: t(x).to("meta"), all_="{0}: the tensor is on device meta"),
        kind_of("fake", fake, all_=HOLLOW),
        kind_of("functional", lambda x: torch._to_functional_tensor(t(x)), all_=HOLLOW),
        kind_of("known to be zero", lambda x: torch._efficientzerotensor(4, dtype=torch.float64), all_=HOLLOW),
        kind_of("storage given back", freed, all_=HOLLOW),
        kind_of("sharded", sharded, all_=r"{0}: this Sharded has no memory of its own; use {0}.to_local\(\)"),
    ]


TABLES: dict[str, Callable[[], list[Kind]]] = {
    "numpy": lambda: NUMPY,
    "python": lambda: PYTHON,
    "exporters": lambda: EXPORTERS,
    "torch": tensors,
}


def array_like(x: Any, rank: int) -> Array:
    """An array that goes with x, a thing that is taken: of its dtype and count, all rank + 1."""
    made = resolve(x, "x", writable=False)
    return np.full(made.elements, rank + 1, hfreduce.types.numpy_dtype(made.dtype))


def tried(call: Callable[[], Any], read: Callable[[], Any], expected: Any, argument: str, want: Callable[[], Any]) -> str:
    """What is wrong with the outcome of `call`; "" if nothing is."""
    try:
        call()
    except InvalidArgumentError as error:
        if expected is TAKEN:
            return f"refused: {error}"
        message = expected.format(argument)
        return "" if re.search(message, str(error)) else f"said {str(error)!r} instead of {message!r}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    if expected is not TAKEN:
        return "was taken"
    got, wanted = np.asarray(read()).reshape(-1).tolist(), np.asarray(want()).reshape(-1).tolist()
    return "" if got == wanted else f"gave {got} instead of {wanted}"


def base(rank: int) -> Array:
    return np.array([1.0, 2.0, 3.0, 4.0]) * (rank + 1)


def try_kind(comm: Any, kind: Kind) -> list[tuple[str, str]]:
    """In place, as input and as output of an all_reduce: where, and what goes wrong."""
    three = (lambda: np.zeros(4)) if kind.name == "read-only mmap" else lambda: np.array(kind.read(kind.make(base(0)))) * 3
    x, y, z = (kind.make(base(comm.rank)) for _ in range(3))
    target = array_like(y, comm.rank) if kind.source is TAKEN else np.zeros(4)
    source = array_like(z, comm.rank) if kind.out is TAKEN else np.zeros(4)
    return [
        ("in place", tried(lambda: comm.all_reduce(x), lambda: kind.read(x), kind.in_place, "x", three)),
        ("as input", tried(lambda: comm.all_reduce(y, out=target), lambda: target, kind.source, "x", three)),
        (
            "as output",
            tried(lambda: comm.all_reduce(source, out=z), lambda: kind.read(z), kind.out, "out", lambda: np.full(source.size, 3)),
        ),
    ]


def try_table(comm: Any, name: str) -> list[str]:
    """What goes wrong with the kinds of a table."""
    warnings.simplefilter("ignore")
    return [f"{kind.name} {where}: {what}" for kind in TABLES[name]() for where, what in try_kind(comm, kind) if what]


@pytest.mark.parametrize("table", list(TABLES))
def test_kinds(run_ranks: Any, table: str) -> None:
    if table == "torch" and torch is None:
        pytest.skip("no torch")
    for rank, wrong in enumerate(run_ranks(try_table, 2, table, timeout=60.0)):
        assert not wrong, f"rank {rank}:\n" + "\n".join(wrong)
