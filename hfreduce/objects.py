"""Collectives of Python objects: pickled, told by size, sent as bytes.

    1. every rank pickles its object, and tells all others the size, or that it could not      (nobody waits for what never comes)
    2. where the whole is large, the ranks agree that each has the memory for it
    3. the bytes go, and are unpickled

What goes wrong in 1 and 2 ends the call on all ranks with an error, and leaves the communicator as it was.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

from hfreduce import uneven
from hfreduce._ffi import ffi, lib
from hfreduce._handle import Handle
from hfreduce.arguments import rank_of
from hfreduce.buffer import CHARS
from hfreduce.errors import InvalidArgumentError, InvalidUsageError, SystemError_

# From so many bytes on, the ranks ask each other whether there is room.
_LARGE = 1 << 31
_FAILED = -1


class ObjectCollectives:
    """The part of Communicator that sends objects instead of arrays."""

    __slots__ = ()

    _handle: Handle
    _rank: int
    _nranks: int

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks, in rank order, on every rank. Collective; waits.

        Objects go by pickle, of any size and kind, NumPy arrays inside too; every rank's is a copy, this rank's own as well.
        Unpickling runs code that the sender chooses. Only ranks that have shown the communicator's secret can send, so trust in
        the ranks is all that is needed; but do not pass on what came from somebody else as pickled bytes to be unpickled.

        Errors: InvalidArgumentError on a rank whose obj cannot be pickled, and at once InvalidUsageError, with `peer` that rank,
        on all others; SystemError_ where a rank has no memory for the objects; after these the communicator can be used.
        InvalidUsageError, with `peer`, on a rank that cannot unpickle an object (its class is not there), and inside a group.

            names = comm.all_gather_object({"rank": comm.rank, "host": comm.host})
        """
        data, sizes = self._tell(obj, "all_gather_object")
        everything = self._room(sum(sizes), True)
        uneven.all_gather(self._handle, self._nranks, data, everything, sizes, False, None)
        return self._all_unpickled(everything, sizes)

    def gather_object(self, obj: Any, root: int = 0) -> list[Any] | None:
        """Return the objects of all ranks, in rank order, on rank root; None elsewhere. Collective; waits.

        Objects and errors are as for `all_gather_object`; only the root unpickles.
        """
        root = rank_of(root, self._nranks, "root")
        data, sizes = self._tell(obj, "gather_object")
        everything = self._room(sum(sizes), self._rank == root)
        uneven.gather(self._handle, self._nranks, data, everything, sizes, root, False, None)
        return self._all_unpickled(everything, sizes) if self._rank == root else None

    def broadcast_object(self, obj: Any = None, root: int = 0) -> Any:
        """Return root's obj on every rank: itself on root, a copy elsewhere, where the argument is ignored. Collective; waits.

        Objects and errors are as for `all_gather_object`.

            settings = comm.broadcast_object(read_settings() if comm.rank == 0 else None)
        """
        root = rank_of(root, self._nranks, "root")
        data, sizes = self._tell(obj, "broadcast_object", root)
        here = self._rank == root
        room = self._room(sizes[root], not here)
        everything = data if here else room
        self._collective(lib.hfreduceBroadcast, everything, everything, everything.size, lib.hfreduceUint8, root)
        return obj if here else _unpickled(everything, self._rank, root)

    # --- the steps ---

    def _tell(self, obj: Any, call: str, root: int | None = None) -> tuple[Any, list[int]]:
        """This rank's object as pickled bytes, and the sizes of all ranks'. root: the only rank whose object counts."""
        self._handle.open()
        if self._handle.is_grouped():
            raise InvalidUsageError(f"{call} waits, so it cannot be called inside `with group()`")
        data, error, mine = b"", None, root is None or root == self._rank
        if mine:
            try:
                data = pickle.dumps(obj, protocol=5)
            except Exception as cause:
                error = InvalidArgumentError(
                    f"obj: this {type(obj).__name__} cannot be pickled ({type(cause).__name__}: {cause})"
                )
                error.__cause__ = cause
        sizes = np.zeros(self._nranks, np.int64)
        own = sizes[self._rank : self._rank + 1]
        own[0] = len(data) if error is None else _FAILED
        if root is None:
            self._collective(lib.hfreduceAllGather, own, sizes, 1, lib.hfreduceInt64)
        else:
            from_root = sizes[root : root + 1]
            self._collective(lib.hfreduceBroadcast, from_root, from_root, 1, lib.hfreduceInt64, root)
        if error is not None:
            raise error
        failed = np.flatnonzero(sizes == _FAILED).tolist()
        if failed:
            raise InvalidUsageError(
                f"{call}: rank{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))} gave an object that cannot be pickled; "
                f"the error there says why",
                rank=self._rank,
                peer=failed[0],
                op=call,
            )
        return np.frombuffer(data, np.uint8), sizes.tolist()

    def _collective(self, function: Any, x: Any, out: Any, *arguments: int) -> None:
        pointers = ffi.from_buffer(CHARS, x), ffi.from_buffer(CHARS, out)
        self._handle.issue(function, (*pointers, *arguments), (x, out), None, False, None)

    def _room(self, size: int, needed: bool) -> Any:
        """An array of so many bytes, on the ranks that need one; SystemError_ on all ranks where one has no memory for a large one."""
        try:
            room = np.empty(size if needed else 0, np.uint8)
        except (MemoryError, ValueError):
            if size < _LARGE:
                raise
            room = None
        if size >= _LARGE:
            lacks = np.full(1, self._nranks if room is not None else self._rank, np.int64)
            self._collective(lib.hfreduceAllReduce, lacks, lacks, 1, lib.hfreduceInt64, lib.hfreduceMin)
            if lacks[0] < self._nranks:
                raise SystemError_(
                    f"rank {lacks[0]} has no memory for the {size} bytes of the pickled objects; send them in smaller parts",
                    rank=self._rank,
                    peer=int(lacks[0]),
                )
        return room

    def _all_unpickled(self, everything: Any, sizes: Sequence[int]) -> list[Any]:
        places = np.cumsum([0, *sizes])
        return [_unpickled(everything[places[rank] : places[rank + 1]], self._rank, rank) for rank in range(self._nranks)]


def _unpickled(data: Any, here: int, rank: int) -> Any:
    """The object of rank `rank`, on rank `here`."""
    try:
        return pickle.loads(data)
    except Exception as cause:
        raise InvalidUsageError(
            f"the object of rank {rank} cannot be unpickled on rank {here} ({type(cause).__name__}: {cause})",
            rank=here,
            peer=rank,
        ) from cause
