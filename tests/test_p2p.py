"""Sends and receives: tags, any source, who gets which message, and how waits for them end.

Random programs are checked against a matcher that follows MPI's rule: receives of one source and tag, in the order in which they
were posted, get that source's messages of the tag in the order in which they were sent.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import hfreduce
from hfreduce import AbortedError, DeadlineError, InvalidArgumentError, MismatchError, PeerLostError

PAIRS = pytest.mark.parametrize("nodes", [(0, 0), (0, 1)], ids=["node", "tcp"])


class Hosts:
    """The variables of the ranks: rank r plays host nodes[r]."""

    def __init__(self, nodes: tuple[int, ...], **more: str) -> None:
        self.nodes, self.more = nodes, more

    def __call__(self, rank: int) -> dict[str, str]:
        spin = {"HFREDUCE_SPIN": "16"} if len(self.nodes) > (os.cpu_count() or 1) else {}
        return {"HFREDUCE_HOSTID": f"host{self.nodes[rank]}", **spin, **self.more}


# --- random programs ---


@dataclass(frozen=True)
class Message:
    """The index-th message from source to target with this tag."""

    source: int
    target: int
    tag: int
    index: int
    count: int

    def payload(self) -> Any:
        seed = (self.source * 7 + self.target * 31 + self.tag * 131 + self.index * 1031) % 2**30
        return ((np.arange(seed, seed + self.count, dtype=np.uint32) * np.uint32(2654435761)) >> np.uint32(24)).astype(np.uint8)


@dataclass(frozen=True)
class Receive:
    """A receive that is posted; source None: any."""

    source: int | None
    tag: int
    count: int


@dataclass
class Program:
    """What the ranks send, each in this order, and what each posts to receive it."""

    sends: list[list[Message]]
    receives: list[list[Receive]]


def size(dice: random.Random) -> int:
    """Bytes, up to 1 MiB, small ones and the edges of parts more often."""
    return dice.choice([0, 1, 3, 100, 4095, 4096, 4097, 8192, dice.randrange(80_000), dice.randrange(2**20)])


def make_program(seed: int, nranks: int) -> Program:
    """Random messages, and receives for all of them.

    A tag's receives from a given source are posted before its receives from any, which could else take what they wait for.
    """
    dice = random.Random(seed)
    sends: list[list[Message]] = [[] for _ in range(nranks)]
    receives: list[list[Receive]] = []
    for target in range(nranks):
        lines: list[list[Receive]] = []  # each keeps its order, and they mix
        for tag in dice.sample([0, 1, 2, 3, 77, 2**31 - 1], dice.randrange(1, 5)):
            mixed, count = dice.random() < 0.6, size(dice)
            exact: list[Receive] = []
            anyone: list[Receive] = []
            for source in range(nranks):
                for index in range(dice.choice([0, 1, 1, 2, 5])):
                    message = Message(source, target, tag, index, count if mixed else size(dice))
                    sends[source].append(message)
                    whose = anyone if mixed and dice.random() < 0.7 else exact
                    whose.append(Receive(None if whose is anyone else source, tag, message.count))
            if mixed:
                dice.shuffle(exact)
                lines.append(exact + anyone)
            else:
                by_source: dict[Any, list[Receive]] = defaultdict(list)
                for receive in exact:
                    by_source[receive.source].append(receive)
                lines += by_source.values()
        order = [line for line, receives_ in enumerate(lines) for _ in receives_]
        dice.shuffle(order)
        places = [iter(line) for line in lines]
        receives.append([next(places[line]) for line in order])
    for source in range(nranks):  # a tag's messages to a rank keep their order
        shuffled = sends[source][:]
        dice.shuffle(shuffled)
        queues: dict[Any, list[Message]] = defaultdict(list)
        for message in sends[source]:
            queues[message.target, message.tag].append(message)
        sends[source] = [queues[message.target, message.tag].pop(0) for message in shuffled]
    return Program(sends, receives)


def run_program(comm: Any, program: Program, how: str, dice: random.Random) -> None:
    """Run this rank's part: everything asynchronous and mixed; or in one group; or with receives that block, in their order."""
    sends, receives = list(program.sends[comm.rank]), list(program.receives[comm.rank])
    buffers = [np.full(receive.count, 0xEE, np.uint8) for receive in receives]
    sources: list[Any] = []
    running = []
    order = [True] * len(sends) + [False] * len(receives)
    if how == "blocking":
        order.sort(reverse=True)
    else:
        dice.shuffle(order)
    asynchronous = {} if how == "group" else {"async_op": True}

    def act() -> None:
        posted = 0
        for sending in order:
            if sending:
                message = sends.pop(0)
                work = comm.send(message.payload(), message.target, tag=message.tag, **asynchronous)
                running.append(work)
                continue
            receive, buffer = receives[posted], buffers[posted]
            posted += 1
            options = {} if how == "blocking" else asynchronous
            if receive.source is None:
                result = comm.recv_any(buffer, tag=receive.tag, **options)
            else:
                result = comm.recv(buffer, receive.source, tag=receive.tag, **options)
            sources.append(result)
            if dice.random() < 0.05:
                time.sleep(0.001)

    if how == "group":
        with comm.group() as group:
            act()
        given = [result for result, sending in zip(group.results, order) if not sending]
    else:
        act()
        for work in running:
            work.wait()
        given = [work.wait() for work in sources] if how == "async" else sources
    match(comm.rank, receives, given, buffers)


