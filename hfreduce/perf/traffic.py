"""What carried a measurement: the transports between ranks, their devices or addresses, and what went over them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from hfreduce.communicator import Communicator


class Traffic(NamedTuple):
    """The sum over all ranks and peers of one transport."""

    transport: str
    #: "host rxe0:1", "host 10.0.0.1"; none for shared memory.
    places: list[str]
    bytes_sent: int
    messages_sent: int
    stalls: int
    #: TCP segments, or what the verbs ports sent again.
    retries: int


def traffic(comm: Communicator) -> list[Traffic]:
    """What has gone over each transport so far, of all ranks; shared memory last. Collective.

    What collectives exchange inside a node goes through its common memory and is not counted.
    """
    mine: list[list[Any]] = []
    for c in comm.connections():
        place = c.local if c.transport == "verbs" else c.local.rpartition(":")[0].strip("[]")  # a port of TCP names nobody
        mine.append([c.transport, place and f"{comm.host} {place}", c.bytes_sent, c.messages_sent, c.stalls, c.retries])
    seen = [entry for rank in _gather(comm, mine) for entry in rank if entry[3]]
    found = []
    for transport in sorted({entry[0] for entry in seen}, key=lambda name: (name == "shm", name)):
        entries = [entry for entry in seen if entry[0] == transport]
        places = sorted({entry[1] for entry in entries if entry[1]})
        if transport == "verbs":  # each connection over a port tells of the whole port
            retries = sum(max(entry[5] for entry in entries if entry[1] == place) for place in places)
        else:
            retries = sum(entry[5] for entry in entries)
        sent, messages, stalls = (sum(entry[i] for entry in entries) for i in (2, 3, 4))
        found.append(Traffic(transport, places, sent, messages, stalls, retries))
    return found


def line(one: Traffic) -> str:
    """As in "verbs on node1 rxe0:1, node2 rxe0:1; 123.4 MB in 77 messages, 0 stalls, 0 retries"."""
    where = f" on {', '.join(one.places)}" if one.places else ""
    return (
        f"{one.transport}{where}; {one.bytes_sent / 1e6:.4g} MB in {one.messages_sent} messages, {one.stalls} stalls, "
        f"{one.retries} retries"
    )


def _gather(comm: Communicator, value: Any) -> list[Any]:
    """The JSON value of every rank, by rank."""
    data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    sizes = np.zeros(comm.nranks, np.int64)
    comm.all_gather(np.array([data.size], np.int64), sizes)
    width = int(sizes.max())
    everyone = np.zeros((comm.nranks, width), np.uint8)
    comm.all_gather(np.concatenate([data, np.zeros(width - data.size, np.uint8)]), everyone)
    return [json.loads(bytes(row[:size])) for row, size in zip(everyone, sizes)]
