"""Communicator.connections(): what one side sent is what the other received, over shared memory and TCP; and it may be asked at any time."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

import hfreduce
from hfreduce import rdma


def on_nodes(*nodes: int, **more: str) -> Any:
    """The environment that puts rank r on node nodes[r]."""
    return lambda rank: {"HFREDUCE_TRANSPORT": "tcp", **more, "HFREDUCE_HOSTID": f"host{nodes[rank]}"}


def network(name: str) -> str:
    """Skip where the transport cannot run."""
    if name == "verbs" and not rdma.find().ports:
        pytest.skip("no RDMA devices")
    return name


def by_peer(comm: hfreduce.Communicator) -> dict[int, hfreduce.Connection]:
    connections = comm.connections()
    peers = [connection.peer for connection in connections]
    assert peers == sorted(set(peers)), "one a peer, by rank"
    return {connection.peer: connection for connection in connections}


def exchange(comm: hfreduce.Communicator, count: int, times: int) -> dict[int, hfreduce.Connection]:
    """Rank r sends (r + 1) * count bytes to each other rank, `times` times."""
    assert comm.connections() == ()
    for _ in range(times):
        with comm.group():
            for peer in set(range(comm.nranks)) - {comm.rank}:
                comm.send(np.full((comm.rank + 1) * count, comm.rank, np.uint8), peer)
                comm.recv(np.empty((peer + 1) * count, np.uint8), peer)
    return by_peer(comm)


def agree(seen: list[dict[int, hfreduce.Connection]]) -> None:
    """What one side of a pair sent is what the other received."""
    for rank, connections in enumerate(seen):
        for peer, connection in connections.items():
            back = seen[peer][rank]
            assert connection.transport == back.transport
            assert (connection.bytes_sent, connection.messages_sent) == (back.bytes_received, back.messages_received)
            assert (connection.local, connection.remote) == (back.remote, back.local)


@pytest.mark.limit(60)
@pytest.mark.parametrize(("transport", "streams"), [("tcp", "1"), ("tcp", "3"), ("verbs", "1")])
def test_sends_are_counted_to_the_byte(transport: str, streams: str) -> None:
    count, times = 300_001, 5
    nodes = (0, 0, 1)
    seen = run_ranks(
        exchange, 3, count, times, env=on_nodes(*nodes, HFREDUCE_STREAMS=streams, HFREDUCE_TRANSPORT=network(transport))
    )
    agree(seen)
    for rank, connections in enumerate(seen):
        assert set(connections) == {0, 1, 2} - {rank}
        for peer, connection in connections.items():
            assert connection.transport == ("shm" if nodes[rank] == nodes[peer] else transport)
            assert connection.bytes_sent == (rank + 1) * count * times
            assert connection.bytes_received == (peer + 1) * count * times
            assert connection.messages_sent >= times
            if connection.transport == "shm":
                assert (connection.local, connection.remote, connection.retries) == ("", "", 0)
            elif transport == "verbs":
                ports = {f"{port.device}:{port.number}" for port in rdma.find().ports}
                assert {connection.local, connection.remote} <= ports
            else:
                assert connection.local.startswith("127.0.0.1:") and connection.remote.startswith("127.0.0.1:")


def collectives(comm: hfreduce.Communicator) -> dict[int, hfreduce.Connection]:
    x = np.ones(1_000_003, np.float32)
    comm.all_reduce(x)
    comm.all_reduce(x[:1])
    comm.broadcast(x, root=comm.nranks - 1)
    comm.all_gather(x[:1000], np.empty(1000 * comm.nranks, np.float32))
    return by_peer(comm)


@pytest.mark.limit(60)
def test_collectives_are_counted_on_both_sides() -> None:
    seen = run_ranks(collectives, 4, env=on_nodes(0, 0, 1, 2))
    agree(seen)
    used = [connection for connections in seen for connection in connections.values() if connection.bytes_sent]
    assert {connection.transport for connection in used} >= {"tcp"}
    two = run_ranks(collectives, 2, env=on_nodes(0, 1))
    agree(two)
    assert two[0][1].bytes_sent + two[0][1].bytes_received >= 3 * 4_000_012, "an all_reduce both ways, and a broadcast"


def late(comm: hfreduce.Communicator) -> hfreduce.Connection:
    x = np.ones(32 << 20, np.uint8)
    comm.send(x[:1], 1) if comm.rank == 0 else comm.recv(x[:1], 0)  # the connection is up
    if comm.rank == 0:
        comm.send(x, 1)
    else:
        time.sleep(0.3)
        comm.recv(x, 0)
    return comm.connections()[0]


@pytest.mark.limit(60)
@pytest.mark.parametrize("transport", ["shm", "tcp", "verbs"])
def test_a_sender_that_waits_for_room_stalls(transport: str) -> None:
    nodes = (0, int(transport != "shm"))
    more = {} if transport == "shm" else {"HFREDUCE_TRANSPORT": network(transport)}
    sender, receiver = run_ranks(late, 2, env=on_nodes(*nodes, **more))
    assert (sender.transport, receiver.transport) == (transport, transport)
    assert 1 <= sender.stalls <= sender.messages_sent, "a message stalls once, however often it is asked"
    assert (receiver.stalls, receiver.messages_sent) == (0, 0)


def look_beside(comm: hfreduce.Communicator, seconds: float) -> int:
    """Look while operations run and connections come up; the numbers only grow."""
    looks, before, stop = [0], {}, threading.Event()

    def look() -> None:
        while not stop.is_set():
            for connection in comm.connections():
                assert connection.transport
                old = before.get(connection.peer, connection)
                assert old.bytes_sent <= connection.bytes_sent and old.messages_received <= connection.messages_received
                before[connection.peer] = connection
            looks[0] += 1

    failures: list[Any] = []
    threading.excepthook = failures.append
    watcher = threading.Thread(target=look)
    watcher.start()
    end, x, more = time.monotonic() + seconds, np.ones(200_000, np.float32), np.ones(1, np.uint8)
    while comm.all_reduce(more, op="min")[0]:
        comm.all_reduce(x, op="max")
        comm.barrier()
        more[0] = time.monotonic() < end
    stop.set()
    watcher.join()
    assert not failures, failures
    return looks[0]


@pytest.mark.limit(60)
def test_looking_beside_running_operations() -> None:
    assert all(looks > 10 for looks in run_ranks(look_beside, 3, 1.0, env=on_nodes(0, 0, 1)))


def after_close_and_fork(comm: hfreduce.Communicator) -> None:
    comm.send(np.ones(1, np.uint8), 0) if comm.rank else comm.recv(np.ones(1, np.uint8), 1)
    child = os.fork()
    if child == 0:
        try:
            comm.connections()
        except hfreduce.InvalidUsageError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, "a forked child has none"
    assert len(comm.connections()) == 1
    comm.close()
    with pytest.raises(hfreduce.InvalidUsageError, match="closed"):
        comm.connections()


@pytest.mark.limit(60)
def test_closed_and_forked_communicators_have_none() -> None:
    run_ranks(after_close_and_fork, 2, env=on_nodes(0, 1))


def test_a_connection_cannot_be_changed() -> None:
    connection = hfreduce.Connection(1, "tcp", "a", "b", 1, 2, 3, 4, 5, 6)
    with pytest.raises(AttributeError):
        connection.bytes_sent = 0  # type: ignore[misc]


def test_one_rank_has_no_connections() -> None:
    with hfreduce.Communicator(0, 1) as comm:
        comm.all_reduce(np.ones(3, np.float32))
        assert comm.connections() == ()