def match(rank: int, receives: list[Receive], given: list[Any], buffers: list[Any]) -> None:
    """Does each receive have the message that MPI's rule gives it, where `given` says whom any-source ones received from?"""
    next_index: dict[tuple[int, int], int] = defaultdict(int)
    for number, (receive, result, buffer) in enumerate(zip(receives, given, buffers)):
        source = receive.source
        if source is None:
            assert isinstance(result, int), result
            source = result
        else:
            assert result is buffer
        message = Message(source, rank, receive.tag, next_index[source, receive.tag], receive.count)
        next_index[source, receive.tag] += 1
        np.testing.assert_array_equal(buffer, message.payload(), f"receive {number}: {receive} from {source}: {message}")


def random_programs(comm: Any, seed: int, count: int) -> None:
    for k in range(count):
        comm.barrier()  # the next program's messages must not meet this one's receives from any source
        program = make_program(seed * 1000 + k, comm.nranks)
        how = ["async", "blocking", "group"][k % 3]
        try:
            run_program(comm, program, how, random.Random(seed * 1000 + k * 10 + comm.rank))
        except Exception as error:
            raise AssertionError(
                f"program {seed * 1000 + k} of {comm.nranks} ranks, {how}: {type(error).__name__}: {error}"
            ) from error


LAYOUTS = [(0, 0), (0, 1), (0, 0, 0), (0, 1, 2), (0, 0, 1), (0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 3)]


