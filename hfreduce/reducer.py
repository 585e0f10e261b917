"""GradientReducer: averages the gradients of a NumPy trainer over the ranks, bucket by bucket, while more of them are made."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

import numpy as np

from hfreduce._ffi import ffi
from hfreduce.bucketing import BUCKET_BYTES, WIRE, Bucket, Segment, Step, launch, place, plan, require_same
from hfreduce.buffer import host_array
from hfreduce.communicator import Communicator
from hfreduce.errors import InvalidArgumentError
from hfreduce.memory import zeros
from hfreduce.types import DTYPE_NAMES, dtype_code, numpy_dtype
from hfreduce.work import Work

Array = np.ndarray[Any, Any]
Key = Union[int, str]

FLOATS = frozenset({"float16", "float32", "float64", "bfloat16"})

# Conversions to and from bf16 work in pieces that stay in the cache, as they have temporaries.
_PIECE = 1 << 15


class _Bucket(Bucket):
    """A bucket and its memory: `flat` holds the gradients, `wire` their 16-bit form, `residual` what that form lost.

    offsets: where each member begins, and the end, in elements.
    """

    wire: Array | None = None
    residual: Array | None = None

    def __init__(self, members: list[int], flat: Array, offsets: list[int], code: int, op: int) -> None:
        super().__init__(members)
        self.flat, self.offsets = flat, offsets
        self.segments = (_segment(flat, code, op),)


class GradientReducer(Step):
    """Reduces the gradients of a trainer over the ranks of a communicator, while the backward pass makes more of them.

        reducer = hfreduce.GradientReducer(weights, comm)      # arrays (or shapes), in the order of the forward pass
        for batch in batches:
            for name in backward(batch):                       # writes reducer.views[name], last layer first
                reducer.ready(name)                            # starts a bucket's all_reduce when it is full
            reducer.synchronize()                              # the views hold the mean over all ranks
            update(weights, reducer.views)

    like: a sequence, or a mapping by name, of arrays whose shape and dtype the gradients have (their values are not read), or
    of shapes, which have the dtype `dtype`. float16, float32, float64 and bfloat16 (ml_dtypes). Alike on all ranks.
    comm: is duplicated; nothing else interferes with the reducer's calls.
    bucket_bytes: gradients are reduced in buckets of about so many bytes, in the reverse order of `like`, in which a
    backward pass makes them. Any other order is legal too, and may differ from rank to rank; it overlaps less.
    op: "avg" or "sum". compress: "fp16" or "bf16" sends float32 gradients so (the sum is made in float32, and rounded once a
    node); fp16 has its limit at 65504. error_feedback: what the rounding of this rank's gradients lost is added to them in the
    next step.

    Gradients that are not ready at `synchronize` count as zero; all ranks get the sum of the others'. All ranks get identical
    bits. Errors: InvalidArgumentError; MismatchError if the ranks' arguments differ; from `ready` and `synchronize` also those
    of Communicator.all_reduce.
    """

    #: The gradients, in the buckets' memory: by name if `like` has names, else a list. Writing a gradient here saves a copy.
    views: Any

    def __init__(
        self,
        like: Mapping[str, Any] | Sequence[Any],
        comm: Communicator,
        *,
        dtype: Any = "float32",
        bucket_bytes: int = BUCKET_BYTES,
        op: str = "avg",
        compress: str | None = None,
        error_feedback: bool = False,
    ) -> None:
        """Make the buckets. Collective."""
        names: list[Any] = list(like) if isinstance(like, Mapping) else list(range(len(like)))
        shapes, codes = [], []
        for name, each in zip(names, like.values() if isinstance(like, Mapping) else like):
            shape, code = _shape_and_dtype(each, dtype, name)
            shapes.append(shape)
            codes.append(code)
        super().__init__(comm, [repr(name) for name in names], op, compress, error_feedback, bucket_bytes)
        options = f"op {op}, bucket_bytes {bucket_bytes}, compress {compress}, error_feedback {error_feedback}"
        lines = [f"{name!r} {shape} {DTYPE_NAMES[code]}" for name, shape, code in zip(names, shapes, codes)]
        try:
            require_same(self._comm, [options, *lines], "the reducer's parameters")
        except BaseException:
            self._comm.close()
            raise
        self._compress = compress
        self._index = {name: i for i, name in enumerate(names)}
        self._filled = [False] * len(names)
        self._targets: list[Array | None] = [None] * len(names)
        self._arrays: list[Array] = [np.empty(0)] * len(names)
        counts = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
        nbytes = [count * numpy_dtype(code).itemsize for count, code in zip(counts, codes)]
        buckets = []
        for members in plan(nbytes, codes, range(len(names) - 1, -1, -1), bucket_bytes):
            code = codes[members[0]]
            offsets, total = place([nbytes[index] for index in members])
            flat = zeros(total, "uint8").view(numpy_dtype(code))
            offsets = [offset // flat.itemsize for offset in [*offsets, total]]
            for index, first in zip(members, offsets):
                self._arrays[index] = flat[first : first + counts[index]].reshape(shapes[index])
            bucket = _Bucket(members, flat, offsets, code, self._op)
            if compress is not None and DTYPE_NAMES[code] == "float32":
                bucket.wire = zeros(2 * flat.size, "uint8").view(np.uint16)
                bucket.segments = (_segment(bucket.wire, WIRE[compress], self._op),)
                bucket.residual = np.zeros_like(flat) if error_feedback else None
            buckets.append(bucket)
        self._use(buckets)
        self.views = dict(zip(names, self._arrays)) if isinstance(like, Mapping) else list(self._arrays)

    def ready(self, key: Key, grad: Any = None) -> None:
        """The gradient of this name (or index) is there: in views[key], or in the array `grad`, which receives the result too
        unless it is read-only (as JAX's arrays are). A number, a list or a copy is no such array: InvalidArgumentError.

        Starts the all_reduce of every bucket that is complete now. Once a step for each gradient; inside `no_sync` any number
        of times: there `grad` is added to what was given since the last synchronize, and without `grad` the trainer adds to
        views[key] itself.
        """
        try:
            index = self._index[key]
        except KeyError:
            raise InvalidArgumentError(f"key: {key!r} is not one of the reducer's gradients") from None
        if self._closed:
            self._check_open()
        if self._ready[index] and self._syncing:
            self._again(index, None)
        if grad is not None and grad is not self._arrays[index]:
            self._put(index, grad)
        self._filled[index] = True
        if self._syncing:
            self._mark(index)

    def _put(self, index: int, grad: Any) -> None:
        view, array = self._arrays[index], host_array(grad, "grad")
        if array.shape != view.shape:
            raise InvalidArgumentError(f"grad: has shape {array.shape}; gradient {self._names[index]} has {view.shape}")
        receives = self._syncing and array.flags.writeable
        if receives and _overlaps(array):
            raise InvalidArgumentError(
                f"grad: elements of this array of shape {array.shape} with strides {array.strides} share their memory, and the result is "
                f"written there too; pass a copy"
            )
        if self._filled[index]:
            np.add(view, array, out=view, casting="same_kind")
        else:
            np.copyto(view, array, casting="same_kind")
        if self._syncing:
            self._targets[index] = array if receives else None

    def synchronize(self) -> Any:
        """End the step: start what has not started, wait, write the results back. Returns `views`. Collective.

        Every rank calls it once a step, whatever gradients it has; a gradient that no rank had is zero. After an exception in
        the middle of a backward pass it ends the step in agreement with the other ranks.
        """
        super().synchronize()
        return self.views

    def _start(self, bucket: _Bucket) -> Work:
        missing = [(index, i) for i, index in enumerate(bucket.members) if not self._filled[index]]
        for index, _ in missing:
            self._arrays[index][...] = 0
        if bucket.wire is not None:
            source = bucket.flat
            if bucket.residual is not None:
                source = bucket.residual
                source += bucket.flat
            _encode(source, bucket.wire, self._compress)
            if bucket.residual is not None:
                for _, i in missing:  # its residual waits for a step that has the gradient
                    bucket.wire[bucket.offsets[i] : bucket.offsets[i + 1]] = 0
                _decode(bucket.wire, bucket.flat, self._compress)
                bucket.residual -= bucket.flat
                bucket.residual[~np.isfinite(bucket.residual)] = 0  # an overflow is not carried on
        return launch(self._comm, bucket.segments, bucket)

    def _finish(self, bucket: _Bucket) -> None:
        if bucket.wire is not None:
            _decode(bucket.wire, bucket.flat, self._compress)
        for index in bucket.members:
            target = self._targets[index]
            if target is not None:
                np.copyto(target, self._arrays[index], casting="same_kind")

    def _reset(self) -> None:
        super()._reset()
        self._filled = [False] * len(self._names)
        self._targets = [None] * len(self._names)


def _shape_and_dtype(each: Any, dtype: Any, name: Any) -> tuple[tuple[int, ...], int]:
    """Of an array, or of a shape and the dtype for shapes."""
    if hasattr(each, "shape") and hasattr(each, "dtype"):
        shape, code = tuple(each.shape), dtype_code(each.dtype, f"gradient {name!r}")
    else:
        try:
            shape = tuple(map(operator.index, each if isinstance(each, Iterable) else (each,)))
        except TypeError:
            raise InvalidArgumentError(f"gradient {name!r}: {each!r} is neither an array nor a shape") from None
        code = dtype_code(dtype)
    if DTYPE_NAMES[code] not in FLOATS:
        raise InvalidArgumentError(f"gradient {name!r}: dtype {DTYPE_NAMES[code]} is not one of {', '.join(sorted(FLOATS))}")
    return shape, code


def _overlaps(array: Array) -> bool:
    """Whether elements may share memory, as those of broadcast arrays and sliding windows do."""
    end = array.itemsize
    for stride, extent in sorted((abs(stride), extent) for stride, extent in zip(array.strides, array.shape) if extent != 1):
        if stride < end:
            return array.size > 0
        end = stride * (extent - 1) + end
    return False


def _segment(memory: Array, code: int, op: int) -> Segment:
    return (ffi.cast("void *", memory.__array_interface__["data"][0]), memory.size, code, op)


def _encode(source: Array, wire: Array, kind: str | None) -> None:
    """float32 to fp16 or bf16 bits, to the nearest, ties to even; NaN stays NaN."""
    if kind == "fp16":
        with np.errstate(over="ignore"):  # becomes infinity, as it would in any fp16 gradient
            np.copyto(wire.view(np.float16), source, casting="same_kind")
        return
    for start in range(0, source.size, _PIECE):
        piece = source[start : start + _PIECE]
        bits = piece.view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        rounded[np.isnan(piece)] = 0x7FC0
        wire[start : start + _PIECE] = rounded


def _decode(wire: Array, target: Array, kind: str | None) -> None:
    if kind == "fp16":
        np.copyto(target, wire.view(np.float16))
    else:
        np.left_shift(wire, 16, out=target.view(np.uint32), dtype=np.uint32)
