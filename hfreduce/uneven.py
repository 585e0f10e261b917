"""all_gather and gather of blocks that differ in size from rank to rank (MPI's Allgatherv and Gatherv), over the calls of the core.

    counts = [2, 0, 3]     rank 0: a b     rank 1: (nothing)     rank 2: c d e     ->     out: a b c d e

all_gather is one broadcast a block, in one group: every block crosses once to each node, may lie in place, and the ranks compare
its count before data moves. gather is an uneven all_to_all in which all but the root receive nothing; each message is compared with
what the root expects, and the digests of the lists, exchanged in the same group, find what no message shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from hfreduce._ffi import ffi, lib
from hfreduce._handle import NULL, Call, Handle, together
from hfreduce.arguments import counts_of, places, same_dtype, sums_to
from hfreduce.buffer import CHARS, Buffer, resolve
from hfreduce.device import common_stream
from hfreduce.errors import InvalidArgumentError, MismatchError
from hfreduce.types import TYPES
from hfreduce.work import Later

_SIZES = ffi.typeof("size_t[]")


def all_gather(handle: Handle, nranks: int, x: Any, out: Any, counts: Sequence[int], async_op: bool, stream: Any) -> Any:
    """As Communicator.all_gather with counts."""
    values = counts_of(counts, "counts", nranks)
    source, target = resolve(x, "x", writable=False, stream=stream), resolve(out, "out", writable=True, stream=stream)
    _check(source, target, values, handle.rank)
    blocks = _blocks(target, values)
    calls: list[Call] = [
        (lib.hfreduceBroadcast, (source.pointer if rank == handle.rank else block, block, count, target.dtype, rank))
        for rank, (block, count) in enumerate(zip(blocks, values))
    ]
    where = common_stream(stream, source.stream, target.stream)
    return handle.issue(together(calls), (), (source.keep, target.keep), out, async_op, where)


def gather(handle: Handle, nranks: int, x: Any, out: Any, counts: Sequence[int], root: int, async_op: bool, stream: Any) -> Any:
    """As Communicator.gather with counts."""
    values, here = counts_of(counts, "counts", nranks), handle.rank == root
    source = resolve(x, "x", writable=False, stream=stream)
    target = Buffer(NULL, 0, source.dtype, None)
    if here:
        if out is None:
            raise InvalidArgumentError(f"out: the root needs an array of sum(counts) = {sum(values)} elements")
        target = resolve(out, "out", writable=True, stream=stream)
        _check(source, target, values, root)
    else:
        sums_to(values[handle.rank : handle.rank + 1], f"counts[{handle.rank}]", source.elements, "x")
    sends, receives = [0] * nranks, list(values) if here else [0] * nranks
    sends[root] = values[handle.rank]
    pointer = source.pointer
    if here and int(ffi.cast("uintptr_t", pointer)) == int(ffi.cast("uintptr_t", _blocks(target, values)[root])):
        sends[root], receives[root], pointer = 0, 0, NULL  # in place
    lists = [ffi.new(_SIZES, each) for each in (sends, [0] * nranks, receives, places(values) if here else [0] * nranks)]
    calls: list[Call] = [(lib.hfreduceAlltoAllv, (pointer, *lists[:2], target.pointer, *lists[2:], source.dtype))]
    where = common_stream(stream, source.stream, target.stream)
    keep, result = (source.keep, target.keep, lists), out if here else None
    if nranks == 1 or where is not None:
        return handle.issue(together(calls), (), keep, result, async_op, where)
    same = _Same(values, nranks, handle.rank, result)
    made = handle.issue(together([same.call, *calls]), (), (keep, same), same, async_op, where)
    if made is not same:
        return made
    return result if handle.is_grouped() else same.settle()


class _Same(Later):
    """The result of a gather, once it is known that all ranks gave the same counts."""

    def __init__(self, counts: Sequence[int], nranks: int, rank: int, shown: Any) -> None:
        self.shown, self._rank = shown, rank
        mine = np.array(counts, np.uint64).tobytes()
        self._mine = np.array([zlib.crc32(mine), zlib.adler32(mine)], np.uint32)
        self._everyone = np.zeros((nranks, 2), np.uint32)
        #: Exchanges the digests.
        self.call: Call = (
            lib.hfreduceAllGather,
            (ffi.from_buffer(CHARS, self._mine), ffi.from_buffer(CHARS, self._everyone), 2, lib.hfreduceUint32),
        )

    def settle(self) -> Any:
        """The array; MismatchError where the digests differ."""
        differs = np.flatnonzero((self._everyone != self._everyone[0]).any(axis=1)).tolist()
        if differs:
            listed = ", ".join(map(str, differs))
            raise MismatchError(
                f"gather: the counts of rank{'s' if len(differs) > 1 else ''} {listed} differ from rank 0's; give the same list on "
                f"all ranks",
                rank=self._rank,
                peer=differs[0] if self._rank == 0 else 0,
                op="gather",
            )
        return self.shown


def _check(source: Buffer, target: Buffer, counts: Sequence[int], rank: int) -> None:
    same_dtype(source, target)
    sums_to(counts, "counts", target.elements, "out")
    sums_to(counts[rank : rank + 1], f"counts[{rank}]", source.elements, "x")


def _blocks(target: Buffer, counts: Sequence[int]) -> list[Any]:
    """Where each rank's block begins."""
    begin, size = ffi.cast("char *", target.pointer), TYPES[target.dtype].size
    return [begin + place * size for place in places(counts)]