@pytest.mark.limit(90)
@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
def test_random_programs(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    seed = sum(node * 5**i for i, node in enumerate(nodes)) + 1000 * len(nodes)
    run_ranks(random_programs, len(nodes), seed, 9, env=Hosts(nodes), timeout=70, comm_timeout=40)


@pytest.mark.limit(90)
@pytest.mark.parametrize(
    "more",
    [{"HFREDUCE_TCP_STREAMS": "3"}, {"HFREDUCE_CHUNK": "8192", "HFREDUCE_CHECKSUM": "1"}],
    ids=["streams", "small chunks and checksums"],
)
def test_random_programs_over_tcp(run_ranks: Any, more: dict[str, str]) -> None:
    run_ranks(random_programs, 3, 7, 9, env=Hosts((0, 1, 1), **more), timeout=70, comm_timeout=40)


@pytest.mark.limit(90)
@pytest.mark.parametrize("nranks", [1, 2, 4])
def test_random_programs_of_threads(run_ranks: Any, nranks: int) -> None:
    env = {"HFREDUCE_SPIN": "16"} if nranks > (os.cpu_count() or 1) else None
    run_ranks(random_programs, nranks, 50 + nranks, 6, env=env, threads=True, timeout=70, comm_timeout=40)


# --- the rules, one at a time ---


def overtaken(comm: Any, count: int) -> None:
    """Tag 1 leaves first; tag 2 is posted first, waited for first; any source gets past both."""
    if comm.rank == 0:
        works = [comm.send(np.full(count, tag), 1, tag=tag, async_op=True) for tag in (1, 2, 3, 1)]
        for work in works:
            work.wait()
    else:
        third = np.zeros(count, int)
        assert comm.recv_any(third, tag=3) == 0
        second, first, last = (np.zeros(count, int) for _ in range(3))
        work = comm.recv(second, 0, tag=2, async_op=True)
        works = [comm.recv(first, 0, tag=1, async_op=True), comm.recv_any(last, tag=1, async_op=True)]
        assert work.wait() is second
        assert works[1].wait() == works[1].result == 0
        assert works[0].wait() is first
        for x, value in zip((first, second, third, last), (1, 2, 3, 1)):
            assert (x == value).all()
    comm.barrier()


@pytest.mark.limit(40)
@PAIRS
@pytest.mark.parametrize("count", [0, 1, 3000, 400_000])
def test_a_message_overtakes_those_of_other_tags(run_ranks: Any, nodes: tuple[int, ...], count: int) -> None:
    run_ranks(overtaken, 2, count, env=Hosts(nodes))


def parting(comm: Any) -> None:
    """A receive for a message half of which was already kept aside when the receive came."""
    big = 3_000_000
    if comm.rank == 0:
        comm.send(np.arange(big), 1, tag=1)
        comm.send(np.arange(5), 1, tag=2)
    else:
        x, y = np.zeros(big, int), np.zeros(5, int)
        small = comm.recv(y, 0, tag=2, async_op=True)
        time.sleep(0.002)
        comm.recv(x, 0, tag=1)
        assert x[-1] == big - 1 and (x == np.arange(big)).all()
        small.wait()
        assert y.tolist() == [0, 1, 2, 3, 4]
    comm.barrier()


@pytest.mark.limit(40)
@PAIRS
def test_a_receive_for_a_message_that_is_arriving(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_ranks(parting, 2, env=Hosts(nodes))


def everyone_is_served(comm: Any, rounds: int) -> None:
    """Rank 0 takes from whoever comes, when all wait: they take turns."""
    if comm.rank:
        works = [comm.send(np.array([comm.rank, k]), 0, async_op=True) for k in range(rounds)]
        works.append(comm.send(np.zeros(1), 0, tag=1, async_op=True))
        for work in works:
            work.wait()
    else:
        for source in range(1, comm.nranks):
            comm.recv(np.zeros(1), source, tag=1)  # all others are now kept aside
        x, turns = np.zeros(2, int), []
        for k in range(rounds * (comm.nranks - 1)):
            turns.append(comm.recv_any(x))
            assert x.tolist() == [turns[-1], k // (comm.nranks - 1)]
        assert turns == list(range(1, comm.nranks)) * rounds
    comm.barrier()


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2), (0, 0, 1)], ids=str)
def test_any_source_serves_all(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_ranks(everyone_is_served, 3, 100, env=Hosts(nodes))


def long_awaited(comm: Any) -> None:
    """Whoever blocks long comes back to Python in between, and still learns the rank."""
    x = np.zeros(3)
    if comm.rank == 0:
        assert comm.recv_any(x, tag=5) == 1
        assert x.tolist() == [1, 1, 1]
    else:
        time.sleep(0.7)
        comm.send(np.ones(3), 0, tag=5)


@pytest.mark.limit(40)
@PAIRS
def test_any_source_is_awaited_long(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_ranks(long_awaited, 2, env=Hosts(nodes))


def beside_collectives(comm: Any) -> None:
    """An open receive from any source holds up no collective, and the other way round."""
    x = np.zeros(3)
    work = comm.recv_any(x, tag=5, async_op=True)
    assert work.result is None and not work.done()
    for _ in range(20):
        assert comm.all_reduce(np.ones(1000))[0] == comm.nranks
    comm.send(np.full(3, comm.rank + 1.0), (comm.rank + 1) % comm.nranks, tag=5)
    before = (comm.rank - 1) % comm.nranks
    assert work.wait() == work.result == before
    assert x.tolist() == [before + 1] * 3


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2)], ids=str)
def test_any_source_beside_collectives(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_ranks(beside_collectives, 3, env=Hosts(nodes))


def test_with_oneself() -> None:
    with hfreduce.Communicator(0, 1, timeout=5) as comm:
        x, y, z = np.zeros(2), np.zeros(200_000), np.zeros(1)
        with comm.group() as group:
            comm.send(np.ones(1), 0, tag=3)
            comm.send(np.full(200_000, 2.0), 0)
            comm.send(np.full(2, 3.0), 0, tag=9)
            comm.recv(x, 0, tag=9)
            assert comm.recv_any(y) is None
            with comm.group():
                comm.recv_any(z, tag=3)
        assert group.results[3] is x
        assert group.results[4:] == [0, 0]
        assert (x == 3).all() and (y == 2).all() and (z == 1).all()
        with comm.group(async_op=True) as group:
            comm.recv_any(z, tag=2**31 - 1)
            comm.send(np.full(1, 7.0), 0, tag=2**31 - 1)
        assert group.work is not None
        assert group.work.wait()[0] == group.results[0] == 0
        assert z[0] == 7


def test_wrong_tags() -> None:
    with hfreduce.Communicator(0, 1) as comm:
        x = np.zeros(1)
        for call in (lambda t: comm.send(x, 0, tag=t), lambda t: comm.recv(x, 0, tag=t), lambda t: comm.recv_any(x, tag=t)):
            with pytest.raises(InvalidArgumentError, match="tag: -1 is not from 0 to 2147483647"):
                call(-1)
            with pytest.raises(InvalidArgumentError, match="tag: 2147483648 is not"):
                call(2**31)
            with pytest.raises(InvalidArgumentError, match=r"tag: 1\.5 is not an integer"):
                call(1.5)
        with pytest.raises(InvalidArgumentError, match="read-only"):
            comm.recv_any(b"abc")


# --- how waits end ---


def disagreeing(comm: Any, way: str, sent: int, received: int, dtype: str) -> None:
    with pytest.raises(MismatchError, match=rf"count {received}, {dtype}, tag 1.*count {sent}, float32, tag 1|rank 1"):
        if comm.rank == 0:
            comm.send(np.ones(sent, np.float32), 1, tag=1, async_op=True)
            comm.send(np.ones(1, np.float32), 1, tag=2)
            comm.barrier()
        else:
            x = np.zeros(received, dtype)
            if way == "kept aside":
                comm.recv(np.zeros(1, np.float32), 0, tag=2)
            if way == "any source":
                comm.recv_any(x, tag=1)
            else:
                comm.recv(x, 0, tag=1)
            comm.barrier()


@pytest.mark.limit(40)
@PAIRS
@pytest.mark.parametrize("way", ["posted", "kept aside", "any source"])
@pytest.mark.parametrize(
    ("sent", "received", "dtype"), [(10, 20, "float32"), (20, 10, "float32"), (10, 10, "int32"), (0, 5, "float32"), (300_000, 10, "float32")]
)  # fmt: skip
def test_disagreement(run_ranks: Any, nodes: tuple[int, ...], way: str, sent: int, received: int, dtype: str) -> None:
    run_ranks(disagreeing, 2, way, sent, received, dtype, env=Hosts(nodes), timeout=20, comm_timeout=5)


def too_late(comm: Any) -> None:
    comm.barrier()
    comm.timeout = 1
    if comm.rank == 1:
        start = time.monotonic()
        with pytest.raises(
            DeadlineError, match=r"tag 4.*deadline of 1 s passed waiting for any source: rank 0 on .*, rank 2 on "
        ):
            comm.recv_any(np.zeros(3), tag=4)
        assert 0.9 < time.monotonic() - start < 8
    else:
        with pytest.raises(DeadlineError):
            comm.send(np.zeros(3), 1, tag=3)  # of another tag: it is kept aside, and not taken for the one awaited
            comm.timeout = 10
            comm.recv(np.zeros(3), 1)


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2)], ids=str)
def test_deadline_of_any_source(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_ranks(too_late, 3, env=Hosts(nodes), timeout=20)


def bereaved(comm: Any) -> float:
    comm.barrier()
    if comm.rank == 2:
        time.sleep(0.5)  # until the others have left the barrier too
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 2"):
        comm.recv_any(np.zeros(3), tag=4)
    return time.monotonic() - start


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2), (0, 0, 1)], ids=str)
def test_a_rank_dies_while_any_is_awaited(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    outcomes = run_ranks(bereaved, 3, env=Hosts(nodes), timeout=20, check=False)
    assert [outcome.ok for outcome in outcomes] == [True, True, False], "\n".join(map(str, outcomes))
    assert max(outcome.value for outcome in outcomes[:2]) < 8


def deserted(comm: Any) -> None:
    """Rank 2 leaves; rank 0 can still receive from rank 1; when that has left too, nobody can send."""
    comm.barrier()
    if comm.rank == 1:
        time.sleep(1.5)  # longer than what a rank sent before it left may be on its way
        comm.send(np.full(3, 1.0), 0, tag=4)
    if comm.rank == 0:
        x = np.zeros(3)
        assert comm.recv_any(x, tag=4) == 1
        assert x.tolist() == [1, 1, 1]
        start = time.monotonic()
        with pytest.raises(
            PeerLostError, match=r"has closed the communicator or exited; waiting for any source: rank 1 .*, rank 2 "
        ):
            comm.recv_any(x, tag=4)
        assert time.monotonic() - start < 8


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2), (0, 0, 1)], ids=str)
def test_ranks_leave_while_any_is_awaited(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_ranks(deserted, 3, env=Hosts(nodes), timeout=20)


def aborted(comm: Any) -> None:
    comm.barrier()
    if comm.rank == 1:
        time.sleep(0.3)
        comm.abort()
        return
    x = [np.zeros(3) for _ in range(3)]
    works = [comm.recv_any(x[0], tag=1, async_op=True), comm.recv(x[1], 1, tag=2, async_op=True)]
    with pytest.raises(AbortedError, match="rank 1"):
        comm.recv_any(x[2], tag=4)
    for work in works:
        assert isinstance(work.exception(), AbortedError)
        with pytest.raises(AbortedError):
            work.wait()
    assert works[0].result is None


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2)], ids=str)
def test_abort_while_any_is_awaited(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_ranks(aborted, 3, env=Hosts(nodes), timeout=20)


def unreceived(rank: int, nranks: int, times: int) -> int:
    """How many descriptors more than before this rank has, after communicators on which a message came that nobody received."""

    def make(number: int) -> hfreduce.Communicator:
        unique_id = hfreduce.UniqueId.from_address(os.environ["HFREDUCE_ADDR"], os.environ["HFREDUCE_SECRET"], number)
        return hfreduce.Communicator(rank, nranks, unique_id, timeout=10)

    before = 0
    for number in range(times):
        if number == 1:  # what a process opens once is open
            before = len(os.listdir("/proc/self/fd"))
        comm = make(number)
        if rank == 0:
            comm.send(np.ones(3), 1, async_op=True)
        comm.barrier()
        time.sleep(0.05)  # the connection for it comes to rank 1, which has no use for it
        comm.abort()
        comm.close()
    end = time.monotonic() + 5
    while (more := len(os.listdir("/proc/self/fd")) - before) > 0 and time.monotonic() < end:
        time.sleep(0.02)
    return more


@pytest.mark.limit(40)
def test_connections_of_messages_that_nobody_receives_are_closed(run_ranks: Any) -> None:
    for more in run_ranks(unreceived, 2, 2, 12, env=Hosts((0, 1)), comm=False):
        assert more <= 2


def stranded(comm: Any) -> str:
    """Rank 2 waits for rank 0 alone, and has no connection to rank 1, which aborts; rank 0 calls nothing. What rank 2 is told."""
    comm.barrier()
    told = ""
    if comm.rank == 1:
        time.sleep(0.3)
        comm.abort()
    elif comm.rank == 2:
        with pytest.raises(AbortedError) as caught:
            comm.recv(np.zeros(3), 0)
        told = str(caught.value)
    else:
        for _ in range(500):
            if comm.async_error():
                break
            time.sleep(0.02)
        time.sleep(1)  # it has heard of it, and does not leave yet: only its word ends the others' waits
        assert isinstance(comm.async_error(), AbortedError)
    return told


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2)], ids=str)
def test_an_abort_reaches_a_rank_that_waits_for_another(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    """Rank 0 passes on what a rank says of its end to all, and not by leaving itself."""
    assert "rank 1" in run_ranks(stranded, 3, env=Hosts(nodes), comm_timeout=30.0, timeout=20)[2]
