"""Gradient buckets: what the reducers for NumPy (reducer.py) and for torch (torch/reducer.py) have in common.

Gradients become ready in an order that may differ from rank to rank, but collectives must be issued in one order. So each
bucket waits for those before it:

    ready        c   a   d  b             (this rank's order)
    buckets      [a b]  [c d]             (all ranks' order)
    all_reduce              ^ab ^cd       [a b] is full when b is ready; [c d] was full before, and follows it at once
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from hfreduce._ffi import lib
from hfreduce.communicator import Communicator, core_of
from hfreduce.errors import InvalidArgumentError, InvalidUsageError, MismatchError
from hfreduce.grouping import current, open_groups
from hfreduce.work import Work

#: Bytes of a bucket unless the caller says otherwise.
BUCKET_BYTES = 4 << 20

#: What `compress` may be -> the datatype on the wire.
WIRE: dict[str, int] = {"fp16": lib.hfreduceFloat16, "bf16": lib.hfreduceBfloat16}

#: Parameters begin at multiples of so many bytes in a bucket: a cache line, and any vector.
ALIGNMENT = 64

#: (pointer, count, datatype, op) of an all_reduce in place.
Segment = tuple[Any, int, int, int]

_all_reduce = lib.hfreduceAllReduce


def plan(nbytes: Sequence[int], kinds: Sequence[Hashable], order: Sequence[int], bucket_bytes: int) -> list[list[int]]:
    """Cut parameters, taken in `order`, into buckets: lists of indices, in the order in which the buckets become ready.

    nbytes, kinds: of each parameter. Each bucket is of one kind (dtype), and closed when it holds bucket_bytes or more. A
    pure function of its arguments: all ranks come to the same buckets.
    """
    filling: dict[Hashable, list[int]] = {}
    size: dict[Hashable, int] = {}
    last: dict[Hashable, int] = {}
    closed: list[tuple[int, list[int]]] = []
    for position, index in enumerate(order):
        kind = kinds[index]
        filling.setdefault(kind, []).append(index)
        size[kind] = size.get(kind, 0) + nbytes[index]
        last[kind] = position
        if size[kind] >= bucket_bytes:
            closed.append((position, filling.pop(kind)))
            del size[kind]
    closed += [(last[kind], members) for kind, members in filling.items()]
    return [members for _, members in sorted(closed)]


def place(nbytes: Sequence[int]) -> tuple[list[int], int]:
    """Where members of so many bytes begin in a bucket, and the bytes of it all."""
    offsets, end = [], 0
    for size in nbytes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def require_same(comm: Communicator, lines: Sequence[str], what: str) -> None:
    """Raise MismatchError on all ranks, naming the first rank and line that differ from rank 0's. Collective."""
    import hashlib  # here, as OpenSSL takes its time to load

    text = "\n".join(lines).encode()
    mine = np.frombuffer(hashlib.sha256(text).digest() + len(text).to_bytes(8, "little"), np.uint8)
    everyone = np.empty((comm.nranks, mine.size), np.uint8)
    comm.all_gather(mine, everyone)
    differs = [rank for rank in range(comm.nranks) if (everyone[rank] != everyone[0]).any()]
    if not differs:
        return
    sizes = [int.from_bytes(row[-8:].tobytes(), "little") for row in everyone]
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    texts = np.empty((comm.nranks, padded.size), np.uint8)
    comm.all_gather(padded, texts)
    first, other = (texts[rank, : sizes[rank]].tobytes().decode().split("\n") for rank in (0, differs[0]))
    place_ = next((i for i, pair in enumerate(zip(first, other)) if pair[0] != pair[1]), min(len(first), len(other)))
    theirs, ours = (f"'{side[place_]}'" if place_ < len(side) else "nothing more" for side in (other, first))
    raise MismatchError(
        f"{what} differ between ranks: rank {differs[0]} has {theirs} where rank 0 has {ours}"
        + (f" (ranks {', '.join(map(str, differs))} differ from rank 0)" if len(differs) > 1 else ""),
        rank=comm.rank,
        peer=differs[0] if comm.rank == 0 else 0,
    )


def launch(comm: Communicator, segments: Sequence[Segment], keep: Any, stream: Any = None) -> Work:
    """Start all_reduces in place, together, as one Work; straight through the C interface, as each microsecond counts.

    stream: cdata, where the memory is a device's.
    """
    if open_groups and current() is not None:
        raise InvalidUsageError("a bucket's all_reduce cannot start inside `with group()`")
    handle = core_of(comm)
    calls = [(_all_reduce, (pointer, pointer, count, datatype, op)) for pointer, count, datatype, op in segments]
    return Work(handle.launch(calls, stream), keep, None, handle.running)


