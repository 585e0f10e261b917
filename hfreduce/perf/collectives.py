"""What is measured: one entry a collective, with nccl-tests' meaning of size and count, and its bus-bandwidth factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hfreduce.communicator import Communicator
from hfreduce.perf import patterns

Array = np.ndarray[Any, Any]


class Task(NamedTuple):
    """One collective on given buffers.

    Fill sets the input (and spoils the output), call runs it, wrong counts wrong elements after fill and call.
    """

    fill: Callable[[], None]
    call: Callable[[], Any]
    wrong: Callable[[], int]


@dataclass(frozen=True)
class Setup:
    """What a Task is made from. count: elements of a part (nccl-tests' count). memory: two arrays that hold nranks parts each."""

    comm: Communicator
    count: int
    dtype: np.dtype[Any]
    op: str
    root: int
    memory: tuple[Array, Array]
    in_place: bool

    def buffers(self, send_parts: int, recv_parts: int) -> tuple[Array, Array]:
        """Send and receive buffer; the same memory when in place."""
        send, recv = (memory.view(self.dtype) for memory in self.memory)
        return (recv if self.in_place else send)[: send_parts * self.count], recv[: recv_parts * self.count]

    def part(self, array: Array, index: int) -> Array:
        """Part `index` of an array of nranks parts."""
        return array[index * self.count : (index + 1) * self.count]


class Collective(NamedTuple):
    """An entry of the table. per_rank: the size is that of nranks parts, not of one. bus: nranks -> busbw / algbw."""

    make: Callable[[Setup], Task]
    per_rank: bool
    bus: Callable[[int], float]
    reduces: bool = False
    rooted: bool = False
    in_place: bool = True


_POISON = 0x55


def _spoil(array: Array) -> None:
    array.view(np.uint8)[...] = _POISON


def _reduction(s: Setup, call: Callable[[Array, Array], Any], root: int | None) -> Task:
    """all_reduce (root None) and reduce."""
    send, recv = s.buffers(1, 1)
    rank, n = s.comm.rank, s.comm.nranks

    def fill() -> None:
        _spoil(recv)
        patterns.fill(send, patterns.reduced_input(rank, n, s.op, s.dtype))

    def wrong() -> int:
        return patterns.wrong(recv, patterns.reduced(n, s.op, s.dtype)) if root in (None, rank) else 0

    return Task(fill, lambda: call(send, recv), wrong)


def _all_reduce(s: Setup) -> Task:
    comm, op = s.comm, s.op
    if s.in_place:
        return _reduction(s, lambda send, recv: comm.all_reduce(recv, None, op), None)
    return _reduction(s, lambda send, recv: comm.all_reduce(send, recv, op), None)


def _reduce(s: Setup) -> Task:
    comm, op, root = s.comm, s.op, s.root
    return _reduction(s, lambda send, recv: comm.reduce(send, None if s.in_place else recv, op, root), root)


def _broadcast(s: Setup) -> Task:
    send, recv = s.buffers(1, 1)
    values = patterns.moved(s.root, s.dtype)

    def fill() -> None:
        _spoil(recv)
        if s.comm.rank == s.root:
            patterns.fill(send, values)

    def call() -> Any:
        return s.comm.broadcast(recv, s.root) if s.in_place else s.comm.broadcast(send, s.root, out=recv)

    return Task(fill, call, lambda: patterns.wrong(recv, values))


def _gathering(s: Setup, call: Callable[[Array, Array], Any], root: int | None) -> Task:
    """all_gather (root None) and gather. In place, a rank's input is its part of the output."""
    n, rank = s.comm.nranks, s.comm.rank
    _, recv = s.buffers(n, n)
    send = s.part(recv, rank) if s.in_place else s.buffers(1, n)[0]

    def fill() -> None:
        _spoil(recv)
        patterns.fill(send, patterns.moved(rank, s.dtype))

    def wrong() -> int:
        if root not in (None, rank):
            return 0
        return sum(patterns.wrong(s.part(recv, peer), patterns.moved(peer, s.dtype)) for peer in range(n))

    return Task(fill, lambda: call(send, recv), wrong)


def _all_gather(s: Setup) -> Task:
    return _gathering(s, s.comm.all_gather, None)


def _gather(s: Setup) -> Task:
    return _gathering(s, lambda send, recv: s.comm.gather(send, recv, s.root), s.root)


def _reduce_scatter(s: Setup) -> Task:
    n, rank = s.comm.nranks, s.comm.rank
    send, recv = s.buffers(n, 1)
    if s.in_place:
        recv = s.part(send, rank)

    def fill() -> None:
        _spoil(recv)
        for peer in range(n):
            patterns.fill(s.part(send, peer), patterns.reduced_input(rank, n, s.op, s.dtype))

    return Task(
        fill,
        lambda: s.comm.reduce_scatter(send, recv, s.op),
        lambda: patterns.wrong(recv, patterns.reduced(n, s.op, s.dtype)),
    )


def _all_to_all(s: Setup) -> Task:
    n, rank = s.comm.nranks, s.comm.rank
    send, recv = s.buffers(n, n)

    def fill() -> None:
        _spoil(recv)
        for peer in range(n):
            patterns.fill(s.part(send, peer), patterns.moved(rank * n + peer, s.dtype))

    def wrong() -> int:
        return sum(patterns.wrong(s.part(recv, peer), patterns.moved(peer * n + rank, s.dtype)) for peer in range(n))

    return Task(fill, lambda: s.comm.all_to_all(send, recv), wrong)


def _scatter(s: Setup) -> Task:
    n, rank = s.comm.nranks, s.comm.rank
    send, recv = s.buffers(n, 1)
    if s.in_place and rank == s.root:
        recv = s.part(send, rank)

    def fill() -> None:
        _spoil(recv)
        if rank == s.root:
            for peer in range(n):
                patterns.fill(s.part(send, peer), patterns.moved(peer, s.dtype))

    return Task(
        fill,
        lambda: s.comm.scatter(send if rank == s.root else None, recv, s.root),
        lambda: patterns.wrong(recv, patterns.moved(rank, s.dtype)),
    )


def _sendrecv(s: Setup) -> Task:
    comm, n = s.comm, s.comm.nranks
    send, recv = s.buffers(1, 1)
    after, before = (comm.rank + 1) % n, (comm.rank - 1) % n

    def fill() -> None:
        _spoil(recv)
        patterns.fill(send, patterns.moved(comm.rank, s.dtype))

    def call() -> None:
        with comm.group():
            comm.send(send, after)
            comm.recv(recv, before)

    return Task(fill, call, lambda: patterns.wrong(recv, patterns.moved(before, s.dtype)))


#: The collectives by name. Formulas: nccl-tests' PERFORMANCE.md.
COLLECTIVES: dict[str, Collective] = {
    "all_reduce": Collective(_all_reduce, False, lambda n: 2 * (n - 1) / n, reduces=True),
    "all_gather": Collective(_all_gather, True, lambda n: (n - 1) / n),
    "reduce_scatter": Collective(_reduce_scatter, True, lambda n: (n - 1) / n, reduces=True),
    "broadcast": Collective(_broadcast, False, lambda n: 1.0, rooted=True),
    "reduce": Collective(_reduce, False, lambda n: 1.0, reduces=True, rooted=True),
    "all_to_all": Collective(_all_to_all, True, lambda n: (n - 1) / n),
    "gather": Collective(_gather, True, lambda n: (n - 1) / n, rooted=True),
    "scatter": Collective(_scatter, True, lambda n: (n - 1) / n, rooted=True),
    "sendrecv": Collective(_sendrecv, False, lambda n: 1.0, in_place=False),
}