class Bucket:
    """Parameters that are reduced together: indices, how many are not ready yet, and the all_reduce once it runs."""

    def __init__(self, members: list[int]) -> None:
        self.members = members
        self.missing = len(members)
        self.work: Any = None  # a Work, or what waits as one


class Step:
    """A step's course: which gradients are ready, which bucket starts next. The base of both reducers.

    A derived class fills `_buckets` and says in `_start` how a bucket's all_reduce begins, in `_finish` what becomes of
    its result.
    """

    _buckets: Sequence[Any] = ()
    _hint = ""

    def __init__(
        self, comm: Communicator, names: Sequence[str], op: str, compress: str | None, error_feedback: bool, bucket_bytes: int
    ) -> None:
        if op not in ("avg", "sum"):
            raise InvalidArgumentError(f"op: {op!r} is not 'avg' or 'sum'")
        if compress is not None and compress not in WIRE:
            raise InvalidArgumentError(f"compress: {compress!r} is not None, 'fp16' or 'bf16'")
        if error_feedback and compress is None:
            raise InvalidArgumentError("error_feedback: there is no error to feed back without compress='fp16' or 'bf16'")
        if type(bucket_bytes) is not int or bucket_bytes < 1:
            raise InvalidArgumentError(f"bucket_bytes: {bucket_bytes!r} is not a positive integer")
        if not isinstance(comm, Communicator):
            raise InvalidArgumentError(f"comm: {type(comm).__name__} is not a hfreduce.Communicator")
        self.wait_seconds = 0.0  #: seconds spent in `synchronize` so far
        self._names = names
        self._op = int(lib.hfreduceAvg if op == "avg" else lib.hfreduceSum)
        self._bucket_of: list[Any] = []
        self._ready: list[bool] = [False] * len(names)
        self._next = 0  # the bucket that starts next
        self._active = False  # something was ready since the last synchronize
        self._syncing = True  # not in no_sync
        self._closed = False
        # Its own communicator: nothing else can come between the buckets, whose order is fixed.
        self._comm = comm.duplicate()

    # --- what the derived class says ---

    def _start(self, bucket: Any) -> Any:
        raise NotImplementedError

    def _finish(self, bucket: Any) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """All buckets are finished."""

    # --- the step ---

    @property
    def comm(self) -> Communicator:
        """The reducer's own communicator: a duplicate of the one it was given. Between steps it may be used, by all ranks alike."""
        return self._comm

    @property
    def active(self) -> bool:
        """Whether gradients were marked ready that have not been synchronised."""
        return self._active

    def _use(self, buckets: Sequence[Any]) -> None:
        self._buckets = buckets
        self._bucket_of = [None] * len(self._names)
        for bucket in buckets:
            for index in bucket.members:
                self._bucket_of[index] = bucket

    def _mark(self, index: int) -> None:
        """The gradient is there; start what can start."""
        bucket = self._bucket_of[index]
        if self._ready[index]:
            self._again(index, bucket)
            return
        self._ready[index] = self._active = True
        bucket.missing -= 1
        if not bucket.missing:
            buckets = self._buckets
            while self._next < len(buckets) and not buckets[self._next].missing:
                following = buckets[self._next]
                following.work = self._start(following)
                self._next += 1

    def _again(self, index: int, bucket: Any) -> None:
        raise InvalidUsageError(
            f"gradient {self._names[index]} became ready a second time before synchronize(); to accumulate several backward "
            f"passes, run all but the last inside `with no_sync()`{self._hint}"
        )

    def synchronize(self) -> None:
        """Start the buckets that have not started (missing gradients count as zero), wait for all, hand the results out.

        Collective: every rank calls it once a step, whatever its gradients. After an exception in a backward pass it ends the
        step in agreement with the other ranks. Raises what the all_reduces raised; the reducer is then to be closed.
        """
        self._check_open()
        begin = time.perf_counter()
        buckets = self._buckets
        while self._next < len(buckets):
            bucket = buckets[self._next]
            bucket.work = self._start(bucket)
            self._next += 1
        try:
            for bucket in buckets:
                bucket.work.wait()
                self._finish(bucket)  # the next ones run meanwhile
            self._end()
        finally:
            self._reset()
            self.wait_seconds += time.perf_counter() - begin

    def _reset(self) -> None:
        for bucket in self._buckets:
            bucket.work, bucket.missing = None, len(bucket.members)
        self._ready = [False] * len(self._names)
        self._next, self._active = 0, False

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate locally: gradients made inside start nothing; the next ones outside are reduced together with them."""
        outer, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = outer

    # --- the end ---

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidUsageError("the reducer is closed")

    def close(self) -> None:
        """Leave and free; closing twice is legal. In the middle of a step the all_reduces that run are aborted on all ranks."""
        if self._closed:
            return
        self._closed = True
        if not all(bucket.work is None or bucket.work.done() for bucket in self._buckets):
            self._comm.abort()
        self._comm.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
